"""`torch.compile` as a provider: the same function, compiled by default settings or with max-autotune."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .cases import Absent, Runner, Settings

MODES = {"none": (), "default": ("default",), "all": ("default", "max-autotune")}


def compiled_runners(
    settings: Settings,
    device: torch.device,
    function: Callable[..., Any],
    make: Callable[[Callable[..., Any], str], Runner],
) -> Iterator[Runner | Absent]:
    """A runner per mode that `settings.compile` names; `make(compiled function, provider name)` builds it.

    Compilation happens at the first call: the one that checks the result. Who runs a case resets the compiler after it.
    """
    for mode in MODES[settings.compile]:
        # Outside a GPU there are no graphs to capture, and asking for them only warns.
        name = "max-autotune-no-cudagraphs" if mode == "max-autotune" and device.type != "cuda" else mode
        compiled = torch.compile(function, mode=None if mode == "default" else name, dynamic=False)
        yield make(compiled, "compile" if mode == "default" else f"compile {mode}")
