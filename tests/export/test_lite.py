"""The embedded lite models equal PyTorch where an exporter's shortcuts would show: flat pictures, and single pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from refusion.weights import load_network
from runtime import Fuser
from runtime.tasks import TASKS


@pytest.mark.parametrize("task", TASKS)
def test_embedded_lite_equals_pytorch_on_flat_pictures_and_single_pixels(task: str) -> None:
    fuser, net = Fuser(f"{task}-lite", threads=1), load_network(f"{task}-lite")[0]
    rng = np.random.default_rng(0)
    half_flat = rng.random((40, 56), dtype=np.float32)
    half_flat[:, 20:] = 0.25
    for a in (np.full((40, 56), 0.25, np.float32), half_flat, rng.random((1, 1), dtype=np.float32)):
        b = np.full_like(a, 0.5)
        with torch.inference_mode():
            expected = net(torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None])[0, 0].numpy()
        fused = fuser.fuse_luma(a, b)
        assert np.isfinite(fused).all()
        np.testing.assert_allclose(fused, expected, rtol=0, atol=1e-5)
