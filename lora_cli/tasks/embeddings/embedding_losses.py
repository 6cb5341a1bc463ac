"""The losses of embeddings, and what they read of the texts of a step.

The losses of in-batch negatives and of CoSENT compare the examples of a step with each other, so
they are functions of all its embeddings at once, whichever micro-batch and process made each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lora_cli.recipe.spec.text_embedding_spec import TextEmbeddingSpec

ANCHOR, POSITIVE, NEGATIVE = range(3)

Facts = Mapping[str, Tensor]
"""What is known of the texts of a step, a value for each text (T,).

`row` is the example that it belongs to; `role` what it is there; `text` and `label` are hashes, by
which equal ones are found (0 is no label); `score` is that of its pair.
"""


def embedding_losses(vectors: Tensor, facts: Facts, spec: TextEmbeddingSpec) -> Tensor:
    """Return the loss of each example of a step.

    Args:
        vectors: The embeddings of its texts (T, D), of any length.
        facts: Of the same texts.
        spec: Says which loss.

    Returns:
        (B,), in the order of the anchors.
    """
    if vectors.dtype in (torch.float16, torch.bfloat16):
        vectors = vectors.float()
    vectors = normalize(vectors, dim=1)
    match spec.loss_in_effect:
        case "in_batch_negatives":
            return in_batch_negatives(vectors, facts, spec.temperature, spec.symmetric)
        case "cosent":
            return cosent(*cosines_and_scores(vectors, facts), spec.temperature)
        case "cosine":
            cosines, scores = cosines_and_scores(vectors, facts)
            return (cosines - scores).square()


def in_batch_negatives(
    vectors: Tensor, facts: Facts, temperature: float, symmetric: bool = False
) -> Tensor:
    """Return for each anchor the cross-entropy of its positive among all second texts.

    Where one of these may be right as well, it is left out for that anchor: if its text is that of
    the anchor or of its positive, if it is the positive of an equal anchor, or if it has the
    anchor's label.

    Args:
        vectors: Embeddings of length 1 (T, D).
        facts: Of the same texts.
        temperature: What cosines are divided by.
        symmetric: Take the mean with the cross-entropy of the anchor among all anchors.
    """
    is_anchor = facts["role"] == ANCHOR
    anchors = {key: values[is_anchor] for key, values in facts.items()}
    seconds = {key: values[~is_anchor] for key, values in facts.items()}
    scores = vectors[is_anchor] @ vectors[~is_anchor].T / temperature
    same_row = anchors["row"][:, None] == seconds["row"]
    own = same_row & (seconds["role"] == POSITIVE)  # one True in each line
    positive = own.int().argmax(1)  # the place of each anchor's own
    # of each second text, the anchor of its example
    asked = anchors["text"][same_row.int().argmax(0)]
    may_be_right = (
        (anchors["text"][:, None] == seconds["text"])
        | (seconds["text"][positive][:, None] == seconds["text"])
        | ((anchors["text"][:, None] == asked) & (seconds["role"] == POSITIVE))
        | ((anchors["label"][:, None] == seconds["label"]) & (seconds["label"] != 0))
    )
    scores = scores.masked_fill(may_be_right & ~own, -torch.inf)
    right = scores[own]
    total = scores.logsumexp(1)
    if symmetric:
        total = (total + scores[:, positive].logsumexp(0)) / 2
    return total - right


def cosines_and_scores(vectors: Tensor, facts: Facts) -> tuple[Tensor, Tensor]:
    """Return the cosine of each pair of texts of length 1, and its score (B,)."""
    first, second = (facts["role"] == role for role in (ANCHOR, POSITIVE))
    cosines = (vectors[first] * vectors[second]).sum(1)
    return cosines, facts["score"][first].to(cosines.dtype)


def cosent(cosines: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Return CoSENT's loss of a step, once for each of its pairs (B,).

    It is log(1 + sum of exp((s_j - s_i) / temperature)) over all i and j where pair i has the
    higher score, and s are the cosines: a single number, to which all pairs contribute.
    """
    s = cosines / temperature
    higher = scores[:, None] > scores[None, :]
    wrong = (s[None, :] - s[:, None]).masked_fill(~higher, -torch.inf)
    loss = torch.cat([wrong.new_zeros(1), wrong.flatten()]).logsumexp(0)
    return loss.expand(len(cosines))
