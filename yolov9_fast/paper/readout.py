"""How much of a picture can be read back from the features of a random network, by architecture and depth.

Section 3 of the paper argues that information is lost layer by layer unless the layers are reversible, and shows
feature maps for it (Figures 2 and 6). Here is the number: from the features around a pixel a linear readout, fitted by
ridge regression on some crops, gives the pixel's red, green and blue on others. The error is 1 − R²: 0 where every
pixel is recovered, 1 where no more is known than the mean colour. It is a bound from one side: what a linear readout
finds is there; what it misses may still be there in a form that only a deeper decoder reads, or further away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov9_fast.errors import UserError
from yolov9_fast.paper.stacks import ARCHITECTURES, NORMALISATIONS, build_stack, plan

DETAIL = 9
"""Side of the square whose mean a pixel's detail is measured from."""


@dataclass(frozen=True)
class Settings:
    """An experiment; everything except the crops that its numbers depend on.

    `neighbourhoods`: sides of the square of features that the readout sees; `train`: crops that it is fitted on, the
    rest measure it; `ridge`: penalty relative to the number of pixels, on features of variance 1; `double`: networks in
    float64, to tell what is mixed beyond recognition from what is rounded away.
    """

    architectures: tuple[str, ...] = ARCHITECTURES
    depths: tuple[int, ...] = (0, 5, 10, 15, 25, 50, 100, 150, 200)
    normalisations: tuple[str, ...] = NORMALISATIONS
    seeds: int = 3
    width: int = 32
    crop: int = 64
    train: int = 10
    test: int = 6
    neighbourhoods: tuple[int, ...] = (1, 3)
    ridge: float = 1e-8
    activation: str = "silu"
    double: bool = False

    def check(self) -> None:
        """Raise `UserError` for what no experiment can use."""
        for name in ("seeds", "train", "test"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.crop < 2 * DETAIL:
            raise UserError(f"crop: expected at least {2 * DETAIL} pixels, got {self.crop}")
        if any(side < 1 or side % 2 == 0 for side in self.neighbourhoods):
            raise UserError(f"neighbourhoods: expected odd sides, got {list(self.neighbourhoods)}")
        if not self.ridge >= 0:
            raise UserError(f"ridge: expected at least 0, got {self.ridge}")
        for architecture in self.architectures:
            for depth in self.depths:
                plan(architecture, depth)

    def cells(self) -> Iterator[Cell]:
        """Every network, the seeds innermost."""
        for normalisation in self.normalisations:
            for architecture in self.architectures:
                for depth in self.depths:
                    for seed in range(self.seeds):
                        yield Cell(architecture, depth, normalisation, seed)

    def as_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Cell:
    """One random network."""

    architecture: str
    depth: int
    normalisation: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.architecture}/{self.depth}/{self.normalisation}/{self.seed}"


@dataclass(frozen=True)
class Recovered:
    """1 − R² on the held-out crops: of the pixels' RGB, and of their detail (RGB less the mean of 9×9 pixels)."""

    error: float
    detail_error: float


def measure(cell: Cell, crops: Tensor, settings: Settings) -> dict[int, Recovered]:
    """Errors of one network by the side of the neighbourhood; `crops`: [train + test, 3, S, S] in [0, 1]."""
    stack = build_stack(
        cell.architecture,
        cell.depth,
        settings.width,
        seed=cell.seed,
        normalisation=cell.normalisation,
        activation=settings.activation,
    )
    if settings.double:
        stack.double()
    features = stack.features(crops)
    return {side: readout(features, crops, settings.train, side, settings.ridge) for side in settings.neighbourhoods}


def detail(images: Tensor) -> Tensor:
    """What a blur of 9×9 pixels takes from images [N, T, H, W]."""
    return images - blurred(images, DETAIL)


def blurred(images: Tensor, side: int) -> Tensor:
    """The mean over a square of `side` (odd) pixels, over the part of it inside the image at the borders."""
    return F.avg_pool2d(images, side, 1, side // 2, count_include_pad=False)


def blur_error(crops: Tensor, train: int, side: int) -> float:
    """1 − R² of knowing nothing but each pixel's local mean: a yardstick for the curves."""
    crops = crops.double()
    shown = crops[train:]
    mean = crops[:train].mean((0, 2, 3), keepdim=True)
    return float((shown - blurred(shown, side)).square().sum() / (shown - mean).square().sum())


def readout(features: Tensor, targets: Tensor, train: int, side: int, ridge: float) -> Recovered:
    """Fit a linear readout of `targets` on the first `train` images, and measure it on the rest.

    Args:
        features: [N, C, H, W], of any floating type.
        targets: [N, T, H, W].
        train: images to fit on.
        side: of the square of features seen; pixels whose square leaves the image are left out.
        ridge: penalty per pixel on features of variance 1.

    Raises:
        UserError: features that are not finite.
    """
    features = features.double()
    if not bool(torch.isfinite(features).all()):
        raise UserError("the network's features are not finite; try another width, activation or normalisation")
    known = features[:train]
    mean = known.mean((0, 2, 3), keepdim=True)
    scale = (known - mean).square().mean((0, 2, 3), keepdim=True).sqrt()
    # A channel without variance says nothing, and must not be divided by it.
    features = torch.where(scale > 0, (features - mean) / torch.where(scale > 0, scale, 1.0), 0.0)
    border = side // 2
    shown = targets[..., border : targets.shape[2] - border, border : targets.shape[3] - border].double()
    shown = shown - shown[:train].mean((0, 2, 3), keepdim=True)

    def seen(image: int) -> Tensor:
        return F.unfold(features[image : image + 1], side)[0]

    columns = features.shape[1] * side**2
    gram = features.new_zeros(columns, columns)
    moments = features.new_zeros(columns, shown.shape[1])
    centre = features.new_zeros(columns)
    pixels = 0
    for image in range(train):
        x = seen(image)
        gram += x @ x.T
        moments += x @ shown[image].flatten(1).T
        centre += x.sum(1)
        pixels += x.shape[1]
    centre /= pixels
    gram -= pixels * torch.outer(centre, centre)
    gram += ridge * pixels * torch.eye(columns, dtype=gram.dtype)
    weights = torch.linalg.lstsq(gram, moments, driver="gelsd").solution  # [columns, T]
    left = torch.stack(
        [
            (shown[i].flatten(1) - weights.T @ (seen(i) - centre[:, None])).view_as(shown[i])
            for i in range(train, len(shown))
        ]
    )
    truth = shown[train:]
    return Recovered(
        float(left.square().sum() / truth.square().sum()),
        float(detail(left).square().sum() / detail(truth).square().sum()),
    )


def summary(cells: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """Mean, least and largest error over the seeds for every network and neighbourhood that has been measured."""
    rows = []
    for normalisation in settings.normalisations:
        for architecture in settings.architectures:
            for depth in settings.depths:
                for side in settings.neighbourhoods:
                    keys = [Cell(architecture, depth, normalisation, seed).key for seed in range(settings.seeds)]
                    found = [cells[key][str(side)] for key in keys if key in cells]
                    if not found:
                        continue
                    row: dict[str, Any] = {
                        "architecture": architecture,
                        "depth": depth,
                        "shortest_path": sum(form.shortest for form in plan(architecture, depth)),
                        "normalisation": normalisation,
                        "neighbourhood": side,
                        "seeds": len(found),
                    }
                    for name in ("error", "detail_error"):
                        values = [one[name] for one in found]
                        row[name] = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
                    rows.append(row)
    return rows
