"""Tests of the output length of CTC models against the models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from lora_cli.tasks.speech.ctc_output_length import count_frames, ctc_output_length

SMALL: dict[str, Any] = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "output_hidden_size": 8,
}  # fmt: skip


@pytest.mark.parametrize("options", [
    {}, {"add_adapter": True, "num_adapter_layers": 2, "adapter_stride": 2},
    {"add_adapter": True, "num_adapter_layers": 1, "adapter_stride": 3},
])  # fmt: skip
def test_output_length_of_models_that_read_samples(
    options: dict[str, Any],
) -> None:
    config = Wav2Vec2Config(
        **SMALL, conv_dim=[4, 4, 4], conv_kernel=[10, 3, 2], conv_stride=[5, 2, 2],
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **options,
    )  # fmt: skip
    model = Wav2Vec2Model(config).eval()
    for length in (200, 219, 220, 221, 333):
        with torch.no_grad():
            output = model(torch.zeros(1, length)).last_hidden_state
        assert ctc_output_length(config, length) == output.shape[1], length
    assert ctc_output_length(config, 12) == ctc_output_length(config, 3) == 0


@pytest.mark.parametrize("options", [
    {}, {"add_adapter": True, "num_adapter_layers": 2, "adapter_stride": 2,
         "adapter_kernel_size": 5},
    {"add_adapter": True, "num_adapter_layers": 1, "adapter_stride": 3, "adapter_kernel_size": 2},
    {"add_adapter": True, "num_adapter_layers": 1, "adapter_stride": 4, "adapter_kernel_size": 5},
])  # fmt: skip
def test_output_length_of_models_that_read_spectrograms(options: dict[str, Any]) -> None:
    config = Wav2Vec2BertConfig(**SMALL, feature_projection_input_dim=6, **options)
    model = Wav2Vec2BertModel(config).eval()
    for length in (20, 21, 22, 33):
        with torch.no_grad():
            output = model(torch.zeros(1, length, 6)).last_hidden_state
        assert ctc_output_length(config, length) == output.shape[1], length


@pytest.mark.parametrize("n_samples", [560, 719, 720, 879, 880, 1600, 16_001])
def test_the_number_of_frames_is_that_of_the_feature_extractor(n_samples: int) -> None:
    extractor = SeamlessM4TFeatureExtractor()
    features = extractor(torch.zeros(n_samples).numpy(), sampling_rate=16_000, pad_to_multiple_of=1)
    assert count_frames(n_samples) == len(features["input_features"][0])


def test_short_recordings_have_no_frame() -> None:
    assert [count_frames(n) for n in (0, 100, 399, 400, 559, 560)] == [0, 0, 0, 0, 0, 1]
