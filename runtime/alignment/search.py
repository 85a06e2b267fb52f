"""Global search: which magnification, roll and shift lay the edges of one camera's pictures on those of the other.

Every shift is tried at once, by correlation in the frequency domain; magnification and roll run over a grid. The score
is the sum of the products of the orientation fields over its standard deviation if the directions were random, which
is comparable between overlaps of different size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.alignment.fields import Field, Image, Matrix, orientation_field, resized, shrunk, turned

LONG_SIDE = 160  # pixels, of the smaller footprint, at which the search runs
STEP = 1.05  # ratio of neighbouring magnifications
ROLL_STEP = 2.0  # degrees
LEAST_OVERLAP = 0.5  # of the smaller picture
_TILES = (3, 4)  # of the two halves that are searched independently

Spectrum = np.ndarray  # HxW float32: of real values, as OpenCV packs it


class Candidate(NamedTuple):
    score: float
    matrix: Matrix  # pixels of a -> pixels of b


def search(
    frames_a: Sequence[Image],
    frames_b: Sequence[Image],
    magnification: tuple[float, float],
    roll: float,
    progress: Callable[[float], None],
) -> tuple[Candidate, Candidate, Candidate]:
    """Best similarity of all frames together, and of two halves of them.

    Args:
        frames_a, frames_b: N pictures each; those of one camera have one size.
        magnification: least and most, pixels of b for one of a.
        roll: greatest, in degrees, either way.
        progress: is told the share of the work that was just done.

    Returns:
        of all, of one half, of the other. The halves are complementary tiles of the same pictures.
    """
    low, high = magnification
    height_a, width_a = frames_a[0].shape
    middle = np.sqrt(low * high)
    long_side = min(max(frames_b[0].shape), max(height_a, width_a) * middle)
    scaled_b = [shrunk(frame, LONG_SIDE / long_side) for frame in frames_b]
    to_small_b = scaled_b[0][1]
    shrink_b = float(to_small_b[0, 0])
    reference = _Reference([frame for frame, _ in scaled_b])
    # Each magnification is made of frames that were reduced once, so that large ones cost no more.
    scaled_a = [shrunk(frame, 2 * high * shrink_b) for frame in frames_a]
    to_small_a = scaled_a[0][1]
    steps = max(1, round(np.log(high / low) / np.log(STEP)))
    rolls = np.radians(np.linspace(-roll, roll, 2 * round(roll / ROLL_STEP) + 1))
    best = [Candidate(-np.inf, np.eye(3))] * 3
    for value in np.geomspace(low, high, steps + 1):
        scale = value * shrink_b / to_small_a[0, 0]
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        fields, to_scaled = [], np.eye(3)
        for frame, _ in scaled_a:
            small, to_scaled = resized(frame, scale, interpolation)
            fields.append(orientation_field(small))
        for angle in rolls:
            found = reference.best_shifts(fields, angle)
            for half, (score, matrix) in enumerate(found):
                if score > best[half].score:
                    whole = np.linalg.inv(to_small_b) @ matrix @ to_scaled @ to_small_a
                    best[half] = Candidate(score, whole)
        progress(1 / (steps + 1))
    return best[0], best[1], best[2]


class _Reference:
    """Camera b's fields, and their spectra of one size, whole and in two halves."""

    def __init__(self, frames: Sequence[Image]):
        self._fields = [orientation_field(frame) for frame in frames]
        self._size = frames[0].shape
        self._board = _checkerboard(self._size)
        self._shape = (0, 0)
        self._halves: list[list[list[Spectrum]]] = []  # of each frame, of each half: of both components
        self._energies: list[Spectrum] = []
        self._ones: Spectrum = np.ones(self._size, np.float32)

    def _prepare(self, size_a: tuple[int, int]) -> None:
        """Make the spectra for pictures of camera a of a size."""
        # Shifts that leave less than LEAST_OVERLAP of the smaller picture may wrap around: they are not looked at.
        rows, columns = (
            cv2.getOptimalDFTSize(int(a + b - LEAST_OVERLAP * min(a, b)) + 2)
            for a, b in zip(size_a, self._size, strict=True)
        )
        if (rows, columns) == self._shape:
            return
        self._shape = (rows, columns)
        self._halves, self._energies = [], []
        for number, field in enumerate(self._fields):
            first = field * (self._board if number % 2 == 0 else ~self._board)[..., None]
            self._halves.append([self._spectra(half) for half in (first, field - first)])
            self._energies.append(self._spectrum(_energy(field)))
        self._ones = self._spectrum(np.ones(self._size, np.float32))

    def best_shifts(self, fields: Sequence[Field], angle: float) -> list[Candidate]:
        """Best shift of camera a's fields after a turn, by all and by each half; matrices from the fields' pixels."""
        height, width = fields[0].shape[:2]
        matrix, (new_height, new_width) = _turn(height, width, angle)
        self._prepare((new_height, new_width))
        inside = cv2.warpAffine(np.ones((height, width), np.float32), matrix[:2], (new_width, new_height))
        products = [np.zeros(self._shape, np.float32) for _ in range(2)]
        variance = np.zeros(self._shape, np.float32)
        for field, halves, energy in zip(fields, self._halves, self._energies, strict=True):
            moved = turned(cv2.warpAffine(field, matrix[:2], (new_width, new_height)), angle)
            spectra = self._spectra(moved)
            for number, half in enumerate(halves):
                for of_b, of_a in zip(half, spectra, strict=True):
                    products[number] += cv2.mulSpectrums(of_b, of_a, 0, conjB=True)
            variance += cv2.mulSpectrums(energy, self._spectrum(_energy(moved)), 0, conjB=True)
        sums = [_inverse(product) for product in products]
        # Of a cosine of a random angle the variance is 1/2. Half of the energy is in each half.
        scale = 1 / np.sqrt(np.maximum(_inverse(variance), 1) / 2)
        overlap = _inverse(cv2.mulSpectrums(self._ones, self._spectrum(inside), 0, conjB=True))
        scale[overlap < LEAST_OVERLAP * min(float(inside.sum()), self._size[0] * self._size[1])] = 0
        found = []
        for total in (sums[0] + sums[1], np.sqrt(2) * sums[0], np.sqrt(2) * sums[1]):
            _, score, _, (x, y) = cv2.minMaxLoc(np.float32(total * scale))
            # The correlation is cyclic: shifts beyond b's size are negative ones.
            dx, dy = (x if x < self._size[1] else x - self._shape[1]), (y if y < self._size[0] else y - self._shape[0])
            found.append(Candidate(score, np.array([[1, 0, dx], [0, 1, dy], [0, 0, 1]]) @ matrix))
        return found

    def _spectra(self, field: Field) -> list[Spectrum]:
        return [self._spectrum(component) for component in cv2.split(field)]

    def _spectrum(self, values: Image) -> Spectrum:
        padded = np.zeros(self._shape, np.float32)
        padded[: values.shape[0], : values.shape[1]] = values
        return cv2.dft(padded, nonzeroRows=values.shape[0])


def _inverse(spectrum: Spectrum) -> Image:
    return cv2.dft(spectrum, flags=cv2.DFT_INVERSE | cv2.DFT_SCALE)


def _turn(height: int, width: int, angle: float) -> tuple[Matrix, tuple[int, int]]:
    """Matrix that turns a picture about its centre into a canvas that holds it, and the canvas's size (H, W)."""
    c, s = np.cos(angle), np.sin(angle)
    new_height = int(np.ceil(height * c + width * abs(s)))
    new_width = int(np.ceil(width * c + height * abs(s)))
    matrix = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    matrix[:2, 2] = (
        np.array([new_width - 1, new_height - 1]) / 2 - matrix[:2, :2] @ np.array([width - 1, height - 1]) / 2
    )
    return matrix, (new_height, new_width)


def _checkerboard(size: tuple[int, int]) -> NDArray[np.bool_]:
    rows, columns = (np.arange(n) * tiles // n for n, tiles in zip(size, _TILES, strict=True))
    return (rows[:, None] + columns) % 2 == 0


def _energy(field: Field) -> Image:
    return field[..., 0] ** 2 + field[..., 1] ** 2
