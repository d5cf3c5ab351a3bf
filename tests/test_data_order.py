"""The order of samples and how steps, accumulation and ranks share it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_remoe.data.batches import MicroBatches, repeated_validation, training_batches, validation_batches
from ds_remoe.data.documents import Document
from ds_remoe.data.order import SampleOrder, micro_batch, micro_batch_positions
from ds_remoe.data.store import PackedDataset, TokenStoreWriter
from ds_remoe.data.tokenizer_training import TrainingSample, train_sentencepiece

SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 97, 1009]) | st.integers(1, 3000)


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(0, 2**31 - 1), st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    epoch_positions = np.arange(size, dtype=np.int64) + epoch * size
    samples = SampleOrder(size, seed)[epoch_positions]
    assert samples.dtype == np.int64
    np.testing.assert_array_equal(np.sort(samples), np.arange(size))


@settings(max_examples=50, deadline=None)
@given(SIZES, st.integers(0, 2**31 - 1), st.data())
def test_a_seek_finds_what_a_run_through_finds(size: int, seed: int, data: st.DataObject) -> None:
    run = SampleOrder(size, seed)[np.arange(3 * size, dtype=np.int64)]
    position = data.draw(st.integers(0, 3 * size - 1))
    assert SampleOrder(size, seed)[position] == run[position]


def test_epochs_and_seeds_differ_and_nothing_else_does() -> None:
    runs = [tuple(SampleOrder(100, seed)[np.arange(100) + 100 * epoch]) for seed in range(20) for epoch in range(20)]
    assert len(set(runs)) == len(runs)
    assert tuple(range(100)) not in runs


def test_the_order_is_fixed_for_good() -> None:
    assert SampleOrder(10, 0)[np.arange(20)].tolist() == [0, 3, 6, 2, 8, 7, 5, 9, 1, 4, 0, 6, 5, 9, 1, 2, 7, 8, 4, 3]


def test_every_sample_is_equally_likely_at_every_position() -> None:
    epochs = 6000
    for size in (3, 5, 8):
        samples = SampleOrder(size, 1)[np.arange(epochs * size, dtype=np.int64)].reshape(epochs, size)
        counts = np.stack([np.bincount(column, minlength=size) for column in samples.T])
        expected = epochs / size
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    neighbours = SampleOrder(1000, 2)[np.arange(100_000, dtype=np.int64)]
    assert abs(np.corrcoef(neighbours[:-1], neighbours[1:])[0, 1]) < 0.02


def test_large_datasets_are_looked_up_without_being_built() -> None:
    order = SampleOrder(10**15 + 37, 3)
    samples = order[np.arange(10_000, dtype=np.int64) + 10**14]
    assert len(np.unique(samples)) == len(samples)
    assert samples.min() >= 0
    assert samples.max() < 10**15 + 37
    assert abs(samples.mean() / 5e14 - 1) < 0.05


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.sampled_from([(1, 4), (2, 2), (4, 1)]), st.integers(0, 1000))
def test_the_global_batch_does_not_depend_on_its_division(size: int, division: tuple[int, int], step: int) -> None:
    world_size, accumulation_steps = division
    order = SampleOrder(37, 5)
    micro_batches = [
        micro_batch(
            order, step, a, rank, micro_batch_size=size, accumulation_steps=accumulation_steps, world_size=world_size
        ).tolist()
        for a in range(accumulation_steps)
        for rank in range(world_size)
    ]
    positions = np.arange(step * 4 * size, (step + 1) * 4 * size)
    assert micro_batches == order[positions].reshape(4, size).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step is -1"),
        ({"accumulation_index": 2}, "accumulation_index is 2; accumulation_steps is 2"),
        ({"rank": 3}, "rank is 3; world_size is 3"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
    ],
)
def test_indices_outside_of_the_batch_are_refused(change: dict[str, int], message: str) -> None:
    arguments = {"step": 0, "accumulation_index": 0, "rank": 0} | {
        "micro_batch_size": 2,
        "accumulation_steps": 2,
        "world_size": 3,
    }
    assert micro_batch_positions(**arguments).tolist() == [0, 1]
    with pytest.raises(ValueError, match=message):
        micro_batch_positions(**arguments | change)


def test_orders_and_positions_outside_of_their_range_are_refused() -> None:
    for size, seed in ((0, 0), (2**63, 0), (1, -1)):
        with pytest.raises(ValueError, match="it must be in"):
            SampleOrder(size, seed)
    with pytest.raises(IndexError, match="position -1 is negative"):
        SampleOrder(3, 0)[np.array([0, -1])]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    from ds_remoe.config.schema import TrainedTokenizer

    documents = [Document(f"{i} " + chr(97 + i % 26) * (i % 40), ("x", "y")[i % 2]) for i in range(300)]
    sample = TrainingSample(10**6)
    folder = tmp_path_factory.mktemp("store")
    for document in documents:
        sample.add(document)
    writer = TokenStoreWriter(folder, train_sentencepiece(TrainedTokenizer(vocab_size=512), sample))
    for document in documents:
        writer.add(document)
    writer.finish(0.2)
    return PackedDataset(folder, "train", 16)


def test_training_batches_are_the_samples_as_tensors(dataset: PackedDataset) -> None:
    batches = training_batches(dataset, seed=9, micro_batch_size=3, accumulation_steps=2, world_size=2)
    tokens, domains = batches.tokens(5, 1, 0), batches.domains(5, 1, 0)
    assert (tokens.dtype, domains.dtype) == (torch.int64, torch.int16)
    assert tokens.shape == domains.shape == (3, 17)
    samples = SampleOrder(len(dataset), 9)[np.arange(66, 69)]
    for row, sample in enumerate(samples.tolist()):
        np.testing.assert_array_equal(tokens[row].numpy(), dataset[sample])
        np.testing.assert_array_equal(domains[row].numpy(), dataset.domains(sample))


def test_validation_takes_the_same_samples_at_every_world_size(dataset: PackedDataset) -> None:
    def samples_of(batches: MicroBatches) -> list[list[int]]:
        return [
            batches.samples(0, a, rank).tolist()
            for a in range(batches.accumulation_steps)
            for rank in range(batches.world_size)
        ]

    evaluations = [
        samples_of(validation_batches(dataset, num_micro_batches=12, micro_batch_size=2, world_size=world_size))
        for world_size in (1, 2, 3, 4, 12)
    ]
    assert all(evaluation == evaluations[0] for evaluation in evaluations)
    assert len({sample for micro_batch in evaluations[0] for sample in micro_batch}) == 24
    assert repeated_validation(dataset, len(dataset) // 8, 8) is None
    told = repeated_validation(dataset, len(dataset) // 8 + 1, 8) or ""
    assert told.startswith(f"remoe.train.eval_batches = {len(dataset) // 8 + 1}: an evaluation takes ")
    assert f"set it to {len(dataset) // 8} or less" in told
    told = repeated_validation(dataset, 1, len(dataset) + 1) or ""
    assert "fewer than a global batch; raise remoe.data.valid_fraction" in told
    with pytest.raises(ValueError, match=r"num_micro_batches is 12; .* world_size, 5"):
        validation_batches(dataset, num_micro_batches=12, micro_batch_size=2, world_size=5)
