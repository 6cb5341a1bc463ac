"""Tests that Gemma does not use the attention kernel with wrong outputs, on a real GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
import torch
from closeness import assert_close
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from lora_cli.models.base_model import disable_wrong_attention
from lora_cli.recipe.spec import GenerationSpec
from lora_cli.tasks.generation.text_generation import _continue, _find_batching

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # libraries of the GPU's machine are not those that the project is tested with
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture
def gemma() -> Iterator[Gemma3ForCausalLM]:
    """Return a small Gemma with heads of dimension 256, which share one key."""
    config = Gemma3TextConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=64,
        max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model: Gemma3ForCausalLM = tiny.enliven(Gemma3ForCausalLM(config)).eval()
    disable_wrong_attention(model)
    yield model
    torch.backends.cuda.enable_mem_efficient_sdp(True)


def prompts_of(*lengths: int) -> list[list[int]]:
    """Return prompts of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 101, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("length", [32, 33, 161, 400])
def test_outputs_equal_those_of_the_cpu(length: int, gemma: Gemma3ForCausalLM) -> None:
    ids = torch.tensor(prompts_of(length))
    with torch.no_grad():
        wanted = gemma.cpu().double()(ids).logits
        found = gemma.cuda().float()(ids.cuda()).logits
    assert_close(found.cpu().double(), wanted, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_with_much_padding_are_answered_together(
    dtype: torch.dtype, gemma: Gemma3ForCausalLM
) -> None:
    model, prompts = gemma.cuda().to(dtype), prompts_of(28, 161, 97)
    assert _find_batching(model, prompts, 0, 512) == "any"
    if dtype == torch.float32:
        options = GenerationSpec(max_new_tokens=12)
        together = _continue(model, prompts, 12, [1], 0, options)
        reference = gemma.cpu().double()
        for prompt, answer in zip(prompts, together, strict=True):
            alone = reference.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0
            )[0, len(prompt) :].tolist()
            assert answer[: len(alone)] == alone
