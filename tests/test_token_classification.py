"""Finding entities: alignment, rows and labels, loss and answers, drafts, the report."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from closeness import assert_close, assert_different
from peft import PeftModel
from test_entity_tags import ENTITIES, SCHEMES
from transformers import AutoModelForTokenClassification, BertForTokenClassification

from lora_cli.data.entity_spans import Span, end_inside_words
from lora_cli.data.entity_tags import (
    entities_of,
    iob2_labels,
    iob2_tags,
)
from lora_cli.data.numbered_labels import label_names
from lora_cli.errors import LoraError
from lora_cli.evaluation import evaluate_split
from lora_cli.evaluation.compare import compare
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.evaluation.evaluate_split import evaluate
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.evaluation.predict import answer, answer_file
from lora_cli.export.merge import merge_adapter
from lora_cli.metrics.entity_scores import entity_scores
from lora_cli.preprocessing.encode import check_data, load_data
from lora_cli.recipe import HeldOutSpec, Recipe, load_adapter_recipe, load_recipe
from lora_cli.recipe_draft import draft_recipe
from lora_cli.reporting.page_entities import entity_sections, per_type
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import IGNORED
from lora_cli.tasks.texts import word_windows
from lora_cli.tasks.texts.word_windows import (
    NO_TOKEN,
    Window,
    Words,
    complete_tags,
    places_of_tokens,
    windows_of,
    words_in,
    words_one_by_one,
)
from lora_cli.training import train

CPU = torch.device("cpu")
Json = dict[str, Any]
ROWS = [
    {"tokens": ["Ada", "met", "a", "warm", "cast"], "tags": ["B-PER", "O", "O", "B-ART", "I-ART"]},
    {"tokens": ["dull", "film"], "tags": ["O", "B-ART"]},
    {"tokens": ["Ada"], "tags": ["B-PER"]},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_encoder(tmp_path_factory.mktemp("base"))


def jsonl(path: Path, rows: Sequence[Json]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.name


def task_of(
    base: Path, tmp_path: Path, rows: Any = ROWS, data: Json | None = None, **task: Any
) -> Task:
    """Return a task with its tokenizer loaded; `rows` are rows, or the text of a CoNLL file."""
    if isinstance(rows, str):
        (tmp_path / "train.conll").write_text(rows, encoding="utf-8", newline="")
        path = "train.conll"
    else:
        path = jsonl(tmp_path / "train.jsonl", rows)
    sections = {"data": {"path": path, **(data or {})}, "evaluate": {"micro_batch_size": 2}}
    given = {"type": "token_classification", **task}
    made = build_task(load_recipe(tiny.recipe(base, tmp_path, task=given, **sections)))
    made.load_processor()
    return made


def model_of(task: Task, seed: int = 0) -> torch.nn.Module:
    model, _ = task.load_model(CPU)
    tiny.enliven(model, seed)
    return model.double().eval()


# ------------------------------------------------------------------------ alignment and windows


@pytest.mark.parametrize("kind", ["encoder", "wordpiece"])
def test_each_word_has_the_first_token_that_reaches_into_it(kind: str) -> None:
    tokenizer = tiny.wordpiece() if kind == "wordpiece" else tiny.tokenizer()
    words = ["the", "film", "\u200b", "is", "😀", "", "great", "great"]
    text = " ".join(words)
    places, at = [], 0
    for word in words:
        places.append((at, at + len(word)))
        at += len(word) + 1
    found = words_in(tokenizer, text, places)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert found.ids == offsets["input_ids"]
    for (start, end), first in zip(places, found.first, strict=True):
        inside = [i for i, (a, b) in enumerate(offsets["offset_mapping"]) if a < end and b > start]
        has_token = bool(inside) and bool(text[start:end].strip())
        assert first == (inside[0] if has_token else NO_TOKEN)
    used = [first for first in found.first if first != NO_TOKEN]
    assert used == sorted(set(used))
    assert len(used) >= 6


def test_words_that_share_a_token_are_predicted_once() -> None:
    text, tokenizer = "thefilm", tiny.wordpiece()  # one unknown token
    found = words_in(tokenizer, text, [(0, 3), (3, 7)])
    assert found.first == [0, NO_TOKEN]
    assert complete_tags(["B-A", None, "I-A"]) == ["B-A", "I-A", "I-A"]
    assert complete_tags(["B-A", None, "O"]) == ["B-A", "O", "O"]
    assert complete_tags([None, "I-A", None, None, "I-A", None]) == [
        "O", "I-A", "I-A", "I-A", "I-A", "O"
    ]  # fmt: skip
    assert complete_tags(["B-A", None, "B-A"]) == ["B-A", "O", "B-A"]


def test_words_without_tokens_are_warned_of(base: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["a", " fi", "lm"], "tags": ["O", "B-A", "O"]}] * 9 + ROWS
    for separator, warns in ((" ", False), ("", True)):
        task = task_of(base, tmp_path, rows, word_separator=separator)
        split = load_data(task)["train"]
        listed = [{**e, "row": i} for i, row in enumerate(rows) for e in task.encode([row])[0]]
        for examples in (split.examples, listed):
            _, warning = task.unknown_input("train", split.rows, examples)
            assert bool(warning) == warns
            if warns:
                assert "9 of 35 words of train have no token of their own" in str(warning)
                assert "train.jsonl:1" in str(warning)


def test_a_tokenizer_without_offsets_reads_word_by_word() -> None:
    tokenizer = tiny.wordpiece()
    found = words_one_by_one(tokenizer, ["the", " ", "film"])
    assert (found.ids, found.first) == (
        tokenizer("the film", add_special_tokens=False)["input_ids"], [0, NO_TOKEN, 1]
    )  # fmt: skip


@pytest.mark.parametrize("capacity", [1, 2, 5, 8, 13, 40])
def test_windows_hold_every_word_once_where_it_has_most_room(capacity: int) -> None:
    draw = random.Random(capacity)
    for count in (1, 7, 12, 13, 29):
        first = [i if draw.random() < 0.6 else NO_TOKEN for i in range(count)]
        first[0] = 0
        windows = windows_of(Words(list(range(count)), first), capacity)
        owned = [word for window in windows for word in window.words]
        assert sorted(owned) == [i for i in range(count) if first[i] != NO_TOKEN]
        assert all(window.end - window.start <= capacity for window in windows)
        for window in windows:
            for word in window.words:
                assert window.start <= first[word] < window.end
                if capacity >= 8:  # room on a side that is no end of the row
                    left = first[word] - window.start if window.start else 10**6
                    right = window.end - 1 - first[word] if window.end < count else 10**6
                    assert min(left, right) >= capacity // 4 - 1


def test_tokens_without_spaces_are_words() -> None:
    text = "東京 へ great film"
    places = places_of_tokens(tiny.tokenizer(), text)
    assert "".join(text[a:b] for a, b in places) == text.replace(" ", "")
    assert all(b <= c for (_, b), (c, _) in pairwise(places))


# ------------------------------------------------------------------------------- rows and labels


def test_the_same_entities_are_learned_from_every_form(base: Path, tmp_path: Path) -> None:
    names = ["O", "I-LOC", "B-LOC", "B-PER", "I-PER"]
    tags = {name: text.split() for name, text in SCHEMES.items()}
    words = [f"w{i}" for i in range(9)]
    text = " ".join(words)
    starts = [text.index(word) for word in words]
    spans = [[starts[e.start], starts[e.end - 1] + 2, e.label] for e in ENTITIES]
    forms: list[tuple[Any, Json]] = [
        ([{"tokens": words, "tags": some}], {}) for some in tags.values()
    ]
    numbers = [names.index(tag) for tag in tags["iob2"]]
    forms += [
        ([{"tokens": words, "tags": numbers}], {"tag_names": names}),
        ([{"tokens": json.dumps(words), "tags": str(tags["iob2"])}], {}),  # as a table has them
        ("".join(f"{w}\tx\t{t}\n" for w, t in zip(words, tags["iobes"], strict=True)), {}),
        ([{"text": text, "marks": spans}], {"text_column": "text", "spans_column": "marks"}),
    ]
    found = []
    for i, (rows, task) in enumerate(forms):
        (tmp_path / str(i)).mkdir()
        made = task_of(base, tmp_path / str(i), rows, **task)
        example = load_data(made)["train"].examples[0]
        marks = [made.labels[x] for x in example["labels"] if x >= 0]
        # where tokens are words, an entity has more tags
        found.append([e.label for e in entities_of(marks)])
        if i < len(forms) - 1:
            assert marks == iob2_tags(ENTITIES, 9)
        assert sorted(made.labels) == sorted(iob2_labels(["LOC", "PER"]))
        assert made.learned.task["labels"] == made.labels
    assert found == [[e.label for e in ENTITIES]] * len(forms)


def test_lists_of_class_labels_have_their_names() -> None:
    names = ["O", "B-PER", "I-PER"]
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")),
         "ner_tags": datasets.List(datasets.ClassLabel(names=names))}
    )  # fmt: skip
    assert label_names(features) == {"ner_tags": names}


@pytest.mark.parametrize(
    ("row", "task", "what"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, {}, "2 words in `tokens`, and 1 tag in `tags`"),
        ({"tokens": ["a"], "tags": ["I-PER"]}, {}, "no `B-PER` began (`--set task.scheme=iob1`"),
        ({"tokens": "a b", "tags": ["O"]}, {}, "`tokens` holds `a b`, not a list of words"),
        ({"tokens": ["a", {}], "tags": ["O"]}, {}, "something else than words in it"),
        ({"tokens": [], "tags": []}, {}, "holds no words"),
        ({"tokens": ["a"], "tags": "O"}, {}, "`tags` holds `O`, not a list of tags"),
        ({"tokens": ["a"], "tags": [3]}, {}, "numbers, and what they stand for is not known"),
        ({"tokens": ["a"], "tags": [3]}, {"tag_names": ["O", "B-PER", "I-PER"]}, "tags 0 to 2"),
        ({"tokens": ["a"], "tags": [None]}, {}, "tag 1 is blank, not a name"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(
    row: Json, task: Json, what: str, base: Path, tmp_path: Path
) -> None:
    made = task_of(base, tmp_path, [ROWS[0], ROWS[1], row], scheme="iob2", **task)
    with pytest.raises(LoraError) as caught:
        check_data(made, ("train",))
    (problem,) = caught.value.problems
    assert what in problem.what
    assert problem.at == "train.jsonl:3"


def test_a_few_broken_tags_do_not_make_another_scheme(base: Path, tmp_path: Path) -> None:
    broken = {"tokens": ["Ida", "x"], "tags": ["I-PER", "O"]}
    made = task_of(base, tmp_path, [*ROWS, broken])
    with pytest.raises(LoraError, match="continues an entity"):
        check_data(made, ("train",))
    made = task_of(base, tmp_path, [*ROWS, broken], data={"on_bad_row": "skip"})
    assert len(check_data(made, ("train",))["train"]) == 3
    made = task_of(base, tmp_path, [*ROWS, broken], scheme="iob1")
    rows = check_data(made, ("train",))["train"]
    assert made.labels_of(rows[3]) == ["PER"]


def test_types_that_train_lacks_are_errors(base: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "dev.jsonl", [ROWS[1], {"tokens": ["a"], "tags": ["B-PRE"]}])
    made = task_of(base, tmp_path, data={"validation": "dev.jsonl"})
    with pytest.raises(LoraError, match="`PRE` is not a type of entity") as caught:
        check_data(made, ("train", "validation"))
    assert caught.value.problems[0].at == "dev.jsonl:2"
    assert "did you mean `PER`" in str(caught.value)


def test_kept_rows_follow_the_labels_when_train_has_a_new_type(base: Path, tmp_path: Path) -> None:
    dev = {"validation": jsonl(tmp_path / "dev.jsonl", ROWS)}
    for more in ([], [{"tokens": ["x", "y"], "tags": ["B-AAA", "O"]}]):
        task = task_of(base, tmp_path, [*ROWS, *more], dev)
        kept = load_data(task)["validation"].examples
        tags = [[task.labels[i] for i in e["labels"] if i != IGNORED] for e in kept]
        assert tags == [row["tags"] for row in ROWS]


@pytest.mark.parametrize(
    ("first", "then"),
    [("b-per", "i-per"), ("B.PER", "I.PER"), ("PER-B", "PER-I"), ("per_b", "per_i"),
     ("BPER", "IPER"), ("B\u2013PER", "I\u2013PER")],
)  # fmt: skip
def test_marks_of_a_beginning_that_are_not_read_are_no_types(
    base: Path, tmp_path: Path, first: str, then: str
) -> None:
    rows = [{"tokens": ["Ada", "B", "met"], "tags": [first, then, "O"]}]
    with pytest.raises(LoraError, match="would be two types of entities"):
        load_data(task_of(base, tmp_path, rows))
    labels = ["O", *(f"{mark}-{kind}" for kind in (first, then) for mark in "BI")]
    assert load_data(task_of(base, tmp_path, rows, labels=labels))
    spans = [{"text": "Ada B met", "spans": [[0, 3, first], [4, 5, then]]}]
    texts = {"text_column": "text", "spans_column": "spans"}
    with pytest.raises(LoraError, match="would be two types of entities"):
        load_data(task_of(base, tmp_path, spans, **texts))


def test_a_b_where_train_has_none_is_told_how_to_read_it(base: Path, tmp_path: Path) -> None:
    dev = [{"tokens": ["a", "b"], "tags": ["I-PER", "B-PER"]}]
    data = {"validation": jsonl(tmp_path / "dev.jsonl", dev)}
    rows = [{"tokens": ["a", "b"], "tags": ["I-PER", "O"]}]
    with pytest.raises(LoraError, match=r"begins with B.*task.scheme=iob1"):
        load_data(task_of(base, tmp_path, rows, data))
    assert load_data(task_of(base, tmp_path, rows, data, scheme="iob1"))


def test_types_that_begin_alike_are_types(base: Path, tmp_path: Path) -> None:
    types = ["Bran", "Iran", "B-12", "BIO", "IIO2"]
    rows = [{"tokens": ["a", "b"], "tags": [f"B-{kind}", "O"]} for kind in types]
    assert load_data(task_of(base, tmp_path, rows))


def test_numbers_of_tags_are_asked_for_their_names(base: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"the tags are numbers") as error:
        load_data(task_of(base, tmp_path, "EU\t3\nrejects\t0\n\nIda\t1\n"))
    assert "task.tag_names" in str(error.value)


def test_a_tag_for_every_word_is_no_entity(base: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "film"], "tags": ["DET", "NOUN"]}] * 3
    with pytest.raises(LoraError, match="no word has the tag `O`"):
        check_data(task_of(base, tmp_path, rows), ("train",))


def test_a_train_split_without_entities_is_an_error(base: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["a"], "tags": ["O"]}]
    with pytest.raises(LoraError, match="no row of the train split has an entity in `tags`"):
        check_data(task_of(base, tmp_path, rows), ("train",))


def test_a_span_that_cuts_a_token_is_an_error_with_its_place(base: Path, tmp_path: Path) -> None:
    rows = [
        {"text": "a film", "spans": [[2, 6, "ART"]]},
        {"text": "a film", "spans": [[2, 4, "ART"]]},
    ]
    task = {"text_column": "text", "spans_column": "spans"}
    with pytest.raises(LoraError, match=r"2 to 4, `fi` .ART., cuts the token `film`") as caught:
        load_data(task_of(base, tmp_path, rows, **task))
    assert caught.value.problems[0].at == "train.jsonl:2"


@pytest.mark.parametrize("n_right", [0, 2])
def test_inclusive_ends_are_an_error_of_the_column(
    n_right: int, base: Path, tmp_path: Path
) -> None:
    wrong = [{"text": f"see film {i} now", "spans": [[4, 7, "ART"]]} for i in range(15)]
    rows = [{"text": "a film", "spans": [[2, 6, "ART"]]}] * n_right + wrong
    made = task_of(base, tmp_path, rows, text_column="text", spans_column="spans")
    if n_right:  # as many may be mistakes of their rows
        with pytest.raises(LoraError, match="cuts the token `film`"):
            load_data(made)
        return
    with pytest.raises(LoraError, match="nearly all spans lack the last letter") as caught:
        load_data(made)
    assert caught.value.problems[0].at.startswith("task.spans_column")
    with pytest.raises(LoraError, match="nearly all spans lack the last letter"):
        draft_recipe(tmp_path / "train.jsonl", str(base), tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("text", "span", "inside"),
    [
        ("Ada met Ida", (0, 3), False), ("Ada met Ida", (0, 2), True), ("met Ida", (4, 6), True),
        ("Ada's cat", (0, 3), False), ("서울에 산다", (0, 2), False), ("東京都に", (0, 2), False),
        ("Straße 5", (0, 5), True), ("see x1", (4, 5), True), ("cafes", (0, 3), False),
    ],
)  # fmt: skip
def test_which_spans_lack_the_last_letter(text: str, span: tuple[int, int], inside: bool) -> None:
    assert end_inside_words([(text, [Span(*span, "X")])] * 10) is inside
    assert not end_inside_words([(text, [Span(*span, "X")])] * 9)


def test_rows_that_an_annotator_put_aside_are_left_out(base: Path, tmp_path: Path) -> None:
    good = {"text": "a film", "spans": [[2, 6, "ART"]], "answer": "accept", "_task_hash": 1}
    rows = [good, {**good, "answer": "reject"}, {**good, "answer": "ignore"}]
    made = task_of(base, tmp_path, rows, text_column="text", spans_column="spans")
    assert len(check_data(made, ("train",))["train"]) == 1


@pytest.mark.parametrize(
    ("task", "what"),
    [
        ({"text_column": "text"}, "`text_column` and `spans_column` go together"),
        ({"text_column": "a", "spans_column": "b", "tags_column": "c"}, "for rows of words"),
        ({"text_column": "a", "spans_column": "b", "scheme": "io"}, "for rows of words"),
        ({"labels": ["O", "PER", "LOC"]}, "`labels` must be O and"),
        ({"labels": ["O", "B-PER", "I-PER", "O"]}, "appears 2 times"),
    ],
)
def test_keys_that_exclude_each_other_are_errors(
    task: Json, what: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(LoraError, match=what):
        task_of(base, tmp_path, ROWS, **task)


def test_equal_texts_with_other_entities_contradict(base: Path, tmp_path: Path) -> None:
    texts = task_of(base, tmp_path, ROWS, text_column="text", spans_column="spans")
    words = task_of(base, tmp_path)
    one = {"tokens": ["the", "the"], "tags": ["B-A", "O"], "text": "a a", "spans": [[0, 1, "A"]]}
    same = {"tokens": ["The", "the"], "tags": ["B-A", "O"], "text": "A a", "spans": [[0, 1, "A"]]}
    other = {"tokens": ["the", "the"], "tags": ["O", "B-A"], "text": "a a", "spans": []}
    for task in (words, texts):
        assert task.answer_of(one) == task.answer_of(same) != task.answer_of(other)


# ------------------------------------------------------------------------------ loss and answers


@pytest.mark.proves(
    "loss",
    task="token_classification",
    rows="words with tags",
    model="roberta",
    against="transformers",
)
def test_the_loss_is_that_of_transformers(base: Path, tmp_path: Path) -> None:
    task = task_of(base, tmp_path)
    split = load_data(task)["train"]
    model = model_of(task)
    assert type(model) is type(AutoModelForTokenClassification.from_config(model.config))
    batch = task.collate([split.examples[i] for i in range(3)])
    ours = task.losses(model, task.forward(model, batch), batch)["loss"]
    theirs = model(**batch.inputs, labels=batch.targets["labels"]).loss
    assert batch.items["loss"].tolist() == [5.0, 2.0, 1.0]
    assert_close(ours.double().sum() / batch.n_items, theirs)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_peft_reads_an_adapter_of_all_linear_layers(
    adapter: str, base: Path, tmp_path: Path
) -> None:
    """PEFT fails on its own `all-linear` with `TOKEN_CLS`: it adapts the classifier too."""
    jsonl(tmp_path / "train.jsonl", ROWS)
    sections = {
        "task": {"type": "token_classification"},
        "data": {"path": "train.jsonl"},
        "adapter": {"type": adapter, "rank": 2, "target_modules": "all-linear"},
        "train": {"max_steps": 3, "optimizer": {"learning_rate": 0.05}},
    }
    train(load_recipe(tiny.recipe(base, tmp_path, **sections)))
    out = tmp_path / "out"
    _, ours, _ = open_adapter(out, load_adapter_recipe(out))
    labels = ours.config.num_labels  # type: ignore[union-attr]
    plain = AutoModelForTokenClassification.from_pretrained(base, num_labels=labels)
    theirs = PeftModel.from_pretrained(plain, str(out)).eval()
    inputs = {"input_ids": torch.arange(5, 25)[None]}
    with torch.no_grad():
        found = ours(**inputs).logits
        assert_close(found, theirs(**inputs).logits)
        with theirs.disable_adapter():
            assert_different(found, theirs(**inputs).logits)


def long_row(count: int = 150) -> Json:
    words = [tiny.CORPUS[i % 8].split()[i % 3] for i in range(count)]
    tags = ["B-ART" if i % 5 == 0 else "I-ART" if i % 5 == 1 else "O" for i in range(count)]
    return {"tokens": words, "tags": tags}


def test_long_rows_are_one_prediction_across_windows(base: Path, tmp_path: Path) -> None:
    rows = [ROWS[0], long_row(), ROWS[1], long_row(90), ROWS[2]]
    task = task_of(base, tmp_path, rows, max_length=24)
    split = load_data(task)["train"]
    assert len(split) > 12
    model = model_of(task)
    kept: list[Any] = []
    found = evaluate(model, task, split, Accelerator(cpu=True), tmp_path / "said.jsonl", kept)
    assert [p.row for p in kept] == [0, 1, 2, 3, 4]
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [line["n_items"] for line in lines] == [5, 150, 2, 90, 1]
    # the same, from the model and the tokenizer alone
    tags, total = [], 0.0
    for row in rows:
        tagged_words = tags_by_hand(model, task, row)
        tags.append([tag for tag, _ in tagged_words])
        total += sum(loss for _, loss in tagged_words)
    wanted = [row["tags"] for row in rows]
    assert [p.metric_inputs["tags"] for p in kept] == list(zip(tags, wanted, strict=True))
    assert found["loss"] == pytest.approx(total / 248, rel=1e-5)
    expected = entity_scores(tags, wanted)
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def tags_by_hand(model: Any, task: Task, row: Json) -> list[tuple[str, float]]:
    """Return the tag and the loss of each word, from the window in which it has most context."""
    tokenizer = task.tokenizer  # type: ignore[attr-defined]
    text = " ".join(row["tokens"])
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, room, at, found = encoding["input_ids"], 22, 0, []
    starts = [*range(0, max(len(ids) - room, 0), room // 2), max(len(ids) - room, 0)]
    for word, tag in zip(row["tokens"], row["tags"], strict=True):
        first = next(i for i, (_, b) in enumerate(encoding["offset_mapping"]) if b > at)
        at += len(word) + 1

        def context(start: int, first: int = first) -> int:
            left = first - start if start else 10**6
            right = start + room - 1 - first if start + room < len(ids) else 10**6
            return min(left, right) if start <= first < start + room else -1

        start = max(starts, key=context)
        window = torch.tensor([[tiny.BOS, *ids[start : start + room], tiny.EOS]])
        with torch.no_grad():
            scores = model(input_ids=window).logits[0, 1 + first - start].log_softmax(-1)
        labels = task.labels
        found.append((labels[int(scores.argmax())], -float(scores[labels.index(tag)])))
    return found


def test_rows_are_joined_across_the_windows_of_the_evaluation(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(base, tmp_path, [long_row(), long_row(60), ROWS[0]], max_length=12)
    split, model = load_data(task)["train"], None
    model = model_of(task)
    whole: list[Any] = []
    evaluate(model, task, split, Accelerator(cpu=True), keep=whole)
    monkeypatch.setattr(evaluate_split, "WINDOW", 1)
    parts: list[Any] = []
    evaluate(model, task, split, Accelerator(cpu=True), keep=parts)
    assert [p.row for p in parts] == [0, 1, 2]
    for one, other in zip(whole, parts, strict=True):
        assert one.metric_inputs["tags"] == other.metric_inputs["tags"]
        assert one.losses["loss"] == pytest.approx(other.losses["loss"])
        assert one.metric_inputs["nll"] == pytest.approx(other.metric_inputs["nll"])


def test_answers_are_positions_in_the_typed_text(base: Path, tmp_path: Path) -> None:
    task = task_of(base, tmp_path)
    check_data(task, ("train",))
    model = model_of(task, seed=3)
    accelerator = Accelerator(cpu=True)
    typed = "  Ada met a  (warm) cast, a bore."
    rows = [task.parse_input(typed), {"tokens": ["a", "warm", "cast"]}, ROWS[0]]
    ((first,), (second,), (third,)) = answer(model, task, rows, accelerator)
    assert first
    assert all(typed[e["start"] : e["end"]] == e["text"].strip() == e["text"] for e in first)
    assert all(0 < e["score"] <= 1 and e["label"] in ("PER", "ART") for e in first)
    joined = "a warm cast"
    assert all(joined[e["start"] : e["end"]] == e["text"] for e in second)
    tags = tags_by_hand(model, task, ROWS[0])
    assert [e["label"] for e in third] == [e.label for e in entities_of([t for t, _ in tags])]
    assert json.loads(task.answer_line([first])) == first


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_files_of_every_kind_are_answered(suffix: str, base: Path, tmp_path: Path) -> None:
    task = task_of(base, tmp_path)
    check_data(task, ("train",))
    model = model_of(task, seed=3)
    (tmp_path / "new.conll").write_text("a\twarm\tO\n\n" + "Ada\tx\tO\nmet\tx\tB-PER\n\n" * 6)
    jsonl(tmp_path / "new.jsonl", [{"tokens": ["a"]}, {"tokens": "a warm cast"}, {"tokens": []}])
    (tmp_path / "new.txt").write_text("a warm cast\nAda met a bore\n")
    for name, count, bad in (("new.conll", 7, 0), ("new.jsonl", 3, 1), ("new.txt", 2, 0)):
        if suffix == ".parquet" and name == "new.jsonl":
            continue  # of JSON, parquet is not written
        target = tmp_path / f"said-{name}{suffix}"
        written, problems = answer_file(model, task, tmp_path / name, target, Accelerator(cpu=True))
        assert (written, len(problems)) == (count, bad)
        if suffix == ".jsonl":
            lines = [json.loads(line) for line in target.read_text().splitlines()]
            assert isinstance(lines[0]["prediction"], list)


def test_a_tokenizer_without_offsets_is_used_for_words_and_rejected_for_spans(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = task_of(base, tmp_path)
    fast_examples = list(load_data(fast)["train"].examples)
    monkeypatch.setattr(type(fast.tokenizer), "is_fast", False)  # type: ignore[attr-defined]
    slow = task_of(base, tmp_path)
    check_data(slow, ("train",))
    made = slow.encode(ROWS)
    for (example,), other in zip(made, fast_examples, strict=True):
        kept = [[x for x in e["labels"] if x >= 0] for e in (example, other)]
        assert kept[0] == kept[1]
    with pytest.raises(LoraError, match="does not say where its tokens stand"):
        task_of(base, tmp_path, ROWS, text_column="text", spans_column="spans")


def test_a_pretrained_tagger_keeps_its_rows_by_name(tmp_path: Path) -> None:
    config = tiny.encoder(None).config
    config.id2label = dict(enumerate(["I-ART", "B-PER", "O", "B-ART", "I-PER"]))
    config.label2id = {name: i for i, name in config.id2label.items()}
    model = tiny.enliven(BertForTokenClassification(config))
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    task = task_of(tmp_path / "base", tmp_path)
    check_data(task, ("train",))
    loaded, _ = task.load_model(CPU)
    order = [config.label2id[name] for name in task.labels]
    assert torch.equal(loaded.classifier.weight, model.classifier.weight[order])


def test_long_words_do_not_need_more_than_a_window(base: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["x" * 300, "y"], "tags": ["B-ART", "O"]}]
    task = task_of(base, tmp_path, rows, max_length=16)
    split = load_data(task)["train"]
    kept: list[Any] = []
    evaluate(model_of(task), task, split, Accelerator(cpu=True), keep=kept)
    assert kept[0].losses["loss"][1] == 2
    with pytest.raises(LoraError, match="leaves no room for a word"):
        load_data(task_of(base, tmp_path, rows, max_length=2))


@pytest.mark.slow
def test_two_taggers_are_compared_and_one_is_merged_and_used(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "tokens": [*row["tokens"], f"x{i}"], "tags": [*row["tags"], "O"]}
            for i in range(4) for row in ROWS]  # fmt: skip
    data = {"train": jsonl(tmp_path / "train.jsonl", rows[:6]),
            "test": jsonl(tmp_path / "test.jsonl", rows[6:])}  # fmt: skip
    task = {"type": "token_classification", "max_length": 16}
    adapter = {"rank": 4, "target_modules": "all-linear"}
    path = tiny.recipe(base, tmp_path, task=task, data=data, adapter=adapter)
    for seed in (0, 1):
        sets = [f"output_dir={tmp_path / f'out{seed}'}", f"train.seed={seed}"]
        sets += ["train.optimizer.learning_rate=0.01", "train.max_steps=6"]
        train(load_recipe(path, sets), False)
    new, old = tmp_path / "out1", tmp_path / "out0"
    recipe = load_adapter_recipe(new)
    assert recipe.task.scheme == "iob2"  # type: ignore[union-attr]
    found = compare(new, old, load_adapter_recipe(new))
    measured = evaluate_adapter(new, load_adapter_recipe(new))["test"]
    assert (found.metric, found.rows) == ("f1", 6)
    assert found.new == pytest.approx(measured["f1"])
    lines = (new / "predictions" / "test.jsonl").read_text().splitlines()
    assert len(lines) == 6
    card = (new / "README.md").read_text()
    assert "AutoModelForTokenClassification" in card
    assert "num_labels=len(labels)" in card
    page = (new / "report.html").read_text()
    assert "By type of entity" in page
    merge_adapter(None, new, tmp_path / "merged")
    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    assert list(merged.config.id2label.values()) == recipe.task.labels  # type: ignore[union-attr]


# -------------------------------------------------------------------------------------- drafts

SCHEME_KEYS = {"tokens_column": "tokens", "tags_column": "tags", "scheme": "iob2"}


def drafted(base: Path, tmp_path: Path, name: str, content: str) -> tuple[Json, dict[str, str]]:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    draft = draft_recipe(tmp_path / name, str(base), tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text(draft.text(), encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    checked = build_task(recipe)
    check_data(checked, ("train",))
    task = checked.completed_recipe.task.model_dump(
        exclude={"type", "max_length"}, exclude_unset=True
    )
    return task, dict(draft.findings)


CONLL = "".join(f"Ada{i} NN B-PER\nmet{i} VB O\nRome{i} NN B-LOC\n\n" for i in range(30))
LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


@pytest.mark.parametrize("name", ["train.conll", "rows.txt", "rows.tsv", "rows"])
def test_init_drafts_a_recipe_for_conll_files(name: str, base: Path, tmp_path: Path) -> None:
    content = CONLL.replace(" ", "\t") if name.endswith("tsv") else CONLL
    task, said = drafted(base, tmp_path, name, content)
    assert task == {**SCHEME_KEYS, "labels": LABELS}
    assert said["task"] == "token_classification: entities in texts"
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.train.optimizer.learning_rate == 5e-4  # half of that of a classifier
    assert said["scheme"] == "`iob2`, by the prefixes of the tags: B"
    assert said["file"].startswith("a word a line, utf-8: 30 rows, 3 columns")
    assert "`column_2`" in said["left out"]


def test_init_takes_the_splits_next_to_a_conll_file(base: Path, tmp_path: Path) -> None:
    (tmp_path / "dev.conll").write_text(CONLL.replace("Ada", "Ida"))
    drafted(base, tmp_path, "train.conll", CONLL.replace("B-", "I-"))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.task.scheme == "io"  # type: ignore[union-attr]
    # tags in another scheme cannot be read beside it
    assert isinstance(recipe.data.validation, HeldOutSpec)
    drafted(base, tmp_path, "train.conll", CONLL)
    validation = load_recipe(tmp_path / "recipe.yaml").data.validation
    assert isinstance(validation, str)
    assert Path(validation).name == "dev.conll"


def test_init_takes_the_columns_that_the_user_names(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("".join(" ".join(reversed(line.split())) + "\n"
                                              for line in CONLL.splitlines()))  # fmt: skip
    found = draft_recipe(
        tmp_path / "a.conll", str(base), tmp_path / "recipe.yaml", text="tags", label="tokens"
    )
    task = found.values["task"]
    assert (task["tokens_column"], task["tags_column"]) == ("tags", "tokens")
    with pytest.raises(LoraError, match="no column holds text"):
        draft_recipe(tmp_path / "a.conll", str(base), tmp_path / "recipe.yaml")


def test_init_reads_lists_of_a_table(base: Path, tmp_path: Path) -> None:
    row = "\"['Ada', 'x{}']\";\"['B-PER', 'O']\"\n"
    lines = "tokens;tags\n" + "".join(row.format(i) for i in range(30))
    task, _ = drafted(base, tmp_path, "a.csv", lines)
    assert task == {**SCHEME_KEYS, "labels": ["O", "B-PER", "I-PER"]}


def test_init_takes_no_marks_of_beginnings_for_types(base: Path, tmp_path: Path) -> None:
    words = "".join(f"Ada{i} b-per\nB{i} i-per\nmet{i} O\n\n" for i in range(30))
    with pytest.raises(LoraError, match="would be two types of entities"):
        drafted(base, tmp_path, "b.conll", words)


def test_init_finds_entities_in_json(base: Path, tmp_path: Path) -> None:
    rows = [
        {"id": i, "tokens": ["Ada", f"x{i}"], "pos_tags": ["NN", "O"], "ner_tags": ["PER", "O"]}
        for i in range(30)
    ]
    task, _ = drafted(base, tmp_path, "a.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    assert (task["tags_column"], task["scheme"]) == ("ner_tags", "io")
    texts = [
        {"id": i, "text": f"Ada met number {i}", "label": [[0, 3, "PER"]] if i % 3 else []}
        for i in range(30)
    ]
    bad = {"id": 99, "text": "x", "label": [[0, 9, "PER"]]}
    lines = "".join(json.dumps(row) + "\n" for row in [*texts, bad])
    task, said = drafted(base, tmp_path, "b.jsonl", lines)
    labels = ["O", "B-PER", "I-PER"]
    assert task.pop("scheme") == "iob2"  # what spans are read as
    assert task == {"text_column": "text", "spans_column": "label", "labels": labels}
    assert "1 row" in said["skipped"]


def test_lists_of_topics_are_no_tags(base: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"a long text of {i} words", "labels": ["dull", "warm"][: 1 + i % 2]}
        for i in range(60)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft = draft_recipe(tmp_path / "a.jsonl", str(base), tmp_path / "recipe.yaml")
    assert draft.values["task"]["type"] == "sequence_classification"


# ---------------------------------------------------------------------------------- the report


def test_the_page_counts_types_and_marks_errors() -> None:
    person = {"start": 0, "end": 3, "label": "PER", "text": "Ada"}
    place = {"start": 4, "end": 8, "label": "LOC", "text": "<Rom"}
    lines = [
        {"reference": [person], "prediction": [{**person, "score": 0.9}], "text": "Ada", "loss": 1},
        {"reference": [person, place], "prediction": [{**place, "label": "PER"}],
         "text": "Ada <Rom", "loss": 2.0, "place": "a.conll:3"},
        {"reference": [], "prediction": [], "text": "x", "loss": 9.0},
    ]  # fmt: skip
    found = {s.label: (s.precision, s.recall, s.f1, s.rows, s.called) for s in per_type(lines)}
    assert found == {"PER": (0.5, 0.5, 0.5, 2, 2), "LOC": (None, 0.0, 0.0, 1, 0)}
    types, errors = entity_sections(lines, "test")
    assert ">PER<" in types
    assert errors.count("<li>") == 1
    assert errors.count('class="entity wrong"') == 3
    assert "<b>2</b> not found" in errors
    assert "<b>1</b> not in the data" in errors
    assert "&lt;Rom" in errors
    assert "<Rom" not in errors


def test_the_usage_code_runs(base: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"model": {"name": "x"}, "task": {"type": "token_classification"},
         "data": {"path": "a.conll"}, "adapter": {"rank": 2}}
    )  # fmt: skip
    labels = ["O", "B-PER", "I-PER"]
    usage = recipe.task.usage(labels, None)
    assert usage is not None
    assert recipe.task.usage([], None) is None
    model = tiny.enliven(BertForTokenClassification(tiny.encoder(None).config))
    model.config.id2label = dict(enumerate([*labels]))
    said: list[tuple[Any, ...]] = []
    values = {"tokenizer": tiny.tokenizer(), "model": model, "torch": torch}
    exec(usage.code, values | {"print": lambda *x: said.append(x)})
    pieces = tiny.tokenizer().tokenize("Some text", add_special_tokens=False)
    words = [pieces[0], next(p for p in pieces if p.startswith("Ġt") or p == "t")]
    assert [word for word, _ in said] == [word.removeprefix("Ġ") for word in words]
    assert {tag for _, tag in said} <= set(labels)


# ------------------------------------------------------------------------ one value at a time


class Marks:
    """A tokenizer that says where its tokens stand as a test wants it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, offsets: list[tuple[int, int]]) -> None:
        starts, ends = (np.array([o[i] for o in offsets]) for i in (0, 1))
        tokens = SimpleNamespace(ids=list(range(len(offsets))), starts=starts, ends=ends)
        monkeypatch.setattr(word_windows, "tokens_of", lambda *_, special: tokens)


def test_tokens_of_no_width_are_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: Any = Marks(monkeypatch, [(0, 0), (0, 1), (1, 1), (1, 1), (1, 3), (4, 4), (5, 6)])
    found = words_in(tokenizer, "abc  d", [(0, 1), (1, 3), (3, 4), (5, 6)])
    assert found.first == [1, 4, -1, 6]
    assert places_of_tokens(tokenizer, "abc  d") == [(0, 1), (1, 3), (5, 6)]


def test_tokens_that_touch_are_words_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: Any = Marks(monkeypatch, [(0, 2), (2, 4), (3, 5), (3, 4), (5, 8), (8, 9)])
    assert places_of_tokens(tokenizer, "abcde f  ") == [(0, 2), (2, 5), (6, 7)]


def test_a_row_that_fills_a_window_is_one(base: Path) -> None:
    assert windows_of(Words([7, 8, 9], []), 3) == [Window(0, 3, [])]
    assert windows_of(Words([7, 8, 9], [0, -1, 2]), 3) == [Window(0, 3, [0, 2])]
    words = Words(list(range(10)), list(range(10)))
    assert windows_of(words, 4) == [  # each starts two after the one before
        Window(0, 4, [0, 1, 2]), Window(2, 6, [3, 4]), Window(4, 8, [5, 6]),
        Window(6, 10, [7, 8, 9]),
    ]  # fmt: skip
    assert [w.start for w in windows_of(words, 7)] == [0, 3]
    assert [w.words for w in windows_of(words, 1)] == [[i] for i in range(10)]


def test_examples_of_a_row_in_windows(base: Path, tmp_path: Path) -> None:
    task: Any = task_of(base, tmp_path, max_length=7)  # five tokens between the two at the ends
    check_data(task, ("train",))
    first, second = task.encode([ROWS[0]])[0][:1], task.encode([ROWS[1]])[0]
    prefix, suffix = task.tokenizer.bos_token_id, task.tokenizer.eos_token_id
    tokens = words_in(task.tokenizer, " ".join(ROWS[0]["tokens"]), task._text_of(ROWS[0]).places)
    assert first[0]["input_ids"] == [prefix, *tokens.ids[:5], suffix]
    assert first[0]["n_words"] == 5
    assert first[0]["full_length"] == len(tokens.ids) + 2
    for example in (*first, *second):
        at = [i for i, word in enumerate(example["words"]) if word >= 0]
        row = ROWS[0] if example in first else ROWS[1]
        assert at[0] == 1
        assert [task.labels[example["labels"][i]] for i in at] == row["tags"][: len(at)]
        others = [x for i, x in enumerate(example["labels"]) if i not in at]
        assert others == [-100] * (len(example["labels"]) - len(at))
    assert task.features() == {
        "input_ids": "list<int32>", "labels": "list<int32>", "words": "list<int32>",
        "n_words": "int32",
    }  # fmt: skip
    assert task_of(base, tmp_path, max_length=3)._capacity == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(("length", "longest"), [(30, 30), (3, 3), (2, 3), (400, 64)])
def test_the_model_is_tried_on_examples_of_the_asked_length(
    length: int, longest: int, base: Path, tmp_path: Path
) -> None:
    task = task_of(base, tmp_path, max_length=64)
    short, long = task.trial_examples(length)
    assert (len(short["input_ids"]), len(long["input_ids"])) == (min(7, longest), longest)
    for example in (short, long):
        count = len(example["input_ids"])
        assert example["labels"] == [-100] * count
        assert max(example["words"]) < 0
        assert example["row"] == 0
        assert example["input_ids"][0] == task.tokenizer.bos_token_id
        assert example["input_ids"][-1] == task.tokenizer.eos_token_id
        inside = example["input_ids"][1:-1]
        assert not set(inside) & {task.tokenizer.bos_token_id, task.tokenizer.eos_token_id}


def test_shares_of_words_and_tokens(base: Path, tmp_path: Path) -> None:
    task = task_of(base, tmp_path)
    split = load_data(task)["train"]
    tokens = sum(len(e["input_ids"]) for e in split.examples)
    assert task.trained_share(split) == pytest.approx(8 / tokens)  # eight words
    rows: Any = SimpleNamespace(place=lambda i: f"rows:{i}")
    # of 50 words, one without a token in the second row is 2 %, and two are more
    for lost, said in (
        (1, None),
        (2, "2 of 50 words of train have no token .*, the first at rows:1"),
    ):
        examples = [
            {"row": i, "input_ids": [5] * 10, "n_words": 10,
             "words": list(range(10 - (lost if i == 1 else 0)))}
            for i in range(5)
        ]  # fmt: skip
        share, warning = task.unknown_input("train", rows, examples)
        assert share == 0
        assert warning is None if said is None else re.search(said, str(warning))
    assert task.unknown_input("train", rows, []) == (0.0, None)


def test_unknown_tokens_are_said_before_words_without_one(base: Path, tmp_path: Path) -> None:
    class Texts(list[Any]):
        place = staticmethod(lambda i: f"rows:{i}")

    task, rows = task_of(base, tmp_path), Texts([ROWS[0], ROWS[1]])
    unknown = [int(task.tokenizer.unk_token_id)] * 6
    examples = [
        {"row": 1, "input_ids": [*unknown, 5, 5, 5, 5], "n_words": 10, "words": [0]},
    ]  # fmt: skip
    share, warning = task.unknown_input("train", rows, examples)  # type: ignore[arg-type]
    assert share == pytest.approx(0.6)
    assert "rows:1" in str(warning)
    assert "have no token of their own" not in str(warning)


def test_a_batch_and_its_losses_and_predictions(base: Path, tmp_path: Path) -> None:
    task: Any = task_of(base, tmp_path, labels=["O", "B-A", "I-A"])
    examples = [
        {"row": 4, "input_ids": [0, 5, 6, 7, 2], "labels": [-100, 1, 2, -100, -100],
         "words": [-100, 0, 2, -100, -100]},
        {"row": 9, "input_ids": [0, 8, 2], "labels": [-100, 0, -100], "words": [-100, 1, -100]},
    ]  # fmt: skip
    batch = task.collate(examples)
    assert batch.rows == [4, 9]
    assert batch.cost == 8
    assert batch.items["loss"].tolist() == [2.0, 1.0]
    assert batch.targets["labels"].tolist() == [[-100, 1, 2, -100, -100], [-100, 0, *[-100] * 3]]
    assert batch.targets["words"].tolist() == [
        [-100, 0, 2, -100, -100],
        [-100, 1, -100, -100, -100],
    ]
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(3))
    logs = logits.double().log_softmax(-1)
    losses = task.losses(None, logits, batch)["loss"]
    wanted = [-logs[0, 1, 1] - logs[0, 2, 2], -logs[1, 1, 0]]
    assert losses.tolist() == pytest.approx([float(x) for x in wanted])
    first, second = task.predictions(None, logits, batch)
    assert (first.row, second.row) == (4, 9)
    for found, row, places in ((first, 0, {0: 1, 2: 2}), (second, 1, {1: 1})):
        assert [word for word, _, _ in found.prediction] == list(places)
        for word, tag, p in found.prediction:
            probabilities = logs[row, places[word]].exp()
            assert tag == task.labels[int(probabilities.argmax())]
            assert p == pytest.approx(float(probabilities.max()), rel=1e-6)


def test_an_entity_has_its_place_and_the_mean_probability_of_its_words(
    base: Path, tmp_path: Path
) -> None:
    task: Any = task_of(base, tmp_path, labels=["O", "B-A", "I-A"])
    text = task._text_of(ROWS[0])  # Ada met a warm cast
    tagged_words = [(0, "B-A", 0.25), (1, "I-A", 0.7500014), (3, "O", 0.5), (4, "B-A", 1 / 3)]
    tags, found = task._answer(text, tagged_words)
    assert tags == ["B-A", "I-A", "O", "O", "B-A"]
    assert found == [
        {"start": 0, "end": 7, "label": "A", "text": "Ada met", "score": 0.500001},
        {"start": 15, "end": 19, "label": "A", "text": "cast", "score": 0.333333},
    ]
    assert task.answer_of(ROWS[0]) == "word 1 (PER), words 4 to 5 (ART)"
    assert task.answer_of({"tokens": ["a"], "tags": ["O"]}) == "without entities"
    assert task.answer_line([[{"text": "é"}]]) == '[{"text": "é"}]'


def test_labels_of_another_tool_s_adapter_are_the_base_s_if_as_many(
    tmp_path: Path,
) -> None:
    config = tiny.encoder(None).config
    config.id2label = {2: "I-A", 0: "O", 1: "B-A"}
    config.label2id = {name: i for i, name in config.id2label.items()}
    BertForTokenClassification(config).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    for rows, names in (
        (3, ["O", "B-A", "I-A"]), (None, ["O", "B-A", "I-A"]), (2, ["LABEL_0", "LABEL_1"])
    ):  # fmt: skip
        task = task_of(tmp_path / "base", tmp_path)
        task.complete_from({} if rows is None else {"classifier.weight": torch.zeros(rows, 8)})
        assert task.learned.task["labels"] == names


@pytest.mark.parametrize("names", [("Word", "Tag"), ("tokens", "ner_tags"), ("token", "label")])
def test_a_table_with_a_row_for_each_word_is_no_table_of_sentences(
    names: tuple[str, str], base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "ner_dataset.csv"
    rows = [(f"Sentence: {i}" if i % 5 == 0 else "", f"word{i}", "O" if i % 5 else "B-geo")
            for i in range(60)]  # fmt: skip
    lines = [",".join(row) for row in [("Sentence #", *names), *rows]]
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(LoraError, match=f"each row is one word .`{names[0]}`. with its tag"):
        draft_recipe(file, str(base), tmp_path / "recipe.yaml")
