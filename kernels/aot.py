"""Compiles every Triton kernel for named GPU targets, on any machine, and reads from the machine code what it costs.

    python -m kernels.aot --target sm_87 sm_89 sm_90 sm_120

One line for each kernel, shape class and target: registers, spills, shared memory, occupancy, the width of the loads
and stores, bytes and launches. `--check` holds them against the ceilings that each kernel states in its `AotEntry`.
No GPU is needed: ptxas, cuobjdump and nvdisasm come in Triton's wheel.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kernels.aot_entry import AotEntry

# Every module with kernels; each has `aot_entries()`.
MODULES = (
    "kernels.fusion_loss",
    "kernels.fusion_meta_grad",
    "kernels.reconstruction_loss",
    "kernels.max_normalized_update",
    "kernels.transformer_block",
    "kernels.attention_fusion",
)


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one streaming multiprocessor (CUDA C++ Programming Guide, technical specifications)."""

    warps: int
    blocks: int
    shared_bytes: int


TARGETS = {
    "sm_87": Multiprocessor(48, 16, 164 * 1024),  # Jetson Orin
    "sm_89": Multiprocessor(48, 24, 100 * 1024),  # Ada: RTX 40, L4
    "sm_90": Multiprocessor(64, 32, 228 * 1024),  # Hopper: H100
    "sm_120": Multiprocessor(48, 24, 100 * 1024),  # Blackwell: RTX 50
}
# `AotEntry.min_occupancy` is a share of this many warps; where an SM has more, as many warps must fit.
OCCUPANCY_WARPS = 48


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes, read from its machine code.

    Attributes:
        registers: Registers a thread.
        stack: Bytes of stack a thread; more than 0 means spilled registers.
        local_loads: LDL instructions (spilled values read back).
        local_stores: STL instructions (values spilled).
        shared: Bytes of shared memory a block.
        occupancy: Share of the SM's warps that fit at once, 0 to 1.
        loads: Number of load instructions from global memory for each width in bits a thread.
        stores: The same for stores.
    """

    registers: int
    stack: int
    local_loads: int
    local_stores: int
    shared: int
    occupancy: float
    loads: dict[int, int]
    stores: dict[int, int]


def occupancy(target: str, registers: int, shared: int, num_warps: int) -> float:
    """Share of the SM's warps that fit at once, for `registers` a thread and `shared` bytes a block.

    The SM has 65,536 registers in four partitions, given out in units of 256 a warp; a block takes 1 KB of shared
    memory more than it asks for, in units of 128 bytes.
    """
    sm = TARGETS[target]
    registers_a_warp = -(-registers * 32 // 256) * 256
    by_registers = 16384 // registers_a_warp * 4 // num_warps
    by_shared = sm.shared_bytes // (-(-(shared + 1024) // 128) * 128)
    blocks = min(sm.warps // num_warps, sm.blocks, by_registers, by_shared)
    return blocks * num_warps / sm.warps


def access_widths(sass: str, instructions: Iterable[str]) -> dict[int, int]:
    """Counts global-memory instructions in disassembled code by their width in bits.

    LDG.E.128 moves 128 bits a thread, LDG.E.U8 8, LDG.E without a number 32.
    """
    widths: Counter[int] = Counter()
    for modifiers in re.findall(rf"\b(?:{'|'.join(instructions)})\b((?:\.\w+)*)", sass):
        # .128, .64, .U16, .S8; not the .128B of a prefetch hint such as .LTC128B
        width = re.search(r"\.(?:[US])?(8|16|64|128|256)(?![\w])", modifiers)
        widths[int(width.group(1)) if width else 32] += 1
    return dict(sorted(widths.items(), reverse=True))


def compile_entry(entry: AotEntry, target: str) -> Resources:
    """Compiles one kernel for one target and reads its resources. 0.04 to 8 seconds; Triton's cache is used."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = entry.kernel.arg_names
    # Triton's cache key has the types in order, not their names: without the word constexpr in its place two kernels
    # that differ only in which pointer is None share one key.
    signature = {name: "constexpr" if name in entry.constexprs else entry.signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in entry.divisible_by_16}
    source = ASTSource(entry.kernel, signature, constexprs=entry.constexprs, attrs=attributes)
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
        options={"num_warps": entry.num_warps, "num_stages": entry.num_stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        sass = _run(triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    counts = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if counts is None:
        raise RuntimeError(f"cuobjdump reports no registers for {entry.name}: {usage!r}")
    registers, stack = int(counts.group(1)), int(counts.group(2))
    shared = kernel.metadata.shared
    return Resources(
        registers=registers,
        stack=stack,
        local_loads=len(re.findall(r"\bLDL\b", sass)),
        local_stores=len(re.findall(r"\bSTL\b", sass)),
        shared=shared,
        occupancy=occupancy(target, registers, shared, entry.num_warps),
        loads=access_widths(sass, ("LDG", "LDGSTS")),
        stores=access_widths(sass, ("STG",)),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def violations(entry: AotEntry, target: str, resources: Resources) -> list[str]:
    """One line for each ceiling of `entry` that the compiled kernel breaks; empty where it keeps all."""
    warps = resources.occupancy * TARGETS[target].warps
    needed_warps = entry.min_occupancy * OCCUPANCY_WARPS
    broken = []
    if resources.stack or resources.local_loads or resources.local_stores:
        counts = f"stack {resources.stack} bytes, {resources.local_loads} LDL, {resources.local_stores} STL"
        broken.append(f"spills: {counts}; expected 0")
    if resources.registers > entry.max_registers:
        broken.append(f"{resources.registers} registers; at most {entry.max_registers} allowed")
    if warps < needed_warps:
        broken.append(f"{warps:.0f} warps fit an SM; at least {needed_warps:.1f} expected")
    return [f"{entry.name} {target}: {line}" for line in broken]


def entries() -> list[AotEntry]:
    """All kernels in all shape classes. Raises ValueError where two have one name."""
    found = [entry for module in MODULES for entry in importlib.import_module(module).aot_entries()]
    twice = [name for name, count in Counter(entry.name for entry in found).items() if count > 1]
    if twice:
        raise ValueError(f"two kernels have one name: {', '.join(twice)}")
    return found


def _widths(counts: dict[int, int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in counts.items()) or "-"


def _row(entry: AotEntry, target: str, r: Resources) -> tuple[str, ...]:
    return (
        entry.name,
        target,
        str(r.registers),
        f"{r.stack}/{r.local_loads}/{r.local_stores}",
        str(r.shared),
        f"{r.occupancy:.0%}",
        _widths(r.loads),
        _widths(r.stores),
        f"{entry.bytes_algorithm:.1f}",
        f"{entry.bytes_kernel:.1f}",
        f"{entry.launches}/{entry.eager_launches}",
    )


_HEADER = (
    "kernel",
    "target",
    "registers",
    "stack/LDL/STL",
    "shared",
    "occupancy",
    "loads x bits",
    "stores x bits",
    "B/px least",
    "B/px model",
    "launches/eager",
)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def write_json(path: Path, data: Any) -> None:
    """Writes `data` to `path`, whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=list(TARGETS), help="default: all")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--check", action="store_true", help="exit 1 where a kernel breaks a ceiling it states")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where --check finds a broken ceiling; 2 where nothing can be compiled here."""
    options = _parser().parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("kernels.aot compiles, but TRITON_INTERPRET is set: unset it (env -u TRITON_INTERPRET)", file=sys.stderr)
        return 2
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what the launches on a GPU use
    if importlib.util.find_spec("triton") is None:
        print("kernels.aot needs Triton: pip install triton (Linux)", file=sys.stderr)
        return 2

    jobs = [(entry, target) for entry in entries() for target in options.target]
    results = []
    for entry, target in tqdm(jobs, desc="compile", unit="kernel", file=sys.stderr, disable=None):
        results.append((entry, target, compile_entry(entry, target)))

    print(format_table(_HEADER, [_row(*result) for result in results]))
    broken = [line for result in results for line in violations(*result)]
    if options.json:
        _write_json(options.json, results, broken)
    if not options.check:
        return 0
    for line in broken:
        print(line, file=sys.stderr)
    print(f"{len(results)} compiled kernels, {len(broken)} ceilings broken")
    return 1 if broken else 0


def _write_json(path: Path, results: Sequence[tuple[AotEntry, str, Resources]], broken: Sequence[str]) -> None:
    fields = ("num_warps", "max_registers", "min_occupancy", "bytes_algorithm", "bytes_kernel", "launches")
    rows = [
        {"name": entry.name, "target": target, **asdict(resources)}
        | {name: getattr(entry, name) for name in (*fields, "eager_launches")}
        for entry, target, resources in results
    ]
    write_json(path, {"kernels": rows, "violations": list(broken)})


if __name__ == "__main__":
    sys.exit(main())
