"""Regular expressions that users and adapters bring along: whether one can be used safely.

They are run by `regex`, and always with its time limit: `re` has none, and an expression with a
repetition inside a repetition can take longer than the training.
"""

from __future__ import annotations

import math

LONGEST = 10_000  # characters of an expression
MOST_COPIES = 10_000  # that its counts may ask for: `regex` writes out `(a{1000}){1000}`, in memory
COUNT = r"\{([\s\d,]+)\}"  # `{3}`, `{3,}`, `{,3}`, `{3,5}`


def regex_error(pattern: str) -> str | None:
    """Return why a text is no regular expression that can be used, or None if it is one."""
    import regex  # here, as a recipe without an expression is checked without it

    if len(pattern) > LONGEST:
        return f"longer than {LONGEST:,} characters"
    try:
        counts = [regex.findall(r"\d+", count) for count in regex.findall(COUNT, pattern)]
        if math.prod(max([1, *map(int, count)]) for count in counts) > MOST_COPIES:
            return f"its counts multiply to more than {MOST_COPIES:,}"
        regex.compile(pattern)
    except (regex.error, ValueError, RecursionError) as error:
        return str(error)
    return None
