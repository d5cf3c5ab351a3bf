"""`load_checkpoint` of engines that no configuration of ours makes: a user's optimizer groups, frozen parameters."""

from __future__ import annotations

import enum
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split
from deepspeed.runtime.zero.config import ZeroStageEnum
from forked_ranks import fork_ranks
from torch import Tensor, nn

import ds_remoe
from ds_remoe.deepspeed_checkpoint_io import UnsafeFileError, load_values
from ds_remoe.deepspeed_optimizer_state import saved_cut, saved_slabs, trained_names
from ds_remoe.training.saved_optimizer import SavedOptimizer, is_expert

D, E = 8, 4
Cut = tuple[int, int]
"""ep_size, ZeRO stage."""
ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
FP32_GRADIENTS = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


class UserModel(nn.Module):
    def __init__(self, ep_size: int | None, frozen: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(D, D).requires_grad_(not frozen)
        self.norm = nn.LayerNorm(D)
        self.moe = None if ep_size is None else ds_remoe.MoE(D, ds_remoe.SwiGLU(D, 6), num_experts=E, ep_size=ep_size)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        hidden = self.norm(self.stem(x))
        if self.moe is not None:
            hidden = hidden + self.moe(hidden)[0]
        return nn.functional.cross_entropy(self.head(hidden).float(), target)


def all_parameters(model: nn.Module) -> Any:
    return split({"params": list(model.parameters()), "name": "all"})


def trained_alone(model: nn.Module) -> Any:
    return split({"params": [p for p in model.parameters() if p.requires_grad], "name": "trained"})


def by_decay(model: nn.Module) -> Any:
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    return split(
        [{"params": matrices, "name": "matrices"}, {"params": vectors, "name": "vectors", "weight_decay": 0.0}]
    )


def build(cut: Cut, groups: Callable[[nn.Module], Any], frozen: bool = False, **config: Any) -> Any:
    torch.manual_seed(0)
    model = UserModel(cut[0], frozen)
    given = {"train_micro_batch_size_per_gpu": 4, "optimizer": ADAMW, "zero_optimization": {"stage": cut[1]}}
    return ds_remoe.initialize(model=model, model_parameters=groups(model), config=given | config)[0]


def train(engine: Any, steps: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(2 * seed + dist.get_rank())
    losses = []
    for _ in range(steps):
        x, target = torch.randn(16, D, generator=generator), torch.randint(3, (16,), generator=generator)
        loss = engine(x.to(next(engine.module.parameters()).dtype), target)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def hand_on(folder: Path, before: Cut, after: Cut, groups: Callable[[nn.Module], Any], **changes: Any) -> None:
    """Train, save, load in another cut after a step in another direction, save again: all states are the same."""
    first, second = build(before, groups, **changes), build(after, groups, **changes)
    train(first, 2, seed=1)
    train(second, 1, seed=2)
    first.save_checkpoint(str(folder), "first")
    second.load_checkpoint(str(folder), "first")
    second.save_checkpoint(str(folder), "second")
    dist.barrier()
    parameters = dict(first.module.named_parameters())
    sizes = {n: parameters[n].numel() * (before[0] if is_expert(n) else 1) for n in trained_names(first)}
    assert ("stem.weight" in sizes) != changes.get("frozen", False)
    saved = [
        SavedOptimizer(folder / tag, cut, sizes) for tag in ("first", "second") if (cut := saved_cut(folder / tag))
    ]
    for name, size in sizes.items():
        # At stage 0 in fp32 the model's parameters are the masters.
        both = saved[0].keys_of(name) & saved[1].keys_of(name)
        assert both >= {"exp_avg", "exp_avg_sq"}
        assert saved[0].scalars(name) == saved[1].scalars(name)
        for key in both:
            tensors = [torch.empty(size) for _ in saved]
            for part, tensor in zip(saved, tensors, strict=True):
                part.read(name, key, 0, tensor)
            assert torch.equal(*tensors), (name, key)
            assert tensors[0].any()


def hand_on_in_every_way(folder: Path) -> None:
    cuts: list[tuple[Cut, Cut]] = [((2, 1), (1, 2)), ((1, 0), (2, 1)), ((2, 1), (1, 0)), ((2, 0), (1, 0))]
    for index, (before, after) in enumerate(cuts):
        hand_on(folder / f"decay{index}", before, after, by_decay)
        hand_on(folder / f"frozen{index}", before, after, all_parameters, frozen=True)
        hand_on(folder / f"trained{index}", before, after, trained_alone, frozen=True)
    hand_on(folder / "bf16", (1, 0), (2, 2), by_decay, bf16={"enabled": True})
    hand_on(folder / "fp32_gradients", (2, 1), (1, 1), all_parameters, **FP32_GRADIENTS)


def load_the_same_cut(folder: Path) -> None:
    """What DeepSpeed loads by itself goes on loading: the losses after it are those of the engine that saved."""
    for name, cut, changes in (
        ("BF16_Optimizer", (2, 1), FP32_GRADIENTS),
        ("stage 3", (None, 3), {}),
        ("a member by getattr", (2, 1), {}),
    ):
        first, second = (build(cut, all_parameters, **changes) for _ in range(2))
        train(first, 2, seed=1)
        reduce_ex = ZeroStageEnum.__reduce_ex__
        if name == "a member by getattr":  # as Python 3.11.2 does it
            ZeroStageEnum.__reduce_ex__ = lambda self, protocol: (getattr, (type(self), self.name))
        first.save_checkpoint(str(folder / name), 7)
        ZeroStageEnum.__reduce_ex__ = reduce_ex
        expected = train(first, 2, seed=3)
        second.load_checkpoint(str(folder / name), 7)
        assert train(second, 2, seed=3) == expected, name


def open_few_files(folder: Path) -> None:
    """A rank opens its share of the optimizer's files and those that it steps a part of, not all."""
    opened: list[str] = []

    def read(path: str | Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(Path(path).name)
        return load_values(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_remoe.training.engine_checkpoints.load_values", read)
        first, second = build((1, 1), all_parameters), build((1, 2), all_parameters)
    train(first, 2, seed=1)
    first.save_checkpoint(str(folder), "few")
    second.load_checkpoint(str(folder), "few")
    own = f"zero_pp_rank_{dist.get_rank()}_mp_rank_00_optim_states.pt"
    assert opened == ["zero_pp_rank_0_mp_rank_00_optim_states.pt", own]  # how it is cut, and what is in it
    assert train(second, 2, seed=3) == train(first, 2, seed=3)


def fail_together(folder: Path) -> None:
    """A file that one rank alone looks into, and cannot read, ends the load on all of them, nothing changed."""
    first, second = build((1, 1), all_parameters), build((1, 2), all_parameters)
    train(first, 2, seed=1)
    first.save_checkpoint(str(folder), "gone")
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "gone" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    dist.barrier()
    before = {name: tensor.clone() for name, tensor in second.module.state_dict().items()}
    with pytest.raises(FileNotFoundError, match="zero_pp_rank_1"):
        second.load_checkpoint(str(folder), "gone")
    assert all(torch.equal(tensor, before[name]) for name, tensor in second.module.state_dict().items())


@pytest.mark.parametrize("check", [hand_on_in_every_way, load_the_same_cut, open_few_files, fail_together])
def test_a_users_engine_loads_what_others_saved(check: Callable[[Path], None], tmp_path: Path) -> None:
    codes, output = fork_ranks(check, 2, tmp_path, log=tmp_path / "log", timeout=240)
    assert codes == [0, 0], output


def offloaded(cut: Cut) -> Any:
    """An engine whose optimizer is DeepSpeedCPUAdam; at stage 0 it cannot be, and torch's takes over."""
    if cut[1] == 0:
        return build(cut, by_decay)
    zero = {"stage": cut[1], "offload_optimizer": {"device": "cpu"}}
    engine = build(cut, by_decay, optimizer={"type": "AdamW", "params": {"lr": 1e-2}}, zero_optimization=zero)
    assert type(engine.optimizer.optimizer).__name__ == "DeepSpeedCPUAdam"
    return engine


def pass_on(folder: Path, before: str | None, cut: Cut, after: str, losses: Path) -> None:
    """Train from scratch, or load what others saved after a step in another direction; save, and go on."""
    engine = offloaded(cut)
    train(engine, 1 if before else 3, seed=9 if before else 1)
    if before:
        engine.load_checkpoint(str(folder), before)
    engine.save_checkpoint(str(folder), after)
    losses.with_name(f"{losses.name}.{dist.get_rank()}").write_text(json.dumps(train(engine, 3, seed=5)))


@pytest.mark.skipif("DS_REMOE_SLOW" not in os.environ, reason="compiles for minutes once: set DS_REMOE_SLOW=1")
def test_deepspeeds_cpu_adam_is_handed_on(tmp_path: Path) -> None:
    """From 2 ranks to 1 and back, to another ep_size and stage, and through a stage without offload."""
    before, losses = None, {}
    chain: list[tuple[int, Cut]] = [(2, (2, 2)), (1, (1, 2)), (2, (2, 2)), (2, (1, 1)), (2, (1, 0)), (2, (2, 2))]
    for index, (world, cut) in enumerate(chain):
        after, out = f"link{index}", tmp_path / f"losses{index}"
        codes, output = fork_ranks(pass_on, world, tmp_path, before, cut, after, out, log=tmp_path / "log", timeout=900)
        assert codes == [0] * world, output
        losses[index] = [json.loads(out.with_name(f"{out.name}.{rank}").read_text()) for rank in range(world)]
        before = after
    assert losses[2] == losses[0]  # through one rank, bit for bit
    for index in (3, 4, 5):
        for got, expected in zip(losses[index], losses[0], strict=True):
            assert got == pytest.approx(expected, abs=1e-5)


def test_momenta_of_muon_are_refused() -> None:
    """ZeRO keeps them by whole matrices, so they are not cut as the masters are; building Muon takes minutes."""
    groups = [{"params": [0], "use_muon": True}]
    zero = {"base_optimizer_state": {"param_groups": groups, "state": {}}, "param_slice_mappings": [{}]}
    with pytest.raises(TypeError, match="Muon"):
        next(saved_slabs({"optimizer_state_dict": zero}, {}))


class Named(enum.Enum):
    """Pickled as Python 3.11.2 does it."""

    ONE = 1

    def __reduce_ex__(self, protocol: object) -> Any:
        return getattr, (ZeroStageEnum, "gradients")


class Method:
    def __reduce__(self) -> Any:
        return getattr, (ZeroStageEnum, "mro")


def test_getattr_in_a_file_gives_members_of_enumerations_alone(tmp_path: Path) -> None:
    torch.save({"stage": Named.ONE}, tmp_path / "member.pt", pickle_module=pickle)
    assert load_values(tmp_path / "member.pt") == {"stage": ZeroStageEnum.gradients}
    torch.save({"method": Method()}, tmp_path / "method.pt", pickle_module=pickle)
    with pytest.raises(UnsafeFileError, match="would take the attribute 'mro'"):
        load_values(tmp_path / "method.pt")
