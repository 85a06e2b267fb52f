"""Settings of a training run: one dataclass, every field a flag and a key of a TOML file."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"  # full.toml and lite.toml, and what differs for a task in <task>.toml


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Defaults are the paper's recipe; a task's TOML file under refusion/recipes holds ours."""

    # What is trained on what
    task: Literal["ivif", "mif", "mfif", "meif"] = _setting("ivif", "which fusion task the weights are for")
    data: tuple[str, ...] = _setting((), "folders with pairs: each holds a/ and b/, or folders that do")
    a_name: str = _setting("a", "name of the folder of source A")
    b_name: str = _setting("b", "name of the folder of source B")
    skip_bad: bool = _setting(False, "leave out unreadable, unmatched and unequal pairs instead of refusing")
    out: str = _setting("runs/ivif", "folder for checkpoints, logs and weights")
    network: Literal["full", "lite"] = _setting("full", "the fusion network, or the small one for bare CPUs")
    init: str = _setting("", "weights of the fusion network to start from: a task name or a file")
    crop: int = _setting(128, "side of the square crops, pixels")
    flips: bool = _setting(True, "flip crops at random")
    darken: float = _setting(0.0, "multiply each source's crop by a random factor from [1 - darken, 1]")

    # Schedule
    epochs: int = _setting(50, "epochs")
    batch_size: int = _setting(2, "pairs in a batch of one process, before the exchange doubles it")
    exchange: bool = _setting(True, "double each batch with the sources swapped")
    meta_steps: int = _setting(600, "inner and outer updates an epoch; 0 leaves the loss-proposal network as it is")
    fusion_steps: int = _setting(0, "fusion and reconstruction updates an epoch; 0 = once over the training set")
    lr: float = _setting(1e-4, "learning rate of the fusion and the reconstruction network (Adam)")
    lr_inner: float = _setting(1e-4, "step of the inner update")
    lr_meta: float = _setting(1e-4, "learning rate of the loss-proposal network")
    schedule: Literal["step", "cosine"] = _setting("step", "how learning rates fall")
    lr_step: int = _setting(10, "step schedule: epochs between falls")
    lr_gamma: float = _setting(0.1, "step schedule: factor at each fall")
    gradient_weight: float = _setting(1.0, "weight of the loss's gradient term at the end")
    ramp: bool = _setting(
        True, "the gradient term's weight grows from 1/epochs of that; otherwise it is the same throughout"
    )

    # Distillation
    teacher: str = _setting("", "weights of a network to learn from beside the loss: a task name or a file")
    distill: float = _setting(1.0, "weight of the distance to the teacher's fused image")

    # Loss proposal and its meta-learning
    loss_proposal: Literal["paper", "symmetric"] = _setting("paper", "kind of loss-proposal network")
    prior: Literal["intensity", "sharpness", "exposure"] = _setting("intensity", "what the prior on w prefers")
    prior_w: float = _setting(0.0, "strength of the prior on the intensity weights w; 0 = none")
    prior_v: float = _setting(0.0, "strength of the gradient prior on the gradient weights v; 0 = none")
    meta_gradient: Literal["jvp", "double"] = _setting("jvp", "exact meta-gradient by a JVP, or by a double backward")
    meta_optimizer: Literal["max_normalized", "adam"] = _setting(
        "max_normalized", "update of the loss-proposal network"
    )
    accumulate: int = _setting(2, "outer gradients that make one update of the loss-proposal network")
    outer: Literal["reconstruction"] = _setting("reconstruction", "outer loss; others through refusion.train.train()")
    outer_noise: float = _setting(0.0, "noise added to the fused image before it is reconstructed (standard deviation)")

    # Machine
    seed: int = _setting(0, "seed of everything random")
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N")
    threads: int = _setting(0, "CPU threads; 0 = all")
    amp: Literal["none", "bf16", "fp16"] = _setting("none", "mixed precision (fp16: meta steps stay in float32)")
    recompute: bool = _setting(False, "gradient checkpointing: recompute blocks in the backward to save memory")
    cache_gb: float = _setting(2.0, "memory for decoded images, GB")

    # Records
    checkpoint_every: int = _setting(200, "steps between checkpoints")
    log_every: int = _setting(20, "steps between log records")
    dev: tuple[str, ...] = _setting((), "folders with pairs to measure on; the best weights are kept")
    dev_every: int = _setting(1, "epochs between measurements")
    dev_limit: int = _setting(4, "pairs of each dev folder that are measured; 0 = all")
    resume: bool = _setting(False, "go on from the last checkpoint in out")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "crop", "checkpoint_every", "log_every", "dev_every"):
            _refuse(getattr(self, name) < 1, name, getattr(self, name), "at least 1")
        for name in (
            "meta_steps",
            "fusion_steps",
            "threads",
            "dev_limit",
            "prior_w",
            "prior_v",
            "outer_noise",
            "gradient_weight",
            "distill",
        ):
            _refuse(getattr(self, name) < 0, name, getattr(self, name), "0 or more")
        for name in ("lr", "lr_inner", "lr_meta", "lr_gamma"):
            _refuse(not getattr(self, name) > 0, name, getattr(self, name), "more than 0")


def _refuse(wrong: bool, name: str, value: object, expected: str) -> None:
    if wrong:
        raise InputError(f"setting '{name}' is {value}: give {expected}")


_TYPES = typing.get_type_hints(TrainConfig)
FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}


def _check(name: str, value: Any, origin: str) -> Any:
    """A TOML value as the field's type; InputError names the key, the file and what is allowed."""
    kind = _TYPES[name]
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    if choices:
        if value in choices:
            return value
        raise InputError(f"{origin}: '{name}' is {value!r}: give one of {', '.join(choices)}")
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise InputError(f"{origin}: '{name}' is {value!r}: give a list of strings")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{origin}: '{name}' is {value!r}: give a {kind.__name__}")
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """Settings of a TOML file; unknown keys and wrong types are an InputError."""
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as TOML ({error})") from error
    unknown = sorted(set(settings) - set(FIELDS))
    if unknown:
        raise InputError(f"{path}: unknown setting '{unknown[0]}': known are {', '.join(FIELDS)}")
    return {name: _check(name, value, str(path)) for name, value in settings.items()}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field, and --config and --recipe; a flag that is not given leaves the TOML file's value."""
    parser.add_argument("--config", type=Path, help="TOML file with any of these settings; flags win over it")
    parser.add_argument(
        "--recipe",
        action="store_true",
        help="start from the recipe that made the shipped weights of the network and the task",
    )
    for name, f in FIELDS.items():
        kind, flag = _TYPES[name], "--" + name.replace("_", "-")
        text = f"{f.metadata['help']} (default: {f.default if f.default not in ('', ()) else 'none'})"
        if kind is bool:
            parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif typing.get_origin(kind) is tuple:
            parser.add_argument(flag, dest=name, nargs="+", default=None, metavar="DIR", help=text)
        elif typing.get_origin(kind) is Literal:
            parser.add_argument(flag, dest=name, choices=typing.get_args(kind), default=None, help=text)
        else:
            parser.add_argument(flag, dest=name, type=kind, default=None, metavar=kind.__name__.upper(), help=text)


def from_flags(args: argparse.Namespace) -> TrainConfig:
    """The configuration: defaults, then the recipe, then the TOML file, then flags."""
    flags = {name: getattr(args, name) for name in FIELDS if getattr(args, name, None) is not None}
    from_file = read_toml(args.config) if args.config else {}
    settings: dict[str, Any] = {}
    if args.recipe:
        for choice in ("network", "task"):
            name = flags.get(choice, from_file.get(choice, FIELDS[choice].default))
            settings |= read_toml(RECIPES / f"{name}.toml")
    settings |= from_file | flags
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    return TrainConfig(**values)
