"""The shapes come from the graphs: as many units as the network has, and sizes that agree with the real modules."""

from __future__ import annotations

import pytest
import torch
from yolov9_fast.bench.shapes import NETWORKS, network_blocks, network_shapes

from yolov9_fast.models import create_model
from yolov9_fast.models.model import conv_units, rep_convs
from yolov9_fast.nn.blocks import SPPELAN, AConv, ADown, CBFuse, RepCSP


@pytest.mark.parametrize("name", NETWORKS)
def test_every_unit_of_the_network_is_counted(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    inside = 2 * len(list(rep_convs(model)))
    count = dict.fromkeys(("bn_silu", "rep_bn_silu", "conv1x1", "conv1x1_pair", "spp", "adown_pool", "cbfuse"), 0)
    for shape in network_shapes(name, 320):
        count[shape.operator] += shape.count
    kinds = [type(module) for module in model.modules()]
    assert count["bn_silu"] == len(list(conv_units(model))) - inside
    assert count["rep_bn_silu"] == inside // 2
    assert count["spp"] == kinds.count(SPPELAN)
    assert count["conv1x1_pair"] == sum(isinstance(module, RepCSP) for module in model.modules())
    assert count["cbfuse"] == kinds.count(CBFuse)
    assert count["adown_pool"] == kinds.count(ADown) + kinds.count(AConv)


def test_planes_follow_the_image_size() -> None:
    small = {(s.operator, s.layer): s.sizes for s in network_shapes("yolov9-c", 320)}
    large = {(s.operator, s.layer): s.sizes for s in network_shapes("yolov9-c", 640)}
    shared = small.keys() & large.keys()
    assert len(shared) > 20
    assert all(large[k]["height"] == 2 * small[k]["height"] for k in shared)


def test_an_aggregation_reads_its_parts() -> None:
    shapes = [s.sizes for s in network_shapes("yolov9-t", 320) if s.operator == "conv1x1"]
    joined = [s["inputs"] for s in shapes if len(s["inputs"]) > 1]
    # ELAN and CSP-ELAN join two halves and two stages, CSP two branches, SPP-ELAN the four pools.
    assert (16, 16, 16, 16) in joined
    assert any(len(parts) == 2 for parts in joined)
    assert (64, 64, 64, 64) in joined


def test_the_shapes_of_a_layer_are_those_it_computes() -> None:
    model = create_model("yolov9-t").train()
    layer = next(s for s in network_shapes("yolov9-t", 64) if s.operator == "bn_silu" and s.layer == "model.0")
    output = model.model[0](torch.zeros(2, 3, 64, 64))
    sizes = layer.sizes
    assert output.shape[1:] == (sizes["channels"], sizes["height"], sizes["width"])


def test_every_layer_that_runs_has_its_inputs() -> None:
    blocks = network_blocks("yolov9-c", 320)
    assert blocks[-1].block == "DualDDetect"
    assert len(blocks[-1].inputs) == 6
    assert {b.block for b in blocks} >= {"CSPELAN", "ADown", "SPPELAN", "CBFuse"}
