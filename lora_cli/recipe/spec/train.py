"""`train`: the loop, its optimizer and its scheduler."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from lora_cli.recipe.spec.distill import DistillSpec
from lora_cli.recipe.spec.section import Conflicts, Positive, Probability, Section, Seed, Word


class ParameterGroupSpec(Section):
    """Other settings for some of the trained parameters."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the group."""

    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of the group."""


class GroupsSpec(Section):
    """Groups of trained parameters; what a group leaves out is as in the optimizer."""

    head: ParameterGroupSpec = Field(default_factory=ParameterGroupSpec)
    """The modules that are trained in full."""

    adapter: ParameterGroupSpec = Field(default_factory=ParameterGroupSpec)
    """The low-rank matrices."""

    layers: dict[Annotated[str, Field(pattern=r"^\d+(-\d+)?$")], ParameterGroupSpec] = Field(
        default_factory=dict
    )
    """Ranges of layers, such as `0-5`; they come before `head` and `adapter`."""

    modules: dict[Word, ParameterGroupSpec] = Field(default_factory=dict)
    """Modules or parameters by the ends of their names, such as `embeddings`; they come first."""

    def conflicts(self) -> Conflicts:
        """Yield ranges of layers that overlap: only one of them could be followed."""
        ends = [[int(n) for n in name.split("-")] for name in self.layers]
        ranges = sorted(
            (one[0], one[-1], name) for one, name in zip(ends, self.layers, strict=True)
        )
        for (_, last, one), (first, _, other) in pairwise(ranges):
            if first <= last:
                what = f"the ranges of layers `{one}` and `{other}` overlap"
                yield "layers", what, "name each layer in one of them"


READ_BY = {"betas": "adamw", "eps": "adamw", "momentum": "sgd"}
"""The beginning of the types of optimizer that read a key."""


class OptimizerSpec(Section):
    """How the trained weights are updated."""

    type: Literal["adamw", "adamw_8bit", "sgd", "adafactor"] = "adamw"
    """`adamw` is fused on a GPU; `adamw_8bit` needs bitsandbytes."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Highest learning rate of the schedule."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay, decoupled from the gradient (with `sgd`, added to it, as torch does); biases
    and normalisation weights are spared."""

    betas: list[Probability] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """Decay of AdamW's running means."""

    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's term against division by zero."""

    momentum: Probability = 0.0
    """Momentum of SGD."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Smaller learning rates for lower layers: each layer's is this times that of the layer above
    it. The head and what else lies behind the last layer have `learning_rate`, the last layer
    `layer_decay` times that, and the embeddings the least. Of an encoder-decoder, both stacks of
    layers are counted from their own top. A rate that `groups` gives to some layers or modules is
    taken as it is."""

    lora_plus_ratio: Annotated[float, Field(gt=0)] | None = None
    """LoRA+: learning rate of `lora_B` over that of `lora_A`."""

    groups: GroupsSpec = Field(default_factory=GroupsSpec)
    """Other settings for some of the parameters."""

    def conflicts(self) -> Conflicts:
        """Yield settings that the chosen optimizer does not read, so they would change nothing."""
        for key, type_ in READ_BY.items():
            unread = not self.type.startswith(type_)
            if unread and getattr(self, key) != type(self).model_fields[key].default:
                what = f"`{key}` is read by `type: {type_}`, and the type is `{self.type}`"
                yield key, what, f"leave it out, or set `type: {type_}`"


class SchedulerSpec(Section):
    """How the learning rate moves: up over the warm-up, then along the named curve."""

    type: Literal["linear", "cosine", "constant"] = "linear"
    """`linear` and `cosine` end at zero."""

    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warm-up."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Warm-up as a share of all steps."""

    def conflicts(self) -> Conflicts:
        """Yield the two ways of saying how long the warm-up is."""
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            what = "`warmup_steps` and `warmup_ratio` exclude each other"
            yield "warmup_ratio", what, "keep one of the two"


class TrainSpec(Section):
    """The training loop."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the train rows. 3 if `max_steps` is not given either."""

    max_steps: Positive | None = None
    """Steps in all, instead of `epochs`."""

    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Stop in time before so many hours have passed since the command started, with everything
    saved; `--resume` goes on. For machines that are lent for a while."""

    micro_batch_size: Positive | Literal["auto"] = 8
    """Examples (packs, with `packing`) of one forward pass; what memory allows. `auto`: the largest
    that fits is found before the first step, and a step sees `examples_per_step` all the same."""

    gradient_accumulation_steps: Positive = 1
    """Micro-batches of a step. A step sees micro_batch_size x gradient_accumulation_steps examples
    however many processes share them."""

    examples_per_step: Positive | None = None
    """Examples of a step, instead of `gradient_accumulation_steps`."""

    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    """How the weights are updated."""

    scheduler: SchedulerSpec = Field(default_factory=SchedulerSpec)
    """How the learning rate moves."""

    distill: DistillSpec | None = None
    """Learn from a teacher besides the labels."""

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the computation; fp16 has its loss scaled, and needs a GPU."""

    kernels: Literal["auto", "reference", "fused"] = "auto"
    """How the same is computed faster. `reference`: as the model's own code does it. `auto`: losses
    of tokens are computed for some tokens at a time; on a GPU, where an encoder's answers were seen
    to stay the same, texts share rows and steps are recorded as CUDA graphs; in 16 bits, one kernel
    each computes the gate of a decoder's MLPs and RMS norms; in long runs, layers are compiled, and
    a kernel of our own computes the attention of short rows. `fused`: all of it, in short runs too;
    an error where it cannot be."""

    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Longer gradients are shortened to this norm; null leaves them."""

    gradient_checkpointing: bool | Literal["auto", "offload"] = False
    """Recompute activations in the backward pass: less memory, about a third more time. `offload`:
    what a GPU still keeps of each layer, its input, waits in the host's memory too. `auto`: as much
    of this as a micro-batch of the longest rows needs to fit into a GPU's memory, which is tried
    before the first step."""

    packing: bool = False
    """Put several short examples into one row of `max_length` tokens; none sees another."""

    group_by_length: bool = False
    """Put examples of similar length into a batch, so that less is padding."""

    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that prepare batches; they do not change the order."""

    seed: Seed = 0
    """Seed of the initial weights, the order and the dropout."""

    log_every_steps: Positive = 10
    """Steps between two lines of the log."""

    trackers: list[Literal["tensorboard", "trackio"]] = Field(default_factory=list)
    """Where else the log goes."""

    def conflicts(self) -> Conflicts:
        """Yield the keys that exclude each other."""
        if self.epochs is not None and self.max_steps is not None:
            what = "`epochs` and `max_steps` exclude each other"
            hint = "keep one: `--set train.epochs=null` or `--set train.max_steps=null`"
            yield "max_steps", what, hint
        if self.kernels == "fused" and self.distill is not None:
            what = "`kernels: fused` records steps, in which no teacher can take part"
            yield "kernels", what, "leave `kernels` out, or `distill`"
        if self.packing and self.group_by_length:
            what = "`packing` leaves no padding for `group_by_length` to save"
            yield "group_by_length", what, "leave one of the two out"
        if self.examples_per_step is not None and self.gradient_accumulation_steps > 1:
            what = "`gradient_accumulation_steps` and `examples_per_step` exclude each other"
            yield "examples_per_step", what, "keep one of the two"
        if self.micro_batch_size == "auto" and self.examples_per_step is None:
            what = "`auto` does not say how many examples a step should see"
            yield "micro_batch_size", what, "set it: `--set train.examples_per_step=64`"

    @property
    def step_size(self) -> int:
        """Examples (or packs) that one optimizer step sees."""
        if self.examples_per_step is not None:
            return self.examples_per_step
        assert self.micro_batch_size != "auto", "`conflicts` asks for `examples_per_step`"
        return self.micro_batch_size * self.gradient_accumulation_steps
