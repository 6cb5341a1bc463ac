"""Write down what is said in recordings, by Whisper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSpeechSeq2Seq
from transformers.modeling_outputs import BaseModelOutput

from lora_cli.adapters.attach import lora_layers
from lora_cli.data.media import described, media_value
from lora_cli.data.recordings import Samples, playable
from lora_cli.errors import counted
from lora_cli.metrics import MetricContext
from lora_cli.models.feature_extractor import features_of
from lora_cli.recipe.spec import GenerationSpec
from lora_cli.tasks.examples import IGNORED, MAIN, Batch, Example, Prediction
from lora_cli.tasks.generation.seq2seq_generation import Writing, decoder_inputs, write_heard
from lora_cli.tasks.generation.text_generation import base_generation_settings
from lora_cli.tasks.generation.writing_task import SAMPLE_NEW_TOKENS, losses_of_tokens
from lora_cli.tasks.speech.speech_rows import RecordedTask
from lora_cli.tasks.speech.spoken_languages import language_code
from lora_cli.tasks.speech.transcribed_recordings import propose_recordings
from lora_cli.tasks.speech.transcripts import BASIC, aligned, joined, normalised
from lora_cli.tasks.texts.padding import fill

HEARD = "heard"  # what the encoder makes of a recording, where it is kept
TRIAL_TARGET = 24  # tokens of the longer target that the model is tried on
# keys of Whisper's generation config that say what its tokens mean, and what the recipe says
FACTS_OF_WHISPER = {
    "alignment_heads", "forced_decoder_ids", "is_multilingual", "lang_to_id", "language",
    "max_initial_timestamp_index", "no_timestamps_token_id", "prev_sot_token_id",
    "return_timestamps", "task", "task_to_id",
}  # fmt: skip
LISTS_OF_TOKENS = ("begin_suppress_tokens", "suppress_tokens")


class SpeechRecognition(RecordedTask):
    """`task.type: speech_recognition`."""

    auto_class = AutoModelForSpeechSeq2Seq
    metric_channel = "nll"
    loss_definition = "mean cross-entropy per token of the transcripts, in nats"
    default_metrics = ("wer", "cer")
    joins_examples = True  # the parts of a long recording are one answer
    writes_answers = False
    propose = staticmethod(propose_recordings)

    # -------------------------------------------------------------------------- examples

    def prepare(self, example: Example, rng: np.random.Generator, training: bool) -> Example:
        """Return an example with what the model reads of its recording."""
        if HEARD in example:
            return example
        samples = self.samples(example["audio"])[example["start"] : example["stop"]]
        return {**example, "features": self._features(samples)}

    def _features(self, samples: Samples) -> Tensor:
        """Return what the model reads of a part of a recording (bands, frames)."""
        return torch.from_numpy(features_of(self.extractor, samples))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples as one batch, filled to the longest transcript.

        What fills a transcript is masked by its position: it is the token that ends one.
        """
        known = HEARD if HEARD in examples[0] else "features"
        rows = [example["labels"] if len(example["labels"]) else [IGNORED] for example in examples]
        labels = fill(rows, IGNORED, self.pad_multiple)
        trained = labels != IGNORED
        inputs = {known: torch.stack([example[known] for example in examples]), "labels": labels}
        targets = {
            "labels": labels,
            # found here, as the device would have to be waited for
            "positions": trained.flatten().nonzero().squeeze(-1),
        }
        cost = sum(self.cost(example) for example in examples)
        places = [example["row"] for example in examples]
        return Batch(inputs, targets, {MAIN: trained.sum(-1).float()}, cost, places)

    # ----------------------------------------------------------------------------- model

    def load_model(
        self, device: torch.device, dtype: torch.dtype | str | None = None
    ) -> tuple[nn.Module, list[str]]:
        """Return the base model, which writes the recipe's language by itself once it is merged.

        The answers here do so anyway: it is for those who use the merged model.
        """
        model, new = super().load_model(device, dtype)
        config: Any = getattr(model, "generation_config", None)
        if config is not None and self.has_languages:
            config.language = language_code(self.spec, self.recipe)
            config.task = self.spec.task or "transcribe"
            config.forced_decoder_ids = None  # how earlier versions of transformers said the same
        return model, new

    def frozen_parts(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return the encoder, where nothing in it is trained."""
        encoder = _frozen_encoder(model)
        return {} if encoder is None else {"encoder": encoder}

    def frozen_outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return what the encoder makes of each recording (B, T, D)."""
        return {HEARD: self._heard(model, batch.inputs["features"])}

    def _heard(self, model: nn.Module, features: Tensor) -> Tensor:
        """Return what the encoder makes of recordings (B, T, D).

        One that is not trained computes as in evaluation, also in training: what is kept of it
        and what is computed anew are then the same.
        """
        encoder, frozen = model.get_encoder(), _frozen_encoder(model)  # type: ignore[operator]
        features = _as_weights(encoder, features)
        if frozen is None:
            heard: Tensor = encoder(features).last_hidden_state
            return heard
        was_training = frozen.training
        frozen.eval()
        try:
            with torch.no_grad():
                kept: Tensor = frozen(features).last_hidden_state
        finally:
            frozen.train(was_training)
        return kept

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Return the model's output: its logits (B, T, V), and what its encoder made (B, S, D)."""
        return self._output(model, batch.inputs)

    def _output(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        tokens = decoder_inputs(model, inputs["labels"])
        if HEARD in inputs:
            heard = _as_weights(model, inputs[HEARD])
        elif _frozen_encoder(model) is not None:
            heard = self._heard(model, inputs["features"])
        else:
            features = _as_weights(model, inputs["features"])
            return model(input_features=features, decoder_input_ids=tokens, use_cache=False)
        kept = BaseModelOutput(last_hidden_state=heard)
        return model(encoder_outputs=kept, decoder_input_ids=tokens, use_cache=False)

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the scores of the transcripts' tokens (B, T, V), each given those before it."""
        scores: Tensor = self._output(model, inputs).logits
        return scores

    def losses(self, model: nn.Module, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Return the negative log-likelihood of each transcript, summed over its tokens."""
        labels, positions = batch.targets["labels"], batch.targets["positions"]
        return {MAIN: losses_of_tokens(output.logits, labels, positions)}

    def output_length(self, example: Example) -> int:
        """Return how many tokens of an example have scores."""
        return len(example["labels"])

    def trial_examples(self, length: int) -> tuple[Example, Example]:
        """Return a short and a longer transcript of noise, to try the decoder on."""
        generator = torch.Generator().manual_seed(0)
        shape = int(self.config.max_source_positions), int(self.config.d_model)
        text = " a warm and funny film" * TRIAL_TARGET
        words = self.tokenizer(text, add_special_tokens=False, verbose=False)
        found = []
        for n in (4, min(TRIAL_TARGET, self.positions - len(self.begin))):
            labels = [*self.begin, *words["input_ids"][:n]]
            heard = torch.randn(shape, generator=generator)
            about = {"row": 0, "start": 0, "stop": self.rate, "input_ids": labels}
            found.append({HEARD: heard, "labels": labels, **about})
        return found[0], found[1]

    def probe(self) -> dict[str, Tensor]:
        """Return random features and tokens, the same every time."""
        generator = torch.Generator().manual_seed(0)
        shape = (2, int(self.config.num_mel_bins), 2 * int(self.config.max_source_positions))
        features = torch.randn(shape, generator=generator).clamp(-1, 1)
        vocabulary = min(int(self.config.vocab_size), int(self.tokenizer.eos_token_id))
        tokens = torch.randint(0, vocabulary, (2, 12), generator=generator)
        tokens[:, 0] = int(self.config.decoder_start_token_id)
        return {"input_features": features, "decoder_input_ids": tokens}

    # --------------------------------------------------------------------------- answers

    @property
    def metric_context(self) -> MetricContext:
        """How texts are written before they are compared."""
        normalizer = BASIC if self.spec.normalizer == "basic" else ""
        return replace(super().metric_context, normalizer=normalizer)

    def check_metrics(self, channels: set[str]) -> None:
        """Let the model write answers, if a metric reads text."""
        self.writes_answers = "text" in channels

    def predictions(self, model: nn.Module, output: Any, batch: Batch) -> list[Prediction]:
        """Return what the model writes for each part of a recording, if a metric asks for it."""
        predictions = [Prediction(row, None, None) for row in batch.rows]
        asked = [i for i, row in enumerate(batch.rows) if self.is_answered(row)]
        if self.writes_answers and asked:
            options = self.recipe.evaluate.generation
            heard = output.encoder_last_hidden_state[asked]
            for i, text in zip(asked, self._transcripts(model, heard, options), strict=True):
                predictions[i].prediction = text
        return predictions

    def join(self, row: dict[str, Any], parts: Sequence[Prediction]) -> Prediction:
        """Return the parts of a recording as one answer."""
        wanted = str(row[self.spec.text_column])
        if not (self.writes_answers and self.is_answered(parts[0].row)):
            return Prediction(parts[0].row, None, wanted)
        said = joined([str(part.prediction) for part in parts])
        found = Prediction(parts[0].row, said, wanted)
        texts = [normalised(text, self.spec.normalizer) for text in (said, wanted)]
        found.metric_inputs["text"] = (texts[0], texts[1])
        found.details["words"] = aligned(texts[1], texts[0])
        return found

    def base_settings(self, model: nn.Module) -> dict[str, Any]:
        """Return what the base asks for, without what its tokens mean."""
        found = base_generation_settings(model)
        kept = {key: value for key, value in found.items() if key not in FACTS_OF_WHISPER}
        for key in LISTS_OF_TOKENS:
            if isinstance(kept.get(key), list):
                kept[key] = f"({counted(len(kept[key]), 'token')})"
        return kept

    def _transcripts(self, model: nn.Module, heard: Tensor, options: GenerationSpec) -> list[str]:
        """Return what the model writes for what its encoder made of recordings."""
        self.warn_of_base_settings(model)
        stops = self.stop_ids(model)
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        end = (int(self.tokenizer.eos_token_id),)
        how = Writing(
            self.tokenizer, self.begin, end, self.pad, self.padding, self.positions, stops,
            # languages, tasks and times are no words
            tuple(sorted(special - {*stops, *self.begin})),
        )  # fmt: skip
        answers = write_heard(model, heard, options, how)
        self.n_cut_answers += sum(not answer.has_ended for answer in answers)
        return [answer.text for answer in answers]

    @property
    def cut_answers_note(self) -> str:
        """What to say of transcripts that were not written to their end."""
        most = self.recipe.evaluate.generation.max_new_tokens
        if most >= self.positions:
            return f"ended where the decoder's {self.positions:,} tokens end"
        return f"ended at `evaluate.generation.max_new_tokens` ({most}), not by themselves"

    def parse_input(self, typed: str) -> dict[str, Any]:
        """Return a row of the path of a recording."""
        return {self.spec.audio_column: media_value(typed, Path.cwd())}

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Return what is said in each recording, however long it is."""
        return [[text] for text in self._said(model, rows, self.recipe.evaluate.generation)]

    def _said(
        self, model: nn.Module, rows: Sequence[dict[str, Any]], options: GenerationSpec
    ) -> list[str]:
        device = next(model.parameters()).device
        texts: list[list[str]] = [[] for _ in rows]
        parts = [(i, part) for i, row in enumerate(rows) for part in self._parts(row)]
        for start in range(0, len(parts), len(rows)):
            some = parts[start : start + len(rows)]
            features = torch.stack([self._features(part) for _, part in some]).to(device)
            heard = self._heard(model, features)
            for (i, _), text in zip(some, self._transcripts(model, heard, options), strict=True):
                texts[i].append(text)
        return [joined(said) for said in texts]

    def _parts(self, row: dict[str, Any]) -> list[Samples]:
        return self.parts_of(row[self.spec.audio_column])

    def sample(
        self, model: nn.Module, rows: Sequence[dict[str, Any]]
    ) -> list[tuple[str, str, str]]:
        """Return what the model writes for recordings, the most likely token every time."""
        tokens = min(SAMPLE_NEW_TOKENS, self.recipe.evaluate.generation.max_new_tokens)
        said = self._said(model, rows, GenerationSpec(max_new_tokens=tokens))
        names = [described(row[self.spec.audio_column]) for row in rows]
        wanted = [self.shown_reference(row) or "" for row in rows]
        return list(zip(names, wanted, said, strict=True))

    def thumbnail(self, row: dict[str, Any]) -> str | None:
        """Return a row's recording as a `data:` address that a page plays."""
        return playable(row[self.spec.audio_column], self.longest)


def _frozen_encoder(model: nn.Module) -> nn.Module | None:
    """Return the encoder of a model, if nothing in it is trained or adapted."""
    encoder: nn.Module = model.get_encoder()  # type: ignore[operator]  # transformers' own method
    trained = any(parameter.requires_grad for parameter in encoder.parameters())
    return None if trained or lora_layers(encoder) else encoder


def _as_weights(model: nn.Module, tensor: Tensor) -> Tensor:
    """Return a tensor in the precision of the weights that read it."""
    if torch.is_autocast_enabled(tensor.device.type):
        return tensor
    kinds = [(p.requires_grad, p.dtype) for p in model.parameters() if p.is_floating_point()]
    base = next((dtype for is_trained, dtype in kinds if not is_trained), kinds[0][1])
    return tensor.to(base)
