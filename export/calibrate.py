"""How large the inputs of each convolution get on calibration pictures: what INT8 scales are made of.

Every value is counted in a histogram while the network runs in PyTorch, so that nothing but the histograms is kept and
memory does not grow with the number of pictures. Limits are symmetric: int8 has the zero point 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from export.options import METHODS
from refusion.evaluate import find_scenes
from runtime.color import apply_tone
from runtime.errors import InputError
from runtime.scenes import night_road

MIN_PAIRS = 8
MAX_PAIRS = 32  # of a folder, spread evenly
CROP = 256  # pixels a side: what the network remembers of a whole 480x640 picture would be five times as much
PERCENTILE = 99.99  # of the absolute values
BINS = 2048
LEVELS = 128  # int8 has so many absolute values

Pairs = list[tuple[Tensor, Tensor]]  # (1, 1, H, W) float32 in [0, 1]


def read_pairs(folder: str | Path, *, skip_bad: bool = False) -> Pairs:
    """Crops of up to MAX_PAIRS pairs below a folder with sub-folders a and b, for calibration.

    16-bit grey pictures are scaled to their own percentiles, as in training.

    Raises:
        InputError: no such folder, files that can't be read, or fewer than MIN_PAIRS pairs.
    """
    scenes = find_scenes(folder, {}, skip_bad=skip_bad)
    if len(scenes) < MIN_PAIRS:
        raise InputError(f"{folder} has {len(scenes)} pairs; calibration needs {MIN_PAIRS} or more")
    count = min(len(scenes), MAX_PAIRS)
    spread = [scenes[i * len(scenes) // count] for i in range(count)]
    return crop([_luma(*scene.load()[:2]) for scene in tqdm(spread, "reading", unit="pair", disable=None)], CROP)


def generated_pairs(count: int = MIN_PAIRS) -> Pairs:
    """Frames of the generated night road, 480x640, for a calibration without pictures."""
    return [_luma(*night_road(frame=97 * i, seed=i)) for i in range(count)]


def crop(pairs: Pairs, side: int) -> Pairs:
    """A random square of each pair, the same each time; the whole where it is smaller."""
    rng = np.random.default_rng(0)
    crops = []
    for a, b in pairs:
        top, left = (int(rng.integers(0, max(0, length - side) + 1)) for length in a.shape[2:])
        window = (..., slice(top, top + side), slice(left, left + side))
        crops.append((a[window].clone(), b[window].clone()))
    return crops


def _luma(a: np.ndarray, b: np.ndarray) -> tuple[Tensor, Tensor]:
    luma_a, luma_b = (torch.from_numpy(apply_tone(x, "percentile"))[None, None] for x in (a, b))
    return luma_a, luma_b


class Histogram:
    """Counts of absolute values in BINS bins from 0 to `top`, which doubles when a larger value comes."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS)
        self.top = 0.0
        self.largest = 0.0

    def add(self, values: Tensor) -> None:
        """Take an (N, C, H, W) tensor: its largest value, and a quarter of its pixels for the counts."""
        self.largest = max(self.largest, float(values.max()), -float(values.min()))
        values = values[..., ::2, ::2].abs()
        self.top = self.top or self.largest
        while self.top < self.largest:
            self.counts = np.concatenate((self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2)))
            self.top *= 2
        if self.top:
            self.counts += torch.histc(values, BINS, 0, self.top).numpy()

    def limit(self, method: str) -> float:
        """The absolute value that becomes 127, by one of METHODS.

        minmax: the largest. percentile: PERCENTILE of them are not larger. entropy: the one whose 128 levels tell
        least apart from the whole histogram (Kullback-Leibler divergence, S. Migacz, "8-bit inference with TensorRT",
        GTC 2017).
        """
        if method == "minmax":
            return self.largest
        if method == "percentile":
            reached = np.searchsorted(np.cumsum(self.counts), self.counts.sum() * PERCENTILE / 100)
            return min(self.top * float(reached + 1) / BINS, self.largest)
        divergences = {bins: _divergence(self.counts, bins) for bins in range(LEVELS, BINS + 1, 8)}
        return min(self.top * min(divergences, key=lambda bins: divergences[bins]) / BINS, self.largest)


def _divergence(counts: NDArray[np.float64], bins: int) -> float:
    """KL divergence of the first `bins` bins, which hold what lies beyond as well, from themselves in LEVELS levels."""
    kept = counts[:bins]
    exact = kept.copy()
    exact[-1] += counts[bins:].sum()
    starts = np.arange(LEVELS) * bins // LEVELS
    level = np.repeat(np.arange(LEVELS), np.diff(np.append(starts, bins)))
    used = np.add.reduceat((kept > 0).astype(float), starts)
    # Each level spreads its count evenly over those of its bins that hold anything.
    coarse = np.where(kept > 0, (np.add.reduceat(kept, starts) / np.maximum(used, 1))[level], 0)
    total, coarse_total = exact.sum(), coarse.sum()
    if not coarse_total:
        return float("inf")
    p, q = exact / total, coarse / coarse_total
    held = p > 0
    return float((p[held] * np.log(p[held] / np.maximum(q[held], 1e-12))).sum())


def input_limits(
    network: nn.Module, convolutions: Sequence[str], pairs: Pairs, method: str = METHODS[0]
) -> dict[str, float]:
    """The limit of each named convolution's input over the calibration pairs.

    Args:
        network: forward(a, b) of luma, in float32.
        convolutions: names of its modules.
        pairs: of `read_pairs` or `generated_pairs`.
        method: one of METHODS.
    """
    histograms = {name: Histogram() for name in convolutions}
    modules = {network.get_submodule(name): histogram.add for name, histogram in histograms.items()}
    _watch_inputs(network, modules, pairs, "calibrating")
    # A source that is black throughout has no scale: any will do.
    return {name: histogram.limit(method) or 1.0 for name, histogram in histograms.items()}


def largest_channels(network: nn.Module, convolutions: Sequence[nn.Module], pairs: Pairs) -> list[Tensor]:
    """Largest absolute value of each channel of the inputs of some convolutions: (C,) each."""
    largest: list[Tensor] = [torch.zeros(()) for _ in convolutions]

    def take(i: int) -> Callable[[Tensor], None]:
        def keep(values: Tensor) -> None:
            largest[i] = torch.maximum(largest[i], values.abs().amax((0, 2, 3)))

        return keep

    _watch_inputs(network, {conv: take(i) for i, conv in enumerate(convolutions)}, pairs, "measuring channels")
    return largest


@torch.inference_mode()
def _watch_inputs(
    network: nn.Module, modules: Mapping[nn.Module, Callable[[Tensor], None]], pairs: Pairs, title: str
) -> None:
    """Run the network on the pairs, and hand the input of each module to its function."""
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, take=take: take(inputs[0]))
        for module, take in modules.items()
    ]
    try:
        for a, b in tqdm(pairs, title, unit="pair", disable=None):
            network(a, b)
    finally:
        for hook in hooks:
            hook.remove()
