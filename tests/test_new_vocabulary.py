"""Tests of new vocabularies, against transformers' fine-tuning examples and PEFT."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import tiny_ctc
import tiny_speech
import torch
import yaml
from closeness import assert_close, assert_different
from peft import PeftModel
from test_ctc_recognition import decode, load_task_and_data, make_batch, run, write_recipe_file
from transformers import (
    AutoModelForCTC,
    AutoProcessor,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.evaluation.predict import answer
from lora_cli.export.merge import merge_adapter
from lora_cli.preprocessing.check_recipe import check_recipe, empty_adapted_model
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_adapter_recipe, load_recipe
from lora_cli.recipe_draft import draft_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.speech.new_vocabulary import (
    build_tokenizer,
    has_tokenizer,
    letters_of,
    normalise_transcript,
)
from lora_cli.training import train

TEXTS = ("A warm film!", "Great.", "the plot is dull", "what a story", "it's warm")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, kind: str = "wav2vec2", **sections: Any) -> Path:
    """Write a base without a vocabulary, recordings and a recipe."""
    tiny_ctc.save_pretrained(folder / "base", kind)
    path = write_recipe_file(folder, **sections)
    for i, text in enumerate(TEXTS):
        (folder / f"speech/train/{i}.txt").write_text(f"{text}\n")
    for file in (*folder.glob("speech/validation/*.txt"), *folder.glob("speech/test/*.txt")):
        file.write_text("a dull story\n")
    return path


def example_processor(folder: Path, base: Path) -> Wav2Vec2Processor:
    """Return a processor as transformers' fine-tuning examples build it."""
    texts = [re.sub(r"[\,\?\.\!\-\;\:\"]", "", text).lower() for text in TEXTS]
    letters = sorted(set(" ".join(texts)))
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary["|"] = vocabulary.pop(" ")
    vocabulary["[UNK]"] = len(vocabulary)
    vocabulary["[PAD]"] = len(vocabulary)
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"), unk_token="[UNK]", pad_token="[PAD]", word_delimiter_token="|"
    )
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor.from_pretrained(base), tokenizer)


@pytest.mark.slow_after(1)
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # WavLM's
@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "wavlm"])
def test_vocabulary_and_losses_equal_those_of_transformers_examples(
    kind: str, tmp_path: Path
) -> None:
    task, model, data = load_task_and_data(write(tmp_path, kind))
    processor = example_processor(tmp_path / "usual", tmp_path / "base")
    assert task.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    reference = AutoModelForCTC.from_pretrained(
        tmp_path / "base", ctc_loss_reduction="sum", dtype=torch.float64,
        pad_token_id=processor.tokenizer.pad_token_id, vocab_size=len(processor.tokenizer),
    ).eval()  # fmt: skip
    reference.lm_head.load_state_dict(model.lm_head.state_dict())  # randomly initialised
    split = data["train"]
    batch = make_batch(task, split, range(5))
    output = task.forward(model, batch)
    losses = task.losses(model, output, batch)["loss"]
    predictions = task.predictions(model, output, batch)
    for i in range(5):
        samples, rate = soundfile.read(split.rows[i]["audio"]["path"])
        inputs = processor(samples, sampling_rate=rate, return_tensors="pt")
        text = re.sub(r"[\,\?\.\!\-\;\:\"]", "", split.rows[i]["text"]).lower()
        labels = processor(text=text, return_tensors="pt")["input_ids"]
        assert list(split.examples[i]["labels"]) == labels[0].tolist()
        expected = reference(inputs["input_values"].double(), labels=labels)
        assert_close(losses[i], expected.loss.detach(), 1e-5)
        best = expected.logits[0].argmax(-1)
        assert predictions[i].prediction == decode(processor, best)


def test_a_run_from_training_to_the_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = {"learning_rate": 0.05}
    path = write(tmp_path, evaluate={"best": {"metric": "loss", "mode": "min"}},
                 train={"max_steps": 6, "optimizer": rate})  # fmt: skip
    report = run(path)
    out, file = tmp_path / "out", tmp_path / "speech/test/0.wav"
    recipe = load_adapter_recipe(out)
    assert recipe.task.letters == "'adefghilmoprstuwy"  # type: ignore[union-attr]
    before, after = (report["metrics"][when]["validation"]["loss"] for when in ("before", "after"))
    assert after < before
    metrics = evaluate_adapter(out, recipe, "validation")["validation"]
    assert metrics["loss"] == pytest.approx(after, rel=1e-5)

    task, model, accelerator = open_adapter(out, recipe)
    processor = Wav2Vec2Processor.from_pretrained(out)
    assert processor.tokenizer.get_vocab() == task.tokenizer.get_vocab()
    options = {"vocab_size": len(processor.tokenizer),
             "pad_token_id": processor.tokenizer.pad_token_id}  # fmt: skip
    base = AutoModelForCTC.from_pretrained(tmp_path / "base", **options)
    adapted = PeftModel.from_pretrained(base, out).eval()
    samples, rate = soundfile.read(file, dtype="float32")
    inputs = processor(samples, sampling_rate=rate, return_tensors="pt")
    scores = adapted(**inputs).logits
    text = decode(processor, scores.argmax(-1)[0])
    ((answer_text,),) = answer(model, task, [task.parse_input(str(file))], accelerator)
    assert answer_text == text

    merge_adapter(None, out, tmp_path / "merged")
    merged = AutoModelForCTC.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == len(processor.tokenizer)
    assert_close(merged(**inputs).logits, scores, 1e-4)
    assert_different(merged(**inputs).logits, scores + 1)
    again = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()

    # the merged model can be used as a base, and keeps its vocabulary
    on_top = write_recipe_file(tmp_path, model={"name": str(tmp_path / "merged")})
    task = build_task(load_recipe(on_top))
    task.load_processor()
    assert not task.is_new
    assert task.load_model(torch.device("cpu"))[1] == []

    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(out)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        exec(code.replace("recording.wav", str(file)), {})
    assert printed.getvalue().strip() == text


# --------------------------------------------------------------------------------- the letters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Well, GREAT!", "well great"),
        ("it's  3 o'clock\n", "it's 3 o'clock"),
        ("E\u0301te\u0301", "été"),  # letters and combining accents
        ("a|b", "ab"),
        ("über-groß", "übergroß"),
        ("नमस्ते", "नमस्ते"),  # vowels are combining marks
        ("東京。", "東京"),
        ("?!", ""),
        ("don\u2019t, well-known\u2014or", "don't wellknown or"),
    ],
)
def test_transcripts_are_normalised(text: str, expected: str) -> None:
    assert normalise_transcript(text) == expected


def test_letters_are_sorted_and_the_blank_is_last() -> None:
    letters = letters_of(["Ba b", "c'"])
    assert letters == "'abc"
    vocabulary = {name: i for name, i in build_tokenizer("cb'a").get_vocab().items() if i < 7}
    assert vocabulary == {"|": 0, "'": 1, "a": 2, "b": 3, "c": 4, "[UNK]": 5, "[PAD]": 6}
    assert build_tokenizer("e\u0301").get_vocab() == build_tokenizer("é").get_vocab()


def test_turkish_letters() -> None:
    letters = letters_of(["İzmir'de IŞIK ve dağ", "ılık"])
    assert letters == "".join(sorted(set("izmir'deışıkvedağlık")))
    assert letters_of(["I AM İN ISTANBUL"]) == "abilmnstu"  # not Turkish


def test_letters_missing_in_train_are_noted_and_unknown(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "speech/validation/0.txt").write_text("a żart\n")
    task, _, data = load_task_and_data(path)
    notes = "\n".join(task.notes)
    assert "a new vocabulary of 18 letters, `'adefghilmoprstuwy`" in notes
    assert "transcripts are read in lower case" in notes
    assert "letters of 1 validation transcript that the vocabulary lacks are [UNK]: ż" in notes
    split = data["validation"]
    texts = ["".join(task.tokenizer.convert_ids_to_tokens(e["labels"])) for e in split.examples]
    assert "a|[UNK]art" in texts
    assert task.reference(split.rows[texts.index("a|[UNK]art")]) == "a żart"


@pytest.mark.slow
def test_letters_of_the_recipe_replace_the_base_s_vocabulary(tmp_path: Path) -> None:
    base = tiny_ctc.save(tmp_path / "base", letters="ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    task, model, data = load_task_and_data(
        write_recipe_file(tmp_path, task={"letters": "GREATWHLPOMFDUISNY"})
    )
    vocabulary = task.tokenizer.get_vocab()
    assert vocabulary["A"] == 1
    assert model.lm_head.out_features == len(vocabulary)
    base_model = AutoModelForCTC.from_pretrained(base, dtype=torch.float64)
    assert_close(model.wav2vec2.encoder.layers[0].attention.k_proj.weight,
                 base_model.wav2vec2.encoder.layers[0].attention.k_proj.weight, 1e-6)  # fmt: skip
    text = task.tokenizer.convert_ids_to_tokens(data["train"].examples[0]["labels"])
    assert "".join(text).isupper()
    # with as many letters as the base's, the output layer is initialised anew all the same
    n_letters = base_model.config.vocab_size - 5
    as_many_letters = "".join(chr(ord("a") + i) for i in range(26))[:n_letters]
    task, model, _ = load_task_and_data(
        write_recipe_file(tmp_path, task={"letters": as_many_letters})
    )
    assert model.lm_head.weight.shape == base_model.lm_head.weight.shape
    assert_different(model.lm_head.weight, base_model.lm_head.weight)
    assert task.drawn == {"lm_head.weight", "lm_head.bias"}


def test_the_base_s_own_letters_are_not_a_new_vocabulary(tmp_path: Path) -> None:
    letters = "abcdefghilmnoprstuwy"
    tokenizer = build_tokenizer(letters)
    base = tiny_ctc.save(
        tmp_path / "base", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.save_pretrained(base)
    for recipe_letters, is_new in ((letters[::-1], False), (letters[1:], True), ("z", True)):
        task: Any = build_task(
            load_recipe(write_recipe_file(tmp_path, task={"letters": recipe_letters}))
        )
        task.load_processor()
        assert task.is_new is is_new
        assert set("".join(task.tokenizer.get_vocab())) >= set(recipe_letters)


def test_a_new_output_layer_is_known_without_a_model(tmp_path: Path) -> None:
    model = empty_adapted_model(load_recipe(write(tmp_path)))
    head: Any = model.get_submodule("lm_head")
    assert next(head.parameters()).shape[0] == 18 + 5
    completed = check_recipe(load_recipe(tmp_path / "recipe.yaml"))
    assert completed.task.letters == "'adefghilmoprstuwy"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"letters": "ab c"}, "' ' is not a letter"),
        ({"letters": "a|"}, "'|' is not a letter"),
        ({"letters": ""}, "letters"),
    ],
)
def test_invalid_letters_are_rejected(task: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(LoraError) as error:
        load_recipe(write(tmp_path, task=task))
    assert message in str(error.value)


def test_a_transcript_without_letters_is_a_row_error(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "speech/train/1.txt").write_text("?!\n")
    task = build_task(load_recipe(path))
    task.load_processor()
    with pytest.raises(LoraError, match="`text` has no letter"):
        load_data(task)


def test_a_fine_tuned_base_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    tiny_ctc.save(tmp_path / "base")
    for name in ("vocab.json", "tokenizer_config.json", "added_tokens.json"):
        (tmp_path / "base" / name).unlink(missing_ok=True)
    with pytest.raises(LoraError, match="tokenizer"):
        build_task(load_recipe(write_recipe_file(tmp_path))).load_processor()


def test_whisper_rejects_letters(tmp_path: Path) -> None:
    base = tiny_speech.save(tmp_path / "base")
    path = write_recipe_file(tmp_path, model={"name": str(base)}, task={"letters": "abc"})
    with pytest.raises(LoraError, match="writes tokens of its own, and takes no `letters`"):
        build_task(load_recipe(path)).load_processor()


@pytest.mark.slow
def test_continued_adapters_keep_their_letters(tmp_path: Path) -> None:
    path = write(tmp_path)
    run(path)
    for i in range(len(TEXTS)):  # as many letters, but not the same
        file = tmp_path / f"speech/train/{i}.txt"
        file.write_text(file.read_text().replace("w", "k"))
    continued = tmp_path / "more"
    overrides = [f"adapter.from={tmp_path / 'out'}", f"output_dir={continued}"]
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        train(load_recipe(path, overrides))
    assert load_adapter_recipe(continued).task.letters == "'adefghilmoprstuwy"  # type: ignore[union-attr]
    message = "letters of 3 train transcripts that the vocabulary lacks are [UNK]: k"
    assert message in printed.getvalue()
    with pytest.raises(LoraError, match=r"tokenizer|letters"):
        train(
            load_recipe(path, [*overrides, "task.letters='adefghilmoprstuky", "output_dir=third"])
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "none", "bitfit"])
def test_other_adapter_types_keep_the_letters(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, train={"max_steps": 2})
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "adapter": {"type": kind}}))
    (tmp_path / "speech/validation/0.txt").write_text("a żart\n")
    report, out = run(path), tmp_path / "out"
    metrics = evaluate_adapter(out, load_adapter_recipe(out), "validation")["validation"]
    assert metrics["loss"] == pytest.approx(report["metrics"]["after"]["validation"]["loss"])
    with contextlib.redirect_stderr(io.StringIO()):  # continues a finished run
        overrides = ["train.max_steps=3", "checkpoint.allow_changes=true"]
        assert train(load_recipe(path, overrides), resume=True)["training"]["steps"] == 3


def test_streamed_data_need_letters_in_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, data={"streaming": True})
    with pytest.raises(LoraError, match="the letters of a new vocabulary are those of all"):
        build_task(load_recipe(path)).load_processor()
    task = build_task(load_recipe(path, ["task.letters=adefghilmoprstuwy"]))
    task.load_processor()
    assert task.knows_labels


def test_repeated_letters_are_shown(tmp_path: Path) -> None:
    task, _, data = load_task_and_data(write(tmp_path))
    shown = [task.shown(example, False)[1] for example in data["validation"].examples]
    assert all(text.endswith("⟦a dull story⟧") for text in shown)
    assert "\x1b[32ma dull story\x1b[0m" in task.shown(data["validation"].examples[0], True)[1]


def test_very_short_recordings_have_empty_transcripts(tmp_path: Path) -> None:
    task, model, _ = load_task_and_data(write(tmp_path))
    parts = [tiny_speech.sound(1, 0.6), np.zeros(20, np.float32), tiny_speech.sound(2, 0.6)]
    transcripts = task.transcripts(model, parts, None)
    separately = [task.transcripts(model, [parts[i]], None)[0] for i in (0, 2)]
    assert transcripts == [separately[0], "", separately[1]]
    assert task.transcripts(model, parts[1:2], None) == [""]


def test_init_notes_a_new_vocabulary(tmp_path: Path) -> None:
    write(tmp_path)
    draft = draft_recipe(tmp_path / "speech", str(tmp_path / "base"), tmp_path / "new.yaml")
    finding = dict(draft.findings)["task"]
    assert "only pretrained: its letters will be those of the transcripts" in finding
    tiny_ctc.save(tmp_path / "known")
    draft = draft_recipe(tmp_path / "speech", str(tmp_path / "known"), tmp_path / "new.yaml")
    assert dict(draft.findings)["task"] == "speech_recognition"


def test_errors_of_looking_for_a_tokenizer_name_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("an odd answer")

    monkeypatch.setattr("lora_cli.tasks.speech.new_vocabulary.cached_file", fail)
    recipe = load_recipe(write_recipe_file(tmp_path))
    with pytest.raises(LoraError, match=r"tokenizer(.|\n)*an odd answer") as caught:
        has_tokenizer(recipe)
    assert recipe.model.name in str(caught.value)
