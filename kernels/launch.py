"""What all kernels share: views of maps as pixels × channels, the launch itself, a record of launches, offsets.

A map [N, C, H, W] is read as images × pixels × channels: a channels_last one (or a channel slice of it) as one image of
N·H·W pixels whose channels are contiguous; a contiguous one (or a channel slice of it) as N images of H·W contiguous
pixels per channel. One kernel serves both; the compile-time constant LAST says which.

Strides and the extent of the contiguous axis are passed in units of VEC elements (16 bytes where all tensors allow it,
else 1) and multiplied in the kernel: the compiler knows the alignment without one variant per size, and no integer
argument is specialised.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from yolov9_fast.kernels.replay import noting, paused

from yolov9_fast._layout import empty_map, image_stride, memory_format_of, row_stride, telling

_Function = TypeVar("_Function", bound=Callable[..., Any])
if TYPE_CHECKING:

    def jit(function: _Function) -> _Function:
        """`triton.jit` with a type: triton has none, and an untyped decorator would make its function untyped."""
        return function

else:
    jit = triton.jit

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
"""Whether this process interprets the kernels on the CPU; fixed by the environment when triton is imported."""


@dataclass(frozen=True)
class Launch:
    """One variant of a kernel: what `triton.compile` needs. Equal launches share their machine code.

    `moved`: bytes of the tensors among its arguments; no part of the variant.
    """

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    warps: int
    stages: int
    registers: int | None
    moved: int = field(default=0, compare=False)


_record: list[Launch] | None = None
_record_capability: int | None = None
kernels: dict[str, "Kernel"] = {}
"""Every kernel of the modules imported so far, by name."""


@contextmanager
def recording(capability: int) -> Iterator[list[Launch]]:
    """Within the block launches are recorded as for a GPU of this compute capability (90 = 9.0), and nothing runs.

    Launchers then take meta tensors too.
    """
    global _record, _record_capability
    before = _record, _record_capability
    _record, _record_capability = [], capability
    try:
        with paused():
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
    """A Triton function whose pointers are named `…_ptr` and of which only constants and None are specialised.

    An argument that is None, a pointer or its strides, is a constant: `if x2_ptr is not None` costs nothing.

    Args:
        function: its body; several kernels may share one, such as one per number of inputs.
        name: of the kernel in tuning records, tables and profiles.
        streams: whether it mostly moves whole tensors, so that 16-byte accesses are expected of it.
        roomy: up to how many warps a thread may take all registers. Otherwise ptxas aims at as many threads on a
            multiprocessor as it thinks best, and in some variants spills for it. So it is too where VEC is 1.
    """

    def __init__(self, function: Callable[..., Any], name: str, streams: bool, roomy: int) -> None:
        parameters = inspect.signature(function).parameters
        self.name = name
        self.streams = streams
        self.roomy = roomy
        self.constants = [name for name, p in parameters.items() if p.annotation is tl.constexpr]
        self.arguments = [name for name in parameters if name not in self.constants]
        unspecialised = [name for name in self.arguments if not name.endswith("_ptr")]
        self.function = triton.jit(function, do_not_specialize=unspecialised, repr=lambda _: self.name)
        kernels[self.name] = self

    def __call__(self, grid: Sequence[int], *arguments: Any, warps: int, stages: int = 1, **constants: Any) -> None:
        """Launch on the current stream of the device of the first tensor; an empty grid launches nothing."""
        if 0 in grid:
            return
        if _record is not None:
            _record.append(self.describe(arguments, constants, warps, stages))
            return
        device = next(value.device for value in arguments if isinstance(value, Tensor))
        tape = noting.tape
        if tape is not None:
            tape.launching = True
        if device.type == "cuda":
            with torch.cuda.device(device):
                registers = self.registers(warps, constants)
                compiled = self.function[tuple(grid)](
                    *arguments, **constants, num_warps=warps, num_stages=stages, maxnreg=registers
                )
            if tape is not None:
                tape.note_launch([*arguments, *(constants[name] for name in self.constants)], compiled, grid)
        elif INTERPRETED:
            interpret = functools.partial(self.function[tuple(grid)], **constants)
            interpret(*arguments)
            if tape is not None:
                tape.note_launch(arguments, interpret, grid)
        else:
            raise RuntimeError(
                f"{self.name}: expected CUDA tensors, or CPU tensors with TRITON_INTERPRET=1 set before triton is "
                f"imported, got a tensor on {device.type}"
            )
        if tape is not None:
            tape.launching = False

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
            sum(value.nbytes for value in arguments if isinstance(value, Tensor)),
        )


def kernel(streams: bool = True, roomy: int = 0) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorator: make a function a `Kernel` of its name, which ahead-of-time builds then include."""
    return lambda function: Kernel(function, function.__name__, streams, roomy)


def address(x: Tensor) -> int:
    """Address of the first element; of a meta tensor, as if its storage began on a page."""
    return int(x.storage_offset()) * x.element_size() if x.device.type == "meta" else x.data_ptr()


@dataclass(frozen=True)
class View:
    """A map [N, C, H, W] as images × pixels × channels; strides in elements.

    `last`: channels are contiguous, `stride` is that of pixels, and images is 1: pixels run through the batch.
    Otherwise the pixels of an image are contiguous and `stride` is that of channels.
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


def view_of(x: Tensor, last: bool) -> View | None:
    """`x` as a channels_last (`last`) or contiguous map or a channel slice of such a map; None where it is neither."""
    n, c, h, w = x.shape
    stride = row_stride(x) if last else image_stride(x)
    if stride is None:
        return None
    return View(x, True, 1, n * h * w, c, 0, stride) if last else View(x, False, n, h * w, c, stride, h * w)


def views(*tensors: Tensor, written: Sequence[Tensor] = ()) -> list[View]:
    """Views of all `tensors`, then of all `written`, in one layout: that of the tensors where `written` allow it.

    It is the `memory_format_of` the first tensor, or where this has both layouts, of the first that has one only. Of
    `tensors` those in another layout are copied. Raises `TypeError` for other dtypes than float32, bfloat16 and
    float16, and `ValueError` where `written` have no layout in common.
    """
    for tensor in (*tensors, *written):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {tensor.dtype}")
    possible = [last for last in (True, False) if all(view_of(tensor, last) for tensor in written)]
    if not possible:
        got = ", ".join(f"{list(tensor.shape)} with strides {list(tensor.stride())}" for tensor in written)
        raise ValueError(f"out: expected channels_last, contiguous, or channel slices of such tensors, got {got}")
    first = tensors[0]
    last, contiguous = row_stride(first) is not None, image_stride(first) is not None
    if last == contiguous:
        last = memory_format_of(telling(tensors) if last else first) == torch.channels_last
    if last not in possible:
        last = possible[0]
    return [view_of(tensor, last) or _copied(tensor, last) for tensor in (*tensors, *written)]


def _copied(tensor: Tensor, last: bool) -> View:
    layout = torch.channels_last if last else torch.contiguous_format
    found = view_of(tensor.clone(memory_format=layout), last)
    assert found is not None
    return found


def dense_like(
    view: View, channels: int | None = None, size: tuple[int, int] | None = None, dtype: torch.dtype | None = None
) -> View:
    """A view of an uninitialised map `empty_map(view.data, channels, size, dtype)`, in the layout of `view`."""
    found = view_of(empty_map(view.data, channels, size, dtype), view.last)
    assert found is not None
    return found


def vector_of(*all_views: View | None) -> int:
    """Elements of one access that suits all views: 16 bytes, or 1 element when any of them is not aligned for that."""
    return min(view.vector() for view in all_views if view is not None)


def data_of(*all_views: View | None) -> list[Tensor | None]:
    return [None if view is None else view.data for view in all_views]


def strides_of(vector: int, *all_views: View | None) -> list[int | None]:
    """Image stride and stride of each view in units of `vector`, None for an absent view."""
    pairs = [(None, None) if view is None else (view.image_stride, view.stride) for view in all_views]
    return [None if stride is None else stride // vector for pair in pairs for stride in pair]


def vector_in_float(x: Tensor) -> Tensor:
    """A per-channel vector as the kernels read it: contiguous float32."""
    return x.float().contiguous()


def affine(weight: Tensor | None, bias: Tensor | None, like: View) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias as float32, both or neither: kernels have one variant with and one without them."""
    if weight is None and bias is None:
        return None, None
    weight = torch.ones(like.channels, device=like.data.device) if weight is None else vector_in_float(weight)
    bias = torch.zeros(like.channels, device=like.data.device) if bias is None else vector_in_float(bias)
    return weight, bias


_INTERPRETED = tl.constexpr(INTERPRETED)


@jit
def as_stored(value: tl.tensor, ptr: tl.tensor) -> tl.tensor:
    """A float32 `value` in the dtype that `ptr` points to, rounded to the nearest even."""
    if _INTERPRETED:
        # Triton 3.7's interpreter truncates to bfloat16; a GPU rounds.
        if ptr.dtype.element_ty == tl.bfloat16:
            bits = value.to(tl.int32, bitcast=True)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
            value = tl.where(value == value, rounded, value)
    return value.to(ptr.dtype.element_ty)


@jit
def to_tf32(x: tl.tensor) -> tl.tensor:
    """Float32 rounded to the 10 bits of TF32: to the nearest, ties away from zero."""
    if _INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        return tl.where(finite, (bits + 0x1000) & -8192, bits).to(tl.float32, bitcast=True)
    else:
        bits = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], tl.int32, is_pure=True, pack=1)
        return bits.to(tl.float32, bitcast=True)


@jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """acc + a · b, summed in float32."""
    if PRECISION == "tf32" and a.dtype == tl.float32:
        # Tensor cores cut the 13 low bits off: twice the error, and always towards zero, so that sums drift.
        a = to_tf32(a)
        b = to_tf32(b)
    if _INTERPRETED:
        # Triton 3.7's interpreter multiplies the bits of bfloat16, not their values.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def tile_offsets(pixels: tl.tensor, channels: tl.tensor, stride: tl.tensor, LAST: tl.constexpr) -> tl.tensor:
    """Offsets [pixels, channels] within one image; both vectors count from the tile's origin."""
    if LAST:
        return pixels[:, None] * stride + channels[None, :]
    else:
        return pixels[:, None] + channels[None, :] * stride


@jit
def origin(
    image: tl.tensor,
    pixel: tl.tensor,
    channel: tl.tensor,
    image_stride: tl.tensor,
    stride: tl.tensor,
    LAST: tl.constexpr,
) -> tl.tensor:
    """64-bit offset of a tile's origin: tensors exceed 2^31 elements, tiles do not."""
    if LAST:
        return pixel.to(tl.int64) * stride + channel
    else:
        return image.to(tl.int64) * image_stride + channel.to(tl.int64) * stride + pixel
