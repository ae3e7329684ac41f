"""Parts of the study of latent attention; the whole of it takes a quarter of an hour and is left to `hasten study`."""

import numpy as np
import torch

from hasten.compress import ToMLA
from hasten.language import Decoder, DecoderConfig, random_model
from hasten.studies import _grouped, transmla
from hasten.studies.study import Scale

torch.set_num_threads(1)


def test_one_head_to_a_key_head_is_within_reach_and_shared_ones_are_not():
    for seed in range(3):
        assert transmla.unreachable(np.random.default_rng(seed), groups=2, share=1) < 1e-9
        assert transmla.unreachable(np.random.default_rng(seed)) > 0.1
    assert len(list(transmla._splits([0, 1, 2, 3], 2))) == 3


def test_a_short_training_brings_a_smaller_cache_back_and_goes_on_where_it_was_cut_off(tmp_path):
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=24,
        max_position_embeddings=64,
    )  # fmt: skip
    teacher = Decoder(config).eval()
    for p in teacher.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)
    rows = torch.randint(0, 50, (32, 33), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(1)
    told = []

    def trained(folder):
        folder.mkdir(exist_ok=True)
        small = ToMLA(kv_rank=3, rope_dims=4)(teacher, [rows])
        before = far(small)
        made = _grouped._train_recovered(
            rows=rows, weights=weights, tokens=8 * 32 * 12, seed=0, checkpoint=folder, model=small, teacher=teacher,
            told=told.append,
        )  # fmt: skip
        return before, far(small), made["weights"]

    def far(model):
        with torch.no_grad():
            return float((model(rows) - teacher(rows)).square().mean())

    first, second = trained(tmp_path / "a"), trained(tmp_path / "b")
    assert first[1] < 0.8 * first[0]
    assert len(told) == 24
    for name, tensor in first[2].items():
        torch.testing.assert_close(second[2][name], tensor)
    assert not teacher.model.layers[0]._forward_hooks
    again = trained(tmp_path / "a")  # the training is over: its weights are there
    assert again[1] == first[1]
    assert len(told) == 24


def test_every_context_has_checks_of_its_own_name():
    model = random_model(
        DecoderConfig(
            vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
            max_position_embeddings=256,
        ),
        name="small",
        dtype="fp32",
    )  # fmt: skip
    pair = {"grouped": model, "latent": model}
    checks = [c for n in (16, 32) for c in transmla._step_times(pair, list(range(n)), Scale(quick=True))]
    assert len(checks) == 4
    assert len({c.name for c in checks}) == 4
