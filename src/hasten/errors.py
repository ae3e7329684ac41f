"""Every error that hasten raises on purpose.

The tree::

    HastenError
    ├── BudgetError          (ValueError)   a budget, an SLO or a unit that cannot be read
    ├── ConfigurationError   (ValueError)   knobs that contradict each other or leave their bounds
    ├── DataError            (ValueError)   a data file, trace or corpus that cannot be used
    │   └── CorruptPostingError             a posting list of a vector index whose checksum is wrong
    ├── ModelError                          a model folder that cannot be used
    │   ├── ModelLoadError                  missing, truncated or corrupt files
    │   └── UnsupportedModelError           an architecture or feature that is not implemented
    ├── CacheError                          the KV cache
    │   └── OutOfBlocksError                no free block; ask ``can_grow`` first
    ├── RequestError         (ValueError)   one request is at fault, the engine is well
    │   ├── ContextLengthError              prompt (and answer) longer than the model or the cache
    │   └── InvalidRequestError             a field that is out of its bounds
    ├── OverloadedError                     the bounded queue is full; retry later
    ├── EngineError                         the engine is at fault
    │   ├── EngineDeadError                 the engine process ended
    │   └── EngineStoppingError             draining; no new request is taken
    └── MissingExtraError    (ImportError)  an optional package is not installed

Beside it :class:`DataWarning` (UserWarning): the result is sound, and less good than with more data.

A message holds the value received, what was expected, and the next step, on one line.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CacheError",
    "ConfigurationError",
    "ContextLengthError",
    "CorruptPostingError",
    "DataError",
    "DataWarning",
    "EngineDeadError",
    "EngineError",
    "EngineStoppingError",
    "HastenError",
    "InvalidRequestError",
    "MissingExtraError",
    "ModelError",
    "ModelLoadError",
    "OutOfBlocksError",
    "OverloadedError",
    "RequestError",
    "UnsupportedModelError",
]


class HastenError(Exception):
    """Root of the tree; ``except HastenError`` catches everything raised on purpose."""


class BudgetError(HastenError, ValueError):
    """A budget, an SLO or a unit that cannot be read."""


class ConfigurationError(HastenError, ValueError):
    """Knobs that contradict each other or leave their bounds."""


class DataError(HastenError, ValueError):
    """A data file, trace or corpus that cannot be used."""


class DataWarning(UserWarning):
    """Data from which less can be learnt than was asked for; the result is still sound."""


class CorruptPostingError(DataError):
    """A posting list of a vector index does not have the bytes that were written; ``lists`` names the ones at fault."""

    def __init__(self, message: str, lists: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.lists = lists


class ModelError(HastenError):
    """A model folder that cannot be used."""


class ModelLoadError(ModelError):
    """Missing, truncated or corrupt files."""


class UnsupportedModelError(ModelError):
    """An architecture or feature that is not implemented."""


class CacheError(HastenError):
    """The KV cache was used against its contract."""


class OutOfBlocksError(CacheError):
    """No free block is left; ask ``can_grow`` first."""


class RequestError(HastenError, ValueError):
    """One request is at fault, the engine is well.

    ``param`` names the field at fault where one can be named.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """Prompt (and answer) longer than the model or the cache can hold."""


class InvalidRequestError(RequestError):
    """A request field out of its bounds."""


class OverloadedError(HastenError):
    """The bounded queue is full. ``retry_after`` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(HastenError):
    """The engine is at fault, not the request."""


class EngineDeadError(EngineError):
    """The engine process ended unexpectedly."""


class EngineStoppingError(EngineError):
    """The engine drains: running requests finish, no new one is taken."""


class MissingExtraError(HastenError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'hasten[{extra}]'")
        self.package = package
        self.extra = extra
