"""Counts of one run of pytest, from its JUnit file, into the run's record of tests; prints them in a line.

python bench/junit.py FILE RECORD      reads FILE, whose name is that of the part; RECORD holds all parts as JSON
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any


def counted(file: Path) -> dict[str, Any]:
    """Numbers of passed, failed and skipped tests, seconds, and for each that failed its name and error in one line."""
    tests = list(ElementTree.parse(file).iter("testcase"))
    failures, skipped = {}, 0
    for test in tests:
        skipped += test.find("skipped") is not None
        for kind in ("failure", "error"):
            found = test.find(kind)
            if found is not None:
                name = f"{test.get('classname', '').replace('.', '/')}.py::{test.get('name')}"
                failures[name] = (found.get("message") or "").split("\n")[0][:200]
    seconds = round(sum(float(test.get("time") or 0) for test in tests), 1)
    passed = len(tests) - skipped - len(failures)
    return {"passed": passed, "failed": len(failures), "skipped": skipped, "seconds": seconds, "failures": failures}


def main() -> int:
    file, record = Path(sys.argv[1]), Path(sys.argv[2])
    if not file.exists():
        print(f"{file.stem}: ended before its report was written, see its log")
        return 1
    found = counted(file)
    record.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(record.read_text()) if record.exists() else {}
    record.write_text(json.dumps({**before, file.stem: found}, indent=1) + "\n")
    print(f"{file.stem}: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
