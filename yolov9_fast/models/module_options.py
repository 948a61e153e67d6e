"""Options of modules that a state dict does not hold: BatchNorm's eps and momentum, and what a graph takes as given."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from yolov9_fast._untrusted import shown
from yolov9_fast.errors import CheckpointError
from yolov9_fast.models.foreign_modules import ModuleContent

NormOptions = tuple[float, float | None]
"""eps and momentum of a BatchNorm."""


def norm_options(model: nn.Module) -> dict[str, NormOptions]:
    """eps and momentum of every BatchNorm by module name."""
    return {
        name: (module.eps, module.momentum)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }


def set_norm_options(model: nn.Module, options: Mapping[str, NormOptions]) -> None:
    """Give the BatchNorms of these names their eps and momentum; names that the model lacks are passed over."""
    for name, module in model.named_modules():
        if name in options and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps, module.momentum = options[name]


def checked_norm_options(name: str, eps: Any, momentum: Any) -> NormOptions:
    """Raises `ValueError` where these are no options of a BatchNorm."""
    for option, value, largest in (("eps", eps, 1.0), ("momentum", momentum, 1.0)):
        if option == "momentum" and value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not 0 <= value <= largest:
            raise ValueError(f"{name}: {option}: expected a number in [0, {largest:g}], got {shown(value)}")
    return float(eps), None if momentum is None else float(momentum)


def stored_norm_options(stored: Any) -> dict[str, NormOptions]:
    """eps and momentum by module name, from lists of two; raises `ValueError` where `stored` is anything else."""
    if not isinstance(stored, dict):
        raise ValueError(f"batch_norm: expected a mapping, got a {type(stored).__name__}")
    for name, pair in stored.items():
        if not isinstance(name, str) or not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"batch_norm: {str(name)[:100]}: expected eps and momentum, got {shown(pair)}")
    return {name: checked_norm_options(name, *pair) for name, pair in stored.items()}


def read_norm_options(content: ModuleContent, renamed: Mapping[str, Tensor]) -> dict[str, NormOptions]:
    """eps and momentum that a pickled network was saved with.

    Args:
        content: the file's.
        renamed: its state dict in official spelling, of the same tensors.

    Raises:
        ValueError: they are no options of a BatchNorm.
    """
    result = {}
    for name, _, attributes in _renamed(content, renamed, "running_var"):
        if "eps" in attributes:
            result[name] = checked_norm_options(name, attributes["eps"], attributes.get("momentum"))
    return result


def check_attributes(content: ModuleContent, renamed: Mapping[str, Tensor], model: nn.Module, origin: str) -> None:
    """Compare a pickled network's convolutions and activations with those of the network that its weights fit.

    Raises:
        CheckpointError: they compute something else; names the first that differs.
    """
    modules = dict(model.named_modules())
    for name, path, attributes in _renamed(content, renamed, "weight"):
        convolution = modules.get(name)
        if not isinstance(convolution, nn.Conv2d):
            continue
        for option in ("stride", "padding", "dilation", "groups", "padding_mode"):
            expected = getattr(convolution, option)
            found = attributes.get(option, expected)
            if found not in (expected, expected[0] if isinstance(expected, tuple) else expected):
                raise CheckpointError(
                    f"{origin} fits no known network: {name} has {option} {str(found)[:50]}, expected {expected}"
                )
        parent, _, child = name.rpartition(".")
        activation = modules.get(f"{parent}.act") if child == "conv" else None
        act = content.attributes.get(f"{path.removesuffix('conv')}act", {}).get("class")
        if activation is not None and act is not None and act != type(activation).__name__:
            raise CheckpointError(
                f"{origin} fits no known network: {parent}.act is {act}, expected {type(activation).__name__}"
            )


def _renamed(
    content: ModuleContent, renamed: Mapping[str, Tensor], parameter: str
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Official name, name in the file and attributes of each module of a file that has `parameter`."""
    names = {id(tensor): key for key, tensor in renamed.items() if key.endswith(f".{parameter}")}
    for path, attributes in content.attributes.items():
        key = names.get(id(content.state.get(f"{path}.{parameter}")))
        if key is not None:
            yield key.removesuffix(f".{parameter}"), path, attributes
