"""The shapes that operators see in the published networks, read off the graphs by hooks on meta tensors.

Nothing is allocated or computed. Only blocks and convolution units are watched, not what happens inside them, so that
the shapes are the same whatever form a block's forward takes; what a block does inside follows from its children.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from yolov9_fast.models import DetectionModel, create_model
from yolov9_fast.nn import blocks
from yolov9_fast.nn.blocks import SPPELAN, AConv, ADown, CBFuse, Conv, ELANBase, RepBottleneck, RepConv, RepCSP
from yolov9_fast.ops._backend import backend
from yolov9_fast.ops._boxes import STRIDES

NETWORKS = ("yolov9-t", "yolov9-s", "yolov9-m", "yolov9-c", "yolov9-e")
SIZES = (320, 640)

Dims = dict[str, Any]


@dataclass(frozen=True)
class LayerShape:
    """One operator's sizes, batch left out; `count` layers of the network share them, `layer` is the first."""

    operator: str
    dims: tuple[tuple[str, Any], ...]
    layer: str
    count: int = 1

    @property
    def sizes(self) -> Dims:
        return dict(self.dims)

    def text(self) -> str:
        """As `24x320x320` or `[32,16,16,16]->64x80x80`: part of a case's name."""
        s = self.sizes
        plane = f"{s['height']}x{s['width']}"
        if "out" in s:
            return f"{'+'.join(map(str, s['inputs']))}->{s['out']}x{plane}"
        if "inputs" in s:
            return f"{len(s['inputs'])}in->{s['channels']}x{plane}"
        extra = "+residual" if s.get("residual") else ""
        extra += "-whole" if s.get("split") is False else ""
        return f"{s['channels']}x{plane}{extra}"


@dataclass(frozen=True)
class BlockShape:
    """One layer of a graph: index, block, and the shapes [C, H, W] of its inputs."""

    index: int
    block: str
    inputs: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=32)
def network_shapes(name: str, image_size: int) -> tuple[LayerShape, ...]:
    """What each operator sees in one training pass of network `name`, equal shapes together, most frequent first."""
    found: dict[tuple[str, tuple[tuple[str, Any], ...]], LayerShape] = {}
    for operator, dims, layer in _walk(name, image_size):
        key = (operator, tuple(sorted(dims.items())))
        before = found.get(key)
        found[key] = LayerShape(operator, key[1], before.layer if before else layer, before.count + 1 if before else 1)
    return tuple(sorted(found.values(), key=lambda shape: (shape.operator, -shape.count, shape.layer)))


@lru_cache(maxsize=32)
def network_blocks(name: str, image_size: int) -> tuple[BlockShape, ...]:
    """The layers of the graph with the shapes of their inputs, the head last."""
    model, seen = _traced(name, image_size)
    found = []
    for index, layer in enumerate(model.graph.layers):
        entry = seen.get(f"model.{index}")
        if entry is not None:
            found.append(BlockShape(index, layer.block, tuple(tuple(x.shape[1:]) for x in _flat(entry[0]))))
    return tuple(found)


def head_maps(image_size: int, num_classes: int = 80) -> list[tuple[int, int, int]]:
    """[64 + nc, H, W] of each level of a head."""
    return [(64 + num_classes, image_size // stride, image_size // stride) for stride in STRIDES]


Seen = dict[str, tuple[Any, Any, nn.Module]]


def _traced(name: str, image_size: int) -> tuple[DetectionModel, Seen]:
    """The model on the meta device and, by module name, inputs and outputs of every unit and block it ran."""
    seen: Seen = {}
    with torch.device("meta"):
        model = create_model(name).train()
        images = torch.zeros(1, 3, image_size, image_size)

    def watch(key: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen.setdefault(key, (inputs, output, module))

        return hook

    for key, module in model.named_modules():
        if isinstance(module, _WATCHED) or key.count(".") == 1:
            module.register_forward_hook(watch(key))
    with torch.no_grad(), backend("eager"):
        model.raw(images)
    return model, seen


_WATCHED = (Conv, RepConv, RepCSP, RepBottleneck, ELANBase, SPPELAN, ADown, AConv, CBFuse, blocks.CBLinear)


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for one in value for tensor in _flat(one)] if isinstance(value, list | tuple) else []


def _walk(name: str, image_size: int) -> Iterator[tuple[str, Dims, str]]:
    """(operator, dims, layer name) of every use."""
    model, seen = _traced(name, image_size)
    modules = dict(model.named_modules())
    inside_rep = {
        f"{key}.{child}" for key, m in modules.items() if isinstance(m, RepConv) for child in ("conv1", "conv2")
    }
    residual = {f"{key}.cv2" for key, m in modules.items() if isinstance(m, RepBottleneck) and m.residual}
    plane_of_unit: dict[str, tuple[int, int]] = {}
    joined: dict[str, list[int]] = {}
    for key, (inputs, output, module) in seen.items():
        if isinstance(module, Conv):
            plane_of_unit[key] = _plane(output)
        for unit, channels in _aggregations(key, module):
            joined[unit] = channels
            plane_of_unit[unit] = _plane(output)
        yield from _own(key, inputs, output, module)
    for key, module in modules.items():
        if not isinstance(module, Conv) or key in inside_rep or key not in plane_of_unit:
            continue
        height, width = plane_of_unit[key]
        conv = module.conv
        dims: Dims = {"channels": conv.out_channels, "height": height, "width": width, "residual": key in residual}
        yield "bn_silu", dims, key
        if conv.kernel_size == (1, 1) and conv.groups == 1:
            inputs = tuple(joined.get(key, [conv.in_channels]))
            yield "conv1x1", {"inputs": inputs, "out": conv.out_channels, "height": height, "width": width}, key


def _plane(output: Any) -> tuple[int, int]:
    tensor = _flat(output)[0]
    return int(tensor.shape[2]), int(tensor.shape[3])


def _own(key: str, inputs: Any, output: Any, module: nn.Module) -> Iterator[tuple[str, Dims, str]]:
    """What a block itself does, besides its units."""
    sources = _flat(inputs)
    if not sources:
        return
    channels, height, width = (int(size) for size in sources[0].shape[1:])
    if isinstance(module, RepConv):
        height, width = _plane(output)
        yield "rep_bn_silu", {"channels": _flat(output)[0].shape[1], "height": height, "width": width}, key
    elif isinstance(module, RepCSP):
        out = module.cv1.conv.out_channels
        yield "conv1x1_pair", {"inputs": (channels,), "out": out, "height": height, "width": width}, key
    elif isinstance(module, SPPELAN):
        yield "spp", {"channels": module.cv1.conv.out_channels, "height": height, "width": width}, key
    elif isinstance(module, ADown | AConv):
        split = isinstance(module, ADown)
        yield "adown_pool", {"channels": channels, "height": height, "width": width, "split": split}, key
    elif isinstance(module, CBFuse):
        splits, target = inputs[0][:-1], inputs[0][-1]
        chosen = [split[index] for split, index in zip(splits, module.indices, strict=True)]
        planes = tuple((int(one.shape[2]), int(one.shape[3])) for one in chosen)
        height, width = _plane(target)
        yield "cbfuse", {"inputs": planes, "channels": int(target.shape[1]), "height": height, "width": width}, key


def _aggregations(key: str, module: nn.Module) -> Iterator[tuple[str, list[int]]]:
    """The 1×1 units that read the concatenation of several tensors: name and channels of each input."""
    if isinstance(module, RepCSP):
        yield f"{key}.cv3", [module.cv3.conv.in_channels // 2] * 2
    elif isinstance(module, SPPELAN):
        yield f"{key}.cv5", [module.cv5.conv.in_channels // 4] * 4
    elif isinstance(module, ELANBase):
        unit = f"cv{module.elan_depth + 2}"
        half = module.cv1.conv.out_channels // 2
        total = getattr(module, unit).conv.in_channels
        stage = (total - 2 * half) // module.elan_depth
        yield f"{key}.{unit}", [half, half] + [stage] * module.elan_depth
