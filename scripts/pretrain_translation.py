"""Train a small translation model from scratch, as a base that adapters are then tried on.

usage: python scripts/pretrain_translation.py DATA TO [--steps 5000] [--tokens 8192] [--seed 0]
       (to try it on a CPU: --steps 3 --tokens 256 --rows 200 --test 3)

DATA holds Multi30k: train, val and test_2016_flickr, each in .en.gz, .de.gz and .fr.gz, line by
line. TO gets a Marian model of 10 million parameters in bfloat16, in shards of at most 15 MB, and
its tokenizer. It takes less than five minutes on an H100.

The model learns to translate English into German. Of French it sees the sentences of the train
split alone, with words masked that it restores: it knows the letters and words, as multilingual
models do, but no sentence in both languages. So `configs/multi30k_en_fr.yaml` can teach it to
translate into French with an adapter, and what the adapter adds can be measured.
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
PAD, END, UNKNOWN, MASK = range(4)
SPECIAL = ["<pad>", "</s>", "<unk>", "<mask>"]
WORDS = 10_000  # of the vocabulary, which the three languages share
LONGEST = 128  # tokens of a sentence
MASKED, DELETED = 0.25, 0.1  # shares of the tokens of a sentence that has to be restored
PEAK_RATE, WARMUP, SMOOTHING = 1e-3, 0.1, 0.1
POOL = 40  # batches whose sentences are sorted by length together
Pair = tuple[list[int], list[int]]


def lines(data: Path, split: str, language: str, count: int | None = None) -> list[str]:
    """Return the first sentences of a split in one language, or all."""
    with gzip.open(data / f"{split}.{language}.gz", "rt", encoding="utf-8") as file:
        return [line.strip() for line in islice(file, count)]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-pair tokenizer of some texts that ends each text with `</s>`."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = BpeTrainer(vocab_size=WORDS, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIAL[END]}", special_tokens=[(SPECIAL[END], END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[PAD], eos_token=SPECIAL[END],
        unk_token=SPECIAL[UNKNOWN], mask_token=SPECIAL[MASK], model_max_length=LONGEST,
    )  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerFast) -> MarianMTModel:
    """Return a Marian of four layers each way with random weights."""
    config = MarianConfig(
        vocab_size=len(tokenizer), d_model=256, encoder_layers=4, decoder_layers=4,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=1024,
        decoder_ffn_dim=1024, activation_function="swish", dropout=0.3, attention_dropout=0.1,
        activation_dropout=0.1, max_position_embeddings=LONGEST, scale_embedding=True,
        init_std=256**-0.5, pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD,
        forced_eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return MarianMTModel(config)


def corrupted(ids: list[int], random: np.random.Generator) -> list[int]:
    """Return a sentence with some tokens masked and others deleted; its end stays."""
    draws = random.random(len(ids) - 1)
    kept = [
        MASK if draw < MASKED else token
        for token, draw in zip(ids[:-1], draws, strict=True)
        if draw < 1 - DELETED
    ]
    return [*kept, END]


def batches(
    pairs: list[Pair], french: list[list[int]], size: int, random: np.random.Generator
) -> Iterator[list[Pair]]:
    """Yield batches of sentences of similar length for ever.

    Args:
        pairs: Sentences with their translations.
        french: Sentences that have to be restored.
        size: Tokens of a batch, with those that fill it.
        random: Draws the order, and what is masked.
    """
    while True:
        rows = [*pairs, *((corrupted(ids, random), ids) for ids in french)]
        order = random.permutation(len(rows))
        per_batch = size // 16
        found: list[list[Pair]] = []
        for start in range(0, len(rows), POOL * per_batch):
            pool = [rows[i] for i in order[start : start + POOL * per_batch]]
            pool.sort(key=lambda pair: max(map(len, pair)))
            batch: list[Pair] = []
            for pair in pool:
                if batch and (len(batch) + 1) * max(map(len, pair)) > size:
                    found.append(batch)
                    batch = []
                batch.append(pair)
            found.append(batch)
        yield from (found[i] for i in random.permutation(len(found)))


def padded(rows: Sequence[list[int]], device: str) -> Tensor:
    """Return rows as one tensor (B, T), filled on the right."""
    result = np.full((len(rows), max(map(len, rows))), PAD, dtype=np.int64)
    for i, row in enumerate(rows):
        result[i, : len(row)] = row
    return torch.from_numpy(result).to(device, non_blocking=True)


def loss_of(model: MarianMTModel, batch: list[Pair], device: str, smoothing: float) -> Tensor:
    """Return the mean cross-entropy of a batch's target tokens."""
    source = padded([pair[0] for pair in batch], device)
    target = padded([pair[1] for pair in batch], device)
    given = torch.cat([torch.full_like(target[:, :1], PAD), target[:, :-1]], dim=1)
    # CPUs without bfloat16 of their own take minutes for a step of it
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        logits = model(
            input_ids=source, attention_mask=(source != PAD).long(), decoder_input_ids=given,
            use_cache=False,
        ).logits  # fmt: skip
    # no pad token stands in a sentence
    return F.cross_entropy(
        logits.flatten(0, 1).float(), target.flatten(), ignore_index=PAD, label_smoothing=smoothing
    )


def train(
    model: MarianMTModel,
    pairs: list[Pair],
    french: list[list[int]],
    validation: list[Pair],
    args: argparse.Namespace,
    device: str,
) -> None:
    """Train the model, and print its losses every now and then."""
    random = np.random.default_rng(args.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, eps=1e-9
    )
    warmup = max(1, int(WARMUP * args.steps))

    def rate(step: int) -> float:
        done = (step + 1 - warmup) / max(1, args.steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * done))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start, total = time.monotonic(), torch.zeros((), device=device)
    every = max(1, args.steps // 20)
    model.train()
    for step, batch in enumerate(batches(pairs, french, args.tokens, random), 1):
        loss = loss_of(model, batch, device, SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        total += loss.detach()
        if step % every == 0 or step == args.steps:
            with torch.no_grad():
                model.eval()
                parts = [validation[i : i + 128] for i in range(0, len(validation), 128)]
                held_out = np.mean([float(loss_of(model, part, device, 0.0)) for part in parts])
                model.train()
            shown = f"step {step}/{args.steps}  train {float(total) / every:.3f}"
            print(
                f"{shown}  validation {held_out:.3f}  {time.monotonic() - start:.0f} s", flush=True
            )
            total.zero_()
        if step == args.steps:
            return


@torch.no_grad()
def translate(
    model: MarianMTModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], device: str
) -> list[str]:
    """Return greedy translations of some sentences."""
    model.eval()
    found: dict[int, str] = {}
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(texts), 100):
        rows = order[start : start + 100]
        source = padded([tokenizer(texts[i])["input_ids"] for i in rows], device)
        output = model.generate(
            input_ids=source, attention_mask=(source != PAD).long(), max_new_tokens=80,
            num_beams=1, do_sample=False,
        )  # fmt: skip
        found |= zip(rows, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True)
    return [found[i] for i in range(len(texts))]


def main() -> None:
    """Train the tokenizer and the model, save both, and measure German on the test sentences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--tokens", type=int, default=16384, help="of a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, help="of the training and of the validation data")
    parser.add_argument("--test", type=int, default=1000, help="sentences to translate at the end")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    english, german, french = (
        lines(args.data, "train", name, args.rows) for name in ("en", "de", "fr")
    )
    tokenizer = train_tokenizer([*english, *german, *french])

    def encoded(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]
        return ids

    pairs = list(zip(encoded(english), encoded(german), strict=True))
    validation = [encoded(lines(args.data, "val", name, args.rows)) for name in ("en", "de")]
    model = build_model(tokenizer).to(device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {len(pairs):,} pairs, {device}", flush=True)
    train(model, pairs, encoded(french), list(zip(*validation, strict=True)), args, device)
    model = model.to(torch.bfloat16)  # as it is saved, so that what is measured is that
    model.save_pretrained(args.to, max_shard_size="15MB")
    tokenizer.save_pretrained(args.to)
    model = model if device == "cuda" else model.float()
    asked, wanted = (lines(args.data, "test_2016_flickr", name, args.test) for name in ("en", "de"))
    said = translate(model, tokenizer, asked, device)
    for pair in list(zip(said, wanted, strict=True))[:3]:
        print(*pair, sep="\n  wanted: ")
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        print("sacrebleu is not installed: no BLEU")
        return
    bleu = BLEU()
    print(f"German: {bleu.corpus_score(said, [wanted])}  ({bleu.get_signature()})")


if __name__ == "__main__":
    main()
