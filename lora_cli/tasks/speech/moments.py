"""For how many moments of a recording a model with CTC says which letter it hears."""

from __future__ import annotations

from transformers import PretrainedConfig

from lora_cli.tasks.speech.decoders import SPECTROGRAMS

WINDOW, HOP = 400, 160  # samples of a frame, and between two
STACKED = 2  # frames that are read as one


def moments_of(config: PretrainedConfig, length: int) -> int:
    """Return for how many moments a model says what it hears in a recording.

    Args:
        config: With the sizes and strides of the convolutions.
        length: Samples of the recording; frames, where the model reads a spectrogram.
    """
    size, padding = 3, 1  # of the convolutions behind the model, which shorten what it says
    if config.model_type == SPECTROGRAMS:
        # as its layers are padded; `_get_feat_extract_output_lengths` says size // 2
        size, padding = config.adapter_kernel_size, config.adapter_stride // 2
    else:
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            length = (length - kernel) // stride + 1
    if getattr(config, "add_adapter", False):
        for _ in range(config.num_adapter_layers):
            length = (length + 2 * padding - size) // config.adapter_stride + 1
    return max(length, 0)


def frames_in(n_samples: int) -> int:
    """Return how many frames a model that reads spectrograms gets of a recording."""
    return max((n_samples - WINDOW) // HOP + 1, 0) // STACKED
