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
    """Images of the class that a subject belongs to, so that the model does not forget the class.

    Each image of the subject is trained together with one of the class (DreamBooth, Ruiz et al.
    2022, https://arxiv.org/abs/2208.12242).
    """

    path: Word
    """Folder of these images. If it contains fewer than `count`, the base generates the others
    before training and saves them there."""

    caption: Word
    """Caption of all these images, such as `a photo of a dog`."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of these images' term of the loss; the term of the subject has the weight 1."""

    count: Annotated[int, Field(ge=0)] = 100
    """How many images there should be; 0 uses those that exist."""


class FlowSpec(Section):
    """How a model is trained by flow matching (Stable Diffusion 3, Flux).

    The keys are those of diffusers' training scripts (`--weighting_scheme`, `--logit_mean`, …).
    """

    timesteps: Literal["logit_normal", "uniform", "mode"] = "logit_normal"
    """How the timesteps, which set the amount of noise, are drawn. `logit_normal`: with normally
    distributed logits, so those in the middle are most frequent. `uniform`: all are equally
    frequent. `mode`: from the density with a mode by Esser et al. 2024
    (https://arxiv.org/abs/2403.03206, section 3.1)."""

    mean: float = LOGIT_MEAN
    """Mean of the logits for `logit_normal`, with the sign that diffusers uses: above 0 means less
    noise, below 0 more."""

    std: Annotated[float, Field(gt=0)] = LOGIT_STD
    """Standard deviation of the logits for `logit_normal`."""

    mode_scale: Annotated[float, Field(ge=-1, le=1.75)] = MODE_SCALE
    """For `mode`: above 0, timesteps in the middle are more frequent; below 0, those at both
    ends."""

    weighting: Literal["none", "sigma_sqrt", "sigma_squared", "cosmap"] = "none"
    """Weight of an image's error, depending on the share s of noise in it: 1 (`none`); 1 / s²
    (`sigma_sqrt`, as diffusers calls it); s² (`sigma_squared`: the error of the image instead of
    the flow, as with diffusers' `--precondition_outputs`); or 2 / (π (1 - 2 s + 2 s²))
    (`cosmap`)."""

    guidance: Annotated[float, Field(ge=0)] = GUIDANCE
    """The guidance scale that FLUX.1-dev gets as an input in training; 1 is common too. Other
    models do not have this input."""

    def conflicts(self) -> Conflicts:
        """Yield keys that have no effect."""
        needs = {"mean": "logit_normal", "std": "logit_normal", "mode_scale": "mode"}
        usual = {"mean": LOGIT_MEAN, "std": LOGIT_STD, "mode_scale": MODE_SCALE}
        for key, kind in needs.items():
            if getattr(self, key) != usual[key] and self.timesteps != kind:
                what = f"`{key}` has no meaning without `timesteps: {kind}`"
                yield key, what, "leave it out"


class TextToImageSpec(TaskSection):
    """Generate an image from a text, with a diffusion model."""

    pipeline_tag = "text-to-image"
    suitable_models = (
        "use a folder, or a model on the Hub, that diffusers loads as a pipeline of Stable "
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
    generates_images = True
    frozen_hint = (
        "remove it; `task.train_text_encoder: true` lets text encoders be adapted too, but not T5"
    )

    type: Literal["text_to_image"]
    """The type of task."""

    image_column: Word = "image"
    """Column of the image: a path relative to the file that contains it (csv, JSON), or the encoded
    image itself (parquet, the Hub). In a folder of images (`data.path`), each file is a row."""

    caption_column: Word = USUAL_COLUMN
    """Column of the caption, which says what the image shows. In a folder of images, it is read
    from the text file next to each image: `a/1.txt` for `a/1.png`."""

    caption: Word | None = None
    """One caption for all images, instead of `caption_column`: `a photo of sks dog` for a few
    images of one subject, where `sks` is a rare word that will stand for it."""

    resolution: Positive = 512
    """Length of the shorter side to which images are resized, in pixels; the longer side is cropped
    to the same length. With `aspect_ratios`, the side of a square with the same area."""

    aspect_ratios: bool = False
    """Keep the aspect ratio of each image as closely as sides in multiples of 64 pixels allow,
    instead of cropping it to a square. (If `resolution` is less than 256, multiples of what the
    model divides images by.) A batch contains images of one size, as long as there are enough of
    them."""

    max_aspect_ratio: Annotated[float, Field(ge=1)] = USUAL_RATIO
    """With `aspect_ratios`: the largest ratio of the longer side to the shorter one. Longer images
    are cropped."""

    crop: Literal["center", "random"] = "center"
    """Which part of an image is kept when it is cropped in training; evaluation uses the centre.
    With `random`, the latents are computed again in every step."""

    flip: bool = False
    """Mirror half of the images in training, left to right. Not for letters, nor for captions that
    say `left` and `right`. The latents are then computed again in every step."""

    upscale: bool = False
    """Accept images that are smaller than `resolution`: they are enlarged, which blurs them. By
    default, they are errors."""

    caption_dropout: Dropout = 0.0
    """Share of the captions that are replaced by an empty one in training. The model needs the
    empty caption for classifier-free guidance."""

    shuffle_tags: bool = False
    """Captions are tags separated by commas, which are shuffled in every step of training. The
    output of the text encoder is then computed again in every step."""

    keep_tags: Annotated[int, Field(ge=0)] = USUAL_TAGS
    """With `shuffle_tags`: how many tags at the beginning keep their place, such as a word that
    stands for the subject."""

    latents: Literal["sample", "mean"] = "sample"
    """Which latents of the autoencoder's distribution are trained: a new sample in every step, as
    in diffusers' own training scripts, or the mean."""

    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Weight each timestep by its signal-to-noise ratio, clipped at this value; 5 is common
    (Min-SNR, Hang et al. 2023, https://arxiv.org/abs/2303.09556). Default: all timesteps have the
    same weight."""

    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Amount of noise to add that is the same at all positions of a channel, so that the model
    learns to generate very dark and very bright images; 0.05 to 0.1 is common."""

    flow: FlowSpec | None = None
    """How timesteps are drawn and weighted for a model that is trained by flow matching, such as
    Stable Diffusion 3 or Flux. Default: logit-normal timesteps with equal weights."""

    validation_draws: Positive = 4
    """How many times each image of validation and test is measured, each time with its own noise
    and timestep, spread evenly. Noise and timesteps are the same in every evaluation."""

    train_text_encoder: bool = False
    """Adapt the text encoders too, except T5."""

    without_t5: bool = False
    """Leave out T5, the largest text encoder of Stable Diffusion 3, to save memory: its output is
    replaced by zeros, in training and in prediction. The same happens if the base comes without
    T5."""

    prior: PriorSpec | None = None
    """Images of the class that the subject belongs to, as a second term of the loss
    (DreamBooth)."""

    validation_prompts: Words | None = None
    """Prompts for which images are generated before training, at every evaluation, and with the
    best adapter, always from the same noise; the report shows them side by side."""

    def conflicts(self) -> Conflicts:
        """Yield keys that exclude each other, or that have no effect."""
        if self.image_column == self.caption_column:
            what = f"`{self.image_column}` is both the image and its caption"
            yield "caption_column", what, "name the column of the captions"
        if self.caption is not None and self.caption_column != USUAL_COLUMN:
            what = "`caption` is the caption of all images, so `caption_column` is not read"
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
        """The column of the image, as no trained image may be in validation or test."""
        return {"task.image_column": self.image_column}

    @property
    def media_columns(self) -> dict[str, MediaKind]:
        """The column of the image."""
        return {self.image_column: "image"}

    @property
    def transcript_column(self) -> str | None:
        """The column that is read from text files next to images."""
        return None if self.caption is not None else self.caption_column

    @property
    def local_folders(self) -> list[str]:
        """The folder of the images of the class."""
        return [] if self.prior is None else ["prior.path"]

    @property
    def sample_prompts(self) -> list[str]:
        """The prompts for which images are generated during training."""
        return self.validation_prompts or []

    def own_code(self, base: str, options: str, parts: tuple[str, ...], drawing: Any) -> str:
        """Return how to generate an image with diffusers, and with PEFT if there are adapters."""
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
