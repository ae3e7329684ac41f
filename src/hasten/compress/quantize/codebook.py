"""Grids that are listed: nf4, k-means codebooks, binary and ternary codes. Stored as an index and a short list.

A fixed list is scaled by the largest magnitude of a group. A learned one belongs to its rows: Lloyd's algorithm
minimises ``Σ h_i (w_i - c_k)²`` (``h`` all one, or a Hessian diagonal); binary codes ``w ≈ Σ_j α_j b_j``, ``b_j = ±1``,
are found greedily and refined by least squares in turns with the nearest code (2^bits sums of ±α are the list).

nf4: "QLoRA: Efficient Finetuning of Quantized LLMs" https://arxiv.org/abs/2305.14314
Differs from the paper in: scales in half precision instead of doubly quantised.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.compress.quantize.base import Format, at_least_float, significant
from hasten.compress.quantize.granularity import Granularity, PerChannel, PerGroup, PerTensor
from hasten.compress.quantize.integer import granule
from hasten.compress.quantize.minifloat import MiniFloat
from hasten.compress.quantize.observers import MinMax, Observer
from hasten.compress.values import named_value
from hasten.errors import ConfigurationError, DataError

_WHOLE = PerTensor()

__all__ = ["NF4", "Binary", "BinaryCode", "Codebook", "KMeans", "Ternary", "power_of_two_format"]


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest of ``levels`` (…, K), sorted, for each element; leading axes broadcast against ``x``."""
    middle = (levels[..., 1:] + levels[..., :-1]) / 2
    if levels.dim() == 1:
        return torch.bucketize(x.contiguous(), middle)
    if levels.shape[:-1].numel() == 1:
        return torch.bucketize(x.contiguous(), middle.reshape(-1))
    # A lower level at a tie, as bucketize does. K is small, so counting the middles below costs K passes.
    index = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    for k in range(middle.shape[-1]):
        index += x > middle[..., k]
    return index


class _Listed(Format):
    """What fixed and learned lists share: ``levels(scale)`` gives the sorted list (…, K) of each element's group."""

    @abstractmethod
    def levels(self, scale: Tensor) -> Tensor:
        """Sorted values (…, K)."""

    def _choose(self, x: Tensor, levels: Tensor, index: Tensor) -> Tensor:
        """The level of each index."""
        if levels.shape[:-1].numel() == 1:
            return levels.reshape(-1)[index]
        return levels.expand(*x.shape, levels.shape[-1]).gather(-1, index[..., None])[..., 0]

    def index(self, x: Tensor, scale: Tensor) -> Tensor:
        """Index of the level that stands for ``x``: the nearest, the lower at a tie."""
        return _nearest(x, self.levels(scale))

    def round_to(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """The nearest level; the lower at a tie."""
        return self._choose(x, self.levels(scale), self.index(x, scale))

    def neighbours(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The levels around ``x``."""
        levels = self.levels(scale)
        above = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
        for k in range(levels.shape[-1]):
            above += x >= levels[..., k]
        last = levels.shape[-1] - 1
        return (
            self._choose(x, levels, (above - 1).clamp(0, last)),
            self._choose(x, levels, above.clamp(0, last)),
        )

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Index of the level, uint8."""
        return self.index(x, scale).to(torch.uint8)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """The level of each index."""
        return self._choose(codes, self.levels(scale), codes.long())


@named_value
@dataclass(frozen=True)
class Codebook(_Listed):
    """A fixed list in units of the largest magnitude of a group.

    >>> NF4.fake(torch.tensor([[0.0, 0.5, -2.0, 2.0]]))
    tensor([[ 0.0000,  0.4922, -2.0000,  2.0000]])
    """

    entries: tuple[float, ...]
    """sorted, within -1 … 1"""
    granularity: Granularity = PerGroup(1, 64)
    """which elements share a scale"""
    observer: Observer = MinMax()
    """how the range is found"""
    dynamic: bool = False
    """find the range in each call; activations only"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(float(v) for v in self.entries))
        if not 2 <= len(self.entries) <= 256 or list(self.entries) != sorted(set(self.entries)):
            raise ConfigurationError(f"a codebook of {len(self.entries)} entries must be 2 … 256, sorted and distinct")

    @property
    def bits(self) -> int:
        """Of an index."""
        return math.ceil(math.log2(len(self.entries)))

    @property
    def label(self) -> str:
        """``nf4 g64``, or the number of entries."""
        name = "nf4" if self.entries == _NF4 else f"codebook{len(self.entries)}"
        return name + granule(self.granularity)

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """The largest magnitude lies on 1."""
        reach = max(abs(self.entries[0]), abs(self.entries[-1]))
        kept = 11 if isinstance(self.granularity, PerGroup) else 16
        return significant(torch.maximum(-low, high) / reach, kept), None

    def levels(self, scale: Tensor) -> Tensor:
        """Entries times the scale."""
        return scale[..., None] * torch.tensor(self.entries, dtype=scale.dtype, device=scale.device)

    def round_to(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Search in the unscaled list: one lookup for all groups."""
        entries = torch.tensor(self.entries, dtype=scale.dtype, device=scale.device)
        return entries[_nearest(x / scale, entries)] * scale

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Index, uint8."""
        return _nearest(x / scale, torch.tensor(self.entries, dtype=scale.dtype, device=scale.device)).to(torch.uint8)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Entry times scale."""
        return torch.tensor(self.entries, dtype=scale.dtype, device=scale.device)[codes.long()] * scale


class _Learned(_Listed):
    """Lists that are fitted to the rows of the tensor; the scale is the list, on one more axis."""

    granularity: Granularity

    @abstractmethod
    def fit(self, rows: Tensor, weights: Tensor) -> Tensor:
        """rows and weights (rows, n) -> sorted levels (rows, K)."""

    def levels(self, scale: Tensor) -> Tensor:
        """The scale is the list."""
        return scale

    def spread(self, scale: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        """Groups are repeated; the list stays on the last axis."""
        return None if scale is None else self.granularity.spread(scale, shape)

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """A list over a range alone: evenly spaced. :meth:`find` fits it to the tensor."""
        steps = torch.linspace(0, 1, 2**self.bits, dtype=low.dtype, device=low.device)
        return low[..., None] + (high - low)[..., None] * steps, None

    def find(self, x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The list of each row, fitted with ``importance`` as weights."""
        x = at_least_float(x.detach())
        if not bool(torch.isfinite(x).all()):
            raise DataError("the tensor holds NaN or infinity; repair it before it is quantised")
        weights = torch.ones_like(x) if importance is None else importance.to(x.dtype).expand_as(x)
        levels = self.fit(self.granularity.rows(x), self.granularity.rows(weights))
        shape = self.granularity.compact(tuple(x.shape))
        return levels.half().float().reshape(*shape, -1), None

    def fake(self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
        """As for every format, the list fitted where none is given."""
        if scale is None:
            scale, zero = self.find(x)
        return super().fake(x, scale, zero)

    @property
    def scale_bits(self) -> int:
        """Half precision for each entry."""
        return 16 * int(2**self.bits)


@named_value
@dataclass(frozen=True)
class KMeans(_Learned):
    """A learned list of ``2^bits`` values for each row of the granularity.

    >>> KMeans(1).fake(torch.tensor([1.0, 1.0, 5.0, 5.0]))
    tensor([1., 1., 5., 5.])
    """

    bits: int = 4
    """of an index, 1 … 8"""
    granularity: Granularity = PerChannel(0)
    """which elements share a list"""
    observer: Observer = MinMax()
    """not used: the list follows the elements"""
    iterations: int = 25
    """rounds of Lloyd's algorithm"""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigurationError(f"an index of {self.bits} bits is not known; give 1 … 8")

    @property
    def label(self) -> str:
        """``kmeans3``."""
        return f"kmeans{self.bits}{granule(self.granularity)}"

    def fit(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Lloyd from weighted quantiles; all rows at once."""
        count = 2**self.bits
        values, order = rows.sort(dim=1)
        mass = weights.gather(1, order).clamp(min=1e-12).cumsum(1)
        wanted = (torch.arange(count, dtype=mass.dtype, device=mass.device) + 0.5) / count * mass[:, -1:]
        place = torch.searchsorted(mass, wanted.contiguous()).clamp(max=rows.shape[1] - 1)
        centres = values.gather(1, place)
        # Half quantiles, half an even grid: quantiles alone leave the tails without a centre.
        even = (
            torch.linspace(0, 1, count, dtype=rows.dtype, device=rows.device) * (values[:, -1:] - values[:, :1])
            + values[:, :1]
        )
        centres = ((centres + even) / 2).sort(dim=1).values
        for _ in range(self.iterations):
            middle = ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous()
            index = torch.searchsorted(middle, rows.contiguous())
            total = torch.zeros_like(centres).scatter_add_(1, index, weights)
            summed = torch.zeros_like(centres).scatter_add_(1, index, weights * rows)
            centres = torch.where(total > 0, summed / total.clamp(min=1e-30), centres).sort(dim=1).values
        return centres


@named_value
@dataclass(frozen=True)
class BinaryCode(_Learned):
    """``w ≈ Σ_j α_j b_j`` with ``bits`` terms for each row.

    >>> BinaryCode(1).fake(torch.tensor([[1.0, -3.0]]))
    tensor([[ 2., -2.]])
    """

    bits: int = 2
    """number of terms, 1 … 4"""
    granularity: Granularity = PerChannel(0)
    """which elements share the α"""
    observer: Observer = MinMax()
    """not used: α follow the elements"""
    iterations: int = 15
    """rounds of least squares"""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 4:
            raise ConfigurationError(f"{self.bits} binary terms are not known; give 1 … 4")

    @property
    def label(self) -> str:
        """``binary-code2``."""
        return f"binary-code{self.bits}{granule(self.granularity)}"

    @property
    def scale_bits(self) -> int:
        """The α alone."""
        return 16 * self.bits

    def fit(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Greedy start, then nearest code and least squares in turns; α (rows, bits)."""
        rest, alphas = rows, []
        for _ in range(self.bits):
            alpha = (weights * rest.abs()).sum(1) / weights.sum(1).clamp(min=1e-30)
            alphas.append(alpha)
            rest = rest - alpha[:, None] * torch.where(rest < 0, -1.0, 1.0)
        alpha = torch.stack(alphas, 1)
        signs = self.signs.to(rows)
        best, least = alpha, torch.full((len(rows),), torch.inf, dtype=rows.dtype)
        for _ in range(self.iterations):
            sums = alpha @ signs.t()
            levels, order = sums.sort(dim=1)
            middle = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
            index = torch.searchsorted(middle, rows.contiguous())
            error = (weights * (levels.gather(1, index) - rows).square()).sum(1)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better[:, None], alpha, best)
            codes = signs[order.gather(1, index)]  # (rows, n, bits)
            gram = torch.einsum("rn,rni,rnj->rij", weights, codes, codes)
            right = torch.einsum("rn,rn,rni->ri", weights, rows, codes)
            ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
            gram = gram + ridge[:, None, None] * torch.eye(self.bits, dtype=rows.dtype, device=rows.device)
            alpha = torch.linalg.solve(gram, right[..., None])[..., 0]
        return best

    @property
    def signs(self) -> Tensor:
        """(2^bits, bits) of ±1."""
        return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=self.bits)))

    def levels(self, scale: Tensor) -> Tensor:
        """The signed sums of the α, which are the scale."""
        return (scale @ self.signs.t().to(scale)).sort(dim=-1).values

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Halves of the largest magnitude; :meth:`find` fits α to the tensor."""
        top = torch.maximum(-low, high)[..., None]
        return top * 2.0 ** -torch.arange(1, self.bits + 1, dtype=low.dtype, device=low.device), None


@named_value
@dataclass(frozen=True)
class Binary(BinaryCode):
    """``sign(w) · mean|w|``.

    >>> Binary().bits
    1
    """

    bits: int = 1
    """one"""
    iterations: int = 1
    """the mean is the least squares solution already"""

    def __post_init__(self) -> None:
        if self.bits != 1:
            raise ConfigurationError(f"Binary has one bit, got {self.bits}; BinaryCode({self.bits}) has more")


@named_value
@dataclass(frozen=True)
class Ternary(_Learned):
    """-a, 0, a: zero within 0.7 · mean|w|, a the mean magnitude of the rest. Stored in two bits.

    >>> Ternary().fake(torch.tensor([[0.1, -2.0, 2.0, 4.0]]))
    tensor([[ 0.0000, -2.6660,  2.6660,  2.6660]])
    """

    granularity: Granularity = PerChannel(0)
    """which elements share a"""
    observer: Observer = MinMax()
    """not used"""
    threshold: float = 0.7
    """of the mean magnitude"""

    @property
    def bits(self) -> int:
        """Stored bits of a code."""
        return 2

    @property
    def scale_bits(self) -> int:
        """a and the threshold."""
        return 32

    @property
    def label(self) -> str:
        """``ternary``."""
        return f"ternary{granule(self.granularity)}"

    def fit(self, rows: Tensor, weights: Tensor) -> Tensor:
        """a and the threshold of each row."""
        size = rows.abs()
        limit = self.threshold * (weights * size).sum(1) / weights.sum(1).clamp(min=1e-30)
        far = weights * (size > limit[:, None])
        return torch.stack([(far * size).sum(1) / far.sum(1).clamp(min=1e-30), limit], 1)

    def levels(self, scale: Tensor) -> Tensor:
        """-a, 0, a."""
        a = scale[..., 0]
        return torch.stack([-a, torch.zeros_like(a), a], -1)

    def index(self, x: Tensor, scale: Tensor) -> Tensor:
        """By the threshold, which is not half of a."""
        limit = scale[..., 1]
        return (x >= -limit).long() + (x > limit).long()


def power_of_two_format(bits: int, granularity: Granularity = _WHOLE) -> MiniFloat:
    """Zero and ± powers of two in ``bits`` bits: a float without a mantissa.

    >>> power_of_two_format(3).grid().tolist()
    [-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0]
    """
    return MiniFloat(bits - 1, 0, granularity=granularity)


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4 = Codebook(_NF4)
"""quantiles of a normal distribution, groups of 64"""
