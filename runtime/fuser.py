"""Fuser: one pair of aligned images in, one picture out."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime import color
from runtime.backends import Backend, choose_backend, load_backend, runs_on_gpu
from runtime.color import (
    RANGE_POLICIES,
    SmoothRange,
    Tone,
    apply_tone,
    check_chroma_policy,
    check_image,
    compose,
    fused_chroma,
    is_grey,
    luma,
    parse_tone,
    stretch,
)
from runtime.errors import InputError
from runtime.model_files import SUFFIXES, find_model

WARM_SIZE = (64, 64)
BUILT_IN = {"range": "stretch", "chroma": "auto"}  # of a model that makes the whole picture and does not say

log = logging.getLogger("refusion")


class Fuser:
    """Fuses pairs of aligned images of one size with one model, which is loaded and warm after construction.

    Example:
        fuser = Fuser("ivif")
        fused = fuser(infrared, visible)

    Args:
        task: "ivif", "mif", "mfif" or "meif" for an embedded model, or a path to an .onnx or .engine file.
        model: which of the task's models: "auto", "full", "lite" or a path; see `runtime.model_files.find_model`.
        backend: one of `runtime.backends.BACKENDS`; see `runtime.backends.choose_backend`.
        live: the frames come from a stream: on a CPU "auto" then takes the lite model.
        threads: CPU threads that compute one frame; None takes every core that the process may use.
        range: "stretch": the network's own minimum..maximum becomes 0..255, image by image, as in the authors' code.
            "keep": 0..1 becomes 0..255. "smooth": as "stretch", with limits smoothed from call to call. "auto": smooth
            for live frames and stretch for others, or what a model that makes the whole picture has built in.
        chroma: where the colour comes from, see `runtime.color.fused_chroma`.
        tone: brightness of 16-bit grey sources (raw thermal frames), see `runtime.color.apply_tone`: "full",
            "percentile", "LOW:HIGH" or (low, high) in counts.
        warm_size: (H, W) of the frames to come, for which memory is then there before the first; None warms up with a
            small pair.

    Attributes:
        model: the file's name without its suffix.
        backend: name of the backend that runs.
        choice: why this model and this backend, in one line.
        task: the task that the model was trained for, as its metadata say, or None.
        metadata: the model file's metadata.
        threads: CPU threads that compute one frame, 0 where a GPU does.
        range, chroma, tone: the policies; they may be changed between two calls.

    Raises:
        InputError: a model, policy or number that is not understood or not there.
    """

    def __init__(
        self,
        task: str | Path = "ivif",
        *,
        model: str | Path = "auto",
        backend: str = "auto",
        live: bool = False,
        threads: int | None = None,
        range: str = "auto",
        chroma: str = "auto",
        tone: Tone = "full",
        warm_size: tuple[int, int] | None = None,
    ):
        self._smooth_range = SmoothRange()
        self._built_in: dict[str, str] = {}
        self.range = ("smooth" if live else "stretch") if range == "auto" else range
        self.chroma, self.tone = chroma, parse_tone(tone)
        named = next((Path(p) for p in (task, model) if Path(p).suffix in SUFFIXES), None)
        self.backend, why_backend = choose_backend(backend, named)
        path, why_model = find_model(task, model, live=live, gpu=runs_on_gpu(self.backend))
        self._backend: Backend = load_backend(path, self.backend, threads)
        self.model = path.stem
        if self._backend.batch not in (None, 1):
            raise InputError(
                f"model {self.model} takes {self._backend.batch} pairs at once, and here they come one by one; export "
                "it with --batch 1 or --batch 0"
            )
        self.choice = f"model {self.model} ({why_model}), backend {self.backend} ({why_backend})"
        self.metadata = self._backend.metadata
        self.task = self.metadata.get("task")
        self.threads = self._backend.threads
        self._bgr = self.metadata.get("io") == "bgr"
        if self._bgr:  # it has its policies in the graph
            self._built_in = {name: self.metadata.get(name, usual) for name, usual in BUILT_IN.items()}
            self.range = self._built_in["range"] if range == "auto" else range
            self.chroma = chroma
        self._swap_announced = False
        self._warm_up(warm_size)

    @property
    def range(self) -> str:
        return self._range

    @range.setter
    def range(self, policy: str) -> None:
        if policy not in RANGE_POLICIES:
            raise InputError(f"unknown range policy '{policy}'; choose from {', '.join(RANGE_POLICIES)}")
        self._check_built_in("range", policy)
        self._range = policy

    @property
    def chroma(self) -> str:
        return self._chroma

    @chroma.setter
    def chroma(self, policy: str) -> None:
        check_chroma_policy(policy)
        self._check_built_in("chroma", policy)
        self._chroma = policy

    def __call__(self, a: np.ndarray, b: np.ndarray) -> NDArray[np.uint8]:
        """Fuse two aligned images.

        Args:
            a: infrared / CT, PET or SPECT / near-focus / under-exposed image: HxW, or HxWx3 in BGR; uint8 or uint16.
            b: visible / MRI / far-focus / over-exposed image, of the same height and width.

        Returns:
            HxWx3 uint8 (BGR), or HxW uint8 where neither source has colour or chroma is "none".

        Raises:
            InputError: other types or shapes, sources of different size, or a size that the model isn't built for.
        """
        self.check(a, b)
        a, b = self.in_order(a, b)
        if self._bgr:
            return self._backend.run(_frame(a, self.tone), _frame(b, self.tone))[0]
        fused = self._run(apply_tone(a, self.tone), apply_tone(b, self.tone))
        return compose(self._to_range(fused), fused_chroma(a, b, self._chroma))

    def in_order(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The two images in the order that the model takes them, with a warning where that is not the given one.

        Only two exposures tell by themselves which is which: the darker one is a.
        """
        if self.task != "meif" or float(luma(a).mean()) <= float(luma(b).mean()):
            return a, b
        if not self._swap_announced:
            log.warning("a is brighter than b: taken as the over-exposed image, both are swapped (a = under-exposed)")
            self._swap_announced = True
        return b, a

    def check(self, a: np.ndarray, b: np.ndarray) -> None:
        """Raise the InputError that fusing these two images would raise; computes nothing."""
        check_image(a, "a")
        check_image(b, "b")
        self._check_sizes(a, b)

    def fuse_luma(self, a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
        """The network alone: two HxW float arrays in [0, 1] -> HxW float32 in [0, 1], not stretched.

        Raises:
            InputError: other types, shapes or values (NaN among them), or sources of different size.
        """
        for name, x in (("a", a), ("b", b)):
            if not isinstance(x, np.ndarray) or x.ndim != 2 or not np.issubdtype(x.dtype, np.floating):
                kind = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
                raise InputError(f"{name} is {kind}; give an HxW array of float32")
            if x.size == 0:
                raise InputError(f"{name} is empty: its shape is {x.shape}")
            low, high = x.min(), x.max()
            if not (low >= 0 and high <= 1):  # false for NaN as well
                raise InputError(f"{name} has values from {low:g} to {high:g}; give finite values in [0, 1]")
        self._check_sizes(a, b)
        if self._bgr:
            raise InputError(f"model {self.model} takes 8-bit colour frames, not luma; call the fuser itself")
        return self._run(a, b)

    def _run(self, a: np.ndarray, b: np.ndarray) -> NDArray[np.float32]:
        tensors = (np.ascontiguousarray(luma[None, None], np.float32) for luma in (a, b))
        return self._backend.run(*tensors)[0, 0]

    def _to_range(self, luma: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._range == "keep":
            return luma
        limits = float(luma.min()), float(luma.max())
        return stretch(luma, *(self._smooth_range.update(*limits) if self._range == "smooth" else limits))

    def _check_sizes(self, a: np.ndarray, b: np.ndarray) -> None:
        (height, width), (height_b, width_b) = a.shape[:2], b.shape[:2]
        if (height, width) != (height_b, width_b):
            raise InputError(
                f"a is {width}x{height} and b is {width_b}x{height_b}; the sources must be aligned and of equal size"
            )
        fixed_height, fixed_width = self._backend.size
        if fixed_height not in (None, height) or fixed_width not in (None, width):
            raise InputError(
                f"model {self.model} is built for {fixed_width or 'any'}x{fixed_height or 'any'} and the images are "
                f"{width}x{height}; resize them or take a model of dynamic size"
            )

    def _check_built_in(self, name: str, policy: str) -> None:
        if self._built_in.get(name, policy) != policy:
            raise InputError(
                f"model {self.model} has {name} {self._built_in[name]} built in, not {policy}; ask for that, or take a "
                "model with --io luma"
            )

    def _warm_up(self, size: tuple[int, int] | None) -> None:
        # An engine takes sizes of its profile alone; it knows which is the usual one.
        height, width = size or getattr(self._backend, "usual", None) or WARM_SIZE
        if height < 1 or width < 1:
            raise InputError(f"the warm-up size {width}x{height} is empty; give (H, W) of the frames to come")
        blank = np.zeros((self._backend.size[0] or height, self._backend.size[1] or width), np.uint8)
        if self._bgr:
            self._backend.run(_frame(blank, "full"), _frame(blank, "full"))
        else:
            self._run(luma(blank), luma(blank))


def _frame(image: np.ndarray, tone: Tone) -> NDArray[np.uint8]:
    """(1, H, W, 3) uint8 of a camera's picture, grey ones repeated."""
    if image.dtype != np.uint8:
        image = compose(apply_tone(image, tone), None if is_grey(image) else color.chroma(image))
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    return np.ascontiguousarray(image[None], np.uint8)
