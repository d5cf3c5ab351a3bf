"""Tensors at the very end or beginning of mapped memory, so that a kernel that leaves one is killed where it does."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

PAGE = mmap.PAGESIZE
UNWRITTEN = 0xFF
"""Every byte of an empty tensor: NaN, -1 or True, none of which may come through to a result."""


def guarded_like(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy with a page beside it that nobody may touch: behind its last byte, or before its first."""
    size = tensor.element_size() * (
        1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    )
    used = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, used + PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbidden = address + used if at_end else address
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(forbidden), PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = used - size if at_end else PAGE
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


class GuardedMemory(TorchDispatchMode):
    """Every tensor that an operator makes lies beside a forbidden page.

    Args:
        at_end: the page follows the tensor, else it precedes it.
    """

    def __init__(self, at_end: bool) -> None:
        super().__init__()
        self.at_end = at_end

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.numel() == 0 or _storage(value) in given:
                return value
            if "empty" in func.overloadpacket.__name__:
                value.untyped_storage().fill_(UNWRITTEN)
            return guarded_like(value, self.at_end)

        return tree_map(moved, result)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def interpreted(backwards: bool) -> Iterator[None]:
    """Triton's interpreter with its own memory unguarded; `backwards` runs a launch's last program first."""
    from triton.runtime import interpreter

    run, set_index = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.set_grid_idx

    def unguarded(self: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            run(self, *args, **kwargs)

    def from_the_end(self: Any, *index: int) -> None:
        set_index(self, *(size - 1 - i for size, i in zip(self.grid_dim, index, strict=True)))

    interpreter.GridExecutor.__call__ = unguarded
    if backwards:
        interpreter.InterpreterBuilder.set_grid_idx = from_the_end
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.set_grid_idx = run, set_index


def run_guarded(work: Callable[[], None]) -> None:
    """Run `work`, which compares kernels with their twins, beside both kinds of page and in both orders of programs."""
    for at_end in (True, False):
        with interpreted(backwards=at_end), GuardedMemory(at_end):
            work()
