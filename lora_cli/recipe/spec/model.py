"""`model`: the pretrained base."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lora_cli.recipe.spec.section import Section, Word


class ModelSpec(Section):
    """The pretrained base model."""

    name: Word
    """A Hub id, a local folder (relative to the recipe), or `package:NAME/FOLDER`, a folder inside
    an installed Python package."""

    revision: Word = "main"
    """Branch, tag or commit of the model on the Hub."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Storage of the frozen base's weights. Default: that of `train.precision`; `float32` with
    `adapter.type: full`. It is `float32`, or that of the precision. Trained weights are float32
    always."""

    quantization: Literal["nf4", "int8", "fp8"] | None = None
    """Keep the weights of the frozen linear layers in 4 bits (`nf4`, as QLoRA does) or in 8 bits.
    They are quantised while they are read, and turned back into numbers of `dtype` for each
    product, except `fp8` on GPUs that multiply in it (Ada, Hopper and later): there the inputs and
    gradients of these layers are rounded to 8 bits too, which is faster, and less exact.
    Embeddings, the output layer and what is trained in full keep their numbers."""

    add_tokens: list[Word] = Field(default_factory=list)
    """New tokens: the tokenizer gets them, and the embedding a row for each, at first the mean of
    the others. An adapter trains these rows and no others of the embedding, and of the output layer
    where that has rows of its own; the tokenizer is saved beside it, and by `lora merge`."""

    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Implementation of the attention. Default: the one transformers chooses."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model, or with a metric of the Hub. Leave it off unless
    you have read that code."""

    allow_other_base: bool = False
    """Use an adapter, or go on with a run, on a base whose weights are not those that it was
    trained on. A warning says so, and it is written down."""
