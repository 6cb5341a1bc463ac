"""Build shell commands for hints, which rewrite a file with the columns that a task reads."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

PANDAS = {  # how pandas reads the formats that jq cannot read
    ".parquet": "read_parquet({name!r})",
    ".csv": "read_csv({name!r}, dtype=str, keep_default_na=False)",
    ".tsv": "read_csv({name!r}, sep='\\t', dtype=str, keep_default_na=False)",
}


def field(name: str) -> str:
    """Return the jq expression for the value of a key: `.name`, or `."a name"`."""
    plain = name.isidentifier() and name.isascii()
    return f".{name}" if plain else f".{json.dumps(name, ensure_ascii=False)}"


def jq_command(program: str, name: str, target: str = "flat.jsonl") -> str:
    """Return a command that applies jq to the rows of a file and writes JSON lines.

    Args:
        program: The jq expression.
        name: Name of the source file: JSON (also gzipped), a table, or parquet.
        target: Name of the file to write; another one if the source is called so, as the shell
            empties the target before jq reads the source.
    """
    if Path(name).name == target:
        target = f"new_{target}"
    source, pipe_from = f" {shlex.quote(name)}", ""
    suffix = next(
        (ending for ending in PANDAS if name.lower().removesuffix(".gz").endswith(ending)), None
    )
    if suffix is not None:
        rows = f"pandas.{PANDAS[suffix].format(name=name)}"
        lines = "to_json(sys.stdout, orient='records', lines=True)"
        script = f"import pandas, sys; {rows}.{lines}"
        pipe_from, source = f"python -c {_quoted(script)} | ", ""
    elif name.lower().endswith(".gz"):
        pipe_from, source = f"zcat {shlex.quote(name)} | ", ""
    quoted = program.replace("'", "'\\''")
    return f"`{pipe_from}jq -c '{quoted}'{source} > {target}`"


def _quoted(script: str) -> str:
    """Quote a shell argument, preferably with double quotes, as the script has single ones."""
    plain = not set(script) & set('"$`\\!')
    return f'"{script}"' if plain else shlex.quote(script)
