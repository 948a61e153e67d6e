"""The optimiser's parameter groups, its learning rates over time, and the warm-up (the published recipe).

Groups, in this order: biases (no decay), convolution weights (decay), BatchNorm weights (no decay).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.errors import UserError


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Biases, convolution weights, BatchNorm weights; without frozen parameters."""
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
        weight_decay: of the convolution weights only.

    Raises:
        UserError: an unknown name, or no parameter left to train.
    """
    biases, weights, norms = parameter_groups(model)
    groups = [
        {"params": biases, "weight_decay": 0.0},
        {"params": weights, "weight_decay": weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    if not any(group["params"] for group in groups):
        raise UserError("freeze: expected fewer layers than the network has; every parameter is frozen")
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=(momentum, 0.999))
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999))
    raise UserError(f"optimizer: expected sgd, adam or adamw, got {name!r}")


def lr_factor(kind: str, epochs: int, final: float) -> Callable[[int], float]:
    """The factor of the base learning rate for each epoch: "linear" or "cosine" from 1 to `final`, or "constant"."""
    if kind == "linear":
        return lambda epoch: (1 - epoch / epochs) * (1 - final) + final
    if kind == "cosine":
        return lambda epoch: (1 + math.cos(math.pi * epoch / epochs)) / 2 * (1 - final) + final
    if kind == "constant":
        return lambda epoch: 1.0
    raise UserError(f"schedule: expected linear, cosine or constant, got {kind!r}")


@dataclass(frozen=True)
class Schedule:
    """Learning rates, momentum and gradient accumulation of every iteration.

    Attributes:
        factor: epoch → factor of `base_lr` (`lr_factor`).
        warmup_iterations: iterations of warm-up; 0: none.
        accumulate: batches per optimiser step after warm-up.
    """

    base_lr: float
    momentum: float
    factor: Callable[[int], float]
    warmup_iterations: int
    warmup_bias_lr: float
    warmup_momentum: float
    accumulate: int

    @classmethod
    def from_config(cls, config: TrainConfig, batches: int) -> Schedule:
        """The schedule of a run with `batches` per epoch; its warm-up has at least 100 iterations."""
        return cls(
            base_lr=config.lr0,
            momentum=config.momentum,
            factor=lr_factor(config.schedule, config.epochs, config.lrf),
            warmup_iterations=max(round(config.warmup_epochs * batches), 100) if config.warmup_epochs > 0 else 0,
            warmup_bias_lr=config.warmup_bias_lr,
            warmup_momentum=config.warmup_momentum,
            accumulate=accumulation(config.batch, config.nominal_batch),
        )

    def apply(self, optimizer: torch.optim.Optimizer, iteration: int, epoch: int) -> int:
        """Set the optimiser for this iteration (counted over all epochs).

        Returns:
            The number of batches per optimiser step at this iteration.
        """
        target = self.base_lr * self.factor(epoch)
        warming_up = iteration <= self.warmup_iterations and self.warmup_iterations > 0
        progress = iteration / self.warmup_iterations if warming_up else 1.0
        momentum = self.warmup_momentum + (self.momentum - self.warmup_momentum) * progress
        for index, group in enumerate(optimizer.param_groups):
            start = self.warmup_bias_lr if index == 0 else 0.0
            group["lr"] = start + (target - start) * progress
            if "momentum" in group:
                group["momentum"] = momentum
            elif "betas" in group:
                group["betas"] = (momentum, group["betas"][1])
        return max(1, round(1 + (self.accumulate - 1) * progress))


def accumulation(total_batch: int, nominal_batch: int = 64) -> int:
    """Batches per optimiser step, for about `nominal_batch` images per step."""
    return max(round(nominal_batch / total_batch), 1)
