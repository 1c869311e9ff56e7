from __future__ import annotations

import pytest
import torch

from dde_ds import UserError
from dde_ds.objective.correction import CorrectionTable

LAMBDA = torch.tensor([0.0, 0.5, 0.25, 2.0], dtype=torch.float64)


def add(table, t, m):
    table.add(torch.tensor(t), torch.tensor(m), torch.zeros(4, len(m)))


def test_decayed_sums_and_tail_sum_by_hand():
    table = CorrectionTable(LAMBDA, 0.9, 2)  # timesteps 0 and 1, 2 and 3
    add(table, [0, 1, 3], [2.0, 4.0, -1.0])
    assert not table.correction.any(), "a step sees the table as the step before left it"
    table.commit()
    assert table.average[0].tolist() == [3.0, -1.0], "nothing is left of the zeros that the table began with"
    # K_t = Σ_{j>t} λ_j M_j
    assert table.correction.tolist() == [0.5 * 3 - 0.25 - 2, -0.25 - 2, -2.0, 0.0]
    add(table, [2], [9.0])
    table.commit()
    assert table.sums[0].tolist() == pytest.approx([0.9 * 6, 0.9 * -1 + 9])
    assert table.count.tolist() == pytest.approx([0.9 * 2, 0.9 + 1])
    second = (0.9 * -1 + 9) / 1.9
    assert table.average[0].tolist() == pytest.approx([3.0, second]), "a bucket that a step did not see keeps its mean"
    assert table.correction.tolist() == pytest.approx([0.5 * 3 + 2.25 * second, 2.25 * second, 2 * second, 0.0])


@pytest.mark.parametrize("buckets", [1, 3, 7, 50])
def test_against_the_rule_written_out(buckets):
    """Forty steps of few pairs: every pair with its age, and K_t as a sum over pairs' means. Timesteps need not divide by buckets."""
    steps, ema = 50, 0.8
    generator = torch.Generator().manual_seed(buckets)
    weight = torch.rand(steps, generator=generator, dtype=torch.float64)
    table, seen = CorrectionTable(weight, ema, buckets), []
    for step in range(40):
        t = torch.randint(10, steps, (3,), generator=generator)
        m, errors = torch.randn(3, generator=generator).double(), torch.rand(4, 3, generator=generator).double()
        table.add(t, m, errors)
        table.commit()
        seen += [(step, int(t[i]) * buckets // steps, torch.cat([m[i : i + 1], errors[:, i]])) for i in range(3)]
    expected = torch.zeros(5, buckets, dtype=torch.float64)
    for b in range(buckets):
        own = [(ema ** (39 - step), values) for step, bucket, values in seen if bucket == b]
        if own:
            expected[:, b] = sum(age * values for age, values in own) / sum(age for age, _ in own)
    torch.testing.assert_close(table.average, expected, rtol=1e-12, atol=1e-14)
    tail = [sum(weight[j] * expected[0, j * buckets // steps] for j in range(t + 1, steps)) for t in range(steps)]
    torch.testing.assert_close(
        table.correction, torch.tensor([float(k) for k in tail], dtype=torch.float64), rtol=1e-12, atol=1e-14
    )


def test_margins_that_grow_are_followed_at_small_batches():
    """A table that decays by observation keeps what the policy did when it was young: here it would show a quarter of what is true."""
    steps, weight = 1000, torch.full((1000,), 0.003, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    table = CorrectionTable(weight, 0.9, 50)
    for step in range(120):
        t = torch.randperm(steps, generator=generator)[:32]
        table.add(t, torch.full((32,), -1e-5 * (step + 1)), torch.zeros(4, 32))
        table.commit()
    true = -1e-5 * 120 * 0.003 * torch.arange(steps - 1, -1, -1)
    assert (table.correction[:900] / true[:900]).min() > 0.85
    assert (table.correction[:900] / true[:900]).max() < 1


def test_any_split_of_a_step_gives_the_same_table():
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(4, (64,), generator=generator)
    m, errors = torch.randn(64, generator=generator), torch.rand(4, 64, generator=generator)
    tables = []
    for micro in (1, 8, 64):
        table = CorrectionTable(LAMBDA, 0.5, 4)
        for low in range(0, 64, micro):
            table.add(t[low : low + micro], m[low : low + micro], errors[:, low : low + micro])
        table.commit()
        tables.append(table)
    for table in tables[1:]:
        torch.testing.assert_close(table.sums, tables[0].sums, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(table.correction, tables[0].correction, rtol=1e-12, atol=1e-14)


def test_state_survives():
    table = CorrectionTable(LAMBDA, 0.9, 2)
    add(table, [1, 2], [1.0, 2.0])
    table.commit()
    restored = CorrectionTable(LAMBDA, 0.9, 2)
    restored.load_state_dict(table.state_dict())
    assert torch.equal(table.correction, restored.correction)
    for each in (table, restored):
        add(each, [2], [5.0])
        each.commit()
    assert torch.equal(table.correction, restored.correction)
    with pytest.raises(UserError, match=r"objective\.correction_buckets is 4"):
        CorrectionTable(LAMBDA, 0.9, 4).load_state_dict(table.state_dict())
