"""The clocks' offset from motion, on pictures whose true offset is known."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest

from runtime.errors import InputError
from runtime.frames import Frame
from runtime.offset import MotionSensor, Offset, estimate_offset, measure_offset
from runtime.sinks.bag import DEFINITIONS, IMAGE_TYPE, image_message

UNIX = 1.7e9
SIZE = (120, 160)
SECONDS = 12.0

Path = Callable[[float], float]


def hand(rng: np.random.Generator) -> Path:
    """Place (0 to 1) of something that moves irregularly: it goes somewhere, rests, goes on."""
    times, places = [0.0], [0.5]
    while times[-1] < SECONDS + 1:
        place = rng.uniform(0.15, 0.85)
        times += [times[-1] + rng.uniform(0.15, 0.6), 0.0]
        times[-1] = times[-2] + rng.uniform(0, 0.7)
        places += [place, place]
    return lambda time: float(np.interp(time, times, places))


def film(
    path: Path, fps: float, offset: float, rng: np.random.Generator, *, thermal: bool, noise: float = 2
) -> list[Frame]:
    """What a camera whose clock is `offset` ahead sees: 14-bit counts or BGR, on another background each."""
    background = cv2.GaussianBlur(rng.uniform(0, 255, SIZE).astype(np.float32), (0, 0), 5)
    background = (background - background.min()) / np.ptp(background) * (40 if thermal else 160) + 40
    frames, time = [], rng.uniform(0, 1 / fps)
    while time < SECONDS:
        picture = background.copy()
        cv2.circle(picture, (int(path(time) * SIZE[1] * 16), SIZE[0] * 8), 18 * 16, 230 if thermal else 20, -1, shift=4)
        picture += rng.normal(0, noise, SIZE)
        grey = np.clip(picture, 0, 255)
        image = (3000 + 8 * grey).astype(np.uint16) if thermal else cv2.merge([grey.astype(np.uint8)] * 3)
        frames.append(Frame(image, UNIX + time + offset, "device", time, len(frames), "camera"))
        time += 1 / fps + rng.normal(0, 0.003)
    return frames


def sensors_of(*films: list[Frame]) -> list[MotionSensor]:
    sensors = [MotionSensor() for _ in films]
    for sensor, frames in zip(sensors, films, strict=True):
        for frame in frames:
            sensor.add(frame)
    return sensors


def estimate(seed: int, thermal_fps: float, offset: float, path: Path | None = None, noise: float = 2) -> Offset:
    rng = np.random.default_rng(seed)
    path = path or hand(rng)
    a = film(path, thermal_fps, offset, rng, thermal=True, noise=noise)
    return estimate_offset(*sensors_of(a, film(path, 30, 0, rng, thermal=False, noise=noise)))


@pytest.mark.parametrize(("thermal_fps", "tolerance"), [(30, 0.006), (9, 0.015)])
def test_the_offset_is_found_within_the_stated_uncertainty(thermal_fps: float, tolerance: float):
    errors, stated = [], []
    for seed, offset in enumerate((-0.31, -0.08, 0.0, 0.08, 0.27)):
        result = estimate(seed, thermal_fps, offset)
        errors.append(abs(result.seconds + offset))  # a clock that is ahead needs a negative correction
        stated.append(result.uncertainty)
        assert result.correlation > 0.8
    assert max(errors) < tolerance
    assert all(error <= uncertainty for error, uncertainty in zip(errors, stated, strict=True))
    assert max(stated) < 0.03


def test_noisy_pictures_state_less_certainty():
    assert estimate(1, 9, 0.08).uncertainty < estimate(1, 9, 0.08, noise=25).uncertainty


def test_a_still_scene_is_refused():
    for seed in range(4):
        with pytest.raises(InputError, match="move something warm"):
            estimate(seed, 9, 0.08, path=lambda time: 0.5)


def test_an_even_motion_is_refused():
    for frequency in (0.5, 2):
        with pytest.raises(InputError, match="too even"):
            estimate(0, 9, 0.08, path=lambda time, f=frequency: 0.5 + 0.3 * np.sin(2 * np.pi * f * time))


def test_motions_that_have_nothing_to_do_with_each_other_are_refused():
    rng = np.random.default_rng(0)
    a = film(hand(np.random.default_rng(1)), 9, 0, rng, thermal=True)
    b = film(hand(np.random.default_rng(2)), 30, 0, rng, thermal=False)
    with pytest.raises(InputError, match="move something warm"):
        estimate_offset(*sensors_of(a, b))


def test_too_short_a_look_is_refused():
    for seconds in (2, float("nan"), float("inf")):
        with pytest.raises(InputError, match="give 5 or more"):
            measure_offset("demo://night", None, seconds)


def write_bag(path: pathlib.Path, **films: list[Frame]) -> pathlib.Path:
    """A bag of ROS 2 images with a topic for each film, by the stamps of its clock."""
    from mcap.writer import Writer

    with path.open("wb") as file:
        writer = Writer(file)
        writer.start("ros2")
        schema = writer.register_schema(IMAGE_TYPE, "ros2msg", DEFINITIONS[IMAGE_TYPE].encode())
        for topic, frames in films.items():
            channel = writer.register_channel(f"/{topic}", "cdr", schema)
            for frame in frames:
                stamp = round(frame.time * 1e9)
                writer.add_message(channel, stamp, image_message(frame.image, stamp, topic), stamp)
        writer.finish()
    return path


def test_two_sources_whose_clocks_differ(tmp_path: pathlib.Path):
    """Through the sources: a recording of both cameras, the thermal one's clock 300 ms ahead."""
    pytest.importorskip("mcap_ros2")
    rng = np.random.default_rng(7)
    path = hand(rng)
    films = {"thermal": film(path, 9, 0.3, rng, thermal=True), "visible": film(path, 30, 0, rng, thermal=False)}
    bag = write_bag(tmp_path / "both.mcap", **films)
    a, b = (f"mcap://{bag}?topic=/{topic}&realtime=0" for topic in films)
    result = measure_offset(a, b, 60, progress=False)
    assert result.seconds == pytest.approx(-0.3, abs=0.015)
