"""Mask secrets (passwords, tokens, keys) in files, on the screen and in tracebacks.

Three things are masked: the values of environment variables whose names say that they are secret;
values that a text itself calls secret (`password=…`, `Authorization: Bearer …`, the signature of an
address); and tokens that are known by how they begin.
"""

from __future__ import annotations

import functools
import os
import re
from urllib.parse import quote

MASK = "***"
SHORTEST = 8  # characters of a secret; masking a shorter value would tear words apart

_WORDS = (  # what a secret is called, at the end of a name: PGPASSWORD, MYSQL_PWD, client_secret
    r"password|passwd|passphrase|(?<![a-z])pass|(?<![a-z])pwd|secret|credentials?|"
    r"(?:api|access|account|secret|private|signing|encryption|master|shared|storage|auth|"
    r"subscription|license|ssh|service)[_-]?key(?:[_-]?id)?|"
    r"(?:access|auth|authentication|refresh|id|bearer|session|security|hf|hub|github|gitlab|api|"
    r"bot|private|personal|secret|deploy|registry|oauth2?|csrf|xsrf|sas|user|client|service|"
    r"login)[_-]?tokens?|(?<![a-z])(?:pat|sas|dsn)|connection[_-]?string|(?<![a-z])cookie"
)
# of an environment variable: any TOKEN or KEY with a name before it is one too
SECRET_NAME = re.compile(rf"(?:{_WORDS}|(?<![a-z])tokens?|(?<=_)key)(?:[_-]?\d+)?$", re.IGNORECASE)
_SECRET_KEY = re.compile(rf"(?:{_WORDS})(?:[_-]?\d+)?$", re.IGNORECASE)
NO_SECRET = {"PWD", "OLDPWD"}  # the working directory, and the one before it

# a name before a colon or an equals sign; also as a key of JSON, and of JSON in JSON
_NAMED = re.compile(r"(?<![\w.-])([\w.-]++)(\\?[\"']?\s{0,9}[:=]\s{0,9})")
_QUOTED = re.compile(r"(\\?\")[^\"\\\r\n]{4,}|(')[^'\\\r\n]{4,}")
_BARE = re.compile(r"()[^\s\"'<>,;&|(){}\[\]\\]{4,}")
# after a colon there may be prose, or a count of a label: a secret has a digit, and more than that
_AFTER_COLON = re.compile(r"()(?![\d.]+(?:[\s,}]|$))(?=[^\s\d]*\d)[^\s\"'<>,;&|(){}\[\]\\]{6,}")

# words of which one must be in the text, in small letters; the pattern; what is shown
_Rule = tuple[tuple[str, ...], str, str]
_RULES: tuple[_Rule, ...] = (
    # https://user:password@host, s3://KEY:SECRET@bucket: the secret may hold slashes. A number
    # after the colon is a port, which ends where the path begins
    (("@",), r"(://)[^\s/:@\"'<>]*+:(?!\d{1,5}(?:/|\s|$))[^\s\"'<>]{1,500}(?=@)", rf"\1{MASK}"),
    (("@",), r"(://)[^\s/:@\"'<>]{16,}+(?=@)", rf"\1{MASK}"),  # https://token@host
    # the query of an address, also where it is encoded once more
    (
        ("=", "%3d"),
        r"(?i)((?:[?&;]|%3F|%26)(?:[\w.-]{0,40}(?:token|signature|credential|secret|password|"
        r"passwd|pwd|api[_-]?key|access[_-]?key(?:[_-]?id)?|accesskeyid)|sig|sas|jwt)(?:=|%3D))"
        r"[^\s&\"'<>|)\]`]+",
        rf"\1{MASK}",
    ),
    (
        ("key=", "auth=", "code=", "policy=", "%3d"),
        r"(?i)((?:[?&]|%3F|%26)(?:key|auth|code|policy)(?:=|%3D))[^\s&\"'<>|)\]]{8,}",
        rf"\1{MASK}",
    ),
    # headers
    (
        ("authorization",),
        r"(?i)(authorization\\?[\"']?\s{0,9}[:=]\s{0,9}\\?[\"']?(?:bearer|basic|digest|token|"
        r"negotiate|apikey|aws4-hmac-sha256)\s{1,9})[^\s\"'<>\\][^\r\n\"'<>\\]*",
        rf"\1{MASK}",
    ),
    (
        ("authorization",),
        r"(?i)(authorization\\?[\"']?\s{0,9}[:=]\s{0,9}\\?[\"']?)[\w.~+/=-]{16,}",
        rf"\1{MASK}",
    ),
    (("bearer",), r"(?i)\b(bearer\s{1,9})[\w.~+/=-]{12,}", rf"\1{MASK}"),
    (
        ("cookie",),
        r"(?i)(cookie\s{0,9}:\s{0,9})[^\s=;\"'<>]{1,99}=[^\r\n\"'<>]+",
        rf"\1{MASK}",
    ),
    # on a command line: --password …, --hf-token …
    (
        ("--password", "--token", "key ", "token ", "secret ", "passphrase ", "passwd ",
         "password "),
        r"(?i)((?<!\S)--?[\w-]{0,40}(?:password|passwd|passphrase|token|api-?key|secret)[ =])"
        r"[^\s\"'\\]{4,}",
        rf"\1{MASK}",
    ),
    (("token=",), r"(?i)((?<![\w.-])token=)[\w.~+/-]{8,}=*", rf"\1{MASK}"),
    (
        ("machine ",),
        r"(?i)(\bmachine\s{1,9}\S{1,99}\s{1,9}login\s{1,9}\S{1,99}\s{1,9}password\s{1,9})\S+",
        rf"\1{MASK}",
    ),
    # what is known by its form
    (
        ("private key",),
        r"(?s)-----BEGIN [A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?-----(?:(?!-----).)*+"
        r"(?:-----END [A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?-----)?",
        MASK,
    ),
    (
        ("hf_", "api_org_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox"),
        r"\b(?:hf_|api_org_|gh[pousr]_|github_pat_|glpat-|xox[abeoprs]-)[\w-]{16,}",
        MASK,
    ),
    (
        ("glrt-", "gldt-", "glptt-", "glcbt-", "xapp-", "npm_", "pypi-", "dckr_", "dop_v1_", "shp",
         "k_live_", "k_test_", "whsec_", "lin_api_", "figd_", "nvapi-", "gsk_", "r8_", "pplx-",
         "xai-", "tvly-", "dapi", "atatt3", "atctt3"),
        r"\b(?:gl(?:rt|dt|ptt|cbt)-|xapp-|npm_|pypi-|dckr_(?:pat|oat)_|dop_v1_|shp(?:at|ss|ca|pa)_|"
        r"[sr]k_(?:live|test)_|whsec_|lin_api_|figd_|nvapi-|gsk_|r8_|pplx-|xai-|tvly-|dapi|ATATT3|"
        r"ATCTT3)(?=[a-zA-Z_.=-]{0,99}\d)[\w.=-]{16,}",
        MASK,
    ),
    # `sk-learn-something` is none
    (("sk-",), r"\bsk-(?:[A-Za-z0-9]{20,}|(?=[a-z_-]{0,99}[\dA-Z])[\w-]{16,})", MASK),
    (("akia", "asia", "abia", "acca", "aroa", "aida"),
     r"\b(?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA)[0-9A-Z]{16}\b", MASK),
    (("aiza",), r"\bAIza[\w-]{35}", MASK),
    (("ya29.",), r"\bya29\.[\w-]{20,}", MASK),
    (("sg.",), r"\bSG\.[\w-]{16,99}\.[\w-]{16,}", MASK),
    (("eyj",), r"\beyJ[\w-]{8,}+\.eyJ[\w-]{8,}+(?:\.[\w-]*)?", MASK),  # JSON web tokens
    ((":aa",), r"\b\d{8,10}:AA[\w-]{33}", MASK),  # of Telegram's bots
    (("hooks.slack.com",), r"(hooks\.slack\.com/services/)[\w/]+", rf"\1{MASK}"),
    (("/webhooks/",), r"(discord\.com/api/webhooks/)\d+/[\w-]+", rf"\1{MASK}"),
)  # fmt: skip
_COMPILED = tuple((words, re.compile(pattern), shown) for words, pattern, shown in _RULES)


@functools.lru_cache(maxsize=4096)
def _is_secret(name: str) -> bool:
    """Return whether what a name stands for is secret."""
    return _SECRET_KEY.search(name) is not None


@functools.lru_cache(maxsize=4096)
def _is_secret_variable(name: str) -> bool:
    """Return whether an environment variable of this name has a secret value."""
    return name not in NO_SECRET and SECRET_NAME.search(name) is not None


def _mask_named(text: str) -> str:
    """Mask the values that follow a name such as `PGPASSWORD=` or `"client_secret":`."""
    parts, done = [], 0
    for found in _NAMED.finditer(text):
        if found.start() < done or not _is_secret(found[1][-60:]):
            continue
        start = found.end()
        value = _QUOTED.match(text, start)
        if value is None:
            value = (_BARE if "=" in found[2] else _AFTER_COLON).match(text, start)
        if value is None:
            continue
        opening = value[1] or (value[2] if value.re is _QUOTED else "")
        parts += [text[done:start], opening or "", MASK]
        done = value.end()
    return "".join([*parts, text[done:]])


def redacted(text: str) -> str:
    """Return a text in which every secret is a row of stars."""
    for name in filter(_is_secret_variable, list(os.environ)):  # most values need no decoding
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST:
            for form in {value, quote(value, safe=""), value.replace("\n", "\\n")}:
                text = text.replace(form, MASK)
    lower = text.lower()
    for words, pattern, shown in _COMPILED:
        if any(word in lower for word in words):
            text = pattern.sub(shown, text)
    return _mask_named(text)
