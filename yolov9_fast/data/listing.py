"""The image files of a split, and the path of an image's YOLO labels."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

from yolov9_fast._untrusted import absence, read_text, shown
from yolov9_fast.data.config import DataConfig
from yolov9_fast.data.files import find_files
from yolov9_fast.data.images import IMAGE_SUFFIXES
from yolov9_fast.data.records import LabelReport
from yolov9_fast.errors import DataError
from yolov9_fast.limits import above_limit, limit


def list_images(config: DataConfig, split: str, report: LabelReport) -> list[Path]:
    """Image paths of a split, sorted within each entry, without duplicates.

    What a folder holds besides is counted in the notes of `report`; links that lead nowhere are among its skips. Raises
    `DataError` if there is no image.
    """
    entries = config.split(split).images
    found: dict[Path, None] = {}
    for entry in entries:
        found.update(dict.fromkeys(_expand(entry, config, split, report)))
    if not found:
        places = shown([str(entry) for entry in entries])
        ignored = "; ".join(note.strip() for note in report.notes)
        raise DataError(
            f"{config.file}: split '{split}' has no images in {places}; suffixes are {' '.join(sorted(IMAGE_SUFFIXES))}"
            + (f"; {ignored}" if ignored else "")
        )
    return list(found)


def label_path(image: Path) -> Path:
    """The YOLO txt of an image: its last folder `images` becomes `labels`; without such a folder, next to the image."""
    parts = image.parts
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            labels = Path(*parts[:position], "labels")
            if os.path.isdir(labels):
                return labels.joinpath(*parts[position + 1 :]).with_suffix(".txt")
            break
    return image.with_suffix(".txt")


def read_image_list(file: Path, root: Path | None = None) -> list[Path]:
    """Paths in a `.txt` list, one a line, relative to the list's folder, else to `root`; `#` starts a comment.

    A backslash separates folders where no file has it in its name.
    """
    return [listed_path(line, file.parent, root) for line in read_lines(file)]


def read_lines(file: Path) -> list[str]:
    """Lines of a `.txt` list without empty ones, comments and repetitions."""
    text = read_text(file, "image list", "LIST_BYTES")
    count = text.count("\n") + 1
    if count > limit("LIST_LINES"):
        raise DataError(f"{file}: image list: {above_limit('LIST_LINES', count)}")
    lines = dict.fromkeys(line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def listed_path(line: str, *folders: Path | None) -> Path:
    """The path that a line of a list stands for: in the first of `folders` that has it, else in the first."""
    names = [line, line.replace("\\", "/")] if "\\" in line else [line]
    paths = (folder / name for name in names for folder in folders if folder is not None)
    # Not Path.exists, which raises for a name that is too long.
    first = next(paths)
    return next((path for path in chain([first], paths) if os.path.exists(path)), first)


def _expand(entry: Path, config: DataConfig, split: str, report: LabelReport) -> list[Path]:
    place = f"{config.file}: split '{split}'"
    if os.path.isdir(entry):
        found = find_files([entry], IMAGE_SUFFIXES)
        if not found.folders:
            raise DataError(f"{place}: {entry}: {found.problems[0][1]}")
        labels = {image.with_suffix(".txt") for image in found.files}
        found.others = [path for path in found.others if path not in labels]
        for path, problem in found.problems:
            report.skip(str(path), problem)
        if ignored := found.ignored():
            report.notes.append(f"  not images, ignored in {entry}: {ignored}")
        return found.files
    if not os.path.isfile(entry):
        raise DataError(f"{place}: {entry} {absence(entry)}")
    if entry.suffix.lower() == ".txt":
        return read_image_list(entry, config.path)
    if entry.suffix.lower() in IMAGE_SUFFIXES:
        return [entry]
    raise DataError(f"{place}: expected a folder, a .txt list or an image, got {entry}")
