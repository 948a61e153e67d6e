"""Small files that ask for much memory or time, or are damaged in rare ways, end in one short error, soon."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import hostile
from tests.models.foreign_files import WKY_PATHS, save_pickled_module, small_model
from yolov9_fast.errors import CheckpointError
from yolov9_fast.models import GraphError, create_model
from yolov9_fast.models.checkpoint import load_checkpoint
from yolov9_fast.models.foreign_archive import restricted_load
from yolov9_fast.models.graph import graph_from_dict

F4 = bytes(16)


def refused(
    path: Path, said: str | None = None, *, mib: int = 1024, load: Callable[[Path], Any] = load_checkpoint
) -> str:
    """The error of reading `path`: one short line that names the file, within so much memory."""
    with hostile.memory_limit(mib), pytest.raises(CheckpointError, match=said) as found:
        load(path)
    text = str(found.value)
    assert path.name in text
    assert len(text) < 1000
    assert text.isprintable()
    return text


@pytest.mark.parametrize("name", [name for name in hostile.MULTIPLYING if not name.startswith(("empty", "copies of"))])
def test_a_pickle_that_multiplies_is_refused(name: str, tmp_path: Path) -> None:
    refused(hostile.zip_checkpoint(tmp_path / "x.pt", hostile.MULTIPLYING[name]), mib=400)


@pytest.mark.slow
@pytest.mark.parametrize("write", [hostile.zip_checkpoint, hostile.legacy_checkpoint])
@pytest.mark.parametrize("name", list(hostile.MULTIPLYING))
def test_every_pickle_that_multiplies_is_refused(name: str, write: Callable[..., Path], tmp_path: Path) -> None:
    refused(write(tmp_path / "x.pt", hostile.MULTIPLYING[name]), mib=1024)


def test_the_limit_of_steps_can_be_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hostile.zip_checkpoint(tmp_path / "x.pt", b"](" + b"K\x01" * 1000 + b"e.")
    monkeypatch.setenv("YOLOV9_FAST_MAX_PICKLE_STEPS", "1000")
    refused(path, "at most 1,000 steps, got more .YOLOV9_FAST_MAX_PICKLE_STEPS raises", load=restricted_load)
    monkeypatch.setenv("YOLOV9_FAST_MAX_PICKLE_STEPS", "1010")
    assert restricted_load(path) == [1] * 1000


def state_of_views(count: int, kind: str, numbers: int) -> bytes:
    """A state dict of `count` views of the same storage."""
    tensor = hostile.tensor(kind, "0", numbers)
    return b"(" + b"".join(hostile.text(f"model.{i}.conv.weight") + tensor for i in range(count)) + b"d."


@pytest.mark.parametrize(("kind", "item"), [("FloatStorage", 4), ("HalfStorage", 2), ("ByteStorage", 1)])
@pytest.mark.parametrize("write", [hostile.zip_checkpoint, hostile.legacy_checkpoint])
def test_views_of_the_same_numbers_do_not_multiply(
    kind: str, item: int, write: Callable[..., Path], tmp_path: Path
) -> None:
    numbers = 1 << 20
    extra = {"item": item} if write is hostile.legacy_checkpoint else {}
    path = write(tmp_path / "x.pt", state_of_views(2000, kind, numbers), {"0": bytes(numbers * item)}, **extra)
    refused(path, "at most twice the file's", mib=300)


def test_storages_within_one_another_do_not_multiply(tmp_path: Path) -> None:
    refused(hostile.overlapping_zip(tmp_path / "x.pt", 200, 1 << 22), "together are larger", mib=300)


def test_shared_structures_in_class_names_are_not_written_out(tmp_path: Path) -> None:
    source = small_model("gelan-t")
    source.names = dict.fromkeys(range(5), ["x" * 1_000_000] * 10_000)  # type: ignore[assignment]
    save_pickled_module(tmp_path / "x.pt", source, WKY_PATHS)
    with hostile.memory_limit(500):
        assert load_checkpoint(tmp_path / "x.pt").names == {i: str(i) for i in range(5)}


def pickled(tmp_path: Path, program: bytes, storages: dict[str, bytes] | None = None) -> Path:
    return hostile.zip_checkpoint(tmp_path / "x.pt", program, storages)


DEEP_TUPLE = b")" + b"\x85" * 100_000
STRUCTURES = {
    "a list as a key": b"}]K\x01s.",
    "a deep tuple as a key": b"}" + DEEP_TUPLE + b"K\x01s.",
    "a tensor as a key": b"}" + hostile.tensor() + b"K\x01s.",
    "a dictionary in a set": b"\x8f(}\x90.",
    "a list in a frozen set": b"(]\x91.",
    "a deep list": b"]" * 100_000 + b"a" * 99_999 + b".",
    "a deep tuple": DEEP_TUPLE + b".",
    "deep calls": b"cx\ny\nq\x00" + b"h\x00" * 50_000 + b")" + b"R\x85" * 49_999 + b"R.",
    "an integer of 5,000 digits": b"L" + b"9" * 5000 + b"L\n.",
    "an integer of 5,000 digits as a key": b"}\x8b" + struct.pack("<i", 2000) + b"\x7f" * 2000 + b"N" + b"s.",
    "an integer of 5,000 digits as a size": hostile.tensor(size=(10**200,)) + b".",
    "control characters in an error": b"c" + b"\x1b[31m" * 20 + b"\nx\n)" + b"Q.",
    "an error of megabytes": b"I" + b"x\x1b[2J" * 1_000_000 + b"\n.",
    "an opcode that does not exist": b"\xff.",
    "weights under a name of megabytes": b"}" + hostile.text("x" * 4_000_000) + hostile.tensor() + b"s.",
    "what is found has a name of megabytes": b"}" + hostile.text("\x1b[2J" * 1_000_000) + b"Ns.",
    "a transient set that is a number": b"cx\nModel\n)R}("
    + hostile.text("_modules")
    + b"}"
    + hostile.text("_buffers")
    + b"}("
    + hostile.text("b")
    + hostile.tensor()
    + b"u"
    + hostile.text("_non_persistent_buffers_set")
    + b"K\x01ub.",
    "digits that are none": b"}" + hostile.text("model.²." + "conv.weight") + hostile.tensor() + b"s.",
    "an index of 5,000 digits": b"}" + hostile.text("model." + "9" * 400 + ".conv.weight") + hostile.tensor() + b"s.",
    "a head without a layer": b"}" + hostile.text("a.heads.0.class_conv.x") + hostile.tensor() + b"s.",
    "a head of another spelling": b"}" + hostile.text("ab.0.heads.0.class_conv.x") + hostile.tensor() + b"s.",
    "integers as weights": b"}" + hostile.text("model.0.conv.weight") + hostile.tensor("LongStorage", count=2) + b"s.",
}


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_a_structure_that_is_no_checkpoint_is_one_line(name: str, tmp_path: Path) -> None:
    refused(pickled(tmp_path, STRUCTURES[name], {"0": F4}), mib=300)


def test_an_encrypted_entry_is_one_line(tmp_path: Path) -> None:
    for suffix in (".pt", ".npz"):
        path = pickled(tmp_path, b"N.").rename(tmp_path / f"y{suffix}")
        data = bytearray(path.read_bytes())
        for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            data[data.find(mark) + place] |= 1
        path.write_bytes(data)
        refused(path, "is encrypted")


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (10, 12, "has a compression that cannot be read"),  # bzip2
        (10, 0x100, "has a compression that cannot be read"),
        (8, 0x20, "has a compression that cannot be read"),  # patches
        (6, 99, "zip file version 9.9"),
    ],
)
def test_an_archive_of_another_kind_is_one_line(
    suffix: str, place: int, value: int, message: str, tmp_path: Path
) -> None:
    path = pickled(tmp_path, b"N.").rename(tmp_path / f"y{suffix}")
    data = bytearray(path.read_bytes())
    place += data.find(b"PK\x01\x02")
    data[place : place + 2] = value.to_bytes(2, "little")
    path.write_bytes(data)
    refused(path, message)


def test_a_list_of_a_million_entries_is_not_read(tmp_path: Path) -> None:
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
    count = 600_000
    path = tmp_path / "x.pt"
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count & 0xFFFF, count & 0xFFFF, len(entry) * count, 0, 0)
    path.write_bytes(entry * count + tail)
    path.write_bytes(b"PK\3\4" + path.read_bytes())
    refused(path, mib=200)


def test_a_sparse_file_of_terabytes_is_refused(tmp_path: Path) -> None:
    for suffix in (".pt", ".npz", ".safetensors"):
        path = tmp_path / f"x{suffix}"
        with path.open("wb") as file:
            file.write(b"PK\3\4")
        os.truncate(path, 1 << 40)
        refused(path, "at most 8,589,934,592 bytes, got 1,099,511,627,776")


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_a_path_that_no_file_has_is_one_line(suffix: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    for path in (f"a\0b{suffix}", f"{'x' * 5000}{suffix}", f"~nobody_here/x{suffix}", f"/dev/zero/x{suffix}", 5):
        with pytest.raises(CheckpointError):
            load_checkpoint(path)  # type: ignore[arg-type]
    for name in ("pipe", "folder"):
        refused(tmp_path / f"{name}{suffix}", "expected a regular file")


# ---- .npz


def npz_files(folder: Path) -> dict[str, Path]:
    """Archives that declare or hold far more than their size."""
    name = "model.0.conv.weight.npy"
    many = {f"{i}.npy": hostile.npy_header(()) for i in range(20)}
    return {
        "12 GiB": hostile.npz(folder / "a.npz", {name: hostile.npy_header((3, 1 << 30)) + F4}),
        "4 PiB": hostile.npz(folder / "b.npz", {name: hostile.npy_header((1 << 50,)) + F4}),
        "a size above 64 bits": hostile.npz(folder / "c.npz", {name: hostile.npy_header((1 << 62, 1 << 62)) + F4}),
        "a negative size": hostile.npz(folder / "d.npz", {name: hostile.npy_header((-4,)) + F4}),
        "200 MB of zeros": hostile.zeros_entry(folder / "e.npz", name, hostile.npy_header((50 << 20,)), 200 << 20),
        "4 PiB of nothing": hostile.npz(folder / "f.npz", {name: hostile.npy_header((1 << 50, 0))}),
        "20 entries without data": hostile.npz(folder / "g.npz", many),
        "an array without an archive": _written(folder / "h.npz", hostile.npy_header((1 << 50,)) + F4),
        "text": hostile.npz(folder / "i.npz", {name: hostile.npy_header((1,), "<U1000000") + F4}),
        "objects": hostile.npz(folder / "j.npz", {name: hostile.npy_header((1,), "|O") + pickle.dumps([1])}),
        "a header of a megabyte": hostile.npz(
            folder / "k.npz", {name: b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 20) + b"(" * (1 << 20)}
        ),
        "a nested header": hostile.npz(folder / "l.npz", {name: b"\x93NUMPY\x01\x00\xf0\x00" + b"[" * 240}),
        "no array": hostile.npz(folder / "m.npz", {name: b"x" * 100}),
        "a pickle": hostile.npz(folder / "n.npz", {name: pickle.dumps([1])}),
        "another compression": _with_method(hostile.npz(folder / "o.npz", {name: hostile.npy_header((4,)) + F4}), 97),
        "damaged compression": _with_method(hostile.npz(folder / "p.npz", {name: hostile.npy_header((4,)) + F4}), 8),
        "damaged lzma": _with_method(hostile.npz(folder / "q.npz", {name: hostile.npy_header((4,)) + F4}), 14),
    }


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _with_method(path: Path, method: int) -> Path:
    data = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data[data.find(mark) + place] = method
    return _written(path, bytes(data))


def test_an_npz_that_declares_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    for name, path in npz_files(tmp_path).items():
        assert refused(path, mib=300), name


def test_arrays_of_every_form_are_read(tmp_path: Path) -> None:
    from yolov9_fast.models.array_files import read_npz

    arrays: dict[str, Any] = {
        "rows": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
        "swapped": np.arange(4, dtype=">f8"),
        "scalar": np.int64(3),
        "empty": np.zeros((0, 3), np.float32),
        "zeros": np.zeros(1 << 20, np.float32),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        found, _ = read_npz(tmp_path / "x.npz")
        assert found.keys() == arrays.keys()
        for key, value in arrays.items():
            assert found[key].shape == np.shape(value)
            assert (found[key].numpy() == value).all()


# ---- metadata of safetensors

ROW = [-1, "Conv", [8, 3, 2]]
HEAD = [[-2, -2, -2], "DDetect", []]


def described(path: Path, **changes: Any) -> Path:
    """A file of ours that holds one tensor and describes a small network, with parts of that description changed."""
    header = {
        "format_version": 1,
        "graph": {"name": "g", "layers": [ROW, HEAD]},
        "num_classes": 2,
        "class_tower": None,
        "box_groups": None,
        "names": None,
        "fused": False,
    }
    text = json.dumps(header | changes).replace('"HUGE"', "9" * 5000)
    return hostile.safetensors(path, {"w": ("F32", [4], F4)}, {"yolov9_fast": text})


def graph(*rows: Any) -> dict[str, Any]:
    return {"name": "g", "layers": [*rows, HEAD]}


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "10^9 classes": {"num_classes": 10**9},
    "infinite classes": {"num_classes": float("inf")},
    "no number of classes": {"num_classes": float("nan")},
    "10^400 classes": {"num_classes": 10**400},
    "classes of 5,000 digits": {"num_classes": "HUGE"},
    "half a class": {"num_classes": 1.5},
    "a class tower of 10^12": {"class_tower": 10**12},
    "infinite groups": {"box_groups": float("inf")},
    "another version": {"format_version": float("inf")},
    "a name that is a list": {"graph": {"name": [[]], "layers": [ROW, HEAD]}},
    "a name of a megabyte": {"graph": {"name": "x\x1b" * 1_000_000, "layers": [ROW, HEAD]}},
    "a width of 10^12": {"graph": graph([-1, "Conv", [10**12, 3, 2]])},
    "an infinite width": {"graph": graph([-1, "Conv", [float("inf"), 3, 2]])},
    "a depth of 10^9": {"graph": graph(ROW, [-1, "CSPELAN", [8, 8, 8, 10**9]])},
    "a depth of 10^6": {"graph": graph(ROW, [-1, "CSPELAN", [8, 8, 8, 10**6]])},
    "10^6 stages": {"graph": graph(ROW, [-1, "GELAN", [8, 8, 8, "csp", 1, 10**6]])},
    "negative stages": {"graph": graph(ROW, [-1, "GELAN", [8, 8, 8, "csp", 1, -5]])},
    "10^5 layers": {"graph": graph(*[[-1, "Silence", []]] * 100_000)},
    "10^5 sources": {"graph": graph([[-1] * 100_000, "Concat", []])},
    "10^5 arguments": {"graph": graph([-1, "CBLinear", [[1] * 100_000]])},
    "arguments 400 deep": {"graph": graph([-1, "CBLinear", nested(400)])},
    "arguments 5000 deep": {},
    "a source that is true": {"graph": graph([True, "Conv", [8]])},
    "a block that is a list": {"graph": graph([-1, nested(300), [8]])},
    "a mapping as an argument": {"graph": graph([-1, "Conv", [{"a": 1}]])},
    "a row that is text": {"graph": graph("x" * 1_000_000)},
    "names of a megabyte": {"names": {"0": "x" * 1_000_000, "1": "y"}},
    "metadata that are text": {"metadata": "x"},
    "options of BatchNorm that are text": {"batch_norm": "x"},
    "no graph": {"graph": None},
    "no head": {"graph": {"layers": [ROW]}},
}


@pytest.mark.parametrize("name", list(DESCRIPTIONS))
def test_a_description_that_asks_for_too_much_is_refused_at_once(name: str, tmp_path: Path) -> None:
    if name == "arguments 5000 deep":
        text = '{"format_version": 1, "graph": ' + "[" * 5000 + "]" * 5000 + "}"
        path = hostile.safetensors(tmp_path / "x.safetensors", {"w": ("F32", [4], F4)}, {"yolov9_fast": text})
    else:
        path = described(tmp_path / "x.safetensors", **DESCRIPTIONS[name])
    refused(path, mib=300)


@pytest.mark.parametrize(
    "block", ["os:getpid", "os:_exit", "builtins:exit", "subprocess:call", "pathlib:Path", "pickle:Unpickler"]
)
def test_a_description_calls_no_function_that_happens_to_be_loaded(block: str, tmp_path: Path) -> None:
    for rows in ([[-1, block, [0]]], [ROW, [-1, "GELAN", [8, 8, 8, block]]]):
        refused(described(tmp_path / "x.safetensors", graph=graph(*rows)), "expected a class of modules")


def test_names_in_foreign_metadata_are_bounded(tmp_path: Path) -> None:
    state = {key: value.numpy() for key, value in small_model("gelan-t", 2).state_dict().items()}
    kinds = {"float32": "F32", "int64": "I64"}
    tensors = {key: (kinds[str(v.dtype)], list(v.shape), v.tobytes()) for key, v in state.items()}
    for names in ("[" * 5000 + "]" * 5000, '{"0": 1, "1": 1e999}', '{"' + "9" * 5000 + '": "a", "1": "b"}', "[[], []]"):
        path = hostile.safetensors(tmp_path / "x.safetensors", tensors, {"names": names})
        assert load_checkpoint(path).names == {0: "0", 1: "1"}
    path = hostile.safetensors(tmp_path / "x.safetensors", tensors, {"names": json.dumps(["a", "x" * 1_000_000])})
    refused(path, "name of class 1: expected at most 1,000 characters, got 1,000,000")


def test_a_head_of_a_billion_classes_without_numbers_is_refused(tmp_path: Path) -> None:
    state = {"model.0.conv.weight": ("F32", [16, 3, 3, 3], bytes(16 * 27 * 4))}
    state["model.22.cv3.0.2.weight"] = ("F32", [10**9, 0, 1, 1], b"")
    state["model.22.cv3.0.0.conv.weight"] = ("F32", [10**12, 0, 3, 3], b"")
    refused(hostile.safetensors(tmp_path / "x.safetensors", state, {}), "at most 100,000 classes", mib=300)


def test_a_header_of_megabytes_is_refused(tmp_path: Path) -> None:
    path = hostile.safetensors(tmp_path / "x.safetensors", {"w": ("F32", [4], F4)}, {"a": "x" * (17 << 20)})
    refused(path, "header of .* is larger", mib=200)


def test_half_precision_and_missing_counters_still_load(tmp_path: Path) -> None:
    source = small_model("gelan-t")
    state = {k: v.half() for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    np.savez_compressed(tmp_path / "x.npz", **{k: v.numpy() for k, v in state.items()})
    loaded = load_checkpoint(tmp_path / "x.npz").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in source.state_dict().items() if k in state)


def test_files_that_only_look_like_zip_are_one_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as archive:
        archive.writestr("archive/data.pkl", b"N.")
    data = (tmp_path / "y.zip").read_bytes()
    for cut in range(4, len(data), 3):
        refused(_written(tmp_path / "x.pt", data[:cut]))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([-1, "CSPELAN", [8, 8, 8, 10**6]], "at most 20,000 modules, got more .YOLOV9_FAST_MAX_MODULES"),
        ([-1, "GELAN", [8, 8, 8, "csp", 1, 10**6]], "at most 20,000 modules"),
        ([-1, "Conv", [20_000, 1, 1]], "at most 1,073,741,824 parameters, got more .YOLOV9_FAST_MAX_PARAMETERS"),
    ],
)
@pytest.mark.slow
def test_a_graph_that_asks_for_more_than_a_machine_has_is_refused(row: Any, said: str) -> None:
    rows = [[-1, "Conv", [20_000, 1, 1]], row, row, row] if row[1] == "Conv" else [row]
    with pytest.raises(GraphError, match=said):
        create_model(graph_from_dict(graph(*rows), "g.yaml"))


def test_a_number_of_classes_above_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes: expected at most 100,000 classes, got 1,000,000,000"):
        create_model("gelan-t", 10**9)
