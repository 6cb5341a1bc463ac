"""Embeddings: vectors, losses and ranks are those of sentence-transformers and of plain torch."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import tiny_embedders as embedders
import torch
import yaml
from accelerate import Accelerator
from closeness import assert_close
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoTokenizer

from lora_cli.accelerator import start_accelerator
from lora_cli.adapters.attach import attach, trainable_parameters, training_mode
from lora_cli.errors import IntegrityError, LoraError
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.evaluation.predict import answer, answer_file
from lora_cli.export.merge import merge_adapter
from lora_cli.files import write_manifest
from lora_cli.metrics.retrieval_scores import retrieval_scores
from lora_cli.models.sentence_transformer import LENGTH
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_adapter_recipe, load_recipe
from lora_cli.recipe.spec import TextEmbeddingSpec
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import prepared_for_evaluation
from lora_cli.tasks.embeddings import embedding_search
from lora_cli.tasks.embeddings.embedding_losses import ANCHOR, NEGATIVE, POSITIVE, embedding_losses
from lora_cli.tasks.embeddings.embedding_search import labelled_corpus, pairs_corpus, search
from lora_cli.tasks.text_embedding import TextEmbedding
from lora_cli.training import train
from lora_cli.training.batches import prepared_for
from lora_cli.training.checkpoints import checkpoints
from lora_cli.training.coupled_step import add_coupled_gradients
from lora_cli.training.engine import Engine

Json = dict[str, Any]
CPU = torch.device("cpu")
TASK: Json = {"type": "text_embedding"}
LABELLED = {**TASK, "anchor_column": "text", "label_column": "label"}
ROWS: list[Json] = [
    {"anchor": f"{tiny.CORPUS[i % 8]} {i}", "positive": f"number {i} , {tiny.CORPUS[(i + 3) % 8]}"}
    for i in range(10)
]


def write_recipe(
    folder: Path, rows: list[Json] = ROWS, task: Json | None = None, base: Json | None = None,
    **sections: Json,
) -> Path:  # fmt: skip
    """Write a base, rows and a recipe for them; return the recipe."""
    folder.mkdir(exist_ok=True)
    if not (folder / "base").exists():
        embedders.save(folder / "base", **(base or {}))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    values = {
        "model": {"name": str(folder / "base")},
        "task": {**TASK, **(task or {})},
        "data": {
            "train": "rows.jsonl", "validation": "rows.jsonl", "check": {"max_overlap": 1.0}
        },
        "adapter": {"rank": 2, "alpha": 4, "target_modules": "all-linear"},
        "train": {"max_steps": 2, "micro_batch_size": 2, "gradient_accumulation_steps": 2,
                  "optimizer": {"learning_rate": 0.02}},
    }  # fmt: skip
    return tiny.write_recipe(folder, values, sections)


def opened(path: Path, *overrides: str) -> Any:
    """Return the task of a recipe, with its tokenizer, and the model without an adapter."""
    task = build_task(load_recipe(path, list(overrides)))
    task.load_processor()
    model, _ = task.load_model(CPU)
    task.fit_to_model(model)
    return task, model.eval()


def run(path: Path, out: Path, *overrides: str) -> Json:
    with contextlib.redirect_stderr(io.StringIO()):
        return train(load_recipe(path, [f"output_dir={out}", *overrides]))


# ------------------------------------------------------------------------------------- losses


def facts_of(
    rows: int, negatives: int = 0, scores: Tensor | None = None, **equal: list[int]
) -> dict[str, Tensor]:
    """Return what is known of anchors, positives and negatives that are all different."""
    roles = [ANCHOR] * rows + [POSITIVE] * rows + [NEGATIVE] * (rows * negatives)
    of = torch.arange(rows).repeat(2 + negatives)
    return {
        "row": of,
        "role": torch.tensor(roles),
        "text": torch.tensor(equal.get("text", list(range(len(roles))))),
        "label": torch.tensor(equal.get("label", [0] * rows)).repeat(2 + negatives),
        "score": (torch.zeros(rows) if scores is None else scores).repeat(2 + negatives),
    }


def vectors_of(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 6, generator=generator, dtype=torch.float64)


def spec_of(**keys: Any) -> TextEmbeddingSpec:
    return TextEmbeddingSpec.model_validate({**TASK, **keys})


def proves_loss(rows: str, model: str = "roberta") -> pytest.MarkDecorator:
    return pytest.mark.proves(
        "loss", task="text_embedding", rows=rows, model=model, base="plain",
        against="sentence-transformers",
    )  # fmt: skip


@proves_loss("texts that belong together")
@proves_loss("texts with wrong answers", "llama")
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_in_batch_negatives_are_those_of_sentence_transformers(
    negatives: int, symmetric: bool
) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    vectors = vectors_of(5 * (2 + negatives))
    directions = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    theirs = losses.MultipleNegativesRankingLoss(
        None, scale=4.0, directions=directions, partition_mode="per_direction"
    ).compute_loss_from_embeddings(list(vectors.split(5)), torch.zeros(5))
    spec = spec_of(temperature=0.25, symmetric=symmetric)
    ours = embedding_losses(vectors, facts_of(5, negatives), spec)
    assert ours.shape == (5,)
    assert float(ours.mean()) == pytest.approx(float(theirs), rel=1e-12)


@proves_loss("pairs of texts with scores")
@proves_loss("pairs of texts and their cosines")
def test_scored_pairs_are_those_of_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    vectors, scores = vectors_of(12), torch.tensor([0.1, 0.9, 0.5, 0.5, 0.0, 1.0]).double()
    facts = facts_of(6, scores=scores)
    theirs = losses.CoSENTLoss(None, scale=10.0).compute_loss_from_embeddings(
        list(vectors.split(6)), scores
    )
    ours = embedding_losses(vectors, facts, spec_of(score_column="score", temperature=0.1))
    assert ours.tolist() == pytest.approx([float(theirs)] * 6, rel=1e-12)
    cosine = losses.CosineSimilarityLoss(None)
    theirs = cosine.compute_loss_from_embeddings(list(vectors.split(6)), scores)
    ours = embedding_losses(vectors, facts, spec_of(score_column="score", loss="cosine"))
    assert float(ours.mean()) == pytest.approx(float(theirs), rel=1e-12)


def test_what_may_be_right_is_no_wrong_answer() -> None:
    # anchors 0 1 2 3, positives 4 5 6 7, negatives 8 9 10 11; rows 0 and 1 ask the same, the
    # positive of row 2 is that of row 3, the negative of row 3 is the anchor of row 2
    texts = [0, 0, 2, 3, 4, 5, 6, 6, 8, 9, 10, 2]
    vectors = vectors_of(12)
    found = embedding_losses(vectors, facts_of(4, 1, text=texts), spec_of(temperature=0.5))
    unit = normalize(vectors, dim=-1)
    left_out = {0: [1], 1: [0], 2: [3, 7], 3: [2]}  # places among positives and negatives
    for i in range(4):
        kept = [i, *(j for j in range(8) if j != i and j not in left_out[i])]
        scores = unit[4:][kept] @ unit[i] / 0.5
        wanted = cross_entropy(scores[None], torch.tensor([0]))
        assert float(found[i]) == pytest.approx(float(wanted), rel=1e-12), i


def test_a_text_of_the_same_label_is_no_wrong_answer() -> None:
    vectors, labels = vectors_of(8), [7, 8, 7, 9]
    spec = spec_of(anchor_column="text", label_column="label", symmetric=True)
    found = embedding_losses(vectors, facts_of(4, label=labels), spec)
    cosines = normalize(vectors[:4], dim=-1) @ normalize(vectors[4:], dim=-1).T / 0.05
    cosines[0, 2] = cosines[2, 0] = -torch.inf
    own = torch.arange(4)
    both = [cross_entropy(scores, own, reduction="none") for scores in (cosines, cosines.T)]
    assert_close(found, torch.stack(both).mean(0))


def test_a_step_of_one_row_and_one_without_order_are_finite() -> None:
    vectors = vectors_of(4).requires_grad_()
    for facts, spec in (
        (facts_of(2, text=[0, 0, 2, 2]), spec_of(symmetric=True)),
        (facts_of(2, scores=torch.ones(2)), spec_of(score_column="score")),
    ):
        loss = embedding_losses(vectors, facts, spec).sum()
        (gradient,) = torch.autograd.grad(loss, vectors)
        assert float(loss.detach()) == 0.0
        assert float(gradient.abs().max()) == 0.0


# -------------------------------------------------------------------------------- whole steps


def test_what_drops_out_drops_out_in_both_passes(tmp_path: Path) -> None:
    """The gradients are those of the embeddings that the loss was computed of."""
    task, model = opened(write_recipe(tmp_path, adapter={"dropout": 0.3}))
    attach(model, task.recipe)
    tiny.wake(model, std=0.1)
    training_mode(model.double())
    split = load_data(task)["train"]
    parts = [[0, 1, 2], [3, 4], [5, 6, 7, 8, 9]]
    batches = [task.collate([split.examples[i] for i in part]) for part in parts]
    parameters = trainable_parameters(model)
    weights = {"loss": torch.tensor(0.1)}

    torch.manual_seed(5)
    outputs = torch.cat([task.forward(model, batch) for batch in batches])
    targets = {k: torch.cat([b.targets[k] for b in batches]) for k in batches[0].targets}
    wanted_loss = embedding_losses(outputs, targets, task.spec).sum() * 0.1
    wanted = torch.autograd.grad(wanted_loss, list(parameters.values()))

    torch.manual_seed(5)
    loss = add_coupled_gradients(Engine(model, task, None, Accelerator()), batches, weights)
    assert float(loss) == pytest.approx(float(wanted_loss.detach()), rel=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for (name, parameter), gradient in zip(parameters.items(), wanted, strict=True):
        assert parameter.grad is not None, name
        assert float((parameter.grad - gradient).abs().max()) <= 1e-5 * scale, name


def test_a_batch_that_is_a_step_is_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, train={"micro_batch_size": 4, "gradient_accumulation_steps": 1})
    counts = []
    for cut in ([], ["train.micro_batch_size=2", "train.gradient_accumulation_steps=2"]):
        task, model = opened(path, *cut)
        split = load_data(task)["train"]
        examples = [split.examples[i] for i in range(4)]
        size = task.micro_batch
        batches = [task.collate(examples[i : i + size]) for i in range(0, 4, size)]
        calls: list[int] = []
        forward = task.forward
        monkeypatch.setattr(task, "forward", lambda *a, f=forward, c=calls: (c.append(1), f(*a))[1])
        attach(model, task.recipe)
        engine = Engine(model, task, None, Accelerator())
        add_coupled_gradients(engine, batches, {"loss": torch.tensor(0.25)})
        counts.append(len(calls))
    assert counts == [1, 4]


def test_positives_are_drawn_by_seed_step_and_row(tmp_path: Path) -> None:
    rows = [{"text": f"{tiny.CORPUS[i % 8]} {i // 8}", "label": "ab"[i % 2]} for i in range(16)]
    rows += rows[:2]  # a text that is there twice is not its own positive
    task, _ = opened(write_recipe(tmp_path, rows, LABELLED))
    split = load_data(task)["train"]
    of_row = {
        int(e["texts"][0]): int(e["label"]) for e in map(split.examples.__getitem__, range(16))
    }
    drawn = set()
    for step in range(20):
        for i in range(len(split)):
            example = prepared_for(task, split.examples[i], 3, step)
            own, other = example["texts"]
            assert own != other
            assert of_row[int(other)] == int(example["label"])
            again = prepared_for(task, split.examples[i], 3, step)
            assert again["input_ids"] == example["input_ids"]
            drawn.add((i, int(other)))
    assert len(drawn) > 60  # of 18 rows, each with 7 others
    for encoded in map(split.examples.__getitem__, range(len(split))):
        evaluated = prepared_for_evaluation(task, encoded)
        assert evaluated["input_ids"] == encoded["input_ids"]
        assert list(evaluated["lengths"]) == [len(encoded["input_ids"])]


# ----------------------------------------------------------------------------------- vectors


@pytest.fixture
def sentence_transformer() -> Any:
    return pytest.importorskip("sentence_transformers").SentenceTransformer


TEXTS = ["a warm film", "the plot is dull and slow , and far too long " * 9, "x"]


@pytest.mark.parametrize(
    ("base", "task"),
    [
        ({"pooling": "mean"}, {}),
        ({"pooling": "cls", "normalize": False}, {}),
        ({"pooling": "last", "decoder": True}, {"max_length": 40}),
        ({"prompts": {"query": "a film : ", "document": "text : "}}, {"max_length": 24}),
    ],
)
def test_embeddings_are_those_of_sentence_transformers(
    base: Json, task: Json, sentence_transformer: Any, tmp_path: Path
) -> None:
    made, model = opened(write_recipe(tmp_path, task=task, base=base))
    with torch.no_grad():
        found = [row[0] for row in made.answer(model, [{"anchor": text} for text in TEXTS])]
    theirs = sentence_transformer(str(tmp_path / "base"), device="cpu")
    theirs.max_seq_length = made.max_length
    if theirs.tokenizer.pad_token is None:
        theirs.tokenizer.pad_token = theirs.tokenizer.eos_token
    prompt = {"prompt_name": "query"} if "prompts" in base else {}
    wanted = theirs.encode(TEXTS, convert_to_numpy=True, **prompt)
    assert_close(torch.tensor(found), torch.from_numpy(wanted))
    lengths = np.linalg.norm(found, axis=-1)
    assert (np.abs(lengths - 1) < 1e-5).all() == base.get("normalize", True)


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_roberta_config.json"])
@pytest.mark.parametrize(
    "reading",
    [
        {"max_seq_length": 6, "do_lower_case": False},
        {"max_seq_length": None, "do_lower_case": True},
        {"max_seq_length": 24, "do_lower_case": True},
    ],
)
def test_texts_are_read_as_the_base_says(
    reading: Json, name: str, sentence_transformer: Any, tmp_path: Path
) -> None:
    texts = ["A Warm FILM", "a warm film", "the film " * 9]
    path = write_recipe(tmp_path, task={}, base={})
    values = yaml.safe_load(path.read_text())
    values["task"].pop("max_length", None)
    path.write_text(yaml.safe_dump(values))
    (tmp_path / "base" / name).write_text(json.dumps(reading))
    made, model = opened(path)
    with torch.no_grad():
        found = [row[0] for row in made.answer(model, [{"anchor": text} for text in texts])]
    wanted = sentence_transformer(str(tmp_path / "base"), device="cpu").encode(texts)
    assert_close(torch.tensor(found), torch.from_numpy(wanted))
    length = reading["max_seq_length"]
    assert made.learned.task.get("max_length") == length
    # what is written beside an adapter, or a merged model, reads them likewise
    (tmp_path / "written").mkdir()
    made.save_processor(tmp_path / "written")
    kept = sentence_transformer(str(tmp_path / "base"), device="cpu")
    again = AutoTokenizer.from_pretrained(tmp_path / "written")
    assert again.tokenize(texts[0]) == kept.tokenizer.tokenize(texts[0])
    assert json.loads((tmp_path / "written" / LENGTH).read_text())["max_seq_length"] == (
        length or made.max_length
    )


def test_a_length_of_the_recipe_comes_before_that_of_the_base(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, task={"max_length": 24}, base={})
    (tmp_path / "base" / LENGTH).write_text(json.dumps({"max_seq_length": 6}))
    task, _ = opened(path)
    assert task.max_length == 24
    assert any("cuts texts at 6 tokens" in note for note in task.notes)
    (tmp_path / "base" / LENGTH).write_text(json.dumps({"max_seq_length": 24}))
    assert not any("cuts texts" in note for note in opened(path)[0].notes)
    (tmp_path / "base" / LENGTH).write_text(json.dumps({"max_seq_length": "six"}))
    with pytest.raises(IntegrityError, match="cannot be read"):
        opened(path)


def test_what_a_row_looks_for_is_shown(tmp_path: Path) -> None:
    task, _ = opened(write_recipe(tmp_path))
    assert task.shown_reference({"anchor": "a film", "positive": "a movie"}) == "a movie"
    assert task.shown_reference({"anchor": "a film"}) is None


def test_each_text_of_an_example_is_shown_with_what_it_is(tmp_path: Path) -> None:
    row = {"anchor": "a film", "positive": "a plot", "no": ["slow", "dull"], "score": 0.5}
    for keys, lines, facts in (
        ({"negative_columns": ["no"]}, ["anchor: a film", "positive: a plot", "negative: slow",
                                        "negative: dull"], []),
        ({"score_column": "score"}, ["anchor: a film", "second: a plot"], ["score 0.5"]),
        ({"anchor_column": "anchor", "label_column": "positive"}, ["text: a film"], []),
    ):  # fmt: skip
        folder = tmp_path / "-".join(keys)
        task, _ = opened(write_recipe(folder, task=keys))
        ((example,),) = task.encode([row])
        found, text = task.shown(example, False)
        plain = re.sub(r"<[^>]*>|\[[A-Z]+\]", " ", text)
        assert ([" ".join(line.split()) for line in plain.splitlines()], found) == (lines, facts)


@pytest.mark.parametrize(
    ("base", "recipe", "hint"),
    [
        (6, None, "the base cuts texts there: `--set task.max_length=128` does not"),
        (128, None, "the model takes no more than 128 tokens: shorten the texts"),
        (6, 24, "raise `task.max_length`"),
    ],
)
def test_what_to_do_about_long_texts_goes_by_what_cuts_them(
    base: int, recipe: int | None, hint: str, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, task={"max_length": recipe} if recipe else {})
    (tmp_path / "base" / LENGTH).write_text(json.dumps({"max_seq_length": base}))
    task: Any = build_task(load_recipe(path))
    task.load_processor()
    assert task.longer_hint == hint


def test_new_and_old_files_say_the_same(sentence_transformer: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, base={"pooling": "cls", "normalize": False})
    assert opened(path)[0].pooling == "cls"
    sentence_transformer(str(tmp_path / "base"), device="cpu").save(str(tmp_path / "again"))
    task, _ = opened(path, f"model.name={tmp_path / 'again'}")
    assert (task.pooling, task.normalize) == ("cls", False)


def test_the_recipe_comes_before_the_base(tmp_path: Path) -> None:
    task = {"pooling": "last", "normalize": False, "anchor_prompt": "", "positive_prompt": "d: "}
    prompts = {"query": "q: ", "document": "p: "}
    path = write_recipe(tmp_path, task=task, base={"pooling": "max", "prompts": prompts})
    made, _ = opened(path)
    assert made.completed_recipe.task.model_dump(include=set(task)) == task
    assert made.shown(load_data(made)["train"].examples[0], False)[1].count("d: ") == 1


# ------------------------------------------------------------------------------------- search


def plain_ranks(cosines: np.ndarray[Any, Any], right: set[int], without: set[int]) -> list[int]:
    """Return the ranks of right texts: of equally near ones, those that are wrong come first."""
    order = sorted(
        set(range(len(cosines))) - without, key=lambda i: (-round(cosines[i], 5), i in right)
    )
    return [rank for rank, i in enumerate(order, 1) if i in right]


@pytest.mark.parametrize(("at_once", "sizes"), [(100, [3] * 3 + [1]), (19, [1] * 10)])
def test_cosines_in_memory_are_limited(
    at_once: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_search, "MAX_COSINES", at_once)
    own, found = embedding_search._results, []

    def noted(cosines: Tensor, right: Tensor) -> Any:
        found.append(len(cosines))
        return own(cosines, right)

    monkeypatch.setattr(embedding_search, "_results", noted)
    vectors = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    corpus, _ = pairs_corpus(vectors[:10], vectors[:10], range(10), range(100, 110))
    assert len(search(replace(corpus, texts=vectors))) == 10
    assert found == sizes


def test_ranks_are_those_of_sentence_transformers() -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.evaluation import (
        InformationRetrievalEvaluator,
    )

    generator = np.random.default_rng(0)
    anchors, positives = generator.normal(size=(2, 40, 5)).astype(np.float32)
    texts = list(range(40))
    asked = [i - i % 2 if i < 12 else i for i in texts]  # some anchors have two right texts
    anchors = anchors[asked]
    corpus, rows = pairs_corpus(anchors, positives, asked, [100 + i for i in texts])
    assert rows == texts
    found = [one for one in search(corpus) if one is not None]
    ours = retrieval_scores([one.ranks for one in found], [len(r) for r in corpus.right])
    evaluator = InformationRetrievalEvaluator(
        {str(i): str(i) for i in texts}, {str(i): str(i) for i in texts},
        {str(i): {str(j) for j in corpus.right[i]} for i in texts},
        corpus_chunk_size=64, accuracy_at_k=[1], precision_recall_at_k=[1, 10], mrr_at_k=[10],
        ndcg_at_k=[10], map_at_k=[10],
    )  # fmt: skip

    class Known:
        similarity_fn_name = "cosine"
        model_card_data = None

        def similarity(self, a: Tensor, b: Tensor) -> Tensor:
            return normalize(a, dim=-1) @ normalize(b, dim=-1).T

    a, b = (normalize(torch.from_numpy(x), dim=-1) for x in (anchors, positives))
    scores = (a @ b.T).numpy()
    results = [
        [{"score": float(scores[i, j]), "corpus_id": str(j)} for j in np.argsort(-scores[i])[:10]]
        for i in texts
    ]
    theirs = evaluator.compute_metrics(results)
    assert ours == pytest.approx(
        {
            "ndcg_at_10": theirs["ndcg@k"][10],
            "mrr_at_10": theirs["mrr@k"][10],
            "accuracy_at_1": theirs["accuracy@k"][1],
            "recall_at_1": theirs["recall@k"][1],
            "recall_at_10": theirs["recall@k"][10],
        }
    )


def test_a_search_ranks_as_sorting_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lora_cli.tasks.embeddings.embedding_search.MAX_COSINES", 100
    )  # several parts
    generator = np.random.default_rng(1)
    vectors = generator.normal(size=(30, 4)).astype(np.float32)
    texts = [i % 25 for i in range(30)]  # the last five texts are there twice
    vectors = vectors[texts]
    labels = [i % 3 for i in texts]
    labels[29] = 9  # a text with two labels; the second label has no other text
    corpus, rows = labelled_corpus(vectors, texts, labels)
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    for i, found in enumerate(search(corpus)):
        cosines = unit[rows] @ unit[i]
        own = {j for j, row in enumerate(rows) if texts[row] == texts[i]}
        right = {j for j, row in enumerate(rows) if labels[row] == labels[i]} - own
        if not right:
            assert found is None
            continue
        ranks = plain_ranks(cosines, right, own)
        assert found is not None
        assert (found.ranks, found.best) == ([r for r in ranks if r <= 10], ranks[0])
        assert found.cosine == pytest.approx(max(cosines[j] for j in right), abs=1e-6)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_embeddings_that_are_all_the_same_find_nothing(value: float) -> None:
    vectors = np.full((20, 4), value, dtype=np.float32)
    corpus, _ = pairs_corpus(vectors, vectors, list(range(20)), list(range(50, 70)))
    found = [one for one in search(corpus) if one is not None]
    assert [one.best for one in found] == [20] * 20
    assert not any(one.ranks for one in found)


def test_a_text_whose_embedding_is_no_number_is_the_farthest() -> None:
    vectors = np.eye(12, dtype=np.float32)
    texts = vectors.copy()
    texts[3] = math.nan
    corpus, _ = pairs_corpus(vectors, texts, list(range(12)), list(range(50, 62)))
    found = [one.best for one in search(corpus) if one is not None]
    assert found == [12 if place == 3 else 1 for place in range(12)]


# --------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Json]:
    folder = tmp_path_factory.mktemp("pairs")
    path = write_recipe(folder, train={"max_steps": 6}, evaluate={"every_steps": 3})
    return folder, run(path, folder / "out")


def test_a_run_says_what_is_found_before_and_after(trained: tuple[Path, Json]) -> None:
    folder, report = trained
    before, after = (report["metrics"][when]["validation"] for when in ("before", "after"))
    assert before.keys() == after.keys() > {"loss", "ndcg_at_10", "recall_at_1", "recall_at_10"}
    assert after["loss"] < before["loss"]
    assert report["best"]["metric"] == "ndcg_at_10"
    lines = (folder / "out/predictions/validation.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    ranks = [line["scores"]["rank"] for line in found]
    assert np.mean([rank == 1 for rank in ranks]) == pytest.approx(after["accuracy_at_1"])
    assert {line["prediction"] for line in found} <= {row["positive"] for row in ROWS}
    assert [line["reference"] for line in found] == [row["positive"] for row in ROWS]
    page = (folder / "out/report.html").read_text(encoding="utf-8")
    assert "<h2>Ranks</h2>" in page
    assert "FEATURE_EXTRACTION" in (folder / "out/adapter_config.json").read_text()
    assert "AutoModel" in (folder / "out/README.md").read_text(encoding="utf-8")


def test_a_complete_run_takes_what_it_found_in_its_base_and_rejects_other_keys(
    trained: tuple[Path, Json], tmp_path: Path
) -> None:
    folder, report = trained
    out, path = tmp_path / "out", folder / "recipe.yaml"
    shutil.copytree(folder / "out", out)
    with contextlib.redirect_stderr(io.StringIO()):
        again = train(load_recipe(path, [f"output_dir={out}"]), resume=True)
        assert again["metrics"] == report["metrics"]
        with pytest.raises(LoraError, match=r"`task\.pooling: mean`, the recipe now says `cls`"):
            train(load_recipe(path, [f"output_dir={out}", "task.pooling=cls"]), resume=True)
        (_, newest) = checkpoints(out)[-1]
        state = json.loads((newest / "trainer.json").read_text())
        state["recipe"]["task"]["max_length"] = 16  # as if the recipe had said so then
        (newest / "trainer.json").write_text(json.dumps(state))
        write_manifest(newest)
        with pytest.raises(LoraError, match=r"`task\.max_length: 16`, the recipe now says `"):
            train(load_recipe(path, [f"output_dir={out}"]), resume=True)


def test_the_loss_does_not_depend_on_how_many_are_embedded_together(
    trained: tuple[Path, Json],
) -> None:
    folder, report = trained
    for size in (1, 7):
        recipe = load_adapter_recipe(folder / "out", [f"evaluate.micro_batch_size={size}"])
        found = evaluate_adapter(folder / "out", recipe)["validation"]
        assert found == pytest.approx(report["metrics"]["after"]["validation"], rel=1e-4)


def test_predict_writes_embeddings_of_any_file(trained: tuple[Path, Json]) -> None:
    folder, _ = trained
    task, model, accelerator = open_adapter(folder / "out", load_adapter_recipe(folder / "out", []))
    texts = [*(row["anchor"] for row in ROWS), ""]
    source = folder / "texts.csv"
    source.write_text("".join(f'"{t}"\n' for t in ["anchor", *texts]), encoding="utf-8")
    wanted = [
        row[0] for row in answer(model, task, [{"anchor": t} for t in texts[:-1]], accelerator)
    ]
    arrays = []
    for name in ("found.npy", "found.jsonl", "found.parquet", "found.csv"):
        written, problems = answer_file(model, task, source, folder / name, accelerator)
        assert (written, [p.what for p in problems]) == (11, ["column `anchor` is blank"])
    array = np.load(folder / "found.npy")
    assert (array.shape, array.dtype) == ((11, 32), np.float32)
    assert np.isnan(array[10]).all()
    assert np.array_equal(array[:10], np.array(wanted, dtype=np.float32))
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "found.parquet")
    arrays.append(table.column("embedding").to_pylist()[:10])
    lines = (folder / "found.jsonl").read_text(encoding="utf-8").splitlines()
    arrays.append([json.loads(line)["embedding"] for line in lines][:10])
    for found in arrays:
        assert np.array_equal(np.array(found, dtype=np.float32), array[:10])


def test_merged_and_adapted_models_are_read_by_others(
    trained: tuple[Path, Json], sentence_transformer: Any, tmp_path: Path
) -> None:
    folder, _ = trained
    task, model, accelerator = open_adapter(folder / "out", load_adapter_recipe(folder / "out", []))
    texts = [row["anchor"] for row in ROWS]
    rows = answer(model, task, [{"anchor": text} for text in texts], accelerator)
    wanted = torch.tensor([row[0] for row in rows])
    result = merge_adapter(None, folder / "out", tmp_path / "merged")
    assert result.verified
    merged = sentence_transformer(str(tmp_path / "merged"), device="cpu")
    assert merged.max_seq_length == task.max_length
    assert_close(torch.from_numpy(merged.encode(texts)), wanted)
    base = sentence_transformer(str(folder / "base"), device="cpu")
    assert float(np.abs(base.encode(texts) - wanted.numpy()).max()) > 1e-3
    base.load_adapter(str(folder / "out"))
    assert_close(torch.from_numpy(base.encode(texts)), wanted)
    whole = sentence_transformer(str(folder / "out"), device="cpu")  # finds the base by itself
    assert_close(torch.from_numpy(whole.encode(texts)), wanted)


@pytest.mark.parametrize(
    "adapter",
    [{"rank": 2, "bias": "all"}, {"type": "dora", "rank": 2, "bias": "all"}, {"type": "bitfit"}],
    ids=["lora", "dora", "bitfit"],
)
def test_all_biases_are_those_of_what_is_used(
    adapter: Json, sentence_transformer: Any, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, adapter=adapter)
    run(path, tmp_path / "out")
    recipe = load_adapter_recipe(tmp_path / "out", [])
    task, model, accelerator = open_adapter(tmp_path / "out", recipe)
    texts = [row["anchor"] for row in ROWS]
    rows = answer(model, task, [{"anchor": text} for text in texts], accelerator)
    merge_adapter(None, tmp_path / "out", tmp_path / "merged")
    merged = sentence_transformer(str(tmp_path / "merged"), device="cpu")
    assert_close(torch.from_numpy(merged.encode(texts)), torch.tensor([row[0] for row in rows]))


def test_a_whole_model_is_read_by_sentence_transformers(
    sentence_transformer: Any, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, adapter={"type": "full"}, base={"pooling": "cls"})
    values = yaml.safe_load(path.read_text())
    values["adapter"] = {"type": "full"}
    path.write_text(yaml.safe_dump(values))
    run(path, tmp_path / "out")
    task, model, accelerator = open_adapter(
        tmp_path / "out", load_adapter_recipe(tmp_path / "out", [])
    )
    rows = answer(model, task, ROWS, accelerator)
    theirs = sentence_transformer(str(tmp_path / "out"), device="cpu")
    found = torch.from_numpy(theirs.encode([row["anchor"] for row in ROWS]))
    assert_close(found, torch.tensor([row[0] for row in rows]))


def test_texts_by_label_learn_their_label(tmp_path: Path) -> None:
    rows = [
        {"text": f"{tiny.CORPUS[i % 8]} {i // 8}", "label": ["film", "plot"][i % 2]}
        for i in range(16)
    ]
    report = run(write_recipe(tmp_path, rows, LABELLED, train={"max_steps": 4}), tmp_path / "out")
    assert report["answers"] == "single_label"
    assert report["data"]["train"]["labels"] == {"film": 8, "plot": 8}
    after = report["metrics"]["after"]["validation"]
    lines = (tmp_path / "out/predictions/validation.jsonl").read_text().splitlines()
    right = [line["reference"] == line["prediction"] for line in map(json.loads, lines)]
    assert np.mean(right) == pytest.approx(after["accuracy_at_1"])
    assert after["accuracy_at_1"] >= report["metrics"]["before"]["validation"]["accuracy_at_1"]


def test_numbers_of_labels_have_the_names_in_the_file(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["plot", "film", "cast"])
    of_type = datasets.Features({"text": datasets.Value("string"), "label": label})
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(6)]
    path = write_recipe(tmp_path, task=LABELLED, data={"train": "rows.parquet"})
    datasets.Dataset.from_list(rows, features=of_type).to_parquet(tmp_path / "rows.parquet")
    task: Any = build_task(load_recipe(path, ["data.validation=null"]))
    task.load_processor()
    split = load_data(task)["train"]
    assert [task.labels_of(row) for row in split.rows] == [["plot"], ["film"]] * 3
    assert task.label_counts(split.rows) == {"film": 3, "plot": 3}
    labels = [int(split.examples[i]["label"]) for i in range(6)]
    assert labels == labels[:2] * 3
    assert labels[0] != labels[1]
    assert [task.label_of({"label": n}) for n in (-1, 2, 3, "0")] == ["-1", "cast", "3", "0"]


def test_a_pair_has_the_cosine_of_its_vectors_whatever_their_lengths() -> None:
    score = {"score": np.array([0.25, 0.25], np.float32)}
    for second, cosine in (([0.0, 2.0], 0.8), ([-6.0, -8.0], -1.0), ([0.0, 0.0], 0.0)):
        pair = np.array([[3.0, 4.0], second], np.float32)
        found = TextEmbedding._scored(7, pair, score)
        assert (found.row, found.reference) == (7, 0.25)
        assert found.prediction == pytest.approx(cosine)
        assert found.metric_inputs == {"value": (found.prediction, 0.25)}


def test_scored_pairs_are_measured_by_spearman(tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    rows = [{**row, "score": f"{(i * 7) % 10 / 2}"} for i, row in enumerate(ROWS)]
    task = {"score_column": "score", "score_scale": 5.0}
    report = run(write_recipe(tmp_path, rows, task), tmp_path / "out")
    lines = (tmp_path / "out/predictions/validation.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["reference"] for line in found] == pytest.approx(
        [float(row["score"]) / 5 for row in rows], abs=1e-6
    )
    cosines, scores = ([line[key] for line in found] for key in ("prediction", "reference"))
    wanted = spearmanr(cosines, scores).statistic
    assert report["metrics"]["after"]["validation"]["spearman"] == pytest.approx(wanted)


# ------------------------------------------------------------------------------------- errors

BAD_ROWS = {
    "column `positive` is blank": {"anchor": "x", "positive": " "},
    "column `anchor` holds a list, not text": {"anchor": ["x"], "positive": "y"},
    "a negative is equal to the positive": {"anchor": "x", "positive": "y", "no": ["z", "y"]},
    "a negative is equal to the anchor": {"anchor": "x", "positive": "y", "no": "x"},
    "column `no` is blank in text 2 of its list": {"anchor": "x", "positive": "y", "no": ["z", ""]},
    "column `no` holds an object, not text": {"anchor": "x", "positive": "y", "no": {"a": 1}},
}


def test_a_list_of_negatives_in_a_table_is_not_one_text(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, task={"negative_columns": ["no"]}, data={"train": "rows.csv"})
    cells = ['"[""c d"", ""e""]"', "\"['c d' 'e']\"", "c d", "[c]", "[]", ""]
    lines = [f"a{i},b{i},{cell}" for i, cell in enumerate(cells)]
    (tmp_path / "rows.csv").write_text("\n".join(["anchor,positive,no", *lines]))
    task = build_task(load_recipe(path, ["data.validation=null"]))
    task.load_processor()
    rows = load_data(task)["train"].rows
    assert [task.texts_of(row)[2:] for row in rows] == [  # type: ignore[attr-defined]
        ["c d", "e"], ["c d", "e"], ["c d"], ["[c]"], [], []
    ]  # fmt: skip


@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_bad_row_is_named(what: str, tmp_path: Path) -> None:
    rows = [{"anchor": "a", "positive": "b", "no": ["c"]}, BAD_ROWS[what]]
    task = build_task(load_recipe(write_recipe(tmp_path, rows, {"negative_columns": ["no"]})))
    task.load_processor()
    with pytest.raises(LoraError, match=r"rows\.jsonl:2") as error:
        load_data(task)
    assert what in str(error.value)


@pytest.mark.parametrize(
    ("score", "what"),
    [
        ("3", "column `score` is 3, and a cosine is between -1 and 1"),
        ("high", "column `score` holds `high`, not a number"),
        (None, "column `score` is blank, not a number"),
    ],
)
def test_a_bad_score_is_named(score: Any, what: str, tmp_path: Path) -> None:
    rows = [{**ROWS[0], "score": 0.5}, {**ROWS[1], "score": score}]
    task = {"score_column": "score", "loss": "cosine"}
    made = build_task(load_recipe(write_recipe(tmp_path, rows, task)))
    made.load_processor()
    with pytest.raises(LoraError, match=r"rows\.jsonl:2") as error:
        load_data(made)
    assert what in str(error.value)


@pytest.mark.parametrize("score", [5, -5, 5.5, -6])
def test_a_score_of_the_whole_scale_is_a_cosine(score: float, tmp_path: Path) -> None:
    keys = {"score_column": "score", "loss": "cosine", "score_scale": 5}
    path = write_recipe(tmp_path, [{**ROWS[0], "score": score}], keys)
    error = build_task(load_recipe(path)).target_error({**ROWS[0], "score": score})  # type: ignore[attr-defined]
    assert error.startswith(f"column `score` is {score:g}, and" if abs(score) > 5 else "")
    assert bool(error) == (abs(score) > 5)


def test_a_label_of_one_text_is_named(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}, {"text": "c", "label": "y"},
            {"text": "C", "label": "y"}]  # fmt: skip
    task = build_task(load_recipe(write_recipe(tmp_path, rows, LABELLED)))
    task.load_processor()
    with pytest.raises(LoraError, match="the label `y` has one text in train: no") as error:
        load_data(task)
    assert "rows.jsonl:3" in str(error.value)


def test_other_labels_of_one_text_are_counted(tmp_path: Path) -> None:
    rows = [{"text": name, "label": name} for name in "abc"]
    task = build_task(load_recipe(write_recipe(tmp_path, rows, LABELLED)))
    task.load_processor()
    with pytest.raises(LoraError, match=r"`a` has one text in train \(as 2 other labels\): no"):
        load_data(task)


BAD_FILES = {
    "is it the right column": ({}, {"negative_columns": ["no"]}),
    "pools by `max_tokens`": ({"pooling": "max"}, {}),
    "without the prompt": ({"include_prompt": False}, {}),
    "would cut off the prompt": ({"prompts": {"query": "q: "}}, {"truncate": "left"}),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_base_that_embeds_otherwise_is_rejected(what: str, tmp_path: Path) -> None:
    base, task = BAD_FILES[what]
    rows = [{**row, "no": None} for row in ROWS]
    made = build_task(load_recipe(write_recipe(tmp_path, rows, task, base)))

    def read() -> None:
        made.load_processor()
        load_data(made)

    with pytest.raises(LoraError, match=what):
        read()


@pytest.mark.parametrize(
    ("modules", "what", "kind"),
    [
        ([{"type": "a.Dense", "path": "2_Dense"}], "through `Dense`", LoraError),
        ([{"type": "a.Transformer", "path": "0_Transformer"}], "lies in its folder", LoraError),
        ([1], "modules.json of .* cannot be read", IntegrityError),
        ("{", "modules.json of .* cannot be read", IntegrityError),
    ],
)
def test_modules_that_are_not_known_are_rejected(
    modules: Any, what: str, kind: type[LoraError], tmp_path: Path
) -> None:
    path = write_recipe(tmp_path)
    text = modules if isinstance(modules, str) else json.dumps(modules)
    (tmp_path / "base" / "modules.json").write_text(text)
    with pytest.raises(kind, match=what):
        build_task(load_recipe(path)).load_processor()


def test_a_text_that_is_too_long_is_not_embedded(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, task={"truncate": "error", "max_length": 40})
    task = build_task(load_recipe(path, ["task.max_length=6"]))
    task.load_processor()
    problem = task.answer_problem({"anchor": tiny.CORPUS[0]})
    assert problem is not None
    assert problem.what == "it has 7 tokens, more than 6"
    exact = build_task(load_recipe(path, ["task.max_length=7"]))
    exact.load_processor()
    assert exact.answer_problem({"anchor": tiny.CORPUS[0]}) is None
    assert task.answer_error({"anchor": "a"}) == ""


def test_an_array_has_no_room_for_words(tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "words")
    path = tiny.recipe(base, tmp_path)
    task = build_task(load_recipe(path))
    accelerator = start_accelerator(task.recipe)
    (tmp_path / "texts.txt").write_text("a\n")
    with pytest.raises(LoraError, match="no room for answers in words"):
        answer_file(
            torch.nn.Linear(1, 1), task, tmp_path / "texts.txt", tmp_path / "a.npy", accelerator
        )


def test_a_copied_model_keeps_its_pooler_out_of_training(tmp_path: Path) -> None:
    task, model = opened(write_recipe(tmp_path))
    model = copy.deepcopy(model)
    attach(model, task.recipe)
    assert not [name for name in trainable_parameters(model) if name.startswith("pooler")]
    assert [name for name in trainable_parameters(model) if "output.dense" in name]


# ------------------------------------------------------------------------------ one value at a time


def test_each_prompt_stands_before_the_texts_of_its_side() -> None:
    task: Any = object.__new__(TextEmbedding)
    task.anchor_prompt, task.positive_prompt = "query: ", "passage: "
    assert task.prompted(["a", "b", "c"]) == ["query: a", "passage: b", "passage: c"]


@pytest.mark.parametrize(
    ("keys", "pairs", "labelled"),
    [
        ({}, ("q: ", "d: "), ("q: ", "q: ")),
        ({"anchor_prompt": "a: "}, ("a: ", "d: "), ("a: ", "a: ")),
        ({"anchor_prompt": ""}, ("", "d: "), ("", "")),
        ({"positive_prompt": "b: "}, ("q: ", "b: "), None),
        ({"anchor_prompt": "a: ", "positive_prompt": "b: "}, ("a: ", "b: "), None),
    ],
)  # fmt: skip
def test_prompts_are_the_recipe_s_or_else_those_of_the_base(
    keys: Json, pairs: tuple[str, str], labelled: tuple[str, str] | None, tmp_path: Path
) -> None:
    base = {"prompts": {"query": "q: ", "document": "d: "}}
    for task_keys, wanted in ((TASK, pairs), (LABELLED, labelled)):
        if wanted is None:
            continue
        folder = tmp_path / task_keys.get("label_column", "pairs")
        task: Any = build_task(load_recipe(write_recipe(folder, ROWS, {**task_keys, **keys}, base)))
        task.load_processor()
        assert (task.anchor_prompt, task.positive_prompt) == wanted
        assert task.learned.task["positive_prompt"] == wanted[1]


def test_a_plain_base_gets_mean_pooling_and_unit_vectors(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    for given, wanted in ((None, True), (False, False)):
        sets = [] if given is None else [f"task.normalize={json.dumps(given)}"]
        task, model = opened(path, *sets)
        assert (task.pooling, task.normalize) == ("mean", wanted)
        (vector,) = (torch.tensor(one) for (one,) in task.answer(model, [{"anchor": "a film"}]))
        assert (abs(float(vector.norm()) - 1) < 1e-5) == wanted


def test_texts_stand_by_role_in_a_batch_and_in_each_role_by_example(tmp_path: Path) -> None:
    task, _ = opened(write_recipe(tmp_path))
    examples = [
        {"input_ids": [9, 9, *[10 + i] * 3, 20 + i], "lengths": [2, 3, 1], "texts": [i, 5 + i, 7],
         "label": 0, "score": 0.5, "row": i}
        for i in range(2)
    ]  # fmt: skip
    batch = task.collate(examples)
    assert batch.targets["role"].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.targets["row"].tolist() == [0, 1, 0, 1, 0, 1]
    assert batch.targets["text"].tolist() == [0, 1, 5, 6, 7, 7]
    lengths = batch.inputs["attention_mask"].sum(1).tolist()
    assert lengths == [2, 2, 3, 3, 1, 1]
    assert batch.inputs["input_ids"][:, 0].tolist() == [9, 9, 10, 11, 20, 21]
    assert batch.cost == 12


def test_of_an_anchor_that_looked_for_nothing_the_wanted_text_is_kept(tmp_path: Path) -> None:
    task, _ = opened(write_recipe(tmp_path))
    split: Any = SimpleNamespace(rows=[{"anchor": "a", "positive": "b"}])
    found = task._retrieved(0, None, 0, split, [], [])
    assert (found.row, found.prediction, found.reference) == (0, None, "b")
