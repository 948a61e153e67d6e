"""Cases of assignment, detection loss, decoding, NMS and overlaps: no object to thousands, sparse to hostile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from yolov9_fast import ops
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.nn import DetectionOutput
from yolov9_fast.ops import Assignment
from yolov9_fast.ops._backend import backend
from yolov9_fast.ops._boxes import STRIDES, anchor_points
from yolov9_fast.ops._decode import decode_for_assignment

from .cases import Case, OpenCase, Settings, Traffic
from .operators import Problem, open_problem, random_tensors
from .peers import assign_peers, nms_peers
from .shapes import head_maps

OBJECTS = (0, 7, 30, 60, 300, 5000)
QUICK_OBJECTS = (7, 300)
CLASSES = 80
CROWDS = ("sparse", "typical", "dense", "one cluster", "all equal")
"""About 30, 1000 and 20000 candidates an image; 3000 candidates on one object; 3000 with one score and one box."""


def detection_cases(settings: Settings, dtypes: tuple[str, ...]) -> Iterator[Case]:
    size = 640 if settings.full else 320
    objects = OBJECTS if settings.full else QUICK_OBJECTS
    for number in objects:
        batch = 1 if number >= 1000 else settings.batch
        yield _case("loss", "assign", f"{number}obj/{size}px/b{batch}", "forward", size, batch, number, _open_assign)
        for mode in ("forward", "both"):
            name = f"{number}obj/{size}px/b{batch}"
            yield _case("loss", "detection_loss", name, mode, size, batch, number, _open_detection_loss)
        yield _case("loss", "loss", f"{number}obj/{size}px/b{batch}", "both", size, batch, number, _open_loss)
    for dtype in dtypes:
        yield _case(
            "loss", "decode", f"{size}px/b{settings.batch}", "forward", size, settings.batch, 0, _open_decode, dtype
        )
        yield _case(
            "loss",
            "decode_for_assignment",
            f"{size}px/b{settings.batch}",
            "forward",
            size,
            settings.batch,
            QUICK_OBJECTS[0],
            _open_decode_for_assignment,
            dtype,
        )
    for number in (100, 300, 2000) if settings.full else (300,):
        yield _case("nms", "box_iou", f"{number}x{number}", "forward", size, 1, number, _open_box_iou)
    for crowd in CROWDS if settings.full else CROWDS[:3]:
        yield _case(
            "nms", "nms", f"{crowd}/{size}px/b{settings.batch}", "forward", size, settings.batch, crowd, _open_nms
        )


Opener = Callable[[dict[str, Any], str, str, torch.device, Settings], OpenCase]


def _case(
    family: str,
    subject: str,
    name: str,
    mode: str,
    size: int,
    batch: int,
    what: int | str,
    opener: Opener,
    dtype: str = "float32",
) -> Case:
    shape = {"image_size": size, "batch": batch, "objects" if isinstance(what, int) else "crowd": what}

    def open_case(device: torch.device, settings: Settings) -> OpenCase:
        return opener(shape, mode, dtype, device, settings)

    priority = 5 if what == 5000 else 0
    full = f"{subject}/{name}/{dtype}/{mode}"
    return Case(full, family, subject, f"head@{size}", mode, dtype, shape, open_case, priority=priority)


# Scenes ---------------------------------------------------------------------------------------------------------------


def random_boxes(count: int, image_size: int, seed: int = 0) -> Tensor:
    """[count, 4] x1, y1, x2, y2 in pixels; sides from 2 % to 60 % of the image, small ones more often."""
    generator = torch.Generator().manual_seed(seed)
    sides = image_size * (0.02 + 0.58 * torch.rand(count, 2, generator=generator) ** 3)
    centre = torch.rand(count, 2, generator=generator) * image_size
    low, high = (centre - sides / 2).clamp(0), (centre + sides / 2).clamp(max=image_size)
    return torch.cat((low, high), 1)


def scene(shape: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Labels [B, N], boxes [B, N, 4] and mask [B, N] of a batch with `objects` in each image."""
    batch, number = shape["batch"], shape["objects"]
    boxes = random_boxes(batch * number, shape["image_size"]).view(batch, number, 4)
    labels = torch.randint(CLASSES, (batch, number), generator=torch.Generator().manual_seed(1))
    return labels, boxes, torch.ones(batch, number, dtype=torch.bool)


def raw_maps(shape: dict[str, Any], seed: int = 2) -> list[Tensor]:
    """Head maps as a network gives them: logits around −4, distributions of the sides with a peak."""
    random = random_tensors(seed)
    maps = [random(shape["batch"], *size) for size in head_maps(shape["image_size"], CLASSES)]
    for one in maps:
        one[:, 64:].mul_(1.5).sub_(4.0)
        one[:, :64].mul_(2.0)
    return maps


def predictions(shape: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, A, nc], boxes [B, A, 4] in pixels near their anchors, and the anchor points [A, 2] in pixels."""
    size, batch = shape["image_size"], shape["batch"]
    points, stride = anchor_points([(size // s, size // s) for s in STRIDES])
    points = points * stride
    generator = torch.Generator().manual_seed(3)
    reach = stride * (0.5 + 6 * torch.rand(batch, len(points), 4, generator=generator))
    boxes = torch.cat((points - reach[..., :2], points + reach[..., 2:]), -1)
    scores = (torch.randn(batch, len(points), CLASSES, generator=generator) * 1.5 - 4).sigmoid()
    return scores, boxes, points


def crowd_prediction(shape: dict[str, Any]) -> Tensor:
    """[B, 4 + nc, A]: a decoded output whose candidates above 0.001 form the crowd that is asked for."""
    size, batch, crowd = shape["image_size"], shape["batch"], shape["crowd"]
    _, boxes, points = predictions(shape)
    generator = torch.Generator().manual_seed(4)
    scores = torch.zeros(batch, CLASSES, len(points))
    wanted = {"sparse": 30, "typical": 1000, "dense": 20000}.get(crowd, 3000)
    for image in range(batch):
        if crowd in ("one cluster", "all equal"):
            chosen = torch.randperm(len(points), generator=generator)[: min(wanted, len(points))]
            scores[image, 0, chosen] = 0.5 if crowd == "all equal" else torch.rand(len(chosen), generator=generator)
        else:
            chosen = torch.randperm(CLASSES * len(points), generator=generator)[:wanted]
            scores[image].view(-1)[chosen] = 0.001 + 0.999 * torch.rand(wanted, generator=generator) ** 4
    if crowd == "one cluster":
        middle = torch.tensor([0.3, 0.3, 0.7, 0.7]) * size
        boxes = middle + torch.randn(boxes.shape, generator=generator) * size * 0.02
    elif crowd == "all equal":
        boxes = torch.tensor([0.3, 0.3, 0.7, 0.7]).mul(size).expand_as(boxes)
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat((((low + high) / 2).mT, (high - low).mT, scores), 1).contiguous()


# Opening --------------------------------------------------------------------------------------------------------------


def _open_assign(shape: dict[str, Any], mode: str, dtype: str, device: torch.device, settings: Settings) -> OpenCase:
    scores, boxes, points = predictions(shape)
    tensors = [scores, boxes, points, *scene(shape)]
    problem = Problem(lambda *t: tuple(ops.assign(*t)), tensors, [False] * len(tensors))
    anchors = shape["batch"] * len(points)
    # Every box is looked at, one score of each anchor per ground truth at most; index and weight are written.
    moved = anchors * (16.0 + 8 + 4 + 4 * min(shape["objects"], CLASSES))
    traffic = Traffic(moved, 0.0, moved)
    opened = open_problem(
        "assign", problem, mode, dtype, device, settings, traffic, traffic, rule="exact", layouts=("nchw",)
    )
    if settings.peers:
        opened.peers = assign_peers([tensor.to(device) for tensor in tensors], _assignment(shape), CLASSES)
    return opened


def _assignment(shape: dict[str, Any]) -> Assignment:
    scores, boxes, points = predictions(shape)
    with backend("eager"):
        found: Assignment = ops.assign(scores, boxes, points, *scene(shape))
    return found


def _map_bytes(shape: dict[str, Any], itemsize: int, channels: int) -> float:
    anchors = sum(height * width for _, height, width in head_maps(shape["image_size"], CLASSES))
    return float(shape["batch"] * anchors * channels * itemsize)


def _open_detection_loss(
    shape: dict[str, Any], mode: str, dtype: str, device: torch.device, settings: Settings
) -> OpenCase:
    labels, boxes, _ = scene(shape)
    assignment = _assignment(shape)
    normaliser = assignment.weight.sum().clamp(min=1)
    maps = raw_maps(shape)

    def call(a: Tensor, b: Tensor, c: Tensor, index: Tensor, weight: Tensor, *rest: Tensor) -> Any:
        return ops.detection_loss([a, b, c], Assignment(index, weight), *rest)

    tensors = [*maps, assignment.gt_index, assignment.weight, labels, boxes, normaliser]
    problem = Problem(call, tensors, [True] * 3 + [False] * 5)
    # Class logits of every anchor are read; the box part only where an anchor is assigned. All gradients are written.
    logits, whole = _map_bytes(shape, 4, CLASSES), _map_bytes(shape, 4, 64 + CLASSES)
    return open_problem(
        "detection_loss",
        problem,
        mode,
        dtype,
        device,
        settings,
        Traffic(logits, 12 * logits / 4, logits),
        Traffic(logits + whole, 12 * logits / 4, logits + whole),
    )


def _open_decode(shape: dict[str, Any], mode: str, dtype: str, device: torch.device, settings: Settings) -> OpenCase:
    problem = Problem(lambda *maps: ops.decode(list(maps)), raw_maps(shape), [False] * 3)
    read, written = _map_bytes(shape, 2 if dtype != "float32" else 4, 64 + CLASSES), _map_bytes(shape, 4, 4 + CLASSES)
    traffic = Traffic(read + written, 10 * read / 4, read + written)
    return open_problem("decode", problem, mode, dtype, device, settings, traffic, traffic)


def _open_decode_for_assignment(
    shape: dict[str, Any], mode: str, dtype: str, device: torch.device, settings: Settings
) -> OpenCase:
    labels = scene(shape)[0]

    def call(*tensors: Tensor) -> Any:
        found = decode_for_assignment(tensors[:3], tensors[3])
        # The eager form decodes all classes: compared are the scores that `assign` reads.
        columns = found.columns[:, None].expand(-1, found.scores.shape[1], -1)
        return found.boxes, found.scores.gather(2, columns)

    problem = Problem(call, [*raw_maps(shape), labels], [False] * 4)
    # The box part of every anchor and one score for each ground truth are read; boxes and these scores are written.
    anchors = _map_bytes(shape, 1, 1)
    read = anchors * (2 if dtype != "float32" else 4) * (64 + shape["objects"])
    traffic = Traffic(read + 4 * anchors * (4 + shape["objects"]), 10 * read / 4, read)
    return open_problem("decode_for_assignment", problem, mode, dtype, device, settings, traffic, traffic)


def _open_box_iou(shape: dict[str, Any], mode: str, dtype: str, device: torch.device, settings: Settings) -> OpenCase:
    boxes = [random_boxes(shape["objects"], shape["image_size"], seed) for seed in (0, 1)]
    written = 4.0 * shape["objects"] ** 2
    traffic = Traffic(written, 14 * written / 4, written)
    problem = Problem(ops.box_iou, boxes, [False, False])
    return open_problem("box_iou", problem, mode, dtype, device, settings, traffic, traffic, layouts=("nchw",))


def _open_nms(shape: dict[str, Any], mode: str, dtype: str, device: torch.device, settings: Settings) -> OpenCase:
    prediction = crowd_prediction(shape)
    traffic = Traffic(4.0 * prediction.numel(), 0.0, 4.0 * prediction.numel())
    problem = Problem(lambda p: tuple(ops.nms(p)), [prediction], [False])
    opened = open_problem(
        "nms", problem, mode, dtype, device, settings, traffic, traffic, rule="exact", layouts=("nchw",)
    )
    with backend("eager"):
        kept = ops.nms(prediction)
    opened.notes["kept"] = [int(number) for number in kept.count]
    if settings.peers:
        opened.peers = nms_peers(prediction.to(device), kept)
    return opened


def _open_loss(shape: dict[str, Any], mode: str, dtype: str, device: torch.device, settings: Settings) -> OpenCase:
    """The whole loss of a training graph: two branches, assignment included, gradients of all six maps."""
    labels, boxes, _ = scene(shape)
    batch, number, size = shape["batch"], shape["objects"], shape["image_size"]
    criterion = DetectionLoss(CLASSES)
    centre, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    image = torch.arange(batch).repeat_interleave(number)[:, None]
    rows = torch.cat((image, labels.view(-1, 1), torch.cat((centre, sides), 2).view(-1, 4) / size), 1)
    maps = raw_maps(shape) + raw_maps(shape, seed=5)

    def call(*t: Tensor) -> Any:
        return criterion(DetectionOutput(list(t[:3]), list(t[3:6])), t[6], size).total

    problem = Problem(call, [*maps, rows], [True] * 6 + [False])
    one = 2 * (_map_bytes(shape, 4, CLASSES) * 2 + _map_bytes(shape, 4, 64 + CLASSES))
    traffic = Traffic(one, 0.0, one)
    # All operators of the loss together; chosen as a user's training chooses them.
    return open_problem(
        "", problem, mode, dtype, device, settings, Traffic(0), traffic, layouts=("nchw",), rule="network"
    )
