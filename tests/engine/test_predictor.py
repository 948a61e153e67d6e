"""Prediction: boxes in pixels of the image, class filter, sources, refusals."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from torch import Tensor

from yolov9_fast.data import Frame
from yolov9_fast.engine.device import single_device
from yolov9_fast.engine.inputs import frames_of
from yolov9_fast.engine.predictor import Prediction, Predictor, class_indices
from yolov9_fast.errors import DataError, UserError
from yolov9_fast.models import DetectionModel, create_model
from yolov9_fast.nn import DetectionOutput

NAMES = {0: "cat", 1: "dog", 2: "cow"}
_OTHER_DTYPES = (torch.bfloat16, torch.float64)


@pytest.fixture(scope="module")
def model() -> DetectionModel:
    torch.manual_seed(0)
    model = create_model("gelan-t", len(NAMES))
    model.names = dict(NAMES)
    return model


def fixed_predictor(model: DetectionModel, device: str = "cpu", **options: object) -> Predictor:
    """A predictor whose network finds a dog (0.98) and a cat (0.88) at the same place in every image."""
    predictor = Predictor(model, 64, device=device, **options)  # type: ignore[arg-type]

    def raw(images: Tensor, *, auxiliary: bool) -> DetectionOutput:
        height, width = images.shape[2:]
        maps = [torch.full((1, 64 + 3, height // s, width // s), -20.0, device=device) for s in (8, 16, 32)]
        for side in range(4):  # each side one stride away from the anchor point
            maps[0][0, side * 16 + 1, 2, 4] = 20.0
            maps[0][0, side * 16 + 1, 2, 5] = 20.0
        maps[0][0, 64 + 1, 2, 4] = 4.0
        maps[0][0, 64 + 0, 2, 5] = 2.0
        return DetectionOutput(maps)

    predictor.model.raw = raw  # type: ignore[method-assign, assignment]
    return predictor


@pytest.fixture(scope="module")
def predictor(model: DetectionModel) -> Predictor:
    return fixed_predictor(model)


def test_boxes_are_in_pixels_of_the_image(model: DetectionModel, device: str) -> None:
    (prediction,) = fixed_predictor(model, device, conf=0.9)(np.zeros((100, 200, 3), np.uint8))
    # Letterboxed to 64 × 32 by 0.32; anchor point (36, 20), sides 8 pixels away.
    assert prediction.boxes[:, :4].tolist() == [pytest.approx([87.5, 37.5, 137.5, 87.5], abs=1e-3)]
    assert prediction.boxes[0, 4] == pytest.approx(1 / (1 + np.exp(-4.0)), abs=1e-6)
    assert prediction.counts() == {"dog": 1}
    assert prediction.shape == (100, 200)
    assert prediction.seconds > 0


def test_boxes_are_in_descending_order_and_overlaps_of_other_classes_stay_unless_agnostic(
    model: DetectionModel, device: str
) -> None:
    image = np.zeros((100, 200, 3), np.uint8)
    (both,) = fixed_predictor(model, device, iou=0.2)(image)
    assert both.boxes[:, 5].tolist() == [1, 0]
    assert both.counts() == {"cat": 1, "dog": 1}
    (best,) = fixed_predictor(model, device, iou=0.2, agnostic=True)(image)
    assert best.counts() == {"dog": 1}


def test_only_the_requested_classes_are_returned(model: DetectionModel, device: str) -> None:
    (prediction,) = fixed_predictor(model, device, classes=["cat"])(np.zeros((64, 64, 3), np.uint8))
    assert prediction.counts() == {"cat": 1}


def test_at_most_max_det_boxes_are_returned(model: DetectionModel, device: str) -> None:
    (prediction,) = fixed_predictor(model, device, max_det=1)(np.zeros((64, 64, 3), np.uint8))
    assert len(prediction) == 1


def test_classes_by_index_or_name() -> None:
    assert class_indices(["dog", 0, "2", "dog"], NAMES) == [0, 1, 2]
    for wrong in ("bird", 3, -1, "7"):
        with pytest.raises(UserError, match="0 cat, 1 dog, 2 cow"):
            class_indices([wrong], NAMES)


@pytest.mark.parametrize(
    ("classes", "expected"),
    [("1", [1]), (1, [1]), ("dog", [1]), ("12", [2]), (np.int64(2), [2]), (np.array([2, 0]), [0, 2]), ({"cat"}, [0])],
)
def test_one_class_is_not_taken_apart(classes: object, expected: list[int]) -> None:
    names = {0: "cat", 1: "dog", 2: "12"}
    assert class_indices(classes, names) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", ["56", "9" * 5000, "", 1.5, True, [None], [[0]], [], b"0", torch.ones(2, 2)])
def test_what_is_no_class_is_an_error_of_one_short_line(classes: object) -> None:
    with pytest.raises(UserError, match="0 cat, 1 dog, 2 cow, got ") as error:
        class_indices(classes, NAMES)  # type: ignore[arg-type]
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


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


PICTURE = np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8)


def stream_of(suffix: str) -> io.BytesIO:
    return io.BytesIO(cv2.imencode(suffix, PICTURE)[1].tobytes())


def given_inputs(folder: Path) -> dict[str, object]:
    """`PICTURE` in every form that a predictor takes, and the number of images in it."""
    rgb = torch.from_numpy(PICTURE[..., ::-1].copy())
    pillow = PillowImage.fromarray(PICTURE[..., ::-1])
    cv2.imwrite(str(folder / "a.png"), PICTURE)
    opaque = pillow.convert("RGBA")
    opaque.putalpha(60)
    turned = pillow.transpose(PillowImage.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    return {
        "array": PICTURE,
        "read-only view": np.broadcast_to(PICTURE[::1], PICTURE.shape),
        "reversed view": PICTURE[::-1, ::-1].copy()[::-1, ::-1],
        "batch of arrays": PICTURE[None],
        "list of arrays": [PICTURE],
        "nested": [[(PICTURE,)]],
        "generator": (image for image in [PICTURE]),
        "path": folder / "a.png",
        "text": str(folder / "a.png"),
        "path-like": next(os.scandir(folder)),
        "bytes": stream_of(".png").getvalue(),
        "bytearray": bytearray(stream_of(".png").getvalue()),
        "memoryview": memoryview(stream_of(".bmp").getvalue()),
        "BytesIO": stream_of(".png"),
        "open file": open(folder / "a.png", "rb"),
        "PIL": pillow,
        "PIL with alpha": opaque,
        "PIL by EXIF": turned,
        "tensor": rgb.permute(2, 0, 1),
        "tensor, pixels first": rgb,
        "float": rgb.permute(2, 0, 1).float() / 255,
        "float with gradient": (rgb.permute(2, 0, 1).double() / 255).requires_grad_(),
        "half": rgb.half() / 255,
        "batch": rgb.permute(2, 0, 1)[None],
        "float batch": rgb[None].float() / 255,
    }


def test_every_form_of_a_picture_is_the_same_picture(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = given_inputs(tmp_path)
    seen: list[np.ndarray] = []
    detect = predictor.detect
    monkeypatch.setattr(predictor, "detect", lambda image, **names: seen.append(image) or detect(image, **names))
    for name, form in forms.items():
        (prediction,) = predictor(form)
        assert np.array_equal(seen.pop(), PICTURE), name
        assert prediction.shape == (40, 64)
    assert len(predictor(list(given_inputs(tmp_path).values()))) == len(forms)
    assert [len(predictor(torch.zeros(n, 3, 32, 32))) for n in (0, 3)] == [0, 3]
    assert predictor([]) == []


def test_grey_and_deep_pil_images_are_as_opencv_reads_them() -> None:
    grey = PICTURE[..., 0]
    deep = grey.astype(np.uint16) * 256 + 77
    for image in (PillowImage.fromarray(grey), PillowImage.fromarray(deep), PillowImage.fromarray(grey).convert("LA")):
        assert np.array_equal(frames_of_one(image), np.repeat(grey[..., None], 3, axis=2))
    palette = PillowImage.fromarray(PICTURE).quantize(8)
    assert np.array_equal(frames_of_one(palette), np.asarray(palette.convert("RGB"))[..., ::-1])


def frames_of_one(images: object) -> np.ndarray:
    (frame,) = frames_of(images)
    assert frame.image is not None
    return frame.image


class Unreadable:
    def read(self, _: int) -> bytes:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (None, "got NoneType"),
        (1.5, "got float"),
        (True, "got bool"),
        ({"a": PICTURE}, "got dict"),
        ([[[200, 201], [202, 203]]], "got int"),
        (PICTURE.astype(np.float32), "got float32 [40, 64, 3]"),
        (PICTURE[..., 0], "got uint8 [40, 64]"),
        (np.array([PICTURE, None, 1], dtype=object), "got object [3]"),
        (PICTURE.transpose(2, 0, 1), "got uint8 [3, 40, 64]"),
        (torch.zeros(40, 64), "got float32 [40, 64]"),
        (torch.zeros(1, 1, 40, 64), "got float32 [1, 40, 64]"),
        (torch.zeros(3, 0, 5), "got float32 [3, 0, 5]"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), "got int64 [3, 4, 5]"),
        (torch.full((3, 4, 5), 255.0), "got float32 [3, 4, 5] in 255..255"),
        (torch.full((3, 4, 5), torch.nan), "got float32 [3, 4, 5] in nan..nan"),
        (torch.zeros(3, 4, 5, device="meta"), "got float32 [3, 4, 5] that cannot be copied"),
        (b"", "images: image file is empty"),
        (b"\xff\xd8 no picture", "images: image file is truncated"),
        (io.StringIO("text"), "got one that gives str"),
        (Unreadable(), "cannot be read: Input/output error"),
        (PillowImage.new("F", (8, 8)), "got mode F"),
        ("", "got an empty text"),
        (77, "webcam 77 cannot be opened"),
        ("77", "webcam 77 cannot be opened"),
    ],
)
def test_other_inputs_are_one_short_line_without_pixels(predictor: Predictor, images: object, text: str) -> None:
    with pytest.raises(DataError) as error:
        predictor(images)
    assert text in str(error.value)
    assert len(str(error.value)) < 250
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("frames", ["a.png", [PICTURE], [None]])
def test_a_stream_is_of_frames(predictor: Predictor, frames: object) -> None:
    with pytest.raises(DataError, match=r"frames: expected those of `open_source`, got (str|ndarray|NoneType)"):
        list(predictor.stream(frames))  # type: ignore[arg-type]


def test_a_list_that_holds_itself_is_an_error(predictor: Predictor) -> None:
    images: list[object] = []
    images.append(images)
    with pytest.raises(DataError, match="got list"):
        predictor(images)


def test_a_webcam_is_for_streams(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yolov9_fast.data.sources._open_live", lambda _: None)
    for number in (0, "0", np.int64(0)):
        with pytest.raises(DataError, match="a webcam never ends"):
            predictor(number)


def test_a_video_that_can_be_read_in_part_is_a_warning(
    predictor: Predictor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "v.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 48))
    for _ in range(6):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    content = file.read_bytes()
    file.write_bytes(content[: (content.index(b"movi") + content.index(b"idx1")) // 2])
    found = predictor([file, PICTURE])
    assert [prediction.frame for prediction in found] == [*range(len(found) - 1), 0]
    assert f"{7 - len(found)} of 6 frames cannot be decoded" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, *(pytest.param(d, marks=pytest.mark.slow) for d in _OTHER_DTYPES)])
def test_models_of_other_dtypes_predict_in_float32(dtype: torch.dtype, model: DetectionModel) -> None:
    other = copy.deepcopy(model).to(dtype)
    (expected,) = Predictor(copy.deepcopy(other).float(), 64, conf=0.0, iou=1.0, device="cpu")(PICTURE)
    (found,) = Predictor(other, 64, conf=0.0, iou=1.0, device="cpu")(PICTURE)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-5, atol=1e-4)
    assert {value.dtype for value in other.state_dict().values() if value.is_floating_point()} == {dtype}


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), torch.device("cpu", 0), "cpu:0"])
def test_devices_by_name_or_object(device: str | torch.device) -> None:
    assert single_device(device) == torch.device("cpu")


def test_a_predictor_on_a_device_object(model: DetectionModel) -> None:
    assert Predictor(model, 64, device=torch.device("cpu"))(PICTURE)[0].shape == (40, 64)


def test_cuda_devices_by_name_or_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, index in ((torch.device("cuda"), 0), (torch.device("cuda:1"), 1), (1, 1), ("cuda", 0), (None, 0)):
        assert single_device(device) == torch.device("cuda", index)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device": torch.device("meta")}, "device: expected cpu, or CUDA indices such as 0 or 0,1, got 'meta'"),
        ({"device": 1.5}, "device: expected cpu or a CUDA index, got float"),
        ({"device": True}, "device: expected cpu or a CUDA index, got bool"),
        ({"amp": "int8"}, "amp: expected auto, off, bf16 or fp16, got 'int8'"),
        ({"amp": None}, "amp: expected auto, off, bf16 or fp16, got None"),
        ({"conf": "0.5"}, "conf: expected a value in [0, 1], got '0.5'"),
        ({"conf": None}, "conf: expected a value in [0, 1], got None"),
        ({"conf": float("nan")}, "conf: expected a value in [0, 1], got nan"),
        ({"image_size": (640, 640)}, "image_size: expected at least 1, got (640, 640)"),
        ({"image_size": 640.5}, "image_size: expected at least 1, got 640.5"),
        ({"model": torch.nn.Conv2d(1, 1, 1)}, "model: expected a DetectionModel or a weights file, got Conv2d"),
        ({"model": None}, "model: expected a DetectionModel or a weights file, got NoneType"),
    ],
)
def test_options_of_other_types_are_one_line(options: dict[str, object], text: str, model: DetectionModel) -> None:
    with pytest.raises(UserError) as error:
        Predictor(**{"model": model, **options})  # type: ignore[arg-type]
    assert str(error.value) == text


@pytest.mark.parametrize("options", [{"conf": 2}, {"iou": -1}, {"image_size": 0}, {"max_det": 0}, {"device": "0,1"}])
def test_options_out_of_range_are_named(model: DetectionModel, options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Predictor(model, **options)  # type: ignore[arg-type]


def test_as_dict_is_plain_data() -> None:
    rows = np.array([[1, 2, 3, 4, 0.5, 2]], np.float32)
    record = Prediction("p.jpg", rows, NAMES, (10, 20), 0.1).as_dict()
    assert record["detections"] == [{"class": 2, "name": "cow", "score": 0.5, "box": [1.0, 2.0, 3.0, 4.0]}]
    assert (record["height"], record["width"]) == (10, 20)
