"""Measure how memory grows with the rows and the steps of a streamed run.

python scripts/scale.py rows --work FOLDER [--rows 10000000]
    Write a file with this many short texts and labels (46 bytes per row) into FOLDER. `lora train`,
    with `data.streaming` and in a separate process, trains a tiny classifier on each row once, in
    steps of 2,000 rows. Print the peak resident set size of that process after different numbers of
    rows, as recorded in `metrics.jsonl`, and finally its processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

MIB, STEP_SIZE = 2**20, 2000
WORDS = ["order", "kettle", "refund", "late", "broken", "parcel", "thanks", "invoice"]


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("rows")
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--rows", type=int, default=10_000_000)
    command.set_defaults(run=rows)
    args = parser.parse_args()
    args.run(args)


def rows(args: argparse.Namespace) -> None:
    """Print the peak memory of a streamed run after 1, 2, 5, 10 … times 100,000 rows."""
    args.work.mkdir(parents=True, exist_ok=True)
    save_model(args.work / "model")
    data, recipe, output = (args.work / name for name in ("rows.jsonl", "recipe.json", "out"))
    write_rows(data, args.rows)
    recipe.write_text(json.dumps(recipe_for(data, args.rows)))  # JSON is YAML
    seconds = processor_seconds(["train", str(recipe), "-o", str(output)])
    data.unlink()
    records = [json.loads(line) for line in (output / "metrics.jsonl").open(encoding="utf-8")]
    peaks = {one["step"] * STEP_SIZE: one["memory_bytes"] for one in records}
    shown = {factor * 10**power for factor in (1, 2, 5) for power in range(5, 9)}
    print("rows         steps    peak memory")
    for count in sorted(shown & peaks.keys()):
        print(f"{count:<12,} {count // STEP_SIZE:<8,} {peaks[count] / MIB:.0f} MiB")
    print(f"processor time: {seconds:.0f} s")


def save_model(folder: Path) -> None:
    """Save a BERT of one layer, with a tokenizer that knows digits and a few words."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *"0123456789"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    split = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, sep_token="[SEP]", model_max_length=32, **names
    ).save_pretrained(folder)
    BertModel(
        BertConfig(
            vocab_size=len(pieces),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        )
    ).save_pretrained(folder)


def write_rows(file: Path, count: int) -> None:
    """Write rows that all differ: a few words and the number of the row."""

    def lines() -> Iterable[str]:
        for i in range(count):
            words = f"{WORDS[i % 8]} {WORDS[i // 8 % 8]} {i:08d}"
            yield f'{{"text": "{words}", "label": "{"ab"[i % 2]}"}}\n'

    with file.open("w", encoding="utf-8") as out:
        out.writelines(lines())


def recipe_for(data: Path, count: int) -> dict[str, Any]:
    """Return a recipe that trains on each row once."""
    return {
        "model": {"name": str(data.parent / "model")},
        "task": {
            "type": "sequence_classification",
            "text_column": "text",
            "label_column": "label",
            "labels": ["a", "b"],
            "max_length": 32,
        },
        "data": {"train": str(data), "streaming": True},
        "adapter": {"type": "lora", "rank": 2, "target_modules": ["query"]},
        "train": {
            "max_steps": count // STEP_SIZE,
            "micro_batch_size": STEP_SIZE,
            "log_every_steps": 50,
            "optimizer": {"learning_rate": 1e-3},
        },
        "output_dir": "out",
    }


def processor_seconds(arguments: list[str]) -> float:
    """Run `lora` in a process of its own, and return its processor time."""
    code = "from lora_cli.cli.app import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"`lora {' '.join(arguments)}` failed")
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
