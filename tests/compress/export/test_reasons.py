"""What cannot be lowered is named: the layer, and the operator or the line of its code."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hasten.compress.export import export_onnx, export_program
from hasten.compress.export.reasons import first_line
from hasten.errors import ModelError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x.unsqueeze(-1) * x.unsqueeze(-2)).abs()


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Halving(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while x.abs().max() > 1:
            x = x / 2
        return x


class Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().sum().item()) % 3 + 1):
            x = x + 1
        return x


class Broken(nn.Module):
    def forward(this, x: Tensor) -> Tensor:  # noqa: N805
        return x if not torch.compiler.is_exporting() else this.absent(x)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, 2, 2)


@pytest.mark.parametrize(
    ("layer", "operator", "rows"),
    [(Spectrum, "linalg_eig", 3), (Bessel, "special_bessel_j0", 3), (Bessel, "special_bessel_j0", 1)],
)
def test_an_operator_without_translation(layer: type[nn.Module], operator: str, rows: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer())
    with pytest.raises(ModelError) as caught:
        export_onnx(model, X[:rows], tmp_path / "a.onnx")  # a batch of one is no free dimension for a tracer
    said = str(caught.value)
    assert f"layer '1' ({layer.__name__}) uses aten.{operator}," in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("layer", "line"), [(Halving, "while x.abs().max() > 1:"), (Counting, "for _ in range(int(")])
def test_a_loop_that_depends_on_values(
    layer: type[nn.Module], line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), layer()))
    for write, name in ((export_onnx, "a.onnx"), (export_program, "a.pt2")):
        with pytest.raises(ModelError) as caught:
            write(model, X * 10, tmp_path / name)
        said = str(caught.value)
        assert f"layer '1.1' ({layer.__name__}) goes on by the values of a tensor in `{line}" in said
        assert "\n" not in said
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""  # no graph is printed beside the line


def test_an_error_of_the_model_itself(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"the model itself \(Broken\) stops the tracer in `.*this\.absent\(x\)`: .*absent"
    ):
        export_program(Broken(), X, tmp_path / "a.pt2")


def test_a_model_that_fixes_its_batch_is_written_with_a_note(tmp_path: Path) -> None:
    done = export_onnx(nn.Sequential(nn.Linear(4, 4), Fixed()), X, tmp_path / "a.onnx")
    assert "first dimension of 3 only" in done.notes[-1]
    assert not export_onnx(nn.Linear(4, 4), X, tmp_path / "b.onnx").notes


def test_exports_leave_no_marks_on_the_example(tmp_path: Path) -> None:
    before = set(vars(X))
    with pytest.raises(ModelError):
        export_onnx(nn.Sequential(nn.Linear(4, 4), Spectrum()), X, tmp_path / "a.onnx")
    assert set(vars(X)) == before


def test_the_first_line() -> None:
    assert first_line(ValueError("\n  one.\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
