"""COCO average precision and recall of a set of detections, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from yolov9_fast._collection import collection_paused
from yolov9_fast._lazy import require
from yolov9_fast._numbers import finite_number, flag, integer
from yolov9_fast._text import printable
from yolov9_fast._untrusted import shown
from yolov9_fast.atomic import atomic_write
from yolov9_fast.errors import DataError
from yolov9_fast.metrics.curves import PrCurves, curves_from_evaluation

log = logging.getLogger(__name__)

_LONGEST_NAME = 60  # of a class in the table
_MANY_OBJECTS = 50  # of a class in an image


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of one class; NaN where the class has no objects.

    `precision`, `recall` and `f1` are at IoU 0.5 and at the confidence with the highest mean F1 over classes.
    """

    class_index: int
    name: str
    images: int
    objects: int
    ap: float
    ap50: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class CocoMetrics:
    """The twelve COCO metrics, 0..1 or NaN where no such object exists; metrics per class; curves; number of images."""

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    per_class: list[ClassMetrics]
    curves: PrCurves
    images: int

    @property
    def confidence(self) -> float:
        """Confidence of `precision`, `recall` and `f1`; NaN when no detection is correct."""
        return self.curves.best_confidence

    @property
    def precision(self) -> float:
        """Mean precision over the classes with objects, at `confidence`; NaN without such classes."""
        return _mean(c.precision for c in self.per_class)

    @property
    def recall(self) -> float:
        """Mean recall over the classes with objects, at `confidence`; NaN without such classes."""
        return _mean(c.recall for c in self.per_class)

    @property
    def f1(self) -> float:
        """Mean F1 over the classes with objects, at `confidence`; NaN without such classes."""
        return _mean(c.f1 for c in self.per_class)

    def as_dict(self) -> dict[str, float]:
        """The twelve metrics, then precision, recall and f1 (means over classes) and their confidence."""
        figures = {field.name: float(getattr(self, field.name)) for field in fields(self)[:12]}
        return figures | {
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
            "confidence": self.confidence,
        }

    def table(self) -> str:
        """Aligned text: a row for all classes, a row per class with objects, then the twelve metrics."""
        shown = [c for c in self.per_class if c.objects]
        objects = sum(c.objects for c in shown)
        total = ClassMetrics(-1, "all", self.images, objects, self.ap, self.ap50, self.precision, self.recall, self.f1)
        names = [printable(c.name, _LONGEST_NAME) for c in [total, *shown]]
        width = max(len("class"), *map(len, names))
        heading = (
            f"{'class':<{width}}  {'images':>7}  {'objects':>7}  {'P':>6}  {'R':>6}  {'F1':>6}  {'AP50':>6}  {'AP':>6}"
        )
        rows = [heading, "-" * len(heading)]
        for c, name in zip([total, *shown], names, strict=True):
            figures = "  ".join(_cell(value) for value in (c.precision, c.recall, c.f1, c.ap50, c.ap))
            rows.append(f"{name:<{width}}  {c.images:>7}  {c.objects:>7}  {figures}")
        rows.append("")
        rows.append(f"AP   {_cell(self.ap)}   AP50  {_cell(self.ap50)}   AP75  {_cell(self.ap75)}")
        rows.append(f"APs  {_cell(self.ap_small)}   APm   {_cell(self.ap_medium)}   APl   {_cell(self.ap_large)}")
        rows.append(f"AR1  {_cell(self.ar1)}   AR10  {_cell(self.ar10)}   AR100 {_cell(self.ar100)}")
        rows.append(f"ARs  {_cell(self.ar_small)}   ARm   {_cell(self.ar_medium)}   ARl   {_cell(self.ar_large)}")
        if not math.isnan(self.confidence):
            rows.append(f"P, R and F1 at IoU 0.5 and confidence {self.confidence:.3f} (highest mean F1)")
        absent = len(self.per_class) - len(shown)
        if absent:
            rows.append(f"{absent} of {len(self.per_class)} classes have no objects and are omitted")
        return "\n".join(rows)


@collection_paused()
def evaluate_coco(
    ground_truth: dict[str, Any],
    detections: Sequence[dict[str, Any]],
    *,
    names: dict[int, str] | None = None,
    category_ids: Sequence[int | str] | None = None,
    image_ids: Iterable[int | str] | None = None,
) -> CocoMetrics:
    """Evaluate boxes by pycocotools with its settings: IoU 0.50:0.95, at most 100 detections per image and class.

    `ground_truth`: a COCO dataset with `images`, `annotations`, `categories`; not changed. `info` and `licenses`
    may be absent, an annotation's `area` defaults to that of its box, `iscrowd` and `ignore` to 0. An annotation with
    either is a crowd: no object to be found, and a detection inside it counts neither as correct nor as wrong.
    (pycocotools by itself overwrites `ignore` by `iscrowd`.)
    `detections`: COCO results (`image_id`, `category_id`, `bbox` [x, y, w, h] in pixels, `score`); may be empty.
    `category_ids`: the category of each class 0, 1, …, the order of `per_class` and of the curves; annotations of other
    categories are left out; default all, in the order of `names` where those are the categories' names, else sorted.
    `names`: class index → name; default the categories' own names.
    `image_ids`: evaluate only these images (default all). Ids and numbers in a string equal the number; true and false
    are no numbers.

    Raises `DataError` for a dataset without those lists, an unknown image or category in a detection, or values that
    are not finite numbers.
    """
    dataset = _normalise_ground_truth(ground_truth, category_ids, names or {})
    chosen = _choose_images(dataset, image_ids)
    results = _normalise_detections(detections, dataset)
    evaluation = _run_pycocotools(dataset, results, chosen)
    classes = [(names or {}).get(k, name) for k, name in enumerate(dataset.category_names)]
    curves = curves_from_evaluation(evaluation, classes)
    twelve = [float("nan") if value < 0 else float(value) for value in evaluation.stats]
    return CocoMetrics(
        ap=twelve[0],
        ap50=twelve[1],
        ap75=twelve[2],
        ap_small=twelve[3],
        ap_medium=twelve[4],
        ap_large=twelve[5],
        ar1=twelve[6],
        ar10=twelve[7],
        ar100=twelve[8],
        ar_small=twelve[9],
        ar_medium=twelve[10],
        ar_large=twelve[11],
        per_class=_per_class(evaluation, dataset, classes, curves, chosen),
        curves=curves,
        images=len(chosen),
    )


def detections_to_coco(boxes: np.ndarray, image_id: int | str, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """COCO results of one image from `boxes` [n, 6]: x1, y1, x2, y2 in pixels of the image, score, class index.

    `category_ids[class index]` is the category. As published, boxes are rounded to 3 decimals and scores to 5. Raises
    `ValueError` for another shape or a class index outside `category_ids`.
    """
    rows = np.asarray(boxes, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != 6:
        raise ValueError(f"boxes: expected shape [n, 6], got {list(rows.shape)}")
    classes = rows[:, 5].astype(np.int64)
    if len(rows) and (classes.min() < 0 or classes.max() >= len(category_ids)):
        raise ValueError(
            f"boxes: expected class indices in 0..{len(category_ids) - 1}, got {classes.min()}..{classes.max()}"
        )
    sides = rows[:, 2:4] - rows[:, :2]
    return [
        {
            "image_id": image_id,
            "category_id": int(category_ids[index]),
            "bbox": [round(float(value), 3) for value in (*row[:2], *side)],
            "score": round(float(row[4]), 5),
        }
        for row, side, index in zip(rows, sides, classes, strict=True)
    ]


def save_detections(path: str | Path, detections: Sequence[dict[str, Any]]) -> None:
    """Write COCO results as JSON, atomically; raises `UserError` when the file cannot be written."""
    atomic_write(path, json.dumps(list(detections)))


@dataclass(frozen=True)
class _Dataset:
    """A ground truth with new ids: image and category ids by rank, annotation ids from 1.

    pycocotools treats id 0 as unmatched and overwrites annotations with the same id. Ranks keep its order of images, on
    which the order of equal scores depends.
    """

    images: dict[int | str, int]
    categories: dict[int | str, int]
    category_names: list[str]
    annotations: list[dict[str, Any]]


def _normalise_ground_truth(
    ground_truth: dict[str, Any], category_ids: Sequence[int | str] | None, class_names: dict[int, str]
) -> _Dataset:
    for key in ("images", "annotations", "categories"):
        if not isinstance(ground_truth, dict) or not isinstance(ground_truth.get(key), list):
            raise DataError(f"COCO ground truth: expected a JSON object with a list '{key}'")
    images = _rank(_id(image, "id", "image") for image in ground_truth["images"])
    names = {_id(c, "id", "category"): str(c.get("name", c["id"])) for c in ground_truth["categories"]}
    by_name = {name: category for category, name in names.items()}
    ordered = [class_names[index] for index in sorted(class_names)]
    if category_ids is None and len(by_name) == len(names) and sorted(ordered) == sorted(by_name):
        category_ids = [by_name[name] for name in ordered]
    categories = _rank(names) if category_ids is None else _given_order(category_ids, names)
    if not images or not categories:
        raise DataError(f"COCO ground truth: expected images and categories, got {len(images)} and {len(categories)}")
    annotations: list[dict[str, Any]] = []
    for annotation in ground_truth["annotations"]:
        image = images.get(_id(annotation, "image_id", "annotation"))
        category = categories.get(_id(annotation, "category_id", "annotation"))
        if image is None or category is None:
            continue
        place = (annotation.get("id", "?"), annotation["image_id"])
        box = _box(annotation, "annotation {} of image {}", *place)
        area = annotation.get("area")
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3] if area is None else _number(area, "area of annotation {} of image {}", *place),
                "iscrowd": int(_flag(annotation, "iscrowd", *place) | _flag(annotation, "ignore", *place)),
            }
        )
    ignored = len(ground_truth["annotations"]) - len(annotations)
    if ignored:
        log.warning("COCO ground truth: %d annotations of unlisted images or categories are ignored", ignored)
    return _Dataset(images, categories, [names[category] for category in categories], annotations)


def _given_order(category_ids: Sequence[int | str], names: dict[int | str, str]) -> dict[int | str, int]:
    ids = [_normalise_id(category) for category in category_ids]
    unknown = [category for category in ids if category not in names]
    if unknown or len(set(ids)) < len(ids):
        raise DataError(f"category_ids: expected ids of the ground truth's categories, each once, got {ids[:100]}")
    return {category: rank for rank, category in enumerate(ids, start=1)}


def _normalise_detections(detections: Sequence[dict[str, Any]], dataset: _Dataset) -> list[dict[str, Any]]:
    results = []
    for row, detection in enumerate(detections):
        image = _rank_of(dataset.images, detection, "image_id", f"detection {row}")
        category = _rank_of(dataset.categories, detection, "category_id", f"detection {row}")
        box = _box(detection, f"detection {row}")
        results.append(
            {
                "id": row + 1,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "score": _number(detection.get("score"), f"score of detection {row}"),
            }
        )
    return results


def _choose_images(dataset: _Dataset, image_ids: Iterable[int | str] | None) -> list[int]:
    if image_ids is None:
        return list(dataset.images.values())
    chosen = {_normalise_id(image) for image in image_ids}
    unknown = sorted((image for image in chosen if image not in dataset.images), key=str)
    if unknown:
        raise DataError(
            f"image_ids: expected ids of the ground truth, got {len(unknown)} others, first {shown(unknown[0])}"
        )
    if not chosen:
        raise DataError("image_ids: expected at least one image to evaluate, got none")
    return sorted(dataset.images[image] for image in chosen)


def _run_pycocotools(dataset: _Dataset, results: list[dict[str, Any]], images: list[int]) -> Any:
    coco = require("pycocotools.coco")
    cocoeval = require("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _faster(cocoeval.COCOeval)(
            _coco_object(coco, dataset, dataset.annotations), _coco_object(coco, dataset, results), "bbox"
        )
        evaluation.params.imgIds = images
        evaluation.params.catIds = list(dataset.categories.values())
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _faster(base: Any) -> Any:
    """`COCOeval` with the same results in images of many objects, of which most are near no detection.

    Its time is the product of objects and detections. Objects without an IoU of the lowest threshold never match: they
    are left out of its search, and counted afterwards.
    """

    class Evaluation(base):  # type: ignore[misc]
        def evaluateImg(self, image: int, category: int, area: list[float], detections: int) -> Any:
            key = image, category
            objects, overlaps = self._gts[key], self.ious[key]
            if len(objects) < _MANY_OBJECTS or not len(overlaps):
                return super().evaluateImg(image, category, area, detections)
            near = overlaps.max(axis=0) >= self.params.iouThrs.min() - 1e-6
            self._gts[key], self.ious[key] = list(itertools.compress(objects, near)), overlaps[:, near]
            try:
                result = super().evaluateImg(image, category, area, detections)
            finally:
                self._gts[key], self.ious[key] = objects, overlaps
            outside = [o["ignore"] or not area[0] <= o["area"] <= area[1] for o in itertools.compress(objects, ~near)]
            result["gtIgnore"] = np.concatenate((result["gtIgnore"], np.array(outside, dtype=np.int64)))
            return result

    return Evaluation


def _coco_object(coco: Any, dataset: _Dataset, annotations: list[dict[str, Any]]) -> Any:
    """A `COCO` object without files; its `loadRes` requires `info` and fails for an empty list."""
    made = coco.COCO()
    made.dataset = {
        "images": [{"id": image} for image in dataset.images.values()],
        "categories": [{"id": category} for category in dataset.categories.values()],
        "annotations": annotations,
    }
    made.createIndex()
    return made


def _per_class(
    evaluation: Any, dataset: _Dataset, names: list[str], curves: PrCurves, images: list[int]
) -> list[ClassMetrics]:
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [T, R, K] of all areas
    evaluated = set(images)
    objects = [0] * len(names)
    seen: list[set[int]] = [set() for _ in names]
    for annotation in dataset.annotations:
        if not annotation["iscrowd"] and annotation["image_id"] in evaluated:
            objects[annotation["category_id"] - 1] += 1
            seen[annotation["category_id"] - 1].add(annotation["image_id"])
    row_of = {k: row for row, k in enumerate(curves.class_indices)}
    best = curves.best_index
    anything_correct = not math.isnan(curves.best_confidence)
    found = []
    for k, name in enumerate(names):
        row = row_of.get(k)
        if row is None:
            found.append(ClassMetrics(k, name, 0, 0, *[float("nan")] * 5))
            continue
        ap = float(precision[:, :, k].mean())
        at_best = [float(c[row, best]) for c in (curves.precision, curves.recall, curves.f1)]
        figures = at_best if anything_correct else [0.0, 0.0, 0.0]
        found.append(ClassMetrics(k, name, len(seen[k]), objects[k], ap, float(curves.ap50[row]), *figures))
    return found


def _rank(ids: Iterable[int | str]) -> dict[int | str, int]:
    """Id → rank from 1, integers before strings."""
    ordered = sorted(set(ids), key=lambda value: (isinstance(value, str), value))
    return {value: rank for rank, value in enumerate(ordered, start=1)}


def _rank_of(ranks: dict[int | str, int], entry: dict[str, Any], key: str, what: str) -> int:
    value = _id(entry, key, what)
    if value not in ranks:
        raise DataError(f"{what}: {key}: expected one of the ground truth, got {shown(value)}")
    return ranks[value]


def _normalise_id(value: Any) -> int | str:
    number = integer(value)
    if number is not None:
        return number
    if isinstance(value, str):
        return value
    raise DataError(f"id: expected an integer or a string, got {shown(value)}")


def _id(entry: Any, key: str, what: str) -> int | str:
    if not isinstance(entry, dict) or key not in entry:
        raise DataError(f"{what}: expected '{key}', got {shown(entry)}")
    return _normalise_id(entry[key])


def _box(entry: dict[str, Any], what: str, *place: object) -> list[float]:
    box = entry.get("bbox")
    if not isinstance(box, (list, tuple, np.ndarray)) or len(box) != 4:
        raise DataError(f"{what.format(*place)}: expected bbox [x, y, w, h], got {shown(box)}")
    return [_number(value, f"bbox of {what}", *place) for value in box]


def _number(value: Any, what: str, *place: object) -> float:
    number = finite_number(value)
    if number is None:
        raise DataError(f"{what.format(*place)}: expected a finite number, got {shown(value)}")
    return number


def _flag(annotation: dict[str, Any], key: str, *place: object) -> bool:
    value = flag(annotation.get(key))
    if value is None:
        what = "annotation {} of image {}".format(*place)
        raise DataError(f"{what}: {key}: expected 0 or 1, got {shown(annotation[key])}")
    return value


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else float("nan")


def _cell(value: float) -> str:
    return f"{'-':>6}" if math.isnan(value) else f"{value:6.4f}"
