"""Models that run without torch: one memory-mapped file of compressed tensors and a flat program over numpy.

Nothing here imports torch, so a process that only classifies is ready in the time that numpy takes to load. Files are
written by :mod:`hasten.compress.container`.
"""

from hasten.frozen.container import Container, Stored, write_container
from hasten.frozen.runner import Frozen, load

__all__ = ["Container", "Frozen", "Stored", "load", "write_container"]
