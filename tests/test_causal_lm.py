from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from accelerate import Accelerator
from closeness import assert_close
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lora_cli.errors import LoraError
from lora_cli.evaluation.evaluate_split import evaluate
from lora_cli.preprocessing.check_recipe import check_recipe
from lora_cli.preprocessing.encode import load_data
from lora_cli.recipe import load_recipe
from lora_cli.tasks.causal_lm import CausalLM
from lora_cli.tasks.examples import IGNORED, Encoded, Example
from lora_cli.tasks.generation.packing import check_packing, one_row

CPU = torch.device("cpu")
STORIES = Path(__file__).parents[2] / "shared/data/model_stories260k/hf"
TEXTS = ["great fun", "a warm and funny film", "the plot is dull and slow", "what a bore"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {"llama": tiny.save_llama(root / "llama"), "gpt2": tiny.save_gpt2(root / "gpt2")}


def task_of(base: Path, tmp_path: Path, rows: Any, **sections: Any) -> CausalLM:
    rows = [row if isinstance(row, dict) else {"text": row} for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(lines, encoding="utf-8")
    spec = {"type": "causal_lm", "pad_token": None, **sections.pop("task", {})}
    if "prompt_column" in spec:
        spec |= {"text_column": None, "completion_column": "completion"}
    data = {"path": "train.jsonl"}
    task = CausalLM(
        recipe := load_recipe(tiny.recipe(base, tmp_path, data=data, task=spec, **sections)),
        recipe.task,  # type: ignore[arg-type]
    )
    task.load_processor()
    return task


def encoded(task: CausalLM) -> Encoded:
    return load_data(task)["train"]


def examples_of(task: CausalLM) -> list[Example]:
    return list(encoded(task).examples)


def pair(prompt: Any, completion: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


PAIR = {"prompt_column": "prompt"}

# -------------------------------------------------------------------------------- plain text


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("size", [2, 7, 8, 128])
def test_windows_throw_nothing_away(
    bases: dict[str, Path], tmp_path: Path, kind: str, size: int
) -> None:
    task = task_of(bases[kind], tmp_path, TEXTS, task={"max_length": size})
    examples = examples_of(task)
    end = task.tokenizer.eos_token_id
    for row, text in enumerate(TEXTS):
        pieces = [example["input_ids"] for example in examples if example["row"] == row]
        whole = pieces[0] + [token for piece in pieces[1:] for token in piece[1:]]
        assert whole == [*task.tokenizer(text)["input_ids"], end]
        assert whole.count(end) == 1
        assert all(2 <= len(piece) <= size for piece in pieces)
        assert all(a[-1] == b[0] for a, b in pairwise(pieces))
        # every token but the first is trained, once; the end also where it is the padding too
        batch = task.collate([example for example in examples if example["row"] == row])
        trained = batch.targets["labels"][batch.targets["labels"] != IGNORED].tolist()
        assert trained == whole[1:]
        assert batch.n_items == len(whole) - 1
    assert (examples[0]["input_ids"][0] == tiny.BOS) == (kind == "llama")


def test_gpt2_is_padded_with_its_end_of_text(bases: dict[str, Path], tmp_path: Path) -> None:
    task = task_of(bases["gpt2"], tmp_path, TEXTS)
    batch = task.collate(examples_of(task))
    mask = batch.inputs["attention_mask"]
    assert (batch.inputs["input_ids"][mask == 0] == task.tokenizer.eos_token_id).all()
    assert (batch.targets["labels"][mask == 0] == IGNORED).all()
    assert int(mask.sum()) == batch.cost
    last = mask.sum(1) - 1
    assert (batch.targets["labels"][torch.arange(4), last] == task.tokenizer.eos_token_id).all()
    (note,) = task.notes  # and is not so in silence
    assert "end-of-text token `<|endoftext|>` also fills the rows" in note
    assert not task_of(bases["gpt2"], tmp_path, TEXTS, task={"pad_token": "<|endoftext|>"}).notes


def test_a_single_token_trains_nothing(bases: dict[str, Path], tmp_path: Path) -> None:
    task = task_of(bases["gpt2"], tmp_path, [tiny.END_OF_TEXT, "a"])
    split = encoded(task)
    assert [example["row"] for example in split.examples] == [1]
    assert split.rows_without_example == 1
    with pytest.raises(LoraError, match="no row leaves anything to train within 1 token"):
        encoded(task_of(bases["gpt2"], tmp_path, TEXTS, task={"max_length": 1}))


def test_the_pad_token_is_checked(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="no token `<nothing>`"):
        task_of(bases["gpt2"], tmp_path, TEXTS, task={"pad_token": "<nothing>"})


# --------------------------------------------------------------------- prompt and completion


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_prompt_alone_is_masked(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    # "fun" + "ny" and "gre" + "at" are one token together: the border must stay a border
    rows = [pair("what a fun", "ny film"), pair("a gre", "at story"), pair(3, 14), pair("a ", "b")]
    task = task_of(bases[kind], tmp_path, rows, task={**PAIR, "separator": " => "})
    plain = task_of(bases[kind], tmp_path, rows, task=PAIR)
    for made in (task, plain):
        for row, example in zip(rows, examples_of(made), strict=True):
            start = made.prompt(row)
            n_prompt = len(start)
            alone = made.tokenizer(f"{row['prompt']}{made.spec.separator}")["input_ids"]
            assert example["input_ids"][:n_prompt] == start == alone
            assert example["labels"][:n_prompt] == [IGNORED] * n_prompt
            assert example["labels"][n_prompt:] == example["input_ids"][n_prompt:]
            *said, end = example["labels"][n_prompt:]
            assert end == made.tokenizer.eos_token_id
            assert made.tokenizer.decode(said) == str(row["completion"])


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_no_space_is_added_where_a_prompt_ends_with_one(tmp_path: Path, scheme: str) -> None:
    # as the tokenizers of Llama 2 and Mistral: " great" is one token, and "great" alone has a space
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=tiny.SPECIAL, show_progress=False)
    backend.train_from_iterator(["what is it :\n", *tiny.CORPUS * 3], trainer)
    base = tiny.save_llama(tmp_path / "base")
    names = dict(
        zip(("bos_token", "pad_token", "eos_token", "unk_token"), tiny.SPECIAL, strict=True)
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(base)
    rows = [pair("what is it: ", "great"), pair("what is it:", " great"), pair("it:\n", "great")]
    task = task_of(base, tmp_path, rows, task=PAIR)
    assert task.tokenizer.tokenize("great")[0].startswith("▁")
    for row, example in zip(rows, examples_of(task), strict=True):
        said = task.tokenizer.decode(example["input_ids"], skip_special_tokens=True)
        assert said.strip() == row["prompt"] + row["completion"]
        start = task.prompt(row)
        assert example["input_ids"][: len(start)] == start


def test_a_tokenizer_that_ends_texts_itself_ends_them_once(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base")
    tiny.tokenizer("encoder").save_pretrained(base)  # <s> text </s>
    task = task_of(base, tmp_path, [pair("a", "b")], task=PAIR)
    (example,) = examples_of(task)
    assert example["input_ids"].count(tiny.EOS) == 1
    assert example["labels"][-1] == tiny.EOS
    (text,) = examples_of(task_of(base, tmp_path, ["a b"]))
    assert text["input_ids"].count(tiny.EOS) == 1


def test_rows_whose_answer_is_cut_away_are_counted(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = [pair("long " * 30, "yes"), pair("short", "yes"), pair("long " * 30, "no")]
    split = encoded(task_of(bases["gpt2"], tmp_path, rows, task={**PAIR, "max_length": 16}))
    assert [example["row"] for example in split.examples] == [1]
    assert split.rows_without_example == 2
    again = encoded(task_of(bases["gpt2"], tmp_path, rows, task={**PAIR, "max_length": 16}))
    assert again.rows_without_example == 2  # from the disk too
    with pytest.raises(LoraError, match="no row leaves anything to train within 16 tokens"):
        encoded(task_of(bases["gpt2"], tmp_path, rows[:1], task={**PAIR, "max_length": 16}))


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (pair(" ", "b"), "column `prompt` is blank"),
        (pair("a", None), "column `completion` is blank"),
        (pair(["a"], "b"), "column `prompt` holds a list, not text"),
    ],
)
def test_bad_pairs_are_faults(
    bases: dict[str, Path], tmp_path: Path, row: dict[str, Any], error: str
) -> None:
    with pytest.raises(LoraError) as caught:
        encoded(task_of(bases["gpt2"], tmp_path, [pair("a", "b"), row], task=PAIR))
    assert [(p.what, p.at) for p in caught.value.problems] == [(error, "train.jsonl:2")]


# ----------------------------------------------------------------------------------- losses


@pytest.mark.proves("loss", task="causal_lm", rows="text", model="{kind}", against="transformers")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_that_of_transformers(
    bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    task = task_of(bases[kind], tmp_path, TEXTS)
    batch = task.collate(examples_of(task))
    model, new = task.load_model(CPU)
    assert new == []
    with torch.no_grad():
        loss = task.loss(model, batch)
        theirs = model(**batch.inputs, labels=batch.targets["labels"]).loss
        predictions = task.predict(model, batch)
    torch.testing.assert_close(loss / batch.n_items, theirs)
    assert sum(p.losses["loss"][0] for p in predictions) == pytest.approx(loss.item(), rel=1e-5)
    assert sum(p.losses["loss"][1] for p in predictions) == batch.n_items


def test_a_checkpoint_without_its_output_layer_is_refused(tmp_path: Path) -> None:
    for change in ("missing", "mismatched"):
        base = tiny.save_llama(tmp_path / change, tied=False)
        tensors = load_file(base / "model.safetensors")
        head = tensors.pop("lm_head.weight")
        if change == "mismatched":
            tensors["lm_head.weight"] = head[:50].clone()
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(LoraError, match=r"`lm_head.weight`"):
            task_of(base, tmp_path, TEXTS).load_model(CPU)


# ---------------------------------------------------------------------------------- packing


def packed_task(kind: str, bases: dict[str, Path], tmp_path: Path, attention: str) -> CausalLM:
    if kind == "stories" and not STORIES.is_dir():
        pytest.skip(f"there is no {STORIES}")
    return task_of(
        STORIES if kind == "stories" else bases[kind], tmp_path, TEXTS,
        model={"attention": attention}, train={"packing": True}, task={"max_length": 64},
    )  # fmt: skip


def test_a_padding_that_only_the_tokenizer_has_is_not_read(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["llama"], base)
    made = PreTrainedTokenizerFast.from_pretrained(base)
    made.add_special_tokens({"pad_token": "[PAD]"})
    made.save_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base).eval()
    assert made.pad_token_id >= model.config.vocab_size
    task = task_of(base, tmp_path, ["a film", "a longer text of a film too"])
    examples = examples_of(task)
    with torch.no_grad():
        found = task.logits(model, task.collate(examples).inputs)
        for row, example in zip(found, examples, strict=True):
            alone = model(torch.tensor([example["input_ids"]])).logits[0]
            assert_close(row[: len(alone)], alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "stories"])
def test_packed_logits_are_those_of_the_texts_alone(
    bases: dict[str, Path], tmp_path: Path, kind: str, attention: str
) -> None:
    task = packed_task(kind, bases, tmp_path, attention)
    split = encoded(task)
    examples = list(split.examples)
    model, _ = task.load_model(CPU)
    # two packs of different lengths, so that one is filled
    batch = task.collate([one_row(examples[:3]), one_row(examples[3:])])
    with torch.no_grad():
        packed = model(**batch.inputs, use_cache=False).logits
        alone = [
            model(input_ids=torch.tensor([example["input_ids"]]), use_cache=False).logits[0]
            for example in examples
        ]
        trap = model(**batch.inputs, use_cache=True).logits
    together = [torch.cat(alone[:3]), alone[3]]
    scale = max(logits.abs().max() for logits in alone)
    for row, wanted in enumerate(together):
        assert (packed[row, : len(wanted)] - wanted).abs().max() < 1e-5 * scale
    # with the cache on, transformers builds no block mask, and the second text reads the first
    first = len(alone[0])
    assert (trap[0, first : first + 5] - alone[1][:5]).abs().max() > 1e-3 * scale
    model.train()
    check_packing(task, model, split)
    assert model.training


def test_a_model_that_does_not_name_the_cache_keeps_packed_texts_apart(tmp_path: Path) -> None:
    # GraniteMoE's forward passes `use_cache` on; with the cache on, packed texts see each other
    config = GraniteMoeConfig(
        vocab_size=tiny.vocabulary("llama"), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, num_local_experts=4,
        num_experts_per_tok=2, pad_token_id=tiny.PAD,
    )  # fmt: skip
    base = tmp_path / "base"
    tiny.enliven(GraniteMoeForCausalLM(config)).save_pretrained(base)
    tiny.tokenizer("llama").save_pretrained(base)
    task = task_of(base, tmp_path, TEXTS, train={"packing": True}, task={"max_length": 64})
    examples = list(encoded(task).examples)
    model, _ = task.load_model(CPU)
    batch = task.collate([one_row(examples[:3])])
    alone = [torch.tensor([example["input_ids"]]) for example in examples[:3]]
    with torch.no_grad():
        wanted = torch.cat([model(ids, use_cache=False).logits[0] for ids in alone])
        found = task.logits(model, batch.inputs)[0]
    assert_close(found[: len(wanted)], wanted)


class Forgetful(nn.Module):
    """A language model that takes position ids and makes nothing of them, or takes none."""

    def __init__(self, model: nn.Module, takes_positions: bool) -> None:
        super().__init__()
        self.model, self.takes_positions = model, takes_positions

    def forward(self, input_ids: torch.Tensor, use_cache: bool, **inputs: torch.Tensor) -> Any:
        if inputs and not self.takes_positions:
            raise TypeError("forward() got an unexpected keyword argument 'position_ids'")
        return self.model(input_ids=input_ids, use_cache=use_cache)


@pytest.mark.parametrize("takes_positions", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_lets_packed_texts_see_each_other_is_refused(
    bases: dict[str, Path], tmp_path: Path, takes_positions: bool, dtype: torch.dtype
) -> None:
    task = packed_task("llama", bases, tmp_path, "sdpa")
    split = encoded(task)
    model, _ = task.load_model(CPU, dtype)
    check_packing(task, model, split)
    leaky = Forgetful(model, takes_positions).train()
    with pytest.raises(LoraError, match="packed texts see each other") as caught:
        check_packing(task, leaky, split)
    assert "packing: false" in str(caught.value)
    assert leaky.training


# ------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_do_not_depend_on_company(
    bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    task = task_of(
        bases[kind], tmp_path, TEXTS, evaluate={"generation": {"max_new_tokens": 8}}
    )  # fmt: skip
    model, _ = task.load_model(CPU)
    prompts = [*TEXTS, "slow " * 60, "slow " * 123]  # room for few tokens
    rows = [task.parse_input(prompt) for prompt in prompts]
    together = task.answer(model, rows)
    assert together == [task.answer(model, [row])[0] for row in rows]
    assert all(answer for (answer,) in together)
    assert len({answer for (answer,) in together}) > 1
    ids = torch.tensor([task.tokenizer(TEXTS[1])["input_ids"]])
    said = ids[0].tolist()
    with torch.no_grad():
        for _ in range(8):
            said.append(int(model(input_ids=torch.tensor([said])).logits[0, -1].argmax()))
    wanted = task.tokenizer.decode(said[ids.shape[1] :], skip_special_tokens=True)
    assert together[1] == [wanted]


def test_what_fills_a_row_is_no_part_of_its_answer(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(bases["llama"], tmp_path, TEXTS, task={"pad_token": "Ġgreat"})
    model, _ = task.load_model(CPU)
    said = task.tokenizer("dull", add_special_tokens=False)["input_ids"]
    filler = task.pad

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        tail = torch.tensor([[*said, tiny.EOS, filler, filler]] * len(input_ids))
        return torch.cat([input_ids, tail], dim=1)

    task.answer(model, [{"text": "a"}, {"text": "b c d"}])  # which tries how the model is padded
    monkeypatch.setattr(model, "generate", generate)
    assert task.answer(model, [{"text": "a"}, {"text": "b c d"}]) == [["dull"], ["dull"]]


@pytest.mark.parametrize("several", [True, False])
def test_every_stop_token_of_the_model_ends_an_answer(
    bases: dict[str, Path], tmp_path: Path, several: bool
) -> None:
    generation = {"generation": {"max_new_tokens": 8}}
    rows = [pair(text, "-") for text in TEXTS]
    task = task_of(bases["llama"], tmp_path, rows, task=PAIR, evaluate=generation)
    model, _ = task.load_model(CPU)
    prompts = [task.prompt(row) for row in rows]
    with torch.no_grad():
        whole = model.generate(torch.tensor(prompts[:1]), max_new_tokens=8, do_sample=False)
    said = whole[0, len(prompts[0]) :].tolist()
    stop = next(i for i in said if i != said[0])  # it is no special token
    model.generation_config.eos_token_id = [tiny.EOS, stop] if several else stop
    assert task.stop_ids(model) == [tiny.EOS, stop]
    together = task.generate(model, prompts)
    assert together[0] == task.tokenizer.decode(said[: said.index(stop)])
    assert all(task.tokenizer.decode([stop]) not in answer for answer in together)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.slow
def test_metrics_of_text_compare_answers(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    rows = [pair(text, "-") for text in TEXTS]
    sections: dict[str, Any] = {
        "task": PAIR,
        "evaluate": {
            "metrics": ["exact_match", "bleu", "rouge", "perplexity"],
            "generation": {"max_new_tokens": 6},
        },
    }
    task = task_of(bases[kind], tmp_path, rows, **sections)
    model, _ = task.load_model(CPU)
    answers = [answer for (answer,) in task.answer(model, rows)]
    # half of the references are what the model says
    wanted = [
        pair(row["prompt"], answer if i % 2 else "something else")
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
    ]
    task = task_of(bases[kind], tmp_path, wanted, **sections)
    file = tmp_path / "predictions.jsonl"
    metrics = evaluate(model, task, encoded(task), Accelerator(cpu=True), file)
    assert metrics["exact_match"] == 0.5
    assert {"loss", "bleu", "rouge1", "rougeL", "perplexity"} <= set(metrics)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["prediction"] for line in lines] == answers
    assert [line["reference"] for line in lines] == [row["completion"] for row in wanted]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"evaluate": {"metrics": ["bleu"]}}, "metric `bleu` needs prompts to answer"),
        ({"evaluate": {"metrics": ["accuracy"]}}, "metric `accuracy` compares labels"),
        ({"evaluate": {"metrics": ["./none.py"]}}, "there is no metric script"),
        ({"evaluate": {"best": {"metric": "f1"}}}, "there is no metric `f1` to choose"),
        (
            {"task": PAIR, "evaluate": {"metrics": ["rouge"], "best": {"metric": "rouge"}}},
            "there is no metric `rouge` to choose",
        ),
        (
            {"evaluate": {"metrics": ["own/metric"], "best": {"metric": "score"}}},
            "is a lower or a higher `score` better?",
        ),
    ],
)
def test_metrics_are_checked_before_training(
    bases: dict[str, Path], tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    task = task_of(bases["gpt2"], tmp_path, [pair("a", "b") | {"text": "c"}], **sections)
    with pytest.raises(LoraError) as caught:
        load_data(task)
    assert message in str(caught.value)
    with pytest.raises(LoraError) as caught:
        check_recipe(task.recipe)
    assert message in str(caught.value)


def test_a_check_collects_metrics_with_all_other_problems(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    task = task_of(
        bases["gpt2"], tmp_path, ["a", " "],
        evaluate={"metrics": ["bleu", "accuracy"], "best": {"metric": "f2", "mode": "max"}},
    )  # fmt: skip
    with pytest.raises(LoraError) as caught:
        check_recipe(task.recipe)
    said = str(caught.value)
    for part in ("`bleu`", "`accuracy`", "`f2`", "column `text` is blank"):
        assert part in said


@pytest.mark.parametrize("metric", ["rougeL", "loss", "perplexity"])
def test_what_is_measured_can_choose_the_best(
    bases: dict[str, Path], tmp_path: Path, metric: str
) -> None:
    evaluate = {"metrics": ["perplexity", "rouge"], "best": {"metric": metric}}
    task = task_of(bases["gpt2"], tmp_path, [pair("a", "b")], task=PAIR, evaluate=evaluate)
    assert task.metric_problems() == []
    check_recipe(task.recipe)


def test_the_models_positions_limit_a_text(tmp_path: Path) -> None:
    base = tiny.save_gpt2(tmp_path / "base")
    tokenizer = tiny.tokenizer("gpt2")
    tokenizer.model_max_length = 1_000_000
    tokenizer.save_pretrained(base)
    task = task_of(base, tmp_path, ["slow " * 200], task={"max_length": 1000})
    assert task.max_length == tiny.POSITIONS
    split = encoded(task)
    assert split.lengths.max() == tiny.POSITIONS
    model, _ = task.load_model(CPU)
    with torch.no_grad():
        losses = task.loss(model, task.collate([split.examples[0]]))
    assert torch.isfinite(losses)
