"""A base of several models, such as the autoencoder, text encoder and U-Net of a diffusion model.

In a checkpoint each is a folder of its own. Here they are one module, whose tensors have the name
of their part before their own: `unet.down_blocks.0.…`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

SUPPORTS = (  # what transformers and diffusers call it
    "supports_gradient_checkpointing",
    "_supports_gradient_checkpointing",
)


class Bundle(nn.Module):
    """Several models as one module.

    Args:
        parts: The models by name, which is also that of their folder in the checkpoint. Each has
            `save_pretrained`, as those of transformers and diffusers.
        frozen: Names of parts that are used as they are: they get no adapter, and stay in eval
            mode.
        save_rest: Writes into a folder what a checkpoint has besides its models.
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
        """Put the parts that are not frozen into training mode, or all into eval mode."""
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """Whether every part that is trained can recompute its activations."""
        return all(any(getattr(part, name, False) for name in SUPPORTS) for part in self._own())

    def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
        """Let the parts that are trained recompute their activations."""
        for part in self._own():
            enable: Any = getattr(part, "gradient_checkpointing_enable", None)
            if enable is not None:
                enable(options)
                continue
            # of diffusers, which takes no options, and checkpoints without reentrance
            enable = getattr(part, "enable_gradient_checkpointing")  # noqa: B009 - of a Module
            enable()

    def save_pretrained(self, folder: Path) -> None:
        """Write each part into a folder of its name, and what belongs to them."""
        for name, part in self.parts.items():
            save: Any = getattr(part, "save_pretrained")  # noqa: B009 - of a Module
            save(folder / name)
        if self.save_rest is not None:
            self.save_rest(folder)

    def _own(self) -> Iterator[nn.Module]:
        return (part for name, part in self.parts.items() if name not in self.frozen)


def part_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a base's parts; none for a base that is one model."""
    return tuple(model.parts) if isinstance(model, Bundle) else ()


UNUSED = "modules_without_use"


def leave_frozen(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Let modules of a model that no output of the task comes from stay as they are.

    Args:
        model: The model, which is returned.
        names: Names of its children; it need not have them.
    """
    setattr(model, UNUSED, tuple(names))
    return model


def is_frozen(model: nn.Module, name: str) -> bool:
    """Return whether a module or a parameter belongs to a part that is used as it is."""
    frozen = model.frozen if isinstance(model, Bundle) else getattr(model, UNUSED, ())
    return name.partition(".")[0] in frozen
