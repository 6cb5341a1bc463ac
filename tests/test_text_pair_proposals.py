"""What `lora init` makes of tables for encoder-decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_translators as translators

from lora_cli.errors import LoraError
from lora_cli.preprocessing.check_recipe import check_recipe
from lora_cli.recipe import load_recipe
from lora_cli.recipe_draft import draft_recipe, write_recipe

Json = dict[str, Any]


def lines(n: int, start: int = 0) -> list[str]:
    return [f"{tiny.CORPUS[(i + start) % 8]} and number {i}" for i in range(n)]


def table(folder: Path, *columns: str, several: bool = False) -> Path:
    """Write 40 rows of two texts; the second is a list of two if there are several."""
    one, two = lines(40), lines(40, 3)
    targets = [[text, text[::-1]] for text in two] if several else two
    rows = [dict(zip(columns, pair, strict=True)) for pair in zip(one, targets, strict=True)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def drafted(folder: Path, kind: str, source: Path, **options: Any) -> Json:
    """Return the task that is drafted, without its lengths, once the recipe has been checked."""
    base = translators.save(folder / "base", kind)
    target = folder / "recipe.yaml"
    draft = draft_recipe(source, str(base), target, **options)
    write_recipe(target, draft.text(), draft.extra_files)
    check_recipe(load_recipe(target))
    written = load_recipe(target).task
    assert {"max_source_length", "max_target_length"} <= written.model_fields_set
    return written.model_dump(exclude_defaults=True, exclude={"type", *written.length_keys})


PAIR = {"source_column": "en", "target_column": "de"}


@pytest.mark.parametrize(
    ("kind", "columns", "expected"),
    [
        ("marian", ("en", "de"), PAIR),
        ("marian", ("alpha", "beta"), {"source_column": "alpha", "target_column": "beta"}),
        ("marian", ("reply", "request"), {"source_column": "request", "target_column": "reply"}),
        ("t5", ("en", "de"), {**PAIR, "prefix": "translate English to German: "}),
        ("t5", ("dialogue", "summary"), {"source_column": "dialogue", "target_column": "summary",
                                         "prefix": "summarize: "}),
        ("nllb", ("German", "English"), {
            "source_column": "German", "target_column": "English",
            "source_language": "deu_Latn", "target_language": "eng_Latn"}),
        ("mbart", ("en", "de"), {
            **PAIR, "source_language": "en_XX", "target_language": "de_DE"}),
    ],
)  # fmt: skip
@pytest.mark.slow_after(2)
def test_two_texts_are_a_source_and_a_target(
    kind: str, columns: tuple[str, str], expected: Json, tmp_path: Path
) -> None:
    found = drafted(tmp_path, kind, table(tmp_path, *columns))
    defaults = {"source_column": "source", "target_column": "target"}
    assert {**defaults, **found} == {**defaults, **expected}


def test_the_user_may_name_the_other_way(tmp_path: Path) -> None:
    found = drafted(tmp_path, "marian", table(tmp_path, "en", "de"), text="de", label="en")
    assert found == {"source_column": "de", "target_column": "en"}


def test_lists_of_texts_are_several_references(tmp_path: Path) -> None:
    found = drafted(tmp_path, "marian", table(tmp_path, "source", "references", several=True))
    assert found == {"target_column": "references"}


def test_two_files_belong_together_line_by_line(tmp_path: Path) -> None:
    for name, texts in (("en", lines(40)), ("de", lines(40, 3))):
        (tmp_path / f"train.{name}").write_text("\n".join(texts) + "\n", encoding="utf-8")
    found = drafted(tmp_path, "marian", tmp_path / "train.en", second=tmp_path / "train.de")
    assert found == PAIR


def test_the_prefix_counts_in_the_length(tmp_path: Path) -> None:
    folders = tmp_path / "en", tmp_path / "xy"
    lengths = []
    for folder, columns in zip(folders, (("en", "de"), ("xx", "yy")), strict=True):
        folder.mkdir()
        drafted(folder, "t5", table(folder, *columns))
        lengths.append(load_recipe(folder / "recipe.yaml").task.max_source_length)
    assert lengths[0] > lengths[1]


def test_one_text_is_nothing_to_translate(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("\n".join(lines(40)) + "\n", encoding="utf-8")
    with pytest.raises(LoraError, match="the model generates one text from another"):
        drafted(tmp_path, "t5", tmp_path / "rows.txt")


def test_a_label_next_to_a_text_is_a_label_all_the_same(tmp_path: Path) -> None:
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(lines(40))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = translators.save(tmp_path / "base", "t5")
    draft = draft_recipe(path, str(base), tmp_path / "recipe.yaml")
    assert draft.values["task"]["type"] == "sequence_classification"


def test_a_language_model_learns_two_texts_as_before(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base")
    draft = draft_recipe(table(tmp_path, "source", "target"), str(base), tmp_path / "recipe.yaml")
    assert draft.values["task"]["type"] == "causal_lm"
