"""`accelerate(capture=True)`: forward and backward are replayed; without a GPU by `tests/recording.py`."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import yolov9_fast as yf
from tests.accelerate import ultralytics_shaped
from tests.recording import record
from yolov9_fast._accelerate import captured
from yolov9_fast._accelerate.classes import GRAPHS
from yolov9_fast._capture import WARM_UP


class Net(nn.Module):
    """Two maps in a dict, of which one may be left out of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Conv2d(4, 2, 1)
        self.unused = nn.Linear(1, 1)
        self.python = 0

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.python += 1
        y = self.first(x)
        return {"maps": [self.second(y), y], "none": None, "count": y.detach().sum()}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "recorder_for", lambda device: record)


def nets(device: str = "cpu") -> tuple[Any, Any]:
    torch.manual_seed(0)
    own = Net().to(device).train()
    other = copy.deepcopy(own)
    report = yf.accelerate(own, capture=True)
    assert (report.capture, report.not_captured) == (True, None)
    assert "captured: forward and backward" in str(report)
    return own, other


def images(seed: int, *shape: int) -> Tensor:
    return torch.rand(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(seed))


def train(model: Any, x: Tensor, zero: bool = True) -> Tensor:
    result = model(x)
    assert result["none"] is None
    loss = (result["maps"][0] ** 2).mean() + result["maps"][1].sigmoid().mean()
    if zero:
        model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)
    assert not result["count"].requires_grad
    return loss.detach()


def same(own: Any, other: Any) -> bool:
    grads = [(one.grad, two.grad) for one, two in zip(own.parameters(), other.parameters(), strict=True)]
    return (
        all((one is None) == (two is None) and (one is None or torch.equal(one, two)) for one, two in grads)
        and own.state_dict().keys() == other.state_dict().keys()
        and all(torch.equal(value, other.state_dict()[name]) for name, value in own.state_dict().items())
    )


@pytest.mark.usefixtures("recorded")
def test_training_and_evaluation_are_replayed_and_give_the_same_bits() -> None:
    own, other = nets()
    shapes = [(2, 3, 8, 8), (1, 3, 6, 8)]
    for seed in range(7):
        for shape in shapes:
            x = images(seed, *shape)
            assert torch.equal(train(own, x), train(other, x))
            assert same(own, other)
        for model in (own, other):
            model.eval()
        with torch.no_grad():
            assert torch.equal(own(x)["maps"][0], other(x)["maps"][0])
        for model in (own, other):
            model.train()
    assert own.python == 3 * (WARM_UP + 1)
    graphs = vars(own)[GRAPHS]
    assert (len(graphs._pairs), len(graphs.capture.recorded), graphs.reason) == (2, 1, None)


@pytest.mark.usefixtures("recorded")
def test_accumulated_gradients_and_kept_results() -> None:
    """The graphs' memory is theirs: `.grad` and what the loop keeps do not change with the next replay."""
    own, other = nets()
    kept = []
    for seed in range(8):
        train(own, images(seed), zero=seed % 3 == 0)
        train(other, images(seed), zero=seed % 3 == 0)
        assert same(own, other)
        with torch.no_grad():
            kept.append((own(images(seed))["maps"][0], other(images(seed))["maps"][0]))
    assert all(torch.equal(one, two) for one, two in kept)
    before = own.python
    train(own, images(9))
    assert own.python == before


@pytest.mark.usefixtures("recorded")
def test_two_forwards_before_a_backward() -> None:
    own, other = nets()
    for seed in range(7):
        for model in (own, other):
            first, second = (model(images(10 * seed + each))["maps"][0] for each in range(2))
            model.zero_grad()
            (first * second).mean().backward()
        assert same(own, other)
    loss = own(images(0))["maps"][0].mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice after one forward"):
        loss.backward()


def _freeze(model: Any) -> None:
    model.second.weight.requires_grad_(False)


def _move(model: Any) -> None:
    model.second.weight.data = model.second.weight.data.clone()


CHANGES: dict[str, Callable[[Any], object]] = {
    "part in evaluation": lambda model: model.first[1].eval(),
    "frozen": _freeze,
    "moved": _move,
    "another child": lambda model: setattr(model, "second", nn.Identity()),
    "hook": lambda model: model.first[0].register_forward_hook(lambda m, i, output: output * 2),
    "hook of a child": lambda model: model.second.register_forward_hook(lambda m, i, output: output * 2),
    "hook of the network": lambda model: model.register_forward_hook(lambda m, i, output: output | {"none": None}),
    "hook of a gradient": lambda model: model.second.weight.register_hook(lambda gradient: gradient * 2),
}


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_a_recording(change: str) -> None:
    own, other = nets()
    for seed in range(12):
        if seed == 6:
            for model in (own, other):
                model.zero_grad()
                CHANGES[change](model)
        assert torch.equal(train(own, images(seed)), train(other, images(seed)))
        assert same(own, other)


@pytest.mark.usefixtures("recorded")
def test_autocast_other_dtypes_and_inputs() -> None:
    own, other = nets()
    for seed in range(6):
        for dtype in (torch.bfloat16, torch.float16):
            for model in (own, other):
                with torch.autocast("cpu", dtype=dtype):
                    loss = sum(level.float().mean() for level in model(images(seed))["maps"])
                model.zero_grad()
                loss.backward()
            assert same(own, other)
    assert len(vars(own)[GRAPHS]._pairs) == 2
    x = images(0).requires_grad_()
    own(x)["maps"][0].mean().backward()  # a plain call
    assert x.grad is not None
    with pytest.raises(TypeError):
        own()
    own.double(), other.double()
    for seed in range(6):
        assert torch.equal(train(own, images(seed).double()), train(other, images(seed).double()))


@pytest.mark.usefixtures("recorded")
def test_copies_pickles_and_restore() -> None:
    own, other = nets()
    for seed in range(5):
        train(own, images(seed))
        train(other, images(seed))
    assert own.state_dict().keys() == other.state_dict().keys()
    copied = copy.deepcopy(own)
    assert GRAPHS not in vars(copied)
    assert isinstance(copied, Net)
    loaded = pickle.loads(pickle.dumps(own))
    assert type(loaded) is Net
    assert vars(loaded).keys() == vars(other).keys()
    shallow = copy.copy(own)
    for seed in range(5):
        x = images(seed)
        losses = [train(model, x) for model in (other, copied, loaded)]
        assert torch.equal(losses[0], losses[1])
        assert torch.equal(losses[0], losses[2])
    assert len(vars(copied)[GRAPHS]._pairs) == 1
    assert vars(copied)[GRAPHS] is not vars(own)[GRAPHS]
    shallow(images(0))
    assert vars(shallow).get(GRAPHS) is not vars(own)[GRAPHS]
    yf.accelerate(own, capture=True)  # changes nothing
    yf.restore(own)
    assert type(own) is Net
    assert vars(own).keys() == vars(other).keys()


@pytest.mark.usefixtures("recorded")
def test_results_that_cannot_be_handed_over_are_plain(caplog: pytest.LogCaptureFixture) -> None:
    class Text(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return "text", super().forward(x)

    model = Text(2, 2)
    yf.accelerate(model, capture=True)
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            for _ in range(6):
                assert model(torch.zeros(1, 2))[0] == "text"
    assert sum("the network gives str" in message for message in caplog.messages) == 2


@pytest.mark.usefixtures("recorded")
def test_inside_a_captured_step_the_step_is_the_recording() -> None:
    own, other = nets()
    step = yf.capture_step(lambda x: train(own, x), images(0), record=record)
    for seed in range(6):
        assert torch.equal(step(images(seed)), train(other, images(seed)))
    assert step.captured
    assert vars(own)[GRAPHS]._pairs == {}


def test_on_a_cpu_everything_runs_as_without() -> None:
    torch.manual_seed(0)
    own = Net()
    other = copy.deepcopy(own)
    report = yf.accelerate(own, capture=True)
    assert "not captured: a CPU has no CUDA graphs; it runs as without" in str(report)
    for seed in range(5):
        assert torch.equal(train(own, images(seed)), train(other, images(seed)))
        assert same(own, other)
    assert GRAPHS not in vars(own)
    assert own.python == 5
    assert not yf.accelerate(Net()).capture


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_wrappers_are_refused() -> None:
    model = Net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    for each in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(ValueError, match="capture: expected a network without DistributedDataParallel"):
            yf.accelerate(each, capture=True)
    with pytest.raises(ValueError, match="capture: expected a network without DataParallel"):
        yf.accelerate(nn.DataParallel(model), capture=True)


@pytest.mark.usefixtures("recorded")
def test_an_accelerated_network_of_other_code() -> None:
    torch.manual_seed(0)
    own = ultralytics_shaped.DetectionModel(3).train()
    other = copy.deepcopy(own)
    assert yf.accelerate(own, capture=True).counts() == yf.accelerate(other).counts()
    for seed in range(WARM_UP + 3):
        for model in (own, other):
            model.zero_grad()
            sum(level.square().mean() for level in model(images(seed, 2, 3, 64, 64))).backward()
        for one, two in zip(own.parameters(), other.parameters(), strict=True):
            # The gradient of the maps comes in another layout, in which a bias's is summed in another order.
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-7)
        for name, value in own.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert len(vars(own)[GRAPHS]._pairs) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.graph needs a GPU")
def test_a_network_on_a_gpu_is_replayed() -> None:
    own, other = nets("cuda")
    for seed in range(7):
        assert torch.allclose(train(own, images(seed).cuda()), train(other, images(seed).cuda()), rtol=1e-4)
    assert own.python == WARM_UP + 1
    assert vars(own)[GRAPHS].reason is None
