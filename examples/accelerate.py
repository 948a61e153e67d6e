"""Let a model that other code built run the operators: the same weights and gradients, up to rounding."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import yolov9_fast as yf


class Conv(nn.Module):
    """Convolution, BatchNorm and SiLU under the child names that YOLOv9's code bases use."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


def gradient_norm(model: nn.Module, images: Tensor) -> float:
    model(images).square().mean().backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv(3, 16), Conv(16, 32)).train()
    plain, images = copy.deepcopy(model), torch.rand(2, 3, 64, 64)
    print(yf.accelerate(model))
    print(f"gradient norm: {gradient_norm(plain, images):.6f} before, {gradient_norm(model, images):.6f} accelerated")
    yf.restore(model)


if __name__ == "__main__":
    main()
