"""Networks: what a link delivers and when."""

from hasten.network.trace import Trace

__all__ = ["Trace"]
