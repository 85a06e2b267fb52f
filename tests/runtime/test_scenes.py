"""The generated scene: repeatable, moving, and each camera sees what the other doesn't."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import scenes
from runtime.color import luma
from runtime.errors import InputError
from runtime.scenes import PERIOD, night_road

SMALL = (96, 128)


def pixel(point: tuple[float, float, float], size: tuple[int, int] = scenes.SIZE) -> tuple[int, int]:
    """Row and column of a world point."""
    ((u, v),) = scenes._Camera(*size).project([point])
    return int(v), int(u)


def test_equal_arguments_give_equal_pictures():
    first = night_road(7, SMALL, seed=3)
    scenes._scene.cache_clear()
    for one, other in zip(first, night_road(7, SMALL, seed=3), strict=True):
        np.testing.assert_array_equal(one, other)


def test_pictures_are_aligned_8_bit_images_that_the_caller_owns():
    infrared, visible = night_road(0, SMALL)
    assert infrared.dtype == visible.dtype == np.uint8
    assert infrared.shape == SMALL and visible.shape == (*SMALL, 3)
    infrared[:], visible[:] = 0, 0
    assert night_road(0, SMALL)[0].mean() > 20


def test_seeds_differ():
    one, other = (night_road(0, SMALL, seed=seed)[1].astype(int) for seed in (0, 1))
    assert np.abs(one - other).mean() > 1


def test_frames_move_and_the_motion_repeats():
    def difference(one: int, other: int) -> float:
        return max(
            float(np.abs(a.astype(int) - b.astype(int)).reshape(*SMALL, -1).max(2).mean())
            for a, b in zip(night_road(one, SMALL), night_road(other, SMALL), strict=True)
        )

    noise = difference(0, PERIOD)  # the motion is the same, the noise is not
    assert 0 < noise < 5
    assert difference(0, 12) > noise + 0.5
    assert difference(PERIOD - 1, PERIOD) < noise + 1.5  # no jump where it repeats


def test_every_frame_of_a_period_can_be_drawn():
    for frame in range(0, PERIOD, 5):
        infrared, _ = night_road(frame, (32, 48))
        assert infrared.shape == (32, 48)


def test_the_deer_is_hot_in_infrared_and_dark_in_visible():
    infrared, visible = night_road()
    row, column = pixel((5.0, 0.9, 9.5))
    body = np.s_[row - 4 : row + 5, column - 8 : column + 9]
    around = np.s_[row - 4 : row + 5, column - 60 : column - 45]
    assert infrared[body].min() > 200
    assert infrared[around].max() < 140
    assert luma(visible)[body].max() < 0.25
    assert abs(luma(visible)[body].mean() - luma(visible)[around].mean()) < 0.12


def test_text_and_headlights_are_only_in_the_visible_picture():
    infrared, visible = night_road()
    (top, left), (bottom, right) = pixel((3.1, 3.2, 19.0)), pixel((5.8, 2.4, 19.0))
    sign = np.s_[top:bottom, left:right]
    assert luma(visible)[sign].std() > 0.1
    assert infrared[sign].std() / 255 < 0.02
    car = min((car for car in scenes._traffic(0.0) if car.oncoming), key=lambda car: car.z)
    row, column = pixel(car.at(0.66, 0.72))
    assert visible[row, column].min() > 240
    assert infrared[row, column] < 200


def test_the_sky_is_cold_and_lit_windows_are_not_hot():
    infrared, visible = night_road()
    assert infrared[:40, 320:].mean() < 40
    bright = (luma(visible) > 0.7) & (np.arange(480)[:, None] < 150) & (np.arange(640) < 130)
    assert bright.sum() > 50
    assert infrared[bright].mean() < 110


def test_nobody_is_run_over():
    for frame in range(PERIOD):
        second = frame / scenes.FRAMES_PER_SECOND
        for person in (walker for walker in scenes._walkers(second) if isinstance(walker, scenes._Person)):
            for car in scenes._traffic(second):
                clear = abs(car.x - person.x) > 1.0 or not car.z - 1 < person.z < car.z + car.LENGTH + 1
                assert clear, (frame, car, person)


@pytest.mark.parametrize(
    ("frame", "size", "seed"), [(0, (31, 640), 0), (0, (480, 0), 0), (-1, SMALL, 0), (0, SMALL, -1)]
)
def test_what_cannot_be_drawn_is_refused(frame, size, seed):
    with pytest.raises(InputError):
        night_road(frame, size, seed)


@pytest.mark.parametrize("size", [(32, 32), (240, 427), (720, 400)])
def test_other_sizes(size):
    infrared, visible = night_road(3, size)
    assert infrared.shape == size and visible.shape == (*size, 3)
    assert infrared.std() > 15 and visible.std() > 15
