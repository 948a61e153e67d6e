"""Splits with YOLO labels: paths of the labels, and files that cannot be used."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.data.drawing import add_image, dataset_folder, paint, write_config
from yolov9_fast.data import coco_ground_truth, load_data_config, load_split
from yolov9_fast.data import scan as scan_module
from yolov9_fast.data.records import LabelReport
from yolov9_fast.errors import DataError

PICTURE = paint(40, 60, [(1, 10, 10, 30, 20)])
LABEL = f"1 {20 / 60} {15 / 40} {20 / 60} {10 / 40}"


def load(root: Path, *, split: str = "train", for_training: bool = True, **content: object):
    return load_split(load_data_config(write_config(root, **content)), split, for_training=for_training)


def test_good_split_is_read_completely(tmp_path: Path) -> None:
    records, report = load_split(load_data_config(dataset_folder(tmp_path)), "train", for_training=True)
    assert (report.images, report.objects, report.background, report.skipped) == (12, 24, 0, [])
    assert [record.path.name for record in records] == [f"p{number:03d}.png" for number in range(12)]
    image = cv2.imread(str(records[3].path))
    assert (records[3].height, records[3].width) == image.shape[:2]


def truncated_jpeg(file: Path) -> None:
    data = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[1].tobytes()
    file.write_bytes(data[: len(data) // 2])


def truncated_png(file: Path) -> None:
    data = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[1].tobytes()
    file.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("x.png", lambda file: file.write_bytes(b""), "image file is empty"),
        ("x.jpg", lambda file: file.write_bytes(b"not an image at all"), "image file cannot be decoded"),
        ("x.jpg", truncated_jpeg, "image file is truncated"),
        ("x.png", truncated_png, "image file is truncated"),
        ("x.png", lambda file: cv2.imwrite(str(file), PICTURE[:9]), "image is smaller than 10 pixels"),
    ],
)
def test_unusable_image_is_a_counted_skip(tmp_path: Path, name: str, spoil, reason: str) -> None:
    add_image(tmp_path, "a.png", PICTURE, LABEL)
    spoil(add_image(tmp_path, name, PICTURE, LABEL))
    for _ in range(2):  # decoded, then remembered
        records, report = load(tmp_path)
        assert [record.path.name for record in records] == ["a.png"]
        assert report.counts() == {reason: 1}
        assert str(tmp_path / "images" / "train" / name) in report.summary()


def test_missing_label_file_is_a_background_image(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png", PICTURE, LABEL)
    add_image(tmp_path, "b.png", PICTURE, None)
    add_image(tmp_path, "c.png", PICTURE, "")
    records, report = load(tmp_path)
    assert (report.images, report.background, report.skipped) == (3, 2, [])
    assert "1 images have no label file" in report.summary()
    assert records[1].boxes.shape == (0, 5)


def test_bad_rows_are_listed_with_file_and_row(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png", PICTURE, f"{LABEL}\n7 0.5 0.5 0.1 0.1\nnonsense")
    _, report = load(tmp_path)
    file = tmp_path / "labels" / "train" / "a.txt"
    assert [place for place, _ in report.skipped] == [f"{file}:2", f"{file}:3"]
    assert report.counts() == {"class id out of range": 1, "not a number": 1}
    assert report.objects == 1


def test_labels_may_be_next_to_the_images(tmp_path: Path) -> None:
    folder = tmp_path / "pics"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), PICTURE)
    (folder / "a.txt").write_text(LABEL)
    assert load(tmp_path, train="pics")[1].objects == 1


def test_only_the_last_images_folder_becomes_labels(tmp_path: Path) -> None:
    root = tmp_path / "images" / "set"
    add_image(root, "a.png", PICTURE, LABEL)
    assert load(root)[1].objects == 1


def test_list_file_takes_paths_relative_to_itself_or_the_root(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png", PICTURE, LABEL)
    add_image(tmp_path, "b.png", PICTURE, LABEL)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_text(
        "../images/train/a.png\nimages/train/b.png\n# note\n\nimages/train/gone.png\n"
    )
    records, report = load(tmp_path, train="lists/train.txt")
    assert len(records) == 2
    assert report.counts() == {"image file is missing": 1}


def test_image_named_twice_is_used_once(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png", PICTURE, LABEL)
    assert load(tmp_path, train=["images/train", "images/train"])[1].images == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": "nowhere"}, "nowhere does not exist"),
        ({"train": "empty"}, "no images in .*empty"),
        ({"train": "data.yaml"}, "expected a folder"),
    ],
)
def test_empty_split_is_an_error_that_names_its_folders(tmp_path: Path, content: dict, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        load(tmp_path, **content)


def test_split_of_corrupt_images_only_is_an_error_with_the_list(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png", PICTURE, LABEL).write_bytes(b"")
    with pytest.raises(DataError, match=r"no usable image(.|\n)*image file is empty"):
        load(tmp_path)


def test_training_without_any_object_is_an_error_but_evaluation_is_not(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png", PICTURE, None)
    with pytest.raises(DataError, match=r"1 images and no objects; labels were looked for in .*a.txt"):
        load(tmp_path)
    assert load(tmp_path, for_training=False)[1].background == 1


def test_second_load_decodes_nothing_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = add_image(tmp_path, "a.png", PICTURE, LABEL)
    add_image(tmp_path, "b.png", PICTURE, LABEL)
    load(tmp_path)
    opened = []
    monkeypatch.setattr(scan_module, "read_image", lambda path: opened.append(path) or np.zeros((50, 50, 3), np.uint8))
    load(tmp_path)
    assert opened == []
    cv2.imwrite(str(file), paint(50, 50, []))
    assert load(tmp_path)[0][0].width == 50
    assert opened == [file]


@pytest.mark.parametrize(
    "damaged", ["", "{", "[]", '{"FILE": 3}', '{"FILE": [SIZE, TIME, 9, "9"]}', '{"FILE": [1, 2, 9, 9]}']
)
def test_damaged_cache_is_rebuilt(tmp_path: Path, cache_in_tmp: Path, damaged: str) -> None:
    image = add_image(tmp_path, "a.png", PICTURE, LABEL)
    load(tmp_path)
    [file] = cache_in_tmp.rglob("*.json")
    content = file.read_text()
    size, time = image.stat().st_size, image.stat().st_mtime_ns
    file.write_text(damaged.replace("FILE", str(image)).replace("SIZE", str(size)).replace("TIME", str(time)))
    assert load(tmp_path)[1].images == 1
    assert file.read_text() == content


def test_another_decoder_or_a_lower_limit_decodes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_image(tmp_path, "a.png", PICTURE, LABEL)
    before = load(tmp_path)[0][0]
    with monkeypatch.context() as patch:
        patch.setattr(scan_module, "read_image", lambda path: np.rot90(PICTURE))
        assert load(tmp_path)[0][0].width == before.width
        patch.setattr(cv2, "__version__", "4.10.0")
        assert load(tmp_path)[0][0].width == before.height
    with monkeypatch.context() as patch:
        patch.setenv("YOLOV9_FAST_MAX_IMAGE_PIXELS", "100")
        with pytest.raises(DataError, match="expected at most 100 pixels"):
            load(tmp_path)
    assert load(tmp_path)[1].images == 1


def test_an_image_with_a_problem_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise DataError(f"{path}: image file cannot be read: Permission denied")

    add_image(tmp_path, "a.png", PICTURE, LABEL)
    add_image(tmp_path, "b.png", PICTURE, LABEL)
    load(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(scan_module, "read_image", refuse)
        cv2.imwrite(str(tmp_path / "images" / "train" / "b.png"), paint(50, 50, []))
        assert load(tmp_path)[1].counts() == {"image file cannot be read: Permission denied": 1}
    assert load(tmp_path)[1].images == 2


def test_loading_writes_nothing_into_the_users_folders(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png", PICTURE, LABEL)
    write_config(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    load_split(load_data_config(tmp_path / "data.yaml"), "train", for_training=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_unwritable_cache_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add_image(tmp_path, "a.png", PICTURE, LABEL)
    monkeypatch.setenv("YOLOV9_FAST_CACHE", str(tmp_path / "images" / "train" / "a.png"))
    assert load(tmp_path)[1].images == 1
    assert "not cached" in caplog.text


def test_image_ids_are_the_numbers_in_the_names_when_all_have_one(tmp_path: Path) -> None:
    for name in ("000139.png", "285.png"):
        add_image(tmp_path, name, PICTURE, LABEL)
    assert [record.image_id for record in load(tmp_path)[0]] == [139, 285]
    add_image(tmp_path, "x.png", PICTURE, LABEL)
    assert [record.image_id for record in load(tmp_path)[0]] == [1, 2, 3]


def test_ground_truth_of_yolo_labels_is_in_pixels(tmp_path: Path) -> None:
    add_image(tmp_path, "a.png", PICTURE, LABEL)
    config = load_data_config(write_config(tmp_path))
    records, _ = load_split(config, "train", for_training=False)
    gt = coco_ground_truth(config, "train", records)
    [annotation] = gt["annotations"]
    np.testing.assert_allclose(annotation["bbox"], [10, 10, 20, 10], atol=1e-4)
    assert annotation["area"] == pytest.approx(200, abs=1e-3)
    assert (annotation["category_id"], annotation["iscrowd"], annotation["id"]) == (2, 0, 1)
    assert gt["categories"] == [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "c"}]


def test_the_first_place_skipped_is_short() -> None:
    report = LabelReport()
    report.skip("x" * 5000, "image file is missing")
    assert len(report.short()) < 500
