"""Models, adapters and recipes of somebody else: no code of theirs runs, and no secret leaves."""

from __future__ import annotations

import ast
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from commands import lora

import lora_cli
from lora_cli.errors import IntegrityError
from lora_cli.files import MANIFEST, sha256_of, verify_manifest, write_json
from lora_cli.models.find_base import locate, shard_names
from lora_cli.redaction import redacted

HOME = Path(lora_cli.__file__).parent


# -------------------------------------------------------------------------------- in the code


def test_nothing_in_the_code_unpickles_or_runs_text() -> None:
    """`torch.load`, `pickle`, `eval`, `exec` and YAML's unsafe loaders appear nowhere."""
    found = []
    for file in sorted(HOME.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if word := _dangerous(node):
                found.append(f"{file.relative_to(HOME)}:{getattr(node, 'lineno', 0)}: {word}")
    assert not found


PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNNERS = {"eval", "exec", "compile", "__import__"}
LOADERS = {"load", "load_all", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all"}


def _dangerous(node: ast.AST) -> str:
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
        return next((n for n in names if n.partition(".")[0] in PICKLERS), "")
    if not isinstance(node, ast.Call):
        return ""
    called = ast.unparse(node.func)
    if called in RUNNERS or called in ("torch.load", "os.system"):
        return called
    if called in ("np.load", "numpy.load"):
        return "" if ast.unparse(node).endswith("allow_pickle=False)") else called
    if called.startswith("yaml.") and called.removeprefix("yaml.") in LOADERS:
        return called
    if any(k.arg in ("shell", "allow_pickle") for k in node.keywords):
        return called
    return ""


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from joblib import load", "torch.load(f)", "eval('1')", "yaml.load(f, L)",
     "yaml.unsafe_load(f)", "np.load(f)", "np.load(f, allow_pickle=True)", "run(c, shell=True)",
     "import os, dill.x"],
)  # fmt: skip
def test_that_test_can_fail(text: str) -> None:
    assert any(_dangerous(node) for node in ast.walk(ast.parse(text)))


# ------------------------------------------------------------------------------- whose code runs

CODE = """
from pathlib import Path
Path({sprung!r}).touch()
from transformers import (
    PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification
)
class Config(RobertaConfig):
    pass
class Tokenizer(PreTrainedTokenizerFast):
    pass
class Classifier(RobertaForSequenceClassification):
    config_class = Config
"""
AUTO_MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForSequenceClassification": "evil.Classifier",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}
METRIC = """
from pathlib import Path
Path({sprung!r}).touch()
import datasets
import evaluate
class Evil(evaluate.Metric):
    def _info(self):
        value = datasets.Value("int64")
        features = datasets.Features({{"predictions": value, "references": value}})
        return evaluate.MetricInfo(description="", citation="", features=features)
    def _compute(self, predictions, references):
        return {{"evil": 1.0}}
"""


def edit_json(file: Path, **changes: Any) -> None:
    value = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**value, **changes}))


class World:
    """A base, an adapter trained on it, and a file that code of others would create."""

    def __init__(self, folder: Path) -> None:
        self.base = tiny.save_encoder(folder / "base")
        rows = [{"text": text, "label": i % 2} for i, text in enumerate(tiny.CORPUS)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        self.rows = folder / "rows.jsonl"
        data = {"train": "rows.jsonl", "test": "rows.jsonl", "check": {"max_overlap": 1.0}}
        self.recipe = tiny.recipe(self.base, folder, data=data, train={"max_steps": 1})
        self.out = folder / "out"
        run = lora("train", self.recipe)
        assert run.code == 0, run.err


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def hostile_base(world: World, folder: Path, sprung: Path) -> Path:
    """Return a copy of the base whose configuration and tokenizer name code beside them."""
    base = Path(shutil.copytree(world.base, folder))
    (base / "evil.py").write_text(CODE.format(sprung=str(sprung)))
    edit_json(base / "config.json", auto_map=AUTO_MAP, model_type="evil")
    edit_json(
        base / "tokenizer_config.json",
        auto_map={"AutoTokenizer": AUTO_MAP["AutoTokenizer"]},
        tokenizer_class="Tokenizer",
    )
    return base


def edited_recipe(file: Path, target: Path, **changes: Any) -> Path:
    """Write a recipe with other values: `model__name` for `model.name`."""
    values = yaml.safe_load(file.read_text())
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    target.write_text(yaml.safe_dump(values))
    return target


@pytest.fixture(autouse=True)
def _modules_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep what transformers and evaluate copy, to import it, from the next test."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    before, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if "evil" in name or name.startswith(("transformers_modules", "evaluate_modules")):
            del sys.modules[name]


def test_code_of_a_model_runs_only_if_the_users_own_recipe_says_so(
    world: World, tmp_path: Path
) -> None:
    sprung = tmp_path / "sprung"
    base = hostile_base(world, tmp_path / "evil-base", sprung)
    path = edited_recipe(world.recipe, world.recipe.parent / "evil.yaml", model__name=str(base))
    out = ("-o", tmp_path / "out")
    rejected = lora("train", path, *out)
    assert rejected.code == 2
    assert "it comes with Python code of its own" in rejected.err
    assert "--set model.trust_remote_code=true" in rejected.err
    for command in ("validate", "params"):
        assert lora(command, path).code == 2
    assert lora("init", world.rows, "--model", base, "-o", tmp_path / "r.yaml").code != 0
    assert not sprung.exists()
    allowed = lora("train", path, *out, "--set", "model.trust_remote_code=true")
    assert sprung.exists(), allowed.err
    assert allowed.code == 0, allowed.err


def hostile_adapter(world: World, folder: Path, **changes: Any) -> Path:
    """Return a copy of the adapter whose recipe is what its sender wants."""
    out = Path(shutil.copytree(world.out, folder))
    edited_recipe(world.out / "recipe.yaml", out / "recipe.yaml", **changes)
    return out


def test_the_recipe_beside_an_adapter_lets_no_code_run(world: World, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    base = hostile_base(world, tmp_path / "evil-base", sprung)
    changes = {"model__name": str(base), "model__trust_remote_code": True}
    out = hostile_adapter(world, tmp_path / "out", **changes)
    (out / "evil.py").write_text(CODE.format(sprung=str(sprung)))
    edit_json(
        out / "adapter_config.json",
        auto_mapping={"parent_library": "evil", "base_model_class": "Classifier"},
        base_model_name_or_path=str(base),
    )
    write_manifest_of(out)
    to = tmp_path / "merged"
    for command in (
        ("eval", "--adapter", out),
        ("eval", "--adapter", world.out, "--against", out),
        ("predict", "--adapter", out, "a film"),
        ("merge", "--base", base, "--adapter", out, "--to", to),
        ("train", world.recipe, "-o", tmp_path / "new", "--set", f"adapter={{from: {out}}}",
         "--set", f"model.name={base}"),
    ):  # fmt: skip
        rejected = lora(*command)
        assert rejected.code in (2, 4), (command, rejected.err)
        assert not sprung.exists(), command
    assert not to.exists()
    trusted = ("--set", "model.trust_remote_code=true")
    assert lora("predict", "--adapter", out, "a film", *trusted).code == 0
    assert sprung.exists()


@pytest.mark.slow_after(1)
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "changes",
    [{"target_modules": "(.|..)+(?<=Q)"}, {"rank_pattern": {"(.|..)+(?<=Q)": 2}}],
    ids=lambda changes: next(iter(changes)),
)
def test_an_expression_of_an_adapter_does_not_hold_us_up(
    changes: dict[str, Any], world: World, tmp_path: Path
) -> None:
    """With `re`, these would be matched for longer than anybody lives."""
    out = hostile_adapter(world, tmp_path / "out")
    edit_json(out / "adapter_config.json", **changes)
    write_manifest_of(out)
    rejected = lora("eval", "--adapter", out)
    assert rejected.code == 2, rejected.err
    assert "`(.|..)+(?<=Q)` takes too long to match" in rejected.err


def write_manifest_of(out: Path) -> None:
    """Let the manifest vouch for what the sender changed."""
    listed = json.loads((out / MANIFEST).read_text())["files"]
    files = {n: {"bytes": (out / n).stat().st_size, "sha256": sha256_of(out / n)} for n in listed}
    write_json(out / MANIFEST, {"files": files})


def test_a_metric_of_the_recipe_beside_an_adapter_does_not_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sprung = tmp_path / "sprung"
    out = hostile_adapter(
        world, tmp_path / "out", evaluate__metrics=["./evil.py"], evaluate__best={"metric": "loss"}
    )
    monkeypatch.chdir(out)
    (out / "evil.py").write_text(METRIC.format(sprung=str(sprung)))
    rejected = lora("eval", "--adapter", out)
    assert rejected.code == 2
    assert "metric `./evil.py` is a Python script" in rejected.err
    own = edited_recipe(world.recipe, tmp_path / "own.yaml", evaluate__metrics=["user/evil"],
                        data={"test": str(world.rows), "train": str(world.rows)})  # fmt: skip
    of_the_hub = lora("eval", "--adapter", world.out, "--recipe", own)
    assert of_the_hub.code == 2
    assert (
        "metric `user/evil` is not built in, and on the Hub metrics are Python code"
        in of_the_hub.err
    )
    assert not sprung.exists()
    for allowed in ("evaluate.metrics=[./evil.py]", "model.trust_remote_code=true"):
        found = lora("eval", "--adapter", out, "--set", allowed)
        assert found.code == 0, found.err
        assert "evil" in found.out
    assert sprung.exists()


def test_a_package_beside_the_adapter_is_not_imported(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started as `python -m lora_cli`, Python looks into the working directory."""
    sprung = tmp_path / "sprung"
    out = hostile_adapter(world, tmp_path / "out", model__name="package:evil.inner/model")
    for folder in (out / "evil", out / "evil/inner"):
        folder.mkdir()
        (folder / "__init__.py").write_text(f"open({str(sprung)!r}, 'w')")
    shutil.copytree(world.base, out / "evil/inner/model")
    monkeypatch.chdir(out)
    monkeypatch.syspath_prepend(str(out))
    rejected = lora("predict", "--adapter", ".", "a film")
    assert rejected.code == 2
    assert "`evil.inner` is not installed" in rejected.err
    assert not sprung.exists()


def test_a_model_folder_that_brings_an_adapter_along_is_refused(
    world: World, tmp_path: Path
) -> None:
    """Transformers would load another base and put the adapter onto it, if PEFT is there."""
    base = Path(shutil.copytree(world.base, tmp_path / "base"))
    shutil.copy(world.out / "adapter_config.json", base)
    shutil.copy(world.out / "adapter_model.safetensors", base)
    rejected = lora("predict", "--adapter", world.out, "a", "--set", f"model.name={base}")
    assert rejected.code == 2
    assert "contains an adapter, not a base model" in rejected.err


# -------------------------------------------------------------------- outside the folders named


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "elsewhere" / "secret.txt"
    file.parent.mkdir()
    file.write_text("secret")
    return file


@pytest.mark.parametrize(
    "name", ["../elsewhere/secret.txt", "{secret}", "inner/../../elsewhere/secret.txt"]
)
def test_a_manifest_names_no_file_outside(
    name: str, world: World, secret: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(world.out, tmp_path / "out"))
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"][name.format(secret=secret)] = {"bytes": 6, "sha256": sha256_of(secret)}
    (out / MANIFEST).write_text(json.dumps(manifest))
    rejected = lora("predict", "--adapter", out, "a film")
    assert rejected.code == 4
    assert "outside its folder" in rejected.err


LINKS: dict[str, Callable[[Path, Path], object]] = {
    "absolute": lambda file, target: file.symlink_to(target.absolute()),
    "relative": lambda file, target: file.symlink_to(os.path.relpath(target, file.parent)),
    "over another": lambda file, target: (
        file.with_name("hop").symlink_to(target.absolute()),
        file.symlink_to("hop"),
    ),
    "a folder": lambda file, target: (
        file.symlink_to(os.path.relpath(target, file.parent)),
        file.with_name("more").symlink_to(target.parent),
    ),
    "to nothing": lambda file, target: file.symlink_to(target.with_name("nothing")),
}


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "base.json"])
def test_a_link_of_an_adapter_leads_nowhere_outside(
    kind: str, name: str, world: World, secret: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(world.out, tmp_path / "out"))
    shutil.copy(out / name, secret.with_name(name))
    (out / name).unlink()
    LINKS[kind](out / name, secret.with_name(name))
    rejected = lora("predict", "--adapter", out, "a film")
    assert rejected.code == 4
    assert "is a link to" in rejected.err
    assert "which is outside the folder" in rejected.err


def test_a_link_inside_the_folder_and_in_the_cache_of_the_hub_is_followed(
    world: World, tmp_path: Path
) -> None:
    inside = Path(shutil.copytree(world.out, tmp_path / "inside"))
    (inside / "adapter_model.safetensors").rename(inside / "weights")
    (inside / "adapter_model.safetensors").symlink_to("weights")
    cache = tmp_path / "models--user--adapter"
    snapshot = cache / "snapshots" / "0123"
    shutil.copytree(world.out, snapshot)
    (cache / "blobs").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (snapshot / name).rename(cache / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    elsewhere = Path(shutil.copytree(snapshot, tmp_path / "local", symlinks=True))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (elsewhere / name).unlink()
        (elsewhere / name).symlink_to(cache / "blobs" / name)  # as older downloads leave it
    for out in (inside, snapshot, elsewhere):
        found = lora("predict", "--adapter", out, "a film")
        assert found.code == 0, found.err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_of_a_model_leads_nowhere_outside(
    name: str, world: World, secret: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(world.base, tmp_path / "base"))
    (base / name).rename(secret.with_name(name))
    (base / name).symlink_to(secret.with_name(name))
    rejected = lora("predict", "--adapter", world.out, "a", "--set", f"model.name={base}")
    assert rejected.code == 4
    assert f"`{name}` is a link to" in rejected.err


@pytest.mark.parametrize(
    "name",
    ["../elsewhere/model.safetensors", "{folder}/x.safetensors", "a/../b", "..", "", 3, "a\\b"],
)
def test_an_index_names_no_file_outside(
    name: Any, world: World, secret: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(world.base, tmp_path / "base"))
    (base / "model.safetensors").rename(secret.with_name("model.safetensors"))
    name = name.format(folder=secret.parent) if isinstance(name, str) else name
    weights = {"roberta.embeddings.LayerNorm.bias": name}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(IntegrityError, match="outside its folder"):
        shard_names(base / "model.safetensors.index.json")
    rejected = lora("predict", "--adapter", world.out, "a", "--set", f"model.name={base}")
    assert rejected.code == 4
    assert "outside its folder" in rejected.err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000])
def test_a_broken_index_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(IntegrityError, match="cannot be read"):
        shard_names(tmp_path / "index.json")


def test_a_folder_of_a_package_is_inside_the_package(tmp_path: Path) -> None:
    shutil.copytree(tiny.save_encoder(tmp_path / "base"), tmp_path / "deeper/base")
    for inside in (os.path.relpath(tmp_path / "base", Path(pytest.__file__).parent), "/etc"):
        with pytest.raises(lora_cli.errors.LoraError, match="is not inside the package"):
            locate(f"package:pytest/{inside}")


def test_a_publication_does_not_follow_links(world: World, secret: Path, tmp_path: Path) -> None:
    """What a sender prepared as if a run had been killed while it published."""
    for name, link in ((".publish.ready", True), ("adapter_config.json", False)):
        out = Path(shutil.copytree(world.out, tmp_path / f"out-{link}"))
        if link:
            (out / name).symlink_to(secret.parent)
        else:
            (out / ".publish.ready").mkdir()
            (out / ".publish.ready" / name).write_text("{}")
            (out / name).unlink()
            (out / name).symlink_to(secret.parent)
        rejected = lora("predict", "--adapter", out, "a film")
        assert rejected.code == 4
        assert "is a link to" in rejected.err
        assert secret.read_text() == "secret"
        assert len(list(secret.parent.iterdir())) == 1


def test_nothing_but_the_named_output_is_written(world: World, tmp_path: Path) -> None:
    """Whatever `output_dir` the recipe beside an adapter names."""
    target = tmp_path / "precious"
    target.mkdir()
    (target / "kept").write_text("kept")
    out = hostile_adapter(
        world, tmp_path / "out", output_dir=str(target), train__trackers=["tensorboard"]
    )
    before = {path: path.stat().st_mtime_ns for path in [*tmp_path.rglob("*"), out]}
    for command in (
        ("eval", "--adapter", out),
        ("predict", "--adapter", out, "a film"),
    ):
        found = lora(*command)
        assert found.code == 0, found.err
    assert {path: path.stat().st_mtime_ns for path in [*tmp_path.rglob("*"), out]} == before
    merged = lora("merge", "--base", world.base, "--adapter", out, "--to", tmp_path / "merged")
    assert merged.code == 0, merged.err
    new = {path for path in tmp_path.rglob("*") if path not in before}
    assert {path.relative_to(tmp_path).parts[0] for path in new} == {"merged"}


def test_a_log_that_is_a_link_is_not_written(world: World, secret: Path, tmp_path: Path) -> None:
    """A folder that is resumed may be another's too."""
    out = Path(shutil.copytree(world.out, tmp_path / "out"))
    for name in ("report.json", "metrics.jsonl"):
        (out / name).unlink()
    (out / "metrics.jsonl").symlink_to(secret)
    rejected = lora("train", world.recipe, "-o", out, "--resume")
    assert rejected.code == 2
    assert "is a link" in rejected.err
    assert secret.read_text() == "secret"


# ------------------------------------------------------------------------------------- secrets

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345"
KEY = "correct-horse-battery-staple"
PASSWORD = "p4ssw0rd-of-the-address"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"https://me:{PASSWORD}@host/x", "https://***@host/x"),
        (f"s3://{TOKEN}@host/x", "s3://***@host/x"),
        ("https://0123456789abcdef@host/x?y=1", "https://***@host/x?y=1"),
        (f"https://host/x?token={KEY}&y=1", "https://host/x?token=***&y=1"),
        (f"https://host/x?y=1&api_key={KEY}", "https://host/x?y=1&api_key=***"),
        (f"a '{TOKEN}' b", "a '***' b"),
        (f"{KEY}!", "***!"),
        ("sftp://me@host/x", "sftp://me@host/x"),
        ("user@host: a/b:c@d", "user@host: a/b:c@d"),
        ("the hf_hub and sk-learn tokens=3", "the hf_hub and sk-learn tokens=3"),
        ("false true 1", "false true 1"),
        ("postgres://me:p@ss@host/db", "postgres://***@host/db"),
        ("s3://AKIAIOSFODNN7EXAMPLE:wJalr/XUtn+K7@bucket/x", "s3://***@bucket/x"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("https://b/k?X-Amz-Credential=A%2Fb&X-Amz-Signature=d0&x=1",
         "https://b/k?X-Amz-Credential=***&X-Amz-Signature=***&x=1"),
        ("https://b/c?sv=2020&sig=ab%2Bc%3D", "https://b/c?sv=2020&sig=***"),
        ("-H 'Authorization: Bearer ab.cd-ef'", "-H 'Authorization: Bearer ***'"),
        ('{"authorization": "Basic dXNlcjpw"}', '{"authorization": "Basic ***"}'),
        ("a bearer abcdef0123456789", "a bearer ***"),
        ("Cookie: session=abcdef; a=b", "Cookie: ***"),
        ("PGPASSWORD=hunter2 psql", "PGPASSWORD=*** psql"),
        ('{"client_secret": "hunter2", "n": 1}', '{"client_secret": "***", "n": 1}'),
        ("password: hunter2", "password: ***"),
        ("AccountName=x;AccountKey=ab/c+==;y", "AccountName=x;AccountKey=***;y"),
        ("--hf-token abcdefgh --out x", "--hf-token *** --out x"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "***"),
        ("github_pat_11ABCDEFG0abcdefghijkl", "***"),
        ("sk-proj-abc123def456ghi789", "***"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-_x", "***"),
        ("a -----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY----- b", "a *** b"),
        # labels, counts and keys of a recipe are no secrets
        ('{"reset_password": 1200, "authorization": 0.5}',
         '{"reset_password": 1200, "authorization": 0.5}'),
        ('{"change_password": {"rows": 12}}', '{"change_password": {"rows": 12}}'),
        ("pad_token: <pad>, max_new_tokens: 1000", "pad_token: <pad>, max_new_tokens: 1000"),
        ("[reset_password, sk-learn-and-others]", "[reset_password, sk-learn-and-others]"),
    ],
)  # fmt: skip
def test_what_is_masked(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", KEY)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("OTHER_TOKEN", "true")
    assert redacted(text) == said


@pytest.mark.parametrize(
    "name",
    ["PGPASSWORD", "MYSQL_PWD", "OPENAI_KEY", "AZURE_SAS_TOKEN", "DB_PASS", "GH_PAT", "TOKEN_2"],
)
def test_the_value_of_a_secret_variable_is_masked(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, KEY + "/+")
    assert redacted(f"a {KEY}/+ b {KEY}%2F%2B") == "a *** b ***"


def test_the_working_directory_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/home/somebody")
    assert redacted("in /home/somebody") == "in /home/somebody"


def test_masking_takes_time_in_proportion_to_the_text() -> None:
    """Of a text of a hundred thousand characters, none takes a second."""
    for part in (
        "a",
        "password",
        "://a:",
        "?&",
        "api_",
        "-----BEGIN PRIVATE KEY-----",
        "sk-",
        "eyJ",
    ):
        began = time.process_time()
        redacted(part * (100_000 // len(part)))
        assert time.process_time() - began < 5, part


def test_no_secret_reaches_a_file_or_the_screen(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    mirror = f"memory://me:{PASSWORD}@host/{KEY}"
    shown = []
    out = tmp_path / "out"
    for command in (
        ("train", world.recipe, "-o", out, "--set", f"checkpoint.mirror={mirror}",
         "--set", f"task.pad_token={TOKEN}"),
        ("train", world.recipe, "-o", out, "--set", f"checkpoint.mirror={mirror}"),
        ("validate", world.recipe, "--set", f"model.revision={KEY}"),
        ("validate", world.recipe, "--set", f"model.name=https://me:{PASSWORD}@host/model"),
        ("validate", world.recipe, "--set", f"nonsense.{TOKEN}={KEY}"),
        ("eval", "--adapter", out, "--set", f"data.test={tmp_path}/{KEY}.csv"),
        ("merge", "--base", f"https://me:{PASSWORD}@host/m", "--adapter", out, "--to", "x"),
    ):  # fmt: skip
        found = lora(*command)
        shown += [found.out, found.err]
    assert (out / "report.json").exists(), shown
    assert "checkpoint.mirror=memory://***@host/***" in (out / "report.json").read_text()
    files = {file.name for file in out.rglob("*") if file.is_file()}
    assert files >= {"report.json", "recipe.yaml", "README.md", "report.html", "trainer.json"}
    for secret in (TOKEN, KEY, PASSWORD):
        assert not [text for text in shown if secret in text]
        for file in out.rglob("*"):
            assert secret not in file.name
            assert not file.is_file() or secret.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.slow_after(1)
def test_no_secret_reaches_a_traceback(debug: bool, world: World, tmp_path: Path) -> None:
    code = (
        "import sys; from lora_cli import recipe; from lora_cli.cli import app as cli\n"
        f"def fail(*_): raise RuntimeError('no answer from https://me:{PASSWORD}@host')\n"
        "recipe.load_recipe = fail\n"
        "cli.main()"
    )
    arguments = ["validate", str(world.recipe)]
    environment = {**os.environ, "PYTHONPATH": str(HOME.parent), "TMPDIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments, *(["--debug"] if debug else [])],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert found.returncode == 1
    assert ("Traceback" in found.stderr) == debug
    assert "RuntimeError: no answer from https://***@host" in found.stderr
    kept = "".join(file.read_text() for file in tmp_path.glob("lora-error-*"))
    assert ("Traceback" in kept) == (not debug)
    assert PASSWORD not in found.stdout + found.stderr + kept


# --------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)]
)
@pytest.mark.slow
def test_every_file_has_the_mode_of_the_umask(
    umask: int, file: int, folder: int, world: World, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        inside = tmp_path / "inside"
        out, merged = inside / "out", inside / "merged"
        for command in (
            ("train", world.recipe, "-o", out, "--set", "adapter.type=lora"),
            ("train", world.recipe, "-o", inside / "full", "--set", "adapter.type=full"),
            ("merge", "--base", world.base, "--adapter", out, "--to", merged),
            ("predict", "--adapter", out, "--input", world.rows, "--output", inside / "p.jsonl"),
            ("init", world.rows, "--model", world.base, "-o", inside / "new.yaml"),
        ):
            found = lora(*command)
            assert found.code == 0, (command, found.err)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [inside, *inside.rglob("*")]}
    wrong = {
        str(path.relative_to(tmp_path)): oct(mode)
        for path, mode in modes.items()
        if mode != (folder if path.is_dir() else file)
    }
    assert not wrong
    assert len(modes) > 30
    assert verify_manifest(out)
