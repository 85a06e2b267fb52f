"""Weights as safetensors with metadata; shipped weights by task name; a converter for the authors' .pth files."""

from __future__ import annotations

import os
import pickle
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from refusion.lite import LiteNet
from refusion.model import FusionNet
from runtime.errors import InputError

FORMAT_VERSION = "1"
# <task>.safetensors and <task>-lite.safetensors, beside the model card <task>.md
SHIPPED = Path(__file__).parent / "pretrained"
# What a file's metadata call its network -> the class.
NETWORKS: dict[str, type[FusionNet] | type[LiteNet]] = {"FusionNet": FusionNet, "LiteNet": LiteNet}


def shipped_weights() -> list[str]:
    """Names of the shipped weights: "ivif", "ivif-lite", ..."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def find_weights(name: str | Path) -> Path:
    """Path of shipped weights by name ("ivif", "ivif-lite"), or of a .safetensors or .pth file.

    Raises InputError where there is no such file.
    """
    shipped = SHIPPED / f"{name}.safetensors"
    if shipped.is_file():
        return shipped
    path = Path(name)
    if path.suffix not in (".safetensors", ".pth"):
        raise InputError(
            f"no weights '{name}': give one of {', '.join(shipped_weights())} or a .safetensors or .pth file"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    return path


def save_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write a network's state as safetensors, atomically. metadata values become strings."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    text = {"format_version": FORMAT_VERSION} | {key: str(value) for key, value in metadata.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=text)
        os.chmod(temporary, 0o644)  # mkstemp made it private
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State and metadata of a .safetensors file of ours or of one of the authors' .pth files, on the CPU.

    Raises InputError where the file is damaged or holds something else.
    """
    if path.suffix == ".pth":
        return read_official(path), {"format_version": FORMAT_VERSION, "source": "authors"}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error


def load_network(name: str | Path) -> tuple[FusionNet | LiteNet, dict[str, str]]:
    """The network with weights by name or path, in eval mode on the CPU, and the file's metadata.

    The metadata say whether it is a FusionNet or a LiteNet. Raises InputError where the file is not such weights.
    """
    path = find_weights(name)
    state, metadata = read_weights(path)
    version = metadata.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format version {version}, this release reads {FORMAT_VERSION}: update refusion")
    kind = metadata.get("network", "FusionNet")
    if kind not in NETWORKS:
        raise InputError(f"{path}: the weights of a '{kind}', this release knows {', '.join(NETWORKS)}")
    net = NETWORKS[kind]()
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        expected = set(net.state_dict())
        wrong = sorted(expected ^ set(state)) or [n for n in expected if state[n].shape != net.state_dict()[n].shape]
        raise InputError(f"{path}: not the weights of a {kind} ({len(wrong)} tensors differ: {wrong[0]})") from error
    return net.eval(), metadata


def load_fusion_net(name: str | Path) -> tuple[FusionNet, dict[str, str]]:
    """`load_network` where only the full network will do; InputError for a LiteNet's weights."""
    net, metadata = load_network(name)
    if not isinstance(net, FusionNet):
        raise InputError(f"{name}: the weights of a {type(net).__name__}, not of a FusionNet")
    return net, metadata


# The authors' names and ours: regular expressions, applied one after the other.
_OFFICIAL_NAMES = [
    (r"\.conv\.weight$", ".weight"),  # every convolution stands there twice
    (r"^project_in_(\d)", r"stem\1"),
    (r"^project_out_0", "reduce"),
    (r"^project_out_1", "output"),
    (r"\.body\.", "."),
    (r"\.attn\.(.*)project_out", r".attention.\1projection"),
    (r"\.attn\.", ".attention."),
    (r"\.ffn\.project_in", ".feed_forward.expand"),
    (r"\.ffn\.project_out", ".feed_forward.projection"),
    (r"\.ffn\.dwconv", ".feed_forward.depthwise"),
    (r"^FM\.project_mid", "fusion.projection"),
    (r"^FM\.project_out", "fusion.output"),
    (r"^FM\.project_E(\d)", r"fusion.expand\1"),
    (r"^FM\.project_E", "fusion.gate"),
    (r"^FM\.", "fusion."),
    (r"_(dwconv|d)\.", "_depthwise."),
]


def read_official(path: Path) -> dict[str, Tensor]:
    """State of FusionNet from one of the authors' .pth files.

    Nothing in the file is executed (weights_only). Raises InputError for anything but such a file.
    """
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a weights file that can be read safely ({type(error).__name__})") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: not the authors' weights (a {type(loaded).__name__}, not a dictionary of tensors)")
    expected = FusionNet().state_dict()
    state: dict[str, Tensor] = {}
    for name, tensor in loaded.items():
        ours = str(name)
        for pattern, replacement in _OFFICIAL_NAMES:
            ours = re.sub(pattern, replacement, ours)
        if ours not in expected or not isinstance(tensor, Tensor):
            raise InputError(f"{path}: not the authors' weights (unknown entry '{name}')")
        if ours in state and not torch.equal(state[ours], tensor):
            raise InputError(f"{path}: two different values for '{ours}'")
        state[ours] = tensor
    return state
