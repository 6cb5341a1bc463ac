"""Write down what is said in recordings by CTC: wav2vec2, HuBERT, WavLM and their kin.

For each moment the model says which letter it hears, or none (the blank). Repeated letters count
once, and blanks are left out. The loss of a transcript is the negative log-likelihood of all ways
to say it in the moments that there are (Graves et al. 2006).
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
from lora_cli.tasks.speech.ctc_vocabulary import FRAMES, SPACE, CTCVocabulary
from lora_cli.tasks.speech.moments import frames_in, moments_of
from lora_cli.tasks.speech.speech_rows import as_weights
from lora_cli.tasks.texts.padding import fill

LONGEST = 30.0  # seconds that are computed at once: attention costs the square of them
# Of the recordings that the model is tried on. The short one has 25 moments: halved by an adapter
# once, twice or three times, the last one still hears what stands behind it.
TRIAL_SECONDS = (0.5155, 1.007)


class CTCRecognition(CTCVocabulary):
    """`task.type: speech_recognition`, by a model that says a letter for each moment."""

    auto_class = AutoModelForCTC
    loss_definition = "mean negative log-likelihood (CTC) per letter of the transcripts, in nats"
    # on a GPU the backward of CTC gives other bits each time, so it is computed on the CPU
    waits_for_device = True

    # -------------------------------------------------------------------------- lengths

    @property
    def longest(self) -> float:
        """How many seconds are computed at once."""
        return LONGEST

    def length_error(self, n_samples: int, labels: Sequence[int]) -> tuple[str, str] | None:
        """Return why a transcript is too long: it has more letters than the recording moments.

        Between two equal letters there has to be a blank.
        """
        repeated = sum(a == b for a, b in itertools.pairwise(labels))
        needed, moments = max(len(labels) + repeated, 1), self._moments_in(n_samples)
        if moments >= needed:
            return None
        what = f"its text of {counted(len(labels), 'letter')} needs {counted(needed, 'moment')}, "
        hint = "is it the text of another recording, or is the recording cut off?"
        return f"{what}and the model hears {moments} in so short a recording", hint

    def _moments_in(self, n_samples: int) -> int:
        """Return for how many moments the model says what it hears in a recording."""
        read = frames_in(n_samples) if self.input_key == FRAMES else n_samples
        return moments_of(self.config, read)

    # -------------------------------------------------------------------------- examples

    def prepare(self, example: Example, rng: np.random.Generator, training: bool) -> Example:
        """Return an example with what the model reads of its recording."""
        samples = self.samples(example["audio"])[example["start"] : example["stop"]]
        return {**example, **self._read(samples)}

    def _read(self, samples: Samples) -> Example:
        """Return a recording as the model reads it, and how much of that is heard.

        `samples` are samples (N,), or frames (T, D), of which the last is filled up, and masked,
        if there is half of it. (Convolutions behind the model read it all the same.)
        """
        found = self.extractor(samples, sampling_rate=self.rate, return_tensors="np")
        read = np.ascontiguousarray(found[self.input_key][0], dtype=np.float32)
        n_heard = int(found["attention_mask"].sum()) if self.input_key == FRAMES else len(read)
        return {"samples": torch.from_numpy(read), "n_heard": n_heard}

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples as one batch, filled with zeros to the longest recording."""
        rows = [one["labels"] if len(one["labels"]) else [IGNORED] for one in examples]
        labels = fill(rows, IGNORED, 1)
        inputs = self._filled(examples)
        moments = torch.tensor([self.output_length(example) for example in examples])
        targets = {"labels": labels, "moments": moments}
        items = {MAIN: (labels != IGNORED).sum(-1).float()}
        cost = sum(self.cost(example) for example in examples)
        return Batch(inputs, targets, items, cost, [one["row"] for one in examples])

    def _filled(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return recordings as rows, filled with zeros, and the lengths that they had."""
        samples = [one["samples"] for one in examples]
        lengths = torch.tensor([len(one) for one in samples])
        values = nn.utils.rnn.pad_sequence(samples, batch_first=True)
        inputs = {self.input_key: values, "lengths": lengths}
        if self.extractor.return_attention_mask:
            n_heard = torch.tensor([[one["n_heard"]] for one in examples])
            inputs["attention_mask"] = (torch.arange(values.shape[1]) < n_heard).long()
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
        """Draw the output layer anew, also where the base has one of the same size."""
        if not self.is_new:
            return
        for name, parameter in model.get_submodule("lm_head").named_parameters():
            if f"lm_head.{name}" not in missing:
                spread = float(self.config.initializer_range) if parameter.ndim > 1 else 0.0
                nn.init.normal_(parameter, std=spread)
                missing.add(f"lm_head.{name}")

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scores of the letters at each moment (B, T, V)."""
        return self.logits(model, batch.inputs)

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the same."""
        inputs = {**inputs, self.input_key: as_weights(model, inputs[self.input_key])}
        lengths = inputs.pop("lengths")
        if self.padding.side != "none":
            scores: Tensor = model(**inputs).logits
            return scores
        # filling changes what the model hears, so those of the same length are computed together
        found: list[Tensor] = [torch.empty(0)] * len(lengths)
        for length in sorted(set(lengths.tolist())):
            rows = (lengths == length).nonzero().squeeze(-1)
            part = model(**{key: value[rows, :length] for key, value in inputs.items()}).logits
            for row, scores in zip(rows.tolist(), part, strict=True):
                found[row] = scores
        return nn.utils.rnn.pad_sequence(found, batch_first=True)

    def losses(self, model: nn.Module, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the negative log-likelihood of each transcript; 0 where it is not known."""
        labels, moments = batch.targets["labels"].cpu(), batch.targets["moments"].cpu()
        n_letters = (labels != IGNORED).sum(-1)
        chances = output.float().log_softmax(-1).transpose(0, 1).cpu()
        labels = labels.masked_fill(labels == IGNORED, self.blank)
        found = F.ctc_loss(chances, labels, moments, n_letters, self.blank, reduction="none")
        return {MAIN: torch.where(n_letters > 0, found, 0.0).to(output.device)}

    def output_length(self, example: Example) -> int:
        """Return for how many moments of an example there are scores."""
        return moments_of(self.config, example["n_heard"])

    def trial_examples(self, length: int) -> tuple[Example, Example]:
        """Return a short and a longer recording of noise."""
        rng = np.random.default_rng(0)
        found = []
        for seconds in TRIAL_SECONDS:
            n_samples = int(seconds * self.rate)
            noise = rng.standard_normal(n_samples).astype(np.float32)
            about = {"row": 0, "start": 0, "stop": n_samples, "labels": [], "input_ids": [0]}
            read = self._read(noise)
            # as long as the recording: rows of several lengths are what is tried
            about["input_ids"] = [0] * self.output_length(read)
            found.append({**read, **about})
        return found[0], found[1]

    def probe(self) -> dict[str, Tensor]:
        """Return a second of noise, the same every time."""
        generator = torch.Generator().manual_seed(0)
        shape = (2, self.rate)
        if self.input_key == FRAMES:
            shape = (2, frames_in(self.rate), int(self.config.feature_projection_input_dim))  # type: ignore[assignment]
        return {self.input_key: torch.randn(shape, generator=generator)}

    # --------------------------------------------------------------------------- answers

    def predictions(self, model: nn.Module, output: Tensor, batch: Batch) -> list[Prediction]:
        """Return what the model says in each part of a recording."""
        texts = self._texts(output, batch.targets["moments"].tolist())
        return [Prediction(row, text, None) for row, text in zip(batch.rows, texts, strict=True)]

    def transcripts(
        self, model: nn.Module, parts: Sequence[Samples], options: GenerationSpec
    ) -> list[str]:
        """Return what a model writes for recordings that are computed at once."""
        device = next(model.parameters()).device
        long_enough = [self._moments_in(len(part)) > 0 for part in parts]
        if not all(long_enough):  # in the others there is nothing to be heard
            kept = [part for part, is_long in zip(parts, long_enough, strict=True) if is_long]
            texts = iter(self.transcripts(model, kept, options) if kept else [])
            return [next(texts) if is_long else "" for is_long in long_enough]
        examples = [self._read(part) for part in parts]
        inputs = {key: value.to(device) for key, value in self._filled(examples).items()}
        return self._texts(self.logits(model, inputs), list(map(self.output_length, examples)))

    def _texts(self, scores: Tensor, moments: Sequence[int]) -> list[str]:
        """Return what the most likely letter of each moment says, of rows of (T, V) each.

        Repeated letters are joined here: asked to skip special tokens, the tokenizer would leave
        out the blanks first, and of the two letters of `HELLO` that one divides keep one.
        """
        tokenizer = self.tokenizer
        between = {getattr(tokenizer, "word_delimiter_token", None), SPACE}  # words
        known = tokenizer.get_vocab()
        silent = {self.blank, *tokenizer.all_special_ids} - {known.get(name) for name in between}
        texts = []
        for row, n in zip(scores.argmax(-1).tolist(), moments, strict=True):
            letters = [letter for letter, _ in itertools.groupby(row[:n]) if letter not in silent]
            texts.append(str(tokenizer.decode(letters, group_tokens=False)).strip())
        return texts
