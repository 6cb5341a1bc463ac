"""The task of a PEFT folder without a recipe, from what PEFT saved; the logits equal PEFT's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import tiny_diffusion
import tiny_pictures
import tiny_speech
import torch
from closeness import assert_close
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
)

from lora_cli.adapters.peft_format.adapter_folder import CONFIG_FILE
from lora_cli.errors import LoraError
from lora_cli.export.adapter_task import adapter_task
from lora_cli.export.merge import merge_adapter

LABELS = ("bad", "good")
IDS = torch.tensor([[5, 9, 17, 40], [8, 33, 4, 21]])


def save_with_peft(model: nn.Module, folder: Path, targets: list[str], **config: Any) -> nn.Module:
    """Save an adapter with PEFT, whose matrices are all non-zero; return the model."""
    with warnings.catch_warnings():  # of ties
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    return adapted.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("task", "auto", "save", "targets"),
    [
        ("causal_lm", AutoModelForCausalLM, tiny.save_llama, ["q_proj"]),
        ("seq2seq_lm", AutoModelForSeq2SeqLM, tiny.save_encoder_decoder, ["q_proj"]),
        (
            "sequence_classification",
            AutoModelForSequenceClassification,
            lambda folder: tiny.save_encoder(folder, LABELS),
            ["query"],
        ),
        (
            "image_classification",
            AutoModelForImageClassification,
            lambda folder: tiny_pictures.save("vit", folder, LABELS),
            ["q_proj"],
        ),
        ("speech_recognition", AutoModelForSpeechSeq2Seq, tiny_speech.save, ["q_proj"]),
    ],
)
def test_without_a_task_type_the_class_of_the_base_decides(
    task: str, auto: Any, save: Any, targets: list[str], tmp_path: Path
) -> None:
    base, folder = save(tmp_path / "base"), tmp_path / "adapter"
    theirs = save_with_peft(auto.from_pretrained(base), folder, targets)
    assert json.loads((folder / CONFIG_FILE).read_text())["task_type"] is None
    found, _ = adapter_task(folder, None, str(base))
    assert found.recipe.task.type == task
    if task == "causal_lm":
        merge_adapter(None, folder, tmp_path / "merged")
        assert_close(logits(auto.from_pretrained(tmp_path / "merged")), logits(theirs))


def test_an_adapter_that_peft_saved_for_a_unet_is_for_image_generation(tmp_path: Path) -> None:
    base, folder = tiny_diffusion.save(tmp_path / "base"), tmp_path / "adapter"
    theirs = save_with_peft(
        UNet2DConditionModel.from_pretrained(base / "unet"), folder, ["to_q", "conv1"],
        lora_alpha=6, rank_pattern={"mid_block.*to_q": 3}, use_rslora=True,
    )  # fmt: skip
    with pytest.raises(LoraError, match="tensor by tensor: the base has several parts"):
        merge_adapter(str(base), folder, tmp_path / "merged", low_memory=True)
    merge_adapter(str(base), folder, tmp_path / "merged")
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged" / "unet").state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert_close(tensor, expected[name], 1e-6)


@pytest.mark.parametrize("named", [None, {}, {"base_model_class": "LlamaModel"}, "LlamaModel"])
def test_a_class_without_a_head_does_not_determine_the_task(named: Any, tmp_path: Path) -> None:
    base, folder = tiny.save_llama(tmp_path / "base"), tmp_path / "adapter"
    save_with_peft(AutoModelForCausalLM.from_pretrained(base), folder, ["q_proj"])
    values = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**values, "auto_mapping": named}))
    with pytest.raises(LoraError, match="does not say what it was trained for"):
        adapter_task(folder, None, str(base))


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_saved_with_more_rows_means_added_tokens(tied: bool, tmp_path: Path) -> None:
    base, folder = tiny.save_llama(tmp_path / "base", tied), tmp_path / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<b>", "<a>"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    in_full = ["embed_tokens", "lm_head"]
    theirs = save_with_peft(
        model, folder, ["q_proj"], task_type="CAUSAL_LM", modules_to_save=in_full
    )
    tokenizer.save_pretrained(folder)
    task, _ = adapter_task(folder, None, str(base))
    assert task.recipe.model.add_tokens == ["<b>", "<a>"]
    merge_adapter(None, folder, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(logits(merged), logits(theirs))
    written = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert written.convert_tokens_to_ids(["<b>", "<a>"]) == [len(tokenizer) - 2, len(tokenizer) - 1]
