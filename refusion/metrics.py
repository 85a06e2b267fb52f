"""Fusion metrics with named conventions: EN SD SF AG MI SCD VIF Qabf SSIM of a picture, and flicker of a video.

The field reports the same names with different definitions. A convention names the published code that is followed:

============ ======================= ============================= ===============================
metric       ``cddfuse`` (2023)      ``tdfusion`` (2025)           ``matlab`` (Linfeng-Tang suite)
============ ======================= ============================= ===============================
VIF          sum over A and B        mean over A and B             sum over A and B
SSIM         sum, data range 2       mean, data range 255          sum, data range 255
MI           nats                    nats (not in their code)      bits
AG           mean over H W           mean (not in their code)      divided by (H - 1)(W - 1)
SF           grey levels 0..255      grey levels 0..255            grey levels 0..1
============ ======================= ============================= ===============================

EN, SD, SCD and Qabf are the same in all three. VIF is the pixel-domain VIF of four scales in all three (`sewar.vifp`
computes the same number as CDDFuse's own function); they differ in the sum and the mean. CDDFuse hands scikit-image
floating-point pictures without a data range, which it took as -1..1: hence the range of 2, although the values are
0..255. The MATLAB suite's own "SSIM" column is MEF-SSIM, a different metric that is not offered here.

All functions take H x W arrays of grey levels, uint8 or float in 0..255; floats are rounded to the nearest integer,
as 8-bit files would hold them. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

Grey = NDArray[np.generic]  # (H, W), uint8 or float, 0..255

METRICS: tuple[str, ...] = ("EN", "SD", "SF", "AG", "MI", "SCD", "VIF", "Qabf", "SSIM")
MINIMUM_SIZE = {"SF": 2, "AG": 2, "VIF": 41, "SSIM": 7}  # pixels on the shorter side; 1 for the others


@dataclass(frozen=True)
class _Convention:
    """What differs between the published codes."""

    average: bool  # VIF and SSIM: the mean over both sources instead of the sum
    ssim_range: float  # data range L of SSIM's constants
    mi_unit: float  # nats in the unit of MI
    sf_scale: float  # grey level that counts as 1 in SF
    ag_inner: bool  # AG is divided by (H - 1)(W - 1) instead of H W


_CONVENTIONS = {
    "cddfuse": _Convention(average=False, ssim_range=2, mi_unit=1, sf_scale=1, ag_inner=False),
    "tdfusion": _Convention(average=True, ssim_range=255, mi_unit=1, sf_scale=1, ag_inner=False),
    "matlab": _Convention(average=False, ssim_range=255, mi_unit=float(np.log(2)), sf_scale=255, ag_inner=True),
}
CONVENTIONS: tuple[str, ...] = tuple(_CONVENTIONS)


def evaluate(
    fused: Grey,
    a: Grey,
    b: Grey,
    convention: str = "tdfusion",
    metrics: Sequence[str] | None = None,
) -> dict[str, float]:
    """Compute metrics of one fused picture against its two sources.

    Args:
        fused: (H, W) fused picture, uint8 or float in 0..255.
        a: (H, W) first source, the same range.
        b: (H, W) second source.
        convention: whose definitions to follow, one of `CONVENTIONS`.
        metrics: names out of `METRICS`; all of them where None.

    Returns:
        Name -> value, in the order asked for. Every value is finite; higher is better.

    Raises:
        InputError: unknown names, arrays that are not H x W, unequal sizes, values outside 0..255, or a picture smaller
            than a metric's windows (VIF needs 41 x 41, SSIM 7 x 7, SF and AG 2 x 2).
    """
    names = METRICS if metrics is None else tuple(metrics)
    check_names(names, convention)
    f, a8, b8 = grey_levels(fused, "fused"), grey_levels(a, "a"), grey_levels(b, "b")
    _check_sizes({"fused": f, "a": a8, "b": b8}, names)
    functions: dict[str, Callable[[], float]] = {
        "EN": lambda: entropy(f),
        "SD": lambda: standard_deviation(f),
        "SF": lambda: spatial_frequency(f, convention),
        "AG": lambda: average_gradient(f, convention),
        "MI": lambda: mutual_information(f, a8, b8, convention),
        "SCD": lambda: scd(f, a8, b8),
        "VIF": lambda: vif(f, a8, b8, convention),
        "Qabf": lambda: qabf(f, a8, b8),
        "SSIM": lambda: ssim(f, a8, b8, convention),
    }
    return {name: functions[name]() for name in names}


def entropy(fused: Grey) -> float:
    """EN, bits: -sum p log2 p over the 256 grey levels.

    J. W. Roberts et al., "Assessment of image fusion procedures using entropy", J. Appl. Remote Sens. 2(1), 2008.
    """
    counts = np.bincount(grey_levels(fused, "fused").ravel(), minlength=256)
    return _entropy_of(counts) / float(np.log(2))


def _entropy_of(counts: NDArray) -> float:
    """Entropy in nats of a histogram."""
    p = counts[counts > 0] / counts.sum()
    return max(0.0, -float((p * np.log(p)).sum()))  # not -0.0 for a constant picture


def standard_deviation(fused: Grey) -> float:
    """SD, grey levels: sqrt(mean((F - mean F)^2)), the contrast."""
    return float(np.std(grey_levels(fused, "fused"), dtype=np.float64))


def spatial_frequency(fused: Grey, convention: str = "tdfusion") -> float:
    """SF: sqrt(mean(dx^2) + mean(dy^2)) of the differences of neighbours; in the `matlab` convention of F / 255.

    A. M. Eskicioglu, P. S. Fisher, "Image quality measures and their performance", IEEE Trans. Commun. 43(12), 1995.
    """
    (f,) = _pictures("SF", fused=fused)
    frequency = np.sqrt(np.mean(np.diff(f, axis=1) ** 2) + np.mean(np.diff(f, axis=0) ** 2))
    return float(frequency / _get_convention(convention).sf_scale)


def average_gradient(fused: Grey, convention: str = "tdfusion") -> float:
    """AG, grey levels: mean of sqrt((g_x^2 + g_y^2) / 2) of central differences (one-sided at the border).

    The `matlab` convention divides the sum by (H - 1)(W - 1) instead of H W.

    G. Cui et al., "Detail preserved fusion of visible and infrared images using regional saliency extraction and
    multi-scale image decomposition", Optics Communications 341, 2015.
    """
    (f,) = _pictures("AG", fused=fused)
    g_y, g_x = np.gradient(f)
    height, width = f.shape
    count = (height - 1) * (width - 1) if _get_convention(convention).ag_inner else height * width
    return float(np.sqrt((g_x * g_x + g_y * g_y) / 2).sum() / count)


def mutual_information(fused: Grey, a: Grey, b: Grey, convention: str = "tdfusion") -> float:
    """MI(F; A) + MI(F; B) with MI(F; X) = H(F) + H(X) - H(F, X) from 256-level histograms.

    In nats; in bits in the `matlab` convention.

    G. Qu, D. Zhang, P. Yan, "Information measure for performance of image fusion", Electronics Letters 38(7), 2002.
    """
    f, *sources = _pictures("MI", fused=fused, a=a, b=b)
    information = 0.0
    for x in sources:
        joint = np.bincount((256 * f + x).astype(np.intp).ravel(), minlength=65536).reshape(256, 256)
        information += _entropy_of(joint.sum(0)) + _entropy_of(joint.sum(1)) - _entropy_of(joint.ravel())
    return max(0.0, information) / _get_convention(convention).mi_unit


def scd(fused: Grey, a: Grey, b: Grey) -> float:
    """Sum of the correlations of differences: corr(F - B, A) + corr(F - A, B), in -2..2.

    A correlation with a constant counts as 0.

    V. Aslantas, E. Bendes, "A new image quality metric for image fusion: the sum of the correlations of differences",
    AEU 69(12), 2015.
    """
    f, x, y = _pictures("SCD", fused=fused, a=a, b=b)
    return _correlation(f - y, x) + _correlation(f - x, y)


def _correlation(x: NDArray, y: NDArray) -> float:
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm > 0 else 0.0


def vif(fused: Grey, a: Grey, b: Grey, convention: str = "tdfusion") -> float:
    """Visual information fidelity in the pixel domain: how much of each source can be seen in the fused picture.

    With the Gaussian-weighted local variances s of source x and fused f, g = s_xf / s_x^2 and s_v^2 = s_f^2 - g s_xf,
    summed over the windows of four scales (17, 9, 5, 3 pixels, 'valid'; sigma_n^2 = 2):
        VIF_x = sum log(1 + g^2 s_x^2 / (s_v^2 + sigma_n^2)) / sum log(1 + s_x^2 / sigma_n^2)
    VIF_a + VIF_b, or their mean in the `tdfusion` convention. A source without any contrast counts as fully kept, 1.

    H. R. Sheikh, A. C. Bovik, "Image information and visual quality", IEEE TIP 15(2), 2006 (the authors' vifp_mscale).
    """
    # Variances do not depend on the mean; without it a constant picture has a variance of exactly 0.
    levels = [x - x.mean() for x in _pictures("VIF", fused=fused, a=a, b=b)]
    kept, total = np.zeros(2), np.zeros(2)
    for scale in range(4):
        size = 2 ** (4 - scale) + 1
        kernel = cv2.getGaussianKernel(size, size / 5)
        if scale > 0:
            levels = [np.ascontiguousarray(_filter_valid(x, kernel)[::2, ::2]) for x in levels]
        means = [_filter_valid(x, kernel) for x in levels]
        variances = [_filter_valid(x * x, kernel) - m * m for x, m in zip(levels, means, strict=True)]
        for i in range(2):
            covariance = _filter_valid(levels[0] * levels[i + 1], kernel) - means[0] * means[i + 1]
            scale_kept, scale_total = _information(covariance, variances[0], variances[i + 1])
            kept[i] += scale_kept
            total[i] += scale_total
    each = np.divide(kept, total, out=np.ones(2), where=total > 0)
    return _join(each, convention)


def _information(covariance: NDArray, fused_variance: NDArray, source_variance: NDArray) -> tuple[float, float]:
    """Information (nats) about the source that the fused windows keep, and that the source's windows hold."""
    tiny, noise = 1e-10, 2.0
    source_variance = np.where(source_variance < tiny, 0.0, source_variance)
    informative = (source_variance > 0) & (fused_variance >= tiny) & (covariance > 0)
    gain = np.where(informative, covariance, 0.0) / (source_variance + tiny)
    residual = np.maximum(fused_variance - gain * covariance, tiny)
    kept = np.log1p(gain * gain * source_variance / (residual + noise)).sum()
    return float(kept), float(np.log1p(source_variance / noise).sum())


def _filter_valid(image: NDArray, kernel: NDArray) -> NDArray:
    """Separable filter of an (H, W) image with an odd (k, 1) kernel, without the border where it would not fit."""
    border = len(kernel) // 2
    return cv2.sepFilter2D(image, -1, kernel, kernel)[border:-border, border:-border]


def qabf(fused: Grey, a: Grey, b: Grey) -> float:
    """Edge preservation of Xydeas and Petrovic: how well the sources' edges survive in strength and orientation.

    With Sobel responses s_x, s_y: g = sqrt(s_x^2 + s_y^2) and alpha = arctan(s_y / s_x) (pi/2 where s_x = 0), for
    source x and fused f:
        G = min(g_x, g_f) / max(g_x, g_f)    A = 1 - |alpha_x - alpha_f| / (pi/2)
        Q_x = 0.9994 / (1 + exp(-15 (G - 0.5))) * 0.9879 / (1 + exp(-22 (A - 0.8)))
        Qabf = sum(Q_a g_a + Q_b g_b) / sum(g_a + g_b)
    Outside the picture is black, as in the published codes. These set G = g where both strengths are equal, instead of
    1; that makes their value up to 6e-4 higher. Two black sources have no edge to lose: 1.

    C. S. Xydeas, V. Petrovic, "Objective image fusion performance measure", Electronics Letters 36(4), 2000.
    """
    f, *sources = _pictures("Qabf", fused=fused, a=a, b=b)
    fused_strength, fused_angle = _edges(f)
    kept = total = 0.0
    for x in sources:
        strength, angle = _edges(x)
        larger = np.maximum(strength, fused_strength)
        ratio = np.divide(np.minimum(strength, fused_strength), larger, out=np.ones_like(larger), where=larger > 0)
        turn = 1 - np.abs(angle - fused_angle) / (np.pi / 2)
        quality = 0.9994 / (1 + np.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + np.exp(-22 * (turn - 0.8)))
        kept += float((quality * strength).sum())
        total += float(strength.sum())
    return kept / total if total > 0 else 1.0


def _edges(image: NDArray) -> tuple[NDArray, NDArray]:
    """Sobel edge strength and orientation in (-pi/2, pi/2] of an (H, W) image."""
    # The published codes convolve with [-1 0 1; ...], which turns its sign; at s_x = 0 the sign of the angle matters.
    x = -cv2.Sobel(image, cv2.CV_64F, 1, 0, borderType=cv2.BORDER_CONSTANT)
    y = cv2.Sobel(image, cv2.CV_64F, 0, 1, borderType=cv2.BORDER_CONSTANT)
    slope = np.divide(y, x, out=np.full_like(x, np.inf), where=x != 0)
    return np.sqrt(x * x + y * y), np.arctan(slope)


def ssim(fused: Grey, a: Grey, b: Grey, convention: str = "tdfusion") -> float:
    """Structural similarity of the fused picture with each source.

    In 7 x 7 windows, with unbiased variances, C1 = (0.01 L)^2 and C2 = (0.03 L)^2, L the data range:
        SSIM_x = mean of (2 m_x m_f + C1)(2 s_xf + C2) / ((m_x^2 + m_f^2 + C1)(s_x^2 + s_f^2 + C2))
    SSIM_a + SSIM_b, or their mean in the `tdfusion` convention. L = 255, but 2 in the `cddfuse` convention.

    Z. Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 13(4), 2004,
    with the defaults of scikit-image's structural_similarity.
    """
    data_range = _get_convention(convention).ssim_range
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    unbiased = 49 / 48
    images = _pictures("SSIM", fused=fused, a=a, b=b)
    means = [_box_valid(x) for x in images]
    variances = [unbiased * (_box_valid(x * x) - m * m) for x, m in zip(images, means, strict=True)]
    each = np.zeros(2)
    for i in range(2):
        product = means[0] * means[i + 1]
        covariance = unbiased * (_box_valid(images[0] * images[i + 1]) - product)
        luminance = (2 * product + c1) / (means[0] ** 2 + means[i + 1] ** 2 + c1)
        structure = (2 * covariance + c2) / (variances[0] + variances[i + 1] + c2)
        each[i] = np.mean(luminance * structure)
    return _join(each, convention)


def _box_valid(image: NDArray) -> NDArray:
    """Mean of each 7 x 7 window that fits into an (H, W) image."""
    return cv2.boxFilter(image, -1, (7, 7))[3:-3, 3:-3]


def _join(each: NDArray, convention: str) -> float:
    """One number from the values against a and b."""
    return float(each.mean() if _get_convention(convention).average else each.sum())


def flicker(fused_frames: Iterable[Grey], a_frames: Iterable[Grey], b_frames: Iterable[Grey]) -> float:
    """Frame-to-frame change of a fused video beyond that of its sources, in grey levels a pixel and frame.

    With d(X) = |X_t - X_(t-1)|: the mean over all pixels and frames of max(d(F) - max(d(A), d(B)), 0). It is 0 where
    every change is explained by a source (any fixed weighted mean of the sources, up to rounding), and grows where the
    fused picture pulsates or sparkles by itself. It is the temporal information of ITU-T P.910 (statistics of frame
    differences), taken pixel by pixel and relative to the sources; it knows no motion compensation.

    Args:
        fused_frames: two or more (H, W) frames, uint8 or float in 0..255; may be a generator, as only two are held.
        a_frames: as many frames of the first source.
        b_frames: as many frames of the second source.

    Raises:
        InputError: fewer than two frames, unequal numbers of frames, unequal sizes, or values outside 0..255.
    """
    changes: list[float] = []
    previous: list[NDArray[np.float64]] = []
    for f, a, b in zip_longest(fused_frames, a_frames, b_frames):
        if f is None or a is None or b is None:
            raise InputError("flicker needs as many frames of each source as of the fused video")
        current = _pictures("flicker", fused=f, a=a, b=b)
        if previous:
            if current[0].shape != previous[0].shape:
                raise InputError("flicker needs frames of one size")
            change, change_a, change_b = (np.abs(x - y) for x, y in zip(current, previous, strict=True))
            changes.append(float(np.maximum(change - np.maximum(change_a, change_b), 0).mean()))
        previous = current
    if not changes:
        raise InputError("flicker needs at least two frames")
    return float(np.mean(changes))


def check_names(metrics: Sequence[str], convention: str) -> None:
    """Raise InputError unless the metrics and the convention are known."""
    _get_convention(convention)
    for name in metrics:
        if name not in METRICS:
            raise InputError(f"unknown metric '{name}': choose from {', '.join(METRICS)}")


def _get_convention(name: str) -> _Convention:
    if name not in _CONVENTIONS:
        raise InputError(f"unknown metric convention '{name}': choose from {', '.join(CONVENTIONS)}")
    return _CONVENTIONS[name]


def grey_levels(image: Grey, name: str) -> NDArray[np.uint8]:
    """Return an (H, W) picture as uint8; floats in 0..255 are rounded.

    Raises:
        InputError: not two-dimensional or empty, not finite, values outside 0..255, or fractions of 0..1 only.
    """
    image = np.asarray(image)
    if image.ndim != 2 or image.size == 0:
        raise InputError(f"metrics need an H x W grey picture; {name} has shape {image.shape}")
    if image.dtype == np.uint8:
        return image.astype(np.uint8, copy=False)
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 255):  # also true for NaN
        raise InputError(f"metrics need grey levels in 0..255; {name} has {low:g} to {high:g}: scale it first")
    levels = np.rint(image)
    if high <= 1 and not np.array_equal(levels, image):
        raise InputError(f"metrics need grey levels in 0..255; {name} seems to be in 0..1: multiply it by 255")
    return levels.astype(np.uint8)


def _pictures(metric: str, **images: Grey) -> list[NDArray[np.float64]]:
    """The named pictures in float64, rounded to grey levels and checked for the metric."""
    pictures = {name: grey_levels(image, name) for name, image in images.items()}
    _check_sizes(pictures, (metric,))
    return [x.astype(np.float64) for x in pictures.values()]


def _check_sizes(pictures: dict[str, NDArray[np.uint8]], metrics: Sequence[str]) -> None:
    sizes = {name: f"{x.shape[1]}x{x.shape[0]}" for name, x in pictures.items()}
    if len(set(sizes.values())) > 1:
        raise InputError("metrics need pictures of one size: " + ", ".join(f"{n} {s}" for n, s in sizes.items()))
    shorter = min(next(iter(pictures.values())).shape)
    for name in metrics:
        minimum = MINIMUM_SIZE.get(name, 1)
        if shorter < minimum:
            raise InputError(f"{name} needs at least {minimum}x{minimum} pixels; the picture has {sizes['fused']}")
