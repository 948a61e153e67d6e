"""The optimiser's parameter groups, its learning rates over time, and the warm-up (fact: the published recipe).

Groups, in this order: biases (no decay), convolution weights (decay), BatchNorm weights (no decay).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from yolov9_fast.errors import UserError

GROUP_NAMES = ("bias", "weight", "bn")
NOMINAL_BATCH = 64


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Biases, convolution weights, BatchNorm weights; frozen parameters are left out."""
    biases, weights, norms = [], [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if name == "bias":
                biases.append(parameter)
            elif isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                norms.append(parameter)
            else:
                weights.append(parameter)
    return biases, weights, norms


def build_optimizer(
    model: nn.Module, name: str, *, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, Adam or AdamW over the three groups.

    Args:
        name: "sgd", "adam" or "adamw".
        lr: learning rate of all groups.
        momentum: SGD's momentum, Adam's β₁.
        weight_decay: of the convolution weights alone.
    """
    biases, weights, norms = parameter_groups(model)
    groups = [
        {"params": biases, "weight_decay": 0.0},
        {"params": weights, "weight_decay": weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    if not any(group["params"] for group in groups):
        raise UserError("every layer is frozen: nothing is left to train")
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=(momentum, 0.999))
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999))
    raise UserError(f"unknown optimizer {name!r}: expected sgd, adam or adamw")


def lr_factor(kind: str, epochs: int, final: float) -> Callable[[int], float]:
    """Factor on the base learning rate by epoch: "linear" or "cosine", from 1 towards `final`, or "constant"."""
    if kind == "linear":
        return lambda epoch: (1 - epoch / epochs) * (1 - final) + final
    if kind == "cosine":
        return lambda epoch: (1 + math.cos(math.pi * epoch / epochs)) / 2 * (1 - final) + final
    if kind == "constant":
        return lambda epoch: 1.0
    raise UserError(f"unknown schedule {kind!r}: expected linear, cosine or constant")


@dataclass(frozen=True)
class Schedule:
    """Learning rates, momentum and accumulation for every iteration.

    Attributes:
        factor: of the epoch (`lr_factor`).
        warmup_iterations: iterations of warm-up (0: none).
        accumulate: batches per optimiser step after warm-up.
    """

    base_lr: float
    momentum: float
    factor: Callable[[int], float]
    warmup_iterations: int
    warmup_bias_lr: float
    warmup_momentum: float
    accumulate: int

    def apply(self, optimizer: torch.optim.Optimizer, iteration: int, epoch: int) -> int:
        """Set the optimiser for this iteration (counted over all epochs); return the accumulation that holds now."""
        target = self.base_lr * self.factor(epoch)
        progress = (
            1.0
            if iteration > self.warmup_iterations or not self.warmup_iterations
            else (iteration / self.warmup_iterations)
        )
        momentum = self.warmup_momentum + (self.momentum - self.warmup_momentum) * progress
        for index, group in enumerate(optimizer.param_groups):
            start = self.warmup_bias_lr if index == 0 else 0.0
            group["lr"] = start + (target - start) * progress
            if "momentum" in group:
                group["momentum"] = momentum
            elif "betas" in group:
                group["betas"] = (momentum, group["betas"][1])
        return max(1, round(1 + (self.accumulate - 1) * progress))


def accumulation(total_batch: int, nominal_batch: int = NOMINAL_BATCH) -> int:
    """Batches per optimiser step, so that about `nominal_batch` images make a step."""
    return max(round(nominal_batch / total_batch), 1)
