"""Every call of a step or an inference that works on a GPU, traced without one, with shapes, dtypes and strides.

    python -m tests.fake_cuda.calls "NETWORK step|inference AMP [OPTION=VALUE ...]" ...

prints as JSON a list with an object per case: the distinct `calls`, the `order` in which they come, and `saved_bytes`,
of the tensors that the forward keeps for the backward. `yolov9-fast bench predict` reads it; options are those of
`tests.fake_cuda.trace`.
"""

from __future__ import annotations

from tests.fake_cuda import trace  # isort: skip  # first: it gives torch its device

import argparse
import contextlib
import json
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import yolov9_fast as yf
from tests import fake_cuda
from tests.fake_cuda import pretend
from tests.fake_cuda.record import Record
from yolov9_fast.engine.device import autocast, prepare_images, to_channels_last
from yolov9_fast.models import create_model, fuse, to_deploy
from yolov9_fast.ops import nms

_CONF = 0.001
_COUNTED_BY_VALUES = ("assign", "decode", "decode_for_assignment", "detection_loss", "nms")
"""Their eager forms launch what the values ask for: they run compiled in the eager form of a network too."""
# The CPU build knows no kernel of it for CUDA, and would take it to pieces; a GPU has one.
_KERNELS = torch.library.Library("aten", "IMPL")
_KERNELS.impl("silu_backward", lambda gradient, x: torch.empty_like(x), "CUDA")


class Calls(Record):
    """Notes the calls of the phases in `wanted`, and the storages that autograd keeps in them."""

    def __init__(self, wanted: tuple[str, ...]) -> None:
        super().__init__()
        self.wanted = wanted
        self.distinct: dict[str, int] = {}
        self.order: list[int] = []
        self.saved: dict[int, int] = {}

    def _number(self, name: str, args: Any, kwargs: Any, result: Any) -> int:
        number = super()._number(name, args, kwargs, result)
        if number and self.phase in self.wanted:
            call = {
                "operator": name,
                "arguments": described(args),
                "results": described(result if isinstance(result, (list, tuple)) else [result]),
                "launches": number,
            }
            self.order.append(self.distinct.setdefault(json.dumps(call), len(self.distinct)))
        return number

    def keep(self, tensor: Tensor) -> Tensor:
        if self.phase in self.wanted and tensor.device.type == "cuda" and not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            self.saved[storage._cdata] = storage.nbytes()
        return tensor


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        where = {"stride": list(value.stride()), "offset": value.storage_offset()}
        return {"dtype": dtype, "shape": list(value.shape), **where}
    if isinstance(value, (list, tuple)):
        return [described(entry) for entry in value]
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)


def trace_inference(case: trace.Case, record: Record) -> dict[str, Any]:
    """Images from the host, the deployed and folded network, decoding, NMS; the second time."""
    model = to_channels_last(fuse(to_deploy(create_model(case.network, case.classes))).to(trace.DEVICE)).eval()
    images = torch.zeros(case.batch, 3, case.height, case.width, dtype=torch.uint8)
    with torch.no_grad():
        for phase in ("", "inference"):
            record.phase = phase
            with autocast(trace.DEVICE, case.amp):
                maps = model.raw(prepare_images(images, trace.DEVICE, channels_last=True), auxiliary=False).main
            nms(model.decode([level.float() for level in maps]), conf=_CONF)
    record.phase = ""
    return {}


PHASES = {"step": trace.PHASES, "inference": ("inference",)}


def traced(case: trace.Case) -> dict[str, Any]:
    calls = Calls(PHASES[case.what])
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(pretend, "Record", return_value=calls))
        stack.enter_context(saved_tensors_hooks(calls.keep, lambda tensor: tensor))
        for op in _COUNTED_BY_VALUES:
            stack.enter_context(yf.backend("auto", op=op))
        trace.trace(case)
    distinct = [json.loads(text) for text in calls.distinct]
    return {"calls": distinct, "order": calls.order, "saved_bytes": sum(calls.saved.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=trace.Case.__doc__)
    parser.add_argument("cases", nargs="+")
    trace.TRACES["inference"] = trace_inference
    print(json.dumps([traced(trace.Case.parse(text)) for text in parser.parse_args().cases]))
    fake_cuda.end()


if __name__ == "__main__":
    main()
