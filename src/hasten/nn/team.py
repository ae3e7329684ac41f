"""Threads that stay together through many short phases, inside one parallel region of a numba kernel.

A parallel region costs some microseconds to open and to close, which is more than a norm of sixteen rows takes. A team
opens one, and its members wait for each other at barriers, which cost a fraction of one. Every member calls the same
phases in the same order and takes its own share of each; what a phase wrote, all see behind the next :func:`meet`.

Nobody promises that the parts of a region run at the same time: a runtime may give fewer threads and run them one after
the other. So a team is whoever has come when its first member stops waiting, and who comes later goes away again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["LATE", "PATIENCE", "join", "meet", "new_team", "share_of"]

PATIENCE = 20_000
"""How often a first member looks for the others: some milliseconds, a hundred times what they take."""
LATE = -1
"""The number of who came too late: there is nothing to do for it."""
_CLOSED = 1 << 32
_ARRIVED, _SIZE, _MET = 0, 8, 16  # each in a line of memory of its own
_SPINS = 2000  # about 0.1 ms, then others may have the core
_WORD = ir.IntType(64)
_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic  # a checker would count the context of a call

binding.initialize_native_asmparser()


def _place(builder: Any, team: Any, field: Any) -> Any:
    offset = builder.mul(field, ir.Constant(_WORD, 8))
    return builder.inttoptr(builder.add(team, offset), _WORD.as_pointer())


@_intrinsic
def _add(typing: Any, team: Any, field: Any, value: Any) -> Any:
    """Add to a field in one piece; what was there before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _place(builder, *arguments[:2]), arguments[2], "acq_rel")

    return types.int64(types.intp, types.intp, types.int64), generate


@_intrinsic
def _read(typing: Any, team: Any, field: Any) -> Any:
    """A field as others left it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_place(builder, *arguments), "acquire", 8)

    return types.int64(types.intp, types.intp), generate


@_intrinsic
def _rest(typing: Any, spins: Any) -> Any:
    """Wait a little; who has waited for long leaves the core to others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        function = ir.FunctionType(word, [])
        yielding = builder.icmp_signed(">", arguments[0], ir.Constant(_WORD, _SPINS))
        with builder.if_else(yielding) as (long, short):
            with long:
                name = "sched_yield"
                found = builder.module.globals.get(name) or ir.Function(builder.module, function, name)
                builder.call(found, [])
            with short:
                pause = ir.FunctionType(ir.VoidType(), [])
                builder.call(ir.InlineAsm(pause, _PAUSE, "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _pause() -> str:
    import platform

    return "pause" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "yield"


_PAUSE = _pause()


@njit(cache=True)
def new_team() -> Any:
    """A team without members, for one region."""
    return np.zeros(24, np.int64)


@njit(cache=True)
def join(team: Any, most: int) -> Any:
    """Become a member of up to ``most``: own number from 0 (or :data:`LATE`) and how many the team has."""
    at = team.ctypes.data
    number = _add(at, _ARRIVED, 1)
    if number >= _CLOSED:
        return LATE, 0
    if number == 0:
        spins = 0
        while _read(at, _ARRIVED) < most and spins < PATIENCE:
            _rest(spins)
            spins += 1
        _add(at, _SIZE, _add(at, _ARRIVED, _CLOSED))
    spins = 0
    while _read(at, _SIZE) == 0:
        _rest(spins)
        spins += 1
    return number, _read(at, _SIZE)


@njit(cache=True)
def meet(team: Any, size: int) -> None:
    """Wait until all ``size`` members are here."""
    at = team.ctypes.data
    came = _add(at, _MET, 1) + 1
    goal = (came + size - 1) // size * size
    spins = 0
    while _read(at, _MET) < goal:
        _rest(spins)
        spins += 1


@njit(cache=True)
def share_of(count: int, number: int, size: int) -> Any:
    """First and last of ``count`` items that member ``number`` of ``size`` takes."""
    return count * number // size, count * (number + 1) // size
