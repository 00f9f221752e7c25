"""Reuse of the global context: the backbone at some evaluations, the Patch Detailer Head at all of them."""

from torch import Tensor

from ..errors import UserError
from ..flow import VelocityNetwork
from ..model import DiP
from ..replay import SolutionNetwork


class ReusingNetwork:
    """A network for one solution whose backbone is computed at every so-manyth evaluation.

    At the others the head has x_t and t as they are, and the tokens as the backbone left them. Where guidance begins or
    ends, the labels are others, and it is computed, too.

    Args:
        depth: blocks of the backbone.
    """

    def __init__(self, network: VelocityNetwork | SolutionNetwork, depth: int, every: int):
        self.network, self.depth, self.every = network, depth, every
        self.takes_one_time = getattr(network, "takes_one_time", False)
        self._y: Tensor | None = None
        self._tokens: Tensor | None = None
        self._evaluations = 0

    def __call__(self, x: Tensor, t: Tensor | float, y: Tensor) -> Tensor:
        """As the network."""
        if self._y is not y or self._evaluations == self.every:
            v, self._tokens = self.network(x, t, y, tokens_after=self.depth)
            self._y, self._evaluations = y, 1
        else:
            v = self.network(x, t, y, tokens=self._tokens)
            self._evaluations += 1
        return v


def check_reuse(every: int, model: DiP) -> int:
    """The number, unless it is out of range, or nothing is left to be computed between the model's evaluations of the
    backbone."""
    if every < 1:
        raise UserError(f"backbone_every {every}: give 1, to compute the backbone at every evaluation, or more")
    if every > 1 and not model.paints_last:
        raise UserError(
            f"backbone_every {every}: no Patch Detailer Head stands behind this model's last block, to paint while the "
            "backbone rests; leave it at 1"
        )
    return every
