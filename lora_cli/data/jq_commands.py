"""Commands for a hint: what writes the rows of a file anew, with the columns that a task reads."""

from __future__ import annotations

import json
import shlex

PANDAS = {  # how pandas reads what jq does not
    ".parquet": "read_parquet({name!r})",
    ".csv": "read_csv({name!r}, dtype=str, keep_default_na=False)",
    ".tsv": "read_csv({name!r}, sep='\\t', dtype=str, keep_default_na=False)",
}


def field(name: str) -> str:
    """Return what jq calls the value of a key: `.name`, or `."a name"`."""
    plain = name.isidentifier() and name.isascii()
    return f".{name}" if plain else f".{json.dumps(name, ensure_ascii=False)}"


def jq_command(how: str, name: str, target: str) -> str:
    """Return the command that writes as lines what jq makes of the rows of a file.

    Args:
        how: The expression of jq.
        name: The name of the file: JSON, also compressed, or a table or parquet.
        target: The name of the file to write, which must be another: a shell empties it first.
    """
    source, before = f" {shlex.quote(name)}", ""
    kind = next((end for end in PANDAS if name.lower().removesuffix(".gz").endswith(end)), None)
    if kind is not None:
        rows = f"pandas.{PANDAS[kind].format(name=name)}"
        lines = "to_json(sys.stdout, orient='records', lines=True)"
        script = f"import pandas, sys; {rows}.{lines}"
        before, source = f"python -c {_quoted(script)} | ", ""
    elif name.lower().endswith(".gz"):
        before, source = f"zcat {shlex.quote(name)} | ", ""
    quoted = how.replace("'", "'\\''")
    return f"`{before}jq -c '{quoted}'{source} > {target}`"


def _quoted(script: str) -> str:
    """Return an argument of a shell; double marks are easier to read around single ones."""
    plain = not set(script) & set('"$`\\!')
    return f'"{script}"' if plain else shlex.quote(script)
