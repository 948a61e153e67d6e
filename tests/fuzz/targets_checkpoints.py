"""Targets of the readers of weights and of a run's state."""

from __future__ import annotations

import io
import json
import os
import struct
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors import safe_open

from tests.fuzz.frame import Case, target
from tests.fuzz.readers import changed, hostile_text, hostile_values, json_text, mutated, refused_or_read, watched
from tests.models import hostile
from tests.models.foreign_files import WKY_PATHS, save_pickled_module, small_model
from yolov9_fast.engine.ema import ModelEMA
from yolov9_fast.engine.loss_scale import LossScale
from yolov9_fast.engine.resumption import reading_state
from yolov9_fast.engine.run_files import RunFolder, load_state, read_results, save_state
from yolov9_fast.engine.training_state import TrainingState
from yolov9_fast.models import load_checkpoint, save_weights
from yolov9_fast.models.graph import graph_from_dict
from yolov9_fast.models.model import DetectionModel
from yolov9_fast.paper.files import read_numbers

MEMORY_MIB = 1024 + 8 * 16
"""What `load_checkpoint` states for the largest file here, 16 MiB."""
SECONDS = 60.0
_STEPS = "100000"
TINY = {
    "name": "tiny",
    "layers": [
        [-1, "Conv", [4, 3, 2]],
        [-1, "Conv", [4, 3, 2]],
        [-1, "Conv", [4, 3, 2]],
        [-1, "CSPELAN", [4, 4, 2, 1]],
        [-1, "Conv", [4, 3, 2]],
        [-1, "Conv", [4, 3, 2]],
        [[3, 4, 5], "DDetect", []],
    ],
}


def tiny_model() -> DetectionModel:
    return DetectionModel(graph_from_dict(TINY, "tiny"), 2, class_tower=4)


@cache
def folder() -> Path:
    """A folder of this process for the files that are read, with `valid.pt`, `valid.safetensors` and `valid.npz`."""
    path = Path(tempfile.mkdtemp(prefix="fuzz_weights_"))
    save_pickled_module(path / "valid.pt", small_model("gelan-t", 2), WKY_PATHS)
    save_weights(tiny_model(), path / "valid.safetensors")
    np.savez(path / "valid.npz", **{"model.0.conv.weight": np.ones((4, 3), np.float32), "x": np.zeros(3, np.int64)})
    load_checkpoint(path / "valid.pt")  # imports and templates, before imports are watched
    load_checkpoint(path / "valid.safetensors")
    return path


def read(path: Path) -> None:
    os.environ["YOLOV9_FAST_MAX_PICKLE_STEPS"] = _STEPS if path.stat().st_size < 1 << 20 else "2000000"
    with watched(folder()):
        model = refused_or_read(lambda: load_checkpoint(path), path)
    assert model is None or isinstance(model, DetectionModel)


# ---- pickles

_NAMES = [
    *("os\nsystem", "posix\nsystem", "builtins\neval", "builtins\nexec", "subprocess\nPopen", "trap_module\nTrap"),
    *("torch._utils\n_rebuild_tensor_v2", "torch._utils\n_rebuild_parameter", "torch._tensor\n_rebuild_from_type_v2"),
    *("collections\nOrderedDict", "collections\ndefaultdict", "builtins\nlist", "builtins\nset", "builtins\nfrozenset"),
    *("torch\nSize", "torch\ndevice", "_codecs\nencode", "torch\nFloatStorage", "models.yolo\nDetectionModel"),
    *("torch.nn.modules.batchnorm\nBatchNorm2d", "torch.nn.modules.conv\nConv2d", "\n", "x" * 600 + "\ny"),
]
_STORAGES = ["FloatStorage", "HalfStorage", "LongStorage", "BoolStorage", "ComplexFloatStorage", "UntypedStorage"]
_KEYS = [
    *(
        "model",
        "ema",
        "state_dict",
        "_modules",
        "_parameters",
        "_buffers",
        "_non_persistent_buffers_set",
        "names",
        "nc",
    ),
    *("yaml", "weight", "running_var", "eps", "momentum", "model.0.conv.weight", "model.22.cv3.0.2.weight", "version"),
    *("0.heads.0.class_conv.2.bias", "ab.heads.1", "²", "stride"),
]
_COUNTS = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 16, 2**20, 2**31, 2**62, 2**63, -1])


def _tensors() -> st.SearchStrategy[bytes]:
    return st.builds(
        hostile.tensor,
        st.sampled_from(_STORAGES),
        st.sampled_from(["0", "1", "2", "../0", "x" * 200]),
        _COUNTS,
        st.none() | st.lists(_COUNTS, max_size=4).map(tuple),
    )


def programs() -> st.SearchStrategy[bytes]:
    """Pickles that push one value; most are well-formed."""
    names = st.sampled_from(_NAMES).map(lambda name: b"c" + name.encode() + b"\n")
    texts = (st.sampled_from(_KEYS) | hostile_text()).map(lambda text: hostile.text(_ascii(text)))
    numbers = st.sampled_from([0, 1, -1, 255, 2**31, 2**62, 2**64, 10**30]).map(hostile.number)
    leaves = (
        st.sampled_from(
            [b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f", b"L" + b"9" * 5000 + b"L\n", b"G" + bytes(8)]
        )
        | texts
        | numbers
        | names
        | _tensors()
        | st.integers(0, 5).map(lambda number: b"h" + bytes([number]))
    )

    def combine(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
        many = st.lists(inner, max_size=5).map(b"".join)
        pairs = st.lists(st.tuples(texts | inner, inner).map(b"".join), max_size=5).map(b"".join)
        return st.one_of(
            many.map(lambda items: b"](" + items + b"e"),
            pairs.map(lambda items: b"}(" + items + b"u"),
            many.map(lambda items: b"(" + items + b"t"),
            many.map(lambda items: b"\x8f(" + items + b"\x90"),
            many.map(lambda items: b"(" + items + b"\x91"),
            st.tuples(names, many).map(lambda parts: parts[0] + b"(" + parts[1] + b"tR"),
            st.tuples(names, many).map(lambda parts: parts[0] + b"(" + parts[1] + b"t}\x92"),
            st.tuples(names, pairs).map(lambda parts: parts[0] + b")R}(" + parts[1] + b"ub"),
            st.tuples(inner, st.integers(0, 5)).map(lambda parts: parts[0] + b"q" + bytes([parts[1]])),
            st.tuples(inner, st.sampled_from([2, 500, 20_000])).map(lambda p: p[0] + b"\x85" * p[1]),
            st.tuples(inner, st.sampled_from([2, 60])).map(lambda p: p[0] + b"q\x05" + b"h\x05\x86q\x05" * p[1]),
        )

    return st.recursive(leaves, combine, max_leaves=12)


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


@cache
def _valid_entries() -> dict[str, bytes]:
    with zipfile.ZipFile(folder() / "valid.pt") as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def _archive(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@target("checkpoint_zip", memory_mib=MEMORY_MIB, case_seconds=SECONDS)
def checkpoint_zip(case: Case) -> None:
    path = folder() / "x.pt"
    kind = case.draw(
        st.sampled_from(["program", "program", "program", "multiplying", "valid pickle", "valid file"]), "kind"
    )
    if kind == "valid pickle":
        entries = dict(_valid_entries())
        name = next(name for name in entries if name.endswith("data.pkl"))
        entries[name] = case.draw(mutated(entries[name]).map(_Hidden), "pickle").data
        path.write_bytes(_archive(entries))
    else:
        if kind == "multiplying":
            program = hostile.MULTIPLYING[case.draw(st.sampled_from(sorted(hostile.MULTIPLYING)), "name")]
        else:
            program = case.draw(programs(), "program") + case.draw(st.sampled_from([b".", b"", b"0.", b"R."]), "end")
        sizes = [16, 1 << 16, 0]
        hostile.zip_checkpoint(path, program, {str(i): bytes(size) for i, size in enumerate(sizes)})
        if kind == "valid file":
            path.write_bytes(case.draw(mutated(path.read_bytes()), "file"))
    read(path)


class _Hidden:
    """Data that is too long for the record of what was drawn."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __repr__(self) -> str:
        return f"{len(self.data)} bytes"


@target("checkpoint_legacy", memory_mib=MEMORY_MIB, case_seconds=SECONDS)
def checkpoint_legacy(case: Case) -> None:
    path = folder() / "x.pth"
    program = case.draw(programs(), "program") + b"."
    keys = case.draw(st.lists(st.sampled_from(["0", "1", "2", "x"]), max_size=3), "keys")
    hostile.legacy_checkpoint(path, program, {key: bytes(case.draw(st.sampled_from([0, 16, 28]), key)) for key in keys})
    if case.draw(st.booleans(), "mutate"):
        path.write_bytes(case.draw(mutated(path.read_bytes()), "file"))
    read(path)


# ---- arrays


@target("npz", memory_mib=MEMORY_MIB, case_seconds=SECONDS)
def npz(case: Case) -> None:
    path = folder() / "x.npz"
    if case.draw(st.booleans(), "mutate"):
        path.write_bytes(case.draw(mutated((folder() / "valid.npz").read_bytes()), "file"))
    else:
        compression = case.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]), "method")
        entries = {}
        for name in case.draw(
            st.lists(st.sampled_from(["model.0.conv.weight.npy", "a.npy", "a", "²"]), max_size=3), "names"
        ):
            shape = case.draw(st.lists(_COUNTS, max_size=4).map(tuple), "shape")
            dtype = case.draw(
                st.sampled_from(["<f4", ">f8", "<i8", "|b1", "|O", "<U1000000", "V4", "<c8", "x"]), "dtype"
            )
            data = bytes(case.draw(st.sampled_from([0, 4, 16, 1 << 20]), "data"))
            header = hostile.npy_header(shape, dtype) if len(str(shape)) < 60 else b"\x93NUMPY\x02\x00\xff\xff\xff\xff("
            entries[name] = header + data
        hostile.npz(path, entries, compression)
    read(path)


@cache
def _description() -> dict[str, Any]:
    with safe_open(folder() / "valid.safetensors", framework="pt") as file:
        description: dict[str, Any] = json.loads(file.metadata()["yolov9_fast"])
    return description | {"batch_norm": {"model.0.bn": [1e-5, 0.1]}, "names": {"0": "a", "1": "b"}}


@cache
def _tensors_of_tiny() -> dict[str, tuple[str, list[int], bytes]]:
    kinds = {torch.float32: "F32", torch.int64: "I64"}
    state = tiny_model().state_dict()
    return {key: (kinds[v.dtype], list(v.shape), v.numpy().tobytes()) for key, v in state.items()}


@target("safetensors", memory_mib=MEMORY_MIB, case_seconds=SECONDS)
def safetensors(case: Case) -> None:
    path = folder() / "x.safetensors"
    kind = case.draw(st.sampled_from(["description", "description", "header", "names", "file"]), "kind")
    if kind == "description":
        text = json_text(case.draw(changed(_description()), "description")).decode()
        hostile.safetensors(path, _tensors_of_tiny(), {"yolov9_fast": text})
    elif kind == "names":
        hostile.safetensors(
            path, _tensors_of_tiny(), {"names": json_text(case.draw(hostile_values(), "names")).decode()}
        )
    elif kind == "file":
        path.write_bytes(case.draw(mutated((folder() / "valid.safetensors").read_bytes()).map(_Hidden), "file").data)
    else:
        header: dict[str, Any] = {"__metadata__": {"yolov9_fast": json.dumps(_description())}}
        for key in ("model.0.conv.weight", "model.22.cv3.0.2.weight"):
            header[key] = {"dtype": "F32", "shape": [4, 1], "data_offsets": [0, 16]}
        raw = json_text(case.draw(changed(header), "header"))
        size = case.draw(st.sampled_from([len(raw), len(raw), 0, 2**63, 2**64 - 1, len(raw) + 100]), "size")
        path.write_bytes(struct.pack("<Q", size) + raw + bytes(16))
    read(path)


# ---- the state and the records of a run


@cache
def _saved_state() -> bytes:
    state = _new_state()
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    state.data = {"names": ["a", "b"]}
    state.rows = [{"epoch": 1, "metrics/ap": 0.5}]
    save_state(folder() / "valid_state.pt", state.capture())
    return (folder() / "valid_state.pt").read_bytes()


def _new_state() -> TrainingState:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    return TrainingState(model, ModelEMA(model), optimizer, LossScale(torch.device("cpu"), enabled=False))


@cache
def _state_to_restore() -> TrainingState:
    return _new_state()


@target("state", memory_mib=MEMORY_MIB, case_seconds=SECONDS)
def state(case: Case) -> None:
    path = folder() / "state.pt"
    kind = case.draw(st.sampled_from(["entries", "entries", "pickle", "file"]), "kind")
    if kind == "entries":
        saved = torch.load(io.BytesIO(_saved_state()), weights_only=True)
        place, key = saved, "version"
        while isinstance(place, dict | list) and len(place):
            parent = place
            key = case.draw(
                st.sampled_from(sorted(place, key=str) if isinstance(place, dict) else range(len(place))), "key"
            )
            place = place[key]
            if not case.draw(st.integers(0, 3), "deeper"):
                break
        if case.draw(st.booleans(), "delete"):
            del parent[key]
        else:
            parent[key] = case.draw(hostile_values() | st.sampled_from([torch.zeros(3), torch.zeros(0)]), "value")
        torch.save(saved, path)
    elif kind == "pickle":
        with zipfile.ZipFile(io.BytesIO(_saved_state())) as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
        name = next(name for name in entries if name.endswith("data.pkl"))
        entries[name] = case.draw(mutated(entries[name]).map(_Hidden), "pickle").data
        path.write_bytes(_archive(entries))
    else:
        path.write_bytes(case.draw(mutated(_saved_state()).map(_Hidden), "file").data)
    state = _state_to_restore()

    def restore() -> None:
        with reading_state(RunFolder(folder())):
            state.restore(load_state(path))

    with watched(folder()):
        refused_or_read(restore, path, folder())


@target("records", memory_mib=MEMORY_MIB, case_seconds=SECONDS)
def records(case: Case) -> None:
    kind = case.draw(st.sampled_from(["results", "numbers"]), "kind")
    if kind == "results":
        path = folder() / "results.csv"
        path.write_bytes(case.draw(mutated(b"epoch,metrics/ap\n1,0.5\n2,nan\n"), "file"))
    else:
        path = folder() / "numbers.json"
        path.write_bytes(json_text(case.draw(hostile_values(), "content")))
    with watched(folder()):
        refused_or_read(lambda: read_results(path) if kind == "results" else read_numbers(path), path)
