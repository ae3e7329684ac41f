"""Model in, smaller model out: techniques, the recipes that name them, and the kernels that run the result."""

from hasten.compress.kernels import LinearKernel, Packed, available, fastest
from hasten.compress.mla import ToMLA
from hasten.compress.precision import PackedLinear, WeightPrecision
from hasten.compress.recipe import Plan, Recipe
from hasten.compress.technique import LayerReport, Technique, TechniqueReport, exportable, register, sqnr

__all__ = [
    "LayerReport",
    "LinearKernel",
    "Packed",
    "PackedLinear",
    "Plan",
    "Recipe",
    "Technique",
    "TechniqueReport",
    "ToMLA",
    "WeightPrecision",
    "available",
    "exportable",
    "fastest",
    "register",
    "sqnr",
]
