"""Plans of blocks: made once, used as long as the block is what it was, and never in the way of it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import yolov9_fast as yf
from tests.accelerate import official_shaped
from yolov9_fast.models import create_model, fuse
from yolov9_fast.nn import CSPELAN, ELAN, SPPCSPC, SPPELAN, ADown, Conv, MPDown, RepBottleneck, RepConv
from yolov9_fast.nn.plan import PLAN, Called, Plan
from yolov9_fast.nn.steps import Bottleneck, Chain, Csp, Elan, RepUnit, Unit
from yolov9_fast.nn.sync_batch_norm import convert_sync_batch_norm
from yolov9_fast.ops._bn_silu import OPERATOR

pytestmark = pytest.mark.skipif(not OPERATOR.has_kernels(torch.device("cpu")), reason="no compiled bn_silu")

CHILDREN = [
    "cv1",
    "cv1.conv",
    "cv2",
    "cv2.0",
    "cv2.0.cv2.bn",
    "cv2.0.m",
    "cv2.0.m.0.cv1.conv2.conv",
    "cv3.1.act",
    "cv4",
]


def make(kind: Callable[..., nn.Module] = CSPELAN, *arguments: int) -> nn.Module:
    torch.manual_seed(0)
    return kind(*(arguments or (12, 20, 16, 8))).train()


def image(channels: int = 12) -> Tensor:
    return torch.randn(2, channels, 9, 7, generator=torch.Generator().manual_seed(1))


def plan_of(block: nn.Module) -> Plan:
    found = vars(block)[PLAN]
    assert isinstance(found, Plan)
    return found


def steps(step: Any) -> Iterator[Any]:
    """`step` and all steps inside it."""
    yield step
    for value in vars(step).values():
        for inner in value if isinstance(value, tuple) else (value,):
            if isinstance(inner, Called | Unit | RepUnit | Bottleneck | Chain | Csp | Elan):
                yield from steps(inner)


def called(block: nn.Module) -> list[nn.Module]:
    """The modules that the block's plan calls as they are."""
    return [step.module for step in steps(plan_of(block).step) if isinstance(step, Called)]


def assert_as_defined(block: nn.Module, x: Tensor) -> None:
    """Result and gradients of the plan equal those of the definition."""
    results = []
    for backend in ("auto", "eager"):
        one, leaf = copy.deepcopy(block), x.clone().requires_grad_()
        with yf.backend(backend):
            y = one(leaf)
            y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(parameter.grad for parameter in one.parameters())])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(block(x), results[0][0], rtol=1e-3, atol=1e-4)


def test_a_block_is_planned_once(device: str) -> None:
    block = make().to(device)
    block(image().to(device))
    plan = plan_of(block)
    assert not called(block)
    for size in ((1, 12, 4, 4), (3, 12, 5, 5)):
        block(torch.randn(size, device=device).contiguous(memory_format=torch.channels_last))
    with torch.autocast(device, torch.bfloat16):
        assert block(image().to(device)).dtype == torch.bfloat16
    assert block.double()(image().to(device).double()).dtype == torch.float64
    assert plan_of(block) is plan, "shapes, memory formats and dtypes are read at each run"


REGISTRATIONS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("target", CHILDREN)
@pytest.mark.parametrize("registration", REGISTRATIONS)
def test_a_hook_fires_from_the_next_call_on_until_it_is_removed(target: str, registration: str, device: str) -> None:
    block, x, seen = make().to(device), image().to(device).requires_grad_(), []
    for module in block.modules():
        if isinstance(module, nn.SiLU):
            module.inplace = False  # torch refuses backward hooks next to operations in place
    expected = block(x)
    handle = getattr(block.get_submodule(target), registration)(lambda _, *values: seen.append(values))
    with yf.backend("eager"):
        block(x).sum().backward()
    definition = seen.copy()
    seen.clear()
    y = block(x)
    y.sum().backward()
    assert len(seen) == len(definition) == 1
    torch.testing.assert_close(seen, definition, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
    assert called(block) or target in ("cv1.conv", "cv3.1.act", "cv2.0.cv2.bn", "cv2.0.m.0.cv1.conv2.conv")
    handle.remove()
    assert torch.equal(block(x), expected)
    assert len(seen) == 1
    assert not called(block)


def test_a_forward_hook_that_changes_the_result_is_obeyed(device: str) -> None:
    block, x = make().to(device), image().to(device)
    block(x)
    block.get_submodule("cv2.0.m.0.cv2.bn").register_forward_hook(lambda _, __, result: 2 * result)
    assert_as_defined(block, x)


def test_hooks_of_all_modules_see_every_call(device: str) -> None:
    block, x, seen = make().to(device), image().to(device), []
    expected = block(x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        y = block(x)
    finally:
        handle.remove()
    assert set(seen) == set(block.modules())
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(block(x), expected)


def test_a_replaced_child_runs() -> None:
    block, x = make(), image()
    block(x)
    for path, child in {"cv2.0.m.0": RepBottleneck(4, 4), "cv4.bn": nn.BatchNorm2d(20), "cv3.1": Conv(8, 8, 1)}.items():
        block.set_submodule(path, child)
        assert_as_defined(block, x)
        assert not called(block)
    block.set_submodule("cv4.act", nn.ReLU())
    assert_as_defined(block, x)
    assert called(block) == [block.cv4]


@pytest.mark.parametrize("kind", [CSPELAN, ELAN, SPPELAN, ADown, MPDown, SPPCSPC])
def test_a_wrapped_child_runs(kind: Callable[..., nn.Module]) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x).sin()
            return y

    arguments = {CSPELAN: (12, 20, 16, 8), ELAN: (12, 20, 16, 8), SPPELAN: (12, 20, 6)}.get(kind, (12, 20))
    block, x = make(kind, *arguments).double(), image()[..., :8, :6].double()
    block(x)
    for name, child in [*block.named_children()]:
        for wrapper in (nn.Sequential, Wrapped):
            setattr(block, name, wrapper(child))
            assert_as_defined(block, x)
        setattr(block, name, child)
    assert_as_defined(block, x)


def test_a_forward_set_on_an_instance_runs(device: str) -> None:
    block, x = make().to(device), image().to(device)
    expected = block(x)
    for path in ("cv4", "cv4.conv", "cv2", "cv2.0", "cv3.0.m.0.cv1"):
        module = block.get_submodule(path)
        original = module.forward
        module.forward = lambda x, original=original: original(x) / 2
        assert not torch.equal(block(x), expected)
        assert_as_defined(block, x)
        del module.forward
        assert torch.equal(block(x), expected)


class Doubling(Conv):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoublingRep(RepConv):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_the_forward_of_a_subclass_runs() -> None:
    block, x = make(), image()
    children = {
        "cv4": Doubling(32, 20),
        "cv2.1": Doubling(8, 8, 3),
        "cv3.0.m.0.cv1": DoublingRep(4, 4),
    }
    for path, child in children.items():
        block.set_submodule(path, child)
        assert_as_defined(block, x)
    assert set(called(block)) == set(children.values())
    bottleneck = make(RepBottleneck, 12, 12)
    bottleneck.cv1.conv2 = Doubling(12, 12, 1, activation=False)
    assert_as_defined(bottleneck, x)


def test_new_weights_are_used(device: str) -> None:
    block, x = make().to(device), image().to(device)
    block(x)
    unit = block.get_submodule("cv2.1")
    with torch.no_grad():
        unit.conv.weight.mul_(2)
    assert_as_defined(block, x)
    unit.conv.weight.data = torch.randn_like(unit.conv.weight)
    assert_as_defined(block, x)
    unit.bn.weight = nn.Parameter(torch.rand(8, device=device))
    unit.conv.bias = nn.Parameter(torch.rand(8, device=device))
    assert_as_defined(block, x)
    state = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in block.state_dict().items()}
    block.load_state_dict(state, assign=True)
    assert_as_defined(block, x)
    block.get_submodule("cv2.0.cv1.conv").bias = nn.Parameter(
        torch.rand(4, device=device)
    )  # no longer read together with cv2
    assert_as_defined(block, x)


def test_weights_that_are_no_parameters_are_used(device: str) -> None:
    """As in the replicas of DataParallel, whose weights are plain attributes."""
    block, x = make().to(device), image().to(device)
    expected = block(x)
    for module in block.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            delattr(module, name)
            if type(module) is nn.Conv2d and name == "weight":
                delattr(module, "bias")
                module.bias = None
            setattr(module, name, parameter.detach())
    assert torch.equal(block(x), expected)


def test_a_replica_runs_its_own_children(device: str) -> None:
    block, x = make(Conv, 12, 20).to(device), image().to(device)
    expected = block(x)
    replica = block._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(module) for name, module in block._modules.items()}
    nn.init.zeros_(block.conv.weight)
    assert torch.equal(replica(x), expected)


def test_parametrised_and_normalised_weights_are_used() -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    block, x = make(), image()
    block(x)
    conv = block.get_submodule("cv2.1.conv")
    parametrize.register_parametrization(conv, "weight", Half())
    assert_as_defined(block, x)
    parametrize.remove_parametrizations(conv, "weight")
    assert_as_defined(block, x)
    assert not called(block)
    nn.utils.spectral_norm(conv)
    assert_as_defined(block, x)


def test_modes_are_read_at_each_call(device: str) -> None:
    block, x = make().to(device), image().to(device)
    block(x)
    plan = plan_of(block)
    block.eval()
    assert_as_defined(block, x)
    block.train()
    for path in ("cv2.0.m.0.cv1.conv1.bn", "cv4.bn", "cv1"):  # one branch of a RepConv frozen, then others
        block.get_submodule(path).eval()
        assert_as_defined(block, x)
    assert plan_of(block) is plan
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    assert not block(x).requires_grad


def test_attributes_are_read_again(device: str) -> None:
    x = image().to(device)
    unit = make(Conv, 12, 20).to(device)
    unit(x)
    unit.conv.stride = (2, 2)
    assert_as_defined(unit, x)
    unit.conv.padding_mode = "circular"
    assert_as_defined(unit, x)
    bottleneck = make(RepBottleneck, 12, 12).to(device)
    bottleneck(x)
    bottleneck.residual = False
    assert_as_defined(bottleneck, x)
    for name, value in {"eps": 0.5, "momentum": None, "track_running_stats": False}.items():
        setattr(bottleneck.cv1.conv1.bn, name, value)
        assert_as_defined(bottleneck, x)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_those_of_batch_norm(momentum: float | None, device: str) -> None:
    states = []
    for backend in ("auto", "eager"):
        block = make().to(device)
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        with yf.backend(backend):
            for number in range(3):
                block(image().to(device) + number)
        states.append(dict(block.named_buffers()))
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)


def test_folding_and_synchronised_norms_make_new_plans(device: str) -> None:
    model = create_model("gelan-t", 3).to(device).train()
    x = torch.rand(1, 3, 64, 64, device=device)
    model(x)
    block = next(module for module in model.modules() if isinstance(module, CSPELAN))
    plan = plan_of(block)
    convert_sync_batch_norm(model)
    model(x)
    assert plan_of(block) is not plan
    assert not called(block)
    model.eval()
    expected = model(x)
    folded = fuse(model)
    torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad(), yf.backend(OPERATOR.first(torch.device(device)), op="bn_silu"):
        torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-3)


def test_backends_are_switched_without_a_new_plan(device: str) -> None:
    block, x = make().to(device), image().to(device)
    expected = block(x)
    plan = plan_of(block)
    with yf.backend("eager"):
        seen: list[Tensor] = []
        handle = block.cv4.register_forward_hook(lambda *values: seen.append(values[-1]))
        block(x)
        handle.remove()
        assert len(seen) == 1
    with yf.backend("eager", op="bn_silu"):
        vars(block).pop(PLAN)
        block(x)
        assert PLAN not in vars(block)
    vars(block)[PLAN] = plan
    assert torch.equal(block(x), expected)
    assert plan_of(block) is plan


@pytest.mark.parametrize(("how", "foreign"), [("deepcopy", False), ("deepcopy", True), ("pickle", False)])
def test_copies_have_their_own_plans(how: str, foreign: bool, device: str) -> None:
    block = make(official_shaped.RepNCSPELAN4 if foreign else CSPELAN).to(device)
    if foreign:
        yf.accelerate(block)
    x = image().to(device)
    expected = block(x)
    other = copy.deepcopy(block) if how == "deepcopy" else pickle.loads(pickle.dumps(block))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    assert torch.equal(other(x), expected)
    assert plan_of(other) is not plan_of(block)
    assert not set(plan_of(other).modules) & set(plan_of(block).modules)


def test_a_plan_does_not_show() -> None:
    block = make()
    before = (list(block.state_dict()), [*block.named_modules()], repr(block), [*block.named_parameters()])
    block(image())
    assert (list(block.state_dict()), [*block.named_modules()], repr(block), [*block.named_parameters()]) == before


def test_restore_removes_plans() -> None:
    block = make(official_shaped.RepNCSPELAN4)
    yf.accelerate(block)
    block(image())
    assert PLAN in vars(block)
    yf.restore(block)
    assert all(PLAN not in vars(module) for module in block.modules())


def test_a_plan_does_not_keep_its_block_alive() -> None:
    block = make()
    block(image())
    reference = weakref.ref(block)
    gc.disable()
    try:
        del block
        assert reference() is None, "without the garbage collector, so that GPU memory is free at once"
    finally:
        gc.enable()


def test_a_foreign_block_without_accelerated_children_calls_them() -> None:
    block, x = make(official_shaped.RepNCSPELAN4), image()

    class Tripling(official_shaped.Conv):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    block.cv4 = Tripling(32, 20)
    expected = copy.deepcopy(block)(x)
    yf.accelerate(block)
    torch.testing.assert_close(block(x), expected, rtol=1e-3, atol=1e-4)
    assert called(block) == [block.cv4]


def test_a_folded_unit_that_keeps_its_norm_does_not_run_it() -> None:
    block, x = make(official_shaped.RepNCSPELAN4), image()
    block.cv4.forward = block.cv4.forward_fuse
    expected = copy.deepcopy(block)(x)
    yf.accelerate(block)
    torch.testing.assert_close(block(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_blocks_compile_in_one_graph(backend: str) -> None:
    block, x = make(), image()
    with yf.backend("eager"):
        expected = copy.deepcopy(block)(x)
    with yf.backend(backend, op="bn_silu"):
        block(x)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-4)
        block.eval()
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-3, atol=1e-4)
