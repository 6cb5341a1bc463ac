from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_cli.cli import shell_completion as completion
from lora_cli.recipe import recipe_schema


def texts(incomplete: str) -> list[str]:
    return [text for text, _ in completion.offer_overrides(incomplete)]


def keys_of(schema: dict[str, Any], section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a schema; those of sections end with a dot."""
    for name, field in section["properties"].items():
        inside = [schema["$defs"][name] for name in references(field)]
        inside = [item for item in inside if "properties" in item]
        if inside:
            yield f"{prefix}{name}."
            for item in inside:
                yield from keys_of(schema, item, f"{prefix}{name}.")
        if not inside or any(part.get("type") == "string" for part in parts(field)):
            yield f"{prefix}{name}="


def parts(field: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the types that a field may have."""
    inside = [part for key in ("anyOf", "oneOf") for part in field.get(key, [])]
    return [field, *(deep for part in inside for deep in parts(part))]


def references(field: dict[str, Any]) -> list[str]:
    return [part["$ref"].rpartition("/")[2] for part in parts(field) if "$ref" in part]


@pytest.mark.slow
def test_completion_offers_the_keys_of_the_schema() -> None:
    schema = recipe_schema()
    wanted = set(keys_of(schema, schema))
    found: set[str] = set()
    todo = [""]
    while todo:
        for text in texts(todo.pop()):
            if text not in found and text.endswith((".", "=")):
                found.add(text)
                todo += [text] if text.endswith(".") else []
    assert found == wanted
    assert len(found) > 100


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("trai", ["train.epochs=", "train.optimizer."]),  # the only one: its keys at once
        ("train.prec", ["train.precision=", "train.precision=fp32"]),
        ("train.precision=f", ["train.precision=fp32", "train.precision=fp16"]),
        ("train.max_grad", ["train.max_grad_norm=", "train.max_grad_norm=1.0"]),
        ("train.packing=", ["train.packing=true", "train.packing=false"]),
        ("task.type=", ["task.type=sequence_classification", "task.type=causal_lm"]),
        ("data.validation.fr", ["data.validation.from=", "data.validation.fraction="]),
        ("adapter.from", ["adapter.from=", "adapter.from=null"]),
        ("nonsense", []), ("train.nonsense.x", []), ("train.nonsense=", []), ("train.seed.x", []),
    ],
)  # fmt: skip
def test_completions_of_keys_and_values(typed: str, offered: list[str]) -> None:
    assert [text for text in texts(typed) if text in offered or not offered] == offered


def test_descriptions_are_first_sentences_without_special_characters() -> None:
    descriptions = dict(completion.offer_overrides("adapter."))
    assert descriptions[
        "adapter.rank="
    ] == "Rank of the update: the inner dimension of B A".replace(":", "")
    assert all(set(text).isdisjoint("`'\"[](){}$:*") for text in descriptions.values())


def ask(environment: dict[str, str]) -> str:
    """Return the completions of the command, after checking that it imported no large package."""
    code = (
        "import sys\nfrom lora_cli.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'yaml', 'lora_cli.recipe'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("typed", ["lora train --set train.opt", "lora eval --split v"])
def test_completion_loads_neither_torch_nor_the_recipe(typed: str) -> None:
    answer = ask({"_LORA_COMPLETE": "complete_fish", "_TYPER_COMPLETE_ARGS": typed,
                  "_TYPER_COMPLETE_FISH_ACTION": "get-args"})  # fmt: skip
    assert ("train.optimizer.learning_rate=" in answer) or ("validation" in answer)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_keys_and_values(tmp_path: Path) -> None:
    command = tmp_path / "lora"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m lora_cli "$@"\n')
    command.chmod(0o755)
    # bash makes three words of `a=b`
    lines = [
        ["lora", "eval", "--split", ""],
        ["lora", "train", "r.yaml", "--set", "train.prec"],
        ["lora", "train", "r.yaml", "--set", "train.precision", "="],
        ["lora", "train", "r.yaml", "--set", "model.name", "=", "x", "--set", "train.precision",
         "=", "f"],
    ]  # fmt: skip
    script = 'eval "$(env _LORA_COMPLETE=source_bash "$0")"\n' + "".join(
        f"COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}\n"
        '_lora_completion "$0"; echo "${COMPREPLY[*]}"\n'
        for words in lines
    )
    done = subprocess.run(
        ["bash", "-c", script, str(command)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "train validation test",
        "train.precision= train.precision=fp32 train.precision=fp16 train.precision=bf16",
        "fp32 fp16 bf16",
        "fp32 fp16",
    ]
