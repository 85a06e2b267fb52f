"""The kernels are compiled where there is a GPU, and interpreted on CPU tensors elsewhere: the same tests for both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are tiny, and threads that wait for each other take longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces the kernels on the tests' device; returns the backend's name."""
    pytest.importorskip("triton", reason="Triton is not installed")
    backend = "triton" if DEVICE == "cuda" else "interpret"
    monkeypatch.setenv("REFUSION_KERNELS", backend)
    return backend


@pytest.fixture
def as_exact_as_eager() -> Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None]:
    """(ours, eager, exact): our error against `exact`, in float64, is at most twice that of eager PyTorch.

    Where eager happens to be exact, two units in the last place of the largest value are allowed: the interpreter
    truncates where it rounds to bfloat16.
    """

    def check(ours: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
        assert len(ours) == len(eager) == len(exact)
        for index, (x, low, high) in enumerate(zip(ours, eager, exact, strict=True)):
            assert x.dtype == low.dtype
            assert x.shape == high.shape
            error, allowed = ((y.double() - high).abs().max().item() for y in (x, low))
            floor = 2 * torch.finfo(x.dtype).eps * high.abs().max().item()
            assert error <= 2 * allowed + floor, f"result {index}: error {error:.2e}, eager {allowed:.2e}"

    return check
