"""Environment variables: those that place the processes are checked; others are removed.

The recipe alone decides what is computed. Libraries read dozens of variables that would change it
without a word: Accelerate divides every gradient by `ACCELERATE_GRADIENT_ACCUMULATION_STEPS`, and
`NVIDIA_TF32_OVERRIDE=1` rounds every product on a GPU to ten bits. `clean_environment` removes
them before those libraries are imported.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

from lora_cli.errors import LoraError, Problem, warn
from lora_cli.redaction import redacted

PLACING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
USE_CPU = "ACCELERATE_USE_CPU"  # the launcher sets it; it chooses the device, so it is obeyed
YES, NO = ("1", "true", "yes", "on", "y", "t"), ("", "0", "false", "no", "off", "n", "f")

# Families of variables that are read by libraries, and set something that the recipe decides.
FAMILIES = (
    "ACCELERATE_", "FORK_LAUNCHED",
    "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "FP8_",  # plug-ins of Accelerate
    "PYTORCH_TUNABLEOP_",  # chooses kernels by their speed, so differently each time
)  # fmt: skip

OTHER_KERNEL = "it chooses other kernels, which round differently"
LOW_PRECISION = "it computes float32 in a lower precision"
RECIPE = "the recipe decides that"
# Single variables that change a number, and why nobody should wonder that they are ignored.
# (Memory allocation, logging and debugging change none, and stay.)
NAMES = {
    "NVIDIA_TF32_OVERRIDE": LOW_PRECISION,
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": LOW_PRECISION,
    "ONEDNN_DEFAULT_FPMATH_MODE": LOW_PRECISION,
    "DNNL_DEFAULT_FPMATH_MODE": LOW_PRECISION,
    "OMP_DYNAMIC": "torch may wait forever for threads that it withholds",
    "XLA_USE_BF16": LOW_PRECISION,
    "XLA_DOWNCAST_BF16": LOW_PRECISION,
    "ATEN_CPU_CAPABILITY": OTHER_KERNEL,
    "CUBLAS_WORKSPACE_CONFIG": OTHER_KERNEL,
    "CUBLASLT_WORKSPACE_SIZE": OTHER_KERNEL,
    "DISABLE_ADDMM_CUDA_LT": OTHER_KERNEL,
    "DNNL_MAX_CPU_ISA": OTHER_KERNEL,
    "FLASH_ATTENTION_DETERMINISTIC": OTHER_KERNEL,
    "MKL_CBWR": OTHER_KERNEL,
    "MKL_DISABLE_FAST_MM": OTHER_KERNEL,
    "MKL_DOMAIN_NUM_THREADS": OTHER_KERNEL,
    "MKL_ENABLE_INSTRUCTIONS": OTHER_KERNEL,
    "MKL_NUM_STRIPES": OTHER_KERNEL,
    "ONEDNN_MAX_CPU_ISA": OTHER_KERNEL,
    "PYTORCH_MIOPEN_SUGGEST_NHWC": OTHER_KERNEL,
    "PYTORCH_MIOPEN_SUGGEST_NHWC_BATCHNORM": OTHER_KERNEL,
    "TORCH_BLAS_PREFER_CUBLASLT": OTHER_KERNEL,
    "TORCH_BLAS_PREFER_HIPBLASLT": OTHER_KERNEL,
    "TORCH_CUDNN_USE_HEURISTIC_MODE_B": OTHER_KERNEL,
    "TORCH_CUDNN_V8_API_DISABLED": OTHER_KERNEL,
    "TORCH_LINALG_PREFER_CUSOLVER": OTHER_KERNEL,
    "TORCH_LINALG_PREFER_HIPSOLVER": OTHER_KERNEL,
    "TORCH_LINEAR_FLATTEN_3D": OTHER_KERNEL,
    "TORCH_MKLDNN_MATMUL_MIN_DIM": OTHER_KERNEL,
    "TORCH_MKLDNN_MATMUL_MIN_SIZE": OTHER_KERNEL,
    "TORCH_ROCM_FA_PREFER_CK": OTHER_KERNEL,
    "TRANSFORMERS_DISABLE_DEEPGEMM_LINEAR": OTHER_KERNEL,
    "TRANSFORMERS_DISABLE_TORCH_CHECK": "transformers would not find torch",
    "TRANSFORMERS_SDPA_FORCE_GQA": OTHER_KERNEL,
}
# Those of the families that change what is computed, and the values that ask for nothing. (The
# launcher of Accelerate sets some of them, to these values unless it is configured otherwise. The
# others of a family only describe a plug-in, which one of these has to switch on, or a log.)
SWITCHES = {
    "ACCELERATE_DOWNCAST_BF16": NO,
    "ACCELERATE_DYNAMO_BACKEND": (*NO, "none"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("", "1"),
    "ACCELERATE_MIXED_PRECISION": (*NO, "fp32"),
    "ACCELERATE_TORCH_DEVICE": ("",),
    "ACCELERATE_USE_DEEPSPEED": NO,
    "ACCELERATE_USE_FSDP": NO,
    "ACCELERATE_USE_MEGATRON_LM": NO,
    "ACCELERATE_USE_PARALLELISM_CONFIG": NO,
    "ACCELERATE_USE_SAGEMAKER": NO,
    "PYTORCH_TUNABLEOP_ENABLED": NO,
}
# Set, whatever they were: a package that happens to be installed must not change a number. With
# `kernels`, transformers would exchange layers for kernels that it downloads; with `torch_xla`, it
# and Accelerate would compute on another device.
FIXED = {"USE_HUB_KERNELS": "0", "USE_TORCH_XLA": "0"}
MPI = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Processes:
    """The number of processes that share the work, and which of them this is."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0
    """Its index among the processes of this machine, which chooses its GPU."""
    use_cpu: bool = False
    """Whether the CPU is requested, even if there is a GPU."""
    address: str = ""
    """Where the first process waits for the others: `host:port`."""


def clean_environment() -> None:
    """Remove the variables that would change results, and name those with an effect.

    Has to come before torch, transformers and Accelerate are imported; what they read later than
    that is removed also if it comes afterwards.
    """
    ignored = []
    for name, value in list(os.environ.items()):
        if name == USE_CPU or not (name in NAMES or name.startswith(FAMILIES)):
            continue
        del os.environ[name]
        if name in NAMES and value.strip():
            ignored.append(f"`{name}={value}` ({NAMES[name]})")
        elif name in SWITCHES and value.strip().lower() not in SWITCHES[name]:
            ignored.append(f"`{name}={value}` ({RECIPE})")
    os.environ |= FIXED
    if ignored and os.environ.get("RANK", "0").strip() in ("", "0"):
        noun = "environment variable" if len(ignored) == 1 else "environment variables"
        warn(f"ignored {noun} {', '.join(map(redacted, ignored))}")


def reject_mpi() -> None:
    """Reject several processes of MPI that do not know of each other: each would train it all."""
    for name in () if os.environ.get("WORLD_SIZE", "").strip() else MPI_SIZES:
        if (size := os.environ.get(name, "").strip()) not in ("", "0", "1"):
            raise LoraError(
                f"MPI has started {size} processes, and each would train on its own",
                f"the environment variable `{name}`",
                "start them with `torchrun` or `accelerate launch` instead",
            )


def read_processes() -> Processes:
    """Return the processes that the environment describes, after checking it.

    A single process needs no variables, and those that say no more than that are removed: libraries
    would take any one of them as a sign that there are others.

    Raises:
        LoraError: With every variable that is wrong or missing.
    """
    for name in [name for name in os.environ if name.startswith(MPI)]:
        del os.environ[name]  # Accelerate would believe them more than WORLD_SIZE
    given = {name: os.environ.get(name, "").strip() for name in PLACING}
    problems: list[Problem] = []
    numbers = {
        name: _number(name, given[name], problems) for name in PLACING if name != "MASTER_ADDR"
    }
    use_cpu = os.environ.get(USE_CPU, "").strip().lower()
    if use_cpu not in YES + NO:
        problems.append(_wrong(USE_CPU, use_cpu, "true or false"))
    if not problems:
        size = numbers["WORLD_SIZE"]
        problems = _alone(numbers) if size in (None, 1) else _together(given, numbers)
    if problems:
        wrong = [name for name in (*PLACING, USE_CPU) if os.environ.get(name, "").strip()]
        hint = "start with `torchrun` or `accelerate launch`, which set all of them; for a single "
        hint += f"process: `env {' '.join(f'-u {name}' for name in wrong)}` before"
        last = problems[-1]
        raise LoraError([*problems[:-1], Problem(last.what, last.at, f"{hint} the command")])
    if size in (None, 1):
        for name in PLACING:
            os.environ.pop(name, None)
        return Processes(use_cpu=use_cpu in YES)
    rank, local = numbers["RANK"], numbers["LOCAL_RANK"]
    assert size is not None
    assert rank is not None
    assert local is not None
    address = f"{given['MASTER_ADDR']}:{given['MASTER_PORT']}"
    return Processes(size, rank, local, use_cpu in YES, address)


def _number(name: str, text: str, problems: list[Problem]) -> int | None:
    """Return a variable as a number, or None if it is not set; note a problem if it is invalid."""
    if not text:
        return None
    smallest = 1 if name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT") else 0
    largest = 65535 if name == "MASTER_PORT" else 10**6
    if not (text.isascii() and text.isdigit() and smallest <= int(text[:9]) <= largest):
        problems.append(_wrong(name, text, f"a number from {smallest} to {largest}"))
        return None
    return int(text)


def _alone(numbers: dict[str, int | None]) -> list[Problem]:
    """Return the variables that contradict that this is the only process."""
    return [
        Problem(
            f"`{name}` is {numbers[name]}, and `WORLD_SIZE` does not say that there are others",
            f"the environment variable `{name}`",
        )
        for name in ("RANK", "LOCAL_RANK")
        if numbers[name]
    ]


def _together(given: dict[str, str], numbers: dict[str, int | None]) -> list[Problem]:
    """Return the variables that are missing or wrong for one of several processes."""
    size = numbers["WORLD_SIZE"] or 1
    needed = [name for name in PLACING if name != "LOCAL_WORLD_SIZE"]
    if missing := [f"`{name}`" for name in needed if not given[name]]:
        verb = "is" if len(missing) == 1 else "are"
        what = f"`WORLD_SIZE` is {size}, but {' and '.join(missing)} {verb} not set"
        return [Problem(what, "the environment variables")]
    limits = {"RANK": size, "LOCAL_RANK": numbers["LOCAL_WORLD_SIZE"] or size}
    return [
        Problem(
            f"`{name}` is {numbers[name]}, and counts from 0 to {limit - 1}",
            f"the environment variable `{name}`",
        )
        for name, limit in limits.items()
        if (numbers[name] or 0) >= limit
    ]


def _wrong(name: str, value: str, wanted: str) -> Problem:
    return Problem(f"`{name}={value}` is not {wanted}", f"the environment variable `{name}`")


@functools.cache
def installed_version(package: str) -> str:
    """Return the version of an installed package. Its metadata are read from disk only once."""
    from importlib.metadata import version  # `lora --help` does not need it

    return version(package)


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed, as it is with torch for GPUs on Linux."""
    return importlib.util.find_spec("triton") is not None
