"""`refusion calibrate`: how two cameras lie to each other, written as a YAML file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from refusion.cli.parsing import Subparsers
from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.alignment.calibrate import Lenses

_FRAMES, _FRAMES_TARGET = 8, 40


def add_calibrate_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="find how two cameras lie to each other",
        description="Find the homography that lays camera A's pictures (infrared) on camera B's (visible): from "
        "pictures of any scene, of a target that both see, or from the files of ROS and Kalibr. Writes a YAML file and "
        "a picture to confirm it by. A homography aligns one distance.",
    )
    parser.set_defaults(run=run_calibrate)
    parser.add_argument(
        "a", nargs="?", metavar="A", help="infrared: an image, a folder of images, a video, or a camera's URI"
    )
    parser.add_argument("b", nargs="?", metavar="B", help="visible: the same; folders are matched by the images' names")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="the calibration, .yaml")
    parser.add_argument("--picture", metavar="FILE", help="the picture to confirm by (default: OUT with .png)")
    parser.add_argument("--no-picture", action="store_true", help="write none")
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help=f"pairs to use at most, spread evenly (default: {_FRAMES}, with a target {_FRAMES_TARGET})",
    )
    parser.add_argument(
        "--fov", type=float, nargs=2, metavar=("A", "B"), help="horizontal fields of view in degrees, if known"
    )
    parser.add_argument(
        "--roll",
        type=float,
        metavar="DEGREES",
        help="greatest roll between the cameras that is looked for (default: 4)",
    )
    parser.add_argument(
        "--target",
        metavar="KIND:CxR",
        help="a board that both cameras see: chessboard:9x6 (inner corners), circles:7x5 or asymmetric:4x11",
    )
    parser.add_argument(
        "--square",
        type=float,
        metavar="MM",
        help="between neighbouring corners or circles; finds the cameras' position, and with it every distance",
    )
    parser.add_argument("--from-ros", nargs=2, metavar=("A", "B"), help="camera_calibration files of both cameras")
    parser.add_argument("--from-kalibr", metavar="FILE", help="camchain.yaml")
    parser.add_argument(
        "--kalibr-cameras", nargs=2, default=("cam0", "cam1"), metavar=("A", "B"), help="(default: cam0 cam1)"
    )
    parser.add_argument("--distance", type=float, metavar="M", help="working distance in metres, for a known position")


def run_calibrate(args: argparse.Namespace) -> None:
    from runtime.alignment.calibrate import calibrate
    from runtime.alignment.material import read_pairs
    from runtime.alignment.picture import confirmation_picture
    from runtime.alignment.targetless import ROLL
    from runtime.alignment.targets import parse_target
    from runtime.calibration import save_calibration
    from runtime.images import check_writable, write_image

    out, picture = _outputs(args)
    if picture is not None:
        check_writable(picture)
    target = parse_target(args.target, args.square) if args.target else None
    if args.square is not None and target is None:
        raise InputError("--square is the size of a board; give --target too")
    if (args.a is None) != (args.b is None):
        raise InputError("give both A and B, or neither with --from-kalibr")
    lenses = _lenses(args)
    start = time.perf_counter()
    with _progress_bar() as progress:
        pictures = None
        if args.a is not None:
            default = _FRAMES_TARGET if target else _FRAMES
            count = default if args.frames is None else args.frames
            pictures = read_pairs(args.a, args.b, count, lambda share: progress(0.2 * share))
        roll = ROLL if args.roll is None else args.roll
        calibration, report = calibrate(
            pictures,
            lenses,
            target=target,
            distance=args.distance,
            roll=roll,
            progress=lambda share: progress(0.8 * share),
        )
    if pictures is not None and picture is not None:
        middle = len(pictures.names) // 2
        write_image(picture, confirmation_picture(pictures.a[middle], pictures.b[middle], calibration))
    save_calibration(out, calibration)
    pairs = f" from {len(pictures.names)} pairs" if pictures is not None else ""
    print(f"{calibration.method} calibration{pairs} in {time.perf_counter() - start:.1f} s")
    for what, text in report:
        print(f"  {what:13} {text}")
    print(f"calibration: {out}")
    if pictures is not None and picture is not None:
        print(f"look at it before you rely on it: {picture}")


def _outputs(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The calibration's file and the picture's, or None; neither may replace what is read."""
    out = Path(args.out)
    if out.suffix.lower() not in (".yaml", ".yml"):
        raise InputError(f"{out}: the calibration is a YAML file; end its name with .yaml")
    picture = None if args.no_picture else Path(args.picture or out.with_suffix(".png"))
    sources = [Path(name).resolve() for name in (args.a, args.b, *(args.from_ros or ()), args.from_kalibr) if name]
    for path in filter(None, (out, picture)):
        if path.is_dir():
            raise InputError(f"{path}: a folder; give the name of a file")
        if path.resolve() in sources:
            raise InputError(f"output {path} would replace a source; give another name")
    return out, picture


def _lenses(args: argparse.Namespace) -> Lenses:
    from runtime.alignment.calibrate import Lenses
    from runtime.camera_files import read_kalibr_pair, read_ros_pair

    if args.from_ros and args.from_kalibr:
        raise InputError("--from-ros and --from-kalibr describe the same cameras; give one of them")
    fov = tuple(args.fov) if args.fov else None
    if args.from_kalibr:
        return Lenses(*read_kalibr_pair(args.from_kalibr, tuple(args.kalibr_cameras)), fov)
    if args.from_ros:
        return Lenses(*read_ros_pair(*args.from_ros), fov)
    return Lenses(fov=fov)


@contextmanager
def _progress_bar() -> Iterator[Callable[[float], None]]:
    """A bar that is told shares of the work, which sum to 1."""
    from tqdm import tqdm

    layout = "{desc}: {percentage:3.0f} %|{bar}| {elapsed}"
    with tqdm(total=1.0, desc="calibrating", bar_format=layout, disable=None, leave=False) as bar:
        yield bar.update
