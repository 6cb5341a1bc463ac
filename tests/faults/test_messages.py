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

import cases_boxes  # noqa: F401
import cases_chats  # noqa: F401 - they fill CASES
import cases_data  # noqa: F401
import cases_distillation  # noqa: F401
import cases_drawing  # noqa: F401
import cases_embedding  # noqa: F401
import cases_entities  # noqa: F401
import cases_experts  # noqa: F401
import cases_export  # noqa: F401
import cases_folders  # noqa: F401
import cases_merging  # noqa: F401
import cases_mixtures  # noqa: F401
import cases_models  # noqa: F401
import cases_pictures  # noqa: F401
import cases_push  # noqa: F401
import cases_recipes  # noqa: F401
import cases_runs  # noqa: F401
import cases_speech  # noqa: F401
import cases_synthesis  # noqa: F401
import cases_system  # noqa: F401
import cases_tokens  # noqa: F401
import cases_translation  # noqa: F401
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
    (r"(`0\.wav` is cut off or damaged: ).*", r"\1…"),
    (r"(metric `[^`]*` cannot be loaded: \w+).*", r"\1…"),
    (r"(the chat template rejects the conversation: Expected).*", r"\1…"),
    (r"(not a whole safetensors file: ).*", r"\1…"),
    (r"(cannot read the model: ).*", r"\1…"),
    (r"(is no address: ).*", r"\1…"),
    (r"(the generation_config.json of `[^`]*` cannot be used: ).*", r"\1…"),
    (r"the token `[^`]*` has the id \d+", "the token `…` has the id …"),  # ties: by chance
    (r"(not valid JSON: Exp).*", r"\1…"),
    (r"fingerprint \w{16,}", "fingerprint …"),
    (r"(distance from base \+ adapter )[^)\n]*", r"\1…"),
]

# why no case here makes some messages, which stand here as the code has them (see `Site`)
REST: dict[str, list[str]] = {
    "an adapter of LoHa as `adapter.from`; tests/test_optimizers.py": [
        "nothing that is trained has a `lora_B`, which LoRA+ lets learn faster",
    ],
    "an adapter of Mamba; tests/test_peft_rules.py": [
        "the adapter is for `…`, whose weight the model reads without a call",
    ],
    "a model that reads a weight itself; tests/test_step.py": [
        "what is trained, `…`…, takes no part in the model's forward pass",
    ],
    "an adapter on a model with batch normalisation; tests/test_adapter_folder.py": [
        "the buffer `…` is not that of the base",
    ],
    "modules whose names diffusers or kohya's format lack; tests/test_diffusion_file.py": [
        "diffusers does not read the adapters of …… in such a file",
        "has no name for `…` of this transformer",
    ],
    "needs a GPU; tests/gpu/test_graphs.py": [
        "a step cannot be recorded:",
        "in _compile()",
    ],
    "a guard: the first rows of each set are encoded before": [
        "no row of the set `…` leaves anything to train",
    ],
    "an answer that takes long to read; tests/test_final_answers.py": [
        "`…` takes more than … s for one text",
    ],
    "an adapter that embeds texts; tests/test_text_embedding.py": [
        "it has …, more than",
    ],
    "a guard: no tiny tokenizer splits what it was given as a token": [
        "`…` cannot be a token of this tokenizer, which splits it all the same",
    ],
    "a guard: every model that reads tokens has an embedding": [
        "the model has no embedding of tokens",
    ],
    "a guard: only a few picture models have none; tests/test_freeze.py": [
        "the model has no embeddings outside its layers",
    ],
    "a guard: what was written is read again; tests/test_export.py, tests/test_combine.py": [
        "read as … reads it, the outputs differ by … of the largest",
        "the combined update differs from the sum by … of it",
    ],
    "needs an environment with or without gguf; tests/test_export.py": [
        "writing GGUF files needs the Python package `gguf`",
        "llama.cpp has no tensor for `…`",
    ],
    "what the Hub answers; tests/test_find_adapter.py, tests/test_push.py": [
        "the Hub's `…` holds no adapter",
        "the Hub's `…` is gated: its owner decides who may read it",
        "the Hub's `…` has no revision `…`",
        "`…` is there already, and anybody may read it",
    ],
    "what a server answers; tests/test_probe.py": [
        "in next_tokens()",
        "the server answered …:",
        "the server cannot be reached:",
        "the server's answer is not JSON",
        "the server's answer is not a JSON object",
        "the server's answer has no log-probabilities",
    ],
    "a guard: weights that are read are finite": [
        "the outputs are not finite",
    ],
    "no tiny model has an embedding of its own kind; tests/test_peft_token_rules.py": [
        "where it trains single rows",
    ],
    "no tiny model of language has a convolution": [
        "adapts no convolutions, as `…`",
    ],
    "`lora predict` raises them, with the place of the text; test_sequence_classification.py": [
        "in answer_problem()",
    ],
    "needs an environment without diffusers": [
        "`…` needs the Python package `diffusers`, which is not installed",
    ],
    "needs an environment without Pillow; tests/test_image_classification.py": [
        "pictures are read by the Python package `pillow`, which is not installed",
    ],
    "needs an environment without soundfile; tests/test_recordings.py": [
        "recordings need the Python packages `soundfile` and `soxr`, which are missing",
    ],
    "no tiny model has a processor of that kind": [
        "`…` has an image processor that needs torchvision",
    ],
    "a file that changes in the middle of a run; tests/test_image_classification.py and "
    "tests/test_speech_recognition.py": [
        "`…` …; it was whole when the run began",
    ],
    "a guard: weights and scores are checked before; tests/test_bad_numbers.py": [
        "the model's loss on this row is",
        "`train.packing` has no meaning with `task.type: …`",  # the recipe's check says the same
    ],
    "an adapter on tied weights; tests/test_adapter_folder.py": [
        "`…` and `…` differ in the adapter, and are one in the model",
    ],
    "no tiny model has such convolutions; tests/test_adapter_folder.py": [
        "the convolution `…`",  # whose padding mode or dilation PEFT's update does not have
        "an adapter whose A spans all channels of a grouped convolution cannot be merged",
        "DoRA does not fit a convolution of … groups",
    ],
    "no base of this tool's own; tests/test_dora.py": [
        "DoRA needs the length of the base's weights, which are …: quantised",
    ],
    "needs an environment without bitsandbytes; tests/test_quantize_on_load.py": [
        "`adamw_8bit` needs bitsandbytes",
        "`quantization: nf4` needs bitsandbytes",
    ],
    "what a later Typer may say": [
        "in usage_error()",
    ],
    "an architecture whose weights are converted while they are read; tests/test_initialise.py": [
        "the checkpoint has no weight of its own for `…`, as `init: loftq` needs",
    ],
    "needs a full memory; tests/faults/test_resources.py": [
        "is full while",
        "the memory is full",
        "the GPU's memory is full",
    ],
    "adapters without computation.json; tests/test_compare.py": [
        "`task.…`",
    ],
    "needs a disk that reads back something else": [
        "a data set that was just written to the cache reads back otherwise",
    ],
    "printed as a warning; tests/test_dataset_cache.py": [
        "`…` is missing",
        "it holds the rows of something else",
    ],
    "a guard: init finds folders and pipes before it reads": [
        "this is a folder",
    ],
    "a file that keeps changing; tests/test_dataset_cache.py": [
        "the file changes while it is read",
    ],
    "needs a disk that is full": [
        "was written by another process meanwhile, and is not overwritten",
    ],
    "needs a disk that cannot be written to": [
        "its files were being replaced when a run ended:",
    ],
    "root may read everything; tests/faults/test_places.py": [
        "it may not be read: permission denied",
    ],
    "needs a disk that is nearly full": [
        "the disk of … has … MiB free, and the run needs … MiB",
    ],
    "needs a file that is cut while it is read": [
        "the file became shorter while it was read",
    ],
    "a guard: what no adapter changes is copied, whatever its dtype": [
        "`…` is stored as …, which cannot be read",
    ],
    "a fault of ours: merging is proved; tests/test_merge.py": [
        "merged, `…` is not what the adapter's file says",
        "merged, the model's outputs differ by … of the largest",
    ],
    "an error of ours: each written weight is proved; tests/test_merged_weights.py": [
        "the merged model is not what the files of base and adapter say, in …: the largest "
        "difference is …, of `…`",
    ],
    "a fault of ours: saving is proved; tests/test_merge.py": [
        "the saved model does not compute what the merged one did",
    ],
    "a guard: a split without trained tokens is refused before": [
        "nothing to evaluate: no row has a trained token (metric `perplexity`)",
    ],
    "needs an environment without sacrebleu": [
        "metric `…` needs the package `…`, which is not installed",
    ],
    "a guard: an empty split is refused before": [
        "nothing to evaluate: metric `…` was given no rows",
    ],
    "needs a task of which rows may have no label; tests/contract/test_example_task.py": [
        "no row of … has a label or an answer, which … with",
    ],
    "a language model is proposed for any table; tests/test_task_proposals.py": [
        "no task reads such rows",
    ],
    "needs a cache that is full; tests/faults/test_places.py": [
        "a file of the model cannot be read or stored:",
    ],
    "a guard: its absence is found before": [
        "cannot do gradient checkpointing:",
    ],
    "needs a device of another kind": [
        "is not supported: each process holds the model",
    ],
    "needs GPUs; tests/test_environment.py": [
        "`CUDA_VISIBLE_DEVICES=…` names …, and … of them can be used",
        "`LOCAL_RANK` is …, but there is no such GPU: … can be used",
    ],
    "waits for other processes; tests/test_environment.py": [
        "in _alone()",
    ],
    "printed as warnings, with exit code 0; tests/test_predict.py": [
        "in answer_file()",
    ],
    "a pipe that nobody writes into; tests/test_recipe.py": [
        "nothing is written into this pipe",
    ],
    "a log that is damaged while its run goes on": [
        "this is not a line of a training log",
    ],
    "needs a full stdout; tests/test_standard_streams.py": [
        "the output cannot be printed:",
    ],
    "a script beside an adapter; tests/faults/test_security.py": [
        "metric `…` is a Python script",
    ],
    "needs a forward pass that fails; tests/test_padding.py": [
        "the model cannot compute …:",
    ],
    "needs a model that draws; tests/test_padding.py": [
        "the model answers the same text differently each time, by",
    ],
    "as above; tests/test_padding.py": [
        "this model's answer to a text depends on the texts next to it, by",
    ],
    "needs a tokenizer that is not fast": [
        "the tokenizer does not say where its tokens stand in a text, as chats need",
        "the tokenizer does not say where its tokens stand in a text, as spans need",
    ],
    "needs a tokenizer whose special tokens change how a text is divided": [
        "the tokenizer reads a text in another way when it adds its special tokens",
    ],
    "a guard: blank texts are rejected before": [
        "the prompt is empty",
    ],
    "needs a tokenizer that fails; tests/test_unexpected_errors.py": [
        "the tokenizer cannot encode this row:",
    ],
    "needs a data set of the Hub whose own labels repeat": [
        "the label `…` appears twice",
    ],
    "needs a model without positions; tests/test_causal_lm.py": [
        "this model lets packed texts see each other",
    ],
    "printed as a warning; tests/test_predict.py": [
        "there is no turn to answer",
    ],
    "needs several processes; tests/faults/test_ranks.py": [
        "after step … … … and process 0 hold different parameters",
        "the processes differ in `…`: process 0 has `…`,",
        "in _compare()",
        "process … of … has ended, so process … ends too",
    ],
    "waits seconds before it gives up, or needs a crash; tests/faults/test_mirror.py": [
        "cannot write to …:",
        "it was being written when its machine disappeared",
        "`…` lies outside its folder",
        "cannot read from …:",
    ],
    "needs a worker that dies; tests/faults/test_places.py": [
        "the shared memory, through which workers hand over batches, is full while",
        "a worker that prepares batches was killed while",
    ],
    "needs a folder that goes away; tests/faults/test_places.py": [
        "`…` was removed while …, by another program or by hand",
    ],
    "needs a crash between two files": [
        "the adapter in … is not that of step …, which was the best",
    ],
}
MOST_LINES = 36  # of a message on the page
AREAS = [
    "Arguments", "Recipes", "Keys that do not go together", "Overrides", "Files and rows", "Splits",
    "Mixtures",
    "Labels", "Entities", "Language models", "Translation", "Embeddings", "Teachers",
    "lora init", "Models", "Targets", "Metrics", "Adapters", "Starting from an adapter",
    "Training", "Evaluation", "Prediction",
    "Merging", "Combining", "Exporting", "Pushing", "Checking", "Pictures",
    "Pictures with boxes",
    "Speech", "Texts said aloud", "Drawing",
]  # fmt: skip


@dataclass(frozen=True)
class Site:
    """A place in the code that makes an error or a problem.

    `text` is the message as the code has it, `…` for each value that is put into it; or the
    function's name, where the message comes from somewhere else. It names the place wherever the
    code is moved to.
    """

    file: str
    first: int
    last: int
    text: str


def sites() -> list[Site]:
    """Return every call of `Problem`, `LoraError` or one of its classes in the package."""
    found = []

    def walk(node: ast.AST, file: str, function: ast.FunctionDef | None) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node
        name = node.func if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Call) and isinstance(name, ast.Name) and name.id in CLASSES:
            text = message_of(node, function)
            found.append(Site(file, node.lineno, node.end_lineno or node.lineno, text))
        for child in ast.iter_child_nodes(node):
            walk(child, file, function)

    for path in sorted((ROOT / "lora_cli").rglob("*.py")):
        file = path.relative_to(ROOT / "lora_cli").as_posix()
        if file != "errors.py":
            walk(ast.parse(path.read_text(encoding="utf-8")), file, None)
    return found


def message_of(call: ast.Call, function: ast.FunctionDef | None) -> str:
    """Return the message of a call, as its text or as the variable that it is given has it."""
    name = f"in {function.name}()" if function else ""
    message = call.args[0] if call.args else None
    if isinstance(message, ast.Name) and function is not None:
        message = assigned(message.id, call.lineno, function) or message
    return re.sub(r"\s+", " ", text_of(message)).strip(" …") or name


def assigned(name: str, line: int, function: ast.FunctionDef) -> ast.expr | None:
    """Return what a variable was last set to before a line of a function."""
    values: dict[int, ast.expr] = {}
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign) or node.lineno > line:
            continue
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for one, value in pairs:
                if isinstance(one, ast.Name) and one.id == name:
                    values[node.lineno] = value
    return values[max(values)] if values else None


def text_of(node: ast.AST | None) -> str:
    """Return the text of an expression, with `…` for what is not a constant."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(text_of, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text_of(left) + text_of(right)
        case ast.IfExp(body=body, orelse=other):
            return text_of(body).strip(" …") or text_of(other)
        case _:
            return "…"


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
@pytest.mark.slow
def test_every_message_is_the_golden_one_and_says_what_where_and_how_to_mend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, recorder = run_all(tmp_path, monkeypatch)
    text = page(results)
    if os.environ.get("LORA_UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    missed = [site for site in sites() if not recorder.hit(site)]
    complaints = [f"what, where, or how to fix it: {one}" for one in poor_ones(results)]
    without_case = {text for texts in REST.values() for text in texts}
    complaints += [
        f"add a case in tests/faults/cases_*.py for {site.file}, line {site.first}: {site.text}"
        for site in missed
        if site.text not in without_case
    ]
    complaints += [
        f"it has a case now, or is gone: {text}"
        for text in without_case
        if text not in {site.text for site in missed}
    ]
    assert not complaints, "\n".join(complaints)

    wanted = GOLDEN.read_text(encoding="utf-8")
    changed = list(difflib.unified_diff(wanted.splitlines(), text.splitlines(), lineterm="", n=2))
    assert not changed, "\n".join(changed)
