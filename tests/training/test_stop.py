from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from dde_ds.training import signals, stop
from dde_ds.training.signals import SIGNALS, listening


@pytest.fixture
def asked(tmp_path):
    with listening():
        yield stop.StopRequest(tmp_path, torch.device("cpu"))


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


def test_handlers_are_the_old_ones_afterwards_and_what_came_is_forgotten():
    came = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in SIGNALS}
    try:
        with pytest.raises(KeyError), listening():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.asked()
            raise KeyError
        assert not signals.asked()
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        assert came == list(SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_none_is_installed_outside_the_main_thread():
    before, within = [signal.getsignal(number) for number in SIGNALS], []

    def work():
        with listening():
            within.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert within == before


def test_what_came_before_the_run_began_counts():
    """Blocked by the process that started this one, or sent while libraries are imported."""
    code = (
        "import os, signal, sys\n"
        "from dde_ds.training.signals import asked, listen, listening\n"
        "assert not any(name in sys.modules for name in ('torch', 'yaml', 'numpy'))\n"
        "listen()\n"
        "print(asked())\n"  # the blocked one
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "with listening() as came:\n"
        "    print(sorted(came))\n"
    )

    def block():
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        os.kill(os.getpid(), signal.SIGUSR1)

    started = subprocess.run([sys.executable, "-c", code], preexec_fn=block, capture_output=True, text=True, timeout=60)
    assert started.stdout == f"True\n{[int(signal.SIGUSR1), int(signal.SIGTERM)]}\n", started.stderr
