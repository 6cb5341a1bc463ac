"""A row means the same alone, next to others and in a pack, whatever the architecture."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    ConvBertConfig,
    DistilBertConfig,
    FNetConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    ReformerConfig,
    RwkvConfig,
    T5Config,
    XLNetConfig,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_cli.errors import LoraError
from lora_cli.models import full_precision as full_precision_module
from lora_cli.models.full_precision import full_precision
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task
from lora_cli.tasks.generation import text_generation
from lora_cli.tasks.generation.packing import check_packing
from lora_cli.tasks.generation.text_generation import REPLACEMENT
from lora_cli.tasks.texts import padding_check
from lora_cli.tasks.texts.padding import NONE, WITHOUT_MASK, Padding
from lora_cli.tasks.texts.padding_check import check_training, choose_padding

LANGUAGE = {"type": "causal_lm", "pad_token": "<pad>"}
LEFT, RIGHT = Padding("left"), Padding("right")
ENDS = {"pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS}
COMMON: dict[str, Any] = {
    "vocab_size": tiny.vocabulary(), "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 130,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **ENDS,
}  # fmt: skip


def config(kind: str) -> PretrainedConfig:
    """Return the configuration of a tiny model of an architecture."""
    match kind:
        case "bert":
            return BertConfig(**COMMON)
        case "albert":
            return AlbertConfig(**COMMON, embedding_size=16)
        case "convbert":
            return ConvBertConfig(**COMMON, embedding_size=16, conv_kernel_size=3)
        case "fnet":
            return FNetConfig(**COMMON)
        case "distilbert":
            return DistilBertConfig(
                vocab_size=tiny.vocabulary(), dim=32, n_layers=2, n_heads=4, hidden_dim=48,
                max_position_embeddings=130, dropout=0.0, attention_dropout=0.0,
                seq_classif_dropout=0.0, **ENDS,
            )  # fmt: skip
        case "xlnet":
            return XLNetConfig(
                vocab_size=tiny.vocabulary(), d_model=32, n_layer=2, n_head=4, d_inner=48,
                dropout=0.0, summary_last_dropout=0.0, **ENDS,
            )  # fmt: skip
        case "gpt2":
            return GPT2Config(
                vocab_size=tiny.vocabulary(), n_embd=32, n_layer=2, n_head=4, n_positions=130,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ENDS,
            )  # fmt: skip
        case "llama":
            return LlamaConfig(
                vocab_size=tiny.vocabulary(), hidden_size=32, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                max_position_embeddings=130, **ENDS,
            )  # fmt: skip
        case "bart":
            return BartConfig(
                vocab_size=tiny.vocabulary(), d_model=32, encoder_layers=2, decoder_layers=2,
                encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
                decoder_ffn_dim=48, max_position_embeddings=128, dropout=0.0, is_decoder=True,
                is_encoder_decoder=False, **ENDS,
            )  # fmt: skip
        case "rwkv":
            return RwkvConfig(
                vocab_size=tiny.vocabulary(), hidden_size=32, num_hidden_layers=2,
                attention_hidden_size=32, intermediate_size=48, context_length=128, **ENDS,
            )  # fmt: skip
        case "longrope":  # its positions are scaled by the longest row of a batch
            scaling = {
                "rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 8.0,
                "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 10000.0,
            }  # fmt: skip
            return LlamaConfig(**config("llama").to_dict() | {"rope_parameters": scaling})
        case "t5":
            return T5Config(
                vocab_size=tiny.vocabulary(), d_model=32, d_kv=8, d_ff=48, num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0, **ENDS,
            )  # fmt: skip
        case "reformer":
            return ReformerConfig(
                vocab_size=tiny.vocabulary(), hidden_size=32, num_attention_heads=2,
                attention_head_size=16, attn_layers=["local", "local"], feed_forward_size=48,
                axial_pos_shape=[8, 16], axial_pos_embds_dim=[16, 16], is_decoder=False,
                local_attn_chunk_length=8, max_position_embeddings=128, hidden_dropout_prob=0.0,
                local_attention_probs_dropout_prob=0.0, **ENDS,
            )  # fmt: skip
    raise ValueError(kind)


def base(folder: Path, kind: str, auto: Any, side: str = "right") -> Path:
    """Save a tiny model of an architecture, with a tokenizer that fills rows on a side."""
    torch.manual_seed(0)
    model = tiny.enliven(auto.from_config(config(kind)))
    model.save_pretrained(folder)
    tiny.tokenizer("encoder").save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": side}))
    return folder


def opened(folder: Path, tmp_path: Path, **sections: Any) -> tuple[Task, Any]:
    """Return the task of a recipe on a base, and its model."""
    kind = {"type": "sequence_classification", "labels": ["bad", "good"], "pad_token": "<pad>"}
    sections = {"task": kind, **sections}
    task = build_task(load_recipe(tiny.recipe(folder, tmp_path, **sections)))
    task.load_processor()
    task.learn_from({})
    return task, task.load_model(torch.device("cpu"))[0].eval()


def largest_difference(task: Task, model: Any, folder: Path) -> float:
    """Compare the probabilities of texts in one batch with those of transformers, one by one."""
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    plain.config.pad_token_id = tiny.PAD
    tokenizer = task.tokenizer
    difference = 0.0
    with torch.no_grad():
        answers = task.answer(model, [{"text": text} for text in tiny.CORPUS])
        for text, (_, *probabilities) in zip(tiny.CORPUS, answers, strict=True):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            alone = torch.softmax(plain(input_ids=ids).logits[0], -1).tolist()
            pairs = zip(alone, probabilities, strict=True)
            difference = max(difference, *(abs(a - b) for a, b in pairs))
    return difference


@pytest.mark.proves(
    "alone",
    "predict",
    task="sequence_classification",
    rows="classification",
    model="{kind}",
    against="transformers",
)
@pytest.mark.parametrize(
    ("kind", "side", "wanted"),
    [
        ("bert", "right", RIGHT),
        ("bert", "left", RIGHT),  # its positions would shift, and it reads the first
        ("albert", "right", RIGHT),
        ("distilbert", "right", RIGHT),
        ("xlnet", "left", LEFT),
        ("xlnet", "right", LEFT),  # it reads the last position
        ("gpt2", "right", RIGHT),
        ("gpt2", "left", Padding("left", positions=True)),
        ("llama", "left", LEFT),
        ("fnet", "right", NONE),  # it knows no mask
        ("convbert", "right", NONE),  # its convolutions see what fills a row
    ],
)
@pytest.mark.slow_after(3)
def test_a_text_is_answered_alone_as_among_others(
    kind: str, side: str, wanted: Padding, tmp_path: Path
) -> None:
    folder = base(tmp_path / "base", kind, AutoModelForSequenceClassification, side)
    task, model = opened(folder, tmp_path)
    choose_padding(task, model)
    assert task.padding == wanted
    assert largest_difference(task, model, folder) <= 2e-6  # rounded to six digits


def test_what_was_taken_before_would_not_do(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", "xlnet", AutoModelForSequenceClassification)
    task, model = opened(folder, tmp_path)
    assert largest_difference(task, model, folder) > 1e-2


@pytest.mark.parametrize("kind", ["fnet", "convbert"])
def test_loss_and_gradients_of_rows_that_cannot_be_padded_are_those_of_each_alone(
    kind: str, tmp_path: Path
) -> None:
    folder = base(tmp_path / "base", kind, AutoModelForSequenceClassification)
    task, model = opened(folder, tmp_path)
    choose_padding(task, model)
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(tiny.CORPUS)]
    examples = [{**made[0], "row": i} for i, made in enumerate(task.encode(rows))]
    model = model.double()

    def gradients(batches: list[list[Any]]) -> list[torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            task.loss(model, task.collate(batch)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together, apart = gradients([examples]), gradients([[example] for example in examples])
    for a, b in zip(together, apart, strict=True):
        # the loss itself is taken in float32
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max() + 1e-3))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_language_model_sees_no_padding(kind: str, tmp_path: Path) -> None:
    folder = base(tmp_path / "base", kind, AutoModelForCausalLM)
    task, model = opened(folder, tmp_path, task=LANGUAGE)
    choose_padding(task, model)
    assert task.padding == WITHOUT_MASK
    examples = [{**m[0], "row": 0} for m in task.encode([{"text": t} for t in tiny.CORPUS])]
    with torch.no_grad():
        together = task.predict(model, task.collate(examples))
        for example, found in zip(examples, together, strict=True):
            ids = torch.tensor([example["input_ids"]])
            loss = model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
            assert found.losses["loss"][0] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("longest", [100, 110])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_no_long_text_changes_the_loss_of_a_short_one(
    longest: int, kernels: str, tmp_path: Path
) -> None:
    changed = config("longrope")
    changed.rope_parameters |= {"original_max_position_embeddings": 100}  # the trial has 64
    folder = base(tmp_path / "base", "llama", AutoModelForCausalLM)
    changed.save_pretrained(folder)
    language = {**LANGUAGE, "max_length": 128}
    task, model = opened(folder, tmp_path, task=language, train={"kernels": kernels})
    choose_padding(task, model, longest)
    assert (task.padding == NONE) is (longest > 100)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 200, (n,), generator=generator).tolist() for n in (20, longest, 90)]
    examples = [{"input_ids": row, "labels": row, "row": 0} for row in rows]
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        together = task.predict(model, task.collate(examples))
        for row, found in zip(rows, together, strict=True):
            ids = torch.tensor([row])
            loss = plain(input_ids=ids, labels=ids).loss * (len(row) - 1)
            assert found.losses["loss"][0] == pytest.approx(loss.item(), rel=1e-5)


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", "bert", AutoModelForCausalLM)
    task, model = opened(folder, tmp_path, task=LANGUAGE)
    with pytest.raises(LoraError, match="sees the tokens that it has to predict"):
        choose_padding(task, model)


@pytest.mark.proves(
    "predict", task="causal_lm", rows="prompts", model="{kind}", against="transformers"
)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart", "rwkv", "longrope"])
@pytest.mark.slow_after(1)
def test_a_prompt_is_answered_among_others_as_transformers_answers_it_alone(
    kind: str, tmp_path: Path
) -> None:
    folder = base(tmp_path / "base", kind, AutoModelForCausalLM)
    short = {"generation": {"max_new_tokens": 6}}
    task, model = opened(folder, tmp_path, task=LANGUAGE, evaluate=short)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain.generation_config = GenerationConfig(pad_token_id=tiny.PAD, eos_token_id=tiny.EOS)
    texts = ["a great plot", *tiny.CORPUS, "fun", "fun " * 30]
    wanted = []
    for text in texts:
        ids = torch.tensor([task.prompt({"text": text})])
        with torch.no_grad():
            said = plain.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        # the last token may be a part of a character
        wanted.append(task.tokenizer.decode(said, skip_special_tokens=True).rstrip(REPLACEMENT))
    batches = texts[:3], texts[3:-1], texts[-4:]  # each has a longer or a shorter one than before
    for batch in batches:
        found = task.answer(model, [{"text": text} for text in batch])
        answers = [str(answer).rstrip(REPLACEMENT) for (answer,) in found]
        assert answers == [wanted[texts.index(text)] for text in batch]
    assert len(set(wanted)) > 3


@pytest.mark.parametrize(("kind", "n_calls"), [("llama", 1), ("bart", 3)])
def test_prompts_are_answered_together_where_padding_changes_nothing(
    kind: str, n_calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = base(tmp_path / "base", kind, AutoModelForCausalLM)
    short = {"generation": {"max_new_tokens": 2}}
    task, model = opened(folder, tmp_path, task=LANGUAGE, evaluate=short)
    prompts = [[5] * 4, [6] * 9, [7] * 20]
    task.generate(model, prompts)  # the trial
    own, sizes = model.generate, []

    def counted(*args: Any, **options: Any) -> Any:
        sizes.append(len(options["input_ids"]))
        return own(*args, **options)

    monkeypatch.setattr(model, "generate", counted)
    task.generate(model, prompts)
    assert sizes == [len(prompts) // n_calls] * n_calls


def test_prompts_are_tried_together_again_where_lengths_differ_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = base(tmp_path / "base", "llama", AutoModelForCausalLM)
    task, model = opened(folder, tmp_path, task=LANGUAGE)
    tried: list[list[int]] = []
    trial = text_generation._is_unaffected_by

    def counted(model: Any, short: Any, other: Any, *rest: Any) -> bool:
        tried.append([len(short), len(other)])
        return trial(model, short, other, *rest)

    monkeypatch.setattr(text_generation, "_is_unaffected_by", counted)
    at = task.pad
    for lengths in ([40, 48], [33, 40], [20, 32], [17, 19], [10, 12], [9, 9], [10, 50], [9, 50]):
        prompts = [[5 + i] * n for i, n in enumerate(lengths)]
        tried.append(lengths)
        assert text_generation._find_batching(model, prompts, at, 64) == "any"
    assert tried == [
        [40, 48], [40, 40], [40, 48],  # rows of one length first, then of two
        [33, 40],
        [20, 32],
        [17, 19], [17, 19],  # less than half of 40
        [10, 12], [10, 12],  # less than a convolution may read
        [9, 9], [9, 9],
        [10, 50], [10, 50],  # longer than any before
        [9, 50],
    ]  # fmt: skip


class Leaky(torch.nn.Module):
    """A language model that adds a little of what stands at the start of its row."""

    def __init__(self, model: Any, share: float) -> None:
        super().__init__()
        self.model, self.share = model, share

    def forward(
        self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **options: Any
    ) -> Any:
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **options
        )
        out.logits = out.logits + self.share * out.logits[:, :1]
        return out


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.05])
def test_any_leak_between_packed_texts_is_found(share: float, tmp_path: Path) -> None:
    """The first logits of a pack are those of another text: as the state of a Mamba layer."""
    folder = base(tmp_path / "base", "llama", AutoModelForCausalLM)
    sections = {"task": LANGUAGE, "train": {"packing": True}}
    task, model = opened(folder, tmp_path, **sections)
    split = load_data(task)["train"]
    if not share:
        check_packing(task, model, split)
        return
    with pytest.raises(LoraError, match="packed texts see each other"):
        check_packing(task, Leaky(model, share), split)


def test_lengths_that_a_model_cannot_be_trained_on_are_found_before_training(
    tmp_path: Path,
) -> None:
    folder = base(tmp_path / "base", "reformer", AutoModelForSequenceClassification)
    task, model = opened(folder, tmp_path)
    with pytest.raises(LoraError, match="multiple of least common multiple chunk_length") as found:
        check_training(task, model, 11)
    assert found.value.problems[0].at.startswith("task.max_length")


class Random(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask)
        out.logits = out.logits + torch.rand_like(out.logits)
        return out


class Mixing(Random):
    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask)
        out.logits = out.logits * len(input_ids)
        return out


def test_answers_that_are_drawn_or_depend_on_other_rows_are_rejected(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", "bert", AutoModelForSequenceClassification)
    task, model = opened(folder, tmp_path)
    with pytest.raises(LoraError, match="differently each time"):
        choose_padding(task, Random(model))
    with pytest.raises(LoraError, match="depends on the texts next to it"):
        choose_padding(task, Mixing(model))
    sizes = {"train.micro_batch_size": 1, "evaluate.micro_batch_size": 1}
    task.recipe = task.recipe.with_values(sizes)
    choose_padding(task, Mixing(model))


def test_more_tokens_than_the_model_can_take_are_found_with_the_key(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", "bert", AutoModelForSequenceClassification)
    task, model = opened(folder, tmp_path, task={"max_length": 100})
    model.bert.embeddings.position_embeddings = torch.nn.Embedding(20, 32)
    with pytest.raises(LoraError, match="cannot compute 100 tokens") as found:
        choose_padding(task, model)
    assert found.value.problems[0].at.startswith("task.max_length")


@pytest.mark.parametrize(
    "kind", ["bert", "distilbert", "gpt2", "llama", "xlnet", "fnet", "convbert"]
)
def test_rounding_to_16_bits_is_not_taken_for_padding_that_is_seen(
    kind: str, tmp_path: Path
) -> None:
    """A deep model in bfloat16 differs by more than a small head's outputs may."""
    wanted = {"xlnet": LEFT, "fnet": NONE, "convbert": NONE}
    folder = base(tmp_path / "base", kind, AutoModelForSequenceClassification)
    task, model = opened(folder, tmp_path, train={"precision": "bf16"})
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        for parameter in model.parameters():
            if parameter.shape[0] == 2:  # the head: outputs are small, and rounding is not
                parameter.mul_(1e-3)
        choose_padding(task, model)
    assert {p.dtype for p in model.parameters()} <= {torch.bfloat16, torch.float32}
    assert task.padding == wanted.get(kind, RIGHT)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "bart", "rwkv"])
@torch.no_grad()
def test_full_precision_is_what_a_float32_copy_computes(kind: str, tmp_path: Path) -> None:
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    if kind == "t5":
        auto = AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    model = tiny.enliven(auto.from_config(config(kind))).eval().to(torch.bfloat16)
    wide = copy.deepcopy(model).float()
    inputs = {"input_ids": torch.randint(5, 20, (2, 12))}
    if kind == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    wanted = wide(**inputs).logits
    assert (model(**inputs).logits.float() - wanted).abs().max() > 1e-3
    with full_precision(model) as dtype:
        found = model(**inputs).logits
    assert dtype == found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_full_precision_writes_into_tensors_of_16_bits_and_reads_few_rows_of_a_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = torch.nn.Embedding(100, 4, dtype=torch.bfloat16)
    sizes: list[int] = []
    own = full_precision_module._widened

    def noted(value: Any) -> Any:
        sizes.append(value.numel() if isinstance(value, torch.Tensor) else 0)
        return own(value)

    monkeypatch.setattr(full_precision_module, "_widened", noted)
    written = torch.zeros(3, dtype=torch.bfloat16)
    with torch.no_grad(), full_precision(model):
        found = model(torch.tensor([3, 5]))
        written.add_(2.0)
        written[1] = 7.0
    assert found.dtype == torch.float32
    assert torch.equal(found, model.weight[[3, 5]].float())
    assert max(sizes) == 8  # two rows of four
    assert written.dtype == torch.bfloat16
    assert written.tolist() == [2.0, 7.0, 2.0]


class SeesLength(Random):
    """Its answers move with the length of the row by less than bfloat16 shows."""

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask)
        out.logits = out.logits * (1 + 1e-3 * input_ids.shape[1] / 64)
        return out


@pytest.mark.parametrize("fault", ["none", "in the model", "in the kernel"])
def test_padding_is_compared_in_float32_where_flash_attention_computes_in_16_bits(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel stands in for flash attention: it computes numbers of 16 bits only."""
    asked = []

    def kernel(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        assert query.dtype == torch.bfloat16
        asked.append(mask)
        if fault == "in the kernel" and len(query) > 1:
            value = 1000 * value  # more than rounding, in this tiny model too
        with sdpa_kernel(SDPBackend.MATH):  # torch's own for 16 bits does not run on every CPU
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **more)

    flash = "flash_attention_2"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, flash, kernel)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, flash, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    folder = base(tmp_path / "base", "bert", AutoModelForSequenceClassification)
    task, model = opened(folder, tmp_path, train={"precision": "bf16"})
    assert {p.dtype for p in model.parameters()} >= {torch.bfloat16}
    model.to(torch.bfloat16).config._attn_implementation = flash
    choose_padding(task, SeesLength(model) if fault == "in the model" else model)
    assert task.padding == (RIGHT if fault == "none" else NONE)
    assert bool(asked) == (fault != "in the model")
    assert model.config._attn_implementation == flash


# ------------------------------------------------------------------------ one value at a time


class Stub:
    """A task of whose model each token's output is what a test says."""

    padding, length_key, input_name = RIGHT, "task.max_length", "text"
    max_length = 100

    def __init__(self, outputs: Callable[[list[int]], Tensor]) -> None:
        self.outputs = outputs
        self.positions: int | None = None
        self.first_position: int | None = None
        self.tried: list[int] = []
        self.config: Any = SimpleNamespace(is_encoder_decoder=False, pad_token_id=1)
        self.recipe: Any = SimpleNamespace(at=lambda key: f"at {key}")

    def collate(self, examples: Any) -> Any:
        batch = SimpleNamespace(inputs={"ids": [example["input_ids"] for example in examples]})
        return SimpleNamespace(to=lambda device: batch)

    def logits(self, model: nn.Module, inputs: Any) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [self.outputs(ids) for ids in inputs["ids"]], batch_first=True
        )

    def output_length(self, example: Any) -> int:
        return len(example["input_ids"])

    def trial_examples(self, length: int) -> Any:
        self.tried.append(length)
        return {"input_ids": [3] * 5}, {"input_ids": [3] * length}


def test_outputs_of_the_first_row_without_its_padding() -> None:
    task: Any = Stub(lambda ids: torch.tensor([[float(i)] for i in ids]))
    model = nn.Linear(1, 1)
    examples = [{"input_ids": [7, 8]}, {"input_ids": [1, 2, 3, 4]}]
    assert padding_check._of_first(task, model, examples, "k").flatten().tolist() == [7, 8]
    task.padding = LEFT
    found = padding_check._of_first(task, model, examples, "k").flatten().tolist()
    assert found == [0, 0]  # the last two, where a row is filled on the left
    task.outputs = lambda ids: torch.tensor([float(len(ids))])[0:1]
    task.logits = lambda model, inputs: torch.tensor([[5.0, 6.0, 7.0], [1.0, 2.0, 3.0]])
    assert padding_check._of_first(task, model, examples, "k").tolist() == [5, 6, 7]

    def fails(*_: Any) -> Any:
        raise RuntimeError("no")

    task.logits = fails
    for key, hint in (("model.name", "is its config.json right"), ("task.max_length", "=2` cuts")):
        with pytest.raises(LoraError, match="the model cannot compute 4 tokens") as caught:
            padding_check._of_first(task, model, examples, key)
        (problem,) = caught.value.problems
        assert problem.at == f"at {key}"
        assert hint in str(problem.hint)


@pytest.mark.parametrize(
    ("change", "found", "why"),
    [
        ({}, 0, ""),
        ({"worse_at": "all", "allowed": 1.0}, 0, ""),  # by as much as rounding may do
        ({"worse_at": 0}, 2, ""),  # positions after that of the padding, as RoBERTa has them
        ({"worse_at": "all"}, None, "answer to a text changes by 1.0e+00 when others share"),
        ({"longest": 1024}, 0, ""),
        ({"longest": 1025}, None, "texts of more than 1,024 tokens"),
        ({"positions": 15}, 0, ""),
        ({"positions": 14}, None, "the model has positions for a single text alone"),
        ({"is_encoder_decoder": True}, None, "in an encoder-decoder"),
    ],
)
def test_where_positions_start_if_texts_share_rows(
    change: dict[str, Any], found: int | None, why: str
) -> None:
    task: Any = Stub(lambda ids: torch.ones(len(ids), 1))
    task.positions = change.get("positions")
    task.config.is_encoder_decoder = change.get("is_encoder_decoder", False)
    plain = task.logits

    def logits(model: nn.Module, inputs: Any) -> Tensor:
        bad = change.get("worse_at")
        wrong = task.first_position is not None and bad in (task.first_position, "all")
        return plain(model, inputs) + (bad is not None and wrong)

    task.logits = logits
    longest = change.get("longest", 40)
    short = {"input_ids": [3] * 5}
    args = (task, nn.Linear(1, 1), short, longest, change.get("allowed", 0.5))
    first, said = padding_check._first_position(*args)
    assert first == found
    assert why in said
    assert bool(said) == bool(why)
    assert task.first_position is None
    if found is not None:  # as long as fits between two short ones
        room = (task.positions or 1024) - 10
        assert task.tried == [min(longest, room)]


@pytest.mark.parametrize(("asked", "length"), [(None, 100), (30, 30), (300, 100)])
def test_the_long_row_of_training_is_as_long_as_the_longest(asked: int | None, length: int) -> None:
    task: Any = Stub(lambda ids: torch.ones(len(ids), 1))
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()).eval()
    padding_check.check_training(task, model, asked)
    assert task.tried == [length]
    assert not model.training
    task.max_length = 5000
    padding_check.check_training(task, model, None)
    assert task.tried[-1] == 1024


class Chooser(Stub):
    """A task of whose model each row's output is what a test says of it and of its batch."""

    def __init__(self, score: Callable[[list[int], int, int], float]) -> None:
        """Take the score of a row, given its tokens, the width and the number of rows."""
        super().__init__(lambda ids: torch.zeros(len(ids), 1))
        self.score, self.calls = score, 0
        self.notes: list[str] = []
        self.pad_multiple, self.micro_batch = 8, 4
        self.can_share_rows = self.looks_back_only = self.can_fill_left = False
        self.tokenizer = SimpleNamespace(padding_side="right")
        self.checked: list[Any] = []
        self.multiples: set[int] = set()
        self.longest = 12
        train = SimpleNamespace(kernels="auto", precision="fp32")
        evaluate = SimpleNamespace(micro_batch_size=None)
        self.recipe = SimpleNamespace(at=lambda key: f"at {key}", train=train, evaluate=evaluate)

    def trial_examples(self, length: int) -> Any:
        self.tried.append(length)
        return {"input_ids": [3] * 5}, {"input_ids": [4] * self.longest}

    def check_trial(self, model: Any, example: Any, logits: Tensor) -> None:
        self.checked.append((model, example))

    def collate(self, examples: Any) -> Any:
        self.multiples.add(self.pad_multiple)
        return super().collate(examples)

    def logits(self, model: nn.Module, inputs: Any) -> Tensor:
        rows, self.calls = inputs["ids"], self.calls + 1
        width = max(map(len, rows))
        return torch.tensor([[self.score(ids, width, len(rows)), 1.0] for ids in rows])


def chosen(task: Any, kernels: str = "auto", longest: int | None = None) -> Padding:
    task.recipe.train.kernels = kernels
    choose_padding(task, nn.Linear(1, 1).train(), longest)
    found: Padding = task.padding
    return found


def alone(ids: list[int], width: int, n_rows: int) -> float:
    return 100.0


def by_width(ids: list[int], width: int, n_rows: int) -> float:
    return 100.0 + width


def test_rows_that_are_answered_as_alone_are_filled() -> None:
    task: Any = Chooser(alone)
    model = nn.Linear(1, 1)
    choose_padding(task, model)
    assert (task.padding, task.notes, task.first_position) == (RIGHT, [], None)
    assert task.checked == [(model, {"input_ids": [3] * 5})]
    assert (task.multiples, task.pad_multiple) == ({1}, 8)  # while it is tried, and afterwards
    assert model.training
    assert task.tried == [100]
    for longest, tried in ((7, 7), (300, 100)):
        choose_padding(task, model, longest)
        assert task.tried[-1] == tried
    task.max_length = 5000
    choose_padding(task, model)
    assert task.tried[-1] == 1024


def test_a_model_whose_answers_are_all_zero_is_as_good_as_any() -> None:
    task: Any = Chooser(lambda *_: 0.0)
    task.logits = lambda model, inputs: torch.zeros(len(inputs["ids"]), 2)
    assert chosen(task) == RIGHT
    task.longest = 5
    assert chosen(task) == NONE


def test_where_no_text_is_longer_than_another_rows_are_not_filled() -> None:
    task: Any = Chooser(alone)
    task.longest = 5
    assert chosen(task) == NONE
    assert task.notes == []


def test_a_model_that_sees_the_filling_computes_rows_of_the_same_length() -> None:
    task: Any = Chooser(by_width)
    assert chosen(task) == NONE
    (note,) = task.notes
    assert "answer to a text changes when it is padded" in note


@pytest.mark.parametrize(
    ("value", "said"), [(-torch.inf, None), (torch.inf, "one is inf"), (torch.nan, "one is nan")]
)
def test_scores_may_be_ruled_out_but_must_be_numbers(value: float, said: str | None) -> None:
    task: Any = Chooser(alone)
    task.logits = lambda model, inputs: torch.tensor([[100.0, value]] * len(inputs["ids"]))
    if said is None:
        chosen(task)
        return
    with pytest.raises(LoraError, match=said):
        chosen(task)


@pytest.mark.parametrize(("noise", "found"), [(0.5, RIGHT), (1.0, RIGHT), (1.5, None)])
def test_a_hundredth_of_the_answers_is_what_other_rows_may_change(
    noise: float, found: Padding | None
) -> None:
    task: Any = Chooser(lambda ids, width, n_rows: 100.0 + noise * (n_rows > 1))
    if found is not None:
        assert chosen(task) == found
        return
    with pytest.raises(LoraError, match="depends on the texts next to it, by 1") as caught:
        chosen(task)
    assert caught.value.problems[0].at == "at train.micro_batch_size"
    for micro, evaluated, at in (
        (1, None, "at evaluate.micro_batch_size"), (1, 2, "at evaluate.micro_batch_size"),
        (2, 1, "at train.micro_batch_size"), (1, 1, None),
    ):  # fmt: skip
        task.micro_batch, task.recipe.evaluate.micro_batch_size = micro, evaluated
        if at is None:
            assert chosen(task) == NONE
            continue
        with pytest.raises(LoraError) as caught:
            chosen(task)
        assert caught.value.problems[0].at == at


def test_a_model_that_draws_is_found_out() -> None:
    task: Any = Chooser(lambda *_: 100.0 + task.calls)
    with pytest.raises(LoraError, match="differently each time, by 1"):
        chosen(task)


@pytest.mark.parametrize(
    ("back_only", "kernels", "side", "left", "found"),
    [
        (True, "auto", "right", False, WITHOUT_MASK),
        (True, "reference", "right", False, RIGHT),
        (False, "auto", "right", True, RIGHT),
        (False, "auto", "left", True, LEFT),
        (False, "auto", "left", False, RIGHT),
    ],
)
def test_which_way_is_tried_first(
    back_only: bool, kernels: str, side: str, left: bool, found: Padding
) -> None:
    task: Any = Chooser(alone)
    task.looks_back_only, task.can_fill_left = back_only, left
    task.tokenizer.padding_side = side
    assert chosen(task, kernels) == found


@pytest.mark.parametrize(
    ("can", "kernels", "found"),
    [(True, "fused", 7), (True, "auto", None), (True, "reference", None), (False, "fused", None)],
)
def test_texts_share_rows_where_that_is_wanted_and_right(
    can: bool, kernels: str, found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    task: Any = Chooser(alone)
    task.can_share_rows = can
    monkeypatch.setattr(padding_check, "_first_position", lambda *_: (7, ""))
    assert chosen(task, kernels) == RIGHT
    assert task.first_position == found
    monkeypatch.setattr(padding_check, "_first_position", lambda *_: (None, "no mask"))
    if (can, kernels) != (True, "fused"):
        assert chosen(task, kernels) == RIGHT
        return
    with pytest.raises(LoraError, match="no mask") as caught:
        chosen(task, kernels)
    assert caught.value.problems[0].at == "at train.kernels"


def test_a_reason_not_to_share_rows_is_an_error_only_where_fused_kernels_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(padding_check, "_worth_sharing", lambda *_: True)  # on a GPU
    monkeypatch.setattr(padding_check, "_first_position", lambda *_: (None, "no mask"))
    task: Any = Chooser(alone)
    task.can_share_rows = True
    assert chosen(task, "auto") == RIGHT
    # texts that share rows are not padded, so it does not matter that padding is seen
    monkeypatch.setattr(padding_check, "_first_position", lambda *_: (0, ""))
    task = Chooser(by_width)
    task.can_share_rows = True
    assert (chosen(task), task.first_position, task.notes) == (NONE, 0, [])


@pytest.mark.parametrize(
    ("kernels", "cuda", "worth"),
    [("fused", False, True), ("auto", True, True), ("auto", False, False),
     ("reference", True, False)],
)  # fmt: skip
def test_sharing_rows_is_worth_it_on_a_gpu(kernels: str, cuda: bool, worth: bool) -> None:
    task: Any = Chooser(alone)
    task.recipe.train.kernels = kernels
    model: Any = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(is_cuda=cuda)]))
    assert padding_check._worth_sharing(task, model) == worth


@pytest.mark.parametrize("agrees", [True, False])
@pytest.mark.parametrize("flash", [True, False])
def test_flash_attention_is_tried_by_itself(
    flash: bool, agrees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(padding_check, "has_flash_attention", lambda _: flash)
    monkeypatch.setattr(padding_check, "_agrees", lambda *given: tried.append(given[-1]) or agrees)
    assert chosen(Chooser(alone)) == (NONE if flash and not agrees else RIGHT)
    assert tried == ([RIGHT] if flash else [])
    assert chosen(Chooser(by_width)) == NONE
    assert len(tried) == flash


def test_flash_attention_agrees_where_a_row_is_answered_as_alone() -> None:
    task: Any = Chooser(alone)
    short, long = task.trial_examples(9)
    model = nn.Linear(1, 1)
    assert padding_check._agrees(task, model, short, long, RIGHT)
    task.score = by_width
    assert not padding_check._agrees(task, model, short, long, RIGHT)
    task.logits = lambda model, inputs: torch.zeros(len(inputs["ids"]), 2)
    assert padding_check._agrees(task, model, short, long, RIGHT)


def test_targets_are_filled_on_the_right_where_sources_are_filled_on_the_left() -> None:
    task: Any = Stub(lambda ids: torch.tensor([[float(i)] for i in ids]))
    task.padding = LEFT
    plain = task.collate

    def collate(examples: Any) -> Any:
        plain(examples).to("cpu").inputs["labels"] = None
        found = plain(examples).to("cpu")
        found.inputs["labels"] = None
        return SimpleNamespace(to=lambda device: found)

    task.collate = collate
    examples = [{"input_ids": [7, 8]}, {"input_ids": [1, 2, 3, 4]}]
    found = padding_check._of_first(task, nn.Linear(1, 1), examples, "k")
    assert found.flatten().tolist() == [7, 8]
