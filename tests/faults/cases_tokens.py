"""Errors of new tokens, and of single rows of an embedding."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tiny
import tiny_translators
import torch
from cases import CASES, Case
from safetensors.torch import load_file, save_file
from torch import Tensor
from world import Printed, World

DELTA = "base_model.model.{}.token_adapter.trainable_tokens_delta"
EMBEDDING = "model.embed_tokens"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _trained(base: str = "llama", **sections: Any) -> Callable[[World], Printed]:
    return lambda world: world.lora("train", world.recipe(base, **sections), "-o", "out")


for _name, _sections in {
    "written twice": {"model": {"add_tokens": ["<a>", "<a>"]}},
    "with white space": {"model": {"add_tokens": ["<a> "]}},
    "of several parts": {"adapter": {"train_tokens": ["a warm film"]}},
    "of no id": {"adapter": {"train_tokens": [99_999]}},
    "named twice": {"adapter": {"train_tokens": ["</s>", "</s>"]}},
    "named by its id too": {"adapter": {"train_tokens": [0, "<s>"]}},
    "of an adapted embedding": {
        "adapter": {"train_tokens": ["</s>"], "target_modules": ["embed_tokens"]}},
    "without any module": {"adapter": {"train_tokens": ["</s>"], "target_modules": []}},
    "of an embedding that is trained": {"adapter": {
        "train_tokens": ["</s>"], "train_modules": ["embed_tokens", "lm_head"]}},
}.items():  # fmt: skip
    CASES.append(Case("Models", f"a token {_name}", _trained(**_sections)))


def _saved(
    world: World, ids: Any, rows: dict[str, Tensor], base: str = "llama", verified: bool = False
) -> str:
    """Write an adapter of PEFT with trained rows, and return a recipe of its base."""
    folder = world.folder / "saved"
    folder.mkdir()
    a, b = torch.ones(2, 32) / 9, torch.ones(32, 2) / 9
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
    tensors = {f"{name}A.weight": a, f"{name}B.weight": b}
    tensors |= {DELTA.format(module): tensor.clone() for module, tensor in rows.items()}
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2}
    (folder / CONFIG).write_text(json.dumps({**config, "trainable_token_indices": ids}))
    return world.recipe(base)


def _merged(ids: Any, **rows: Tensor) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        named = {name.replace("__", "."): tensor for name, tensor in rows.items()}
        recipe = _saved(world, ids, named)
        return world.lora("merge", "--recipe", recipe, "--adapter", "saved", "--to", "merged")

    return run


ROWS = torch.ones(2, 32)
for _name, _case in {
    "that are missing": _merged([5, 9]),
    "of unknown tokens": _merged(None, model__embed_tokens=ROWS),
    "of more tokens than the base has": _merged([5, 99_999], model__embed_tokens=ROWS),
    "of another number": _merged([5, 9, 12], model__embed_tokens=ROWS),
    "of no embedding": _merged({"model.norm": [5, 9]}, model__norm=ROWS),
    "of tokens twice": _merged([5, 5], model__embed_tokens=ROWS),
}.items():
    CASES.append(Case("Adapters", f"trained rows {_name}", _case))


def _with_bias(world: World) -> Printed:
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=tiny.vocabulary("llama"), hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=8, max_position_embeddings=64,
    )  # fmt: skip
    PhiForCausalLM(config).save_pretrained(world.folder / "phi")
    tiny.tokenizer("llama").save_pretrained(world.folder / "phi")
    _saved(world, {"lm_head": [5, 9]}, {"lm_head": ROWS})
    file = world.folder / "saved" / WEIGHTS
    tensors = {n.replace("o_proj", "q_proj"): t for n, t in load_file(file).items()}
    save_file(tensors, file)
    task = {"type": "causal_lm", "text_column": "text"}
    recipe = world.recipe(model={"name": "./phi"}, task=task)
    return world.lora("merge", "--recipe", recipe, "--adapter", "saved", "--to", "merged")


def _unreadable_tokenizer(world: World) -> Printed:
    recipe = _saved(world, None, {})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        world.write(f"saved/{name}", "{")
    return world.lora("predict", "--recipe", recipe, "--adapter", "saved", "a warm film")


CASES.append(Case("Adapters", "a tokenizer of its own that is damaged", _unreadable_tokenizer))


def _new_token_of_a_translator(world: World) -> Printed:
    """Add a token to the encoder-decoder in `base`."""
    world.write("rows.jsonl", '{"source": "a warm film", "target": "fun"}\n' * 4)
    recipe = world.recipe(
        model={"name": "./base", "add_tokens": ["<a>"]}, data={"path": "rows.jsonl"},
        task={"type": "seq2seq_lm"}, evaluate={"baseline": False},
    )  # fmt: skip
    return world.lora("validate", recipe)


def _two_vocabularies(world: World) -> Printed:
    from transformers import MarianConfig, MarianMTModel

    base = tiny_translators.save(world.folder / "base", "marian")
    own = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 90}
    MarianMTModel(MarianConfig.from_pretrained(base, **own)).save_pretrained(base)
    return _new_token_of_a_translator(world)


CASES.append(
    Case("Models", "a new token where the decoder has its own vocabulary", _two_vocabularies)
)


def _two_embeddings(world: World) -> Printed:
    from transformers import BartConfig, BartForConditionalGeneration

    base = tiny_translators.save(world.folder / "base", "bart")
    config = BartConfig.from_pretrained(base, tie_word_embeddings=False)
    BartForConditionalGeneration(config).save_pretrained(base)
    return _new_token_of_a_translator(world)


CASES.append(
    Case("Models", "a new token where encoder and decoder have own embeddings", _two_embeddings)
)


def _combine(world: World) -> Printed:
    _saved(world, [5, 9], {EMBEDDING: ROWS})
    return world.lora("combine", "saved", "saved", "--to", "both")


def _export(world: World) -> Printed:
    recipe = _saved(world, [5, 9], {EMBEDDING: ROWS})
    return world.lora(
        "export", "--adapter", "saved", "--recipe", recipe, "--for", "vllm", "--to", "to"
    )


def _continued(ids: Any, tokens: list[Any], **rows: Tensor) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        _saved(world, ids, {name.replace("__", "."): tensor for name, tensor in rows.items()})
        adapter = {"from": "./saved", "train_tokens": tokens}
        return world.lora("validate", world.recipe("llama", adapter=adapter))

    return run


BOTH = {"model__embed_tokens": ROWS, "lm_head": ROWS}
for _name, _case in {
    "beside a bias": _with_bias,
    "to combine": _combine,
    "for vLLM": _export,
    "to be trained further with others": _continued([5, 9], [7], model__embed_tokens=ROWS),
    "that differ at both ends": _continued({"embed_tokens": [5, 9], "lm_head": [5, 6]}, [], **BOTH),
}.items():
    CASES.append(Case("Adapters", f"trained rows {_name}", _case))
