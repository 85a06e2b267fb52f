"""Estimating the alignment of two cameras: of generated night scenes, of rendered targets, and of real pairs."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
import pytest

from runtime.alignment.fields import corner_distance, orientation_field, to_grey, turned
from runtime.alignment.targetless import Alignment, align
from runtime.alignment.targets import align_target, find_target, parse_target
from runtime.calibration import Stereo, plane_homography
from runtime.camera import Camera, pixel_grid
from runtime.errors import InputError
from runtime.images import find_pairs, read_image
from runtime.scenes import night_road

SIZE = (240, 320)
Pictures = list[np.ndarray]


def scenes(count: int, size: tuple[int, int] = SIZE) -> tuple[Pictures, Pictures]:
    """Infrared and visible pictures of `count` different moments and streets."""
    pairs = [night_road(97 * number, size, seed=number) for number in range(count)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def similarity(scale: float, degrees: float, dx: float, dy: float, size: tuple[int, int] = SIZE) -> np.ndarray:
    """About the picture's centre."""
    centre = np.array([[1, 0, (size[1] - 1) / 2], [0, 1, (size[0] - 1) / 2], [0, 0, 1]])
    c, s = scale * np.cos(np.radians(degrees)), scale * np.sin(np.radians(degrees))
    return centre @ np.array([[c, -s, dx], [s, c, dy], [0, 0, 1]]) @ np.linalg.inv(centre)


def turn(degrees_x: float, degrees_y: float, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The homography of a camera that is turned."""
    lens = np.array([[size[1], 0, (size[1] - 1) / 2], [0, size[1], (size[0] - 1) / 2], [0, 0, 1]])
    rotation = cv2.Rodrigues(np.radians([degrees_x, degrees_y, 0.0]))[0]
    return lens @ rotation @ np.linalg.inv(lens)


def moved(pictures: Pictures, move: np.ndarray, border: int = 40) -> tuple[Pictures, np.ndarray]:
    """What a camera sees whose pixels are `move` of the picture's, without the outermost pixels, and the truth."""
    height, width = pictures[0].shape[:2]
    shifted = np.array([[1, 0, -border], [0, 1, -border], [0, 0, 1]]) @ move
    size = (width - 2 * border, height - 2 * border)
    return [cv2.warpPerspective(picture, shifted, size) for picture in pictures], np.linalg.inv(shifted)


def error(found: Alignment, truth: np.ndarray, a: Pictures) -> float:
    return corner_distance(found.homography, truth, a[0].shape[:2])


def test_fields_agree_where_contrast_is_inverted():
    picture = to_grey(scenes(1)[1][0])
    assert np.allclose(orientation_field(picture), orientation_field(255 - picture), atol=1e-4)
    assert np.allclose(orientation_field(picture), orientation_field(0.2 * picture + 40), atol=0.05)


def test_a_turned_picture_has_the_turned_field():
    picture = to_grey(scenes(1)[1][0])
    quarter = orientation_field(np.ascontiguousarray(np.rot90(picture, -1)))
    expected = np.rot90(turned(orientation_field(picture), np.pi / 2), -1)
    assert np.allclose(quarter[4:-4, 4:-4], expected[4:-4, 4:-4], atol=1e-3)


@pytest.mark.parametrize(
    "move", [similarity(0.85, 2.5, 14, -9), similarity(1.2, -3, -20, 6), similarity(1, 0, 0, 0)]
)  # fmt: skip
def test_infrared_is_found_in_visible(move):
    infrared, visible = scenes(3)
    a, truth = moved(infrared, move)
    found = align(a, visible)
    assert error(found, truth, a) < 1.5
    assert found.trusted and found.reason == ""
    assert error(found, truth, a) < found.uncertainty < 6


def test_estimates_repeat():
    infrared, visible = scenes(1)
    a, _ = moved(infrared, similarity(1.05, 1, 5, 3))
    assert np.array_equal(align(a, visible).homography, align(a, visible).homography)


def test_progress_sums_to_one():
    infrared, visible = scenes(1)
    shares: list[float] = []
    align(infrared, visible, progress=shares.append)
    assert sum(shares) == pytest.approx(1) and len(shares) > 10


def test_raw_counts_of_a_small_thermal_camera_with_a_narrow_lens():
    """Half the pixels and 60 % of the field of view, 16 bits of which a few hundred counts are used, inverted."""
    infrared, visible = scenes(3, (480, 640))
    move = (
        np.diag((0.5, 0.5, 1)) @ np.array([[1, 0, -130], [0, 1, -90], [0, 0, 1]]) @ similarity(1, 1, 0, 0, (480, 640))
    )
    small = [cv2.warpPerspective(cv2.GaussianBlur(picture, (0, 0), 1), move, (192, 144)) for picture in infrared]
    a = [(30000 - 2 * picture.astype(np.int32)).astype(np.uint16) for picture in small]
    truth = np.linalg.inv(move)
    found = align(a, visible, magnification=2.1)
    assert found.trusted and error(found, truth, a) < 2.5


def test_perspective_of_cameras_that_are_turned_to_each_other():
    infrared, visible = scenes(4)
    a, truth = moved(infrared, turn(4, -6) @ similarity(1, 1, -25, -15))
    found = align(a, visible)
    assert found.model == "perspective"
    assert found.trusted and error(found, truth, a) < 2
    plain, truth = moved(infrared, similarity(1, 1, 5, 5))
    assert align(plain, visible).model == "similarity"


def test_exact_where_both_see_the_same():
    """Of one picture and its negative the estimate is right to a few hundredths of a pixel."""
    _, visible = scenes(2)
    grey = [255 - cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY) for picture in visible]
    a, truth = moved(grey, similarity(1.1, -1.5, 8, 4))
    found = align(a, visible)
    assert error(found, truth, a) < 0.1


@pytest.mark.parametrize("count", [1, 3])
def test_pictures_of_different_scenes_are_not_trusted(count):
    infrared, _ = scenes(count)
    rng = np.random.default_rng(count)
    for _ in range(3):
        others = [
            cv2.GaussianBlur(rng.integers(0, 256, SIZE).astype(np.float32), (0, 0), rng.uniform(2, 8)) for _ in infrared
        ]
        b = [cv2.normalize(other, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8) for other in others]
        found = align(infrared, b)
        assert not found.trusted and "\n" not in found.reason and found.reason


def test_what_cannot_be_aligned_is_refused():
    picture = scenes(1)[0][0]
    for a, b, message in (
        ([], [picture], "no pictures of camera a"),
        ([picture], [picture, picture], "1 pictures of camera a and 2 of camera b"),
        ([picture, picture[:100]], [picture, picture], "differ in size"),
        ([picture[:30, :30]], [picture], "smaller than 48"),
        ([np.full(SIZE, 7, np.uint8)], [picture], "of one value each"),
        ([picture.astype(float)], [picture], "picture 1 of camera a holds float64"),
    ):
        with pytest.raises(InputError, match=message):
            align(a, b)
    for options in ({"magnification": 0.0}, {"span": 0.5}, {"roll": 90.0}):
        with pytest.raises(InputError, match="make no range to search"):
            align([picture], [picture], **options)


@pytest.mark.slow
def test_real_pairs_moved_apart(data_dir):
    """RoadScene, which itself is off by about 2 pixels: four pairs pooled, and pairs of different scenes refused."""
    folder = data_dir / "ivif" / "dev" / "RoadScene"
    pairs = [(read_image(pair.a), read_image(pair.b)) for pair in find_pairs(folder / "a", folder / "b")]
    rng = np.random.default_rng(3)
    for _ in range(4):
        chosen = [pairs[k] for k in rng.choice(len(pairs), 4, replace=False)]
        height, width = (min(pair[0].shape[axis] for pair in chosen) for axis in (0, 1))
        infrared, visible = ([pair[side][:height, :width] for pair in chosen] for side in (0, 1))
        move = similarity(rng.uniform(0.85, 1.2), rng.uniform(-3, 3), *rng.uniform(-20, 20, 2), (height, width))
        a, truth = moved(infrared, move)
        found = align(a, visible)
        assert found.trusted and error(found, truth, a) < 5
        strangers = [cv2.resize(pairs[k][1], (width, height)) for k in rng.choice(len(pairs), 4, replace=False)]
        assert not align(a, strangers).trusted


# Targets

BOARDS = ("chessboard:7x5", "circles:7x5", "asymmetric:4x9")
LENS_A = Camera((240, 320), np.array([[330.0, 0, 158], [0, 330, 123], [0, 0, 1]]), "plumb_bob", (-0.22, 0.05, 0, 0, 0))
LENS_B = Camera((480, 640), np.array([[600.0, 0, 325], [0, 600, 236], [0, 0, 1]]), "plumb_bob", (-0.1, 0.02, 0, 0, 0))
POSITION = Stereo(cv2.Rodrigues(np.array([0.01, -0.02, 0.015]))[0], np.array([0.05, 0.004, 0.0]))
SQUARE = 0.05
Pose = tuple[np.ndarray, np.ndarray]


def board(kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Brightness 0 or 1 of a board at places in its plane, in squares; its points are where `Target.points` says."""
    name, _, counts = kind.partition(":")
    columns, rows = (int(part) for part in counts.split("x"))
    if name == "chessboard":
        inside = (x > -1) & (x < columns) & (y > -1) & (y < rows)
        return np.where(inside & ((np.floor(x) + np.floor(y)) % 2 == 0), 0.0, 1.0)
    if name == "circles":
        distance = np.hypot(x - np.clip(np.rint(x), 0, columns - 1), y - np.clip(np.rint(y), 0, rows - 1))
        return np.where(distance < 0.3, 0.0, 1.0)
    row = np.clip(np.rint(y), 0, rows - 1)
    nearest = [np.full(x.shape, np.inf)]
    for near in (row - 1, row, row + 1):
        column = np.clip(np.rint((x - near % 2) / 2), 0, columns - 1)
        valid = (near >= 0) & (near < rows)
        nearest.append(np.where(valid, np.hypot(x - 2 * column - near % 2, y - near), np.inf))
    return np.where(np.min(nearest, axis=0) < 0.42, 0.0, 1.0)


@cache
def rays_of(lens: Camera, fine: int) -> np.ndarray:
    """Directions that the pixels look to, with `fine` samples a side of each: Nx3."""
    large = lens.resized((fine * lens.size[0], fine * lens.size[1]))
    ideal = large.undistorted(pixel_grid(large.size))
    return np.column_stack((ideal, np.ones(len(ideal)))) @ np.linalg.inv(large.intrinsics).T


def view(lens: Camera, kind: str, pose: Pose, fine: int = 2) -> np.ndarray:
    """A board as a camera sees it: HxW from 0 to 1. The pose takes the board's metres to the camera's."""
    rotation, translation = pose
    # In the board's coordinates the camera is at -R't, and the board is the plane z = 0.
    origin, directions = -rotation.T @ translation, rays_of(lens, fine) @ rotation
    places = origin + directions * (-origin[2] / directions[:, 2])[:, None]
    picture = board(kind, places[:, 0] / SQUARE, places[:, 1] / SQUARE)
    picture = picture.reshape(fine * lens.size[0], fine * lens.size[1])
    return cv2.resize(picture, lens.size[::-1], interpolation=cv2.INTER_AREA)


def poses(kind: str, count: int, distance: float, tilt: float, spread: float, seed: int = 0) -> list[Pose]:
    """Poses of the board's middle all over the field, from camera a."""
    rng = np.random.default_rng(seed)
    middle = parse_target(kind, 1000 * SQUARE).points.mean(axis=0)
    found = []
    for _ in range(count):
        rotation = cv2.Rodrigues(np.append(rng.uniform(-tilt, tilt, 2), rng.uniform(-0.1, 0.1)))[0]
        away = distance * rng.uniform(1 - spread, 1 + spread)
        centre = np.array([rng.uniform(-0.15, 0.15) * away, rng.uniform(-0.1, 0.1) * away, away])
        found.append((rotation, centre - rotation @ middle))
    return found


def pictures_of(kind: str, found: list[Pose]) -> tuple[Pictures, Pictures]:
    """Thermal pictures: 16 bits, blurred, noisy, inverted. Visible ones: 8 bits, of a darker and a lighter half."""
    rng = np.random.default_rng(1)
    a, b = [], []
    for rotation, translation in found:
        thermal = cv2.GaussianBlur(view(LENS_A, kind, (rotation, translation)), (0, 0), 0.8)
        a.append((8200 - 600 * thermal + rng.normal(0, 8, thermal.shape)).astype(np.uint16))
        in_b = POSITION.rotation @ rotation, POSITION.rotation @ translation + POSITION.translation
        visible = view(LENS_B, kind, in_b) * np.linspace(90, 200, LENS_B.size[1]) + 20
        b.append(np.repeat((visible + rng.normal(0, 2, visible.shape)).astype(np.uint8)[..., None], 3, axis=2))
    return a, b


@pytest.mark.parametrize("kind", BOARDS)
def test_points_of_a_board_are_found_where_they_are(kind):
    target = parse_target(kind, 1000 * SQUARE)
    pose = poses(kind, 1, 1.0, 0.3, 0)[0]
    a, _ = pictures_of(kind, [pose])
    expected = cv2.projectPoints(
        target.points, cv2.Rodrigues(pose[0])[0], pose[1], LENS_A.intrinsics, np.array(LENS_A.distortion)
    )[0].reshape(-1, 2)
    for picture in (a[0], 65535 - a[0]):
        points = find_target(picture, target)
        assert points is not None
        # A chessboard of which one side is odd and one even could be read from either end only by contrast.
        errors = min(np.abs(order - expected).max() for order in (points, points[::-1]))
        assert errors < 0.3
    assert find_target(np.random.default_rng(0).integers(0, 255, (200, 200)).astype(np.uint8), target) is None


@pytest.mark.parametrize("kind", BOARDS)
def test_homography_from_views_of_a_board(kind):
    """Boards at about one distance, intrinsics known: the homography of that distance."""
    a, b = pictures_of(kind, poses(kind, 6, 1.0, 0.08, 0.02))
    found = align_target(a, b, parse_target(kind), LENS_A, LENS_B)
    truth = plane_homography(LENS_A, LENS_B, POSITION, 1.0)
    assert len(found.used) >= 5 and found.stereo is None
    assert found.rms < 1.0
    assert corner_distance(found.homography, truth, LENS_A.size) < 2.5


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
def test_position_of_the_cameras_from_views_of_a_board(known):
    """With the square's size: baseline, rotation and every distance; intrinsics too where they aren't known."""
    kind = "chessboard:7x5"
    a, b = pictures_of(kind, poses(kind, 14, 1.0, 0.45, 0.25, seed=2))
    lenses = (LENS_A, LENS_B) if known else (Camera(LENS_A.size), Camera(LENS_B.size))
    found = align_target(a, b, parse_target(kind, 1000 * SQUARE), *lenses)
    assert found.stereo is not None and found.distance == pytest.approx(1.0, abs=0.15)
    assert found.rms < 0.3
    if known:
        angle = np.linalg.norm(cv2.Rodrigues(found.stereo.rotation @ POSITION.rotation.T)[0])
        assert np.degrees(angle) < 0.05
        assert np.allclose(found.stereo.translation, POSITION.translation, atol=0.001)
    else:
        assert found.a.intrinsics[0, 0] == pytest.approx(330, rel=0.02)
        assert found.b.intrinsics[0, 0] == pytest.approx(600, rel=0.02)
    # Each with its own intrinsics: a place in the world, by way of a's pixels, in b's.
    for distance in (0.7, 1.0, 5.0):
        pixels = pixel_grid((4, 4)) * (80, 60) + (40, 30)
        expected, estimate = (
            b.distorted(
                cv2.perspectiveTransform(a.undistorted(pixels)[None], plane_homography(a, b, position, distance))[0]
            )
            for a, b, position in ((LENS_A, LENS_B, POSITION), (found.a, found.b, found.stereo))
        )
        assert np.abs(estimate - expected).max() < (0.5 if known else 2.0)


def test_boards_at_several_distances_do_not_make_one_homography():
    kind = "chessboard:7x5"
    near, far = (poses(kind, 3, distance, 0.05, 0) for distance in (0.7, 1.4))
    a, b = pictures_of(kind, near + far)
    with pytest.raises(InputError, match=r"one homography leaves .* pixels .* --square"):
        align_target(a, b, parse_target(kind), LENS_A, LENS_B)


def test_too_few_boards_are_refused():
    kind = "chessboard:7x5"
    a, b = pictures_of(kind, poses(kind, 2, 1.0, 0.1, 0))
    with pytest.raises(InputError, match=r"found by both cameras in 2 of 3 pairs \(camera a 2, camera b 3\)"):
        align_target([*a, np.zeros_like(a[0])], [*b, b[0]], parse_target(kind), LENS_A, LENS_B)
    bare = Camera(LENS_A.size), Camera(LENS_B.size)
    with pytest.raises(InputError, match="intrinsics of camera a need 6 views"):
        align_target([*a, a[0]], [*b, b[0]], parse_target(kind, 50), *bare)


@pytest.mark.parametrize(
    "text", ["chessboard", "chess:9x6", "circles:9", "circles:2x9", "asymmetric:4x", "", "circles:axb"]
)
def test_targets_that_are_not_understood(text):
    with pytest.raises(InputError, match="is not understood; give chessboard:9x6"):
        parse_target(text)


def test_square_must_have_a_size():
    with pytest.raises(InputError, match="a square of 0 mm"):
        parse_target("chessboard:9x6", 0)
