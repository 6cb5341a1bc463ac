"""Encoder-decoders: the loss and the answers are those of transformers, row by row."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_translators as translators
import torch
import torch.nn.functional as F
from closeness import assert_close
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
)

from lora_cli.accelerator import start_accelerator
from lora_cli.adapters.attach import attach
from lora_cli.errors import LoraError
from lora_cli.evaluation.predict import answer
from lora_cli.export.merge import merge_adapter
from lora_cli.preprocessing.check_recipe import check_recipe
from lora_cli.preprocessing.data_gate import inspect_data, pass_gate
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.training import train

Json = dict[str, Any]
ROWS = [
    {"source": "a warm film", "target": "great fun 1"},
    {"source": "the plot is dull and slow , and far too long", "target": "a long bore"},
    {"source": "great", "target": "the cast is warm and the story is funny and great"},
    {"source": "what a great story", "target": "x"},
]
CPU = torch.device("cpu")


def write_recipe(
    folder: Path, kind: str, rows: list[Json] = ROWS, task: Json | None = None, **sections: Json
) -> Path:
    """Write a base, rows and a recipe for them; return the recipe."""
    base = translators.save(folder / "base", kind)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    values = {
        "model": {"name": str(base)},
        "task": {"type": "seq2seq_lm", **translators.languages(kind), **(task or {})},
        "data": {
            "train": "rows.jsonl", "validation": "rows.jsonl", "check": {"max_overlap": 1.0}
        },
        "adapter": {"rank": 2, "alpha": 4},
        "train": {"max_steps": 2, "micro_batch_size": 2, "optimizer": {"learning_rate": 0.01}},
        "evaluate": {"generation": {"max_new_tokens": 12}},
    }  # fmt: skip
    return tiny.write_recipe(folder, values, sections)


def opened(path: Path, *overrides: str) -> tuple[Any, Any, Any]:
    """Return a task, its base in float64, and its encoded rows."""
    task = build_task(load_recipe(path, list(overrides)))
    task.load_processor()
    split = load_data(task)["train"]
    model, _ = task.load_model(CPU)
    model = model.double().eval()
    task.fit_to_model(model)
    return task, model, split


def save_m2m100(folder: Path) -> Path:
    """Save a model as M2M100's with its own tokenizer, which reads by sentencepiece."""
    sentencepiece, model = pytest.importorskip("sentencepiece"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.CORPUS * 3), model_writer=model, vocab_size=90,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder.mkdir()
    (folder / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    read = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [read.id_to_piece(i) for i in range(3, read.get_piece_size())]
    vocabulary = {name: i for i, name in enumerate(["<s>", "<pad>", "</s>", "<unk>", *pieces])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    files = {"vocab_file": "vocab.json", "spm_file": "sentencepiece.bpe.model"}
    M2M100Tokenizer(**{k: str(folder / v) for k, v in files.items()}).save_pretrained(folder)
    config = translators.model("nllb").config
    config.vocab_size = len(vocabulary) + 108  # of 100 languages, and 8 that nothing stands for
    built = tiny.enliven(M2M100ForConditionalGeneration(config), 0)
    built.save_pretrained(folder)
    return folder


def test_the_tokenizer_of_m2m100_reads_and_writes_as_in_transformers(tmp_path: Path) -> None:
    base = save_m2m100(tmp_path / "m2m100")
    path = write_recipe(
        tmp_path, "nllb", task={"source_language": "en", "target_language": "de"},
        model={"name": str(base)},
    )  # fmt: skip
    task, model, split = opened(path)
    theirs = AutoTokenizer.from_pretrained(base)
    theirs.src_lang, theirs.tgt_lang = "en", "de"
    for row, example in zip(ROWS, split.examples, strict=True):
        assert example["input_ids"] == theirs(row["source"]).input_ids
        assert example["labels"] == theirs(text_target=row["target"]).input_ids
    answers = [text for (text,) in task.answer(model, ROWS)]
    for row, text in zip(ROWS, answers, strict=True):
        with torch.no_grad():
            (ids,) = model.generate(
                **theirs(row["source"], return_tensors="pt"), max_new_tokens=12,
                forced_bos_token_id=theirs.get_lang_id("de"), suppress_tokens=[1],
            )  # fmt: skip
        assert ids[1] == theirs.get_lang_id("de")
        assert text == theirs.decode(ids[2:], skip_special_tokens=True).strip()
    assert all(answers)
    assert not any(text.startswith("__de__") for text in answers)


@pytest.fixture(scope="module", params=translators.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("base")
    path = write_recipe(folder, kind, task={"prefix": "say : "})
    reference = AutoModelForSeq2SeqLM.from_pretrained(folder / "base", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    if languages := translators.languages(kind):
        tokenizer.src_lang, tokenizer.tgt_lang = languages.values()
    return (*opened(path), reference, tokenizer)


def proves(*what: str) -> pytest.MarkDecorator:
    return pytest.mark.proves(
        *what,
        task="seq2seq_lm",
        rows=lambda kind, **_: (
            "translation between languages" if translators.languages(kind) else "translation"
        ),
        model=lambda kind, **_: "m2m_100" if kind == "nllb" else kind,
        against="transformers",
    )


@proves("loss")
@pytest.mark.slow_after(2)
def test_the_loss_is_that_of_transformers(kind: str, base: tuple[Any, ...]) -> None:
    task, model, split, reference, tokenizer = base
    batch = task.collate([split.examples[i] for i in range(len(ROWS))])
    found = task.losses(model, task.forward(model, batch), batch)["loss"]
    expected = []
    for row in ROWS:
        inputs = tokenizer(f"say : {row['source']}", return_tensors="pt")
        labels = tokenizer(text_target=row["target"], return_tensors="pt")["input_ids"]
        loss = reference(**inputs, labels=labels).loss
        expected.append(loss * labels.shape[1])
    assert_close(found.double(), torch.stack(expected).detach(), 1e-5)
    assert batch.items["loss"].tolist() == [
        len(tokenizer(text_target=row["target"])["input_ids"]) for row in ROWS
    ]


def test_fsmt_whose_output_layer_is_its_embedding(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "fsmt")
    task = build_task(load_recipe(path))
    task.load_processor()
    split = load_data(task)["train"]
    model = task.load_model(CPU)[0].eval()  # in float64 its masks overflow
    task.fit_to_model(model)
    batch = task.collate([split.examples[i] for i in range(len(ROWS))])
    labels = batch.targets["labels"].clone()
    found = task.losses(model, task.forward(model, batch), batch)["loss"]
    assert torch.equal(batch.targets["labels"], labels)  # the model fills what it is given
    reference = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    for row, loss in zip(ROWS, found, strict=True):
        wanted = tokenizer(text_target=row["target"], return_tensors="pt")["input_ids"]
        inputs = tokenizer(row["source"], return_tensors="pt")
        shifted = wanted.roll(1)  # the model starts with the end of a text
        # with a cache, each of its tokens would see those after it
        logits = reference(**inputs, decoder_input_ids=shifted, use_cache=False).logits[0]
        assert_close(loss, F.cross_entropy(logits, wanted[0], reduction="sum").detach(), 1e-5)
    report = train(load_recipe(path, [f"output_dir={tmp_path / 'out'}"]))
    assert report["training"]["steps"] == 2


def test_what_fills_a_target_changes_no_loss_where_the_model_would_read_it(tmp_path: Path) -> None:
    # ProphetNet's decoder looks several tokens ahead: its scores depend on the length of a row
    path = write_recipe(tmp_path, "bart")
    both = ("encoder", "decoder")
    sizes = {f"num_{side}_layers": 1 for side in both} | {f"{side}_ffn_dim": 48 for side in both}
    sizes |= {f"num_{side}_attention_heads": 4 for side in both} | {"hidden_size": 32}
    config = ProphetNetConfig(
        vocab_size=tiny.vocabulary(), max_position_embeddings=tiny.POSITIONS, pad_token_id=tiny.PAD,
        bos_token_id=tiny.BOS, eos_token_id=tiny.EOS, decoder_start_token_id=tiny.EOS, **sizes,
    )  # fmt: skip
    base = tmp_path / "prophet"
    tiny.enliven(ProphetNetForConditionalGeneration(config)).save_pretrained(base)
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(base)
    task = build_task(load_recipe(path, [f"model.name={base}"]))
    task.load_processor()
    split = load_data(task)["train"]
    model, _ = task.load_model(CPU)
    task.fit_to_model(model.eval())  # in float64 its masks are no numbers
    batch = task.collate([split.examples[i] for i in range(len(ROWS))])
    found = task.losses(model, task.forward(model, batch), batch)["loss"]
    for loss, row in zip(found, ROWS, strict=True):
        inputs = tokenizer(row["source"], return_tensors="pt")
        labels = tokenizer(row["target"], return_tensors="pt")["input_ids"]
        scores = model(**inputs, labels=labels).logits[0]
        wanted = torch.nn.functional.cross_entropy(scores, labels[0], reduction="sum")
        assert_close(loss.detach(), wanted.detach(), 1e-5)


@proves("predict")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.slow_after(3)
def test_answers_are_those_of_transformers(kind: str, base: tuple[Any, ...], beams: int) -> None:
    task, model, _, reference, tokenizer = base
    generation = task.recipe.evaluate.generation.model_copy(
        update={"num_beams": beams, "length_penalty": 0.6 if beams > 1 else 1.0}
    )
    task.recipe = task.recipe.with_values({"evaluate.generation": generation})
    accelerator = start_accelerator(task.recipe)
    found = [values[0] for values in answer(model, task, ROWS, accelerator)]
    options = {
        "max_new_tokens": 12, "num_beams": beams, "do_sample": False, "eos_token_id": tiny.EOS,
        "pad_token_id": tiny.PAD, "suppress_tokens": [tiny.PAD],
        "decoder_start_token_id": reference.config.decoder_start_token_id,
    }  # fmt: skip
    if beams > 1:
        options["length_penalty"] = 0.6
    if kind == "nllb":
        options["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids("deu_Latn")
    elif kind == "mbart":
        options["decoder_start_token_id"] = tokenizer.convert_tokens_to_ids("de_DE")
    elif kind in ("bart", "t5", "led"):  # the tokenizer of the tests begins each text so
        options["forced_bos_token_id"] = tiny.BOS
    reference.generation_config = GenerationConfig()
    for row, text in zip(ROWS, found, strict=True):
        inputs = tokenizer(f"say : {row['source']}", return_tensors="pt")
        output = reference.generate(**inputs, generation_config=GenerationConfig(**options))
        wanted = tokenizer.decode(output[0], skip_special_tokens=True)
        assert text == wanted.strip().rstrip("\N{REPLACEMENT CHARACTER}"), row
    assert any(found) or beams > 1


def test_a_start_token_that_the_tokenizer_writes_too_stands_there_once(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "bart")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "decoder_start_token_id": tiny.BOS}), encoding="utf-8")
    task, model, split = opened(path)
    assert split.examples[0]["labels"][0] != tiny.BOS
    batch = task.collate([split.examples[0]])
    read = model.prepare_decoder_input_ids_from_labels(labels=batch.inputs["labels"])[0].tolist()
    assert read.count(tiny.BOS) == 1
    assert read[0] == tiny.BOS


def test_what_fills_a_target_is_masked_by_its_place(tmp_path: Path) -> None:
    """Also where the end-of-text token fills rows: the end itself is trained."""
    path = write_recipe(tmp_path, "marian")
    task, _, split = opened(path)
    task.pad = tiny.EOS
    batch = task.collate([split.examples[i] for i in range(len(ROWS))])
    labels = batch.targets["labels"]
    assert (labels == tiny.EOS).sum(-1).tolist() == [1] * len(ROWS)
    assert (labels == -100).sum(-1).tolist() == [
        labels.shape[1] - len(split.examples[i]["labels"]) for i in range(len(ROWS))
    ]


@pytest.mark.parametrize("kind", ["bart", "nllb", "mbart"])
@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("how", ["right", "left"])
def test_long_texts_are_cut_inside_what_begins_and_ends_them(
    side: str, how: str, kind: str, tmp_path: Path
) -> None:
    keys = {"prefix": "a , ", f"max_{side}_length": 9, f"truncate_{side}": how}
    path = write_recipe(tmp_path, kind, task=keys)
    task = build_task(load_recipe(path))
    task.load_processor()
    data = load_data(task)
    split = data["train"]
    text = "the plot is dull and slow , and far too long"
    whole = task.texts.sources([text])[0] if side == "source" else task.texts.targets([text])[0]
    row = {"source": text, "target": "x"} if side == "source" else {"source": "x", "target": text}
    (example,) = task.encode([row])[0]
    ids = example["input_ids" if side == "source" else "labels"]
    frame = task.texts.source_frame if side == "source" else task.texts.target_frame
    assert len(ids) == 9 < len(whole)
    assert tuple(ids[: len(frame.before)]) == frame.before
    assert tuple(ids[len(ids) - len(frame.after) :]) == frame.after
    inner = ids[len(frame.before) : len(ids) - len(frame.after)]
    whole_inner = whole[len(frame.before) : len(whole) - len(frame.after)]
    if how == "right":
        assert inner == whole_inner[: len(inner)]
    else:
        prefix = task.texts._prefix_ids if side == "source" else []
        assert inner == [*prefix, *whole_inner[len(whole_inner) - len(inner) + len(prefix) :]]
        assert side == "target" or str(task.tokenizer.decode(inner)).startswith("a ,")
    other = task.encode([{"source": "x", "target": "x"}])[0][0]
    assert "full_length" not in other
    assert example["full_length"] == len(whole) + len(
        other["labels" if side == "source" else "input_ids"]
    )
    note = task.cut_note(split)
    end = "the beginning" if how == "left" else "the end"
    assert note is not None
    assert f"{side}s lost {end} (more than 9 tokens)" in note or f"1 {side} lost {end}" in note


def test_long_rows_may_be_left_out_or_rejected(tmp_path: Path) -> None:
    keys = {"max_source_length": 10, "truncate_source": "drop"}
    path = write_recipe(tmp_path, "marian", task=keys)
    _, data = inspect_data(load_recipe(path))
    assert data["train"].rows_without_example == 1
    with pytest.raises(LoraError) as error:
        inspect_data(load_recipe(path, ["task.truncate_source=error"]))
    (problem,) = error.value.problems
    assert problem.what.startswith("the source has ")
    assert "more than 10" in problem.what
    assert problem.at is not None
    assert "rows.jsonl:2" in problem.at


def test_counts_of_the_cut_stand_in_the_table(tmp_path: Path) -> None:
    several = [{"source": "a", "target": ["the cast is warm and the story", "x"]}, *ROWS]
    path = write_recipe(
        tmp_path, "marian", several, task={"max_source_length": 10, "max_target_length": 6}
    )
    task, data = inspect_data(load_recipe(path))
    findings = pass_gate(task, data)
    assert findings.splits["train"].cut_rows == sum(
        any(e["cut"] for e in task.encode([row])[0]) for row in several
    )
    assert findings.splits["train"].divided_rows == 0
    assert "cut at 10 + 6" in findings.table()


# -------------------------------------------------------------------------- several references

SEVERAL = [
    {"source": "a warm film", "target": ["great fun and a great cast", "what a great story"]},
    {"source": "great", "target": ["the film is a bore"]},
    {"source": "the plot", "target": "a long and boring plot and slow"},
]


@pytest.mark.slow
def test_each_of_several_references_is_trained_and_compared(tmp_path: Path) -> None:
    import sacrebleu

    metrics = ["bleu", "chrf", "rouge", "exact_match", "perplexity"]
    path = write_recipe(
        tmp_path, "t5", SEVERAL, evaluate={"metrics": metrics}, adapter={"target_modules": ["q"]}
    )
    out = tmp_path / "out"
    report = train(load_recipe(path, [f"output_dir={out}"]))
    lines = (out / "predictions" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    predictions = [json.loads(line) for line in lines]
    assert [line["reference"] for line in predictions] == [row["target"] for row in SEVERAL]
    answers = [line["prediction"] for line in predictions]
    streams = [
        ["great fun and a great cast", "the film is a bore", SEVERAL[2]["target"]],
        ["what a great story", None, None],
    ]
    after = report["metrics"]["after"]["validation"]
    assert after["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(answers, streams, use_effective_order=True).score
    )
    assert after["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, streams).score)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    targets = [t for row in SEVERAL for t in (row["target"] if isinstance(row["target"], list)
                                              else [row["target"]])]  # fmt: skip
    assert sum(line["n_items"] for line in predictions) == sum(
        len(tokenizer(text)["input_ids"]) for text in targets
    )
    assert "nrefs:var" in report["metric_definitions"]["bleu"]


def test_what_is_wrong_with_a_row_is_said_with_its_place(tmp_path: Path) -> None:
    wrong: list[tuple[Json, str]] = [
        ({"source": "", "target": "x"}, "column `source` is blank"),
        ({"source": "x", "target": None}, "column `target` is blank"),
        ({"source": "x", "target": []}, "column `target` holds an empty list"),
        ({"source": "x", "target": ["y", " "]}, "column `target` is blank in text 2 of its list"),
        ({"source": "x", "target": ["y", {"a": 1}]}, "holds an object, not text in text 2"),
        ({"source": ["x"], "target": "y"}, "column `source` holds a list, not text"),
    ]
    path = write_recipe(tmp_path, "marian", [*ROWS, *(row for row, _ in wrong)])
    with pytest.raises(LoraError) as error:
        inspect_data(load_recipe(path))
    shown = str(error.value)
    assert "rows.jsonl:5" in shown
    task = build_task(load_recipe(path))
    for row, reason in wrong:
        assert reason in task.row_error(row), row


# ------------------------------------------------------------------------------------ languages


@pytest.mark.parametrize(
    ("kind", "keys", "what", "at"),
    [
        ("marian", {"source_language": "en", "target_language": "de"}, "marks no languages",
         "task.source_language"),
        ("nllb", {"source_language": "eng_Latn", "target_language": "deu_Lat"},
         "no language `deu_Lat`", "task.target_language"),
        ("nllb", {"source_language": None, "target_language": None},
         "does not say which is the source", "task.source_language"),
    ],
)  # fmt: skip
def test_languages_have_to_be_the_tokenizers(
    kind: str, keys: Json, what: str, at: str, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, kind, task=keys)
    with pytest.raises(LoraError) as error:
        check_recipe(load_recipe(path))
    found = next(p for p in error.value.problems if what in p.what)
    assert found.at is not None
    assert at in found.at
    assert ("did you mean `deu_Latn`?" in (found.hint or "")) == ("no language `" in what)


def test_one_language_needs_the_other(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "nllb", task={"target_language": None})
    with pytest.raises(LoraError, match="`source_language` needs `target_language`"):
        load_recipe(path)


@pytest.mark.parametrize("kind", ["bart", "nllb", "mbart"])
@pytest.mark.parametrize("split", [False, True])
def test_control_tokens_in_texts_are_read_as_asked(kind: str, split: bool, tmp_path: Path) -> None:
    rows = [{"source": "a </s> film", "target": "fun </s> and"}, *ROWS]
    path = write_recipe(tmp_path, kind, rows, task={"split_special_tokens": split})
    task = build_task(load_recipe(path))
    task.load_processor()
    (example,) = task.encode(rows[:1])[0]
    count = 1 if split else 2
    assert example["input_ids"].count(tiny.EOS) == count
    assert example["labels"].count(tiny.EOS) == count
    # what stands around is as without
    plain = task.encode([{"source": "a", "target": "a"}])[0][0]
    assert example["input_ids"][0] == plain["input_ids"][0]
    assert example["labels"][-1] == plain["labels"][-1]


# ------------------------------------------------------------------------------- the base model


def test_the_base_s_generation_config_is_not_used_and_warned_about_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, "nllb")
    task, model, _ = opened(path)
    plain = task.answer(model, ROWS)
    model.generation_config = GenerationConfig(
        num_beams=4, repetition_penalty=3.0, bad_words_ids=[[5]], max_length=3,
        decoder_start_token_id=7, forced_bos_token_id=task.texts.target_frame.before[0],
    )  # fmt: skip
    task._has_warned = False
    capsys.readouterr()
    assert task.answer(model, ROWS) == plain
    assert task.answer(model, ROWS) == plain
    printed = capsys.readouterr().err
    assert printed.count("bad_words_ids [[5]], num_beams 4, repetition_penalty 3.0") == 1
    assert "forced_bos" not in printed


def test_layers_are_not_skipped_at_random(tmp_path: Path) -> None:
    task, model, _ = opened(write_recipe(tmp_path, "nllb"))
    assert model.config.encoder_layerdrop == model.config.decoder_layerdrop == 0.0
    assert any("`encoder_layerdrop` and `decoder_layerdrop`" in note for note in task.notes)


def test_t5_in_float16_is_warned_of(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "t5", train={"precision": "fp16"})
    task = build_task(load_recipe(path))
    task.load_processor()
    assert any("often make NaN in float16" in note for note in task.notes)


def test_a_decoder_is_no_encoder_decoder(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "marian")
    tiny.save_gpt2(tmp_path / "gpt2")
    with pytest.raises(LoraError, match="is no encoder-decoder") as error:
        check_recipe(load_recipe(path, [f"model.name={tmp_path / 'gpt2'}"]))
    assert "T5, BART, Marian" in str(error.value)


def test_lengths_are_those_that_the_model_takes(tmp_path: Path) -> None:
    keys = {"max_source_length": 1000, "max_target_length": 1000}
    task = build_task(load_recipe(write_recipe(tmp_path / "led", "led", task=keys)))
    task.load_processor()
    assert (task.limit("source"), task.limit("target")) == (tiny.POSITIONS, 64)
    assert task.length_note is not None
    assert "`task.max_target_length` is 1000, and the model takes 64" in task.length_note
    # T5 has no positions to run out of: what the recipe says is done
    task = build_task(load_recipe(write_recipe(tmp_path / "t5", "t5", task=keys)))
    task.load_processor()
    assert (task.limit("source"), task.limit("target")) == (1000, 1000)
    task = build_task(load_recipe(write_recipe(tmp_path / "other", "t5")))
    task.load_processor()
    assert task.limit("source") == tiny.POSITIONS


def test_answers_end_where_the_decoder_ends(tmp_path: Path) -> None:
    generation = {"generation": {"max_new_tokens": 500}}
    task, model, _ = opened(write_recipe(tmp_path, "led", evaluate=generation))
    with torch.no_grad():
        model.final_logits_bias[0, tiny.EOS] = -1e4
    (texts,) = zip(*task.answer(model, ROWS), strict=True)
    assert all(texts)
    assert any("4 answers ended where the decoder's 64 tokens end" in w
               for w in task.take_warnings())  # fmt: skip


# ------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("kind", ["bart", "t5", "marian", "nllb"])
def test_all_linear_layers_but_the_last_are_adapted(kind: str, tmp_path: Path) -> None:
    task = build_task(load_recipe(write_recipe(tmp_path, kind)))
    task.load_processor()
    model, head = task.empty_model()
    linear = [
        name for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    ]  # fmt: skip
    attach(model, task.recipe, head)
    adapted = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters()
               if ".lora_A" in name}  # fmt: skip
    assert adapted == set(linear)


@proves("save")
@pytest.mark.parametrize("kind", ["bart", "t5", "nllb"])
@pytest.mark.slow_after(1)
def test_peft_reads_our_adapter_and_we_read_pefts(kind: str, tmp_path: Path) -> None:
    import peft

    path = write_recipe(tmp_path, kind)
    out = tmp_path / "out"
    train(load_recipe(path, [f"output_dir={out}"]))
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    task, model, split = opened(path)
    batch = task.collate([split.examples[i] for i in range(len(ROWS))])
    base = copy.deepcopy(model)
    theirs = peft.PeftModel.from_pretrained(base, out).eval()
    assert isinstance(theirs, peft.PeftModelForSeq2SeqLM)
    merged = tmp_path / "merged"
    merge_adapter(None, out, merged)
    ours = AutoModelForSeq2SeqLM.from_pretrained(merged, dtype=torch.float64).eval()
    with torch.no_grad():
        wanted = task.logits(theirs.get_base_model(), batch.inputs)
        assert_close(task.logits(ours, batch.inputs), wanted, 1e-5)
    # and back: PEFT writes it, without any recipe
    theirs.save_pretrained(tmp_path / "peft")
    again = tmp_path / "again"
    result = merge_adapter(str(tmp_path / "base"), tmp_path / "peft", again)
    assert result.merged_modules > 0
    back = AutoModelForSeq2SeqLM.from_pretrained(again, dtype=torch.float64).eval()
    with torch.no_grad():
        assert_close(task.logits(back, batch.inputs), wanted, 1e-5)


@pytest.mark.parametrize("kind", ["nllb", "mbart"])
@pytest.mark.slow
def test_a_merged_model_writes_the_language_by_itself(kind: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, kind)
    out, merged = tmp_path / "out", tmp_path / "merged"
    train(load_recipe(path, [f"output_dir={out}"]))
    merge_adapter(None, out, merged)
    model = AutoModelForSeq2SeqLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    code = tokenizer.convert_tokens_to_ids(translators.languages(kind)["target_language"])
    inputs = tokenizer("a warm film", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=1)
    assert code in output[0, :2].tolist()


@pytest.mark.parametrize("kind", ["t5", "nllb", "mbart"])
def test_the_code_of_the_card_writes_what_predict_does(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, kind, task={"prefix": "a , "})
    task, model, _ = opened(path)
    model.generation_config = GenerationConfig(
        pad_token_id=tiny.PAD, eos_token_id=tiny.EOS, suppress_tokens=[tiny.PAD],
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        forced_bos_token_id=tiny.BOS if kind == "t5" else None,
    )  # fmt: skip
    ((wanted,),) = task.answer(model, [{"source": "Some text"}])
    usage = task.spec.usage([], task.recipe.evaluate.generation)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    capsys.readouterr()
    exec(f"{usage.setup}\n{usage.code}", {"tokenizer": tokenizer, "model": model})
    printed = capsys.readouterr().out
    assert printed.strip().rstrip("\N{REPLACEMENT CHARACTER}") == wanted
