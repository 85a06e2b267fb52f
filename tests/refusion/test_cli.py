"""The command line as a user runs it: what it writes, and what it says and leaves behind when something is wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest

from refusion import __version__
from runtime.color import chroma, compose, luma
from runtime.model_files import MODELS

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model whose answer is known: fused = max(a, b)."""
    path = tmp_path_factory.mktemp("models") / "maximum.onnx"
    onnx.save(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["": 18], metadata_props: ["task": "ivif"]>
            tiny (float[1,1,height,width] a, float[1,1,height,width] b) => (float[1,1,height,width] fused)
            { fused = Max(a, b) }"""
        ),
        path,
    )
    return path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `python -m refusion ...` in a folder of its own."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "refusion", *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    return run


def random_image(shape: tuple[int, ...], seed: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def write(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """An infrared and a visible file."""
    return (
        write(tmp_path / "ir.png", random_image((24, 32), 1)),
        write(tmp_path / "vis.png", random_image((24, 32, 3), 2)),
    )


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three pairs."""
    for number in range(3):
        write(tmp_path / f"a/{number}.png", random_image((24, 32), number))
        write(tmp_path / f"b/{number}.bmp", random_image((24, 32, 3), 10 + number))
    return tmp_path / "a", tmp_path / "b"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_refused(done: subprocess.CompletedProcess, message: str) -> None:
    """Exit code 2 and one line on stderr."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert re.fullmatch(r"refusion: [^\n]+\n", done.stderr), done.stderr
    assert re.search(message, done.stderr), done.stderr


def expected(a: Path, b: Path) -> np.ndarray:
    infrared, visible = (cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (a, b))
    return compose(np.maximum(luma(infrared), luma(visible)), chroma(visible))


def test_version_and_help_need_no_packages(run):
    assert run("--version").stdout == f"refusion {__version__}\n"
    done = run("--help")
    assert done.returncode == 0 and "fuse" in done.stdout and "demo" in done.stdout
    code = "import refusion.cli, sys; print({'torch', 'cv2', 'numpy', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_fuse_two_files(run, tmp_path, model, pair):
    done = run("fuse", *pair, "-o", "out/fused.png", "--model", model, "--range", "keep", "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.fullmatch(
        r"fused picture: out/fused\.png \(\d+\.\d\d s a pair, .*, 1 thread, model maximum "
        r"\(as asked for\), backend onnxruntime.*\)\n",
        done.stdout,
    )
    assert files(tmp_path / "out") == {"fused.png"}
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "out/fused.png")), expected(*pair))


def test_fuse_two_files_into_a_folder(run, tmp_path, model, pair):
    assert run("fuse", *pair, "-o", "out", "--model", model, "--format", "tiff").returncode == 0
    assert files(tmp_path / "out") == {"ir.tiff"}


@pytest.mark.parametrize("suffix", ["jpg", "tiff", "bmp"])
def test_suffix_names_the_format(run, tmp_path, model, pair, suffix):
    assert run("fuse", *pair, "-o", f"fused.{suffix}", "--model", model).returncode == 0
    assert cv2.imread(str(tmp_path / f"fused.{suffix}")).shape == (24, 32, 3)


def test_fuse_two_folders(run, tmp_path, model, folders):
    done = run("fuse", *folders, "-o", "out", "--model", model, "--range", "keep")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fused pictures: 3 in out (")
    assert files(tmp_path / "out") == {"0.png", "1.png", "2.png"}
    for number in range(3):
        fused = cv2.imread(str(tmp_path / f"out/{number}.png"))
        np.testing.assert_array_equal(fused, expected(folders[0] / f"{number}.png", folders[1] / f"{number}.bmp"))


def test_side_by_side(run, tmp_path, model, folders, pair):
    assert run("fuse", *folders, "-o", "out", "--model", model, "--side-by-side", "--format", "png").returncode == 0
    assert files(tmp_path / "out") == {
        f"{folder}{number}.png" for folder in ("", "side_by_side/") for number in range(3)
    }
    panel = cv2.imread(str(tmp_path / "out/side_by_side/1.png"))
    assert panel.shape == (24 + 24, 3 * 32, 3)
    np.testing.assert_array_equal(panel[24:, 32:64], cv2.imread(str(folders[1] / "1.bmp")))
    np.testing.assert_array_equal(panel[24:, 64:], cv2.imread(str(tmp_path / "out/1.png")))
    assert run("fuse", *pair, "-o", "one/x.png", "--model", model, "--side-by-side").returncode == 0
    assert files(tmp_path / "one") == {"x.png", "x_side_by_side.png"}


def test_chroma_and_tone(run, tmp_path, model):
    counts = np.linspace(7000, 8000, 24 * 32).astype(np.uint16).reshape(24, 32)
    a, b = write(tmp_path / "raw.png", counts), write(tmp_path / "vis.png", random_image((24, 32, 3), 2) // 16)
    options = ("--model", model, "--range", "keep", "--chroma", "none")
    done = run("fuse", a, b, "-o", "full.png", *options)
    assert done.returncode == 0
    assert re.fullmatch(r"refusion: .*raw\.png uses only 7000\.\.8000 of its 16 bits.*--tone.*\n", done.stderr)
    assert cv2.imread(str(tmp_path / "full.png"), cv2.IMREAD_UNCHANGED).max() < 40
    done = run("fuse", a, b, "-o", "mapped.png", *options, "--tone", "7000:8000")
    assert (done.returncode, done.stderr) == (0, "")
    fused = cv2.imread(str(tmp_path / "mapped.png"), cv2.IMREAD_UNCHANGED)
    assert fused.shape == (24, 32) and fused.max() == 255


def test_demo(run, tmp_path, model):
    done = run("demo", "--model", model)
    assert (done.returncode, done.stderr) == (0, "")
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"fused picture: out/demo/fused\.png \(\d+\.\d\d s a frame, 640x480, \d+ threads?, model maximum "
        r"\(as asked for\), backend .*\)",
        last,
    )
    pictures = {f"out/demo/{name}.png" for name in ("infrared", "visible", "fused", "side_by_side")}
    assert files(tmp_path) == pictures | {"out/demo/clip.mp4"}
    assert cv2.imread(str(tmp_path / "out/demo/fused.png")).shape == (480, 640, 3)
    clip = cv2.VideoCapture(str(tmp_path / "out/demo/clip.mp4"))
    assert clip.get(cv2.CAP_PROP_FRAME_COUNT) == 100 and clip.read()[1].shape == (504, 1920, 3)


def test_demo_with_the_embedded_model(run, tmp_path):
    if not (MODELS / "ivif.onnx").exists():
        pytest.skip("no embedded model runtime/models/ivif.onnx yet")
    done = run("demo", "-o", "pictures")
    assert (done.returncode, done.stderr) == (0, "")
    still, clip = done.stdout.splitlines()[-1], done.stdout.splitlines()[-2]
    assert "model ivif (auto: stills)" in still and (tmp_path / "pictures/fused.png").exists()
    assert "model ivif-lite (auto: live pictures on a CPU)" in clip and (tmp_path / "pictures/clip.mp4").exists()


def test_fuse_and_demo_import_no_torch(tmp_path, model, pair):
    code = f"""
import sys
from refusion.cli import main
assert main(["fuse", {str(pair[0])!r}, {str(pair[1])!r}, "-o", "x.png", "--model", {str(model)!r}]) == 0
assert main(["demo", "-o", "demo", "--model", {str(model)!r}]) == 0
assert not {{"torch", "triton", "kernels"}} & set(sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)


def bad_file(folder: Path, kind: str) -> Path:
    """A path that can't be read as an image of 32x24, of one of several kinds."""
    path = folder / "bad.png"
    whole = cv2.imencode(".png", random_image((24, 32, 3), 5))[1].tobytes()
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"zero": b"", "truncated": whole[:-200], "text": b"no image\n", "damaged": whole[:60]}[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"bad\.png: no such file"),
        ("zero", r"bad\.png: the file is empty"),
        ("truncated", r"bad\.png: truncated"),
        ("damaged", r"bad\.png: truncated or damaged"),
        ("text", r"bad\.png: not an image"),
        ("directory", r"bad\.png is a folder and .*ir\.png a file"),
    ],
)
def test_bad_file_is_refused(run, model, pair, kind, message):
    tmp_path = pair[0].parent
    bad = bad_file(tmp_path, kind)
    before = files(tmp_path)
    assert_refused(run("fuse", pair[0], bad, "-o", "out/x.png", "--model", model), message)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (random_image((24, 33, 3), 1), r"a = .*ir\.png, b = .*other\.tiff: a is 32x24 and b is 33x24"),
        (np.full((24, 32), np.nan, np.float32), r"other\.tiff: the image has NaN"),
        (np.full((24, 32), -7, np.int16), r"other\.tiff: int16 pixels"),
    ],
)
def test_file_of_another_size_or_type_is_refused(run, model, pair, image, message):
    tmp_path = pair[0].parent
    other = write(tmp_path / "other.tiff", image)
    before = files(tmp_path)
    assert_refused(run("fuse", pair[0], other, "-o", "x.png", "--model", model), message)
    assert files(tmp_path) == before


@pytest.mark.parametrize("kind", ["zero", "truncated", "text"])
def test_one_bad_file_refuses_the_folder_before_anything_is_written(run, tmp_path, model, folders, kind):
    bad = bad_file(folders[1], kind)
    write(folders[0] / "bad.png", random_image((24, 32), 9))
    assert_refused(run("fuse", *folders, "-o", "out", "--model", model), f"{bad.name}.*--skip-bad")
    assert not (tmp_path / "out").exists()
    done = run("fuse", *folders, "-o", "out", "--model", model, "--skip-bad")
    assert done.returncode == 0
    assert re.fullmatch(r"refusion: skipped: .*bad\.png[^\n]*\n", done.stderr)
    assert files(tmp_path / "out") == {"0.png", "1.png", "2.png"}


def test_unequal_and_unmatched_files_of_a_folder(run, tmp_path, model, folders):
    write(folders[1] / "1.bmp", random_image((24, 30, 3), 4))
    assert_refused(run("fuse", *folders, "-o", "out", "--model", model), r"1\.png.*1\.bmp: a is 32x24 and b is 30x24")
    (folders[1] / "2.bmp").unlink()
    assert_refused(run("fuse", *folders, "-o", "out", "--model", model), r"2\.png has no partner")
    done = run("fuse", *folders, "-o", "out", "--model", model, "--skip-bad")
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 2
    assert done.stdout.startswith("fused picture: out/0.png (")
    assert files(tmp_path / "out") == {"0.png"}


def test_nothing_left_after_skipping(run, tmp_path, model, pair):
    done = run("fuse", pair[0], bad_file(tmp_path, "zero"), "-o", "x.png", "--model", model, "--skip-bad")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "refusion: every pair was skipped; nothing is left to fuse"


def test_empty_folders(run, tmp_path, model):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert_refused(run("fuse", "a", "b", "-o", "out", "--model", model), "no image pairs in a and b")


def test_an_output_never_replaces_a_source(run, tmp_path, model, pair, folders):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "link").symlink_to(folders[0])
    for a, b, out, message in (
        (*pair, "ir.png", "output ir.png would replace a source"),
        (*pair, "./a/../vis.png", "would replace a source"),
        (folders[0] / "0.png", folders[1] / "0.bmp", folders[0], "would replace a source"),
        (*folders, "a", "output a is a folder of sources"),
        (*folders, "link", "output link is a folder of sources"),
        (*folders, folders[1], "is a folder of sources"),
    ):
        assert_refused(run("fuse", a, b, "-o", out, "--model", model), message)
    assert {path: path.read_bytes() for path in before} == before
    assert files(tmp_path) == {str(path.relative_to(tmp_path)) for path in before}


def test_outputs_that_cannot_be_written(run, tmp_path, model, pair, folders):
    (tmp_path / "file").write_text("in the way")
    before = files(tmp_path)
    for sources, out, message in (
        (pair, "x.gif", r"x\.gif: cannot write images with the suffix '\.gif'"),
        (pair, "file/x.png", r"file/x\.png: cannot be written"),
        (folders, "file", "output file is a file; for two folders give a folder"),
    ):
        assert_refused(run("fuse", *sources, "-o", out, "--model", model), message)
    assert_refused(run("demo", "-o", "file", "--model", model), r"file/infrared\.png: cannot be written")
    (tmp_path / "x.png").mkdir()
    assert_refused(run("fuse", *pair, "-o", "x.png/vis.png/y.png", "--format", "jpg", "--model", model), "disagree")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("melt",), "invalid choice: 'melt'"),
        (("fuse", "a.png", "-o", "x.png"), r"required: B \(see refusion fuse --help\)"),
        (("fuse", "a.png", "b.png"), "required: -o/--out"),
        (("fuse", "a.png", "b.png", "-o", "x.png", "--fast"), "unrecognized arguments: --fast"),
        (("demo", "--task", "sonar"), "invalid choice: 'sonar'"),
        (("demo", "--threads", "two"), "invalid int value: 'two'"),
        (("demo", "--threads", "0"), "the number of threads is 0"),
        (("demo", "--range", "wide"), "unknown range policy 'wide'"),
        (("demo", "--chroma", "red"), "unknown chroma policy 'red'"),
        (("demo", "--tone", "5:1"), "tone range 5:1 must rise"),
        (("demo", "--model", "nowhere.onnx"), "model nowhere.onnx is missing"),
        (("demo", "--model", "weights.pth"), "unknown model 'weights.pth'"),
        (("demo", "--task", "mif", "--model", "MODEL"), "is for task ivif, not mif"),
        (("fuse", "MODEL", "MODEL", "-o", "x.png", "--model", "MODEL"), "not an image"),
        (("fuse", "MODEL", "MODEL", "-o", "x.png", "--model", "MODEL", "--format", "gif"), "unknown format 'gif'"),
    ],
)
def test_wrong_use_is_refused(run, tmp_path, model, arguments, message):
    extra = () if "--model" in arguments or arguments[:1] != ("demo",) else ("--model", model)
    assert_refused(run(*(model if a == "MODEL" else a for a in arguments), *extra), message)
    assert files(tmp_path) == set()


def test_interrupt_ends_quietly(tmp_path, model):
    for number in range(400):
        for folder in "ab":
            write(tmp_path / f"{folder}/{number}.png", random_image((200, 200), number))
    command = [sys.executable, "-m", "refusion", "fuse", "a", "b", "-o", "out", "--model", str(model)]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job inherits SIGINT ignored; a user's terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "refusion: interrupted\n"
    written = files(tmp_path / "out")
    assert len(written) < 400
    assert all(re.fullmatch(r"\d+\.png", name) for name in written)
    assert all(cv2.imread(str(tmp_path / "out" / name)) is not None for name in written)


def test_eval_of_folders_and_of_models_agree(run, tmp_path, model):
    """Pictures that `fuse` wrote and a model that fuses on the way give one table; files and pictures are written."""
    for number in range(3):
        smooth = [cv2.GaussianBlur(random_image((64, 80), 10 * number + side), (0, 0), 3) for side in range(2)]
        write(tmp_path / f"pairs/a/{number}.png", smooth[0])
        write(tmp_path / f"pairs/b/{number}.png", smooth[1])
    assert run("fuse", "pairs/a", "pairs/b", "-o", "out", "--model", model).returncode == 0
    of_files = run(
        "eval", "pairs/a", "pairs/b", "out", "--metrics", "Qabf,VIF,SSIM", "--csv", "x.csv", "--json", "x.json"
    )
    of_model = run("eval", "--data", "pairs", "--model", model, "--metrics", "Qabf,VIF,SSIM", "--pictures", "pictures")
    assert (of_files.returncode, of_files.stderr) == (0, "") and of_model.returncode == 0
    assert of_files.stdout.splitlines()[0] == "metrics in the tdfusion convention, 3 pairs"
    numbers = [re.findall(r"\d\.\d{4}", done.stdout) for done in (of_files, of_model)]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 3
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 4 and (tmp_path / "x.json").stat().st_size > 100
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_eval_of_weights_equals_their_network(run, tmp_path):
    """Weights become an ONNX model on the way."""
    pytest.importorskip("onnxscript", reason="needs the extra 'export'")
    torch = pytest.importorskip("torch", reason="needs the extra 'export'")
    from refusion.model import FusionNet
    from refusion.weights import save_weights

    for side in range(2):
        write(tmp_path / f"pairs/{'ab'[side]}/x.png", cv2.GaussianBlur(random_image((64, 80), side), (0, 0), 3))
    torch.manual_seed(0)
    save_weights(tmp_path / "net.safetensors", FusionNet().state_dict(), {"task": "ivif"})
    done = run("eval", "--data", "pairs", "--model", "net.safetensors", "--metrics", "SSIM")
    assert done.returncode == 0, done.stderr
    assert re.search(r"net\.safetensors\s+0\.\d{4}", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("eval",), "give either A B FUSED, or --data DIR and --model M"),
        (("eval", "a", "b"), "give either A B FUSED"),
        (("eval", "a", "b", "absent"), "absent"),
        (("eval", "--data", "absent", "--model", "ivif.onnx"), "ivif.onnx"),
        (("eval", "a", "b", "a", "--metrics", "XYZ"), "XYZ"),
        (("eval", "a", "b", "a", "--convention", "mine"), "mine"),
        (("eval", "a", "b", "a", "--limit", "0"), "limit of 0"),
        (("train", "--epochs", "0"), "'epochs' is 0"),
        (("train", "--config", "absent.toml"), "absent.toml"),
        (("train",), "give --data DIR"),
        (("train", "--wrong-flag", "1"), "--wrong-flag"),
    ],
)
def test_wrong_eval_and_train_are_one_line(run, tmp_path, folders, arguments, words):
    before = files(tmp_path)
    done = run(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr
    assert done.stdout == "" and files(tmp_path) == before
