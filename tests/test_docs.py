"""The reference pages are those that the code writes, and links in the docs lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import tiny
import tiny_experts
import yaml

from lora_cli.recipe import load_recipe

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.usefixtures("fresh_commands")
@pytest.mark.parametrize("name", ["recipe.md", "commands.md", "what_is_tested.md"])
def test_a_written_page_is_up_to_date(name: str) -> None:
    import docs

    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == docs.PAGES[name](), "run `python scripts/docs.py`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_recipe_keys_named_in_the_docs_exist(page: Path) -> None:
    from lora_cli.recipe.schema_errors import _all_keys

    keys = set(_all_keys())
    sections = "model|task|data|adapter|train|evaluate|checkpoint"
    for key in re.findall(rf"`((?:{sections})\.[a-z_.]+)[`:]", page.read_text(encoding="utf-8")):
        assert key in keys, key


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_docs_can_be_typed(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.main import get_command

    from lora_cli.adapters import find_adapter
    from lora_cli.cli.app import app
    from lora_cli.recipe.schema_errors import _all_keys

    # their adapters are not there, nor is the Hub to be asked for them
    monkeypatch.setattr(find_adapter, "find_adapter_folder", lambda name, at: Path(name))
    keys, commands = set(_all_keys()), get_command(app).commands
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    for words in filter(None, (shlex.split(line, comments=True) for line in lines)):
        if words[0].rpartition("/")[2] == "lora":
            context = commands[words[1]].make_context(words[1], words[2:])
            for override in context.params.get("overrides") or ():
                assert override.partition("=")[0] in keys, override


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_recipes_in_the_docs_are_right(page: Path, tmp_path: Path) -> None:
    whole = {
        "model": {"name": "org/base"},
        "task": {"type": "sequence_classification"},
        "data": {"path": "rows.csv", "validation": {"fraction": 0.1}},
    }
    inline = re.findall(r"`(\w+\.\w+: \{[^`]*\})`", page.read_text(encoding="utf-8"))
    parts = [yaml.safe_load(block) for block in blocks(page, "yaml")]
    for text in inline:  # `data.validation: {fraction: 0.1}`
        ((key, value),) = yaml.safe_load(text).items()
        section, _, name = key.partition(".")
        parts.append({section: {**whole.get(section, {}), name: value}})
    for i, part in enumerate(parts):
        file = tmp_path / f"{i}.yaml"
        file.write_text(yaml.safe_dump(whole | part), encoding="utf-8")
        load_recipe(file)


ROWS = 40
BASES = {
    "Qwen/Qwen3-30B-A3B": lambda folder: tiny_experts.save(folder, "qwen3_moe"),
    "HuggingFaceTB/SmolLM2-135M": tiny.save_llama,
}


@pytest.mark.parametrize("part", ["Experts", "New tokens"])
@pytest.mark.slow_after(1)
def test_commands_of_a_part_run_as_written(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of small bases instead of those that are named, and for two steps."""
    from typer.testing import CliRunner

    from lora_cli.cli.app import app

    monkeypatch.chdir(tmp_path)
    words = [["a", "warm", "dull", "slow", "great"][i % 5] for i in range(ROWS)]
    rows = [
        {"prompt": f"{i} {w} ?", "completion": f"<|tool|> {w} {i}"} for i, w in enumerate(words)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "answers.jsonl").write_text(lines, encoding="utf-8")
    page = (ROOT / "docs" / "train_a_language_model.md").read_text(encoding="utf-8")
    text = page.split(f"**{part}.**")[1].split("```bash\n")[1].split("```")[0]
    for name, save in BASES.items():
        if name in text:
            save(tmp_path / "base")
            text = text.replace(name, "./base")
    commands = text.replace("\\\n", " ").splitlines()
    assert {"init", "train", "merge"} <= {shlex.split(command)[1] for command in commands}
    for command in commands:
        arguments = shlex.split(command)[1:]
        if arguments[0] == "train":
            arguments += ["--set", "train.epochs=null", "--set", "train.max_steps=2"]
            arguments += ["--set", "evaluate.generation.max_new_tokens=2"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (command, result.output, result.exception)
