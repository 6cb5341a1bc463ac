"""`adapter`: what is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lora_cli.recipe.spec.section import (
    Conflicts,
    LayerNumber,
    LayerRange,
    Probability,
    Section,
    Word,
)

Rank = Annotated[int, Field(gt=0, le=65_536)]  # no layer is so wide that more would add to it
Alpha = Annotated[float, Field(gt=0, le=1e30)]  # float32 ends at 3e38


AdapterType = Literal["lora", "dora", "loha", "lokr", "full", "none", "bitfit"]
PissaSteps = Annotated[str, Field(pattern=r"^pissa_niter_[1-9]\d?$")]
Init = Literal["default", "pissa", "olora", "eva", "loftq", "orthogonal"] | PissaSteps
LOW_RANK_TYPES: tuple[AdapterType, ...] = ("lora", "dora", "loha", "lokr")
WHOLE_TYPES: tuple[AdapterType, ...] = ("loha", "lokr")
"""Their update is computed as a whole weight; they have neither rsLoRA's scale nor biases."""
ADAPTER_TITLES: dict[str, str] = {
    "lora": "LoRA adapter",
    "dora": "DoRA adapter",
    "loha": "LoHa adapter",
    "lokr": "LoKr adapter",
    "full": "Full fine-tuning",
    "none": "Newly trained head",
    "bitfit": "Fine-tuned biases",
}
"""What was trained, in the words of reports."""


class AdapterSpec(Section):
    """What is trained. Keys of low-rank adapters are ignored by the other types."""

    type: AdapterType = "lora"
    """`lora`: low-rank adapters. `dora`: the same, and a trained length for the weights of each
    output; a step takes longer. `loha`: the entrywise product of two low-rank updates; `lokr`: the
    Kronecker product of two small matrices: updates of a higher rank on linear layers and
    convolutions, known from picture models; a step takes longer. `full`: every weight. `none`: the
    task's head alone. `bitfit`: the biases. The last three are the baselines of the others, in the
    same loop."""

    from_: Word | None = Field(default=None, alias="from")
    """A trained adapter to start from: a folder (relative to the recipe), or a Hub id. Its rank,
    alpha, targets, biases and head are trained further; the optimizer starts from scratch."""

    rank: Rank = 8
    """Rank of the update: the inner dimension of B A."""

    alpha: Alpha = 16.0
    """The update is scaled by alpha / rank."""

    dropout: Probability = 0.0
    """Dropout on the input of the low-rank path."""

    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA), so that large ranks keep learning."""

    init: Init = "default"
    """How the matrices of linear layers start. `default`: A at random, B at zero. `pissa`: at the
    largest singular values of the weight (`pissa_niter_4`: found approximately, in 4 iterations,
    which is much faster). `olora`: at a part of its QR decomposition. `eva`: A at the main
    directions of the layer's inputs on the train rows, and ranks are moved to where they explain
    most. `loftq`: at what quantising the base has taken from the weight. `orthogonal`: both at
    random, so that B A is zero."""

    eva_rho: Annotated[float, Field(ge=1, le=1000)] = 2.0
    """With `init: eva`: a module's rank grows at most to `eva_rho` times what it was; 1 leaves
    equal ranks as they are."""

    target_modules: Word | list[Word] | None = None
    """Which modules get an adapter: a list of name suffixes, a regular expression that matches
    whole names, or `all-linear`. Default: `all-linear` for language models, the attention's query
    and value for encoders."""

    target_parameters: list[Word] = Field(default_factory=list)
    """Parameters that get an adapter besides, by the ends of their names: the experts of a mixture,
    which are one tensor of three dimensions (`mlp.experts.gate_up_proj`), each expert with an
    update of its own. Not with `dropout` or DoRA. `target_modules: []` adapts nothing else."""

    exclude_modules: Word | list[Word] | None = None
    """Modules that get none, written in the same way."""

    layers: LayerRange | list[LayerNumber] | None = None
    """Only these layers: `0-11`, `3`, or a list of numbers."""

    freeze: Word | list[Word | LayerNumber] | None = None
    """With `full` and `bitfit`: what stays as it is. `embeddings`, a range of layers (`0-5`), or a
    list of these, of layers' numbers and of names of modules (`[embeddings, 0-5, pooler]`). What
    the task adds is always trained. If nothing below a layer is trained, it runs without dropout,
    and what enters the first trained layer is computed once: see `data.cache_limit`."""

    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Other ranks for some modules: name suffix or regular expression, and rank."""

    alpha_pattern: dict[str, Alpha] = Field(default_factory=dict)
    """Other alphas for some modules: name suffix or regular expression, and alpha."""

    bias: Literal["none", "lora_only", "all"] = "none"
    """Which biases are trained besides: none, those of adapted modules, or all."""

    train_modules: list[Word] = Field(default_factory=list)
    """Modules trained in full and saved with the adapter, besides the task's new head."""

    train_tokens: list[Word | Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    """Tokens (or their ids) of which the rows of the embedding are trained too, besides those of
    `model.add_tokens`. All other rows stay as they are."""

    ensure_weight_tying: bool = True
    """Modules of `train_modules` that share a weight, as an embedding and the output layer do, stay
    one. `false` trains a copy of each that is named, and leaves the others as they are."""

    def conflicts(self) -> Conflicts:
        """Yield a start from an adapter for what has none, and an `init` that cannot be."""
        if self.from_ is not None and self.type == "full":
            what = "`from` starts from an adapter, and `type: full` has none"
            yield "from", what, "name the model to start from as `model.name`"
        for key, off in (("use_rslora", False), ("bias", "none")):
            if self.type in WHOLE_TYPES and getattr(self, key) != off:
                what = f"PEFT's format has no `{key}` for adapters of type `{self.type}`"
                yield key, what, "leave it out, or use `type: lora`"
        if self.target_parameters and self.type in ("dora", *WHOLE_TYPES):
            what = f"`type: {self.type}` has no update of a parameter such as a tensor of experts"
            yield "target_parameters", what, "use `type: lora`, or leave `target_parameters` out"
        if self.train_tokens and self.type not in ("lora", "dora"):
            what = f"`type: {self.type}` does not train single rows of an embedding"
            if self.type == "full":
                what = "`type: full` trains every row of the embedding"
            yield "train_tokens", what, "leave `train_tokens` out, or use `type: lora`"
        if self.target_parameters and self.type == "lora" and self.dropout:
            what = "`dropout` has no place in the update of a parameter, which never sees an input"
            yield "dropout", what, "set `dropout` to 0, or leave `target_parameters` out"
        if self.target_parameters and self.init != "default":
            what = f"`init: {self.init}` has no way to start the update of a parameter"
            yield "init", what, "leave `init` out, or `target_parameters`"
        if self.eva_rho != type(self).model_fields["eva_rho"].default and self.init != "eva":
            what = f"`eva_rho` moves the ranks of `init: eva`, and the init is `{self.init}`"
            yield "eva_rho", what, "leave it out, or set `init: eva`"
        yield from self._freeze_conflicts()
        if self.init == "default":
            return
        if self.type != "lora":
            what = f"`init: {self.init}` is a start of LoRA, and the type is `{self.type}`"
            yield "init", what, "leave `init` out, or set `type: lora`"
        if self.from_ is not None:
            what = f"`init: {self.init}` starts anew, and `from` starts from a trained adapter"
            yield "init", what, "leave one of the two out"
        if self.dropout and self.starts_at_weights:
            what = f"with `init: {self.init}`, `dropout` would drop parts of the base's own weights"
            yield "init", what, "leave `dropout` out"

    def _freeze_conflicts(self) -> Conflicts:
        if self.freeze in (None, []):
            return
        if self.from_ is not None:
            what = "`from` trains what the adapter holds, and nothing else"
            yield "freeze", what, "leave one of the two out"
            return
        if self.type in ("full", "bitfit"):
            return
        if self.type == "none":
            what = "`type: none` trains the task's head alone, so all else is frozen already"
            yield "freeze", what, "leave `freeze` out, or use `type: full`"
            return
        what = f"with `type: {self.type}` the whole base is frozen already"
        hint = "leave `freeze` out; `layers` says which layers get adapters: `layers: 6-11`"
        yield "freeze", what, hint

    @property
    def frozen_entries(self) -> list[str | int]:
        """The entries of `freeze`."""
        if self.freeze is None:
            return []
        return [self.freeze] if isinstance(self.freeze, str) else list(self.freeze)

    @property
    def starts_at_weights(self) -> bool:
        """Whether A and B start at a part of the weight, which is taken out of the base."""
        return self.init.startswith("pissa") or self.init == "olora"

    @property
    def low_rank(self) -> bool:
        """Whether low-rank layers are attached."""
        return self.type in LOW_RANK_TYPES
