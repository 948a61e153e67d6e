"""Datasets: the data file, checked labels, augmentation, loaders, and sources of images to predict on."""

from yolov9_fast.data.augment import AugmentConfig, LabelledImage
from yolov9_fast.data.coco import category_ids, coco_ground_truth, open_annotations
from yolov9_fast.data.coco_file import CocoFile
from yolov9_fast.data.config import DataConfig, Split, load_data_config
from yolov9_fast.data.custom import Augmentation
from yolov9_fast.data.dataset import DetectionDataset, SampleKey
from yolov9_fast.data.images import Letterboxed, letterbox, read_image, scale_boxes_to_original, to_tensor
from yolov9_fast.data.labels import load_split
from yolov9_fast.data.loader import DetectionLoader, create_loader
from yolov9_fast.data.records import ImageRecord, LabelReport
from yolov9_fast.data.sample import Batch, Sample
from yolov9_fast.data.sources import Frame, open_source

__all__ = [
    "AugmentConfig",
    "Augmentation",
    "Batch",
    "CocoFile",
    "DataConfig",
    "DetectionDataset",
    "DetectionLoader",
    "Frame",
    "ImageRecord",
    "LabelReport",
    "LabelledImage",
    "Letterboxed",
    "Sample",
    "SampleKey",
    "Split",
    "category_ids",
    "coco_ground_truth",
    "create_loader",
    "letterbox",
    "load_data_config",
    "load_split",
    "open_annotations",
    "open_source",
    "read_image",
    "scale_boxes_to_original",
    "to_tensor",
]
