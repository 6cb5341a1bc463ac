"""SpeechT5's loss as sums: of an example's numbers, frames and attentions.

It is `SpeechT5SpectrogramLoss` of transformers, whose three means are taken over a whole batch:

    |y - before| + |y - after|          per number of the log-mel spectrogram
  - (w t log p + (1 - t) log(1 - p))    per frame: whether speech ends there (t), with w = 5
  + s a (1 - exp(-(i/L - j/S)² / 2g²))  per attention a of step j of S to token i of L, in some
                                        heads (https://arxiv.org/abs/1710.08969)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor
from transformers import PretrainedConfig

from lora_cli.tasks.examples import MAIN
from lora_cli.tasks.speech.speecht5 import Spoken

# B examples, L tokens, T frames, S steps of the decoder, M mel bands
STOP, ATTENTION = "stop", "attention"  # the terms of the loss besides the spectrogram
WEIGHT_OF_STOP = 5.0  # of the one frame that ends, among many that do not


def loss_weights(config: PretrainedConfig | None) -> dict[str, float]:
    """Return the terms of the loss, and their weights; those of a usual model, if it is unknown."""
    scale = float(getattr(config, "guided_attention_loss_scale", 10.0))
    is_guided = bool(getattr(config, "use_guided_attention_loss", True))
    return {MAIN: 1.0, STOP: 1.0, **({ATTENTION: scale} if is_guided else {})}


def guide(n_tokens: int, n_steps: int, config: PretrainedConfig) -> Tensor:
    """Return how far each step is from where speech would be in each token (S, L), 0 to 1."""
    steps = torch.arange(n_steps).float()[:, None] / n_steps
    tokens = torch.arange(n_tokens).float()[None] / n_tokens
    sigma = float(config.guided_attention_loss_sigma)
    return 1.0 - torch.exp(-((tokens - steps) ** 2) / (2 * sigma**2))


def guided_heads(config: PretrainedConfig) -> int:
    """Return how many heads are guided, of all layers together."""
    heads = range(int(config.decoder_attention_heads))
    # as transformers counts: -1 leaves the last head out
    return len(heads[: config.guided_attention_loss_num_heads]) * int(config.decoder_layers)


def spectrogram_losses(
    output: Spoken, targets: dict[str, Tensor], config: PretrainedConfig
) -> dict[str, Tensor]:
    """Return the sum of each term for each example (B,).

    Args:
        output: What the model says.
        targets: `mel` (B, T, M); which frames are `trained` (B, T); `ends`, 1 where speech ends
            (B, T); `guide` (B, S, L), 0 where nothing is.
        config: Of the model.
    """
    trained = targets["trained"]
    before, after, stops = (_precise(one) for one in (output.before, output.after, output.stops))
    wanted = targets["mel"].to(before.dtype)
    errors = (before - wanted).abs() + (after - wanted).abs()
    weight = torch.full((), WEIGHT_OF_STOP, dtype=stops.dtype, device=stops.device)
    ends = F.binary_cross_entropy_with_logits(
        stops, targets["ends"].to(stops.dtype), pos_weight=weight, reduction="none"
    )
    found = {
        MAIN: errors.masked_fill(~trained[..., None], 0.0).sum((1, 2)),
        STOP: ends.masked_fill(~trained, 0.0).sum(1),
    }
    if output.attentions:
        heads = config.guided_attention_loss_num_heads
        read = _precise(torch.cat([layer[:, :heads] for layer in output.attentions], 1))
        found[ATTENTION] = (read * targets["guide"].to(read.dtype)[:, None]).sum((1, 2, 3))
    return found


def _precise(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
