"""A proof that travels with an adapter: inputs, and what the base and base + adapter make of them.

The base is the model without the low-rank updates: modules trained in full stay as they are.

`probe.json` lies beside a low-rank adapter since the end of its training. Whoever loads the adapter
can replay it: what is computed has to be what was computed with the adapter, not what the base
computes alone. (A server that does not find an adapter often answers with the base, and says OK.)

    {"format": 1,
     "outputs": {"base": [...], "adapted": [...]},       some outputs for the task's probe
     "next_tokens": [{"prompt": "...",                   of language models
                      "base": [["token", log-probability], ...], "adapted": [...]}]}
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_cli.adapters.attach import disabled, lora_layers
from lora_cli.errors import BACKUP, IntegrityError, LoraError
from lora_cli.files import write_json
from lora_cli.format_version import FORMAT, require_format
from lora_cli.tasks.contract import Task

PROBE_FILE = "probe.json"
MOST_OUTPUTS = 64  # numbers that are kept of the task's probe
TOKENS = 10  # most likely next tokens that are kept
PART = "\ufffd"  # what a part of a character is decoded to
COMPARED = 5  # of which so many are looked for in an answer: some servers give no more
CLEAR = 4  # times nearer to one side than to the other: then it is that side
LEAST = 1e-6  # by which base and adapter have to differ, relative to the outputs
PROMPTS = (
    "The",
    "Once upon a time, there was",
    "Question: What is the capital of France?\nAnswer:",
    "1, 2, 3,",
)

Tokens = list[tuple[str, float]]
"""Next tokens as text, with their log-probabilities, the most likely first."""


@dataclass(frozen=True)
class Probe:
    """What was computed when an adapter was saved."""

    base: list[float]
    adapted: list[float]
    next_tokens: list[tuple[str, Tokens, Tokens]]
    """Of each prompt, those of the base and those of base + adapter."""


@dataclass(frozen=True)
class Verdict:
    """Which side an answer is nearer to, and how far it is from both."""

    answer: str
    """`adapted`, `base` or `neither`."""
    from_adapted: float
    from_base: float


# ----------------------------------------------------------------------------------------- write


@torch.no_grad()
def take_probe(task: Task, model: nn.Module, accelerator: Accelerator) -> Probe | None:
    """Return what a model makes of the probe with its low-rank updates and without.

    Args:
        task: Of the model.
        model: With an adapter attached; it is left in eval mode.
        accelerator: Where it runs.

    Returns:
        None where the model has no low-rank updates, or an output is not finite.
    """
    if not lora_layers(model):
        return None
    model.eval()
    with accelerator.autocast():
        adapted = (_outputs(task, model), _next_tokens(task, model))
        with disabled(model):
            base = (_outputs(task, model), _next_tokens(task, model))
    prompts = zip(adapted[1], base[1], strict=True)
    found = [(p, without, with_it) for (p, with_it), (_, without) in prompts if without and with_it]
    numbers = [*base[0], *adapted[0], *(lp for _, *sides in found for s in sides for _, lp in s)]
    if not all(map(math.isfinite, numbers)):
        return None
    return Probe(base[0], adapted[0], found)


def write_probe(folder: Path, probe: Probe) -> None:
    """Write `probe.json` into a folder."""
    next_tokens = [
        {"prompt": prompt, "base": base, "adapted": adapted}
        for prompt, base, adapted in probe.next_tokens
    ]
    outputs = {"base": probe.base, "adapted": probe.adapted}
    write_json(
        folder / PROBE_FILE, {"format": FORMAT, "outputs": outputs, "next_tokens": next_tokens}
    )


def _outputs(task: Task, model: nn.Module) -> list[float]:
    """Return some numbers, evenly spaced, of what a model makes of the task's probe."""
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    probe = {
        name: tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in task.probe().items()
    }
    outputs = task.probed(model, probe).flatten().float().cpu()
    return [float(x) for x in outputs[:: math.ceil(len(outputs) / MOST_OUTPUTS)]]


def _next_tokens(task: Task, model: nn.Module) -> list[tuple[str, Tokens]]:
    """Return the most likely next tokens of each prompt; nothing if the model writes no text."""
    if (writer := task.writer) is None:
        return []
    device, found = next(model.parameters()).device, []
    for prompt in PROMPTS:
        ids = writer.tokenizer(prompt)["input_ids"]
        if not ids:
            continue
        logits: Tensor = model(input_ids=torch.tensor([ids], device=device)).logits[0, -1]
        top = logits.float().log_softmax(-1).cpu().topk(min(TOKENS, len(logits)))
        texts = [_text_after(writer.tokenizer, ids, i) for i in top.indices.tolist()]
        names = [_name(text) for text in texts]
        # a part of a character has no text of its own, by which a server could name it
        tokens = [
            (text, float(lp))
            for text, lp in zip(texts, top.values.tolist(), strict=True)
            if PART not in text and names.count(_name(text)) == 1
        ]
        found.append((prompt, tokens))
    return found


def _text_after(tokenizer: PreTrainedTokenizerBase, ids: list[int], token: int) -> str:
    """Return a token as it is written after others, with the space before it.

    SentencePiece leaves that out where a text begins.
    """
    before, whole = (str(tokenizer.decode(some)) for some in (ids, [*ids, token]))
    return whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode([token]))


def _name(token: str) -> str:
    """Return a token without the space before it, which some servers write and others leave out."""
    return token.removeprefix(" ") or token


# ---------------------------------------------------------------------------------------- replay


def read_probe(folder: Path) -> Probe:
    """Return what `probe.json` of an adapter holds.

    Raises:
        LoraError: If there is none, or base and adapter do not differ in it.
        IntegrityError: If it is damaged.
    """
    file = folder / PROBE_FILE
    if not file.is_file():
        hint = "it is written by `lora train`, beside low-rank adapters: train again to get one"
        raise LoraError(f"the adapter has no {PROBE_FILE}", str(folder), hint)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        require_format(value, str(file))
        sides = {s: [float(x) for x in value["outputs"][s]] for s in ("base", "adapted")}
        prompts = [
            (str(one["prompt"]), _tokens(one["base"]), _tokens(one["adapted"]))
            for one in value["next_tokens"]
        ]
        probe = Probe(sides["base"], sides["adapted"], prompts)
        if not probe.base or len(probe.base) != len(probe.adapted):
            raise ValueError("a side is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError("the probe cannot be read", str(file), BACKUP) from error
    if _distance(probe.base, probe.adapted) <= LEAST:
        what = (
            "the probe's outputs are the same with and without the low-rank updates: nothing can "
        )
        hint = "check the training: the updates change nothing"
        raise LoraError(f"{what}be told", str(file), hint)
    return probe


def _tokens(pairs: Any) -> Tokens:
    """Return tokens of the file.

    Raises:
        ValueError: If there are none.
    """
    found = [(str(text), float(lp)) for text, lp in pairs]
    if not found:
        raise ValueError("a prompt has no tokens")
    return found


def compare_outputs(probe: Probe, found: Probe) -> Verdict:
    """Return which side the outputs of a model with an adapter are nearer to."""
    to_adapted = _distance(found.adapted, probe.adapted)
    to_base = _distance(found.adapted, probe.base)
    return _verdict(to_adapted, to_base)


def compare_tokens(probe: Probe, answers: list[dict[str, float]]) -> Verdict:
    """Return which side the next tokens of a server are nearer to.

    Args:
        probe: What was computed when the adapter was saved.
        answers: Of each prompt, the log-probabilities of the tokens that the server gives.
    """
    distances = [
        (_token_distance(adapted, answer), _token_distance(base, answer))
        for (_, base, adapted), answer in zip(probe.next_tokens, answers, strict=True)
    ]
    count = len(distances)
    return _verdict(sum(d[0] for d in distances) / count, sum(d[1] for d in distances) / count)


def _verdict(to_adapted: float, to_base: float) -> Verdict:
    answer = "neither"
    if CLEAR * to_adapted <= to_base:
        answer = "adapted"
    elif CLEAR * to_base <= to_adapted:
        answer = "base"
    return Verdict(answer, to_adapted, to_base)


def _distance(a: list[float], b: list[float]) -> float:
    """Return the largest difference, relative to the largest number; infinite if lengths differ."""
    if len(a) != len(b):
        return math.inf
    scale = max(*map(abs, a), *map(abs, b), 1e-30)
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) / scale


def _token_distance(expected: Tokens, answer: dict[str, float]) -> float:
    """Return the mean difference of log-probabilities of the expected tokens.

    A token that the answer lacks is less likely there than all that it has.
    """
    least = min(answer.values())
    names = Counter(map(_name, answer))
    named = {_name(token): lp for token, lp in answer.items() if names[_name(token)] == 1}
    differences = []
    for token, lp in expected[:COMPARED]:
        own = answer.get(token, named.get(_name(token)))
        differences.append(max(lp - least, 0.0) if own is None else abs(lp - own))
    return sum(differences) / len(differences)
