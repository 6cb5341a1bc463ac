"""Proposes text embedding for `lora init`, for rows of texts that belong together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lora_cli.data.column_kinds import Column, as_number
from lora_cli.data.jq_commands import field, jq_command
from lora_cli.errors import LoraError
from lora_cli.tasks.proposal import BaseFacts, Certainty, Proposal, Table, proposed
from lora_cli.tasks.texts.text_checks import check_texts

ANCHOR_NAMES = ("anchor", "query", "question")
POSITIVE_NAMES = ("positive", "positives", "pos", "positive_passage", "positive_text")
NEGATIVE_NAME = re.compile(r"(?i)(hard_?)?neg(ative)?s?(_passage|_text)?(_?\d+)?")
SENTENCE_PAIRS = [("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("text1", "text2"),
             ("sentence_a", "sentence_b")]  # fmt: skip
SCORE_NAMES = ("score", "similarity", "similarity_score", "relatedness_score")
SIMCSE_NAMES = ("sent0", "sent1")  # a text and a paraphrase
POSITIVE_LIST_NAME = re.compile(
    r"(?i)pos(itives?)?([_ ]?(passages|texts|ctxs|docs))?s?"
)  # columns of lists
NEGATIVE_LIST_NAME = re.compile(
    r"(?i)(hard_?)?neg(atives?)?([_ ]?(passages|texts|ctxs|docs))?s?"
)  # columns of lists
TEXT_KINDS = ("text", "category", "list")
LIST_KINDS = ("list", "other")


def propose_embedding(table: Table, base: BaseFacts) -> Proposal | None:
    """Return a proposal to embed the texts of a table; see `Task.propose`."""
    if table.names_columns or base.is_encoder_decoder:
        return None
    lower = {column.name.lower(): column for column in table.columns}
    anchor = next((lower[name] for name in ANCHOR_NAMES if name in lower), None)
    positive = next((lower[name] for name in POSITIVE_NAMES if name in lower), None)
    if anchor is not None and positive is not None and positive.kind in TEXT_KINDS[:2]:
        anchor_column, positive_column = anchor, positive  # which no other task calls its columns
        return proposed(
            lambda: _pair_proposal(anchor_column, positive_column, table), Certainty.NAMED
        )
    positive_lists = [
        c for c in table.columns if POSITIVE_LIST_NAME.fullmatch(c.name) and c.kind in LIST_KINDS
    ]
    if anchor is not None and anchor.kind in TEXT_KINDS[:2] and positive_lists:
        error = _positive_lists_error(anchor, positive_lists[0], table)
        return Proposal({}, {}, [], certainty=Certainty.NAMED, error=error)
    first_, second_ = (lower.get(name) for name in SIMCSE_NAMES)
    has_negatives = any(map(NEGATIVE_NAME.fullmatch, lower))
    if first_ is not None and second_ is not None and (has_negatives or base.is_embedding_model):
        return proposed(lambda: _pair_proposal(first_, second_, table), Certainty.NAMED)
    if not base.is_embedding_model:
        return None
    for first, second in SENTENCE_PAIRS:
        first_column, second_column = lower.get(first), lower.get(second)
        score = next((lower[name] for name in SCORE_NAMES if name in lower), None)
        if (
            first_column is not None
            and second_column is not None
            and score is not None
            and score.kind == "number"
        ):
            found = _score_proposal(first_column, second_column, score, table)
            return proposed(lambda: found, Certainty.NAMED)  # noqa: B023 - called at once
    return None


def _positive_lists_error(anchor: Column, positives: Column, table: Table) -> LoraError:
    """Return the error for rows with lists of positives, as in data of FlagEmbedding and DPR."""
    negative_lists = [
        c for c in table.columns if NEGATIVE_LIST_NAME.fullmatch(c.name) and c.kind in LIST_KINDS
    ]
    one = "$one.text" if _are_objects(positives, table) else "$one"
    new = f"anchor: {field(anchor.name)}, positive: {one}"
    if negative_lists:
        lists = [
            f"[{name}[].text]" if _are_objects(column, table) else name
            for column in negative_lists
            for name in (field(column.name),)
        ]
        new += f", negatives: ({' + '.join(lists)})"
    program = f"{field(positives.name)}[] as $one | {{{new}}}"
    return LoraError(
        f"`{positives.name}` holds lists, and a row of `text_embedding` has one positive",
        table.place,
        f"write a row for each: {jq_command(program, table.place)}",
    )


def _are_objects(column: Column, table: Table) -> bool:
    """Return whether a column contains lists of objects, such as passages with their titles."""
    lists = (value for row in table.rows if (value := row.get(column.name)))
    first = next(lists, None)
    return isinstance(first, list) and isinstance(first[0], dict)


def _pair_proposal(anchor: Column, positive: Column, table: Table) -> Proposal:
    """Return the proposal for an anchor, its positive, and negatives if there are any."""
    negatives = [
        column.name
        for column in table.columns
        if NEGATIVE_NAME.fullmatch(column.name) and column.kind in TEXT_KINDS
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
    return _with_check(keys, why, [anchor.name, positive.name], table)


def _score_proposal(first: Column, second: Column, score: Column, table: Table) -> Proposal:
    """Return the proposal for two texts and a score of their similarity."""
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
    return _with_check(keys, why, [first.name, second.name], table)


def _with_check(
    keys: dict[str, Any], why: dict[str, str], inputs: Sequence[str], table: Table
) -> Proposal:
    proposal = Proposal(keys, why, list(inputs))
    # each text is truncated separately, so the longest column decides
    longest = max(inputs, key=lambda name: table.by_name[name].characters)
    proposal.limits = {"max_length": [longest]}
    proposal.check = lambda: check_texts(table, proposal)
    return proposal
