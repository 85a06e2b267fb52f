"""Local refinement: the homography under which the edges of small tiles agree best, all tiles and frames together.

Around a first estimate each tile of camera b's field is correlated with camera a's field over a few pixels of shift.
The score of a warp is then the sum, over tiles and frames, of that correlation at the shift which the warp gives the
tile, so that any number of parameters is fitted without looking at a picture again. How much the estimate hangs on
which tiles and which frames there are follows from the same table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.alignment.fields import (
    Field,
    Image,
    Matrix,
    Points,
    corners,
    orientation_field,
    shrunk,
    transform,
    turned,
)

# Parameters: shift, magnification and roll; with the two of perspective that turned cameras have as well. Aspect and
# shear would be left for a full homography, but pixels are square.
SIMILARITY, PERSPECTIVE = 4, 6
REACH = 8  # pixels of shift either way, at the level's resolution
TILE = 32  # pixels a side
REGIONS = 4
SMOOTH = 1.5  # of the fields, in pixels
_LEAST_COVERED = 0.25  # of a tile by camera a's picture

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """A warp, in the parameters of the level that it belongs to, and its score."""

    parameters: FloatArray
    score: float


class Level:
    """The correlations of all tiles of all frames around an estimate, at one resolution.

    Args:
        frames_a, frames_b: N pictures each.
        estimate: pixels of a -> pixels of b.
        long_side: pixels, of a's footprint in b, to which b is reduced.

    Attributes:
        tile: number of the tile of each entry, E = tiles x frames.
        frame: number of the frame of each entry.
        half: 0 or 1: the tiles and frames of both halves alternate.
        region: number of the region of a's footprint of each entry, REGIONS along each side at most, none empty.
        size: (H, W) of b at this resolution.
    """

    def __init__(
        self, frames_a: Sequence[Image], frames_b: Sequence[Image], estimate: Matrix, long_side: float
    ) -> None:
        self._estimate, self._size_a = estimate, frames_a[0].shape
        extent = np.ptp(transform(estimate, corners(self._size_a)), axis=0)
        small_b = [shrunk(frame, long_side / float(extent.max())) for frame in frames_b]
        self._to_small_b = small_b[0][1]
        warp = self._to_small_b @ estimate
        magnification = np.sqrt(abs(np.linalg.det(warp[:2, :2] / warp[2, 2])))
        small_a = [shrunk(frame, magnification) for frame in frames_a]
        warp = warp @ np.linalg.inv(small_a[0][1])
        self.size = small_b[0][0].shape
        self._corners = transform(warp, corners(small_a[0][0].shape))
        self._centre = self._corners.mean(axis=0)
        self._radius = float(np.linalg.norm(self._corners - self._centre, axis=1).mean())

        usable = _usable(warp, small_a[0][0].shape, self.size)
        tiles = [
            (y, x)
            for y in range(0, self.size[0], TILE)
            for x in range(0, self.size[1], TILE)
            if usable[y : y + TILE, x : x + TILE].mean() > _LEAST_COVERED
        ]
        tables, centroids = [], []
        for (image_a, _), (image_b, _) in zip(small_a, small_b, strict=True):
            field_a = _warped_field(image_a, warp, self.size, max(1.0, magnification))
            field_b = orientation_field(image_b, smooth=SMOOTH) * usable[..., None]
            for tile in tiles:
                table, centroid = _correlate(field_a, field_b, tile)
                tables.append(table)
                centroids.append(centroid)
        side = 2 * REACH + 1
        self._tables = np.array(tables, np.float64).reshape(-1, side, side)
        self._places = np.array(centroids, np.float64).reshape(-1, 2)
        frames, count = len(frames_a), len(tiles)
        self.tile = np.tile(np.arange(count), frames)
        self.frame = np.repeat(np.arange(frames), count)
        parity = np.array([(y // TILE + x // TILE) % 2 for y, x in tiles], np.intp)
        self.half = (np.tile(parity, frames) + self.frame) % 2
        low, extent = self._corners.min(axis=0), np.ptp(self._corners, axis=0)
        cells = np.clip((self._places - low) / extent * REGIONS, 0, REGIONS - 1).astype(np.intp)
        self.region = np.unique(cells[:, 1] * REGIONS + cells[:, 0], return_inverse=True)[1].reshape(-1)

    def fit(self, parameters: int, chosen: NDArray[np.bool_] | None = None, start: FloatArray | None = None) -> Fit:
        """The warp of the highest score, by Newton's method with a damping.

        Args:
            parameters: SIMILARITY or PERSPECTIVE.
            chosen: entries that count; all by default.
            start: parameters to start from; none by default.
        """
        rows = np.arange(len(self._tables)) if chosen is None else np.flatnonzero(chosen)
        jacobian = self._jacobian(parameters, self._places[rows])
        point = np.zeros(parameters) if start is None else np.pad(start, (0, parameters - len(start)))
        values, slopes, curvatures = self._at(rows, jacobian @ point)
        damping = 1e-3
        for _ in range(40):
            gradient = np.einsum("kin,ki->n", jacobian, slopes)
            hessian = np.einsum("kin,kij,kjm->nm", jacobian, curvatures, jacobian)
            eigenvalues, vectors = np.linalg.eigh(hessian)
            largest = np.abs(eigenvalues).max() + 1e-12
            # Uphill along every direction, of downward curvature or not.
            stiffness = np.maximum(np.abs(eigenvalues), 1e-3 * largest) + damping * largest
            step = vectors @ (vectors.T @ gradient / stiffness)
            step *= min(1.0, 2 / max(float(np.abs(step).max()), 1e-12))
            new_values, new_slopes, new_curvatures = self._at(rows, jacobian @ (point + step))
            if new_values.sum() <= values.sum():
                damping *= 10
                if damping > 10:
                    break
                continue
            point, values, slopes, curvatures = point + step, new_values, new_slopes, new_curvatures
            damping /= 10
            if np.abs(step).max() < 0.005:
                break
        return Fit(point, float(values.sum()))

    def values(self, fit: Fit, chosen: NDArray[np.bool_]) -> FloatArray:
        """Score of each chosen entry under a fit."""
        rows = np.flatnonzero(chosen)
        return self._at(rows, self._jacobian(len(fit.parameters), self._places[rows]) @ fit.parameters)[0]

    def estimate(self, fit: Fit) -> Matrix:
        """Pixels of a -> pixels of b, the first estimate improved by a fit."""
        shift = self._shift_matrix(fit.parameters)
        matrix = np.linalg.inv(self._to_small_b) @ np.linalg.inv(shift) @ self._to_small_b @ self._estimate
        return matrix / matrix[2, 2]

    def covariance(self, fit: Fit, clusters: NDArray[np.intp]) -> FloatArray:
        """Covariance of a fit's parameters: PxP; infinite where fewer than two clusters are there.

        By the sandwich formula for a sum of terms of which those within a cluster depend on each other.

        Args:
            fit: of all entries.
            clusters: number of the cluster of each entry, from 0.
        """
        count, parameters = int(clusters.max(initial=0)) + 1, len(fit.parameters)
        if count < 2:
            return np.full((parameters, parameters), np.inf)
        jacobian = self._jacobian(parameters, self._places)
        _, slopes, curvatures = self._at(np.arange(len(self._tables)), jacobian @ fit.parameters)
        sums = np.zeros((count, parameters))
        np.add.at(sums, clusters, np.einsum("kin,ki->kn", jacobian, slopes))
        bread = np.linalg.pinv(np.einsum("kin,kij,kjm->nm", jacobian, curvatures, jacobian))
        return bread @ (sums.T @ sums) @ bread * count / (count - 1)

    def corner_error(self, covariance: FloatArray) -> float:
        """Standard error of the corners of a's picture, root mean square, in pixels of b; infinite if that is."""
        if not np.isfinite(covariance).all():
            return float("inf")
        at_corners = self._jacobian(len(covariance), self._corners)
        variance = np.einsum("kin,nm,kim->k", at_corners, covariance, at_corners).mean()
        return float(np.sqrt(variance) / self._to_small_b[0, 0])

    def _jacobian(self, parameters: int, places: Points) -> FloatArray:
        """Shift of places by each parameter: Kx2xP. By 1 of any the corners of a's picture move about 1 pixel."""
        x, y = ((places - self._centre) / self._radius).T
        one, zero = np.ones_like(x), np.zeros_like(x)
        columns = ((one, zero), (zero, one), (x, y), (-y, x), (x * x, x * y), (x * y, y * y))
        return np.stack([np.stack(column, axis=1) for column in columns[:parameters]], axis=2)

    def _shift_matrix(self, parameters: FloatArray) -> Matrix:
        """The homography that `_jacobian` is the derivative of."""
        dx, dy, magnification, roll, across, down = np.pad(parameters, (0, PERSPECTIVE - len(parameters)))
        radius = self._radius
        about_centre = np.array(
            [
                [1 + magnification / radius, -roll / radius, dx],
                [roll / radius, 1 + magnification / radius, dy],
                [-across / radius**2, -down / radius**2, 1],
            ]
        )
        to_centre = np.array([[1, 0, -self._centre[0]], [0, 1, -self._centre[1]], [0, 0, 1]])
        return np.linalg.inv(to_centre) @ about_centre @ to_centre

    def _at(self, rows: NDArray[np.intp], shifts: Points) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Value (K), slope (Kx2) and curvature (Kx2x2) of entries at shifts, by a parabola about the nearest pixel."""
        shifts = np.clip(shifts, 1 - REACH, REACH - 1)
        nearest = np.rint(shifts).astype(np.intp)
        x, y = (shifts - nearest).T
        column, row = (nearest + REACH).T
        middle = self._tables[rows, row, column]
        left, right = self._tables[rows, row, column - 1], self._tables[rows, row, column + 1]
        above, below = self._tables[rows, row - 1, column], self._tables[rows, row + 1, column]
        fx, fy, fxx, fyy = (
            (right - left) / 2,
            (below - above) / 2,
            left + right - 2 * middle,
            above + below - 2 * middle,
        )
        fxy = (
            self._tables[rows, row + 1, column + 1]
            + self._tables[rows, row - 1, column - 1]
            - self._tables[rows, row - 1, column + 1]
            - self._tables[rows, row + 1, column - 1]
        ) / 4
        value = middle + fx * x + fy * y + (fxx * x * x + fyy * y * y) / 2 + fxy * x * y
        slope = np.stack((fx + fxx * x + fxy * y, fy + fyy * y + fxy * x), axis=1)
        return value, slope, np.stack((np.stack((fxx, fxy), axis=1), np.stack((fxy, fyy), axis=1)), axis=2)


def _usable(warp: Matrix, size_a: tuple[int, int], size_b: tuple[int, int]) -> Image:
    """Where camera a's picture lies under b's pixel for every shift: HxW, 0 or 1."""
    inside = cv2.warpPerspective(np.ones(size_a, np.uint8), warp, size_b[::-1], flags=cv2.INTER_NEAREST)
    framed = cv2.copyMakeBorder(inside, REACH, REACH, REACH, REACH, cv2.BORDER_CONSTANT, value=0)
    kernel = np.ones((2 * REACH + 1, 2 * REACH + 1), np.uint8)
    return cv2.erode(framed, kernel)[REACH:-REACH, REACH:-REACH].astype(np.float32)


def _warped_field(image: Image, warp: Matrix, size_b: tuple[int, int], magnification: float) -> Field:
    """Field of camera a at b's pixels and REACH pixels around: (H + 2 REACH) x (W + 2 REACH) x 2."""
    field = orientation_field(image, 1 / magnification, SMOOTH / magnification)
    height, width = image.shape
    x, y, w = warp @ np.array([(width - 1) / 2, (height - 1) / 2, 1])
    # Jacobian of the homography at the centre; its rotation turns the directions.
    jacobian = (warp[:2, :2] - np.outer((x / w, y / w), warp[2, :2])) / w
    angle = np.arctan2(jacobian[1, 0] - jacobian[0, 1], jacobian[0, 0] + jacobian[1, 1])
    moved = np.array([[1, 0, REACH], [0, 1, REACH], [0, 0, 1]]) @ warp
    canvas = (size_b[1] + 2 * REACH, size_b[0] + 2 * REACH)
    return turned(cv2.warpPerspective(field, moved, canvas), float(angle))


def _correlate(field_a: Field, field_b: Field, tile: tuple[int, int]) -> tuple[np.ndarray, tuple[float, float]]:
    """Correlations of a tile over all shifts, and where its edges are, on average: (x, y)."""
    y, x = tile
    part = field_b[y : y + TILE, x : x + TILE]
    height, width = part.shape[:2]
    window = field_a[y : y + height + 2 * REACH, x : x + width + 2 * REACH]
    table = cv2.matchTemplate(window, np.ascontiguousarray(part), cv2.TM_CCORR)
    energy = part[..., 0] ** 2 + part[..., 1] ** 2
    total = float(energy.sum())
    if total < 1e-6:
        return table, (x + (width - 1) / 2, y + (height - 1) / 2)
    return table, (x + energy.sum(0) @ np.arange(width) / total, y + energy.sum(1) @ np.arange(height) / total)
