"""Reading and writing image files, and matching the pairs of two folders."""

from __future__ import annotations

import io
import logging
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from runtime.errors import InputError
from runtime.images import Pair, check_writable, find_pair_folders, find_pairs, read_image, write_image

LOSSLESS = [".png", ".tif", ".tiff", ".bmp", ".webp", ".PNG"]
HEIGHT, WIDTH = 37, 53


@pytest.fixture
def grey() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), np.uint8)


@pytest.fixture
def colour() -> np.ndarray:
    """Smooth, so that JPEG comes close to it: blue rises to the right, green downwards, red falls to the right."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.dstack([x * 4, y * 6, 255 - x * 4]).astype(np.uint8)


def encode(suffix: str, image: np.ndarray) -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


def refused(path: Path) -> str:
    """The one line with which reading the file is refused."""
    with pytest.raises(InputError) as caught:
        read_image(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# Reading: what is stored is what comes back.


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".pgm"])
def test_reads_grey(tmp_path, grey, suffix):
    path = tmp_path / f"grey{suffix}"
    Image.fromarray(grey).save(path)
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, grey)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".ppm", ".webp"])
def test_reads_colour_as_bgr(tmp_path, colour, suffix):
    path = tmp_path / f"colour{suffix}"
    Image.fromarray(colour[..., ::-1]).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    np.testing.assert_array_equal(read_image(path), colour)


def test_reads_jpeg(tmp_path, colour):
    Image.fromarray(colour[..., ::-1]).save(tmp_path / "colour.jpg", quality=95)
    Image.fromarray(colour[..., 0]).save(tmp_path / "grey.jpeg", quality=95, progressive=True)
    image = read_image(tmp_path / "colour.jpg")
    assert image.shape == colour.shape
    assert np.abs(image.astype(int) - colour).mean() < 3
    image = read_image(tmp_path / "grey.jpeg")
    assert image.shape == (HEIGHT, WIDTH)
    assert np.abs(image.astype(int) - colour[..., 0]).mean() < 3


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_reads_16_bit_grey(tmp_path, suffix):
    counts = np.random.default_rng(1).integers(0, 65536, (HEIGHT, WIDTH), np.uint16)
    path = tmp_path / f"thermal{suffix}"
    path.write_bytes(encode(suffix, counts))
    image = read_image(path)
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, counts)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_reads_16_bit_colour(tmp_path, colour, suffix):
    colour16 = colour.astype(np.uint16) * 257
    path = tmp_path / f"colour{suffix}"
    path.write_bytes(encode(suffix, colour16))
    np.testing.assert_array_equal(read_image(path), colour16)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_drops_alpha(tmp_path, colour, grey, suffix):
    path = tmp_path / f"alpha{suffix}"
    exact = {"lossless": True, "exact": True} if suffix == ".webp" else {}
    Image.fromarray(np.dstack([colour[..., ::-1], grey])).save(path, **exact)
    np.testing.assert_array_equal(read_image(path), colour)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("scale", [np.uint8(1), np.uint16(257)])
def test_drops_alpha_written_by_opencv(tmp_path, colour, grey, suffix, scale):
    bgra = np.dstack([colour, grey]) * scale
    (tmp_path / f"alpha{suffix}").write_bytes(encode(suffix, bgra))
    image = read_image(tmp_path / f"alpha{suffix}")
    assert image.dtype == scale.dtype
    np.testing.assert_array_equal(image, bgra[..., :3])


def test_drops_alpha_of_grey(tmp_path, grey):
    Image.fromarray(np.dstack([grey, 255 - grey])).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_image(tmp_path / "la.png"), np.dstack([grey] * 3))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_reads_palette_as_colours(tmp_path, colour, suffix):
    palette = Image.fromarray(colour[..., ::-1]).quantize(16)
    path = tmp_path / f"palette{suffix}"
    palette.save(path)
    np.testing.assert_array_equal(read_image(path), np.asarray(palette.convert("RGB"))[..., ::-1])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_reads_one_bit(tmp_path, grey, suffix):
    path = tmp_path / f"mask{suffix}"
    Image.fromarray(grey > 128).save(path)
    np.testing.assert_array_equal(read_image(path), np.where(grey > 128, 255, 0))


ORIENTED = {  # EXIF orientation -> how the stored pixels become upright
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", ORIENTED)
def test_applies_exif_orientation(tmp_path, colour, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = ORIENTED[orientation](colour)
    Image.fromarray(colour[..., ::-1]).save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "photo.png"), upright)
    Image.fromarray(colour[..., ::-1]).save(tmp_path / "photo.tif", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "photo.tif"), upright)
    Image.fromarray(colour[..., ::-1]).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "photo.jpg")
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 3


def test_float_in_unit_range_becomes_uint16(tmp_path):
    values = np.linspace(0, 1, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    path = tmp_path / "float.tif"
    path.write_bytes(encode(".tif", values))
    image = read_image(path)
    assert image.dtype == np.uint16
    np.testing.assert_allclose(image / 65535, values, atol=0.5 / 65535 + 1e-7)


def test_content_counts_not_the_suffix(tmp_path, grey):
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encode(".png", grey))
    np.testing.assert_array_equal(read_image(path), grey)


@pytest.mark.parametrize("name", ["two words.png", "Straße à Köln.png", "夜 道路.png", "ir#1 (50%).png"])
def test_names_beyond_ascii(tmp_path, grey, name):
    write_image(tmp_path / name, grey)
    np.testing.assert_array_equal(read_image(tmp_path / name), grey)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_name_in_windows_1252(tmp_path, grey):
    name = os.fsdecode("Straße é.png".encode("cp1252"))
    write_image(tmp_path / name, grey)
    np.testing.assert_array_equal(read_image(str(tmp_path / name)), grey)


def test_reads_real_images(data_dir):
    for path in sorted((data_dir / "ivif" / "dev" / "TNO").rglob("*.png"))[:5]:
        assert read_image(path).dtype == np.uint8


# Reading: what is refused.


def test_refuses_missing(tmp_path):
    assert "no such file" in refused(tmp_path / "none.png")


def test_refuses_folder(tmp_path):
    assert "folder" in refused(tmp_path)


def test_refuses_file_as_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file" / "image.png")


def test_refuses_what_is_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    assert "regular" in refused(tmp_path / "pipe.png")


def test_refuses_empty(tmp_path):
    (tmp_path / "empty.png").touch()
    assert "empty" in refused(tmp_path / "empty.png")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_refuses_unreadable(tmp_path, grey):
    write_image(tmp_path / "secret.png", grey)
    (tmp_path / "secret.png").chmod(0)
    assert "cannot be read" in refused(tmp_path / "secret.png")


def test_refuses_text(tmp_path):
    (tmp_path / "notes.png").write_text("not an image\n" * 50)
    assert "not an image" in refused(tmp_path / "notes.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp", ".webp", ".pgm"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.995])
def test_refuses_truncated(tmp_path, grey, capfd, suffix, share):
    image = cv2.resize(grey, (160, 120))
    data = encode(suffix, image)
    path = tmp_path / f"half{suffix}"
    path.write_bytes(data[: int(len(data) * share)])
    assert "truncated or damaged" in refused(path)
    assert capfd.readouterr().err == ""  # the decoders don't add lines of their own


def test_refuses_jpeg_whose_end_is_zeros(tmp_path, grey):
    data = encode(".jpg", cv2.resize(grey, (160, 120)))
    path = tmp_path / "download.jpg"
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    assert "truncated" in refused(path)


def test_thumbnail_does_not_hide_truncation(tmp_path, colour):
    """A thumbnail in the EXIF block has an end-of-image marker of its own."""
    thumbnail = encode(".jpg", colour[:16, :16])
    exif = Image.Exif()
    exif[0x927C] = thumbnail  # any field will do
    buffer = io.BytesIO()
    Image.fromarray(colour).save(buffer, "JPEG", exif=exif.tobytes() + thumbnail)
    data = buffer.getvalue()
    assert data.count(b"\xff\xd9") >= 2
    (tmp_path / "whole.jpg").write_bytes(data)
    assert read_image(tmp_path / "whole.jpg").shape == colour.shape
    (tmp_path / "cut.jpg").write_bytes(data[:-40])
    assert "truncated" in refused(tmp_path / "cut.jpg")


def test_data_after_the_end_is_ignored(tmp_path, grey):
    """Phones append videos to their pictures; the bytes look like anything."""
    for suffix in (".png", ".jpg"):
        path = tmp_path / f"phone{suffix}"
        path.write_bytes(encode(suffix, grey) + b"\xff\xda trailer")
        assert read_image(path).shape == grey.shape


def test_refuses_png_with_flipped_bits(tmp_path, grey):
    data = bytearray(encode(".png", grey))
    data[len(data) // 2] ^= 0x10
    (tmp_path / "damaged.png").write_bytes(data)
    assert "damaged PNG" in refused(tmp_path / "damaged.png")


def test_refuses_absurd_size(tmp_path, grey, capfd):
    data = bytearray(encode(".png", grey))
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "bomb.png").write_bytes(data)
    refused(tmp_path / "bomb.png")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_float_that_is_not_finite(tmp_path, bad):
    values = np.full((HEIGHT, WIDTH), 0.5, np.float32)
    values[3, 5] = bad
    (tmp_path / "nan.tif").write_bytes(encode(".tif", values))
    assert "NaN or infinite" in refused(tmp_path / "nan.tif")


@pytest.mark.parametrize("low, high", [(-0.1, 1), (0, 40.5)])
def test_refuses_float_out_of_range(tmp_path, low, high):
    values = np.linspace(low, high, HEIGHT * WIDTH, dtype=np.float64).reshape(HEIGHT, WIDTH)
    (tmp_path / "celsius.tif").write_bytes(encode(".tif", values))
    assert f"from {low:g} to {high:g}" in refused(tmp_path / "celsius.tif")


def test_refuses_32_bit_integers(tmp_path, grey):
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "int.tif")
    assert "int32" in refused(tmp_path / "int.tif")


def test_opencv_keeps_its_log_level(tmp_path):
    levels = cv2.utils.logging if hasattr(cv2.utils, "logging") else cv2
    level = levels.getLogLevel()
    (tmp_path / "notes.png").write_text("text")
    refused(tmp_path / "notes.png")
    assert levels.getLogLevel() == level


# Writing.


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_write_read_round_trip(tmp_path, colour, suffix):
    path = tmp_path / "new" / "folder" / f"out{suffix}"
    write_image(path, colour)
    np.testing.assert_array_equal(read_image(path), colour)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_grey_stays_grey(tmp_path, grey, suffix):
    write_image(tmp_path / f"out{suffix}", grey)
    np.testing.assert_array_equal(read_image(tmp_path / f"out{suffix}"), grey)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff"])
def test_writes_16_bits(tmp_path, colour, suffix):
    path = tmp_path / f"out{suffix}"
    write_image(str(path), colour.astype(np.uint16) * 200)
    np.testing.assert_array_equal(read_image(path), colour.astype(np.uint16) * 200)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg"])
def test_writes_jpeg_of_high_quality(tmp_path, colour, suffix):
    write_image(tmp_path / f"out{suffix}", colour)
    with Image.open(tmp_path / f"out{suffix}") as image:
        table = image.quantization[0]
    assert table[0] == 2  # 16 in the standard's example table, scaled by (200 - 2 * 95) / 100
    assert np.abs(read_image(tmp_path / f"out{suffix}").astype(int) - colour).mean() < 3


def test_writes_views(tmp_path, colour):
    write_image(tmp_path / "mirrored.png", colour[:, ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "mirrored.png"), colour[:, ::-1])


def test_replaces_whole_files_only(tmp_path, colour, grey):
    path = tmp_path / "out.png"
    write_image(path, colour)
    write_image(path, grey)
    np.testing.assert_array_equal(read_image(path), grey)
    with pytest.raises(InputError):
        write_image(path, grey.astype(np.float32))
    np.testing.assert_array_equal(read_image(path), grey)


@pytest.mark.parametrize(
    "name, image, reason",
    [
        ("out.gif", np.zeros((4, 4), np.uint8), "'.gif'"),
        ("out", np.zeros((4, 4), np.uint8), "suffix"),
        ("out.jpg", np.zeros((4, 4), np.uint16), "16-bit"),
        ("out.bmp", np.zeros((4, 4), np.uint16), "16-bit"),
        ("out.png", np.zeros((4, 4), np.float32), "float32"),
        ("out.png", np.zeros((4, 4), bool), "bool"),
        ("out.png", np.zeros((4, 4, 4), np.uint8), "(4, 4, 4)"),
        ("out.png", np.zeros((4,), np.uint8), "(4,)"),
        ("out.png", np.zeros((0, 4), np.uint8), "(0, 4)"),
        ("out.webp", np.zeros((1, 20_000), np.uint8), "(1, 20000)"),
        ("out.jpg", np.zeros((1, 70_000), np.uint8), "(1, 70000)"),
    ],
)
def test_refuses_to_write(tmp_path, capfd, name, image, reason):
    with pytest.raises(InputError) as caught:
        write_image(tmp_path / "folder" / name, image)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_nothing_is_left_where_a_folder_has_the_name(tmp_path, grey):
    (tmp_path / "out.png").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_image(tmp_path / "out.png", grey)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert list((tmp_path / "out.png").iterdir()) == []


def test_refuses_file_as_parent_folder(tmp_path, grey):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        write_image(tmp_path / "file" / "out.png", grey)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_refuses_read_only_folder(tmp_path, grey):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot be written"):
        write_image(folder / "out.png", grey)
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
def test_full_disk_leaves_the_old_file(tmp_path, grey):
    """A limit on the file size stands for a full disk: the write fails half-way through."""
    path = tmp_path / "out.bmp"
    write_image(path, grey)
    script = (
        "import resource, signal, sys\n"
        "import numpy as np\n"
        "from runtime.errors import InputError\n"
        "from runtime.images import write_image\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "try:\n"
        "    write_image(sys.argv[1], np.zeros((400, 400), np.uint8))\n"
        "except InputError as error:\n"
        "    sys.exit(str(error))\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "cannot be written" in result.stderr
    assert result.stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["out.bmp"]
    np.testing.assert_array_equal(read_image(path), grey)


def test_check_writable_touches_nothing(tmp_path):
    check_writable(tmp_path / "new" / "out.tif", sixteen_bit=True)
    with pytest.raises(InputError, match="suffix"):
        check_writable(tmp_path / "out.xyz")
    assert list(tmp_path.iterdir()) == []


# Pairs.


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    return a, b


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def test_pairs_match_by_stem_sorted(folders):
    a, b = folders
    touch(a, "02.png", "01.PNG", "night.v2.tif", ".hidden.png", "notes.txt", "Thumbs.db")
    touch(b, "01.jpg", "02.JPEG", "night.v2.webp", "README")
    (b / "folder.png").mkdir()
    assert find_pairs(str(a), b) == [
        Pair("01", a / "01.PNG", b / "01.jpg"),
        Pair("02", a / "02.png", b / "02.JPEG"),
        Pair("night.v2", a / "night.v2.tif", b / "night.v2.webp"),
    ]


def test_unmatched_files_are_named(folders):
    a, b = folders
    touch(a, "1.png", "2.png")
    touch(b, "2.png", "3.png")
    with pytest.raises(InputError) as caught:
        find_pairs(a, b)
    message = str(caught.value)
    assert f"{a / '1.png'} has no partner in {b}" in message
    assert f"{b / '3.png'} has no partner in {a}" in message
    assert "more" not in message
    assert "\n" not in message


def test_many_unmatched_files_are_counted(folders):
    a, b = folders
    touch(a, *(f"{i}.png" for i in range(9)))
    touch(b, "0.png")
    with pytest.raises(InputError, match=r"1\.png.*2\.png.*3\.png.*and 5 more") as caught:
        find_pairs(a, b)
    assert "4.png" not in str(caught.value)


def test_duplicate_stems_are_named(folders):
    a, b = folders
    touch(a, "1.png", "2.png")
    touch(b, "1.png", "1.jpg", "2.png")
    with pytest.raises(InputError, match=r"several files for '1': 1\.jpg, 1\.png"):
        find_pairs(a, b)


def test_skip_bad_warns_once_for_each(folders, caplog):
    a, b = folders
    touch(a, "1.png", "2.png", "4.png")
    touch(b, "1.png", "1.jpg", "2.png", "3.png")
    with caplog.at_level(logging.WARNING, "refusion"):
        pairs = find_pairs(a, b, skip_bad=True)
    assert [pair.stem for pair in pairs] == ["2"]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert "'1'" in lines[0]
    assert "3.png" in lines[1]
    assert "4.png" in lines[2]


@pytest.mark.parametrize("skip_bad", [False, True])
def test_no_pair_at_all(folders, skip_bad):
    a, b = folders
    with pytest.raises(InputError, match="no image pairs"):
        find_pairs(a, b, skip_bad=skip_bad)


def test_pairs_need_folders(folders):
    a, b = folders
    with pytest.raises(InputError, match="no such folder"):
        find_pairs(a, b / "none")
    touch(a, "file.png")
    with pytest.raises(InputError, match="not a folder"):
        find_pairs(a / "file.png", b)


def make_source(folder: Path, a_name: str = "a", b_name: str = "b", name: str = "1.png") -> Path:
    for sub in (a_name, b_name):
        (folder / sub).mkdir(parents=True)
        touch(folder / sub, name)
    return folder


def test_pair_folder_is_the_root(tmp_path):
    make_source(tmp_path)
    make_source(tmp_path / "a" / "deeper")
    assert find_pair_folders(str(tmp_path)) == [tmp_path]


def test_pair_folders_below_the_root(tmp_path):
    second = make_source(tmp_path / "train" / "second")
    first = make_source(tmp_path / "first")
    make_source(tmp_path / ".trash")
    make_source(tmp_path / "videos", name="1.mp4")
    (tmp_path / "half" / "a").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert find_pair_folders(tmp_path) == [first, second]


def test_pair_folders_by_other_names(tmp_path):
    make_source(tmp_path / "plain")
    named = make_source(tmp_path / "named", "ir/left", "vis")
    assert find_pair_folders(tmp_path, "ir/left", "vis") == [named]


def test_pair_folders_through_links(tmp_path):
    source = make_source(tmp_path / "disk" / "set")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(source)
    assert find_pair_folders(tmp_path / "data") == [tmp_path / "data" / "linked"]


def test_pair_folders_missing(tmp_path):
    with pytest.raises(InputError, match="'ir' and 'vis'"):
        find_pair_folders(tmp_path, "ir", "vis")
    with pytest.raises(InputError, match="no such folder"):
        find_pair_folders(tmp_path / "none")
