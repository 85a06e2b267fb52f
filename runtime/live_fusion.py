"""From a pair of camera pictures to one picture: tone, registration, network, colour, all of one size.

A stream's pictures keep the size of the visible camera's first and stay coloured once they were, whatever the cameras
do, so that a video or a viewer behind it goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.color import (
    RANGE_POLICIES,
    SmoothRange,
    check_chroma_policy,
    compose,
    fused_chroma,
    luma,
    stretch,
)
from runtime.errors import InputError
from runtime.sync import Pair
from runtime.tone import StreamTone


class Register(Protocol):
    """What a stream needs of a `runtime.register.Registration`.

    Attributes:
        reference: "a" or "b", whose picture stays where it is.
        mask: HxW uint8, 0 where the other camera sees nothing.
    """

    reference: str
    mask: NDArray[np.uint8]

    def __call__(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both pictures, aligned and of one size; the other one is the caller's own."""


class PairFuser(Protocol):
    """What a stream needs of a `runtime.Fuser`.

    Attributes:
        model: its name.
        choice: why this model, in one line.
        threads: CPU threads that compute one frame, 0 where a GPU does.
        range, chroma: the policies; they may be changed between two calls.
    """

    model: str
    choice: str
    threads: int
    range: str
    chroma: str

    def __call__(self, a: np.ndarray, b: np.ndarray) -> NDArray[np.uint8]:
        """Two aligned HxW or HxWx3 uint8 or uint16 -> HxWx3 (BGR) or HxW uint8."""


class Average:
    """The mean of both pictures: no network, to set up cameras on any machine and to measure everything else."""

    model = "average"
    choice = "model average (no network)"
    threads = 1

    def __init__(self, range: str = "auto", chroma: str = "auto"):
        self.range = "smooth" if range == "auto" else range
        self.chroma = chroma
        self._limits = SmoothRange()

    def __call__(self, a: np.ndarray, b: np.ndarray) -> NDArray[np.uint8]:
        fused = cv2.addWeighted(luma(a), 0.5, luma(b), 0.5, 0).astype(np.float32, copy=False)
        if self.range != "keep":
            low, high, _, _ = cv2.minMaxLoc(fused)
            fused = stretch(fused, *(self._limits.update(low, high) if self.range == "smooth" else (low, high)))
        return compose(fused, fused_chroma(a, b, self.chroma))


class LiveFusion:
    """Fuses pairs one after the other; pictures that are alone pass through.

    Args:
        fuser: the network, with the policies of range and chroma.
        make_register: (size of a, size of b) as (H, W) -> what aligns such pictures; None only scales a to b's size.
        tone: see `runtime.tone.StreamTone`.

    Raises:
        InputError: an unknown tone.
    """

    def __init__(
        self,
        fuser: PairFuser,
        make_register: Callable[[tuple[int, int], tuple[int, int]], Register] | None = None,
        tone: str | tuple[float, float] = "percentile",
    ):
        self.fuser = fuser
        self._make_register = make_register
        self._register: Register | None = None
        self._outside: NDArray[np.uint8] | None = None  # 255 where one camera alone sees something
        self._sizes: dict[str, tuple[int, int]] = {}  # camera -> (H, W) of its first picture
        self._colour = False
        self._tone = StreamTone(tone)
        self._toned: tuple[StreamTone, int, np.ndarray] | None = None  # rule, index of the picture a, its brightness

    @property
    def policy(self) -> dict[str, str]:
        """The policies in effect: range, chroma, tone."""
        rule = self._tone.rule
        tone = f"{rule[0]:g}:{rule[1]:g}" if isinstance(rule, tuple) else rule
        return {"range": self.fuser.range, "chroma": self.fuser.chroma, "tone": tone}

    def change(self, policy: Mapping[str, Any]) -> None:
        """Take other policies from the next picture on: any of range, chroma, tone; any thread may call it.

        Raises:
            InputError: an unknown one, or one that the model doesn't let choose; nothing is changed then.
        """
        range_, chroma = str(policy.get("range", self.fuser.range)), str(policy.get("chroma", self.fuser.chroma))
        if range_ not in RANGE_POLICIES:
            raise InputError(f"unknown range policy '{range_}'; choose from {', '.join(RANGE_POLICIES)}")
        check_chroma_policy(chroma)
        tone = StreamTone(policy["tone"]) if "tone" in policy else self._tone
        self.fuser.range, self.fuser.chroma = range_, chroma
        self._tone = tone

    def __call__(self, pair: Pair, stages: dict[str, float]) -> NDArray[np.uint8]:
        """One picture of a pair: HxWx3 (BGR), or HxW where neither camera has colour.

        Args:
            pair: both pictures, or one that passes through.
            stages: takes the seconds of "tone", "register", "fuse" and "convert".

        Raises:
            InputError: the network or the registration isn't made for these sizes.
        """
        clock = _Clock(stages)
        a = self._brightness(pair)
        b = None if pair.b is None else self._scaled("b", pair.b.image)
        clock.lap("tone")
        a, b = self._aligned(a, b)
        clock.lap("register")
        picture = self.fuser(a, b) if a is not None and b is not None else _to_8_bits(a if b is None else b)
        clock.lap("fuse")
        picture = self._same_kind(picture, pair)
        clock.lap("convert")
        return picture

    def _brightness(self, pair: Pair) -> np.ndarray | None:
        """Picture a after the tone map; that of a picture that is used again was kept."""
        if pair.a is None:
            return None
        tone = self._tone
        if self._toned is None or self._toned[0] is not tone or self._toned[1] != pair.a.index:
            image = self._scaled("a", pair.a.image)
            self._toned = tone, pair.a.index, tone(image, pair.a.time)
        return self._toned[2]

    def _scaled(self, camera: str, image: np.ndarray) -> np.ndarray:
        """A picture in the size of the camera's first: a camera that changes its resolution shows the same field."""
        return _resized(image, self._sizes.setdefault(camera, image.shape[:2]))

    def _aligned(self, a: np.ndarray | None, b: np.ndarray | None) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Both in b's size (in a's while no picture b ever came), a where it belongs."""
        if "b" not in self._sizes:
            return a, b
        size_b = self._sizes["b"]
        if self._make_register is None or "a" not in self._sizes:
            return (None if a is None else _resized(a, size_b)), b
        if self._register is None:
            self._register = self._make_register(self._sizes["a"], size_b)
            self._outside = cv2.bitwise_not(self._register.mask).astype(np.uint8, copy=False)
        # A picture that is missing is black meanwhile: both are aligned together.
        aligned_a, aligned_b = self._register(
            np.zeros(self._sizes["a"], np.uint8) if a is None else a, np.zeros(size_b, np.uint8) if b is None else b
        )
        if a is None or b is None:
            return (None if a is None else aligned_a), (None if b is None else aligned_b)
        if self._register.reference == "b":
            return self._completed(aligned_a, aligned_b), aligned_b
        return aligned_a, self._completed(aligned_b, aligned_a)

    def _completed(self, picture: np.ndarray, other: np.ndarray) -> np.ndarray:
        """A picture with the other's brightness where its camera sees nothing: black there would darken the result."""
        if other.ndim != picture.ndim:
            other = cv2.cvtColor(other, cv2.COLOR_BGR2GRAY if picture.ndim == 2 else cv2.COLOR_GRAY2BGR)
        if other.dtype != picture.dtype:
            scale, depth = (257.0, cv2.CV_16U) if picture.dtype == np.uint16 else (1 / 257, cv2.CV_8U)
            other = cv2.addWeighted(other, scale, other, 0, 0, dtype=depth)
        assert self._outside is not None
        return cv2.copyTo(other, self._outside, picture)

    def _same_kind(self, picture: NDArray[np.uint8], pair: Pair) -> NDArray[np.uint8]:
        """Colour from the first picture of a coloured camera on, but for the policy "none"."""
        self._colour = self._colour or any(frame is not None and frame.image.ndim == 3 for frame in (pair.a, pair.b))
        if self.fuser.chroma == "none" and picture.ndim == 3:
            picture = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY).astype(np.uint8, copy=False)
        elif self._colour and picture.ndim == 2 and self.fuser.chroma != "none":
            picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR).astype(np.uint8, copy=False)
        return picture


class _Clock:
    """Adds the time since the last lap to a stage."""

    def __init__(self, stages: dict[str, float]):
        self._stages = stages
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._stages[stage] = self._stages.get(stage, 0.0) + now - self._last
        self._last = now


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    if image.shape[:2] == size:
        return image
    shrinks = image.shape[0] > height
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _to_8_bits(image: np.ndarray | None) -> NDArray[np.uint8]:
    assert image is not None
    if image.dtype == np.uint8:
        return image
    return cv2.convertScaleAbs(image, alpha=255 / 65535).astype(np.uint8, copy=False)
