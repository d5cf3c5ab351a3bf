"""DeepSpeed's own way of using `MoE`: a user's model with the layer swapped in, and its checkpoints."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from ranks import run_ranks
from torch import Tensor, nn

import ds_remoe
from ds_remoe.deepspeed_compat import clip_gradients
from ds_remoe.moe import SwiGLU

D, E = 8, 4


class UserModel(nn.Module):
    """As in DeepSpeed's tutorial: a stem, an MoE layer, a head, and `loss + coefficient * l_aux`."""

    def __init__(self, layer: type[StockMoE], expert: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(D, D)
        self.moe = layer(hidden_size=D, expert=expert, num_experts=E, **kwargs)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        hidden, l_aux, _ = self.moe(self.stem(x))
        return nn.functional.cross_entropy(self.head(hidden), target) + 0.01 * l_aux


def expert(kind: str) -> nn.Module:
    return SwiGLU(D, 6) if kind == "swiglu" else nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, D))


def config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1_000_000_000,
        "remoe": {"sparsity": {"lambda_init": 1e-3, "alpha": 1.3}},
    }


def build(kind: str, stage: int, seed: int, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    model = UserModel(ds_remoe.MoE, expert(kind), **kwargs)
    groups = {"params": list(model.parameters()), "name": "parameters"}
    engine, *_ = ds_remoe.initialize(
        model=model,
        model_parameters=split_params_into_different_moe_groups_for_optimizer(groups),
        config=config(stage),
    )
    return engine


def steps(engine: Any, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        x = torch.randn(4, D, generator=generator)
        loss = engine(x, x[:, :3].argmax(dim=1))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def train_save_resume(folder: str) -> list[str]:
    """Every expert kind, ZeRO stage, ep_size, residual or not; returns what went wrong."""
    wrong = []
    for kind, stage, ep_size, residual in (
        ("swiglu", 0, 2, False),
        ("swiglu", 1, 1, True),
        ("swiglu", 2, 2, True),
        ("sequential", 0, 1, True),
        ("sequential", 1, 2, True),
        ("sequential", 2, 2, False),
    ):
        case = f"{kind} stage {stage} ep {ep_size} residual {residual}"
        options = {"ep_size": ep_size, "use_residual": residual, "k": 1}
        engine = build(kind, stage, 0, **options)
        before = steps(engine, 0, 30)
        path = f"{folder}/{kind}{stage}{ep_size}"
        engine.save_checkpoint(path, client_state={"mine": 7})
        expected = steps(engine, 30, 5)
        resumed = build(kind, stage, 1, **options)
        _, client_state = resumed.load_checkpoint(path)
        if client_state.get("mine") != 7 or len(client_state) < 1:
            wrong.append(f"{case}: client state {client_state}")
        got = steps(resumed, 30, 5)
        if got != expected:
            wrong.append(f"{case}: {got} after the resume, {expected} without")
        if resumed.remoe.controller.history != engine.remoe.controller.history:
            wrong.append(f"{case}: λ's history differs")
        if not sum(before[-5:]) < sum(before[:5]):
            wrong.append(f"{case}: did not learn: {before}")
    return wrong


def load_stock_checkpoint(folder: str) -> list[str]:
    """A checkpoint of a DeepSpeed-MoE model loads into ours by name: same router, experts, residual."""
    torch.manual_seed(5)
    stock = UserModel(StockMoE, expert("sequential"), ep_size=2, use_residual=True)
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(dist.get_rank())) * 0.1)
    stock_config = {k: v for k, v in config(1).items() if k != "remoe"}
    engine, *_ = deepspeed.initialize(model=stock, model_parameters=list(stock.parameters()), config=stock_config)
    engine.save_checkpoint(folder)
    ours = build("sequential", 1, 9, ep_size=2, use_residual=True)
    ours.load_checkpoint(folder, load_module_only=True, load_optimizer_states=False)
    wanted, got = engine.module.state_dict(), ours.module.state_dict()
    wrong = [] if wanted.keys() == got.keys() else [f"names differ: {sorted(wanted.keys() ^ got.keys())}"]
    wrong += [f"{name} differs" for name in wanted.keys() & got.keys() if not torch.equal(wanted[name], got[name])]
    refused = ""
    try:
        ours.load_checkpoint(folder)
    except Exception as error:
        refused = str(error)
    return wrong if "sparsity state" in refused else [*wrong, f"a foreign checkpoint was taken: {refused!r}"]


def copy_the_layer() -> list[str]:
    """A deep copy drops the marks of parameters by which DeepSpeed knows experts; all layers or one may be copies."""
    wrong = []
    for stage in (0, 2):
        losses = []
        for copied in (False, True):
            torch.manual_seed(3)
            model = UserModel(ds_remoe.MoE, expert("swiglu"), ep_size=2, k=1)
            if copied:
                model.moe = copy.deepcopy(model.moe)
            with torch.no_grad():
                for p in model.moe.deepspeed_moe.experts.parameters():
                    p.add_(dist.get_rank() * 0.1)
            parameters = list(model.parameters())
            engine, *_ = ds_remoe.initialize(model=model, model_parameters=parameters, config=config(stage))
            losses.append(steps(engine, 0, 4))
        if losses[0] != losses[1]:
            wrong.append(f"stage {stage}: {losses[1]} with a copied layer, {losses[0]} without")
        x = torch.randn(5, D, generator=torch.Generator().manual_seed(dist.get_rank()))
        layer = engine.module.moe.eval()
        twin = copy.deepcopy(engine.module).moe
        # What ZeRO ties to its parameters cannot be pickled; a copy is free of it.
        for name, other in (("copy", twin), ("pickled copy", pickle.loads(pickle.dumps(twin)))):
            with torch.no_grad():
                ours, its = layer(x)[0], other(x)[0]
            if not torch.equal(ours, its):
                wrong.append(f"stage {stage}: a {name} of the layer gives another output")
    return wrong


def parameter_groups() -> list[str]:
    """Groups without names, one of them an iterator; DeepSpeed splits the experts off and keeps their settings."""
    model = UserModel(ds_remoe.MoE, expert("swiglu"), ep_size=2)
    matrices = (p for p in model.parameters() if p.dim() > 1)
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.25},
        {"params": vectors, "weight_decay": 0.0},
    ]
    engine, *_ = ds_remoe.initialize(model=model, model_parameters=groups, config=config(0))
    found = {id(p): group["weight_decay"] for group in engine.optimizer.param_groups for p in group["params"]}
    wrong = []
    for name, p in model.named_parameters():
        if found.get(id(p)) != (0.25 if p.dim() > 1 else 0.0):
            wrong.append(f"{name}: weight decay {found.get(id(p))}")
    steps(engine, 0, 1)
    named = [{"params": list(part.parameters()), "name": "mine"} for part in (model.stem, model.moe)]
    refused = {
        "model_parameters: two groups have the name 'mine'": lambda: ds_remoe.initialize(
            model=model, model_parameters=named, config=config(1)
        ),
        "ep_size = 4: must divide the number of ranks, which is 2": lambda: build("swiglu", 1, 0, ep_size=4),
    }
    for message, make_engine in refused.items():
        try:
            make_engine()
            wrong.append(f"nothing said {message}")
        except ValueError as error:
            if message not in str(error):
                wrong.append(f"{error}, not {message}")
    return wrong


def drop_in_cases(folder: str) -> list[str]:
    return [
        *train_save_resume(f"{folder}/ours"),
        *load_stock_checkpoint(f"{folder}/stock"),
        *copy_the_layer(),
        *parameter_groups(),
    ]


def test_deepspeeds_way_of_using_moe(tmp_path: Path) -> None:
    wrong = [line for lines in run_ranks(drop_in_cases, 2, str(tmp_path)) for line in lines]
    assert not wrong, "\n".join(wrong)


def test_experts_start_different_and_the_same_at_any_ep_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("swiglu", "sequential"):
        torch.manual_seed(0)
        whole = ds_remoe.MoE(D, expert(kind), num_experts=E).deepspeed_moe.experts.state_dict()
        matrices = [whole[name] for name in sorted(whole) if name.endswith("weight")]
        assert len({tuple(m.flatten().tolist()) for m in matrices}) == len(matrices)
        for rank in (0, 1):
            monkeypatch.setenv("RANK", str(rank))
            torch.manual_seed(0)
            part = ds_remoe.MoE(D, expert(kind), num_experts=E, ep_size=2).deepspeed_moe.experts.state_dict()
            for name, tensor in part.items():
                index, rest = name.removeprefix("deepspeed_experts.").split(".", 1)
                assert torch.equal(tensor, whole[f"deepspeed_experts.{int(index) + 2 * rank}.{rest}"]), (kind, name)
        monkeypatch.delenv("RANK")


@pytest.mark.parametrize("kind", ["swiglu", "sequential"])
def test_layers_differ_and_given_weights_can_stay(kind: str) -> None:
    torch.manual_seed(0)
    template = expert(kind)
    first, second, kept = (
        ds_remoe.MoE(D, template, num_experts=E, expert_init=init).deepspeed_moe.experts.state_dict()
        for init in ("redraw", "redraw", "copy")
    )
    assert not any(torch.equal(first[name], second[name]) for name in first if name.endswith("weight"))
    for name, given in template.state_dict().items():
        for i in range(E):
            assert torch.equal(kept[f"deepspeed_experts.{i}.{name}"], given)


@pytest.mark.parametrize("change", ["bias", "frozen", "hook", "backward hook", "forward"])
def test_what_was_changed_in_a_swiglu_stays(change: str) -> None:
    template = SwiGLU(D, 6)
    called: list[nn.Module] = []
    if change == "bias":
        template.down_proj = nn.Linear(6, D)
    elif change == "frozen":
        template.down_proj.requires_grad_(False)
    elif change == "forward":
        template.forward = torch.tanh
    elif change == "backward hook":
        template.gate_proj.register_full_backward_hook(lambda module, into, out: called.append(module))
    else:
        template.register_forward_hook(lambda module, args, output: 3 * output)
    layer = ds_remoe.MoE(D, template, num_experts=2, expert_init="copy").eval()
    x = torch.randn(5, D)
    weights = torch.relu(x @ layer.deepspeed_moe.gate.wg.weight.t()).sum(dim=1, keepdim=True)
    output = layer(x)[0]
    torch.testing.assert_close(output, weights * template(x))
    output.sum().backward()
    assert len(called) == (2 if change == "backward hook" else 0)
    trained = {p.requires_grad for p in layer.deepspeed_moe.experts.parameters()}
    assert trained == ({True, False} if change == "frozen" else {True})


def test_experts_that_nothing_draws_anew_are_told() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(D))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    with pytest.warns(UserWarning, match="nothing draws scale anew"):
        ds_remoe.MoE(D, Raw(), num_experts=2)


def test_building_a_layer_moves_the_global_random_state_by_what_it_draws_itself() -> None:
    """Experts have streams of their own, so what follows does not depend on their number on this rank."""
    following = []
    for ep_size in (1, 2):
        torch.manual_seed(0)
        ds_remoe.MoE(D, expert("swiglu"), num_experts=E, ep_size=ep_size)
        following.append(torch.rand(3))
    assert torch.equal(*following)


@pytest.mark.parametrize("kind", ["swiglu", "sequential"])
@pytest.mark.parametrize("router", ["relu", "topk"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite_comes_out_as_such(kind: str, router: Any, bad: float) -> None:
    """Whatever the signs of its logits; no other token is touched."""
    torch.manual_seed(0)
    layer = ds_remoe.MoE(D, expert(kind), num_experts=E, router=router).eval()
    x = torch.randn(3, D)
    x[:, 0] = torch.tensor([0.0, bad, 0.0])
    for sign in (1.0, -1.0):
        with torch.no_grad():
            layer.deepspeed_moe.gate.wg.weight[:, 0] = sign
        output, _, _ = layer(x)
        assert not output[1].isfinite().any()
        torch.testing.assert_close(output[::2], layer(x[::2])[0])


def test_autocast_and_mixed_dtypes() -> None:
    layer = ds_remoe.MoE(D, expert("swiglu"), num_experts=E).eval()
    x = torch.randn(5, D)
    expected, _, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _, _ = layer(x)
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.01)
    with pytest.raises(TypeError, match=r"hidden_states are torch\.bfloat16, but the experts torch\.float32"):
        layer(x.bfloat16())


def test_clipping_measures_what_fp32_squares_cannot() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3e25, 0.0]), torch.tensor([0.0, 4e25, 0.0])
    norm = clip_gradients(parameters, max_norm=1.0)
    assert float(norm) == pytest.approx(5e25, rel=1e-6)
    assert float(torch.cat([p.grad for p in parameters]).norm()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"expert_init": "zero"}, "expert_init = 'zero': must be 'redraw' or 'copy'"),
        ({"expert_init": "copy", "expert": SwiGLU(D, 4).to("meta")}, "expert_init = 'copy': the expert is on the meta"),
        ({"ep_size": 3}, "ep_size = 3: must divide num_experts = 4"),
        ({"k": 5}, "k = 5: must be between 1 and num_experts = 4"),
        ({"router": "hash"}, "router = 'hash': must be 'relu' or 'topk'"),
        ({"enable_expert_tensor_parallelism": True}, "enable_expert_tensor_parallelism = True: not supported"),
        ({"expert": SwiGLU(D + 1, 4)}, "its width is 9, but hidden_size = 8"),
        ({"ep_size": 0}, "ep_size = 0: must be at least 1"),
        ({"hidden_size": -8}, "hidden_size = -8: must be at least 1"),
        ({"router": "topk", "aux_loss_coefficient": -1.0}, "aux_loss_coefficient = -1: must be at least 0 and finite"),
    ],
)
def test_wrong_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    arguments = {"hidden_size": D, "expert": expert("swiglu"), "num_experts": E, **kwargs}
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ds_remoe.MoE(**arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 1.5}, "k = 1.5: must be a whole number, not float"),
        ({"num_experts": "4"}, "num_experts = '4': must be a whole number, not str"),
        ({"ep_size": 2.0}, "ep_size = 2.0: must be a whole number, not float"),
        ({"hidden_size": 8.0}, "hidden_size = 8.0: must be a whole number, not float"),
        ({"activation_budget": "1"}, "activation_budget = '1': must be a number, not str"),
        ({"router": "topk", "aux_loss_coefficient": "x"}, "aux_loss_coefficient = 'x': must be a number, not str"),
        ({"hierarchical_all_to_all": "yes"}, "hierarchical_all_to_all = 'yes': must be True or False"),
        ({"expert": SwiGLU}, "must be a module, such as ds_remoe.SwiGLU"),
    ],
)
def test_arguments_of_another_kind_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ds_remoe.MoE(**{"hidden_size": D, "expert": expert("swiglu"), "num_experts": E, **kwargs})


def test_tokens_and_experts_of_another_width_are_refused() -> None:
    layer = ds_remoe.MoE(D, expert("swiglu"), num_experts=E).eval()
    with pytest.raises(ValueError, match="hidden_states have width 9, but hidden_size = 8"):
        layer(torch.ones(2, D + 1))


@pytest.mark.parametrize("width", [(), (1,)])
def test_an_expert_that_returns_another_shape_is_refused(width: tuple[int, ...]) -> None:
    class Mean(nn.Module):
        """A row for all tokens, which would be multiplied by each token's weight, or a number for each token."""

        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=1, keepdim=True) if width else x.mean(dim=0, keepdim=True)

    layer = ds_remoe.MoE(D, Mean(), num_experts=1).eval()
    with pytest.raises(ValueError, match=r"expert: turns \[\d+, 8\] into \[\d+, \d\]; a row of hidden_size must come"):
        layer(torch.randn(30, D))


def test_arguments_without_effect_are_told() -> None:
    with pytest.warns(UserWarning, match=r"capacity_factor=1\.5, use_rts=False has no effect"):
        ds_remoe.MoE(D, expert("swiglu"), num_experts=E, capacity_factor=1.5, use_rts=False, drop_tokens=False)
    with pytest.warns(UserWarning, match=r"aux_loss_coefficient=0\.1 has no effect with router='relu'"):
        ds_remoe.MoE(D, expert("swiglu"), num_experts=E, aux_loss_coefficient=0.1)


def test_a_layer_without_its_group_says_what_to_call() -> None:
    layer = ds_remoe.MoE(D, expert("swiglu"), num_experts=E, ep_size=2).eval()
    with pytest.raises(RuntimeError, match=r"ep_size = 2: .* ds_remoe\.initialize"):
        layer(torch.randn(3, D))
    with pytest.raises(RuntimeError, match=r"ep_size = 2: there is no process group yet; call ds_remoe\.initialize"):
        layer.set_deepspeed_parallelism()


@pytest.mark.parametrize(
    ("remoe", "message"),
    [
        ({"sparsty": {}}, r"remoe\.sparsty = {}: unknown key; did you mean sparsity\?"),
        ({"sparsity": {"alhpa": 1.3}}, r"remoe\.sparsity\.alhpa = 1\.3: unknown key; did you mean alpha\?"),
        ({"moe": {"k": 2}, "sparsity": {}}, r"remoe\.moe = .*: initialize reads remoe\.sparsity alone"),
        ({"model": {}, "train": {"stps": 1}}, r"remoe\.train\.stps = 1: unknown key; did you mean steps\?"),
        ({"sparsity": {"alpha": 0.5}}, r"remoe\.sparsity\.alpha = 0\.5"),
        ({"sparsity": {"lambda": 1.0}}, r"remoe\.sparsity\.lambda"),
        (None, "remoe = null: must be an object"),
        ({"sparsity": {"lambda_init": math.inf}}, r"remoe\.sparsity\.lambda_init = Infinity: must be a finite number"),
    ],
)
def test_initialize_refuses_a_wrong_section(remoe: dict[str, Any] | None, message: str) -> None:
    model = UserModel(ds_remoe.MoE, expert("swiglu"))
    with pytest.raises(ValueError, match=message):
        ds_remoe.initialize(model=model, config={**config(1), "remoe": remoe})


@pytest.mark.parametrize("key", ["remo", "ReMoE"])
def test_initialize_refuses_a_section_of_nearly_its_name(key: str) -> None:
    given = config(1)
    given[key] = given.pop("remoe")
    with pytest.raises(ValueError, match=rf"{key} = .*: unknown key; did you mean remoe\?"):
        ds_remoe.initialize(model=UserModel(ds_remoe.MoE, expert("swiglu")), config=given)


def test_experts_without_parameters_and_on_the_meta_device() -> None:
    ds_remoe.MoE(D, nn.Identity(), num_experts=E)
    weights = ds_remoe.MoE(D, SwiGLU(D, 6), num_experts=E).state_dict()
    with torch.device("meta"):
        empty = ds_remoe.MoE(D, SwiGLU(D, 6), num_experts=E)
    with pytest.raises(RuntimeError, match=r"on the meta device take no weights; call to_empty"):
        empty.load_state_dict(weights, assign=True)
    empty.to_empty(device="cpu").load_state_dict(weights)
    assert all(torch.equal(value, weights[name]) for name, value in empty.state_dict().items())


def test_a_compiled_layer_can_be_pickled() -> None:
    layer = ds_remoe.MoE(D, expert("swiglu"), num_experts=E).eval()
    x = torch.randn(5, D)
    expected = layer(x)[0]
    layer.deepspeed_moe.compile(backend="eager")
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x)[0], expected)
