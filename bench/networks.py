"""Whole networks: the training step in its phases, inference end to end, blocks, and where the time goes."""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import yolov9_fast as yf
from yolov9_fast.data.rendered import render_dataset
from yolov9_fast.engine.ema import ModelEMA
from yolov9_fast.engine.flat import FlatStorage
from yolov9_fast.engine.loss_scale import LossScale
from yolov9_fast.engine.optimizer import build_optimizer
from yolov9_fast.losses import DetectionLoss
from yolov9_fast.losses.targets import PaddedTargets, pad_targets
from yolov9_fast.models import DetectionModel, create_model, fuse, to_deploy
from yolov9_fast.nn import DetectionOutput
from yolov9_fast.nn.blocks import BN_MOMENTUM
from yolov9_fast.ops import nms
from yolov9_fast.ops._backend import backend

from .cases import LAYOUTS, Absent, Case, Clock, NoClock, OpenCase, Runner, Settings, named, torch_dtype
from .compiled import MODES
from .detection import CLASSES, random_boxes
from .peers import inference_peers

OBJECTS_PER_IMAGE = 7
CANDIDATES_PER_IMAGE = 1000
_CONF = 0.001
_LOGIT_SPREAD = 1.5
_MOST_GFLOPS_ON_A_CPU = 400
_CALIBRATION_IMAGES = 8
CHECKED_ON_A_GPU = 2
"""Images of a batch on which results are checked there: on most GPUs float64 is 64 times slower than float32."""


def same_weights(name: str, device: torch.device, **options: Any) -> DetectionModel:
    """A network whose weights depend on its name alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model(name, CLASSES, **options).to(device)


Batches = Callable[[], tuple[Tensor, Tensor | PaddedTargets]]
"""Gives images and targets of the next step."""


# Training step --------------------------------------------------------------------------------------------------------


class TrainingStep:
    """One optimiser step on a fixed batch, as the trainer makes it: forward, loss, backward, clip, optimiser, EMA.

    The learning rate is so small that weights, and with them the work, stay what they are over many steps. `checked`:
    the first images of the batch that `results` uses; default all.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        batch: int,
        device: torch.device,
        *,
        dtype: str = "float32",
        layout: str = "nchw",
        backend_name: str = "eager",
        compile_mode: str | None = None,
        batches: Batches | None = None,
        checked: int | None = None,
    ) -> None:
        self.device, self.size, self.layout, self.backend_name = device, image_size, layout, backend_name
        self.amp = torch_dtype(dtype) if dtype in ("bfloat16", "float16") else None
        self.model = same_weights(name, device).train()
        if dtype == "float64":
            self.model.double()
        nn.Module.to(self.model, memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
        if backend_name == "auto":
            yf.accelerate(self.model)
        self.network: Callable[..., Any] = self.model
        if compile_mode is not None:
            mode = None if compile_mode == "default" else compile_mode
            self.network = torch.compile(self.model, mode=mode, dynamic=False)
        self.criterion = DetectionLoss(CLASSES)
        self.optimizer = build_optimizer(self.model, "sgd", lr=1e-9, momentum=0.9, weight_decay=0.0)
        self.ema = ModelEMA(self.model)
        self.scale = LossScale(device, enabled=False)
        # Ours in the form of the trainer, the others in that of plain PyTorch.
        self.flat = FlatStorage(self.model, self.ema, self.optimizer) if backend_name == "auto" else None
        self.updates = 0
        self.batches = batches
        self.images, self.targets = fixed_batch(image_size, batch)
        self.checked = batch if checked is None else checked

    def __call__(self, clock: Clock) -> Tensor:
        total = self.forward(clock)
        with backend(self.backend_name):
            torch.autograd.backward(total)
            if self.flat is not None:
                self.flat.collect()
            clock.mark("backward")
            if self.flat is not None:
                self.flat.write_rates()
                self.flat.update(clip=10.0, scale=self.scale, processes=1)
                clock.mark("optimiser")
                clock.mark("ema")  # which is part of the optimiser's pass
            else:
                nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                clock.mark("optimiser")
                self.updates += 1
                average_in(self.ema.model, self.model, self.updates)
                clock.mark("ema")
        return total.detach()

    def forward(self, clock: Clock) -> Tensor:
        """Up to the loss, with what the backward needs."""
        with backend(self.backend_name):
            images, targets = self.batches() if self.batches else (self.images, self.targets)
            images = images.to(self.device, non_blocking=True)
            images = (images.double() if self._double() else images.float()).div_(255)
            images = images.contiguous(memory_format=LAYOUTS[self.layout])
            if isinstance(targets, Tensor):
                targets = targets.to(self.device, non_blocking=True)
            clock.mark("data")
            with self._autocast():
                output = self.network(images)
            clock.mark("forward")
            loss = self.criterion(output, targets, self.size)
            clock.mark("loss")
            total: Tensor = loss.total
            return total

    def results(self) -> dict[str, Tensor]:
        """Head maps, loss and all gradients of the first step, from a copy, so that weights stay as they are."""
        images = self.images[: self.checked].to(self.device)
        images = (images.double() if self._double() else images.float()).div_(255)
        images = images.contiguous(memory_format=LAYOUTS[self.layout])
        targets = self.targets[self.targets[:, 0] < self.checked].to(self.device)
        kept = {name: value.clone() for name, value in self.model.state_dict().items()}
        with backend(self.backend_name):
            with self._autocast():
                output: DetectionOutput = self.network(images)
            loss = self.criterion(output, targets, self.size)
            torch.autograd.backward(loss.total)
        gradients = [p.grad.reshape(-1).double() for p in self.model.parameters() if p.grad is not None]
        found = named("map", [one.detach().cpu() for one in [*output.main, *(output.auxiliary or [])]])
        found["loss"] = loss.total.detach().cpu()
        found["gradient"] = torch.cat(gradients).cpu()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.load_state_dict(kept)
        return found

    def _double(self) -> bool:
        return next(self.model.parameters()).dtype == torch.float64

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()


@torch.no_grad()
def average_in(average: nn.Module, model: nn.Module, updates: int) -> None:
    """The moving average in plain PyTorch: weights and running statistics are averaged, counts are copied."""
    averages, values = ([*one.state_dict(keep_vars=True).values()] for one in (average, model))
    pairs = [*zip(averages, values, strict=True)]
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    weight = 1 - 0.9999 * (1 - math.exp(-updates / 2000))
    torch._foreach_lerp_([own for own, _ in floating], [value for _, value in floating], weight)
    counts = [pair for pair in pairs if not pair[0].is_floating_point()]
    torch._foreach_copy_([own for own, _ in counts], [value for _, value in counts])


def fixed_batch(image_size: int, batch: int) -> tuple[Tensor, Tensor]:
    """uint8 images [B, 3, H, W] of smooth noise and target rows [n, 6], OBJECTS_PER_IMAGE in each image."""
    images = torch.stack([_picture(number, image_size) for number in range(batch)])
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(batch * OBJECTS_PER_IMAGE, image_size) / image_size
    centre, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    labels = torch.randint(CLASSES, (len(boxes), 1), generator=generator)
    image = torch.arange(batch).repeat_interleave(OBJECTS_PER_IMAGE)[:, None]
    return images, torch.cat((image, labels, centre, sides), 1)


def resident_batch(image_size: int, batch: int, device: torch.device) -> Batches:
    """The fixed batch as the trainer has it on a GPU: images in page-locked memory, targets padded by the host.

    Rows that lie on the GPU would be padded there, and the host would wait for it.
    """

    @functools.cache
    def made() -> tuple[Tensor, PaddedTargets]:
        images, rows = fixed_batch(image_size, batch)
        padded = pad_targets(rows, batch, CLASSES, (image_size, image_size), torch.float32)
        return images.pin_memory(), padded.to(device, torch.float32)

    return made


def _picture(number: int, size: int) -> Tensor:
    """The picture of this number, whatever batch it is part of: uint8 [3, H, W]."""
    generator = torch.Generator().manual_seed(number)
    coarse = torch.rand(1, 3, 16, 16, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)[0]
    return smooth.add(torch.rand(smooth.shape, generator=generator) * 0.2).div(1.2).mul(255).to(torch.uint8)


def step_cases(settings: Settings, dtypes: tuple[str, ...], device: torch.device) -> Iterator[Case]:
    if device.type == "cuda":
        plan = [("yolov9-t", 640, 32), ("yolov9-c", 640, 16)] if settings.full else [("yolov9-t", 640, 32)]
    elif settings.full:
        plan = [("yolov9-t", 320, 8), ("yolov9-c", 320, 2), ("yolov9-t", 640, 2), ("yolov9-s", 320, 4)]
    else:
        plan = [("yolov9-t", 320, 4)]
    for place, (name, size, batch) in enumerate(plan):
        for turn, dtype in enumerate(dtypes):
            yield Case(
                f"step/{name}/{size}px/b{batch}/{dtype}",
                "step",
                "training step",
                f"{name}@{size}",
                "step",
                dtype,
                {"image_size": size, "batch": batch, "objects": OBJECTS_PER_IMAGE},
                _step_opener(name, size, batch, dtype),
                priority=place + turn * len(plan),  # each network in the first dtype before the others
            )


def _step_opener(name: str, size: int, batch: int, dtype: str) -> Callable[[torch.device, Settings], OpenCase]:
    def open_case(device: torch.device, settings: Settings) -> OpenCase:
        # In training on a GPU other processes load; here the same process would, and its time would hide the step's.
        on_gpu = device.type == "cuda"
        data, why = (resident_batch(size, batch, device), "") if on_gpu else _loader_batches(size, batch)
        checked = min(batch, CHECKED_ON_A_GPU) if device.type == "cuda" else batch

        def make(provider: str, layout: str, **options: Any) -> Runner:
            options |= {"dtype": dtype, "layout": layout, "batches": data, "checked": checked}
            step = TrainingStep(name, size, batch, device, **options)
            return Runner(provider, layout, step, step.results, note=why)

        def runners() -> Iterator[Runner | Absent]:
            yield make("eager", "nchw")
            yield make("eager", "channels_last")
            yield make("auto", "channels_last", backend_name="auto")
            for mode in MODES[settings.compile][:1]:
                yield make("compile", "channels_last", compile_mode=mode)

        def reference() -> dict[str, Tensor]:
            return TrainingStep(name, size, batch, device, dtype="float64", checked=checked).results()

        # A float64 pass over a large network on a small CPU takes longer than the measurement itself.
        affordable = size * size * checked <= 320 * 320 * 8
        return OpenCase(runners(), reference if affordable else None, "network", items=batch)

    return open_case


def _loader_batches(size: int, batch: int) -> tuple[_Loader | None, str]:
    """Batches of the real loader on rendered pictures with the published augmentation; else none, and why."""
    try:
        loader = _Loader(size, batch)
    except Exception as error:  # OpenCV may be missing or broken; the step can be measured without
        return None, f"without the data loader ({type(error).__name__}: {error})"
    return loader, ""


class _Loader:
    """An endless loader in this process over 32 rendered pictures kept in memory."""

    def __init__(self, size: int, batch: int, workers: int = 0) -> None:
        from yolov9_fast.data import AugmentConfig, DetectionDataset, create_loader, load_data_config, load_split

        self._folder = tempfile.TemporaryDirectory(prefix="yolov9-fast-bench-")
        data = load_data_config(render_dataset(Path(self._folder.name), train=32, val=1, size=size))
        records, _ = load_split(data, "train", for_training=True)
        dataset = DetectionDataset(records, image_size=size, augment=AugmentConfig(), cache="ram", seed=0)
        self._loader = create_loader(dataset, batch_size=batch, workers=workers, shuffle=True, drop_last=True)
        self._epoch = 0
        self._batches = iter(self._loader)

    def __call__(self) -> tuple[Tensor, Tensor]:
        try:
            batch = next(self._batches)
        except StopIteration:
            self._epoch += 1
            self._loader.set_epoch(self._epoch)
            self._batches = iter(self._loader)
            batch = next(self._batches)
        return batch.images, batch.targets


def data_cases(settings: Settings) -> Iterator[Case]:
    for size, batch in ((640, 8), (320, 8)) if settings.full else ((320, 8),):
        yield Case(
            f"data/{size}px/b{batch}",
            "data",
            "data loader",
            f"any@{size}",
            "forward",
            "uint8",
            {"image_size": size, "batch": batch, "workers": 0},
            _data_opener(size, batch),
        )


def _data_opener(size: int, batch: int) -> Callable[[torch.device, Settings], OpenCase]:
    def open_case(device: torch.device, settings: Settings) -> OpenCase:
        loader, why = _loader_batches(size, batch)
        if loader is None:
            return OpenCase(iter([Absent("loader", "", why)]), None, "none")
        runner = Runner("loader", "", lambda clock: loader(), dict, note="mosaic and published augmentation, 1 process")
        return OpenCase(iter([runner]), None, "none", items=batch)

    return open_case


# Inference ------------------------------------------------------------------------------------------------------------


class Inference:
    """From uint8 images to detections: the deployed, fused network, decoding and NMS with about 1000 candidates.

    `checked`: the first images that `results` uses; default all.
    """

    def __init__(
        self,
        name: str,
        images: Tensor,
        device: torch.device,
        dtype: str,
        layout: str,
        backend_name: str,
        checked: int | None = None,
    ) -> None:
        self.checked = len(images) if checked is None else checked
        self.device, self.layout, self.backend_name = device, layout, backend_name
        self.amp = torch_dtype(dtype) if dtype in ("bfloat16", "float16") else None
        self.images = images.to(device)
        self.model = inference_model(name).to(device)
        if dtype == "float64":
            self.model.double()
        nn.Module.to(self.model, memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
        if backend_name == "auto":
            yf.accelerate(self.model)
        self.network: Callable[..., Any] = self.model

    @torch.inference_mode()
    def predict(self, clock: Clock, number: int | None = None) -> Tensor:
        """The network's output for the first `number` images, by default for all."""
        with backend(self.backend_name):
            wide = next(self.model.parameters()).dtype
            images = self.images[:number].to(wide).div_(255).contiguous(memory_format=LAYOUTS[self.layout])
            clock.mark("data")
            with torch.autocast(self.device.type, self.amp) if self.amp else nullcontext():
                prediction: Tensor = self.network(images)
            clock.mark("network")
            return prediction

    def __call__(self, clock: Clock) -> Any:
        prediction = self.predict(clock)
        with torch.inference_mode(), backend(self.backend_name):
            found = nms(prediction, conf=_CONF)
        clock.mark("nms")
        return found

    def results(self) -> dict[str, Tensor]:
        return {"output": self.predict(NoClock(), self.checked).cpu()}


_CACHE: dict[str, DetectionModel] = {}


def inference_model(name: str) -> DetectionModel:
    """The deployed, fused network of `name`, its class biases set so that each image has about 1000 candidates.

    Fresh weights would find next to nothing, and NMS would cost nothing.
    """
    if name not in _CACHE:
        _CACHE.clear()
        model = to_deploy(same_weights(name, torch.device("cpu")))
        images = fixed_batch(320, _CALIBRATION_IMAGES)[0].float().div(255)
        with torch.no_grad(), backend("eager"):
            _calibrate(model, images)
            model = fuse(model)
            logits = torch.cat([one[:, 64:].flatten() for one in model.raw(images).main])
            gain = _LOGIT_SPREAD / logits.std()
            best = (logits * gain).topk(CANDIDATES_PER_IMAGE * _CALIBRATION_IMAGES).values[-1]
            for tower in model.head.cv3:  # type: ignore[union-attr]
                tower[-1].weight *= gain
                tower[-1].bias.mul_(gain).add_(torch.logit(torch.tensor(_CONF)) - best)
        _CACHE[name] = model.eval()
    return copy.deepcopy(_CACHE[name])


def _calibrate(model: DetectionModel, images: Tensor) -> None:
    """Set the running statistics by these images; with fresh ones all logits of a map would be nearly equal."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train().raw(images)
    for norm in norms:
        norm.momentum = BN_MOMENTUM
    model.eval()


def infer_cases(settings: Settings, dtypes: tuple[str, ...], device: torch.device) -> Iterator[Case]:
    networks = ("yolov9-t", "yolov9-c") if settings.full else ("yolov9-t",)
    sizes = (320, 640) if settings.full else (640 if device.type == "cuda" else 320,)
    for name in networks:
        for size in sizes:
            for batch in (1, 8, 32) if settings.full else (1, 8):
                for dtype in dtypes:
                    yield Case(
                        f"infer/{name}/{size}px/b{batch}/{dtype}",
                        "infer",
                        "inference",
                        f"{name}@{size}",
                        "forward",
                        dtype,
                        {"image_size": size, "batch": batch, "deployed": name.replace("yolov9", "gelan")},
                        _infer_opener(name, size, batch, dtype),
                        priority=(size > 320) + 2 * (name != "yolov9-t") + (batch > 8),
                    )


def _infer_opener(name: str, size: int, batch: int, dtype: str) -> Callable[[torch.device, Settings], OpenCase]:
    def open_case(device: torch.device, settings: Settings) -> OpenCase:
        # GFLOPs of the deployed networks at 640 px, roughly: what takes many seconds a call is left to GPUs.
        work = (10 if name == "yolov9-t" else 100) * (size / 640) ** 2 * batch
        if device.type == "cpu" and work > _MOST_GFLOPS_ON_A_CPU:
            reason = f"about {work:.0f} GFLOPs a call: left to GPUs"
            return OpenCase(iter([Absent("all", "", reason)]), None, "none")
        images, _ = fixed_batch(size, batch)
        checked = min(batch, CHECKED_ON_A_GPU) if device.type == "cuda" else batch

        def make(provider: str, layout: str, backend_name: str) -> Runner:
            one = Inference(name, images, device, dtype, layout, backend_name, checked)
            return Runner(provider, layout, one, one.results)

        def runners() -> Iterator[Runner | Absent]:
            yield make("eager", "nchw", "eager")
            yield make("eager", "channels_last", "eager")
            yield make("auto", "channels_last", "auto")
            for mode in MODES[settings.compile][:1]:
                one = Inference(name, images, device, dtype, "channels_last", "eager", checked)
                one.network = torch.compile(one.model, mode=None if mode == "default" else mode, dynamic=False)
                yield Runner("compile", "channels_last", one, one.results)

        heavy = device.type == "cpu" and size * size * batch > 640 * 640 * (1 if name != "yolov9-t" else 8)

        def reference() -> dict[str, Tensor]:
            return Inference(name, images, device, "float64", "nchw", "eager", checked).results()

        opened = OpenCase(runners(), None if heavy else reference, "network", items=batch)
        if settings.peers and dtype == "float32" and batch <= 8:
            opened.peers = _peers(name, images, device)
        return opened

    return open_case


def _peers(name: str, images: Tensor, device: torch.device) -> Iterator[Runner | Absent]:
    one = Inference(name, images, device, "float32", "nchw", "eager")
    ready = one.images.float().div_(255)
    expected = one.predict(NoClock())

    def compare(output: Tensor) -> float:
        return float(torch.isclose(output, expected, rtol=1e-3, atol=1e-3).double().mean())

    yield from inference_peers(one.model, ready, lambda prediction: nms(prediction, conf=_CONF), compare)
