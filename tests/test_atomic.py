"""Atomic writing: the complete new file, or the previous one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from yolov9_fast.atomic import atomic_write
from yolov9_fast.errors import UserError


def test_bytes_text_and_writers_are_written_and_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    for content, expected in ((b"\x00\xff", b"\x00\xff"), ("Grüße", "Grüße".encode()), (lambda f: f.write(b"w"), b"w")):
        assert atomic_write(path, content) == path
        assert path.read_bytes() == expected
    assert list(path.parent.iterdir()) == [path]


def test_torch_save_writes_through_it(tmp_path: Path) -> None:
    path = atomic_write(tmp_path / "state.pt", lambda file: torch.save({"w": torch.arange(3)}, file))
    assert torch.load(path)["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("error", [RuntimeError("writer"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_the_previous_file_and_no_temporary_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, write)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_target_changes_only_after_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def write(file: BinaryIO) -> None:
        file.write(b"after")
        assert path.read_text() == "before"

    atomic_write(path, write)
    assert path.read_text() == "after"


_FULL_DISK = """
import resource, signal, sys, torch
from yolov9_fast.atomic import atomic_write
from yolov9_fast.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
content = {"bytes": b"x" * 100_000, "torch": lambda f: torch.save(torch.zeros(100_000), f)}[sys.argv[2]]
try:
    atomic_write(sys.argv[1], content)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["bytes", "torch"])
@pytest.mark.skipif(sys.platform != "linux", reason="limits file sizes with RLIMIT_FSIZE")
def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_the_previous_one(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    path.write_text("before")
    result = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(path), kind], capture_output=True, text=True, timeout=120
    )
    assert f"{path}: cannot be written" in result.stdout, result.stderr
    assert "previous file is intact" in result.stdout, result.stderr
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="nothing was written"):
        atomic_write(tmp_path / "file" / "below", b"")


def test_errors_other_than_the_systems_are_raised_unchanged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"):
        atomic_write(tmp_path / "x", lambda file: (_ for _ in ()).throw(ValueError("mine")))
    assert not list(tmp_path.iterdir())
