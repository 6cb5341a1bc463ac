"""`adapter`: which parameters are trained."""

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

Rank = Annotated[int, Field(gt=0, le=65_536)]  # wider than any layer, so more would be no use
Alpha = Annotated[float, Field(gt=0, le=1e30)]  # the largest float32 is 3e38


AdapterType = Literal["lora", "dora", "loha", "lokr", "full", "none", "bitfit"]
PissaSteps = Annotated[str, Field(pattern=r"^pissa_niter_[1-9]\d?$")]
Init = Literal["default", "pissa", "olora", "eva", "loftq", "orthogonal"] | PissaSteps
LOW_RANK_TYPES: tuple[AdapterType, ...] = ("lora", "dora", "loha", "lokr")
LYCORIS_TYPES: tuple[AdapterType, ...] = ("loha", "lokr")
"""Types whose update is computed as a full weight; they support neither rsLoRA nor biases."""
ADAPTER_TITLES: dict[str, str] = {
    "lora": "LoRA adapter",
    "dora": "DoRA adapter",
    "loha": "LoHa adapter",
    "lokr": "LoKr adapter",
    "full": "Full fine-tuning",
    "none": "Newly trained head",
    "bitfit": "Fine-tuned biases",
}
"""What was trained, as reports name it."""


class AdapterSpec(Section):
    """Which parameters are trained. Keys of low-rank adapters are ignored by the other types."""

    type: AdapterType = "lora"
    """`lora`: low-rank adapters. `dora`: the same, plus a trained magnitude for the weights of each
    output; a step takes longer. `loha`: the entrywise product of two low-rank updates; `lokr`: the
    Kronecker product of two small matrices. Both give updates of a higher rank on linear layers and
    convolutions, are common for image models, and take longer per step. `full`: every weight.
    `none`: only the task's head. `bitfit`: only the biases. The last three are baselines for the
    others, trained by the same loop."""

    from_: Word | None = Field(default=None, alias="from")
    """A trained adapter to start from: a folder (relative to the recipe) or a Hub id. Training
    continues with its rank, alpha, targets, biases and head; the optimizer starts from scratch."""

    rank: Rank = 8
    """Rank of the update: the inner dimension of B A."""

    alpha: Alpha = 16.0
    """The update is scaled by alpha / rank."""

    dropout: Probability = 0.0
    """Dropout probability on the input of the low-rank path."""

    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA), so that adapters of a large rank still learn
    well."""

    init: Init = "default"
    """How the matrices of linear layers are initialised. `default`: A at random, B with zeros.
    `pissa`: from the largest singular values of the weight (`pissa_niter_4`: approximated in 4
    iterations, which is much faster). `olora`: from a part of its QR decomposition. `eva`: A from
    the principal directions of the layer's inputs on the train rows, and ranks are moved to the
    modules where they explain most. `loftq`: from the error that quantising the base makes.
    `orthogonal`: both at random, but so that B A is zero."""

    eva_rho: Annotated[float, Field(ge=1, le=1000)] = 2.0
    """With `init: eva`: the rank of a module grows to at most `eva_rho` times its original value; 1
    leaves equal ranks unchanged."""

    target_modules: Word | list[Word] | None = None
    """Which modules get an adapter: a list of name suffixes, a regular expression that matches the
    whole name, or `all-linear`. Default: `all-linear` for language models, the query and value
    layers of attention for encoders."""

    target_parameters: list[Word] = Field(default_factory=list)
    """Parameters that also get an adapter, by the ends of their names. Meant for the experts of a
    mixture-of-experts model, which are one tensor of three dimensions (`mlp.experts.gate_up_proj`);
    each expert gets its own update. Not with `dropout` or DoRA. With `target_modules: []`, nothing
    else is adapted."""

    exclude_modules: Word | list[Word] | None = None
    """Modules that get no adapter, written in the same way."""

    layers: LayerRange | list[LayerNumber] | None = None
    """Adapt only these layers: `0-11`, `3`, or a list of numbers."""

    freeze: Word | list[Word | LayerNumber] | None = None
    """With `full` and `bitfit`: what is not trained. `embeddings`, a range of layers (`0-5`), or a
    list of these, layer numbers and module names (`[embeddings, 0-5, pooler]`). Modules that the
    task adds are always trained. Layers with nothing trained in or below them run without dropout,
    and the input of the first trained layer is computed only once: see `data.cache_limit`."""

    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Different ranks for some modules: a mapping from name suffixes or regular expressions to
    ranks."""

    alpha_pattern: dict[str, Alpha] = Field(default_factory=dict)
    """Different alphas for some modules: a mapping from name suffixes or regular expressions to
    alphas."""

    bias: Literal["none", "lora_only", "all"] = "none"
    """Which biases are trained as well: none, those of the adapted modules, or all."""

    train_modules: list[Word] = Field(default_factory=list)
    """Modules that are trained in full and saved with the adapter, in addition to the task's new
    head."""

    train_tokens: list[Word | Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    """Tokens (or their ids) whose rows of the embedding are also trained, in addition to those of
    `model.add_tokens`. All other rows stay as they are."""

    ensure_weight_tying: bool = True
    """Whether modules of `train_modules` that share a weight, such as an embedding and the output
    layer, continue to share it. `false` trains a separate copy for each module that is named, and
    leaves the others as they are."""

    def conflicts(self) -> Conflicts:
        """Yield keys that do not fit the adapter's type, or that exclude each other."""
        if self.from_ is not None and self.type == "full":
            what = "`from` starts from an adapter, and `type: full` has none"
            yield "from", what, "name the model to start from as `model.name`"
        for key, off in (("use_rslora", False), ("bias", "none")):
            if self.type in LYCORIS_TYPES and getattr(self, key) != off:
                what = f"PEFT's format has no `{key}` for adapters of type `{self.type}`"
                yield key, what, "leave it out, or use `type: lora`"
        if self.target_parameters and self.type in ("dora", *LYCORIS_TYPES):
            what = f"`type: {self.type}` has no update of a parameter such as a tensor of experts"
            yield "target_parameters", what, "use `type: lora`, or leave `target_parameters` out"
        if self.train_tokens and self.type not in ("lora", "dora"):
            what = f"`type: {self.type}` does not train single rows of an embedding"
            if self.type == "full":
                what = "`type: full` trains every row of the embedding"
            yield "train_tokens", what, "leave `train_tokens` out, or use `type: lora`"
        if self.target_parameters and self.type == "lora" and self.dropout:
            what = "`dropout` acts on the input of a layer, and the update of a parameter has none"
            yield "dropout", what, "set `dropout` to 0, or leave `target_parameters` out"
        if self.target_parameters and self.init != "default":
            what = f"`init: {self.init}` cannot initialise the update of a parameter"
            yield "init", what, "leave out `init` or `target_parameters`"
        if self.eva_rho != type(self).model_fields["eva_rho"].default and self.init != "eva":
            what = f"`eva_rho` limits the ranks of `init: eva`, and the init is `{self.init}`"
            yield "eva_rho", what, "leave it out, or set `init: eva`"
        yield from self._freeze_conflicts()
        if self.init == "default":
            return
        if self.type != "lora":
            what = f"`init: {self.init}` initialises LoRA, and the type is `{self.type}`"
            yield "init", what, "leave `init` out, or set `type: lora`"
        if self.from_ is not None:
            what = f"`init: {self.init}` initialises a new adapter, and `from` is a trained one"
            yield "init", what, "leave one of the two out"
        if self.dropout and self.starts_at_weights:
            what = f"with `init: {self.init}`, `dropout` would drop a part of the base's weights"
            yield "init", what, "leave `dropout` out"

    def _freeze_conflicts(self) -> Conflicts:
        if self.freeze in (None, []):
            return
        if self.from_ is not None:
            what = "`from` trains what the adapter contains, and nothing else"
            yield "freeze", what, "leave one of the two out"
            return
        if self.type in ("full", "bitfit"):
            return
        if self.type == "none":
            what = "`type: none` trains only the task's head, so all else is already frozen"
            yield "freeze", what, "leave `freeze` out, or use `type: full`"
            return
        what = f"with `type: {self.type}` the whole base is already frozen"
        hint = "leave `freeze` out; `layers` selects the layers that get adapters: `layers: 6-11`"
        yield "freeze", what, hint

    @property
    def frozen_entries(self) -> list[str | int]:
        """The entries of `freeze`, as a list."""
        if self.freeze is None:
            return []
        return [self.freeze] if isinstance(self.freeze, str) else list(self.freeze)

    @property
    def starts_at_weights(self) -> bool:
        """Whether A and B start from a part of the weight, which is subtracted from the base."""
        return self.init.startswith("pissa") or self.init == "olora"

    @property
    def low_rank(self) -> bool:
        """Whether low-rank layers are attached."""
        return self.type in LOW_RANK_TYPES
