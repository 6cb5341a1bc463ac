"""The losses of text embeddings.

In-batch negatives and CoSENT compare the examples of a step with each other. So these losses are
functions of all embeddings of a step, over all micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lora_cli.recipe.spec.text_embedding_spec import TextEmbeddingSpec

ANCHOR, POSITIVE, NEGATIVE = range(3)

TextFacts = Mapping[str, Tensor]
"""Facts about the texts of a step, each with a value per text (T,).

`row` is the row of its example, and `role` its role there. `text` and `label` are hashes, by which
equal ones are found (0 if there is no label). `score` is the score of its pair.
"""


def embedding_losses(vectors: Tensor, facts: TextFacts, spec: TextEmbeddingSpec) -> Tensor:
    """Return the loss of each example of a step.

    Args:
        vectors: The embeddings of its texts (T, D), not necessarily normalised.
        facts: The facts about the same texts.
        spec: The recipe's task section, which chooses the loss.

    Returns:
        The losses (B,), in the order of the anchors.
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
    vectors: Tensor, facts: TextFacts, temperature: float, symmetric: bool = False
) -> Tensor:
    """Return the cross-entropy of each anchor's positive among all second texts (B,).

    Second texts are the positives and negatives of all examples. One that may also be correct is
    ignored for an anchor: if it equals the anchor or its positive, if it is the positive of an
    equal anchor, or if it has the anchor's label.

    Args:
        vectors: The normalised embeddings (T, D).
        facts: The facts about the same texts.
        temperature: The divisor of the cosines.
        symmetric: Whether to average with the cross-entropy of the anchor among all anchors.
    """
    is_anchor = facts["role"] == ANCHOR
    anchors = {key: values[is_anchor] for key, values in facts.items()}
    seconds = {key: values[~is_anchor] for key, values in facts.items()}
    logits = vectors[is_anchor] @ vectors[~is_anchor].T / temperature
    same_row = anchors["row"][:, None] == seconds["row"]
    is_own_positive = same_row & (seconds["role"] == POSITIVE)  # one True in each row
    own_positive = is_own_positive.int().argmax(1)  # the column of each anchor's positive
    # for each second text, the anchor of its example
    anchors_of_seconds = anchors["text"][same_row.int().argmax(0)]
    may_be_right = (
        (anchors["text"][:, None] == seconds["text"])
        | (seconds["text"][own_positive][:, None] == seconds["text"])
        | ((anchors["text"][:, None] == anchors_of_seconds) & (seconds["role"] == POSITIVE))
        | ((anchors["label"][:, None] == seconds["label"]) & (seconds["label"] != 0))
    )
    logits = logits.masked_fill(may_be_right & ~is_own_positive, -torch.inf)
    positive_logits = logits[is_own_positive]
    total = logits.logsumexp(1)
    if symmetric:
        total = (total + logits[:, own_positive].logsumexp(0)) / 2
    return total - positive_logits


def cosines_and_scores(vectors: Tensor, facts: TextFacts) -> tuple[Tensor, Tensor]:
    """Return the cosine of each pair (B,), given normalised embeddings (T, D), and its score."""
    first, second = (facts["role"] == role for role in (ANCHOR, POSITIVE))
    cosines = (vectors[first] * vectors[second]).sum(1)
    return cosines, facts["score"][first].to(cosines.dtype)


def cosent(cosines: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Return the CoSENT loss of a step, repeated for each of its pairs (B,).

    With s the cosines of the pairs, it is log(1 + sum of exp((s_j - s_i) / temperature)), over all
    i and j for which pair i has the higher score: a single number for the whole step.
    """
    s = cosines / temperature
    higher = scores[:, None] > scores[None, :]
    violations = (s[None, :] - s[:, None]).masked_fill(~higher, -torch.inf)
    loss = torch.cat([violations.new_zeros(1), violations.flatten()]).logsumexp(0)
    return loss.expand(len(cosines))
