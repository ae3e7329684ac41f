"""Compiled kernels are kept under a key of all the code that went into them.

numba keeps what it compiled beside the source file and looks at that one file to see whether it is stale. A kernel that
takes in functions of another file would keep the old ones after an update. Here the stamp of a kernel covers its file,
those that it imports, and so on through every file that uses numba; a stamp is part of the names of its files, so
processes with different code never read each other's. Where they lie is numba's choice: ``NUMBA_CACHE_DIR`` if set,
else ``__pycache__``, else the user's cache.

:func:`install` imports nothing: it waits until numba itself is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["install", "stamp_of"]

_CACHING = "numba.core.caching"
_KEEP = 3600.0
"""Seconds for which files of another stamp are left: a process with that code may still be at work."""
_DIGITS = 12
_FROM = re.compile(rb"^\s*from\s+([\w.]+)\s+import\s+(\([^)]*\)|[^\n]*)", re.MULTILINE)
_IMPORT = re.compile(rb"^\s*import\s+([\w.]+)", re.MULTILINE)


def install(root: Path) -> None:
    """Stamp the kernels of the package in the folder ``root``, from now on or as soon as numba is there."""
    caching = sys.modules.get(_CACHING)
    if caching is not None:
        _register(caching, root)
    else:
        sys.meta_path.insert(0, _Waiting(root))


class _Waiting(importlib.abc.MetaPathFinder):
    """Registers the stamps when numba's own module has been executed, and is gone then."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _CACHING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self.root)
        return spec


class _Then(importlib.abc.Loader):
    """Another loader, and the registration behind it."""

    def __init__(self, loader: Any, root: Path) -> None:
        self.loader, self.root = loader, root

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module, self.root)


def _register(caching: Any, root: Path) -> None:
    """Put a locator before numba's own; a list that the user named (``NUMBA_CACHE_LOCATOR_CLASSES``) still wins."""
    implementation = getattr(caching, "CacheImpl", None) or getattr(caching, "_CacheImpl", None)
    classes = getattr(implementation, "_locator_classes", None)
    if not isinstance(classes, list):
        return  # a numba that keeps its caches in another way: its own rule holds
    usual = list(classes)

    class Stamped:
        """Finds the place as numba does, and hands out a stamp of all the code in the place of one file's."""

        @classmethod
        def from_function(cls, py_func: Any, py_file: str) -> Any:
            path = Path(py_file)
            if not path.is_relative_to(root):
                return None
            for kind in usual:
                found = kind.from_function(py_func, py_file)
                if found is not None:
                    return _stamped(found, path, root)
            return None

    classes.insert(0, Stamped)


def _stamped(locator: Any, path: Path, root: Path) -> Any:
    stamp = stamp_of(path, root)
    line, ensure = locator.get_disambiguator(), locator.ensure_cache_path

    def ensured() -> None:
        ensure()
        _prune(Path(locator.get_cache_path()), path.stem, stamp)

    locator.get_source_stamp = lambda: stamp
    locator.get_disambiguator = lambda: f"{line}-{stamp}"
    locator.ensure_cache_path = ensured  # asked before something new is written
    return locator


def _prune(folder: Path, stem: str, stamp: str) -> None:
    """Remove what other code of this file left, unless it is recent. Others may do so at the same time."""
    limit = folder.stat().st_mtime - _KEEP  # something was just written there
    for file in folder.glob(f"*{stem}.*.nb[ic]"):
        if f"-{stamp}." not in file.name and file.name.rpartition("-")[0].startswith((f"{stem}.", f"gufunc-{stem}.")):
            with contextlib.suppress(OSError):  # it is gone already, or not ours to remove
                if file.stat().st_mtime < limit:
                    file.unlink()


@cache
def stamp_of(path: Path, root: Path) -> str:
    """Hexadecimal digits of the file's source and of all that its kernels may take in.

    Followed are the package's files that a file imports, wherever the import stands, as long as they use numba; of the
    others, which may hold a constant, their own source counts. What a process has read it does not read again.
    """
    digest, seen, rest = hashlib.blake2b(digest_size=_DIGITS // 2), {path}, [path]
    while rest:
        file = rest.pop()
        _, mentioned = _read(file, root)
        for other in mentioned - seen:
            seen.add(other)
            if _read(other, root)[0]:
                rest.append(other)
    for file in sorted(seen):
        digest.update(str(file.relative_to(root)).encode() + _digest(file))
    return digest.hexdigest()


@cache
def _digest(path: Path) -> bytes:
    return hashlib.blake2b(_source(path), digest_size=16).digest()


@cache
def _source(path: Path) -> bytes:
    return path.read_bytes()


@cache
def _read(path: Path, root: Path) -> tuple[bool, frozenset[Path]]:
    """Whether the file uses numba, and the files of the package that it imports."""
    source, name = _source(path), root.name.encode()
    if b"numba" not in source:
        return False, frozenset()
    found: set[Path] = set()
    for module, names in _FROM.findall(source):
        if module != name and not module.startswith(name + b"."):
            continue
        place = root.joinpath(*module.decode().split(".")[1:])
        if not place.is_dir():
            found.add(place.with_suffix(".py"))
            continue
        found.add(place / "__init__.py")
        parts = (p.decode() for p in re.findall(rb"\w+", re.sub(rb"#[^\n]*", b"", names)))
        found.update(f for part in parts for f in (place / f"{part}.py", place / part / "__init__.py"))
    for module in _IMPORT.findall(source):
        if module.startswith(name + b"."):
            place = root.joinpath(*module.decode().split(".")[1:])
            found.update((place.with_suffix(".py"), place / "__init__.py"))
    return True, frozenset(f for f in found if _exists(f))


@cache
def _exists(path: Path) -> bool:
    return path.is_file()
