"""Whatever a user names as a path: a command ends with one short line, at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from yolov9_fast.cli.main import main

TRAIN = "train --data {data} --model gelan-t --imgsz 32 --epochs 1 --batch 2 --workers 0 --device cpu"
VAL = "val --weights {weights} --data {data} --imgsz 32 --workers 0 --device cpu"
PREDICT = "predict --weights {weights} --source {image} --imgsz 32 --device cpu"
COMMANDS = {
    "train --data": (TRAIN.replace("--data {data}", ""), "--data"),
    "train --config": (TRAIN, "--config"),
    "train --model": (TRAIN.replace("--model gelan-t", ""), "--model"),
    "train --weights": (TRAIN, "--weights"),
    "train --project": (TRAIN, "--project"),
    "train --name": (TRAIN, "--name"),
    "train --resume": ("train", "--resume"),
    "train --resume --project": ("train --resume", "--project"),
    "train --resume --name": ("train --resume --project {folder}", "--name"),
    "val --weights": (VAL.replace("--weights {weights}", ""), "--weights"),
    "val --data": (VAL.replace("--data {data}", ""), "--data"),
    "val --project": (VAL, "--project"),
    "val --name": (VAL, "--name"),
    "predict --weights": (PREDICT.replace("--weights {weights}", ""), "--weights"),
    "predict --source": (PREDICT.replace("--source {image}", ""), "--source"),
    "predict --project": (PREDICT, "--project"),
    "predict --name": (PREDICT, "--name"),
    "convert SRC": ("convert", "BAD {folder}/out.safetensors"),
    "convert DST": ("convert", "{weights} BAD"),
    "info --weights": ("info", "--weights"),
    "info --model": ("info", "--model"),
    "demo --project": ("demo --epochs 1", "--project"),
    "bench report --records": ("bench report --out {folder}/x.md", "--records"),
    "bench compare": ("bench compare", "BAD {folder}/none.jsonl"),
    "paper fig6 IMAGE": ("paper fig6", "BAD"),
    "paper fig6 --out": ("paper fig6", "--out"),
    "paper fig7 --data": ("paper fig7 --out {folder}/x.png", "--data"),
    "paper table5 --config": ("paper table5", "--config"),
}
NO_PATHS = {
    "NUL": "a\0b.yaml",
    "long name": "x" * 300 + ".yaml",
    "long path": "x/" * 3000 + "a.yaml",
    "no user": "~nobody-of-this-name/a.yaml",
    "lone surrogate": "\ud800.yaml",
}


@pytest.fixture
def run(
    shapes: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, str], tuple[int, str]]:
    """Exit code and standard error of a command of `COMMANDS` with a path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YOLOV9_FAST_CACHE", str(tmp_path / "cache"))
    known = {
        "data": shapes,
        "weights": weights,
        "image": next((shapes.parent / "images" / "val").iterdir()),
        "folder": tmp_path,
    }

    def call(command: str, path: str) -> tuple[int, str]:
        words, flag = COMMANDS[command]
        flags = flag.split() if "BAD" in flag else [flag, "BAD"]
        given = [path if word == "BAD" else word.format(**known) for word in [*words.split(), *flags]]
        code = main(given)
        return code, capsys.readouterr().err

    return call


# Commands that load weights and data before they come to the path: what they call is tested with all kinds elsewhere.
SLOW = {name for name in COMMANDS if name.split()[1] in ("--project", "--name") and name.split()[0] != "demo"}


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        pytest.param(command, kind, marks=pytest.mark.slow if kind in ("long path", "lone surrogate") else ())
        for command in COMMANDS
        for kind in NO_PATHS
        if command not in SLOW or kind == "NUL"
    ],
)
def test_what_is_no_path_is_one_line(run: Callable[[str, str], tuple[int, str]], command: str, kind: str) -> None:
    code, text = run(command, NO_PATHS[kind])
    assert code == 2
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert len(text) < 1100


FILES: dict[str, Callable[[str], object]] = {
    "pipe": os.mkfifo,
    "device": lambda name: os.symlink("/dev/zero", name),
    "broken link": lambda name: os.symlink("nowhere", name),
    "ring": lambda name: os.symlink(name, name),
    "folder": os.mkdir,
}


@pytest.mark.parametrize(
    "kind", ["pipe", "device", *(pytest.param(k, marks=pytest.mark.slow) for k in list(FILES)[2:])]
)
@pytest.mark.parametrize(
    "command", [name for name in COMMANDS if name.split()[-1] not in ("--name", "--project", "DST", "--resume")]
)
def test_what_is_no_regular_file_is_one_line(
    run: Callable[[str, str], tuple[int, str]], tmp_path: Path, command: str, kind: str
) -> None:
    name = "x.safetensors" if "weights" in command or "SRC" in command else "x.txt" if "source" in command else "x.yaml"
    FILES[kind](str(tmp_path / name))
    code, text = run(command, name)
    assert code == 2
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert len(text) < 1100


@pytest.mark.parametrize("kind", ["pipe", "broken link"])
@pytest.mark.parametrize("command", ["train --project", "demo --project", "convert DST"])
def test_results_go_to_no_pipe_and_no_link_to_nowhere(
    run: Callable[[str, str], tuple[int, str]], tmp_path: Path, command: str, kind: str
) -> None:
    FILES[kind](str(tmp_path / "x.safetensors"))
    code, text = run(command, "x.safetensors/below.safetensors")
    assert code == 2
    assert text.startswith("error: ")
    assert text.count("\n") == 1
