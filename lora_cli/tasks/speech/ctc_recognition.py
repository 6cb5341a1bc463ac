"""Speech recognition by CTC models: wav2vec2, HuBERT, WavLM and similar.

At each output step the model predicts a letter or the blank. Decoding collapses repeated letters,
then removes blanks. The loss is the negative log-likelihood of a transcript, summed over all its
alignments to the output steps (CTC, Graves et al. 2006).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor, nn
from transformers import (
    AutoModelForCTC,
    PretrainedConfig,
)

from lora_cli.data.recordings import Samples
from lora_cli.errors import counted
from lora_cli.recipe.spec import GenerationSpec
from lora_cli.tasks.examples import IGNORED, MAIN, Batch, Example, Prediction
from lora_cli.tasks.speech.ctc_output_length import count_frames, ctc_output_length
from lora_cli.tasks.speech.ctc_vocabulary import FRAMES, SPACE, CTCVocabulary
from lora_cli.tasks.speech.speech_rows import as_weights
from lora_cli.tasks.texts.padding import fill

MAX_SECONDS = 30.0  # per forward pass, as the cost of attention is quadratic
# The lengths of the recordings in trials. The short one has 25 output steps: after up to three
# adapter layers, which halve them, the last step's convolution still reaches into the padding.
TRIAL_SECONDS = (0.5155, 1.007)


class CTCRecognition(CTCVocabulary):
    """`task.type: speech_recognition` with a CTC model."""

    auto_class = AutoModelForCTC
    loss_definition = "mean negative log-likelihood (CTC) per letter of the transcripts, in nats"
    # the backward pass of CTC is not deterministic on a GPU, so the loss is computed on the CPU
    waits_for_device = True

    # -------------------------------------------------------------------------- lengths

    @property
    def max_seconds(self) -> float:
        """The number of seconds that the model hears in one forward pass."""
        return MAX_SECONDS

    def length_error(self, n_samples: int, labels: Sequence[int]) -> tuple[str, str] | None:
        """Return why a transcript is too long for a recording's output steps, and a hint; or None.

        Each letter needs a step, and so does the blank between two equal letters.
        """
        repeated = sum(a == b for a, b in itertools.pairwise(labels))
        n_needed, n_steps = max(len(labels) + repeated, 1), self._output_length_of(n_samples)
        if n_steps >= n_needed:
            return None
        what = f"its text of {counted(len(labels), 'letter')} needs {counted(n_needed, 'moment')}, "
        hint = "is it the text of another recording, or is the recording cut off?"
        return f"{what}and the model hears {n_steps} in so short a recording", hint

    def _output_length_of(self, n_samples: int) -> int:
        """Return the number of output steps for a recording."""
        length = count_frames(n_samples) if self.input_key == FRAMES else n_samples
        return ctc_output_length(self.config, length)

    # -------------------------------------------------------------------------- examples

    def prepare(self, example: Example, rng: np.random.Generator, training: bool) -> Example:
        """Return an example with the input features of its recording."""
        samples = self.samples(example["audio"])[example["start"] : example["stop"]]
        return {**example, **self._extract_features(samples)}

    def _extract_features(self, samples: Samples) -> Example:
        """Return a recording's input features, and how many of them are not padding.

        The features `samples` are samples (N,) or spectrogram frames (T, D). The extractor pads an
        odd number of frames before it stacks them, and masks the last stacked frame; the adapter's
        convolutions read that frame all the same.
        """
        extracted = self.extractor(samples, sampling_rate=self.rate, return_tensors="np")
        features = np.ascontiguousarray(extracted[self.input_key][0], dtype=np.float32)
        n_valid = (
            int(extracted["attention_mask"].sum()) if self.input_key == FRAMES else len(features)
        )
        return {"samples": torch.from_numpy(features), "n_valid": n_valid}

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Collate examples into a batch, zero-padded to the longest recording."""
        rows = [example["labels"] if len(example["labels"]) else [IGNORED] for example in examples]
        labels = fill(rows, IGNORED, 1)
        inputs = self._pad(examples)
        output_lengths = torch.tensor([self.output_length(example) for example in examples])
        targets = {"labels": labels, "output_lengths": output_lengths}
        items = {MAIN: (labels != IGNORED).sum(-1).float()}
        cost = sum(self.cost(example) for example in examples)
        return Batch(inputs, targets, items, cost, [example["row"] for example in examples])

    def _pad(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return the zero-padded inputs, their lengths, and the mask if the model reads one."""
        samples = [example["samples"] for example in examples]
        lengths = torch.tensor([len(row) for row in samples])
        values = nn.utils.rnn.pad_sequence(samples, batch_first=True)
        inputs = {self.input_key: values, "lengths": lengths}
        if self.extractor.return_attention_mask:
            n_valid = torch.tensor([[example["n_valid"]] for example in examples])
            inputs["attention_mask"] = (torch.arange(values.shape[1]) < n_valid).long()
        return inputs

    # ----------------------------------------------------------------------------- model

    def model_config(self) -> PretrainedConfig:
        """Return the model's configuration, with the size of a new vocabulary."""
        config: PretrainedConfig = super().model_config()
        if self.is_new:
            config.pad_token_id = self.config.pad_token_id
            config.vocab_size = self.config.vocab_size
        return config

    def arrange_head(self, model: nn.Module, missing: set[str]) -> None:
        """Initialise the output layer of a new vocabulary, even if the base has one of its size."""
        if not self.is_new:
            return
        for name, parameter in model.get_submodule("lm_head").named_parameters():
            if f"lm_head.{name}" not in missing:
                std = float(self.config.initializer_range) if parameter.ndim > 1 else 0.0
                nn.init.normal_(parameter, std=std)
                missing.add(f"lm_head.{name}")

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits of each output step (B, T, V)."""
        return self.logits(model, batch.inputs)

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the logits of each output step (B, T, V)."""
        inputs = {**inputs, self.input_key: as_weights(model, inputs[self.input_key])}
        lengths = inputs.pop("lengths")
        if self.padding.side != "none":
            scores: Tensor = model(**inputs).logits
            return scores
        # padding would change the outputs, so only recordings of equal length share a forward pass
        outputs: list[Tensor] = [torch.empty(0)] * len(lengths)
        for length in sorted(set(lengths.tolist())):
            rows = (lengths == length).nonzero().squeeze(-1)
            part = model(**{key: value[rows, :length] for key, value in inputs.items()}).logits
            for row, scores in zip(rows.tolist(), part, strict=True):
                outputs[row] = scores
        return nn.utils.rnn.pad_sequence(outputs, batch_first=True)

    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the negative log-likelihood of each transcript (B,); 0 if it is unknown."""
        labels, lengths = batch.targets["labels"].cpu(), batch.targets["output_lengths"].cpu()
        n_letters = (labels != IGNORED).sum(-1)
        log_probs = output.float().log_softmax(-1).transpose(0, 1).cpu()
        labels = labels.masked_fill(labels == IGNORED, self.blank)
        nlls = F.ctc_loss(log_probs, labels, lengths, n_letters, self.blank, reduction="none")
        return {MAIN: torch.where(n_letters > 0, nlls, 0.0).to(output.device)}

    def output_length(self, example: Example) -> int:
        """Return the number of output steps of an example."""
        return ctc_output_length(self.config, example["n_valid"])

    def trial_examples(self, length: int) -> tuple[Example, Example]:
        """Return a short and a longer recording of noise, to try the model on."""
        rng = np.random.default_rng(0)
        examples = []
        for seconds in TRIAL_SECONDS:
            n_samples = int(seconds * self.rate)
            noise = rng.standard_normal(n_samples).astype(np.float32)
            fields = {"row": 0, "start": 0, "stop": n_samples, "labels": [], "input_ids": [0]}
            features = self._extract_features(noise)
            # of the output's length, by which the trial tells the rows' lengths
            fields["input_ids"] = [0] * self.output_length(features)
            examples.append({**features, **fields})
        return examples[0], examples[1]

    def probe(self) -> dict[str, Tensor]:
        """Return the features of a second of noise (2, …), the same on every call."""
        generator = torch.Generator().manual_seed(0)
        shape = (2, self.rate)
        if self.input_key == FRAMES:
            shape = (2, count_frames(self.rate), int(self.config.feature_projection_input_dim))  # type: ignore[assignment]
        return {self.input_key: torch.randn(shape, generator=generator)}

    # --------------------------------------------------------------------------- answers

    def predictions(self, model: nn.Module, output: Tensor, batch: Batch) -> list[Prediction]:
        """Return the transcript of each part of a recording."""
        texts = self._decode(output, batch.targets["output_lengths"].tolist())
        return [Prediction(row, text, None) for row, text in zip(batch.rows, texts, strict=True)]

    def transcripts(
        self, model: nn.Module, parts: Sequence[Samples], options: GenerationSpec
    ) -> list[str]:
        """Transcribe recordings in one forward pass."""
        device = next(model.parameters()).device
        long_enough = [self._output_length_of(len(part)) > 0 for part in parts]
        if not all(long_enough):  # shorter parts yield no output step
            long_parts = [part for part, is_long in zip(parts, long_enough, strict=True) if is_long]
            texts = iter(self.transcripts(model, long_parts, options) if long_parts else [])
            return [next(texts) if is_long else "" for is_long in long_enough]
        examples = [self._extract_features(part) for part in parts]
        inputs = {key: value.to(device) for key, value in self._pad(examples).items()}
        return self._decode(self.logits(model, inputs), list(map(self.output_length, examples)))

    def _decode(self, scores: Tensor, lengths: Sequence[int]) -> list[str]:
        """Decode logits (B, T, V) greedily.

        Repeated letters are collapsed here: with `skip_special_tokens`, the tokenizer would remove
        blanks before it collapses repetitions, and lose an L of `HELLO`.
        """
        tokenizer = self.tokenizer
        separators = {getattr(tokenizer, "word_delimiter_token", None), SPACE}  # between words
        vocabulary = tokenizer.get_vocab()
        skipped = {self.blank, *tokenizer.all_special_ids} - {
            vocabulary.get(name) for name in separators
        }
        texts = []
        for row, n in zip(scores.argmax(-1).tolist(), lengths, strict=True):
            letters = [letter for letter, _ in itertools.groupby(row[:n]) if letter not in skipped]
            texts.append(str(tokenizer.decode(letters, group_tokens=False)).strip())
        return texts
