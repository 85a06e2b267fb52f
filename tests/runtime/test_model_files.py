"""Which model file is used, and which backend."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import runtime.model_files
from runtime import Fuser
from runtime.backends import choose_backend
from runtime.errors import InputError
from runtime.model_files import MODELS, find_model
from runtime.scenes import night_road
from runtime.tasks import TASKS

EMBEDDED = sorted(path.stem for path in MODELS.glob("*.onnx"))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runtime.model_files, "MODELS", tmp_path)
    for name in ("ivif.onnx", "ivif-lite.onnx", "mif.onnx"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("model", "live", "gpu", "name", "why"),
    [
        ("auto", False, False, "ivif", "auto: stills"),
        ("auto", True, False, "ivif-lite", "auto: live pictures on a CPU"),
        ("auto", True, True, "ivif", "auto: a GPU computes"),
        ("full", True, False, "ivif", "as asked for"),
        ("lite", False, True, "ivif-lite", "as asked for"),
    ],
)
def test_policy(models: Path, model: str, live: bool, gpu: bool, name: str, why: str) -> None:
    assert find_model("ivif", model, live=live, gpu=gpu) == (models / f"{name}.onnx", why)


def test_names_and_paths(models: Path) -> None:
    assert find_model("ivif-lite", live=False, gpu=False)[0] == models / "ivif-lite.onnx"
    assert find_model("x/y.engine", "lite", live=True, gpu=True)[0] == Path("x/y.engine")
    assert find_model("mif", "x/y.onnx", live=True, gpu=False)[0] == Path("x/y.onnx")


@pytest.mark.parametrize(
    ("task", "model", "message"),
    [
        ("mif", "lite", r"no embedded lite model for task 'mif'; .*--model PATH"),
        ("mfif", "auto", r"no embedded full model for task 'mfif'"),
        ("ivif", "tiny", r"unknown model 'tiny'; give auto, full, lite or a path"),
        ("ivif-tiny", "auto", r"unknown model 'ivif-tiny'; give a task \(ivif, mif, mfif, meif\)"),
        ("weights.pth", "auto", r"unknown model 'weights.pth'"),
    ],
)
def test_what_is_not_there(models: Path, task: str, model: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_model(task, model, live=False, gpu=False)


def test_backends_are_chosen_with_a_reason() -> None:
    assert choose_backend("auto", "x.engine") == ("tensorrt", "auto: the model is an engine")
    assert choose_backend("openvino", "x.onnx") == ("openvino", "as asked for")
    assert choose_backend("auto", "x.onnx")[0] in ("onnxruntime", "onnxruntime-cuda")
    for backend, path in (("tensorrt", "x.onnx"), ("onnxruntime", "x.engine")):
        with pytest.raises(
            InputError, match=rf"backend {backend} needs an \.(engine|onnx) file, and the model is {path}"
        ):
            choose_backend(backend, path)


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_embedded_model_fuses_and_says_what_it_is(name: str) -> None:
    task = name.partition("-")[0]
    fuser = Fuser(name, threads=1)
    assert (fuser.model, fuser.task) == (name, task) and task in TASKS
    assert fuser.metadata["input_order"] == "a = {}, b = {}".format(*TASKS[task])
    infrared, visible = night_road(size=(96, 128))
    assert fuser(infrared, visible).shape == visible.shape
    assert fuser.choice.startswith(f"model {name} (as asked for" if "-" in name else f"model {name} (auto: stills")


def test_embedded_models_are_small() -> None:
    assert sum(path.stat().st_size for path in MODELS.glob("*")) < 3_000_000


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
@pytest.mark.parametrize("name", EMBEDDED)
def test_openvino_gives_the_same(name: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 49, 62), dtype=np.float32)
    ours, theirs = (Fuser(name, backend=backend, threads=1) for backend in ("onnxruntime", "openvino"))
    assert theirs.metadata == ours.metadata
    np.testing.assert_allclose(theirs.fuse_luma(a, b), ours.fuse_luma(a, b), rtol=0, atol=2e-5)


@pytest.mark.skipif(importlib.util.find_spec("openvino") is not None, reason="openvino is installed")
def test_missing_openvino_is_one_line() -> None:
    with pytest.raises(InputError, match=r"pip install 'refusion\[openvino\]'"):
        Fuser("ivif", backend="openvino")


def test_two_exposures_in_the_wrong_order_are_swapped(caplog: pytest.LogCaptureFixture) -> None:
    fuser = Fuser("meif", threads=1)
    rng = np.random.default_rng(0)
    dark, bright = rng.integers(0, 90, (40, 48), np.uint8), rng.integers(120, 256, (40, 48), np.uint8)
    right = fuser(dark, bright)
    assert not caplog.records
    np.testing.assert_array_equal(fuser(bright, dark), right)
    assert "a is brighter than b" in caplog.text
