from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_models import cnn, images, rows, transformer
from torch import nn

from hasten.compress.quantize import (
    MXFP4,
    NF4,
    NVFP4,
    BinaryCode,
    Int,
    KMeans,
    MiniFloat,
    PerChannel,
    PerGroup,
    PerToken,
    Quantize,
    Ternary,
    load,
    save,
)
from hasten.compress.quantize.bits import pack_bits, packed_bytes, unpack_bits
from hasten.compress.recipe import Recipe
from hasten.errors import DataError, ModelLoadError

pytestmark = pytest.mark.usefixtures("one_thread", "known_times")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 1001])
def test_bits_come_back(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes, bits)
    assert len(packed) == packed_bytes(count, bits)
    assert torch.equal(unpack_bits(packed, bits, count), codes)


def mlp() -> nn.Sequential:
    """A million parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))


@pytest.mark.parametrize(
    ("fmt", "share"),
    [(Int(8, PerChannel(0)), 0.27), (Int(4, PerGroup(1, 32)), 0.16), (Int(2, PerGroup(1, 32)), 0.09), (NVFP4, 0.15)],
    ids=str,
)
def test_bytes_on_disk(fmt: Any, share: float, tmp_path: Path) -> None:
    model = mlp()
    file = save(Quantize(fmt, real="never")(model), tmp_path)
    assert file.stat().st_size <= share * 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "technique",
    [
        Quantize(Int(8, PerChannel(0)), Int(8, symmetric=False)),
        Quantize(Int(3, PerGroup(1, 20), symmetric=False)),
        Quantize(MiniFloat(3, 2), MiniFloat(4, 3)),
        Quantize(NVFP4),
        Quantize(MXFP4),
        Quantize(NF4),
        Quantize(KMeans(3)),
        Quantize(BinaryCode(2)),
        Quantize(Ternary()),
        Quantize(Int(12)),
        Quantize(None, Int(8, PerToken(), dynamic=True)),
        Quantize(Int(4), skip=("*.q", "11")),
    ],
    ids=lambda t: t.label,
)
def test_a_saved_model_comes_back_bit_for_bit(technique: Quantize, tmp_path: Path) -> None:
    for number, (model, x) in enumerate(((cnn(), images(8)), (transformer(), rows(2)))):
        names = [n for n, _ in model.named_modules()]
        skip = tuple(s for s in technique.skip if (s == "11") == (number == 0))
        small = Quantize(technique.weight, technique.activation, skip=skip)(model, [x])
        folder = tmp_path / str(number)
        save(small, folder)
        again = load(folder, model)
        with torch.inference_mode():
            assert torch.equal(again(x), small(x))
        assert [n for n, _ in model.named_modules()] == names
        assert Recipe.load(folder / "recipe.yaml") == small.recipe
        assert not list(folder.glob(".*"))


def test_real_kernels_come_back(tmp_path: Path) -> None:
    x = torch.randn(3, 512)
    for name in ("W8A8", "W8A16", "W4A16", "W4A8"):
        small = Quantize.scheme(name, real="always")(mlp(), [x])
        save(small, tmp_path / name)
        again, plain = load(tmp_path / name, mlp()), load(tmp_path / name, mlp(), kernels=False)
        with torch.inference_mode():
            assert torch.equal(again(x), small(x))
            assert float((plain(x) - small(x)).norm() / small(x).norm()) < 2e-2
        assert [type(m) for m in again] == [type(m) for m in small]  # type: ignore[union-attr]


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Embedding(256, 64), nn.Linear(64, 64)
            self.head = nn.Linear(64, 256, bias=False)
            self.head.weight = self.embed.weight

    small = Quantize(Int(8, PerChannel(0)))(Tied())
    file = save(small, tmp_path)
    assert file.stat().st_size < 256 * 64 * 4 + 64 * 64 * 2
    again: Any = load(tmp_path, Tied())
    assert again.head.weight is again.embed.weight
    assert torch.equal(again.embed.weight, small.embed.weight)  # type: ignore[arg-type,union-attr]


def test_files_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    save(Quantize(Int(8))(nn.Sequential(nn.Linear(4, 4))), tmp_path)
    cases = [
        (tmp_path / "absent", nn.Sequential(nn.Linear(4, 4)), "cannot be read"),
        (tmp_path, nn.Sequential(nn.Linear(5, 4)), r"layer '0' .* has shape \(4, 4\), the model's \(4, 5\)"),
        (tmp_path, nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "differ in"),
        (tmp_path, nn.Sequential(nn.ReLU()), "cannot be restored"),
    ]
    for folder, model, message in cases:
        with pytest.raises(ModelLoadError, match=message) as caught:
            load(folder, model)
        assert "\n" not in str(caught.value)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load(tmp_path, nn.Sequential(nn.Linear(4, 4)))
    place = tmp_path / "file"
    place.write_text("x")
    with pytest.raises(DataError, match="was not written"):
        save(Quantize(Int(8))(nn.Sequential(nn.Linear(4, 4))), place)
