"""`task` for `type: speech_recognition`."""

from __future__ import annotations

import math
import unicodedata
from typing import Any, Literal

from lora_cli.recipe.spec.section import Conflicts, Word
from lora_cli.recipe.spec.task_section import (
    AnswerKind,
    MediaKind,
    TaskSection,
    Usage,
    UsualTraining,
)

READING = """\
samples, rate = soundfile.read("recording.wav", dtype="float32", always_2d=True)
wanted = processor.feature_extractor.sampling_rate
samples = soxr.resample(samples.mean(axis=1), rate, wanted)
inputs = processor(samples, sampling_rate=wanted, return_tensors="pt")
"""
LETTERS = f"""{READING}\
letters = model(**inputs).logits.argmax(-1)[0]
print(processor.decode(letters).strip())"""
TRANSCRIBING = f"""{READING}\
output = model.generate(**inputs, {{options}})
print(processor.decode(output[0], skip_special_tokens=True).strip())"""


class SpeechRecognitionSpec(TaskSection):
    """Transcribe recordings of speech."""

    pipeline_tag = "automatic-speech-recognition"
    suitable_models = (
        "use a Whisper model, such as openai/whisper-small, one with CTC, such as "
        "facebook/wav2vec2-base-960h, or one that gets a vocabulary here: facebook/wav2vec2-base"
    )
    usual_training = UsualTraining(
        epochs=((1_000, 10), (20_000, 5), (math.inf, 2)), learning_rate=1e-3
    )
    example_input = "recording.wav"
    length_keys = ()

    type: Literal["speech_recognition"]
    """The type of task."""

    audio_column: Word = "audio"
    """Column of the recording: a path relative to the file that contains it (csv, JSON), or the
    encoded recording itself (parquet, the Hub). In a folder of recordings (`data.path`), each file
    is a row."""

    text_column: Word = "text"
    """Column of the transcript. In a folder of recordings, it is read from the text file next to
    each recording: `a/1.txt` for `a/1.wav`."""

    decoder: Literal["attention", "ctc"] | None = None
    """How the model writes: one token after the other, like Whisper (`attention`), or a letter for
    each frame, like wav2vec2, HuBERT and WavLM (`ctc`). Default: like the base."""

    letters: Word | None = None
    """The letters that a model with CTC writes, as one text: `letters: abcdefghijklmnopqrstuvwxyz`.
    They get a new output layer, which is trained in full. Default: the base's own vocabulary. If
    the base has none because it was only pretrained on recordings: the letters of the train
    transcripts, in lower case, without punctuation and symbols other than the apostrophe."""

    language: Word | None = None
    """The language that is spoken, as a code (`de`) or an English name. Multilingual models need
    it; English-only models do not accept it."""

    task: Literal["transcribe", "translate"] | None = None
    """What a multilingual model writes: the words as they are spoken (`transcribe`, the default),
    or their English translation (`translate`)."""

    long_audio: Literal["silence", "windows", "drop"] = "silence"
    """What happens to recordings longer than the model can process at once: 30 seconds, for CTC
    too. Training leaves them out, since it is not known which words are in which part. Evaluation
    and prediction divide them into parts, and join the texts of the parts. The cuts are made where
    it is quietest (`silence`), or after equal times (`windows`). With `drop`, evaluation leaves
    them out too."""

    normalizer: Literal["basic", "none"] = "basic"
    """How texts are normalised for the metrics, and only for them. `basic` is Whisper's normaliser
    for all languages: lower case, without punctuation, symbols and text in brackets. `none`
    compares the texts as they are; use it for scripts that write vowels as marks, such as those of
    Hindi, Tamil or Thai, since `basic` removes these marks as symbols."""

    def conflicts(self) -> Conflicts:
        """Yield what prevents a row from being read."""
        if self.audio_column == self.text_column:
            what = f"`{self.audio_column}` is both the recording and the text"
            yield "text_column", what, "name the column of what is said"
        odd = [letter for letter in self.letters or "" if letter.isspace() or letter == "|"]
        if odd:
            what = (
                f"{odd[0]!r} is not a letter: a space separates words, and every vocabulary has it"
            )
            yield "letters", what, "leave it out"

    @property
    def split_special_tokens(self) -> bool:
        """Whether control tokens in a transcript are read as ordinary characters: always."""
        return True

    @property
    def answer_kind(self) -> AnswerKind:
        """A transcript."""
        return "transcript"

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The column of the recording."""
        return {"task.audio_column": self.audio_column}

    @property
    def media_columns(self) -> dict[str, MediaKind]:
        """The column of the recording."""
        return {self.audio_column: "audio"}

    @property
    def transcript_column(self) -> str | None:
        """The column that text files next to recordings fill."""
        return self.text_column

    @property
    def _head(self) -> str:
        """The arguments that make transformers create the output layer for `letters`."""
        if self.letters is None:
            return ""
        known = {*unicodedata.normalize("NFC", self.letters), " "}
        # behind them [UNK], [PAD] and the two tokens that every such tokenizer has, <s> and </s>
        return f", vocab_size={len(known) + 4}, pad_token_id={len(known) + 1}"

    def usage(self, labels: list[str], settings: Any) -> Usage:
        """Return how to transcribe a recording with the model."""
        if self.decoder == "ctc":
            return Usage(
                "AutoModelForCTC", LETTERS, "import soundfile\nimport soxr\n", head=self._head,
                processor=("processor", "AutoProcessor"),
                has_own_processor=self.letters is not None,
            )  # fmt: skip
        options = [f"max_new_tokens={settings.max_new_tokens}", f"num_beams={settings.num_beams}"]
        options += ["do_sample=False", "suppress_tokens=[]", "begin_suppress_tokens=[]"]
        if self.language is not None:
            options += [f"language={self.language!r}", f"task={self.task or 'transcribe'!r}"]
        lines: list[str] = []
        line = ""
        for option in options:
            if len(f"{line}, {option}") > 80:
                lines, line = [*lines, f"    {line},"], ""
            line = f"{line}, {option}" if line else option
        shown = "\n".join(["", *lines, f"    {line},", ""])
        code = TRANSCRIBING.format(options="OPTIONS").replace(
            "**inputs, OPTIONS", f"**inputs,{shown}"
        )
        return Usage(
            "AutoModelForSpeechSeq2Seq", code, "import soundfile\nimport soxr\n",
            processor=("processor", "AutoProcessor"),
        )  # fmt: skip
