"""What a kernel module tells `kernels.aot` about one kernel in one shape class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AotEntry:
    """One kernel to compile ahead of time, with the bytes and launches that it claims.

    Every kernel module exports `aot_entries() -> list[AotEntry]`.

    Attributes:
        name: Operation and shape class, unique over all modules, for example "fusion_loss/forward/fp32".
        kernel: The `@triton.jit` function.
        signature: Type of each argument that is no constexpr, in Triton's words: {"F_ptr": "*fp32", "H": "i32"}.
        constexprs: Value of each constexpr argument.
        num_warps: Warps of a program.
        divisible_by_16: Names of the arguments that Triton finds to be multiples of 16 at the launch: pointers to fresh
            tensors are, integers may be unless the kernel is not specialised on them.
        bytes_algorithm: Bytes a pixel that any implementation of the operation must move: each input read once, each
            output written once.
        bytes_kernel: Bytes a pixel that this launch moves between DRAM and the chip, halos and scratch included.
        eager_launches: Launches of plain PyTorch for the same operation.
        launches: Launches of ours for the operation.
        min_occupancy: Share of an SM's warps that must fit, 0 to 1.
        max_registers: Ceiling of the registers a thread.
        num_stages: Software pipelining stages. The launch must pass the same number: Triton's own default is 3.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    divisible_by_16: tuple[str, ...]
    bytes_algorithm: float
    bytes_kernel: float
    eager_launches: int
    launches: int
    min_occupancy: float
    max_registers: int
    num_stages: int = 1


def pointers(signature: dict[str, str]) -> tuple[str, ...]:
    """Names of the pointers of a signature: those of tensors that PyTorch allocated are multiples of 16."""
    return tuple(name for name, kind in signature.items() if kind.startswith("*"))
