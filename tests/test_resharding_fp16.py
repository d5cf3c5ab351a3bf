"""fp16's loss scale, scaled losses and resharding, on real engines: slow on a CPU, so DeepSpeed refuses it there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from forked_ranks import fork_ranks
from test_resharding_dropin import Cut, all_parameters, build, train

from ds_remoe.deepspeed_loss_scale import LossScale, saved_loss_scale
from ds_remoe.deepspeed_optimizer_state import base_optimizer, optimizer_files, saved_cut

DYNAMIC = {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 3, "hysteresis": 2}


class Notes(logging.Handler):
    """What a load tells the user."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        logging.getLogger("ds_remoe.training.resharding").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def scaler_of(engine: Any) -> Any:
    return getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config


def scale_in(checkpoint: Path) -> LossScale | None:
    cut = saved_cut(checkpoint)
    assert cut is not None
    found = [saved_loss_scale(torch.load(path, weights_only=False)) for path in optimizer_files(checkpoint, cut)]
    assert all(scale == found[0] for scale in found)
    return found[0]


def carry_the_loss_scale(folder: Path) -> None:
    """Overflows, then growth; the resharded engine has the scale of the one that saved, and its next steps."""
    type(get_accelerator()).is_fp16_supported = lambda self: True
    notes = Notes()
    cuts: list[tuple[Cut, Cut]] = [((2, 1), (1, 2)), ((1, 2), (2, 0)), ((2, 0), (1, 0)), ((1, 0), (2, 1))]
    for index, (before, after) in enumerate(cuts):
        first, second = (build(cut, all_parameters, fp16=DYNAMIC) for cut in (before, after))
        train(first, 9, seed=1)
        assert 0 < first.skipped_steps < 9
        first.save_checkpoint(str(folder), f"cut{index}")
        saved = scale_in(folder / f"cut{index}")
        assert saved is not None
        notes.said.clear()
        second.load_checkpoint(str(folder), f"cut{index}")
        scaler = scaler_of(second)
        assert (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter) == (
            saved.scale,
            saved.iteration,
            saved.last_overflow,
        )
        assert saved.scale < 2**20
        assert saved.last_overflow > 0
        told = [text for text in notes.said if "hysteresis" in text]
        assert len(told) == (1 if (before[1], after[1]) == (0, 1) and dist.get_rank() == 0 else 0)
        if before[1] and after[1]:
            assert saved.hysteresis == scaler.cur_hysteresis == 1
        assert train(second, 5, seed=3) == pytest.approx(train(first, 5, seed=3), abs=2e-2)
        if bool(before[1]) == bool(after[1]):  # the same rules from there on
            assert scaler_of(first).cur_scale == scaler.cur_scale
            assert scaler_of(first).last_overflow_iter == scaler.last_overflow_iter
    fixed = build((2, 1), all_parameters, fp16={"enabled": True, "loss_scale": 128})
    train(fixed, 2, seed=1)
    fixed.save_checkpoint(str(folder), "fixed")
    notes.said.clear()
    anew = build((1, 2), all_parameters, fp16=DYNAMIC)
    anew.load_checkpoint(str(folder), "fixed")
    assert scaler_of(anew).cur_scale == 2**20
    assert [text for text in notes.said if "starts anew at 1.04858e+06" in text] or dist.get_rank() > 0
    notes.said.clear()
    fixed.load_checkpoint(str(folder), "cut1")
    assert fixed.optimizer.cur_scale == 128
    assert not notes.said


def scale_the_loss(folder: Path) -> None:
    """Stage 0 has the moments and the gradient norm of stage 1; DeepSpeed's own are 2^8 times too small."""
    type(get_accelerator()).is_fp16_supported = lambda self: True
    moments = []
    for stage in (1, 0):
        engine = build((1, stage), all_parameters, fp16={"enabled": True, "initial_scale_power": 8})
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(dist.get_rank())).half()
        loss = engine(x, torch.zeros(16, dtype=torch.int64))
        assert float(engine.backward(loss)) == float(loss)
        engine.step()
        states = base_optimizer(engine).state.values()
        square = torch.stack([state["exp_avg"].double().square().sum() for state in states]).sum()
        dist.all_reduce(square)  # each rank has a part at stage 1, and all of them at stage 0
        whole = float(square) / (1 if stage else dist.get_world_size())
        moments.append((whole**0.5, engine.remoe.grad_norm))
    assert moments[0][0] > 1e-3
    assert moments[1] == pytest.approx(moments[0], rel=1e-2)


@pytest.mark.parametrize("check", [carry_the_loss_scale, scale_the_loss])
def test_fp16(check: Any, tmp_path: Path) -> None:
    codes, output = fork_ranks(check, 2, tmp_path, log=tmp_path / "log", timeout=120)
    assert codes == [0, 0], output
