"""What a solution does with the tokens of the backbone beyond one evaluation: the head, a small part of the network,
works with them again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError
from ..flow import VelocityNetwork
from ..model import DiP
from ..replay import SolutionNetwork


class TokenKeepingNetwork:
    """A network for one solution that keeps the tokens of its backbone, at one time t that all images share.

    The backbone is computed at every so-manyth evaluation, and where guidance begins or ends, since the labels are
    others there. At the rest the head has x_t and t as they are, and the tokens as the backbone left them.

    The velocity of the last step leads to the image that a model predicts, if that is what it predicts; in bf16 its
    rounding would be seen in the image, by measures of distance before all (benchmarks/LOG.md). So the head computes it
    in float32.

    Args:
        network: the model, or what computes it.
        times: that the solution goes through.
    """

    takes_one_time = True

    def __init__(self, model: DiP, network: VelocityNetwork | SolutionNetwork, times: Sequence[float], every: int):
        self.model, self.network, self.every = model, network, every
        self._last = times[-2]
        self._y: Tensor | None = None
        self._tokens: Tensor | None = None
        self._evaluations = 0

    def __call__(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        """As `DiP.forward`, x (B, C, H, W) and y (B,) or (G, B), at time t."""
        times = x.new_full((len(x),), t)
        asked = t if getattr(self.network, "takes_one_time", False) else times
        exact = t == self._last and rounds_its_image(self.model, x.device)
        if self.every == 1 and not exact:
            return self.network(x, asked, y)
        if self._y is not y or self._evaluations == self.every:
            v, self._tokens = self.network(x, asked, y, tokens_after=self.model.config.depth)
            self._y, self._evaluations = y, 0
        elif not exact:
            v = self.network(x, asked, y, tokens=self._tokens)
        self._evaluations += 1
        if exact:
            with torch.autocast(x.device.type, enabled=False):
                v = self.model(x, times, y, tokens=self._tokens, head=self.model.head_in_float32())
        return v


def rounds_its_image(model: DiP, device: torch.device) -> bool:
    """Whether the model predicts the image, and its head, in less than float32, can be computed in float32, too."""
    lower = model.dtype != torch.float32 or torch.is_autocast_enabled(device.type)
    return lower and model.objective.ends_in_output and model.head_is_plain


def check_reuse(every: int, model: DiP) -> int:
    """The number of evaluations from one that computes the backbone to the next.

    Raises:
        UserError: if it is out of range, or the model leaves nothing to be computed in between.
    """
    if every < 1:
        raise UserError(f"backbone_every {every}: give 1, to compute the backbone at every evaluation, or more")
    if every > 1 and not model.paints_last:
        raise UserError(
            f"backbone_every {every}: no Patch Detailer Head stands behind this model's last block, to paint while the "
            "backbone rests; leave it at 1"
        )
    return every
