"""Intrinsics and stereo positions from the files of other calibration tools: ROS camera_calibration and Kalibr."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.calibration import Stereo, read_yaml
from runtime.camera import Camera
from runtime.errors import InputError

_KALIBR_MODELS = {"radtan": "plumb_bob", "equidistant": "equidistant", "none": "none"}
_ROS_MODELS = {"plumb_bob": "plumb_bob", "rational_polynomial": "rational_polynomial", "equidistant": "equidistant"}


def read_ros_camera(path: str | Path) -> Camera:
    """Camera of a YAML file of ROS `camera_calibration` (camera_info).

    Raises:
        InputError: not such a file, or a distortion model other than plumb_bob, rational_polynomial, equidistant.
    """
    return _ros_camera(path, read_yaml(path))


def read_ros_pair(path_a: str | Path, path_b: str | Path) -> tuple[Camera, Camera, Stereo | None]:
    """Both cameras of two ROS files, and their position where they come of a stereo calibration.

    A stereo calibration leaves in each file the rotation that rectifies it, and in the second one's projection matrix
    the baseline. Files of cameras that were calibrated one by one hold no position.

    Raises:
        InputError: as `read_ros_camera`.
    """
    values = read_yaml(path_a), read_yaml(path_b)
    a, b = _ros_camera(path_a, values[0]), _ros_camera(path_b, values[1])
    rectified = []
    for path, entry in zip((path_a, path_b), values, strict=True):
        projection = _matrix(path, entry, "projection_matrix", (3, 4))
        rotation = _matrix(path, entry, "rectification_matrix", (3, 3))
        if projection is None or rotation is None or projection[0, 0] <= 0:
            return a, b, None
        # Position of the rectified camera, in metres, in the coordinates both share.
        offset = np.array([projection[0, 3] / projection[0, 0], projection[1, 3] / projection[1, 1], 0])
        rectified.append((rotation, offset))
    (rotation_a, offset_a), (rotation_b, offset_b) = rectified
    if np.allclose(offset_a, offset_b):
        return a, b, None
    return a, b, Stereo(rotation_b.T @ rotation_a, rotation_b.T @ (offset_b - offset_a))


def read_kalibr_pair(path: str | Path, names: tuple[str, str] = ("cam0", "cam1")) -> tuple[Camera, Camera, Stereo]:
    """Two cameras of a Kalibr camera chain, and their position.

    Args:
        path: camchain.yaml.
        names: entries of camera a and of camera b; they need not be neighbours in the chain.

    Raises:
        InputError: not such a file, no such camera, or a camera that isn't `pinhole` with `radtan`, `equidistant` or
            no distortion.
    """
    values = read_yaml(path)
    chain = sorted((name for name in values if name.startswith("cam") and name[3:].isdigit()), key=lambda n: int(n[3:]))
    if len(chain) < 2:
        raise InputError(f"{path}: no camera chain of Kalibr with two cameras or more")
    for name in names:
        if name not in chain:
            raise InputError(f"{path}: no camera '{name}' there; it has {', '.join(chain)}")
    if names[0] == names[1]:
        raise InputError(f"{path}: camera a and camera b are both {names[0]}")
    to_first: dict[str, NDArray[np.float64]] = {}
    pose = np.eye(4)
    for number, name in enumerate(chain):
        if number:
            step = _matrix(path, values[name], "T_cn_cnm1", (4, 4))
            if step is None:
                raise InputError(f"{path}: {name} has no T_cn_cnm1, the position to the camera before it")
            pose = step @ pose
        to_first[name] = pose
    relative = to_first[names[1]] @ np.linalg.inv(to_first[names[0]])
    a, b = (_kalibr_camera(path, name, values[name]) for name in names)
    return a, b, Stereo(relative[:3, :3], relative[:3, 3])


def _ros_camera(path: str | Path, values: Mapping[str, Any]) -> Camera:
    matrix = _matrix(path, values, "camera_matrix", (3, 3))
    if matrix is None:
        raise InputError(f"{path}: no camera_matrix; give a YAML file of ROS camera_calibration")
    model = values.get("distortion_model", "plumb_bob")
    if model not in _ROS_MODELS:
        raise InputError(f"{path}: distortion model '{model}'; plumb_bob, rational_polynomial, equidistant are known")
    try:
        coefficients = tuple(float(value) for value in values["distortion_coefficients"]["data"])
        size = int(values["image_height"]), int(values["image_width"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: needs image_width, image_height and distortion_coefficients with data") from error
    return _camera(path, size, matrix, _ROS_MODELS[model], coefficients)


def _kalibr_camera(path: str | Path, name: str, values: Mapping[str, Any]) -> Camera:
    if values.get("camera_model") != "pinhole":
        raise InputError(
            f"{path}: {name} has the camera model '{values.get('camera_model')}'; only pinhole can be made a homography"
        )
    model = values.get("distortion_model", "none")
    if model not in _KALIBR_MODELS:
        raise InputError(f"{path}: {name} has the distortion model '{model}'; radtan and equidistant are known")
    try:
        fu, fv, pu, pv = (float(value) for value in values["intrinsics"])
        width, height = (int(value) for value in values["resolution"])
        coefficients = () if model == "none" else tuple(float(value) for value in values["distortion_coeffs"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {name} needs intrinsics [fu, fv, pu, pv], resolution, distortion_coeffs") from error
    matrix = np.array([[fu, 0, pu], [0, fv, pv], [0, 0, 1]])
    return _camera(path, (height, width), matrix, _KALIBR_MODELS[model], coefficients)


def _camera(
    path: str | Path, size: tuple[int, int], matrix: NDArray[np.float64], model: str, coefficients: tuple[float, ...]
) -> Camera:
    try:
        return Camera(size, matrix, model, coefficients)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _matrix(path: str | Path, values: Any, key: str, shape: tuple[int, int]) -> NDArray[np.float64] | None:
    """A matrix that is written as rows, or as ROS does with rows, cols and data; None where there is none."""
    if not isinstance(values, Mapping) or key not in values:
        return None
    entry = values[key]
    try:
        matrix = np.array(entry["data"] if isinstance(entry, Mapping) else entry, np.float64).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {key} must hold {shape[0]}x{shape[1]} numbers") from error
    if not np.isfinite(matrix).all():
        raise InputError(f"{path}: {key} holds numbers that are not finite")
    return matrix
