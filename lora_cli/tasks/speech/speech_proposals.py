"""Proposal of a text-to-speech task for `lora init`, from rows of texts with recordings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_cli.data.media_folder import SAMPLE, are_media
from lora_cli.errors import LoraError
from lora_cli.tasks.proposal import BaseFacts, Certainty, Proposal, Table, proposed
from lora_cli.tasks.speech.speakers import SpeakerError, parse_vector
from lora_cli.tasks.speech.transcript_proposals import require_whole_recordings, text_column_of

DEFAULT_COLUMNS = {"text_column": "text", "audio_column": "audio"}


def propose_speech(table: Table, base: BaseFacts) -> Proposal | None:
    """Propose text-to-speech if the base is a speech synthesis model; see `Task.propose`."""
    if base.speaker_size is None:
        return None
    return proposed(lambda: _propose_task(table, base), Certainty.ONLY)


def _propose_task(table: Table, base: BaseFacts) -> Proposal:
    """Propose the task of rows that hold a text, a speaker embedding and a recording.

    Raises:
        LoraError: If one of the three columns is missing.
    """
    place, names = table.place, [column.name for column in table.columns]
    listed, rows = f"the columns are {', '.join(names)}", table.rows[:SAMPLE]
    audio = next((n for n in names if are_media([row.get(n) for row in rows])), None)
    if audio is None or table.media == "image":
        what = f"`{base.name}` learns to speak, and no column of {place} holds recordings"
        raise LoraError(what, place, f"{listed}; a recording is named by its path")
    require_whole_recordings(table, audio)
    speaker = next((n for n in names if n != audio and _are_speakers(rows, n, base)), None)
    others = [name for name in names if name not in (audio, speaker)]
    text = table.text or text_column_of(others, table.rows, table.media is not None)
    if text is None:
        what = "no column has the name of a transcript column"
        hint = f"name it: `--text COLUMN`; {listed}"
        if table.media is not None:
            what = f"the recordings of {place} have no texts next to them"
            hint = "write what is said in `a.wav` into `a.txt`, or list all in metadata.csv"
        raise LoraError(what, place, hint)
    if speaker is None:
        what = f"nothing says who speaks, by a vector of {base.speaker_size} numbers"
        hint = "add a column with a list of numbers for each row, or write the recipe with "
        raise LoraError(what, place, f"{hint}`task.speaker_embedding: speaker.npy`")
    keys = {"type": "text_to_speech", "text_column": text, "audio_column": audio}
    reasons = {
        "audio_column": "recordings, or paths of such",
        "text_column": "chosen by you" if table.text else "by its name",
        "speaker_column": f"lists of {base.speaker_size} numbers, as the model reads them",
    }
    keys = {key: name for key, name in keys.items() if DEFAULT_COLUMNS.get(key) != name}
    keys["speaker_column"] = speaker
    left_out = {name: "not needed" for name in others if name != text}
    return Proposal(keys, reasons, [text, audio, speaker], None, left_out, limits={})


def _are_speakers(rows: Sequence[dict[str, Any]], name: str, base: BaseFacts) -> bool:
    """Return whether a column holds a speaker embedding in each row."""
    try:
        for row in rows:
            parse_vector(row.get(name), base.speaker_size)
    except SpeakerError:
        return False
    return bool(rows)
