"""`save_checkpoint` and `load_checkpoint` of an engine: with λ and other state, and by any number of ranks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from ds_remoe.deepspeed_checkpoint_io import (
    DamagedFileError,
    Reader,
    UnsafeFileError,
    examine,
    load_objects,
    load_values,
    loading_values_only,
)
from ds_remoe.moe.sparsity import SparsityController
from ds_remoe.training.agreement import agreed, gathered
from ds_remoe.training.resharding import open_optimizer, restore_optimizer

CLIENT_STATE_KEY = "ds_remoe_sparsity"
_STAGE_3 = 3
_REMEDY = (
    "Where the source of the checkpoint is trusted, load it with an engine of "
    "ds_remoe.initialize(..., trust_checkpoints=True), which runs whatever code the files name; classes that only hold "
    "values can instead be named to torch.serialization.add_safe_globals before the load"
)


class Carried(Protocol):
    """Something whose state checkpoints carry as plain values, the same on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        ...


def tie_checkpoints(
    engine: Any, controller: SparsityController | None, carried: dict[str, Carried], *, trust: bool
) -> None:
    """Have an engine's checkpoints carry λ and `carried`, and its loads run no code and reshard what others saved.

    DeepSpeed 0.19.8 unpickles files with whatever code they name, refuses most checkpoints of other ranks, and loads
    stacked experts of another ep_size wrongly without a word. Here files are read as values, unless `trust` is set,
    and the optimizer is resharded wherever the checkpoint is cut otherwise than the engine.
    """
    read: Reader = load_objects if trust else load_values
    save, load = engine.save_checkpoint, engine.load_checkpoint

    @functools.wraps(save)
    def save_checkpoint(
        save_dir: str, tag: str | None = None, client_state: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        ours = {key: part.state_dict() for key, part in carried.items()}
        if controller is not None:
            ours[CLIENT_STATE_KEY] = controller.state_dict()
        return save(save_dir, tag, {**(client_state or {}), **ours}, *args, **kwargs)

    @functools.wraps(load)
    def load_checkpoint(
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> Any:
        everything = load_optimizer_states and not load_module_only
        checkpoint = agreed(functools.partial(_checkpoint_in, engine, load_dir, tag))
        with contextlib.nullcontext() if trust else _values_only(engine, checkpoint, everything):
            others = None
            if everything and checkpoint is not None and _is_resharded(engine):
                others = open_optimizer(engine, checkpoint, read)
            path, client_state = load(
                load_dir,
                tag,
                load_module_strict,
                load_optimizer_states and others is None,
                load_lr_scheduler_states,
                load_module_only,
                custom_load_fn,
            )
            if others is not None:
                agreed(functools.partial(restore_optimizer, engine, others))
        saved = {key: client_state.pop(key, None) for key in carried} if client_state is not None else {}
        for key, part in carried.items():
            if saved.get(key) is not None and not load_module_only:
                part.load_state_dict(saved[key])
        if controller is None:
            return path, client_state
        sparsity = client_state.pop(CLIENT_STATE_KEY, None) if client_state is not None else None
        if sparsity is not None:
            controller.load_state_dict(sparsity)
        elif path is not None and not load_module_only:
            raise ValueError(
                f"{path}: holds no ReMoE sparsity state ({CLIENT_STATE_KEY!r}), as it was not saved through "
                "ds_remoe.initialize; λ would start anew. Load its weights alone with load_module_only=True"
            )
        return path, client_state

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


def _checkpoint_in(engine: Any, load_dir: str, tag: str | None) -> Path | None:
    """The folder that DeepSpeed will load; None where none is named."""
    pointer = Path(load_dir) / ("latest_universal" if engine.load_universal_checkpoint() else "latest")
    if tag is None and pointer.is_file():
        tag = pointer.read_text(encoding="utf-8").strip()
    return None if tag is None else Path(load_dir) / str(tag)


@contextlib.contextmanager
def _values_only(engine: Any, checkpoint: Path | None, everything: bool) -> Iterator[None]:
    """Look at the files before anything of the engine changes, then hold DeepSpeed to reading values.

    Raises:
        UnsafeFileError: on all ranks, where any of them found a file that would run code, or (DamagedFileError) that
            cannot be read.
    """
    found = gathered(agreed(lambda: [] if checkpoint is None else _refused_files(engine, checkpoint, everything)))
    refused = {str(error): error for errors in found for error in errors}
    damaged = sorted(text for text, error in refused.items() if isinstance(error, DamagedFileError))
    if damaged:
        listing = "\n  ".join(damaged)
        raise DamagedFileError(
            f"{checkpoint}: nothing was loaded, as files are damaged; take another checkpoint:\n  {listing}"
        )
    if refused:
        listing = "\n  ".join(sorted(refused))
        raise UnsafeFileError(
            f"{checkpoint}: nothing was loaded, as files hold more than values:\n  {listing}\n{_REMEDY}"
        )
    try:
        with loading_values_only(engine):
            yield
    except DamagedFileError:
        raise
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{checkpoint}: {error}\n{_REMEDY}") from error


def _refused_files(engine: Any, checkpoint: Path, everything: bool) -> list[UnsafeFileError]:
    """What `examine` says of this rank's share of the files that DeepSpeed can read; all where nodes have their own."""
    universal = engine.load_universal_checkpoint()
    files = sorted(checkpoint.rglob("*.pt") if universal else checkpoint.glob("*_states.pt"))
    if not (everything or universal or engine.zero_optimization_stage() == _STAGE_3):
        files = [path for path in files if not path.name.endswith("optim_states.pt")]
    if not engine.use_node_local_storage():
        files = files[dist.get_rank() :: dist.get_world_size()]
    refused = []
    for path in files:
        with contextlib.suppress(OSError):  # the load will say so
            refused.append(examine(path))
    return [error for error in refused if error is not None]


def _is_resharded(engine: Any) -> bool:
    """Whether an engine is one that can take what other ranks have saved."""
    if engine.optimizer is None or engine.mpu is not None:
        return False
    # Laid out otherwise; neither exists for native MoE layers.
    if engine.zero_optimization_stage() == _STAGE_3 or engine.load_universal_checkpoint():
        return False
    return not engine.use_node_local_storage()  # where no rank can read what another node has saved
