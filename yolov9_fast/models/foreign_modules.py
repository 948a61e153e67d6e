"""Weights inside what torch.save wrote: a state dict or a pickled module, found, taken out, and described."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from yolov9_fast._text import printable
from yolov9_fast.errors import CheckpointError
from yolov9_fast.limits import limit
from yolov9_fast.models.array_files import check_count
from yolov9_fast.models.foreign_archive import restricted_load
from yolov9_fast.models.pickle_calls import Stub

MAX_KEY = 500
"""Characters of a weight's name."""
_MAX_MODULE_DEPTH = 64
_MAX_MODULES = 100_000
_MAX_PLAIN_VALUES = 20_000
_MAX_PLAIN_DEPTH = 32
_METADATA = ("names", "nc", "yaml", "stride")
_SPARE_BYTES = 1 << 20


@dataclass
class ModuleContent:
    """What a pickled network holds.

    Attributes:
        state: parameters and persistent buffers by path.
        attributes: of the modules by path, with the class's own name under "class": those in `_ATTRIBUTES`.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_torch(path: Path) -> tuple[ModuleContent, dict[str, Any]]:
    """Weights and metadata (`class_path`, `names`, `nc`, `yaml`, `stride`) of a file written by torch.save.

    Raises:
        CheckpointError: as `restricted_load`, or no weights in it.
    """
    content = restricted_load(path)
    weights = _find_weights(content, set())
    if weights is None:
        keys = ", ".join(str(k) for k in list(content)[:8]) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} holds no weights that can be found (it holds: {printable(keys, 200)})")
    metadata = {}
    if isinstance(weights, Stub):
        plain = {key: _plain(weights.state.get(key)) for key in _METADATA}
        metadata = {"class_path": weights.path, **{key: value for key, value in plain.items() if value is not None}}
        try:
            found = module_content(weights)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    else:
        found = ModuleContent(weights)
    _check_sizes(path, found.state)
    return found, metadata


def _check_sizes(path: Path, state: dict[str, Tensor]) -> None:
    """Views of the same numbers each become numbers of their own; a network and its average may share theirs."""
    check_count(path, len(state))
    numbers, size = sum(value.nbytes for value in state.values()), path.stat().st_size
    if numbers > 2 * size + _SPARE_BYTES:
        raise CheckpointError(
            f"{path}: expected weights of at most twice the file's {size:,} bytes, got views of {numbers:,} bytes"
        )


def _find_weights(content: Any, visited: set[int], depth: int = 0) -> dict[str, Tensor] | Stub | None:
    """A state dict or a pickled module, sought under the keys where the projects keep it."""
    if depth > 4 or id(content) in visited:
        return None
    visited.add(id(content))
    if isinstance(content, Stub):
        state = content.state
        if not isinstance(state, dict):
            return None
        return content if "_modules" in state else _find_weights(state.get("ema"), visited, depth + 1)
    if not isinstance(content, dict):
        return None
    for key in ("ema", "model", "state_dict", "model_state_dict"):
        value = content.get(key)
        found = None if value is None or isinstance(value, Tensor) else _find_weights(value, visited, depth + 1)
        if found is not None:
            return found
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return tensors if tensors and 2 * len(tensors) > len(content) else None


def module_content(module: Stub) -> ModuleContent:
    """State dict and attributes of a pickled `nn.Module`.

    Raises:
        ValueError: modules nested without end, or more tensors than a network has.
    """
    result = ModuleContent()
    pending: list[tuple[str, Any, int]] = [("", module, 0)]
    visited = 0
    while pending:
        prefix, stub, depth = pending.pop()
        state = stub.state if isinstance(stub, Stub) and isinstance(stub.state, dict) else {}
        groups = [_named(state.get(group)) for group in ("_parameters", "_buffers", "_modules")]
        visited += 1 + sum(map(len, groups))
        if depth > _MAX_MODULE_DEPTH or visited > _MAX_MODULES + limit("TENSORS"):
            raise ValueError("its modules are nested without end")
        if len(prefix) > MAX_KEY:
            raise ValueError(f"the name of a module of more than {MAX_KEY} characters")
        if isinstance(stub, Stub):
            kept = {name: state[name] for name in _ATTRIBUTES if name in state}
            result.attributes[prefix.removesuffix(".")] = {"class": stub.path.rpartition(".")[2], **kept}
        parameters, buffers, children = groups
        names = state.get("_non_persistent_buffers_set")
        transient = names if isinstance(names, set | frozenset) else ()
        tensors = [*parameters, *((name, value) for name, value in buffers if name not in transient)]
        result.state.update({f"{prefix}{name}": value for name, value in tensors if isinstance(value, Tensor)})
        pending.extend((f"{prefix}{name}.", child, depth + 1) for name, child in reversed(children))
    return result


_ATTRIBUTES = ("eps", "momentum", "stride", "padding", "dilation", "groups", "padding_mode")


def _named(group: Any) -> list[tuple[str, Any]]:
    """Items of a module's dictionary of parameters, buffers or modules."""
    if not isinstance(group, dict):
        return []
    return [(name, value) for name, value in group.items() if isinstance(name, str) and len(name) <= MAX_KEY]


def _plain(value: Any) -> Any:
    """`value` where it is plain data of reasonable size, small tensors as lists; None otherwise."""
    return _plain_within(value, [_MAX_PLAIN_VALUES], _MAX_PLAIN_DEPTH)


def _plain_within(value: Any, budget: list[int], depth: int) -> Any:
    budget[0] -= 1
    if budget[0] < 0 or depth < 0:
        return None
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= 16 else None
    if isinstance(value, str | float | bool) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    if isinstance(value, list | tuple) and len(value) <= budget[0]:
        return [_plain_within(v, budget, depth - 1) for v in value]
    if isinstance(value, dict) and len(value) <= budget[0]:
        return {k: _plain_within(v, budget, depth - 1) for k, v in value.items() if isinstance(k, str | int)}
    return None
