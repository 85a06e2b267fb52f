"""Weights of a random lite network, which is quick to trace, and models of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from refusion.lite import LiteNet
from refusion.weights import save_weights


@pytest.fixture(scope="session")
def lite_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = LiteNet()
    nn.init.normal_(net.head.weight, std=0.5)  # zeros would make the maps constant
    path = tmp_path_factory.mktemp("weights") / "ivif-random.safetensors"
    save_weights(path, net.state_dict(), {"task": "ivif", "network": "LiteNet", "source_commit": "abc"})
    return path
