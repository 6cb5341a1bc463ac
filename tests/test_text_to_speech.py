"""Tests of speech synthesis with SpeechT5, against transformers and PEFT."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import tiny_speech
import tiny_synthesis
import torch
import yaml
from closeness import assert_close, assert_different
from peft import PeftModel
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn
from transformers import SpeechT5FeatureExtractor, SpeechT5ForTextToSpeech, SpeechT5HifiGan
from typer.testing import CliRunner

from lora_cli.cli.app import app
from lora_cli.errors import LoraError
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.evaluation.predict import answer
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_adapter_recipe, load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import prepared_for_evaluation
from lora_cli.tasks.speech.speakers import SpeakerError, load_vector, parse_vector
from lora_cli.tasks.speech.spectrogram_loss import ATTENTION
from lora_cli.tasks.speech.speecht5 import SpeechOutput
from lora_cli.tasks.text_to_speech import TextToSpeech
from lora_cli.training import train
from lora_cli.training.batches import prepared_for

Json = dict[str, Any]
CPU = torch.device("cpu")
ROWS = {"train": 6, "validation": 3}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_recipe_file(folder: Path, base: Json | None = None, **sections: Any) -> Path:
    """Write rows and a recipe, and a base unless it exists."""
    if not (folder / "base").exists():
        tiny_synthesis.save(folder / "base", **(base or {}))
    number = 0
    for name, count in ROWS.items():
        rows = [tiny_synthesis.row(number + i, folder) for i in range(count)]
        number += count
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    values: Json = {
        "model": {"name": str(folder / "base")},
        "task": {"type": "text_to_speech", "speaker_column": "speaker"},
        "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
        "adapter": {"rank": 2, "alpha": 4},
        "train": {"max_steps": 2, "micro_batch_size": 4, "optimizer": {"learning_rate": 0.01}},
        "evaluate": {"baseline": False},
        "output_dir": str(folder / "out"),
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    values["task"] = {key: value for key, value in values["task"].items() if value is not ...}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def load_task_and_data(path: Path, splits: tuple[str, ...] = ("train",)) -> tuple[Any, Any, Any]:
    """Return a task, its base in float64, and its encoded splits."""
    task = build_task(load_recipe(path))
    task.load_processor()
    data = load_data(task, splits)
    model, _ = task.load_model(CPU)
    model = model.double().eval()
    task.fit_to_model(model)
    return task, model, data


def make_batch(task: Any, split: Any, rows: range) -> Any:
    return task.collate([prepared_for_evaluation(task, split.examples[i]) for i in rows])


def run(recipe: Path, resume: bool = False) -> Json:
    with contextlib.redirect_stderr(io.StringIO()):
        return train(load_recipe(recipe), resume)


def set_prenet_mask(model: Any, mask: Tensor) -> None:
    """Make a model's pre-net use the dropout mask of an example (K, S, units)."""
    masks = iter([*mask] * 9)
    prenet = model.speecht5.decoder.prenet
    prenet._consistent_dropout = lambda states, p: torch.where(next(masks), states, 0) / (1 - p)


# ------------------------------------------------------------------------ losses and metrics

CONFIGS: dict[str, Json] = {
    "two frames a step": {},
    "one frame a step": {"reduction_factor": 1},
    "three frames a step": {"reduction_factor": 3, "guided_attention_loss_num_heads": 3},
    "all heads but the last": {"guided_attention_loss_num_heads": -1},
    "no guided attention": {"use_guided_attention_loss": False},
}


@pytest.mark.proves(
    "loss", task="text_to_speech", rows="texts said aloud", model="speecht5",
    against="transformers",
)  # fmt: skip
@pytest.mark.slow_after(2)
@pytest.mark.parametrize("config", CONFIGS)
def test_loss_and_gradients_equal_those_of_transformers(config: str, tmp_path: Path) -> None:
    path = write_recipe_file(tmp_path, CONFIGS[config])
    task, model, data = load_task_and_data(path)
    reference = SpeechT5ForTextToSpeech.from_pretrained(tmp_path / "base", dtype=torch.float64)
    reference.eval()
    extractor = SpeechT5FeatureExtractor.from_pretrained(tmp_path / "base")
    batch, rows = make_batch(task, data["train"], range(5)), data["train"].rows
    output = task.forward(model, batch)
    losses = task.losses(model, output, batch)
    assert (ATTENTION in losses) == (config != "no guided attention")
    for i in range(5):
        samples, rate = soundfile.read(rows[i]["audio"]["path"], dtype="float32")
        features = extractor(audio_target=samples, sampling_rate=rate, return_tensors="pt")
        mel = features["input_values"].double()
        extra = -mel.shape[1] % int(reference.config.reduction_factor)
        labels = nn.functional.pad(mel, (0, 0, 0, extra), value=-100.0)
        ids = task.tokenizer(rows[i]["text"], return_tensors="pt")
        n_steps = labels.shape[1] // int(reference.config.reduction_factor)
        set_prenet_mask(reference, batch.inputs["kept"][i][:, :n_steps])
        reference_output = reference(
            **ids, labels=labels, speaker_embeddings=torch.tensor([rows[i]["speaker"]]).double()
        )
        sums = {term: values[i] / batch.items[term][i] for term, values in losses.items()}
        loss = sum(task.loss_weights[term] * value for term, value in sums.items())
        assert_close(loss.detach(), reference_output.loss.detach(), 1e-6)
        assert_close(
            output.after[i, : labels.shape[1]].detach(),
            reference_output.spectrogram[0].detach(),
            1e-6,
        )
    # also compare the gradients of the last example, which is padded in the batch
    for module in (model, reference):
        module.zero_grad()
    loss.backward()
    reference_output.loss.backward()
    gradients = dict(reference.named_parameters())
    scale = max(float(p.grad.abs().max()) for p in gradients.values() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert float((parameter.grad - gradients[name].grad).abs().max()) < 1e-5 * scale, name


def test_prenet_masks_depend_on_seed_row_and_training_step(tmp_path: Path) -> None:
    task, _, data = load_task_and_data(write_recipe_file(tmp_path))
    first, second = (data["train"].examples[i] for i in (0, 1))
    masks = [prepared_for_evaluation(task, first)["kept"] for _ in range(2)]
    assert torch.equal(*masks)
    training_masks = [prepared_for(task, first, 0, step)["kept"] for step in (1, 1, 2)]
    assert torch.equal(training_masks[0], training_masks[1])
    assert not torch.equal(training_masks[0], training_masks[2])
    assert not torch.equal(training_masks[0], masks[0])
    width = masks[0].shape[1]
    assert not torch.equal(prepared_for_evaluation(task, second)["kept"][:, :width], masks[0])
    assert 0.4 < float(torch.cat([*training_masks, *masks], 1).float().mean()) < 0.6


def test_lengths_of_rows_and_their_limits(
    tmp_path: Path,
) -> None:
    task, _, _ = load_task_and_data(write_recipe_file(tmp_path))
    extractor = SpeechT5FeatureExtractor.from_pretrained(tmp_path / "base")
    row = tiny_synthesis.row(0, tmp_path)
    max_frames = tiny_synthesis.SPEECH_POSITIONS * 2

    def encode_row(n_samples: int, text: str = "a") -> Any:
        samples = tiny_speech.sound(0, 2.0)[:n_samples]
        file = tiny_speech.write(tmp_path / f"{n_samples}.wav", samples)
        ((example,),) = task.encode([{**row, "text": text, "audio": {"bytes": None,
                                                                  "path": str(file)}}])  # fmt: skip
        return {**example, "row": 0}

    for n_samples in (1023, 1024, 1025, 1279, 256 * max_frames - 1):
        example = encode_row(n_samples)
        samples, _ = soundfile.read(example["audio"]["path"], dtype="float32")
        mel = extractor(audio_target=samples, sampling_rate=16_000)["input_values"][0]
        assert task.cost(example) == example["n_frames"] == len(mel)
        prepared = prepared_for_evaluation(task, example)
        assert task.output_length(prepared) == len(mel)
        assert_close(prepared["mel"], torch.from_numpy(mel))
    with pytest.raises(LoraError, match=r"lasts 1\.9 s, and the model says 1\.9 s at most"):
        encode_row(256 * max_frames)
    letters = tiny_synthesis.TEXT_POSITIONS - 1  # without the end token
    assert len(encode_row(1024, "b" * letters)["input_ids"]) == letters + 1
    with pytest.raises(LoraError, match="its text has 81 tokens, and the model reads 80 at most"):
        encode_row(1024, "b" * (letters + 1))
    shown = task.shown(encode_row(1024, "abc"), colour=False)
    assert shown == (["text 4 tokens"], "1024.wav: 0.06 s at 16,000 Hz, 1 channel\nabc</s>")


def test_losses_do_not_depend_on_padding(tmp_path: Path) -> None:
    task, model, data = load_task_and_data(write_recipe_file(tmp_path))
    results = []
    for task.pad_multiple in (1, 8):  # 8 on a GPU
        batch = make_batch(task, data["train"], range(5))
        output = task.forward(model, batch)
        frames = {term: items.tolist() for term, items in batch.items.items()}
        results.append((task.losses(model, output, batch), frames, batch.inputs["frames"].shape))
    (losses, items, shape), (other_losses, other_items, longer) = results
    assert longer[1] > shape[1]
    assert items == other_items
    for term, values in losses.items():
        assert_close(other_losses[term].detach(), values.detach(), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "bitfit", "none"])
def test_other_adapter_types(kind: str, tmp_path: Path) -> None:
    path = write_recipe_file(
        tmp_path, adapter={"type": kind, "rank": 8, "alpha": 16},
        evaluate={"metrics": ["length_error"], "baseline": False},
        train={"max_steps": 1, "optimizer": {"learning_rate": 1e-4}},
    )  # fmt: skip
    if kind == "none":  # the task adds no head
        with pytest.raises(LoraError, match="nothing"):
            run(path)
    else:
        assert run(path)["metrics"]["after"]["validation"]["length_error"] > 0


def test_metrics_equal_those_of_numpy_and_scikit_learn(tmp_path: Path) -> None:
    metrics = {"metrics": ["mel_l1", "stop_accuracy", "length_error"], "baseline": False}
    path = write_recipe_file(tmp_path, evaluate=metrics, task={"stop_threshold": 0.999})
    report = run(path)["metrics"]["after"]["validation"]
    adapter = tmp_path / "out"
    task, model, _ = open_adapter(adapter, load_adapter_recipe(adapter))
    data = load_data(task, ("validation",))
    errors, predicted_stops, true_stops, lengths = [], [], [], []
    threshold = float(task.spec.stop_threshold)
    for i in range(ROWS["validation"]):
        batch = make_batch(task, data["validation"], range(i, i + 1))
        with torch.no_grad():
            output = task.forward(model, batch)
        frames = int(batch.targets["trained"].sum())
        errors.append((output.after - batch.targets["mel"])[0, :frames].numpy().ravel())
        probabilities = torch.sigmoid(output.stops[0]).view(-1, 2).sum(1)
        predicted_stops += (probabilities >= threshold).tolist()
        true_stops += [0] * (len(probabilities) - 1) + [1]
        row = data["validation"].rows[i]
        (spectrogram,) = task._spectrograms_for(model, [row])
        lengths.append(abs(len(spectrogram) / frames - 1))
    assert len(set(predicted_stops)) > 1
    assert report["mel_l1"] == pytest.approx(float(np.abs(np.concatenate(errors)).mean()), rel=1e-5)
    assert report["stop_accuracy"] == pytest.approx(
        balanced_accuracy_score(true_stops, predicted_stops)
    )
    assert report["length_error"] == pytest.approx(float(np.mean(lengths)))


def test_stop_probabilities_of_a_step_are_summed() -> None:
    task: Any = object.__new__(TextToSpeech)
    task.config = SimpleNamespace(reduction_factor=2)
    task.spec = SimpleNamespace(stop_threshold=1.0)
    # two frames with a logit of 0 have the probabilities 0.5 + 0.5
    stops = torch.tensor([[-1.0, 0, 0, 0, -9, -9, 0, 0], [-1, 0, -1, 0, 0, 0, 9, 9]])
    mel, after = torch.zeros(2, 8, 3), torch.full((2, 8, 3), 0.5)
    after[1, 6:] = 7.0  # beyond the end
    frames = torch.tensor([8, 5])
    targets = {
        "mel": mel, "trained": torch.arange(8) < frames[:, None], "last_step": torch.tensor([3, 2]),
    }  # fmt: skip
    after[0, 0] = -1.0
    errors, ends, goes_on = task._counts(SpeechOutput(after, after, stops, ()), targets)
    assert errors == [3 * (7 * 0.5 + 1), 3 * 5 * 0.5]
    assert ends == [1.0, 1.0]
    assert goes_on == [2.0, 2.0]  # of three and of two steps before the last
    task.spec.stop_threshold = 1.0001
    assert task._counts(SpeechOutput(after, after, stops, ()), targets)[1:] == ([0, 0], [3, 2])


# --------------------------------------------------------------------------------- synthesis


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, a vocoder, and a trained adapter in `out`."""
    folder = tmp_path_factory.mktemp("spoken")
    tiny_synthesis.save_vocoder(folder / "vocoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        path = write_recipe_file(
            folder, task={"vocoder": "./vocoder"}, evaluate={"samples": 2, "baseline": True},
            adapter={"target_modules": "all-linear"}, train={"optimizer": {"learning_rate": 0.05}},
        )  # fmt: skip
        run(path)
    return folder


def test_generated_speech_equals_that_of_transformers_and_peft(trained: Path) -> None:
    adapter, work = trained / "out", trained / "new/work"
    task, model, accelerator = open_adapter(adapter, load_adapter_recipe(adapter))
    task.answer_folder = work
    row = {"text": "what  a story", "speaker": tiny_synthesis.speaker(1)}
    ((name,),) = answer(model, task, [row], accelerator)
    base = SpeechT5ForTextToSpeech.from_pretrained(trained / "base").eval()
    vocoder = SpeechT5HifiGan.from_pretrained(trained / "vocoder").eval()
    ids = task.tokenizer("what a story", return_tensors="pt")
    options = {"speaker_embeddings": torch.tensor([row["speaker"]]), "vocoder": vocoder}
    spectrograms = []
    for with_adapter in (False, True):  # PEFT changes the base in place
        speech_model = PeftModel.from_pretrained(base, adapter).eval() if with_adapter else base
        torch.manual_seed(task.recipe.train.seed)
        spectrograms.append(speech_model.generate_speech(ids["input_ids"], **options).detach())
    samples, rate = soundfile.read(work.parent / name, dtype="float32")
    assert rate == 16_000
    assert len(samples) % (2 * 256) == 0  # whole decoder steps
    expected = spectrograms[1].clamp(-1, 1).numpy()
    assert np.abs(samples - expected).max() < 2**-14  # 16 bits
    assert (
        spectrograms[0].shape != spectrograms[1].shape
        or float((spectrograms[0] - spectrograms[1]).abs().max()) > 1e-3
    )
    again = answer(model, task, [row, {**row, "speaker": tiny_synthesis.speaker(2)}], accelerator)
    assert again[0] == [name]
    assert again[1] != [name]


def test_peft_computes_the_same_spectrograms(trained: Path) -> None:
    task, model, _ = open_adapter(trained / "out", load_adapter_recipe(trained / "out"))
    batch = make_batch(task, load_data(task, ("validation",))["validation"], range(1))
    base = SpeechT5ForTextToSpeech.from_pretrained(trained / "base").eval()
    peft = PeftModel.from_pretrained(base, trained / "out").eval()
    set_prenet_mask(base, batch.inputs["kept"][0])
    with torch.no_grad():
        spectrogram = task.logits(model, batch.inputs)[..., :-1]
        inputs = {key: batch.inputs[key] for key in ("input_ids", "attention_mask")}
        expected = peft(
            **inputs, decoder_input_values=batch.inputs["frames"],
            speaker_embeddings=batch.inputs["speaker"],
        ).spectrogram  # fmt: skip
        assert_close(spectrogram, expected, 1e-5)
        with peft.disable_adapter():
            set_prenet_mask(base, batch.inputs["kept"][0])
            base_spectrogram = peft(
                **inputs, decoder_input_values=batch.inputs["frames"],
                speaker_embeddings=batch.inputs["speaker"],
            ).spectrogram  # fmt: skip
        assert_different(spectrogram, base_spectrogram)


def test_batch_norm_statistics_of_the_post_net_do_not_change(trained: Path) -> None:
    merged = trained / "merged"
    result = CliRunner().invoke(
        app, ["merge", "--adapter", str(trained / "out"), "--to", str(merged)]
    )
    assert result.exit_code == 0, result.output
    before, after = (
        SpeechT5ForTextToSpeech.from_pretrained(folder).state_dict()
        for folder in (trained / "base", merged)
    )
    statistics = [name for name in before if "running" in name]
    assert len(statistics) == 6
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_report_plays_generated_and_recorded_speech(trained: Path) -> None:
    report = json.loads((trained / "out/report.json").read_text())
    assert len(report["samples"]) == 2
    for sample in report["samples"]:
        assert sample["before"].startswith("data:audio/wav;base64,")
        assert sample["after"] != sample["before"]
        assert sample["reference"].startswith("data:audio/")
    page = (trained / "out/report.html").read_text()
    # for both samples: before, one evaluation, after, the recording; and the worst rows
    assert page.count("<audio controls") == 2 * 4 + ROWS["validation"]


def test_without_a_vocoder_spectrograms_are_written(trained: Path) -> None:
    recipe = load_adapter_recipe(trained / "out", ["task.vocoder=null"])
    task, model, accelerator = open_adapter(trained / "out", recipe)
    task.answer_folder = trained / "seen"
    row = {"text": "great", "speaker": tiny_synthesis.speaker(0)}
    ((name,),) = answer(model, task, [row], accelerator)
    assert list(task.answer_columns()) == ["spectrogram"]
    spectrogram = np.load(trained / name)
    assert spectrogram.shape[1] == tiny_synthesis.BANDS
    assert torch.equal(torch.from_numpy(spectrogram), task._spectrograms_for(model, [row])[0])


def test_speech_that_never_stops_is_truncated(trained: Path) -> None:
    recipe = load_adapter_recipe(trained / "out", ["task.stop_threshold=9"])
    task, model, _ = open_adapter(trained / "out", recipe)
    factor, speaker = 2, tiny_synthesis.speaker(0)
    long_row = {"text": "a long text that is said " * 3, "speaker": speaker}
    spectrograms = task._spectrograms_for(model, [long_row, {"text": "a", "speaker": speaker}])
    assert len(spectrograms[0]) == tiny_synthesis.SPEECH_POSITIONS * factor
    assert len(spectrograms[1]) == 2 * 20  # two tokens, with `task.longest_ratio`
    assert task.take_warnings() == [
        "2 answers ended at the greatest length (`task.longest_ratio`), not by itself"
    ]
    assert task.take_warnings() == []


@pytest.mark.slow
def test_the_model_card_s_code_generates_speech(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (trained / "out/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    np.save(trained / "out/speaker.npy", np.array(tiny_synthesis.speaker(1)))
    monkeypatch.chdir(trained / "out")
    exec(code, {})
    samples, _ = soundfile.read("said.wav")
    assert len(samples) > 0
    # a single speaker's vector is next to the adapter
    changes = ["task.speaker_column=null", "task.speaker_embedding=me.npy"]
    usage = load_adapter_recipe(trained / "out", changes).task.usage([], None)
    assert usage is not None
    assert "numpy.load('speaker_embedding.npy')" in usage.code


@pytest.mark.slow
def test_the_tokenizer_of_speecht5(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import SpeechT5Tokenizer

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join([*tiny_speech.TEXTS, "abcdefghijklmnopqrstuvwxyz 0123456789"] * 9))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "spm_char"), model_type="char",
        vocab_size=40, bos_id=0, pad_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False,
        minloglevel=9,
    )  # fmt: skip
    tokenizer = SpeechT5Tokenizer(str(tmp_path / "spm_char.model"), model_max_length=80)
    tiny_synthesis.save(tmp_path / "base")
    (tmp_path / "base/tokenizer.json").unlink()
    tokenizer.save_pretrained(tmp_path / "base")
    path = write_recipe_file(tmp_path)
    task, _, data = load_task_and_data(path)
    assert isinstance(task.tokenizer, SpeechT5Tokenizer)
    for i in range(3):
        expected = tokenizer(data["train"].rows[i]["text"])["input_ids"]
        assert list(data["train"].examples[i]["input_ids"]) == expected
    spelled = {"text": "a film</s>", "speaker": tiny_synthesis.speaker(0)}
    assert task.tokens_of(spelled).count(tokenizer.eos_token_id) == 1
    run(path)
    task, model, accelerator = open_adapter(tmp_path / "out", load_adapter_recipe(tmp_path / "out"))
    task.answer_folder = tmp_path / "said"
    assert answer(model, task, [spelled], accelerator)


# ------------------------------------------------------------------------------------- speakers

BAD_SPEAKERS: dict[str, tuple[Any, str]] = {
    "null": (None, "is blank"),
    "blank": (" ", "is blank"),
    "a word": ("me", "holds text, not a list of numbers in brackets"),
    "a number": (3.0, "does not hold a list of numbers"),
    "words": (["a"] * 6, "does not hold a list of numbers"),
    "yes and no": ([True] * 6, "does not hold a list of numbers"),
    "lists": ([[1.0] * 6], "does not hold a list of numbers"),
    "an object": ('{"a": 1}', "does not hold a list of numbers"),
    "too few": ([1.0] * 5, "holds 5 numbers, and the model reads 6"),
    "none": ([], "holds 0 numbers, and the model reads 6"),
    "NaN": ([1.0] * 5 + [float("nan")], "holds numbers that are NaN or infinity"),
    "infinity": ("[1, 2, 3, 4, 5, Infinity]", "holds numbers that are NaN or infinity"),
    "zeros": ([0] * 6, "holds zeros alone, which describe no speaker"),
}


@pytest.mark.parametrize("name", BAD_SPEAKERS)
def test_invalid_speakers_are_rejected(name: str) -> None:
    value, reason = BAD_SPEAKERS[name]
    with pytest.raises(SpeakerError, match=f"^{reason}"):
        parse_vector(value, 6)


@pytest.mark.parametrize("value", [[1, 2, 3], "[1, 2, 3]", (1.0, 2.0, 3.0), np.array([1, 2, 3])])
def test_a_speaker_is_a_list_of_numbers(value: Any) -> None:
    assert parse_vector(value, 3).tolist() == [1, 2, 3]


def test_a_speaker_file_equals_a_speaker_column(tmp_path: Path) -> None:
    expected = np.random.default_rng(0).normal(size=(1, tiny_synthesis.SPEAKER))
    np.save(tmp_path / "me.npy", expected)
    task = {"speaker_column": ..., "speaker_embedding": "me.npy"}
    path = write_recipe_file(tmp_path, task=task)
    task, _, data = load_task_and_data(path)
    batch = make_batch(task, data["train"], range(2))
    assert_close(batch.inputs["speaker"], torch.tensor(np.repeat(expected, 2, 0)).float())
    run(path)
    (tmp_path / "me.npy").unlink()  # the adapter has its own copy
    task, _, _ = open_adapter(tmp_path / "out", load_adapter_recipe(tmp_path / "out"))
    assert_close(torch.from_numpy(task.speaker_vector({})), torch.tensor(expected[0]).float())


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((2, 3), "holds 2 x 3 numbers, and not one vector"), ((1, 2, 3), "holds 1 x 2 x 3 numbers"),
        ((5,), "holds 5 numbers, and the model reads 6"),
        ((1, 5), "holds 5 numbers, and the model reads 6"),
        ((), "holds 1 number, and the model reads 6"),
    ],
)  # fmt: skip
def test_a_speaker_file_holds_one_vector(
    shape: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "me.npy", np.ones(shape))
    recipe = load_recipe(write_recipe_file(tmp_path))
    with pytest.raises(LoraError, match=rf"me\.npy {reason}"):
        load_vector(recipe, str(tmp_path / "me.npy"), None, 6)


def test_a_speaker_file_cannot_run_code(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return Path.mkdir, (tmp_path / "ran",)

    np.save(tmp_path / "me.npy", np.array([Code()], dtype=object), allow_pickle=True)
    task = {"speaker_column": ..., "speaker_embedding": "me.npy"}
    invalid_task = build_task(load_recipe(write_recipe_file(tmp_path, task=task)))
    with pytest.raises(LoraError, match=r"is no array that `numpy\.save` wrote"):
        invalid_task.load_processor()
    assert not (tmp_path / "ran").exists()


def test_the_recipe_must_name_a_speaker(tmp_path: Path) -> None:
    invalid_task = build_task(
        load_recipe(write_recipe_file(tmp_path, task={"speaker_column": ...}))
    )
    with pytest.raises(LoraError, match="nothing says who speaks"):
        invalid_task.load_processor()
    for task, message in (
        ({"speaker_embedding": "zeros"}, "so `speaker_embedding` is not read"),
        ({"speaker_column": "text"}, "`text` is the column of both"),
        ({"text_column": "audio"}, "`audio` is the column of both"),
    ):
        with pytest.raises(LoraError, match=message):
            load_recipe(write_recipe_file(tmp_path, task=task))
