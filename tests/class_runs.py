"""Labels of streams, independent or in runs of one class, and where ten classes lie."""

import torch

CHANNELS, CLASSES = 6, 10


def centres(dtype):
    """Centres of the classes (K, C), of unit variance between them."""
    raw = torch.randn(CLASSES, CHANNELS, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return (raw - raw.mean(0)) / raw.std(0, correction=0)


def draws(n, seed):
    return torch.randint(CLASSES, (n,), generator=torch.Generator().manual_seed(10_000 + seed))


def in_runs(n, seed):
    g = torch.Generator().manual_seed(20_000 + seed)
    lengths = torch.randint(10, 41, (n // 10 + 1,), generator=g)
    return torch.randint(CLASSES, lengths.shape, generator=g).repeat_interleave(lengths)[:n]
