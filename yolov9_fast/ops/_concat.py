"""Aggregation along the channels without a copy: producers write into slots of one buffer, gradients come as views.

CSP-ELAN aggregates [y0, y1, y2, y3] by one 1×1 convolution (YOLOv9, arXiv 2402.13616, section 4.1). Eager PyTorch
copies all parts into the concatenation; its backward pads the gradients of slices with zeros, copies and adds. Here:

    buffer = ConcatBuffer.like(x, (c, c, d, d))
    y = bn_silu(cv1(x), ..., out=buffer.slot(0, 2))     # both halves in one write
    y, y1 = tap(y, c)                                   # y for the aggregation, its second half for the next stage
    y2 = stage(y1, out=buffer.slot(2))
    y3 = stage(y2, out=buffer.slot(3))
    z = conv1x1(buffer.join(y, y2, y3), weight)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yolov9_fast._layout import dense, empty_map, layout_of, memory_format_of
from yolov9_fast.ops import _backend
from yolov9_fast.ops._checks import check_map, maps_of
from yolov9_fast.ops._operator import AutogradFunction, Compiled, Kernel, Operator, Python
from yolov9_fast.ops._supports import not_for_triton, not_on


class ConcatBuffer:
    """One tensor [B, ΣC, H, W] whose channel slices, the slots, are written by the producers of the parts.

    A buffer serves one forward: each slot is handed out once, because what was written there may be saved for the
    backward. Slots have a version counter of their own, so that filling one does not invalidate what autograd
    saved of another. A producer returns `out.expand_as(out)` from its `autograd.Function` after it wrote to `out`; the
    strides of `view_as` differ between real and fake tensors.
    """

    def __init__(
        self,
        size: tuple[int, int, int],
        channels: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        """`size`: batch, height, width; `channels`: of each slot, in the order of the concatenation."""
        if not channels or any(count < 1 for count in channels):
            raise ValueError(f"channels: expected positive numbers, got {list(channels)}")
        self.channels = list(channels)
        self._starts = [sum(self.channels[:index]) for index in range(len(self.channels) + 1)]
        self._free = [True] * len(self.channels)
        batch, height, width = size
        self._buffer = torch.empty(
            (batch, self._starts[-1], height, width), dtype=dtype, device=device, memory_format=memory_format
        )

    @classmethod
    def like(cls, x: Tensor, channels: Sequence[int], *, dtype: torch.dtype | None = None) -> ConcatBuffer:
        """A buffer of the batch, size, device, layout and dtype (unless another is given) of `x` [B, C, H, W]."""
        check_map("x", x)
        size = (x.shape[0], x.shape[2], x.shape[3])
        return cls(size, channels, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format_of(x))

    def slot(self, index: int, count: int = 1) -> Tensor:
        """The slice of `count` neighbouring slots from `index` on, [B, C, H, W], to be written by one producer.

        Raises `ValueError` for a slot that does not exist and `RuntimeError` for one that was handed out before.
        """
        if index < 0 or count < 1 or index + count > len(self.channels):
            raise ValueError(f"index: expected slots below {len(self.channels)}, got {index} to {index + count - 1}")
        if not all(self._free[index : index + count]):
            raise RuntimeError(
                "index: expected a slot that was not used before: a slot is written once, because autograd may have "
                "saved its values; make a new ConcatBuffer for each forward"
            )
        self._free[index : index + count] = [False] * count
        return _alias(self._buffer, self._starts[index], self._starts[index + count])

    def join(self, *parts: Tensor) -> Tensor:
        """The concatenation of `parts` [B, C_i, H, W], in order, as one tensor [B, ΣC, H, W].

        A part may span several slots. Parts that lie in their slots are not touched; others (from a producer that
        cannot write into a slot) are copied there. While `torch.compile` traces there are no addresses to compare:
        there, slots that were handed out count as written. The gradient of each part is a view of the whole gradient.
        """
        places = self._check_parts(parts)
        joined: Tensor = _Join.apply(_alias(self._buffer, 0, self._starts[-1]), places, *parts)
        return joined

    def _check_parts(self, parts: Sequence[Tensor]) -> list[bool]:
        """Whether each part is to be copied into its place."""
        start, to_copy = 0, []
        for number, part in enumerate(parts):
            check_map(f"parts[{number}]", part)
            batch, _, height, width = self._buffer.shape
            if part.shape[0] != batch or part.shape[2:] != self._buffer.shape[2:]:
                raise ValueError(f"parts[{number}]: expected [{batch}, C, {height}, {width}], got {list(part.shape)}")
            if part.dtype != self._buffer.dtype or part.device != self._buffer.device:
                raise ValueError(
                    f"parts[{number}]: expected {self._buffer.dtype} on {self._buffer.device}, "
                    f"got {part.dtype} on {part.device}"
                )
            first, start = start, start + part.shape[1]
            if start not in self._starts:
                raise ValueError(
                    f"parts[{number}]: expected to end at one of the channels {self._starts[1:]}, got {start}"
                )
            if torch.compiler.is_compiling():
                to_copy.append(any(self._free[self._starts.index(first) : self._starts.index(start)]))
            else:
                to_copy.append(not _is_at(part, self._buffer.narrow(1, first, part.shape[1])))
        if start != self._starts[-1]:
            raise ValueError(f"parts: expected {self._starts[-1]} channels in total, got {start}")
        return to_copy


def concat(parts: Sequence[Tensor]) -> Tensor:
    """Concatenation of `parts` [B, C_i, H, W] along the channels: [B, ΣC, H, W].

    Parts that are adjacent slices of one buffer (slots) are not copied: the result is then a
    view of them. The gradients of the parts are views of the whole gradient. Raises `ValueError` for other shapes.
    """
    parts = maps_of("parts", parts)
    if not parts:
        raise ValueError("parts: expected at least one tensor, got none")
    for number, part in enumerate(parts):
        check_map(f"parts[{number}]", part)
        if part.shape[0] != parts[0].shape[0] or part.shape[2:] != parts[0].shape[2:]:
            raise ValueError(
                f"parts[{number}]: expected the shape of parts[0] {list(parts[0].shape)} except for the channels, "
                f"got {list(part.shape)}"
            )
    whole = None if torch.compiler.is_compiling() else _adjacent(parts)
    if whole is None:
        return torch.cat(list(parts), 1)
    joined: Tensor = _Join.apply(whole, [False] * len(parts), *parts)
    return joined


def concat_reference(parts: Sequence[Tensor]) -> Tensor:
    """The definition of `ConcatBuffer.join`: what the parts give when concatenated."""
    return torch.cat(list(parts), 1)


def tap(x: Tensor, start: int, channels: int | None = None) -> tuple[Tensor, Tensor]:
    """`x` [B, C, H, W] for one consumer and its channels `start` ... as a view for another, nothing copied.

    `channels`: how many, default all that follow. The gradients of both come back as one dense gradient of `x`,
    added while it is written (one pass; autograd's own slicing pads the second with zeros, copies and adds).
    Raises `ValueError` when the slice is not in `x`.
    """
    check_map("x", x)
    channels = x.shape[1] - start if channels is None else channels
    if start < 0 or channels < 1 or start + channels > x.shape[1]:
        raise ValueError(
            f"start, channels: expected channels below {x.shape[1]}, got {start} to {start + channels - 1}"
        )
    if torch.compiler.is_compiling():
        return tap_reference(x, start, channels)  # the compiler fuses padding and adding by itself
    whole, part = _Tap.apply(x, start, channels)
    return whole, part


def tap_reference(x: Tensor, start: int, channels: int | None = None) -> tuple[Tensor, Tensor]:
    """The definition of `tap`: autograd's own slicing."""
    return x, x.narrow(1, start, x.shape[1] - start if channels is None else channels)


def split_view(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Neighbouring channel slices of `x` [B, C, H, W] with `sizes` channels, as views.

    The gradient of `x` is one dense tensor: the gradients of the slices each copied once to their place, zeros for
    slices without a gradient; nothing is copied when they are adjacent slices of one tensor. Raises `ValueError`
    when the sizes do not add up to C.
    """
    check_map("x", x)
    if any(size < 1 for size in sizes) or sum(sizes) != x.shape[1]:
        raise ValueError(f"sizes: expected positive numbers with the sum {x.shape[1]}, got {list(sizes)}")
    if torch.compiler.is_compiling():
        return split_view_reference(x, sizes)
    parts: tuple[Tensor, ...] = _Split.apply(x, tuple(sizes))
    return parts


def split_view_reference(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """The definition of `split_view`: autograd's own splitting."""
    return x.split_with_sizes(list(sizes), 1)


def returned(out: Tensor) -> Tensor:
    """The alias of `out`, after it was written, that an `autograd.Function` returns as its output.

    With `mark_dirty` autograd would rebase the slot's history, and torch.compile would lose the gradient. Instead the
    version is incremented here, so that a second write to a slot that backward still needs is an error.
    """
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out.expand_as(out)


def placed(result: Tensor, slot: Tensor | None) -> Tensor:
    """`result`, copied to `slot` if there is one: for implementations that cannot write into a slot."""
    if slot is None:
        return result
    copied: Tensor = _Placed.apply(result, slot)
    return copied


def _alias(buffer: Tensor, start: int, stop: int) -> Tensor:
    """Channels start..stop of `buffer` with a version counter of their own.

    Views share their base's counter: writing one slot would make what autograd saved of another look modified. The
    compiler cannot trace storages, and needs none of this: it removes mutation before it differentiates.
    """
    view = buffer.narrow(1, start, stop - start)
    if torch.compiler.is_compiling():
        return view
    return buffer.new_empty(0).set_(buffer.untyped_storage(), view.storage_offset(), view.shape, view.stride())


def _is_at(part: Tensor, place: Tensor) -> bool:
    return part.data_ptr() == place.data_ptr() and _same_steps(part, place)


def _same_steps(a: Tensor, b: Tensor, *, apart_from: int = -1) -> bool:
    """Whether strides agree; those of sides of length 1 mean nothing, and views change them freely."""
    return all(a.stride(side) == b.stride(side) for side in range(4) if a.shape[side] > 1 and side != apart_from)


def _adjacent(parts: Sequence[Tensor]) -> Tensor | None:
    """One tensor over all `parts` where they are neighbouring channel slices of one buffer, else None."""
    first = parts[0]
    if any(size == 0 for size in first.shape) or layout_of(first) is None:
        return None
    # Of a part with one channel the channels' stride says nothing; the layout does.
    step = 1 if memory_format_of(first) == torch.channels_last else first.shape[2] * first.shape[3]
    storage, offset = first.untyped_storage(), first.storage_offset()
    for part in parts:
        if part.dtype != first.dtype or not _same_steps(part, first, apart_from=1) or part.storage_offset() != offset:
            return None
        if part.untyped_storage().data_ptr() != storage.data_ptr() or (part.shape[1] > 1 and part.stride(1) != step):
            return None
        offset += part.shape[1] * step
    size = (first.shape[0], sum(part.shape[1] for part in parts), *first.shape[2:])
    strides = (first.stride(0), step, *first.stride()[2:])
    if first.shape[0] == 1 and step != 1:
        strides = (size[1] * step, *strides[1:])
    whole = first.new_empty(0).set_(storage, first.storage_offset(), size, strides)
    # A tensor in a known layout has no overlapping elements.
    return whole if layout_of(whole) is not None else None


def _assemble(gradients: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """One gradient from those of neighbouring slices with `sizes` channels; None stands for zeros."""
    known = next(gradient for gradient in gradients if gradient is not None)
    traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if all(gradient is not None for gradient in gradients):
        parts = [gradient for gradient in gradients if gradient is not None]
        whole = None if traced else _adjacent(parts)
        return torch.cat(parts, 1) if whole is None else whole
    shapes = [(known.shape[0], size, *known.shape[2:]) for size in sizes]
    if traced:
        filled = [
            known.new_zeros(shape) if gradient is None else gradient
            for gradient, shape in zip(gradients, shapes, strict=True)
        ]
        return torch.cat(filled, 1)
    whole = torch.empty(
        (known.shape[0], sum(sizes), *known.shape[2:]),
        dtype=known.dtype,
        device=known.device,
        memory_format=memory_format_of(known),
    )
    for gradient, place in zip(gradients, whole.split_with_sizes(list(sizes), 1), strict=True):
        if gradient is None:
            place.zero_()
        else:
            place.copy_(gradient)
    return whole


class _Join(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        buffer: Tensor
        buffer, to_copy, *parts = arguments
        ctx.sizes = [part.shape[1] for part in parts]
        for part, place, copied in zip(parts, buffer.split_with_sizes(ctx.sizes, 1), to_copy, strict=True):
            if copied:
                place.copy_(part)
        return buffer.expand_as(buffer)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *gradient.split_with_sizes(ctx.sizes, 1)


class _Placed(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, result: Tensor, slot: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            _place(result, slot)
        else:
            slot.copy_(result)
        return slot.expand_as(slot)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Tap(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: int, channels: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.scope = _backend.current()
        ctx.start = start
        ctx.channels = x.shape[1]
        return x.expand_as(x), x.narrow(1, start, channels)

    @staticmethod
    def backward(ctx: Any, whole: Tensor | None, part: Tensor | None) -> tuple[Tensor | None, None, None]:
        if whole is None and part is None:
            return None, None, None
        if part is None:
            return whole, None, None
        if whole is None:
            after = ctx.channels - ctx.start - part.shape[1]
            return _assemble([None, part, None], [ctx.start, part.shape[1], after]), None, None
        if torch.is_grad_enabled():
            return tap_backward_reference(whole, part, ctx.start), None, None
        with _backend.entered(ctx.scope):  # on a GPU this is a thread of autograd
            return OPERATOR(whole, part, ctx.start), None, None


class _Split(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sizes = sizes
        return x.split_with_sizes(sizes, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        if all(gradient is None for gradient in gradients):
            return None, None
        return _assemble(gradients, ctx.sizes), None


# ---- kernels


def tap_backward_reference(whole: Tensor, part: Tensor, start: int) -> Tensor:
    """Kernel `tap_backward`, the gradient of `x` in `tap`.

    A new tensor in the layout of `whole` [B, C, H, W], plus `part` at the channels from `start` on.
    """
    stop = start + part.shape[1]
    pieces = (whole[:, :start], whole[:, start:stop] + part, whole[:, stop:])
    # A piece without channels has no layout: with it `cat` would return a contiguous map.
    joined = torch.cat([piece for piece in pieces if piece.shape[1]] or [whole], 1)
    return dense(joined, memory_format_of(whole))


def _fake(whole: Tensor, part: Tensor, start: int) -> Tensor:
    return empty_map(whole)


def _copy_to_slot(result: Tensor, slot: Tensor) -> None:
    slot.copy_(result)


# While torch.compile traces, slots are views of one buffer, and autograd refuses `copy_` into a view next to one that a
# Function returned. It does not see the mutation of a registered operator; the compiler does.
_place = Kernel("place(Tensor x, Tensor(a!) slot) -> ()", _copy_to_slot, lambda result, slot: None).registered()


# ---- backends


class _Kernels(NamedTuple):
    backward: Callable[..., Any]


def _supports_cpu(whole: Tensor, part: Tensor, start: int) -> str | None:
    if layout_of(whole) is None or layout_of(part) is None:
        return "it reads channels_last or contiguous maps"
    return not_on("cpu", whole, part)


def _supports_triton(whole: Tensor, part: Tensor, start: int) -> str | None:
    if part.dtype != whole.dtype:
        return f"it adds maps of one dtype, got {whole.dtype} and {part.dtype}"
    return not_for_triton("tap_backward", whole, part)


def _triton() -> _Kernels:
    from yolov9_fast.kernels.concat import tap_backward

    return _Kernels(tap_backward)


OPERATOR = Operator(
    "tap_backward",
    "the gradient of a map that is concatenated and sliced, in one pass",
    reference=tap_backward_reference,
    kernels=_Kernels(
        Kernel("tap_backward(Tensor whole, Tensor part, int start) -> Tensor", tap_backward_reference, _fake)
    ),
    backends={"cpu": Compiled(_supports_cpu), "triton": Python(_triton, _supports_triton)},
)
