"""Tiny random models, tokenizers and recipes, made in code: no test needs a network.

In memory: `encoder`, `encoder_decoder`, `gpt2`, `llama`, `ConvNet`. As a local 'base model' folder
with configuration, safetensors weights and tokenizer: `save_encoder`, `save_encoder_decoder`,
`save_gpt2`, `save_llama`. And `recipe`, which writes a recipe file that trains such a folder on a
few rows.

    folder = tiny.save_encoder(tmp_path / "base")
    path = tiny.recipe(folder, tmp_path, adapter={"rank": 4}, train={"max_steps": 2})
    recipe = load_recipe(path)
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_cli.adapters.attach import lora_layers
from lora_cli.recipe import Recipe

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # with the ids of RoBERTa
BOS, PAD, EOS, UNK = range(4)
END_OF_TEXT = "<|endoftext|>"
POSITIONS = 128
CORPUS = [
    "a warm and funny film", "the plot is dull and slow", "what a great story",
    "the film is a bore", "great fun and a great cast", "slow , dull , and far too long",
    "the cast is warm and the story is funny", "a long and boring plot",
]  # fmt: skip

# ------------------------------------------------------------------------------------ tokenizers


@functools.cache
def _bpe(specials: tuple[str, ...]) -> str:
    """Return a byte-level BPE tokenizer as JSON: it reads and writes any text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(specials) + 256 + 60,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tokenizer(kind: str = "encoder") -> PreTrainedTokenizerFast:
    """Return a tokenizer.

    Args:
        kind: `encoder` (`<s> text </s>`, a pair `<s> one </s></s> two </s>`), `llama` (`<s> text`)
            or `gpt2` (nothing added; one special token that is bos, eos and unk, and no padding).
    """
    if kind == "gpt2":
        backend = Tokenizer.from_str(_bpe((END_OF_TEXT,)))
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    else:
        backend = Tokenizer.from_str(_bpe(tuple(SPECIAL)))
        keys = ("bos_token", "pad_token", "eos_token", "unk_token")
        names = dict(zip(keys, SPECIAL, strict=True))
        one, two = (
            ("<s> $A </s>", "<s> $A </s> </s> $B </s>")
            if kind == "encoder"
            else ("<s> $A", "<s> $A <s> $B")
        )
        ends = [("<s>", BOS), ("</s>", EOS)]
        backend.post_processor = processors.TemplateProcessing(one, two, ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def wordpiece() -> PreTrainedTokenizerFast:
    """Return a tokenizer as BERT's that knows the words of `CORPUS` and no other letter."""
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({w for t in CORPUS for w in t.split()})]
    vocabulary = {word: i for i, word in enumerate(known)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    both = "[CLS] $A [SEP] $B [SEP]"
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", both, ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=POSITIONS, pad_token="[PAD]",
        unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def vocabulary(kind: str = "encoder") -> int:
    """Return the size of the vocabulary of `tokenizer(kind)`."""
    return len(tokenizer(kind))


# ---------------------------------------------------------------------------------------- models


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw every parameter and running statistic, so that none is zero or one, nor alike.

    (Biases that start at zero and weights near it would hide a bias that is added twice, or a
    difference in a term that hardly contributes.)
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, mean: float, std: float) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            norm = "Norm" in type(module).__name__
            for name, parameter in module.named_parameters(recurse=False):
                width = parameter.shape[-1] if parameter.ndim > 1 else 25
                normal(parameter, float(norm and name == "weight"), width**-0.5)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                normal(module.running_mean, 0.0, 0.1)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def encoder(
    labels: int | Sequence[str] | None = 2, kind: str = "bert", seed: int = 0, layers: int = 2
) -> PreTrainedModel:
    """Return a small BERT or RoBERTa: a sequence classifier, or with `labels=None` no head.

    The RoBERTa without classifier is a masked language model, as its published checkpoints are.
    """
    config_class = {"bert": BertConfig, "roberta": RobertaConfig}[kind]
    config = config_class(
        vocab_size=vocabulary(), hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=POSITIONS + 2, type_vocab_size=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    if labels is None:
        model = {"bert": BertModel, "roberta": RobertaForMaskedLM}[kind](config)
    else:
        names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
        model = {
            "bert": BertForSequenceClassification, "roberta": RobertaForSequenceClassification,
        }[kind](config)  # fmt: skip
    return enliven(model, seed)


def gpt2(seed: int = 0, layers: int = 2) -> GPT2LMHeadModel:
    """Return a small GPT-2, whose linear layers are `Conv1D` and whose embedding is tied."""
    config = GPT2Config(
        vocab_size=vocabulary("gpt2"), n_embd=32, n_layer=layers, n_head=4, n_positions=POSITIONS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return enliven(GPT2LMHeadModel(config), seed)


def llama(tied: bool = True, seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """Return a small Llama with grouped-query attention, tied to its embedding or not."""
    config = LlamaConfig(
        vocab_size=vocabulary("llama"), hidden_size=32, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        max_position_embeddings=POSITIONS, tie_word_embeddings=tied,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    return enliven(LlamaForCausalLM(config), seed)


def encoder_decoder(kind: str = "bart", seed: int = 0) -> PreTrainedModel:
    """Return a BART or a T5 of one layer each way, as it is published: it writes texts."""
    ends = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    if kind == "bart":
        config = BartConfig(
            vocab_size=vocabulary(), d_model=32, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_position_embeddings=POSITIONS, dropout=0.0,
            decoder_start_token_id=EOS, **ends,
        )  # fmt: skip
        return enliven(BartForConditionalGeneration(config), seed)
    config = T5Config(
        vocab_size=vocabulary(), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=PAD, **ends,
    )  # fmt: skip
    return enliven(T5ForConditionalGeneration(config), seed)


class ConvNet(nn.Module):
    """Every kind of convolution that an adapter fits; images (B, 3, 12, 12) to logits (B, 2)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.line = nn.Conv1d(8, 8, 5, stride=2, padding=2)
        self.classifier = nn.Linear(8, 2)
        enliven(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.stem(x)))
        for layer in (self.point, self.grouped, self.dilated, self.reflect):
            x = torch.tanh(layer(x))
        return self.classifier(torch.tanh(self.line(x.flatten(2))).mean(-1))


# --------------------------------------------------------------------------- folders and recipes

_SAVED: dict[tuple[object, ...], Path] = {}


@functools.cache
def _templates() -> Path:
    folder = tempfile.mkdtemp(prefix="lora-tiny-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _save(folder: Path | str, key: tuple[object, ...], build: Callable[[], Any], kind: str) -> Path:
    """Save what `build` returns, with its tokenizer; what was saved once is copied from then on."""

    def save(place: Path) -> None:
        build().save_pretrained(place)
        tokenizer(kind).save_pretrained(place)

    return saved_once(folder, key, save)


def saved_once(folder: Path | str, key: tuple[object, ...], save: Callable[[Path], Any]) -> Path:
    """Write a folder, as of a model: the first of its kind with `save`, others as copies of that.

    Making and saving even a tiny model takes longer than many a test. The random numbers that it
    draws are not taken from the test's, so a test is the same whether it is the first or not.
    """
    if key not in _SAVED:
        template = _templates() / str(len(_SAVED))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save(template)
        _SAVED[key] = template
    # not `copy2`: each is a file of its own, with a time of its own
    shutil.copytree(_SAVED[key], folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    return Path(folder)


def save_encoder(
    folder: Path | str,
    labels: Sequence[str] | None = None,
    kind: str = "roberta",
    seed: int = 0,
    layers: int = 2,
) -> Path:
    """Save a base encoder, or with `labels` a classifier of them, and return its folder."""
    names = None if labels is None else tuple(labels)
    key = ("encoder", names, kind, seed, layers)
    return _save(folder, key, lambda: encoder(labels, kind, seed, layers), "encoder")


def save_encoder_decoder(folder: Path | str, kind: str = "bart", seed: int = 0) -> Path:
    """Save a BART or a T5, and return its folder."""
    return _save(folder, (kind, seed), lambda: encoder_decoder(kind, seed), "encoder")


def save_gpt2(folder: Path | str, seed: int = 0) -> Path:
    """Save a GPT-2 whose tokenizer has no padding token, and return its folder."""
    return _save(folder, ("gpt2", seed), lambda: gpt2(seed), "gpt2")


def save_llama(folder: Path | str, tied: bool = True, seed: int = 0) -> Path:
    """Save a Llama whose tokenizer has every special token, and return its folder."""
    return _save(folder, ("llama", tied, seed), lambda: llama(tied, seed), "llama")


def recipe_of(task: str = "sequence_classification", **adapter: Any) -> Recipe:
    """Return a recipe without a file that has this adapter section (alpha is 6 unless given)."""
    return Recipe.model_validate(
        {
            "model": {"name": "base"},
            "task": {"type": task},
            "data": {"path": "rows.csv"},
            "adapter": {"alpha": 6.0, **adapter},
        }
    )


def wake(model: nn.Module, std: float = 0.3) -> None:
    """Give every low-rank layer an A and a B that are both at work."""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for matrix in (layer.lora_A, layer.lora_B):
                matrix.normal_(std=std)


def recipe(folder: Path | str, tmp_path: Path, **sections: Any) -> Path:
    """Write a recipe for the model in `folder` as `tmp_path/recipe.yaml` and return its path.

    Args:
        folder: The base model; its configuration, if there is one, says which task it is for.
        tmp_path: Where the recipe goes, its data (`rows.jsonl`, unless `data` is given) and `out/`.
        sections: The recipe's sections, laid over defaults key by key; a section whose `type`
            is another replaces the default.
    """
    values: dict[str, Any] = {
        "model": {"name": str(folder)},
        "task": {"type": "sequence_classification", "labels": ["bad", "good"]},
        "adapter": {"rank": 4, "alpha": 8},
        "train": {"max_steps": 2, "micro_batch_size": 2},
        "output_dir": str(tmp_path / "out"),
    }
    if (Path(folder) / "config.json").is_file():
        kind = json.loads((Path(folder) / "config.json").read_text())["model_type"]
        if kind in ("gpt2", "llama"):
            values["task"] = {"type": "causal_lm", "text_column": "text", "max_length": 32}
            if kind == "gpt2":
                values["task"]["pad_token"] = END_OF_TEXT
            # of 128 tokens, those that a run writes as samples took most of its time
            values["evaluate"] = {"generation": {"max_new_tokens": 4}}
    if "data" not in sections:
        rows = [{"text": text, "label": i % 2} for i, text in enumerate(CORPUS)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
        values["data"] = {"path": "rows.jsonl"}
    for name, section in sections.items():
        default = values.get(name)
        if isinstance(section, dict) and isinstance(default, dict):
            same_type = section.get("type", default.get("type")) == default.get("type")
            section = {**default, **section} if same_type else section
        values[name] = section
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml_of(values), encoding="utf-8")
    return path


def write_recipe(folder: Path, values: dict[str, Any], sections: dict[str, Any]) -> Path:
    """Write `folder/recipe.yaml`, its sections laid over defaults key by key; return its path."""
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    path = folder / "recipe.yaml"
    path.write_text(yaml_of(values), encoding="utf-8")
    return path


def yaml_of(values: Any) -> str:
    """Return values as YAML, written by the C library where PyYAML has it: ten times as quick."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return str(yaml.dump(values, Dumper=dumper, sort_keys=False, allow_unicode=True))
