"""Registration against pictures that two cameras of different lenses see of one painted plane, by casting rays."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from runtime.calibration import Calibration, Stereo, plane_homography
from runtime.camera import Camera, pixel_grid
from runtime.errors import InputError
from runtime.register import Registration, largest_rectangle

DISTANCE = 5.0
STEREO = Stereo(cv2.Rodrigues(np.array([0.01, -0.04, 0.02]))[0], np.array([0.08, 0.01, 0.0]))


def camera(size: tuple[int, int], focal: float, model: str = "none", coefficients: tuple[float, ...] = ()) -> Camera:
    centre = size[1] / 2 - 4, size[0] / 2 + 3
    return Camera(size, np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]]), model, coefficients)


# The thermal camera sees less than the visible one, in fewer pixels.
A = camera((192, 240), 260, "plumb_bob", (-0.25, 0.08, 0.001, -0.001, 0.0))
B = camera((360, 480), 380, "equidistant", (-0.02, 0.004, 0.0, 0.0))
CALIBRATION = Calibration(A, B, plane_homography(A, B, STEREO, DISTANCE), "stereo", distance=DISTANCE, stereo=STEREO)


def paint(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Brightness of the plane, 0 to 1, without detail finer than a camera's pixel."""
    return 0.5 + 0.2 * np.sin(3.1 * x + 1) * np.cos(2.3 * y) + 0.2 * np.sin(7 * x * y / 3 + 5 * y) + 0.05 * x


def seen(by: Camera, *, is_b: bool, distorted: bool = True) -> np.ndarray:
    """The plane z = DISTANCE of camera a's coordinates as a camera sees it: HxW float64."""
    pixels = pixel_grid(by.size)
    ideal = by.undistorted(pixels) if distorted else pixels
    rays = np.column_stack((ideal, np.ones(len(ideal)))) @ np.linalg.inv(by.intrinsics).T
    origin = np.zeros(3)
    if is_b:
        rays, origin = rays @ STEREO.rotation, -STEREO.rotation.T @ STEREO.translation
    points = origin + rays * ((DISTANCE - origin[2]) / rays[:, 2])[:, None]
    return np.clip(paint(points[:, 0], points[:, 1]), 0, 1).reshape(by.size)


def counts(values: np.ndarray, dtype: type = np.uint16) -> np.ndarray:
    return np.rint(values * np.iinfo(dtype).max).astype(dtype)


def difference(one: np.ndarray, other: np.ndarray, mask: np.ndarray) -> float:
    """Largest, as a share of the full scale."""
    scale = float(np.iinfo(one.dtype).max)
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64))[mask > 0].max()) / scale


def test_a_is_laid_on_b():
    """Where the mask says so, a shows what b shows; b is not touched."""
    registration = Registration(CALIBRATION)
    a, b = counts(seen(A, is_b=False)), counts(seen(B, is_b=True))
    aligned_a, aligned_b = registration(a, b)
    assert aligned_b is b
    assert aligned_a.dtype == np.uint16 and aligned_a.shape == registration.size == registration.mask.shape == B.size
    assert 0.5 < (registration.mask > 0).mean() < 0.95
    assert difference(aligned_a, b, registration.mask) < 0.01
    # A tenth of that plane's distance less, and the pictures would not fit.
    wrong = Registration(CALIBRATION.at_distance(0.8 * DISTANCE))(a, b)[0]
    assert difference(wrong, b, registration.mask) > 0.03


def test_b_is_laid_on_a():
    registration = Registration(CALIBRATION, reference="a")
    a, b = counts(seen(A, is_b=False)), counts(seen(B, is_b=True))
    aligned_a, aligned_b = registration(a, b)
    assert aligned_a is a and aligned_b.shape == A.size
    assert difference(a, aligned_b, registration.mask) < 0.01


def test_undistorted_output_shows_what_ideal_cameras_would_see():
    registration = Registration(CALIBRATION, undistort=True)
    aligned_a, aligned_b = registration(counts(seen(A, is_b=False)), counts(seen(B, is_b=True)))
    expected = counts(seen(B, is_b=True, distorted=False))
    assert difference(aligned_b, expected, registration.mask) < 0.01
    assert difference(aligned_a, expected, registration.mask) < 0.01


def test_common_field_is_cropped():
    whole, cropped = Registration(CALIBRATION), Registration(CALIBRATION, crop=True)
    x, y, width, height = cropped.window
    assert cropped.size == (height, width) and (cropped.mask == 255).all()
    assert (whole.mask[y : y + height, x : x + width] == 255).all()
    a, b = counts(seen(A, is_b=False)), counts(seen(B, is_b=True))
    aligned_a, aligned_b = cropped(a, b)
    assert np.array_equal(aligned_b, b[y : y + height, x : x + width]) and np.shares_memory(aligned_b, b)
    assert difference(aligned_a, aligned_b, cropped.mask) < 0.01
    # A rectangle a tenth larger would not fit.
    assert width * height > 0.85 * whole.mask.astype(bool).sum()


def test_output_size():
    registration = Registration(CALIBRATION, crop=True, output_size=(120, 160))
    aligned_a, aligned_b = registration(counts(seen(A, is_b=False)), counts(seen(B, is_b=True)))
    assert aligned_a.shape == aligned_b.shape == registration.mask.shape == (120, 160)
    assert difference(aligned_a, aligned_b, registration.mask) < 0.02


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("coloured", ["neither", "a", "b"])
def test_depth_and_channels_stay(dtype, coloured):
    registration = Registration(CALIBRATION)
    a, b = counts(seen(A, is_b=False), dtype), counts(seen(B, is_b=True), np.uint8)
    alone = registration(a, b)[0].copy()
    if coloured == "a":
        a = np.dstack((a, a // 2, a // 3))
    if coloured == "b":
        b = np.dstack((b, b, b))
    aligned_a, aligned_b = registration(a, b)
    assert aligned_a.dtype == dtype and aligned_a.ndim == a.ndim and aligned_b.shape == b.shape
    first = aligned_a[..., 0] if a.ndim == 3 else aligned_a
    assert np.array_equal(first, alone)
    assert (first[registration.mask == 0] <= first.max()).all()


def test_outside_the_mask_there_is_nothing():
    registration = Registration(CALIBRATION)
    aligned_a, _ = registration(np.full(A.size, 65535, np.uint16), np.zeros(B.size, np.uint8))
    assert (aligned_a[registration.mask > 0] == 65535).all()
    # Two pixels further out not even the edge's half-covered pixels are left.
    outside = cv2.dilate(registration.mask, np.ones((7, 7), np.uint8)) == 0
    assert outside.any() and (aligned_a[outside] == 0).all()


def test_cameras_may_deliver_other_sizes():
    """Half of a's and twice b's calibrated size, given at once or met on the way."""
    half_a, double_b = A.resized((96, 120)), B.resized((720, 960))
    a, b = counts(seen(half_a, is_b=False)), counts(seen(double_b, is_b=True))
    built = Registration(CALIBRATION, (96, 120), (720, 960))
    met = Registration(CALIBRATION)
    met(counts(seen(A, is_b=False)), counts(seen(B, is_b=True)))
    for registration in (built, met):
        aligned_a, _ = registration(a, b)
        assert registration.size == (720, 960)
        assert difference(aligned_a, b, registration.mask) < 0.02
    assert np.array_equal(built.mask, met.mask)
    with pytest.raises(InputError, match="another aspect ratio"):
        met(np.zeros((100, 100), np.uint8), b)


def test_strong_reduction_does_not_alias():
    """A fine pattern of the visible camera becomes an even grey in few thermal pixels, not a coarse pattern."""
    a, b = Camera((60, 80)), Camera((480, 640))
    scale = np.array([[8, 0, 3.5], [0, 8, 3.5], [0, 0, 1.0]])
    registration = Registration(Calibration(a, b, scale, "targetless", reference="a"))
    stripes = np.zeros((480, 640), np.uint8)
    stripes[:, ::2] = 200
    _, aligned = registration(np.zeros((60, 80), np.uint8), stripes)
    inner = aligned[2:-2, 2:-2].astype(int)
    assert np.abs(inner - 100).max() <= 4


def test_identity_changes_nothing():
    registration = Registration(Calibration(Camera((48, 64)), Camera((48, 64)), np.eye(3), "targetless"))
    image = np.random.default_rng(0).integers(0, 65536, (48, 64), dtype=np.uint16)
    aligned, _ = registration(image, image)
    assert np.array_equal(aligned, image) and (registration.mask == 255).all()


def test_buffers_are_used_again_but_never_while_held():
    registration = Registration(CALIBRATION)
    b = np.zeros(B.size, np.uint8)
    bright, dark = np.full(A.size, 200, np.uint8), np.zeros(A.size, np.uint8)
    held = registration(bright, b)[0]
    view = registration(bright, b)[0][100:200]
    for _ in range(3):
        registration(dark, b)
    assert held.max() == 200 and view.max() == 200
    addresses = set()
    for _ in range(20):
        addresses.add(registration(dark, b)[0].ctypes.data)
    assert len(addresses) == 1


def test_no_common_field_is_refused():
    apart = np.array([[1, 0, 5000], [0, 1, 0], [0, 0, 1.0]])
    with pytest.raises(InputError, match="no common field of view"):
        Registration(Calibration(Camera((48, 64)), Camera((48, 64)), apart, "targetless"))


def test_wrong_use_is_refused():
    with pytest.raises(InputError, match="reference is 'c'"):
        Registration(CALIBRATION, reference="c")
    with pytest.raises(InputError, match="too small"):
        Registration(CALIBRATION, output_size=(0, 100))
    with pytest.raises(InputError, match="a holds float64"):
        Registration(CALIBRATION)(np.zeros(A.size), np.zeros(B.size, np.uint8))


@pytest.mark.parametrize("seed", range(6))
def test_largest_rectangle_holds_only_true_pixels(seed):
    """Against every rectangle of a small mask; on a large one against the exact answer for a circle."""
    rng = np.random.default_rng(seed)
    mask = cv2.GaussianBlur(rng.random((17, 23)), (0, 0), 2) > 0.48
    mask[8, 8] = True
    x, y, width, height = largest_rectangle(mask)
    assert mask[y : y + height, x : x + width].all()
    rows, columns = mask.shape
    total = cv2.integral(mask.astype(np.uint8))
    best = 0
    for top in range(rows):
        for bottom in range(top + 1, rows + 1):
            sums = total[bottom] - total[top]
            for left in range(columns):
                widths = [
                    r - left
                    for r in range(left + 1, columns + 1)
                    if sums[r] - sums[left] == (bottom - top) * (r - left)
                ]
                best = max(best, (bottom - top) * max(widths, default=0))
    assert width * height == best


def test_largest_rectangle_of_a_disc():
    y, x = np.mgrid[:900, :1000]
    disc = (x - 500) ** 2 + (y - 450) ** 2 < 400**2
    left, top, width, height = largest_rectangle(disc)
    assert disc[top : top + height, left : left + width].all()
    assert width * height > 0.97 * 2 * 400**2  # the square inscribed into a circle
