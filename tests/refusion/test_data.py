"""Training data: pairs become crops that depend on nothing but (seed, epoch, stage, position)."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from refusion.data import PairDataset
from runtime.color import luma
from runtime.errors import InputError
from runtime.images import read_image, write_image
from runtime.tasks import TASKS

SIZES = [(40, 56), (64, 48), (33, 47), (50, 50), (41, 70)]


def write_pairs(root: Path, sizes=SIZES, names=("a", "b")) -> Path:
    """Pairs in which b is 255 - a, so that a crop of one at the same place and flip can be told from the other."""
    rng = np.random.default_rng(0)
    for index, size in enumerate(sizes):
        image = rng.integers(0, 256, size, np.uint8)
        write_image(root / names[0] / f"{index:02}.png", image)
        write_image(root / names[1] / f"{index:02}.png", 255 - image)
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    return write_pairs(tmp_path / "train" / "generated")


def test_tasks_name_both_sources():
    assert list(TASKS) == ["ivif", "mif", "mfif", "meif"]
    assert TASKS["ivif"] == ("infrared", "visible")


def test_pairs_are_found_below_several_roots(tmp_path, root):
    other = write_pairs(tmp_path / "other", [(40, 40)])
    dataset = PairDataset([root.parent, other], crop=16, seed=0)
    assert len(dataset) == 6
    assert [pair.a for pair in dataset.pairs][::5] == [root / "a" / "00.png", other / "a" / "00.png"]


def test_folders_by_other_names(tmp_path):
    root = write_pairs(tmp_path, names=("ir", "vis"))
    assert len(PairDataset([root], crop=16, seed=0, a_name="ir", b_name="vis")) == len(SIZES)


def test_whole_pairs_are_the_files(root):
    dataset = PairDataset([root], crop=16, seed=0)
    for index, pair in enumerate(dataset.pairs):
        a, b = dataset[index]
        assert a.shape == b.shape == (1, *SIZES[index])
        assert a.dtype == torch.float32
        np.testing.assert_array_equal(a[0], luma(read_image(pair.a)))
        np.testing.assert_array_equal(b[0], luma(read_image(pair.b)))


def test_colour_becomes_luma(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    write_image(tmp_path / "a" / "1.png", colour)
    write_image(tmp_path / "b" / "1.png", colour.astype(np.uint16) * 257)
    a, b = PairDataset([tmp_path], crop=16, seed=0)[0]
    expected = (colour @ np.array([0.114, 0.587, 0.299]) / 255).astype(np.float32)
    np.testing.assert_allclose(a[0], expected, atol=0.5 / 255 + 1e-5)
    np.testing.assert_allclose(b[0], expected, atol=0.5 / 65535 + 1e-5)


def test_16_bit_counts_are_scaled_by_the_tone(tmp_path):
    counts = np.arange(8000, 8000 + 40 * 25, dtype=np.uint16).reshape(40, 25)
    write_image(tmp_path / "a" / "1.png", counts)
    write_image(tmp_path / "b" / "1.png", np.zeros((40, 25), np.uint8))
    a, _ = PairDataset([tmp_path], crop=16, seed=0)[0]
    assert a.min() == 0
    assert a.max() == 1
    assert a.median() == pytest.approx(0.5, abs=0.001)
    a, _ = PairDataset([tmp_path], crop=16, seed=0, tone="full")[0]
    np.testing.assert_array_equal(a[0], counts.astype(np.float32) / 65535)
    a, _ = PairDataset([tmp_path], crop=16, seed=0, tone=(8000, 12000))[0]
    np.testing.assert_allclose(a[0], (counts - 8000.0) / 4000, atol=1e-5)


def crops_of(image: np.ndarray, size: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(image, (size, size)).reshape(-1, size, size)


def test_samples_are_aligned_crops(root):
    dataset = PairDataset([root], crop=16, seed=3, flips=False)
    wholes = [dataset[index][0][0].numpy() for index in range(len(dataset))]
    for position in range(10):
        a, b = dataset.sample(0, 1, position)
        assert a.shape == b.shape == (1, 16, 16)
        torch.testing.assert_close(a + b, torch.ones(1, 16, 16), rtol=0, atol=1e-6)
        assert sum(bool((crops_of(whole, 16) == a.numpy()).all((1, 2)).any()) for whole in wholes) == 1


def test_crops_reach_every_border(tmp_path):
    root = write_pairs(tmp_path, [(9, 10)])
    dataset = PairDataset([root], crop=8, seed=0, flips=False)
    whole = dataset[0][0][0].numpy()
    seen = {a.numpy().tobytes() for a, _ in (dataset.sample(0, 0, position) for position in range(100))}
    assert seen == {crop.tobytes() for crop in crops_of(whole, 8)}


def test_flips_are_the_four_mirror_images_of_both(tmp_path):
    root = write_pairs(tmp_path, [(8, 8)])
    dataset = PairDataset([root], crop=8, seed=0)
    whole = dataset[0][0][0].numpy()
    samples = [dataset.sample(0, 0, position) for position in range(60)]
    for a, b in samples:
        torch.testing.assert_close(a + b, torch.ones(1, 8, 8), rtol=0, atol=1e-6)
    flipped = (whole, whole[::-1], whole[:, ::-1], whole[::-1, ::-1])
    assert {a.numpy().tobytes() for a, _ in samples} == {x.tobytes() for x in flipped}


@pytest.mark.parametrize("size", [(5, 40), (40, 5), (3, 2), (1, 1), (15, 15)])
def test_small_images_are_padded_by_reflection(tmp_path, size):
    root = write_pairs(tmp_path, [size])
    dataset = PairDataset([root], crop=16, seed=0, flips=False)
    a, b = dataset.sample(0, 0, 0)
    assert a.shape == (1, 16, 16)
    torch.testing.assert_close(a + b, torch.ones(1, 16, 16), rtol=0, atol=1e-6)
    whole = dataset[0][0]
    assert set(a.flatten().tolist()) <= set(whole.flatten().tolist())
    if size == (15, 15):
        torch.testing.assert_close(a[:, :15, :15], whole)
        torch.testing.assert_close(a[:, 15, :15], whole[:, 13])


def test_each_pass_shows_every_pair_once(tmp_path):
    for value in range(8):
        for name in ("a", "b"):
            write_image(tmp_path / name / f"{value}.png", np.full((20, 20), value, np.uint8))
    dataset = PairDataset([tmp_path], crop=16, seed=5)

    def shown(epoch: int, stage: int, turn: int) -> tuple[int, ...]:
        samples = [dataset.sample(epoch, stage, position) for position in range(8 * turn, 8 * turn + 8)]
        return tuple(round(float(a.mean()) * 255) for a, _ in samples)

    orders = [shown(0, 0, 0), shown(0, 0, 1), shown(0, 1, 0), shown(1, 0, 0)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len(set(orders)) == 4


def test_sampling_has_no_state(root):
    first = PairDataset([root], crop=16, seed=1)
    second = PairDataset([root], crop=16, seed=1)
    later = [first.sample(2, 1, position) for position in (7, 3, 11)]
    for position, (a, b) in zip((11, 3, 7), reversed(later), strict=True):
        again = second.sample(2, 1, position)
        assert torch.equal(again[0], a)
        assert torch.equal(again[1], b)


@pytest.mark.parametrize("change", [{"seed": 2}, {"epoch": 1}, {"stage": 1}, {"step": 1}])
def test_everything_in_the_key_matters(root, change):
    key = {"seed": 1, "epoch": 0, "stage": 0, "step": 0}

    def draw(seed: int, epoch: int, stage: int, step: int) -> torch.Tensor:
        return PairDataset([root], crop=16, seed=seed).batch(epoch, stage, step, 2)[0]

    assert torch.equal(draw(**key), draw(**key))
    assert not torch.equal(draw(**key), draw(**{**key, **change}))


def test_ranks_share_one_global_batch(root):
    dataset = PairDataset([root], crop=16, seed=1)
    for step in range(4):  # beyond the end of the five pairs
        whole = dataset.batch(0, 2, step, 4)
        parts = [dataset.batch(0, 2, step, 2, rank=rank, world=2) for rank in range(2)]
        for source in range(2):
            assert whole[source].shape == (4, 1, 16, 16)
            assert torch.equal(whole[source], torch.cat([part[source] for part in parts]))
        singles = [dataset.sample(0, 2, position) for position in range(4 * step, 4 * step + 4)]
        assert torch.equal(whole[0], torch.stack([a for a, _ in singles]))


@pytest.mark.parametrize("batch_size, world, steps", [(1, 1, 5), (2, 1, 3), (5, 1, 1), (2, 2, 2), (4, 2, 1)])
def test_steps_per_epoch(root, batch_size, world, steps):
    assert PairDataset([root], crop=16, seed=0).steps_per_epoch(batch_size, world) == steps


def assert_same_batches(left, right) -> None:
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order(root, workers):
    dataset = PairDataset([root], crop=16, seed=1)
    got = list(dataset.batches(1, 2, 3, 12, 2, rank=1, world=2, workers=workers))
    assert_same_batches(got, [dataset.batch(1, 2, step, 2, rank=1, world=2) for step in range(3, 12)])
    assert list(dataset.batches(0, 0, 4, 4, 2, workers=workers)) == []


def test_threads_end_with_the_iterator(root):
    dataset = PairDataset([root], crop=16, seed=1)
    before = threading.active_count()
    batches = dataset.batches(0, 0, 0, 1000, 2, workers=2)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_threads_arrive(root, workers):
    dataset = PairDataset([root], crop=16, seed=1, cache_gb=0)
    for file in (root / "a").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="no such file"):
        list(dataset.batches(0, 0, 0, 5, 2, workers=workers))


def test_files_beyond_the_cache_are_read_again(root):
    cached = PairDataset([root], crop=16, seed=1)
    partly = PairDataset([root], crop=16, seed=1, cache_gb=2 * (40 * 56 + 64 * 48) / 1e9)
    uncached = PairDataset([root], crop=16, seed=1, cache_gb=0)
    expected = list(cached.batches(0, 0, 0, 5, 2))
    assert_same_batches(partly.batches(0, 0, 0, 5, 2), expected)
    assert_same_batches(uncached.batches(0, 0, 0, 5, 2), expected)
    for file in root.rglob("0[01].png"):
        file.unlink()
    assert partly[1][0].shape == (1, 64, 48)  # from memory
    with pytest.raises(InputError, match="no such file"):
        uncached[0]


# What is refused.


def spoil(root: Path) -> None:
    """One of each: unequal sizes, truncated, not an image, unmatched."""
    write_image(root / "b" / "00.png", np.zeros((40, 55), np.uint8))
    damaged = root / "a" / "01.png"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    (root / "b" / "02.png").write_text("text")
    (root / "b" / "03.png").unlink()


def test_bad_pairs_are_refused(root):
    spoil(root)
    with pytest.raises(InputError, match=r"03\.png has no partner") as caught:
        PairDataset([root], crop=16, seed=0)
    (root / "a" / "03.png").unlink()
    with pytest.raises(InputError) as caught:
        PairDataset([root], crop=16, seed=0)
    message = str(caught.value)
    assert f"{root / 'a' / '00.png'} and {root / 'b' / '00.png'} differ in size (56x40 and 55x40)" in message
    assert f"{root / 'a' / '01.png'}: truncated" in message
    assert f"{root / 'b' / '02.png'}: not an image" in message
    assert "\n" not in message


def test_bad_pairs_are_skipped_on_request(root, caplog):
    spoil(root)
    with caplog.at_level(logging.WARNING, "refusion"):
        dataset = PairDataset([root], crop=16, seed=0, skip_bad=True)
    assert [pair.stem for pair in dataset.pairs] == ["04"]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    for name in ("00.png", "01.png", "02.png", "03.png"):
        assert sum(name in line for line in lines) == 1
    assert dataset.batch(0, 0, 0, 3)[0].shape == (3, 1, 16, 16)


def test_nothing_left(root):
    for file in (root / "b").iterdir():
        file.write_text("text")
    with pytest.raises(InputError, match="no usable image pair"):
        PairDataset([root], crop=16, seed=0, skip_bad=True)


@pytest.mark.parametrize("arguments", [{"crop": 0}, {"seed": -1}, {"tone": "auto"}])
def test_bad_arguments(root, arguments):
    write_image(root / "a" / "00.png", np.zeros((40, 56), np.uint16))
    with pytest.raises(InputError):
        PairDataset([root], **{"crop": 16, "seed": 0, **arguments})


def test_missing_folders(tmp_path):
    with pytest.raises(InputError, match="no data folder"):
        PairDataset([], crop=16, seed=0)
    with pytest.raises(InputError, match="no such folder"):
        PairDataset([tmp_path / "none"], crop=16, seed=0)


def test_real_training_data(data_dir):
    dataset = PairDataset([data_dir / "ivif" / "train" / "RoadScene"], crop=64, seed=0)
    a, b = dataset.batch(0, 0, 0, 4)
    assert a.shape == b.shape == (4, 1, 64, 64)
    assert 0 <= a.min() < a.max() <= 1
    assert 0 <= b.min() < b.max() <= 1
