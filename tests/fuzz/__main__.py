"""`python -m tests.fuzz TARGET ... --seconds N`, or `--all`: prints a JSON report; exit status 1 if one failed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from csrc import on_host
from tests.fuzz import frame


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help="names of targets; --list prints them")
    parser.add_argument("--all", action="store_true", help="all targets")
    parser.add_argument("--list", action="store_true", help="print the names of the targets")
    parser.add_argument("--seconds", type=float, default=60.0, help="time of each target (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same cases (default 0)")
    parser.add_argument(
        "--cuda",
        choices=on_host.SEEDS,
        help="run the operators of csrc/cuda in place of the CPU's, by the host, in this build of csrc/on_host.py",
    )
    parser.add_argument("--output", type=Path, help="write the report to this file too, after each target")
    parser.add_argument("--child", nargs=2, metavar=("MODULE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        module, folder = options.child
        frame.child(module, options.targets[0], folder, options.seconds, options.seed)
    known = frame.load_all()
    if options.cuda:
        known = {name: one for name, one in known.items() if one.function.__module__ == "tests.fuzz.targets_boxes"}
        folder = on_host.build_on_host(options.cuda)
        os.environ.update(on_host.environment(options.cuda, folder, on_host.SEEDS[options.cuda]))  # of the children
    if options.list:
        print("\n".join(sorted(known)))
        return 0
    names = sorted(known) if options.all else options.targets
    unknown = sorted(set(names) - set(known))
    if unknown or not names:
        parser.error(f"targets: expected some of {', '.join(sorted(known))}, got {', '.join(unknown) or 'none'}")
    reports = []
    for name in names:
        report = frame.run(known[name], options.seconds, options.seed)
        reports.append(report)
        if options.output:
            options.output.write_text(frame.to_json(reports) + "\n")
        print(
            f"{name}: {report.cases} cases, {len(report.crashes)} crashes, {len(report.failures)} failures",
            file=sys.stderr,
            flush=True,
        )
    print(frame.to_json(reports))
    return 0 if all(report.clean for report in reports) else 1


sys.exit(main())
