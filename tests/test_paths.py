from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from lora_cli.errors import LoraError
from lora_cli.paths import expanded, path_problem
from lora_cli.recipe import load_recipe


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


WRONG = {
    "$HOME/x": "contains a variable",
    "${HOME}/x": "contains a variable",
    "data/$SECRET.csv": "contains a variable",
    "x ": "ends with a space",
    " x": "begins with a space",
    "x\n": "ends with a space",
    "a\u200bb": "contains an invisible character",
    "file:///a/x": "is an address",
    "FILE:/a/x": "is an address",
    "s3://bucket/x": "is an address",
    "https://huggingface.co/a/b": "is an address",
    "x.jsonl?token=abc": "ends with the parameters of an address",
    "a/x.csv.gz?download=true": "ends with the parameters of an address",
    "~no-such-user-at-all/x": "there is no user `no-such-user-at-all`",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_path_that_means_something_else(
    text: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "of no concern")
    problem = path_problem(text, "somewhere")
    assert problem is not None
    assert WRONG[text] in problem.what
    assert "of no concern" not in str(problem)
    if "HOME" in text:
        assert str(home / "x") in (problem.hint or "")
    if text.startswith("file"):
        assert problem.hint == "write `/a/x`"
    if "huggingface" in text:
        assert problem.hint == "on the Hub it is called `a/b`"
    if "/" not in text and text.isprintable():  # what is there may be called anything
        (tmp_path / text).touch()
        assert path_problem(text, "somewhere") is None


@pytest.mark.parametrize(
    "text",
    ["a/b", "out", "~/x", "~", "/a b/c", "a:b", "x$", "train.{a,b}.txt", "x?.csv", "run?lr=1"],
)
def test_a_path_that_is_one(text: str, home: Path) -> None:
    assert path_problem(text, "somewhere") is None
    assert expanded(text) == text.replace("~", str(home))


KEYS = ("model.name", "adapter.from", "checkpoint.mirror", "data.path", "data.train",
        "data.validation", "data.test", "task.chat_template", "output_dir")  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_every_path_of_a_recipe(key: str, home: Path, tmp_path: Path) -> None:
    """`output_dir: ~/x` made a folder called `~`."""
    chat = {"task": {"type": "causal_lm", "messages_column": "m", "format": "openai"}}
    path = tiny.recipe("base", tmp_path, **(chat if "template" in key else {}))

    def load(value: str) -> object:
        found: object = load_recipe(path, [f"{key}={json.dumps(value)}"])
        for part in key.replace("from", "from_").split("."):
            found = getattr(found, part)
        return found

    assert load("~/x.csv") == str(home / "x.csv")
    for value in ("$HOME/x.csv", "x.csv "):
        with pytest.raises(LoraError) as caught:
            load(value)
        assert key in str(caught.value)
        assert caught.value.problems[0].hint
    if key != "checkpoint.mirror":  # which takes an address
        with pytest.raises(LoraError, match="is an address"):
            load("file:///x.csv")
