"""Fusion without learning, for comparison: average, Laplacian pyramid, guided filter. (H, W) float32 luma in [0, 1]."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Luma = NDArray[np.float32]


def average(a: Luma, b: Luma) -> Luma:
    """The mean of both."""
    return (a + b) * np.float32(0.5)


def laplacian_pyramid(a: Luma, b: Luma, levels: int = 5) -> Luma:
    """At each level of detail the coefficient of larger magnitude, at the top the mean (Burt and Adelson 1983)."""
    tops = [a, b]
    details: list[Luma] = []
    for _ in range(levels):
        if min(tops[0].shape) < 2:
            break
        smaller = [cv2.pyrDown(x) for x in tops]
        size = tops[0].shape[::-1]
        da, db = (x - cv2.pyrUp(s, dstsize=size) for x, s in zip(tops, smaller, strict=True))
        details.append(np.where(np.abs(da) >= np.abs(db), da, db))
        tops = smaller  # type: ignore[assignment]
    fused = average(*tops)
    for detail in reversed(details):
        fused = cv2.pyrUp(fused, dstsize=detail.shape[::-1]) + detail
    return np.clip(fused, 0, 1)


def guided_filter_fusion(a: Luma, b: Luma) -> Luma:
    """Base and detail weighted by saliency, the weights smoothed by a guided filter (Li, Kang, Hu 2013)."""
    sources = (a, b)
    saliency = [cv2.GaussianBlur(np.abs(cv2.Laplacian(x, cv2.CV_32F)), (11, 11), 5) for x in sources]
    first = (saliency[0] >= saliency[1]).astype(np.float32)
    bases = [cv2.blur(x, (31, 31)) for x in sources]
    fused = np.zeros_like(a)
    for radius, epsilon, layers in ((45, 0.3, bases), (7, 1e-6, [x - s for x, s in zip(sources, bases, strict=True)])):
        weights = [_guided_filter(x, w, radius, epsilon) for x, w in zip(sources, (first, 1 - first), strict=True)]
        fused += (weights[0] * layers[0] + weights[1] * layers[1]) / np.maximum(weights[0] + weights[1], 1e-6)
    return np.clip(fused, 0, 1)


def _guided_filter(guide: Luma, x: Luma, radius: int, epsilon: float) -> Luma:
    """The guided filter (He, Sun, Tang 2010) of x, clipped to [0, 1] as it stands for a weight."""

    def mean(y: np.ndarray) -> np.ndarray:
        return cv2.blur(y, (2 * radius + 1, 2 * radius + 1))

    mean_guide, mean_x = mean(guide), mean(x)
    slope = (mean(guide * x) - mean_guide * mean_x) / (mean(guide * guide) - mean_guide**2 + epsilon)
    return np.clip(mean(slope) * guide + mean(mean_x - slope * mean_guide), 0, 1)


BASELINES = {
    "average": average,
    "Laplacian pyramid": laplacian_pyramid,
    "guided filter": guided_filter_fusion,
}
