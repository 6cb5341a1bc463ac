"""The command line: each command loads the recipe first, then imports what it runs.

Data goes to stdout, progress and errors to stderr. This module imports neither torch nor pydantic,
so that `lora --help` and shell completion answer at once.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_cli.completion import join_words, offer_overrides, offer_splits
from lora_cli.environment import clean_environment
from lora_cli.errors import (
    LoraError,
    Problem,
    RegressionError,
    ResourceError,
    beside,
    counted,
    system_error,
)
from lora_cli.paths import expanded, path_problem
from lora_cli.printing import (
    print_comparison,
    print_measured,
    print_parameters,
    print_results,
)
from lora_cli.redaction import redacted
from lora_cli.streams import prepare_streams

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from lora_cli.recipe import Recipe
    from lora_cli.tasks import Task

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file has grown larger than the system allows",
}
# of a path that the user may fix: denied, not there, a file where a folder should be
NO_ENTRY = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST,
    errno.EISDIR, errno.ELOOP, errno.ENOENT,
)  # fmt: skip

# what names the place that a command writes to
OUTPUT_OPTIONS = ("--to", "-o", "--output")

app = typer.Typer(
    help="Fine-tune pretrained models with low-rank adapters, from YAML recipes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _meant(parameter: typer.CallbackParam, value: Any) -> Any:
    """Return the path, or paths, that an argument means: `~` is the home directory."""
    if isinstance(value, list | tuple):
        return [_meant(parameter, one) for one in value]
    if value is None:
        return None
    option = next((name for name in parameter.opts if name.startswith("--")), None)
    if (problem := path_problem(str(value), option or str(parameter.metavar))) is not None:
        raise LoraError([problem])
    return type(value)(expanded(str(value)))


RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="The recipe, a YAML file.",
        callback=_meant,
    ),
]
AdapterDir = Annotated[
    Path,
    typer.Option(
        "--adapter", help="Output folder of `lora train`, or a PEFT folder.", callback=_meant
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe; repeatable.",
        autocompletion=offer_overrides,
    ),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--recipe", help="Recipe for an adapter whose folder holds none.", callback=_meant
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line; turn every error that a user can fix into a message and a code."""
    # Click would turn an interruption into exit code 1.
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    debug = "--debug" in sys.argv or bool(os.environ.get("LORA_DEBUG"))
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    prepare_streams()
    if os.environ.get("_LORA_COMPLETE") == "complete_bash":
        join_words()
    try:
        code = app(prog_name="lora", standalone_mode=False)
        sys.stdout.flush()
    except Exception as error:
        known = error if isinstance(error, LoraError) else _known_error(error)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error, file=sys.stderr)  # noqa: T201 - the help
            sys.exit(LoraError.exit_code)
        if debug:
            sys.excepthook = _show_traceback  # not earlier: Typer has one of its own
            raise
        if known is None:
            from lora_cli.unexpected import unexpected_error

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
    """Return what to say of an error of the arguments, of files, or of memory, else None."""
    from lora_cli.arguments import usage_error

    if (wrong := usage_error(error, sys.argv[1:])) is not None:
        return wrong
    number = system_error(error)
    filename = getattr(error, "filename", None)
    if number in FULL:
        hint = "free some space" + (", then use `--resume`" if "train" in sys.argv[1:2] else "")
        # some libraries do not say which file it was
        place = filename or next((a for a in sys.argv if a in OUTPUT_OPTIONS), None)
        return ResourceError(FULL[number], place, hint)
    if number in NO_ENTRY and filename:
        denied = number in (errno.EACCES, errno.EPERM, errno.EROFS)
        what = "the system denies access to the file" if denied else "the path cannot be used"
        hint = f"check it with `ls -ld {shlex.quote(str(filename))}`, or name another"
        return ResourceError(f"{what}: {os.strerror(number).lower()}", str(filename), hint)
    if isinstance(error, MemoryError):
        return ResourceError("the memory is full", hint="try `--set train.micro_batch_size=1`")
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        hint = (
            "halve `train.micro_batch_size` and double `train.gradient_accumulation_steps`, "
            "which changes no number, or set `train.gradient_checkpointing=true`"
        )
        return ResourceError("the GPU's memory is full", hint=hint)
    return None


def _version(wanted: bool) -> None:
    if wanted:
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


def _load(path: Path, overrides: list[str] | None, output: Path | None = None) -> Recipe:
    from lora_cli.recipe import load_recipe

    sets = list(overrides or [])
    if output is not None:
        sets.append(f"output_dir={json.dumps(str(output))}")
    return load_recipe(path, sets)


def _quiet() -> None:
    """Keep the environment out of other libraries, and their bars and advice off the screen."""
    clean_environment()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(transformers|accelerate|torch|datasets)\.")


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Output folder (`output_dir`).",
            callback=_meant,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint, if there is one.")
    ] = False,
) -> None:
    """Train an adapter, evaluate it, and write its folder."""
    loaded = _load(recipe, overrides, output)
    _quiet()
    from lora_cli.training import end_processes
    from lora_cli.training import train as run

    report = run(loaded, resume)
    end_processes()
    if os.environ.get("RANK", "0") == "0":
        print_results(loaded, report)


def _recipe_for(adapter: Path, recipe: Path | None, overrides: list[str] | None) -> Recipe:
    """Return the recipe beside an adapter, or the one that is given."""
    if not adapter.is_dir():
        raise LoraError(f"there is no folder {adapter}", "--adapter", beside(adapter))
    if recipe is not None:
        return _load(recipe, overrides)
    from lora_cli.recipe import RECIPE_FILE, load_adapter_recipe

    if not (adapter / RECIPE_FILE).is_file():
        raise LoraError(
            f"{adapter} holds no {RECIPE_FILE}",
            "--adapter",
            "name a recipe with `--recipe FILE`, for its task and data",
        )
    return load_adapter_recipe(adapter, overrides or [])


@app.command("eval")
def evaluate(
    adapter: AdapterDir,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            help="train, validation or test. Default: all but train.",
            autocompletion=offer_splits,
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", help="Measure on this file, which has the recipe's columns.", callback=_meant
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against", help="Folder of an older adapter to compare with.", callback=_meant
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", help="Metric to compare by. Default: the recipe's main metric."),
    ] = None,
    max_drop: Annotated[
        float,
        typer.Option("--max-drop", min=0, help="How much worse than the older one it may be."),
    ] = 0.005,
    recipe: RecipeOption = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure a saved adapter on the data it was trained for, alone or against an older one."""
    if source is not None and split not in (None, "test"):
        hint = "leave `--split` out: a file is measured as `test`"
        raise LoraError("`--input` and `--split` exclude each other", "--split", hint)
    if metric is not None and against is None:
        hint = "add `--against DIR`; alone, an adapter is measured by `evaluate.metrics`"
        raise LoraError("`--metric` needs `--against`", "--metric", hint)
    loaded = _recipe_for(adapter, recipe, overrides)
    _quiet()
    from lora_cli.evaluation import definitions_of, evaluate_adapter, measure_file

    if source is not None:
        measure_file(loaded, source)
        split = "test"
    if against is not None:
        from lora_cli.comparison import compare

        found = compare(adapter, against, loaded, metric, max_drop, split)
        found.split = source.name if source is not None else found.split
        if not as_json:
            typer.echo(f"old  {against}\nnew  {adapter}")
        print_comparison(found, as_json)
        if found.worse:
            raise RegressionError(
                f"{found.metric} on {found.split} is worse by {found.drop:.4f}, "
                f"and {found.max_drop:g} is allowed",
                "--max-drop",
                "keep the old adapter, or allow it with "
                f"`--max-drop {math.ceil(found.drop * 1e4) / 1e4:g}`",
            )
        return
    results = evaluate_adapter(adapter, loaded, split)
    definitions = definitions_of(loaded)
    if as_json:
        facts = {**results, "metric_definitions": definitions}
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    print_measured(results, source, definitions)


@app.command()
def merge(
    adapter: AdapterDir,
    to: Annotated[
        Path,
        typer.Option(
            "--to",
            help="Folder of the merged model.",
            callback=_meant,
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="Hub id or folder of the base model. Default: the one that the adapter names.",
            callback=_meant,
        ),
    ] = None,
    recipe: RecipeOption = None,
    overrides: Overrides = None,
) -> None:
    """Merge an adapter into its base: a stand-alone model folder."""
    _quiet()
    from lora_cli.merging import merge_adapter

    result = merge_adapter(base, adapter, to, recipe, overrides)
    dtype = str(result.dtype).removeprefix("torch.")
    typer.echo(f"merged {counted(result.merged_modules, 'module')} into {result.folder}/ ({dtype})")
    typer.echo(
        f"outputs differ from base + adapter by {result.difference:.1e} in float32, "
        f"and by {result.rounding:.1e} more as {dtype}"
    )
    if result.untied:
        typer.echo(
            f"untied {' and '.join(result.untied)}: the adapter changes them differently, "
            "so each has its own weight now"
        )
    if not result.verified:
        typer.echo(
            "warning: the adapter's folder has no manifest, so its integrity could not be verified",
            err=True,
        )


@app.command()
def predict(
    adapter: AdapterDir,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT…")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="File of rows (csv, tsv, json lines, parquet, or a text a line).",
            callback=_meant,
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="File of the same rows with predictions.",
            callback=_meant,
        ),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option("--interactive", help="Answer line by line; a chat model remembers."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file, if it exists.")
    ] = False,
    recipe: RecipeOption = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Answer texts, the rows of a file, or a conversation, with the adapted model."""
    if interactive:
        if texts or source or target or as_json:
            other = "texts, files or `--json`"
            at, hint = "the arguments of `lora predict`", "leave one or the other out"
            raise LoraError(f"`--interactive` excludes {other}", at, hint)
        _converse(adapter, _recipe_for(adapter, recipe, overrides))
        return
    if bool(texts) == bool(source) or bool(source) != bool(target):
        raise LoraError(
            "expected either texts or an input file"
            if bool(texts) == bool(source)
            else "`--input` and `--output` go together",
            "the arguments of `lora predict`",
            "give texts, or a file with `--input FILE --output FILE`",
        )
    if source is not None and target is not None:
        from lora_cli.data.writing import refuse_target

        refuse_target(source, target, overwrite)  # before the model is loaded
    loaded = _recipe_for(adapter, recipe, overrides)
    _quiet()
    from lora_cli.evaluation import open_adapter
    from lora_cli.prediction import answer

    task, model, accelerator = open_adapter(adapter, loaded)
    if source is not None and target is not None:
        _predict_file(model, task, source, target, accelerator, overwrite)
        return
    rows = [task.row_of(text) for text in texts or []]
    faults = [(i, fault) for i, row in enumerate(rows, 1) if (fault := task.answer_fault(row))]
    if faults:
        hint = "shorten or fix it; `--set task.truncate=left` cuts the beginning of long ones"
        raise LoraError([Problem(fault, f"text {i} of {len(rows)}", hint) for i, fault in faults])
    for values in answer(model, task, rows, accelerator):
        named = dict(zip(task.answer_columns(), values, strict=True))
        if as_json:
            typer.echo(json.dumps(named, ensure_ascii=False))
            continue
        scores = sorted((p for p in values[1:] if isinstance(p, float)), reverse=True)[:1]
        typer.echo(f"{values[0]}" + (f"\t{scores[0]:.4f}" if scores else ""))
    for line in task.take_warnings():
        typer.echo(f"warning: {line}", err=True)


def _predict_file(
    model: nn.Module,
    task: Task,
    source: Path,
    target: Path,
    accelerator: Accelerator,
    overwrite: bool,
) -> None:
    from lora_cli.prediction import NO_ANSWER, answer_file

    def tell(count: int) -> None:
        if sys.stderr.isatty():
            typer.echo(f"\r{counted(count, 'row')}", nl=False, err=True)

    written, problems = answer_file(model, task, source, target, accelerator, overwrite, tell)
    if sys.stderr.isatty():
        typer.echo("\r", nl=False, err=True)
    for line in task.take_warnings():
        typer.echo(f"warning: {line}", err=True)
    for problem in problems[:10]:
        typer.echo(f"warning: {problem.at}: {problem.what}; {problem.hint}", err=True)
    if len(problems) > 10:
        typer.echo(f"warning: {len(problems) - 10:,} more rows are like these", err=True)
    blank = sum(problem.hint == NO_ANSWER for problem in problems)
    typer.echo(
        f"wrote {counted(written, 'row')} to {target}"
        + (f", {blank:,} of them without prediction" if blank else "")
    )


def _converse(adapter: Path, recipe: Recipe) -> None:
    _quiet()
    from lora_cli.conversation import HELP, converse, read_line
    from lora_cli.evaluation import open_adapter

    def lines() -> Iterator[str]:
        asking = sys.stdin.isatty()
        if asking:
            typer.echo(HELP, err=True)
        while True:
            if asking:
                typer.echo("> ", nl=False, err=True)
            line = read_line(sys.stdin, note)
            if not line:
                return
            yield line

    def write(text: str) -> None:
        typer.echo(text, nl=False)  # which flushes

    def note(text: str) -> None:
        typer.echo(text, nl=False, err=True)

    task, model, accelerator = open_adapter(adapter, recipe)
    converse(model, task, accelerator, lines(), write, note)


@app.command()
def init(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE [FILE]",
            help="A data file (csv, json lines, parquet, text) or a folder of such files; or "
            "two text files that belong together line by line.",
            callback=_meant,
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="Hub id or folder of the base model.",
            callback=_meant,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="The recipe to write; never overwritten.", callback=_meant
        ),
    ] = Path("recipe.yaml"),
    text: Annotated[
        str | None, typer.Option("--text", help="The column of the text, where it is not obvious.")
    ] = None,
    pair: Annotated[
        str | None,
        typer.Option("--pair", help="The column of a second text, for a label of two texts."),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option("--label", help="The column of the label, or of the answer; none: no label."),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory",
            min=1,
            help="Memory of the GPU that will train, in GiB. Default: that of this machine's GPU.",
        ),
    ] = None,
) -> None:
    """Read a data file or folder and write a recipe for it, with the reasons as comments."""
    from lora_cli.characters import cells, padded
    from lora_cli.inference import draft_recipe, refuse_existing, write_recipe

    if len(sources) > 2:
        hint = "name their folder instead: `lora init FOLDER`"
        raise LoraError("more than two files", "FILE", hint)
    refuse_existing(output)
    _quiet()
    second = sources[1] if len(sources) > 1 else None
    draft = draft_recipe(sources[0], model, output, text, label, second, pair, memory)
    write_recipe(output, draft.text(), draft.extra_files)
    width = max(cells(name) for name, _ in draft.findings)
    for name, finding in draft.findings:
        typer.echo(f"{padded(name, width)}  {finding}")
    typer.echo(f"\n{'recipe'.ljust(width)}  {output}")
    typer.echo(f"{'next'.ljust(width)}  lora train {shlex.quote(str(output))}")


@app.command()
def params(
    recipe: RecipeFile,
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--all", help="A row for every parameter.")] = False,
    as_json: AsJson = False,
) -> None:
    """List and count the parameters that a recipe trains; the weights are not loaded."""
    loaded = _load(recipe, overrides)
    _quiet()
    from lora_cli.adapters.attach import parameter_table
    from lora_cli.tasks.check import empty_adapted_model

    table = parameter_table(empty_adapted_model(loaded))
    print_parameters(table, every, as_json)


@app.command()
def validate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    data: Annotated[
        bool, typer.Option("--data", help="Inspect all rows too: lengths, duplicates, overlap.")
    ] = False,
    show: Annotated[
        int,
        typer.Option(
            "--show", min=0, help="With --data: print so many encoded rows of each split instead."
        ),
    ] = 0,
) -> None:
    """Check a recipe, its data and its targets without loading weights; print it resolved."""
    loaded = _load(recipe, overrides)
    if show and not data:
        what, at = "`--show` needs `--data`", "the arguments of `lora validate`"
        raise LoraError(what, at, f"write `--data --show {show}`")
    _quiet()
    from lora_cli.recipe import dump_recipe
    from lora_cli.tasks.check import check_recipe

    check_recipe(loaded, all_rows_follow=data)
    if data:
        from lora_cli.tasks.gate import look_at_data
        from lora_cli.tasks.showing import shown_rows

        task, encoded = look_at_data(loaded)
        if show:
            for text in shown_rows(task, encoded, show, sys.stdout.isatty()):
                typer.echo(text)
            return
    typer.echo(dump_recipe(loaded), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from lora_cli.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))
