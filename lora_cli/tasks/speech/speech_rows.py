"""What a recording and its transcript are: columns, parts of long recordings, examples, answers.

`SpeechRecognition` and `CTCRecognition` add batches, the loss, and how a model writes.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_cli.data.file_formats import text_error
from lora_cli.data.load_rows import Rows
from lora_cli.data.media import described, media_error, media_hash, media_value
from lora_cli.data.recordings import (
    LongAudio,
    Samples,
    divide,
    is_silent,
    playable,
    read_recording,
    recording_facts,
    require_audio_packages,
)
from lora_cli.errors import LoraError, counted, warn
from lora_cli.metrics import MetricContext
from lora_cli.models.feature_extractor import load_feature_extractor
from lora_cli.models.image_processor import processor_hash
from lora_cli.recipe import Recipe, SpeechRecognitionSpec
from lora_cli.recipe.spec import GenerationSpec
from lora_cli.tasks.examples import Encoded, Example, Field, Prediction
from lora_cli.tasks.generation.writing_task import SAMPLE_NEW_TOKENS, keep_all_layers, layer_drop_of
from lora_cli.tasks.speech.odd_recordings import (
    ODD_FEATURES,
    odd_facts,
    odd_rows,
    recording_error,
    still_whole,
)
from lora_cli.tasks.speech.transcripts import BASIC, aligned, has_vowel_marks, joined, normalised
from lora_cli.tasks.texts.marked_tokens import marked
from lora_cli.tasks.texts.text_task import TextTask

ENCODING = 3  # of rows into examples; a change of it makes what is kept on the disk useless
AT_ONCE = " at once"
DECODED = 4  # long recordings whose samples stay in memory: their parts are read one by one


class RecordedTask(TextTask):
    """A task whose rows are a recording, and what is said in it."""

    spec: SpeechRecognitionSpec  # type: ignore[assignment]  # its length is that of a recording
    unit = "second"
    input_name = "recording"
    answer_hint = "name another recording"
    length_key = "model.name"
    metric_channel = "nll"
    default_metrics = ("wer", "cer")
    joins_examples = True  # the parts of a long recording are one answer
    writes_answers = False
    can_fill_left = False

    def __init__(self, recipe: Recipe, spec: SpeechRecognitionSpec) -> None:
        super().__init__(recipe)
        self.spec = spec
        self.extractor: Any

    @property
    @abstractmethod
    def longest(self) -> float:
        """How many seconds the model hears at once."""

    @abstractmethod
    def tokens_of(self, text: str) -> list[int]:
        """Return the tokens that a transcript is trained as."""

    @abstractmethod
    def length_error(self, n_samples: int, labels: Sequence[int]) -> tuple[str, str] | None:
        """Return why a transcript is too long for the model, and what to do about it; or None."""

    @abstractmethod
    def transcripts(
        self, model: nn.Module, parts: Sequence[Samples], options: GenerationSpec
    ) -> list[str]:
        """Return what a model writes for recordings that it hears at once."""

    # --------------------------------------------------------------------- the processor

    def load_processor(self) -> None:
        """Load the tokenizer, the feature extractor and the configuration."""
        require_audio_packages()
        super().load_processor()
        self.extractor = load_feature_extractor(self.recipe)
        if dropped := layer_drop_of(self.config):
            self.notes.append(dropped)
        if getattr(self.config, "apply_spec_augment", False):
            self.notes.append(
                "`apply_spec_augment` of the model is set to false: nothing of a recording is "
                "masked in training"
            )

    def model_config(self) -> Any:
        """Return the model's configuration, by which training leaves out and masks nothing."""
        config = keep_all_layers(super().model_config())
        config.apply_spec_augment = False  # it draws from numpy's global generator
        return config

    def save_processor(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Write the tokenizer and the feature extractor into a folder."""
        super().save_processor(folder, facts)
        self.extractor.save_pretrained(folder)

    @property
    def base_facts(self) -> dict[str, Any]:
        """What of the base decides the computation besides its tensors."""
        return {**super().base_facts, "processor": processor_hash(self.extractor)}

    def cache_key(self) -> list[str]:
        """Return what an encoded row depends on besides the row."""
        return [*super().cache_key(), f"recordings {ENCODING}", processor_hash(self.extractor)]

    @property
    def rate(self) -> int:
        """Samples a second that the model reads."""
        return int(self.extractor.sampling_rate)

    @property
    def max_length(self) -> int:  # type: ignore[override]
        """The same, as a whole number."""
        return int(self.longest)

    @property
    def length_note(self) -> str | None:
        """Nothing: the length is the model's own."""
        return None

    @property
    def longer_hint(self) -> str:
        """What to do where recordings are too long."""
        return "divide the recording, and its text with it"

    # ------------------------------------------------------------------------------ rows

    def fields(self) -> list[Field]:
        """Return the columns of the recording and of its transcript."""
        return [
            Field("task.audio_column", self.spec.audio_column, "input", "audio"),
            Field("task.text_column", self.spec.text_column, "target", "text"),
        ]

    def input_error(self, row: dict[str, Any]) -> str:
        """Return why a recording cannot be read, or nothing; it is decoded."""
        return recording_error(row, self.spec.audio_column)

    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the transcript, or nothing."""
        return text_error(row, [self.spec.text_column])

    def skip_reason(self, row: dict[str, Any], split: str) -> str:
        """Return why a recording is left out: it is longer than the model hears at once."""
        if split != "train" and self.spec.long_audio != "drop":
            return ""
        if media_error(row, [self.spec.audio_column]):
            return ""  # which is reported as an error
        seconds = recording_facts(row[self.spec.audio_column]).seconds
        longest = self._longest_known
        if seconds <= longest:
            return ""
        return f"it lasts {seconds:.1f} s, and the model hears {longest:g} s{AT_ONCE}"

    @property
    def _longest_known(self) -> float:
        """How many seconds the model hears at once; 30, as all Whisper models, before it is read.

        Rows are also checked where the processor could not be loaded.
        """
        return self.longest if hasattr(self, "extractor") else 30.0

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Say so where the normaliser of the metrics would take vowels for symbols."""
        super().learn_from(splits)
        if self.spec.normalizer == "none":
            return
        for rows in splits.values():
            for i, row in enumerate(rows):
                if has_vowel_marks(str(row[self.spec.text_column])):
                    warn(
                        f"the text of {rows.place(i)} has vowels or accents that are marks of "
                        "their own, which `task.normalizer: basic` replaces by spaces before words "
                        "are counted; `none` keeps them"
                    )
                    return

    def more_text_columns(self) -> list[str]:
        """Return the column of what the model learns to write."""
        return [self.spec.text_column]

    def control_token_in(self, row: dict[str, Any]) -> str | None:
        """Return the first control token that is spelled out in a transcript."""
        return self.control_tokens.first_in([row.get(self.spec.text_column)])

    def parts_of(self, value: dict[str, Any]) -> list[Samples]:
        """Return the parts of a recording that the model hears one after the other.

        Parts in which nothing at all is to be heard are left out: of silence, Whisper writes words.
        """
        samples = self.samples(value)
        return [samples[start:stop] for start, stop in self._places(samples)]

    def _places(self, samples: Samples) -> list[tuple[int, int]]:
        how: LongAudio = "windows" if self.spec.long_audio == "windows" else "silence"
        parts = divide(samples, self.rate, self.longest, how)
        return [part for part in parts if len(parts) == 1 or not is_silent(samples[slice(*part)])]

    def samples(self, value: dict[str, Any]) -> Samples:
        """Return the samples of a recording at the model's rate.

        Raises:
            LoraError: If it cannot be read any more.
        """
        with still_whole(value):
            if recording_facts(value).seconds <= self.longest:
                return read_recording(value, self.rate)[: int(self.longest * self.rate)]
            return _long_recording(_Same(value), self.rate)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return an example for each part of each recording; only whole ones have a target."""
        return [self._examples(row) for row in rows]

    def _examples(self, row: dict[str, Any]) -> list[Example]:
        """Return the examples of a recording.

        Raises:
            LoraError: If its transcript is too long.
        """
        value = row[self.spec.audio_column]
        facts = recording_facts(value)
        about = odd_facts(facts)
        length = math.ceil(facts.seconds * self.rate)
        if facts.seconds <= self.longest:
            labels = self.tokens_of(str(row[self.spec.text_column]))
            if (error := self.length_error(length, labels)) is not None:
                raise LoraError(error[0], hint=error[1])
            return [{"audio": value, "start": 0, "stop": length, "labels": labels, **about}]
        places = self._places(self.samples(value))
        full = math.ceil(facts.seconds)
        return [
            {"audio": value, "start": start, "stop": stop, "labels": [], "full_length": full}
            | about
            for start, stop in places
        ]

    def features(self) -> dict[str, str]:
        """Return the types of an example."""
        places = {"start": "int32", "stop": "int32"}
        return {"audio": "media", "labels": "list<int32>", **ODD_FEATURES, **places}

    def cost(self, example: Example) -> int:
        """Return the seconds of a recording, rounded up."""
        n_samples: int = example["stop"] - example["start"]
        return max(math.ceil(n_samples / self.rate), 1)

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Reject tokens that the model's embedding does not have."""
        self.require_known_tokens([max(e["labels"], default=0) for e in examples])

    def cut_note(self, split: Encoded) -> str | None:
        """Return how many recordings of a split are too long, and what is made of them."""
        notes = []
        left_out = sum(reason.endswith(AT_ONCE) for reason in split.rows.skipped)
        if left_out:
            verb = "is" if left_out == 1 else "are"
            recordings = counted(left_out, "recording")
            notes.append(f"{recordings} of more than {self.max_length} s {verb} left out")
        divided = split.full_lengths > self.max_length
        if divided.any():
            notes.append(self._division(split, divided))
        return ", ".join(notes) or None

    def _division(self, split: Encoded, divided: NDArray[np.bool_]) -> str:
        """Return into how many parts recordings are divided; `divided` says it of each example."""
        rows = len(np.unique(split.examples.data.column("row").to_numpy()[divided]))
        where = "into equal parts" if self.spec.long_audio == "windows" else "where it is quietest"
        parts = counted(int(divided.sum()), "part")
        verb = "is" if rows == 1 else "are"
        return (
            f"{counted(rows, 'recording')} of more than {self.max_length} s {verb} divided "
            f"{where}: {parts}, whose texts are joined, and which the loss leaves out"
        )

    def unknown_input(self, name: str, rows: Rows, examples: Any) -> tuple[float, str | None]:
        """Return a warning of recordings that are clipped, far too loud, or of several texts."""
        return 0.0, odd_rows(name, rows, examples, self.spec.audio_column, self.spec.text_column)

    def trained_share(self, split: Encoded) -> None:
        """Return None: what is trained is tokens, and what is counted seconds."""

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return how long a recording is, and its transcript."""
        labels = list(example["labels"])
        facts = recording_facts(example["audio"])
        about = f"{described(example['audio'])}: {facts.seconds:.2f} s at {facts.rate:,} Hz, "
        about += counted(facts.channels, "channel")
        text = self.marked(labels, colour)
        return [f"text {counted(len(labels), 'token')}"], f"{about}\n{text}"

    def marked(self, labels: Sequence[int], colour: bool) -> str:
        """Return a transcript as the model learns it, marked as what is trained."""
        return marked(self.tokenizer, labels, [True] * len(labels), colour)

    def shown_reference(self, row: dict[str, Any]) -> str | None:
        """Return the transcript of a row."""
        return str(row.get(self.spec.text_column) or "") or None

    # --------------------------------------------------------------------------- answers

    @property
    def metric_context(self) -> MetricContext:
        """How texts are written before they are compared."""
        normalizer = BASIC if self.spec.normalizer == "basic" else ""
        return replace(super().metric_context, normalizer=normalizer)

    def check_metrics(self, channels: set[str]) -> None:
        """Let the model write answers, if a metric reads text."""
        self.writes_answers = "text" in channels

    def reference(self, row: dict[str, Any]) -> str:
        """Return what a row wants, as far as the model can write it."""
        return str(row[self.spec.text_column])

    def join(self, row: dict[str, Any], parts: Sequence[Prediction]) -> Prediction:
        """Return the parts of a recording as one answer."""
        wanted = str(row[self.spec.text_column])
        if any(part.prediction is None for part in parts):  # it is not asked for
            return Prediction(parts[0].row, None, wanted)
        said = joined([str(part.prediction) for part in parts])
        found = Prediction(parts[0].row, said, wanted)
        texts = [normalised(text, self.spec.normalizer) for text in (said, self.reference(row))]
        found.metric_inputs["text"] = (texts[0], texts[1])
        found.details["words"] = aligned(texts[1], texts[0])
        return found

    def parse_input(self, typed: str) -> dict[str, Any]:
        """Return a row of the path of a recording."""
        return {self.spec.audio_column: media_value(typed, Path.cwd())}

    def answer_columns(self) -> dict[str, str]:
        """Return the column of what is said."""
        return {"prediction": "string"}

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Return what is said in each recording, however long it is."""
        return [[text] for text in self._said(model, rows, self.recipe.evaluate.generation)]

    def _said(
        self, model: nn.Module, rows: Sequence[dict[str, Any]], options: GenerationSpec
    ) -> list[str]:
        texts: list[list[str]] = [[] for _ in rows]
        places = [
            (i, p) for i, r in enumerate(rows) for p in self.parts_of(r[self.spec.audio_column])
        ]
        for start in range(0, len(places), len(rows)):
            some = places[start : start + len(rows)]
            found = self.transcripts(model, [part for _, part in some], options)
            for (i, _), text in zip(some, found, strict=True):
                texts[i].append(text)
        return [joined(said) for said in texts]

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


def as_weights(model: nn.Module, tensor: Tensor) -> Tensor:
    """Return a tensor in the precision of the weights that read it."""
    if torch.is_autocast_enabled(tensor.device.type):
        return tensor
    kinds = [(p.requires_grad, p.dtype) for p in model.parameters() if p.is_floating_point()]
    base = next((dtype for is_trained, dtype in kinds if not is_trained), kinds[0][1])
    return tensor.to(base)


class _Same:
    """A media value that counts as equal to another of the same bytes."""

    def __init__(self, value: dict[str, Any]) -> None:
        self.value, self.key = value, media_hash(value)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.key == other.key


@functools.lru_cache(maxsize=DECODED)
def _long_recording(same: _Same, rate: int) -> Samples:
    return read_recording(same.value, rate)
