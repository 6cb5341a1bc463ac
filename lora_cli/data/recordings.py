"""Recordings as files hold them, and as a model hears them: one channel, at the model's own rate.

Files are read by soundfile (libsndfile): wav, flac, mp3, ogg (Vorbis or Opus), aiff, au. Several
channels become their mean, and another sampling rate is converted by soxr. libsndfile reads what is
left of many files that were cut off, and says nothing: how long they claim to be is checked here.
"""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.media import media_hash
from lora_cli.errors import LoraError, printable
from lora_cli.git_lfs import POINTER, POINTS

Samples = NDArray[np.float32]
LongAudio = Literal["silence", "windows"]

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "MP3", "OGG", "AIFF", "AU")
KNOWN = "wav, flac, mp3, ogg, opus, aiff and au are"
MOST_HOURS = 12  # of one file, as its samples are in memory at once: 2.8 GB at 16 kHz
BLOCK = 1 << 20  # samples of all channels that are decoded at once
SILENT = 1e-4  # full scale is 1: three steps of 16 bits
FULL = 0.999  # of full scale: as loud as a file of whole numbers can be
CLIPPED_SHARE = 1e-3  # of the samples at full scale, from where on a recording counts as clipped
TOO_LOUD = 4.0  # times full scale: numbers that were not scaled
UNKNOWN_SIZE = 0x7FFF0000  # from here on, sizes in a header are what programs write into a pipe
# shares of the longest part, by which a recording is cut where it is quietest
QUIET = 1 / 150  # whose energy is compared: 0.2 s of 30
SEARCH = 1 / 6  # before and after equal parts' ends, where a cut may be
LEAST_SEARCH = 1 / 15  # with less room for a cut there is one part more
LINE = 120  # characters of what libsndfile says
EMBEDDED = 100_000  # bytes; larger files are written into a page as mp3
PLAYED = {"WAV": "wav", "MP3": "mpeg", "FLAC": "flac"}  # formats that every browser plays


class RecordingError(ValueError):
    """A file that cannot be read as a recording; the text says why."""


@dataclass(frozen=True)
class RecordingFacts:
    """What is known of a recording once it was decoded.

    Args:
        error: Why it cannot be used, or nothing.
        seconds: How long it is.
        rate: Samples a second, as its file has them.
        channels: How many there are.
        is_clipped: Many samples are at full scale, where louder ones were cut off.
        is_too_loud: Samples are far beyond full scale.
    """

    error: str = ""
    seconds: float = 0.0
    rate: int = 0
    channels: int = 0
    is_clipped: bool = False
    is_too_loud: bool = False


def require_audio_packages() -> None:
    """Check that recordings can be read at all.

    Raises:
        LoraError: If a package is not installed.
    """
    try:
        import soundfile  # noqa: F401
        import soxr  # noqa: F401
    except (ImportError, OSError) as error:  # the second: without libsndfile itself
        what = "recordings need the Python packages `soundfile` and `soxr`, which are missing"
        raise LoraError(what, hint="pip install 'lora-cli[audio]'") from error


def read_recording(value: dict[str, Any], rate: int) -> Samples:
    """Return the samples of a recording, in one channel; full scale is 1.

    Args:
        value: A media value: encoded bytes, or a path.
        rate: Samples a second that are wanted.

    Raises:
        RecordingError: If it cannot be read.
    """
    samples, _ = _decoded(value, rate)
    return samples


def recording_facts(value: dict[str, Any]) -> RecordingFacts:
    """Return what is known of a recording; each is decoded once in a process."""
    key = media_hash(value)
    if (found := _FACTS.get(key)) is None:
        try:
            _, found = _decoded(value, None)
        except RecordingError as error:
            found = RecordingFacts(str(error))
        _FACTS[key] = found
    return found


_FACTS: dict[str, RecordingFacts] = {}


def _bytes_of(value: dict[str, Any]) -> bytes:
    data = value["bytes"]
    try:
        raw = data if isinstance(data, bytes) else Path(value["path"]).read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RecordingError(f"cannot be read: {reason}") from error
    if not raw:
        raise RecordingError("is empty")
    return raw


def _decoded(value: dict[str, Any], rate: int | None) -> tuple[Samples, RecordingFacts]:
    """Return the samples in one channel, at a rate (None: as they are), and what is known of them.

    Raises:
        RecordingError: If the file cannot be read, or holds nothing that can be heard.
    """
    import soundfile
    import soxr

    raw = _bytes_of(value)
    if _is_cut_off(raw):
        raise RecordingError("is cut off: it ends before its header says")
    try:
        with soundfile.SoundFile(io.BytesIO(raw)) as file:
            _require_readable(file)
            own = int(file.samplerate)
            stream = None
            if rate is not None and rate != own:
                stream = soxr.ResampleStream(own, rate, 1, dtype="float32", quality="HQ")
            survey = _Survey(own, int(file.channels))
            parts: list[Samples] = []
            for block in _blocks(file):
                mono = survey.add(block)
                parts.append(mono if stream is None else stream.resample_chunk(mono))
            if stream is not None:
                parts.append(stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
            whole = survey.n_samples >= file.frames
    except (RecordingError, MemoryError):
        raise
    except soundfile.LibsndfileError as error:
        raise RecordingError(_reason(raw, str(error.error_string))) from None
    except Exception as error:  # what else damaged files lead to
        raise RecordingError(_reason(raw, str(error) or type(error).__name__)) from error
    if not whole:
        raise RecordingError("is cut off: it ends before its header says")
    return np.concatenate(parts), survey.facts()


def _require_readable(file: Any) -> None:
    if file.format not in FORMATS:
        raise RecordingError(f"is of a format that is not read, {file.format} ({KNOWN})")
    if file.frames <= 0:
        raise RecordingError("holds no samples")
    hours = file.frames / file.samplerate / 3600
    if hours > MOST_HOURS:
        raise RecordingError(f"is {hours:,.1f} hours long, and at most {MOST_HOURS} are read")


def _blocks(file: Any) -> Iterator[Samples]:
    """Yield the samples (N, channels) of an open file, a part at a time."""
    size = max(BLOCK // int(file.channels), 1)
    while len(block := file.read(size, dtype="float32", always_2d=True)):
        yield block


def _reason(raw: bytes, text: str) -> str:
    """Return in words why libsndfile cannot read a file."""
    if raw.startswith(POINTER):
        return f"is {POINTS}"
    if "ormat not recogni" in text or "File does not exist" in text:
        return f"is not a recording, or of a format that is not read ({KNOWN})"
    reason = text.strip().removeprefix("Error : ").rstrip(".")
    return f"is cut off or damaged: {printable(reason, LINE)}"


class _Survey:
    """What is learnt of the samples of a file while they pass."""

    def __init__(self, rate: int, channels: int) -> None:
        self.rate, self.channels = rate, channels
        self.n_samples = self.n_full = 0
        self.peak = 0.0  # of all channels
        self.low, self.high = np.inf, -np.inf  # of the one channel that is heard

    def add(self, block: Samples) -> Samples:
        """Return samples (N, channels) as one channel (N,).

        Raises:
            RecordingError: If one is no number.
        """
        if not np.isfinite(block).all():
            first = int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0]) + self.n_samples
            at = first / self.rate
            raise RecordingError(f"has samples that are NaN or infinity, the first at {at:.2f} s")
        mono: Samples = block[:, 0] if self.channels == 1 else block.mean(axis=1)
        loud = np.abs(block)
        self.n_samples += len(block)
        self.n_full += int((loud.max(axis=1) >= FULL).sum())
        self.peak = max(self.peak, float(loud.max()))
        self.low, self.high = min(self.low, float(mono.min())), max(self.high, float(mono.max()))
        return np.ascontiguousarray(mono, dtype=np.float32)

    def facts(self) -> RecordingFacts:
        """Return what is known at the end.

        Raises:
            RecordingError: If nothing can be heard.
        """
        if not self.n_samples:
            raise RecordingError("holds no samples")
        if _is_flat(self.low, self.high):
            if self.peak > 10 * SILENT and self.channels > 1:
                what = f"has {self.channels} channels whose mean is silence: they cancel out"
                raise RecordingError(what)
            raise RecordingError("is silent from beginning to end")
        seconds = self.n_samples / self.rate
        clipped = self.n_full / self.n_samples >= CLIPPED_SHARE and self.peak <= TOO_LOUD
        too_loud = self.peak > TOO_LOUD
        return RecordingFacts("", seconds, self.rate, self.channels, clipped, too_loud)


def is_silent(samples: Samples) -> bool:
    """Return whether nothing at all is to be heard in samples."""
    return not len(samples) or _is_flat(float(samples.min()), float(samples.max()))


def _is_flat(low: float, high: float) -> bool:
    return high - low < 2 * SILENT


# -------------------------------------------------------------------------------------- cut off


def _is_cut_off(raw: bytes) -> bool:
    """Return whether a file is shorter than its own header says, where libsndfile overlooks it."""
    if raw[:4] in (b"RIFF", b"RIFX", b"RF64") and raw[8:12] == b"WAVE":
        return _lacks_wave_data(raw)
    if raw[:4] == b"FORM":
        return _is_less(len(raw) - 8, int.from_bytes(raw[4:8], "big"))
    if raw[:4] == b".snd":
        start, size = int.from_bytes(raw[4:8], "big"), int.from_bytes(raw[8:12], "big")
        return _is_less(len(raw) - start, size)
    if raw[:4] == b"OggS":
        return _lacks_page(raw)
    return _lacks_frames(raw)


def _is_less(available: int, claimed: int) -> bool:
    return claimed < UNKNOWN_SIZE and available + 1 < claimed  # 1: the byte that pads an odd size


def _lacks_wave_data(raw: bytes) -> bool:
    """Return whether the samples of a wav file are not all there.

    RIFX has the largest byte of a number first. RF64 has sizes of 64 bits in a part of their own.
    """
    order: Literal["little", "big"] = "big" if raw[:4] == b"RIFX" else "little"
    place, whole = 12, None
    while place + 8 <= len(raw):
        size = int.from_bytes(raw[place + 4 : place + 8], order)
        if raw[place : place + 4] == b"ds64":
            whole = int.from_bytes(raw[place + 16 : place + 24], order)
        if raw[place : place + 4] == b"data":
            if whole is not None and size == 0xFFFFFFFF:
                return len(raw) - place - 8 + 1 < whole
            return _is_less(len(raw) - place - 8, size)
        place += 8 + size + size % 2
    return False


def _lacks_page(raw: bytes) -> bool:
    """Return whether the last page of an ogg file is not all there."""
    last = raw[raw.rfind(b"OggS") :]
    if len(last) < 27:
        return True
    return len(last) < 27 + last[26] + sum(last[27 : 27 + last[26]])


def _lacks_frames(raw: bytes) -> bool:
    """Return whether an mp3 file is shorter than its own table of contents (Xing, Info) says."""
    start = 0
    if raw[:3] == b"ID3":
        start = 10 + functools.reduce(lambda size, byte: size << 7 | byte & 127, raw[6:10], 0)
    if raw[start : start + 1] != b"\xff":
        return False
    table = re.search(rb"(?:Xing|Info)(.{4})(.*)", raw[start : start + 200], re.DOTALL)
    if table is None:
        return False
    flags = int.from_bytes(table[1], "big")
    if not flags & 2:
        return False
    place = 4 * (flags & 1)
    claimed = int.from_bytes(table[2][place : place + 4], "big")
    return len(raw) - start < 0.99 * claimed


# ---------------------------------------------------------------------------------------- parts


def divide(samples: Samples, rate: int, longest: float, how: LongAudio) -> list[tuple[int, int]]:
    """Return where the parts of a recording begin and end, none of them longer than allowed.

    Args:
        samples: Of one channel.
        rate: Samples a second.
        longest: Of a part, in seconds.
        how: `windows` divides it into as few equal parts as possible; `silence` cuts as near to
            these places as it is quietest.
    """
    most = int(longest * rate)
    parts: list[tuple[int, int]] = []
    start = 0
    while len(samples) - start > most:
        left = len(samples) - start
        n_parts = -(-left // most)
        if how == "windows":
            stop = start + -(-left // n_parts)
        else:
            stop = start + _quiet_place(samples[start : start + most], left, n_parts)
        parts.append((start, stop))
        start = stop
    return [*parts, (start, len(samples))]


def _quiet_place(samples: Samples, left: int, n_parts: int) -> int:
    """Return where to cut, so that what is left fits into the other parts.

    Args:
        samples: As many as the longest part may have.
        left: Samples that are left, with these.
        n_parts: How many parts are needed at least.
    """
    most = len(samples)
    earliest = left - (n_parts - 1) * most
    if most - earliest < LEAST_SEARCH * most:
        n_parts, earliest = n_parts + 1, left - n_parts * most
    middle, reach = left / n_parts, SEARCH * most
    first = int(max(earliest, middle - reach, 1))
    last = int(min(most, middle + reach))
    width = max(int(QUIET * most), 1)
    energy = np.cumsum(np.square(samples[first:last], dtype=np.float64))
    if len(energy) <= width:
        return (first + last) // 2
    return first + width // 2 + int(np.argmin(energy[width:] - energy[:-width]))


# ------------------------------------------------------------------------------------- on a page


def playable(value: dict[str, Any], longest: float) -> str | None:
    """Return a recording as a `data:` address that a page can play, or None if it cannot be read.

    Args:
        value: A media value.
        longest: How many seconds are kept of it, if it has to be written anew.
    """
    import soundfile

    try:
        raw = _bytes_of(value)
        with soundfile.SoundFile(io.BytesIO(raw)) as file:
            kind = PLAYED.get(file.format)
            whole = len(raw) <= EMBEDDED and kind and file.subtype not in ("FLOAT", "DOUBLE")
        if not whole:
            raw, kind = _as_mp3(read_recording(value, 16_000)[: int(longest * 16_000)]), "mpeg"
    except (RecordingError, soundfile.LibsndfileError, ValueError):
        return None
    return f"data:audio/{kind};base64,{base64.b64encode(raw).decode()}"


def _as_mp3(samples: Samples) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples.clip(-1, 1), 16_000, format="MP3")
    return file.getvalue()
