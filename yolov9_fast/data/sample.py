"""The items of a dataset and of a loader: one sample, and a batch of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from yolov9_fast.data.planned import PlannedImages


@dataclass
class Sample:
    """One image with its targets, at the size of the network's input.

    `image`: uint8 RGB [3, H, W]; `targets`: float32 [n, 5] (class, cx, cy, w, h), normalised to W and H; `index`:
    position in the dataset's records. In evaluation `original_shape` (height, width), `ratio` (scale of height and
    width) and `pad` (left, top in pixels) are the arguments of `scale_boxes_to_original`; in training they describe the
    image of this index before augmentation. `planned`: where the image is to be made from, if it has no pixels,
    [3, 0, 0].
    """

    image: Tensor
    targets: Tensor
    index: int
    original_shape: tuple[int, int]
    ratio: tuple[float, float]
    pad: tuple[int, int]
    planned: PlannedImages | None = None


@dataclass
class Batch:
    """B samples: `images` uint8 [B, 3, H, W]; `targets` float32 [n, 6] (image, class, cx, cy, w, h); lists of B;
    `planned`: as in `Sample`."""

    images: Tensor
    targets: Tensor
    indices: list[int]
    original_shapes: list[tuple[int, int]]
    ratios: list[tuple[float, float]]
    pads: list[tuple[int, int]]
    planned: PlannedImages | None = None

    def pin_memory(self) -> Batch:
        """The same batch with tensors in page-locked memory, for asynchronous copies to a GPU."""
        planned = None if self.planned is None else self.planned.pin_memory()
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory(), planned=planned)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one shape into a batch."""
    targets = [
        torch.cat((torch.full((len(sample.targets), 1), float(position)), sample.targets), dim=1)
        for position, sample in enumerate(samples)
    ]
    plans = [sample.planned for sample in samples if sample.planned is not None]
    return Batch(
        images=torch.stack([sample.image for sample in samples]),
        targets=torch.cat(targets),
        indices=[sample.index for sample in samples],
        original_shapes=[sample.original_shape for sample in samples],
        ratios=[sample.ratio for sample in samples],
        pads=[sample.pad for sample in samples],
        planned=PlannedImages.joined(plans) if plans else None,
    )
