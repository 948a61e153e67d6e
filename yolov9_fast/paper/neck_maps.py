"""A detector's neck as maps (P3, P4, P5 summed over the channels), and whether they attend to the objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yolov9_fast.data import DetectionDataset, ImageRecord, Sample
from yolov9_fast.models import DetectionModel

Map = NDArray[np.float64]
LEVELS = ("P3", "P4", "P5")


@dataclass(frozen=True)
class Focus:
    """How a map treats the inside of the objects' boxes.

    `inside`: share of the squared deviation from the map's mean inside the boxes; `area`: share of the cells that do;
    `concentration`: inside / area, 1 where the map does not care about objects; `auc`: probability that a cell inside
    has a larger value than one outside, 0.5 where the value says nothing.
    """

    inside: float
    area: float
    auc: float

    @property
    def concentration(self) -> float:
        return self.inside / self.area


@torch.no_grad()
def neck_maps(model: DetectionModel, images: Tensor) -> list[Tensor]:
    """Channel sums of the maps that the main branch's head reads: P3, P4, P5, each float64 [B, H/s, W/s].

    The network runs as it is deployed, in evaluation mode. `images`: [B, 3, H, W] in [0, 1].
    """
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(_: Any, __: Any, output: Tensor) -> None:
            found[index] = output.double().sum(1)

        return hook

    hooks = [model.model[index].register_forward_hook(keep(index)) for index in model.graph.main_sources]
    training = model.training
    try:
        model.eval().raw(images, auxiliary=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [found[index].cpu() for index in model.graph.main_sources]


def samples_with_objects(records: Sequence[ImageRecord], image_size: int, count: int) -> Iterator[Sample]:
    """The first `count` images that have objects, letterboxed."""
    chosen = [record for record in records if len(record.boxes)][:count]
    if chosen:
        dataset = DetectionDataset(chosen, image_size=image_size, augment=None)
        for index in range(len(chosen)):
            yield dataset[index]


def content(sample: Sample) -> tuple[int, int, int, int]:
    """Left, top, right and bottom pixel of the image on its canvas; the rest is the letterbox's grey."""
    left, top = sample.pad
    height, width = sample.original_shape
    return left, top, left + round(width * sample.ratio[1]), top + round(height * sample.ratio[0])


def focus(values: Map, sample: Sample) -> Focus | None:
    """How a map [h, w] over the sample's canvas treats its objects; None where they fill all of it or none.

    A cell counts as inside where its centre is in a box; a box between the centres takes the cell of its own centre.
    Cells on the letterbox's grey are left out.
    """
    height, width = values.shape
    inside = np.zeros((height, width), bool)
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    for cx, cy, w, h in sample.targets[:, 1:].double().tolist():
        inside |= (np.abs(y - cy) <= h / 2)[:, None] & (np.abs(x - cx) <= w / 2)[None]
        inside[min(int(cy * height), height - 1), min(int(cx * width), width - 1)] = True
    left, top, right, bottom = content(sample)
    canvas_height, canvas_width = sample.image.shape[1:]
    rows = (y * canvas_height >= top) & (y * canvas_height <= bottom)
    columns = (x * canvas_width >= left) & (x * canvas_width <= right)
    shown = rows[:, None] & columns[None]
    values, inside = values[shown], inside[shown]
    if not inside.any() or inside.all():
        return None
    deviation = (values - values.mean()) ** 2
    total = float(deviation.sum())
    area = float(inside.mean())
    return Focus(float(deviation[inside].sum()) / total if total else area, area, _auc(values, inside))


def _auc(values: Map, inside: NDArray[np.bool_]) -> float:
    """Mann and Whitney's: ties count half."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    n = int(inside.sum())
    return float((ranks[inside].sum() - n * (n + 1) / 2) / (n * (len(values) - n)))


def mean_focus(found: Sequence[Focus]) -> dict[str, float]:
    """Means over images; `separation` is 2 · |auc − ½|, for maps that are low on objects tell them apart as well."""
    return {
        "images": len(found),
        "inside": float(np.mean([f.inside for f in found])),
        "area": float(np.mean([f.area for f in found])),
        "concentration": float(np.mean([f.concentration for f in found])),
        "auc": float(np.mean([f.auc for f in found])),
        "separation": float(np.mean([2 * abs(f.auc - 0.5) for f in found])),
    }
