"""The weight that hardly ever does harm: for the safe side in extreme inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from normadapt.asymptotics import edgeworth, expansions, normal
from normadapt.asymptotics.arguments import Real, as_doubles, require, require_count, require_non_negative

_FURTHEST = 40.0  # deviations that no probability in float64 corresponds to
_BISECTIONS = 48  # of the probability: the weight is found to 1e-13 or so


def tail_safe(
    shift: Real,
    sampling_variance: Real,
    tolerance: Real,
    probability: Real = 0.05,
    skewness: Real = 0.0,
    excess_kurtosis: Real = 0.0,
    count: Real = 1.0,
    terms: edgeworth.Terms = 2,
) -> Tensor:
    r"""The largest weight that, but for a stated probability, moves a statistic no further from its target.

    With the source statistic held fixed, the adapted one misses its target by $\lambda e - (1 - \lambda)\delta$, where
    $\delta$ is the true shift and $e = m - m^*$ the sampling error of the test statistic; the source alone misses it
    by $\delta$. Harm is to miss it by more than the source does plus the tolerance t. For $\delta \ge 0$,

    $$ |\lambda e - (1-\lambda)\delta| > \delta + t \iff e > \frac{2\delta + t}{\lambda} - \delta
       \quad\text{or}\quad e < -\delta - \frac t\lambda $$

    Both thresholds come nearer as the weight grows, so the probability of harm increases in it, from 0 at weight 0, and
    the largest weight is where it reaches alpha. Splitting $\alpha = \alpha_1 + \alpha_2$ between the sides and writing
    q for the Cornish-Fisher quantile of e, each side is closed:

    $$ \lambda_1 = \frac{2\delta + t}{q(1-\alpha_1) + \delta}, \qquad \lambda_2 = \frac{t}{-q(\alpha_2) - \delta},
       \qquad \lambda = \max_{\alpha_1 + \alpha_2 = \alpha} \min(\lambda_1, \lambda_2, 1) $$

    (a side whose denominator is not positive does not bind). One grows and the other falls with $\alpha_2$: bisection.
    Where q stops being increasing in the probability it is held at its turning point; where it already does so at the
    median (`count` too small for the kurtosis), e is taken to be normal.
    Harm is likeliest at $\delta = 0$, so the weight for shift 0 is safe whatever the shift; there the skewness cancels
    to first order, as both sides count alike. With an estimated shift the probability is met only nominally.

    Args:
        shift: True shift delta of the statistic, or an estimate or lower bound of it (...,); 0 is the worst case.
        sampling_variance: Variance of the test statistic tau2/n (...,), in the shift's unit squared.
        tolerance: By how much more than the source the adapted statistic may miss its target (...,), same unit.
        probability: Accepted probability of more than that (...,), in (0, 1).
        skewness: Skewness of one draw (...,).
        excess_kurtosis: Excess kurtosis of one draw (...,).
        count: Number of draws behind the test statistic (...,).
        terms: Terms of the Cornish-Fisher quantile; 0 takes e to be normal.

    Returns:
        Weights on the test statistic (...,), in [0, 1]. Probability of harm: alpha + O(n^(-(terms+1)/2)). They carry no
        gradient (the result of a search).

    Raises:
        ValueError: If a variance or tolerance is negative, `probability` outside (0, 1), `count` below 1, an argument
            NaN, or the shapes do not broadcast.

    Example:
        >>> tail_safe(0.0, 1.0, 0.98).item()  # normal: 0.98 / 1.95996
        0.5000091...
        >>> tail_safe(1.0, 1.0, 0.98).item() > 0.9
        True

    References:
        This project's own: THEORY, section 6 (iv); the quantile: Cornish and Fisher (1938).
    """
    arguments = as_doubles(
        shift=shift,
        sampling_variance=sampling_variance,
        tolerance=tolerance,
        probability=probability,
        skewness=skewness,
        excess_kurtosis=excess_kurtosis,
        count=count,
    )
    delta, variance, t, alpha, g, kurtosis, n = torch.broadcast_tensors(*(a.detach() for a in arguments))
    require_non_negative(sampling_variance=variance, tolerance=t)
    require("probability", alpha, (alpha > 0) & (alpha < 1), "must be in (0, 1)")
    require_count(count=n)
    if terms not in (0, 1, 2):
        raise ValueError(f"terms must be 0, 1 or 2; got {terms!r}")
    side = torch.where(delta < 0, -1.0, 1.0)
    delta, sd, zero = delta.abs(), variance.sqrt(), torch.zeros_like(delta)
    skew, kurtosis = side * g / n.sqrt(), kurtosis / n
    # lower quantiles of e on the shift's side and, mirrored, beyond the target: stacked, as they are needed together
    k = (zero, torch.ones_like(zero), torch.stack((-skew, skew)), kurtosis)
    furthest, trusted = _turning_point(k, terms)
    k = (k[0], k[1], torch.where(trusted, k[2], 0.0), torch.where(trusted, k[3], 0.0))
    away = torch.stack((2 * delta + t, t))
    offset = torch.stack((delta, -delta))

    def sides(below: Tensor) -> tuple[Tensor, Tensor]:
        """The largest weight that either side allows, the lower one given the probability `below`."""
        z = normal.quantile(torch.stack((alpha - below, below)))
        # beyond the median neither side can bind
        z = torch.maximum(z, -furthest).clamp_max(0)
        reach = offset - expansions.cornish_fisher(z, k, terms) * sd
        binds = reach > 0
        upper, lower = torch.where(binds, away / torch.where(binds, reach, 1.0), torch.inf)
        return upper, lower

    low, high = zero, alpha
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above, below = sides(middle)
        binding = below < above  # the lower side binds: give it more of the probability
        low, high = torch.where(binding, middle, low), torch.where(binding, high, middle)
    # either end of the bracket is a valid split; where one side never binds, only one of them is the better
    return torch.maximum(torch.minimum(*sides(low)), torch.minimum(*sides(high))).clamp_max(1)


def _turning_point(k: tuple[Tensor, Tensor, Tensor, Tensor], terms: int) -> tuple[Tensor, Tensor]:
    """How far below the median, in z, the Cornish-Fisher quantile increases, and whether it does so at the median."""
    constant = 1 - k[3] / 8 + 5 * k[2] ** 2 / 36 if terms == 2 else torch.ones_like(k[2])
    linear = k[2] / 3 if terms >= 1 else torch.zeros_like(k[2])
    square = k[3] / 8 - k[2] ** 2 / 6 if terms == 2 else torch.zeros_like(k[2])
    root = (linear**2 - 4 * constant * square).clamp_min(0).sqrt()
    turns = (linear**2 >= 4 * constant * square) & (linear + root > 0)
    furthest = torch.where(turns, 2 * constant / torch.where(turns, linear + root, 1.0), _FURTHEST)
    trusted = (constant > 0).all(0)
    return torch.where(trusted, furthest.clamp_max(_FURTHEST), _FURTHEST), trusted
