"""A network of a few thousand parameters and a data set of a few images, so that runs take seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from yolov9_fast.data.rendered import render_dataset
from yolov9_fast.engine.config import TrainConfig

TINY_GRAPH = """
name: tiny
layers:
  - [-1, Conv, [8, 3, 2]]
  - [-1, AConv, [8]]
  - [-1, AConv, [8]]                       # 2: stride 8
  - [-1, CSPELAN, [8, 8, 4, 1]]
  - [-1, AConv, [8]]                       # 4: stride 16
  - [-1, ADown, [8]]                       # 5: stride 32
  - [3, CBLinear, [[8]]]                   # 6: the auxiliary branch starts here
  - [[6, 3], CBFuse, [[0]]]
  - [4, Conv, [8, 1]]
  - [5, SPPELAN, [8, 4]]
  - [[7, 8, 9, 3, 4, 5], DualDDetect, []]
"""


@pytest.fixture(scope="session")
def tiny_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "tiny.yaml"
    path.write_text(TINY_GRAPH)
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_dataset(tmp_path_factory.mktemp("data"), train=16, val=6, size=96, seed=3)


@pytest.fixture
def tiny_config(tiny_graph: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes the options of a tiny run in `tmp_path`; keyword arguments change them."""

    def make(**changes: object) -> TrainConfig:
        options: dict[str, object] = {
            "model": str(tiny_graph),
            "data": str(tiny_data),
            "epochs": 3,
            "imgsz": 64,
            "batch": 8,
            "nominal_batch": 8,
            "device": "cpu",
            "workers": 0,
            "class_tower": 8,
            "close_mosaic": 1,
            "plots": False,
            "tensorboard": False,
            "project": str(tmp_path / "runs"),
        }
        return TrainConfig(**{**options, **changes})  # type: ignore[arg-type]

    return make
