"""Tests of the fingerprint of a base, and of rejecting a wrong base."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import lora
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)

from lora_cli.adapters.attach import disabled
from lora_cli.errors import IntegrityError
from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.files import sha256_of
from lora_cli.models.fingerprint import (
    BASE_FILE,
    Fingerprint,
    file_hashes,
    fingerprint_of,
    read_fingerprint,
    require_base,
)
from lora_cli.recipe import load_recipe
from lora_cli.tasks import build_task
from lora_cli.training import load_trainable_model
from lora_cli.training import run as training_run

WEIGHTS = "model.safetensors"
QUERY = "encoder.layer.0.attention.self.query.weight"
SAVE = {"encoder": tiny.save_encoder, "llama": tiny.save_llama, "gpt2": tiny.save_gpt2}


def fingerprint(base: Path, folder: Path, dtype: Any = None, **sections: Any) -> Fingerprint:
    """Return the fingerprint of a base as training computes it."""
    folder.mkdir(exist_ok=True)
    return fingerprint_from(tiny.recipe(base, folder, **sections), dtype)


def fingerprint_from(path: Path, dtype: Any = None) -> Fingerprint:
    recipe = load_recipe(path)
    task = build_task(recipe)
    task.load_processor()
    found = fingerprint_of(recipe, *task.load_model(torch.device("cpu"), dtype))
    assert found is not None
    return found


def edit(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def nudge(name: str) -> Callable[[dict[str, Tensor]], object]:
    """Change the lowest bit of one value."""

    def change(tensors: dict[str, Tensor]) -> None:
        full = next(n for n in tensors if n.endswith(name))
        tensors[full].view(torch.int32).view(-1)[5] ^= 1

    return change


def untied(base: Path) -> LlamaForCausalLM:
    """Return a tied model with an output layer of its own, as yet alike."""
    model = LlamaForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    return model


def rename(**names: str) -> Callable[[dict[str, Tensor]], object]:
    """Give each tensor the values of the one whose name has the other words."""

    def change(tensors: dict[str, Tensor]) -> None:
        pattern = "|".join(map(re.escape, names))
        old = dict(tensors)
        for name in old:
            tensors[name] = old[re.sub(pattern, lambda found: names[found[0]], name)].clone()

    return change


# -------------------------------------------------------------------------- what is the same base

COPIES: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "moved": ("encoder", shutil.copytree),
    "divided": (
        "encoder",
        lambda old, new: RobertaForMaskedLM.from_pretrained(old).save_pretrained(
            new, max_shard_size="20KB"
        ),
    ),
    "without prefix": (
        "encoder",
        lambda old, new: RobertaModel.from_pretrained(old, add_pooling_layer=False).save_pretrained(
            new
        ),
    ),
    "with a pooler that is new": (
        "encoder",
        lambda old, new: RobertaForSequenceClassification.from_pretrained(
            old, num_labels=5
        ).save_pretrained(new),
    ),
    "in the words of early BERTs": (
        "encoder",
        lambda old, new: (
            shutil.copytree(old, new),
            edit(
                new / WEIGHTS,
                lambda tensors: [
                    tensors.update({name.replace("Norm.weight", "Norm.gamma"): tensors.pop(name)})
                    for name in list(tensors)
                    if name.endswith("LayerNorm.weight")
                ],
            ),
        ),
    ),
    "both of a tie stored": (
        "llama",
        lambda old, new: (
            shutil.copytree(old, new),
            edit(
                new / WEIGHTS,
                lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
            ),
        ),
    ),
    "the other of a tie stored": (
        "llama",
        lambda old, new: (
            shutil.copytree(old, new),
            edit(
                new / WEIGHTS,
                lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
            ),
        ),
    ),
    "untied, and alike": ("llama", lambda old, new: untied(old).save_pretrained(new)),
    "a language model without its prefix": (
        "llama",
        lambda old, new: LlamaModel.from_pretrained(old).save_pretrained(new),
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save(folder / kind) for kind, save in SAVE.items()}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.slow_after(4)
def test_a_copy_of_the_base_is_the_same_base(
    copy: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    kind, save = COPIES[copy]
    new = tmp_path / "copy"
    save(bases[kind], new)
    tiny.tokenizer("encoder" if kind == "encoder" else "llama").save_pretrained(new)
    before = fingerprint(bases[kind], tmp_path / "one")
    after = fingerprint(new, tmp_path / "two")
    assert before.tensors.keys() >= {"norm.weight" if kind == "llama" else QUERY}
    assert after.tensors == before.tensors
    assert after.total == before.total


@pytest.mark.parametrize("kind", SAVE)
def test_the_dtype_of_loading_does_not_matter(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    found = [fingerprint(bases[kind], tmp_path, dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert found[0] == found[1]
    assert len(found[0].tensors) >= 20


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_snapshot_in_the_cache_of_the_hub_is_the_same_base(
    size: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """As the Hub's client lays it out: links to files that are named by their hash."""
    name = f"user/base-{size.lower()}"
    cache = Path(os.environ["HF_HOME"]) / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = cache / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    for folder in (snapshot, cache / "refs", cache / "blobs"):
        folder.mkdir(parents=True)
    (cache / "refs/main").write_text(snapshot.name)
    RobertaForMaskedLM.from_pretrained(bases["encoder"]).save_pretrained(
        tmp_path / "saved", max_shard_size=size
    )
    tiny.tokenizer().save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        shutil.copy(file, cache / "blobs" / f"of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/of-{file.name}")
    assert (snapshot / "model.safetensors.index.json").exists() == (size == "20KB")
    (tmp_path / "hub").mkdir()
    path = tiny.recipe(bases["encoder"], tmp_path / "hub", model={"name": name})
    found = fingerprint_from(path)
    assert found.name == name
    assert found.tensors == fingerprint(bases["encoder"], tmp_path / "one").tensors


def test_the_head_does_not_count(bases: dict[str, Path], tmp_path: Path) -> None:
    base = tiny.save_encoder(tmp_path / "base", ["bad", "good"])
    before = fingerprint(base, tmp_path)
    assert not [name for name in before.tensors if "classifier" in name]
    edit(base / WEIGHTS, nudge("classifier.out_proj.weight"))
    assert fingerprint(base, tmp_path) == before


OTHERS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object]]] = {
    "a bit of a weight": ("encoder", nudge(QUERY)),
    "a bit of a bias": ("encoder", nudge("layer.1.output.LayerNorm.bias")),
    "a bit of the embedding": ("llama", nudge("embed_tokens.weight")),
    "two swapped": ("llama", rename(up_proj="gate_proj", gate_proj="up_proj")),
    "another dtype": ("llama", lambda t: t.update({n: v.bfloat16() for n, v in t.items()})),
    "the order of layers": ("gpt2", rename(**{".h.0.": ".h.1.", ".h.1.": ".h.0."})),
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_base_of_the_same_shape_has_another_fingerprint(
    change: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    kind, spoil = OTHERS[change]
    shutil.copytree(bases[kind], tmp_path / "copy")
    edit(tmp_path / "copy" / WEIGHTS, spoil)
    before = fingerprint(bases[kind], tmp_path / "one")
    after = fingerprint(tmp_path / "copy", tmp_path / "two")
    assert before.differing(after)
    assert before.total != after.total


def test_a_base_with_additional_tensors_is_another_base(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """An untied output layer; and a third layer, on which an adapter of two says nothing."""
    before = fingerprint(bases["llama"], tmp_path / "one")
    model = untied(bases["llama"])
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "untied")
    config = AutoConfig.from_pretrained(bases["llama"], num_hidden_layers=3)
    deeper = LlamaForCausalLM(config)
    deeper.load_state_dict(LlamaForCausalLM.from_pretrained(bases["llama"]).state_dict(), False)
    deeper.save_pretrained(tmp_path / "deeper")
    for name in ("untied", "deeper"):
        tiny.tokenizer("llama").save_pretrained(tmp_path / name)
    other = fingerprint(tmp_path / "untied", tmp_path / "two")
    assert before.differing(other) == ["lm_head.weight"]
    more = before.differing(fingerprint(tmp_path / "deeper", tmp_path / "two"))
    assert len(more) == 9
    assert all(name.startswith("layers.2.") for name in more)


def test_hashing_takes_less_than_two_seconds_a_gigabyte(tmp_path: Path) -> None:
    """Measured in CPU time, since other processes may run."""
    file = tmp_path / WEIGHTS
    save_file({f"w{i}": torch.randn(1024, 1024) for i in range(32)}, file)
    before = time.process_time()
    hashes = file_hashes(file)
    assert time.process_time() - before < 2 * file.stat().st_size / 2**30
    assert len(set(hashes.values())) == 32


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", "[" * 100_000, '{"tensors": []}', '{"tensors": {}}'],
)
def test_a_broken_fingerprint_is_an_integrity_error(text: str, tmp_path: Path) -> None:
    (tmp_path / BASE_FILE).write_text(text)
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_fingerprint(tmp_path)


def test_a_fingerprint_with_an_inconsistent_hash_is_rejected(tmp_path: Path) -> None:
    earlier = ({"name": "other", "fingerprint": "00"},)
    written = Fingerprint("base", "main", {"a": "01", "b": "02"}, earlier)
    written.write(tmp_path)
    assert read_fingerprint(tmp_path) == written
    file = tmp_path / BASE_FILE
    file.write_text(file.read_text().replace('"02"', '"03"'))
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_fingerprint(tmp_path)


def test_a_missing_fingerprint_causes_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    some, recipe = Fingerprint("base", "main", {"a": "01"}), tiny.recipe_of()
    assert require_base(some, None, recipe, "the adapter out") is None
    assert require_base(None, some, recipe, "the adapter out") == some
    assert require_base(some, some, recipe, "the adapter out") == some
    assert require_base(None, None, recipe, "the adapter out") is None
    assert capsys.readouterr().err.splitlines() == [
        "warning: the adapter out was trained on `base`; whether this is its base could not be "
        "verified",
        "warning: the adapter out has no base.json: whether this is its base could not be verified",
    ]


# --------------------------------------------------------------------------- who refuses another


class Trained:
    """An adapter on a base, and a base of the same shape with one bit changed."""

    def __init__(self, folder: Path, **adapter: Any) -> None:
        folder.mkdir()
        self.folder = folder
        self.base = tiny.save_encoder(folder / "base")
        self.recipe = tiny.recipe(
            self.base, folder, adapter=adapter,
            data={"train": "rows.jsonl", "test": "rows.jsonl", "check": {"max_overlap": 1.0}},
            train={"max_steps": 2, "optimizer": {"type": "adamw", "learning_rate": 0.01}},
            checkpoint={"every_steps": 1},
        )  # fmt: skip
        rows = [{"text": text, "label": i % 2} for i, text in enumerate(tiny.CORPUS)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "rows.jsonl").write_text(text, encoding="utf-8")
        self.out = folder / "out"
        run = lora("train", self.recipe)
        assert run.code == 0, run.err
        self.other = folder / "other"
        shutil.copytree(self.base, self.other)
        edit(self.other / WEIGHTS, nudge(QUERY))

    def command(self, name: str, base: Path, *more: object) -> tuple[object, ...]:
        on = ("--set", f"model.name={base}")
        to = self.folder / f"{name}-{base.name}-{len(more)}"
        return {
            "eval": ("eval", "--adapter", self.out, *on, *more),
            "predict": ("predict", "--adapter", self.out, "a warm film", *on, *more),
            "merge": ("merge", "--base", base, "--adapter", self.out, "--to", to, *more),
            "train": (
                "train", self.recipe, *on, "-o", to,
                "--set", f"adapter={{from: {json.dumps(str(self.out))}}}", *more,
            ),
        }[name]  # fmt: skip


@pytest.fixture(scope="module", params=["lora", "none", "bitfit"])
def trained(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained") / "run", type=request.param)


ALLOW = ("--set", "model.allow_other_base=true")


@pytest.mark.parametrize("command", ["eval", "predict", "merge", "train"])
@pytest.mark.slow_after(1)
def test_another_base_is_rejected_unless_allowed(command: str, trained: Trained) -> None:
    rejected = lora(*trained.command(command, trained.other))
    assert rejected.code == 4, rejected.err
    assert f"`{trained.other}` is not the base that the adapter {trained.out} was trained on" in (
        rejected.err
    )
    assert f"`{QUERY}` differs" in rejected.err
    assert "--set model.allow_other_base=true" in rejected.err
    allowed = lora(*trained.command(command, trained.other, *ALLOW))
    assert allowed.code == 0, allowed.err
    assert allowed.err.count("warning: `") == 1
    assert "`model.allow_other_base` allows it" in allowed.err
    same = lora(*trained.command(command, trained.base))
    assert same.code == 0, same.err
    assert "not the base" not in same.err


@pytest.mark.slow_after(1)
def test_an_allowed_base_is_recorded(trained: Trained) -> None:
    ours = read_fingerprint(trained.out)
    assert ours is not None
    assert json.loads((trained.out / "report.json").read_text())["base"] == ours.facts
    earlier = [{"name": str(trained.base), "fingerprint": ours.total}]
    for command, kept in (("merge", "merge.json"), ("train", "report.json")):
        arguments = trained.command(command, trained.other, *ALLOW, *ALLOW)
        assert lora(*arguments).code == 0
        to = Path(str(arguments[arguments.index("--to" if command == "merge" else "-o") + 1]))
        facts = json.loads((to / kept).read_text())["base"]
        assert facts["earlier"] == earlier
        assert facts["name"] == str(trained.other)
        assert facts["fingerprint"] != ours.total
    kept_beside = read_fingerprint(to)
    assert kept_beside is not None
    assert list(kept_beside.earlier) == earlier


@pytest.mark.slow_after(1)
def test_the_recipe_of_an_adapter_cannot_allow_another_base(
    trained: Trained, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained.out, out)
    file = out / "recipe.yaml"
    text = file.read_text().replace(str(trained.base), str(trained.other))
    file.write_text(text.replace("allow_other_base: false", "allow_other_base: true"))
    assert load_recipe(file).model.allow_other_base
    for command in (("eval",), ("predict", "a warm film")):
        assert lora(*command, "--adapter", out).code == 4
    # the user's own recipe does
    own = lora("eval", "--adapter", out, "--recipe", file)
    assert own.code == 0, own.err
    assert "allows it" in own.err


def test_every_checkpoint_has_the_fingerprint(trained: Trained) -> None:
    folders = [trained.out, *(trained.out / "checkpoints").iterdir()]
    assert len(folders) == 3
    for folder in folders:
        assert BASE_FILE in json.loads((folder / "manifest.json").read_text())["files"]
    assert len({(folder / BASE_FILE).read_bytes() for folder in folders}) == 1
    assert (trained.out / BASE_FILE).stat().st_size < 200 * 40


@pytest.mark.slow_after(1)
def test_an_adapter_without_fingerprint_warns(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained.out, out)
    (out / BASE_FILE).unlink()
    (out / "manifest.json").unlink()
    for command in ("eval", "merge"):
        to = ("--base", trained.other, "--to", tmp_path / "merged") if command == "merge" else ()
        result = lora(command, "--adapter", out, *to)
        assert result.code == 0, result.err
        assert f"warning: the adapter {out} has no base.json" in result.err


def test_full_fine_tuning_has_no_base(tmp_path: Path) -> None:
    run = Trained(tmp_path / "run", type="full")
    assert not list(run.out.rglob(BASE_FILE))
    result = lora("predict", "--adapter", run.out, "a warm film")
    assert result.code == 0, result.err
    assert "warning" not in result.err


@pytest.mark.slow
def test_a_run_does_not_resume_with_another_base(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Trained(folder, type="lora")
    weights = (run.base / WEIGHTS).read_bytes()
    shutil.rmtree(run.out)
    with pytest.MonkeyPatch.context() as patch:
        real, count = training_run.train_step, iter(range(9))

        def step(*arguments: Any) -> Any:
            if next(count) == 1:
                raise KeyError("pulled the plug")
            return real(*arguments)

        patch.setattr(training_run, "train_step", step)
        assert lora("train", run.recipe).code == 1
    shutil.copytree(run.out, tmp_path / "copy")
    edit(run.base / WEIGHTS, nudge(QUERY))
    rejected = lora("train", run.recipe, "--resume")
    assert rejected.code == 4
    assert f"is not the base that the run {run.out} was trained on: `{QUERY}` differs" in (
        rejected.err
    )
    allowed = lora("train", run.recipe, "--resume", *ALLOW)
    assert allowed.code == 0, allowed.err
    assert "`model.allow_other_base` allows it" in allowed.err
    report = json.loads((run.out / "report.json").read_text())
    before = read_fingerprint(tmp_path / "copy/checkpoints/step-000001")
    assert before is not None
    assert report["base"]["earlier"] == [{"name": str(run.base), "fingerprint": before.total}]
    # and with the right one it goes on as ever
    shutil.rmtree(run.out)
    shutil.copytree(tmp_path / "copy", run.out)
    (run.base / WEIGHTS).write_bytes(weights)
    same = lora("train", run.recipe, "--resume")
    assert same.code == 0, same.err
    assert json.loads((run.out / "report.json").read_text())["base"]["earlier"] == []


# ------------------------------------------------------------------------------------- merging


def tokens(seed: int = 3) -> Tensor:
    return torch.randint(4, 200, (3, 11), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(folder: Path, **options: Any) -> Tensor:
    """Return what anybody gets from a model folder."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    auto = AutoModelForSequenceClassification if "Sequence" in kind else AutoModelForCausalLM
    return auto.from_pretrained(folder, **options).eval()(tokens()).logits


def llama_run(folder: Path, dtype: torch.dtype, **adapter: Any) -> tuple[Path, Path]:
    """Return a base in a dtype, and an adapter that was trained on it until it says other words."""
    base = tiny.save_llama(folder / "base")
    LlamaForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    rows = [{"text": text} for text in tiny.CORPUS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tiny.recipe(
        base, folder, adapter={"rank": 4, "alpha": 32, **adapter}, data={"train": "rows.jsonl"},
        train={"max_steps": 4, "optimizer": {"type": "adamw", "learning_rate": 0.1}},
    )  # fmt: skip
    run = lora("train", path)
    assert run.code == 0, run.err
    return base, folder / "out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.slow_after(1)
def test_what_is_merged_is_base_and_adapter_and_not_the_base(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """With a tied head; and read again it is what was in memory, to the last bit."""
    base, out = llama_run(tmp_path, dtype, target_modules=["q_proj", "down_proj"])
    in_memory: list[Tensor] = []
    real = PreTrainedModel.save_pretrained

    @torch.no_grad()
    def save(model: PreTrainedModel, *rest: Any, **options: Any) -> None:
        in_memory.append(model(tokens()).logits)
        real(model, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", save)
        merged = lora("merge", "--base", base, "--adapter", out, "--to", tmp_path / "merged")
    assert merged.code == 0, merged.err
    assert torch.equal(logits(tmp_path / "merged", dtype=dtype), in_memory[0])
    plain, theirs = (logits(f, dtype=torch.float32) for f in (base, tmp_path / "merged"))
    recipe = load_recipe(out / "recipe.yaml", ["train.precision=fp32"])
    _, model, _ = open_adapter(out, recipe)
    with torch.no_grad():
        ours = model(tokens()).logits
    scale = float(ours.abs().max())
    exact = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert float((theirs - ours).abs().max()) <= exact * scale
    assert float((theirs - plain).abs().max()) > 0.1 * scale


@pytest.mark.slow_after(1)
def test_an_adapter_is_not_merged_twice(trained: Trained) -> None:
    once = trained.folder / "once"
    first = lora("merge", "--base", trained.base, "--adapter", trained.out, "--to", once)
    assert first.code == 0, first.err
    again = ("merge", "--base", once, "--adapter", trained.out, "--to")
    kind = load_recipe(trained.out / "recipe.yaml").adapter.type
    second = lora(*again, trained.folder / "twice")
    if kind == "none":  # the head replaces a head, so that twice is once
        assert second.code == 0, second.err
        assert torch.equal(logits(trained.folder / "twice"), logits(once))
        return
    assert second.code == 4
    assert "is not the base that the adapter" in second.err
    assert not (trained.folder / "twice").exists()
    third = lora(*again, trained.folder / "thrice", *ALLOW)
    assert third.code == 0, third.err
    assert json.loads((trained.folder / "thrice/merge.json").read_text())["base"]["earlier"]


@pytest.mark.parametrize(
    "quantised",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
    ],
)
def test_merging_into_a_quantised_base_is_rejected(
    quantised: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(bases["llama"], tmp_path / "quantised"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    _, out = llama_run(tmp_path, torch.float32)
    rejected = lora("merge", "--base", base, "--adapter", out, "--to", tmp_path / "merged")
    assert rejected.code == 2
    assert "are stored quantised, by " in rejected.err
    assert "name the checkpoint that it was made from" in rejected.err
    assert not (tmp_path / "merged").exists()


# ----------------------------------------------------------------------------- the base is frozen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "none", "bitfit"])
@pytest.mark.slow_after(1)
def test_training_does_not_change_the_base(kind: str, precision: str, tmp_path: Path) -> None:
    """On disk and in memory: with the adapter disabled, the model is the base, bit for bit."""
    held: list[PreTrainedModel] = []
    real = load_trainable_model.make_trainable

    def keep(model: PreTrainedModel, *rest: Any) -> Any:
        held.append(model)
        return real(model, *rest)

    base = tiny.save_encoder(tmp_path / "base")
    hashes = {file.name: sha256_of(file) for file in base.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_trainable_model, "make_trainable", keep)
        path = tiny.recipe(
            base, tmp_path, adapter={"type": kind},
            train={"max_steps": 3, "precision": precision,
                   "optimizer": {"type": "adamw", "learning_rate": 0.05}},
        )  # fmt: skip
        run = lora("train", path)
    assert run.code == 0, run.err
    for command in ("eval", "predict", "merge"):
        more = {"eval": ["--split", "train"], "predict": ["a film"],
                "merge": ["--base", base, "--to", tmp_path / "merged"]}[command]  # fmt: skip
        assert lora(command, "--adapter", tmp_path / "out", *more).code == 0
    assert {file.name: sha256_of(file) for file in base.iterdir()} == hashes
    model = held[0].eval()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    fresh = RobertaModel.from_pretrained(base, dtype=dtype, add_pooling_layer=False).eval()
    frozen = dict(model.base_model.named_parameters())
    frozen = {name.replace(".base.", "."): p for name, p in frozen.items() if ".lora_" not in name}
    changed = [name for name, p in fresh.named_parameters() if not same(p, frozen[name])]
    assert all(name.endswith(".bias") for name in changed)
    assert bool(changed) == (kind == "bitfit")
    if kind != "bitfit":
        with torch.no_grad(), disabled(model):
            ours, theirs = (m(tokens()).last_hidden_state for m in (model.base_model, fresh))
        assert torch.equal(ours, theirs)


def same(one: Tensor, other: Tensor) -> bool:
    """Compare bit for bit; what is trained is float32, whatever the base is."""
    return torch.equal(one.float(), other.float())
