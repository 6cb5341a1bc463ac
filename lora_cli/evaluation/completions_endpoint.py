"""Request the most likely next tokens from an OpenAI-style server, with Python's http client."""

from __future__ import annotations

import json
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from lora_cli.errors import LoraError, ResourceError, printable

TIMEOUT_S = 120.0
MAX_RESPONSE_BYTES = 2**24
LOG_PROBABILITIES = 5  # the maximum of OpenAI's own API


def next_tokens(url: str, prompts: list[str], model: str | None = None) -> list[dict[str, float]]:
    """Return the most likely next tokens of prompts, according to a server.

    Args:
        url: The server's address, with or without `/v1` or `/v1/completions`.
        prompts: The texts to continue.
        model: The name under which the server serves the adapter; None if it serves one model.

    Returns:
        For each prompt, tokens with their log-probabilities.

    Raises:
        LoraError: If the address or the model's name is wrong, or the server returns no
            log-probabilities.
        ResourceError: If the server cannot be reached.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        what, hint = f"`{url}` is not the address of a server", "write `http://host:port`"
        raise LoraError(what, "--url", hint)
    base_url = url.rstrip("/").removesuffix("/completions").removesuffix("/v1") + "/v1"
    if model is None:
        models = _request_json(f"{base_url}/models")
        names = [
            str(entry.get("id")) for entry in models.get("data") or [] if isinstance(entry, dict)
        ]
        if len(names) != 1:
            what = f"the server serves {len(names)} models: {', '.join(names) or 'none is listed'}"
            hint = "name that of the adapter: `--served-name NAME`"
            raise LoraError(printable(what, 300), "--url", hint)
        model = names[0]
    answers = []
    for prompt in prompts:
        body = {
            "model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0,
            "logprobs": LOG_PROBABILITIES,
        }  # fmt: skip
        answers.append(_log_probabilities(_request_json(f"{base_url}/completions", body), base_url))
    return answers


def _request_json(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send a request (POST if it has a body) and return the JSON object of the response."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=TIMEOUT_S) as response:
            value = json.loads(response.read(MAX_RESPONSE_BYTES))
    except HTTPError as error:
        error_text = printable(error.read(1000).decode("utf-8", "replace"), 300)
        what = f"the server answered {error.code}: {error_text}"
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
    """Return the log-probability of each token, from the format of completions or of chats."""
    try:
        logprobs = answer["choices"][0]["logprobs"]
        if (
            "content" in logprobs
        ):  # the format of chats, which llama.cpp's server uses for completions too
            first = logprobs["content"][0]["top_logprobs"]
            tokens = {str(entry["token"]): float(entry["logprob"]) for entry in first}
        else:
            tokens = {str(t): float(lp) for t, lp in logprobs["top_logprobs"][0].items()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        tokens = {}
    if not tokens:
        hint = "start it so that `/v1/completions` answers `logprobs`"
        raise LoraError("the server's answer has no log-probabilities", url, hint)
    return tokens
