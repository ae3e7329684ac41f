"""Convolutional networks in bytes from end to end: lowered, calibrated, and run by one compiled loop."""

from hasten.compress.int8.network import IntegerNetwork
from hasten.compress.int8.technique import Int8Network

__all__ = ["Int8Network", "IntegerNetwork"]
