"""Tests of speech recognition with Whisper, against transformers, PEFT and jiwer."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import jiwer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import tiny
import tiny_speech
import torch
from closeness import assert_close, assert_different
from peft import PeftModel
from safetensors.torch import load_file
from tiny_speech import END, RATE, encoded, sound
from transformers import (
    AutoConfig,
    AutoProcessor,
    GenerationConfig,
    GenerationMixin,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from lora_cli.accelerator import start_accelerator
from lora_cli.adapters.attach import attach
from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate_adapter import evaluate_adapter
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.evaluation.predict import answer, answer_file
from lora_cli.export.merge import merge_adapter
from lora_cli.preprocessing.data_gate import inspect_data, pass_gate
from lora_cli.preprocessing.encode import check_data, load_data
from lora_cli.recipe import load_adapter_recipe, load_recipe
from lora_cli.recipe_draft import draft_recipe, write_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.speech.transcripts import (
    align_words,
    join_transcripts,
    normalise_text,
    whisper_transcript,
)
from lora_cli.tasks.speech_recognition import SpeechRecognition
from lora_cli.training import train

Json = dict[str, Any]
CPU = torch.device("cpu")
GERMAN = {"language": "german", "task": "translate"}
DECODER = {"target_modules": r".*decoder\.layers\..*(q_proj|v_proj)"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_recipe_file(folder: Path, languages: bool = False, **sections: Any) -> Path:
    """Write a recipe, and a base and recordings with texts unless they exist."""
    if not (folder / "base").exists():
        tiny_speech.save(folder / "base", languages)
    if not (folder / "speech").exists():
        tiny_speech.write_folder(folder / "speech", {"train": 5, "validation": 2, "test": 2})
    values: Json = {
        "model": {"name": str(folder / "base")},
        "task": {"type": "speech_recognition"},
        "data": {"path": "speech", "validation": "validation", "test": "test"},
        "adapter": {"rank": 2, "alpha": 4, "target_modules": "all-linear"},
        "train": {"max_steps": 2, "micro_batch_size": 4, "optimizer": {"learning_rate": 0.01}},
        "evaluate": {"generation": {"max_new_tokens": 6}},
        "output_dir": str(folder / "out"),
    }
    return tiny.write_recipe(folder, values, sections)


def load_task_and_data(path: Path, *overrides: str) -> tuple[Any, Any, Any]:
    """Return a task, its base in float64, and its encoded splits."""
    task = build_task(load_recipe(path, list(overrides)))
    task.load_processor()
    data = load_data(task)
    model, _ = task.load_model(CPU)
    model = model.double().eval()
    task.fit_to_model(model)
    return task, model, data


def run(recipe: Path, *overrides: str) -> Json:
    with contextlib.redirect_stderr(io.StringIO()):
        return train(load_recipe(recipe, list(overrides)))


def make_batch(task: Any, split: Any, rows: range) -> Any:
    rng = np.random.default_rng(0)
    return task.collate([task.prepare(split.examples[i], rng, training=False) for i in rows])


# ------------------------------------------------------------------------ losses and answers


@pytest.fixture(scope="module", params=["English", "several languages"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base")
    multilingual = request.param != "English"
    path = write_recipe_file(folder, multilingual, task=GERMAN if multilingual else {})
    reference = WhisperForConditionalGeneration.from_pretrained(
        folder / "base", dtype=torch.float64
    ).eval()
    processor = WhisperProcessor(tiny_speech.extractor(), copy.deepcopy(tiny_speech.tokenizer()))
    if multilingual:
        processor.tokenizer.set_prefix_tokens(language="german", task="translate")
    return (*load_task_and_data(path), reference, processor)


def test_features_equal_those_of_transformers(base: Any) -> None:
    task, _, data, _, processor = base
    split = data["train"]
    features = make_batch(task, split, range(3)).inputs["features"]
    for i in range(3):
        samples, rate = soundfile.read(split.rows[i]["audio"]["path"])
        expected = processor(samples, sampling_rate=rate, return_tensors="pt")["input_features"]
        assert_close(features[i], expected[0].float(), 1e-5)


def test_losses_equal_those_of_transformers(base: Any) -> None:
    task, model, data, reference, processor = base
    split = data["train"]
    batch = make_batch(task, split, range(5))
    batch.inputs["features"] = batch.inputs["features"].double()
    losses = task.losses(model, task.forward(model, batch), batch)["loss"]
    for i in range(5):
        text = split.rows[i]["text"]
        labels = processor.tokenizer(f" {text}", return_tensors="pt")["input_ids"][:, 1:]
        features = batch.inputs["features"][i : i + 1]
        loss = reference(input_features=features, labels=labels).loss
        assert_close(losses[i].double(), loss.detach() * labels.shape[1], 1e-5)
        assert batch.items["loss"][i] == labels.shape[1]
        assert list(split.examples[i]["labels"]) == labels[0].tolist()


def test_start_and_end_tokens_of_labels(base: Any) -> None:
    task, _, data, reference, _ = base
    batch = make_batch(task, data["train"], range(5))
    labels, start = batch.targets["labels"], reference.config.decoder_start_token_id
    assert not (labels == start).any()
    # the padding token has the same id as the end
    assert (labels == task.tokenizer.eos_token_id).sum(-1).tolist() == [1] * 5
    assert (labels == -100).any()


@pytest.mark.parametrize("beams", [1, 3])
def test_transcripts_equal_those_of_transformers(base: Any, beams: int) -> None:
    task, model, data, reference, processor = base
    generation = task.recipe.evaluate.generation.model_copy(
        update={"num_beams": beams, "max_new_tokens": 12}
    )
    task.recipe = task.recipe.with_values({"evaluate.generation": generation})
    rows = [data["train"].rows[i] for i in range(4)]
    transcripts = [
        transcript for (transcript,) in answer(model, task, rows, start_accelerator(task.recipe))
    ]
    prefix = processor.tokenizer.prefix_tokens
    ids = tiny_speech.tokenizer().get_vocab()
    special = [ids[name] for name in tiny_speech.SPECIAL]
    end = ids[END]
    reference.generation_config = GenerationConfig()
    batch = make_batch(task, data["train"], range(4))
    for i in range(4):
        output = GenerationMixin.generate(
            reference,
            input_features=batch.inputs["features"][i : i + 1].double(),
            decoder_input_ids=torch.tensor([prefix]),
            generation_config=GenerationConfig(
                max_new_tokens=12 - len(prefix) + 1, num_beams=beams, do_sample=False,
                eos_token_id=end, pad_token_id=end,
                decoder_start_token_id=reference.config.decoder_start_token_id,
                suppress_tokens=sorted(set(special) - {end, *prefix[1:]}),
            ),
        )  # fmt: skip
        expected = processor.tokenizer.decode(output[0], skip_special_tokens=True)
        assert transcripts[i] == expected.strip().rstrip("\N{REPLACEMENT CHARACTER}")
    assert any(transcripts)


def test_error_rates_equal_those_of_jiwer(base: Any, tmp_path: Path) -> None:
    from lora_cli.evaluation.evaluate_split import best_by, evaluate

    task, model, data, *_ = base
    predictions: list[Any] = []
    split = data["train"]
    model = copy.deepcopy(model).float()
    metrics = evaluate(model, task, split, start_accelerator(task.recipe), keep=predictions)
    references = [normalise_text(split.rows[i]["text"], "basic") for i in range(len(split))]
    hypotheses = [normalise_text(prediction.prediction, "basic") for prediction in predictions]
    assert metrics["wer"] == pytest.approx(jiwer.wer(references, hypotheses))
    assert metrics["cer"] == pytest.approx(jiwer.cer(references, hypotheses))
    assert best_by(task.recipe, task) == ("wer", "min")
    for prediction, text, words in zip(predictions, references, hypotheses, strict=True):
        pairs = prediction.details["words"]
        assert [a for a, _ in pairs if a] == text.split()
        assert [b for _, b in pairs if b] == words.split()
    assert "Whisper's basic normaliser" in task.metric_definitions()["wer"]


# ---------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("text", "normalizer", "expected"),
    [
        ("Hello,  World!", "basic", "hello world"),
        ("It's [noise] 5 (um) o'clock.", "basic", "it s 5 o clock"),
        ("Café", "basic", "café"),
        ("Hello,  World!", "none", "Hello, World!"),
        ("...", "basic", ""),
    ],
)
def test_texts_are_normalised_for_scoring(text: str, normalizer: Any, expected: str) -> None:
    assert normalise_text(text, normalizer) == expected


def test_samples_join_all_parts_of_a_recording(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task: Any = object.__new__(SpeechRecognition)
    task.spec = SimpleNamespace(audio_column="audio", text_column="text")
    generation = SimpleNamespace(max_new_tokens=9)
    task.recipe = SimpleNamespace(evaluate=SimpleNamespace(generation=generation))
    calls: list[Any] = []

    def transcripts(model: Any, parts: list[str], options: Any) -> list[str]:
        calls.append((model, parts, options.max_new_tokens))
        return [part.upper() for part in parts]

    monkeypatch.setattr(task, "audio_parts", lambda value: value["path"].split("."), raising=False)
    monkeypatch.setattr(task, "transcripts", transcripts, raising=False)
    rows = [{"audio": {"path": "a.b.c"}, "text": "x"}, {"audio": {"path": "d.e"}, "text": None}]
    assert task.sample("m", rows) == [("a.b.c", "x", "A B C"), ("d.e", "", "D E")]
    # batches have as many parts as there are rows
    assert calls == [("m", ["a", "b"], 9), ("m", ["c", "d"], 9), ("m", ["e"], 9)]
    generation.max_new_tokens = 10_000
    task.sample("m", rows[:1])
    assert calls[-1][2] < 10_000


def test_parts_are_joined_and_words_aligned() -> None:
    assert join_transcripts(["", " a b ", "", "c"]) == "a b c"
    assert join_transcripts(["你好", "世界"]) == "你好世界"
    assert join_transcripts(["abc 中文", "中", "abc"]) == "abc 中文中 abc"
    assert join_transcripts(["中文 abc", "中"]) == "中文 abc 中"
    assert join_transcripts([]) == ""
    assert whisper_transcript(" a") == " a"
    assert whisper_transcript("two\n  lines\t") == " two lines"  # Whisper writes no line ends
    assert whisper_transcript("你好") == "你好"
    assert align_words("a b c", "a x c d") == [("a", "a"), ("b", "x"), ("c", "c"), (None, "d")]
    assert align_words("", "x") == [(None, "x")]
    assert align_words("a", "") == [("a", None)]


def test_combining_vowels_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe_file(tmp_path)
    (tmp_path / "speech/train/1.txt").write_text("नमस्ते", encoding="utf-8")
    task = build_task(load_recipe(path))
    check_data(task, ["train"])
    assert "train/1.wav has vowels or accents that are marks" in capsys.readouterr().err
    check_data(build_task(load_recipe(path, ["task.normalizer=none"])), ["train"])
    assert "marks" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------ languages


@pytest.mark.parametrize(
    ("languages", "task", "message"),
    [
        (False, {"language": "en"}, "knows English only, and takes no `language`"),
        (False, {"task": "transcribe"}, "knows English only, and takes no `task`"),
        (True, {}, "does not say which is spoken"),
        (True, {"language": "germn"}, "no language `germn`[\\s\\S]*did you mean `german`"),
        (True, {"language": "fr"}, "has no token `<|fr|>`".replace("|", r"\|")),
    ],
)
def test_invalid_languages_and_tasks(
    languages: bool, task: Json, message: str, tmp_path: Path
) -> None:
    path = write_recipe_file(tmp_path, languages, task=task)
    with pytest.raises(LoraError, match=message):
        build_task(load_recipe(path)).load_processor()


def test_multilingual_models_without_a_generation_config(tmp_path: Path) -> None:
    from lora_cli.tasks.speech.spoken_languages import is_multilingual

    recipe = load_recipe(write_recipe_file(tmp_path))
    (tmp_path / "base/generation_config.json").unlink()
    assert [is_multilingual(recipe, size) for size in (51_864, 51_865)] == [False, True]


@pytest.mark.parametrize(
    ("kind", "decoder", "message"),
    [
        ("wav2vec2-bert", None, r"\(WhisperTokenizer\) is not one of letters"),
        ("llama", None, r"is not a speech model that can be trained here \(llama\)"),
        (
            "wav2vec2",
            "attention",
            r"(?s)\(wav2vec2\) does not write by `attention`.*set it to `ctc`",
        ),
        ("whisper", "ctc", r"(?s)\(whisper\) does not write by `ctc`.*set it to `attention`"),
    ],
)
def test_models_with_another_decoder_are_rejected(
    kind: str, decoder: Any, message: str, tmp_path: Path
) -> None:
    path = write_recipe_file(tmp_path, task={"decoder": decoder})
    if kind != "whisper":
        AutoConfig.for_model(kind).save_pretrained(tmp_path / "base")
    with pytest.raises(LoraError, match=message):
        build_task(load_recipe(path)).load_processor()


def test_a_feature_extractor_that_does_not_fit(tmp_path: Path) -> None:
    path = write_recipe_file(tmp_path)
    file = tmp_path / "base/preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "feature_size": 80}))
    with pytest.raises(LoraError, match=r"makes 80 bands by 100 frames .* reads 16 by 100"):
        build_task(load_recipe(path)).load_processor()


def test_layerdrop_and_spec_augment_are_off(tmp_path: Path) -> None:
    config = {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5, "apply_spec_augment": True}
    tiny_speech.save(tmp_path / "base", **config)
    task, model, _ = load_task_and_data(write_recipe_file(tmp_path))
    notes = " ".join(task.notes)
    assert "`encoder_layerdrop` and `decoder_layerdrop` of the model are set to 0" in notes
    assert "`apply_spec_augment` of the model is set to false" in notes
    assert (model.config.encoder_layerdrop, model.config.decoder_layerdrop) == (0, 0)
    assert model.model.encoder.layerdrop == model.model.decoder.layerdrop == 0
    assert model.config.apply_spec_augment is False


# --------------------------------------------------------------------------------- rows and files


def test_errors_of_rows_name_the_file(tmp_path: Path) -> None:
    path = write_recipe_file(tmp_path)
    folder = tmp_path / "speech/train"
    (folder / "0.wav").write_bytes(encoded(sound(1))[:3_000])
    (folder / "1.wav").write_bytes(encoded(np.zeros(4_000)))
    (folder / "2.txt").write_text(" \n")
    (folder / "3.txt").unlink()
    (folder / "4.txt").write_bytes(b"caf\xe9")
    with pytest.raises(LoraError) as raised:
        check_data(build_task(load_recipe(path)), ["train"])
    messages = {problem.at: problem.what for problem in raised.value.problems}
    assert messages == {"train/4.wav": "`4.txt` is not in the encoding `utf-8`"}
    (folder / "4.txt").write_text("a warm film")
    with pytest.raises(LoraError) as raised:
        check_data(build_task(load_recipe(path)), ["train"])
    messages = {problem.at: problem.what for problem in raised.value.problems}
    assert messages == {
        "train/0.wav": "`0.wav` is cut off: it ends before its header says",
        "train/1.wav": "`1.wav` is silent from beginning to end",
        "train/2.wav": "column `text` is blank",
        "train/3.wav": "column `text` is blank",
    }
    skipping = load_recipe(path, ["data.on_bad_row=skip"])
    rows = check_data(build_task(skipping), ["train"])["train"]
    assert (len(rows), len(rows.skipped)) == (1, 4)


def test_the_cost_of_a_part_is_its_duration(base: Any) -> None:
    task = base[0]
    for start, stop, seconds in ((0, 1, 1), (0, RATE, 1), (3 * RATE, 5 * RATE + 1, 3)):
        assert task.cost({"start": start, "stop": stop}) == seconds


def test_changed_texts_are_read_again(tmp_path: Path) -> None:
    path = write_recipe_file(tmp_path)

    def texts() -> tuple[str, str]:
        rows = check_data(build_task(load_recipe(path)), ["train"])["train"]
        return rows[0]["text"], rows.sha256

    before = texts()
    assert before == texts()
    (tmp_path / "speech/train/0.txt").write_text("another text", encoding="utf-8-sig")
    after = texts()
    assert after[0] == "another text"
    assert after[1] != before[1]


SOURCES = ("csv", "jsonl", "parquet of bytes", "parquet of pairs", "metadata.csv", "Hub")


@pytest.mark.slow_after(3)
@pytest.mark.parametrize("source", SOURCES)
def test_sources_of_rows(source: str, tmp_path: Path) -> None:
    folder = tmp_path / "speech"
    names = [f"{i}.{ending}" for i, ending in enumerate(["wav", "flac", "mp3", "ogg"])]
    for i, name in enumerate(names):
        tiny_speech.write(folder / name, sound(i, 0.3 + i / 10, channels=1 + i % 2))
    data = [(folder / name).read_bytes() for name in names]
    texts = [f"text number {i}" for i in range(4)]
    location: Json = {"path": "speech/rows.csv"}
    if source == "csv":
        lines = [f"{name},{text}\n" for name, text in zip(names, texts, strict=True)]
        (folder / "rows.csv").write_text("".join(["audio,text\n", *lines]))
    elif source == "jsonl":
        rows = [{"audio": n, "text": t} for n, t in zip(names, texts, strict=True)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        location = {"path": "speech/rows.jsonl"}
    elif source == "metadata.csv":
        lines = [f"{name},{text}\n" for name, text in zip(names, texts, strict=True)]
        (folder / "metadata.csv").write_text("".join(["file_name,text\n", *lines]))
        location = {"path": "speech"}
    elif source == "Hub":
        features = datasets.Features({"audio": datasets.Audio(), "text": datasets.Value("string")})
        audio = [
            {"bytes": audio_bytes, "path": name}
            for audio_bytes, name in zip(data, names, strict=True)
        ]
        table = pa.table({"audio": audio, "text": texts}, schema=features.arrow_schema)
        (tmp_path / "hub/data").mkdir(parents=True)
        pq.write_table(table, tmp_path / "hub/data/train-00000-of-00001.parquet")
        location = {"name": str(tmp_path / "hub")}
    else:
        pairs = [{"bytes": audio_bytes, "path": None} for audio_bytes in data]
        column = data if source == "parquet of bytes" else pairs
        pq.write_table(pa.table({"audio": column, "text": texts}), tmp_path / "rows.parquet")
        location = {"path": "rows.parquet"}
    values = {"path": None, "train": "train", "validation": None, "test": None, **location}
    task, _, loaded = load_task_and_data(write_recipe_file(tmp_path, data=values))
    split = loaded["train"]
    assert [split.rows[i]["text"] for i in range(4)] == texts
    batch = make_batch(task, split, range(4))
    for i, audio_bytes in enumerate(data):
        samples = task.samples({"bytes": audio_bytes, "path": None})
        assert torch.equal(batch.inputs["features"][i], task._features(samples))


def test_clipped_and_loud_recordings_are_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe_file(tmp_path)
    for i in (0, 1):
        clipped = np.clip(30 * sound(40 + i), -1, 1)
        tiny_speech.write(tmp_path / f"speech/train/{i}.wav", clipped)
    loud = encoded(9_000 * sound(42), RATE, "WAV", "FLOAT")
    (tmp_path / "speech/train/2.wav").write_bytes(loud)
    task = build_task(load_recipe(path))
    task.load_processor()
    pass_gate(task, load_data(task))
    stderr = capsys.readouterr().err
    assert re.search(
        r"2 train recordings are clipped: their loudest samples .* train/0\.wav", stderr
    )
    assert re.search(r"1 train recording is far beyond full scale.* train/2\.wav", stderr)


def test_texts_that_are_too_long_are_errors(tmp_path: Path) -> None:
    path = write_recipe_file(tmp_path)
    (tmp_path / "speech/train/1.txt").write_text("zq " * 40)
    task = build_task(load_recipe(path))
    task.load_processor()
    with pytest.raises(LoraError, match=r"its text has \d+ tokens, .* 40 at most") as raised:
        load_data(task)
    assert raised.value.problems[0].at == "train/1.wav"


def test_a_recording_that_becomes_unreadable_is_an_error(tmp_path: Path) -> None:
    task, _, data = load_task_and_data(write_recipe_file(tmp_path))
    example = data["train"].examples[0]
    Path(example["audio"]["path"]).write_bytes(b"no sound any more")
    with pytest.raises(LoraError, match=r"is not a recording[\s\S]*was whole when the run began"):
        make_batch(task, data["train"], range(1))


def test_control_tokens_in_transcripts_are_plain_text(tmp_path: Path) -> None:
    path = write_recipe_file(tmp_path)
    (tmp_path / "speech/train/0.txt").write_text("a<|endoftext|>b")
    task, _, data = load_task_and_data(path)
    labels = list(data["train"].examples[0]["labels"])
    assert labels.count(task.tokenizer.eos_token_id) == 1
    decoded = task.tokenizer.decode(labels[1:-1])
    assert decoded.strip() == "a<|endoftext|>b"


# ------------------------------------------------------------------------------ long recordings


def add_long(folder: Path) -> None:
    for split, seed in (("train", 61), ("test", 62)):
        tiny_speech.write(folder / f"speech/{split}/long.wav", sound(seed, 2.6))
        (folder / f"speech/{split}/long.txt").write_text("a long story")


@pytest.mark.parametrize("method", ["silence", "windows"])
def test_long_recordings_are_transcribed_in_parts(method: str, tmp_path: Path) -> None:
    from lora_cli.evaluation.evaluate_split import evaluate

    path = write_recipe_file(tmp_path)
    add_long(tmp_path)
    task, model, data = load_task_and_data(path, f"task.long_audio={method}")
    assert len(data["train"]) == 5  # which part the words are in is not known
    assert task.cut_note(data["train"]) == "1 recording of more than 1 s is left out"
    test = data["test"]
    method_text = "into equal parts" if method == "windows" else "where it is quietest"
    assert f"1 recording of more than 1 s is divided {method_text}: " in str(task.cut_note(test))
    predictions: list[Any] = []
    evaluate(model.float(), task, test, start_accelerator(task.recipe), keep=predictions)
    accelerator = start_accelerator(task.recipe)
    parts = task.audio_parts(test.rows[2]["audio"])
    assert len(parts) >= 3
    assert_close(torch.from_numpy(np.concatenate(parts)),
                 torch.from_numpy(task.samples(test.rows[2]["audio"])), 0)  # fmt: skip
    transcripts = [
        answer(model, task, [{"audio": {"bytes": encoded(p, RATE, "WAV", "FLOAT"), "path": None}}],
               accelerator)[0][0]
        for p in parts
    ]  # fmt: skip
    assert predictions[2].prediction == join_transcripts(transcripts)
    assert predictions[2].losses["loss"] == (0.0, 0.0)
    assert answer(model, task, [test.rows[2]], accelerator) == [[join_transcripts(transcripts)]]


def test_long_recordings_can_be_dropped(tmp_path: Path) -> None:
    path = write_recipe_file(tmp_path)
    add_long(tmp_path)
    _, _, data = load_task_and_data(path, "task.long_audio=drop")
    assert {name: len(split.rows) for name, split in data.items()} == {
        "train": 5, "validation": 2, "test": 2,
    }  # fmt: skip
    assert ["at once" in reason for reason in data["test"].rows.skipped] == [True]


def test_a_split_of_long_recordings_alone(tmp_path: Path) -> None:
    path = write_recipe_file(tmp_path)
    add_long(tmp_path)
    for file in (tmp_path / "speech/train").glob("[0-9].*"):
        file.unlink()
    with pytest.raises(LoraError, match=r"no row of the train split is left[\s\S]*lasts 2\.6 s"):
        load_task_and_data(path)


def test_silent_parts_are_skipped(tmp_path: Path) -> None:
    task, *_ = load_task_and_data(write_recipe_file(tmp_path), "task.long_audio=windows")
    samples = np.concatenate([sound(1, 0.9), np.zeros(int(0.9 * RATE)), sound(2, 0.9)])
    value = {"bytes": encoded(samples, RATE, "WAV", "FLOAT"), "path": None}
    assert len(task.audio_parts(value)) == 2
    examples = task.encode([{"audio": value, "text": "x"}])[0]
    assert [(example["start"], example["stop"]) for example in examples] == [
        (0, 14_400),
        (28_800, 43_200),
    ]


# ----------------------------------------------------------------------------- a frozen encoder


@pytest.mark.slow
def test_outputs_of_a_frozen_encoder_are_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cached equals uncached, even with dropout, which a frozen encoder does not apply."""
    tiny_speech.save(tmp_path / "base", dropout=0.2)
    path = write_recipe_file(tmp_path, adapter={**DECODER, "dropout": 0.1}, train={"max_steps": 8})
    calls: list[int] = []
    original = WhisperForConditionalGeneration.get_encoder

    def counting(self: Any, *args: Any) -> Any:
        encoder = original(self, *args)
        if not hasattr(encoder, "is_counted"):
            encoder.is_counted = True
            encoder.register_forward_hook(lambda *_: calls.append(1))
        return encoder

    monkeypatch.setattr(WhisperForConditionalGeneration, "get_encoder", counting)
    cached = run(path, f"output_dir={tmp_path / 'cached'}")
    n_cached_calls = len(calls)
    calls.clear()
    uncached = run(path, f"output_dir={tmp_path / 'uncached'}", "data.cache_limit=0B")
    for when, splits in uncached["metrics"].items():
        for split, metrics in splits.items():
            assert cached["metrics"][when][split] == pytest.approx(metrics, rel=1e-3)
    tensors, expected = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cached", "uncached")
    )
    assert tensors.keys() == expected.keys()
    assert all("decoder" in name for name in tensors)
    for name, tensor in tensors.items():  # rounding depends on the batch
        assert_close(tensor, expected[name], 1e-2)
    assert n_cached_calls <= len(calls) - 8  # training steps do not compute it
    capsys.readouterr()
    train(
        load_recipe(
            path, [f"output_dir={tmp_path / 'small'}", "data.cache_limit=1kB", "train.max_steps=1"]
        )
    )
    stderr = capsys.readouterr().err
    assert "what the frozen `encoder` computes is not kept, but computed in every step" in stderr


def test_an_adapted_encoder_is_not_cached(tmp_path: Path) -> None:
    task, model, data = load_task_and_data(write_recipe_file(tmp_path))
    assert task.frozen_parts(model.requires_grad_(False)).keys() == {"encoder"}
    batch = make_batch(task, data["train"], range(3))
    frozen = task.forward(model, batch).logits
    attach(model, task.recipe)
    assert task.frozen_parts(model) == {}
    assert_close(task.forward(model.double().eval(), batch).logits, frozen, 1e-6)


# ------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    path = write_recipe_file(folder, True, task={"language": "de"}, train={"max_steps": 4})
    add_long(folder)
    run(path)
    return folder


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["conv1", "conv2", "v_proj"], "rank": 4},
        {"target_modules": ["embed_positions", "q_proj"], "rank": 4},
        {"target_modules": ["conv2", "fc1"], "rank": 4, "type": "lokr"},
    ],
    ids=["convolutions", "positions", "lokr"],
)
def test_layers_whose_other_attributes_whisper_reads(
    adapter: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe_file(
        tmp_path, adapter=adapter, train={"optimizer": {"learning_rate": 0.05}}
    )
    train(load_recipe(path))
    assert "PEFT would reject this adapter: the model reads more of" in capsys.readouterr().err
    task, model, _ = open_adapter(tmp_path / "out", load_adapter_recipe(tmp_path / "out"))
    probe = task.probe()
    logits = task.probed(model, probe)
    merge_adapter(None, tmp_path / "out", tmp_path / "merged")
    merged, base = (
        WhisperForConditionalGeneration.from_pretrained(tmp_path / name).eval()
        for name in ("merged", "base")
    )
    assert_close(merged(**probe).logits, logits, 1e-5)
    assert_different(base(**probe).logits, logits)
    peft_model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with pytest.raises(AttributeError):  # otherwise it need not be rejected
        peft_model(**probe)


def test_peft_loads_the_adapter(trained: Path) -> None:
    task, model, _ = open_adapter(trained / "out", load_adapter_recipe(trained / "out"))
    probe = task.probe()
    logits = task.probed(model, probe)
    base = WhisperForConditionalGeneration.from_pretrained(trained / "base").eval()
    base_logits = base(**probe).logits
    adapted = PeftModel.from_pretrained(base, trained / "out").eval()
    assert_close(adapted(**probe).logits, logits, 1e-4)
    assert_different(base_logits, logits)
    config = json.loads((trained / "out/adapter_config.json").read_text())
    assert config["task_type"] is None  # PEFT's class for translation asks for `input_ids`


def test_the_merged_model_equals_the_adapted_one(trained: Path, tmp_path: Path) -> None:
    recipe = load_adapter_recipe(trained / "out")
    task, model, accelerator = open_adapter(trained / "out", recipe)
    merge_adapter(None, trained / "out", tmp_path / "merged")
    merged = WhisperForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    probe = task.probe()
    assert_close(merged(**probe).logits, task.probed(model, probe), 1e-4)
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert merged.generation_config.language == "de"
    assert merged.generation_config.task == "transcribe"
    # by `generate`, which reads the language from the merged model
    file = trained / "speech/test/0.wav"
    inputs = processor(task.samples({"bytes": None, "path": str(file)}), sampling_rate=RATE,
                       return_tensors="pt")  # fmt: skip
    output = merged.generate(**inputs, max_new_tokens=3)
    text = processor.decode(output[0], skip_special_tokens=True).strip()
    ((transcript,),) = answer(model, task, [task.parse_input(str(file))], accelerator)
    assert text
    assert transcript.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_eval_equals_the_run_s_report(trained: Path) -> None:
    recipe = load_adapter_recipe(trained / "out")
    with contextlib.redirect_stderr(io.StringIO()):
        metrics = evaluate_adapter(trained / "out", recipe, "test")
    report = json.loads((trained / "out" / "report.json").read_text())
    assert metrics["test"] == pytest.approx(report["metrics"]["after"]["test"], rel=1e-6)


def test_the_best_adapter_has_the_lowest_error_rate(trained: Path) -> None:
    report = json.loads((trained / "out" / "report.json").read_text())
    assert report["best"]["metric"] == "wer"
    assert report["best"]["mode"] == "min"


def test_the_report_plays_the_worst_recordings(trained: Path) -> None:
    page = (trained / "out" / "report.html").read_text()
    lines = [json.loads(t) for t in (trained / "out/predictions/test.jsonl").read_text().split("\n")
             if t]  # fmt: skip
    wrong = [line for line in lines if any(a != b for a, b in line["words"])]
    assert wrong
    sounds = re.findall(r'<audio controls preload="none" src="(data:audio/[^"]+)"', page)
    assert len(sounds) == len(wrong)
    assert "media-src data:" in page
    for heading in ("Wrong words", "Most common errors", "Worst recordings"):
        assert heading in page
    edits = [pair for line in lines for pair in line["words"] if pair[0] != pair[1]]
    counts = {
        "substituted": sum(None not in pair for pair in edits),
        "deleted": sum(pair[1] is None for pair in edits),
        "inserted": sum(pair[0] is None for pair in edits),
    }
    for kind, count in counts.items():
        assert re.search(rf"{kind}</t.>\s*<td[^>]*>{count}</td>", page), (kind, count)
    assert "seconds a second" in page


def test_the_model_card_s_code_runs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (trained / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(trained / "out")
    file = trained / "speech/test/1.wav"
    (trained / "out" / "recording.wav").write_bytes(file.read_bytes())
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "card", "exec"), {})
    (trained / "out" / "recording.wav").unlink()
    task, model, accelerator = open_adapter(trained / "out", load_adapter_recipe(trained / "out"))
    ((transcript,),) = answer(model, task, [task.parse_input(str(file))], accelerator)
    assert printed.getvalue().strip()
    assert printed.getvalue().strip().startswith(transcript[:8])
    assert 'lora predict --adapter . "recording.wav"' in card


def test_predict_reads_folders_and_files_of_any_length(trained: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    tiny_speech.write(new / "a/1.flac", sound(70, 0.5, 44_100, 2), 44_100)
    tiny_speech.write(new / "b/long.wav", sound(71, 3.3))
    (new / "b/broken.mp3").write_bytes(b"no sound")
    (new / "b/other.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    task, model, accelerator = open_adapter(trained / "out", load_adapter_recipe(trained / "out"))
    target = tmp_path / "answers.csv"
    written, problems = answer_file(model, task, new, target, accelerator)
    assert written == 4
    assert {problem.at for problem in problems} == {"b/broken.mp3", "b/other.m4a"}
    lines = target.read_text().splitlines()
    assert lines[0] == "audio,prediction"
    assert [line.split(",")[0] for line in lines[1:]] == [
        "a/1.flac", "b/broken.mp3", "b/long.wav", "b/other.m4a",
    ]  # fmt: skip
    rows = tmp_path / "rows.csv"
    rows.write_text("audio,speaker\nnew/b/long.wav,x\n")
    answer_file(model, task, rows, tmp_path / "more.csv", accelerator)
    answers = (tmp_path / "more.csv").read_text().splitlines()
    assert answers[0] == "audio,speaker,prediction"
    (tmp_path / "clips").mkdir()
    (new / "b/long.wav").rename(tmp_path / "clips" / "long.wav")  # like Common Voice
    rows.write_text("audio,speaker\nlong.wav,x\n")
    answer_file(model, task, rows, tmp_path / "clips.csv", accelerator)
    clip_answers = [
        line.partition(",")[2] for line in (tmp_path / "clips.csv").read_text().splitlines()
    ]
    assert clip_answers == [line.partition(",")[2] for line in answers]


def test_truncated_answers_are_a_warning(trained: Path) -> None:
    task, model, accelerator = open_adapter(trained / "out", load_adapter_recipe(trained / "out"))
    task.recipe = task.recipe.with_values({"evaluate.generation.max_new_tokens": 4})
    file = trained / "speech/test/0.wav"
    answer(model, task, [task.parse_input(str(file))], accelerator)
    warnings = task.take_warnings()
    assert warnings == [
        "1 answer ended at `evaluate.generation.max_new_tokens` (4), not by themselves"
    ]


# --------------------------------------------------------------------------------- lora init


@pytest.mark.slow
def test_init_drafts_a_recipe_for_a_folder(tmp_path: Path) -> None:
    tiny_speech.save(tmp_path / "base", languages=True)
    tiny_speech.write_folder(tmp_path / "speech", {"train": 8, "test": 2})
    target = tmp_path / "recipe.yaml"
    draft = draft_recipe(tmp_path / "speech", str(tmp_path / "base"), target)
    write_recipe(target, draft.text(), draft.extra_files)
    task = load_recipe(target).task
    assert (task.type, task.language) == ("speech_recognition", "en")
    assert "a guess, by its letters" in target.read_text()
    report = run(target, "train.epochs=null", "train.max_steps=1", f"output_dir={tmp_path / 'o'}")
    assert report["data"]["train"]["rows"] == 6


def test_init_detects_the_columns_of_a_table(tmp_path: Path) -> None:
    tiny_speech.save(tmp_path / "base", languages=True)
    tiny_speech.write_folder(tmp_path / "speech", {"x": 6})
    lines = [f"speech/x/{i}.wav,Guten Tag {i},de,{i}\n" for i in range(6)]
    (tmp_path / "rows.csv").write_text("".join(["clip,sentence,locale,votes\n", *lines]))
    target = tmp_path / "recipe.yaml"
    draft = draft_recipe(tmp_path / "rows.csv", str(tmp_path / "base"), target)
    write_recipe(target, draft.text(), draft.extra_files)
    task = load_recipe(target).task
    assert (task.audio_column, task.text_column, task.language) == ("clip", "sentence", "de")


def test_init_rejects_unsuitable_data(tmp_path: Path) -> None:
    import tiny

    base = tiny_speech.save(tmp_path / "base")
    text_model = tiny.save_encoder(tmp_path / "text")
    root = tiny_speech.write_folder(tmp_path / "speech", {"train": 3})
    target = tmp_path / "recipe.yaml"
    with pytest.raises(LoraError, match=r"does not hear, and .* holds recordings"):
        draft_recipe(root, str(text_model), target)
    for file in root.rglob("*.txt"):
        file.unlink()
    with pytest.raises(LoraError, match="have no texts next to them"):
        draft_recipe(root, str(base), target)
    (tmp_path / "texts.csv").write_text("text,label\na,x\nb,y\n")
    with pytest.raises(LoraError, match="no column holds recordings"):
        draft_recipe(tmp_path / "texts.csv", str(base), target)
    lines = [f"speech/train/{i}.wav,{i},{i}\n" for i in range(3)]
    (tmp_path / "odd.csv").write_text("".join(["audio,one,two\n", *lines]))
    with pytest.raises(LoraError, match="no column has the name of a transcript column"):
        draft_recipe(tmp_path / "odd.csv", str(base), target)


def test_validate_shows_examples(tmp_path: Path) -> None:
    from lora_cli.preprocessing.show_examples import shown_rows

    task, data = inspect_data(load_recipe(write_recipe_file(tmp_path)))
    shown = next(shown_rows(task, data, 1, colour=False))
    assert "train/0.wav" in shown
    assert "0.wav: 0.30 s at 16,000 Hz, 1 channel" in shown
    assert "⟦<|notimestamps|> great 1<|endoftext|>⟧" in shown
