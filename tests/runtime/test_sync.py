"""Pairing on a fake clock: what the cameras really did is known to the test, not taken from their stamps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from runtime.errors import InputError
from runtime.frames import Frame
from runtime.sync import Pair, Pairer, Pairing

IMAGE = np.zeros((2, 2), np.uint8)
UNIX = 1.7e9
SECONDS = 120


@dataclass
class Camera:
    """How a camera behaves: its clock is `offset` s ahead, its pictures come `delay` s after they were taken."""

    fps: float
    offset: float = 0.0
    delay: float = 0.02
    phase: float = 0.0
    jitter: float = 0.003
    lost: float = 0.03
    doubled: float = 0.02
    away: tuple[float, float] = (0.0, 0.0)

    def frames(self, rng: np.random.Generator, seconds: float) -> list[tuple[Frame, float]]:
        """Frames with the true time of capture of each, in the order of arrival."""
        frames = []
        for k in range(int(seconds * self.fps)):
            true = self.phase + k / self.fps + rng.normal(0, self.jitter)
            if rng.random() < self.lost or self.away[0] <= true < self.away[1]:
                continue
            arrival = true + self.delay + rng.exponential(0.005)
            for repeat in range(1 + (rng.random() < self.doubled)):
                stamp = UNIX + true + self.offset
                frames.append((Frame(IMAGE, stamp, "device", arrival + 0.001 * repeat, k, "camera"), true))
        return sorted(frames, key=lambda each: each[0].arrival)


@dataclass
class Output:
    """A pair, when it came out, and how far apart both pictures were really taken, in ms."""

    pair: Pair
    at: float
    true_skew_ms: float | None


def play(knobs: Pairing, a: Camera, b: Camera, seconds: float = SECONDS) -> tuple[list[Output], Pairer]:
    """Feed both cameras to a pairer as time goes on."""
    rng = np.random.default_rng(0)
    arrivals = [("a", *each) for each in a.frames(rng, seconds)] + [("b", *each) for each in b.frames(rng, seconds)]
    arrivals.sort(key=lambda each: each[1].arrival)
    pairer, outputs, true = Pairer(knobs), [], {}
    now = 0.0

    def drain() -> None:
        while (pair := pairer.next(now)) is not None:
            skew = None
            if pair.a and pair.b:
                skew = 1000 * abs(true["a", pair.a.index] - true["b", pair.b.index])
            outputs.append(Output(pair, now, skew))

    for side, frame, taken in arrivals:
        while (due := pairer.due(now)) is not None and due < frame.arrival:
            now = due
            drain()
        now = frame.arrival
        true[side, frame.index] = taken
        (pairer.add_a if side == "a" else pairer.add_b)(frame)
        drain()
    return outputs, pairer


def skews(outputs: list[Output]) -> np.ndarray:
    return np.array([output.true_skew_ms for output in outputs if output.true_skew_ms is not None])


THERMAL = Camera(9, offset=0.08, delay=0.03, phase=0.017)
VISIBLE = Camera(30)


def test_30_and_9_hz_with_the_offset_configured():
    outputs, pairer = play(Pairing(clock_offset_ms=-80), THERMAL, VISIBLE)
    assert len(outputs) / SECONDS >= 27
    assert np.median(skews(outputs)) < 60
    counters = pairer.counters()
    assert counters["duplicates_a"] > 5 and counters["duplicates_b"] > 20
    assert counters["dropped_a"] == counters["dropped_b"] == 0


def test_stamps_alone_hide_an_offset():
    """Without the offset the pairs look better by their own stamps than they are: only the truth tells."""
    wrong, _ = play(Pairing(), THERMAL, VISIBLE)
    right, _ = play(Pairing(clock_offset_ms=-80), THERMAL, VISIBLE)
    reported = np.median([abs(output.pair.skew_ms) for output in wrong])
    assert reported < 60 < np.median(skews(wrong))
    assert np.median(skews(right)) < 0.7 * np.median(skews(wrong))


def test_no_picture_waits_longer_than_hold_and_none_comes_twice_or_backwards():
    outputs, _ = play(Pairing(clock_offset_ms=-80, hold_ms=40), THERMAL, VISIBLE)
    waits = [output.at - output.pair.b.arrival for output in outputs if output.pair.b]
    assert max(waits) <= 0.040001
    assert np.mean(waits) < 0.015  # the rhythm tells when waiting is in vain
    indices = [output.pair.b.index for output in outputs if output.pair.b]
    assert indices == sorted(set(indices))


def test_waiting_longer_gives_nearer_partners():
    short, long = (
        np.median(skews(play(Pairing(clock_offset_ms=-80, hold_ms=hold), THERMAL, VISIBLE)[0])) for hold in (0, 120)
    )
    assert long < 30 < short


def test_one_to_one_gives_the_slower_rate_and_the_smallest_skew():
    outputs, _ = play(Pairing(clock_offset_ms=-80, one_to_one=True), THERMAL, VISIBLE)
    assert 8 <= len(outputs) / SECONDS <= 9
    assert np.median(skews(outputs)) < 12
    for side in ("a", "b"):
        indices = [getattr(output.pair, side).index for output in outputs if getattr(output.pair, side)]
        assert len(indices) == len(set(indices))
    assert not any(output.pair.reused for output in outputs)


@pytest.mark.parametrize("fps", [30, 9])
@pytest.mark.parametrize("one_to_one", [False, True])
def test_a_visible_camera_that_comes_much_later(fps: float, one_to_one: bool):
    """A USB thermal core beside a network camera: 400 ms of delay more, and both clocks are right."""
    outputs, pairer = play(Pairing(one_to_one=one_to_one), Camera(fps, phase=0.01), Camera(30, delay=0.42), 60)
    settled = outputs[30:]
    assert np.mean([output.pair.state == "fused" for output in settled]) > 0.95  # 3 % of the thermal ones are lost
    assert np.median(skews(settled)) < (20 if fps == 30 or one_to_one else 40)
    assert len(settled) > 0.9 * 60 * (min(fps, 30) if one_to_one else 30) - 60
    assert pairer.counters()["dropped_b"] == 0


@pytest.mark.parametrize("on_missing", ["hold", "pass", "skip"])
def test_one_to_one_that_never_fits_says_so(on_missing: str):
    """A clock that is 5 s ahead: nothing fits, and the visible camera passes but for the policy "skip"."""
    outputs, pairer = play(Pairing(one_to_one=True, on_missing=on_missing), steady(9, offset=5), steady(30), 12)
    assert states(outputs) == ([] if on_missing == "skip" else ["a_missing"])
    if outputs:
        assert len(outputs) > 11 * 30
    else:
        assert pairer.counters()["skipped"] > 300


@pytest.mark.parametrize("fps", [1, 0.5])
def test_a_slow_master_is_not_away_between_its_pictures(fps: float):
    outputs, _ = play(Pairing(), steady(9), steady(fps, phase=0.1), 20)
    assert states(outputs) == ["fused"]
    assert len(outputs) == 20 * fps


def test_reuse_is_told():
    outputs, _ = play(Pairing(), Camera(10, lost=0, doubled=0), Camera(30, lost=0, doubled=0))
    assert 0.6 < np.mean([output.pair.reused for output in outputs]) < 0.7
    previous = None
    for output in outputs:
        assert output.pair.reused == (output.pair.a is not None and output.pair.a is previous)
        previous = output.pair.a


def states(outputs: list[Output]) -> list[str]:
    """The states in order, repetitions left out."""
    order: list[str] = []
    for output in outputs:
        if not order or order[-1] != output.pair.state:
            order.append(output.pair.state)
    return order


def steady(fps: float, **behaviour: object) -> Camera:
    return Camera(fps, jitter=0, lost=0, doubled=0, **behaviour)


def test_the_visible_camera_passes_while_the_thermal_one_is_away():
    outputs, _ = play(Pairing(max_age_ms=400), steady(10, away=(5, 8)), steady(30), 12)
    assert states(outputs[1:]) == ["fused", "held", "a_missing", "fused"]
    assert len(outputs) == pytest.approx(12 * 30, abs=2)  # the master's rate goes on
    passed = [output for output in outputs[1:] if output.pair.state == "a_missing"]
    assert passed[0].pair.b.time - UNIX == pytest.approx(5.3, abs=0.1)
    assert passed[-1].pair.b.time - UNIX == pytest.approx(8.0, abs=0.1)
    assert all(output.pair.a is None for output in passed)
    assert max(output.at - output.pair.b.arrival for output in passed) < 0.001  # nothing to wait for


def test_the_thermal_camera_passes_while_the_master_is_away():
    outputs, _ = play(Pairing(max_age_ms=400), steady(10), steady(30, away=(5, 8)), 12)
    assert states(outputs[1:]) == ["fused", "b_missing", "fused"]
    passed = [output.pair for output in outputs if output.pair.state == "b_missing"]
    assert len(passed) == pytest.approx(26, abs=3)
    assert all(pair.b is None and pair.skew_ms == 0 for pair in passed)


def test_pass_takes_no_old_picture_and_skip_gives_nothing():
    a, b = steady(10, away=(5, 8)), steady(30)
    passed, _ = play(Pairing(on_missing="pass"), a, b, 12)
    assert states(passed[1:]) == ["fused", "a_missing", "fused"]
    skipped, pairer = play(Pairing(on_missing="skip"), a, b, 12)
    assert states(skipped) == ["fused"]
    assert pairer.counters()["skipped"] == pytest.approx(3 * 30, abs=6)
    assert len(skipped) + pairer.counters()["skipped"] == pytest.approx(12 * 30, abs=2)


def frame(time: float, index: int, arrival: float | None = None) -> Frame:
    return Frame(IMAGE, UNIX + time, "device", time if arrival is None else arrival, index, "camera")


def test_a_full_queue_drops_the_oldest():
    pairer = Pairer(Pairing(queue_size=2))
    for k in range(10):
        pairer.add_b(frame(k / 30, k, 0.4))
    assert pairer.counters()["dropped_b"] == 8
    assert [pairer.next(0.4).b.index for _ in range(2)] == [8, 9]
    assert pairer.next(0.4) is None


def test_a_loop_that_is_too_slow_goes_on_with_new_pictures():
    """100 ms for each picture of a camera of 30 a second: every third comes out, and none after a long wait."""
    pairer = Pairer(Pairing(queue_size=8))
    waits, now, number = [], 0.0, 0
    while now < 10:
        while number / 30 <= now:
            pairer.add_a(frame(number / 30, number))
            pairer.add_b(frame(number / 30, number))
            number += 1
        pair = pairer.next(now)
        if pair is None:
            now += 0.005
            continue
        assert pair.b is not None
        waits.append(now - pair.b.arrival)
        now += 0.1
    assert 90 <= len(waits) <= 101
    assert max(waits[5:]) < 0.04 + 1.5 / 30 + 1e-9
    assert pairer.counters()["dropped_b"] > 180


def test_a_late_picture_is_left_out_and_a_clock_that_was_set_begins_anew():
    pairer = Pairer(Pairing())
    for k, time in enumerate((10.0, 10.1, 10.05, 2.0, 2.1)):
        pairer.add_a(frame(time, k, 10 + k / 10))
    assert pairer.counters()["late_a"] == 1
    pairer.add_b(frame(2.09, 0, 10.5))
    pair = pairer.next(10.5)
    assert pair is not None and pair.a is not None and pair.a.time == UNIX + 2.1
    assert pair.skew_ms == pytest.approx(10, abs=0.01)


def test_lossless_pairs_every_picture_by_stamps_alone():
    """Recordings are read as fast as they are used: the clock of arrival means nothing, and no picture is lost."""
    a, b = [frame(k / 9, k, 0) for k in range(90)], [frame(k / 30 + 0.004, k, 0) for k in range(300)]
    pairer, pairs = Pairer(Pairing(queue_size=3), lossless=True), []
    while len(pairs) < 300:
        while a and pairer.has_room_a():
            pairer.add_a(a.pop(0))
        while b and pairer.has_room_b():
            pairer.add_b(b.pop(0))
        if not a:
            pairer.end_a()
        if not b:
            pairer.end_b()
        pair = pairer.next(0)
        assert pair is not None
        pairs.append(pair)
    assert [pair.b.index for pair in pairs] == list(range(300))
    assert pairer.counters()["dropped_a"] == pairer.counters()["dropped_b"] == 0
    assert max(abs(pair.skew_ms) for pair in pairs if pair.state == "fused" and pair.b.time < UNIX + 9.8) <= 56


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"max_skew_ms": -1}, "max_skew_ms is -1"),
        ({"hold_ms": float("nan")}, "hold_ms is nan"),
        ({"max_age_ms": 10}, "must not be below max_skew_ms"),
        ({"queue_size": 0}, "queue_size is 0"),
        ({"on_missing": "wait"}, "unknown on_missing 'wait'"),
        ({"clock_offset_ms": float("inf")}, "clock_offset_ms"),
    ],
)
def test_knobs_that_make_no_sense(knobs: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        Pairing(**knobs)
