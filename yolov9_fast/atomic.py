"""Atomic writing of files: a temporary file in the same folder, flushed to disk, then renamed to the target."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from yolov9_fast.errors import UserError


def atomic_write(path: str | Path, content: bytes | str | Callable[[BinaryIO], object]) -> Path:
    """Write `path` so that it never holds half a file, also after a crash or on a full disk.

    Args:
        path: the target; missing parent folders are made.
        content: bytes, text (UTF-8), or a function that gets the open binary file and writes to it.

    Returns:
        The target as a `Path`.

    Raises:
        UserError: the operating system failed (disk full, no permission). Other exceptions of `content` are raised as
            they are. The previous file is intact in both cases.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        _remove(temporary)
        system_error = _system_error(error)
        if system_error is None:
            raise
        state = "the previous file is intact" if path.exists() else "nothing was written"
        reason = system_error.strerror or str(system_error)
        raise UserError(f"{path}: cannot be written: {reason}; {state}") from error
    return path


def _remove(temporary: Path) -> None:
    # The folder may be what failed; the error being raised says more.
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flush the folder: the rename survives a power failure only then."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # Some network file systems cannot flush folders; the file itself is already safe.
    finally:
        os.close(descriptor)


def _system_error(error: BaseException) -> OSError | None:
    """The operating system's error that caused `error`; torch.save and others wrap it in their own."""
    if not isinstance(error, Exception):
        return None
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
