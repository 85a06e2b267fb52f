"""The plot of a benchmark: a bar for each case, made of its stages, with the 99th percentile as a tick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.bench import END_TO_END, STAGES
from runtime.images import write_image

# BGR
GROUND, TEXT, QUIET, GRID = (255, 255, 255), (40, 34, 30), (130, 120, 112), (232, 228, 224)
COLOURS = (
    (180, 168, 158), (222, 178, 120), (120, 190, 240), (110, 200, 160), (60, 110, 232), (196, 124, 150), (150, 150, 90),
)  # fmt: skip
_SCALE = 2  # drawn larger and made smaller, which smooths letters
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_WIDTH, _ROW, _TOP, _BOTTOM, _LEFT, _RIGHT = 1200, 58, 96, 58, 24, 160


def write_plot(path: str | Path, report: dict[str, Any]) -> None:
    """Draw a report of `runtime.bench_report.make_report` and write it as PNG, or what the suffix names.

    Raises:
        InputError: it can't be written.
    """
    write_image(path, draw(report))


def draw(report: dict[str, Any]) -> NDArray[np.uint8]:
    """The plot: H x 1200 x 3 uint8 (BGR)."""
    results = [result for result in report["results"] if "error" not in result]
    height = _TOP + _ROW * len(results) + _BOTTOM
    canvas = _Canvas(height)
    longest = max(max(result["stages"][END_TO_END]["p99"], _sum_of_medians(result)) for result in results)
    step = _nice_step(longest)
    pixels_per_ms = (_WIDTH - _LEFT - _RIGHT) / longest
    machine = report["machine"]
    canvas.text(f"median latency of each stage, ms   -   {machine['cpu']}, {machine['cores']} cores", (_LEFT, 34), 0.5)
    _draw_legend(canvas)
    bottom = height - _BOTTOM + 6
    for number in range(int(longest / step) + 1):
        x = _LEFT + number * step * pixels_per_ms
        canvas.box((x, _TOP - 8), (x + 1, bottom), GRID)
        canvas.text(f"{number * step:g}", (x, bottom + 22), 0.42, QUIET)
    for number, result in enumerate(results):
        _draw_case(canvas, result, _TOP + number * _ROW, pixels_per_ms)
    canvas.text("the tick is the 99th percentile from end to end", (_LEFT, height - 10), 0.42, QUIET)
    return canvas.picture()


def _draw_legend(canvas: _Canvas) -> None:
    x = float(_LEFT)
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        canvas.box((x, 54), (x + 12, 66), colour)
        canvas.text(stage, (x + 18, 65), 0.45)
        x += 18 + canvas.text_width(stage, 0.45) + 22


def _draw_case(canvas: _Canvas, result: dict[str, Any], y: float, pixels_per_ms: float) -> None:
    name = f"{result['model']}, {result['backend']}, {result['precision']}, {result['size']}"
    canvas.text(name, (_LEFT, y + 12), 0.45)
    x = float(_LEFT)
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        end = x + result["stages"][stage]["p50"] * pixels_per_ms
        canvas.box((x, y + 20), (end, y + 40), colour)
        x = end
    whole = result["stages"][END_TO_END]
    tick = _LEFT + whole["p99"] * pixels_per_ms
    canvas.text(f"{whole['p50']:.1f} ms, {result['fps']:.1f}/s", (max(x, tick) + 10, y + 35), 0.42)
    canvas.box((tick - 1, y + 17), (tick + 1, y + 43), TEXT)


def _sum_of_medians(result: dict[str, Any]) -> float:
    return sum(result["stages"][stage]["p50"] for stage in STAGES)


def _nice_step(longest: float) -> float:
    """A round distance between grid lines, of which four to ten fit."""
    size = 10 ** np.floor(np.log10(longest / 4))
    return float(max(factor * size for factor in (1, 2, 5) if factor * size <= longest / 4))


class _Canvas:
    """A picture in coordinates of the finished plot."""

    def __init__(self, height: int):
        self._pixels = np.full((height * _SCALE, _WIDTH * _SCALE, 3), GROUND, np.uint8)

    def box(self, start: tuple[float, float], end: tuple[float, float], colour: tuple[int, int, int]) -> None:
        corners = [(round(x * _SCALE), round(y * _SCALE)) for x, y in (start, end)]
        cv2.rectangle(self._pixels, corners[0], (corners[1][0] - 1, corners[1][1] - 1), colour, cv2.FILLED)

    def text(self, text: str, at: tuple[float, float], size: float, colour: tuple[int, int, int] = TEXT) -> None:
        """Text whose line begins at a point."""
        place = round(at[0] * _SCALE), round(at[1] * _SCALE)
        cv2.putText(self._pixels, text, place, _FONT, size * _SCALE, colour, 1, cv2.LINE_AA)

    def text_width(self, text: str, size: float) -> float:
        return cv2.getTextSize(text, _FONT, size * _SCALE, 1)[0][0] / _SCALE

    def picture(self) -> NDArray[np.uint8]:
        height = self._pixels.shape[0] // _SCALE
        return cv2.resize(self._pixels, (_WIDTH, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
