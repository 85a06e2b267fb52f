"""Latency of fusing, stage by stage: models x backends x sizes, each in a process of its own.

A case goes from two compressed pictures on the disk to a compressed fused one, one pair after the other:

| stage | what it does |
|---|---|
| read | both files, from the system's cache |
| decode | JPEG to pixels |
| register | one warp of the thermal picture |
| tone | both pictures to the network's input |
| network | the model alone |
| colour | range, chroma, 8 bits; nothing for models that have it in their graph |
| sink | the fused picture to JPEG |

`python -m runtime.bench` is the process of one case: it reads the case from its input and writes lines of JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.backends import choose_backend, load_backend, runs_on_gpu
from runtime.calibration import Calibration
from runtime.camera import Camera
from runtime.color import apply_tone, chroma, compose, fused_chroma, is_grey, stretch
from runtime.errors import InputError
from runtime.model_files import SUFFIXES, find_model
from runtime.register import Registration
from runtime.scenes import night_road

STAGES = ("read", "decode", "register", "tone", "network", "colour", "sink")
END_TO_END = "end to end"
PERCENTILES = (50, 90, 95, 99)
PAIRS = 4  # different pictures that take turns
WARM_UP = 10  # pairs before the measurement, fewer where they take long
WARM_UP_SECONDS = 10.0
ROUNDS = 5  # parts of a measurement, whose medians tell how steady it was
FEWEST = 2 * ROUNDS  # pairs that are measured however long they take


@dataclass(frozen=True)
class Case:
    """One combination.

    Attributes:
        model: task, name of an embedded model or path, as `runtime.Fuser` takes it.
        backend: one of `runtime.backends.BACKENDS`.
        width, height: of both pictures.
        threads: CPU threads of one frame; None takes every core.
        iterations: pairs to measure.
        seconds: after which the measurement ends, though with no fewer than FEWEST pairs.
    """

    model: str
    backend: str
    width: int
    height: int
    threads: int | None = None
    iterations: int = 200
    seconds: float = 60.0

    @property
    def label(self) -> str:
        return f"{Path(self.model).stem}, {self.backend}, {self.width}x{self.height}"


def check_cases(cases: Sequence[Case]) -> None:
    """Raise InputError for what can be told to be wrong before anything is measured."""
    for case in cases:
        if min(case.width, case.height) < 32:
            raise InputError(f"size {case.width}x{case.height} is too small to measure; give at least 32x32")
        if case.iterations < FEWEST:
            raise InputError(f"iterations is {case.iterations}; give {FEWEST} or more")
        if not case.seconds > 0:
            raise InputError(f"seconds is {case.seconds:g}; give more than 0")
        path = Path(case.model) if Path(case.model).suffix in SUFFIXES else None
        backend, _ = choose_backend(case.backend, path)
        path, _ = find_model(case.model, live=False, gpu=runs_on_gpu(backend))
        if not path.is_file():
            raise InputError(f"model {path} is missing; give a task or a path to an .onnx or .engine file")


class Pipeline:
    """The stages of one case, with what they need.

    Args:
        case: what to measure.
        folder: takes the pictures.

    Attributes:
        backend: what runs the model.
        backend_name: its name, where the case says "auto".
        path: of the model.

    Raises:
        InputError: a model or backend that isn't there.
    """

    def __init__(self, case: Case, folder: Path):
        named = Path(case.model) if Path(case.model).suffix in SUFFIXES else None
        self.backend_name, _ = choose_backend(case.backend, named)
        self.path, _ = find_model(case.model, live=False, gpu=runs_on_gpu(self.backend_name))
        self.backend = load_backend(self.path, self.backend_name, case.threads)
        self._bgr = self.backend.metadata.get("io") == "bgr"
        size = (case.height, case.width)
        if any(fixed not in (None, side) for fixed, side in zip(self.backend.size, size, strict=True)):
            built = f"{self.backend.size[1]}x{self.backend.size[0]}"
            raise InputError(f"model {self.path.stem} is built for {built}, not for {case.width}x{case.height}")
        self._files = _write_pictures(folder, size)
        self._register = Registration(_small_turn(size))
        self._number = 0

    def run(self) -> dict[str, float]:
        """Fuse the next pair; gives the seconds of each stage."""
        lap = _Laps()
        files = self._files[self._number % len(self._files)]
        self._number += 1
        data = [np.frombuffer(file.read_bytes(), np.uint8) for file in files]
        lap("read")
        a, b = (_decoded(encoded) for encoded in data)
        lap("decode")
        a, b = self._register(a, b)
        lap("register")
        fused = self.fuse(a, b, lap)
        cv2.imencode(".jpg", fused)
        lap("sink")
        return lap.seconds

    def fuse(self, a: np.ndarray, b: np.ndarray, lap: Callable[[str], None]) -> NDArray[np.uint8]:
        """What `runtime.Fuser` does with its default policies, stage by stage."""
        if self._bgr:
            inputs = [_as_bgr(image) for image in (a, b)]
            lap("tone")
            fused = self.backend.run(*inputs)[0]
            lap("network")
            lap("colour")
            return fused
        inputs = [np.ascontiguousarray(apply_tone(image)[None, None]) for image in (a, b)]
        lap("tone")
        luma = self.backend.run(*inputs)[0, 0]
        lap("network")
        picture = compose(stretch(luma, float(luma.min()), float(luma.max())), fused_chroma(a, b))
        lap("colour")
        return picture


class _Laps:
    """Seconds of each stage since the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now


def _decoded(encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
    assert image is not None  # we wrote it ourselves
    return image.astype(np.uint8, copy=False)


def _as_bgr(image: np.ndarray) -> NDArray[np.uint8]:
    """(1, H, W, 3) uint8."""
    if image.dtype != np.uint8:
        image = compose(apply_tone(image), None if is_grey(image) else chroma(image))
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    return np.ascontiguousarray(image[None], np.uint8)


def _write_pictures(folder: Path, size: tuple[int, int]) -> list[tuple[Path, Path]]:
    files = []
    for number in range(PAIRS):
        pair = folder / f"{number}_a.jpg", folder / f"{number}_b.jpg"
        for file, image in zip(pair, night_road(10 * number, size), strict=True):
            file.write_bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())
        files.append(pair)
    return files


def _small_turn(size: tuple[int, int]) -> Calibration:
    """A small turn and scale, as between the cameras of a calibrated pair."""
    height, width = size
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), 1.5, 1.02)
    return Calibration(Camera(size), Camera(size), np.vstack([turn, [0, 0, 1]]), "targetless")


def measure(case: Case, progress: Callable[[float], None]) -> dict[str, Any]:
    """Measure one case in this process.

    Args:
        case: what to measure.
        progress: called with the share that is done, 0 to 1.

    Returns:
        JSON values: the case and what it really ran, `stages` (name or "end to end" -> statistics in ms), `rounds_ms`
        (the same names -> median of each part), `fps`, `memory_mb` (this process at its largest, and before the
        first frame).
    """
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Pipeline(case, Path(folder))
        loaded = _peak_memory_mb()
        until = time.monotonic() + WARM_UP_SECONDS
        for number in range(WARM_UP):
            if number > 1 and time.monotonic() > until:
                break
            pipeline.run()
        laps: list[dict[str, float]] = []
        begin = time.monotonic()
        while len(laps) < case.iterations:
            spent = (time.monotonic() - begin) / case.seconds
            if len(laps) >= FEWEST and spent >= 1:
                break
            laps.append(pipeline.run())
            progress(max(len(laps) / case.iterations, min(spent, 1.0)))
    times = {stage: np.array([lap[stage] for lap in laps]) * 1000 for stage in STAGES}
    times[END_TO_END] = sum(times.values(), np.zeros(len(laps)))
    metadata = pipeline.backend.metadata
    return {
        "case": asdict(case),
        "model": pipeline.path.stem,
        "backend": pipeline.backend_name,
        "precision": metadata.get("precision", "unknown"),
        "size": f"{case.width}x{case.height}",
        "threads": pipeline.backend.threads,
        "iterations": len(laps),
        "stages": {name: statistics_of(values) for name, values in times.items()},
        "rounds_ms": {
            name: [round(float(np.median(part)), 4) for part in np.array_split(values, ROUNDS)]
            for name, values in times.items()
        },
        "fps": round(1000 / float(times[END_TO_END].mean()), 3),
        "memory_mb": {"loaded": loaded, "peak": _peak_memory_mb()},
    }


def statistics_of(values: NDArray[np.float64]) -> dict[str, float]:
    """Minimum, mean, maximum and PERCENTILES, to a ten-thousandth."""
    found = {"min": values.min(), "mean": values.mean(), "max": values.max()}
    found |= {f"p{p}": value for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}
    return {name: round(float(value), 4) for name, value in found.items()}


def _peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def run_cases(cases: Sequence[Case], progress: Callable[[str, float], None]) -> list[dict[str, Any]]:
    """Measure cases one after the other, each in a fresh process.

    Args:
        cases: what to measure.
        progress: called with the label of the case in work, and how many are done, with its share.

    Returns:
        For each case what `measure` gives; or its `case` and `error`, a line, where it can't run here.

    Raises:
        InputError: none of them runs.
    """
    check_cases(cases)
    results = []
    for number, case in enumerate(cases):
        progress(case.label, number)
        results.append(_run_case(case, number, progress))
    progress("done", len(cases))
    if all("error" in result for result in results):
        raise InputError(f"nothing could be measured: {results[0]['error']}")
    return results


def _run_case(case: Case, number: int, progress: Callable[[str, float], None]) -> dict[str, Any]:
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime.bench"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        with process.stdin as to_child:
            json.dump(asdict(case) | {"model": _absolute(case.model)}, to_child)
        result: dict[str, Any] = {}
        for line in _lines(process.stdout):
            if "progress" in line:
                progress(case.label, number + line["progress"])
            else:
                result = line
        code = process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    if not result:
        result = {"error": f"its process ended with code {code}"}
    return {**result, "case": asdict(case)}


def _absolute(model: str) -> str:
    """A path that means the same in another folder; names of tasks stay."""
    return str(Path(model).resolve()) if Path(model).suffix in SUFFIXES else model


def _lines(stream: Any) -> Iterator[dict[str, Any]]:
    for line in stream:
        yield json.loads(line)


def main() -> int:
    """The process of one case."""
    # What the libraries print must not get between the lines of JSON.
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    case = Case(**json.load(sys.stdin))
    shown = [0.0]

    def progress(share: float) -> None:
        if share - shown[0] >= 0.02:
            shown[0] = share
            answer({"progress": round(share, 3)})

    try:
        answer(measure(case, progress))
    except InputError as error:
        answer({"error": str(error)})
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
