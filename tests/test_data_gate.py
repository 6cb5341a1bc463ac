"""What the gate finds in constructed data, what it refuses, and what `--show` marks.

LORA_UPDATE_GOLDEN=1 writes tests/golden/gate_table.txt anew; the commit says why it changed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
from typer.testing import CliRunner

from lora_cli.cli.app import app, main
from lora_cli.data.row_texts import text_of
from lora_cli.errors import LoraError
from lora_cli.preprocessing.data_gate import examine
from lora_cli.preprocessing.encode import load_data
from lora_cli.preprocessing.findings import Findings
from lora_cli.preprocessing.show_examples import shown_rows
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task, task_model
from lora_cli.tasks.texts.marked_tokens import pieces
from lora_cli.training import train

GOLDEN = Path(__file__).parent / "golden" / "gate_table.txt"
LONG = "the story of a long and winding road that goes on"
Json = dict[str, Any]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bases")
    save = {"encoder": tiny.save_encoder, "llama": tiny.save_llama}
    made = {kind: function(folder / kind) for kind, function in save.items()}
    return made.__getitem__


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, bases: Callable[[str], Path]) -> Write:
    """Write a recipe and its splits: lists of (text, label), or of rows."""

    def write(kind: str = "encoder", data: Json | None = None, **sections: Any) -> Path:
        files = {}
        for name in ("train", "validation", "test"):
            rows = sections.pop(name, None)
            if rows is not None:
                rows = [r if isinstance(r, dict) else {"text": r[0], "label": r[1]} for r in rows]
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
                files[name] = f"{name}.jsonl"
        return tiny.recipe(bases(kind), tmp_path, data={**files, **(data or {})}, **sections)

    return write


def found(path: Path, *sets: str) -> Findings:
    task = build_task(load_recipe(path, list(sets)))
    task.load_processor()
    return examine(task, load_data(task))


def plain(count: int, name: str) -> list[tuple[str, int]]:
    """Return rows without any overlap."""
    return [(f"{name * 3}{i}{name} {i * 7919}{name[::-1]}{i * 31}", i % 2) for i in range(count)]


# ------------------------------------------------------------------------------ inside a split


def test_counts_labels_and_lengths(write: Write) -> None:
    rows = [("a", 0), ("a b", 1), (" ".join("abcdefghij"), 1), (" ".join("abcdefghijk"), 1)]
    path = write(train=rows, task={"max_length": 16})
    split = found(path).splits["train"]
    assert (split.rows, split.examples, split.labels) == (4, 4, {"bad": 1, "good": 3})
    task = build_task(load_recipe(path))
    task.load_processor()
    full = [len(task.tokenizer(text)["input_ids"]) for text, _ in rows]
    assert split.lengths == {
        "p50": sorted(full)[1], "p95": sorted(full)[2], "max": full[-1],
        "total": sum(min(n, 16) for n in full),
    }  # fmt: skip
    assert split.cut_rows == sum(n > 16 for n in full) == 2
    assert (split.divided_rows, split.trained_tokens) == (0, None)


def test_a_row_that_just_fits_is_not_cut(write: Write) -> None:
    rows = [("a b c", 0), ("a b c d", 1)]
    path = write(train=rows)
    longest = found(path).splits["train"].lengths["max"]
    assert found(path, f"task.max_length={longest}").splits["train"].cut_rows == 0
    assert found(path, f"task.max_length={longest - 1}").splits["train"].cut_rows == 1


def test_a_pair_is_cut_by_its_whole_length(write: Write) -> None:
    rows = [
        {"text": "a b", "more": "c d e f g", "label": 0},
        {"text": "a", "more": "b", "label": 1},
    ]
    path = write(train=rows, task={"text_pair_column": "more", "max_length": 10})
    task = build_task(load_recipe(path))
    task.load_processor()
    split = load_data(task)["train"]
    full = [len(task.tokenizer(r["text"], r["more"])["input_ids"]) for r in rows]
    assert split.full_lengths.tolist() == full
    assert split.lengths.tolist() == [10, full[1]]
    assert full[0] > 10 > full[1]


def test_duplicates_and_contradictions(write: Write) -> None:
    rows = [*plain(6, "x"), ("Good  Film", 1), ("good film", 1), ("good film ", 0), ("sad", 0)]
    split = found(write(train=rows)).splits["train"]
    assert (split.duplicates.rows, split.duplicates.share) == (2, 0.2)
    first = split.duplicates.examples[0]
    assert (first.row, first.other) == ("train.jsonl:8", "train.jsonl:7")
    assert split.contradictions is not None
    assert (split.contradictions.rows, split.contradictions.share) == (3, 0.3)
    (pair,) = split.contradictions.examples
    assert (pair.row, pair.label, pair.other_label) == ("train.jsonl:9", "bad", "good")
    assert pair.other == "train.jsonl:7"


@pytest.mark.parametrize(
    ("labels", "opposed"),
    [(["good", 1], 0), (["good", "bad"], 2), ([0, "good"], 2)],
)
def test_labels_by_name_and_by_position_are_equal(
    labels: list[Any], opposed: int, write: Write
) -> None:
    rows = [*plain(4, "x"), ("same", labels[0]), ("same", labels[1])]
    split = found(write(train=rows)).splits["train"]
    assert split.contradictions is not None
    assert split.contradictions.rows == opposed


def test_contradictions_of_multiple_labels_and_of_numbers(write: Write) -> None:
    several = [("same", ["a", "b"]), ("same", ["b", "a"]), ("same", ["a"]), ("other", ["b"])]
    task = {"problem": "multi_label", "labels": ["a", "b"]}
    split = found(write(train=several, task=task)).splits["train"]
    assert split.contradictions is not None
    assert (split.contradictions.rows, split.labels) == (3, {"a": 3, "b": 3})
    numbers = [("same", 1.0), ("same", 1), ("like", 2.0), ("like", 2.5)]
    task = {"problem": "regression", "labels": None}
    split = found(write(train=numbers, task=task)).splits["train"]
    assert split.contradictions is not None
    assert (split.contradictions.rows, split.labels) == (2, {})


def test_the_search_for_near_duplicates_can_be_disabled(write: Write) -> None:
    path = write(train=[*plain(5, "x"), (LONG, 0), (f"{LONG}s", 1)], validation=[(LONG + "x", 0)])
    findings = found(path)
    near = findings.splits["train"].near_duplicates
    assert near is not None
    assert (near.rows, near.examples[0].row) == (1, "train.jsonl:7")
    over = findings.overlap["validation"]["train"]
    assert over.near is not None
    assert (over.exact.rows, over.near.rows) == (0, 1)
    without = found(path, "data.check.near_duplicates=false")
    assert without.splits["train"].near_duplicates is None
    assert without.overlap["validation"]["train"].near is None
    assert "near" not in without.table()


def test_rows_that_could_not_be_read_are_counted(write: Write) -> None:
    rows = [*plain(3, "x"), (" ", 0), ("word", None)]
    split = found(write(train=rows, data={"on_bad_row": "skip"})).splits["train"]
    assert (split.rows, split.skipped_rows) == (3, 2)


# -------------------------------------------------------------------------------- language models


def test_a_long_text_is_split_and_not_cut(write: Write) -> None:
    rows = [{"text": "word " * 40}, {"text": "a b"}]
    split = found(write("llama", train=rows, task={"max_length": 16})).splits["train"]
    assert (split.divided_rows, split.cut_rows) == (1, 0)
    assert split.examples > 2
    assert split.lengths["max"] > 40


def test_a_long_pair_is_cut_and_its_trained_tokens_are_counted(write: Write) -> None:
    rows = [{"p": "ask", "c": "yes"}, {"p": "ask", "c": "no " * 30}, {"p": "ask " * 30, "c": "no"}]
    task = {"text_column": None, "prompt_column": "p", "completion_column": "c", "max_length": 24}
    path = write("llama", train=rows, task=task)
    split = found(path).splits["train"]
    assert (split.cut_rows, split.divided_rows, split.rows_without_example) == (1, 0, 1)
    built = build_task(load_recipe(path))
    built.load_processor()
    examples = list(load_data(built)["train"].examples)
    trained = sum(sum(label != -100 for label in e["labels"][1:]) for e in examples)
    assert split.trained_tokens == trained / sum(len(e["labels"]) for e in examples)
    assert 0 < split.trained_tokens < 1
    assert split.duplicates.rows == 0  # rows with equal prompts are not duplicates


def test_all_tokens_of_plain_text_except_the_first_are_trained(write: Write) -> None:
    split = found(write("llama", train=[{"text": "a b c"}, {"text": "d"}])).splits["train"]
    assert split.trained_tokens == (split.lengths["total"] - 2) / split.lengths["total"]


def test_the_compared_text_of_a_conversation() -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"from": "gpt", "value": "hello"},
    ]
    assert text_of({"m": turns}, ["m"]).split() == ["hi", "hello"]
    assert text_of({"m": None, "n": 3}, ["m", "n", "o"]).split() == ["3"]


def test_a_conversation_without_words_is_an_error(write: Write) -> None:
    rows = [
        {"m": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in (("", ""), ("hi", "ho"))
    ]
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    path = write(
        "llama",
        train=rows,
        task={"text_column": None, "messages_column": "m", "chat_template": "t"},
    )
    (path.parent / "t").write_text(template)
    with pytest.raises(LoraError, match="turn 2: the assistant says nothing"):
        found(path)


# ----------------------------------------------------------------------------------- overlap


def test_the_overlap_of_each_split_with_the_others_is_counted(write: Write) -> None:
    path = write(
        train=[*plain(10, "x"), ("Shared  text", 0)],
        validation=[*plain(3, "y"), ("shared TEXT", 1)],
        test=[("shared text", 0), plain(1, "y")[0]],
    )
    findings = found(path)
    counts = {
        (name, other): (what.exact.rows, what.exact.share)
        for name, others in findings.overlap.items()
        for other, what in others.items()
    }
    assert counts == {
        ("validation", "train"): (1, 0.25),
        ("test", "train"): (1, 0.5),
        ("test", "validation"): (2, 1.0),
    }
    (pair,) = findings.overlap["validation"]["train"].exact.examples
    assert (pair.row, pair.other) == ("validation.jsonl:4", "train.jsonl:11")
    assert (pair.text, pair.other_text) == ("shared TEXT", "Shared text")
    problems = findings.problems()  # overlap of test with validation is not a problem
    assert [p.at.split(" ")[0] for p in problems if p.at] == ["data.validation", "data.test"]


@pytest.mark.parametrize(("limit", "rejected"), [("0.24", True), ("0.25", False), ("1", False)])
def test_the_limit(limit: str, rejected: bool, write: Write) -> None:
    path = write(train=plain(10, "x"), validation=[*plain(3, "y"), plain(1, "x")[0]])
    assert bool(found(path, f"data.check.max_overlap={limit}").problems()) is rejected


def test_rows_split_off_from_train_have_no_overlap(write: Write) -> None:
    path = write(train=plain(20, "x") * 2, data={"validation": {"fraction": 0.3}})
    assert found(path).overlap["validation"]["train"].exact.rows == 0
    path = write(train=plain(20, "x") * 2, data={"validation": {"fraction": 0.3, "disjoint": None}})
    assert found(path).overlap["validation"]["train"].exact.share > 0.5


def no_weights(*_: Any, **__: Any) -> Any:
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize("command", [["train"], ["validate", "--data"]])
def test_a_leak_ends_with_exit_code_2_before_weights_are_loaded(
    command: list[str], write: Write, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = write(train=plain(12, "x"), validation=plain(9, "x")[4:])
    monkeypatch.setattr(task_model, "load_pretrained", no_weights)
    monkeypatch.setattr(sys, "argv", ["lora", command[0], str(path), *command[1:]])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as exited:
        main()
    out, err = capsys.readouterr()
    assert (exited.value.code, out) == (2, "")
    table, _, error = err.partition("error: ")
    assert "also in train" in table
    assert error.startswith("5 of 5 validation rows (100.0 %) also occur in train, and ")
    assert [f"validation.jsonl:{i}" in error for i in (1, 2, 3, 4)] == [True, True, True, False]
    assert "is train.jsonl:5" in error
    assert "at data.validation (" in error
    assert "recipe.yaml:" in error
    assert "disjoint: exact" in error
    allowed = next(w.strip("`") for w in error.split() if w.startswith("data.check.max_overlap"))
    assert not found(path, allowed.removeprefix("--set ")).problems()  # the hint works


def test_the_report_contains_the_findings_and_keeps_its_keys(write: Write, tmp_path: Path) -> None:
    path = write(
        train=[*plain(10, "x"), plain(1, "x")[0]], validation=plain(4, "y"), test=plain(4, "y")[:3],
        evaluate={"metrics": ["accuracy"]},
    )  # fmt: skip
    train(load_recipe(path))
    data = json.loads((tmp_path / "out" / "report.json").read_text())["data"]
    assert set(data) == {"train", "validation", "test", "overlap"}
    old = {"rows", "examples", "source", "sha256", "skipped_rows", "dropped_rows", "labels"}
    old |= {"rows_without_example", "max_tokens"}
    new = {
        "unknown_tokens",
        "control_token_rows",
        "control_tokens",
        "tokens",
        "cut_rows",
        "divided_rows",
        "empty_rows",
        "duplicates",
        "near_duplicates",
    }
    assert set(data["train"]) == old | new | {"contradictions", "label_doubts"}
    assert data["train"]["duplicates"]["rows"] == 1
    assert data["overlap"]["test"]["validation"]["exact"] == {
        "rows": 3,
        "share": 1.0,
        "examples": [
            {"row": f"test.jsonl:{i}", "other": f"validation.jsonl:{i}", "text": t, "other_text": t}
            for i, (t, _) in enumerate(plain(3, "y"), 1)
        ],
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "overlap" not in card


def test_streamed_rows_are_not_inspected_and_the_table_says_so(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = plain(8, "x")
    path = write(train=rows, validation=rows[:4], data={"streaming": True})
    findings = found(path)
    assert list(findings.splits) == ["validation"]
    assert (findings.overlap, findings.problems()) == ({}, [])
    report = train(load_recipe(path))
    assert report["data"]["validation"]["duplicates"]["rows"] == 0
    assert report["data"]["overlap"] == {}
    assert "train is streamed: its rows were not inspected" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- the table


def test_the_table_is_the_golden_one(write: Write) -> None:
    path = write(
        train=[*plain(40, "x"), (LONG, 1), (f"{LONG}s", 1), ("good film", 1), ("good film", 0)],
        validation=[*plain(10, "y"), (f"{LONG}x", 1)],
        test=[*plain(10, "z"), ("good film", 1)],
        task={"max_length": 24},
    )
    table = found(path).table() + "\n"
    if os.environ.get("LORA_UPDATE_GOLDEN"):
        GOLDEN.write_text(table, encoding="utf-8")
    assert table == GOLDEN.read_text(encoding="utf-8")


def test_the_table_stays_short(write: Write) -> None:
    labels = [f"label{i:02}" for i in range(30)]
    rows = [(f"{LONG} {i // 2}", labels[i % 30]) for i in range(60)]
    more = [*rows, (f"{LONG} 3s", labels[0])]
    path = write(train=rows, validation=more, test=more[1:], task={"labels": labels})
    table = found(path).table()
    lines = table.splitlines()
    assert len(lines) <= 25
    assert any(line.startswith("labels, of 30") for line in lines)
    assert lines[-1].endswith("more warnings; report.json has them all)")


def test_clean_data_causes_no_warning(write: Write) -> None:
    findings = found(write(train=plain(10, "x"), validation=plain(4, "y")))
    assert (findings.warnings(), findings.problems()) == ([], [])


# ------------------------------------------------------------------------------------- --show


def shown(path: Path, count: int = 9, colour: bool = False) -> list[str]:
    task = build_task(load_recipe(path))
    task.load_processor()
    return list(shown_rows(task, load_data(task), count, colour))


def test_a_classified_row_is_shown_with_its_label_and_length(write: Write) -> None:
    path = write(train=[("a film", 1), ("dull " * 20, 0)], task={"max_length": 12})
    one, two = shown(path)
    head, text, _ = one.split("\n")
    assert head.startswith("train  train.jsonl:1  label good  ")
    assert head.endswith(" tokens")
    assert text == "<s>a film</s>"
    assert "label bad  12 tokens, cut from " in two


def test_the_completion_is_marked_with_its_end(write: Write) -> None:
    rows = [{"p": "how are you? ", "c": "fine … thanks"}]
    task = {"text_column": None, "prompt_column": "p", "completion_column": "c", "max_length": 64}
    path = write("llama", train=rows, task=task)
    (text,) = shown(path)
    assert text.split("\n")[1] == "<s>how are you? ⟦fine … thanks</s>⟧"
    (text,) = shown(path, colour=True)
    assert text.split("\n")[1] == "<s>how are you? \x1b[32mfine … thanks</s>\x1b[0m"


def test_the_assistants_turns_are_marked(write: Write) -> None:
    says = [("user", "hi"), ("assistant", "hello"), ("user", "and?"), ("assistant", "so")]
    rows = [{"m": [{"role": role, "content": text} for role, text in says]}]
    end = "{{ '</s>' if m.role == 'assistant' }}"
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    task = {"text_column": None, "messages_column": "m", "chat_template": "t", "max_length": 120}
    path = write("llama", train=rows, task=task)
    (path.parent / "t").write_text(template)
    (text,) = shown(path)
    assert text.partition("\n")[2] == (
        "user: hi\nassistant: ⟦hello</s>\n⟧user: and?\nassistant: ⟦so</s>\n⟧\n"
    )


@pytest.mark.parametrize("packing", [False, True])
def test_plain_text_is_marked_except_its_first_token(packing: bool, write: Write) -> None:
    rows = [{"text": "a great story"}, {"text": "word " * 40}]
    path = write("llama", train=rows, task={"max_length": 16})
    recipe = load_recipe(path, [f"train.packing={str(packing).lower()}"])
    task = build_task(recipe)
    task.load_processor()
    one, two = shown_rows(task, load_data(task), 9, False)
    assert one.split("\n")[1] == "<s>⟦a great story</s>⟧"
    assert "16 tokens, the first of " in two


def test_the_shown_runs_add_up_to_the_whole_text(bases: Callable[[str], Path]) -> None:
    tokenizer = tiny.tokenizer("llama")
    ids = tokenizer("a warm … and \U0001f600 funny  film")["input_ids"]
    whole = tokenizer.decode(ids)
    for border in range(1, len(ids)):
        trained = [i >= border for i in range(len(ids))]
        runs = list(pieces(tokenizer, ids, trained))
        assert [on for on, _ in runs] == [False, True]
        if "\ufffd" not in runs[0][1]:  # the boundary is not inside a character
            assert "".join(text for _, text in runs) == whole


def test_validate_shows_rows_on_stdout_and_the_table_on_stderr(write: Write) -> None:
    path = write(train=plain(6, "x"), validation=plain(4, "y"))
    result = CliRunner().invoke(app, ["validate", str(path), "--data", "--show", "2"])
    assert result.exit_code == 0
    assert result.stdout.count("tokens\n") == 4
    assert result.stderr.startswith("data ")
    assert "also in train" in result.stderr
    result = CliRunner().invoke(app, ["validate", str(path), "--data"])
    assert result.stdout.startswith("format: 1\nmodel:")
    assert "also in train" in result.stderr
    result = CliRunner().invoke(app, ["validate", str(path), "--show", "2"])
    assert isinstance(result.exception, LoraError)


def test_language_models_are_shown_by_the_command_too(write: Write) -> None:
    path = write("llama", train=[{"text": "a great story"}])
    result = CliRunner().invoke(app, ["validate", str(path), "--data", "--show", "1"])
    assert "⟦a great story</s>⟧" in result.stdout


def test_rows_without_an_answer_cause_no_contradiction(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_cli.tasks.sequence_classification import SequenceClassification

    known = SequenceClassification.labels_of
    blank = "b"

    def labels_of(self: SequenceClassification, row: Json) -> list[str] | None:
        return None if row["text"] == blank else known(self, row)

    rows = [("b", 0), ("a", 0), ("b", 1), ("a", 1), ("c", 0)]
    path = write(train=rows)
    monkeypatch.setattr(SequenceClassification, "labels_of", labels_of)
    split = found(path).splits["train"]
    assert split.contradictions is not None
    assert split.contradictions.rows == 2
    (pair,) = split.contradictions.examples
    assert (pair.row, pair.other) == ("train.jsonl:4", "train.jsonl:2")
    assert sum(split.labels.values()) == 3
