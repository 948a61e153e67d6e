"""DetectionLoss: the published totals, items and gradients; batches without objects; several processes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import yolov9_fast as yf
from yolov9_fast.losses import DetectionLoss, detection, pad_targets
from yolov9_fast.losses.targets import sort_rows
from yolov9_fast.nn.output import DetectionOutput
from yolov9_fast.ops._assign import Assignment, assign

SIZE = 64
CLASSES = 3


def random_output(batch: int = 4, dual: bool = True, seed: int = 0, device: str = "cpu") -> DetectionOutput:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, 64 + CLASSES, SIZE // s, SIZE // s) for s in (8, 16, 32)]
    branches = [
        [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes] for _ in range(2)
    ]
    return DetectionOutput(branches[0], branches[1] if dual else None)


def some_targets(device: str = "cpu") -> Tensor:
    rows = [
        [0, 0, 0.5, 0.5, 0.6, 0.4],
        [0, 2, 0.3, 0.3, 0.4, 0.4],
        [1, 1, 0.7, 0.6, 0.5, 0.7],
        [3, 0, 0.4, 0.5, 0.8, 0.8],
    ]
    return torch.tensor(rows, device=device)


def gradients(output: DetectionOutput) -> list[Tensor]:
    maps = [*output.main, *(output.auxiliary or [])]
    return [level.grad for level in maps if level.grad is not None]


@pytest.mark.parametrize("case", ["single", "dual", "dual_lead_head"])
def test_equals_the_published_loss(golden_folder: Path, case: str) -> None:
    golden = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden_folder / f"ops/loss_{case}.npz").items()}
    count = 1 if case == "single" else 2
    branches = [[golden[f"pred_b{b}_l{level}"].requires_grad_() for level in range(3)] for b in range(count)]
    output = DetectionOutput(branches[-1], branches[0] if count == 2 else None)
    criterion = DetectionLoss(int(golden["nc"]), lead_head_guided=case == "dual_lead_head")
    loss = criterion(output, golden["targets"], int(golden["imgsz"]))
    loss.total.backward()
    torch.testing.assert_close(loss.total.double(), golden["loss"], rtol=2e-6, atol=0)
    items = torch.stack((loss.box, loss.cls, loss.dfl))
    torch.testing.assert_close(items, golden["items_box_cls_dfl"], rtol=2e-6, atol=0)
    for b, maps in enumerate(branches):
        for level, each in enumerate(maps):
            torch.testing.assert_close(each.grad, golden[f"grad_b{b}_l{level}"], rtol=2e-5, atol=1e-6)


def test_total_is_the_items_times_the_batch_size(device: str) -> None:
    loss = DetectionLoss(CLASSES)(random_output(device=device), some_targets(device=device), SIZE)
    assert loss.total.item() == pytest.approx(4 * (loss.box + loss.cls + loss.dfl).item())
    assert not loss.box.requires_grad


def test_the_auxiliary_branch_enters_with_its_weight(device: str) -> None:
    output = random_output(device=device)
    assert output.auxiliary is not None
    alone = [DetectionLoss(CLASSES)(DetectionOutput(maps), some_targets(device=device), SIZE).total for maps in output]
    both = DetectionLoss(CLASSES, auxiliary_weight=0.5)(output, some_targets(device=device), SIZE).total
    assert both.item() == pytest.approx((alone[0] + 0.5 * alone[1]).item())


def test_gains_scale_their_items(device: str) -> None:
    plain = DetectionLoss(CLASSES, box_gain=1, cls_gain=1, dfl_gain=1)(
        random_output(device=device), some_targets(device=device), SIZE
    )
    gained = DetectionLoss(CLASSES)(random_output(device=device), some_targets(device=device), SIZE)
    ratios = [(b / a).item() for a, b in zip(plain.items, gained.items, strict=True)]
    assert ratios == pytest.approx([7.5, 0.5, 1.5])


def test_lead_head_guidance_takes_the_targets_from_the_main_branch(device: str) -> None:
    output = random_output(device=device)
    guided = DetectionLoss(CLASSES, lead_head_guided=True, auxiliary_weight=1.0)(
        output, some_targets(device=device), SIZE
    )
    main = DetectionLoss(CLASSES, lead_head_guided=True)(
        DetectionOutput(output.main), some_targets(device=device), SIZE
    )
    twice = DetectionOutput(output.main, output.main)
    same = DetectionLoss(CLASSES, lead_head_guided=True, auxiliary_weight=1.0)(twice, some_targets(device=device), SIZE)
    assert same.total.item() == pytest.approx(2 * main.total.item())
    own = DetectionLoss(CLASSES, auxiliary_weight=1.0)(output, some_targets(device=device), SIZE)
    assert guided.total.item() != pytest.approx(own.total.item())


@pytest.mark.parametrize("lead_head_guided", [False, True])
@pytest.mark.parametrize("dual", [False, True])
def test_a_batch_without_objects_is_finite(lead_head_guided: bool, dual: bool, device: str) -> None:
    output = random_output(dual=dual, device=device)
    loss = DetectionLoss(CLASSES, lead_head_guided=lead_head_guided)(output, torch.zeros(0, 6, device=device), SIZE)
    loss.total.backward()
    assert math.isfinite(loss.total.item())
    assert loss.box.item() == loss.dfl.item() == 0
    assert loss.cls.item() > 0
    assert all(bool(each.isfinite().all()) for each in gradients(output))
    assert len(gradients(output)) == (6 if dual else 3)


def test_objects_that_no_anchor_can_learn_are_finite(device: str) -> None:
    far = torch.tensor([[0, 0, 0.5, 0.5, 0.0, 0.0], [1, 0, 5.0, 5.0, 0.1, 0.1]], device=device)
    for guided in (False, True):
        loss = DetectionLoss(CLASSES, lead_head_guided=guided)(random_output(device=device), far, SIZE)
        assert math.isfinite(loss.total.item())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_maps_that_are_not_finite_do_not_crash(bad: float, device: str) -> None:
    output = random_output(dual=False, device=device)
    with torch.no_grad():
        output.main[0][0, :, 2:5] = bad
    loss = DetectionLoss(CLASSES)(output, some_targets(device=device), SIZE)
    assert not math.isfinite(loss.total.item())


@pytest.mark.parametrize("lead_head_guided", [False, True])
def test_every_backend_gives_the_same_loss_and_gradients(lead_head_guided: bool, device: str) -> None:
    results = {}
    for name in ("eager", "auto"):
        output = random_output(device=device)
        with yf.backend(name):
            loss = DetectionLoss(CLASSES, lead_head_guided=lead_head_guided)(output, some_targets(device=device), SIZE)
            loss.total.backward()
        results[name] = (loss, gradients(output))
    torch.testing.assert_close(tuple(results["auto"][0]), tuple(results["eager"][0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results["auto"][1], results["eager"][1], rtol=1e-4, atol=1e-6)


def test_a_lead_head_guided_loss_assigns_once(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    calls = []
    monkeypatch.setattr(detection, "assign", lambda *args, **kwargs: calls.append(1) or assign(*args, **kwargs))
    for guided, count in ((True, 1), (False, 2)):
        calls.clear()
        DetectionLoss(CLASSES, lead_head_guided=guided)(random_output(device=device), some_targets(device=device), SIZE)
        assert len(calls) == count


def test_the_assigner_rule_reaches_the_assignment(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    seen = []

    def spy(*args: Tensor, rule: str = "yolov9", strides: Tensor | None = None, **kwargs: float) -> Assignment:
        seen.append((rule, None if strides is None else strides.flatten().unique().tolist()))
        return assign(*args, **kwargs)

    monkeypatch.setattr(detection, "assign", spy)
    for rule in ("yolov9", "mit"):
        DetectionLoss(CLASSES, assigner_rule=rule)(
            random_output(dual=False, device=device), some_targets(device=device), SIZE
        )
    assert seen == [("yolov9", None), ("mit", [8.0, 16.0, 32.0])]


def test_targets_may_come_padded(device: str) -> None:
    output = random_output(device=device)
    plain = DetectionLoss(CLASSES)(output, some_targets(device=device), SIZE)
    padded = pad_targets(some_targets(device=device), 4, CLASSES, (SIZE, SIZE), torch.float32, 9)
    assert DetectionLoss(CLASSES)(output, padded, SIZE).total.item() == pytest.approx(plain.total.item(), rel=1e-6)
    fixed = DetectionLoss(CLASSES, max_objects=9)(output, some_targets(device=device), SIZE)
    assert fixed.total.item() == pytest.approx(plain.total.item(), rel=1e-6)
    with pytest.raises(ValueError, match=r"^targets: expected 4 images, got 5"):
        DetectionLoss(CLASSES)(
            output, pad_targets(some_targets(device=device), 5, CLASSES, (SIZE, SIZE), torch.float32), SIZE
        )


@pytest.mark.parametrize("lead_head_guided", [False, True])
def test_a_row_that_is_left_out_unchecked_makes_the_loss_nan(lead_head_guided: bool, device: str) -> None:
    rows = some_targets(device=device)
    rows[0, 1] = CLASSES
    placed = sort_rows(rows, 4, CLASSES, (SIZE, SIZE), torch.float32, 4)
    loss = DetectionLoss(CLASSES, lead_head_guided=lead_head_guided)(random_output(device=device), placed, SIZE)
    assert loss.total.isnan()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("on_gpu", [False, True])
def test_on_a_gpu_nothing_waits(on_gpu: bool) -> None:
    here = random_output()
    there = DetectionOutput(
        *([level.detach().cuda().requires_grad_() for level in maps] for maps in here if maps is not None)
    )
    criterion = DetectionLoss(CLASSES, max_objects=8)
    targets = some_targets().cuda() if on_gpu else some_targets()
    criterion(there, targets, SIZE).total.backward()  # loads the kernels
    for level in (*there.main, *(there.auxiliary or [])):
        level.grad = None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = criterion(there, targets, SIZE)
        loss.total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = criterion(here, some_targets(), SIZE)
    expected.total.backward()
    torch.testing.assert_close(loss.total.cpu(), expected.total, rtol=1e-5, atol=0)
    for a, b in zip(gradients(there), gradients(here), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-6)


def test_autocast_does_not_lower_the_precision(device: str) -> None:
    output = random_output(device=device)
    expected = DetectionLoss(CLASSES)(output, some_targets(device=device), SIZE)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = DetectionLoss(CLASSES)(output, some_targets(device=device), SIZE)
    assert loss.total.dtype == torch.float32
    assert torch.equal(loss.total, expected.total)


def test_height_and_width_differ(device: str) -> None:
    maps = [torch.randn(1, 64 + CLASSES, 64 // s, 96 // s, device=device) for s in (8, 16, 32)]
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.5, 0.5]], device=device)
    assert math.isfinite(DetectionLoss(CLASSES)(DetectionOutput(maps), targets, (64, 96)).total.item())
    with pytest.raises(ValueError, match="image_size"):
        DetectionLoss(CLASSES)(DetectionOutput(maps), targets, (96, 64))


def test_maps_of_another_class_count_are_refused() -> None:
    with pytest.raises(ValueError, match="channels for 5 classes"):
        DetectionLoss(5)(random_output(), some_targets(), SIZE)


def test_evaluate_gives_the_same_without_gradient(device: str) -> None:
    output = random_output(device=device)
    loss = DetectionLoss(CLASSES).evaluate(output, some_targets(device=device), SIZE)
    assert not loss.total.requires_grad
    assert torch.equal(loss.total, DetectionLoss(CLASSES)(output, some_targets(device=device), SIZE).total)


def half_of_the_batch(rank: int) -> tuple[slice, Tensor]:
    """The images of a rank of two, and their targets."""
    part = slice(2 * rank, 2 * rank + 2)
    targets = some_targets()
    targets = targets[(targets[:, 0] >= part.start) & (targets[:, 0] < part.stop)]
    targets[:, 0] -= part.start
    return part, targets


def _loss_of_half_of_the_batch(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part, targets = half_of_the_batch(rank)
    results = []
    for guided in (False, True):
        full = random_output()
        output = DetectionOutput(*([level[part].detach().requires_grad_() for level in maps] for maps in full if maps))
        criterion = DetectionLoss(CLASSES, lead_head_guided=guided)
        loss = criterion(output, targets, SIZE)
        loss.total.backward()
        results.append((loss.total.item(), gradients(output)))
        if rank == 0:
            criterion.evaluate(output, targets, SIZE)  # must not wait for the other process
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_of_twice_the_batch(tmp_path: Path) -> None:
    mp.spawn(_loss_of_half_of_the_batch, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for guided in (False, True):
        output = random_output()
        loss = DetectionLoss(CLASSES, lead_head_guided=guided)(output, some_targets(), SIZE)
        loss.total.backward()
        (first_total, first), (second_total, second) = (half[guided] for half in halves)
        assert first_total + second_total == pytest.approx(loss.total.item(), rel=1e-5)
        for expected, *parts in zip(gradients(output), first, second, strict=True):
            torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-6)
