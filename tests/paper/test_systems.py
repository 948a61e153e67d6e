"""Systems of the tables 4 and 5: each builds, trains a step, deploys without trace, and costs what its GELAN costs."""

from __future__ import annotations

import pytest
import torch

import yolov9_fast as yf
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.models import DetectionModel, graph_cost, load_graph, to_deploy
from yolov9_fast.paper.rows import counted
from yolov9_fast.paper.systems import BRANCH_ROWS, TABLES, System, table2, table4, table5

SYSTEMS = {system.name: system for system in (*table4(), *table5(), *table4(["t", "s"]), *table5(["t"]))}
SMALL = {system.name for system in (*table4(["t"]), *table5(["t"]))}


def size_of(system: System) -> str:
    return system.group.rpartition("-")[2].lower()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SMALL else [pytest.mark.slow]) for name in SYSTEMS]
)
def test_it_trains_a_step_and_deploys_to_its_gelan(name: str) -> None:
    system = SYSTEMS[name]
    torch.manual_seed(0)
    model = DetectionModel(system.graph, 2).train()
    loss = DetectionLoss(2, lead_head_guided=system.options.get("lead_head_guided", False))
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.6, 0.6]])
    loss(model(torch.rand(2, 3, 64, 64)), targets, 64).total.backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    model.zero_grad()
    deployed = to_deploy(model)
    assert deployed.graph == load_graph(f"gelan-{size_of(system)}")
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad(), yf.backend("eager"):
        expected = model.eval()(image)
        assert expected.isfinite().all()
        assert torch.equal(deployed.eval()(image), expected)


@pytest.mark.parametrize("size", ["t", *(pytest.param(size, marks=pytest.mark.slow) for size in "smce")])
def test_inference_costs_exactly_what_gelan_costs(size: str) -> None:
    plain = graph_cost(f"gelan-{size}")
    rows = counted([*table4([size]), *table5([size])])
    assert {(row.params * 1e6, row.gflops) for row in rows} == {(plain.parameters, plain.gflops)}
    assert all(row.train_params * 1e6 >= plain.parameters for row in rows)


@pytest.mark.slow
def test_the_branches_themselves_cost_something_in_training() -> None:
    plain = graph_cost("gelan-t", deployed=False).parameters
    costs = {s.row: graph_cost(s.graph, deployed=False).parameters for s in table4(["t"], ["pfh", "fpn", "pan", "icn"])}
    assert plain < costs["PFH"] < costs["FPN"] < costs["PAN"]
    assert costs["ICN"] > costs["PFH"]


def test_guidance_is_an_option_of_the_system_and_part_of_its_name() -> None:
    guided, plain = table4(["t"], ["lhg-icn", "icn"])
    assert guided.options == {"lead_head_guided": True}
    assert plain.options == {}
    assert guided.name != plain.name


def test_other_sizes_than_the_papers_have_every_row() -> None:
    assert [system.row for system in table4(["t"])] == [row for row, *_ in BRANCH_ROWS.values()]


def test_a_block_of_ones_own_is_a_row_of_table_2() -> None:
    *_, mine = table2(["t"], ["yolov9_fast.nn.gelan:ConvBlock"])
    assert mine.row == "yolov9_fast.nn.gelan:ConvBlock"
    conv = table2(["t"])[0]
    assert graph_cost(mine.graph).parameters == graph_cost(conv.graph).parameters
    assert mine.name != conv.name
    assert not set(mine.name) & set(":/,")


@pytest.mark.slow
def test_names_are_unique_within_a_table() -> None:
    for table in TABLES.values():
        names = [(system.group, system.row) for system in table()]
        assert len(names) == len(set(names))
