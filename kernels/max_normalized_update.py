"""Gradient weighting of the loss-proposal network, in place: p -= lr g / max|g|, the maximum over ALL its tensors.

All tensors are one list of chunks, and addresses are data: a table of int64 holds for each tensor the addresses of its
parameter and its gradient and its length, and for each chunk its tensor and its offset. So there are two launches,
whatever the number of tensors. The first leaves max|g| of each chunk; every program of the second takes the maximum of
these, which is the same in any order, and updates its chunk. |g| is compared as an integer: the bits of floats that are
not negative have their order, and NaN is above infinity, so that a NaN anywhere is found, as in torch.max. Where max|g|
is 0, infinite or NaN no parameter is written.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot_entry import AotEntry, pointers
from kernels.stencil import INTERPRETED, TRITON_TYPE, accumulator, launch_device

CHUNK = 1024  # elements of a program
_INTERPRETED_CHUNK = 65536  # the interpreter pays for each program
_NUM_WARPS = 4
_BITS = {torch.float32: tl.int32, torch.float64: tl.int64}


@triton.jit
def _chunk(table_ptr, tensors, CHUNK: tl.constexpr):
    """Tensor of this program's chunk, that tensor's length, and the chunk's elements in it."""
    chunk_ptr = table_ptr + 3 * tensors + 2 * tl.program_id(0)
    tensor = tl.load(chunk_ptr)
    return tensor, tl.load(table_ptr + 2 * tensors + tensor), tl.load(chunk_ptr + 1) + tl.arange(0, CHUNK)


@triton.jit(do_not_specialize=["tensors"])
def _max_kernel(table_ptr, chunk_max_ptr, tensors, CHUNK: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr):
    """max|g| of each chunk. G: type of the gradients."""
    tensor, length, at = _chunk(table_ptr, tensors, CHUNK)
    gradient_ptr = tl.load(table_ptr + tensors + tensor).to(tl.pointer_type(G))
    size = tl.abs(tl.load(gradient_ptr + at, mask=at < length, other=0.0).to(chunk_max_ptr.dtype.element_ty))
    tl.store(chunk_max_ptr + tl.program_id(0), tl.max(size.to(BITS, bitcast=True)).to(size.dtype, bitcast=True))


@triton.jit(do_not_specialize=["tensors", "chunks"])
def _update_kernel(
    table_ptr, chunk_max_ptr, largest_ptr, tensors, chunks,
    CHUNK: tl.constexpr, P: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """p -= lr g / max|g|. P, G: types of the parameters and gradients."""
    sizes = tl.zeros((CHUNK,), BITS)
    for start in range(0, chunks, CHUNK):
        index = start + tl.arange(0, CHUNK)
        size = tl.load(chunk_max_ptr + index, mask=index < chunks, other=0.0)
        sizes = tl.maximum(sizes, size.to(BITS, bitcast=True))
    largest = tl.max(sizes).to(chunk_max_ptr.dtype.element_ty, bitcast=True)
    tl.store(largest_ptr, largest, mask=tl.program_id(0) == 0)

    applied = (largest > 0.0) & (largest < float("inf"))  # false for NaN
    lr = tl.load(table_ptr + 3 * tensors + 2 * chunks).to(tl.float64, bitcast=True)
    scale = lr.to(largest.dtype) / tl.where(applied, largest, 1.0)
    tensor, length, at = _chunk(table_ptr, tensors, CHUNK)
    limit = tl.where(applied, length, 0)
    gradient_ptr = tl.load(table_ptr + tensors + tensor).to(tl.pointer_type(G)) + at
    parameter_ptr = tl.load(table_ptr + tensor).to(tl.pointer_type(P)) + at
    step = tl.load(gradient_ptr, mask=at < limit, other=0.0).to(largest.dtype) * scale
    parameter = tl.load(parameter_ptr, mask=at < limit, other=0.0).to(largest.dtype)
    tl.store(parameter_ptr, parameter - step, mask=at < limit)


@lru_cache(maxsize=8)
def _chunks(lengths: tuple[int, ...], chunk: int) -> list[int]:
    """Tensor and offset of each chunk, one after the other."""
    return [
        number for index, length in enumerate(lengths) for start in range(0, length, chunk) for number in (index, start)
    ]


def _table(parameters: Sequence[Tensor], gradients: Sequence[Tensor], lr: float, chunk: int) -> tuple[Tensor, int]:
    """The table on the parameters' device, and the number of chunks. Its last entry has the bits of lr as a float64."""
    lengths = tuple(p.numel() for p in parameters)
    chunks = _chunks(lengths, chunk)
    addresses = [x.data_ptr() for x in (*parameters, *gradients)]
    bits = struct.unpack("<q", struct.pack("<d", lr))
    device = parameters[0].device
    table = torch.tensor([*addresses, *lengths, *chunks, *bits], dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True), len(chunks) // 2


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


@torch.no_grad()
def _launch(parameters: Sequence[Tensor], gradients: Sequence[Tensor], lr: float) -> Tensor:
    # Both of a pair in one layout, so that the order of their elements in memory is the same.
    targets = [p if _is_dense(p) else p.contiguous() for p in parameters]
    gradients = [
        g if g.stride() == p.stride() else torch.empty_like(p, dtype=g.dtype).copy_(g)
        for p, g in zip(targets, gradients, strict=True)
    ]
    chunk = _INTERPRETED_CHUNK if INTERPRETED else CHUNK
    acc = accumulator((parameters[0], gradients[0]))
    tensors = len(targets)
    with launch_device(parameters[0]):
        table, chunks = _table(targets, gradients, lr, chunk)
        chunk_max = table.new_empty((chunks,), dtype=acc)
        largest = torch.empty_like(chunk_max[0], dtype=gradients[0].dtype)
        g_type = TRITON_TYPE[gradients[0].dtype]
        _max_kernel[(chunks,)](
            table, chunk_max, tensors, CHUNK=chunk, G=g_type, BITS=_BITS[acc], num_warps=_NUM_WARPS, num_stages=1
        )
        _update_kernel[(chunks,)](
            table, chunk_max, largest, tensors, chunks,
            CHUNK=chunk, P=TRITON_TYPE[parameters[0].dtype], G=g_type, BITS=_BITS[acc],
            num_warps=_NUM_WARPS, num_stages=1,
        )  # fmt: skip
    for parameter, target in zip(parameters, targets, strict=True):
        if target is not parameter:
            parameter.copy_(target)
        else:  # as any in-place operation, so that a backward that needs the old value fails
            torch.autograd.graph.increment_version(parameter)
    return largest


_compiled = torch.library.custom_op(
    "refusion::max_normalized_update",
    _launch,
    mutates_args=("parameters",),
    schema="(Tensor(a!)[] parameters, Tensor[] gradients, float lr) -> Tensor",
)


@_compiled.register_fake
def _(parameters: Sequence[Tensor], gradients: Sequence[Tensor], lr: float) -> Tensor:
    return gradients[0].new_empty(())


def update(parameters: Sequence[Tensor], gradients: Sequence[Tensor], lr: float) -> Tensor:
    """Updates the parameters in place and returns max|g|, a 0-d tensor of the gradients' type."""
    operator = _compiled if torch.compiler.is_compiling() else _launch
    return operator(list(parameters), list(gradients), lr)


def aot_entries() -> list[AotEntry]:
    """float32, as in training. Bytes are those of an element: the gradients are read twice."""
    shared = {"table_ptr": "*i64", "chunk_max_ptr": "*fp32"}
    largest = {"largest_ptr": "*fp32", "tensors": "i32", "chunks": "i32"}
    types = {"CHUNK": CHUNK, "G": tl.float32, "BITS": tl.int32}
    # eager_launches: for the loss-proposal network's tensors, counted by kernels.bench
    return [
        AotEntry(
            "max_normalized_update/max/fp32", _max_kernel, shared | {"tensors": "i32"}, types,
            _NUM_WARPS, pointers(shared), 4, 4, 488, 2, 0.8, 48,
        ),
        AotEntry(
            "max_normalized_update/update/fp32", _update_kernel, shared | largest, types | {"P": tl.float32},
            _NUM_WARPS, pointers(shared | largest), 12, 12, 488, 2, 0.75, 56,
        ),
    ]  # fmt: skip
