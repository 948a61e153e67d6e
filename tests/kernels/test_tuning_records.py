"""Tiles: the most specific record wins, and none outside what the ahead-of-time builds cover is taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from yolov9_fast.kernels import config
from yolov9_fast.kernels.launch import recording, view_of


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("YOLOV9_FAST_TUNING", str(tmp_path))
    config.load.cache_clear()
    config._record.cache_clear()
    yield tmp_path
    config.load.cache_clear()
    config._record.cache_clear()


def tile_of(channels: int) -> config.Tile:
    x = torch.empty(2, channels, 4, 4, dtype=torch.bfloat16, memory_format=torch.channels_last)
    view = view_of(x, last=True)
    assert view is not None
    with recording(90):
        return config.tile("bn_silu_apply_kernel", view, view.vector())


def test_the_block_of_channels_wastes_little() -> None:
    blocks = [config.channel_block(channels) for channels in (8, 16, 24, 64, 80, 96, 240, 256, 320)]
    assert blocks == [8, 16, 8, 64, 16, 32, 64, 64, 64]


def test_a_record_for_the_architecture_wins_over_the_default(records: Path) -> None:
    assert tile_of(64) == config.Tile(16, 64, 4)
    bucket = {"last/2/64/small": {"elements": 4096, "warps": 8}}
    (records / "sm90.json").write_text(json.dumps({"kernels": {"bn_silu_apply_kernel": bucket}}))
    config.load.cache_clear()
    config._record.cache_clear()
    assert tile_of(64) == config.Tile(64, 64, 8)
    assert tile_of(16) == config.Tile(64, 16, 4)


def test_a_record_that_no_build_covers_is_refused(records: Path) -> None:
    for record in ({"elements": 3000, "warps": 4}, {"elements": 8192, "warps": 4}, {"elements": 1024, "warps": 8}):
        bucket = {"last/2/64/small": record}
        (records / "sm90.json").write_text(json.dumps({"kernels": {"bn_silu_apply_kernel": bucket}}))
        config.load.cache_clear()
        message = r"sm90.json: bn_silu_apply_kernel last/2/64/small: expected elements by warps among"
        with pytest.raises(ValueError, match=message):
            tile_of(64)


def test_no_candidate_gives_a_thread_more_elements_than_the_default_or_less_than_one_access() -> None:
    pairs = [(one["elements"], one["warps"]) for one in config.candidates("bn_silu_apply_kernel")]
    assert (4096, 4) in pairs
    assert (8192, 8) in pairs
    assert (2048, 2) in pairs
    assert all(8 <= elements // (32 * warps) <= 32 for elements, warps in pairs)
    assert config.candidates("spatial") == [{"elements": 1024, "warps": 4}, {"elements": 2048, "warps": 8}]


def test_elements_read_one_by_one_take_four_a_thread_whatever_the_record(records: Path) -> None:
    bucket = {"last/2/8/small": {"elements": 4096, "warps": 4}}
    (records / "sm90.json").write_text(json.dumps({"kernels": {"bn_silu_apply_kernel": bucket}}))
    config.load.cache_clear()
    assert tile_of(24) == config.Tile(512, 8, 4)
    assert tile_of(7) == config.Tile(128, 8, 8)
