"""Which implementation runs, what every operation rejects, and that no transform of PyTorch is lost on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import kernels
from kernels import reference
from refusion.losses import ReconstructionLoss
from refusion.meta import exchange, meta_step
from refusion.model import FusionNet, LossProposalNet

ROOT = Path(kernels.__file__).resolve().parents[1]


def images(count: int, device: str, h: int = 4, w: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.rand(1, 1, h, w, generator=generator, dtype=torch.float64).to(device) for _ in range(count)]


def maps(device: str, h: int = 4, w: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.rand(1, 2, h, w, generator=generator, dtype=torch.float64).to(device) for _ in range(2)]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh process."""
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "REFUSION_KERNELS")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False, cwd=ROOT)


# Each operation as a function of tensors alone, and its inputs.
OPERATIONS: dict[str, tuple[Callable, Callable]] = {
    "fusion_loss": (lambda k: lambda *x: k.fusion_loss(*x, 0.3), lambda d: [*images(3, d), *maps(d)]),
    "fusion_meta_grad": (
        lambda k: lambda *x: k.fusion_meta_grad(*x, 0.3),
        lambda d: [*images(3, d), *maps(d), *images(1, d)],
    ),
    "reconstruction_loss": (lambda k: lambda *x: (k.reconstruction_loss(*x),), lambda d: images(4, d)),
}


@pytest.fixture(params=OPERATIONS)
def operation(request: pytest.FixtureRequest, device: str) -> tuple[Callable, Callable, list[Tensor], list[Tensor]]:
    """The operation by the kernels, by the reference, its inputs, and a direction for each."""
    make, make_inputs = OPERATIONS[request.param]
    inputs = make_inputs(device)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(device) for x in inputs]
    return make(kernels), make(reference), inputs, directions


def close(ours: Any, exact: Any) -> None:
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-14)
    leaves = exact if isinstance(exact, (tuple, list)) else [exact]
    assert any((x != 0).any() for x in leaves)  # nothing is silently zero


# --- the choice ---


def test_cpu_tensors_go_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFUSION_KERNELS", raising=False)
    assert kernels.backend_for(torch.ones(1)) == "reference"
    kernels.reconstruction_loss(*images(4, "cpu"))
    assert kernels.chosen()["reconstruction_loss"] == "reference"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_tensors_go_to_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFUSION_KERNELS", raising=False)
    assert kernels.backend_for(torch.ones(1, device="cuda")) == "triton"


def test_forced_backend_is_taken_and_told(with_kernels: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.reconstruction_loss(*images(4, device))
    kernels.max_normalized_update(images(1, device), images(1, device), 0.1)
    assert {kernels.chosen()[name] for name in ("reconstruction_loss", "max_normalized_update")} == {with_kernels}
    monkeypatch.setenv("REFUSION_KERNELS", "reference")
    kernels.reconstruction_loss(*images(4, device))
    assert kernels.chosen()["reconstruction_loss"] == "reference"


def test_unknown_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSION_KERNELS", "cuda")
    with pytest.raises(ValueError, match="'cuda'; expected one of reference, triton, interpret"):
        kernels.reconstruction_loss(*images(4, "cpu"))


def test_compiled_kernels_need_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("REFUSION_KERNELS", "triton")
    with pytest.raises(ValueError, match="needs CUDA tensors; got one on cpu"):
        kernels.reconstruction_loss(*images(4, "cpu"))


def test_triton_is_imported_late_and_can_be_absent() -> None:
    code = "import sys, kernels; assert 'triton' not in sys.modules"
    assert python(code).returncode == 0
    code = """
import sys, importlib.util
sys.modules["triton"] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch, kernels
x = torch.rand(4, 1, 1, 5, 6)
print(kernels.reconstruction_loss(*x).item())
import os
os.environ["REFUSION_KERNELS"] = "interpret"
kernels.reconstruction_loss(*x)
"""
    done = python(code)
    assert float(done.stdout) > 0
    assert "RuntimeError: REFUSION_KERNELS=interpret needs Triton, which is not installed" in done.stderr


def test_interpreter_is_turned_on_by_the_environment_alone() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    code = (
        "import torch, kernels; print(kernels.reconstruction_loss(*torch.rand(4, 1, 1, 3, 3)).item(), kernels.chosen())"
    )
    done = python(code, REFUSION_KERNELS="interpret")
    assert "{'reconstruction_loss': 'interpret'}" in done.stdout, done.stderr


def test_interpreter_after_triton_was_imported_is_a_clear_error() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    code = "import triton, torch, kernels; kernels.reconstruction_loss(*torch.rand(4, 1, 1, 3, 3))"
    done = python(code, REFUSION_KERNELS="interpret")
    assert done.returncode == 1
    assert "set TRITON_INTERPRET=1 before Python starts" in done.stderr.splitlines()[-1]


@pytest.mark.usefixtures("with_kernels")
def test_functions_keep_their_names_when_their_modules_are_imported() -> None:
    from kernels.fusion_loss import OPERATION

    assert OPERATION.name == "fusion_loss"
    assert callable(kernels.fusion_loss)
    assert kernels.fusion_loss.__name__ == "fusion_loss"


# --- bad input ---


@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_wrong_inputs_name_what_was_got_and_expected(
    backend: str, with_kernels: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSION_KERNELS", with_kernels if backend == "kernels" else "reference")
    fused, a, b = images(3, device)
    w, v = maps(device)
    with pytest.raises(ValueError, match=r"fusion_loss: w has shape \(1, 1, 4, 5\); expected \(1, 2, 4, 5\)"):
        kernels.fusion_loss(fused, a, b, w[:, :1], v)
    with pytest.raises(ValueError, match=r"fusion_loss: fused has shape \(1, 4, 5\); expected \(N, 1, H, W\)"):
        kernels.fusion_loss(fused[0], a, b, w, v)
    with pytest.raises(ValueError, match=r"fused has shape \(0, 1, 4, 5\); expected \(N, 1, H, W\), none of them 0"):
        kernels.fusion_loss(fused[:0], a[:0], b[:0], w[:0], v[:0])
    with pytest.raises(
        ValueError, match=r"reconstruction_loss: a_hat has shape \(1, 1, 3, 5\); expected \(1, 1, 4, 5\)"
    ):
        kernels.reconstruction_loss(a, b, fused[:, :, 1:], b)
    with pytest.raises(TypeError, match=r"fusion_meta_grad: tangent is torch.int64; expected float16, bfloat16"):
        kernels.fusion_meta_grad(fused, a, b, w, v, fused.long(), 1.0)
    with pytest.raises(ValueError, match=f"reconstruction_loss: b is on meta; expected {device}"):
        kernels.reconstruction_loss(a, b.to("meta"), fused, fused)


# --- transforms ---

pytestmark_transforms = pytest.mark.usefixtures("with_kernels")


@pytestmark_transforms
def test_forward_mode(operation: tuple) -> None:
    ours, exact, inputs, directions = operation

    (value, tangent), (exact_value, exact_tangent) = (
        torch.func.jvp(function, tuple(inputs), tuple(directions)) for function in (ours, exact)
    )
    close(value, exact_value)
    close(tangent, exact_tangent)


@pytestmark_transforms
def test_dual_tensors_that_also_need_a_gradient(operation: tuple) -> None:
    ours, exact, inputs, directions = operation

    def along(function: Callable) -> list[Tensor]:
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(x.clone().requires_grad_(), d) for x, d in zip(inputs, directions, strict=True)
            ]
            return [forward_ad.unpack_dual(y).tangent for y in function(*duals)]

    close(along(ours), along(exact))


@pytestmark_transforms
def test_forward_mode_in_one_input_alone(operation: tuple) -> None:
    ours, exact, (first, *rest), (direction, *_) = operation

    def along(function: Callable) -> Any:
        return torch.func.jvp(lambda x: function(x, *rest), (first,), (direction,))[1]

    close(along(ours), along(exact))


@pytestmark_transforms
def test_both_modes_nested(operation: tuple) -> None:
    ours, exact, inputs, directions = operation

    def scalar(function: Callable) -> Callable[..., Tensor]:
        return lambda *x: sum(y.square().sum() for y in function(*x))

    def forward_over_reverse(function: Callable) -> Any:
        gradient = torch.func.grad(scalar(function), argnums=tuple(range(len(inputs))))
        return torch.func.jvp(gradient, tuple(inputs), tuple(directions))[1]

    def reverse_over_forward(function: Callable) -> Any:
        def slope(*x: Tensor) -> Tensor:
            return torch.func.jvp(scalar(function), x, tuple(directions))[1]

        return torch.func.grad(slope, argnums=tuple(range(len(inputs))))(*inputs)

    close(forward_over_reverse(ours), forward_over_reverse(exact))
    close(reverse_over_forward(ours), reverse_over_forward(exact))


@pytestmark_transforms
def test_compiled_in_one_graph_with_its_backward(operation: tuple) -> None:
    ours, exact, inputs, _ = operation

    def gradients(function: Callable) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        return (*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves))

    close(gradients(torch.compile(ours, fullgraph=True, backend="aot_eager")), gradients(exact))


@pytestmark_transforms
def test_tangent_inside_a_compiled_function(operation: tuple) -> None:
    ours, exact, inputs, directions = operation

    def along(function: Callable) -> Callable[..., Any]:
        return lambda x, d: torch.func.jvp(function, tuple(x), tuple(d))[1]

    compiled = torch.compile(along(ours), fullgraph=True, backend="aot_eager")
    close(compiled(inputs, directions), along(exact)(inputs, directions))


@pytestmark_transforms
def test_tangent_through_a_function_that_was_compiled_before(operation: tuple) -> None:
    """Its graph has no tangent: it is not used again, but traced anew."""
    ours, exact, inputs, directions = operation

    def along(function: Callable) -> list[Tensor]:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, d) for x, d in zip(inputs, directions, strict=True)]
            return [forward_ad.unpack_dual(y).tangent for y in function(*duals)]

    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    compiled(*inputs)
    close(along(compiled), along(exact))


@pytestmark_transforms
def test_double_backward_inside_a_compiled_function(device: str) -> None:
    fused, a, b = images(3, device)
    w, v = maps(device)
    leaves = (fused.requires_grad_(), w.requires_grad_())

    def twice(fused: Tensor, w: Tensor, library: Any) -> Tensor:
        intensity, gradient = library.fusion_loss(fused, a, b, w, v)
        (first,) = torch.autograd.grad(intensity + 0.3 * gradient, fused, create_graph=True)
        return torch.autograd.grad(first.square().sum() * 1e3, w)[0]

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(lambda *x: twice(*x, kernels), fullgraph=True, backend="aot_eager")
        close(compiled(*leaves), twice(*leaves, reference))


# --- training ---


@pytestmark_transforms
@pytest.mark.parametrize("method", ["jvp", "double"])
def test_meta_step_is_the_same_with_kernels(method: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    fusion, proposal, outer = (m.to(device).double() for m in (FusionNet(8), LossProposalNet(8), ReconstructionLoss(8)))
    batches = [exchange(*torch.rand(2, 1, 1, 9, 8, dtype=torch.float64, device=device)) for _ in range(2)]

    def step() -> Any:
        return meta_step(fusion, proposal, outer, *batches, gradient_weight=0.3, lr=1e-2, method=method)

    ours = step()
    assert kernels.chosen()["fusion_loss"] != "reference"
    monkeypatch.setenv("REFUSION_KERNELS", "reference")
    exact = step()
    torch.testing.assert_close(ours.gradients, exact.gradients, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(ours.inner_loss, exact.inner_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.outer_loss, exact.outer_loss, rtol=1e-12, atol=0)


@pytestmark_transforms
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without distributed training")
def test_in_a_data_parallel_step(device: str, tmp_path: Path) -> None:
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        network = FusionNet(8).to(device)
        parallel = torch.nn.parallel.DistributedDataParallel(network)
        a, b = torch.rand(2, 1, 1, 8, 9, device=device)
        w, v = (x.float() for x in maps(device, 8, 9))
        sum(kernels.fusion_loss(parallel(a, b), a, b, w, v, 1.0)).backward()
        ours = [p.grad.clone() for p in network.parameters()]
        network.zero_grad()
        sum(reference.fusion_loss(network(a, b), a, b, w, v)).backward()
        torch.testing.assert_close(ours, [p.grad for p in network.parameters()], rtol=1e-4, atol=1e-7)
    finally:
        torch.distributed.destroy_process_group()
