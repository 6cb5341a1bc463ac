"""Rows of well-known forms that no task reads: the command of the hint writes what it says."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import tiny_embedders
from drafting import Init, lines, needs_jq, run_hint, texts

from lora_cli.data.chat_formats import read_conversations
from lora_cli.errors import LoraError

T, U, V = (texts(40, seed) for seed in range(3))
Row = dict[str, Any]


def of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


GEMINI = [
    {
        "systemInstruction": {"role": "system", "parts": [{"text": "be "}, {"text": "kind"}]},
        "contents": [
            {"role": "user", "parts": [{"text": t}]},
            {"role": "model", "parts": [{"text": u}, {"text": "!"}]},
        ],
    }
    for t, u in zip(T, U, strict=True)
]


@needs_jq
@pytest.mark.parametrize("has_system", [True, False])
def test_turns_of_gemini(has_system: bool, init: Init, tmp_path: Path) -> None:
    rows = [row if has_system else {"contents": row["contents"]} for row in GEMINI]
    with pytest.raises(LoraError, match="inside `contents`") as caught:
        init("rows.jsonl", lines(rows), "llama")
    run_hint(caught.value, tmp_path)
    for row, t, u in zip(of(tmp_path / "messages.jsonl"), T, U, strict=True):
        (read,) = read_conversations(row, "openai", "messages")
        system = [{"role": "system", "content": "be kind"}] if has_system else []
        said = [{"role": "user", "content": t}, {"role": "assistant", "content": f"{u}!"}]
        assert read.messages == [*system, *said]


def passages(*found: str) -> list[Row]:
    return [{"docid": str(i), "title": "a", "text": text} for i, text in enumerate(found)]


LISTED = {
    "FlagEmbedding": [
        {"query": t, "pos": [u, f"{u} too"][: 1 + i % 2], "neg": [v, f"{v} too"],
         "pos_scores": [0.9, 0.8][: 1 + i % 2], "neg_scores": [0.1, 0.2]}
        for i, (t, u, v) in enumerate(zip(T, U, V, strict=True))],
    "Tevatron": [
        {"query_id": str(i), "query": t,
         "positive_passages": passages(*[u, f"{u} too"][: 1 + i % 2]),
         "negative_passages": passages(v, f"{v} too")}
        for i, (t, u, v) in enumerate(zip(T, U, V, strict=True))],
    "DPR": [
        {"question": t, "positive_ctxs": passages(*[u, f"{u} too"][: 1 + i % 2]),
         "negative_ctxs": passages(v), "hard_negative_ctxs": passages(f"{v} too")}
        for i, (t, u, v) in enumerate(zip(T, U, V, strict=True))],
}  # fmt: skip


@needs_jq
@pytest.mark.parametrize("name", LISTED)
def test_lists_of_positives(name: str, init: Init, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="a row of `text_embedding` has one positive") as caught:
        init("rows.jsonl", lines(LISTED[name]))
    run_hint(caught.value, tmp_path)
    assert of(tmp_path / "flat.jsonl") == [
        {"anchor": t, "positive": p, "negatives": [v, f"{v} too"]}
        for i, (t, u, v) in enumerate(zip(T, U, V, strict=True))
        for p in [u, f"{u} too"][: 1 + i % 2]
    ]
    task = init("", tmp_path / "flat.jsonl").task
    assert (task.type, task.negative_columns) == ("text_embedding", ["negatives"])


def test_triplets_of_simcse(init: Init, tmp_path: Path) -> None:
    keys = ("sent0", "sent1", "hard_neg")
    rows = [dict(zip(keys, row, strict=True)) for row in zip(T, U, V, strict=True)]
    task = init("nli.jsonl", lines(rows)).task
    assert (task.anchor_column, task.positive_column) == keys[:2]
    assert task.negative_columns == ["hard_neg"]


def test_pairs_of_simcse_with_a_base_that_embeds(init: Init, tmp_path: Path) -> None:
    base = tiny_embedders.save(tmp_path / "embedder")
    pairs = [{"sent0": t, "sent1": u} for t, u in zip(T, U, strict=True)]
    assert init("pairs.jsonl", lines(pairs), str(base)).task.type == "text_embedding"


@pytest.mark.parametrize(
    ("prompt", "completion", "separator"),
    [
        ("{}\n\n###\n\n", " {} END", ""), ("\n\nHuman: {}\n\nAssistant:", " {}", ""),
        ("Q: {}\nA: ", "{}", ""), ("{}", "{}", "\n"),
    ],
)  # fmt: skip
def test_prompts_that_end_with_a_space_of_their_own(
    prompt: str, completion: str, separator: str, init: Init
) -> None:
    rows = [{"prompt": prompt.format(t), "completion": completion.format(u)}
            for t, u in zip(T, U, strict=True)]  # fmt: skip
    assert init("rows.jsonl", lines(rows), "llama").task.separator == separator


SENTENCES = [t.split() for t in T]
TAGS = [["O"] * (i % 3) + ["B-PER", "I-PER"] + ["O"] * (len(w) - 2 - i % 3)
        for i, w in enumerate(SENTENCES)]  # fmt: skip
TAGGED: dict[str, tuple[list[Row], str]] = {
    "tags as a text": ([{"text": " ".join(w), "labels": " ".join(t)}
                        for w, t in zip(SENTENCES, TAGS, strict=True)], "csv"),
    "tags as a list, words as a text": ([{"Sentence": " ".join(w), "POS": ["NN"] * len(w), "Tag": t}
                                         for w, t in zip(SENTENCES, TAGS, strict=True)], "jsonl"),
    "Kaggle's, in a table": ([{"Sentence": " ".join(w), "POS": str(["NN"] * len(w)), "Tag": str(t)}
                              for w, t in zip(SENTENCES, TAGS, strict=True)], "csv"),
    "GLiNER's": ([{"tokenized_text": w, "ner": [[i % 3, i % 3 + 1, "PER"]]}
                  for i, w in enumerate(SENTENCES)], "jsonl"),
    "behind the last word": ([{"tokens": [*w[: i % 3], "Ann", "Lee"],
                               "entities": [[i % 3, i % 3 + 2, "PER"]]}
                              for i, w in enumerate(SENTENCES)], "jsonl"),
}  # fmt: skip


@needs_jq
@pytest.mark.parametrize("name", TAGGED)
def test_words_and_their_tags(name: str, init: Init, tmp_path: Path) -> None:
    rows, form = TAGGED[name]
    path = tmp_path / f"rows.{form}"
    pandas.DataFrame(rows).to_csv(path, index=False) if form == "csv" else path.write_text(
        lines(rows)
    )
    with pytest.raises(LoraError, match=r"each word of the text|count words") as caught:
        init("", path)
    run_hint(caught.value, tmp_path)
    recipe = init("", tmp_path / "flat.jsonl")
    assert recipe.task.type == "token_classification"
    written = of(tmp_path / "flat.jsonl")
    words, tags = recipe.task.tokens_column, recipe.task.tags_column
    if name == "behind the last word":
        wanted = [["O"] * (i % 3) + ["B-PER", "I-PER"] for i in range(40)]
        assert [row[tags] for row in written] == wanted
        return
    assert [row[words] for row in written] == SENTENCES
    read = [row[tags] if isinstance(row[tags], list) else ast.literal_eval(row[tags])
            for row in written]  # fmt: skip
    assert read == TAGS


@pytest.mark.parametrize("value", [1, 2.5, True, "PER", {"PER": [0, 1]}, [3], ["PER"], None])
@pytest.mark.parametrize("key", ["label", "ner", "entities"])
def test_words_beside_what_is_no_tag_and_no_place(key: str, value: object, init: Init) -> None:
    rows = [{"tokens": words, key: value} for words in SENTENCES]
    with pytest.raises(LoraError, match=r"no column holds text|columns stand inside"):
        init("rows.jsonl", lines(rows))


def test_prose_with_labels_has_no_tags(init: Init) -> None:
    rows = [{"text": t, "labels": ["B-PER", "O"][i % 2]} for i, t in enumerate(T)]
    assert init("rows.jsonl", lines(rows)).task.type == "sequence_classification"
