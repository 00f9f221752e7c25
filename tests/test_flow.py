"""The path, its times, solvers and guidance, on numbers and closed forms."""

import math

import pytest
import torch
from torch import Tensor

from pixeldip import UserError
from pixeldip.flow import (
    SOLVERS,
    clean_image,
    drop_classes,
    evaluations,
    guided_velocity,
    interpolate,
    logit_normal_times,
    seeded_normal,
    shift_times,
    time_grid,
    velocity,
    velocity_loss,
)

MEAN, STD = 0.7, 0.4


def gaussian_velocity(x: Tensor, t: float, _: float) -> Tensor:
    """The exact velocity when the data are N(MEAN, STD^2): x_t = t MEAN + s_t z for a fixed z."""
    variance = (t * STD) ** 2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def error(solver: str, steps: int, shift: float = 1.0) -> float:
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    return (SOLVERS[solver](gaussian_velocity, z, time_grid(steps, shift)) - (MEAN + STD * z)).abs().max().item()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_convergence_order(solver: str, order: int, shift: float) -> None:
    measured = math.log2(error(solver, 160, shift) / error(solver, 320, shift))
    assert abs(measured - order) < 0.15


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted_right(solver: str) -> None:
    calls = []
    SOLVERS[solver](lambda x, t, s: calls.append((t, s)) or 0 * x, torch.zeros(1), time_grid(7))
    assert len(calls) == evaluations(solver, 7)
    assert all(start <= t < 1 for t, start in calls)


def test_the_path_ends_in_noise_and_data() -> None:
    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(interpolate(x, noise, torch.zeros(2)), noise)
    assert torch.equal(interpolate(x, noise, torch.ones(2)), x)
    t = torch.tensor([0.2, 0.7])
    torch.testing.assert_close(clean_image(interpolate(x, noise, t), velocity(x, noise), t), x)


def test_the_loss_is_the_mean_square_per_image() -> None:
    x, noise = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    seen = {}

    def network(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.update(x_t=x_t, t=t, y=y)
        return torch.stack([torch.full((1, 2, 2), 3.0), torch.ones(1, 2, 2)])

    t = torch.tensor([0.25, 0.5])
    loss = velocity_loss(network, x, torch.tensor([7, 8]), noise, t)
    assert loss.tolist() == [4.0, 0.0]
    assert seen["x_t"].flatten(1)[:, 0].tolist() == [0.25, 0.5] and seen["y"].tolist() == [7, 8]


def test_logit_normal_quantiles() -> None:
    u = torch.tensor([0.5, 0.8413447, 0.1586553])
    torch.testing.assert_close(logit_normal_times(u), torch.sigmoid(torch.tensor([0.0, 1.0, -1.0])), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        logit_normal_times(u, 0.5, 2.0), torch.sigmoid(torch.tensor([0.5, 2.5, -1.5])), atol=1e-5, rtol=0
    )
    assert logit_normal_times(torch.tensor([0.0, 1.0])).isfinite().all()


def test_shift() -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(shift_times(t, 3.0), torch.tensor([0.0, 0.25, 1.0]))
    assert time_grid(4) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_class_dropout() -> None:
    y = drop_classes(torch.tensor([1, 2, 3]), torch.tensor([0.05, 0.1, 0.9]), 0.1, null_class=9)
    assert y.tolist() == [9, 2, 3]


class Recorder:
    """v = y, and the batches it was called with."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.batches.append(y.tolist())
        return y.view(-1, 1, 1, 1).to(x.dtype).expand_as(x)


def test_guidance_is_evaluated_only_inside_its_interval() -> None:
    network, x = Recorder(), torch.zeros(2, 1, 1, 1)
    v = guided_velocity(network, torch.tensor([1, 2]), null_class=5, scale=3.0, interval=(0.2, 0.8))
    assert v(x, 0.2, 0.2).flatten().tolist() == [1.0, 2.0]
    assert v(x, 0.5, 0.5).flatten().tolist() == [5 + 3 * (1 - 5), 5 + 3 * (2 - 5)]
    v(x, 0.8, 0.8)
    v(x, 0.8, 0.79)  # the second evaluation of a step that started inside
    assert network.batches == [[1, 2], [1, 2, 5, 5], [1, 2], [1, 2, 5, 5]]


def test_guidance_of_one_is_free_and_the_whole_interval_holds_its_start() -> None:
    network, x = Recorder(), torch.zeros(1, 1, 1, 1)
    guided_velocity(network, torch.tensor([1]), 5, scale=1.0)(x, 0.5, 0.5)
    guided_velocity(network, torch.tensor([1]), 5, scale=2.0)(x, 0.0, 0.0)
    assert network.batches == [[1], [1, 5]]


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 1.0), (0.0, 1.5)])
def test_an_impossible_interval(interval: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="guidance interval"):
        guided_velocity(Recorder(), torch.tensor([1]), 5, 2.0, interval)


def test_a_seed_is_an_image_whatever_its_neighbours() -> None:
    together = seeded_normal([3, 4, 5], (3, 8, 8))
    assert torch.equal(together[1], seeded_normal([4], (3, 8, 8))[0])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (10, 0.0)])
def test_impossible_time_grids(steps: int, shift: float) -> None:
    with pytest.raises(UserError):
        time_grid(steps, shift)
