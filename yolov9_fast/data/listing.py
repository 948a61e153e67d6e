"""The image files of a split, and the path of an image's YOLO labels."""

from __future__ import annotations

from pathlib import Path

from yolov9_fast.data.config import DataConfig
from yolov9_fast.data.images import IMAGE_SUFFIXES
from yolov9_fast.errors import DataError


def list_images(config: DataConfig, split: str) -> list[Path]:
    """Image paths of a split, sorted within each entry, without duplicates; raises `DataError` if there are none."""
    entries = config.split(split).images
    found: dict[Path, None] = {}
    for entry in entries:
        found.update(dict.fromkeys(_expand(entry, config, split)))
    if not found:
        places = ", ".join(str(entry) for entry in entries)
        raise DataError(
            f"{config.file}: split '{split}' has no images in {places}; suffixes are {' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return list(found)


def label_path(image: Path) -> Path:
    """The YOLO txt of an image: its last folder `images` becomes `labels`; without such a folder, next to the image."""
    parts = image.parts
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            labels = Path(*parts[:position], "labels")
            if labels.is_dir():
                return labels.joinpath(*parts[position + 1 :]).with_suffix(".txt")
            break
    return image.with_suffix(".txt")


def read_image_list(file: Path, root: Path | None = None) -> list[Path]:
    """Paths in a `.txt` list, one a line, relative to the list's folder, else to `root`; `#` starts a comment."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: image list cannot be read: {error}") from error
    paths = []
    for line in (line.strip() for line in lines):
        if line and not line.startswith("#"):
            path = file.parent / line
            paths.append(path if root is None or path.exists() else root / line)
    return paths


def _expand(entry: Path, config: DataConfig, split: str) -> list[Path]:
    if entry.is_dir():
        return sorted(path for path in entry.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not entry.is_file():
        raise DataError(f"{config.file}: split '{split}': {entry} does not exist")
    if entry.suffix.lower() == ".txt":
        return read_image_list(entry, config.path)
    if entry.suffix.lower() in IMAGE_SUFFIXES:
        return [entry]
    raise DataError(f"{config.file}: split '{split}': expected a folder, a .txt list or an image, got {entry}")
