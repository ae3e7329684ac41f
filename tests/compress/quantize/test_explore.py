from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantize_models import cnn, images

from hasten.compress.explore import formats
from hasten.compress.quantize import Equalise, Int, Simulated
from hasten.compress.quantize.explore import Candidate, FormatFront, splits
from hasten.compress.technique import sqnr
from hasten.errors import ConfigurationError
from hasten.measure.fpga import Fpga


def test_all_splits_of_a_width() -> None:
    assert [f.label for f in splits(6)] == ["int6", "e2m3", "e3m2", "e4m1", "e5m0"]
    assert all(f.bits == 6 for f in splits(6))


def test_every_format_is_tried_on_the_model(tmp_path: Path) -> None:
    model, x = cnn(), images()
    with torch.inference_mode():
        goal = model(x)
    ends: list[list[int]] = []

    def metric(small: torch.nn.Module) -> float:
        ends.append([m.format.bits for m in small.modules() if isinstance(m, Simulated)])
        with torch.inference_mode():
            return sqnr(goal, small(x))

    result = formats(model, [x], metric, bits=(4, 6), steps=((), (Equalise(),)), ends_at_8=True)
    assert len(result.candidates) == 2 * (3 + 5)
    assert ends[0] == [8, 4, 4, 8]
    front = result.front()
    assert [c.luts for c in front] == sorted(c.luts for c in front)
    assert [c.score for c in front] == sorted(c.score for c in front)
    for candidate in front:
        assert not any(o.luts <= candidate.luts and o.score > candidate.score for o in result.candidates)
    assert "e2m1" in result.table()
    result.plot(str(tmp_path / "front.png"))
    assert (tmp_path / "front.png").stat().st_size > 1000
    assert len(formats(model, [x], metric, bits=(3,), mixed=True).candidates) == 4


def test_the_break_even_is_where_the_majority_flips() -> None:
    whole, small = Int(4), splits(4)[1]
    layers = (("0", 64, 1),)
    tried = (Candidate(whole, whole, (), 0.5, 0, 4), Candidate(small, small, (), 0.9, 0, 4))
    front = FormatFront(tried, layers, Fpga())
    assert front.integer_share() == 0.5  # both are on it: the float is better and dearer
    assert front.break_even() == 1.5
    worse = FormatFront((tried[0], Candidate(small, small, (), 0.4, 0, 4)), layers, Fpga())
    assert worse.integer_share() == 1.0
    flip = worse.break_even()
    assert flip is not None
    assert worse.luts(worse.candidates[1], Fpga().floats_times(flip)) <= worse.luts(worse.candidates[0], Fpga())


def test_bad_widths() -> None:
    with pytest.raises(ConfigurationError, match="widths"):
        formats(cnn(), [images()], lambda m: 0.0, bits=(9,))
