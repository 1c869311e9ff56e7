"""The objective's benchmark runs, and its measures mean what they say."""

from __future__ import annotations

import re
import sys
import time

import pytest
import torch

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import bench_objective as tool


def test_in_short(monkeypatch, capsys):
    monkeypatch.setattr(tool, "SHAPES", {"tiny": (4, 8, 8)})
    monkeypatch.setattr(tool, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(sys, "argv", ["tool", "--device", "cpu", "--micro", "1", "--repeats", "2", "--no-compile"])
    assert tool.main() == 0
    printed = capsys.readouterr().out
    assert (
        "| model | pairs | MB moved | floor | fused | eager | fused / floor | eager / fused | peak fused | peak eager |" in printed
    )
    assert re.search(
        r"\| tiny \| 1 \| 0\.0 \| .*µs \| .*µs \| .*µs \| [\d.]+ \| [\d.]+ \([-\d.]+–[-\d.]+\) \| .*MiB \| .*MiB \|", printed
    )
    # Six rows of fifty buckets in float64.
    assert re.search(r"`commit\(\)` on two gloo ranks: \d+ µs, with an all-reduce of 2,400 bytes", printed)


def test_device_time_is_that_of_the_operators_alone():
    tensor = torch.ones(60, 60)

    def run():
        time.sleep(0.1)
        return tensor @ tensor

    assert 0 < tool.device_seconds(run, "cpu", calls=3) < 0.1


def test_candidates_that_differ_are_found():
    inputs = tool.made_up((4, 8, 8), 2, torch.bfloat16, "cpu")
    tool.compare({"fused": tool.fused, "eager": tool.eager}, inputs)
    with pytest.raises(AssertionError, match="doubled"):
        tool.compare({"doubled": lambda *each: 2 * tool.eager(*each)}, inputs)
