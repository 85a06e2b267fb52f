"""Orientation fields: what an infrared and a visible picture of one scene have in common.

Brightness does not agree between the two spectra, not even in sign, and neither does the strength of an edge. Where an
edge runs does. The field of a picture is a vector at each pixel, along twice the angle of the gradient, so that an edge
and its negative are equal, and of a length between 0 and 1 that says how far the gradient stands out of its
neighbourhood. The product of two such vectors is the cosine of twice the angle between the edges.

Points are pixels (x, y), the centre of the first pixel is (0, 0), and matrices are 3x3 homographies of such points.
"""

from __future__ import annotations

import cv2
import numpy as np

from runtime.camera import Matrix, Points, scaling

Image = np.ndarray  # HxW float32
Field = np.ndarray  # HxWx2 float32

_PERCENTILES = (0.5, 99.5)
_NEIGHBOURHOOD = 6.0  # of a gradient, as a multiple of the smoothing before it
_BORDER = 2  # pixels at the picture's edge where gradients mean nothing


def to_grey(image: np.ndarray) -> Image:
    """HxW float32 of about 0..255, whatever the range of the counts.

    Args:
        image: HxW or HxWx3 (BGR), uint8 or uint16.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if image.ndim == 3 else image
    sample = grey[:: max(1, grey.shape[0] // 200), :: max(1, grey.shape[1] // 200)]
    low, high = np.percentile(sample, _PERCENTILES)
    return ((grey.astype(np.float32) - np.float32(low)) * np.float32(255 / max(high - low, 1))).astype(np.float32)


def orientation_field(image: Image, sigma: float = 1.0, smooth: float = 0.0) -> Field:
    """Field of a picture.

    Args:
        image: HxW.
        sigma: of the Gaussian before the gradient, in pixels.
        smooth: of the Gaussian after it, in pixels, which widens the reach of a local search; 0 is none.

    Returns:
        HxWx2. The mean is taken out: where most edges run the same way, that agreement says nothing.
    """
    image = cv2.GaussianBlur(image, (0, 0), sigma) if sigma > 0.2 else image
    gx = cv2.Scharr(image, cv2.CV_32F, 1, 0, scale=1 / 32)
    gy = cv2.Scharr(image, cv2.CV_32F, 0, 1, scale=1 / 32)
    strength = cv2.magnitude(gx, gy)
    ordinary = (
        cv2.GaussianBlur(strength, (0, 0), _NEIGHBOURHOOD * max(sigma, 0.2)) + 0.5 * float(strength.mean()) + 1e-3
    )
    weight = 1 / ((strength + ordinary) * (strength + 1e-6))
    field = cv2.merge(((gx * gx - gy * gy) * weight, 2 * gx * gy * weight))
    length = cv2.magnitude(*cv2.split(field))
    share = np.array(field.mean(axis=(0, 1)) / max(float(length.mean()), 1e-9), np.float32)
    field -= length[..., None] * share
    for edge in (np.s_[:_BORDER], np.s_[-_BORDER:], np.s_[:, :_BORDER], np.s_[:, -_BORDER:]):
        field[edge] = 0
    return cv2.GaussianBlur(field, (0, 0), smooth) if smooth > 0.2 else field


def turned(field: Field, angle: float) -> Field:
    """The field after its picture was turned by an angle in radians, from x towards y; the pixels stay in place."""
    c, s = np.float32(np.cos(2 * angle)), np.float32(np.sin(2 * angle))
    return np.ascontiguousarray(field @ np.array([[c, s], [-s, c]], np.float32))


def shrunk(image: Image, scale: float) -> tuple[Image, Matrix]:
    """A picture reduced by `scale`, and the matrix from its pixels to the smaller one's; as it is for 1 or more."""
    if scale >= 1:
        return image, np.eye(3)
    return resized(image, scale, cv2.INTER_AREA)


def resized(image: Image, scale: float, interpolation: int) -> tuple[Image, Matrix]:
    """A picture in another size, 16 pixels a side at least, and the matrix from its pixels to the new ones."""
    height, width = image.shape
    new_height, new_width = max(16, round(height * scale)), max(16, round(width * scale))
    new = cv2.resize(image, (new_width, new_height), interpolation=interpolation)
    return new, scaling((height, width), (new_height, new_width))


def corners(size: tuple[int, int]) -> Points:
    """Centres of the corner pixels of a picture of size (H, W): 4x2."""
    height, width = size
    return np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], np.float64)


def transform(matrix: Matrix, points: Points) -> Points:
    """Points under a homography: Nx2."""
    return np.asarray(cv2.perspectiveTransform(points[None], matrix)[0], np.float64)


def corner_distance(one: Matrix, other: Matrix, size: tuple[int, int]) -> float:
    """Mean distance, over the four corners of a picture of size (H, W), of where two homographies take them."""
    points = corners(size)
    return float(np.linalg.norm(transform(one, points) - transform(other, points), axis=1).mean())
