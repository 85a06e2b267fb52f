"""Luma, chroma, range and tone: against OpenCV, against the formulas, and at the edges."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from runtime import color
from runtime.errors import InputError


def random_image(shape: tuple[int, ...], dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def opencv_ycrcb(image: np.ndarray) -> np.ndarray:
    """OpenCV's float YCrCb of an 8-bit image on the 0..255 scale; the neutral chroma is 0.5 there."""
    return cv2.cvtColor(image[..., ::-1].astype(np.float32), cv2.COLOR_RGB2YCrCb)


def test_luma_is_opencvs_y_of_float_images():
    image = random_image((37, 53, 3))
    luma = color.luma(image)
    assert luma.dtype == np.float32
    np.testing.assert_allclose(luma, opencv_ycrcb(image)[..., 0] / 255, atol=2e-7)
    # Not rounded: the 8-bit conversion differs.
    assert np.abs(luma - cv2.cvtColor(image, cv2.COLOR_BGR2YCrCb)[..., 0] / 255).max() > 1e-3


@pytest.mark.parametrize(("dtype", "full"), [(np.uint8, 255), (np.uint16, 65535)])
def test_luma_divides_grey_by_the_full_scale(dtype, full):
    grey = np.array([[0, 1, full // 2, full]], dtype)
    np.testing.assert_allclose(color.luma(grey), [[0, 1 / full, (full // 2) / full, 1]], rtol=1e-6)
    np.testing.assert_allclose(color.luma(np.repeat(grey[..., None], 3, 2)), color.luma(grey), atol=1e-6)


def test_sixteen_bit_colour_equals_eight_bit_colour():
    image = random_image((9, 11, 3))
    wide = image.astype(np.uint16) * 257
    np.testing.assert_allclose(color.luma(wide), color.luma(image), atol=1e-6)
    np.testing.assert_allclose(color.chroma(wide), color.chroma(image), atol=1e-5)


def test_luma_and_chroma_compose_to_the_image():
    image = random_image((40, 30, 3))
    np.testing.assert_array_equal(color.compose(color.luma(image), color.chroma(image)), image)
    grey = random_image((40, 30))
    np.testing.assert_array_equal(color.compose(color.luma(grey), None), grey)


def test_compose_rounds_and_clips():
    luma = np.array([[-0.5, 0.0, 100.4 / 255, 100.6 / 255, 1.0, 2.0]], np.float32)
    assert color.compose(luma, None).tolist() == [[0, 0, 100, 101, 255, 255]]


def test_grey_means_three_channels_equal_everywhere():
    image = np.repeat(random_image((40, 30, 1)), 3, 2)
    assert color.is_grey(image)
    assert color.is_grey(image[..., 0])
    for channel in range(3):
        spot = image.copy()
        spot[33, 7, channel] ^= 1
        assert not color.is_grey(spot)


def test_colour_comes_from_the_coloured_source():
    grey, three, coloured = (
        random_image((8, 9)),
        np.repeat(random_image((8, 9, 1)), 3, 2),
        random_image((8, 9, 3), seed=1),
    )
    expected = color.chroma(coloured)
    for other in (grey, three):
        for policy in ("auto", "mix", "official"):
            np.testing.assert_array_equal(color.fused_chroma(other, coloured, policy), expected)
            np.testing.assert_array_equal(color.fused_chroma(coloured, other, policy), expected)
        assert color.fused_chroma(other, three, "auto") is None
        assert color.fused_chroma(other, coloured, "a") is None
        assert color.fused_chroma(other, coloured, "none") is None


def test_policies_a_and_b_take_that_source():
    a, b = random_image((8, 9, 3), seed=1), random_image((8, 9, 3), seed=2)
    np.testing.assert_array_equal(color.fused_chroma(a, b, "a"), color.chroma(a))
    np.testing.assert_array_equal(color.fused_chroma(a, b, "b"), color.chroma(b))
    assert color.fused_chroma(a, b, "none") is None


def test_mix_is_the_strength_weighted_mean_around_neutral():
    a, b = random_image((20, 21, 3), seed=1), random_image((20, 21, 3), seed=2)
    t = 128.0
    c1, c2 = (opencv_ycrcb(image)[..., 1:] - 0.5 + t for image in (a, b))
    expected = (c1 * abs(c1 - t) + c2 * abs(c2 - t)) / (abs(c1 - t) + abs(c2 - t) + 1e-6)
    mixed = color.fused_chroma(a, b, "auto")
    np.testing.assert_allclose(mixed * 255 + t, expected, atol=2e-3)
    np.testing.assert_array_equal(color.fused_chroma(a, b, "mix"), mixed)


def test_mix_of_neutral_and_colour_is_the_colour_and_of_two_neutrals_neutral():
    neutral, strong = np.zeros((1, 1, 2), np.float32), np.full((1, 1, 2), 0.3, np.float32)
    np.testing.assert_allclose(color.mix_chroma(neutral, strong), strong, rtol=1e-5)
    np.testing.assert_array_equal(color.mix_chroma(neutral, neutral), neutral)
    np.testing.assert_allclose(color.mix_chroma(strong, -strong), 0, atol=1e-7)


def test_official_is_the_authors_arithmetic_and_within_a_grey_level_of_mix():
    a, b = random_image((20, 21, 3), seed=1), random_image((20, 21, 3), seed=2)
    a[:5], b[:5] = 90, 30  # neutral in both
    c1, c2 = opencv_ycrcb(a)[..., 1:], opencv_ycrcb(b)[..., 1:]
    theirs = (c1 * abs(c1 - 0.5) + c2 * abs(c2 - 0.5)) / (abs(c1 - 0.5) + abs(c2 - 0.5) + 1e-4)
    official = color.fused_chroma(a, b, "official")
    np.testing.assert_allclose(official * 255 + 0.5, theirs, atol=1e-3)
    luma = color.luma(a)
    ours, official = (color.compose(luma, c).astype(int) for c in (color.fused_chroma(a, b, "mix"), official))
    assert np.abs(ours - official).max() <= 1


def test_unknown_chroma_policy_is_refused():
    with pytest.raises(InputError, match=r"unknown chroma policy 'red'; choose from auto, a, b"):
        color.fused_chroma(random_image((4, 4)), random_image((4, 4)), "red")


def test_stretch_maps_limits_to_the_full_range():
    luma = np.array([[0.2, 0.3, 0.6]], np.float32)
    np.testing.assert_allclose(color.stretch(luma, 0.2, 0.6), [[0, 0.25, 1]], atol=1e-6)
    np.testing.assert_allclose(color.stretch(luma, 0.3, 0.6), [[0, 0, 1]], atol=1e-6)
    flat = np.full((2, 2), 0.4, np.float32)
    np.testing.assert_array_equal(color.stretch(flat, 0.4, 0.4), flat)


def test_smooth_range_starts_at_the_first_frame_and_follows_slowly():
    smooth = color.SmoothRange(rate=0.25)
    assert smooth.update(0.2, 0.8) == (0.2, 0.8)
    assert smooth.update(0.4, 0.4) == pytest.approx((0.25, 0.7))
    for _ in range(60):
        limits = smooth.update(0.4, 0.4)
    assert limits == pytest.approx((0.4, 0.4), abs=1e-6)
    with pytest.raises(InputError, match="smoothing rate is 0"):
        color.SmoothRange(rate=0)


def test_tone_map_clips_to_fixed_counts():
    counts = np.array([[0, 7000, 7500, 8000, 65535]], np.uint16)
    np.testing.assert_allclose(color.tone_map(counts, 7000, 8000), [[0, 0, 0.5, 1, 1]], atol=1e-6)
    with pytest.raises(InputError, match="tone range 8000:8000 is empty"):
        color.tone_map(counts, 8000, 8000)


def test_tone_rules_for_raw_thermal_counts():
    counts = np.random.default_rng(0).integers(7000, 8001, (60, 80)).astype(np.uint16)
    counts[0, 0] = 65535  # a dead pixel
    assert color.apply_tone(counts, "full")[1:].max() < 0.13
    percentile = color.apply_tone(counts, "percentile")
    assert percentile.min() == 0 and percentile.max() == 1 and percentile.std() > 0.25
    np.testing.assert_array_equal(color.apply_tone(counts, (7000, 8000)), color.tone_map(counts, 7000, 8000))
    three = np.repeat(counts[..., None], 3, 2)
    np.testing.assert_array_equal(color.apply_tone(three, (7000, 8000)), color.tone_map(counts, 7000, 8000))


def test_tone_leaves_other_images_alone():
    for image in (random_image((9, 8)), random_image((9, 8, 3)), random_image((9, 8, 3), np.uint16)):
        np.testing.assert_array_equal(color.apply_tone(image, (100, 200)), color.luma(image))


def test_percentile_tone_of_a_constant_image_is_finite():
    tone = color.apply_tone(np.full((5, 5), 7000, np.uint16), "percentile")
    assert np.isfinite(tone).all() and tone.min() >= 0 and tone.max() <= 1


def test_parse_tone():
    assert color.parse_tone("full") == "full"
    assert color.parse_tone("percentile") == "percentile"
    assert color.parse_tone("0:16383") == (0, 16383)


@pytest.mark.parametrize("text", ["", "auto", "1", "1:2:3", "a:b", "5:5", "9:5", "-1:5", "0:65536", "nan:5", "0:inf"])
def test_parse_tone_refuses(text):
    with pytest.raises(InputError, match="tone"):
        color.parse_tone(text)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([[1, 2]], "is a list, not a NumPy array"),
        (np.zeros((4, 4)), "holds float64 values"),
        (np.full((4, 4), np.nan, np.float32), "holds float32 values"),
        (np.zeros((4, 4), np.int16), "holds int16 values"),
        (np.zeros((4, 4), bool), "holds bool values"),
        (np.zeros(4, np.uint8), r"has shape \(4,\)"),
        (np.zeros((4, 4, 4), np.uint8), r"has shape \(4, 4, 4\)"),
        (np.zeros((4, 4, 1), np.uint8), r"has shape \(4, 4, 1\)"),
        (np.zeros((0, 4), np.uint8), "is empty"),
        (np.zeros((4, 0, 3), np.uint8), "is empty"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    for function in (color.luma, color.chroma, color.apply_tone):
        with pytest.raises(InputError, match=message):
            function(image)
