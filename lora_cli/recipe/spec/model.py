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
    """Data type in which the base's frozen weights are stored: `float32`, or that of
    `train.precision`. Default: that of `train.precision`; with `adapter.type: full`, `float32`.
    Trained weights are always float32."""

    quantization: Literal["nf4", "int8", "fp8"] | None = None
    """Keep the weights of the frozen linear layers in 4 bits (`nf4`, as in QLoRA) or in 8 bits
    (`int8`, `fp8`). They are quantised while the model is loaded, and converted back to `dtype` for
    each product. On GPUs that can multiply in `fp8` (Ada, Hopper and later), the inputs and
    gradients of these layers are rounded to 8 bits too, which is faster but less exact. Embeddings,
    the output layer and modules that are trained in full are not quantised."""

    add_tokens: list[Word] = Field(default_factory=list)
    """New tokens to add to the tokenizer. Each gets a row of the embedding, which starts as the
    mean of the others. An adapter trains these rows and no other rows of the embedding, and the
    same rows of the output layer if that has its own. The tokenizer is saved with the adapter, and
    by `lora merge`."""

    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Implementation of attention. Default: the one that transformers chooses."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model, or with a metric on the Hub. Leave it off unless
    you have read that code."""

    allow_other_base: bool = False
    """Use an adapter, or continue a run, on a base whose weights differ from those that it was
    trained on. A warning says so, and the report records it."""
