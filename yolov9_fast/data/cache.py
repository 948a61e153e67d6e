"""The folder of cached files; nothing is written into the user's data folders."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from yolov9_fast._untrusted import user_path
from yolov9_fast.errors import UserError


def cache_folder() -> Path:
    """`$YOLOV9_FAST_CACHE`, else `$XDG_CACHE_HOME/yolov9_fast`, else `~/.cache/yolov9_fast`.

    Raises `UserError` if neither is set and the user has no home.
    """
    chosen = os.environ.get("YOLOV9_FAST_CACHE")
    if chosen:
        return user_path(chosen, "YOLOV9_FAST_CACHE", UserError)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return user_path(base, "folder of cached files (YOLOV9_FAST_CACHE sets another)", UserError) / "yolov9_fast"


def digest(*parts: object) -> str:
    """A file name for a cached result: a hash of everything that it depends on."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode("utf-8", "surrogateescape")).hexdigest()[:24]
