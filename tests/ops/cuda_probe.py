"""Calls the CUDA wrappers on the host with tensors on pretended devices; run by test_cuda_on_host.py in a process."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import yolov9_fast.ops  # noqa: F401  loads the library

ops = torch.ops.yolov9_fast
probe = ctypes.CDLL(str(Path(os.environ["YOLOV9_FAST_LIBRARY_FOLDER"], "_C_cpu.so")))
probe.cuda_on_host_take_launches.restype = ctypes.c_char_p
probe.cuda_on_host_place.argtypes = [ctypes.c_void_p, ctypes.c_int]


def launches() -> list[tuple[str, int, int]]:
    """(kernel, device, stream) of the launches since the last call."""
    lines = probe.cuda_on_host_take_launches().decode().splitlines()
    return [(line.split()[0], int(line.split()[5]), int(line.split()[6])) for line in lines]


@contextmanager
def on_device(device: int, *tensors: Tensor) -> Iterator[None]:
    """Pretend that `tensors` are on `device`."""
    for tensor in tensors:
        probe.cuda_on_host_place(tensor.data_ptr(), device)
    try:
        yield
    finally:
        for tensor in tensors:
            probe.cuda_on_host_place(tensor.data_ptr(), -1)


def calls() -> dict[str, tuple[list[Tensor], object]]:
    """For each operator its tensors and a call with them."""
    torch.manual_seed(0)
    corners = torch.rand(20, 2) * 50
    boxes = torch.cat((corners, corners + 20), 1)
    scores, labels = torch.rand(20), torch.randint(0, 3, (20,))
    prediction = torch.rand(2, 7, 33)
    maps = [torch.randn(2, 67, 4, 4), torch.randn(2, 67, 2, 2)]
    points = torch.rand(20, 2) * 60
    tal = [torch.rand(1, 20, 3), boxes[None].clone(), points, labels[None, :2].clone(), boxes[None, :2].clone(),
           torch.ones(1, 2, dtype=torch.bool)]  # fmt: skip
    loss = [torch.zeros(2, 20, dtype=torch.int64), torch.rand(2, 20), torch.zeros(2, 1, dtype=torch.int64),
            torch.tensor([[[4.0, 4, 20, 20]]]).repeat(2, 1, 1), torch.ones(())]  # fmt: skip
    return {
        "box_iou": ([boxes, boxes.clone()], lambda a, b: ops.box_iou(a, b)),
        "nms": ([prediction], lambda p: ops.nms(p, 0.1, 0.5, True, False, None, 10, 100)),
        "nms_boxes": ([boxes.clone(), scores, labels], lambda b, s, k: ops.nms_boxes(b, s, k, 0.5, 10)),
        "decode_forward": (maps, lambda *m: ops.decode_forward(list(m), [8, 16])),
        "assign": (tal, lambda *t: ops.assign(*t, None, 5, 0.5, 6.0, 0)),
        "detection_loss_forward": (
            [*(m.clone() for m in maps), *loss],
            lambda a, b, *t: ops.detection_loss_forward([a, b], *t, [8, 16], 1.0, 0.0, 0.0, [7.5, 0.5, 1.5], True),
        ),
    }  # fmt: skip


def main() -> None:
    for name, (tensors, call) in calls().items():
        for device, stream in ((0, 0), (1, 0), (1, 7)):
            probe.cuda_on_host_use_stream(stream)
            with on_device(device, *tensors):
                call(*tensors)
            seen = launches()
            assert seen, name
            assert {(where, into) for _, where, into in seen} == {(device, stream)}, (name, seen)
            assert probe.cuda_on_host_current_device() == 0, name
        for wrong in range(1, len(tensors)):
            mixed = pytest.raises(RuntimeError, match=r"expected a tensor on CUDA device [01]")
            with on_device(1, tensors[wrong]), mixed:
                call(*tensors)
            assert not launches(), name
        print(name)


if __name__ == "__main__":
    main()
