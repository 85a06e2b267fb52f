"""Calibration files and what follows from them, checked by points in space."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from runtime.calibration import (
    Calibration,
    Stereo,
    load_calibration,
    plane_homography,
    save_calibration,
)
from runtime.camera import DISTORTION_MODELS, Camera, pixel_grid
from runtime.camera_files import read_kalibr_pair, read_ros_camera, read_ros_pair
from runtime.errors import InputError

DISTORTIONS = {
    "none": (),
    "plumb_bob": (-0.28, 0.09, 0.0012, -0.0007, -0.01),
    "rational_polynomial": (-0.1, 0.02, 0.001, -0.001, 0.003, 0.05, 0.01, 0.001),
    "equidistant": (-0.02, 0.006, -0.003, 0.001),
}


def camera(size: tuple[int, int], focal: float, model: str = "none") -> Camera:
    matrix = np.array([[focal, 0, size[1] / 2 - 3], [0, 1.01 * focal, size[0] / 2 + 2], [0, 0, 1]])
    return Camera(size, matrix, model, DISTORTIONS[model])


def stereo() -> Stereo:
    return Stereo(cv2.Rodrigues(np.array([0.012, -0.03, 0.02]))[0], np.array([0.06, -0.01, 0.004]))


def calibration(**changes: object) -> Calibration:
    a, b = camera((512, 640), 560, "plumb_bob"), camera((720, 1280), 900, "equidistant")
    values = {"method": "stereo", "uncertainty": 1.25, "distance": 8.0, "stereo": stereo()}
    return Calibration(a, b, plane_homography(a, b, stereo(), 8.0), **{**values, **changes})  # type: ignore[arg-type]


def project(points: np.ndarray, seen_by: Camera) -> np.ndarray:
    """Points in the camera's coordinates -> ideal pixels, straight from the pinhole formula."""
    pixels = points @ seen_by.intrinsics.T
    return pixels[:, :2] / pixels[:, 2:]


@pytest.mark.parametrize("model", DISTORTION_MODELS)
def test_distorted_inverts_undistorted(model):
    lens = camera((120, 160), 110, model)
    pixels = pixel_grid(lens.size)
    assert np.abs(lens.distorted(lens.undistorted(pixels)) - pixels).max() < 0.02
    moved = np.abs(lens.undistorted(pixels) - pixels).max()
    assert moved == 0 if model == "none" else moved > 1


def test_distorted_is_opencvs_projection():
    """Rays through points in space, projected by OpenCV, are where `distorted` puts the ideal pixels."""
    points = np.random.default_rng(0).uniform((-1, -0.8, 2.5), (1, 0.8, 4), (50, 3))
    for model, project_points in (("plumb_bob", cv2.projectPoints), ("equidistant", cv2.fisheye.projectPoints)):
        lens = camera((480, 640), 600, model)
        coefficients = np.array(lens.distortion)
        expected = project_points(points[:, None], np.zeros(3), np.zeros(3), lens.intrinsics, coefficients)[0]
        assert np.allclose(lens.distorted(project(points, lens)), expected.reshape(-1, 2), atol=1e-6)


def test_what_a_lens_cannot_see_is_not_folded_into_the_picture():
    """Barrel distortion turns back far outside: there the bare polynomial would land inside the picture."""
    lens = Camera((480, 640), np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]]), "plumb_bob", (-0.3, 0, 0, 0))
    far = np.array([[320 + 500 * 1.82, 240.0]])
    folded = cv2.projectPoints(np.array([[[1.82, 0, 1]]]), np.zeros(3), np.zeros(3), lens.intrinsics,
                               np.array(lens.distortion))[0].ravel()  # fmt: skip
    assert 0 <= folded[0] < 640
    assert (lens.distorted(far) < -1000).all()


def test_undistorted_image_puts_things_where_undistorted_says():
    lens = camera((240, 320), 250, "plumb_bob")
    spot = np.array([[40.0, 50.0]])
    image = np.zeros(lens.size, np.uint16)
    image[50, 40] = 60000
    straight = lens.undistort_image(cv2.GaussianBlur(image, (0, 0), 2))
    y, x = np.unravel_index(int(straight.argmax()), straight.shape)
    assert np.abs(lens.undistorted(spot)[0] - (x, y)).max() <= 1
    assert np.abs(spot[0] - (x, y)).max() > 2


@pytest.mark.parametrize("distance", [0.7, 8.0, 1000.0])
def test_plane_homography_takes_points_of_the_plane_from_a_to_b(distance):
    a, b, position = camera((512, 640), 560), camera((720, 1280), 900), stereo()
    points = np.random.default_rng(1).uniform(-0.5, 0.5, (40, 3)) * distance
    points[:, 2] = distance
    in_b = points @ position.rotation.T + position.translation
    matrix = plane_homography(a, b, position, distance)
    mapped = cv2.perspectiveTransform(project(points, a)[None], matrix)[0]
    assert np.allclose(mapped, project(in_b, b), atol=1e-6)


def test_parallax_is_the_error_of_what_is_at_another_distance():
    found = calibration()
    for distance in (2.0, 40.0):
        ray = np.linalg.inv(found.a.intrinsics) @ ((640 - 1) / 2, (512 - 1) / 2, 1)
        point = (ray * distance)[None]
        pixel_a = project(point, found.a)
        pixel_b = project(point @ found.stereo.rotation.T + found.stereo.translation, found.b)
        error = np.linalg.norm(cv2.perspectiveTransform(pixel_a[None], found.homography)[0] - pixel_b)
        assert found.parallax(distance) == pytest.approx(error, rel=1e-6)
        # The formula of the documentation: focal length times baseline times the difference of inverse distances.
        rule = 900 * np.hypot(0.06, 0.01) * abs(1 / distance - 1 / 8)
        assert found.parallax(distance) == pytest.approx(rule, rel=0.1)
    assert found.parallax(8.0) == pytest.approx(0, abs=1e-9)
    assert found.at_distance(40.0).parallax(40.0) == pytest.approx(0, abs=1e-9)


def test_other_sizes_of_the_same_field_of_view():
    """Halving both pictures halves where things are; pixel centres, not corners, are counted."""
    found = calibration()
    half = found.for_sizes((256, 320), (360, 640))
    points = np.array([[100.0, 80.0], [500.0, 300.0]])
    whole = cv2.perspectiveTransform(points[None], found.homography)[0]
    halved = cv2.perspectiveTransform(((points + 0.5) / 2 - 0.5)[None], half.homography)[0]
    assert np.allclose((halved + 0.5) * 2 - 0.5, whole, atol=1e-6)
    assert half.uncertainty == pytest.approx(found.uncertainty / 2)
    assert half.a.intrinsics[0, 0] == pytest.approx(found.a.intrinsics[0, 0] / 2)
    with pytest.raises(InputError, match="camera a was calibrated at 640x512 and delivers 640x480"):
        found.for_sizes((480, 640), (720, 1280))


def test_file_round_trip(tmp_path):
    found = calibration()
    path = tmp_path / "new/calibration.yaml"
    save_calibration(path, found)
    read = load_calibration(path)
    assert np.array_equal(read.homography, found.homography)
    for one, other in ((read.a, found.a), (read.b, found.b)):
        assert (one.size, one.model, one.distortion) == (other.size, other.model, other.distortion)
        assert np.array_equal(one.intrinsics, other.intrinsics)
    assert (read.method, read.reference, read.uncertainty, read.distance) == ("stereo", "b", 1.25, 8.0)
    assert np.array_equal(read.stereo.rotation, found.stereo.rotation)
    assert np.array_equal(read.stereo.translation, found.stereo.translation)
    bare = Calibration(Camera((48, 64)), Camera((96, 128)), np.diag((2.0, 2.0, 1)), "targetless", reference="a")
    save_calibration(path, bare)
    read = load_calibration(path)
    assert (read.a.matrix, read.uncertainty, read.distance, read.stereo, read.reference) == (
        None,
        None,
        None,
        None,
        "a",
    )
    assert [file.name for file in path.parent.iterdir()] == ["calibration.yaml"]


def test_opencv_reads_the_file(tmp_path):
    """As a C++ program would."""
    save_calibration(tmp_path / "c.yaml", calibration())
    storage = cv2.FileStorage(str(tmp_path / "c.yaml"), cv2.FILE_STORAGE_READ)
    homography = storage.getNode("homography")
    values = [[homography.at(row).at(column).real() for column in range(3)] for row in range(3)]
    assert np.array_equal(values, calibration().homography)
    assert storage.getNode("camera_b").getNode("width").real() == 1280
    assert storage.getNode("camera_a").getNode("distortion_model").string() == "plumb_bob"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "x"}, "not a calibration of refusion calibrate$"),
        ({"cam0": {}, "format": None}, "refusion calibrate --from-kalibr .* --distance METRES"),
        ({"camera_matrix": {}, "format": None}, "a ROS file describes one camera"),
        ({"version": 2}, "calibration format 2; this release reads 1"),
        ({"homography": [[1, 0], [0, 1]]}, "must be 3x3"),
        ({"homography": [[1, 0, 0], [0, -1, 0], [0, 0, 1]]}, "mirrors or folds"),
        ({"homography": [[1, 0, 0], [0, 1, 0], [-0.01, 0, 1]]}, "mirrors or folds"),
        ({"homography": [["x", 0, 0], [0, 1, 0], [0, 0, 1]]}, "damaged calibration"),
        ({"homography": [[float("nan"), 0, 0], [0, 1, 0], [0, 0, 1]]}, "finite"),
        ({"method": "magic"}, "method is 'magic'"),
        ({"reference": "c"}, "reference is 'c'"),
        ({"uncertainty_px": -1}, "uncertainty is -1"),
        ({"camera_a": {"width": 640}}, "'height' is missing"),
        ({"camera_a": None}, "damaged calibration"),
        ({"camera_a": {"width": 640, "height": 480, "camera_matrix": [[1, 0, 0]] * 3, "distortion_model": "fov",
                       "distortion_coefficients": []}}, "unknown distortion model 'fov'"),
        ({"rotation": [[1, 0, 0], [0, 1, 0], [0, 0, 2]]}, "not a 3x3 rotation"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path, changes, message):
    path = tmp_path / "c.yaml"
    save_calibration(path, calibration())
    values = yaml.safe_load(path.read_text())
    values.update(changes)
    path.write_text(
        yaml.safe_dump({key: value for key, value in values.items() if value is not None or key == "camera_a"})
    )
    with pytest.raises(InputError, match=message) as caught:
        load_calibration(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "no names with values"),
        (b"[1, 2]", "no names with values"),
        (b"a: [1, 2", "not a YAML file that can be read"),
        (b"\xff\xfe\x00\x01", "not a YAML file"),
        (b"a: !!python/object/apply:os.getcwd []", "not a YAML file that can be read"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_calibration(path)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        save_calibration(tmp_path / "file/c.yaml", calibration())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def ros_file(path: Path, lens: Camera, rectification: np.ndarray, projection: np.ndarray) -> Path:
    """As camera_calibration writes it."""

    def matrix(values: np.ndarray) -> dict[str, object]:
        rows, columns = np.atleast_2d(values).shape
        return {"rows": rows, "cols": columns, "data": np.ravel(values).tolist()}

    content = {
        "image_width": lens.size[1],
        "image_height": lens.size[0],
        "camera_name": "camera",
        "camera_matrix": matrix(lens.intrinsics),
        "distortion_model": lens.model,
        "distortion_coefficients": matrix(np.array(lens.distortion)),
        "rectification_matrix": matrix(rectification),
        "projection_matrix": matrix(projection),
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_ros_files_of_single_cameras(tmp_path):
    a, b = camera((512, 640), 560, "plumb_bob"), camera((720, 1280), 900, "rational_polynomial")
    paths = [
        ros_file(tmp_path / name, lens, np.eye(3), np.column_stack((lens.intrinsics, np.zeros(3))))
        for name, lens in (("a.yaml", a), ("b.yaml", b))
    ]
    read_a, read_b, position = read_ros_pair(*paths)
    assert position is None
    for read, lens in ((read_a, a), (read_b, b)):
        assert (read.size, read.model, read.distortion) == (lens.size, lens.model, lens.distortion)
        assert np.array_equal(read.intrinsics, lens.intrinsics)


@pytest.mark.parametrize("swapped", [False, True])
def test_ros_files_of_a_stereo_pair_hold_the_position(tmp_path, swapped):
    """Rectification by OpenCV, as camera_calibration does it, undone."""
    a, b, position = camera((480, 640), 560, "plumb_bob"), camera((480, 640), 600, "plumb_bob"), stereo()
    r_a, r_b, p_a, p_b = cv2.stereoRectify(
        a.intrinsics, np.array(a.distortion), b.intrinsics, np.array(b.distortion), (640, 480), position.rotation,
        position.translation[:, None],
    )[:4]  # fmt: skip
    paths = ros_file(tmp_path / "a.yaml", a, r_a, p_a), ros_file(tmp_path / "b.yaml", b, r_b, p_b)
    _, _, read = read_ros_pair(*(reversed(paths) if swapped else paths))
    rotation, translation = position.rotation, position.translation
    if swapped:
        rotation, translation = rotation.T, -rotation.T @ translation
    assert np.allclose(read.rotation, rotation, atol=1e-9)
    assert np.allclose(read.translation, translation, atol=1e-9)


def test_opencv_header_is_accepted(tmp_path):
    path = ros_file(tmp_path / "a.yaml", camera((48, 64), 50, "plumb_bob"), np.eye(3), np.zeros((3, 4)))
    path.write_text("%YAML:1.0\n---\n" + path.read_text())
    assert read_ros_camera(path).size == (48, 64)


def kalibr_file(path: Path, **changes: object) -> Path:
    second = np.eye(4)
    second[:3, :3], second[:3, 3] = stereo().rotation, stereo().translation
    third = np.eye(4)
    third[:3, 3] = (0.5, 0, 0)
    content = {
        name: {
            "camera_model": "pinhole",
            "intrinsics": [560.0, 561.0, 320.0, 250.0],
            "distortion_model": model,
            "distortion_coeffs": [-0.1, 0.01, 0.001, 0.0],
            "resolution": [640, 512],
            "rostopic": f"/{name}/image_raw",
            "cam_overlaps": [1],
        }
        for name, model in (("cam0", "radtan"), ("cam1", "equidistant"), ("cam2", "radtan"))
    }
    content["cam1"]["T_cn_cnm1"] = second.tolist()
    content["cam2"]["T_cn_cnm1"] = third.tolist()
    content["cam1"].update(changes)
    path.write_text(yaml.safe_dump(content))
    return path


def test_kalibr_chain(tmp_path):
    path = kalibr_file(tmp_path / "camchain.yaml", timeshift_cam_imu=0.003)
    a, b, position = read_kalibr_pair(path)
    assert (a.size, a.model, a.distortion) == ((512, 640), "plumb_bob", (-0.1, 0.01, 0.001, 0.0))
    assert b.model == "equidistant"
    assert np.array_equal(a.intrinsics, [[560, 0, 320], [0, 561, 250], [0, 0, 1]])
    assert np.allclose(position.rotation, stereo().rotation) and np.allclose(position.translation, stereo().translation)
    _, _, back = read_kalibr_pair(path, ("cam1", "cam0"))
    assert np.allclose(back.rotation, stereo().rotation.T)
    assert np.allclose(back.translation, -stereo().rotation.T @ stereo().translation)
    _, _, over = read_kalibr_pair(path, ("cam0", "cam2"))
    assert np.allclose(over.translation, np.add(stereo().translation, (0.5, 0, 0)))


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({"camera_model": "omni"}, ("cam0", "cam1"), "camera model 'omni'; only pinhole"),
        ({"distortion_model": "fov"}, ("cam0", "cam1"), "distortion model 'fov'"),
        ({"intrinsics": [1, 2]}, ("cam0", "cam1"), "cam1 needs intrinsics"),
        ({"intrinsics": [-5, 5, 1, 1]}, ("cam0", "cam1"), "focal lengths above 0"),
        ({"T_cn_cnm1": [[1, 0]]}, ("cam0", "cam1"), "T_cn_cnm1 must hold 4x4 numbers"),
        ({}, ("cam0", "cam7"), "no camera 'cam7' there; it has cam0, cam1, cam2"),
        ({}, ("cam1", "cam1"), "both cam1"),
    ],
)
def test_kalibr_files_that_do_not_serve(tmp_path, changes, names, message):
    path = kalibr_file(tmp_path / "camchain.yaml", **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_kalibr_pair(path, names)
    assert str(path) in str(caught.value)


def test_ros_files_that_do_not_serve(tmp_path):
    path = ros_file(tmp_path / "a.yaml", camera((48, 64), 50, "plumb_bob"), np.eye(3), np.zeros((3, 4)))
    values = yaml.safe_load(path.read_text())
    for changes, message in (
        ({"camera_matrix": None}, "camera_matrix must hold 3x3 numbers"),
        ({"camera_matrix": {"data": [1, 2]}}, "camera_matrix must hold 3x3 numbers"),
        ({"distortion_model": "thin_prism"}, "distortion model 'thin_prism'"),
        ({"image_width": "wide"}, "needs image_width"),
        ({"distortion_coefficients": {"data": [1.0] * 7}}, "takes 4 or 5 finite numbers"),
    ):
        path.write_text(yaml.safe_dump({**values, **changes}))
        with pytest.raises(InputError, match=message):
            read_ros_camera(path)
    path.write_text("image_width: 5")
    with pytest.raises(InputError, match="no camera_matrix"):
        read_ros_camera(path)
