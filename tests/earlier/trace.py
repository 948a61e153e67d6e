"""`tests.fake_cuda.trace` for the earlier commit: its own `Trainer._train_epoch`, `Predictor` and `validate`, traced.

`python -m tests.earlier launches` runs it.
"""

from __future__ import annotations

from tests import fake_cuda
from tests.earlier import part, stand_ins

stand_ins.fake_device()
fake_cuda.start()

import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

fake_cuda.implement_cuda_operators()

from tests.earlier.trainer import Batches, batch_of, trainer_of  # noqa: E402
from tests.fake_cuda.pretend import traced  # noqa: E402

PHASES = ("data", "forward", "loss", "backward", "step", "")


def trace_step(case: Any, record: Any) -> None:
    model = part("models").create_model(case.network, case.classes)
    # Rank 1 shows no progress, for which the losses are read once in ten batches.
    trainer = trainer_of(
        model, torch.device("cuda", 0), case.amp, Batches(batch_of(case.batch, case.size, case.classes)), rank=1
    )
    for parameter in trainer.model.parameters():
        parameter.grad = torch.empty_like(parameter)
    trainer.state.scaler.scale(torch.zeros((), device="cuda"))
    trainer._step()
    phases = iter(PHASES)

    def clock() -> float:
        """Of the trainer, which reads it where a phase ends."""
        record.phase = next(phases)
        return 0.0

    part("engine.trainer").time = SimpleNamespace(perf_counter=clock)
    trainer._train_epoch(0)


def trace_predict(case: Any, record: Any) -> None:
    model = part("models").create_model(case.network, case.classes)
    predictor = part("engine.predictor").Predictor(model, case.size, device="0", amp=case.amp)
    image = np.zeros((case.size, case.size, 3), np.uint8)
    predictor.detect(image)
    record.phase = "predict"
    predictor.detect(image)
    record.phase = ""


def trace_validate(case: Any, record: Any) -> None:
    """With the loss; counted is the second batch."""
    data, validator, losses = part("data"), part("engine.validator"), part("losses")
    model = part("models").create_model(case.network, case.classes).to("cuda")
    boxes = np.array([[0, 0.5, 0.5, 0.25, 0.25]], np.float32)
    records = [data.ImageRecord(Path(f"{i}.jpg"), case.size, case.size, i, boxes) for i in range(case.batch)]
    names = dict(enumerate(f"class {i}" for i in range(case.classes)))

    class Two(Batches):
        def __iter__(self) -> Iterator[Any]:
            yield self.batches[0]
            record.phase = "validate"
            yield self.batches[0]
            record.phase = ""

    truth = {
        "images": [{"id": i, "width": case.size, "height": case.size} for i in range(case.batch)],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in names.items()],
    }
    evaluation = validator.EvaluationSet(
        "val",
        names,
        records,
        data.LabelReport(),
        truth,
        list(names),
        Two(batch_of(case.batch, case.size, case.classes)),
    )
    criterion = losses.DetectionLoss(case.classes)
    validator.validate(model, evaluation, amp=case.amp, criterion=criterion, channels_last=True, progress=False)


TRACES = {"step": trace_step, "predict": trace_predict, "validate": trace_validate}


def trace(text: str) -> dict[str, Any]:
    """As `tests.fake_cuda.trace.trace`, of batches of 16 images of 640 pixels and 80 classes."""
    network, what, amp = text.split()
    case = SimpleNamespace(network=network, amp=amp, batch=16, size=640, classes=80)
    with traced() as record:
        TRACES[what](case, record)
    return {
        "launches": {phase: sum(one.values()) for phase, one in record.launches.items()},
        "by_operator": {phase: dict(one.most_common()) for phase, one in record.launches.items()},
        **{name: dict(sorted((+getattr(record, name)).items())) for name in ("waits", "copies", "layouts", "casts")},
    }


def main() -> None:
    print(json.dumps({text: trace(text) for text in sys.argv[1:]}))
    fake_cuda.end()


if __name__ == "__main__":
    main()
