"""A network for a solver whose times are known: what can be is computed ahead, and a CUDA device replays the rest.

At batch 1 a GPU computes a step sooner than Python asks for its kernels; a CUDA graph is asked for once. And the
modulation layers, a third of the weights that such a step reads, depend on nothing but time and class.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .model import DiP
from .model.heads.unet import UNetHead

Evaluation = Callable[[Tensor, float, Tensor, Tensor | None], Tensor]

MOST_AHEAD = 2**29
"""Bytes of modulation computed ahead of a solution; where it takes more, images are many, the layers' share small."""
WARM_UP = 2


class ReplayedNetwork:
    """The velocity network (x, t, y) -> v of a model, for one time t that all images share.

    Of a CUDA device's work a graph is recorded for each shape of x and y. A solution that begins with `begin` is of
    the weights as they are then.
    """

    takes_one_time = True

    def __init__(self, model: DiP):
        self.model = model
        self._weights: list[tuple[int, int]] = []
        self._evaluations: dict[tuple, Evaluation] = {}
        self._times: list[float] = []
        self._ahead: dict[tuple[int, ...], tuple[Tensor, dict[float, Tensor]]] = {}

    def begin(self, times: Sequence[float]) -> None:
        """Before a solution that asks for the velocity at these times."""
        weights = [(p.data_ptr(), p._version) for p in self.model.parameters()]
        if weights != self._weights:
            self._evaluations.clear()
        self._weights, self._times = weights, list(dict.fromkeys(times))
        self._ahead.clear()

    @torch.no_grad()
    def __call__(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        """x (B, C, H, W) and y (B,) or (G, B), as `DiP.forward` takes them, at time t."""
        modulations = self._modulations(t, y)
        device = x.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = x.shape, x.dtype, y.shape, modulations is None, cast
        if key not in self._evaluations:
            record = _recorded if device == "cuda" else _plain
            self._evaluations[key] = record(self.model, x, y, modulations, cast)
        return self._evaluations[key](x, t, y, modulations)

    def _modulations(self, t: float, y: Tensor) -> Tensor | None:
        """(depth, G B, 6 D) at t; None where all times' would take too much memory, or t was not told of."""
        blocks = self.model.backbone.blocks
        width = 6 * self.model.config.hidden_size
        size = len(self._times) * len(blocks) * y.numel() * width * self.model.dtype.itemsize
        if size > MOST_AHEAD or t not in self._times:
            return None
        labels, _ = self._ahead.get(y.shape, (None, {}))
        if labels is not y:
            times = torch.tensor(self._times, device=y.device)
            table = self.model.modulations(times, y if y.dim() == 2 else y[None])
            self._ahead[y.shape] = y, dict(zip(self._times, table))
        return self._ahead[y.shape][1][t]


def _plain(model: DiP, x: Tensor, y: Tensor, modulations: Tensor | None, cast: torch.dtype | None) -> Evaluation:
    def evaluation(x: Tensor, t: float, y: Tensor, modulations: Tensor | None) -> Tensor:
        return model(x, x.new_full((len(x),), t), y, modulations=modulations)

    return evaluation


def _recorded(model: DiP, x: Tensor, y: Tensor, modulations: Tensor | None, cast: torch.dtype | None) -> Evaluation:
    """The same, from a CUDA graph that reads and writes tensors of its own."""
    given: dict[str, Any] = {"x": x.clone(), "t": x.new_zeros(len(x)), "y": y.clone()}
    if modulations is not None:
        given["modulations"] = modulations.clone()

    def run() -> Tensor:
        # weights that autocast has cast must not be kept beyond the graph
        with torch.autocast("cuda", cast, enabled=cast is not None, cache_enabled=False):
            return model(**given)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and lets libraries take what they keep, before the recording
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        v = run()
    read = [dict(module.kept_kernels) for module in model.modules() if isinstance(module, UNetHead)]

    def evaluation(x: Tensor, t: float, y: Tensor, modulations: Tensor | None, keep_alive: Any = read) -> Tensor:
        given["x"].copy_(x)
        given["t"].fill_(t)
        given["y"].copy_(y)
        if modulations is not None:
            given["modulations"].copy_(modulations)
        graph.replay()
        return v.clone()

    return evaluation
