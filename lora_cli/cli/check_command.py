"""`lora check`: check that an adapter is applied, on this machine or on a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli import options
from lora_cli.cli.options import AdapterDir, Overrides, recipe_for
from lora_cli.errors import IntegrityError, LoraError, name_neighbours
from lora_cli.not_an_adapter import require_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from lora_cli.evaluation.probe import Probe, Verdict


def check(
    adapter: AdapterDir,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="Address of an OpenAI-compatible server with the adapter: `http://host:8000`. "
            "Default: check on this machine.",
        ),
    ] = None,
    served_name: Annotated[
        str | None,
        typer.Option(
            "--served-name",
            metavar="NAME",
            help="Name of the adapter on the server. Default: its only model.",
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check that an adapter is applied where it is used, by replaying its probe.json."""
    if not adapter.exists():
        raise LoraError(f"there is no folder {adapter}", "--adapter", name_neighbours(adapter))
    if adapter.is_file():
        what = f"{adapter} is a file of another tool, and only `lora train` writes a probe.json"
        raise LoraError(what, "--adapter", "name the folder of an adapter that was trained here")
    if url is None and served_name is not None:
        what, hint = "`--served-name` names a model on a server", "give its address: `--url URL`"
        raise LoraError(what, "--served-name", hint)
    if url is not None and overrides:
        what = "`--set` changes what is computed here, not on a server"
        raise LoraError(what, "--set", "leave out `--set` or `--url`")
    options.quiet_libraries()
    from lora_cli.evaluation.probe import compare_tokens, read_probe
    from lora_cli.files import reject_links_outside, verify_manifest

    require_adapter(adapter)
    reject_links_outside(adapter)
    verify_manifest(adapter)
    probe = read_probe(adapter)
    if url is None:
        _report(_compare_here(adapter, probe, overrides), str(adapter))
        return
    from lora_cli.evaluation.completions_endpoint import next_tokens

    if not probe.next_tokens:
        what = "only adapters of language models can be checked on a server"
        raise LoraError(what, str(adapter), "leave out `--url` to check it here")
    prompts = [prompt for prompt, _, _ in probe.next_tokens]
    _report(compare_tokens(probe, next_tokens(url, prompts, served_name)), url)


def _compare_here(adapter: Path, probe: Probe, overrides: list[str] | None) -> Verdict:
    """Load the adapter on this machine, and compare its outputs with those of the probe."""
    from lora_cli.evaluation.open_adapter import open_adapter
    from lora_cli.evaluation.probe import compare_outputs, take_probe

    task, model, accelerator = open_adapter(adapter, recipe_for(adapter, None, overrides))
    probed = take_probe(task, model, accelerator)
    if probed is None:
        hint = "try another precision: `--set train.precision=fp32`"
        raise IntegrityError("the outputs are not finite", str(adapter), hint)
    return compare_outputs(probe, probed)


def _report(verdict: Verdict, at: str) -> None:
    """Print that the adapter is applied.

    Raises:
        IntegrityError: If it is not.
    """
    distances = f"distance from base + adapter {verdict.from_adapted:.1e}, from the base "
    distances += f"{verdict.from_base:.1e}"
    if verdict.answer == "adapted":
        typer.echo(f"the adapter is applied ({distances})")
        return
    if verdict.answer == "base":
        raise IntegrityError(
            f"these are the base's outputs: the adapter is not applied ({distances})",
            at,
            "check that the server loads it, and that `--served-name` is the adapter's name",
        )
    raise IntegrityError(
        f"these are neither the outputs of base + adapter nor those of the base ({distances})",
        at,
        "check that the base and the adapter's scale are the same, and compare the versions",
    )
