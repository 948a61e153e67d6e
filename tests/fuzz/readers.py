"""What the targets of file readers share: hostile values, changed copies of valid input, and what a reader may do."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from yolov9_fast.errors import UserError

MAX_MESSAGE = 2000
"""Characters of an error, the path of the file not counted."""
_PLACEHOLDERS = {
    '"@deep"': "[" * 5000 + "]" * 5000,
    '"@deep mapping"': '{"a":' * 2000 + "1" + "}" * 2000,
    '"@digits"': "9" * 5000,
    '"@infinite"': "1e999",
    '"@long"': '"' + "x\\u001b" * 100_000 + '"',
}
"""Values that Python's writers refuse or that would fill a report, by what stands for them until they are written."""
# Signs that the code met something its author did not think of, though it came out as an error of the file.
_UNEXPECTED = (AssertionError, NameError, NotImplementedError, AttributeError, SystemError)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EXECUTING = {
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill", "os.killpg", "subprocess.Popen"),
    *("pickle.find_class", "socket.connect", "sys.addaudithook", "os.startfile"),
}
_CHANGING = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}


def hostile_text() -> st.SearchStrategy[str]:
    special = ["", "\0", "a\0b", "~", "~nobody", "..", "/dev/zero", "\x1b[2J", "\udcff", "²", "x" * 300, "@long"]
    return st.sampled_from(special) | st.text(max_size=20)


def hostile_values() -> st.SearchStrategy[Any]:
    numbers = [0, 1, -1, 2, 3, 255, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**9, 10**12, 10**400]
    floats = [0.0, -0.0, 0.5, 1e-310, 1e308, float("inf"), float("-inf"), float("nan")]
    leaves = (
        st.none()
        | st.booleans()
        | st.sampled_from(numbers)
        | st.sampled_from(floats)
        | hostile_text()
        | st.sampled_from(["@deep", "@deep mapping", "@digits", "@infinite"])
    )
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(hostile_text(), inner, max_size=3),
        max_leaves=6,
    )


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A copy of plain data in which a few nodes are replaced, left out, repeated or added."""
    root = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, 4))):
        parent: Any = root
        key: Any = 0
        while isinstance(parent[key], list | dict) and parent[key] and draw(st.integers(0, 5)):
            parent = parent[key]
            key = draw(st.sampled_from(sorted(parent, key=str) if isinstance(parent, dict) else range(len(parent))))
        action = draw(st.sampled_from(["replace", "replace", "leave out", "repeat", "add"]))
        if parent is root or action == "replace":
            parent[key] = draw(hostile_values())
        elif action == "leave out":
            del parent[key]
        elif isinstance(parent, list):
            parent[key:key] = [draw(hostile_values())] if action == "add" else parent[key : key + 1] * 3
        else:
            parent[draw(hostile_text())] = draw(hostile_values())
        if not isinstance(root[0], list | dict):
            break
    return root[0]


def json_text(value: Any) -> bytes:
    """JSON of `value`, the placeholders of `hostile_values` written out."""
    text = json.dumps(value)
    for name, replacement in _PLACEHOLDERS.items():
        text = text.replace(name, replacement)
    return text.encode(errors="surrogatepass")


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with some bytes changed, added, left out, repeated or moved."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(result)))
        length = draw(st.sampled_from([1, 2, 4, 8, 100]))
        action = draw(st.sampled_from(["set", "set", "number", "insert", "delete", "repeat", "cut"]))
        if action == "set":
            result[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif action == "number":
            size = draw(st.sampled_from([2, 4, 8]))
            number = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 2**63 - 1, 2**64 - 1]))
            order = draw(st.sampled_from(["little", "big"]))
            result[place : place + size] = (number % 256**size).to_bytes(size, order)  # type: ignore[arg-type]
        elif action == "insert":
            result[place:place] = draw(st.binary(max_size=8))
        elif action == "delete":
            del result[place : place + length]
        elif action == "repeat":
            result[place:place] = bytes(result[place : place + length]) * draw(st.sampled_from([1, 2, 50]))
        else:
            del result[place:]
    return bytes(result)


def refused_or_read(reader: Callable[[], Any], *files: Path) -> Any:
    """What `reader` returns, or None where it raises a `UserError`, a short one with an expected cause."""
    try:
        return reader()
    except UserError as error:
        text = str(error)
        for file in files:
            text = text.replace(str(file), file.name)
        assert len(text) <= MAX_MESSAGE, f"an error of {len(text)} characters: {text[:200]}"
        cause: BaseException | None = error
        while cause is not None:
            assert not isinstance(cause, _UNEXPECTED), f"{type(cause).__name__}: {cause}"
            cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
        return None


class _Watch:
    """Notes what is run, imported or written outside a folder while `folder` is set; installed once, for good."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.found: list[str] = []
        self.known: set[str] = set()
        self.installed = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and flags & _WRITING and not self._is_inside(path):
                self.found.append(f"open for writing: {path!r}")
        elif event == "import":
            top = str(arguments[0]).partition(".")[0]
            if top not in self.known:
                self.found.append(f"import: {arguments[0]}")
        elif event in _EXECUTING or (event in _CHANGING and not self._is_inside(arguments[0])):
            self.found.append(f"{event}: {arguments!r}"[:300])

    def _is_inside(self, path: Any) -> bool:
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
        assert self.folder is not None
        return os.path.abspath(text).startswith((self.folder, "/dev/null"))


_WATCH = _Watch()


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Raises `AssertionError` at its end where code was run or imported, or a file changed outside `folder`."""
    if not _WATCH.installed:
        sys.addaudithook(_WATCH)
        _WATCH.installed = True
    _WATCH.known = {name.partition(".")[0] for name in sys.modules}
    _WATCH.found = []
    _WATCH.folder = str(folder)
    try:
        yield
    finally:
        _WATCH.folder = None
    assert not _WATCH.found, "; ".join(_WATCH.found[:5])
