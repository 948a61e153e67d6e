"""What a detector returns while it trains."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DetectionOutput(NamedTuple):
    """Raw head maps, per branch a list of [B, 64 + nc, H/s, W/s] for the strides s = 8, 16, 32.

    `main` is the branch that stays at deployment; `auxiliary` belongs to PGI and is None for a graph without it.
    Channels 0..63 are 4 sides (left, top, right, bottom) × 16 DFL bins, side-major; the others are class logits.
    An `AnchorDetect` head has its own channels instead, which it decodes itself.
    """

    main: list[Tensor]
    auxiliary: list[Tensor] | None = None
