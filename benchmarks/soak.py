"""The live loop for a long time on the generated scene: does anything grow, and what does the loop itself cost?

    python -m benchmarks.soak --duration 1800     # the real thing
    python -m benchmarks.soak --duration 60       # a quick look

Two cameras of 30 pictures a second. The overhead of a picture is everything that the loop does for it but the network:
pairing, tone, registration, colour, handing over to the sinks. With `--model average`, the default, there is no
network, and all that runtime.Fuser does around one counts; with another model its whole call is left out.
Memory is compared with what it was after the first minute, since the scene's pictures are drawn and kept within the
first 34 s; a run of less than two minutes does not judge it. The table ends with what must hold; the exit code is 1
where something doesn't.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time

import numpy as np
from tqdm import tqdm

from runtime.backends.onnxruntime import available_cores
from runtime.status import memory_mb
from runtime.stream import Stream
from runtime.stream_command import SWITCH_INTERVAL

CAMERA_FPS = 30
MEMORY_GROWTH = 20.0  # MB
OVERHEAD_P99 = 10.0  # ms
SETTLED = 60.0  # seconds
NOT_OVERHEAD = ("wait",)


class Watch:
    """What is looked at once a second, all of it in memory that was taken before."""

    def __init__(self, seconds: float):
        self._size = int(seconds * CAMERA_FPS * 1.2) + 1000
        self.overhead = np.full(self._size, np.nan)
        self.network = np.full(self._size, np.nan)
        self.frames = 0
        self.memory = np.full(int(seconds) + 60, np.nan)
        self.samples = 0
        self.threads_least, self.threads_most = 10**6, 0
        self.queues: dict[str, int] = {"a": 0, "b": 0}
        self.sinks = 0

    def frame(self, stages: dict[str, float], has_network: bool) -> None:
        if self.frames < self._size:
            network = stages["fuse"] if has_network else 0.0
            self.network[self.frames] = network
            self.overhead[self.frames] = sum(stages.values()) - network - sum(stages[name] for name in NOT_OVERHEAD)
        self.frames += 1

    def second(self, stream: Stream) -> None:
        status = stream.status()
        if self.samples < len(self.memory):
            self.memory[self.samples] = memory_mb()
            self.samples += 1
        count = threading.active_count()
        self.threads_least, self.threads_most = min(self.threads_least, count), max(self.threads_most, count)
        for side, source in status["sources"].items():
            self.queues[side] = max(self.queues[side], source["queued"])
        self.sinks = max([self.sinks, *(sink["queued"] for sink in status["sinks"])])


def percentiles(values: np.ndarray) -> str:
    values = 1000 * values[~np.isnan(values)]
    return (
        "  ".join(f"p{q:g} {np.percentile(values, q):6.2f}" for q in (50, 90, 99, 99.9))
        + f"  max {values.max():6.2f} ms"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--duration", type=float, default=1800, metavar="S")
    parser.add_argument("--size", default="640x480", metavar="WIDTHxHEIGHT")
    parser.add_argument("--model", default="average", help="average, lite, full or a path (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sink", action="append", metavar="URI", help="default: null://")
    args = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL)
    watch = Watch(args.duration)
    stream = Stream(
        f"demo://night?size={args.size}&fps={CAMERA_FPS}",
        model=args.model,
        threads=args.threads,
        sinks=args.sink or ["null://"],
        duration=args.duration,
    )
    has_network = args.model != "average"
    began, cpu = time.monotonic(), time.process_time()
    next_look = began + 1
    with stream, tqdm(total=round(args.duration), unit="s", disable=None) as bar:
        for fused in stream:
            watch.frame(fused.stages, has_network)
            if time.monotonic() >= next_look:
                next_look += 1
                watch.second(stream)
                bar.update(1)
        status = stream.status()
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    return report(args, watch, status, seconds, cpu)


def report(args: argparse.Namespace, watch: Watch, status: dict, seconds: float, cpu: float) -> int:
    is_long = args.duration >= 2 * SETTLED
    settled = int(SETTLED if is_long else args.duration / 2)
    memory = watch.memory[: watch.samples]
    growth = float(memory[settled:].max() - memory[settled]) if len(memory) > settled else float("nan")
    overhead = watch.overhead[: watch.frames]
    p99 = float(1000 * np.nanpercentile(overhead, 99))
    print(f"{args.size}, model {args.model}, {available_cores()} cores, {seconds:.0f} s")
    for side, source in status["sources"].items():
        print(f"camera {side}      {source['frames'] / seconds:6.2f} pictures/s, {source['dropped']} dropped")
    print(f"out           {watch.frames / seconds:6.2f} pictures/s: {status['states']}")
    print(f"overhead      {percentiles(overhead)}")
    if args.model != "average":
        print(f"fuser         {percentiles(watch.network[: watch.frames])}")
    for stage, values in status["stages_ms"].items():
        print(f"  {stage:11} p50 {values['p50']:6.2f}  p99 {values['p99']:6.2f} ms (of the last 512)")
    print(f"age           {status['age_ms']}")
    print(f"CPU           {100 * cpu / seconds:.0f} % of a core, drawing the scene included")
    print(f"memory        {memory[settled]:.1f} MB after {settled} s, {memory[-1]:.1f} MB at the end")
    judged = f"below {MEMORY_GROWTH:g}" if is_long else "too short a run to judge"
    checks = {
        f"memory grows by {growth:.1f} MB, {judged}": growth < MEMORY_GROWTH or not is_long,
        f"p99 of the overhead {p99:.2f} ms, below {OVERHEAD_P99:g}": p99 < OVERHEAD_P99,
        f"threads {watch.threads_least} to {watch.threads_most}, none lost and none added":
            watch.threads_least == watch.threads_most,
        f"at most {max(watch.queues.values())} pictures waited at a camera and {watch.sinks} at a sink":
            max(watch.queues.values()) <= 4 and watch.sinks <= 16,
    }  # fmt: skip
    for text, holds in checks.items():
        print(f"{'ok  ' if holds else 'FAIL'}  {text}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
