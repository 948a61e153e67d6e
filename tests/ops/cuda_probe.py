"""Calls the CUDA wrappers on the host with tensors on pretended devices; run by test_cuda_on_host.py in a process."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import yolov9_fast.ops  # noqa: F401  loads the library

ROOT = Path(__file__).resolve().parents[2]
ops = torch.ops.yolov9_fast
probe = ctypes.CDLL(str(Path(os.environ["YOLOV9_FAST_LIBRARY_FOLDER"], "libcuda_on_host.so")))
probe.cuda_on_host_take_launches.restype = ctypes.c_char_p
probe.cuda_on_host_place.argtypes = [ctypes.c_void_p, ctypes.c_int]
probe.cuda_on_host_use_stream.argtypes = [ctypes.c_int64]


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    device: int
    stream: int


def launches() -> list[Launch]:
    """Since the last call."""
    found = []
    for line in probe.cuda_on_host_take_launches().decode().splitlines():
        kernel, *numbers = line.split()
        x, y, z, threads, shared, device, stream = map(int, numbers)
        found.append(Launch(kernel, (x, y, z), threads, shared, device, stream))
    return found


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


def calls() -> dict[str, tuple[list[Tensor], Callable[..., Any]]]:
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
    options = ([8, 16], 1.0, 0.0, 0.0, [7.5, 0.5, 1.5])

    def unless_ones(a: Tensor, b: Tensor, *rest: Tensor) -> list[Tensor]:
        upstream, *t, into_a, into_b = rest
        ops.detection_loss_unless_ones(upstream, [a, b], *t, *options, [into_a, into_b])
        return [into_a, into_b]

    return {
        "box_iou": ([boxes, boxes.clone()], lambda a, b: ops.box_iou(a, b)),
        "nms": ([prediction], lambda p: ops.nms(p, 0.1, 0.5, True, False, None, 10, 100)),
        "nms_boxes": ([boxes.clone(), scores, labels], lambda b, s, k: ops.nms_boxes(b, s, k, 0.5, 10)),
        "decode_forward": (maps, lambda *m: ops.decode_forward(list(m), [8, 16])),
        "decode_for_assignment": (
            [*(m.clone() for m in maps), torch.zeros(2, 3, dtype=torch.int64)],
            lambda a, b, k: ops.decode_for_assignment([a, b], k, [8, 16]),
        ),
        "assign": ([*tal, torch.full((1,), 4.0)], lambda *t: ops.assign(*t, 5, 0.5, 6.0, 1)),
        "detection_loss_forward": (
            [*(m.clone() for m in maps), *loss],
            lambda a, b, *t: ops.detection_loss_forward([a, b], *t, *options, True),
        ),
        "detection_loss_backward": (
            [*(m.clone() for m in maps), torch.full((3,), 2.0), *(t.clone() for t in loss)],
            lambda a, b, up, *t: ops.detection_loss_backward(up, [a, b], *t, *options),
        ),
        "detection_loss_unless_ones": (
            [*(m.clone() for m in maps), torch.full((3,), 2.0), *(t.clone() for t in loss),
             *(torch.zeros_like(m) for m in maps)],
            unless_ones,
        ),
    }  # fmt: skip


def check_devices(name: str, tensors: list[Tensor], call: Callable[..., Any]) -> None:
    """Launches go to the tensors' device and its current stream; tensors on two devices are refused."""
    launches()
    for device, stream in ((0, 0), (1, 0), (1, 7)):
        probe.cuda_on_host_use_stream(stream)
        with on_device(device, *tensors):
            call(*tensors)
        seen = launches()
        assert seen, name
        assert {(one.device, one.stream) for one in seen} == {(device, stream)}, (name, seen)
        assert all(one.shared == 0 and 32 <= one.threads <= 512 and min(one.grid) >= 1 for one in seen), (name, seen)
        assert probe.cuda_on_host_current_device() == 0, name
    for wrong in range(1, len(tensors)):
        mixed = "expected a tensor on CUDA device (0, got one on CUDA device 1|1, got one on CUDA device 0)"
        with on_device(1, tensors[wrong]), pytest.raises(RuntimeError, match=mixed) as raised:
            call(*tensors)
        assert "\n" not in str(raised.value), name
        assert not launches(), name


def check_orders(name: str, tensors: list[Tensor], call: Callable[..., Any]) -> None:
    """The same bits in whatever order blocks and threads run."""
    found = []
    for seed in range(4):
        os.environ["YOLOV9_FAST_CUDA_SEED"] = str(seed)
        found.append([leaf.clone() for leaf in tree_leaves(call(*tensors))])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.equal(one.nan_to_num(), same.nan_to_num()), name


def check_huge() -> None:
    """More than 2^31 elements: the first and the last block of each launch, on memory that is hardly touched."""
    os.environ["YOLOV9_FAST_CUDA_BLOCKS"] = "ends"
    try:
        corners = torch.rand(46500, 2) * 50
        boxes = torch.cat((corners, corners + 20), 1)
        overlaps = ops.box_iou(boxes, boxes)
        assert overlaps.numel() > 2**31
        assert overlaps[-1, -1] == 1
        assert overlaps[0, 0] == 1
        del overlaps
        level = torch.randn(1, 65, 8, 8)
        images = 2**31 // (5 * 64) + 1
        decoded = ops.decode_forward([level.expand(images, -1, -1, -1)], [8])
        assert decoded.numel() > 2**31
        assert torch.equal(decoded[-1, :, -1], ops.decode_forward([level], [8])[0, :, -1])
        del decoded
        prediction = torch.empty(1, 5, 2**31 // 5 + 1000)  # untouched memory is zero
        prediction.view(-1)[:4096] = 0
        prediction[0, :, -1] = torch.tensor([8.0, 8, 4, 4, 0.5])
        boxes, count, _, anchor = ops.nms(prediction, 0.1, 0.5, False, False, None, 10, 100)
        assert count.tolist() == [1]
        assert anchor[0, 0] == prediction.shape[2] - 1
        assert boxes[0, 0].tolist() == [6, 6, 10, 10, 0.5, 0]
    finally:
        del os.environ["YOLOV9_FAST_CUDA_BLOCKS"]


def main() -> None:
    names = {
        name
        for path in (ROOT / "csrc" / "cuda").glob("*.cu")
        for name in re.findall(r'library\.impl\("(\w+)"', path.read_text())
    }
    assert names == set(calls())
    for name, (tensors, call) in calls().items():
        check_devices(name, tensors, call)
        check_orders(name, tensors, call)
        print(name)
    check_huge()
    print("huge")


if __name__ == "__main__":
    main()
