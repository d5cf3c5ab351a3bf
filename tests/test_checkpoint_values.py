"""`engine.load_checkpoint` of drop-in engines: files are read as values, or refused before anything changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split
from deepspeed.runtime.zero.config import ZeroStageEnum
from forked_ranks import fork_ranks
from torch import Tensor, nn

import ds_remoe
from ds_remoe.deepspeed_checkpoint_io import DamagedFileError, UnsafeFileError
from ds_remoe.training.agreement import agreed

D, E = 8, 4
TAG = "saved"


class Model(nn.Module):
    def __init__(self, ep_size: int | None) -> None:
        super().__init__()
        self.stem = nn.Linear(D, D)
        self.moe = (
            None
            if ep_size is None
            else ds_remoe.MoE(D, ds_remoe.SwiGLU(D, 6), num_experts=E, ep_size=ep_size, router="topk", k=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        return (hidden if self.moe is None else hidden + self.moe(hidden)[0]).float().square().mean()


def build(initialize: Callable[..., Any], ep_size: int | None, stage: int, **config: Any) -> Any:
    torch.manual_seed(0)
    model = Model(ep_size)
    given = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}},
        "zero_optimization": {"stage": stage},
    }
    keywords = {"trust_checkpoints": config.pop("trust_checkpoints")} if "trust_checkpoints" in config else {}
    groups = split({"params": list(model.parameters()), "name": "all"})
    return initialize(model=model, model_parameters=groups, config=given | config, **keywords)[0]


def train(engine: Any, steps: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(2 * seed + dist.get_rank())
    losses = []
    for _ in range(steps):
        x = torch.randn(4, D, generator=generator)
        loss = engine(x.to(next(engine.module.parameters()).dtype))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


class RunsCode:
    """Makes a folder when it is unpickled, on every rank that does it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.makedirs, (self.path, 0o777, True)


@dataclass
class Settings:
    """What a user may keep in `client_state`."""

    width: int


def plant(path: Path, planted: object) -> None:
    """Put an object into a file, beside what it has; all ranks go on when it is there."""
    dist.barrier()
    if dist.get_rank() == 0:
        content = torch.load(path, weights_only=False)
        torch.save({**content, "planted": planted}, path)
    dist.barrier()


def refusal(engine: Any, folder: Path, tag: str = TAG, **options: Any) -> str:
    """What the engine says to a load that it refuses; it is as it was before."""
    before = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    steps, rates = engine.global_steps, engine.get_lr()
    with pytest.raises(UnsafeFileError) as refused:
        engine.load_checkpoint(str(folder), tag, **options)
    assert (engine.global_steps, engine.get_lr()) == (steps, rates)
    for name, tensor in engine.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert "trust_checkpoints=True" in str(refused.value)
    assert "add_safe_globals" in str(refused.value)
    return str(refused.value)


def refuse_planted_pickles(folder: Path) -> None:
    """In every kind of file, loaded by the cut that saved it and by another."""
    files = {
        1: (
            "mp_rank_00_model_states",
            "layer_0_expert_3_mp_rank_00_model_states",
            "zero_pp_rank_1_mp_rank_00_optim_states",
        ),
        0: ("expp_rank_1_mp_rank_00_optim_states",),
    }
    for stage, names in files.items():
        saved = folder / f"stage{stage}"
        engine = build(ds_remoe.initialize, 2, stage)
        train(engine, 2, seed=1)
        engine.save_checkpoint(str(saved), TAG)
        expected = train(engine, 2, seed=2)
        same, other = build(ds_remoe.initialize, 2, stage), build(ds_remoe.initialize, 1, 2)
        for name in names:
            proof, bad = folder / f"ran-{stage}-{name}", folder / f"bad-{stage}-{name}"
            if dist.get_rank() == 0:
                shutil.copytree(saved, bad)
            plant(bad / TAG / f"{name}.pt", RunsCode(proof))
            for victim in (same, other):
                message = refusal(victim, bad)
                assert f"{bad / TAG / name}.pt: loading it would run os.makedirs" in message
                assert "nothing was loaded" in message
            dist.barrier()
            assert not proof.exists()
            trusting = build(ds_remoe.initialize, 2, stage, trust_checkpoints=True)
            trusting.load_checkpoint(str(bad), TAG, load_module_strict=False)
            dist.barrier()
            assert proof.is_dir()
            assert train(trusting, 2, seed=2) == expected
        same.load_checkpoint(str(saved), TAG)
        assert train(same, 2, seed=2) == expected


def refuse_at_stage_3(folder: Path) -> None:
    """Also where DeepSpeed asks `torch.load` itself: for fp32 weights, of the tag that `latest` names."""
    engine = build(ds_remoe.initialize, None, 3)
    train(engine, 2, seed=1)
    engine.save_checkpoint(str(folder), TAG)
    engine.save_checkpoint(str(folder), "bad")
    expected = train(engine, 2, seed=2)
    plant(folder / "bad" / "zero_pp_rank_1_mp_rank_00_optim_states.pt", RunsCode(folder / "ran"))
    victim = build(ds_remoe.initialize, None, 3)
    for options in ({}, {"load_optimizer_states": False}):
        assert "zero_pp_rank_1_mp_rank_00_optim_states.pt: loading it would run" in refusal(
            victim, folder, "bad", **options
        )
    assert (folder / "latest").read_text() == "bad"
    with pytest.raises(UnsafeFileError, match=r"a file that DeepSpeed reads by itself .* os\.makedirs"):
        victim.load_checkpoint(str(folder), TAG, load_optimizer_states=False)
    dist.barrier()
    assert not (folder / "ran").exists()
    fresh = build(ds_remoe.initialize, None, 3)
    fresh.load_checkpoint(str(folder), TAG)
    assert train(fresh, 2, seed=2) == expected


def refuse_damaged_files(folder: Path) -> None:
    """Nobody is told to trust them; and an error that only one rank has, and cannot be pickled, reaches all."""
    engine = build(ds_remoe.initialize, None, 1)
    engine.save_checkpoint(str(folder), TAG)
    dist.barrier()
    path = folder / TAG / "mp_rank_00_model_states.pt"
    if dist.get_rank() == 0:
        os.truncate(path, path.stat().st_size // 2)
    dist.barrier()
    with pytest.raises(DamagedFileError, match="files are damaged; take another checkpoint") as refused:
        engine.load_checkpoint(str(folder), TAG)
    assert f"{path}: not a file of torch.save" in str(refused.value)
    assert "trust_checkpoints" not in str(refused.value)

    class LocalError(Exception):
        pass

    def fail_on_rank_1() -> None:
        if dist.get_rank() == 1:
            raise LocalError("of this function")

    with pytest.raises(RuntimeError, match="LocalError: of this function"):
        agreed(fail_on_rank_1)


def load_from_a_folder_of_each_node(folder: Path) -> None:
    """Each rank is the first of its node, whose folder has this rank's files alone."""
    os.environ["LOCAL_RANK"] = "0"
    own = folder / f"node{dist.get_rank()}"
    storage = {"checkpoint": {"use_node_local_storage": True}}
    engine = build(ds_remoe.initialize, None, 1, **storage)
    train(engine, 2, seed=1)
    engine.save_checkpoint(str(own), TAG)
    expected = train(engine, 2, seed=2)
    fresh = build(ds_remoe.initialize, None, 1, **storage)
    fresh.load_checkpoint(str(own), TAG)
    assert train(fresh, 2, seed=2) == expected


def users_objects(folder: Path) -> None:
    """In `client_state`: refused by name, taken where the class is named or the source trusted, resharded, too."""
    engine = build(ds_remoe.initialize, None, 0)
    train(engine, 2, seed=1)
    engine.save_checkpoint(str(folder), TAG, client_state={"settings": Settings(7), "seen": {3, 4}})
    expected = train(engine, 2, seed=2)
    same, other = build(ds_remoe.initialize, None, 0), build(ds_remoe.initialize, None, 1)
    for victim in (same, other):
        assert f"mp_rank_00_model_states.pt: loading it would run {__name__}.Settings" in refusal(victim, folder)
    trusting = build(ds_remoe.initialize, None, 1, trust_checkpoints=True)
    torch.serialization.add_safe_globals([Settings, ZeroStageEnum])
    for victim in (same, other, trusting):
        if victim is trusting:
            torch.serialization.clear_safe_globals()
        _, client_state = victim.load_checkpoint(str(folder), TAG)
        assert (client_state["settings"], client_state["seen"]) == (Settings(7), {3, 4})
        assert train(victim, 2, seed=2) == pytest.approx(expected, rel=1e-6)
        if victim is not trusting:
            assert {Settings, ZeroStageEnum} <= set(torch.serialization.get_safe_globals())


def plain_deepspeeds_checkpoints(folder: Path) -> None:
    """Every dtype and stage that DeepSpeed saves loads without the opt-out, and goes on as in DeepSpeed."""
    type(get_accelerator()).is_fp16_supported = lambda self: True  # slow on a CPU, but it runs
    reduce_ex = ZeroStageEnum.__reduce_ex__
    for dtype, stage, ep_size, changes in (
        *((dtype, stage, 2, {}) for dtype in ("fp32", "bf16", "fp16") for stage in (0, 1, 2)),
        ("fp32", 3, None, {}),
        ("bf16", 3, None, {}),
        ("fp16", 3, None, {}),
        ("fp32", 1, 2, {"checkpoint": {"checkpoint_serialization": False}}),
    ):
        case = f"{dtype}-{stage}-{len(changes)}"
        config = changes | ({} if dtype == "fp32" else {dtype: {"enabled": True}})
        theirs, ours = (
            build(deepspeed.initialize, ep_size, stage, **config),
            build(ds_remoe.initialize, ep_size, stage, **config),
        )
        train(theirs, 2, seed=1)
        ZeroStageEnum.__reduce_ex__ = lambda self, protocol: (getattr, (type(self), self.name))  # as in Python 3.11.2
        theirs.save_checkpoint(str(folder / case), TAG, client_state={"epoch": 2})
        ZeroStageEnum.__reduce_ex__ = reduce_ex
        _, client_state = ours.load_checkpoint(str(folder / case), TAG)
        assert client_state["epoch"] == 2
        assert ours.global_steps == 2
        assert ours.get_lr() == theirs.get_lr()
        if (dtype, stage) != ("fp16", 0):  # whose loss DeepSpeed does not scale
            assert train(ours, 2, seed=2) == train(theirs, 2, seed=2), case


@pytest.mark.parametrize(
    "check",
    [
        *(refuse_planted_pickles, refuse_damaged_files, refuse_at_stage_3),
        *(load_from_a_folder_of_each_node, users_objects, plain_deepspeeds_checkpoints),
    ],
)
def test_a_drop_in_engine_reads_values_alone(check: Callable[[Path], None], tmp_path: Path) -> None:
    codes, output = fork_ranks(check, 2, tmp_path, log=tmp_path / "log", timeout=240)
    assert codes == [0, 0], output
