"""The hooks by which a model's normalization layers are watched and written, put on a copy and taken off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from normadapt.batches import check_model
from normadapt.errors import UnsupportedLayerError
from normadapt.policies.base import Source, units_about
from normadapt.profile import SourceProfile
from normadapt.sites import Site, find_sites, layer_input, shared_copy

Buffers = tuple[Tensor, Tensor]
"""A running_mean and running_var (C,), in the layer's own dtype."""


class Visitor(Protocol):
    """What a hook calls on the way: something that sees every site's input during one forward pass."""

    def step(self, hook: SiteHook, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Look at a site's input (n, C, ...); return an affine map (scale, offset) (n, C) of it, or None."""


@contextmanager
def _outside_inference() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():  # leaving inference mode alone switches gradients on
        yield


def outside_autograd() -> AbstractContextManager[Any]:
    """Context for all work on state: no gradients, and no inference tensors, which later forwards could not use."""
    if torch.is_inference_mode_enabled():
        return _outside_inference()
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


class SiteHook:
    """The forward-pre-hook of one site: shows the input to whoever is at work, then lets the layer do its own.

    Does nothing when nobody is, so the inner model alone keeps the statistics that it has.

    Args:
        index: The site's place in the model's order.
        site: The layer.
        source: Its source statistics, in float64.
        original: Its own buffers before any adaptation.
    """

    def __init__(self, index: int, site: Site, source: Source, original: Buffers) -> None:
        self.index = index
        self.site = site
        self.source = source
        self.original = original
        self.current: Visitor | None = None
        self._channels = source.mean.shape[0]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Called by torch just before the layer's forward; returns other arguments for it, or None for the same."""
        if self.current is None:
            return None
        x = layer_input(args, kwargs)
        if x.dim() < 2 or x.shape[1] != self._channels:
            return None  # the layer itself knows best what is wrong, and says so
        with outside_autograd():
            instances = self.current.step(self, x.detach())
        if instances is None:
            return None
        scale, offset = instances
        shape = (*scale.shape, *(1 for _ in range(x.dim() - 2)))
        moved = torch.addcmul(offset.view(shape), x, scale.view(shape))
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): moved})


def hooked_copy(model: nn.Module, profile: SourceProfile | None, *, verb: str) -> tuple[nn.Module, list[SiteHook]]:
    """A copy of `model` in eval mode that shares its parameters, with a hook on every site.

    Raises:
        UnsupportedLayerError, ProfileMismatchError: As `normadapt.adapt`.
    """
    check_model(model, verb)
    if profile is not None and not isinstance(profile, SourceProfile):
        hint = (
            "pass a policy by name: policy=..." if hasattr(profile, "step") else "read a file with SourceProfile.load"
        )
        raise TypeError(f"{verb} needs a SourceProfile as profile, got {type(profile).__name__} -> {hint}")
    find_sites(model, with_profile=profile is not None, verb=verb)  # complain before anything is copied
    if any(isinstance(hook, SiteHook) for m in model.modules() for hook in m._forward_pre_hooks.values()):
        raise UnsupportedLayerError(
            f"{verb} was given a model that is already adapted -> pass the original, or what freeze() returned"
        )
    if profile is not None:
        profile.check(model)
    copy = shared_copy(model)
    sites = find_sites(copy, with_profile=profile is not None, verb=verb)
    hooks = [_make_hook(index, site, len(sites), profile) for index, site in enumerate(sites)]
    for hook in hooks:
        hook.site.module.register_forward_pre_hook(hook, with_kwargs=True)
        hook.site.write(*hook.original)
    return copy, hooks


def _make_hook(index: int, site: Site, count: int, profile: SourceProfile | None) -> SiteHook:
    measured = None if profile is None else profile.sites.get(site.name)
    weight = site.channel_weight()
    mean, variance = site.buffers()
    if mean is None or variance is None:
        if measured is None:
            raise UnsupportedLayerError(
                f"adapt() cannot use {site.name!r}: it keeps no running statistics, and the profile's source data "
                "never reached it"
            )
        like = getattr(site.module, "weight", None)
        like = like if isinstance(like, Tensor) else weight.float()
        mean, variance = measured.mean.to(like), measured.variance.to(like)
        site.module._non_persistent_buffers_set |= {"running_mean", "running_var"}  # state_dict keys stay
    m_s, v_s = mean.detach().double(), variance.detach().double()
    source = Source(
        name=site.name,
        mean=m_s,
        variance=v_s,
        eps=site.eps,
        channel_weight=weight,
        share=weight / weight.sum(),
        sum_weight=(float(weight.sum()), float((weight * weight).sum())),
        spread=None if measured is None else measured.spread(weight),
        class_frequencies=None if profile is None else profile.class_frequencies,
        units=units_about(m_s, v_s, m_s, v_s, site.eps),
        site_index=index,
        site_count=count,
    )
    if measured is not None:
        about = measured.mean.to(m_s), measured.variance.to(m_s)
        aligned = units_about(*about, m_s, v_s, site.eps)._replace(uncertainty=1 / measured.count)
        source = source._replace(aligned=aligned)
    return SiteHook(index, site, source, (mean, variance))


def are_profiled(hooks: list[SiteHook]) -> bool:
    """Whether a profile says what the sources scatter."""
    return any(hook.source.spread is not None for hook in hooks)


def plain_copy(model: nn.Module) -> nn.Module:
    """An ordinary module with the statistics that the hooked `model` has now; parameters stay shared."""
    plain = shared_copy(model)
    for module in plain.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if not isinstance(hook, SiteHook):
                continue
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            if not hook.site.tracked:  # it kept no statistics; now it keeps these
                module._non_persistent_buffers_set -= {"running_mean", "running_var"}
                setattr(module, "track_running_stats", True)  # noqa: B010 (a plain attribute, not a submodule)
    return plain
