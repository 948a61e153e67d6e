"""Compiled nms and nms_boxes are bitwise identical to the reference: C++, emulated CUDA blocks, the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import yolov9_fast as yf
from tests.ops import CASES, emulated
from tests.ops.nms_cases import nms_boxes_case, nms_case
from yolov9_fast.ops import _library as library
from yolov9_fast.ops import nms, nms_boxes
from yolov9_fast.ops._nms import OPERATOR, nms_reference
from yolov9_fast.ops._nms_boxes import OPERATOR as BOXES_OPERATOR
from yolov9_fast.ops._nms_boxes import nms_boxes_reference

raw = torch.ops.yolov9_fast
CPU_REASON = OPERATOR.why_not("cpu")
needs_cpu = pytest.mark.skipif(CPU_REASON is not None, reason=f"no compiled nms: {CPU_REASON}")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def block(seed: int) -> tuple[int, int, bool]:
    """Threads of a block, the seed of their order, and whether buffers are small: in two cases of three."""
    return (1, 7, 32, 100, 256)[seed % 5], seed, seed % 3 != 0


COMPILED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cpu": (lambda seed, *args: raw.nms(*args), lambda seed, *args: raw.nms_boxes(*args)),
    "emulated": (
        lambda seed, *args: emulated.operators().nms(*args, *block(seed)),
        lambda seed, *args: emulated.operators().nms_boxes(*args, *block(seed)),
    ),
}


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.slow
@needs_cpu
@pytest.mark.parametrize("name", COMPILED)
def test_random_cases_equal_the_reference(name: str) -> None:
    kept = cut = 0
    for seed in range(CASES):
        prediction, options = nms_case(seed)
        expected = nms_reference(prediction, **options)
        found = COMPILED[name][0](seed, prediction, *options.values())
        assert same(found, expected), f"nms_case({seed})"
        kept += int(expected[1].sum())
        cut += int((expected[2] > options["max_candidates"]).sum())
    assert kept > CASES, "too few detections to compare"
    assert cut > CASES / 20, "too few cases with a cut"


@pytest.mark.slow
@needs_cpu
@pytest.mark.parametrize("name", COMPILED)
def test_random_boxes_equal_the_reference(name: str) -> None:
    for seed in range(CASES):
        arguments = nms_boxes_case(seed)
        assert same(COMPILED[name][1](seed, *arguments), nms_boxes_reference(*arguments)), f"nms_boxes_case({seed})"


@needs_cpu
@settings(max_examples=min(CASES, 50))
@given(seed=st.integers(0, 2**50), most_anchors=st.integers(3, 400))
def test_larger_cases_equal_the_reference(seed: int, most_anchors: int) -> None:
    prediction, options = nms_case(seed, most_anchors)
    expected = nms_reference(prediction, **options)
    for compiled, _ in COMPILED.values():
        assert same(compiled(seed % 2**30, prediction, *options.values()), expected)


def crowded(images: int, classes: int, anchors: int, *, levels: int = 0) -> Tensor:
    """Every pair of anchor and class is a candidate; `levels` distinct scores, 0 for all distinct."""
    generator = torch.Generator().manual_seed(classes + anchors)
    prediction = torch.rand(images, 4 + classes, anchors, generator=generator)
    prediction[:, :2] *= 600
    prediction[:, 2:4] = 20 + prediction[:, 2:4] * 60
    scores = prediction[:, 4:]
    scores.copy_(0.1 + 0.9 * ((scores * levels).floor() / levels if levels else scores))
    return prediction


@needs_cpu
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("multi_label", [True, False])
def test_everything_above_conf_is_cut_at_the_same_candidate(name: str, levels: int, multi_label: bool) -> None:
    # With one score for all, 15,000 candidates tie at the cut: the GPU has to select by index too.
    prediction = crowded(1, 5, 3000, levels=levels)
    for limit in (1, 700, 2049, 6000, 30000):
        options = (prediction, 0.001, 0.6, multi_label, False, None, 400, limit)
        assert same(COMPILED[name][0](3, *options), nms_reference(*options)), limit


@needs_cpu
@pytest.mark.parametrize("levels", [2, 7, 40])
def test_the_filter_narrows_the_cut_digit_by_digit(levels: int) -> None:
    prediction = crowded(1, 5, 200, levels=levels)
    for limit in range(1, 1000, 37):
        options = (prediction, 0.001, 0.6, True, False, None, 20, limit)
        assert same(emulated.operators().nms(*options, 32, limit, True), nms_reference(*options)), limit


@needs_cpu
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("labels", [1, 80])
def test_many_boxes_without_a_limit(name: str, labels: int) -> None:
    generator, count = torch.Generator().manual_seed(5), min(5000, 4 * CASES)
    corner = torch.rand(count, 2, generator=generator) * 2000
    boxes = torch.cat((corner, corner + 10 + torch.rand(count, 2, generator=generator) * 60), 1)
    scores = (torch.rand(count, generator=generator) * 100).round() / 100
    arguments = (boxes, scores, torch.randint(labels, (count,), generator=generator), 0.5, count)
    found = COMPILED[name][1](2, *arguments)
    assert same(found, nms_boxes_reference(*arguments))
    assert int(found[1]) > count / 3


@needs_cpu
def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    prediction, threads = crowded(5, 7, 900, levels=50), torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(raw.nms(prediction, 0.3, 0.5, True, False, None, 300, 2000))
    finally:
        torch.set_num_threads(threads)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@needs_cpu
def test_auto_runs_the_compiled_kernel() -> None:
    prediction = crowded(1, 2, 20)
    for operator, arguments in (
        (OPERATOR, (prediction, 0.1, 0.5, True, False, None, 300, 30000)),
        (BOXES_OPERATOR, (torch.rand(3, 4), torch.rand(3), None, 0.5, 3)),
    ):
        assert operator.select(*arguments) is operator.implementations["cpu"].call


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_slices_and_strides_are_read_in_float32(dtype: torch.dtype) -> None:
    wide = crowded(3, 6, 200).to(dtype)
    for prediction in (wide, wide[::2, :7], wide.transpose(1, 2).contiguous().transpose(1, 2), wide[..., ::3]):
        with yf.backend("eager"):
            expected = nms(prediction)
        with yf.backend("cpu"):
            assert same(nms(prediction), expected)


def test_the_result_holds_candidates_and_anchors() -> None:
    prediction = crowded(2, 3, 50)
    prediction[1, 4:] = 0
    for backend in ["eager", "auto"]:
        with yf.backend(backend):
            found = nms(prediction, max_candidates=40)
        assert found.candidates is not None
        assert found.candidates.tolist() == [150, 0]
        assert found.anchor is not None
        assert (found.anchor[1] == -1).all()
        count = int(found.count[0])
        centre = prediction[0, :2, found.anchor[0, :count]].T
        torch.testing.assert_close((found.boxes[0, :count, :2] + found.boxes[0, :count, 2:4]) / 2, centre)
        assert (found.anchor[0, count:] == -1).all()


def test_a_prediction_that_requires_a_gradient_is_detached() -> None:
    assert not nms(crowded(1, 2, 30).requires_grad_()).boxes.requires_grad


def test_kept_boxes_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 0, 10, 10]])
    scores = torch.tensor([0.5, 0.9, 0.1, 0.5])
    kept = nms_boxes(boxes, scores, iou=0.5)
    assert kept.index.tolist() == [1, 2, -1, -1]
    assert int(kept.count) == 2
    assert nms_boxes(boxes, scores, torch.tensor([7, 8, 8, 7]), iou=0.5, max_det=2).index.tolist() == [1, 0]
    assert nms_boxes(boxes.bfloat16(), scores.half(), iou=0.9).index.tolist() == [1, 0, 2, -1]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"boxes": torch.zeros(3, 5)}, ValueError, r"boxes: expected \[n, 4\], got \[3, 5\]"),
        (
            {"boxes": torch.zeros(3, 4, dtype=torch.int64)},
            TypeError,
            "boxes: expected a floating-point tensor",
        ),
        ({"scores": torch.zeros(2)}, ValueError, r"scores: expected \[3\], got \[2\]"),
        ({"labels": torch.zeros(3)}, TypeError, "labels: expected an integer tensor, got torch.float32"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"labels: expected \[3\], got \[2\]"),
        (
            {"labels": torch.zeros(3, dtype=torch.int64, device="meta")},
            ValueError,
            ".*one device, got .*labels on meta",
        ),
        ({"iou": -1.0}, ValueError, "iou: expected at least 0"),
        ({"max_det": -1}, ValueError, "max_det: expected at least 0"),
    ],
)
def test_a_wrong_argument_of_nms_boxes_is_named(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"boxes": torch.zeros(3, 4), "scores": torch.zeros(3), "labels": None, "iou": 0.5, **change}
    with pytest.raises(error, match=f"^{words}"):
        nms_boxes(**arguments)


def test_backend_cuda_with_tensors_on_the_cpu_raises() -> None:
    with yf.backend("cuda"), pytest.raises(RuntimeError, match="cannot run"):
        nms(crowded(1, 2, 3))


def test_opcheck() -> None:
    options = (0.1, 0.5, True, False, [0, 2], 20, 100)
    torch.library.opcheck(raw.nms.default, (crowded(2, 3, 40), *options))
    boxes, scores = torch.rand(9, 4), torch.rand(9)
    torch.library.opcheck(raw.nms_boxes.default, (boxes, scores, torch.arange(9) % 2, 0.5, 9))


@pytest.mark.slow
def test_compiles_in_one_graph() -> None:
    def both(prediction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = nms(prediction * 1.0, conf=0.2, max_det=10)
        kept = nms_boxes(prediction[0, :4].T, prediction[0, 4], iou=0.5, max_det=5)
        return found.boxes, found.count, kept.index

    prediction = crowded(2, 2, 30)
    assert same(torch.compile(both, fullgraph=True)(prediction), both(prediction))


@pytest.mark.skipif(library.loaded["cuda"] is not None, reason=f"no CUDA part: {library.loaded['cuda']}")
@pytest.mark.parametrize("name", ["nms", "nms_boxes"])
def test_the_cuda_part_loads_without_a_gpu(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"yolov9_fast::{name}", "CUDA")


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Within it, a synchronisation with the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda
def test_cuda_random_cases_equal_the_reference() -> None:
    for seed in range(300):
        prediction, options = nms_case(seed, 300)
        found = raw.nms(prediction.cuda(), *options.values())
        assert same(tuple(part.cpu() for part in found), nms_reference(prediction, **options)), f"nms_case({seed})"
        boxes, scores, labels, iou, max_det = nms_boxes_case(seed, 900)
        kept = raw.nms_boxes(boxes.cuda(), scores.cuda(), None if labels is None else labels.cuda(), iou, max_det)
        expected = nms_boxes_reference(boxes, scores, labels, iou, max_det)
        assert same(tuple(part.cpu() for part in kept), expected), f"nms_boxes_case({seed})"


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("levels", [0, 1, 1000])
@pytest.mark.parametrize("max_det", [300, 5000])
def test_cuda_at_full_size_is_bitwise_identical_to_the_cpu(levels: int, max_det: int) -> None:
    prediction = crowded(4, 80, 8400, levels=levels)
    options = (0.001, 0.7, True, False, None, max_det, 30000)
    found = raw.nms(prediction.cuda(), *options)
    assert same(tuple(part.cpu() for part in found), raw.nms(prediction, *options))


@pytest.mark.gpu
@needs_cuda
def test_cuda_does_not_synchronise(no_synchronisation: None) -> None:
    prediction = torch.rand(2, 84, 500, device="cuda") * 100
    nms(prediction, classes=[1, 5], max_candidates=100)
    nms_boxes(prediction[0, :4].T, prediction[0, 4], iou=0.5)


@pytest.mark.gpu
@needs_cuda
def test_cuda_is_captured_in_a_graph() -> None:
    static = crowded(2, 80, 2000).cuda()
    nms(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = nms(static)
    for seed in range(3):
        fresh = crowded(2, 80, 2000, levels=seed * 7)
        static.copy_(fresh)
        graph.replay()
        assert same(tuple(part.cpu() for part in found), raw.nms(fresh, 0.001, 0.7, True, False, None, 300, 30000))
