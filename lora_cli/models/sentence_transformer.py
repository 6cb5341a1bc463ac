"""Read and write the files of sentence-transformers, which define the embedding of a text.

    modules.json                        the steps: transformer, pooling, normalisation
    1_Pooling/config.json               the kind of pooling
    sentence_bert_config.json           the maximum length, and whether texts are lower-cased
    config_sentence_transformers.json   prompts, by name

The written files can be read by every version of that library since 2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from lora_cli.errors import IntegrityError, LoraError
from lora_cli.files import write_json
from lora_cli.models.find_base import source_of
from lora_cli.models.load_errors import explained
from lora_cli.recipe import Recipe

MODULES, PROMPTS, LENGTH = (
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
)  # fmt: skip
# names in early versions, by the kind of the model
LENGTHS = (LENGTH, *(
    f"sentence_{kind}_config.json"
    for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
))  # fmt: skip
KINDS = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
NEW_NAMES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}  # since version 6
PREFIX = "pooling_mode_"
ANCHOR_NAMES = ("query", "search_query", "anchor")
POSITIVE_NAMES = ("document", "passage", "search_document", "corpus", "positive")


@dataclass(frozen=True)
class EmbeddingFiles:
    """The embedding settings in a base's own files; None if a setting is missing.

    Args:
        pooling: The pooling of token embeddings: `mean`, `cls` or `last`.
        normalize: Whether embeddings are normalised to length 1.
        prompts: Prefixes of texts, by name.
        default_prompt: The name of the prompt for texts without another one.
        max_length: The maximum length of texts, in tokens.
        lower_case: Whether texts are lower-cased.
    """

    pooling: str | None = None
    normalize: bool | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_length: int | None = None
    lower_case: bool = False

    def prompt(self, *names: str) -> str | None:
        """Return the first prompt that has one of the names, or the default prompt."""
        text = next((self.prompts[name] for name in names if name in self.prompts), None)
        return self.prompts.get(self.default_prompt or "") if text is None else text


def read_embedding_files(recipe: Recipe, pooling: str | None = None) -> EmbeddingFiles:
    """Read the files of sentence-transformers in a base's folder.

    Args:
        recipe: Names the base.
        pooling: The pooling of the recipe, which overrides the base's.

    Raises:
        LoraError: If the base computes its embeddings in a way that this tool does not know.
        IntegrityError: If a file is damaged.
    """
    modules = _read(recipe, MODULES)
    if modules is None:
        return EmbeddingFiles(pooling)
    at, name = recipe.at("model.name"), recipe.model.name
    kinds: dict[str, str] = {}
    try:
        for module in modules:
            kinds[str(module["type"]).rpartition(".")[2]] = str(module["path"])
    except (TypeError, KeyError) as error:
        raise _damaged(recipe, MODULES) from error
    unsupported = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unsupported:
        what = f"`{name}` passes its embeddings through `{unsupported[0]}` ({MODULES})"
        hint = "of such modules only Pooling and Normalize are known: copy the model's folder "
        hint += f"without {MODULES} to train what comes before"
        raise LoraError(what, at, hint)
    if kinds.get("Transformer"):
        subfolder = kinds["Transformer"]
        what = f"{MODULES} of `{name}` says that the model lies in its folder `{subfolder}`"
        raise LoraError(what, at, "name that folder as `model.name`, and say `task.pooling`")
    if pooling is None and "Pooling" in kinds:
        pooling = _pooling(recipe, f"{kinds['Pooling']}/config.json".lstrip("/"))
    prompts = _read(recipe, PROMPTS) or {}
    texts = prompts.get("prompts") or {} if isinstance(prompts, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(v, str) for v in texts.values()):
        raise _damaged(recipe, PROMPTS)
    default = prompts.get("default_prompt_name")
    length, lower_case = _length_and_case(recipe)
    return EmbeddingFiles(pooling, "Normalize" in kinds, texts, default, length, lower_case)


def _length_and_case(recipe: Recipe) -> tuple[int | None, bool]:
    """Return the maximum length of texts, and whether they are lower-cased.

    Raises:
        IntegrityError: If the file is damaged.
    """
    for name in LENGTHS:
        if (config := _read(recipe, name)) is None:
            continue
        length = config.get("max_seq_length") if isinstance(config, dict) else config
        if length is not None and (not isinstance(length, int) or length < 1):
            raise _damaged(recipe, name)
        return length, bool(config.get("do_lower_case"))
    return None, False


def make_lower_case(tokenizer: Any) -> None:
    """Let a tokenizer lower-case texts first, as sentence-transformers does."""
    from tokenizers import normalizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        tokenizer.do_lower_case = True
        return
    normalizer = backend.normalizer
    if normalizer is None or normalizer.normalize_str("A") != "a":
        parts = [normalizers.Lowercase(), *([] if normalizer is None else [normalizer])]
        backend.normalizer = normalizers.Sequence(parts)


def _pooling(recipe: Recipe, file: str) -> str:
    """Return the pooling in a file.

    Raises:
        LoraError: If it is not supported, or there are several.
    """
    config = _read(recipe, file)
    if not isinstance(config, dict):
        raise _damaged(recipe, file)
    mode = config.get("pooling_mode")
    if mode is not None:
        modes = [str(name) for name in (mode if isinstance(mode, list) else [mode])]
        modes = [NEW_NAMES.get(name, name) for name in modes]
    else:
        keys = {f"{PREFIX}{key}": kind for kind, key in KINDS.items()}
        enabled = [key for key, value in config.items() if key.startswith(PREFIX) and value is True]
        modes = [keys.get(key, key.removeprefix(PREFIX)) for key in enabled] or ["mean"]
    if len(modes) == 1 and modes[0] in KINDS and config.get("include_prompt", True):
        return modes[0]
    described = " and ".join(f"`{name}`" for name in modes)
    described += "" if config.get("include_prompt", True) else ", without the prompt"
    what = f"`{recipe.model.name}` pools by {described} ({file}), which is not known here"
    hint = "`--set task.pooling=mean` (or cls, last) trains it with another pooling"
    raise LoraError(what, recipe.at("model.name"), hint)


def _read(recipe: Recipe, name: str) -> Any:
    """Return the content of a JSON file of the base, or None if there is no such file.

    Raises:
        IntegrityError: If it is damaged.
    """
    source = source_of(recipe)
    with explained(recipe, "configuration"):
        path = cached_file(
            source["pretrained_model_name_or_path"],
            name,
            revision=source["revision"],
            _raise_exceptions_for_missing_entries=False,
        )
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(recipe, name) from error


def _damaged(recipe: Recipe, name: str) -> IntegrityError:
    what = f"{name} of `{recipe.model.name}` cannot be read"
    return IntegrityError(what, recipe.at("model.name"), "copy or download the model again")


def write_embedding_files(
    folder: Path,
    pooling: str,
    normalize: bool,
    prompts: Mapping[str, str],
    width: int,
    max_length: int,
) -> None:
    """Write the files of sentence-transformers into the folder of a model or an adapter.

    Args:
        folder: The folder.
        pooling: `mean`, `cls` or `last`.
        normalize: Whether embeddings are normalised to length 1.
        prompts: Prefixes of texts, by name; `query` is the default.
        width: The dimension of the embeddings.
        max_length: The maximum length of texts, in tokens.
    """
    names = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{name}" if i else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(names)
    ]
    write_json(folder / MODULES, modules)
    keys = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens",
            "weightedmean_tokens", "lasttoken")  # fmt: skip
    modes = {f"{PREFIX}{key}": key == KINDS[pooling] for key in keys}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes})
    write_json(folder / LENGTH, {"max_seq_length": max_length, "do_lower_case": False})
    nonempty = {name: text for name, text in prompts.items() if text}
    default = "query" if "query" in nonempty else None
    write_json(
        folder / PROMPTS,
        {
            "prompts": {"query": "", "document": "", **nonempty},
            "default_prompt_name": default,
            "similarity_fn_name": "cosine",
        },
    )
