"""Proposal of a speech recognition task for `lora init`, from recordings with transcripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lora_cli.data.cell_values import read_number
from lora_cli.data.detect_table import is_number
from lora_cli.data.media_folder import SAMPLE, are_media
from lora_cli.errors import LoraError, counted
from lora_cli.tasks.proposal import BaseFacts, Certainty, Proposal, Table, proposed

TEXT_NAME = re.compile(
    r"(?i)text|transcripts?|transcriptions?|sentence|utterance|(raw|normali[sz]ed)_(text|transcription)"
    r"|words|said|target|txt"
)
LANGUAGE_NAME = re.compile(r"(?i)language|lang|locale")
# the column with the start of a segment, in a table of segments of recordings
SEGMENT_START_NAME = re.compile(
    r"(?i)(segment_?)?(start|begin|onset|offset)(_?(time|seconds?|secs?|s|ms|samples?|frames?))?"
)
AUDIO, TEXT = "audio", "text"  # the default columns, also those of a folder


def propose_recordings(table: Table, base: BaseFacts) -> Proposal | None:
    """Propose speech recognition if a table or the base is about audio; see `Task.propose`."""
    if base.speaker_size is not None:
        return None  # a speech synthesis model
    if table.media == "image" or not (table.media == "audio" or base.reads_audio):
        return None
    return proposed(lambda: _propose_task(table, base), Certainty.ONLY)


def _propose_task(table: Table, base: BaseFacts) -> Proposal:
    """Propose the task of rows that hold a recording and its transcript.

    Raises:
        LoraError: If the recordings or the transcripts are missing, or the model does not recognise
            speech.
    """
    place, names = table.place, [column.name for column in table.columns]
    is_folder = table.media == "audio"
    if not base.reads_audio:
        what = f"`{base.name}` does not hear, and {place} holds recordings"
        raise LoraError(what, "--model", "use a Whisper model, such as openai/whisper-small")
    listed = f"the columns are {', '.join(names)}"
    audio = next((n for n in names if are_media([row.get(n) for row in table.rows[:SAMPLE]])), None)
    if audio is None:
        what = "no column holds recordings, which the model hears"
        raise LoraError(
            what,
            place,
            f"{listed}; a recording is named by its path, with its ending: `clips/a.wav`",
        )
    require_whole_recordings(table, audio)
    others = [name for name in names if name != audio]
    text = table.text or text_column_of(others, table.rows, is_folder)
    if text is None and is_folder:
        what = f"the recordings of {place} have no texts next to them"
        hint = "write what is said in `a.wav` into `a.txt`, or list all in metadata.csv: "
        raise LoraError(what, place, f"{hint}file_name,text")
    if text is None:
        what = "no column has the name of a transcript column"
        raise LoraError(what, place, f"name it: `--text COLUMN`; {listed}")
    keys = {"type": "speech_recognition", "audio_column": audio, "text_column": text}
    reasons = {
        "audio_column": "the recordings" if is_folder else "recordings, or paths of such",
        "text_column": "chosen by you" if table.text else "by its name",
    }
    if is_folder:
        reasons["text_column"] = "the text files next to them"
    for key, default in (("audio_column", AUDIO), ("text_column", TEXT)):
        if keys[key] == default:
            del keys[key]
    if base.recognises_languages:
        keys["language"], reasons["language"] = _language(table)
    if base.lacks_letters:
        reasons[""] = "the model was only pretrained: its letters will be those of the transcripts"
    used = (audio, text)
    left_out = {name: "not needed" for name in names if name not in used}
    return Proposal(keys, reasons, [audio, text], None, left_out, limits={})


def require_whole_recordings(table: Table, audio: str) -> None:
    """Check that rows are whole recordings, not segments whose start is in another column.

    Raises:
        LoraError: If they are segments.
    """
    values = [str(row.get(audio)) for row in table.rows[:SAMPLE]]
    starts = [c.name for c in table.columns if SEGMENT_START_NAME.fullmatch(c.name)]
    # an offset is a place in the file, even where each file has one row, as in NeMo's manifests
    offsets = [row.get(name) for row in table.rows for name in starts if name.lower() == "offset"]
    is_inside = any((read_number(str(offset)) or 0) > 0 for offset in offsets)
    if starts and (is_inside or len(set(values)) < len(values)):
        what = f"the rows are parts of recordings, which begin where `{starts[0]}` says"
        hint = "a recording is read whole: write each part into a file of its own, for example "
        raise LoraError(what, table.place, f"{hint}with `ffmpeg -ss START -to END`, and name that")


def text_column_of(
    names: Sequence[str], rows: Sequence[dict[str, Any]], is_folder: bool
) -> str | None:
    """Return the column with a transcript's name, or else the only column.

    Args:
        names: The names of the columns, without that of the recordings.
        rows: The rows.
        is_folder: Whether the rows are the files of a folder. Then the only column may hold the
            names of subfolders, which are not transcripts.
    """
    named = [name for name in names if TEXT_NAME.fullmatch(name)]
    if named:
        return named[0]
    values = [row.get(name) for row in rows[:SAMPLE] for name in names[:1]]
    if len(names) != 1 or is_folder or all(is_number(str(value)) for value in values):
        return None  # numbers are lengths rather than words, unless their name says so
    return names[0]


def _language(table: Table) -> tuple[str, str]:
    """Return the code of the spoken language, and how it was determined.

    Raises:
        LoraError: If it cannot be determined.
    """
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    for column in table.columns:
        values = {str(row.get(column.name) or "").lower()[:2] for row in table.rows}
        if LANGUAGE_NAME.fullmatch(column.name) and len(values) == 1 and values <= set(LANGUAGES):
            return values.pop(), f"as `{column.name}` says"
    texts = " ".join(
        str(row.get(column.name) or "")
        for row in table.rows[:SAMPLE]
        for column in table.columns
        if TEXT_NAME.fullmatch(column.name)
    )
    if texts.isascii():
        return "en", "a guess, by its letters: name the language that is spoken"
    raise LoraError(
        "the model needs to know which language is spoken",
        table.place,
        f"add a column `language` with its code to the {counted(len(table.rows), 'row')}, or write "
        "the recipe with `task.language`",
    )
