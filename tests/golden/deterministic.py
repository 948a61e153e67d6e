"""Weights and inputs defined by name alone, so that two independent programs can be fed the same numbers.

Every array is drawn from numpy's PCG64 seeded with the CRC-32 of its name (UTF-8).
"""

from __future__ import annotations

import zlib

import numpy as np


def rng(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def parameter(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Value of the state_dict entry `key` (official checkpoint naming, e.g. 'model.0.conv.weight')."""
    g = rng(key)
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith("dfl.conv.weight") or key.endswith("dfl2.conv.weight"):
        return np.arange(16, dtype=np.float32).reshape(shape)
    if key.endswith("running_mean"):
        return (0.1 * g.standard_normal(shape)).astype(np.float32)
    if key.endswith("running_var") or key.endswith("bn.weight"):
        return g.uniform(0.5, 1.5, shape).astype(np.float32)
    if key.endswith("bias"):
        return (0.1 * g.standard_normal(shape)).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    return (1.5 / np.sqrt(fan_in) * g.standard_normal(shape)).astype(np.float32)


def image(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Image batch in [0, 1], NCHW float32."""
    return rng(name).uniform(0.0, 1.0, shape).astype(np.float32)
