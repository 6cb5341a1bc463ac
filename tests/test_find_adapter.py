"""Finding adapters by folder, by subfolder, and by their id on a stand-in for the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapter_folders
import peft
import pytest
import tiny
import torch
import transformers.utils.hub
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

from lora_cli.adapters.find_adapter import find_adapter_folder, shown_name
from lora_cli.adapters.make_trainable import find_adapter
from lora_cli.cli import options
from lora_cli.cli.app import app
from lora_cli.errors import LoraError
from lora_cli.export.merge import merge_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE_WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter, which is next to its base."""
    top = tmp_path_factory.mktemp("trained")
    return adapter_folders.make(top, "trained", tiny.save_encoder(top / "base"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Run a stand-in for the Hub, with a cache of its own; the working directory is empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with HubServer() as server:
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # transformers keeps the address that the first test of the process had
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def files_of(folder: Path, before: str = "") -> dict[str, bytes]:
    return {
        f"{before}{file.relative_to(folder).as_posix()}": file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def reason(name: str) -> str:
    with pytest.raises(LoraError) as caught:
        find_adapter_folder(name, "--adapter")
    return str(caught.value)


@pytest.mark.slow
def test_a_repository_is_read_at_its_newest_commit_and_at_others(
    hub: HubServer, trained: Path
) -> None:
    first = hub.commit("user/name", files_of(trained))
    second = hub.commit("user/name", {"README.md": b"# newer"})
    hub.repositories["user/name"].refs["v1"] = first
    hub.repositories["user/name"].refs["refs/pr/1"] = first
    for name, commit in (
        ("user/name", second), ("user/name@main", second), ("user/name@v1", first),
        (f"user/name@{first}", first), ("user/name@refs/pr/1", first), ("hf://user/name", second),
    ):  # fmt: skip
        found = find_adapter_folder(name, "--adapter")
        assert found.name == commit, name
        assert (found / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
        assert shown_name(found) == f"user/name@{commit}"
    hub.commit("user/name", {"README.md": b"# newest"})
    assert find_adapter_folder("user/name", "--adapter").name not in (first, second)


def test_only_files_of_the_adapter_are_downloaded(hub: HubServer, trained: Path) -> None:
    more = {
        "model.safetensors": b"large",
        "optimizer.pt": b"x",
        "predictions/test.jsonl": b"x",
        "checkpoint-5/adapter_model.safetensors": b"x",
        "checkpoint-5/optimizer.pt": b"x",
    }
    files = files_of(trained)
    hub.commit("user/ours", files | more)
    hub.commit("user/theirs", {name: files[name] for name in (WEIGHTS, CONFIG)} | more)
    for name in ("user/ours", "user/theirs"):
        found = find_adapter_folder(name, "--adapter")
        assert (found / WEIGHTS).exists()
        assert not any((found / large).exists() for large in more)


@pytest.mark.slow
def test_adapters_in_subfolders(hub: HubServer, trained: Path, tmp_path: Path) -> None:
    both = files_of(trained, "first/") | files_of(trained, "second/")
    hub.commit("user/two", both)
    commit = hub.commit("user/inner", files_of(trained, "deep/er/"))
    assert find_adapter_folder("user/two/second", "--adapter").name == "second"
    assert "holds 2 adapters: `first`, `second`" in reason("user/two")
    assert f"`user/two/first@{hub.repositories['user/two'].refs['main']}`" in reason("user/two")
    found = find_adapter_folder("user/inner", "--adapter")
    assert (found / WEIGHTS).exists()
    assert shown_name(found) == f"user/inner/deep/er@{commit}"
    assert "holds no adapter in `third`" in reason("user/two/third")
    # the same for local folders
    (tmp_path / "here").mkdir()
    shutil.copytree(trained, tmp_path / "here/one")
    assert find_adapter_folder(str(tmp_path / "here"), "--adapter") == tmp_path / "here/one"
    shutil.copytree(trained, tmp_path / "here/two")
    assert f"name one of them, as `{tmp_path / 'here/one'}`" in reason(str(tmp_path / "here"))
    # an unnamed adapter in the folder itself is preferred
    shutil.copy(trained / CONFIG, tmp_path / "here")
    assert find_adapter_folder(str(tmp_path / "here"), "--adapter") == tmp_path / "here"


@pytest.mark.slow
def test_errors_of_the_hub_are_explained(hub: HubServer, trained: Path, monkeypatch: Any) -> None:
    for name in ("user/gated", "user/private"):
        hub.commit(name, files_of(trained))
    hub.repositories["user/gated"].gated = True
    hub.repositories["user/private"].private = True
    hub.commit("user/empty", {"README.md": b""})
    assert "`user/gated` is gated" in reason("user/gated")
    assert "the Hub has no `user/private` that you may read" in reason("user/private")
    assert "there is no folder user/absent here" in reason("user/absent")
    assert "has no revision `v9`" in reason("user/empty@v9")
    assert "`user/empty` holds no adapter" in reason("user/empty")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (find_adapter_folder("user/private", "--adapter") / WEIGHTS).exists()
    assert (find_adapter_folder("user/gated", "--adapter") / WEIGHTS).exists()
    hub.failing = 503
    assert "503" in reason("user/other")
    # what is in the cache can be used without the Hub
    assert (find_adapter_folder("user/private", "--adapter") / WEIGHTS).exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert (find_adapter_folder("user/private", "--adapter") / WEIGHTS).exists()
    assert "`HF_HUB_OFFLINE` is set" in reason("user/other")
    assert len(hub.asked) == asked


def test_a_local_folder_is_never_looked_up_on_the_hub(hub: HubServer, trained: Path) -> None:
    hub.commit("out/name", files_of(trained))
    shutil.copytree(trained, Path("out/here"))
    for name in ("out/here", "out/nmae", "./user/name", "/user/name", "nothing", "a b/c"):
        assert find_adapter_folder(name, "--adapter") == Path(name)
    assert hub.asked == []
    assert find_adapter_folder("hf://out/name", "--adapter").is_absolute()  # where one is meant


@pytest.mark.slow
def test_every_command_accepts_a_hub_id(hub: HubServer, trained: Path, tmp_path: Path) -> None:
    taken = {
        (name, parameter.name)
        for name, command in get_command(app).commands.items()
        for parameter in command.params
        if getattr(parameter.callback, "__wrapped__", parameter.callback) is options.find_adapter
        or "find_adapter" in str(getattr(parameter.callback, "__qualname__", ""))
    }
    every = {(n, "adapter") for n in ("eval", "predict", "export", "check")}
    assert taken >= every | {("eval", "against"), ("combine", "adapters"), ("combine", "head")}

    hub.commit("user/name", files_of(trained))
    expected = CliRunner().invoke(app, ["predict", "--adapter", str(trained), "a film"])
    found = CliRunner().invoke(app, ["predict", "--adapter", "user/name", "a film"])
    assert (found.exit_code, found.stdout) == (0, expected.stdout)
    merge = ["merge", "--adapter", "user/name:0.5", "--to", str(tmp_path / "merged")]
    assert CliRunner().invoke(app, merge).exit_code == 0


def test_a_training_starts_from_an_adapter_of_the_hub(hub: HubServer, trained: Path) -> None:
    hub.commit("user/name", files_of(trained))
    saved = find_adapter(tiny.recipe_of(**{"from": "user/name"}))
    assert saved.verified
    assert shown_name(saved.path).startswith("user/name@")


def test_adapters_of_diffusion_models_are_found(hub: HubServer) -> None:
    parts = {
        f"{part}/{name}": b"{}" for part in ("unet", "text_encoder") for name in (CONFIG, WEIGHTS)
    }
    hub.commit("user/parts", {**parts, "unet/optimizer.bin": b"large", "README.md": b"#"})
    found = find_adapter_folder("user/parts", "--adapter")
    assert files_of(found).keys() >= parts.keys()
    assert not (found / "unet/optimizer.bin").exists()

    hub.commit(
        "user/file", {"pytorch_lora_weights.safetensors": b"1", "vae/model.safetensors": b"2"}
    )
    found = find_adapter_folder("user/file", "--adapter")
    assert files_of(found) == {"pytorch_lora_weights.safetensors": b"1"}

    hub.commit("user/styles", {"a/one.safetensors": b"1", "two.safetensors": b"2"})
    for name, content in (("a/one", b"1"), ("two", b"2")):
        found = find_adapter_folder(f"user/styles/{name}.safetensors", "--adapter")
        assert found.read_bytes() == content
    assert "holds no adapter" in reason("user/styles")


def test_the_base_of_a_peft_adapter_is_read_at_its_revision(hub: HubServer, tmp_path: Path) -> None:
    """The configuration's `revision` is that of the base, as for PEFT's `AutoPeftModel`."""
    first, newer = (tiny.save_llama(tmp_path / f"{i}", tied=False, seed=i) for i in (1, 2))
    commit = hub.commit("user/base", files_of(first))
    hub.commit("user/base", files_of(newer))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(first)
    peft.get_peft_model(model, config, revision=commit).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / CONFIG
    file.write_text(file.read_text().replace(str(first), "user/base"))
    for folder in (first, newer):
        to = tmp_path / f"merged_{folder.name}"
        base = None if folder is first else str(newer)
        merge_adapter(base, tmp_path / "adapter", to)
        merged, expected = load_file(to / BASE_WEIGHTS), load_file(folder / BASE_WEIGHTS)
        assert torch.equal(merged["lm_head.weight"], expected["lm_head.weight"])
