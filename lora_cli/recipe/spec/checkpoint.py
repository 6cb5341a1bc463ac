"""`checkpoint`: when the state of training is saved, and where to."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lora_cli.recipe.spec.section import Positive, Section, Word


class CheckpointSpec(Section):
    """When the state of training is saved, so that it can be resumed."""

    every_steps: Positive | None = None
    """Steps between two checkpoints. Default: one checkpoint per epoch."""

    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Also save a checkpoint after this many minutes, which limits what a crash costs."""

    keep: Positive = 2
    """How many checkpoints are kept. The newest and the best are always kept."""

    mirror: Word | None = None
    """Where each checkpoint is copied to, so that `--resume` works even if this machine and its
    disk are gone: a folder (relative to the recipe), or an address that fsspec supports
    (`s3://bucket/run`, with `pip install s3fs`)."""

    allow_changes: bool = False
    """Let `--resume` continue although the recipe, the data or the machine differ from those that
    the run was started with. The report lists the differences; the result is no longer that of a
    single run. (Model, task and adapter cannot change.)"""
