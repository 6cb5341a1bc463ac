"""Recipes that `lora init` drafts for small copies of well-known data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from drafting import Init, classification, lines, said, table, texts
from typer.testing import CliRunner

from lora_cli.cli.app import app
from lora_cli.data.chat_formats import read_conversations
from lora_cli.data.labelled_text import label_source, split_label
from lora_cli.data.load_rows import load_rows
from lora_cli.errors import LoraError
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_recipe
from lora_cli.recipe_draft import draft_recipe
from lora_cli.tasks import build_task

T = texts(60)
U = texts(60, seed=1)


def numbered(names: list[Any]) -> list[Any]:
    return [names[i % len(names)] for i in range(60)]


def quoted(rows: list[list[Any]]) -> str:
    return "".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows)


NLI = numbered(["entailment", "neutral", "contradiction"])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("ag_news.csv", quoted([[n, t, f"{t} {u} {t} {u}"] for n, t, u in
                                zip(numbered([3, 4, 2, 1]), T, U, strict=True)]),
         classification("text", "label", [1, 2, 3, 4])),
        ("ag_kaggle.csv", table(["Class Index", "Title", "Description"],
                                [[n, t[:20], f"{t} {u}"] for n, t, u in
                                 zip(numbered([3, 4, 2, 1]), T, U, strict=True)]),
         classification("Description", "Class Index", [1, 2, 3, 4])),
        ("yelp.csv", quoted([[n, t] for n, t in zip(numbered([1, 2]), T, strict=True)]),
         classification("text", "label", [1, 2])),
        ("sentiment140.csv", quoted([[n, 1467810369 + 7 * i, "Mon Apr 06", "NO_QUERY", t]
                                     for i, (n, t) in enumerate(zip(numbered([0, 4]), T,
                                                                    strict=True))]),
         classification("text", "label", [0, 4])),
        ("amazon.json", lines([{"reviewerID": f"A2IBPI20UZIR{i:02d}", "helpful": [i % 3, 4],
                                "reviewText": t, "overall": float(n), "summary": t[:9]}
                               for i, (n, t) in enumerate(zip(numbered([1, 2, 3, 4, 5]), T,
                                                              strict=True))]),
         classification("reviewText", "overall", [1, 2, 3, 4, 5])),
        ("bewertungen.csv", table(["Bewertung", "Sterne"],
                                  [[f"Schön: {t}", n] for n, t in
                                   zip(numbered([1, 2, 3, 4, 5]), T, strict=True)], ";"),
         classification("Bewertung", "Sterne", [1, 2, 3, 4, 5])),
        ("reviews.csv", table(["レビュー", "評価"],
                              [[f"この映画は面白かった{i}", n] for i, n in
                               enumerate(numbered([1, 2, 3, 4, 5]))]),
         classification("レビュー", "評価", [1, 2, 3, 4, 5])),
        ("snli.jsonl", lines([{"annotator_labels": ["neutral"], "gold_label": n if i % 10 else "-",
                               "pairID": f"{i}r1n", "sentence1": t, "sentence1_parse": "(R)",
                               "sentence2": u, "sentence2_parse": "(S)"}
                              for i, (n, t, u) in enumerate(zip(NLI, T, U, strict=True))]),
         classification("sentence1", "gold_label", ["contradiction", "entailment", "neutral"],
                        text_pair_column="sentence2", skip_labels=["-"])),
        ("mnli.tsv", table(["index", "genre", "sentence1_parse", "sentence2_parse", "sentence1",
                            "sentence2", "label1", "gold_label"],
                           [[i, "fiction", "( a )", "( b )", t, u, n, n] for i, (n, t, u) in
                            enumerate(zip(NLI, T, U, strict=True))], "\t"),
         classification("sentence1", "gold_label", ["contradiction", "entailment", "neutral"],
                        text_pair_column="sentence2")),
        ("mrpc.txt", table(["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
                           [[n, 70 + i, 900 + i, t, u] for i, (n, t, u) in
                            enumerate(zip(numbered([0, 1]), T, U, strict=True))], "\t"),
         classification("#1 String", "Quality", [0, 1], text_pair_column="#2 String")),
        ("stsb.csv", table(None, [["captions", "MSRvid", n, t, u] for n, t, u in
                                  zip(numbered([5.0, 3.8, 0.75, 2.5]), T, U, strict=True)], "\t"),
         classification("text", "label", None, text_pair_column="text_2", problem="regression")),
        ("emotion.txt", "".join(f"{t.replace(';', ',')};{n}\n" for n, t in
                                zip(numbered(["joy", "fear"]), T, strict=True)),
         classification("text", "label", ["fear", "joy"])),
        ("trec.label", "".join(f"{n} {t} ?\n" for n, t in
                               zip(numbered(["DESC:manner", "HUM:ind", "NUM:date"]), T,
                                   strict=True)),
         classification("text", "label", ["DESC:manner", "HUM:ind", "NUM:date"])),
        ("train.ft.txt", "".join(f"__label__{n} {t}\n" for n, t in
                                 zip(numbered([1, 2]), T, strict=True)),
         classification("text", "label", [1, 2])),
        ("cooking.train", "".join(f"__label__{n}{' __label__bread' * (i % 3 == 0)} {t}\n"
                                  for i, (n, t) in enumerate(zip(numbered(["cheese", "meat"]), T,
                                                                 strict=True))),
         classification("text", "label", ["bread", "cheese", "meat"], problem="multi_label",
                        label_separator=" ")),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[:20] else "",
)  # fmt: skip
@pytest.mark.slow_after(2)
def test_a_published_layout_needs_no_option(
    name: str, content: str, expected: dict[str, Any], init: Init
) -> None:
    found = said(init(name, content))
    assert found.pop("skip_labels", []) == expected.pop("skip_labels", [])
    assert found == expected


def test_consecutive_integers_are_labels(init: Init) -> None:
    content = table(["text", "label"], [[f"{t} {u}", i % 25] for i, (t, u) in
                                        enumerate(zip(T * 2, U * 2, strict=True))])  # fmt: skip
    assert said(init("banking.csv", content)) == classification("text", "label", range(25))


def test_measured_values_are_a_regression(init: Init) -> None:
    content = table(["text", "score"], [[t, i % 25 * 3] for i, t in enumerate(T)])
    assert said(init("scores.csv", content))["problem"] == "regression"


def test_a_pair_without_typical_names(init: Init) -> None:
    content = table(["before", "after", "same"], [[t, u, i % 2] for i, (t, u) in
                                                  enumerate(zip(T, U, strict=True))])  # fmt: skip
    with pytest.raises(LoraError, match="--text A --pair B"):
        init("pairs.csv", content)
    recipe = init("pairs.csv", content, text="before", pair="after")
    assert said(recipe) == classification("before", "same", [0, 1], text_pair_column="after")


DOLLY = [
    {
        "instruction": t,
        "context": u if i % 3 else "",
        "response": f"{u} {t}",
        "category": "ab"[i % 2],
    }
    for i, (t, u) in enumerate(zip(T, U, strict=True))
]


@pytest.mark.parametrize("context", ["context", "input", "passage"])
def test_a_context_is_not_left_out_of_the_prompt(init: Init, context: str) -> None:
    rows = [{context if k == "context" else k: v for k, v in row.items()} for row in DOLLY]
    recipe = init("dolly.jsonl", lines(rows), "llama")
    assert recipe.task.format == "alpaca"
    assert recipe.data.columns == {"response": "output"} | (
        {} if context == "input" else {context: "input"}
    )
    read = {row["instruction"]: row for row in load_rows(recipe)["train"]}
    row = next(row for row in DOLLY if row["instruction"] in read and row["context"])
    (conversation,) = read_conversations(read[row["instruction"]], "alpaca", None)
    asked, answer = conversation.messages
    assert asked["content"] == f"{row['instruction']}\n\n{row['context']}"
    assert answer["content"] == row["response"]


def test_a_context_can_be_left_out(init: Init) -> None:
    without = init("dolly.jsonl", lines(DOLLY), "llama", text="instruction", label="response")
    assert said(without)["prompt_column"] == "instruction"


def test_neither_of_two_contexts_is_left_out(init: Init) -> None:
    rows = [row | {"passage": f"of {row['instruction']}"} for row in DOLLY]
    with pytest.raises(LoraError, match="`context` belongs to the prompt in 40 rows") as caught:
        init("dolly.jsonl", lines(rows), "llama")
    hint = caught.value.problems[0].hint or ""
    assert "{instruction: .instruction, input: .context, output: .response}" in hint


def test_lists_of_answers_are_for_encoder_decoders(init: Init) -> None:
    rows = [{"question": t, "answer": [u, f"{u} too"][: 1 + i % 2]}
            for i, (t, u) in enumerate(zip(T, U, strict=True))]  # fmt: skip
    with pytest.raises(LoraError, match="`answer` holds lists of answers") as caught:
        init("NQ.jsonl", lines(rows), "llama")
    assert "jq -c '.answer |= .[0]'" in str(caught.value.problems[0].hint)


def test_lists_of_few_different_answers_are_labels(init: Init) -> None:
    few = [{"question": t, "answer": ["yes", "no"][: 1 + i % 2]} for i, t in enumerate(T)]
    assert init("labels.jsonl", lines(few), "llama").task.type == "sequence_classification"


@pytest.mark.parametrize(
    ("asked", "answered"), [("qtext", "atext"), ("question", "answer"), ("query", "response")]
)
def test_questions_and_answers_with_a_label_are_pairs(
    init: Init, asked: str, answered: str
) -> None:
    rows = [{asked: t, "label": i % 2, answered: f"{u} and {i} more words"}
            for i, (t, u) in enumerate(zip(T, U, strict=True))]  # fmt: skip
    recipe = init("wikiqa.jsonl", lines(rows))
    assert (recipe.task.text_column, recipe.task.text_pair_column) == (asked, answered)


@pytest.mark.parametrize("answers", [("Yes<|endoftext|>", "No<|endoftext|>"), ("a;b", "b", "a")])
def test_completions_are_not_split_into_labels(init: Init, answers: tuple[str, ...]) -> None:
    rows = [{"prompt": t, "completion": answers[i % len(answers)]} for i, t in enumerate(T)]
    recipe = init("t0.jsonl", lines(rows), "llama")
    assert (recipe.task.prompt_column, recipe.task.completion_column) == ("prompt", "completion")


def test_labels_with_a_special_token_are_not_split(init: Init) -> None:
    rows = [{"text": t, "label": ["Yes<|end|>", "No<|end|>"][i % 2]} for i, t in enumerate(T)]
    assert init("marked.jsonl", lines(rows)).task.labels == ["No<|end|>", "Yes<|end|>"]


def test_an_object_with_all_rows_is_an_error(init: Init) -> None:
    whole = json.dumps({"version": "1.1", "data": [{"title": t, "n": 1} for t in T]})
    with pytest.raises(LoraError, match="stand inside `data`") as caught:
        init("squad.json", whole, "llama")
    assert "jq -c '.data[]'" in str(caught.value.problems[0].hint)


def test_single_messages_are_not_conversations(init: Init) -> None:
    rows = [
        {"message_id": f"{i}", "parent_id": f"{i - 1}", "role": f"role {i % 2}", "text": t}
        for i, t in enumerate(T)
    ]
    with pytest.raises(LoraError, match="one message of a conversation"):
        init("oasst.jsonl", lines(rows), "llama")


# -------------------------------------------------------------------------------- labels of lines


@pytest.mark.parametrize("seed", range(3))
def test_prose_has_no_labels(seed: int) -> None:
    prose = [
        f"{('the', 'a', 'this', 'what')[i % 4]} {text}" for i, text in enumerate(texts(200, seed))
    ]
    assert label_source(prose) is None
    talk = [f"{('Romeo', 'Juliet')[i % 2]}: {text}" for i, text in enumerate(texts(200, seed))]
    assert label_source(talk) is None
    assert label_source(texts(200, seed)) is None


@pytest.mark.parametrize(
    ("line", "how", "label", "text"),
    [
        ("DESC:def What is a leaf ?", "first_word", "DESC:def", "What is a leaf ?"),
        ("__label__a __label__b two words", "fasttext", "a b", "two words"),
        ("two words __label__a", "fasttext", "a", "two words"),
        ("no label", "fasttext", "", "no label"),
        ("word__label__a stays", "fasttext", "", "word__label__a stays"),
        ("alone", "first_word", "alone", ""),
    ],
)
def test_a_line_is_split_into_label_and_text(line: str, how: str, label: str, text: str) -> None:
    assert split_label(line, how) == (label, text)


# ------------------------------------------------------------------------------------- a folder


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def imdb(folder: Path) -> Path:
    files = {"README": "about", "imdb.vocab": "the", "train/urls_pos.txt": "http://x"}
    for i in range(60):
        label = "neg" if i % 2 else "pos"
        files[f"train/{label}/{i}_7.txt"] = f"{T[i]} {U[i]}\n\n{T[i]}"
        files[f"test/{label}/{i}_7.txt"] = f"{U[-i]}, again {i}"
        files[f"train/unsup/{i}_0.txt"] = f"{T[i]} without"
    return fill(folder, files)


@pytest.mark.slow
def test_one_folder_per_label(init: Init, tmp_path: Path) -> None:
    recipe = init("", imdb(tmp_path / "aclImdb"))
    assert said(recipe) == classification("text", "label", ["neg", "pos"], skip_labels=["unsup"])
    assert recipe.data.format.model_dump(exclude_defaults=True) == {"label_from": "folder"}
    assert recipe.data.test == "test"
    assert recipe.output_dir == "out/aclImdb"
    rows = load_rows(recipe)
    assert (len(rows["train"]) + len(rows["validation"]), len(rows["test"])) == (120, 60)
    assert rows["test"].place(0) == "neg/11_7.txt:1"
    task = build_task(recipe)
    task.load_processor()
    data = load_data(task)  # the rows of `unsup` are skipped, and counted
    assert sum(len(data[name].rows) for name in ("train", "validation")) == 60
    assert sum(len(data[name].rows.skipped) for name in ("train", "validation")) == 60
    assert task.labels == ["neg", "pos"]


def test_a_file_that_moves_to_another_label_is_read_again(init: Init, tmp_path: Path) -> None:
    recipe = init("", imdb(tmp_path / "aclImdb"))
    before = [row["label"] for row in load_rows(recipe)["test"]]
    (tmp_path / "aclImdb/test/neg/1_7.txt").rename(tmp_path / "aclImdb/test/pos/1_7.txt")
    after = [row["label"] for row in load_rows(recipe)["test"]]
    assert (before.count("neg"), after.count("neg")) == (30, 29)


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ({"train.csv": 0, "test.csv": 30, "README.md": None}, ["test"]),
        ({"data/train-00000-of-00001.csv": 0, "data/validation-00000-of-00001.csv": 30},
         ["validation"]),
        ({"train/a.csv": 0, "train/b.csv": 10, "dev/a.csv": 30, "test/a.csv": 40},
         ["validation", "test"]),
        ({"part-0.csv": 0, "part-1.csv": 10}, []),
        ({"rows.csv": 0, ".hidden.csv": 20, "licence.txt": None}, []),
    ],
)  # fmt: skip
def test_a_folder_of_tables(
    files: dict[str, int | None], splits: list[str], init: Init, tmp_path: Path
) -> None:
    contents = {}
    for name, start in files.items():
        rows = [[f"{T[i]} {i}", "ab"[i % 2]] for i in range(start or 0, (start or 0) + 10)]
        contents[name] = "about" if start is None else table(["text", "label"], rows)
    recipe = init("", fill(tmp_path / "rows", contents))
    assert said(recipe) == classification("text", "label", ["a", "b"])
    named = [split for split in ("validation", "test") if getattr(recipe.data, split) == split]
    assert named == splits


def test_a_folder_of_texts_is_one_text(init: Init, tmp_path: Path) -> None:
    texts_of = {f"book{i}.txt": "\n\n".join(T[i * 20 : i * 20 + 20]) for i in range(3)}
    recipe = init("", fill(tmp_path / "books", texts_of), "llama")
    assert said(recipe) == {"type": "causal_lm", "text_column": "text"}
    assert sum(map(len, load_rows(recipe).values())) == 60


# ---------------------------------------------------------------------------- contents of a draft


def test_a_draft_names_its_schema_and_its_folder(tmp_path: Path, bases: dict[str, Path]) -> None:
    (tmp_path / "messages.csv").write_text(
        table(["text", "label"], [[t, i % 2] for i, t in enumerate(T)])
    )
    runner, model = CliRunner(), str(bases["encoder"])
    source, target = str(tmp_path / "messages.csv"), tmp_path / "recipe.yaml"
    result = runner.invoke(app, ["init", source, "--model", model, "-o", str(target)])
    assert result.exit_code == 0, result.output
    first, *_ = target.read_text().splitlines()
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    assert load_recipe(target).output_dir == "out/messages"
    schema = tmp_path / "recipe.schema.json"
    expected = schema.read_text()
    assert set(yaml.safe_load(target.read_text())) <= set(json.loads(expected)["properties"])
    # the schema of another version is updated, but any other file stays
    schema.write_text('{"title": "lora recipe", "$defs": {}}')
    runner.invoke(app, ["init", source, "--model", model, "-o", str(tmp_path / "queues.yaml")])
    assert schema.read_text() == expected
    assert load_recipe(tmp_path / "queues.yaml").output_dir == "out/queues"
    schema.write_text('{"title": "mine"}')
    runner.invoke(app, ["init", source, "--model", model, "-o", str(tmp_path / "b.yaml")])
    assert schema.read_text() == '{"title": "mine"}'


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("ag_news/train.csv", "recipe.yaml", "out/ag_news"),
        ("reviews.jsonl.gz", "recipe.yaml", "out/reviews"),
        ("meine Daten (neu).csv", "recipe.yaml", "out/meine_Daten_neu"),
        ("映画.csv", "recipe.yaml", "out/映画"),
        ("reviews.csv", "spam.yaml", "out/spam"),
    ],
)
def test_the_output_folder_is_named_after_the_recipe_or_the_data(
    source: str, target: str, expected: str, tmp_path: Path, bases: dict[str, Path]
) -> None:
    import gzip

    content = table(["text", "label"], [[t, i % 2] for i, t in enumerate(T)])
    if "jsonl" in source:
        content = lines([{"text": t, "label": i % 2} for i, t in enumerate(T)])
    (tmp_path / source).parent.mkdir(exist_ok=True)
    raw = content.encode()
    (tmp_path / source).write_bytes(gzip.compress(raw) if source.endswith(".gz") else raw)
    draft = draft_recipe(tmp_path / source, str(bases["encoder"]), tmp_path / target)
    assert draft.values["output_dir"] == expected
