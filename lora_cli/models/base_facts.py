"""What of a base decides the computation besides its tensors: config.json and the tokenizer.

The same weights answer otherwise with 6 attention heads instead of 12, another `rope_theta`, two
ids exchanged in tokenizer.json, or another chat template. So these are kept in `computation.json`
beside the adapter, and in the state of a run, and compared before either is used.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from lora_cli.errors import IntegrityError, LoraError, warn
from lora_cli.files import write_json
from lora_cli.format_version import FORMAT
from lora_cli.models.base_model import load_config, load_tokenizer
from lora_cli.models.find_base import source_of
from lora_cli.models.image_processor import NOT_COMPUTING as NO_PIXEL
from lora_cli.models.image_processor import PROCESSOR_FILE
from lora_cli.models.load_errors import explained
from lora_cli.recipe import (
    COMPUTATION_FILE,
    RECIPE_FILE,
    Recipe,
    computing_values,
    read_computation,
)

OVERRIDE = "model.allow_other_base"
# keys of config.json that no output depends on; the labels are the recipe's
NOT_COMPUTING = {
    "architectures", "attn_implementation", "auto_map", "dtype", "finetuning_task",
    "gradient_checkpointing", "id2label", "label2id", "name_or_path", "num_labels",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "return_dict_in_generate", "task_specific_params", "tokenizer_class", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
TOKENIZER_CONFIG = "tokenizer_config.json"
SHOWN = 4  # keys in a message
BIG = 10**9  # tokenizers write 1e30 for: no limit


def base_facts(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the computing keys of a configuration, and hashes of the tokenizer."""
    return {"config": config_facts(config), **facts_of(tokenizer)}


def facts_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a hash of a tokenizer, and its chat template."""
    return {"tokenizer": tokenizer_hash(tokenizer), "chat_template": _template(tokenizer)}


def config_facts(config: PretrainedConfig) -> dict[str, Any]:
    """Return the keys of a configuration that its model computes with, flat: `vision.layers`."""
    return flat_config(config.to_dict())


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the same of a configuration as a dictionary."""
    return _computing(json.loads(json.dumps(config, default=str)))


def _computing(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if key in NOT_COMPUTING or key.startswith("_"):
            continue
        if isinstance(value, dict):
            result |= _computing(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all that decides which ids a text becomes, but for the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        state = json.loads(backend.to_str())
        for key in ("truncation", "padding"):  # as its last texts were cut; not how the next are
            state.pop(key, None)
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    longest = min(int(tokenizer.model_max_length), BIG)
    text = json.dumps([state, special, longest], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else str(template)


def write_computation(folder: Path, recipe: Recipe, facts: dict[str, Any]) -> None:
    """Write `computation.json` into a folder.

    Args:
        folder: Of an adapter or a checkpoint.
        recipe: With the labels that were learned.
        facts: What `base_facts` returned.
    """
    value = {"format": FORMAT, "recipe": computing_values(recipe), "base": facts}
    write_json(folder / COMPUTATION_FILE, value)


def save_tokenizer(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write the tokenizer that was trained with, and its chat template, into a folder.

    What is read back may have another hash (another class, a key that is written out): `facts` get
    that of the copy too, as `tokenizer_copy`.
    """
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        # how it cut its last texts is no part of it, and differs where they came from the cache
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(folder)
    if facts is not None and "tokenizer_copy" not in facts:
        facts["tokenizer_copy"] = tokenizer_hash(read_tokenizer(folder, recipe))


def trained_tokenizer(folder: Path, recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer that an adapter was trained with: the base's, or the adapter's own copy.

    The chat template is set to the one of the training, whichever the base has now. Beside an
    adapter of another tool, the copy is all that tells of its training.

    Args:
        folder: The adapter's.
        recipe: Names the base.

    Raises:
        IntegrityError: If the base has another tokenizer now, and the adapter no copy of its own.
    """
    trained = read_computation(folder)
    if trained is None and (folder / RECIPE_FILE).is_file():
        warn(
            f"{folder} has no {COMPUTATION_FILE}, as folders of earlier versions: whether its "
            "recipe, tokenizer and config.json are those of the training is unverified"
        )
        return load_tokenizer(recipe)
    if trained is None:
        return _of_another_tool(folder, recipe)
    facts = trained["base"]
    known = {facts["tokenizer"], facts.get("tokenizer_copy")}  # a whole model is its own base
    try:
        tokenizer = load_tokenizer(recipe)
    except LoraError:
        if not (folder / TOKENIZER_CONFIG).is_file():
            raise
        tokenizer = None
    if tokenizer is None or tokenizer_hash(tokenizer) not in known:
        tokenizer = _own_copy(folder, recipe, known)
        warn(
            f"the tokenizer of `{recipe.model.name}` is not the one that {folder} was trained "
            "with; the adapter's own copy is used"
        )
    elif (
        _template(tokenizer) != facts["chat_template"]
        and getattr(recipe.task, "chat_template", None) is None
    ):
        warn(f"the chat template of `{recipe.model.name}` has changed; the adapter's own is used")
    tokenizer.chat_template = facts["chat_template"]
    return tokenizer


def _of_another_tool(folder: Path, recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer for an adapter of another tool: the one beside it, if there is one."""
    of_base = load_tokenizer(recipe)
    if not (folder / TOKENIZER_CONFIG).is_file():
        return of_base
    own = _beside(folder, recipe)
    if not (differing := tokenizer_differences(own, facts_of(of_base))):
        return of_base
    what = f"{folder} has a tokenizer of its own ({differing} than in `{recipe.model.name}`)"
    n_rows = getattr(load_config(recipe).get_text_config(), "vocab_size", None)
    if n_rows is not None and len(own) > max(n_rows, len(of_base)):
        # nor has the adapter, or loading it will say so
        warn(f"{what}: the base has no rows for all of its tokens, so that of the base is used")
        return of_base
    warn(f"{what}: it is used")
    if own.chat_template is None:
        own.chat_template = of_base.chat_template
    return own


def warn_of_own_tokenizer(folder: Path, facts: dict[str, Any], recipe: Recipe) -> None:
    """Warn where an adapter of another tool is trained further with another tokenizer than its own.

    Args:
        folder: The adapter's.
        facts: What `base_facts` returned of the base; of one without a tokenizer, it has no such.
        recipe: Names the base.
    """
    if "tokenizer" not in facts or not (folder / TOKENIZER_CONFIG).is_file():
        return
    if differing := tokenizer_differences(_beside(folder, recipe), facts):
        warn(
            f"{folder} has a tokenizer of its own ({differing} than in `{recipe.model.name}`): it "
            "is trained with that of the base; `model.add_tokens` names new tokens, "
            "`task.chat_template` a template"
        )


def _beside(folder: Path, recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer beside an adapter of another tool.

    Raises:
        LoraError: If it cannot be read.
    """
    try:
        return read_tokenizer(folder, recipe)
    except LoraError as error:
        hint = "put it right, or take its files out of the folder: that of the base is used then"
        raise LoraError(error.problems[0].what, str(folder), hint) from error


def tokenizer_differences(own: PreTrainedTokenizerBase, facts: dict[str, Any]) -> str:
    """Return in words how a tokenizer differs from the one that facts were made of, if it does."""
    found = []
    if tokenizer_hash(own) != facts["tokenizer"]:
        found.append("its tokens are others")
    if own.chat_template is not None and _template(own) != facts["chat_template"]:
        found.append("its chat template is another")
    return ", and ".join(found)


def warn_of_own_processor(folder: Path, recipe: Recipe) -> None:
    """Warn where another tool's adapter was trained with other pictures or sounds than the base's.

    Args:
        folder: The adapter's.
        recipe: Names the base, whose processor is used.
    """
    if not (folder / PROCESSOR_FILE).is_file():
        return
    where = source_of(recipe)
    found = cached_file(
        where["pretrained_model_name_or_path"],
        PROCESSOR_FILE,
        revision=where["revision"],
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    own, ours = _values(folder / PROCESSOR_FILE), _values(Path(found)) if found else {}
    # a key that only one has may be another version's
    differing = [k for k in sorted(own.keys() & ours.keys() - NO_PIXEL) if own[k] != ours[k]]
    if differing:
        named = ", ".join(f"`{key}`" for key in differing[:SHOWN])
        warn(
            f"{folder / PROCESSOR_FILE} has another {named} than `{recipe.model.name}`, which is "
            "used: if the adapter was trained so, give the base these values"
        )


def _values(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def read_tokenizer(folder: Path, recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies beside an adapter."""
    with explained(recipe, "adapter's own tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=recipe.model.trust_remote_code
        )
    return tokenizer


def _own_copy(folder: Path, recipe: Recipe, known: set[Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies beside an adapter, if it is the one of the training."""
    hint = f"give the base its old tokenizer files back, or train again; {folder} holds no copy"
    what = f"the tokenizer of `{recipe.model.name}` is not the one that {folder} was trained with"
    if (folder / TOKENIZER_CONFIG).is_file():
        tokenizer = read_tokenizer(folder, recipe)
        if tokenizer_hash(tokenizer) in known:
            return tokenizer
        hint = "give the base its old tokenizer files back; this version of transformers reads "
        hint += "the adapter's own copy otherwise"
    raise IntegrityError(what, recipe.at("model.name"), hint)


def require_facts(
    trained: dict[str, Any] | None,
    now: dict[str, Any],
    recipe: Recipe,
    what: str,
    with_tokenizer: bool = False,
    with_template: bool = False,
) -> None:
    """Reject a base whose config.json, or whose tokenizer, is not the one of the training.

    Args:
        trained: What `base_facts` returned when it was trained; None where nothing was kept.
        now: The same of the base as it is.
        recipe: Names the base, and may allow another.
        what: What was trained: `the adapter out/`.
        with_tokenizer: The tokenizer counts too, since it is not taken from elsewhere.
        with_template: The chat template counts too, likewise.

    Raises:
        IntegrityError: With the first key that differs, unless `model.allow_other_base` is set.
    """
    if trained is None:
        return
    then, ours = trained["config"], now["config"]
    # another version of transformers may know other keys
    differing = [key for key in sorted(then.keys() & ours.keys()) if then[key] != ours[key]]
    texts = [
        f"`{key}` in config.json is {json.dumps(ours[key])}, and was {json.dumps(then[key])}"
        for key in differing
    ]
    known = (trained.get("tokenizer"), trained.get("tokenizer_copy"))
    if with_tokenizer and now.get("tokenizer") not in known:
        texts.append("the tokenizer is another")
    if now.get("processor") != trained.get("processor"):
        texts.append("the processor of its inputs is another")
    if with_template and trained.get("chat_template") != now.get("chat_template"):
        texts.append("the chat template is another")
    if not texts:
        return
    more = f", and {len(texts) - 1} more" if texts[1:] else ""
    text = f"`{recipe.model.name}` is not as it was when {what} was trained: {texts[0]}{more}"
    if recipe.model.allow_other_base:
        warn(f"{text}; `{OVERRIDE}` allows it")
        return
    hint = f"restore it; to go on all the same: `--set {OVERRIDE}=true`"
    raise IntegrityError(text, recipe.at("model.name"), hint)
