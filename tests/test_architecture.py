"""The floors of the house: a room imports rooms on lower floors only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hasten

ROOT = Path(hasten.__file__).parent
FLOORS = {
    "budget": 0, "errors": 0, "clock": 0, "files": 0, "huge_pages": 0, "kernel_cache": 0,
    "measure": 1, "nn": 1, "frozen": 1, "network": 1, "synth": 1, "geometry": 1,
    "train": 2, "compress": 2, "adapt": 2, "spiking": 2,
    "search": 3,
    "diffusion": 4, "language": 4, "vision": 4, "events": 4, "retrieve": 4,
    "speech": 5, "serve": 5,
    "tune": 6,
    "apps": 7, "studies": 7, "testing": 7,
    "cli": 8,
}  # fmt: skip
ALONG_A_FLOOR = {
    ("budget", "errors"),
    ("clock", "errors"),
    ("files", "errors"),
    ("spiking", "adapt"),
    ("spiking", "compress"),  # the contract of a technique
    ("compress", "train"),  # fine-tuning what was compressed
    ("train", "network"),
    ("testing", "studies"),
}


def imports(path):
    """Rooms that a file imports, whether at its top or inside a function; type checking counts too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
            if node.module == "hasten":
                names = [f"hasten.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "hasten" and len(parts) > 1 and parts[1] in FLOORS:
                yield parts[1]


def rooms():
    return sorted(p for p in ROOT.iterdir() if p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py"))))


@pytest.mark.parametrize("room", [r for r in rooms() if r.stem != "__init__"], ids=lambda p: p.stem)
def test_a_room_imports_lower_floors_only(room):
    assert room.stem in FLOORS, f"{room.stem} has no floor; add it to the table of the design"
    files = [room] if room.suffix == ".py" else room.rglob("*.py")
    wrong = []
    for path in files:
        for other in set(imports(path)):
            allowed = FLOORS[other] < FLOORS[room.stem] or other == room.stem or (room.stem, other) in ALONG_A_FLOOR
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong


def test_import_is_light():
    heavy = ("torch", "numba", "numpy", "matplotlib", "optuna")
    code = f"import sys, hasten; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_package_has_a_docstring_and_no_file_is_called_utils():
    for path in ROOT.rglob("*.py"):
        assert "util" not in path.stem
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} does not say what it is for"


def test_time_is_handed_in():
    """Nothing calls the clock of the machine but measure/, clock.py and the outermost loops."""
    allowed = {"clock.py", "serve/server.py"}
    wrong = []
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if name in allowed or name.startswith("measure/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "time"
                and node.func.attr in ("time", "perf_counter", "monotonic", "sleep")
            ):
                wrong.append(f"{name}:{node.lineno}")
    assert not wrong
