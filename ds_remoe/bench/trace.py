"""A recorded routing trace: which experts each token of a training run took, and with what weight.

The file is a compressed NumPy archive (.npz): one table of records, the masks as bits, the weights of the active pairs
as bfloat16, and the run's sizes as JSON. Half of a fp32 weight's bits are enough to replay a routing, and bfloat16 has
the range of fp32, so that an active weight stays above zero.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, PositiveInt, TypeAdapter, ValidationError, dataclasses
from torch import Tensor

FORMAT = "ds_remoe routing trace 1"
COLUMNS = ("step", "layer", "rank", "micro_batch", "num_experts", "tokens", "pairs")
_ZIP_MAGIC = b"PK\x03\x04"
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, MemoryError)
"""What NumPy, zipfile and json raise of bytes that nobody wrote so, some being marks of encryption, depth or size."""


class TraceError(ValueError):
    """A file cannot be read as a routing trace; the message names the file, what is wrong and the remedy."""


@dataclass(frozen=True)
class TracedRouting:
    """One layer's routing of one micro-batch on one rank of the training run.

    Attributes:
        step: optimizer step, counted from 1.
        layer: position among the model's routers.
        rank: global rank.
        num_experts: E.
        tokens: T.
        mask_TE: bool, True where the pair is active.
        weights_TE: fp32 routing weights with the precision of bfloat16, zero outside the mask.
        micro_batch: position in the step's gradient accumulation.
    """

    step: int
    layer: int
    rank: int
    num_experts: int
    tokens: int
    mask_TE: Tensor
    weights_TE: Tensor
    micro_batch: int = 0


@dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TraceMetadata:
    """The run that was recorded.

    Attributes:
        config: name of its file; overrides: its `path=value` settings.
        steps: the recorded optimizer steps.
        world_size, ep_size: ranks of the run and of one expert-parallel group.
        hidden_size: D.
        expert_hidden_size: H of one expert.
        k: wanted mean number of active experts a token.
    """

    config: str
    overrides: tuple[str, ...]
    steps: tuple[int, ...]
    world_size: PositiveInt
    ep_size: PositiveInt
    hidden_size: PositiveInt
    expert_hidden_size: PositiveInt
    k: PositiveInt


def write_trace(path: Path, metadata: TraceMetadata, records: Sequence[TracedRouting]) -> None:
    """Write a trace; the file must not exist, as a recording is never overwritten.

    Raises:
        FileExistsError: it does.
        ValueError: a record's tensors do not have its shape.
    """
    for record in records:
        shape = (record.tokens, record.num_experts)
        if record.mask_TE.shape != shape or record.weights_TE.shape != shape:
            raise ValueError(
                f"record of step {record.step}, layer {record.layer}, rank {record.rank}: mask_TE "
                f"{tuple(record.mask_TE.shape)} and weights_TE {tuple(record.weights_TE.shape)} must both be {shape}"
            )
    table = [[r.step, r.layer, r.rank, r.micro_batch, r.num_experts, r.tokens, int(r.mask_TE.sum())] for r in records]
    masks = [np.packbits(r.mask_TE.cpu().numpy()) for r in records]
    weights = [r.weights_TE[r.mask_TE].to("cpu", torch.bfloat16).view(torch.int16).numpy() for r in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        np.savez_compressed(
            file,
            metadata=np.array(json.dumps({"format": FORMAT, **asdict(metadata)})),
            table=np.array(table, dtype=np.int64).reshape(-1, len(COLUMNS)),
            masks=np.concatenate([np.zeros(0, np.uint8), *masks]),
            weights=np.concatenate([np.zeros(0, np.int16), *weights]),
        )


def read_trace(path: Path) -> list[TracedRouting]:
    """The recorded routings, by step, micro-batch, layer and rank.

    Raises:
        TraceError: not a trace, or a damaged one.
        OSError: the file cannot be opened.
    """
    return _read(path)[1]


def read_metadata(path: Path) -> TraceMetadata:
    """What run was recorded; raises as `read_trace` does."""
    return _read(path)[0]


def _read(path: Path) -> tuple[TraceMetadata, list[TracedRouting]]:
    with path.open("rb") as file:
        is_archive = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    not_a_trace = f"{path}: not a routing trace; make one with `ds-remoe bench record`"
    if not is_archive:
        raise TraceError(not_a_trace)
    try:
        with np.load(path, allow_pickle=False) as archive:
            if set(archive.files) != {"metadata", "table", "masks", "weights"}:
                raise TraceError(not_a_trace)
            content = json.loads(str(archive["metadata"]))
            arrays = archive["table"], archive["masks"], archive["weights"]
    except TraceError:
        raise
    except _DAMAGE as error:
        raise TraceError(f"{path}: truncated or damaged ({error}); copy it again, or record it anew") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise TraceError(f"{path}: its format is not {FORMAT!r}; record it anew with this version")
    try:
        metadata = TypeAdapter(TraceMetadata).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise TraceError(f"{path}: its metadata has a wrong {field} ({first['msg']}); record it anew") from None
    return metadata, _unpack(path, *arrays)


def _unpack(
    path: Path, table: npt.NDArray[np.int64], masks: npt.NDArray[np.uint8], weights: npt.NDArray[np.int16]
) -> list[TracedRouting]:
    for name, array, dtype, dimensions in (
        ("table", table, np.int64, 2),
        ("masks", masks, np.uint8, 1),
        ("weights", weights, np.int16, 1),
    ):
        if array.dtype != dtype or array.ndim != dimensions:
            what = f"{array.dtype} of {array.ndim} dimensions, not {np.dtype(dtype)} of {dimensions}"
            raise TraceError(f"{path}: its array {name} is {what}; record it anew")
    if table.shape[1] != len(COLUMNS) or (table < 0).any():
        raise TraceError(
            f"{path}: its table needs the {len(COLUMNS)} columns {', '.join(COLUMNS)}, none of them negative"
        )
    no_fit = f"{path}: its table does not fit its masks and weights; record it anew"
    sizes = [row[COLUMNS.index("num_experts")] * row[COLUMNS.index("tokens")] for row in table.tolist()]
    if sum((size + 7) // 8 for size in sizes) != masks.size or sum(table[:, -1].tolist()) != weights.size:
        raise TraceError(no_fit)
    records: list[TracedRouting] = []
    next_byte = next_pair = 0
    for step, layer, rank, micro_batch, num_experts, tokens, num_pairs in table.tolist():
        size = tokens * num_experts
        packed = masks[next_byte : next_byte + (size + 7) // 8]
        next_byte += packed.size
        mask_TE = torch.from_numpy(np.unpackbits(packed, count=size)).bool().view(tokens, num_experts)
        if int(mask_TE.sum()) != num_pairs:
            raise TraceError(no_fit)
        weights_TE = torch.zeros(tokens, num_experts)
        values = torch.from_numpy(weights[next_pair : next_pair + num_pairs])
        next_pair += num_pairs
        weights_TE[mask_TE] = values.view(torch.bfloat16).float()
        records.append(TracedRouting(step, layer, rank, num_experts, tokens, mask_TE, weights_TE, micro_batch))
    return sorted(records, key=lambda r: (r.step, r.micro_batch, r.layer, r.rank))
