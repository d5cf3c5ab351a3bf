"""What can befall a checkpoint of a real engine: files that change, saves that are killed or meet a full disk."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime import lr_schedules
from forked_ranks import fork_ranks
from ranks import free_port

from ds_remoe import cli
from ds_remoe.deepspeed_checkpoint_io import UnsafeFileError, load_values
from ds_remoe.training.checkpoint import Checkpoints, Choice
from ds_remoe.training.checkpoint_files import record_file
from ds_remoe.training.checkpoint_folder import LATEST, CheckpointFolder, inspect
from ds_remoe.training.manifest import MANIFEST, CheckpointError, CheckpointSaveError, FileRecord, Manifest, RunIdentity

VOCAB, STEPS = 61, 4
IDENTITY = RunIdentity(2, 2, 2, "fp32", 2, 1, "AdamW", 0, "tokens", {}, {}, {})
KINDS = [(0, False), (1, False), (1, True), (2, False), (2, True)]
"""ZeRO stage and bf16 of the engines that save and load."""
MOMENTS = ["inside DeepSpeed's files", "before hashes", "before manifest", "before pointer", "before clean-up"]


def make_engine(stage: int, bf16: bool) -> Any:
    """A decoder with experts spread over all ranks; called on every rank."""
    from ds_remoe import initialize
    from ds_remoe.config.schema import ModelConfig, MoEConfig
    from ds_remoe.model.decoder import Decoder

    model_config = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, ffn_hidden_size=24, seq_length=10)
    moe = MoEConfig(num_experts=4, k=1, ep_size=dist.get_world_size())
    model = Decoder(model_config, moe, VOCAB, seed=3)
    schedule = {"total_num_steps": STEPS, "warmup_num_steps": 2, "warmup_min_ratio": 0.5}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupCosineLR", "params": schedule},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "steps_per_print": 1_000_000_000,
        "remoe": {"sparsity": {"lambda_init": 1e-2}},
    }
    engine, *_ = initialize(model=model, model_parameters=list(model.parameters()), config=config)
    return engine


def train(engine: Any, step: int) -> float:
    """Optimizer step `step`, counted from 1; its loss on this rank. Tokens come from the global random state."""
    tokens = torch.randint(VOCAB, (2, 11))
    loss = engine(tokens[:, :-1], tokens[:, 1:]).loss
    engine.backward(loss)
    engine.step()
    assert engine.global_steps == step
    return float(loss)


def checkpoints_in(folder: Path) -> Checkpoints:
    return Checkpoints(folder, IDENTITY, keep=2)


def resumed(folder: Path, stage: int = 2, bf16: bool = False, resume: str = "auto") -> tuple[Any, Checkpoints]:
    engine, checkpoints = make_engine(stage, bf16), checkpoints_in(folder)
    choice = checkpoints.choose(resume)
    assert choice is not None
    checkpoints.load(engine, choice)
    return engine, checkpoints


# What ranks do.


def save_and_resume(root: Path) -> None:
    """Each kind: steps 1 to 4 with saves after 1 and 2; an engine that loads step 2 has the losses of 3 and 4."""
    for stage, bf16 in KINDS:
        torch.manual_seed(dist.get_rank())
        folder = root / f"zero{stage}{'-bf16' if bf16 else ''}"
        engine, checkpoints = make_engine(stage, bf16), checkpoints_in(folder)
        losses = []
        for step in range(1, STEPS + 1):
            losses.append(train(engine, step))
            if step <= 2:
                checkpoints.save(engine, step, 4 * step, None)
        again, _ = resumed(folder, stage, bf16)
        assert [train(again, step) for step in (3, 4)] == losses[2:]
        (root / f"{folder.name}.losses{dist.get_rank()}.json").write_text(json.dumps(losses))


def fail_to_save(root: Path) -> None:
    """A rank whose files may not grow, one that writes elsewhere, and a checkpoint whose unpickling runs code."""
    rank, folder = dist.get_rank(), root / "run"
    engine, checkpoints = resumed(folder)
    loss = train(engine, 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        expect_save_error(checkpoints, engine, r"rank 1: \S*step00000003/\S+\.pt: .*were free then")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    elsewhere = checkpoints_in(root / f"of-rank-{rank}") if rank == 1 else checkpoints
    expect_save_error(elsewhere, engine, "rank 1: .*which rank 0 on .* does not see")
    dist.barrier()
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["step00000001", "step00000002"]
    assert (folder / LATEST).read_text() == "step00000002"
    dist.barrier()  # rank 0 makes the next checkpoint's folder
    checkpoints.save(engine, 3, 12, None)
    assert (folder / LATEST).read_text() == "step00000003"
    if rank == 0:
        damage = folder / "step00000003" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": RunsCode(root / "ran")}, damage)
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"(?s)cannot be read.*rank 1: .*zero_pp_rank_1.*would run \S*\.mkdir"):
        checkpoints.load(engine, Choice(folder / "step00000003", Manifest.read(folder / "step00000003"), ()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointFolder, "point_to", full_disk)
        good = Choice(folder / "step00000002", Manifest.read(folder / "step00000002"), ())
        with pytest.raises(CheckpointSaveError, match=r"latest: cannot be moved to step00000002 .*No space left"):
            checkpoints.load(engine, good)
        patch.setattr(Manifest, "read", not_portable)
        with pytest.raises(RuntimeError, match="Local: only here"):
            checkpoints.choose("auto")
    again, _ = resumed(folder)  # falls back to step 2
    restored = torch.load(folder / "step00000002" / f"random_state_rank_{rank:05d}.pt")["torch"]
    assert torch.equal(torch.get_rng_state(), restored)
    assert train(again, 3) == loss


def full_disk(*_: Any) -> None:
    assert dist.get_rank() == 0
    raise OSError(errno.ENOSPC, "No space left on device")


def not_portable(_: Path) -> None:
    class Local(Exception):
        pass

    assert dist.get_rank() == 0
    raise Local("only here")


def expect_save_error(checkpoints: Checkpoints, engine: Any, message: str) -> None:
    with pytest.raises(CheckpointSaveError) as refused:
        checkpoints.save(engine, 3, 12, None)
    assert re.search(message, str(refused.value)), str(refused.value)
    assert "there are step00000001, step00000002" in str(refused.value)


def fill_the_disk(folder: Path, ballast: Path, leave: int) -> None:
    """Steps 1 and 2 are saved, step 3 meets a disk with `leave` bytes, step 4 finds room again."""
    engine, checkpoints = make_engine(2, False), checkpoints_in(folder)
    for step in (1, 2, 3, 4):
        train(engine, step)
        dist.barrier()
        if dist.get_rank() == 0 and step == 3:
            with ballast.open("wb") as file:
                file.write(b"\1" * (shutil.disk_usage(folder).free - leave))
        dist.barrier()
        if step == 3:
            expect_save_error(checkpoints, engine, r"step 3 could not be saved:\n  rank \d: .*step00000003/")
            assert (folder / LATEST).read_text() == "step00000002"
            if dist.get_rank() == 0:
                ballast.unlink()
        else:
            checkpoints.save(engine, step, 4 * step, None)


def die_in_a_save(folder: Path, moment: str) -> None:
    """Continue from `latest` for one step and get killed in its save."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_with_half_a_file(self: Any, state_dict: Any, path: str) -> None:
        Path(path).write_bytes(b"PK\3\4 half a file")
        die()

    patch = pytest.MonkeyPatch()
    engine, checkpoints = resumed(folder)
    train(engine, engine.global_steps + 1)
    if moment == MOMENTS[0] and dist.get_rank() == 1:
        patch.setattr(TorchCheckpointEngine, "save", die_with_half_a_file)
    elif moment != MOMENTS[0] and dist.get_rank() == 0:
        module = "ds_remoe.training.checkpoint"
        names = ["record_file", "Manifest.write", "CheckpointFolder.point_to", "Checkpoints._prune"]
        patch.setattr(f"{module}.{names[MOMENTS.index(moment) - 1]}", die)
    checkpoints.save(engine, engine.global_steps, 4 * engine.global_steps, None)


def finish(folder: Path, result: Path) -> None:
    engine, _ = resumed(folder)
    losses = [train(engine, step) for step in range(engine.global_steps + 1, STEPS + 1)]
    result.with_name(f"{result.name}{dist.get_rank()}").write_text(json.dumps(losses))


def train_with_a_full_disk(config: Path, on_save_error: str) -> None:
    """A whole run in this process, whose files may not grow beyond a few bytes during its second save."""
    from ds_remoe import train as entry

    save, saves = Checkpoints.save, itertools.count(1)

    def limited_save(self: Checkpoints, *args: Any) -> Path:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if next(saves) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            return save(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    pytest.MonkeyPatch().setattr(Checkpoints, "save", limited_save)
    entry.main(["--config", str(config), "--set", f"remoe.train.on_save_error={on_save_error}"])


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


# The tests.


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the checkpoints that two ranks saved; tests that change it change it back."""
    root = tmp_path_factory.mktemp("real")
    codes, output = fork_ranks(save_and_resume, 2, root, log=root / "log")
    assert codes == [0, 0], output
    return root


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@contextlib.contextmanager
def changed(path: Path) -> Iterator[bytes]:
    """The content of a file, which is put back at the end."""
    kept = path.read_bytes()
    try:
        yield kept
    finally:
        path.write_bytes(kept)


def flip_a_bit(content: bytes, generator: random.Random) -> bytes:
    position = generator.randrange(8 * len(content))
    flipped = bytearray(content)
    flipped[position // 8] ^= 1 << position % 8
    return bytes(flipped)


def test_every_kind_of_engine_saves_good_checkpoints_and_resumes_from_plain_values(real: Path) -> None:
    for folder in (path for path in real.iterdir() if path.is_dir()):
        assert [inspect(path, contents=True).state for path in CheckpointFolder(folder).all()] == ["good", "good"]


@pytest.mark.usefixtures("one_rank")
def test_each_file_of_a_checkpoint_truncated_flipped_missing_or_swapped(real: Path) -> None:
    folder = real / "zero2"
    checkpoints, generator = checkpoints_in(folder), random.Random(0)
    damaged, other = folder / "step00000002", folder / "step00000001"
    names = [path.name for path in damaged.iterdir()]
    assert all((damaged / name).read_bytes() != (other / name).read_bytes() for name in names)
    assert {MANIFEST, "mp_rank_00_model_states.pt", "random_state_rank_00001.pt"} < set(names)
    assert len(names) == 4 + 1 + 2 + 2 + 1  # experts, the rest of the model, ZeRO shards, random states, manifest
    damages: dict[str, Callable[[Path, bytes], object]] = {
        "truncated": lambda path, content: path.write_bytes(content[: generator.randrange(len(content))]),
        "flipped": lambda path, content: path.write_bytes(flip_a_bit(content, generator)),
        "missing": lambda path, content: path.unlink(),
        "swapped": lambda path, content: shutil.copyfile(other / path.name, path),
    }
    for name, (kind, damage) in itertools.product(names, damages.items()):
        with changed(damaged / name) as content:
            damage(damaged / name, content)
            choice = checkpoints.choose("auto")
            assert choice is not None
            assert choice.path == other, (name, kind)
            assert "step00000002 is damaged" in choice.notes[0]
            assert (str(damaged) if name == MANIFEST else str(damaged / name)) in choice.notes[0]
            assert choice.notes[-1].startswith("step00000001, the newest good checkpoint, is used instead")
            if kind == "swapped" and name != MANIFEST:
                assert f"it is step00000001/{name}" in choice.notes[0]
            with pytest.raises(CheckpointError, match="step00000002 is damaged"):
                checkpoints.choose("step00000002")
    choice = checkpoints.choose("auto")
    assert choice is not None
    assert (choice.path, choice.notes) == (damaged, ())
    shard = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    with changed(damaged / shard), changed(other / shard):
        (damaged / shard).unlink()
        (other / shard).unlink()
        with pytest.raises(CheckpointError, match=r"(?s)step00000002 is damaged.*step00000001 is damaged"):
            checkpoints.choose("auto")


def test_any_bit_of_a_manifest_counts(real: Path) -> None:
    checkpoint, generator = real / "zero2" / "step00000002", random.Random(1)
    with changed(checkpoint / MANIFEST) as content:
        for _ in range(300):
            (checkpoint / MANIFEST).write_bytes(flip_a_bit(content, generator))
            with pytest.raises(CheckpointError):
                Manifest.read(checkpoint)


@pytest.mark.usefixtures("one_rank")
def test_a_pickle_that_would_run_code_is_refused_also_with_a_right_hash(real: Path, tmp_path: Path) -> None:
    folder, proof = real / "zero2", tmp_path / "ran"
    checkpoint = folder / "step00000002"
    path = checkpoint / "mp_rank_00_model_states.pt"
    checkpoints = checkpoints_in(folder)
    with changed(path), changed(checkpoint / MANIFEST):
        torch.save({"module": RunsCode(proof)}, path)
        with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt: \d+ bytes, but"):
            checkpoints.choose(checkpoint.name)
        manifest = Manifest.read(checkpoint)
        with pytest.raises(CheckpointError, match=r"model_states\.pt: holds posix\.mkdir, which"):
            record_file(path)
        digest = sha256sum(path)
        files = {**manifest.files, path.name: FileRecord(path.stat().st_size, digest)}
        dataclasses.replace(manifest, files=files).write(checkpoint)
        with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt: loading it would run posix\.mkdir"):
            checkpoints.choose(checkpoint.name)
        choice = checkpoints.choose("auto")
        assert choice is not None
        assert choice.path.name == "step00000001"
        with pytest.raises(UnsafeFileError, match=r"would run posix\.mkdir"):
            load_values(path)
        assert not proof.exists()
        torch.load(path, weights_only=False)
        assert proof.is_dir()  # so it would have run


def sha256sum(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def test_a_save_that_fails_on_one_rank_fails_on_all_and_the_next_one_succeeds(real: Path, tmp_path: Path) -> None:
    shutil.copytree(real / "zero2", tmp_path / "run")
    codes, output = fork_ranks(fail_to_save, 2, tmp_path, log=tmp_path / "log")
    assert codes == [0, 0], output
    assert not (tmp_path / "ran").exists()


def test_a_save_killed_at_any_moment_leaves_a_good_checkpoint(real: Path, tmp_path: Path) -> None:
    """From step 1 on, each killed save is tried again, so that the losses of all steps are those of the quiet run."""
    folder = tmp_path / "run"
    shutil.copytree(real / "zero2", folder)
    for moment in MOMENTS:
        before = (folder / LATEST).read_text()
        codes, output = fork_ranks(die_in_a_save, 2, folder, moment, log=tmp_path / "log")
        assert codes[1 if moment == MOMENTS[0] else 0] == -signal.SIGKILL, output
        assert 0 not in codes, output
        latest = CheckpointFolder(folder).latest()
        assert latest is not None
        assert (
            latest.name == ("step00000003" if moment == "before clean-up" else before) == (folder / LATEST).read_text()
        )
        assert inspect(latest, contents=True).state == "good"
    codes, output = fork_ranks(finish, 2, folder, tmp_path / "losses", log=tmp_path / "log")
    assert codes == [0, 0], output
    for rank in (0, 1):
        quiet = json.loads((real / f"zero2.losses{rank}.json").read_text())
        assert json.loads((tmp_path / f"losses{rank}").read_text()) == quiet[3:]


@pytest.mark.parametrize("leave", [0, 40_000])
def test_a_full_disk(tmp_path: Path, leave: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system needs root and the right to mount: {mounted.stderr.strip()}")
    try:
        codes, output = fork_ranks(fill_the_disk, 2, disk / "run", disk / "ballast", leave, log=tmp_path / "log")
        assert codes == [0, 0], output
        folder = CheckpointFolder(disk / "run")
        assert [path.name for path in folder.all()] == ["step00000002", "step00000004"]
        assert all(inspect(path, contents=True).state == "good" for path in folder.all())
    finally:
        subprocess.run(["umount", disk], check=True)


def small_run(tmp_path: Path) -> Path:
    """The file of a run of six steps."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 1_000_000_000,
        "remoe": {
            "model": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "ffn_hidden_size": 48, "seq_length": 64},
            "moe": {"num_experts": 4},
            "data": {
                "source": {"type": "stdlib", "max_bytes_per_domain": 50_000},
                "tokenizer": {"type": "train", "vocab_size": 512},
                "cache_dir": str(tmp_path / "data"),
            },
            "train": {"steps": 6, "eval_batches": 400, "save_interval": 2, "output_dir": str(tmp_path / "run")},
        },
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(config))
    return path


def train_here(config: Path, *overrides: str) -> None:
    """A whole run in this process."""
    from ds_remoe import train as entry

    entry.main(["--config", str(config), *(part for override in overrides for part in ("--set", override))])


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_run_stops_or_goes_on_where_a_save_fails(tmp_path: Path, on_save_error: str) -> None:
    path = small_run(tmp_path)
    codes, output = fork_ranks(train_with_a_full_disk, 1, path, on_save_error, log=tmp_path / "log")
    assert "step 4 could not be saved" in output
    assert output.count("remoe.train.eval_batches = 400: an evaluation takes 800 samples, but only ") == 1
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    tags = [path.name for path in CheckpointFolder(tmp_path / "run" / "checkpoints").all()]
    if on_save_error == "continue":
        assert (codes, len(records), tags) == ([0], 6, ["step00000002", "step00000006"]), output
        assert "Training goes on after step 4" in output
    else:
        assert (codes, len(records), tags) == ([1], 4, ["step00000002"]), output


def test_a_schedule_that_comes_changes_or_goes_is_followed_and_told(tmp_path: Path) -> None:
    path = small_run(tmp_path)
    warmup = {"warmup_num_steps": 3, "warmup_type": "linear"}
    cosine = {"total_num_steps": 6, "warmup_num_steps": 2}
    sessions = [
        (2, [], [3e-3] * 2, None),
        (4, [scheduler("WarmupLR", warmup)], rates("WarmupLR", warmup, 4)[2:], "none and is WarmupLR"),
        (6, [scheduler("WarmupCosineLR", cosine)], rates("WarmupCosineLR", cosine, 6)[4:], "WarmupLR and is WarmupCos"),
        (8, ["optimizer.params.lr=1e-3"], [1e-3] * 2, "WarmupCosineLR and is none"),
    ]
    expected: list[float] = []
    for steps, overrides, new, told in sessions:
        settings = [f"remoe.train.steps={steps}", "remoe.train.eval_batches=1", *overrides]
        codes, output = fork_ranks(train_here, 1, path, *settings, log=tmp_path / f"log{steps}")
        assert codes == [0], output
        assert told is None or output.count(f": the scheduler was {told}") == 1, output
        assert ("scheduler was" in output) == (told is not None), output
        expected += new
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["learning_rate"] for line in lines] == pytest.approx(expected), f"to step {steps}"


def scheduler(kind: str, params: dict[str, Any]) -> str:
    return f"scheduler={json.dumps({'type': kind, 'params': params})}"


def rates(kind: str, params: dict[str, Any], steps: int) -> list[float]:
    """The learning rate of each step, as DeepSpeed's schedule gives it to one that begins with it."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    schedule, found = getattr(lr_schedules, kind)(optimizer, **params), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    return found


def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_run(tmp_path)
    places = [tmp_path / "run" / name for name in ("metrics.jsonl", "stages.png", "checkpoints/latest.tmp")]
    for place in places:
        place.mkdir(parents=True)
    codes, output = fork_ranks(train_here, 1, path, log=tmp_path / "log")
    assert codes == [2], output
    assert cli.main(["supervise", "--", "bash", "--config", str(path)]) == 2
    for text in (output, capsys.readouterr().err):
        assert "Traceback" not in text
        assert all(f"{place}: is a folder, but the run writes a file there" in text for place in places), text
    assert not (tmp_path / "data").exists()


def test_the_command_line(real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    shutil.copytree(real / "zero2", folder)
    shutil.copytree(folder / "step00000002", folder / "step00000003")
    (folder / "step00000003" / MANIFEST).unlink()

    def command(*arguments: str) -> tuple[int, str]:
        code = cli.main(["checkpoint", arguments[0], str(run), *arguments[1:]])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    code, output = command("list")
    assert code == 0
    assert [line.count("latest") for line in output.splitlines() if "good" in line] == [0, 1]
    assert "step00000003 is incomplete" in output
    code, output = command("verify")
    assert (code, output.count(": good"), output.count(": incomplete")) == (0, 2, 1)
    assert command("verify", "--tag", "step00000003")[0] == 1
    assert command("verify", "--tag", "step00000009")[0] == 2
    shard = folder / "step00000002" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.write_bytes(flip_a_bit(shard.read_bytes(), random.Random(2)))
    assert command("list")[0] == 0
    code, output = command("verify")
    assert code == 1
    assert f"{shard}: its content is not what was saved" in output
    code, output = command("prune", "--keep", "1", "--dry-run")
    assert (code, output.count("would remove")) == (0, 2)
    assert len(CheckpointFolder(folder).all()) == 3
    code, output = command("prune", "--keep", "1")
    assert (code, output.count("removed")) == (0, 2)
    assert "latest names step00000001 now" in output
    assert [path.name for path in CheckpointFolder(folder).all()] == ["step00000001"]
    assert command("verify")[0] == 0
    (folder / "latest").unlink()
    (folder / "latest").mkdir()
    code, output = command("verify")
    assert (code, "latest: cannot be read (Is a directory), but there are step00000001" in output) == (1, True)
    (folder / "step00000001" / MANIFEST).write_text("")
    assert command("prune", "--keep", "1")[0] == 1
    assert len(CheckpointFolder(folder).all()) == 1
