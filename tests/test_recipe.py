"""Recipes: YAML 1.2, every problem at once with its line, overrides, paths, and the way back.

LORA_UPDATE_GOLDEN=1 writes tests/golden/recipe_schema.json anew; the commit says why it changed.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli import files
from lora_cli.errors import LoraError, Problem, did_you_mean
from lora_cli.paths import path_problem
from lora_cli.recipe import (
    Recipe,
    SequenceClassificationSpec,
    dump_recipe,
    load_adapter_recipe,
    load_recipe,
    recipe_schema,
)

GOLDEN = Path(__file__).parent / "golden"
LINES = """\
model: {name: base-model}
task: {type: sequence_classification}
data: {path: rows.csv}
"""
CHAT = """\
model: {name: base-model}
task: {type: causal_lm}
data: {path: rows.jsonl}
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(text: str | bytes, *overrides: str) -> Recipe:
        file = tmp_path / "r.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(file, overrides)

    return load


@pytest.fixture
def problems(load: Any, tmp_path: Path) -> Any:
    """Return a function that returns the problems of a recipe (their places without the folder)."""

    def problems(text: str | bytes, *overrides: str) -> list[Problem]:
        with pytest.raises(LoraError) as caught:
            load(text, *overrides)
        return [
            Problem(p.what, p.at and p.at.replace(f"{tmp_path}/", ""), p.hint)
            for p in caught.value.problems
        ]

    return problems


# ----------------------------------------------------------------------------------------- YAML


def test_numbers_and_words_are_those_of_yaml_1_2(load: Any) -> None:
    labels = "[no, on, yes, off, Y, 1:30, 2020-01-01, 1_000, 0b1, =, <<, 012, 0x1F, 0o17, -3]"
    recipe = load(
        LINES.replace("tion}", f"tion, labels: {labels}}}")
        + "train: {epochs: 1e1, optimizer: {learning_rate: 2e-5, eps: .5e-7, weight_decay: +1.}}\n"
    )
    words = ["no", "on", "yes", "off", "Y", "1:30", "2020-01-01", "1_000", "0b1", "=", "<<"]
    assert recipe.task.labels == [*words, 12, 31, 15, -3]
    assert recipe.train.optimizer.learning_rate == 2e-5
    assert recipe.train.optimizer.eps == 5e-8
    assert recipe.train.optimizer.weight_decay == 1.0
    assert recipe.train.epochs == 10


def test_a_byte_order_mark_is_dropped(load: Any) -> None:
    assert load(b"\xef\xbb\xbf" + LINES.encode()).model.name == "base-model"


@pytest.mark.parametrize(
    ("text", "what", "at", "hint"),
    [
        ("", "empty", "r.yaml:1", "`model`, `task` and `data`"),
        ("# only a comment\n", "empty", "r.yaml:1", "`model`"),
        ("- a\n- b\n", "mapping", "r.yaml:1", "`model`"),
        ("model:\n\tname: m\n", "a tab", "r.yaml:2", "indent with spaces"),
        (LINES + "---\n" + LINES, "one document", "r.yaml:4", "`---`"),
        (
            LINES + "train: {seed: [1\n\n\n",
            "a `]` or a comma is missing",
            "r.yaml:7",
            "not closed is at",
        ),
        (LINES + "output_dir: a: b\n", "a colon is not", "r.yaml:4", "quotation marks"),
        (LINES + "output_dir: @x\n", "cannot begin with `@`", "r.yaml:4", "quotation marks"),
        (LINES + "a: &a [*a]\n", "too large or too deep", "r.yaml:4", "aliases"),
        ("[" * 5000, "too deep", "r.yaml:1", "a few levels"),
        (bytes(range(1, 256)), "not UTF-8", "r.yaml:2", "UTF-8"),
        (LINES.encode() + b"x: \x00", "U+0000", "r.yaml:4", "delete it"),
        (LINES.encode("utf-16"), "not UTF-8", "r.yaml:1", "UTF-8"),
        (LINES + 'output_dir: "\\UFFFFFFFF"\n', "not a character", "r.yaml:4", "backslash"),
        (b"#" * 300_000, "has more than", "r.yaml", "data file"),
    ],
)
def test_an_error_in_the_yaml_has_a_reason_and_a_place(
    text: str | bytes, what: str, at: str, hint: str, problems: Any
) -> None:
    (problem,) = problems(text)
    assert what in problem.what
    assert problem.at == at
    assert hint in (problem.hint or "")


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("!!python/object/apply:os.system [true]", "`!!python/object/apply:os.system` is a tag"),
        ("!thing {rank: 3}", "`!thing` is a tag"),
        ("!!set {a}", "`!!set` is a tag"),
        ("!!binary aGk=", "`!!binary` is a tag"),
        ("{rank: !!int word}", "`word` is not what `!!int` says"),
        ("{dropout: !!float word}", "`word` is not what `!!float` says"),
        ("{use_rslora: !!bool maybe}", "`maybe` is not what `!!bool` says"),
        ("{rank: 1" + "0" * 30 + "}", "too large a number"),
        ("{rank: 1" + "0" * 5000 + "}", "number is too long"),
        ("{rank: 65537}", "less than or equal to 65536"),
        ("{rank_pattern: {query: 65537}}", "less than or equal to 65536"),
        ('{target_modules: "a\\0b"}', "a text contains a NUL"),
        ('{target_modules: "\\ud800"}', "half of a character"),
        ("{? [a] : 3}", "a key must be a word"),
        ("{<<: {rank: 3}}", "do not merge"),
    ],
)
def test_an_invalid_yaml_value_is_reported_once(value: str, what: str, problems: Any) -> None:
    (problem,) = problems(LINES + f"adapter: {value}\n")
    assert what in problem.what
    assert problem.at.startswith("adapter")
    assert problem.at.endswith("(r.yaml:4)")


def test_an_alias_bomb_is_rejected_quickly(problems: Any) -> None:
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    start = time.perf_counter()
    (problem,) = problems(bomb)
    assert "too large" in problem.what
    assert time.perf_counter() - start < 2


def test_an_alias_has_the_value_of_its_anchor(load: Any) -> None:
    recipe = load(LINES + "adapter: {target_modules: &t [query], exclude_modules: *t}\n")
    assert recipe.adapter.exclude_modules == ["query"]


def test_a_missing_recipe_suggests_a_similar_name(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(LINES)
    (tmp_path / "unlike.yml").write_text(LINES)
    with pytest.raises(LoraError) as caught:
        load_recipe(tmp_path / "recpie.yaml")
    assert caught.value.problems[0].hint == f"did you mean `{tmp_path / 'recipe.yaml'}`?"
    with pytest.raises(LoraError, match="no such file") as caught:
        load_recipe(tmp_path / "zzz.json")
    assert "lora init" in (caught.value.problems[0].hint or "")
    with pytest.raises(LoraError, match=r"a folder[\s\S]*recipe\.yaml"):
        load_recipe(tmp_path)
    with pytest.raises(LoraError, match="no such file"):
        load_recipe(tmp_path / "no" / "folder.yaml")


# --------------------------------------------------------------------------- problems, all at once


def test_all_problems_are_reported_together_with_their_lines(problems: Any) -> None:
    found = problems(
        "model: {name: m, dtpye: float32}\n"
        "task:\n"
        "  type: sequence_classification\n"
        "  max_length: '128'\n"
        "data: {path: rows.csv}\n"
        "train:\n"
        "  seed: 1\n"
        "  seed: 2\n"
        "  epoch: 3\n"
        "  learning_rate: 1e-4\n"
        "  epochs: 1\n"
        "  max_steps: 2\n"
        "adapter: {rank: 0}\n"
        "evaluate: {early_stopping: {patience: 2}}\n"
        "rank: 8\n"
    )
    assert {(p.at, p.what) for p in found} == {
        ("train.seed (r.yaml:8)", "`seed` appears twice"),
        ("model.dtpye (r.yaml:1)", "unknown key `dtpye`"),
        (
            "task.max_length (r.yaml:4)",
            '`"128"` should be a whole number, without quotation marks',
        ),
        ("train.epoch (r.yaml:9)", "unknown key `epoch`"),
        ("train.learning_rate (r.yaml:10)", "unknown key `learning_rate`"),
        ("train.max_steps (r.yaml:12)", "`epochs` and `max_steps` exclude each other"),
        ("adapter.rank (r.yaml:13)", "`0` should be greater than 0"),
        ("rank (r.yaml:15)", "unknown key `rank`"),
        (
            "evaluate.early_stopping (r.yaml:14)",
            "`evaluate.early_stopping` needs `data.validation`, and there is none",
        ),
    }
    hints = {p.at.split(" ")[0]: p.hint for p in found}
    assert hints["train.seed"].endswith("r.yaml:7; keep one")
    assert hints["model.dtpye"] == "did you mean `dtype`?"
    assert hints["train.epoch"] == "did you mean `epochs`?"
    assert hints["train.learning_rate"] == "did you mean `train.optimizer.learning_rate`?"
    assert hints["rank"] == "did you mean `adapter.rank`?"
    assert hints["adapter.rank"].startswith("Rank of the update")
    assert hints["task.max_length"].startswith("Maximum length of an input")


@pytest.mark.parametrize(
    ("lines", "at", "what", "hint"),
    [
        ("adapter: {target_modules: 3}", "adapter.target_modules", "text or a list", "Which"),
        ("adapter: {target_modules: [q, 3]}", "adapter.target_modules.1", "`3` should", "Which"),
        ("adapter: {layers: some}", "adapter.layers", "or a list", "0-11"),
        ("adapter: {rank_pattern: {q: x}}", "adapter.rank_pattern.q", "whole number", "ranks"),
        ("train: {seed: true}", "train.seed", "whole number", "Seed"),
        ("train: {seed: -1}", "train.seed", "greater than or equal to 0", "Seed"),
        ("train: {packing: yes}", "train.packing", "true or false", "short examples"),
        ("train:", "train", "`train` is empty", "leave it out"),
        ("adapter: {alpha: .nan}", "adapter.alpha", "finite", "scaled"),
        ("adapter: {alpha: 1e999}", "adapter.alpha", "finite", "scaled"),
        ("adapter: {type: lroa}", "adapter.type", "`lora` or `dora`", "did you mean `lora`"),
        ("train: {trackers: [wandb]}", "train.trackers.0", "`trackio`", "Other places"),
        ("evaluate: {metrics: f1}", "evaluate.metrics", "should be a list", "accuracy"),
        ("train: {optimizer: {betas: [0.9]}}", "train.optimizer.betas", "at least 2", "AdamW"),
        ("train: {optimizer: {groups: {layers: {x: {}}}}}",
         "train.optimizer.groups.layers.x", "a layer such as 3", "`0-5`"),
        ("train: {optimizer: {groups: {layers: {0-5: {lr: 1}}}}}",
         "train.optimizer.groups.layers.0-5.lr", "unknown key", "learning_rate, weight_decay"),
        ("output_dir: ''", "output_dir", "not empty", "Folder"),
        ("output_dir: 7", "output_dir", 'write "7"', "Folder"),
    ],
)  # fmt: skip
def test_the_hint_for_a_wrong_value_is_the_description_of_its_field(
    lines: str, at: str, what: str, hint: str, problems: Any
) -> None:
    (problem,) = problems(LINES + lines + "\n")
    assert problem.at == f"{at} (r.yaml:4)"
    assert what in problem.what
    assert hint in problem.hint


@pytest.mark.parametrize("split", ["3", "[a]", "{fraction: 0.1, from: 3}", "{}", "''"])
def test_the_hint_for_a_wrong_split_lists_all_forms(split: str, problems: Any) -> None:
    (problem,) = problems(LINES.replace("csv}", f"csv, validation: {split}}}"))
    if split in ("3", "[a]"):
        for form in ("`validation`", "train[:80%]", "dev.csv", "{from: train, fraction: 0.1}"):
            assert form in problem.hint
    assert problem.at.startswith("data.validation")


def test_train_cannot_be_drawn_from_another_split(problems: Any) -> None:
    (problem,) = problems(LINES.replace("csv}", "csv, train: {fraction: 0.5}}"))
    assert (problem.at, problem.hint[:14]) == ("data.train (r.yaml:3)", "The rows for t")


def test_a_missing_or_unknown_task_type_is_reported(problems: Any) -> None:
    (problem,) = problems(LINES.replace("type: sequence_classification", "text_column: a"))
    assert problem.what == "`type` is missing from `task`"
    assert "causal_lm" in problem.hint
    (problem,) = problems(LINES.replace("sequence_classification", "sequence_clasification"))
    assert problem.hint.startswith("did you mean `sequence_classification`?")


def test_missing_sections_are_named(problems: Any) -> None:
    found = problems("modle: {name: x}\n")
    assert [p.what for p in found] == [
        "`model` is missing", "`task` is missing", "`data` is missing", "unknown key `modle`",
    ]  # fmt: skip
    assert all(p.hint for p in found)


@pytest.mark.parametrize(
    ("base", "lines", "wanted"),
    [
        (LINES, {"task": "problem: regression, labels: [a], class_weights: balanced, "
                         "label_smoothing: 0.1, label_separator: ';'"},
         ["task.labels", "task.class_weights", "task.label_smoothing", "task.label_separator"]),
        (LINES, {"task": "labels: [a, b, a]"}, ["task.labels"]),
        (LINES, {"task": "label_columns: [a, b], labels: [a]"}, ["task.labels"]),
        (LINES, {"task": "label_columns: [a, a], problem: regression"},
         ["task.label_columns", "task.label_columns"]),
        (LINES, {"task": "labels: [1, '1']"}, ["task.labels"]),
        (LINES, {"data": "name: x/y"}, ["data.path"]),
        (LINES, {"data": "config: x"}, ["data.config"]),
        (LINES, {"data": "format: {encoding: utf-9, columns: [a, a]}"},
         ["data.format.encoding", "data.format.columns"]),
        (LINES, {"data": "format: {encoding: hex}"}, ["data.format.encoding"]),
        (LINES, {"data": "streaming: true"}, ["data.streaming"]),
        (LINES, {"data": "streaming: true, train: 'train[:5]', test: {fraction: 0.1}",
                 "train": "max_steps: 3, group_by_length: true"}, ["data.streaming", "data.test"]),
        (LINES, {"data": "streaming: true", "task": "class_weights: balanced",
                 "train": "max_steps: 3"}, ["task.class_weights"]),
        (CHAT, {"data": "streaming: true", "train": "max_steps: 3, packing: true"},
         ["train.packing"]),
        (CHAT, {"data": "validation: {fraction: 0.1, stratify: true}"},
         ["data.validation.stratify"]),
        (LINES, {"data": "test: {fraction: 0.1, disjoint: substring, group_by: a}"},
         ["data.test.group_by"]),
        (LINES, {"train": "packing: true"}, ["train.packing"]),
        (LINES, {"model": "dtype: bfloat16"}, ["model.dtype"]),
        (LINES, {"model": "dtype: float16", "train": "precision: fp32", "adapter": "type: full"},
         ["model.dtype"]),
        (CHAT, {"train": "packing: true, group_by_length: true"}, ["train.group_by_length"]),
        (LINES, {"train": "scheduler: {warmup_steps: 1, warmup_ratio: 0.1}"},
         ["train.scheduler.warmup_ratio"]),
        (CHAT, {"task": "prompt_column: a"}, ["task.prompt_column"]),
        (CHAT, {"task": "text_column: a, messages_column: b"}, ["task"]),
        (CHAT, {"task": "format: sharegpt"}, ["task.format"]),
    ],
)  # fmt: skip
def test_keys_that_exclude_each_other_are_errors(
    base: str, lines: dict[str, str], wanted: list[str], problems: Any
) -> None:
    text = base
    for section, keys in lines.items():
        old = next((line for line in text.splitlines() if line.startswith(section)), None)
        text = text.replace(old, f"{old[:-1]}, {keys}}}") if old else text
        text += "" if old else f"{section}: {{{keys}}}\n"
    found = problems(text)
    assert sorted(p.at.split(" ")[0] for p in found) == sorted(wanted)
    assert all("r.yaml:" in p.at for p in found)


def test_a_16_bit_base_with_fp32_precision_is_an_error(problems: Any) -> None:
    (problem,) = problems(LINES.replace("name: ", "dtype: bfloat16, name: "))
    assert problem.what.startswith("a base that is stored in bfloat16 cannot compute in")
    assert "train.precision=bf16" in problem.hint


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("float32", "fp32"), ("float32", "bf16"), ("bfloat16", "bf16"), ("float16", "fp16")],
)
def test_a_base_may_be_stored_in_the_dtype_of_the_precision(
    dtype: str, precision: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(LINES.replace("name: ", f"dtype: {dtype}, name: "), encoding="utf-8")
    recipe = load_recipe(path, [f"train.precision={precision}"])
    assert recipe.model.dtype == dtype


def test_an_invalid_key_is_not_also_reported_as_a_conflict(problems: Any) -> None:
    (problem,) = problems(LINES.replace("rows.csv", "3"))
    assert problem.at == "data.path (r.yaml:3)"
    (problem,) = problems(LINES.replace("rows.csv", '"a\\0b"'))
    assert problem.at == "data.path (r.yaml:3)"


def test_hints_with_no_choices_and_with_many() -> None:
    assert did_you_mean("x", [], "its columns are") == "its columns are none"
    many = did_you_mean("c3", [f"c{i}" for i in range(30)])
    assert many.startswith("did you mean `c3`?")
    assert many.endswith("… (30 in all))")


# ---------------------------------------------------------------------------------- overrides


def test_overrides_are_typed_and_may_create_sections(load: Any) -> None:
    recipe = load(
        LINES + "adapter: {target_modules: [query]}\n",
        "train.optimizer.learning_rate=2e-5",
        "adapter.target_modules=[key, no]",
        "evaluate.best.metric=f1",
        "train.max_grad_norm=null",
        'output_dir="a=b: c"',
        "data={path: other.csv}",
        " train.seed = 4",
    )
    assert recipe.train.optimizer.learning_rate == 2e-5
    assert recipe.adapter.target_modules == ["key", "no"]
    assert recipe.evaluate.best is not None
    assert recipe.train.max_grad_norm is None
    assert recipe.output_dir == "a=b: c"
    assert recipe.train.seed == 4
    assert recipe.at("train.seed") == "train.seed (--set  train.seed = 4)"


@pytest.mark.parametrize(
    "text",
    ["#2 String", "run #3", "#", "a:", "a: b", "!x", "&x", "*x", "%x", "50% off", "@x", "`x",
     "a\tb", "- x", "-", "? x", "| x", ">", "...", "--- x", "]x", ",x", "yes", "on", "it's",
     'say "hi"', "<<", "a\nb", "~/x", "2024", "1e4", "1.50", "0x1F", "True", "a=b", "\ue000",
     "文\uff1a本"],
)  # fmt: skip
def test_text_in_an_override_is_read_as_typed(text: str, load: Any) -> None:
    assert load(LINES, f"model.revision={text}").model.revision == text
    assert load(LINES, f"task.text_column={text}").task.text_column == text
    listed = json.dumps([text, "b"])
    assert load(LINES, f"task.labels={listed}").task.labels == [text, "b"]


def test_lists_and_mappings_in_an_override_have_no_comments_anchors_or_tags(load: Any) -> None:
    recipe = load(
        LINES,
        "task.labels=[#1 a, &b, *c, !d, 5%, @e, `f, g|h, i>j, k?, yes, '#, l', \"m #n\"]",
        "task.class_weights={#1 a: 1, &b: 2e-1}",
    )
    assert recipe.task.labels == ["#1 a", "&b", "*c", "!d", "5%", "@e", "`f", "g|h", "i>j", "k?",
                                  "yes", "#, l", "m #n"]  # fmt: skip
    assert recipe.task.class_weights == {"#1 a": 1.0, "&b": 0.2}


@pytest.mark.parametrize("mark", ["\t", " ", ";", "|", "#", "\x01", '"\\t"'])
def test_a_delimiter_in_an_override(mark: str, load: Any) -> None:
    wanted = "\t" if mark.startswith('"') else mark
    assert load(LINES, f"data.format.delimiter={mark}").data.format.delimiter == wanted


def test_the_last_override_of_a_key_counts(load: Any) -> None:
    assert load(LINES, "train.seed=1", "train.seed=2").train.seed == 2


def test_an_override_replaces_an_invalid_value(load: Any) -> None:
    text = LINES + "adapter: {rank: eight}\n"
    assert load(text, "adapter.rank=8").adapter.rank == 8


CLASSIFY = {
    "model": {"name": "base"},
    "task": {"type": "sequence_classification"},
    "data": {"path": "a.csv"},
}
CONTINUE = CLASSIFY | {"task": {"type": "causal_lm"}}


@pytest.mark.parametrize(
    ("recipe", "in_file", "flags"),
    [
        (CLASSIFY, {"train": {"epochs": 5}}, ["train.max_steps=30"]),
        (CLASSIFY, {"train": {"max_steps": 30}}, ["train.epochs=5"]),
        (CLASSIFY, {"train": {"gradient_accumulation_steps": 4}}, ["train.examples_per_step=64"]),
        (CLASSIFY, {"train": {"examples_per_step": 64}}, ["train.gradient_accumulation_steps=4"]),
        (CLASSIFY, {"train": {"scheduler": {"warmup_ratio": 0.1}}},
         ["train.scheduler.warmup_steps=9"]),
        (CLASSIFY, {"train": {"scheduler": {"warmup_steps": 9}}},
         ["train.scheduler.warmup_ratio=0.1"]),
        (CONTINUE, {"train": {"packing": True}}, ["train.group_by_length=true"]),
        (CONTINUE, {"train": {"group_by_length": True}}, ["train.packing=true"]),
        (CLASSIFY, {"data": {"path": "a.csv", "split_column": "split"}}, ["data.name=org/set"]),
        (CLASSIFY, {"data": {"name": "org/set", "config": "one"}}, ["data.path=a.csv"]),
        (CLASSIFY, {"data": {"path": "a.csv", "validation": {"fraction": 0.1, "group_by": "who"}}},
         ["data.validation.disjoint=substring"]),
        (CLASSIFY, {"data": {"path": "a.csv", "test": {"fraction": 0.1, "disjoint": "substring"}}},
         ["data.test.group_by=who"]),
        (CLASSIFY, {"task": {"type": "sequence_classification", "problem": "multi_label",
                             "label_columns": ["a", "b"]}}, ["task.label_separator=;"]),
        (CONTINUE, {"task": {"type": "causal_lm", "text_column": "t"}},
         ["task.prompt_column=q", "task.completion_column=a"]),
        (CONTINUE, {"task": {"type": "causal_lm", "prompt_column": "q", "completion_column": "a"}},
         ["task.text_column=t"]),
        (CONTINUE, {"task": {"type": "causal_lm", "messages_column": "m", "format": "sharegpt"}},
         ["task.text_column=t"]),
        (CONTINUE, {"task": {"type": "causal_lm", "text_column": "t"}}, ["task.format=alpaca"]),
        (CONTINUE, {"task": {"type": "causal_lm", "prompt_column": "q", "completion_column": "a"}},
         ["task.messages_column=m"]),
    ],
)  # fmt: skip
def test_an_override_replaces_the_keys_that_exclude_it(
    recipe: dict[str, Any], in_file: dict[str, Any], flags: list[str], load: Any
) -> None:
    loaded = load(yaml.safe_dump(recipe | in_file), *flags)
    for flag in flags:
        key, _, value = flag.partition("=")
        found = loaded
        for name in key.split("."):
            found = getattr(found, name)
        wanted = yaml.safe_load(value)
        assert found == wanted or found == str(Path.cwd() / str(wanted))
    # both in the file, or both on the command line, are an error
    section, _, name = flags[0].partition("=")[0].rpartition(".")
    both: Any = yaml.safe_load(yaml.safe_dump(recipe | in_file))
    inner = both
    for part in section.split("."):
        inner = inner.setdefault(part, {})
    for flag in flags:
        key, _, value = flag.partition("=")
        inner[key.rpartition(".")[2]] = yaml.safe_load(value)
    with pytest.raises(LoraError, match=r"exclude|more than one way|combined|divides|padding"):
        load(yaml.safe_dump(both))


def test_two_overrides_that_exclude_each_other_are_an_error(problems: Any) -> None:
    (problem,) = problems(LINES, "train.epochs=1", "train.max_steps=3")
    assert problem.what == "`epochs` and `max_steps` exclude each other"


@pytest.mark.parametrize("flag", ["train.max_steps=null", "train={seed: 3}", "train.packing=false"])
def test_an_override_with_a_neutral_value_replaces_no_other_key(flag: str, load: Any) -> None:
    text = yaml.safe_dump(CLASSIFY | {"train": {"epochs": 5, "group_by_length": True}})
    train = load(text, flag).train
    assert (train.epochs, train.group_by_length) == (
        (None, False) if flag.startswith("train={") else (5, True)
    )


@pytest.mark.parametrize(
    ("flag", "at", "what"),
    [
        ("train.epochs", "", "written `key=value`"),
        ("=3", "", "written `key=value`"),
        ("train..seed=3", "", "written `key=value`"),
        ("model.name.x=3", "", "`name` is not a section"),
        ("task.labels=[a", "", "not valid YAML"),
        ("trian.epochs=1", "trian", "unknown key"),
        ("train.epoch=1", "train.epoch", "unknown key"),
        ("train.epochs=many", "train.epochs", "a number"),
        ("train={seeed: 1}", "train.seeed", "unknown key"),
        ("train={seed: 1, seed: 2}", "train.seed", "appears twice"),
        ("adapter=!thing {}", "adapter", "should be a section"),
        ("output_dir=", "", "the value is empty"),
        ('output_dir="run" 3', "", "more text follows the closing"),
        ("task.labels=[a] # b", "", "more text follows the closing"),
        ("output_dir='run", "", "a quotation mark is not closed"),
        ("task.class_weights={a:1}", "", "`a:1` is a key without a value"),
        ("train.epochs=1 # one", "train.epochs", "should be a number"),
        ("data.streaming=yes", "data.streaming", "true or false"),
        ("a", "", "written `key=value`"),
    ],
)
def test_the_place_of_a_wrong_override_is_its_flag(
    flag: str, at: str, what: str, problems: Any
) -> None:
    (problem,) = problems(LINES, flag)
    assert what in problem.what
    assert problem.at == (f"{at} (--set {flag})" if at else f"--set {flag}")


def test_wrong_overrides_are_reported_with_all_other_problems(problems: Any) -> None:
    found = problems(LINES + "rnak: 3\n", "train.epochs", "task.labels=[", "model.name.x=1")
    assert len(found) == 4


# --------------------------------------------------------------------------------------- paths


def test_paths_are_relative_to_the_recipe_or_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (there / "base").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    file = there / "r.yaml"
    file.write_text(
        "model: {name: base}\n"
        "task: {type: causal_lm, chat_template: chat.jinja}\n"
        "data: {path: ../rows.csv, validation: dev.csv, test: 'test.csv[:5]'}\n"
    )
    recipe = load_recipe(file)
    assert recipe.model.name == str(there / "base")
    assert recipe.data.path == str(there / ".." / "rows.csv")
    assert recipe.data.validation == str(there / "dev.csv")
    assert recipe.data.test == str(there / "test.csv[:5]")
    assert recipe.data.train == "train"
    assert recipe.task.chat_template == str(there / "chat.jinja")
    assert recipe.output_dir == "out"
    moved = load_recipe(file, ["data.path=rows.csv", "model.name=./base", "data.test=train"])
    assert moved.data.path == str(here / "rows.csv")
    assert moved.model.name == str(here / "base")
    assert moved.data.test == "train"
    assert moved.data.validation == str(there / "dev.csv")
    hub = load_recipe(file, ["model.name=no-such-folder", "data={name: a/b, train: x/y}"])
    assert (hub.model.name, hub.data.train) == ("no-such-folder", "x/y")


def test_a_name_that_is_not_a_path_is_unchanged(load: Any) -> None:
    assert load(LINES.replace("base-model", "m" * 5000)).model.name == "m" * 5000


def test_the_home_of_an_unknown_user_is_an_error(load: Any) -> None:
    with pytest.raises(LoraError, match="there is no user `nobody-of-this-name`"):
        load(LINES.replace("base-model", "~nobody-of-this-name/x"))


# ----------------------------------------------------------------- whole recipes, and the way back

DESIGN = [
    """\
model: {name: roberta-large, revision: main}
task:
  type: sequence_classification
  text_column: sentence
  label_column: label
  labels: [negative, positive]
  problem: single_label
  max_length: 128
data:
  name: nyu-mll/glue
  config: sst2
  train: train
  validation: {from: train, fraction: 0.02, disjoint: substring, stratify: true}
  test: validation
  split_seed: 0
adapter: {type: lora, rank: 8, alpha: 16, dropout: 0.1, target_modules: [query, value]}
train:
  epochs: 10
  micro_batch_size: 32
  gradient_accumulation_steps: 2
  optimizer: {type: adamw, learning_rate: 4.0e-4, weight_decay: 0.1}
  scheduler: {type: linear, warmup_ratio: 0.06}
  precision: fp16
  max_grad_norm: 1.0
  gradient_checkpointing: false
  seed: 0
evaluate: {every_steps: 500, metrics: [accuracy, f1], best: {metric: accuracy, mode: max}, early_stopping: {patience: 5}}
checkpoint: {every_steps: 500, keep: 2}
output_dir: out
""",  # noqa: E501 - as it stands in DESIGN.md, without `kernels`
    """\
model: {name: meta-llama/Llama-3.1-8B}
task:
  type: causal_lm
  messages_column: messages
  format: sharegpt
  chat_template: chatml.jinja
  train_on: assistant
  pad_token: <|finetune_right_pad_id|>
  max_length: 4096
data: {path: chat.jsonl, validation: {fraction: 0.02}, test: {fraction: 0.02}}
adapter: {type: lora, rank: 16, alpha: 32, target_modules: all-linear}
train:
  epochs: 2
  micro_batch_size: 2
  gradient_accumulation_steps: 8
  optimizer: {type: adamw, learning_rate: 2.0e-4}
  scheduler: {type: cosine, warmup_ratio: 0.03}
  precision: bf16
  packing: true
evaluate: {every_steps: 100}
checkpoint: {every_steps: 100, keep: 2}
output_dir: out
""",
]


@pytest.mark.parametrize("text", DESIGN)
def test_example_recipes_load(text: str, load: Any) -> None:
    recipe = load(text)
    written = yaml.safe_load(text)
    assert recipe.train.optimizer.learning_rate == written["train"]["optimizer"]["learning_rate"]
    assert recipe.adapter.target_modules == written["adapter"]["target_modules"]


# short, since YAML takes no key of more than 1,024 characters as JSON writes it
characters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
texts = st.text(characters, min_size=1).map(lambda text: text[:80])
words = texts | st.sampled_from(
    ["no", "😀", "2e-5", "1_0", "012", "0x1F", "~", "null", "1:30", "=", "<<", "- a", "a: b", "#",
     "!x", "&a", "*a", "'", '"', "%", "@", "`", " a", "a ", "\n",
     "\x85", "\u2028", "\ufeff", "---", "..."]
)  # fmt: skip
paths = words.filter(lambda word: path_problem(word, "", None) is None)
finite = st.floats(1e-30, 1e30)


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    maybe = lambda key, value: {key: draw(value)} if draw(st.booleans()) else {}  # noqa: E731
    labels = st.lists(
        words | st.integers(-(2**63) + 1, 2**63 - 1),
        min_size=1,
        unique_by=lambda label: str(label).strip(),
    ).filter(lambda labels: all(str(label).strip() for label in labels))
    held_out = st.fixed_dictionaries({"fraction": st.floats(0.01, 0.99)}, optional={"from": words})
    return {
        "model": {"name": draw(paths), **maybe("revision", words)},
        "task": {
            "type": "sequence_classification",
            **maybe("labels", labels),
            **maybe("text_column", words),
            **maybe("class_weights", st.dictionaries(words, finite)),
        },
        "data": {
            "path": draw(paths),
            **maybe("validation", held_out | st.just("dev")),
            **maybe("split_seed", st.integers(0, 2**32 - 1)),
        },
        "adapter": {
            **maybe("rank_pattern", st.dictionaries(words, st.integers(1, 99))),
            **maybe("target_modules", words | st.lists(words, min_size=1)),
            **maybe("alpha", finite),
        },
        "train": {
            **maybe("epochs", finite),
            **maybe("max_grad_norm", st.none() | finite),
            "optimizer": maybe("learning_rate", finite),
        },
        "evaluate": {**maybe("metrics", st.lists(words)), **maybe("best", st.just({}))},
        **maybe("output_dir", paths),
    }


@given(values=recipes())
@settings(max_examples=60)
@pytest.mark.slow
def test_a_dumped_recipe_loads_unchanged(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    first, second = folder / "first.yaml", folder / "elsewhere" / "second.yaml"
    second.parent.mkdir(exist_ok=True)
    first.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML 1.2
    loaded = load_recipe(first)
    dumped = dump_recipe(loaded)
    second.write_text(dumped, encoding="utf-8", newline="")
    again = load_recipe(second)
    assert again.model_dump() == loaded.model_dump()
    assert dump_recipe(again) == dumped


def test_a_dumped_recipe_reads_the_same_in_yaml_1_1(load: Any) -> None:
    words = ["no", "2e-5", "0o17", "1:30", "1_000", "a"]
    recipe = load(LINES.replace("tion}", f"tion, labels: {json.dumps(words)}}}"))
    assert yaml.safe_load(dump_recipe(recipe))["task"]["labels"] == words


# --------------------------------------------------------------------------------- the schema


def test_the_schema_equals_the_golden_file() -> None:
    text = json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
    golden = GOLDEN / "recipe_schema.json"
    if os.environ.get("LORA_UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def test_every_property_has_a_description() -> None:
    schema = recipe_schema()
    sections = {"recipe": schema, **schema["$defs"]}
    bare = [
        f"{section}.{name}"
        for section, node in sections.items()
        for name, field in node.get("properties", {}).items()
        if not field.get("description")
        and not schema["$defs"].get(field.get("$ref", "").rsplit("/", 1)[-1], {}).get("description")
    ]
    assert bare == []


def test_the_schema_is_valid_and_accepts_the_example_recipes() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    validator = jsonschema.Draft202012Validator(recipe_schema())
    for text in DESIGN:
        assert not list(validator.iter_errors(yaml.safe_load(text)))
    assert list(validator.iter_errors({"model": {"nam": "x"}}))


# ------------------------------------------------------------------------------------- fuzzing


def _mutated(text: str, random: random.Random) -> bytes:
    """Return a recipe with some of its lines, words and bytes changed at random."""
    lines = text.splitlines(keepends=True)
    words = [word for line in lines for word in line.replace("{", " ").split()]
    odd = ["!!int x", "&a [*a]", "*x", "[", "}", "\t", "~", ".nan", "1e999", "'", '"', "? ", "- "]
    for _ in range(random.randint(1, 4)):
        i = random.randrange(len(lines))
        match random.randrange(6):
            case 0:
                del lines[i : i + random.randint(1, 3)]
                lines = lines or ["\n"]
            case 1:
                lines.insert(i, random.choice(lines))
            case 2:
                lines[i] = lines[i].replace(random.choice(words), random.choice(words + odd))
            case 3:
                lines[i] = "  " * random.randint(0, 3) + lines[i].lstrip()
            case 4:
                at = random.randrange(len(lines[i]) + 1)
                lines[i] = lines[i][:at] + random.choice(odd) + lines[i][at:]
            case _:
                key, _, rest = lines[i].partition(":")
                lines[i] = f"{key}: {random.choice(odd + words)}\n" if rest else lines[i]
    raw = bytearray("".join(lines).encode())
    if raw and random.random() < 0.2:
        raw[random.randrange(len(raw))] = random.randrange(256)
    return bytes(raw)


def _loads_or_refuses(file: Path, raw: bytes) -> None:
    file.write_bytes(raw)
    start = time.process_time()
    try:
        recipe = load_recipe(file)
    except LoraError as error:
        rejected: list[Problem] | None = error.problems
    else:
        rejected = None
        file.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
        assert load_recipe(file).model_dump() == recipe.model_dump()
    assert rejected is None or (rejected and all(problem.at for problem in rejected))
    assert time.process_time() - start < 2


@given(seed=st.integers(0, 2**32))
@settings(max_examples=500)
@pytest.mark.slow
def test_a_mutated_recipe_is_loaded_or_rejected(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    generator = random.Random(seed)
    raw = _mutated(generator.choice(DESIGN), generator)
    _loads_or_refuses(tmp_path_factory.getbasetemp() / "fuzz.yaml", raw)


@given(
    raw=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace"))
)
@settings(max_examples=200)
def test_random_bytes_are_rejected(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    _loads_or_refuses(tmp_path_factory.getbasetemp() / "fuzz.yaml", raw)


@pytest.mark.slow
def test_many_unknown_keys_are_reported_quickly(problems: Any) -> None:
    start = time.process_time()
    found = problems(LINES + "train: {" + ", ".join(f"key{i}: {i}" for i in range(2000)) + "}\n")
    assert len(found) == 20
    assert found[-1].what == "1,981 more problems are not shown"
    assert time.process_time() - start < 5


def test_keys_of_other_task_types_are_not_suggested(problems: Any) -> None:
    (problem,) = problems(
        "model: {name: m}\ntask: {type: causal_lm, label_column: label}\ndata: {path: d.csv}\n"
    )
    assert problem.hint.startswith("it is not for `type: causal_lm`; leave it out (known keys: ")


def test_a_recipe_saved_with_an_adapter_may_list_many_labels(tmp_path: Path) -> None:
    """It lists all labels found in the data, while the size of other recipes is limited."""
    labels = "".join(f"  - label number {i:0100}\n" for i in range(2000))
    text = f"model: {{name: base}}\ntask:\n  type: sequence_classification\n  labels:\n{labels}"
    (tmp_path / "recipe.yaml").write_text(text + "data: {path: rows.csv}\n")
    recipe = load_adapter_recipe(tmp_path)
    assert isinstance(recipe.task, SequenceClassificationSpec)
    assert recipe.task.labels is not None
    assert recipe.task.labels[-1] == f"label number {1999:0100}"
    with pytest.raises(LoraError, match="the recipe has more than 200,000 bytes"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_from_a_pipe_or_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoraError, match="the recipe has more than"):
        load_recipe("/dev/zero")
    monkeypatch.setattr(files, "PATIENCE_S", 0.01)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(LoraError, match="nothing is written into this pipe"):
        load_recipe(pipe)
    with open(os.open(pipe, os.O_RDWR), "wb") as file:
        file.write(b"model: {name: base}\ntask: {type: causal_lm}\ndata: {path: rows.csv}\n")
        file.flush()
        with pytest.raises(LoraError, match="nothing is written"):  # it was never closed
            load_recipe(pipe)
    source, sink = os.pipe()  # as bash makes one for `<(COMMAND)`
    os.write(sink, b"model: {name: base}\ntask: {type: causal_lm}\ndata: {path: rows.csv}\n")
    os.close(sink)
    assert load_recipe(f"/dev/fd/{source}").model.name == "base"
    os.close(source)


def test_a_key_without_effect_is_an_error_unless_already_trained_with(
    tmp_path: Path,
) -> None:
    path = tmp_path / "recipe.yaml"
    optimizer = "train: {optimizer: {type: adafactor, momentum: 0.9, betas: [0.5, 0.6]}}\n"
    path.write_text(f"{LINES}{optimizer}adapter: {{eva_rho: 3}}\n", encoding="utf-8")
    with pytest.raises(LoraError) as caught:
        load_recipe(path)
    found = {problem.at.partition(" ")[0] for problem in caught.value.problems}
    keys = {"train.optimizer.momentum", "train.optimizer.betas", "adapter.eva_rho"}
    assert found == keys
    recipe = load_adapter_recipe(tmp_path)
    assert (recipe.train.optimizer.type, recipe.train.optimizer.momentum) == ("adafactor", 0.0)
    read = ["train.optimizer={type: sgd, momentum: 0.9}", "adapter={init: eva, eva_rho: 3}"]
    assert load_adapter_recipe(tmp_path, read).train.optimizer.momentum == 0.9
