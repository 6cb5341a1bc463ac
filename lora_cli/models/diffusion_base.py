"""Base models that draw: the parts of a diffusers pipeline, and how they are put together again.

    model_index.json                 which parts there are, and the class of each
    unet/  vae/  text_encoder/       models with weights
    tokenizer/  scheduler/           what has none

Stable Diffusion XL has `text_encoder_2/` and `tokenizer_2/` besides.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.hub import cached_file

from lora_cli.errors import LoraError
from lora_cli.models.base_facts import flat_config, tokenizer_hash
from lora_cli.models.base_model import PIPELINE, checkpoint_files, locate, storage_dtype
from lora_cli.models.bundle import Bundle
from lora_cli.models.load_errors import explained
from lora_cli.models.stored_tensors import DTYPES, FLOATS
from lora_cli.recipe import Recipe
from lora_cli.tensorfile import read_header

VAE, UNET, SCHEDULER = "vae", "unet", "scheduler"
CLASSES = {  # of each part, those that are known to compute as this tool computes
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}
NOISE = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Family:
    """A kind of pipeline.

    Args:
        name: As people call it.
        denoiser: The part that takes noise away, which is trained.
        text_encoders: The parts that read a text.
        has_sizes: It is told the sizes of a picture, as Stable Diffusion XL.
    """

    name: str
    denoiser: str
    text_encoders: tuple[str, ...]
    has_sizes: bool = False

    @property
    def models(self) -> tuple[str, ...]:
        """The parts with weights; the one that is trained comes first."""
        return (self.denoiser, VAE, *self.text_encoders)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """What turns texts into what each text encoder reads."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)


FAMILIES = {
    "StableDiffusionPipeline": Family("Stable Diffusion", UNET, ("text_encoder",)),
    "StableDiffusionXLPipeline": Family(
        "Stable Diffusion XL", UNET, ("text_encoder", "text_encoder_2"), has_sizes=True
    ),
}


def require_diffusers(recipe: Recipe) -> None:
    """Check that diffusers is installed.

    Raises:
        LoraError: If it is not.
    """
    if importlib.util.find_spec("diffusers") is None:
        what = f"`{recipe.task.type}` needs the Python package `diffusers`, which is not installed"
        raise LoraError(what, recipe.at("task.type"), "pip install 'lora-cli[diffusion]'")


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Let diffusers warn of nothing within the context: what matters is said otherwise."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


class DiffusionBase:
    """What the recipe's base is made of; no weights are read before `load`.

    Raises:
        LoraError: If the base is no pipeline that can be trained, or its parts do not fit together.
    """

    def __init__(self, recipe: Recipe) -> None:
        require_diffusers(recipe)
        self.recipe, self.at = recipe, recipe.at("model.name")
        self.where = locate(recipe.model.name, self.at)
        self.index = self._read_index()
        self.pipeline = str(self.index["_class_name"])
        self.family = FAMILIES[self.pipeline]
        self._check_classes()
        self._check_keys()
        self.configs = {name: self._config(name) for name in (*self.family.models, SCHEDULER)}
        self._check_configs()

    # ------------------------------------------------------------------------ what there is

    def _read_index(self) -> dict[str, Any]:
        name = self.recipe.model.name
        with explained(self.recipe, "configuration"):
            local = Path(self.where) / PIPELINE
            found: str | None = str(local) if local.is_file() else None
            if not Path(self.where).is_dir():
                found = cached_file(self.where, PIPELINE, revision=self.recipe.model.revision)
            index = None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
        kind = index.get("_class_name") if isinstance(index, dict) else None
        if kind in FAMILIES:
            assert isinstance(index, dict)
            return index
        what = f"`{name}` draws no pictures: it has no {PIPELINE} as diffusers writes it"
        if kind is not None:
            what = f"`{name}` is a {kind}, which `{self.recipe.task.type}` does not train"
        raise LoraError(what, self.at, self.recipe.task.suitable_models)

    def _check_classes(self) -> None:
        """Reject parts that are missing, or that compute in another way."""
        for part in (*self.family.models, *self.family.tokenizers, SCHEDULER):
            kind = self.class_name(part)
            if kind is None:
                what = f"`{self.recipe.model.name}` has no part `{part}`"
                raise LoraError(what, self.at, f"{self.pipeline} needs it: download it again")
            if part in CLASSES and kind not in CLASSES[part]:
                what = f"the part `{part}` of `{self.recipe.model.name}` is a {kind}, and "
                what += f"{CLASSES[part][0]} is trained"
                raise LoraError(what, self.at, self.recipe.task.suitable_models)

    def _check_keys(self) -> None:
        """Reject keys of the recipe that would change nothing."""
        for key in ("quantization", "attention"):
            if getattr(self.recipe.model, key) is not None:
                what = f"`model.{key}` is not for a base of several parts"
                raise LoraError(what, self.recipe.at(f"model.{key}"), "leave it out")

    def class_name(self, part: str) -> str | None:
        """Return the name of a part's class, as `model_index.json` has it, if it is there."""
        value = self.index.get(part)
        return value[1] if isinstance(value, list) and len(value) == 2 else None

    def _class(self, part: str) -> Any:
        """Return the class of a part with weights, or of the scheduler."""
        name = self.class_name(part)
        assert name is not None, "checked when the index was read"
        with explained(self.recipe, "architecture"):  # which also keeps imports quiet
            import diffusers
            import transformers

            library = transformers if part in self.family.text_encoders else diffusers
            found = getattr(library, name, None)
        if part == SCHEDULER and not (
            isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)
        ):
            what = f"the scheduler of `{self.recipe.model.name}` is a {name}, which diffusers lacks"
            version = self.index.get("_diffusers_version", "another")
            hint = f"the model was made with version {version} of diffusers: install that"
            raise LoraError(what, self.at, hint)
        return found

    def _config(self, part: str) -> dict[str, Any]:
        """Return the configuration of a part, with its defaults."""
        from diffusers import ConfigMixin

        kind, place = self._class(part), self._place(part)
        with explained(self.recipe, f"configuration of its part `{part}`"):
            if issubclass(kind, ConfigMixin):
                read: dict[str, Any] = kind.load_config(self.where, **place)
                return {**self._defaults(kind), **read}
            plain: dict[str, Any] = kind.config_class.from_pretrained(self.where, **place).to_dict()
            return plain

    def _defaults(self, kind: Any) -> dict[str, Any]:
        """Return the values of the keys that a configuration of diffusers may leave out."""
        import inspect

        parameters = inspect.signature(kind.__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}

    def _place(self, part: str) -> dict[str, Any]:
        return {"subfolder": part, "revision": self.recipe.model.revision}

    def _check_configs(self) -> None:
        """Reject parts that do not fit together, and what is trained in another way."""
        denoiser, vae = self.configs[self.family.denoiser], self.configs[VAE]
        problems = []
        if denoiser["in_channels"] != vae["latent_channels"]:
            kind = {9: " (it fills in parts of pictures)", 8: " (it changes pictures)"}
            more = kind.get(denoiser["in_channels"], "")
            problems.append(
                f"its U-Net reads {denoiser['in_channels']} channels{more}, and its autoencoder "
                f"makes {vae['latent_channels']}"
            )
        widths = [self.configs[name]["hidden_size"] for name in self.family.text_encoders]
        if denoiser["cross_attention_dim"] != sum(widths):
            made = " and ".join(map(str, widths))
            problems.append(
                f"its U-Net reads texts of {denoiser['cross_attention_dim']} numbers a token, and "
                f"its text encoders make {made}"
            )
        has_sizes = denoiser["addition_embed_type"] == "text_time"
        if has_sizes != self.family.has_sizes or denoiser["class_embed_type"] is not None:
            problems.append(f"its U-Net is told more of a picture than that of {self.family.name}")
        prediction = self.configs[SCHEDULER].get("prediction_type", NOISE[0])
        if prediction not in NOISE:
            names = " and ".join(f"`{name}`" for name in NOISE)
            problems.append(f"its scheduler has `prediction_type: {prediction}`, and {names} train")
        if problems:
            what = f"`{self.recipe.model.name}` cannot be trained: {'; '.join(problems)}"
            raise LoraError(what, self.at, self.recipe.task.suitable_models)

    # ------------------------------------------------------------------------------ facts

    @property
    def pixels_per_latent(self) -> int:
        """Pixels of a side that become one of the latents' side."""
        return int(2 ** (len(self.configs[VAE]["block_out_channels"]) - 1))

    @property
    def divisor(self) -> int:
        """What the sides of pictures have to be multiples of, as diffusers draws them."""
        return math.lcm(8, self.pixels_per_latent)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.configs[VAE]["latent_channels"])

    @property
    def usual_side(self) -> int | None:
        """The side of the pictures that it was trained for, in pixels, if it says so."""
        side = self.configs[self.family.denoiser].get("sample_size")
        return side * self.pixels_per_latent if isinstance(side, int) else None

    @property
    def facts(self) -> dict[str, Any]:
        """The keys of all configurations that decide the computation, flat: `unet.sample_size`."""
        found: dict[str, Any] = {}
        for part, config in self.configs.items():
            found |= {f"{part}.{key}": value for key, value in flat_config(config).items()}
        return found

    def tokenizers(self) -> list[Any]:
        """Return the tokenizer of each text encoder."""
        from transformers import CLIPTokenizer

        found = []
        for name in self.family.tokenizers:
            with explained(self.recipe, f"tokenizer, its part `{name}`,"):
                found.append(CLIPTokenizer.from_pretrained(self.where, **self._place(name)))
            if len(found[-1]) <= len(set(found[-1].all_special_tokens)):
                what = f"the part `{name}` of `{self.recipe.model.name}` knows no words"
                raise LoraError(what, self.at, "its files are missing: download the model again")
        return found

    def scheduler(self) -> Any:
        """Return the base's own scheduler, which leads from noise to a picture."""
        with explained(self.recipe, "scheduler"):
            return self._class(SCHEDULER).from_config(self.configs[SCHEDULER])

    def noise_scheduler(self) -> Any:
        """Return the scheduler that adds noise in training, as diffusers' training scripts do."""
        from diffusers import DDPMScheduler

        with explained(self.recipe, "scheduler"):
            return DDPMScheduler.from_config(self.configs[SCHEDULER])

    # ------------------------------------------------------------------------------ models

    def load(
        self, device: torch.device, dtype: torch.dtype | str | None, frozen: Sequence[str]
    ) -> Bundle:
        """Return all parts with their weights.

        Args:
            device: Where they go.
            dtype: How they are kept; None: as the recipe says, but for the autoencoder, which is
                kept in float32, as it overflows in fp16; `auto`: as each part is stored.
            frozen: Names of the parts that are used as they are.
        """
        parts = {}
        for name in self.family.models:
            own = torch.float32 if name == VAE else storage_dtype(self.recipe)
            if isinstance(dtype, torch.dtype):
                own = dtype
            elif dtype == "auto":
                own = self._stored_dtype(name)
            parts[name] = self._load_part(name, own).to(device)
        return Bundle(parts, frozen, self.save_rest)

    def _stored_dtype(self, part: str) -> torch.dtype:
        entries = (e for f in checkpoint_files(self.recipe, part) for e in read_header(f).values())
        return next((DTYPES[e.dtype] for e in entries if e.dtype in FLOATS), torch.float32)

    def _load_part(self, part: str, dtype: torch.dtype) -> nn.Module:
        kind = self._class(part)
        for file in checkpoint_files(self.recipe, part):
            read_header(file)
        key = "dtype" if part in self.family.text_encoders else "torch_dtype"
        with explained(self.recipe, f"weights of its part `{part}`"), quiet_diffusers():
            model, info = kind.from_pretrained(
                self.where, **self._place(part), use_safetensors=True, output_loading_info=True,
                **{key: dtype},
            )  # fmt: skip
        wrong = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
        if wrong:
            what = f"the checkpoint of the part `{part}` holds no weights for `{sorted(wrong)[0]}`"
            raise LoraError(what, self.at, "config.json and the weights do not belong together")
        if part not in self.family.text_encoders:
            model.register_to_config(_name_or_path="")  # a path of this machine
        loaded: nn.Module = model
        return loaded

    def empty(self, frozen: Sequence[str]) -> Bundle:
        """Return all parts on the meta device: every name and shape, no weights."""
        parts = {}
        for name in self.family.models:
            kind = self._class(name)
            with explained(self.recipe, f"architecture of its part `{name}`"), torch.device("meta"):
                if name in self.family.text_encoders:
                    config = kind.config_class.from_pretrained(self.where, **self._place(name))
                    parts[name] = kind(config)
                else:
                    parts[name] = kind.from_config(self.configs[name])
        return Bundle(parts, frozen, self.save_rest)

    def save_rest(self, folder: Path) -> None:
        """Write what a pipeline has besides its models, so that diffusers reads the folder."""
        named = {key: value for key, value in self.index.items() if key.startswith("_")}
        for part in (*self.family.models, *self.family.tokenizers, SCHEDULER):
            named[part] = self.index[part]
        for part in ("safety_checker", "feature_extractor", "image_encoder"):
            if part in self.index:
                named[part] = [None, None]  # they are not trained, and are the base's own
        options = {k: v for k, v in self.index.items() if not isinstance(v, list)}
        if "safety_checker" in named:
            options["requires_safety_checker"] = False
        text = json.dumps({**named, **options}, indent=2)
        (folder / PIPELINE).write_text(f"{text}\n", encoding="utf-8")
        self.scheduler().save_pretrained(folder / SCHEDULER)
        for name, tokenizer in zip(self.family.tokenizers, self.tokenizers(), strict=True):
            tokenizer.save_pretrained(folder / name)

    def build_pipeline(self, model: Bundle, tokenizers: Sequence[Any]) -> Any:
        """Return the pipeline of diffusers around the parts of a model, which may be adapted."""
        import diffusers

        parts: dict[str, Any] = {**model.parts, SCHEDULER: self.scheduler()}
        parts |= dict(zip(self.family.tokenizers, tokenizers, strict=True))
        if not self.family.has_sizes:
            parts |= {"safety_checker": None, "feature_extractor": None}
            parts["requires_safety_checker"] = False
        else:
            known = self.index.get("force_zeros_for_empty_prompt", True)
            parts |= {"force_zeros_for_empty_prompt": known, "add_watermarker": False}
        with explained(self.recipe, "pipeline"), quiet_diffusers():
            pipeline = getattr(diffusers, self.pipeline)(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def processor_hash(tokenizers: Sequence[Any]) -> str:
    """Return a hash of all tokenizers."""
    return "-".join(map(tokenizer_hash, tokenizers))
