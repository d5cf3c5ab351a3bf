"""Manifest, pointer and choice of checkpoints, without an engine; whole runs are in test_resume.py."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from ranks import free_port

from ds_remoe.cli import main
from ds_remoe.config import load_run
from ds_remoe.training.checkpoint import Checkpoints
from ds_remoe.training.checkpoint_files import record_file
from ds_remoe.training.checkpoint_folder import LATEST, CheckpointFolder, inspect
from ds_remoe.training.manifest import (
    MANIFEST,
    CheckpointError,
    CheckpointSaveError,
    Manifest,
    RunIdentity,
    write_atomically,
)
from ds_remoe.training.run_files import refuse_misplaced
from ds_remoe.training.run_lock import lock_folder

IDENTITY = RunIdentity(
    world_size=4,
    ep_size=2,
    zero_stage=2,
    dtype="bf16",
    micro_batch_size=8,
    gradient_accumulation_steps=1,
    optimizer="AdamW",
    seed=0,
    data="abc",
    model={"hidden_size": 128, "num_layers": 4},
    moe={"router": "relu", "num_experts": 8},
    sparsity={"alpha": 1.2},
)


@pytest.fixture
def one_rank() -> Any:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def saved(folder: Path, step: int) -> Path:
    """A complete checkpoint of two small files."""
    target = folder / f"step{step:08d}"
    (target / "sub").mkdir(parents=True)
    files = {}
    for name in ("a.pt", "sub/b.pt"):
        torch.save({"step": step, "name": name}, target / name)
        files[name] = record_file(target / name)
    Manifest(step, step * 32, IDENTITY, "w1", {"torch": "2.13.0"}, files).write(target)
    write_atomically(folder / LATEST, target.name)
    return target


def test_a_manifest_reads_as_written(tmp_path: Path) -> None:
    target = saved(tmp_path, 7)
    manifest = Manifest.read(target)
    assert (manifest.step, manifest.samples, manifest.identity, manifest.wandb_run_id) == (7, 224, IDENTITY, "w1")
    manifest.check_identity(IDENTITY, target)
    assert manifest.files == {name: record_file(target / name) for name in ("a.pt", "sub/b.pt")}
    assert inspect(target, contents=True).state == "good"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 2}, "accumulation steps * ranks): the checkpoint has 32, this run 16"),
        ({"dtype": "fp32"}, "dtype: the checkpoint has 'bf16', this run 'fp32'"),
        ({"gradient_accumulation_steps": 2}, "accumulation steps * ranks): the checkpoint has 32, this run 64"),
        ({"optimizer": "Adam"}, "optimizer: the checkpoint has 'AdamW', this run 'Adam'"),
        ({"seed": 1}, "seed: the checkpoint has 0, this run 1"),
        (
            {"data": "abd"},
            "data (fingerprint of corpus, tokenizer and split): the checkpoint has 'abc', this run 'abd'",
        ),
        ({"model": {"hidden_size": 64, "num_layers": 4}}, "model.hidden_size: the checkpoint has 128, this run 64"),
        ({"moe": {"router": "relu"}}, "moe.num_experts: the checkpoint has 8, this run None"),
        ({"sparsity": {"alpha": 1.3}}, "sparsity.alpha: the checkpoint has 1.2, this run 1.3"),
    ],
)
def test_another_run_is_refused_with_both_values(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    target = saved(tmp_path, 7)
    with pytest.raises(CheckpointError) as refused:
        Manifest.read(target).check_identity(dataclasses.replace(IDENTITY, **change), target)
    assert message in str(refused.value)
    assert str(refused.value).count("the checkpoint has") == 1
    assert str(target) in str(refused.value)


def test_all_differences_stand_in_one_message(tmp_path: Path) -> None:
    target = saved(tmp_path, 7)
    other = dataclasses.replace(IDENTITY, world_size=8, seed=8, moe={"router": "topk", "num_experts": 8})
    with pytest.raises(CheckpointError) as refused:
        Manifest.read(target).check_identity(other, target)
    assert str(refused.value).count("the checkpoint has") == 3


def test_other_ranks_may_continue_with_the_same_global_batch(tmp_path: Path) -> None:
    target = saved(tmp_path, 7)
    other = dataclasses.replace(
        IDENTITY,
        world_size=2,
        ep_size=1,
        zero_stage=0,
        gradient_accumulation_steps=2,
        moe={**IDENTITY.moe, "ep_size": 1, "activation_budget": None, "wire_dtype": "bf16"},
    )
    manifest = Manifest.read(target)
    manifest.check_identity(other, target)
    assert manifest.describe_changes(other) == [
        "saved by 4 ranks, ep_size 2, ZeRO 2; resharded for 2 ranks, ep_size 1, ZeRO 0"
    ]
    larger = dataclasses.replace(other, micro_batch_size=16, gradient_accumulation_steps=1)
    manifest.check_identity(larger, target)
    assert "micro-batch size was 8 and is 16 now" in manifest.describe_changes(larger)[1]
    assert manifest.describe_changes(IDENTITY) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: (t / MANIFEST).unlink(), "its save did not finish"),
        (lambda t: (t / MANIFEST).write_text("{"), "not JSON"),
        (lambda t: (t / MANIFEST).write_text('{"format": 99}'), "not a manifest of format 1 or 2"),
        (lambda t: (t / MANIFEST).write_text('{"format": 1, "step": 1}'), "another release"),
        (lambda t: (t / "a.pt").unlink(), "a.pt: missing"),
        (lambda t: (t / "sub" / "b.pt").write_bytes(b"22"), "b.pt: 2 bytes, but "),
        (lambda t: (t / "mp_rank_01_model_states.pt").write_bytes(b"22"), "not of this checkpoint"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    target = saved(tmp_path, 7)
    damage(target)
    found = inspect(target, contents=False)
    assert found.state == ("damaged" if (target / MANIFEST).exists() else "incomplete")
    assert message in found.problems[0]
    assert len(found.problems) == 1


@pytest.mark.usefixtures("one_rank")
def test_the_choice_of_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep=2)
    assert checkpoints.choose("auto") is None
    assert checkpoints.choose("none") is None
    with pytest.raises(CheckpointError, match=r"step00000003 does not exist; there are no checkpoints"):
        checkpoints.choose("step00000003")
    older, newer = saved(tmp_path, 5), saved(tmp_path, 10)
    pointer = tmp_path / LATEST
    for content in ("step00000099", "", "nonsense"):
        pointer.write_text(content)
        with pytest.raises(CheckpointError, match=r"names no checkpoint, and there are step00000005, step00000010"):
            checkpoints.choose("auto")
    pointer.unlink()
    with pytest.raises(CheckpointError, match=r"latest: missing, but there are step00000005, step00000010"):
        checkpoints.choose("auto")
    with pytest.raises(CheckpointError, match="holds checkpoints of an earlier run"):
        checkpoints.choose("none")
    pointer.write_text(newer.name)
    for tag in ("", "..", "latest"):
        with pytest.raises(CheckpointError, match="does not exist"):
            checkpoints.choose(tag)
    (tmp_path / "step00000011").mkdir()  # a save that was killed
    for resume, expected in (("auto", newer), (older.name, older)):
        choice = checkpoints.choose(resume)
        assert choice is not None
        assert (choice.path, choice.manifest, choice.notes) == (expected, Manifest.read(expected), ())
    with pytest.raises(CheckpointError, match="holds checkpoints of an earlier run"):
        checkpoints.choose("none")


@pytest.mark.usefixtures("one_rank")
def test_a_first_save_that_was_killed_before_the_pointer_is_the_latest(tmp_path: Path) -> None:
    only = saved(tmp_path, 5)
    (tmp_path / LATEST).unlink()
    choice = Checkpoints(tmp_path, IDENTITY, keep=2).choose("auto")
    assert choice is not None
    assert choice.path == only


@pytest.mark.usefixtures("one_rank")
def test_a_manifest_of_format_1_is_read_and_its_limits_are_said(tmp_path: Path) -> None:
    target = saved(tmp_path, 7)
    content = json.loads((target / MANIFEST).read_text())
    del content["sha256"]
    content |= {"format": 1, "files": {name: record["size"] for name, record in content["files"].items()}}
    (target / MANIFEST).write_text(json.dumps(content))
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep=2)
    choice = checkpoints.choose("auto")
    assert choice is not None
    assert "only sizes could be checked" in choice.notes[0]
    (target / "a.pt").write_bytes(b"12345")
    with pytest.raises(CheckpointError, match=r"a\.pt: 5 bytes"):
        checkpoints.choose("auto")


class EngineThatWrites:
    """Stands where an engine's own files are of no interest; DeepSpeed's writer is real."""

    def __init__(self) -> None:
        self.checkpoint_engine = TorchCheckpointEngine()

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        self.checkpoint_engine.makedirs(f"{folder}/{tag}", exist_ok=True)
        self.checkpoint_engine.zipfile_serialization = True
        self.checkpoint_engine.save({"weight": torch.ones(9)}, f"{folder}/{tag}/shard.pt")
        self._copy_recovery_script(folder)

    def _copy_recovery_script(self, folder: str) -> None:
        (Path(folder) / "zero_to_fp32.py").write_text("")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("complete", "incomplete", "step", "keep", "left"),
    [
        ([100, 200], [], 300, 2, [200, 300]),
        ([100, 200, 300], [], 150, 2, [100, 150]),  # resumed from 100: the old line's later ones are not newer
        ([100, 200], [300], 250, 1, [250]),  # 300 was killed in its save
        ([100], [200], 300, 2, [100, 300]),
        ([], [300], 300, 3, [300]),
    ],
)
def test_a_save_keeps_the_newest_of_its_own_line(
    tmp_path: Path, complete: list[int], incomplete: list[int], step: int, keep: int, left: list[int]
) -> None:
    for done in complete:
        saved(tmp_path, done)
    for broken in incomplete:
        (tmp_path / f"step{broken:08d}").mkdir()
    target = Checkpoints(tmp_path, IDENTITY, keep).save(EngineThatWrites(), step, step * 32, None)
    assert sorted(int(path.name[4:]) for path in tmp_path.iterdir() if path.is_dir()) == left
    assert (tmp_path / LATEST).read_text() == target.name
    assert inspect(target, contents=True).state == "good"


def test_of_a_linked_checkpoint_only_the_link_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere, folder = saved(tmp_path / "archive", 1), tmp_path / "run" / "checkpoints"
    kept = saved(folder, 2)
    link = folder / elsewhere.name
    link.symlink_to(elsewhere)
    for options, word in ((["--dry-run"], "would remove"), ([], "removed")):
        assert main(["checkpoint", "prune", str(folder.parent), "--keep", "1", *options]) == 0
        assert f"{word} {link} (old; a link: what it points to stays)" in capsys.readouterr().out
        assert link.is_symlink() == bool(options)
    assert CheckpointFolder(folder).all() == [kept]
    assert inspect(elsewhere, contents=True).state == "good"


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("at", ["Manifest.write", "CheckpointFolder.point_to"])
def test_a_disk_that_fills_up_at_the_end_of_a_save(tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 5)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"ds_remoe.training.checkpoint.{at}", full)
        with pytest.raises(CheckpointSaveError, match=r"(?s)step 10 could not .*No space left.*there are step00000005"):
            Checkpoints(tmp_path, IDENTITY, keep=2).save(EngineThatWrites(), 10, 320, None)
    assert not (tmp_path / "step00000010").exists()
    assert (tmp_path / LATEST).read_text() == "step00000005"
    Checkpoints(tmp_path, IDENTITY, keep=2).save(EngineThatWrites(), 10, 320, None)
    assert (tmp_path / LATEST).read_text() == "step00000010"


def test_one_run_at_a_time_in_a_folder(tmp_path: Path) -> None:
    first = lock_folder(tmp_path / "run")
    program = f"""
from pathlib import Path
from ds_remoe.training.run_lock import lock_folder
lock_folder(Path({str(tmp_path / "run")!r}))
"""
    second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert second.returncode != 0
    assert "another run is using it" in second.stderr
    first.release()
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("name", ["file/run", "nul\0", "x" * 300, "lock", "stopped"])
def test_a_folder_that_cannot_be_made_or_used_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "lock" / ".lock").mkdir(parents=True)
    (tmp_path / "stopped" / ".stopped").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"remoe\.train\.output_dir = .*: cannot be used .*; .* another folder"):
        lock_folder(tmp_path / name)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOSPC, errno.ENOTCONN])
def test_a_file_system_that_may_come_back_is_no_wrong_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            lock_folder(tmp_path / "run")
    settings = [f"remoe.train.output_dir={tmp_path}", 'remoe.data.tokenizer={"type": "sentencepiece", "path": "t"}']
    for overrides in (settings[:1], settings[1:]):
        with monkeypatch.context() as patch:
            patch.setattr("ds_remoe.config.folders.os.stat", fail)
            with pytest.raises(OSError, match=os.strerror(number)):
                load_run(Path(__file__).parents[1] / "ds_configs" / "quickstart.json", overrides, world_size=None)


def test_a_file_in_the_place_of_the_checkpoints_is_refused(tmp_path: Path) -> None:
    refuse_misplaced(tmp_path)
    (tmp_path / "checkpoints").touch()
    with pytest.raises(
        CheckpointError, match=r"checkpoints: is no folder.*; move that away, .*remoe\.train\.output_dir"
    ):
        refuse_misplaced(tmp_path)


def test_an_atomic_write_replaces_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "pointer"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["pointer"]


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    target = saved(tmp_path, 3)
    content = json.loads((target / MANIFEST).read_text())
    assert content["format"] == 2
    data = (target / "a.pt").read_bytes()
    assert content["files"]["a.pt"] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
