"""The studies of low rank and adaptive computation: the parts that take a second; the whole ones are run by hand."""

import importlib
import math

import pytest
import torch

from hasten.studies import Scale, load
from hasten.studies.study import Check

torch.set_num_threads(1)

PARTS = [
    ("modegpt", "exact"),
    ("svdquant", "exact"),
    ("svdquant", "outliers"),
    ("svdquant", "sizes"),
    ("acm", "exact"),
]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))


@pytest.mark.parametrize("name", ["modegpt", "svdquant", "maestro", "acm"])
def test_studies_claim_something_and_are_found(name):
    study = load(name)
    assert study.system == name
    assert len(study.claim.split()) > 8
    assert study.published


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_what_is_exact_holds(name, part):
    module = importlib.import_module(f"hasten.studies.{name}")
    checks = list(getattr(module, part)(Scale(quick=True)))
    assert checks
    assert all(isinstance(c, Check) and c.threshold for c in checks)
    assert [c.name for c in checks if not c.holds] == []


def test_prefix_errors_by_definition():
    from hasten.studies.maestro import _prefix_errors

    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    u, s, v = torch.linalg.svd(matrix)
    assert max(_prefix_errors(u * s, v.T, matrix)) < 1e-6
    shuffled = [1, 0, 2]
    wrong = _prefix_errors((u * s)[:, shuffled], v.T[:, shuffled], matrix)
    assert wrong[0] == pytest.approx(math.sqrt(13 / 14))
    assert wrong[2] < 1e-6


def test_outliers_that_are_put_in_change_nothing():
    from hasten.diffusion import PRESETS, DiT
    from hasten.studies.svdquant import _with_outliers

    torch.manual_seed(0)
    model = DiT(PRESETS["dit-tiny"]).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([1, 50, 900]), torch.tensor([0, 4, 9])
    with torch.no_grad():
        torch.testing.assert_close(_with_outliers(model)(x, t, y), model(x, t, y), atol=1e-4, rtol=1e-4)


def test_exits_spend_what_they_are_asked():
    from hasten.studies.acm import _exit_accuracy

    def model(x):  # sure at the second of four exits for positive inputs, never before the last for others
        logits = torch.zeros(len(x), 4, 3)
        logits[:, 1, 0] = torch.where(x[:, 0, 0, 0] > 0, 9.0, 0.0)
        logits[:, 3, 1] = 9.0
        return logits

    x = torch.randn(400, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    y = torch.where(x[:, 0, 0, 0] > 0, 0, 1)
    assert _exit_accuracy(model, x, x, y, 0.75) == 1.0
    assert _exit_accuracy(model, x, x, y, 1.0) == pytest.approx(float((y == 1).float().mean()))


def test_the_digits_model_is_trained_once(tmp_path):
    pytest.importorskip("sklearn")
    from hasten.studies import _diffusion_digits as digits

    one = digits.trained("dit-tiny", 2)
    assert len(list(tmp_path.rglob("dit-tiny-*.pt"))) == 1
    two = digits.trained("dit-tiny", 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
