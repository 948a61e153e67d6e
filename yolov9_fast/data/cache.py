"""Where derived files are kept (never beside the user's), and writing them whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """`$YOLOV9_FAST_CACHE`, else `$XDG_CACHE_HOME/yolov9_fast`, else `~/.cache/yolov9_fast`."""
    chosen = os.environ.get("YOLOV9_FAST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yolov9_fast"


def digest(*parts: object) -> str:
    """A short name for a cached thing, from all that it depends on."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def write_atomically(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace `file` by what `write` puts out; on any error nothing is left behind. Raises `OSError`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
