"""A model against the float32 network in PyTorch that it was made from, picture by picture.

    python -m export.verify MODEL [MODEL ...] [--data DIR] [--fail-below DB]

A model of luma is compared in the network's output; one that makes the whole picture (io bgr) in the 8-bit picture that
runtime.Fuser makes of the reference. Fusion metrics are of the pictures, in the TDFusion convention.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tqdm import tqdm

from export.arguments import VERIFY, Parser, add_verify_arguments
from export.table import aligned
from refusion.allocator import keep_freed_memory
from refusion.evaluate import find_scenes
from refusion.metrics import MINIMUM_SIZE, evaluate, ssim
from runtime.backends import Backend, choose_backend, load_backend
from runtime.color import apply_tone, chroma, compose, fused_chroma, is_grey, stretch
from runtime.engine_key import version_numbers
from runtime.errors import InputError, exit_code
from runtime.files import write_whole
from runtime.scenes import night_road

if TYPE_CHECKING:
    from torch import nn

METRICS = ("Qabf", "VIF", "SSIM")
MOST_PSNR = 120.0  # dB: what is nearer differs in the last bits of float32 alone
GENERATED = 4  # scenes where there is no data
TONE = "percentile"  # of 16-bit grey pictures, as in training
# Before it QuantizeLinear cut the fraction of float16 values off in place of rounding them: 8 dB.
ROUNDS_FLOAT16 = (1, 30)

log = logging.getLogger("refusion")


class Pair(NamedTuple):
    """Two source pictures; read when they are needed."""

    name: str
    load: Callable[[], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Row:
    """How far a model is from its reference on one picture."""

    picture: str
    size: tuple[int, int]  # height, width that the model was given
    largest: float  # absolute error in grey levels (of 255)
    mean: float
    psnr: float  # dB, peak 255, up to MOST_PSNR
    ssim: float  # of the 8-bit pictures, with the reference's
    metrics: dict[str, float]  # of the model's picture
    reference: dict[str, float]


@dataclass(frozen=True)
class Report:
    """A model on all pictures."""

    model: str
    rows: list[Row]

    @property
    def largest(self) -> float:
        return max(row.largest for row in self.rows)

    @property
    def mean(self) -> float:
        return float(np.mean([row.mean for row in self.rows]))

    @property
    def psnr(self) -> float:
        """Mean over the pictures, dB."""
        return float(np.mean([row.psnr for row in self.rows]))

    @property
    def worst(self) -> float:
        return min(row.psnr for row in self.rows)

    @property
    def ssim(self) -> float:
        return float(np.mean([row.ssim for row in self.rows]))

    @property
    def changes(self) -> dict[str, float]:
        """Relative change of the mean of each fusion metric, in percent; none where pictures are too small for it."""
        means = {
            name: [float(np.mean([getattr(row, side)[name] for row in self.rows])) for side in ("metrics", "reference")]
            for name in METRICS
            if all(name in row.metrics for row in self.rows)
        }
        return {name: 100 * (ours / theirs - 1) for name, (ours, theirs) in means.items() if theirs}

    def text(self) -> str:
        """A line for each picture, then the total and the change of the fusion metrics' means."""
        head = ["picture", "max error", "mean error", "PSNR, dB", "SSIM", *METRICS]
        lines = [head, ["", "of 255", "of 255", "", "", *["" for _ in METRICS]]]
        for row in self.rows:
            metrics = [f"{row.metrics[name]:.4f}" if name in row.metrics else "-" for name in METRICS]
            lines.append([row.picture, *_numbers(row), *metrics])
        changes = [f"{self.changes[name]:+.2f} %" if name in self.changes else "-" for name in METRICS]
        lines.append([f"all {len(self.rows)}, change of metrics", *_numbers(self), *changes])
        return f"{self.model} against float32 in PyTorch (worst picture {self.worst:.1f} dB)\n{aligned(lines)}"

    def as_json(self) -> dict[str, object]:
        total = {"max_error": self.largest, "mean_error": self.mean, "psnr": self.psnr, "ssim": self.ssim}
        rows = [asdict(row) for row in self.rows]
        return {"model": self.model, "total": {**total, "change_percent": self.changes}, "rows": rows}


def _numbers(values: Row | Report) -> list[str]:
    return [f"{values.largest:.3f}", f"{values.mean:.4f}", f"{values.psnr:.1f}", f"{values.ssim:.5f}"]


def find_pairs(data: str | Path | None, limit: int | None = None, *, skip_bad: bool = False) -> list[Pair]:
    """What to verify on: the pairs below a folder, at most `limit` of each sub-folder, or generated scenes.

    Raises:
        InputError: no pairs, or a limit below 1.
    """
    if data is None:
        if limit is not None and limit < 1:
            raise InputError(f"a limit of {limit} pairs leaves nothing to verify on; give 1 or more")
        frames = range(min(limit or GENERATED, GENERATED))
        return [Pair(f"night road {i}", lambda i=i: night_road(frame=97 * i, seed=i)) for i in frames]  # type: ignore[misc]
    scenes = find_scenes(data, {}, limit, skip_bad=skip_bad)
    return [Pair(f"{s.source}/{s.stem}", lambda s=s: s.load()[:2]) for s in scenes]  # type: ignore[misc]


def load_reference(metadata: Mapping[str, str], reference: str | Path | None = None) -> nn.Module:
    """The float32 network of a model: that of the weights given, or the shipped one whose hash the metadata names.

    Raises:
        InputError: no such weights, or the model was made from others than are shipped.
    """
    from refusion.weights import SHIPPED, load_network

    if reference is not None:
        return load_network(reference)[0]
    wanted = metadata.get("weights_sha256", "")
    for path in sorted(SHIPPED.glob("*.safetensors")):
        if hashlib.sha256(path.read_bytes()).hexdigest() == wanted:
            return load_network(path)[0]
    raise InputError("the model was made from weights that are not shipped; name them with --reference")


def verify(
    models: Mapping[str, Backend],
    reference: nn.Module,
    pairs: Sequence[Pair],
    *,
    progress: bool = True,
) -> list[Report]:
    """Run models beside the float32 network; the reference runs once for models that take pictures of one size.

    Args:
        models: name -> loaded model. One that is fixed to a size, or an engine out of whose limits a picture is, gets
            pictures resized to what it takes, and so does the reference.
        reference: forward(a, b) of luma in float32, of `load_reference`.
        pairs: of `find_pairs`.
        progress: show a bar on a terminal.

    Raises:
        InputError: a picture that can't be read or fused.
    """
    rows: dict[str, list[Row]] = {name: [] for name in models}
    for pair in tqdm(pairs, "verifying", unit="pair", disable=None if progress else True):
        a, b = pair.load()
        expected: dict[tuple[int, int], NDArray[np.float32]] = {}
        for name, model in models.items():
            size = _size_for(model, a.shape[:2])
            x, y = _resize(a, size), _resize(b, size)
            if size not in expected:
                expected[size] = _run_reference(reference, apply_tone(x, TONE), apply_tone(y, TONE))
            rows[name].append(_compare(pair.name, model, x, y, expected[size]))
    return [Report(name, found) for name, found in rows.items()]


def _size_for(model: Backend, size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) nearest to a picture's that a model takes."""
    smallest = getattr(model, "smallest", (1, 1))
    largest = getattr(model, "largest", size)  # engines alone have limits
    height, width = (
        fixed or min(max(side, low), high)
        for fixed, side, low, high in zip(model.size, size, smallest, largest, strict=True)
    )
    return height, width


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)


def _run_reference(network: nn.Module, a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        return network(torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None])[0, 0].numpy()


def _compare(name: str, model: Backend, a: np.ndarray, b: np.ndarray, expected: NDArray[np.float32]) -> Row:
    if model.metadata.get("io") == "bgr":
        stretched = _stretch(expected) if model.metadata.get("range", "stretch") == "stretch" else expected
        picture = _colour(compose(stretched, fused_chroma(a, b)))
        output = _run(model, _frame(a), _frame(b))
        errors = output.astype(np.float32) - picture
        ours, theirs = _grey(output), _grey(picture)
    else:
        output = _run(model, *(apply_tone(x, TONE)[None] for x in (a, b)))[0]
        errors = (output - expected) * 255
        ours, theirs = (compose(_stretch(x), None) for x in (output, expected))
    squares = float(np.square(errors, dtype=np.float64).mean())
    psnr = min(float(10 * np.log10(255**2 / squares)), MOST_PSNR) if squares else MOST_PSNR
    sources = (_grey(a), _grey(b))
    metrics = [m for m in METRICS if min(ours.shape) >= MINIMUM_SIZE.get(m, 1)]
    return Row(
        name,
        (a.shape[0], a.shape[1]),
        float(np.abs(errors).max()),
        float(np.abs(errors).mean()),
        psnr,
        ssim(ours, theirs, theirs) if "SSIM" in metrics else float(np.array_equal(ours, theirs)),
        evaluate(ours, *sources, metrics=metrics) if metrics else {},
        evaluate(theirs, *sources, metrics=metrics) if metrics else {},
    )


def _run(model: Backend, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One picture, in a batch as large as the model takes. The others are mirrored: none may look into another."""
    batch = model.metadata.get("batch", "")
    others = int(batch) - 1 if batch.isdigit() else 0
    a, b = (np.stack([x, *[x[..., ::-1, :]] * others]) for x in (a, b))
    return model.run(np.ascontiguousarray(a), np.ascontiguousarray(b))[0]


def _stretch(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return stretch(x, float(x.min()), float(x.max()))


def _frame(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of a picture, as runtime.Fuser gives it to a model of io bgr."""
    if image.dtype != np.uint8:
        image = compose(apply_tone(image, TONE), None if is_grey(image) else chroma(image))
    return _colour(image)


def _colour(image: np.ndarray) -> np.ndarray:
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image


def _grey(image: np.ndarray) -> NDArray[np.uint8]:
    return compose(apply_tone(image, TONE), None)


def check(reports: Sequence[Report], fail_below: Mapping[str, float]) -> None:
    """End the command with exit code 1 where the mean PSNR of a model is below its limit, in dB."""
    low = [report for report in reports if report.psnr < fail_below.get(report.model, float("-inf"))]
    for report in low:
        limit = fail_below[report.model]
        print(f"refusion: {report.model} has {report.psnr:.1f} dB, below the limit of {limit:g} dB", file=sys.stderr)
    if low:
        raise SystemExit(1)


def load_model(path: str | Path, backend: str = "auto", threads: int | None = None) -> Backend:
    """A model file, loaded; warns where this ONNX Runtime is known to compute it worse than others."""
    model = load_backend(path, choose_backend(backend, path)[0], threads)
    half_scales = model.metadata.get("precision") == "int8" and model.metadata.get("int8_remainder") == "fp16"
    if half_scales and Path(path).suffix == ".onnx" and version_numbers(onnxruntime.__version__) < ROUNDS_FLOAT16:
        log.warning(
            "ONNX Runtime %s cuts float16 values off where INT8 rounds them, which costs %s about 8 dB here; 1.30 and "
            "TensorRT do not",
            *(onnxruntime.__version__, path),
        )
    return model


def run(args: argparse.Namespace) -> None:
    """The command, its arguments parsed."""
    if importlib.util.find_spec("torch") is None:
        raise InputError("verifying needs the package torch: pip install 'refusion[export]'")
    pairs = find_pairs(args.data, args.limit, skip_bad=args.skip_bad)
    models = {str(path): load_model(path, args.backend, args.threads) for path in args.models}
    keep_freed_memory()
    reports = []
    for network, names in _by_reference(models, args.reference):
        reports += verify({name: models[name] for name in names}, network, pairs)
    print("\n\n".join(report.text() for report in reports))
    if args.json:
        content = {"convention": "tdfusion", "models": [report.as_json() for report in reports]}
        write_whole(Path(args.json), (json.dumps(content, indent=1) + "\n").encode())
    if args.fail_below is not None:
        check(reports, {report.model: args.fail_below for report in reports})


def _by_reference(models: Mapping[str, Backend], reference: str | None) -> Iterator[tuple[nn.Module, list[str]]]:
    """Networks, and the names of the models that are compared with each."""
    groups: dict[str, list[str]] = {}
    for name, model in models.items():
        groups.setdefault("" if reference else model.metadata.get("weights_sha256", name), []).append(name)
    for names in groups.values():
        yield load_reference(models[names[0]].metadata, reference), names


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="refusion: %(message)s", level=logging.WARNING)
    parser = Parser(prog="export.verify", description=VERIFY)
    add_verify_arguments(parser)
    return exit_code(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
