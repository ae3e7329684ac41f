"""Where vectors come from: arrays, memory maps, the files of the field, HDF5, Parquet, iterators.

A source has a length, a width and a dtype and gives rows by number; a memory map is read by ``pread``, so that a
build reads a collection that is larger than its memory. What cannot be read by row (HDF5, Parquet, iterators) is
copied to a plain file first, block by block.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import DataError, MissingExtraError
from hasten.retrieve.index.metric import DTYPES
from hasten.retrieve.index.pread import read_rows

__all__ = ["Source", "open_source", "read_vectors"]

_BINARY = {".fbin": np.float32, ".f16bin": np.float16, ".u8bin": np.uint8, ".i8bin": np.int8}
_RECORDS = {".fvecs": np.float32, ".bvecs": np.uint8, ".ivecs": np.int32}


class Source:
    """Rows (n, d) of one array, in memory or mapped. Reading is safe from several threads.

    >>> source = Source(np.eye(3, dtype=np.float32))
    >>> len(source), source.width, source.take(np.array([2])).tolist()
    (3, 3, [[0.0, 0.0, 1.0]])
    """

    def __init__(self, rows: NDArray[Any], temporary: Path | None = None) -> None:
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise DataError(f"vectors have the shape {rows.shape}; give (rows, width) with a width of at least 1")
        if rows.dtype != np.float64 and rows.dtype.name not in DTYPES:
            raise DataError(f"vectors are {rows.dtype}; convert them to one of {', '.join(DTYPES)}")
        self._rows = rows
        self.dtype = np.dtype(np.float32) if rows.dtype == np.float64 else rows.dtype.newbyteorder("=")
        self.width = int(rows.shape[1])
        self._temporary = temporary
        self._file = _File.behind(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def block(self, begin: int, end: int) -> NDArray[Any]:
        """Rows ``begin:end``, contiguous."""
        if self._file is not None:
            return self._converted(self._file.read(np.arange(begin, end)))
        return np.ascontiguousarray(self._rows[begin:end], self.dtype)

    def take(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The rows with these numbers, contiguous; ascending numbers read best."""
        if self._file is not None:
            return self._converted(self._file.read(np.asarray(rows)))
        return np.ascontiguousarray(self._rows[rows], self.dtype)

    def _converted(self, rows: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(rows, self.dtype)

    def close(self) -> None:
        """Close the file; remove the temporary copy, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._temporary is not None:
            self._rows = np.empty((0, self.width), self.dtype)
            self._temporary.unlink(missing_ok=True)


class _File:
    """The file behind a memory map, read by ``pread``: pages that are touched in a map would count as memory of the
    process.
    """

    def __init__(self, path: str, first: int, stride: int, width: int, dtype: np.dtype[Any]) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._first, self._stride, self._width, self._dtype = first, stride, width, dtype

    @classmethod
    def behind(cls, rows: NDArray[Any]) -> _File | None:
        """For a read-only map (or a view of one) whose rows are contiguous; None for anything else."""
        base: Any = rows
        while base is not None:
            mapping = getattr(base, "_mmap", None) if isinstance(base, np.memmap) else None
            if mapping is not None and base.mode == "r" and base.filename and not isinstance(base.base, np.memmap):
                inside = rows.ctypes.data - base.ctypes.data
                if rows.strides[1] != rows.itemsize or rows.strides[0] < rows.itemsize * rows.shape[1] or inside < 0:
                    return None
                return cls(str(base.filename), int(base.offset) + inside, rows.strides[0], rows.shape[1], rows.dtype)
            base = getattr(base, "base", None)
        return None

    def read(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows by number."""
        out = np.empty((len(rows), self._width), self._dtype)
        offsets = self._first + rows.astype(np.int64) * self._stride
        if read_rows(self._descriptor, offsets, out.view(np.uint8).reshape(len(rows), self._width * out.itemsize)):
            raise DataError("the vector file could not be read to its end; it changed while the index was built")
        return out

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def open_source(
    vectors: Any, *, column: str | None = None, spool: Path | None = None, block_bytes: int = 1 << 24
) -> Source:
    """A source from an array, a memory map, a path, or an iterable of arrays.

    Paths: ``.npy``, ``.fvecs``, ``.bvecs``, ``.fbin``, ``.f16bin``, ``.u8bin``, ``.i8bin``, ``.hdf5`` (dataset
    ``train`` of ann-benchmarks, or ``column``), ``.parquet`` (``column`` names the list column). ``spool`` is a
    folder for the copy of what has no rows to seek. Raises :class:`~hasten.errors.DataError` with one line,
    :class:`~hasten.errors.MissingExtraError` for h5py or pyarrow.
    """
    if isinstance(vectors, Source):
        return vectors
    if isinstance(vectors, np.ndarray):
        return Source(vectors)
    if isinstance(vectors, (str, os.PathLike)):
        path = Path(vectors)
        if not path.is_file():
            raise DataError(f"{str(path)!r} is not a file; give vectors as an array or an existing file")
        suffix = path.suffix.lower()
        if suffix in (".hdf5", ".h5"):
            return _spooled(_hdf5(path, column or "train", block_bytes), spool)
        if suffix == ".parquet":
            return _spooled(_parquet(path, column, block_bytes), spool)
        return Source(_mapped(path, suffix))
    if hasattr(vectors, "__array__"):
        return Source(np.asarray(vectors))
    if isinstance(vectors, Iterable):
        return _spooled(iter(vectors), spool)
    raise DataError(f"vectors are a {type(vectors).__name__}; give an array, a file or an iterable of arrays")


def read_vectors(path: str | os.PathLike[str], column: str | None = None) -> NDArray[Any]:
    """All rows of a vector file in memory (queries, say); ``.ivecs`` (ground truth) too."""
    place = Path(path)
    suffix = place.suffix.lower()
    if not place.is_file():
        raise DataError(f"{str(place)!r} is not a file; name an existing vector file")
    if suffix in (".hdf5", ".h5"):
        return np.concatenate(list(_hdf5(place, column or "test", 1 << 24)))
    if suffix == ".parquet":
        return np.concatenate(list(_parquet(place, column, 1 << 24)))
    return np.array(_mapped(place, suffix))


def _mapped(path: Path, suffix: str) -> NDArray[Any]:
    size = path.stat().st_size
    try:
        if suffix == ".npy":
            return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]
        if suffix in _BINARY:
            count, width = (int(x) for x in np.fromfile(path, "<u4", 2))
            kind = np.dtype(_BINARY[suffix])
            if 8 + count * width * kind.itemsize != size:
                raise DataError(f"{str(path)!r} says {count} rows of {width} but holds {size} bytes; it is cut short")
            return np.memmap(path, kind, "r", 8, (count, width))
        if suffix in _RECORDS:
            kind = np.dtype(_RECORDS[suffix])
            width = int(np.fromfile(path, "<i4", 1)[0])
            record = 4 + width * kind.itemsize
            if width < 1 or size % record:
                raise DataError(f"{str(path)!r} does not consist of records of width {width}; it is damaged")
            whole = np.memmap(path, np.uint8, "r", 0, (size // record, record))
            return whole[:, 4:].view(kind)
    except (ValueError, IndexError) as error:
        raise DataError(f"{str(path)!r} could not be read as {suffix} ({error})") from error
    known = ", ".join([".npy", *_BINARY, *_RECORDS, ".hdf5", ".parquet"])
    raise DataError(f"{str(path)!r} has the unknown ending {suffix!r}; readable are {known}")


def _hdf5(path: Path, name: str, block_bytes: int) -> Iterator[NDArray[Any]]:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError("h5py", "hdf5", "reading an HDF5 file") from error
    with h5py.File(path, "r") as file:
        if name not in file:
            raise DataError(f"{str(path)!r} has no dataset {name!r}; it has {', '.join(file)}")
        data = file[name]
        step = max(1, block_bytes // max(1, data.shape[1] * data.dtype.itemsize))
        for begin in range(0, data.shape[0], step):
            yield data[begin : begin + step]


def _parquet(path: Path, column: str | None, block_bytes: int) -> Iterator[NDArray[Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "reading a Parquet file") from error
    file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    if column is None and len(names) == 1:
        column = names[0]
    if column not in names:
        raise DataError(f"{str(path)!r} needs the name of its vector column; it has {', '.join(names)}")
    seen = 0
    for batch in file.iter_batches(batch_size=max(1, min(65536, block_bytes // 4096)), columns=[column]):
        values = batch.column(0)
        flat = values.flatten().to_numpy(zero_copy_only=False)
        if len(values) == 0:
            continue
        if values.null_count or len(flat) % len(values):
            raise DataError(
                f"column {column!r} of {str(path)!r} has rows of different widths near row {seen}; all must agree"
            )
        seen += len(values)
        yield flat.reshape(len(values), -1)


def _spooled(blocks: Iterator[Any], folder: Path | None) -> Source:
    """Copy blocks (or single rows) to a plain file and map it."""
    import tempfile

    descriptor, name = tempfile.mkstemp(prefix=".spool-", suffix=".part", dir=folder)
    path = Path(name)
    width, kind, count = 0, np.dtype(np.float32), 0
    try:
        with os.fdopen(descriptor, "wb") as file:
            for block in blocks:
                part = np.atleast_2d(np.asarray(block))
                if part.dtype == np.float64:
                    part = part.astype(np.float32)
                if count == 0:
                    width, kind = part.shape[1], part.dtype
                if part.ndim != 2 or part.shape[1] != width or part.dtype != kind:
                    raise DataError(
                        f"row {count} is {part.dtype} of width {part.shape[-1]}; the rows before are {kind} of {width}"
                    )
                file.write(np.ascontiguousarray(part).tobytes())
                count += len(part)
        if count == 0:
            raise DataError("the iterable gave no vectors; an index needs at least one row")
        return Source(np.memmap(path, kind, "r", 0, (count, width)), path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
