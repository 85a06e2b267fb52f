"""Models against float32 in PyTorch: exact ones pass, wrong ones are found, and the numbers are right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.build import build, make_onnx
from export.options import Graph
from export.verify import MOST_PSNR, find_pairs, load_model, load_reference, main, verify
from refusion.lite import LiteNet
from refusion.metrics import evaluate
from refusion.weights import save_weights
from runtime import Fuser
from runtime.color import luma
from runtime.errors import InputError
from runtime.images import write_image
from runtime.scenes import night_road


@pytest.fixture(scope="module")
def model(lite_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs at a time, 48x64."""
    folder = tmp_path_factory.mktemp("models")
    return make_onnx(lite_weights, folder / "exact.onnx", Graph("fp32", (48, 64), batch=2))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of pairs, of 48x64 and of another size."""
    folder = tmp_path_factory.mktemp("data")
    for name, size in (("small", (48, 64)), ("large", (60, 100))):
        for i in range(2):
            infrared, visible = night_road(frame=50 * i, size=size)
            write_image(folder / name / "a" / f"{i}.png", infrared)
            write_image(folder / name / "b" / f"{i}.png", visible)
    return folder


def edited(model: Path, path: Path, change: float) -> Path:
    """The model with a number added to the bias of its last convolution."""
    proto = onnx.load(model)
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("net.head.bias"))
    bias = numpy_helper.to_array(tensor).copy()
    bias[:1] += change
    tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))
    onnx.save(proto, path)
    return path


def test_exact_model(model: Path, lite_weights: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(model), "--reference", str(lite_weights), "--data", str(data), "--fail-below", "90"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "large/0" in output and "small/1" in output and "all 4, change of metrics" in output
    assert output.count("+0.00 %") + output.count("-0.00 %") == 3


def test_errors_are_those_of_the_outputs(model: Path, lite_weights: Path, data: Path, tmp_path: Path) -> None:
    wrong = load_model(edited(model, tmp_path / "wrong.onnx", 0.05))
    reference = load_reference({}, lite_weights)
    (report,) = verify({"wrong": wrong}, reference, find_pairs(data / "small"), progress=False)
    a, b = night_road(size=(48, 64))
    x, y = (np.stack([luma(image)[None]] * 2) for image in (a, b))
    with torch.inference_mode():
        expected = reference(torch.from_numpy(x), torch.from_numpy(y)).numpy()[0, 0]
    errors = 255 * (wrong.run(x, y)[0, 0] - expected)
    row = report.rows[0]
    assert row.picture == "small/0" and row.size == (48, 64)
    assert row.largest == pytest.approx(np.abs(errors).max(), rel=1e-4)
    assert row.mean == pytest.approx(np.abs(errors).mean(), rel=1e-4)
    assert row.psnr == pytest.approx(20 * np.log10(255) - 10 * np.log10(np.square(errors).mean()), abs=1e-3)
    picture = np.rint(255 * (expected - expected.min()) / (expected.max() - expected.min())).astype(np.uint8)
    grey = [np.rint(255 * luma(image)).astype(np.uint8) for image in (a, b)]
    assert row.reference == pytest.approx(evaluate(picture, *grey, metrics=["Qabf", "VIF", "SSIM"]), rel=2e-3)
    assert row.reference != row.metrics and report.psnr == pytest.approx(np.mean([row.psnr for row in report.rows]))
    mean = {name: np.mean([row.metrics[name] for row in report.rows]) for name in row.metrics}
    before = {name: np.mean([row.reference[name] for row in report.rows]) for name in row.metrics}
    assert report.changes == pytest.approx({name: 100 * (mean[name] / before[name] - 1) for name in mean})


def test_other_sizes_are_resized_for_both(model: Path, lite_weights: Path, data: Path) -> None:
    pairs = find_pairs(data / "large")
    (report,) = verify({"m": load_model(model)}, load_reference({}, lite_weights), pairs, progress=False)
    assert [row.size for row in report.rows] == [(48, 64)] * 2 and 90 < report.worst <= report.psnr <= MOST_PSNR


def test_wrong_model_fails(
    model: Path, lite_weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = edited(model, tmp_path / "wrong.onnx", 0.3)
    arguments = [str(model), str(wrong), "--reference", str(lite_weights), "--data", str(data), "--limit", "1"]
    with pytest.raises(SystemExit) as ending:
        main([*arguments, "--fail-below", "60", "--json", str(tmp_path / "out" / "report.json")])
    assert ending.value.code == 1
    error = capsys.readouterr().err
    assert str(wrong) in error and "below the limit of 60 dB" in error and str(model) not in error
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    exact, bad = content["models"]
    assert exact["total"]["psnr"] > 90 and bad["total"]["psnr"] < 60
    assert [row["picture"] for row in bad["rows"]] == ["large/0", "small/0"]
    assert bad["rows"][0]["metrics"].keys() == {"Qabf", "VIF", "SSIM"}


def test_a_batch_that_leaks_is_found(model: Path, lite_weights: Path, data: Path, tmp_path: Path) -> None:
    proto = onnx.load(model)
    proto.graph.node[-1].output[0] = "own"
    axes = numpy_helper.from_array(np.array([0]), "batch_axis")
    proto.graph.initializer.append(axes)
    proto.graph.node.append(onnx.helper.make_node("ReduceMean", ["own", "batch_axis"], ["both"], keepdims=1))
    proto.graph.node.append(onnx.helper.make_node("Concat", ["both", "both"], ["fused"], axis=0))
    onnx.save(proto, tmp_path / "leak.onnx")
    pairs = find_pairs(data / "small", 1)
    (report,) = verify(
        {"m": load_model(tmp_path / "leak.onnx")}, load_reference({}, lite_weights), pairs, progress=False
    )
    assert report.psnr < 50


@pytest.mark.slow
def test_whole_pictures_are_compared_with_the_fusers(lite_weights: Path, data: Path, tmp_path: Path) -> None:
    path = build(lite_weights, tmp_path, "fp32", (0, 0), io="bgr", batch=0)
    exact = build(lite_weights, tmp_path, "fp32", (0, 0), batch=0)
    reference = load_reference({}, lite_weights)
    (report,) = verify({"m": load_model(path)}, reference, find_pairs(data), progress=False)
    assert report.largest <= 1 and report.ssim > 0.999 and report.psnr > 60
    a, b = night_road(size=(48, 64))
    assert np.abs(Fuser(path)(a, b).astype(int) - Fuser(exact)(a, b)).max() <= 1
    wrong = load_model(edited(path, tmp_path / "wrong.onnx", 0.3))
    (report,) = verify({"m": wrong}, reference, find_pairs(data), progress=False)
    assert report.largest > 5 and report.psnr < 55


def test_generated_scenes() -> None:
    pairs = find_pairs(None, 2)
    assert [pair.name for pair in pairs] == ["night road 0", "night road 1"]
    assert pairs[0].load()[0].shape == (480, 640)
    with pytest.raises(InputError, match="a limit of 0 pairs"):
        find_pairs(None, 0)


def test_refuses(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.safetensors"
    save_weights(other, LiteNet().state_dict(), {"network": "LiteNet"})
    cases = {
        (str(model),): "the model was made from weights that are not shipped; name them with --reference",
        ("absent.onnx",): "model absent.onnx is missing",
        (str(other),): "",  # not a model
        (str(model), "--reference", "absent.safetensors"): "absent.safetensors: no such weights file",
        (str(model), "--data", str(tmp_path / "none")): "no such folder",
        (str(model), "--backend", "tensorrt"): "backend tensorrt needs an .engine file",
        (str(model), "--limit", "many"): "argument --limit: invalid int value: 'many' (see export.verify --help)",
    }
    for arguments, message in cases.items():
        assert main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert error.startswith("refusion: ") and error.count("\n") == 1 and message in error


def test_pictures_too_small_for_metrics(model: Path, lite_weights: Path, tmp_path: Path) -> None:
    path = make_onnx(lite_weights, tmp_path / "tiny.onnx", Graph("fp32", (16, 24)))
    (report,) = verify({"m": load_model(path)}, load_reference({}, lite_weights), find_pairs(None, 1), progress=False)
    assert report.changes.keys() == {"Qabf", "SSIM"}  # VIF needs 41 pixels
    assert report.text().split()[-5:] == ["+0.00", "%", "-", "+0.00", "%"]
