"""Weights and variances learned from many channels at once: empirical Bayes over a layer."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from normadapt.asymptotics.arguments import Real, as_doubles, require, require_non_negative, require_positive

_GRID = 256  # at most 0.15 apart in log(A + R) for ratios up to 1e16; the risk varies on a scale of 1
_BISECTIONS = 64


def pooled(difference: Real, sampling_variance: Real, channel_weight: Real = 1.0) -> Tensor:
    r"""One weight for all channels of a layer, from the unbiased estimate of their mean squared shift.

    $$ \lambda = \Big(1 - \frac{\sum_c w_c R_c}{\sum_c w_c d_c^2}\Big)_+ $$

    Args:
        difference: Observed differences d = test - source (..., C), in any common unit.
        sampling_variance: Their sampling variances R = tau2/n (..., C), in the unit squared.
        channel_weight: How much each channel matters (..., C), non-negative: gamma^2 for the layer's output.

    Returns:
        Weights on the test statistic (...,), in [0, 1]; 0 where nothing differs. Excess risk O(1/C).

    Raises:
        ValueError: If a variance or channel weight is negative, an argument NaN, or the shapes do not broadcast.

    Example:
        >>> pooled(torch.tensor([1.0, 2.0, 0.0]), 0.25).item()
        0.85

    References:
        James and Stein (1961), Proc. 4th Berkeley Symp. 1, 361-379; weighted: this project's THEORY, section 6.
    """
    d, r, w = _channels(difference, sampling_variance, channel_weight)
    noise, signal = (w * r).sum(-1), (w * d * d).sum(-1)
    shifted = signal > 0
    ratio = noise / torch.where(shifted, signal, 1.0)
    return torch.where(shifted, (1 - ratio).clamp_min(0), 0.0)


class Shrinkage(NamedTuple):
    """Variance of the true shifts over channels (...,), and each channel's weight on the test statistic (..., C)."""

    prior_variance: Tensor
    weights: Tensor


def shrink(
    difference: Real,
    sampling_variance: Real,
    method: Literal["sure", "ml"] = "sure",
    channel_weight: Real = 1.0,
) -> Shrinkage:
    r"""A weight per channel, $\lambda_c = A/(A + R_c)$, with the prior variance A learned from all channels.

    "sure" minimizes Stein's unbiased estimate of the risk, "ml" the negative log-likelihood of d ~ N(0, A + R):

    $$ \sum w \Big[ \Big(\frac{R}{A+R}\Big)^2 d^2 + R \frac{A-R}{A+R} \Big], \qquad
       \sum w \Big[ \log(A + R) + \frac{d^2}{A + R} \Big] $$

    Both can have several minima, all at A <= max(d^2 - R): the lowest of a grid over log(A + R) is bisected. "ml" is
    the better one if shifts are normal; "sure" stays good if they are not, as when few channels carry the shift.

    Args:
        difference: Observed differences d (..., C), in any common unit.
        sampling_variance: Their sampling variances R (..., C), in the unit squared.
        method: "sure" or "ml".
        channel_weight: How much each channel matters (..., C), non-negative.

    Returns:
        A (...,) in squared units, to float64 precision, and weights (..., C). Both carry gradients (implicit ones
        through the minimum; none where A is 0). A channel without sampling variance has weight 1, or 0 if also A is 0.
        Excess risk of "sure" over the best A: O(1/sqrt(C)) at worst.

    Raises:
        ValueError: If a variance or channel weight is negative, an argument NaN, `method` unknown, or the shapes
            do not broadcast.

    Example:
        >>> found = shrink(torch.tensor([0.9, -0.1, 0.35]), torch.tensor([0.04, 0.09, 0.02]), method="ml")
        >>> round(found.prior_variance.item(), 6), [round(w, 3) for w in found.weights.tolist()]
        (0.286197, [0.877, 0.761, 0.935])

    References:
        Xie, Kou and Brown (2012), J. Amer. Statist. Assoc. 107, 1465-1479; Efron and Morris (1973), JASA 68, 117-130.
    """
    if method not in ("sure", "ml"):
        raise ValueError(f'method must be "sure" or "ml"; got {method!r}')
    d, r, w = _channels(difference, sampling_variance, channel_weight)
    square = d * d

    def slope(a: Tensor) -> Tensor:
        """Half the risk's derivative in A, up to a positive factor."""
        total = a.unsqueeze(-1) + r
        rest = total - square
        if method == "sure":
            return (w * (r / total) ** 2 * (rest / total)).sum(-1)
        return (w * (rest / total) / total).sum(-1)

    def slope_of_slope(a: Tensor) -> Tensor:
        total = a.unsqueeze(-1) + r
        rest = 1 - square / total
        if method == "sure":
            return (w * (r / total) ** 2 / total * (1 - 3 * rest)).sum(-1)
        return (w / (total * total) * (1 - 2 * rest)).sum(-1)

    def risk(a: Tensor) -> Tensor:
        total = a.unsqueeze(-1) + r
        if method == "sure":
            ratio = r / total
            return (w * (ratio * ratio * square + r * (a.unsqueeze(-1) - r) / total)).sum(-1)
        return (w * (torch.log(total) + square / total)).sum(-1)

    with torch.no_grad():
        highest = (square - r).amax(-1).clamp_min(0)
        floor = torch.where(r > 0, r, torch.inf).amin(-1)
        floor = torch.minimum(floor, highest).clamp_min(highest * 1e-16)
        floor = torch.where(highest > 0, floor, 1.0)
        steps = torch.linspace(0, 1, _GRID, dtype=torch.float64, device=d.device)
        steps = steps.reshape(-1, *(1,) * highest.dim())
        grid = floor * torch.expm1(steps * torch.log1p(highest / floor))
        best = risk(grid).nan_to_num(nan=torch.inf).argmin(0, keepdim=True)
        low = grid.gather(0, (best - 1).clamp_min(0)).squeeze(0)
        high = grid.gather(0, (best + 1).clamp_max(_GRID - 1)).squeeze(0)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            falling = slope(middle) < 0
            low, high = torch.where(falling, middle, low), torch.where(falling, high, middle)
        inside = low > 0
        root = torch.where(inside, (low + high) / 2, 1.0)
        curvature = slope_of_slope(root)
    # the value is the root, the derivative that of the implicit function
    shape = slope(root)
    a = root - torch.where(curvature > 0, (shape - shape.detach()) / torch.where(curvature > 0, curvature, 1.0), 0.0)
    a = torch.where(inside, a, 0.0)
    total = a.unsqueeze(-1) + r
    weights = torch.where(total > 0, a.unsqueeze(-1) / torch.where(total > 0, total, 1.0), 0.0)
    return Shrinkage(a, weights)


class LogVarianceMoments(NamedTuple):
    """Mean and variance of log s^2 - log sigma^2, each (...,), float64."""

    mean: Tensor
    variance: Tensor


def log_variance_moments(degrees: Real) -> LogVarianceMoments:
    r"""Mean and variance of the log of a normal sample's variance.

    $$ E \log\frac{s^2}{\sigma^2} = \psi\big(\tfrac\nu2\big) - \log\tfrac\nu2 \approx -\tfrac1\nu, \qquad
       \mathrm{Var} \log s^2 = \psi'\big(\tfrac\nu2\big) \approx \tfrac2\nu $$

    Args:
        degrees: Degrees of freedom nu = n - 1 of the unbiased s^2 (...,), positive.

    Returns:
        Both moments (...,). Exact for normal data.

    Raises:
        ValueError: If `degrees` is not positive or NaN.

    Example:
        >>> moments = log_variance_moments(7)
        >>> round(moments.mean.item(), 9), round(moments.variance.item(), 9)
        (-0.149606328, 0.330357756)

    References:
        Bartlett and Kendall (1946), Suppl. J. R. Statist. Soc. 8(1), 128-138.
    """
    (nu,) = as_doubles(degrees=degrees)
    require_positive(degrees=nu)
    half = nu / 2
    large = half > 16  # the difference of psi and log cancels: take its series
    near = torch.where(large, 16.0, half)
    far = torch.where(large, half, 16.0)
    inverse = 1 / (far * far)
    series = 1 / 12 - inverse * (1 / 120 - inverse * (1 / 252 - inverse * (1 / 240 - inverse * (1 / 132))))
    mean = torch.where(large, -1 / (2 * far) - inverse * series, torch.special.digamma(near) - torch.log(near))
    return LogVarianceMoments(mean, _trigamma(half))


class Squeezed(NamedTuple):
    """Prior degrees of freedom and variance (...,), and the channels' squeezed variances (..., C)."""

    prior_degrees: Tensor
    prior_variance: Tensor
    variance: Tensor


def squeeze(sample_variance: Real, degrees: Real) -> Squeezed:
    r"""Variances of many channels, each drawn towards what the channels have in common.

    With log-variances of mean e and excess spread $\psi'(\nu_0/2) = \mathrm{var}(\log s^2) - \psi'(\nu/2)$,

    $$ \tilde s_c^2 = \frac{\nu s_c^2 + \nu_0 s_0^2}{\nu + \nu_0}, \qquad
       \log s_0^2 = \bar e + \psi(\nu_0/2) - \log(\nu_0/2), \quad e = \log s^2 - \psi(\nu/2) + \log(\nu/2) $$

    Args:
        sample_variance: Unbiased variances s^2 of the channels (..., C), at least two channels. Those below 1e-5 of
            the median are raised to it for the prior only.
        degrees: Their degrees of freedom nu (..., C) or a number, positive.

    Returns:
        Prior and squeezed variances. Where channels spread no more than sampling explains, `prior_degrees` is infinite
        and all channels share the prior variance.

    Raises:
        ValueError: If there are fewer than two channels, a variance is negative, `degrees` not positive, or NaN.

    Example:
        >>> squeeze(torch.tensor([0.8, 1.1, 2.5, 0.3, 1.7, 0.9, 4.0, 0.6]), 7).prior_degrees.item()
        6.745645...

    References:
        Smyth (2004), Statist. Appl. Genet. Mol. Biol. 3(1), article 3.
    """
    s2, nu = as_doubles(sample_variance=sample_variance, degrees=degrees)
    require_non_negative(sample_variance=s2)
    require_positive(degrees=nu)
    s2, nu = torch.broadcast_tensors(s2, nu)
    if s2.dim() == 0 or s2.shape[-1] < 2:
        raise ValueError(f"sample_variance needs at least two channels in its last dimension; got {tuple(s2.shape)}")
    floored = torch.maximum(s2, 1e-5 * s2.median(-1, keepdim=True).values)
    sampling = log_variance_moments(nu)
    e = torch.log(floored) - sampling.mean
    center = e.mean(-1)
    excess = e.var(-1) - sampling.variance.mean(-1)
    spread = excess > 0
    half = _trigamma_inverse(torch.where(spread, excess, 1.0))
    log_prior = center + torch.where(spread, log_variance_moments(2 * half).mean, 0.0)
    prior = torch.exp(log_prior)
    share = torch.where(spread.unsqueeze(-1), nu / (nu + 2 * half.unsqueeze(-1)), 0.0)
    variance = share * s2 + (1 - share) * prior.unsqueeze(-1)
    return Squeezed(torch.where(spread, 2 * half, torch.inf), prior, variance)


def _trigamma(x: Tensor) -> Tensor:
    """psi'(x) as a Hurwitz zeta function: `torch.special.polygamma(1, x)` is good to nine digits only."""
    value: Tensor = torch.special.zeta(torch.full_like(x, 2.0), x)
    return value


def _trigamma_inverse(y: Tensor) -> Tensor:
    """The x > 0 with psi'(x) = y > 0, by Newton on 1/psi', which converges from the left; with its gradient."""
    with torch.no_grad():
        x = 0.5 + 1 / y
        for _ in range(40):
            value = _trigamma(x)
            x = x + value * (value / y - 1) / (2 * torch.special.zeta(torch.full_like(x, 3.0), x))
        slope = -2 * torch.special.zeta(torch.full_like(x, 3.0), x)
    inverse: Tensor = x + (y - y.detach()) / slope
    return inverse


def _channels(difference: Real, sampling_variance: Real, channel_weight: Real) -> list[Tensor]:
    """The arguments of the pooling rules, checked, broadcast, with at least one dimension."""
    d, r, w = as_doubles(difference=difference, sampling_variance=sampling_variance, channel_weight=channel_weight)
    require_non_negative(sampling_variance=r, channel_weight=w)
    for name, value in (("difference", d), ("sampling_variance", r), ("channel_weight", w)):
        require(name, value, value.isfinite(), "must be finite")
    d, r, w = torch.broadcast_tensors(d, r, w)
    if d.dim() and d.shape[-1] == 0:
        raise ValueError(f"difference needs at least one channel; got shape {tuple(d.shape)}")
    return [value if value.dim() else value.unsqueeze(0) for value in (d, r, w)]
