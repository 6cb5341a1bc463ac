"""`task` for `type: text_to_image`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from lora_cli.recipe.spec.section import Conflicts, Positive, Section, Word, Words
from lora_cli.recipe.spec.task_section import MediaKind, TaskSection, UsualTraining

Dropout = Annotated[float, Field(ge=0, lt=1)]
USUAL_COLUMN, USUAL_TAGS, USUAL_RATIO = "text", 1, 2.0
LOGIT_MEAN, LOGIT_STD, MODE_SCALE = 0.0, 1.0, 1.29  # the defaults of diffusers' scripts
GUIDANCE = 3.5  # likewise, of the one for Flux


class PriorSpec(Section):
    """Pictures of the class that a subject belongs to, so that the model does not forget it.

    Each picture of the subject is trained together with one of the class (DreamBooth, Ruiz et al.
    2022, https://arxiv.org/abs/2208.12242).
    """

    path: Word
    """Folder of the pictures. Where it holds fewer than `count`, the base draws the others before
    training, and keeps them there."""

    caption: Word
    """What all of them show: `a photo of a dog`."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Of their term of the loss; the subject's has the weight 1."""

    count: Annotated[int, Field(ge=0)] = 100
    """How many pictures there should be; 0 takes those that there are."""


class FlowSpec(Section):
    """How a model that learns by flow matching (Stable Diffusion 3, Flux) is trained.

    The keys are those of diffusers' training scripts (`--weighting_scheme`, `--logit_mean`, …).
    """

    timesteps: Literal["logit_normal", "uniform", "mode"] = "logit_normal"
    """How often each step of noise is trained: most often those in the middle, whose logits are
    normally distributed; all as often; or by the density with a `mode` of Esser et al. 2024
    (https://arxiv.org/abs/2403.03206, section 3.1)."""

    mean: float = LOGIT_MEAN
    """Mean of the logits of `logit_normal`, as diffusers counts: above 0 less noise, below 0
    more."""

    std: Annotated[float, Field(gt=0)] = LOGIT_STD
    """Standard deviation of the logits of `logit_normal`."""

    mode_scale: Annotated[float, Field(ge=-1, le=1.75)] = MODE_SCALE
    """Of `mode`: above 0 more steps in the middle, below 0 more at both ends."""

    weighting: Literal["none", "sigma_sqrt", "sigma_squared", "cosmap"] = "none"
    """Weight of each picture's error by the share s of noise in it: 1; 1 / s² (`sigma_sqrt`, as
    diffusers calls it); s² (`sigma_squared`, the error of the picture instead of the flow, as with
    diffusers' `--precondition_outputs`); or 2 / (π (1 - 2 s + 2 s²)) (`cosmap`)."""

    guidance: Annotated[float, Field(ge=0)] = GUIDANCE
    """What FLUX.1-dev is told in training of how far away from an empty text it is to draw; 1 is
    usual too. Other models are not told it."""

    def conflicts(self) -> Conflicts:
        """Yield keys that change nothing."""
        needs = {"mean": "logit_normal", "std": "logit_normal", "mode_scale": "mode"}
        usual = {"mean": LOGIT_MEAN, "std": LOGIT_STD, "mode_scale": MODE_SCALE}
        for key, kind in needs.items():
            if getattr(self, key) != usual[key] and self.timesteps != kind:
                what = f"`{key}` has no meaning without `timesteps: {kind}`"
                yield key, what, "leave it out"


class TextToImageSpec(TaskSection):
    """Draw what a text says, with a diffusion model."""

    pipeline_tag = "text-to-image"
    suitable_models = (
        "take a folder, or a model of the Hub, that diffusers reads as a pipeline of Stable "
        "Diffusion 1.5 or 2, of Stable Diffusion XL, of Stable Diffusion 3, or of Flux"
    )
    default_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj",
    )  # fmt: skip
    usual_training = UsualTraining(
        epochs=((50, 100), (500, 20), (5_000, 5), (math.inf, 1)),
        learning_rate=1e-4,
        all_linear=False,
        targets_note="on the queries, keys, values and outputs of attention",
        step=4,
    )
    example_input = "a red bicycle"
    length_keys = ()
    draws = True
    frozen_hint = (
        "remove it; `task.train_text_encoder: true` lets text encoders be adapted too, but not T5"
    )

    type: Literal["text_to_image"]
    """Which task."""

    image_column: Word = "image"
    """Column of the picture: a path relative to the file that names it (csv, JSON), or the encoded
    picture itself (parquet, the Hub). In a folder of pictures (`data.path`) each file is a row."""

    caption_column: Word = USUAL_COLUMN
    """Column of what the picture shows. In a folder of pictures it is the content of the text file
    next to each: `a/1.txt` for `a/1.png`."""

    caption: Word | None = None
    """One caption for all pictures, instead of `caption_column`: `a photo of sks dog` for a few
    pictures of one subject, where `sks` is a rare word that is to mean it."""

    resolution: Positive = 512
    """The shorter side of the pictures as the model sees them, in pixels; the longer one is cut.
    With `aspect_ratios`, the side of a square of the same area."""

    aspect_ratios: bool = False
    """Keep the shape of each picture as nearly as sizes in steps of 64 pixels allow (or of what
    the model divides pictures by, where `resolution` is less than 256), instead of a square. A
    batch holds pictures of one size, as far as there are enough of them."""

    max_aspect_ratio: Annotated[float, Field(ge=1)] = USUAL_RATIO
    """With `aspect_ratios`: how many times longer than the other a side can be; what is left of
    longer pictures is cut."""

    crop: Literal["center", "random"] = "center"
    """Which part of a picture is left where it is cut in training; evaluation takes the middle.
    `random` computes the latents anew in every step."""

    flip: bool = False
    """Mirror half of the pictures in training, left to right. Not for letters, nor where captions
    say `left` and `right`. The latents are then computed anew in every step."""

    upscale: bool = False
    """Accept pictures that are smaller than they are seen: they are enlarged, which blurs them. By
    default they are errors."""

    caption_dropout: Dropout = 0.0
    """Share of the captions that are replaced by an empty one in training, which
    classifier-free guidance subtracts when it draws."""

    shuffle_tags: bool = False
    """Captions are tags between commas, which stand in another order in every step of training.
    What the text encoder makes of them is then computed in every step."""

    keep_tags: Annotated[int, Field(ge=0)] = USUAL_TAGS
    """With `shuffle_tags`: so many tags at the beginning stay where they are, such as a word that
    is to mean the subject."""

    latents: Literal["sample", "mean"] = "sample"
    """What the autoencoder gives of a picture: a new sample of its distribution in every step, as
    in diffusers' own training scripts, or the mean."""

    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Weight each step of noise by its ratio of signal to noise, cut off at this value; 5 is usual
    (Min-SNR, Hang et al. 2023, https://arxiv.org/abs/2303.09556). Default: all weigh the same."""

    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Add so much noise that is the same in all places of a channel, so that the model learns to
    draw very dark and very bright pictures; 0.05 to 0.1 is usual."""

    flow: FlowSpec | None = None
    """How steps of noise are drawn and weighted by a model that learns by flow matching, such as
    Stable Diffusion 3 or Flux. Default: logit-normal steps, of which all weigh the same."""

    validation_draws: Positive = 4
    """How many times each picture of validation and test is measured, each with noise of its own
    and a step of noise of its own, spread evenly; they are the same in every evaluation."""

    train_text_encoder: bool = False
    """Adapt the text encoders too; never T5."""

    without_t5: bool = False
    """Leave out T5, the largest text encoder of Stable Diffusion 3, to save memory: zeros stand in
    its place, in training and in drawing. So it is where the base has none."""

    prior: PriorSpec | None = None
    """Pictures of the class that the subject belongs to, as a second term of the loss."""

    validation_prompts: Words | None = None
    """Texts that are drawn before training, at every evaluation, and with the best adapter, each
    with the same noise every time; the report shows them side by side."""

    def conflicts(self) -> Conflicts:
        """Yield keys that exclude each other, or that change nothing."""
        if self.image_column == self.caption_column:
            what = f"`{self.image_column}` is both the picture and its caption"
            yield "caption_column", what, "name the column of the captions"
        if self.caption is not None and self.caption_column != USUAL_COLUMN:
            what = "`caption` is the caption of all pictures, so `caption_column` is not read"
            yield "caption", what, "leave one of the two out"
        if self.keep_tags != USUAL_TAGS and not self.shuffle_tags:
            yield "keep_tags", "`keep_tags` has no meaning without `shuffle_tags`", "leave it out"
        if self.max_aspect_ratio != USUAL_RATIO and not self.aspect_ratios:
            what = "`max_aspect_ratio` has no meaning without `aspect_ratios`"
            yield "max_aspect_ratio", what, "add `aspect_ratios: true`, or leave it out"
        if self.shuffle_tags and self.caption is not None and "," not in self.caption:
            what = "`shuffle_tags` needs tags between commas, and `caption` has none"
            yield "shuffle_tags", what, "leave it out"

    @property
    def input_columns_by_key(self) -> dict[str, str]:
        """The column of the picture: one that was trained must not be measured."""
        return {"task.image_column": self.image_column}

    @property
    def media_columns(self) -> dict[str, MediaKind]:
        """The column of the picture."""
        return {self.image_column: "image"}

    @property
    def transcript_column(self) -> str | None:
        """The column that text files next to pictures fill."""
        return None if self.caption is not None else self.caption_column

    @property
    def local_folders(self) -> list[str]:
        """The folder of the pictures of the class."""
        return [] if self.prior is None else ["prior.path"]

    @property
    def sample_prompts(self) -> list[str]:
        """What is drawn while training."""
        return self.validation_prompts or []

    def own_code(self, base: str, options: str, parts: tuple[str, ...], drawing: Any) -> str:
        """Return how a text is drawn with diffusers, and with PEFT where there are adapters."""
        lines = ["import torch", "from diffusers import DiffusionPipeline"]
        lines += ["from peft import PeftModel"] if parts else []
        options += ", text_encoder_3=None, tokenizer_3=None" if self.without_t5 else ""
        lines += ["", f"pipe = DiffusionPipeline.from_pretrained({base}{options})"]
        for part in parts:  # this folder, or the same of the Hub
            lines.append(f'pipe.{part} = PeftModel.from_pretrained(pipe.{part}, "{part}").eval()')
        how = [f"num_inference_steps={drawing.steps}", f"guidance_scale={drawing.guidance_scale}"]
        if drawing.negative_prompt is not None:
            how.append(f"negative_prompt={drawing.negative_prompt!r}")
        side = self.resolution
        prompt = (self.validation_prompts or [self.caption or self.example_input])[0]
        lines += [
            "picture = pipe(",
            f"    {prompt!r}, height={side}, width={side},",
            f"    {', '.join(how)},",
            f"    generator=torch.Generator().manual_seed({drawing.seed}),",
            ").images[0]",
            'picture.save("drawn.png")',
        ]
        return "\n".join(lines)
