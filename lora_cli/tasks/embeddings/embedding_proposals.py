"""Rows of texts that belong together, such as a question and its answer, for `lora init`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lora_cli.data.column_kinds import Column, as_number
from lora_cli.data.jq_commands import field, jq_command
from lora_cli.errors import LoraError
from lora_cli.tasks.proposal import BaseFacts, Certainty, Proposal, Table, proposed
from lora_cli.tasks.texts.text_checks import check_texts

ANCHORS = ("anchor", "query", "question")
POSITIVES = ("positive", "positives", "pos", "positive_passage", "positive_text")
NEGATIVES = re.compile(r"(?i)(hard_?)?neg(ative)?s?(_passage|_text)?(_?\d+)?")
SENTENCES = [("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("text1", "text2"),
             ("sentence_a", "sentence_b")]  # fmt: skip
SCORES = ("score", "similarity", "similarity_score", "relatedness_score")
SIMCSE = ("sent0", "sent1")  # a text, and one that means the same
SEVERAL = re.compile(r"(?i)pos(itives?)?([_ ]?(passages|texts|ctxs|docs))?s?")  # lists of positives
REFUSED = re.compile(
    r"(?i)(hard_?)?neg(atives?)?([_ ]?(passages|texts|ctxs|docs))?s?"
)  # lists, too
TEXTS = ("text", "category", "list")
LISTS = ("list", "other")


def propose_embedding(table: Table, base: BaseFacts) -> Proposal | None:
    """Return which texts of a table belong together; see `Task.propose`."""
    if table.names_columns or base.is_encoder_decoder:
        return None
    lower = {column.name.lower(): column for column in table.columns}
    anchor = next((lower[name] for name in ANCHORS if name in lower), None)
    positive = next((lower[name] for name in POSITIVES if name in lower), None)
    if anchor is not None and positive is not None and positive.kind in TEXTS[:2]:
        a, b = anchor, positive  # which no other task calls its columns
        return proposed(lambda: _pairs(a, b, table), Certainty.NAMED)
    several = [c for c in table.columns if SEVERAL.fullmatch(c.name) and c.kind in LISTS]
    if anchor is not None and anchor.kind in TEXTS[:2] and several:
        error = _several(anchor, several[0], table)
        return Proposal({}, {}, [], certainty=Certainty.NAMED, error=error)
    first_, second_ = (lower.get(name) for name in SIMCSE)
    has_negatives = any(map(NEGATIVES.fullmatch, lower))
    if first_ is not None and second_ is not None and (has_negatives or base.embeds):
        return proposed(lambda: _pairs(first_, second_, table), Certainty.NAMED)
    if not base.embeds:
        return None
    for first, second in SENTENCES:
        a_, b_ = lower.get(first), lower.get(second)
        score = next((lower[name] for name in SCORES if name in lower), None)
        if a_ is not None and b_ is not None and score is not None and score.kind == "number":
            found = _scored(a_, b_, score, table)
            return proposed(lambda: found, Certainty.NAMED)  # noqa: B023 - called at once
    return None


def _several(anchor: Column, positives: Column, table: Table) -> LoraError:
    """Return the error of rows that have a list of positives, as those of FlagEmbedding and DPR."""
    refused = [c for c in table.columns if REFUSED.fullmatch(c.name) and c.kind in LISTS]
    one = "$one.text" if _are_objects(positives, table) else "$one"
    new = f"anchor: {field(anchor.name)}, positive: {one}"
    if refused:
        lists = [
            f"[{own}[].text]" if _are_objects(column, table) else own
            for column in refused
            for own in (field(column.name),)
        ]
        new += f", negatives: ({' + '.join(lists)})"
    how = f"{field(positives.name)}[] as $one | {{{new}}}"
    return LoraError(
        f"`{positives.name}` holds lists, and a row of `text_embedding` has one positive",
        table.place,
        f"write a row for each: {jq_command(how, table.place)}",
    )


def _are_objects(column: Column, table: Table) -> bool:
    """Return whether a column holds lists of objects, such as passages with their titles."""
    lists = (value for row in table.rows if (value := row.get(column.name)))
    first = next(lists, None)
    return isinstance(first, list) and isinstance(first[0], dict)


def _pairs(anchor: Column, positive: Column, table: Table) -> Proposal:
    """Return the task of an anchor, its positive, and negatives."""
    negatives = [
        column.name
        for column in table.columns
        if NEGATIVES.fullmatch(column.name) and column.kind in TEXTS
    ]
    keys: dict[str, Any] = {"type": "text_embedding", "anchor_column": anchor.name,
                            "positive_column": positive.name}  # fmt: skip
    why = {
        "": f"by the names of `{anchor.name}` and `{positive.name}`",
        "anchor_column": f"{anchor.characters:.0f} characters on average",
        "positive_column": f"{positive.characters:.0f} characters on average",
    }
    if negatives:
        keys["negative_columns"] = negatives
        why["negative_columns"] = "texts that look right and are not"
    return _checked(keys, why, [anchor.name, positive.name], table)


def _scored(first: Column, second: Column, score: Column, table: Table) -> Proposal:
    """Return the task of two texts and how near they are."""
    numbers = [as_number(value, score.numbers) for value in score.counts]
    highest = max(map(abs, numbers), default=1.0)
    scale = next((top for top in (1.0, 5.0, 10.0, 100.0) if highest <= top), highest)
    keys: dict[str, Any] = {
        "type": "text_embedding", "anchor_column": first.name, "positive_column": second.name,
        "score_column": score.name,
    }  # fmt: skip
    why = {
        "": "two texts, and how near they are in meaning; the base is one that embeds texts",
        "score_column": f"numbers from {min(numbers):g} to {max(numbers):g}",
    }
    if scale != 1.0:
        keys["score_scale"] = scale
        why["score_scale"] = "the score of two texts that mean the same"
    return _checked(keys, why, [first.name, second.name], table)


def _checked(
    keys: dict[str, Any], why: dict[str, str], inputs: Sequence[str], table: Table
) -> Proposal:
    proposal = Proposal(keys, why, list(inputs))
    # a text is cut by itself, so the longest column decides
    longest = max(inputs, key=lambda name: table.by_name[name].characters)
    proposal.limits = {"max_length": [longest]}
    proposal.check = lambda: check_texts(table, proposal)
    return proposal
