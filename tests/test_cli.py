"""`ds-remoe`: exit codes, what goes to which stream, and that the light commands stay light."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import jsonschema
import pytest

import ds_remoe
from ds_remoe.cli import build_parser, main
from ds_remoe.commands import bench_comm, bench_layer
from ds_remoe.commands.arguments import idle_override
from ds_remoe.commands.output import output_problem

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "ds_configs" / "quickstart.json")
NOBODY = 65534
REMOE_182M = str(ROOT / "ds_configs" / "remoe_182m.json")


def test_check_shows_what_a_run_amounts_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", REMOE_182M, "--world-size", "8", "--accelerator", "cuda"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"{REMOE_182M}: ok\n")
    # 777M is the total of the paper's table; 60k steps of 512 sequences of 1024 tokens.
    for cell in ("777,087,744", "8, 1 active", "0.8750", "512 = 32 x 2 x 8 ranks", "524,288", "31,457,280,000"):
        assert cell in output


def test_check_without_a_world_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", QUICKSTART, "--set", "remoe.moe.ep_size=4"]) == 0
    assert "give --world-size" in capsys.readouterr().out


def test_check_of_a_dense_model_shows_no_experts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(ROOT / "ds_configs" / "dense_182m.json")]) == 0
    output = capsys.readouterr().out
    assert "dense" in output
    assert "experts" not in output
    assert "sparsity" not in output


def test_check_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--set", "remoe.moe.k=9", "--set", "optimiser=1", "--world-size", "3"]
    assert main(["config", "check", QUICKSTART, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"{QUICKSTART}: 3 problems in the configuration\n")


def test_check_refuses_a_tokenizer_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    tokenizer = json.dumps({"type": "huggingface", "path": str(path)})
    assert main(["config", "check", QUICKSTART, "--set", f"remoe.data.tokenizer={tokenizer}"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f'remoe.data.tokenizer.path = "{path}"' in captured.err


@pytest.mark.parametrize("arguments", [[], ["config"], ["config", "chek", "x"], ["config", "check"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: ds-remoe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["config", "check", QUICKSTART, "--worldsize", "2"], "--worldsize: did you mean --world-size?"),
        (["bench", "layer", "--repeat=3", "--thred=2"], "--thred: did you mean --threads?"),
        (["bench", "step", "file.json", "--settel", "3"], "--settel: did you mean --settle?"),
        (["plan", QUICKSTART, "other.json"], "unrecognized argument other.json: quote it, or leave it out"),
    ],
)
def test_an_unknown_option_is_refused_by_its_command(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: ds-remoe {arguments[0]}")
    assert words in error


def test_world_size_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["config", "check", QUICKSTART, "--world-size", "0"])
    assert caught.value.code == 2
    assert "0 is not positive" in capsys.readouterr().err


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)


def test_data_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = [path.read_text() for path in sorted((ROOT / "ds_remoe").rglob("*.py"))]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text))
    source = json.dumps({"type": "jsonl", "paths": [str(corpus)]})
    overrides = [
        f"remoe.data.source={source}",
        "remoe.data.tokenizer.vocab_size=512",
        "remoe.data.valid_fraction=0.2",
        f"remoe.data.cache_dir={tmp_path}/cache",
    ]
    arguments = ["data", "prepare", QUICKSTART, *(text for override in overrides for text in ("--set", override))]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "train" in output
    assert "valid" in output
    assert list((tmp_path / "cache").iterdir())


def test_data_prepare_fails_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"body": "no column of the name text"}\n')
    source = json.dumps({"type": "jsonl", "paths": [str(corpus)]})
    arguments = ["--set", f"remoe.data.source={source}", "--set", f"remoe.data.cache_dir={tmp_path}/cache"]
    assert main(["data", "prepare", QUICKSTART, *arguments]) == 2
    assert "set remoe.data.source.text_column" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["layer", "comm", "kernels", "memory", "step", "quality", "record"])
def test_an_output_that_cannot_be_written_is_refused_before_the_measurement(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    file = [] if command in ("layer", "comm", "kernels") else [QUICKSTART]
    file += ["--steps", "1"] if command == "record" else []
    for name, words in (
        (tmp_path / "file", "exists"),
        (tmp_path / "file" / "results.json", "cannot be written"),
        (repr(""), "is a folder"),
        (repr(str(tmp_path)), "is a folder"),
    ):
        assert main(["bench", command, *file, "--output", str(name).strip("'")]) == 2
        assert f"--output {name}: {words}" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_refused_and_an_old_one_may_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.PNG").touch()
    (tmp_path / "folder.png").mkdir()
    for name, words in (
        ("memory.pdf", "must be the name of a .png file"),
        ("folder.png", "is a folder; name a file"),
        ("old.PNG/x/memory.png", f"cannot be written, as {tmp_path}/old.PNG/x is no folder"),
    ):
        assert main(["bench", "memory", QUICKSTART, "--picture", f"{tmp_path}/{name}"]) == 2
        assert words in capsys.readouterr().err
    assert output_problem(str(tmp_path / "new" / "results.json"), str(tmp_path / "old.PNG")) is None
    assert (tmp_path / "new").is_dir()


def test_a_folder_without_rights_is_refused_before_the_measurement() -> None:
    """Asked as another user where this one is root, who has them everywhere."""
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, into which no other user sees
        os.chmod(folder, 0o555)
        questions = (f"{folder}/a.json", None), (f"{folder}/new/a.json", None), (None, f"{folder}/a.png")
        try:
            answers = answers_without_rights(questions)
        finally:
            os.chmod(folder, 0o755)
    lacking = f"cannot be written, for lack of rights in {folder}; choose another place"
    assert answers == [
        f"--output {folder}/a.json: {lacking}",
        f"--output {folder}/new/a.json: cannot be written (Permission denied); choose another place",
        f"--picture {folder}/a.png: {lacking}",
    ]


def answers_without_rights(questions: tuple[tuple[str | None, str | None], ...]) -> list[str | None]:
    """`output_problem` of each, in a process of nobody's if this one is root's."""
    if os.geteuid() != 0:
        return [output_problem(*names) for names in questions]
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.setuid(NOBODY)
            os.write(writing, json.dumps([output_problem(*names) for names in questions]).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as answers:
        said = answers.read()
    assert os.waitpid(child, 0)[1] == 0
    found: list[str | None] = json.loads(said)
    return found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["layer", "--widths", "182M", "--hidden-size", "64"], "--hidden-size 64: --widths gives both widths"),
        (["layer", "--widths", "182M", "--ffn-hidden-size", "64"], "--ffn-hidden-size 64: --widths gives both"),
        (["layer", "--trace-records", "2"], "--trace-records 2: there is no trace; add --trace FILE"),
        (["layer", "--trace", "x.npz", "--tokens", "64"], "--tokens 64: a trace brings its own"),
        (["comm", "--trace", "x.npz", "--tokens", "64"], "--tokens 64: a trace brings its own"),
        (["memory", QUICKSTART, "--kinds", "layer", "--vocab-size", "9"], "--vocab-size 9: a layer has no vocabulary"),
        (["step", QUICKSTART, "--set", 'remoe.moe.router="topk"'], "--set remoe.moe.router: all routers are measured"),
        (
            ["record", QUICKSTART, "--steps=1", "--output=x.npz", "--set", "remoe.train.output_dir=y"],
            "--set remoe.train",
        ),
        (["quality", QUICKSTART, "--set", "remoe.train.seed=1"], "--set remoe.train.seed: --seeds sets it"),
        (["quality", QUICKSTART, "--seeds", "0", "1", "0"], "--seeds 0: stands there twice"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["comm", "--workloads"], "argument --workloads: expected at least one argument"),
        (["kernels", "--seed", "9" * 23], f"argument --seed: {'9' * 23}: must be between 0 and 2147483647"),
        (["layer", "--seed", "-1"], "argument --seed: -1: must be between 0 and 2147483647"),
        (["quality", QUICKSTART, "--seeds", "0", "2147483648"], "argument --seeds: 2147483648: must be between"),
    ],
)
def test_an_option_whose_value_fits_nothing_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("size", ["500", "0GB", "abc", "5 GB"])
def test_a_shard_size_without_number_or_unit_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["checkpoint", "export", "--max-shard-size", size, "runs/none"])
    assert caught.value.code == 2
    assert f"argument --max-shard-size: {size}: must be a positive size with its unit" in capsys.readouterr().err


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ds_remoe.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)


def test_exit_codes_of_the_process() -> None:
    good = run_command("config", "check", QUICKSTART, "--world-size", "2")
    assert (good.returncode, good.stderr) == (0, "")
    bad = run_command("config", "check", QUICKSTART, "--world-size", "3")
    assert bad.returncode == 2
    assert "remoe.moe.ep_size = 2: must divide the world size 3" in bad.stderr
    assert "Traceback" not in bad.stderr
    version = run_command("--version")
    assert (version.returncode, version.stdout) == (0, f"ds-remoe {ds_remoe.__version__}\n")


def test_check_imports_neither_torch_nor_deepspeed() -> None:
    code = f"""
import sys
from ds_remoe.cli import build_parser, main
from ds_remoe.commands import bench_comm, bench_layer
from ds_remoe.commands.arguments import idle_override
code = main(["config", "check", {QUICKSTART!r}, "--world-size", "2"])
sys.exit(code or bool({{"torch", "deepspeed", "datasets", "matplotlib"}} & set(sys.modules)))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_every_recorded_command_can_be_given_again() -> None:
    results = Path(ds_remoe.__file__).parent / "bench" / "results"
    commands = {json.loads(file.read_text())["command"] for file in results.glob("*.json")}
    recorded = [shlex.split(command)[1:] for command in commands if command.startswith("ds-remoe ")]
    assert len(recorded) > 20
    for words in recorded:
        arguments = build_parser().parse_args(words)
        for module in (bench_comm, bench_layer):
            if arguments.run.__module__ == module.__name__:
                assert module._usage_problem(arguments) is None, words
        module = sys.modules[arguments.run.__module__]
        if hasattr(module, "SET_BY"):
            assert idle_override(arguments.overrides, module.SET_BY) is None, words
