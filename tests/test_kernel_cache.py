from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hasten
from hasten.kernel_cache import stamp_of

CALLEE = "from numba import njit\n\n\n@njit(cache=True, inline='always')\ndef inner(x):\n    return x + {}\n"
CALLER = (
    "from numba import njit\n\nfrom tiny.callee import inner\nfrom tiny.numbers import FACTOR\n\n\n"
    "@njit(cache=True)\ndef outer(x):\n    return inner(x) * FACTOR\n"
)
RUN = (
    "import sys; sys.path[:0] = [{folder!r}, {source!r}]\n{first}"
    "from pathlib import Path\nfrom hasten.kernel_cache import install\ninstall(Path({folder!r}) / 'tiny')\n"
    "from tiny.caller import outer\nprint(outer(1), sum(outer.stats.cache_hits.values()))\n"
)


class _Package:
    """A package of two kernels and a constant, the first kernel calling the second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tiny").mkdir()
        self.write("__init__.py", "")
        self.write("callee.py", CALLEE.format(1))
        self.write("caller.py", CALLER)
        self.write("numbers.py", "FACTOR = 10\n")

    def write(self, name: str, text: str) -> None:
        (self.folder / "tiny" / name).write_text(text)

    def run(self, first: str = "", **variables: str) -> tuple[int, int]:
        """What the outer kernel answers in a new process, and how many compiled ones it found."""
        source = str(Path(hasten.__file__).parent.parent)
        code = RUN.format(folder=str(self.folder), source=source, first=first)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", **variables}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        answer, hits = done.stdout.split()
        return int(answer), int(hits)

    def files(self) -> set[str]:
        return {p.name for p in self.folder.rglob("*.nbi") if p.name.startswith("caller.")}


@pytest.fixture
def package(tmp_path: Path) -> _Package:
    return _Package(tmp_path)


@pytest.mark.parametrize("first", ["", "import numba\n"], ids=["before numba", "after numba"])
def test_a_kernel_sees_what_changed_in_another_file(package: _Package, first: str) -> None:
    assert package.run(first) == (20, 0)
    assert package.run(first) == (20, 1)
    package.write("callee.py", CALLEE.format(2))
    assert package.run(first) == (30, 0)  # numba alone answers 20
    package.write("numbers.py", "FACTOR = 100\n")
    assert package.run(first) == (300, 0)
    assert package.run(first) == (300, 1)


def test_code_that_comes_back_finds_its_kernels(package: _Package) -> None:
    package.run()
    package.write("callee.py", CALLEE.format(2))
    package.run()
    package.write("callee.py", CALLEE.format(1))
    assert package.run() == (20, 1)


def test_old_kernels_are_removed_when_new_ones_are_written(package: _Package) -> None:
    package.run()
    (before,) = package.files()
    package.write("callee.py", CALLEE.format(2))
    package.run()
    assert len(package.files()) == 2  # a process with the old code may still run
    for file in package.folder.rglob("*.nb[ic]"):
        os.utime(file, (time.time() - 7200, time.time() - 7200))
    package.write("callee.py", CALLEE.format(3))
    package.run()
    assert len(package.files()) == 1
    assert before not in package.files()


def test_the_users_folder_wins(package: _Package, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    assert package.run(NUMBA_CACHE_DIR=str(chosen)) == (20, 0)
    assert not list((tmp_path / "tiny").rglob("*.nbi"))
    assert list(chosen.rglob("caller.*.nbi"))
    package.write("callee.py", CALLEE.format(2))
    assert package.run(NUMBA_CACHE_DIR=str(chosen)) == (30, 0)


def test_a_folder_that_takes_nothing(package: _Package, tmp_path: Path) -> None:
    (tmp_path / "tiny" / "__pycache__").write_text("no folder")
    kept = tmp_path / "home"
    assert package.run(HOME=str(kept), XDG_CACHE_HOME=str(kept)) == (20, 0)
    assert package.run(HOME=str(kept), XDG_CACHE_HOME=str(kept)) == (20, 1)
    assert list(kept.rglob("*.nbi"))


def test_a_stamp_covers_what_is_taken_in(tmp_path: Path) -> None:
    root = Path(hasten.__file__).parent
    product = root / "nn" / "product"
    assert stamp_of(product / "int8.py", root) != stamp_of(product / "int4.py", root)
    copy = tmp_path / "hasten"
    stamps = []
    for extra in ("", "# one more line\n"):
        for file in root.rglob("*.py"):
            target = copy / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        with (copy / "nn" / "bfloat.py").open("a") as changed:
            changed.write(extra)
        stamps.append({n: _fresh(copy / "nn" / "product" / n, copy) for n in ("int8.py", "tiles.py", "blocks.py")})
    assert stamps[0]["int8.py"] != stamps[1]["int8.py"]
    assert stamps[0]["tiles.py"] != stamps[1]["tiles.py"]
    assert stamps[0]["blocks.py"] == stamps[1]["blocks.py"]  # takes nothing from there


def _fresh(path: Path, root: Path) -> str:
    from hasten import kernel_cache

    for cached in (stamp_of, kernel_cache._read, kernel_cache._digest, kernel_cache._source, kernel_cache._exists):
        cached.cache_clear()
    return stamp_of(path, root)
