"""An accelerated module gives what the forward of its class gives with its present children, however they changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, spectral_norm
from torch.nn.utils.parametrizations import weight_norm

import yolov9_fast as yf
from tests.accelerate import mit_shaped, official_shaped, ultralytics_shaped
from yolov9_fast.ops._bn_silu import OPERATOR

pytestmark = pytest.mark.skipif(not OPERATOR.has_kernels(torch.device("cpu")), reason="no compiled bn_silu")

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "csp elan": lambda: official_shaped.RepNCSPELAN4(12, 20, 16, 8),
    "elan": lambda: official_shaped.ELAN1(12, 20, 16, 8),
    "spp": lambda: official_shaped.SPPELAN(12, 20, 6),
    "a_down": lambda: official_shaped.ADown(12, 20),
    "a_conv": lambda: official_shaped.AConv(12, 20),
    "ultralytics spp": lambda: ultralytics_shaped.SPPELAN(12, 20, 6),
    "mit csp elan": lambda: mit_shaped.RepNCSPELAN(12, 20, 16, 8),
    "mit spp": lambda: mit_shaped.SPPELAN(12, 20, 6),
    "mit a_down": lambda: mit_shaped.ADown(12, 20),
    "mit a_conv": lambda: mit_shaped.AConv(12, 20),
}
by_block = pytest.mark.parametrize("name", BLOCKS)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    block = copy.deepcopy(BLOCKS[name]()).double()  # copied, because units share the SiLU of their class
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return block


def image() -> Tensor:
    return torch.randn(2, 12, 10, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_same(fast: nn.Module, plain: nn.Module) -> None:
    """Results and gradients of the input in both modes; float64, so that only a different computation differs."""
    for mode in (True, False):
        results = []
        for block in (fast, plain):
            x = image().to(next(block.parameters()).device).requires_grad_()
            y = block.train(mode)(x)
            y.square().sum().backward()
            results.append((y.detach(), x.grad))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def called(block: nn.Module) -> list[str]:
    """Names of the modules that a call of `block` calls."""
    seen: list[str] = []
    handles = [m.register_forward_hook(lambda *_, n=n: seen.append(n)) for n, m in block.named_modules()]
    block(image().to(next(block.parameters()).device))
    for handle in handles:
        handle.remove()
    return seen


def replaced(block: nn.Module, path: str, child: nn.Module) -> None:
    block.set_submodule(path, child)


def with_forward(block: nn.Module, path: str) -> None:
    """The module's own forward, and something more, on the instance."""
    module = block.get_submodule(path)
    own = type(module).forward
    module.forward = lambda x: 0.5 * own(module, x)  # type: ignore[method-assign]


def with_class(block: nn.Module, path: str) -> None:
    """As a class derived from the module's own, which overrides the forward under the same name."""
    module = block.get_submodule(path)
    base = type(module)
    own = base.forward
    module.__class__ = type(base.__name__, (base,), {"forward": lambda self, x: 0.5 * own(self, x)})


def with_hook(block: nn.Module, path: str) -> None:
    block.get_submodule(path).register_forward_hook(lambda _, __, y: 0.5 * y)


def with_input_hook(block: nn.Module, path: str) -> None:
    block.get_submodule(path).register_forward_pre_hook(lambda _, x: (0.5 * x[0],))


def in_sequential(block: nn.Module, path: str) -> None:
    replaced(block, path, nn.Sequential(block.get_submodule(path)))


def assert_the_same_when_changed(
    name: str, change: Callable[[nn.Module, str], None], path: str, order: str, device: str = "cpu"
) -> None:
    """Compare a block with an accelerated one when both are changed; `order` "before": changed, then accelerated."""
    plain, fast = make(name).to(device), make(name).to(device)
    if order != "before":
        yf.accelerate(fast)
        fast(image().to(device))
        fast.load_state_dict(plain.state_dict())
    change(plain, path)
    change(fast, path)
    if order == "before":
        yf.accelerate(fast)
    assert_same(fast, plain)


CHANGES = [with_forward, with_class, with_hook, with_input_hook, in_sequential]


@by_block
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("order", ["before", "after", pytest.param("everywhere", marks=pytest.mark.slow)])
def test_a_changed_child_runs(name: str, change: Callable[[nn.Module, str], None], order: str, device: str) -> None:
    paths = [path for path in called(make(name).to(device)) if path or change is not in_sequential]
    for path in paths if order == "everywhere" else paths[:: 7 if order == "after" else 13]:
        assert_the_same_when_changed(name, change, path, order, device)


class LowRank(nn.Module):
    """A wrapped convolution: it keeps the convolution as a child and has none of its attributes."""

    def __init__(self, wrapped: nn.Conv2d) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.down = nn.Conv2d(wrapped.in_channels, 2, 1, bias=False, dtype=torch.float64)
        self.up = nn.Conv2d(2, wrapped.out_channels, 1, wrapped.stride, bias=False, dtype=torch.float64)
        nn.init.constant_(self.down.weight, 0.1)
        nn.init.constant_(self.up.weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wrapped(x) + self.up(self.down(x))
        return y


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def low_rank(block: nn.Module, path: str) -> None:
    replaced(block, path, LowRank(block.get_submodule(path)))  # type: ignore[arg-type]


def halved(block: nn.Module, path: str) -> None:
    parametrize.register_parametrization(block.get_submodule(path), "weight", Half())


def normed(block: nn.Module, path: str) -> None:
    weight_norm(block.get_submodule(path))


def spectral(block: nn.Module, path: str) -> None:
    torch.manual_seed(3)
    spectral_norm(block.get_submodule(path).eval())


def widened(block: nn.Module, path: str) -> None:
    """Other weights than the attributes say, as after pruning; the next convolution takes as many."""
    unit, last = block.get_submodule("cv2.1"), block.get_submodule("cv4.conv")
    unit.conv.weight = nn.Parameter(unit.conv.weight.detach()[:5])
    unit.bn = nn.BatchNorm2d(5, dtype=torch.float64)
    block.get_submodule("cv3.0.cv1.conv").weight = nn.Parameter(
        block.get_submodule("cv3.0.cv1.conv").weight.detach()[:, :5]
    )
    block.get_submodule("cv3.0.cv2.conv").weight = nn.Parameter(
        block.get_submodule("cv3.0.cv2.conv").weight.detach()[:, :5]
    )
    last.weight = nn.Parameter(last.weight.detach()[:, :29])


@pytest.mark.parametrize("change", [low_rank, halved, normed, spectral, widened])
@pytest.mark.parametrize("path", ["cv1.conv", "cv2.0.m.0.cv1.conv1.conv", "cv4.conv"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_wrapped_or_parametrised_convolution_runs(
    change: Callable[[nn.Module, str], None], path: str, order: str
) -> None:
    assert_the_same_when_changed("csp elan", change, path, order)


POOLS: dict[str, tuple[str, nn.Module]] = {
    "spp": ("cv3", nn.AvgPool2d(5, 1, 2)),
    "ultralytics spp": ("cv3", nn.MaxPool2d(3, 1, 1)),
    "mit spp": ("pools.1", nn.MaxPool2d(7, 1, 3)),
    "mit a_down": ("max_pool", nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "mit a_conv": ("avg_pool", nn.AvgPool2d(2, 1, divisor_override=3)),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("how", ["replaced", "changed"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_another_pool_runs(name: str, how: str, order: str) -> None:
    path, pool = POOLS[name]
    plain, fast = make(name), make(name)
    if order == "after":
        yf.accelerate(fast)
        fast(image())
        fast.load_state_dict(plain.state_dict())
    for block in (plain, fast):
        if how == "replaced":
            replaced(block, path, copy.deepcopy(pool))
        else:
            old: Any = block.get_submodule(path)
            old = getattr(old, "m", old)
            old.kernel_size, old.padding = (3, 1) if name.endswith("spp") else (1, 0)
    if order == "before":
        report = yf.accelerate(fast)
        assert "pool" in report.skipped[""]
    assert_same(fast, plain)


def test_a_class_that_overrides_a_known_forward_is_skipped() -> None:
    class Conv(official_shaped.Conv):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class RepNCSP(official_shaped.RepNCSP):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.scale = nn.Parameter(torch.ones(()))

    class ADown(official_shaped.ADown):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    report = yf.accelerate(nn.Sequential(Conv(3, 8), RepNCSP(), ADown(8, 8)))
    assert "overrides the forward of a class Conv" in report.skipped["0"]
    assert "parameters or buffers of its own: scale" in report.skipped["1"]
    assert "__call__ of its own" in report.skipped["2"]


class Other:
    """Forwards of classes with a known name and the right children that compute something else."""

    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.act(self.conv(x)))

    class RepNBottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cv1, self.cv2, self.add = official_shaped.Conv(8, 8), official_shaped.Conv(8, 8), True

        def forward(self, x: Tensor) -> Tensor:
            return x + 0.1 * self.cv2(self.cv1(x))

    class ADown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cv1, self.cv2 = official_shaped.Conv(4, 4, 3, 2), official_shaped.Conv(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            first, second = x.chunk(2, 1)
            return torch.cat((self.cv1(first), self.cv2(nn.functional.max_pool2d(second, 3, 2, 1))), 1)

    class CBFuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idx = [1, 0]

        def forward(self, xs: Any) -> Tensor:
            return xs[-1] + 2 * nn.functional.interpolate(xs[0][self.idx[0]], xs[-1].shape[2:])


@pytest.mark.parametrize("kind", [Other.Conv, Other.RepNBottleneck, Other.ADown, Other.CBFuse])
def test_a_class_of_a_known_name_that_computes_something_else_is_skipped(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(), official_shaped.Conv(8, 8))
    calls: list[str] = []
    # The activation is one object of all instances of the class: hooks are removed again.
    hooks = [module.register_forward_hook(lambda *_: calls.append("called")) for module in model.modules()]
    report = yf.accelerate(model)
    for hook in hooks:
        hook.remove()
    assert "its forward gives another result" in report.skipped["0"]
    assert report.accelerated["1"] == "conv"
    assert not calls


def test_a_replaced_forward_of_the_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    own = official_shaped.Conv.forward
    monkeypatch.setattr(official_shaped.Conv, "forward", lambda self, x: 0.5 * own(self, x))
    plain, fast = make("csp elan"), make("csp elan")
    assert "its forward gives another result" in yf.accelerate(fast).skipped["cv1"]
    assert_same(fast, plain)


@pytest.mark.parametrize("of", ["block", "child", "torch"])
def test_a_forward_of_the_class_that_is_replaced_later_runs(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = make("csp elan")
    yf.accelerate(block)
    block(image())
    cls: Any = {"block": official_shaped.RepNCSPELAN4, "child": official_shaped.Conv, "torch": nn.SiLU}[of]
    monkeypatch.setattr(cls, "forward", lambda self, x, own=cls.forward: 0.5 * own(self, x))
    plain = make("csp elan")
    plain.load_state_dict(block.state_dict())
    assert_same(block, plain)


@by_block
def test_hooks_of_every_kind_see_what_they_see_in_the_plain_model(name: str, device: str) -> None:
    def calls(block: nn.Module, accelerated: bool) -> list[tuple[str, str]]:
        for module in block.modules():
            if isinstance(module, nn.SiLU):
                module.inplace = False
        if accelerated:
            yf.accelerate(block)
            block(image().to(device))
        seen: list[tuple[str, str]] = []
        names = {module: path for path, module in block.named_modules()}
        torch_module = nn.modules.module
        handles = [
            torch_module.register_module_forward_hook(lambda m, *_: seen.append(("all", names[m]))),
            torch_module.register_module_forward_pre_hook(lambda m, *_: seen.append(("all before", names[m]))),
            torch_module.register_module_full_backward_hook(lambda m, *_: seen.append(("all back", names[m]))),
        ]
        block(image().to(device).requires_grad_()).sum().backward()
        for handle in handles:
            handle.remove()
        for module in block.modules():
            module.register_forward_hook(lambda m, *_: seen.append(("own", names[m])))
            module.register_forward_pre_hook(lambda m, *_: seen.append(("before", names[m])))
            module.register_full_backward_hook(lambda m, *_: seen.append(("back", names[m])))
            module.register_full_backward_pre_hook(lambda m, *_: seen.append(("back before", names[m])))
        block(image().to(device).requires_grad_()).sum().backward()
        return seen

    assert sorted(calls(make(name).to(device), True)) == sorted(calls(make(name).to(device), False))


@by_block
def test_copies_and_replicas_run_their_own_weights(name: str, device: str) -> None:
    block = make(name).to(device)
    yf.accelerate(block)
    x = image().to(device)
    expected = block.eval()(x)
    first = copy.copy(block)
    first._modules = {key: copy.deepcopy(child) for key, child in block._modules.items()}
    second = copy.copy(copy.deepcopy(block))
    third = block._replicate_for_data_parallel()
    third._modules = first._modules.copy()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    for other in (first, second, third):
        assert torch.equal(other(x), expected)
        assert type(other) is type(block)
    assert not torch.equal(block(x), expected)


def test_the_replicas_of_data_parallel_use_a_bias_next_to_a_norm() -> None:
    block = make("csp elan").eval()
    for path in ("cv2.0.cv1.conv", "cv2.0.cv2.conv"):
        conv = block.get_submodule(path)
        conv.bias = nn.Parameter(torch.ones(conv.out_channels, dtype=torch.float64))
    yf.accelerate(block)
    expected = block(image())
    for module in block.modules():
        for key, parameter in [*module.named_parameters(recurse=False)]:
            delattr(module, key)
            setattr(module, key, parameter.detach())
    torch.testing.assert_close(block(image()), expected)
