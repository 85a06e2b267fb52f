"""A calibration from what a user has: pictures of any scene, of a target, or the files of other tools."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from runtime.alignment.material import Pictures
from runtime.alignment.targetless import ROLL, Alignment, align
from runtime.alignment.targets import Target, TargetAlignment, align_target
from runtime.calibration import Calibration, Stereo, plane_homography
from runtime.camera import Camera
from runtime.errors import InputError
from runtime.register import Registration

Progress = Callable[[float], None]
_LITTLE = 0.3  # of a's picture covered by the target, below which the rest is extrapolated


@dataclass(frozen=True)
class Lenses:
    """What is known of the cameras before any picture is looked at.

    Attributes:
        a, b: intrinsics, or None.
        stereo: position of the cameras, or None.
        fov: horizontal fields of view of a and b in degrees, or None.
    """

    a: Camera | None = None
    b: Camera | None = None
    stereo: Stereo | None = None
    fov: tuple[float, float] | None = None


def calibrate(
    pictures: Pictures | None,
    lenses: Lenses,
    *,
    target: Target | None = None,
    distance: float | None = None,
    roll: float = ROLL,
    progress: Progress = lambda share: None,
) -> tuple[Calibration, list[tuple[str, str]]]:
    """Calibrate two cameras.

    With a target its views decide; else the position of the cameras, where it is known, with the distance; else the
    pictures, of whatever scene.

    Args:
        pictures: pairs of both cameras; may be None where the position of the cameras is known.
        lenses: what is known of the cameras.
        target: the board in the pictures.
        distance: metres at which the pictures are to agree, for cameras of known position.
        roll: greatest roll between the cameras, in degrees, that is looked for without a target.
        progress: is told the share of the work that was just done.

    Returns:
        the calibration, and a report: (what, text) of each line.

    Raises:
        InputError: something is missing or contradictory, or the estimate is not to be trusted; the line says why.
    """
    a, b = _cameras(pictures, lenses)
    if target is not None:
        if pictures is None:
            raise InputError("a target needs pictures of it: give A and B")
        found = align_target(pictures.a, pictures.b, target, a, b, progress)
        return _of_target(found, target, len(pictures.names), distance)
    if lenses.stereo is not None:
        if distance is None:
            raise InputError("the position of the cameras needs a working distance: give --distance METRES")
        calibration = Calibration(
            a, b, plane_homography(a, b, lenses.stereo, distance), "stereo", distance=distance, stereo=lenses.stereo
        )
        return calibration, _described(calibration)
    if distance is not None:
        raise InputError(
            "--distance needs the position of the cameras: --from-kalibr, ROS files of a stereo calibration, or "
            "--target with --square"
        )
    if pictures is None:
        raise InputError("give A and B, pictures of both cameras; the files hold no position of the cameras")
    frames_a, frames_b = ([camera.undistort_image(image) for image in images] for camera, images in
                          ((a, pictures.a), (b, pictures.b)))  # fmt: skip
    alignment = align(frames_a, frames_b, magnification=_magnification(a, b, lenses), roll=roll, progress=progress)
    return _of_scene(alignment, a, b, len(pictures.names))


def _cameras(pictures: Pictures | None, lenses: Lenses) -> tuple[Camera, Camera]:
    """Both cameras in the size of the pictures, where there are any."""
    cameras = []
    for camera, images, name in (
        (lenses.a, pictures and pictures.a, "camera a"),
        (lenses.b, pictures and pictures.b, "camera b"),
    ):
        if images:
            size = images[0].shape[:2]
            cameras.append(Camera(size) if camera is None else camera.resized(size, name))
        elif camera is not None:
            cameras.append(camera)
        else:
            raise InputError("give A and B, pictures of both cameras, or --from-kalibr FILE --distance METRES")
    return cameras[0], cameras[1]


def _magnification(a: Camera, b: Camera, lenses: Lenses) -> float | None:
    """Pixels of b for one of a, from the focal lengths."""
    if a.matrix is not None and b.matrix is not None:
        return float(b.matrix[0, 0] / a.matrix[0, 0])
    if lenses.fov is None:
        return None
    for angle in lenses.fov:
        if not 1 <= angle <= 170:
            raise InputError(f"a horizontal field of view of {angle:g} degrees; give 1 to 170")
    focal_a, focal_b = (
        camera.size[1] / math.tan(math.radians(angle) / 2) for camera, angle in zip((a, b), lenses.fov, strict=True)
    )
    return focal_b / focal_a


def _of_scene(alignment: Alignment, a: Camera, b: Camera, pairs: int) -> tuple[Calibration, list[tuple[str, str]]]:
    if not alignment.trusted:
        raise InputError(
            f"no estimate that can be trusted from {pairs} pair{'s' if pairs > 1 else ''}: {alignment.reason}; give "
            "more pairs, of scenes with edges that both cameras see, the fields of view (--fov), or a --target"
        )
    calibration = Calibration(a, b, alignment.homography, "targetless", uncertainty=alignment.uncertainty)
    report = [
        *_described(calibration),
        ("uncertainty", f"{alignment.uncertainty:.1f} px of B at the corners of A's picture (95 %)"),
        ("trust", f"yes: two halves, searched independently, agree within {alignment.disagreement:.1f} px"),
    ]
    return calibration, report


def _of_target(
    found: TargetAlignment, target: Target, pairs: int, distance: float | None
) -> tuple[Calibration, list[tuple[str, str]]]:
    if distance is not None and found.stereo is None:
        raise InputError("--distance needs the position of the cameras: give the board's --square in mm too")
    method = "target" if found.stereo is None else "stereo"
    calibration = Calibration(
        found.a,
        found.b,
        found.homography,
        method,
        uncertainty=max(found.uncertainty, 0.1),
        distance=found.distance,
        stereo=found.stereo,
    )
    if distance is not None:
        calibration = calibration.at_distance(distance)
    report = [
        *_described(calibration),
        ("board", f"{target.kind} {target.columns}x{target.rows} found by both in {len(found.used)} of {pairs} pairs"),
        ("error", f"{found.rms:.2f} px of B (RMS)"),
        (
            "uncertainty",
            f"{found.uncertainty:.1f} px of B at the corners of A's picture (95 %), at the board's distance",
        ),
        ("covered", f"{100 * found.covered:.0f} % of A's picture"),
    ]
    if found.covered < _LITTLE:
        report.append(("warning", "the board covered little of A's picture: move it to the corners too"))
    return calibration, report


def _described(calibration: Calibration) -> list[tuple[str, str]]:
    """Lines of what every calibration has."""
    registration = Registration(calibration)
    to_a = Registration(calibration, reference="a")
    matrix = calibration.homography
    (height_a, width_a), (height_b, width_b) = calibration.a.size, calibration.b.size
    middle = matrix @ np.array([(width_a - 1) / 2, (height_a - 1) / 2, 1])
    x, y = middle[:2] / middle[2]
    jacobian = (matrix[:2, :2] - np.outer((x, y), matrix[2, :2])) / middle[2]
    magnification = math.sqrt(abs(np.linalg.det(jacobian)))
    roll = math.degrees(math.atan2(jacobian[1, 0] - jacobian[0, 1], jacobian[0, 0] + jacobian[1, 1]))
    lines = [
        ("cameras", f"A {width_a}x{height_a}, B {width_b}x{height_b}"),
        (
            "estimate",
            f"{magnification:.3f} px of B for one of A, roll {roll:+.2f} degrees, A's centre at "
            f"({x:.1f}, {y:.1f}) of B",
        ),
        (
            "common field",
            f"{100 * float((registration.mask > 0).mean()):.0f} % of B's picture, "
            f"{100 * float((to_a.mask > 0).mean()):.0f} % of A's",
        ),
    ]
    distance = calibration.distance
    if distance is not None and calibration.stereo is not None:
        baseline = 1000 * float(np.linalg.norm(calibration.stereo.translation))
        errors = ", ".join(
            f"{calibration.parallax(at):.1f} px at {'infinity' if math.isinf(at) else f'{at:g} m'}"
            for at in (distance / 2, 2 * distance, math.inf)
        )
        lines.append(("distance", f"{distance:g} m, baseline {baseline:.0f} mm; out of place by {errors}"))
    return lines
