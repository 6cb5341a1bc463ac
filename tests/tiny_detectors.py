"""Tiny YOLOS and DETR models, and images with boxes, built in code.

folder = tiny_detectors.save("yolos", tmp_path / "base")
tiny_detectors.write_coco(tmp_path / "data", {"train": 8, "validation": 4})
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    PreTrainedModel,
    ResNetConfig,
    YolosConfig,
    YolosForObjectDetection,
)

Json = dict[str, Any]
SIZE = 32  # of the models' inputs, in pixels
LABELS = ("dark", "light")
PROCESSOR = {
    "do_resize": True, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7],
    "do_pad": True, "size": {"shortest_edge": 24, "longest_edge": SIZE},
}  # fmt: skip


def model(
    kind: str, labels: int | Sequence[str] = LABELS, seed: int = 0, **options: Any
) -> PreTrainedModel:
    """Return a tiny object detector with random weights, whose boxes differ."""
    names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
    named: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    built: PreTrainedModel
    if kind == "yolos":
        built = YolosForObjectDetection(YolosConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            image_size=[SIZE, SIZE], patch_size=8, num_detection_tokens=5,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **named, **options,
        ))  # fmt: skip
    else:
        backbone = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
            out_features=["stage2"],
        )  # fmt: skip
        built = DetrForObjectDetection(DetrConfig(
            backbone_config=backbone, use_timm_backbone=False, d_model=32, num_queries=5,
            encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0,
            **named, **options,
        ))  # fmt: skip
    tiny.enliven(built, seed)
    with torch.no_grad():  # scale convolutions by their whole fan-in
        for parameter in built.parameters():
            if parameter.ndim > 2:
                parameter.mul_((parameter.shape[-1] / parameter[0].numel()) ** 0.5)
    return built


def save(kind: str, folder: Path, labels: Sequence[str] = LABELS, **options: Any) -> Path:
    """Save a tiny model with its processor to a folder, and return the folder."""
    key = (kind, "boxes", tuple(labels), tuple(options))
    tiny.saved_once(folder, key, lambda to: model(kind, labels, **options).save_pretrained(to))
    name = {"yolos": "YolosImageProcessor", "detr": "DetrImageProcessor"}[kind]
    text = json.dumps({"image_processor_type": name, **PROCESSOR})
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
    return folder


def scene(seed: int) -> tuple[Image.Image, Json]:
    """Return an image of up to three dark and light rectangles on noise, and its objects."""
    rng = np.random.default_rng(seed)
    width, height = 36 + seed % 5, 28 + seed % 3
    pixels = rng.integers(100, 156, (height, width, 3), dtype=np.uint8)
    boxes, names = [], []
    for n in range(seed % 4):
        w, h = (int(rng.integers(6, 14)) for _ in range(2))
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        pixels[y : y + h, x : x + w] = 20 if (seed + n) % 2 else 235
        boxes.append([x, y, w, h])
        names.append(LABELS[0] if (seed + n) % 2 else LABELS[1])
    return Image.fromarray(pixels), {"bbox": boxes, "category": names}


def write_coco(folder: Path, splits: dict[str, int], crowd: bool = False) -> Path:
    """Write images and a COCO file for each split: `images/…`, `train.json`."""
    seed = 0
    for split, count in splits.items():
        (folder / "images").mkdir(parents=True, exist_ok=True)
        content: Json = {
            "images": [], "annotations": [],
            "categories": [{"id": 7, "name": LABELS[1]}, {"id": 3, "name": LABELS[0]}],
        }  # fmt: skip
        for _ in range(count):
            seed += 1
            image, objects = scene(seed)
            name = f"{seed}.png"
            image.save(folder / "images" / name)
            width, height = image.size
            entry = {"id": 100 + seed, "file_name": name, "width": width, "height": height}
            content["images"].append(entry)
            for n, (box, label) in enumerate(
                zip(objects["bbox"], objects["category"], strict=True)
            ):
                is_crowd = int(crowd and n == 1)
                category_id = {LABELS[1]: 7, LABELS[0]: 3}[label]
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": 100 + seed, "bbox": box,
                    "category_id": category_id, "iscrowd": is_crowd, "area": box[2] * box[3],
                })  # fmt: skip
        (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
