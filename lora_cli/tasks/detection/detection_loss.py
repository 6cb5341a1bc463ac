"""The loss of DETR (Carion et al. 2020, https://arxiv.org/abs/2005.12872), summed by picture.

A model gives a fixed number of queries, each a box and the probabilities of the labels and of "no
object". The objects of a picture are assigned to queries one to one, so that the sum of their costs
is the least. Three terms follow:

    class   - sum over all queries of w · log p(label of the query's object, or "no object"),
            w being 1, and `eos_coefficient` for "no object"; divided by the sum of w
    boxes   sum over objects of |box - box of its query|, over (cx, cy, w, h); by the objects
    giou    sum over objects of 1 - GIoU(box, box of its query); divided by the objects

Transformers divides by the items of a batch; here the sums stay, so that a step can be cut at will.

# L layers whose outputs are compared, B pictures, Q queries, N objects of the largest picture,
# C labels. Boxes are (cx, cy, w, h) in shares of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor

CLASS, BOXES, GIOU = "class", "boxes", "giou"
WORST = torch.finfo(torch.float32).max  # the cost of what is NaN: it is assigned last


@dataclass(frozen=True)
class Detections:
    """What a model says of pictures.

    Args:
        logits: Of the labels and "no object" (L, B, Q, C + 1); the last layer's come last.
        boxes: (L, B, Q, 4).
    """

    logits: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Costs:
    """What the parts of an assignment's cost weigh, and "no object" in the loss."""

    label: float = 1.0
    box: float = 5.0
    giou: float = 2.0
    no_object: float = 0.1


def detection_losses(
    said: Detections, labels: Tensor, boxes: Tensor, counts: Sequence[int], costs: Costs
) -> dict[str, Tensor]:
    """Return the three sums for each picture (B,), over all layers.

    Args:
        said: What the model says.
        labels: Of the objects (B, N); what fills a row is any label.
        boxes: Of the objects (B, N, 4); what fills a row is any box that is not empty.
        counts: How many objects each picture has; on the host.
        costs: The weights.
    """
    logits, found = said.logits.float(), said.boxes.float()
    n_layers, n_pictures, n_queries = logits.shape[:3]
    no_object = logits.shape[-1] - 1
    queries = assign(Detections(logits, found), labels, boxes, counts, costs)
    device = logits.device
    # of each query, which object it is for; the last place stands for none
    objects = torch.full((n_layers, n_pictures, n_queries + 1), labels.shape[1])
    numbers = torch.arange(labels.shape[1]).expand_as(queries)
    objects.scatter_(-1, queries.where(queries >= 0, n_queries), numbers)
    objects = _moved(objects[..., :-1], device)
    is_object = _moved((queries >= 0).float(), device)
    queries = _moved(queries.clamp(min=0), device)

    none = labels.new_full((n_pictures, 1), no_object)
    wanted = torch.cat([labels, none], 1).expand(n_layers, -1, -1).gather(-1, objects)
    weights = logits.new_full((), 1.0).where(wanted != no_object, costs.no_object)
    nll = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none")
    by_class = (nll.view_as(wanted) * weights).sum((0, 2))

    assigned = found.gather(2, queries.unsqueeze(-1).expand(-1, -1, -1, 4))
    apart = (assigned - boxes).abs().sum(-1)
    overlap = generalized_iou(corners(assigned), corners(boxes))
    return {
        CLASS: by_class,
        BOXES: (apart * is_object).sum((0, 2)),
        GIOU: ((1 - overlap) * is_object).sum((0, 2)),
    }


@torch.no_grad()
def assign(
    said: Detections, labels: Tensor, boxes: Tensor, counts: Sequence[int], costs: Costs
) -> Tensor:
    """Return the query of each object (L, B, N) on the host; -1 where there is none.

    The costs of all pictures are copied to the host at once, which waits for the device.
    """
    from scipy.optimize import linear_sum_assignment

    probabilities = said.logits.softmax(-1)
    n_layers, _, n_queries = probabilities.shape[:3]
    of_label = probabilities.gather(-1, labels[None, :, None].expand(n_layers, -1, n_queries, -1))
    found, wanted = said.boxes.unsqueeze(3), boxes[None, :, None]
    apart = (found - wanted).abs().sum(-1)
    overlap = generalized_iou(corners(found), corners(wanted))
    cost = costs.box * apart - costs.label * of_label - costs.giou * overlap
    cost = cost.nan_to_num(WORST, WORST, WORST).cpu()  # (L, B, Q, N)
    queries = torch.full((n_layers, *labels.shape), -1)
    for layer, of_layer in enumerate(cost):
        for i, (matrix, count) in enumerate(zip(of_layer, counts, strict=True)):
            rows, columns = linear_sum_assignment(matrix[:, :count].numpy())
            queries[layer, i, torch.from_numpy(columns)] = torch.from_numpy(rows)
    return queries


def corners(boxes: Tensor) -> Tensor:
    """Return boxes (…, 4) by their corners (x0, y0, x1, y1), of (cx, cy, w, h)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], -1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalized intersection over union of boxes by their corners, from -1 to 1.

    Rezatofighi et al. 2019, https://arxiv.org/abs/1902.09630
    """
    area_a, area_b = ((c[..., 2] - c[..., 0]) * (c[..., 3] - c[..., 1]) for c in (a, b))
    inner = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0)
    outer = torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])
    # not `prod`, whose gradient waits for the device
    shared, hull = inner[..., 0] * inner[..., 1], outer[..., 0] * outer[..., 1]
    union = area_a + area_b - shared
    return shared / union - (hull - union) / hull


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on the device, without waiting for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
