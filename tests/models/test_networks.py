"""The ten networks are the published ones: keys, sizes, outputs and gradients."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from yolov9_fast.models import GraphError, create_model, load_graph, network_costs
from yolov9_fast.models.graph import GRAPH_FOLDER

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
# Parameters and GFLOPs at 640 px: training graph unfused and fused, deployed graph unfused and fused.
PUBLISHED = {
    "t": ((3_717_680, 3_674_576, 2_442_640, 2_407_632), (16.27, 16.16, 9.90, 9.82)),
    "s": ((9_804_512, 9_659_168, 7_226_208, 7_105_888), (39.50, 39.05, 26.71, 26.38)),
    "m": ((32_878_432, 32_667_400, 20_124_000, 19_978_672), (132.08, 131.32, 76.80, 76.31)),
    "c": ((51_182_080, 50_880_768, 25_498_752, 25_288_768), (238.65, 237.63, 102.82, 102.14)),
    "e": ((69_529_664, 68_669_632, 58_114_432, 57_345_920), (243.96, 241.34, 191.15, 188.95)),
}
LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("gelan-s", "yolov9-s", "gelan-c", "yolov9-c")]
GOLDEN = ["gelan-t", "yolov9-t", *LARGE]


class Golden(NamedTuple):
    theirs: dict[str, np.ndarray]
    ours: dict[str, np.ndarray]


@pytest.mark.parametrize("size", ["t", *(pytest.param(size, marks=pytest.mark.slow) for size in "smce")])
def test_parameters_and_gflops_are_as_published(size: str) -> None:
    parameters, gflops = PUBLISHED[size]
    costs = network_costs(f"yolov9-{size}")
    assert [c.parameters for c in costs] == list(parameters)
    assert [round(c.gflops, 2) for c in costs] == pytest.approx(gflops, abs=0.011)
    deployed = network_costs(f"gelan-{size}")
    assert [c.parameters for c in deployed] == list(parameters[2:]) * 2
    assert {c.graph for c in deployed} == {f"gelan-{size}"}


def test_the_published_figures_of_t_have_a_class_tower_80_wide() -> None:
    costs = network_costs("yolov9-t", class_tower=80)
    assert [c.parameters for c in costs] == [2_905_520, 2_862_992, 2_036_560, 2_001_840]
    assert round(costs[-1].gflops, 2) == 7.71


@pytest.mark.slow
def test_a_dense_box_tower_adds_92160_parameters() -> None:
    grouped, dense = (network_costs("gelan-c", box_groups=g)[0].parameters for g in (4, 1))
    assert dense - grouped == 92_160


@pytest.mark.parametrize("size", PUBLISHED)
def test_dropping_the_auxiliary_branch_of_yolov9_gives_gelan(size: str) -> None:
    deployed, origin = load_graph(f"yolov9-{size}").deploy()
    assert deployed == load_graph(f"gelan-{size}")
    assert len(origin) == len(deployed.layers)


@pytest.fixture(scope="module", params=GOLDEN)
def golden(request: pytest.FixtureRequest, golden_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """What a golden file holds, and what we compute for the same weights and image."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the golden numbers were summed in the order of x86 vector units")
    out = tmp_path_factory.mktemp("golden") / f"{request.param}.npz"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "tests.models.golden_outputs", request.param, out]
    subprocess.run(command, check=True, env=environment, timeout=300, cwd=golden_folder.parents[1])
    return Golden(dict(np.load(golden_folder / "models" / f"{request.param}.npz")), dict(np.load(out)))


def test_state_dict_keys_and_shapes_are_the_official_ones_in_order(golden: Golden) -> None:
    assert list(golden.ours["state_keys"]) == list(golden.theirs["state_keys"])
    ours, theirs = ([re.findall(r"\d+", str(s)) for s in side["state_shapes"]] for side in (golden.ours, golden.theirs))
    assert ours == theirs


def test_evaluation_outputs_of_every_branch_equal_the_golden_numbers(golden: Golden) -> None:
    names = [k for k in golden.theirs if k.startswith("eval_decoded_")]
    assert names
    for name in names:
        np.testing.assert_allclose(golden.ours[name], golden.theirs[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_training_maps_of_every_branch_equal_the_golden_numbers(golden: Golden) -> None:
    names = [k for k in golden.theirs if k.startswith("train_branch")]
    assert len(names) in (3, 6)
    for name in names:
        np.testing.assert_allclose(golden.ours[name], golden.theirs[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_gradient_norms_of_every_parameter_equal_the_golden_numbers(golden: Golden) -> None:
    assert float(golden.ours["sum_square_mean"]) == pytest.approx(float(golden.theirs["sum_square_mean"]), rel=1e-5)
    ours, theirs = (
        {str(k): float(v) for k, v in zip(side["grad_keys"], side["grad_norms"], strict=True)}
        for side in (golden.ours, golden.theirs)
    )
    assert ours.keys() == theirs.keys()
    # A bias in front of BatchNorm has no gradient but rounding: what is a millionth of the largest says nothing.
    assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-6 * max(theirs.values()))


def test_evaluation_gives_boxes_and_scores_and_training_raw_maps() -> None:
    model = create_model("yolov9-t", 3)
    image = torch.rand(2, 3, 64, 96)
    output = model.train()(image)
    assert [tuple(m.shape) for m in output.main] == [(2, 67, 8, 12), (2, 67, 4, 6), (2, 67, 2, 3)]
    assert output.auxiliary is not None
    assert [m.shape for m in output.auxiliary] == [m.shape for m in output.main]
    with torch.no_grad():
        decoded = model.eval()(image)
    assert tuple(decoded.shape) == (2, 7, 8 * 12 + 4 * 6 + 2 * 3)
    assert bool(((decoded[:, 4:] >= 0) & (decoded[:, 4:] <= 1)).all())


def test_evaluation_computes_nothing_that_only_the_auxiliary_branch_needs() -> None:
    model = create_model("yolov9-c", 2).eval()
    seen: list[int] = []
    for index, layer in enumerate(model.model):
        layer.register_forward_hook(lambda *_, i=index: seen.append(i))
    with torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    assert seen == [*range(23), 38]


def test_class_tower_of_t_follows_the_published_rule() -> None:
    assert create_model("gelan-t", 80).class_tower == 128
    assert create_model("gelan-t", 3).class_tower == 64
    assert create_model("gelan-t", 80, class_tower=80).class_tower == 80


def test_auxiliary_none_builds_the_deployed_graph() -> None:
    model = create_model("yolov9-s", 1, auxiliary="none")
    assert model.graph_name == "gelan-s"
    assert not model.has_auxiliary


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("yolov9-x",), {}, GraphError, "unknown network 'yolov9-x'; known are gelan-c"),
        (("missing.yaml",), {}, GraphError, "graph file missing.yaml does not exist"),
        (("gelan-t", 0), {}, ValueError, "num_classes: expected an integer of at least 1, got 0"),
        (("gelan-t", 2.5), {}, ValueError, "num_classes"),
        (("gelan-t",), {"class_tower": 0}, ValueError, "class_tower: expected at least 1"),
        (("gelan-t",), {"box_groups": 3}, ValueError, "box_groups: expected a divisor of 64"),
        (("gelan-t",), {"auxiliary": "nothing"}, ValueError, "unknown auxiliary branch"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: tuple[object, ...], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        create_model(*arguments, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 3, 33, 64), (1, 3, 0, 64), (1, 1, 64, 64), (3, 64, 64)])
def test_images_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^images: expected "):
        create_model("gelan-t", 1).eval()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: []", "needs a list `layers`"),
        ("layers: [[-1, Conv]]", r"layer 0: expected \[from, block, arguments\]"),
        ("layers: [[-1, Blub, []]]", "unknown block 'Blub'"),
        ("layers: [[3, Conv, [8]]]", "only layers before it exist"),
        ("layers: [[-1, Conv, [8, 3, 2]]]", "the head .* must be the last"),
        ("layers: [[-1, Conv, [8, 3, 2, 5]], [[0, 0, 0], DDetect, []]]", "layer 0, Conv"),
        ("{", "expected YAML"),
        ("", "needs a list `layers`"),
        ("layers: [[-1, Conv, [2024-99-99]]]", "expected YAML"),
        (f"layers: [[{'9' * 5000}, Conv, [8]]]", "integer of 5,000 digits"),
        (f"layers: [[0x{'f' * 5000}, Conv, [8]]]", "integer of 5,002 digits"),
        (f"layers: [[-1, Conv, {'[' * 60}{']' * 60}]]", "at most 50 levels"),
        (f"layers: [[-1, Conv, {'[' * 10**5}", "graph file: "),
        ("{[1]: 2}", "unhashable"),
        ("layers: &a [*a]", "alias"),
        (BOMB + "layers: [[-1, Conv, [*h]]]", "at most 1,000,000 values"),
        ("layers: [[-1, Conv, [8]]]\nname: [a]", "name: expected a short text"),
        (f"layers: [[-1, Conv, [8]]]\nname: {'x' * 2**20}", "name: expected a short text"),
        ("layers: [[-1, Conv, [8]]]\nabsolute: 'no'", "absolute: expected true or false, got 'no'"),
        (f"layers: [[-1, Conv, [{'9' * 30}]], [[0, 0, 0], DDetect, []]]", "layer 0: arguments"),
        (f"layers: [[-1, Conv, [{'x' * 2**20}]], [[0, 0, 0], DDetect, []]]", "layer 0: arguments"),
        ("layers: [[-1, Conv, [!!binary YQ==]], [[0, 0, 0], DDetect, []]]", "layer 0: arguments"),
        (f"layers: [[-1, {'x' * 2**20}, []]]", "layer 0: expected the name of a block"),
    ],
)
def test_a_graph_file_that_describes_no_network_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "graph.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(GraphError, match=message) as caught:
        create_model(path)
    assert time.monotonic() - began < 5
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a\0b.yaml", "NUL byte"),
        ("x" * 300 + ".yaml", "model: expected a path of at most"),
        ("x" * 3000, "model: expected a path of at most"),
        ("~nobody-of-this-name/g.yaml", "model: expected a path.*home"),
        ("folder.yaml", "is a folder"),
        ("zero.yaml", "is a device"),
        ("pipe.yaml", "is a pipe"),
        ("gone.yaml", "is a broken link"),
        ("latin.yaml", "expected UTF-8 text"),
    ],
)
def test_a_path_that_is_no_graph_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.yaml").mkdir()
    Path("zero.yaml").symlink_to("/dev/zero")
    Path("gone.yaml").symlink_to("nowhere")
    Path("latin.yaml").write_bytes(b"name: \xe4")
    os.mkfifo("pipe.yaml")
    with pytest.raises(GraphError, match=message) as caught:
        create_model(name)
    assert len(str(caught.value)) < 1000


def test_a_graph_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "gelan-t.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + (GRAPH_FOLDER / "gelan-t.yaml").read_bytes())
    assert load_graph(path) == load_graph("gelan-t")


def test_a_graph_file_may_use_other_names_for_the_same_blocks(tmp_path: Path) -> None:
    text = (GRAPH_FOLDER / "gelan-t.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(
        text.replace("CSPELAN", "RepNCSPELAN4").replace(" ELAN,", " ELAN1,").replace("Upsample", "nn.Upsample")
    )
    assert load_graph(path).layers == load_graph("gelan-t").layers


def test_the_bias_of_a_fresh_head_is_the_prior() -> None:
    head = create_model("gelan-t", 80).head
    for level, stride in enumerate((8, 16, 32)):
        assert head.cv2[level][-1].bias.mean().item() == 1.0
        expected = np.log(5 / 80 / (640 / stride) ** 2)
        assert head.cv3[level][-1].bias.mean().item() == pytest.approx(expected)
