"""A progress bar over cases where tqdm is installed; without it, as on a bare GPU image, the cases alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from yolov9_fast._lazy import require

T = TypeVar("T")


def progress(items: Sequence[T], name: Callable[[T], str]) -> Iterator[T]:
    """The items, with the name of the current one next to the bar."""
    if importlib.util.find_spec("tqdm") is None:
        yield from items
        return
    with require("tqdm").tqdm(total=len(items), unit="case", leave=False) as bar:
        for item in items:
            bar.set_description_str(name(item), refresh=False)
            yield item
            bar.update()
