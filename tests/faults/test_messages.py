"""Every message that a user can get, from faults that are made for real, and all in one place.

LORA_UPDATE_GOLDEN=1 writes tests/golden/messages.md anew; the commit says why it changed. Read it.
"""

from __future__ import annotations

import ast
import difflib
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases_chats  # noqa: F401 - they fill CASES
import cases_data  # noqa: F401
import cases_folders  # noqa: F401
import cases_models  # noqa: F401
import cases_recipes  # noqa: F401
import cases_runs  # noqa: F401
import cases_system  # noqa: F401
import datasets
import pytest
import tiny
from cases import CASES
from world import Printed, World

from lora_cli import errors

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "messages.md"
TITLE = """\
# Messages

What is printed for every fault that a user can make, from faults that tests make for real.
`LORA_UPDATE_GOLDEN=1 pytest tests/faults/test_messages.py` writes it: change the code, not this.
"""
CLASSES = {"Problem"} | {
    name for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.LoraError)
}  # fmt: skip
# what other libraries and the system say differs between versions and machines
MASKS = [
    (r"(cannot load the (?:configuration|tokenizer|weights|architecture) of `[^`]*`: ).*", r"\1…"),
    (r"(cannot load (?:the adapter )?`[^`]*`: ).*", r"\1…"),
    (r"(the parquet file is cut off or damaged: ).*", r"\1…"),
    (r"(metric `[^`]*` cannot be loaded: \w+).*", r"\1…"),
    (r"(the chat template refuses the conversation: Expected).*", r"\1…"),
    (r"(not a whole safetensors file: ).*", r"\1…"),
    (r"(cannot read the model: ).*", r"\1…"),
    (r"(is no address: ).*", r"\1…"),
    (r"(the generation_config.json of `[^`]*` cannot be used: ).*", r"\1…"),
    (r"the token `[^`]*` has the id \d+", "the token `…` has the id …"),  # ties: by chance
    (r"(not valid JSON: Exp).*", r"\1…"),
    (r"fingerprint \w{16,}", "fingerprint …"),
]

# places in the code whose messages no case here makes, and why
CONV = "no task has convolutions yet; tests/test_folder.py"
SEVERAL = "needs several processes; tests/faults/test_ranks.py"
PAIR = "two files, line by line; tests/test_inference.py"
MIRROR = "waits seconds before it gives up, or needs a crash; tests/faults/test_mirror.py"
REST: dict[str, str] = {
    "adapters/loading.py:_check_plain": "an adapter on tied weights; tests/test_folder.py",
    "adapters/loading.py:_check_pair": CONV,
    "adapters/lora.py:delta_weight": CONV,
    "adapters/lora.py:check_groups": CONV,
    "adapters/targets.py:groups_problem": CONV,
    "arguments.py:usage_error": "what a later Typer may say",
    "cli.py:_known_error": "a full disk behind stdout (test_commands.py), memory, a GPU's memory",
    "data/cache.py:_open": "printed as a warning; tests/test_cache.py",
    "data/cache.py:cached_dataset": "needs a disk that reads back something else",
    "data/sources.py:_file_rows": "a file that keeps changing; tests/test_cache.py",
    "recipe/load.py:_text_of": "a pipe that nobody writes into; tests/test_recipe.py",
    "streams.py:_told": "needs a full stdout; tests/test_streams.py",
    "comparison.py:_refuse_others": "adapters without computation.json; tests/test_comparison.py",
    "data/sniffing.py:bytes_of": "a guard: init finds folders and pipes before it reads",
    "data/writing.py:writing": "needs a disk that is full",
    "files.py:forbidden": "root may read everything; tests/faults/test_places.py",
    "files.py:finish_publishing": "needs a disk that cannot be written to",
    "files.py:require_space": "needs a disk that is nearly full",
    "fingerprint.py:_tensor_hash": "needs a file that is cut while it is read",
    "merging.py:_merge": "a fault of ours: merging is proved; tests/test_merging.py",
    "merging.py:_require_saved": "a fault of ours: saving is proved; tests/test_merging.py",
    "metrics/builtin.py:_perplexity": "a guard: a split without trained tokens is refused before",
    "metrics/metric_set.py:compute": "a guard: an empty split is refused before",
    "metrics/builtin.py:check_metric_names": "needs an environment without sacrebleu",
    "prediction.py:answer_file": "printed as warnings, with exit code 0; tests/test_prediction.py",
    "reporting/report.py:read_metrics_log": "a log that is damaged while its run goes on",
    "tasks/base.py:_untrusted": "a script beside an adapter; tests/faults/test_security.py",
    "tasks/causal_lm.py:load_processor": "needs a tokenizer that is not fast",
    "tasks/causal_lm.py:_require_room": "a guard: blank texts are rejected before",
    "tasks/row_formats.py:prompt": "printed as a warning; tests/test_prediction.py",
    "models.py:enable_gradient_checkpointing": "a guard: its absence is found before",
    "tasks/batch_check.py:_of_first": "needs a forward pass that fails; tests/test_padding.py",
    "tasks/batch_check.py:_not_repeatable": "needs a model that draws; tests/test_padding.py",
    "tasks/batch_check.py:_require_single_rows": "as above; tests/test_padding.py",
    "tasks/encoding.py:_encoded": "needs a tokenizer that fails; tests/test_unexpected.py",
    "tasks/packing.py:check_packing": "needs a model without positions; tests/test_causal_lm.py",
    "tasks/labels.py:learn": "needs a data set of the Hub whose own labels repeat",
    "placement.py:start_accelerator": "needs a device of another kind",
    "placement.py:_refuse_missing_gpus": "needs GPUs; tests/test_environment.py",
    "placement.py:_alone": "waits for other processes; tests/test_environment.py",
    "training/agreement.py:_compare": SEVERAL,
    "training/agreement.py:require_same_parameters": SEVERAL,
    "training/watching.py:error": SEVERAL,
    "training/mirror.py:put": MIRROR,
    "training/mirror.py:get": MIRROR,
    "training/mirror.py:_reaching": MIRROR,
    "model_errors.py:place_error": "needs a cache that is full; tests/faults/test_places.py",
    "training/resources.py:_worker_error": "needs a worker that dies; tests/faults/test_places.py",
    "training/resources.py:_removed": "needs a folder that goes away; tests/faults/test_places.py",
    "training/resources.py:out_of_memory": "needs a full memory; tests/faults/test_resources.py",
    "training/saving.py:settle": "needs a crash between two files",
}
MOST_LINES = 36  # of a message on the page
AREAS = [
    "Arguments", "Recipes", "Keys that do not go together", "Overrides", "Files and rows", "Splits",
    "Labels", "Language models", "lora init", "Models", "Targets", "Metrics", "Adapters",
    "Starting from an adapter", "Training", "Evaluation", "Prediction", "Merging",
]  # fmt: skip


@dataclass(frozen=True)
class Site:
    """A place in the code that makes an error or a problem."""

    file: str
    function: str
    first: int
    last: int


def sites() -> list[Site]:
    """Return every call of `Problem`, `LoraError` or one of its classes in the package."""
    found = []

    def walk(node: ast.AST, file: str, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        name = node.func if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Call) and isinstance(name, ast.Name) and name.id in CLASSES:
            found.append(Site(file, function, node.lineno, node.end_lineno or node.lineno))
        for child in ast.iter_child_nodes(node):
            walk(child, file, function)

    for path in sorted((ROOT / "lora_cli").rglob("*.py")):
        file = path.relative_to(ROOT / "lora_cli").as_posix()
        if file != "errors.py":
            walk(ast.parse(path.read_text(encoding="utf-8")), file, "")
    return found


class Recorder:
    """Notes the lines from which errors and problems are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: set[tuple[str, int]] = set()
        for kind in (errors.Problem, errors.LoraError, errors.InterruptedRun):
            self._watch(kind, monkeypatch)

    def _watch(self, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        before = kind.__init__

        def noting(made: Any, *arguments: Any, **options: Any) -> None:
            frame = sys._getframe(1)
            file = frame.f_code.co_filename.partition("lora_cli/")[2]
            self.lines.add((file, frame.f_lineno))
            before(made, *arguments, **options)

        monkeypatch.setattr(kind, "__init__", noting)

    def hit(self, site: Site) -> bool:
        return any((site.file, line) in self.lines for line in range(site.first, site.last + 1))


@dataclass(frozen=True)
class Result:
    """What a case printed."""

    area: str
    name: str
    arguments: tuple[str, ...]
    printed: Printed

    def __str__(self) -> str:
        command = " ".join(map(_quoted, self.arguments))
        about = f"{self.name}: " if self.name else ""
        text = self.printed.message.strip()
        for pattern, shown in MASKS:
            text = re.sub(pattern, shown, text)
        lines = text.split("\n")
        if len(lines) > MOST_LINES:
            lines[12:-6] = [f"… ({len(lines) - 18} lines)"]
        text = "\n".join(lines)
        return f"{about}exit code {self.printed.code}\n```\n$ lora {command}\n{text}\n```\n"


def _quoted(argument: str) -> str:
    text = errors.printable(argument)
    return f"$'{text}'" if text != argument else shlex.quote(argument)


class Watched(World):
    """A world that remembers the last command."""

    arguments: tuple[str, ...] = ()

    def lora(self, *arguments: str) -> Printed:
        self.arguments = arguments
        return super().lora(*arguments)


def run_all(top: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Result], Recorder]:
    """Run all cases, each in a folder of its own beside the base models."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", top / "cache")
    bases = top / "bases"
    tiny.save_encoder(bases / "encoder")
    tiny.save_llama(bases / "llama")
    first = World(top / "first", bases)
    recipe = first.recipe(task={"labels": ["bad", "good"]})
    assert first.lora("train", recipe, "-o", "../bases/trained").code == 0
    recorder = Recorder(monkeypatch)
    results = []
    for number, case in enumerate(CASES):
        world = Watched(top / f"case{number}", bases)
        printed = case.run(world)
        results.append(Result(case.area, case.name, world.arguments, printed))
    return results, recorder


def page(results: list[Result]) -> str:
    parts = [TITLE]
    assert {result.area for result in results} == set(AREAS)
    for area in AREAS:
        parts.append(f"\n## {area}\n")
        parts += [f"\n{result}" for result in results if result.area == area]
    return "".join(parts)


def poor_ones(results: list[Result]) -> list[str]:
    """Return the messages that lack a place or a hint, or are none at all."""
    poor = []
    for result in results:
        text = result.printed.message.strip()
        last = text.rpartition("error: ")[2]  # several of a kind share their place and hint
        where = "\n  at " in last or "everything is saved" in last
        well = text.startswith("error: ") and where and "\nhint: " in last
        if result.printed.code not in (2, 3, 4, 5, 6) or not well or "Traceback" in text:
            poor.append(str(result))
    return poor


# one test, since a worker for each part would run all cases again
def test_every_message_is_the_golden_one_and_says_what_where_and_how_to_mend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, recorder = run_all(tmp_path, monkeypatch)
    text = page(results)
    if os.environ.get("LORA_UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    missed = {f"{s.file}:{s.function}": s for s in sites() if not recorder.hit(s)}
    complaints = [f"what, where, or how to fix it: {one}" for one in poor_ones(results)]
    complaints += [
        f"add a case in tests/faults/cases_*.py for {name}, line {site.first}"
        for name, site in missed.items()
        if name not in REST
    ]
    complaints += [f"is met now: {name}" for name in REST if name not in missed]
    assert not complaints, "\n".join(complaints)

    wanted = GOLDEN.read_text(encoding="utf-8")
    changed = list(difflib.unified_diff(wanted.splitlines(), text.splitlines(), lineterm="", n=2))
    assert not changed, "\n".join(changed)
