from __future__ import annotations

import pytest
import torch

from dde_ds import UserError
from dde_ds.objective.correction import CorrectionTable

LAMBDA = torch.tensor([0.0, 0.5, 0.25, 2.0], dtype=torch.float64)


def add(table, t, m):
    table.add(torch.tensor(t), torch.tensor(m), torch.zeros(4, len(m)))


def test_moving_average_and_tail_sum_by_hand():
    table = CorrectionTable(LAMBDA, ema=0.9)
    add(table, [1, 1, 3], [2.0, 4.0, -1.0])
    assert not table.correction.any(), "a step sees the table as the step before left it"
    table.commit()
    assert table.average[0].tolist() == [0.0, 3.0, 0.0, -1.0], "the first observation sets an entry"
    # K_t = Σ_{j>t} λ_j M_j
    assert table.correction.tolist() == [0.5 * 3 + 2 * -1, -2.0, -2.0, 0.0]
    add(table, [3], [9.0])
    table.commit()
    assert table.average[0].tolist() == pytest.approx([0.0, 3.0, 0.0, 0.9 * -1 + 0.1 * 9])
    assert table.count.tolist() == [0, 2, 0, 2]


def test_any_split_of_a_step_gives_the_same_table():
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(4, (64,), generator=generator)
    m, errors = torch.randn(64, generator=generator), torch.rand(4, 64, generator=generator)
    tables = []
    for micro in (1, 8, 64):
        table = CorrectionTable(LAMBDA, ema=0.5)
        for low in range(0, 64, micro):
            table.add(t[low : low + micro], m[low : low + micro], errors[:, low : low + micro])
        table.commit()
        tables.append(table)
    for table in tables[1:]:
        torch.testing.assert_close(table.average, tables[0].average, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(table.correction, tables[0].correction, rtol=1e-12, atol=1e-14)


def test_state_survives():
    table = CorrectionTable(LAMBDA, ema=0.9)
    add(table, [1, 2], [1.0, 2.0])
    table.commit()
    restored = CorrectionTable(LAMBDA, ema=0.9)
    restored.load_state_dict(table.state_dict())
    for each in (table, restored):
        add(each, [2], [5.0])
        each.commit()
    assert torch.equal(table.correction, restored.correction)
    with pytest.raises(UserError, match="timesteps"):
        CorrectionTable(LAMBDA[:3], ema=0.9).load_state_dict(table.state_dict())
