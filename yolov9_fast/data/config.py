"""The data file: a YAML with the class names and the paths of each split's images and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolov9_fast._untrusted import read_yaml, reason, shown, user_path
from yolov9_fast.errors import DataError
from yolov9_fast.limits import above_limit, limit

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Paths of one split: folders, `.txt` lists or image files; and a COCO JSON unless the labels are YOLO txt."""

    images: tuple[Path, ...]
    annotations: Path | None = None


@dataclass(frozen=True)
class DataConfig:
    """Contents of a data file: `path` is the dataset's root, `names` maps class index 0..nc-1 to a name."""

    path: Path
    names: dict[int, str]
    splits: dict[str, Split]
    file: Path

    @property
    def num_classes(self) -> int:
        """Number of classes, nc."""
        return len(self.names)

    def split(self, name: str) -> Split:
        """The split called `name`; raises `DataError` that lists the splits of the file."""
        if name not in self.splits:
            raise DataError(f"{self.file}: split: expected one of {', '.join(self.splits)}, got '{name}'")
        return self.splits[name]


def load_data_config(file: str | Path) -> DataConfig:
    """Read a data file.

    Keys: `path` (optional root, relative to the file's folder), `names` (list, or mapping index → name), optional `nc`,
    and at least one of `train`, `val`, `test`. A split is a folder, a `.txt` list of images, a list of those, or
    `{images: DIR, annotations: FILE.json}`. Raises `DataError` that names the key at fault. Whether the images exist is
    checked by `load_split`.
    """
    file = user_path(file, "data")
    content = read_yaml(file, "data file")
    if not isinstance(content, Mapping):
        raise DataError(f"{file}: expected a mapping with names and splits, got {shown(content)}")
    root = _root(content.get("path"), file)
    names = _names(content.get("names"), file)
    nc = content.get("nc")
    if nc is not None and (isinstance(nc, bool) or nc != len(names)):
        raise DataError(f"{file}: nc: expected {len(names)} as there are names, got {shown(nc)}")
    splits = {key: _split(content[key], root, file, key) for key in SPLITS if content.get(key) not in (None, "")}
    if not splits:
        raise DataError(f"{file}: expected at least one of the keys {', '.join(SPLITS)}, got none")
    return DataConfig(path=root, names=names, splits=splits, file=file)


def _root(value: Any, file: Path) -> Path:
    try:
        folder = file.resolve().parent
        return folder if value is None else (folder / user_path(value, f"{file}: path")).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise DataError(f"{file}: path: {reason(error)}, got {shown(value)}") from error


def _names(value: Any, file: Path) -> dict[int, str]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        raise DataError(
            f"{file}: names: expected a list of class names or a mapping of index to name, got {shown(value)}"
        )
    if any(isinstance(key, bool) or not isinstance(key, int) for key in value):
        raise DataError(f"{file}: names: expected integers as keys, got {shown(list(value))}")
    if len(value) > limit("CLASSES"):
        raise DataError(f"{file}: names: {above_limit('CLASSES', len(value))}")
    if sorted(value) != list(range(len(value))):
        raise DataError(f"{file}: names: expected the keys 0 to {len(value) - 1}, got {shown(sorted(value))}")
    return {index: _name(value[index], f"{file}: names: class {index}") for index in range(len(value))}


def _name(value: Any, place: str) -> str:
    if not isinstance(value, str):
        # YAML reads yes, no, on, off, ~, 007, 1.0 and dates as values of their own.
        kind = "no value" if value is None else f"{shown(value)} ({type(value).__name__})"
        raise DataError(f"{place}: expected text, got {kind}; put the name in quotes")
    if not value.strip():
        raise DataError(f"{place}: expected a name, got {shown(value)}")
    if len(value) > limit("CLASS_NAME"):
        raise DataError(f"{place}: {above_limit('CLASS_NAME', len(value))}")
    return value


def _split(value: Any, root: Path, file: Path, key: str) -> Split:
    if isinstance(value, Mapping):
        unknown = set(value) - {"images", "annotations"}
        if unknown or "images" not in value:
            raise DataError(f"{file}: {key}: expected `images` and optionally `annotations`, got {shown(value)}")
        images = _paths(value["images"], root, file, f"{key}.images")
        annotations = value.get("annotations")
        if annotations is None:
            return Split(images)
        return Split(images, root / user_path(annotations, f"{file}: {key}.annotations"))
    return Split(_paths(value, root, file, key))


def _paths(value: Any, root: Path, file: Path, key: str) -> tuple[Path, ...]:
    entries = value if isinstance(value, list) else [value]
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise DataError(f"{file}: {key}: expected a folder, a .txt list or a list of those, got {shown(value)}")
    return tuple(root / user_path(entry, f"{file}: {key}") for entry in dict.fromkeys(entries))
