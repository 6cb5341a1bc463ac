"""SpeechT5's forward pass, so that what it says of a text depends on nothing but that text.

The layers are transformers' own. Two things around them are done otherwise, for an example to have
the same loss in every batch and in every evaluation:

- The layers that read the model's own speech (the decoder's pre-net) draw dropout always, in
  evaluation too, and transformers draws it from the global generator, once for all of a batch. Here
  each example brings its own along, drawn as transformers draws it.
- The post-net's convolutions would read what fills a shorter spectrogram. Here they read zeros
  behind its end, as they do where a spectrogram stands alone.
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
IDS, MASK, FRAMES, KEPT, SPEAKER, INSIDE = (
    "input_ids", "attention_mask", "frames", "kept", "speaker", "inside"
)  # fmt: skip


@dataclass
class Spoken:
    """What the model says of a batch.

    Args:
        before: The spectrogram before the post-net (B, T, M).
        after: The same behind it (B, T, M).
        stops: The logit of each frame that speech ends there (B, T).
        attentions: Of each decoder layer, how much each step reads of each token (B, H, S, L).
    """

    before: Tensor
    after: Tensor
    stops: Tensor
    attentions: tuple[Tensor, ...]


def draw_kept(config: PretrainedConfig, n_steps: int, rng: np.random.Generator) -> Tensor:
    """Return which numbers of the pre-net an example keeps (K, S, units).

    As in transformers, each is kept with the probability that the configuration calls that of
    dropping one; in all known models it is a half.
    """
    shape = config.speech_decoder_prenet_layers, n_steps, config.speech_decoder_prenet_units
    return torch.from_numpy(rng.random(shape) < config.speech_decoder_prenet_dropout)


def decoder_steps(n_frames: int, config: PretrainedConfig) -> int:
    """Return in how many steps the decoder says so many frames."""
    return -(-n_frames // int(config.reduction_factor))


def spoken(model: Any, inputs: Mapping[str, Tensor], with_attentions: bool) -> Spoken:
    """Return what a `SpeechT5ForTextToSpeech` says of texts.

    Args:
        model: The model.
        inputs: `input_ids` (B, L) and `attention_mask` (B, L); `frames` that each step of the
            decoder reads (B, S, M); what the pre-net keeps, `kept` (B, K, S, units); `speaker`
            (B, D); and which frames are `inside` the spectrogram (B, T).
        with_attentions: Whether to return what the decoder reads of the text.
    """
    body, dtype = model.speecht5, dtype_of(model)
    mask = inputs[MASK]
    read = body.encoder(input_values=inputs[IDS], attention_mask=mask).last_hidden_state
    prenet = body.decoder.prenet
    heard = _prenet(prenet, inputs[FRAMES].to(dtype), inputs[KEPT], inputs[SPEAKER].to(dtype))
    decoded = body.decoder.wrapped_decoder(
        hidden_states=heard, encoder_hidden_states=read, encoder_attention_mask=mask,
        use_cache=False, output_attentions=with_attentions,
    )  # fmt: skip
    attentions = decoded.cross_attentions if with_attentions else ()
    return _postnet(model.speech_decoder_postnet, decoded.last_hidden_state, inputs[INSIDE],
                    attentions)  # fmt: skip


def _prenet(prenet: Any, frames: Tensor, kept: Tensor, speaker: Tensor) -> Tensor:
    """Return what the decoder reads of frames (B, S, D): `SpeechT5SpeechDecoderPrenet.forward`."""
    scale = 1 / (1 - prenet.config.speech_decoder_prenet_dropout)
    states = frames
    for layer, own in zip(prenet.layers, kept.unbind(1), strict=True):
        states = F.relu(layer(states))
        states = states.masked_fill(~own, 0.0) * scale
    states = prenet.encode_positions(prenet.final_layer(states))
    who = F.normalize(speaker)[:, None].expand(-1, states.shape[1], -1).to(states.dtype)
    found: Tensor = F.relu(prenet.speaker_embeds_layer(torch.cat([states, who], -1)))
    return found


def _postnet(
    postnet: Any, states: Tensor, inside: Tensor, attentions: tuple[Tensor, ...]
) -> Spoken:
    """Return the spectrograms of decoded states (B, S, D): `SpeechT5SpeechDecoderPostnet`."""
    before: Tensor = postnet.feat_out(states).view(len(states), -1, postnet.config.num_mel_bins)
    stops: Tensor = postnet.prob_out(states).view(len(states), -1)
    outside = ~inside[:, None]
    changed = before.transpose(1, 2)
    for layer in postnet.layers:
        changed = layer(changed.masked_fill(outside, 0.0))
    return Spoken(before, before + changed.transpose(1, 2), stops, attentions)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the precision in which the model's own weights are kept; autocast changes it alone."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    return next((p.dtype for p in parameters if not p.requires_grad), parameters[0].dtype)
