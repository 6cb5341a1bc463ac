"""What sources and targets become, value by value: frames, limits, examples, what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tiny_translators as translators
import torch

from lora_cli.errors import LoraError
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.examples import Prediction
from lora_cli.tasks.generation import seq2seq_texts
from lora_cli.tasks.generation.seq2seq_texts import Frame, _frame, _list_some
from lora_cli.tasks.texts.padding import Padding

LONG = "the plot is dull and slow , and far too long"
ROWS = [
    {"source": "a warm film", "target": "great fun 1"},
    {"source": LONG, "target": "a long bore"},
    {"source": "great", "target": ["the cast is warm and the story is funny", "x"]},
]


def recipe_of(folder: Path, kind: str, *overrides: str, **task: Any) -> Any:
    base = translators.save(folder / "base", kind)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    given = {"type": "seq2seq_lm", **translators.languages(kind), **task}
    path = tiny.recipe(base, folder, task=given, data={"path": "rows.jsonl"})
    return load_recipe(path, list(overrides))


def task_of(folder: Path, kind: str, *overrides: str, **task: Any) -> Any:
    made = build_task(recipe_of(folder, kind, *overrides, **task))
    made.load_processor()
    return made


# ------------------------------------------------------------------------------------- frames


class Around:
    """A tokenizer that puts tokens around a text as a test wants it."""

    def __init__(self, before: list[int], inner: list[int], after: list[int]) -> None:
        self.before, self.inner, self.after = before, inner, after

    def __call__(self, add_special_tokens: bool, **texts: str) -> dict[str, list[int]]:
        side = 100 if "text_target" in texts else 0
        inner = [i + side for i in self.inner]
        whole = [*self.before, *inner, *self.after] if add_special_tokens else inner
        return {"input_ids": whole}


def test_tokens_around_a_text_are_found() -> None:
    for before, inner, after in (
        ([1, 2], [7], [3]), ([], [7], [3]), ([1], [7], []), ([], [7, 8], []), ([1], [7, 8], [2, 3]),
    ):  # fmt: skip
        for side in ("source", "target"):
            found = _frame(Around(before, inner, after), side)  # type: ignore[arg-type]
            assert found == Frame(tuple(before), tuple(after))
            assert len(found) == len(before) + len(after)
    assert _frame(Around([1], [], [2]), "source") == Frame((), (1, 2))
    assert Frame((1, 2), (3,)).around([7]) == [1, 2, 7, 3]


@pytest.mark.parametrize(
    ("kind", "source", "target"),
    [
        ("bart", ((tiny.BOS,), (tiny.EOS,)), ((tiny.BOS,), (tiny.EOS,))),
        ("marian", ((), (tiny.EOS,)), ((), (tiny.EOS,))),
        ("nllb", (("eng_Latn",), (tiny.EOS,)), (("deu_Latn",), (tiny.EOS,))),
        ("mbart", ((), (tiny.EOS, "en_XX")), ((), (tiny.EOS, "de_DE"))),
    ],
)
def test_the_frames_of_models(kind: str, source: Any, target: Any, tmp_path: Path) -> None:
    task = task_of(tmp_path, kind, prefix="say : ")

    def frame(parts: Any) -> Frame:
        ids = task.tokenizer.convert_tokens_to_ids
        return Frame(*(tuple(x if isinstance(x, int) else ids(x) for x in p) for p in parts))

    assert (task.texts.source_frame, task.texts.target_frame) == (frame(source), frame(target))
    read = task.tokenizer("say : x", add_special_tokens=False)["input_ids"]
    assert task.texts.sources(["x"]) == [frame(source).around(read)]
    assert task.texts._prefix_ids == task.tokenizer("say :", add_special_tokens=False)["input_ids"]
    inner = task.tokenizer(LONG, add_special_tokens=False)["input_ids"]
    assert task.texts.targets([LONG]) == [frame(target).around(inner)]


def test_a_start_token_that_the_model_adds_is_not_in_the_frame(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "bart")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "decoder_start_token_id": tiny.BOS}))
    task: Any = build_task(recipe)
    task.load_processor()
    assert task.texts.target_frame == Frame((), (tiny.EOS,))
    assert task.texts.source_frame == Frame((tiny.BOS,), (tiny.EOS,))


def test_only_the_start_token_is_removed_from_the_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of a language that stands behind it stays."""
    recipe = recipe_of(tmp_path, "bart")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "decoder_start_token_id": tiny.BOS}))
    with_code = Frame((tiny.BOS, 9), (tiny.EOS,))
    monkeypatch.setattr(seq2seq_texts, "_frame", lambda tokenizer, side: with_code)
    task: Any = build_task(recipe)
    task.load_processor()
    assert task.texts.target_frame == Frame((9,), (tiny.EOS,))


def test_an_end_token_is_added_to_targets_if_the_tokenizer_adds_none(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "bart")
    file = tmp_path / "base" / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "post_processor": None}))
    task: Any = build_task(recipe)
    task.load_processor()
    read = task.tokenizer("two words")["input_ids"]
    assert tiny.EOS not in read
    task.learn_from({})
    assert task.notes == ["the tokenizer ends no text: `</s>` is added to each target"]
    assert task.texts.targets(["two words"]) == [[*read, tiny.EOS]]
    assert task.texts.sources(["two words"]) == [read]  # as the base was trained
    assert task.texts.cut([*range(7, 99), tiny.EOS], "target", "right")[-1] == tiny.EOS


@pytest.mark.parametrize("side", ["source", "target"])
def test_truncation_of_sources_and_targets(side: Any, tmp_path: Path) -> None:
    task = task_of(tmp_path, "marian", prefix="ab", max_source_length=6, max_target_length=6)
    texts = task.texts
    texts.source_frame = texts.target_frame = Frame((1, 2), (3,))
    texts._prefix_ids = [8]
    ids = [1, 2, 8, 10, 11, 12, 13, 3]
    assert texts.cut(ids[:6], side, "right") == ids[:6]
    assert texts.cut(ids, side, "drop") == []
    by_side = {"source": [1, 2, 8, 10, 11, 3], "target": [1, 2, 8, 10, 11, 3]}
    assert texts.cut(ids, side, "right") == by_side[side]
    assert texts.cut(ids, side) == by_side[side]
    by_side = {"source": [1, 2, 8, 12, 13, 3], "target": [1, 2, 11, 12, 13, 3]}
    assert texts.cut(ids, side, "left") == by_side[side]
    with pytest.raises(LoraError, match=rf"the {side} has 8 tokens, more than 6[\s\S]*_{side}"):
        texts.cut(ids, side, "error")
    texts.limits[side] = 4  # where the frame, the prefix of a source, and no more fit
    assert texts.cut(ids, side, "right") == ([] if side == "source" else [1, 2, 8, 3])
    texts.limits[side] = 3
    assert texts.cut(ids, side, "right") == []
    texts.limits[side] = 5
    assert texts.cut(ids, side, "right") == ([1, 2, 8, 10, 3])


def test_languages_are_listed_up_to_five() -> None:
    assert _list_some(["a", "b", "c", "d", "e"]) == "a, b, c, d, e"
    assert _list_some(["a", "b", "c", "d", "e", "f"]) == "a, b, c, d, e, …"


# ------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("kind", "task", "limits", "note"),
    [
        ("t5", {}, (tiny.POSITIONS, tiny.POSITIONS), None),
        ("t5", {"max_source_length": 999}, (999, tiny.POSITIONS), None),
        ("t5", {"max_source_length": 5, "max_target_length": 7}, (5, 7), None),
        ("led", {"max_source_length": 70, "max_target_length": 999}, (70, 64),
         "`task.max_target_length` is 999, and the model takes 64 tokens"),
        ("led", {"max_target_length": 64}, (tiny.POSITIONS, 64), None),
        ("bart", {"max_source_length": 999}, (tiny.POSITIONS, tiny.POSITIONS),
         f"`task.max_source_length` is 999, and the model takes {tiny.POSITIONS} tokens"),
    ],
)  # fmt: skip
def test_lengths(
    kind: str, task: dict[str, int], limits: tuple[int, int], note: str | None, tmp_path: Path
) -> None:
    made = task_of(tmp_path, kind, **task)
    source, target = limits
    assert (made.limit("source"), made.limit("target")) == limits
    assert made.max_length == sum(limits)
    assert made.length_note == (note and f"warning: {note}: longer texts are cut there")
    assert made.length_limit == f"{source} tokens of the source and {target} of the target"
    assert made.length_name == f"{source} + {target}"


@pytest.mark.parametrize(
    ("kind", "overrides", "warns"),
    [
        ("t5", ["train.precision=fp16"], True),
        ("t5", ["model.dtype=float16", "train.precision=fp16"], True),
        ("t5", ["train.precision=bf16"], False),
        ("marian", ["train.precision=fp16"], False),
    ],
)
def test_families_that_overflow_in_float16_are_warned_of(
    kind: str, overrides: list[str], warns: bool, tmp_path: Path
) -> None:
    task = task_of(tmp_path, kind, *overrides)
    assert any("make NaN in float16" in note for note in task.notes) == warns


def test_a_slow_tokenizer_reads_targets_as_targets(tmp_path: Path) -> None:
    class Slow:
        """A tokenizer with a vocabulary of its own for targets, as that of Marian."""

        is_fast = False

        def __call__(self, *sources: list[str], add_special_tokens: bool, **given: Any) -> Any:
            targets = given.get("text_target", [])
            end = [tiny.EOS] * add_special_tokens
            read = [*map(len, targets)] if targets else [100 + len(text) for text in sources[0]]
            return {"input_ids": [[i, *end] for i in read]}

    texts = task_of(tmp_path, "marian").texts
    texts._text_tokenizer = Slow()
    assert texts.sources(["a", "bc"]) == [texts.source_frame.around([i]) for i in (101, 102)]
    assert texts.targets(["a", "bc"]) == [texts.target_frame.around([i]) for i in (1, 2)]


# ----------------------------------------------------------------------------------- examples


def test_examples_their_cost_and_what_was_cut_of_them(tmp_path: Path) -> None:
    task = task_of(tmp_path, "marian", max_source_length=8, max_target_length=6)
    whole = {
        text: len(task.texts.targets([text])[0])
        for text in (LONG, "a warm film", "great fun 1", "great", "a long bore", "x",
                     "the cast is warm and the story is funny")
    }  # fmt: skip
    assert whole[LONG] > 8 >= whole["a warm film"]
    examples = task.encode(ROWS)
    assert [[e["first"] for e in row] for row in examples] == [[1], [1], [1, 0]]
    wanted = [
        [(whole[row["source"]] > 8) + 2 * (whole[text] > 6) for text in task.references(row)]
        for row in ROWS
    ]
    assert [[e["cut"] for e in row] for row in examples] == wanted
    assert {cut for row in wanted for cut in row} >= {0, 2}
    both = task.encode([{"source": LONG, "target": LONG}])[0][0]
    assert both["cut"] == 3
    assert both["full_length"] == 2 * whole[LONG]
    source = task.encode([{"source": LONG, "target": "x"}])[0][0]
    assert source["cut"] == 1
    assert source["full_length"] == whole[LONG] + whole["x"]
    assert task.cost(source) == 8 + whole["x"] == len(source["input_ids"]) + len(source["labels"])
    assert "full_length" not in task.encode([{"source": "x", "target": "x"}])[0][0]
    several = examples[2]
    sources = 2 * len(several[0]["input_ids"])
    total = sources + whole["the cast is warm and the story is funny"] + whole["x"]
    assert [e["full_length"] for e in several] == [total, total]
    exact = {"max_source_length": whole[LONG], "max_target_length": whole[LONG]}
    (tmp_path / "exact").mkdir()
    task = task_of(tmp_path / "exact", "marian", **exact)
    assert task.encode([{"source": LONG, "target": LONG}])[0][0]["cut"] == 0


def test_shares_and_notes_of_a_split(tmp_path: Path) -> None:
    task = task_of(tmp_path, "marian", max_source_length=8, max_target_length=6)
    assert not task.has_several_references  # as far as is known before the rows are read
    split = load_data(task)["train"]
    examples = [split.examples[i] for i in range(len(split.examples))]
    labels = sum(len(e["labels"]) for e in examples)
    inputs = sum(len(e["input_ids"]) for e in examples)
    assert task.trained_share(split) == pytest.approx(labels / (labels + inputs))
    sources, targets = (sum(e["cut"] & bit > 0 for e in examples) for bit in (1, 2))
    assert task.cut_note(split) == (
        f"{sources} source{'s' * (sources > 1)} lost the end (more than 8 tokens), "
        f"{targets} target{'s' * (targets > 1)} lost the end (more than 6 tokens)"
    )
    assert task.has_several_references
    (tmp_path / "whole").mkdir()
    task = task_of(tmp_path / "whole", "marian")
    assert task.cut_note(load_data(task)["train"]) is None


def test_unknown_tokens_of_either_side_are_counted(tmp_path: Path) -> None:
    task = task_of(tmp_path, "marian")
    unknown = int(task.tokenizer.unk_token_id)

    class Rows(list[Any]):
        place = staticmethod(lambda i: f"rows:{i}")

    rows: Any = Rows([{"source": f"s{i}", "target": f"t{i}"} for i in range(9)])
    known = [10] * 10
    examples = [{"row": i + 4, "input_ids": known, "labels": known} for i in range(5)]
    assert task.unknown_input("train", rows, []) == (0.0, None)
    assert task.unknown_input("train", rows, examples) == (0.0, None)
    examples[2] = {**examples[2], "input_ids": [unknown] * 2 + known[:8]}
    share, said = task.unknown_input("train", rows, examples)
    assert share == pytest.approx(2 / 50)
    assert "`source` in train" in str(said)
    assert "rows:6" in str(said)
    examples[3] = {**examples[3], "labels": [unknown] * 5 + known[:5]}
    share, said = task.unknown_input("train", rows, examples)
    assert share == pytest.approx(5 / 50)
    assert "`source` in train" in str(said)  # the first of the two is said


def test_what_is_wrong_with_a_row(tmp_path: Path) -> None:
    task = task_of(tmp_path, "marian")
    for target, said in (
        ("x", ""), (["x", "y"], ""), ([], "column `target` holds an empty list: no right answer"),
    ):  # fmt: skip
        assert task.target_error({"source": "x", "target": target}) == said
    assert task.target_error({"target": ["x", " "]}).endswith("in text 2 of its list")
    assert task.target_error({"target": ""})
    assert task.input_error({"source": " ", "target": "x"})
    assert not task.input_error({"source": "a", "target": ""})
    assert task.shown_reference({"target": "x"}) == "x"
    assert task.shown_reference({"target": ""}) is None
    fields = [(f.key, f.column, f.role, f.kind) for f in task.fields()]
    assert fields == [
        ("task.source_column", "source", "input", "text"),
        ("task.target_column", "target", "target", "text"),
    ]


def test_an_example_is_shown_with_all_of_its_target_marked(tmp_path: Path) -> None:
    task = task_of(tmp_path, "marian")
    example = task.encode([{"source": "a warm film", "target": "great fun"}])[0][0]
    facts, text = task.shown(example, False)
    counts = len(example["input_ids"]), len(example["labels"])
    assert facts == [f"source {counts[0]} tokens", f"target {counts[1]} tokens"]
    source, _, target = text.partition("\n")
    assert source.startswith("a warm film")
    assert target == "\u27e6great fun</s>\u27e7"


# ------------------------------------------------------------------------ batches and answers


def test_a_batch_and_the_joined_answer(tmp_path: Path) -> None:
    task = task_of(tmp_path, "marian")
    examples = [
        {"row": 3, "input_ids": [5, 6, 2], "labels": [7, 2], "first": 1},
        {"row": 3, "input_ids": [5, 2], "labels": [8, 9, 2], "first": 0},
        {"row": 8, "input_ids": [4, 2], "labels": [2]},
    ]
    batch = task.collate(examples)
    assert batch.rows == [3, 3, 8]
    assert batch.cost == 13
    assert batch.items["loss"].tolist() == [2, 3, 1]
    assert batch.targets["labels"].tolist() == [[7, 2, -100], [8, 9, 2], [2, -100, -100]]
    assert batch.targets["positions"].tolist() == [0, 1, 3, 4, 5, 6]
    assert batch.targets["first"].tolist() == [1, 0, 1]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 2], [5, 2, task.pad], [4, 2, task.pad]]
    task.writes_answers = True
    asked: list[Any] = []
    task.generate_texts = lambda _, sources, options: asked.extend(sources) or ["one", "two"]
    found = task.predictions(None, torch.zeros(()), batch)
    assert asked == [[5, 6, 2], [4, 2]]
    assert [(p.row, p.prediction) for p in found] == [(3, "one"), (3, None), (8, "two")]
    parts = [Prediction(3, "one", None), Prediction(4, None, None)]
    for target, reference in ((["a", "b"], ["a", "b"]), ("a", "a")):
        joined = task.join({"source": "x", "target": target}, parts)
        assert (joined.row, joined.prediction, joined.reference) == (3, "one", reference)
        assert joined.metric_inputs == {"text": ("one", reference)}
    task.writes_answers = False
    assert task.join({"source": "x", "target": "a"}, parts).metric_inputs == {}


@pytest.mark.parametrize(
    ("length", "counts"), [(40, (40, 24)), (5, (5, 24)), (1, (2, 24)), (999, (96, 24))]
)
def test_the_trial_examples_have_the_requested_length(
    length: int, counts: tuple[int, int], tmp_path: Path
) -> None:
    task = task_of(tmp_path, "marian", max_source_length=96)
    limit = task.limit("source")
    short, long = task.trial_examples(length)
    longest = min(counts[0], limit)
    assert (len(long["input_ids"]), len(long["labels"])) == (longest, counts[1])
    assert (len(short["input_ids"]), len(short["labels"])) == (min(longest, 7), 4)
    for example in (short, long):
        assert example["row"] == 0
        assert example["input_ids"][-1] == example["labels"][-1] == tiny.EOS
    assert tiny.EOS not in long["input_ids"][:-1]


def test_sources_that_are_too_long_to_be_answered(tmp_path: Path) -> None:
    task = task_of(tmp_path, "marian", max_source_length=8)
    seen: list[Any] = []
    task.generate_texts = lambda _, sources, options: seen.append((sources, options)) or ["y"] * 3
    rows = [{"source": text, "target": "t"} for text in ("a", LONG, LONG)]
    assert task.answer(None, rows) == [["y"], ["y"], ["y"]]
    assert task.n_cut_prompts == 2
    whole = task.texts.sources([LONG])[0]
    assert seen[0][0][1] == [*whole[:7], tiny.EOS]
    assert task.cut_prompts_note.startswith("lost the end: more than 8 tokens")
    assert task.answer_problem(rows[1]) is None
    assert task.sample(None, rows) == [("a", "t", "y"), (LONG, "t", "y"), (LONG, "t", "y")]
    most = task.recipe.evaluate.generation.max_new_tokens
    assert seen[1][1].max_new_tokens == min(64, most)
    for how in ("drop", "error", "left"):
        (tmp_path / how).mkdir()
        task = task_of(
            tmp_path / how, "marian", truncate_source=how, max_source_length=len(whole) - 1
        )
        problem = task.answer_problem(rows[1])
        assert (problem is None) == (how == "left")
        assert problem is None or f"it has {len(whole)} tokens, more than" in problem.what
        assert task.answer_error(rows[0]) == ""
        task.texts.limits["source"] = 8
        task.generate_texts = lambda _, sources, options: seen.append((sources, options)) or ["y"]
        task.sample(None, rows[1:2])  # is cut, also where the recipe leaves such rows out
        wanted = whole[-8:] if how == "left" else [*whole[:7], tiny.EOS]
        assert seen[-1][0] == [wanted]
    assert task.cut_prompts_note.startswith("lost the beginning")


def test_a_merged_model_begins_with_the_language_that_is_written(tmp_path: Path) -> None:
    task = task_of(tmp_path, "nllb")
    german = task.tokenizer.convert_tokens_to_ids("deu_Latn")
    model, _ = task.load_model(torch.device("cpu"))
    config = model.generation_config
    assert config.forced_bos_token_id == german
    assert config.decoder_start_token_id == model.config.decoder_start_token_id
    config.forced_bos_token_id = None
    task.adjust_config(model)
    assert config.forced_bos_token_id == german
    task.adjust_config(SimpleNamespace(generation_config=None))
    config.no_repeat_ngram_size = 3
    config.forced_bos_token_id = german
    assert "forced_bos_token_id" not in task.base_settings(model)
    assert "no_repeat_ngram_size" in task.base_settings(model)
    config.forced_bos_token_id = german + 1
    assert task.base_settings(model)["forced_bos_token_id"] == german + 1
    config.forced_bos_token_id = german
    task.texts.target_frame = Frame((german, 9), (tiny.EOS,))  # more begins each target
    assert "forced_bos_token_id" not in task.base_settings(model)
    task.adjust_config(model)
    assert config.forced_bos_token_id == german


def test_only_rows_that_are_measured_are_answered(tmp_path: Path) -> None:
    task = task_of(tmp_path, "marian")
    rows = [(3, 1), (3, 0), (8, 1), (9, 1)]
    examples = [{"row": i, "input_ids": [i, 2], "labels": [2], "first": f} for i, f in rows]
    batch = task.collate(examples)
    asked: list[Any] = []
    task.generate_texts = lambda _, sources, options: asked.extend(sources) or ["one", "two"]
    assert [p.prediction for p in task.predictions(None, torch.zeros(()), batch)] == [None] * 4
    task.check_metrics({"nll", "text"})
    task.rows_to_answer = frozenset({3, 9})
    found = task.predictions(None, torch.zeros(()), batch)
    assert asked == [[3, 2], [9, 2]]
    assert [p.prediction for p in found] == ["one", None, None, "two"]
    row = {"source": "x", "target": "a"}
    for i, measured in ((3, True), (8, False)):
        joined = task.join(row, [Prediction(i, "one", None)])
        assert bool(joined.metric_inputs) == measured
    task.check_metrics({"nll"})
    assert task.predictions(None, torch.zeros(()), batch)[0].prediction is None
    assert task.join(row, [Prediction(3, "one", None)]).metric_inputs == {}


def test_a_source_of_exactly_the_longest_length_is_answered(tmp_path: Path) -> None:
    row = {"source": LONG, "target": ""}
    length = len(task_of(tmp_path, "marian").texts.sources([LONG])[0])
    for limit in (length - 1, length):
        keys = {"truncate_source": "error", "max_source_length": limit}
        task = task_of(tmp_path, "marian", **keys)
        assert (task.answer_problem(row) is None) == (limit == length)
    task.generate_texts = lambda _, sources, options: ["y"]
    assert task.sample(None, [row]) == [(LONG, "", "y")]  # a row that says nothing is none


@pytest.mark.parametrize("kind", ["marian", "t5"])
def test_models_are_compared_on_the_same_random_sources_and_targets(
    kind: str, tmp_path: Path
) -> None:
    task = task_of(tmp_path, kind)
    probe = task.probe()
    ids, targets = probe["input_ids"], probe["decoder_input_ids"]
    assert targets.shape == (4, 16)
    assert set(targets[:, 0].tolist()) == {task.config.decoder_start_token_id}
    assert torch.equal(targets[:, 1:], ids.flip(0)[:, 1:16])
    if kind == "marian":  # whose class has a start of its own
        return
    del task.config.decoder_start_token_id
    assert set(task.probe()["decoder_input_ids"][:, 0].tolist()) == {task.pad}


def test_sources_that_cannot_be_padded_are_computed_one_by_one(tmp_path: Path) -> None:
    task = task_of(tmp_path, "t5")
    model, _ = task.load_model(torch.device("cpu"))
    model.eval()
    rows = [{"source": text, "target": "fun"} for text in ("a warm film", LONG, "great")]
    batch = task.collate([{**made[0], "row": 0} for made in task.encode(rows)])
    with torch.no_grad():
        together = task.logits(model, batch.inputs)
        widths: list[int] = []
        model.encoder.register_forward_pre_hook(
            lambda module, args, options: widths.append(options["input_ids"].shape[1]),
            with_kwargs=True,
        )
        task.padding = Padding("none")
        alone = task.logits(model, batch.inputs)
    assert widths == batch.inputs["attention_mask"].sum(-1).tolist()
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4 * float(together.abs().max()))
