"""Speech by SpeechT5, as transformers and PEFT compute it."""

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


def write_recipe_of(folder: Path, base: Json | None = None, **sections: Any) -> Path:
    """Write a base, rows and a recipe for them, as far as they are not there."""
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


def opened(path: Path, splits: tuple[str, ...] = ("train",)) -> tuple[Any, Any, Any]:
    """Return a task, its base in float64, and its encoded rows."""
    task = build_task(load_recipe(path))
    task.load_processor()
    data = load_data(task, splits)
    model, _ = task.load_model(CPU)
    model = model.double().eval()
    task.fit_to_model(model)
    return task, model, data


def batch_of(task: Any, split: Any, rows: range) -> Any:
    return task.collate([prepared_for_evaluation(task, split.examples[i]) for i in rows])


def run(recipe: Path, resume: bool = False) -> Json:
    with contextlib.redirect_stderr(io.StringIO()):
        return train(load_recipe(recipe), resume)


def keeping(model: Any, kept: Tensor) -> None:
    """Let a model's pre-net draw the dropout that an example brings along (K, S, units)."""
    masks = iter([*kept] * 9)
    prenet = model.speecht5.decoder.prenet
    prenet._consistent_dropout = lambda states, p: torch.where(next(masks), states, 0) / (1 - p)


# ------------------------------------------------------------------------ as transformers does it

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
def test_the_loss_and_its_gradient_are_those_of_transformers(config: str, tmp_path: Path) -> None:
    path = write_recipe_of(tmp_path, CONFIGS[config])
    task, model, data = opened(path)
    reference = SpeechT5ForTextToSpeech.from_pretrained(tmp_path / "base", dtype=torch.float64)
    reference.eval()
    extractor = SpeechT5FeatureExtractor.from_pretrained(tmp_path / "base")
    batch, rows = batch_of(task, data["train"], range(5)), data["train"].rows
    output = task.forward(model, batch)
    found = task.losses(model, output, batch)
    assert (ATTENTION in found) == (config != "no guided attention")
    for i in range(5):
        samples, rate = soundfile.read(rows[i]["audio"]["path"], dtype="float32")
        wanted = extractor(audio_target=samples, sampling_rate=rate, return_tensors="pt")
        mel = wanted["input_values"].double()
        extra = -mel.shape[1] % int(reference.config.reduction_factor)
        labels = nn.functional.pad(mel, (0, 0, 0, extra), value=-100.0)
        ids = task.tokenizer(rows[i]["text"], return_tensors="pt")
        n_steps = labels.shape[1] // int(reference.config.reduction_factor)
        keeping(reference, batch.inputs["kept"][i][:, :n_steps])
        said = reference(
            **ids, labels=labels, speaker_embeddings=torch.tensor([rows[i]["speaker"]]).double()
        )
        sums = {term: values[i] / batch.items[term][i] for term, values in found.items()}
        loss = sum(task.loss_weights[term] * value for term, value in sums.items())
        assert_close(loss.detach(), said.loss.detach(), 1e-6)
        assert_close(
            output.after[i, : labels.shape[1]].detach(), said.spectrogram[0].detach(), 1e-6
        )
    # of the last, which stands in a batch with longer ones, also the gradients
    for one in (model, reference):
        one.zero_grad()
    loss.backward()
    said.loss.backward()
    gradients = dict(reference.named_parameters())
    scale = max(float(p.grad.abs().max()) for p in gradients.values() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert float((parameter.grad - gradients[name].grad).abs().max()) < 1e-5 * scale, name


def test_what_is_drawn_depends_on_seed_row_and_in_training_on_the_step(tmp_path: Path) -> None:
    task, _, data = opened(write_recipe_of(tmp_path))
    one, other = (data["train"].examples[i] for i in (0, 1))
    again = [prepared_for_evaluation(task, one)["kept"] for _ in range(2)]
    assert torch.equal(*again)
    steps = [prepared_for(task, one, 0, step)["kept"] for step in (1, 1, 2)]
    assert torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[0], steps[2])
    assert not torch.equal(steps[0], again[0])
    width = again[0].shape[1]
    assert not torch.equal(prepared_for_evaluation(task, other)["kept"][:, :width], again[0])
    assert 0.4 < float(torch.cat([*steps, *again], 1).float().mean()) < 0.6


def test_a_row_is_as_long_as_its_spectrogram_and_no_longer_than_the_model_has_positions(
    tmp_path: Path,
) -> None:
    task, _, _ = opened(write_recipe_of(tmp_path))
    extractor = SpeechT5FeatureExtractor.from_pretrained(tmp_path / "base")
    row = tiny_synthesis.row(0, tmp_path)
    most = tiny_synthesis.SPEECH_POSITIONS * 2

    def example(n_samples: int, text: str = "a") -> Any:
        samples = tiny_speech.sound(0, 2.0)[:n_samples]
        file = tiny_speech.write(tmp_path / f"{n_samples}.wav", samples)
        ((found,),) = task.encode([{**row, "text": text, "audio": {"bytes": None,
                                                                  "path": str(file)}}])  # fmt: skip
        return {**found, "row": 0}

    for n_samples in (1023, 1024, 1025, 1279, 256 * most - 1):
        one = example(n_samples)
        samples, _ = soundfile.read(one["audio"]["path"], dtype="float32")
        mel = extractor(audio_target=samples, sampling_rate=16_000)["input_values"][0]
        assert task.cost(one) == one["n_frames"] == len(mel)
        prepared = prepared_for_evaluation(task, one)
        assert task.output_length(prepared) == len(mel)
        assert_close(prepared["mel"], torch.from_numpy(mel))
    with pytest.raises(LoraError, match=r"lasts 1\.9 s, and the model says 1\.9 s at most"):
        example(256 * most)
    letters = tiny_synthesis.TEXT_POSITIONS - 1  # and the end
    assert len(example(1024, "b" * letters)["input_ids"]) == letters + 1
    with pytest.raises(LoraError, match="its text has 81 tokens, and the model reads 80 at most"):
        example(1024, "b" * (letters + 1))
    shown = task.shown(example(1024, "abc"), colour=False)
    assert shown == (["text 4 tokens"], "1024.wav: 0.06 s at 16,000 Hz, 1 channel\nabc</s>")


def test_filling_texts_and_spectrograms_further_changes_nothing(tmp_path: Path) -> None:
    task, model, data = opened(write_recipe_of(tmp_path))
    found = []
    for task.pad_multiple in (1, 8):  # 8 on a GPU
        batch = batch_of(task, data["train"], range(5))
        output = task.forward(model, batch)
        frames = {term: items.tolist() for term, items in batch.items.items()}
        found.append((task.losses(model, output, batch), frames, batch.inputs["frames"].shape))
    (losses, items, shape), (others, same, longer) = found
    assert longer[1] > shape[1]
    assert items == same
    for term, values in losses.items():
        assert_close(others[term].detach(), values.detach(), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "bitfit", "none"])
def test_a_model_without_low_rank_updates_speaks_too(kind: str, tmp_path: Path) -> None:
    path = write_recipe_of(
        tmp_path, adapter={"type": kind, "rank": 8, "alpha": 16},
        evaluate={"metrics": ["length_error"], "baseline": False},
        train={"max_steps": 1, "optimizer": {"learning_rate": 1e-4}},
    )  # fmt: skip
    if kind == "none":  # the task adds no head
        with pytest.raises(LoraError, match="nothing"):
            run(path)
    else:
        assert run(path)["metrics"]["after"]["validation"]["length_error"] > 0


def test_metrics_are_those_of_numpy_and_scikit_learn(tmp_path: Path) -> None:
    metrics = {"metrics": ["mel_l1", "stop_accuracy", "length_error"], "baseline": False}
    path = write_recipe_of(tmp_path, evaluate=metrics, task={"stop_threshold": 0.999})
    report = run(path)["metrics"]["after"]["validation"]
    adapter = tmp_path / "out"
    task, model, _ = open_adapter(adapter, load_adapter_recipe(adapter))
    data = load_data(task, ("validation",))
    errors, said, wanted, lengths = [], [], [], []
    threshold = float(task.spec.stop_threshold)
    for i in range(ROWS["validation"]):
        batch = batch_of(task, data["validation"], range(i, i + 1))
        with torch.no_grad():
            output = task.forward(model, batch)
        frames = int(batch.targets["trained"].sum())
        errors.append((output.after - batch.targets["mel"])[0, :frames].numpy().ravel())
        chances = torch.sigmoid(output.stops[0]).view(-1, 2).sum(1)
        said += (chances >= threshold).tolist()
        wanted += [0] * (len(chances) - 1) + [1]
        row = data["validation"].rows[i]
        (found,) = task._said(model, [row])
        lengths.append(abs(len(found) / frames - 1))
    assert len(set(said)) > 1
    assert report["mel_l1"] == pytest.approx(float(np.abs(np.concatenate(errors)).mean()), rel=1e-5)
    assert report["stop_accuracy"] == pytest.approx(balanced_accuracy_score(wanted, said))
    assert report["length_error"] == pytest.approx(float(np.mean(lengths)))


def test_a_step_ends_where_its_frames_together_reach_the_threshold() -> None:
    task: Any = object.__new__(TextToSpeech)
    task.config = SimpleNamespace(reduction_factor=2)
    task.spec = SimpleNamespace(stop_threshold=1.0)
    # of frames whose logit is 0, two have the probability 0.5 + 0.5
    stops = torch.tensor([[-1.0, 0, 0, 0, -9, -9, 0, 0], [-1, 0, -1, 0, 0, 0, 9, 9]])
    mel, after = torch.zeros(2, 8, 3), torch.full((2, 8, 3), 0.5)
    after[1, 6:] = 7.0  # behind the end
    frames = torch.tensor([8, 5])
    targets = {
        "mel": mel, "trained": torch.arange(8) < frames[:, None], "last_step": torch.tensor([3, 2]),
    }  # fmt: skip
    after[0, 0] = -1.0
    errors, ends, goes_on = task._counts(SpeechOutput(after, after, stops, ()), targets)
    assert errors == [3 * (7 * 0.5 + 1), 3 * 5 * 0.5]
    assert ends == [1.0, 1.0]
    assert goes_on == [2.0, 2.0]  # of three before the end, and of two
    task.spec.stop_threshold = 1.0001
    assert task._counts(SpeechOutput(after, after, stops, ()), targets)[1:] == ([0, 0], [3, 2])


# --------------------------------------------------------------------------------- what it says


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, a vocoder, and a trained adapter in `out`."""
    folder = tmp_path_factory.mktemp("spoken")
    tiny_synthesis.save_vocoder(folder / "vocoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        path = write_recipe_of(
            folder, task={"vocoder": "./vocoder"}, evaluate={"samples": 2, "baseline": True},
            adapter={"target_modules": "all-linear"}, train={"optimizer": {"learning_rate": 0.05}},
        )  # fmt: skip
        run(path)
    return folder


def test_the_adapter_of_a_run_speaks_as_with_transformers_and_peft(trained: Path) -> None:
    adapter, work = trained / "out", trained / "new/work"
    task, model, accelerator = open_adapter(adapter, load_adapter_recipe(adapter))
    task.answer_folder = work
    row = {"text": "what  a story", "speaker": tiny_synthesis.speaker(1)}
    ((name,),) = answer(model, task, [row], accelerator)
    base = SpeechT5ForTextToSpeech.from_pretrained(trained / "base").eval()
    vocoder = SpeechT5HifiGan.from_pretrained(trained / "vocoder").eval()
    ids = task.tokenizer("what a story", return_tensors="pt")
    how = {"speaker_embeddings": torch.tensor([row["speaker"]]), "vocoder": vocoder}
    said = []
    for with_adapter in (False, True):  # PEFT puts it into the base itself
        speaking = PeftModel.from_pretrained(base, adapter).eval() if with_adapter else base
        torch.manual_seed(task.recipe.train.seed)
        said.append(speaking.generate_speech(ids["input_ids"], **how).detach())
    samples, rate = soundfile.read(work.parent / name, dtype="float32")
    assert rate == 16_000
    assert len(samples) % (2 * 256) == 0  # whole steps of the decoder
    wanted = said[1].clamp(-1, 1).numpy()
    assert np.abs(samples - wanted).max() < 2**-14  # 16 bits
    assert said[0].shape != said[1].shape or float((said[0] - said[1]).abs().max()) > 1e-3
    again = answer(model, task, [row, {**row, "speaker": tiny_synthesis.speaker(2)}], accelerator)
    assert again[0] == [name]
    assert again[1] != [name]


def test_peft_computes_the_same_of_recorded_speech(trained: Path) -> None:
    task, model, _ = open_adapter(trained / "out", load_adapter_recipe(trained / "out"))
    batch = batch_of(task, load_data(task, ("validation",))["validation"], range(1))
    base = SpeechT5ForTextToSpeech.from_pretrained(trained / "base").eval()
    peft = PeftModel.from_pretrained(base, trained / "out").eval()
    keeping(base, batch.inputs["kept"][0])
    with torch.no_grad():
        found = task.logits(model, batch.inputs)[..., :-1]
        inputs = {key: batch.inputs[key] for key in ("input_ids", "attention_mask")}
        wanted = peft(
            **inputs, decoder_input_values=batch.inputs["frames"],
            speaker_embeddings=batch.inputs["speaker"],
        ).spectrogram  # fmt: skip
        assert_close(found, wanted, 1e-5)
        with peft.disable_adapter():
            keeping(base, batch.inputs["kept"][0])
            alone = peft(
                **inputs, decoder_input_values=batch.inputs["frames"],
                speaker_embeddings=batch.inputs["speaker"],
            ).spectrogram  # fmt: skip
        assert_different(found, alone)


def test_a_run_leaves_the_statistics_of_the_post_net_as_they_were(trained: Path) -> None:
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


def test_the_report_plays_what_is_said_and_what_was_recorded(trained: Path) -> None:
    report = json.loads((trained / "out/report.json").read_text())
    assert len(report["samples"]) == 2
    for sample in report["samples"]:
        assert sample["before"].startswith("data:audio/wav;base64,")
        assert sample["after"] != sample["before"]
        assert sample["reference"].startswith("data:audio/")
    page = (trained / "out/report.html").read_text()
    # before, one evaluation, after and the recording of both samples; and the hardest rows
    assert page.count("<audio controls") == 2 * 4 + ROWS["validation"]


def test_without_a_vocoder_spectrograms_are_written(trained: Path) -> None:
    recipe = load_adapter_recipe(trained / "out", ["task.vocoder=null"])
    task, model, accelerator = open_adapter(trained / "out", recipe)
    task.answer_folder = trained / "seen"
    row = {"text": "great", "speaker": tiny_synthesis.speaker(0)}
    ((name,),) = answer(model, task, [row], accelerator)
    assert list(task.answer_columns()) == ["spectrogram"]
    found = np.load(trained / name)
    assert found.shape[1] == tiny_synthesis.BANDS
    assert torch.equal(torch.from_numpy(found), task._said(model, [row])[0])


def test_an_answer_that_never_ends_is_cut_where_the_model_has_positions(trained: Path) -> None:
    recipe = load_adapter_recipe(trained / "out", ["task.stop_threshold=9"])
    task, model, _ = open_adapter(trained / "out", recipe)
    factor, speaker = 2, tiny_synthesis.speaker(0)
    long = {"text": "a long text that is said " * 3, "speaker": speaker}
    said = task._said(model, [long, {"text": "a", "speaker": speaker}])
    assert len(said[0]) == tiny_synthesis.SPEECH_POSITIONS * factor
    assert len(said[1]) == 2 * 20  # two tokens, with `task.longest_ratio`
    assert task.take_warnings() == [
        "2 answers ended at the greatest length (`task.longest_ratio`), not by itself"
    ]
    assert task.take_warnings() == []


@pytest.mark.slow
def test_the_code_of_the_model_card_says_a_text(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (trained / "out/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    np.save(trained / "out/speaker.npy", np.array(tiny_synthesis.speaker(1)))
    monkeypatch.chdir(trained / "out")
    exec(code, {})
    samples, _ = soundfile.read("said.wav")
    assert len(samples) > 0
    # of one speaker, the vector lies beside the adapter
    changes = ["task.speaker_column=null", "task.speaker_embedding=me.npy"]
    usage = load_adapter_recipe(trained / "out", changes).task.usage([], None)
    assert usage is not None
    assert "numpy.load('speaker_embedding.npy')" in usage.code


@pytest.mark.slow
def test_the_tokenizer_that_speecht5_has(tmp_path: Path) -> None:
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
    path = write_recipe_of(tmp_path)
    task, _, data = opened(path)
    assert isinstance(task.tokenizer, SpeechT5Tokenizer)
    for i in range(3):
        wanted = tokenizer(data["train"].rows[i]["text"])["input_ids"]
        assert list(data["train"].examples[i]["input_ids"]) == wanted
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
def test_what_is_no_speaker_is_rejected(name: str) -> None:
    value, reason = BAD_SPEAKERS[name]
    with pytest.raises(SpeakerError, match=f"^{reason}"):
        parse_vector(value, 6)


@pytest.mark.parametrize("value", [[1, 2, 3], "[1, 2, 3]", (1.0, 2.0, 3.0), np.array([1, 2, 3])])
def test_a_speaker_is_a_list_of_numbers(value: Any) -> None:
    assert parse_vector(value, 3).tolist() == [1, 2, 3]


def test_one_speaker_of_a_file_is_that_of_a_column(tmp_path: Path) -> None:
    wanted = np.random.default_rng(0).normal(size=(1, tiny_synthesis.SPEAKER))
    np.save(tmp_path / "me.npy", wanted)
    task = {"speaker_column": ..., "speaker_embedding": "me.npy"}
    path = write_recipe_of(tmp_path, task=task)
    task, _, data = opened(path)
    batch = batch_of(task, data["train"], range(2))
    assert_close(batch.inputs["speaker"], torch.tensor(np.repeat(wanted, 2, 0)).float())
    run(path)
    (tmp_path / "me.npy").unlink()  # the adapter has its own copy
    task, _, _ = open_adapter(tmp_path / "out", load_adapter_recipe(tmp_path / "out"))
    assert_close(torch.from_numpy(task.speaker_vector({})), torch.tensor(wanted[0]).float())


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((2, 3), "holds 2 x 3 numbers, and not one vector"), ((1, 2, 3), "holds 1 x 2 x 3 numbers"),
        ((5,), "holds 5 numbers, and the model reads 6"),
        ((1, 5), "holds 5 numbers, and the model reads 6"),
        ((), "holds 1 number, and the model reads 6"),
    ],
)  # fmt: skip
def test_a_file_of_a_speaker_holds_one_vector(
    shape: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "me.npy", np.ones(shape))
    recipe = load_recipe(write_recipe_of(tmp_path))
    with pytest.raises(LoraError, match=rf"me\.npy {reason}"):
        load_vector(recipe, str(tmp_path / "me.npy"), None, 6)


def test_a_file_of_a_speaker_runs_no_code(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return Path.mkdir, (tmp_path / "ran",)

    np.save(tmp_path / "me.npy", np.array([Code()], dtype=object), allow_pickle=True)
    task = {"speaker_column": ..., "speaker_embedding": "me.npy"}
    nobody = build_task(load_recipe(write_recipe_of(tmp_path, task=task)))
    with pytest.raises(LoraError, match=r"is no array that `numpy\.save` wrote"):
        nobody.load_processor()
    assert not (tmp_path / "ran").exists()


def test_a_speaker_has_to_be_named(tmp_path: Path) -> None:
    nobody = build_task(load_recipe(write_recipe_of(tmp_path, task={"speaker_column": ...})))
    with pytest.raises(LoraError, match="nothing says who speaks"):
        nobody.load_processor()
    for task, what in (
        ({"speaker_embedding": "zeros"}, "so `speaker_embedding` is not read"),
        ({"speaker_column": "text"}, "`text` is the column of both"),
        ({"text_column": "audio"}, "`audio` is the column of both"),
    ):
        with pytest.raises(LoraError, match=what):
            load_recipe(write_recipe_of(tmp_path, task=task))
