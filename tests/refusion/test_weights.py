"""Weights files: round trip, the authors' files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from refusion.model import FusionNet, LossProposalNet
from refusion.weights import find_weights, load_fusion_net, read_weights, save_weights
from runtime.errors import InputError

CASES = {
    "IVIF": ("infrared", "visible"),
    "MIF": ("CT_PET_SPECT", "MRI"),
    "MFIF": ("near", "far"),
    "MEIF": ("under", "over"),
}


def official_luma(path: Path) -> np.ndarray:
    """(1, 1, H, W) in [0, 1], as the authors' test code computes it."""
    rgb = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB).astype(np.float32)
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[None, None, ..., 0] / 255


@pytest.mark.parametrize("task", CASES)
def test_official_weights_give_the_authors_outputs(data_dir: Path, task: str) -> None:
    official = data_dir / "official"
    net, _ = load_fusion_net(official / "models" / f"ReFusion_{task}.pth")
    outputs = sorted((official / "outputs" / task).glob("*.npy"))
    assert len(outputs) == 2
    with torch.inference_mode():
        for output in outputs:
            pair = [next((official / "test_cases" / task / side).glob(f"{output.stem}.*")) for side in CASES[task]]
            fused = net(*(torch.from_numpy(official_luma(path)) for path in pair))
            # On 800x1200 pixels the reference, float32 too, is itself 1.3e-5 from float64: hence the relative part.
            np.testing.assert_allclose(fused[0, 0].numpy(), np.load(output), rtol=1e-5, atol=1e-5)
        random = np.load(official / "outputs" / task / "random_33x47.npz")
        a, b = torch.from_numpy(random["x"]).split(1, dim=1)
        np.testing.assert_allclose(net(a, b).numpy(), random["y"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_large_picture_is_as_exact_as_float32_can_be(data_dir: Path) -> None:
    """Sums over 800x1200 pixels: the authors' order of operations loses 1.3e-5 here, ours must not."""
    official = data_dir / "official"
    net, _ = load_fusion_net(official / "models" / "ReFusion_MEIF.pth")
    pair = [torch.from_numpy(official_luma(official / "test_cases/MEIF" / s / "ICCV_03.png")) for s in CASES["MEIF"]]
    with torch.inference_mode():
        single = net(*pair)
        double = net.double()(*(x.double() for x in pair))
    assert (single - double).abs().max() < 2e-6


def test_round_trip_keeps_weights_and_metadata(tmp_path: Path) -> None:
    net = FusionNet()
    path = tmp_path / "new" / "net.safetensors"
    save_weights(path, net.state_dict(), {"task": "ivif", "epochs": 3})
    loaded, metadata = load_fusion_net(path)
    assert metadata == {"format_version": "1", "task": "ivif", "epochs": "3"}
    for name, tensor in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert [p.name for p in path.parent.iterdir()] == ["net.safetensors"]


def test_from_pretrained_is_the_network_by_path(tmp_path: Path) -> None:
    net = FusionNet()
    save_weights(tmp_path / "net.safetensors", net.state_dict(), {})
    loaded = FusionNet.from_pretrained(tmp_path / "net.safetensors")
    a, b = torch.rand(2, 1, 1, 9, 11)
    assert torch.equal(loaded(a, b), net.eval()(a, b))


def test_refused_files_give_one_line(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_weights(other, LossProposalNet().state_dict(), {})
    newer = tmp_path / "newer.safetensors"
    save_weights(newer, FusionNet().state_dict(), {"format_version": "9"})
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(other.read_bytes()[:1000])
    (tmp_path / "empty.pth").touch()
    torch.save({"net": torch.zeros(3)}, tmp_path / "foreign.pth")
    torch.save(FusionNet(), tmp_path / "pickled.pth")  # a module: would execute code
    for name, words in {
        "other.safetensors": "not the weights of a FusionNet",
        "newer.safetensors": "format version 9",
        "truncated.safetensors": "not a safetensors file",
        "empty.pth": "read safely",
        "foreign.pth": "unknown entry 'net'",
        "pickled.pth": "read safely",
        "absent.safetensors": "no such weights file",
        "unheard-of": "no weights 'unheard-of'",
    }.items():
        with pytest.raises(InputError, match=words) as error:
            load_fusion_net(tmp_path / name if "." in name else name)
        assert "\n" not in str(error.value)


def test_failed_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        save_weights(tmp_path / ("x" * 300 + ".safetensors"), FusionNet().state_dict(), {})
    assert list(tmp_path.iterdir()) == []


def test_read_weights_gives_the_metadata_of_official_files(data_dir: Path) -> None:
    state, metadata = read_weights(data_dir / "official" / "models" / "ReFusion_IVIF.pth")
    assert metadata["source"] == "authors"
    assert sum(tensor.numel() for tensor in state.values()) == 59_856
    assert find_weights(data_dir / "official" / "models" / "ReFusion_IVIF.pth").suffix == ".pth"
