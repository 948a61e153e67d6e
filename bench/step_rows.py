"""The rows of the step table: a whole training step of this library or of other code, each in a process of its own.

Other code is used by the names that its users call: a model from a graph or a file name, its loss, its optimiser, its
moving average. All take the same pictures and boxes. The learning rate is so small that weights, and with them the
work, stay what they are.
"""

from __future__ import annotations

import importlib
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

import yolov9_fast as yf
from yolov9_fast.data.rendered import render_dataset
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.freed_memory import keeping_freed_memory
from yolov9_fast.engine.trainer import Trainer

from . import counting, peer_imports
from .cases import LAYOUTS, Clock, NoClock
from .detection import CLASSES
from .measure import preemptions, timed_phases
from .networks import OBJECTS_PER_IMAGE, fixed_batch, same_weights
from .worker import serve

CPU = torch.device("cpu")
LR = 1e-9
MOMENTUM = 0.937
DECAY = 5e-4
CLIP = 10.0
_PREEMPTIONS_A_SECOND = 20


class Step(Protocol):
    """A whole training step; `check`: loss and gradient norm of the first; `around`: what all of them run in."""

    around: AbstractContextManager[Any]

    def __call__(self, clock: Clock) -> Any: ...

    def check(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Row:
    """One row: the network that it trains, its interpreter ("ours" or "peers"), how its step is built.

    `same`: rows of one word have the same weights, and so must have the same loss and gradients. `package`: the
    distribution whose version is recorded.
    """

    provider: str
    layout: str
    network: str
    interpreter: str
    same: str
    build: Callable[[int, int], Step]
    dtype: str = "float32"
    package: str = ""


# This library --------------------------------------------------------------------------------------------------------


class OurStep:
    """The trainer's own step, as it is in a run."""

    def __init__(self, network: str, amp: str, size: int, batch: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="yolov9-fast-step-table-")
        data = render_dataset(Path(self._folder.name), train=batch, val=1, size=64)
        names = "".join(f"  {index}: class {index}\n" for index in range(CLASSES))
        data.write_text(f"train: images/train\nval: images/val\nnames:\n{names}")
        options: dict[str, Any] = {"model": network, "data": str(data), "imgsz": size, "batch": batch, "device": "cpu"}
        options |= {"amp": amp, "workers": 0, "lr0": LR, "momentum": MOMENTUM, "clip": CLIP, "tensorboard": False}
        self._trainer = Trainer(TrainConfig(**options, project=str(Path(self._folder.name) / "runs")))
        model = self._trainer.state.model
        model.load_state_dict(same_weights(network, CPU).state_dict())
        model.train()
        self._images, self._targets = fixed_batch(size, batch)
        self.around: AbstractContextManager[Any] = keeping_freed_memory(CPU)  # as a run of the trainer

    def __call__(self, clock: Clock) -> Any:
        ends = _Ends(clock)
        result = self._run(ends, update=True)
        ends.end("step")
        return result

    def _run(self, ends: Any, *, update: bool) -> Any:
        return self._trainer.step(self._images, self._targets, size=None, update=update, clock=ends)

    def check(self) -> dict[str, float]:
        with _unchanged(self._trainer.state.model):
            items = self._run(_Ends(NoClock()), update=False)[0]
            norm = _gradient_norm(self._trainer.state.model)
            self._run(_Ends(NoClock()), update=True)  # takes the gradients away
        return {"loss": float(items.sum()) * len(self._images), "gradient": norm}


class _Ends:
    """The trainer's phases told to a benchmark's clock; "step" is the optimiser with the average."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def end(self, phase: str) -> None:
        self._clock.mark("optimiser" if phase == "step" else phase)


# Other code ----------------------------------------------------------------------------------------------------------


@dataclass
class OtherStep:
    """A training loop of other code, in the order of its own trainer.

    Attributes:
        forward: float images [B, 3, H, W] in [0, 1] → what `loss` takes.
        loss: → the scalar whose gradients are taken.
        average: updates the moving average of the weights.
        images: uint8.
        amp: autocast to this dtype.
        joined: `forward` computes the loss, too, which then is no phase of its own.
    """

    model: nn.Module
    forward: Callable[[Tensor], Any]
    loss: Callable[[Any], Tensor]
    optimizer: torch.optim.Optimizer
    average: Callable[[], Any]
    images: Tensor
    layout: str = "nchw"
    amp: torch.dtype | None = None
    reports: list[str] = field(default_factory=list)
    joined: bool = False
    around: AbstractContextManager[Any] = field(default_factory=nullcontext)

    def __call__(self, clock: Clock) -> Tensor:
        total = self._loss(clock)
        torch.autograd.backward(total)
        clock.mark("backward")
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.mark("optimiser")
        self.average()
        clock.mark("ema")
        return total.detach()

    def _loss(self, clock: Clock) -> Tensor:
        images = (self.images.float() / 255).contiguous(memory_format=LAYOUTS[self.layout])
        clock.mark("data")
        with torch.autocast("cpu", self.amp) if self.amp else nullcontext():
            output = self.forward(images)
            if not self.joined:
                clock.mark("forward")
            total = self.loss(output).sum()
        clock.mark("forward" if self.joined else "loss")
        return total

    def check(self) -> dict[str, float]:
        with _unchanged(self.model):
            total = self._loss(NoClock())
            torch.autograd.backward(total)
            norm = _gradient_norm(self.model)
            self.optimizer.zero_grad()
        return {"loss": float(total.detach()), "gradient": norm}


def published(
    layout: str = "nchw", *, accelerated: bool = False, amp: torch.dtype | None = None
) -> Callable[[int, int], Step]:
    """The published code (the package yolo9): its Model, dual loss, optimiser and average."""

    def build(size: int, batch: int) -> Step:
        peer_imports.prepare()
        package = importlib.import_module("yolo9")
        tools = importlib.import_module("yolo9.utils.torch_utils")
        graph = Path(package.__path__[0]) / "models" / "detect" / "yolov9-t.yaml"
        model = importlib.import_module("yolo9.models.yolo").Model(str(graph), ch=3, nc=CLASSES)
        model.load_state_dict(same_weights("yolov9-t", CPU).state_dict())
        model.hyp = {"cls_pw": 1.0, "fl_gamma": 0.0, "label_smoothing": 0.0, "box": 7.5, "cls": 0.5, "dfl": 1.5}
        criterion = importlib.import_module("yolo9.utils.loss_tal_dual").ComputeLoss(model)
        images, targets = fixed_batch(size, batch)
        return _other(
            model,
            layout,
            criterion if accelerated else None,
            forward=lambda x: model(x),
            loss=lambda output: criterion(output, targets)[0],
            optimizer=lambda: tools.smart_optimizer(model, "SGD", LR, MOMENTUM, DECAY),
            average=tools.ModelEMA(model),
            images=images,
            amp=amp,
        )

    return build


def ultralytics(layout: str = "nchw", *, accelerated: bool = False) -> Callable[[int, int], Step]:
    """`yolov9t.yaml` of Ultralytics, which has no auxiliary branch: its loss, optimiser and average."""

    def build(size: int, batch: int) -> Step:
        peer_imports.prepare()
        package = importlib.import_module("ultralytics")
        model = package.YOLO("yolov9t.yaml").model
        model.args = importlib.import_module("ultralytics.cfg").get_cfg()
        trainer = importlib.import_module("ultralytics.engine.trainer").BaseTrainer
        average = importlib.import_module("ultralytics.utils.torch_utils").ModelEMA(model)
        _fixed_weights(model)
        criterion = model.init_criterion()
        images, rows = fixed_batch(size, batch)
        labels = {"batch_idx": rows[:, 0], "cls": rows[:, 1:2], "bboxes": rows[:, 2:]}
        return _other(
            model,
            layout,
            criterion if accelerated else None,
            forward=lambda x: model(x),
            loss=lambda output: criterion(output, labels)[0],
            # A trainer is not made: the method groups the parameters and logs, and needs of it nothing else.
            optimizer=lambda: trainer.build_optimizer(_Trainer(), model, "SGD", LR, MOMENTUM, DECAY),
            average=average,
            images=images,
        )

    return build


class _Trainer:
    """What `build_optimizer` of Ultralytics' trainer is called on."""

    args: Any = None
    data: ClassVar[dict[str, Any]] = {"nc": CLASSES}


def libreyolo(layout: str = "nchw") -> Callable[[int, int], Step]:
    """LibreYOLO's yolo9-t with its auxiliary branch. Its model computes the loss itself: one phase, forward."""

    def build(size: int, batch: int) -> Step:
        peer_imports.prepare()
        model = importlib.import_module("libreyolo.models.yolo9.nn").LibreYOLO9Model("t", nb_classes=CLASSES)
        model.enable_aux(0.25)
        _fixed_weights(model)
        images, rows = fixed_batch(size, batch)
        corners = torch.cat((rows[:, 1:2], rows[:, 2:4] - rows[:, 4:] / 2, rows[:, 2:4] + rows[:, 4:] / 2), 1)
        targets = corners.view(batch, OBJECTS_PER_IMAGE, 5)
        groups = _groups(model)
        return _other(
            model,
            layout,
            None,
            forward=lambda x: model(x, targets=targets),
            loss=lambda output: output["total_loss"],
            optimizer=lambda: torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, nesterov=True),
            average=importlib.import_module("libreyolo.training.ema").ModelEMA(model),
            images=images,
            joined=True,
        )

    return build


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters with decay (weights of more than one dimension) and without."""
    wide = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    narrow = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [{"params": wide, "weight_decay": DECAY}, {"params": narrow, "weight_decay": 0.0}]


def _other(
    model: nn.Module,
    layout: str,
    accelerated: Any,
    *,
    forward: Callable[[Tensor], Any],
    loss: Callable[[Any], Tensor],
    optimizer: Callable[[], torch.optim.Optimizer],
    average: Any,
    images: Tensor,
    amp: torch.dtype | None = None,
    joined: bool = False,
) -> OtherStep:
    """A step of other code; `accelerated`: the criterion, where model and loss are to run this library's operators."""
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    nn.Module.to(model, memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    reports = []
    if accelerated is not None:
        reports = [str(yf.accelerate(model)), str(yf.accelerate_loss(accelerated))]
    return OtherStep(
        model, forward, loss, optimizer(), lambda: average.update(model), images, layout, amp, reports, joined
    )


def _fixed_weights(model: nn.Module) -> None:
    """The same weights in every process that builds this model: random, of the scale that it initialised."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:
                bound = 1 / math.sqrt(parameter[0].numel())
                parameter.uniform_(-bound, bound, generator=generator)


def _gradient_norm(model: nn.Module) -> float:
    gradients = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(gradients).norm())


class _unchanged:
    """Within the block statistics may move; after it the model is what it was."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._kept = {name: value.clone() for name, value in self._model.state_dict().items()}

    def __exit__(self, *_: object) -> None:
        self._model.load_state_dict(self._kept)


def ours(network: str = "yolov9-t", amp: str = "off") -> Callable[[int, int], Step]:
    return lambda size, batch: OurStep(network, amp, size, batch)


_BF16 = torch.bfloat16
_PEER: dict[str, Any] = {"network": "yolov9-t", "interpreter": "peers", "same": "yolov9-t", "package": "yolo9"}
_ULTRALYTICS: dict[str, Any] = {
    "network": "yolov9t without PGI",
    "interpreter": "peers",
    "same": "ultralytics",
    "package": "ultralytics",
}
ROWS = {
    "published": Row("published code", "nchw", build=published(), **_PEER),
    "published-cl": Row("published code", "channels_last", build=published("channels_last"), **_PEER),
    "published-bf16": Row(
        "published code, bf16", "channels_last", build=published("channels_last", amp=_BF16), dtype="bfloat16", **_PEER
    ),
    "accelerated": Row(
        "published code, accelerate", "channels_last", build=published("channels_last", accelerated=True), **_PEER
    ),
    "ours": Row("ours", "channels_last", "yolov9-t", "ours", "yolov9-t", ours()),
    "ours-bf16": Row("ours, bf16", "channels_last", "yolov9-t", "ours", "yolov9-t", ours(amp="bf16"), "bfloat16"),
    "ours-gelan": Row("ours", "channels_last", "gelan-t (without PGI)", "ours", "gelan-t", ours("gelan-t")),
    "ultralytics": Row("Ultralytics", "nchw", build=ultralytics(), **_ULTRALYTICS),
    "ultralytics-cl": Row("Ultralytics", "channels_last", build=ultralytics("channels_last"), **_ULTRALYTICS),
    "ultralytics-accelerated": Row(
        "Ultralytics, accelerate", "channels_last", build=ultralytics("channels_last", accelerated=True), **_ULTRALYTICS
    ),
    "libreyolo": Row("LibreYOLO", "nchw", "yolo9-t", "peers", "libreyolo", libreyolo(), package="libreyolo"),
}
"""By the words of `--rows`. The first of each `same` is what the others are compared with."""


class StepWorker:
    """Answers commands about one row."""

    def __init__(self) -> None:
        self._step: Step | None = None
        self._stack = ExitStack()

    def open(self, *, row: str, size: int, batch: int, threads: int) -> dict[str, Any]:
        """Build the row's step; its check, the version of its package, what `accelerate` reported."""
        torch.set_num_threads(threads)
        chosen = ROWS[row]
        package = peer_imports.version(chosen.package) if chosen.package else ""
        self._step = chosen.build(size, batch)
        self._stack.enter_context(self._step.around)
        check = self._step.check()
        self._step(NoClock())
        return {"check": check, "package": package, "reports": getattr(self._step, "reports", [])}

    def sample(self) -> dict[str, Any]:
        """One step behind an untimed one: seconds, those of its phases, whether the system took cores away from it."""
        assert self._step is not None
        self._step(NoClock())  # as in a loop: since the last sample the caches went to the other rows
        before = preemptions()
        seconds, phases, _ = timed_phases(self._step, CPU)
        disturbed = preemptions() - before > _PREEMPTIONS_A_SECOND * max(seconds, 0.1)
        return {"seconds": seconds, "phases": phases, "disturbed": disturbed}

    def memory(self) -> dict[str, Any]:
        """Of one more step: kernels, bytes allocated at the peak beyond those at its start, rise of resident memory."""
        assert self._step is not None
        step = self._step
        counts = counting.count(lambda: step(NoClock()), CPU)
        resident = counting.resident_peak(lambda: step(NoClock()))
        return {"launches": counts.kernels, "peak_bytes": counts.peak_bytes, "peak_resident_bytes": resident}


def main(words: Sequence[str]) -> int:
    return serve(StepWorker)
