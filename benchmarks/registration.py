"""Registration without a target, on real pairs that were moved apart by known transformations.

    python -m benchmarks.registration --data DIR [--trials 64] [--frames 1 2 4] [--seed 0]

A trial takes some pairs at random, cuts them to one size and samples the infrared ones anew: 0.8 to 1.2 times as large,
turned by up to 3 degrees, shifted by up to 30 pixels, one transformation for all pairs of a trial, and cut to the
rectangle that holds picture everywhere. `--turn` adds the perspective of cameras that are turned to each other. The
corner error is the mean distance, over the corners of the infrared picture, between where the estimate puts them in the
visible one and where they belong. The last row of a table shows what happens where nothing can be right: pairs whose
two pictures show different scenes.

DIR is a folder with sub-folders a and b, or one in which ivif/dev/RoadScene is such a folder. RoadScene's own pairs are
off by about 2 pixels, which is part of every error here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from runtime.alignment.fields import corner_distance
from runtime.alignment.targetless import Alignment, align
from runtime.images import find_pairs, read_image
from runtime.register import largest_rectangle

BAR = 5.0  # pixels of corner error
Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Trial:
    """Pictures of both cameras and the true homography, pixels of a -> pixels of b."""

    a: list[np.ndarray]
    b: list[np.ndarray]
    truth: np.ndarray


@dataclass(frozen=True)
class Outcome:
    alignment: Alignment
    error: float  # pixels
    seconds: float  # of processor time


def make_trial(pairs: Sequence[Pair], rng: np.random.Generator, frames: int, turn: float = 0.0) -> Trial:
    """A trial of `frames` different pairs, see above.

    Args:
        pairs: infrared and visible, HxW or HxWx3, of any sizes.
        rng: decides everything.
        frames: pairs that are pooled.
        turn: greatest angle between the optical axes in degrees, either way in both directions.
    """
    chosen = [pairs[number] for number in rng.choice(len(pairs), frames, replace=False)]
    height, width = (min(pair[0].shape[axis] for pair in chosen) for axis in (0, 1))
    move = _random_move(rng, (height, width), turn)  # pixels of b -> pixels of a
    inside = cv2.warpPerspective(np.full((height, width), 255, np.uint8), move, (width, height)) == 255
    x, y, kept_width, kept_height = largest_rectangle(inside)
    moved = [cv2.warpPerspective(_middle(pair[0], height, width), move, (width, height)) for pair in chosen]
    return Trial(
        [image[y : y + kept_height, x : x + kept_width] for image in moved],
        [_middle(pair[1], height, width) for pair in chosen],
        np.linalg.inv(np.array([[1, 0, -x], [0, 1, -y], [0, 0, 1]]) @ move),
    )


def _random_move(rng: np.random.Generator, size: tuple[int, int], turn: float) -> np.ndarray:
    height, width = size
    scale, roll, shift = rng.uniform(0.8, 1.2), np.radians(rng.uniform(-3, 3)), rng.uniform(-30, 30, 2)
    tilt = np.radians(rng.uniform(-turn, turn, 2)) if turn else np.zeros(2)
    centre = np.array([[1, 0, (width - 1) / 2], [0, 1, (height - 1) / 2], [0, 0, 1]])
    lens = np.diag((width, width, 1))  # the focal length of a field of view of 53 degrees
    turned = lens @ cv2.Rodrigues(np.array([tilt[0], tilt[1], 0]))[0] @ np.linalg.inv(lens)
    # The turn alone would shift the picture by far more than 30 pixels.
    turned = turned / turned[2, 2]
    turned = np.array([[1, 0, -turned[0, 2]], [0, 1, -turned[1, 2]], [0, 0, 1]]) @ turned
    c, s = scale * np.cos(roll), scale * np.sin(roll)
    return centre @ np.array([[c, -s, shift[0]], [s, c, shift[1]], [0, 0, 1]]) @ turned @ np.linalg.inv(centre)


def _middle(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def run_trial(trial: Trial) -> Outcome:
    """Estimate and compare."""
    start = time.process_time()
    alignment = align(trial.a, trial.b)
    seconds = time.process_time() - start
    return Outcome(alignment, corner_distance(alignment.homography, trial.truth, trial.a[0].shape[:2]), seconds)


def read_all(data: Path) -> list[Pair]:
    """All pairs of a folder with a and b, or of RoadScene below it."""
    nested = data / "ivif" / "dev" / "RoadScene"
    folder = nested if nested.is_dir() else data
    return [(read_image(pair.a), read_image(pair.b)) for pair in find_pairs(folder / "a", folder / "b")]


def _strangers(pairs: Sequence[Pair], rng: np.random.Generator) -> list[Pair]:
    """The infrared picture of each pair with the visible one of another, scaled to its size."""
    step = rng.permutation(len(pairs))
    others = np.empty(len(pairs), int)
    others[step] = np.roll(step, 1)
    return [(pair[0], cv2.resize(pairs[k][1], pair[0].shape[1::-1])) for pair, k in zip(pairs, others, strict=True)]


def _row(name: str, outcomes: Sequence[Outcome]) -> str:
    errors = np.array([outcome.error for outcome in outcomes])
    trusted = np.array([outcome.alignment.trusted for outcome in outcomes])
    within = np.array([outcome.error <= outcome.alignment.uncertainty for outcome in outcomes])
    bad = errors >= BAR
    failed = f"{(bad & ~trusted).sum()} of {bad.sum()}"
    alarms = f"{(~bad & ~trusted).sum()} of {(~bad).sum()}"
    covered = f"{100 * within[trusted].mean():5.0f} %" if trusted.any() else "      -"
    seconds = np.mean([outcome.seconds for outcome in outcomes])
    return (
        f"{name:18} {np.median(errors):8.2f} {np.quantile(errors, 0.9):8.2f} {errors.max():8.2f}"
        f" {100 * (errors < BAR).mean():9.1f} % {100 * (errors < 2).mean():6.1f} %"
        f" {failed:>12} {alarms:>12} {covered:>9} {seconds:9.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--turn", type=float, default=0.0, metavar="DEGREES", help="between the optical axes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    pairs = read_all(args.data)
    largest = max(args.frames)
    rows = [(f"{n} pair{'s' if n > 1 else ''}", pairs, n) for n in args.frames]
    rows.append((f"{largest} of two scenes", _strangers(pairs, np.random.default_rng(args.seed)), largest))
    print(f"{len(pairs)} pairs of {args.data}, {args.trials} trials a row, one thread")
    print(
        "                   corner error, px of B               share under     failures        false  within     CPU s"
    )
    print(
        "pooled               median     90 %    worst        5 px     2 px   recognised       alarms  stated   a trial"
    )
    for name, source, frames in rows:
        rng = np.random.default_rng(args.seed)
        trials = (make_trial(source, rng, frames, args.turn) for _ in range(args.trials))
        outcomes = [run_trial(trial) for trial in tqdm(trials, name, args.trials, disable=None, leave=False)]
        print(_row(name, outcomes), flush=True)


if __name__ == "__main__":
    main()
