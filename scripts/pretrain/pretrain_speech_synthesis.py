"""Train a small SpeechT5 and a small vocoder from scratch, as bases that adapters are tried on.

usage: python scripts/pretrain/pretrain_speech_synthesis.py DATA TO ROWS [--minutes 2]
       (to try it on a CPU: --steps 2 --batch 4 --width 32 --layers 1)

DATA holds the folder fsdd: digits that six people say, in recordings of 8 kHz. TO gets `speecht5`,
a SpeechT5ForTextToSpeech of 4.6 million parameters that says the digits zero to nine with the
voices of five of them, and `vocoder`, a SpeechT5HifiGan of 1.2 million parameters that makes its
spectrograms heard. Both take less than five minutes on an H100.

ROWS gets what the model has not heard, to adapt it to: the sixth speaker, in train, validation and
test; and known, a test split of the other five, which shows what an adapted model has forgotten.

Who speaks is told by a vector that needs no other model: mean and standard deviation of each band
of the speaker's spectrograms in train, as far from their means over the five speakers as their
deviations say. That of the sixth speaker is computed likewise, of its own train recordings.

The loss of the SpeechT5 is transformers' own. The vocoder learns to write a sound whose spectra of
three resolutions are those of the recording; without an adversary, it sounds a bit metallic.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from pretraining import Schedule, Steps, count_parameters
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import Fuse
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    SpeechT5Config,
    SpeechT5FeatureExtractor,
    SpeechT5ForTextToSpeech,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from lora_cli.data.recordings import read_recording

# B recordings of a batch, L letters, T frames, M mel bands, N samples
BANDS, RATE, HOP = 40, 16_000, 256
HIGHEST = 3_900  # Hz: recordings of 8 kHz hold nothing above 4,000
LOUDNESS = 0.08  # root mean square of a recording; some speakers sat far from the microphone
FLOOR = 1e-4  # of a band's energy, below which all is silence
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # with SpeechT5's own ids
LETTERS = [*SPECIAL, *" abcdefghijklmnopqrstuvwxyz'"]
SEGMENT = 24  # frames of a recording that the vocoder is trained on at a time
SPECTRA = (256, 512, 1024)  # samples of the windows whose spectra the vocoder learns


@dataclass
class Recording:
    """A recording: where it lies, what is said in it, by whom; samples (N,), spectrogram (T, M)."""

    file: str
    text: str
    speaker: str
    split: str
    samples: np.ndarray[Any, Any]
    mel: Tensor


def make_extractor() -> SpeechT5FeatureExtractor:
    """Return the feature extractor of the model."""
    return SpeechT5FeatureExtractor(num_mel_bins=BANDS, fmax=HIGHEST, mel_floor=FLOOR)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of letters that needs no package of its own, as SpeechT5's does."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = Fuse()
    backend.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 2)])
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names)


def read_recordings(data: Path) -> list[Recording]:
    """Return the recordings of the data set, as `lora` reads them, all of the same loudness."""
    extractor, found = make_extractor(), []
    folder = data / "fsdd"
    with (
        zipfile.ZipFile(folder / "recordings.zip") as archive,
        open(folder / "metadata.csv", encoding="utf-8", newline="") as table,
    ):
        for row in csv.DictReader(table):
            samples = read_recording({"bytes": archive.read(row["file"]), "path": None}, RATE)
            samples = (samples * LOUDNESS / np.sqrt(np.mean(samples**2))).clip(-1, 1)
            mel = extractor(audio_target=samples, sampling_rate=RATE)["input_values"][0]
            found.append(
                Recording(row["file"], row["text"], row["speaker"], row["split"], samples,
                          torch.from_numpy(np.array(mel, dtype=np.float32)))
            )  # fmt: skip
    return found


def describe_speakers(recordings: Sequence[Recording], known: Sequence[str]) -> dict[str, Tensor]:
    """Return the vector of each speaker (2 * M,)."""
    found = {}
    for name in sorted({one.speaker for one in recordings}):
        own = [r.mel for r in recordings if r.speaker == name and r.split == "train"]
        frames = torch.cat(own)
        found[name] = torch.cat([frames.mean(0), frames.std(0)])
    of_known = torch.stack([found[name] for name in known])
    mean, deviation = of_known.mean(0), of_known.std(0)
    return {name: (one - mean) / deviation for name, one in found.items()}


def build_model(width: int, layers: int) -> SpeechT5ForTextToSpeech:
    """Return a SpeechT5 with random weights."""
    return SpeechT5ForTextToSpeech(SpeechT5Config(
        vocab_size=len(LETTERS), hidden_size=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
        speech_decoder_postnet_dropout=0.1,  # a half, as usual, is too much for a small one
        num_mel_bins=BANDS, speech_decoder_prenet_units=128, speech_decoder_postnet_units=128,
        speaker_embedding_dim=2 * BANDS, max_text_positions=100, max_speech_positions=200,
        conv_dim=[8], conv_stride=[4], conv_kernel=[4],
    ))  # fmt: skip


def build_vocoder(width: int) -> SpeechT5HifiGan:
    """Return a HiFi-GAN with random weights: 256 samples for each frame."""
    return SpeechT5HifiGan(SpeechT5HifiGanConfig(
        model_in_dim=BANDS, sampling_rate=RATE, upsample_initial_channel=width,
        upsample_rates=[8, 8, 4], upsample_kernel_sizes=[16, 16, 8],
        resblock_kernel_sizes=[3, 7], resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
    ))  # fmt: skip


def table_of(
    recordings: Sequence[Recording], speakers: dict[str, Tensor], tokenizer: Any, device: str
) -> list[Tensor]:
    """Return letters (B, L), which are there (B, L), spectrograms (B, T, M), speakers (B, D)."""
    texts = tokenizer([one.text for one in recordings], padding=True, return_tensors="pt")
    longest = max(len(one.mel) for one in recordings)
    longest += longest % 2  # two frames a step
    mels = [F.pad(r.mel, (0, 0, 0, longest - len(r.mel)), value=-100.0) for r in recordings]
    who = torch.stack([speakers[one.speaker] for one in recordings])
    found = [texts["input_ids"], texts["attention_mask"], torch.stack(mels), who]
    return [tensor.to(device) for tensor in found]


def loss_of(model: SpeechT5ForTextToSpeech, batch: Sequence[Tensor]) -> Tensor:
    """Return transformers' loss of a batch."""
    ids, mask, mels, who = batch
    found = model(input_ids=ids, attention_mask=mask, labels=mels, speaker_embeddings=who).loss
    assert found is not None
    return found


def train(name: str, steps: Steps, schedule: Schedule, draw: Any) -> None:
    """Train until the schedule ends, and print the losses; `draw` returns the inputs of a step."""
    total, since, last = 0.0, 0, 0.0
    for step in range(10**9):
        total += float(steps(schedule.rate(step), *draw()))
        since += 1
        share = schedule.share(step + 1)
        if share >= last + 0.1 or share == 1.0:
            last, spent = share, time.monotonic() - schedule.start
            loss = f"{total / since:.4f}"
            print(f"{name}: {share:4.0%}  step {step + 1}  loss {loss}  {spent:.0f} s", flush=True)
            total, since = 0.0, 0
        if share == 1.0:
            return


def train_model(model: Any, table: list[Tensor], args: argparse.Namespace) -> None:
    """Train the SpeechT5 on random batches, each no longer than its longest recording."""

    def draw() -> list[Tensor]:
        rows = torch.randint(len(table[0]), (args.batch,), device=table[0].device)
        ids, mask, mels, who = (tensor[rows] for tensor in table)
        n_frames = int((mels[:, :, 0] != -100).sum(1).max())
        return [ids, mask, mels[:, : n_frames + n_frames % 2], who]

    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = Steps(lambda *batch: loss_of(model, batch), parameters, decay=1e-2, record=False)
    train("speech", steps, Schedule(60 * args.minutes, args.steps, args.rate), draw)


@torch.no_grad()
def mel_distance(model: Any, table: list[Tensor]) -> float:
    """Return the mean distance of spectrograms, each step reading the recorded ones before it."""
    model.eval()
    torch.manual_seed(0)  # the model always draws dropout in the layers that read its own speech
    ids, mask, mels, who = table
    found = model(input_ids=ids, attention_mask=mask, labels=mels, speaker_embeddings=who)
    there = mels != -100
    return float((found.spectrogram - mels).abs()[there].mean())


def spectra(samples: Tensor, size: int) -> Tensor:
    """Return the logarithms of the spectra of samples (B, N)."""
    window = torch.hann_window(size, device=samples.device)
    found = torch.stft(samples, size, size // 4, window=window, return_complex=True)
    return (found.real**2 + found.imag**2 + 1e-7).log() / 2


def sound_loss(vocoder: Any, mels: Tensor, samples: Tensor) -> Tensor:
    """Return how far what a vocoder makes of spectrograms (B, T, M) is from the samples (B, N)."""
    found = vocoder(mels)
    return sum((spectra(found, n) - spectra(samples, n)).abs().mean() for n in SPECTRA)  # type: ignore[return-value]


def train_vocoder(
    vocoder: Any, recordings: Sequence[Recording], args: argparse.Namespace, device: str
) -> None:
    """Train the vocoder on random parts of recordings."""
    pieces = [
        (one.mel[start : start + SEGMENT], one.samples[start * HOP : (start + SEGMENT) * HOP])
        for one in recordings
        for start in range(0, len(one.mel) - SEGMENT, 3)
    ]
    whole = [(mel, samples) for mel, samples in pieces if len(samples) == SEGMENT * HOP]
    mels = torch.stack([mel for mel, _ in whole]).to(device)
    samples = torch.stack([torch.from_numpy(sound) for _, sound in whole]).to(device)
    frames = torch.cat([one.mel for one in recordings]).to(device)
    vocoder.mean.copy_(frames.mean(0))
    vocoder.scale.copy_(frames.std(0))

    def draw() -> list[Tensor]:
        rows = torch.randint(len(mels), (args.batch,), device=device)
        return [mels[rows], samples[rows]]

    vocoder.train()
    steps = Steps(lambda *batch: sound_loss(vocoder, *batch), list(vocoder.parameters()),
                  decay=0.0, betas=(0.8, 0.99), record=False)  # fmt: skip
    train("vocoder", steps, Schedule(60 * args.minutes, args.steps, args.rate), draw)


def write_rows(
    folder: Path, recordings: Sequence[Recording], speakers: dict[str, Tensor], unknown: str
) -> None:
    """Write the rows of the unknown speaker by split, and those of the others as `known`."""
    import soundfile

    splits: dict[str, list[dict[str, Any]]] = {
        "train": [],
        "validation": [],
        "test": [],
        "known": [],
    }
    (folder / "recordings").mkdir(parents=True, exist_ok=True)
    for i, one in enumerate(recordings):
        name = "train" if one.split == "train" else "test"
        if one.speaker != unknown:
            name = "known" if name == "test" else ""
        elif name == "train" and i % 5 == 0:
            name = "validation"
        if not name:
            continue
        file = f"recordings/{Path(one.file).name}"
        soundfile.write(folder / file, one.samples, RATE, subtype="PCM_16")
        speaker = [round(x, 4) for x in speakers[one.speaker].tolist()]
        splits[name].append({"text": one.text, "audio": file, "speaker": speaker})
    for name, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data", "to", "rows"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--minutes", type=float, default=2.0, help="of training of each model")
    parser.add_argument("--steps", type=int, help="of each, at most")
    parser.add_argument("--batch", type=int, default=32, help="recordings of a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--speaker", default="theo", help="whom the model does not hear")
    parser.add_argument("--vocoder", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Write the rows to adapt to, train both models, save them, and measure the first."""
    start, args = time.monotonic(), parse_arguments()
    recordings, tokenizer = read_recordings(args.data), make_tokenizer()
    known = sorted({one.speaker for one in recordings} - {args.speaker})
    speakers = describe_speakers(recordings, known)
    write_rows(args.rows, recordings, speakers, args.speaker)
    print(f"{len(recordings):,} recordings, {time.monotonic() - start:.0f} s", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    own = [one for one in recordings if one.split == "train" and one.speaker in known]
    parts = {
        "known speakers": [r for r in recordings if r.split == "test" and r.speaker in known],
        args.speaker: [r for r in recordings if r.split == "test" and r.speaker not in known],
    }
    model = build_model(args.width, args.layers).to(device)
    print(f"speech: {count_parameters(model):,} parameters, on {device}", flush=True)
    train_model(model, table_of(own, speakers, tokenizer, device), args)
    model.save_pretrained(args.to / "speecht5", max_shard_size="15MB")
    tokenizer.save_pretrained(args.to / "speecht5")
    make_extractor().save_pretrained(args.to / "speecht5")
    for whose, some in parts.items():
        distance = mel_distance(model, table_of(some, speakers, tokenizer, device))
        print(f"mel distance of {whose}: {distance:.4f}", flush=True)
    if args.vocoder:
        vocoder = build_vocoder(args.width).to(device)
        print(f"vocoder: {count_parameters(vocoder):,} parameters", flush=True)
        train_vocoder(vocoder, own, args, device)
        vocoder.save_pretrained(args.to / "vocoder")
    print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
