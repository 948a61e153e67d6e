"""Makes files like those of other projects, from our networks, with classes that vanish before loading."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yolov9_fast.models.model import DetectionModel, create_model
from yolov9_fast.models.reparameterize import deployed_key_origin

WKY_PATHS = {
    "DetectionModel": "models.yolo.DetectionModel",
    "CSPELAN": "models.common.RepNCSPELAN4",
    "RepConv": "models.common.RepConvN",
    None: "models.common",
}
ULTRALYTICS_PATHS = {
    "DetectionModel": "ultralytics.nn.tasks.DetectionModel",
    "CSPELAN": "ultralytics.nn.modules.block.RepNCSPELAN4",
    None: "ultralytics.nn.modules.block",
}


def small_model(name: str, num_classes: int = 5, **options: Any) -> DetectionModel:
    """A network whose every weight and statistic is drawn, rounded to float16 as published files are."""
    model = create_model(name, num_classes, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith(("running_var", "bn.weight")):
                value.uniform_(0.7, 1.3, generator=generator)
            elif key.endswith(("running_mean", "bias")):
                value.normal_(0, 0.1, generator=generator)
            if value.is_floating_point():
                value.copy_(value.half().float())
    model.names = {i: f"thing {i}" for i in range(num_classes)}
    return model.eval()


def image(seed: int = 0) -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@contextmanager
def foreign_classes() -> Iterator[Any]:
    """Gives `rebuild(module, paths)`: the module as instances of classes in modules that exist only in this block."""
    before = set(sys.modules)

    def cls(path: str) -> type[nn.Module]:
        module_name, _, name = path.rpartition(".")
        parts = module_name.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        module = sys.modules[module_name]
        if not hasattr(module, name):
            setattr(module, name, type(name, (nn.Module,), {"__module__": module_name, "__qualname__": name}))
        return getattr(module, name)

    def rebuild(module: nn.Module, paths: dict[Any, str]) -> nn.Module:
        name = type(module).__name__
        own = type(module).__module__.startswith("yolov9_fast")
        new = object.__new__(cls(paths.get(name) or f"{paths[None]}.{name}") if own else type(module))
        new.__dict__ = {k: v for k, v in vars(module).items() if k not in ("graph", "_main_layers")}
        new.__dict__["_modules"] = {k: m and rebuild(m, paths) for k, m in module._modules.items()}
        return new

    try:
        yield rebuild
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("models", "ultralytics"):
                del sys.modules[name]


def save_pickled_module(path: Path, model: DetectionModel, paths: dict[Any, str], **entries: Any) -> None:
    """A dict with the whole module in half precision under `model`, as WongKinYiu and Ultralytics publish."""
    with foreign_classes() as rebuild:
        foreign = rebuild(model, paths)
        foreign.__dict__ |= {"nc": model.num_classes, "names": list(model.names.values()), "yaml": {"nc": 80}}
        content = {"epoch": -1, "model": foreign.half(), "optimizer": None, "date": "2024-06-10"} | entries
        content = {k: rebuild(v, paths).half() if isinstance(v, DetectionModel) else v for k, v in content.items()}
        torch.save(content, path)
        # The numbers are shared with the originals, which stay what they were.
        for original in (model, *(v for v in entries.values() if isinstance(v, DetectionModel))):
            original.float()


def mit_state_dict(model: DetectionModel) -> dict[str, Tensor]:
    """The state dict as MultimediaTechLab/YOLO spells it, from its description, not from the reader's tables."""
    dual = model.has_auxiliary
    small = len(model.graph.layers) in (23, 30)
    shift = 0 if small or not dual else 1
    moved = {22: 23, 25: 26, 28: 29} if small and dual else {}
    head = len(model.graph.layers) - 1
    result: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        _, index_text, rest = key.split(".", 2)
        index = int(index_text)
        if index == head:
            result.update(_mit_head(rest, value, dual, 30 if small else 38))
            continue
        place = moved.get(index, index - shift if index <= 22 else index)
        if type(model.model[index]).__name__ == "AConv":
            rest = rest.replace("cv1.", "conv.")
        rest = re.sub(r"cv(\d)", r"conv\1", rest).replace(".m.", ".bottleneck.")
        result[f"{place}.{rest}"] = value
    return result


def _mit_head(rest: str, value: Tensor, dual: bool, auxiliary: int) -> dict[str, Tensor]:
    child, _, tail = rest.partition(".")
    main = not dual or child in ("cv4", "cv5", "dfl2")
    place = 22 if main else auxiliary
    if child.startswith("dfl"):
        return {f"{place}.heads.{i}.anc2vec.anc2vec.weight": value.reshape(1, 16, 1, 1, 1) for i in range(3)}
    level, tail = tail.split(".", 1)
    tower = "anchor_conv" if child in ("cv2", "cv4") else "class_conv"
    return {f"{place}.heads.{level}.{tower}.{tail}": value}


def deployed_state(model: DetectionModel) -> dict[str, Tensor]:
    """State dict of the deployed graph, picked from the training graph's."""
    graph, origin = model.graph.deploy()
    deployed = DetectionModel(graph, model.num_classes, class_tower=model.class_tower, box_groups=model.box_groups)
    state = model.state_dict()
    return {key: state[deployed_key_origin(model, key, origin)] for key in deployed.state_dict()}
