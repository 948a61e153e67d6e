"""`paper fig2`, `paper fig6`: what random networks make of a picture, the features summed over their channels.

The recipe is the authors' own for Figure 6: feed an image to a network that has just been made, sum the output over
the channels, draw the result with each map's own range. Blocks, initialisation and normalisation are those of `stacks`.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolov9_fast._lazy import require
from yolov9_fast.atomic import atomic_write
from yolov9_fast.data.images import Image
from yolov9_fast.paper.files import add_out, figure_path, write_numbers
from yolov9_fast.paper.pictures import as_input, open_picture
from yolov9_fast.paper.stacks import ACTIVATIONS, ARCHITECTURES, NORMALISATIONS, TITLES, build_stack
from yolov9_fast.viz.figure import save_figure

log = logging.getLogger(__name__)
Map = NDArray[np.float64]
_EPILOG = """examples:
  yolov9-fast paper {target}                                 a scene drawn by program
  yolov9-fast paper {target} photo.jpg --normalisation batch
  yolov9-fast paper {target} photo.jpg --architectures plainnet elan gelan --depths 10 30 --width 64"""
# ELAN is ours to add: the paper shows the other four.
_SHOWN = {"fig2": ("plainnet", "resnet", "cspnet", "gelan"), "fig6": ("plainnet", "resnet", "cspnet", "gelan")}
_DEPTHS = {"fig2": (50,), "fig6": (50, 100, 150, 200)}


@dataclass(frozen=True)
class FeatureMap:
    """Features of one network summed over the channels, [H, W], and what they have in common with the picture.

    `colour`: multiple correlation with the pixels' red, green and blue; `edges`: size of the correlation with the
    strength of the picture's edges; both 0 to 1, and 0 for a map without variance. `spread`: standard deviation over
    the map; `alive`: share of channels that vary.
    """

    architecture: str
    depth: int
    values: Map
    colour: float
    edges: float
    spread: float
    alive: float

    def numbers(self) -> dict[str, Any]:
        names = ("architecture", "depth", "colour", "edges", "spread", "alive")
        return {name: getattr(self, name) for name in names}


def configure(parser: argparse.ArgumentParser, target: str) -> None:
    parser.epilog = _EPILOG.format(target=target)
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="the picture (default: a scene drawn by program)")
    add("--architectures", nargs="+", choices=ARCHITECTURES, default=_SHOWN[target], metavar="NAME",
        help=f"of {', '.join(ARCHITECTURES)} (default {' '.join(_SHOWN[target])})")  # fmt: skip
    add("--depths", nargs="+", type=int, default=_DEPTHS[target], metavar="N",
        help=f"convolution layers (default {' '.join(map(str, _DEPTHS[target]))})")  # fmt: skip
    add("--width", type=int, default=32, metavar="N", help="channels (default %(default)s)")
    add("--size", type=int, default=320, metavar="N", help="the picture's long side in pixels (default %(default)s)")
    add("--stem-stride", type=int, default=1, metavar="N", help="stride of the stem, then of all (default %(default)s)")
    add("--normalisation", choices=NORMALISATIONS, default="initial", help="of the networks (default %(default)s)")
    add("--activation", choices=tuple(ACTIVATIONS), default="silu", help="default %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of the weights (default %(default)s)")
    add("--double", action="store_true", help="networks in float64: lost, or only rounded away?")
    add_out(parser, target, "the maps as .npz and settings and numbers as .json")


def run(arguments: argparse.Namespace) -> int:
    out = figure_path(arguments.out)
    picture = open_picture(arguments.image, arguments.size)
    began = time.perf_counter()
    options = {
        name: getattr(arguments, name)
        for name in ("width", "normalisation", "activation", "stem_stride", "seed", "double")
    }
    maps = []
    for architecture in arguments.architectures:
        for depth in arguments.depths:
            maps.append(feature_map(picture, architecture, depth, **options))
            log.info(_line(maps[-1]))
    numbers = {
        "image": "scene drawn by program" if arguments.image is None else Path(arguments.image).name,
        "size": list(picture.shape[:2]),
        **options,
        "seconds": round(time.perf_counter() - began, 1),
        "maps": [one.numbers() for one in maps],
    }
    arrays: dict[str, Any] = {f"{m.architecture}_{m.depth}": m.values.astype(np.float32) for m in maps}
    atomic_write(out.with_suffix(".npz"), lambda file: np.savez_compressed(file, **arrays))
    write_numbers(out.with_suffix(".json"), numbers)
    draw(picture, maps, out)
    print(f"figure in {out}, maps in {out.with_suffix('.npz')}, numbers in {out.with_suffix('.json')}")
    return 0


def feature_map(
    picture: Image,
    architecture: str,
    depth: int,
    *,
    width: int = 32,
    normalisation: str = "initial",
    activation: str = "silu",
    stem_stride: int = 1,
    seed: int = 0,
    double: bool = False,
) -> FeatureMap:
    """The map of one random network for a uint8 BGR picture.

    The arguments are those of `build_stack`; `double` computes in float64, where nothing underflows.
    """
    stack = build_stack(
        architecture,
        depth,
        width,
        seed=seed,
        normalisation=normalisation,
        activation=activation,
        stem_stride=stem_stride,
    )
    if double:
        stack.double()
    features = stack.features(as_input(picture))[0].double()
    values = features.sum(0).numpy()
    cv2 = require("cv2")
    if picture.shape[:2] != values.shape:
        picture = cv2.resize(picture, values.shape[::-1], interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY).astype(np.float64)
    alive = float((features.flatten(1).max(1).values > features.flatten(1).min(1).values).double().mean())
    return FeatureMap(
        architecture,
        depth,
        values,
        multiple_correlation(values, picture.reshape(-1, 3).astype(np.float64)),
        abs(correlation(values, np.hypot(*np.gradient(grey)))),
        float(values.std()),
        alive,
    )


def correlation(a: Map, b: Map) -> float:
    """Pearson's, over all elements; 0 where either has no variance."""
    a, b = _centred(a), _centred(b)
    product = float((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / np.sqrt(product)) if product else 0.0


def multiple_correlation(values: Map, causes: Map) -> float:
    """Correlation of `values` [H, W] with the best linear combination of `causes` [H·W, n]; 0 without variance."""
    target = _centred(values).ravel()
    if not target.any():
        return 0.0
    causes = causes - causes.mean(0)
    fitted = causes @ np.linalg.lstsq(causes, target, rcond=None)[0]
    return abs(correlation(target, fitted))


def _centred(values: Map) -> Map:
    """Less the mean, and of size 1: the square of a map that has shrunk to 1e-200 would be 0."""
    centred = values - values.mean()
    largest = np.abs(centred).max()
    out: Map = centred / largest if largest else centred
    return out


def _line(one: FeatureMap) -> str:
    return (
        f"{TITLES[one.architecture]:<9} {one.depth:>4} layers: correlation with colour {one.colour:.3f}, "
        f"with edges {one.edges:.3f}; standard deviation {one.spread:.2g}; channels alive {one.alive:.0%}"
    )


def _caption(one: FeatureMap) -> str:
    return f"R(colour) {one.colour:.2f}   r(edges) {one.edges:.2f}" if one.spread else "one value everywhere"


def draw(picture: Image, maps: list[FeatureMap], out: Path) -> None:
    """The picture, then the maps: one row where there is one depth, else a row per architecture, a column per depth."""
    architectures = list(dict.fromkeys(m.architecture for m in maps))
    depths = list(dict.fromkeys(m.depth for m in maps))
    height, width = picture.shape[:2]
    one_row = len(depths) == 1
    rows, columns = (1, 1 + len(architectures)) if one_row else (len(architectures), 1 + len(depths))
    place = {
        (m.architecture, m.depth): (0, 1 + architectures.index(m.architecture))
        if one_row
        else (architectures.index(m.architecture), 1 + depths.index(m.depth))
        for m in maps
    }

    def paint(figure: Any) -> None:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.set_frame_on(False)
        grid[0][0].imshow(picture[..., ::-1])
        grid[0][0].set_title("picture")
        for one in maps:
            row, column = place[one.architecture, one.depth]
            axes = grid[row][column]
            axes.imshow(one.values, cmap="viridis", interpolation="nearest")
            axes.set_xlabel(_caption(one), fontsize=8)
            if one_row:
                axes.set_title(f"{TITLES[one.architecture]}, {one.depth} layers")
            elif row == 0:
                axes.set_title(f"{one.depth} layers")
        if not one_row:
            for row, architecture in enumerate(architectures):
                grid[row][1].set_ylabel(TITLES[architecture], fontweight="bold")
            for row in range(1, rows):
                grid[row][0].set_visible(False)

    cell = 2.5
    save_figure(out, (cell * columns, cell * rows * height / width + 0.2 * rows + 0.25), paint)
