"""Fuser: one pair of aligned images in, one picture out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.color import (
    RANGE_POLICIES,
    SmoothRange,
    Tone,
    apply_tone,
    check_chroma_policy,
    check_image,
    compose,
    fused_chroma,
    parse_tone,
    stretch,
)
from runtime.errors import InputError
from runtime.tasks import TASKS

# Name of a backend -> the device it computes on.
BACKENDS = {"auto": "cpu", "onnxruntime": "cpu", "onnxruntime-cuda": "cuda"}
MODELS = Path(__file__).parent / "models"
WARM_SIZE = (64, 64)


def model_path(model: str | Path) -> Path:
    """File of a model that is named by its task (embedded) or by its path.

    Raises:
        InputError: no model is embedded for that task, or neither a task nor an .onnx file.
    """
    embedded = MODELS / f"{model}.onnx"
    if str(model) in TASKS:
        if not embedded.is_file():
            raise InputError(f"no embedded model for task '{model}' yet; give a path to an .onnx file (--model PATH)")
        return embedded
    path = Path(model)
    if path.suffix != ".onnx":
        raise InputError(f"unknown model '{model}'; give a task ({', '.join(TASKS)}) or a path to an .onnx file")
    return path


class Fuser:
    """Fuses pairs of aligned images of one size with one model, which is loaded and warm after construction.

    Example:
        fuser = Fuser("ivif")
        fused = fuser(infrared, visible)

    Args:
        model: a task ("ivif", "mif", "mfif", "meif") for its embedded model, or a path to an .onnx file.
        backend: "auto" or "onnxruntime" (CPU), "onnxruntime-cuda".
        threads: threads that compute one frame; None takes every core that the process may use.
        range: "stretch": the network's own minimum..maximum becomes 0..255, image by image, as in the authors' code.
            "keep": 0..1 becomes 0..255. "smooth": as "stretch", with limits smoothed from call to call, for streams.
        chroma: where the colour comes from, see `runtime.color.fused_chroma`.
        tone: brightness of 16-bit grey sources (raw thermal frames), see `runtime.color.apply_tone`: "full",
            "percentile", "LOW:HIGH" or (low, high) in counts.
        warm_size: (H, W) of the frames to come, for which memory is then there before the first; None warms up with a
            small pair.

    Attributes:
        model: the file's name without its suffix.
        task: the task that the model was trained for, as its metadata say, or None.
        metadata: the model file's metadata.
        threads: threads that compute one frame.
        tone: the tone rule, parsed.

    Raises:
        InputError: a model, policy or number that is not understood or not there.
    """

    def __init__(
        self,
        model: str | Path = "ivif",
        *,
        backend: str = "auto",
        threads: int | None = None,
        range: str = "stretch",
        chroma: str = "auto",
        tone: Tone = "full",
        warm_size: tuple[int, int] | None = None,
    ):
        if backend not in BACKENDS:
            raise InputError(f"unknown backend '{backend}'; choose from {', '.join(BACKENDS)}")
        if range not in RANGE_POLICIES:
            raise InputError(f"unknown range policy '{range}'; choose from {', '.join(RANGE_POLICIES)}")
        check_chroma_policy(chroma)
        self._range, self._chroma = range, chroma
        self.tone = parse_tone(tone)
        self._smooth_range = SmoothRange()
        path = model_path(model)
        self._backend = OnnxRuntimeBackend.load(path, threads, BACKENDS[backend])
        self.model = path.stem
        self.metadata = self._backend.metadata
        self.task = self.metadata.get("task")
        self.threads = self._backend.threads
        self._warm_up(warm_size)

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
        luma = self._run(apply_tone(a, self.tone), apply_tone(b, self.tone))
        return compose(self._to_range(luma), fused_chroma(a, b, self._chroma))

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
        for name, luma in (("a", a), ("b", b)):
            if not isinstance(luma, np.ndarray) or luma.ndim != 2 or not np.issubdtype(luma.dtype, np.floating):
                kind = f"{luma.dtype} {luma.shape}" if isinstance(luma, np.ndarray) else type(luma).__name__
                raise InputError(f"{name} is {kind}; give an HxW array of float32")
            if luma.size == 0:
                raise InputError(f"{name} is empty: its shape is {luma.shape}")
            low, high = luma.min(), luma.max()
            if not (low >= 0 and high <= 1):  # false for NaN as well
                raise InputError(f"{name} has values from {low:g} to {high:g}; give finite values in [0, 1]")
        self._check_sizes(a, b)
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

    def _warm_up(self, size: tuple[int, int] | None) -> None:
        height, width = size or WARM_SIZE
        if height < 1 or width < 1:
            raise InputError(f"the warm-up size {width}x{height} is empty; give (H, W) of the frames to come")
        blank = np.zeros((self._backend.size[0] or height, self._backend.size[1] or width), np.float32)
        self._run(blank, blank)
