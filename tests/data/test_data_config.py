"""The data file: accepted formats, and errors that name the wrong key."""

from __future__ import annotations

from pathlib import Path

import pytest

from yolov9_fast.data import load_data_config, load_split
from yolov9_fast.errors import DataError


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "data.yaml"
    file.write_text(text)
    return file


def test_path_is_relative_to_the_file_and_splits_to_path(tmp_path: Path) -> None:
    config = load_data_config(write(tmp_path, "path: sub\ntrain: images/a\nval: [x, y.txt]\nnames: [cat, dog]\nnc: 2"))
    assert config.path == tmp_path.resolve() / "sub"
    assert config.splits["train"].images == (config.path / "images/a",)
    assert config.splits["val"].images == (config.path / "x", config.path / "y.txt")
    assert config.names == {0: "cat", 1: "dog"}
    assert config.num_classes == 2


def test_names_as_mapping_and_coco_split(tmp_path: Path) -> None:
    text = "val: {images: pics, annotations: a.json}\ntrain:\nnames: {1: dog, 0: cat}"
    config = load_data_config(write(tmp_path, text))
    assert list(config.names.items()) == [(0, "cat"), (1, "dog")]
    assert config.splits["val"].annotations == tmp_path / "a.json"
    assert set(config.splits) == {"val"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a]\ntrain: x\nnc: 2", "nc: expected 1 as there are names, got 2"),
        ("names: {0: a, 2: b}\ntrain: x", "names: expected the keys 0 to 1, got"),
        ("names: {a: 0}\ntrain: x", "names: expected integers as keys"),
        ("train: x", "names: expected"),
        ("names: []\ntrain: x", "names: expected"),
        ("names: [a]", "expected at least one of the keys"),
        ("names: [a]\ntrain: 3", "train: expected a folder"),
        ("names: [a]\ntrain: {annotations: x.json}", "train: expected `images`"),
        ("names: [a\ntrain: x", "expected a YAML file"),
        ("- a", "expected a mapping"),
        ("names: [a]\ntrain: x\npath: 3", "path: expected"),
    ],
)
def test_bad_data_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data_config(write(tmp_path, text))


def test_missing_data_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.yaml: data file does not exist"):
        load_data_config(tmp_path / "none.yaml")


def test_unknown_split_is_an_error_that_lists_the_splits(tmp_path: Path) -> None:
    config = load_data_config(write(tmp_path, "names: [a]\ntrain: x\nval: y"))
    with pytest.raises(DataError, match="split: expected one of train, val, got 'test'"):
        load_split(config, "test", for_training=False)
