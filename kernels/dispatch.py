"""Which implementation runs: the kernels for CUDA tensors, plain PyTorch (`kernels.reference`) for all others.

The environment variable REFUSION_KERNELS forces one:
    reference   plain PyTorch, wherever the tensors are
    triton      the kernels; CUDA tensors only
    interpret   the kernels in Triton's interpreter; CPU tensors only. It needs TRITON_INTERPRET=1 before Triton is
                imported, which is set here where Triton is not yet there
Triton is optional and is imported when it is first needed: without it CUDA tensors go to the reference as well.
`backend_for(tensor)` says what is chosen for a tensor, `chosen()` what the last call of each operation took.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import reference

BACKENDS = ("reference", "triton", "interpret")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Multiply-adds may be fused, whatever the default of the Triton version is (it changes, with a warning).
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_chosen: dict[str, str] = {}


def _turn_interpreter_on() -> None:
    """Has effect only before Triton is imported; the launches check that it had."""
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"


if os.environ.get("REFUSION_KERNELS") == "interpret":
    _turn_interpreter_on()


def backend_for(tensor: Tensor) -> str:
    """What an operation on this tensor takes: "reference", "triton" or "interpret".

    Raises:
        ValueError: REFUSION_KERNELS is none of these, or can't serve a tensor on this device.
        RuntimeError: it asks for the kernels, and Triton is not installed.
    """
    forced = os.environ.get("REFUSION_KERNELS") or None
    if forced is None:
        return "triton" if tensor.is_cuda and _HAS_TRITON else "reference"
    if forced not in BACKENDS:
        raise ValueError(f"REFUSION_KERNELS is {forced!r}; expected one of {', '.join(BACKENDS)}")
    if forced == "reference":
        return forced
    if not _HAS_TRITON:
        raise RuntimeError(f"REFUSION_KERNELS={forced} needs Triton, which is not installed: pip install triton")
    if tensor.is_cuda != (forced == "triton"):
        expected = "CUDA" if forced == "triton" else "CPU"
        raise ValueError(f"REFUSION_KERNELS={forced} needs {expected} tensors; got one on {tensor.device}")
    if forced == "interpret" and not torch.compiler.is_compiling():
        _turn_interpreter_on()
    return forced


def chosen() -> dict[str, str]:
    """The backend that the last call of each operation took, by the operation's name."""
    return dict(_chosen)


def choose(operation: str, tensor: Tensor) -> str:
    """`backend_for`, noted for `chosen()`."""
    backend = backend_for(tensor)
    _chosen[operation] = backend
    return backend


def fusion_loss(
    fused: Tensor, a: Tensor, b: Tensor, w: Tensor, v: Tensor, gradient_weight: float | None = None
) -> tuple[Tensor, Tensor]:
    """Intensity and gradient term of the fusion loss, two scalars: see `kernels.reference.fusion_loss`.

    fused, a, b: (N, 1, H, W) in [0, 1]; w, v: (N, 2, H, W); any mixture of floating types, one device.
    gradient_weight: what the caller multiplies the gradient term with. It changes speed alone: the kernel then writes
    the derivative of intensity + gradient_weight * gradient in the forward pass already.
    """
    _check_images("fusion_loss", {"fused": fused, "a": a, "b": b}, {"w": w, "v": v})
    if choose("fusion_loss", fused) == "reference":
        return reference.fusion_loss(fused, a, b, w, v, gradient_weight)
    from kernels.fusion_loss import OPERATION

    intensity, gradient = OPERATION((fused, a, b, w, v), gradient_weight)
    return intensity, gradient


def fusion_meta_grad(
    fused: Tensor, a: Tensor, b: Tensor, w: Tensor, v: Tensor, tangent: Tensor, gradient_weight: float
) -> tuple[Tensor, Tensor]:
    """Derivative of <dL_f/dF, tangent> in w and v: see `kernels.reference.fusion_meta_grad`.

    fused, a, b, tangent: (N, 1, H, W); w, v: (N, 2, H, W). Returns (dw, dv), both (N, 2, H, W).
    """
    _check_images("fusion_meta_grad", {"fused": fused, "a": a, "b": b, "tangent": tangent}, {"w": w, "v": v})
    if choose("fusion_meta_grad", fused) == "reference":
        return reference.fusion_meta_grad(fused, a, b, w, v, tangent, gradient_weight)
    from kernels.fusion_meta_grad import OPERATION

    dw, dv = OPERATION((fused, a, b, w, v, tangent), gradient_weight)
    return dw, dv


def reconstruction_loss(a: Tensor, b: Tensor, a_hat: Tensor, b_hat: Tensor) -> Tensor:
    """L_r, a scalar: see `kernels.reference.reconstruction_loss`. All images (N, 1, H, W) in [0, 1]."""
    _check_images("reconstruction_loss", {"a": a, "b": b, "a_hat": a_hat, "b_hat": b_hat}, {})
    if choose("reconstruction_loss", a) == "reference":
        return reference.reconstruction_loss(a, b, a_hat, b_hat)
    from kernels.reconstruction_loss import OPERATION

    return OPERATION((a, b, a_hat, b_hat))[0]


def max_normalized_update(parameters: Sequence[Tensor], gradients: Sequence[Tensor], lr: float) -> Tensor:
    """p -= lr * g / max|g| in place, the maximum over all tensors: see `kernels.reference.max_normalized_update`.

    Returns max|g|, a 0-d tensor. Where it is 0 nothing changes; where it is not finite nothing is applied.
    """
    _check_update(parameters, gradients)
    if choose("max_normalized_update", parameters[0]) == "reference":
        return reference.max_normalized_update(parameters, gradients, lr)
    from kernels.max_normalized_update import update

    return update(parameters, gradients, lr)


def _check_images(operation: str, images: dict[str, Tensor], maps: dict[str, Tensor]) -> None:
    """One device, floating types; images (N, 1, H, W) and maps (N, 2, H, W) with the N, H, W of the first image.

    Raises:
        ValueError, TypeError: with the name of the argument, what was got and what was expected.
    """
    name, first = next(iter(images.items()))
    if first.dim() != 4 or first.shape[1] != 1 or 0 in first.shape:
        raise ValueError(f"{operation}: {name} has shape {tuple(first.shape)}; expected (N, 1, H, W), none of them 0")
    n, _, height, width = first.shape
    for channels, group in ((1, images), (2, maps)):
        for key, tensor in group.items():
            expected = (n, channels, height, width)
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{operation}: {key} has shape {tuple(tensor.shape)}; expected {expected}")
            _check_like(operation, key, tensor, first.device)


def _check_like(operation: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype not in FLOATS:
        expected = "float16, bfloat16, float32 or float64"
        raise TypeError(f"{operation}: {name} is {tensor.dtype}; expected {expected}")
    if tensor.device != device:
        raise ValueError(f"{operation}: {name} is on {tensor.device}; expected {device}, where the others are")


def _check_update(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    operation = "max_normalized_update"
    if not parameters or len(parameters) != len(gradients):
        raise ValueError(
            f"{operation}: got {len(parameters)} parameters and {len(gradients)} gradients; expected as many of both"
        )
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        if parameter.shape != gradient.shape:
            raise ValueError(
                f"{operation}: gradient {index} has shape {tuple(gradient.shape)}; "
                f"expected {tuple(parameter.shape)}, its parameter's"
            )
        if parameter.numel() == 0:
            raise ValueError(f"{operation}: parameter {index} is empty; expected at least one element")
        for kind, tensor, first in (("parameter", parameter, parameters[0]), ("gradient", gradient, gradients[0])):
            _check_like(operation, f"{kind} {index}", tensor, parameters[0].device)
            if tensor.dtype != first.dtype:
                raise TypeError(f"{operation}: {kind} {index} is {tensor.dtype}; expected {first.dtype}, as {kind} 0")
