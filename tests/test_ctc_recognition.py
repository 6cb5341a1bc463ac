"""Tests of speech recognition with CTC models, against transformers and PEFT."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import tiny
import tiny_ctc
import tiny_speech
import torch
import torch.nn.functional as F
from closeness import assert_close, assert_different
from peft import PeftModel
from transformers import AutoModelForCTC, AutoTokenizer, Wav2Vec2Processor
from typer.testing import CliRunner

from lora_cli.cli.app import app
from lora_cli.errors import LoraError
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.evaluation.predict import answer
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_adapter_recipe, load_recipe
from lora_cli.recipe_draft import draft_recipe, write_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.speech.ctc_output_length import ctc_output_length
from lora_cli.tasks.speech.ctc_recognition import CTCRecognition
from lora_cli.tasks.speech.letters import Letters
from lora_cli.training import train

Json = dict[str, Any]
CPU = torch.device("cpu")
RATE = tiny_speech.RATE


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_recipe_file(folder: Path, **sections: Any) -> Path:
    """Write a recipe, and a base and recordings with texts unless they exist."""
    if not (folder / "base").exists():
        tiny_ctc.save(folder / "base")
    if not (folder / "speech").exists():
        splits = {"train": 5, "validation": 2, "test": 2}
        tiny_speech.write_folder(folder / "speech", splits, seconds=0.6)
    values: Json = {
        "model": {"name": str(folder / "base")},
        "task": {"type": "speech_recognition"},
        "data": {"path": "speech", "validation": "validation", "test": "test"},
        "adapter": {"rank": 2, "alpha": 4},
        "train": {"max_steps": 2, "micro_batch_size": 4, "optimizer": {"learning_rate": 0.01}},
        "output_dir": str(folder / "out"),
    }
    return tiny.write_recipe(folder, values, sections)


def load_task_and_data(path: Path) -> tuple[Any, Any, Any]:
    """Return a task, its base in float64, and its encoded splits."""
    task = build_task(load_recipe(path))
    task.load_processor()
    data = load_data(task)
    model, _ = task.load_model(CPU)
    model = model.double().eval()
    task.fit_to_model(model)
    return task, model, data


def make_batch(task: Any, split: Any, rows: range) -> Any:
    rng = np.random.default_rng(0)
    return task.collate([task.prepare(split.examples[i], rng, training=False) for i in rows])


def decode(processor: Any, letters: torch.Tensor) -> str:
    """Decode the predicted ids of all output steps by transformers, without special tokens."""
    tokenizer = processor.tokenizer
    decoded_ids = {tokenizer.pad_token_id, tokenizer.word_delimiter_token_id}
    other_special_ids = torch.tensor([i for i in tokenizer.all_special_ids if i not in decoded_ids])
    # not by `skip_special_tokens`, which removes blanks before repeated letters are collapsed
    return str(
        processor.decode(
            letters.masked_fill(torch.isin(letters, other_special_ids), tokenizer.pad_token_id)
        )
    ).strip()


def run(recipe: Path) -> Json:
    with contextlib.redirect_stderr(io.StringIO()):
        return train(load_recipe(recipe))


# ------------------------------------------------------------------------ losses and decoding

KINDS = [("wav2vec2", "layer"), ("wav2vec2", "group"), ("hubert", "layer"), ("wavlm", "layer")]


@pytest.mark.slow_after(2)
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # WavLM's
@pytest.mark.parametrize(("kind", "norm"), KINDS)
def test_losses_and_transcripts_equal_those_of_transformers(
    kind: str, norm: str, tmp_path: Path
) -> None:
    base = tiny_ctc.save(tmp_path / "base", kind, norm)
    task, model, data = load_task_and_data(write_recipe_file(tmp_path))
    reference = AutoModelForCTC.from_pretrained(base, dtype=torch.float64).eval()
    reference.config.ctc_loss_reduction = "sum"  # some default to the mean
    processor = Wav2Vec2Processor.from_pretrained(base)
    assert type(task) is CTCRecognition
    # if padding changes the output, only recordings of equal length share a forward pass
    assert task.padding.side == ("none" if norm == "group" else "right")
    split = data["train"]
    batch = make_batch(task, split, range(5))
    assert len(set(batch.inputs["lengths"].tolist())) > 1
    output = task.forward(model, batch)
    losses = task.losses(model, output, batch)["loss"]
    predictions = task.predictions(model, output, batch)
    for i in range(5):
        samples, rate = soundfile.read(split.rows[i]["audio"]["path"])
        inputs = processor(samples, sampling_rate=rate, return_tensors="pt")
        labels = processor(text=split.rows[i]["text"].upper(), return_tensors="pt")["input_ids"]
        assert list(split.examples[i]["labels"]) == labels[0].tolist()
        expected = reference(inputs["input_values"].double(), labels=labels)
        assert_close(losses[i], expected.loss.detach(), 1e-5)
        assert batch.items["loss"][i] == labels.shape[1]
        assert_close(output[i, : expected.logits.shape[1]], expected.logits[0].detach(), 1e-5)
        text = decode(processor, expected.logits[0].argmax(-1))
        assert predictions[i].prediction == text
        assert text


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("H H E L <pad> L L O O", "HELLO"),
        ("H E L L L O", "HELO"),
        ("<pad> A A <pad> <pad> A | | B <pad>", "AA B"),
        ("A | <pad> | A", "A  A"),
        ("| A <pad>", "A"),
        ("A <s> A </s> B <unk> B", "AABB"),
        ("<pad> <pad>", ""),
    ],
)
def test_greedy_decoding(letters: str, expected: str, tmp_path: Path) -> None:
    tiny_ctc.save(tmp_path / "base")
    task, _, _ = load_task_and_data(write_recipe_file(tmp_path))
    ids = torch.tensor(task.tokenizer.convert_tokens_to_ids(letters.split()))
    assert letters.split() == task.tokenizer.convert_ids_to_tokens(ids)
    scores = F.one_hot(ids, len(task.tokenizer)).float()
    assert task._decode(scores[None], [len(ids)]) == [expected]
    processor = Wav2Vec2Processor.from_pretrained(tmp_path / "base")
    assert decode(processor, ids) == expected


@pytest.mark.parametrize(
    "changes",
    [{}, {"add_adapter": True, "num_adapter_layers": 2, "adapter_stride": 2}],
)
def test_output_length_equals_that_of_transformers(changes: Json) -> None:
    config = tiny_ctc.config(**changes)
    with torch.device("meta"):
        model = AutoModelForCTC.from_config(config)
    for n_samples in (400, 719, 720, 5_000, 16_000, 16_001, 123_457):
        expected = int(model._get_feat_extract_output_lengths(torch.tensor(n_samples)))
        assert ctc_output_length(config, n_samples) == expected
    assert ctc_output_length(config, 20) == 0


# ------------------------------------------------------------------------------------- transcripts

VOCABULARY = {"<pad>": 0, "|": 1, "A": 2, "B": 3, "'": 4, "É": 5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b", "A B"),
        ("  a\t b\n", "A B"),
        ("A, b! - a.", "A B A"),
        ("b'a", "B'A"),
        ("e\u0301", "É"),  # a letter and a combining accent
        ("a|b", "AB"),  # the word delimiter is not a letter
        ("...", ""),
        ("b\u2019a", "B'A"),  # as word processors type it
        ("b\u02bca", "B'A"),
        ("\u2018a b\u2019 a", "A B A"),  # quotation marks
        ("a-b", "AB"),  # as in transformers' examples
        ("a\u2014b a--b a/b a...b a\u2026b", "A B A B A B A B A B"),
        ("a.b.", "AB"),
    ],
)
def test_transcripts_are_normalised_to_the_vocabulary(text: str, expected: str) -> None:
    letters = Letters(VOCABULARY, "|", {"<pad>"})
    assert letters.normalise(text) == expected
    assert letters.first_unknown(text) is None
    assert letters.tokens_of(text) == [
        VOCABULARY["|" if letter == " " else letter] for letter in expected
    ]


def test_typographic_apostrophes_in_the_vocabulary_are_kept() -> None:
    letters = Letters({**VOCABULARY, "\u2019": 99}, "|", {"<pad>"})
    assert letters.normalise("a\u2019a a\u02bca") == "A\u2019A A'A"


TURKISH = "abcçdefgğhıijklmnoöprsştuüvyz"


@pytest.mark.parametrize(
    ("letters", "text", "expected"),
    [
        (TURKISH, "Iğdır İzmir ISPARTA", "ığdır izmir ısparta"),
        (TURKISH, "I\u0307zmir", "izmir"),  # with a combining dot
        ("ABCÇDEFGĞHIİJKLMNOÖPRSŞTUÜVYZ", "ığdır izmir", "IĞDIR İZMİR"),
        (tiny_ctc.LETTERS.lower(), "I AM İN", "i am in"),
        (tiny_ctc.LETTERS, "i am", "I AM"),
        (f"{tiny_ctc.LETTERS}İ", "i am", "I AM"),  # one letter does not make it Turkish
        (f"{tiny_ctc.LETTERS.lower()}\u0131", "I AM", "i am"),
    ],
)
def test_dotted_and_dotless_i(letters: str, text: str, expected: str) -> None:
    ids = {name: i for i, name in enumerate(["|", *letters])}
    vocabulary = Letters(ids, "|", set())
    assert vocabulary.normalise(text) == expected
    assert vocabulary.first_unknown(text) is None


@pytest.mark.parametrize("delimiter", ["|", " "])
def test_the_word_delimiter_may_be_a_space(delimiter: str, tmp_path: Path) -> None:
    base, file = tmp_path / "base", tmp_path / "base" / "vocab.json"
    shutil.copytree(tiny_ctc.save(tmp_path / "of all"), base)
    names = json.loads(file.read_text())
    file.write_text(json.dumps({delimiter if t == "|" else t: i for t, i in names.items()}))
    config = json.loads((base / "tokenizer_config.json").read_text())
    config |= {"word_delimiter_token": delimiter}
    config["added_tokens_decoder"]["4"]["content"] = delimiter
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    task = build_task(load_recipe(write_recipe_file(tmp_path)))
    task.load_processor()
    reference, model = AutoTokenizer.from_pretrained(base), AutoModelForCTC.from_pretrained(base)
    for text in ("A WARM FILM", "AN OLD ONE"):
        letters = task.tokens_of(text)
        assert letters == reference(text).input_ids
        scores = F.one_hot(torch.tensor([letters]), model.config.vocab_size)
        (decoded,) = task._decode(scores, [len(letters)])
        assert decoded == text


def test_multi_letter_tokens() -> None:
    names = {name: i for i, name in enumerate(["|", "[UNK]", "<pad>", "C", "H", "CH", "SCH"])}
    assert Letters(names, "|", {"<pad>"}).multi_letter_tokens == ["CH", "SCH"]


def test_case_follows_the_vocabulary() -> None:
    letters = Letters({"<pad>": 0, "|": 1, "a": 2, "A": 3}, "|", {"<pad>"})
    assert letters.tokens_of("aA") == [2, 3]
    lower_case = Letters({"<pad>": 0, "|": 1, "a": 2}, "|", {"<pad>"})
    assert lower_case.tokens_of("Aa") == [2, 2]
    unicase = Letters({"<pad>": 0, "|": 1, "あ": 2}, "|", {"<pad>"})
    assert unicase.first_unknown("あA") == "A"


def test_a_transcript_needs_an_output_step_per_letter(tmp_path: Path) -> None:
    tiny_ctc.save(tmp_path / "base", letters="ABCDEFGHIJKLMNOPQRSTUVWXYZ'")
    tiny_speech.write_folder(tmp_path / "speech", {"train": 1, "validation": 1, "test": 1})
    task: Any = build_task(load_recipe(write_recipe_file(tmp_path)))
    task.load_processor()
    length = next(n for n in range(10, 100_000) if task._output_length_of(n) == 1)
    assert task.waits_for_device, "CTC's gradients are not deterministic on a GPU"
    assert task.length_error(length, [5]) is None
    assert task.length_error(length, [5, 6]) is not None
    assert task.length_error(length, []) is None
    assert task.length_error(length - 1, []) is not None
    lengths: list[int] = []
    task._extract_features = lambda part: lengths.append(len(part))

    def stop(examples: Any) -> None:
        raise InterruptedError

    task._pad = stop
    model = torch.nn.Linear(1, 1)
    with pytest.raises(InterruptedError):  # reaches the model
        task.transcripts(model, [np.zeros(length, np.float32)], None)
    assert lengths == [length]
    assert task.transcripts(model, [np.zeros(length - 1, np.float32)], None) == [""]


@pytest.mark.slow_after(3)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 7", "`7` in `text` is not in the model's vocabulary"),
        ("größe", "`Ö` in `text` is not in the model's vocabulary"),
        ("?!", "`text` has no letter that the model can write"),
        ("a film " * 20, "its text of 139 letters needs 139 moments, and the model hears 29"),
        ("aabb" * 4, ""),
        # a blank is needed between two equal letters
        ("aa" * 15, "its text of 30 letters needs 59 moments"),
    ],
)
def test_invalid_transcripts_are_row_errors(text: str, message: str, tmp_path: Path) -> None:
    tiny_ctc.save(tmp_path / "base", letters="ABCDEFGHIJKLMNOPQRSTUVWXYZ'")
    tiny_speech.write_folder(tmp_path / "speech", {"train": 1, "validation": 1, "test": 1})
    for file in (tmp_path / "speech").rglob("*.txt"):
        file.write_text("a film\n")
    tiny_speech.write(tmp_path / "speech/train/9.wav", tiny_speech.sound(3, 0.6))
    (tmp_path / "speech/train/9.txt").write_text(f"{text}\n")
    task = build_task(load_recipe(write_recipe_file(tmp_path)))
    task.load_processor()
    if not message:
        assert len(load_data(task)["train"]) == 2
        return
    with pytest.raises(LoraError) as error:
        load_data(task)
    assert message in str(error.value)
    assert "9.wav" in str(error.value)


def test_removed_symbols_are_noted(tmp_path: Path) -> None:
    path = write_recipe_file(tmp_path)
    for i, text in enumerate(("Well, great!", "a film", "why?")):
        (tmp_path / f"speech/train/{i}.txt").write_text(f"{text}\n")
    task, _, data = load_task_and_data(path)
    notes = " ".join(task.notes)
    assert "the model's vocabulary has no ! , ?: left out of 2 transcripts" in notes
    assert "transcripts are read in capital letters" in notes
    letters = task.tokenizer.convert_ids_to_tokens(data["train"].examples[0]["labels"])
    assert "".join(letters) == "WELL|GREAT"


# --------------------------------------------------------------------------------- long recordings


def test_long_recordings_are_transcribed_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_cli.tasks.speech.ctc_recognition.MAX_SECONDS", 1.0)
    path = write_recipe_file(tmp_path, task={"long_audio": "windows"})
    samples = tiny_speech.sound(40, 1.8)
    file = tiny_speech.write(tmp_path / "speech/test/9.wav", samples)
    file.with_suffix(".txt").write_text("a long one\n")
    task, model, data = load_task_and_data(path)
    split = data["test"]
    parts = [i for i, example in enumerate(split.examples) if example["row"] == len(split.rows) - 1]
    assert [len(split.examples[i]["labels"]) for i in parts] == [0, 0]
    batch = make_batch(task, split, range(parts[0] - 1, parts[1] + 1))
    losses = task.losses(model, task.forward(model, batch), batch)["loss"]
    assert losses[0] > 0
    assert losses[1:].tolist() == batch.items["loss"][1:].tolist() == [0, 0]
    row = split.rows[len(split.rows) - 1]
    ((transcript,),) = task.answer(model, [row])
    transcripts = [
        task.transcripts(model, [part], None)[0] for part in task.audio_parts(row["audio"])
    ]
    assert transcript == " ".join(" ".join(transcripts).split())


# ------------------------------------------------------------------------------------ runs


def test_peft_reads_the_adapter_of_a_run(tmp_path: Path) -> None:
    report = run(write_recipe_file(tmp_path, data={"split_seed": 1}))
    assert set(report["metrics"]["after"]["test"]) == {"loss", "wer", "cer"}
    recipe = load_adapter_recipe(tmp_path / "out")
    assert recipe.task.decoder == "ctc"  # type: ignore[union-attr]
    task, model, accelerator = open_adapter(tmp_path / "out", recipe)
    probe = task.probe()
    logits = task.probed(model, probe)
    base = AutoModelForCTC.from_pretrained(tmp_path / "base").eval()
    base_logits = base(**probe).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert_close(adapted(**probe).logits, logits, 1e-4)
    assert_different(base_logits, logits)
    # the code of the model card
    file = tmp_path / "speech/test/0.wav"
    processor = Wav2Vec2Processor.from_pretrained(tmp_path / "base")
    inputs = processor(soundfile.read(file)[0], sampling_rate=RATE, return_tensors="pt")
    inputs["input_values"] = inputs["input_values"].float()
    letters = adapted(**inputs).logits.argmax(-1)[0]
    text = decode(processor, letters)
    ((answer_text,),) = answer(model, task, [task.parse_input(str(file))], accelerator)
    assert answer_text == text
    card = (tmp_path / "out/README.md").read_text()
    assert "AutoModelForCTC" in card
    assert "logits.argmax(-1)" in card
    result = CliRunner().invoke(
        app,
        [
            "export",
            "--adapter",
            str(tmp_path / "out"),
            "--for",
            "vllm",
            "--to",
            str(tmp_path / "v"),
        ],
    )
    assert "adapters of language models, and this one is for `wav2vec2`" in str(result.exception)


def test_layerdrop_and_spec_augment_are_off(tmp_path: Path) -> None:
    task, model, _ = load_task_and_data(write_recipe_file(tmp_path))
    assert model.config.layerdrop == 0
    assert not model.config.apply_spec_augment
    assert any("`layerdrop` of the model is set to 0" in note for note in task.notes)


@pytest.mark.parametrize("key", ["language", "task"])
def test_keys_of_autoregressive_models_are_rejected(key: str, tmp_path: Path) -> None:
    value = {"language": "de", "task": "translate"}[key]
    with pytest.raises(LoraError, match=f"writes by CTC .* and takes no `{key}`"):
        build_task(load_recipe(write_recipe_file(tmp_path, task={key: value}))).load_processor()


def test_unsupported_bases_are_rejected(tmp_path: Path) -> None:
    path = write_recipe_file(tmp_path)
    file = tmp_path / "base/config.json"
    values = json.loads(file.read_text())
    for changes, message in (
        ({"pad_token_id": 3}, r"names another blank \(`pad_token_id` 3\) than its tokenizer \(0\)"),
        ({"adapter_attn_dim": 4}, r"has weights of its own for each language \(MMS\)"),
    ):
        file.write_text(json.dumps({**values, **changes}))
        with pytest.raises(LoraError, match=message):
            build_task(load_recipe(path)).load_processor()


def test_init_drafts_a_recipe_that_validates(tmp_path: Path) -> None:
    write_recipe_file(tmp_path)
    target = tmp_path / "new.yaml"
    draft = draft_recipe(tmp_path / "speech", str(tmp_path / "base"), target)
    write_recipe(target, draft.text(), draft.extra_files)
    task = load_recipe(target).task
    assert (task.type, task.decoder) == ("speech_recognition", None)
    result = CliRunner().invoke(app, ["validate", str(target), "--data"])
    assert result.exit_code == 0, result.output
