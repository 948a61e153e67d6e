"""What a training step or a prediction does on a GPU, traced with fake tensors. See the package's docstring."""

from __future__ import annotations

from tests import fake_cuda

fake_cuda.start()

import argparse  # noqa: E402
import json  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager, nullcontext  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from bench.counting import works  # noqa: E402
from yolov9_fast.engine.device import prepare_images  # noqa: E402
from yolov9_fast.engine.ema import ModelEMA  # noqa: E402
from yolov9_fast.engine.optimizer import build_optimizer  # noqa: E402
from yolov9_fast.losses import DetectionLoss  # noqa: E402
from yolov9_fast.losses.targets import PaddedTargets  # noqa: E402
from yolov9_fast.models import create_model, fuse, to_deploy  # noqa: E402
from yolov9_fast.nn import plan  # noqa: E402
from yolov9_fast.ops import _batch_norm, _probe, nms  # noqa: E402

CLASSES = 80
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Record(TorchDispatchMode):
    """Counts what the dispatcher is asked for, and the maps at operators that are not channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.host_copies: Counter[str] = Counter()
        self.data_dependent: Counter[str] = Counter()
        self.not_channels_last: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        try:
            result = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            self.data_dependent[name] += 1
            raise
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(result))
        devices = {tensor.device.type for tensor in (*inputs, *outputs) if tensor.dim()}
        if {"cpu", "cuda"} <= devices:
            self.host_copies[name] += 1
        elif (
            works(name)
            and not name.startswith("prim::")
            and "cuda" in {tensor.device.type for tensor in (*inputs, *outputs)}
        ):
            self.launches[name] += 1
        if name.startswith("yolov9_fast::") or "convolution" in name:
            for tensor in (*inputs, *outputs):
                if _is_map(tensor) and not tensor.is_contiguous(memory_format=torch.channels_last):
                    self.not_channels_last.update([name] * (not _is_slice(tensor)))
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _is_map(tensor: Tensor) -> bool:
    """A map of features: more than one pixel and one channel, more than a weight's few."""
    return tensor.dim() == 4 and tensor.shape[1] > 1 and tensor.shape[2] * tensor.shape[3] > 9


def _is_slice(tensor: Tensor) -> bool:
    """Channels of a larger channels_last map."""
    return tensor.stride(1) == 1 and tensor.stride(3) >= tensor.shape[1]


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """What torch.cuda says of an H100, and cuDNN's choice of memory format, which the CPU build does not know."""
    convolution = torch._C._conv_determine_backend_memory_format
    plan._PLAIN = (*plan._PLAIN, FakeTensor)  # type: ignore[assignment]  # fused as tensors of a GPU are

    def memory_format(image: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
        def last(tensor: Tensor) -> bool:
            return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)

        free = (last(image) and not image.is_contiguous()) or (last(weight) and not weight.is_contiguous())
        return torch.channels_last if free or (image.dim() == 4 and image.stride(1) == 1) else torch.contiguous_format

    torch._C._conv_determine_backend_memory_format = memory_format
    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "is_bf16_supported": lambda *args, **kwargs: True,
    }
    before = {name: getattr(torch.cuda, name) for name in replaced}
    usable = {(backend, index): None for backend in _probe.LAUNCHES for index in range(2)}
    try:
        _probe._known.update(usable)
        for name, function in replaced.items():
            setattr(torch.cuda, name, function)
        yield
    finally:
        _probe._known.clear()
        torch._C._conv_determine_backend_memory_format = convolution
        for name, function in before.items():
            setattr(torch.cuda, name, function)


def to_cuda(model: nn.Module) -> None:
    """Replace parameters and buffers by fake ones on "cuda" with the same strides."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_like(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _like(buffer)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def autocast(amp: str) -> Any:
    return nullcontext() if amp == "off" else torch.autocast("cuda", dtype=TYPES[amp])


def trace_step(network: str, batch: int, size: int, amp: str) -> dict[str, Any]:
    """One training step: image conversion, forward, loss, backward, clipping, optimiser, moving average."""
    model = nn.Module.to(create_model(network, CLASSES), memory_format=torch.channels_last).train()
    record = Record()
    phases: dict[str, dict[str, int]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_cuda(model)
        average, optimizer = ModelEMA(model), build_optimizer(model, "sgd", lr=0.01, momentum=0.9, weight_decay=5e-4)
        for group in optimizer.param_groups:
            group["foreach"] = True  # as torch chooses for parameters on a GPU, but not for fake ones
        criterion = DetectionLoss(CLASSES)
        images = torch.empty(batch, 3, size, size, device="cuda", dtype=torch.uint8)
        truth = PaddedTargets(
            torch.zeros(batch, 40, dtype=torch.int64, device="cuda"),
            torch.zeros(batch, 40, 4, device="cuda"),
            torch.zeros(batch, 40, dtype=torch.bool, device="cuda"),
        )
        device = torch.device("cuda", 0)
        state: dict[str, Any] = {}

        def forward() -> None:
            state["images"] = prepare_images(images, device, channels_last=True)
            with autocast(amp):
                state["output"] = model(state["images"])

        def loss() -> None:
            state["loss"] = criterion(state["output"], truth, (size, size)).total

        def step() -> None:
            parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
            nn.utils.clip_grad_norm_(parameters, 10.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(model)

        parts = {"forward": forward, "loss": loss, "backward": lambda: state["loss"].backward(), "step": step}
        for phase in parts.values():  # the first step makes the optimiser's state
            phase()
        with record:
            for name, phase in parts.items():
                before = record.launches.copy()
                phase()
                phases[name] = dict(record.launches - before)
    return _report(record, phases)


def trace_inference(network: str, batch: int, size: int, amp: str) -> dict[str, Any]:
    """One prediction: image conversion, folded forward, decode, NMS."""
    model = nn.Module.to(fuse(to_deploy(create_model(network, CLASSES))), memory_format=torch.channels_last).eval()
    record = Record()
    make = _batch_norm.unit_statistics

    def unit_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        """Kept as those of real tensors are: there is one mode in this process."""
        made = make(x)
        return _batch_norm._units.setdefault((x.shape[1], made[0].dtype, x.device), made)

    _batch_norm.unit_statistics = unit_statistics
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        to_cuda(model)
        images = torch.empty(batch, 3, size, size, device="cuda", dtype=torch.uint8)

        def predict() -> None:
            prepared = prepare_images(images, torch.device("cuda", 0), channels_last=True)
            with autocast(amp):
                maps = model.raw(prepared, auxiliary=False).main
            nms(model.decode([map_.float() for map_ in maps]), conf=0.001)

        predict()  # the first call makes constants
        with record:
            predict()
    return _report(record, {"inference": dict(record.launches)})


def _report(record: Record, phases: dict[str, dict[str, int]]) -> dict[str, Any]:
    return {
        "launches": {name: sum(found.values()) for name, found in phases.items()},
        "by_operator": {name: dict(sorted(found.items(), key=lambda item: -item[1])) for name, found in phases.items()},
        "data_dependent": dict(record.data_dependent),
        "host_copies": dict(record.host_copies),
        "not_channels_last": dict(record.not_channels_last),
    }


TRACES: dict[str, Callable[[str, int, int, str], dict[str, Any]]] = {"step": trace_step, "inference": trace_inference}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("network")
    parser.add_argument("--what", choices=TRACES, default="step")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--amp", choices=("off", *TYPES), default="bf16")
    given = parser.parse_args()
    with pretended_gpu():
        print(json.dumps(TRACES[given.what](given.network, given.batch, given.size, given.amp)))


if __name__ == "__main__":
    main()
