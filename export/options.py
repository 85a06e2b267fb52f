"""What can be chosen of a model: its graph, its INT8 layers, its engine. Imports nothing heavy."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InputError

PRECISIONS = ("fp32", "fp16", "int8")
FORMATS = ("onnx", "engine", "auto", "rtx-engine", "triton-repository")
IOS = ("luma", "bgr")
RANGES = ("stretch", "keep")
METHODS = ("percentile", "entropy", "minmax")  # of calibration
REMAINDERS = ("fp16", "fp32")  # type of the layers that are not INT8
OPSETS = range(18, 23)  # what the exporter writes and ONNX Runtime 1.23 reads, in IR version 10
OPSET = 18  # the default: TensorRT 10.3 reads up to 20
FLOAT16_SCALES = 19  # the opset from which INT8 can stand beside float16
DEFAULT_SIZE = (480, 640)
FLOOR = 52.0  # dB that the choice of INT8 layers keeps on the calibration pictures
MAX_BATCH = 8  # pairs in a call of an engine or server, where the model leaves it free

Size = tuple[int, int]  # height, width; 0 leaves a side free


@dataclass(frozen=True)
class Int8:
    """How an INT8 model is calibrated, and what becomes INT8."""

    calibration: Path | None = None  # folder of pairs; None: generated scenes, for ivif alone
    method: str = METHODS[0]
    floor: float = FLOOR
    remainder: str = REMAINDERS[0]
    skip_bad: bool = False


@dataclass(frozen=True)
class Graph:
    """What the ONNX model is like."""

    precision: str = "fp16"
    size: Size = DEFAULT_SIZE
    batch: int = 1  # 0 leaves it free
    io: str = "luma"
    range: str = RANGES[0]  # of io "bgr"
    opset: int | None = None  # None: the oldest that can hold it
    int8: Int8 = Int8()

    def check(self) -> None:
        """Raise InputError unless such a model can be written."""
        chosen = (
            (self.precision, PRECISIONS),
            (self.io, IOS),
            (self.range, RANGES),
            (self.int8.method, METHODS),
            (self.int8.remainder, REMAINDERS),
        )
        for value, choices in chosen:
            if value not in choices:
                raise InputError(f"unknown '{value}'; choose from {', '.join(choices)}")
        if min(*self.size, self.batch) < 0:
            height, width = self.size
            raise InputError(f"size {height}x{width} (HxW) and batch {self.batch}: give 1 or more, or 0 for any")
        if self.opset is not None and self.opset not in OPSETS:
            raise InputError(f"opset {self.opset} is not supported; choose from {OPSETS.start} to {OPSETS.stop - 1}")
        if self.opset is not None and self.opset < self._oldest_opset:
            raise InputError(
                f"INT8 beside float16 needs opset {FLOAT16_SCALES}, not {self.opset}; or take --int8-remainder fp32"
            )

    @property
    def half(self) -> bool:
        """Whether what is not INT8 is float16."""
        return self.precision == "fp16" or (self.precision == "int8" and self.int8.remainder == "fp16")

    @property
    def written_opset(self) -> int:
        return self.opset or self._oldest_opset

    @property
    def _oldest_opset(self) -> int:
        return FLOAT16_SCALES if self.precision == "int8" and self.half else OPSET

    def file_name(self, stem: str) -> str:
        """As ivif-fp16-480x640.onnx: weights, precision, H x W, and what is not the default."""
        size = "dynamic" if self.size == (0, 0) else "x".join(str(side) if side else "any" for side in self.size)
        batch = {0: ["batch"], 1: []}.get(self.batch, [f"batch{self.batch}"])
        return "-".join([stem, self.precision, size, *batch, *([] if self.io == "luma" else [self.io])]) + ".onnx"


@dataclass(frozen=True)
class Engine:
    """How an engine is built of an ONNX model, see `export.engine.build_engine`."""

    min_size: Size | None = None
    opt_size: Size | None = None
    max_size: Size | None = None
    max_batch: int = MAX_BATCH
    workspace_gb: float | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: str = ""
    device: int = 0
    compute_capabilities: tuple[str, ...] = ()  # of an rtx-engine

    def command(self, model: Path, out: Path, form: str) -> str:
        """The command that makes this engine of an ONNX model, for the machine that is to run it."""
        words = ["python", "-m", "export.build", "--checkpoint", str(model), "--format", form, "--out", str(out)]
        for name in ("min_size", "opt_size", "max_size"):
            if (size := getattr(self, name)) is not None:
                words += [f"--{name.replace('_', '-')}", *map(str, size)]
        values = {
            "max-batch": self.max_batch if self.max_batch != MAX_BATCH else None,
            "workspace": self.workspace_gb,
            "optimization-level": self.optimization_level,
            "timing-cache": self.timing_cache,
            "hardware-compatible": self.hardware_compatible or None,
            "device": self.device or None,
        }
        for name, value in values.items():
            words += [f"--{name}", str(value)] if value is not None else []
        words += ["--version-compatible"] if self.version_compatible else []
        words += ["--compute-capability", *self.compute_capabilities] if self.compute_capabilities else []
        return shlex.join([*words, "--force"])
