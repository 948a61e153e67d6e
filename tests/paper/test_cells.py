"""Cells of an ablation: finished once, resumed after a kill, shared by processes, told apart by what they compute."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from yolov9_fast.data.rendered import render_dataset
from yolov9_fast.engine.config import TrainConfig
from yolov9_fast.engine.trainer import Trainer
from yolov9_fast.errors import UserError
from yolov9_fast.models import Graph, attach
from yolov9_fast.paper import cells as module
from yolov9_fast.paper.cells import METRICS, Cell, data_digest, make_cells, run_cells
from yolov9_fast.paper.systems import System


def systems(graph: Graph) -> list[System]:
    return [System("small", "plain", graph), System("small", "PFH", attach(graph, "pfh"))]


def test_a_finished_cell_is_not_trained_again(
    small_graph: Graph, short_recipe: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = make_cells(systems(small_graph), [0, 1], short_recipe, tmp_path)
    assert [(cell.system.row, cell.seed) for cell in cells] == [("plain", 0), ("PFH", 0), ("plain", 1), ("PFH", 1)]
    run_cells(cells[:3])
    results = [cell.result() for cell in cells]
    assert [result is not None for result in results] == [True, True, True, False]
    first = results[0]
    assert first is not None
    assert first["epochs"] == 2
    assert len(first["curve"]) == 2
    assert 0 <= first["last"]["ap"] <= 1
    trained = []
    monkeypatch.setattr(module, "_train", lambda cell: trained.append((cell.system.row, cell.seed)))
    run_cells(make_cells(systems(small_graph), [0, 1], short_recipe, tmp_path))
    assert trained == [("PFH", 1)]


def test_a_cell_gives_what_a_plain_run_gives(small_graph: Graph, short_recipe: TrainConfig, tmp_path: Path) -> None:
    cell = make_cells(systems(small_graph)[:1], [3], short_recipe, tmp_path)[0]
    run_cells([cell])
    graph = tmp_path / "g.yaml"
    graph.write_text(small_graph.as_yaml())
    trainer = Trainer(dataclasses.replace(short_recipe, model=str(graph), seed=3, project=str(tmp_path / "plain")))
    trainer.run()
    result = cell.result()
    assert result is not None
    last = trainer.state.rows[-1]
    expected = {name: last.get(f"metrics/{name}") for name in METRICS}
    assert expected["ap_large"] is None, "the pictures hold no large object"
    assert result["last"] == pytest.approx(expected, abs=1e-6)


def test_what_is_computed_makes_the_cell_and_where_does_not(
    small_graph: Graph, short_recipe: TrainConfig, few_pictures: Path, tmp_path: Path
) -> None:
    def key(recipe: TrainConfig = short_recipe, graph: Graph = small_graph, seed: int = 0) -> str:
        return make_cells([System("small", "plain", graph)], [seed], recipe, tmp_path)[0].key

    base = key()
    same = dataclasses.replace(short_recipe, workers=3, cache="ram", plots=True, device=None)
    assert key(same) == base
    moved = tmp_path / "moved.yaml"
    moved.write_text(f"path: {few_pictures.parent}\n" + few_pictures.read_text())
    assert key(dataclasses.replace(short_recipe, data=str(moved))) == base
    assert key(dataclasses.replace(short_recipe, lr0=0.02)) != base
    assert key(dataclasses.replace(short_recipe, epochs=3)) != base
    assert key(dataclasses.replace(short_recipe, augment=dataclasses.replace(short_recipe.augment, scale=0.1))) != base
    assert key(seed=1) != base
    assert key(graph=attach(small_graph, "pfh")) != base


def test_other_labels_are_other_data(tmp_path: Path) -> None:
    data = render_dataset(tmp_path / "d", train=2, val=2, size=64, seed=1)
    before = data_digest(data)
    label = next((tmp_path / "d" / "labels" / "train").glob("*.txt"))
    label.write_text("0 0.5 0.5 0.25 0.25\n")
    assert data_digest(data) != before


def test_guidance_changes_the_cell(small_graph: Graph, short_recipe: TrainConfig, tmp_path: Path) -> None:
    graph = attach(small_graph, "pfh")
    guided = System("small", "LHG", graph, {"lead_head_guided": True})
    plain, led = make_cells([System("small", "PFH", graph), guided], [0], short_recipe, tmp_path)
    assert plain.key != led.key
    assert led.recipe.lead_head_guided
    assert not plain.recipe.lead_head_guided


def test_systems_that_are_the_same_share_their_cell(
    small_graph: Graph, short_recipe: TrainConfig, tmp_path: Path
) -> None:
    again = System("another table", "–", small_graph)
    assert len(make_cells([systems(small_graph)[0], again], [0], short_recipe, tmp_path)) == 1


def test_a_killed_cell_goes_on_after_its_last_epoch(
    small_graph: Graph, short_recipe: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is the uninterrupted run's; the first epoch is not computed twice."""
    recipe = dataclasses.replace(short_recipe, epochs=3)
    whole, broken = (make_cells(systems(small_graph)[:1], [0], recipe, tmp_path / f)[0] for f in ("whole", "broken"))
    run_cells([whole])
    epochs = []
    original = Trainer._train_epoch

    def stop_in_the_second(self: Trainer, epoch: int) -> dict:
        epochs.append(epoch)
        if epoch == 1 and epochs.count(1) == 1:
            raise KeyboardInterrupt
        return original(self, epoch)

    monkeypatch.setattr(Trainer, "_train_epoch", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_cells([broken])
    assert broken.result() is None
    run_cells([broken])
    assert epochs == [0, 1, 1, 2]
    first, second = whole.result(), broken.result()
    assert first is not None
    assert second is not None
    assert first["curve"] == second["curve"]


def test_a_cell_killed_after_its_last_epoch_is_only_written_down(
    small_graph: Graph, short_recipe: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = make_cells(systems(small_graph)[:1], [0], short_recipe, tmp_path)[0]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate_best", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_cells([cell])
    monkeypatch.setattr(Trainer, "_train_epoch", lambda self, epoch: pytest.fail("trained again"))
    run_cells([cell])
    result = cell.result()
    assert result is not None
    assert result["epochs"] == 2


def test_a_killed_process_leaves_its_cell_to_another(
    small_graph: Graph, short_recipe: TrainConfig, tmp_path: Path
) -> None:
    """A process that holds a cell makes others wait; killed, it does not."""
    cell = make_cells(systems(small_graph)[:1], [0], short_recipe, tmp_path)[0]
    cell.folder.mkdir(parents=True)
    code = """
        import sys, time
        from pathlib import Path
        from yolov9_fast.paper.cells import _held
        with _held(Path(sys.argv[1]), False) as held:
            print(held, flush=True)
            time.sleep(600)
    """
    lock = cell.folder / "lock"
    other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(lock)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == b"True"
        assert not module._run_cell(cell, wait=False)
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    deadline = time.monotonic() + 30
    while not module._run_cell(cell, wait=False):
        assert time.monotonic() < deadline
    assert cell.result() is not None


def test_a_damaged_result_is_named(small_graph: Graph, short_recipe: TrainConfig, tmp_path: Path) -> None:
    cell: Cell = make_cells(systems(small_graph)[:1], [0], short_recipe, tmp_path)[0]
    cell.folder.mkdir(parents=True)
    cell.result_file.write_text("{")
    with pytest.raises(UserError, match="remove it to train again"):
        run_cells([cell])
    cell.result_file.write_text(json.dumps({"seed": 0}))
    assert cell.result() == {"seed": 0}
