"""What the dispatcher is asked to do on a GPU that runs nothing: launches, waits, copies, layouts, casts.

Tensors on "cuda" are fake, tensors on the host are real and computed: a host's decision that depends on the host's own
values is taken as it would be. What the device would have to tell the host (a value, a copy) is noted and made up.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

from bench.counting import works
from tests.fake_cuda import ROOT, triton_launches
from tests.recording import tensors

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}
_OF_PROJECT = ("yolov9_fast", "kernels", "tests", "bench")
_COPIES = ("aten::_to_copy", "aten::copy_")
# Their result has a size that only the device knows, or is a value for the host.
_SIZED_BY_DATA = ("nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "unique_dim", "bincount")
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


class Record(TorchDispatchMode):
    """Counts by operator or by place (`file:function`), while `phase` has a name.

    Attributes:
        phase: what runs now; "" counts nothing.
        launches: phase → operator → kernels on the device. Triton kernels are those that the launchers launch, lists
            of tensors are split as torch's multi-tensor kernels do; a compiled operator of the package is one.
        waits: where the host waits for the device: a value, a result's size, a copy that blocks, a synchronisation.
        copies: where tensors pass between host and device.
        layouts: operators that read or write a map that is not channels_last, nor a slice of such a map.
        casts: "from → to, what" of conversions of dtype.
        wide: operators that take a float32 map, by name.
        slow_lists: operators on lists of tensors that launch once per tensor, because strides or dtypes differ.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.launches: dict[str, Counter[str]] = {}
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.layouts: Counter[str] = Counter()
        self.casts: Counter[str] = Counter()
        self.wide: Counter[str] = Counter()
        self.slow_lists: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split(".")[0]
        if name.startswith("prim::"):  # asks what is known
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func._can_decompose():  # elsewhere autograd does it
            with self:
                return func.decompose(*args, **kwargs)
        inputs = list(tensors((args, kwargs)))
        on_device = [tensor for tensor in inputs if tensor.device.type == "cuda"]
        device = kwargs.get("device")
        target = args[0].device.type if name == "aten::copy_" else device and torch.device(device).type
        if not on_device and target != "cuda":
            return self._on_host(func, args, kwargs)
        if name in ("aten::_local_scalar_dense", "aten::equal"):
            self.wait()
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if name in _COPIES and on_device and target == "cpu":
            return self._to_host(name, args, kwargs)
        if self._waits_for_size(name, args):
            self.wait()
        try:
            result = func(*args, **kwargs)
        except DynamicOutputShapeException:
            if name not in ("aten::nonzero", "aten::masked_select", "aten::bincount"):
                raise
            result = torch.empty((1, args[0].dim()) if name == "aten::nonzero" else 1, device=args[0].device)
            result = result.to(args[0].dtype if name == "aten::masked_select" else torch.int64)
        if not self.phase:
            return result
        outputs = list(tensors(result))
        if name in _COPIES and any(tensor.device.type == "cpu" for tensor in inputs):
            self._copy("host to device", blocks=not _non_blocking(name, args, kwargs))
            return result
        if any(tensor.device.type == "cpu" and tensor.dim() for tensor in inputs):
            self._copy("host to device", blocks=True)
            self._launched(name, self._number(name, args, kwargs, result))
        elif works(name) and (on_device or outputs):
            self._launched(name, self._number(name, args, kwargs, result))
        self._note_maps(name, inputs, outputs)
        return result

    def wait(self) -> None:
        """The host waits for the device at the caller's place."""
        if self.phase:
            self.waits[place()] += 1

    def _copy(self, what: str, blocks: bool) -> None:
        if self.phase:
            self.copies[f"{what}, {place()}"] += 1
            if blocks:
                self.wait()

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.name() == "aten::_pin_memory":  # the CPU build has no allocator of pinned memory
            return args[0].clone()
        with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
            return func(*args, **kwargs)

    def _to_host(self, name: str, args: Any, kwargs: Any) -> Tensor:
        self._copy("device to host", blocks=not _non_blocking(name, args, kwargs))
        target: Tensor = args[0]
        if name == "aten::copy_":
            return target
        with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
            return torch.zeros(target.shape, dtype=kwargs.get("dtype") or target.dtype)

    def _waits_for_size(self, name: str, args: Any) -> bool:
        operator = name.removeprefix("aten::")
        if operator in _INDEXED:  # a mask is turned into indices; filling by one value is not
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            return bool(masks) and not (operator.startswith("index_put") and args[2].numel() == 1)
        return operator in _SIZED_BY_DATA or (operator == "repeat_interleave" and len(args) < 2)

    def _launched(self, name: str, number: int) -> None:
        if number:
            self.launches.setdefault(self.phase, Counter())[name] += number

    def _number(self, name: str, args: Any, kwargs: Any, result: Any) -> int:
        """Kernels of one call."""
        if name == "aten::convolution":
            return 1 + (args[2] is not None)
        if name == "aten::convolution_backward":
            return sum(args[-1])
        if name.startswith("yolov9_fast::") and name.endswith("_triton"):
            return triton_launches.number(name, args)
        if "_foreach_" in name or name.startswith("aten::_fused_"):
            lists = [value for value in args if isinstance(value, (list, tuple)) and value and _is_list(value)]
            if isinstance(result, (list, tuple)) and _is_list(result) and "norm" not in name:
                lists.append(result)
            if not _fast(lists, copies="copy" in name):
                self.slow_lists[name] += 1
                return len(lists[0])
            return _multi_tensor_launches(lists) + (name == "aten::_foreach_norm")
        return 1

    def _note_maps(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        operator = name.startswith("yolov9_fast::") or "convolution" in name
        for tensor in (*inputs, *outputs) if operator else outputs:
            if is_map(tensor) and not (tensor.is_contiguous(memory_format=torch.channels_last) or _is_slice(tensor)):
                self.layouts[name] += 1
        if operator:
            self.wide[name] += any(is_map(tensor) and tensor.dtype == torch.float32 for tensor in inputs)
        if name == "aten::_to_copy" and inputs[0].dtype != outputs[0].dtype:
            what = "map" if is_map(outputs[0]) else "weight" if outputs[0].dim() == 4 else f"{outputs[0].dim()}-d"
            before, after = (_SHORT.get(tensor.dtype, str(tensor.dtype)) for tensor in (inputs[0], outputs[0]))
            self.casts[f"{before} → {after}, {what}"] += 1


def place() -> str:
    """`file:function` of the innermost caller in the project; "backward" where autograd calls."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.name not in ("record.py", "pretend.py", "trace.py", "triton_launches.py"):
            relative = path.relative_to(ROOT)
            if relative.parts[0] in _OF_PROJECT:
                return f"{relative}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "backward"


def is_map(tensor: Tensor) -> bool:
    """A map of features or of pixels: more than one channel, and more pixels than a weight has."""
    if tensor.dtype == torch.int64:
        return False
    return tensor.dim() == 4 and tensor.shape[1] > 1 and tensor.shape[2] * tensor.shape[3] > 9


def _is_slice(tensor: Tensor) -> bool:
    """Channels of a larger channels_last map."""
    return tensor.stride(1) == 1 and tensor.stride(3) >= tensor.shape[1]


def same_layout(tensor: Tensor, other: Tensor) -> bool:
    """Of one shape and, where there is more than one element to go to, of the same strides."""
    both = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    return tensor.shape == other.shape and all(size == 1 or own == others for size, own, others in both)


def _non_blocking(name: str, args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking", name == "aten::copy_" and len(args) > 2 and args[2]))


def _is_list(value: Sequence[Any]) -> bool:
    return all(isinstance(entry, Tensor) for entry in value)


# ---- operators on lists of tensors, by the rules of torch's ForeachUtils.h and MultiTensorApply.cuh

_TENSORS = (110, 64, 48, 36, 30)
"""Most tensors of each list in one launch, by the number of lists; seven times as many in builds for CUDA 13."""
_BLOCKS, _CHUNK = 320, 65536
"""Most blocks of one launch; elements of one block."""


def _fast(lists: Sequence[Sequence[Tensor]], copies: bool) -> bool:
    first = lists[0]
    if len({tensor.dtype for tensor in first}) > 1 or len({len(one) for one in lists}) > 1:
        return False
    for one in lists:
        for tensor, other in zip(one, first, strict=True):
            if not same_layout(tensor, other) or not (copies or tensor.dtype == other.dtype):
                return False
    return True


def _multi_tensor_launches(lists: Sequence[Sequence[Tensor]]) -> int:
    launches = held = blocks = 0
    most = _TENSORS[min(len(lists), len(_TENSORS)) - 1]
    for tensor in lists[0]:
        if not tensor.numel():
            continue
        held += 1
        for left in range(math.ceil(tensor.numel() / _CHUNK), 0, -1):
            blocks += 1
            if (left == 1 and held == most) or blocks == _BLOCKS:
                launches, blocks, held = launches + 1, 0, int(left > 1)
    return launches + (blocks > 0)
