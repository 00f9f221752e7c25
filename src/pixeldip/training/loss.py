"""What a step minimises: the objective's loss, and beside it the alignment with an image encoder if there is one."""

from torch import Tensor, nn

from ..flow import VelocityObjective, interpolate
from .alignment import Alignment


def training_loss(
    network: nn.Module,
    objective: VelocityObjective,
    alignment: Alignment | None,
    x: Tensor,
    y: Tensor,
    noise: Tensor,
    t: Tensor,
) -> dict[str, Tensor]:
    """The means over a batch of images x (B, C, H, W) with labels y, noise like x and times t (B,).

    Args:
        network: maps (x_t, t, y) to the velocity, with alignment to (velocity, projected tokens).

    Returns:
        "loss", which is to be minimised; with alignment also its parts "flow" and "alignment".
    """
    x_t = interpolate(x, noise, t)
    if alignment is None:
        return {"loss": objective.loss(network(x_t, t, y), x, noise, t).mean()}
    target = alignment.target(x)
    v, projected = network(x_t, t, y)
    flow = objective.loss(v, x, noise, t).mean()
    distance = alignment.loss(projected, target).mean()
    return {"loss": flow + alignment.section.weight * distance, "flow": flow, "alignment": distance}
