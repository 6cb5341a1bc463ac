"""What must reach no file, no screen and no traceback: passwords in addresses, tokens, keys.

Masked are the values of environment variables whose names say that they are secret, tokens that are
known by their beginning, and the password of an address.
"""

from __future__ import annotations

import os
import re

MASK = "***"
SHORTEST = 8  # characters of a secret; masking a shorter value would tear words apart
SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEY|ACCESS_?KEY|SECRET_?KEY)$",
    re.IGNORECASE,
)
PATTERNS = (
    re.compile(r"(?<=://)[^\s/:@\"'<>]*:[^\s/@\"'<>]+(?=@)"),  # https://user:password@host
    re.compile(r"(?<=://)[^\s/:@\"'<>]{16,}(?=@)"),  # https://token@host
    re.compile(
        r"(?i)(?<=[?&])((?:access_?|auth_?)?token|api_?key|password|sig(?:nature)?)=[^\s&\"'<>]+"
    ),
    re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abp]-)[\w-]{16,}"),
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
)


def redacted(text: str) -> str:
    """Return a text in which every secret is a row of stars."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and value in text and SECRET_NAME.search(name):
            text = text.replace(value, MASK)
    for pattern in PATTERNS:
        text = pattern.sub(lambda found: f"{found[1]}={MASK}" if found.re.groups else MASK, text)
    return text
