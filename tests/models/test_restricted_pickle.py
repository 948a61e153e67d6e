"""Nothing that a pickle names is run, and damage gives an error, not a crash or an endless wait."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from yolov9_fast.errors import CheckpointError
from yolov9_fast.models.foreign import restricted_load
from yolov9_fast.models.pickle_calls import GlobalName, PickleError, Stub
from yolov9_fast.models.restricted_pickle import restricted_unpickle


def unpickle(data: bytes) -> Any:
    return restricted_unpickle(io.BytesIO(data))


def zip_file(
    path: Path, pickle_bytes: bytes, entries: dict[str, bytes] | None = None, folder: str = "archive/"
) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{folder}data.pkl", pickle_bytes)
        archive.writestr(f"{folder}version", "3\n")
        for name, data in (entries or {}).items():
            archive.writestr(name, data)
    return path


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def attacks(marker: Path) -> dict[str, bytes]:
    touch = f"open({str(marker)!r}, 'w')"
    command = f"touch {marker}"
    posix = b"cposix\nsystem\n(V" + command.encode() + b"\ntR."
    getattr_chain = b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR(V" + command.encode() + b"\ntR."
    return {
        "os.system": pickle.dumps(Call(os.system, command)),
        "posix.system, protocol 0": posix,
        "eval": pickle.dumps(Call(eval, touch)),
        "exec": pickle.dumps(Call(exec, touch), protocol=2),
        "__import__ and getattr": getattr_chain,
        "torch.load again": pickle.dumps(Call(torch.load, str(marker))),
        "hidden in an OrderedDict": pickle.dumps(OrderedDict(a=Call(os.system, command))),
        "in __setstate__": b"cos\nsystem\n(tR}Vx\nV" + command.encode() + b"\nsb.",
        "INST": b"(V" + command.encode() + b"\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nV" + command.encode() + b"\no.",
        "NEWOBJ_EX": b"\x80\x04cos\nsystem\n(V" + command.encode() + b"\nt}\x92.",
        "through _rebuild_from_type_v2": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN(V"
        + command.encode()
        + b"\nt}tR.",
        "dotted name": b"\x80\x04\x8c\x02os\x8c\x0bpath.system\x93(V" + command.encode() + b"\ntR.",
    }


@pytest.mark.parametrize("name", list(attacks(Path("x"))))
@pytest.mark.parametrize("container", ["bare", "zip", "legacy"])
def test_an_attack_runs_nothing(name: str, container: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    data = attacks(marker)[name]
    path = tmp_path / "file.pt"
    if container == "zip":
        zip_file(path, data)
    elif container == "legacy":
        header = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
        path.write_bytes(header + pickle.dumps({"little_endian": sys.byteorder == "little"}, 2) + data + b"\x80\x02].")
    else:
        path.write_bytes(data)
    try:
        restricted_load(path)  # an inert record of the call, or an error that names the file
    except CheckpointError as error:
        refused: CheckpointError | None = error
    else:
        refused = None
    assert refused is None or "file.pt" in str(refused)
    assert not marker.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    pickle.loads(attacks(marker)["posix.system, protocol 0"])
    assert marker.exists()


def test_naming_a_module_does_not_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "trap_module.py").write_text(f"open({str(marker)!r}, 'w')\nclass Trap: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    stub = unpickle(b"ctrap_module\nTrap\n)R.")
    assert isinstance(stub, Stub)
    assert stub.path == "trap_module.Trap"
    assert not marker.exists()
    assert "trap_module" not in sys.modules


def test_a_class_of_the_file_becomes_a_record_of_path_arguments_and_state() -> None:
    stub = unpickle(pickle.dumps(argparse.Namespace(batch=16, data="coco.yaml")))
    assert isinstance(stub, Stub)
    assert (stub.path, stub.state) == ("argparse.Namespace", {"batch": 16, "data": "coco.yaml"})


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_reads_as_pickle_reads_it(protocol: int) -> None:
    shared = [1, 2]
    data = {
        "a": [1, -2, 2**70, 1.5, None, True, False],
        "b": ("x", b"bytes", "Grüße", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "c": {1, 2, 3},
        "d": OrderedDict([("k", shared), ("l", shared)]),
        (1, "t"): frozenset({4}),
        "bytes": bytes(range(256)) * 3,
    }
    found = unpickle(pickle.dumps(data, protocol=protocol))
    assert found == data
    assert isinstance(found["d"], OrderedDict)
    assert found["d"]["k"] is found["d"]["l"]


def test_default_dict_keeps_its_items_but_not_its_factory() -> None:
    found = unpickle(pickle.dumps(defaultdict(list, a=[1])))
    assert type(found) is dict
    assert found == {"a": [1]}


def test_a_list_that_holds_itself_is_read() -> None:
    loop: list[Any] = []
    loop.append(loop)
    found = unpickle(pickle.dumps(loop))
    assert found[0] is found


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x) | st.tuples(x, x),
        max_leaves=20,
    ),
    st.integers(0, pickle.HIGHEST_PROTOCOL),
)
def test_any_plain_data_reads_as_pickle_reads_it(data: Any, protocol: int) -> None:
    assert unpickle(pickle.dumps(data, protocol=protocol)) == data


@given(st.binary(max_size=200))
def test_random_bytes_give_an_error_or_data(data: bytes) -> None:
    with contextlib.suppress(PickleError):
        unpickle(data)


def test_every_instruction_is_known_or_refused_by_name() -> None:
    refused = []
    for opcode in pickletools.opcodes:
        try:
            unpickle(opcode.code.encode("latin1") + b"." * 20)
        except PickleError as error:
            if "is not read" in str(error):
                refused.append(opcode.name)
    assert set(refused) <= {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}


def test_nested_doubling_is_not_expanded() -> None:
    doubling = b"]q\x00" + b"".join(
        b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(100)
    )
    assert isinstance(unpickle(doubling + b"."), list)


def test_a_key_that_would_hash_for_ever_is_refused() -> None:
    doubling = b")q\x00" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(100)
    )
    for use in (b"}h\x64K\x01s.", b"\x8f(h\x64\x90.", b"(h\x64\x91.", b"ccollections\nOrderedDict\n(](h\x64K\x01lee"):
        with pytest.raises(PickleError):
            unpickle(doubling + use)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"K\x01",
        b"(.",
        b"h\x05.",
        b"N(e.",
        b"}(K\x01u.",
        b"}]K\x01s.",
        b"\x80\x09N.",
        b"X\xff\xff\xff\x7fabc.",
        b"\x8d" + struct.pack("<Q", 2**62) + b"abc.",
        b"\x8e" + struct.pack("<Q", 2**40) + b"abc.",
        b"r\xff\xff\xff\xff.",
        b"I" + b"9" * 5000 + b"\n.",
        b"K\x01Q.",
        b"\x82\x01.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00((NN}tR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"cos\nsystem\nVx\nR.",
    ],
)
def test_damage_is_an_error(data: bytes) -> None:
    with pytest.raises(PickleError):
        unpickle(data)


def saved(tmp_path: Path, value: Any, legacy: bool = False) -> Path:
    path = tmp_path / "saved.pt"
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_come_back_exactly(legacy: bool, tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]
    value = {
        "dtypes": [(base * 3).to(dtype) for dtype in dtypes],
        "view": base[1:3, ::2],
        "transposed": base.t(),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
        "parameter": nn.Parameter(base.clone()),
        "base": base,
    }
    found = restricted_load(saved(tmp_path, value, legacy))
    for a, b in zip(found.pop("dtypes"), value.pop("dtypes"), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for key, tensor in found.items():
        assert torch.equal(tensor, value[key]), key
        assert tensor.stride() == value[key].stride(), key
    assert found["view"].untyped_storage().data_ptr() == found["base"].untyped_storage().data_ptr()


def test_dtype_device_and_size_are_read_as_plain_values(tmp_path: Path) -> None:
    found = restricted_load(saved(tmp_path, [torch.float16, torch.device("cpu"), torch.Size([1, 2])]))
    assert found == [GlobalName("torch", "float16"), "cpu", (1, 2)]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_an_error_that_names_it(share: float, legacy: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.randn(50, 50), "v": torch.randn(10)}, legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"saved\.pt"):
        restricted_load(path)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"PK\x03\x04", b"hello", b"\x80", b"\x80\x02N.", b"<html>", b"\x00" * 99]
)
def test_what_is_no_checkpoint_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        restricted_load(path)


def test_a_missing_file_or_folder_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError, match=r"no such checkpoint|cannot read .* regular file"):
            restricted_load(path)


def tensor_pickle(count: str = "I4", key: str = "0", size: str = "I4", stride: str = "I1", offset: str = "I0") -> bytes:
    """Protocol-0 pickle of a float tensor [size] over storage `key`; arguments are instructions."""
    storage = f"(Vstorage\nctorch\nFloatStorage\nV{key}\nVcpu\n{count}\ntQ"
    return f"ctorch._utils\n_rebuild_tensor_v2\n({storage}{offset}\n({size}\nt({stride}\ntI00\nNtR.".encode()


FOUR = {"archive/data/0": struct.pack("<4f", 1, 2, 3, 4)}


def test_the_handwritten_tensor_is_well_formed(tmp_path: Path) -> None:
    assert restricted_load(zip_file(tmp_path / "a.pt", tensor_pickle(), FOUR)).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "change",
    [
        {"count": "I5"},
        {"count": f"L{2**45}L"},
        {"count": f"L{2**80}L"},
        {"count": "I-1"},
        {"size": "I5"},
        {"size": f"L{2**60}L", "stride": "I0"},
        {"size": "I-1"},
        {"size": "F2.0"},
        {"stride": "I2"},
        {"stride": "I-1"},
        {"offset": "I1"},
        {"offset": "I-1"},
        {"key": "1"},
        {"key": "../../etc/passwd"},
        {"key": "../data.pkl"},
    ],
)
def test_a_tensor_that_leaves_its_storage_is_an_error(change: dict[str, str], tmp_path: Path) -> None:
    path = zip_file(tmp_path / "a.pt", tensor_pickle(**change), FOUR)
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        restricted_load(path)


def test_declared_terabytes_in_the_old_format_are_not_allocated(tmp_path: Path) -> None:
    header = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    for body in (tensor_pickle(count=f"L{2**40}L"), b"\x8e" + struct.pack("<Q", 2**40) + b"abc."):
        path = tmp_path / "a.pt"
        path.write_bytes(header + body)
        with pytest.raises(CheckpointError):
            restricted_load(path)


def test_names_that_leave_the_archive_write_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    zip_file(folder / "a.pt", tensor_pickle(), FOUR | {"../evil.txt": b"x", "/tmp/evil.txt": b"x"})
    before = sorted(tmp_path.rglob("*"))
    assert restricted_load(folder / "a.pt").tolist() == [1, 2, 3, 4]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x00" * 10_000_000)
    with pytest.raises(CheckpointError, match="compressed"):
        restricted_load(path)


def test_flipped_bits_are_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.ones(1000)})
    data = bytearray(path.read_bytes())
    place = data.find(struct.pack("<4f", 1, 1, 1, 1))
    data[place + 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="saved"):
        restricted_load(path)


def test_a_zip_without_or_with_two_pickles_is_an_error(tmp_path: Path) -> None:
    path = zip_file(tmp_path / "a.pt", b"N.", {"other/data.pkl": b"N."})
    with pytest.raises(CheckpointError, match=r"2 entries named data\.pkl"):
        restricted_load(path)


def test_a_torchscript_program_is_named_as_such(tmp_path: Path) -> None:
    path = zip_file(tmp_path / "a.pt", b"N.", {"archive/constants.pkl": b"N."})
    with pytest.raises(CheckpointError, match="TorchScript"):
        restricted_load(path)
