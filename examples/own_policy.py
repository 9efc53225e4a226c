"""A policy of one's own: the statistics of all batches so far, each batch as heavy as the source itself."""

import normadapt as na


class EqualShares(na.Policy):
    """The source and every batch so far count alike."""

    def init(self, source):
        """What to remember before any batch: a count, a mean and a variance."""
        return 1.0, source.mean, source.variance

    def step(self, state, evidence, source):
        """One batch more: the new memory, and the statistics to normalize this batch with."""
        count, mean, variance = state
        mean = mean + (evidence.mean - mean) / (count + 1)
        variance = variance + (evidence.variance - variance) / (count + 1)
        return (count + 1.0, mean, variance), na.Statistics(mean, variance)
