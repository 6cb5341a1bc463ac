"""Adapt hints of errors to `lora init`, which has no `--set` and no recipe yet."""

from __future__ import annotations

import re
from dataclasses import replace

from lora_cli.errors import LoraError, Problem

OVERRIDE = re.compile(r"""`--set (?P<quote>['"]?)(?P<key>[\w.]+)=(?P<value>.*?)(?P=quote)`""")
NO_OVERRIDES = "`lora init` has no `--set`: change the file, or write the recipe by hand"


def without_overrides(error: LoraError) -> LoraError:
    """Return an error whose hints name recipe keys instead of `--set KEY=VALUE`."""
    problems = [_without_override(problem) for problem in error.problems]
    return type(error)(problems)


def _without_override(problem: Problem) -> Problem:
    hint = problem.hint or ""
    if "--set" not in hint:
        return problem
    keys = OVERRIDE.sub(r"`\g<key>: \g<value>` in a recipe", hint)
    return replace(problem, hint=f"{keys} ({NO_OVERRIDES})")
