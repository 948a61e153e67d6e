"""A tiny data set and tiny weights to run the commands on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from yolov9_fast.data.rendered import SHAPES, render_dataset
from yolov9_fast.models import create_model, save_weights


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data file of 8 + 4 rendered images of 64 pixels."""
    return render_dataset(tmp_path_factory.mktemp("shapes"), train=8, val=4, size=64)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gelan-t with random weights for the rendered shapes."""
    torch.manual_seed(0)
    model = create_model("gelan-t", len(SHAPES))
    model.names = dict(enumerate(SHAPES))
    return save_weights(model, tmp_path_factory.mktemp("weights") / "shapes.safetensors")
