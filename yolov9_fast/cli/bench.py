"""`yolov9-fast bench`: eager against fused in one table; the suite, its records compared and reported."""

from __future__ import annotations

import argparse
from typing import Any

from yolov9_fast._untrusted import user_path
from yolov9_fast.bench.cases import FAMILIES
from yolov9_fast.engine.device import single_device
from yolov9_fast.errors import UserError

_EPILOG = """examples:
  yolov9-fast bench --model yolov9-t --imgsz 320 --batch 8      eager against fused: speed, memory, equality
  yolov9-fast bench --model yolov9-t --compile                  torch.compile too (its compilation takes minutes)
  yolov9-fast bench suite --quick                               a few minutes, the smallest network
  yolov9-fast bench suite --full --budget 15                    everything, within 15 minutes
  yolov9-fast bench suite --only ops,nms --match bn_silu        some of it
  yolov9-fast bench compare main tree --only ops                this tree against a commit, in turns
  yolov9-fast bench compare old.jsonl new.jsonl                 two files of records
  yolov9-fast bench step-table --peers /opt/peers/bin/python    a training step beside other people's code
  yolov9-fast bench commands --data bccd.yaml --peers PYTHON    whole training commands beside theirs
  yolov9-fast bench data --data bccd.yaml --peers PYTHON        training images: what a core makes, and theirs
  yolov9-fast bench report                                      docs/benchmarks.md and its plots from the records
  yolov9-fast bench guard                                       kernels, copies, bytes of a step against the file
  yolov9-fast bench guard --update                              rewrite the file
  yolov9-fast bench predict --network yolov9-t yolov9-c         predicted times on GPUs, traced without one
  yolov9-fast bench predict --device H100 mine.json             for some, of them one that a file describes

exit codes: 0 done, 1 results differ, something is slower, or the guard found a difference"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("--model", default="yolov9-t", metavar="NAME", help="network (default %(default)s)")
    add("--imgsz", type=int, default=320, metavar="N", help="image size in pixels (default %(default)s)")
    add("--batch", type=int, default=8, metavar="N", help="images per batch (default %(default)s)")
    add("--device", default=None, help="cpu or a GPU's number (default: a GPU where there is one)")
    add("--seconds", type=float, default=40.0, metavar="S", help="time for the timed rounds (default %(default)s)")
    add("--compile", action="store_true", help="torch.compile as a third side")
    commands = parser.add_subparsers(dest="action", metavar="ACTION", title="actions")
    _configure_suite(_sub(commands, "suite", "measure cases and record them"))
    _configure_compare(_sub(commands, "compare", "two files of records, or two source trees"))
    report = _sub(commands, "report", "write docs/benchmarks.md and its plots from the records")
    report.add_argument("--results", metavar="DIR", help="folder of records (default bench/results)")
    report.add_argument("--records", nargs="+", default=[], metavar="FILE", help="these files instead")
    report.add_argument("--out", default="docs/benchmarks.md", metavar="FILE.md", help="default %(default)s")
    guard = _sub(commands, "guard", "counts of a training step against the file in the repository")
    guard.add_argument("--update", action="store_true", help="rewrite the file")
    _configure_step_table(_sub(commands, "step-table", "a training step beside other people's code, in turns"))
    _configure_commands(_sub(commands, "commands", "whole training commands beside other people's"))
    _configure_data(_sub(commands, "data", "training images: decoding, augmentation, collation, the loader"))
    _configure_predict(_sub(commands, "predict", "predicted times of a step or of inference on GPUs, without a GPU"))


def _sub(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return made


def _configure_suite(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", default=",".join(FAMILIES), metavar="A,B", help="families (default %(default)s)")
    add("--match", default="", metavar="TEXT", help="only cases with this in their name")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the smallest network (default)")
    size.add_argument("--full", action="store_true", help="all networks, sizes, batches and objects")
    add("--budget", type=float, metavar="MINUTES", help="stop measuring after so long; what is left out is recorded")
    add("--compile", choices=("none", "default", "all"), default="none", help="torch.compile; all: max-autotune too")
    add("--peers", action=argparse.BooleanOptionalAction, default=True, help="OpenCV, ONNX Runtime, … (default on)")
    add("--op-batch", type=int, default=2, metavar="N", help="images per batch of single operators (default 2)")
    add("--out", metavar="DIR", help="folder of records (default bench/results)")
    add("--run", metavar="NAME", help="name of the run; one that exists continues where it stopped")
    add("--device", default=argparse.SUPPRESS, help="cpu or a GPU's number (default: a GPU where there is one)")


def _configure_compare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("old", help="a file of records, or a commit, branch, tag, or `tree` for this one")
    add("new", help="likewise")
    add("--only", default="ops,loss,nms", metavar="A,B", help="families, for trees (default %(default)s)")
    add("--match", default="", metavar="TEXT", help="only cases with this in their name")
    add("--full", action="store_true", help="all networks and sizes")
    add("--threshold", type=float, default=0.05, metavar="X", help="what counts as a difference (default %(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="repeats that all must show it (default %(default)s)")
    add("--rounds", type=int, default=15, metavar="N", help="samples of a repeat (default %(default)s)")
    add("--threads", type=int, default=1, metavar="N", help="threads; with 1 the processor's time counts (default 1)")
    add("--device", default=argparse.SUPPRESS, help="cpu or a GPU's number (default: a GPU where there is one)")


_PEERS = "the Python of an environment with the packages of others (bench/METHOD.md)"


def _configure_step_table(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--peers", metavar="PYTHON", help=_PEERS)
    add("--rows", nargs="+", metavar="ROW", help="some of them (default all)")
    add("--imgsz", type=int, default=320, metavar="N", help="image size in pixels (default %(default)s)")
    add("--batch", type=int, default=8, metavar="N", help="images per step (default %(default)s)")
    add("--threads", type=int, metavar="N", help="threads of each process (default: as many as torch takes)")
    add("--seconds", type=float, default=200.0, metavar="S", help="time for the rounds (default %(default)s)")
    add("--out", metavar="DIR", help="folder of records (default bench/results)")


def _configure_commands(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="FILE", help="data file with the splits train and val")
    add("--peers", metavar="PYTHON", help=_PEERS)
    add("--rows", nargs="+", metavar="ROW", help="some of them (default all)")
    add("--epochs", type=int, default=2, metavar="N", help="epochs (default %(default)s)")
    add("--imgsz", type=int, default=320, metavar="N", help="image size in pixels (default %(default)s)")
    add("--batch", type=int, default=8, metavar="N", help="images per step (default %(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="loader processes (default %(default)s)")
    add("--rounds", type=int, default=1, metavar="N", help="runs of each command, in turns (default %(default)s)")
    add("--out", metavar="DIR", help="folder of records (default bench/results)")


def _configure_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", metavar="FILE", help="data file with the split train (default: rendered photographs)")
    add("--peers", metavar="PYTHON", help=_PEERS)
    add("--rows", nargs="+", metavar="ROW", help="some of them (default all)")
    add("--imgsz", type=int, nargs="+", default=[640, 320], metavar="N", help="image sizes (default 640 320)")
    add("--batch", type=int, default=16, metavar="N", help="images per batch (default %(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="loader processes (default %(default)s; 0: no loader)")
    add("--large", type=int, default=1280, metavar="N", help="also copies of this long side (default %(default)s)")
    add("--seconds", type=float, default=20.0, metavar="S", help="for each size and set (default %(default)s)")
    add("--out", metavar="DIR", help="folder of records (default bench/results)")


def _configure_predict(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "A device's file: see docs/benchmarks.md. Needs a source checkout, a C++ compiler, no GPU."
    add = parser.add_argument
    add("--network", nargs="+", default=["yolov9-t"], metavar="NAME", help="networks (default yolov9-t)")
    add("--what", nargs="+", choices=("step", "inference"), default=["step"], help="default step")
    add("--amp", choices=("bf16", "fp16", "off"), default="bf16", help="mixed precision (default %(default)s)")
    add("--batch", type=int, default=16, metavar="N", help="images per batch (default %(default)s)")
    add("--imgsz", type=int, default=640, metavar="N", help="image size in pixels (default %(default)s)")
    add("--device", nargs="+", default=[], metavar="NAME", help="GPUs by name, or JSON files of others (default all)")
    add("--json", metavar="FILE", help="write the records to this file too")


def run(arguments: argparse.Namespace) -> int:
    actions = {
        "suite": _suite,
        "compare": _compare,
        "report": _report,
        "guard": _guard,
        "predict": _predict,
        "step-table": _step_table,
        "commands": _commands,
        "data": _data,
        None: _first,
    }
    return actions[arguments.action](arguments)


def _first(arguments: argparse.Namespace) -> int:
    from yolov9_fast.bench.first import compare_first

    _check_step(arguments)
    text, agree = compare_first(
        arguments.model,
        arguments.imgsz,
        arguments.batch,
        single_device(arguments.device),
        compiled=arguments.compile,
        seconds=arguments.seconds,
    )
    print(text)
    return 0 if agree else 1


def _check_step(arguments: argparse.Namespace) -> None:
    for size in arguments.imgsz if isinstance(arguments.imgsz, list) else [arguments.imgsz]:
        if size % 32 or size < 32:
            raise UserError(f"--imgsz: expected a positive multiple of 32, got {size}")
    for name in ("batch", "epochs", "workers", "rounds", "threads"):
        value = getattr(arguments, name, None)
        if value is not None and value < (name != "workers"):
            raise UserError(f"--{name}: expected at least {int(name != 'workers')}, got {value}")


def _suite(arguments: argparse.Namespace) -> int:
    from yolov9_fast.bench.cases import Settings
    from yolov9_fast.bench.records import read
    from yolov9_fast.bench.suite import run_suite, summary

    settings = Settings(full=arguments.full, compile=arguments.compile, peers=arguments.peers, batch=arguments.op_batch)
    path = run_suite(
        settings,
        single_device(arguments.device),
        only=[part for part in arguments.only.split(",") if part],
        match=arguments.match,
        budget=60 * arguments.budget if arguments.budget else None,
        out=user_path(arguments.out, "--out", UserError) if arguments.out else None,
        run=arguments.run,
    )
    records = read(path)
    print(summary(records))
    print(f"records in {path}")
    return 1 if any(record.get("wrong") for record in records) else 0


def _compare(arguments: argparse.Namespace) -> int:
    from yolov9_fast.bench.compare import compare

    comparison = compare(
        arguments.old,
        arguments.new,
        only=[part for part in arguments.only.split(",") if part],
        match=arguments.match,
        full=arguments.full,
        threshold=arguments.threshold,
        repeats=arguments.repeats,
        rounds=arguments.rounds,
        threads=arguments.threads,
        device=str(single_device(arguments.device)),
    )
    print(comparison.text(arguments.threshold))
    return 1 if comparison.slower else 0


def _report(arguments: argparse.Namespace) -> int:
    from yolov9_fast.bench.records import results_folder
    from yolov9_fast.bench.report import write_report

    results = user_path(arguments.results, "--results", UserError) if arguments.results else results_folder()
    records = [user_path(name, "--records", UserError) for name in arguments.records]
    for path in write_report(results, user_path(arguments.out, "--out", UserError), records):
        print(path)
    return 0


def _guard(arguments: argparse.Namespace) -> int:
    from yolov9_fast.bench import guard

    if arguments.update:
        print(f"wrote {guard.update()}")
        return 0
    found = guard.check()
    if found is None:
        print(f"no counts for {guard.environment_key()}; write them with `{guard.UPDATE}`")
        return 1
    counted = guard.check_instructions()
    if isinstance(counted, str):
        print(f"instructions: not counted, {counted}")
    else:
        found += counted
    for finding in found:
        print(finding.text())
    print(f"{len(found)} differences" if found else "all counts as in the file")
    return 1 if found else 0


def _predict(arguments: argparse.Namespace) -> int:
    from yolov9_fast.bench import predict

    target = user_path(arguments.json, "--json", UserError) if arguments.json else None
    chosen = [predict.device_of(name) for name in arguments.device]
    records = []
    for network in arguments.network:
        for what in arguments.what:
            records.append(
                predict.predict(
                    network,
                    what=what,
                    batch=arguments.batch,
                    image_size=arguments.imgsz,
                    amp=arguments.amp,
                    chosen=chosen or None,
                )
            )
            print(predict.text(records[-1]), end="\n\n")
    if target is not None:
        print(f"wrote {predict.write(records, target)}")
    return 0


def _step_table(arguments: argparse.Namespace) -> int:
    from yolov9_fast.bench.records import read
    from yolov9_fast.bench.step_table import run_step_table, text

    _check_step(arguments)
    path = run_step_table(
        peers=arguments.peers,
        **({"rows": arguments.rows} if arguments.rows else {}),
        size=arguments.imgsz,
        batch=arguments.batch,
        threads=arguments.threads,
        seconds=arguments.seconds,
        out=user_path(arguments.out, "--out", UserError) if arguments.out else None,
    )
    records = read(path)
    print(text(records))
    print(f"records in {path}")
    return 1 if any(record.get("wrong") for record in records) else 0


def _commands(arguments: argparse.Namespace) -> int:
    from yolov9_fast.bench.commands import Settings, run_commands, text
    from yolov9_fast.bench.records import read

    _check_step(arguments)
    path = run_commands(
        user_path(arguments.data, "--data", UserError),
        Settings(arguments.epochs, arguments.imgsz, arguments.batch, arguments.workers),
        peers=arguments.peers,
        **({"rows": arguments.rows} if arguments.rows else {}),
        rounds=arguments.rounds,
        out=user_path(arguments.out, "--out", UserError) if arguments.out else None,
    )
    print(text(read(path)))
    print(f"records in {path}")
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from yolov9_fast.bench.data_table import run_data_table, text
    from yolov9_fast.bench.records import read

    _check_step(arguments)
    if arguments.large < 0:
        raise UserError(f"--large: expected at least 0, got {arguments.large}")
    path = run_data_table(
        user_path(arguments.data, "--data", UserError) if arguments.data else None,
        sizes=arguments.imgsz,
        batch=arguments.batch,
        workers=arguments.workers,
        large=arguments.large,
        peers=arguments.peers,
        **({"rows": arguments.rows} if arguments.rows else {}),
        seconds=arguments.seconds,
        out=user_path(arguments.out, "--out", UserError) if arguments.out else None,
    )
    print(text(read(path)))
    print(f"records in {path}")
    return 0
