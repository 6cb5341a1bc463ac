"""Check that an adapter is really applied where it is loaded, by outputs saved with it.

At the end of training, `probe.json` is written next to a low-rank adapter. It contains the outputs
of the base and of the adapted model for fixed inputs. Anyone who loads the adapter can replay these
inputs: the outputs have to match those of the adapted model, not those of the base. (A server that
does not find an adapter often answers with the base, and reports no error.)

The base is the model without the low-rank updates; modules that were trained in full keep their
trained weights.

    {"format": 1,
     "outputs": {"base": [...], "adapted": [...]},       some outputs for the task's probe
     "next_tokens": [{"prompt": "...",                   for language models
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
MAX_OUTPUTS = 64  # values that are saved for the task's probe
MAX_TOKENS = 10  # most likely next tokens that are saved
REPLACEMENT_CHARACTER = "\ufffd"  # a token that is part of a character decodes to this
COMPARED_TOKENS = 5  # compared with a server's answer: some servers return no more
CLEAR_RATIO = 4  # outputs match one side if they are this many times closer to it
MIN_DIFFERENCE = 1e-6  # required between base and adapted model, relative to the outputs
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
    """Outputs that were computed when an adapter was saved."""

    base: list[float]
    adapted: list[float]
    next_tokens: list[tuple[str, Tokens, Tokens]]
    """For each prompt, the next tokens of the base and of the adapted model."""


@dataclass(frozen=True)
class Verdict:
    """Whether outputs match the base or the adapted model, and their distances from both."""

    answer: str
    """`adapted`, `base` or `neither`."""
    from_adapted: float
    from_base: float


# ----------------------------------------------------------------------------------------- write


@torch.no_grad()
def take_probe(task: Task, model: nn.Module, accelerator: Accelerator) -> Probe | None:
    """Compute a model's outputs for the probe inputs, with its low-rank updates and without.

    Args:
        task: The model's task.
        model: A model with an adapter attached; it is left in eval mode.
        accelerator: The precision and the device.

    Returns:
        None if the model has no low-rank updates, or an output is not finite.
    """
    if not lora_layers(model):
        return None
    model.eval()
    with accelerator.autocast():
        adapted = (_outputs(task, model), _next_tokens(task, model))
        with disabled(model):
            base = (_outputs(task, model), _next_tokens(task, model))
    prompts = zip(adapted[1], base[1], strict=True)
    next_tokens = [
        (p, without, with_it) for (p, with_it), (_, without) in prompts if without and with_it
    ]
    values = [
        *base[0],
        *adapted[0],
        *(lp for _, *sides in next_tokens for s in sides for _, lp in s),
    ]
    if not all(map(math.isfinite, values)):
        return None
    return Probe(base[0], adapted[0], next_tokens)


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
    """Return evenly spaced values of a model's outputs for the task's probe."""
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    probe = {
        name: tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in task.probe().items()
    }
    outputs = task.probed(model, probe).flatten().float().cpu()
    return [float(x) for x in outputs[:: math.ceil(len(outputs) / MAX_OUTPUTS)]]


def _next_tokens(task: Task, model: nn.Module) -> list[tuple[str, Tokens]]:
    """Return the most likely next tokens of each prompt; none if the model generates no text."""
    if (writer := task.writer) is None:
        return []
    device, next_tokens = next(model.parameters()).device, []
    for prompt in PROMPTS:
        ids = writer.tokenizer(prompt)["input_ids"]
        if not ids:
            continue
        logits: Tensor = model(input_ids=torch.tensor([ids], device=device)).logits[0, -1]
        top = logits.float().log_softmax(-1).cpu().topk(min(MAX_TOKENS, len(logits)))
        texts = [_text_after(writer.tokenizer, ids, i) for i in top.indices.tolist()]
        names = [_without_space(text) for text in texts]
        # servers name tokens by their text, and a part of a character has none
        tokens = [
            (text, float(lp))
            for text, lp in zip(texts, top.values.tolist(), strict=True)
            if REPLACEMENT_CHARACTER not in text and names.count(_without_space(text)) == 1
        ]
        next_tokens.append((prompt, tokens))
    return next_tokens


def _text_after(tokenizer: PreTrainedTokenizerBase, ids: list[int], token: int) -> str:
    """Return the text of a token after other tokens, with its leading space.

    SentencePiece drops the leading space at the start of a text.
    """
    before, full = (str(tokenizer.decode(sequence)) for sequence in (ids, [*ids, token]))
    return full[len(before) :] if full.startswith(before) else str(tokenizer.decode([token]))


def _without_space(token: str) -> str:
    """Return a token without its leading space, which some servers omit."""
    return token.removeprefix(" ") or token


# ---------------------------------------------------------------------------------------- replay


def read_probe(folder: Path) -> Probe:
    """Read the `probe.json` of an adapter.

    Raises:
        LoraError: If there is none, or the base and the adapted model have the same outputs in it.
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
    if _distance(probe.base, probe.adapted) <= MIN_DIFFERENCE:
        what = (
            "the probe's outputs are the same with and without the low-rank updates: nothing can "
        )
        hint = "check the training: the updates change nothing"
        raise LoraError(f"{what}be told", str(file), hint)
    return probe


def _tokens(pairs: Any) -> Tokens:
    """Parse the tokens of a prompt.

    Raises:
        ValueError: If there are none.
    """
    tokens = [(str(text), float(lp)) for text, lp in pairs]
    if not tokens:
        raise ValueError("a prompt has no tokens")
    return tokens


def compare_outputs(probe: Probe, replayed: Probe) -> Verdict:
    """Return whether the replayed outputs match the adapted model or the base of the probe."""
    to_adapted = _distance(replayed.adapted, probe.adapted)
    to_base = _distance(replayed.adapted, probe.base)
    return _verdict(to_adapted, to_base)


def compare_tokens(probe: Probe, answers: list[dict[str, float]]) -> Verdict:
    """Return whether the next tokens of a server match the adapted model or the base of the probe.

    Args:
        probe: The outputs that were computed when the adapter was saved.
        answers: For each prompt, the tokens that the server returns, with their log-probabilities.
    """
    distances = [
        (_token_distance(adapted, answer), _token_distance(base, answer))
        for (_, base, adapted), answer in zip(probe.next_tokens, answers, strict=True)
    ]
    count = len(distances)
    return _verdict(sum(d[0] for d in distances) / count, sum(d[1] for d in distances) / count)


def _verdict(to_adapted: float, to_base: float) -> Verdict:
    answer = "neither"
    if CLEAR_RATIO * to_adapted <= to_base:
        answer = "adapted"
    elif CLEAR_RATIO * to_base <= to_adapted:
        answer = "base"
    return Verdict(answer, to_adapted, to_base)


def _distance(a: list[float], b: list[float]) -> float:
    """Return the largest difference, relative to the largest value; infinite if lengths differ."""
    if len(a) != len(b):
        return math.inf
    scale = max(*map(abs, a), *map(abs, b), 1e-30)
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) / scale


def _token_distance(expected: Tokens, answer: dict[str, float]) -> float:
    """Return the mean difference of the log-probabilities of the expected tokens.

    A token that is missing in the answer is less likely there than every token of the answer.
    """
    lowest = min(answer.values())
    names = Counter(map(_without_space, answer))
    named = {
        _without_space(token): lp
        for token, lp in answer.items()
        if names[_without_space(token)] == 1
    }
    differences = []
    for token, lp in expected[:COMPARED_TOKENS]:
        log_probability = answer.get(token, named.get(_without_space(token)))
        differences.append(
            max(lp - lowest, 0.0) if log_probability is None else abs(lp - log_probability)
        )
    return sum(differences) / len(differences)
