"""Detection networks built from graphs.

`create_model("yolov9-c")` is a training graph with PGI (main and auxiliary branch); `gelan-c` is what is deployed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from yolov9_fast._text import printable
from yolov9_fast._untrusted import reason, shown
from yolov9_fast.limits import above_limit, limit
from yolov9_fast.models.build_limits import build_limits
from yolov9_fast.models.graph import Graph, GraphError, build_layer, load_graph
from yolov9_fast.models.pgi import with_auxiliary
from yolov9_fast.nn import Conv, DetectionOutput, Head, RepConv, Upsample
from yolov9_fast.nn.convolution import Upsampled, joined
from yolov9_fast.nn.plan import fused, hooked
from yolov9_fast.nn.sync_batch_norm import counted_together
from yolov9_fast.ops._boxes import STRIDES

MAX_STRIDE = max(STRIDES)


def _unjoined_layers(graph: Graph) -> frozenset[int]:
    """Concat layers that only ELAN blocks read, whose 1×1 convolution takes the parts as they are, and the Upsample
    layers that only those read. The last part of such a Concat is a map of the full size."""
    roles = [layer.spec.role for layer in graph.layers]
    readers: dict[int, set[int]] = {}
    for index, layer in enumerate(graph.layers):
        for source in layer.sources:
            readers.setdefault(source, set()).add(index)
    concats = {
        index
        for index, layer in enumerate(graph.layers)
        if roles[index] == "concat"
        and index in readers
        and all(roles[reader] == "elan" for reader in readers[index])
        and roles[layer.sources[-1]] != "upsample"
    }
    upsamples = {
        index
        for index, role in enumerate(roles)
        if role == "upsample" and index in readers and readers[index] <= concats
    }
    return frozenset(concats | upsamples)


class DetectionModel(nn.Module):
    """A network over a graph.

    In training mode `model(images)` returns `DetectionOutput`; in evaluation mode [B, 4 + nc, A] of the main branch
    (xywh in pixels, sigmoid scores), and nothing that only the auxiliary branch needs is computed.

    Args:
        graph: the network.
        num_classes: nc.
        class_tower: width of the class branch (None: the published rule).
        box_groups: groups of the box branch: 4 as published, 1 dense (None: what the graph says, or 4).

    Attributes:
        names: class index → name.
        strides: of the three levels, in pixels.
    """

    def __init__(
        self, graph: Graph, num_classes: int = 80, *, class_tower: int | None = None, box_groups: int | None = None
    ) -> None:
        super().__init__()
        self.graph = graph
        self.num_classes = num_classes
        self.names = {i: str(i) for i in range(num_classes)}
        options = {"num_classes": num_classes, "class_tower": class_tower, "box_groups": box_groups}
        layers: list[nn.Module] = []
        channels: list[Any] = []
        for index, layer in enumerate(graph.layers):
            try:
                inputs = [3 if s < 0 else channels[s] for s in layer.sources]
                module, out_channels = build_layer(layer, inputs, options)
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                if layer is graph.head and isinstance(error, ValueError):
                    raise
                raise GraphError(f"{graph.name}: layer {index}, {printable(layer, 300)}: {reason(error)}") from error
            layers.append(module)
            channels.append(out_channels)
        self.model = nn.ModuleList(layers)
        self._main_layers = graph.reachable(graph.main_sources)
        self._unjoined = _unjoined_layers(graph)
        self._types = [*map(type, layers)]
        self._many_inputs = frozenset(i for i, layer in enumerate(graph.layers) if layer.spec.inputs == "many")

    @property
    def head(self) -> Head:
        return cast(Head, self.model[-1])

    @property
    def graph_name(self) -> str:
        return self.graph.name

    @property
    def class_tower(self) -> int | None:
        """Width of the main branch's class tower; None for a head without one."""
        return self.head.class_tower

    @property
    def box_groups(self) -> int | None:
        """Groups of the box branch; None for a head without one."""
        return self.head.box_groups

    @property
    def strides(self) -> tuple[int, ...]:
        return self.head.strides

    @property
    def has_auxiliary(self) -> bool:
        return self.graph.has_auxiliary

    @property
    def is_fused(self) -> bool:
        """Whether BatchNorm and RepConv have been folded into plain convolutions."""
        return not any(isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm) for m in self.modules())

    def raw(self, images: Tensor, *, auxiliary: bool | None = None) -> DetectionOutput:
        """Raw head maps in either mode.

        Args:
            images: [B, 3, H, W], float in [0, 1], H and W multiples of 32.
            auxiliary: compute the auxiliary branch too (None: where the graph has one).
        """
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images: expected a tensor, got {type(images).__name__}; torch.fx.symbolic_trace cannot trace "
                f"a network, torch.export.export, make_fx and torch.jit.trace can"
            )
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
        if any(size % MAX_STRIDE or not size for size in images.shape[2:]):
            height, width = (max(-(-int(s) // MAX_STRIDE), 1) * MAX_STRIDE for s in images.shape[2:])
            raise ValueError(
                f"images: expected a height and width of positive multiples of {MAX_STRIDE}, "
                f"got {list(images.shape[2:])}; "
                f"the next larger size is [{height}, {width}]"
            )
        auxiliary = self.has_auxiliary if auxiliary is None else auxiliary and self.has_auxiliary
        if self.training and not torch.compiler.is_compiling():
            with counted_together():
                return self._raw(images, auxiliary)
        return self._raw(images, auxiliary)

    def _raw(self, images: Tensor, auxiliary: bool) -> DetectionOutput:
        outputs: list[Any] = []
        unjoined = self._unjoined if fused(images) and self._as_built() else ()
        for index, layer in enumerate(self.graph.layers[:-1]):
            if not auxiliary and index not in self._main_layers:
                outputs.append(None)
                continue
            inputs = [images if s < 0 else outputs[s] for s in layer.sources]
            module = self.model[index]
            if index in unjoined:
                outputs.append(Upsampled(inputs[0], module.factor) if isinstance(module, Upsample) else inputs)
                continue
            x = inputs if index in self._many_inputs else inputs[0]
            if unjoined and isinstance(x, list) and index not in self._many_inputs and not fused(x):
                x = joined(x)  # of a block that is smaller than what is worth it
            outputs.append(module(x))
        sources = self.graph.head.sources if auxiliary else self.graph.main_sources
        return cast(DetectionOutput, self.head([outputs[s] for s in sources]))

    def _as_built(self) -> bool:
        """Whether the layers are of the classes that the graph says, and need not be called: a joined map may be."""
        layers = [*self.model]
        return (
            [*map(type, layers)] == self._types
            and not hooked(*layers)
            and not any("forward" in vars(layer) for layer in layers)
        )

    def forward(self, images: Tensor) -> DetectionOutput | Tensor:
        if self.training:
            return self.raw(images)
        return self.decode(self.raw(images, auxiliary=False).main)

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """The main branch's raw maps as [B, 4 + nc, A]: xywh in pixels, scores."""
        return self.head.decode(maps)


def create_model(
    name: str | Path | Graph,
    num_classes: int = 80,
    *,
    class_tower: int | None = None,
    box_groups: int | None = None,
    auxiliary: str | None = "default",
) -> DetectionModel:
    """Build a network with fresh weights.

    Args:
        name: of a published network (`list_models`), a path to a graph YAML, or a graph.
        num_classes: nc ≥ 1.
        class_tower: width of the class branch. None takes the published rule, max(channels, min(2·nc, 128)); weights of
            -t exist 80 and 128 wide.
        box_groups: 4 as published; 1 for a dense box branch, as Ultralytics builds it. None takes what the graph says.
        auxiliary: "default" keeps the graph's auxiliary branch, "none" builds the deployed graph; "pfh", "fpn", "pan",
            "icn" or a registered branch is attached to the deployed graph, to its backbone or, as "BACKBONE,NECK", to
            both (`models.attach`).

    Raises:
        GraphError: unknown name or a graph that does not fit together.
        ValueError: a wrong argument.
    """
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: expected an integer of at least 1, got {shown(num_classes)}")
    if class_tower is not None and class_tower < 1:
        raise ValueError(f"class_tower: expected at least 1, got {shown(class_tower)}")
    graph = name if isinstance(name, Graph) else load_graph(name)
    if auxiliary != "default":
        graph = with_auxiliary(graph, auxiliary)
    if num_classes > limit("CLASSES"):
        raise ValueError(f"num_classes: {above_limit('CLASSES', num_classes)}")
    with build_limits():
        return DetectionModel(graph, num_classes, class_tower=class_tower, box_groups=box_groups)


def conv_units(model: nn.Module) -> Iterable[tuple[str, Conv]]:
    """All convolution units by name, those inside RepConv included."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Conv))


def rep_convs(model: nn.Module) -> Iterable[tuple[str, RepConv]]:
    """All RepConv by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, RepConv))


def model_device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
