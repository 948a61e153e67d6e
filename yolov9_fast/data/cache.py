"""Where derived files are kept: never beside the user's, whose folders stay as they are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """`$YOLOV9_FAST_CACHE`, else `$XDG_CACHE_HOME/yolov9_fast`, else `~/.cache/yolov9_fast`."""
    chosen = os.environ.get("YOLOV9_FAST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yolov9_fast"


def digest(*parts: object) -> str:
    """A short name for a cached thing, from all that it depends on."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode("utf-8", "surrogateescape")).hexdigest()[:24]
