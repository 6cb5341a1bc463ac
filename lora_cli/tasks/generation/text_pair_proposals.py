"""Rows of a text and another that is written of it: translations, summaries, for `lora init`."""

from __future__ import annotations

from collections.abc import Sequence

from lora_cli.data.column_kinds import Column
from lora_cli.errors import LoraError
from lora_cli.tasks.generation.language_model_proposals import PROMPT_NAMES
from lora_cli.tasks.generation.text_pair_names import LANGUAGES, language_of, source_and_target
from lora_cli.tasks.proposal import BaseFacts, Certainty, Proposal, Table, proposed
from lora_cli.tasks.texts.text_checks import check_texts

SUMMARIES = ("summary", "highlights", "abstract", "headline", "tldr")
WRITTEN = ("text", "category", "id", "list")  # kinds of columns that may be targets
OTHER_WAY = "exchange the two columns to translate the other way"


def propose_pairs(table: Table, base: BaseFacts) -> Proposal | None:
    """Return which text of a table is written of which; see `Task.propose`."""
    if not base.is_encoder_decoder:
        return None
    if table.are_lines and not table.names_columns:
        first, second = table.columns
        why = f"a line of `{second.name}` belongs to the same line of `{first.name}`"
        return proposed(lambda: _pair(first, second, why, table, base), Certainty.ONLY)
    if table.names_columns:
        if table.text is None or table.label not in table.by_name:
            return None
        asked, said = table.by_name[table.text], table.by_name[table.label]
        if said.kind != "text" and not (said.kind == "list" and _holds_texts(said, table)):
            return None
        return proposed(lambda: _pair(asked, said, "", table, base), Certainty.NAMED)
    if (named := _by_names(table.columns)) is not None:
        first, second = named
        return proposed(lambda: _pair(first, second, "", table, base), Certainty.NAMED)
    texts = [column for column in table.columns if column.kind == "text"]
    if len(texts) != 2:
        return None
    first, second = source_and_target(texts) or texts
    return proposed(lambda: _pair(first, second, "", table, base), Certainty.LIKELY)


def _by_names(columns: Sequence[Column]) -> tuple[Column, Column] | None:
    """Return the source and the target, where two names go together."""
    lower = {column.name.lower(): column for column in columns}
    for source, target in [*PROMPT_NAMES, ("source", "references"), ("src", "tgt")]:
        asked, said = lower.get(source), lower.get(target)
        if asked is not None and said is not None and said.kind in WRITTEN:
            return asked, said
    languages = [column for column in columns if language_of(column.name) is not None]
    if len(languages) == 2 and all(column.kind in WRITTEN for column in languages):
        return languages[0], languages[1]
    return None


def _holds_texts(column: Column, table: Table) -> bool:
    """Return whether a column of lists holds sentences, not labels."""
    lists = [v for row in table.rows if isinstance(v := row.get(column.name), list)]
    texts = [text for items in lists for text in items if isinstance(text, str)]
    return bool(texts) and sum(len(text.split()) > 3 for text in texts) * 2 > len(texts)


def _pair(source: Column, target: Column, why: str, table: Table, base: BaseFacts) -> Proposal:
    """Return the task of a source and a target.

    Raises:
        LoraError: If the model asks for languages that the names of the columns do not say.
    """
    keys = {
        "type": "seq2seq_lm", "source_column": source.name, "target_column": target.name
    }  # fmt: skip
    reasons = {
        "": why or f"`{target.name}` is written of `{source.name}`",
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
            keys[f"{side}_language"] = _code_of(code, column, base, table)
            reasons[f"{side}_language"] = f"as the model calls the language of `{column.name}`"
    prefix = _prefix(codes, target) if base.model_type == "t5" else ""
    if prefix:
        keys["prefix"] = prefix
        reasons["prefix"] = "as T5 was trained to be asked"
    proposal = Proposal(keys, reasons, [source.name, target.name])
    proposal.limits = {"max_source_length": [source.name], "max_target_length": [target.name]}
    if target.kind != "list":
        proposal.check = lambda: check_texts(table, proposal)
    return proposal


def _prefix(codes: Sequence[str | None], target: Column) -> str:
    """Return what T5's own training put before such sources."""
    source, other = codes
    if source is not None and other is not None:
        return f"translate {LANGUAGES[source][1]} to {LANGUAGES[other][1]}: "
    return "summarize: " if target.name.lower() in SUMMARIES else ""


def _code_of(code: str | None, column: Column, base: BaseFacts, table: Table) -> str:
    """Return what the model calls a language.

    Raises:
        LoraError: If it is not known, or the model has no such language.
    """
    three = LANGUAGES[code][0] if code else ""
    for known in base.language_codes:
        if code and (known == code or known.startswith((f"{code}_", f"{three}_"))):
            return known
    raise LoraError(
        f"`{base.name}` needs to know the language of `{column.name}`",
        table.place,
        "name the columns, or the two files, by their languages: `en` and `de`; or write the "
        "recipe with `task.source_language` and `task.target_language`",
    )
