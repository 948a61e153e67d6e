"""An image that vanishes while a run reads it: one line and exit code 2, however images are read."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from yolov9_fast.cli.main import main
from yolov9_fast.engine.callbacks import Callback, EpochResult
from yolov9_fast.engine.config import TrainConfig, write_config
from yolov9_fast.engine.trainer import Trainer

Make = Callable[..., TrainConfig]


class LoseImages(Callback):
    """Removes every image of a split after the first epoch."""

    split = "train"

    def on_epoch_end(self, trainer: Trainer, result: EpochResult) -> None:
        for path in (Path(trainer.config.data).parent / "images" / self.split).iterdir():
            path.unlink()


class LoseValidationImages(LoseImages):
    split = "val"


_QUICK = [("LoseImages", 2, None), ("LoseValidationImages", 0, "disk")]
_CASES = itertools.product(("LoseImages", "LoseValidationImages"), (0, 2), (None, "ram", "disk"))


@pytest.mark.parametrize(
    ("lost", "workers", "cache"),
    [case if case in _QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in _CASES],
)
def test_a_lost_image_is_one_line(
    tiny_config: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    cache: str | None,
    lost: str,
) -> None:
    monkeypatch.setenv("YOLOV9_FAST_CACHE", str(tmp_path / "cache"))
    data = Path(tiny_config().data)
    own = shutil.copytree(data.parent, tmp_path / "data") / data.name
    config = tiny_config(data=str(own), epochs=2, workers=workers, cache=cache, callbacks=f"{__name__}:{lost}")
    write_config(config, tmp_path / "recipe.yaml")
    code = main(["train", "--config", str(tmp_path / "recipe.yaml")])
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
    if cache == "ram" and not errors:
        assert code == 0
        return
    assert code == 2
    [error] = errors
    assert "image file is missing" in error
    assert "continue with: yolov9-fast train --resume" in error
