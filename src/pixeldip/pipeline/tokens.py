"""Evaluations of the network in which the head works again with tokens that the backbone left."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError
from ..model import DiP
from ..replay import SolutionNetwork


class TokenKeepingNetwork:
    """A network for one solution, at one time t that all images share, that keeps the backbone's tokens and lets the
    head work with them again: where the backbone rests, and in float32 at the end.

    The backbone is computed at one evaluation in `every`, and where guidance begins or ends, since the labels are
    others there. At the rest the head has x_t and t as they are.

    Where the model predicts the image, the last step leads to the predicted one, and bf16's rounding of it would be in
    every pixel, too little to be seen and enough to be measured (benchmarks/LOG.md). So there the head computes in
    float32.

    Args:
        model: whose network it is.
        network: the model itself, or what computes it for these times.
        times: that the solution goes through.
        every: evaluations from one that computes the backbone to the next.
    """

    takes_one_time = True

    def __init__(self, model: DiP, network: DiP | SolutionNetwork, times: Sequence[float], every: int):
        self.model, self.network, self.every = model, network, every
        self._last = times[-2]
        self._y: Tensor | None = None
        self._tokens: Tensor | None = None
        self._evaluations = 0

    def __call__(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        """As `DiP.forward`, x (B, C, H, W) and y (B,) or (G, B), at time t."""
        asked = t if getattr(self.network, "takes_one_time", False) else x.new_full((len(x),), t)
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
            head, times = self.model.head_in_float32(), x.new_full((len(x),), t)
            with torch.autocast(x.device.type, enabled=False):
                v = self.model(x, times, y, tokens=self._tokens, head=head)
        return v


def rounds_its_image(model: DiP, device: torch.device) -> bool:
    """Whether the model predicts the image in less than float32, and its head may be copied to do it in float32."""
    rounds = model.dtype.itemsize < torch.float32.itemsize or torch.is_autocast_enabled(device.type)
    return rounds and model.objective.ends_in_output and model.head_is_plain


def check_reuse(every: int, model: DiP) -> int:
    """`every`, if the model can be sampled with its backbone at one evaluation in so many.

    Raises:
        UserError: if it is below 1, or above and the model leaves nothing to be computed in between.
    """
    if every < 1:
        raise UserError(f"backbone_every {every}: give 1, to compute the backbone at every evaluation, or more")
    if every > 1 and not model.paints_last:
        raise UserError(
            f"backbone_every {every}: no Patch Detailer Head stands behind this model's last block, to paint while the "
            "backbone rests; give 1"
        )
    return every
