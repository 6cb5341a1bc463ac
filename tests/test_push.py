"""`lora push`: what is uploaded, what is not, and how errors of the Hub are reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard, constants
from test_find_adapter import hub, trained

from lora_cli.adapters.find_adapter import find_adapter_folder
from lora_cli.errors import LoraError
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.export.push import push_adapter, shortened_paths
from lora_cli.files import verify_manifest, write_manifest
from lora_cli.recipe import load_adapter_recipe

__all__ = ["hub", "trained"]
CARD = """---
library_name: peft
tags: [lora]
---
# A card

Trained on `{rows}` by `lora train {rows} -o /home/someone/out`, see https://huggingface.co/a/b.
A key: hf_abcdefghijklmnopqrstuvwxyz
"""


@pytest.fixture(autouse=True)
def token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of an adapter with a card, and with files that are nobody's business."""
    folder = shutil.copytree(trained, tmp_path / "adapter")
    rows = load_adapter_recipe(folder).data.path
    (folder / "README.md").write_text(CARD.format(rows=rows))
    (folder / "predictions").mkdir()
    (folder / "predictions/test.jsonl").write_text("{}")
    (folder / "report.json").write_text("{}")
    (folder / "learning_curve.png").write_bytes(b"png")
    return folder


def files_on(hub: HubServer, name: str, revision: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[name]
    return repository.commits[repository.refs[revision]]


def test_the_uploaded_adapter_contains_no_local_paths(
    hub: HubServer, adapter: Path, tmp_path: Path
) -> None:
    pushed = push_adapter(adapter, "user/new", base="owner/base")
    found = files_on(hub, "user/new")
    listed = set(json.loads((adapter / "manifest.json").read_text())["files"])
    more = {"README.md", "recipe.yaml", "learning_curve.png", "manifest.json"}
    assert set(found) == listed | more | {".gitattributes"}
    assert pushed.files == sorted(listed | more)
    assert pushed.address.startswith(f"{hub.address}/user/new/commit/")
    assert (
        found["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    )
    for name, content in found.items():
        assert str(adapter.parent).encode() not in content, name
        assert b"/home/someone" not in content, name
        assert b"hf_abc" not in content, name
    assert json.loads(found["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    recipe = yaml.safe_load(found["recipe.yaml"])
    assert (recipe["model"]["name"], recipe["data"]["path"]) == ("owner/base", "rows.jsonl")
    card = ModelCard(found["README.md"].decode())
    assert (card.data.base_model, card.data.tags) == ("owner/base", ["lora"])
    assert "https://huggingface.co/a/b" in card.text
    # the Hub's own check of the card was asked before the commit
    assert hub.asked.index("POST /api/validate-yaml") < len(hub.asked) - 1


@pytest.mark.slow
def test_what_was_uploaded_can_be_used_by_its_id(
    hub: HubServer, adapter: Path, trained: Path
) -> None:
    push_adapter(adapter, "user/new", base="owner/base")
    folder = find_adapter_folder("user/new", "--adapter")
    assert verify_manifest(folder)
    base = json.dumps(str(trained.parent / "base"))
    recipe = load_adapter_recipe(folder, [f"model.name={base}"])
    assert open_adapter(folder, recipe)[1] is not None


def test_a_branch_and_a_private_repository(hub: HubServer, adapter: Path) -> None:
    push_adapter(adapter, "team/new", private=True, revision="trial", base="owner/base")
    assert hub.repositories["team/new"].private
    assert set(files_on(hub, "team/new")) == {".gitattributes"}
    assert "adapter_config.json" in files_on(hub, "team/new", "trial")
    push_adapter(adapter, "user/open", base="owner/base")
    with pytest.raises(LoraError, match="anybody may read it"):
        push_adapter(adapter, "user/open", private=True, base="owner/base")


def test_what_is_rejected_before_anything_is_sent(
    hub: HubServer, adapter: Path, tmp_path: Path
) -> None:
    def reason(**options: Any) -> str:
        with pytest.raises(LoraError) as caught:
            push_adapter(**{"adapter": adapter, "to": "user/new", "base": "owner/base", **options})
        return str(caught.value)

    assert "nobody else has" in reason(base=None)
    for name in ("new", "user/a--b", "/tmp/x", "user/name/more", "us er/x"):
        assert "no id of a repository" in reason(to=name)
        assert "no id of a repository" in reason(base=name)
    assert "there is no folder" in reason(adapter=tmp_path / "nowhere")
    (tmp_path / "theirs").mkdir()
    assert "another tool made it" in reason(adapter=tmp_path / "theirs")
    card = (adapter / "README.md").read_text()
    (adapter / "README.md").write_text(card.replace("tags: [lora]", "tags: [lora, {a: 1}]"))
    assert "no list of words" in reason()
    (adapter / "README.md").write_text(card.replace("library_name: peft", "datasets: [./rows.csv]"))
    assert "no id of the Hub" in reason()
    (adapter / "README.md").write_text(card.replace("tags: [lora]", "tags: [lora"))
    assert "the head of the card cannot be read" in reason()
    (adapter / "README.md").write_text(card)
    config = json.loads((adapter / "tokenizer_config.json").read_text())
    place = str(load_adapter_recipe(adapter).model.name)
    (adapter / "tokenizer_config.json").write_text(json.dumps({**config, "made_from": place}))
    (adapter / "manifest.json").unlink()
    write_manifest(adapter)
    assert "`tokenizer_config.json` names a place of this machine" in reason()
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "adapter_model.safetensors" in reason()
    assert not any("POST" in request for request in hub.asked)


@pytest.mark.slow
def test_errors_of_the_hub_are_explained(
    hub: HubServer, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(to: str = "user/new") -> str:
        with pytest.raises(LoraError) as caught:
            push_adapter(adapter, to, base="owner/base")
        return str(caught.value)

    assert "does not let you write `other/new`" in reason("other/new")
    hub.rejected_card = '"license" must be one of a list'
    assert "rejects the card" in reason()
    hub.failing = 500
    assert "500" in reason()
    hub.failing, hub.rejected_card = None, None
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 5)
    assert "does not know who you are" in reason()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "`HF_HUB_OFFLINE` is set" in reason()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from `/home/me/data/rows.csv` on", "from `rows.csv` on"),
        ("-o ~/runs/out/", "-o out"),
        ("https://huggingface.co/a/b and user/name, and/or 1/2", None),
        ("model /data/a and s3://bucket/key/x", "model a and s3://bucket/key/x"),
    ],
)
def test_paths_are_shortened_and_urls_are_not(text: str, expected: str | None) -> None:
    assert shortened_paths(text) == (text if expected is None else expected)


@pytest.mark.slow
def test_a_template_file_of_the_recipe_is_uploaded_too(hub: HubServer, tmp_path: Path) -> None:
    import adapter_folders

    base = tiny.save_llama(tmp_path / "llama")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"},
                                 {"role": "assistant", "content": "b"}]}) + "\n")  # fmt: skip
    task = {"type": "causal_lm", "messages_column": "messages", "chat_template": "chat.jinja",
            "train_on": "all", "text_column": None}  # fmt: skip
    folder = adapter_folders.make(
        tmp_path, "chat", base, task=task, data={"path": "rows.jsonl"},
        adapter={"target_modules": ["q_proj"]},
    )  # fmt: skip
    push_adapter(folder, "user/chat", base="owner/base")
    assert files_on(hub, "user/chat")["chat.jinja"].decode() == template
    found = find_adapter_folder("user/chat", "--adapter")
    assert load_adapter_recipe(found).task.type == "causal_lm"
