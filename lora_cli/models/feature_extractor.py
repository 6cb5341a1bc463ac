"""Load and check the feature extractor of a speech model, which makes features from samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from lora_cli.errors import LoraError
from lora_cli.models.find_base import source_of
from lora_cli.models.load_errors import explained
from lora_cli.recipe import Recipe

EXTRACTOR_FILE = "preprocessor_config.json"


def load_feature_extractor(recipe: Recipe) -> Any:
    """Return the feature extractor of a base.

    Raises:
        LoraError: If the base has none.
    """
    from transformers import AutoFeatureExtractor

    with explained(recipe, "feature extractor"):
        return AutoFeatureExtractor.from_pretrained(**source_of(recipe))


def require_whisper_features(extractor: Any, config: PretrainedConfig, recipe: Recipe) -> None:
    """Reject a feature extractor whose spectrograms do not fit a Whisper model.

    Args:
        extractor: The feature extractor.
        config: The configuration of the model.
        recipe: Names the base.

    Raises:
        LoraError: If the two do not belong together.
    """
    bands, frames = config.num_mel_bins, 2 * config.max_source_positions
    size = getattr(extractor, "feature_size", None), getattr(extractor, "nb_max_frames", None)
    if size != (bands, frames):
        what = f"the feature extractor of `{recipe.model.name}` makes {size[0]} bands by {size[1]} "
        what += f"frames of a recording, and the model reads {bands} by {frames}"
        hint = f"copy or download {EXTRACTOR_FILE} and config.json again: they do not belong "
        raise LoraError(what, recipe.at("model.name"), f"{hint}together")


def require_speecht5_features(extractor: Any, config: PretrainedConfig, recipe: Recipe) -> None:
    """Reject a feature extractor whose spectrograms differ from those of a SpeechT5 model.

    Args:
        extractor: The feature extractor.
        config: The configuration of the model.
        recipe: Names the base.

    Raises:
        LoraError: If the two do not belong together.
    """
    bands = getattr(extractor, "num_mel_bins", None)
    if bands != config.num_mel_bins:
        what = (
            f"the feature extractor of `{recipe.model.name}` makes spectrograms of {bands} bands, "
        )
        what += f"and the model writes {config.num_mel_bins}"
        hint = f"copy or download {EXTRACTOR_FILE} and config.json again: they do not belong "
        raise LoraError(what, recipe.at("model.name"), f"{hint}together")


def features_of(extractor: Any, samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the input features of samples (bands, frames), padded with silence to full length."""
    rate = extractor.sampling_rate
    # in numpy, not torch: its STFT on a CPU is bitwise reproducible
    features = extractor(samples, sampling_rate=rate, return_tensors="np")["input_features"]
    return np.ascontiguousarray(features[0], dtype=np.float32)
