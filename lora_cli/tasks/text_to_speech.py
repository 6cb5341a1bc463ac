"""Synthesises speech with SpeechT5, which generates a spectrogram, and a vocoder."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForTextToSpectrogram

from lora_cli.data.recordings import playable_url
from lora_cli.errors import LoraError, counted
from lora_cli.metrics import MetricContext
from lora_cli.models.load_errors import require_kind
from lora_cli.models.vocoder import load_vocoder
from lora_cli.tasks.examples import Batch, Prediction
from lora_cli.tasks.finite_scores import require_finite
from lora_cli.tasks.speech.spectrogram_loss import ATTENTION, loss_weights, spectrogram_losses
from lora_cli.tasks.speech.speech_proposals import propose_speech
from lora_cli.tasks.speech.speecht5 import (
    IDS,
    MASK,
    SPEAKER,
    SpeechOutput,
    decoder_steps,
    dtype_of,
    run_speecht5,
)
from lora_cli.tasks.speech.spoken_texts import PLAYED_SECONDS, SpokenTexts

ARCHITECTURE = "speecht5"
NAME_LENGTH = 40  # characters of the text in the name of its recording


class TextToSpeech(SpokenTexts):
    """`task.type: text_to_speech`."""

    auto_class = AutoModelForTextToSpectrogram
    metric_channel = "speech"
    default_metrics = ("mel_l1", "stop_accuracy")
    main_term = "spectrogram"
    answer_files = "recordings"
    propose = staticmethod(propose_speech)
    generates_answers = False  # whether a metric needs generated spectrograms
    n_cut_answers = 0  # since the last warning
    _vocoder: Any = None

    # --------------------------------------------------------------------- the processor

    def load_processor(self) -> None:
        """Load the processor, the configuration and all else that has no weights."""
        self.read_config()
        super().load_processor()

    def read_config(self) -> None:
        """Read the model's configuration.

        Raises:
            LoraError: If the model's architecture is not supported.
        """
        super(SpokenTexts, self).read_config()
        require_kind(self.auto_class, self.config, self.recipe)
        if self.config.model_type != ARCHITECTURE:
            what = f"a {self.config.model_type} model cannot be used for `{self.recipe.task.type}`"
            raise LoraError(what, self.recipe.at("model.name"), self.spec.suitable_models)

    # ----------------------------------------------------------------------------- model

    def fit_to_model(self, model: nn.Module, longest: int | None = None) -> None:
        """Check on the model that its output for a text does not depend on the batch."""
        super().fit_to_model(model, longest)
        assert self.padding.side == "right", "padding changes the outputs of other texts"

    def forward(self, model: nn.Module, batch: Batch) -> SpeechOutput:  # type: ignore[override]
        """Return the model's output for each text, with the recorded frames as decoder inputs."""
        return run_speecht5(model, batch.inputs, ATTENTION in batch.items)

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the spectrogram and the logit of the end of speech, per frame (B, T, M + 1)."""
        found = run_speecht5(model, inputs, with_attentions=False)
        return torch.cat([found.after, found.stops[..., None]], -1)

    def probed(self, model: nn.Module, probe: dict[str, Tensor]) -> Tensor:
        """Return the output for the probe, by which two models are compared."""
        return self.logits(model, probe)

    # ------------------------------------------------------------------- loss and metrics

    @property
    def loss_weights(self) -> Mapping[str, float]:  # type: ignore[override]
        """The weights of the terms of the loss, from the model's configuration."""
        return loss_weights(getattr(self, "config", None))

    @property
    def loss_definition(self) -> str:
        """The definition of the loss, for the report."""
        found = (
            "SpeechT5's: mean distance from the log-mel spectrogram before and after the post-net, "
            "+ binary cross-entropy per frame of where speech ends (the end weighs 5 times)"
        )
        scale = self.loss_weights.get(ATTENTION)
        return found if scale is None else f"{found}, + {scale:g} x guided attention"

    def losses(self, model: nn.Module, output: SpeechOutput, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of the loss of each example (B,): spectrogram, end, attention."""
        return spectrogram_losses(output, batch.targets, self.config)

    def check_metrics(self, channels: set[str]) -> None:
        """Turn on the generation of spectrograms if a metric needs them."""
        self.generates_answers = "lengths" in channels

    @property
    def metric_context(self) -> MetricContext:
        """No facts, since the metrics need none."""
        return MetricContext()

    def predictions(self, model: nn.Module, output: SpeechOutput, batch: Batch) -> list[Prediction]:
        """Return the inputs of the metrics for each row: errors of its spectrogram and its end."""
        errors, ends, goes_on = self._counts(output, batch.targets)
        counts = batch.targets["trained"].sum(1).tolist()
        steps = (batch.targets["last_step"] + 1).tolist()
        found = []
        for i, row in enumerate(batch.rows):
            n_numbers = float(counts[i] * self.n_bands)
            sums_and_counts = (
                [errors[i], ends[i], goes_on[i]],
                [n_numbers, 1.0, float(steps[i] - 1)],
            )
            details = {"frames": counts[i], "mel_l1": round(errors[i] / n_numbers, 6)}
            prediction = Prediction(
                row, None, None, None, {self.metric_channel: sums_and_counts}, details=details
            )
            if self.generates_answers:
                ids = batch.inputs[IDS][i][batch.inputs[MASK][i].bool()]
                spectrogram = self._generate_spectrogram(model, ids, batch.inputs[SPEAKER][i])
                prediction.metric_inputs["lengths"] = float(len(spectrogram)), float(counts[i])
                prediction.details["said_frames"] = len(spectrogram)
            found.append(prediction)
        return found

    def _counts(
        self, output: SpeechOutput, targets: Mapping[str, Tensor]
    ) -> tuple[list[float], list[float], list[float]]:
        """Return sums over each example, as three lists.

        They are the absolute errors of its spectrogram, whether its last step is predicted as the
        end (0 or 1), and the number of earlier steps that are correctly not predicted as the end.
        """
        mel, trained = targets["mel"], targets["trained"]
        errors = (output.after.float() - mel.float()).abs().masked_fill(~trained[..., None], 0.0)
        factor = int(self.config.reduction_factor)
        # speech ends at a step if the sum over its frames reaches the threshold, as in transformers
        stops = output.stops.float().sigmoid()
        end_probabilities = stops.view(len(stops), -1, factor).sum(2)
        ends = end_probabilities >= self.spec.stop_threshold  # (B, S)
        last = targets["last_step"][:, None]
        before = torch.arange(ends.shape[1], device=ends.device) < last
        correct = ends.gather(1, last)[:, 0].float(), (~ends & before).sum(1).float()
        return errors.double().sum((1, 2)).tolist(), correct[0].tolist(), correct[1].tolist()

    # --------------------------------------------------------------------------- answers

    @torch.no_grad()
    def _generate_spectrogram(self, model: Any, ids: Tensor, speaker: Tensor) -> Tensor:
        """Return the spectrogram that the model generates for a text (T, M).

        The model uses dropout in generation. Texts are processed one by one, so that its random
        numbers are those of transformers and do not depend on other texts.

        Args:
            model: The model, in eval mode.
            ids: The token ids of the text (L,).
            speaker: The speaker embedding (D,).
        """
        device, factor = ids.device, int(self.config.reduction_factor)
        positions = int(self.config.max_speech_positions)
        longest = int(len(ids) * self.spec.longest_ratio / factor)
        longest = max(1, min(longest, positions))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.recipe.train.seed)
            found: Tensor = model.generate_speech(
                ids[None], speaker[None].to(dtype_of(model)), torch.ones_like(ids)[None],
                threshold=self.spec.stop_threshold,
                maxlenratio=(longest * factor + 0.5) / len(ids),  # 0.5: against rounding
            )  # fmt: skip
        require_finite(found.float(), model, self.recipe)
        self.n_cut_answers += decoder_steps(len(found), self.config) >= longest
        return found

    def _spectrograms_for(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[Tensor]:
        """Return the spectrogram that the model generates for each row (T, M), in float32."""
        device = next(model.parameters()).device
        found = []
        for row in rows:
            speaker = torch.from_numpy(self.speaker_vector(row)).to(device)
            ids = torch.tensor(self.tokens_of(row), device=device)
            found.append(self._generate_spectrogram(model, ids, speaker).float())
        return found

    def _vocode(self, spectrogram: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the audio samples (N,) for a spectrogram (T, M), from the recipe's vocoder."""
        assert self.spec.vocoder is not None, "a spectrogram needs a vocoder to become audio"
        device = spectrogram.device
        if self._vocoder is None:
            self._vocoder = load_vocoder(self.recipe, self.spec.vocoder, device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            samples: Tensor = self._vocoder.to(device)(spectrogram)
        return samples.cpu().numpy()

    def _wav_file(self, spectrogram: Tensor) -> bytes:
        """Return the contents of a WAV file for a spectrogram (T, M)."""
        import soundfile

        file = io.BytesIO()
        samples = self._vocode(spectrogram).clip(-1, 1)
        soundfile.write(file, samples, self.rate, format="WAV", subtype="PCM_16")
        return file.getvalue()

    def answer_columns(self) -> dict[str, str]:
        """Return the column with the name of the recording, or of the spectrogram."""
        return {"spectrogram" if self.spec.vocoder is None else "recording": "string"}

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Write a recording or spectrogram for each row, and return the names of the files."""
        folder = self.answer_folder
        place = Path() if folder is None else folder
        place.mkdir(parents=True, exist_ok=True)
        names = []
        for row, spectrogram in zip(rows, self._spectrograms_for(model, rows), strict=True):
            name = self._file_name(row)
            if self.spec.vocoder is None:
                np.save(place / name, spectrogram.cpu().numpy())
            else:
                (place / name).write_bytes(self._wav_file(spectrogram))
            names.append(name if folder is None else f"{folder.name}/{name}")
        return [[name] for name in names]

    def _file_name(self, row: dict[str, Any]) -> str:
        """Return the name of a row's file, which depends on its text, speaker and the seed."""
        text, seed = self.text_of(row), self.recipe.train.seed
        words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:NAME_LENGTH].rstrip("-")
        key = f"{seed} {text} ".encode() + self.speaker_vector(row).tobytes()
        number = hashlib.sha256(key).hexdigest()[:8]
        ending = "npy" if self.spec.vocoder is None else "wav"
        return f"{words}-{number}.{ending}" if words else f"{number}.{ending}"

    def take_warnings(self) -> list[str]:
        """Return the warnings since the last call, such as answers that did not end."""
        lines = super().take_warnings()
        if self.n_cut_answers:
            what = "ended at the greatest length (`task.longest_ratio`), not by itself"
            lines.append(f"{counted(self.n_cut_answers, 'answer')} {what}")
        self.n_cut_answers = 0
        return lines

    def sample(
        self, model: nn.Module, rows: Sequence[dict[str, Any]]
    ) -> list[tuple[str, str, str]]:
        """Return the text, the recording and the model's speech of each row, as `data:` URLs."""
        if self.spec.vocoder is None:
            return []
        sounds = [
            playable_url({"bytes": self._wav_file(spectrogram), "path": None}, PLAYED_SECONDS) or ""
            for spectrogram in self._spectrograms_for(model, rows)
        ]
        texts = [self.text_of(row) for row in rows]
        references = [self.thumbnail(row) or "" for row in rows]
        self.n_cut_answers = 0  # samples before training never end, which is no warning
        return list(zip(texts, references, sounds, strict=True))
