"""Invalid recipes of all kinds are rejected with a place, in bounded time, without running code.

`scripts/fuzz` does the same with 10,000 cases.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing import ATTACKS, CONFIGS, ROOT, Case, bounded, cases, load_or_reject, no_code_runs
from hypothesis import HealthCheck, given, settings

from lora_cli.errors import LoraError
from lora_cli.recipe import load_recipe
from lora_cli.recipe.load import MAX_BYTES

GOOD = CONFIGS["demo.yaml"]
BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
HEAVY = {
    "brackets": "[" * MAX_BYTES,
    "braces": "{a: " * (MAX_BYTES // 4),
    "items": "- " * (MAX_BYTES // 2),
    "questions": "? " * (MAX_BYTES // 2),
    "anchors": "".join(f"- &a{i} x\n" for i in range(MAX_BYTES // 12)),
    "aliases": "a: &a x\nb: [" + "*a, " * (MAX_BYTES // 5) + "]\n",
    "bomb": "a0: &a0 [x, x, x]\n" + BOMB,
    "itself": "model: &m {name: *m}\n" + GOOD,
    "colons": "a" + ":" * (MAX_BYTES - 2),
    "commas": "[" + "," * (MAX_BYTES - 2),
    "spaces": " " * MAX_BYTES,
    "lines": "\n" * MAX_BYTES,
    "quotes": "'" * MAX_BYTES,
    "one word": "a" * MAX_BYTES,
    "one number": "model: " + "9" * (MAX_BYTES - 8),
    "unknown keys": GOOD + "".join(f"k{i}: 1\n" for i in range(4000)),
    "wrong items": GOOD + "checkpoint: {every_steps: [" + "x, " * 4000 + "]}\n",
}


@given(case=cases)
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@pytest.mark.slow
def test_any_recipe_is_loaded_or_rejected_with_a_hint(
    case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    load_or_reject(case, tmp_path_factory.getbasetemp() / "recipe.yaml")


@pytest.mark.parametrize("name", HEAVY)
@pytest.mark.slow_after(1)
def test_an_oversized_recipe_is_rejected_in_bounded_time_and_memory(
    name: str, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(HEAVY[name][:MAX_BYTES])
    with no_code_runs(), bounded(), pytest.raises(LoraError) as caught:
        load_recipe(file)
    assert str(file) in str(caught.value.problems[0].at)
    assert len(str(caught.value)) < 100_000


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("where", ["file", "flag"])
def test_no_yaml_tag_runs_code(attack: str, where: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    inside = where == "file"
    file.write_text(GOOD.replace("rank: 8", f"rank: {attack}") if inside else GOOD)
    with no_code_runs(), pytest.raises(LoraError) as caught:
        load_recipe(file, [] if inside else [f"adapter.rank={attack}"])
    problem = caught.value.problems[0]
    assert (f"{file}:14" if inside else f"--set adapter.rank={attack}") in str(problem.at)
    assert problem.hint


def test_the_check_detects_code_that_runs() -> None:
    with pytest.raises(AssertionError, match=r"os\.system"), no_code_runs():
        exec("import os; os.system('true')")
    with pytest.raises(MemoryError), bounded():
        bytearray(2**30)


@pytest.mark.slow
def test_the_script_counts_the_results_of_its_cases() -> None:
    command = [sys.executable, str(ROOT / "tests" / "faults" / "fuzzing.py"), "20", "3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert "20  cases in" in result.stdout.splitlines()[-1]
