"""Proposes sequence-to-sequence recipes for `lora init`: translation, summaries and the like."""

from __future__ import annotations

from collections.abc import Sequence

from lora_cli.data.column_kinds import Column
from lora_cli.errors import LoraError
from lora_cli.tasks.generation.language_model_proposals import PROMPT_NAMES
from lora_cli.tasks.generation.text_pair_names import LANGUAGES, language_of, source_and_target
from lora_cli.tasks.proposal import BaseFacts, Certainty, Proposal, Table, proposed
from lora_cli.tasks.texts.text_checks import check_texts

SUMMARIES = ("summary", "highlights", "abstract", "headline", "tldr")
TARGET_KINDS = ("text", "category", "id", "list")  # kinds of columns that may be targets
OTHER_WAY = "exchange the two columns to translate the other way"


def propose_pairs(table: Table, base: BaseFacts) -> Proposal | None:
    """Return a proposal to generate one text column from another; see `Task.propose`."""
    if not base.is_encoder_decoder:
        return None
    if table.are_lines and not table.names_columns:
        first, second = table.columns
        why = f"a line of `{second.name}` belongs to the same line of `{first.name}`"
        return proposed(lambda: _pair(first, second, why, table, base), Certainty.ONLY)
    if table.names_columns:
        if table.text is None or table.label not in table.by_name:
            return None
        source, target = table.by_name[table.text], table.by_name[table.label]
        if target.kind != "text" and not (target.kind == "list" and _holds_texts(target, table)):
            return None
        return proposed(lambda: _pair(source, target, "", table, base), Certainty.NAMED)
    if (named := _by_names(table.columns)) is not None:
        first, second = named
        return proposed(lambda: _pair(first, second, "", table, base), Certainty.NAMED)
    texts = [column for column in table.columns if column.kind == "text"]
    if len(texts) != 2:
        return None
    first, second = source_and_target(texts) or texts
    return proposed(lambda: _pair(first, second, "", table, base), Certainty.LIKELY)


def _by_names(columns: Sequence[Column]) -> tuple[Column, Column] | None:
    """Return the source and the target if the names of two columns identify them."""
    lower = {column.name.lower(): column for column in columns}
    for source_name, target_name in [*PROMPT_NAMES, ("source", "references"), ("src", "tgt")]:
        source, target = lower.get(source_name), lower.get(target_name)
        if source is not None and target is not None and target.kind in TARGET_KINDS:
            return source, target
    languages = [column for column in columns if language_of(column.name) is not None]
    if len(languages) == 2 and all(column.kind in TARGET_KINDS for column in languages):
        return languages[0], languages[1]
    return None


def _holds_texts(column: Column, table: Table) -> bool:
    """Return whether a column of lists contains sentences rather than labels."""
    lists = [v for row in table.rows if isinstance(v := row.get(column.name), list)]
    texts = [text for items in lists for text in items if isinstance(text, str)]
    return bool(texts) and sum(len(text.split()) > 3 for text in texts) * 2 > len(texts)


def _pair(source: Column, target: Column, why: str, table: Table, base: BaseFacts) -> Proposal:
    """Return the proposal for a source and a target column.

    Raises:
        LoraError: If the model needs languages that cannot be read from the names of the columns.
    """
    keys = {
        "type": "seq2seq_lm", "source_column": source.name, "target_column": target.name
    }  # fmt: skip
    reasons = {
        "": why or f"`{target.name}` is generated from `{source.name}`",
        "source_column": f"{source.characters:.0f} characters on average",
        "target_column": (
            "lists of texts: each is a right answer to its row"
            if target.kind == "list"
            else f"{target.characters:.0f} characters on average; {OTHER_WAY}"
        ),
    }
    codes = [language_of(column.name) for column in (source, target)]
    if base.language_codes:
        for side, column, code in zip(("source", "target"), (source, target), codes, strict=True):
            keys[f"{side}_language"] = _model_code(code, column, base, table)
            reasons[f"{side}_language"] = f"the model's code for the language of `{column.name}`"
    prefix = _prefix(codes, target) if base.model_type == "t5" else ""
    if prefix:
        keys["prefix"] = prefix
        reasons["prefix"] = "the prefix of this task in the training of T5"
    proposal = Proposal(keys, reasons, [source.name, target.name])
    proposal.limits = {"max_source_length": [source.name], "max_target_length": [target.name]}
    if target.kind != "list":
        proposal.check = lambda: check_texts(table, proposal)
    return proposal


def _prefix(codes: Sequence[str | None], target: Column) -> str:
    """Return the prefix of such sources in T5's training; empty if there is none."""
    source_code, target_code = codes
    if source_code is not None and target_code is not None:
        return f"translate {LANGUAGES[source_code][1]} to {LANGUAGES[target_code][1]}: "
    return "summarize: " if target.name.lower() in SUMMARIES else ""


def _model_code(code: str | None, column: Column, base: BaseFacts, table: Table) -> str:
    """Return the model's code for the language of a column.

    Raises:
        LoraError: If the language is unknown, or the model does not have it.
    """
    long_code = LANGUAGES[code][0] if code else ""
    for model_code in base.language_codes:
        if code and (model_code == code or model_code.startswith((f"{code}_", f"{long_code}_"))):
            return model_code
    raise LoraError(
        f"`{base.name}` needs to know the language of `{column.name}`",
        table.place,
        "name the columns, or the two files, by their languages: `en` and `de`; or write the "
        "recipe with `task.source_language` and `task.target_language`",
    )
