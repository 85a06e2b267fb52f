"""`python -m export.rtx_builder FOLDER`: one build of TensorRT-RTX in a process of its own.

Reads FOLDER/request.json; writes FOLDER/plan, or FOLDER/error.txt with one line.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InputError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """An ONNX file, its inputs' smallest, usual and largest shapes, and the GPUs to build for, as "8.9"."""

    model: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]
    compute_capabilities: list[str]


def main(folder: Path) -> int:
    request = Request(**json.loads((folder / "request.json").read_text(encoding="utf-8")))
    try:
        plan = build(request)
    except InputError as error:
        (folder / "error.txt").write_text(str(error), encoding="utf-8")
        return 2
    (folder / "plan").write_bytes(plan)
    return 0


def build(request: Request) -> bytes:
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise InputError(f"TensorRT-RTX cannot be imported: {error}") from error
    # The builder's code is TensorRT's, under another name. This process builds nothing else.
    sys.modules["tensorrt"] = tensorrt_rtx
    from export.tensorrt_builder import Options, build_plan

    def configure(config: tensorrt_rtx.IBuilderConfig) -> None:
        known = tensorrt_rtx.ComputeCapability.__members__
        config.num_compute_capabilities = len(request.compute_capabilities)
        for index, capability in enumerate(request.compute_capabilities):
            name = f"SM{capability.replace('.', '')}"
            if name not in known:
                targets = (member[2:] for member in known if member[2:].isdigit())
                raise InputError(
                    f"TensorRT-RTX {tensorrt_rtx.__version__} does not build for compute capability {capability}; it "
                    f"knows {', '.join(f'{target[:-1]}.{target[-1]}' for target in targets)}"
                )
            config.set_compute_capability(known[name], index)

    model = Path(request.model)
    return build_plan(model.read_bytes(), model.name, Options(request.shapes), configure)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
