"""Transcribes recordings with Whisper; for models with CTC, see `speech/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSpeechSeq2Seq
from transformers.modeling_outputs import BaseModelOutput

from lora_cli.adapters.attach import lora_layers
from lora_cli.data.recordings import Samples
from lora_cli.errors import LoraError, counted
from lora_cli.models.feature_extractor import features_of, require_whisper_features
from lora_cli.recipe import Recipe
from lora_cli.recipe.spec import GenerationSpec
from lora_cli.tasks.contract import Task
from lora_cli.tasks.examples import IGNORED, MAIN, Batch, Example, Prediction
from lora_cli.tasks.generation.seq2seq_generation import (
    DecodingSetup,
    decoder_inputs,
    generate_from_states,
)
from lora_cli.tasks.generation.text_generation import base_generation_settings
from lora_cli.tasks.generation.writing_task import WritingTask, sum_token_losses
from lora_cli.tasks.speech.ctc_recognition import CTCRecognition
from lora_cli.tasks.speech.decoders import decoder_of, require_decoder
from lora_cli.tasks.speech.speech_rows import RecordingTask, as_weights
from lora_cli.tasks.speech.spoken_languages import is_multilingual, language_code, prompt_tokens
from lora_cli.tasks.speech.transcript_proposals import propose_recordings
from lora_cli.tasks.speech.transcripts import whisper_transcript
from lora_cli.tasks.texts.padding import fill

ENCODER_STATES = "heard"  # key of the cached outputs of the encoder
TRIAL_TARGET = 24  # tokens of the longer target on which the model is tried
# keys of Whisper's generation config that describe its tokens, or that the recipe sets
WHISPER_KEYS = {
    "alignment_heads", "forced_decoder_ids", "is_multilingual", "lang_to_id", "language",
    "max_initial_timestamp_index", "no_timestamps_token_id", "prev_sot_token_id",
    "return_timestamps", "task", "task_to_id",
}  # fmt: skip
TOKEN_LIST_KEYS = ("begin_suppress_tokens", "suppress_tokens")


class SpeechRecognition(RecordingTask, WritingTask):
    """`task.type: speech_recognition`, with a decoder that generates one token at a time."""

    auto_class = AutoModelForSpeechSeq2Seq
    other_auto_classes = (CTCRecognition.auto_class,)
    loss_definition = "mean cross-entropy per token of the transcripts, in nats"
    prompt_name = "recording"
    propose = staticmethod(propose_recordings)

    @classmethod
    def for_base(cls, recipe: Recipe) -> type[Task]:
        """Return the class of the task for the recipe's base: Whisper, or a model with CTC."""
        return CTCRecognition if decoder_of(recipe) == "ctc" else cls

    # --------------------------------------------------------------------- the processor

    def load_processor(self) -> None:
        """Load the tokenizer, the feature extractor and the configuration."""
        require_decoder(self.recipe, "attention")
        if self.spec.letters is not None:
            what = f"`{self.recipe.model.name}` writes tokens of its own, and takes no `letters`"
            raise LoraError(what, self.recipe.at("task.letters"), "leave it out")
        super().load_processor()
        require_whisper_features(self.extractor, self.config, self.recipe)
        self.pad = int(self.config.pad_token_id)
        self.has_languages = is_multilingual(self.recipe, int(self.config.vocab_size))
        self.begin = prompt_tokens(self.spec, self.tokenizer, self.has_languages, self.recipe)

    def cache_key(self) -> list[str]:
        """Return everything that an encoded row depends on, besides the row itself."""
        return [*super().cache_key(), str(self.begin)]

    @property
    def positions(self) -> int:
        """The number of positions of the decoder."""
        return int(self.config.max_target_positions)

    @property
    def max_seconds(self) -> float:
        """The length of the encoder's input, in seconds."""
        return int(self.extractor.n_samples) / self.rate

    # -------------------------------------------------------------------------- examples

    def tokens_of(self, text: str) -> list[int]:
        """Return the tokens of a transcript, after the prompt tokens and before the end token."""
        ids = self.text_tokenizer(whisper_transcript(text), add_special_tokens=False, verbose=False)
        return [*self.begin, *ids["input_ids"], int(self.tokenizer.eos_token_id)]

    def length_error(self, n_samples: int, labels: Sequence[int]) -> tuple[str, str] | None:
        """Return an error and a hint if a transcript has more tokens than the decoder positions."""
        if len(labels) <= self.positions:
            return None
        what = f"its text has {counted(len(labels), 'token')}, and the model writes "
        hint = "divide the recording with its text, or is it the text of another one?"
        return f"{what}{self.positions} at most", hint

    def prepare(self, example: Example, rng: np.random.Generator, training: bool) -> Example:
        """Return an example with the features of its recording, unless its states are cached."""
        if ENCODER_STATES in example:
            return example
        samples = self.samples(example["audio"])[example["start"] : example["stop"]]
        return {**example, "features": self._features(samples)}

    def _features(self, samples: Samples) -> Tensor:
        """Return the features of a part of a recording (bands, frames)."""
        return torch.from_numpy(features_of(self.extractor, samples))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples as one batch, padded to the longest transcript.

        Padding is masked by its position, since its token also ends transcripts.
        """
        known = ENCODER_STATES if ENCODER_STATES in examples[0] else "features"
        rows = [example["labels"] if len(example["labels"]) else [IGNORED] for example in examples]
        labels = fill(rows, IGNORED, self.pad_multiple)
        trained = labels != IGNORED
        inputs = {known: torch.stack([example[known] for example in examples]), "labels": labels}
        targets = {
            "labels": labels,
            # computed here, since `nonzero` on a GPU would make the host wait
            "positions": trained.flatten().nonzero().squeeze(-1),
        }
        cost = sum(self.cost(example) for example in examples)
        places = [example["row"] for example in examples]
        return Batch(inputs, targets, {MAIN: trained.sum(-1).float()}, cost, places)

    # ----------------------------------------------------------------------------- model

    def load_model(
        self, device: torch.device, dtype: torch.dtype | str | None = None
    ) -> tuple[nn.Module, list[str]]:
        """Return the base model, with the recipe's language in its generation config.

        Answers here use that language anyway; this is for users of the merged model.
        """
        model, new = super().load_model(device, dtype)
        config: Any = getattr(model, "generation_config", None)
        if config is not None and self.has_languages:
            config.language = language_code(self.spec, self.recipe)
            config.task = self.spec.task or "transcribe"
            config.forced_decoder_ids = None  # the same setting in earlier versions
        return model, new

    def frozen_parts(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return the encoder if nothing in it is trained, so its outputs can be cached."""
        encoder = _frozen_encoder(model)
        return {} if encoder is None else {"encoder": encoder}

    def frozen_outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the encoder's outputs for each recording (B, T, D)."""
        return {ENCODER_STATES: self._encode_recordings(model, batch.inputs["features"])}

    def _encode_recordings(self, model: nn.Module, features: Tensor) -> Tensor:
        """Return the encoder's outputs (B, T, D) for features (B, bands, frames).

        An encoder that is not trained runs in eval mode even in training, so that cached outputs
        equal computed ones.
        """
        encoder, frozen = model.get_encoder(), _frozen_encoder(model)  # type: ignore[operator]
        features = as_weights(encoder, features)
        if frozen is None:
            states: Tensor = encoder(features).last_hidden_state
            return states
        was_training = frozen.training
        frozen.eval()
        try:
            with torch.no_grad():
                kept: Tensor = frozen(features).last_hidden_state
        finally:
            frozen.train(was_training)
        return kept

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Return the model's output, with logits (B, T, V) and encoder outputs (B, S, D)."""
        return self._output(model, batch.inputs)

    def _output(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
        tokens = decoder_inputs(model, inputs["labels"])
        if ENCODER_STATES in inputs:
            states = as_weights(model, inputs[ENCODER_STATES])
        elif _frozen_encoder(model) is not None:
            states = self._encode_recordings(model, inputs["features"])
        else:
            features = as_weights(model, inputs["features"])
            return model(input_features=features, decoder_input_ids=tokens, use_cache=False)
        kept = BaseModelOutput(last_hidden_state=states)
        return model(encoder_outputs=kept, decoder_input_ids=tokens, use_cache=False)

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the logits of the transcripts' tokens (B, T, V)."""
        scores: Tensor = self._output(model, inputs).logits
        return scores

    def losses(self, model: nn.Module, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Return the negative log-likelihood of each transcript (B,), summed over its tokens."""
        labels, positions = batch.targets["labels"], batch.targets["positions"]
        return {MAIN: sum_token_losses(output.logits, labels, positions)}

    def output_length(self, example: Example) -> int:
        """Return the number of tokens of an example that have logits."""
        return len(example["labels"])

    def trial_examples(self, length: int) -> tuple[Example, Example]:
        """Return a short and a longer transcript with random encoder outputs, for a trial."""
        generator = torch.Generator().manual_seed(0)
        shape = int(self.config.max_source_positions), int(self.config.d_model)
        text = " a warm and funny film" * TRIAL_TARGET
        words = self.tokenizer(text, add_special_tokens=False, verbose=False)
        found = []
        for n in (4, min(TRIAL_TARGET, self.positions - len(self.begin))):
            labels = [*self.begin, *words["input_ids"][:n]]
            states = torch.randn(shape, generator=generator)
            about = {"row": 0, "start": 0, "stop": self.rate, "input_ids": labels}
            found.append({ENCODER_STATES: states, "labels": labels, **about})
        return found[0], found[1]

    def probe(self) -> dict[str, Tensor]:
        """Return fixed random features and tokens."""
        generator = torch.Generator().manual_seed(0)
        shape = (2, int(self.config.num_mel_bins), 2 * int(self.config.max_source_positions))
        features = torch.randn(shape, generator=generator).clamp(-1, 1)
        vocabulary = min(int(self.config.vocab_size), int(self.tokenizer.eos_token_id))
        tokens = torch.randint(vocabulary, (2, 12), generator=generator)
        tokens[:, 0] = int(self.config.decoder_start_token_id)
        return {"input_features": features, "decoder_input_ids": tokens}

    # --------------------------------------------------------------------------- answers

    def predictions(self, model: nn.Module, output: Any, batch: Batch) -> list[Prediction]:
        """Return a prediction for each part of a recording, with its transcript if needed."""
        predictions = [Prediction(row, None, None) for row in batch.rows]
        answered = [i for i, row in enumerate(batch.rows) if self.is_answered(row)]
        if self.writes_answers and answered:
            options = self.recipe.evaluate.generation
            states = output.encoder_last_hidden_state[answered]
            for i, text in zip(
                answered, self._generate_transcripts(model, states, options), strict=True
            ):
                predictions[i].prediction = text
        return predictions

    def base_settings(self, model: nn.Module) -> dict[str, Any]:
        """Return the settings in the base's generation config that are not used."""
        found = base_generation_settings(model)
        kept = {key: value for key, value in found.items() if key not in WHISPER_KEYS}
        for key in TOKEN_LIST_KEYS:
            if isinstance(kept.get(key), list):
                kept[key] = f"({counted(len(kept[key]), 'token')})"
        return kept

    def _generate_transcripts(
        self, model: nn.Module, states: Tensor, options: GenerationSpec
    ) -> list[str]:
        """Return the transcripts that the decoder generates for encoder outputs (B, T, D)."""
        self.warn_of_base_settings(model)
        stops = self.stop_ids(model)
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        end = (int(self.tokenizer.eos_token_id),)
        setup = DecodingSetup(
            self.tokenizer, self.begin, end, self.pad, self.padding, self.positions, stops,
            # tokens of languages, tasks and timestamps are not part of a transcript
            tuple(sorted(special - {*stops, *self.begin})),
        )  # fmt: skip
        answers = generate_from_states(model, states, options, setup)
        self.n_cut_answers += sum(not answer.has_ended for answer in answers)
        return [answer.text for answer in answers]

    @property
    def cut_answers_note(self) -> str:
        """The warning about transcripts that did not end by themselves."""
        most = self.recipe.evaluate.generation.max_new_tokens
        if most >= self.positions:
            return f"ended where the decoder's {self.positions:,} tokens end"
        return f"ended at `evaluate.generation.max_new_tokens` ({most}), not by themselves"

    def transcripts(
        self, model: nn.Module, parts: Sequence[Samples], options: GenerationSpec
    ) -> list[str]:
        """Return the transcripts of recordings, each no longer than the encoder's input."""
        device = next(model.parameters()).device
        features = torch.stack([self._features(part) for part in parts]).to(device)
        return self._generate_transcripts(model, self._encode_recordings(model, features), options)


def _frozen_encoder(model: nn.Module) -> nn.Module | None:
    """Return the encoder of a model, if nothing in it is trained or adapted."""
    encoder: nn.Module = model.get_encoder()  # type: ignore[operator]  # transformers' own method
    trained = any(parameter.requires_grad for parameter in encoder.parameters())
    return None if trained or lora_layers(encoder) else encoder
