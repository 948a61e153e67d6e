"""Reading files that may be damaged or hostile: sizes are checked first, every failure is one error of one line.

All readers raise `error`, a `UserError`, that begins with the path. They read regular files only: a device, a pipe or a
folder is refused, never waited for.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import IO, Any

from yolov9_fast._lazy import require
from yolov9_fast._text import printable
from yolov9_fast.errors import DataError, UserError
from yolov9_fast.limits import above_limit, limit

_SHORT = 300
_DIGITS = 100  # of an integer
_SHORT_REPR = reprlib.Repr()
_SHORT_REPR.maxstring = _SHORT_REPR.maxother = 120
_SHORT_REPR.maxlist = _SHORT_REPR.maxdict = _SHORT_REPR.maxtuple = 12
_SHORT_REPR.maxlevel = 4
# NotADirectoryError: a part of the path is a file.
_ABSENT = (FileNotFoundError, NotADirectoryError)


class MissingFileError(DataError):
    """No file of that name."""


def read_bytes(path: str | Path, what: str, size_limit: str, error: type[UserError] = DataError) -> bytes:
    """Contents of a regular file of at most `limit(size_limit)` bytes.

    Args:
        path: the file; `what`: its name in errors, such as "label file".
        size_limit: a key of `LIMITS`.
        error: the class of errors.

    Raises:
        UserError: `MissingFileError` if there is none and `error` is `DataError`, else `error`.
    """
    largest = limit(size_limit)
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path}: {what}: expected a regular file, got {_kind(status.st_mode)}")
            if status.st_size > largest:
                raise error(f"{path}: {what}: {above_limit(size_limit, status.st_size)}")
            content = file.read(status.st_size + 1)
            if len(content) > status.st_size:  # A file of /proc, or one that grows, is larger than it says.
                content += _rest(file, largest - len(content) + 1)
    except _ABSENT as problem:
        raise (MissingFileError if error is DataError else error)(f"{path}: {what} does not exist") from problem
    except IsADirectoryError as problem:
        raise error(f"{path}: {what}: expected a regular file, got a folder") from problem
    except (OSError, ValueError, MemoryError) as problem:
        raise error(f"{path}: {what} cannot be read: {reason(problem)}") from problem
    if len(content) > largest:
        raise error(f"{path}: {what}: {above_limit(size_limit)}")
    return content


def _rest(file: IO[bytes], count: int) -> bytes:
    """Up to `count` bytes more, read in pieces: a single `read` takes the memory for all of them first."""
    pieces = []
    while count > 0 and (piece := file.read(min(count, 1 << 20))):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def read_text(path: str | Path, what: str, size_limit: str, error: type[UserError] = DataError) -> str:
    """UTF-8 text of a file, without a byte order mark; arguments and errors as in `read_bytes`."""
    content = read_bytes(path, what, size_limit, error)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: {what}: expected UTF-8 text: {reason(problem)}") from problem


def read_json(path: str | Path, what: str, error: type[UserError] = DataError) -> Any:
    """The value that a JSON file holds, NaN and infinities included; errors as in `read_bytes`."""
    text = read_text(path, what, "JSON_BYTES", error)
    try:
        return json.loads(text)
    except RecursionError:
        raise error(f"{path}: {what}: lists and objects are nested too deeply") from None
    except ValueError as problem:
        raise error(f"{path}: {what}: expected JSON: {reason(problem)}") from problem


def read_yaml(path: str | Path, what: str, error: type[UserError] = DataError) -> Any:
    """The value that a YAML file holds, plain types only; errors as in `read_bytes`.

    Refused: more values than `limit("YAML_NODES")` with aliases expanded, deeper nesting than `limit("NESTING")`, a key
    that appears twice in a mapping.
    """
    return parse_yaml(read_text(path, what, "YAML_BYTES", error), f"{path}: {what}", error)


def parse_yaml(text: str, place: str, error: type[UserError] = DataError) -> Any:
    """As `read_yaml`, from a text; errors begin with `place`."""
    yaml = require("yaml")
    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        # Events come without recursion: the depth is known before anything follows it.
        depth = 0
        for event in yaml.parse(text, Loader=base):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > limit("NESTING"):
                raise error(f"{place}: {above_limit('NESTING')}")
        loader = base(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            count = _count(node, {}, loader, yaml)
            if count > limit("YAML_NODES"):
                raise error(f"{place}: {above_limit('YAML_NODES', count)}")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    # PyYAML's constructors let out whatever a value raises: `!!bool x` a KeyError, `!!int ''` an IndexError.
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        OverflowError,
        LookupError,
        RecursionError,
        AttributeError,
    ) as problem:
        raise error(f"{place}: expected YAML: {reason(problem)}") from problem


def _count(node: Any, known: dict[int, int], loader: Any, yaml: Any) -> int:
    """Number of values below a node, each alias counted as what it stands for."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias within its own value")
        return known[id(node)]
    known[id(node)] = 0
    count = 1
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:int" and len(node.value) > _DIGITS:
        raise ValueError(f"line {node.start_mark.line + 1}: an integer of {len(node.value):,} digits")
    if isinstance(node, yaml.SequenceNode):
        count += sum(_count(child, known, loader, yaml) for child in node.value)
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node, loader, yaml)
        count += sum(_count(child, known, loader, yaml) for pair in node.value for child in pair)
    known[id(node)] = count
    return count


def _check_keys(node: Any, loader: Any, yaml: Any) -> None:
    seen: set[Hashable] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            value = loader.construct_object(key)  # 0 and 00 are one key.
            if value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: the key {printable(key.value, 50)!r} appears twice")
            seen.add(value)


def user_path(text: object, what: str, error: type[UserError] = DataError) -> Path:
    """`text` as a path, `~` expanded; raises `error` for what no file system takes: a NUL byte, an over-long name."""
    if not isinstance(text, (str, os.PathLike)) or isinstance(text, bytes):
        raise error(f"{what}: expected a path, got {printable(repr(text), 100)}")
    try:
        path = Path(text).expanduser()
        raw = os.fsencode(path)
    except (RuntimeError, ValueError) as problem:
        raise error(f"{what}: expected a path, got {printable(repr(text), 100)}: {reason(problem)}") from problem
    if b"\0" in raw:
        raise error(f"{what}: expected a path, got one with a NUL byte: {printable(text, 100)}")
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > 255 or len(raw) > 4095:
        raise error(
            f"{what}: expected a path of at most 4095 bytes and names of at most 255, got {printable(text, 100)}"
        )
    return path


def shown(value: object) -> str:
    """`repr(value)`, shortened before it is made: a value may hold one long text many times."""
    try:
        return printable(_SHORT_REPR.repr(value), _SHORT)
    except ValueError:  # an integer with more digits than Python converts
        return f"a {type(value).__name__} that is too long"


def reason(problem: BaseException) -> str:
    """What an exception says, on one short line."""
    text = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
    return printable(" ".join(text.split()) or type(problem).__name__, _SHORT)


def absence(path: str | Path) -> str:
    """Why there is no regular file or folder `path`, such as "does not exist"."""
    try:
        mode = os.stat(path).st_mode
    except _ABSENT:
        return "is a broken link" if os.path.islink(path) else "does not exist"
    except (OSError, ValueError) as problem:
        return f"cannot be read: {reason(problem)}"
    return f"is {_kind(mode)}"


def _without_waiting(path: str, flags: int) -> int:
    """Open, also a pipe without a writer, at once."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _kind(mode: int) -> str:
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
