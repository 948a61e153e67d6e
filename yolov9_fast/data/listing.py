"""The image files of a split, and where YOLO labels of an image are looked for."""

from __future__ import annotations

from pathlib import Path

from yolov9_fast.data.config import DataConfig
from yolov9_fast.data.images import IMAGE_SUFFIXES
from yolov9_fast.errors import DataError


def list_images(config: DataConfig, split: str) -> list[Path]:
    """Image paths of a split, sorted within each entry, each once; raises `DataError` that says where it looked."""
    entries = config.split(split).images
    found: dict[Path, None] = {}
    for entry in entries:
        found.update(dict.fromkeys(_expand(entry, config, split)))
    if not found:
        places = ", ".join(str(entry) for entry in entries)
        raise DataError(f"split '{split}' of {config.file} has no images; looked in {places} for {_suffix_text()}")
    return list(found)


def label_path(image: Path) -> Path:
    """The YOLO txt of an image: its last folder `images` becomes `labels`; beside the image without such a folder."""
    parts = image.parts
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            labels = Path(*parts[:position], "labels")
            if labels.is_dir():
                return labels.joinpath(*parts[position + 1 :]).with_suffix(".txt")
            break
    return image.with_suffix(".txt")


def folder_images(folder: Path) -> list[Path]:
    """All image files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def read_image_list(file: Path, root: Path | None = None) -> list[Path]:
    """Paths in a `.txt` list, one a line, relative to the list's folder, else to `root`; `#` starts a comment."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the image list {file} cannot be read: {error}") from error
    paths = []
    for line in (line.strip() for line in lines):
        if line and not line.startswith("#"):
            beside = file.parent / line
            paths.append(beside if root is None or beside.exists() else root / line)
    return paths


def _expand(entry: Path, config: DataConfig, split: str) -> list[Path]:
    if entry.is_dir():
        return folder_images(entry)
    if not entry.is_file():
        raise DataError(f"split '{split}' of {config.file}: {entry} does not exist")
    if entry.suffix.lower() == ".txt":
        return read_image_list(entry, config.path)
    if entry.suffix.lower() in IMAGE_SUFFIXES:
        return [entry]
    raise DataError(f"split '{split}' of {config.file}: {entry} is neither a folder, a .txt list nor an image")


def _suffix_text() -> str:
    return " ".join(sorted(IMAGE_SUFFIXES))
