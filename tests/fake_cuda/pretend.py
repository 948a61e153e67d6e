"""What torch says of a GPU that the CPU build does not know, replaced within a block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import optimizer
from torch.utils import _foreach_utils

from tests.fake_cuda.record import Record
from yolov9_fast.nn import plan
from yolov9_fast.ops import _batch_norm, _probe


class _Mode(FakeTensorMode):
    @property
    def avoid_device_init(self) -> bool:
        """No constant is computed on the device that `torch.cuda` says is there."""
        return True


@contextlib.contextmanager
def traced() -> Iterator[Record]:
    """Within the block two H100 are there, their tensors are fake, and the record counts where its phase says so."""
    record = Record()
    with contextlib.ExitStack() as stack:
        for owner, name, value in _replacements(record):
            _replace(stack, owner, name, value)
        for types in (_foreach_utils._foreach_supported_types, optimizer._foreach_supported_types):
            types.append(FakeTensor)
            stack.callback(types.remove, FakeTensor)
        stack.enter_context(_Mode(allow_non_fake_inputs=True))
        stack.enter_context(record)
        yield record


def _replacements(record: Record) -> list[tuple[Any, str, Any]]:
    make = _batch_norm.unit_statistics
    units: dict[Any, tuple[Tensor, Tensor]] = {}

    def unit_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        """Kept as those of real tensors are, but only within the block, whose mode they belong to."""
        key = (x.shape[1], _batch_norm.computed_in(x.dtype), x.device)
        if key not in units:
            units[key] = make(x)
        return units[key]

    class Event:
        """Of a stream that is never behind."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def record(self, *args: Any) -> None: ...
        def wait(self, *args: Any) -> None: ...
        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            record.wait()

        def elapsed_time(self, other: Any) -> float:
            return 1.0

    class Stream:
        """One of several, none of which is behind."""

        def __init__(self, device: Any = None) -> None: ...
        def wait_stream(self, other: Any) -> None: ...

    tensor_of = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        """Made on the host and copied, as torch does where no dispatcher mode sees it."""
        made = tensor_of(data, **options)
        return made if device is None else made.to(device)

    def new_tensor(like: Tensor, data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
        return tensor(data, dtype=dtype or like.dtype, device=device or like.device, **options)

    def values(tensor: Tensor) -> Any:
        record.wait()
        return np.zeros(tensor.shape, np.float64 if tensor.is_floating_point() else np.int64).tolist()

    found: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "is_bf16_supported": lambda *args, **kwargs: True,
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda device=None: Stream(),
        "Stream": Stream,
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
        "synchronize": lambda device=None: record.wait(),
        "Event": Event,
    }
    return [
        *((torch.cuda, name, value) for name, value in found.items()),
        (torch._C, "_conv_determine_backend_memory_format", _memory_format),
        (torch, "tensor", tensor),
        (FakeTensor, "new_tensor", new_tensor),
        (FakeTensor, "tolist", values),
        (nn.Module, "_apply", _apply),
        (plan, "_PLAIN", (Tensor, nn.Parameter, FakeTensor)),  # fused as tensors of a GPU are
        (_probe, "_known", {(backend, index): None for backend in _probe.LAUNCHES for index in range(2)}),
        (_batch_norm, "unit_statistics", unit_statistics),
        (_batch_norm, "_units", units),
    ]


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    if hasattr(owner, name):
        stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` with new parameters: a fake tensor cannot become another in place."""
    for each in module.modules() if recurse else [module]:
        for name, parameter in each._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    each._parameters[name] = nn.Parameter(function(parameter), parameter.requires_grad)
        for name, buffer in each._buffers.items():
            each._buffers[name] = None if buffer is None else function(buffer)
    return module


def _memory_format(image: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """cuDNN's choice, for which the CPU build answers contiguous."""

    def last(tensor: Tensor) -> bool:
        return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)

    free = (last(image) and not image.is_contiguous()) or (last(weight) and not weight.is_contiguous())
    return torch.channels_last if free or (image.dim() == 4 and image.stride(1) == 1) else torch.contiguous_format
