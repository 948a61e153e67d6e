"""What docs/extending/augmentation.md says, done exactly so."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.extending.conftest import Train, same_weights
from tests.extending.pages import code_blocks, commands, write_files
from yolov9_fast.cli.main import main

PAGE = "augmentation.md"
COMMAND, BEFORE = commands(PAGE)


@pytest.fixture(autouse=True)
def page_files(tmp_path: Path) -> None:
    write_files(PAGE, tmp_path)


def test_the_command_trains_with_the_augmentation(train: Train) -> None:
    augmented, plain = train(COMMAND, "augmented"), train(["train"], "plain")
    assert "augmentations: cutout:cutout" in (augmented / "config.yaml").read_text()
    assert not same_weights(augmented, plain)
    assert same_weights(augmented, train(COMMAND, "workers", "--workers", "2"))


def test_the_command_that_changes_source_images_trains_and_draws(train: Train) -> None:
    changed, plain = train(BEFORE, "changed"), train(["train"], "plain")
    assert not same_weights(changed, plain)
    assert same_weights(changed, train(BEFORE, "workers", "--workers", "2"))
    pictures = [cv2.imread(str(changed / f"augment_preview{number}.jpg")) for number in range(4)]
    assert all(picture is not None and picture.std() > 0 for picture in pictures)
    assert not (plain / "augment_preview0.jpg").exists()


def test_the_dataset_of_the_page_has_grey_squares(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_data.parent)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, object] = {}
    exec(code_blocks(PAGE, "python")[1], names)
    dataset = names["dataset"]
    for index in range(len(dataset)):  # type: ignore[arg-type]
        grey = (dataset[index].image.numpy() == 114).all(0)  # type: ignore[index]
        windows = np.lib.stride_tricks.sliding_window_view(grey, (21, 21))
        assert windows.all((2, 3)).any()


def test_a_run_resumes_with_it(train: Train, tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text("""
import cutout as page
calls = 0
def cutout(labelled, rng):
    global calls
    calls += 1
    if calls == 25:
        raise KeyboardInterrupt
    return page.cutout(labelled, rng)
""")
    whole = train(COMMAND, "whole")
    with pytest.raises(AssertionError):
        train(["train", "--augmentations", "interrupted:cutout"], "broken")
    assert main(["train", "--resume", "runs/broken"]) == 0
    assert same_weights(tmp_path / "runs/broken", whole)
