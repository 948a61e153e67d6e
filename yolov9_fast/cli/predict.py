"""`yolov9-fast predict`: objects in images, folders, globs, lists, videos, webcams and streams."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from yolov9_fast._capture import MODES
from yolov9_fast._text import printable
from yolov9_fast.cli.output import say
from yolov9_fast.data import Frame, open_source
from yolov9_fast.engine.config import AMP_MODES
from yolov9_fast.engine.prediction_files import PredictionFiles
from yolov9_fast.engine.predictor import Prediction, Predictor
from yolov9_fast.engine.run_files import new_run
from yolov9_fast.errors import UserError

_REPORTED_FRAMES = 100
_LISTED_FAILURES = 10
WHEN_BUSY = "waits"
"""See `engine.share_cores`."""
_EPILOG = """examples:
  yolov9-fast predict --weights best.safetensors --source images/
  yolov9-fast predict --weights yolov9-c.pt --source "images/**/*.jpg" clip.mp4 --classes person dog
  yolov9-fast predict --weights best.safetensors --source 0                       the first webcam
  yolov9-fast predict --weights best.safetensors --source rtsp://camera/stream --vid-stride 5
  yolov9-fast predict --weights best.safetensors --source list.txt --save-txt --save-json --no-save

Files in PROJECT/NAME: annotated images (videos as .mp4), labels/*.txt with --save-txt, predictions.json with
--save-json. A file that cannot be read or written is named, counted and skipped, so are the frames of a video; the
exit code is 1 if none could be read, or one could not be written."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("--weights", required=True, metavar="FILE", help="weights of this project, or a foreign checkpoint")
    add(
        "--source",
        required=True,
        nargs="+",
        metavar="SOURCE",
        help="image, video, folder, glob, .txt list, webcam number or stream address; several allowed",
    )
    add("--imgsz", type=int, default=640, metavar="N", help="long side in pixels (default %(default)s)")
    add("--conf", type=float, default=0.25, metavar="X", help="lowest confidence (default %(default)s)")
    add("--iou", type=float, default=0.45, metavar="X", help="IoU threshold of NMS (default %(default)s)")
    add("--max-det", type=int, default=1000, metavar="N", help="detections per image (default %(default)s)")
    add("--classes", nargs="+", metavar="CLASS", help="only these classes, by index or name")
    add("--agnostic", action="store_true", help="boxes of different classes suppress each other too")
    add("--save", action=argparse.BooleanOptionalAction, default=True, help="write annotated images (default on)")
    add("--save-txt", action="store_true", help="write labels/*.txt: class cx cy w h, normalised")
    add("--save-conf", action="store_true", help="the score as the last number of each row of the text")
    add("--save-json", action="store_true", help="write predictions.json, boxes in pixels")
    add("--line-width", type=int, metavar="N", help="width of lines in pixels (default: by the image's size)")
    add("--hide-labels", action="store_true", help="draw boxes without names")
    add("--hide-conf", action="store_true", help="draw names without scores")
    add("--vid-stride", type=int, default=1, metavar="N", help="use every n-th frame of videos (default %(default)s)")
    add("--device", help="cpu or a GPU's number (default: a GPU if there is one)")
    add("--deterministic", action="store_true", help="the same bits in every run, also on a GPU; slower there")
    add("--capture", choices=MODES, default="auto", help="CUDA graphs for shapes that repeat (default %(default)s)")
    add("--amp", choices=AMP_MODES, default="off", help="mixed precision (default %(default)s)")
    add("--project", default="runs/predict", metavar="DIR", help="folder of runs (default %(default)s)")
    add("--name", default="exp", help="name of this run (default %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    for flag, value in (("--vid-stride", arguments.vid_stride), ("--line-width", arguments.line_width)):
        if value is not None and value < 1:
            raise UserError(f"{flag}: expected at least 1, got {value}")
    predictor = Predictor(
        arguments.weights,
        arguments.imgsz,
        arguments.conf,
        arguments.iou,
        arguments.max_det,
        classes=arguments.classes,
        agnostic=arguments.agnostic,
        device=arguments.device,
        amp=arguments.amp,
        deterministic=arguments.deterministic,
        capture=arguments.capture,
    )
    frames = open_source(arguments.source)
    output = new_run(arguments.project, arguments.name)  # Kept to the end: while it is empty, others could take it.
    files = PredictionFiles(
        output.path,
        images=arguments.save,
        text=arguments.save_txt,
        confidence=arguments.save_conf,
        json=arguments.save_json,
        line_width=arguments.line_width,
        hide_labels=arguments.hide_labels,
        hide_conf=arguments.hide_conf,
        frame_step=arguments.vid_stride,
    )
    network = f"{predictor.model.graph_name}, fused, on {predictor.device}, {predictor.image_size} px"
    say(printable(f"{arguments.weights}: {network}"))
    read, skipped, failed = predict_all(predictor, _every_nth(frames, arguments.vid_stride), files)
    rest = f", {skipped} unreadable and skipped" if skipped else ""
    rest += f", {failed} not written" if failed else ""
    say(printable(f"{read} image{'s' if read != 1 else ''}{rest}; results in {files.folder}"))
    return 0 if read and not failed else 1


def predict_all(
    predictor: Predictor, frames: Iterator[Frame], files: PredictionFiles, *, verbose: bool = True
) -> tuple[int, int, int]:
    """Predict, write and, if `verbose`, print a line per image.

    Returns:
        The numbers of images that were read, that could not be read, and whose files could not all be written.
    """
    read = skipped = failed = 0
    try:
        for frame, prediction in predictor.stream(frames):
            if prediction is None:
                skipped += frame.lost
                _warn(f"skipped: {frame.error}")
                continue
            read += 1
            try:
                files.write(frame, prediction)
            except UserError as error:
                failed += 1
                if failed <= _LISTED_FAILURES:
                    _warn(f"not written: {error}")
            if verbose and (frame.frame // files.frame_step) % _REPORTED_FRAMES == 0:
                say(printable(_line(frame, prediction)))
    finally:
        try:
            files.close()
        except UserError as error:
            failed += 1
            _warn(f"not written: {error}")
    return read, skipped, failed


def _warn(text: str) -> None:
    print(f"warning: {printable(text)}", file=sys.stderr)


def _line(frame: Frame, prediction: Prediction) -> str:
    where = f"{frame.path} frame {frame.frame}" if frame.is_video else frame.path
    found = ", ".join(f"{number} {name}" for name, number in prediction.counts().items()) or "nothing"
    height, width = prediction.shape
    return f"{where}: {width}x{height}, {found}, {1000 * prediction.seconds:.0f} ms"


def _every_nth(frames: Iterator[Frame], step: int) -> Iterator[Frame]:
    return (frame for frame in frames if frame.image is None or frame.frame % step == 0)
