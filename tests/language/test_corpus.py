"""The split is by path and keeps near-duplicates together."""

import pytest

from hasten.errors import DataError
from hasten.language.corpus import documents, near_duplicates, split_of


def test_split_is_fixed():
    names = [f"package/module_{i}.py" for i in range(2000)]
    sides = [split_of(n) for n in names]
    assert 0.86 < sides.count("train") / 2000 < 0.94
    assert split_of("heapq.py") == "test"
    assert split_of("asyncio/tasks.py") == "test"


def test_near_duplicates_point_to_the_first():
    base = "\n".join(f"value_{i} = compute({i})" for i in range(100))
    other = "\n".join(f"other_{i} = nothing({i})" for i in range(100))
    changed = base.replace("value_7 =", "value_x =")
    assert near_duplicates([base, other, changed, other]) == [0, 1, 0, 1]


def test_near_duplicates_share_a_side(tmp_path):
    text = "\n".join(f"value_{i} = compute({i})" for i in range(100))
    for i in range(40):
        (tmp_path / f"m{i}.py").write_text(text + f"\n# {i}\n")
    assert len({d.split for d in documents(tmp_path)}) == 1


def test_unreadable_files_are_left_out_and_an_empty_folder_is_named(tmp_path):
    (tmp_path / "bad.py").write_bytes(b"\xff\xfe" * 100)
    with pytest.raises(DataError, match="no readable"):
        documents(tmp_path)
