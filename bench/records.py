"""Records of measurements: JSON lines, appended one write each; incomplete lines are skipped when they are read.

A file holds lines of four kinds: `run` (machine, versions, commit), `ceilings`, `measure` and `absent` (what was not
measured, and why). A process that dies leaves complete lines only; a torn last line of another writer is passed over.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from yolov9_fast._untrusted import read_text
from yolov9_fast.errors import UserError

Record = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results"
KINDS = ("run", "ceilings", "measure", "absent")
STEP_TABLE, COMMANDS, DATA = "step_table.jsonl", "commands.jsonl", "data.jsonl"
"""Records beside other people's code: one file of each kind for a device, besides those of its runs."""


def results_folder() -> Path:
    """The default folder of records: `bench/results` of the repository, else `bench-results` here."""
    return RESULTS if (RESULTS.parent.parent / "pyproject.toml").is_file() else Path("bench-results")


def run_name(commit: str | None) -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{commit or 'no-commit'}"


class Recorder:
    """Appends records to one file; each line is one write of the operating system, flushed to the disk."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = Path(path), run
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.path.parent}: {error.strerror}") from error
        self._mend()

    def write(self, kind: str, **content: Any) -> Record:
        assert kind in KINDS
        record = {"kind": kind, "run": self.run, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **content}
        line = json.dumps(_rounded(record), ensure_ascii=False, separators=(",", ":")) + "\n"
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, line.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        return record

    def _mend(self) -> None:
        """End an incomplete last line, so that what is appended starts on a new line."""
        if self.path.is_file() and self.path.stat().st_size:
            with open(self.path, "rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")


def _rounded(value: Any) -> Any:
    """Seven significant digits: more than any timing holds, and files that people can read."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        return float(f"{value:.7g}") if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value


def read(path: str | Path) -> list[Record]:
    """All complete records of a file.

    Raises:
        UserError: it cannot be read, or holds no record.
    """
    text = read_text(path, "records", "JSON_BYTES", UserError)
    found = list(_parsed(text.splitlines()))
    if not found:
        raise UserError(f"{path} holds no record; expected JSON lines as `yolov9-fast bench suite` writes them")
    return found


def _parsed(lines: Iterable[str]) -> Iterator[Record]:
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and record.get("kind") in KINDS:
            yield record


def key(record: Record) -> tuple[str, str, str]:
    """What two measurements must share to be compared: case, provider, layout."""
    return record["case"], record["provider"], record.get("layout") or ""


def measures(records: Iterable[Record]) -> dict[tuple[str, str, str], Record]:
    """The last measurement of each key."""
    return {key(record): record for record in records if record["kind"] == "measure"}


def newest_runs(folder: Path) -> dict[str, Path]:
    """For each device folder below `folder` the newest file of records, those named by a time first."""
    found = {}
    for device in sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []:
        files = [path for path in device.glob("*.jsonl") if path.name not in (STEP_TABLE, COMMANDS, DATA)]
        if files:
            found[device.name] = max(files, key=lambda path: (path.name[0].isdigit(), path.name))
    return found


class Run:
    """The records of one file, by what the tables ask for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        records = read(path)
        self.environments = [r["environment"] for r in records if r["kind"] == "run" and "device" in r["environment"]]
        if not self.environments:
            raise UserError(f"{path} has no record of the machine")
        self.environment = self.environments[0]
        self.commands = [r["command"] for r in records if r["kind"] == "run" and "device" in r["environment"]]
        self.ceilings = next((r for r in reversed(records) if r["kind"] == "ceilings"), None)
        latest = {(r["case"], r["provider"], r["layout"]): r for r in records if r["kind"] == "measure"}
        self.measures = list(latest.values())
        self.absent = [r for r in records if r["kind"] == "absent"]

    @property
    def device(self) -> str:
        return str(self.environment["device"])

    def of(self, family: str, subject: str | None = None) -> dict[str, list[Record]]:
        """Measurements of a family by case, in the order of the file."""
        found: dict[str, list[Record]] = defaultdict(list)
        for record in self.measures:
            if record["family"] == family and subject in (None, record["subject"]):
                found[record["case"]].append(record)
        return dict(found)
