"""Tests of wav2vec2-bert, which reads spectrograms, with a new vocabulary, against transformers."""

from __future__ import annotations

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
from closeness import assert_close, assert_different
from peft import PeftModel
from test_ctc_recognition import decode, load_task_and_data, make_batch, run, write_recipe_file
from transformers import AutoModelForCTC, SeamlessM4TFeatureExtractor, Wav2Vec2BertProcessor

from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.evaluation.predict import answer
from lora_cli.export.merge import merge_adapter
from lora_cli.recipe import load_adapter_recipe
from lora_cli.tasks.speech.ctc_output_length import count_frames, ctc_output_length


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_number_of_frames_is_that_of_the_feature_extractor() -> None:
    extractor = SeamlessM4TFeatureExtractor()
    for n_samples in (560, 719, 720, 879, 880, 5_000, 16_000, 16_123):
        noise = np.random.default_rng(0).standard_normal(n_samples).astype(np.float32)
        features = extractor(noise, sampling_rate=16_000, return_tensors="np")
        assert count_frames(n_samples) == int(features["attention_mask"].sum()), n_samples
    assert count_frames(100) == 0


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("has_adapter", [False, True])
def test_losses_and_transcripts_equal_those_of_transformers(
    has_adapter: bool, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"add_adapter": True, "num_adapter_layers": 1} if has_adapter else {}
    base = tiny_ctc.save_spectrograms(tmp_path / "base", **changes)
    # 48.5, 51 and 53.5 frames: the adapter's convolutions reach into the padding
    tiny_speech.write_folder(
        tmp_path / "speech", {"train": 5, "validation": 2, "test": 2}, seconds=0.99
    )
    task, model, data = load_task_and_data(write_recipe_file(tmp_path))
    task.save_processor(tmp_path / "processor")
    processor = Wav2Vec2BertProcessor.from_pretrained(tmp_path / "processor")
    size = len(processor.tokenizer)
    reference = AutoModelForCTC.from_pretrained(
        base, ctc_loss_reduction="sum", dtype=torch.float64, vocab_size=size,
        pad_token_id=processor.tokenizer.pad_token_id,
    ).eval()  # fmt: skip
    reference.lm_head.load_state_dict(model.lm_head.state_dict())
    split = data["train"]
    batch = make_batch(task, split, range(5))
    assert len(set(batch.inputs["lengths"].tolist())) > 1
    output = task.forward(model, batch)
    losses = task.losses(model, output, batch)["loss"]
    predictions = task.predictions(model, output, batch)
    for i in range(5):
        samples, rate = soundfile.read(split.rows[i]["audio"]["path"])
        inputs = processor(samples, sampling_rate=rate, return_tensors="pt")
        text = re.sub(r"[^a-z0-9' ]", "", split.rows[i]["text"].lower())
        labels = processor(text=text, return_tensors="pt")["input_ids"]
        assert list(split.examples[i]["labels"]) == labels[0].tolist()
        inputs["input_features"] = inputs["input_features"].double()
        expected = reference(**inputs, labels=labels)
        assert_close(losses[i], expected.loss.detach(), 1e-5)
        n_steps = ctc_output_length(model.config, int(inputs["attention_mask"].sum()))
        assert int(batch.targets["output_lengths"][i]) == n_steps
        assert_close(output[i, :n_steps], expected.logits[0, :n_steps].detach(), 1e-5)
        text = decode(processor, expected.logits[0, :n_steps].argmax(-1))
        assert predictions[i].prediction == text


@pytest.mark.slow
def test_peft_reads_the_adapter_of_a_run(tmp_path: Path) -> None:
    tiny_ctc.save_spectrograms(tmp_path / "base")
    run(write_recipe_file(tmp_path))
    out, file = tmp_path / "out", tmp_path / "speech/test/0.wav"
    task, model, accelerator = open_adapter(out, load_adapter_recipe(out))
    processor = Wav2Vec2BertProcessor.from_pretrained(out)
    options = {"vocab_size": len(processor.tokenizer),
             "pad_token_id": processor.tokenizer.pad_token_id}  # fmt: skip
    base = AutoModelForCTC.from_pretrained(tmp_path / "base", **options)
    adapted = PeftModel.from_pretrained(base, out).eval()
    inputs = processor(soundfile.read(file)[0], sampling_rate=16_000, return_tensors="pt")
    scores = adapted(**inputs).logits
    n_steps = int(inputs["attention_mask"].sum())
    text = decode(processor, scores[0, :n_steps].argmax(-1))
    ((answer_text,),) = answer(model, task, [task.parse_input(str(file))], accelerator)
    assert answer_text == text
    merge_adapter(None, out, tmp_path / "merged")
    merged = AutoModelForCTC.from_pretrained(tmp_path / "merged").eval()
    assert_close(merged(**inputs).logits, scores, 1e-4)
    assert_different(merged(**inputs).logits, scores + 1)
