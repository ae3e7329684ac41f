"""Copies of one state of an index: to a directory, or as a tar stream and back."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

from hasten.errors import DataError
from hasten.retrieve.index import format as files
from hasten.retrieve.index.io import DiskFolder, Folder

__all__ = ["restore", "snapshot"]


def snapshot(folder: Folder, manifest: files.Manifest, log_size: int, target: Any) -> None:
    """Copy one state to a new directory, or as a tar stream to an object with ``write``.

    Files of a generation never change, so a directory on the same disk gets hard links. The log is cut at its last
    whole record.
    """
    log = folder.read(manifest.wal)[:log_size]
    document = json.dumps(manifest.to_json(), indent=1, sort_keys=True).encode()
    if hasattr(target, "write"):
        with tarfile.open(fileobj=target, mode="w|") as tar:
            for name in sorted(manifest.files):
                tar.add(folder.path(name), arcname=name, recursive=False)
            for name, data in ((manifest.wal, log), (files.MANIFEST, document)):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        return
    place = Path(target)
    if place.exists() and any(place.iterdir()):
        raise DataError(f"{str(place)!r} is not empty; name a new directory for the snapshot")
    out = DiskFolder(place, make=True)
    for name in sorted(manifest.files):
        try:
            os.link(folder.path(name), place / name)
        except OSError:  # another disk, or one without links
            shutil.copyfile(folder.path(name), place / name)
    files.put(out, manifest.wal, log)
    files.commit(out, manifest)


def restore(stream: Any, path: Any) -> None:
    """Unpack a tar stream of :func:`snapshot` into the new directory ``path``; raises DataError where it is cut
    short.
    """
    place = Path(path)
    if place.exists() and any(place.iterdir()):
        raise DataError(f"{str(place)!r} is not empty; name a new directory for the index")
    place.mkdir(parents=True, exist_ok=True)
    seen = set()
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for entry in tar:
                if not entry.isfile() or "/" in entry.name or entry.name.startswith("."):
                    raise DataError(
                        f"the stream holds {entry.name!r}, which is no file of an index; it is not a snapshot"
                    )
                source = tar.extractfile(entry)
                assert source is not None
                folder = DiskFolder(place)
                writer = folder.create(entry.name)
                while block := source.read(1 << 20):
                    writer.write(block)
                writer.sync()
                writer.close()
                seen.add(entry.name)
    except tarfile.TarError as error:
        raise DataError(f"the stream is cut short or not a tar ({error}); take the snapshot again") from error
    manifest = files.read_manifest(DiskFolder(place))
    for name, known in manifest.files.items():
        if name not in seen or DiskFolder(place).size(name) != known["bytes"]:
            raise DataError(f"the stream lacks {name!r}; take the snapshot again")
        if "crc32" in known and files.checksum(DiskFolder(place).map(name)) != known["crc32"]:
            raise DataError(f"{name!r} has a wrong checksum in the stream; take the snapshot again")
    DiskFolder(place).sync()
