"""Turn Typer's errors about arguments into errors with a place and a hint, like all others.

Depending on its version, Typer raises errors of Click or of its own copy of Click. So errors are
distinguished by the names of their classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lora_cli.errors import LoraError, did_you_mean, nearest


def usage_error(error: Exception, given: Sequence[str]) -> LoraError | None:
    """Return the error to print for an error in the arguments; None for others, and for the help.

    Args:
        error: The exception that was raised.
        given: The arguments of the command line.
    """
    name = type(error).__name__
    if not hasattr(error, "format_message") or name == "NoArgsIsHelpError":
        return None
    context: Any = getattr(error, "ctx", None)
    command = context.command_path if context else " ".join(["lora", *given[:1]])
    help_hint = f"`{command} --help` lists the options"
    at = f"the arguments of `{command}`"
    parameter: Any = getattr(error, "param", None)
    named = _name(parameter)
    match name:
        case "NoSuchOption":
            option = str(getattr(error, "option_name", ""))
            known = [o for p in context.command.params for o in p.opts] if context else []
            close = nearest(option, [*known, "--help", "--debug"])
            hint = f"did you mean `{close}`? {help_hint}" if close else help_hint
            return LoraError(f"there is no option `{option}`", at, hint)
        case "MissingParameter":
            about = getattr(parameter, "help", None)
            hint = f"add it: {about[:1].lower()}{about[1:].rstrip('.')}" if about else help_hint
            return LoraError(f"{named} is missing", at, hint)
        case "BadParameter":
            return LoraError(_bad_value(str(error), named, given), at, help_hint)
    message = str(error.format_message())
    if found := re.search(r"No such command ['\"](.*?)['\"]", message):
        commands = list(context.command.commands) if context else []
        hint = did_you_mean(found[1], commands, "the commands are")
        return LoraError(f"there is no command `{found[1]}`", at, hint)
    if found := re.search(r"unexpected extra argument\S* \((.*)\)", message):
        hint = f"a text with spaces needs quotation marks; {help_hint}"
        return LoraError(f"`{found[1]}` is one argument too many", at, hint)
    if found := re.search(r"Option ['\"](\S+)['\"] requires an argument", message):
        return LoraError(f"`{found[1]}` is missing its value", at, help_hint)
    if found := re.search(r"Option ['\"](\S+)['\"] does not take a value", message):
        return LoraError(f"`{found[1]}` takes no value", at, f"write `{found[1]}` alone")
    return LoraError(message.rstrip("."), at, help_hint)


def _name(parameter: Any) -> str:
    """Return the name of a parameter as the help shows it: `--adapter`, or RECIPE."""
    options = [name for name in getattr(parameter, "opts", []) if name.startswith("--")]
    shown = options or [getattr(parameter, "metavar", None) or getattr(parameter, "name", "it")]
    return f"`{shown[0]}`"


def _bad_value(message: str, named: str, given: Sequence[str]) -> str:
    """Return a message about an option's wrong value that is the same for every Typer version."""
    kind = "another value"
    if re.search("integer|int ", message):
        kind = "a whole number"
    elif re.search("number|float", message):
        kind = "a number"
    if least := re.search(r"(?:greater than or equal to|>=) ?(-?[\d.]+)", message):
        kind = f"{least[1]} or more"
    option = named.strip("`")
    pairs = zip(given, [*given[1:], ""], strict=True)
    values = [after for one, after in pairs if one == option]
    values += [one.partition("=")[2] for one in given if one.startswith(f"{option}=")]
    return f"{named} takes {kind}" + (f", not `{values[-1]}`" if values else "")
