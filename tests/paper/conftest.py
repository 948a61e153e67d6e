"""A data set of a few pictures and a network of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from yolov9_fast.data.rendered import render_dataset
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.models import Graph
from yolov9_fast.models.graph import graph_from_dict


@pytest.fixture(scope="session")
def few_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_dataset(tmp_path_factory.mktemp("pictures"), train=8, val=4, size=64, seed=5)


@pytest.fixture
def short_recipe(few_pictures: Path) -> TrainConfig:
    return TrainConfig(
        data=str(few_pictures),
        epochs=2,
        imgsz=64,
        batch=4,
        nominal_batch=4,
        device="cpu",
        workers=0,
        class_tower=8,
        close_mosaic=1,
        patience=0,
        plots=False,
        tensorboard=False,
    )


@pytest.fixture(scope="session")
def small_graph() -> Graph:
    rows = [[-1, "Conv", [8, 3, 2]]] * 5
    return graph_from_dict({"name": "small", "layers": [*rows, [[2, 3, 4], "DDetect", []]]}, "small")
