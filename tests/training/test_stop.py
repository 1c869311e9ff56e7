from __future__ import annotations

import os
import signal

import pytest
import torch

from dde_ds.training import stop

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture
def asked(tmp_path):
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield stop.StopRequest(tmp_path, torch.device("cpu"))
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_comes_while_the_ranks_agree_counts_in_the_next_round(monkeypatch, asked, number):
    """This rank has said no by then, and acts as all do. But it must not forget: in a collective it spends much of its time."""

    def any_rank(flag, device):
        if not flag:
            os.kill(os.getpid(), number)
        return flag

    monkeypatch.setattr(stop, "any_rank", any_rank)
    assert [asked.agreed() for _ in range(3)] == [False, True, True]


def test_what_another_rank_was_asked_stays(monkeypatch, asked):
    monkeypatch.setattr(stop, "any_rank", lambda flag, device: True)
    assert asked.agreed()
    monkeypatch.setattr(stop, "any_rank", lambda flag, device: flag)
    assert asked.agreed()
    with pytest.raises(stop.Interrupted):
        asked.poll()
