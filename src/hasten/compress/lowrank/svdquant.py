"""SVDQuant: four-bit weights and activations, with a low-rank branch that carries what four bits cannot.

"SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", Li et al. 2024, arXiv:2411.05007.
Layer by layer on what calibration gives it (:mod:`absorb`); layers that read the same tensor share smoothing vector and
down-projection. Differs from the paper in: λ is divided at run time and never folded into a norm; the search of α and
the rounds of iteration look at one layer's output, on a sample of rows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hasten.compress.given import finite_weight
from hasten.compress.lowrank.absorb import Absorbed, absorb, weight_format
from hasten.compress.lowrank.fourbit import SvdQuantLinear, pack_codes
from hasten.compress.lowrank.moments import observe, output_sqnr, require_cpu
from hasten.compress.replace import replace_module
from hasten.compress.scarce import Scarcity, count_examples
from hasten.compress.technique import LayerReport, TechniqueReport, register
from hasten.errors import ConfigurationError, DataError

__all__ = ["SvdQuant", "add_lora", "load_svdquant", "save_svdquant"]

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@register
@dataclass(frozen=True)
class SvdQuant:
    """Four bits with a low-rank branch in every linear layer that is not skipped.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    >>> small = SvdQuant(rank=8, group=32, grid=5)(model, [torch.randn(100, 64)])
    >>> type(small[0]).__name__, small[0].rank, small.report.touched
    ('SvdQuantLinear', 8, ('0', '2'))
    """

    rank: int = 32
    """of the branch; 0 leaves it out (smoothing alone)"""
    bits: int = 4
    """of weights and activations"""
    group: int = 64
    """neighbouring inputs that share a scale; nvfp4 has 16"""
    format: Literal["int4", "nvfp4"] = "int4"
    """int4: codes -7 to 7; nvfp4: E2M1 with E4M3 scales under one float"""
    grid: int = 20
    """exponents tried for the smoothing; 0 smooths nothing"""
    iterations: int = 20
    """rounds that fold the rounding error back into the branch, at most"""
    gptq: bool = False
    """round the residual by GPTQ in the end"""
    shift: bool = True
    """try a zero point for activations that are bounded below, such as behind GELU"""
    branch: Literal["bfloat16", "float32"] = "bfloat16"
    """type of the branch"""
    layers: tuple[str, ...] = ("*",)
    """patterns of layer names that are considered, as in a shell"""
    skip: tuple[str, ...] = ("*adaLN*", "*embed*", "final*", "lm_head")
    """patterns of layer names that keep their precision"""
    share: bool = True
    """layers that read the same tensor share smoothing vector and down-projection"""
    rows: int = 1024
    """rows of every layer's input that are looked at, drawn evenly from the calibration"""
    execution: Literal["exact", "fast"] = "exact"
    """how the layers run: see :mod:`hasten.compress.lowrank.fourbit`"""
    seed: int = 0
    """draws the rows"""

    name: ClassVar[str] = "svdquant"

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigurationError(f"rank is {self.rank}; give 0 for no branch, or 8 to 64")
        if not 2 <= self.bits <= 4:
            raise ConfigurationError(f"bits is {self.bits}; give 2 to 4, two codes share a byte")
        if self.group < 2 or self.group % 2:
            raise ConfigurationError(f"group is {self.group}; give an even number such as 64")
        if self.format not in ("int4", "nvfp4") or (self.format == "nvfp4" and (self.group, self.bits) != (16, 4)):
            raise ConfigurationError(
                f"format {self.format!r} with groups of {self.group} and {self.bits} bits is not known; give int4, or "
                "nvfp4 with group=16"
            )
        if self.branch not in _DTYPES or self.execution not in ("exact", "fast"):
            raise ConfigurationError(f"branch {self.branch!r} or execution {self.execution!r} is not known")
        if self.rows < 1 or self.grid < 0 or self.iterations < 0:
            raise ConfigurationError(
                f"rows {self.rows}, grid {self.grid} and iterations {self.iterations} must not be less than 1, 0, 0"
            )

    def __call__(
        self,
        model: nn.Module,
        calibration: Sequence[Any] | None = None,
        *,
        progress: Callable[[str, float], None] | None = None,
    ) -> nn.Module:
        """A new module with a ``report``; ``calibration`` is example inputs, for a diffusion model along its
        trajectories. Raises :class:`ConfigurationError` that names the layer which does not fit."""
        if not calibration:
            raise ConfigurationError("outliers are seen in data; give calibration, such as inputs along a sampling run")
        require_cpu(model)
        found, reports = self._choose(model)
        inputs, groups = self._inputs(model, found, calibration, progress)
        reached = {n for names in groups for n in names}
        for name in [n for n in found if n not in reached]:
            size = _bytes(found[name])
            reports.append(LayerReport(name, "kept", "calibration never reached it", size, size))
        clone = copy.deepcopy(model)
        for index, names in enumerate(groups):
            members = [found[n] for n in names]
            self._check(names, members, len(inputs[names[0]]))
            stacked = torch.cat([m.weight.detach() for m in members])
            x = inputs.pop(names[0]).clone()  # what was seen in inference mode takes no part in gradients
            made = absorb(
                stacked, x, rank=self.rank, form=self.format, bits=self.bits, group=self.group, grid=self.grid,
                iterations=self.iterations, use_gptq=self.gptq, shift=self.shift, dtype=_DTYPES[self.branch],
            )  # fmt: skip
            for name, layer, row in self._layers(names, members, made):
                clone = replace_module(clone, name, layer)
                reports.append(row)
            if progress is not None:
                progress("decomposing", 0.2 + 0.75 * (index + 1) / len(groups))
        clone.train(model.training)
        scarce, notes = Scarcity(), list[str]()
        scarce.examples("SvdQuant takes the largest inputs", count_examples(calibration))
        scarce.tell(notes)
        report = self._report(model, clone, reports, calibration)
        report = replace(report, notes=(*report.notes, *notes))
        clone.report = report  # type: ignore[assignment]
        return clone

    def _choose(self, model: nn.Module) -> tuple[dict[str, nn.Linear], list[LayerReport]]:
        """Layers that are rounded, and reports of those that are not."""
        owners: dict[int, int] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        found, reports = {}, []
        for name, module in model.named_modules():
            if type(module) is not nn.Linear:
                continue
            size = _bytes(module)
            if any(fnmatchcase(name, p) for p in self.skip) or not any(fnmatchcase(name, p) for p in self.layers):
                reports.append(LayerReport(name, "kept", "named in skip, or in no pattern of layers", size, size))
            elif owners[id(module.weight)] > 1:
                reports.append(LayerReport(name, "kept", "its weight is shared with another layer", size, size))
            else:
                finite_weight(name, module.weight)
                found[name] = module
        return found, reports

    def _check(self, names: Sequence[str], members: Sequence[nn.Linear], rows: int) -> None:
        inner = members[0].in_features
        for name, layer in zip(names, members, strict=True):
            if self.rank >= min(inner, layer.out_features):
                raise ConfigurationError(
                    f"{name} is {layer.out_features} x {inner}: rank {self.rank} would hold all of it; lower the rank "
                    "or add the layer to skip"
                )
            if inner % self.group:
                raise ConfigurationError(
                    f"{name} has {inner} inputs, which groups of {self.group} do not divide; give another group or add "
                    "it to skip"
                )
        if self.gptq and rows < inner:
            raise ConfigurationError(
                f"{names[0]} has {inner} inputs and calibration gave {rows} rows; gptq needs at least as many: give "
                "more, or gptq=False"
            )

    def _inputs(
        self, model: nn.Module, found: Mapping[str, nn.Linear], calibration: Sequence[Any], progress: Any
    ) -> tuple[dict[str, Tensor], list[list[str]]]:
        """Rows of each group's input under the group's first name, and the groups in the order of their layers."""
        generator = torch.Generator().manual_seed(self.seed)
        each = -(-self.rows // len(calibration))
        parts: dict[str, list[Tensor]] = {}
        together: list[dict[int, list[str]]] = []
        alive: list[Any] = []
        picks: dict[int, Tensor] = {}

        def new_pass(given: Any, named: Any) -> None:
            together.append({})
            alive.clear()
            picks.clear()

        def note(name: str) -> Callable[[Any, Any], None]:
            def tell(given: Any, named: Any) -> None:
                x = given[0]
                key = id(x)
                alive.append(x)  # an identity is worth something only while its object lives
                together[-1].setdefault(key, []).append(name)
                if key not in picks:
                    rows = x.detach().reshape(-1, x.shape[-1])
                    count = min(each, len(rows))
                    chosen = torch.randperm(len(rows), generator=generator)[:count]
                    picks[key] = rows[chosen].float()
                parts.setdefault(name, []).append(picks[key])

            return tell

        inputs: dict[str, Callable[..., None]] = {n: note(n) for n in found}
        handle = model.register_forward_pre_hook(lambda m, given: new_pass(given, None))
        try:
            observe(model, calibration, inputs, progress=lambda s, v: progress(s, 0.2 * v) if progress else None)
        finally:
            handle.remove()
        bad = next((n for n, rows in parts.items() if not all(bool(torch.isfinite(r).all()) for r in rows)), None)
        if bad is not None:
            raise DataError(f"the input of {bad} is not finite on the calibration; repair the data or the model")
        partners: dict[str, set[str]] = {}
        for seen in together:
            for names in seen.values():
                for name in names:
                    mine = set(names) if self.share else {name}
                    partners[name] = partners[name] & mine if name in partners else mine
        groups: list[list[str]] = []
        done: set[str] = set()
        for name in found:
            if name in partners and name not in done:
                group = [n for n in found if n in partners[name] and n not in done and name in partners[n]]
                groups.append(group)
                done |= set(group)
        return {g[0]: torch.cat(parts[g[0]]) for g in groups}, groups

    def _layers(
        self, names: Sequence[str], members: Sequence[nn.Linear], made: Absorbed
    ) -> list[tuple[str, SvdQuantLinear, LayerReport]]:
        """The group's layers; smoothing vector and down-projection are one tensor for all."""
        dtype = _DTYPES[self.branch]
        smooth, down = made.smooth.to(torch.bfloat16), made.down.to(dtype).contiguous()
        out: list[tuple[str, SvdQuantLinear, LayerReport]] = []
        label = "nvfp4" if self.format == "nvfp4" else f"int{self.bits}"
        at = 0
        for name, layer in zip(names, members, strict=True):
            rows = slice(at, at + layer.out_features)
            at += layer.out_features
            new = SvdQuantLinear(
                in_features=layer.in_features, out_features=layer.out_features, rank=self.rank, group=self.group,
                bits=self.bits, form=self.format, shifted=made.shifted, bias=layer.bias is not None, dtype=dtype,
                execution=self.execution,
            )  # fmt: skip
            scales = made.scales[rows]
            spread = scales.repeat_interleave(self.group, 1)
            if made.outer is None:
                new.codes = pack_codes(torch.round(made.residual[rows] / spread).to(torch.int8))
                new.scales = scales.to(torch.bfloat16)
            else:
                new.codes = pack_codes(weight_format(self.format).encode(made.residual[rows], spread).to(torch.int8))
                new.outer = made.outer.flatten().clone()
                new.scales = (scales / new.outer).to(torch.float8_e4m3fn)
            new.smooth, new.down, new.up = smooth, down, made.up[rows].to(dtype).contiguous()
            new.bias = None if layer.bias is None else layer.bias.detach().clone()
            new.train(layer.training)
            sizes = new.sizes
            after = sum(sizes.values())
            if out:  # shared parts were counted at the first member
                after -= sizes["smooth"] + down.numel() * down.element_size()
            text = f"alpha {'none' if made.alpha is None else round(made.alpha, 2)}, {made.rounds} rounds"
            text += f", with {names[0]}" if out else ""
            text += ", zero point on activations" if made.shifted else ""
            out.append(
                (
                    name,
                    new,
                    LayerReport(
                        name,
                        f"{label} rank {self.rank}",
                        text,
                        _bytes(layer),
                        after,
                        error=made.error,
                    ),
                )
            )
        return out

    def _report(
        self, model: nn.Module, clone: nn.Module, reports: list[LayerReport], calibration: Sequence[Any]
    ) -> TechniqueReport:
        totals = {"codes": 0, "scales": 0, "branch": 0, "smooth": 0}
        macs = extra = 0
        counted: set[int] = set()
        for module in clone.modules():
            if isinstance(module, SvdQuantLinear):
                for part, tensors in (("codes", (module.codes,)), ("scales", (module.scales,)),
                                      ("branch", (module.down, module.up)), ("smooth", (module.smooth,))):  # fmt: skip
                    for tensor in tensors:
                        if id(tensor) not in counted:
                            counted.add(id(tensor))
                            totals[part] += tensor.numel() * tensor.element_size()
                macs += module.in_features * module.out_features
                extra += module.rank * (module.in_features + module.out_features)
        order = {n: i for i, (n, _) in enumerate(model.named_modules())}
        reports.sort(key=lambda r: order[r.layer])
        shown = ", ".join(f"{n} {v:,}" for n, v in totals.items())
        notes = [
            f"bytes: {shown}; the branch adds {extra / max(macs, 1):.1%} multiply-adds",
            "exact execution has the numbers of the format in float32, at no gain in time; set_execution(model, "
            "'fast') expands the weight's codes for the fastest kernel of 8 or 16 bits, activations likewise",
        ]
        measured = {
            "sqnr": output_sqnr(model, clone, calibration[:4]),
            **{f"bytes_{n}": float(v) for n, v in totals.items()},
        }
        return TechniqueReport(self.name, tuple(reports), tuple(notes), measured)


def _bytes(layer: nn.Linear) -> int:
    return layer.weight.numel() * layer.weight.element_size()


# ---- adapters and files ---------------------------------------------------------------------------------------------


def add_lora(model: nn.Module, adapter: str | Path | Mapping[str, Tensor], scale: float = 1.0) -> nn.Module:
    """A new module with a low-rank adapter in its branches, exactly: nothing is rounded anew.

    ``adapter``: ``{layer}.lora_A.weight`` (r, in) and ``{layer}.lora_B.weight`` (out, r), in a mapping or a safetensors
    file. The weight becomes ``W + scale B A``. Raises :class:`ConfigurationError` for a layer that is not there.
    """
    tensors = _read_adapter(adapter)
    names = sorted({n.rsplit(".lora_", 1)[0] for n in tensors})
    clone = copy.deepcopy(model)
    modules = dict(clone.named_modules())
    for name in names:
        path = name.removeprefix("base_model.model.")
        layer = modules.get(path)
        parts = [tensors.get(f"{name}.lora_{side}.weight") for side in "AB"]
        if parts[0] is None or parts[1] is None:
            raise ConfigurationError(f"the adapter has only one of lora_A and lora_B for {name}; give both")
        down, up = parts[0], parts[1] * scale
        if isinstance(layer, SvdQuantLinear):
            if down.shape[1] != layer.in_features or up.shape[0] != layer.out_features:
                raise ConfigurationError(
                    f"the adapter of {name} is {tuple(up.shape)} x {tuple(down.shape)}, the layer "
                    f"{layer.out_features} x {layer.in_features}; it belongs to another model"
                )
            clone = replace_module(clone, path, layer.widened(down, up))
        elif isinstance(layer, nn.Linear):
            with torch.no_grad():
                layer.weight += (up.double() @ down.double()).to(layer.weight.dtype)
        else:
            raise ConfigurationError(f"the adapter names {name}, the model has no such linear layer")
    return clone


def _read_adapter(adapter: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(adapter, Mapping):
        return adapter
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(Path(adapter))
    except (OSError, SafetensorError) as error:
        raise DataError(f"adapter {str(adapter)!r} cannot be read ({error}); give a safetensors file") from None


def save_svdquant(model: nn.Module, folder: str | Path) -> None:
    """Write ``model.safetensors`` with packed codes, and ``svdquant.json`` that says which layers are of which
    shape."""
    from safetensors.torch import save_file

    from hasten.files import write_text

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers: dict[str, Any] = {}
    kept: dict[int, str] = {}
    state: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in kept:  # shared parts are stored once
            same[name] = kept[id(tensor)]
            continue
        kept[id(tensor)] = name
        state[name] = tensor.detach().contiguous()
    for name, module in model.named_modules():
        if isinstance(module, SvdQuantLinear):
            layers[name] = {
                "in_features": module.in_features, "out_features": module.out_features, "rank": module.rank,
                "group": module.group, "bits": module.bits, "shifted": module.shifted, "bias": module.bias is not None,
                "form": module.form,
                "branch": next(n for n, d in _DTYPES.items() if d == module.down.dtype),
            }  # fmt: skip
    draft = folder / ".model.safetensors.part"
    save_file(state, draft)
    draft.replace(folder / "model.safetensors")
    write_text(folder / "svdquant.json", json.dumps({"version": 1, "layers": layers, "same": same}, indent=1))


def load_svdquant(model: nn.Module, folder: str | Path, *, execution: Literal["exact", "fast"] = "exact") -> nn.Module:
    """The model in ``folder``, given any module of the architecture that was compressed; its weights are not used."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        document = json.loads((folder / "svdquant.json").read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
        layers, same = document["layers"], document["same"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"{str(folder)!r} holds no readable svdquant model ({error}); save it again") from None
    clone = copy.deepcopy(model)
    for name, shape in layers.items():
        options = dict(shape)
        dtype = _DTYPES[options.pop("branch")]
        clone = replace_module(clone, name, SvdQuantLinear(**options, dtype=dtype, execution=execution))
    for name, source in same.items():
        state[name] = state[source]
    try:
        clone.load_state_dict(state, assign=True)
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        raise DataError(
            f"the weights in {str(folder)!r} do not fit this module ({line}); give its architecture"
        ) from None
    return clone.eval()
