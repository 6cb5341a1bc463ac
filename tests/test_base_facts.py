"""Tests of adapters of other tools that come with their own tokenizer or processor."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import peft
import pytest
import tiny
import tiny_pictures
from tiny_pictures import CLASSES
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from typer.testing import CliRunner

from lora_cli.cli.app import app
from lora_cli.errors import LoraError
from lora_cli.export.merge import merge_adapter
from lora_cli.models.base_facts import trained_tokenizer
from lora_cli.recipe import load_recipe

TURN = "<|turn|>"
TEMPLATE = "{% for m in messages %}" + TURN + "{{ m['content'] }}{% endfor %}"
TEXT = f"{TURN}what a film"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base whose embedding has more rows than its tokenizer has tokens, as Qwen's has."""
    folder = tiny.save_llama(tmp_path / "base", tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(tiny.vocabulary("llama") + 4, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A PEFT adapter with the base's tokenizer, an additional token, and a chat template."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    save_tokenizer(base, tmp_path / "adapter", [TURN], TEMPLATE)
    return tmp_path / "adapter"


def save_tokenizer(base: Path, folder: Path, tokens: list[str], template: str | None) -> None:
    own = AutoTokenizer.from_pretrained(base)
    own.add_tokens(tokens, special_tokens=True)
    own.chat_template = template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    own.save_pretrained(folder)


def tokenizer_for(adapter: Path, base: Path, tmp_path: Path) -> PreTrainedTokenizerBase:
    return trained_tokenizer(adapter, load_recipe(tiny.recipe(base, tmp_path)))


def ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(TEXT)["input_ids"])


def test_a_different_tokenizer_is_used(
    adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tokenizer_for(adapter, base, tmp_path)
    assert ids(found) == ids(AutoTokenizer.from_pretrained(adapter))
    assert ids(found) != ids(AutoTokenizer.from_pretrained(base))
    assert found.chat_template == TEMPLATE
    said = capsys.readouterr().err
    assert "a tokenizer of its own (its tokens are others, and its chat template is another" in said


def test_a_merged_model_gets_the_adapter_s_tokenizer(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    merge_adapter(str(base), adapter, tmp_path / "merged")
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert ids(merged) == ids(AutoTokenizer.from_pretrained(adapter))
    assert merged.chat_template == TEMPLATE


def test_a_copy_of_the_base_s_tokenizer_causes_no_warning(
    adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer(base, adapter, [], None)
    assert ids(tokenizer_for(adapter, base, tmp_path)) == ids(AutoTokenizer.from_pretrained(base))
    assert capsys.readouterr().err == ""


def test_a_chat_template_that_only_the_base_has_is_used(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    save_tokenizer(base, base, [], TEMPLATE)
    save_tokenizer(base, adapter, [TURN], None)
    assert tokenizer_for(adapter, base, tmp_path).chat_template == TEMPLATE


def test_a_tokenizer_with_tokens_without_rows_is_not_used(
    adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer(base, adapter, [TURN, *(f"<{i}>" for i in range(4))], None)
    assert ids(tokenizer_for(adapter, base, tmp_path)) == ids(AutoTokenizer.from_pretrained(base))
    assert "the base has no rows for all of its tokens" in capsys.readouterr().err


def test_an_unreadable_tokenizer_is_an_error(adapter: Path, base: Path, tmp_path: Path) -> None:
    (adapter / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(LoraError, match="own tokenizer") as caught:
        tokenizer_for(adapter, base, tmp_path)
    assert caught.value.problems[0].at == str(adapter)
    assert "take its files out of the folder" in str(caught.value)


@pytest.mark.parametrize("is_other", [True, False])
def test_continued_training_with_the_base_s_tokenizer_causes_a_warning(
    is_other: bool, adapter: Path, base: Path, tmp_path: Path
) -> None:
    if not is_other:  # an additional template of the base is no difference
        save_tokenizer(base, base, [], TEMPLATE)
        save_tokenizer(base, adapter, [], None)
    recipe = tiny.recipe(base, tmp_path, adapter={"rank": 2, "from": str(adapter)})
    result = CliRunner().invoke(app, ["train", str(recipe)])
    assert result.exit_code == 0, result.output
    assert ("has a tokenizer of its own" in result.stderr) == is_other
    assert ("it is trained with that of the base" in result.stderr) == is_other


@pytest.mark.parametrize(
    ("changed", "said"),
    [({}, None), ({"do_pad": True}, None), ({"image_mean": [0.1, 0.2, 0.3]}, "`image_mean`")],
)
@pytest.mark.parametrize("use", ["merge", "train"])
def test_a_different_image_processor_causes_a_warning(
    use: str, changed: dict[str, object], said: str | None, tmp_path: Path
) -> None:
    base = tiny_pictures.save("vit", tmp_path / "base", CLASSES)
    model = AutoModelForImageClassification.from_pretrained(base)
    config = peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["classifier"]
    )
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    own = {**tiny_pictures.PROCESSOR, **changed}
    (tmp_path / "adapter/preprocessor_config.json").write_text(json.dumps(own))
    tiny_pictures.draw_folders(tmp_path / "pictures", {"train": 4, "validation": 2})
    recipe = tiny.recipe(
        base, tmp_path, task={"type": "image_classification", "labels": list(CLASSES)},
        data={"path": "pictures"}, adapter={"rank": 2},
    )  # fmt: skip
    arguments = ["merge", "--adapter", "adapter", "--to", "merged", "--recipe", str(recipe)]
    if use == "train":
        arguments = ["train", str(recipe), "--set", "adapter.from=adapter"]
    with contextlib.chdir(tmp_path):
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert ("preprocessor_config.json has another" in result.stderr) == bool(said)
    assert (said or "") in result.stderr
