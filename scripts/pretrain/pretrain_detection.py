"""Train a small YOLOS from scratch to find digits, as a base that adapters are then tried on.

usage: python scripts/pretrain/pretrain_detection.py DATA TO SCENES [--minutes 4.4] [--batch 128]
       (to try it on a CPU: --steps 2 --batch 4 --pool 16 --test 4 --width 64 --layers 2)

DATA holds the folder mnist_test. TO gets a YolosForObjectDetection of 7 million parameters in
bfloat16, in shards of at most 15 MB, with its image processor: it finds the digits 0 to 4 in scenes
of 128 x 128 pixels, each with up to five digits in colours of their own on a background with lines.
It takes less than five minutes on an H100.

SCENES gets what the model has not seen, to adapt it to: scenes of the digits 5 to 9 in train,
validation and test, each a folder of pictures and their boxes as COCO's json; and known, a test
split of the digits 0 to 4, which shows what an adapted model has forgotten.

The loss is that of transformers, in which each box is matched with one answer of the model on the
CPU. All else of a step is recorded (`pretraining.py`): what each match would cost, which goes to
the CPU in one piece, then the step itself for the matches that come back. In pretraining each patch
learns besides what lies there, which takes a fraction of the time that answers alone would need.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from pretraining import Recorded, Schedule, Steps, computing_in, count_parameters, save
from scenes import MOST, SIZE, Painter, Scenes, coco_of, save_scenes
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import YolosConfig, YolosForObjectDetection

# B scenes of a batch, Q answers of the model to a scene, M boxes of a scene at most
KNOWN = range(5)  # the digits that the model learns
ANSWERS = 16  # that the model gives to a scene
NOTHING = 0.1  # weight of "no object" in the loss


def build_model(width: int, layers: int, patch: int) -> YolosForObjectDetection:
    """Return a YOLOS with random weights."""
    config = YolosConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        intermediate_size=4 * width, image_size=[SIZE, SIZE], patch_size=patch,
        num_detection_tokens=ANSWERS, eos_coefficient=NOTHING,
        id2label={i: str(name) for i, name in enumerate(KNOWN)},
        label2id={str(name): i for i, name in enumerate(KNOWN)},
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    embeddings = model.vit.embeddings
    # all zero, they would give every answer the same gradients
    nn.init.normal_(embeddings.detection_tokens, std=0.5)
    nn.init.normal_(embeddings.position_embeddings, std=0.1)
    return model


def corners(boxes: Tensor) -> Tensor:
    """Return boxes (..., 4), given as centre, width and height, as left, top, right and bottom."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def states_of(model: YolosForObjectDetection, pixels: Tensor) -> Tensor:
    """Return the last states (B, T, width) of pictures in 0..255: patches, then answers."""
    with computing_in(pixels.device.type):
        return model.vit(pixels.float() / 127.5 - 1).last_hidden_state[:, 1:].float()


def answers_of(model: YolosForObjectDetection, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores (B, Q, classes + 1) and the boxes (B, Q, 4) that states give.

    The model's own heads, in float32: in bfloat16 a box would be right to half a pixel only.
    """
    answers = states[:, -model.config.num_detection_tokens :]
    return model.class_labels_classifier(answers), model.bbox_predictor(answers).sigmoid()


def overlap(ones: Tensor, others: Tensor) -> Tensor:
    """Return the generalised intersection over union of boxes, given as corners (..., 4)."""
    area = _area(ones[..., 2:] - ones[..., :2]), _area(others[..., 2:] - others[..., :2])
    low, high = torch.maximum(ones, others), torch.minimum(ones, others)
    shared = _area((high[..., 2:] - low[..., :2]).clamp(min=0))
    whole = _area(low[..., 2:] - high[..., :2])
    union = sum(area) - shared
    return shared / union - (whole - union) / whole


def _area(sides: Tensor) -> Tensor:
    # the gradient of `prod` waits for the GPU, to count zeros
    return sides[..., 0] * sides[..., 1]


def costs(model: YolosForObjectDetection, pixels: Tensor, boxes: Tensor, digits: Tensor) -> Tensor:
    """Return what it costs to match each answer with each box (B, Q, M), as transformers does."""
    config = model.config
    with torch.no_grad():
        scores, found = answers_of(model, states_of(model, pixels))
        classes = digits.clamp(min=0)[:, None].expand(-1, scores.shape[1], -1)
        likely = scores.softmax(-1).gather(2, classes)
        apart = torch.cdist(found, boxes, p=1)
        near = overlap(corners(found)[:, :, None], corners(boxes)[:, None])
        found_cost = config.bbox_cost * apart - config.class_cost * likely - config.giou_cost * near
    return found_cost.nan_to_num(1e4, 1e4, -1e4)


def match(cost: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return the answer for each box (B, M); Q where there is no box."""
    table = cost.cpu().numpy()  # waits for the GPU
    result = np.full((len(table), MOST), cost.shape[1], dtype=np.int64)
    for i, number in enumerate(numbers):
        answer, box = linear_sum_assignment(table[i, :, :number])
        result[i, box] = answer
    return torch.from_numpy(result)


def loss_of(
    model: YolosForObjectDetection, states: Tensor, boxes: Tensor, digits: Tensor, matched: Tensor
) -> Tensor:
    """Return the loss of a batch, given its matches: that of transformers, in fixed shapes."""
    config, nothing = model.config, model.config.num_labels
    scores, found = answers_of(model, states)
    there = digits >= 0
    # one more answer, for boxes that are not there
    wanted = torch.full((len(scores), scores.shape[1] + 1), nothing, device=scores.device)
    wanted = wanted.scatter(1, matched, digits.where(there, nothing))[:, :-1]
    weight = torch.ones(nothing + 1, device=scores.device)
    weight[nothing:].fill_(config.eos_coefficient)
    classes = F.cross_entropy(scores.transpose(1, 2), wanted, weight)
    rows = matched.clamp(max=scores.shape[1] - 1)[..., None].expand(-1, -1, 4)
    own, number = found.gather(1, rows), there.sum().clamp(min=1)
    apart = ((own - boxes).abs().sum(-1) * there).sum() / number
    # a box of a whole scene stands where none is, so that nothing is divided by zero
    somewhere = torch.where(there[..., None], boxes, torch.full_like(boxes, 0.5))
    near = ((1 - overlap(corners(own), corners(somewhere))) * there).sum() / number
    return classes + config.bbox_loss_coefficient * apart + config.giou_loss_coefficient * near


def loss_of_patches(head: nn.Linear, states: Tensor, boxes: Tensor, digits: Tensor) -> Tensor:
    """Return how badly each patch says which digit lies there, and its box.

    Answers alone teach a transformer slowly: at first most are matched with a box by chance.

    Args:
        head: Scores of nothing and the digits, and a box, of a patch.
        states: Of the patches (B, P, width).
        boxes: (B, M, 4).
        digits: (B, M).
    """
    side = round(states.shape[1] ** 0.5)
    line = (torch.arange(side, device=states.device) + 0.5) / side
    places = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).view(1, -1, 1, 2)
    far = (places - boxes[:, None, :, :2]).abs() / boxes[:, None, :, 2:].clamp(min=1e-6)
    inside = (far.amax(-1) < 0.5) & (digits >= 0)[:, None]  # (B, P, M)
    covered, which = inside.any(-1), inside.byte().argmax(-1)
    scores, found = head(states).split([head.out_features - 4, 4], dim=-1)
    wanted = torch.where(covered, digits.gather(1, which) + 1, 0)
    own = boxes.gather(1, which[..., None].expand(-1, -1, 4))
    apart = ((found.sigmoid() - own).abs().sum(-1) * covered).sum() / covered.sum().clamp(min=1)
    return F.cross_entropy(scores.flatten(0, 1), wanted.flatten()) + 5 * apart


def train(
    model: YolosForObjectDetection, painter: Painter, args: argparse.Namespace, start: float
) -> None:
    """Train the model, and print its losses every now and then."""
    parts = [painter(min(1024, args.pool)) for _ in range(0, args.pool, 1024)]
    pixels, boxes, digits = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("pixels", "boxes", "digits")
    )
    numbers = (digits >= 0).sum(dim=1).cpu()
    print(f"{len(pixels):,} scenes, {time.monotonic() - start:.0f} s", flush=True)
    find_costs = Recorded(lambda *batch: costs(model, *batch), args.graphs)
    head = nn.Linear(args.width, len(KNOWN) + 5).to(pixels.device)  # thrown away after training

    def loss(scenes: Tensor, own_boxes: Tensor, own: Tensor, matched: Tensor) -> Tensor:
        states = states_of(model, scenes)
        of_patches = loss_of_patches(head, states[:, :-ANSWERS], own_boxes, own)
        return loss_of(model, states, own_boxes, own, matched) + args.patches * of_patches

    parameters = [*model.parameters(), *head.parameters()]
    steps = Steps(loss, parameters, decay=1e-4, betas=(0.9, 0.999), clip=1.0, record=args.graphs)
    schedule = Schedule(60 * args.minutes, args.steps, args.rate, args.warmup, start)
    total, since, last = torch.zeros((), device=pixels.device), 0, 0.0
    model.train()
    for step in range(10**9):
        rows = torch.randint(len(pixels), (args.batch,))
        there = rows.to(pixels.device)
        batch = pixels[there], boxes[there], digits[there]
        matched = match(find_costs(*batch), numbers[rows].tolist()).to(pixels.device)
        total += steps(schedule.rate(step), *batch, matched)
        since += 1
        share = schedule.share(step + 1)
        if share >= last + 0.05 or share == 1.0:
            last, mean, spent = share, float(total) / since, time.monotonic() - start
            print(f"{share:4.0%}  step {step + 1}  loss {mean:.3f}  {spent:.0f} s", flush=True)
            total, since = torch.zeros_like(total), 0
        if share == 1.0:
            return


@torch.no_grad()
def detect(model: YolosForObjectDetection, scenes: Scenes) -> list[dict[str, Any]]:
    """Return what the model finds, in the form of COCO's results."""
    model.eval()
    found = []
    for start in range(0, len(scenes.pixels), 256):
        states = states_of(model, scenes.pixels[start : start + 256])
        scores, boxes = answers_of(model, states)
        likely, classes = scores.softmax(-1)[..., :-1].max(-1)
        edges = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., 2:]], -1) * SIZE
        rows = zip(edges.tolist(), likely.tolist(), classes.tolist(), strict=True)
        for i, row in enumerate(rows, start):
            found += [
                {"image_id": i, "bbox": box, "score": score, "category_id": label + 1}
                for box, score, label in zip(*row, strict=True)
            ]
    return found


def precision(truth: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """Return the mean average precision as it is printed."""
    try:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as Evaluation
    except ImportError:
        try:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval as Evaluation
        except ImportError:
            return "mAP is not measured: neither faster-coco-eval nor pycocotools is installed"
    with contextlib.redirect_stdout(io.StringIO()):  # they print tables
        known = COCO()
        known.dataset = truth
        known.createIndex()
        measured = Evaluation(known, known.loadRes(found), "bbox")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return f"mAP {measured.stats[0]:.3f}, at an overlap of 0.5 {measured.stats[1]:.3f}"


def save_processor(folder: Path) -> None:
    """Write the settings of the image processor."""
    settings = {
        "image_processor_type": "YolosImageProcessor", "format": "coco_detection",
        "do_resize": True, "size": {"height": SIZE, "width": SIZE}, "do_pad": False,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    text = json.dumps(settings, indent=2)
    (folder / "preprocessor_config.json").write_text(f"{text}\n", encoding="utf-8")


def write_sets(data: Path, folder: Path, count: int) -> None:
    """Write the scenes of other digits; they are painted on the CPU, equal on every machine."""
    torch.manual_seed(1)
    others = {flag: Painter(data, range(5, 10), flag, "cpu") for flag in (False, True)}
    save_scenes(folder, "train", others[False](count))
    save_scenes(folder, "validation", others[True](count // 2))
    save_scenes(folder, "test", others[True](count))
    save_scenes(folder, "known", Painter(data, KNOWN, True, "cpu")(count))


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data", "to", "scenes"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--minutes", type=float, default=4.4, help="until training ends")
    parser.add_argument("--steps", type=int, help="at most")
    parser.add_argument("--batch", type=int, default=128, help="scenes of a step")
    parser.add_argument("--pool", type=int, default=65_536, help="different scenes")
    parser.add_argument("--rate", type=float, default=5e-4, help="the highest learning rate")
    parser.add_argument("--warmup", type=int, default=500, help="steps")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--patch", type=int, default=8, help="pixels")
    parser.add_argument("--patches", type=float, default=1.0, help="weight of their loss")
    parser.add_argument("--test", type=int, default=1000, help="scenes to measure the model with")
    parser.add_argument("--count", type=int, default=400, help="scenes of a split in SCENES")
    parser.add_argument("--only-scenes", action="store_true", help="write SCENES and stop")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Write the scenes to adapt to, train the model, save it, and measure it on new drawings."""
    start, args = time.monotonic(), parse_arguments()
    write_sets(args.data, args.scenes, args.count)
    if args.only_scenes:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    model = build_model(args.width, args.layers, args.patch).to(device)
    print(f"{count_parameters(model):,} parameters, on {device}", flush=True)
    train(model, Painter(args.data, KNOWN, False, device), args, start)
    model = save(model, args.to).float()  # with the numbers that are saved
    save_processor(args.to)
    scenes = Painter(args.data, KNOWN, True, device)(args.test)
    print(f"on new drawings: {precision(coco_of(scenes), detect(model, scenes))}")
    print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
