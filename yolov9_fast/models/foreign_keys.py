"""Names of weights: the spellings of other projects turned into the official one, `model.{layer}.{child}…`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Wrappers' prefixes in any order before the layer's index: DDP, compile, Lightning, EMA copies.
_WRAPPED = re.compile(r"^((?:(?:module|model|_orig_mod|ema|ema_model|net)\.)*)([0-9]{1,6}\..+)$")
_INDEX = re.compile(r"([0-9]{1,6})\.")
_BOOKKEEPING = ("n_averaged", "total_ops", "total_params")

# Layers of the published training graphs ← layers of MultimediaTechLab/YOLO, where detection sits at 22 and what serves
# the auxiliary branch follows. Keyed by its auxiliary head's layer; the last layer is the training graph's head.
_MIT_HEAD = 22
_MIT_LAYERS: dict[int, tuple[dict[int, int], int]] = {
    30: ({**{i: i for i in range(22)}, 23: 22, 26: 25, 29: 28}, 29),
    38: ({**{i: i + 1 for i in range(22)}, **{i: i for i in range(23, 38)}}, 38),
}
_MIT_TOWERS = {"anchor_conv": 0, "class_conv": 1}
_MIT_TOWER = re.compile(r"^heads\.(\d+)\.(anchor_conv|class_conv)\.(.+)$")
_MIT_DFL = re.compile(r"^heads\.(\d+)\.anc2vec\.anc2vec\.weight$")


def official_keys(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Rename a foreign state dict; numbers are shared, not copied.

    Keys that no rule knows stay as they are, for the comparison with the graphs to report.

    Returns:
        The state dict in official spelling, with constants that some writers leave out filled in, and whose spelling
        it was: "official" or "mit".
    """
    plain = _unwrapped(state)
    source = "mit" if any(".heads." in key for key in plain) else "official"
    if source == "mit":
        plain = _from_mit(plain)
    return _with_constants({f"model.{k}" if k[:1].isdigit() else k: v for k, v in plain.items()}), source


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys from the layer's index on; of several wrapped copies of the network (Lightning) the averaged one."""
    groups: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, value in state.items():
        match = _WRAPPED.match(key)
        if key.rsplit(".", 1)[-1] in _BOOKKEEPING:
            continue
        if match:
            groups.setdefault(match[1], {})[match[2]] = value
        else:
            others[key] = value
    if not groups:
        return others
    chosen = max(groups, key=lambda prefix: ("ema" in prefix, len(groups[prefix])))
    return groups[chosen] | others


def layer_index(key: str) -> int:
    """The number that a key begins with; -1 if it begins with anything else."""
    match = _INDEX.match(key)
    return int(match[1]) if match else -1


def _from_mit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    auxiliary = max(layer_index(key) for key in state if ".heads." in key)
    layers, head = _MIT_LAYERS.get(auxiliary, ({i: i for i in range(_MIT_HEAD)}, _MIT_HEAD))
    dual = auxiliary in _MIT_LAYERS
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        index, rest = layer_index(key), key.partition(".")[2]
        if rest.startswith("heads."):
            branch = 1 if dual and index == _MIT_HEAD else 0
            name = _mit_head_child(rest, branch)
            if name is None:
                continue
            key = f"{head}.{name}"
            value = value.reshape(1, 16, 1, 1) if ".anc2vec." in rest and value.numel() == 16 else value
        elif index in layers:
            key = f"{layers[index]}.{_mit_child(rest)}"
        renamed[key] = value
    return renamed


def _mit_head_child(rest: str, branch: int) -> str | None:
    """Official child of the head; None for the copies of the DFL weight that levels 1 and 2 hold."""
    tower = _MIT_TOWER.match(rest)
    if tower:
        return f"cv{2 + 2 * branch + _MIT_TOWERS[tower[2]]}.{tower[1]}.{tower[3]}"
    dfl = _MIT_DFL.match(rest)
    if dfl:
        return f"dfl{2 if branch else ''}.conv.weight" if dfl[1] == "0" else None
    return rest


def _mit_child(rest: str) -> str:
    """`conv1.0.bottleneck.0.conv1.conv1.conv.weight` → `cv1.0.m.0.cv1.conv1.conv.weight`."""
    tokens = rest.split(".")
    if tokens[0] == "conv" and tokens[1:2] in (["conv"], ["bn"]):
        tokens[0] = "cv1"
    for place, token in enumerate(tokens):
        # The branches of RepConv, first in each bottleneck, are called conv1 and conv2 in the official files as well.
        inside_rep_conv = tokens[place - 1 : place] == ["cv1"] and tokens[place - 3 : place - 2] == ["m"]
        if token == "bottleneck":
            tokens[place] = "m"
        elif re.fullmatch(r"conv\d+", token) and not inside_rep_conv:
            tokens[place] = f"cv{token[4:]}"
    return ".".join(tokens)


def _with_constants(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add batch counters and DFL weights where a writer left them out: they hold no training."""
    filled: dict[str, Tensor] = {}
    for key, value in state.items():
        filled[key] = value
        counter = key.removesuffix("running_var") + "num_batches_tracked"
        if key.endswith(".bn.running_var") and counter not in state:
            filled[counter] = torch.zeros((), dtype=torch.int64)
    for tower, dfl in (("cv2", "dfl"), ("cv4", "dfl2")):
        for key in [k for k in state if re.fullmatch(rf"model\.\d+\.{tower}\.0\.2\.weight", k)]:
            name = f"{key.removesuffix(f'{tower}.0.2.weight')}{dfl}.conv.weight"
            filled.setdefault(name, torch.arange(16, dtype=torch.float32).reshape(1, 16, 1, 1))
    return filled
