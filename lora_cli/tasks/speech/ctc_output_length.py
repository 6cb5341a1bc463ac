"""The number of output steps of a CTC model for a recording."""

from __future__ import annotations

from transformers import PretrainedConfig

from lora_cli.tasks.speech.decoders import SPECTROGRAM_MODEL

FRAME_LENGTH, FRAME_HOP = 400, 160  # in samples, at 16 kHz
FRAMES_PER_INPUT = 2  # the feature extractor stacks this many frames into one


def ctc_output_length(config: PretrainedConfig, length: int) -> int:
    """Return the number of output steps for a recording.

    Args:
        config: The model's configuration, with the kernel sizes and strides of its convolutions.
        length: The recording's samples, or its frames if the model reads spectrograms.
    """
    size, padding = 3, 1  # of the adapter's convolutions, which shorten the output
    if config.model_type == SPECTROGRAM_MODEL:
        # the layers' real padding; `_get_feat_extract_output_lengths` assumes size // 2
        size, padding = config.adapter_kernel_size, config.adapter_stride // 2
    else:
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            length = (length - kernel) // stride + 1
    if getattr(config, "add_adapter", False):
        for _ in range(config.num_adapter_layers):
            length = (length + 2 * padding - size) // config.adapter_stride + 1
    return max(length, 0)


def count_frames(n_samples: int) -> int:
    """Return the number of (stacked) spectrogram frames of a recording."""
    return max((n_samples - FRAME_LENGTH) // FRAME_HOP + 1, 0) // FRAMES_PER_INPUT
