"""Where and how a network computes: devices, precision, determinism, image preparation, loader processes."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from yolov9_fast._untrusted import reason, shown
from yolov9_fast.errors import UserError
from yolov9_fast.limits import above_limit, limit
from yolov9_fast.models import DetectionModel, fuse
from yolov9_fast.models.model import MAX_STRIDE

log = logging.getLogger(__name__)
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CPU_UNITS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
_Module = TypeVar("_Module", bound=nn.Module)


def parse_device(device: str | None, local_rank: int = 0) -> torch.device:
    """`cpu`, a CUDA index as `0` or `cuda:0`, a list `0,1` (one process each), or None for a GPU if there is one.

    Raises:
        UserError: a device that this machine does not have.
    """
    if device in (None, "", "auto"):
        device = str(local_rank) if torch.cuda.is_available() else "cpu"
    assert device is not None
    if device in ("cpu", "cpu:0"):
        return torch.device("cpu")
    numbers = [str(local_rank)] if device == "cuda" else device_numbers(device)
    if not numbers or not all(part.isdigit() for part in numbers):
        raise UserError(f"device: expected cpu, or CUDA indices such as 0 or 0,1, got {shown(device)}")
    if not torch.cuda.is_available():
        raise UserError(
            f"device: expected cpu because this PyTorch sees no CUDA GPU, got {shown(device)}; use --device cpu"
        )
    index = int(numbers[local_rank] if len(numbers) > 1 else numbers[0])
    if len(numbers) == 1 and local_rank:
        index = local_rank
    if index >= torch.cuda.device_count():
        raise UserError(f"device: expected a CUDA index below {torch.cuda.device_count()}, got {index}")
    return torch.device("cuda", index)


def device_numbers(device: str | None) -> list[str]:
    """The parts of `0,1` or `cuda:0,1`."""
    return [part for part in (device or "").removeprefix("cuda:").split(",") if part]


def single_device(device: str | int | torch.device | None) -> torch.device:
    """The device of a command that runs in one process; raises `UserError` for a list or a missing device."""
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device | None):
        raise UserError(f"device: expected cpu or a CUDA index, got {type(device).__name__}")
    device = None if device is None else str(device)
    if device and "," in device:
        raise UserError(f"device: expected one device (this command runs in one process), got {shown(device)}")
    return parse_device(device)


def default_workers(processes: int, batch: int) -> int:
    """Loader processes of each training process: the cores left over, at most 8, and at most one per image."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(max(cores // processes - 1, 0), batch, 8)


def resolve_amp(amp: str, device: torch.device) -> str:
    """`amp` with `auto` resolved as `automatic_amp` says; raises `UserError` for another word."""
    if amp not in ("auto", "off", *_DTYPES):
        raise UserError(f"amp: expected auto, off, {' or '.join(_DTYPES)}, got {shown(amp)}")
    if amp == "auto":
        return automatic_amp(device)[0]
    if amp == "bf16" and not has_bf16(device):
        others = "fp16 and off are" if device.type == "cuda" else "off is"
        log.warning(f"amp: {device} emulates bf16, which is slow; {others} not")
    return amp


def automatic_amp(device: torch.device) -> tuple[str, str]:
    """What `auto` means on this device, and why."""
    if device.type == "cuda":
        return ("bf16", "it computes in bf16") if has_bf16(device) else ("off", "it emulates bf16")
    units = cpu_bf16_units()
    if not units:
        return "off", "the processor has neither AVX512-BF16 nor AMX-BF16"
    return "bf16", f"the processor has {' and '.join(units)}"


def has_bf16(device: torch.device) -> bool:
    """Whether this device computes in bfloat16 itself: NVIDIA's GPUs from compute capability 8.0 on, AMD's, and CPUs
    with units for it; others emulate it.

    `torch.cuda.is_bf16_supported()` counts emulation too, and asks about the current device.
    """
    if device.type != "cuda":
        return cpu_bf16_units() != []
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def cpu_bf16_units() -> list[str]:
    """The units of this processor that compute in bfloat16, by torch's own query: AVX512-BF16, AMX-BF16."""
    cpu: Any = torch.cpu
    if hasattr(cpu, "get_capabilities"):
        found = cpu.get_capabilities()
        return [name for key, name in _CPU_UNITS.items() if found.get(key)]
    # torch before 2.11; every processor with AMX has AVX512-BF16 too
    return ["AVX512-BF16"] if cpu._is_avx512_bf16_supported() else []


@contextlib.contextmanager
def computing_on(
    device: torch.device, *, fixed_sizes: bool | None = None, deterministic: bool = False
) -> Iterator[None]:
    """Within the block `device` is the current one, so that nothing opens a context on another GPU.

    Args:
        fixed_sizes: whether all images have one size, so that cuDNN may time its algorithms (`cudnn.benchmark`); not
            where deterministic algorithms are asked for. None leaves that setting alone.
        deterministic: the same input gives the same bits, by `torch.use_deterministic_algorithms`.

    All settings are as before at the end.

    Raises:
        UserError: an operation that has no deterministic form, or as `prepare_determinism`.
    """
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark
    with contextlib.ExitStack() as stack:
        if deterministic:
            prepare_determinism(device)
            stack.callback(torch.use_deterministic_algorithms, before[0], warn_only=before[1])
            torch.use_deterministic_algorithms(True)
        if deterministic or fixed_sizes is not None:
            stack.callback(_set_cudnn, *flags)
            fixed = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
            _set_cudnn(fixed, not fixed and (flags[1] if fixed_sizes is None else fixed_sizes))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        try:
            yield
        except RuntimeError as error:
            if not deterministic or "use_deterministic_algorithms" not in str(error):
                raise
            raise UserError(f"deterministic: {reason(RuntimeError(str(error).split(', but you set')[0]))}") from error


def _set_cudnn(deterministic: bool, benchmark: bool) -> None:
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark


def prepare_determinism(device: torch.device) -> None:
    """Set the variable that cuBLAS needs for the same bits in every run, unless the user has; before CUDA starts.

    Raises:
        UserError: CUDA has started without it.
    """
    if device.type != "cuda" or _WORKSPACE in os.environ:
        return
    if torch.cuda.is_initialized():
        raise UserError(f"deterministic: expected {_WORKSPACE}=:4096:8 before the first use of CUDA, got it unset")
    os.environ[_WORKSPACE] = ":4096:8"


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast for an `amp` of off, bf16 or fp16."""
    return contextlib.nullcontext() if amp == "off" else torch.autocast(device.type, dtype=_DTYPES[amp])


def round_image_size(size: int) -> int:
    """`size` in pixels, rounded up to a multiple of the largest stride; a log line tells if that changes it.

    Raises:
        UserError: a square of that side has more than `limit("IMAGE_PIXELS")`.
    """
    if size * size > limit("IMAGE_PIXELS"):
        raise UserError(f"imgsz: {above_limit('IMAGE_PIXELS', size * size)}")
    rounded = -(-size // MAX_STRIDE) * MAX_STRIDE
    if rounded != size:
        log.info(f"image size {size} is not a multiple of {MAX_STRIDE}: using {rounded}")
    return rounded


def prepare_images(images: Tensor, device: torch.device, *, channels_last: bool = False) -> Tensor:
    """uint8 images [B, 3, H, W] on `device` as float32 in [0, 1]."""
    images = images.to(device, non_blocking=True)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images.float().div_(255)


def to_channels_last(module: _Module) -> _Module:
    """Convert the weights of `module` to the channels_last memory format, in place."""
    nn.Module.to(module, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def inference_model(model: DetectionModel, device: torch.device, amp: str = "off") -> DetectionModel:
    """A fused copy of `model` in evaluation mode, on `device`, in channels_last memory format.

    It is float32, but with an `amp` of bf16 or fp16 the weights of convolutions have that dtype: to run under
    `autocast`, which would convert them in each call.
    """
    if any(value.is_floating_point() and value.dtype != torch.float32 for value in model.state_dict().values()):
        model = copy.deepcopy(model).float()
    fused = to_channels_last(fuse(model).to(device).eval())
    if amp != "off":
        for module in fused.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.to(_DTYPES[amp])
    return fused
