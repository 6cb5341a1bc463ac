"""Greedy answers, against a loop of plain forward passes, whatever the base would have liked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from lora_cli.errors import LoraError
from lora_cli.models.base_model import disable_wrong_attention, load_pretrained
from lora_cli.preprocessing.check_recipe import check_recipe
from lora_cli.recipe import load_recipe
from lora_cli.recipe.spec import GenerationSpec
from lora_cli.tasks.causal_lm import CausalLM
from lora_cli.tasks.generation.text_generation import generate
from lora_cli.training.run import train

CPU = torch.device("cpu")
TEXTS = ["great fun", "a warm and funny film", "the plot is dull and slow", "what a bore"]
WISHES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8}, {"num_beams": 3}, {"no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 1}, {"suppress_tokens": list(range(10, 200))},
    {"begin_suppress_tokens": list(range(5, 300))}, {"forced_bos_token_id": 7},
    {"forced_eos_token_id": 9}, {"min_length": 40}, {"min_new_tokens": 40},
    {"do_sample": True, "top_k": 3, "temperature": 2.0},
    {"bad_words_ids": [[i] for i in range(300)]},
    {"stop_strings": ["great", "a"]}, {"penalty_alpha": 0.6, "top_k": 4},
    {"sequence_bias": [[[20], 50.0]]}, {"guidance_scale": 3.0},
    {"exponential_decay_length_penalty": [0, 5.0]}, {"max_time": 0.0}, {"max_length": 3},
    {"max_new_tokens": 1}, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    {"prompt_lookup_num_tokens": 3},
    {"renormalize_logits": True, "typical_p": 0.2, "do_sample": True},
    {"num_return_sequences": 2, "do_sample": True}, {"return_dict_in_generate": True},
    {"token_healing": True}, {"dola_layers": "low"}, {"watermarking_config": {"bias": 5.0}},
    {"constraints": ["x"]}, {"force_words_ids": [[5]]}, {"use_cache": False},
    {"num_assistant_tokens": 3},
    {"cache_implementation": "static"}, {"custom_key": 3},
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def task_of(tmp_path: Path, **sections: Any) -> CausalLM:
    base = tmp_path / "base"
    if not base.exists():
        tiny.save_llama(base)
    recipe = load_recipe(tiny.recipe(base, tmp_path, **sections))
    task = CausalLM(recipe, recipe.task)  # type: ignore[arg-type]
    task.load_processor()
    return task


def whole(texts: list[Any]) -> list[str]:
    """Return texts without the half character at their end, which an answer that is cut loses."""
    return [str(text).rstrip("\ufffd") for text in texts]


def greedy(model: Any, ids: list[int], count: int, stops: set[int]) -> list[int]:
    """Return what plain forward passes over the whole text choose, token by token."""
    ids_so_far = list(ids)
    with torch.no_grad():
        for _ in range(count):
            token = int(
                model(input_ids=torch.tensor([ids_so_far]), use_cache=False).logits[0, -1].argmax()
            )
            if token in stops:
                break
            ids_so_far.append(token)
    return ids_so_far[len(ids) :]


def test_the_base_does_not_change_a_greedy_answer(tmp_path: Path) -> None:
    task = task_of(tmp_path, evaluate={"generation": {"max_new_tokens": 8}})
    model, _ = task.load_model(CPU)
    prompts = [task.tokenizer(text)["input_ids"] for text in TEXTS]
    answers = [greedy(model, ids, 8, {tiny.EOS}) for ids in prompts]
    wanted = whole([task.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers])
    assert whole(task.generate(model, prompts)) == wanted
    for wish in WISHES:
        own = GenerationConfig(eos_token_id=tiny.EOS)
        for key, value in wish.items():
            setattr(own, key, value)  # as a file may hold it: nothing checks it
        model.generation_config = own
        assert whole(task.generate(model, prompts)) == wanted, wish
        assert model.generation_config is own


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"repetition_penalty": 1.05}, "asks for repetition_penalty 1.05;"),
        ({"top_k": 20, "do_sample": True}, "asks for do_sample True, top_k 20;"),
        ({"stop_strings": ["a"]}, "asks for stop_strings ['a'];"),
        ({"max_new_tokens": 5, "pad_token_id": 3, "bos_token_id": 1}, ""),
    ],
)
def test_unused_generation_settings_of_the_base_are_warned_about_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wish: dict[str, Any], said: str
) -> None:
    task = task_of(tmp_path, evaluate={"generation": {"max_new_tokens": 2}})
    model, _ = task.load_model(CPU)
    model.generation_config = GenerationConfig(**wish)
    capsys.readouterr()
    task.generate(model, [[tiny.BOS, 20]])
    err = capsys.readouterr().err
    assert said in err
    assert bool(said) == bool(err)
    task.generate(model, [[tiny.BOS, 20]])
    assert capsys.readouterr().err == ""


def test_the_generation_config_of_the_checkpoint_is_not_used(tmp_path: Path) -> None:
    task = task_of(tmp_path, evaluate={"generation": {"max_new_tokens": 8}})
    plain, _ = task.load_model(CPU)
    ids = task.tokenizer(TEXTS[1])["input_ids"]
    answer_ids = greedy(plain, ids, 8, set())
    stop = answer_ids[4]
    own = {"repetition_penalty": 5.0, "eos_token_id": [tiny.EOS, stop], "stop_strings": ["a"]}
    GenerationConfig(**own).save_pretrained(tmp_path / "base")
    model, _ = task.load_model(CPU)
    assert model.generation_config.repetition_penalty == 5.0
    wanted = answer_ids[: answer_ids.index(stop)]  # the tokens that end a text are the base's
    answer = task.tokenizer.decode(wanted, skip_special_tokens=True)
    assert task.generate(model, [ids]) == [answer]


def test_cudnn_attention_is_off_while_generating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(tmp_path)
    model = task.load_model(CPU)[0].eval()
    real, seen, own = model.generate, [], model.generation_config

    def spy(*arguments: Any, **named: Any) -> Any:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*arguments, **named)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    for enabled in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(enabled)
        monkeypatch.setattr(model, "generate", spy)
        task.generate(model, [[5, 6, 7], [8, 9]])
        assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
        monkeypatch.setattr(model, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            task.generate(model, [[5, 6, 7], [8, 9]])
        assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
        assert model.generation_config is own
    assert seen
    assert not any(seen)


def test_sampling_follows_the_recipe(tmp_path: Path) -> None:
    def sampled(own: dict[str, Any], **generation: Any) -> list[str]:
        options = {"max_new_tokens": 6, **generation}
        task = task_of(tmp_path, evaluate={"generation": options})
        model, _ = task.load_model(CPU)
        model.generation_config = GenerationConfig(**own)
        torch.manual_seed(0)
        return task.generate(model, [task.tokenizer(text)["input_ids"] for text in TEXTS])

    wish = {"top_k": 1, "do_sample": True, "temperature": 0.01, "min_p": 0.9}
    assert sampled({}, temperature=1.0) == sampled(wish, temperature=1.0)
    assert sampled({}, temperature=1.0) != sampled({})
    assert sampled({}, temperature=1.0, top_p=1e-6) == sampled(wish)  # the likeliest alone


# ----------------------------------------------------------------------- prompts without room


@pytest.mark.parametrize("length", [127, 128, 129, 300])
def test_a_prompt_needs_room_for_an_answer(tmp_path: Path, length: int) -> None:
    task = task_of(tmp_path, evaluate={"generation": {"max_new_tokens": 16}})
    model, _ = task.load_model(CPU)
    text = " slow" * (length - 1)
    assert len(task.text_prompt(text)) == length
    if length < tiny.POSITIONS:
        (answer,) = task.answer(model, [{"text": text}])
        assert len(task.tokenizer(answer[0], add_special_tokens=False)["input_ids"]) <= 1
        (warning,) = task.take_warnings()
        assert "1 answer ended where the model's 128 tokens end" in warning
        assert task.take_warnings() == []
        return
    wanted = f"the prompt has {length} tokens, and the model takes 128"
    assert task.answer_error({"text": text}).startswith(wanted)
    with pytest.raises(LoraError, match=wanted):
        task.answer(model, [{"text": text}])


def test_a_prompt_may_lose_its_beginning(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"evaluate": {"generation": {"max_new_tokens": 16}}}
    text = "a story " * 100 + "great fun"
    task = task_of(tmp_path, task={"truncate": "left"}, **sections)
    model, _ = task.load_model(CPU)
    ids = task.tokenizer(text)["input_ids"]
    kept = [ids[0], *ids[-111:]]  # 128 - 16, the token that begins a text among them
    assert task.text_prompt(text) == kept
    answer = task.tokenizer.decode(greedy(model, kept, 16, {tiny.EOS}), skip_special_tokens=True)
    assert task.answer_error({"text": text}) == ""
    assert whole(task.answer(model, [{"text": text}])[0]) == whole([answer])
    assert task.take_warnings() == ["1 prompt lost the beginning, to leave room for the answer"]


# --------------------------------------------------------------------------- where an answer ends


@pytest.mark.slow_after(4)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ids", [99_999, -1, "2", True, 1.5, [2, 99_999], [[2]]], ids=str)
def test_an_end_token_that_the_model_lacks_is_an_error(tmp_path: Path, file: str, ids: Any) -> None:
    base = tiny.save_llama(tmp_path / "base")
    recipe = load_recipe(tiny.recipe(base, tmp_path))
    (base / "generation_config.json").unlink(missing_ok=True)
    own = json.loads((base / file).read_text()) if file == "config.json" else {}
    (base / file).write_text(json.dumps(own | {"eos_token_id": ids}))
    with pytest.raises(LoraError, match="eos_token_id"):
        check_recipe(recipe)
    with pytest.raises(LoraError, match="eos_token_id"):
        train(recipe)


def test_unusual_stop_tokens_are_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ids, words in ((tiny.EOS, ""), ([tiny.EOS, tiny.BOS], "`<s>` (0)"), (20, "ordinary word")):
        task = task_of(tmp_path)
        model, _ = task.load_model(CPU)
        model.generation_config.eos_token_id = ids
        task.generate(model, [[tiny.BOS, 20]])
        printed = capsys.readouterr().err
        assert ("answers end at" in printed) == bool(words)
        assert words in printed
        assert ("ordinary" in printed) == (ids == 20)


SIZES = {
    "vocab_size": 64, "d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64,
    "pad_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Bart", "Marian", "Pegasus", "PLBart"])
@pytest.mark.parametrize("layers", [(1, 3), (3, 1)])
def test_decoders_with_other_layers_than_their_encoder(kind: str, layers: tuple[int, int]) -> None:
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, encoder_layers=layers[0], decoder_layers=layers[1]
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    options, prompt = GenerationSpec(max_new_tokens=6), [5, 6, 7]
    (answer,) = generate(model, [prompt], IDS, options, 1, 64, {2})  # type: ignore[arg-type]
    assert answer.text == str(greedy(model, prompt, 6, {2}))


class Ids:
    """Writes tokens as their numbers."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return str(ids)


IDS = Ids()


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({"head_dim": 256, "num_key_value_heads": 1}, False),  # Gemma 3 270M
        ({"head_dim": 256, "num_key_value_heads": 2}, True),
        ({"head_dim": 128, "num_key_value_heads": 1}, True),
        ({"head_dim": None, "hidden_size": 640, "num_key_value_heads": 1}, False),
    ],
)
def test_the_attention_that_is_wrong_for_one_wide_key_is_not_used(
    changes: dict[str, Any], used: bool, tmp_path: Path
) -> None:
    sizes = {"vocab_size": tiny.vocabulary(), "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"hidden_size": 32, "intermediate_size": 32, **changes}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    recipe = load_recipe(tiny.recipe(tmp_path / "base", tmp_path))
    try:
        load_pretrained(AutoModelForCausalLM, recipe, LlamaConfig(**sizes), torch.device("cpu"))
        assert torch.backends.cuda.mem_efficient_sdp_enabled() == used
    finally:
        torch.backends.cuda.enable_mem_efficient_sdp(True)


def test_models_whose_layers_have_numbers_of_keys_of_their_own_are_read_layer_by_layer() -> None:
    library = pytest.importorskip(
        "transformers.models.embedding_gemma2.configuration_embedding_gemma2"
    )
    with torch.device("meta"):
        model = AutoModel.from_config(library.EmbeddingGemma2TextConfig())
    with pytest.raises(RuntimeError, match="per-layer"):
        _ = model.config.num_key_value_heads
    layers = [m for m in model.modules() if hasattr(m, "num_key_value_groups")]
    share_one = [m for m in layers if m.k_proj.out_features == m.head_dim > 128]
    try:
        disable_wrong_attention(model)
        assert torch.backends.cuda.mem_efficient_sdp_enabled() == (not share_one)
    finally:
        torch.backends.cuda.enable_mem_efficient_sdp(True)
