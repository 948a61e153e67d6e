"""The dataset: images with their objects, augmented for training or letterboxed for evaluation."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from yolov9_fast._lazy import require
from yolov9_fast.data.augment import AugmentConfig, LabelledImage, Objects
from yolov9_fast.data.custom import Augmentation, apply_augmentations, resolve_augmentations
from yolov9_fast.data.geometry import Floats, clip, corners_from_normalised, normalised_from_corners
from yolov9_fast.data.images import Image, check_size, pad_to, read_resized, scaled_size, to_tensor
from yolov9_fast.data.packed import PackedRecords
from yolov9_fast.data.plan import Plan, hide_unseen, paste, plan_sample, record_objects, stack
from yolov9_fast.data.planned import PlanForm, PlannedImages
from yolov9_fast.data.records import ImageRecord
from yolov9_fast.data.rectangles import rectangular_batches
from yolov9_fast.data.sample import Sample
from yolov9_fast.data.stores import DiskStore, ImageStore, MemoryStore, NoStore, fits_memory
from yolov9_fast.errors import DataError
from yolov9_fast.ops._augment import OPERATOR, canvas_of
from yolov9_fast.ops._boxes import STRIDES

_own = threading.local()


def _scratch(size: int) -> Image:
    """uint8 [size] of this thread, the same at every call: new memory would be mapped page by page."""
    if not hasattr(_own, "pixels") or len(_own.pixels) < size:
        _own.pixels = np.empty(size, dtype=np.uint8)
    pixels: Image = _own.pixels[:size]
    return pixels


@dataclass(frozen=True)
class SampleKey:
    """Which sample of a training set: the image, the epoch of its random draws, and whether it may be a mosaic.

    Without `mosaic` there is no mixup or copy-paste either.
    """

    index: int
    epoch: int = 0
    mosaic: bool = True


class DetectionDataset(Dataset[Sample]):
    """Samples of `records`, by index (which means the `SampleKey` of epoch 0) or by `SampleKey`.

    `augment`: the training pipeline, or None for evaluation (letterbox only). `image_size`: side in pixels, a multiple
    of `stride`. `rect`: evaluation canvases of `rectangular_batches` for loaders of `batch_size`. `cache`: keep resized
    images in "ram" or on "disk" (`cache_dir`). `augmentations`: further functions, or import paths `module:function` of
    them, called in this order on the augmented image; `augmentations_before`: likewise, on each source image at the
    size of training, before the mosaic. All random draws of a sample come from (`seed`, epoch, index) alone.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        *,
        image_size: int,
        augment: AugmentConfig | None,
        rect: bool = False,
        batch_size: int = 1,
        stride: int = STRIDES[-1],
        rect_pad: float = 0.5,
        cache: Literal["ram", "disk"] | None = None,
        cache_dir: str | Path | None = None,
        seed: int = 0,
        augmentations: Sequence[Augmentation | str] = (),
        augmentations_before: Sequence[Augmentation | str] = (),
    ) -> None:
        check_size(image_size, stride)
        if not records:
            raise DataError("records: expected at least one image, got none")
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        if rect and augment is not None:
            raise ValueError("rect: expected False with augmentation, got True")
        if cache not in (None, "ram", "disk"):
            raise ValueError(f"cache: expected None, 'ram' or 'disk', got {cache!r}")
        for name, given in (("augmentations", augmentations), ("augmentations_before", augmentations_before)):
            if given and augment is None:
                raise ValueError(f"{name}: expected none with augment=None, got {len(given)}")
        self.records: list[ImageRecord] | None = list(records)
        self.image_size, self.augment, self.seed = image_size, augment, seed
        self.rect, self.batch_size = rect, batch_size
        self._given = (augmentations, augmentations_before)
        self._resolve()
        self._packed = PackedRecords(records)
        self.order = list(range(len(records)))
        self._shapes: list[tuple[int, int]] | None = None
        if rect:
            self.order, self._shapes = rectangular_batches(self._packed.sizes, batch_size, image_size, stride, rect_pad)
        self._store: ImageStore
        self.keep_images(cache, cache_dir)
        self._offsets: NDArray[np.int64] | None = None
        mosaics = augment is not None and augment.mosaic > 0
        self._most_views = 2 if augment is not None and mosaics and augment.mixup > 0 else 1
        self._most_tiles = 4 if mosaics else 1

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: int | SampleKey) -> Sample:
        key = index if isinstance(index, SampleKey) else SampleKey(index)
        if not 0 <= key.index < len(self):
            raise IndexError(f"sample {key.index} of {len(self)}")
        if self.augment is None:
            return self._evaluation_sample(key.index)
        return self._training_samples([key], self.augment)[0]

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker needs the packed arrays only. It imports again what was given by import path: the working
        # folder, which `resolve_augmentations` searches, is not on its module path.
        return {**self.__dict__, "records": None, "_augmentations": None, "_before": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._resolve()

    def _resolve(self) -> None:
        self._augmentations = resolve_augmentations(self._given[0])
        self._before = resolve_augmentations(self._given[1], "augmentations_before")

    def offsets(self) -> NDArray[np.int64]:
        """Where each resized image begins when all lie one after the other, and the end of the last: int64 [n + 1]."""
        sizes = map(self.resized, range(len(self)))
        return np.cumsum([0, *(height * width * 3 for height, width in sizes)])

    def resized(self, index: int) -> tuple[int, int]:
        """(height, width) of a record's image at the size of the network's input."""
        return scaled_size(*self._packed.size(index), self.image_size)

    def read(self, index: int, out: Image) -> None:
        """Write a record's resized image, BGR, into uint8 [h, w, 3]."""
        self._store.read(index, out)

    def leave_out_pixels(self) -> None:
        """Give samples of training without pixels from now on, `planned` in images that lie as `offsets` says."""
        self._offsets = self.offsets()

    def sample_bytes(self) -> int:
        """Of the largest image that a sample has, or of its plan."""
        if self._offsets is None:
            return 3 * (self.image_size + (STRIDES[-1] if self.rect else 0)) ** 2
        return sum(PlanForm(1, self._most_views, self._most_tiles, True, self.image_size, False).sizes())

    def plan(self, key: SampleKey) -> Plan:
        """All that is drawn for a training sample, and its objects; reads no image without `augmentations_before`."""
        assert self.augment is not None
        rng = np.random.default_rng((self.seed, key.epoch, key.index))
        size, source = self.image_size, partial(self._changed, key, itertools.count(1)) if self._before else None
        return plan_sample(self._packed, key.index, size, self.augment, rng, with_mosaic=key.mosaic, source=source)

    def _changed(
        self, key: SampleKey, numbers: Iterator[int], index: int, shape: tuple[int, int]
    ) -> tuple[Objects, Image]:
        """A source image of the sample `key` and its objects, changed by `augmentations_before`."""
        rng = np.random.default_rng((self.seed, key.epoch, key.index, next(numbers)))
        [objects], cv2 = record_objects(self._packed, [index], [shape]), require("cv2")
        image = cv2.cvtColor(self._store.get(index), cv2.COLOR_BGR2RGB)
        labelled = LabelledImage(image, objects.classes.copy(), clip(objects.boxes, *shape[::-1]), objects.polygons)
        labelled = apply_augmentations(self._before, labelled, rng)
        image = cv2.cvtColor(np.ascontiguousarray(labelled.image), cv2.COLOR_RGB2BGR)
        return Objects(labelled.classes, labelled.boxes, labelled.polygons), image

    def _evaluation_sample(self, index: int) -> Sample:
        image = self._store.get(index)
        height, width = image.shape[:2]
        shape = self._shapes[index] if self._shapes else (self.image_size, self.image_size)
        canvas, pad = pad_to(image, shape)
        rows = self._packed.boxes(index)
        boxes = corners_from_normalised(rows[:, 1:], width, height) + np.array([*pad, *pad], dtype=np.float32)
        return self._sample(to_tensor(canvas), rows[:, 0], boxes, index, (height, width), pad)

    def _training_samples(self, keys: Sequence[SampleKey], augment: AugmentConfig) -> list[Sample]:
        plans = [self.plan(key) for key in keys]
        if self._offsets is not None:
            return [self._planned_sample(key.index, plan, augment) for key, plan in zip(keys, plans, strict=True)]
        return [
            self._training_sample(key.index, plan, image)
            for key, plan, image in zip(keys, plans, self._rendered(plans, augment), strict=True)
        ]

    def _training_sample(self, index: int, plan: Plan, image: Tensor) -> Sample:
        classes, boxes = plan.objects.classes, plan.objects.boxes
        if self._augmentations:
            pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
            labelled = apply_augmentations(self._augmentations, LabelledImage(pixels, classes, boxes), plan.rng)
            image = torch.from_numpy(np.ascontiguousarray(labelled.image.transpose(2, 0, 1)))
            classes, boxes = labelled.classes, labelled.boxes
        return self._sample(image, classes, boxes, index, self.resized(index), plan.pad)

    def _planned_sample(self, index: int, plan: Plan, augment: AugmentConfig) -> Sample:
        arrays = stack([plan], self._most_views, self._most_tiles)
        assert self._offsets is not None
        arrays.tiles[..., 0] = self._offsets[arrays.members]  # that of -1 is never read
        planned = PlannedImages.of(arrays, self.image_size, perspective=augment.perspective > 0)
        classes, boxes, nothing = plan.objects.classes, plan.objects.boxes, torch.empty(3, 0, 0, dtype=torch.uint8)
        return self._sample(nothing, classes, boxes, index, self.resized(index), plan.pad, planned)

    def _rendered(self, plans: Sequence[Plan], augment: AugmentConfig) -> Tensor:
        """uint8 RGB [B, 3, size, size] of these plans."""
        arrays = stack(plans)
        hide_unseen(arrays, self.image_size)
        pixels = self._store.pixels if isinstance(self._store, MemoryStore) else None
        if pixels is None or any(view.pasted or view.images for plan in plans for view in plan.views):
            pixels = self._gathered(plans, arrays.tiles)
        else:
            assert isinstance(self._store, MemoryStore)
            self._store.fill(arrays.members[arrays.tiles[..., 1] > 0])
            arrays.tiles[..., 0] = self._store.offsets[arrays.members]
        sources, tiles, canvases, matrices = (torch.from_numpy(each) for each in (pixels, *arrays[1:4]))
        tables = None if arrays.tables is None else torch.from_numpy(arrays.tables)
        flips, shares = torch.from_numpy(arrays.flips), torch.from_numpy(arrays.shares)
        projective = augment.perspective > 0
        # Without the checks of `ops.augment`: plans are right, and the compiled kernel looks at all offsets itself.
        result: Tensor = OPERATOR(
            sources, tiles, canvases, matrices, tables, flips, shares, self.image_size, projective
        )
        return result

    def _gathered(self, plans: Sequence[Plan], tiles: NDArray[np.int64]) -> Image:
        """The images of these plans one after the other, whose offsets are written to `tiles`; until the next call.

        A canvas that objects are pasted on is one image.
        """
        for sample, plan in enumerate(plans):
            for which, view in enumerate(plan.views):
                if view.pasted:
                    tiles[sample, which] = 0
                    tiles[sample, which, 0, 1:3] = view.canvas
        sizes = tiles[..., 1] * tiles[..., 2] * 3
        ends = np.cumsum(sizes).reshape(sizes.shape)
        tiles[..., 0] = ends - sizes
        pixels = _scratch(int(ends[-1, -1, -1]))
        for place in zip(*np.nonzero(sizes), strict=True):
            sample, which, number = (int(each) for each in place)
            start, height, width = tiles[sample, which, number, :3]
            out, view = pixels[start : ends[place]].reshape(height, width, 3), plans[sample].views[which]
            if view.pasted:
                images = view.images or [self._store.get(member) for member in view.members]
                out[...] = canvas_of(zip(images, (tile[2:] for tile in view.tiles), strict=True), view.canvas)
                paste(out, view.pasted)
            elif view.images:
                out[...] = view.images[number]
            else:
                self._store.read(view.members[number], out)
        return pixels

    def _sample(
        self,
        image: Tensor,
        classes: Floats,
        boxes: Floats,
        index: int,
        resized: tuple[int, int],
        pad: tuple[int, int],
        planned: PlannedImages | None = None,
    ) -> Sample:
        height, width = (image if planned is None else planned).shape[-2:]
        targets = np.empty((len(boxes), 5), dtype=np.float32)
        targets[:, 0], targets[:, 1:] = classes, normalised_from_corners(boxes, width, height)
        original = self._packed.size(index)
        ratio = (resized[0] / original[0], resized[1] / original[1])
        return Sample(image, torch.from_numpy(targets), index, original, ratio, pad, planned)

    def _load(self, index: int, out: Image | None = None) -> Image:
        training = self.augment is not None
        path, original = self._packed.path(index), self._packed.size(index)
        return read_resized(path, original, self.image_size, training=training, out=out)

    def keep_images(self, cache: Literal["ram", "disk"] | None, folder: str | Path | None = None) -> None:
        """Keep resized images in memory or on disk (in `folder`), or no longer; before loader processes start."""
        sizes = [self._packed.size(index) for index in range(len(self))]
        if cache == "ram" and fits_memory(sizes, self.image_size):
            self._store = MemoryStore(self._load, sizes, self.image_size)
        elif cache == "disk":
            mode = "train" if self.augment is not None else "eval"
            place = None if folder is None else Path(folder)
            self._store = DiskStore(self._load, self._packed.path, place, self.image_size, mode)
        else:
            self._store = NoStore(self._load)
