"""How the kernels are launched: tensors seen as pixels × channels, what is constant in a kernel, a record of launches.

A tensor [N, C, H, W] is seen as images × pixels × channels: channels_last (and channel slices of it) as one image of
N·H·W pixels with channels side by side; planes (contiguous, and channel slices of it) as N images with pixels side by
side. One kernel serves both; the compile-time constant LAST says which.

Strides and the extent of the contiguous axis are passed in units of VEC elements (16 bytes where everything allows it,
else 1) and multiplied in the kernel: so the compiler knows the alignment without one variant per size, and no integer
argument is specialised.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether the kernels of this process run on the CPU, in Python; fixed by the environment when triton is imported."""


@dataclass(frozen=True)
class Launch:
    """One compiled form of a kernel: what `triton.compile` needs. Equal launches share their machine code."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    warps: int
    stages: int
    registers: int | None


_record: list[Launch] | None = None
_record_capability: int | None = None
kernels: dict[str, "Kernel"] = {}
"""Every kernel of the modules imported so far, by name."""


@contextmanager
def recording(capability: int) -> Iterator[list[Launch]]:
    """Within the block launches are noted as for a GPU of this compute capability (90 = 9.0), and nothing runs.

    Launchers then take meta tensors too.
    """
    global _record, _record_capability
    before = _record, _record_capability
    _record, _record_capability = [], capability
    try:
        yield _record
    finally:
        _record, _record_capability = before


def capability_of(device: torch.device) -> int | None:
    """Compute capability (90 = 9.0) of the GPU that a launch is for; None when interpreted."""
    if _record_capability is not None:
        return _record_capability
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class Kernel:
    """A Triton function whose pointers are named `…_ptr`, and which specialises nothing but its constants.

    `streams`: its time is that of moving whole tensors, so that 16-byte accesses are expected of it.
    `roomy`: a thread of up to so many warps may take all registers. Left alone ptxas aims at as many threads on a
    multiprocessor as it thinks best, and spills to get there: in some variants of these kernels, and where VEC is 1.
    """

    def __init__(self, function: Callable[..., Any], streams: bool, roomy: int) -> None:
        parameters = inspect.signature(function).parameters
        self.name = function.__name__
        self.streams = streams
        self.roomy = roomy
        self.constants = [name for name, p in parameters.items() if p.annotation is tl.constexpr]
        self.arguments = [name for name in parameters if name not in self.constants]
        unspecialised = [name for name in self.arguments if not name.endswith("_ptr")]
        self.function = triton.jit(function, do_not_specialize=unspecialised)
        kernels[self.name] = self

    def __call__(self, grid: Sequence[int], *arguments: Any, warps: int, stages: int = 1, **constants: Any) -> None:
        """Launch on the current stream of the device of the first tensor; an empty grid launches nothing."""
        if 0 in grid:
            return
        if _record is not None:
            _record.append(self.describe(arguments, constants, warps, stages))
            return
        device = next(value.device for value in arguments if isinstance(value, Tensor))
        if device.type == "cuda":
            with torch.cuda.device(device):
                room = self.registers(warps, constants)
                self.function[tuple(grid)](*arguments, **constants, num_warps=warps, num_stages=stages, maxnreg=room)
        elif INTERPRETED:
            self.function[tuple(grid)](*arguments, **constants)
        else:
            raise RuntimeError(
                f"{self.name}: Triton kernels take CUDA tensors, or CPU tensors when TRITON_INTERPRET=1 is set "
                f"before triton is imported; got a tensor on {device.type}"
            )

    def registers(self, warps: int, constants: dict[str, Any]) -> int | None:
        """The most registers of a thread; None leaves it to ptxas."""
        roomy = warps <= self.roomy or constants.get("VEC") == 1
        return min(255, 65536 // (32 * warps)) if roomy else None

    def describe(self, arguments: Sequence[Any], constants: dict[str, Any], warps: int, stages: int) -> Launch:
        signature = dict.fromkeys([*self.arguments, *self.constants], "constexpr")
        fixed: dict[str, Any] = {}
        aligned = []
        for name, value in zip(self.arguments, arguments, strict=True):
            if value is None:
                fixed[name] = None
            elif isinstance(value, Tensor):
                signature[name] = "*" + _TYPE_NAMES[value.dtype]
                if address(value) % 16 == 0:
                    aligned.append(name)
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        return Launch(
            self.name,
            tuple(signature.items()),
            tuple((fixed | constants).items()),
            tuple(aligned),
            warps,
            stages,
            self.registers(warps, constants),
        )


def kernel(streams: bool = True, roomy: int = 0) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorator: make a function a `Kernel`; it is then in the list that ahead-of-time builds go through."""
    return lambda function: Kernel(function, streams, roomy)


def address(x: Tensor) -> int:
    """Address of the first element; of a meta tensor, as if its storage began on a page."""
    return x.storage_offset() * x.element_size() if x.device.type == "meta" else x.data_ptr()


@dataclass(frozen=True)
class View:
    """A tensor [N, C, H, W] as images × pixels × channels; strides in elements.

    `last`: channels are side by side and `stride` goes from pixel to pixel (then images is 1: pixels run through the
    batch). Otherwise pixels are side by side and `stride` goes from channel to channel.
    """

    data: Tensor
    last: bool
    images: int
    pixels: int
    channels: int
    image_stride: int
    stride: int

    def vector(self) -> int:
        """Elements of one 16-byte access, or 1 where strides, the extent or the address do not allow it."""
        size = 16 // self.data.element_size()
        contiguous = self.channels if self.last else self.pixels
        fits = all(value % size == 0 for value in (contiguous, self.stride, self.image_stride))
        return size if fits and address(self.data) % 16 == 0 else 1


def pixel_view(x: Tensor) -> View | None:
    """`x` with channels side by side and one stride for all pixels, None where it does not lie so."""
    n, c, h, w = x.shape
    stride_n, stride_c, stride_h, stride_w = x.stride()
    if c > 1 and stride_c != 1:
        return None
    steps = [
        (size, stride, pixels) for size, stride, pixels in ((w, stride_w, 1), (h, stride_h, w), (n, stride_n, h * w))
    ]
    steps = [step for step in steps if step[0] > 1]
    if not steps:
        return View(x, True, 1, n * h * w, c, 0, max(c, 1))
    stride = steps[0][1] // steps[0][2]
    if stride < c or any(step != stride * pixels for _, step, pixels in steps):
        return None
    return View(x, True, 1, n * h * w, c, 0, stride)


def plane_view(x: Tensor) -> View | None:
    """`x` with dense planes [H, W], None where it does not lie so."""
    n, c, h, w = x.shape
    stride_n, stride_c, stride_h, stride_w = x.stride()
    if (w > 1 and stride_w != 1) or (h > 1 and stride_h != w):
        return None
    if c == 1:
        stride_c = h * w
    if n == 1:
        stride_n = c * stride_c
    if stride_c < h * w or stride_n < h * w:  # expanded tensors share memory between channels or images
        return None
    return View(x, False, n, h * w, c, stride_n, stride_c)


def views(*tensors: Tensor, written: Sequence[Tensor] = ()) -> list[View]:
    """Views of all `tensors` and then all `written`, in one layout: the first that the first tensor and `written` have.

    Tensors that lie otherwise are copied into it. `written` ones cannot be: `ValueError` names shape and strides.
    """
    for tensor in (*tensors, *written):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"the Triton kernels take float32, bfloat16 and float16, got {tensor.dtype}")
    candidates = [view for view in (pixel_view, plane_view) if all(view(tensor) for tensor in written)]
    if not candidates:
        got = ", ".join(f"{list(tensor.shape)} with strides {list(tensor.stride())}" for tensor in written)
        raise ValueError(f"outputs must be channels_last, contiguous, or slices of channels of such tensors, got {got}")
    view = next((view for view in candidates if view(tensors[0])), candidates[0])
    return [view(tensor) or _copied(tensor, view) for tensor in (*tensors, *written)]


def _copied(tensor: Tensor, view: Callable[[Tensor], View | None]) -> View:
    layout = torch.channels_last if view is pixel_view else torch.contiguous_format
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout).copy_(tensor)
    found = view(copy)
    assert found is not None
    return found


def dense_like(view: View, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> View:
    """A view of an uninitialised dense tensor in the layout of `view`."""
    data = torch.empty(
        tuple(shape if shape is not None else view.data.shape),
        dtype=dtype or view.data.dtype,
        device=view.data.device,
        memory_format=torch.channels_last if view.last else torch.contiguous_format,
    )
    found = (pixel_view if view.last else plane_view)(data)
    assert found is not None
    return found


def vector_of(*all_views: View | None) -> int:
    """Elements of one access that suits all views: 16 bytes, or 1 element when any of them is not aligned for that."""
    return min(view.vector() for view in all_views if view is not None)


def parameters(*tensors: Tensor | None) -> list[Tensor | None]:
    """Per-channel vectors as the kernels read them: dense float32."""
    return [None if tensor is None else tensor.detach().float().contiguous() for tensor in tensors]


def affine(weight: Tensor | None, bias: Tensor | None, channels: int, device: torch.device) -> list[Tensor | None]:
    """Weight and bias as float32, both or neither: kernels have one variant with and one without them."""
    if weight is None and bias is None:
        return [None, None]
    if weight is None:
        weight = torch.ones(channels, device=device)
    if bias is None:
        bias = torch.zeros(channels, device=device)
    return parameters(weight, bias)


_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def as_stored(value, ptr):
    """A float32 `value` in the dtype that `ptr` points to, rounded to the nearest even."""
    if _INTERPRETED:
        # Triton 3.7's interpreter truncates to bfloat16; a GPU rounds.
        if ptr.dtype.element_ty == tl.bfloat16:
            bits = value.to(tl.int32, bitcast=True)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
            value = tl.where(value == value, rounded, value)
    return value.to(ptr.dtype.element_ty)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b, summed in float32."""
    if _INTERPRETED:
        # Triton 3.7's interpreter multiplies the bits of bfloat16, not their values.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_offsets(pixels, channels, stride, LAST: tl.constexpr):
    """Offsets [pixels, channels] within one image; both vectors count from the tile's origin."""
    if LAST:
        return pixels[:, None] * stride + channels[None, :]
    else:
        return pixels[:, None] + channels[None, :] * stride


@triton.jit
def origin(image, pixel, channel, image_stride, stride, LAST: tl.constexpr):
    """64-bit offset of a tile's origin: tensors exceed 2^31 elements, tiles do not."""
    if LAST:
        return pixel.to(tl.int64) * stride + channel
    else:
        return image.to(tl.int64) * image_stride + channel.to(tl.int64) * stride + pixel


@triton.jit
def pixel_offsets(n, y, x, height, width, image_stride, stride, LAST: tl.constexpr):
    """64-bit offsets of pixels (vectors n, y, x) in a tensor of height × width pixels."""
    if LAST:
        return ((n * height + y) * width + x).to(tl.int64) * stride
    else:
        return n.to(tl.int64) * image_stride + (y * width + x)


@triton.jit
def channel_offsets(channels, stride, LAST: tl.constexpr):
    if LAST:
        return channels
    else:
        return channels.to(tl.int64) * stride
