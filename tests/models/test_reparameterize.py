"""Folding, unfolding and dropping the auxiliary branch keep what the network computes."""

from __future__ import annotations

import pytest
import torch

from yolov9_fast.models import calibrate_batch_norm, create_model, fuse, to_deploy, unfuse
from yolov9_fast.models.model import DetectionModel


def _lively(name: str, **options: int) -> DetectionModel:
    """A network whose BatchNorm is far from the identity."""
    torch.manual_seed(0)
    model = create_model(name, 3, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
            torch.nn.init.normal_(module.running_mean, 0, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["yolov9-t", "yolov9-s", "gelan-c"])
def test_fused_outputs_agree_in_float64(name: str) -> None:
    model = _lively(name).double()
    fused = fuse(model)
    assert fused.is_fused
    assert not model.is_fused
    with torch.no_grad():
        torch.testing.assert_close(fused(IMAGES.double()), model(IMAGES.double()), rtol=1e-9, atol=1e-9)


def test_fused_networks_have_convolutions_with_bias_only() -> None:
    keys = fuse(_lively("gelan-t")).state_dict()
    assert not [k for k in keys if ".bn." in k or ".conv1." in k]
    assert "model.4.cv2.0.m.0.cv1.conv.bias" in keys
    # The head's last convolutions are not units: they are named `2.weight`. The DFL weight is no convolution.
    convolutions = [k for k in keys if k.endswith((".conv.weight", ".2.weight")) and ".dfl." not in k]
    assert len(convolutions) == 185


@pytest.mark.parametrize("name", ["yolov9-t", "yolov9-c", "gelan-s"])
def test_deployed_outputs_are_the_main_branch(name: str) -> None:
    model = _lively(name)
    deployed = to_deploy(model)
    assert not deployed.has_auxiliary
    with torch.no_grad():
        assert torch.equal(deployed(IMAGES), model(IMAGES))
    assert deployed.names == model.names


def test_a_fused_training_graph_can_be_deployed() -> None:
    model = fuse(_lively("yolov9-t", class_tower=80, box_groups=1))
    deployed = to_deploy(model)
    assert deployed.is_fused
    assert deployed.class_tower == 80
    assert deployed.box_groups == 1
    with torch.no_grad():
        assert torch.equal(deployed(IMAGES), model(IMAGES))


def test_unfuse_gives_back_a_network_with_batch_norm_and_the_same_outputs() -> None:
    fused = fuse(_lively("gelan-t"))
    restored = unfuse(fused)
    assert set(restored.state_dict()) == set(create_model("gelan-t", 3).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            restored.double()(IMAGES.double()), fused.double()(IMAGES.double()), rtol=1e-6, atol=1e-5
        )


def test_unfused_networks_keep_their_function_in_training_once_calibrated() -> None:
    fused = fuse(_lively("gelan-t")).double()
    images = IMAGES.double()
    with torch.no_grad():
        target = fused.raw(images).main
        calibrated = unfuse(fused, [images]).train()(images).main
        uncalibrated = unfuse(fused).train()(images).main
    for wanted, kept, lost in zip(target, calibrated, uncalibrated, strict=True):
        torch.testing.assert_close(kept, wanted, rtol=1e-2, atol=1e-2)
        assert float((lost - wanted).abs().max()) > 10 * float((kept - wanted).abs().max())


def test_calibration_leaves_evaluation_outputs_alone_and_counts_images() -> None:
    model = _lively("gelan-t").double()
    with torch.no_grad():
        before = model(IMAGES.double())
        assert calibrate_batch_norm(model, [IMAGES.double(), IMAGES.double()]) == 4
        torch.testing.assert_close(model(IMAGES.double()), before, rtol=1e-8, atol=1e-8)


def test_calibration_can_be_kept_to_some_modules() -> None:
    model = _lively("gelan-t")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calibrate_batch_norm(model, [IMAGES], only=lambda name: name.startswith("model.0."))
    changed = {k.split(".")[1] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0"}


def test_the_argument_is_left_as_it_was() -> None:
    model = _lively("yolov9-t").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for change in (fuse, to_deploy, unfuse):
        change(model)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
