"""Others that do the same work: OpenCV and torchvision for NMS, a dense assigner, ONNX Runtime and OpenVINO.

Each is optional; where one is missing or fails, the reason is recorded and the run continues.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from yolov9_fast.ops import Assignment, Detections
from yolov9_fast.ops._boxes import xywh_to_xyxy

from .cases import Absent, Clock, Runner

_CONF, _IOU, _MOST = 0.001, 0.7, 300
_MOST_DENSE = 1000


def _missing(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # an import may fail in any way, such as a library built for another torch
        return f"{module} cannot be imported ({type(error).__name__}: {error})"
    return None


def nms_peers(prediction: Tensor, expected: Detections) -> Iterator[Runner | Absent]:
    """NMS of one decoded batch by others, as one would call them; candidates are found by the same eager code."""
    for name, module, suppress in (
        ("opencv", "cv2", _opencv_nms),
        ("torchvision", "torchvision", _torchvision_nms),
    ):
        reason = _missing(module)
        if reason is None and name == "opencv" and prediction.device.type != "cpu":
            reason = "it computes on the CPU only"
        yield Absent(name, "nchw", reason) if reason else _nms_runner(name, suppress, prediction, expected)


def assign_peers(tensors: list[Tensor], expected: Assignment, classes: int) -> Iterator[Runner | Absent]:
    """The assignment in the dense form of published trainers, every ground truth with every anchor.

    `tensors`: scores, boxes, anchor points, labels [B, N], ground truths, mask [B, N].
    """
    name = "dense eager"
    reason = _missing("yolov9_fast.bench.dense_assigner")
    if reason is None and tensors[4].shape[1] > _MOST_DENSE:
        reason = f"its [B, N, A] tensors would not fit for {tensors[4].shape[1]} objects"
    if reason is not None:
        yield Absent(name, "nchw", reason)
        return
    assigner = importlib.import_module("yolov9_fast.bench.dense_assigner").DenseAssigner(num_classes=classes)
    ready = [*tensors[:3], tensors[3][..., None], tensors[4], tensors[5][..., None].float()]

    def results() -> dict[str, Tensor]:
        foreground = assigner(*ready)[3].cpu()
        # Where metrics are equal, which happens at 0 alone, the dense form leaves the order open.
        decided = expected.weight > 0
        same = (foreground == (expected.gt_index >= 0))[decided | foreground.bool()]
        return {"agreement": same.double().mean() if same.numel() else torch.tensor(1.0)}

    yield Runner(name, "nchw", lambda clock: assigner(*ready), results)


Suppress = Callable[[Tensor, Tensor, Tensor], Any]


def _nms_runner(name: str, suppress: Suppress, prediction: Tensor, expected: Detections) -> Runner:
    def call(clock: Clock) -> list[Tensor]:
        found = []
        for one in prediction:
            scores = one[4:].T
            anchor, label = torch.nonzero(scores > _CONF, as_tuple=True)
            score = scores[anchor, label]
            boxes = xywh_to_xyxy(one[:4].T)[anchor]
            kept = torch.as_tensor(suppress(boxes, score, label), dtype=torch.int64)[:_MOST].to(score.device)
            found.append(torch.cat((boxes[kept], score[kept, None], label[kept, None]), 1))
        return found

    def results() -> dict[str, Tensor]:
        return {"agreement": torch.tensor(_agreement(call(_Silent()), expected))}

    return Runner(name, "nchw", call, results, note="candidates by eager PyTorch, suppression by the peer")


class _Silent:
    def mark(self, phase: str) -> None:
        pass


def _agreement(found: list[Tensor], expected: Detections) -> float:
    """Share of detections (score and class, rounded) that both have, of all that either has."""
    both = either = 0
    for image, rows in enumerate(found):
        ours = expected.boxes[image, : int(expected.count[image])].cpu()
        a = {(round(float(r[4]), 6), int(r[5]), round(float(r[0]), 2)) for r in ours}
        b = {(round(float(r[4]), 6), int(r[5]), round(float(r[0]), 2)) for r in rows.cpu()}
        both, either = both + len(a & b), either + len(a | b)
    return both / either if either else 1.0


def _opencv_nms(boxes: Tensor, scores: Tensor, labels: Tensor) -> Any:
    cv2 = importlib.import_module("cv2")
    if not len(boxes):
        return []
    corner_and_size = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), 1)
    kept = cv2.dnn.NMSBoxesBatched(
        corner_and_size.double().numpy(), scores.numpy(), labels.int().numpy(), _CONF, _IOU, top_k=30000
    )
    return np.asarray(kept).reshape(-1)


def _torchvision_nms(boxes: Tensor, scores: Tensor, labels: Tensor) -> Any:
    return importlib.import_module("torchvision").ops.batched_nms(boxes, scores, labels, _IOU)


def inference_peers(
    model: nn.Module, images: Tensor, finish: Callable[[Tensor], Any], compare: Callable[[Tensor], float]
) -> Iterator[Runner | Absent]:
    """Inference runtimes on the fused network `model` [B, 3, H, W] → [B, 4 + nc, A]; then NMS as `finish` does it.

    `compare`: agreement in [0, 1] of a network's output with ours.
    """
    for name, module, load in (("onnxruntime", "onnxruntime", _onnxruntime), ("openvino", "openvino", _openvino)):
        reason = _missing(module)
        if reason is None and images.device.type != "cpu":
            reason = "compared on the CPU only"
        network = None
        if reason is None:
            try:
                network = load(model, images)
            except Exception as error:  # an exporter may refuse in any way
                reason = f"cannot take the network ({type(error).__name__}: {str(error).splitlines()[0][:150]})"
        if network is None:
            yield Absent(name, "nchw", reason or "")
        else:
            yield _inference_runner(name, network, finish, compare)


def _inference_runner(
    name: str, network: Callable[[], Tensor], finish: Callable[[Tensor], Any], compare: Callable[[Tensor], float]
) -> Runner:
    def call(clock: Clock) -> Any:
        prediction = network()
        clock.mark("network")
        value = finish(prediction)
        clock.mark("nms")
        return value

    return Runner(name, "nchw", call, lambda: {"agreement": torch.tensor(compare(network()))})


def _onnxruntime(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    runtime = importlib.import_module("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        torch.onnx.export(model, (images,), str(path), dynamo=False, input_names=["images"], output_names=["out"])
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    array = images.numpy()
    return lambda: torch.from_numpy(session.run(None, {"images": array})[0])


def _openvino(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    openvino = importlib.import_module("openvino")
    converted = openvino.convert_model(model, example_input=images, input=[list(images.shape)])
    hint = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(converted, "CPU", hint)
    array = images.numpy()
    return lambda: torch.from_numpy(compiled([array])[0])
