"""The error types: one for each way in which a caller would act differently.

All derive from `NormadaptError`, and from `ValueError` because the cause is always something
that was passed in. Numerical trouble in a stream is never an exception: it is a status in the report.
"""


class NormadaptError(ValueError):
    """Base of every error that normadapt raises on purpose."""


class UnsupportedLayerError(NormadaptError):
    """The model has no layer to adapt, or one that cannot be adapted with what was given."""


class ProfileMismatchError(NormadaptError):
    """A source profile (or a file of one) does not belong to the model it is used with."""


class PredictionsError(NormadaptError):
    """Class probabilities are needed and cannot be taken from the model's output."""


class SnapshotError(NormadaptError):
    """A snapshot cannot be restored into this adapted model."""


class SpecError(NormadaptError):
    """A MODEL or DATA argument of the command line cannot be resolved."""


class StoreError(NormadaptError):
    """A store of snapshots cannot be used: damaged, gone, full, read-only, or not one of ours."""


class StoreLockedError(StoreError):
    """Another writer holds the store; trying again later may succeed."""


class PlanError(NormadaptError):
    """A pilot's plan is refused."""


class ExtraMissingError(NormadaptError):
    """An optional part of the library is asked for and what it needs is not installed."""
