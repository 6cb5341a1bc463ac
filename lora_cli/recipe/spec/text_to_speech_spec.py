"""`task` for `type: text_to_speech`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from lora_cli.recipe.spec.section import Conflicts, Word
from lora_cli.recipe.spec.task_section import MediaKind, TaskSection, Usage, UsualTraining

SPEAKER_FILE = "speaker_embedding.npy"  # the copy of the vector beside an adapter
ZEROS = "zeros"  # the word that stands for no speaker at all
THRESHOLD, LONGEST_RATIO = 0.5, 20.0  # as `generate_speech` of transformers has them
SPEAKING = """\
inputs = processor(text="Good morning.", return_tensors="pt")
torch.manual_seed({seed})  # the model always draws dropout in the layers that read its own speech
speech = model.generate_speech(inputs["input_ids"], speaker, threshold={threshold}{vocoder})
"""
HEARD = """\
soundfile.write("said.wav", speech.numpy(), vocoder.config.sampling_rate)"""
SEEN = """\
print(speech.shape)  # frames of a log-mel spectrogram, which a vocoder makes heard"""


class TextToSpeechSpec(TaskSection):
    """Synthesise speech from text, with SpeechT5."""

    pipeline_tag = "text-to-speech"
    suitable_models = (
        "use a SpeechT5 model for synthesis, such as microsoft/speecht5_tts; VITS and similar "
        "cannot be trained with transformers"
    )
    default_targets = ("q_proj", "k_proj", "v_proj", "out_proj")
    usual_training = UsualTraining(
        epochs=((500, 50), (5_000, 20), (20_000, 5), (math.inf, 2)),
        learning_rate=1e-4,
        all_linear=False,
        targets_note="on the queries, keys, values and outputs of attention",
    )
    example_input = "Good morning."
    length_keys = ()

    type: Literal["text_to_speech"]
    """The type of task."""

    text_column: Word = "text"
    """Column of the text that is spoken. In a folder of recordings, it is read from the text file
    next to each recording: `a/1.txt` for `a/1.wav`."""

    audio_column: Word = "audio"
    """Column of the recording: a path relative to the file that contains it (csv, JSON), or the
    encoded recording itself (parquet, the Hub). In a folder of recordings (`data.path`), each file
    is a row."""

    speaker_column: Word | None = None
    """Column of the speaker's embedding: a list with as many numbers as the model expects (512 for
    microsoft/speecht5_tts, which was trained with x-vectors), in csv a JSON list. Data with several
    speakers need it."""

    speaker_embedding: Word | None = None
    """Instead of `speaker_column`: one embedding for all rows, in a file that `numpy.save` wrote
    (`speaker.npy`). `zeros` means no speaker, for models that were trained in this way. One of the
    two keys is required: without a speaker, the model would guess a voice."""

    vocoder: Word | None = None
    """The model that turns spectrograms into sound, such as microsoft/speecht5_hifigan, or a local
    folder with one. Without it, `lora predict` writes spectrograms. It is not trained."""

    stop_threshold: Annotated[float, Field(gt=0)] = THRESHOLD
    """Speech ends when the model's stop probabilities, summed over the frames of one decoding step
    (two frames for microsoft/speecht5_tts), reach this value."""

    longest_ratio: Annotated[float, Field(gt=0)] = LONGEST_RATIO
    """Maximum length of the speech, in frames of the spectrogram per token of the text (a letter,
    for SpeechT5)."""

    def conflicts(self) -> Conflicts:
        """Yield what prevents a row from being read."""
        named = {
            "text_column": self.text_column,
            "audio_column": self.audio_column,
            "speaker_column": self.speaker_column,
        }
        seen: dict[str, str] = {}
        for key, column in named.items():
            if column is None:
                continue
            if column in seen:
                what = f"`{column}` is the column of both `{seen[column]}` and `{key}`"
                yield key, what, "name another column"
            seen[column] = key
        if self.speaker_column is not None and self.speaker_embedding is not None:
            what = "`speaker_column` has a vector for each row, so `speaker_embedding` is not read"
            yield "speaker_embedding", what, "leave one of the two out"

    @property
    def split_special_tokens(self) -> bool:
        """Whether control tokens in a text are read as ordinary characters: always."""
        return True

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The column of the recording, as no trained recording may be in validation or test."""
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
    def local_files(self) -> list[str]:
        """The file of the speaker's embedding."""
        return [] if self.speaker_embedding in (None, ZEROS) else ["speaker_embedding"]

    @property
    def models_by_key(self) -> dict[str, str]:
        """The vocoder."""
        return {} if self.vocoder is None else {"vocoder": self.vocoder}

    def usage(self, labels: list[str], settings: Any) -> Usage:
        """Return how to synthesise a text with the model."""
        file = "speaker.npy" if self.speaker_embedding is None else SPEAKER_FILE
        imports = "import numpy\nimport torch\n"
        setup = f"speaker = torch.from_numpy(numpy.load({file!r})).float().reshape(1, -1)\n"
        if self.speaker_embedding == ZEROS:
            setup = "speaker = torch.zeros(1, model.config.speaker_embedding_dim)\n"
        code, end = SPEAKING, SEEN
        code = code.format(
            seed=0, threshold=self.stop_threshold,
            vocoder="" if self.vocoder is None else ", vocoder=vocoder",
        )  # fmt: skip
        if self.vocoder is not None:
            imports = f"import soundfile\n{imports}from transformers import SpeechT5HifiGan\n"
            end = HEARD
            setup += f"vocoder = SpeechT5HifiGan.from_pretrained({self.vocoder!r})\n"
        return Usage(
            "SpeechT5ForTextToSpeech", f"{setup}{code}{end}", imports,
            processor=("processor", "AutoProcessor"),
        )  # fmt: skip
