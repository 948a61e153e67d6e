"""Is a result right? Errors against float64, and the rules by which a result is refused before any timing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FLOOR = 1e-7
_PEER_AGREEMENT = 0.99


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of `exact`; infinite for another shape or a value not finite."""
    if result.shape != exact.shape:
        return math.inf
    if exact.numel() == 0:
        return 0.0
    wide = exact.detach().to(torch.float64)
    difference = result.detach().to(exact.device, torch.float64) - wide
    scale = wide.square().mean().sqrt().item()
    error = difference.square().mean().sqrt().item()
    if not math.isfinite(error):
        return math.inf
    return error / scale if scale > 0 else error


def errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """`relative_error` by name; infinite for what is missing."""
    return {name: relative_error(results[name], one) if name in results else math.inf for name, one in exact.items()}


def judge(
    rule: str,
    results: dict[str, Tensor],
    baseline: dict[str, Tensor],
    exact: dict[str, Tensor] | None,
) -> tuple[float, str | None]:
    """(largest error, why the result is wrong or None).

    Rules:
        twice: error against float64 at most twice the baseline's in the same precision (plus 1e-7).
        rough: ten times instead, for eager itself in another memory layout.
        exact: the same bits as the baseline.
        network: as twice, over a whole network, where a decision that flips (an assignment) may cost 1 % in gradients.
        peer: `agreement` of the results, a share in [0, 1], at least 0.99.
        none: nothing to judge.
    """
    if rule == "none":
        return 0.0, None
    if rule == "peer":
        agreement = float(results["agreement"])
        if agreement >= _PEER_AGREEMENT:
            return 1 - agreement, None
        return 1 - agreement, f"agrees with the reference in {agreement:.1%} of its results only"
    if rule == "exact":
        differing = [name for name, one in baseline.items() if name not in results or not _same(results[name], one)]
        return (math.inf, f"differs from eager in {', '.join(differing)}") if differing else (0.0, None)
    own = errors(results, exact if exact is not None else baseline)
    theirs = errors(baseline, exact) if exact is not None else dict.fromkeys(baseline, 0.0)
    worst = max(own.values(), default=0.0)
    for name, error in own.items():
        allowed = (10 if rule == "rough" else 2) * theirs[name] + _FLOOR
        if rule == "network":
            allowed = max(allowed, 1e-2 if name.startswith("gradient") else 1e-3)
        if not error <= allowed:
            return worst, f"{name}: error {error:.2e} against float64, more than the {allowed:.2e} allowed"
    return worst, None


def _same(result: Tensor, expected: Tensor) -> bool:
    return result.shape == expected.shape and torch.equal(result.cpu(), expected.cpu())
