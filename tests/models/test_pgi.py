"""Auxiliary branches: the published ones come out of the rules, any graph takes them, deployment takes them off."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from yolov9_fast.losses import DetectionLoss
from yolov9_fast.models import (
    BranchBuilder,
    DetectionModel,
    Graph,
    GraphError,
    attach,
    backbone_levels,
    branch_names,
    create_model,
    graph_cost,
    load_checkpoint,
    load_graph,
    pgi,
    register_branch,
    save_weights,
    to_deploy,
)
from yolov9_fast.models.graph import Layer, graph_from_dict
from yolov9_fast.ops._decode import decode

TARGETS = torch.tensor([[0, 1, 0.5, 0.5, 0.5, 0.6], [1, 0, 0.3, 0.4, 0.3, 0.3]])


@pytest.fixture(autouse=True)
def forget_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pgi, "_branches", dict(pgi._branches))


def without_silence(graph: Graph) -> list[Layer]:
    """Layers with `Silence`, which only makes the image addressable, read through."""
    place = {-1: -1}
    kept: list[Layer] = []
    for index, layer in enumerate(graph.layers):
        if layer.block == "Silence":
            place[index] = place[layer.sources[0]]
        else:
            place[index] = len(kept)
            kept.append(Layer(tuple(place[s] for s in layer.sources), layer.block, layer.arguments))
    return kept


@pytest.mark.parametrize(("size", "branch"), [("t", "fpn"), ("s", "fpn"), ("m", "icn"), ("c", "icn")])
def test_the_published_networks_are_gelan_with_a_branch(size: str, branch: str) -> None:
    attached = attach(load_graph(f"gelan-{size}"), branch)
    assert without_silence(attached) == without_silence(load_graph(f"yolov9-{size}"))


def test_yolov9_e_is_gelan_e_with_a_pyramid_on_its_first_backbone() -> None:
    """Its graph lists the branch before the neck; parameters, shapes and what reads what are the same."""
    attached, published = attach(load_graph("gelan-e"), "fpn"), load_graph("yolov9-e")

    def description(graph: Graph, index: int) -> Any:
        layer = graph.layers[index]
        return layer.block, layer.arguments, tuple(-1 if s < 0 else description(graph, s) for s in layer.sources)

    for ours, theirs in zip(attached.head.sources, published.head.sources, strict=True):
        assert description(attached, ours) == description(published, theirs)


def test_levels_are_the_last_of_each_stride_in_the_first_backbone() -> None:
    assert backbone_levels(load_graph("gelan-t")) == (4, 6, 8)
    assert backbone_levels(load_graph("gelan-e")) == (5, 7, 9)


BRANCHES = [("pfh", "none"), ("fpn", "none"), ("pan", "none"), ("icn", "none")]
BRANCHES += [("none", "pfh"), ("none", "fpn"), ("none", "icn"), ("fpn", "icn"), ("icn", "icn")]


@pytest.mark.parametrize(
    ("backbone", "neck"),
    [
        pytest.param(*pair, marks=[pytest.mark.slow] if pair[1] == "icn" and pair[0] != "fpn" else [])
        for pair in BRANCHES
    ],
)
def test_every_branch_trains_and_leaves_no_trace(backbone: str, neck: str) -> None:
    torch.manual_seed(0)
    graph = attach(load_graph("gelan-t"), backbone, neck=neck)
    model = DetectionModel(graph, 2).train()
    output = model(torch.rand(2, 3, 64, 64))
    assert output.auxiliary is not None
    assert [m.shape for m in output.auxiliary] == [m.shape for m in output.main]
    DetectionLoss(2)(output, TARGETS, 64).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    deployed = to_deploy(model)
    assert deployed.graph == load_graph("gelan-t")
    image = torch.rand(1, 3, 96, 64)
    model.eval(), deployed.eval()
    assert torch.equal(deployed(image), model(image))
    assert torch.equal(deployed(image), decode(model.raw(image).main, model.strides))


def test_links_of_the_neck_reach_the_neck() -> None:
    """With a branch on the neck alone the auxiliary loss sends gradients into the neck's layers."""
    for neck, reaches in (("icn", True), ("none", False)):
        backbone = "none" if reaches else "icn"
        model = DetectionModel(attach(load_graph("gelan-t"), backbone, neck=neck), 2).train()
        auxiliary = model(torch.rand(1, 3, 64, 64)).auxiliary
        sum(m.sum() for m in auxiliary).backward()
        neck_gradient = next(model.model[21].parameters()).grad
        assert (neck_gradient is not None and bool(neck_gradient.abs().sum() > 0)) == reaches


def test_an_attached_network_survives_its_file(tmp_path: Path) -> None:
    model = create_model("gelan-t", 2, auxiliary="fpn,icn")
    assert model.graph_name == "gelan-t+fpn,icn"
    loaded = load_checkpoint(save_weights(model, tmp_path / "a.safetensors"))
    assert loaded.graph == model.graph
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_published_branch_can_be_exchanged() -> None:
    assert create_model("yolov9-t", 2, auxiliary="icn").graph == create_model("gelan-t", 2, auxiliary="icn").graph


@pytest.mark.slow
def test_the_branch_costs_nothing_when_deployed() -> None:
    plain = graph_cost("gelan-t")
    for backbone, neck in BRANCHES:
        attached = graph_cost(attach(load_graph("gelan-t"), backbone, neck=neck))
        assert (attached.parameters, attached.gflops) == (plain.parameters, plain.gflops)


def test_a_graph_file_keeps_the_branch(tmp_path: Path) -> None:
    graph = attach(load_graph("gelan-m"), "icn")
    path = tmp_path / "mine.yaml"
    path.write_text(graph.as_yaml())
    assert load_graph(path) == graph


ODD = {
    "name": "odd",
    "layers": [
        [-1, "Conv", [8, 3, 2]],
        [-1, "Conv", [8, 3, 2]],
        [-1, "Conv", [12, 3, 2]],
        [-1, "Conv", [16, 3, 2]],
        [-1, "Conv", [20, 3, 2]],
        [[2, 3, 4], "DDetect", []],
    ],
}


@pytest.mark.parametrize("branch", ["pfh", "fpn", "pan", "icn"])
def test_a_graph_without_neck_takes_every_branch(branch: str) -> None:
    model = DetectionModel(attach(graph_from_dict(ODD, "odd"), branch), 2).train()
    output = model(torch.rand(2, 3, 64, 64))
    DetectionLoss(2)(output, TARGETS, 64).total.backward()
    assert to_deploy(model).graph == graph_from_dict(ODD, "odd")


def test_a_branch_of_ones_own() -> None:
    @register_branch("narrow")
    def narrow(builder: BranchBuilder, levels: Sequence[int]) -> Sequence[int]:
        assert [builder.stride(level) for level in levels] == [8, 16, 32]
        return [builder.add("Conv", level, builder.channels(level) // 2) for level in levels]

    assert "narrow" in branch_names()
    model = create_model("gelan-t", 2, auxiliary="narrow").train()
    assert model(torch.rand(1, 3, 64, 64)).auxiliary is not None


def test_a_branch_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "branch_of_a_user.py").write_text("def levels(builder, levels):\n    return levels\n")
    monkeypatch.chdir(tmp_path)
    try:
        assert attach(load_graph("gelan-t"), "branch_of_a_user:levels").has_auxiliary
        with pytest.raises(ValueError, match="no function other"):
            attach(load_graph("gelan-t"), "branch_of_a_user:other")
    finally:
        sys.modules.pop("branch_of_a_user", None)


def test_wrong_branches_are_named() -> None:
    graph = load_graph("gelan-t")
    with pytest.raises(ValueError, match="unknown auxiliary branch 'x'; known are none, fpn, icn, pan, pfh"):
        attach(graph, "x")
    with pytest.raises(ValueError, match="neck: expected 'icn' next to a branch on the backbone"):
        attach(graph, "fpn", neck="pan")
    with pytest.raises(GraphError, match="head: expected DDetect for an auxiliary branch, got DualDDetect"):
        attach(load_graph("yolov9-t"), "fpn")
    with pytest.raises(GraphError, match="levels: expected strides"):
        attach(graph, "fpn", levels=(4, 4, 8))
    with pytest.raises(GraphError, match="levels: expected three layers"):
        attach(graph, "fpn", levels=(4, 6))
    with pytest.raises(GraphError, match="no level of stride 16"):
        backbone_levels(Graph("short", (*graph.layers[:5], graph.head)))


def test_a_layer_that_does_not_fit_is_named_where_it_is_added() -> None:
    builder = BranchBuilder(load_graph("gelan-t"))
    with pytest.raises(GraphError, match="Concat"):
        builder.add("Concat", (4, 6))
    with pytest.raises(GraphError, match="layer 22, Zap"):
        builder.add("Zap", 4, 8)
    with pytest.raises(GraphError, match="reads layer 99"):
        builder.add("Conv", 99, 8)

    @register_branch("short")
    def short(builder: BranchBuilder, levels: Sequence[int]) -> Sequence[int]:
        return levels[:2]

    with pytest.raises(GraphError, match="branch 'short': expected three layers"):
        attach(load_graph("gelan-t"), "short")


@pytest.mark.parametrize("name", ["none", "default", "two words", "a:b", ""])
def test_a_branch_needs_a_word_for_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="name: expected"):
        register_branch(name)
