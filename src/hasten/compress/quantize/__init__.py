"""Numbers in fewer bits: formats, how their ranges are found, and the techniques that put a model into them."""

from hasten.compress.quantize.aware import QuantizeAware
from hasten.compress.quantize.compare import ModelComparison, compare
from hasten.compress.quantize.equalise import Equalise
from hasten.compress.quantize.fitted import FitRanges
from hasten.compress.quantize.fold import FoldBatchNorm, fold_batch_norm
from hasten.compress.quantize.formats import (
    FP8_E4M3,
    FP8_E5M2,
    MXFP4,
    NF4,
    NVFP4,
    Binary,
    BinaryCode,
    BlockFloat,
    Codebook,
    Format,
    Int,
    KMeans,
    MiniFloat,
    Quantized,
    Ternary,
    power_of_two_format,
)
from hasten.compress.quantize.gptq import gptq, hessian_of
from hasten.compress.quantize.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from hasten.compress.quantize.layers import ActivationQuantizer, IntegerLinear, QuantizedLayer, Simulated
from hasten.compress.quantize.observers import (
    Entropy,
    LsqInit,
    MinMax,
    MovingAverage,
    Mse,
    Observer,
    Percentile,
    Watch,
)
from hasten.compress.quantize.reconstruct import BlockReconstruction
from hasten.compress.quantize.rounding import BiasCorrection, Gptq, LearnedRounding
from hasten.compress.quantize.smooth import SmoothQuant
from hasten.compress.quantize.store import load, save
from hasten.compress.quantize.technique import SCHEMES, Quantize
from hasten.compress.quantize.zero_shot import zero_shot_inputs

__all__ = [
    "ActivationQuantizer",
    "BiasCorrection",
    "Binary",
    "BinaryCode",
    "BlockFloat",
    "BlockReconstruction",
    "Codebook",
    "Entropy",
    "Equalise",
    "FP8_E4M3",
    "FP8_E5M2",
    "FitRanges",
    "FoldBatchNorm",
    "Format",
    "Gptq",
    "Granularity",
    "Int",
    "IntegerLinear",
    "KMeans",
    "LearnedRounding",
    "LsqInit",
    "MXFP4",
    "MinMax",
    "MiniFloat",
    "ModelComparison",
    "MovingAverage",
    "Mse",
    "NF4",
    "NVFP4",
    "Observer",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Percentile",
    "Quantize",
    "QuantizeAware",
    "Quantized",
    "QuantizedLayer",
    "SCHEMES",
    "Simulated",
    "SmoothQuant",
    "Ternary",
    "Watch",
    "compare",
    "fold_batch_norm",
    "gptq",
    "hessian_of",
    "load",
    "power_of_two_format",
    "save",
    "zero_shot_inputs",
]
