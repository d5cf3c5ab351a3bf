"""One rank of `ds-remoe bench comm`: both layers on the same weights, tokens and routing, counted and timed."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ds_remoe.bench.comm import OURS, STOCK, Request, Row
from ds_remoe.bench.comm_bytes import SentBytes, least_bytes
from ds_remoe.bench.comm_cases import RoutingCase
from ds_remoe.bench.timing import interleave, ratio
from ds_remoe.deepspeed_compat import DeepSpeedMoE
from ds_remoe.moe import MoE, ReLUGate, SwiGLU
from ds_remoe.moe.routers import ReLURouter
from ds_remoe.moe.routing import Routing
from ds_remoe.process_exit import run_and_exit
from ds_remoe.training import runtime

INIT_STD = 0.02
TOLERANCE = 1e-4


class FixedRouter(ReLURouter):
    """Routes the tokens as it was told, whatever they are."""

    def fix(self, mask_TE: Tensor, weights_TE: Tensor) -> None:
        """Take this routing from now on, expert-major in memory as the ReLU router lays it."""
        self.mask_TE = mask_TE.t().contiguous().t()
        self.weights_TE = weights_TE.t().clone(memory_format=torch.contiguous_format).t().requires_grad_()

    def forward(self, x_TD: Tensor, used_token_T: Tensor | None = None) -> tuple[Routing, Tensor]:
        """The routing, with weights that take a gradient, and no auxiliary loss."""
        return Routing.from_mask(self.weights_TE, self.mask_TE), self.weights_TE.new_zeros(())


class FixedGate(ReLUGate, FixedRouter):
    """ReLUGate's protocol and capacity around a fixed routing: its `super().forward` is FixedRouter's."""


_GATES: dict[str, type[FixedRouter]] = {OURS: FixedRouter, STOCK: FixedGate}


class Rivals:
    """`ds_remoe.MoE` and DeepSpeed's `MoE` on the same weights, their experts spread over all ranks.

    Args:
        num_experts: E.
        hidden_size: D.
        expert_width: H.
        device: of this rank.
    """

    def __init__(self, num_experts: int, hidden_size: int, expert_width: int, device: torch.device) -> None:
        self.sizes = num_experts, hidden_size, expert_width
        ep_size = dist.get_world_size()
        # As the stock layer does, ours keeps every pre-activation: the times differ by the exchange and the experts.
        expert = SwiGLU(hidden_size, expert_width)
        ours = MoE(hidden_size, expert, num_experts, ep_size, activation_budget=None)
        ours.init_weights(INIT_STD, seed=0)
        stock = DeepSpeedMoE(hidden_size, expert, num_experts, ep_size, drop_tokens=False)
        stock.load_state_dict(ours.state_dict())
        self.layers = {OURS: ours, STOCK: stock}
        self.gates = {rival: gate(hidden_size, num_experts, 1) for rival, gate in _GATES.items()}
        for rival, layer in self.layers.items():
            layer.deepspeed_moe.gate = self.gates[rival]
            layer.to(device)
            with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints of each group that it makes
                layer.set_deepspeed_parallelism()

    def fix(self, mask_TE: Tensor, weights_TE: Tensor) -> None:
        """Route so from now on."""
        for gate in self.gates.values():
            gate.fix(mask_TE, weights_TE)

    def run(self, rival: str, x_TD: Tensor, grad_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One forward and backward pass: the output, the tokens' gradient and that of the routing weights."""
        layer, weights_TE = self.layers[rival], self.gates[rival].weights_TE
        layer.zero_grad(set_to_none=True)
        x_TD, weights_TE.grad = x_TD.detach().requires_grad_(), None
        output = layer(x_TD)[0]
        output.backward(grad_TD)
        assert x_TD.grad is not None
        assert weights_TE.grad is not None
        return output.detach(), x_TD.grad, weights_TE.grad


def measure(case: RoutingCase, rivals: Rivals, repeats: int, device: torch.device) -> Row:
    """Count and time both rivals on one routing; all ranks call together and get the same row.

    Raises:
        RuntimeError: the rivals do not compute the same.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    _, hidden_size, _ = rivals.sizes
    mask_TE = case.masks_R[rank].to(device)
    rivals.fix(mask_TE, case.weights_R[rank].to(device))
    random = torch.Generator().manual_seed(rank)
    x_TD, grad_TD = torch.randn(2, len(mask_TE), hidden_size, generator=random).to(device)
    results, sent = {}, {}
    for rival in rivals.layers:
        with SentBytes() as counter:
            results[rival] = rivals.run(rival, x_TD, grad_TD)
        sent[rival] = counter
    difference = _difference(results[OURS], results[STOCK])
    if difference > TOLERANCE:
        raise RuntimeError(f"ours and DeepSpeed's layer differ by {difference:.1e} of the largest value in {case}")

    def timed(rival: str) -> None:
        rivals.run(rival, x_TD, grad_TD)
        dist.barrier()

    works = {rival: (lambda rival=rival: timed(rival)) for rival in rivals.layers}
    timings = interleave(works, repeats, device, after_round=dist.barrier)
    return Row(
        ep_size=ranks,
        workload=case.workload,
        step=case.step,
        layer=case.layer,
        expert_width=case.expert_width,
        num_experts=case.num_experts,
        tokens=sum(len(mask) for mask in case.masks_R),
        pairs=sum(int(mask.sum()) for mask in case.masks_R),
        least_bytes=least_bytes(case.masks_R, hidden_size, x_TD.element_size()),
        sent_bytes={rival: _over_ranks(counter) for rival, counter in sent.items()},
        times={rival: timing.as_figures() for rival, timing in timings.items()},
        stock_time_over_ours=ratio(timings[STOCK], timings[OURS]),
        difference=difference,
    )


def _difference(ours: Sequence[Tensor], stock: Sequence[Tensor]) -> float:
    """Largest difference relative to the tensor's largest value, over the tensors and all ranks."""
    relative = torch.zeros(())
    for mine, theirs in zip(ours, stock, strict=True):
        if theirs.numel():
            scale = theirs.abs().max().clamp(min=torch.finfo(theirs.dtype).tiny)
            relative = torch.maximum(relative, ((mine - theirs).abs().max() / scale).cpu())
    found: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(found, float(relative))
    return max(found)


def _over_ranks(counter: SentBytes) -> dict[str, int]:
    found: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, dict(counter.by_operation))
    operations = sorted({name for counts in found for name in counts})
    return {name: sum(counts.get(name, 0) for counts in found) for name in operations}


def main(arguments: list[str] | None = None) -> int:
    """Measure the request in the first file; rank 0 writes the rows to the second."""
    task, results = map(Path, arguments if arguments is not None else sys.argv[1:])
    request = Request(**json.loads(task.read_text(encoding="utf-8")))
    runtime.quiet_output()
    device = runtime.start(seed=0)
    rows: list[Row] = []
    rivals: Rivals | None = None
    for case in request.cases(dist.get_world_size()):
        sizes = case.num_experts, request.hidden_size, case.expert_width
        if rivals is None or rivals.sizes != sizes:
            rivals = Rivals(*sizes, device)
        rows.append(measure(case, rivals, request.repeats, device))
    if dist.get_rank() == 0:
        results.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
    runtime.stop()
    return 0


if __name__ == "__main__":
    run_and_exit(main)
