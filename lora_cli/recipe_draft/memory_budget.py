"""Fit training into GPU memory by the choice of precision, micro-batch size and other settings.

The sizes are estimates. For comparison, the measured peaks of training an 8B Llama with 2 x 4,096
tokens: 72 GiB without gradient checkpointing (estimate: 73), 29 GiB with it (estimate: 30). With
1 x 4,096 tokens, gradient checkpointing and a 4-bit base: 15 GiB (estimate: 14).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_cli.errors import LoraError

GIB = 2**30
LARGE = 1_000_000_000  # parameters; larger models always use 16 bits
SMALL = 200_000_000  # parameters; smaller models gain little from 16 bits
USABLE = 0.88  # share of GPU memory available to a run
OVERHEAD_BYTES = 1.0 * GIB  # CUDA, its libraries, and fragmentation of the allocator
ADAPTER_BYTES = 0.01 * 16  # per base parameter: about 1 % as many are trained, 16 bytes each
NF4_BYTES = 0.52  # per weight in NF4, including scales
BYTES_PER_LOGIT = 10  # in bf16, in float32, and the gradient
MIN_LENGTH = 256  # tokens; do not truncate examples further


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that determine its memory use.

    Args:
        parameters: Number of parameters.
        layers: Number of blocks; 0 if unknown.
        hidden: Hidden size.
        inner: Intermediate size of the feed-forward layers.
        vocabulary: Vocabulary size of the language model head; 0 without one.
    """

    parameters: int
    layers: int = 0
    hidden: int = 0
    inner: int = 0
    vocabulary: int = 0

    @property
    def is_known(self) -> bool:
        """Whether the activations can be estimated."""
        return bool(self.layers and self.hidden)


@dataclass(frozen=True)
class Fit:
    """Settings with which training fits into memory.

    Args:
        precision: fp32, fp16 or bf16.
        micro_batch: Examples per forward pass.
        accumulation: Forward passes per step.
        checkpointing: Whether to use gradient checkpointing.
        length: Maximum length of an example in tokens.
        needed: Estimated memory in bytes.
        four_bit: Whether to quantize the frozen base to 4 bits.
    """

    precision: str
    micro_batch: int
    accumulation: int
    checkpointing: bool
    length: int
    needed: float
    four_bit: bool = False


@dataclass(frozen=True)
class Card:
    """A GPU.

    Args:
        memory: Memory in bytes.
        name: Name in comments: `NVIDIA L4`, or `a GPU of 24 GiB`.
        has_bf16: Whether it supports bf16.
    """

    memory: float
    name: str
    has_bf16: bool = True


def local_card() -> Card | None:
    """Return the GPU of this machine with the least memory; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    smallest = min(cards, key=lambda card: card.total_memory)
    return Card(smallest.total_memory, smallest.name, torch.cuda.is_bf16_supported(False))


def needed_bytes(shape: Shape, fit: Fit) -> float:
    """Estimate the memory for training an adapter in bytes."""
    width = 4 if fit.precision == "fp32" else 2
    tokens = fit.micro_batch * fit.length
    inner = shape.inner or 4 * shape.hidden
    layer_bytes = width * (
        9 * shape.hidden + 4 * inner
    )  # activations saved for the backward pass of a block
    if fit.checkpointing:
        activations = shape.layers * width * shape.hidden + layer_bytes
    else:
        activations = shape.layers * layer_bytes
    activations += shape.vocabulary * BYTES_PER_LOGIT
    weights: float = shape.parameters * width
    if fit.four_bit:
        unquantized = min(
            2 * shape.vocabulary * shape.hidden, shape.parameters
        )  # embeddings and head are not quantized
        weights = unquantized * width + (shape.parameters - unquantized) * NF4_BYTES
    return OVERHEAD_BYTES + weights + shape.parameters * ADAPTER_BYTES + tokens * activations


def fit_to(
    shape: Shape, card: Card | None, micro_batch: int, accumulation: int, length: int
) -> Fit:
    """Return settings that fit into memory: the requested ones, or otherwise more economical ones.

    In order: smaller micro-batches, gradient checkpointing, a 4-bit base (for large models), and
    shorter examples. The number of examples per step stays the same.

    Args:
        shape: The sizes of the model.
        card: The GPU to train on; None for the CPU, or if unknown.
        micro_batch: Requested examples per forward pass.
        accumulation: Requested forward passes per step.
        length: Requested maximum length of an example in tokens.

    Raises:
        LoraError: If no settings fit into memory.
    """
    precision = "fp32"
    if shape.parameters > (SMALL if card else LARGE):
        precision = "bf16" if card is None or card.has_bf16 else "fp16"
    examples = micro_batch * accumulation
    sizes = [n for n in (micro_batch, micro_batch // 2, 1) if n >= 1 and examples % n == 0]
    without_checkpointing = [(size, False) for size in sizes if size >= min(2, micro_batch)]
    tries = [(size, checkpointing, False) for size, checkpointing in without_checkpointing]
    tries += [(size, True, False) for size in sizes]
    if card is None:  # no limit, but save memory if the model is large
        large = shape.parameters > LARGE
        tries = [(1, True, False)] if large else [(micro_batch, False, False)]
    elif shape.parameters > LARGE and shape.is_known:
        tries += [(size, True, True) for size in sizes]
    if not shape.is_known:
        tries = [tries[-1] if shape.parameters > LARGE else tries[0]]
    while True:
        for size, checkpointing, four_bit in tries:
            passes = examples // size
            fit = Fit(precision, size, passes, checkpointing, length, 0.0, four_bit)
            fit = replace(fit, needed=needed_bytes(shape, fit))
            if card is None or fit.needed <= USABLE * card.memory:
                return fit
        if length <= MIN_LENGTH or not shape.is_known:
            break
        length = max(MIN_LENGTH, length // 2)
    assert card is not None
    raise LoraError(
        f"a model of {in_words(shape.parameters)} parameters needs about {gib(fit.needed)} GiB to "
        f"train, and {card.name} has {gib(card.memory)}",
        "--model",
        "choose a smaller model, or name a larger GPU: "
        f"`--memory {-(-int(fit.needed / USABLE) // GIB)}`",
    )


def in_words(parameters: int) -> str:
    """Format a number of parameters: `22.7 million`, `8.0 billion`."""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.1f} billion"
    return f"{parameters / 1e6:.1f} million" if parameters >= 1e6 else f"{parameters:,}"


def gib(size: float) -> str:
    """Format a number of bytes in GiB, without the unit."""
    return f"{size / GIB:.0f}" if size >= 10 * GIB else f"{size / GIB:.1f}"
