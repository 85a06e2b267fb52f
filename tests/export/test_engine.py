"""Engines: what is refused before a minute is spent, and real builds with TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.builder_errors import explain
from export.engine import build_engine, build_rtx_engine, is_up_to_date, require_builder
from export.profile import MAX_SIZE, MIN_SIZE, OPT_SIZE, profile, read_model
from runtime.cuda_driver import Gpu
from runtime.engine_key import check, read_sidecar, sidecar_path, tensorrt_problem, write_sidecar
from runtime.errors import InputError
from runtime.machine import Machine, probe

ROOT = Path(__file__).resolve().parents[2]
IVIF = ROOT / "runtime" / "models" / "ivif.onnx"
RTX = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed: extra rtx")
NO_GPU = pytest.mark.skipif(bool(probe().gpus), reason="this machine has a GPU")
DESKTOP = Machine("linux-x86_64", "3.12.3", 16, 64 << 30, "", "12.8", (Gpu("RTX 4090", (8, 9), 24 << 30),))


def make_model(
    path: Path, shape: str = "N,1,H,W", kind: str = "float", operation: str = "Max", io: str = "luma"
) -> Path:
    tensor = f"{kind}[{shape}]"
    onnx.save(
        onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["": 18],
            metadata_props: ["task": "ivif", "precision": "fp32", "io": "{io}"]>
            tiny ({tensor} a, {tensor} b) => ({tensor} fused) {{ fused = {operation}(a, b) }}"""
        ),
        path,
    )
    return path


def test_profile_of_a_free_model_has_defaults(tmp_path: Path) -> None:
    shapes = profile(read_model(make_model(tmp_path / "m.onnx")), (None, None, None), (1, 2, 4))
    assert shapes["a"] == shapes["b"] == ((1, 1, *MIN_SIZE), (2, 1, *OPT_SIZE), (4, 1, *MAX_SIZE))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (((240, 320), None, None), ((240, 320), (480, 640), (1080, 1920))),
        ((None, (256, 320), None), ((64, 64), (256, 320), (1080, 1920))),
        ((None, (32, 2000), None), ((32, 64), (32, 2000), (1080, 2000))),
        ((None, None, (300, 2160)), ((64, 64), (300, 640), (300, 2160))),
        (((720, 1280), None, None), ((720, 1280), (720, 1280), (1080, 1920))),
        (((1, 1), (480, 640), (1080, 1920)), ((1, 1), (480, 640), (1080, 1920))),
    ],
)
def test_profile_widens_its_defaults(tmp_path: Path, sizes: tuple, expected: tuple) -> None:
    shapes = profile(read_model(make_model(tmp_path / "m.onnx")), sizes, (1, 1, 1))
    assert shapes["a"] == tuple((1, 1, *size) for size in expected)


def test_profile_keeps_what_the_model_fixes(tmp_path: Path) -> None:
    fixed = read_model(make_model(tmp_path / "m.onnx", "1,1,480,640"))
    assert set(profile(fixed, (None, None, None), (1, 1, 1))["b"]) == {(1, 1, 480, 640)}
    colour = read_model(make_model(tmp_path / "c.onnx", "N,480,W,3", "uint8", io="bgr"))
    sizes = ((480, 64), (480, 640), (480, 1920))
    assert profile(colour, sizes, (1, 1, 2))["a"] == ((1, 480, 64, 3), (1, 480, 640, 3), (2, 480, 1920, 3))
    with pytest.raises(InputError, match=r"is fixed to 480x640 \(HxW\), not 720x1280; export it anew with --size 0 0"):
        profile(fixed, (None, (720, 1280), None), (1, 1, 1))
    with pytest.raises(InputError, match="is fixed to a batch of 1; export it anew with --batch 0"):
        profile(fixed, (None, None, None), (1, 2, 4))


@pytest.mark.parametrize(
    ("sizes", "batch", "text"),
    [
        (((480, 640), (240, 640), None), (1, 1, 1), "the height goes from 480 to 240 to 1080"),
        ((None, (480, 640), (480, 320)), (1, 1, 1), "the width goes from 64 to 640 to 320"),
        (((0, 64), None, None), (1, 1, 1), "the height goes from 0 to 480"),
        ((None, None, None), (4, 2, 1), "the batch goes from 4 to 2 to 1"),
    ],
)
def test_sizes_that_shrink_are_refused(tmp_path: Path, sizes: tuple, batch: tuple, text: str) -> None:
    with pytest.raises(InputError, match=text):
        profile(read_model(make_model(tmp_path / "m.onnx")), sizes, batch)


def test_what_is_no_fusion_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.onnx is missing"):
        read_model(tmp_path / "nowhere.onnx")
    (tmp_path / "cut.onnx").write_bytes(IVIF.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cannot be read, is it a whole \.onnx file"):
        read_model(tmp_path / "cut.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="has nothing; a fusion model has inputs a, b and fused"):
        read_model(tmp_path / "empty.onnx")


@NO_GPU
def test_without_a_gpu_the_request_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no TensorRT engine can be built here: no CUDA driver .*--format onnx works"):
        require_builder()
    with pytest.raises(InputError, match="no TensorRT engine can be built here"):
        build_engine(IVIF, tmp_path / "ivif.engine")
    assert list(tmp_path.iterdir()) == []


def test_machines_that_can_not_build_say_why() -> None:
    def problem(version: str | None, machine: Machine = DESKTOP, device: int = 0) -> str:
        packages = {} if version is None else {"tensorrt": version}
        return "; ".join(tensorrt_problem(replace(machine, packages=packages), device))

    assert problem("10.3.0") == problem("11.4.0.106") == "; "
    assert problem(None) == "no TensorRT for this Python; pip install 'refusion[tensorrt]'"
    assert "sudo apt install python3-libnvinfer" in problem(None, replace(DESKTOP, jetpack="JetPack 6 (L4T 36.4.3)"))
    assert problem("8.6.2").startswith("TensorRT 8.6.2 is too old; 10.3 (JetPack 6) is the oldest")
    assert problem("10.0.1").startswith("TensorRT 10.0.1 is too old")
    assert problem("12.0.0") == "TensorRT 12.0.0 is newer than this release of refusion knows; update refusion"
    assert problem("").startswith("TensorRT of unknown version ''")
    assert problem("10.3.0", device=1).startswith("no GPU 1 among 1")
    assert problem("10.3.0", replace(DESKTOP, gpus=(), gpu_problem="none")).startswith("none; ")


@pytest.mark.parametrize(
    ("errors", "line"),
    [
        (
            ["[optimizer.cpp::computeCosts::3869] Error Code 10: Internal Error (Could not find any implementation for "
             "node /encoder1/Conv.)"],
            "Could not find any implementation for node /encoder1/Conv. -> free GPU memory, raise --workspace, or "
            "build for a smaller --max-size",
        ),
        (
            ["IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (fused: unsupported type. In validate at "
             "/_src/build/network.cpp:12)"],
            "fused: unsupported type",
        ),
        (["[tactic.cpp:1676: enumerate_tactics] no tactic\nfor x"], "no tactic for x"),
        (["same", "same", "other", "third", "fourth"], "same; other; third"),
        ([], "it gave no reason"),
    ],
)  # fmt: skip
def test_errors_of_tensorrt_become_one_line(errors: list[str], line: str) -> None:
    assert explain(errors) == line


def test_an_engine_is_up_to_date_for_its_model_machine_and_options(tmp_path: Path) -> None:
    machine = replace(DESKTOP, packages={"tensorrt": "10.3.0"})
    engine = tmp_path / "m.engine"
    key = {
        "model": {"file": "m.onnx", "sha256": "0", "metadata": {}},
        "precision": "fp32",
        "tensors": {},
        "shapes": {},
        "builder": {
            "library": "tensorrt",
            "version": "10.3.0",
            "platform": "linux-x86_64",
            "version_compatible": False,
            "hardware_compatibility": "none",
        },
        "gpu": {"name": "RTX 4090", "compute_capabilities": ["8.9"]},
        "rebuild": "",
    }
    assert not is_up_to_date(engine, key, machine)
    engine.write_bytes(b"plan")
    assert not is_up_to_date(engine, key, machine)
    write_sidecar(engine, key)
    assert is_up_to_date(engine, key, machine)
    assert not is_up_to_date(engine, {**key, "precision": "fp16"}, machine)
    assert not is_up_to_date(engine, key, replace(machine, packages={"tensorrt": "10.4.0"}))
    engine.write_bytes(b"pla")
    assert not is_up_to_date(engine, key, machine)


def test_bad_requests_for_rtx_are_refused(tmp_path: Path) -> None:
    model, fixed, out = (
        make_model(tmp_path / "m.onnx"),
        make_model(tmp_path / "f.onnx", "1,1,48,64"),
        tmp_path / "x.engine",
    )
    with pytest.raises(InputError, match=r"builds models of free height and width alone; export .* with --size 0 0"):
        build_rtx_engine(fixed, out, compute_capabilities=["8.9"])
    for wrong in ([], ["sm_89"], ["89"], ["8.9", "x.y"]):
        with pytest.raises(InputError, match=r"give them like 8\.6 8\.9 12\.0"):
            build_rtx_engine(model, out, compute_capabilities=wrong)
    with pytest.raises(InputError, match="is a folder"):
        build_rtx_engine(model, tmp_path, compute_capabilities=["8.9"])
    assert not out.exists()


@RTX
@pytest.mark.slow
def test_a_real_engine_of_the_embedded_model(tmp_path: Path) -> None:
    engine = build_rtx_engine(
        IVIF, tmp_path / "new" / "ivif.engine", min_size=(1, 1), batch=(1, 1, 4), compute_capabilities=["8.6", "8.9"]
    )
    assert 1e6 < engine.stat().st_size < 1e8
    assert sorted(path.name for path in engine.parent.iterdir()) == ["ivif.engine", "ivif.engine.json"]
    key = read_sidecar(engine)
    assert key["shapes"]["a"] == {"min": [1, 1, 1, 1], "opt": [1, 1, 480, 640], "max": [4, 1, 1080, 1920]}
    assert key["gpu"] == {"name": None, "compute_capabilities": ["8.6", "8.9"]}
    assert key["model"]["metadata"]["task"] == "ivif"
    assert key["tensors"]["fused"] == {"dtype": "float32", "shape": [-1, 1, -1, -1]}
    packages = {"tensorrt_rtx": key["builder"]["version"]}
    machine = replace(DESKTOP, platform=key["builder"]["platform"], packages=packages)
    assert check(engine, machine) == key
    with pytest.raises(InputError, match="GPUs of sm_86, sm_89"):
        check(engine, replace(machine, gpus=(Gpu("RTX 5090", (12, 0), 0),)))
    engine.write_bytes(engine.read_bytes()[1:])
    with pytest.raises(InputError, match=r"damaged; rebuild it: python -m export\.build .*--format rtx-engine"):
        check(engine, machine)


@RTX
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_real_engine_of_each_precision(tmp_path: Path, precision: str) -> None:
    """What the exporter writes for the other precisions is a strongly typed network that TensorRT's parser takes."""
    from export.network import deploy, quantizable
    from export.onnx import describe_graph, load, trace, write_model
    from export.options import Graph
    from export.precision import insert_quantisation

    graph = Graph(precision, (0, 0))
    net, metadata = load("ivif")
    network = deploy(net, half=graph.half)
    traced = trace(network, graph)
    if precision == "int8":  # the limits of calibration don't matter here: every convolution that can be becomes INT8
        names = [name for unit in quantizable(deploy(net)).values() for name in unit]
        insert_quantisation(traced, dict.fromkeys(names, 4.0), half=graph.half)
    model = write_model(traced, tmp_path / "m.onnx", {**metadata, **describe_graph(graph)})
    engine = build_rtx_engine(model, tmp_path / "m.engine", compute_capabilities=["8.9"])
    assert 1e6 < engine.stat().st_size < 1e8
    assert read_sidecar(engine)["precision"] == precision


@RTX
@pytest.mark.slow
def test_a_failed_build_names_the_node_and_leaves_nothing(tmp_path: Path) -> None:
    odd = make_model(tmp_path / "odd.onnx", operation="com.unknown.Fuse")
    with pytest.raises(InputError, match=r"TensorRT-RTX [\d.]+ can't read odd\.onnx: node 0 \(Fuse\): ") as error:
        build_rtx_engine(odd, tmp_path / "odd.engine", compute_capabilities=["8.9"])
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"does not build for compute capability 8\.7; it knows .*8\.9"):
        build_rtx_engine(make_model(tmp_path / "m.onnx"), tmp_path / "m.engine", compute_capabilities=["8.7"])
    assert not list(tmp_path.glob("*.engine*"))


def builder(code: str, tmp_path: Path) -> str:
    """Run code with the builder on TensorRT-RTX, in a process of its own."""
    model = make_model(tmp_path / "m.onnx")
    start = f"""
import sys, tensorrt_rtx
sys.modules["tensorrt"] = tensorrt_rtx
from pathlib import Path
import export.tensorrt_builder as builder
from runtime.errors import InputError
model = Path({str(model)!r}).read_bytes()
shapes = {{name: ((1, 1, 64, 64), (1, 1, 480, 640), (1, 1, 1080, 1920)) for name in "ab"}}
def target(config):
    config.num_compute_capabilities = 1
    config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM89, 0)
def build(**options):
    return builder.build_plan(model, "m.onnx", builder.Options(**{{"shapes": shapes, **options}}), target)
"""
    done = subprocess.run(
        [sys.executable, "-c", start + code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@RTX
@pytest.mark.slow
def test_timing_cache_is_kept_and_a_foreign_one_is_made_anew(tmp_path: Path) -> None:
    cache = tmp_path / "caches" / "x.timing"
    code = f"cache = Path({str(cache)!r}); print(len(build(timing_cache=cache)) > 1000)"
    assert builder(code, tmp_path) == "True\n"
    whole = cache.read_bytes()
    assert len(whole) > 50
    cache.write_bytes(b"something else")
    assert "True" in builder(code, tmp_path)
    assert cache.read_bytes()[:16] == whole[:16]
    assert list(cache.parent.iterdir()) == [cache]


@RTX
@pytest.mark.slow
def test_options_reach_the_builder(tmp_path: Path) -> None:
    code = """
import tensorrt_rtx as trt
builder_, network = trt.Builder(trt.Logger(trt.Logger.ERROR)), None
config = builder_.create_builder_config()
builder._configure(config, builder.Options(
    shapes, workspace_gb=1.5, optimization_level=1, version_compatible=True))
print(config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == int(1.5 * 2**30))
print(config.builder_optimization_level, config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE))
for level in ("same_compute_capability", "ampere_plus", "hopper_plus"):
    try:
        builder._configure(config, builder.Options(shapes, hardware_compatibility=level))
        print(level)
    except InputError as error:
        print(error)
try:
    build(shapes={})
except InputError as error:
    print(error)
"""
    lines = builder(code, tmp_path).splitlines()
    assert lines[:2] == ["True", "1 True"]
    assert "same_compute_capability" in lines and "ampere_plus" in lines
    assert any(line.endswith("has no hardware compatibility 'hopper_plus'; leave it out") for line in lines)
    assert any("can't build m.onnx: Network has dynamic or shape inputs, but no optimization" in line for line in lines)


@RTX
@pytest.mark.slow
def test_ctrl_c_stops_the_build(tmp_path: Path) -> None:
    code = """
steps = []
class Bar:
    n = 0
    def __init__(self, **options): pass
    def update(self, count):
        steps.append(count)
        raise KeyboardInterrupt
    def close(self): pass
builder.tqdm = Bar
try:
    build()
except KeyboardInterrupt:
    print("stopped", len(steps))
"""
    text = builder(code, tmp_path)
    assert text.startswith("stopped ")
    assert int(text.split()[1]) < 20


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path) -> None:
    code = f"""
import resource
from pathlib import Path
from runtime.errors import InputError
from runtime.files import write_whole
path = Path({str(tmp_path / "x.engine")!r})
write_whole(path, b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_whole(path, bytes(100_000))
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == f"{tmp_path / 'x.engine'}: cannot be written (File too large)\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.engine"]
    assert (tmp_path / "x.engine").read_bytes() == b"old"


def test_sidecars_hold_json_of_plain_types(tmp_path: Path) -> None:
    (tmp_path / "x.engine").write_bytes(np.arange(9).tobytes())
    path = write_sidecar(tmp_path / "x.engine", {"shapes": {"a": {"min": [1, 1, 2, 3]}}})
    assert path == sidecar_path(tmp_path / "x.engine")
    assert json.loads(path.read_text())["engine"]["bytes"] == 72
