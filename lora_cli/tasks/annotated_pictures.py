"""Rows of a picture with boxes, for `lora init`."""

from __future__ import annotations

from lora_cli.tasks.proposal import BaseFacts, Proposal, Table


def propose_objects(table: Table, base: BaseFacts) -> Proposal | None:
    """Return which objects of a picture a table has; see `Task.propose`."""
    return None
