"""assign is bitwise identical by the reference, the compiled kernel, emulated CUDA blocks, and a GPU."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import yolov9_fast as yf
from tests.ops import CASES, emulated
from yolov9_fast.ops import Assignment, assign
from yolov9_fast.ops import _library as library
from yolov9_fast.ops._boxes import anchor_points

MODULE = importlib.import_module("yolov9_fast.ops._assign")
MISSING = library.why_not_compiled("assign", "cpu")
needs_cpu = pytest.mark.skipif(MISSING is not None, reason=f"no compiled assign: {MISSING}")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Case = tuple[tuple[Tensor, ...], dict[str, Any]]
ODD = torch.tensor([math.nan, math.inf, -math.inf, 1e20, -1e20, 0.0, 1e38])


def by(name: str, case: Case, threads: int = 32, seed: int = 0) -> Assignment:
    """The assignment by "eager", "cpu", "cuda", or "emulated" with `threads` per block, in an order given by `seed`."""
    tensors, options = case
    if name != "emulated":
        with yf.backend(name):
            return assign(*tensors, **options)
    with pytest.MonkeyPatch.context() as patch:
        raw = emulated.operators().assign
        patch.setattr(MODULE, "OPERATOR", lambda *args: raw(*args, threads, seed))
        return assign(*tensors, **options)


def assert_same(one: Assignment, other: Assignment, what: object = "") -> None:
    assert torch.equal(one.gt_index, other.gt_index), what
    assert torch.equal(one.weight, other.weight), what
    assert bool(one.weight.isfinite().all()), what


def varied_case(seed: int) -> Case:
    """Small and varied: levels, a line, scattered points, one anchor; ties, duplicates, padding, NaN, infinities."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(0, len(options), (), generator=generator))]

    def with_odd_values(values: Tensor, share: float) -> Tensor:
        return torch.where(rand(*values.shape) < share, ODD[(rand(*values.shape) * 7).long()], values)

    batch, classes, objects = pick(1, 1, 2, 3), pick(1, 2, 5), pick(0, 1, 2, 3, 5, 8, 17, 40)
    layout = pick("levels", "levels", "levels", "one", "scattered", "line")
    if layout == "levels":
        cells = [(pick(1, 3, 7), pick(2, 5, 8)), (pick(1, 2, 4), pick(1, 3)), (1, 1)]
        centres, stride = anchor_points(cells)
        points, strides = centres * stride, stride[:, 0]
    else:
        count = {"one": 1, "scattered": pick(5, 33, 70), "line": pick(16, 64)}[layout]
        points, strides = rand(count, 2) * 50, torch.full((count,), float(pick(1, 4, 8)))
        if layout == "line":
            points[:, 0], points[:, 1] = torch.arange(count), 20.0
    anchors = len(points)

    scores = rand(batch, anchors, classes)
    if pick(False, True):
        scores = (scores * pick(1, 3)).round() / 3
    half = rand(batch, anchors, 2) * pick(0.5, 8.0, 30.0) + pick(0, 2)
    centre = points + (rand(batch, anchors, 2) - 0.5) * pick(0.0, 4.0, 8.0, 60.0)
    boxes = torch.cat((centre - half, centre + half), 2)
    at = (rand(batch, objects) * anchors).long()
    target = points[at] + (rand(batch, objects, 2) - 0.5) * pick(0.0, 6.0)
    size = rand(batch, objects, 2) * pick(0.2, 4.0, 15.0, 15.0, 40.0) + pick(0, 1)
    gt_boxes = torch.cat((target - size, target + size), 2)
    if pick(False, True):
        boxes, gt_boxes = boxes.round(), gt_boxes.round()
    if objects > 1 and pick(False, False, True):
        gt_boxes[:, objects // 2 :] = gt_boxes[:, : objects - objects // 2].clone()
    if pick(False, False, True):
        common = min(anchors, objects)
        boxes[:, :common] = gt_boxes[:, :common]
    mask = rand(batch, objects) >= pick(0.0, 0.0, 0.3, 0.9)
    if pick(False, True):
        gt_boxes = gt_boxes * mask[..., None]
    if batch > 1 and pick(False, True):
        mask[0] = False
    labels = (rand(batch, objects) * classes).long() - pick(0, 0, 0, 0, 1)

    scores = with_odd_values(scores, pick(0.0, 0.0, 0.1)).to(
        pick(torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    )
    boxes, gt_boxes = with_odd_values(boxes, pick(0.0, 0.0, 0.05)), with_odd_values(gt_boxes, pick(0.0, 0.0, 0.05))
    points = with_odd_values(points, pick(0.0, 0.0, 0.0, 0.0, 0.05))
    if pick(False, False, False, False, True):
        gt_boxes = gt_boxes[..., [2, 3, 0, 1]]
    if pick(False, True):
        scores = scores.transpose(1, 2).contiguous().transpose(1, 2)
        boxes = boxes.transpose(1, 2).contiguous().transpose(1, 2)
    alpha, beta = pick((0.5, 6.0), (0.5, 6.0), (0.5, 6.0), (1.0, 4.0), (0.0, 0.5), (0.3, 1.7))
    options = {"topk": pick(1, 2, 5, 10, 10, 13, 40, 100), "alpha": alpha, "beta": beta, "rule": pick(*MODULE.RULES)}
    if options["rule"] == "ultralytics":
        options["min_side"] = pick(0.0, 4.0, 16.0)
    return (scores, boxes, points, labels, gt_boxes, mask), {**options, "strides": strides}


def dense_case(objects: int, batch: int = 1, size: int = 640, classes: int = 80, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    centres, stride = anchor_points([(size // each, size // each) for each in (8, 16, 32)])
    points = centres * stride
    reach = stride * 6 * rand(batch, len(points), 4)
    boxes = torch.cat((points - reach[..., :2], points + reach[..., 2:]), 2)
    centre, half = rand(batch, objects, 2) * size, 4 + rand(batch, objects, 2).pow(3) * size / 3
    gt_boxes = torch.cat((centre - half, centre + half), 2).clamp(0, size)
    labels = torch.randint(0, classes, (batch, objects), generator=generator)
    scores = rand(batch, len(points), classes)
    return (scores, boxes, points, labels, gt_boxes, torch.ones(batch, objects)), {"strides": stride}


@pytest.mark.slow
@needs_cpu
def test_random_cases_are_bitwise_identical() -> None:
    assigned = several = 0
    for seed in range(CASES):
        case = varied_case(seed)
        eager = by("eager", case)
        assert_same(eager, by("cpu", case), f"seed {seed}, compiled")
        threads = (1, 7, 32, 64, 128, 256)[seed % 6]
        assert_same(eager, by("emulated", case, threads, seed % 5), f"seed {seed}, {threads} threads")
        assigned += int((eager.gt_index >= 0).sum() > 0)
        several += int(eager.gt_index.unique().numel() > 2)
    # Enough cases assign anchors, and enough of them to several ground truths.
    assert assigned > 0.4 * CASES
    assert several > 0.2 * CASES


@needs_cpu
@given(st.integers(0, 10**9), st.integers(1, 256), st.integers(0, 2**31 - 1))
def test_emulated_blocks_agree_for_any_threads_in_any_order(seed: int, threads: int, order: int) -> None:
    case = varied_case(seed)
    assert_same(by("cpu", case), by("emulated", case, threads, order))


@needs_cpu
@pytest.mark.parametrize("rule", ["yolov9", "ultralytics", "mit"])
def test_full_size_agrees(rule: str) -> None:
    tensors, options = dense_case(60, batch=2)
    case = tensors, {**options, "rule": rule}
    eager = by("eager", case)
    assert_same(eager, by("cpu", case))
    assert_same(eager, by("emulated", case, 128, 3))


@needs_cpu
@pytest.mark.parametrize("rule", ["yolov9", "ultralytics", "mit"])
def test_five_thousand_objects_agree(rule: str) -> None:
    tensors, options = dense_case(5000, size=256, classes=3)
    case = tensors, {**options, "rule": rule}
    compiled = by("cpu", case)
    assert bool((compiled.gt_index >= 0).float().mean() > 0.5)
    assert_same(by("eager", case), compiled)
    assert_same(compiled, by("emulated", case, 128, 3))


@needs_cpu
def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    case, threads = dense_case(200, batch=2, classes=4), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(by("cpu", case))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@needs_cpu
def test_scores_and_boxes_are_read_in_place() -> None:
    tensors, options = dense_case(30, batch=8)
    planes = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in tensors[:2]]
    for scores, boxes in (tensors[:2], planes):  # 21.5 MB and 1.1 MB; gt_index and weight are 0.8 MB
        assert allocated_during(lambda: by("cpu", ((scores, boxes, *tensors[2:]), options))) < 1e6  # noqa: B023


def allocated_during(call: Callable[[], object]) -> int:
    """Bytes that torch allocates for tensors in `call`, in total."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")


def test_the_result_does_not_depend_on_the_pairs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dense_case(6, batch=2, size=64)
    expected = by("eager", case)
    monkeypatch.setattr(MODULE, "_pairs_at_once", lambda _: 1)
    assert_same(expected, by("eager", case))


def test_the_aspect_is_the_arc_tangent_to_two_units() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(20000, 4, generator=generator) * torch.tensor([1e2, 1e2, 1e4, 1e-2])
    boxes = torch.cat((corners, corners[:, [2, 3, 0, 1]], corners[:, [0, 1, 0, 3]]))
    x1, y1, x2, y2 = boxes.unbind(1)
    exact = torch.atan((x2 - x1).double() / (y2 - y1 + 1e-7).double())
    error = (MODULE.aspect(boxes).double() - exact).abs()
    assert bool((error <= 2.5 * 2**-24 * exact.abs()).all())


def float64_case(seed: int, objects: int) -> Case:
    tensors, _ = dense_case(objects, batch=2, size=64, classes=3, seed=seed)
    scores, *rest = (each.double() if each.is_floating_point() else each for each in tensors)
    return ((scores * 4).round() / 4, *rest), {}


def by_loops(score, boxes, point, label, gt_boxes, mask, topk: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition, one pair at a time, in float64."""
    batch, anchors = boxes.shape[:2]
    gt_index, weight = np.full((batch, anchors), -1), np.zeros((batch, anchors))
    for b in range(batch):
        overlap = np.array([[max(_ciou(t, p), 0.0) for p in boxes[b].tolist()] for t in gt_boxes[b].tolist()])
        metric = np.array([score[b, :, c].double().numpy() ** 0.5 for c in label[b]]) * overlap**6
        claims: dict[int, list[int]] = {}
        for g, (x1, y1, x2, y2) in enumerate(gt_boxes[b].tolist()):
            inside = [min(x - x1, y - y1, x2 - x, y2 - y) > 1e-9 for x, y in point.tolist()]
            order = sorted(range(anchors), key=lambda a: (-metric[g, a] * inside[a], a))
            for a in order[:topk]:
                if inside[a] and mask[b, g]:
                    claims.setdefault(a, []).append(g)
        for a, claimants in claims.items():
            gt_index[b, a] = claimants[0] if len(claimants) == 1 else int(np.argmax(overlap[:, a]))
        for g in range(gt_boxes.shape[1]):
            own = gt_index[b] == g
            if own.any():
                weight[b, own] = metric[g, own] * overlap[g, own].max() / (metric[g, own].max() + 1e-9)
    return gt_index, weight


def _ciou(a: list[float], b: list[float]) -> float:
    eps = 1e-7
    aw, ah, bw, bh = a[2] - a[0], a[3] - a[1] + eps, b[2] - b[0], b[3] - b[1] + eps
    inter = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    iou = inter / (aw * ah + bw * bh - inter + eps)
    c2 = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2 + eps
    rho2 = ((b[0] + b[2] - a[0] - a[2]) ** 2 + (b[1] + b[3] - a[1] - a[3]) ** 2) / 4
    v = 4 / math.pi**2 * (math.atan(bw / bh) - math.atan(aw / ah)) ** 2
    return iou - rho2 / c2 - v * v / (v - iou + 1 + eps)


@given(seed=st.integers(0, 10**6), objects=st.integers(1, 6), topk=st.integers(1, 12))
def test_equals_a_loop_over_the_definition(seed: int, objects: int, topk: int) -> None:
    case, _ = float64_case(seed, objects)
    result = by("eager", (case, {"topk": topk}))
    gt_index, weight = by_loops(*case, topk=topk)
    assert np.array_equal(result.gt_index.numpy(), gt_index)
    np.testing.assert_allclose(result.weight.numpy(), weight, rtol=1e-9, atol=1e-12)


OPCHECK = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.mark.parametrize("objects", [0, 3])
@pytest.mark.parametrize("rule", [0, 2])
def test_opcheck(objects: int, rule: int) -> None:
    (scores, boxes, points, labels, gt_boxes, mask), options = dense_case(objects, batch=2, size=64, classes=3)
    strides = options["strides"].reshape(-1) if rule == 2 else None
    args = (scores, boxes, points, labels, gt_boxes, mask > 0, strides, 10, 0.5, 6.0, rule)
    torch.library.opcheck(torch.ops.yolov9_fast.assign.default, args, test_utils=OPCHECK)


@needs_cpu
def test_compiles_in_one_graph() -> None:
    tensors, options = dense_case(3, batch=2, size=64, classes=3)
    expected = assign(*tensors, rule="mit", **options)
    compiled = torch.compile(lambda *each: tuple(assign(*each, rule="mit", **options)), fullgraph=True, backend="eager")
    assert_same(expected, Assignment(*compiled(*tensors)))


@pytest.mark.skipif(library.loaded["cuda"] is not None, reason=f"no CUDA part: {library.loaded['cuda']}")
def test_the_cuda_part_loads_without_a_gpu() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("yolov9_fast::assign", "CUDA")


def on_gpu(case: Case) -> Case:
    tensors, options = case
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
    return tuple(each.cuda() for each in tensors), moved


def to_host(result: Assignment) -> Assignment:
    return Assignment(result.gt_index.cpu(), result.weight.cpu())


@pytest.mark.gpu
@needs_gpu
def test_cuda_is_bitwise_identical_to_the_cpu() -> None:
    for seed in range(500):
        case = varied_case(seed)
        assert_same(by("eager", case), to_host(by("cuda", on_gpu(case))), f"seed {seed}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rule", ["yolov9", "ultralytics", "mit"])
@pytest.mark.parametrize(("batch", "objects"), [(32, 60), (32, 300), (1, 5000)])
def test_cuda_at_full_size_is_bitwise_identical_to_the_cpu(rule: str, batch: int, objects: int) -> None:
    tensors, options = dense_case(objects, batch=batch)
    case = tensors, {**options, "rule": rule}
    assert_same(by("cpu" if MISSING is None else "eager", case), to_host(by("cuda", on_gpu(case))))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rule", ["yolov9", "ultralytics", "mit"])
def test_cuda_does_not_synchronise_and_can_be_captured(rule: str) -> None:
    tensors, options = on_gpu(dense_case(60, batch=4))
    case = tensors, {**options, "rule": rule}
    expected = by("cuda", case)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        by("cuda", case)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = by("cuda", case)
    tensors[0].mul_(0.5)  # the graph reads it when it runs
    graph.replay()
    changed = by("cuda", case)
    torch.cuda.synchronize()
    assert_same(captured, changed)
    assert not torch.equal(captured.weight, expected.weight)
