"""The hooks by which a model's normalization layers are watched and written, put on a copy and taken off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from normadapt.errors import UnsupportedLayerError
from normadapt.layers.batches import check_model
from normadapt.layers.policy import Source, units_about
from normadapt.layers.sites import Site, find_sites, layer_input, shared_copy
from normadapt.types import Buffers


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
    """

    def __init__(self, index: int, site: Site, source: Source) -> None:
        self.index = index
        self.site = site
        self.source = source
        self.current: Visitor | None = None
        self._channels = source.mean.shape[0]
        self._installed: tuple[Buffers, Buffers, int, int] | None = None

    def install(self, buffers: Buffers) -> None:
        """Write copies of these tensors into the layer, unless they are there and nobody has written into them.

        What a layer holds may be written to by anybody: `reset_running_stats`, DDP's broadcast, whoever has its
        state_dict. So no layer ever holds the tensors that a stream or the source is remembered by.
        """
        mean, variance = self.site.buffers()
        known = self._installed
        if (
            known is not None
            and mean is not None
            and variance is not None
            and known[0] is buffers
            and known[1][0] is mean
            and known[1][1] is variance
            and (mean._version, variance._version) == known[2:]
        ):
            return
        with outside_autograd():
            written = buffers[0].clone(), buffers[1].clone()
        self.site.write(*written)
        self._installed = buffers, written, written[0]._version, written[1]._version

    def install_source(self) -> None:
        """Write the source's own statistics into the layer, or none where it kept none."""
        self._installed = None
        if self.site.tracked:
            with outside_autograd():
                self.site.write(*(buffer.clone() for buffer in self.source.original))
        else:
            self.site.write(None, None)

    def take_source(self, mean: Tensor, variance: Tensor) -> None:
        """Take measured moments (C,) for the source's statistics, where the layer keeps none."""
        weight = getattr(self.site.module, "weight", None)
        like = weight if isinstance(weight, Tensor) else torch.zeros((), device=mean.device)
        about = self.source
        self.source = _source(about.site_index, self.site, about.site_count, mean.to(like), variance.to(like), None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_installed": None, "current": None}

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


def hooked_copy(model: nn.Module, profile: Any, *, verb: str) -> tuple[nn.Module, list[SiteHook]]:
    """A copy of `model` in eval mode that shares its parameters, with a hook on every site.

    Args:
        model: The model.
        profile: A `profiles.SourceProfile` of it, or None.
        verb: The function on whose behalf this is asked; for messages.

    Raises:
        UnsupportedLayerError, ProfileMismatchError: As `normadapt.adapt`.
    """
    check_model(model, verb)
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
        hook.install(hook.source.original)
    return copy, hooks


def measuring_copy(model: nn.Module, *, verb: str) -> tuple[nn.Module, list[SiteHook]]:
    """As `hooked_copy` without a profile, for measuring one: layers without running statistics wait for `take_source`.

    Raises:
        UnsupportedLayerError: If the model has no normalization layer.
    """
    copy = shared_copy(model)
    sites = find_sites(copy, with_profile=True, verb=verb)
    hooks = []
    for index, site in enumerate(sites):
        mean, variance = site.buffers()
        if mean is None or variance is None:
            weight = site.channel_weight()
            mean, variance = weight.new_zeros(site.channels), weight.new_ones(site.channels)
            site.module._non_persistent_buffers_set |= {"running_mean", "running_var"}
        hooks.append(SiteHook(index, site, _source(index, site, len(sites), mean, variance, None)))
    for hook in hooks:
        hook.site.module.register_forward_pre_hook(hook, with_kwargs=True)
    return copy, hooks


def _make_hook(index: int, site: Site, count: int, profile: Any) -> SiteHook:
    measured = None if profile is None else profile.sites.get(site.name)
    mean, variance = site.buffers()
    if mean is None or variance is None:
        if measured is None:
            raise UnsupportedLayerError(
                f"adapt() cannot use {site.name!r}: it keeps no running statistics, and the profile's source data "
                "never reached it"
            )
        weight = site.channel_weight()
        like = getattr(site.module, "weight", None)
        like = like if isinstance(like, Tensor) else weight.float()
        mean, variance = measured.mean.to(like), measured.variance.to(like)
        site.module._non_persistent_buffers_set |= {"running_mean", "running_var"}  # state_dict keys stay
    return SiteHook(index, site, _source(index, site, count, mean, variance, profile))


def _source(index: int, site: Site, count: int, mean: Tensor, variance: Tensor, profile: Any) -> Source:
    weight = site.channel_weight()
    original = mean.detach().clone(), variance.detach().clone()
    m_s, v_s = original[0].double(), original[1].double()
    measured = None if profile is None else profile.sites.get(site.name)
    return Source(
        name=site.name,
        mean=m_s,
        variance=v_s,
        eps=site.eps,
        channel_weight=weight,
        share=weight / weight.sum(),
        sum_weight=(float(weight.sum()), float((weight * weight).sum())),
        units=units_about(m_s, v_s, site.eps),
        original=original,
        profile=profile,
        spread=None if measured is None else measured.spread(weight),
        site_index=index,
        site_count=count,
    )


def are_profiled(hooks: list[SiteHook]) -> bool:
    """Whether there is a source profile."""
    return any(hook.source.profile is not None for hook in hooks)


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
