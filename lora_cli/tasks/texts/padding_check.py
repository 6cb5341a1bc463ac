"""Checks, before training and before use, that a row's outputs do not depend on other rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_cli.adapters.attach import training_mode
from lora_cli.errors import LoraError, counted
from lora_cli.models.full_precision import full_precision, has_flash_attention, torch_attention
from lora_cli.tasks.examples import Example
from lora_cli.tasks.finite_scores import require_finite, require_finite_weights
from lora_cli.tasks.texts.padding import (
    MOST_NOISE,
    NONE,
    RIGHT,
    Padding,
    candidates,
    longest_with_equal_positions,
    tolerance,
)
from lora_cli.tasks.texts.text_task import TextTask
from lora_cli.unexpected_errors import own_words

LONGEST = 1024  # tokens of the long row of the trial
NOT_TRAINED = "the model, before it is used"


@torch.no_grad()
def choose_padding(task: TextTask, model: nn.Module, longest: int | None = None) -> None:
    """Choose how the task pads rows of different lengths, by trying the model.

    Args:
        task: The task, whose `padding` is set.
        model: The model that will be used; it is put into eval mode, and back.
        longest: Tokens of the longest row; the task's `max_length` if that is not known.

    Raises:
        LoraError: If the model cannot compute such rows, gives another answer each time, or one
            that depends on the other rows however they are put together.
        NumericsError: If its weights or scores are NaN or infinity; minus infinity, which rules
            a token out, may be a score.
    """
    whole = min(longest or task.max_length, task.max_length)
    short, long = task.trial_examples(min(whole, LONGEST))
    require_finite_weights(model, task.recipe.at("model.name"))
    flash = has_flash_attention(model)
    with torch_attention(model), _trial(task, model):
        alone = _of_first(task, model, [short], "model.name")
        # before any comparison, since NaN compares as different for any cause
        require_finite(alone.masked_fill(alone == -torch.inf, 0.0), model, task.recipe, NOT_TRAINED)
        noise = float((alone - _of_first(task, model, [short], "model.name")).abs().max())
        dtype = alone.dtype
        if noise > tolerance(alone, 0.0, dtype):
            raise _not_repeatable(task, noise)
        task.check_trial(model, short, alone)
        copies = _of_first(task, model, [short, short], "model.name")
        noise = float((alone - copies).abs().max())
        allowed = min(tolerance(alone, noise, dtype), MOST_NOISE * float(alone.abs().max()))
        first_position, why_not = None, ""
        varied = len(long["input_ids"]) > len(short["input_ids"])
        chosen = _right_padding(task, model, short, long, alone, allowed) if varied else None
        if whole > longest_with_equal_positions(model):
            chosen = None  # a row longer than those of the trial changes how others are read
        if chosen is None and noise > allowed:
            _require_single_rows(task, noise)
        if task.can_share_rows and _worth_sharing(task, model):
            first_position, why_not = _first_position(task, model, short, whole, allowed)
            if flash:
                first_position, why_not = None, "flash attention takes no such mask"
    if chosen is not None and flash:
        chosen = chosen if _agrees(task, model, short, long, chosen) else None
    task.padding, task.first_position = chosen or NONE, first_position
    if why_not and task.recipe.train.kernels == "fused":
        hint = "`--set train.kernels=auto` takes the fastest way that is right for this model"
        raise LoraError(why_not, task.recipe.at("train.kernels"), hint)
    if first_position is None and task.padding == NONE and varied:
        task.notes.append(
            f"this model's answer to a {task.input_name} changes when it is padded, so only "
            f"{task.input_name}s of the same length are computed together; "
            "`train.group_by_length: true` makes that faster"
        )


def _worth_sharing(task: TextTask, model: nn.Module) -> bool:
    """Return whether packing texts into rows pays; on a CPU, attention in wide rows costs more."""
    kernels = task.recipe.train.kernels
    return kernels == "fused" or (kernels == "auto" and next(model.parameters()).is_cuda)


def _right_padding(
    task: TextTask, model: nn.Module, short: Example, long: Example, alone: Tensor, allowed: float
) -> Padding | None:
    """Return the first way of padding with which the short row has the same outputs as alone."""
    without_mask = task.looks_back_only and task.recipe.train.kernels != "reference"
    for padding in candidates(model, task.tokenizer.padding_side, without_mask):
        if padding.side == "left" and not task.can_fill_left:
            continue
        task.padding = padding
        found = _of_first(task, model, [short, long], task.length_key)
        if float((found - alone).abs().max()) <= allowed:
            return padding
    return None


@torch.no_grad()
def check_training(task: TextTask, model: nn.Module, longest: int | None = None) -> None:
    """Run a short and a long row as in training, whose forward pass may require more.

    Args:
        task: Its padding has been chosen.
        model: The model that will be trained; it is put into training mode, and back.
        longest: Tokens of the longest row; the task's `max_length` if that is not known.

    Raises:
        LoraError: If the model cannot compute them (Reformer wants multiples of its chunk).
    """
    length = min(longest or task.max_length, task.max_length, LONGEST)
    short, long = task.trial_examples(length)
    was_training = model.training
    training_mode(model)
    try:
        for example in (short, long):
            _of_first(task, model, [example], task.length_key)
    finally:
        model.train(was_training)


def _agrees(
    task: TextTask, model: nn.Module, short: Example, long: Example, padding: Padding
) -> bool:
    """Return whether flash attention, which computes in 16 bits, also ignores the padding."""
    with _trial(task, model):
        task.padding = padding
        alone = _of_first(task, model, [short], "model.name")
        found = _of_first(task, model, [short, long], "task.max_length")
    return float((found - alone).abs().max()) <= tolerance(alone, 0.0, alone.dtype)


def _first_position(
    task: TextTask, model: nn.Module, short: Example, longest: int, allowed: float
) -> tuple[int | None, str]:
    """Return where positions start if texts share rows; or None, and why they must not.

    A text between two others has to be answered as it is alone, and so has a long one: attention
    that is limited to a window would not show in short texts.
    """
    config, n_short = task.config, len(short["input_ids"])
    room = min(longest, (task.positions or LONGEST) - 2 * n_short)
    if config.is_encoder_decoder:
        return None, "texts do not share rows in an encoder-decoder"
    if longest > LONGEST:  # such rows would cost more than padding, so they are not tried
        return None, f"texts of more than {LONGEST:,} tokens do not share rows"
    if room < n_short:
        return None, "the model has positions for a single text alone"
    long = task.trial_examples(room)[1]
    pad = getattr(config, "pad_token_id", None)  # some models with parts have none
    after_padding = [] if pad is None else [int(pad) + 1]
    examples, worst = [short, long, short], []
    task.padding = RIGHT
    wanted = [_of_first(task, model, [example], "model.name") for example in examples]
    try:
        for task.first_position in [0, *after_padding]:
            device = next(model.parameters()).device
            found = task.logits(model, task.collate(examples).to(device).inputs)
            pairs = [(found[i][: len(wanted[i])], wanted[i]) for i in range(len(examples))]
            worst.append(max(float((one - other).abs().max()) for one, other in pairs))
            if worst[-1] <= allowed:
                return task.first_position, ""
    except Exception as error:  # architectures reject such a mask by exceptions of any kind
        return None, f"the model rejects texts that share a row: {own_words(error)}"
    finally:
        task.first_position = None
    return None, (
        f"the model's answer to a text changes by {min(worst):.1e} when others share its row "
        f"(rounding allows {allowed:.1e})"
    )


@contextmanager
def _trial(task: TextTask, model: nn.Module) -> Iterator[None]:
    """A context for the trial: float32, no dropout, and no padding to a multiple."""
    was_training, multiple, padding = model.training, task.pad_multiple, task.padding
    model.eval()
    task.pad_multiple, task.padding, task.first_position = 1, RIGHT, None
    try:
        with full_precision(model):  # rounding could hide an effect of padding, or look like one
            yield
    finally:
        model.train(was_training)
        task.pad_multiple, task.padding = multiple, padding


def _of_first(task: TextTask, model: nn.Module, examples: Sequence[Example], key: str) -> Tensor:
    """Return the outputs of the first of several rows that are computed together."""
    device = next(model.parameters()).device
    inputs = task.collate(examples).to(device).inputs
    longest = max(len(example["input_ids"]) for example in examples)
    try:
        logits = task.logits(model, inputs)[0]
    except (LoraError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # architectures raise exceptions of any kind
        what = f"the model cannot compute {counted(longest, 'token')}: {own_words(error)}"
        hint = f"`--set {task.length_key}={max(longest // 2, 1)}` cuts longer texts"
        if key == "model.name":
            hint = "is its config.json right, and does it need a newer transformers?"
        raise LoraError(what, task.recipe.at(key), hint) from error
    if logits.ndim == 1:
        return logits
    length = task.output_length(examples[0])  # (T, V)
    is_left = task.padding.side == "left" and "labels" not in inputs  # targets never are
    return logits[-length:] if is_left else logits[:length]


def _not_repeatable(task: TextTask, noise: float) -> LoraError:
    what = f"the model answers the same text differently each time, by {noise:.1e}"
    hint = "it draws random numbers while it answers; for Reformer, set `hash_seed` in config.json"
    return LoraError(what, task.recipe.at("model.name"), hint)


def _require_single_rows(task: TextTask, noise: float) -> None:
    """Reject batches for a model whose outputs depend on other rows even without padding."""
    sizes = {
        "train.micro_batch_size": task.micro_batch,
        "evaluate.micro_batch_size": task.recipe.evaluate.micro_batch_size,
    }
    # None: twice as many as in training
    large = [key for key, size in sizes.items() if size != 1]
    if large:
        what = f"this model's answer to a text depends on the texts next to it, by {noise:.1e}"
        flags = " ".join(f"--set {key}=1" for key in sizes)
        raise LoraError(what, task.recipe.at(large[0]), f"compute one at a time: `{flags}`")
