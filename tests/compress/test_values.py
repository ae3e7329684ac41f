from __future__ import annotations

from dataclasses import dataclass

import pytest

from hasten.compress.quantize import Int, Mse, PerGroup
from hasten.compress.values import named_value, read, write
from hasten.errors import ConfigurationError


def test_nested_values_and_lists_come_back() -> None:
    value = (Int(4, PerGroup(1, 64), observer=Mse(norm=2.4)), ("a", 1), None)
    assert read(write(value)) == value
    assert write(value[0])["granularity"] == {"kind": "PerGroup", "size": 64}


def test_only_named_classes_are_written_and_read() -> None:
    @dataclass(frozen=True)
    class Stranger:
        x: int = 1

    with pytest.raises(ConfigurationError, match="cannot hold a Stranger"):
        write(Stranger())
    with pytest.raises(ConfigurationError, match="no kind 'os.system'"):
        read({"kind": "os.system"})
    with pytest.raises(ConfigurationError, match="Int has no field size"):
        read({"kind": "Int", "size": 3})
    with pytest.raises(ConfigurationError, match="cannot be made"):
        read({"kind": "Codebook"})


def test_two_classes_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="rename one"):

        @named_value
        @dataclass(frozen=True)
        class Int:
            y: int = 0
