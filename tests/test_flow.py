"""The path, its times, solvers and guidance, on numbers and closed forms."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.flow import (
    OBJECTIVES,
    SOLVERS,
    SampleNoise,
    clean_image,
    drop_classes,
    evaluations,
    guided_velocity,
    interpolate,
    is_stochastic,
    logit_normal_times,
    seeded_normal,
    shift_times,
    start_state,
    steps_within,
    time_grid,
    velocity,
)
from pixeldip.flow.objectives import VP_NOISIEST
from pixeldip.flow.solvers import reached

from .conftest import TINY_MODEL, gaussian_velocity, opened_up

MEAN, STD = 0.7, 0.4
VELOCITY = gaussian_velocity(MEAN, STD)


def error(solver: str, steps: int, shift: float = 1.0) -> float:
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    return (SOLVERS[solver](VELOCITY, z, time_grid(steps, shift)) - (MEAN + STD * z)).abs().max().item()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_convergence_order(solver: str, order: int, shift: float) -> None:
    measured = math.log2(error(solver, 160, shift) / error(solver, 320, shift))
    assert abs(measured - order) < 0.15


OURS = ("euler", "heun", "ab2", "ddim", "ancestral")


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted_right(solver: str) -> None:
    calls = []
    extra = {"noise": lambda i: torch.zeros(1)} if is_stochastic(solver) else {}
    SOLVERS[solver](lambda x, t, s: calls.append((t, s)) or 0 * x, torch.zeros(1), time_grid(7), **extra)
    count = evaluations(solver, 7)
    assert len(calls) == count
    if solver in OURS:
        assert (count, is_stochastic(solver)) == (13 if solver == "heun" else 7, solver == "ancestral")
    assert all(start <= t < 1 for t, start in calls)
    assert [steps_within(solver, budget) for budget in (1, count - 1, count)] == [1, 6, 7]


def test_an_added_solver_needs_no_more_than_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/extend.md says: evaluations and fresh noise are its own."""

    def noisy_midpoint(velocity, x, times, on_step=None, *, noise):
        for i, (t0, t1) in enumerate(zip(times, times[1:])):
            half = (t1 - t0) / 2
            v = velocity(x + half * velocity(x, t0, t0), t0 + half, t0)
            x = reached(on_step, i, t1, x + 2 * half * v + 0 * noise(i))
        return x

    monkeypatch.setitem(SOLVERS, "noisy-midpoint", noisy_midpoint)
    assert is_stochastic("noisy-midpoint") and evaluations("noisy-midpoint", 5) == 10
    assert [steps_within("noisy-midpoint", budget) for budget in (1, 2, 9, 10)] == [1, 1, 4, 5]
    pipeline = DiPPipeline(opened_up(DiP(**TINY_MODEL, num_classes=2)), height=16, width=16)
    images = pipeline([0], seeds=[1], num_inference_steps=2, solver="noisy-midpoint", output_type="pt").images
    assert images.shape == (1, 3, 16, 16)


def test_the_path_ends_in_noise_and_data() -> None:
    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(interpolate(x, noise, torch.zeros(2)), noise)
    assert torch.equal(interpolate(x, noise, torch.ones(2)), x)
    t = torch.tensor([0.2, 0.7])
    torch.testing.assert_close(clean_image(interpolate(x, noise, t), velocity(x, noise), t), x)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_right_output_becomes_the_velocity(name: str) -> None:
    objective, (x, noise) = OBJECTIVES[name], torch.randn(2, 4, 3, 4, 4)
    t = torch.tensor([0.0066, 0.3, 0.5, 0.94])
    x_t = interpolate(x, noise, t)
    output = {"velocity": x - noise, "image": x, "noise": noise}[name]
    v = objective.to_velocity(output, x_t, t)
    torch.testing.assert_close(v, velocity(x, noise), rtol=1e-3, atol=1e-3)
    assert objective.loss(v, x, noise, t).max() < 1e-8


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_right_output_leads_to_the_image(name: str, solver: str) -> None:
    """All the way, however small the steps; a predicted image's noise is gone to a tenth of a grey level of 255."""
    objective, image = OBJECTIVES[name], torch.full((1, 1, 32, 32), 0.9)

    def velocity_at(x: Tensor, t: float, step_start: float) -> Tensor:
        noise = (x - t * image) / (1 - t)
        output = {"velocity": image - noise, "image": image, "noise": noise}[name]
        return objective.to_velocity(output, x, x.new_full((1,), t))

    fresh = {"noise": lambda i: seeded_normal([i + 1], image.shape[1:])} if is_stochastic(solver) else {}
    for steps in (10, 250):
        times = time_grid(steps, objective=objective)
        x = SOLVERS[solver](velocity_at, start_state(seeded_normal([0], image.shape[1:]), times), times, **fresh)
        torch.testing.assert_close(x, image, rtol=0, atol=5e-3)
        assert (x - image).std() * 127.5 < 0.1


def test_the_loss_of_the_image_near_data_is_the_image_s() -> None:
    """From t = 0.95 on, where the velocity's would grow without end; an output that is off by 0.1 everywhere."""
    objective, x, noise = OBJECTIVES["image"], torch.randn(5, 1, 4, 4), torch.randn(5, 1, 4, 4)
    t = torch.tensor([0.5, 0.9, 0.96, 0.9995, 1.0])
    v = objective.to_velocity(x + 0.1, interpolate(x, noise, t), t)
    expected = torch.tensor([0.2, 1.0, 2.0, 2.0, 2.0]).square()
    torch.testing.assert_close(objective.loss(v, x, noise, t), expected, rtol=1e-3, atol=0)


def test_the_loss_of_the_velocity_is_its_mean_square_per_image() -> None:
    x, noise, t = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), torch.tensor([0.25, 0.5])
    v = torch.stack([torch.full((1, 2, 2), 3.0), torch.ones(1, 2, 2)])
    assert OBJECTIVES["velocity"].loss(v, x, noise, t).tolist() == [4.0, 0.0]
    assert OBJECTIVES["image"].loss(v, x, noise, t).tolist() == [4.0, 0.0]


def test_the_loss_of_the_noise_is_eq_4() -> None:
    x, noise, guess = torch.randn(3, 2, 1, 4, 4)
    t = torch.tensor([0.1, 0.8])
    objective = OBJECTIVES["noise"]
    v = objective.to_velocity(guess, interpolate(x, noise, t), t)
    expected = (noise - guess).square().flatten(1).mean(1)
    torch.testing.assert_close(objective.loss(v, x, noise, t), expected, rtol=1e-4, atol=1e-5)


def test_the_variance_preserving_path() -> None:
    objective, r = OBJECTIVES["noise"], torch.linspace(0, 1, 1001, dtype=torch.float64)
    t = objective.flow_time(r)
    torch.testing.assert_close(objective.schedule_time(t), r, rtol=0, atol=1e-12)
    alpha_bar = (t / torch.hypot(t, 1 - t)).square().flip(0)
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    ddpm = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert (alpha_bar[0], t[0] > VP_NOISIEST) == (1, True)
    torch.testing.assert_close(betas, ddpm, rtol=0.02, atol=1.5e-5)
    # before its beginning, where a scheduler with times of its own starts
    noise, at_noise = torch.randn(1, 3, 4, 4), torch.zeros(1)
    seen, r = objective.network_input(noise, at_noise)
    assert torch.equal(seen, noise) and r == 0
    assert objective.to_velocity(noise + 1, noise, at_noise).isfinite().all()


def vp_state(x: Tensor, t: float) -> Tensor:
    """The state of Eq. 1, given that of the straight path."""
    return x / math.hypot(t, 1 - t)


@pytest.mark.parametrize("solver", ["euler", "ddim", "ancestral"])
def test_samplers_are_ddim_and_ddpm(solver: str) -> None:
    """Step by step as diffusers' DDIMScheduler, with eta 0 and 1, for a network that predicts noise."""
    objective, steps = OBJECTIVES["noise"], 20
    times = time_grid(steps, objective=objective)

    def noise_network(x: Tensor, r: float) -> Tensor:
        return torch.tanh(x) * (1 - r) + 0.1 * r

    def v(x: Tensor, t: float, _: float) -> Tensor:
        t_batch = torch.full((len(x),), t, dtype=torch.float64)
        seen, r = objective.network_input(x, t_batch)
        return objective.to_velocity(noise_network(seen, r[0].item()), x, t_batch)

    noise = torch.randn(steps + 1, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    extra = {"noise": lambda i: noise[i + 1]} if is_stochastic(solver) else {}
    ours = SOLVERS[solver](v, start_state(noise[0], times), times, **extra)

    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False, set_alpha_to_one=True)
    alpha_bar = [
        (t / math.hypot(t, 1 - t)) ** 2 for t in objective.flow_time(1 - torch.arange(1, 1001) / 1000).tolist()
    ]
    scheduler.alphas_cumprod = torch.tensor(alpha_bar, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    theirs = noise[0]
    for i in range(steps):
        k = 1000 - i * (1000 // steps)  # diffusers counts steps from 0
        eta = {"eta": 1.0, "variance_noise": noise[i + 1]} if is_stochastic(solver) else {}
        theirs = scheduler.step(noise_network(theirs, 1 - k / 1000), k - 1, theirs, **eta).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ancestral_samples_have_the_datas_distribution(name: str) -> None:
    """The stochastic sampler on the exact velocity of Gaussian data, for the times of every objective."""
    random = torch.Generator().manual_seed(0)
    times = time_grid(200, objective=OBJECTIVES[name])
    start = start_state(torch.randn(20_000, 1, generator=random, dtype=torch.float64), times)
    fresh = lambda i: torch.randn(start.shape, generator=random, dtype=torch.float64)  # noqa: E731
    x = SOLVERS["ancestral"](VELOCITY, start, times, noise=fresh)
    assert abs(x.mean() - MEAN) < 0.02 and abs(x.std() - STD) < 0.02


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
        return y[..., None, None, None].to(x.dtype).expand(*y.shape, *x.shape[1:])


def test_guidance_is_evaluated_only_inside_its_interval() -> None:
    network, x = Recorder(), torch.zeros(2, 1, 1, 1)
    v = guided_velocity(network, torch.tensor([1, 2]), null_class=5, scale=3.0, interval=(0.2, 0.8))
    assert v(x, 0.2, 0.2).flatten().tolist() == [1.0, 2.0]
    assert v(x, 0.5, 0.5).flatten().tolist() == [5 + 3 * (1 - 5), 5 + 3 * (2 - 5)]
    v(x, 0.8, 0.8)
    v(x, 0.8, 0.79)  # the second evaluation of a step that started inside
    assert network.batches == [[1, 2], [[1, 2], [5, 5]], [1, 2], [[1, 2], [5, 5]]]


@pytest.mark.parametrize(("steps", "guided"), [(10, 4), (20, 9), (75, 37), (100, 49)])
def test_a_step_that_starts_on_a_bound_of_the_interval_is_not_guided(steps: int, guided: int) -> None:
    network = Recorder()
    v = guided_velocity(network, torch.tensor([1]), null_class=5, scale=3.0, interval=(0.3, 0.8))
    SOLVERS["euler"](v, torch.zeros(1, 1, 1, 1), time_grid(steps))
    assert sum(len(batch) == 2 for batch in network.batches) == guided


def test_guidance_of_one_is_free_and_the_whole_interval_holds_its_start() -> None:
    network, x = Recorder(), torch.zeros(1, 1, 1, 1)
    guided_velocity(network, torch.tensor([1]), 5, scale=1.0)(x, 0.5, 0.5)
    guided_velocity(network, torch.tensor([1]), 5, scale=2.0)(x, 0.0, 0.0)
    assert network.batches == [[1], [[1], [5]]]


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 1.0), (0.0, 1.5)])
def test_an_impossible_interval(interval: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="guidance interval"):
        guided_velocity(Recorder(), torch.tensor([1]), 5, 2.0, interval)


def test_a_seed_is_an_image_whatever_its_neighbours() -> None:
    together = seeded_normal([3, 4, 5], (3, 8, 8))
    assert torch.equal(together[1], seeded_normal([4], (3, 8, 8))[0])
    assert not torch.equal(together[0], together[1])


def test_noise_is_a_seeds_own_and_fresh_at_every_step() -> None:
    shape, device = (1, 4, 4), torch.device("cpu")
    noise, alone = (SampleNoise(seeds, None, len(seeds), shape, device) for seeds in ([3, 4], [4]))
    assert torch.equal(noise.start, seeded_normal([3, 4], shape)) and torch.equal(noise.fresh(1)[1:], alone.fresh(1))
    of_generators = torch.stack([torch.randn(shape, generator=generator) for generator in noise.generators])
    for drawn in ([noise.start, noise.fresh(0), noise.fresh(1)], [noise.start, of_generators]):
        assert len(torch.cat(drawn).flatten(1).unique(dim=0)) == 2 * len(drawn)  # of two seeds, none twice
    assert torch.equal(SampleNoise(None, None, 2, shape, device).start, seeded_normal([0, 1], shape))
    # records tell seeds alone: the same numbers ever since
    assert noise.fresh(1)[:, 0, 0, 0].tolist() == pytest.approx([-0.00539024, 0.50287724])
    assert of_generators[:, 0, 0, 0].tolist() == pytest.approx([1.370224, 1.1288571])


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (10, 0.0), (10, 1e-300)])
def test_impossible_time_grids(steps: int, shift: float) -> None:
    with pytest.raises(UserError):
        time_grid(steps, shift)
