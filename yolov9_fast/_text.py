"""Text of unknown origin, such as file and class names, made fit for a terminal and a report."""

from __future__ import annotations

import re

# Control characters, line separators, marks that change the direction of writing, and halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, limit: int = 1000) -> str:
    """`text` on one line: unsafe characters as escapes (`\\n`, `\\x1b`), the middle cut out above `limit`."""
    text = str(text)
    if len(text) > limit:
        head = 2 * limit // 3
        text = f"{text[:head]} … {text[len(text) - limit + head :]}"
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def printable_lines(text: str, limit: int = 1000) -> str:
    """As `printable`, for each line of a text whose line breaks are its own."""
    return "\n".join(printable(line, limit) for line in text.split("\n"))
