"""The factor of the loss in fp16: on the device, so that no step waits for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossScale:
    """Halved by a step whose gradients are not finite, doubled after 2,000 finite ones; constantly 1 if not `enabled`.

    The rule and the saved form are those of `torch.amp.GradScaler`.

    Attributes:
        value: float32, 0-dimensional.
    """

    _GROWTH, _BACKOFF, _INTERVAL = 2.0, 0.5, 2000

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.value = torch.full((), 65536.0 if enabled else 1.0, device=device)
        self._finite_steps = torch.zeros((), dtype=torch.int32, device=device)

    def inverse(self) -> Tensor:
        """1 / value, float32, 0-dimensional."""
        return self.value.double().reciprocal().float()

    @torch.no_grad()
    def adapt(self, finite: Tensor) -> None:
        """Change the value after a step. `finite`: whether its gradients are, 0-dimensional bool."""
        if not self.enabled:
            return
        grown = finite & (self._finite_steps + 1 >= self._INTERVAL)
        changed = torch.where(grown, self.value * self._GROWTH, self.value)
        changed = torch.where(changed.isfinite(), changed, self.value)
        self.value.copy_(torch.where(finite, changed, self.value * self._BACKOFF))
        self._finite_steps.copy_((self._finite_steps + 1) * (finite & ~grown))

    def state_dict(self) -> dict[str, Any]:
        """Numbers only; empty if not enabled."""
        if not self.enabled:
            return {}
        return {
            "scale": float(self.value),
            "growth_factor": self._GROWTH,
            "backoff_factor": self._BACKOFF,
            "growth_interval": self._INTERVAL,
            "_growth_tracker": int(self._finite_steps),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what `state_dict` returned; entries that it lacks stay."""
        if self.enabled:
            self.value.fill_(state.get("scale", float(self.value)))
            self._finite_steps.fill_(state.get("_growth_tracker", 0))
