"""`train`: the training loop, the optimizer and the scheduler."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from lora_cli.recipe.spec.distill import DistillSpec
from lora_cli.recipe.spec.section import Conflicts, Positive, Probability, Section, Seed, Word


class ParameterGroupSpec(Section):
    """Different settings for some of the trained parameters."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the group."""

    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of the group."""


class GroupsSpec(Section):
    """Groups of trained parameters. What a group leaves out is taken from the optimizer."""

    head: ParameterGroupSpec = Field(default_factory=ParameterGroupSpec)
    """The modules that are trained in full."""

    adapter: ParameterGroupSpec = Field(default_factory=ParameterGroupSpec)
    """The low-rank matrices."""

    layers: dict[Annotated[str, Field(pattern=r"^\d+(-\d+)?$")], ParameterGroupSpec] = Field(
        default_factory=dict
    )
    """Ranges of layers, such as `0-5`; they take precedence over `head` and `adapter`."""

    modules: dict[Word, ParameterGroupSpec] = Field(default_factory=dict)
    """Modules or parameters by the ends of their names, such as `embeddings`; they take precedence
    over everything else."""

    def conflicts(self) -> Conflicts:
        """Yield ranges of layers that overlap, as a layer can follow only one of them."""
        ends = [[int(n) for n in name.split("-")] for name in self.layers]
        ranges = sorted(
            (one[0], one[-1], name) for one, name in zip(ends, self.layers, strict=True)
        )
        for (_, last, one), (first, _, other) in pairwise(ranges):
            if first <= last:
                what = f"the ranges of layers `{one}` and `{other}` overlap"
                yield "layers", what, "name each layer in one of them"


READ_BY = {"betas": "adamw", "eps": "adamw", "momentum": "sgd"}
"""Keys that only some optimizers read, with the prefix of the types that read them."""


class OptimizerSpec(Section):
    """How the trained weights are updated."""

    type: Literal["adamw", "adamw_8bit", "sgd", "adafactor"] = "adamw"
    """`adamw` uses the fused implementation on a GPU; `adamw_8bit` needs bitsandbytes."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate of the schedule."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay, decoupled from the gradient (with `sgd` it is added to the gradient, as in
    torch). Biases and normalisation weights are not decayed."""

    betas: list[Probability] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """AdamW's decay rates of the running means of the gradient and its square."""

    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's term that avoids division by zero."""

    momentum: Probability = 0.0
    """Momentum of SGD."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lower learning rates for lower layers: the rate of each layer is this factor times the rate
    of the layer above it. The head and everything else after the last layer use `learning_rate`,
    the last layer `layer_decay` times that, and the embeddings the lowest rate. In an
    encoder-decoder, the layers of both stacks are counted from the top of their stack. Learning
    rates in `groups` for layers or modules are not decayed."""

    lora_plus_ratio: Annotated[float, Field(gt=0)] | None = None
    """LoRA+: the learning rate of `lora_B` divided by that of `lora_A`."""

    groups: GroupsSpec = Field(default_factory=GroupsSpec)
    """Different settings for some of the parameters."""

    def conflicts(self) -> Conflicts:
        """Yield keys that the chosen optimizer does not read, so that they would have no effect."""
        for key, type_ in READ_BY.items():
            unread = not self.type.startswith(type_)
            if unread and getattr(self, key) != type(self).model_fields[key].default:
                what = f"`{key}` is read by `type: {type_}`, and the type is `{self.type}`"
                yield key, what, f"leave it out, or set `type: {type_}`"


class SchedulerSpec(Section):
    """How the learning rate changes: a warm-up, then the named curve."""

    type: Literal["linear", "cosine", "constant"] = "linear"
    """`linear` and `cosine` end at zero."""

    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Number of steps of linear warm-up."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Warm-up as a share of all steps."""

    def conflicts(self) -> Conflicts:
        """Yield the two keys that give the length of the warm-up, if both are set."""
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            what = "`warmup_steps` and `warmup_ratio` exclude each other"
            yield "warmup_ratio", what, "keep one of the two"


class TrainSpec(Section):
    """The training loop."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the train rows. Default: 3, unless `max_steps` is set."""

    max_steps: Positive | None = None
    """Total number of steps, instead of `epochs`."""

    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Stop before this many hours have passed since the command started, with everything saved;
    continue with `--resume`. For machines that are available for a limited time."""

    micro_batch_size: Positive | Literal["auto"] = 8
    """Examples (packed rows, with `packing`) per forward pass, limited by memory. `auto` finds the
    largest size that fits before the first step; a step still sees `examples_per_step` examples."""

    gradient_accumulation_steps: Positive = 1
    """Micro-batches per step. A step sees micro_batch_size x gradient_accumulation_steps examples,
    however many processes share them."""

    examples_per_step: Positive | None = None
    """Examples per step, instead of `gradient_accumulation_steps`."""

    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    """How the trained weights are updated."""

    scheduler: SchedulerSpec = Field(default_factory=SchedulerSpec)
    """How the learning rate changes."""

    distill: DistillSpec | None = None
    """Learn from a teacher model, in addition to the labels."""

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the computation. fp16 uses loss scaling, and needs a GPU."""

    kernels: Literal["auto", "reference", "fused"] = "auto"
    """Which faster implementations of the same computation are used. `reference`: none, only the
    model's own code. `auto`: losses of tokens are computed in chunks; on a GPU, texts share rows
    and steps are recorded as CUDA graphs, if a test shows that an encoder's answers stay the same;
    in 16 bits, separate kernels compute the gated MLPs of a decoder and RMS norms; in long runs,
    layers are compiled, and attention over short rows has its own kernel. `fused`: all of these, in
    short runs too; it is an error if one cannot be used."""

    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients with a larger norm are clipped to this norm; `null` turns clipping off."""

    gradient_checkpointing: bool | Literal["auto", "offload"] = False
    """Recompute activations in the backward pass: less memory, about a third more time. `offload`
    also moves what is still kept on the GPU, the inputs of the layers, to the host's memory. `auto`
    finds before the first step how much of this a micro-batch of the longest rows needs to fit into
    the GPU's memory."""

    packing: bool = False
    """Put several short examples into one row of `max_length` tokens; attention does not cross from
    one example to another."""

    group_by_length: bool = False
    """Put examples of similar length into a batch, which saves padding."""

    workers: Annotated[int, Field(ge=0)] = 0
    """Number of processes that prepare batches; they do not change the order of the examples."""

    seed: Seed = 0
    """Seed of the initial weights, the order of the examples, and dropout."""

    log_every_steps: Positive = 10
    """Steps between two lines of the log."""

    trackers: list[Literal["tensorboard", "trackio"]] = Field(default_factory=list)
    """Other places to write the log to."""

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
        """Number of examples (or packed rows) in an optimizer step."""
        if self.examples_per_step is not None:
            return self.examples_per_step
        assert self.micro_batch_size != "auto", "`conflicts` asks for `examples_per_step`"
        return self.micro_batch_size * self.gradient_accumulation_steps
