"""Tent, ETA and RDumb, the gradient methods that every reader asks for: for the benchmark only, not policies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normadapt.errors import UnsupportedLayerError
from normadapt.layers.batches import check_model
from normadapt.layers.sites import Site, find_sites, layer_input, shared_copy

_FEW, _MANY = (10, 0.4), (1000, 0.05)  # class counts and the redundancy thresholds e that EATA has for them


class _ByBatch:
    """A forward-pre-hook that makes its layer normalize by the batch's own statistics, gradients through them."""

    def __init__(self, site: Site) -> None:
        self.site = site
        like = site.buffers()[0]
        zeros = torch.zeros_like(site.channel_weight().float() if like is None else like)
        self.identity = zeros, zeros + (1 - site.eps)  # statistics with which the layer leaves its input as it is

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called by torch just before the layer's forward; returns other arguments for it, or None for the same."""
        x = layer_input(args, kwargs)
        if isinstance(module, _BatchNorm) and x.numel() > x.shape[1]:
            self.site.write(None, None)  # torch then takes the batch's statistics, in eval mode too
            return None
        self.site.write(*self.identity)
        if x.numel() == 0:
            return None
        # By hand: torch refuses one number per channel, and other layers know running statistics only.
        dims = (0, *range(2, x.dim()))
        mean = x.mean(dims, keepdim=True)
        variance = (x - mean).square().mean(dims, keepdim=True)
        moved = (x - mean) / (variance + self.site.eps).sqrt()
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): moved})


class Tent(nn.Module):
    r"""Batch statistics, and after every batch one step of Adam down the mean entropy of the predictions.

    $$ L = \tfrac1n \sum_i H(p_i), \qquad p_i = \mathrm{softmax}(\text{logits}_i) $$

    Only the scales and shifts (gamma, beta) of the normalization layers learn. The answer is that of the forward pass
    made before the step. Decided here: all else of the model computes as in eval mode (the original leaves dropout
    on); an empty batch, or one whose loss is not finite, makes no step; one number per channel (BatchNorm1d at n = 1)
    is normalized to 0 like every mean.

    Args:
        model: Any classifier with batch norms whose output is logits (n, K). It is copied: frozen parameters are shared
            and never written, those that learn and all buffers are the copy's own.
        learning_rate: Adam's, above 0.

    Raises:
        UnsupportedLayerError: If there is no normalization layer with a scale or shift to learn.

    References:
        Wang, Shelhamer, Liu, Olshausen and Darrell (2021), "Tent: fully test-time adaptation by entropy minimization",
        ICLR.
    """

    def __init__(self, model: nn.Module, learning_rate: float = 1e-3) -> None:
        super().__init__()
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a finite number above 0; got {learning_rate!r}")
        check_model(model, f"{type(self).__name__}()")
        with torch.inference_mode(False), torch.no_grad():
            self.model = shared_copy(model)
            sites = find_sites(self.model, with_profile=True, verb=f"{type(self).__name__}()")
            self._learning = _own_parameters(self.model, {id(site.module) for site in sites})
            for site in sites:
                site.module.register_forward_pre_hook(_ByBatch(site), with_kwargs=True)
        if not self._learning:
            raise UnsupportedLayerError(
                f"{type(self).__name__}() found no scale or shift to learn in {type(model).__name__}: its layers "
                "have affine=False -> use baselines.BatchStatistics"
            )
        self.optimizer = torch.optim.Adam(self._learning, lr=learning_rate)
        self.training = False

    def train(self, mode: bool = True) -> Tent:
        """Set `training` and nothing else: the model inside stays in eval mode."""
        self.training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Answer a batch with logits (n, K), then learn from it; whatever the caller says about gradients.

        Raises:
            TypeError: If the model's output is not a tensor (n, K) with K >= 2.
        """
        with torch.inference_mode(False), torch.enable_grad():
            output = self.model(*map(_usable, args), **{name: _usable(value) for name, value in kwargs.items()})
            if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
                got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
                raise TypeError(f"{type(self).__name__} needs a model whose output is logits (n, K); got {got}")
            loss = self.loss(output)
            if loss is not None and math.isfinite(float(loss.detach())):
                self.optimizer.zero_grad()
                loss.backward(inputs=self._learning)
                self.optimizer.step()
        return output.detach()

    def loss(self, logits: Tensor) -> Tensor | None:
        """Mean entropy of predictions from logits (n, K); None for an empty batch."""
        return _entropy(logits).mean() if logits.shape[0] else None


class ETA(Tent):
    r"""Tent on the items that are sure and new, weighted by how sure: EATA without its Fisher term.

    $$ L = \frac{1}{|S|} \sum_{i \in S} e^{E_0 - H_i} H_i, \qquad
    S = \{ i : H_i < E_0, \; |\cos(p_i, \bar p)| < e \}, \qquad E_0 = 0.4 \ln K $$

    p-bar is a moving average of the mean prediction of the kept items, .9 on the past. Decided here: the weights are
    constants for the gradient; until something was kept only the entropy filters; no item kept, no step.

    Args:
        model, learning_rate: As for `Tent`.
        redundancy: e, above 0; None for the paper's by class count: .4 up to 10 classes, .05 from 1,000 on, between
            them the power of K through both.

    References:
        Niu, Wu, Zhang and others (2022), "Efficient test-time model adaptation without forgetting", ICML.
    """

    def __init__(self, model: nn.Module, learning_rate: float = 1e-3, redundancy: float | None = None) -> None:
        if redundancy is not None and not redundancy > 0:
            raise ValueError(
                f"redundancy must be a threshold above 0, or None for one by class count; got {redundancy!r}"
            )
        super().__init__(model, learning_rate)
        self.redundancy = redundancy
        self.kept_mean: Tensor | None = None

    def loss(self, logits: Tensor) -> Tensor | None:
        """Mean weighted entropy of the kept items; None if none is kept. Takes them into the moving average."""
        classes = logits.shape[1]
        entropy, bound = _entropy(logits), 0.4 * math.log(classes)
        probabilities = logits.detach().softmax(1)
        kept = entropy.detach() < bound
        if self.kept_mean is not None:
            alike = torch.cosine_similarity(probabilities, self.kept_mean.unsqueeze(0), dim=1).abs()
            kept &= alike < (redundancy_threshold(classes) if self.redundancy is None else self.redundancy)
        if not bool(kept.any()):
            return None
        mean = probabilities[kept].mean(0)
        self.kept_mean = mean if self.kept_mean is None else 0.9 * self.kept_mean + 0.1 * mean
        entropy = entropy[kept]
        return ((bound - entropy.detach()).exp() * entropy).mean()


class RDumb(ETA):
    """ETA that forgets all it has learned every 1,000 batches: scales, shifts, Adam's moments and what was kept.

    Args:
        model, learning_rate, redundancy: As for `ETA`.
        every: Batches after which it begins anew, at least 1.

    References:
        Press, Schneider, Kuemmerer and Bethge (2023), "RDumb: a simple approach that questions our progress in
        continual test-time adaptation", NeurIPS.
    """

    def __init__(
        self, model: nn.Module, learning_rate: float = 1e-3, redundancy: float | None = None, every: int = 1000
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be a number of batches, at least 1; got {every!r}")
        super().__init__(model, learning_rate, redundancy)
        self.every, self._batches = every, 0
        self._begun = [parameter.detach().clone() for parameter in self._learning]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As ETA's, but first begin anew where it is time."""
        if self._batches == self.every:
            self._batches, self.kept_mean = 0, None
            self.optimizer.state.clear()
            with torch.no_grad():
                for parameter, begun in zip(self._learning, self._begun, strict=True):
                    parameter.copy_(begun)
        self._batches += 1
        return super().forward(*args, **kwargs)


def redundancy_threshold(classes: int) -> float:
    """EATA's e for a number of classes: its .4 for 10, its .05 for 1,000, the power of K through both between them."""
    (few, high), (many, low) = _FEW, _MANY
    share = min(max(math.log(classes / few) / math.log(many / few), 0.0), 1.0)
    return float(high * (low / high) ** share)


def _entropy(logits: Tensor) -> Tensor:
    """Entropy (n,) of the softmax of logits (n, K), in nats."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def _usable(value: Any) -> Any:
    """An argument that gradients can pass by: a tensor made in inference mode is copied."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _own_parameters(model: nn.Module, learning: set[int]) -> list[nn.Parameter]:
    """Replace every Parameter by one of `model`'s own; those of the modules `learning` (ids) are copied and returned.

    The others share their values with the original and need no gradient. Ties between layers stay.
    """
    learns = {id(p) for m in model.modules() if id(m) in learning for p in m._parameters.values() if p is not None}
    own: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in own:
                data = parameter.detach()
                data = data.clone() if id(parameter) in learns or data.is_inference() else data
                own[id(parameter)] = nn.Parameter(data, requires_grad=id(parameter) in learns)
            module._parameters[name] = own[id(parameter)]
    return [parameter for parameter in own.values() if parameter.requires_grad]
