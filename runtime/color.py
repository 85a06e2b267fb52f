"""Colour, value range and tone: how camera images become the network's input and its output becomes a picture.

Images are in OpenCV order: HxW grey or HxWx3 BGR, uint8 or uint16. The network works on luma alone, HxW float32 in
[0, 1]. Luma and chroma are full-range BT.601 as in OpenCV's YCrCb, computed in float and not rounded. Chroma here is
centred: HxWx2 float32, (Cr, Cb), 0 where there is no colour, in the units of luma (about -0.5 to 0.5).
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

FloatImage = NDArray[np.float32]
# "full": the whole 0..65535; "percentile": percentiles 1 and 99 of each image; or a fixed (low, high).
Tone = str | tuple[float, float]

CHROMA_POLICIES = ("auto", "a", "b", "mix", "official", "none")
RANGE_POLICIES = ("stretch", "keep", "smooth")
TONE_PERCENTILES = (1.0, 99.0)

# OpenCV's zero of the chroma of float images.
_CV_NEUTRAL = 0.5


def check_image(image: np.ndarray, name: str = "image") -> None:
    """Raise InputError, naming the image, unless it is a non-empty HxW or HxWx3 array of uint8 or uint16."""
    if not isinstance(image, np.ndarray):
        raise InputError(f"{name} is a {type(image).__name__}, not a NumPy array (HxW or HxWx3, uint8 or uint16)")
    if image.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{name} holds {image.dtype} values; give uint8 or uint16")
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise InputError(f"{name} has shape {image.shape}; give HxW (grey) or HxWx3 (BGR)")
    if image.size == 0:
        raise InputError(f"{name} is empty: its shape is {image.shape}")


def is_grey(image: np.ndarray) -> bool:
    """Whether an image shows no colour: one channel, or three that are equal everywhere."""
    if image.ndim == 2:
        return True
    blue = image[..., 0]
    # Most coloured images differ within a few rows, which spares looking at the whole.
    rows = image[::16]
    if not (np.array_equal(rows[..., 0], rows[..., 1]) and np.array_equal(rows[..., 0], rows[..., 2])):
        return False
    return np.array_equal(blue, image[..., 1]) and np.array_equal(blue, image[..., 2])


def _full_scale(image: np.ndarray) -> float:
    return 255.0 if image.dtype == np.uint8 else 65535.0


def luma(image: np.ndarray) -> FloatImage:
    """Luma of an image: HxW float32 in [0, 1]; uint8 is divided by 255, uint16 by 65535.

    Args:
        image: HxW or HxWx3 (BGR), uint8 or uint16.

    Raises:
        InputError: another dtype or shape.
    """
    check_image(image)
    values: FloatImage = image.astype(np.float32)
    if values.ndim == 3:
        values = cv2.cvtColor(values, cv2.COLOR_BGR2GRAY).astype(np.float32, copy=False)
    values /= np.float32(_full_scale(image))
    return values


def chroma(image: np.ndarray) -> FloatImage:
    """Chroma (Cr, Cb) of an image: HxWx2 float32, centred on 0, in units of the full scale; 0 for a grey image.

    Args:
        image: HxW or HxWx3 (BGR), uint8 or uint16.

    Raises:
        InputError: another dtype or shape.
    """
    check_image(image)
    if image.ndim == 2:
        return np.zeros((*image.shape, 2), np.float32)
    values = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_BGR2YCrCb)[..., 1:] - np.float32(_CV_NEUTRAL)
    values /= np.float32(_full_scale(image))
    return values


def mix_chroma(c1: FloatImage, c2: FloatImage) -> FloatImage:
    """Mean of two centred chromas, each weighted by its own strength: (c1 |c1| + c2 |c2|) / (|c1| + |c2|).

    With C = c + t and t the neutral value this is C = (C1 |C1 - t| + C2 |C2 - t|) / (|C1 - t| + |C2 - t|), and neutral
    where both are.
    """
    s1, s2 = np.abs(c1), np.abs(c2)
    return (c1 * s1 + c2 * s2) / np.maximum(s1 + s2, np.float32(1e-6))


def official_mix_chroma(c1: FloatImage, c2: FloatImage) -> FloatImage:
    """The same mean exactly as in the authors' code, with values on the 0..255 scale, t = 0.5 and 1e-4 in the divisor.

    Their t is the neutral value of OpenCV's float images, so that it differs from `mix_chroma` by less than one grey
    level: where both sources are neutral it gives 0 in place of 0.5.
    """
    t = np.float32(_CV_NEUTRAL)
    full_1, full_2 = c1 * np.float32(255) + t, c2 * np.float32(255) + t
    s1, s2 = np.abs(full_1 - t), np.abs(full_2 - t)
    full = (full_1 * s1 + full_2 * s2) / (s1 + s2 + np.float32(1e-4))
    return (full - t) / np.float32(255)


def fused_chroma(a: np.ndarray, b: np.ndarray, policy: str = "auto") -> FloatImage | None:
    """Chroma of the fused picture, or None where it is grey.

    Args:
        a: source, HxW or HxWx3 (BGR), uint8 or uint16.
        b: the other source, of the same height and width.
        policy: "auto": the coloured source's chroma, or `mix` where both are coloured. "a", "b": that source's.
            "mix": the strength-weighted mean (`mix_chroma`). "official": as "auto", with the authors' own arithmetic.
            "none": a grey picture.

    Raises:
        InputError: unknown policy, or an image of another dtype or shape.
    """
    check_chroma_policy(policy)
    if policy == "none":
        return None
    grey_a, grey_b = is_grey(a), is_grey(b)
    if grey_a and grey_b:
        return None
    if policy in ("a", "b"):
        source, grey = (a, grey_a) if policy == "a" else (b, grey_b)
        return None if grey else chroma(source)
    if grey_a or grey_b:
        return chroma(b if grey_a else a)
    mix = official_mix_chroma if policy == "official" else mix_chroma
    return mix(chroma(a), chroma(b))


def check_chroma_policy(policy: str) -> None:
    """Raise InputError unless the policy is one of CHROMA_POLICIES."""
    if policy not in CHROMA_POLICIES:
        raise InputError(f"unknown chroma policy '{policy}'; choose from {', '.join(CHROMA_POLICIES)}")


def compose(luma: FloatImage, chroma: FloatImage | None) -> NDArray[np.uint8]:
    """Picture of a luma and a chroma: HxWx3 uint8 (BGR), or HxW uint8 where chroma is None.

    Args:
        luma: HxW float32; 0..1 becomes 0..255, rounded, and what lies outside is clipped.
        chroma: HxWx2 float32, centred (see `chroma`), or None.
    """
    scaled = luma * np.float32(255)
    if chroma is not None:
        ycrcb = np.empty((*luma.shape, 3), np.float32)
        cv2.mixChannels([scaled, chroma * np.float32(255) + np.float32(_CV_NEUTRAL)], [ycrcb], [0, 0, 1, 1, 2, 2])
        scaled = cv2.cvtColor(ycrcb, cv2.COLOR_YCrCb2BGR).astype(np.float32, copy=False)
    # One pass that rounds and saturates; clip, rint and astype take twenty times as long.
    return cv2.addWeighted(scaled, 1, scaled, 0, 0, dtype=cv2.CV_8U).astype(np.uint8, copy=False)


def stretch(luma: FloatImage, low: float, high: float) -> FloatImage:
    """Map low..high to 0..1 and clip. An image without contrast (high <= low) stays as it is."""
    if high <= low:
        return np.clip(luma, 0, 1)
    return np.clip((luma - np.float32(low)) / np.float32(high - low), 0, 1)


class SmoothRange:
    """Minimum and maximum of a stream's frames, smoothed over time so that the stretched picture doesn't flicker.

    The first frame counts in full; afterwards each frame moves both limits by the share `rate` of the way.
    """

    def __init__(self, rate: float = 0.1):
        if not 0 < rate <= 1:
            raise InputError(f"the smoothing rate is {rate}; give a number above 0 and up to 1")
        self.rate = rate
        self.limits: tuple[float, float] | None = None

    def update(self, low: float, high: float) -> tuple[float, float]:
        """Take the limits of the next frame; returns the smoothed ones."""
        if self.limits is None:
            self.limits = (low, high)
        else:
            old_low, old_high = self.limits
            self.limits = (old_low + self.rate * (low - old_low), old_high + self.rate * (high - old_high))
        return self.limits


def tone_map(image16: np.ndarray, low: float, high: float) -> FloatImage:
    """Map the counts low..high of a 16-bit image to 0..1, clipped: HxW uint16 -> HxW float32.

    Raises:
        InputError: low is not below high.
    """
    if not low < high:
        raise InputError(f"tone range {low:g}:{high:g} is empty; give LOW:HIGH with LOW below HIGH")
    return stretch(image16.astype(np.float32), low, high)


def apply_tone(image: np.ndarray, tone: Tone = "full") -> FloatImage:
    """Luma of a source, a 16-bit grey one by the named tone rule: HxW float32 in [0, 1].

    The rule is for raw thermal frames, that is for 16-bit grey images; 8-bit and 16-bit coloured ones are divided by
    their full scale whatever it says. "full" divides by 65535, which leaves the frames of a 14-bit camera at a quarter
    of the brightness or darker: give (0, 16383), the range of the scene, or "percentile" for those.

    Args:
        image: HxW or HxWx3 (BGR), uint8 or uint16.
        tone: "full", "percentile" (percentiles 1 and 99 of this image, so that brightness changes from frame to
            frame), or (low, high) in counts.

    Raises:
        InputError: an unknown or empty tone, or an image of another dtype or shape.
    """
    check_image(image)
    if image.dtype != np.uint16 or not is_grey(image) or tone == "full":
        return luma(image)
    counts = image if image.ndim == 2 else image[..., 0]
    if isinstance(tone, tuple):
        return tone_map(counts, *tone)
    if tone != "percentile":
        raise InputError(f"unknown tone '{tone}'; choose full, percentile or LOW:HIGH")
    low, high = np.percentile(counts, TONE_PERCENTILES)
    # Where nearly all pixels are equal the percentiles can coincide: the range then begins there.
    return tone_map(counts, float(low), max(float(high), float(low) + 1))


def parse_tone(tone: Tone) -> Tone:
    """Read "full", "percentile" or "LOW:HIGH" (counts of a 16-bit image), or check (low, high).

    Raises:
        InputError: anything else.
    """
    if tone in ("full", "percentile"):
        return tone
    try:
        low, high = (float(part) for part in (tone.split(":") if isinstance(tone, str) else tone))
    except (TypeError, ValueError):
        raise InputError(f"tone '{tone}' is not understood; give full, percentile or LOW:HIGH, as in 0:16383") from None
    if not 0 <= low < high <= 65535:
        raise InputError(f"tone range {low:g}:{high:g} must rise within 0:65535")
    return low, high
