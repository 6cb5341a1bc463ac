"""Decode audio files to what a model hears: one channel, at the sampling rate of the model.

Files are read by soundfile (libsndfile): wav, flac, mp3, ogg (Vorbis or Opus), aiff, au. Channels
are averaged, and soxr converts the sampling rate. libsndfile silently reads many truncated files as
far as they go, so their length is checked here against their headers.
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
KNOWN_FORMATS = "wav, flac, mp3, ogg, opus, aiff and au are"
MAX_HOURS = 12  # hours per file, whose samples are all in memory: 2.8 GB at 16 kHz
BLOCK = 1 << 20  # samples of all channels decoded at once
SILENCE = 1e-4  # relative to full scale 1: three steps of 16 bits
FULL_SCALE = 0.999  # relative to full scale: the maximum in integer formats
CLIPPED_SHARE = 1e-3  # share of samples at full scale in a clipped recording
TOO_LOUD = 4.0  # times full scale: samples that were not normalised
UNKNOWN_SIZE = 0x7FFF0000  # larger sizes in a header are placeholders, written to pipes
# how to split a recording where it is quietest, in shares of the maximum part length
QUIET_WINDOW = 1 / 150  # window whose energy is compared: 0.2 s for parts of 30 s
SEARCH = 1 / 6  # search range before and after the end of equal parts
MIN_SEARCH = 1 / 15  # if the range is smaller, use one more part
MAX_MESSAGE = 120  # maximum characters of libsndfile's message
MAX_EMBEDDED = 100_000  # bytes; larger files are embedded in a page as mp3
BROWSER_FORMATS = {
    "WAV": "wav",
    "MP3": "mpeg",
    "FLAC": "flac",
}  # formats that every browser can play


class RecordingError(ValueError):
    """A file cannot be read as a recording; the message says why."""


@dataclass(frozen=True)
class RecordingFacts:
    """Properties of a decoded recording.

    Args:
        error: Why it cannot be used; empty if it can.
        seconds: Duration in seconds.
        rate: Sampling rate of the file in Hz.
        channels: Number of channels.
        is_clipped: Whether many samples are clipped at full scale.
        is_too_loud: Whether samples are far beyond full scale.
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
    except (ImportError, OSError) as error:  # OSError if libsndfile itself is missing
        what = "recordings need the Python packages `soundfile` and `soxr`, which are missing"
        raise LoraError(what, hint="pip install 'lora-cli[audio]'") from error


def read_recording(value: dict[str, Any], rate: int) -> Samples:
    """Decode a recording to samples of one channel (N,), with full scale 1.

    Args:
        value: A media value: encoded bytes, or a path.
        rate: Requested sampling rate in Hz.

    Raises:
        RecordingError: If it cannot be read.
    """
    samples, _ = _decoded(value, rate)
    return samples


def recording_facts(value: dict[str, Any]) -> RecordingFacts:
    """Return the properties of a recording, which is decoded once per process."""
    key = media_hash(value)
    if (facts := _FACTS.get(key)) is None:
        try:
            _, facts = _decoded(value, None)
        except RecordingError as error:
            facts = RecordingFacts(str(error))
        _FACTS[key] = facts
    return facts


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
    """Return samples of one channel (N,) at a rate in Hz (None: unchanged), and their properties.

    Raises:
        RecordingError: If the file cannot be read, or is silent.
    """
    import soundfile
    import soxr

    raw = _bytes_of(value)
    if _is_cut_off(raw):
        raise RecordingError("is cut off: it ends before its header says")
    try:
        with soundfile.SoundFile(io.BytesIO(raw)) as file:
            _require_readable(file)
            file_rate = int(file.samplerate)
            stream = None
            if rate is not None and rate != file_rate:
                stream = soxr.ResampleStream(file_rate, rate, 1, dtype="float32", quality="HQ")
            statistics = _Statistics(file_rate, int(file.channels))
            parts: list[Samples] = []
            for block in _blocks(file):
                mono = statistics.add(block)
                parts.append(mono if stream is None else stream.resample_chunk(mono))
            if stream is not None:
                parts.append(stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
            is_complete = statistics.n_samples >= file.frames
    except (RecordingError, MemoryError):
        raise
    except soundfile.LibsndfileError as error:
        raise RecordingError(_reason(raw, str(error.error_string))) from None
    except Exception as error:  # other errors caused by damaged files
        raise RecordingError(_reason(raw, str(error) or type(error).__name__)) from error
    if not is_complete:
        raise RecordingError("is cut off: it ends before its header says")
    return np.concatenate(parts), statistics.facts()


def _require_readable(file: Any) -> None:
    if file.format not in FORMATS:
        raise RecordingError(f"is of a format that is not read, {file.format} ({KNOWN_FORMATS})")
    if file.frames <= 0:
        raise RecordingError("holds no samples")
    hours = file.frames / file.samplerate / 3600
    if hours > MAX_HOURS:
        raise RecordingError(f"is {hours:,.1f} hours long, and at most {MAX_HOURS} are read")


def _blocks(file: Any) -> Iterator[Samples]:
    """Yield the samples (N, channels) of an open file in blocks."""
    size = max(BLOCK // int(file.channels), 1)
    while len(block := file.read(size, dtype="float32", always_2d=True)):
        yield block


def _reason(raw: bytes, text: str) -> str:
    """Explain why libsndfile cannot read a file."""
    if raw.startswith(POINTER):
        return f"is {POINTS}"
    if "ormat not recogni" in text or "File does not exist" in text:
        return f"is not a recording, or of a format that is not read ({KNOWN_FORMATS})"
    reason = text.strip().removeprefix("Error : ").rstrip(".")
    return f"is cut off or damaged: {printable(reason, MAX_MESSAGE)}"


class _Statistics:
    """Collects statistics of the samples of a file, block by block."""

    def __init__(self, rate: int, channels: int) -> None:
        self.rate, self.channels = rate, channels
        self.n_samples = self.n_full = 0
        self.peak = 0.0  # over all channels
        self.low, self.high = np.inf, -np.inf  # of the mean over channels

    def add(self, block: Samples) -> Samples:
        """Add a block of samples (N, channels), and return it as one channel (N,).

        Raises:
            RecordingError: If a sample is NaN or infinite.
        """
        if not np.isfinite(block).all():
            first = int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0]) + self.n_samples
            seconds = first / self.rate
            raise RecordingError(
                f"has samples that are NaN or infinity, the first at {seconds:.2f} s"
            )
        mono: Samples = block[:, 0] if self.channels == 1 else block.mean(axis=1)
        loud = np.abs(block)
        self.n_samples += len(block)
        self.n_full += int((loud.max(axis=1) >= FULL_SCALE).sum())
        self.peak = max(self.peak, float(loud.max()))
        self.low, self.high = min(self.low, float(mono.min())), max(self.high, float(mono.max()))
        return np.ascontiguousarray(mono, dtype=np.float32)

    def facts(self) -> RecordingFacts:
        """Return the properties of the recording, once all blocks are added.

        Raises:
            RecordingError: If the recording is silent.
        """
        if not self.n_samples:
            raise RecordingError("holds no samples")
        if _is_flat(self.low, self.high):
            if self.peak > 10 * SILENCE and self.channels > 1:
                what = f"has {self.channels} channels whose mean is silence: they cancel out"
                raise RecordingError(what)
            raise RecordingError("is silent from beginning to end")
        seconds = self.n_samples / self.rate
        clipped = self.n_full / self.n_samples >= CLIPPED_SHARE and self.peak <= TOO_LOUD
        too_loud = self.peak > TOO_LOUD
        return RecordingFacts("", seconds, self.rate, self.channels, clipped, too_loud)


def is_silent(samples: Samples) -> bool:
    """Return whether samples are silent."""
    return not len(samples) or _is_flat(float(samples.min()), float(samples.max()))


def _is_flat(low: float, high: float) -> bool:
    return high - low < 2 * SILENCE


# -------------------------------------------------------------------------------------- cut off


def _is_cut_off(raw: bytes) -> bool:
    """Return whether a file is shorter than its header says, which libsndfile may ignore."""
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
    return claimed < UNKNOWN_SIZE and available + 1 < claimed  # 1 for the byte that pads odd sizes


def _lacks_wave_data(raw: bytes) -> bool:
    """Return whether a wav file is missing samples.

    RIFX is big-endian. RF64 has 64-bit sizes in a separate chunk.
    """
    order: Literal["little", "big"] = "big" if raw[:4] == b"RIFX" else "little"
    offset, data_size = 12, None
    while offset + 8 <= len(raw):
        size = int.from_bytes(raw[offset + 4 : offset + 8], order)
        if raw[offset : offset + 4] == b"ds64":
            data_size = int.from_bytes(raw[offset + 16 : offset + 24], order)
        if raw[offset : offset + 4] == b"data":
            if data_size is not None and size == 0xFFFFFFFF:
                return len(raw) - offset - 8 + 1 < data_size
            return _is_less(len(raw) - offset - 8, size)
        offset += 8 + size + size % 2
    return False


def _lacks_page(raw: bytes) -> bool:
    """Return whether the last page of an ogg file is incomplete."""
    last = raw[raw.rfind(b"OggS") :]
    if len(last) < 27:
        return True
    return len(last) < 27 + last[26] + sum(last[27 : 27 + last[26]])


def _lacks_frames(raw: bytes) -> bool:
    """Return whether an mp3 file is shorter than its Xing or Info header says."""
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
    offset = 4 * (flags & 1)
    claimed = int.from_bytes(table[2][offset : offset + 4], "big")
    return len(raw) - start < 0.99 * claimed


# ---------------------------------------------------------------------------------------- parts


def split_recording(
    samples: Samples, rate: int, longest: float, how: LongAudio
) -> list[tuple[int, int]]:
    """Split a recording into parts of limited length, and return the (start, end) of each.

    Args:
        samples: Samples of one channel (N,).
        rate: Sampling rate in Hz.
        longest: Maximum length of a part in seconds.
        how: `windows` splits into as few equal parts as possible; `silence` splits where it is
            quietest near the ends of these parts.

    Returns:
        Start and end of each part in samples.
    """
    max_samples = int(longest * rate)
    parts: list[tuple[int, int]] = []
    start = 0
    while len(samples) - start > max_samples:
        left = len(samples) - start
        n_parts = -(-left // max_samples)
        if how == "windows":
            stop = start + -(-left // n_parts)
        else:
            stop = start + _quiet_place(samples[start : start + max_samples], left, n_parts)
        parts.append((start, stop))
        start = stop
    return [*parts, (start, len(samples))]


def _quiet_place(samples: Samples, left: int, n_parts: int) -> int:
    """Return where to split, so that the remaining samples fit into the remaining parts.

    Args:
        samples: The next samples, as many as a part may have at most.
        left: Number of remaining samples, including these.
        n_parts: Minimum number of parts for the remaining samples.
    """
    max_samples = len(samples)
    earliest = left - (n_parts - 1) * max_samples
    if max_samples - earliest < MIN_SEARCH * max_samples:
        n_parts, earliest = n_parts + 1, left - n_parts * max_samples
    middle, margin = left / n_parts, SEARCH * max_samples
    first = int(max(earliest, middle - margin, 1))
    last = int(min(max_samples, middle + margin))
    width = max(int(QUIET_WINDOW * max_samples), 1)
    energy = np.cumsum(np.square(samples[first:last], dtype=np.float64))
    if len(energy) <= width:
        return (first + last) // 2
    return first + width // 2 + int(np.argmin(energy[width:] - energy[:-width]))


# ------------------------------------------------------------------------------------- on a page


def playable_url(value: dict[str, Any], longest: float) -> str | None:
    """Return a recording as a `data:` URL that a page can play; None if it cannot be read.

    Args:
        value: A media value.
        longest: Maximum length in seconds, if the recording must be re-encoded.
    """
    import soundfile

    try:
        raw = _bytes_of(value)
        with soundfile.SoundFile(io.BytesIO(raw)) as file:
            kind = BROWSER_FORMATS.get(file.format)
            as_is = len(raw) <= MAX_EMBEDDED and kind and file.subtype not in ("FLOAT", "DOUBLE")
        if not as_is:
            raw, kind = _as_mp3(read_recording(value, 16_000)[: int(longest * 16_000)]), "mpeg"
    except (RecordingError, soundfile.LibsndfileError, ValueError):
        return None
    return f"data:audio/{kind};base64,{base64.b64encode(raw).decode()}"


def _as_mp3(samples: Samples) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples.clip(-1, 1), 16_000, format="MP3")
    return file.getvalue()
