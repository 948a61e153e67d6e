"""The data file: a YAML that names the classes and says where each split's images and labels lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolov9_fast._lazy import require
from yolov9_fast.errors import DataError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Where one split lies: folders, `.txt` lists or image files, and a COCO JSON when the labels are not YOLO txt."""

    images: tuple[Path, ...]
    annotations: Path | None = None


@dataclass(frozen=True)
class DataConfig:
    """A data file as read: `path` is the dataset's root, `names` maps class index 0..nc-1 to a name."""

    path: Path
    names: dict[int, str]
    splits: dict[str, Split]
    file: Path

    @property
    def num_classes(self) -> int:
        return len(self.names)

    def split(self, name: str) -> Split:
        """The split called `name`; raises `DataError` that lists the splits of the file."""
        if name not in self.splits:
            raise DataError(f"{self.file} has no split '{name}'; it has {', '.join(self.splits)}")
        return self.splits[name]


def load_data_config(file: str | Path) -> DataConfig:
    """Read a data file.

    Form: `path` (optional root, relative to the file's folder), `names` (list, or mapping index → name), optional `nc`,
    and at least one of `train`, `val`, `test`. A split is a folder, a `.txt` list of images, a list of those, or
    `{images: DIR, annotations: FILE.json}`. Raises `DataError` that names the key at fault. Whether the images exist is
    checked by `load_split`.
    """
    file = Path(file)
    content = _read_yaml(file)
    root = _root(content.get("path"), file)
    names = _names(content.get("names"), file)
    nc = content.get("nc")
    if nc is not None and nc != len(names):
        raise DataError(f"{file}: nc is {nc!r} but names has {len(names)} entries; correct one of them or drop nc")
    splits = {key: _split(content[key], root, file, key) for key in SPLITS if content.get(key) not in (None, "")}
    if not splits:
        raise DataError(f"{file}: none of the keys {', '.join(SPLITS)} is given, so there are no images to use")
    return DataConfig(path=root, names=names, splits=splits, file=file)


def _read_yaml(file: Path) -> Mapping[str, Any]:
    yaml = require("yaml")
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"the data file {file} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the data file {file} cannot be read: {error}") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"the data file {file} is not valid YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise DataError(f"the data file {file} must be a mapping with names and splits, got {type(content).__name__}")
    return content


def _root(value: Any, file: Path) -> Path:
    folder = file.resolve().parent
    if value is None:
        return folder
    if not isinstance(value, str):
        raise DataError(f"{file}: path must be a folder's name, got {value!r}")
    return (folder / Path(value).expanduser()).resolve()


def _names(value: Any, file: Path) -> dict[int, str]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        raise DataError(f"{file}: names must be a list of class names or a mapping of index to name, got {value!r}")
    if any(isinstance(key, bool) or not isinstance(key, int) for key in value):
        raise DataError(f"{file}: the keys of names must be whole numbers, got {list(value)}")
    if sorted(value) != list(range(len(value))):
        raise DataError(
            f"{file}: the keys of names must run from 0 to {len(value) - 1} without gaps, got {sorted(value)}"
        )
    return {index: str(value[index]) for index in range(len(value))}


def _split(value: Any, root: Path, file: Path, key: str) -> Split:
    if isinstance(value, Mapping):
        unknown = set(value) - {"images", "annotations"}
        if unknown or "images" not in value:
            raise DataError(f"{file}: {key} as a mapping needs `images` and may have `annotations`, got {dict(value)}")
        annotations = value.get("annotations")
        if annotations is not None and not isinstance(annotations, str):
            raise DataError(f"{file}: {key}.annotations must be a file's name, got {annotations!r}")
        images = _paths(value["images"], root, file, f"{key}.images")
        return Split(images, None if annotations is None else root / Path(annotations).expanduser())
    return Split(_paths(value, root, file, key))


def _paths(value: Any, root: Path, file: Path, key: str) -> tuple[Path, ...]:
    entries = value if isinstance(value, list) else [value]
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise DataError(f"{file}: {key} must be a folder, a .txt list or a list of those, got {value!r}")
    return tuple(root / Path(entry).expanduser() for entry in entries)
