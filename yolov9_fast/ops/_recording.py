"""Whether something records or transforms the calls of PyTorch's own operators, so that kernels would be in its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_jit_tracer = torch._C._get_tracing_state
_transform = torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack
_mode = torch._C._get_dispatch_mode
_included = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_RECORDING = (
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def recorded() -> bool:
    """Whether definitions have to run instead of kernels.

    So it is for `torch.jit.trace`, `torch.onnx.export`, `make_fx`, `torch.export`, the transforms of
    `torch.func` and forward-mode differentiation; not for `torch.compile`, which traces registered operators.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return (
        _jit_tracer() is not None
        or _transform() is not None
        or forward_ad._current_level >= 0
        or (_modes() > 0 and any(_mode(key) is not None for key in _RECORDING))
        or _included(_PRE_DISPATCH)
    )


def unless_recorded(operator: Any) -> Callable[..., Any]:
    """`operator`, or its definition while calls are recorded."""
    found: Callable[..., Any] = operator.implementations["eager"].call if recorded() else operator
    return found
