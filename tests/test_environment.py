"""Environment variables change no number: they place processes, or they are named and removed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import accelerate
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from lora_cli import accelerator as placement
from lora_cli.environment import (
    NAMES,
    PLACING,
    Processes,
    clean_environment,
    read_processes,
    reject_mpi,
)
from lora_cli.errors import LoraError, ResourceError
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.tasks.examples import Batch
from lora_cli.training import train
from lora_cli.training.engine import Engine
from lora_cli.training.step import train_step

PACKAGE = Path(accelerate.__path__[0])
ACCELERATE = sorted(
    set(re.findall(r"\bACCELERATE_[A-Z0-9_]*[A-Z0-9]\b", " ".join(
        file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py")
    )))
)  # fmt: skip
FOREIGN = {"FSDP_VERSION": "2", "PARALLELISM_CONFIG_TP_SIZE": "2", "FORK_LAUNCHED": "x"}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin and end with the environment and with the state of Accelerate as they were."""
    before = dict(os.environ)
    for name in PLACING:
        monkeypatch.delenv(name, raising=False)
    yield
    reset()
    os.environ.clear()
    os.environ |= before


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


class Squares:
    """A task whose loss is the sum of squares."""

    loss_weights = train_loss_weights = {"loss": 1.0}
    couples_examples = False

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return model(batch.targets["labels"])

    output = forward  # nothing is frozen

    def losses(
        self, model: torch.nn.Module, output: torch.Tensor, batch: Batch
    ) -> dict[str, torch.Tensor]:
        return {"loss": output.square().sum(-1)}


def step(recipe: Recipe) -> tuple[list[float], str]:
    """Return the weights after two steps, and where and how Accelerate computes."""
    reset()
    torch.manual_seed(0)
    accelerator = placement.start_accelerator(recipe)
    model = torch.nn.Linear(3, 2)
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        batches = [
            Batch({}, {"labels": torch.randn(2, 3)}, {"loss": torch.ones(2)}, 6, [0, 1])
            for _ in range(2)
        ]
        engine = Engine(model, Squares(), optimizer, accelerator, 1.0)  # type: ignore[arg-type]
        train_step(engine, batches)
    how = f"{accelerator.distributed_type} {accelerator.device} {accelerator.mixed_precision}"
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(), how


@pytest.mark.slow
def test_no_variable_of_accelerate_changes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(ACCELERATE) > 30
    recipe = tiny.recipe_of()
    expected = step(recipe)
    for name in ACCELERATE:
        for value in ("4", "true") if name != "ACCELERATE_USE_CPU" else ("true", "no"):
            monkeypatch.setenv(name, value)
            assert step(recipe) == expected, f"{name}={value}"
            assert name not in os.environ or name == "ACCELERATE_USE_CPU"
            monkeypatch.delenv(name, raising=False)


def test_all_variables_at_once_change_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.recipe(tiny.save_encoder(tmp_path / "base"), tmp_path)
    plain = train(load_recipe(path, [f"output_dir={tmp_path / 'plain'}"]))
    for name in (*ACCELERATE, *NAMES):
        if name != "ACCELERATE_USE_CPU":
            monkeypatch.setenv(name, "2")
    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    reset()
    report = train(load_recipe(path))
    assert report["metrics"] == plain["metrics"]
    ours, theirs = (tmp_path / out / "adapter_model.safetensors" for out in ("plain", "out"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("variable", "named"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", True),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=1", False),
        ("ACCELERATE_MIXED_PRECISION=fp16", True),
        ("ACCELERATE_MIXED_PRECISION=no", False),
        ("ACCELERATE_DYNAMO_BACKEND=foo", True),
        ("ACCELERATE_DYNAMO_BACKEND=NO", False),
        ("ACCELERATE_DYNAMO_MODE=default", False),
        ("ACCELERATE_USE_FSDP=true", True),
        ("ACCELERATE_USE_FSDP=false", False),
        ("ACCELERATE_LOG_LEVEL=debug", False),
        ("NVIDIA_TF32_OVERRIDE=1", True),
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1", True),
        ("CUBLAS_WORKSPACE_CONFIG=:4096:8", True),
        ("ONEDNN_DEFAULT_FPMATH_MODE=BF16", True),
        ("PYTORCH_TUNABLEOP_ENABLED=1", True),
        ("PYTORCH_TUNABLEOP_VERBOSE=1", False),
    ],
)
def test_what_is_ignored_is_named_once(
    variable: str,
    named: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, _, value = variable.partition("=")
    monkeypatch.setenv(name, value)
    clean_environment()
    clean_environment()
    assert name not in os.environ
    said = capsys.readouterr().err
    assert said.count("ignored environment variable") == named
    assert (f"`{variable}`" in said) == named


def test_the_other_processes_leave_the_warning_to_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    clean_environment()
    assert capsys.readouterr().err == ""
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in os.environ


def test_what_changes_no_number_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1", "HF_HOME": "/tmp", "TORCH_LOGS": "+dynamo", "NCCL_DEBUG": "INFO",
    }  # fmt: skip
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    clean_environment()
    assert {name: os.environ[name] for name in kept} == kept


PAIR = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Processes()),
        ({"LOCAL_RANK": "0"}, Processes()),
        ({"WORLD_SIZE": "1"}, Processes()),
        ({"WORLD_SIZE": "", "RANK": " "}, Processes()),
        ({"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}, Processes()),
        ({**PAIR, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, Processes()),
        ({"ACCELERATE_USE_CPU": "Yes"}, Processes(use_cpu=True)),
        (PAIR, Processes(2, 1, 1, False, "localhost:29500")),
        ({**PAIR, "PMI_SIZE": "1", "PMI_RANK": "0"}, Processes(2, 1, 1, False, "localhost:29500")),
    ],
)
def test_the_placement_is_read(
    variables: dict[str, str], expected: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_processes() == expected
    # of a single process nothing is left that a library could take for a sign of others
    left = {name for name in PLACING if name in os.environ}
    assert left == (set(PAIR) if expected.size > 1 else set())
    assert not [name for name in os.environ if name.startswith("PMI_")]


@pytest.mark.parametrize(
    ("variables", "what"),
    [
        ({"WORLD_SIZE": "x"}, "`WORLD_SIZE=x` is not a number from 1 to"),
        ({"WORLD_SIZE": "0"}, "`WORLD_SIZE=0` is not a number from 1 to"),
        ({"WORLD_SIZE": "-1"}, "`WORLD_SIZE=-1` is not a number"),
        ({"WORLD_SIZE": "\uff12"}, "is not a number"),
        ({"WORLD_SIZE": "2.0"}, "is not a number"),
        ({"LOCAL_RANK": "3"}, "`LOCAL_RANK` is 3, and `WORLD_SIZE` does not say that there are"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "`RANK` is 1, and"),
        (
            {"WORLD_SIZE": "2"},
            "`RANK` and `LOCAL_RANK` and `MASTER_ADDR` and `MASTER_PORT` are",
        ),
        ({**PAIR, "MASTER_ADDR": ""}, "`WORLD_SIZE` is 2, but `MASTER_ADDR` is not set"),
        ({**PAIR, "MASTER_PORT": "99999"}, "`MASTER_PORT=99999` is not a number from 1 to 65535"),
        ({**PAIR, "RANK": "2"}, "`RANK` is 2, and counts from 0 to 1"),
        ({**PAIR, "LOCAL_WORLD_SIZE": "1"}, "`LOCAL_RANK` is 1, and counts from 0 to 0"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "`ACCELERATE_USE_CPU=maybe` is not true or false"),
    ],
)
def test_a_wrong_placement_is_named(
    variables: dict[str, str], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LoraError) as caught:
        read_processes()
    assert what in str(caught.value)
    assert caught.value.problems[-1].hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_of_mpi_are_not_taken_for_single_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    reject_mpi()
    monkeypatch.setenv(name, "3")
    with pytest.raises(LoraError, match="MPI has started 3 processes"):
        reject_mpi()
    monkeypatch.setenv("WORLD_SIZE", "3")  # a launcher within MPI
    reject_mpi()


def test_a_process_without_others_says_so_and_gives_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {**PAIR, "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(placement, "NOTICE_S", 0.05)
    monkeypatch.setattr(placement, "APPEAR_S", 0.5)
    reset()
    with pytest.raises(ResourceError) as caught:
        placement.start_accelerator(tiny.recipe_of())
    waits = f"process 0 of 2 waits at localhost:{port} (`MASTER_ADDR`, `MASTER_PORT`)"
    assert waits in capsys.readouterr().err
    assert "process 0 of 2 waited in vain" in str(caught.value)
    assert "start all 2 processes" in str(caught.value)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_address_that_is_not_known_is_named(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "no.such.host.invalid"}
    for name, value in {**PAIR, **values}.items():
        monkeypatch.setenv(name, value)

    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(placement.socket, "getaddrinfo", unknown)  # no name server is asked
    monkeypatch.setattr(placement, "NOTICE_S", 0.05)
    monkeypatch.setattr(placement, "APPEAR_S", 0.2)
    reset()
    with pytest.raises(ResourceError) as caught:
        placement.start_accelerator(tiny.recipe_of())
    reason = "no machine is known as `no.such.host.invalid` (Name or service not known)"
    assert reason in str(caught.value)
    assert reason in capsys.readouterr().err


def test_a_process_that_waits_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**PAIR, "MASTER_PORT": "1"}.items():  # where nobody listens
        monkeypatch.setenv(name, value)

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(placement.time, "sleep", interrupted)
    reset()
    with pytest.raises(KeyboardInterrupt):
        placement.start_accelerator(tiny.recipe_of())


def test_what_a_notebook_set_for_torch_is_undone(capsys: pytest.CaptureFixture[str]) -> None:
    expected = step(tiny.recipe_of())
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        assert step(tiny.recipe_of()) == expected
        assert torch.get_default_dtype() == torch.float32
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    said = capsys.readouterr().err
    assert "default dtype was torch.float64" in said
    assert "precision of matrix products was `medium`" in said


@pytest.mark.parametrize(("asked", "count", "there"), [("0,5", 1, True), ("7", 0, True)])
def test_gpus_that_are_not_there_are_named(
    asked: str, count: int, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0000:19:00.0").mkdir()
    monkeypatch.setattr(placement, "GPUS", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
    with pytest.raises(LoraError, match=rf"`CUDA_VISIBLE_DEVICES={asked}` names .* {count} of"):
        placement.start_accelerator(tiny.recipe_of())


def test_a_variable_for_gpus_means_nothing_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "GPUS", Path("/nowhere"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert step(tiny.recipe_of())[1].startswith("DistributedType.NO cpu")


def test_more_processes_than_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in PAIR.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LoraError, match="`LOCAL_RANK` is 1, but there is no such GPU: 1 GPU"):
        placement.start_accelerator(tiny.recipe_of())


def test_the_environment_is_read_without_torch() -> None:
    code = (
        "import sys; from lora_cli.environment import clean_environment; clean_environment();"
        "print([name for name in ('torch', 'pydantic', 'accelerate') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
