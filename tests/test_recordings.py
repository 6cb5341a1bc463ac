"""Decoding of recordings in every format, and errors for silent, empty and truncated files."""

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

from lora_cli.data import recordings
from lora_cli.data.recordings import (
    RecordingError,
    is_silent,
    playable_url,
    read_recording,
    recording_facts,
    require_audio_packages,
    split_recording,
)
from lora_cli.errors import LoraError

SOUND = sound(1, 0.6)
LOSSLESS = [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"),
            ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("RF64", "PCM_16")]  # fmt: skip
LOSSY = [("WAV", "ULAW"), ("WAV", "PCM_U8"), ("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS")]


def media(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": None}


@pytest.mark.parametrize(("format", "subtype"), LOSSLESS)
def test_lossless_formats_decode_to_the_written_samples(format: str, subtype: str) -> None:
    result = read_recording(media(encoded(SOUND, RATE, format, subtype)), RATE)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, SOUND, atol=1 / 2**15)


@pytest.mark.parametrize(("format", "subtype"), LOSSY)
def test_lossy_formats_decode_to_nearly_the_written_samples(
    format: str, subtype: str | None
) -> None:
    data = encoded(SOUND, RATE, format, subtype)
    result = read_recording(media(data), RATE)
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert np.corrcoef(result, SOUND[: len(result)])[0, 1] > 0.7


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_another_sampling_rate_is_converted_like_soxr(rate: int) -> None:
    samples = sound(2, 0.5, rate)
    result = read_recording(media(encoded(samples, rate, "WAV", "FLOAT")), RATE)
    np.testing.assert_allclose(result, soxr.resample(samples, rate, RATE), atol=1e-6)
    assert recording_facts(media(encoded(samples, rate))).rate == rate


def test_a_long_file_is_converted_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = sound(3, 1.0, 22_050, channels=2)
    data = media(encoded(samples, 22_050, "WAV", "FLOAT"))
    whole = read_recording(data, RATE)
    monkeypatch.setattr("lora_cli.data.recordings.BLOCK", 777)
    np.testing.assert_allclose(read_recording(data, RATE), whole, atol=1e-6)


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_averaged(channels: int) -> None:
    samples = sound(4, 0.3, channels=channels)
    result = read_recording(media(encoded(samples, RATE, "WAV", "FLOAT")), RATE)
    np.testing.assert_allclose(result, samples.mean(axis=1), atol=1e-6)
    assert recording_facts(media(encoded(samples))).channels == channels


ALL = [*LOSSLESS, *LOSSY]


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
@pytest.mark.parametrize(("format", "subtype"), ALL)
def test_a_truncated_file_is_never_read_partly(
    format: str, subtype: str | None, share: float
) -> None:
    data = encoded(sound(5, 2.0), RATE, format, subtype)
    with pytest.raises(RecordingError, match="is cut off"):
        read_recording(media(data[: int(share * len(data))]), RATE)


def test_placeholder_sizes_written_to_pipes_are_ignored() -> None:
    data = bytearray(encoded(SOUND, RATE, "WAV", "PCM_16"))
    place = data.index(b"data") + 4
    for size in (0xFFFFFFFF, 0x7FFFFFFF):
        data[place : place + 4] = size.to_bytes(4, "little")
        assert recording_facts(media(bytes(data))).error == ""


def test_a_truncated_big_endian_wav_file_is_never_read_partly() -> None:
    file = io.BytesIO()
    soundfile.write(file, SOUND, RATE, format="WAV", subtype="PCM_16", endian="BIG")
    data = file.getvalue()
    assert data[:4] == b"RIFX"
    np.testing.assert_allclose(read_recording(media(data), RATE), SOUND, atol=1 / 2**15)
    with pytest.raises(RecordingError, match="is cut off"):
        read_recording(media(data[: len(data) // 2]), RATE)


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
def test_the_error_of(name: str) -> None:
    data, expected = UNUSABLE[name]
    with pytest.raises(RecordingError, match=expected):
        read_recording(media(data), RATE)
    facts = recording_facts(media(data))
    assert re.search(expected, facts.error)
    assert (facts.seconds, facts.rate, facts.channels) == (0, 0, 0)
    assert (facts.is_clipped, facts.is_too_loud) == (False, False)


def test_a_file_of_days_is_rejected_because_of_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_cli.data.recordings.MAX_HOURS", 0.0001)
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
        (SOUND / np.abs(SOUND).max(), False, False),  # the maximum level, without clipping
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
def test_parts_cover_the_recording_and_fit_the_model(how: Any, seconds: float) -> None:
    samples = sound(6, seconds)
    parts = split_recording(samples, RATE, 1.0, how)
    assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
    assert parts[-1][1] == len(samples)
    lengths = [stop - start for start, stop in parts]
    assert max(lengths) <= RATE
    if len(parts) > 1:
        assert min(lengths) > RATE // 4  # from a short remainder, models hallucinate text
    if how == "windows":
        assert len(parts) == -(-len(samples) // RATE)


def test_a_recording_is_split_where_it_is_quietest() -> None:
    samples = sound(7, 1.6)
    samples[12_000:12_200] *= 0.001
    ((_, cut), _) = split_recording(samples, RATE, 1.0, "silence")
    assert 12_000 < cut < 12_200
    assert not is_silent(samples)
    assert is_silent(samples[:0])


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (encoded(SOUND, RATE, "WAV", "PCM_16"), "wav"),
        (encoded(SOUND, RATE, "FLAC"), "flac"),
        (encoded(SOUND, RATE, "MP3"), "mpeg"),
        (floats(SOUND), "mpeg"),  # a format that not all browsers can play
        (encoded(SOUND, RATE, "OGG", "VORBIS"), "mpeg"),
        (encoded(sound(8, 20.0), RATE, "WAV", "PCM_16"), "mpeg"),  # too large to embed unchanged
    ],
    ids=["wav", "flac", "mp3", "floats", "ogg", "long wav"],
)
def test_pages_embed_small_playable_recordings(data: bytes, kind: str) -> None:
    address = playable_url(media(data), 10.0)
    assert address is not None
    head, _, body = address.partition(",")
    assert head == f"data:audio/{kind};base64"
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(body)))
    seconds = recording_facts(media(data)).seconds
    assert len(heard) / rate == pytest.approx(min(seconds, 10.0), abs=0.1)
    assert len(body) < 140_000


def test_unreadable_recordings_are_not_embedded() -> None:
    assert playable_url(media(b"no recording"), 10.0) is None


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(LoraError, match=r"soxr[\s\S]*lora-cli\[audio\]"):
        require_audio_packages()


# --------------------------------------------------------------------- headers, byte by byte


def chunk(name: bytes, body: bytes, size: int | None = None) -> bytes:
    """Return a chunk of a RIFF file, padded to an even size."""
    told = len(body) if size is None else size
    return name + told.to_bytes(4, "little") + body + b"\0" * (len(body) % 2)


def wave(*chunks: bytes, kind: bytes = b"WAVE") -> bytes:
    return b"RIFF" + b"\0\0\0\0" + kind + b"".join(chunks)


@pytest.mark.parametrize("first", [[], [chunk(b"LIST", b"abc")], [chunk(b"fmt ", b"abcd")] * 3])
@pytest.mark.parametrize(("size", "there", "cut"), [(9, 9, False), (9, 8, False), (9, 7, True)])
def test_a_wav_file_has_as_many_samples_as_its_header_says(
    first: list[bytes], size: int, there: int, cut: bool
) -> None:
    """One missing byte may be the padding of an odd size."""
    raw = wave(*first, b"data" + size.to_bytes(4, "little") + b"x" * there)
    assert recordings._is_cut_off(raw) == cut


def test_wav_files_without_samples_or_of_unknown_size_are_complete() -> None:
    assert not recordings._is_cut_off(wave(chunk(b"LIST", b"abcd")))
    assert not recordings._is_cut_off(wave(b"data" + (99).to_bytes(4, "little"), kind=b"AVI "))
    assert recordings._is_cut_off(wave(b"data" + (99).to_bytes(4, "little")))
    other = b"XXXX" + wave(b"data" + (99).to_bytes(4, "little"))[4:]
    assert not recordings._is_cut_off(other)
    # a placeholder for an unknown size
    unknown = recordings.UNKNOWN_SIZE
    for size, cut in ((unknown - 1, True), (unknown, False), (2**32 - 1, False)):
        assert recordings._is_cut_off(wave(b"data" + size.to_bytes(4, "little"))) == cut


@pytest.mark.parametrize(("missing", "cut"), [(0, False), (1, False), (2, True), (20, True)])
def test_sizes_in_the_headers_of_aiff_and_au(missing: int, cut: bool) -> None:
    body = b"AIFF" + b"x" * 300
    raw = b"FORM" + (len(body) + missing).to_bytes(4, "big") + body
    assert recordings._is_cut_off(raw) == cut
    header = b".snd" + (28).to_bytes(4, "big") + (300 + missing).to_bytes(4, "big")
    raw = header + b"\0" * (28 - len(header)) + b"x" * 300
    assert recordings._is_cut_off(raw) == cut


def page(lengths: list[int], missing: int = 0) -> bytes:
    """Return a page of an Ogg file with segments of the given lengths."""
    raw = b"OggS" + b"\0" * 22 + bytes([len(lengths), *lengths]) + b"x" * sum(lengths)
    return raw[: len(raw) - missing]


@pytest.mark.parametrize("lengths", [[5], [255, 7], [3] * 40, [0]])
def test_the_last_page_of_an_ogg_file_must_be_complete(lengths: list[int]) -> None:
    before = page([9, 9, 9])
    assert not recordings._is_cut_off(before + page(lengths))
    body = sum(lengths)
    for missing in {1, body + 1, body + len(lengths), body + len(lengths) + 1}:
        assert recordings._is_cut_off(before + page(lengths, missing))
    assert not recordings._is_cut_off(before + page([]))


def tagged(frames: bytes, size: int | None = None) -> bytes:
    """Return an mp3 file with an ID3 tag, whose size has seven bits per byte."""
    text = b"t" * (300 if size is None else size)
    told = bytes((len(text) >> shift) & 127 for shift in (21, 14, 7, 0))
    return b"ID3\x04\x00\x00" + told + text + frames


def frames(claimed: int | None, length: int, kind: bytes, flags: int, at: int) -> bytes:
    """Return mp3 frames with the given number of bytes, and a header that states a number."""
    head = b"\xff\xfb" + b"\0" * (at - 2) + kind + flags.to_bytes(4, "big")
    head += (1234).to_bytes(4, "big") if flags & 1 else b""
    head += claimed.to_bytes(4, "big") if claimed is not None else b""
    return head + b"x" * (length - len(head))


@pytest.mark.parametrize("at", [13, 36])
@pytest.mark.parametrize("kind", [b"Xing", b"Info"])
@pytest.mark.parametrize("tag", [None, 1, 300])
def test_an_mp3_file_must_be_nearly_as_long_as_its_header_says(
    tag: int | None, kind: bytes, at: int
) -> None:
    def is_cut(raw: bytes) -> bool:
        return recordings._is_cut_off(raw if tag is None else tagged(raw, tag))

    for flags in (2, 3, 15):
        assert not is_cut(frames(10_000, 9_900, kind, flags, at))
        assert is_cut(frames(10_000, 9_899, kind, flags, at))
    for flags in (0, 1, 4, 13):  # the header does not state a number of bytes
        assert not is_cut(frames(10_000, 500, kind, flags, at))
    assert not is_cut(frames(10_000, 500, b"LAME", 3, at))
    assert not is_cut(b"\0" + frames(10_000, 500, kind, 3, at))  # no frame starts there


def test_only_a_header_in_the_first_frame_counts() -> None:
    # the header must end within the first 200 bytes
    assert recordings._is_cut_off(frames(10_000, 500, b"Xing", 2, 188))
    assert not recordings._is_cut_off(frames(10_000, 500, b"Xing", 2, 189))
    assert not recordings._is_cut_off(b"")
    assert not recordings._is_cut_off(b"ID3\x04\x00\x00\x00")


# -------------------------------------------------------------------------------- statistics


def surveyed(*blocks: Any, rate: int = 100) -> Any:
    channels = np.asarray(blocks[0]).shape[1]
    survey = recordings._Statistics(rate, channels)
    heard = [survey.add(np.asarray(block, dtype=np.float32)) for block in blocks]
    return survey.facts(), np.concatenate(heard)


def test_statistics_cover_all_blocks() -> None:
    first, second = [[0.5, 0.1]] * 30 + [[1.0, 0.0]], [[-0.5, 0.3]] * 19
    facts, heard = surveyed(first, second)
    assert (facts.seconds, facts.rate, facts.channels) == (0.5, 100, 2)
    assert heard.tolist() == pytest.approx([0.3] * 30 + [0.5] + [-0.1] * 19)
    assert facts.is_clipped  # one sample in fifty is at full scale
    assert not facts.is_too_loud


def test_the_first_sample_that_is_not_finite_is_reported_with_its_time() -> None:
    bad = [[0.0, 0.1], [0.2, np.nan], [np.inf, 0.0]]
    with pytest.raises(RecordingError, match=r"the first at 0\.51 s"):
        surveyed([[0.0, 0.5]] * 50, bad)


def test_silence_and_channels_that_cancel_out() -> None:
    with pytest.raises(RecordingError, match="holds no samples"):
        recordings._Statistics(100, 1).facts()
    for block, said in (
        ([[0.5]] * 9, "is silent"), ([[0.0, 0.0]] * 9, "is silent"),
        ([[9e-4, -9e-4], [-1e-4, 1e-4]] * 9, "is silent"),
        ([[1.05e-3, -1.05e-3], [-1e-4, 1e-4]] * 9, "has 2 channels"),
        ([[0.5, -0.5], [-0.1, 0.1]] * 9, "has 2 channels whose mean is silence: they cancel out"),
    ):  # fmt: skip
        with pytest.raises(RecordingError, match=said):
            surveyed(block)
    assert is_silent(np.zeros(0, dtype=np.float32))
    assert is_silent(np.full(3, 0.25, dtype=np.float32))
    quiet = 2.5 * recordings.SILENCE
    assert not is_silent(np.array([0.0, quiet], dtype=np.float32))
    assert is_silent(np.array([0.0, recordings.SILENCE], dtype=np.float32))


# ------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("n", "parts"),
    [(10, [(0, 10)]), (11, [(0, 6), (6, 11)]), (20, [(0, 10), (10, 20)]),
     (25, [(0, 9), (9, 17), (17, 25)])],
)  # fmt: skip
def test_a_recording_is_split_into_as_few_equal_parts_as_fit(
    n: int, parts: list[tuple[int, int]]
) -> None:
    samples = np.ones(n, dtype=np.float32)
    assert split_recording(samples, 5, 2.0, "windows") == parts


@pytest.mark.parametrize("quiet", [1800, 2250, 2700])
def test_a_recording_is_split_in_the_middle_of_the_quietest_window(quiet: int) -> None:
    samples = np.random.default_rng(0).choice([-1.0, 1.0], 4500).astype(np.float32)
    samples[quiet : quiet + 20] = 0.0  # 0.2 s of 30 s, the length of the compared window
    first, second = split_recording(samples, 100, 30.0, "silence")
    cut = first[1]
    assert (first, second) == ((0, cut), (cut, 4500))
    assert cut in (quiet + 9, quiet + 10)


@pytest.mark.parametrize(("n", "parts"), [(1900, 2), (1933, 2), (1934, 3), (1960, 3), (2000, 3)])
def test_a_small_search_range_adds_a_part(n: int, parts: int) -> None:
    samples = np.random.default_rng(0).normal(size=n).astype(np.float32)
    result = split_recording(samples, 100, 10.0, "silence")
    assert len(result) == parts
    assert all(0 < stop - start <= 1000 for start, stop in result)


def test_a_recording_of_few_samples_is_split_in_the_middle_of_the_search_range() -> None:
    assert split_recording(np.ones(4, dtype=np.float32), 1, 3.0, "silence") == [(0, 1), (1, 4)]
