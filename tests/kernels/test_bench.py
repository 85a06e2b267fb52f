"""Counting of launches and bytes, the model made from it, its table in the docs, and the benchmark's path on a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import triton
import triton.language as tl

from kernels import aot, bench, stencil
from kernels.cost import SECTOR, measure, tensor_bytes

ROOT = Path(bench.__file__).resolve().parents[1]
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts interpreted kernels")


# --- counting ---


def test_counts_operations_and_their_bytes() -> None:
    x, y = torch.rand(3, 8), torch.rand(3, 8)
    cost = measure(lambda: (x + y).t()[1:].mul_(2.0))
    assert cost.names == ["aten.add.Tensor", "aten.mul_.Tensor"]
    assert cost.launches == 2
    assert cost.bytes == 3 * 96 + 2 * (7 * 3 * 4)


def test_views_and_allocations_cost_nothing() -> None:
    x = torch.rand(4, 6)
    cost = measure(lambda: (x.view(6, 4).permute(1, 0)[:, 1].detach(), torch.empty(5), torch.empty_like(x)))
    assert (cost.launches, cost.bytes) == (0, 0)


def test_what_is_overwritten_or_expanded_is_not_read() -> None:
    x = torch.rand(10)
    assert measure(lambda: torch.zeros_like(x)).bytes == 40
    assert measure(lambda: x.fill_(1.0)).bytes == 40
    assert measure(lambda: x.copy_(torch.ones(1).expand(10))).bytes == 4 + 4 + 40  # ones(1), then copy
    assert tensor_bytes([torch.ones(1, 5).expand(7, 5), torch.ones(0, 3)]) == 20


def test_counts_the_backward() -> None:
    x = torch.rand(2, 1, 5, 5, requires_grad=True)
    weight = torch.rand(3, 1, 3, 3, requires_grad=True)
    y = torch.nn.functional.conv2d(x, weight)
    assert measure(lambda: torch.autograd.grad(y, (x, weight), torch.ones_like(y))).launches == 3  # ones, dx, dweight


@triton.jit
def _blur(X_ptr, Y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X_ptr + i, mask=i < n, other=0.0) + tl.load(X_ptr + i + 1, mask=i + 1 < n, other=0.0)
    tl.store(Y_ptr + i, x, mask=i < n)


@interpreted
def test_counts_an_interpreted_kernel_with_its_halos() -> None:
    x, y = torch.rand(96), torch.empty(96)
    cost = measure(lambda: _blur[(3,)](x, y, 96, BLOCK=32))
    assert torch.equal(y[:-1], x[:-1] + x[1:])
    assert (cost.launches, cost.names) == (1, ["_blur"])
    assert cost.bytes == 2 * 96 * 4  # each sector once, though most elements are loaded twice
    assert cost.program_bytes == 2 * 96 * 4 + 2 * SECTOR  # two of three programs read a sector of the next


@interpreted
def test_counts_kernels_and_operations_together_and_stops_counting() -> None:
    x, y = torch.rand(64), torch.empty(64)
    cost = measure(lambda: (_blur[(2,)](x, y, 64, BLOCK=32), y.mul_(2.0)))
    assert cost.names == ["_blur", "aten.mul_.Tensor"]
    _blur[(2,)](x, y, 64, BLOCK=32)
    assert cost.launches == 2


# --- the model ---


def test_eager_opponent_computes_what_the_reference_does() -> None:
    for name, make_case in bench.OPERATIONS.items():
        case = make_case(2, 9, 11, "cpu")
        torch.testing.assert_close(tuple(case.eager()), tuple(case.plain()), msg=name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, bench.ModelRow]]:
    """Output and rows of the command as a user runs it."""
    path = tmp_path_factory.mktemp("bench") / "model.json"
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "REFUSION_KERNELS")}
    arguments = ["--json", str(path)] + (["--model"] if torch.cuda.is_available() else [])
    command = [sys.executable, "-m", "kernels.bench", *arguments]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = [bench.ModelRow(**row) for row in json.loads(path.read_text())["model"]]
    return done.stdout, {row.operation: row for row in rows}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_says_that_there_is_no_gpu(model: tuple[str, dict[str, bench.ModelRow]]) -> None:
    assert model[0].splitlines()[0].startswith("No GPU here")


def test_losses_of_a_meta_step_reach_the_aims(model: tuple[str, dict[str, bench.ModelRow]]) -> None:
    step = model[1]["losses of a meta step"]
    assert 10 * step.launches <= step.eager_launches
    assert step.bytes <= 1.2 * step.least_bytes


@interpreted
@pytest.mark.parametrize(
    ("operation", "channels", "entry"),
    [
        ("fusion_loss", (1, 1, 1, 2, 2), "loss and derivative/fp32"),
        ("fusion_meta_grad", (1, 1, 1, 2, 2, 1), "fp32"),
        ("reconstruction_loss", (1, 1, 1, 1), "loss and derivatives/fp32"),
    ],
)
def test_halos_of_the_strips_on_a_gpu_are_as_claimed(operation: str, channels: tuple[int, ...], entry: str) -> None:
    """Two strips by two: each has a halo on two of its four sides, so about half of the model's halo is moved."""
    module = importlib.import_module(f"kernels.{operation}")
    claim = {e.name: e for e in module.aot_entries()}[f"{operation}/{entry}"]
    inputs = [torch.rand(1, c, 2 * stencil.MOST_ROWS, 256) for c in channels]
    cut = stencil.cut(inputs[0], columns=128, rows=stencil.MOST_ROWS, num_warps=4)
    moved = measure(lambda: module.forward(inputs, 0.5, [True] * len(inputs), cut)).program_bytes / inputs[0].numel()
    assert 0.45 <= (moved - claim.bytes_algorithm) / (claim.bytes_kernel - claim.bytes_algorithm) <= 0.6


@pytest.mark.parametrize("operation", ["transformer_block", "attention_fusion"])
def test_network_blocks_reach_the_aims(operation: str, model: tuple[str, dict[str, bench.ModelRow]]) -> None:
    """At most four launches; at most 1.5 times reading and writing the activations of the stream once a launch."""
    row = model[1][operation]
    n, h, w = bench.MODEL_SIZE[operation]
    channels = {"transformer_block": 16, "attention_fusion": 32}[operation]
    assert row.launches <= 4
    assert row.bytes <= 1.5 * row.launches * 2 * (2 * channels * n * h * w)


def test_total_is_the_sum_of_its_parts(model: tuple[str, dict[str, bench.ModelRow]]) -> None:
    rows = model[1]
    expected = sum(rows[name].eager_launches * count for name, count in bench.META_STEP.items())
    assert rows["losses of a meta step"].eager_launches == expected


def test_no_operation_moves_less_than_the_least(model: tuple[str, dict[str, bench.ModelRow]]) -> None:
    assert all(row.bytes >= row.least_bytes and row.eager_bytes >= row.least_bytes for row in model[1].values())


@pytest.mark.parametrize("operation", bench.OPERATIONS)
def test_kernels_claim_the_launches_and_bytes_that_are_counted(
    operation: str, model: tuple[str, dict[str, bench.ModelRow]]
) -> None:
    row = model[1][operation]
    entries = [entry for entry in aot.entries() if entry.name.partition("/")[0] == operation]
    assert entries
    assert {entry.launches for entry in entries} == {row.launches}
    assert all(entry.eager_launches <= row.eager_launches for entry in entries)


def test_docs_hold_the_table_that_the_command_gives_now(model: tuple[str, dict[str, bench.ModelRow]]) -> None:
    committed = bench.DOCS.read_text(encoding="utf-8").partition(bench.DOCS_BEGIN)[2].partition(bench.DOCS_END)[0]
    assert committed.strip() == bench.model_table(list(model[1].values())), (
        "python -m kernels.bench --model --write-docs"
    )


def test_write_docs_refuses_a_part_of_the_operations(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(["--write-docs", "--operation", "fusion_loss"])
    assert stop.value.code == 2
    assert "leave --operation out" in capsys.readouterr().err


def test_write_docs_replaces_what_is_between_the_marks(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{bench.DOCS_BEGIN}\nold\n{bench.DOCS_END}\nafter\n")
    bench.write_docs("new", path)
    assert path.read_text() == f"before\n{bench.DOCS_BEGIN}\nnew\n{bench.DOCS_END}\nafter\n"
    path.write_text("no marks\n")
    with pytest.raises(ValueError, match="lacks the marks"):
        bench.write_docs("new", path)
    assert path.read_text() == "no marks\n"


# --- the benchmark ---


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("operation", bench.OPERATIONS)
def test_benchmark_of_one_operation(operation: str) -> None:
    rows = bench.bench_case(operation, (1, 33, 47), copy=1e9, repeats=4)
    assert [row.variant for row in rows] == ["eager", "torch.compile", "kernels"]
    assert all(0 < row.low_ms <= row.median_ms <= row.high_ms for row in rows)
    assert rows[0].speedup == 1.0
    assert bench.bench_table(rows).count("\n") == 4
