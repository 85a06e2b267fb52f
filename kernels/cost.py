"""Counts what a call costs a GPU: launches and bytes of PyTorch operations and of Triton kernels, without a GPU.

PyTorch operations are counted as they are dispatched, Triton kernels as the interpreter runs them
(TRITON_INTERPRET=1), so both figures are measurements of the code that runs, on CPU tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Operations that launch nothing: they only make a tensor, or read one number back.
_NO_LAUNCH = {
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
    aten.new_empty_strided.default, aten.detach.default, aten.lift_fresh.default, aten._local_scalar_dense.default,
    aten._unsafe_view.default,
    aten.set_.source_Storage_storage_offset,
}  # fmt: skip
# Operations whose tensor arguments give a shape, or are overwritten, without being read.
_NO_READ = {
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_full.default, aten.fill_.Scalar, aten.zero_.default,
}  # fmt: skip


SECTOR = 32  # bytes: the least that an NVIDIA GPU moves between memory and the chip


@dataclass
class Cost:
    """Launches, and bytes moved between memory and the chip by them together.

    Attributes:
        launches: Number of kernels started.
        bytes: Bytes read and written, each sector once a launch: what is left where programs meet in the cache.
        program_bytes: The same with each sector once a program of a Triton kernel, so that halos count as often as
            they are read: what is left where no program finds another's sectors in the cache.
        names: The kernels in order.
    """

    launches: int = 0
    bytes: int = 0
    program_bytes: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str, count: int, moved: int, program_moved: int) -> None:
        self.launches += count
        self.bytes += moved
        self.program_bytes += program_moved
        self.names += [name] * count


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors' elements, those that an expanded dimension repeats counted once."""
    total = 0
    for tensor in tensors:
        distinct = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        total += int(np.prod(distinct)) * tensor.element_size() if tensor.numel() else 0
    return total


class _CountOperations(TorchDispatchMode):
    """Adds each PyTorch operation that computes something to `cost`."""

    def __init__(self, cost: Cost):
        super().__init__()
        self.cost = cost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if written and func.namespace == "aten" and not func.is_view and func not in _NO_LAUNCH:
            read = [] if func in _NO_READ else [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if func is aten.copy_.default:
                read = read[1:]
            moved = tensor_bytes(read) + tensor_bytes(written)
            # The backward of a convolution is a kernel of its own for each gradient asked for.
            launches = sum(args[-1]) if func is aten.convolution_backward.default else 1
            self.cost.add(str(func), launches, moved, moved)
        return result


class _Accesses:
    """Sectors of memory that interpreted programs load and store."""

    def __init__(self) -> None:
        self.sectors: dict[str, list[np.ndarray]] = {"load": [], "store": []}

    def add(self, kind: str, pointers: Any, mask: Any) -> None:
        addresses, mask = np.broadcast_arrays(pointers.data, mask.data)
        touched = addresses[mask.astype(bool)]
        if touched.size:
            self.sectors[kind].append(touched // SECTOR)

    def take(self) -> _Accesses:
        """The accesses so far, each sector once; starts anew."""
        taken = _Accesses()
        for kind, group in self.sectors.items():
            taken.sectors[kind] = _distinct(group)
            group.clear()
        return taken

    def extend(self, other: _Accesses) -> None:
        for kind, group in other.sectors.items():
            self.sectors[kind] += group

    @property
    def bytes(self) -> int:
        return sum(SECTOR * array.size for group in self.sectors.values() for array in group)


def _distinct(group: list[np.ndarray]) -> list[np.ndarray]:
    """Each sector once. Each array of `group` lies in one tensor, so a table of its range is faster than sorting."""
    spans = sorted(((int(array.min()), int(array.max()), array) for array in group), key=lambda span: span[:2])
    merged: list[tuple[int, int, list[np.ndarray]]] = []
    for low, high, array in spans:
        if merged and low <= merged[-1][1] + 2**12:
            first, last, arrays = merged[-1]
            merged[-1] = (first, max(last, high), [*arrays, array])
        else:
            merged.append((low, high, [array]))
    found = []
    for low, high, arrays in merged:
        touched = np.zeros(high - low + 1, bool)
        for array in arrays:
            touched[array - low] = True
        found.append(np.flatnonzero(touched).astype(np.uint64) + low)
    return found


@contextmanager
def _count_kernels(cost: Cost) -> Iterator[None]:
    """Adds each Triton kernel that the interpreter runs to `cost`."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    load, store, start_program = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
    launch = executor.__call__
    program, kernel = _Accesses(), _Accesses()
    program_bytes = 0

    def end_program() -> None:
        nonlocal program_bytes
        done = program.take()
        program_bytes += done.bytes
        kernel.extend(done)

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        program.add("load", pointers, mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        program.add("store", pointers, mask)
        return store(pointers, value, mask, *rest)

    def counted_program(x: int, y: int, z: int) -> None:
        end_program()
        start_program(x, y, z)

    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal program_bytes
        with _disable_current_modes():  # the interpreter's own copies of the arguments are no launches
            result = launch(self, *args, **kwargs)
        end_program()
        cost.add(self.fn.__name__, 1, kernel.take().bytes, program_bytes)
        program_bytes = 0
        return result

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.set_grid_idx, executor.__call__ = counted_program, counted_launch
    try:
        yield
    finally:
        del builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
        executor.__call__ = launch


def measure(call: Callable[[], Any]) -> Cost:
    """Runs `call` once and counts its launches and bytes. Triton kernels count only under TRITON_INTERPRET=1."""
    cost = Cost()
    if os.environ.get("TRITON_INTERPRET") == "1":
        with _count_kernels(cost), _CountOperations(cost):
            call()
    else:
        with _CountOperations(cost):
            call()
    return cost
