"""Real data sets: counts, and augmented batches with objects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from yolov9_fast.data import (
    AugmentConfig,
    DetectionDataset,
    category_ids,
    coco_ground_truth,
    create_loader,
    load_data_config,
    load_split,
)


def config_of(tmp_path: Path, **content: object):
    file = tmp_path / "data.yaml"
    file.write_text(json.dumps(content))
    return load_data_config(file)


def bccd(tmp_path: Path, shared: Path):
    splits = {key: {"images": "images", "annotations": f"bccd_{key}.json"} for key in ("train", "val", "test")}
    return config_of(
        tmp_path, path=str((shared / "data" / "bccd").resolve()), names=["RBC", "WBC", "Platelets"], **splits
    )


@pytest.mark.parametrize(("split", "images", "objects"), [("train", 205, 2804), ("val", 87, 1137), ("test", 72, 945)])
def test_blood_cells_are_read_completely(tmp_path: Path, shared: Path, split: str, images: int, objects: int) -> None:
    config = bccd(tmp_path, shared)
    records, report = load_split(config, split, for_training=split == "train")
    assert (report.images, report.objects, report.skipped) == (images, objects, [])
    gt = coco_ground_truth(config, split, records)
    assert (len(gt["images"]), len(gt["annotations"])) == (images, objects)
    assert category_ids(config, split) == [1, 2, 3]


def test_blood_cells_give_training_batches(tmp_path: Path, shared: Path) -> None:
    records, _ = load_split(bccd(tmp_path, shared), "train", for_training=True)
    dataset = DetectionDataset(records[:16], image_size=320, augment=AugmentConfig())
    batch = next(iter(create_loader(dataset, batch_size=8, shuffle=True)))
    assert batch.images.shape == (8, 3, 320, 320)
    assert len(batch.targets) > 40


def test_coco_keeps_its_91_categories_and_crowds(tmp_path: Path, shared: Path) -> None:
    folder = (shared / "data" / "coco_val79").resolve()
    source = json.loads((folder / "instances_val.json").read_text())
    names = [item["name"] for item in sorted(source["categories"], key=lambda item: item["id"])]
    config = config_of(
        tmp_path, path=str(folder), names=names, val={"images": "images", "annotations": "instances_val.json"}
    )
    records, report = load_split(config, "val", for_training=False)
    gt = coco_ground_truth(config, "val", records)
    crowds = sum(entry["iscrowd"] for entry in source["annotations"])
    assert (report.images, report.objects + crowds, len(gt["annotations"])) == (79, 750, 750)
    assert len(category_ids(config, "val")) == 80
    assert category_ids(config, "val")[-1] == 90
    assert sum(record.polygons is not None for record in records) > 70
