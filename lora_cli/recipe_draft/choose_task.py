"""Which task a table is for: that of the task type which is most certain of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lora_cli.data.column_kinds import CONVERSATIONS
from lora_cli.data.text_columns import content_of, listed, unnesting_hint
from lora_cli.errors import LoraError, did_you_mean
from lora_cli.recipe import TASKS
from lora_cli.tasks import task_types
from lora_cli.tasks.proposal import NO_LABEL, BaseFacts, Certainty, Proposal, Table

READABLE = ("text", "category", *CONVERSATIONS)


def choose_task(table: Table, base: BaseFacts) -> Proposal:
    """Return the task of a table.

    Raises:
        LoraError: If it cannot be decided, or no task reads such rows.
    """
    _require_columns(table)
    found = [kind.propose(table, base) for kind in task_types()]
    proposals = [*filter(None, [*found, _unreadable(table)])]
    if not proposals:
        hint = f"name what is learned: `--text COLUMN --label COLUMN` ({listed(table.columns)})"
        raise LoraError("no task reads such rows", table.place, hint)
    chosen = max(proposals, key=lambda one: (one.certainty, one.error is None))
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
    """Reject a base that cannot get the head of the task, such as a Mamba for a classifier."""
    kinds = dict(zip(TASKS, task_types(), strict=False))
    task: Any = kinds.get(chosen.keys["type"])
    model_type = base.model_type
    if model_type is None or not getattr(task, "has_head", False):
        return
    if model_type not in task.auto_class._model_mapping._model_mapping:
        what = f"a model of type `{model_type}` cannot be used for `{chosen.keys['type']}`"
        raise LoraError(what, "--model", TASKS[chosen.keys["type"]].suitable_models)


def _require_columns(table: Table) -> None:
    """Reject an option that names no column of the file; `--label none` names none on purpose."""
    by_name: Collection[str] = table.by_name
    named = {"--text": table.text, "--pair": table.pair, "--label": table.label}
    for option, name in named.items():
        is_none = option == "--label" and name == NO_LABEL
        if name is not None and name not in by_name and not is_none:
            hint = did_you_mean(name, by_name, "its columns are")
            raise LoraError(f"{table.place} has no column `{name}`", option, hint)


def _unreadable(table: Table) -> Proposal | None:
    """Return the error of a table whose columns are all inside another, if it is such a one."""
    inside = [column for column in table.columns if column.kind == "other"]
    turns = (one for one in inside if isinstance(table.rows[0].get(one.name), list))
    nested = next(turns, inside[0] if inside else None)
    if nested is None or table.text is not None:
        return None
    # one object that holds all rows has a version or a name too, as SQuAD's
    is_whole = len(table.rows) == 1 and len(table.rows[0][nested.name]) > 1
    if any(column.kind in READABLE for column in table.columns) and not is_whole:
        return None
    what = f"the columns stand inside `{nested.name}`, and no task looks there"
    error = LoraError(what, table.place, unnesting_hint(nested, table.rows, table.place))
    return Proposal({}, {}, [], certainty=Certainty.UNREADABLE, error=error)
