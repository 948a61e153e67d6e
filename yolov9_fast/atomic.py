"""Atomic writing of files: a temporary file in the same folder, flushed to disk, then renamed to the target."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from yolov9_fast._untrusted import user_path
from yolov9_fast.errors import UserError

if sys.platform != "win32":
    import fcntl

_Error = TypeVar("_Error", bound=BaseException)
_PREFIX = ".yolov9_fast-"
_cleaned: set[str] = set()
"""Folders in which this process has removed what killed processes left."""


def atomic_write(path: str | Path, content: bytes | str | Callable[[BinaryIO], object]) -> Path:
    """Write `path` so that it never holds half a file, also after a crash or on a full disk.

    A process that is killed while it writes leaves a temporary file, which the next process that writes into the same
    folder removes.

    Args:
        path: the target; missing parent folders are made.
        content: bytes, text (UTF-8), or a function that gets the open binary file and writes to it.

    Returns:
        The target as a `Path`.

    Raises:
        UserError: no path, or the operating system failed (disk full, no permission). Other exceptions of `content` are
            raised as they are. The previous file is intact in all cases.
    """
    path = user_path(path, "file to write", UserError)
    temporary: TemporaryFile | None = None
    try:
        temporary = TemporaryFile(path)
        if callable(content):
            content(temporary.file)
        else:
            temporary.file.write(content.encode() if isinstance(content, str) else content)
        temporary.commit()
    except BaseException as error:
        if temporary is not None:
            temporary.discard()
        if not isinstance(error, Exception):
            raise
        interrupt = _cause(error, KeyboardInterrupt)
        if interrupt is not None:  # torch.save makes another error of it
            raise interrupt from None
        system_error = _cause(error, OSError)
        if system_error is None:
            raise
        state = "the previous file is intact" if os.path.exists(path) else "nothing was written"
        reason = system_error.strerror or str(system_error)
        raise UserError(f"{path}: cannot be written: {reason}; {state}") from error
    return path


class TemporaryFile:
    """A new file in the folder of `target`, which it replaces by `commit`.

    It is locked while it is open: `remove_stale` tells it from a file that a killed process left.

    Args:
        target: the final path; missing parent folders are made.
        suffix: end of the temporary name, for writers that choose a format by it.

    Attributes:
        path: the temporary file.
        file: open for writing bytes.

    Raises:
        OSError: the folder or the file cannot be made.
    """

    def __init__(self, target: Path, suffix: str = "") -> None:
        self.target = target
        folder = target.parent
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.abspath(folder) not in _cleaned:
            _cleaned.add(os.path.abspath(folder))
            remove_stale(folder)
        while True:
            self.path = folder / f"{_PREFIX}{uuid.uuid4().hex}.tmp{suffix}"
            self.file = _File(io.FileIO(self.path, "x"))
            with contextlib.suppress(OSError):  # Not every network file system has locks.
                lock(self.file.fileno(), wait=True)
            if self.path.exists():
                return
            self.file.close()  # Another process has removed it before it was locked.

    def commit(self) -> None:
        """Flush to disk and rename to the target."""
        self.file.flush()
        os.fsync(self.file.fileno())
        if sys.platform == "win32":  # no open file is renamed there
            self.file.close()
        os.replace(self.path, self.target)
        self.file.close()
        _sync_folder(self.target.parent)

    def discard(self) -> None:
        """Remove the file, if there still is one."""
        with contextlib.suppress(OSError):  # The disk may be what failed; the error being raised says more.
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.file.close()


class _File(io.BufferedWriter):
    """Takes bytes without effect after it is closed: torch's writer ends the process if its last ones are refused."""

    def write(self, data: Any, /) -> int:
        return len(data) if self.closed else super().write(data)


def lock(descriptor: int, *, wait: bool) -> None:
    """Lock an open file or folder for this process.

    Raises:
        BlockingIOError: another process has it locked, and `wait` is False.
        OSError: the file system or the operating system has no such locks.
    """
    if sys.platform == "win32":
        raise OSError("no locks on this operating system")
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a `TemporaryFile`."""
    return name.startswith(_PREFIX) and ".tmp" in name


def remove_stale(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`; those that are being written stay."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if is_temporary(entry.name) and entry.is_file(follow_symlinks=False):
                # Without a lock nobody can know whether it is being written: it stays.
                with contextlib.suppress(OSError), open(entry.path, "r+b") as file:
                    lock(file.fileno(), wait=False)
                    os.unlink(entry.path)


def _sync_folder(folder: Path) -> None:
    """Flush the folder: the rename survives a power failure only then."""
    if sys.platform == "win32":  # no folder is opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # Some network file systems cannot flush folders; the file itself is already safe.
    finally:
        os.close(descriptor)


def _cause(error: BaseException, kind: type[_Error]) -> _Error | None:
    """The error of this kind that caused `error`, or `error` itself; torch.save and others wrap it in their own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, kind):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
