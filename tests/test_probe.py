"""Tests that the probe distinguishes an adapted model from its base, locally and on a server."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_translators
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CanineConfig,
    CanineForSequenceClassification,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    PretrainedConfig,
)
from typer.testing import CliRunner

from lora_cli.cli.app import app
from lora_cli.errors import IntegrityError, LoraError, ResourceError
from lora_cli.evaluation.probe import read_probe
from lora_cli.files import write_manifest
from lora_cli.recipe import load_recipe
from lora_cli.training import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a base and an adapter that was trained on it."""
    top = tmp_path_factory.mktemp("probe")
    base = tiny.save_llama(top / "base", tied=False)
    optimizer = {"learning_rate": 0.05}
    train(load_recipe(tiny.recipe(base, top, train={"max_steps": 4, "optimizer": optimizer})))
    return base, top / "out"


def check(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["check", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def changed(folder: Path, top: Path, change: Any) -> Path:
    """Copy an adapter, with changed tensors."""
    copy = Path(shutil.copytree(folder, top / "copy"))
    file = copy / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    write_manifest(copy)
    return copy


# ------------------------------------------------------------------------------------------ here


SMALL = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": tiny.POSITIONS,
}  # fmt: skip


@pytest.mark.parametrize(
    ("build", "absent", "config"),
    [
        (
            MobileBertForSequenceClassification,
            "eos_token_id",
            MobileBertConfig(
                embedding_size=16, true_hidden_size=32, intra_bottleneck_size=32,
                num_feedforward_networks=1, vocab_size=tiny.vocabulary(), **SMALL,
            ),
        ),
        (
            CanineForSequenceClassification,
            "vocab_size",  # its inputs are codes of characters
            CanineConfig(num_hash_buckets=tiny.POSITIONS, **SMALL),
        ),
    ],
)  # fmt: skip
def test_a_base_whose_configuration_lacks_a_size_is_probed(
    build: Any, absent: str, config: PretrainedConfig, tmp_path: Path
) -> None:
    assert not hasattr(config, absent)
    build(config).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    optimizer = {"learning_rate": 0.05}
    sections = {"adapter": {"target_modules": "all-linear"}, "train": {"optimizer": optimizer}}
    train(load_recipe(tiny.recipe(tmp_path / "base", tmp_path, **sections)))
    assert "the adapter is applied" in check("--adapter", str(tmp_path / "out"))


def test_training_writes_a_probe_with_the_outputs_of_peft(trained: tuple[Path, Path]) -> None:
    base, out = trained
    assert "probe.json" in json.loads((out / "manifest.json").read_text())["files"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    found = []
    prompts = read_probe(out).next_tokens
    assert len(prompts) >= 3
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out))
    for model in (plain, adapted.eval()):
        for prompt, *_ in prompts:
            with torch.no_grad():
                logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
            found.append(logits.log_softmax(-1).topk(10))
    for i, (_, base_side, adapted_side) in enumerate(prompts):
        for top, side in ((found[i], base_side), (found[len(prompts) + i], adapted_side)):
            texts = [tokenizer.decode([t]) for t in top.indices]
            words = [text.strip(" ") for text in texts]  # tokens that differ by a space are omitted
            wanted = {
                text: lp
                for text, lp in zip(texts, top.values.tolist(), strict=True)
                if words.count(text.strip(" ")) == 1 and "\ufffd" not in text
            }
            assert dict(side) == pytest.approx(wanted, abs=1e-4)
            assert wanted


def test_the_adapter_is_applied(trained: tuple[Path, Path]) -> None:
    assert "the adapter is applied" in check("--adapter", str(trained[1]))


def test_an_adapter_without_its_update_is_reported_as_the_base(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    def idle(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] *= 0.0 if "lora_B" in name else 1.0

    copy = changed(trained[1], tmp_path, idle)
    with pytest.raises(IntegrityError) as caught:
        check("--adapter", str(copy))
    assert "these are the base's outputs" in str(caught.value)


def test_an_adapter_with_another_scale_matches_neither(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    def halved(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] *= 0.5 if "lora_B" in name else 1.0

    with pytest.raises(IntegrityError, match="neither"):
        check("--adapter", str(changed(trained[1], tmp_path, halved)))


def test_a_classifier_has_a_probe_too(tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base")
    optimizer = {"learning_rate": 0.05}
    train(load_recipe(tiny.recipe(base, tmp_path, train={"optimizer": optimizer})))
    assert "the adapter is applied" in check("--adapter", str(tmp_path / "out"))
    with pytest.raises(LoraError, match="only adapters of language models"):
        check("--adapter", str(tmp_path / "out"), "--url", "http://127.0.0.1:9")


# ----------------------------------------------------------------------------------- at a server


@contextmanager
def serving(models: dict[str, Any], tokenizer: Any, form: str = "openai") -> Iterator[str]:
    """Serve models by name as OpenAI-style completions do; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self, value: Any, code: int = 200) -> None:
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self._answer({"data": [{"id": name} for name in models]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if asked["model"] not in models:
                return self._answer({"error": "no such model"}, 404)
            if form == "nonsense":
                return self._answer(b"<html>")
            if form == "no logprobs":
                return self._answer({"choices": [{"text": "x"}]})
            with torch.no_grad():
                ids = tokenizer(asked["prompt"], return_tensors="pt")
                logits = models[asked["model"]](**ids).logits[0, -1]
            top = logits.log_softmax(-1).topk(asked["logprobs"])
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            tokens = [(tokenizer.decode([i]), lp) for i, lp in pairs]
            if form == "with spaces":  # like llama.cpp for SentencePiece
                words = tokenizer.convert_ids_to_tokens(top.indices.tolist())
                tokens = [(words[n].replace("▁", " "), lp) for n, (_, lp) in enumerate(tokens)]
            if form in ("openai", "with spaces"):
                return self._answer({"choices": [{"logprobs": {"top_logprobs": [dict(tokens)]}}]})
            listed = [{"token": token, "logprob": lp} for token, lp in tokens]
            return self._answer(
                {"choices": [{"logprobs": {"content": [{"top_logprobs": listed}]}}]}
            )

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def models(trained: tuple[Path, Path]) -> dict[str, Any]:
    base, out = trained
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out)).eval()
    other = tiny.llama(tied=False, seed=5)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    return {
        "base": plain,
        "adapted": adapted,
        "other": other,
        "tokenizer": AutoTokenizer.from_pretrained(base),
    }


@pytest.mark.parametrize("form", ["openai", "content"])
@pytest.mark.parametrize("end", ["", "/v1", "/v1/completions"])
def test_a_server_with_the_adapter(
    trained: tuple[Path, Path], models: dict[str, Any], form: str, end: str
) -> None:
    with serving({"m": models["adapted"]}, models["tokenizer"], form) as url:
        assert "the adapter is applied" in check("--adapter", str(trained[1]), "--url", url + end)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Any]:
    """Return an adapter of a base with a SentencePiece tokenizer, its models, and the tokenizer."""
    top = tmp_path_factory.mktemp("sentencepiece")
    tokenizer = tiny_translators.tokenizer("marian")
    model = tiny.llama(tied=False)
    model.resize_token_embeddings(len(tokenizer))
    base = top / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    optimizer = {"learning_rate": 0.05}
    train(load_recipe(tiny.recipe(base, top, train={"max_steps": 4, "optimizer": optimizer})))
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), top / "out")
    return top / "out", {"base": plain, "adapted": adapted.eval()}, tokenizer


@pytest.mark.parametrize("form", ["openai", "with spaces"])
@pytest.mark.parametrize("probe", ["new", "old"])
def test_the_leading_space_of_a_token_is_ignored(
    sentencepiece: tuple[Path, dict[str, Any], Any], form: str, probe: str, tmp_path: Path
) -> None:
    out, models, tokenizer = sentencepiece
    if probe == "old":  # its tokens have no leading space
        out = Path(shutil.copytree(out, tmp_path / "out"))
        value = json.loads((out / "probe.json").read_text())
        for prompt in value["next_tokens"]:
            for side in ("base", "adapted"):
                prompt[side] = [(text.strip() or text, lp) for text, lp in prompt[side]]
        (out / "probe.json").write_text(json.dumps(value))
        write_manifest(out)
    with serving({"m": models["adapted"]}, tokenizer, form) as url:
        assert "the adapter is applied" in check("--adapter", str(out), "--url", url)
    with (
        serving({"m": models["base"]}, tokenizer, form) as url,
        pytest.raises(IntegrityError, match="these are the base's outputs"),
    ):
        check("--adapter", str(out), "--url", url)


@pytest.mark.parametrize(
    ("served", "said"), [("base", "these are the base's outputs"), ("other", "neither")]
)
def test_a_server_without_the_adapter(
    trained: tuple[Path, Path], models: dict[str, Any], served: str, said: str
) -> None:
    with (
        serving({"m": models[served]}, models["tokenizer"]) as url,
        pytest.raises(IntegrityError, match=said),
    ):
        check("--adapter", str(trained[1]), "--url", url)


def test_the_name_selects_one_of_several_models(
    trained: tuple[Path, Path], models: dict[str, Any]
) -> None:
    out, both = str(trained[1]), {"m": models["base"], "a": models["adapted"]}
    with serving(both, models["tokenizer"]) as url:
        assert "is applied" in check("--adapter", out, "--url", url, "--served-name", "a")
        with pytest.raises(IntegrityError, match="the base's"):
            check("--adapter", out, "--url", url, "--served-name", "m")
        with pytest.raises(LoraError, match="serves 2 models: m, a"):
            check("--adapter", out, "--url", url)
        with pytest.raises(LoraError, match="answered 404"):
            check("--adapter", out, "--url", url, "--served-name", "b")


@pytest.mark.parametrize(
    ("form", "said"), [("nonsense", "not JSON"), ("no logprobs", "no log-probabilities")]
)
def test_a_server_of_another_kind(
    trained: tuple[Path, Path], models: dict[str, Any], form: str, said: str
) -> None:
    with (
        serving({"m": models["base"]}, models["tokenizer"], form) as url,
        pytest.raises(LoraError, match=said),
    ):
        check("--adapter", str(trained[1]), "--url", url)


def test_no_server(trained: tuple[Path, Path]) -> None:
    with serving({}, None) as url:
        pass
    with pytest.raises(ResourceError, match="cannot be reached"):
        check("--adapter", str(trained[1]), "--url", url, "--served-name", "m")
