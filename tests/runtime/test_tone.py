"""Tone of thermal streams: steady where per-frame limits would flicker, and exact where a range is given."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from runtime.errors import InputError
from runtime.tone import StreamTone


def scene(rng: np.random.Generator, hot: int = 0) -> np.ndarray:
    """14-bit counts around 3000, with something hot in `hot` rows."""
    counts = rng.normal(3000, 60, (96, 128))
    counts[:hot] = 9000
    return np.clip(counts, 0, 16383).astype(np.uint16)


def test_a_fixed_range_is_exact():
    counts = np.array([[0, 1000, 2000, 3000, 65535]], np.uint16)
    np.testing.assert_array_equal(StreamTone("1000:3000")(counts, 0.0), [[0, 0, 32768, 65535, 65535]])
    assert StreamTone((1000, 3000)).rule == StreamTone("1000:3000").rule == (1000.0, 3000.0)


def test_full_and_8_bits_pass():
    rng = np.random.default_rng(0)
    counts, grey = scene(rng), rng.integers(0, 256, (8, 8), dtype=np.uint8)
    assert StreamTone("full")(counts, 0.0) is counts
    assert StreamTone("percentile")(grey, 0.0) is grey
    colour = rng.integers(0, 65536, (8, 8, 3)).astype(np.uint16)
    assert StreamTone("percentile")(colour, 0.0) is colour


def test_percentiles_follow_slowly():
    """Something hot comes into the picture: the rest darkens over a second, not at once."""
    rng = np.random.default_rng(0)
    tone = StreamTone("percentile")
    calm = [np.median(tone(scene(rng), k / 9)) for k in range(27)]
    hot = [np.median(tone(scene(rng, hot=20), 3 + k / 9)) for k in range(45)]
    assert np.ptp(calm[9:]) < 1500  # of 65535: no flicker
    assert hot[0] > 0.6 * calm[-1]
    assert hot[-1] < 0.3 * calm[-1]
    assert all(later <= earlier + 500 for earlier, later in pairwise(hot))


def test_the_pace_does_not_depend_on_the_rate():
    ends = []
    for fps in (9, 60):
        rng = np.random.default_rng(0)
        tone = StreamTone("percentile")
        for k in range(fps):
            tone(scene(rng), k / fps)
        for k in range(fps):
            picture = tone(scene(rng, hot=20), 1 + k / fps)
        ends.append(np.median(picture))
    assert ends[0] == pytest.approx(ends[1], rel=0.1)


def test_a_long_gap_begins_anew():
    rng = np.random.default_rng(0)
    tone = StreamTone("percentile")
    tone(scene(rng), 0.0)
    counts = scene(rng, hot=20)
    np.testing.assert_array_equal(tone(counts, 100.0), StreamTone("percentile")(counts, 0.0))


def test_noise_of_an_empty_scene_is_not_stretched():
    flat = np.random.default_rng(0).normal(3000, 1, (96, 128)).astype(np.uint16)
    assert StreamTone("percentile")(flat, 0.0).std() < 3000


def test_clahe_raises_local_contrast():
    rng = np.random.default_rng(0)
    counts = scene(rng, hot=20)
    counts[60:80, 40:60] += 50  # hardly warmer than what is around it
    plain, equalised = StreamTone("percentile")(counts, 0.0), StreamTone("clahe")(counts, 0.0)
    assert equalised.dtype == np.uint8

    def contrast(picture: np.ndarray, full: float) -> float:
        return (picture[60:80, 40:60].mean() - picture[60:80, 70:90].mean()) / full

    assert contrast(equalised, 255) > 2 * contrast(plain, 65535) > 0


@pytest.mark.parametrize("rule", ["minmax", "5", "9:3", "0:70000", ""])
def test_unknown_rules(rule: str):
    with pytest.raises(InputError):
        StreamTone(rule)
