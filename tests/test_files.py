from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hasten.errors import DataError
from hasten.files import check_place, write_bytes, write_text
from hasten.testing.files import FullDisk


@pytest.mark.parametrize("room", [0, 3])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, room: int) -> None:
    path = tmp_path / "report.html"
    write_text(path, "old")
    with pytest.raises(DataError, match="No space left") as caught:
        write_text(path, "new text", opener=lambda d: FullDisk(d, room))
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_real_file_size_limit(tmp_path: Path) -> None:
    """The same through the operating system: RLIMIT_FSIZE in a child process."""
    program = (
        "import resource, sys; sys.path.insert(0, sys.argv[2]);"
        "from hasten.files import write_text; from hasten.errors import DataError;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));\n"
        "try: write_text(sys.argv[1], 'x' * 100000)\n"
        "except DataError as e: print(e); sys.exit(7)"
    )
    source = Path(__file__).parents[1] / "src"
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out"), str(source)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 7, ran.stderr
    assert "File too large" in ran.stdout
    assert ran.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == ["cache"] or os.listdir(tmp_path) == []


def test_writes_whole_with_ordinary_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_text(path, "héllo")
    assert path.read_text(encoding="utf-8") == "héllo"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="was not written"):
        write_text(tmp_path / "file" / "inside", "x")


def test_pieces_of_bytes_follow_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.bin"
    assert write_bytes(path, b"ab", b"", b"cde") == 5
    assert path.read_bytes() == b"abcde"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_place_is_asked_for_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    check_place(tmp_path / "a" / "b" / "new.html")
    check_place(file)
    check_place(tmp_path / "a" / "folder", folder=True)
    check_place(tmp_path, folder=True)
    assert os.listdir(tmp_path) == ["file"]
    assert file.read_text() == "old"
    for path, folder in ((file / "below", False), (file, True), (tmp_path, False), (Path("/proc/nowhere/x"), False)):
        with pytest.raises(DataError, match=r"cannot be written \(.*\); name another place") as caught:
            check_place(path, folder=folder)
        assert "\n" not in str(caught.value)
