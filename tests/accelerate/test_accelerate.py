"""`accelerate` on models in the structures of other code: the same results, the same model, undoable."""

from __future__ import annotations

import copy
import importlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import yolov9_fast as yf
from tests.accelerate import mit_shaped, official_shaped, ultralytics_shaped
from yolov9_fast._accelerate.model import accelerated_kind
from yolov9_fast.ops._bn_silu import OPERATOR as BN_SILU

FAMILIES = {
    "official": official_shaped.DetectionModel,
    "ultralytics": ultralytics_shaped.DetectionModel,
    "mit": mit_shaped.YOLO,
}
family = pytest.mark.parametrize("name", FAMILIES)
LAYOUTS = [torch.channels_last, torch.contiguous_format]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # away from the values that hide an omission
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def image(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 64, 48, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after one training step without the step."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    maps = model.train()(x)
    torch.stack([m.square().mean() for m in maps]).sum().backward()
    result = {f"map {i}": m.detach() for i, m in enumerate(maps)}
    result["image.grad"] = x.grad
    result |= {f"{key}.grad": p.grad for key, p in model.named_parameters() if p.grad is not None}
    return result | {key: b.clone() for key, b in model.named_buffers()}


def assert_as_exact(fast: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """No entry is missing; by the median over all entries at most twice as far from float64's as eager's.

    Not entry by entry: where rounding lets a max pool choose another pixel, single gradients jump, in either form.
    """
    assert fast.keys() == eager.keys() == exact.keys()
    errors = []
    for key, true in exact.items():
        norm = true.double().norm().item() + 1e-12
        error, own = ((result[key].double() - true.double()).norm().item() / norm for result in (fast, eager))
        assert error < 0.05, f"{key}: {error:.3g} against eager's {own:.3g}"
        errors.append((error, own))
    error, own = torch.tensor(errors).median(0).values.tolist()
    assert error <= 2 * own + 1e-7, f"{error:.3g} against eager's {own:.3g}"


@family
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_training_step_is_as_exact_as_the_models_own(name: str, layout: torch.memory_format, device: str) -> None:
    eager, exact = (
        step(build(name).to(device).to(memory_format=layout), image().to(device)),
        step(build(name).to(device).double(), image().to(device).double()),
    )
    model = build(name).to(device)
    yf.accelerate(model, memory_format=layout)
    assert_as_exact(step(model, image().to(device)), eager, exact)


@family
def test_evaluation_and_inference_agree(name: str, device: str) -> None:
    model = build(name).to(device).eval()
    expected = model(image().to(device))
    yf.accelerate(model)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context(), yf.backend(BN_SILU.first(torch.device(device)), op="bn_silu"):
            for fast, own in zip(model(image().to(device)), expected, strict=True):
                torch.testing.assert_close(fast, own, rtol=1e-4, atol=1e-5)


@family
def test_the_report_names_every_block(name: str) -> None:
    model = build(name)
    report = yf.accelerate(model)
    counts = report.counts()
    # 2 stages × depth 2 in the one CSP-ELAN.
    assert counts["elan"] == 2
    assert counts["csp"] == 2
    assert counts["rep_conv"] == 4
    assert counts["bottleneck"] == 4
    assert counts["spp_elan"] == counts["a_down"] == counts["a_conv"] == 1
    assert counts.get("cb_fuse", 0) == (0 if name == "ultralytics" else 1)
    assert counts["conv"] == sum(type(module).__name__ == "Conv" for module in model.modules())
    assert not report.skipped
    assert "2 elan" in str(report)


@family
def test_state_dict_is_unchanged_and_restore_brings_the_model_back(name: str, device: str) -> None:
    model = build(name).to(device)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outputs = step(build(name).to(device), image().to(device))
    yf.accelerate(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert yf.restore(model) > 0
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    again = step(model, image().to(device))
    assert all(torch.equal(again[key], value) for key, value in outputs.items())
    assert yf.restore(model) == 0


def test_accelerating_twice_changes_nothing_more() -> None:
    model = build("official")
    first, second = yf.accelerate(model), yf.accelerate(model)
    assert first == second
    yf.restore(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("folded", [False, True])
def test_a_deep_copy_is_accelerated_with_its_own_parameters(folded: bool, device: str) -> None:
    model = build("official").to(device).eval()
    if folded:
        model.fuse()
    yf.accelerate(model)
    other = copy.deepcopy(model)
    for a, b in zip(model.modules(), other.modules(), strict=True):
        assert type(a) is type(b)
    expected = model(image().to(device))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for fast, own in zip(other(image().to(device)), expected, strict=True):
        assert torch.equal(fast, own)
    yf.restore(other)
    assert accelerated_kind(model.model[0]) is not None
    assert accelerated_kind(other.model[0]) is None


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy, torch.save"])
@pytest.mark.parametrize("folded", [False, True])
def test_a_pickled_model_is_the_plain_one_and_can_be_folded(how: str, folded: bool) -> None:
    model = build("official").eval()
    if folded:
        model.fuse()
    plain = model(image())
    yf.accelerate(model)
    model(image().requires_grad_())
    file = io.BytesIO()
    if how == "pickle":
        file.write(pickle.dumps(model))
    else:
        torch.save(copy.deepcopy(model).half().float() if how.startswith("deepcopy") else model, file)
    assert b"yolov9_fast" not in file.getvalue()
    file.seek(0)
    other = pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)
    tolerance = 1e-2 if how.startswith("deepcopy") else 1e-4
    for changed in (lambda: other, other.fuse):
        for fast, own in zip(changed()(image()), plain, strict=True):
            torch.testing.assert_close(fast, own, rtol=tolerance, atol=tolerance)
    assert type(other.model[0]) is official_shaped.Conv
    assert yf.accelerate(other).counts()["elan"] == 2


def test_a_module_that_refers_to_its_parent_is_copied_once() -> None:
    model = build("official")
    yf.accelerate(model)
    model.model[3].cv2.parent = [model.model[3]]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.model[3].cv2.parent[0] is other.model[3]


@family
def test_parameters_are_left_alone(name: str, device: str) -> None:
    model = build(name).to(device)
    before = [(id(parameter), parameter.stride()) for parameter in model.parameters()]
    yf.accelerate(model)
    step(model, image().to(device))
    assert [(id(parameter), parameter.stride()) for parameter in model.parameters()] == before
    assert all(parameter.grad.stride() == parameter.stride() for parameter in model.parameters() if parameter.dim() > 1)


def test_convolutions_run_in_the_memory_format(device: str) -> None:
    model, seen = build("official").to(device), []
    yf.accelerate(model)
    model.get_submodule("model.3.cv4").register_forward_hook(lambda _, x, y: seen.extend((x[0], y)))
    model(image().to(device))
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in seen)
    assert not any(each.is_contiguous() for each in seen)


def test_an_ema_copy_follows(device: str) -> None:
    model = build("official").to(device)
    yf.accelerate(model)
    ema = copy.deepcopy(model).eval()
    step(model, image().to(device))
    with torch.no_grad():
        for average, current in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(current, 1.0)
    for fast, own in zip(ema(image().to(device)), model.eval()(image().to(device)), strict=True):
        torch.testing.assert_close(fast, own)


@pytest.mark.parametrize(
    "target",
    [
        "model.0",
        "model.0.bn",
        "model.3.cv2.0.m.1",
        "model.3.cv2.0.m.0.cv1",
        "model.3.cv2.0.m.1.cv2.conv",
        "model.3.cv3",
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_hooks_on_any_module_still_fire(target: str, backward: bool, device: str) -> None:
    model, calls = build("official").to(device), []
    plain = step(build("official").to(device), image().to(device))
    yf.accelerate(model)
    module = model.get_submodule(target)
    if backward:
        module.register_full_backward_hook(lambda *_: calls.append("backward"))
    else:
        module.register_forward_hook(lambda *_: calls.append("forward"))
    fast = step(model, image().to(device))
    assert len(calls) == 1
    for key, value in plain.items():
        torch.testing.assert_close(fast[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("order", ["fuse then accelerate", "accelerate then fuse", "accelerate then run then fuse"])
def test_the_models_own_fuse_works_before_and_after(order: str, device: str) -> None:
    model = build("official").to(device).eval()
    expected = model(image().to(device))
    for action in order.split(" then "):
        if action == "fuse":
            model.fuse()
        elif action == "run":
            model(image().to(device))
        else:
            report = yf.accelerate(model)
            assert report.counts()["elan"] == 2
    with torch.no_grad(), yf.backend("cpu", op="bn_silu"):
        for fast, own in zip(model(image().to(device)), expected, strict=True):
            torch.testing.assert_close(fast, own, rtol=1e-3, atol=1e-4)


def test_half_precision_models_run(device: str) -> None:
    model = build("official").to(device).to(torch.bfloat16)
    own = model(image().to(device).bfloat16())
    yf.accelerate(model)
    for fast, plain in zip(model(image().to(device).bfloat16()), own, strict=True):
        assert fast.dtype == torch.bfloat16
        torch.testing.assert_close(fast, plain, rtol=0.1, atol=0.1)


def test_autocast_keeps_dtypes_and_is_as_exact(device: str) -> None:
    def run(model: nn.Module, x: Tensor, enabled: bool = True) -> dict[str, Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            maps = model.train()(x)
        torch.stack([m.to(x.dtype).square().mean() for m in maps]).sum().backward()
        result = {f"map {i}": m.detach() for i, m in enumerate(maps)}
        return result | {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    exact = run(build("official").to(device).double(), image().to(device).double(), enabled=False)
    own = run(build("official").to(device).to(memory_format=torch.channels_last), image().to(device))
    model = build("official").to(device)
    yf.accelerate(model)
    fast = run(model, image().to(device))
    assert {key: value.dtype for key, value in fast.items()} == {key: value.dtype for key, value in own.items()}
    assert fast["map 0"].dtype == torch.bfloat16
    errors = [
        sum(((result[key].double() - true).norm() / (true.norm() + 1e-12)).item() for key, true in exact.items())
        for result in (fast, own)
    ]
    assert errors[0] <= 1.5 * errors[1]


def test_frozen_statistics_train_as_the_models_own(device: str) -> None:
    def freeze(model: nn.Module) -> nn.Module:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        model.train = lambda mode=True: model  # type: ignore[method-assign]
        return model

    own, exact = (
        step(freeze(build("official").to(device)), image().to(device)),
        step(freeze(build("official").to(device).double()), image().to(device).double()),
    )
    model = freeze(build("official").to(device))
    yf.accelerate(model)
    assert_as_exact(step(model, image().to(device)), own, exact)


@pytest.mark.parametrize("change", ["no momentum", "no affine", "no running statistics", "relu", "circular padding"])
def test_variants_are_computed_or_left_alone(change: str, device: str) -> None:
    def varied() -> nn.Module:
        model = build("official").to(device)
        unit = model.get_submodule("model.3.cv2.1")
        if change == "no momentum":
            unit.bn.momentum = None
        elif change == "no affine":
            unit.bn = nn.BatchNorm2d(unit.conv.out_channels, affine=False)
        elif change == "no running statistics":
            unit.bn = nn.BatchNorm2d(unit.conv.out_channels, track_running_stats=False)
        elif change == "relu":
            unit.act = nn.ReLU()
        else:
            unit.conv.padding_mode = "circular"
            unit.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
        return model

    own, exact = step(varied(), image().to(device)), step(varied().double(), image().to(device).double())
    model = varied()
    report = yf.accelerate(model)
    if change in ("relu", "circular padding"):
        assert "model.3.cv2.1" in report.skipped
        assert "model.3" in report.skipped
    assert_as_exact(step(model, image().to(device)), own, exact)


def test_unknown_classes_are_skipped_with_a_reason() -> None:
    class Odd(official_shaped.Conv):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.extra = nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.extra(self.act(self.conv(x)))

    report = yf.accelerate(nn.Sequential(Odd(3, 8), Conv()))
    assert not report.accelerated
    assert "class Odd is unknown" in report.skipped["0"]
    assert "unknown children extra" in report.skipped["1"]


def test_one_operator_can_be_chosen(device: str) -> None:
    report = yf.accelerate(build("official").to(device), ops=["rep_bn_silu"])
    assert report.counts() == {"rep_conv": 4}
    assert "left out by ops" in report.skipped["model.0"]
    with pytest.raises(ValueError, match=r"ops: expected 'all' or names among .*bn_silu.* got nonsense"):
        yf.accelerate(build("official").to(device), ops="nonsense")
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got int"):
        yf.accelerate(3)  # type: ignore[arg-type]


def test_the_eager_backend_runs_the_models_own_forward(device: str) -> None:
    plain = step(build("official").to(device), image().to(device))
    model = build("official").to(device)
    yf.accelerate(model, memory_format=None)
    with yf.backend("eager"):
        own = step(model, image().to(device))
    assert all(torch.equal(own[key], value) for key, value in plain.items())


def test_accelerate_is_the_function_whatever_was_imported_before() -> None:
    importlib.import_module("yolov9_fast._accelerate.loss")

    assert yf.accelerate(build("mit")).counts()["elan"] == 2


@pytest.mark.slow
def test_two_processes_under_ddp_and_synchronised_norms_equal_one() -> None:
    script = Path(__file__).parent / "two_processes.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 4


@pytest.mark.slow
def test_compiles_in_one_graph() -> None:
    model = build("official")
    expected = step(build("official"), image())
    yf.accelerate(model)
    compiled = torch.compile(model, fullgraph=True)
    maps = compiled.train()(image())
    for i, m in enumerate(maps):
        torch.testing.assert_close(m, expected[f"map {i}"], rtol=1e-3, atol=1e-4)
