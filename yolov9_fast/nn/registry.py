"""Blocks by name: the library's own and users'. Graphs, GELAN and auxiliary branches build their layers from here.

A block is a class (or function) called as `block(in_channels, *arguments)`, with a graph layer's arguments, or as
`block([in_channels, …], *arguments)` where it has several inputs. It returns a module over [B, C, H, W]. Known by name
is what `register_block` adds; any other block of one input is named by its import path, `package.module:Class`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from yolov9_fast._lazy import import_module
from yolov9_fast._text import printable
from yolov9_fast._untrusted import shown

Channels = int | list[int]
"""Channels of a layer's output: of one map, or of every map where a layer returns a list (CBLinear)."""
OutChannels = Callable[[list[Any], tuple[Any, ...]], Any]
"""Channels of the output from the `Channels` of every input and the layer's arguments."""
Role = Literal["block", "layer", "elan", "pyramid", "concat", "upsample", "identity", "route", "head"]
_Made = TypeVar("_Made", bound=Callable[..., nn.Module])
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
PROBE_SIZE = 32
"""Pixels of the square zeros on which a user's block is checked."""


@dataclass(frozen=True)
class BlockSpec:
    """What graphs know of a block.

    Attributes:
        name: its name, or its import path.
        make: the class or function.
        inputs: "one": `forward(x)`; "many": `forward([x, …])`, and `make` gets the list of their channels.
        takes_channels: False: `make` is called with the arguments alone.
        role: what it does in a graph.

            | role | meaning |
            | --- | --- |
            | block | any; one called as (in_channels, out_channels, depth) can be a stage of `GELAN` |
            | layer | any; never a stage of `GELAN` |
            | elan | `ELANBase`: takes the parts of a Concat without joining them |
            | pyramid | pools at several sizes: belongs to the neck, not to the backbone |
            | concat, upsample, identity | `Concat`, `Upsample`, `Silence` |
            | route | gives maps to an auxiliary branch (`CBLinear`); the backbone ends before it |
            | head | `Head`: the last layer of a graph |

        out_channels: channels of the output. None: the block is run once on zeros when it is built, which also checks
            it.
    """

    name: str
    make: Callable[..., nn.Module]
    inputs: Literal["one", "many"] = "one"
    role: Role = "block"
    takes_channels: bool = True
    out_channels: OutChannels | None = None

    def create(self, inputs: list[Any], arguments: Sequence[Any]) -> nn.Module:
        """The module over inputs of so many channels."""
        leading = [inputs if self.inputs == "many" else inputs[0]] if self.takes_channels else []
        return self.make(*leading, *arguments)

    def build(self, inputs: list[Any], arguments: Sequence[Any]) -> tuple[nn.Module, Channels]:
        """The module, and the channels of its output.

        Raises:
            ValueError: it is not a module, or fails on its inputs.
        """
        module = self.create(inputs, arguments)
        if self.out_channels is not None:
            return module, self.out_channels(inputs, tuple(arguments))
        return module, channels_of(self.run(module, inputs))

    @torch.no_grad()
    def run(self, module: Any, inputs: list[Any]) -> Any:
        """Output of the module in evaluation mode for zeros [1, C, 32, 32].

        Raises:
            ValueError: it is not a module, it fails, or it returns something other than maps; names the block.
        """
        if not isinstance(module, nn.Module):
            raise ValueError(f"block {self.name!r}: expected a Module, got {type(module).__name__}")
        zeros = [
            [_zeros(n) for n in channels] if isinstance(channels, list) else _zeros(channels) for channels in inputs
        ]
        training = module.training
        try:
            output = module.eval()(zeros if self.inputs == "many" else zeros[0])
        except Exception as error:  # a user's block may fail in any way
            raise ValueError(
                f"block {self.name!r}: fails on inputs of {inputs} channels: {type(error).__name__}: {error}"
            ) from error
        finally:
            module.train(training)
        for part in output if isinstance(output, list) else [output]:
            if not isinstance(part, Tensor) or part.dim() != 4:
                got = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(f"block {self.name!r}: expected an output [B, C, H, W], got {got}")
        return output


def channels_of(output: Tensor | list[Tensor]) -> Channels:
    return [part.shape[1] for part in output] if isinstance(output, list) else output.shape[1]


def _zeros(channels: Channels) -> Tensor | list[Tensor]:
    if isinstance(channels, list):
        return [torch.zeros(1, count, PROBE_SIZE, PROBE_SIZE) for count in channels]
    return torch.zeros(1, channels, PROBE_SIZE, PROBE_SIZE)


_specs: dict[str, BlockSpec] = {}


def block_names(role: Role | None = None) -> list[str]:
    """Names of the registered blocks, of all or of one role."""
    return sorted(name for name, spec in _specs.items() if role in (None, spec.role))


def register_block(
    name: str,
    *,
    inputs: Literal["one", "many"] = "one",
    role: Role = "block",
    takes_channels: bool = True,
    out_channels: OutChannels | None = None,
) -> Callable[[_Made], _Made]:
    """Decorator that makes a block known by name; arguments as of `BlockSpec`.

    Raises:
        ValueError: a name that is no word, or that another block has.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: expected letters, digits, _, . or -, got {name!r}")

    def register(make: _Made) -> _Made:
        known = _specs.get(name)
        if known is not None and _identity(known.make) != _identity(make):
            raise ValueError(f"block {name!r} is already registered as {_identity(known.make)}")
        _specs[name] = BlockSpec(name, make, inputs, role, takes_channels, out_channels)
        return make

    return register


def _identity(make: Any) -> str:
    return f"{getattr(make, '__module__', '')}.{getattr(make, '__qualname__', repr(make))}"


def load_block(name: str) -> BlockSpec:
    """The block of a name or an import path; the module of a path is imported, from the working folder too.

    Raises:
        ValueError: an unknown name, a path that leads nowhere, or to something that cannot be called.
    """
    if is_import_path(name):
        module, _, attribute = name.partition(":")
        import_module(module)
        make = getattr(sys.modules[module], attribute, None)
        if name not in _specs and callable(make) and not _is_module_class(make):
            _specs[name] = BlockSpec(name, make)
    return find_block(name)


def find_block(name: str) -> BlockSpec:
    """The block of a name, or of an import path whose module is loaded already.

    Nothing is imported, and a path leads to classes of modules only, unless `load_block` has met it: a graph that comes
    inside a weights file must not be able to run code, such as that of a function that happens to be loaded.

    Raises:
        ValueError: an unknown name, a module that is not loaded, or something other than a class of modules.
    """
    if name in _specs:
        return _specs[name]
    if not is_import_path(name):
        raise ValueError(
            f"unknown block {shown(name)}; known are {', '.join(block_names())}, or a path module:Class. Import the "
            f"module that registers it first (--import MODULE)"
        )
    module, _, attribute = name.partition(":")
    if module not in sys.modules:
        short = printable(module, 100)
        raise ValueError(f"block {shown(name)}: its module is not loaded; import {short} first (--import {short})")
    make = getattr(sys.modules[module], attribute, None)
    if not callable(make):
        raise ValueError(
            f"block {shown(name)}: {printable(module, 100)} has no class or function {printable(attribute, 100)}"
        )
    if not _is_module_class(make):
        raise ValueError(
            f"block {shown(name)}: expected a class of modules; a function is registered with register_block"
        )
    return next((spec for spec in _specs.values() if spec.make is make), BlockSpec(name, make))


def _is_module_class(make: object) -> bool:
    return isinstance(make, type) and issubclass(make, nn.Module)


def is_import_path(text: object) -> bool:
    """Whether `text` has the form `package.module:Class`."""
    return isinstance(text, str) and _PATH.fullmatch(text) is not None
