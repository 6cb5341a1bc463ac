"""A quantised base under torch's `fully_shard`, in two processes: shards, and the same numbers."""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path

import pytest
import tiny
import torch
import torch.multiprocessing
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lora_cli.adapters.attach import attach
from lora_cli.models.quantized_linear import Format, QuantizedLinear

pytest.importorskip("bitsandbytes")
KINDS: tuple[Format, ...] = ("nf4", "int8", "fp8")
WORLD = 2
STEPS = 3


def qlora(kind: Format) -> nn.Module:
    """Return two linear layers in 4 or 8 bits with LoRA, the same in every process."""
    torch.manual_seed(0)
    layers = []
    for n_in, n_out in ((32, 96), (96, 48)):
        layer = QuantizedLinear(n_in, n_out, nn.Parameter(torch.randn(n_out)), kind)
        layer.set_weight(torch.randn(n_out, n_in))
        layers.append(nn.Sequential(layer, nn.Tanh()))
    model = nn.Sequential(*layers).requires_grad_(False)
    attach(model, tiny.recipe_of("causal_lm", rank=4, alpha=8, target_modules=["0.0", "1.0"]))
    tiny.wake(model)
    return model


def trained(model: nn.Module, rows: slice) -> dict[str, Tensor]:
    """Train some steps on some rows; return outputs, and the last gradients and parameters."""
    x = torch.randn(4 * WORLD, 5, 32, generator=torch.Generator().manual_seed(1))[rows]
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        y = model(x)
        y.square().mean().backward()
        optimizer.step()
        found[f"outputs {step}"] = y.detach()
    found |= {f"gradient {n}": p.grad for n, p in parameters.items() if p.grad is not None}
    return found | {f"parameter {n}": p.detach() for n, p in parameters.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def process(rank: int, folder: str) -> None:
    """Train on this process's rows, with each layer divided among the processes."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    try:
        mesh = init_device_mesh("cpu", (WORLD,))
        for kind in KINDS:
            model = qlora(kind)
            whole_sizes = {n: p.numel() for n, p in model.named_parameters()}
            for block in model:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            sizes = {}
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor), name
                sizes[name] = (parameter.dtype, parameter.to_local().numel(), whole_sizes[name])
            found = {n: whole(t) for n, t in trained(model, slice(4 * rank, 4 * rank + 4)).items()}
            stored = {n: whole(t) for n, t in model.state_dict().items()}
            result = {"found": found, "sizes": sizes, "stored": stored}
            torch.save(result, f"{folder}/{kind}-{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the results of each process."""
    folder = tmp_path_factory.mktemp("shards")
    # what all processes import is imported once, by the server that forks them
    multiprocessing.set_forkserver_preload(["lora_cli.adapters.attach", "bitsandbytes"])
    start = torch.multiprocessing.start_processes
    start(process, (str(folder),), WORLD, start_method="forkserver")
    return folder


@pytest.mark.slow
@pytest.mark.proves(
    "train", variant="lora", layer="Linear", base="{kind}", against="one process without shards"
)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_shards_train_as_one_without(kind: Format, folder: Path) -> None:
    model = qlora(kind)
    before = copy.deepcopy(model.state_dict())
    wanted = trained(model, slice(None))
    results = [torch.load(folder / f"{kind}-{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for rank, result in enumerate(results):
        packed = {n: v for n, v in result["sizes"].items() if not v[0].is_floating_point}
        assert (
            len(packed) == {"nf4": 4, "int8": 2, "fp8": 2}[kind]
        )  # of two layers: weight, scales in nf4
        assert all(own * WORLD == total for _, own, total in packed.values())
        for name, tensor in before.items():
            if "lora" not in name:  # codes, scales and tables are as they were, bit for bit
                assert torch.equal(result["stored"][name], tensor), name
        assert result["found"].keys() == wanted.keys()
        for name, tensor in wanted.items():
            tensor = tensor[4 * rank : 4 * rank + 4] if name.startswith("outputs") else tensor
            torch.testing.assert_close(
                result["found"][name], tensor, rtol=0, atol=1e-5 * float(tensor.abs().max())
            )
