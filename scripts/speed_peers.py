"""Train the rows of `speed.py` with PEFT, Liger's kernels or Unsloth, and transformers' Trainer.

The log and the report have the form of those of `lora train`, as far as `speed.py` reads them.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(side: str, folder: str) -> None:
    """Train what the recipe in a folder says, and write the log and a report into its `out`.

    Args:
        side: `peft`, `liger` or `unsloth` (which is imported already).
        folder: The folder of the row, with `recipe.json` and `order.json`.
    """
    import torch
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

    recipe = json.loads((Path(folder) / "recipe.json").read_text())
    order = json.loads((Path(folder) / "order.json").read_text())
    out = Path(folder) / "out"
    out.mkdir()
    is_llama, spec = recipe["task"]["type"] == "causal_lm", recipe["train"]
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"]["name"])
    torch.manual_seed(0)
    model = unsloth_model(recipe) if side == "unsloth" else peft_model(recipe)
    on_gpu = torch.cuda.is_available()
    options = TrainingArguments(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=spec["micro_batch_size"],
        gradient_accumulation_steps=spec["gradient_accumulation_steps"],
        max_steps=spec["max_steps"],
        learning_rate=spec["optimizer"]["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=spec["precision"] == "bf16",
        use_cpu=not on_gpu,
        fp16=spec["precision"] == "fp16",
        logging_steps=spec["log_every_steps"],
        logging_first_step=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",  # the rows are in the order of `lora train`
        # Unsloth has its own
        gradient_checkpointing=spec["gradient_checkpointing"] and side != "unsloth",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=side == "liger",
        dataloader_num_workers=0 if is_llama else 2,
    )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    examples = encoded(recipe, order["examples"], tokenizer)
    padding = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
    run = Trainer(
        model=model,
        args=options,
        train_dataset=examples,
        data_collator=None if is_llama else padding,
        callbacks=[log_writer(out / "metrics.jsonl", [len(e["input_ids"]) for e in examples])],
    )
    if not is_llama:
        # a classifier's loss is the mean of its micro-batch; the Trainer would not divide their sum
        run.model_accepts_loss_kwargs = False
    run.train()
    peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    (out / "report.json").write_text(json.dumps({"training": {"peak_memory_bytes": peak}}))


def peft_model(recipe: dict[str, Any]) -> Any:
    """Return the model with an adapter, as PEFT's documentation prepares it."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        BitsAndBytesConfig,
    )

    is_llama = recipe["task"]["type"] == "causal_lm"
    auto = AutoModelForCausalLM if is_llama else AutoModelForSequenceClassification
    # what its users do: the checkpoint's dtype for a large decoder, float32 for an encoder
    options: dict[str, Any] = {"dtype": torch.bfloat16 if is_llama else torch.float32}
    is_quantized = recipe["model"]["quantization"] == "nf4"
    if is_quantized:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = auto.from_pretrained(recipe["model"]["name"], device_map=device, **options)
    if is_quantized:
        model = prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    adapter = recipe["adapter"]
    config = LoraConfig(
        r=adapter["rank"],
        lora_alpha=adapter["alpha"],
        lora_dropout=adapter["dropout"],
        target_modules=adapter["target_modules"],
        task_type="CAUSAL_LM" if is_llama else "SEQ_CLS",
    )
    return get_peft_model(model, config)


def unsloth_model(recipe: dict[str, Any]) -> Any:
    """Return the model with an adapter, as Unsloth's documentation prepares it."""
    import torch
    from unsloth import FastLanguageModel

    adapter, checkpointing = recipe["adapter"], recipe["train"]["gradient_checkpointing"]
    model, _ = FastLanguageModel.from_pretrained(
        recipe["model"]["name"],
        max_seq_length=recipe["task"]["max_length"],
        dtype=torch.bfloat16,
        load_in_4bit=recipe["model"]["quantization"] == "nf4",
        local_files_only=True,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=adapter["rank"],
        lora_alpha=adapter["alpha"],
        lora_dropout=adapter["dropout"],
        target_modules=LINEAR,
        bias="none",
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        random_state=0,
    )


def encoded(recipe: dict[str, Any], order: list[list[int]], tokenizer: Any) -> list[dict[str, Any]]:
    """Return the examples in the order in which they are trained."""
    rows = [json.loads(line) for line in Path(recipe["data"]["train"]).read_text().splitlines()]
    is_llama, examples = recipe["task"]["type"] == "causal_lm", []
    for row in rows:
        ids = tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id] * is_llama
        labels = list(ids) if is_llama else row["label"]
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return [examples[i] for step in order for i in step]


def log_writer(file: Path, lengths: list[int]) -> Any:
    """Return a callback that logs what `lora train` logs, each time the Trainer logs its loss.

    Args:
        file: The file of the log.
        lengths: The number of tokens of each example, in the order of training.
    """
    import torch
    from transformers import TrainerCallback

    class LogWriter(TrainerCallback):
        def __init__(self) -> None:
            self.step, self.began = 0, 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == state.max_steps:
                control.should_log = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in (logs or {}):
                return
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now, step = time.perf_counter(), state.global_step
            seconds = now - self.began
            size = args.per_device_train_batch_size * args.gradient_accumulation_steps
            trained = lengths[self.step * size : step * size]
            record = {
                "step": step,
                "loss": logs["loss"],
                "examples_per_s": len(trained) / seconds,
                "tokens_per_s": sum(trained) / seconds,
            }
            with file.open("a") as log:
                log.write(json.dumps(record) + "\n")
            print(f"step {step:>6}/{state.max_steps}  loss {logs['loss']:.4f}", file=sys.stderr)
            sys.stderr.flush()
            self.step, self.began = step, now

    return LogWriter()
