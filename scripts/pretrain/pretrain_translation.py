"""Train a small translation model from scratch, as a base that adapters are then tried on.

usage: python scripts/pretrain/pretrain_translation.py DATA TO [--minutes 4] [--steps 16000]
       (to try it on a CPU: --steps 3 --tokens 256 --rows 200 --test 3)

DATA holds Multi30k: train, val and test_2016_flickr, each in .en.gz, .de.gz and .fr.gz, line by
line. TO gets a Marian model of 10 million parameters in bfloat16, in shards of at most 15 MB, and
its tokenizer. It takes less than five minutes on an H100.

The model learns to translate English into German. Of French it sees the sentences of the train
split alone, with words masked that it restores: it knows the letters and words, as multilingual
models do, but no sentence in both languages. So `configs/multi30k_en_fr.yaml` can teach it to
translate into French with an adapter, and what the adapter adds can be measured.

All sentences lie on the GPU in one table of tokens. A batch is a list of rows of similar length and
has one of a few shapes, for each of which the step is recorded once (`pretraining.py`).
"""

from __future__ import annotations

import argparse
import gzip
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from pretraining import Schedule, Steps, computing_in, count_parameters, save
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
PAD, END, UNKNOWN, MASK = range(4)
SPECIAL = ["<pad>", "</s>", "<unk>", "<mask>"]
POSITIONS = 128  # that the model has
SHAPES = [12, 16, 20, 24, 32, 48]  # lengths in tokens to which sentences are filled
MASKED, DELETED = 0.25, 0.1  # shares of the tokens of a sentence that has to be restored
SMOOTHING = 0.1


def lines(data: Path, split: str, language: str, count: int | None = None) -> list[str]:
    """Return the first sentences of a split in one language, or all."""
    with gzip.open(data / f"{split}.{language}.gz", "rt", encoding="utf-8") as file:
        return [line.strip() for line in islice(file, count)]


def train_tokenizer(texts: Sequence[str], words: int) -> PreTrainedTokenizerFast:
    """Return a byte-pair tokenizer of some texts that ends each text with `</s>`."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = BpeTrainer(vocab_size=words, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIAL[END]}", special_tokens=[(SPECIAL[END], END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[PAD], eos_token=SPECIAL[END],
        unk_token=SPECIAL[UNKNOWN], mask_token=SPECIAL[MASK], model_max_length=POSITIONS,
    )  # fmt: skip


def build_model(words: int, width: int, layers: int, dropout: float) -> MarianMTModel:
    """Return a Marian of some layers each way with random weights."""
    config = MarianConfig(
        vocab_size=words, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=width // 64, decoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, activation_function="relu",
        dropout=dropout, attention_dropout=0.1, activation_dropout=0.1, scale_embedding=True,
        max_position_embeddings=POSITIONS, init_std=width**-0.5, pad_token_id=PAD,
        eos_token_id=END, decoder_start_token_id=PAD, forced_eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = MarianMTModel(config)
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


@dataclass
class Table:
    """Sentences and what they are to become, as tokens.

    Args:
        source: Tokens (N, L), filled with `<pad>` on the right.
        target: Likewise; the last rows, from `first_to_restore` on, are equal to their sources.
        lengths: Tokens of the longer of the two (N,), on the CPU.
        first_to_restore: The number of pairs, which come first.
    """

    source: Tensor
    target: Tensor
    lengths: Tensor
    first_to_restore: int

    def plan(self, tokens: int, restored: float) -> Iterator[tuple[int, Tensor]]:
        """Yield length and rows of the batches of one epoch after the other, for ever.

        Args:
            tokens: Of a batch, with those that fill it.
            restored: The share of the sentences to be restored that an epoch has.
        """
        rows = torch.arange(len(self.lengths))
        while True:
            used = (rows < self.first_to_restore) | (torch.rand(len(rows)) < restored)
            found: list[tuple[int, Tensor]] = []
            for shortest, length in zip([0, *SHAPES], SHAPES, strict=False):
                fits = used & (self.lengths > shortest) & (self.lengths <= length)
                own = rows[fits][torch.randperm(int(fits.sum()))].to(self.source.device)
                size = max(1, tokens // length)
                # those that fill no batch wait for another epoch, which draws another order
                found += [(length, batch) for batch in own.split(size) if len(batch) == size]
            if not found:
                raise SystemExit("error: too few sentences for one batch: choose fewer --tokens")
            yield from (found[i] for i in torch.randperm(len(found)).tolist())

    def batch(self, length: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return source and target (B, length) of some rows."""
        source, target = self.source[rows, :length], self.target[rows, :length]
        to_restore = (rows >= self.first_to_restore)[:, None]
        return torch.where(to_restore, corrupted(source), source), target


def corrupted(ids: Tensor) -> Tensor:
    """Return sentences (B, T) with some tokens masked and others deleted; their end stays."""
    draws = torch.rand(ids.shape, device=ids.device)
    is_word = (ids != PAD) & (ids != END)
    masked = torch.where(is_word & (draws < MASKED), MASK, ids)
    kept = torch.where(is_word & (draws > 1 - DELETED), PAD, masked)
    order = (kept == PAD).long().argsort(dim=1, stable=True)
    return kept.gather(1, order)


def table_of(
    pairs: Sequence[tuple[list[int], list[int]]], french: Sequence[list[int]], device: str
) -> Table:
    """Return the sentences of at most the longest shape as a table on the device."""
    longest = SHAPES[-1]
    kept = [pair for pair in pairs if max(map(len, pair)) <= longest]
    restored = [ids for ids in french if len(ids) <= longest]
    rows = [*kept, *((ids, ids) for ids in restored)]
    sides = [
        torch.tensor([row[side] + [PAD] * (longest - len(row[side])) for row in rows])
        for side in (0, 1)
    ]
    left_out = len(pairs) + len(french) - len(rows)
    print(f"{len(kept):,} pairs, {len(restored):,} sentences to restore; {left_out} are too long")
    lengths = torch.tensor([max(map(len, row)) for row in rows])
    return Table(sides[0].to(device), sides[1].to(device), lengths, len(kept))


def loss_of(model: MarianMTModel, source: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Return the mean cross-entropy of the target's tokens; source and target are (B, T)."""
    given = F.pad(target[:, :-1], (1, 0), value=PAD)
    # masks of four dimensions are taken as they are: transformers would read the values of others
    keys = (source != PAD)[:, None, None, :].expand(-1, 1, target.shape[1], -1)
    before = torch.ones(2 * target.shape[1:], dtype=torch.bool, device=target.device).tril()
    with computing_in(target.device.type):
        logits = model(
            input_ids=source,
            attention_mask=keys,
            decoder_input_ids=given,
            decoder_attention_mask=before.expand(len(target), 1, -1, -1),
            use_cache=False,
        ).logits
    return F.cross_entropy(
        logits.flatten(0, 1).float(), target.flatten(), ignore_index=PAD, label_smoothing=smoothing
    )


@torch.no_grad()
def held_out_loss(model: MarianMTModel, table: Table) -> float:
    """Return the mean loss of a table's rows, without smoothing and dropout."""
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(table.source), 128):
        source, target = table.source[start : start + 128], table.target[start : start + 128]
        count = int((target != PAD).sum())
        total += count * float(loss_of(model, source, target, 0.0))
        tokens += count
    model.train()
    return total / max(1, tokens)


def train(
    model: MarianMTModel, table: Table, validation: Table, args: argparse.Namespace, start: float
) -> None:
    """Train the model, and print its losses every now and then."""
    steps = Steps(
        lambda source, target: loss_of(model, source, target, SMOOTHING),
        [p for p in model.parameters() if p.requires_grad],
        record=args.graphs,
    )
    schedule = Schedule(60 * args.minutes, args.steps, args.rate, args.warmup, start)
    total, shown = torch.zeros((), device=table.source.device), 0.0
    since, epochs = 0, 0.0
    model.train()
    for step, (length, rows) in enumerate(table.plan(args.tokens, args.french)):
        total += steps(schedule.rate(step), *table.batch(length, rows))
        since += 1
        epochs += len(rows) / len(table.source)
        if step % 10 == 9 and total.is_cuda:
            torch.cuda.synchronize()  # so that the clock measures the GPU
        share = schedule.share(step + 1)
        if share >= shown + 0.05 or share == 1.0:
            shown = share
            print(
                f"{share:4.0%}  step {step + 1}  epoch {epochs:.1f}"
                f"  train {float(total) / since:.3f}"
                f"  validation {held_out_loss(model, validation):.3f}"
                f"  {time.monotonic() - start:.0f} s",
                flush=True,
            )
            total.zero_()
            since = 0
        if share == 1.0:
            return


@torch.no_grad()
def translate(
    model: MarianMTModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], beams: int
) -> list[str]:
    """Return translations of some sentences."""
    model.eval()
    found: dict[int, str] = {}
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(texts), 250):
        rows = order[start : start + 250]
        asked = tokenizer([texts[i] for i in rows], padding=True, return_tensors="pt")
        output = model.generate(
            input_ids=asked["input_ids"].to(model.device),
            attention_mask=asked["attention_mask"].to(model.device),
            max_new_tokens=64, num_beams=beams, do_sample=False,
        )  # fmt: skip
        found |= zip(rows, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True)
    return [found[i] for i in range(len(texts))]


def measure(
    model: MarianMTModel, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> None:
    """Print the BLEU of the German of the test sentences, and some of them."""
    asked, wanted = (lines(args.data, "test_2016_flickr", name, args.test) for name in ("en", "de"))
    said = translate(model, tokenizer, asked, args.beams)
    for pair in list(zip(said, wanted, strict=True))[:3]:
        print(*pair, sep="\n  wanted: ")
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        print("sacrebleu is not installed: no BLEU")
        return
    bleu = BLEU()
    print(f"German: {bleu.corpus_score(said, [wanted])}  ({bleu.get_signature()})")


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("--minutes", type=float, default=4.0, help="until training ends")
    parser.add_argument("--steps", type=int, default=16_000, help="at most")
    parser.add_argument("--tokens", type=int, default=6144, help="of a batch")
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate")
    parser.add_argument("--warmup", type=int, default=1000, help="steps")
    parser.add_argument("--words", type=int, default=10_000, help="of the vocabulary")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--french", type=float, default=0.5, help="share of it in an epoch")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, help="of the training and of the validation data")
    parser.add_argument("--test", type=int, default=1000, help="sentences to translate at the end")
    parser.add_argument("--beams", type=int, default=4, help="of these translations")
    return parser.parse_args()


def main() -> None:
    """Train the tokenizer and the model, save both, and measure German on the test sentences."""
    start, args = time.monotonic(), parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    texts = {name: lines(args.data, "train", name, args.rows) for name in ("en", "de", "fr")}
    tokenizer = train_tokenizer([text for own in texts.values() for text in own], args.words)

    def encoded(own: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(own)["input_ids"]
        return ids

    pairs = list(zip(encoded(texts["en"]), encoded(texts["de"]), strict=True))
    table = table_of(pairs, encoded(texts["fr"]), device)
    sides = [encoded(lines(args.data, "val", name, args.rows)) for name in ("en", "de")]
    validation = table_of(list(zip(*sides, strict=True)), [], device)
    model = build_model(len(tokenizer), args.width, args.layers, args.dropout).to(device)
    print(f"{count_parameters(model):,} parameters, on {device}", flush=True)
    train(model, table, validation, args, start)
    model = save(model, args.to)  # in bfloat16, so that what is measured is what is saved
    tokenizer.save_pretrained(args.to)
    measure(model if device == "cuda" else model.float(), tokenizer, args)
    print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
