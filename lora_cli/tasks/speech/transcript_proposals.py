"""Rows of a recording with what is said in it, for `lora init`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_cli.data.media_folder import SAMPLE, are_media
from lora_cli.errors import LoraError, counted
from lora_cli.tasks.proposal import BaseFacts, Certainty, Proposal, Table, proposed

TEXT_NAME = re.compile(
    r"(?i)text|transcripts?|transcriptions?|sentence|utterance|(raw|normali[sz]ed)_(text|transcription)"
    r"|words|said|target|txt"
)
LANGUAGE_NAME = re.compile(r"(?i)language|lang|locale")
# where a part of a recording begins, in a table of parts
BEGINNING_NAME = re.compile(
    r"(?i)(segment_?)?(start|begin|onset|offset)(_?(time|seconds?|secs?|s|ms|samples?|frames?))?"
)
AUDIO, TEXT = "audio", "text"  # the columns of a folder of recordings


def propose_recordings(table: Table, base: BaseFacts) -> Proposal | None:
    """Return which transcript of a recording a table has; see `Task.propose`."""
    if base.speaker_size is not None:
        return None  # it speaks
    if table.media == "image" or not (table.media == "audio" or base.hears):
        return None
    return proposed(lambda: _of_recordings(table, base), Certainty.ONLY)


def _of_recordings(table: Table, base: BaseFacts) -> Proposal:
    """Return the task of rows with a recording and a text.

    Raises:
        LoraError: If no column holds recordings, or none their text, or the model hears nothing.
    """
    place, names = table.place, [column.name for column in table.columns]
    is_folder = table.media == "audio"
    if not base.hears:
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
    text = table.text or text_column_of([name for name in names if name != audio], is_folder)
    if text is None and is_folder:
        what = f"the recordings of {place} have no texts next to them"
        hint = "write what is said in `a.wav` into `a.txt`, or list all in metadata.csv: "
        raise LoraError(what, place, f"{hint}file_name,text")
    if text is None:
        what = "no column is by its name what is said"
        raise LoraError(what, place, f"name it: `--text COLUMN`; {listed}")
    keys = {"type": "speech_recognition", "audio_column": audio, "text_column": text}
    why = {
        "audio_column": "the recordings" if is_folder else "recordings, or paths of such",
        "text_column": "chosen by you" if table.text else "by its name",
    }
    if is_folder:
        why["text_column"] = "the text files next to them"
    for key, usual in (("audio_column", AUDIO), ("text_column", TEXT)):
        if keys[key] == usual:
            del keys[key]
    if base.hears_languages:
        keys["language"], why["language"] = _language(table)
    if base.lacks_letters:
        why[""] = "the model was only pretrained: its letters will be those of the transcripts"
    used = (audio, text)
    left_out = {name: "not needed" for name in names if name not in used}
    return Proposal(keys, why, [audio, text], None, left_out, limits={})


def require_whole_recordings(table: Table, audio: str) -> None:
    """Check that rows are whole recordings, and no parts that begin where another column says.

    Raises:
        LoraError: If they are parts.
    """
    values = [str(row.get(audio)) for row in table.rows[:SAMPLE]]
    beginnings = [c.name for c in table.columns if BEGINNING_NAME.fullmatch(c.name)]
    if beginnings and len(set(values)) < len(values):
        what = f"the rows are parts of recordings, which begin where `{beginnings[0]}` says"
        hint = "a recording is read whole: write each part into a file of its own, for example "
        raise LoraError(what, table.place, f"{hint}with `ffmpeg -ss START -to END`, and name that")


def text_column_of(names: Sequence[str], is_folder: bool) -> str | None:
    """Return the column of what is said, by its name, or the only one that there is.

    Args:
        names: Of the columns besides that of the recordings.
        is_folder: Whether the rows are files, whose folders' names are a column that is no text.
    """
    named = [name for name in names if TEXT_NAME.fullmatch(name)]
    if named:
        return named[0]
    return names[0] if len(names) == 1 and not is_folder else None


def _language(table: Table) -> tuple[str, str]:
    """Return the language that is spoken, and how it is known.

    Raises:
        LoraError: If it is not known.
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
