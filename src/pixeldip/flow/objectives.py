"""What a network is trained to predict, and on which path (Sec. 3.1).

Every Gaussian path a x + s eps is the straight path x_t = t x + (1 - t) eps in other coordinates: divide the
state by a + s, and t = a / (a + s). So an objective is a change of coordinates around the network, and every
network is a velocity on the straight path: the solvers and the guidance need not know which it is.
"""

import torch
from torch import Tensor

from .path import interpolate, like, velocity

NEAREST_DATA = 1e-3  # 1 - t is held above this where a predicted image becomes a velocity,
NEAREST_LEARNT = 0.05  # and above this where its error becomes the velocity's in the loss
VP_BETA_0, VP_BETA_1 = 0.1, 20.0
VP_NOISIEST = 0.0065  # just below the t of r = 0, where the variance-preserving path begins


class VelocityObjective:
    """Flow matching, Eq. 5: the network predicts the velocity x - eps. The release's, and the default."""

    times = "logit_normal"
    """How times are drawn in training unless a recipe says otherwise."""

    ends_in_output = False
    """Whether the last step leads to what the network puts out: at t = 1 the two are one."""

    def flow_time(self, r: Tensor) -> Tensor:
        """t of schedule times r in [0, 1]: training draws r, and solvers step evenly in r."""
        return r

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network sees of x_t (B, C, H, W) and t (B,)."""
        return x_t, t

    def to_velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity that follows from the network's output, all (B, C, H, W), at t (B,)."""
        return output

    def loss(self, v: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """One value per image (B,) for the velocity v (B, C, H, W) at x_t = t x + (1 - t) eps."""
        return (v.float() - velocity(x, noise).float()).square().flatten(1).mean(1)


class ImageObjective(VelocityObjective):
    """The network predicts the clean image; the loss is Eq. 5's, on the velocity (image - x_t) / (1 - t) that
    follows from it (JiT, Li & He 2025). From t = 0.95 on, where that would count the image's error more and more, it is
    counted as at 0.95; solvers go all the way to the predicted image."""

    ends_in_output = True

    def to_velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return (output - x_t) / (1 - like(t, x_t)).clamp(min=NEAREST_DATA)

    def loss(self, v: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        left = 1 - like(t, v.float())
        off = left.clamp(min=NEAREST_DATA) * v.float() - left * velocity(x, noise).float()  # the image's error
        return (off / left.clamp(min=NEAREST_LEARNT)).square().flatten(1).mean(1)


class NoiseObjective(VelocityObjective):
    """Noise prediction on the variance-preserving path, Eqs. 1 and 4.

    At schedule time r, Eq. 1's alpha_bar is exp(-(b0 u + (b1 - b0) u^2 / 2)) with u = 1 - r, b0 = 0.1 and b1 = 20:
    DDPM's schedule (Ho et al. 2020) in continuous time (Song et al. 2021). At u = k / 1000 it is Eq. 1 with
    beta_k = 1 - alpha_bar_k / alpha_bar_(k-1), from 1.1e-4 to 0.02. Euler's method in these coordinates is DDIM.
    """

    times = "uniform"

    def flow_time(self, r: Tensor) -> Tensor:
        u = 1 - r
        noise_to_signal = torch.expm1(VP_BETA_0 * u + (VP_BETA_1 - VP_BETA_0) / 2 * u.square()).sqrt()
        return 1 / (1 + noise_to_signal)

    def schedule_time(self, t: Tensor) -> Tensor:
        """The inverse of `flow_time`; 0 for all that is noisier than the path's beginning."""
        integral = torch.log1p(((1 - t) / t.clamp(min=1e-6)).square())
        slope = VP_BETA_1 - VP_BETA_0
        u = ((VP_BETA_0**2 + 2 * slope * integral).sqrt() - VP_BETA_0) / slope
        return (1 - u).clamp(min=0)

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 1's state, of unit variance for data of unit variance, and r."""
        t_image = like(t, x_t)
        return x_t * torch.rsqrt(t_image.square() + (1 - t_image).square()), self.schedule_time(t)

    def to_velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return (x_t - output) / like(t, x_t).clamp(min=VP_NOISIEST)

    def loss(self, v: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Eq. 4's squared error of the noise, which is t^2 times that of the velocity."""
        x_t, t_image = interpolate(x, noise, t), like(t, x)
        return (x_t.float() - t_image * v.float() - noise.float()).square().flatten(1).mean(1)


OBJECTIVES: dict[str, VelocityObjective] = {
    "velocity": VelocityObjective(),
    "image": ImageObjective(),
    "noise": NoiseObjective(),
}
