"""Cases of single blocks of the networks: forward and backward of CSP-ELAN, ADown, SPP-ELAN, heads and their like."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import yolov9_fast as yf
from yolov9_fast.models.graph import load_graph
from yolov9_fast.nn import DetectionOutput
from yolov9_fast.ops._backend import backend

from .cases import LAYOUTS, Absent, Case, Clock, NoClock, OpenCase, Runner, Settings, flatten, named, torch_dtype
from .networks import same_weights
from .shapes import network_blocks


def block_cases(settings: Settings, dtypes: tuple[str, ...]) -> Iterator[Case]:
    """One layer of each block's kind and shape of the networks, forward and backward, eager against accelerated."""
    seen: set[tuple[str, tuple[tuple[int, ...], ...], str]] = set()
    networks = ("yolov9-t", "yolov9-c", "yolov9-s", "yolov9-m", "yolov9-e") if settings.full else ("yolov9-t",)
    for place, name in enumerate(networks):
        for layer in network_blocks(name, 320):
            arguments = str(load_graph(name).layers[layer.index].arguments)
            key = (layer.block, layer.inputs, arguments)
            if layer.block in ("Silence", "Concat", "Upsample", "CBLinear", "Conv") or key in seen:
                continue
            seen.add(key)
            for dtype in dtypes:
                yield Case(
                    f"block/{layer.block}/{name}.{layer.index}/320px/b{settings.batch}/{dtype}/both",
                    "blocks",
                    layer.block,
                    f"{name}@320",
                    "both",
                    dtype,
                    {"inputs": [list(one) for one in layer.inputs], "batch": settings.batch, "arguments": arguments},
                    _block_opener(name, layer.index, layer.inputs, dtype, settings.batch),
                    priority=place,
                )


def _block_opener(
    name: str, index: int, inputs: tuple[tuple[int, ...], ...], dtype: str, batch: int
) -> Callable[[torch.device, Settings], OpenCase]:
    def open_case(device: torch.device, settings: Settings) -> OpenCase:
        source = same_weights(name, torch.device("cpu")).model[index].train()
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(batch, *one, generator=generator) for one in inputs]

        def make(provider: str, layout: str, backend_name: str, kind: str = dtype) -> Runner:
            wide = torch.float64 if kind == "float64" else torch.float32
            module = copy.deepcopy(source).to(device, wide)
            nn.Module.to(module, memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
            if backend_name == "auto":
                yf.accelerate(module)
            ready = [
                v.to(device, wide, copy=True).contiguous(memory_format=LAYOUTS[layout]).requires_grad_() for v in values
            ]
            amp = torch_dtype(kind) if kind in ("bfloat16", "float16") else None

            def call(clock: Clock) -> Any:
                with backend(backend_name):
                    with torch.autocast(device.type, amp) if amp else nullcontext():
                        output = module(_arguments(ready, inputs, source))
                    outputs = flatten(_plain(output))
                    parameters = [p for p in module.parameters() if p.requires_grad]
                    weights = [torch.ones_like(one) for one in outputs]
                    # ones as gradients vanish in BatchNorm's backward: a ramp over the rows does not
                    for weight in weights:
                        ramp = torch.linspace(0, 1, weight.shape[2], device=device, dtype=weight.dtype)
                        weight.mul_(ramp[:, None])
                    return outputs, torch.autograd.grad(outputs, [*ready, *parameters], weights, allow_unused=True)

            def results() -> dict[str, Tensor]:
                outputs, gradients = call(NoClock())
                found = named("output", [one.detach() for one in outputs])
                found["gradient"] = torch.cat([g.reshape(-1).double() for g in gradients if g is not None])
                return found

            return Runner(provider, layout, call, results)

        def runners() -> Iterator[Runner | Absent]:
            yield make("eager", "nchw", "eager")
            yield make("eager", "channels_last", "eager")
            yield make("auto", "channels_last", "auto")

        def reference() -> dict[str, Tensor]:
            return make("eager", "nchw", "eager", "float64").results()

        return OpenCase(runners(), reference, "network")

    return open_case


def _arguments(ready: list[Tensor], inputs: Any, module: nn.Module) -> Any:
    """A block's argument: one tensor, a list of them for heads, lists of splits for `CBFuse`."""
    if type(module).__name__ == "CBFuse":
        return _regroup(ready, module)
    return ready[0] if type(module).__name__ not in ("DDetect", "DualDDetect") else ready


def _regroup(ready: list[Tensor], module: nn.Module) -> list[Any]:
    """The splits of each source as a list, and the target; `ready` holds every split of every source, in order."""
    indices: list[int] = module.indices  # type: ignore[assignment]
    target, rest = ready[-1], ready[:-1]
    sources: list[list[Tensor]] = []
    for tensor in rest:
        # A new source begins where the plane changes: the splits of one source share it.
        if sources and sources[-1][-1].shape[2:] == tensor.shape[2:]:
            sources[-1].append(tensor)
        else:
            sources.append([tensor])
    assert len(sources) == len(indices), "CBFuse: two adjacent sources have the same plane"
    return [*sources, target]


def _plain(output: Any) -> Any:
    if isinstance(output, DetectionOutput):
        return [*output.main, *(output.auxiliary or [])]
    return output
