"""Which model file fuses: the embedded ones by task and size, or a path."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import InputError
from runtime.tasks import TASKS

MODELS = Path(__file__).parent / "models"  # <task>.onnx and <task>-lite.onnx
SIZES = ("full", "lite")
SUFFIXES = (".onnx", ".engine")


def find_model(task: str | Path = "ivif", model: str | Path = "auto", *, live: bool, gpu: bool) -> tuple[Path, str]:
    """File of the model to use, and in a few words why that one.

    Args:
        task: a task, the name of an embedded model ("ivif-lite"), or a path to a model; the last two are used whatever
            `model` says.
        model: "auto", "full", "lite" or a path. "auto" takes the full network for stills and where a GPU computes, and
            the lite one for live pictures on a CPU.
        live: frames come from a stream and must be fused as fast as they come.
        gpu: a GPU computes.

    Raises:
        InputError: no such task or model.
    """
    if Path(task).suffix in SUFFIXES:
        return Path(task), "as asked for"
    name = str(task)
    task, _, size = name.partition("-")
    if task not in TASKS or size not in ("", *SIZES):
        raise InputError(f"unknown model '{name}'; give a task ({', '.join(TASKS)}) or a path to an .onnx file")
    model = size or model
    if Path(model).suffix in SUFFIXES:
        return Path(model), "as asked for"
    if model == "auto":
        size, why = _choose(live, gpu)
    elif model in SIZES:
        size, why = str(model), "as asked for"
    else:
        raise InputError(f"unknown model '{model}'; give auto, full, lite or a path to an .onnx or .engine file")
    path = MODELS / (f"{task}.onnx" if size == "full" else f"{task}-{size}.onnx")
    if not path.is_file():
        raise InputError(f"no embedded {size} model for task '{task}'; give a path to an .onnx file (--model PATH)")
    return path, why


def _choose(live: bool, gpu: bool) -> tuple[str, str]:
    if gpu:
        return "full", "auto: a GPU computes"
    if live:
        return "lite", "auto: live pictures on a CPU"
    return "full", "auto: stills"
