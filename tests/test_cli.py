"""The command line: its surface, its exit codes, what it imports, and what it prints where.

LORA_UPDATE_GOLDEN=1 writes tests/golden/help_*.txt anew; the commit says why they changed.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.main import get_command
from typer.testing import CliRunner

from lora_cli import __version__
from lora_cli.cli.app import app, main
from lora_cli.errors import LoraError
from lora_cli.recipe import load_recipe, recipe_schema

GOLDEN = Path(__file__).parent / "golden"
COMMANDS = [
    "train",
    "eval",
    "merge",
    "combine",
    "export",
    "push",
    "check",
    "predict",
    "init",
    "params",
    "validate",
    "schema",
]
TERMINAL = {"COLUMNS": "100", "TERM": "dumb", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
GOOD = "model: {name: m}\ntask: {type: sequence_classification}\ndata: {path: rows.csv}\n"
FAULTY = GOOD + "train: {seeed: 1}\n"


def python(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **TERMINAL, "PYTHONPATH": str(GOLDEN.parent.parent)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd, env=environment, text=True, timeout=60, capture_output=True, **options,
    )  # fmt: skip


def lora(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "lora_cli", *arguments, cwd=cwd)


def run(*arguments: str) -> Any:
    """Run a command in this process; a `LoraError` is the result's `exception`."""
    return CliRunner().invoke(app, list(arguments), env=TERMINAL, prog_name="lora")


def in_process(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Run `main` as the shell would, in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["lora", *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as exited:
        main()
    out, err = capsys.readouterr()
    return int(exited.value.code or 0), out, err


# ------------------------------------------------------------------------------------ the surface


@pytest.mark.usefixtures("fresh_commands")
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_help_equals_the_golden_file(command: str) -> None:
    result = run(*filter(None, [command]), "--help")
    assert result.exit_code == 0
    golden = GOLDEN / f"help_{command or 'lora'}.txt"
    if os.environ.get("LORA_UPDATE_GOLDEN"):
        golden.write_text(result.stdout, encoding="utf-8")
    assert result.stdout == golden.read_text(encoding="utf-8")


def test_every_command_has_a_golden_help() -> None:
    assert sorted(get_command(app).commands) == sorted(COMMANDS)  # type: ignore[attr-defined]


def test_the_version() -> None:
    assert run("--version").stdout == f"{__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["trian"], ["train"], ["train", "x.yaml", "--sett", "a=1"], ["eval"], ["schema", "extra"]],
)
def test_wrong_arguments_exit_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------ at once


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom lora_cli.cli.app import main\nsys.argv = ['lora', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'pydantic', 'transformers', 'yaml', 'datasets', 'numpy', 'accelerate'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    result = python("-c", code, cwd=tmp_path)
    assert "train" in result.stdout
    assert result.stderr == "[]\n"


@pytest.mark.parametrize("command", ["schema", "validate", "train", "params"])
@pytest.mark.slow
def test_a_schema_is_checked_without_torch(command: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(FAULTY)
    argument = "" if command == "schema" else "'r.yaml'"
    code = (
        "import sys\nfrom lora_cli.cli.app import main\n"
        f"sys.argv = ['lora', '{command}', {argument}]\n"
        "try:\n    main()\nexcept SystemExit as error:\n    code = error.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'accelerate'}\n"
        "print(code, sorted(heavy & set(sys.modules)))"
    )
    result = python("-c", code, cwd=tmp_path)
    assert result.stdout.splitlines()[-1] == ("0 []" if command == "schema" else "2 []")


def test_a_typing_error_in_a_recipe_is_reported_quickly(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(FAULTY)
    start = seconds_of_children()
    result = lora("train", "r.yaml", cwd=tmp_path)
    answered = seconds_of_children()
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: unknown key `seeed`\n  at train.seeed (r.yaml:4)\nhint: did you mean `seed`?\n"
    )
    python("-c", "import pydantic, typer.main, yaml", cwd=tmp_path)
    # it takes three times what it cannot do without; torch alone would take a dozen times that
    assert answered - start < 6 * (seconds_of_children() - answered)


def seconds_of_children() -> float:
    """Return the processor time of child processes that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# -------------------------------------------------------------------------- errors and streams


@pytest.mark.slow
def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(FAULTY)
    for arguments in (["--debug", "validate", "r.yaml"], ["validate", "r.yaml", "--debug"]):
        result = lora(*arguments, cwd=tmp_path)
        assert result.returncode == 1
        assert "Traceback" in result.stderr
        assert "did you mean `seed`?" in result.stderr


@pytest.mark.slow
def test_a_closed_pipe_ends_a_command_without_a_message(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    environment = {**os.environ, "PYTHONPATH": str(GOLDEN.parent.parent)}
    result = subprocess.run(
        [sys.executable, "-m", "lora_cli", "schema"],
        cwd=tmp_path, env=environment, stdout=write_end, stderr=subprocess.PIPE, text=True,
        timeout=60,
    )  # fmt: skip
    os.close(write_end)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("error", "code", "what"),
    [
        (OSError(28, "No space left on device", "out/x"), 5, "the disk is full\n  at out/x"),
        (MemoryError(), 5, "the memory is full"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 5, "gradient_accumulation_steps"),
        (LoraError("x", "y", "z"), 2, "error: x\n  at y\nhint: z\n"),
    ],
)
def test_errors_that_a_user_can_fix_have_an_exit_code_and_no_traceback(
    error: Exception, code: int, what: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr("lora_cli.cli.options.load", fail)
    exit_code, out, err = in_process(["validate", "r.yaml"], monkeypatch, capsys)
    assert (exit_code, out) == (code, "")
    assert what in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback_of_an_unexpected_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> Any:
        raise PermissionError(13, "no")

    monkeypatch.setattr("lora_cli.cli.options.load", fail)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["lora", "validate", "r.yaml", "--debug"])
    with pytest.raises(PermissionError):
        main()


def test_the_schema_goes_to_stdout() -> None:
    assert json.loads(run("schema").stdout) == recipe_schema()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--adapter", "nowhere"], "there is no folder nowhere"),
        (["predict", "--adapter", "nowhere", "text"], "there is no folder nowhere"),
        (["predict", "--adapter", "."], "give texts, or a file"),
        (["predict", "--adapter", ".", "a", "--input", "b", "--output", "c"], "give texts"),
        (["predict", "--adapter", ".", "--input", "b"], "give texts, or a file"),
        (["eval", "--adapter", "."], "this folder is not an adapter"),
        (["validate", "nowhere.yaml"], "there is no such file"),
    ],
)
def test_missing_files_and_folders_are_reported(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert isinstance(result.exception, LoraError)
    assert message in str(result.exception)
    assert "at " in str(result.exception)


# ---------------------------------------------------------------------------- whole commands


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny.recipe(tiny.save_encoder(tmp_path / "base"), tmp_path)


def test_validate_prints_the_resolved_recipe(recipe: Path, tmp_path: Path) -> None:
    result = run("validate", str(recipe), "--set", "train.seed=5")
    assert result.exception is None
    resolved = tmp_path / "elsewhere.yaml"
    resolved.write_text(result.stdout)
    again = load_recipe(resolved)
    assert again.model_dump() == load_recipe(recipe, ["train.seed=5"]).model_dump()
    assert again.data.path == str(tmp_path / "rows.jsonl")


def problems_of(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    """Return the problems that `lora validate` reports, by key."""
    recipe = tiny.recipe(tiny.save_encoder(tmp_path / "base"), tmp_path, **sections)
    result = run("validate", str(recipe))
    assert isinstance(result.exception, LoraError)
    found = {(p.at or "").split(" ")[0]: p for p in result.exception.problems}
    assert all("recipe.yaml:" in (p.at or "") and p.hint for p in found.values())
    return found


def test_validate_reports_problems_of_data_and_metrics_together(tmp_path: Path) -> None:
    found = problems_of(
        tmp_path, task={"text_column": "sentence"}, evaluate={"metrics": ["f1", "bleu"]}
    )
    assert set(found) == {"task.text_column", "evaluate.metrics"}
    assert "`bleu`" in found["evaluate.metrics"].what


def test_validate_reports_unknown_targets(tmp_path: Path) -> None:
    found = problems_of(tmp_path, adapter={"target_modules": ["query", "valeu"]})
    assert set(found) == {"adapter.target_modules"}
    assert "`valeu`" in found["adapter.target_modules"].what
    assert "value" in found["adapter.target_modules"].hint


def test_validate_reports_problems_of_data_and_targets_together(tmp_path: Path) -> None:
    found = problems_of(
        tmp_path, task={"text_column": "sentence"}, adapter={"target_modules": ["valeu"]}
    )
    assert set(found) == {"task.text_column", "adapter.target_modules"}


def test_validate_reports_targets_even_if_the_labels_are_unknown(tmp_path: Path) -> None:
    found = problems_of(
        tmp_path,
        task={"text_column": "sentence", "labels": None},
        adapter={"target_modules": ["valeu"]},
    )
    assert set(found) == {"task.text_column", "adapter.target_modules"}


def test_validate_reports_unknown_metrics(tmp_path: Path) -> None:
    assert set(problems_of(tmp_path, evaluate={"metrics": ["acuracy"]})) == {"evaluate.metrics"}


def test_train_rejects_a_folder_with_other_files(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    result = run("train", str(recipe), "-o", str(tmp_path / "full"))
    assert isinstance(result.exception, LoraError)
    (problem,) = result.exception.problems
    assert "not empty" in problem.what
    assert "--set output_dir" in (problem.at or "")
    assert "--resume" in (problem.hint or "")
    assert os.listdir(tmp_path / "full") == ["mine.txt"]


def test_params_of_roberta_base_only_needs_its_configuration(tmp_path: Path) -> None:
    base = tmp_path / "roberta-base"
    base.mkdir()
    config = {
        "architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "vocab_size": 50265,
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: {name: roberta-base}\n"
        "task: {type: sequence_classification, labels: [a, b]}\n"
        "data: {path: nowhere.csv}\n"
        "adapter: {rank: 4, target_modules: [query, output.dense]}\n"
    )
    result = run("params", str(recipe))
    assert result.exception is None
    total = "total 124,978,946  trainable 923,906  (0.7392 %)"
    assert result.stdout.splitlines()[-1] == total
    as_json = json.loads(run("params", str(recipe), "--json").stdout)
    assert as_json["total"] == 124_978_946
    assert as_json["trainable"] == sum(p["count"] for p in as_json["parameters"] if p["trainable"])
    assert as_json["trainable_percent"] == 0.7392
    every = run("params", str(recipe), "--all").stdout.splitlines()
    assert len(every) == len(as_json["parameters"]) + 3
    assert every[-1] == total


def test_init_prints_its_findings_and_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save_encoder("base")
    rows = "".join(f"{text} {i};{'nj'[i % 2]}\n" for i, text in enumerate(tiny.CORPUS * 5))
    Path("rows.csv").write_text(f"text;label\n{rows}")
    result = run("init", "rows.csv", "--model", "base")
    assert result.exit_code == 0
    said = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line)
    assert said["delimiter"] == "';': a semicolon gives every row 2 fields"
    assert said["label"] == "`label`, by its name and its 2 values"
    assert said["labels"] == "j, n, 2 labels; 20 rows of each"
    assert said["recipe"] == "recipe.yaml"
    assert said["next"] == "lora train recipe.yaml"
    assert run("validate", "recipe.yaml").exit_code == 0
    assert "exists already" in str(run("init", "rows.csv", "--model", "base").exception)


@pytest.mark.slow
def test_init_inspects_a_file_without_torch(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text;label\na warm film;x\na cold film;y\n")
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from lora_cli.data.detect_format import read_data_file\n"
        "import lora_cli.recipe_draft\n"
        "print(read_data_file(Path('rows.csv')).columns, 'torch' in sys.modules)"
    )
    assert python("-c", code, cwd=tmp_path).stdout == "['text', 'label'] False\n"
