"""What all requests of one server share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hasten.errors import EngineDeadError, RequestError
from hasten.language.tokenizer import Tokenizer
from hasten.serve.front import AsyncEngine, EngineInfo
from hasten.serve.replicas import Replicas

__all__ = ["ModelNotFoundError", "ServerState"]


class ModelNotFoundError(RequestError):
    """The request names a model that this server does not serve."""


@dataclass
class ServerState:
    """The engine and the settings of the HTTP interface."""

    engine: AsyncEngine | Replicas
    wall_clock: Callable[[], float]
    """seconds since 1970, for ``created``"""
    strftime: Callable[[str], str]
    """the date, for chat templates that ask for it"""
    api_key: str | None = None
    """what requests must bear, None for anybody"""
    metrics_prefix: str = "hasten_"
    """before every metric's name"""
    chat_template: str | None = None
    """used instead of the model's own"""
    served_name: str | None = None
    """name of the model towards clients"""
    max_body: int = 8 << 20
    """bytes that the body of a request may have"""
    defaults: dict[str, Any] = field(default_factory=dict)
    """sampling knobs for requests that leave them open"""
    begun: int = 0
    """when the server started, seconds since 1970"""

    @property
    def info(self) -> EngineInfo:
        """What the engine said of itself."""
        if self.engine.info is None:
            raise EngineDeadError("the engine is not ready; try again in a moment")
        return self.engine.info

    @property
    def name(self) -> str:
        """The model's name towards clients."""
        return self.served_name or self.info.name

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.info.tokenizer

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self.info.max_model_len

    def check_model(self, name: str | None) -> None:
        """Raise :class:`ModelNotFoundError` for a model that is not served here; None and "" mean the one that is."""
        if name and name not in (self.name, self.info.name, self.engine.config.model):
            raise ModelNotFoundError(f"model {name[:80]!r} is not served here; this server has {self.name!r}", "model")
