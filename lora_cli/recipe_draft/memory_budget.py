"""How a model is trained within the memory of a GPU: its precision, and what a step sees at once.

The sizes are estimates. They were compared with the peaks that training an 8B Llama at 2 x 4,096
tokens takes: 72 GiB without gradient checkpointing (estimated: 73), 29 GiB with it (estimated: 30);
and at 1 x 4,096 tokens with it and a base in 4 bits: 15 GiB (estimated: 14).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_cli.errors import LoraError

GIB = 2**30
LARGE = 1_000_000_000  # parameters; a larger model is kept in 16 bits whatever trains it
SMALL = 200_000_000  # parameters; a smaller model gains little from 16 bits
USABLE = 0.88  # share of a GPU's memory that a run can have
FIXED = 1.0 * GIB  # what CUDA, its libraries and the allocator's gaps take
ADAPTER_BYTES = 0.01 * 16  # of each parameter: about one in a hundred is trained, 16 bytes each
NF4_BYTES = 0.52  # of a weight in 4 bits, with its scales
BYTES_PER_LOGIT = 10  # in bf16, in float32, and their gradient
SHORTEST = 256  # tokens; below, examples are cut to pieces


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its memory depends on.

    Args:
        parameters: How many it has.
        layers: Blocks; 0 if that is not known.
        hidden: Width of a block.
        inner: Width of its feed-forward part.
        vocabulary: Outputs of the language model's head; 0 if it has none.
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
    """How a step is computed.

    Args:
        precision: fp32, fp16 or bf16.
        micro_batch: Examples of a forward pass.
        accumulation: Forward passes of a step.
        checkpointing: Activations are computed again in the backward pass.
        length: Longest example in tokens.
        needed: Memory in bytes, as far as it can be estimated.
        four_bit: The frozen base is kept in 4 bits.
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
        memory: In bytes.
        name: As it is called in comments: `NVIDIA L4`, or `a GPU of 24 GiB`.
        has_bf16: It computes in bf16.
    """

    memory: float
    name: str
    has_bf16: bool = True


def card_here() -> Card | None:
    """Return the GPU of this machine, the smallest if there are several, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    smallest = min(cards, key=lambda card: card.total_memory)
    return Card(smallest.total_memory, smallest.name, torch.cuda.is_bf16_supported(False))


def needed_bytes(shape: Shape, fit: Fit) -> float:
    """Return the memory that training an adapter takes, estimated."""
    width = 4 if fit.precision == "fp32" else 2
    tokens = fit.micro_batch * fit.length
    inner = shape.inner or 4 * shape.hidden
    of_layer = width * (9 * shape.hidden + 4 * inner)  # what the backward pass of a block reads
    if fit.checkpointing:
        activations = shape.layers * width * shape.hidden + of_layer
    else:
        activations = shape.layers * of_layer
    activations += shape.vocabulary * BYTES_PER_LOGIT
    weights: float = shape.parameters * width
    if fit.four_bit:
        outer = min(
            2 * shape.vocabulary * shape.hidden, shape.parameters
        )  # they keep their numbers
        weights = outer * width + (shape.parameters - outer) * NF4_BYTES
    return FIXED + weights + shape.parameters * ADAPTER_BYTES + tokens * activations


def fit_to(
    shape: Shape, card: Card | None, micro_batch: int, accumulation: int, length: int
) -> Fit:
    """Return how a model is trained: as asked for if that fits, else in smaller parts.

    A large base that does not fit in 16 bits is kept in 4, before examples are cut.

    Args:
        shape: The model's sizes.
        card: The GPU that trains it; None where it is not known, or the CPU.
        micro_batch: Examples of a forward pass, where memory allows.
        accumulation: Forward passes of a step, likewise.
        length: Longest example in tokens.

    Raises:
        LoraError: If the weights alone are larger than the memory.
    """
    precision = "fp32"
    if shape.parameters > (SMALL if card else LARGE):
        precision = "bf16" if card is None or card.has_bf16 else "fp16"
    examples = micro_batch * accumulation
    sizes = [n for n in (micro_batch, micro_batch // 2, 1) if n >= 1 and examples % n == 0]
    plain = [(size, False) for size in sizes if size >= min(2, micro_batch)]
    tries = [(size, checkpointing, False) for size, checkpointing in plain]
    tries += [(size, True, False) for size in sizes]
    if card is None:  # nothing to fit into: memory is spared where the model is large
        large = shape.parameters > LARGE
        tries = [(1, True, False)] if large else [(micro_batch, False, False)]
    elif shape.parameters > LARGE and shape.is_known:
        tries += [(size, True, True) for size in sizes]
    if not shape.is_known:
        tries = [tries[-1] if shape.parameters > LARGE else tries[0]]
    while True:
        for size, checkpointing, four_bit in tries:
            parts = examples // size
            fit = Fit(precision, size, parts, checkpointing, length, 0.0, four_bit)
            fit = replace(fit, needed=needed_bytes(shape, fit))
            if card is None or fit.needed <= USABLE * card.memory:
                return fit
        if length <= SHORTEST or not shape.is_known:
            break
        length = max(SHORTEST, length // 2)
    assert card is not None
    raise LoraError(
        f"a model of {in_words(shape.parameters)} parameters needs about {gib(fit.needed)} GiB to "
        f"train, and {card.name} has {gib(card.memory)}",
        "--model",
        "choose a smaller model, or name a larger GPU: "
        f"`--memory {-(-int(fit.needed / USABLE) // GIB)}`",
    )


def in_words(parameters: int) -> str:
    """Return a number of parameters: `22.7 million`, `8.0 billion`."""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.1f} billion"
    return f"{parameters / 1e6:.1f} million" if parameters >= 1e6 else f"{parameters:,}"


def gib(size: float) -> str:
    """Return bytes in GiB."""
    return f"{size / GIB:.0f}" if size >= 10 * GIB else f"{size / GIB:.1f}"
