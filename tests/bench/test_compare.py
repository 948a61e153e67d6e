"""Comparison of files and of source trees: a slowdown of 10 % is caught, noise and a slow day are not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from yolov9_fast.bench import compare as module
from yolov9_fast.bench.compare import compare, compare_files, compare_trees
from yolov9_fast.bench.records import Recorder

from yolov9_fast.cli.main import main
from yolov9_fast.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent


def record(path: Path, seed: int, *, day: float = 1.0, slow: float = 1.0, device: str = "cpu-x") -> Path:
    """Two operators with an eager and a compiled form; `day`: the whole machine; `slow`: the compiled `a` alone."""
    generator = np.random.default_rng(seed)
    recorder = Recorder(path, path.stem)
    recorder.write("run", command="test", environment={"device": device})
    for case in ("a", "b"):
        for provider, base in (("eager", 2e-3), ("cpu", 1e-3)):
            factor = day * (slow if (case, provider) == ("a", "cpu") else 1.0)
            samples = list(factor * base * (1 + generator.exponential(0.01, 25)))
            recorder.write("measure", case=case, provider=provider, layout="nchw", samples=samples)
    return path


def test_a_ten_percent_slowdown_in_one_operator_is_caught(tmp_path: Path) -> None:
    old, new = record(tmp_path / "old.jsonl", 0), record(tmp_path / "new.jsonl", 1, slow=1.1)
    found = compare_files(old, new)
    assert [(one.case, one.provider) for one in found.slower] == [("a", "cpu nchw")]
    assert found.slower[0].ratio.value == pytest.approx(1.1, abs=0.02)
    assert "1 slower, 0 faster, 3 same" in found.text()


def test_the_same_again_is_the_same(tmp_path: Path) -> None:
    for seed in range(10):
        found = compare_files(record(tmp_path / f"a{seed}.jsonl", seed), record(tmp_path / f"b{seed}.jsonl", seed + 50))
        assert not found.slower


def test_a_slow_day_is_not_the_operators_fault(tmp_path: Path) -> None:
    found = compare_files(record(tmp_path / "a.jsonl", 0), record(tmp_path / "b.jsonl", 1, day=1.3))
    assert {one.provider for one in found.slower} == {"eager nchw"}, "eager alone shows the machine"


def test_devices_do_not_mix_and_names_must_exist(tmp_path: Path) -> None:
    old, new = record(tmp_path / "a.jsonl", 0), record(tmp_path / "b.jsonl", 1, device="cpu-y")
    with pytest.raises(UserError, match=r"cpu-x.*cpu-y"):
        compare_files(old, new)
    with pytest.raises(UserError, match="another one"):
        compare(str(old), "main")
    with pytest.raises(UserError, match="neither a file"):
        compare("no-such-commit-anywhere", "tree")


def test_the_command_says_what_is_slower_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = record(tmp_path / "old.jsonl", 0), record(tmp_path / "new.jsonl", 1, slow=1.1)
    assert main(["bench", "compare", str(old), str(new)]) == 1
    assert "slower" in capsys.readouterr().out
    assert main(["bench", "compare", str(old), str(old)]) == 0


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("YOLOV9_FAST_TEST_TIMING") != "1",
    reason="compares times, for a machine with nothing else to do: YOLOV9_FAST_TEST_TIMING=1",
)
def test_planted_work_of_ten_percent_is_caught_between_two_trees_and_nothing_else(tmp_path: Path) -> None:
    """One tree's eager `box_iou` computes a tenth of its rows twice; two real processes take turns."""
    trees = [tmp_path / "old", tmp_path / "new"]
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for tree in trees:
        for folder in ("yolov9_fast", "kernels", "bench"):
            shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    path = trees[1] / "yolov9_fast" / "ops" / "_box_iou.py"
    text = path.read_text()
    planted = text.replace(
        "    top_left = torch.maximum(a[:, None, :2]",
        "    if len(a) >= 300:\n        box_iou_reference(a[: len(a) * 13 // 100], b)\n"
        "    top_left = torch.maximum(a[:, None, :2]",
    )
    assert planted != text
    path.write_text(planted)
    options = {"only": ("nms",), "repeats": 3, "rounds": 25}
    found = compare_trees(*trees, match="box_iou", **options)  # type: ignore[arg-type]
    assert [(one.case, one.provider) for one in found.slower] == [("box_iou/300x300/float32/forward", "eager nchw")]
    same = compare_trees(trees[0], trees[0], match="nms/sparse", **options)  # type: ignore[arg-type]
    assert len(same.differences) == 1
    assert not same.slower


def test_a_commit_is_measured_from_a_worktree_that_goes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    if module.machine.git(ROOT, "rev-parse", "HEAD") is None:
        pytest.skip("no git repository")
    with module.source_tree("HEAD") as tree:
        assert (tree / "yolov9_fast" / "ops" / "_box_iou.py").is_file()
        assert tree != ROOT
    assert not tree.exists()
    listed = module.machine.git(ROOT, "worktree", "list")
    assert listed is not None
    assert str(tree) not in listed
    with module.source_tree("tree") as tree:
        assert tree == ROOT
