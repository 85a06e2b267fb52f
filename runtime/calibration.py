"""How two cameras lie to each other: the calibration and its YAML file.

The heart is a 3x3 homography from the pixels of camera a to those of camera b, both without distortion. A homography
aligns one plane of the scene: nothing nearer or further unless the cameras share their optical centre. Where rotation
and translation between the cameras are known, the homography of a plane at any distance follows from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.camera import Camera, Matrix, scaling
from runtime.errors import InputError
from runtime.files import write_whole

FORMAT = "refusion-calibration"
VERSION = 1
METHODS = ("targetless", "target", "stereo")
_HEADER = """\
%YAML 1.0
---
# Written by refusion calibrate. homography: pixels of camera a (x, y, 1) -> pixels of camera b, both undistorted;
# the centre of the first pixel is (0, 0). It aligns what is working_distance_m away (null: what it was measured on).
"""


@dataclass(frozen=True, eq=False)
class Stereo:
    """Position of the cameras: a point at x in the coordinates of a is at `rotation @ x + translation` in those of b.

    Attributes:
        rotation: 3x3.
        translation: 3, in metres.
    """

    rotation: Matrix
    translation: NDArray[np.float64]

    def __post_init__(self) -> None:
        rotation, translation = np.asarray(self.rotation, np.float64), np.asarray(self.translation, np.float64)
        if rotation.shape != (3, 3) or not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3):
            raise InputError("the rotation between the cameras is not a 3x3 rotation matrix")
        if translation.shape != (3,) or not np.isfinite(translation).all():
            raise InputError("the translation between the cameras must be 3 finite numbers, in metres")
        object.__setattr__(self, "rotation", rotation)
        object.__setattr__(self, "translation", translation)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Two cameras and what lays one's picture on the other's.

    Attributes:
        a, b: the cameras; for infrared and visible a is the infrared one.
        homography: 3x3, undistorted pixels of a -> undistorted pixels of b; the last number is 1.
        method: one of METHODS.
        reference: "a" or "b", whose frame the aligned pictures are in.
        uncertainty: the corners of a's picture are right to this many pixels of b in 95 % of estimates, or None.
        distance: metres at which the homography holds, or None where it isn't known.
        stereo: position of the cameras, or None.

    Raises:
        InputError: values that can't be a calibration.
    """

    a: Camera
    b: Camera
    homography: Matrix
    method: str
    reference: str = "b"
    uncertainty: float | None = None
    distance: float | None = None
    stereo: Stereo | None = None

    def __post_init__(self) -> None:
        matrix = np.asarray(self.homography, np.float64)
        if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or abs(matrix[2, 2]) < 1e-12:
            raise InputError("the homography must be 3x3, finite, and not 0 in its last number")
        matrix = matrix / matrix[2, 2]
        height, width = self.a.size
        frame = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]])
        if np.linalg.det(matrix) <= 1e-9 or (frame @ matrix[2] <= 1e-6).any():
            raise InputError("the homography mirrors or folds the picture of camera a; calibrate again")
        object.__setattr__(self, "homography", matrix)
        for name, value, choices in (("method", self.method, METHODS), ("reference", self.reference, ("a", "b"))):
            if value not in choices:
                raise InputError(f"{name} is '{value}'; it must be one of {', '.join(choices)}")
        for name, number in (("uncertainty", self.uncertainty), ("distance", self.distance)):
            if number is not None and not 0 < number < np.inf:
                raise InputError(f"{name} is {number}; it must be a number above 0")

    def for_sizes(self, size_a: tuple[int, int], size_b: tuple[int, int]) -> Calibration:
        """The same calibration for cameras that deliver other sizes (H, W) of the same fields of view.

        Raises:
            InputError: another aspect ratio.
        """
        if (size_a, size_b) == (self.a.size, self.b.size):
            return self
        a, b = self.a.resized(size_a, "camera a"), self.b.resized(size_b, "camera b")
        homography = scaling(self.b.size, size_b) @ self.homography @ np.linalg.inv(scaling(self.a.size, size_a))
        uncertainty = None if self.uncertainty is None else self.uncertainty * size_b[1] / self.b.size[1]
        return replace(self, a=a, b=b, homography=homography, uncertainty=uncertainty)

    def at_distance(self, distance: float) -> Calibration:
        """The calibration for another working distance in metres.

        Raises:
            InputError: the position of the cameras isn't known.
        """
        if self.stereo is None:
            raise InputError("this calibration holds no position of the cameras, so it cannot be moved to a distance")
        return replace(self, homography=plane_homography(self.a, self.b, self.stereo, distance), distance=distance)

    def parallax(self, distance: float) -> float | None:
        """Pixels of b by which what is `distance` metres away (inf: far) is out of place at the centre of a's picture.

        None where the position of the cameras or the working distance isn't known.
        """
        if self.stereo is None or self.distance is None:
            return None
        height, width = self.a.size
        centre = np.array([(width - 1) / 2, (height - 1) / 2, 1])
        there, here = (plane_homography(self.a, self.b, self.stereo, at) @ centre for at in (distance, self.distance))
        return float(np.linalg.norm(there[:2] / there[2] - here[:2] / here[2]))


def plane_homography(a: Camera, b: Camera, stereo: Stereo, distance: float) -> Matrix:
    """Homography of the plane `distance` metres before camera a, parallel to its picture: K_b (R + t n' / d) K_a^-1.

    n = (0, 0, 1), so that points of the plane have n' x = d (with the plane written as n' x + d = 0 the sign changes,
    see Hartley and Zisserman, Multiple View Geometry, 13.1). An infinite distance gives the homography of the rotation.

    Returns:
        3x3, undistorted pixels of a -> undistorted pixels of b.

    Raises:
        InputError: a distance that isn't above 0, or a camera without a matrix.
    """
    if not distance > 0:
        raise InputError(f"the working distance is {distance:g} m; give a number above 0")
    shift = np.outer(stereo.translation, (0, 0, 1)) / distance
    matrix: Matrix = b.intrinsics @ (stereo.rotation + shift) @ np.linalg.inv(a.intrinsics)
    return matrix / matrix[2, 2]


def save_calibration(path: str | Path, calibration: Calibration) -> None:
    """Write the YAML file, whole or not at all. OpenCV's FileStorage (C++ too) and any YAML reader can read it.

    Raises:
        InputError: it cannot be written.
    """
    import yaml

    class Indented(yaml.SafeDumper):
        """Indents lists below their name, without which FileStorage does not read them."""

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
            super().increase_indent(flow, False)

    plain = _to_plain(calibration)
    text = _HEADER + yaml.dump(plain, Dumper=Indented, sort_keys=False, default_flow_style=None, width=200)
    write_whole(Path(path), text.encode())


def load_calibration(path: str | Path) -> Calibration:
    """Read a file that `save_calibration` wrote.

    Raises:
        InputError: missing, unreadable, another kind of file (ROS and Kalibr files have to go through
            `refusion calibrate` first), or with wrong values.
    """
    values = read_yaml(path)
    if values.get("format") != FORMAT:
        hint = ""
        if "cam0" in values:
            hint = f"; for a Kalibr camera chain: refusion calibrate --from-kalibr {path} --distance METRES"
        elif "camera_matrix" in values:
            hint = "; a ROS file describes one camera: refusion calibrate A B --from-ros a.yaml b.yaml"
        raise InputError(f"{path}: not a calibration of refusion calibrate{hint}")
    if values.get("version") != VERSION:
        raise InputError(f"{path}: calibration format {values.get('version')}; this release reads {VERSION}")
    try:
        return _from_plain(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        what = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path}: damaged calibration ({what}); calibrate again") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, by PyYAML's safe loader; OpenCV's first line `%YAML:1.0` is accepted.

    Raises:
        InputError: missing, unreadable, not YAML, or not a mapping.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a YAML file") from error
    if text.startswith("%YAML:"):
        text = text.partition("\n")[2]
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise InputError(f"{path}: not a YAML file that can be read ({problem})") from error
    if not isinstance(values, Mapping):
        raise InputError(f"{path}: not a calibration file; it holds no names with values")
    return dict(values)


def _to_plain(calibration: Calibration) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "method": calibration.method,
        "reference": calibration.reference,
        "homography": calibration.homography.tolist(),
        "uncertainty_px": calibration.uncertainty,
        "working_distance_m": calibration.distance,
        "camera_a": _camera_to_plain(calibration.a),
        "camera_b": _camera_to_plain(calibration.b),
    }
    if calibration.stereo is not None:
        plain["rotation"] = calibration.stereo.rotation.tolist()
        plain["translation_m"] = calibration.stereo.translation.tolist()
    return {key: value for key, value in plain.items() if value is not None}


def _camera_to_plain(camera: Camera) -> dict[str, Any]:
    plain: dict[str, Any] = {"width": camera.size[1], "height": camera.size[0]}
    if camera.matrix is not None:
        plain["camera_matrix"] = camera.matrix.tolist()
        plain["distortion_model"] = camera.model
        plain["distortion_coefficients"] = list(camera.distortion)
    return plain


def _from_plain(values: Mapping[str, Any]) -> Calibration:
    stereo = Stereo(_floats(values["rotation"]), _floats(values["translation_m"])) if "rotation" in values else None
    return Calibration(
        _camera_from_plain(values["camera_a"]),
        _camera_from_plain(values["camera_b"]),
        _floats(values["homography"]),
        method=values["method"],
        reference=values["reference"],
        uncertainty=_optional(values.get("uncertainty_px")),
        distance=_optional(values.get("working_distance_m")),
        stereo=stereo,
    )


def _camera_from_plain(values: Mapping[str, Any]) -> Camera:
    size = int(values["height"]), int(values["width"])
    if "camera_matrix" not in values:
        return Camera(size)
    coefficients = tuple(float(value) for value in values["distortion_coefficients"])
    return Camera(size, _floats(values["camera_matrix"]), values["distortion_model"], coefficients)


def _floats(values: Any) -> NDArray[np.float64]:
    return np.array(values, np.float64)


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)
