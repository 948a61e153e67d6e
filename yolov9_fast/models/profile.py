"""Parameters and floating-point operations of a network, in training and deployed form, unfused and fused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yolov9_fast.models.graph import Graph
from yolov9_fast.models.model import DetectionModel, create_model
from yolov9_fast.models.reparameterize import _fuse_in_place


@dataclass(frozen=True)
class Cost:
    """Parameters (frozen ones included) and GFLOPs: 2 × multiply-adds of all convolutions for one image."""

    form: str
    graph: str
    parameters: int
    gflops: float


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def count_gflops(
    model: DetectionModel, image_size: int = 640, *, auxiliary: bool | None = None, biases: bool = False
) -> float:
    """GFLOPs of one image of `image_size` pixels square; the model may be on the meta device.

    Args:
        biases: count each bias as a multiply-add too, as the counters of 2022 did: YOLOv7's published figure.
    """
    operations = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal operations
        assert isinstance(module, nn.Conv2d)
        per_output = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        operations += 2 * (per_output + (biases and module.bias is not None)) * output.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    training = model.training
    try:
        weight = next(model.parameters())
        images = torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype)
        model.eval().raw(images, auxiliary=auxiliary)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return operations / 1e9


def graph_cost(
    graph: str | Path | Graph,
    num_classes: int = 80,
    *,
    deployed: bool = True,
    fused: bool = True,
    class_tower: int | None = None,
    box_groups: int | None = None,
    image_size: int = 640,
) -> Cost:
    """Cost of a network, as trained or deployed, unfused or fused (nothing is allocated)."""
    form, auxiliary = ("deploy", "none") if deployed else ("train", "default")
    with torch.device("meta"):
        model = create_model(graph, num_classes, class_tower=class_tower, box_groups=box_groups, auxiliary=auxiliary)
        if fused:
            _fuse_in_place(model)
        label = f"{form}, {'fused' if fused else 'unfused'}"
        return Cost(label, model.graph_name, count_parameters(model), count_gflops(model, image_size))


def network_costs(name: str | Path | Graph, num_classes: int = 80, **options: Any) -> list[Cost]:
    """Costs of a network's training graph and deployed graph, each unfused and fused; options as of `graph_cost`."""
    return [
        graph_cost(name, num_classes, deployed=deployed, fused=fused, **options)
        for deployed in (False, True)
        for fused in (False, True)
    ]
