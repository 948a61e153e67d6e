"""Folders with links, loops, hidden names and files of other kinds; patterns; lists of images."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.drawing import add_image, paint, write_config
from yolov9_fast.data import files as files_module
from yolov9_fast.data import load_data_config, load_split
from yolov9_fast.data.files import find_files, match_files
from yolov9_fast.data.listing import read_image_list
from yolov9_fast.errors import DataError

PICTURE = paint(40, 60, [(1, 10, 10, 30, 20)])
LABEL = f"1 {20 / 60} {15 / 40} {20 / 60} {10 / 40}"


def load(root: Path, **content: object):
    return load_split(load_data_config(write_config(root, **content)), "train", for_training=True)


def names(paths: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Folder of a.png, sub/b.png with a label each."""
    add_image(tmp_path, "a.png", PICTURE, LABEL)
    add_image(tmp_path, "b.png", PICTURE, LABEL, "train/sub")
    return tmp_path / "images" / "train"


def test_hidden_files_and_folders_are_no_images(tmp_path: Path, train: Path) -> None:
    for name in ("._a.png", ".ipynb_checkpoints/a-checkpoint.png", "sub/.b.png", ".DS_Store"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_bytes((train / "a.png").read_bytes())
    (train / ".link.png").symlink_to("nowhere")
    records, report = load(tmp_path)
    assert names([record.path for record in records], train) == ["a.png", "sub/b.png"]
    assert report.skipped == []
    assert f"not images, ignored in {train}: 5 hidden" in report.summary()


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path) -> None:
    root = tmp_path / ".hidden" / "set"
    add_image(root, "a.png", PICTURE, LABEL)
    assert load(root)[1].objects == 1


def test_files_of_other_suffixes_are_counted(tmp_path: Path, train: Path) -> None:
    for name in ("x.jfif", "y.JFIF", "notes.md", "sub/Makefile", "a.txt", "other.txt"):
        (train / name).write_text("")
    _, report = load(tmp_path)
    # a.txt may be the label file of a.png.
    assert f"not images, ignored in {train}: 2 .jfif, 1 .md, 1 .txt, 1 without suffix" in report.summary()


def test_a_folder_of_other_suffixes_only_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    for number in range(30):
        (tmp_path / "pics" / f"x.{'jfif' if number < 15 else number}").write_text("")
        (tmp_path / "pics" / f"{number}.jfif").write_text("")
    with pytest.raises(
        DataError, match=r"no images in .*pics.*; not images, ignored in .*: 31 \.jfif, .* of other suf"
    ):
        load(tmp_path, train="pics")


def test_linked_folders_are_followed_once(tmp_path: Path, train: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for name in ("c.png", "deep/d.png"):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).write_bytes((train / "a.png").read_bytes())
        label = tmp_path / "labels" / "train" / "linked" / Path(name).with_suffix(".txt")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(LABEL)
    (train / "linked").symlink_to(elsewhere)
    (train / "twice").symlink_to(elsewhere)
    (train / "a_link_to_sub").symlink_to("sub")
    records, report = load(tmp_path)
    assert names([record.path for record in records], train) == [
        "a.png",
        "linked/c.png",
        "linked/deep/d.png",
        "sub/b.png",
    ]
    assert report.objects == 4
    assert report.skipped == [
        (str(train / "a_link_to_sub"), "link to a folder that is listed already"),
        (str(train / "twice"), "link to a folder that is listed already"),
    ]


def test_loops_of_links_end(tmp_path: Path, train: Path) -> None:
    (train / "self").symlink_to(".")
    (train / "sub" / "up").symlink_to("..")
    (train / "all").symlink_to(tmp_path)
    (train / "root").symlink_to("/")
    (train / "other").symlink_to(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "back").symlink_to(tmp_path)
    (train / "ring").symlink_to("ring")
    add_image(tmp_path, "v.png", PICTURE, LABEL, "val")
    began = time.monotonic()
    records, report = load(tmp_path)
    assert time.monotonic() - began < 5
    assert names([record.path for record in records], train) == ["a.png", "sub/b.png"]
    assert report.counts() == {
        "link to a folder above it": 4,
        "link to a folder that is listed already": 1,
        "cannot be read": 1,
    }


def test_many_links_to_one_another_are_read_once_each(tmp_path: Path) -> None:
    # Followed by name, these are 3**20 folders.
    for number in range(20):
        folder = tmp_path / "in" / f"d{number}"
        folder.mkdir(parents=True)
        (folder / "x.png").write_text("")
        for link in "abc":
            (folder / link).symlink_to(tmp_path / "in" / f"d{(number + 1) % 20}")
    assert len(find_files([tmp_path / "in" / "d0"], {".png"}).files) == 20
    assert len(match_files(tmp_path / "in" / "d0" / "**" / "*.png", {".png"}).files) == 20
    assert len(match_files(tmp_path / "in" / "**" / "**" / "*" / "**" / "*.png", {".png"}).files) == 20


def test_broken_links_and_what_is_no_file_are_skips(
    tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (train / "c.png").symlink_to("nowhere.png")
    (train / "gone").symlink_to("nowhere")
    os.mkfifo(train / "d.png")
    (train / "e.png").symlink_to("/dev/zero")
    monkeypatch.chdir(train)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("f.png")
    (train / "g.png").mkdir()
    records, report = load(tmp_path)
    assert len(records) == 2
    assert report.counts() == {"not a regular file": 3, "broken link": 2}
    assert "skipped 2: broken link" in report.summary()


def test_a_folder_that_cannot_be_read_is_a_skip(tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_folder = os.listdir

    def refuse(folder: Path) -> list[str]:
        if Path(folder).name == refused:
            raise PermissionError(13, "Permission denied")
        return list_folder(folder)

    monkeypatch.setattr(files_module.os, "listdir", refuse)
    refused = "sub"
    records, report = load(tmp_path)
    assert len(records) == 1
    assert report.skipped == [(str(train / "sub"), "folder cannot be read (Permission denied)")]
    for pattern in ("**", "*"):
        found = match_files(train / pattern / "*.png", {".png"})
        assert found.problems == [(train / "sub", "folder cannot be read (Permission denied)")]
    refused = "train"
    with pytest.raises(DataError, match=r"images/train: folder cannot be read \(Permission denied\)"):
        load(tmp_path)


def test_deepest_folders_are_read_or_reported(tmp_path: Path) -> None:
    top = tmp_path / "in"
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for _ in range(30):  # 30 names of 200 bytes: longer than a path may be
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    found = find_files([top], {".png"})
    [(_, problem)] = found.problems
    assert problem == "cannot be read (File name too long)"
    assert match_files(top / "**" / "*.png", {".png"}).files == []


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/*.png", ["a.png", "sub/b.png", "sub/deep/c.png"]),
        ("**", ["a.png", "sub/b.png", "sub/deep/c.png"]),
        ("*.png", ["a.png"]),
        ("*/*.png", ["sub/b.png"]),
        ("s?b/**/[bc].png", ["sub/b.png", "sub/deep/c.png"]),
        ("**/deep/*", ["sub/deep/c.png"]),
        (".*.png", [".h.png"]),
        (".cache/*.png", [".cache/x.png"]),
        ("a.png/*", []),
        ("nowhere/**/*.png", []),
    ],
)
def test_patterns_match_as_a_shell_does(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for name in ("a.png", "notes.md", "sub/b.png", "sub/deep/c.png", ".h.png", ".cache/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found = match_files(tmp_path / pattern, {".png"})
    assert sorted(names(found.files, tmp_path)) == sorted(expected)


def test_a_relative_pattern_gives_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("")
    assert (
        match_files(Path("in/**/*.png"), {".png"}).files
        == match_files(Path("**/*.png"), {".png"}).files
        == [Path("in/a.png")]
    )


def test_list_with_byte_order_mark_windows_lines_and_backslashes(tmp_path: Path, train: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfimages/train/a.png\r\n.\\images\\train\\sub\\b.png\r\n")
    records, report = load(tmp_path, train="list.txt")
    assert names([record.path for record in records], train) == ["a.png", "sub/b.png"]
    assert report.skipped == []


def test_a_backslash_may_be_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "a\\b.png").write_text("")
    (tmp_path / "list.txt").write_text("a\\b.png\n")
    assert read_image_list(tmp_path / "list.txt") == [tmp_path / "a\\b.png"]


def test_a_name_may_hold_other_line_separators(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a\x85b\u2028c.png\n", encoding="utf-8")
    assert read_image_list(tmp_path / "list.txt") == [tmp_path / "a\x85b\u2028c.png"]


def test_lines_of_a_list_that_are_no_path_are_skips(tmp_path: Path, train: Path) -> None:
    lines = ["images/train/a.png", "x" * 300 + ".png", "d/" * 3000 + "x.png", "images/train", "a\0b.png", "pipe.png"]
    os.mkfifo(tmp_path / "pipe.png")
    lines.append("zero.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    records, report = load(tmp_path, train="list.txt")
    assert names([record.path for record in records], train) == ["a.png"]
    assert len(report.skipped) == 6
    assert len(report.summary()) < 5000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.symlink_to("/dev/zero"), "is a device"),
        (lambda file: file.symlink_to("nowhere"), "is a broken link"),
        (lambda file: file.symlink_to(file), "cannot be read: Too many levels"),
        (lambda file: os.mkfifo(file), "is a pipe"),
        (lambda file: file.write_bytes(b"\xff\xfe"), "image list: expected UTF-8 text"),
        (lambda file: os.truncate(os.open(file, os.O_CREAT | os.O_RDWR), 10 * 2**30), "image list: expected at most"),
        (lambda file: file.write_bytes(b"\n" * 3_000_000), "image list: expected at most 3,000,000 lines"),
    ],
)
def test_a_list_that_cannot_be_read_is_an_error_at_once(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "list.txt")
    with pytest.raises(DataError, match=message):
        load(tmp_path, train="list.txt")


def test_a_list_names_each_image_once(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.png\n" * 100_000)
    assert read_image_list(tmp_path / "list.txt") == [tmp_path / "a.png"]


@pytest.mark.parametrize(
    ("make", "detail"),
    [
        (lambda file: file.symlink_to("/dev/zero"), "expected a regular file, got a device"),
        (lambda file: file.symlink_to("/dev/urandom"), "expected a regular file, got a device"),
        (lambda file: os.mkfifo(file), "expected a regular file, got a pipe"),
        (lambda file: file.mkdir(), "expected a regular file, got a folder"),
        (lambda file: file.symlink_to("nowhere.txt"), "is a broken link"),
        (lambda file: file.symlink_to(file), "Too many levels of symbolic links"),
        (lambda file: file.write_bytes(b"\xff\xfe\x00\x81"), "expected UTF-8 text"),
        (
            lambda file: os.truncate(os.open(file, os.O_CREAT | os.O_RDWR), 10 * 2**30),
            "expected at most 16,777,216 bytes",
        ),
        (lambda file: file.write_bytes(b"\n" * 2**20), "expected at most 100,000 rows, got 1,048,577"),
    ],
)
def test_a_label_file_of_no_use_is_a_skip_with_its_image(
    tmp_path: Path, train: Path, make: Callable[[Path], object], detail: str
) -> None:
    file = tmp_path / "labels" / "train" / "a.txt"
    file.unlink()
    make(file)
    records, report = load(tmp_path)
    assert names([record.path for record in records], train) == ["sub/b.png"]
    [(place, problem)] = report.skipped
    assert place == str(file)
    assert problem.startswith("label file cannot be used, nor its image (")
    assert detail in problem
    assert report.counts() == {"label file cannot be used, nor its image": 1}
    assert len(report.summary()) < 2000


@pytest.mark.parametrize("entry", ["x" * 200 + "/" + "y" * 200 + ".png", "/".join(["x" * 200] * 19)])
def test_a_split_longer_than_a_path_may_be_is_an_error(tmp_path: Path, entry: str) -> None:
    root = tmp_path / "/".join(["r" * 200] * 5)
    with pytest.raises(DataError, match=r"does not exist|File name too long"):
        load(tmp_path, path=str(root), train=entry)
