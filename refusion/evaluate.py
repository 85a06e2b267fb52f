"""Evaluation of fused pictures against their sources: tables of metrics, and pictures of the best and the worst.

A `Scene` is a pair of source files and what is to be judged on it: fused files, or callables that fuse the pair.

    scenes = find_scenes("data/ivif/dev", {"ours": Fuser("ours.onnx"), "theirs": Fuser("theirs.onnx")})
    table = evaluate_pairs(scenes, "tdfusion", ["Qabf", "VIF", "SSIM"])
    print(table.text())

Metrics are computed on 8-bit luma: of coloured pictures the luma is taken, and what is not 8-bit is scaled by its full
range (65535) and rounded.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from refusion.metrics import METRICS, check_names, evaluate
from runtime.color import luma
from runtime.errors import InputError
from runtime.images import Pair, find_pair_folders, find_pairs, read_image, write_image
from runtime.panel import side_by_side

Fuse = Callable[[np.ndarray, np.ndarray], np.ndarray]  # a, b -> fused; (H, W) or (H, W, 3) BGR

log = logging.getLogger("refusion")


class Pictures(NamedTuple):
    """What a scene shows; (H, W) or (H, W, 3) BGR, uint8 or uint16, all of one size."""

    a: np.ndarray
    b: np.ndarray
    fused: dict[str, np.ndarray]  # model -> fused picture


@dataclass(frozen=True)
class Scene:
    """One pair of sources, and the fused pictures of it that are to be judged."""

    source: str  # name of the folder that the pair comes from; means are taken for each
    stem: str
    a: Path
    b: Path
    fused: Mapping[str, Path | Fuse]  # model -> fused file, or a callable that fuses

    def load(self) -> Pictures:
        """Read the sources and read or compute each model's fused picture.

        Raises:
            InputError: a file that cannot be read, or pictures of unequal size.
        """
        a, b = read_image(self.a), read_image(self.b)
        self._check_size(b, str(self.b), a)
        pictures = Pictures(a, b, {})
        for model, fused in self.fused.items():
            pictures.fused[model] = read_image(fused) if isinstance(fused, Path) else fused(a, b)
            self._check_size(pictures.fused[model], str(fused) if isinstance(fused, Path) else model, a)
        return pictures

    def _check_size(self, image: np.ndarray, name: str, a: np.ndarray) -> None:
        if image.shape[:2] != a.shape[:2]:
            raise InputError(f"{name} has {_size(image)} pixels, but {self.a} has {_size(a)}; make them equal")


@dataclass(frozen=True)
class Row:
    """The metrics of one fused picture."""

    model: str
    source: str
    stem: str
    values: dict[str, float]


@dataclass
class Table:
    """Results: a row for each model and picture."""

    convention: str
    metrics: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """Models in the order of evaluation."""
        return list(dict.fromkeys(row.model for row in self.rows))

    @property
    def sources(self) -> list[str]:
        """Source folders in the order of evaluation."""
        return list(dict.fromkeys(row.source for row in self.rows))

    def mean(self, model: str, source: str) -> dict[str, float]:
        """Mean of each metric over a model's pictures from one source folder."""
        values = [row.values for row in self.rows if row.model == model and row.source == source]
        return {metric: float(np.mean([v[metric] for v in values])) for metric in self.metrics}

    def total(self, model: str) -> dict[str, float]:
        """Mean of each metric over the source folders' means: every source counts the same."""
        means = [self.mean(model, source) for source in self.sources]
        return {metric: float(np.mean([m[metric] for m in means])) for metric in self.metrics}

    def text(self) -> str:
        """The means as an aligned table; with several models also each one's ratio to the last, in percent."""
        pairs = {source: len({row.stem for row in self.rows if row.source == source}) for source in self.sources}
        title = f"metrics in the {self.convention} convention, {sum(pairs.values())} pairs"
        lines = [["source", "pairs", "model", *self.metrics]]
        for source in self.sources:
            means = {model: self.mean(model, source) for model in self.models}
            lines += self._block(source, str(pairs[source]), means)
        if len(self.sources) > 1:
            lines += self._block("mean of sources", "", {model: self.total(model) for model in self.models})
        return title + "\n" + _align(lines, left={0, 2})

    def _block(self, source: str, pairs: str, means: dict[str, dict[str, float]]) -> list[list[str]]:
        *others, last = means
        lines = [[source, pairs, model, *(f"{means[model][m]:.4f}" for m in self.metrics)] for model in means]
        for model in others:
            ratios = (_percent(means[model][m], means[last][m]) for m in self.metrics)
            lines.append([source, pairs, f"{model} / {last}", *ratios])
        return lines

    def write_csv(self, path: str | Path) -> None:
        """Write a line for each model and picture; the first column names the convention. Atomic.

        Raises:
            InputError: the file cannot be written.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["convention", "model", "source", "stem", *self.metrics])
        for row in self.rows:
            writer.writerow([self.convention, row.model, row.source, row.stem, *(row.values[m] for m in self.metrics)])
        _write_text(path, text.getvalue())

    def write_json(self, path: str | Path) -> None:
        """Write convention, metrics, rows, means for each model and source, and the means of the sources. Atomic.

        Raises:
            InputError: the file cannot be written.
        """
        content = {
            "convention": self.convention,
            "metrics": self.metrics,
            "total": {model: self.total(model) for model in self.models},
            "means": {model: {source: self.mean(model, source) for source in self.sources} for model in self.models},
            "rows": [{"model": r.model, "source": r.source, "stem": r.stem, **r.values} for r in self.rows],
        }
        _write_text(path, json.dumps(content, indent=1) + "\n")


class BestAndWorst:
    """Keeps the picture of each model's best and worst pair by one metric, while pairs are evaluated."""

    def __init__(self, metric: str):
        self.metric = metric
        self._kept: dict[tuple[str, str], tuple[Row, np.ndarray]] = {}

    def add(self, row: Row, pictures: Pictures) -> None:
        """Take the scene where it is the best or the worst of its model so far."""
        for rank, sign in (("best", 1), ("worst", -1)):
            key = (row.model, rank)
            value = sign * row.values[self.metric]
            if key not in self._kept or value > sign * self._kept[key][0].values[self.metric]:
                caption = f"{row.model}: " + ", ".join(f"{name} {v:.3f}" for name, v in row.values.items())
                views = {f"a: {row.source} {row.stem}": pictures.a, "b": pictures.b, caption: pictures.fused[row.model]}
                self._kept[key] = (row, side_by_side(views))

    def write(self, folder: str | Path) -> list[Path]:
        """Write `<model>_best_<source>_<stem>.png` and `..._worst_...` for each model; returns the files.

        Raises:
            InputError: a file cannot be written.
        """
        written = []
        for (model, rank), (row, picture) in self._kept.items():
            name = re.sub(r"[^\w.-]+", "-", f"{model}_{rank}_{row.source}_{row.stem}").strip("-.")
            written.append(Path(folder) / f"{name}.png")
            write_image(written[-1], picture)
        return written


def find_scenes(
    root: str | Path, models: Mapping[str, Fuse], limit: int | None = None, *, skip_bad: bool = False
) -> list[Scene]:
    """All pairs below a folder, to be fused by each of the models.

    Args:
        root: folder with the sub-folders `a` and `b`, or with such folders below it.
        models: name -> callable that fuses a pair, a `runtime.Fuser` for instance.
        limit: at most so many pairs of each source folder, spread evenly over it.
        skip_bad: leave out files without a partner, with a warning, instead of refusing.

    Raises:
        InputError: no pairs, or files without a partner.
    """
    root = Path(root)
    scenes = []
    for folder in find_pair_folders(root):
        source = root.resolve().name if folder == root else str(folder.relative_to(root))
        pairs = find_pairs(folder / "a", folder / "b", skip_bad=skip_bad)
        scenes += [Scene(source, pair.stem, pair.a, pair.b, models) for pair in _spread(pairs, limit)]
    return scenes


def match_fused(
    a: str | Path, b: str | Path, fused: Sequence[str | Path], limit: int | None = None, *, skip_bad: bool = False
) -> list[Scene]:
    """Pairs of two folders and the fused pictures of the same stem in other folders; or single files.

    Args:
        a: folder or file of the first source.
        b: folder or file of the second source.
        fused: one or more folders (files) of fused pictures; each is a model, see `short_names`.
        limit: at most so many pairs, spread evenly.
        skip_bad: leave out what is not in all the folders, with a warning, instead of refusing.

    Raises:
        InputError: files mixed with folders, or pictures without a partner.
    """
    a, b = Path(a), Path(b)
    models = dict(zip(short_names(fused), map(Path, fused), strict=True))
    source = (a if a.is_dir() else a.parent).resolve().parent.name
    if not any(path.is_dir() for path in (a, b, *models.values())):
        return [Scene(source, a.stem, a, b, models)]
    pairs = find_pairs(a, b, skip_bad=skip_bad)
    files = {name: {p.stem: p.b for p in find_pairs(a, path, skip_bad=skip_bad)} for name, path in models.items()}
    pairs = [pair for pair in pairs if all(pair.stem in by_stem for by_stem in files.values())]
    return [
        Scene(source, pair.stem, pair.a, pair.b, {name: by_stem[pair.stem] for name, by_stem in files.items()})
        for pair in _spread(pairs, limit)
    ]


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """Names of models for a table: the last parts of their paths, where these differ; else the whole paths."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def evaluate_pairs(
    scenes: Sequence[Scene],
    convention: str = "tdfusion",
    metrics: Sequence[str] | None = None,
    *,
    skip_bad: bool = False,
    progress: bool = False,
    best_and_worst: BestAndWorst | None = None,
) -> Table:
    """Evaluate every fused picture of the scenes.

    Args:
        scenes: from `find_scenes` or `match_fused`.
        convention: whose definitions of the metrics to follow, one of `refusion.metrics.CONVENTIONS`.
        metrics: names out of `refusion.metrics.METRICS`; all of them where None.
        skip_bad: leave out a scene that cannot be read, fused or judged, with a warning, for all models alike.
        progress: show a progress bar, if stderr is a terminal.
        best_and_worst: is given every result and its pictures.

    Raises:
        InputError: unknown names, a scene that cannot be read, pictures of unequal size or too small for a metric, or
            no scene left.
    """
    names = METRICS if metrics is None else tuple(metrics)
    check_names(names, convention)
    if best_and_worst is not None and best_and_worst.metric not in names:
        raise InputError(f"best and worst by {best_and_worst.metric}: it is not among the metrics {', '.join(names)}")
    table = Table(convention, names)
    for scene in tqdm(scenes, desc="evaluating", unit="pair", disable=None if progress else True):
        try:
            pictures = scene.load()
            rows = _evaluate_scene(scene, pictures, convention, names)
        except InputError as error:
            if not skip_bad:
                raise
            log.warning("skipped: %s", error)
            continue
        table.rows += rows
        if best_and_worst is not None:
            for row in rows:
                best_and_worst.add(row, pictures)
    if not table.rows:
        raise InputError("nothing to evaluate: no pair with fused pictures is left")
    return table


def _evaluate_scene(scene: Scene, pictures: Pictures, convention: str, metrics: tuple[str, ...]) -> list[Row]:
    a8, b8 = grey_uint8(pictures.a), grey_uint8(pictures.b)
    rows = []
    for model, fused in pictures.fused.items():
        try:
            values = evaluate(grey_uint8(fused), a8, b8, convention, metrics)
        except InputError as error:
            raise InputError(f"{scene.source}/{scene.stem}: {error}") from error
        rows.append(Row(model, scene.source, scene.stem, values))
    return rows


def grey_uint8(image: np.ndarray) -> NDArray[np.uint8]:
    """Luma of a picture, rounded to 8 bits: (H, W) or (H, W, 3) BGR, uint8 or uint16 -> (H, W) uint8."""
    return np.rint(luma(image) * 255).astype(np.uint8)


def _spread(pairs: list[Pair], limit: int | None) -> list[Pair]:
    """At most `limit` of the pairs, at equal distances."""
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} pairs leaves nothing to evaluate; give 1 or more")
    if limit is None or limit >= len(pairs):
        return pairs
    return [pairs[i * len(pairs) // limit] for i in range(limit)]


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def _percent(value: float, reference: float) -> str:
    return f"{100 * value / reference:.1f} %" if reference else "-"


def _align(lines: list[list[str]], left: set[int]) -> str:
    """Columns of equal width, two spaces apart; those named in `left` are left-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _write_text(path: str | Path, text: str) -> None:
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
