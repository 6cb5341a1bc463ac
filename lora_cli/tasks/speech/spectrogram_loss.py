"""SpeechT5's loss, as sums per example.

This is transformers' `SpeechT5SpectrogramLoss`, which takes the mean of each term over a batch:

    |y - before| + |y - after|          per value of the log-mel spectrogram
  - (w t log p + (1 - t) log(1 - p))    per frame: whether speech stops there (t), with w = 5
  + s a (1 - exp(-(i/L - j/S)² / 2g²))  per attention weight a from step j of S to token i of L, in
                                        some heads (guided attention, Tachibana et al. 2017,
                                        https://arxiv.org/abs/1710.08969)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor
from transformers import PretrainedConfig

from lora_cli.tasks.examples import MAIN
from lora_cli.tasks.speech.speecht5 import SpeechOutput

# B examples, L tokens, T frames, S steps of the decoder, M mel bands
STOP, ATTENTION = "stop", "attention"  # the loss terms besides the spectrogram's
STOP_WEIGHT = 5.0  # of the last frame, the only positive one


def loss_weights(config: PretrainedConfig | None) -> dict[str, float]:
    """Return the weights of the loss terms; SpeechT5's defaults if there is no configuration."""
    scale = float(getattr(config, "guided_attention_loss_scale", 10.0))
    is_guided = bool(getattr(config, "use_guided_attention_loss", True))
    return {MAIN: 1.0, STOP: 1.0, **({ATTENTION: scale} if is_guided else {})}


def attention_guide(n_tokens: int, n_steps: int, config: PretrainedConfig) -> Tensor:
    """Return the guided attention penalty (S, L), 0 to 1: the distance from the diagonal."""
    steps = torch.arange(n_steps).float()[:, None] / n_steps
    tokens = torch.arange(n_tokens).float()[None] / n_tokens
    sigma = float(config.guided_attention_loss_sigma)
    return 1.0 - torch.exp(-((tokens - steps) ** 2) / (2 * sigma**2))


def guided_heads(config: PretrainedConfig) -> int:
    """Return the number of guided attention heads in all layers."""
    heads = range(int(config.decoder_attention_heads))
    # like transformers' slicing: -1 leaves out the last head
    return len(heads[: config.guided_attention_loss_num_heads]) * int(config.decoder_layers)


def spectrogram_losses(
    output: SpeechOutput, targets: dict[str, Tensor], config: PretrainedConfig
) -> dict[str, Tensor]:
    """Return the sum of each loss term for each example (B,).

    Args:
        output: The model's output.
        targets: `mel` (B, T, M); `trained` (B, T), whether a frame is not padding; `ends` (B, T), 1
            at the last frame; `guide` (B, S, L), the attention penalty, 0 at padding.
        config: The model's configuration.
    """
    is_trained = targets["trained"]
    before, after, stops = (_to_float32(x) for x in (output.before, output.after, output.stops))
    mel = targets["mel"].to(before.dtype)
    errors = (before - mel).abs() + (after - mel).abs()
    weight = torch.full((), STOP_WEIGHT, dtype=stops.dtype, device=stops.device)
    ends = F.binary_cross_entropy_with_logits(
        stops, targets["ends"].to(stops.dtype), pos_weight=weight, reduction="none"
    )
    losses = {
        MAIN: errors.masked_fill(~is_trained[..., None], 0.0).sum((1, 2)),
        STOP: ends.masked_fill(~is_trained, 0.0).sum(1),
    }
    if output.attentions:
        heads = config.guided_attention_loss_num_heads
        weights = _to_float32(torch.cat([layer[:, :heads] for layer in output.attentions], 1))
        losses[ATTENTION] = (weights * targets["guide"].to(weights.dtype)[:, None]).sum((1, 2, 3))
    return losses


def _to_float32(tensor: Tensor) -> Tensor:
    """Convert to float32, unless the tensor is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
