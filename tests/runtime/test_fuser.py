"""Fuser with small models whose answer is known, with every kind of bad input, and with the embedded model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest

from runtime import Fuser, InputError
from runtime.color import chroma, compose, luma
from runtime.model_files import MODELS
from runtime.scenes import night_road

ROOT = Path(__file__).resolve().parents[2]


def make_model(
    path: Path, operation: str = "Max", size: str = "height,width", names: str = "a b fused", batch: str = "1"
) -> Path:
    """A model of one operation on its two inputs."""
    a, b, fused = names.split()
    onnx.save(
        onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["": 18], metadata_props: ["task": "ivif", "precision": "fp32"]>
            tiny (float[{batch},1,{size}] {a}, float[{batch},1,{size}] {b}) => (float[{batch},1,{size}] {fused})
            {{ {fused} = {operation}({a}, {b}) }}"""
        ),
        path,
    )
    return path


@pytest.fixture(scope="module")
def maximum(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "maximum.onnx")


def random_image(shape: tuple[int, ...], dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def test_grey_sources_give_a_grey_picture(maximum):
    a, b = random_image((30, 40)), random_image((30, 40), seed=1)
    fused = Fuser(maximum, range="keep")(a, b)
    assert fused.dtype == np.uint8
    np.testing.assert_array_equal(fused, np.maximum(a, b))
    three = np.repeat(a[..., None], 3, 2)
    np.testing.assert_array_equal(Fuser(maximum, range="keep")(three, b), np.maximum(a, b))


def test_a_is_the_first_source(tmp_path):
    model = make_model(tmp_path / "difference.onnx", "Sub")
    a, b = np.full((5, 6), 200, np.uint8), np.full((5, 6), 50, np.uint8)
    np.testing.assert_array_equal(Fuser(model, range="keep")(a, b), np.full((5, 6), 150))


def test_colour_of_the_visible_source_is_kept(maximum):
    infrared, visible = random_image((30, 40)), random_image((30, 40, 3), seed=1)
    fused = Fuser(maximum, range="keep")(infrared, visible)
    expected = compose(np.maximum(luma(infrared), luma(visible)), chroma(visible))
    assert fused.shape == (30, 40, 3)
    np.testing.assert_array_equal(fused, expected)
    # A dark infrared image changes nothing.
    np.testing.assert_array_equal(Fuser(maximum, range="keep")(np.zeros_like(infrared), visible), visible)
    assert Fuser(maximum, chroma="none")(infrared, visible).shape == (30, 40)


def test_stretch_uses_the_whole_range_and_keep_does_not(maximum):
    a = np.linspace(60, 120, 50).astype(np.uint8).reshape(5, 10)
    assert (Fuser(maximum, range="keep")(a, a) == a).all()
    stretched = Fuser(maximum, range="stretch")(a, a)
    assert stretched.min() == 0 and stretched.max() == 255
    np.testing.assert_allclose(stretched, (a - 60.0) / 60 * 255, atol=0.501)


def test_smooth_range_does_not_jump_with_one_bright_frame(maximum):
    dark, bright = np.full((8, 8), 50, np.uint8), np.full((8, 8), 50, np.uint8)
    dark[0, 0], bright[0, 0] = 100, 250
    dark[1, 1] = bright[1, 1] = 80
    smooth, stretch = Fuser(maximum, range="smooth"), Fuser(maximum, range="stretch")
    jump = {fuser: abs(int(fuser(dark, dark)[1, 1]) - int(fuser(bright, bright)[1, 1])) for fuser in (smooth, stretch)}
    assert jump[stretch] > 100
    assert 0 < jump[smooth] < 50


def test_thermal_counts_are_mapped_by_the_tone_rule(maximum):
    counts = np.linspace(7000, 8000, 48).astype(np.uint16).reshape(6, 8)
    black = np.zeros((6, 8), np.uint8)
    assert Fuser(maximum, range="keep")(counts, black).max() == round(8000 / 65535 * 255)
    for tone in ("7000:8000", (7000, 8000)):
        fused = Fuser(maximum, range="keep", tone=tone)(counts, black)
        np.testing.assert_allclose(fused, (counts - 7000.0) / 1000 * 255, atol=0.501)
    assert Fuser(maximum, range="keep", tone="percentile")(counts, black).max() == 255


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 13), (331, 585)])
def test_any_size(maximum, size):
    a, b = random_image(size), random_image(size, seed=1)
    np.testing.assert_array_equal(Fuser(maximum, range="keep")(a, b), np.maximum(a, b))


def test_views_are_fused_and_sources_are_left_alone(maximum):
    a, b = random_image((40, 60))[::2, ::-1], random_image((60, 20, 3), seed=1).transpose(1, 0, 2)
    a_before, b_before = a.copy(), b.copy()
    fused = Fuser(maximum, range="keep")(a, b)
    np.testing.assert_array_equal(fused, Fuser(maximum, range="keep")(a_before, b_before))
    np.testing.assert_array_equal(a, a_before)
    np.testing.assert_array_equal(b, b_before)


def test_fuse_luma_is_the_network_alone(maximum):
    rng = np.random.default_rng(0)
    a, b = rng.random((9, 8), np.float32) * 0.5, rng.random((9, 8), np.float32) * 0.5
    fused = Fuser(maximum).fuse_luma(a, b)
    assert fused.dtype == np.float32
    np.testing.assert_array_equal(fused, np.maximum(a, b))
    np.testing.assert_array_equal(Fuser(maximum).fuse_luma(a.astype(np.float64), b), np.maximum(a, b))


def test_what_a_fuser_says_of_itself(maximum):
    fuser = Fuser(maximum, threads=1)
    assert (fuser.model, fuser.task, fuser.threads) == ("maximum", "ivif", 1)
    assert fuser.metadata == {"task": "ivif", "precision": "fp32"}


def test_fixed_size_model_names_both_sizes(tmp_path):
    fuser = Fuser(make_model(tmp_path / "fixed.onnx", size="48,64"), range="keep")
    a = random_image((48, 64))
    np.testing.assert_array_equal(fuser(a, a), a)
    with pytest.raises(InputError, match=r"model fixed is built for 64x48 and the images are 64x64"):
        fuser(random_image((64, 64)), random_image((64, 64)))


def test_a_model_for_several_pairs_at_once(tmp_path):
    with pytest.raises(InputError, match=r"takes 4 pairs at once, .* --batch 1 or --batch 0"):
        Fuser(make_model(tmp_path / "four.onnx", batch="4"))
    a = random_image((6, 8))
    np.testing.assert_array_equal(Fuser(make_model(tmp_path / "any.onnx", batch="n"), range="keep")(a, a), a)


@pytest.fixture
def whole_picture(tmp_path: Path) -> Path:
    """A model that takes colour frames and gives one, with range "keep" built in."""
    path = tmp_path / "picture.onnx"
    metadata = '"task": "ivif", "io": "bgr", "range": "keep", "chroma": "auto"'
    frame = "uint8[1,height,width,3]"
    text = f"""<ir_version: 10, opset_import: ["": 18], metadata_props: [{metadata}]>
               tiny ({frame} a, {frame} b) => ({frame} fused) {{ fused = Max(a, b) }}"""
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.mark.parametrize("live", [False, True])
def test_a_model_of_the_whole_picture_keeps_its_policies(whole_picture, live):
    fuser = Fuser(whole_picture, live=live)
    assert (fuser.range, fuser.chroma) == ("keep", "auto")
    a, b = random_image((6, 8)), random_image((6, 8, 3), seed=1)
    np.testing.assert_array_equal(fuser(a, b), np.maximum(a[..., None], b))
    for name, policy in (("range", "smooth"), ("chroma", "a")):
        with pytest.raises(InputError, match=f"has {name} .* built in, not {policy}"):
            Fuser(whole_picture, live=live, **{name: policy})
        with pytest.raises(InputError, match=f"has {name} .* built in, not {policy}"):
            setattr(fuser, name, policy)
    assert (fuser.range, fuser.chroma) == ("keep", "auto")


def test_range_is_smooth_for_live_frames_and_stretch_for_others(maximum):
    assert (Fuser(maximum, live=True).range, Fuser(maximum).range) == ("smooth", "stretch")
    assert Fuser(maximum, live=True, range="stretch").range == "stretch"


GOOD = np.zeros((4, 4), np.uint8)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (GOOD, np.zeros((4, 5), np.uint8), "a is 4x4 and b is 5x4"),
        (np.zeros((5, 4, 3), np.uint8), GOOD, "a is 4x5 and b is 4x4"),
        (GOOD, np.zeros((4, 4), np.float32), "b holds float32 values"),
        (np.full((4, 4), np.nan), GOOD, "a holds float64 values"),
        (np.zeros((4, 4, 4), np.uint8), GOOD, r"a has shape \(4, 4, 4\)"),
        (np.zeros((0, 0), np.uint8), np.zeros((0, 0), np.uint8), "a is empty"),
        (GOOD, None, "b is a NoneType, not a NumPy array"),
    ],
)
def test_bad_images_are_refused_in_one_line(maximum, a, b, message):
    with pytest.raises(InputError, match=message) as error:
        Fuser(maximum)(a, b)
    assert "\n" not in str(error.value)


LUMA = np.full((4, 4), 0.5, np.float32)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (LUMA, np.full((4, 5), 0.5, np.float32), "a is 4x4 and b is 5x4"),
        (np.full((4, 4), np.nan, np.float32), LUMA, "a has values from nan to nan"),
        (LUMA, np.full((4, 4), np.inf, np.float32), "b has values from inf to inf"),
        (LUMA, np.full((4, 4), 1.5, np.float32), r"b has values from 1.5 to 1.5; give finite values in \[0, 1\]"),
        (LUMA, -LUMA, "b has values from -0.5"),
        (GOOD, LUMA, r"a is uint8 \(4, 4\)"),
        (LUMA, np.zeros((4, 4, 1), np.float32), r"b is float32 \(4, 4, 1\)"),
        (np.zeros((0, 4), np.float32), LUMA, "a is empty"),
        ([[0.5]], LUMA, "a is list"),
    ],
)
def test_bad_luma_is_refused_in_one_line(maximum, a, b, message):
    with pytest.raises(InputError, match=message) as error:
        Fuser(maximum).fuse_luma(a, b)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tpu"}, "unknown backend 'tpu'; choose from auto, onnxruntime"),
        ({"range": "wide"}, "unknown range policy 'wide'; choose from stretch, keep, smooth"),
        ({"chroma": "red"}, "unknown chroma policy 'red'"),
        ({"tone": "bright"}, "tone 'bright' is not understood"),
        ({"tone": (9, 9)}, "tone range 9:9"),
        ({"threads": 0}, "the number of threads is 0"),
        ({"warm_size": (0, 5)}, "warm-up size 5x0 is empty"),
    ],
)
def test_bad_options_are_refused(maximum, options, message):
    with pytest.raises(InputError, match=message):
        Fuser(maximum, **options)


def test_cuda_is_refused_where_onnxruntime_has_none(maximum):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(InputError, match="no CUDAExecutionProvider; install onnxruntime-gpu"):
        Fuser(maximum, backend="onnxruntime-cuda")


def test_bad_model_files_are_refused_in_one_line(tmp_path, capfd):
    whole = make_model(tmp_path / "whole.onnx").read_bytes()
    files = {
        "empty.onnx": (b"", "cannot be loaded"),
        "text.onnx": (b"hello", "cannot be loaded"),
        "truncated.onnx": (whole[: len(whole) // 2], "cannot be loaded"),
    }
    for name, (data, message) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=f"{name} {message}") as error:
            Fuser(tmp_path / name)
        assert "\n" not in str(error.value)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(InputError, match=r"folder\.onnx is not a file"):
        Fuser(tmp_path / "folder.onnx")
    with pytest.raises(InputError, match=r"nowhere\.onnx is missing"):
        Fuser(tmp_path / "nowhere.onnx")
    with pytest.raises(InputError, match=r"unknown model 'x.pth'; give a task \(ivif, mif, mfif, meif\) or a path"):
        Fuser("x.pth")
    assert capfd.readouterr() == ("", "")


def test_model_of_another_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match="inputs x, y and outputs fused; a fusion model has inputs a, b"):
        Fuser(make_model(tmp_path / "names.onnx", names="x y fused"))
    with pytest.raises(InputError, match="outputs sum; a fusion model"):
        Fuser(make_model(tmp_path / "output.onnx", names="a b sum"))


def test_runtime_imports_no_torch_and_little_at_first(maximum):
    code = f"""
import sys
import runtime
assert not {{"cv2", "onnxruntime"}} & set(sys.modules), "importing runtime is not quick"
import numpy as np
runtime.Fuser({str(maximum)!r})(np.zeros((8, 8), np.uint8), np.ones((8, 8, 3), np.uint8))
ours = {{"torch", "triton", "refusion", "kernels", "export"}} & set(sys.modules)
assert not ours, ours
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.fixture(scope="module")
def ivif() -> Fuser:
    if not (MODELS / "ivif.onnx").exists():
        pytest.skip("no embedded model runtime/models/ivif.onnx yet")
    return Fuser("ivif")


def test_embedded_model_shows_what_only_one_camera_sees(ivif):
    infrared, visible = night_road(size=(240, 320))
    fused = ivif(infrared, visible)
    assert fused.shape == visible.shape
    brightness = luma(fused)
    hot = (infrared > 200) & (luma(visible) < 0.25)
    assert hot.sum() > 200
    assert brightness[hot].mean() > luma(visible)[hot].mean() + 0.3
    # The lit windows and signs of the visible picture keep their edges, and their colour.
    edges = [np.abs(cv2.Laplacian(picture, cv2.CV_32F)) for picture in (luma(visible), brightness)]
    text = edges[0] > np.percentile(edges[0], 99)
    assert edges[1][text].mean() > 0.5 * edges[0][text].mean()
    saturated = np.abs(chroma(visible)).max(2) > 0.1
    assert np.corrcoef(chroma(fused)[saturated].ravel(), chroma(visible)[saturated].ravel())[0, 1] > 0.9


def test_embedded_model_names_its_task(ivif):
    assert ivif.task == "ivif"
    assert ivif.metadata["input_order"]
