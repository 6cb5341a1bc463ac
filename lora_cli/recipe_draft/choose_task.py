"""Choose the task for a table: the proposal of the task type with the highest certainty."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lora_cli.data.column_kinds import CONVERSATIONS
from lora_cli.data.text_columns import content_of, list_columns, unnesting_hint
from lora_cli.errors import LoraError, did_you_mean
from lora_cli.recipe import TASKS
from lora_cli.tasks import task_types
from lora_cli.tasks.proposal import NO_LABEL, BaseFacts, Certainty, Proposal, Table

READABLE_KINDS = ("text", "category", *CONVERSATIONS)


def choose_task(table: Table, base: BaseFacts) -> Proposal:
    """Return the proposed task for a table.

    Raises:
        LoraError: If the task is ambiguous, or no task supports such rows.
    """
    _require_columns(table)
    proposed = [kind.propose(table, base) for kind in task_types()]
    proposals = [*filter(None, [*proposed, _nested_table(table)])]
    if not proposals:
        hint = (
            f"name what is learned: `--text COLUMN --label COLUMN` ({list_columns(table.columns)})"
        )
        raise LoraError("no task reads such rows", table.place, hint)
    chosen = max(proposals, key=lambda proposal: (proposal.certainty, proposal.error is None))
    if chosen.error is not None:
        raise chosen.error
    if chosen.check is not None:
        chosen.check()
    _require_suitable(chosen, base)
    for column in table.columns:
        if chosen.renamed.get(column.name, column.name) not in chosen.used | chosen.also_read:
            chosen.left_out.setdefault(column.name, content_of(column))
    return chosen


def _require_suitable(chosen: Proposal, base: BaseFacts) -> None:
    """Reject a base model that cannot have the task's head, such as Mamba for classification."""
    kinds = dict(zip(TASKS, task_types(), strict=False))
    task: Any = kinds.get(chosen.keys["type"])
    model_type = base.model_type
    if model_type is None or not getattr(task, "has_head", False):
        return
    if model_type not in task.auto_class._model_mapping._model_mapping:
        what = f"a model of type `{model_type}` cannot be used for `{chosen.keys['type']}`"
        raise LoraError(what, "--model", TASKS[chosen.keys["type"]].suitable_models)


def _require_columns(table: Table) -> None:
    """Reject an option that does not name a column of the file; `--label none` is allowed."""
    by_name: Collection[str] = table.by_name
    options = {"--text": table.text, "--pair": table.pair, "--label": table.label}
    for option, name in options.items():
        is_none = option == "--label" and name == NO_LABEL
        if name is not None and name not in by_name and not is_none:
            hint = did_you_mean(name, by_name, "its columns are")
            raise LoraError(f"{table.place} has no column `{name}`", option, hint)


def _nested_table(table: Table) -> Proposal | None:
    """Return a proposal with an error if all columns of a table are nested in one column."""
    nested_columns = [column for column in table.columns if column.kind == "other"]
    turns = (
        column for column in nested_columns if isinstance(table.rows[0].get(column.name), list)
    )
    nested = next(turns, nested_columns[0] if nested_columns else None)
    if nested is None or table.text is not None:
        return None
    # a single object with all rows may also have a version or name, as in SQuAD
    has_all_rows = len(table.rows) == 1 and len(table.rows[0][nested.name]) > 1
    if any(column.kind in READABLE_KINDS for column in table.columns) and not has_all_rows:
        return None
    what = f"the columns stand inside `{nested.name}`, and no task looks there"
    error = LoraError(what, table.place, unnesting_hint(nested, table.rows, table.place))
    return Proposal({}, {}, [], certainty=Certainty.UNREADABLE, error=error)
