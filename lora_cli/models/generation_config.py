"""Check a base's generation_config.json before its weights are loaded."""

from __future__ import annotations

import json
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from lora_cli.errors import LoraError
from lora_cli.models.find_base import source_of
from lora_cli.recipe import Recipe
from lora_cli.unexpected_errors import own_words


def check_generation_config(auto_class: Any, config: PretrainedConfig, recipe: Recipe) -> None:
    """Reject a generation_config.json that transformers cannot use; a model may have none.

    Raises:
        LoraError: With the reason.
    """
    mapping = auto_class._model_mapping
    if type(config) not in mapping or not mapping[type(config)].can_generate():
        return
    source, file = source_of(recipe), "generation_config.json"
    try:
        generation_config = GenerationConfig.from_pretrained(
            source["pretrained_model_name_or_path"], revision=source["revision"]
        )
        _check_stop_ids(generation_config.eos_token_id, config, recipe, file)
        return
    except LoraError:
        raise
    except OSError as error:  # there is no such file, or it is not JSON
        if "valid JSON" not in str(error):
            _check_stop_ids(getattr(config, "eos_token_id", None), config, recipe, "config.json")
            return
        reason = "it is not valid JSON"
    except Exception as error:  # transformers raises different exceptions for wrong values
        reason = own_words(error)
    what = f"the {file} of `{recipe.model.name}` cannot be used: {reason}"
    hint = "correct that file in the model's folder, or download it again"
    raise LoraError(what, recipe.at("model.name"), hint)


def _check_stop_ids(ids: Any, config: PretrainedConfig, recipe: Recipe, file: str) -> None:
    """Reject ids of end-of-text tokens that are not in the model's vocabulary.

    Args:
        ids: The value of `eos_token_id`: an id, a list of ids, or None.
        config: The configuration, with the size of the vocabulary.
        recipe: Names the model.
        file: The file of the model that contains the value.

    Raises:
        LoraError: With the first id that is not in the vocabulary.
    """
    count = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    for token in ids if isinstance(ids, list | tuple) else [ids]:
        is_id = isinstance(token, int) and not isinstance(token, bool)
        if token is None or (is_id and 0 <= token < (count or token + 1)):
            continue
        known = f"the ids of its tokens are 0 to {count - 1:,}" if count else "an id is a number"
        raise LoraError(
            f"the {file} of `{recipe.model.name}` has the `eos_token_id` {json.dumps(token)}, "
            f"which is no token of the model: {known}",
            recipe.at("model.name"),
            "write the id of the token that ends an answer there; tokenizer_config.json names it",
        )
