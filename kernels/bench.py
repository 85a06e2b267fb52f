"""Measures the kernels against plain PyTorch and torch.compile on a GPU; without one, counts launches and bytes.

    python -m kernels.bench                       # on a GPU: time, bandwidth, memory; without one: the model
    python -m kernels.bench --model               # launches and bytes, counted on the CPU
    python -m kernels.bench --model --write-docs  # the same, into docs/kernels.md

Both compare `kernels` with `kernels.reference` on the same inputs, derivatives included.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import kernels
from kernels import reference
from kernels.aot import format_table, write_json
from kernels.cost import measure, tensor_bytes

SIZES = ((4, 128, 128), (1, 480, 640), (1, 1080, 1920), (8, 256, 256))  # batch, height, width
STEP_SIZE = SIZES[0]  # one step of training: a batch of 2, doubled by the exchange of the sources
MODEL_SIZE = {"transformer_block": (1, 64, 64), "attention_fusion": (1, 64, 64)}  # others are counted at STEP_SIZE
GRADIENT_WEIGHT = 0.5  # of the gradient term in the loss
DOCS = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
DOCS_BEGIN, DOCS_END = "<!-- begin: python -m kernels.bench --model --write-docs -->", "<!-- end -->"
_INTERPRET = {"TRITON_INTERPRET": "1", "REFUSION_KERNELS": "interpret"}


def _eager() -> ModuleType:
    """`kernels.reference` as eager PyTorch runs best on a GPU: each pair of Sobel filters is one convolution.

    The reference has shifted differences there, twice as many launches; torch.compile fuses them and gets them as is.
    """
    spec = importlib.util.find_spec("kernels.reference")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    module.sobel = lambda x: F.conv2d(x, _sobel_filters(x.device, x.dtype), padding=1)  # type: ignore[attr-defined]
    return module


@functools.cache
def _sobel_filters(device: torch.device, dtype: torch.dtype) -> Tensor:
    horizontal = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=device, dtype=dtype)
    return torch.stack((horizontal, horizontal.T))[:, None]


EAGER = _eager()


@dataclass(frozen=True)
class Case:
    """One operation on its inputs; each implementation returns all results, derivatives included.

    Attributes:
        ours: The kernels.
        eager: Plain PyTorch as it runs best without a compiler.
        plain: Plain PyTorch as torch.compile gets it.
        inputs: The tensors that any implementation has to read.
        updated: The inputs that are changed in place, if any: they are the results then.
    """

    ours: Callable[[], Sequence[Tensor]]
    eager: Callable[[], Sequence[Tensor]]
    plain: Callable[[], Sequence[Tensor]]
    inputs: Sequence[Tensor]
    updated: Sequence[Tensor] = ()

    @classmethod
    def of(
        cls, run: Callable[[Any], Sequence[Tensor]], inputs: Sequence[Tensor], updated: Sequence[Tensor] = ()
    ) -> Case:
        """From a function of the library: `kernels`, `EAGER` or `kernels.reference`."""
        return cls(lambda: run(kernels), lambda: run(EAGER), lambda: run(reference), inputs, updated)

    def least_bytes(self, results: Sequence[Tensor]) -> int:
        """Bytes that no implementation can do without: each input read once, each result written once."""
        return tensor_bytes(self.inputs) + tensor_bytes(self.updated or results)


def _random(count: int, shape: tuple[int, ...], device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.rand(shape, generator=generator).to(device) for _ in range(count)]


def fusion_loss_case(n: int, h: int, w: int, device: str) -> Case:
    """Both terms of the fusion loss and the derivative of their weighted sum in the fused image."""
    fused, a, b = _random(3, (n, 1, h, w), device)
    weights = _random(2, (n, 2, h, w), device)
    fused.requires_grad_()
    cotangents = (torch.tensor(1.0, device=device), torch.tensor(GRADIENT_WEIGHT, device=device))

    def run(library: Any) -> Sequence[Tensor]:
        terms = library.fusion_loss(fused, a, b, *weights, GRADIENT_WEIGHT)
        return *terms, *torch.autograd.grad(terms, fused, cotangents)

    return Case.of(run, (fused, a, b, *weights))


def fusion_meta_grad_case(n: int, h: int, w: int, device: str) -> Case:
    """The meta-gradient in both weight maps."""
    fused, a, b, tangent = _random(4, (n, 1, h, w), device)
    weights = _random(2, (n, 2, h, w), device)
    inputs = (fused, a, b, *weights, tangent)
    return Case.of(lambda library: library.fusion_meta_grad(*inputs, GRADIENT_WEIGHT), inputs)


def reconstruction_loss_case(n: int, h: int, w: int, device: str) -> Case:
    """The reconstruction loss and its derivatives in both reconstructed images."""
    a, b, a_hat, b_hat = _random(4, (n, 1, h, w), device)
    reconstructed = (a_hat.requires_grad_(), b_hat.requires_grad_())
    cotangent = torch.tensor(1.0, device=device)

    def run(library: Any) -> Sequence[Tensor]:
        loss = library.reconstruction_loss(a, b, *reconstructed)
        return loss, *torch.autograd.grad(loss, reconstructed, cotangent)

    return Case.of(run, (a, b, *reconstructed))


def max_normalized_update_case(n: int, h: int, w: int, device: str) -> Case:
    """The update of all tensors of a loss-proposal network; the image size plays no part."""
    del n, h, w
    shapes = [(c, c, 3, 3) for c in (16, 32)] + 4 * _block_shapes(16) + 2 * _block_shapes(32)
    generator = torch.Generator().manual_seed(0)
    parameters, gradients = ([torch.randn(s, generator=generator).to(device) for s in shapes] for _ in range(2))

    def run(library: Any) -> Sequence[Tensor]:
        return (library.max_normalized_update(parameters, gradients, 1e-4),)

    return Case.of(run, (*parameters, *gradients), updated=parameters)


def transformer_block_case(n: int, h: int, w: int, device: str) -> Case:
    """A transformer block of 16 channels in inference, float16; its weights are folded beforehand."""
    from kernels.reference_blocks import TransformerBlockWeights
    from kernels.reference_blocks import transformer_block as plain
    from kernels.transformer_block import fold_transformer_block, transformer_block

    x, weights = _features(n, h, w, device), TransformerBlockWeights(*_weights(_block_shapes(16), device))
    folded = fold_transformer_block(weights)

    def eager() -> Sequence[Tensor]:
        with torch.no_grad():
            return (plain(x, weights),)

    return Case(lambda: (transformer_block(x, folded),), eager, eager, (x, *weights))


def attention_fusion_case(n: int, h: int, w: int, device: str) -> Case:
    """The attention fusion module of two sources of 16 channels in inference, float16; weights folded beforehand."""
    from kernels.attention_fusion import attention_fusion, fold_attention_fusion
    from kernels.reference_blocks import AttentionFusionWeights
    from kernels.reference_blocks import attention_fusion as plain

    c = 16
    expand = [(4 * c, c, 1, 1), (4 * c, 1, 3, 3)]
    attention = [*[(8, 1, 1)] * 2, *[(3 * c, c, 1, 1)] * 2, *[(3 * c, 1, 3, 3)] * 2, *[(c, c, 1, 1)] * 2]
    gates = [(8 * c, 2 * c, 1, 1), (8 * c, 1, 3, 3), *expand, *expand, *[(2 * c, 4 * c, 1, 1)] * 2]
    weights = AttentionFusionWeights(*_weights([*attention, *gates], device))
    x1, x2 = _features(n, h, w, device), _features(n, h, w, device) - 0.1
    folded = fold_attention_fusion(weights)

    def eager() -> Sequence[Tensor]:
        with torch.no_grad():
            return (plain(x1, x2, weights),)

    return Case(lambda: (attention_fusion(x1, x2, folded),), eager, eager, (x1, x2, *weights))


def _features(n: int, h: int, w: int, device: str) -> Tensor:
    """Half-precision features of 16 channels in channels_last."""
    x = torch.randn(n, 16, h, w, generator=torch.Generator().manual_seed(0)).half()
    return x.to(device, memory_format=torch.channels_last)


def _weights(shapes: Sequence[tuple[int, ...]], device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(0.2 * torch.randn(shape, generator=generator)).half().to(device) for shape in shapes]


def _block_shapes(c: int) -> list[tuple[int, ...]]:
    """Parameters of a transformer block of c channels."""
    norm: list[tuple[int, ...]] = [(c,), (c,)]
    attention: list[tuple[int, ...]] = [(8, 1, 1), (3 * c, c, 1, 1), (3 * c, 1, 3, 3), (c, c, 1, 1)]
    feed_forward = [(4 * c, c, 1, 1), (4 * c, 1, 3, 3), (c, 2 * c, 1, 1)]
    return norm + attention + norm + feed_forward


OPERATIONS: dict[str, Callable[[int, int, int, str], Case]] = {
    "fusion_loss": fusion_loss_case,
    "fusion_meta_grad": fusion_meta_grad_case,
    "reconstruction_loss": reconstruction_loss_case,
    "max_normalized_update": max_normalized_update_case,
    "transformer_block": transformer_block_case,
    "attention_fusion": attention_fusion_case,
}
# How often one meta step (an inner and an outer update) runs each loss.
META_STEP = {"fusion_loss": 1, "reconstruction_loss": 2, "fusion_meta_grad": 1}


# --- the model: launches and bytes, counted on the CPU ---


@dataclass(frozen=True)
class ModelRow:
    """Launches and bytes of one operation, or of several together."""

    operation: str
    size: str
    eager_launches: int
    launches: int
    eager_bytes: int
    bytes: int
    least_bytes: int

    @classmethod
    def total(cls, operation: str, rows: Sequence[ModelRow], counts: Sequence[int]) -> ModelRow:
        """The sum of `rows`, each `counts` times."""

        def of(field: str) -> int:
            return sum(getattr(row, field) * count for row, count in zip(rows, counts, strict=True))

        fields = ("eager_launches", "launches", "eager_bytes", "bytes", "least_bytes")
        return cls(operation, rows[0].size, *(of(field) for field in fields))


def model_row(name: str) -> ModelRow:
    """Counts one operation. Meaningful only where the kernels are interpreted (TRITON_INTERPRET=1)."""
    size = MODEL_SIZE.get(name, STEP_SIZE)
    case = OPERATIONS[name](*size, "cpu")
    least = case.least_bytes(case.eager())  # this first call also makes the constants that later ones reuse
    eager, ours = measure(case.eager), measure(case.ours)
    return ModelRow(name, _size_name(size), eager.launches, ours.launches, eager.bytes, ours.bytes, least)


def _size_name(size: tuple[int, int, int]) -> str:
    return "x".join(map(str, size))


def model(operations: Sequence[str]) -> list[ModelRow]:
    """These operations, and the losses of one meta step together where they are all among them."""
    rows = [model_row(name) for name in tqdm(operations, desc="count", file=sys.stderr, disable=None)]
    step = [row for row in rows if row.operation in META_STEP]
    if len(step) < len(META_STEP):
        return rows
    return [*rows, ModelRow.total("losses of a meta step", step, [META_STEP[row.operation] for row in step])]


def model_table(rows: Sequence[ModelRow]) -> str:
    """Markdown table of `rows`, bytes in MB."""

    def cells(row: ModelRow) -> tuple[str, ...]:
        megabytes = [f"{count / 1e6:.2f}" for count in (row.eager_bytes, row.bytes, row.least_bytes)]
        launches = (str(row.eager_launches), str(row.launches), f"1/{row.eager_launches / row.launches:.0f}")
        return (row.operation, row.size, *launches, *megabytes, f"{row.bytes / row.least_bytes:.2f}")

    header = ("operation", "size", "launches eager", "ours", "ratio", "MB eager", "ours", "least", "ours / least")
    return format_table(header, [cells(row) for row in rows])


def write_docs(table: str, path: Path = DOCS) -> None:
    """Puts `table` between the two marks in the document. ValueError where the marks are not there."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(DOCS_BEGIN)
    _, end, after = rest.partition(DOCS_END)
    if not begin or not end:
        raise ValueError(f"{path} lacks the marks {DOCS_BEGIN} and {DOCS_END}, between which the table goes")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
    os.replace(temporary, path)


# --- the benchmark, on a GPU ---


@dataclass(frozen=True)
class BenchRow:
    """One operation at one size in one implementation.

    Attributes:
        variant: "kernels", "eager" or "torch.compile".
        median_ms, low_ms, high_ms: Median and quartiles of a call, its launches included, with a cold cache.
        gigabytes_per_second: The least bytes of the operation divided by the median.
        share_of_copy: That divided by the bandwidth of a copy of a large tensor on this GPU.
        peak_bytes: Memory that the call takes beyond its inputs.
        speedup: Median of eager divided by this median.
    """

    operation: str
    size: str
    variant: str
    median_ms: float
    low_ms: float
    high_ms: float
    gigabytes_per_second: float
    share_of_copy: float
    peak_bytes: int
    speedup: float


def time_call(call: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` calls between CUDA events, after ten for warming up; the cache is cold."""
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")  # more than any second-level cache holds
    events = []
    for i in range(10 + repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        if i >= 10:
            events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def peak_bytes(call: Callable[[], Any]) -> int:
    """Bytes of GPU memory that the call takes beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second, read and written, of a copy of 256 MiB."""
    source = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (statistics.median(time_call(lambda: target.copy_(source), repeats)) / 1e3)


def bench_case(name: str, size: tuple[int, int, int], copy: float, repeats: int) -> list[BenchRow]:
    """One operation at one size: eager, torch.compile, kernels."""
    case = OPERATIONS[name](*size, "cuda")
    least = case.least_bytes(case.eager())
    torch._dynamo.reset()
    variants = {"eager": case.eager, "torch.compile": torch.compile(case.plain), "kernels": case.ours}
    rows: list[BenchRow] = []
    for variant, call in variants.items():
        low, median, high = statistics.quantiles(time_call(call, repeats), n=4)
        rate = least / (median / 1e3)
        eager = rows[0].median_ms if rows else median
        speed = (rate / 1e9, rate / copy, peak_bytes(call), eager / median)
        rows.append(BenchRow(name, _size_name(size), variant, median, low, high, *speed))
    return rows


def bench_table(rows: Sequence[BenchRow]) -> str:
    """Markdown table of `rows`."""
    header = ("operation", "size", "variant", "ms", "quartiles", "GB/s", "of copy", "peak MiB", "x eager")
    return format_table(
        header,
        [
            (
                row.operation,
                row.size,
                row.variant,
                f"{row.median_ms:.3f}",
                f"{row.low_ms:.3f}-{row.high_ms:.3f}",
                f"{row.gigabytes_per_second:.0f}",
                f"{row.share_of_copy:.0%}",
                f"{row.peak_bytes / 2**20:.1f}",
                f"{row.speedup:.2f}",
            )
            for row in rows
        ],
    )


def environment() -> dict[str, str]:
    """What the figures depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    triton = version("triton") if importlib.util.find_spec("triton") else "none"
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton, "python": platform.python_version()}


# --- command ---


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m kernels.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", action="store_true", help="count launches and bytes, on a machine with a GPU too")
    parser.add_argument("--write-docs", action="store_true", help="put the model's table into docs/kernels.md")
    parser.add_argument(
        "--operation",
        nargs="+",
        default=list(OPERATIONS),
        choices=list(OPERATIONS),
        metavar="NAME",
        help=f"default: all, which are {', '.join(OPERATIONS)}",
    )
    parser.add_argument("--repeats", type=int, default=200, help="timed calls of each (default 200)")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 2 where the model can't be counted, as Triton is not installed."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.write_docs and options.operation != list(OPERATIONS):
        parser.error("--write-docs writes the table of all operations: leave --operation out")
    if options.repeats < 2:
        parser.error(f"--repeats is {options.repeats}; the spread needs at least 2")
    options.model |= options.write_docs
    if not torch.cuda.is_available() and not options.model:
        print("No GPU here, so nothing is timed. Launches and bytes, counted on the CPU:", flush=True)
        options.model = True
    if options.model:
        return _main_model(options, sys.argv[1:] if argv is None else argv)
    print(" ".join(f"{key}={value}" for key, value in environment().items()))
    copy = copy_bandwidth(options.repeats)
    print(f"copy of 256 MiB: {copy / 1e9:.0f} GB/s; GB/s below: the least bytes of the operation by its time")
    jobs = [(name, size) for name in options.operation for size in SIZES]
    rows: list[BenchRow] = []
    for name, size in tqdm(jobs, desc="bench", file=sys.stderr, disable=None):
        rows += bench_case(name, size, copy, options.repeats)
    print(bench_table(rows))
    if options.json:
        figures = {"environment": environment(), "copy_bytes_per_second": copy, "rows": [asdict(row) for row in rows]}
        write_json(options.json, figures)
    return 0


def _main_model(options: argparse.Namespace, argv: Sequence[str]) -> int:
    if importlib.util.find_spec("triton") is None:
        print("Counting the kernels' launches needs Triton's interpreter: pip install triton (Linux)", file=sys.stderr)
        return 2
    if any(os.environ.get(name) != value for name, value in _INTERPRET.items()):
        # Triton chooses between compiler and interpreter when it is imported: start anew with the interpreter.
        command = [sys.executable, "-m", "kernels.bench", "--model", *argv]
        return subprocess.run(command, env=os.environ | _INTERPRET, check=False).returncode
    rows = model(options.operation)
    table = model_table(rows)
    print(table)
    if options.write_docs:
        write_docs(table)
    if options.json:
        write_json(options.json, {"environment": environment(), "model": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
