"""Targets of the readers of data files, graphs, annotations, labels, lists of images and images."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from hypothesis import strategies as st

from tests.fuzz.frame import Case, target
from tests.fuzz.readers import changed, hostile_text, json_text, mutated, refused_or_read, watched
from tests.fuzz.targets_checkpoints import TINY
from yolov9_fast.data.coco import coco_ground_truth
from yolov9_fast.data.config import load_data_config
from yolov9_fast.data.images import read_image
from yolov9_fast.data.labels import load_split
from yolov9_fast.data.sources import open_source
from yolov9_fast.engine.config import read_config
from yolov9_fast.limits import limit
from yolov9_fast.models.graph import load_graph
from yolov9_fast.models.model import create_model

SECONDS = 30.0
SIZE = (24, 32)


@cache
def folder() -> Path:
    """A folder of this process with a data set: `images/a.png`, `images/b.jpg`, labels, and `data.yaml`."""
    path = Path(tempfile.mkdtemp(prefix="fuzz_data_"))
    os.environ["YOLOV9_FAST_CACHE"] = str(path / "cache")
    for name in ("images", "labels"):
        (path / name).mkdir()
    for name in ("a.png", "b.jpg"):
        cv2.imwrite(str(path / "images" / name), _pixels())
    (path / "labels/a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (path / "data.yaml").write_text(yaml.safe_dump(DATA))
    read_data(path / "data.yaml")  # imports, before imports are watched
    return path


def _pixels() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)


DATA = {"path": ".", "names": ["a", "b"], "nc": 2, "train": "images", "val": {"images": ["images"]}}


def read_data(path: Path) -> None:
    config = load_data_config(path)
    for split in config.splits:
        load_split(config, split, for_training=False)


# ---- YAML

_FRAGMENTS = [
    *(b"&a [1, 2]", b"*a", b"<<: *a", b"&b {<<: *b}", b"!!python/object/apply:os.system [touch x]", b"!!binary x"),
    *(
        b"2024-99-99",
        b"0x",
        b"0o777",
        b"1_000",
        b"1e999",
        b".nan",
        b"190:20:30",
        b"~",
        b"'",
        b'"',
        b"\\x1b",
        b"? a : b",
    ),
    *(b"- - - -", b"{" * 3000, b"[" * 3000, b"9" * 5000, b"\xff\xfe", b"\xef\xbb\xbf", b"--- \n...\n---", b"%YAML 9.9"),
    b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nnames: [*e,*e,*e,*e,*e,*e,*e,*e,*e]",
]


@st.composite
def yaml_files(draw: st.DrawFn, valid: Any) -> bytes:
    """YAML near `valid`: some of its nodes changed, its bytes changed, or fragments put into it."""
    kind = draw(st.sampled_from(["nodes", "nodes", "bytes", "fragments"]))
    if kind == "nodes":
        return json_text(draw(changed(valid)))  # JSON is YAML
    text = yaml.safe_dump(valid).encode()
    if kind == "bytes":
        return draw(mutated(text))
    for _ in range(draw(st.integers(1, 3))):
        # at the end of a key, where a value is expected, or anywhere
        places = [place + 1 for place, byte in enumerate(text) if byte in b":-\n,["]
        place = draw(st.sampled_from(places) | st.integers(0, len(text)))
        text = text[:place] + b" " + draw(st.sampled_from(_FRAGMENTS)) + b" " + text[place:]
    return text


@target("yaml_data", memory_mib=1024, case_seconds=SECONDS)
def yaml_data(case: Case) -> None:
    path = folder() / "x.yaml"
    path.write_bytes(case.draw(yaml_files(DATA), "file"))
    with watched(folder()):
        refused_or_read(lambda: read_data(path), path, folder())


@target("yaml_graph", memory_mib=6144, case_seconds=60)
def yaml_graph(case: Case) -> None:
    path = folder() / "g.yaml"
    path.write_bytes(case.draw(yaml_files(TINY), "file"))
    with watched(folder()):
        graph = refused_or_read(lambda: load_graph(path), path, folder())
    if graph is not None:
        with suppress(ValueError):  # an argument of `create_model`, which the command line turns into an error
            refused_or_read(lambda: create_model(graph, 2), path)


@target("yaml_options", memory_mib=1024, case_seconds=SECONDS)
def yaml_options(case: Case) -> None:
    path = folder() / "config.yaml"
    options = {"data": "data.yaml", "model": "gelan-t", "imgsz": 64, "batch": 2, "lr0": 0.01, "amp": "off"}
    path.write_bytes(case.draw(yaml_files(options), "file"))
    with watched(folder()):
        refused_or_read(lambda: read_config(path), path, folder())


# ---- annotations and labels

COCO = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": SIZE[1], "height": SIZE[0]},
        {"id": 2, "file_name": "b.jpg", "width": SIZE[1], "height": SIZE[0]},
    ],
    "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    "annotations": [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 1,
            "bbox": [2, 2, 10, 10],
            "area": 100,
            "iscrowd": 0,
            "segmentation": [[2, 2, 12, 2, 12, 12]],
        },
        {
            "id": 2,
            "image_id": 2,
            "category_id": 2,
            "bbox": [2, 2, 10, 10],
            "area": 100,
            "iscrowd": 1,
            "segmentation": {"counts": [1, 2], "size": list(SIZE)},
        },
    ],
}


@target("coco_json", memory_mib=1024, case_seconds=SECONDS)
def coco_json(case: Case) -> None:
    path = folder() / "coco.json"
    if case.draw(st.booleans(), "nodes"):
        path.write_bytes(json_text(case.draw(changed(COCO), "content")))
    else:
        path.write_bytes(case.draw(mutated(json.dumps(COCO).encode()), "file"))
    data = folder() / "coco.yaml"
    data.write_text(yaml.safe_dump(DATA | {"val": {"images": "images", "annotations": path.name}}))

    def read() -> None:
        config = load_data_config(data)
        records, report = load_split(config, "val", for_training=False)
        report.summary()
        truth = coco_ground_truth(config, "val", records)
        json.dumps(truth, allow_nan=False)
        assert all(record.boxes.min(initial=0) >= 0 and record.boxes[:, 1:].max(initial=0) <= 1 for record in records)

    with watched(folder()):
        refused_or_read(read, path, data, folder())


_WORDS = [
    "0",
    "1",
    "2",
    "-1",
    "0.5",
    "1.5",
    "nan",
    "inf",
    "1e999",
    "1e-400",
    "x",
    "0.5,0.5",
    "1_0",
    "٣",
    "\x1b[2J",
    "\0",
]
_ROWS = st.lists(st.sampled_from(_WORDS) | st.floats(0, 1).map(str), min_size=1, max_size=12).map(" ".join)


@target("labels", memory_mib=1024, case_seconds=SECONDS)
def labels(case: Case) -> None:
    base = folder()
    if case.draw(st.booleans(), "rows"):
        rows = case.draw(st.lists(_ROWS, max_size=5), "text")
        text = case.draw(st.sampled_from(["\n", "\r\n", "\r", "\x0b", " "]), "separator").join(rows).encode()
        text *= case.draw(st.sampled_from([1, 1, 1, 10_000]), "times")
    else:
        text = case.draw(mutated(b"0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.3 0.1 0.3 0.3\n"), "file")
    (base / "labels/a.txt").write_bytes(text)

    def read() -> None:
        records, report = load_split(load_data_config(base / "data.yaml"), "train", for_training=False)
        report.summary()
        for record in records:
            assert np.isfinite(record.boxes).all()
            assert (record.boxes[:, 1:] >= 0).all()
            assert (record.boxes[:, 1:] <= 1).all()

    with watched(base):
        refused_or_read(read, base)


_LINES = [
    "images/a.png",
    "./images/../images/b.jpg",
    "images",
    "#",
    "",
    "../x",
    "images\\a.png",
    "http://x/y.png",
    "\0",
]


@target("image_list", memory_mib=1024, case_seconds=SECONDS)
def image_list(case: Case) -> None:
    base = folder()
    lines = case.draw(st.lists(st.sampled_from(_LINES) | hostile_text(), max_size=6), "lines")
    text = "\n".join(lines).replace("@long", "x" * 100_000).encode(errors="surrogatepass")
    if case.draw(st.booleans(), "mutate"):
        text = case.draw(mutated(text), "file")
    (base / "list.txt").write_bytes(text)
    (base / "list.yaml").write_text(yaml.safe_dump(DATA | {"train": "list.txt"}))
    with watched(base):
        refused_or_read(lambda: read_data(base / "list.yaml"), base)


# ---- images

_SUFFIXES = [".png", ".jpg", ".webp", ".tiff", ".bmp", ".ppm"]

_WITH_ALPHA = (".png", ".webp", ".tiff")


@cache
def _encoded(suffix: str, kind: str) -> bytes:
    pixels = _pixels()
    if kind == "alpha":
        pixels = np.dstack([pixels, pixels[:, :, :1]])
    elif kind == "grey":
        pixels = pixels[:, :, 0]
    done, data = cv2.imencode(suffix, pixels)
    assert done
    return data.tobytes()


@target("images", memory_mib=4096, case_seconds=SECONDS)
def images(case: Case) -> None:
    suffix = case.draw(st.sampled_from(_SUFFIXES), "suffix")
    kinds = ["colours", *(["grey"] if suffix != ".ppm" else []), *(["alpha"] if suffix in _WITH_ALPHA else [])]
    path = folder() / f"x{case.draw(st.sampled_from([suffix, '.jpg']), 'name')}"
    path.write_bytes(case.draw(mutated(_encoded(suffix, case.draw(st.sampled_from(kinds), "kind"))), "file"))
    with watched(folder()):
        image = refused_or_read(lambda: read_image(path), path)
    if image is not None:
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        assert image.shape[0] * image.shape[1] <= limit("IMAGE_PIXELS")


@target("sources", memory_mib=4096, case_seconds=SECONDS)
def sources(case: Case) -> None:
    base = folder()
    name = case.draw(st.sampled_from(["x.avi", "x.mp4", "x.gif", "x.txt", "x.png"]), "name")
    if case.draw(st.booleans(), "video"):
        (base / name).write_bytes(case.draw(mutated(_video()), "file"))
    else:
        (base / name).write_bytes(case.draw(st.binary(max_size=200), "file"))

    def read() -> None:
        for number, frame in enumerate(open_source(base / name)):
            assert (frame.image is None) == bool(frame.error)
            assert number < 1000

    with watched(base):
        refused_or_read(read, base)


@cache
def _video() -> bytes:
    path = folder() / "valid.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, SIZE[::-1])
    for _ in range(4):
        writer.write(_pixels())
    writer.release()
    return path.read_bytes()
