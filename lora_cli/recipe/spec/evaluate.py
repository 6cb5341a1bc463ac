"""`evaluate`: how the result is measured, and which is the best."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lora_cli.recipe.spec.section import Conflicts, Positive, Section, Seed, Word


class BestSpec(Section):
    """How the best adapter is chosen."""

    metric: Word = "loss"
    """A metric of the validation split, or `loss`; with `data.mix` also one of a set:
    `math/exact_match`."""

    mode: Literal["min", "max"] | None = None
    """Whether less or more is better. Default: as the metric is known to be."""


class EarlyStoppingSpec(Section):
    """Stop when validation has ceased to improve."""

    patience: Positive
    """Evaluations without improvement before stopping."""

    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest change that counts as an improvement."""


class GenerationSpec(Section):
    """How a model that writes texts does so when it is evaluated or asked."""

    max_new_tokens: Positive = 128
    """Longest answer in tokens, with the codes of language and task that it may begin with."""

    max_rows: Positive | None = None
    """Rows of a split (of each set, where `data.mix` has several) that are answered when the model
    is measured, spread evenly over it; the loss is of all rows. Default: all. Writing an answer
    takes as long as measuring the loss of many rows."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most likely token every time."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that make up this probability."""

    num_beams: Positive = 1
    """Answers that are followed at the same time, of which the likeliest is given (beam search).
    1 takes the most likely token every time."""

    length_penalty: float = 1.0
    """With several beams: the sum of an answer's log-probabilities is divided by its length to this
    power, so more than 1 favours long answers, and less than 1 short ones."""

    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    """So many tokens in a row are not written twice in an answer; 0 forbids nothing."""

    def conflicts(self) -> Conflicts:
        """Yield settings that exclude each other, or that change nothing."""
        if self.num_beams > 1 and self.temperature > 0:
            what = "beam search takes the likeliest answer, and `temperature` samples one"
            yield "num_beams", what, "leave one of them out"
        if self.num_beams == 1 and self.length_penalty != 1.0:
            what = "`length_penalty` compares the answers of several beams, and there is one"
            yield "length_penalty", what, "set `num_beams: 4`, or leave it out"


class DrawingSpec(Section):
    """How a model that draws pictures does so."""

    steps: Positive = 30
    """Steps from noise to a picture, with the base's own scheduler."""

    guidance_scale: Annotated[float, Field(ge=0)] = 7.5
    """How far a picture is moved away from what the model would draw for an empty text
    (classifier-free guidance); 1 or less moves nothing."""

    negative_prompt: Word | None = None
    """A text instead of the empty one: what is not to be drawn."""

    seed: Seed = 0
    """Decides the noise that every picture starts from, also that of pictures that are drawn at the
    same time: the same text, seed and settings give the same picture."""


class EvaluateSpec(Section):
    """When validation is measured, by what, and what follows from it."""

    every_steps: Positive | None = None
    """Steps between two evaluations. Default: once an epoch."""

    metrics: list[Word] | None = None
    """Metrics: accuracy, f1, precision, recall, matthews_correlation, pearson, spearman, mse,
    perplexity, exact_match, no_answer, bleu, chrf, rouge, wer, cer; or any other name or script
    that `evaluate` can load. What each of them measures is printed below the results: of which
    label or average f1 is, on which scale and of what words bleu is."""

    best: BestSpec | None = None
    """How the best adapter is chosen. Default: by the task's main metric."""

    early_stopping: EarlyStoppingSpec | None = None
    """Stop when validation has ceased to improve."""

    micro_batch_size: Positive | None = None
    """Examples of one forward pass. Default: twice `train.micro_batch_size`."""

    samples: Annotated[int, Field(ge=0)] = 5
    """Rows of validation of which the report shows what a model that writes says of them: before
    training, at each evaluation, and after it. 0 shows none."""

    baseline: bool = True
    """Measure validation and test before training too."""

    baselines: list[Literal["majority", "none", "base"]] = Field(default_factory=list)
    """What the adapter has to beat: `majority`, the commonest label of train (or the mean of its
    numbers); `none`, the head alone, trained by this recipe; `base`, the model before training."""

    generation: GenerationSpec = Field(default_factory=GenerationSpec)
    """How a model that writes texts writes its answers."""

    drawing: DrawingSpec = Field(default_factory=DrawingSpec)
    """How a model that draws pictures draws them."""
