"""Recordings of every format, and those that are silent, empty, cut off or no recordings at all."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from tiny_speech import RATE, encoded, sound

from lora_cli.data.recordings import (
    RecordingError,
    divide,
    is_silent,
    playable,
    read_recording,
    recording_facts,
    require_audio_packages,
)
from lora_cli.errors import LoraError

SOUND = sound(1, 0.6)
LOSSLESS = [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"),
            ("AIFF", "PCM_16"), ("AU", "PCM_16")]  # fmt: skip
LOSSY = [("WAV", "ULAW"), ("WAV", "PCM_U8"), ("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS")]


def media(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": None}


@pytest.mark.parametrize(("format", "subtype"), LOSSLESS)
def test_what_is_heard_is_what_was_written(format: str, subtype: str) -> None:
    found = read_recording(media(encoded(SOUND, RATE, format, subtype)), RATE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, SOUND, atol=1 / 2**15)


@pytest.mark.parametrize(("format", "subtype"), LOSSY)
def test_a_lossy_recording_is_nearly_what_was_written(format: str, subtype: str | None) -> None:
    data = encoded(SOUND, RATE, format, subtype)
    found = read_recording(media(data), RATE)
    wanted, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.corrcoef(found, SOUND[: len(found)])[0, 1] > 0.7


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_another_rate_is_converted_as_soxr_does_it(rate: int) -> None:
    samples = sound(2, 0.5, rate)
    found = read_recording(media(encoded(samples, rate, "WAV", "FLOAT")), RATE)
    np.testing.assert_allclose(found, soxr.resample(samples, rate, RATE), atol=1e-6)
    assert recording_facts(media(encoded(samples, rate))).rate == rate


def test_a_long_file_is_converted_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = sound(3, 1.0, 22_050, channels=2)
    data = media(encoded(samples, 22_050, "WAV", "FLOAT"))
    whole = read_recording(data, RATE)
    monkeypatch.setattr("lora_cli.data.recordings.BLOCK", 777)
    np.testing.assert_allclose(read_recording(data, RATE), whole, atol=1e-6)


@pytest.mark.parametrize("channels", [2, 6])
def test_several_channels_become_their_mean(channels: int) -> None:
    samples = sound(4, 0.3, channels=channels)
    found = read_recording(media(encoded(samples, RATE, "WAV", "FLOAT")), RATE)
    np.testing.assert_allclose(found, samples.mean(axis=1), atol=1e-6)
    assert recording_facts(media(encoded(samples))).channels == channels


ALL = [*LOSSLESS, *LOSSY]


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
@pytest.mark.parametrize(("format", "subtype"), ALL)
def test_a_file_that_is_cut_off_is_never_heard_half(
    format: str, subtype: str | None, share: float
) -> None:
    data = encoded(sound(5, 2.0), RATE, format, subtype)
    with pytest.raises(RecordingError, match="is cut off"):
        read_recording(media(data[: int(share * len(data))]), RATE)


def test_sizes_that_programs_write_into_a_pipe_are_no_lengths() -> None:
    data = bytearray(encoded(SOUND, RATE, "WAV", "PCM_16"))
    place = data.index(b"data") + 4
    for size in (0xFFFFFFFF, 0x7FFFFFFF):
        data[place : place + 4] = size.to_bytes(4, "little")
        assert recording_facts(media(bytes(data))).error == ""


def floats(samples: Any) -> bytes:
    return encoded(np.asarray(samples, dtype=np.float32), RATE, "WAV", "FLOAT")


def with_nan(value: float) -> bytes:
    samples = SOUND.copy()
    samples[4_000] = value
    return floats(samples)


UNUSABLE = {
    "nothing": (b"", "is empty"),
    "no samples": (floats(np.zeros(0)), "holds no samples"),
    "a text": (b"no recording at all, but some words" * 20, "is not a recording"),
    "a page of the web": (b"<!DOCTYPE html><html>404</html>" * 9, "is not a recording"),
    "an m4a": (b"\0\0\0\x20ftypM4A " + bytes(200), "is not a recording, or of a format"),
    "zeros": (floats(np.zeros(5_000)), "is silent"),
    "an offset": (floats(np.full(5_000, 0.2)), "is silent"),
    "the noise of one bit": (floats(np.resize([0.0, 1 / 2**15], 5_000)), "is silent"),
    "opposite channels": (floats(np.stack([SOUND, -SOUND], 1)), "they cancel out"),
    "NaN": (with_nan(np.nan), r"NaN or infinity, the first at 0\.25 s"),
    "infinity": (with_nan(np.inf), r"NaN or infinity, the first at 0\.25 s"),
    "another format": (encoded(SOUND, RATE, "W64"), "of a format that is not read, W64"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_is_said_of(name: str) -> None:
    data, wanted = UNUSABLE[name]
    with pytest.raises(RecordingError, match=wanted):
        read_recording(media(data), RATE)
    assert re.search(wanted, recording_facts(media(data)).error)


def test_a_file_of_days_is_rejected_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_cli.data.recordings.MOST_HOURS", 0.0001)
    with pytest.raises(RecordingError, match="hours long, and at most"):
        read_recording(media(encoded(SOUND)), RATE)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="cannot be read: is a directory"):
        read_recording({"bytes": None, "path": str(tmp_path)}, RATE)


@pytest.mark.parametrize(
    ("samples", "is_clipped", "is_too_loud"),
    [
        (SOUND, False, False),
        (np.clip(20 * SOUND, -1, 1), True, False),
        (SOUND / np.abs(SOUND).max(), False, False),  # as loud as can be, which is no clipping
        (30_000 * SOUND, False, True),
    ],
)
def test_clipped_and_unscaled_samples_are_noted(
    samples: Any, is_clipped: bool, is_too_loud: bool
) -> None:
    facts = recording_facts(media(floats(samples)))
    assert (facts.error, facts.is_clipped, facts.is_too_loud) == ("", is_clipped, is_too_loud)


@pytest.mark.parametrize("how", ["silence", "windows"])
@pytest.mark.parametrize("seconds", [0.2, 1.0, 1.001, 1.7, 2.0, 2.01, 5.9, 31.0])
def test_parts_are_the_whole_and_fit_the_model(how: Any, seconds: float) -> None:
    samples = sound(6, seconds)
    parts = divide(samples, RATE, 1.0, how)
    assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
    assert parts[-1][1] == len(samples)
    lengths = [stop - start for start, stop in parts]
    assert max(lengths) <= RATE
    if len(parts) > 1:
        assert min(lengths) > RATE // 4  # of a short rest, models write what nobody said
    if how == "windows":
        assert len(parts) == -(-len(samples) // RATE)


def test_a_cut_is_where_it_is_quietest() -> None:
    samples = sound(7, 1.6)
    samples[12_000:12_200] *= 0.001
    ((_, cut), _) = divide(samples, RATE, 1.0, "silence")
    assert 12_000 < cut < 12_200
    assert not is_silent(samples)
    assert is_silent(samples[:0])


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (encoded(SOUND, RATE, "WAV", "PCM_16"), "wav"),
        (encoded(SOUND, RATE, "FLAC"), "flac"),
        (encoded(SOUND, RATE, "MP3"), "mpeg"),
        (floats(SOUND), "mpeg"),  # which browsers do not play everywhere
        (encoded(SOUND, RATE, "OGG", "VORBIS"), "mpeg"),
        (encoded(sound(8, 20.0), RATE, "WAV", "PCM_16"), "mpeg"),  # too large as it is
    ],
    ids=["wav", "flac", "mp3", "floats", "ogg", "long wav"],
)
def test_a_page_gets_a_small_recording_that_it_can_play(data: bytes, kind: str) -> None:
    address = playable(media(data), 10.0)
    assert address is not None
    head, _, body = address.partition(",")
    assert head == f"data:audio/{kind};base64"
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(body)))
    seconds = recording_facts(media(data)).seconds
    assert len(heard) / rate == pytest.approx(min(seconds, 10.0), abs=0.1)
    assert len(body) < 140_000


def test_a_page_gets_nothing_of_what_cannot_be_read() -> None:
    assert playable(media(b"no recording"), 10.0) is None


def test_packages_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(LoraError, match=r"soxr[\s\S]*lora-cli\[audio\]"):
        require_audio_packages()
