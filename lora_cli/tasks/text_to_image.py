"""Generates images from texts, with the diffusion and flow-matching models of diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.data.load_rows import Rows
from lora_cli.data.pictures import require_pillow
from lora_cli.models.base_model import mixed_precision
from lora_cli.models.bundle import Bundle
from lora_cli.models.diffusion_base import DiffusionBase, processor_hash, quiet_diffusers
from lora_cli.models.diffusion_family import VAE, Conditions
from lora_cli.recipe import Recipe
from lora_cli.recipe.spec import FlowSpec
from lora_cli.tasks.diffusion.caption_proposals import propose_captions
from lora_cli.tasks.diffusion.captioned_pictures import (
    LATENTS,
    POOLED,
    PRIOR,
    TEXTS,
    CaptionedPictures,
)
from lora_cli.tasks.diffusion.check_settings import (
    check_keys,
    check_longest_side,
    check_resolution,
)
from lora_cli.tasks.diffusion.diffusion_noise import DiffusionNoise, mean_squared_errors
from lora_cli.tasks.diffusion.drawing import ImageGenerator, picture_name
from lora_cli.tasks.diffusion.flow_noise import FlowNoise
from lora_cli.tasks.examples import MAIN, Batch, Prediction

PROBE_SIDE = 8  # the side of the latents of a probe, which is small enough for every model


@dataclass
class _Denoised:
    """The model's predictions for the images of one size in a batch.

    Args:
        rows: The positions of their examples in the batch (b,).
        predicted: The predictions (b * n, C, H, W), for n images per example.
        target: The targets, of the same shape.
        weights: The weight of the error of each image (b * n,); None if all are 1.
    """

    rows: Tensor
    predicted: Tensor
    target: Tensor
    weights: Tensor | None


class TextToImage(CaptionedPictures):
    """`task.type: text_to_image`."""

    metric_channel = "pictures"
    default_metrics = ()
    loss_definition = (
        "mean squared error of what the model says of the noise, per number of the latents; "
        "of the same pictures, noise and steps in every evaluation"
    )
    main_term = "pictures"
    joins_examples = True  # several draws of noise for a row are one prediction
    propose = staticmethod(propose_captions)

    # --------------------------------------------------------------------- the processor

    def load_processor(self) -> None:
        """Load the configurations, tokenizers and noise scheduler, which have no weights."""
        require_pillow()
        self.read_config()
        self.tokenizers = self.base.tokenizers()
        check_keys(self.recipe, self.spec, self.base.family)
        scheduler = self.base.noise_scheduler()
        if self.base.family.uses_flow_matching:
            self.noise = FlowNoise(scheduler, self.spec.flow)
        else:
            self.noise = DiffusionNoise(scheduler, self.spec.snr_gamma)
        self._check_sizes()
        self.note_cut_prompts()
        if self.spec.crop == "random" or self.spec.flip:
            self.notes.append("latents are computed in every step, as pictures are cut or mirrored")
        if self.base.left_out and not self.spec.without_t5:
            part = self.base.left_out[0]
            self.notes.append(f"the base has no `{part}`: zeros stand in its place, in drawing too")

        drawing, usual = self.recipe.evaluate.drawing, self.base.family.sampling_defaults
        if self.base.family.reads_guidance and "guidance_scale" not in drawing.model_fields_set:
            self.notes.append(
                f"pictures are drawn with `guidance_scale: {drawing.guidance_scale}`, and usual "
                f"for this model is `evaluate.drawing.guidance_scale: {usual['guidance_scale']}`"
            )

    def _check_sizes(self) -> None:
        check_resolution(self.recipe, self.spec, self.base.family)
        if "resolution" in self.spec.model_fields_set:
            self._check_longest_side()

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Also check the default size of images, which is not needed to merge an adapter."""
        if "resolution" not in self.spec.model_fields_set and hasattr(self, "base"):
            self._check_longest_side()
        super().learn_from(splits)

    def _check_longest_side(self) -> None:
        check_longest_side(self.recipe, self.spec, self.base.family, self.sizes())

    def read_config(self) -> None:
        """Read the configurations of the base's parts."""
        self.base = DiffusionBase(self.recipe, self.spec.without_t5)

    @property
    def completed_recipe(self) -> Recipe:
        """The recipe, which also records a missing T5 encoder, for later uses of the adapter."""
        found = super().completed_recipe
        return found.with_values({"task.without_t5": True}) if self.unused_parts else found

    @property
    def unused_parts(self) -> Sequence[str]:
        """The text encoders that are missing or left out, and their tokenizers."""
        return self.base.left_out if hasattr(self, "base") else ()

    def save_processor(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Write nothing: adapters need no tokenizers, and whole models write their own."""

    @property
    def base_facts(self) -> dict[str, Any]:
        """The configuration keys that change the computation, and a hash of the tokenizers."""
        return {"config": self.base.facts, "processor": processor_hash(self.tokenizers)}

    # ----------------------------------------------------------------------------- model

    @property
    def frozen(self) -> list[str]:
        """The parts that are not trained."""
        base, trains_texts = self.base, self.spec.train_text_encoder
        never = base.family.never_adapted
        return [VAE, *(n for n in base.text_encoders if not trains_texts or n in never)]

    def load_model(
        self, device: torch.device, dtype: torch.dtype | str | None = None
    ) -> tuple[nn.Module, list[str]]:
        """Return all parts of the base, none of which has new modules."""
        return self.base.load(device, dtype, self.frozen), []

    def empty_model(self) -> tuple[nn.Module, list[str]]:
        """Return the same model without weights."""
        return self.base.empty(self.frozen), []

    def reloaded(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """Return all parts of a model, loaded from a folder that `save_pretrained` wrote."""
        moved = self.recipe.with_values({"model.name": str(folder.absolute())})
        copy = DiffusionBase(moved, self.spec.without_t5)
        return copy.load(torch.device("cpu"), "auto", self.frozen)

    def frozen_parts(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return the parts whose outputs are the same in every step, and so can be cached."""
        names = [VAE] if self._caches_latents else []
        names += self.base.text_encoders if self._caches_texts else ()
        return {name: model.get_submodule(name) for name in names}

    @property
    def _caches_latents(self) -> bool:
        return self.spec.crop == "center" and not self.spec.flip

    @property
    def _caches_texts(self) -> bool:
        return not (self.spec.shuffle_tags or self.spec.train_text_encoder)

    def frozen_outputs(
        self, model: nn.Module, batch: Batch
    ) -> dict[str, Tensor | Sequence[Tensor]]:
        """Return the distribution of the latents of each image, and the encoded captions."""
        found: dict[str, Tensor | Sequence[Tensor]] = {}
        n_rows, n_pictures = batch.inputs["steps"].shape
        if self._caches_latents:
            of_row: list[Tensor] = [torch.empty(0)] * n_rows
            for rows, inputs in _groups_by_size(batch.inputs):
                latents = self._latent_distribution(model, inputs["pixels"])
                for i, one in zip(rows.tolist(), latents, strict=True):
                    of_row[i] = one
            found[LATENTS] = of_row
        if self._caches_texts:
            texts, pooled = self._encode_captions(model, batch.inputs)
            found[TEXTS] = _unflatten(texts, (n_rows, n_pictures))
            if pooled is not None:
                found[POOLED] = _unflatten(pooled, (n_rows, n_pictures))
        return found

    @torch.no_grad()
    def _latent_distribution(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Return mean and log-variance of the latents (B, n, 2C, h, w) of pixels (B, n, 3, H, W).

        They are computed without autocast, since the autoencoder overflows in fp16.
        """
        vae: Any = model.get_submodule(VAE)
        with torch.autocast(pixels.device.type, enabled=False):
            flat = pixels.flatten(0, 1).to(vae.dtype)
            found: Tensor = vae.encode(flat).latent_dist.parameters
        return _unflatten(found, pixels.shape[:2])

    def _latents(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the scaled latents (B * n, C, h, w) that the denoiser expects, in float32."""
        kept = inputs.get(LATENTS)
        found = self._latent_distribution(model, inputs["pixels"]) if kept is None else kept
        mean, log_variance = found.flatten(0, 1).float().chunk(2, 1)
        if self.spec.latents == "sample":
            deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
            mean = mean + deviation * inputs["sampled"].flatten(0, 1)
        config = self.base.configs[VAE]
        return (mean - (config.get("shift_factor") or 0.0)) * float(config["scaling_factor"])

    def _encode_captions(
        self, model: nn.Module, inputs: Mapping[str, Tensor], prefix: str = "ids"
    ) -> tuple[Tensor, Tensor | None]:
        """Return the encoded tokens of N captions (N, L, D), and their pooled vectors (N, P)."""
        names = self.base.text_encoders
        parts = {name: model.get_submodule(name) for name in names}
        ids = [inputs[f"{prefix}.{i}"].flatten(0, -2) for i in range(len(names))]
        with nullcontext() if self.spec.train_text_encoder else torch.no_grad():
            return self.base.family.texts(parts, ids)

    def _caption_tensors(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the encoded captions (B, n, …); dropped captions are replaced by empty ones."""
        shape = inputs["steps"].shape
        if TEXTS in inputs:
            found = [inputs[key] for key in (TEXTS, POOLED) if key in inputs]
        else:
            made = self._encode_captions(model, inputs)
            found = [_unflatten(one, shape) for one in made if one is not None]
        if "dropped" in inputs:
            empty = self._encode_captions(model, inputs, "empty")
            for i, one in enumerate(e for e in empty if e is not None):
                dropped = inputs["dropped"].view(*shape, *[1] * (found[i].ndim - 2))
                found[i] = torch.where(dropped, one.to(found[i].dtype), found[i])
        return found

    def forward(self, model: nn.Module, batch: Batch) -> list[_Denoised]:
        """Return the model's predictions, with targets, for the images of each size."""
        inputs = batch.inputs
        texts, found = self._caption_tensors(model, inputs), []
        for rows, group in _groups_by_size(inputs):
            latents, noise = self._latents(model, group), group["noise"].flatten(0, 1)
            steps = inputs["steps"][rows].flatten()
            noisy = self.noise.noised(latents, noise, steps)
            of_group = [one[rows].flatten(0, 1) for one in texts]
            sizes = inputs["sizes"][rows].flatten(0, 1) if "sizes" in inputs else None
            predicted = self._predict_noise(model, noisy, steps, of_group, sizes)
            target = self.noise.target(latents, noise, steps)
            found.append(_Denoised(rows, predicted, target, self.noise.weights(steps)))
        return found

    def _predict_noise(
        self,
        model: nn.Module,
        noisy: Tensor,
        steps: Tensor,
        texts: Sequence[Tensor],
        sizes: Tensor | None,
    ) -> Tensor:
        """Return the denoiser's prediction for noisy latents (B, C, h, w)."""
        family = self.base.family
        denoiser = model.get_submodule(family.denoiser)
        dtype, times = _dtype_of(denoiser), self.noise.times(steps)
        given = Conditions(
            [one.to(dtype) for one in texts],
            None if sizes is None else sizes.to(dtype),
            (self.spec.flow or FlowSpec()).guidance,
        )
        return family.denoised(denoiser, noisy.to(dtype), times, given)

    @property
    def loss_weights(self) -> Mapping[str, float]:  # type: ignore[override]
        """The weights of the terms of the loss: the images, and those of prior preservation."""
        return {MAIN: 1.0, **({PRIOR: self.spec.prior.weight} if self.spec.prior else {})}

    def losses(self, model: nn.Module, output: list[_Denoised], batch: Batch) -> dict[str, Tensor]:
        """Return the error of each example's image (B,), and that of its prior image, if any."""
        n_rows, n_pictures = batch.inputs["steps"].shape
        errors = [self._errors(one).view(-1, n_pictures) for one in output]
        together = torch.cat(errors)
        order = torch.cat([one.rows for one in output])
        in_order = together.new_zeros(n_rows, n_pictures).index_copy(0, order, together)
        found = {MAIN: in_order[:, 0]}
        if self.spec.prior is not None:
            zeros = in_order.new_zeros(n_rows)
            found[PRIOR] = in_order[:, 1] if n_pictures > 1 else zeros
        return found

    def _errors(self, one: _Denoised) -> Tensor:
        errors = mean_squared_errors(one.predicted, one.target)
        return errors if one.weights is None else errors * one.weights.to(errors.dtype)

    def predictions(self, model: nn.Module, output: Any, batch: Batch) -> list[Prediction]:
        """Return empty predictions, which only carry losses: there is no correct image."""
        return [Prediction(row, None, None) for row in batch.rows]

    def join(self, row: dict[str, Any], parts: Sequence[Prediction]) -> Prediction:
        """Return the predictions for all draws of a row as one."""
        return Prediction(parts[0].row, None, None)

    # ----------------------------------------------------------------------------- probe

    def probe(self) -> dict[str, Tensor]:
        """Return fixed random noise, with timesteps and tokens."""
        generator = torch.Generator().manual_seed(0)
        shape = (2, self.base.latent_channels, PROBE_SIDE, PROBE_SIDE)
        found = {
            "noisy": torch.randn(shape, generator=generator),
            "steps": torch.tensor([self.noise.steps // 4, self.noise.steps // 2]),
        }
        texts = ("a red bicycle", "a photo of a dog")
        for i in range(len(self.tokenizers)):
            found[f"ids.{i}"] = torch.tensor([[self.ids_of(text)[i]] for text in texts])
        if self.base.family.has_sizes:
            side = PROBE_SIDE * self.base.family.pixels_per_latent
            found["sizes"] = torch.tensor([[side, side, 0, 0, side, side]] * 2)
        return found

    def probed(self, model: nn.Module, probe: dict[str, Tensor]) -> Tensor:
        """Return the denoiser's prediction for the probe."""
        texts = [one for one in self._encode_captions(model, probe) if one is not None]
        return self._predict_noise(model, probe["noisy"], probe["steps"], texts, probe.get("sizes"))

    # --------------------------------------------------------------------------- answers

    def answer_columns(self) -> dict[str, str]:
        """Return the column with the name of the generated image's file."""
        return {"picture": "string"}

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Generate an image for each row, and return the names of their files."""
        prompts = [" ".join(str(row[self.spec.caption_column]).split()) for row in rows]
        self.n_cut_prompts += sum(map(self.is_cut, prompts))
        folder = self.answer_folder
        place = Path() if folder is None else folder
        place.mkdir(parents=True, exist_ok=True)
        names = [picture_name(prompt, self.recipe.evaluate.drawing.seed) for prompt in prompts]
        pictures = self.draw_pictures(model, prompts)
        for name, picture in zip(names, pictures, strict=True):
            picture.save(place / name)
        return [[name if folder is None else f"{folder.name}/{name}"] for name in names]

    def draw_pictures(self, model: nn.Module, prompts: Sequence[str]) -> list[Any]:
        """Return the image that a model generates for each prompt, as a Pillow image."""
        with quiet_diffusers():
            return self._image_generator(model).generate(prompts, self.recipe.evaluate.drawing.seed)

    def _image_generator(self, model: nn.Module) -> ImageGenerator:
        assert isinstance(model, Bundle)
        pipeline = self.base.build_pipeline(model, self.tokenizers)
        settings, latents_of = self.recipe.evaluate.drawing, self.base.family.unpack_latents
        return ImageGenerator(pipeline, settings, self.spec.resolution, latents_of)

    def complete_data(self, device: torch.device) -> None:
        """Generate the missing images for prior preservation with the base model."""
        if self.prior is None or not self.prior.missing:
            return
        model, _ = self.load_model(device)
        native = mixed_precision(self.recipe)
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(native)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            self.prior.generate_missing(self._image_generator(model.eval()), self.recipe.train.seed)


def _groups_by_size(inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Return, for each size of images in a batch, the positions and tensors of its examples."""
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    while (rows := inputs.get(f"rows.{len(found)}")) is not None:
        end = f".{len(found)}"
        own = {key.removesuffix(end): t for key, t in inputs.items() if key.endswith(end)}
        found.append((rows, own))
    return found


def _unflatten(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor (B * n, …) in the shape (B, n, …)."""
    return tensor.view(*shape, *tensor.shape[1:])


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of a part's base weights, from which that of an adapter may differ."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    return next((p.dtype for p in parameters if not p.requires_grad), parameters[0].dtype)
