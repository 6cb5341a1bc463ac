"""The command line `lora`: its commands, and how errors are printed.

A command reads its recipe first, then imports the code that it runs. Data goes to stdout, progress
and errors to stderr. This module imports neither torch nor pydantic, so `lora --help` and shell
completion respond at once.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
from types import TracebackType
from typing import Annotated

import typer

from lora_cli.cli.check_command import check
from lora_cli.cli.combine_command import combine
from lora_cli.cli.eval_command import evaluate
from lora_cli.cli.export_command import export
from lora_cli.cli.init_command import init
from lora_cli.cli.merge_command import merge
from lora_cli.cli.predict_command import predict
from lora_cli.cli.push_command import push
from lora_cli.cli.recipe_commands import params, schema, validate
from lora_cli.cli.shell_completion import join_split_words
from lora_cli.cli.standard_streams import prepare_streams
from lora_cli.cli.train_command import train
from lora_cli.errors import (
    LoraError,
    ResourceError,
    system_error,
)
from lora_cli.redaction import redacted

NO_SPACE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file has grown larger than the system allows",
}
# errors about a path, which the user can fix
PATH_ERRORS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST,
    errno.EISDIR, errno.ELOOP, errno.ENOENT,
)  # fmt: skip

# the options that name the output of a command
OUTPUT_OPTIONS = ("--to", "-o", "--output")

app = typer.Typer(
    help="Fine-tune pretrained models with low-rank adapters, from YAML recipes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; turn errors that a user can fix into a message and an exit code."""
    # by default, Click turns an interruption into exit code 1
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    debug = "--debug" in sys.argv or bool(os.environ.get("LORA_DEBUG"))
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    prepare_streams()
    if os.environ.get("_LORA_COMPLETE") == "complete_bash":
        join_split_words()
    try:
        code = app(prog_name="lora", standalone_mode=False)
        sys.stdout.flush()
    except Exception as error:
        known = error if isinstance(error, LoraError) else _known_error(error)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error, file=sys.stderr)  # noqa: T201 - the help
            sys.exit(LoraError.exit_code)
        if debug:
            sys.excepthook = _show_traceback  # not earlier, as Typer sets its own
            raise
        if known is None:
            from lora_cli.unexpected_errors import unexpected_error

            known = unexpected_error(error, sys.argv[1:])
        print(redacted(str(known)), file=sys.stderr)  # noqa: T201 - this is where errors are printed
        sys.exit(known.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _show_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a traceback as Python does, with secrets masked."""
    import traceback

    text = "".join(traceback.format_exception(kind, error, trace))
    print(redacted(text), end="", file=sys.stderr)  # noqa: T201 - as above


def _known_error(error: Exception) -> LoraError | None:
    """Return the error to print for a mistake in the arguments, a file error or full memory."""
    from lora_cli.cli.argument_errors import usage_error

    if (wrong := usage_error(error, sys.argv[1:])) is not None:
        return wrong
    number = system_error(error)
    filename = getattr(error, "filename", None)
    if number in NO_SPACE:
        hint = "free some space" + (", then use `--resume`" if "train" in sys.argv[1:2] else "")
        # some libraries do not name the file
        place = filename or next((a for a in sys.argv if a in OUTPUT_OPTIONS), None)
        return ResourceError(NO_SPACE[number], place, hint)
    if number in PATH_ERRORS and filename:
        denied = number in (errno.EACCES, errno.EPERM, errno.EROFS)
        what = "the system denies access to the file" if denied else "the path cannot be used"
        hint = f"check it with `ls -ld {shlex.quote(str(filename))}`, or name another"
        return ResourceError(f"{what}: {os.strerror(number).lower()}", str(filename), hint)
    if isinstance(error, MemoryError):
        return ResourceError("the memory is full", hint="try `--set train.micro_batch_size=1`")
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        hint = (
            "halve `train.micro_batch_size` and double `train.gradient_accumulation_steps`, "
            "which gives the same result, or set `train.gradient_checkpointing=true`"
        )
        return ResourceError("the GPU's memory is full", hint=hint)
    return None


def _version(requested: bool) -> None:
    if requested:
        from lora_cli import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    pass


app.command()(train)
app.command("eval")(evaluate)
for command in (merge, combine, export, push, check, predict, init, params, validate, schema):
    app.command()(command)
