"""The rendered data set: labels match the images, and both depend on the seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from yolov9_fast.data import load_data_config, load_split, rendered
from yolov9_fast.data.rendered import MOST_OBJECTS, SHAPES, _shape_mask, render_dataset, render_image


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_seed_determines_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        render_dataset(tmp_path / name, train=3, val=2, size=64, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_more_images_keep_the_first_ones(tmp_path: Path) -> None:
    render_dataset(tmp_path / "few", train=2, val=1, size=64)
    render_dataset(tmp_path / "many", train=5, val=1, size=64)
    assert files(tmp_path / "few").items() <= files(tmp_path / "many").items()


def test_the_data_file_is_read_without_a_skipped_label(tmp_path: Path) -> None:
    config = load_data_config(render_dataset(tmp_path, train=40, val=5, size=96))
    assert tuple(config.names.values()) == SHAPES
    records, report = load_split(config, "train", for_training=True)
    assert len(records) == 40
    assert not report.skipped
    assert not report.background
    assert {int(label) for record in records for label in record.boxes[:, 0]} == set(range(len(SHAPES)))
    assert max(len(record.boxes) for record in records) <= MOST_OBJECTS


@pytest.mark.parametrize("label", range(len(SHAPES)))
def test_a_shape_is_inside_the_image(label: int) -> None:
    for seed in range(20):
        mask = _shape_mask(np.random.default_rng(seed), label, 80, 100)
        assert mask.max() == 255
        assert not mask[0].any()
        assert not mask[-1].any()
        assert not mask[:, 0].any()
        assert not mask[:, -1].any()


def test_boxes_enclose_their_shape_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """With white shapes on black, the white pixels of an image with one object end where its box ends."""
    monkeypatch.setattr(rendered, "_background", lambda rng, height, width: np.zeros((height, width, 3), np.uint8))
    monkeypatch.setattr(rendered, "_paint", lambda rng, canvas, mask: np.repeat(mask[..., None], 3, 2))
    single = [each for seed in range(60) if len((each := render_image(np.random.default_rng(seed), 96)).labels) == 1]
    assert len(single) >= 3
    for each in single:
        height, width = each.image.shape[:2]
        rows, columns = np.nonzero(each.image[..., 0] > 127)
        _, cx, cy, w, h = each.labels[0].astype(float)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        box = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
        assert box == pytest.approx(found, abs=1e-3)


def test_covered_shapes_stay_mostly_visible() -> None:
    owner = np.zeros((10, 10), np.uint8)
    owner[2:6, 2:7] = 1  # 20 pixels
    cover = np.zeros((10, 10), bool)
    cover[2:4, 2:5] = True  # 6 of them
    assert rendered._leaves_others_visible(owner, [20], cover)
    cover[4, 2] = True
    assert not rendered._leaves_others_visible(owner, [20], cover)
