"""The loss of tokens without all their scores in memory at once.

A language model of 128,000 tokens gives as many scores for each token that it reads: 4 GiB in
float32 for 8,192 tokens, and the loss and its gradient need them several times. Here the model
stops before its last layer; the scores are computed for some hundred trained tokens at a time, each
time together with the gradient of their loss, and then dropped. Tokens that are not trained, such
as those of a prompt, get no scores at all.
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

SCORES_AT_ONCE = 2**28  # numbers; 1 GiB in float32
LEAST_ROWS = 256  # tokens whose scores are computed together, however many tokens there are
FACTORS = (1.0, 10.0, 1000.0)  # by which hidden states are stretched, to see what caps the scores
EXACT = 1e-5  # of the largest score of a token: what a bias adds is small beside stretched ones
Finish = Callable[[nn.Module, Tensor], Tensor]


def _as_they_are(model: nn.Module, scores: Tensor) -> Tensor:
    return scores


def _with_bias(model: nn.Module, scores: Tensor) -> Tensor:
    bias: Any = model.final_logits_bias  # of BART, Marian, Pegasus
    with_bias: Tensor = scores + bias.to(scores.dtype)
    return with_bias


def _capped(model: nn.Module, scores: Tensor) -> Tensor:
    cap = _setting(model, "final_logit_softcapping") or _setting(model, "logits_soft_cap")
    capped: Tensor = torch.tanh(scores / float(cap)) * float(cap)
    return capped  # Gemma


def _divided(model: nn.Module, scores: Tensor) -> Tensor:
    return scores / float(_setting(model, "logits_scaling"))  # Granite


def _multiplied(model: nn.Module, scores: Tensor) -> Tensor:
    return scores * float(_setting(model, "logit_scale"))  # Cohere


FINISHES: tuple[Finish, ...] = (_as_they_are, _with_bias, _capped, _divided, _multiplied)


def _setting(model: nn.Module, name: str) -> Any:
    config: Any = model.config
    return getattr(config.get_text_config(), name, None)


@dataclass
class HiddenStates:
    """What a language model computes before its scores.

    Args:
        states: What its last layer is given (B, T, H).
        scores: Turns some of them (N, H) into scores of tokens (N, V).
    """

    states: Tensor
    scores: Callable[[Tensor], Tensor]

    def losses(self, positions: Tensor, wanted: Tensor) -> Tensor:
        """Return the negative log-likelihood of tokens (N,).

        Args:
            positions: Places in the flattened rows (N,).
            wanted: The tokens that follow there (N,).
        """
        states = self.states.flatten(0, 1).index_select(0, positions)
        losses: Tensor = _TokenLosses.apply(states, wanted, self.scores)  # type: ignore[no-untyped-call]
        return losses


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy in chunks; the gradient of a token's loss concerns its own state alone."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, wanted: Tensor, scores: Any) -> Tensor:
        """Return the losses (N,) of states (N, H), and keep their gradients (N, H)."""
        needs_gradient = ctx.needs_input_grad[0]
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        done, rows = 0, LEAST_ROWS  # until it is known how many tokens have scores
        while len(part := states[done : done + rows].detach()):
            part.requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):
                found = scores(part)
                loss, slopes = _losses_and_slopes(found, wanted[done : done + rows], needs_gradient)
            if needs_gradient:
                gradients += torch.autograd.grad(found, part, slopes)
            losses.append(loss)
            done += rows
            rows = max(LEAST_ROWS, SCORES_AT_ONCE // found[0].numel())
            del found, slopes
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients or [states]))
        return torch.cat(losses or [states.new_zeros(0, dtype=torch.float32)])

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient with respect to the states."""
        (gradients,) = ctx.saved_tensors
        return (gradients * outer[0][:, None]).to(gradients.dtype), None, None


def _losses_and_slopes(
    scores: Tensor, wanted: Tensor, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the losses (N,) of scores (N, V), and the gradient of their sum in the scores' dtype.

    On a GPU the gradient takes the place of the scores. What autograd has saved of them is not
    concerned: no `Finish` saves its own result.
    """
    found = scores.detach()
    if found.is_cuda and found.is_contiguous() and has_triton():
        from lora_cli.tasks.generation.token_loss_kernel import token_losses

        return token_losses(found, wanted, needs_gradient), found if needs_gradient else None
    with torch.set_grad_enabled(needs_gradient):
        found.requires_grad_(needs_gradient)
        losses = F.cross_entropy(found.float(), wanted, reduction="none")
        if not needs_gradient:
            return losses, None
        (slopes,) = torch.autograd.grad(losses, found, torch.ones_like(losses))
    return losses.detach(), slopes


@contextmanager
def without_scores(head: nn.Module) -> Iterator[list[Tensor]]:
    """Let a model compute no scores within the context.

    Yields:
        What its last layer is given in each of its forward passes.
    """
    given: list[Tensor] = []

    def take(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given.append(arguments[0])
        return (arguments[0][:, :0],)

    handle = head.register_forward_pre_hook(take)
    try:
        yield given
    finally:
        handle.remove()


@torch.no_grad()
def find_finish(model: nn.Module, compute: Callable[[], Tensor]) -> Finish | None:
    """Find what a model does to the scores of its last layer, by trying it.

    Args:
        model: In eval mode.
        compute: Returns the model's scores (B, T, V) for some input, always the same.

    Returns:
        A function that does the same; None if none of those that are known does.
    """
    head = head_of(model)
    if head is None:
        return None
    try:
        with without_scores(head) as given:
            nothing = compute()
    except IndexError:  # it picks some of its scores itself (ProphetNet)
        return None
    if len(given) != 1 or given[0].ndim != 3 or nothing.shape[:2] != given[0][:, :0].shape[:2]:
        return None
    states = given[0]
    if states.shape[1] < len(FACTORS):
        return None
    factors = torch.tensor(FACTORS, device=states.device).repeat(states.shape[1])
    states = states * factors[: states.shape[1], None].to(states.dtype)
    handle = head.register_forward_pre_hook(lambda module, arguments: (states,))
    try:
        wanted = compute()
    finally:
        handle.remove()
    for finish in FINISHES:
        try:
            found = finish(model, head(states))
        except (AttributeError, TypeError):  # the model has no such setting
            continue
        allowed = EXACT * wanted.abs().amax(-1, keepdim=True)
        if found.shape == wanted.shape and bool(((found - wanted).abs() <= allowed).all()):
            return finish
    return None


def head_of(model: nn.Module) -> nn.Module | None:
    """Return the layer that turns a model's hidden states into scores, if it has one."""
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    # FSMT names the embedding itself: that is given tokens, and no hidden states
    is_layer = isinstance(head, nn.Module) and not isinstance(head, nn.Embedding)
    return head if is_layer else None


def hidden_states(
    model: nn.Module, finish: Finish | None, compute: Callable[[], Tensor]
) -> HiddenStates | Tensor:
    """Return what a model computes before its scores; or the scores, where they are needed whole.

    Args:
        model: Its last layer may not be trained, as its gradients would need the scores again.
        finish: What is done to the last layer's scores, if that is known.
        compute: Returns the model's scores (B, T, V).
    """
    head = head_of(model)
    if finish is None or head is None:
        return compute()
    # float16 has no room for gradients that are not scaled yet
    if any(w.requires_grad or w.dtype == torch.float16 for w in head.parameters()):
        return compute()
    with without_scores(head) as given:
        compute()
    return HiddenStates(given[0], lambda states: finish(model, head(states)))
