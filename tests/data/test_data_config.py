"""The data file: accepted formats, and errors that name the wrong key."""

from __future__ import annotations

import os
import time
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
        ("names: [a\ntrain: x", "expected YAML"),
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


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", r"got True \(bool\)"),
        ("no", r"got False \(bool\)"),
        ("Off", r"got False \(bool\)"),
        ("007", r"got 7 \(int\)"),
        ("1_0", r"got 10 \(int\)"),
        ("1.50", r"got 1.5 \(float\)"),
        (".nan", r"got nan \(float\)"),
        ("~", "got no value; put the name in quotes"),
        ("", "got no value; put the name in quotes"),
        ("2024-01-31", "got datetime.date"),
        ("blue: x", r"got {'blue': 'x'} \(dict\)"),
        ("[a]", r"got \['a'\] \(list\)"),
        ("!!binary YQ==", r"got b'a' \(bytes\)"),
        ("' '", "expected a name, got ' '"),
    ],
)
@pytest.mark.parametrize("form", ["names:\n- a\n- {0}\ntrain: x", "names:\n  0: a\n  1:\n    {0}\ntrain: x"])
def test_class_name_that_yaml_reads_as_another_value_is_an_error(
    tmp_path: Path, form: str, value: str, message: str
) -> None:
    with pytest.raises(DataError, match=f"names: class 1: .*{message}"):
        load_data_config(write(tmp_path, form.format(value)))


def test_quoted_class_names_are_kept_as_written(tmp_path: Path) -> None:
    config = load_data_config(write(tmp_path, "names: ['yes', \"no\", '007', '~', '2024-01-31', 'blue: x']\ntrain: x"))
    assert list(config.names.values()) == ["yes", "no", "007", "~", "2024-01-31", "blue: x"]


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((f"{BOMB}{rest}", "data file: expected at most 1,000,000 values") for rest in (
            "names: *i\ntrain: x", "names: [a]\ntrain: *i", "names: [a]\npath: *i", "names: [a]\ntrain: x\nnc: *i",
        )),
        ("names: {[a]: b}\ntrain: x", "unhashable"),
        ("names: [a]\n? {b: c}\n: d", "unhashable"),
        ("names: [2024-99-99]\ntrain: x", "expected YAML"),
        (f"names: [a]\ntrain: x\nnc: {'9' * 5000}", "integer of 5,000 digits"),
        (f"names: {{? 0x{'f' * 5000} : a}}\ntrain: x", "integer of 5,002 digits"),
        ("names: &n [*n]\ntrain: x", "alias"),
        (f"names: {'[' * 100_000}", "data file: "),
        ("names: [a]\ntrain: x\nnc: yes", "nc: expected 1 as there are names, got True"),
        (f"names: [{'x' * 2**20}]\ntrain: x", "names: class 0: expected at most 1,000 characters, got 1,048,576"),
        (f"names: [a]\npath: {'x' * 300}\ntrain: x", "path: expected a path of at most"),
        (f"names: [a]\ntrain: [a, {'x/' * 3000}]", "train: expected a path of at most"),
        ('names: [a]\npath: "a\\0b"\ntrain: x', "path: expected a path, got one with a NUL byte"),
        ('names: [a]\ntrain: "a\\0b"', "train: expected a path, got one with a NUL byte"),
        ('names: [a]\ntrain: {images: "a\\0b"}', r"train\.images: expected a path, got one with a NUL byte"),
        ('names: [a]\ntrain: {images: a, annotations: "a\\0b"}', r"train\.annotations: expected a path"),
        ("names: [a]\ntrain: {images: a, annotations: [b]}", r"train\.annotations: expected a path"),
        ("names: [a]\npath: ~nobody-of-this-name/x\ntrain: x", "path: expected a path.*home"),
        ("names: [a]\nval: ~nobody-of-this-name/x", "val: expected a path.*home"),
        ("names: [a]\npath: loop/x\ntrain: x", "path: .*loop"),
    ],
)  # fmt: skip
def test_hostile_data_file_is_one_short_error_at_once(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    began = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        load_data_config(write(tmp_path, text))
    assert time.monotonic() - began < 5
    assert str(caught.value).startswith(str(tmp_path / "data.yaml"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_one_long_text_named_many_times_is_read_at_once(tmp_path: Path) -> None:
    text = f"x: &x '{'y' * 200}'\nnames: [a]\ntrain: [{','.join(['*x'] * 300_000)}]"
    assert load_data_config(write(tmp_path, text)).splits["train"].images == (tmp_path / ("y" * 200),)


def test_data_file_with_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_bytes(b"\xef\xbb\xbfnames: [a]\ntrain: x")
    assert load_data_config(tmp_path / "data.yaml").names == {0: "a"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"names: [\xff]", "expected UTF-8 text"),
        ("names: [a]".encode("utf-16"), "expected UTF-8 text"),
        (None, "folder"),
    ],
)
def test_what_is_no_text_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "data.yaml"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(DataError, match=rf"data\.yaml: data file: .*{message}"):
        load_data_config(file)


@pytest.mark.parametrize("file", ["a\0b.yaml", "x" * 300, "~nobody-of-this-name/data.yaml", "/dev/zero", "pipe"])
def test_data_file_of_no_use_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(DataError, match=r"data: expected a path|expected a regular file"):
        load_data_config(file)
