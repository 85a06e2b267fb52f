"""A camera's intrinsics: pixels as they come, and the ideal pixels of a camera without distortion.

Points are pixels (x, y); the centre of the first pixel is (0, 0). Without intrinsics both kinds are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

Matrix = NDArray[np.float64]  # 3x3
Points = NDArray[np.float64]  # Nx2

# Name, as ROS has it, -> how many coefficients.
DISTORTION_MODELS = {"none": (0,), "plumb_bob": (4, 5), "rational_polynomial": (8,), "equidistant": (4,)}
OUTSIDE = -1e6  # pixel of what the camera can't see


@dataclass(frozen=True, eq=False)
class Camera:
    """Size and, where known, intrinsics.

    Attributes:
        size: (H, W) in pixels.
        matrix: 3x3 camera matrix in pixels, or None where the lens is taken as free of distortion.
        model: a key of DISTORTION_MODELS; "equidistant" is the fisheye model of OpenCV and Kalibr.
        distortion: coefficients in the order of OpenCV.

    Raises:
        InputError: an empty size, a matrix that isn't one of a camera, or coefficients that don't fit the model.
    """

    size: tuple[int, int]
    matrix: Matrix | None = None
    model: str = "none"
    distortion: tuple[float, ...] = ()
    _reach: float = field(init=False, repr=False, default=np.inf)

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 2:
            raise InputError(f"camera size {self.size} must be (H, W) of 2 pixels or more")
        if self.model not in DISTORTION_MODELS:
            raise InputError(f"unknown distortion model '{self.model}'; known: {', '.join(DISTORTION_MODELS)}")
        allowed = DISTORTION_MODELS[self.model]
        if len(self.distortion) not in allowed or not np.isfinite(self.distortion).all():
            counts = " or ".join(map(str, allowed))
            raise InputError(f"distortion model {self.model} takes {counts} finite numbers, not {self.distortion}")
        if self.matrix is None and self.model != "none":
            raise InputError(f"distortion model {self.model} needs a camera matrix")
        if self.matrix is not None:
            matrix = np.asarray(self.matrix, np.float64)
            if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or min(matrix[0, 0], matrix[1, 1]) <= 0:
                raise InputError("a camera matrix must be 3x3 with focal lengths above 0 on its diagonal")
            object.__setattr__(self, "matrix", matrix)
        if self.is_distorted:
            object.__setattr__(self, "_reach", self._largest_radius())

    @property
    def intrinsics(self) -> Matrix:
        """The camera matrix.

        Raises:
            InputError: it isn't known.
        """
        if self.matrix is None:
            raise InputError("the camera matrix isn't known; give the intrinsics of both cameras")
        return self.matrix

    @property
    def is_distorted(self) -> bool:
        return any(self.distortion)

    def resized(self, size: tuple[int, int], name: str = "the camera") -> Camera:
        """The same camera delivering pictures of another size (H, W) of the same field of view.

        Raises:
            InputError: another shape of the picture, which shows another part of the scene.
        """
        if size == self.size:
            return self
        y, x = size[0] / self.size[0], size[1] / self.size[1]
        if abs(x / y - 1) > 0.01:
            raise InputError(
                f"{name} was calibrated at {self.size[1]}x{self.size[0]} and delivers {size[1]}x{size[0]}, which has "
                "another aspect ratio; calibrate at that size"
            )
        matrix = None if self.matrix is None else scaling(self.size, size) @ self.matrix
        return replace(self, size=size, matrix=matrix)

    def undistorted(self, pixels: Points) -> Points:
        """Pixels of the camera -> ideal pixels: Nx2, far outside where the model has no answer."""
        if not self.is_distorted:
            return pixels
        undistort = cv2.fisheye.undistortPoints if self.model == "equidistant" else cv2.undistortPoints
        matrix = self.intrinsics
        ideal: Points = np.asarray(undistort(pixels[:, None], matrix, np.array(self.distortion), P=matrix), np.float64)
        ideal = ideal.reshape(-1, 2)
        # OpenCV stops after few iterations; near the corners of a wide lens that leaves tenths of a pixel.
        for _ in range(4):
            error = pixels - self._project(ideal)
            ideal = ideal + np.where(np.linalg.norm(error, axis=1, keepdims=True) < 2, error, 0)
        solved = np.linalg.norm(pixels - self._project(ideal), axis=1, keepdims=True) < 0.5
        return np.where(solved, ideal, OUTSIDE)

    def distorted(self, ideal: Points) -> Points:
        """Ideal pixels -> pixels of the camera: Nx2, far outside the picture for what the lens can't see."""
        if not self.is_distorted:
            return ideal
        # The polynomial turns back beyond the picture's corners: without this, what is outside would appear inside.
        seen = np.hypot(*self._rays(ideal)[:, :2].T) <= self._reach
        pixels = np.full_like(ideal, OUTSIDE)
        if seen.any():
            pixels[seen] = self._project(ideal[seen])
        return pixels

    def undistort_image(self, image: np.ndarray) -> np.ndarray:
        """The picture as the ideal camera of the same matrix and size would see it."""
        if not self.is_distorted:
            return image
        maps = self.distorted(pixel_grid(self.size)).astype(np.float32).reshape(*self.size, 2)
        return cv2.remap(image, maps[..., 0], maps[..., 1], cv2.INTER_LINEAR)

    def _project(self, ideal: Points) -> Points:
        still, coefficients = np.zeros(3), np.array(self.distortion)
        project = cv2.fisheye.projectPoints if self.model == "equidistant" else cv2.projectPoints
        pixels = project(self._rays(ideal)[:, None], still, still, self.intrinsics, coefficients)[0]
        return np.asarray(pixels, np.float64).reshape(-1, 2)

    def _rays(self, ideal: Points) -> NDArray[np.float64]:
        """Directions (x, y, 1): Nx3."""
        rays: NDArray[np.float64] = np.column_stack((ideal, np.ones(len(ideal)))) @ np.linalg.inv(self.intrinsics).T
        return rays

    def _largest_radius(self) -> float:
        """Tangent of the angle from the axis at which the corners are passed, or where the polynomial turns back."""
        angles = np.tan(np.radians(np.linspace(0, 88, 881)))
        centre = self.intrinsics[:2, 2]
        along_x = np.column_stack((centre[0] + self.intrinsics[0, 0] * angles, np.full(len(angles), centre[1])))
        radii = np.linalg.norm(self._project(along_x) - centre, axis=1)
        height, width = self.size
        corners = np.array([[0, 0], [width, 0], [0, height], [width, height]])
        farthest = float(np.linalg.norm(corners - centre, axis=1).max())
        ends = (radii[1:] <= radii[:-1]) | (radii[1:] > 1.05 * farthest)
        return float(angles[int(ends.argmax())] if ends.any() else angles[-1])


def pixel_grid(size: tuple[int, int]) -> Points:
    """Every pixel of a picture of size (H, W), row by row: (H W)x2."""
    y, x = np.mgrid[: size[0], : size[1]]
    return np.column_stack((x.ravel(), y.ravel())).astype(np.float64)


def scaling(old: tuple[int, int], new: tuple[int, int]) -> Matrix:
    """Matrix from the pixels of a picture of size `old` (H, W) to those of the same picture in size `new`."""
    y, x = new[0] / old[0], new[1] / old[1]
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])
