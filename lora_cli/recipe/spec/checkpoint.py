"""`checkpoint`: what is saved on the way."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lora_cli.recipe.spec.section import Positive, Section, Word


class CheckpointSpec(Section):
    """When the state of training is saved, so that it can be resumed."""

    every_steps: Positive | None = None
    """Steps between two checkpoints. Default: once an epoch."""

    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after which there is a checkpoint besides: what a crash costs at most."""

    keep: Positive = 2
    """How many are kept; the newest and the best always are."""

    mirror: Word | None = None
    """Where each checkpoint is copied to, so that `--resume` can go on after this machine and its
    disk are gone: a folder (relative to the recipe), or an address that fsspec knows
    (`s3://bucket/run`, with `pip install s3fs`)."""

    allow_changes: bool = False
    """Let `--resume` go on though the recipe, the data or the machine are not those that the run
    was started with. The report lists what changed, and the result is no longer that of one run.
    (Model, task and adapter cannot change.)"""
