"""The code blocks of the pages in docs/extending, which the tests run as they are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PAGES = Path(__file__).resolve().parent.parent.parent / "docs/extending"


def code_blocks(page: str, language: str) -> list[str]:
    """The contents of all blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (PAGES / page).read_text(), re.DOTALL | re.MULTILINE)


def write_files(page: str, folder: Path) -> None:
    """Write each Python block that begins with `# NAME.py` to that file."""
    for block in code_blocks(page, "python"):
        if name := re.match(r"# (\w+\.py)\n", block):
            (folder / name[1]).write_text(block)


def commands(page: str) -> list[list[str]]:
    """The words after `yolov9-fast` of each command in the page's bash blocks."""
    lines = "".join(code_blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("yolov9-fast ")]
