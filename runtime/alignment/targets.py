"""Registration with a target that both cameras see: a chessboard or a grid of circles.

A thermal camera sees a board whose dark parts are warmer (in the sun, or under a lamp), or a metal plate with holes
before something warm; its contrast may be inverted, and is tried both ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.alignment.fields import corners, to_grey, transform
from runtime.calibration import Stereo
from runtime.camera import Camera, Matrix, Points
from runtime.errors import InputError

KINDS = ("chessboard", "circles", "asymmetric")
LEAST_VIEWS = 3
LEAST_VIEWS_INTRINSICS = 6
LARGEST_RMS = 5.0  # pixels, above which a homography does not describe the views
_OUTLIER = 4.0  # times the median error of a view, above which the view is left out
_DETECTION_SIDE = 1600  # pixels, to which larger pictures are reduced while the board is looked for


@dataclass(frozen=True)
class Target:
    """A board.

    Attributes:
        kind: one of KINDS.
        columns, rows: of inner corners of a chessboard, or of circles; for "asymmetric" as OpenCV counts them (4x11).
        square: metres between neighbours, or 0 where it isn't known; for "asymmetric" between neighbouring rows.
    """

    kind: str
    columns: int
    rows: int
    square: float = 0.0

    @property
    def points(self) -> NDArray[np.float32]:
        """Points of the board in its plane, in metres (in squares where `square` is 0), in OpenCV's order: Nx3."""
        row, column = np.divmod(np.arange(self.columns * self.rows), self.columns)
        x = 2 * column + row % 2 if self.kind == "asymmetric" else column
        return (np.column_stack((x, row, np.zeros(len(row)))) * (self.square or 1)).astype(np.float32)


def parse_target(text: str, square_mm: float | None = None) -> Target:
    """Target of a text such as chessboard:9x6, circles:7x5 or asymmetric:4x11.

    Raises:
        InputError: another text, or a square that isn't above 0.
    """
    match = re.fullmatch(r"([a-z]+):(\d+)x(\d+)", text)
    if not match or match[1] not in KINDS or min(int(match[2]), int(match[3])) < 3:
        raise InputError(f"target '{text}' is not understood; give chessboard:9x6, circles:7x5 or asymmetric:4x11")
    if square_mm is not None and not 0 < square_mm < 10000:
        raise InputError(f"a square of {square_mm:g} mm; give its side in mm")
    return Target(match[1], int(match[2]), int(match[3]), (square_mm or 0) / 1000)


@dataclass(frozen=True, eq=False)
class TargetAlignment:
    """What views of a target gave.

    Attributes:
        homography: 3x3, undistorted pixels of a -> undistorted pixels of b.
        rms: root mean square distance, in pixels of b, of the points under it.
        uncertainty: the corners of a's picture are right to this many pixels of b in 95 % of cases, for the board's
            distance.
        used: numbers of the views that were used.
        covered: share of a's picture inside the hull of all points.
        a, b: the cameras; with the intrinsics that were found where `stereo` is there.
        stereo: position of the cameras, where the square's size is known, else None.
        distance: median metres to the board, or None.
    """

    homography: Matrix
    rms: float
    uncertainty: float
    used: tuple[int, ...]
    covered: float
    a: Camera
    b: Camera
    stereo: Stereo | None = None
    distance: float | None = None


def find_target(image: np.ndarray, target: Target) -> Points | None:
    """Points of the board in a picture, or None where it isn't found: Nx2, in the order of `Target.points`.

    Args:
        image: HxW or HxWx3 (BGR), uint8 or uint16; contrast inverted or not.
    """
    grey = np.clip(to_grey(image), 0, 255).astype(np.uint8)
    scale = min(1.0, _DETECTION_SIDE / max(grey.shape))
    small = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else grey
    for candidate in (small, 255 - small):
        found = _find_chessboard(candidate, target) if target.kind == "chessboard" else _find_circles(candidate, target)
        if found is not None:
            return (found.reshape(-1, 2).astype(np.float64) + 0.5) / scale - 0.5
    return None


def align_target(
    frames_a: Sequence[np.ndarray],
    frames_b: Sequence[np.ndarray],
    target: Target,
    a: Camera,
    b: Camera,
    progress: Callable[[float], None] = lambda share: None,
) -> TargetAlignment:
    """Calibrate two cameras from views of a target that both see at once.

    The homography is fitted to the points of all views. Where the square's size is known, the position of the cameras
    is found too, and intrinsics of a camera that has none.

    Args:
        frames_a, frames_b: N pictures each, as the cameras give them.
        target: the board.
        a, b: the cameras, with intrinsics where they are known.
        progress: is told the share of the work that was just done.

    Raises:
        InputError: the board is found in too few pairs, or one homography doesn't describe them.
    """
    points_a, points_b, views = _find_in_pairs(frames_a, frames_b, target, progress)
    if target.square:
        return _stereo(points_a, points_b, views, target, a, b)
    return _homography(points_a, points_b, views, a, b)


def _find_in_pairs(
    frames_a: Sequence[np.ndarray], frames_b: Sequence[np.ndarray], target: Target, progress: Callable[[float], None]
) -> tuple[list[Points], list[Points], list[int]]:
    points_a, points_b, views, seen = [], [], [], [0, 0]
    for number, (frame_a, frame_b) in enumerate(zip(frames_a, frames_b, strict=True)):
        in_a, in_b = find_target(frame_a, target), find_target(frame_b, target)
        seen = [seen[0] + (in_a is not None), seen[1] + (in_b is not None)]
        if in_a is not None and in_b is not None:
            points_a.append(in_a)
            points_b.append(in_b if target.kind == "asymmetric" else _same_order(in_a, in_b))
            views.append(number)
        progress(1 / len(frames_a))
    if len(views) < LEAST_VIEWS:
        raise InputError(
            f"the {target.kind} of {target.columns}x{target.rows} was found by both cameras in {len(views)} of "
            f"{len(frames_a)} pairs (camera a {seen[0]}, camera b {seen[1]}); {LEAST_VIEWS} or more are needed: "
            "check the counts, and that the board is warm or cold enough for the thermal camera"
        )
    return points_a, points_b, views


def _same_order(points_a: Points, points_b: Points) -> Points:
    """Points of b in the order of a's: where contrast is inverted a board may be read from its other end.

    The cameras are taken to be upright to each other, or nearly.
    """
    reading_a, reading_b = points_a[-1] - points_a[0], points_b[-1] - points_b[0]
    return points_b if reading_a @ reading_b >= 0 else points_b[::-1]


def _homography(
    points_a: list[Points], points_b: list[Points], views: list[int], a: Camera, b: Camera
) -> TargetAlignment:
    ideal_a, ideal_b = [a.undistorted(p) for p in points_a], [b.undistorted(p) for p in points_b]
    keep = list(range(len(views)))
    matrix = _fit(ideal_a, ideal_b, keep)
    errors = np.array([_rms(matrix, [ideal_a[k]], [ideal_b[k]]) for k in keep])
    good = [k for k in keep if errors[k] <= _OUTLIER * max(float(np.median(errors)), 0.25)]
    if len(good) >= LEAST_VIEWS:
        keep, matrix = good, _fit(ideal_a, ideal_b, good)
    ideal_a, ideal_b = [ideal_a[k] for k in keep], [ideal_b[k] for k in keep]
    rms = _rms(matrix, ideal_a, ideal_b)
    if rms > LARGEST_RMS:
        raise InputError(
            f"one homography leaves {rms:.1f} pixels (RMS) between the cameras' views of the board; hold it at one "
            "distance, or give --square to find the position of the cameras"
        )
    return TargetAlignment(
        matrix,
        rms,
        _jackknife(ideal_a, ideal_b, matrix, a.size),
        tuple(views[k] for k in keep),
        _covered(points_a, a.size),
        a,
        b,
    )


def _fit(points_a: list[Points], points_b: list[Points], views: Sequence[int]) -> Matrix:
    source = np.concatenate([points_a[k] for k in views])
    matrix, _ = cv2.findHomography(source, np.concatenate([points_b[k] for k in views]), 0)
    if matrix is None:
        raise InputError("the board's points lie on one line; move it over the whole picture")
    return np.asarray(matrix, np.float64)


def _rms(matrix: Matrix, points_a: list[Points], points_b: list[Points]) -> float:
    errors = transform(matrix, np.concatenate(points_a)) - np.concatenate(points_b)
    return float(np.sqrt((errors**2).sum(axis=1).mean()))


def _jackknife(points_a: list[Points], points_b: list[Points], matrix: Matrix, size: tuple[int, int]) -> float:
    """Twice the standard error of the corners of a's picture, by leaving out each view in turn."""
    count = len(points_a)
    places = transform(matrix, corners(size))
    moves = [
        transform(_fit(points_a, points_b, [k for k in range(count) if k != left]), corners(size)) - places
        for left in range(count)
    ]
    variance = (count - 1) / count * (np.array(moves) ** 2).sum(axis=(0, 2)).mean()
    return 2 * float(np.sqrt(variance))


def _covered(points: list[Points], size: tuple[int, int]) -> float:
    hull = cv2.convexHull(np.concatenate(points).astype(np.float32))
    return float(cv2.contourArea(hull)) / (size[0] * size[1])


def _stereo(
    points_a: list[Points], points_b: list[Points], views: list[int], target: Target, a: Camera, b: Camera
) -> TargetAlignment:
    from runtime.calibration import plane_homography

    a, b = (
        _with_intrinsics(camera, points, target, name)
        for camera, points, name in ((a, points_a, "a"), (b, points_b, "b"))
    )
    # Rays without distortion, so that one call serves lenses of every model.
    ideal_a, ideal_b = [a.undistorted(p) for p in points_a], [b.undistorted(p) for p in points_b]
    board = target.points
    stereo = _position(ideal_a, ideal_b, board, a, b)
    distances = [_board_distance(points, board, a) for points in ideal_a]
    distance = float(np.median(distances))
    matrix = plane_homography(a, b, stereo, distance)
    errors, moves = [], []
    places = transform(matrix, corners(a.size))
    for left in range(len(views)):
        rest = [k for k in range(len(views)) if k != left]
        other = _position([ideal_a[k] for k in rest], [ideal_b[k] for k in rest], board, a, b)
        moves.append(transform(plane_homography(a, b, other, distance), corners(a.size)) - places)
        errors.append(_reprojection(ideal_a[left], ideal_b[left], board, a, b, stereo))
    variance = (len(views) - 1) / len(views) * (np.array(moves) ** 2).sum(axis=(0, 2)).mean()
    rms = float(np.sqrt(np.mean(np.square(errors))))
    if rms > LARGEST_RMS:
        raise InputError(
            f"the position of the cameras leaves {rms:.1f} pixels (RMS) of reprojection error; check the counts and "
            "the square of the board, and that both cameras see it at the same moment"
        )
    covered = _covered(points_a, a.size)
    return TargetAlignment(matrix, rms, 2 * float(np.sqrt(variance)), tuple(views), covered, a, b, stereo, distance)


def _with_intrinsics(camera: Camera, points: list[Points], target: Target, name: str) -> Camera:
    """The camera, its intrinsics found from the views where it has none."""
    if camera.matrix is not None:
        return camera
    if len(points) < LEAST_VIEWS_INTRINSICS:
        raise InputError(
            f"the intrinsics of camera {name} need {LEAST_VIEWS_INTRINSICS} views of the board or more, at different "
            f"tilts; {len(points)} were found: record more, or give --from-ros"
        )
    board, size = [target.points] * len(points), camera.size[::-1]
    # Few views of a low-resolution camera don't carry more than one focal length and one coefficient of distortion.
    flags = cv2.CALIB_FIX_ASPECT_RATIO | cv2.CALIB_ZERO_TANGENT_DIST | cv2.CALIB_FIX_K2 | cv2.CALIB_FIX_K3
    start = np.array([[1.0, 0, (size[0] - 1) / 2], [0, 1.0, (size[1] - 1) / 2], [0, 0, 1]])
    pixels = [p.astype(np.float32) for p in points]
    _, matrix, distortion, _, _ = cv2.calibrateCamera(board, pixels, size, start, np.zeros(5), flags=flags)
    return Camera(
        camera.size,
        np.asarray(matrix, np.float64),
        "plumb_bob",
        tuple(float(value) for value in distortion.ravel()[:5]),
    )


def _position(
    points_a: list[Points], points_b: list[Points], board: NDArray[np.float32], a: Camera, b: Camera
) -> Stereo:
    none = np.zeros(5)
    pixels_a, pixels_b = ([p.astype(np.float32) for p in points] for points in (points_a, points_b))
    boards = [board] * len(points_a)
    result = cv2.stereoCalibrate(
        boards, pixels_a, pixels_b, a.intrinsics, none, b.intrinsics, none, a.size[::-1], flags=cv2.CALIB_FIX_INTRINSIC
    )
    return Stereo(np.asarray(result[5], np.float64), np.asarray(result[6], np.float64).ravel())


def _board_distance(points: Points, board: NDArray[np.float32], camera: Camera) -> float:
    """Metres along the optical axis to the middle of the board."""
    _, rotation, translation = cv2.solvePnP(board, points, camera.intrinsics, None)
    return float((cv2.Rodrigues(rotation)[0] @ board.mean(axis=0) + translation.ravel())[2])


def _reprojection(
    points_a: Points, points_b: Points, board: NDArray[np.float32], a: Camera, b: Camera, stereo: Stereo
) -> float:
    """RMS in pixels of b: the board as camera a places it, seen by camera b."""
    _, rotation, translation = cv2.solvePnP(board, points_a, a.intrinsics, None)
    in_a = board @ cv2.Rodrigues(rotation)[0].T + translation.ravel()
    in_b = in_a @ stereo.rotation.T + stereo.translation
    pixels = in_b @ b.intrinsics.T
    return float(np.sqrt(((pixels[:, :2] / pixels[:, 2:] - points_b) ** 2).sum(axis=1).mean()))


def _find_chessboard(grey: np.ndarray, target: Target) -> np.ndarray | None:
    size = (target.columns, target.rows)
    # Without its own normalisation, which moves corners by pixels where the board fills a part of the picture.
    found, points = cv2.findChessboardCornersSB(grey, size, flags=0)
    if found:
        return points
    found, points = cv2.findChessboardCorners(grey, size, flags=cv2.CALIB_CB_ADAPTIVE_THRESH | cv2.CALIB_CB_FAST_CHECK)
    if not found:
        return None
    spacing = float(np.linalg.norm(np.diff(points.reshape(target.rows, target.columns, 2), axis=1), axis=2).min())
    window = int(np.clip(spacing / 3, 2, 11))
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 40, 0.01)
    return cv2.cornerSubPix(grey, points, (window, window), (-1, -1), criteria)


def _find_circles(grey: np.ndarray, target: Target) -> np.ndarray | None:
    size = (target.columns, target.rows)
    vision: Any = cv2  # its type stubs lack the blob detector
    kind = cv2.CALIB_CB_ASYMMETRIC_GRID if target.kind == "asymmetric" else cv2.CALIB_CB_SYMMETRIC_GRID
    parameters = vision.SimpleBlobDetector_Params()
    # The defaults leave out circles of more than 70 pixels across, and the small ones of a thermal picture.
    parameters.minArea, parameters.maxArea = 12, max(grey.shape) ** 2 / 100
    parameters.minDistBetweenBlobs = 4
    detector = vision.SimpleBlobDetector_create(parameters)
    for flags in (kind, kind | cv2.CALIB_CB_CLUSTERING):
        found, points = cv2.findCirclesGrid(grey, size, flags=flags, blobDetector=detector)
        if found:
            return points
    return None
