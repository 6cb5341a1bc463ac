"""Computes the loss of tokens without having all their logits in memory at once.

A language model with a vocabulary of 128,000 tokens computes 128,000 logits for each token of its
input: 4 GiB in float32 for 8,192 tokens, and the loss and its gradient need several copies. Here
the model stops before its output head. The logits are computed for a few hundred trained tokens at
a time, together with the gradient of their loss, and then freed. Tokens that are not trained, such
as those of a prompt, get no logits at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor, nn

from lora_cli.environment import has_triton

MAX_LOGITS = 2**28  # computed at a time; 1 GiB in float32
MIN_ROWS = 256  # tokens whose logits are computed at a time, whatever the size of the vocabulary
# hidden states are scaled, so that a cap of the logits shows; unscaled ones show a bias
SCALES = (1.0, 10.0, 1000.0)
TOLERANCE = 1e-5  # relative to the largest logit of a token
LogitTransform = Callable[[nn.Module, Tensor], Tensor]


def _unchanged(model: nn.Module, logits: Tensor) -> Tensor:
    return logits


def _with_bias(model: nn.Module, logits: Tensor) -> Tensor:
    bias: Any = model.final_logits_bias  # of BART, Marian, Pegasus
    with_bias: Tensor = logits + bias.to(logits.dtype)
    return with_bias


def _capped(model: nn.Module, logits: Tensor) -> Tensor:
    cap = _setting(model, "final_logit_softcapping") or _setting(model, "logits_soft_cap")
    capped: Tensor = torch.tanh(logits / float(cap)) * float(cap)
    return capped  # Gemma


def _divided(model: nn.Module, logits: Tensor) -> Tensor:
    return logits / float(_setting(model, "logits_scaling"))  # Granite


def _multiplied(model: nn.Module, logits: Tensor) -> Tensor:
    return logits * float(_setting(model, "logit_scale"))  # Cohere


LOGIT_TRANSFORMS: tuple[LogitTransform, ...] = (
    _unchanged,
    _with_bias,
    _capped,
    _divided,
    _multiplied,
)


def _setting(model: nn.Module, name: str) -> Any:
    config: Any = model.config
    return getattr(config.get_text_config(), name, None)


@dataclass
class HiddenStates:
    """The output of a language model before its output head.

    Args:
        states: The inputs of the output head (B, T, H).
        logits: Computes logits (N, V) from some of the states (N, H).
    """

    states: Tensor
    logits: Callable[[Tensor], Tensor]

    def losses(self, positions: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log-likelihoods of target tokens (N,).

        Args:
            positions: The positions of their states in the flattened rows (N,).
            targets: The target tokens (N,).
        """
        states = self.states.flatten(0, 1).index_select(0, positions)
        losses: Tensor = _TokenLosses.apply(states, targets, self.logits)  # type: ignore[no-untyped-call]
        return losses


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy in chunks, since the loss of a token depends on the state of no other token."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, compute_logits: Any) -> Tensor:
        """Return the losses (N,) of states (N, H), and keep their gradients (N, H)."""
        needs_gradient = ctx.needs_input_grad[0]
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        start, rows = 0, MIN_ROWS  # the first chunk shows the size of the vocabulary
        while len(chunk := states[start : start + rows].detach()):
            chunk.requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):
                logits = compute_logits(chunk)
                loss, gradient = _losses_and_gradient(
                    logits, targets[start : start + rows], needs_gradient
                )
            if needs_gradient:
                gradients += torch.autograd.grad(logits, chunk, gradient)
            losses.append(loss)
            start += rows
            rows = max(MIN_ROWS, MAX_LOGITS // logits[0].numel())
            del logits, gradient
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients or [states]))
        return torch.cat(losses or [states.new_zeros(0, dtype=torch.float32)])

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient with respect to the states."""
        (gradients,) = ctx.saved_tensors
        return (gradients * outer[0][:, None]).to(gradients.dtype), None, None


def _losses_and_gradient(
    logits_in_graph: Tensor, targets: Tensor, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the losses (N,) of logits (N, V), and the gradient of their sum, in the same dtype.

    On a GPU, the gradient overwrites the logits. Autograd does not need them any more, since no
    `LogitTransform` saves its result for the backward pass.
    """
    logits = logits_in_graph.detach()
    if logits.is_cuda and logits.is_contiguous() and has_triton():
        from lora_cli.tasks.generation.token_loss_kernel import token_losses

        return token_losses(logits, targets, needs_gradient), logits if needs_gradient else None
    with torch.set_grad_enabled(needs_gradient):
        logits.requires_grad_(needs_gradient)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        if not needs_gradient:
            return losses, None
        (gradient,) = torch.autograd.grad(losses, logits, torch.ones_like(losses))
    return losses.detach(), gradient


@contextmanager
def without_logits(head: nn.Module) -> Iterator[list[Tensor]]:
    """Within the context, give the output head no rows, so that a model computes no logits.

    Yields:
        A list, to which each forward pass appends the inputs of the output head (B, T, H).
    """
    head_inputs: list[Tensor] = []

    def take(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        head_inputs.append(arguments[0])
        return (arguments[0][:, :0],)

    handle = head.register_forward_pre_hook(take)
    try:
        yield head_inputs
    finally:
        handle.remove()


@torch.no_grad()
def find_logit_transform(model: nn.Module, compute: Callable[[], Tensor]) -> LogitTransform | None:
    """Find, by a trial, what a model does with the output of its output head.

    Args:
        model: The model, in eval mode.
        compute: Returns the model's logits (B, T, V) for a fixed input.

    Returns:
        The known function that gives the same logits; None if there is none.
    """
    head = head_of(model)
    if head is None:
        return None
    try:
        with without_logits(head) as head_inputs:
            nothing = compute()
    except IndexError:  # it indexes its logits itself (ProphetNet)
        return None
    if (
        len(head_inputs) != 1
        or head_inputs[0].ndim != 3
        or nothing.shape[:2] != head_inputs[0][:, :0].shape[:2]
    ):
        return None
    states = head_inputs[0]
    if states.shape[1] < len(SCALES):
        return None
    scales = torch.tensor(SCALES, device=states.device).repeat(states.shape[1])
    states = states * scales[: states.shape[1], None].to(states.dtype)
    handle = head.register_forward_pre_hook(lambda module, arguments: (states,))
    try:
        expected = compute()
    finally:
        handle.remove()
    for transform in LOGIT_TRANSFORMS:
        try:
            found = transform(model, head(states))
        except (AttributeError, TypeError):  # the model has no such setting
            continue
        allowed = TOLERANCE * expected.abs().amax(-1, keepdim=True)
        if found.shape == expected.shape and bool(((found - expected).abs() <= allowed).all()):
            return transform
    return None


def head_of(model: nn.Module) -> nn.Module | None:
    """Return a model's output head, which computes logits from hidden states, if it has one."""
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    # FSMT returns its embedding, whose input is token ids instead of hidden states
    is_layer = isinstance(head, nn.Module) and not isinstance(head, nn.Embedding)
    return head if is_layer else None


def hidden_states(
    model: nn.Module, transform: LogitTransform | None, compute: Callable[[], Tensor]
) -> HiddenStates | Tensor:
    """Return the hidden states before a model's output head, or all logits if those are needed.

    All logits are needed if the transform is not known, or if the output head is trained, since its
    gradients need the logits again.

    Args:
        model: The model.
        transform: What the model does with the output of its output head, if known.
        compute: Returns the model's logits (B, T, V).
    """
    head = head_of(model)
    if transform is None or head is None:
        return compute()
    # gradients that are not scaled yet would underflow in float16
    if any(w.requires_grad or w.dtype == torch.float16 for w in head.parameters()):
        return compute()
    with without_logits(head) as head_inputs:
        compute()
    return HiddenStates(head_inputs[0], lambda states: transform(model, head(states)))
