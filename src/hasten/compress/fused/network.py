"""A network in one call, as a module: samples in, what the plain model gives out, in inference."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hasten.compress.fused.lowering import Lowered, lower
from hasten.compress.fused.program import Matrices, Program
from hasten.compress.fused.run import run_samples
from hasten.compress.fused.values import Unsupported
from hasten.compress.replace import told_of
from hasten.errors import ConfigurationError
from hasten.nn.product.instructions import has_bfloat16, has_bytes

__all__ = ["INPUTS", "FusedModule", "cannot_run"]

INPUTS = (torch.float32, torch.int64, torch.int32)
"""What goes in: numbers, and whole numbers that are looked up."""
_SHAPES = 8
"""Programs that are kept at a time."""


def cannot_run(precision: str) -> str | None:
    """Why this processor cannot run a network in one call; None where it can."""
    if not has_bytes():
        return "this processor has no registers of 512 bits with vpdpbusd"
    if precision == "bf16" and not has_bfloat16():
        return "this processor has no vdpbf16ps"
    return None


class FusedModule(nn.Module):
    """Runs what :mod:`lowering` made of ``model``; a program for each shape of samples, made when it is first met.

    A batch is shared out sample by sample to as many threads as torch uses; one sample runs in one thread. Not to be
    called by two threads at once: the arenas are its own. Raises :class:`~hasten.errors.ConfigurationError` for inputs
    that cannot be lowered.
    """

    def __init__(self, model: nn.Module, precision: str, matrices: Matrices | None = None) -> None:
        super().__init__()
        self.precision = precision
        self.matrices = matrices or Matrices(precision)
        self._plain = [model]  # in a list: its parameters are not those of this module
        self._programs: OrderedDict[Any, tuple[Program, list[Any], list[Any]]] = OrderedDict()
        self._pool: Any = None

    @property
    def packed_bytes(self) -> int:
        """Bytes of weights and other constants."""
        constants = max((p.constant_bytes for p, _, _ in self._programs.values()), default=0)
        return constants + self.matrices.bytes

    def program(self, *inputs: Tensor) -> Program:
        """The program for samples of these shapes."""
        return self._ready(inputs, 1)[0]

    def forward(self, *inputs: Tensor) -> Any:
        """Each input (batch, …) float32, or whole numbers that the model looks up -> what the model gives."""
        if not inputs or any(not isinstance(x, Tensor) or x.dim() == 0 or len(x) != len(inputs[0]) for x in inputs):
            raise ConfigurationError("a fused network takes tensors that begin with one batch; give (batch, …)")
        strange = next((x for x in inputs if x.dtype not in INPUTS or x.device.type != "cpu"), None)
        if strange is not None:
            raise ConfigurationError(
                f"an input is {strange.dtype} on {strange.device}, and a fused network takes float32, int64 or int32 "
                "on the CPU; convert it, or call the model itself"
            )
        batch = len(inputs[0])
        threads = max(1, min(batch, torch.get_num_threads()))
        program, arenas, rooms = self._ready(inputs, threads)
        flat = [
            np.ascontiguousarray(_checked(x, limits, number), np.float32).reshape(batch, math.prod(x.shape[1:]))
            for number, (x, limits) in enumerate(zip(inputs, program.lowered.limits, strict=True))
        ]
        samples = flat[0] if len(flat) == 1 else np.concatenate(flat, 1)
        outs = np.empty((batch, program.outs), np.float32)
        if threads == 1:
            _run(program, samples, outs, arenas[0], rooms[0])
        else:
            cuts = [batch * part // threads for part in range(threads + 1)]
            parts = [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
            rest = [
                self._pool.submit(_run, program, samples[p], outs[p], arenas[n], rooms[n])
                for n, p in enumerate(parts)
                if n
            ]
            _run(program, samples[parts[0]], outs[parts[0]], arenas[0], rooms[0])
            for job in rest:
                job.result()
        return _handed_back(torch.from_numpy(outs), program.lowered)

    def _ready(self, inputs: tuple[Tensor, ...], threads: int) -> tuple[Program, list[Any], list[Any]]:
        """The program, an arena and a room for each thread, and the threads beside the caller's."""
        key = tuple((x.shape[1:], x.dtype) for x in inputs)
        found = self._programs.get(key)
        if found is None:
            try:
                lowered = lower(self._plain[0], tuple(_one(x) for x in inputs))
            except Unsupported as reason:
                shapes = ", ".join(str(tuple(shape)) for shape, _ in key)
                raise ConfigurationError(
                    f"samples of shape {shapes} cannot be run in one call: {reason}; call the model itself with them"
                ) from reason
            found = self._programs[key] = (Program(lowered, self.matrices), [], [])
            if len(self._programs) > _SHAPES:
                self._programs.popitem(last=False)
        program, arenas, rooms = found
        while len(arenas) < threads:
            arenas.append(program.arena())
            rooms.append(program.room())
        if threads > 1 and self._pool is None:
            self._pool = ThreadPoolExecutor(max(threads, torch.get_num_threads()) - 1, "hasten-fused")
        return found

    def plain(self) -> nn.Module:
        """The model with the weights that the products use, for ``torch.export``."""
        model = copy.deepcopy(self._plain[0])
        if self.precision == "fp32":
            return model
        held = dict(model.named_parameters())
        for name in self.matrices.names:
            base, sliced, span = name.removesuffix(".T").partition("[")
            if base not in held:
                continue
            rows = slice(*map(int, span.removesuffix("]").split(":"))) if sliced else slice(None)
            weight, place = torch.from_numpy(self.matrices.unpacked(name)), held[base].data[rows]
            place.copy_((weight.T if name.endswith(".T") else weight).reshape(place.shape))
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedModule:
        return told_of(self, FusedModule(self._plain[0], self.precision, self.matrices).train(self.training))

    def __getstate__(self) -> dict[str, Any]:
        """The model; what was made of it for this machine is made anew from the same weights."""
        return {**self.__dict__, "matrices": None, "_programs": None, "_pool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        reason = cannot_run(self.precision)
        if reason is not None:
            raise ConfigurationError(f"a fused network cannot run here: {reason}; run the model that it was made of")
        self._forget()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}model.{name}": t for name, t in self._plain[0].state_dict().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes other weights of the model, and makes of them what was made of the old ones."""
        start = f"{prefix}model."
        held = {k.removeprefix(start): state_dict.pop(k) for k in list(state_dict) if k.startswith(start)}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        model = copy.deepcopy(self._plain[0])  # copies of this network share the old one
        missing, more = model.load_state_dict(held, strict=False)
        rest[2].extend(start + name for name in missing)
        rest[3].extend(start + name for name in more)
        self._plain = [model]
        self._forget()

    def _forget(self) -> None:
        self.matrices, self._programs, self._pool = Matrices(self.precision), OrderedDict(), None

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"{self.precision}, {len(self.matrices.names)} matrices, {len(self._programs)} shapes"


def _one(x: Tensor) -> Tensor:
    """A sample like those of ``x``, of which there may be none."""
    return x[:1].detach() if len(x) else torch.zeros((1, *x.shape[1:]), dtype=x.dtype)


def _checked(x: Tensor, limits: tuple[int, int] | None, number: int) -> Any:
    """The input as an array, if it may be looked up."""
    array = x.detach().numpy()
    if limits is not None and array.size:
        low, high = int(array.min()), int(array.max())
        if low < limits[0] or high > limits[1]:
            raise ConfigurationError(
                f"input {number} holds {low if low < limits[0] else high}; give whole numbers from {limits[0]} to "
                f"{limits[1]}, which are those that the model can look up"
            )
    return array


def _handed_back(outs: Tensor, lowered: Lowered) -> Any:
    """outs (batch, numbers) as the model gives its results."""
    batch, results, at = len(outs), [], 0
    if lowered.spec is None:
        return outs.view(batch, *lowered.shapes[0])
    for shape in lowered.shapes:
        size = math.prod(shape)
        results.append(outs[:, at : at + size].reshape(batch, *shape))
        at += size
    return pytree.tree_unflatten(results, lowered.spec)


def _run(program: Program, samples: Any, outs: Any, arena: Any, room: Any) -> None:
    run_samples(
        samples, program.places, program.table, program.numbers, arena, program.matrices, program.result, outs,
        program.most_rows, program.widest, room,
    )  # fmt: skip
