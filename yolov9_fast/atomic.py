"""Files written whole or not at all: a temporary file beside the target, flushed to disk, then renamed over it."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from yolov9_fast.errors import UserError


def atomic_write(path: str | Path, content: bytes | str | Callable[[BinaryIO], object]) -> Path:
    """Write `path` so that a reader, a crash or a full disk never sees half a file.

    Args:
        path: the target; missing parent folders are made.
        content: bytes, text (UTF-8), or a function that writes to the open binary file it is given.

    Returns:
        The target as a `Path`.

    Raises:
        UserError: the system refused (disk full, no permission); names the path, and the previous file is intact.
            Whatever else `content` raises passes through, likewise with the previous file intact.
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
        raise UserError(f"cannot write {path}: {reason}; {state}") from error
    return path


def _remove(temporary: Path) -> None:
    # The folder itself may be what failed; the error on its way says more.
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """The rename itself survives a power cut only once its folder is flushed."""
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
    """The operating system's error behind `error`: serialisers such as torch.save wrap it in their own."""
    if not isinstance(error, Exception):
        return None
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
