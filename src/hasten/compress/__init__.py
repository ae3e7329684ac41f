"""Model in, smaller model out: techniques, the recipes that name them, and the kernels that run the result.

What stands below ``TYPE_CHECKING`` is imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from hasten.compress.kernels import LinearKernel, Packed, available, fastest
from hasten.compress.mla import ToMLA
from hasten.compress.precision import PackedLinear, WeightPrecision
from hasten.compress.recipe import Plan, Recipe
from hasten.compress.technique import LayerReport, Technique, TechniqueReport, exportable, register, sqnr

if TYPE_CHECKING:
    from hasten.compress.acm import ACM, AdaptiveComputation
    from hasten.compress.cluster import Clustering
    from hasten.compress.deep import DeepCompression
    from hasten.compress.export import Exported, export_onnx, export_program
    from hasten.compress.fused import FusedModule, FusedNetwork
    from hasten.compress.int8 import Int8Network, IntegerNetwork
    from hasten.compress.lowrank.fourbit import SvdQuantLinear, set_execution
    from hasten.compress.lowrank.layers import FactorConv2d, LowRankLinear
    from hasten.compress.lowrank.maestro import Maestro
    from hasten.compress.lowrank.modular import ModularDecomposition, Pair, decompose_pair
    from hasten.compress.lowrank.stages import Stages, stages
    from hasten.compress.lowrank.svdquant import SvdQuant, add_lora, load_svdquant, save_svdquant
    from hasten.compress.lowrank.truncated import TruncatedSvd
    from hasten.compress.prune import MagnitudePruning
    from hasten.compress.quantize import (
        FP8_E4M3,
        FP8_E5M2,
        MXFP4,
        NF4,
        NVFP4,
        BiasCorrection,
        Binary,
        BinaryCode,
        BlockReconstruction,
        Codebook,
        Entropy,
        Equalise,
        FitRanges,
        Gptq,
        Int,
        KMeans,
        LearnedRounding,
        LsqInit,
        MiniFloat,
        MinMax,
        MovingAverage,
        Mse,
        Percentile,
        PerChannel,
        PerGroup,
        PerTensor,
        PerToken,
        Quantize,
        QuantizeAware,
        SmoothQuant,
        Ternary,
        load,
        save,
        zero_shot_inputs,
    )
    from hasten.compress.quantize.allocate import BitPlan, MixedPrecision
    from hasten.compress.quantize.augmented import AugmentedHessian
    from hasten.compress.quantize.bisect import BisectPrecision
    from hasten.compress.quantize.compare import compare
    from hasten.compress.quantize.layer_latency import layer_latency
    from hasten.compress.quantize.mixed import MixedQuantize
    from hasten.compress.quantize.selection import RowGroups, head_groups
    from hasten.compress.quantize.sensitivity import HessianSpectrum

__all__ = [
    "ACM",
    "AdaptiveComputation",
    "AugmentedHessian",
    "BiasCorrection",
    "Binary",
    "BinaryCode",
    "BisectPrecision",
    "BitPlan",
    "BlockReconstruction",
    "Clustering",
    "Codebook",
    "DeepCompression",
    "Exported",
    "Entropy",
    "Equalise",
    "FP8_E4M3",
    "FP8_E5M2",
    "FactorConv2d",
    "FitRanges",
    "FusedModule",
    "FusedNetwork",
    "Gptq",
    "HessianSpectrum",
    "Int",
    "Int8Network",
    "IntegerNetwork",
    "KMeans",
    "LayerReport",
    "LearnedRounding",
    "LinearKernel",
    "LowRankLinear",
    "LsqInit",
    "MXFP4",
    "Maestro",
    "MagnitudePruning",
    "MinMax",
    "MiniFloat",
    "MixedPrecision",
    "MixedQuantize",
    "ModularDecomposition",
    "MovingAverage",
    "Mse",
    "NF4",
    "NVFP4",
    "Packed",
    "PackedLinear",
    "Pair",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Percentile",
    "Plan",
    "Quantize",
    "QuantizeAware",
    "Recipe",
    "RowGroups",
    "SmoothQuant",
    "Stages",
    "SvdQuant",
    "SvdQuantLinear",
    "Technique",
    "TechniqueReport",
    "Ternary",
    "ToMLA",
    "TruncatedSvd",
    "WeightPrecision",
    "add_lora",
    "available",
    "compare",
    "decompose_pair",
    "export_onnx",
    "export_program",
    "exportable",
    "fastest",
    "head_groups",
    "layer_latency",
    "load",
    "load_svdquant",
    "register",
    "save",
    "save_svdquant",
    "set_execution",
    "sqnr",
    "stages",
    "zero_shot_inputs",
]

_LATER = {
    "hasten.compress.acm": (
        "ACM",
        "AdaptiveComputation",
    ),
    "hasten.compress.cluster": ("Clustering",),
    "hasten.compress.deep": ("DeepCompression",),
    "hasten.compress.export": (
        "Exported",
        "export_onnx",
        "export_program",
    ),
    "hasten.compress.fused": (
        "FusedModule",
        "FusedNetwork",
    ),
    "hasten.compress.int8": (
        "Int8Network",
        "IntegerNetwork",
    ),
    "hasten.compress.lowrank.fourbit": (
        "SvdQuantLinear",
        "set_execution",
    ),
    "hasten.compress.lowrank.layers": (
        "FactorConv2d",
        "LowRankLinear",
    ),
    "hasten.compress.lowrank.maestro": ("Maestro",),
    "hasten.compress.lowrank.modular": (
        "ModularDecomposition",
        "Pair",
        "decompose_pair",
    ),
    "hasten.compress.lowrank.stages": (
        "Stages",
        "stages",
    ),
    "hasten.compress.lowrank.svdquant": (
        "SvdQuant",
        "add_lora",
        "load_svdquant",
        "save_svdquant",
    ),
    "hasten.compress.lowrank.truncated": ("TruncatedSvd",),
    "hasten.compress.prune": ("MagnitudePruning",),
    "hasten.compress.quantize": (
        "FP8_E4M3",
        "FP8_E5M2",
        "MXFP4",
        "NF4",
        "NVFP4",
        "BiasCorrection",
        "Binary",
        "BinaryCode",
        "BlockReconstruction",
        "Codebook",
        "Entropy",
        "Equalise",
        "FitRanges",
        "Gptq",
        "Int",
        "KMeans",
        "LearnedRounding",
        "LsqInit",
        "MinMax",
        "MiniFloat",
        "MovingAverage",
        "Mse",
        "PerChannel",
        "PerGroup",
        "PerTensor",
        "PerToken",
        "Percentile",
        "Quantize",
        "QuantizeAware",
        "SmoothQuant",
        "Ternary",
        "load",
        "save",
        "zero_shot_inputs",
    ),
    "hasten.compress.quantize.compare": ("compare",),
    "hasten.compress.quantize.allocate": (
        "BitPlan",
        "MixedPrecision",
    ),
    "hasten.compress.quantize.augmented": ("AugmentedHessian",),
    "hasten.compress.quantize.bisect": ("BisectPrecision",),
    "hasten.compress.quantize.layer_latency": ("layer_latency",),
    "hasten.compress.quantize.mixed": ("MixedQuantize",),
    "hasten.compress.quantize.selection": (
        "RowGroups",
        "head_groups",
    ),
    "hasten.compress.quantize.sensitivity": ("HessianSpectrum",),
}
_WHERE = {name: module for module, held in _LATER.items() for name in held}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
