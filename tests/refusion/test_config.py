"""Settings: flags over TOML over recipe over defaults; what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from refusion.config import FIELDS, RECIPES, TrainConfig, add_flags, from_flags, read_toml
from refusion.records import write_config
from runtime.errors import InputError
from runtime.tasks import TASKS


def parse(*flags: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_flags(parser.parse_args(flags))


def test_defaults_are_the_papers() -> None:
    config = parse()
    assert (config.epochs, config.batch_size, config.meta_steps, config.lr, config.lr_step) == (50, 2, 600, 1e-4, 10)
    assert (config.loss_proposal, config.meta_optimizer, config.accumulate) == ("paper", "max_normalized", 2)


def test_every_field_is_a_flag_and_a_key(tmp_path: Path) -> None:
    config = TrainConfig(data=("x y", "z"), lr=3e-4, exchange=False, dev=("d",), task="mif", out=str(tmp_path / "o"))
    write_config(tmp_path, config)
    assert TrainConfig(**read_toml(tmp_path / "config.toml")) == config
    assert set(read_toml(tmp_path / "config.toml")) == set(FIELDS) - {"resume"}
    flags = parse("--data", "x y", "z", "--lr", "3e-4", "--no-exchange", "--dev", "d", "--task", "mif")
    assert (flags.data, flags.lr, flags.exchange, flags.dev, flags.task) == (("x y", "z"), 3e-4, False, ("d",), "mif")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("epochs = 7\ncrop = 32\nlr = 1\n")
    config = parse("--config", str(tmp_path / "my.toml"), "--crop", "48")
    assert (config.epochs, config.crop, config.lr, config.batch_size) == (7, 48, 1.0, 2)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("network", ["full", "lite"])
def test_recipe_is_the_network_s_and_the_task_s(network: str, task: str) -> None:
    config = parse("--recipe", "--network", network, "--task", task, "--epochs", "3")
    expected = read_toml(RECIPES / f"{network}.toml") | read_toml(RECIPES / f"{task}.toml") | {"epochs": 3}
    assert {key: getattr(config, key) for key in expected} == expected
    assert (config.network, config.task, config.epochs) == (network, task, 3)


def test_a_task_s_recipe_changes_only_what_a_task_may() -> None:
    for task in TASKS:
        assert set(read_toml(RECIPES / f"{task}.toml")) <= {
            "task",
            "prior",
            "prior_w",
            "prior_v",
            "darken",
            "gradient_weight",
        }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch = 3", "unknown setting 'epoch'"),
        ('task = "xray"', "give one of ivif, mif, mfif, meif"),
        ("epochs = 2.5", "'epochs' is 2.5: give a int"),
        ("epochs = true", "'epochs' is True: give a int"),
        ('data = "one"', "give a list of strings"),
        ("epochs = ", "cannot be read as TOML"),
        ("epochs = 0", "'epochs' is 0: give at least 1"),
        ("lr = -1.0", "'lr' is -1.0: give more than 0"),
        ("lr = nan", "'lr' is nan: give more than 0"),
        ("meta_steps = -1", "'meta_steps' is -1: give 0 or more"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "my.toml").write_text(text)
    with pytest.raises(InputError, match=words) as error:
        parse("--config", str(tmp_path / "my.toml"))
    assert "\n" not in str(error.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        parse("--config", str(tmp_path / "absent.toml"))
