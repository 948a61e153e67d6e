"""What a training step or a prediction does on a GPU, traced with fake tensors. See the package's docstring."""

from __future__ import annotations

from tests import fake_cuda

fake_cuda.start()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import dataclass, fields  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import DynamicOutputShapeException  # noqa: E402

fake_cuda.implement_cuda_operators()

import yolov9_fast as yf  # noqa: E402
from tests.accelerate import mit_shaped, official_shaped, ultralytics_shaped  # noqa: E402
from tests.fake_cuda import planted  # noqa: E402
from tests.fake_cuda.pretend import traced  # noqa: E402
from tests.fake_cuda.record import Record, same_layout  # noqa: E402
from yolov9_fast.data import ImageRecord, LabelReport  # noqa: E402
from yolov9_fast.data.planned import PlanForm, PlannedImages  # noqa: E402
from yolov9_fast.data.sample import Batch  # noqa: E402
from yolov9_fast.engine.clock import PhaseClock  # noqa: E402
from yolov9_fast.engine.device import autocast, prepare_images, to_channels_last  # noqa: E402
from yolov9_fast.engine.ema import ModelEMA  # noqa: E402
from yolov9_fast.engine.loss_scale import LossScale  # noqa: E402
from yolov9_fast.engine.optimizer import build_optimizer  # noqa: E402
from yolov9_fast.engine.predictor import Predictor  # noqa: E402
from yolov9_fast.engine.step import PHASES, TrainStep  # noqa: E402
from yolov9_fast.engine.training_state import TrainingState  # noqa: E402
from yolov9_fast.engine.validator import EvaluationSet, validate  # noqa: E402
from yolov9_fast.losses import DetectionLoss  # noqa: E402
from yolov9_fast.models import create_model  # noqa: E402
from yolov9_fast.nn import Conv  # noqa: E402

DEVICE = torch.device("cuda", 0)
os.environ.setdefault("YOLOV9_FAST_HOST_MICROSECONDS", "0")  # every block fused, as where a CUDA graph is captured
FOREIGN = {
    "official": official_shaped.DetectionModel,
    "ultralytics": ultralytics_shaped.DetectionModel,
    "mit": mit_shaped.YOLO,
}


@dataclass(frozen=True)
class Case:
    """`NETWORK WHAT AMP`, then options as `batch=8`.

    WHAT: step, accumulate, predict or validate; of a model of other code step or infer. Or `PLANT plant AMP`: forward
    and backward of one unit with a fault.

    `backend`: of the operators, as in `set_backend`; of foreign models "own" leaves them as they are.

    `planned`: 1 for a step that makes its images, as with `--augment-on gpu`.
    """

    network: str
    what: str
    amp: str
    batch: int = 16
    height: int = 640
    width: int = 640
    classes: int = 80
    backend: str = "auto"
    optimizer: str = "sgd"
    planned: int = 0

    @classmethod
    def parse(cls, text: str) -> Case:
        network, what, amp, *options = text.split()
        types = {entry.name: type(entry.default) for entry in fields(cls)}
        given = dict(option.split("=") for option in options)
        return cls(network, what, amp, **{name: types[name](value) for name, value in given.items()})


class Clock(PhaseClock):
    """Tells the record what runs next."""

    def __init__(self, record: Record) -> None:
        super().__init__(*PHASES)
        self.record = record
        record.phase = PHASES[0]

    def end(self, phase: str) -> None:
        super().end(phase)
        self.record.phase = PHASES[PHASES.index(phase) + 1]


def trace_step(case: Case, record: Record) -> dict[str, Any]:
    """The second `TrainStep` on a batch from the host."""
    model = to_channels_last(create_model(case.network, case.classes)).to(DEVICE).train()
    optimizer = build_optimizer(model, case.optimizer, lr=0.01, momentum=0.9, weight_decay=5e-4)
    scale = LossScale(DEVICE, enabled=case.amp == "fp16")
    state = TrainingState(model, ModelEMA(model), optimizer, scale)
    pixels = torch.zeros(case.height * case.width * 3, dtype=torch.uint8, device=DEVICE) if case.planned else None
    step = TrainStep(state, DetectionLoss(case.classes), DEVICE, amp=case.amp, pixels=pixels)
    batch = host_batch(case)
    images = batch.images if batch.planned is None else batch.planned
    step(images, batch.targets, size=None, update=True, clock=PhaseClock(*PHASES))  # makes what stays
    step(images, batch.targets, size=None, update=case.what == "step", clock=Clock(record))
    record.phase = ""
    return {"gradients_with_other_strides": _other_strides(model)}


def host_batch(case: Case) -> Batch:
    """As the loader gives it: uint8 images, and two objects of the last class in each."""
    count, nothing = case.batch, [0] * case.batch
    image = torch.arange(count).repeat(2).float()
    others = torch.tensor([case.classes - 1, 0.5, 0.5, 0.25, 0.25]).expand(2 * count, 5)
    targets = torch.cat((image[:, None], others), 1)
    images = torch.zeros(count, 3, case.height, case.width, dtype=torch.uint8)
    shape = (case.height, case.width)
    form = PlanForm(count, views=2, tiles=4, coloured=True, size=case.height, perspective=False)
    planned = PlannedImages(torch.zeros(sum(form.sizes()), dtype=torch.uint8), form) if case.planned else None
    lists = list(range(count)), [shape] * count, [(1.0, 1.0)] * count, [(0, 0) for _ in nothing]
    return Batch(images, targets, *lists, planned)


def _other_strides(model: nn.Module) -> int:
    return sum(p.grad is not None and not same_layout(p.grad, p) for p in model.parameters())


def trace_predict(case: Case, record: Record) -> dict[str, Any]:
    """`Predictor.detect` on one image from the host, the second time."""
    predictor = Predictor(create_model(case.network, case.classes), case.width, device=0, amp=case.amp)
    image = np.zeros((case.height, case.width, 3), np.uint8)
    predictor.detect(image)
    record.phase = "predict"
    predictor.detect(image)
    record.phase = ""
    return {}


def trace_validate(case: Case, record: Record) -> dict[str, Any]:
    """`validate` with the loss, as during training; counted is the second batch."""
    model = to_channels_last(create_model(case.network, case.classes).to(DEVICE))
    batch = host_batch(case)
    boxes = np.array([[0, 0.5, 0.5, 0.25, 0.25]], np.float32)
    records = [ImageRecord(Path(f"{i}.jpg"), case.width, case.height, i, boxes) for i in range(case.batch)]
    names = dict(enumerate(f"class {i}" for i in range(case.classes)))
    model.names = names

    class Batches:
        dataset = SimpleNamespace(rect=False)

        def __iter__(self) -> Iterator[Batch]:
            yield batch
            record.phase = "validate"
            yield batch
            record.phase = ""

    truth = {
        "images": [{"id": i, "width": case.width, "height": case.height} for i in range(case.batch)],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in names.items()],
    }
    loader: Any = Batches()
    evaluation = EvaluationSet("val", names, records, LabelReport(), truth, list(names), loader)
    criterion = DetectionLoss(case.classes)
    validate(model, evaluation, amp=case.amp, criterion=criterion, channels_last=True, progress=False)
    return {}


def trace_foreign_step(case: Case, record: Record) -> dict[str, Any]:
    """A loop of somebody else's around an accelerated model: forward, backward, SGD."""
    model = _foreign(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.zeros(case.batch, 3, case.height, case.width, dtype=torch.uint8)
    others = 0
    for phase in ("", "step"):
        record.phase = phase
        given = prepare_images(images, DEVICE, channels_last=True)
        with autocast(DEVICE, case.amp):
            maps = model(given)
        torch.autograd.backward(maps, [torch.empty_like(level) for level in maps])
        others = _other_strides(model)
        optimizer.step()
        optimizer.zero_grad()
    record.phase = ""
    return {"gradients_with_other_strides": others}


def trace_foreign_inference(case: Case, record: Record) -> dict[str, Any]:
    """An accelerated model in evaluation mode, BatchNorm not folded."""
    model = _foreign(case).eval()
    images = torch.zeros(case.batch, 3, case.height, case.width, dtype=torch.uint8)
    with torch.inference_mode():
        for phase in ("", "infer"):
            record.phase = phase
            with autocast(DEVICE, case.amp):
                model(prepare_images(images, DEVICE, channels_last=True))
    record.phase = ""
    return {}


def trace_plant(case: Case, record: Record) -> dict[str, Any]:
    """Forward and backward of one unit, with a fault in each."""

    def plant(tensor: Tensor) -> None:
        with contextlib.suppress(DynamicOutputShapeException):  # noted; nothing is computed with what has no size
            planted.PLANTS[case.network](tensor)

    unit = to_channels_last(Conv(8, 16, 3)).to(DEVICE)
    x = torch.empty(2, 8, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)
    record.phase = "plant"
    with autocast(DEVICE, case.amp):
        y = unit(x)
    plant(y)
    y.register_hook(plant)
    y.backward(torch.empty_like(y))
    record.phase = ""
    return {}


def _foreign(case: Case) -> nn.Module:
    model = FOREIGN[case.network](case.classes).to(DEVICE)
    if case.backend == "own":
        return to_channels_last(model)
    report = yf.accelerate(model, memory_format=torch.channels_last)
    assert not report.skipped, report.skipped
    return model


TRACES: dict[str, Callable[[Case, Record], dict[str, Any]]] = {
    "step": trace_step,
    "accumulate": trace_step,
    "predict": trace_predict,
    "validate": trace_validate,
    "plant": trace_plant,
    "foreign step": trace_foreign_step,
    "foreign infer": trace_foreign_inference,
}


def trace(case: Case) -> dict[str, Any]:
    """What the record noted, as plain data."""
    function = TRACES[f"foreign {case.what}" if case.network in FOREIGN else case.what]
    backend = contextlib.nullcontext() if case.backend == "own" else yf.backend(case.backend)
    with traced() as record, backend:
        found = function(case, record)
    return found | {
        "launches": {phase: sum(one.values()) for phase, one in record.launches.items()},
        "by_operator": {phase: dict(one.most_common()) for phase, one in record.launches.items()},
        **{
            name: dict(sorted((+getattr(record, name)).items()))
            for name in ("waits", "copies", "layouts", "casts", "wide", "slow_lists")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=Case.__doc__)
    parser.add_argument("cases", nargs="+")
    print(json.dumps({text: trace(Case.parse(text)) for text in parser.parse_args().cases}))
    fake_cuda.end()


if __name__ == "__main__":
    main()
