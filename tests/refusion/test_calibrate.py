"""`refusion calibrate` as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from runtime.alignment.fields import corner_distance
from runtime.alignment.material import read_pairs
from runtime.calibration import load_calibration
from runtime.register import Registration
from runtime.scenes import night_road

ROOT = Path(__file__).resolve().parents[2]
SIZE = (240, 320)
# Pixels of the visible camera -> pixels of the infrared one, which has 260x190.
MOVE = np.array([[0.93, 0.02, -28.0], [-0.02, 0.93, -10.0], [0, 0, 1]])
SIZE_A = (190, 260)

Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `python -m refusion calibrate ...` in a folder of its own."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "refusion", "calibrate", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    return run


def pair(number: int) -> tuple[np.ndarray, np.ndarray]:
    infrared, visible = night_road(90 * number, SIZE, seed=number)
    return cv2.warpPerspective(infrared, MOVE, SIZE_A[::-1]), visible


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    for name in "ab":
        (tmp_path / name).mkdir()
    for number in range(3):
        for name, image in zip("ab", pair(number), strict=True):
            cv2.imwrite(str(tmp_path / name / f"{number}.png"), image)
    return "a", "b"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_right(path: Path, pixels: float = 1.5) -> None:
    calibration = load_calibration(path)
    assert (calibration.a.size, calibration.b.size) == (SIZE_A, SIZE)
    assert corner_distance(calibration.homography, np.linalg.inv(MOVE), SIZE_A) < pixels


def assert_refused(done: subprocess.CompletedProcess, words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr


def test_folders_of_pictures(run, tmp_path, folders):
    done = run(*folders, "-o", "new/rig.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert_right(tmp_path / "new/rig.yaml")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("targetless calibration from 3 pairs")
    assert [line.split()[0] for line in lines[1:6]] == ["cameras", "estimate", "common", "uncertainty", "trust"]
    assert lines[1].split(maxsplit=1)[1] == "A 260x190, B 320x240"
    assert lines[-2:] == ["calibration: new/rig.yaml", "look at it before you rely on it: new/rig.png"]
    # Two rows of before and after, each under its caption.
    assert cv2.imread(str(tmp_path / "new/rig.png")).shape == (2 * (24 + 240), 2 * 320, 3)
    calibration = load_calibration(tmp_path / "new/rig.yaml")
    assert calibration.uncertainty is not None and 0 < calibration.uncertainty < 8
    aligned, _ = Registration(calibration)(*pair(7))
    infrared, _ = night_road(630, SIZE, seed=7)
    registration = Registration(calibration)
    inside = cv2.erode(registration.mask, np.ones((9, 9), np.uint8)) > 0
    assert np.abs(aligned.astype(int) - infrared)[inside].mean() < 3


def test_one_pair_and_the_fields_of_view(run, tmp_path, folders):
    # The infrared camera's 260 pixels are of a field of view of 47.4 degrees where b's 320 are of 53.
    done = run("a/1.png", "b/1.png", "--fov", 47.4, 53, "-o", "rig.yaml", "--no-picture")
    assert (done.returncode, done.stderr) == (0, "")
    assert_right(tmp_path / "rig.yaml", 2.5)
    assert not (tmp_path / "rig.png").exists()


def test_videos(run, tmp_path):
    for number, name in enumerate(("a.avi", "b.avi")):
        size = (SIZE_A, SIZE)[number]
        writer = cv2.VideoWriter(str(tmp_path / name), cv2.VideoWriter_fourcc(*"MJPG"), 10, size[::-1])
        for frame in range(6):
            image = pair(frame)[number]
            writer.write(image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2BGR))
        writer.release()
    done = run("a.avi", "b.avi", "-o", "rig.yaml", "--frames", 3, "--picture", "seen.jpg")
    assert (done.returncode, done.stderr) == (0, "")
    assert_right(tmp_path / "rig.yaml")
    assert files(tmp_path) == {"a.avi", "b.avi", "rig.yaml", "seen.jpg"}


def test_thermal_counts_of_a_video_keep_their_16_bits(tmp_path):
    av = pytest.importorskip("av", reason="needs the extra 'stream'")
    pictures = np.random.default_rng(0).integers(0, 16384, (6, 96, 128)).astype(np.uint16)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=9)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "gray16le"
        frames = [av.VideoFrame.from_ndarray(picture, format="gray16le") for picture in pictures]
        for frame in [*frames, None]:
            container.mux(stream.encode(frame))
    read = read_pairs(str(tmp_path / "a.mkv"), str(tmp_path / "a.mkv"), 3)
    assert [image.dtype for image in read.a] == [np.uint16] * 3
    assert all(any(np.array_equal(image, picture) for picture in pictures) for image in read.a)


def test_cameras_by_uri(run, tmp_path):
    """The generated scene's two cameras are aligned."""
    done = run("demo://night/infrared", "demo://night/visible", "-o", "rig.yaml", "--frames", 2, "--no-picture")
    assert (done.returncode, done.stderr) == (0, "")
    calibration = load_calibration(tmp_path / "rig.yaml")
    assert corner_distance(calibration.homography, np.eye(3), calibration.a.size) < 2


def ros_file(path: Path, size: tuple[int, int], focal: float) -> None:
    height, width = size
    values = {
        "image_width": width,
        "image_height": height,
        "camera_matrix": {"rows": 3, "cols": 3, "data": [focal, 0, width / 2, 0, focal, height / 2, 0, 0, 1]},
        "distortion_model": "plumb_bob",
        "distortion_coefficients": {"rows": 1, "cols": 5, "data": [-0.05, 0, 0, 0, 0]},
    }
    path.write_text(yaml.safe_dump(values))


def test_intrinsics_of_ros_with_pictures_of_a_scene(run, tmp_path, folders):
    """The homography is then between undistorted pixels, and the lenses are in the file."""
    ros_file(tmp_path / "ros_a.yaml", SIZE_A, 300)
    ros_file(tmp_path / "ros_b.yaml", SIZE, 320)
    done = run(*folders, "--from-ros", "ros_a.yaml", "ros_b.yaml", "-o", "rig.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    calibration = load_calibration(tmp_path / "rig.yaml")
    assert calibration.a.distortion == calibration.b.distortion == (-0.05, 0, 0, 0, 0)
    registration = Registration(calibration)
    # Both lenses' distortions nearly cancel; a's picture still comes where the undistorted truth has it.
    infrared, _ = night_road(630, SIZE, seed=7)
    aligned, _ = registration(*pair(7))
    inside = cv2.erode(registration.mask, np.ones((9, 9), np.uint8)) > 0
    assert np.abs(aligned.astype(int) - infrared)[inside].mean() < 4


def kalibr_file(path: Path) -> None:
    camera = {"camera_model": "pinhole", "distortion_model": "none", "resolution": [320, 240]}
    second = np.eye(4)
    second[0, 3] = 0.1
    values = {
        "cam0": {**camera, "intrinsics": [300.0, 300.0, 160.0, 120.0]},
        "cam1": {**camera, "intrinsics": [300.0, 300.0, 160.0, 120.0], "T_cn_cnm1": second.tolist()},
    }
    path.write_text(yaml.safe_dump(values))


def test_kalibr_file_at_a_distance(run, tmp_path):
    """Equal cameras side by side: f b / d = 300 x 0.1 / 6 = 5 pixels to the right at 6 m."""
    kalibr_file(tmp_path / "camchain.yaml")
    done = run("--from-kalibr", "camchain.yaml", "--distance", 6, "-o", "rig.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert np.allclose(load_calibration(tmp_path / "rig.yaml").homography, [[1, 0, 5], [0, 1, 0], [0, 0, 1]])
    assert "6 m, baseline 100 mm; out of place by 5.0 px at 3 m, 2.5 px at 12 m, 5.0 px at infinity" in done.stdout
    assert files(tmp_path) == {"camchain.yaml", "rig.yaml"}
    back = run("--from-kalibr", "camchain.yaml", "--kalibr-cameras", "cam1", "cam0", "--distance", 6, "-o", "back.yaml")
    assert back.returncode == 0
    assert np.allclose(load_calibration(tmp_path / "back.yaml").homography, [[1, 0, -5], [0, 1, 0], [0, 0, 1]])


def test_chessboard(run, tmp_path):
    """A board drawn flat, of inverted contrast in the infrared pictures."""
    squares = (np.indices((6, 8)).sum(axis=0) % 2).astype(np.uint8)
    board = np.kron(squares, np.ones((20, 20), np.uint8)) * 200 + 20
    for number, (top, left) in enumerate(((20, 45), (55, 130), (88, 70))):
        visible = np.full((240, 320), 240, np.uint8)
        visible[top : top + board.shape[0], left : left + board.shape[1]] = board
        visible = cv2.GaussianBlur(visible, (0, 0), 1)
        infrared = 255 - cv2.warpPerspective(visible, MOVE, SIZE_A[::-1], borderMode=cv2.BORDER_REPLICATE)
        for name, image in (("a", infrared), ("b", visible)):
            (tmp_path / name).mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / name / f"{number}.png"), image)
    done = run("a", "b", "--target", "chessboard:7x5", "-o", "rig.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert_right(tmp_path / "rig.yaml", 0.5)
    assert "chessboard 7x5 found by both in 3 of 3 pairs" in done.stdout and "px of B (RMS)" in done.stdout
    assert_refused(run("a", "b", "--target", "chessboard:9x6", "-o", "x.yaml"), "was found by both cameras in 0 of 3")
    assert_refused(
        run("a", "b", "--target", "chessboard:7x5", "--distance", 3, "-o", "x.yaml"), "give the board's --square"
    )
    assert not (tmp_path / "x.yaml").exists() and not (tmp_path / "x.png").exists()


def test_an_estimate_that_cannot_be_trusted_writes_nothing(run, tmp_path, folders):
    noise = np.random.default_rng(0).integers(0, 256, (3, *SIZE)).astype(np.uint8)
    for number, image in enumerate(noise):
        cv2.imwrite(str(tmp_path / f"b/{number}.png"), cv2.GaussianBlur(image, (0, 0), 3) * 4)
    before = files(tmp_path)
    done = run(*folders, "-o", "rig.yaml")
    assert_refused(done, "no estimate that can be trusted from 3 pairs: ")
    assert "give more pairs" in done.stderr
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "the following arguments are required: -o/--out"),
        (("-o", "x.yaml"), "give A and B, pictures of both cameras, or --from-kalibr FILE --distance METRES"),
        (("a", "-o", "x.yaml"), "give both A and B"),
        (("a", "b", "-o", "x.txt"), "the calibration is a YAML file"),
        (("a", "b", "-o", "a"), "the calibration is a YAML file"),
        (("a", "b", "-o", "folder.yaml"), "folder.yaml: a folder"),
        (("a", "b", "-o", "x.yaml", "--picture", "x.gif"), "cannot write images with the suffix '.gif'"),
        (("a", "absent", "-o", "x.yaml"), "absent: no such file or folder"),
        (("a", "b/0.png", "-o", "x.yaml"), "a is a folder and b/0.png is an image"),
        (("a/0.png", "b/0.png", "-o", "0.yaml", "--picture", "b/0.png"), "output b/0.png would replace a source"),
        (("kalibr.yaml", "b/0.png", "-o", "x.yaml"), "kalibr.yaml is a video and b/0.png is an image"),
        (("kalibr.yaml", "kalibr.yaml", "-o", "x.yaml"), "kalibr.yaml: neither an image nor a video"),
        (("v4l2:///dev/none", "b", "-o", "x.yaml"), "is a camera and b is a folder"),
        (("a", "b", "-o", "x.yaml", "--frames", "0"), "the number of frames is 0"),
        (("a", "b", "-o", "x.yaml", "--fov", "0", "50"), "field of view of 0 degrees"),
        (("a", "b", "-o", "x.yaml", "--roll", "90"), "make no range to search"),
        (("a", "b", "-o", "x.yaml", "--square", "20"), "give --target too"),
        (("a", "b", "-o", "x.yaml", "--target", "cross"), "target 'cross' is not understood"),
        (("a", "b", "-o", "x.yaml", "--distance", "5"), "--distance needs the position of the cameras"),
        (("--from-kalibr", "kalibr.yaml", "-o", "kalibr.yaml"), "output kalibr.yaml would replace a source"),
        (("--from-kalibr", "kalibr.yaml", "-o", "x.yaml"), "give --distance METRES"),
        (("--from-kalibr", "kalibr.yaml", "--distance", "-1", "-o", "x.yaml"), "the working distance is -1 m"),
        (("--from-kalibr", "kalibr.yaml", "--from-ros", "x", "y", "-o", "x.yaml"), "give one of them"),
        (
            ("a", "b", "--from-kalibr", "kalibr.yaml", "--distance", "3", "-o", "x.yaml"),
            "camera a was calibrated at 320x240",
        ),
        (("--from-ros", "absent", "absent", "-o", "x.yaml"), "absent: no such file"),
        (("a", "b", "-o", "a/0.png/x.yaml"), "cannot be written"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_line(run, tmp_path, folders, arguments, words):
    kalibr_file(tmp_path / "kalibr.yaml")
    (tmp_path / "folder.yaml").mkdir()
    before = files(tmp_path)
    assert_refused(run(*arguments), words)
    assert files(tmp_path) == before


def test_pictures_of_a_camera_must_have_one_size(run, tmp_path, folders):
    cv2.imwrite(str(tmp_path / "b/1.png"), np.zeros((200, 300), np.uint8))
    assert_refused(run(*folders, "-o", "x.yaml"), "1 of camera b is 300x200 and the others are 320x240")
