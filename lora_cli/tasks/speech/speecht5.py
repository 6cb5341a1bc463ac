"""SpeechT5's forward pass, in which the output for an example does not depend on its batch.

The layers are those of transformers. Two details differ, so that an example has the same loss in
every batch and in every evaluation:

- The decoder's pre-net applies dropout in evaluation too, with a mask that transformers samples
  from the global generator once for a batch. Here each example has its own mask, sampled with the
  same probability.
- The post-net's convolutions would read the padding of a shorter spectrogram. Here they read zeros
  beyond its end, as they do for a spectrogram without padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor, nn
from transformers import PretrainedConfig

# B examples, L tokens, T frames, S = T / r steps of the decoder, M mel bands, K pre-net layers
IDS, MASK, FRAMES, PRENET_MASK, SPEAKER, FRAME_MASK = (
    "input_ids", "attention_mask", "frames", "kept", "speaker", "inside"
)  # fmt: skip


@dataclass
class SpeechOutput:
    """The model's output for a batch.

    Args:
        before: The spectrogram before the post-net (B, T, M).
        after: The spectrogram after the post-net (B, T, M).
        stops: The stop logit of each frame (B, T).
        attentions: The cross-attention weights of each decoder layer (B, H, S, L).
    """

    before: Tensor
    after: Tensor
    stops: Tensor
    attentions: tuple[Tensor, ...]


def sample_prenet_mask(config: PretrainedConfig, n_steps: int, rng: np.random.Generator) -> Tensor:
    """Sample the pre-net's dropout mask for an example (K, S, units); True keeps a unit.

    As in transformers, the configuration's dropout probability is used as that of keeping a unit;
    it is 0.5 in all known models.
    """
    shape = config.speech_decoder_prenet_layers, n_steps, config.speech_decoder_prenet_units
    return torch.from_numpy(rng.random(shape) < config.speech_decoder_prenet_dropout)


def decoder_steps(n_frames: int, config: PretrainedConfig) -> int:
    """Return the number of decoder steps that generate a number of frames."""
    return -(-n_frames // int(config.reduction_factor))


def run_speecht5(model: Any, inputs: Mapping[str, Tensor], with_attentions: bool) -> SpeechOutput:
    """Run a `SpeechT5ForTextToSpeech` with teacher forcing.

    Args:
        model: The model.
        inputs: `input_ids` (B, L) and `attention_mask` (B, L); `frames` (B, S, M), the decoder's
            inputs; `kept` (B, K, S, units), the pre-net's dropout masks; `speaker` (B, D); `inside`
            (B, T), whether a frame is not padding.
        with_attentions: Whether to return the cross-attention weights.
    """
    backbone, dtype = model.speecht5, dtype_of(model)
    mask = inputs[MASK]
    encoded = backbone.encoder(input_values=inputs[IDS], attention_mask=mask).last_hidden_state
    prenet = backbone.decoder.prenet
    frames, speakers = inputs[FRAMES].to(dtype), inputs[SPEAKER].to(dtype)
    decoder_inputs = _prenet(prenet, frames, inputs[PRENET_MASK], speakers)
    decoded = backbone.decoder.wrapped_decoder(
        hidden_states=decoder_inputs, encoder_hidden_states=encoded, encoder_attention_mask=mask,
        use_cache=False, output_attentions=with_attentions,
    )  # fmt: skip
    attentions = decoded.cross_attentions if with_attentions else ()
    return _postnet(model.speech_decoder_postnet, decoded.last_hidden_state, inputs[FRAME_MASK],
                    attentions)  # fmt: skip


def _prenet(prenet: Any, frames: Tensor, mask: Tensor, speaker: Tensor) -> Tensor:
    """Return the decoder's inputs (B, S, D), as `SpeechT5SpeechDecoderPrenet.forward`."""
    scale = 1 / (1 - prenet.config.speech_decoder_prenet_dropout)
    states = frames
    for layer, kept_units in zip(prenet.layers, mask.unbind(1), strict=True):
        states = F.relu(layer(states))
        states = states.masked_fill(~kept_units, 0.0) * scale
    states = prenet.encode_positions(prenet.final_layer(states))
    speakers = F.normalize(speaker)[:, None].expand(-1, states.shape[1], -1).to(states.dtype)
    inputs: Tensor = F.relu(prenet.speaker_embeds_layer(torch.cat([states, speakers], -1)))
    return inputs


def _postnet(
    postnet: Any, states: Tensor, inside: Tensor, attentions: tuple[Tensor, ...]
) -> SpeechOutput:
    """Return the output for decoded states (B, S, D), as `SpeechT5SpeechDecoderPostnet`."""
    before: Tensor = postnet.feat_out(states).view(len(states), -1, postnet.config.num_mel_bins)
    stops: Tensor = postnet.prob_out(states).view(len(states), -1)
    outside = ~inside[:, None]
    residual = before.transpose(1, 2)
    for layer in postnet.layers:
        residual = layer(residual.masked_fill(outside, 0.0))
    return SpeechOutput(before, before + residual.transpose(1, 2), stops, attentions)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the base's (frozen) weights, to which inputs are converted."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    return next((p.dtype for p in parameters if not p.requires_grad), parameters[0].dtype)
