"""`scripts/speed.py`: what it makes of a log, and that the sides train the same rows."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import speed  # noqa: E402 - found by the line above
from speed_rows import ROWS, SHAPES, Row  # noqa: E402

ROW = Row("llama-tiny", 2, 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of eight steps, at 50 tokens a second and later at 100, 200 and 300."""
    order = {"examples": [[2 * i, 2 * i + 1] for i in range(8)], "tokens": [16] * 8}
    (tmp_path / "order.json").write_text(json.dumps(order))
    out = tmp_path / "out"
    out.mkdir()
    rates = {1: 50.0, 2: 50.0, 4: 100.0, 6: 200.0, 8: 300.0}
    lines = [
        {"step": step, "loss": step / 10, "tokens_per_s": rate, "examples_per_s": rate / 8}
        for step, rate in rates.items()
    ]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [{"step": i + 1, "examples": step} for i, step in enumerate(order["examples"])]
    (out / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    report = {"training": {"peak_memory_bytes": 3 * 2**30}}
    (out / "report.json").write_text(json.dumps(report))
    return tmp_path


SECONDS = {1: 5.0, 2: 5.5, 4: 6.0, 6: 6.5, 8: 7.0}


def test_figures_leave_out_the_first_steps(folder: Path) -> None:
    found = speed.figures(ROW, folder, folder / "out", SECONDS, check_order=True)
    assert (found.rate, found.peak_gib, found.first_s, found.last_s) == (200, 3, 5, 7)
    assert found.loss == pytest.approx(0.7)  # of the steps 6 and 8
    assert found.seconds_per_step == pytest.approx(16 / 200)
    line = speed.table_line("name", ROW, "ours", [found], steps=8)
    assert line == (
        "| `name`: 2 x 8 tokens | `lora train` | 200 tokens/s | 3.0 GiB | 5.0 s | 7.0 s (8) "
        f"| ≈ {7 + 292 * 16 / 200:.0f} s | 0.7000 |"
    )


def test_slow_examples_are_logged_with_few_digits(folder: Path) -> None:
    log = folder / "out" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    slow = [line | {"tokens_per_s": 2.7, "examples_per_s": 0.34} for line in lines]  # of 0.3375
    log.write_text("".join(json.dumps(line) + "\n" for line in slow))
    found = speed.figures(ROW, folder, folder / "out", SECONDS, check_order=True)
    assert found.rate == 2.7
    slow = [line | {"tokens_per_s": 2.7, "examples_per_s": 0.36} for line in lines]
    log.write_text("".join(json.dumps(line) + "\n" for line in slow))
    with pytest.raises(ValueError, match="tokens an example"):
        speed.figures(ROW, folder, folder / "out", SECONDS, check_order=True)


def test_another_order_or_other_tokens_are_a_failure(folder: Path) -> None:
    out, order = folder / "out", json.loads((folder / "order.json").read_text())
    order["examples"].reverse()
    (folder / "order.json").write_text(json.dumps(order))
    with pytest.raises(ValueError, match="planned order"):
        speed.figures(ROW, folder, out, SECONDS, check_order=True)
    order["tokens"][5] = 12
    (folder / "order.json").write_text(json.dumps(order))
    with pytest.raises(ValueError, match=r"8\.0 tokens an example, but 7\.0 planned"):
        speed.figures(ROW, folder, out, SECONDS, check_order=False)


@pytest.mark.parametrize(
    ("lines", "failure"),
    [
        (["step 1", "torch.OutOfMemoryError: CUDA out of memory. Tried"], "out of memory"),
        (["error: the GPU's memory is full while training", "hint: x"], "out of memory"),
        (["error: `x` is wrong", "hint: mend | it"], "failed: error: `x` is wrong"),
        (["Traceback", "ValueError: a | b"], "failed: ValueError: a / b"),
    ],
)
def test_a_failure_is_reported_in_one_line(lines: list[str], failure: str) -> None:
    assert speed.failure_in(lines) == failure
    measured = speed.Measured(failure=failure)
    line = speed.table_line("name", ROW, "peft", [measured], steps=8)
    assert line == f"| `name`: 2 x 8 tokens | PEFT + Trainer | {failure} | | | | | |"
    assert line.count("|") == speed.HEAD.splitlines()[0].count("|")


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    code = (
        "import sys, time; print('step 1/9  loss 1', file=sys.stderr, flush=True); time.sleep(60)"
    )
    seconds, failure = speed.run([sys.executable, "-c", code], tmp_path, "ours", None, limit=2)
    assert list(seconds) == [1]
    assert failure == "stopped after 2 s"


def test_the_table_has_every_row_of_the_comparison() -> None:
    assert all(row.shape in SHAPES and row.tiny().shape in SHAPES for row in ROWS.values())
    contexts = [row for name, row in ROWS.items() if name.endswith("k") and row.batch > 0]
    per_step = [row.batch * row.length for row in contexts if row.quantization is None]
    assert per_step.count(32768) == 6  # from 1k to 32k
    assert ROWS["llama-8b-fp8"].sides == ["ours", "auto"]
    assert ROWS["roberta-base"].sides == ["ours", "peft"]
    assert "unsloth" in ROWS["llama-8b-nf4"].sides


@pytest.mark.slow
def test_a_side_that_fails_is_reported_with_its_last_error(tmp_path: Path) -> None:
    (tmp_path / "order.json").write_text("{}")
    args = Namespace(warm=True, cap=0.0, limit=100.0)
    found = speed.measure("ours", ROW, tmp_path, args, cold=True)
    assert found.failure == "failed: error: cannot read the recipe: there is no such file"
    found = speed.measure("peft", ROW, tmp_path, args, cold=True)
    assert found.failure.startswith("failed: FileNotFoundError: ")
    assert "recipe.json" in (tmp_path / "peft.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-8b-checkpointing", "roberta-large-2x32-fp16"])
def test_sides_train_the_same_rows(name: str, tmp_path: Path) -> None:
    """With tiny models on a CPU, each in a process of its own."""
    table = tmp_path / "table.md"
    table.write_text("# Speed\n")
    command = [sys.executable, str(SCRIPTS / "bench.py"), "speed", name, "--tiny", "--steps", "4"]
    command += ["--sides", "ours,peft", "--work", str(tmp_path), "--table", str(table)]
    subprocess.run(command, check=True, capture_output=True)
    lines = table.read_text().splitlines()
    assert lines[0] == "# Speed"
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    assert [row[1] for row in rows] == ["`lora train`", "PEFT + Trainer"]
    ours, peft = (float(row[7]) for row in rows)
    # a new adapter changes nothing at first; only the new head of a classifier differs
    assert ours == pytest.approx(peft, abs=0.002 if "llama" in name else 0.3)
