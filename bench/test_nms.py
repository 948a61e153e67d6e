"""nms: eager, a plain vectorised greedy form in torch, OpenCV, torchvision and the compiled operator on the same boxes.

.venv/bin/python -m pytest bench/test_nms.py --benchmark-group-by=param:pairs --benchmark-columns=median,iqr,rounds

4 images × 8400 anchors × 80 classes at conf 0.001, IoU 0.7, 300 detections of 30000 candidates an image; `pairs` is the
number of candidates of the batch. Predictions imitate a detector: anchors on the grids of strides 8, 16 and 32, boxes
scattered around objects, the more the worse they score; few confident classes an anchor and a long tail of low scores.
Every provider is asked for the same survivors first. OpenCV has no limit of detections: `all` compares without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from yolov9_fast.ops import Detections, nms
from yolov9_fast.ops._boxes import anchor_points, xywh_to_xyxy

IMAGES, CLASSES, SIZE = 4, 80, 640
CONF, IOU, MAX_DET, LIMIT = 0.001, 0.7, 300, 30000
PAIRS = (100_000, 300_000, 1_000_000)


@cache
def prediction(pairs: int) -> Tensor:
    """[4, 84, 8400] with about `pairs` scores above CONF."""
    generator = torch.Generator().manual_seed(pairs)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    points, stride = anchor_points([(SIZE // s, SIZE // s) for s in (8, 16, 32)])
    points = (points * stride).expand(IMAGES, -1, 2)
    objects = 40
    size = 640 * torch.exp(-0.7 - 2.5 * rand(IMAGES, objects, 2))
    centre = rand(IMAGES, objects, 2) * SIZE
    distance = torch.cdist(points, centre) / size.mean(2)[:, None]
    near, which = distance.min(2)
    quality = torch.exp(-2 * near**2) * rand(IMAGES, len(stride))
    own = which[..., None].expand(-1, -1, 2)
    noise = torch.randn(IMAGES, len(stride), 4, generator=generator) * (0.02 + 0.25 * (1 - quality))[..., None]
    object_size = size.gather(1, own)
    boxes = torch.cat((centre.gather(1, own) + noise[..., :2] * object_size, object_size * noise[..., 2:].exp()), 2)
    label = torch.randint(CLASSES, (IMAGES, objects), generator=generator).gather(1, which)
    logits = torch.randn(IMAGES, len(stride), CLASSES, generator=generator) * 1.5 + 2 * quality[..., None]
    logits.scatter_add_(2, label[..., None], 6 * quality[..., None])
    # Shifted so that as many scores as asked for exceed CONF.
    wanted = logits.flatten().kthvalue(logits.numel() - pairs).values
    scores = (logits - wanted + np.log(CONF / (1 - CONF))).sigmoid()
    return torch.cat((boxes, scores), 2).transpose(1, 2).contiguous()


def reference(one: Tensor, max_det: int) -> Detections:
    with yf.backend("eager"):
        return nms(one, conf=CONF, iou=IOU, max_det=max_det, max_candidates=LIMIT)


def compiled(one: Tensor, max_det: int) -> Detections:
    with yf.backend("cpu"):
        return nms(one, conf=CONF, iou=IOU, max_det=max_det, max_candidates=LIMIT)


def candidates(one: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Corners [n, 4], scores [n] and classes [n] of one image, best first, at most LIMIT."""
    scores = one[4:].T
    anchor, label = torch.nonzero(scores > CONF, as_tuple=True)
    score, order = scores[anchor, label].sort(descending=True, stable=True)
    order = order[:LIMIT]
    return xywh_to_xyxy(one[:4].T)[anchor[order]], score[:LIMIT], label[order]


def torch_greedy(one: Tensor, max_det: int) -> list[Tensor]:
    """The usual form: classes moved apart by an offset, then one survivor a turn against all that are left."""
    kept = []
    for image in one:
        boxes, score, label = candidates(image)
        # In float64: offsets in float32 would round the boxes.
        x1, y1, x2, y2 = (boxes.double() + label[:, None].double() * 7680).T.contiguous()
        area = (x2 - x1) * (y2 - y1)
        left = torch.arange(len(boxes))
        chosen: list[Tensor] = []
        while len(left) and len(chosen) < max_det:
            best, left = left[0], left[1:]
            chosen.append(best)
            width = (torch.minimum(x2[best], x2[left]) - torch.maximum(x1[best], x1[left])).clamp_(min=0)
            height = (torch.minimum(y2[best], y2[left]) - torch.maximum(y1[best], y1[left])).clamp_(min=0)
            inter = width * height
            left = left[inter / (area[best] + area[left] - inter) <= IOU]
        index = torch.stack(chosen) if chosen else torch.empty(0, dtype=torch.int64)
        kept.append(torch.cat((boxes[index], score[index, None], label[index, None].float()), 1))
    return kept


def opencv_batched(one: Tensor, max_det: int) -> list[Tensor]:
    """`cv2.dnn.NMSBoxesBatched` image by image, boxes as (x, y, width, height) in double; cut to max_det afterwards."""
    import cv2

    kept = []
    for image in one:
        boxes, score, label = candidates(image)
        sides = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), 1).double().numpy()
        index = cv2.dnn.NMSBoxesBatched(sides, score.numpy(), label.int().numpy(), CONF, IOU)  # type: ignore[arg-type]
        chosen = torch.from_numpy(np.asarray(index, dtype=np.int64).reshape(-1))[:max_det]
        kept.append(torch.cat((boxes[chosen], score[chosen, None], label[chosen, None].float()), 1))
    return kept


def opencv_by_class(one: Tensor, max_det: int) -> list[Tensor]:
    """`cv2.dnn.NMSBoxes` class by class, which spares it all comparisons across classes; the best of all afterwards."""
    import cv2

    kept = []
    for image in one:
        boxes, score, label = candidates(image)
        sides = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), 1).double().numpy()
        scores = score.numpy()
        survivors = []
        for own in label.argsort(stable=True).split(label.bincount(minlength=CLASSES).tolist()):
            of_class = own.numpy()
            index = cv2.dnn.NMSBoxes(sides[of_class], scores[of_class], CONF, IOU)
            survivors.append(of_class[np.asarray(index, dtype=np.int64).reshape(-1)])
        chosen = torch.from_numpy(np.sort(np.concatenate(survivors)))[:max_det]
        kept.append(torch.cat((boxes[chosen], score[chosen, None], label[chosen, None].float()), 1))
    return kept


def torchvision(one: Tensor, max_det: int) -> list[Tensor]:
    from torchvision.ops import batched_nms  # type: ignore[import-not-found]

    kept = []
    for image in one:
        boxes, score, label = candidates(image)
        index = batched_nms(boxes, score, label, IOU)[:max_det]
        kept.append(torch.cat((boxes[index], score[index, None], label[index, None].float()), 1))
    return kept


PROVIDERS: dict[str, Callable[[Tensor, int], Any]] = {
    "eager": reference,
    "torch_greedy": torch_greedy,
    "opencv_batched": opencv_batched,
    "opencv_by_class": opencv_by_class,
    "torchvision": torchvision,
    "cpu": compiled,
}


def rows(result: Detections | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(result, Detections):
        return [boxes[:count] for boxes, count in zip(result.boxes, result.count.tolist(), strict=True)]
    return list(result)


def same_survivors(found: list[Tensor], expected: list[Tensor]) -> None:
    """A wrong result has no speed. Double arithmetic may settle an IoU within rounding of the limit the other way."""
    assert len(found) == len(expected) == IMAGES
    for own, other in zip(found, expected, strict=True):
        ours, others = set(map(tuple, own.tolist())), set(map(tuple, other.tolist()))
        assert len(others) > 0
        assert len(ours ^ others) <= 0.001 * len(others)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("max_det", [MAX_DET, LIMIT], ids=["best300", "all"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_nms(benchmark: Callable[..., Any], provider: str, max_det: int, pairs: int) -> None:
    if provider not in ("eager", "torch_greedy", "cpu"):
        pytest.importorskip("cv2" if provider.startswith("opencv") else provider)
    if max_det == LIMIT and provider in ("torch_greedy", "opencv_batched"):
        pytest.skip("many seconds a batch")
    one = prediction(pairs)
    call = PROVIDERS[provider]
    same_survivors(rows(call(one, max_det)), rows(reference(one, max_det)))
    rounds = 20 if provider == "cpu" else 3
    benchmark.pedantic(call, (one, max_det), rounds=rounds, warmup_rounds=1)  # type: ignore[attr-defined]
