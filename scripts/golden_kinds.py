"""The recipes, tiny models and rows that `scripts/golden` trains, for each kind of run."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

Json = dict[str, Any]
STEPS = 6

# --------------------------------------------------------------------------------------- kinds

PAIRS = {"type": "causal_lm", "prompt_column": "prompt", "completion_column": "completion"}
CHAT = {"type": "causal_lm", "messages_column": "messages"}
TEXT = {"type": "causal_lm", "text_column": "text", "max_length": 24}
LABELS = {"type": "sequence_classification", "labels": ["bad", "good"]}
GPT2 = {"pad_token": "<pad>"}
RESUME_AT = STEPS // 2

# Recipes, merged into the defaults in `recipe_of`. Further keys are `processes`, `resume` (continue
# from a checkpoint in the middle), and `then`: commands that use the adapter afterwards.
KINDS: dict[str, Json] = {
    "classification, single label": {
        "task": LABELS,
        "evaluate": {"baselines": ["majority"]},
        "then": ["predict", "eval", "merge"],
    },
    "classification, multi-label": {
        "task": {**LABELS, "problem": "multi_label", "label_column": "several",
                 "labels": ["long", "dull", "warm"]},
        "adapter": {"bias": "lora_only"},
        "then": ["predict"],
    },
    "classification, regression": {
        "task": {"type": "sequence_classification", "problem": "regression",
                 "label_column": "number"},
        "adapter": {"use_rslora": True},
        "then": ["predict"],
    },
    "classification, pairs": {
        "task": {**LABELS, "text_column": "prompt", "text_pair_column": "completion",
                 "class_weights": "balanced", "label_smoothing": 0.1},
        "train": {"group_by_length": True, "workers": 1},
    },
    "language model, text": {
        "model": "gpt2", "task": {**TEXT, **GPT2}, "then": ["merge"],
    },
    "language model, pairs": {
        "model": "llama", "task": PAIRS,
        "evaluate": {"metrics": ["perplexity", "exact_match"]},
        "then": ["predict", "merge"],
    },
    "language model, chat": {"model": "llama", "task": CHAT, "train": {"workers": 1}},
    "language model, packed": {
        "model": "llama", "task": {**PAIRS, "max_length": 64}, "train": {"packing": True},
    },
    "streaming": {
        "model": "llama", "task": TEXT, "data": {"streaming": True},
    },
    "gradient accumulation": {
        "model": "llama", "task": PAIRS,
        "train": {"micro_batch_size": 2, "gradient_accumulation_steps": 3},
    },
    "gradient checkpointing": {
        "model": "llama", "task": CHAT, "train": {"gradient_checkpointing": True},
    },
    "two processes, classification": {
        "task": LABELS, "processes": 2,
        "train": {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
    },
    "two processes, language model": {
        "model": "llama", "task": PAIRS, "processes": 2,
        "train": {"micro_batch_size": 1, "gradient_accumulation_steps": 3},
    },
    "full": {"task": LABELS, "adapter": {"type": "full"}},
    "full, language model": {
        "model": "gpt2", "task": {**TEXT, **GPT2}, "adapter": {"type": "full"},
    },
    "bitfit": {"task": LABELS, "adapter": {"type": "bitfit"}},
    "head alone": {"task": LABELS, "adapter": {"type": "none"}},
    "resumed, classification": {"task": LABELS, "resume": True},
    "resumed, language model packed": {
        "model": "llama", "task": {**TEXT, "max_length": 48}, "train": {"packing": True},
        "resume": True,
    },
}  # fmt: skip


def recipe_of(kind: Json, shared: Path) -> Json:
    """Return the recipe of a kind."""
    kind = copy.deepcopy(kind)
    full = kind.get("adapter", {}).get("type") == "full"
    return {
        "model": {"name": str(shared / kind.get("model", "encoder"))},
        "task": {"max_length": 48, **kind["task"]},
        "data": {
            "train": str(shared / "train.jsonl"),
            "validation": str(shared / "validation.jsonl"),
            "test": str(shared / "test.jsonl"),
            "check": {"max_overlap": 1.0},
            **kind.get("data", {}),
        },
        "adapter": {"rank": 4, "alpha": 6, "dropout": 0.1, **kind.get("adapter", {})},
        "train": {
            "max_steps": STEPS,
            "micro_batch_size": 4,
            "log_every_steps": 1,
            "optimizer": {"learning_rate": 0.001 if full else 0.02, "weight_decay": 0.1},
            "scheduler": {"type": "cosine", "warmup_steps": 2},
            "seed": 7,
            **kind.get("train", {}),
        },
        "evaluate": {
            "every_steps": 3,
            "generation": {"max_new_tokens": 4},
            **kind.get("evaluate", {}),
        },
        "checkpoint": {"every_steps": RESUME_AT, "keep": STEPS},
        "output_dir": "out",
    }


# -------------------------------------------------------------------------- models and rows

WORDS = [
    "a", "the", "film", "plot", "cast", "story", "is", "was", "warm", "funny", "dull", "slow",
    "great", "long", "boring", "and", "far", "too",
]  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_rows(shared: Path) -> None:
    """Write rows with a column for every kind, of many lengths, no two alike."""
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    for split, count in (("train", 23), ("validation", 7), ("test", 5)):
        rows = []
        for i in range(count):
            turns = [words(2, 7) for _ in range(2 * draw.randint(1, 2))]
            rows.append(
                {
                    "text": f"{split} {i} {words(2, 30)}",
                    "label": ("bad", "good")[i % 2],
                    "several": [name for name in ("long", "dull", "warm") if draw.random() < 0.5],
                    "number": round(draw.uniform(-2, 2), 2),
                    "prompt": f"{split} {i} {words(2, 12)}",
                    "completion": f" {words(1, 8)}",
                    "messages": [
                        {"role": ("user", "assistant")[n % 2], "content": f"{split} {i} {turn}"}
                        for n, turn in enumerate(turns)
                    ],
                }
            )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (shared / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def write_models(shared: Path) -> None:
    """Write a tiny RoBERTa, Llama and GPT-2 with random weights, and their tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        RobertaConfig,
        RobertaForMaskedLM,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(specials + letters)}
    merges = []
    for word in WORDS:  # each word, and none of its parts beyond what is needed, is a token
        whole = "Ġ"
        for letter in word:
            if whole + letter not in vocabulary:
                vocabulary[whole + letter] = len(vocabulary)
                merges.append((whole, letter))
            whole += letter
    ids: Json = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    size = {"vocab_size": len(vocabulary)}
    heads = {"num_attention_heads": 4, "intermediate_size": 48, "hidden_size": 32}
    bases = {
        "encoder": RobertaForMaskedLM(RobertaConfig(
            **size, **ids, **heads, num_hidden_layers=2, max_position_embeddings=130,
            initializer_range=0.2,
        )),
        "llama": LlamaForCausalLM(LlamaConfig(
            **size, **ids, **heads, num_hidden_layers=2, num_key_value_heads=2,
            max_position_embeddings=128, attention_dropout=0.1, initializer_range=0.2,
        )),
        "gpt2": GPT2LMHeadModel(GPT2Config(
            **size, **ids, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2,
        )),
    }  # fmt: skip
    for name, model in bases.items():
        backend = Tokenizer(models.BPE(vocabulary, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        one, two = "<s> $A </s>", "<s> $A </s> </s> $B </s>"
        if name != "encoder":
            one, two = "<s> $A", "<s> $A <s> $B"
        backend.post_processor = processors.TemplateProcessing(one, two, [("<s>", 0), ("</s>", 2)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, model_max_length=128, bos_token="<s>", pad_token="<pad>",
            eos_token="</s>", unk_token="<unk>", model_input_names=["input_ids", "attention_mask"],
        )  # fmt: skip
        if name == "llama":
            tokenizer.chat_template = TEMPLATE
        model.save_pretrained(shared / name)
        tokenizer.save_pretrained(shared / name)
