"""Measure the memory that merging needs, and the cost of a merged model.

python scripts/merging.py memory --work FOLDER [--gib 20] [--cap 4]
    Merge into a base that is larger than the available memory. The base is a Llama as wide as the
    8B models, with random bfloat16 weights in files of at most 4 GiB, and as many layers as give
    `--gib` GiB; the adapter has rank 8 on all linear layers. `lora merge` runs in a separate
    process, which cannot allocate more than `--cap` GiB (RLIMIT_DATA). Print its peak resident set
    size, including pages of files. Then compute one adapted tensor of each file again, and compare.
    FOLDER needs twice the size of the base.
python scripts/merging.py cost --adapter DIR [--rounds 20]
    Print the operations and the time of a forward pass of the base, of base + adapter, and of the
    merged model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lora_cli.adapters.load_adapter import load_adapter
from lora_cli.export.adapter_task import adapter_task
from lora_cli.export.merge import merge_adapter
from lora_cli.tensorfile import header_bytes

GIB, RANK, ALPHA = 2**30, 8, 16
SHAPE = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("memory")
    command.add_argument("--gib", type=float, default=20.0)
    command.add_argument("--cap", type=float, default=4.0)
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--layers", type=int, help="instead of --gib")
    command.set_defaults(run=memory)
    command = commands.add_parser("cost")
    command.add_argument("--adapter", type=Path, required=True)
    command.add_argument("--rounds", type=int, default=20)
    command.set_defaults(run=cost)
    args = parser.parse_args()
    args.run(args)


def cost(args: argparse.Namespace) -> None:
    """Print the operations and the time of a forward pass of three models."""
    task, saved = adapter_task(args.adapter)
    task.trained_in = args.adapter
    task.load_processor()
    merged = Path(tempfile.mkdtemp()) / "merged"
    merge_adapter(None, args.adapter, merged)
    cpu = torch.device("cpu")
    found = {"base": task.load_model(cpu, torch.float32)[0].eval()}
    model, new = task.load_model(cpu, torch.float32)
    load_adapter(model, saved, new, drawn=task.drawn)
    found["base + adapter"] = model.eval()
    found["merged"] = task.reloaded(merged, torch.float32).eval()
    probe, times = task.probe(), {name: [] for name in found}
    with torch.no_grad():
        for _ in range(args.rounds):  # in turn, so that other load affects all of them equally
            for name, model in found.items():
                start = time.perf_counter()
                task.probed(model, probe)
                times[name].append(time.perf_counter() - start)
        for name, model in found.items():
            with FlopCounterMode(display=False) as counter:
                task.probed(model, probe)
            shortest = 1e3 * min(times[name])
            print(f"{name}: {counter.get_total_flops():,} operations, {shortest:.2f} ms at best")


# ------------------------------------------------------------------------------------------ memory


def memory(args: argparse.Namespace) -> None:
    """Create a base and an adapter, merge them, and check the result."""
    base, adapter = args.work / "base", args.work / "adapter"
    layers = args.layers or round((args.gib * GIB - 2.2e9) / 4.37e8)
    size = make_base(base, layers)
    make_adapter(base, adapter)
    command = ["-m", "lora_cli", "merge", "--base", str(base), "--adapter", str(adapter)]
    command += ["--to", str(args.work / "merged")]
    limit = int(args.cap * GIB)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command],
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    took = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"base {size / GIB:.1f} GiB in {len(list(base.glob('*.safetensors')))} files")
    print(f"exit code {done.returncode}, {took:.0f} s, peak {peak / GIB:.2f} GiB")
    if done.returncode == 0:
        check(base, adapter, args.work / "merged")


def make_base(folder: Path, layers: int) -> int:
    """Write a Llama with random weights; return the size of its weights in bytes."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        num_hidden_layers=layers, tie_word_embeddings=False, dtype="bfloat16", bos_token_id=0,
        eos_token_id=1, pad_token_id=2, **SHAPE,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 1000)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    shards: list[dict[str, Any]] = [{}]
    for name, tensor in model.state_dict().items():
        if sum(2 * t.numel() for t in shards[-1].values()) + 2 * tensor.numel() > 4 * GIB:
            shards.append({})
        shards[-1][name] = tensor
    torch.manual_seed(0)
    block = (torch.randn(2**23) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    places, total = {}, 0
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(shard, name)
        with (folder / name).open("wb") as handle:
            named = {n: ("BF16", list(t.shape)) for n, t in shard.items()}
            handle.write(header_bytes(named, {"format": "pt"}))
            for tensor in shard.values():
                left, total = 2 * tensor.numel(), total + 2 * tensor.numel()
                while left:
                    left -= handle.write(block[: min(left, len(block))])
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def make_adapter(base: Path, folder: Path) -> None:
    """Write an adapter of rank 8 on all linear layers, in PEFT's format."""
    folder.mkdir()
    places = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    tensors, targets = {}, set()
    for name, file in places.items():
        if "_proj" in name:
            with safe_open(base / file, "pt") as handle:
                n_out, n_in = handle.get_slice(name).get_shape()
            site = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{site}.lora_A.weight"] = torch.randn(RANK, n_in) * 0.01
            tensors[f"{site}.lora_B.weight"] = torch.randn(n_out, RANK) * 0.01
            targets.add(name.split(".")[-2])
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
        "base_model_name_or_path": str(base), "target_modules": sorted(targets), "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def check(base: Path, adapter: Path, merged: Path) -> None:
    """Compute one adapted tensor of each file again, and compare all names and sizes."""
    index = "model.safetensors.index.json"
    before, after = (json.loads((folder / index).read_text()) for folder in (base, merged))
    assert before == after, "the indices differ"
    files = sorted(set(before["weight_map"].values()))
    for file in files:
        assert (base / file).stat().st_size == (merged / file).stat().st_size, file
        with (
            safe_open(base / file, "pt") as old,
            safe_open(merged / file, "pt") as new,
            safe_open(adapter / "adapter_model.safetensors", "pt") as own,
        ):
            assert list(old.keys()) == list(new.keys()), file
            name = next((n for n in old.keys() if "q_proj" in n), None)  # noqa: SIM118 - no dict
            if name is None:
                continue
            site = "base_model.model." + name.removesuffix("weight")
            a, b = (own.get_tensor(f"{site}lora_{side}.weight") for side in "AB")
            wanted = (old.get_tensor(name).float() + ALPHA / RANK * (b @ a)).bfloat16()
            assert torch.equal(new.get_tensor(name), wanted), name
            assert not torch.equal(new.get_tensor(name), old.get_tensor(name)), name
    print(f"{len(files)} files: same names, sizes and index; one tensor of each computed again")


if __name__ == "__main__":
    main()
