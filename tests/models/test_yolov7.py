"""The chain of the paper's table 6 before GELAN-E: YOLOv7, anchor-free, and with GELAN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.foreign_files import small_model
from yolov9_fast.engine.predictor import Predictor
from yolov9_fast.errors import UserError
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.models import (
    DetectionModel,
    GraphError,
    create_model,
    fuse,
    load_checkpoint,
    load_graph,
    network_costs,
    save_weights,
    transfer_weights,
    unfuse,
)
from yolov9_fast.models.foreign import identify
from yolov9_fast.models.graph import graph_from_dict
from yolov9_fast.models.profile import count_gflops
from yolov9_fast.nn import AnchorDetect
from yolov9_fast.ops._nms import nms

ANCHORS = [[12, 16, 19, 36, 40, 28], [36, 75, 76, 55, 72, 146], [142, 110, 192, 243, 459, 401]]
# Parameters and GFLOPs of the fused network; to the last digit, the 36.9/104.7, 43.6/130.5 and 41.2/126.4 of table 6.
FUSED = {
    "yolov7": (36_905_341, 104.511),
    "yolov7-af": (43_564_736, 130.505),
    "yolov7-af-gelan": (41_160_384, 126.358),
}
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def tiny(head: list[Any], num_classes: int = 2, **options: Any) -> DetectionModel:
    rows: list[Any] = [[-1, "Conv", [8, 3, 2]], [-1, "AConv", [8]], *([-1, "MPDown", [8]] for _ in range(3))]
    graph = graph_from_dict({"name": "tiny", "layers": [*rows, [[2, 3, 4], *head]]}, "tiny.yaml")
    return DetectionModel(graph, num_classes, **options)


@pytest.fixture
def anchored() -> DetectionModel:
    torch.manual_seed(0)
    return tiny(["AnchorDetect", [ANCHORS]]).eval()


@pytest.fixture(scope="module", params=["yolov7-af-gelan", pytest.param("yolov7", marks=pytest.mark.slow)])
def network(request: pytest.FixtureRequest) -> Iterator[DetectionModel]:
    return small_model(request.param, 3)


@pytest.mark.parametrize("name", FUSED)
def test_parameters_and_gflops_are_those_of_the_table(name: str) -> None:
    fused = network_costs(name)[-1]
    assert (fused.parameters, round(fused.gflops, 3)) == FUSED[name]


def test_the_published_gflops_of_yolov7_count_biases() -> None:
    with torch.device("meta"):
        fused = fuse(create_model("yolov7"))
    assert round(count_gflops(fused, biases=True), 1) == 104.7
    assert round(count_gflops(fused), 1) == 104.5


def test_the_gelan_row_is_gelan_e_without_its_second_backbone() -> None:
    one, two = (
        [(row.block, row.arguments) for row in load_graph(name).layers] for name in ("yolov7-af-gelan", "gelan-e")
    )
    rest = [row for row in two if row[0] not in ("CBLinear", "CBFuse", "Silence")]
    backbone = one[:9]
    assert rest == backbone + one


def test_a_graph_says_how_many_groups_its_box_branch_has() -> None:
    with torch.device("meta"):
        assert create_model("yolov7-af").box_groups == 1
        assert create_model("yolov7-af", box_groups=4).box_groups == 4
        assert create_model("yolov7-af-gelan").box_groups == 4
        attached = create_model("yolov7-af", auxiliary="pfh")
    assert attached.box_groups == 1
    assert attached.graph.deploy()[0].layers == load_graph("yolov7-af").layers


def test_an_anchor_based_network_takes_no_auxiliary_branch() -> None:
    with pytest.raises(GraphError, match="expected DDetect for an auxiliary branch, got AnchorDetect"):
        create_model("yolov7", auxiliary="fpn")


def test_evaluation_gives_boxes_that_nms_takes(network: DetectionModel) -> None:
    with torch.no_grad():
        found = network(IMAGES)
    cells = 8 * 8 + 4 * 4 + 2 * 2
    assert found.shape == (2, 7, cells * (3 if network.graph_name == "yolov7" else 1))
    assert bool(torch.isfinite(found).all())
    assert bool((found[:, 4:] >= 0).all() & (found[:, 4:] <= 1).all())
    assert int(nms(found, conf=0.0).count.min()) > 0


def test_folding_and_unfolding_keep_the_outputs(network: DetectionModel) -> None:
    folded = fuse(network)
    assert folded.is_fused
    assert not network.is_fused
    with torch.no_grad():
        expected = network(IMAGES)
        torch.testing.assert_close(folded(IMAGES), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(unfuse(folded)(IMAGES), expected, rtol=1e-3, atol=1e-3)


def test_weights_come_back_exactly_with_their_network(network: DetectionModel, tmp_path: Path) -> None:
    found = load_checkpoint(save_weights(network, tmp_path / "w.safetensors"))
    assert found.graph.layers == network.graph.layers
    assert found.names == network.names
    assert (found.class_tower, found.box_groups) == (network.class_tower, network.box_groups)
    with torch.no_grad():
        assert torch.equal(found(IMAGES), network(IMAGES))


@pytest.mark.parametrize("name", ["yolov7-af", "yolov7-af-gelan"])
def test_the_anchor_free_networks_train(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, 2).train()
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.6], [1, 0, 0.3, 0.4, 0.2, 0.3]])
    loss = DetectionLoss(2)(model(IMAGES), targets, 64)
    loss.total.backward()
    assert math.isfinite(loss.total.item())
    assert loss.box.item() > 0
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients.values())
    # A level without a positive has no box gradient; everything before the head has one from some level.
    head = f"model.{len(model.graph.layers) - 1}."
    assert all(bool(g.any()) for name, g in gradients.items() if g is not None and not name.startswith(head))


@pytest.mark.parametrize("name", FUSED)
def test_other_class_counts_and_folding_are_recognised_from_the_weights(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, 11)
    for state, fused in ((model.state_dict(), False), (fuse(model).state_dict(), True)):
        layout = identify(state)
        assert (layout.graph_name, layout.num_classes, layout.box_groups) == (name, 11, model.box_groups)
        assert (layout.fused, layout.source) == (fused, "official")


def test_an_anchor_decodes_to_its_own_box(anchored: DetectionModel) -> None:
    head = anchored.head
    assert isinstance(head, AnchorDetect)
    maps = [torch.zeros(1, 21, 2, 3), torch.zeros(1, 21, 1, 2), torch.zeros(1, 21, 1, 1)]
    # σ(0) = ½: the cell's centre, the anchor's size, and ½ · ½ as every score.
    found = head.decode(maps)[0]
    assert found.shape == (6, 3 * (6 + 2 + 1))
    assert found[:4, 5].tolist() == [2.5 * 8, 1.5 * 8, 12, 16]
    assert found[:4, 6].tolist() == [0.5 * 8, 0.5 * 8, 19, 36]
    assert found[:4, -1].tolist() == [16, 16, 459, 401]
    assert bool((found[4:] == 0.25).all())


def test_offsets_sizes_and_scores_follow_the_published_rule(anchored: DetectionModel) -> None:
    maps = [torch.zeros(1, 21, 4, 4), torch.zeros(1, 21, 2, 2), torch.zeros(1, 21, 1, 1)]
    values = torch.tensor([2.0, -1.0, 0.5, -3.0, 1.5, -0.5, 4.0])
    maps[1][0, 7:14, 1, 0] = values  # the second level's second anchor (76 × 55), row 1, column 0
    found = anchored.decode(maps)[0, :, 3 * 16 + 4 + 2]
    x, y, w, h, objectness, *classes = (1 / (1 + math.exp(-v)) for v in values.tolist())
    expected = [(2 * x - 0.5 + 0) * 16, (2 * y - 0.5 + 1) * 16, (2 * w) ** 2 * 76, (2 * h) ** 2 * 55]
    assert found.tolist() == pytest.approx([*expected, *(objectness * c for c in classes)], rel=1e-6)


def test_an_anchor_based_network_predicts_and_travels_with_its_anchors(
    anchored: DetectionModel, tmp_path: Path
) -> None:
    anchored.names = {0: "cat", 1: "dog"}
    path = save_weights(fuse(anchored), tmp_path / "w.safetensors")
    found = load_checkpoint(path)
    assert isinstance(found.head, AnchorDetect)
    assert found.head.anchors == tuple(tuple(map(float, a)) for a in ANCHORS)
    picture = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    prediction = Predictor(path, image_size=96, conf=0.0, device="cpu")(picture)[0]
    assert len(prediction.boxes)
    assert set(prediction.boxes[:, 5]) <= {0, 1}


def test_weights_move_between_anchor_based_networks_of_other_classes(anchored: DetectionModel) -> None:
    other = tiny(["AnchorDetect", [ANCHORS]], num_classes=4)
    report = transfer_weights(other, anchored.state_dict())
    assert [key for key, _ in report.skipped] == [f"model.5.m.{i}.{k}" for i in range(3) for k in ("weight", "bias")]
    assert torch.equal(other.state_dict()["model.2.cv1.conv.weight"], anchored.state_dict()["model.2.cv1.conv.weight"])


def test_an_anchor_based_head_refuses_to_train(anchored: DetectionModel) -> None:
    with pytest.raises(UserError, match=r"cannot be trained here.*yolov7-af"):
        anchored.train()(IMAGES)
    with torch.no_grad(), pytest.raises(ValueError, match=r"expected \[B, 64 \+ nc, H, W\]"):
        DetectionLoss(2)(anchored.eval().raw(IMAGES), torch.zeros(0, 6), 64)


@pytest.mark.parametrize(
    ("head", "options", "error", "message"),
    [
        (["AnchorDetect", []], {}, GraphError, "anchors"),
        (["AnchorDetect", [ANCHORS[:2]]], {}, ValueError, "anchors: expected w, h of three anchors"),
        (["AnchorDetect", [[[1, 2], [3, 4], [5, 6]]]], {}, ValueError, "anchors: expected"),
        (["AnchorDetect", [[[-1] * 6] * 3]], {}, ValueError, "anchors: expected"),
        (["AnchorDetect", ["yolo"]], {}, ValueError, "anchors: expected"),
        (["AnchorDetect", [ANCHORS]], {"class_tower": 8}, ValueError, "no class tower and no box groups"),
        (["AnchorDetect", [ANCHORS]], {"box_groups": 4}, ValueError, "no class tower and no box groups"),
        (["DDetect", ["nc"]], {}, ValueError, "box_groups: expected a divisor of 64, got nc"),
        (["DDetect", [0]], {}, ValueError, "box_groups: expected a divisor of 64, got 0"),
        (["DDetect", [1, 2]], {}, GraphError, "takes no arguments but box_groups"),
    ],
)
def test_wrong_heads_are_named(head: list[Any], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny(head, **options)


def test_mp_down_needs_an_even_output() -> None:
    rows: list[Any] = [[-1, "MPDown", [7]], [[0, 0, 0], "DDetect", []]]
    with pytest.raises(GraphError, match=r"layer 0, MPDown.*out_channels: expected an even number, got 7"):
        DetectionModel(graph_from_dict({"name": "odd", "layers": rows}, "odd.yaml"))
