"""Ask an OpenAI-style server for the most likely next tokens, by Python's own http client."""

from __future__ import annotations

import json
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from lora_cli.errors import LoraError, ResourceError, printable

PATIENCE_S = 120.0
MOST_BYTES = 2**24
LOG_PROBABILITIES = 5  # the most that OpenAI's own API gives


def next_tokens(url: str, prompts: list[str], model: str | None = None) -> list[dict[str, float]]:
    """Return what a server holds for the next tokens of prompts.

    Args:
        url: Of the server, with or without `/v1` or `/v1/completions`.
        prompts: The texts that are continued.
        model: The name under which it serves the adapter; None: the only one that it has.

    Returns:
        Of each prompt, tokens with their log-probabilities.

    Raises:
        LoraError: If the address, or the model's name, is wrong, or the server gives no
            log-probabilities.
        ResourceError: If it cannot be reached.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        what, hint = f"`{url}` is not the address of a server", "write `http://host:port`"
        raise LoraError(what, "--url", hint)
    top = url.rstrip("/").removesuffix("/completions").removesuffix("/v1") + "/v1"
    if model is None:
        listed = _asked(f"{top}/models")
        names = [str(one.get("id")) for one in listed.get("data") or [] if isinstance(one, dict)]
        if len(names) != 1:
            what = f"the server serves {len(names)} models: {', '.join(names) or 'none is listed'}"
            hint = "name that of the adapter: `--served-name NAME`"
            raise LoraError(printable(what, 300), "--url", hint)
        model = names[0]
    answers = []
    for prompt in prompts:
        asked = {
            "model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0,
            "logprobs": LOG_PROBABILITIES,
        }  # fmt: skip
        answers.append(_log_probabilities(_asked(f"{top}/completions", asked), top))
    return answers


def _asked(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON object that a server answers with."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=PATIENCE_S) as response:
            value = json.loads(response.read(MOST_BYTES))
    except HTTPError as error:
        said = printable(error.read(1000).decode("utf-8", "replace"), 300)
        what = f"the server answered {error.code}: {said}"
        hint = "is it an OpenAI-style server, and `--served-name` the name of the adapter there?"
        raise LoraError(what, url, hint) from error
    except (OSError, HTTPException) as error:
        what = f"the server cannot be reached: {getattr(error, 'reason', None) or error}"
        raise ResourceError(what, url, "is it running, and the address right?") from error
    except (ValueError, RecursionError) as error:
        what = "the server's answer is not JSON"
        raise LoraError(what, url, "give the address of an OpenAI-style server") from error
    if not isinstance(value, dict):
        what = "the server's answer is not a JSON object"
        raise LoraError(what, url, "give the address of an OpenAI-style server")
    return value


def _log_probabilities(answer: dict[str, Any], url: str) -> dict[str, float]:
    """Return the tokens of an answer: as OpenAI's completions write them, or its chats."""
    try:
        found = answer["choices"][0]["logprobs"]
        if "content" in found:  # llama.cpp's server writes them so
            first = found["content"][0]["top_logprobs"]
            tokens = {str(one["token"]): float(one["logprob"]) for one in first}
        else:
            tokens = {str(t): float(lp) for t, lp in found["top_logprobs"][0].items()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        tokens = {}
    if not tokens:
        hint = "start it so that `/v1/completions` answers `logprobs`"
        raise LoraError("the server's answer has no log-probabilities", url, hint)
    return tokens
