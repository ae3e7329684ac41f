"""A whole network in one call: float32, bfloat16 or bytes, without Python and torch between its operations."""

from hasten.compress.fused.network import FusedModule
from hasten.compress.fused.technique import FusedNetwork

__all__ = ["FusedModule", "FusedNetwork"]
