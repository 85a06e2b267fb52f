"""Metrics: against independent implementations, textbook loops, hand-computed values, and properties."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from sewar.full_ref import vifp
from skimage.measure import shannon_entropy
from skimage.metrics import structural_similarity
from sklearn.metrics import mutual_info_score

from refusion.metrics import (
    CONVENTIONS,
    METRICS,
    MINIMUM_SIZE,
    average_gradient,
    entropy,
    evaluate,
    flicker,
    mutual_information,
    qabf,
    scd,
    spatial_frequency,
    ssim,
    standard_deviation,
    vif,
)
from runtime.errors import InputError

pytestmark = pytest.mark.filterwarnings("error")

Grey = NDArray[np.uint8]
SHAPES = [(64, 64), (41, 53), (75, 98)]


def scene(shape: tuple[int, int], seed: int = 0) -> tuple[Grey, Grey, Grey]:
    """A fused picture and two sources that share some structure, with flat parts and noise."""
    rng = np.random.default_rng(seed)

    def texture(sigma: float) -> NDArray[np.float64]:
        field = cv2.GaussianBlur(rng.standard_normal(shape), (0, 0), sigma)
        return (field - field.min()) / (field.max() - field.min())

    shared = texture(3)
    a = 160 * texture(5) + 60 * shared
    b = 120 * texture(1) + 100 * shared
    a[: shape[0] // 3, : shape[1] // 3] = 200
    b[: shape[0] // 4] = 30
    fused = np.maximum(a, b) + 3 * rng.standard_normal(shape)
    return tuple(np.clip(np.rint(x), 0, 255).astype(np.uint8) for x in (fused, a, b))  # type: ignore[return-value]


@pytest.mark.parametrize("shape", SHAPES)
def test_vif_equals_sewar(shape):
    f, a, b = scene(shape)
    of_a, of_b = vifp(a, f), vifp(b, f)
    assert vif(f, a, b, "tdfusion") == pytest.approx((of_a + of_b) / 2, rel=1e-8)
    assert vif(f, a, b, "cddfuse") == pytest.approx(of_a + of_b, rel=1e-8)
    assert vif(f, a, b, "matlab") == pytest.approx(of_a + of_b, rel=1e-8)


@pytest.mark.parametrize("shape", [*SHAPES, (7, 7)])
def test_ssim_equals_scikit_image(shape):
    f, a, b = scene(shape)
    default = structural_similarity(f, a) + structural_similarity(f, b)
    assert ssim(f, a, b, "tdfusion") == pytest.approx(default / 2, rel=1e-10)
    assert ssim(f, a, b, "matlab") == pytest.approx(default, rel=1e-10)
    # What scikit-image took as the range of floating-point pictures when CDDFuse was published.
    of_floats = sum(structural_similarity(f.astype(float), x.astype(float), data_range=2) for x in (a, b))
    assert ssim(f, a, b, "cddfuse") == pytest.approx(of_floats, rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_mutual_information_equals_scikit_learn(shape):
    f, a, b = scene(shape)
    nats = mutual_info_score(f.ravel(), a.ravel()) + mutual_info_score(f.ravel(), b.ravel())
    assert mutual_information(f, a, b, "cddfuse") == pytest.approx(nats, rel=1e-10)
    assert mutual_information(f, a, b, "tdfusion") == pytest.approx(nats, rel=1e-10)
    assert mutual_information(f, a, b, "matlab") == pytest.approx(nats / math.log(2), rel=1e-10)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (1, 9)])
def test_entropy_equals_scikit_image(shape):
    f, _, _ = scene((75, 98))
    f = f[: shape[0], : shape[1]]
    assert entropy(f) == pytest.approx(shannon_entropy(f), abs=1e-12)


def test_scd_equals_corrcoef():
    f, a, b = (x.astype(float) for x in scene((50, 60)))
    expected = np.corrcoef((f - b).ravel(), a.ravel())[0, 1] + np.corrcoef((f - a).ravel(), b.ravel())[0, 1]
    assert scd(f, a, b) == pytest.approx(expected, rel=1e-12)


def textbook_qabf(fused: Grey, a: Grey, b: Grey) -> float:
    """Xydeas and Petrovic (2000), pixel by pixel."""

    def sobel(image: Grey, i: int, j: int) -> tuple[float, float]:
        def at(y: int, x: int) -> float:
            inside = 0 <= y < image.shape[0] and 0 <= x < image.shape[1]
            return float(image[y, x]) if inside else 0.0

        s_x = s_y = 0.0
        for k, weight in ((-1, 1), (0, 2), (1, 1)):
            s_x += weight * (at(i + k, j - 1) - at(i + k, j + 1))
            s_y += weight * (at(i + 1, j + k) - at(i - 1, j + k))
        return math.hypot(s_x, s_y), math.pi / 2 if s_x == 0 else math.atan(s_y / s_x)

    numerator = denominator = 0.0
    for i in range(fused.shape[0]):
        for j in range(fused.shape[1]):
            g_f, alpha_f = sobel(fused, i, j)
            for source in (a, b):
                g, alpha = sobel(source, i, j)
                strength = 1.0 if g == g_f else min(g, g_f) / max(g, g_f)
                orientation = 1 - abs(alpha - alpha_f) / (math.pi / 2)
                q_g = 0.9994 / (1 + math.exp(-15 * (strength - 0.5)))
                q_alpha = 0.9879 / (1 + math.exp(-22 * (orientation - 0.8)))
                numerator += q_g * q_alpha * g
                denominator += g
    return numerator / denominator


@pytest.mark.parametrize("shape", [(20, 31), (8, 8), (1, 5)])
def test_qabf_equals_textbook(shape):
    f, a, b = (x[: shape[0], : shape[1]] for x in scene((64, 64), seed=3))
    assert qabf(f, a, b) == pytest.approx(textbook_qabf(f, a, b), rel=1e-10)
    assert qabf(f, a, b) < 0.95


def test_qabf_of_a_copy_is_the_published_ceiling():
    _, a, _ = scene((64, 64))
    ceiling = 0.9994 / (1 + math.exp(-7.5)) * 0.9879 / (1 + math.exp(-4.4))
    assert qabf(a, a, a) == pytest.approx(ceiling, rel=1e-12)


def test_simple_metrics_on_a_ramp():
    # Columns 0, 10, 20, 30: neighbours differ by 10 in x and 0 in y.
    ramp = np.tile(np.arange(0, 40, 10, dtype=np.uint8), (3, 1))
    assert entropy(ramp) == pytest.approx(2)
    assert standard_deviation(ramp) == pytest.approx(math.sqrt(125))
    assert spatial_frequency(ramp, "cddfuse") == pytest.approx(10)
    assert spatial_frequency(ramp, "matlab") == pytest.approx(10 / 255)
    assert average_gradient(ramp, "cddfuse") == pytest.approx(10 / math.sqrt(2))
    assert average_gradient(ramp, "matlab") == pytest.approx(10 / math.sqrt(2) * 12 / 6)


def test_simple_metrics_on_a_slope_in_both_directions():
    y, x = np.mgrid[:5, :6]
    slope = (3 * x + 4 * y).astype(np.uint8)
    assert spatial_frequency(slope) == pytest.approx(5)
    assert average_gradient(slope) == pytest.approx(5 / math.sqrt(2))


def test_average_gradient_is_one_sided_at_the_border():
    row = np.array([[0, 0, 6, 6]] * 2, np.uint8)
    assert average_gradient(row) == pytest.approx((0 + 3 + 3 + 0) / 4 / math.sqrt(2))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_evaluate_gives_each_metric_as_a_float(convention):
    f, a, b = scene((64, 64))
    values = evaluate(f, a, b, convention)
    assert tuple(values) == METRICS
    assert all(type(value) is float and math.isfinite(value) for value in values.values())
    assert values["VIF"] == vif(f, a, b, convention)
    assert values["SSIM"] == ssim(f, a, b, convention)
    assert values["MI"] == mutual_information(f, a, b, convention)
    assert values["AG"] == average_gradient(f, convention)
    assert values["SF"] == spatial_frequency(f, convention)
    assert evaluate(f, a, b, convention, ["Qabf", "EN"]) == {"Qabf": qabf(f, a, b), "EN": entropy(f)}


def test_the_default_convention_is_tdfusion():
    f, a, b = scene((64, 64))
    assert evaluate(f, a, b) == evaluate(f, a, b, "tdfusion")
    assert evaluate(f, a, b)["VIF"] != evaluate(f, a, b, "cddfuse")["VIF"]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_sources_may_be_exchanged(convention):
    f, a, b = scene((64, 64))
    assert evaluate(f, a, b, convention) == pytest.approx(evaluate(f, b, a, convention), rel=1e-12)


def test_identical_pictures():
    _, a, _ = scene((64, 64))
    values = evaluate(a, a, a)
    assert values["VIF"] == pytest.approx(1, abs=1e-6)
    assert values["SSIM"] == pytest.approx(1)
    assert values["MI"] == pytest.approx(2 * math.log(2) * entropy(a))
    assert values["SCD"] == 0  # both differences are constant


def test_damage_lowers_what_compares_with_the_sources():
    f, a, b = scene((96, 96))
    blurred = cv2.GaussianBlur(f, (0, 0), 3)
    good, bad = evaluate(f, a, b), evaluate(blurred, a, b)
    for metric in ("MI", "VIF", "Qabf", "SSIM", "SF", "AG"):
        assert bad[metric] < good[metric], metric


@pytest.mark.parametrize("level", [0, 77, 255])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_constant_pictures_are_defined(level, convention):
    constant = np.full((48, 50), level, np.uint8)
    _, a, b = scene((48, 50))
    for f, x, y in ((constant, constant, constant), (constant, a, b), (a, constant, b), (a, constant, constant)):
        assert all(math.isfinite(value) for value in evaluate(f, x, y, convention).values())
    values = evaluate(constant, constant, constant)
    assert [values[m] for m in ("EN", "SD", "SF", "AG", "MI", "SCD", "VIF")] == [0, 0, 0, 0, 0, 0, 1]
    assert values["SSIM"] == pytest.approx(1)
    assert vif(constant, a, b) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_minimum_size(metric):
    side = MINIMUM_SIZE.get(metric, 1)
    f, a, b = (x[:side, : side + 3] for x in scene((64, 64)))
    assert math.isfinite(evaluate(f, a, b, metrics=[metric])[metric])
    if side > 1:
        f, a, b = (x[: side - 1] for x in (f, a, b))
        with pytest.raises(InputError, match=f"{metric} needs at least {side}x{side} pixels; .* {side + 3}x{side - 1}"):
            evaluate(f, a, b, metrics=[metric])


def test_floats_are_rounded_to_grey_levels():
    f, a, b = scene((48, 48))
    exact = evaluate(f, a, b)
    nearly = [np.clip(x + 0.3, 0, 255) for x in (f, a, b)]
    assert evaluate(nearly[0], nearly[1], nearly[2]) == exact
    assert evaluate(f.astype(np.float32), a.astype(np.float32), b) == exact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:-1], "one size: fused 48x47, a 48x48, b 48x48"),
        (lambda x: x[..., None], r"H x W .* fused has shape \(48, 48, 1\)"),
        (lambda x: x / 255, "fused seems to be in 0..1"),
        (lambda x: x.astype(np.uint16) * 257, "fused has .* scale it"),
        (lambda x: x - 300.0, "fused has"),
        (lambda x: np.where(x > 100, np.nan, x), "fused has nan"),
        (lambda x: x[:0], "fused has shape"),
    ],
)
def test_bad_pictures_are_refused(change, message):
    f, a, b = scene((48, 48))
    with pytest.raises(InputError, match=message):
        evaluate(change(f), a, b)


def test_unknown_names_are_refused():
    f, a, b = scene((48, 48))
    with pytest.raises(InputError, match="unknown metric 'PSNR': choose from EN, SD"):
        evaluate(f, a, b, metrics=["PSNR"])
    with pytest.raises(InputError, match="unknown metric convention 'python': choose from cddfuse, tdfusion, matlab"):
        evaluate(f, a, b, "python")
    with pytest.raises(InputError, match="unknown metric convention"):
        ssim(f, a, b, "python")


def test_flicker_of_a_weighted_mean_is_zero_and_of_a_pulsating_one_is_its_step():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 200, (6, 20, 30)).astype(float)
    b = rng.integers(0, 200, (6, 20, 30)).astype(float)
    assert flicker(a, a, b) == 0
    assert flicker(np.rint((a + b) / 2), a, b) < 0.3  # rounding only

    still = np.full((6, 20, 30), 100.0)
    pulse = still + 8 * (np.arange(6) % 2)[:, None, None]
    assert flicker(pulse, still, still) == 8
    assert flicker(pulse, pulse, still) == 0
    assert flicker(iter(pulse), iter(still + 3), iter(still)) == 8


def test_flicker_refuses_bad_videos():
    frames = np.zeros((3, 4, 4), np.uint8)
    with pytest.raises(InputError, match="at least two frames"):
        flicker(frames[:1], frames[:1], frames[:1])
    with pytest.raises(InputError, match="as many frames"):
        flicker(frames, frames[:2], frames)
    with pytest.raises(InputError, match="frames of one size"):
        flicker([frames[0], frames[0, :2]], [frames[0], frames[0, :2]], [frames[0], frames[0, :2]])
