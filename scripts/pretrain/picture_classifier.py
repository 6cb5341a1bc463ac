"""A small classifier of the pictures of `pictures.py`: does a picture show what was asked for?

usage: python scripts/pretrain/picture_classifier.py measure CLASSIFIER FOLDER…
       python scripts/pretrain/picture_classifier.py train CLASSIFIER DATA [--minutes 1.6]
       (to try it on a CPU: train … --steps 2 --pool 16 --batch 8 --width 8)

`measure` says of the thing, its colour, the background and the style how often pictures have what
was asked for. Each FOLDER has pictures (.png) and beside each its caption (.txt).

`train` writes the folder CLASSIFIER in two minutes on an H100; DATA holds the folders mnist_test
and omniglot. The classifier has seen all kinds of pictures while it was trained, also those that no
model was pretrained with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from pictures import COLOURS, STYLE, Facts, Glyphs, read_caption
from PIL import Image
from pretraining import Schedule, Steps, computing_in, train_on_rows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Classifier(nn.Module):
    """Tells thing, colour, background and style of pictures (N, 3, 64, 64) in -1..1.

    Args:
        names: The things that there are.
        width: Channels of the first layer.
    """

    def __init__(self, names: list[str], width: int = 48) -> None:
        super().__init__()
        self.names, self.width = names, width
        self.sizes = {
            "thing": len(names),
            "colour": len(COLOURS),
            "background": len(COLOURS),
            "style": 2,
        }
        layers: list[nn.Module] = []
        before = 3
        for channels in (width, 2 * width, 4 * width, 4 * width):
            layers += [
                nn.Conv2d(before, channels, 3, 2 if before > 3 else 1, 1, bias=False),
                nn.BatchNorm2d(channels), nn.ReLU(),
                nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
                nn.BatchNorm2d(channels), nn.ReLU(),
            ]  # fmt: skip
            before = channels
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.heads = nn.Linear(4 * before, sum(self.sizes.values()))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the scores of each answer, by what is asked."""
        scores = self.heads(self.layers(pixels)).split(list(self.sizes.values()), dim=1)
        return dict(zip(self.sizes, scores, strict=True))


def answers(facts: Facts) -> Tensor:
    """Return what the classifier should say (N, 4)."""
    return torch.stack([facts.name, facts.colour, facts.background, facts.styled.long()], dim=1)


def train_classifier(
    glyphs: Glyphs, schedule: Schedule, pool: int, batch: int, record: bool, width: int = 48
) -> Classifier:
    """Return a classifier that was trained with all things, in both styles.

    Args:
        glyphs: Makes the pictures.
        schedule: The time that the training may take.
        pool: Different pictures.
        batch: Pictures of a step.
        record: Whether steps may be recorded.
        width: Channels of the first layer.
    """
    model = Classifier(glyphs.names, width).to(glyphs.device)
    parts = [glyphs.sample(min(2048, pool), glyphs.names, 0.3, 0.4) for _ in range(0, pool, 2048)]
    pixels = torch.cat([glyphs.paint(facts).bfloat16() for facts in parts])
    wanted = torch.cat([answers(facts) for facts in parts]).to(glyphs.device)

    def loss_of(pictures: Tensor, right: Tensor) -> Tensor:
        strength = 0.3 * torch.rand(len(pictures), 1, 1, 1, device=pictures.device)
        noisy = pictures.float() + strength * torch.randn_like(pictures, dtype=torch.float32)
        with computing_in(pictures.device.type):
            scores = model(noisy)
        losses = [
            F.cross_entropy(own.float(), column, label_smoothing=0.05)
            for own, column in zip(scores.values(), right.unbind(1), strict=True)
        ]
        return torch.stack(losses).sum()

    steps = Steps(loss_of, list(model.parameters()), record=record)
    train_on_rows("classifier", steps, schedule, batch, pixels, wanted)
    return model.eval()


@torch.no_grad()
def shares_right(model: Classifier, pixels: Tensor, wanted: Tensor) -> dict[str, float]:
    """Return how often the classifier sees what was wanted.

    Args:
        model: The classifier.
        pixels: Pictures (N, 3, H, W) in -1..1.
        wanted: Thing, colour, background and style (N, 4); -1 where nothing was asked for.
    """
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {what: [] for what in model.sizes}
    for own in pixels.float().split(256):
        resized = (
            F.interpolate(own.to(device), (64, 64), mode="area") if own.shape[-1] != 64 else own
        )
        for what, scores in model(resized.to(device)).items():
            found[what].append(scores.argmax(dim=1).cpu())
    right = {}
    for what, column in zip(model.sizes, wanted.unbind(1), strict=True):
        asked = column >= 0
        if asked.any():
            right[what] = float((torch.cat(found[what]) == column)[asked].float().mean())
    return right


def shown(right: dict[str, float]) -> str:
    """Return the shares as they are printed."""
    return ", ".join(f"{what} {share:.1%}" for what, share in right.items())


def save_classifier(model: Classifier, folder: Path) -> None:
    """Write the classifier."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        folder / "classifier.safetensors",
    )
    facts = {"names": model.names, "width": model.width}
    (folder / "classifier.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def load_classifier(folder: Path, device: str) -> Classifier:
    """Read a classifier."""
    model = Classifier(**json.loads((folder / "classifier.json").read_text(encoding="utf-8")))
    model.load_state_dict(load_file(folder / "classifier.safetensors"))
    return model.to(device).eval()


def measure(classifier: Path, folders: list[Path], device: str) -> None:
    """Print how often the pictures of some folders show what was asked for."""
    model = load_classifier(classifier, device)
    for folder in folders:
        files = [file for file in sorted(folder.glob("*.png")) if file.with_suffix(".txt").exists()]
        if not files:
            raise SystemExit(f"error: no .png with a .txt beside it in {folder}")
        texts = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
        images = [np.asarray(Image.open(file).convert("RGB"), np.float32) for file in files]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
        wanted = torch.tensor([[*read_caption(text, model.names), STYLE in text] for text in texts])
        print(f"{folder}: {len(files)} pictures: {shown(shares_right(model, pixels, wanted))}")


def check(model: Classifier, glyphs: Glyphs, count: int) -> str:
    """Return how often the classifier is right about some new drawings of each kind."""
    parts = []
    digits = [name for name in glyphs.names if name.isdigit()]
    for kind, names, styled in (("all", glyphs.names, 0.3), ("digits", digits, 0.0)):
        facts = glyphs.sample(count, names, styled)
        right = shares_right(model, glyphs.paint(facts, held_out=True), answers(facts))
        parts.append(f"{kind}: {shown(right)}")
    return "; ".join(parts)


def main() -> None:
    """Train the classifier, or measure pictures with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    does = parser.add_subparsers(dest="does", required=True)
    measuring = does.add_parser("measure", help="say what pictures show")
    measuring.add_argument("classifier", type=Path)
    measuring.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    training = does.add_parser("train", help="train the classifier")
    training.add_argument("classifier", type=Path)
    training.add_argument("data", type=Path)
    training.add_argument("--minutes", type=float, default=1.6)
    training.add_argument("--steps", type=int, help="at most")
    training.add_argument("--pool", type=int, default=131_072, help="different pictures")
    training.add_argument("--batch", type=int, default=512, help="pictures of a step")
    training.add_argument("--width", type=int, default=48, help="channels of the first layer")
    training.add_argument("--new", type=int, default=1000, help="new drawings to measure it with")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.does == "measure":
        measure(args.classifier, args.folders, device)
        return
    torch.manual_seed(0)
    glyphs = Glyphs(args.data, device)
    schedule = Schedule(60 * args.minutes, args.steps, 2e-3, 100)
    model = train_classifier(glyphs, schedule, args.pool, args.batch, True, args.width)
    save_classifier(model, args.classifier)
    print(f"new drawings, {check(model, glyphs, args.new)}")


if __name__ == "__main__":
    main()
