"""What tasks share whose model writes text, and what a language model reads, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from lora_cli.errors import LoraError
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.examples import IGNORED
from lora_cli.tasks.generation import writing_task
from lora_cli.tasks.generation.output_head import HiddenStates
from lora_cli.tasks.generation.text_generation import REPLACEMENT
from lora_cli.tasks.generation.writing_task import (
    WritingTask,
    keep_all_layers,
    layer_drop_of,
    sum_token_losses,
)
from lora_cli.tasks.texts.padding import NONE
from lora_cli.tasks.texts.text_task import TextTask

CPU = torch.device("cpu")
TEXT = {"text_column": "text"}
PAIR = {"prompt_column": "q", "completion_column": "a", "text_column": None}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


def opened(tmp_path: Path, kind: str = "llama", **sections: Any) -> Any:
    """Return the task of a recipe on a tiny model, plain texts unless the recipe says otherwise."""
    save = {"llama": tiny.save_llama, "gpt2": tiny.save_gpt2}[kind]
    base = tmp_path / kind
    base = base if base.exists() else save(base)
    task = {"type": "causal_lm", "pad_token": None, **TEXT, **sections.pop("task", {})}
    made = build_task(load_recipe(tiny.recipe(base, tmp_path, task=task, **sections)))
    made.load_processor()
    return made


def chat(tmp_path: Path, **task: Any) -> Any:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    keys = {"messages_column": "m", "text_column": None, "chat_template": "chat.jinja", **task}
    return opened(tmp_path, task=keys)


def tokens(text: str) -> list[int]:
    return list(tiny.tokenizer("llama")(text, add_special_tokens=False)["input_ids"])


# ----------------------------------------------------------------------------- special tokens


@pytest.mark.parametrize(
    ("kind", "named", "pad", "is_noted"),
    [
        ("gpt2", None, 0, True),
        ("gpt2", tiny.END_OF_TEXT, 0, False),
        ("llama", None, tiny.PAD, False),
        ("llama", "<unk>", tiny.UNK, False),
        ("llama", "</s>", tiny.EOS, False),
    ],
)
def test_padding_with_the_end_of_text_token_is_noted(
    kind: str, named: str | None, pad: int, is_noted: bool, tmp_path: Path
) -> None:
    task = opened(tmp_path, kind, task={"pad_token": named})
    assert task.pad == pad
    assert ["also fills the rows" in note for note in task.notes] == [True] * is_noted


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_padding_token_must_be_in_the_vocabulary(kind: str, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="the tokenizer has no token `nothing`"):
        opened(tmp_path, kind, task={"pad_token": "nothing"})


def test_control_tokens_are_read_except_in_chats_or_if_split(
    tmp_path: Path,
) -> None:
    assert opened(tmp_path).reads_control_tokens
    assert not opened(tmp_path, task={"split_special_tokens": True}).reads_control_tokens
    assert not chat(tmp_path).reads_control_tokens


# ---------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(("form", "target"), [("alpaca", "output"), ("self_instruct", "instances")])
def test_the_answer_stands_in_the_last_column_of_instructions(
    form: str, target: str, tmp_path: Path
) -> None:
    task = chat(tmp_path, messages_column=None, format=form)
    assert list(task.target_columns().values()) == [target]
    assert list(task.input_columns().values()) == ["instruction"]
    assert task.compared_columns()[0] == "instruction"
    assert task.compared_columns()[-2:] == [target, "history"]


def field(columns: dict[str, str]) -> tuple[str, str]:
    """Return the key of a recipe that names a column, without its line, and the column."""
    ((key, column),) = columns.items()
    return key.split()[0], column


def test_columns_and_reference_texts(tmp_path: Path) -> None:
    text, pair, said = opened(tmp_path), opened(tmp_path, task=PAIR), chat(tmp_path)
    assert [field(task.input_columns()) for task in (text, pair, said)] == [
        ("task.text_column", "text"), ("task.prompt_column", "q"), ("task.messages_column", "m")
    ]  # fmt: skip
    assert field(pair.target_columns()) == ("task.completion_column", "a")
    assert text.target_columns() == said.target_columns() == {}
    row = {"text": "t", "q": "why", "a": "so"}
    assert [task.shown_reference(row) for task in (text, pair)] == [None, "so"]
    assert pair.reference_texts(row) == ["so"]
    turns = [{"role": role, "content": c} for role, c in (("user", "a"), ("assistant", "b"))]
    assert said.reference_texts({"m": turns}) == ["b"]
    assert said.reference_texts({"m": [*turns, *turns[:1]]}) == []
    kept = {"chosen": "x", "rejected": "y", **row, "m": turns}
    assert text.unsupported(kept) is None  # other columns are nobody's answer
    assert pair.unsupported(kept) is not None
    assert said.unsupported(kept) is not None


def test_the_share_of_tokens_that_are_predicted(tmp_path: Path) -> None:
    labels = [[9] * 8, [5, 6, 7], [5, IGNORED, 7, 8], [IGNORED, 6]]
    table = datasets.Dataset(pa.table({"labels": pa.array(labels, pa.list_(pa.int32()))}))
    for first in (0, 1):  # a part of a table begins later in its buffers
        rows = table.select(range(first, 4))
        split = SimpleNamespace(examples=rows, lengths=np.array([len(x) for x in labels[first:]]))
        trained = [sum(x != IGNORED for x in one[1:]) for one in labels[first:]]
        found = opened(tmp_path).trained_share(split)
        assert found == pytest.approx(sum(trained) / sum(map(len, labels[first:])))


def test_texts_are_padded_on_the_right_for_every_tokenizer(tmp_path: Path) -> None:
    task = opened(tmp_path)
    assert (task.can_fill_left, task.looks_back_only) == (False, True)
    assert task.forward_options == {"use_cache": False}
    task.tokenizer.padding_side = "left"
    model, _ = task.load_model(CPU)
    task.fit_to_model(model.eval())
    assert task.padding.side == "right"


# ------------------------------------------------------------------------------- looking ahead


@pytest.mark.parametrize("last", [0, 1, 7])
def test_a_model_that_sees_its_last_token_is_rejected(
    last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = opened(tmp_path)
    monkeypatch.setattr(WritingTask, "check_trial", lambda *_: None)
    example = {"input_ids": [last, 5, 6, last], "labels": [last, 5, 6, last], "row": 0}

    def check(scores: Callable[[Tensor], Tensor]) -> None:
        task.logits = lambda model, inputs: scores(inputs["input_ids"].float())
        task.check_trial(
            nn.Linear(1, 1), example, task.logits(None, task.collate([example]).inputs)[0]
        )

    check(lambda ids: torch.stack([ids, -ids], -1))  # each token of itself
    check(lambda ids: torch.zeros(*ids.shape, 2))
    with pytest.raises(LoraError, match="sees the tokens that it has to predict"):
        check(lambda ids: (ids + ids[:, -1:])[..., None] + torch.ones(2))


# ------------------------------------------------------------------------------------- answers


def test_answers_and_references_belong_to_the_last_trained_span(tmp_path: Path) -> None:
    task = opened(tmp_path, task=PAIR)
    half = tokens("é")[:1]  # the first of two tokens of one letter
    ids = [
        [tiny.BOS, 5, 6, 7, *tokens("dull"), tiny.EOS],
        [tiny.BOS, 8, *tokens("not asked"), tiny.EOS],
        [tiny.BOS, 9, *tokens("fun "), *half],
        [tiny.BOS, 9, *tokens("fun "), *half, tiny.EOS],
    ]
    starts = [4, 2, 2, 2]
    labels = [[IGNORED] * n + row[n:] for n, row in zip(starts, ids, strict=True)]
    labels[0][2] = 6  # an earlier answer
    examples = [
        {"input_ids": i, "labels": x, "row": 10 + n}
        for n, (i, x) in enumerate(zip(ids, labels, strict=True))
    ]
    batch = task.collate(examples)
    asked: list[list[int]] = []

    def generate(model: Any, prompts: Any) -> list[str]:
        asked.extend(prompts)
        return [f"answer {n}" for n in range(len(prompts))]

    task.generate = generate
    task.rows_to_answer = frozenset({10, 12, 13})
    assert [task.is_answered(row) for row in (10, 11)] == [True, False]
    task.check_metrics({"nll"})
    model = nn.Linear(1, 1)
    found = task.predictions(model, torch.zeros(0), batch)
    assert [(p.row, p.prediction) for p in found] == [(10 + n, None) for n in range(4)]
    task.check_metrics({"nll", "text"})
    found = task.predictions(model, torch.zeros(0), batch)
    assert asked == [ids[n][: starts[n]] for n in (0, 2, 3)]
    assert [p.prediction for p in found] == ["answer 0", None, "answer 1", "answer 2"]
    # half a letter at the end is dropped where it was cut, and kept where the text ended so
    assert [p.reference for p in found] == ["dull", None, "fun ", f"fun {REPLACEMENT}"]
    assert found[2].metric_inputs["text"] == ("answer 1", "fun ")


@pytest.mark.parametrize("truncate", ["left", "right"])
def test_a_prompt_leaves_room_for_its_answer(truncate: str, tmp_path: Path) -> None:
    task = opened(
        tmp_path, task={"truncate": truncate}, evaluate={"generation": {"max_new_tokens": 28}}
    )
    assert (task.positions, task.room_for_prompt) == (128, 100)
    fits, long = [tiny.BOS, *range(5, 104)], [tiny.BOS, *range(5, 105)]
    assert task.shortened(fits) == fits
    assert task.shortened(long) == ([tiny.BOS, *range(6, 105)] if truncate == "left" else long)
    task.rows = SimpleNamespace(
        prompt=lambda row: row["ids"], keep_last_tokens=task.rows.keep_last_tokens
    )
    task.generate = lambda model, prompts: [str(len(prompt)) for prompt in prompts]
    answers = task.answer(nn.Linear(1, 1), [{"ids": ids} for ids in (long, fits, fits)])
    assert answers == [["100" if truncate == "left" else "101"], ["100"], ["100"]]
    assert task.n_cut_prompts == (truncate == "left")


@pytest.mark.parametrize(("longest", "room"), [(28, 100), (63, 65), (64, 64), (90, 64)])
def test_at_least_half_of_the_positions_are_for_the_prompt(
    longest: int, room: int, tmp_path: Path
) -> None:
    task = opened(tmp_path, evaluate={"generation": {"max_new_tokens": longest}})
    assert task.room_for_prompt == room


def test_a_prompt_has_a_token_and_fewer_than_the_model_has_positions(tmp_path: Path) -> None:
    task = opened(tmp_path)
    task.require_room([5] * 127)
    for prompt, said in (([], "the prompt is empty"), ([5] * 128, "has 128 tokens")):
        with pytest.raises(LoraError, match=said):
            task.require_room(prompt)
    unlimited: Any = SimpleNamespace(positions=None)
    WritingTask.require_room(unlimited, [5] * 10_000)
    assert task.answer_problem({"text": "slow"}) is None
    assert task.answer_error({"text": "slow"}) == ""
    assert task.answer_error({"text": " "}) == "column `text` is blank"
    problem = task.answer_problem({"text": "slow " * 128})
    assert "no room is left for an answer" in problem.what
    assert problem.at == "the prompt"


@pytest.mark.parametrize(
    ("positions", "longest", "room"),
    [(None, 40, 40), (200, 150, 136), (200, 40, 40), (100, 99, 50)],
)
def test_a_sample_leaves_room_for_its_continuation(
    positions: int | None, longest: int, room: int, tmp_path: Path
) -> None:
    task = opened(tmp_path)
    letters = [*tokens("é"), *tokens("a film ") * 60]
    for ids in (letters[:room], letters[1 : room + 1], letters[: room + 1], letters):
        given = list(ids)
        own: Any = SimpleNamespace(
            rows=SimpleNamespace(sample=lambda row, given=given: (given, "wanted")),
            positions=positions, max_length=longest, tokenizer=task.tokenizer, is_chat=False,
        )  # fmt: skip
        kept, shown, wanted = type(task).sample_prompt(own, {})
        assert (kept, wanted) == (ids[-room:], "wanted")
        text = task.tokenizer.decode(kept)
        # half a letter is not shown where the cut is the reason for it
        assert shown == (text.lstrip(REPLACEMENT) if len(ids) > room else text)
        assert shown.startswith(REPLACEMENT) == (ids == letters[1 : room + 1])


def test_special_tokens_of_samples_are_shown_only_in_chats(tmp_path: Path) -> None:
    for task, shown in ((opened(tmp_path), "dull"), (chat(tmp_path), "<s>dull")):
        task.rows = SimpleNamespace(sample=lambda row: ([tiny.BOS, *tokens("dull")], ""))
        assert task.sample_prompt({})[1] == shown


# ------------------------------------------------------------------------------- what is measured


def test_the_recipe_limits_the_answered_rows_of_each_set(tmp_path: Path) -> None:
    task = opened(tmp_path, evaluate={"generation": {"max_rows": 4}})
    assert task.is_answered(9)
    task.choose_rows_to_answer([10, 3, 4])
    assert task.rows_to_answer == {0, 2, 5, 7, 10, 11, 12, 13, 14, 15, 16}
    assert [task.is_answered(row) for row in (0, 1, 2)] == [True, False, True]
    every = opened(tmp_path)
    every.choose_rows_to_answer([10, 3])
    assert every.rows_to_answer is None
    assert every.is_answered(1)


@pytest.mark.parametrize(
    ("metrics", "names", "problems"),
    [
        (None, ["exact_match", "no_answer", "perplexity"], 0),
        (["bleu", "exact_match", "rouge"], ["bleu", "exact_match", "no_answer", "rouge"], 0),
        (["no_answer", "exact_match"], ["no_answer", "exact_match"], 0),
        (["no_answer"], ["no_answer"], 0),
        (["bleu"], ["bleu"], 1),
    ],
)
def test_a_pattern_of_final_answers_is_measured_by_two_metrics(
    metrics: list[str] | None, names: list[str], problems: int, tmp_path: Path
) -> None:
    sections: Any = {"evaluate": {"metrics": metrics}} if metrics else {}
    task = opened(tmp_path, task={**PAIR, "answer_pattern": r"\d+"}, **sections)
    assert list(task.metric_names) == names
    found = [p.what for p in task.metric_problems() if "answer_pattern" in p.what]
    assert len(found) == problems
    assert task.metric_context.answer_pattern == r"\d+"
    plain = opened(tmp_path, task=PAIR, **sections)
    assert list(plain.metric_names) == (metrics or ["perplexity"])
    found = [p.what for p in plain.metric_problems() if p.what.startswith("`answer_pattern`")]
    assert found == []


def test_metrics_of_text_need_a_prompt_and_one_answer(tmp_path: Path) -> None:
    def problems(task: Any) -> list[str]:
        return [problem.what for problem in task.metric_problems()]

    bleu = {"evaluate": {"metrics": ["perplexity", "bleu"]}}
    likelihood = {"evaluate": {"metrics": ["perplexity"]}}
    assert problems(opened(tmp_path, **bleu)) == ["metric `bleu` needs prompts to answer"]
    assert problems(opened(tmp_path, **likelihood)) == []
    assert problems(opened(tmp_path, task={**PAIR, "train_on": "all"}, **bleu)) == []
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    keys = {"messages_column": "m", "text_column": None, "chat_template": "chat.jinja"}
    for train_on, sections, said in (
        ("all", bleu, ["metric `bleu` reads the assistant's answer, not all turns"]),
        ("last", bleu, []), ("all", likelihood, []),
    ):  # fmt: skip
        task = opened(tmp_path, task={**keys, "train_on": train_on}, **sections)
        assert problems(task) == said


@pytest.mark.parametrize(
    ("split", "first", "error"),
    [
        ("validation", 0, False), ("validation", 199, False), ("validation", 200, True),
        ("train", 200, False),
    ],
)  # fmt: skip
def test_a_pattern_is_tried_on_the_first_rows_of_evaluated_splits(
    split: str, first: int, error: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextTask, "learn_from", lambda *_: None)
    rows = [{"q": "?", "a": "7" if i == first else "none"} for i in range(300)]

    def batches(size: int) -> Iterator[list[dict[str, str]]]:
        yield rows[:size]

    found: Any = SimpleNamespace(
        parts=[SimpleNamespace(batches=batches)], place=lambda i: f"line {i + 1}"
    )
    task = opened(tmp_path, task={**PAIR, "answer_pattern": r"\d+"})
    if not error:
        task.learn_from({split: found})
        opened(tmp_path, task=PAIR).learn_from({split: found})
        return
    with pytest.raises(
        LoraError, match="finds no answer in the references of the validation rows"
    ) as e:
        task.learn_from({split: found})
    assert "it is at line 1" in str(e.value)


# ---------------------------------------------------------------------------------- the model


def test_layer_drop_is_named_and_turned_off() -> None:
    one = PretrainedConfig(decoder_layerdrop=0.1, encoder_layerdrop=0.0)
    two = PretrainedConfig(layerdrop=0.3, encoder_layerdrop=0.2)
    none = PretrainedConfig(hidden_size=3)
    assert layer_drop_of(none) is None
    said = "of the model {} set to 0: no layer is skipped in training"
    assert layer_drop_of(one) == f"`decoder_layerdrop` {said.format('is')}"
    assert layer_drop_of(two) == f"`encoder_layerdrop` and `layerdrop` {said.format('are')}"
    for config in (one, two):
        keep_all_layers(config)
        assert layer_drop_of(config) is None
    assert two.layerdrop == two.encoder_layerdrop == 0.0
    assert "layerdrop" not in keep_all_layers(none).to_dict()


@pytest.mark.parametrize("shift", [0, 1])
def test_losses_of_a_row_are_summed_over_its_trained_tokens(shift: int) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(2, 4, 5, generator=generator)
    labels = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    places = [(0, 0), (0, 2), (1, 1)]
    expected = [0.0, 0.0]
    for row, at in places:
        expected[row] += float(F.cross_entropy(scores[row, at], labels[row, at + shift]))
    positions = torch.tensor([row * 4 + at for row, at in places])
    options = {"shift": 1} if shift else {}
    found = sum_token_losses(scores, labels, positions, **options)
    assert found.tolist() == pytest.approx(expected)
    parts = sum_token_losses(HiddenStates(scores, lambda states: states), labels, positions, shift)
    assert parts.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_logits_are_computed_for_some_tokens_if_the_result_is_the_same(
    kernels: str, tmp_path: Path
) -> None:
    task = opened(tmp_path, train={"kernels": kernels})
    model, _ = task.load_model(CPU)
    example = task.trial_examples(16)[1]
    batch = task.collate([example])
    with torch.no_grad():
        scores = task.logits(model.eval().requires_grad_(False), batch.inputs)
        task.check_trial(model, example, scores[0])
        assert (task.logit_transform is None) == (kernels == "reference")
        found = task.forward(model, batch)
        assert isinstance(found, HiddenStates) == (kernels == "auto")
        other = opened(tmp_path, train={"kernels": kernels})
        other.fit_as(task)
        assert other.logit_transform is task.logit_transform
        # rows of the same length alone give scores in several parts
        task.padding = NONE
        torch.testing.assert_close(task.forward(model, batch), scores)
        task.check_trial(model, example, scores[0])
        assert task.logit_transform is None


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_notes_on_the_base_are_printed_once_by_one_process(
    rank: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = opened(tmp_path)
    said: list[str] = []
    monkeypatch.setattr(writing_task, "warn", said.append)
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    word = tokens(" dull")[0]
    config = SimpleNamespace(eos_token_id=[tiny.EOS, word], to_dict=lambda: {"top_k": 7})
    model: Any = SimpleNamespace(generation_config=config)
    for _ in range(2):
        task.warn_of_base_settings(model)
    if rank == "1":
        assert said == []
        return
    settings, stops = said
    assert settings.startswith("the base's generation_config.json asks for top_k 7;")
    assert "answers end at `</s>` (2), " in stops
    usual = opened(tmp_path)
    config.to_dict, config.eos_token_id = dict, tiny.EOS
    usual.warn_of_base_settings(model)
    assert len(said) == 2
    usual.end_of_turn = [word]
    assert usual.stop_ids(model) == sorted({tiny.EOS, word})


def test_cut_prompts_and_answers_are_counted_since_the_last_warning(tmp_path: Path) -> None:
    task = opened(tmp_path)
    assert task.take_warnings() == []
    task.n_cut_answers, task.n_cut_prompts = 2, 1
    answers, prompts = task.take_warnings()
    assert answers.startswith("2 answers ended where the model's 128 tokens end")
    assert prompts == "1 prompt lost the beginning, to leave room for the answer"
    assert task.take_warnings() == []
