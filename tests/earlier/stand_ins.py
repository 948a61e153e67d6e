"""Modules that the earlier commit does not have, and that `tests/fake_cuda` and tests of today import."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from tests import fake_cuda
from tests.earlier import TREE, part


def stand_in(name: str, **content: Any) -> ModuleType:
    """`from yolov9_fast.… import` finds it; nothing is imported here."""
    module = ModuleType(f"yolov9_fast.{name}")
    vars(module).update(content)
    sys.modules[module.__name__] = module
    return module


def fake_device() -> None:
    """Before torch is imported: `tests/fake_cuda` with the commit's sources and operators."""
    fake_cuda.ROOT, fake_cuda.FOLDER = TREE, TREE / "fake_cuda"
    stand_in("ops._probe", LAUNCHES={}, _known={})
    stand_in("ops._batch_norm", unit_statistics=None, computed_in=None)
    stand_in("nn.plan")


class _LargestTile(ModuleType):
    """`tile_of`, which chooses maps that are held in registers as a whole, where the commit has it."""

    @property
    def tile_of(self) -> Any:
        return part("kernels.bn_silu").whole_tile

    @tile_of.setter
    def tile_of(self, function: Any) -> None:
        for name in ("bn_silu", "rep_bn_silu"):
            vars(part(f"kernels.{name}"))["whole_tile"] = function


def host_time() -> None:
    """Before `tests.fake_cuda.host_time` runs."""
    fake_device()
    stand_in("kernels.replay", forget=lambda: None)
    name = "yolov9_fast.kernels.bn_silu_single_pass"
    sys.modules[name] = _LargestTile(name)


def after_import() -> None:
    """The commit's `bench` and backends under today's names."""
    for name in ("cases", "networks"):
        sys.modules[f"bench.{name}"] = part(f"bench.{name}")
    sys.modules["yolov9_fast.ops._backend"] = part("ops.backend")
