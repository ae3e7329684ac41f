"""The corpus that every machine has: the standard library of the running Python.

Files are split by a fixed hash of their path, so that a file is training, validation or test text on every machine and
in every Python release that has it. Near-duplicates (MinHash over line shingles, estimated Jaccard ≥ 0.8) stay on the
side of the first of them, so that held-out text was not seen in another guise.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hasten.errors import DataError

__all__ = ["Document", "documents", "near_duplicates", "split_of"]

_SKIPPED = ("site-packages/", "dist-packages/", "pydoc_data/", "encodings/", "lib2to3/", "__pycache__/", "lib-dynload/")
_GENERATED = ("_sysconfigdata", "topics.py")


@dataclass(frozen=True)
class Document:
    """One source file."""

    path: str
    """relative to the root of the corpus, with forward slashes"""
    text: str
    split: str
    """train, validation or test"""
    library: bool = True
    """False for the files of a test suite"""


def split_of(path: str) -> str:
    """Side of a file by the hash of its path: 90 % train, 5 % validation, 5 % test."""
    bucket = int.from_bytes(hashlib.blake2b(path.encode(), digest_size=4).digest(), "little") % 100
    return "validation" if bucket < 5 else "test" if bucket < 10 else "train"


def documents(root: str | Path | None = None, *, suite: bool = True) -> list[Document]:
    """Every Python file below ``root`` (default: the standard library), with its side of the split.

    ``suite``: include the standard library's own test suite where it is installed. Files that are not UTF-8, generated
    tables and installed packages are left out. Raises :class:`DataError` for a folder without Python files.
    """
    base = Path(root if root is not None else sysconfig.get_path("stdlib"))
    found = list(_read(base, suite, stdlib=root is None))
    if not found:
        raise DataError(f"{base} holds no readable .py file; give a folder of Python sources")
    moved = near_duplicates([d.text for d in found])
    return [Document(d.path, d.text, found[first].split, d.library) for d, first in zip(found, moved, strict=True)]


def _read(base: Path, suite: bool, stdlib: bool) -> Iterator[Document]:
    for path in sorted(base.rglob("*.py")):
        name = path.relative_to(base).as_posix()
        if stdlib and (any(s in f"{name}" for s in _SKIPPED) or path.name.startswith(_GENERATED)):
            continue
        library = not (name.startswith(("test/", "idlelib/idle_test/")) or "/tests/" in name or "/test/" in name)
        if not library and not suite:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if 64 <= len(text) <= 2_000_000:
            yield Document(name, text.replace("\r\n", "\n"), split_of(name), library)


def near_duplicates(texts: list[str], *, threshold: float = 0.8, permutations: int = 64) -> list[int]:
    """For each text the index of the first text that it nearly repeats, or its own index.

    MinHash (Broder 1997) over the set of lines with at least ten characters: the share of equal minima estimates the
    Jaccard similarity of two sets. Candidates share at least one band of four minima.
    """
    rng = np.random.default_rng(0)
    prime = np.uint64(2**61 - 1)
    factor = rng.integers(1, 2**31, permutations, dtype=np.uint64)
    shift = rng.integers(0, 2**31, permutations, dtype=np.uint64)
    first = list(range(len(texts)))
    signatures: list[np.ndarray | None] = []
    bands: dict[tuple[int, bytes], list[int]] = {}
    for index, text in enumerate(texts):
        lines = {line.strip() for line in text.splitlines() if len(line.strip()) >= 10}
        if not lines:
            signatures.append(None)
            continue
        keys = np.array(
            [int.from_bytes(hashlib.blake2b(x.encode(), digest_size=4).digest(), "little") for x in lines], np.uint64
        )
        signature = ((keys[:, None] * factor + shift) % prime).min(0)
        signatures.append(signature)
        candidates: set[int] = set()
        for band in range(0, permutations, 4):
            key = (band, signature[band : band + 4].tobytes())
            candidates.update(bands.get(key, ()))
            bands.setdefault(key, []).append(index)
        for other in sorted(candidates):
            earlier = signatures[other]
            if earlier is not None and float((earlier == signature).mean()) >= threshold:
                first[index] = first[other]
                break
    return first
