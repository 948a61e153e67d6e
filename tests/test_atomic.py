"""Atomic writing: the complete new file, or the previous one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from yolov9_fast import atomic
from yolov9_fast.atomic import TemporaryFile, atomic_write, is_temporary, remove_stale
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
from yolov9_fast import atomic
from yolov9_fast.atomic import TemporaryFile, atomic_write, is_temporary, remove_stale
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


_KILLED_WRITER = """
import os, signal, sys
from yolov9_fast.atomic import atomic_write
def write(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
atomic_write(sys.argv[1], write)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_writer_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [sys.executable, "-c", _KILLED_WRITER, str(tmp_path / "state.pt")]
    assert subprocess.run(words, timeout=60).returncode == -9
    [left] = tmp_path.iterdir()
    assert is_temporary(left.name)
    foreign = [tmp_path / name for name in (".state.pt.12345678.tmp", "notes.tmp", ".hidden", "yolov9_fast-1.tmp")]
    for path in foreign:
        path.touch()
    monkeypatch.setattr(atomic, "_cleaned", set())  # as in another process
    atomic_write(tmp_path / "other", b"")
    assert sorted(tmp_path.iterdir()) == sorted([*foreign, tmp_path / "other"])


def test_a_file_that_another_writer_has_open_stays(tmp_path: Path) -> None:
    writer = TemporaryFile(tmp_path / "state.pt")
    remove_stale(tmp_path)
    writer.file.write(b"all")
    writer.commit()
    assert (tmp_path / "state.pt").read_bytes() == b"all"
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_writer_whose_file_was_removed_before_it_was_locked_takes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = atomic.fcntl.flock, []

    def late(file: object, operation: int) -> None:
        if not removed:
            removed.extend(tmp_path.glob(".*"))
            removed[0].unlink()
        lock(file, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(atomic.fcntl, "flock", late)
    atomic_write(tmp_path / "x", b"all")
    assert len(removed) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_longest_file_name_can_be_written(tmp_path: Path) -> None:
    assert atomic_write(tmp_path / ("n" * 255), b"x").read_bytes() == b"x"


_INTERRUPTED_SAVE = """
import sys, torch
from yolov9_fast.atomic import atomic_write

class Interrupted:
    def __init__(self, file):
        self.file, self.calls = file, 0
    def write(self, data):
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return self.file.write(data)

try:
    atomic_write(sys.argv[1], lambda file: torch.save({"w": torch.zeros(1000)}, Interrupted(file)))
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupted_torch_save_does_not_end_the_process(tmp_path: Path) -> None:
    """Its writer has bytes left, and writes them when it is destroyed."""
    words = [sys.executable, "-c", _INTERRUPTED_SAVE, str(tmp_path / "state.pt")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
    assert list(tmp_path.iterdir()) == []
