"""Tiny image classifiers (ViT, ResNet, EfficientNet, ConvNeXt, Swin) and images, built in code.

folder = tiny_pictures.save("vit", tmp_path / "base")
tiny_pictures.draw_folders(tmp_path / "pictures", {"train": 8, "validation": 4})
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

SIZE = 32  # of the models' inputs, in pixels
CLASSES = ("dark", "light")
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True,
    "size": {"height": SIZE, "width": SIZE}, "resample": 2, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}  # fmt: skip


def model(kind: str, labels: int | Sequence[str] = 2, seed: int = 0) -> PreTrainedModel:
    """Return a tiny image classifier with random weights."""
    names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
    options: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    built: PreTrainedModel
    if kind == "vit":
        built = ViTForImageClassification(ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            image_size=SIZE, patch_size=8, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, **options,
        ))  # fmt: skip
    elif kind == "resnet":
        built = ResNetForImageClassification(ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **options,
        ))  # fmt: skip
    elif kind == "efficientnet":
        built = EfficientNetForImageClassification(EfficientNetConfig(
            image_size=SIZE, width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320,
            dropout_rate=0.0, drop_connect_rate=0.0, in_channels=[32, 16], out_channels=[16, 24],
            kernel_sizes=[3, 3], strides=[1, 2], num_block_repeats=[1, 1], expand_ratios=[1, 6],
            **options,
        ))  # fmt: skip
    elif kind == "convnext":
        built = ConvNextForImageClassification(ConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=SIZE, **options,
        ))  # fmt: skip
    else:
        built = SwinForImageClassification(SwinConfig(
            image_size=SIZE, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
            window_size=4, hidden_dropout_prob=0.0, drop_path_rate=0.0, **options,
        ))  # fmt: skip
    tiny.enliven(built, seed)
    with torch.no_grad():  # scale convolutions by their whole fan-in
        for parameter in built.parameters():
            if parameter.ndim > 2:
                parameter.mul_((parameter.shape[-1] / parameter[0].numel()) ** 0.5)
    return built


def save(kind: str, folder: Path, labels: int | Sequence[str] = 2, **processor: Any) -> Path:
    """Save a tiny classifier with its processor to a folder, and return the folder."""
    names = labels if isinstance(labels, int) else tuple(labels)
    tiny.saved_once(folder, (kind, names), lambda place: model(kind, labels).save_pretrained(place))
    text = json.dumps({**PROCESSOR, **processor})
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
    return folder


def picture(seed: int, kind: str = "dark", width: int = 20, height: int = 14) -> Image.Image:
    """Return an image of dark or light noise that is unique to the seed."""
    rng = np.random.default_rng(seed)
    low, high = (0, 120) if kind == "dark" else (136, 256)
    return Image.fromarray(rng.integers(low, high, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Return an image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tiff(pixels: bytes, size: tuple[int, int], bits: int, **tags: int | list[int]) -> bytes:
    """Return a greyscale TIFF with features that Pillow cannot write, such as 0 as white.

    Args:
        pixels: The raw pixels of the file, row by row.
        size: Width and height.
        bits: The bits of a sample.
        **tags: More tags, such as `t262=0`.
    """
    entries: dict[int, int | list[int]] = {
        256: size[0], 257: size[1], 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: size[1],
        279: len(pixels), **{int(name[1:]): value for name, value in tags.items()},
    }  # fmt: skip
    head = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels
    directory = struct.pack("<H", len(entries))
    for tag, value in sorted(entries.items()):
        numbers = value if isinstance(value, list) else [value]
        directory += struct.pack("<HHI", tag, 3, len(numbers))  # of 16 bits each
        directory += b"".join(struct.pack("<H", number) for number in numbers).ljust(4, b"\0")
    return head + directory + bytes(4)


def png(lines: Sequence[bytes], width: int, bits: int, transparent: int) -> bytes:
    """Return a greyscale PNG with a bit depth and one transparent value."""

    def chunk(name: bytes, content: bytes) -> bytes:
        part = name + content
        return struct.pack(">I", len(content)) + part + struct.pack(">I", zlib.crc32(part))

    head = struct.pack(">IIBBBBB", width, len(lines), bits, 0, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + line for line in lines))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"tRNS", struct.pack(">H", transparent))
        + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    )  # fmt: skip


def draw_folders(root: Path, splits: dict[str, int], classes: Sequence[str] = CLASSES) -> Path:
    """Write images of each class to a folder per split and class."""
    seed = 0
    for split, count in splits.items():
        for i, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                seed += 1
                picture(seed, CLASSES[i % 2], 20 + number % 3).save(folder / f"{number}.png")
    return root
