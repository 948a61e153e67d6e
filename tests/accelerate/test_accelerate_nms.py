"""The NMS functions for other code: signatures, results, and that nothing is patched unless asked."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import yolov9_fast as yf
from yolov9_fast._accelerate import NMSFunctions
from yolov9_fast.ops import nms

functions = yf.accelerate_nms()
BOTH = pytest.mark.parametrize("style", ["wongkinyiu", "ultralytics"])


def prediction(extra: int = 0, classes: int = 3, anchors: int = 150, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(anchors)
    case = torch.rand(2, 4 + classes + extra, anchors, generator=generator)
    case[:, :2] *= 100
    case[:, 2:4] = 10 + 30 * case[:, 2:4]
    return case.to(device)


@BOTH
@pytest.mark.parametrize("options", [{}, {"multi_label": True}, {"agnostic": True}, {"classes": [0, 2]}])
def test_each_image_gets_the_rows_of_the_operator(style: str, options: dict[str, Any], device: str) -> None:
    case = prediction(device=device)
    rows = getattr(functions, style)(case, conf_thres=0.4, iou_thres=0.6, max_det=20, **options)
    expected = nms(case, conf=0.4, iou=0.6, max_det=20, **{"multi_label": False, **options})
    assert [len(image) for image in rows] == expected.count.tolist()
    for image, own in enumerate(rows):
        assert torch.equal(own, expected.boxes[image, : len(own)])


@BOTH
def test_defaults_are_the_published_ones(style: str, device: str) -> None:
    case = prediction(device=device)
    expected = nms(case, conf=0.25, iou=0.45, multi_label=False, max_det=300)
    assert torch.equal(getattr(functions, style)(case)[1], expected.boxes[1, : int(expected.count[1])])


@BOTH
def test_of_a_list_or_tuple_the_first_is_taken(style: str, device: str) -> None:
    function, case = getattr(functions, style), prediction(device=device)
    for given in ((case, None), [case, [torch.zeros(1, device=device)]]):
        assert torch.equal(function(given)[0], function(case)[0])
    with pytest.raises(TypeError, match=r"prediction: expected a tensor .*list of list; pass the one of the main"):
        function([[case, case], None])
    with pytest.raises(ValueError, match="three dimensions"):
        function(case[0])


@pytest.mark.parametrize(("style", "option"), [("wongkinyiu", {"nm": 5}), ("ultralytics", {"nc": 3})])
def test_mask_coefficients_are_those_of_the_anchor(style: str, option: dict[str, int], device: str) -> None:
    case = prediction(extra=5, device=device)
    rows = getattr(functions, style)(case, **option)[0]
    assert rows.shape[1] == 11
    assert len(rows) > 5
    for row in rows:
        centre = (row[:2] + row[2:4]) / 2
        anchor = (case[0, :2] - centre[:, None]).abs().sum(0).argmin()
        assert torch.equal(row[6:], case[0, 7:, anchor])
    assert torch.equal(rows[:, :6], getattr(functions, style)(case[:, :7])[0])


@BOTH
def test_known_labels_join_with_score_one(style: str, device: str) -> None:
    case = prediction(device=device)
    labels = [
        torch.tensor([[1.0, 500, 500, 20, 10], [2, 700, 700, 20, 20]], device=device),
        torch.zeros(0, 5, device=device),
    ]
    with_labels = getattr(functions, style)(case, labels=labels)
    without = getattr(functions, style)(case)
    assert with_labels[0][:2].tolist() == [[490, 495, 510, 505, 1, 1], [690, 690, 710, 710, 1, 2]]
    assert torch.equal(with_labels[0][2:], without[0])
    assert torch.equal(with_labels[1], without[1])
    with pytest.raises(ValueError, match="labels: expected one tensor for each of 2 images"):
        getattr(functions, style)(case, labels=labels[:1])
    with pytest.raises(ValueError, match="labels: expected classes"):
        getattr(functions, style)(case, labels=[torch.tensor([[3.0, 1, 1, 1, 1]], device=device)] * 2)


def test_an_image_without_candidates_is_an_empty_table_and_the_prediction_is_left_alone(device: str) -> None:
    case = prediction(device=device)
    case[0, 4:] = 0
    before = case.clone()
    rows = functions.ultralytics(case, classes=torch.tensor([1]), max_nms=50, in_place=True)
    assert rows[0].shape == (0, 6)
    assert len(rows[1]) > 0
    assert torch.equal(case, before)


def test_rows_of_an_end_to_end_network_are_filtered_only(device: str) -> None:
    rows = torch.tensor([[[0.0, 0, 9, 9, 0.9, 0], [0, 0, 9, 9, 0.8, 1], [1, 1, 2, 2, 0.1, 0]]], device=device)
    assert functions.ultralytics(rows)[0].tolist() == rows[0, :2].tolist()
    assert functions.ultralytics(rows, classes=[1])[0].tolist() == rows[0, 1:2].tolist()
    assert functions.ultralytics(rows, max_det=1)[0].tolist() == rows[0, :1].tolist()
    assert functions.ultralytics(rows, classes=1, max_det=1)[0].tolist() == rows[0, 1:2].tolist()
    assert functions.ultralytics(rows, classes=[], max_det=1)[0].shape == (0, 6)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_are_float32_whatever_the_prediction_is(style: str, dtype: torch.dtype, device: str) -> None:
    for rows in getattr(functions, style)(
        prediction(extra=2, device=device).to(dtype), **{"nm" if style[0] == "w" else "nc": 2}
    ):
        assert rows.dtype == torch.float32
        assert len(rows) > 0
    rows = torch.tensor([[[0.0, 0, 9, 9, 0.9, 100]]], dtype=dtype, device=device)
    assert functions.ultralytics(rows, classes=100)[0].dtype == torch.float32
    assert len(functions.ultralytics(rows, classes=100)[0]) == 1


@BOTH
@pytest.mark.parametrize(
    "classes",
    [1, torch.tensor(1), torch.tensor([[1]]), np.int64(1), np.array([1.0]), (1,), {1}, range(1, 2), [1, 1, 7]],
)
def test_classes_are_one_number_or_several(style: str, classes: Any, device: str) -> None:
    expected = getattr(functions, style)(prediction(device=device), classes=[1])
    found = getattr(functions, style)(prediction(device=device), 0.25, 0.45, classes)
    assert all(map(torch.equal, found, expected))
    assert len(found[0]) > 0
    assert not any(map(len, getattr(functions, style)(prediction(device=device), classes=[0.5, -1, 99])))
    with pytest.raises(TypeError, match="classes: expected a number or several, got 'person'"):
        getattr(functions, style)(prediction(device=device), classes="person")


def test_the_seventh_argument_is_labels_or_max_det() -> None:
    case = prediction()
    assert len(functions.ultralytics(case, 0.25, 0.45, None, False, False, 3)[0]) == 3
    labels = [torch.tensor([[1.0, 300, 300, 20, 10]]), torch.zeros(0, 5)]
    given = functions.ultralytics(case, 0.25, 0.45, None, False, False, labels)
    assert torch.equal(given[0], functions.ultralytics(case, labels=labels)[0])
    with pytest.raises(TypeError, match=r"expected 7 positional arguments at most, got 8; .* give them by name"):
        functions.ultralytics(case, 0.25, 0.45, None, False, False, 3, 80)


@pytest.mark.parametrize("option", ["rotated", "return_idxs"])
def test_unsupported_options_raise(option: str) -> None:
    with pytest.raises(NotImplementedError):
        functions.ultralytics(prediction(), **{option: True})


def test_channels_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="expected 1 class or more and at least 4 channels, got 0 and 7"):
        functions.wongkinyiu(prediction(), nm=3)


def test_torchvisions_forms_return_indices_by_descending_score() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 0, 10, 10]])
    scores = torch.tensor([0.5, 0.9, 0.1, 0.4])
    kept = functions.nms(boxes, scores, 0.5)
    assert kept.dtype == torch.int64
    assert kept.tolist() == [1, 2]
    assert functions.batched_nms(boxes, scores, torch.tensor([0, 1, 0, 0]), 0.5).tolist() == [1, 0, 2]
    assert functions.nms(boxes[:0], scores[:0], iou_threshold=0.5).tolist() == []
    assert NMSFunctions().nms is NMSFunctions.nms, "a plain function, not a method"


def original(prediction: Tensor, conf_thres: float = 0.25, iou_thres: float = 0.45, nm: int = 0) -> str:
    return "original"


def test_a_module_is_patched_when_asked_and_restored() -> None:
    module = types.SimpleNamespace(non_max_suppression=original, nms=lambda boxes, scores, iou_threshold: "old")
    undo = yf.accelerate_nms(patch=module)
    assert torch.equal(module.non_max_suppression(prediction())[0], functions.wongkinyiu(prediction())[0])
    undo_nms = yf.accelerate_nms(patch=module, attribute="nms")
    assert module.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5).tolist() == [0]
    undo()
    undo_nms()
    assert module.non_max_suppression is original
    assert module.nms(None, None, 0) == "old"


def test_the_style_can_be_named_and_must_be_known() -> None:
    module = types.SimpleNamespace(non_max_suppression=lambda *args: "old")
    with pytest.raises(ValueError, match=r"style: expected one of .* has none of their signatures"):
        yf.accelerate_nms(patch=module)
    with pytest.raises(ValueError, match="style: expected one of"):
        yf.accelerate_nms(patch=module, style="detectron")
    with pytest.raises(AttributeError):
        yf.accelerate_nms(patch=module, attribute="soft_nms")
    yf.accelerate_nms(patch=module, style="ultralytics")
    assert module.non_max_suppression is functions.ultralytics


def test_the_order_and_the_defaults_of_the_replaced_function_hold() -> None:
    def newer(
        prediction: Tensor,
        conf_thres: float = 0.4,
        iou_thres: float = 0.45,
        max_det: int = 5,
        max_nms: int = 9,
        turn: int = 0,
    ) -> None: ...

    module = types.SimpleNamespace(non_max_suppression=newer)
    yf.accelerate_nms(patch=module)
    case = prediction()
    assert len(module.non_max_suppression(case, 0.25, 0.45, 2)[0]) == 2
    expected = functions.ultralytics(case, conf_thres=0.4, max_det=5, max_nms=9)
    assert all(map(torch.equal, module.non_max_suppression(case), expected))
    with pytest.raises(TypeError, match="newer: the replacement has no argument turn"):
        module.non_max_suppression(case, turn=1)
    with pytest.raises(TypeError, match="labels"):
        module.non_max_suppression(case, labels=())
