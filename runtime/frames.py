"""What travels through a stream: a camera's picture with its time, and the fused picture with where it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # so that a command line's --help doesn't wait for NumPy
    import numpy as np
    from numpy.typing import NDArray

# How the time of capture is known. "device": the camera or driver stamped it. "ntp": the sender's wall clock, from
# RTCP sender reports. "arrival": nobody stamped it, so it is when the picture arrived here, delays included.
# "file": the place in a recording, laid on the clock of its playback.
Clock = Literal["device", "ntp", "arrival", "file"]

# "fused": both pictures. "held": both, though they are further apart than max_skew_ms, since no nearer one was there.
# "a_missing", "b_missing": that camera is away and the other one's picture passes through.
State = Literal["fused", "held", "a_missing", "b_missing"]


@dataclass(slots=True)
class Frame:
    """One picture of one camera.

    Attributes:
        image: HxW or HxWx3 (BGR), uint8 or uint16 (thermal counts as they came). Not to be written to.
        time: when it was captured, in seconds of the common clock: Unix time, after the configured offset.
        clock: how `time` is known.
        arrival: `time.monotonic()` when it arrived here, in seconds.
        index: number of the picture since the source was opened, drops included.
        source: name of the source, without user and password.
    """

    image: np.ndarray
    time: float
    clock: Clock
    arrival: float
    index: int
    source: str


@dataclass(slots=True)
class FusedFrame:
    """One picture that leaves the stream.

    Attributes:
        image: HxW or HxWx3 (BGR) uint8: fused, or the one picture there is. Not to be written to.
        a: thermal (or the task's first) picture that went in, as it came from the camera, or None.
        b: visible (or the task's second) picture that went in, or None.
        state: what the picture is made of, see `State`.
        skew_ms: time of a minus time of b, by their own stamps, in ms; 0 where one is missing. It tells nothing of a
            clock offset that nobody configured.
        age_ms: from the capture of the master picture to now, in ms, as its clock tells it.
        reused: the thermal picture was in an earlier output already.
        time: time of the master picture (b where there is one), in seconds of the common clock.
        index: number of this output, from 0.
        stages: "wait" (from arrival until it was this picture's turn), "pair", "tone", "register", "fuse", "convert",
            "sink" -> seconds that each took.
    """

    image: NDArray[np.uint8]
    a: Frame | None
    b: Frame | None
    state: State
    skew_ms: float
    age_ms: float
    reused: bool
    time: float
    index: int
    stages: dict[str, float] = field(default_factory=dict)
