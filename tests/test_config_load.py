"""Reading a run's file: JSON, overrides, what comes back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_remoe.config import ConfigError, ReMoEConfig, load_run, load_run_or_exit
from ds_remoe.config.overrides import OverrideError, apply_overrides
from ds_remoe.config.problems import suggestion

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
QUICKSTART = ROOT / "ds_configs" / "quickstart.json"


def error_of(text: str, tmp_path: Path) -> str:
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_run(path, world_size=1)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_pass_every_check(path: Path) -> None:
    world_size, accelerator = (2, "cpu") if path == QUICKSTART else (8, "cuda")
    run = load_run(path, world_size=world_size, accelerator=accelerator)
    assert run.path == path
    assert run.deepspeed == json.loads(path.read_text())
    assert run.remoe == ReMoEConfig.model_validate(run.deepspeed["remoe"])
    if path != QUICKSTART:
        sizes = run.batch_sizes(world_size)
        assert sizes.global_batch == 512
        assert run.remoe.model.seq_length == 1024
        assert run.remoe.train.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize(
    ("size", "total", "active"), [("182m", 777e6, 182e6), ("469m", 2.58e9, 469e6), ("978m", 5.73e9, 978e6)]
)
def test_shipped_files_have_the_papers_sizes(size: str, total: float, active: float) -> None:
    from ds_remoe.model.flops import num_params

    def parameters(router: str) -> int:
        remoe = load_run(ROOT / "ds_configs" / f"{router}_{size}.json", world_size=8).remoe
        tokenizer = remoe.data.tokenizer
        assert tokenizer.type == "train"
        return num_params(remoe.model, remoe.moe, tokenizer.vocab_size)

    assert parameters("remoe") == pytest.approx(total, rel=2e-3)
    assert parameters("topk") == parameters("remoe")
    # The table rounds 182.5M down.
    assert parameters("dense") == pytest.approx(active, rel=4e-3)


def test_routers_of_one_size_differ_in_nothing_else() -> None:
    for size in ("182m", "469m", "978m"):
        files = [json.loads((ROOT / "ds_configs" / f"{name}_{size}.json").read_text()) for name in ("remoe", "topk")]
        files.append(json.loads((ROOT / "ds_configs" / f"dense_{size}.json").read_text()))
        for file in files:
            del file["remoe"]["moe"], file["remoe"]["train"]["output_dir"]
            file["remoe"].pop("sparsity", None)
        assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_schema_accepts_shipped_files(path: Path) -> None:
    schema = ReMoEConfig.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    section = json.loads(path.read_text())["remoe"]
    validator.validate(section)
    section["moe"]["num_expert"] = 8
    assert not validator.is_valid(section)


def test_schema_describes_every_field_of_the_controller() -> None:
    definitions = ReMoEConfig.model_json_schema()["$defs"]
    assert all(field["description"] for field in definitions["SparsityConfig"]["properties"].values())
    assert "eq. (10)" in definitions["SparsityConfig"]["properties"]["regularizer"]["description"]


def test_syntax_error_names_line_and_column(tmp_path: Path) -> None:
    assert "not JSON at line 3, column 1" in error_of('{\n  "a": 1,\n}', tmp_path)


def test_duplicate_keys(tmp_path: Path) -> None:
    message = error_of('{"optimizer": {"type": "Adam", "type": "AdamW"}}', tmp_path)
    assert 'type = "AdamW": given twice in one object, first as "Adam"; keep one' in message


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_are_finite(number: str, tmp_path: Path) -> None:
    assert f'"{number}": not a finite number' in error_of(f'{{"gradient_clipping": {number}}}', tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"\xef\xbb\xbf" + QUICKSTART.read_bytes())
    assert load_run(path, world_size=2).deepspeed == json.loads(QUICKSTART.read_text())


def test_not_an_object(tmp_path: Path) -> None:
    assert "must hold one object" in error_of("[1, 2]", tmp_path)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_run(tmp_path / "none.json", world_size=1)


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match="not UTF-8 at byte 7"):
        load_run(path, world_size=1)


def test_overrides_reach_both_parts_and_leave_the_rest() -> None:
    run = load_run(
        QUICKSTART,
        [
            "remoe.moe.k=2",
            "zero_optimization.stage=1",
            "train_micro_batch_size_per_gpu=4",
            "remoe.train.output_dir=a=b",
        ],
        world_size=2,
    )
    assert run.remoe.moe.k == run.deepspeed["remoe"]["moe"]["k"] == 2
    assert run.deepspeed["zero_optimization"] == {"stage": 1}
    assert run.batch_sizes(2).global_batch == 8
    assert run.remoe.train.output_dir == "a=b"
    with pytest.raises(ValueError, match="do not fit"):
        load_run(QUICKSTART, ["train_batch_size=16"], world_size=2).batch_sizes(3)


def test_overrides_null_restores_the_default() -> None:
    run = load_run(QUICKSTART, ["remoe.moe.ep_size=null", "scheduler=null"], world_size=2)
    assert run.remoe.moe.ep_size == 1
    assert "scheduler" not in run.deepspeed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("remoe.moe.k", '--set = "remoe.moe.k": write it as PATH=VALUE'),
        ("=3", "write it as PATH=VALUE"),
        ("remoe..k=3", "write it as PATH=VALUE"),
        ("train_micro_batch_size_per_gpu.x=3", "train_micro_batch_size_per_gpu = 8: not an object"),
        ("optimizer.params.betas.0=0.8", "optimizer.params.betas = [0.9, 0.999]: not an object"),
        ("remoe.sparsty=null", "remoe.sparsty: missing; null takes a key out, but the file has none of this name; did"),
        ("remoe.sparsty.alpha=null", "did you mean sparsity?"),
        ("remoe.moe.num_expert=4", "unknown key; did you mean num_experts?"),
        ("zero_optimization.stages=1", "unknown key to DeepSpeed 0.19.8; did you mean stage?"),
        ("gradient_clipping=1e999", 'gradient_clipping = "1e999": not a finite number'),
        ('optimizer={"type": 1, "type": 2}', "optimizer.type = 2: given twice"),
    ],
)
def test_overrides_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(QUICKSTART, [override], world_size=2)
    assert message in str(caught.value)


names = st.text("abc", min_size=1, max_size=3)
values = st.none() | st.booleans() | st.integers() | st.text("xyz ", min_size=1) | st.lists(st.integers(), max_size=2)


@settings(deadline=None)
@given(
    st.recursive(
        st.dictionaries(names, st.integers(), max_size=3),
        lambda inner: st.dictionaries(names, inner, max_size=3),
        max_leaves=4,
    ),
    st.lists(names, min_size=1, max_size=3),
    values.filter(lambda value: value is not None),
)
def test_an_override_sets_its_path_and_nothing_else(config: dict[str, Any], path: list[str], value: Any) -> None:
    before = json.loads(json.dumps(config))
    try:
        changed = apply_overrides(config, [f"{'.'.join(path)}={json.dumps(value)}"])
    except OverrideError as error:
        target: Any = config
        for step in error.problem.field.split("."):
            target = target[step]
        assert not isinstance(target, dict)
        return
    assert config == before
    target = changed
    for step in path:
        target = target[step]
    assert target == value
    removed = apply_overrides(changed, [f"{'.'.join(path)}=null"])
    again = apply_overrides(removed, [f"{'.'.join(path)}={json.dumps(value)}"])
    assert again == changed


def test_suggestions() -> None:
    assert suggestion("Num_Experts", ["num_experts", "k"]) == "did you mean num_experts?"
    assert suggestion("zzz", ["b", "a"]) == "known here: a, b"
    assert suggestion("zzz", []) == "remove it"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_launched_ranks_exit_with_code_2(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 speaks at once; another one waits to be ended by the launcher, and speaks if nobody does."""
    monkeypatch.setenv("RANK", rank)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(SystemExit) as caught:
        load_run_or_exit(QUICKSTART, ["remoe.moe.k=9"], world_size=2)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("remoe.moe.k = 9") == 1
    assert message.startswith("rank 1: ") == bool(waited) == (rank == "1")


def test_the_configuration_needs_no_torch() -> None:
    code = f"""
import sys
from ds_remoe.config import load_run
load_run({str(QUICKSTART)!r}, world_size=2, accelerator="cpu")
sys.exit(bool({{"torch", "deepspeed"}} & set(sys.modules)))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
