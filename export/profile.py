"""Which sizes an engine is for: an ONNX model's inputs and the optimization profile made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import InputError

if TYPE_CHECKING:
    import onnx

Size = tuple[int, int]  # height, width
Shape = tuple[int, ...]

MIN_SIZE, OPT_SIZE, MAX_SIZE = (64, 64), (480, 640), (1080, 1920)  # of a model with free height and width


@dataclass(frozen=True)
class TensorInfo:
    """An input or output: NumPy's name of its type, and its shape with None for what is free."""

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Model:
    """What the builder needs to know of an ONNX file."""

    path: Path
    content: bytes
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]  # a, b, fused

    @property
    def inputs(self) -> dict[str, tuple[int | None, ...]]:
        return {name: self.tensors[name].shape for name in ("a", "b")}


def read_model(path: Path) -> Model:
    """An ONNX file's content, metadata and inputs.

    Raises:
        InputError: no such file, not an ONNX model of fusion, or the package onnx is missing.
    """
    if not path.is_file():
        raise InputError(f"model {path} is {'not a file' if path.exists() else 'missing'}; give an .onnx file")
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise InputError(f"reading {path} needs the package onnx: pip install 'refusion[tensorrt]'") from error
    content = path.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise InputError(f"model {path} cannot be read, is it a whole .onnx file? ({error})") from error
    tensors = {value.name: _tensor_info(value) for value in (*model.graph.input, *model.graph.output)}
    if set(tensors) != {"a", "b", "fused"} or any(len(tensor.shape) != 4 for tensor in tensors.values()):
        raise InputError(
            f"model {path} has {', '.join(tensors) or 'nothing'}; a fusion model has inputs a, b and fused"
        )
    return Model(path, content, {entry.key: entry.value for entry in model.metadata_props}, tensors)


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    if not tensor.elem_type:
        return TensorInfo("none", ())
    from onnx.helper import tensor_dtype_to_np_dtype

    dtype = tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorInfo(dtype, tuple(dim.dim_value or None for dim in tensor.shape.dim))


def profile(
    model: Model, sizes: tuple[Size | None, Size | None, Size | None], batch: tuple[int, int, int]
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Smallest, usual and largest shape of each input.

    Args:
        model: its fixed axes stay as they are.
        sizes: (H, W) smallest, usual, largest; None for a default.
        batch: pairs in a call, smallest, usual, largest.

    Raises:
        InputError: sizes that shrink or are empty, or another size than the model is fixed to.
    """
    _refuse_other_size(model, sizes, batch)
    heights, widths = (_side(sizes, axis) for axis in (0, 1))
    for what, values in (("batch", batch), ("height", heights), ("width", widths)):
        if min(values) < 1 or list(values) != sorted(values):
            steps = " to ".join(map(str, values))
            raise InputError(
                f"the {what} goes from {steps} (smallest, usual, largest); none may be below the last or 1"
            )
    shapes = {}
    for name, fixed in model.inputs.items():
        axis = _height_axis(model)
        wanted = ({0: n, axis: h, axis + 1: w} for n, h, w in zip(batch, heights, widths, strict=True))
        smallest, usual, largest = (tuple(side or free[i] for i, side in enumerate(fixed)) for free in wanted)
        shapes[name] = (smallest, usual, largest)
    return shapes


def _side(sizes: tuple[Size | None, Size | None, Size | None], axis: int) -> tuple[int, int, int]:
    """Smallest, usual and largest height (axis 0) or width, defaults widened to hold what is given."""
    low, usual, high = (None if size is None else size[axis] for size in sizes)
    if usual is None:
        usual = max(1 if low is None else low, OPT_SIZE[axis] if high is None else min(OPT_SIZE[axis], high))
    return (
        min(MIN_SIZE[axis], usual) if low is None else low,
        usual,
        max(MAX_SIZE[axis], usual) if high is None else high,
    )


def _height_axis(model: Model) -> int:
    return 1 if model.metadata.get("io") == "bgr" else 2


def _refuse_other_size(model: Model, sizes: Sequence[Size | None], batch: tuple[int, int, int]) -> None:
    for shape in model.inputs.values():
        axis = _height_axis(model)
        for size in filter(None, sizes):
            if any(fixed not in (None, side) for fixed, side in zip(shape[axis : axis + 2], size, strict=True)):
                fixed = "x".join("any" if side is None else str(side) for side in shape[axis : axis + 2])
                raise InputError(
                    f"{model.path} is fixed to {fixed} (HxW), not {size[0]}x{size[1]}; export it anew with --size 0 0"
                )
        if shape[0] is not None and batch != (1, 1, 1) and set(batch) != {shape[0]}:
            raise InputError(f"{model.path} is fixed to a batch of {shape[0]}; export it anew with --batch 0")
