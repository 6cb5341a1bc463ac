from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from accelerate import Accelerator
from torch import nn
from typer.testing import CliRunner

from lora_cli.adapters.attach import attach
from lora_cli.adapters.peft_format.adapter_folder import save_adapter
from lora_cli.cli.app import app
from lora_cli.errors import LoraError, NumericsError, ResourceError
from lora_cli.evaluation import converse as conversation
from lora_cli.evaluation.converse import Streamer, converse
from lora_cli.recipe import dump_recipe, load_recipe
from lora_cli.tasks import build_task
from lora_cli.tasks.contract import Task

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
Opened = tuple[Task, nn.Module]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def folder_of(tmp_path: Path, kind: str = "llama", **sections: Any) -> Path:
    """Write the folder of an adapter with nonzero updates."""
    save = tiny.save_llama if kind == "llama" else tiny.save_encoder
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    sections.setdefault("evaluate", {"generation": {"max_new_tokens": 12}})
    recipe = load_recipe(tiny.recipe(save(tmp_path / "base"), tmp_path, **sections))
    task = build_task(recipe)
    task.load_processor()
    model, new = task.load_model(torch.device("cpu"))
    attach(model, recipe, new)
    tiny.wake(model)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(folder, model, recipe, new)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return folder


CHAT = {"messages_column": "messages", "text_column": None, "chat_template": "chat.jinja"}


def opened(folder: Path) -> Opened:
    from lora_cli.evaluation.open_adapter import open_adapter

    task, model, _ = open_adapter(folder, load_recipe(folder / "recipe.yaml"))
    return task, model


def talk(opened: Opened, *lines: str) -> tuple[str, str]:
    task, model = opened
    said: list[str] = []
    notes: list[str] = []
    converse(model, task, Accelerator(cpu=True), lines, said.append, notes.append)
    return "".join(said), "".join(notes)


def asked_of(opened: Opened, monkeypatch: pytest.MonkeyPatch, *lines: str) -> list[str]:
    """Return the prompts of the model as text; it answers `ok` each time."""
    task, model = opened
    prompts: list[str] = []

    def generate(_: Any, prompt: Any, streamer: Any) -> list[str]:
        prompts.append(task.tokenizer.decode(prompt[0]).strip())
        return ["ok"]

    monkeypatch.setattr(task, "generate", generate)
    talk((task, model), *lines)
    return prompts


def test_a_chat_remembers_until_it_is_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = opened(folder_of(tmp_path, task=CHAT))
    prompts = asked_of(
        chat, monkeypatch, "one\n", "\n", "two\n", "/reset\n", "three\n", "/quit\n", "four\n"
    )
    assert prompts == ["u:one|a:", "u:one|a:ok|u:two|a:", "u:three|a:"]


def test_a_text_model_does_not_remember(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = asked_of(opened(folder_of(tmp_path)), monkeypatch, "one\n", "two")
    assert [prompt.removeprefix("<s>").strip() for prompt in prompts] == ["one", "two"]


def test_a_long_chat_forgets_its_oldest_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = opened(folder_of(tmp_path, task=CHAT))
    lines = [f"{i} {'great fun ' * 8}" for i in range(9)]
    prompts = asked_of(chat, monkeypatch, *lines)
    room = chat[0].room_for_prompt  # type: ignore[attr-defined]
    assert all(len(chat[0].tokenizer(p)["input_ids"]) <= room + 1 for p in prompts)
    assert prompts[-1].startswith("u:")
    assert "0 great" not in prompts[-1]
    assert "8 great" in prompts[-1]
    assert "7 great" in prompts[-1]
    _, notes = talk(chat, *lines)
    assert "oldest turns were dropped" in notes


def test_the_streamed_text_is_the_answer(tmp_path: Path) -> None:
    task, model = opened(folder_of(tmp_path, task=CHAT))
    prompt = task.chat_prompt([{"role": "user", "content": "great"}])  # type: ignore[attr-defined]
    pieces: list[str] = []
    (plain,) = task.generate(model, [prompt])  # type: ignore[attr-defined]
    streamer = Streamer(task.tokenizer, pieces.append, [tiny.EOS])
    (streamed,) = task.generate(model, [prompt], streamer)  # type: ignore[attr-defined]
    assert "".join(pieces) == streamed == plain
    assert len(pieces) > 1
    said, _ = talk((task, model), "great")
    assert said == plain + "\n"


def test_the_best_of_several_beams_is_written_at_the_end(tmp_path: Path) -> None:
    generation = {"max_new_tokens": 12, "num_beams": 3, "length_penalty": 0.5}
    task, model = opened(folder_of(tmp_path, evaluate={"generation": generation}))
    said, noted = talk((task, model), "a warm film")
    assert not noted
    assert said.strip() == task.answer(model, [{"text": "a warm film"}])[0][0].strip()
    prompt = torch.tensor([task.text_prompt("a warm film")])  # type: ignore[attr-defined]
    reference = model.generate(  # type: ignore[operator]
        input_ids=prompt, num_beams=3, length_penalty=0.5, max_new_tokens=12, do_sample=False,
        pad_token_id=tiny.PAD,
    )  # fmt: skip
    wanted = task.tokenizer.decode(reference[0, prompt.shape[1] :], skip_special_tokens=True)  # type: ignore[attr-defined]
    assert said.strip() == wanted.strip().rstrip("\N{REPLACEMENT CHARACTER}")


def test_an_incomplete_character_is_not_written() -> None:
    tokenizer = tiny.tokenizer("llama")
    pieces: list[str] = []
    streamer = Streamer(tokenizer, pieces.append, [tiny.EOS])
    streamer.put(torch.tensor([[5, 6]]))  # the prompt
    ids = tokenizer("a 🙂 é", add_special_tokens=False)["input_ids"]
    for i in [*ids, tiny.EOS]:
        streamer.put(torch.tensor([i]))
    streamer.end()
    assert "".join(pieces) == "a 🙂 é"
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_error_is_noted_and_the_conversation_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = opened(folder_of(tmp_path, task=CHAT))
    task, calls = chat[0], iter([LoraError("refused"), None])

    def generate(*_: Any) -> list[str]:
        if error := next(calls):
            raise error
        return ["ok"]

    monkeypatch.setattr(task, "generate", generate)
    _, notes = talk(chat, "/help", "one", "two")
    assert notes.startswith("there is no command /help; /reset forgets")
    assert notes.endswith("error: refused\n")


@pytest.mark.parametrize("kind", [NumericsError, ResourceError])
def test_a_persistent_error_ends_the_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[LoraError]
) -> None:
    chat = opened(folder_of(tmp_path, task=CHAT))

    def generate(*_: Any) -> list[str]:
        raise kind("broken")

    monkeypatch.setattr(chat[0], "generate", generate)
    with pytest.raises(kind, match="broken"):
        talk(chat, "one", "two")


def test_a_classifier_answers_line_by_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "encoder")
    runner = CliRunner()
    texts = ["great fun", "slow and dull"]
    wanted = runner.invoke(app, ["predict", "--adapter", str(folder), *texts])
    found = runner.invoke(
        app, ["predict", "--adapter", str(folder), "--interactive"], input="\n".join(texts)
    )
    assert found.exception is None
    assert found.stdout == wanted.stdout


def test_a_pipe_is_answered_to_its_end(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, task=CHAT)
    arguments = ["predict", "--adapter", str(folder), "--interactive"]
    result = CliRunner().invoke(app, arguments, input="great\n/reset\ngreat\n/quit\nmore\n")
    assert result.exception is None
    first = CliRunner().invoke(app, ["predict", "--adapter", str(folder), "great"])
    assert result.stdout == first.stdout * 2
    assert "> " not in result.stdout  # a pipe gets no prompt
    assert "the conversation starts over" in result.stderr


@pytest.mark.parametrize("more", [["text"], ["--input", "a", "--output", "b"], ["--json"]])
def test_interactive_excludes_other_inputs(tmp_path: Path, more: list[str]) -> None:
    result = CliRunner().invoke(app, ["predict", "--adapter", ".", "--interactive", *more])
    assert isinstance(result.exception, LoraError)
    assert "`--interactive` excludes" in str(result.exception)


def test_a_line_of_any_length_is_skipped_in_bounded_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversation, "MAX_LINE_CHARACTERS", 10)
    sizes, notes = list[int](), list[str]()

    class Recording(io.StringIO):
        def readline(self, size: int | None = -1) -> str:  # type: ignore[override]
            sizes.append(-1 if size is None else size)
            return super().readline(size)

    stream = Recording("short\n" + "x" * 95 + "\n123456789\n" + "y" * 10 + "\nlast" + "z" * 50)
    lines = []
    while line := conversation.read_line(stream, notes.append):
        lines.append(line)
    assert lines == ["short\n", "123456789\n"]
    assert len(notes) == 3
    assert set(sizes) == {10}
