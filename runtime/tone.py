"""Tone of thermal streams: raw counts become brightness by a fixed range or by one that follows the scene slowly.

No rule takes each frame's own minimum and maximum: a hot engine that drives by would darken everything else, and the
picture would flicker.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from runtime.color import TONE_PERCENTILES, Tone, is_grey, parse_tone
from runtime.errors import InputError

RULES = ("percentile", "clahe", "full")
TIME_CONSTANT = 1.0  # seconds in which the limits go 63 % of the way to the scene's
SMALLEST_SPAN = 64.0  # counts: of a scene without contrast the noise is not stretched further
_LONGEST_GAP = 5.0  # seconds without a picture after which the limits are taken anew
_SUBSAMPLING = 4  # every 4th row and column is looked at
_FULL = 65535.0


class StreamTone:
    """Maps 16-bit grey pictures of one camera to the full 16 bits; others pass, but for "clahe".

    Args:
        rule: "percentile": percentiles 1 and 99, smoothed over a second. "clahe": the same, then the contrast of each
            part of the picture is raised (contrast-limited adaptive histogram equalisation), 8-bit grey pictures
            included. "full": the counts as they are. "LOW:HIGH" or (low, high): these counts become black and white.

    Attributes:
        rule: the rule, parsed.

    Raises:
        InputError: an unknown rule, or an empty range.
    """

    def __init__(self, rule: Tone = "percentile"):
        if rule != "clahe" and rule not in RULES:
            try:
                rule = parse_tone(rule)
            except InputError:
                raise InputError(f"tone '{rule}' is not understood; give {', '.join(RULES)} or LOW:HIGH") from None
        self.rule = rule
        self._limits: tuple[float, float] | None = None
        self._time = 0.0
        self._clahe = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(8, 8)) if rule == "clahe" else None

    def __call__(self, image: np.ndarray, time: float) -> np.ndarray:
        """Brightness of a picture.

        Args:
            image: HxW or HxWx3 (BGR), uint8 or uint16.
            time: of capture, in seconds; a picture is given once, in order.

        Returns:
            HxW uint16 for 16-bit grey ones, HxW uint8 after "clahe"; any other is given back as it is.
        """
        if self.rule == "full":
            return image
        is_counts = image.dtype == np.uint16
        if not (is_counts or self._clahe) or not is_grey(image):
            return image
        grey = image if image.ndim == 2 else np.ascontiguousarray(image[..., 0])
        if is_counts:
            low, high = self.rule if isinstance(self.rule, tuple) else self._follow(grey, time)
            scale = _FULL / (high - low)
            grey = cv2.addWeighted(grey, scale, grey, 0, -low * scale, dtype=cv2.CV_16U)  # rounds and saturates
        if self._clahe is None:
            return grey
        # Equalising 16 bits takes twenty times as long as 8.
        return self._clahe.apply(cv2.convertScaleAbs(grey, alpha=255 / _FULL) if is_counts else grey)

    def _follow(self, counts: np.ndarray, time: float) -> tuple[float, float]:
        """Limits that go towards the picture's percentiles, at a pace that doesn't depend on the camera's rate."""
        low, high = (float(limit) for limit in np.percentile(counts[::_SUBSAMPLING, ::_SUBSAMPLING], TONE_PERCENTILES))
        missing = SMALLEST_SPAN - (high - low)
        if missing > 0:
            low, high = low - missing / 2, high + missing / 2
        step = time - self._time
        if self._limits is not None and 0 <= step <= _LONGEST_GAP:
            share = 1 - math.exp(-step / TIME_CONSTANT)
            old_low, old_span = self._limits[0], self._limits[1] - self._limits[0]
            # The span by its logarithm: something ten times as warm as all else must not darken it in one frame.
            span = old_span * ((high - low) / old_span) ** share
            low = old_low + share * (low - old_low)
            high = low + span
        self._limits, self._time = (low, high), time
        return low, high
