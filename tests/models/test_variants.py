"""GELAN variants: blocks and depths exchanged in any graph (parameters and GFLOPs: tests/paper)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from yolov9_fast.losses import DetectionLoss
from yolov9_fast.models import DetectionModel, GraphError, fuse, load_checkpoint, load_graph, save_weights
from yolov9_fast.models.graph import graph_from_dict
from yolov9_fast.models.variants import gelan
from yolov9_fast.nn import CSPELAN, GELAN


@pytest.mark.parametrize("block", ["conv", "res", "dark"])
def test_a_network_of_another_block_trains_fuses_and_survives_its_file(block: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DetectionModel(gelan("gelan-t", block=block, depth=1), 2).train()
    assert any(type(m) is GELAN for m in model.modules())
    assert not any(type(m) is CSPELAN for m in model.modules())
    target = torch.tensor([[0, 1, 0.5, 0.5, 0.5, 0.6]])
    DetectionLoss(2)(model(torch.rand(2, 3, 64, 64)), target, 64).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval()
    loaded = load_checkpoint(save_weights(model, tmp_path / "b.safetensors"))
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded(image), model(image))
    assert fuse(model).is_fused


def test_depths_are_parameters() -> None:
    graph = gelan("gelan-t", depth=2, elan_depth=3)
    model = DetectionModel(graph, 2)
    stages = [m for m in model.modules() if isinstance(m, CSPELAN)]
    assert {m.elan_depth for m in stages} == {3}
    assert {len(m.cv2[0].m) for m in stages} == {2}
    assert model(torch.rand(2, 3, 64, 64)).main[0].shape == (2, 66, 8, 8)


def test_depths_that_are_there_already_change_nothing() -> None:
    assert gelan("gelan-s", depth=3, elan_depth=2) is load_graph("gelan-s")


def test_variants_of_variants() -> None:
    dark = gelan("gelan-t", block="dark", depth=1)
    assert gelan(dark, block="conv").layers == gelan("gelan-t", block="conv", depth=1).layers
    assert gelan(dark, depth=3).layers == load_graph("gelan-t").layers


def test_wrong_variants_are_named() -> None:
    with pytest.raises(ValueError, match="elan_depth: expected at least 1, got 0"):
        gelan("gelan-t", elan_depth=0)
    with pytest.raises(ValueError, match="unknown block"):
        gelan("gelan-t", block="nothing")
    plain = {"layers": [[-1, "Conv", [8, 3, s]] for s in (2, 2, 2, 2, 2)] + [[[2, 3, 4], "DDetect", []]]}
    with pytest.raises(GraphError, match="no CSP-ELAN"):
        gelan(graph_from_dict(plain, "plain"))
