"""Which number format for which accuracy and hardware: :func:`formats` tries them all on a model."""

from hasten.compress.quantize.explore import Candidate, FormatFront, formats

__all__ = ["Candidate", "FormatFront", "formats"]
