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
    """Say a text aloud, with SpeechT5."""

    pipeline_tag = "text-to-speech"
    suitable_models = (
        "take a SpeechT5 model that speaks, such as microsoft/speecht5_tts; VITS and its kin "
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
    """Which task."""

    text_column: Word = "text"
    """Column of what is said. In a folder of recordings it is the content of the text file next to
    each: `a/1.txt` for `a/1.wav`."""

    audio_column: Word = "audio"
    """Column of the recording: a path relative to the file that names it (csv, JSON), or the
    encoded recording itself (parquet, the Hub). In a folder of recordings (`data.path`) each file
    is a row."""

    speaker_column: Word | None = None
    """Column of the vector that describes who speaks: a list of as many numbers as the model reads
    (512 for microsoft/speecht5_tts, which was trained with x-vectors), or in csv such a list in
    brackets, as in JSON. Rows of several speakers need it."""

    speaker_embedding: Word | None = None
    """Instead of `speaker_column`: one vector for all rows, in a file that `numpy.save` wrote
    (`speaker.npy`). `zeros` is no speaker at all, for models that were trained so. One of the two
    keys has to be there: without a speaker the model would guess a voice."""

    vocoder: Word | None = None
    """The model that makes spectrograms heard, such as microsoft/speecht5_hifigan, or a local
    folder with one. Without it `lora predict` writes spectrograms instead of sound. It is not
    trained."""

    stop_threshold: Annotated[float, Field(gt=0)] = THRESHOLD
    """An answer ends where the model's probabilities that it does, of the frames of one step (two,
    for microsoft/speecht5_tts) added up, reach this value."""

    longest_ratio: Annotated[float, Field(gt=0)] = LONGEST_RATIO
    """An answer has at most so many frames of the spectrogram for each token of the text (a letter,
    for SpeechT5), if it does not end before."""

    def conflicts(self) -> Conflicts:
        """Yield what keeps a row from being read."""
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
        """A control token that is spelled out in a text is read as its letters."""
        return True

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The column of the recording: one that was trained must not be measured."""
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
        """The file of the speaker's vector."""
        return [] if self.speaker_embedding in (None, ZEROS) else ["speaker_embedding"]

    @property
    def models_by_key(self) -> dict[str, str]:
        """The vocoder."""
        return {} if self.vocoder is None else {"vocoder": self.vocoder}

    def usage(self, labels: list[str], settings: Any) -> Usage:
        """Return how a text is said."""
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
