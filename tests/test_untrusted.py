"""Readers of untrusted files: limits before work, one short error of one line for every failure."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.models.hostile import memory_limit
from yolov9_fast._text import printable
from yolov9_fast._untrusted import (
    MissingFileError,
    parse_yaml,
    read_bytes,
    read_json,
    read_text,
    read_yaml,
    shown,
    user_path,
)
from yolov9_fast.errors import CheckpointError, DataError, UserError
from yolov9_fast.limits import LIMITS, limit

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"k{i}: &k{i} {{<<: [{','.join([p] * 9)}]}}\n" for i, p in enumerate(["*a"] + [f"*k{j}" for j in range(11)])
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "at most 1,000,000 values"),
        (MERGES, "at most 1,000,000 values"),
        ("a: &a [*a]", "alias within its own value"),
        ("[" * 100_000, "nest"),
        ("- " * 5000 + "x", "at most 50 levels"),
        ("a: 2024-13-45", "month"),
        ("a: " + "9" * 5000, "5,000 digits"),
        ("a: 0x" + "f" * 5000, "5,002 digits"),
        ("a: 1" + ":1" * 5000, "10,001 digits"),
        ("{[1]: 2}", "unhashable"),
        ("a: !!python/object/apply:os.system [ls]", "constructor"),
        ("a: !!timestamp foo", "YAML"),
        ("a: !!int foo", "invalid literal"),
        ("a: !!bool foo", "foo"),
        ("a: !!int ''", "YAML"),
        ("a: !!float ''", "YAML"),
        ("a: 1\na: 2", "'a' appears twice"),
        ("{0: a, 00: b}", "'00' appears twice"),
        ("{yes: a, on: b}", "'on' appears twice"),
        ("a: \x07", "control characters"),
    ],
)
def test_hostile_yaml_is_one_short_error(text: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        parse_yaml(text, "data.yaml: data file")
    assert time.monotonic() - began < 5
    assert str(caught.value).startswith("data.yaml: data file: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_ordinary_yaml_is_read() -> None:
    assert parse_yaml("a: &m {x: 1}\nb: {<<: *m, y: [2, yes]}\n1: ~", "") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": [2, True]},
        1: None,
    }
    assert parse_yaml("", "") is None


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "{", "nul", ""])
def test_hostile_json_is_one_short_error(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(DataError, match=r"a\.json: annotation file: ") as caught:
        read_json(file, "annotation file")
    assert "\n" not in str(caught.value)


def test_byte_order_marks_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert read_json(file, "file") == {"a": [1]}
    assert read_yaml(file, "file") == {"a": [1]}


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    link = tmp_path / "link.txt"
    link.symlink_to("/dev/zero")
    for path, kind in ((tmp_path, "a folder"), (tmp_path / "pipe", "a pipe"), (link, "a device")):
        with pytest.raises(DataError, match=f"expected a regular file, got {kind}"):
            read_bytes(path, "label file", "LABEL_BYTES")
    with pytest.raises(MissingFileError, match="label file does not exist"):
        read_bytes(tmp_path / "none", "label file", "LABEL_BYTES")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_bytes(tmp_path / "none", "file", "LABEL_BYTES", CheckpointError)
    for bad in ("a\0b", "x" * 300):
        with pytest.raises(DataError, match="cannot be read"):
            read_bytes(bad, "label file", "LABEL_BYTES")


def test_sizes_are_limited_and_the_limit_can_be_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes(b"x" * 100)
    monkeypatch.setenv("YOLOV9_FAST_MAX_LABEL_BYTES", "99")
    with pytest.raises(DataError, match=r"at most 99 bytes, got 100 \(YOLOV9_FAST_MAX_LABEL_BYTES raises the limit"):
        read_text(file, "label file", "LABEL_BYTES")
    monkeypatch.setenv("YOLOV9_FAST_MAX_LABEL_BYTES", "100")
    assert read_text(file, "label file", "LABEL_BYTES") == "x" * 100
    # The files of /proc say that they are empty.
    with pytest.raises(DataError, match="at most 100 bytes, got more"):
        read_bytes("/proc/self/maps", "label file", "LABEL_BYTES")


def test_the_page_lists_every_limit() -> None:
    page = (Path(__file__).parents[1] / "docs" / "bad_input.md").read_text()
    for name, entry in LIMITS.items():
        assert f"| `{name}` | {entry.default:,} {entry.unit} | {entry.meaning} |" in page


def test_limits_are_checked() -> None:
    assert all(limit(name) == entry.default for name, entry in LIMITS.items())


@pytest.mark.parametrize("value", ["0", "-1", "many", ""])
def test_a_wrong_limit_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOV9_FAST_MAX_CLASSES", value)
    with pytest.raises(UserError, match="YOLOV9_FAST_MAX_CLASSES: expected an integer"):
        limit("CLASSES")


@pytest.mark.parametrize("text", ["~nobody-of-that-name/x", "a\0b", "x" * 300, "\ud800", "a/" * 3000, 3, None, b"a"])
def test_what_no_file_system_takes_is_no_path(text: object) -> None:
    with pytest.raises(DataError, match=r"--data: expected a path") as caught:
        user_path(text, "--data")
    assert len(str(caught.value)) < 500


def test_a_path_with_a_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a b\udc80", "--data") == tmp_path / "a b\udc80"


def test_values_are_shown_shortened() -> None:
    assert shown({"a": [1, None, "x"]}) == "{'a': [1, None, 'x']}"
    for value in (["x" * 10**7] * 1000, 16**5000, {str(i): [[[[[[i]]]]]] for i in range(10**4)}, "\x1b" * 1000):
        assert len(shown(value)) < 1000


def test_printable_text_is_one_line_without_control_characters() -> None:
    assert (
        printable("a\nb\x1b[31m\udc80\u202e\x9b ü 猫 \U0001f408")
        == r"a\nb\x1b[31m\udc80\u202e\x9b ü 猫 " + "\U0001f408"
    )
    cut = printable("x" * 5000, 100)
    assert cut.startswith("x" * 60)
    assert cut.endswith("x" * 30)
    assert " … " in cut


def test_a_small_file_takes_little_memory_whatever_the_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    with memory_limit(200):
        assert read_bytes(tmp_path / "x", "file", "JSON_BYTES") == b"abc"
        assert read_bytes("/proc/self/status", "file", "LABEL_BYTES").startswith(b"Name:")  # its size is 0
