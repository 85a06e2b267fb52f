"""Training data: folders of image pairs become batches of random crops.

What is random is a pure function of (seed, epoch, stage, position): no generator state has to be saved to resume, and N
processes read disjoint parts of one order.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from runtime.color import Tone, apply_tone
from runtime.errors import InputError
from runtime.images import Pair, find_pair_folders, find_pairs, read_image, refuse_or_skip

_ORDER, _CROP = 0, 1  # the two kinds of random numbers of a (seed, epoch, stage)
_MANY = 50  # pairs from which reading deserves a progress bar

Batch = tuple[Tensor, Tensor]

log = logging.getLogger("refusion")


class PairDataset(Dataset[Batch]):
    """Pairs of luma images below some folders, cut into random crops.

    `dataset[i]` is the whole i-th pair; training takes `batch` or `batches`. All pairs are read and checked once at
    construction. Images smaller than the crop are padded by reflection.

    Args:
        roots: folders with sub-folders of pairs, at any depth (see `runtime.images.find_pair_folders`).
        crop: height and width of the crops in pixels.
        seed: from 0 up.
        a_name, b_name: the sub-folders of source A and source B.
        skip_bad: leave out files that are unreadable, unmatched or unequal in size, with a warning for each, instead of
            refusing.
        flips: mirror each crop left-right and upside down, each with probability 1/2.
        darken: from 0 to below 1: multiply each source's crop by a factor drawn from [1 - darken, 1], so that sources
            darker than the training data are seen too.
        cache_gb: memory for decoded images in 10^9 bytes (of this process); the rest is read again for each crop.
        tone: how 16-bit grey images are scaled to [0, 1], see `runtime.color.apply_tone`. By default to each image's
            own percentiles 1 and 99, as raw thermal counts fill a small part of the 16 bits.
        progress: show a bar while many pairs are read, on a terminal.

    Raises:
        InputError: no pairs, bad pairs without skip_bad, or an argument out of range.
    """

    def __init__(
        self,
        roots: Sequence[str | Path],
        *,
        crop: int,
        seed: int,
        a_name: str = "a",
        b_name: str = "b",
        skip_bad: bool = False,
        flips: bool = True,
        darken: float = 0.0,
        cache_gb: float = 2.0,
        tone: Tone = "percentile",
        progress: bool = True,
    ):
        if crop < 1 or seed < 0:
            raise InputError(f"crop is {crop} and seed is {seed}; crop must be at least 1 and seed at least 0")
        if not 0 <= darken < 1:
            raise InputError(f"darken is {darken}; it must be from 0 to below 1")
        apply_tone(np.zeros((1, 1), np.uint16), tone)  # refuses an unknown tone before any file is read
        self.crop, self.seed, self.flips, self.darken, self.tone = crop, seed, flips, darken, tone
        folders = [folder for root in roots for folder in find_pair_folders(root, a_name, b_name)]
        if not folders:
            raise InputError("no data folder is given")
        found = [pair for f in folders for pair in find_pairs(f / a_name, f / b_name, skip_bad=skip_bad)]
        self.pairs: list[Pair] = []
        self._cache: dict[Path, np.ndarray] = {}
        self._read_all(found, skip_bad, cache_bytes=cache_gb * 1e9, progress=progress and len(found) > _MANY)

    def _read_all(self, pairs: list[Pair], skip_bad: bool, cache_bytes: float, progress: bool) -> None:
        problems = []
        used = 0
        for pair in tqdm(pairs, "reading pairs", unit="pair", disable=None if progress else True, leave=False):
            try:
                a, b = self._images(pair)
                if a.shape != b.shape:
                    sizes = f"{a.shape[1]}x{a.shape[0]} and {b.shape[1]}x{b.shape[0]}"
                    raise InputError(f"{pair.a} and {pair.b} differ in size ({sizes})")
            except InputError as error:
                problems.append(str(error))
                continue
            self.pairs.append(pair)
            if used + a.nbytes + b.nbytes <= cache_bytes:
                used += a.nbytes + b.nbytes
                self._cache[pair.a], self._cache[pair.b] = a, b
        refuse_or_skip(problems, skip_bad)
        if not self.pairs:
            raise InputError("no usable image pair is left")
        log.info("%d pairs, %d of them kept in memory (%.2f GB)", len(self), len(self._cache) // 2, used / 1e9)

    def _images(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        return self._luma(pair.a), self._luma(pair.b)

    def _luma(self, path: Path) -> np.ndarray:
        """(H, W) luma in the depth of the file, uint8 or uint16, so that four to two times as many fit the memory."""
        if path in self._cache:
            return self._cache[path]
        image = read_image(path)
        return np.rint(apply_tone(image, self.tone) * np.iinfo(image.dtype).max).astype(image.dtype)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Batch:
        """The whole pair: a, b, each (1, H, W) float32 in [0, 1]."""
        a, b = self._images(self.pairs[index])
        return _to_tensor(a), _to_tensor(b)

    def sample(self, epoch: int, stage: int, position: int) -> Batch:
        """The crop at a position of the order of (epoch, stage): a, b, each (1, crop, crop) float32 in [0, 1].

        Positions from 0 up without end: each run of len(self) positions is one permutation of the pairs.
        """
        turn, place = divmod(position, len(self))
        order = np.random.default_rng([self.seed, epoch, stage, _ORDER, turn]).permutation(len(self))
        images = self._images(self.pairs[order[place]])
        rng = np.random.default_rng([self.seed, epoch, stage, _CROP, position])
        top, left = (int(rng.integers(max(size - self.crop, 0) + 1)) for size in images[0].shape)
        window = np.s_[top : top + self.crop, left : left + self.crop]
        a, b = (_pad(image[window], self.crop) for image in images)
        if self.flips:
            rows, columns = (-1 if flip else 1 for flip in rng.integers(2, size=2))
            a, b = a[::rows, ::columns], b[::rows, ::columns]
        gain_a, gain_b = 1 - self.darken * rng.random(2)
        return _to_tensor(a) * float(gain_a), _to_tensor(b) * float(gain_b)

    def batch(self, epoch: int, stage: int, step: int, batch_size: int, *, rank: int = 0, world: int = 1) -> Batch:
        """The part of one process of the batch of a step: a, b, each (batch_size, 1, crop, crop) float32 in [0, 1].

        A step takes batch_size * world positions; the parts of all ranks, concatenated, are the batch of one process
        with world times the batch size.
        """
        first = (step * world + rank) * batch_size
        samples = [self.sample(epoch, stage, position) for position in range(first, first + batch_size)]
        return torch.stack([a for a, _ in samples]), torch.stack([b for _, b in samples])

    def batches(
        self,
        epoch: int,
        stage: int,
        first_step: int,
        last_step: int,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> Iterator[Batch]:
        """The batches of steps first_step to last_step - 1, in order.

        With workers, that many threads prepare two batches each ahead; they end with the iterator.
        """
        steps = range(first_step, last_step)
        if workers == 0:
            yield from (self.batch(epoch, stage, step, batch_size, rank=rank, world=world) for step in steps)
            return
        pool = ThreadPoolExecutor(workers, "batches")
        waiting: deque[Future[Batch]] = deque()
        try:
            for step in steps:
                waiting.append(pool.submit(self.batch, epoch, stage, step, batch_size, rank=rank, world=world))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def steps_per_epoch(self, batch_size: int, world: int = 1) -> int:
        """Steps in which every pair is seen at least once."""
        return -(-len(self) // (batch_size * world))


def _pad(image: np.ndarray, size: int) -> np.ndarray:
    """Pad (H, W) by reflection to at least (size, size), evenly on both sides."""
    missing = [max(size - length, 0) for length in image.shape]
    return np.pad(image, [(m // 2, m - m // 2) for m in missing], mode="reflect")


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.astype(np.float32) / np.iinfo(image.dtype).max)[None]
