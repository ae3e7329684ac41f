"""The number formats, in one place."""

from hasten.compress.quantize.base import Format, Quantized
from hasten.compress.quantize.blocks import MXFP4, NVFP4, BlockFloat
from hasten.compress.quantize.codebook import NF4, Binary, BinaryCode, Codebook, KMeans, Ternary, power_of_two_format
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.minifloat import FP8_E4M3, FP8_E5M2, MiniFloat

__all__ = [
    "FP8_E4M3",
    "FP8_E5M2",
    "MXFP4",
    "NF4",
    "NVFP4",
    "Binary",
    "BinaryCode",
    "BlockFloat",
    "Codebook",
    "Format",
    "Int",
    "KMeans",
    "MiniFloat",
    "Quantized",
    "Ternary",
    "power_of_two_format",
]
