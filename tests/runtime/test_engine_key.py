"""The sidecar of an engine: what it accepts, and a message of its own for everything that can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.cuda_driver import Gpu
from runtime.engine_key import check, check_engine, describe, read_sidecar, same_build, sidecar_path, write_sidecar
from runtime.errors import InputError
from runtime.machine import Machine

ORIN = Gpu("Orin", (8, 7), 8 << 30)
JETSON = Machine("linux-aarch64", "3.10.12", 6, 8 << 30, "JetPack 6", "12.6", (ORIN,), "", {"tensorrt": "10.3.0"})
REBUILD = "python -m export.build --checkpoint ivif-fp16.onnx --format engine --out ivif.engine --force"
SHAPE = {"min": [1, 1, 64, 64], "opt": [1, 1, 480, 640], "max": [1, 1, 1080, 1920]}


def make_key(**builder: Any) -> dict[str, Any]:
    tensor = {"dtype": "float32", "shape": [-1, 1, -1, -1]}
    return {
        "model": {"file": "ivif-fp16.onnx", "sha256": "0" * 64, "metadata": {"task": "ivif", "io": "luma"}},
        "precision": "fp16",
        "tensors": {"a": tensor, "b": tensor, "fused": tensor},
        "shapes": {"a": SHAPE, "b": SHAPE},
        "builder": {
            "library": "tensorrt",
            "version": "10.3.0",
            "platform": "linux-aarch64",
            "workspace_gb": None,
            "optimization_level": None,
            "version_compatible": False,
            "hardware_compatibility": "none",
            **builder,
        },
        "gpu": {"name": "Orin", "compute_capabilities": ["8.7"]},
        "rebuild": REBUILD,
    }


def make_engine(folder: Path, **builder: Any) -> Path:
    engine = folder / "ivif.engine"
    engine.write_bytes(bytes(range(256)) * 8)
    write_sidecar(engine, make_key(**builder))
    return engine


def message(engine: Path, machine: Machine = JETSON, device: int = 0) -> str:
    with pytest.raises(InputError) as error:
        check(engine, machine, device)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(engine: Path, **fields: Any) -> None:
    path = sidecar_path(engine)
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_machine_it_was_built_for_accepts_it(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    key = check(engine, JETSON)
    assert key["model"]["metadata"] == {"task": "ivif", "io": "luma"}
    assert key["engine"]["bytes"] == 2048
    assert sidecar_path(engine).name == "ivif.engine.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ivif.engine", "ivif.engine.json"]


def test_a_deleted_byte(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    engine.write_bytes(engine.read_bytes()[:-1])
    assert message(engine) == (
        f"engine {engine} has 2,047 bytes and its sidecar says 2,048: damaged; rebuild it: {REBUILD}"
    )


def test_a_changed_byte(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    content = bytearray(engine.read_bytes())
    content[1000] ^= 1
    engine.write_bytes(content)
    assert "is not the file that its sidecar describes (sha256 differs); rebuild it: " in message(engine)


def test_a_renamed_gpu(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    edit(engine, gpu={"name": "NVIDIA GeForce RTX 4090", "compute_capabilities": ["8.9"]})
    assert message(engine) == (
        f"engine {engine} was built for TensorRT 10.3.0, NVIDIA GeForce RTX 4090 (sm_89), linux-aarch64; "
        f"this machine has TensorRT 10.3.0, Orin (sm_87), linux-aarch64; rebuild it: {REBUILD}"
    )


def test_no_engine_and_no_sidecar(tmp_path: Path) -> None:
    assert "is missing; build it: python -m export.build --format engine" in message(tmp_path / "x.engine")
    assert "is not a file" in message(tmp_path)
    engine = make_engine(tmp_path)
    sidecar_path(engine).unlink()
    assert "has no sidecar ivif.engine.json" in message(engine)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]", b"{}", b'"text"', b"null"])
def test_a_corrupt_sidecar(tmp_path: Path, content: bytes) -> None:
    engine = make_engine(tmp_path)
    sidecar_path(engine).write_bytes(content)
    assert f"sidecar {engine}.json is damaged (" in message(engine)


def test_each_missing_or_mistyped_field_is_named(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    whole = read_sidecar(engine)
    for part, fields in {"engine": ["sha256", "bytes"], "builder": ["version", "library"], "gpu": ["name"]}.items():
        for name in fields:
            for wrong in ({k: v for k, v in whole[part].items() if k != name}, {**whole[part], name: [1]}):
                if name == "name" and wrong.get(name) is None:
                    continue  # no name is one GPU's absence, allowed
                sidecar_path(engine).write_text(json.dumps({**whole, part: wrong}))
                assert f"its field '{part}.{name}' is missing or of another type" in message(engine)


def test_a_newer_format_asks_for_an_update(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    edit(engine, format_version=2)
    assert "is of format 2, this release reads 1: update refusion" in message(engine)


@pytest.mark.parametrize(
    ("built", "compatible", "here", "runs"),
    [
        ("10.3.0", False, "10.3.0", True),
        ("10.3.0", False, "10.3.1", False),
        ("10.3.0", True, "10.3.0", True),
        ("10.3.0", True, "10.13.3.9", True),
        ("10.13.3.9", True, "10.3.0", False),
        ("10.3.0", True, "11.4.0.106", True),
        ("11.4.0.106", True, "10.13.3.9", False),
        ("8.6.1", True, "10.3.0", True),
        ("8.6.1", True, "11.4.0.106", False),
        ("10.3.0", True, "", False),
    ],
)
def test_tensorrt_versions(tmp_path: Path, built: str, compatible: bool, here: str, runs: bool) -> None:
    engine = make_engine(tmp_path, version=built, version_compatible=compatible)
    machine = replace(JETSON, packages={"tensorrt": here})
    if runs:
        check(engine, machine)
    else:
        text = message(engine, machine)
        assert f"built for TensorRT {built}{' or newer' if compatible else ''}, Orin" in text
        assert f"this machine has TensorRT {here or 'of unknown version'}, Orin (sm_87)" in text


@pytest.mark.parametrize(
    ("level", "gpu", "runs"),
    [
        ("none", Gpu("Orin", (8, 7), 0), True),
        ("none", Gpu("Orin", (8, 6), 0), False),
        ("none", Gpu("Thor", (8, 7), 0), False),
        ("same_compute_capability", Gpu("Orin Nano", (8, 7), 0), True),
        ("same_compute_capability", Gpu("RTX 4090", (8, 9), 0), False),
        ("ampere_plus", Gpu("RTX 4090", (8, 9), 0), True),
        ("ampere_plus", Gpu("B200", (10, 0), 0), True),
        ("ampere_plus", Gpu("T4", (7, 5), 0), False),
    ],
)
def test_gpus(tmp_path: Path, level: str, gpu: Gpu, runs: bool) -> None:
    engine = make_engine(tmp_path, hardware_compatibility=level)
    machine = replace(JETSON, gpus=(gpu,))
    if runs:
        check(engine, machine)
    else:
        assert f"this machine has TensorRT 10.3.0, {gpu.name} (sm_" in message(engine, machine)


def test_the_gpu_that_is_asked_for_counts(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    machine = replace(JETSON, gpus=(Gpu("RTX 4090", (8, 9), 0), ORIN))
    check(engine, machine, device=1)
    assert "RTX 4090 (sm_89)" in message(engine, machine)
    assert "no GPU 2," in message(engine, machine, device=2)
    assert "no GPU -1," in message(engine, machine, device=-1)


def test_other_platforms_and_missing_parts(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, version_compatible=True, hardware_compatibility="ampere_plus")
    assert "Orin (sm_87), linux-x86_64; rebuild" in message(engine, replace(JETSON, platform="linux-x86_64"))
    assert "this machine has no TensorRT, Orin" in message(engine, replace(JETSON, packages={}))
    bare = replace(JETSON, gpus=(), gpu_problem="no CUDA driver (libcuda.so.1 is not there)")
    assert "no GPU: no CUDA driver (libcuda.so.1 is not there), linux-aarch64; rebuild" in message(engine, bare)


def test_engines_of_tensorrt_rtx_run_on_each_gpu_they_name(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, library="tensorrt_rtx", version="1.7.1.116")
    edit(engine, gpu={"name": None, "compute_capabilities": ["8.6", "8.7"]})
    machine = replace(JETSON, packages={"tensorrt_rtx": "1.7.1.116", "tensorrt": "10.3.0"})
    check(engine, machine)
    older = message(engine, replace(machine, packages={"tensorrt_rtx": "1.6.0", "tensorrt": "10.3.0"}))
    assert "built for TensorRT-RTX 1.7.1.116, GPUs of sm_86, sm_87" in older
    assert "this machine has TensorRT-RTX 1.6.0, Orin (sm_87)" in older
    message(engine, replace(machine, gpus=(Gpu("RTX 5090", (12, 0), 0),)))


def test_check_engine_looks_at_this_machine(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, platform="plan9-sparc")
    with pytest.raises(InputError, match=r"was built for .*plan9-sparc; this machine has .*; rebuild it: python -m"):
        check_engine(engine)


def test_same_build_ignores_the_models_place_but_nothing_else() -> None:
    key = make_key()
    moved = {**key, "model": {**key["model"], "file": "copy.onnx"}, "rebuild": "another command"}
    assert same_build(key, moved)
    assert not same_build(key, make_key(workspace_gb=4.0))
    assert not same_build(key, {**key, "model": {**key["model"], "sha256": "1" * 64}})
    assert not same_build(key, {**key, "shapes": {"a": SHAPE}})
    assert not same_build(key, {**key, "gpu": {"name": "Orin", "compute_capabilities": ["8.9"]}})
    assert describe(key) == "TensorRT 10.3.0, Orin (sm_87), linux-aarch64"
