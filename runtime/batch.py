"""Fusing files: one pair, or all pairs of two folders. Nothing is written before every input has been checked."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.errors import InputError
from runtime.fuser import Fuser
from runtime.images import Pair, check_writable, find_pairs, read_image, refuse_or_skip, write_image
from runtime.panel import side_by_side
from runtime.scenes import FRAMES_PER_SECOND, night_road
from runtime.tasks import TASKS

FORMATS = ("png", "jpg", "tiff")
# A 16-bit image below this shows too little of its range to be full-scale: raw counts of a 14-bit camera, say.
_RAW_COUNTS = 1 << 14

log = logging.getLogger("refusion")


@dataclass(frozen=True)
class Job:
    """One pair of files, where its fused picture goes, and where a, b and fused side by side go, or None."""

    a: Path
    b: Path
    fused: Path
    panel: Path | None


def fuse_files(
    fuser: Fuser,
    a: str | Path,
    b: str | Path,
    out: str | Path,
    *,
    image_format: str | None = None,
    panels: bool = False,
    skip_bad: bool = False,
) -> list[Path]:
    """Fuse two image files, or the pairs of two folders (equal stems), and write the pictures.

    Args:
        fuser: the model and its policies.
        a, b: two files or two folders.
        out: for two folders the output folder; for two files a file, or a folder where it has no image suffix.
        image_format: one of FORMATS; None takes the suffix of `out`, else PNG.
        panels: write a, b and fused side by side as well: into the sub-folder `side_by_side`, or beside the one file
            as `<stem>_side_by_side`.
        skip_bad: leave out pairs that can't be fused, with a warning for each, instead of refusing.

    Returns:
        The fused pictures, in the order of the stems.

    Raises:
        InputError: an input is missing, unreadable, unmatched or of another size than its partner; an output would
            replace a source; or an output can't be written. In all but the last case nothing was written.
    """
    jobs = _plan(Path(a), Path(b), Path(out), image_format, panels=panels, skip_bad=skip_bad)
    jobs = _fusible(fuser, jobs, skip_bad)
    for job in tqdm(jobs, "fusing", unit="pair", disable=None if len(jobs) > 1 else True):
        _fuse_file(fuser, job)
    return [job.fused for job in jobs]


def _plan(a: Path, b: Path, out: Path, image_format: str | None, *, panels: bool, skip_bad: bool) -> list[Job]:
    """What will be read and written, from names alone."""
    if image_format not in (None, *FORMATS):
        raise InputError(f"unknown format '{image_format}'; choose from {', '.join(FORMATS)}")
    for path in (a, b):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    if a.is_dir() != b.is_dir():
        folder, file = (a, b) if a.is_dir() else (b, a)
        raise InputError(f"{folder} is a folder and {file} a file; give two files or two folders")
    if a.is_dir():
        jobs = _plan_folder(find_pairs(a, b, skip_bad=skip_bad), out, image_format, panels)
    else:
        jobs = [_plan_file(a, b, out, image_format, panels)]
    _refuse_overwriting(jobs)
    return jobs


def _plan_folder(pairs: list[Pair], out: Path, image_format: str | None, panels: bool) -> list[Job]:
    if out.exists() and not out.is_dir():
        raise InputError(f"output {out} is a file; for two folders give a folder")
    if out.resolve() in {folder.resolve() for pair in pairs for folder in (pair.a.parent, pair.b.parent)}:
        raise InputError(f"output {out} is a folder of sources; give another one")
    names = [f"{pair.stem}.{image_format or 'png'}" for pair in pairs]
    return [
        Job(pair.a, pair.b, out / name, out / "side_by_side" / name if panels else None)
        for pair, name in zip(pairs, names, strict=True)
    ]


def _plan_file(a: Path, b: Path, out: Path, image_format: str | None, panels: bool) -> Job:
    if out.is_dir() or not out.suffix:
        out = out / f"{a.stem}.{image_format or 'png'}"
    check_writable(out)
    if image_format and out.suffix.lower() not in _suffixes(image_format):
        raise InputError(f"output {out} and --format {image_format} disagree; give one of them")
    return Job(a, b, out, out.with_stem(f"{out.stem}_side_by_side") if panels else None)


def _suffixes(image_format: str) -> tuple[str, ...]:
    return {"jpg": (".jpg", ".jpeg"), "tiff": (".tif", ".tiff")}.get(image_format, (f".{image_format}",))


def _refuse_overwriting(jobs: list[Job]) -> None:
    sources = {path.resolve() for job in jobs for path in (job.a, job.b)}
    for job in jobs:
        for output in (job.fused, job.panel):
            if output and output.resolve() in sources:
                raise InputError(f"output {output} would replace a source; give another one")


def _fusible(fuser: Fuser, jobs: list[Job], skip_bad: bool) -> list[Job]:
    """Read every pair and leave out those that can't be fused, or refuse them all."""
    good: list[Job] = []
    problems: list[str] = []
    for job in tqdm(jobs, "checking", unit="pair", leave=False, disable=None if len(jobs) > 1 else True):
        try:
            images = _read_pair(fuser, job)
        except InputError as error:
            problems.append(str(error))
            continue
        if not good:
            _warn_of_raw_counts(fuser, job, images)
        good.append(job)
    refuse_or_skip(problems, skip_bad)
    if not good:
        raise InputError("every pair was skipped; nothing is left to fuse")
    return good


def _read_pair(fuser: Fuser, job: Job) -> tuple[np.ndarray, np.ndarray]:
    images = read_image(job.a), read_image(job.b)
    try:
        fuser.check(*images)
    except InputError as error:
        raise InputError(f"a = {job.a}, b = {job.b}: {error}") from error
    return images


def _warn_of_raw_counts(fuser: Fuser, job: Job, images: tuple[np.ndarray, np.ndarray]) -> None:
    for path, image in zip((job.a, job.b), images, strict=True):
        if fuser.tone == "full" and image.dtype == np.uint16 and image.ndim == 2 and image.max() < _RAW_COUNTS:
            log.warning(
                "%s uses only %d..%d of its 16 bits and is taken as dark; pass --tone percentile or --tone LOW:HIGH",
                *(path, image.min(), image.max()),
            )


def _fuse_file(fuser: Fuser, job: Job) -> None:
    a, b = fuser.in_order(*_read_pair(fuser, job))
    fused = fuser(a, b)
    write_image(job.fused, fused)
    if job.panel:
        name_a, name_b = TASKS.get(fuser.task or "", ("a", "b"))
        write_image(job.panel, side_by_side({name_a: a, name_b: b, "fused": fused}, fuser.tone))


def fuse_scene(fuser: Fuser, out: str | Path) -> tuple[Path, Path, float]:
    """Fuse the generated night road and write `infrared`, `visible`, `fused` and `side_by_side`.png into a folder.

    Returns:
        The fused picture, the one of all three side by side, and the seconds that fusing took, the median of three.

    Raises:
        InputError: a picture can't be written.
    """
    infrared, visible = night_road()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        fused = fuser(infrared, visible)
        times.append(time.perf_counter() - start)
    out = Path(out)
    pictures = {"infrared": infrared, "visible": visible, "fused": fused}
    for name, picture in pictures.items():
        write_image(out / f"{name}.png", picture)
    panel = out / "side_by_side.png"
    write_image(panel, side_by_side(pictures))
    return out / "fused.png", panel, sorted(times)[1]


def fuse_clip(fuser: Fuser, path: str | Path, seconds: float = 4.0) -> float:
    """Fuse the generated night road as a clip: a video of infrared, visible and fused side by side.

    Args:
        fuser: the model and its policies.
        path: the video, .mp4 or .mkv.
        seconds: length of the clip.

    Returns:
        The median of the seconds that fusing one frame took.

    Raises:
        InputError: the video can't be written.
    """
    from runtime.frames import FusedFrame
    from runtime.sinks.base import temporary_beside
    from runtime.sinks.video import OpenCvVideo

    path = Path(path)
    video, times = OpenCvVideo(path, temporary_beside(path), FRAMES_PER_SECOND), []
    for i in tqdm(range(round(seconds * FRAMES_PER_SECOND)), "clip", unit="frame", disable=None, leave=False):
        infrared, visible = night_road(i)
        start = time.perf_counter()
        fused = fuser(infrared, visible)
        times.append(time.perf_counter() - start)
        picture = side_by_side({"infrared": infrared, "visible": visible, "fused": fused})
        video.write(FusedFrame(picture, None, None, "fused", 0.0, 0.0, False, i / FRAMES_PER_SECOND, i))
    video.finish()
    return sorted(times)[len(times) // 2]
