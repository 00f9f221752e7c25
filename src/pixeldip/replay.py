"""The network for a solver whose times are known: modulations are computed ahead, and a CUDA device replays the rest.

The modulation layers, a third of the weights that a step of one image reads, depend on time and class alone. And at
batch 1 a GPU finishes kernels sooner than Python can launch them; a CUDA graph of them is launched once.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .model import DiP
from .model.heads.unet import UNetHead

MOST_AHEAD = 2**29
"""Bytes of modulation that a solution may keep. With so many images that it takes more, the layers' share is small."""
MOST_RECORDED = 2**20
"""Pixels of a batch up to which graphs are recorded; above, the CPU is ahead without them (benchmarks/LOG.md)."""
WARM_UP = 2

Output = Tensor | tuple[Tensor, Tensor]
"""What `DiP.forward` returns: with `tokens_after` also tokens."""
Given = Mapping[str, Tensor]
"""What it may be given beside x, t and y, by its name there: modulations or tokens."""
_RECORDING = threading.Lock()
"""Held by whoever records a graph, one at a time in a process as CUDA wants it, or forgets kernels that it may read."""


class ReplayedNetwork:
    """A model's network for solutions one after another, or in several threads at once.

    Args:
        graphs: on a CUDA device, record a graph for each shape of x and y, up to `MOST_RECORDED`.
    """

    def __init__(self, model: DiP, graphs: bool = True):
        self.model, self.graphs = model, graphs
        self._weights: list[tuple[int, int]] = []
        self._recorder: _Recorder | None = None

    def begin(self, times: Sequence[float]) -> "SolutionNetwork":
        """The network for a solution that evaluates it at these times, with the weights as they are now."""
        weights = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.model.parameters()]
        if weights != self._weights:
            self._recorder = None
        self._weights = weights
        return SolutionNetwork(self, times)

    def evaluate(self, x: Tensor, t: float, y: Tensor, tokens_after: int | None, given: Given) -> Output:
        """As `DiP.forward`, at one time t for all images; from a graph where that is worth it."""
        if not self.graphs or not recordable(x):
            return self.model(x, x.new_full((len(x),), t), y, tokens_after, **given)
        with _RECORDING:
            recorder = self._recorder = self._recorder or _Recorder(self.model, x.device)
        return recorder(x, t, y, tokens_after, given)


class SolutionNetwork:
    """The velocity network (x, t, y) -> v of a model for one solution, for one time t that all images share. It holds
    what this solution alone needs."""

    takes_one_time = True

    def __init__(self, replayed: ReplayedNetwork, times: Sequence[float]):
        self.model, self._replayed = replayed.model, replayed
        self._times = list(dict.fromkeys(times))
        self._ahead: _Ahead | None = None

    def computes_ahead(self, y: Tensor) -> bool:
        """Whether there is room for the modulation of labels y at all times."""
        config, dtype = self.model.config, self.model.backbone.blocks[0].modulation.weight.dtype
        values = len(self._times) * config.depth * y.numel() * 6 * config.hidden_size
        return values * dtype.itemsize <= MOST_AHEAD

    @torch.no_grad()
    def __call__(
        self, x: Tensor, t: float, y: Tensor, tokens_after: int | None = None, tokens: Tensor | None = None
    ) -> Output:
        """As `DiP.forward`, x (B, C, H, W) and y (B,) or (G, B), at time t."""
        modulations = self._modulations(t, y) if tokens is None else None
        given = {"modulations": modulations, "tokens": tokens}
        given = {name: value for name, value in given.items() if value is not None}
        return self._replayed.evaluate(x, t, y, tokens_after, given)

    def _modulations(self, t: float, y: Tensor) -> Tensor | None:
        """(depth, G B, 6 D) at t; None where there is no room for all times', or `begin` was not given t."""
        if t not in self._times:
            return None
        if self._ahead is None or self._ahead.y is not y:  # guidance begins or ends
            self._ahead = None
            if not self.computes_ahead(y):
                return None
            times = torch.tensor(self._times, device=y.device)
            table = self.model.modulations(times, y if y.dim() == 2 else y[None])
            self._ahead = _Ahead(y, dict(zip(self._times, table)))
        return self._ahead.at[t]


class _Ahead(NamedTuple):
    """The modulation (depth, G B, 6 D) of labels y at each time of a solution."""

    y: Tensor
    at: dict[float, Tensor]


def forget_kernels(model: DiP) -> None:
    """As the model's own method, but not while a graph is recorded."""
    with _RECORDING:
        model.forget_kernels()


def recordable(x: Tensor) -> bool:
    """Whether an evaluation of images x (B, C, H, W) is worth a graph."""
    return x.device.type == "cuda" and x.shape[0] * x.shape[-2:].numel() <= MOST_RECORDED


class _Recorder:
    """The graphs of a model's evaluations on a CUDA device. They work in the same memory, one at a time, whatever
    thread asks."""

    def __init__(self, model: DiP, device: torch.device):
        self.model, self.device = model, device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.recorded: dict[tuple, _Recording] = {}
        self.lock = threading.Lock()

    def __call__(self, x: Tensor, t: float, y: Tensor, tokens_after: int | None, given: Given) -> Output:
        cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = x.shape, x.dtype, y.shape, tokens_after, *given, cast, torch.is_inference_mode_enabled()
        with self.lock, torch.cuda.device(self.device):
            if key not in self.recorded:
                with _RECORDING:
                    self.recorded[key] = _Recording(self, x, y, tokens_after, given, cast)
            return self.recorded[key].replay(x, t, y, given)


class _Recording:
    """An evaluation of one shape as a CUDA graph, which reads and writes tensors of its own."""

    def __init__(
        self,
        recorder: _Recorder,
        x: Tensor,
        y: Tensor,
        tokens_after: int | None,
        given: Given,
        cast: torch.dtype | None,
    ):
        self.x, self.t, self.y = x.clone(), x.new_zeros(len(x)), y.clone()
        self.given = {name: value.clone() for name, value in given.items()}
        model, stream = recorder.model, recorder.stream

        def evaluate() -> Output:
            # what autocast makes of weights must not be kept from one evaluation to the next
            with torch.autocast("cuda", cast, enabled=cast is not None, cache_enabled=False):
                return model(self.x, self.t, self.y, tokens_after, **self.given)

        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and libraries set up what they keep
            for _ in range(WARM_UP):
                evaluate()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=recorder.pool, stream=stream, capture_error_mode="thread_local"):
            self.out = evaluate()
        # the graph reads these, but the head may drop them
        self.kernels = [dict(head.kept_kernels) for head in model.modules() if isinstance(head, UNetHead)]

    def replay(self, x: Tensor, t: float, y: Tensor, given: Given) -> Output:
        """What the evaluation returns, copied: the next graph may write to the same memory."""
        self.x.copy_(x)
        self.t.fill_(t)
        self.y.copy_(y)
        for name, value in given.items():
            self.given[name].copy_(value)
        self.graph.replay()
        return tuple(part.clone() for part in self.out) if isinstance(self.out, tuple) else self.out.clone()
