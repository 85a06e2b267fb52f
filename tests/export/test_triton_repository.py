"""The model repository for Triton Inference Server, parsed with the server's own protobuf definition."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from google.protobuf import text_format

from export.triton_repository import write_repository
from runtime.engine_key import sidecar_path, write_sidecar
from runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
IVIF = ROOT / "runtime" / "models" / "ivif.onnx"
CLIENT = "tritonclient==2.73.0"  # holds the server's definition of config.pbtxt


@pytest.fixture(scope="session")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """NVIDIA's ModelConfig, taken out of its client package, whose other parts need older packages than ours."""
    folder = tmp_path_factory.mktemp("tritonclient")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    done = subprocess.run([*pip, CLIENT], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        pytest.skip(f"{CLIENT} can't be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        definition = wheel.extract("tritonclient/grpc/model_config_pb2.py", folder)
    spec = importlib.util.spec_from_file_location("model_config_pb2", definition)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_config(model_config: ModuleType, folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config.ModelConfig())


def make_model(path: Path, shape: str, kind: str = "float", io: str = "luma") -> Path:
    tensor = f"{kind}[{shape}]"
    onnx.save(
        onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["": 18],
            metadata_props: ["task": "mif", "precision": "fp16", "io": "{io}"]>
            tiny ({tensor} a, {tensor} b) => ({tensor} fused) {{ fused = Max(a, b) }}"""
        ),
        path,
    )
    return path


def make_engine(folder: Path, largest: int = 4) -> Path:
    engine = folder / "ivif.engine"
    engine.write_bytes(b"a plan")
    tensor = {"dtype": "float32", "shape": [-1, 1, -1, -1]}
    steps = {"min": [1, 1, 64, 64], "opt": [1, 1, 512, 640], "max": [largest, 1, 1080, 1920]}
    key = {
        "model": {"file": "m.onnx", "sha256": "0", "metadata": {"task": "ivif", "precision": "fp16"}},
        "precision": "fp16",
        "tensors": dict.fromkeys(("a", "b", "fused"), tensor),
        "shapes": {"a": steps, "b": steps},
        "builder": {
            "library": "tensorrt",
            "version": "10.3.0",
            "platform": "linux-aarch64",
            "version_compatible": False,
            "hardware_compatibility": "none",
        },
        "gpu": {"name": "Orin", "compute_capabilities": ["8.7"]},
        "rebuild": "python -m export.build --format engine",
    }
    write_sidecar(engine, key)
    return engine


@pytest.mark.slow
def test_the_embedded_model(model_config: ModuleType, tmp_path: Path) -> None:
    folder = write_repository(IVIF, tmp_path / "models", preferred_batches=(4, 8), queue_delay_us=500, instances=2)
    assert folder == tmp_path / "models" / "ivif"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == ["1", "1/model.onnx", "config.pbtxt"]
    assert (folder / "1" / "model.onnx").read_bytes() == IVIF.read_bytes()
    config = read_config(model_config, folder)
    assert (config.name, config.platform, config.max_batch_size) == ("ivif", "onnxruntime_onnx", 8)
    float32 = model_config.DataType.Value("TYPE_FP32")
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [
        ("a", float32, [1, -1, -1]),
        ("b", float32, [1, -1, -1]),
    ]
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [("fused", float32, [1, -1, -1])]
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert config.version_policy.latest.num_versions == 1
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, model_config.ModelInstanceGroup.KIND_AUTO)
    (warm_up,) = config.model_warmup
    assert warm_up.batch_size == 1
    assert list(warm_up.inputs["b"].dims) == [1, 480, 640] and warm_up.inputs["b"].zero_data
    assert not config.optimization.execution_accelerators.gpu_execution_accelerator


@pytest.mark.slow
def test_a_colour_model_of_fixed_size_with_tensorrt(
    model_config: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(tmp_path / "fixed.onnx", "1,480,640,3", "uint8", "bgr")
    with caplog.at_level(logging.WARNING):
        folder = write_repository(model, tmp_path / "models", name="colour.v2", device="gpu", tensorrt=True)
    assert "takes 1 pair at a time, so the server joins no more; a model exported with --batch 0 takes" in caplog.text
    config = read_config(model_config, folder)
    assert (config.name, config.max_batch_size) == ("colour.v2", 0)
    assert not config.HasField("dynamic_batching")
    uint8 = model_config.DataType.Value("TYPE_UINT8")
    assert {(t.data_type, *t.dims) for t in (*config.input, *config.output)} == {(uint8, 1, 480, 640, 3)}
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt" and accelerator.parameters["precision_mode"] == "FP16"
    assert config.instance_group[0].kind == model_config.ModelInstanceGroup.KIND_GPU
    assert config.model_warmup[0].batch_size == 0
    assert list(config.model_warmup[0].inputs["a"].dims) == [1, 480, 640, 3]


@pytest.mark.slow
def test_an_engine(model_config: ModuleType, tmp_path: Path) -> None:
    folder = write_repository(make_engine(tmp_path), tmp_path / "models", max_batch=4)
    config = read_config(model_config, folder)
    assert (folder / "1" / "model.plan").read_bytes() == b"a plan"
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 4)
    assert list(config.input[0].dims) == [1, -1, -1]
    assert config.instance_group[0].kind == model_config.ModelInstanceGroup.KIND_GPU
    assert list(config.model_warmup[0].inputs["a"].dims) == [1, 512, 640]
    assert "TensorRT 10.3.0, Orin (sm_87)" in (folder / "config.pbtxt").read_text()


def test_a_model_that_is_there_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "models"
    first = write_repository(IVIF, out, name="m")
    before = (first / "config.pbtxt").read_text()
    with pytest.raises(InputError, match="is there already; --force replaces it, or give another name"):
        write_repository(IVIF, out, name="m", max_batch=2)
    assert (first / "config.pbtxt").read_text() == before
    write_repository(IVIF, out, name="m", max_batch=2, force=True)
    assert "max_batch_size: 2" in (first / "config.pbtxt").read_text()
    assert [path.name for path in out.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a/b"}, "'a/b' is no name for a model"),
        ({"name": ".."}, r"'\.\.' is no name"),
        ({"max_batch": 0}, "batch and instances start from 1"),
        ({"instances": 0}, "batch and instances start from 1"),
        ({"queue_delay_us": -1}, "the queue delay from 0"),
        ({"max_batch": 4, "preferred_batches": (2, 8)}, "preferred batches 2, 8 must lie between 1 and 4"),
        ({"device": "tpu"}, "unknown device 'tpu'; choose from auto, gpu, cpu"),
    ],
)
def test_bad_options_write_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_repository(IVIF, tmp_path / "models", **options)
    assert not (tmp_path / "models").exists()


def test_bad_models_write_nothing(tmp_path: Path) -> None:
    out = tmp_path / "models"
    with pytest.raises(InputError, match="is missing"):
        write_repository(tmp_path / "no.onnx", out)
    with pytest.raises(InputError, match="is missing; build it"):
        write_repository(tmp_path / "no.engine", out)
    with pytest.raises(InputError, match="a is int64; the server is offered"):
        write_repository(make_model(tmp_path / "i.onnx", "N,1,H,W", "int64"), out)
    engine = make_engine(tmp_path)
    with pytest.raises(InputError, match="is an engine already"):
        write_repository(engine, out, device="cpu")
    key = json.loads(sidecar_path(engine).read_text())
    key["builder"]["library"] = "tensorrt_rtx"
    sidecar_path(engine).write_text(json.dumps(key))
    with pytest.raises(InputError, match="is one of TensorRT-RTX, which the server does not run"):
        write_repository(engine, out)
    engine.write_bytes(b"another plan")
    with pytest.raises(InputError, match="is not the file that its sidecar describes"):
        write_repository(engine, out)
    assert not out.exists()


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(InputError, match="cannot be written"):
        write_repository(IVIF, tmp_path / "models")
