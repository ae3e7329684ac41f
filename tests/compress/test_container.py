"""Files of tensors: exact for any content, whole or not at all, and a broken one is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hasten.compress.container import load_weights, save, stored_form
from hasten.compress.freeze import freeze
from hasten.compress.quantize.granularity import PerChannel, PerGroup
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.mixed import MixedQuantize
from hasten.compress.quantize.selection import RowGroups
from hasten.errors import ConfigurationError, DataError, ModelLoadError
from hasten.frozen import Container, Frozen, Stored, load, write_container
from hasten.frozen.container import encoded_size, pack_bits, unpack_bits


@given(st.integers(1, 16), st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50))
@settings(max_examples=60, deadline=None)
def test_bits_come_back(bits: int, values: list[int]) -> None:
    wanted = np.array(values) % 2**bits
    packed = pack_bits(wanted, bits)
    assert len(packed) == -(-len(values) * bits // 8)
    assert np.array_equal(unpack_bits(packed, bits, len(values)), wanted)


@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.5, -1.25, 3.0]), min_size=1, max_size=900),
    st.sampled_from(["none", "deflate", "huffman", "best"]),
)
@settings(max_examples=40, deadline=None)
def test_any_form_is_exact(values: list[float], encoding: str) -> None:
    tensor = np.array(values, np.float32)
    for form in (Stored.dense(tensor), Stored.codebook(tensor), Stored.sparse(tensor)):
        if form is not None:
            assert np.array_equal(form.decode(), tensor)
            assert encoded_size(form, encoding) > 0  # type: ignore[arg-type]


def test_long_gaps_and_many_values_of_a_sparse_tensor(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensor = np.zeros((40, 100), np.float32)
    places = rng.choice(4000, 5, replace=False)
    tensor.ravel()[places] = rng.normal(size=5)
    tensor[0, 0] = 1.0
    many = np.where(rng.random((50, 40)) < 0.5, rng.normal(size=(50, 40)), 0).astype(np.float32)
    forms = {"a": Stored.sparse(tensor), "b": Stored.sparse(many)}
    write_container(tmp_path / "x", forms, {"note": 1})  # type: ignore[arg-type]
    box = Container(tmp_path / "x")
    assert np.array_equal(box.tensor("a"), tensor)
    assert np.array_equal(box.tensor("b"), many)
    assert box.names == ("a", "b")
    assert box.meta == {"note": 1}
    assert encoded_size(forms["b"], "none") < many.nbytes  # type: ignore[arg-type]


def test_unencoded_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    tensor = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_container(tmp_path / "x", {"t": Stored.dense(tensor), "u": Stored.dense(tensor + 1)}, {}, "none")
    found = Container(tmp_path / "x").tensor("u")
    assert not found.flags.owndata
    assert not found.flags.writeable
    assert found.ctypes.data % 64 == 0
    assert np.array_equal(found, tensor + 1)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_container(path, {"first": Stored.dense(np.random.default_rng(0).normal(size=99).astype(np.float32))}, {})
    good = path.read_bytes()
    for place, message in ((len(good) - 5, "tensor 'first'"), (22, "damaged directory"), (0, "not a packed model")):
        bad = bytearray(good)
        bad[place] ^= 0xFF
        path.write_bytes(bytes(bad))
        with pytest.raises(ModelLoadError, match=message):
            Container(path).tensor("first")
    path.write_bytes(good[:-30])
    with pytest.raises(ModelLoadError, match="first"):
        Container(path).tensor("first")
    path.write_bytes(good[:30])
    with pytest.raises(ModelLoadError, match="damaged"):
        Container(path)
    path.write_bytes(b"")
    with pytest.raises(ModelLoadError, match="cannot be opened"):
        Container(path)
    path.write_bytes(good)
    with pytest.raises(ModelLoadError, match="no tensor 'second'"):
        Container(path).tensor("second")
    with pytest.raises(ModelLoadError, match="no program"):
        load(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_container(path, {"a": Stored.dense(np.ones(3, np.float32))}, {})
    old = path.read_bytes()
    with pytest.raises(DataError, match="was not written"):
        write_container(path / "inside", {}, {})
    assert path.read_bytes() == old
    with pytest.raises(ConfigurationError, match="zip"):
        write_container(path, {}, {}, "zip")  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "form",
    [Int(3, RowGroups(3, 2)), Int(4, PerGroup(1, 5)), Int(8, PerChannel(0), symmetric=False), Int(2, full_range=True)],
)
def test_integer_formats_are_stored_as_codes(form: Int) -> None:
    torch.manual_seed(0)
    found = form.quantize(torch.randn(40, 60))
    stored = stored_form(found.dequantize(), found)
    assert torch.equal(torch.from_numpy(np.array(stored.decode())), found.dequantize())
    assert encoded_size(stored, "best") <= 1.02 * form.stored_bits((40, 60)) / 8 + 16


def test_a_mixed_model_has_its_bits_on_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    formats = (("0.weight", Int(2, RowGroups(4, 4), full_range=True)), ("2.weight", Int(3, PerChannel(0))))
    x = torch.randn(32, 64)
    small = MixedQuantize(formats, (("2", Int(8)),))(model, [x])
    save(small, tmp_path, encoding="none")
    size = (tmp_path / "model.hasten").stat().st_size
    assert size < small.report.bytes_after + 128 * 4 + 1500, "codes, biases and a directory"
    again = load_weights(MixedQuantize(formats, (("2", Int(8)),))(model, [x]), tmp_path)
    assert torch.equal(again(x), small(x))


class Various(nn.Module):
    """Operations that small models use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, padding=1, stride=2)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.nn.functional.gelu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        place = torch.arange(y.shape[1]).float()[:, None] / 10
        y = self.norm(y + torch.sin(place) + self.attend(y, y, y, need_weights=False)[0])
        a, b = y.chunk(2, -1)
        return torch.softmax(self.out(torch.cat([a, b], -1).mean(1)), -1), y[:, 0].clamp(min=0)


def test_programs_compute_what_the_module_does() -> None:
    torch.manual_seed(0)
    convolution = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6), nn.SiLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(24, 2), nn.LogSoftmax(-1),
    )  # fmt: skip
    convolution[1].running_mean.normal_()
    for model, example in ((Various(), torch.randn(3, 12, 6)), (convolution, torch.randn(3, 2, 8, 8))):
        model.eval()
        program = freeze(model, (example,))
        assert program.batch is None
        arrays = {slot: program.tensors[name].numpy() for slot, name in program.slots}
        run = Frozen(program.steps, arrays, program.inputs, program.outputs)
        for batch in (1, 4):
            x = torch.randn(batch, *example.shape[1:])
            with torch.no_grad():
                wanted = model(x)
            found = run(x.numpy())
            for a, b in zip(*((v,) if not isinstance(v, tuple) else v for v in (wanted, found)), strict=True):
                assert np.allclose(a.numpy(), b, atol=2e-6)
    with pytest.raises(ConfigurationError, match="takes 1 inputs, got 2"):
        run(x.numpy(), x.numpy())


class Pairs(nn.Module):
    """Asks for its batch as a number; with another one, neighbours would be mixed in silence."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(int(x.shape[0]) // 2 if x.shape[0] > 2 else 1, -1)


def test_a_batch_that_the_model_fixes_is_refused_by_name(tmp_path: Path) -> None:
    save(Pairs(), tmp_path, torch.arange(8.0).view(2, 4))
    run = load(tmp_path)
    assert run(np.arange(8.0).reshape(2, 4)).shape == (1, 8)
    assert run.meta["batch_reason"]
    with pytest.raises(ConfigurationError, match="runs batches of 2, got 4"):
        run(np.arange(16.0).reshape(4, 4))


def test_what_the_runner_lacks_is_named_when_saving(tmp_path: Path) -> None:
    class Fold(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x).abs()

    with pytest.raises(ConfigurationError, match="fft"):
        save(Fold(), tmp_path, torch.randn(2, 8))
    with pytest.raises(ModelLoadError, match="unheard"):
        Frozen([["unheard", [], {}, 0]], {}, [], [])
    save(nn.Linear(3, 2), tmp_path)
    with pytest.raises(ModelLoadError, match="has shape"):
        load_weights(nn.Linear(4, 2), tmp_path)
    with pytest.raises(ModelLoadError, match="holds no tensor"):
        load_weights(nn.Sequential(nn.Linear(3, 2)), tmp_path)


def test_loading_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    save(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), tmp_path, torch.ones(1, 3))
    code = (
        "import sys, numpy as np; from hasten.frozen import load; "
        f"y = load({str(tmp_path)!r})(np.ones((4, 3))); print(y.shape, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "(4, 2) False"
