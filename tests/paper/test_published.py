"""The paper's tables as data: complete, in agreement with each other, with the networks and with the default recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from yolov9_fast.cli.main import main
from yolov9_fast.engine.config import TrainConfig, read_config
from yolov9_fast.errors import UserError
from yolov9_fast.models.graph import load_graph
from yolov9_fast.models.profile import network_costs
from yolov9_fast.paper.published import RECIPE, PublishedRow, comparison, network, table


def by_name(name: str) -> dict[str, PublishedRow]:
    return {row.name: row for row in table(name)}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("table1", 38),
        ("table2", 4),
        ("table3", 13),
        ("table4", 12),
        ("table5", 12),
        ("table6", 5),
        ("appendix_table3", 9),
    ],
)
def test_every_row_of_a_table_is_there_and_in_range(name: str, rows: int) -> None:
    found = table(name)
    assert len(found) == rows
    for row in found:
        aps = (row.ap, row.ap50, row.ap75, row.ap_small, row.ap_medium, row.ap_large)
        assert row.ap is not None
        assert all(15 < ap < 80 for ap in aps if ap is not None)
        assert row.ap50 is None or row.ap50 > row.ap
        assert (row.parameters or 1) > 0
        assert (row.gflops or 1) > 0


@pytest.mark.parametrize("size", ["s", *(pytest.param(size, marks=pytest.mark.slow) for size in "mce")])
def test_costs_of_our_networks_are_the_published_ones(size: str) -> None:
    rows = by_name("table1")
    deployed = network_costs(f"yolov9-{size}")[-1]
    for family in ("YOLOv9", "GELAN"):
        row = rows[f"{family}-{size.upper()}"]
        assert row.parameters == pytest.approx(deployed.parameters / 1e6, abs=0.051)
        assert row.gflops == pytest.approx(deployed.gflops, abs=0.06 if size != "e" else 0.6)


def test_tables_agree_with_each_other() -> None:
    main_table = by_name("table1")
    for row in table("table5"):
        family = {None: row.name, "PGI": row.name.replace("GELAN", "YOLOv9")}.get(row.variant["supervision"])
        if family:
            assert row.ap == main_table[family].ap
    for row in table("table4"):
        if row.variant["backbone"] is None and row.variant["neck"] is None:
            assert (row.ap, row.ap_large) == (main_table[row.name].ap, main_table[row.name].ap_large)
    chosen = {(r.name, r.variant["elan_depth"], r.variant["csp_depth"]): r for r in table("table3")}
    for key in (("GELAN-S", 2, 3), ("GELAN-M", 2, 1), ("GELAN-C", 2, 1)):
        row = main_table[key[0]]
        assert (chosen[key].parameters, chosen[key].gflops, chosen[key].ap) == (row.parameters, row.gflops, row.ap)
    assert table("table6")[-1].ap_small == main_table["YOLOv9-E"].ap_small
    assert table("table6")[0].ap == main_table["YOLOv7"].ap
    assert table("table2")[3].ap == chosen["GELAN-S", 2, 1].ap


def test_the_comparison_can_be_sorted_and_loses_no_row() -> None:
    names = {row.name for row in comparison()}
    assert len(names) == 38 + 9
    for sort, column, sign in (("params", "parameters", 1), ("gflops", "gflops", 1), ("ap", "ap", -1)):
        rows = comparison(sort)
        assert {row.name for row in rows} == names
        values = [getattr(row, column) for row in rows]
        known = [sign * value for value in values if value is not None]
        assert known == sorted(known)
        assert values[: len(known)] == [v for v in values if v is not None], "unknown ones come last"
    with pytest.raises(UserError, match="not 'name'"):
        comparison("name")


def test_the_recipe_is_the_librarys_default_but_for_its_length() -> None:
    import yaml

    printed = yaml.safe_load(RECIPE.read_text())
    config = read_config(RECIPE)
    default = TrainConfig()
    defaults = {**dataclasses.asdict(default), **dataclasses.asdict(default.augment)}
    differing = {key for key, value in printed.items() if defaults[key] != value}
    assert differing == {"epochs"}
    assert dataclasses.replace(config, epochs=default.epochs) == default
    assert config.epochs == 500
    assert config.lr0 * config.lrf == pytest.approx(0.0001)


def test_the_recipe_can_be_written_and_trained_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "recipe", "--out", str(tmp_path / "mine.yaml")]) == 0
    assert read_config(tmp_path / "mine.yaml") == read_config(RECIPE)
    capsys.readouterr()
    assert main(["paper", "recipe"]) == 0
    assert capsys.readouterr().out == RECIPE.read_text()


def test_the_printed_network_is_gelan_c() -> None:
    """Routes, filters and depths of appendix Table 2 against the graph that is deployed as YOLOv9-C."""
    modules = {
        "Conv": "Conv",
        "CSPELAN": "CSP-ELAN",
        "ADown": "DOWN",
        "SPPELAN": "SPP-ELAN",
        "Upsample": "Up",
        "Concat": "Concat",
        "DDetect": "Predict",
    }
    graph = load_graph("gelan-c")
    channels: list[int] = []
    assert len(graph.layers) == len(network())
    for index, (layer, printed) in enumerate(zip(graph.layers, network(), strict=True)):
        assert modules[layer.block] == printed.module
        assert tuple(s for s in layer.sources if s >= 0) == printed.route, index
        inputs = [channels[s] for s in layer.sources if s >= 0]
        arguments = list(layer.arguments)
        if layer.block == "CSPELAN":
            assert tuple(arguments[:3]) == printed.filters
            assert printed.depth == (2, arguments[3])
        elif layer.block == "SPPELAN":
            assert (arguments[0], arguments[1], arguments[1]) == printed.filters
            assert printed.depth == (3, 1)
        elif layer.block == "Concat":
            assert (sum(inputs),) == printed.filters
        elif layer.block == "Upsample":
            assert (inputs[0],) == printed.filters
        elif layer.block != "DDetect":
            assert (arguments[0],) == printed.filters
        channels.append(printed.filters[0] if printed.filters else 0)
    assert load_graph("yolov9-c").deploy()[0].layers == graph.layers, "what is deployed"


def test_the_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "comparison", "--sort", "gflops"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 48
    assert lines[1].startswith("YOLOv5-N")
    assert any(line.split()[:4] == ["YOLOv9-C", "25.3", "102.1", "53.0"] for line in lines)
    assert main(["paper", "network"]) == 0
    assert "CSP-ELAN" in capsys.readouterr().out
