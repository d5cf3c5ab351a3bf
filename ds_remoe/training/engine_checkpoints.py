"""`save_checkpoint` and `load_checkpoint` of an engine: with λ and other state, and by any number of ranks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Protocol

from ds_remoe.deepspeed_optimizer_state import live_cut, saved_cut
from ds_remoe.moe.sparsity import SparsityController
from ds_remoe.training.resharding import restore_optimizer

CLIENT_STATE_KEY = "ds_remoe_sparsity"
_STAGE_3 = 3


class Carried(Protocol):
    """Something whose state checkpoints carry as plain values, the same on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        ...


def tie_checkpoints(engine: Any, controller: SparsityController | None, carried: dict[str, Carried]) -> None:
    """Have an engine's checkpoints carry λ and `carried`, and its loads reshard what other ranks have saved.

    DeepSpeed 0.19.8 refuses most checkpoints of other ranks, and loads stacked experts of another ep_size wrongly
    without a word. Here the optimizer is resharded wherever the checkpoint is cut otherwise than the engine.
    """
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
        reshard = everything and _is_cut_otherwise(engine, load_dir, tag)
        path, client_state = load(
            load_dir,
            tag,
            load_module_strict,
            load_optimizer_states and not reshard,
            load_lr_scheduler_states,
            load_module_only,
            custom_load_fn,
        )
        if reshard and path is not None:
            restore_optimizer(engine, Path(path).parent)
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


def _is_cut_otherwise(engine: Any, load_dir: str, tag: str | None) -> bool:
    """Whether a checkpoint is there whose shards are not this engine's."""
    if engine.optimizer is None or engine.mpu is not None:
        return False
    if engine.zero_optimization_stage() == _STAGE_3 or engine.load_universal_checkpoint():
        return False  # laid out otherwise; neither exists for native MoE layers
    folder = Path(load_dir)
    if tag is None and (folder / "latest").is_file():
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
    saved = saved_cut(folder / str(tag)) if tag is not None else None
    return saved is not None and saved != live_cut(engine)
