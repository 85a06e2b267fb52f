"""Speed beside quality: full, lite and fusion without learning, on one machine in one run.

    python -m benchmarks.speed_quality [--task ivif] [--data DIR] [--threads 2] [--out docs/speed_quality.png]

Speed: 640x480, the methods in turn, five frames each, so that what else the machine does strikes all alike. "network"
is luma in and luma out, "picture" two camera pictures in and a coloured one out, "end to end" two JPEG files' bytes
in and a coloured picture out. Quality: Qabf, VIF, SSIM (TDFusion convention) on the pairs below --data, or on frames
of the generated night road where none is given; fused pictures are stretched to their own range, those of the
baselines are not, as they use the range of the sources.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from benchmarks.baselines import BASELINES
from refusion.evaluate import Scene, Table, evaluate_pairs, find_scenes
from runtime import Fuser
from runtime.color import compose, fused_chroma, luma
from runtime.images import write_image
from runtime.panel import side_by_side
from runtime.scenes import night_road

SIZE = (480, 640)
FRAMES = 5  # of one method in a row
METRICS = ("Qabf", "VIF", "SSIM")
STAGES = ("network", "picture", "end to end")
GENERATED = (0, 40, 80, 120)  # frames of the night road

Fuse = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass
class Method:
    """One way to fuse: of luma, and of pictures; and what was measured."""

    luma: Fuse
    picture: Fuse
    seconds: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})

    def fps(self, stage: str) -> float:
        return 1 / statistics.median(self.seconds[stage])


def _baseline(fuse: Fuse) -> Method:
    def picture(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return compose(fuse(luma(a), luma(b)).astype(np.float32), fused_chroma(a, b))

    return Method(fuse, picture)


def _methods(task: str, threads: int) -> dict[str, Method]:
    methods = {}
    for size in ("lite", "full"):
        fuser = Fuser(task, model=size, threads=threads, warm_size=SIZE)
        methods[size] = Method(fuser.fuse_luma, fuser)
    return methods | {name: _baseline(fuse) for name, fuse in BASELINES.items()}


def _measure_speed(methods: dict[str, Method], rounds: int) -> None:
    a, b = night_road(size=SIZE)
    luma_a, luma_b = luma(a), luma(b)
    files = [cv2.imencode(".jpg", image)[1] for image in (a, b)]

    def decoded(file: np.ndarray) -> np.ndarray:
        image = cv2.imdecode(file, cv2.IMREAD_UNCHANGED)
        assert image is not None
        return image

    def end_to_end(method: Method) -> None:
        method.picture(decoded(files[0]), decoded(files[1]))

    for turn in tqdm(range(rounds + 1), "speed", unit="round", leave=False):
        for method in methods.values():
            runs: tuple[Callable[[], object], ...] = (
                partial(method.luma, luma_a, luma_b),
                partial(method.picture, a, b),
                partial(end_to_end, method),
            )
            for stage, run in zip(STAGES, runs, strict=True):
                run()  # as a stream would find it: the caches hold this method's data, not the last one's
                times = [_seconds(run) for _ in range(FRAMES)]
                if turn:  # the first round warms up
                    method.seconds[stage].append(statistics.median(times))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _measure_quality(methods: dict[str, Method], data: str | None, limit: int | None) -> Table:
    fuses = {name: method.picture for name, method in methods.items()}
    if data:
        return evaluate_pairs(find_scenes(data, fuses, limit), "tdfusion", METRICS, progress=True)
    with tempfile.TemporaryDirectory() as folder:
        scenes = []
        for frame in GENERATED:
            a, b = (Path(folder) / f"{name}{frame}.png" for name in "ab")
            for path, picture in zip((a, b), night_road(frame), strict=True):
                write_image(path, picture)
            scenes.append(Scene("night road", str(frame), a, b, fuses))
        return evaluate_pairs(scenes, "tdfusion", METRICS, progress=True)


def _text(methods: dict[str, Method], quality: Table) -> str:
    lines = [
        f"{'':18}" + "".join(f"{stage + ', frames/s':>32}" for stage in STAGES) + "".join(f"{m:>8}" for m in METRICS)
    ]
    for name, method in methods.items():
        cells = ""
        for stage in STAGES:
            fps = sorted(1 / s for s in method.seconds[stage])
            cells += f"{f'{method.fps(stage):.1f} ({fps[0]:.1f} - {fps[-1]:.1f})':>32}"
        lines.append(f"{name:18}{cells}" + "".join(f"{quality.total(name)[m]:8.3f}" for m in METRICS))
    ratio = statistics.median(
        full / lite
        for full, lite in zip(methods["full"].seconds["network"], methods["lite"].seconds["network"], strict=True)
    )
    shares = ", ".join(f"{m} {quality.total('lite')[m] / quality.total('full')[m]:.1%}" for m in METRICS)
    return "\n".join([*lines, f"lite is {ratio:.0f} times as fast as full and has of its {shares}"])


def _picture(methods: dict[str, Method], quality: Table, scene: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    a, b = scene
    pictures = {"infrared": a, "visible": b}
    for name, method in methods.items():
        fps, qabf = method.fps("picture"), quality.total(name)["Qabf"]
        pictures[f"{name}: {fps:.3g} frames/s, Qabf {qabf:.3f}"] = method.picture(a, b)
    captions = list(pictures)
    if len(captions) % 2:
        captions.append("")
        pictures[""] = np.zeros_like(b)
    columns = (len(captions) + 1) // 2
    rows = [side_by_side({c: pictures[c] for c in captions[i : i + columns]}) for i in (0, columns)]
    return np.vstack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="ivif")
    parser.add_argument("--data", help="folder with pairs in a/ and b/, or with such folders below it")
    parser.add_argument("--limit", type=int, help="pairs of each source folder (default: all)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/speed_quality.png"), help="the picture")
    args = parser.parse_args()
    cv2.setNumThreads(args.threads)
    methods = _methods(args.task, args.threads)
    _measure_speed(methods, args.rounds)
    quality = _measure_quality(methods, args.data, args.limit)
    height, width = SIZE
    pairs = len({(row.source, row.stem) for row in quality.rows})
    print(
        f"{width}x{height}, {args.threads} threads, {args.rounds} rounds: median (min - max); quality on {pairs} pairs"
    )
    print(_text(methods, quality))
    write_image(args.out, _picture(methods, quality, night_road()))
    print(args.out)


if __name__ == "__main__":
    main()
