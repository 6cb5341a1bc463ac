"""Recipes that `lora init` drafts for typical files, each checked with its data."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from drafting import (
    OPINIONS,
    SHARED,
    Init,
    classification,
    labelled,
    lines,
    said,
    table,
    texts,
)
from transformers import LlamaConfig, MambaConfig, PretrainedConfig, RwkvConfig

from lora_cli.data.load_rows import load_rows
from lora_cli.errors import LoraError
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_recipe
from lora_cli.recipe.spec import HeldOutSpec
from lora_cli.recipe_draft import draft_recipe, reject_existing
from lora_cli.tasks import build_task

# ------------------------------------------------------------------------------------ file formats


def test_semicolons_in_latin_1_without_a_header(init: Init) -> None:
    words = ["très réussi, à voir", "histoire fade, hélas", "garçon étonnant", "scène gênante"]
    rows = [
        [f"{words[i % 4]} {text}", ["bon", "mauvais"][i % 2]] for i, text in enumerate(texts(40))
    ]
    recipe = init("avis.csv", table(None, rows, ";").encode("latin-1"))
    form = recipe.data.format
    assert (form.encoding, form.delimiter, form.header) == ("cp1252", ";", False)
    assert form.columns == ["text", "label"]
    assert said(recipe) == classification("text", "label", ["bon", "mauvais"])


def test_tabs_with_quotes(init: Init) -> None:
    rows = [[f'she said "{text}"\nand left', label] for text, label in labelled(40, ["yes", "no"])]
    recipe = init("said.csv", table(["text", "label"], rows, "\t"))
    assert recipe.data.format.delimiter == "\t"
    assert recipe.data.on_bad_row == "error"
    assert said(recipe) == classification("text", "label", ["no", "yes"])


def test_a_tsv_needs_no_delimiter(init: Init) -> None:
    recipe = init("rows.tsv", table(["sentence", "label"], labelled(40, [0, 1]), "\t"))
    assert recipe.data.format.model_dump(exclude_defaults=True) == {}
    assert said(recipe) == classification("sentence", "label", [0, 1])


def test_bars_in_a_file_with_an_unknown_extension(init: Init) -> None:
    recipe = init("rows.dat", table(["text", "label"], labelled(40, ["a", "b"]), "|"))
    form = recipe.data.format
    assert (form.type, form.delimiter) == ("csv", "|")


JAPANESE = [
    "この映画はとても面白かった",
    "つまらない作品でした",
    "音楽が素晴らしいと思う",
    "脚本がひどくて退屈だ",
]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("encoding", ["cp932", "utf-16", "utf-8-sig", "utf-16-le", "euc_jp"])
def test_japanese(init: Init, encoding: str) -> None:
    rows = [[f"{JAPANESE[i % 4]}、{i}回見ました", ["良い", "悪い"][i % 2]] for i in range(40)]
    recipe = init("映画.csv", table(["本文", "ラベル"], rows).encode(encoding))
    assert recipe.data.format.encoding == encoding.replace("utf-8-sig", "utf-8")
    assert said(recipe) == classification("本文", "ラベル", ["悪い", "良い"])


@pytest.mark.parametrize("encoding", ["cp1251", "gb18030", "euc_kr"])
def test_other_scripts(init: Init, encoding: str) -> None:
    phrase = {
        "cp1251": "Фильм очень хороший, советую", "gb18030": "这部电影非常好看我很喜欢",
        "euc_kr": "이 영화는 정말 재미있었다",
    }[encoding]  # fmt: skip
    rows = [[f"{phrase} {text}", "ab"[i % 2]] for i, text in enumerate(texts(40))]
    recipe = init("rows.csv", table(["text", "label"], rows).encode(encoding))
    assert recipe.data.format.encoding == encoding


def test_a_compressed_file(init: Init) -> None:
    content = gzip.compress(table(["text", "label"], labelled(40, ["a", "b"]), ";").encode())
    assert init("rows.csv.gz", content).data.format.delimiter == ";"


def test_empty_lines_are_not_rows(init: Init) -> None:
    content = table(["text", "label"], labelled(40, ["a", "b"])).replace("\n", "\n\n")
    assert init("rows.csv", content).data.on_bad_row == "error"


def test_unusable_rows_are_skipped(init: Init, tmp_path: Path) -> None:
    rows = [*labelled(40, ["a", "b"]), ["a text without a label", ""], ["too", "many", "fields"]]
    recipe = init("rows.csv", table(["text", "label"], rows))
    assert recipe.data.on_bad_row == "skip"
    comment = (tmp_path / "recipe.yaml").read_text()
    assert "1 row cannot be read, the first at rows.csv:43" in comment
    assert "1 row lacks a text or a label" in comment


def test_epochs_depend_on_the_number_of_train_rows(init: Init, tmp_path: Path) -> None:
    rows = [*labelled(24, ["a", "b"]), *([f"a text without a label {i}", ""] for i in range(600))]
    init("rows.csv", table(["text", "label"], rows))
    assert "for 24 rows" in (tmp_path / "recipe.yaml").read_text()


def test_one_column_of_text_without_a_header(init: Init) -> None:
    content = "".join(f"{text}, and so on\n" for text in texts(20)) + "no comma here\n"
    recipe = init("lines.csv", content, "llama")
    assert recipe.data.format.type == "text"
    assert said(recipe) == {"type": "causal_lm", "text_column": "text"}


def test_one_column_of_text_with_a_header(init: Init) -> None:
    content = "text\n" + "".join(f"{text}, and so on, {i}\n" for i, text in enumerate(OPINIONS * 3))
    recipe = init("lines.csv", content, "llama")
    assert recipe.data.format.delimiter == "\t"
    assert said(recipe) == {"type": "causal_lm", "text_column": "text"}


def test_parquet(init: Init, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = labelled(40, [0, 1])
    columns = {"review": [text for text, _ in rows], "stars": [label for _, label in rows]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    recipe = init("", tmp_path / "rows.parquet")
    assert said(recipe) == classification("review", "stars", [0, 1])


def test_a_json_list_by_another_name(init: Init) -> None:
    rows = [{"text": text, "label": label} for text, label in labelled(40, ["a", "b"])]
    assert init("rows.txt", json.dumps(rows, indent=1)).data.format.type == "json"


def test_duplicate_column_names(init: Init) -> None:
    rows = [[i, text, label, i] for i, (text, label) in enumerate(labelled(40, ["a", "b"]))]
    recipe = init("rows.csv", table(["n", "text", "label", "n"], rows))
    assert recipe.data.format.columns == ["n", "text", "label", "n_4"]


# ---------------------------------------------------------------------------------- label columns


def test_the_label_first(init: Init) -> None:
    rows = [[label, text] for text, label in labelled(40, ["ham", "spam"])]
    assert said(init("sms.csv", table(["v1", "v2"], rows))) == classification(
        "v2", "v1", ["ham", "spam"]
    )


def test_names_with_spaces_and_accents(init: Init) -> None:
    rows = labelled(40, ["Rückgabe", "Lieferung"])
    recipe = init("rows.csv", table(["Nachricht des Kunden: #1", "Kategorie"], rows))
    assert said(recipe) == classification(
        "Nachricht des Kunden: #1", "Kategorie", ["Lieferung", "Rückgabe"]
    )


def test_ratings_are_labels(init: Init) -> None:
    recipe = init("rows.csv", table(["text", "rating"], labelled(60, [1, 2, 3, 4, 5])))
    assert said(recipe) == classification("text", "rating", [1, 2, 3, 4, 5])


def test_scores_are_numbers(init: Init) -> None:
    rows = [[text, i / 7] for i, text in enumerate(texts(40))]
    recipe = init("rows.csv", table(["text", "score"], rows))
    assert said(recipe) == classification("text", "score", None, problem="regression")
    assert recipe.data.validation.stratify is False


def test_truth_values(init: Init) -> None:
    rows = [{"text": text, "is_spam": label} for text, label in labelled(40, [True, False])]
    assert said(init("rows.jsonl", lines(rows))) == classification(
        "text", "is_spam", ["false", "true"]
    )


def test_words_that_yaml_would_misread(init: Init) -> None:
    recipe = init("rows.csv", table(["text", "label"], labelled(40, ["no", "null", "1e3", "a: b"])))
    assert recipe.task.labels == ["1e3", "a: b", "no", "null"]


@pytest.mark.slow
def test_seventy_seven_labels(init: Init) -> None:
    names = [f"intent_{i:02}_of_many" for i in range(77)]
    recipe = init("rows.csv", table(["utterance", "intent"], labelled(77 * 20, names)))
    assert said(recipe) == classification("utterance", "intent", names)
    assert recipe.data.validation.stratify is True


def test_labels_of_a_single_row_are_not_stratified(init: Init) -> None:
    rows = [*labelled(300, ["a", "b"]), ["a text of its own kind", "c"], ["another one", "d"]]
    recipe = init("rows.csv", table(["text", "label"], rows))
    assert recipe.task.labels == ["a", "b", "c", "d"]
    assert recipe.data.validation.stratify is False
    assert recipe.data.test.stratify is False


def test_ids_dates_and_urls_are_left_out(init: Init) -> None:
    rows = [
        [
            f"T-{1000 + i}",
            f"2024-03-{i % 28 + 1:02}",
            f"https://example.org/{i}",
            i % 3,
            text,
            label,
        ]
        for i, (text, label) in enumerate(labelled(60, ["refund", "delivery"]))
    ]
    names = ["ticket", "date", "link", "agent_id", "message", "queue"]
    recipe = init("rows.csv", table(names, rows))
    assert said(recipe) == classification("message", "queue", ["delivery", "refund"])


def test_the_rows_of_a_customer_are_not_split(init: Init) -> None:
    rows = [[f"c{i % 30}", *row] for i, row in enumerate(labelled(90, ["a", "b"]))]
    recipe = init("rows.csv", table(["customer_id", "text", "label"], rows))
    assert recipe.data.validation.group_by == "customer_id"


def test_a_label_as_text_next_to_the_same_as_a_number(init: Init) -> None:
    rows = [[text, i % 2, ["bad", "good"][i % 2]] for i, text in enumerate(texts(40))]
    recipe = init("rows.csv", table(["text", "label", "label_name"], rows))
    assert recipe.task.label_column in ("label", "label_name")


def test_one_hot_columns(init: Init) -> None:
    rows = [[text, *(int(i % 3 == k) for k in range(3))] for i, text in enumerate(texts(60))]
    recipe = init("rows.csv", table(["text", "red", "green", "blue"], rows))
    assert recipe.task.label_columns == ["red", "green", "blue"]
    assert recipe.task.problem == "single_label"
    assert recipe.data.validation.stratify is True


def test_multi_hot_columns(init: Init) -> None:
    rows = [[i, text, i % 2, i % 3 == 0, 0 if i % 5 else 1] for i, text in enumerate(texts(60))]
    recipe = init("rows.csv", table(["id", "comment_text", "toxic", "rude", "threat"], rows))
    assert recipe.task.label_columns == ["toxic", "rude", "threat"]
    assert recipe.task.problem == "multi_label"


@pytest.mark.parametrize("separator", [";", "|", ","])
def test_several_labels_in_a_column(init: Init, separator: str) -> None:
    sets = [["drama"], ["drama", "war"], ["comedy"], ["comedy", "drama"], ["war"]]
    rows = [[text, separator.join(sets[i % 5])] for i, text in enumerate(texts(60))]
    recipe = init("rows.csv", table(["plot", "genres"], rows, "\t"))
    more = {"problem": "multi_label", "label_separator": separator}
    assert said(recipe) == classification("plot", "genres", ["comedy", "drama", "war"], **more)


def test_lists_of_labels(init: Init) -> None:
    rows = [{"text": t, "tags": [["a"], ["a", "b"], []][i % 3]} for i, t in enumerate(texts(40))]
    recipe = init("rows.jsonl", lines(rows))
    assert said(recipe) == classification("text", "tags", ["a", "b"], problem="multi_label")


@pytest.mark.parametrize(
    "names", [("premise", "hypothesis"), ("sentence1", "sentence2"), ("text_a", "text_b")]
)
def test_pairs(init: Init, names: tuple[str, str]) -> None:
    other = texts(60, seed=1)
    kinds = ["entailment", "neutral", "contradiction"]
    rows = [[i, *row[:1], other[i], row[1]] for i, row in enumerate(labelled(60, kinds))]
    recipe = init("nli.tsv", table(["idx", *names, "label"], rows, "\t"))
    more = {"text_pair_column": names[1]}
    assert said(recipe) == classification(names[0], "label", sorted(kinds), **more)


def test_pairs_without_a_header(init: Init) -> None:
    rows = [
        [a, b, "yn"[i % 2]] for i, (a, b) in enumerate(zip(texts(40), texts(40, 1), strict=True))
    ]
    recipe = init("pairs.tsv", table(None, rows, "\t"))
    assert recipe.data.format.columns == ["text", "text_2", "label"]
    assert recipe.task.text_pair_column == "text_2"


# ------------------------------------------------------------------------------ language models


@pytest.mark.parametrize("names", [("prompt", "completion"), ("question", "answer")])
def test_prompts(init: Init, names: tuple[str, str]) -> None:
    rows = [
        dict(zip(names, pair, strict=True)) for pair in zip(texts(40), texts(40, 1), strict=True)
    ]
    recipe = init("rows.jsonl", lines(rows), "llama")
    assert said(recipe) == {
        "type": "causal_lm", "prompt_column": names[0], "completion_column": names[1],
        "separator": "\n",
    }  # fmt: skip
    assert recipe.adapter.target_modules == "all-linear"


def turns(role: str, text: str, names: tuple[str, str]) -> list[dict[str, str]]:
    return [{role: names[0], text: "How is it?"}, {role: names[1], text: "It is great."}]


@pytest.mark.parametrize("write", [list, json.dumps, str])  # pandas writes lists like `str`
def test_messages(init: Init, write: Callable[[Any], Any]) -> None:
    chat = [[*turns("role", "content", ("user", "assistant"))] for _ in range(20)]
    for i, conversation in enumerate(chat):
        conversation[0] = {"role": "user", "content": f"How is film {i}?"}
    rows = [{"messages": write(c), "source": "web"} for c in chat]
    recipe = init("chat.jsonl", lines(rows), "llama")
    assert recipe.task.messages_column == "messages"
    assert recipe.task.format == "openai"
    assert recipe.task.chat_template.endswith("chatml.jinja")  # the tiny model has no chat template


@pytest.mark.parametrize("speaker", ["from", "role"])
def test_sharegpt(init: Init, speaker: str) -> None:
    rows = [
        {"id": i, "conversations": turns(speaker, "value", ("human", "gpt"))} for i in range(12)
    ]
    recipe = init("chat.json", json.dumps(rows), "llama")
    assert (recipe.task.messages_column, recipe.task.format) == ("conversations", "sharegpt")


@pytest.mark.parametrize("keys", [("human", "assistant"), ("input", "output")])
def test_pairs_of_questions_and_answers(init: Init, keys: tuple[str, str]) -> None:
    rows = [
        {"conversation": [dict(zip(keys, pair, strict=True))] * 2}
        for pair in zip(texts(20), texts(20, 1), strict=True)
    ]
    recipe = init("firefly.jsonl", lines(rows), "llama")
    assert (recipe.task.messages_column, recipe.task.format) == ("conversation", "pairs")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (
            {"id": "x", "system_prompt": "Be brief.", "question": "", "response": ""},  # OpenOrca
            {"system_prompt": "system", "question": "instruction", "response": "output"},
        ),
        (
            {"query": "", "response": "", "history": [["a b", "c d"]]},  # ms-swift
            {"query": "instruction", "response": "output"},
        ),
        ({"instruction": "", "output": "", "system_prompt": "Be brief."},
         {"system_prompt": "system"}),
        ({"prompt": "", "completion": "", "system": "", "history": []}, {}),  # no content
        ({"question": "", "response": "", "system": "Be brief.", "context": ""},
         {"question": "instruction", "context": "input", "response": "output"}),
    ],
)  # fmt: skip
def test_system_prompt_and_history_columns(
    init: Init, row: dict[str, Any], columns: dict[str, str]
) -> None:
    asked = {"question", "query", "instruction", "prompt"} & {*row}
    said = {"response", "output", "completion", "context"} & {*row}
    rows = [
        row | dict.fromkeys(asked, one) | dict.fromkeys(said, two)
        for one, two in zip(texts(20), texts(20, 1), strict=True)
    ]
    recipe = init("rows.jsonl", lines(rows), "llama")
    assert recipe.data.columns == columns
    assert recipe.task.format == ("alpaca" if columns else "openai")
    data = load_rows(recipe)
    for name in columns.values():
        assert name in data["train"].columns


def test_alpaca_without_instructions(init: Init) -> None:
    rows = [
        {"instruction": "" if i % 2 else one, "input": one if i % 2 else "", "output": two}
        for i, (one, two) in enumerate(zip(texts(20), texts(20, 1), strict=True))
    ]
    recipe = init("alpaca.json", json.dumps(rows), "llama")
    assert (recipe.task.format, recipe.data.on_bad_row) == ("alpaca", "error")
    task = build_task(recipe)
    task.load_processor()
    data = load_data(task)
    assert sum(split.rows_without_example for split in data.values()) == 0
    assert sum(len(split.rows) for split in data.values()) == 20


@pytest.mark.parametrize(
    ("who", "said", "form"),
    [
        ("speaker", "text", "speaker, content: .text"),
        ("from", "content", "from, content: .content"),
    ],
)
def test_turns_with_other_keys_get_a_command(init: Init, who: str, said: str, form: str) -> None:
    turns = [{who: "user", said: "Hi"}, {who: "bot", said: "Yes?"}]
    rows = [{"conversation": turns, "id": i} for i in range(12)]
    with pytest.raises(LoraError) as caught:
        init("talk.jsonl", lines(rows), "llama")
    wanted = f"{{messages: [.conversation[] | {{role: .{form}}}]}}"
    assert wanted in str(caught.value.problems[0].hint)


def test_problems_with_their_solution_and_a_number(init: Init) -> None:
    rows = [
        {"problem": one, "solution": two, "answer": str(i)}
        for i, (one, two) in enumerate(zip(texts(20), texts(20, 1), strict=True))
    ]
    recipe = init("numina.jsonl", lines(rows), "llama")
    assert (recipe.task.prompt_column, recipe.task.completion_column) == ("problem", "solution")


def test_alpaca(init: Init) -> None:
    rows = [
        {"instruction": text, "input": "", "output": answer}
        for text, answer in zip(texts(20), texts(20, 1), strict=True)
    ]
    recipe = init("alpaca.json", json.dumps(rows), "llama")
    assert recipe.task.format == "alpaca"
    assert recipe.data.on_bad_row == "error"


def test_running_text(init: Init) -> None:
    content = "\n\n".join(f"{text}\nand {text}" for text in texts(60))
    recipe = init("story.txt", content, "llama")
    assert recipe.data.format.sample_by == "paragraph"
    assert (recipe.data.train, recipe.data.validation) == ("train[:90%]", "train[90%:]")


def pair_of_files(folder: Path, names: tuple[str, str], count: int = 60) -> list[Path]:
    paths = [folder / name for name in names]
    for path, word in zip(paths, ("the ", "das "), strict=True):
        raw = "".join(f"{word}{text}\n" for text in texts(count)).encode()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return paths


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("train.en.gz", "train.de.gz"), ["en", "de"]),
        (("train_de.txt", "train_en.txt"), ["de", "en"]),
        (("source", "target"), ["source", "target"]),
        (("english.txt", "german.text"), ["english.txt", "german.text"]),
    ],
)
def test_two_parallel_files(
    names: tuple[str, str], columns: list[str], init: Init, tmp_path: Path
) -> None:
    first, second = pair_of_files(tmp_path, names)
    recipe = init("", first, "llama", second=second)
    assert said(recipe) == {
        "type": "causal_lm", "prompt_column": columns[0], "completion_column": columns[1],
        "separator": "\n",
    }  # fmt: skip
    rows = load_rows(recipe)
    assert (len(rows["train"]), len(rows["validation"])) == (48, 12)
    for row in rows["train"]:
        assert row[columns[1]] == "das " + row[columns[0]].removeprefix("the ")


@pytest.mark.parametrize("name", ["train.{}.gz", "train.en-de.{}.gz", "train.en-de.clean.{}.gz"])
def test_a_translation_next_to_a_text_is_mentioned(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    first, second = pair_of_files(tmp_path, (name.format("en"), name.format("de")))
    (tmp_path / name.format("fr")).write_bytes(gzip.compress(b"trop peu\n"))
    result = draft_recipe(first, str(bases["llama"]), tmp_path / "recipe.yaml").findings
    (also,) = [finding for name, finding in result if name == "also"]
    assert also.startswith(f"next to it, with as many lines: {second.name}; to learn to translate")
    rows = tmp_path / "my.rows.csv"
    rows.write_text(table(["text", "label"], labelled(40, "ab")))
    result = draft_recipe(rows, str(bases["encoder"]), tmp_path / "recipe.yaml").findings
    assert "also" not in dict(result)


def test_the_splits_of_parallel_files(init: Init, tmp_path: Path) -> None:
    first, second = pair_of_files(tmp_path, ("train.en", "train.de"))
    for count, split in enumerate(("val", "test_2016", "test_2017"), 3):
        for path in pair_of_files(tmp_path, (f"{split}.en", f"{split}.de"), count):
            path.write_text(path.read_text().replace(" ", f" {count} "))
    (tmp_path / "dev.en").write_text("alone\n")
    recipe = init("", first, "llama", second=second)
    assert [len(rows) for rows in load_rows(recipe).values()] == [60, 3, 4]
    assert Path(recipe.data.test).name == "test_2016.{en,de}"


def test_two_files_of_texts_and_labels(init: Init, tmp_path: Path) -> None:
    for split, count in (("train", 40), ("val", 6)):
        (tmp_path / f"{split}_text.txt").write_text("\n".join(texts(count, count)) + "\n")
        labels = "\n".join(f"{i % 3}" for i in range(count))
        (tmp_path / f"{split}_labels.txt").write_text(labels + "\n")
    files = [tmp_path / f"train_{one}.txt" for one in ("text", "labels")]
    recipe = init("", files[0], second=files[1])
    assert recipe.task.type == "sequence_classification"
    assert (recipe.task.text_column, recipe.task.label_column) == ("text", "labels")
    rows = load_rows(recipe)
    assert [row["text"] for row in rows["train"]] == texts(40, 40)
    assert [str(row["labels"]) for row in rows["train"]] == [f"{i % 3}" for i in range(40)]
    assert len(rows["validation"]) == 6


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"one\n", "b.de ends before line 2"),
        (b"one\ntwo\nthree\n", "b.en ends before line 3"),
        (b"", "the file is empty"),
        ("für\nüber\n".encode("cp1252"), "one file is in utf-8, the other in"),
    ],
)
def test_two_files_that_are_not_parallel(
    content: bytes, what: str, init: Init, tmp_path: Path
) -> None:
    (tmp_path / "b.en").write_text("for\nthe …\n")
    (tmp_path / "b.de").write_bytes(content)
    with pytest.raises(LoraError, match=what):
        init("", tmp_path / "b.en", "llama", second=tmp_path / "b.de")


def test_parallel_files_need_a_generative_model_and_one_folder(init: Init, tmp_path: Path) -> None:
    first, second = pair_of_files(tmp_path, ("a.en", "a.de"))
    with pytest.raises(LoraError, match="an encoder writes no text"):
        init("", first, second=second)
    (tmp_path / "other").mkdir()
    with pytest.raises(LoraError, match="are not two files of one folder"):
        init("", first, "llama", second=second.rename(tmp_path / "other" / "a.de"))


# -------------------------------------------------------------------------------- ambiguous files


def test_two_label_candidates_are_ambiguous(init: Init, tmp_path: Path) -> None:
    rows = [[t, "ab"[i % 2], "xyz"[i % 3], "uv"[i // 9 % 2]] for i, t in enumerate(texts(60))]
    content = table(["text", "colour", "size", "shape"], rows)
    with pytest.raises(LoraError) as caught:
        init("rows.csv", content)
    (problem,) = caught.value.problems
    assert problem.what == "which column is the label? It could be `colour` or `size` or `shape`"
    assert "--label COLUMN" in (problem.hint or "")
    assert not (tmp_path / "recipe.yaml").exists()
    assert init("rows.csv", content, label="size").task.label_column == "size"


def test_two_text_candidates_are_ambiguous(init: Init, tmp_path: Path) -> None:
    rows = list(zip(texts(40), texts(40, 1), strict=True))
    content = table(["left side", "right side"], rows)
    with pytest.raises(LoraError, match="which column is the text"):
        init("rows.csv", content, "llama")
    recipe = init("rows.csv", content, "llama", text="left side", label="right side")
    assert (recipe.task.prompt_column, recipe.task.completion_column) == ("left side", "right side")
    (tmp_path / "recipe.yaml").unlink()
    assert init("rows.csv", content, "llama", text="right side").task.text_column == "right side"


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Context", "Response"), ("prompt", "answer"), ("input_text", "target_text"),
        ("userMessage", "assistantMessage"), ("post", "highlights"), ("en", "de"), ("q", "a"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("answer_is_first", [False, True])
def test_a_long_text_and_its_answer_are_a_prompt_and_a_completion(
    prompt: str, completion: str, answer_is_first: bool, init: Init
) -> None:
    long, short = [f"{a} {b}" for a, b in zip(texts(40), texts(40, 2), strict=True)], texts(40, 1)
    names, columns = [prompt, completion], [long, short]
    if answer_is_first and prompt != "en":
        names, columns = names[::-1], columns[::-1]
    task = init("rows.csv", table(names, list(zip(*columns, strict=True))), "llama").task
    assert (task.prompt_column, task.completion_column) == (prompt, completion)


def test_a_system_prompt_next_to_two_texts_is_kept(init: Init) -> None:
    rows = list(zip(["Be kind."] * 40, texts(40), texts(40, 1), strict=True))
    recipe = init("rows.csv", table(["system_prompt", "Context", "Response"], rows), "llama")
    assert recipe.task.format == "alpaca"
    assert recipe.data.columns == {
        "system_prompt": "system", "Context": "instruction", "Response": "output"
    }  # fmt: skip


def test_numbers_that_are_answers_are_completions(init: Init) -> None:
    rows = [[text, i * 7 % 97] for i, text in enumerate(texts(60))]
    task = init("rows.csv", table(["problem", "final answer"], rows), "llama").task
    assert (task.prompt_column, task.completion_column) == ("problem", "final answer")


@pytest.mark.parametrize("names", [("original", "simplified"), ("passage", "question")])
def test_a_text_that_may_be_an_answer_is_not_left_out(names: tuple[str, str], init: Init) -> None:
    long, short = [f"{a} {b}" for a, b in zip(texts(40), texts(40, 2), strict=True)], texts(40, 1)
    content = table(names, list(zip(long, short, strict=True)))
    with pytest.raises(LoraError, match="which column is the text") as caught:
        init("rows.csv", content, "llama")
    assert "--text A --label B" in (caught.value.problems[0].hint or "")
    assert init("rows.csv", content, "llama", text=names[0]).task.text_column == names[0]


def test_a_title_next_to_a_text_is_left_out(init: Init) -> None:
    long = [" ".join([text] * 8) for text in texts(40)]
    content = table(["heading", "material"], list(zip(texts(40, 1), long, strict=True)))
    assert init("rows.csv", content, "llama").task.text_column == "material"


def test_label_none(init: Init) -> None:
    content = table(["text", "label"], labelled(40, ["a", "b"]))
    assert said(init("rows.csv", content, "llama", label="none"))["type"] == "causal_lm"


@pytest.mark.parametrize(
    ("content", "given", "what"),
    [
        ("", {}, "the file is empty"),
        ("text,label\n", {}, "the file has no rows"),
        (table(["id", "n"], [[i, i * 1.5] for i in range(30)]), {}, "no column holds text"),
        (
            table(["text"], [[t] for t in texts(20)]),
            {},
            "but no label, and the model is an encoder",
        ),
        (table(["text", "label"], labelled(20, "ab")), {"text": "txt"}, "did you mean `text`"),
        (table(["text", "label"], labelled(20, "a")), {"label": "label"}, "one value only"),
    ],
)
def test_what_cannot_be_learned_is_an_error(
    content: str, given: dict[str, str], what: str, init: Init, tmp_path: Path
) -> None:
    with pytest.raises(LoraError, match=what):
        init("rows.csv", content, **given)
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_recipe_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(LoraError, match="exists already") as caught:
        reject_existing(tmp_path / "recipe.yaml")
    assert "-o FILE" in (caught.value.problems[0].hint or "")


def test_a_missing_model(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(table(["text", "label"], labelled(40, ["a", "b"])))
    with pytest.raises(LoraError, match="there is no folder"):
        draft_recipe(tmp_path / "rows.csv", "./nothing", tmp_path / "recipe.yaml")


def test_lengths_are_estimated_for_an_unavailable_model(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(table(["text", "label"], labelled(40, ["a", "b"])))
    draft = draft_recipe(tmp_path / "rows.csv", "someone/model", tmp_path / "recipe.yaml")
    assert draft.values["model"] == {"name": "someone/model"}
    assert 32 <= draft.values["task"]["max_length"] <= 64
    assert "could not be fetched" in draft.why["task.max_length"]


def test_the_recipe_has_reasons(init: Init, tmp_path: Path) -> None:
    init("rows.csv", table(["text", "label"], labelled(40, ["a", "b"]), ";"))
    text = (tmp_path / "recipe.yaml").read_text()
    assert "text_column: text  # the longest text (mean" in text
    assert "labels: [a, b]  # 2 labels; 20 rows of each" in text
    assert "delimiter: ;  # a semicolon gives every row 2 fields" in text
    assert yaml.safe_load(text)["data"]["path"] == "rows.csv"


# ------------------------------------------------------------------------------------ real files

MESSAGES = {"type": "causal_lm", "format": "self_instruct", "truncate": "left"}
PLAIN = {"type": "causal_lm", "text_column": "text"}
PROMPTS = {
    "type": "causal_lm", "prompt_column": "question", "completion_column": "answer",
    "separator": "\n", "truncate": "left",
}  # fmt: skip
DRAWN = None


def thinned(file: Path, folder: Path) -> Path:
    """Copy a file, and those beside it; of the longest, a part of the lines, so that it is quick.

    (SST-2 and Multi30k have a row a line.)
    """
    for other in file.parent.iterdir():
        if other.is_file() and other.suffix in (file.suffix, ".zip"):
            opener: Any = gzip.open if other.suffix == ".gz" else open
            with opener(other, "rb") as content:
                result = content.readlines()
            target = folder / other.name
            most, step = (2_000, 5) if other.suffix == ".jsonl" else (20_000, 20)
            if len(result) > most and other.name.startswith("train"):
                with opener(target, "wb") as out:
                    out.writelines([result[0], *result[1::step]])
            else:
                shutil.copyfile(other, target)
    return folder / file.name


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data sets")
@pytest.mark.parametrize(
    ("file", "model", "expected", "validation", "test"),
    [
        ("sst2/train.tsv", "encoder", classification("sentence", "label", [0, 1]), "dev.tsv",
         "test_labeled.tsv"),
        ("sst2/sentences_train.tsv", "encoder", classification("text", "label", [0, 1]), DRAWN,
         DRAWN),
        ("sst2/test_labeled.tsv", "llama", classification("sentence", "label", [0, 1]), DRAWN,
         DRAWN),
        ("banking77/train.csv", "encoder", {"label_column": "category"}, DRAWN, "test.csv"),
        ("gsm8k/train.jsonl", "llama", PROMPTS, DRAWN, "test.jsonl"),
        ("self_instruct/seed_tasks.jsonl", "llama", MESSAGES, DRAWN, "none"),
        ("self_instruct/seed_tasks.jsonl", "encoder",
         classification("instruction", "is_classification", ["false", "true"]), DRAWN, "none"),
        ("self_instruct/user_oriented_instructions.jsonl", "llama", MESSAGES, DRAWN, DRAWN),
        ("tinyshakespeare/input.txt", "llama", PLAIN, "train[90%:]", "none"),
        ("multi30k/train.en.gz", "llama", PLAIN, "val.en.gz", "test_2016_flickr.en.gz"),
        ("multi30k/test_2017_flickr.fr.gz", "llama", PLAIN, DRAWN, DRAWN),
        ("fsdd/metadata.csv", "llama", PLAIN, DRAWN, "none"),
        ("speech_jfk/transcript.txt", "llama", PLAIN, "none", "none"),
    ],
)  # fmt: skip
def test_real_files(
    file: str, model: str, expected: dict[str, Any], validation: str | None, test: str | None,
    init: Init, tmp_path: Path,
) -> None:  # fmt: skip
    recipe = init("", thinned(SHARED / file, tmp_path), model)
    result = said(recipe)
    result.pop("chat_template", None)
    if "category" in expected.values():
        assert (recipe.task.label_column, len(recipe.task.labels)) == ("category", 77)
    else:
        assert result == expected
    for wanted, held in ((validation, recipe.data.validation), (test, recipe.data.test)):
        if wanted is DRAWN:
            assert isinstance(held, HeldOutSpec)
        else:
            assert (Path(held).name if held else "none") == wanted


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data sets")
@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("fsdd/metadata.csv", "the rows are about files of sound or pictures"),
        ("fsdd/recordings.zip", "an Excel workbook or another zip archive"),
        ("speech_jfk/jfk.flac", "this is sound"),
        ("mnist_test/t10k-images-idx3-ubyte.gz", "this is not text"),
        ("gsm8k/train.jsonl", "the model is an encoder"),
    ],
)
def test_real_files_for_generative_models_only(file: str, what: str, init: Init) -> None:
    with pytest.raises(LoraError, match=what):
        init("", SHARED / file)


def test_the_recipe_can_be_trained(init: Init, tmp_path: Path) -> None:
    from lora_cli.training import train

    init("rows.csv", table(None, labelled(40, ["bon", "mauvais"]), ";"))
    sets = ["train.epochs=null", "train.max_steps=2", f"output_dir={tmp_path / 'out'}"]
    report = train(load_recipe(tmp_path / "recipe.yaml", sets), False)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert report


@pytest.mark.parametrize(
    ("config", "fits"), [(MambaConfig(), False), (RwkvConfig(), False), (LlamaConfig(), True)]
)
def test_a_base_that_cannot_get_the_head_is_rejected(
    tmp_path: Path, config: PretrainedConfig, fits: bool
) -> None:
    base = tmp_path / "base"
    config.save_pretrained(base)
    tiny.tokenizer("llama").save_pretrained(base)
    rows = table(["text", "label"], labelled(20, ["bad", "good"]))
    if fits:
        draft_recipe(written(tmp_path, rows), str(base), tmp_path / "recipe.yaml")
        return
    with pytest.raises(LoraError, match=r"cannot be used for `sequence_classification`") as caught:
        draft_recipe(written(tmp_path, rows), str(base), tmp_path / "recipe.yaml")
    assert caught.value.problems[0].at == "--model"


def written(folder: Path, text: str) -> Path:
    (folder / "rows.csv").write_text(text)
    return folder / "rows.csv"
