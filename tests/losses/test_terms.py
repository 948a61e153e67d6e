"""Loss terms from outside the package: value, weight, normalisation, branches, errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.losses.test_detection import CLASSES, SIZE, gradients, half_of_the_batch, random_output, some_targets
from yolov9_fast.errors import UserError
from yolov9_fast.losses import DetectionLoss, LossTerm, PaddedTargets, parse_terms
from yolov9_fast.nn.output import DetectionOutput
from yolov9_fast.ops._assign import Assignment


def logit_energy(maps: Sequence[Tensor], assignment: Assignment, targets: PaddedTargets) -> Tensor:
    logits = torch.cat([level.flatten(2) for level in maps], 2)[:, 64:]
    return (assignment.weight * logits.square().sum(1)).sum()


TERM = LossTerm("energy", logit_energy, weight=0.1)


def test_a_term_is_added_to_the_total_and_to_the_items(device: str) -> None:
    criterion = DetectionLoss(CLASSES, terms=[TERM])
    plain = DetectionLoss(CLASSES)(random_output(device=device), some_targets(device=device), SIZE)
    loss = criterion(random_output(device=device), some_targets(device=device), SIZE)
    assert criterion.names == ("box", "cls", "dfl", "energy")
    assert torch.equal(loss.items[:3], plain.items)
    assert loss.items[3] > 0
    assert not loss.items.requires_grad
    assert loss.total.item() == pytest.approx(4 * loss.items.sum().item())


def test_a_term_is_divided_by_the_sum_of_weights_and_multiplied_by_its_own(device: str) -> None:
    seen: list[Tensor] = []

    def count(maps: Sequence[Tensor], assignment: Assignment, targets: PaddedTargets) -> Tensor:
        seen.append(assignment.weight.sum())
        return assignment.weight.sum()

    loss = DetectionLoss(CLASSES, terms=[LossTerm("count", count, 3.0)])(
        random_output(dual=False, device=device), some_targets(device=device), SIZE
    )
    assert loss.items[3].item() == pytest.approx(3 * seen[0].item() / max(seen[0].item(), 1))


def test_a_term_of_the_auxiliary_branch_enters_with_the_weight_of_that_branch(device: str) -> None:
    output = random_output(device=device)
    criterion = DetectionLoss(CLASSES, terms=[TERM], auxiliary_weight=0.5)
    assert output.auxiliary is not None
    main, auxiliary = (criterion(DetectionOutput(maps), some_targets(device=device), SIZE).items[3] for maps in output)
    assert criterion(output, some_targets(device=device), SIZE).items[3].item() == pytest.approx(
        (main + 0.5 * auxiliary).item()
    )


def test_gradients_of_a_term_are_added_to_those_of_the_operator() -> None:
    plain, both = random_output(), random_output()
    DetectionLoss(CLASSES)(plain, some_targets(), SIZE).total.backward()
    DetectionLoss(CLASSES, terms=[TERM])(both, some_targets(), SIZE).total.backward()
    before, after = (torch.cat([g.flatten(2) for g in gradients(output)[:3]], 2) for output in (plain, both))
    assert torch.equal(before[:, :64], after[:, :64])
    assert not torch.equal(before[:, 64:], after[:, 64:])


def test_a_term_gets_float32_maps_under_autocast() -> None:
    seen = []

    def spy(maps: Sequence[Tensor], assignment: Assignment, targets: PaddedTargets) -> Tensor:
        seen.extend(level.dtype for level in maps)
        return maps[0].sum()

    output = DetectionOutput([level.detach().bfloat16() for level in random_output().main])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        DetectionLoss(CLASSES, terms=[LossTerm("spy", spy)])(output, some_targets(), SIZE)
    assert seen == [torch.float32] * 3


def _loss_of_half_of_the_batch(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part, targets = half_of_the_batch(rank)
    output = DetectionOutput(*([level[part] for level in maps] for maps in random_output() if maps))
    torch.save(DetectionLoss(CLASSES, terms=[TERM])(output, targets, SIZE).items * 2, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_of_twice_the_batch(tmp_path: Path) -> None:
    mp.spawn(_loss_of_half_of_the_batch, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = DetectionLoss(CLASSES, terms=[TERM])(random_output(), some_targets(), SIZE).items * 4
    torch.testing.assert_close(halves[0] + halves[1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [1.0, torch.ones(1), torch.tensor(1)])
def test_a_term_that_is_no_scalar_tensor_is_refused(value: object) -> None:
    term = LossTerm("wrong", lambda *_: value)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=r"^loss term wrong: expected a 0-dimensional floating tensor, got "):
        DetectionLoss(CLASSES, terms=[term])(random_output(), some_targets(), SIZE)


@pytest.mark.parametrize("names", [("box",), ("a", "a")])
def test_names_differ(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"^terms: expected names that differ, got box, cls, dfl, "):
        DetectionLoss(CLASSES, terms=[LossTerm(name, logit_energy) for name in names])


def test_terms_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "terms_by_path.py").write_text("def first(*_): ...\nsecond = box = first\n")
    monkeypatch.chdir(tmp_path)
    first, second = parse_terms("terms_by_path:first,terms_by_path:second=0.25")
    assert (first.name, first.weight, second.name, second.weight) == ("first", 1.0, "second", 0.25)
    assert parse_terms("") == ()
    for wrong in (
        "terms_by_path:third",
        "no_such_module:f",
        "terms_by_path",
        "terms_by_path:first=much",
        "terms_by_path:box",
    ):
        with pytest.raises(UserError, match=r"^loss_terms: "):
            parse_terms(wrong)
