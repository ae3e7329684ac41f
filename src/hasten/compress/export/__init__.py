"""A compressed model as a file that other runtimes read: ONNX with QDQ nodes, or a ``torch.export`` program."""

from hasten.compress.export.check import Exported
from hasten.compress.export.onnx_file import export_onnx
from hasten.compress.export.program import export_program

__all__ = ["Exported", "export_onnx", "export_program"]
