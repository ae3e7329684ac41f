"""Dropping pages of libraries: what remains works, and what the process changed stays."""

import ctypes
import platform
import re
import subprocess
import sys

import numpy as np
import pytest

from hasten.serve.resident import drop_library_pages

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/smaps")

PROBE = """
import re, numpy as np, unicodedata
from hasten.serve.resident import drop_library_pages
def resident():
    return int(re.search(r"Rss:\\s+(\\d+)", open("/proc/self/smaps_rollup").read())[1]) << 10
draw = np.random.default_rng(0).standard_normal((64, 64))
before, product = resident(), draw @ draw
dropped = drop_library_pages()
after = resident()
assert np.array_equal(product, draw @ draw) and unicodedata.name("a") == "LATIN SMALL LETTER A"
print(before, dropped, after)
"""


def test_a_process_shrinks_and_goes_on():
    ran = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    before, dropped, after = map(int, ran.stdout.split())
    assert dropped > 4 << 20
    assert after < before - dropped // 2


FREED = """
import re
from hasten.serve.resident import return_freed_memory
def resident():
    return int(re.search(r"Rss:\\s+(\\d+)", open("/proc/self/smaps_rollup").read())[1]) << 10
pieces = [bytes(4000) for _ in range(10_000)]
last = pieces[-1]
before = resident()
del pieces
held = resident()
return_freed_memory()
print(before, held, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators return memory in their own way")
def test_freed_memory_below_a_living_piece_goes_back():
    ran = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    before, _, after = map(int, ran.stdout.split())
    assert after < before - 20e6


ALONE = """
import sys
from hasten.serve.resident import import_numba_alone, keep_heap_small
keep_heap_small()
import_numba_alone()
import numba, numpy as np
total = numba.njit(lambda x: x.sum())(np.arange(4.0))
assert "scipy" not in sys.modules and total == 6.0
import scipy.linalg
print(scipy.linalg.det(np.eye(2)))
"""


def test_numba_comes_without_scipy_and_scipy_later():
    ran = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout.strip()) == (0, "1.0"), ran.stderr


def test_only_clean_pages_of_libraries_are_dropped(tmp_path):
    """A map with a writable, a changed, a shared and a foreign mapping over a page of ours: nothing may be touched."""
    page = np.full(8192, 7, np.uint8)
    begin = -(-page.ctypes.data // 4096) * 4096
    where = f"{begin:x}-{begin + 4096:x}"
    numbers = "Rss: 4 kB\nAnonymous: {} kB\n"
    smaps = tmp_path / "smaps"
    smaps.write_text(
        f"{where} rw-p 0 08:01 1  /lib/a.so\n{numbers.format(0)}"
        f"{where} r--p 0 08:01 1  /lib/a.so.1\n{numbers.format(4)}"
        f"{where} r--s 0 08:01 1  /lib/a.so\n{numbers.format(0)}"
        f"{where} r--p 0 08:01 1  /data/weights.safetensors\n{numbers.format(0)}"
        f"{where} r--p 0 00:00 0  \n{numbers.format(0)}"
    )
    assert drop_library_pages(smaps) == 0
    assert (page == 7).all()
    smaps.write_text(f"{where} r--p 0 08:01 1  /lib/a.so.1\n{numbers.format(0)}")
    assert drop_library_pages(smaps) == 4096  # said to be clean: the page is dropped, here one of zeros comes back
    assert ctypes.string_at(begin, 4096) == bytes(4096)


def test_a_system_without_the_map_drops_nothing(tmp_path):
    assert drop_library_pages(tmp_path / "missing") == 0
    assert re.fullmatch(r"\d+", str(drop_library_pages()))
