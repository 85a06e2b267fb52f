"""Registration at run time: one remap lays one camera's picture on the other's.

The frame of the reference camera (by default the visible one, b) is the output frame, and its picture passes through
as it is, distortion included: each of its pixels is undistorted, taken through the homography, and distorted as the
other lens does. The maps are built once for a pair of sizes, in fixed-point form.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.calibration import Calibration
from runtime.camera import OUTSIDE, Camera, Points, pixel_grid, scaling
from runtime.color import check_image
from runtime.errors import InputError

_LARGEST_SHRINK = 1.5  # source pixels for an output pixel, above which bilinear sampling would alias
_COARSE = 160  # pixels a side of the picture in which the common field is looked for first
_POOL = 6  # buffers that are kept for one kind of picture
_MAP_STEP = 8  # pixels: lens and homography are computed at every 8th pixel; between them they are as good as linear


class Registration:
    """Aligns the pictures of two cameras by a calibration.

    Args:
        calibration: of the two cameras.
        size_a, size_b: (H, W) of the pictures to come; the calibrated sizes by default. Other sizes of the same field
            of view are fine; pictures of yet another size build new maps when they come.
        reference: "a" or "b", whose frame the output is in; the calibration's by default.
        crop: give only the largest rectangle in which both cameras have picture.
        output_size: (H, W) of the output; by default that of the reference's picture, or of the cropped part.
        undistort: give what cameras without distortion would see; both pictures are remapped then.

    Attributes:
        size: (H, W) of the output.
        mask: HxW uint8, 255 where both cameras have picture and 0 elsewhere, where the aligned picture is 0. Not to be
            written to.
        window: (x, y, width, height) of the output in the reference's picture.

    Raises:
        InputError: sizes of another aspect ratio than the calibrated ones, or cameras that share no field of view.
    """

    def __init__(
        self,
        calibration: Calibration,
        size_a: tuple[int, int] | None = None,
        size_b: tuple[int, int] | None = None,
        *,
        reference: str | None = None,
        crop: bool = False,
        output_size: tuple[int, int] | None = None,
        undistort: bool = False,
    ) -> None:
        self.reference = reference or calibration.reference
        if self.reference not in ("a", "b"):
            raise InputError(f"reference is '{self.reference}'; choose a or b")
        if output_size is not None and min(output_size) < 2:
            raise InputError(f"the output size {output_size[1]}x{output_size[0]} is too small")
        self._calibration, self._crop, self._output_size, self._undistort = calibration, crop, output_size, undistort
        self._buffers = _Buffers()
        self._build(size_a or calibration.a.size, size_b or calibration.b.size)

    def __call__(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both pictures in the output frame.

        Args:
            a, b: HxW or HxWx3 (BGR), uint8 or uint16, each with its own size, depth and channels, which stay.

        Returns:
            a, b of the output's size. The reference's picture is the array that came in, or a view of it, where
            nothing had to be done with it. No buffer is used again while someone still holds it.

        Raises:
            InputError: not a picture, or one of another aspect ratio than the calibrated one.
        """
        check_image(a, "a")
        check_image(b, "b")
        if (a.shape[:2], b.shape[:2]) != self._sizes:
            self._build(a.shape[:2], b.shape[:2])
        other, reference = (a, b) if self.reference == "b" else (b, a)
        other, reference = self._other(other, self._buffers), self._own(reference, self._buffers)
        return (other, reference) if self.reference == "b" else (reference, other)

    def _build(self, size_a: tuple[int, int], size_b: tuple[int, int]) -> None:
        sized = self._calibration.for_sizes(size_a, size_b)
        if self.reference == "b":
            own, other, to_other = sized.b, sized.a, np.linalg.inv(sized.homography)
        else:
            own, other, to_other = sized.a, sized.b, sized.homography
        whole = (0, 0, own.size[1], own.size[0])
        source = _source_pixels(own, other, to_other, whole, own.size, self._undistort)
        inside = _inside(source, own.size, other.size)
        if self._undistort:
            inside &= _inside(_on_grid(own.distorted, whole, own.size), own.size, own.size)
        if not inside.any():
            raise InputError("the calibration leaves the two cameras no common field of view; calibrate again")
        self.window = largest_rectangle(inside) if self._crop else whole
        self.size = self._output_size or (self.window[3], self.window[2])
        if (self.window, self.size) != (whole, own.size):
            source = _source_pixels(own, other, to_other, self.window, self.size, self._undistort)
            inside = _inside(source, self.size, other.size)
        self.mask = np.where(inside, np.uint8(255), np.uint8(0))
        self._other = _Warp(source, self.size, other.size)
        if self._undistort and own.is_distorted:
            self._own: _Warp | _Window = _Warp(_on_grid(own.distorted, self.window, self.size), self.size, own.size)
        else:
            self._own = _Window(self.window, self.size)
        self._sizes = size_a, size_b


class _Buffers:
    """Output arrays that are used again once nobody else holds them, so that a frame allocates nothing."""

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[int, ...], np.dtype], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        kept = self._kept.setdefault((shape, dtype), [])
        free = _unheld(kept)
        if free is None:
            free = np.empty(shape, dtype)
            if len(kept) < _POOL:
                kept.append(free)
        return free


def _references(arrays: list[np.ndarray], number: int) -> int:
    return sys.getrefcount(arrays[number])


_UNHELD = _references([np.empty(1)], 0)


def _unheld(arrays: list[np.ndarray]) -> np.ndarray | None:
    number = next((n for n in range(len(arrays)) if _references(arrays, n) == _UNHELD), None)
    return None if number is None else arrays[number]


class _Warp:
    """A picture sampled at fixed places, reduced before where it would alias.

    Args:
        source: pixel of the picture for each pixel of the output, row by row.
        size: (H, W) of the output.
        source_size: (H, W) of the picture.
    """

    def __init__(self, source: Points, size: tuple[int, int], source_size: tuple[int, int]) -> None:
        self._size = size
        self._reduced = _reduced_size(source.reshape(*size, 2), source_size)
        if self._reduced != source_size:
            to_reduced = scaling(source_size, self._reduced)
            source = source * to_reduced[(0, 1), (0, 1)] + to_reduced[:2, 2]
        limits = np.array([self._reduced[1], self._reduced[0]])
        maps = np.clip(source, -2, limits + 1).astype(np.float32).reshape(*size, 2)
        self._maps = cv2.convertMaps(maps[..., 0], maps[..., 1], cv2.CV_16SC2)

    def __call__(self, image: np.ndarray, buffers: _Buffers) -> np.ndarray:
        channels = image.shape[2:]
        if image.shape[:2] != self._reduced:
            reduced = buffers.take((*self._reduced, *channels), image.dtype)
            image = cv2.resize(image, self._reduced[::-1], reduced, interpolation=cv2.INTER_AREA)
        output = buffers.take((*self._size, *channels), image.dtype)
        places, fractions = self._maps
        return cv2.remap(image, places, fractions, cv2.INTER_LINEAR, output, cv2.BORDER_CONSTANT, 0)


class _Window:
    """A part of a picture, in another size where that is asked for."""

    def __init__(self, window: tuple[int, int, int, int], size: tuple[int, int]) -> None:
        self._window, self._size = window, size
        shrinks = size[0] < window[3] or size[1] < window[2]
        self._interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR

    def __call__(self, image: np.ndarray, buffers: _Buffers) -> np.ndarray:
        x, y, width, height = self._window
        if (height, width) != image.shape[:2]:
            image = image[y : y + height, x : x + width]
        if (height, width) == self._size:
            return image
        output = buffers.take((*self._size, *image.shape[2:]), image.dtype)
        return cv2.resize(image, self._size[::-1], output, interpolation=self._interpolation)


def _source_pixels(
    own: Camera,
    other: Camera,
    to_other: np.ndarray,
    window: tuple[int, int, int, int],
    size: tuple[int, int],
    undistort: bool,
) -> Points:
    """Pixel of the other camera for each pixel of the output, row by row."""

    def through(pixels: Points) -> Points:
        ideal = pixels if undistort else own.undistorted(pixels)
        homogeneous = np.column_stack((ideal, np.ones(len(ideal)))) @ to_other.T
        # What is behind the other camera is outside its picture.
        ahead = homogeneous[:, 2] > 1e-9
        there = np.full_like(ideal, OUTSIDE)
        there[ahead] = other.distorted(homogeneous[ahead, :2] / homogeneous[ahead, 2:])
        return there

    return _on_grid(through, window, size)


def _on_grid(mapping: Callable[[Points], Points], window: tuple[int, int, int, int], size: tuple[int, int]) -> Points:
    """A smooth mapping at each pixel of the output, row by row, given the pixel of the reference's picture there."""
    x, y, width, height = window
    to_window = scaling(size, (height, width))
    rows, columns = (n // _MAP_STEP + 2 for n in size)
    knots = pixel_grid((rows, columns)) * _MAP_STEP
    values = mapping(knots * to_window[(0, 1), (0, 1)] + to_window[:2, 2] + (x, y)).reshape(rows, columns, 2)
    # Next to a knot that can't be seen the mix of both is far outside as well.
    for axis, n in enumerate(size):
        before, part = np.divmod(np.arange(n), _MAP_STEP)
        part = (part / _MAP_STEP).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        values = values.take(before, axis) * (1 - part) + values.take(before + 1, axis) * part
    return values.reshape(-1, 2)


def _inside(source: Points, size: tuple[int, int], source_size: tuple[int, int]) -> NDArray[np.bool_]:
    height, width = source_size
    x, y = source.T
    return ((x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)).reshape(size)


def _reduced_size(source: NDArray[np.float64], source_size: tuple[int, int]) -> tuple[int, int]:
    """Size to which a picture must be reduced so that neighbours of the output aren't far apart in it."""
    inside = _inside(source.reshape(-1, 2), source.shape[:2], source_size)
    steps = np.linalg.norm(np.diff(source, axis=1), axis=2)[inside[:, 1:] & inside[:, :-1]]
    shrink = float(np.median(steps)) if steps.size else 1.0
    if shrink <= _LARGEST_SHRINK:
        return source_size
    return max(2, round(source_size[0] / shrink)), max(2, round(source_size[1] / shrink))


def largest_rectangle(inside: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """(x, y, width, height) of a large upright rectangle that holds only true pixels: HxW, with one at least.

    It is the largest one on a coarse grid, grown pixel by pixel.
    """
    step = max(1, -(-max(inside.shape) // _COARSE))
    height, width = (n // step for n in inside.shape)
    coarse = inside[: height * step, : width * step].reshape(height, step, width, step)
    coarse = np.asarray(coarse.all(axis=(1, 3)))
    if not coarse.any():
        y, x = np.argwhere(inside)[0]
        left, top, right, bottom = int(x), int(y), int(x) + 1, int(y) + 1
    else:
        left, top, right, bottom = (step * n for n in _largest_on_grid(coarse))
    grown = True
    while grown:
        grown = False
        if left > 0 and inside[top:bottom, left - 1].all():
            left, grown = left - 1, True
        if right < inside.shape[1] and inside[top:bottom, right].all():
            right, grown = right + 1, True
        if top > 0 and inside[top - 1, left:right].all():
            top, grown = top - 1, True
        if bottom < inside.shape[0] and inside[bottom, left:right].all():
            bottom, grown = bottom + 1, True
    return left, top, right - left, bottom - top


def _largest_on_grid(cells: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest rectangle of true cells, by the stack of rising columns."""
    best, found = 0, (0, 0, 0, 0)
    depth = np.zeros(cells.shape[1] + 1, int)
    for row in range(cells.shape[0]):
        depth[:-1] = np.where(cells[row], depth[:-1] + 1, 0)
        rising: list[tuple[int, int]] = []  # begin, depth
        for column, this in enumerate(depth):
            begin = column
            while rising and rising[-1][1] >= this:
                begin, tall = rising.pop()
                if tall * (column - begin) > best:
                    best, found = tall * (column - begin), (begin, row + 1 - tall, column, row + 1)
            rising.append((begin, int(this)))
    return found
