"""Registration without a target: from some pairs of pictures of an arbitrary scene.

The score of an alignment says nothing about whether it is right: wrong ones reach high scores too. What tells is
whether two halves of the material, searched independently from scratch, come to the same answer. For the accuracy of a
right one it is how far the answer hangs on which regions and which frames there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.alignment.fields import Image, Matrix, corner_distance, corners, to_grey, transform
from runtime.alignment.refine import PERSPECTIVE, SIMILARITY, Fit, Level
from runtime.alignment.search import search
from runtime.color import check_image
from runtime.errors import InputError

SPAN = 1.7  # factor either way by which the magnification may be off, where the lenses' fields of view aren't known
SPAN_KNOWN = 1.25  # where they are
ROLL = 4.0  # degrees either way
LEVELS = (160, 320, 640)  # pixels of the long side of a's footprint
LARGEST_DISAGREEMENT = 0.02  # of the footprint's diagonal, between the halves, for an estimate to be trusted
LARGEST_UNCERTAINTY = 0.02  # of the footprint's diagonal
_SIGNIFICANT = 6.0  # chi-squared of two parameters, 95 %
_PERSPECTIVE_FRAMES = 3  # one pair's own errors look like perspective
# 95 % of estimates are within so many standard errors of the corners, and a share of the footprint's diagonal by which
# edges in two spectra need not coincide: measured on RoadScene's train set, the errors of its own pairs included.
_COVERAGE = 3.0
_FLOOR = 0.0035
_FLOOR_WITHOUT_PERSPECTIVE = 0.006  # where there are too few pairs to tell it
_SMALLEST = 48  # pixels a side of the pictures


@dataclass(frozen=True, eq=False)
class Alignment:
    """An estimate and what is known of its quality.

    Attributes:
        homography: 3x3, pixels of a -> pixels of b; the centre of the first pixel is (0, 0).
        model: "similarity" (magnification, roll, shift), or "perspective" where the pictures show that of cameras which
            are turned to each other too.
        uncertainty: the corners of a's picture are right to this many pixels of b in 95 % of estimates that are
            trusted.
        disagreement: mean distance, in pixels of b, of where the two independent halves put the corners of a's picture.
        trusted: whether the halves agree and the uncertainty is small. An estimate that isn't trusted is likely wrong.
        reason: why it isn't trusted, else empty.
    """

    homography: Matrix
    model: str
    uncertainty: float
    disagreement: float
    trusted: bool
    reason: str


def align(
    frames_a: Sequence[np.ndarray],
    frames_b: Sequence[np.ndarray],
    *,
    magnification: float | None = None,
    span: float | None = None,
    roll: float = ROLL,
    progress: Callable[[float], None] = lambda share: None,
) -> Alignment:
    """Estimate the homography between two cameras from pairs of pictures of any scene.

    Each pair must show one moment; several pairs of different scenes are much better than one. Both cameras look the
    same way, up to ROLL degrees of roll, and overlap by half of the smaller field of view or more.

    Args:
        frames_a, frames_b: N pictures each, HxW or HxWx3 (BGR), uint8 or uint16, without distortion; those of a camera
            have one size.
        magnification: pixels of b for one of a, from the focal lengths f_b / f_a in pixels; by default as if both had
            the same field of view.
        span: factor either way by which that may be off; by default SPAN_KNOWN where it is given and SPAN else.
        roll: greatest roll between the cameras, in degrees.
        progress: is told the share of the work that was just done; the shares sum to 1.

    Raises:
        InputError: no pictures, different numbers or sizes, pictures that are too small or empty of structure.
    """
    grey_a, grey_b = _checked(frames_a, "a"), _checked(frames_b, "b")
    if len(grey_a) != len(grey_b):
        raise InputError(f"{len(grey_a)} pictures of camera a and {len(grey_b)} of camera b; give them in pairs")
    size = grey_a[0].shape
    if magnification is None:
        ratios = [of_b / of_a for of_b, of_a in zip(grey_b[0].shape, size, strict=True)]
        magnification, span = max(ratios), span or SPAN
    span = span or SPAN_KNOWN
    if not (magnification > 0 and span >= 1 and 0 <= roll <= 45):
        raise InputError(f"magnification {magnification:g}, span {span:g} and roll {roll:g} make no range to search")
    found = search(
        grey_a, grey_b, (magnification / span, magnification * span), roll, lambda share: progress(0.8 * share)
    )
    estimates = [_refined_half(grey_a, grey_b, candidate.matrix, half) for half, candidate in enumerate(found[1:])]
    progress(0.1)
    level, fit = _refined(grey_a, grey_b, found[0].matrix)
    matrix = level.estimate(fit)
    progress(0.1)
    diagonal = float(np.hypot(*np.ptp(transform(matrix, corners(size)), axis=0)))
    floor = _FLOOR if len(grey_a) >= _PERSPECTIVE_FRAMES else _FLOOR_WITHOUT_PERSPECTIVE
    uncertainty = float(np.hypot(_COVERAGE * _standard_error(level, fit, len(grey_a)), floor * diagonal))
    disagreement = corner_distance(estimates[0], estimates[1], size)
    reason = _doubt(diagonal, disagreement, uncertainty)
    model = "similarity" if len(fit.parameters) == SIMILARITY else "perspective"
    return Alignment(matrix, model, uncertainty, disagreement, not reason, reason)


def _checked(frames: Sequence[np.ndarray], name: str) -> list[Image]:
    if not frames:
        raise InputError(f"no pictures of camera {name}")
    for number, frame in enumerate(frames):
        check_image(frame, f"picture {number + 1} of camera {name}")
        if frame.shape[:2] != frames[0].shape[:2]:
            raise InputError(f"pictures of camera {name} differ in size: {frames[0].shape[:2]} and {frame.shape[:2]}")
    if min(frames[0].shape[:2]) < _SMALLEST:
        raise InputError(f"pictures of camera {name} are smaller than {_SMALLEST} pixels a side")
    if all(frame.min() == frame.max() for frame in frames):
        raise InputError(f"the pictures of camera {name} are of one value each; is the lens covered?")
    return [to_grey(frame) for frame in frames]


def _levels(size: tuple[int, int]) -> list[float]:
    """Resolutions of the refinement, up to that of camera a's picture: beyond it there is nothing to see."""
    finest = float(max(size))
    return [level for level in LEVELS if level < finest] + ([finest] if finest < LEVELS[-1] else [])


def _refined_half(frames_a: Sequence[Image], frames_b: Sequence[Image], matrix: Matrix, half: int) -> Matrix:
    for long_side in _levels(frames_a[0].shape)[:2]:
        level = Level(frames_a, frames_b, matrix, long_side)
        matrix = level.estimate(level.fit(SIMILARITY, level.half == half))
    return matrix


def _refined(frames_a: Sequence[Image], frames_b: Sequence[Image], matrix: Matrix) -> tuple[Level, Fit]:
    """A similarity, or one with perspective where there is material enough to tell it."""
    coarse, *finer = _levels(frames_a[0].shape)
    level = Level(frames_a, frames_b, matrix, coarse)
    matrix = level.estimate(level.fit(SIMILARITY))
    parameters = SIMILARITY
    level = Level(frames_a, frames_b, matrix, finer[0] if finer else coarse)
    if len(frames_a) >= _PERSPECTIVE_FRAMES and _perspective_is_clear(level):
        parameters = PERSPECTIVE
    fit = level.fit(parameters)
    for long_side in finer[1:] or finer or [coarse]:
        level = Level(frames_a, frames_b, level.estimate(fit), long_side)
        fit = level.fit(parameters)
    return level, fit


def _perspective_is_clear(level: Level) -> bool:
    """Whether the two parameters of perspective are significant, by what varies between regions and between frames."""
    fit = level.fit(PERSPECTIVE)
    covariance = level.covariance(fit, level.region) + level.covariance(fit, level.frame)
    perspective = fit.parameters[SIMILARITY:]
    if not np.isfinite(covariance).all():
        return False
    inverse = np.linalg.pinv(covariance[SIMILARITY:, SIMILARITY:])
    return bool(perspective @ inverse @ perspective > _SIGNIFICANT)


def _standard_error(level: Level, fit: Fit, frames: int) -> float:
    """Of the corners of a's picture, in pixels of b: what is larger, by regions of the picture or by frames."""
    clusters = [level.region] if frames == 1 else [level.region, level.frame]
    return max(level.corner_error(level.covariance(fit, numbers)) for numbers in clusters)


def _doubt(diagonal: float, disagreement: float, uncertainty: float) -> str:
    if disagreement > LARGEST_DISAGREEMENT * diagonal:
        return f"two halves of the pictures, searched independently, disagree by {disagreement:.0f} pixels"
    if not np.isfinite(uncertainty):
        return "both cameras see edges in one corner of the picture only"
    if uncertainty > LARGEST_UNCERTAINTY * diagonal:
        return f"the edges that both cameras see leave an uncertainty of {uncertainty:.0f} pixels"
    return ""
