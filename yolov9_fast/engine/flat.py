"""The weights of a run, their gradients, moments and average, and the running statistics, each in one buffer.

The tensors of the modules and of the optimiser are views of the buffers, with the names, shapes and memory layouts that
they had. The end of a step is then one pass over the buffers (`ops.sgd_update`, `ops.adam_update`), and several
processes add up one tensor of gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from yolov9_fast.engine.ema import ModelEMA
from yolov9_fast.engine.loss_scale import LossScale
from yolov9_fast.errors import UserError
from yolov9_fast.ops import adam_update, sgd_update

_ALIGNMENT = 16
"""Elements: every view begins at a multiple of 64 bytes."""
_ROW = 1024
"""Elements of a row of the gradients' norm, and what the buffers' length is a multiple of."""


class FlatStorage:
    """Makes parameters, gradients, the optimiser's moments, running statistics and their averages views of buffers.

    Parameters lie in the order of the optimiser's groups. The tensors stay the same objects, only their memory is
    another; a tensor that gets memory of its own afterwards is taken back by `refresh`.

    Args:
        model: the trained network.
        ema: its moving average.
        optimizer: SGD, Adam or AdamW of torch, for parameters of the model; moments that it has are kept.

    Attributes:
        parameters, gradients, averages: float32 [N]; the average is that of the parameters.
        moments: one float32 [N] of SGD, two of Adam and AdamW.
        ends: where each group of the optimiser ends; the last is N.
        trained: the parameters, in the order of the buffer.
        slices: where each of them lies.
        gradient_views: the part of `gradients` of each of them.
        missing: indices of those that have had no gradient since the last update.

    Raises:
        UserError: an optimiser of another kind, or parameters that are not float32.
    """

    def __init__(self, model: nn.Module, ema: ModelEMA, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._ema, self._optimizer = model, ema, optimizer
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self.trained: list[nn.Parameter] = [parameter for group in self._groups for parameter in group]
        self._names = _moments_of(optimizer)
        if not all(parameter.dtype == torch.float32 for parameter in self.trained):
            raise UserError("model: expected parameters of float32; mixed precision is the option --amp")
        averaged = ema.model.state_dict(keep_vars=True)
        # By identity: a tensor that two modules share is one.
        pairs = {id(value): (value, averaged[name]) for name, value in model.state_dict(keep_vars=True).items()}
        self.device = self.trained[0].device

        self.slices, self.ends = _layout(self._groups)
        length = self.ends[-1]
        self.parameters = torch.zeros(length, device=self.device)
        self.gradients = torch.zeros_like(self.parameters)
        self.averages = torch.zeros_like(self.parameters)
        self.moments = [torch.zeros_like(self.parameters) for _ in self._names]
        self._places: list[tuple[Tensor, Tensor]] = []
        """Tensors of the modules, each with its view."""
        for parameter, part in zip(self.trained, self.slices, strict=True):
            _, average = pairs.pop(id(parameter))
            self._places.append((parameter, _view(self.parameters, part, parameter)))
            self._places.append((average, _view(self.averages, part, parameter)))
        self.gradient_views = [_view(self.gradients, s, p) for s, p in zip(self.slices, self.trained, strict=True)]
        self.all_missing = frozenset(range(len(self.trained)))
        self.missing = self.all_missing

        # Running statistics, frozen parameters and counts.
        self._others = [
            _Others([pair for pair in pairs.values() if pair[0].dtype == dtype])
            for dtype in dict.fromkeys(value.dtype for value, _ in pairs.values())
        ]
        for others in self._others:
            self._places += others.places

        adam = len(self._names) > 1
        self._numbers = torch.zeros((5 if adam else 3) + (3 if adam else 2) * len(self.ends), device=self.device)
        self._rates = torch.zeros(2 + 2 * len(self.ends), dtype=torch.float64, device=self.device)
        self._steps = torch.zeros((), device=self.device)
        self.refresh()
        self.take_moments()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take back tensors whose memory is no longer that of the buffers, with their values."""
        for tensor, view in self._places:
            if tensor.data_ptr() != view.data_ptr() or tensor.stride() != view.stride():
                view.copy_(tensor)
                # Not `view_as`: views of one buffer share a version counter, and autograd would take the running
                # statistics of one layer for those of another.
                tensor.data = view

    @torch.no_grad()
    def take_moments(self) -> None:
        """Take over the optimiser's moments, after `load_state_dict`; those that it has not yet are zero."""
        steps = [state["step"] for state in self._optimizer.state.values() if "step" in state]
        self._steps.fill_(float(steps[0]) if steps else 0.0)
        for parameter, part in zip(self.trained, self.slices, strict=True):
            state = self._optimizer.state[parameter]
            for name, buffer in zip(self._names, self.moments, strict=True):
                view, found = _view(buffer, part, parameter), state.get(name)
                if found is None:
                    view.zero_()
                else:
                    view.copy_(found)
                state[name] = view
            if len(self._names) > 1:
                state["step"] = self._steps

    @property
    def outdated(self) -> bool:
        """Whether the optimiser has other parameters than when this was made."""
        groups = self._optimizer.param_groups
        return len(groups) != len(self._groups) or any(
            len(group["params"]) != len(own) or any(a is not b for a, b in zip(group["params"], own, strict=True))
            for group, own in zip(groups, self._groups, strict=True)
        )

    # ---- gradients

    @torch.no_grad()
    def collect(self, indices: Iterable[int] | None = None) -> list[int]:
        """Add what a backward left in the parameters' `grad` to the buffer, and set it to None.

        Args:
            indices: of the parameters in `trained`; None: all.

        Returns:
            The indices of those that had a gradient.
        """
        received, views, found = [], [], []
        for index in range(len(self.trained)) if indices is None else indices:
            gradient = self.trained[index].grad
            if gradient is not None:
                received.append(index)
                views.append(self.gradient_views[index])
                found.append(gradient)
                self.trained[index].grad = None
        if found:
            torch._foreach_add_(views, found)
        return received

    def show_gradients(self) -> None:
        """Until the next batch, each parameter that has a gradient has its part of the buffer as `grad`."""
        for index, (parameter, view) in enumerate(zip(self.trained, self.gradient_views, strict=True)):
            parameter.grad = None if index in self.missing else view

    @torch.no_grad()
    def hide_gradients(self) -> None:
        """Set every `grad` to None; one that was replaced since `show_gradients`, or set to None, is taken over."""
        missing = set(self.missing)
        for index, (parameter, view) in enumerate(zip(self.trained, self.gradient_views, strict=True)):
            gradient = parameter.grad
            if gradient is None:
                if index not in missing:
                    missing.add(index)
                    view.zero_()
            else:
                missing.discard(index)
                if gradient is not view:
                    view.copy_(gradient)
                parameter.grad = None
        if missing != self.missing:
            self.missing = frozenset(missing)

    # ---- the end of a step

    def write_rates(self) -> None:
        """Copy learning rates, decays and momenta of the optimiser's groups to where the next update reads them.

        Raises:
            UserError: groups that differ in momentum, betas or another option that one pass has in common.
        """
        groups = self._optimizer.param_groups
        shared = ("betas", "eps") if len(self._names) > 1 else ("momentum", "nesterov", "dampening")
        for name in shared:
            if any(group[name] != groups[0][name] for group in groups[1:]):
                values = ", ".join(str(group[name]) for group in groups)
                raise UserError(f"optimizer: expected one {name} for all groups, got {values}")
        first = groups[0]
        rates = list(first["betas"]) if len(self._names) > 1 else [first["momentum"], 0.0]
        for group in groups:
            rates += [group["lr"], group["weight_decay"]]
        host = torch.tensor(rates, dtype=torch.float64)
        self._rates.copy_(host.pin_memory() if self.device.type == "cuda" else host, non_blocking=True)

    @torch.no_grad()
    def update(self, *, clip: float, scale: LossScale, processes: int, idle: Iterable[int] = ()) -> Tensor:
        """Clip, step the optimiser, update the average, zero the gradients; all on the device, without a wait.

        If the gradients are not finite, weights, moments and averages stay, and running statistics that a forward made
        non-finite become those of the average.

        Args:
            clip: largest norm of the gradients; 0: no clipping.
            scale: of the loss; it is adapted.
            processes: whose gradients the buffer holds the sum of; they are averaged.
            idle: indices of parameters without gradient: they stay, as with torch's optimisers.

        Returns:
            Whether the gradients are finite, 0-dimensional bool.
        """
        per_row = torch.linalg.vector_norm(self.gradients.view(-1, _ROW), dim=1)
        unscale = scale.inverse() / processes
        norm = torch.linalg.vector_norm(per_row) * unscale
        finite = torch.isfinite(norm)
        factor = unscale if clip <= 0 else unscale * (clip / (norm + 1e-6)).clamp(max=1.0)
        scale.adapt(finite)
        self._ema.updates += finite
        self._steps += finite
        weight = self._ema.weight()
        numbers = self._numbers
        numbers[0] = torch.where(finite, factor, torch.nan)
        numbers[1] = weight
        kept = self._keep(idle, finite, weight)
        group = self._optimizer.param_groups[0]
        if len(self.moments) == 1:
            numbers[2] = self._rates[0]
            numbers[3:] = self._rates[2:]
            sgd_update(
                self.parameters,
                self.gradients,
                self.moments[0],
                self.averages,
                numbers,
                self.ends,
                nesterov=group["nesterov"],
            )
        else:
            decoupled = isinstance(self._optimizer, torch.optim.AdamW)
            self._write_adam(decoupled)
            adam_update(
                self.parameters,
                self.gradients,
                self.moments[0],
                self.moments[1],
                self.averages,
                numbers,
                self.ends,
                epsilon=group["eps"],
                decoupled=decoupled,
            )
        for place, value in kept:
            place.copy_(value)
        for others in self._others:
            others.update(finite, weight)
        return finite

    def _write_adam(self, decoupled: bool) -> None:
        beta1, beta2 = self._rates[0], self._rates[1]
        rates = self._rates[2:].view(-1, 2)
        steps = self._steps.double()
        each = self._numbers[5:].view(-1, 3)
        self._numbers[2:5] = torch.stack((1 - beta1, beta2, 1 - beta2))
        each[:, 0] = rates[:, 0] / (1 - beta1**steps)
        each[:, 1] = 1 - rates[:, 0] * rates[:, 1] if decoupled else rates[:, 1]
        each[:, 2] = (1 - beta2**steps).sqrt()

    def _keep(self, idle: Iterable[int], finite: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Parts of the buffers that the operator would change otherwise than torch, with their right values."""
        kept = []
        for part in (self.slices[index] for index in idle):
            kept += [(buffer[part], buffer[part].clone()) for buffer in (self.parameters, *self.moments)]
            kept.append((self.averages[part], _averaged(self.averages[part], self.parameters[part], finite, weight)))
        return kept


class _Others:
    """Tensors of one dtype that are not trained, but averaged (floating-point) or copied: in one buffer.

    Args:
        pairs: tensors, each with its average.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        slices, ends = _layout([[tensor for tensor, _ in pairs]])
        first = pairs[0][0]
        self._own = torch.zeros(ends[-1], dtype=first.dtype, device=first.device)
        self._averages = torch.zeros_like(self._own)
        self.places: list[tuple[Tensor, Tensor]] = []
        for (tensor, average), part in zip(pairs, slices, strict=True):
            self.places.append((tensor, _view(self._own, part, tensor)))
            self.places.append((average, _view(self._averages, part, tensor)))
        # The number of the tensor to which each element belongs; what lies between them is of none.
        self._tensor = torch.full((ends[-1],), len(slices), device=first.device)
        for number, part in enumerate(slices):
            self._tensor[part] = number
        self._tensors = len(slices) + 1

    def update(self, finite: Tensor, weight: Tensor) -> None:
        """If `finite` average in or copy; else replace tensors that hold a non-finite value by their averages."""
        own, averages = self._own, self._averages
        if not own.is_floating_point():
            torch.where(finite, own, averages, out=averages)
            return
        spoilt = own.new_zeros(self._tensors).index_add_(0, self._tensor, (~own.isfinite()).to(own.dtype))
        torch.where(finite | (spoilt == 0)[self._tensor], own, averages, out=own)
        averages.copy_(_averaged(averages, own, finite, weight))


def _averaged(average: Tensor, value: Tensor, finite: Tensor, weight: Tensor) -> Tensor:
    return torch.where(finite, torch.lerp(average, value, weight.to(average.dtype)), average)


def _moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names of an optimiser's moments in its state."""
    if type(optimizer) is torch.optim.SGD:
        return ("momentum_buffer",)
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        return ("exp_avg", "exp_avg_sq")
    raise UserError(f"optimizer: expected torch's SGD, Adam or AdamW, got {type(optimizer).__name__}")


def _layout(groups: Sequence[Sequence[Tensor]]) -> tuple[list[slice], list[int]]:
    """Where each tensor lies in a buffer, and where each group ends; the last end is a multiple of `_ROW`."""
    slices, ends, place = [], [], 0
    for group in groups:
        for tensor in group:
            slices.append(slice(place, place + tensor.numel()))
            place += -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT
        ends.append(place)
    ends[-1] = max(-(-place // _ROW), 1) * _ROW
    return slices, ends


def _view(buffer: Tensor, part: slice, like: Tensor) -> Tensor:
    """The part of a buffer in the shape and layout of a tensor."""
    return buffer.as_strided(like.shape, torch.empty_like(like, device="meta").stride(), part.start)
