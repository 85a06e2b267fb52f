"""TensorRT's errors as one line for people."""

from __future__ import annotations

import re

MOST_ERRORS = 3  # that a message repeats: what follows the first is its consequence

# What TensorRT puts around a message: "[optimizer.cpp::computeCosts::3728] Error Code 10: Internal Error (message)" or
# "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (message In computeCosts at /src/optimizer.cpp:9)".
_DECORATIONS = (
    (r"^(\[[^\]]*:[^\]]*\]|\w+::\w+:)\s*", ""),
    (r"^Error Code \d+: [\w /]+ \((.*)\)\.?$", r"\1"),
    (r"\.?\s*In \w+ at \S+$", ""),
)


def explain(errors: list[str]) -> str:
    """TensorRT's errors as one line for people: without places in its sources, with what to do where that is known."""
    shown: list[str] = []
    for error in errors:
        text = " ".join(error.split())
        for pattern, replacement in _DECORATIONS:
            text = re.sub(pattern, replacement, text)
        if text and text not in shown:
            shown.append(text)
    line = "; ".join(shown[:MOST_ERRORS]) or "it gave no reason"
    if re.search(r"out ?of ?memory|insufficient memory|workspace|could not find any implementation", line, re.I):
        line += " -> free GPU memory, raise --workspace, or build for a smaller --max-size"
    return line
