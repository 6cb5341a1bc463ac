"""The loss of DETR (Carion et al. 2020, https://arxiv.org/abs/2005.12872), as a sum per image.

A model outputs a fixed number of queries: each is a box, and probabilities of the labels and of "no
object". The objects of an image are matched one-to-one to queries so that the total cost is
minimal (Hungarian matching). The loss has three terms:

    class   - sum over all queries of w · log p(label of the matched object, or "no object"),
            where w is 1, or `eos_coefficient` for "no object"; divided by the sum of w
    boxes   sum over objects of |box - box of its query|, over (cx, cy, w, h); divided by the number
            of objects
    giou    sum over objects of 1 - GIoU(box, box of its query); divided by the number of objects

Transformers divides by the counts of a batch. Here the sums are returned undivided, so that a
training step can be split into batches of any size.

# L layers with a loss, B images, Q queries, N objects (the maximum per image), C labels.
# Boxes are (cx, cy, w, h) relative to the image's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor

CLASS, BOXES, GIOU = "class", "boxes", "giou"
MAX_COST = torch.finfo(torch.float32).max  # replaces NaN, so that such queries are matched last


@dataclass(frozen=True)
class Detections:
    """A model's outputs for a batch of images.

    Args:
        logits: Logits of the labels and of "no object" (L, B, Q, C + 1), final layer last.
        boxes: The predicted boxes (L, B, Q, 4).
    """

    logits: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class MatchingCosts:
    """The weights of the matching cost's terms, and that of "no object" in the loss."""

    label: float = 1.0
    box: float = 5.0
    giou: float = 2.0
    no_object: float = 0.1


def detection_losses(
    outputs: Detections, labels: Tensor, boxes: Tensor, counts: Sequence[int], costs: MatchingCosts
) -> dict[str, Tensor]:
    """Return the three loss terms for each image (B,), summed over all layers.

    Args:
        outputs: The model's outputs.
        labels: The objects' labels (B, N), padded with any label.
        boxes: The objects' boxes (B, N, 4), padded with any box that is not empty.
        counts: The number of objects of each image, on the host.
        costs: The weights of the matching cost and of "no object".
    """
    logits, predicted_boxes = outputs.logits.float(), outputs.boxes.float()
    n_layers, n_images, n_queries = logits.shape[:3]
    no_object = logits.shape[-1] - 1
    queries = assign(Detections(logits, predicted_boxes), labels, boxes, counts, costs)
    device = logits.device
    # the object that each query is matched to; objects without a query write to an extra column
    objects = torch.full((n_layers, n_images, n_queries + 1), labels.shape[1])
    object_indices = torch.arange(labels.shape[1]).expand_as(queries)
    objects.scatter_(-1, queries.where(queries >= 0, n_queries), object_indices)
    objects = _to_device(objects[..., :-1], device)
    is_matched = _to_device((queries >= 0).float(), device)
    queries = _to_device(queries.clamp(min=0), device)

    no_object_column = labels.new_full((n_images, 1), no_object)
    target_classes = (
        torch.cat([labels, no_object_column], 1).expand(n_layers, -1, -1).gather(-1, objects)
    )
    weights = logits.new_full((), 1.0).where(target_classes != no_object, costs.no_object)
    nll = F.cross_entropy(logits.flatten(0, 2), target_classes.flatten(), reduction="none")
    class_losses = (nll.view_as(target_classes) * weights).sum((0, 2))

    matched_boxes = predicted_boxes.gather(2, queries.unsqueeze(-1).expand(-1, -1, -1, 4))
    l1_distances = (matched_boxes - boxes).abs().sum(-1)
    overlaps = generalized_iou(corners(matched_boxes), corners(boxes))
    return {
        CLASS: class_losses,
        BOXES: (l1_distances * is_matched).sum((0, 2)),
        GIOU: ((1 - overlaps) * is_matched).sum((0, 2)),
    }


@torch.no_grad()
def assign(
    outputs: Detections, labels: Tensor, boxes: Tensor, counts: Sequence[int], costs: MatchingCosts
) -> Tensor:
    """Return the query that each object is matched to (L, B, N), on the host; -1 for none.

    The costs of all images are copied to the host at once, which synchronises with the device.
    """
    from scipy.optimize import linear_sum_assignment

    probabilities = outputs.logits.softmax(-1)
    n_layers, _, n_queries = probabilities.shape[:3]
    label_probabilities = probabilities.gather(
        -1, labels[None, :, None].expand(n_layers, -1, n_queries, -1)
    )
    predicted, targets = outputs.boxes.unsqueeze(3), boxes[None, :, None]
    l1_distances = (predicted - targets).abs().sum(-1)
    overlaps = generalized_iou(corners(predicted), corners(targets))
    cost = costs.box * l1_distances - costs.label * label_probabilities - costs.giou * overlaps
    cost = cost.nan_to_num(MAX_COST, MAX_COST, MAX_COST).cpu()  # (L, B, Q, N)
    queries = torch.full((n_layers, *labels.shape), -1)
    for layer, layer_costs in enumerate(cost):
        for i, (matrix, count) in enumerate(zip(layer_costs, counts, strict=True)):
            rows, columns = linear_sum_assignment(matrix[:, :count].numpy())
            queries[layer, i, torch.from_numpy(columns)] = torch.from_numpy(rows)
    return queries


def corners(boxes: Tensor) -> Tensor:
    """Convert boxes (…, 4) from (cx, cy, w, h) to corners (x0, y0, x1, y1)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], -1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalized intersection over union of boxes given as corners, -1 to 1.

    Source: Rezatofighi et al. 2019, https://arxiv.org/abs/1902.09630
    """
    area_a, area_b = ((c[..., 2] - c[..., 0]) * (c[..., 3] - c[..., 1]) for c in (a, b))
    inner = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0)
    outer = torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])
    # not `prod`, whose backward pass synchronises with the device
    shared, hull = inner[..., 0] * inner[..., 1], outer[..., 0] * outer[..., 1]
    union = area_a + area_b - shared
    return shared / union - (hull - union) / hull


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device without synchronising."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
