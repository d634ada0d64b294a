"""Three simulators of Lueckmann et al., 2021, arXiv:2101.04653, and draws of their true posteriors."""

import math

import torch
from torch import Tensor


class TwoMoons:
    """A crescent that the parameters move; the posterior consists of two crescents."""

    sizes, bound, steps = (2, 2), 1.0, 6000  # of theta and x; the prior is uniform in [-bound, bound]

    def moon(self, n: int) -> Tensor:  # noqa: D102
        angle, radius = math.pi * (torch.rand(n) - 0.5), 0.1 + 0.01 * torch.randn(n)
        return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)

    def simulate(self, theta: Tensor) -> Tensor:  # noqa: D102
        return self.moon(len(theta)) + torch.stack([-theta.sum(1).abs(), theta[:, 1] - theta[:, 0]], 1) / 2**0.5

    def posterior(self, x: Tensor, n: int) -> Tensor:  # noqa: D102
        a, b = (self.moon(20 * n) - x).T  # x = moon - (|u|, v), so that u = a or -a, and v = b
        u = a * torch.randn(20 * n).sign()
        theta = torch.stack([u + b, u - b], 1) / 2**0.5
        return theta[(a >= 0) & (theta.abs() < 1).all(1)][:n]


class GaussianLinear:
    """The parameters with normal noise."""

    sizes, bound, steps = (10, 10), math.inf, 2000  # the prior is normal with the variance 0.1

    def simulate(self, theta: Tensor) -> Tensor:  # noqa: D102
        return theta + 0.1**0.5 * torch.randn(theta.shape)

    def posterior(self, x: Tensor, n: int) -> Tensor:  # noqa: D102
        return x / 2 + 0.05**0.5 * torch.randn(n, 10)


class SLCP:
    """Simple likelihood, complex posterior: four points of a normal distribution in the plane."""

    sizes, bound, steps = (5, 8), 3.0, 6000

    def factors(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The deviations and the correlation of the normal distribution."""
        return theta[:, 2:3] ** 2, theta[:, 3:4] ** 2, theta[:, 4:].tanh()

    def simulate(self, theta: Tensor) -> Tensor:  # noqa: D102
        (s1, s2, r), (a, b) = self.factors(theta), torch.randn(2, len(theta), 4)
        a, b = theta[:, :1] + s1 * a, theta[:, 1:2] + s2 * (r * a + (1 - r**2).sqrt() * b)
        return torch.stack([a, b], 2).flatten(1)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        (s1, s2, r), (a, b) = self.factors(theta), x.view(4, 2).T[:, None]
        a, b = (a - theta[:, :1]) / s1, (b - theta[:, 1:2]) / s2
        b = (b - r * a) / (1 - r**2).sqrt()
        return -((a**2 + b**2) / 2 + (s1 * s2 * (1 - r**2).sqrt()).log()).sum(1)

    def posterior(self, x: Tensor, n: int, steps: int = 500) -> Tensor:
        """Prior draws, chosen by their likelihood, after Metropolis steps."""
        theta = prior(self, 2_000_000)
        log = torch.cat([self.log_likelihood(part, x) for part in theta.split(100_000)]).nan_to_num(-math.inf)
        theta = theta[torch.multinomial((log - log.max()).exp(), n, replacement=True)]
        for _ in range(steps):
            new = theta + theta.std(0) * torch.randn(n, 5) * (torch.rand(n, 5) < 0.5) / 30 ** torch.rand(n, 1)
            new[:, 2:4] *= torch.randn(n, 2).sign()  # the likelihood is the same
            better = (self.log_likelihood(new, x) - self.log_likelihood(theta, x)).exp() > torch.rand(n)
            theta = torch.where((better & (new.abs() < 3).all(1))[:, None], new, theta)
        return theta


Task = TwoMoons | GaussianLinear | SLCP
TASKS: dict[str, Task] = {"two-moons": TwoMoons(), "gaussian-linear": GaussianLinear(), "slcp": SLCP()}


def prior(task: Task, n: int) -> Tensor:
    """Draws n parameters."""
    normal, d = math.isinf(task.bound), task.sizes[0]
    return 0.1**0.5 * torch.randn(n, d) if normal else task.bound * (2 * torch.rand(n, d) - 1)
