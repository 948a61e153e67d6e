"""Prediction: boxes in pixels of the image, class filter, sources, refusals."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from yolov9_fast.data import Frame
from yolov9_fast.engine.predictor import Prediction, Predictor, class_indices
from yolov9_fast.errors import DataError, UserError
from yolov9_fast.models import DetectionModel, create_model
from yolov9_fast.nn import DetectionOutput

NAMES = {0: "cat", 1: "dog", 2: "cow"}


@pytest.fixture(scope="module")
def model() -> DetectionModel:
    torch.manual_seed(0)
    model = create_model("gelan-t", len(NAMES))
    model.names = dict(NAMES)
    return model


def fixed_predictor(model: DetectionModel, **options: object) -> Predictor:
    """A predictor whose network finds a dog (0.98) and a cat (0.88) at the same place in every image."""
    predictor = Predictor(model, 64, device="cpu", **options)  # type: ignore[arg-type]

    def raw(images: Tensor, *, auxiliary: bool) -> DetectionOutput:
        height, width = images.shape[2:]
        maps = [torch.full((1, 64 + 3, height // s, width // s), -20.0) for s in (8, 16, 32)]
        for side in range(4):  # each side one stride away from the anchor point
            maps[0][0, side * 16 + 1, 2, 4] = 20.0
            maps[0][0, side * 16 + 1, 2, 5] = 20.0
        maps[0][0, 64 + 1, 2, 4] = 4.0
        maps[0][0, 64 + 0, 2, 5] = 2.0
        return DetectionOutput(maps)

    predictor.model.raw = raw  # type: ignore[method-assign, assignment]
    return predictor


def test_boxes_are_in_pixels_of_the_image(model: DetectionModel) -> None:
    (prediction,) = fixed_predictor(model, conf=0.9)(np.zeros((100, 200, 3), np.uint8))
    # Letterboxed to 64 × 32 by 0.32; anchor point (36, 20), sides 8 pixels away.
    assert prediction.boxes[:, :4].tolist() == [pytest.approx([87.5, 37.5, 137.5, 87.5], abs=1e-3)]
    assert prediction.boxes[0, 4] == pytest.approx(1 / (1 + np.exp(-4.0)), abs=1e-6)
    assert prediction.counts() == {"dog": 1}
    assert prediction.shape == (100, 200)
    assert prediction.seconds > 0


def test_boxes_are_in_descending_order_and_overlaps_of_other_classes_stay_unless_agnostic(
    model: DetectionModel,
) -> None:
    image = np.zeros((100, 200, 3), np.uint8)
    (both,) = fixed_predictor(model, iou=0.2)(image)
    assert both.boxes[:, 5].tolist() == [1, 0]
    assert both.counts() == {"cat": 1, "dog": 1}
    (best,) = fixed_predictor(model, iou=0.2, agnostic=True)(image)
    assert best.counts() == {"dog": 1}


def test_only_the_requested_classes_are_returned(model: DetectionModel) -> None:
    (prediction,) = fixed_predictor(model, classes=["cat"])(np.zeros((64, 64, 3), np.uint8))
    assert prediction.counts() == {"cat": 1}


def test_at_most_max_det_boxes_are_returned(model: DetectionModel) -> None:
    (prediction,) = fixed_predictor(model, max_det=1)(np.zeros((64, 64, 3), np.uint8))
    assert len(prediction) == 1


def test_classes_by_index_or_name() -> None:
    assert class_indices(["dog", 0, "2", "dog"], NAMES) == [0, 1, 2]
    for wrong in ("bird", 3, -1, "7"):
        with pytest.raises(UserError, match="0 cat, 1 dog, 2 cow"):
            class_indices([wrong], NAMES)


def test_the_given_network_is_not_changed(model: DetectionModel) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    Predictor(model, 64, device="cpu")
    after = model.state_dict()
    assert model.training
    assert not model.is_fused
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_fused_network_predicts_the_same_as_the_network(model: DetectionModel) -> None:
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    (found,) = Predictor(model, 64, conf=0.0, iou=1.0, device="cpu")(image)
    images = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        scores = model.eval()(images)[0, 4:].amax(0)
    model.train()
    assert len(found) == len(scores)
    torch.testing.assert_close(torch.from_numpy(found.boxes[:, 4]), scores.sort(descending=True).values)


def test_files_folders_and_arrays_in_one_call(model: DetectionModel, tmp_path: Path) -> None:
    for name, size in (("a.png", (40, 60)), ("b.png", (60, 40))):
        cv2.imwrite(str(tmp_path / name), np.zeros((*size, 3), np.uint8))
    predictor = fixed_predictor(model)
    found = predictor([tmp_path, str(tmp_path / "b.png"), np.zeros((32, 32, 3), np.uint8)])
    assert [Path(p.path).name for p in found] == ["a.png", "b.png", "b.png", ""]
    assert [p.shape for p in found] == [(40, 60), (60, 40), (60, 40), (32, 32)]


def test_unreadable_images_are_an_error_in_a_call_and_a_none_in_a_stream(model: DetectionModel, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    predictor = fixed_predictor(model)
    with pytest.raises(DataError, match=r"bad\.jpg"):
        predictor(tmp_path / "bad.jpg")
    frame = Frame(None, "bad.jpg", 0, error="why")
    assert list(predictor.stream([frame])) == [(frame, None)]


@pytest.mark.parametrize("image", [np.zeros((8, 8)), np.zeros((8, 8), np.uint8), np.zeros((8, 0, 3), np.uint8)])
def test_other_arrays_are_refused(model: DetectionModel, image: np.ndarray) -> None:
    with pytest.raises(DataError, match="uint8 BGR"):
        fixed_predictor(model)(image)


@pytest.mark.parametrize("options", [{"conf": 2}, {"iou": -1}, {"image_size": 0}, {"max_det": 0}, {"device": "0,1"}])
def test_options_out_of_range_are_named(model: DetectionModel, options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Predictor(model, **options)  # type: ignore[arg-type]


def test_as_dict_is_plain_data() -> None:
    rows = np.array([[1, 2, 3, 4, 0.5, 2]], np.float32)
    record = Prediction("p.jpg", rows, NAMES, (10, 20), 0.1).as_dict()
    assert record["detections"] == [{"class": 2, "name": "cow", "score": 0.5, "box": [1.0, 2.0, 3.0, 4.0]}]
    assert (record["height"], record["width"]) == (10, 20)
