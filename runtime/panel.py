"""Pictures side by side under their captions."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.color import Tone, apply_tone, chroma, compose, is_grey

_FONT = cv2.FONT_HERSHEY_SIMPLEX
CAPTION_HEIGHT = 24  # pixels above each picture


def side_by_side(pictures: Mapping[str, np.ndarray], tone: Tone = "full") -> NDArray[np.uint8]:
    """Pictures of equal size in a row, each under its caption.

    Args:
        pictures: caption -> HxW or HxWx3 (BGR), uint8 or uint16; n of them.
        tone: brightness of 16-bit grey pictures, see `runtime.color.apply_tone`.

    Returns:
        (CAPTION_HEIGHT + H) x (n W) x 3 uint8 (BGR).
    """
    return np.hstack([_captioned(_displayed(picture, tone), caption) for caption, picture in pictures.items()])


def _displayed(picture: np.ndarray, tone: Tone) -> NDArray[np.uint8]:
    """HxWx3 uint8 of any picture; an 8-bit coloured one is left as it is."""
    if picture.dtype == np.uint8 and picture.ndim == 3:
        return picture
    shown = compose(apply_tone(picture, tone), None if is_grey(picture) else chroma(picture))
    return shown if shown.ndim == 3 else np.repeat(shown[..., None], 3, axis=2)


def _captioned(picture: NDArray[np.uint8], caption: str) -> NDArray[np.uint8]:
    width = picture.shape[1]
    (text_width, _), _ = cv2.getTextSize(caption, _FONT, 0.5, 1)
    scale = 0.5 * min(1.0, (width - 8) / max(text_width, 1)) if width > 8 else 0.1
    bar = np.zeros((CAPTION_HEIGHT, width, 3), np.uint8)
    cv2.putText(bar, caption, (4, CAPTION_HEIGHT - 7), _FONT, scale, (230, 230, 230), 1, cv2.LINE_AA)
    return np.vstack([bar, picture])
