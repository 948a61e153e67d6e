"""What docs/extending/block.md says, done exactly so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import yolov9_fast as yf
from tests.extending.conftest import Train
from tests.extending.pages import code_blocks, commands, write_files
from yolov9_fast._lazy import import_callable
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.models import DetectionModel, GraphError, graph_cost, save_weights
from yolov9_fast.models.graph import graph_from_dict
from yolov9_fast.nn import Conv, DDetect, register_block, registry
from yolov9_fast.nn.registry import find_block

PAGE = "block.md"
[COMMAND] = commands(PAGE)
STEM = [[-1, "Conv", [8, 3, 2]], [-1, "Conv", [8, 3, 2]]]
LEVELS = [[-1, "ADown", [8]], [-1, "ADown", [8]], [-1, "ADown", [8]]]


def network(*rows: list[object], head: str = "DDetect") -> DetectionModel:
    """A network of a stem, `rows` at stride 4, and levels of stride 8, 16 and 32."""
    layers = [*STEM, *rows, *LEVELS]
    last = len(layers) - 1
    data = {"name": "mine", "layers": [*layers, [[last - 2, last - 1, last], head, []]]}
    return DetectionModel(graph_from_dict(data, "mine.yaml"), 2)


@pytest.fixture(autouse=True)
def forget_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_specs", dict(registry._specs))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DetectionModel:
    """The page's network, built by the page's own lines."""
    write_files(PAGE, tmp_path)
    (tmp_path / "my-net.yaml").write_text(code_blocks(PAGE, "yaml")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, object] = {}
    exec(code_blocks(PAGE, "python")[1], names)
    built = names["model"]
    assert isinstance(built, DetectionModel)
    return built


def test_the_block_is_short() -> None:
    assert sum(1 for line in code_blocks(PAGE, "python")[0].splitlines() if line.strip()) <= 20


def test_its_network_trains_and_is_saved_loaded_deployed_fused_and_counted(model: DetectionModel) -> None:
    torch.manual_seed(0)
    block = model.model[3]
    before = block.down.conv.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = torch.tensor([[0, 1, 0.5, 0.5, 0.5, 0.6]])
    DetectionLoss(2)(model.train()(torch.rand(2, 3, 64, 64)), target, 64).total.backward()
    optimizer.step()
    assert not torch.equal(block.down.conv.weight, before)

    model.eval()
    image = torch.rand(1, 3, 64, 64)
    loaded = yf.load_checkpoint(save_weights(model, "mine.safetensors"))
    assert torch.equal(loaded(image), model(image))
    assert torch.equal(yf.to_deploy(model)(image), model(image))
    torch.testing.assert_close(yf.fuse(model)(image), model(image), rtol=1e-3, atol=1e-3)
    assert graph_cost("my-net.yaml", 2, fused=False).parameters == sum(p.numel() for p in model.parameters())


def test_the_command_trains_it(model: DetectionModel, train: Train) -> None:
    run = train(COMMAND, "mine", "--model", "my-net.yaml")
    assert yf.load_checkpoint(run / "weights/last.safetensors").graph.layers == model.graph.layers


def test_its_network_takes_an_auxiliary_branch_and_loses_it(model: DetectionModel) -> None:
    trained = yf.create_model("my-net.yaml", num_classes=2, auxiliary="icn").eval()
    assert trained.has_auxiliary
    deployed = yf.to_deploy(trained)
    image = torch.rand(1, 3, 64, 64)
    assert deployed.graph.layers == model.graph.layers
    assert torch.equal(deployed(image), trained(image))


def test_a_weights_file_imports_nothing(model: DetectionModel) -> None:
    """In another process, with the module importable: the error says what to import."""
    save_weights(model, "mine.safetensors")
    code = "import sys, yolov9_fast as yf\n{}\ntry:\n    print(yf.load_checkpoint('mine.safetensors').graph_name)\n"
    code += "except Exception as error:\n    print(error, 'my_blocks' in sys.modules)"
    found = [
        subprocess.run([sys.executable, "-c", code.format(line)], capture_output=True, text=True, check=True).stdout
        for line in ("", "import my_blocks")
    ]
    assert "unknown block 'JoinDown'" in found[0]
    assert "False" in found[0]
    assert found[1] == "my-net\n"


def test_a_path_is_imported_by_a_graph_file_and_not_by_a_weights_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "paths.py").write_text(
        "from yolov9_fast.nn import Conv\nclass Other(Conv):\n    def __init__(self, c): super().__init__(c, 8)\n"
    )
    monkeypatch.chdir(tmp_path)
    rows = [*STEM, [-1, "paths:Other", []], *LEVELS, [[3, 4, 5], "DDetect", []]]
    with pytest.raises(GraphError, match="layer 2: block 'paths:Other': its module is not loaded; import paths first"):
        graph_from_dict({"layers": rows}, "mine.yaml")
    text = "layers:\n" + "".join(f"  - {row}\n" for row in rows).replace("'", '"')
    Path("graph.yaml").write_text(text)
    model = yf.create_model("graph.yaml", 2).eval()
    loaded = yf.load_checkpoint(save_weights(model, "path.safetensors"))
    assert loaded.graph.layers[2].block == "paths:Other"
    assert torch.equal(loaded(torch.ones(1, 3, 64, 64)), model(torch.ones(1, 3, 64, 64)))


def test_a_module_without_channels_is_a_layer() -> None:
    register_block("Pool", takes_channels=False)(nn.MaxPool2d)
    model = network([-1, "Pool", [3, 1, 1]])
    assert isinstance(model.model[2], nn.MaxPool2d)
    assert model(torch.rand(2, 3, 64, 64)).main[0].shape[2:] == (8, 8)


def test_a_block_may_return_several_maps() -> None:
    class Halves(nn.Module):
        def __init__(self, in_channels: int) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return list(x.chunk(2, 1))

    register_block("Halves")(Halves)
    model = network([-1, "Halves", []], [-2, "Conv", [4]], [[2, -1], "CBFuse", [[1]]]).eval()
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 6, 84)


def test_a_head_of_ones_own() -> None:
    @register_block("Plain", inputs="many", role="head")
    class Plain(DDetect):
        auxiliary_form = None

    model = network(head="Plain").eval()
    assert type(model.head) is Plain
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 6, 84)
    assert not model.has_auxiliary


class _Fails(Conv):
    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("inside")


class _Flat(_Fails):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (_Fails, r"layer 2, Wrong\[\]: block 'Wrong': fails on inputs of \[8\] channels: KeyError: 'inside'"),
        (_Flat, r"block 'Wrong': expected an output \[B, C, H, W\], got \[1, 8192\]"),
        (lambda channels: 3, "block 'Wrong': expected a Module, got int"),
    ],
)
def test_a_wrong_block_is_named_when_the_network_is_built(block: type[nn.Module], message: str) -> None:
    register_block("Wrong")(block)
    with pytest.raises(GraphError, match=message):
        network([-1, "Wrong", []])


@pytest.mark.parametrize("name", ["x" * 5000, f"{'x' * 5000}:Block", f"math:{'x' * 5000}"])
def test_a_long_name_is_not_repeated(name: str) -> None:
    with pytest.raises(ValueError, match=r"block") as caught:
        find_block(name)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("path", ["x" * 5000, f"{'x' * 5000}:f", f"math:{'x' * 5000}"])
def test_a_long_import_path_is_not_repeated(path: str) -> None:
    with pytest.raises(ValueError, match=r"import|function") as caught:
        import_callable(path)
    assert len(str(caught.value)) < 2000
