"""The smallest model that can be adapted, so that a commit is hardly more than its writing; and forked writers."""

import os
import sys
import traceback
import warnings
from functools import cache

import torch
from torch import nn

import normadapt as na


def model(seed=0, channels=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, channels, 1), nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(4 * channels, 3))


@cache
def profile(seed=0):
    inputs = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(100))
    with warnings.catch_warnings(action="ignore"):  # the model was trained on nothing
        return na.profile_source(model(seed), [inputs])


def adapted(seed=0, policy=None, profiled=True):
    return na.adapt(model(seed), profile(seed) if profiled else None, policy)


def feed(adapted, seed=0, n=4):
    """One batch that moves the statistics."""
    with torch.no_grad():
        return adapted(torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) + 4)


def fork(work):
    """Run `work` in a child, whose exit code is 0, or 1 after an exception; returns its process id."""
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child):
    """Wait for a child; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
