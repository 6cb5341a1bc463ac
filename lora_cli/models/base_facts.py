"""Record and compare the facts of a base that affect its outputs besides its tensors.

The same weights give other outputs with 6 attention heads instead of 12, another `rope_theta`, two
swapped ids in tokenizer.json, or another chat template. So the facts of config.json and of the
tokenizer are saved in `computation.json` next to the adapter, and in the state of a run, and
compared before either is used.
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
from lora_cli.models.image_processor import NO_PIXEL_KEYS, PROCESSOR_FILE
from lora_cli.models.load_errors import explained
from lora_cli.recipe import (
    COMPUTATION_FILE,
    RECIPE_FILE,
    Recipe,
    computing_values,
    read_computation,
)

OVERRIDE = "model.allow_other_base"
# keys of config.json that do not affect outputs; the labels come from the recipe
NOT_COMPUTING = {
    "architectures", "attn_implementation", "auto_map", "dtype", "finetuning_task",
    "gradient_checkpointing", "id2label", "label2id", "name_or_path", "num_labels",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "return_dict_in_generate", "task_specific_params", "tokenizer_class", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_SHOWN = 4  # keys in a message
NO_LIMIT = 10**9  # tokenizers without a limit have 1e30


def base_facts(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the keys of a configuration that affect outputs, and the facts of the tokenizer."""
    return {"config": config_facts(config), **facts_of(tokenizer)}


def facts_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a hash of a tokenizer, and its chat template."""
    return {"tokenizer": tokenizer_hash(tokenizer), "chat_template": _template(tokenizer)}


def config_facts(config: PretrainedConfig) -> dict[str, Any]:
    """Return the keys of a configuration that affect outputs, flattened: `vision.layers`."""
    return flat_config(config.to_dict())


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config_facts` of a configuration that is a dictionary."""
    return _computing_keys(json.loads(json.dumps(config, default=str)))


def _computing_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if key in NOT_COMPUTING or key.startswith("_"):
            continue
        if isinstance(value, dict):
            result |= _computing_keys(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that affects tokenization, except the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        state = json.loads(backend.to_str())
        for key in ("truncation", "padding"):  # state of the last call
            state.pop(key, None)
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    max_length = min(int(tokenizer.model_max_length), NO_LIMIT)
    text = json.dumps([state, special, max_length], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else str(template)


def write_computation(folder: Path, recipe: Recipe, facts: dict[str, Any]) -> None:
    """Write `computation.json` into a folder.

    Args:
        folder: The folder of an adapter or a checkpoint.
        recipe: The recipe, with the labels that were learned.
        facts: The result of `base_facts`.
    """
    value = {"format": FORMAT, "recipe": computing_values(recipe), "base": facts}
    write_json(folder / COMPUTATION_FILE, value)


def save_tokenizer(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write the tokenizer of a training, and its chat template, into a folder.

    The hash of the copy may differ when it is read back (another class, a default value that is
    written out), so it is added to `facts` as `tokenizer_copy`.
    """
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        # the settings of its last call would be saved too; without a call, if rows were cached
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(folder)
    if facts is not None and "tokenizer_copy" not in facts:
        facts["tokenizer_copy"] = tokenizer_hash(read_tokenizer(folder, recipe))


def trained_tokenizer(folder: Path, recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer that an adapter was trained with: the base's, or the adapter's own copy.

    The chat template is set to that of the training. For an adapter of another tool, its own copy
    is the only information on its training.

    Args:
        folder: The adapter's folder.
        recipe: Names the base.

    Raises:
        IntegrityError: If the base has another tokenizer now, and the adapter has no copy.
    """
    trained = read_computation(folder)
    if trained is None and (folder / RECIPE_FILE).is_file():
        warn(
            f"{folder} has no {COMPUTATION_FILE}, as folders of earlier versions: whether its "
            "recipe, tokenizer and config.json are those of the training is unverified"
        )
        return load_tokenizer(recipe)
    if trained is None:
        return _external_tokenizer(folder, recipe)
    facts = trained["base"]
    known = {facts["tokenizer"], facts.get("tokenizer_copy")}  # a full model is its own base
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


def _external_tokenizer(folder: Path, recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer for an adapter of another tool: its own, if it has one."""
    base_tokenizer = load_tokenizer(recipe)
    if not (folder / TOKENIZER_CONFIG).is_file():
        return base_tokenizer
    own_tokenizer = _adapter_tokenizer(folder, recipe)
    if not (differing := tokenizer_differences(own_tokenizer, facts_of(base_tokenizer))):
        return base_tokenizer
    what = f"{folder} has a tokenizer of its own ({differing} than in `{recipe.model.name}`)"
    n_rows = getattr(load_config(recipe).get_text_config(), "vocab_size", None)
    if n_rows is not None and len(own_tokenizer) > max(n_rows, len(base_tokenizer)):
        # neither has the adapter: otherwise loading it would report the mismatch
        warn(f"{what}: the base has no rows for all of its tokens, so that of the base is used")
        return base_tokenizer
    warn(f"{what}: it is used")
    if own_tokenizer.chat_template is None:
        own_tokenizer.chat_template = base_tokenizer.chat_template
    return own_tokenizer


def warn_of_own_tokenizer(folder: Path, facts: dict[str, Any], recipe: Recipe) -> None:
    """Warn if training continues an adapter of another tool with a tokenizer that is not its own.

    Args:
        folder: The adapter's folder.
        facts: The result of `base_facts` for the base; without `tokenizer` if it has none.
        recipe: Names the base.
    """
    if "tokenizer" not in facts or not (folder / TOKENIZER_CONFIG).is_file():
        return
    if differing := tokenizer_differences(_adapter_tokenizer(folder, recipe), facts):
        warn(
            f"{folder} has a tokenizer of its own ({differing} than in `{recipe.model.name}`): it "
            "is trained with that of the base; `model.add_tokens` names new tokens, "
            "`task.chat_template` a template"
        )


def _adapter_tokenizer(folder: Path, recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer in the folder of an adapter of another tool.

    Raises:
        LoraError: If it cannot be read.
    """
    try:
        return read_tokenizer(folder, recipe)
    except LoraError as error:
        hint = "put it right, or take its files out of the folder: that of the base is used then"
        raise LoraError(error.problems[0].what, str(folder), hint) from error


def tokenizer_differences(tokenizer: PreTrainedTokenizerBase, facts: dict[str, Any]) -> str:
    """Describe how a tokenizer differs from the one that the facts describe; "" if it does not."""
    differences = []
    if tokenizer_hash(tokenizer) != facts["tokenizer"]:
        differences.append("its tokens are others")
    if tokenizer.chat_template is not None and _template(tokenizer) != facts["chat_template"]:
        differences.append("its chat template is another")
    return ", and ".join(differences)


def warn_of_own_processor(folder: Path, recipe: Recipe) -> None:
    """Warn if another tool's adapter has other preprocessing of images or audio than the base.

    Args:
        folder: The adapter's folder.
        recipe: Names the base, whose processor is used.
    """
    if not (folder / PROCESSOR_FILE).is_file():
        return
    source = source_of(recipe)
    base_file = cached_file(
        source["pretrained_model_name_or_path"],
        PROCESSOR_FILE,
        revision=source["revision"],
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    own_values, base_values = (
        _values(folder / PROCESSOR_FILE),
        _values(Path(base_file)) if base_file else {},
    )
    # keys that only one has may come from another version
    differing = [
        k
        for k in sorted(own_values.keys() & base_values.keys() - NO_PIXEL_KEYS)
        if own_values[k] != base_values[k]
    ]
    if differing:
        keys = ", ".join(f"`{key}`" for key in differing[:MAX_SHOWN])
        warn(
            f"{folder / PROCESSOR_FILE} has another {keys} than `{recipe.model.name}`, which is "
            "used: if the adapter was trained so, give the base these values"
        )


def _values(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def read_tokenizer(folder: Path, recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer in an adapter's folder."""
    with explained(recipe, "adapter's own tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=recipe.model.trust_remote_code
        )
    return tokenizer


def _own_copy(folder: Path, recipe: Recipe, known: set[Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer in an adapter's folder, if it is the one of the training."""
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
    """Reject a base whose config.json or tokenizer is not the one of the training.

    Args:
        trained: The result of `base_facts` at the time of training; None if it was not saved.
        now: The result of `base_facts` for the base as it is now.
        recipe: Names the base, and may allow another.
        what: The thing that was trained, for messages: `the adapter out/`.
        with_tokenizer: Compare the tokenizer too, if it comes from the base.
        with_template: Compare the chat template too, if it comes from the base.

    Raises:
        IntegrityError: With the first key that differs, unless `model.allow_other_base` is set.
    """
    if trained is None:
        return
    before, config = trained["config"], now["config"]
    # other versions of transformers may have other keys
    differing = [key for key in sorted(before.keys() & config.keys()) if before[key] != config[key]]
    texts = [
        f"`{key}` in config.json is {json.dumps(config[key])}, and was {json.dumps(before[key])}"
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
    others = f", and {len(texts) - 1} more" if texts[1:] else ""
    text = f"`{recipe.model.name}` is not as it was when {what} was trained: {texts[0]}{others}"
    if recipe.model.allow_other_base:
        warn(f"{text}; `{OVERRIDE}` allows it")
        return
    hint = f"restore it; to go on all the same: `--set {OVERRIDE}=true`"
    raise IntegrityError(text, recipe.at("model.name"), hint)
