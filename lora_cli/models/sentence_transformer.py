"""What sentence-transformers keeps beside a model: how vectors of tokens become one of a text.

    modules.json                        the steps: the transformer, the pooling, the normalisation
    1_Pooling/config.json               which pooling
    sentence_bert_config.json           where texts are cut, and whether capitals become small
    config_sentence_transformers.json   prompts before texts, by name

Folders are written as every version of that library since 2 reads them.
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
# as early versions called it, by the kind of the model
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
    """What a base's own files say of its embeddings; None where they say nothing.

    Args:
        pooling: How vectors of tokens become one: `mean`, `cls` or `last`.
        normalize: Whether embeddings have length 1.
        prompts: Texts that stand before texts, by name.
        default_prompt: The name of the one that stands before texts of no other.
        max_length: Tokens where texts are cut.
        lower_case: Whether capitals become small letters before a text is read.
    """

    pooling: str | None = None
    normalize: bool | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_length: int | None = None
    lower_case: bool = False

    def prompt(self, *names: str) -> str | None:
        """Return the first prompt that has one of the names, else the default one."""
        found = next((self.prompts[name] for name in names if name in self.prompts), None)
        return self.prompts.get(self.default_prompt or "") if found is None else found


def read_embedding_files(recipe: Recipe, pooling: str | None = None) -> EmbeddingFiles:
    """Return what the files of sentence-transformers beside a base say.

    Args:
        recipe: Names the base.
        pooling: What the recipe says of the pooling, which comes before the base's.

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
    others = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if others:
        what = f"`{name}` passes its embeddings through `{others[0]}` ({MODULES})"
        hint = "of such modules only Pooling and Normalize are known: copy the model's folder "
        hint += f"without {MODULES} to train what comes before"
        raise LoraError(what, at, hint)
    if kinds.get("Transformer"):
        inner = kinds["Transformer"]
        what = f"{MODULES} of `{name}` says that the model lies in its folder `{inner}`"
        raise LoraError(what, at, "name that folder as `model.name`, and say `task.pooling`")
    if pooling is None and "Pooling" in kinds:
        pooling = _pooling(recipe, f"{kinds['Pooling']}/config.json".lstrip("/"))
    prompts = _read(recipe, PROMPTS) or {}
    texts = prompts.get("prompts") or {} if isinstance(prompts, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(v, str) for v in texts.values()):
        raise _damaged(recipe, PROMPTS)
    default = prompts.get("default_prompt_name")
    length, lower_case = _reading(recipe)
    return EmbeddingFiles(pooling, "Normalize" in kinds, texts, default, length, lower_case)


def _reading(recipe: Recipe) -> tuple[int | None, bool]:
    """Return where the base cuts texts, and whether it makes capitals small.

    Raises:
        IntegrityError: If the file that says so is damaged.
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
    """Let a tokenizer make capitals small before all else, as sentence-transformers does."""
    from tokenizers import normalizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        tokenizer.do_lower_case = True
        return
    own = backend.normalizer
    if own is None or own.normalize_str("A") != "a":
        parts = [normalizers.Lowercase(), *([] if own is None else [own])]
        backend.normalizer = normalizers.Sequence(parts)


def _pooling(recipe: Recipe, file: str) -> str:
    """Return the pooling that a file says.

    Raises:
        LoraError: If it is another than those that this tool knows, or several.
    """
    config = _read(recipe, file)
    if not isinstance(config, dict):
        raise _damaged(recipe, file)
    named = config.get("pooling_mode")
    if named is not None:
        found = [str(one) for one in (named if isinstance(named, list) else [named])]
        found = [NEW_NAMES.get(one, one) for one in found]
    else:
        keys = {f"{PREFIX}{key}": kind for kind, key in KINDS.items()}
        on = [key for key, value in config.items() if key.startswith(PREFIX) and value is True]
        found = [keys.get(key, key.removeprefix(PREFIX)) for key in on] or ["mean"]
    if len(found) == 1 and found[0] in KINDS and config.get("include_prompt", True):
        return found[0]
    how = " and ".join(f"`{one}`" for one in found)
    how += "" if config.get("include_prompt", True) else ", without the prompt"
    what = f"`{recipe.model.name}` pools by {how} ({file}), which is not known here"
    hint = "`--set task.pooling=mean` (or cls, last) trains it with another pooling"
    raise LoraError(what, recipe.at("model.name"), hint)


def _read(recipe: Recipe, name: str) -> Any:
    """Return what a JSON file of the base holds, or None if there is none.

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
    """Write what sentence-transformers reads into the folder of a model, or of its adapter.

    Args:
        folder: Where the files go.
        pooling: `mean`, `cls` or `last`.
        normalize: Whether embeddings have length 1.
        prompts: Texts that stand before texts, by name; `query` is the one of texts of no other.
        width: Entries of an embedding.
        max_length: Tokens where texts are cut.
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
    given = {name: text for name, text in prompts.items() if text}
    default = "query" if "query" in given else None
    write_json(
        folder / PROMPTS,
        {
            "prompts": {"query": "", "document": "", **given},
            "default_prompt_name": default,
            "similarity_fn_name": "cosine",
        },
    )
