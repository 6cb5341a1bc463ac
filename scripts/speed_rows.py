"""The rows of the table of `speed.py`: the models, the data and the recipes that it trains."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SST2_LENGTHS = (1.6, 7.0)  # shape and scale of a gamma distribution like that of SST-2's phrases


@dataclass(frozen=True)
class Row:
    """A row of the table: a model, what a step of training sees, and how it is computed."""

    shape: str
    batch: int
    length: int = 0  # tokens of an example; 0: as long as the phrases of SST-2
    accumulate: int = 1
    precision: str = "bf16"
    quantization: str | None = None
    checkpointing: bool = False
    dropout: float = 0.0

    @property
    def is_llama(self) -> bool:
        """Whether this is a decoder."""
        return self.shape.startswith("llama")

    @property
    def sides(self) -> list[str]:
        """The sides that can train this."""
        able = ["ours"] + ["offload"] * self.checkpointing + ["auto"] * self.is_llama
        if self.quantization != "fp8":  # which no peer trains on
            able += ["peft", *(["liger", "unsloth"] if self.is_llama else [])]
        return able

    def __str__(self) -> str:
        batch = f"{self.accumulate} x " * (self.accumulate > 1) + str(self.batch)
        parts = [f"{batch} x {self.length} tokens" if self.is_llama else f"{batch} sentences"]
        parts += [f"base in {self.quantization}"] if self.quantization else []
        parts += [self.precision] if self.precision != "bf16" else []
        parts += ["gradient checkpointing"] if self.checkpointing else []
        parts += [f"dropout {self.dropout}"] if self.dropout and self.is_llama else []
        return ", ".join(parts)

    def tiny(self) -> Row:
        """Return the same work with a tiny model and short examples."""
        return replace(
            self,
            shape="llama-tiny" if self.is_llama else "roberta-tiny",
            batch=min(self.batch, 2),
            length=min(self.length, 32),
            precision="bf16" if self.precision == "fp16" else self.precision,  # for a CPU
        )


ROWS = {
    "roberta-large": Row("roberta-large", 32, dropout=0.1),
    "roberta-large-2x32-fp16": Row("roberta-large", 32, 0, 2, "fp16", dropout=0.1),
    "roberta-base": Row("roberta-base", 32, dropout=0.1),
    "llama-8b": Row("llama-8b", 2, 4096),
    "llama-8b-dropout": Row("llama-8b", 2, 4096, dropout=0.05),
    "llama-8b-checkpointing": Row("llama-8b", 2, 4096, checkpointing=True),
    "llama-8b-fp8": Row("llama-8b", 2, 4096, quantization="fp8"),
    "llama-8b-nf4": Row("llama-8b", 2, 4096, quantization="nf4", checkpointing=True),
    "llama-8b-nf4-1x4k": Row("llama-8b", 1, 4096, quantization="nf4", checkpointing=True),
    "llama-1b": Row("llama-1b", 4, 4096),
    # the same number of tokens in a step, in ever longer texts
    "llama-8b-32x1k": Row("llama-8b", 32, 1024, checkpointing=True),
    "llama-8b-16x2k": Row("llama-8b", 16, 2048, checkpointing=True),
    "llama-8b-8x4k": Row("llama-8b", 8, 4096, checkpointing=True),
    "llama-8b-4x8k": Row("llama-8b", 4, 8192, checkpointing=True),
    "llama-8b-2x16k": Row("llama-8b", 2, 16384, checkpointing=True),
    "llama-8b-1x32k": Row("llama-8b", 1, 32768, checkpointing=True),
    "llama-8b-1x16k": Row("llama-8b", 1, 16384, checkpointing=True),
}
LLAMA = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ROBERTA = {
    "vocab_size": 50265,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}
TINY = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
SHAPES: dict[str, dict[str, Any]] = {
    "roberta-base": ROBERTA,
    "roberta-large": ROBERTA
    | {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "roberta-tiny": ROBERTA | TINY,
    "llama-8b": LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
    "llama-1b": LLAMA
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "llama-tiny": LLAMA | TINY | {"num_key_value_heads": 2},
}


def has_gpu() -> bool:
    """Return whether torch has a GPU, without occupying its memory in this process."""
    import torch

    return torch.cuda.device_count() > 0


def make_model(shape: str, folder: Path) -> None:
    """Write a model with random weights and its tokenizer, with the words w4, w5 and so on."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        LlamaConfig,
        PreTrainedTokenizerFast,
        RobertaConfig,
    )

    config, is_llama = SHAPES[shape], shape.startswith("llama")
    torch.manual_seed(0)
    if is_llama:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            torch.set_default_dtype(torch.bfloat16)
            model = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    else:
        model = AutoModelForMaskedLM.from_config(RobertaConfig(**config))
    model.save_pretrained(folder)
    special = ["<s>", "</s>", "<pad>", "<unk>"] if is_llama else ["<s>", "<pad>", "</s>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), config["vocab_size"])]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if not is_llama:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=config["max_position_embeddings"] if is_llama else 512,
    ).save_pretrained(folder)


def make(row: Row, folder: Path, steps: int) -> None:
    """Write the model (if it is not there yet), the rows of data, their order, and the recipe."""
    import numpy as np

    from lora_cli.preprocessing.batch_plan import BatchPlan

    model = folder.parent / "models" / row.shape
    if not model.exists():
        unfinished = model.with_name(f"{row.shape}-unfinished")
        # in a process of its own, which gives the GPU's memory back
        unfinished.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, __file__, row.shape, str(unfinished)], check=True)
        unfinished.rename(model)
    folder.mkdir(parents=True, exist_ok=True)
    random, step_size = np.random.default_rng(0), row.batch * row.accumulate
    lengths = [row.length] * (steps * step_size)
    if not row.is_llama:
        drawn = random.gamma(*SST2_LENGTHS, len(lengths))
        lengths = [int(n) + 2 for n in np.clip(drawn + 1, 1, 64)]  # with <s> and </s>
    with (folder / "rows.jsonl").open("w") as file:
        for length in lengths:
            n_words = length - (1 if row.is_llama else 2)
            words = random.integers(4, SHAPES[row.shape]["vocab_size"], n_words)
            text, label = " ".join(f"w{i}" for i in words), int(random.integers(0, 2))
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    plan = BatchPlan(len(lengths), step_size, seed=0)  # seed 0: the default of `train.seed`
    order = [examples.tolist() for _, examples in plan.steps(0, steps)]
    tokens = [sum(lengths[i] for i in examples) for examples in order]
    (folder / "order.json").write_text(json.dumps({"examples": order, "tokens": tokens}))
    (folder / "recipe.json").write_text(json.dumps(recipe_of(row, folder, model, steps), indent=2))


def recipe_of(row: Row, folder: Path, model: Path, steps: int) -> dict[str, Any]:
    """Return the recipe, which the peers read too."""
    task: dict[str, Any] = {"type": "sequence_classification"}
    if row.is_llama:
        task = {"type": "causal_lm", "text_column": "text", "max_length": row.length}
    return {
        "model": {"name": str(model), "quantization": row.quantization},
        "task": task,
        "data": {"train": str(folder / "rows.jsonl")},
        "adapter": {
            "rank": 16,
            "alpha": 32,
            "dropout": row.dropout,
            "target_modules": "all-linear" if row.is_llama else ["query", "value"],
        },
        "train": {
            "max_steps": steps,
            "micro_batch_size": row.batch,
            "gradient_accumulation_steps": row.accumulate,
            "kernels": "fused" if has_gpu() else "auto",
            "precision": row.precision,
            "optimizer": {"learning_rate": 2e-4},
            "scheduler": {"type": "constant"},
            "log_every_steps": 2 if row.is_llama else 10,
            "gradient_checkpointing": row.checkpointing,
        },
    }


if __name__ == "__main__":
    make_model(sys.argv[1], Path(sys.argv[2]))
