"""Checkpoints resumed by other ranks: another world size, ep_size and ZeRO stage, the micro-batches kept."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import fork_ranks
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from test_resume import run_config
from torch import Tensor, nn

import ds_remoe
from ds_remoe.bench.results_file import write_results
from ds_remoe.config import load_run
from ds_remoe.deepspeed_optimizer_state import base_optimizer, saved_cut
from ds_remoe.model.exported import load_exported
from ds_remoe.training import runtime
from ds_remoe.training.export import CheckpointWeights, export
from ds_remoe.training.manifest import Manifest
from ds_remoe.training.saved_optimizer import SavedOptimizer, overlaps
from ds_remoe.training.trainer import Trainer

MICRO_BATCHES, SAVED = 4, 5
TAG = f"step{SAVED:08d}"
Cut = tuple[int, int, int]
"""World size, ep_size, ZeRO stage."""
CUTS: list[Cut] = [(world, ep, stage) for world in (1, 2, 4) for ep in (1, 2, 4) if ep <= world for stage in (0, 1, 2)]


def config_of(root: Path, name: str, cut: Cut, steps: int, **changes: Any) -> dict[str, Any]:
    world, ep, stage = cut
    config = run_config(root / name, root / "data")
    config["gradient_accumulation_steps"] = MICRO_BATCHES // world
    config["zero_optimization"] = {"stage": stage}
    config["scheduler"]["params"] |= {"total_num_steps": steps, "warmup_num_steps": 3}
    config["remoe"]["model"]["init_std"] = 0.05
    config["remoe"]["moe"]["ep_size"] = ep
    config["remoe"]["train"] |= {
        "steps": steps,
        "save_interval": SAVED,
        "keep_checkpoints": 100,
        "eval_interval": 10**6,
    }
    config["remoe"]["logging"] = {"wandb": {"mode": "disabled"}}
    return config | changes


def name_of(cut: Cut) -> str:
    return "-".join(map(str, cut))


def train_all(configs: list[Path]) -> None:
    """On a rank: train each of these runs from its latest checkpoint."""
    runtime.quiet_output()
    for path in configs:
        run = load_run(path, [], world_size=int(os.environ["WORLD_SIZE"]))
        torch.manual_seed(run.remoe.train.seed)
        trainer = Trainer(run, torch.device("cpu"))
        trainer.train("auto")
        trainer.engine.destroy()


def save_again(configs: list[Path]) -> None:
    """On a rank: load the latest checkpoint of each of these runs, and save it as these ranks do."""
    runtime.quiet_output()
    for path in configs:
        trainer = Trainer(load_run(path, [], world_size=int(os.environ["WORLD_SIZE"])), torch.device("cpu"))
        choice = trainer.checkpoints.choose("auto")
        assert choice is not None
        trainer.checkpoints.load(trainer.engine, choice)
        trainer.checkpoints.save(trainer.engine, choice.manifest.step, choice.manifest.samples, None)
        trainer.engine.destroy()


def train_on(config: Path) -> None:
    """On a rank: continue a run, and see that its optimizer is as its file says."""
    runtime.quiet_output()
    trainer = Trainer(load_run(config, [], world_size=int(os.environ["WORLD_SIZE"])), torch.device("cpu"))
    trainer.train("auto")
    for group in base_optimizer(trainer.engine).param_groups:
        assert (group["weight_decay"], group["fused"], tuple(group["betas"])) == (0.25, True, (0.8, 0.95))
        assert group["lr"] < 3e-3  # the schedule's


def on_ranks(
    root: Path, function: Callable[..., None], world: int, configs: dict[str, dict[str, Any]], timeout: float = 240
) -> None:
    """Call `train_all` or `save_again` for runs by name."""
    paths = []
    for name, config in configs.items():
        paths.append(root / f"{name}.json")
        paths[-1].write_text(json.dumps(config))
    codes, output = fork_ranks(function, world, paths, log=root / f"world{world}.log", timeout=timeout)
    assert codes == [0] * world, output


def state_of(checkpoint: Path) -> tuple[dict[tuple[str, str], Tensor], dict[str, int]]:
    """Every weight, master and optimizer state by name and kind, and the elements of the optimizer's tensors."""
    cut = saved_cut(checkpoint)
    assert cut is not None
    weights = CheckpointWeights(checkpoint, Manifest.read(checkpoint))
    sizes = weights.optimizer_sizes()
    saved = SavedOptimizer(checkpoint, cut, sizes)
    state = {(name, "weight"): weights.stored(name) for name in weights.shapes}
    for name, size in sizes.items():
        for key in saved.keys:
            state[name, key] = torch.empty(size)
            saved.read(name, key, 0, state[name, key])
        state[name, "step"] = torch.as_tensor(saved.scalars(name)["step"])
    return state, sizes


def losses(root: Path, name: str) -> list[float]:
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["lm_loss"] for line in lines]


def take_over(root: Path, name: str, other: str) -> None:
    """A run folder with the checkpoint and the metrics of another."""
    shutil.copytree(root / other / "checkpoints" / TAG, root / name / "checkpoints" / TAG)
    (root / name / "checkpoints" / "latest").write_text(TAG)
    shutil.copy(root / other / "metrics.jsonl", root / name)


def worst_pair(root: Path, sources: list[Cut], targets: list[Cut], steps: int) -> dict[str, float]:
    """Largest difference of a loss to the uninterrupted run's, of every pair."""
    for world in sorted({cut[0] for cut in sources}):
        runs = {name_of(cut): config_of(root, name_of(cut), cut, SAVED + steps) for cut in sources if cut[0] == world}
        on_ranks(root, train_all, world, runs, timeout=1200)
    found = {}
    for world in sorted({cut[0] for cut in targets}):
        pairs = [(source, cut) for cut in targets if cut[0] == world for source in sources]
        names = {f"{name_of(source)}-to-{name_of(cut)}": (source, cut) for source, cut in pairs}
        for name, (source, _) in names.items():
            take_over(root, name, name_of(source))
        runs = {name: config_of(root, name, pair[1], SAVED + steps) for name, pair in names.items()}
        on_ranks(root, train_all, world, runs, timeout=3600)
        for name, (source, _) in names.items():
            both = zip(losses(root, name_of(source)), losses(root, name), strict=True)
            found[name] = max(abs(expected - resumed) for expected, resumed in both)
    return found


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def handed_on(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Path]]:
    """The dtype, and one checkpoint loaded and saved by one topology after the other."""
    root = tmp_path_factory.mktemp(request.param)
    changes = {"bf16": {"enabled": request.param == "bf16"}}
    chain: list[Cut] = [(2, 2, 2), (1, 1, 0), (4, 4, 1), (4, 2, 0), (2, 1, 1), (2, 2, 0), (1, 1, 2)]
    first = name_of(chain[0])
    on_ranks(root, train_all, 2, {first: config_of(root, first, chain[0], SAVED, **changes)})
    for before, cut in pairwise(chain):
        name = name_of(cut)
        take_over(root, name, name_of(before))
        on_ranks(root, save_again, cut[0], {name: config_of(root, name, cut, SAVED, **changes)})
    return request.param, [root / name_of(cut) / "checkpoints" / TAG for cut in chain]


def test_every_weight_master_and_moment_is_handed_on_bit_for_bit(handed_on: tuple[str, list[Path]]) -> None:
    dtype, checkpoints = handed_on
    first, sizes = state_of(checkpoints[0])
    keys = {key for _, key in first}
    assert keys >= {"weight", "exp_avg", "exp_avg_sq", "master"}
    assert all(first[name, "exp_avg_sq"].count_nonzero() > 0 for name in sizes)
    for checkpoint in checkpoints[1:]:
        state, _ = state_of(checkpoint)
        # At stage 0 in fp32 the model's parameters are the masters.
        kept = {at for at in first if dtype == "bf16" or at[1] != "master"}
        assert state.keys() >= kept
        for at in kept:
            assert torch.equal(first[at], state[at]), (checkpoint, at)
        assert Manifest.read(checkpoint).step == SAVED


@pytest.mark.parametrize("cut", [(2, 2, 2), (1, 1, 0)], ids=["the_same", "resharded"])
def test_the_optimizers_settings_are_the_run_files(handed_on: tuple[str, list[Path]], tmp_path: Path, cut: Cut) -> None:
    dtype, checkpoints = handed_on
    shutil.copytree(checkpoints[0].parents[1], tmp_path / "run")
    config = config_of(tmp_path, "run", cut, SAVED + 1, bf16={"enabled": dtype == "bf16"})
    config["remoe"]["data"]["cache_dir"] = str(checkpoints[0].parents[2] / "data")
    config["optimizer"]["params"] |= {"weight_decay": 0.25, "betas": [0.8, 0.95], "fused": True}
    (tmp_path / "run.json").write_text(json.dumps(config))
    codes, output = fork_ranks(train_on, cut[0], tmp_path / "run.json", log=tmp_path / "log")
    assert codes == [0] * cut[0], output


def test_an_export_is_the_same_from_any_topology(handed_on: tuple[str, list[Path]], tmp_path: Path) -> None:
    trained_in, checkpoints = handed_on
    for dtype, stored in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        exports = [tmp_path / f"{index}-{dtype}" for index in range(len(checkpoints))]
        for checkpoint, output in zip(checkpoints, exports, strict=True):
            files = export(checkpoint, Manifest.read(checkpoint), output, dtype, max_shard_size="100KB")
            assert sorted(files) == sorted(output.iterdir())
        models = [load_exported(output).state_dict() for output in exports]
        saved = CheckpointWeights(checkpoints[0], Manifest.read(checkpoints[0]))
        assert models[0].keys() == saved.shapes.keys()
        for name, tensor in models[0].items():
            assert tensor.dtype == stored
            assert all(torch.equal(tensor, other[name]) for other in models[1:]), name
            if dtype == trained_in:
                assert torch.equal(tensor, saved.stored(name))
            elif dtype == "fp32":
                assert torch.equal(tensor.bfloat16(), saved.stored(name))
                assert tensor.dim() == 1 or not torch.equal(tensor, saved.stored(name).float())


def test_an_export_is_read_by_expert_parallel_ranks(
    handed_on: tuple[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = handed_on[1][0]
    export(checkpoint, Manifest.read(checkpoint), tmp_path / "export", "fp32")
    whole = load_exported(tmp_path / "export").state_dict()
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        half = load_exported(tmp_path / "export", ep_size=2).state_dict()
        assert len(half) < len(whole)
        for name, tensor in half.items():
            index = re.search(r"deepspeed_experts\.(\d+)", name)
            there = (
                name if index is None else name.replace(index[0], f"deepspeed_experts.{int(index[1]) + rank % 2 * 2}")
            )
            assert torch.equal(tensor, whole[there])


def test_an_export_that_fails_leaves_nothing(
    handed_on: tuple[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = handed_on[1][0]

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"begun")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("ds_remoe.training.export.save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors: could not be written .*No space left"):
        export(checkpoint, Manifest.read(checkpoint), tmp_path / "export", "fp32")
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_read_without_the_wire_that_it_was_trained_with(
    handed_on: tuple[str, list[Path]], tmp_path: Path
) -> None:
    checkpoint = handed_on[1][0]
    manifest = Manifest.read(checkpoint)
    manifest.identity.moe.update(wire_dtype="bf16", hierarchical_all_to_all=True)
    export(checkpoint, manifest, tmp_path / "export", "fp32")
    load_exported(tmp_path / "export")
    described = (tmp_path / "export" / "config.json").read_text()
    for foreign in (described.replace('"vocab_size"', '"words"'), described.replace('"fp32"', '"int4"'), "[]", "{"):
        (tmp_path / "export" / "config.json").write_text(foreign)
        with pytest.raises(ValueError, match=r"config\.json: not of a model of this release .*export it again"):
            load_exported(tmp_path / "export")


def test_an_export_that_is_not_whole_is_named(handed_on: tuple[str, list[Path]], tmp_path: Path) -> None:
    checkpoint, folder = handed_on[1][0], tmp_path / "export"
    export(checkpoint, Manifest.read(checkpoint), folder, "fp32", max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    shard = folder / whole["weight_map"]["embedding.weight"]
    elsewhere = {**whole["weight_map"], "embedding.weight": whole["weight_map"]["lm_head.weight"]}
    other = folder / elsewhere["embedding.weight"]
    assert other != shard
    for path, content, named in (
        (shard, shard.read_bytes()[:-8], shard),
        (shard, shard.read_bytes()[:40], shard),
        (shard, b"", shard),
        (index, index.read_bytes()[:100], index),
        (index, b"[]", index),
        (index, b'{"files": {}}', index),
        (index, b'{"weight_map": []}', index),
        (index, b'{"weight_map": {"embedding.weight": 1}}', index),
        (index, json.dumps({"weight_map": elsewhere}).encode(), other),
    ):
        kept = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(named))}: .*; copy the export again, or make it anew"):
            load_exported(folder)
        path.write_bytes(kept)
    for ep_size in (0, -1):
        with pytest.raises(ValueError, match=f"^ep_size = {ep_size}: must be a whole number of at least 1"):
            load_exported(folder, ep_size=ep_size)
    load_exported(folder)


def load_module_experts(folder: Path) -> None:
    """On two ranks: experts that are modules one by one go to another ZeRO stage, but not to another ep_size."""
    engines = {}
    for ep_size, stage in ((2, 1), (2, 2), (1, 1)):
        torch.manual_seed(0)
        expert = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        model = nn.Sequential(nn.Linear(8, 8), ds_remoe.MoE(8, expert, num_experts=4, ep_size=ep_size))
        optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
        config = {"train_batch_size": 2, "optimizer": optimizer, "zero_optimization": {"stage": stage}}
        engines[ep_size, stage], *_ = ds_remoe.initialize(model=model, config=config)
    first, other_stage, other_ep_size = engines.values()
    output, aux_loss, _ = first(torch.randn(6, 8))
    first.backward(output.square().mean() + aux_loss)
    first.step()
    first.save_checkpoint(str(folder), "first")
    other_stage.load_checkpoint(str(folder), "first")
    assert other_stage.remoe.controller.coefficient == first.remoe.controller.coefficient
    other_stage.save_checkpoint(str(folder), "second")
    with pytest.raises(ValueError, match=r"deepspeed_experts\.0\..* is of an expert that is a module of its own"):
        other_ep_size.load_checkpoint(str(folder), "first")


def test_experts_that_are_modules_keep_their_ep_size(tmp_path: Path) -> None:
    codes, output = fork_ranks(load_module_experts, 2, tmp_path, log=tmp_path / "log")
    assert codes == [0, 0], output
    for rank in range(2):
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        first, second = (torch.load(tmp_path / tag / name, weights_only=False) for tag in ("first", "second"))
        for key in ("exp_avg", "exp_avg_sq", "step"):
            for index in (0, 1):
                states = [part["optimizer_state_dict"]["base_optimizer_state"]["state"] for part in (first, second)]
                assert torch.equal(states[0][index][key], states[1][index][key])
                assert states[0][index][key].count_nonzero() > 0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_overlaps_name_each_element_once(sizes: list[int], data: st.DataObject) -> None:
    tensor = list(range(sum(sizes)))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    start = data.draw(st.integers(0, len(tensor) - 1))
    count = data.draw(st.integers(0, len(tensor) - start))
    found: list[int] = []
    for index, skipped, taken in overlaps(starts, start, count):
        part = tensor[starts[index] : starts[index] + sizes[index]]
        assert 0 < taken <= len(part) - skipped
        found += part[skipped : skipped + taken]
    assert found == tensor[start : start + count]


def test_other_ranks_continue_a_run(tmp_path: Path) -> None:
    cuts: list[Cut] = [(1, 1, 0), (2, 2, 1), (4, 2, 2)]
    found = worst_pair(tmp_path, cuts, cuts, steps=6)
    assert max(found.values()) < 1e-5, found


@pytest.mark.skipif("DS_REMOE_SLOW" not in os.environ, reason="slow, 324 runs: set DS_REMOE_SLOW=1")
@pytest.mark.timeout(7200)
def test_every_pair_of_topologies(tmp_path: Path) -> None:
    """DS_REMOE_OUTPUT names a results file to write."""
    found = worst_pair(tmp_path, CUTS, CUTS, steps=20)
    assert len(found) == len(CUTS) ** 2
    if "DS_REMOE_OUTPUT" in os.environ:
        what = (
            "largest difference of a loss to the uninterrupted run's over 20 steps after a resume, fp32, by the pair "
        )
        what += "(ranks-ep_size-ZeRO stage) that saved and resumed"
        command = ["DS_REMOE_SLOW=1", "pytest", "tests/test_resharding.py", "-k", "every_pair"]
        write_results(
            Path(os.environ["DS_REMOE_OUTPUT"]), what, command, {"pairs": found, "worst": max(found.values())}
        )
    assert max(found.values()) < 1e-5
