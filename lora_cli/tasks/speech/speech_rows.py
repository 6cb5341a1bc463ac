"""What a recording and its transcript are: columns, parts of long recordings, examples.

`SpeechRecognition` adds batches, the loss and the answers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.load_rows import Rows
from lora_cli.data.media import described, media_error, media_hash
from lora_cli.data.readers import text_error
from lora_cli.data.recordings import (
    LongAudio,
    RecordingError,
    Samples,
    divide,
    is_silent,
    read_recording,
    recording_facts,
    require_audio_packages,
)
from lora_cli.errors import LoraError, counted, warn
from lora_cli.models.base_model import load_config
from lora_cli.models.feature_extractor import load_feature_extractor
from lora_cli.models.image_processor import processor_hash
from lora_cli.recipe import Recipe, SpeechRecognitionSpec
from lora_cli.tasks.examples import Encoded, Example, Field
from lora_cli.tasks.generation.writing_task import WritingTask, keep_all_layers, layer_drop_of
from lora_cli.tasks.speech.spoken_languages import first_tokens, knows_languages
from lora_cli.tasks.speech.transcripts import has_vowel_marks, spoken
from lora_cli.tasks.texts.marked_tokens import marked

ENCODING = 1  # of rows into examples; a change of it makes what is kept on the disk useless
CTC = ("data2vec-audio", "hubert", "sew", "unispeech", "wav2vec2", "wavlm", "parakeet", "lasr")
AT_ONCE = " at once"
DECODED = 4  # long recordings whose samples stay in memory: their parts are read one by one


class RecordedTask(WritingTask):
    """A task whose rows are a recording, and what is said in it."""

    spec: SpeechRecognitionSpec  # type: ignore[assignment]  # its length is that of a recording
    unit = "second"
    input_name = "recording"
    answer_hint = "name another recording"
    length_key = "model.name"
    prompt_name = "recording"
    can_fill_left = False

    def __init__(self, recipe: Recipe, spec: SpeechRecognitionSpec) -> None:
        super().__init__(recipe)
        self.spec = spec
        self.extractor: Any

    # --------------------------------------------------------------------- the processor

    def load_processor(self) -> None:
        """Load the tokenizer, the feature extractor and the configuration."""
        require_audio_packages()
        self._require_whisper()
        super().load_processor()
        self.extractor = load_feature_extractor(self.recipe, self.config)
        self.pad = int(self.config.pad_token_id)
        self.has_languages = knows_languages(self.recipe, int(self.config.vocab_size))
        tokenizer = self.tokenizer
        self.begin = first_tokens(self.spec, tokenizer, self.has_languages, self.recipe)
        if dropped := layer_drop_of(self.config):
            self.notes.append(dropped)
        if getattr(self.config, "apply_spec_augment", False):
            self.notes.append(
                "`apply_spec_augment` of the model is set to false: nothing of a recording is "
                "masked in training"
            )

    def _require_whisper(self) -> None:
        """Reject models of speech that work in another way.

        Raises:
            LoraError: With what the model is.
        """
        kind = load_config(self.recipe).model_type
        if kind == "whisper":
            return
        what = f"`{self.recipe.model.name}` is no Whisper model ({kind})"
        if kind.startswith(CTC):
            what = f"`{self.recipe.model.name}` ({kind}) writes a letter for each moment (CTC), "
            what += "which `speech_recognition` does not train"
        raise LoraError(what, self.recipe.at("model.name"), self.spec.suitable_models)

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
        own = [f"recordings {ENCODING}", processor_hash(self.extractor), str(self.begin)]
        return [*super().cache_key(), *own]

    @property
    def positions(self) -> int:
        """Tokens that the decoder has positions for."""
        return int(self.config.max_target_positions)

    @property
    def rate(self) -> int:
        """Samples a second that the model reads."""
        return int(self.extractor.sampling_rate)

    @property
    def longest(self) -> float:
        """How many seconds the model hears at once."""
        return int(self.extractor.n_samples) / self.rate

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
        column = self.spec.audio_column
        if error := media_error(row, [column]):
            return error
        error = recording_facts(row[column]).error
        return f"`{described(row[column])}` {error}" if error else ""

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
        try:
            if recording_facts(value).seconds <= self.longest:
                return read_recording(value, self.rate)[: int(self.longest * self.rate)]
            return _long_recording(_Same(value), self.rate)
        except RecordingError as error:  # it was whole when the rows were checked
            what = f"`{described(value)}` {error}; it was whole when the run began"
            hint = "put the file back; a run that was interrupted goes on with `--resume`"
            raise LoraError(what, str(value["path"] or ""), hint) from error

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return an example for each part of each recording; only whole ones have a target."""
        texts = [spoken(str(row[self.spec.text_column])) for row in rows]
        found = self.text_tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [self._examples(row, ids) for row, ids in zip(rows, found, strict=True)]

    def _examples(self, row: dict[str, Any], text: Sequence[int]) -> list[Example]:
        """Return the examples of a recording.

        Raises:
            LoraError: If its transcript is too long.
        """
        value = row[self.spec.audio_column]
        facts = recording_facts(value)
        about = {"is_clipped": facts.is_clipped, "is_too_loud": facts.is_too_loud}
        length = math.ceil(facts.seconds * self.rate)
        if facts.seconds <= self.longest:
            labels = [*self.begin, *text, int(self.tokenizer.eos_token_id)]
            if len(labels) > self.positions:
                what = f"its text has {counted(len(labels), 'token')}, and the model writes "
                hint = "divide the recording with its text, or is it the text of another one?"
                raise LoraError(f"{what}{self.positions} at most", hint=hint)
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
        facts = {"is_clipped": "bool", "is_too_loud": "bool", "start": "int32", "stop": "int32"}
        return {"audio": "media", "labels": "list<int32>", **facts}

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
        """Return a warning of recordings that are clipped, or far too loud."""
        said = []
        for key, what in {
            "is_clipped": "clipped: its loudest samples were cut off at full scale",
            "is_too_loud": "far beyond full scale, as if its numbers had not been scaled",
        }.items():
            found = [int(example["row"]) for example in examples if example[key]]
            if found:
                is_one = len(set(found)) == 1
                verb = "is" if is_one else "are"
                text = what if is_one else what.replace("its", "their")
                count = counted(len(set(found)), f"{name} recording")
                said.append(f"{count} {verb} {text} (the first: {rows.place(found[0])})")
        return 0.0, "; ".join(said) or None

    def trained_share(self, split: Encoded) -> None:
        """Return None: what is trained is tokens, and what is counted seconds."""

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return how long a recording is, and its transcript."""
        labels = list(example["labels"])
        facts = recording_facts(example["audio"])
        about = f"{described(example['audio'])}: {facts.seconds:.2f} s at {facts.rate:,} Hz, "
        about += counted(facts.channels, "channel")
        text = marked(self.tokenizer, labels, [True] * len(labels), colour)
        return [f"text {counted(len(labels), 'token')}"], f"{about}\n{text}"

    def shown_reference(self, row: dict[str, Any]) -> str | None:
        """Return the transcript of a row."""
        return str(row.get(self.spec.text_column) or "") or None


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
