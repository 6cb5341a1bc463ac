"""Base class of speech recognition tasks: columns, splitting of long recordings, examples, answers.

`SpeechRecognition` and `CTCRecognition` add batches, the loss, and decoding.
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
from lora_cli.data.media import media_error, media_hash, media_name, media_value
from lora_cli.data.recordings import (
    LongAudio,
    Samples,
    is_silent,
    playable_url,
    read_recording,
    recording_facts,
    require_audio_packages,
    split_recording,
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
    require_readable,
)
from lora_cli.tasks.speech.transcripts import (
    BASIC,
    align_words,
    has_vowel_marks,
    join_transcripts,
    normalise_text,
)
from lora_cli.tasks.texts.marked_tokens import marked
from lora_cli.tasks.texts.text_task import TextTask

ENCODING = 3  # version of the encoding of rows; increasing it invalidates cached examples
TOO_LONG_SUFFIX = " at once"
MAX_CACHED_RECORDINGS = 4  # long ones, as their parts are read one by one


class RecordingTask(TextTask):
    """A task whose rows hold a recording and its transcript."""

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
    def max_seconds(self) -> float:
        """The number of seconds that the model hears in one forward pass."""

    @abstractmethod
    def tokens_of(self, text: str) -> list[int]:
        """Return the token ids of a transcript."""

    @abstractmethod
    def length_error(self, n_samples: int, labels: Sequence[int]) -> tuple[str, str] | None:
        """Return why a transcript is too long for the model, and a hint; or None."""

    @abstractmethod
    def transcripts(
        self, model: nn.Module, parts: Sequence[Samples], options: GenerationSpec
    ) -> list[str]:
        """Transcribe recordings, each of which fits into one forward pass."""

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
        """Return the model's configuration, without LayerDrop and SpecAugment."""
        config = keep_all_layers(super().model_config())
        config.apply_spec_augment = False  # it uses numpy's global generator
        return config

    def save_processor(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Save the tokenizer and the feature extractor to a folder."""
        super().save_processor(folder, facts)
        self.extractor.save_pretrained(folder)

    @property
    def base_facts(self) -> dict[str, Any]:
        """The properties of the base, besides its tensors, that determine the computation."""
        return {**super().base_facts, "processor": processor_hash(self.extractor)}

    def cache_key(self) -> list[str]:
        """Return what an encoded row depends on besides the row itself."""
        return [*super().cache_key(), f"recordings {ENCODING}", processor_hash(self.extractor)]

    @property
    def rate(self) -> int:
        """The model's sampling rate in Hz."""
        return int(self.extractor.sampling_rate)

    @property
    def max_length(self) -> int:  # type: ignore[override]
        """`max_seconds` as a whole number."""
        return int(self.max_seconds)

    @property
    def length_note(self) -> str | None:
        """None, as the length is the model's own."""
        return None

    @property
    def longer_hint(self) -> str:
        """What to do about recordings that are too long."""
        return "divide the recording, and its text with it"

    # ------------------------------------------------------------------------------ rows

    def fields(self) -> list[Field]:
        """Return the fields of the recording (the input) and its transcript (the target)."""
        return [
            Field("task.audio_column", self.spec.audio_column, "input", "audio"),
            Field("task.text_column", self.spec.text_column, "target", "text"),
        ]

    def input_error(self, row: dict[str, Any]) -> str:
        """Decode the recording; return why it cannot be read, or an empty string."""
        return recording_error(row, self.spec.audio_column)

    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the transcript, or an empty string."""
        return text_error(row, [self.spec.text_column])

    def skip_reason(self, row: dict[str, Any], split: str) -> str:
        """Return why a recording is skipped: it is too long for one forward pass."""
        if split != "train" and self.spec.long_audio != "drop":
            return ""
        if media_error(row, [self.spec.audio_column]):
            return ""  # reported as an error elsewhere
        seconds = recording_facts(row[self.spec.audio_column]).seconds
        max_seconds = self._known_max_seconds
        if seconds <= max_seconds:
            return ""
        return f"it lasts {seconds:.1f} s, and the model hears {max_seconds:g} s{TOO_LONG_SUFFIX}"

    @property
    def _known_max_seconds(self) -> float:
        """`max_seconds`, or Whisper's 30 before the processor is loaded.

        Rows are also checked if the processor cannot be loaded.
        """
        return self.max_seconds if hasattr(self, "extractor") else 30.0

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Warn if the metrics' normaliser would remove vowels, as it takes them for symbols."""
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
        """Return the column of the transcripts."""
        return [self.spec.text_column]

    def control_token_in(self, row: dict[str, Any]) -> str | None:
        """Return the first control token whose text is in the transcript, or None."""
        return self.control_tokens.first_in([row.get(self.spec.text_column)])

    def audio_parts(self, value: dict[str, Any]) -> list[Samples]:
        """Split a recording into parts that the model hears one at a time.

        Silent parts are left out, as Whisper invents words for silence.
        """
        samples = self.samples(value)
        return [samples[start:stop] for start, stop in self._part_spans(samples)]

    def _part_spans(self, samples: Samples) -> list[tuple[int, int]]:
        method: LongAudio = "windows" if self.spec.long_audio == "windows" else "silence"
        parts = split_recording(samples, self.rate, self.max_seconds, method)
        return [part for part in parts if len(parts) == 1 or not is_silent(samples[slice(*part)])]

    def samples(self, value: dict[str, Any]) -> Samples:
        """Return the samples of a recording at the model's rate (N,).

        Raises:
            LoraError: If the file has become unreadable since the rows were checked.
        """
        with require_readable(value):
            if recording_facts(value).seconds <= self.max_seconds:
                return read_recording(value, self.rate)[: int(self.max_seconds * self.rate)]
            return _long_recording(_MediaKey(value), self.rate)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return an example for each part of each recording; only unsplit ones have a target."""
        return [self._examples(row) for row in rows]

    def _examples(self, row: dict[str, Any]) -> list[Example]:
        """Return the examples of a recording.

        Raises:
            LoraError: If its transcript is too long for the model.
        """
        value = row[self.spec.audio_column]
        facts = recording_facts(value)
        odd = odd_facts(facts)
        length = math.ceil(facts.seconds * self.rate)
        if facts.seconds <= self.max_seconds:
            labels = self.tokens_of(str(row[self.spec.text_column]))
            if (error := self.length_error(length, labels)) is not None:
                raise LoraError(error[0], hint=error[1])
            return [{"audio": value, "start": 0, "stop": length, "labels": labels, **odd}]
        spans = self._part_spans(self.samples(value))
        full = math.ceil(facts.seconds)
        return [
            {"audio": value, "start": start, "stop": stop, "labels": [], "full_length": full} | odd
            for start, stop in spans
        ]

    def features(self) -> dict[str, str]:
        """Return the types of an example's fields."""
        spans = {"start": "int32", "stop": "int32"}
        return {"audio": "media", "labels": "list<int32>", **ODD_FEATURES, **spans}

    def cost(self, example: Example) -> int:
        """Return the duration of an example in seconds, rounded up."""
        n_samples: int = example["stop"] - example["start"]
        return max(math.ceil(n_samples / self.rate), 1)

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Reject token ids that are not in the model's embedding."""
        self.require_known_tokens([max(e["labels"], default=0) for e in examples])

    def cut_note(self, split: Encoded) -> str | None:
        """Return how many recordings of a split are skipped or split as they are too long."""
        notes = []
        left_out = sum(reason.endswith(TOO_LONG_SUFFIX) for reason in split.rows.skipped)
        if left_out:
            verb = "is" if left_out == 1 else "are"
            recordings = counted(left_out, "recording")
            notes.append(f"{recordings} of more than {self.max_length} s {verb} left out")
        is_split = split.full_lengths > self.max_length
        if is_split.any():
            notes.append(self._split_note(split, is_split))
        return ", ".join(notes) or None

    def _split_note(self, split: Encoded, is_split: NDArray[np.bool_]) -> str:
        """Return into how many parts recordings are split; `is_split` is a mask of examples."""
        rows = len(np.unique(split.examples.data.column("row").to_numpy()[is_split]))
        method = "into equal parts" if self.spec.long_audio == "windows" else "where it is quietest"
        parts = counted(int(is_split.sum()), "part")
        verb = "is" if rows == 1 else "are"
        return (
            f"{counted(rows, 'recording')} of more than {self.max_length} s {verb} divided "
            f"{method}: {parts}, whose texts are joined, and which the loss leaves out"
        )

    def unknown_input(self, name: str, rows: Rows, examples: Any) -> tuple[float, str | None]:
        """Return a warning about recordings that are clipped, too loud, or of conflicting texts."""
        return 0.0, odd_rows(name, rows, examples, self.spec.audio_column, self.spec.text_column)

    def trained_share(self, split: Encoded) -> None:
        """Return None: targets are counted in tokens, but inputs in seconds."""

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return a description of an example's recording, and its transcript."""
        labels = list(example["labels"])
        facts = recording_facts(example["audio"])
        description = (
            f"{media_name(example['audio'])}: {facts.seconds:.2f} s at {facts.rate:,} Hz, "
        )
        description += counted(facts.channels, "channel")
        text = self.marked(labels, colour)
        return [f"text {counted(len(labels), 'token')}"], f"{description}\n{text}"

    def marked(self, labels: Sequence[int], colour: bool) -> str:
        """Return a transcript as the model is trained on it, marked as trained."""
        return marked(self.tokenizer, labels, [True] * len(labels), colour)

    def shown_reference(self, row: dict[str, Any]) -> str | None:
        """Return the transcript of a row."""
        return str(row.get(self.spec.text_column) or "") or None

    # --------------------------------------------------------------------------- answers

    @property
    def metric_context(self) -> MetricContext:
        """The metrics' context, with the normaliser of texts."""
        normalizer = BASIC if self.spec.normalizer == "basic" else ""
        return replace(super().metric_context, normalizer=normalizer)

    def check_metrics(self, channels: set[str]) -> None:
        """Generate transcripts if a metric compares texts."""
        self.writes_answers = "text" in channels

    def reference(self, row: dict[str, Any]) -> str:
        """Return the transcript of a row, as far as the model can write it."""
        return str(row[self.spec.text_column])

    def join(self, row: dict[str, Any], parts: Sequence[Prediction]) -> Prediction:
        """Join the predictions for the parts of a recording."""
        reference = str(row[self.spec.text_column])
        if any(part.prediction is None for part in parts):  # no metric compares texts
            return Prediction(parts[0].row, None, reference)
        transcript = join_transcripts([str(part.prediction) for part in parts])
        answer = Prediction(parts[0].row, transcript, reference)
        texts = [normalise_text(t, self.spec.normalizer) for t in (transcript, self.reference(row))]
        answer.metric_inputs["text"] = (texts[0], texts[1])
        answer.details["words"] = align_words(texts[1], texts[0])
        return answer

    def parse_input(self, typed: str) -> dict[str, Any]:
        """Return a row that holds the recording of a path."""
        return {self.spec.audio_column: media_value(typed, Path.cwd())}

    def answer_columns(self) -> dict[str, str]:
        """Return the column of the predicted transcript."""
        return {"prediction": "string"}

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Transcribe recordings of any length."""
        return [[text] for text in self._transcribe(model, rows, self.recipe.evaluate.generation)]

    def _transcribe(
        self, model: nn.Module, rows: Sequence[dict[str, Any]], options: GenerationSpec
    ) -> list[str]:
        texts: list[list[str]] = [[] for _ in rows]
        parts = [
            (i, p) for i, r in enumerate(rows) for p in self.audio_parts(r[self.spec.audio_column])
        ]
        for start in range(0, len(parts), len(rows)):
            batch = parts[start : start + len(rows)]
            transcripts = self.transcripts(model, [part for _, part in batch], options)
            for (i, _), text in zip(batch, transcripts, strict=True):
                texts[i].append(text)
        return [join_transcripts(texts_of_parts) for texts_of_parts in texts]

    def sample(
        self, model: nn.Module, rows: Sequence[dict[str, Any]]
    ) -> list[tuple[str, str, str]]:
        """Transcribe recordings greedily; return (recording, reference, transcript) for each."""
        tokens = min(SAMPLE_NEW_TOKENS, self.recipe.evaluate.generation.max_new_tokens)
        transcripts = self._transcribe(model, rows, GenerationSpec(max_new_tokens=tokens))
        names = [media_name(row[self.spec.audio_column]) for row in rows]
        references = [self.shown_reference(row) or "" for row in rows]
        return list(zip(names, references, transcripts, strict=True))

    def thumbnail(self, row: dict[str, Any]) -> str | None:
        """Return a row's recording as a `data:` URL that a page can play."""
        return playable_url(row[self.spec.audio_column], self.max_seconds)


def as_weights(model: nn.Module, tensor: Tensor) -> Tensor:
    """Convert an input to the dtype of the base's weights, unless autocast does."""
    if torch.is_autocast_enabled(tensor.device.type):
        return tensor
    dtypes = [(p.requires_grad, p.dtype) for p in model.parameters() if p.is_floating_point()]
    base_dtype = next((dtype for is_trained, dtype in dtypes if not is_trained), dtypes[0][1])
    return tensor.to(base_dtype)


class _MediaKey:
    """A media value as a key of a cache: values with the same bytes are equal."""

    def __init__(self, value: dict[str, Any]) -> None:
        self.value, self.key = value, media_hash(value)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _MediaKey) and self.key == other.key


@functools.lru_cache(maxsize=MAX_CACHED_RECORDINGS)
def _long_recording(key: _MediaKey, rate: int) -> Samples:
    return read_recording(key.value, rate)
