"""Ahead-of-time compilation: the tool finds what it must find, and every kernel keeps its ceilings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from kernels import aot

LOSS_KERNELS = ("fusion_loss", "fusion_meta_grad", "reconstruction_loss")

TOY = """
import triton
import triton.language as tl
from kernels.aot_entry import AotEntry

@triton.jit
def pick(X_ptr, Y_ptr, OUT_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if X_ptr is not None:
        tl.store(OUT_ptr + i, tl.load(X_ptr + i, mask=i < n, other=0.0), mask=i < n)
    if Y_ptr is not None:
        pair = tl.load(Y_ptr + i, mask=i < n, other=0.0) + tl.load(Y_ptr + i + 1, mask=i < n - 1, other=0.0)
        tl.store(OUT_ptr + i, pair, mask=i < n)

@triton.jit
def hoard(X_ptr, OUT_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X_ptr + i)
    for _ in range(n):
        x = x * tl.sum(x)
    tl.store(OUT_ptr + i, x)

def entry(name, kernel, pointers, constexprs, **more):
    signature = {pointer: "*fp32" for pointer in pointers} | {"n": "i32"}
    fields = dict(num_warps=4, divisible_by_16=(), bytes_algorithm=8, bytes_kernel=8, eager_launches=10, launches=1,
                  min_occupancy=0.4, max_registers=64) | more
    return AotEntry(name, kernel, signature, constexprs, **fields)

def aot_entries():
    x, y = ("X_ptr", "OUT_ptr"), ("Y_ptr", "OUT_ptr")
    return [
        entry("one load", pick, x, {"Y_ptr": None, "BLOCK": 512}),
        entry("two loads", pick, y, {"X_ptr": None, "BLOCK": 512}),
        entry("aligned", pick, x, {"Y_ptr": None, "BLOCK": 512}, divisible_by_16=("X_ptr", "OUT_ptr", "n")),
        entry("spills", hoard, x, {"BLOCK": 8192}, num_warps=1),
    ]
"""

# Runs the benchmark's cases as a GPU would be given them and stops each launch where Triton would compile: a driver
# that only names a target takes the GPU's place. Prints the launches that no entry compiles ahead of time.
LAUNCHES = """
import contextlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from kernels import aot, bench, dispatch

class NamesTarget:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 87, 32))

def variant(kernel, signature, constexprs, num_warps, num_stages, aligned):
    types = [f"{n}={constexprs[n]}" if n in constexprs else f"{n}: {signature[n]}" for n in kernel.arg_names]
    settings = f"num_warps={num_warps} num_stages={num_stages} aligned: {' '.join(sorted(aligned))}"
    return f"{kernel.__name__}({', '.join(types)}) {settings}"

compiled = {
    variant(e.kernel, e.signature, e.constexprs, e.num_warps, e.num_stages, e.divisible_by_16) for e in aot.entries()
}
launched = set()

def note(*, fn, compile, **rest):
    kernel = fn.jit_function
    names = kernel.arg_names
    constexprs = {names[path[0]]: value for path, value in compile["constants"].items()}
    aligned = [names[path[0]] for path, attributes in compile["configs"][0].items() if attributes]
    launched.add(
        variant(kernel, compile["signature"], constexprs, compile["num_warps"], compile["num_stages"], aligned)
    )
    return True  # do not compile, do not launch

driver.set_active(NamesTarget())
triton.knobs.runtime.jit_cache_hook = note
dispatch.backend_for = lambda tensor: "triton"
for module in [m for name, m in sys.modules.items() if name.startswith("kernels.") and hasattr(m, "launch_device")]:
    module.launch_device = lambda tensor: contextlib.nullcontext()
for make_case in bench.OPERATIONS.values():
    for size in ((4, 128, 128), (1, 33, 48)):
        make_case(*size, "cpu").ours()
print(json.dumps({"launched": sorted(launched), "missing": sorted(launched - compiled)}))
"""


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process of its own, as this one interprets kernels and so can't compile them."""
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "REFUSION_KERNELS")}
    clean["PYTHONPATH"] = os.pathsep.join((str(Path(aot.__file__).parents[1]), str(folder)))
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=False, cwd=folder
    )


def compile_all(
    folder: Path, *targets: str, before: str = "pass"
) -> tuple[subprocess.CompletedProcess[str], dict[tuple[str, str], dict]]:
    """The finished command and its figures by kernel and target."""
    path = folder / "aot.json"
    arguments = ["--check", "--json", str(path), "--target", *targets]
    done = run(f"import sys; from kernels import aot; {before}; sys.exit(aot.main({arguments!r}))", folder)
    assert path.exists(), done.stderr
    kernels = json.loads(path.read_text())["kernels"]
    return done, {(kernel["name"], kernel["target"]): kernel for kernel in kernels}


# --- the tool ---


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict]:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.py").write_text(TOY)
    return compile_all(folder, "sm_87", before="aot.MODULES = ('toy',)")


def test_reports_width_of_accesses(toy: tuple[subprocess.CompletedProcess[str], dict]) -> None:
    kernels = toy[1]
    assert kernels["one load", "sm_87"]["loads"] == {"32": 4}  # 512 elements, 128 threads
    assert kernels["aligned", "sm_87"]["loads"] == {"128": 1}
    assert kernels["aligned", "sm_87"]["stores"] == {"128": 1}


def test_kernels_that_differ_in_which_pointer_is_none_are_compiled_apart(
    toy: tuple[subprocess.CompletedProcess[str], dict],
) -> None:
    assert sum(toy[1]["two loads", "sm_87"]["loads"].values()) == 8


def test_finds_spills_and_names_each_broken_ceiling(toy: tuple[subprocess.CompletedProcess[str], dict]) -> None:
    done, kernels = toy
    spills = kernels["spills", "sm_87"]
    assert spills["stack"] > 0
    assert spills["local_loads"] > 0
    assert spills["local_stores"] > 0
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("spills sm_87: ")]
    assert len(lines) == 3, done.stderr  # spills, registers, occupancy
    assert f"{spills['registers']} registers; at most 64" in lines[1]
    assert "one load" not in done.stderr


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_87", 95, 0, 4, 20 / 48),
        ("sm_90", 95, 0, 4, 20 / 64),
        ("sm_87", 187, 0, 8, 8 / 48),
        ("sm_87", 62, 0, 4, 32 / 48),
        ("sm_87", 16, 0, 4, 1.0),
        ("sm_87", 16, 0, 1, 16 / 48),  # limited by the number of blocks
        ("sm_87", 16, 81 * 1024, 4, 8 / 48),  # by shared memory: two blocks of 82 KB
        ("sm_89", 16, 81 * 1024, 4, 4 / 48),
        ("sm_120", 32, 99 * 1024, 8, 8 / 48),
        ("sm_90", 255, 0, 32, 0.0),  # does not fit at all
    ],
)
def test_occupancy(target: str, registers: int, shared: int, warps: int, expected: float) -> None:
    assert aot.occupancy(target, registers, shared, warps) == pytest.approx(expected)


def test_access_widths_of_disassembled_code() -> None:
    sass = """
    /*0210*/  @!P0 LDG.E.128 R8, [R2.64] ;
    /*0220*/       LDG.E R8, [R2.64+0x4] ;
    /*0230*/       LDG.E.U16.CONSTANT R8, [R2.64] ;
    /*0240*/       LDG.E.LTC128B.64 R8, desc[UR4][R2.64] ;
    /*0250*/       LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
    /*0260*/       STG.E.U8 [R4.64], R8 ;
    /*0270*/       LDS.128 R4, [R3] ;
    """
    assert aot.access_widths(sass, ("LDG", "LDGSTS")) == {128: 2, 64: 1, 32: 1, 16: 1}
    assert aot.access_widths(sass, ("STG",)) == {8: 1}


def test_refuses_to_run_under_the_interpreter(tmp_path: Path) -> None:
    done = run("import sys; from kernels import aot; sys.exit(aot.main([]))", tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "TRITON_INTERPRET" in done.stderr


def test_says_so_where_triton_is_missing(tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None; from kernels import aot; sys.exit(aot.main([]))"
    done = run(code, tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "pip install triton" in done.stderr


# --- the kernels ---


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict]:
    return compile_all(tmp_path_factory.mktemp("aot"), "sm_87", "sm_90")


def test_every_kernel_keeps_its_ceilings(compiled: tuple[subprocess.CompletedProcess[str], dict]) -> None:
    done, kernels = compiled
    assert done.returncode == 0, done.stderr
    assert {name.partition("/")[0] for name, _ in kernels} == {name.rpartition(".")[2] for name in aot.MODULES}


def test_every_launch_is_compiled_ahead_of_time(tmp_path: Path) -> None:
    done = run(LAUNCHES, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["launched"]) > len(aot.MODULES)
    assert not found["missing"], "\n".join(found["missing"])


def test_no_kernel_spills(compiled: tuple[subprocess.CompletedProcess[str], dict]) -> None:
    spilled = {key for key, k in compiled[1].items() if k["stack"] or k["local_loads"] or k["local_stores"]}
    assert not spilled


def test_occupancy_on_orin(compiled: tuple[subprocess.CompletedProcess[str], dict]) -> None:
    low = {
        name: kernel["occupancy"]
        for (name, target), kernel in compiled[1].items()
        if target == "sm_87" and kernel["occupancy"] < (0.40 if name.startswith(LOSS_KERNELS) else 0.25)
    }
    assert not low


@pytest.mark.slow
def test_ceilings_on_the_other_targets(tmp_path: Path) -> None:
    done, _ = compile_all(tmp_path, "sm_89", "sm_120")
    assert done.returncode == 0, done.stderr
