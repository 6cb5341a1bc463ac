"""A base of several models, such as the autoencoder, text encoder and U-Net of a diffusion model.

In a checkpoint, each model has its own folder. Here they are the parts of one module, and names of
tensors start with the name of the part: `unet.down_blocks.0.…`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

CHECKPOINTING_ATTRIBUTES = (  # in transformers and in diffusers
    "supports_gradient_checkpointing",
    "_supports_gradient_checkpointing",
)


class Bundle(nn.Module):
    """Several models as one module.

    Args:
        parts: The models by name, which is also the name of their folder in the checkpoint. Each
            has `save_pretrained`, like models of transformers and diffusers.
        frozen: Names of parts that get no adapter and stay in eval mode.
        save_rest: Writes the other files of the checkpoint into a folder.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        frozen: Collection[str] = (),
        save_rest: Callable[[Path], object] | None = None,
    ) -> None:
        super().__init__()
        assert set(frozen) <= set(parts), "a frozen part that is no part"
        for name, part in parts.items():
            self.add_module(name, part)
        self.frozen = tuple(frozen)
        self.save_rest = save_rest
        self.train(False)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The models by name."""
        return dict(self.named_children())

    def train(self, mode: bool = True) -> Bundle:
        """Put the trained parts into training mode, or all parts into eval mode."""
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """Whether every trained part can recompute its activations."""
        return all(
            any(getattr(part, name, False) for name in CHECKPOINTING_ATTRIBUTES)
            for part in self._trained_parts()
        )

    def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
        """Let the trained parts recompute their activations."""
        for part in self._trained_parts():
            enable: Any = getattr(part, "gradient_checkpointing_enable", None)
            if enable is not None:
                enable(options)
                continue
            # diffusers takes no options; its checkpointing is not reentrant
            enable = getattr(part, "enable_gradient_checkpointing")  # noqa: B009 - of a Module
            enable()

    def save_pretrained(self, folder: Path) -> None:
        """Write each part into a subfolder, and the other files of the checkpoint."""
        for name, part in self.parts.items():
            save: Any = getattr(part, "save_pretrained")  # noqa: B009 - of a Module
            save(folder / name)
        if self.save_rest is not None:
            self.save_rest(folder)

    def _trained_parts(self) -> Iterator[nn.Module]:
        return (part for name, part in self.parts.items() if name not in self.frozen)


def part_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a base's parts; none if the base is a single model."""
    return tuple(model.parts) if isinstance(model, Bundle) else ()


UNUSED_ATTRIBUTE = "modules_without_use"


def mark_frozen(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Mark children of a model that do not affect the task's output, so that they stay frozen.

    Args:
        model: The model, which is returned.
        names: Names of the children; names that the model does not have are ignored.
    """
    setattr(model, UNUSED_ATTRIBUTE, tuple(names))
    return model


def is_frozen(model: nn.Module, name: str) -> bool:
    """Return whether a module or a parameter belongs to a part that stays frozen."""
    frozen = model.frozen if isinstance(model, Bundle) else getattr(model, UNUSED_ATTRIBUTE, ())
    return name.partition(".")[0] in frozen
