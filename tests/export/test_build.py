"""`refusion export`: files, tables, engines that can't be built here, and everything that must be refused."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from export.build import build, main
from export.options import Engine, Int8
from refusion.cli import main as cli
from refusion.lite import LiteNet
from refusion.weights import save_weights
from runtime.images import write_image
from runtime.machine import probe
from runtime.scenes import night_road

SIZE = ["--size", "48", "64"]
# Before 1.30 ONNX Runtime does not round float16 values to int8.
REMAINDER = "fp16" if tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 30) else "fp32"
no_gpu = pytest.mark.skipif(bool(probe().gpus), reason="an engine can be built here")


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that must end with exit code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capfd.readouterr().err.splitlines()
    lines = [line for line in error if line.startswith("refusion: ")]
    assert len(lines) == 1 and not [line for line in error if "Traceback" in line]
    return lines[0]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for i in range(8):
        infrared, visible = night_road(frame=31 * i, size=(48, 64))
        write_image(tmp_path / "pairs" / "a" / f"{i}.png", infrared)
        write_image(tmp_path / "pairs" / "b" / f"{i}.png", visible)
    return tmp_path / "pairs"


# What is made


@pytest.mark.slow
def test_three_precisions_in_one_table(
    lite_weights: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(lite_weights), "--precision", "fp32", "fp16", "int8", *SIZE, "--out", str(out)]
    options = ["--calibration", str(pairs), "--data", str(pairs), "--limit", "2", "--threads", "1", "--sensitivity"]
    assert cli(["export", *arguments, *options, "--int8-remainder", REMAINDER]) == 0
    names = [f"ivif-random-{precision}-48x64.onnx" for precision in ("fp32", "fp16", "int8")]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    output = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.startswith(tuple(names))}
    psnr = [float(rows[name][2]) for name in names]
    assert psnr[0] > 90 and psnr[0] > psnr[1] > 55 and psnr[1] > psnr[2] > 38
    assert "all islands" in output and "all that become INT8" in output
    assert [line for line in output.splitlines() if line.startswith(str(out))] == [str(out / name) for name in names]
    for name, precision in zip(names, ("fp32", "fp16", "int8"), strict=True):
        stated = metadata(out / name)
        assert stated["precision"] == precision and stated["size"] == "48x64" and stated["io"] == "luma"
        assert stated["task"] == "ivif" and stated["network"] == "LiteNet" and stated["source_commit"] == "abc"
        assert stated["input_order"] == "a = infrared, b = visible" and len(stated["weights_sha256"]) == 64
    assert metadata(out / names[2])["calibration"] == "8 pairs of pairs, percentile"
    assert metadata(out / names[2])["int8_convolutions"].endswith("of 20")


@pytest.mark.slow
def test_quality_of_the_shipped_weights(data_dir: Path, tmp_path: Path) -> None:
    """On real pairs: fp16 within 1 % and INT8 within 2 % of float32's fusion metrics, and far above their PSNR."""
    from export.verify import find_pairs, load_model, load_reference, verify

    pairs = [
        pair
        for name in ("RoadScene", "MSRS_test_subset", "TNO")
        for pair in find_pairs(data_dir / "ivif" / "dev" / name, 2)
    ]
    int8 = Int8(data_dir / "ivif" / "train" / "RoadScene", remainder=REMAINDER)
    paths = {p: build("ivif", tmp_path, p, (240, 320), int8=int8) for p in ("fp16", "int8")}
    models = {precision: load_model(path) for precision, path in paths.items()}
    reports = verify(models, load_reference({}, "ivif"), pairs, progress=False)
    for report, least, change in zip(reports, (55, 38), (1, 2), strict=True):
        assert report.psnr > least
        assert max(abs(value) for value in report.changes.values()) < change
    assert load_reference(models["int8"].metadata).state_dict().keys() == load_reference({}, "ivif").state_dict().keys()


@pytest.mark.slow
def test_rebuilding_gives_the_same_file(lite_weights: Path, pairs: Path, tmp_path: Path) -> None:
    options = {"size": (16, 24), "int8": Int8(pairs)}
    for precision in ("fp16", "int8"):
        first, second = (build(lite_weights, tmp_path / name, precision, **options) for name in ("1", "2"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_out_names_a_file_or_a_folder(lite_weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "mine.onnx"
    assert build(lite_weights, file, "fp32", (16, 24)) == file
    free = build(lite_weights, tmp_path, "fp16", (0, 24), batch=0, task="ivif")
    assert free == tmp_path / "ivif-random-fp16-anyx24-batch.onnx"
    shape = onnx.load(free).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in shape] == [0, 1, 0, 24]
    session = ort.InferenceSession(str(free), providers=["CPUExecutionProvider"])
    a, b = np.zeros((2, 3, 1, 9, 24), np.float32)
    assert session.run(None, {"a": a, "b": b})[0].shape == (3, 1, 9, 24)


@pytest.mark.slow
def test_triton_repository(lite_weights: Path, tmp_path: Path) -> None:
    folder = build(lite_weights, tmp_path / "repository", "fp16", (0, 0), batch=0, form="triton-repository")
    assert folder == tmp_path / "repository" / "ivif-random-fp16-dynamic-batch"
    assert (folder / "1" / "model.onnx").is_file() and "dynamic_batching" in (folder / "config.pbtxt").read_text()


# Engines


@no_gpu
def test_engine_without_a_gpu(lite_weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", lite_weights, *SIZE, "--out", tmp_path, "--format", "engine", "--workspace", 2]
    line = refused(capfd, *arguments)
    model = tmp_path / "ivif-random-fp16-48x64.onnx"
    assert "no CUDA driver" in line and f"{model} is written and verified" in line
    assert line.endswith(
        "python -m export.build --checkpoint ivif-random-fp16-48x64.onnx --format engine "
        "--out ivif-random-fp16-48x64.engine --workspace 2.0 --force"
    )
    assert list(tmp_path.iterdir()) == [model]
    # What the target machine is told to do says the same here, and does nothing.
    assert "no CUDA driver" in refused(capfd, "--checkpoint", model, "--format", "engine")
    assert list(tmp_path.iterdir()) == [model]


@no_gpu
def test_auto_without_a_gpu(lite_weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = build(lite_weights, tmp_path, "fp16", (16, 24), form="auto")
    assert path.suffix == ".onnx" and list(tmp_path.iterdir()) == [path]
    assert "is the result, without an engine: no TensorRT engine can be built here" in caplog.text


def test_command_for_another_machine_names_every_option() -> None:
    engine = Engine(
        (64, 64), (480, 640), (1080, 1920), 4, 1.5, 3, Path("t"), True, "ampere_plus", 1, compute_capabilities=("8.9",)
    )
    command = engine.command(Path("a b.onnx"), Path("x.engine"), "engine")
    assert command == (
        "python -m export.build --checkpoint 'a b.onnx' --format engine --out x.engine --min-size 64 64 --opt-size 480 "
        "640 --max-size 1080 1920 --max-batch 4 --workspace 1.5 --optimization-level 3 --timing-cache t "
        "--hardware-compatible ampere_plus --device 1 --version-compatible --compute-capability 8.9 --force"
    )


# What is refused


@pytest.fixture(scope="module")
def model(lite_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(lite_weights, tmp_path_factory.mktemp("finished"), "fp32", (16, 24))


def test_refuses_in_one_line_and_writes_nothing(
    lite_weights: Path, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    (tmp_path / "text.safetensors").write_text("no weights")
    mif = tmp_path / "mif.safetensors"
    save_weights(mif, LiteNet().state_dict(), {"task": "mif", "network": "LiteNet"})
    out = tmp_path / "out"
    weights = ["--checkpoint", lite_weights]
    engine = [*weights, "--format", "engine"]
    cases: dict[tuple[object, ...], str] = {
        ("--checkpoint", tmp_path / "foreign.pth"): "not the authors' weights (unknown entry 'weight')",
        ("--checkpoint", tmp_path / "text.safetensors"): "not a safetensors file",
        ("--checkpoint", "absent.safetensors"): "absent.safetensors: no such weights file",
        ("--checkpoint", "ivif3"): "no weights 'ivif3'",
        (*weights, "--task", "mif"): "are for task ivif, not mif; leave --task out",
        (*weights, "--model", "lite"): "leave --model out beside --checkpoint",
        (*weights, "--opset", 17): "opset 17 is not supported; choose from 18 to 22",
        (*weights, "--opset", 23): "opset 23 is not supported; choose from 18 to 22",
        (*weights, "--precision", "int8", "--opset", 18): "INT8 beside float16 needs opset 19, not 18",
        (*weights, "--precision", "fp8"): "invalid choice: 'fp8'",
        (*weights, "--size", -1, 64): "size -1x64 (HxW) and batch 1: give 1 or more, or 0 for any",
        (*weights, "--size", 64): "argument --size: expected 2 arguments",
        (*weights, "--calibration", tmp_path): "--calibration is for --precision int8",
        (*weights, "--data", tmp_path / "absent"): "no such folder",
        (*weights, "--precision", "fp32", "fp16", "--out", tmp_path / "one.onnx"): "several precisions make several",
        ("--checkpoint", mif, "--precision", "int8"): "INT8 needs pictures of the task: give --calibration DIR",
        (*engine, "--size", 0, 0, "--min-size", 64, 64, "--opt-size", 32, 32): "the height goes from 64 to 32 to",
        (*engine, "--size", 0, 0, "--max-size", 32, 32, "--opt-size", 64, 64): "the height goes from 64 to 64 to 32",
        (*engine, *SIZE, "--max-size", 96, 128): "is fixed to 48x64 (HxW), not 96x128",
        (*weights, "--format", "rtx-engine"): "give --compute-capability, as in 8.6 8.9 12.0",
        ("--checkpoint", model): "is an ONNX model already; give --format engine",
        ("--checkpoint", model, "--format", "engine", *SIZE): "is a finished model: leave --size out",
        ("--checkpoint", "absent.onnx", "--format", "engine"): "model absent.onnx is missing",
        ("--checkpoint", mif, "--format", "engine", "--device", "x"): "invalid int value: 'x'",
    }
    for arguments, message in cases.items():
        assert message in refused(capfd, *arguments, *([] if "--out" in arguments else ["--out", out])), arguments
        assert not out.exists() or not list(out.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir() if path != out) == [
        "foreign.pth",
        "mif.safetensors",
        "text.safetensors",
    ]


def test_refuses_bad_calibration(
    lite_weights: Path, pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", lite_weights, "--precision", "int8", *SIZE, "--out", tmp_path / "out", "--no-verify"]
    (tmp_path / "empty").mkdir()
    assert "no folder there has sub-folders" in refused(capfd, *arguments, "--calibration", tmp_path / "empty")
    assert "500 dB in INT8; give a lower" in refused(capfd, *arguments, "--calibration", pairs, "--int8-floor", 500)
    (pairs / "a" / "7.png").write_bytes(b"")
    assert "7.png: the file is empty" in refused(capfd, *arguments, "--calibration", pairs)
    for name in "ab":
        (pairs / name / "7.png").unlink()
    assert "has 7 pairs; calibration needs 8 or more" in refused(capfd, *arguments, "--calibration", pairs)
    assert not (tmp_path / "out").exists()


def test_existing_output_is_kept_unless_forced(
    lite_weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.onnx"
    path.write_text("mine")
    arguments = ["--checkpoint", lite_weights, "--size", 16, 24, "--out", path, "--no-verify"]
    assert refused(capfd, *arguments).endswith(
        "is there already; --force replaces it, --out puts the new one elsewhere"
    )
    assert path.read_text() == "mine"
    assert main([*map(str, arguments), "--force"]) == 0
    assert metadata(path)["precision"] == "fp16"


@pytest.mark.slow
def test_full_disk(lite_weights: Path, tmp_path: Path) -> None:
    """The kernel refuses to write more than 100 KB into any file, as a full disk would."""
    target = tmp_path / "ivif.onnx"
    target.write_text("what was there")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    arguments = ["--task", "ivif", "--precision", "fp32", *SIZE, "--out", str(target), "--force", "--no-verify"]
    done = subprocess.run(
        [sys.executable, "-m", "export.build", *arguments],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"refusion: {target}: cannot be written (File too large)"
    assert target.read_text() == "what was there" and list(tmp_path.iterdir()) == [target]


def test_help_needs_no_heavy_package() -> None:
    code = "import sys, export.arguments, export.build, export.build_command; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    assert not {"torch", "onnx", "onnxruntime"} & set(json.loads(done.stdout))
