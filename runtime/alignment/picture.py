"""A picture by which a person sees whether a calibration is right."""

from __future__ import annotations

import cv2
import numpy as np

from runtime.alignment.fields import to_grey
from runtime.calibration import Calibration
from runtime.panel import side_by_side
from runtime.register import Registration

_WIDTH = 960  # pixels at most, of each of the four parts
_SQUARES = 8  # of the checkerboard, along the longer side


def confirmation_picture(a: np.ndarray, b: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Both pictures before and after the alignment: mixed as a checkerboard, and their edges over each other.

    Args:
        a, b: HxW or HxWx3 (BGR), uint8 or uint16, of the calibrated sizes.

    Returns:
        two rows of two parts under captions, uint8 (BGR). Edges of a are red, those of b cyan: white where they meet.
    """
    toned = [_to_8_bits(image) for image in (a, b)]
    registration = Registration(calibration)
    after_a, after_b = registration(*toned)
    reference = after_b if registration.reference == "b" else after_a
    size = (reference.shape[1], reference.shape[0])
    before_a, before_b = (cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in toned)
    common = registration.mask > 0
    mixed = [np.where(common, image, reference) for image in (after_a, after_b)]
    before, after = "before: scaled to one size", "after"
    return np.vstack(
        [
            side_by_side({before: _fitted(_checkerboard(before_a, before_b)), after: _fitted(_checkerboard(*mixed))}),
            side_by_side({before: _fitted(_edges(before_a, before_b)), after: _fitted(_edges(after_a, after_b))}),
        ]
    )


def _fitted(picture: np.ndarray) -> np.ndarray:
    scale = _WIDTH / picture.shape[1]
    return picture if scale >= 1 else cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def _to_8_bits(image: np.ndarray) -> np.ndarray:
    return np.clip(to_grey(image), 0, 255).astype(np.uint8)


def _checkerboard(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    square = max(8, max(a.shape) // _SQUARES)
    y, x = np.indices(a.shape)
    mixed = np.where((y // square + x // square) % 2 == 0, a, b)
    return cv2.cvtColor(mixed, cv2.COLOR_GRAY2BGR)


def _edges(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    of_a, of_b = _edge_strength(a), _edge_strength(b)
    return cv2.merge((of_b, of_b, of_a))


def _edge_strength(image: np.ndarray) -> np.ndarray:
    smooth = cv2.GaussianBlur(image, (0, 0), 1.2)
    strength = cv2.magnitude(cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1))
    strongest = max(float(np.percentile(strength, 98)), 1.0)
    return np.clip(strength * (255 / strongest), 0, 255).astype(np.uint8)
