"""`evaluate`: how the result is measured, and how the best adapter is chosen."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lora_cli.recipe.spec.section import Conflicts, Positive, Section, Seed, Word


class BestSpec(Section):
    """How the best adapter is chosen."""

    metric: Word = "loss"
    """A metric of the validation split, or `loss`; with `data.mix` also a metric of one set, such
    as `math/exact_match`."""

    mode: Literal["min", "max"] | None = None
    """Whether a smaller or a larger value is better. Default: what is usual for the metric."""


class EarlyStoppingSpec(Section):
    """Stop when validation no longer improves."""

    patience: Positive
    """Number of evaluations without improvement after which training stops."""

    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest change of the metric that counts as an improvement."""


class GenerationSpec(Section):
    """How a model that generates texts does so in evaluation and prediction."""

    max_new_tokens: Positive = 128
    """Maximum length of an answer in tokens, including the codes of language and task that it may
    begin with."""

    max_rows: Positive | None = None
    """Rows of a split (of each set, with `data.mix`) for which evaluation generates answers, spread
    evenly over the split; the loss is computed on all rows. Default: all. Generating one answer
    takes as long as computing the loss of many rows."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Temperature of sampling. 0 always takes the most likely token."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample only from the most likely tokens whose probabilities add up to this value."""

    num_beams: Positive = 1
    """Number of beams in beam search: candidates that are extended in parallel, of which the most
    likely is returned. 1 is no beam search."""

    length_penalty: float = 1.0
    """With several beams: the sum of a candidate's log-probabilities is divided by its length to
    this power, so values above 1 favour long answers, and values below 1 short ones."""

    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    """Sequences of this many tokens are not repeated within an answer; 0 allows every
    repetition."""

    def conflicts(self) -> Conflicts:
        """Yield keys that exclude each other, or that have no effect."""
        if self.num_beams > 1 and self.temperature > 0:
            what = "beam search takes the likeliest answer, and `temperature` samples one"
            yield "num_beams", what, "leave one of them out"
        if self.num_beams == 1 and self.length_penalty != 1.0:
            what = "`length_penalty` compares the answers of several beams, and there is one"
            yield "length_penalty", what, "set `num_beams: 4`, or leave it out"


class DrawingSpec(Section):
    """How a model that generates images does so."""

    steps: Positive = 30
    """Denoising steps from noise to an image, with the base's own scheduler."""

    guidance_scale: Annotated[float, Field(ge=0)] = 7.5
    """How strongly an image is moved away from what the model would generate for an empty text
    (classifier-free guidance); 1 or less turns guidance off."""

    negative_prompt: Word | None = None
    """A text to use instead of the empty one: what the image should not show."""

    seed: Seed = 0
    """Seed of the noise that every image starts from, including images that are generated in one
    batch: the same text, seed and settings give the same image."""


class EvaluateSpec(Section):
    """When validation is measured, with which metrics, and what follows from it."""

    every_steps: Positive | None = None
    """Steps between two evaluations. Default: one evaluation per epoch."""

    metrics: list[Word] | None = None
    """Metrics: accuracy, f1, precision, recall, matthews_correlation, pearson, spearman, mse,
    perplexity, exact_match, no_answer, bleu, chrf, rouge, wer, cer; or any other name or script
    that `evaluate` can load. The definition of each metric is printed below the results, for
    example which label or average f1 refers to, and the scale and the tokenization of bleu."""

    best: BestSpec | None = None
    """How the best adapter is chosen. Default: by the task's main metric."""

    early_stopping: EarlyStoppingSpec | None = None
    """Stop when validation no longer improves."""

    micro_batch_size: Positive | None = None
    """Examples per forward pass. Default: twice `train.micro_batch_size`."""

    samples: Annotated[int, Field(ge=0)] = 5
    """Number of validation rows for which the report shows the generated answers: before training,
    at each evaluation, and after training. 0 shows none."""

    baseline: bool = True
    """Also measure validation and test before training."""

    baselines: list[Literal["majority", "none", "base"]] = Field(default_factory=list)
    """Baselines that the adapter has to beat: `majority`, the most common label of train (or the
    mean of its numbers); `none`, the head alone, trained with this recipe; `base`, the model before
    training."""

    generation: GenerationSpec = Field(default_factory=GenerationSpec)
    """How a model that generates texts writes its answers."""

    drawing: DrawingSpec = Field(default_factory=DrawingSpec)
    """How a model that generates images draws them."""
