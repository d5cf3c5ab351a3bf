"""Batch sizes: the same as DeepSpeed derives, and refused exactly where DeepSpeed refuses them."""

from __future__ import annotations

from types import SimpleNamespace

from deepspeed.runtime.config import DeepSpeedConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_remoe.config.batch import ACCUMULATION, MICRO, TRAIN, BatchSizes, derive_batch_sizes
from ds_remoe.config.checks_engine import check_batch

sizes = st.none() | st.integers(-1, 40)


def of_deepspeed(config: dict[str, int], world_size: int) -> BatchSizes | None:
    """What DeepSpeed makes of the configuration; None where it raises."""
    target = SimpleNamespace(
        train_batch_size=config.get(TRAIN),
        train_micro_batch_size_per_gpu=config.get(MICRO),
        gradient_accumulation_steps=config.get(ACCUMULATION),
        world_size=world_size,
    )
    try:
        DeepSpeedConfig._set_batch_related_parameters(target)
        DeepSpeedConfig._batch_assertion(target)
    except (AssertionError, ZeroDivisionError):
        return None
    return BatchSizes(
        target.train_batch_size, target.train_micro_batch_size_per_gpu, target.gradient_accumulation_steps
    )


@settings(deadline=None)
@given(sizes, sizes, sizes, st.integers(1, 8))
def test_agrees_with_deepspeed(train: int | None, micro: int | None, accumulation: int | None, world_size: int) -> None:
    values = {TRAIN: train, MICRO: micro, ACCUMULATION: accumulation}
    config = {key: value for key, value in values.items() if value is not None}
    expected = of_deepspeed(config, world_size)
    problems = list(check_batch(config, config, world_size))
    assert bool(problems) == (expected is None), problems
    if expected is not None:
        assert derive_batch_sizes(config, world_size) == expected
        assert expected.fits(world_size)


@settings(deadline=None)
@given(sizes, sizes, sizes)
def test_without_a_world_size_refuses_what_no_world_size_fits(
    train: int | None, micro: int | None, accumulation: int | None
) -> None:
    values = {TRAIN: train, MICRO: micro, ACCUMULATION: accumulation}
    config = {key: value for key, value in values.items() if value is not None}
    fits_some = any(of_deepspeed(config, world_size) is not None for world_size in range(1, 41))
    assert bool(list(check_batch(config, config, None))) == (not fits_some)
