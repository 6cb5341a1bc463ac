"""Load text-to-image base models: the parts of a diffusers pipeline, and the pipeline itself.

    model_index.json                 the parts, and the class of each
    unet/  vae/  text_encoder/       models with weights
    tokenizer/  scheduler/           parts without weights

Other families have other parts: a second and third text encoder, a transformer instead of a U-Net.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.hub import cached_file

from lora_cli.errors import LoraError
from lora_cli.models.base_facts import flat_config, tokenizer_hash
from lora_cli.models.base_model import storage_dtype
from lora_cli.models.bundle import Bundle
from lora_cli.models.diffusion_family import (
    SCHEDULER,
    VAE,
    Family,
    StableDiffusion,
    StableDiffusionXL,
    tokenizer_of,
)
from lora_cli.models.find_base import PIPELINE, checkpoint_files, locate
from lora_cli.models.flux import Flux
from lora_cli.models.load_errors import explained
from lora_cli.models.stable_diffusion_3 import StableDiffusion3
from lora_cli.models.stored_tensors import DTYPES, FLOATS
from lora_cli.recipe import Recipe
from lora_cli.tensorfile import read_header

FAMILIES: dict[str, type[Family]] = {  # by the class name of the pipeline in diffusers
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
}


def require_diffusers(recipe: Recipe) -> None:
    """Check that diffusers is installed.

    Raises:
        LoraError: If it is not installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        what = f"`{recipe.task.type}` needs the Python package `diffusers`, which is not installed"
        raise LoraError(what, recipe.at("task.type"), "pip install 'lora-cli[diffusion]'")


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silence the warnings of diffusers within the context."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


class DiffusionBase:
    """The parts of the recipe's base; no weights are read before `load`.

    Args:
        recipe: The `model` section names the base.
        without_optional: Leave out the optional parts of the base's family.

    Raises:
        LoraError: If the base is not a supported pipeline, or its parts do not fit together.
    """

    def __init__(self, recipe: Recipe, without_optional: bool = False) -> None:
        require_diffusers(recipe)
        self.recipe, self.at = recipe, recipe.at("model.name")
        self.where = locate(recipe.model.name, self.at)
        self.index = self._read_index()
        self.pipeline = str(self.index["_class_name"])
        kind = FAMILIES[self.pipeline]
        left_out = [n for n in kind.optional if without_optional or self.class_name(n) is None]
        self.text_encoders = tuple(name for name in kind.encoders if name not in left_out)
        self.models = (kind.denoiser, VAE, *self.text_encoders)
        self.tokenizer_names = tuple(map(tokenizer_of, self.text_encoders))
        self._check_classes(kind)
        self._check_keys()
        self.configs = {name: self._config(name) for name in (*self.models, SCHEDULER)}
        self.family = kind(self.text_encoders, self.configs)
        self._check_configs()

    # ------------------------------------------------------------------------ what there is

    def _read_index(self) -> dict[str, Any]:
        name = self.recipe.model.name
        with explained(self.recipe, "configuration"):
            local = Path(self.where) / PIPELINE
            file: str | None = str(local) if local.is_file() else None
            if not Path(self.where).is_dir():
                file = cached_file(self.where, PIPELINE, revision=self.recipe.model.revision)
            index = None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
        kind = index.get("_class_name") if isinstance(index, dict) else None
        if kind in FAMILIES:
            assert isinstance(index, dict)
            return index
        what = f"`{name}` draws no pictures: it has no {PIPELINE} as diffusers writes it"
        if kind is not None:
            what = f"`{name}` is a {kind}, which `{self.recipe.task.type}` does not train"
        raise LoraError(what, self.at, self.recipe.task.suitable_models)

    def _check_classes(self, family: type[Family]) -> None:
        """Reject missing parts, and parts of an unsupported class."""
        for part in (*self.models, *self.tokenizer_names, SCHEDULER):
            kind = self.class_name(part)
            if kind is None:
                what = f"`{self.recipe.model.name}` has no part `{part}`"
                raise LoraError(what, self.at, f"{self.pipeline} needs it: download it again")
            if kind not in family.classes.get(part, (kind,)):
                what = f"the part `{part}` of `{self.recipe.model.name}` is a {kind}, and "
                what += f"{family.classes[part][0]} is trained"
                raise LoraError(what, self.at, self.recipe.task.suitable_models)

    def _check_keys(self) -> None:
        """Reject keys of the recipe that would have no effect."""
        for key in ("quantization", "attention"):
            if getattr(self.recipe.model, key) is not None:
                what = f"`model.{key}` is not for a base of several parts"
                raise LoraError(what, self.recipe.at(f"model.{key}"), "leave it out")

    def class_name(self, part: str) -> str | None:
        """Return the name of a part's class in `model_index.json`, if it has the part."""
        value = self.index.get(part)
        return value[1] if isinstance(value, list) and len(value) == 2 else None

    def _class(self, part: str) -> Any:
        """Return the class of a part with weights, or of the scheduler."""
        name = self.class_name(part)
        assert name is not None, "checked when the index was read"
        with explained(self.recipe, "architecture"):  # which also keeps imports quiet
            import diffusers
            import transformers

            library = transformers if part in self.text_encoders else diffusers
            cls = getattr(library, name, None)
        if part == SCHEDULER and not (
            isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)
        ):
            what = f"the scheduler of `{self.recipe.model.name}` is a {name}, which diffusers lacks"
            version = self.index.get("_diffusers_version", "another")
            hint = f"the model was made with version {version} of diffusers: install that"
            raise LoraError(what, self.at, hint)
        return cls

    def _config(self, part: str) -> dict[str, Any]:
        """Return the configuration of a part, with its defaults."""
        from diffusers import ConfigMixin

        kind, location = self._class(part), self._location(part)
        with explained(self.recipe, f"configuration of its part `{part}`"):
            if issubclass(kind, ConfigMixin):
                values: dict[str, Any] = kind.load_config(self.where, **location)
                return {**self._defaults(kind), **values}
            plain: dict[str, Any] = kind.config_class.from_pretrained(
                self.where, **location
            ).to_dict()
            return plain

    def _defaults(self, kind: Any) -> dict[str, Any]:
        """Return the default values of a class's configuration in diffusers."""
        import inspect

        parameters = inspect.signature(kind.__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}

    def _location(self, part: str) -> dict[str, Any]:
        return {"subfolder": part, "revision": self.recipe.model.revision}

    def _check_configs(self) -> None:
        """Reject parts that do not fit together, or need another way of training."""
        if problems := self.family.mismatches():
            what = f"`{self.recipe.model.name}` cannot be trained: {'; '.join(problems)}"
            raise LoraError(what, self.at, self.recipe.task.suitable_models)

    # ------------------------------------------------------------------------------ facts

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.configs[VAE]["latent_channels"])

    @property
    def facts(self) -> dict[str, Any]:
        """The keys of all configurations that affect outputs, flattened: `unet.sample_size`."""
        all_facts: dict[str, Any] = {}
        for part, config in self.configs.items():
            all_facts |= {f"{part}.{key}": value for key, value in flat_config(config).items()}
        return all_facts

    def tokenizers(self) -> list[Any]:
        """Return the tokenizer of each text encoder."""
        result = []
        for name in self.tokenizer_names:
            kind = self.family.classes.get(name, ("CLIPTokenizer",))[0]
            with explained(self.recipe, f"tokenizer, its part `{name}`,"):
                import transformers

                from_pretrained = getattr(transformers, kind).from_pretrained
                result.append(from_pretrained(self.where, **self._location(name)))
            if len(result[-1]) <= len(set(result[-1].all_special_tokens)):
                what = f"the part `{name}` of `{self.recipe.model.name}` knows no words"
                raise LoraError(what, self.at, "its files are missing: download the model again")
        return result

    def scheduler(self) -> Any:
        """Return the base's own scheduler, for sampling."""
        with explained(self.recipe, "scheduler"):
            return self._class(SCHEDULER).from_config(self.configs[SCHEDULER])

    def noise_scheduler(self) -> Any:
        """Return the scheduler that adds noise in training, as diffusers' training scripts do."""
        with explained(self.recipe, "scheduler"):
            import diffusers

            kind = getattr(diffusers, self.family.noise_scheduler)
            return kind.from_config(self.configs[SCHEDULER])

    # ------------------------------------------------------------------------------ models

    def load(
        self, device: torch.device, dtype: torch.dtype | str | None, frozen: Sequence[str]
    ) -> Bundle:
        """Load all parts with their weights.

        Args:
            device: The device for the weights.
            dtype: The dtype of the weights. None: the recipe's, except for the autoencoder, which
                overflows in fp16 and is kept in float32. `auto`: the dtype stored for each part.
            frozen: Names of the parts that stay frozen.
        """
        parts = {}
        for name in self.models:
            part_dtype = torch.float32 if name == VAE else storage_dtype(self.recipe)
            if isinstance(dtype, torch.dtype):
                part_dtype = dtype
            elif dtype == "auto":
                part_dtype = self._stored_dtype(name)
            parts[name] = self._load_part(name, part_dtype).to(device)
        return Bundle(parts, frozen, self.save_rest)

    def _stored_dtype(self, part: str) -> torch.dtype:
        entries = (e for f in checkpoint_files(self.recipe, part) for e in read_header(f).values())
        return next((DTYPES[e.dtype] for e in entries if e.dtype in FLOATS), torch.float32)

    def _load_part(self, part: str, dtype: torch.dtype) -> nn.Module:
        kind = self._class(part)
        for file in checkpoint_files(self.recipe, part):
            read_header(file)
        key = "dtype" if part in self.text_encoders else "torch_dtype"
        with explained(self.recipe, f"weights of its part `{part}`"), quiet_diffusers():
            model, info = kind.from_pretrained(
                self.where, **self._location(part), use_safetensors=True, output_loading_info=True,
                **{key: dtype},
            )  # fmt: skip
        unloaded = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
        if unloaded:
            what = (
                f"the checkpoint of the part `{part}` holds no weights for `{sorted(unloaded)[0]}`"
            )
            raise LoraError(what, self.at, "config.json and the weights do not belong together")
        if part not in self.text_encoders:
            model.register_to_config(_name_or_path="")  # otherwise a local path would be saved
        loaded: nn.Module = model
        return loaded

    def empty(self, frozen: Sequence[str]) -> Bundle:
        """Return all parts on the meta device: all names and shapes, but no weights."""
        parts = {}
        for name in self.models:
            kind = self._class(name)
            with explained(self.recipe, f"architecture of its part `{name}`"), torch.device("meta"):
                if name in self.text_encoders:
                    config = kind.config_class.from_pretrained(self.where, **self._location(name))
                    parts[name] = kind(config)
                else:
                    parts[name] = kind.from_config(self.configs[name])
        return Bundle(parts, frozen, self.save_rest)

    def save_rest(self, folder: Path) -> None:
        """Write the files of a pipeline besides its models, so that diffusers can load it."""
        index = {key: value for key, value in self.index.items() if key.startswith("_")}
        for part in (*self.models, *self.tokenizer_names, SCHEDULER):
            index[part] = self.index[part]
        for part in self.left_out:
            index[part] = [None, None]
        for part in ("safety_checker", "feature_extractor", "image_encoder"):
            if part in self.index:
                index[part] = [None, None]  # not trained, and not copied
        options = {k: v for k, v in self.index.items() if not isinstance(v, list)}
        if "safety_checker" in index:
            options["requires_safety_checker"] = False
        text = json.dumps({**index, **options}, indent=2)
        (folder / PIPELINE).write_text(f"{text}\n", encoding="utf-8")
        self.scheduler().save_pretrained(folder / SCHEDULER)
        for name, tokenizer in zip(self.tokenizer_names, self.tokenizers(), strict=True):
            tokenizer.save_pretrained(folder / name)

    @property
    def left_out(self) -> list[str]:
        """The optional parts of this family that the base lacks, or that are not used."""
        absent = [name for name in self.family.encoders if name not in self.text_encoders]
        return [*absent, *map(tokenizer_of, absent)]

    def build_pipeline(self, model: Bundle, tokenizers: Sequence[Any]) -> Any:
        """Build the pipeline of diffusers from the parts of a model, which may be adapted."""
        import diffusers

        parts: dict[str, Any] = {**model.parts, SCHEDULER: self.scheduler()}
        parts |= dict(zip(self.tokenizer_names, tokenizers, strict=True))
        parts |= dict.fromkeys(self.left_out) | self.family.pipeline_options(self.index)
        with explained(self.recipe, "pipeline"), quiet_diffusers():
            pipeline = getattr(diffusers, self.pipeline)(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def processor_hash(tokenizers: Sequence[Any]) -> str:
    """Return a hash of all tokenizers."""
    return "-".join(map(tokenizer_hash, tokenizers))
