"""Files below a folder or of a pattern, without endless loops of links; what is passed over is counted."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from yolov9_fast._untrusted import reason

_LISTED_KINDS = 10


@dataclass
class Found:
    """What folders hold.

    `files`: regular files of the suffixes looked for; `folders`: those that were read; `others`: regular files of other
    suffixes; `hidden`: number of names that begin with a dot; `problems`: (path, reason) of what cannot be used.
    """

    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    hidden: int = 0
    problems: list[tuple[Path, str]] = field(default_factory=list)

    def ignored(self) -> str:
        """What was passed over without being a problem, such as "2 .jfif, 1 hidden"; empty if nothing was."""
        kinds = Counter(path.suffix.lower() or "without suffix" for path in self.others).most_common()
        counts = [f"{count} {kind}" for kind, count in kinds[:_LISTED_KINDS]]
        if len(kinds) > _LISTED_KINDS:
            counts.append(f"{sum(count for _, count in kinds[_LISTED_KINDS:])} of other suffixes")
        return ", ".join([*counts, f"{self.hidden} hidden"] if self.hidden else counts)


def find_files(folders: Iterable[Path], suffixes: Collection[str], *, deep: bool = True) -> Found:
    """Regular files of `suffixes` (lower case) in `folders` and, if `deep`, in the folders below them, sorted.

    Names that begin with a dot are left out. Links to folders are followed, after all real folders. No folder is read
    twice, and none above the one that was asked for or above the link to it.
    """
    found = Found()
    seen: set[tuple[int, int]] = set()
    for top in folders:
        above = set(top.resolve().parents)
        real, linked = [top], list[Path]()
        while real or linked:
            folder = (real or linked).pop()
            try:
                status = folder.stat()
                identity = (status.st_dev, status.st_ino)
                target = folder.resolve()
                if folder is not top and (target in above or target in folder.parent.resolve().parents):
                    found.problems.append((folder, "link to a folder above it"))
                    continue
                if identity in seen:
                    if folder is not top:
                        found.problems.append((folder, "link to a folder that is listed already"))
                    continue
                seen.add(identity)
                names = sorted(os.listdir(folder), reverse=True)
            except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
                found.problems.append((folder, f"folder cannot be read ({reason(error)})"))
                continue
            found.folders.append(folder)
            visible = [folder / name for name in names if not name.startswith(".")]
            found.hidden += len(names) - len(visible)
            for path in visible:
                if _sort_in(path, suffixes, found) and deep:
                    (linked if path.is_symlink() else real).append(path)
    for paths in (found.files, found.folders, found.others):
        paths.sort()
    found.problems.sort()
    return found


def _sort_in(path: Path, suffixes: Collection[str], found: Found) -> bool:
    """File one name under `found`; True for a folder, which is the caller's to read."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        broken = isinstance(error, FileNotFoundError) and path.is_symlink()
        found.problems.append((path, "broken link" if broken else f"cannot be read ({reason(error)})"))
        return False
    if stat.S_ISREG(mode):
        (found.files if path.suffix.lower() in suffixes else found.others).append(path)
    elif not stat.S_ISDIR(mode):
        found.problems.append((path, "not a regular file"))
    return stat.S_ISDIR(mode)


def match_files(pattern: Path, suffixes: Collection[str]) -> Found:
    """Regular files of `suffixes` that `glob.glob(pattern, recursive=True)` finds, each folder read once."""
    found = Found()
    parts = pattern.parts
    paths = [Path()]
    for part in (*parts, "*") if parts[-1] == "**" else parts:
        if part == "**":
            below = find_files(filter(os.path.isdir, paths), ())
            paths = below.folders
            found.problems += [(path, text) for path, text in below.problems if text.startswith("folder")]
        elif glob.has_magic(part):
            paths = [path / name for path in paths if os.path.isdir(path) for name in _matching(path, part, found)]
        else:
            paths = [path / part for path in paths]
    for path in sorted(paths):
        if os.path.lexists(path):
            _sort_in(path, suffixes, found)
    return found


def _matching(folder: Path, pattern: str, found: Found) -> list[str]:
    try:
        names = os.listdir(folder)
    except OSError as error:
        found.problems.append((folder, f"folder cannot be read ({reason(error)})"))
        return []
    hidden = pattern.startswith(".")
    return [name for name in fnmatch.filter(names, pattern) if hidden or not name.startswith(".")]
