from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from dde_ds import UserError, build_objective
from dde_ds.distributed.group import start
from dde_ds.evaluation.generate import save_row
from dde_ds.rows import RowFile, is_correction, is_credit, is_metrics, read_rows
from dde_ds.training.heartbeat import Heartbeat
from dde_ds.training.loop import write_done
from dde_ds.training.metrics import Averages, Clock, RunLog
from dde_ds.training.progress import ProgressLine
from tests.support.launching import spawn


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    start()


def outputs(objective, timesteps, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = len(timesteps)
    noise = torch.randn(pairs, 2, 3, 3, generator=generator)
    reference = noise.repeat(2, 1, 1, 1) + 0.3 * torch.randn(2 * pairs, 2, 3, 3, generator=generator)
    policy = reference + 0.02 * torch.randn(2 * pairs, 2, 3, 3, generator=generator)
    return objective(policy, reference, noise, timesteps)


def test_averages_by_timestep(schedule):
    """Two micro-batches: means over the pairs of each tenth of the timesteps, and nothing for a tenth without pairs."""
    objective = build_objective("dde", schedule, beta=50.0)
    objective.table.fill(-1.0)  # every z is above 0 by the correction alone
    timesteps = [torch.tensor([0, 99, 100, 999]), torch.tensor([50, 999, 999, 450])]
    outs = [outputs(objective, t, seed) for seed, t in enumerate(timesteps)]
    averages = Averages()
    for out in outs:
        averages.add(out)
    row = averages.read(1000)
    t = torch.cat(timesteps)
    z = torch.cat([out.logits for out in outs]) + (50 / 2) * objective.correction(t)  # without the correction
    for first in range(0, 1000, 100):
        inside = (t >= first) & (t < first + 100)
        span = f"{first:03d}-{first + 99:03d}"
        if inside.any():
            assert row[f"accuracy_by_t/{span}"] == pytest.approx((z[inside] > 0).float().mean().item())
            assert row[f"margin_by_t/{span}"] == pytest.approx(z[inside].mean().item(), rel=1e-4, abs=1e-5)
            assert f"drift_by_t/{span}" in row
        else:
            assert f"accuracy_by_t/{span}" not in row
    assert row["rewards/accuracies"] > 0.7 > row["rewards/margin_accuracies"] == pytest.approx((z > 0).float().mean().item())
    assert row["drift/chosen"] == pytest.approx(row["error/policy_chosen"] - row["error/reference_chosen"], abs=1e-7)
    weighed = schedule.single_shot_weight[t] * torch.sigmoid(-torch.cat([out.logits for out in outs]).double())
    inside = [(t >= first) & (t < first + 20) for first in range(0, 1000, 20)]
    assert averages.credit["credit"] == pytest.approx([weighed[own].sum().item() for own in inside], rel=1e-5)
    assert averages.credit["pairs"] == [own.sum().item() for own in inside]
    averages.add(outs[0])  # reading starts anew
    assert averages.read(1000)["rewards/margins"] == pytest.approx(z[:4].mean().item(), rel=1e-4)


def seen(outs, averages=None):
    averages = averages or Averages()
    for out in outs:
        averages.add(out)
        averages.commit()
    return averages


def average_in_two_ranks(rank, outs, folder):
    """A step of two micro-batches, one on each rank; then the state."""
    start()
    (folder / str(rank)).write_text(json.dumps(seen([outs[rank]]).state(1)))


def test_averages_go_on_on_another_number_of_ranks(schedule, tmp_path):
    """One step by two ranks, two by one rank in two micro-batches each: the row is that of three steps by one rank."""
    objective = build_objective("dde", schedule, beta=50.0)
    timesteps = [torch.tensor(pair) for pair in ([0, 99], [100, 999], [50, 980], [450, 999], [500, 20], [30, 40])]
    outs = [outputs(objective, t, seed) for seed, t in enumerate(timesteps)]
    whole = seen(outs)
    expected = whole.read(1000)
    # To another process go only tensors that are worth no gradient.
    plain = [type(out)(out.loss.detach(), out.logits.detach(), out.metrics, out.by_timestep) for out in outs[:2]]
    spawn(average_in_two_ranks, 2, plain, tmp_path)
    states = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert states[0] == states[1]
    assert states[0]["steps"] == 1
    averages = Averages()
    averages.restore(states[0], 2, torch.device("cpu"))
    found = seen(outs[2:], averages).read(1000)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-12)
    assert found["loss"] != pytest.approx(seen(outs[2:]).read(1000)["loss"], rel=1e-3)
    assert averages.state(2) == {}
    assert averages.credit == {name: pytest.approx(values, rel=1e-12) for name, values in whole.credit.items()}
    assert sum(averages.credit["pairs"]) == 12


def test_a_number_that_some_steps_lack_is_left_out(schedule):
    """A reference that is precomputed for some of the steps gives no path KL for these steps."""
    objective = build_objective("dde", schedule)
    with_reference = outputs(objective, torch.tensor([1, 2]), 0)
    without = outputs(objective, torch.tensor([1, 2]), 1)
    for name in ("drift/path_kl", "error/reference_path"):
        del without.metrics[name]
    row = seen([with_reference, without]).read(1000)
    assert "drift/path_kl" not in row and "error/reference_path" not in row
    assert row["loss"] == pytest.approx((with_reference.loss.item() + without.loss.item()) / 2)
    averages = seen([with_reference, with_reference])
    assert averages.read(1000)["drift/path_kl"] == pytest.approx(with_reference.metrics["drift/path_kl"].item())
    assert "drift/path_kl" not in seen([without], averages).read(1000)


def test_sft_has_no_buckets(schedule):
    averages = Averages()
    averages.add(outputs(build_objective("sft", schedule), torch.tensor([1, 2]), 0))
    averages.commit()
    state, resumed = averages.state(1), Averages()
    resumed.restore(state, 1, torch.device("cpu"))
    assert resumed.read(1000) == averages.read(1000)
    averages.restore(state, 1, torch.device("cpu"))
    assert averages.credit == {}
    assert set(averages.read(1000)) == {"loss", "error/policy_chosen", "error/policy_rejected"}


def test_the_clock_leaves_out_what_is_no_training(monkeypatch):
    times = iter([10.0, 12.0, 500.0, 513.0, 513.0])  # made, stopped, going again, read
    monkeypatch.setattr("dde_ds.training.metrics.time.perf_counter", lambda: next(times))
    clock = Clock()
    clock.add(30)
    with clock.stopped():
        pass
    assert clock.read()["perf/pairs_per_s"] == 30 / (2 + 13)


def test_a_resumed_file_has_each_step_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"step": step, "old": True}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "cut sh')
    file = RowFile(path, resume_step=2)
    file.write({"step": 3})
    assert read_rows(path) == [{"step": 1, "old": True}, {"step": 2, "old": True}, {"step": 3}]


def test_damaged_lines_are_left_out_and_counted(tmp_path, capfd):
    """Blank, NULs, torn in the middle, half a character, deep, no row; the last was cut short by a kill and counts as none."""
    path, whole = (
        tmp_path / "metrics.jsonl",
        [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}, {"step": 5, "loss": float("inf")}],
    )
    bad = [
        b"",
        b"\0" * 40,
        b'{"step": 3, "lo{"step": 3}',
        b'{"step": 3, "a": "\xc3"}',
        b"[" * 100_000,
        b"[3]",
        b"3",
        b'{"step": "3"}',
    ]
    bad += [b'{"step": true}', b'{"loss": 1}', b'{"step": 3, "loss": "0.5"}', b'{"step": 1' + b"0" * 400 + b"}"]
    lines = [json.dumps(row).encode() for row in whole]
    data = b"\n".join([lines[0], *bad[:6], lines[1], *bad[6:], lines[2], b'{"step": 6, "lo'])
    path.write_bytes(data)
    for _ in range(2):
        assert read_rows(path, is_metrics) == whole
    assert path.read_bytes() == data
    RowFile(tmp_path / "metrics.jsonl", 2).write({"step": 3, "loss": 0.125})
    assert read_rows(path, is_metrics) == [*whole[:2], {"step": 3, "loss": 0.125}]
    lines = capfd.readouterr().err.splitlines()
    # For the writer the text among the numbers is a row as any other.
    assert lines == [f"warning: {path}: {count} damaged lines are left out" for count in (12, 11)]


def test_a_correction_without_its_timesteps_is_no_row(tmp_path, capfd):
    whole = {"step": 2, "timesteps": [0, 50], "correction": [0.5, -1]}
    bad = [{"timesteps": [0]}, {"correction": None}, {"correction": [1, "2"]}]
    path = tmp_path / "correction.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"step": 1}, whole, *(whole | change for change in bad)]))
    assert read_rows(path, is_correction) == [whole]
    assert capfd.readouterr().err == f"warning: {path}: 4 damaged lines are left out\n"


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs privileges")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk, left):
    filler = disk / "filler"
    filler.write_bytes(b"")
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - left))


def test_rows_wait_where_the_disk_is_full(disk, capfd):
    """Some fit, one is cut in its middle, the others come when there is room: none is lost and none is there twice."""
    path = disk / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "old": True}) + "\n" + json.dumps({"step": 2}) + "\n")
    file, rows = RowFile(path, 1), [{"step": step, "text": "x" * 100} for step in range(2, 100)]
    fill(disk, 0)
    for row in rows:
        file.write(row)
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"warning: {path} could not be written: No space left on device; the run goes on, and its rows wait in memory"]
    assert 4000 < path.stat().st_size < 4200  # the page that it had
    (disk / "filler").unlink()
    file.write({"step": 100})
    assert read_rows(path) == [{"step": 1, "old": True}, *rows, {"step": 100}]


def test_a_file_that_cannot_be_begun_is_begun_later(disk, capfd):
    """Full when the run is resumed: what is there stays as it is until it can be written anew."""
    path, old = disk / "metrics.jsonl", [{"step": step, "text": "x" * 1000} for step in range(1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    before = path.read_bytes()
    fill(disk, 0)
    file = RowFile(path, 5)
    file.write({"step": 6})
    assert path.read_bytes() == before
    assert {item.name for item in disk.iterdir()} == {"metrics.jsonl", "filler"}
    (disk / "filler").unlink()
    file.write({"step": 7})
    assert read_rows(path) == [*old[:5], {"step": 6}, {"step": 7}]
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_what_cannot_be_read_is_not_written_over(tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    os.mkfifo(path)
    RowFile(path, 5).write({"step": 6})
    assert path.is_fifo()
    assert read_rows(path) == []
    assert [line.partition(": ")[2].partition(" could")[0] for line in capfd.readouterr().err.splitlines()] == [str(path)] * 2


def test_a_heartbeat_that_cannot_be_written_ends_no_run(disk, monkeypatch, capfd):
    monkeypatch.setattr("dde_ds.training.heartbeat.EVERY_SECONDS", 0)
    heart = Heartbeat(disk)
    fill(disk, 0)
    heart.beat(1)
    heart.beat(2)
    assert len(capfd.readouterr().err.splitlines()) == 1
    (disk / "filler").unlink()
    heart.beat(3)
    assert json.loads((disk / "heartbeat").read_text())["step"] == 3


def test_without_the_proof_a_run_has_not_ended(disk):
    fill(disk, 0)
    with pytest.raises(
        UserError, match=rf"{disk}/DONE could not be written: No space left on device; the model is in {disk}/export: mend"
    ):
        write_done(disk, 4)
    assert {item.name for item in disk.iterdir()} == {"filler"}


def test_pictures_are_whole_or_absent(disk):
    """One that a full disk cut short would be held for drawn by the next resume."""
    fill(disk, 8192)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    with pytest.raises(OSError, match="No space left"):
        save_row(images, disk / "samples" / "step-00000004.png")
    assert list((disk / "samples").iterdir()) == []
    (disk / "filler").unlink()
    save_row(images, disk / "samples" / "step-00000004.png")
    drawn = np.asarray(Image.open(disk / "samples" / "step-00000004.png"))
    assert (drawn == torch.cat(list(images), 2).permute(1, 2, 0).numpy()).all()


def test_a_tracker_that_fails_ends_no_run(tmp_path, capfd):
    class Full:
        def log(self, row, step):
            raise OSError(errno.ENOSPC, "No space left on device")

    log = RunLog(tmp_path, 0, [Full()])
    for step in (1, 2):
        log.write(step, 8 * step, {"loss": 0.5})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "warning: log.trackers: one refused what was sent to it: OSError: No space left on device; the run goes on"


def test_output_that_cannot_be_written_ends_no_run(monkeypatch, capfd):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        monkeypatch.setattr("sys.stdout", full)
        progress = ProgressLine(0, 2, visible=True)
        progress.say("one")
        progress.say("two")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    expected = "warning: standard output could not be written: No space left on device; the run goes on\n"
    assert capfd.readouterr().err == expected


def test_the_credit_is_logged_where_there_is_one(schedule, tmp_path, capfd):
    averages, log = Averages(), RunLog(tmp_path, 0)
    averages.add(outputs(build_objective("uniform", schedule), torch.tensor([100, 600, 999]), 0))
    log.write(7, 56, averages.read(1000), None, averages.credit)
    log.write(8, 64, averages.read(1000), None, averages.credit)  # all its steps were skipped
    (row,) = read_rows(tmp_path / "credit.jsonl", is_credit)
    assert row["step"] == 7
    assert len(row["credit"]) == len(row["pairs"]) == 50
    assert [i for i, pairs in enumerate(row["pairs"]) if pairs] == [5, 30, 49]
    damaged = ({"credit": [1.0]}, {"pairs": [0.0] * 49}, {"credit": ["1"] * 50}, {"credit": [], "pairs": []})
    (tmp_path / "credit.jsonl").write_text("".join(json.dumps(row | change) + "\n" for change in (*damaged, {})))
    assert read_rows(tmp_path / "credit.jsonl", is_credit) == [row]
    assert "4 damaged lines are left out" in capfd.readouterr().err


def test_the_correction_is_logged(schedule, tmp_path):
    objective = build_objective("dde", schedule, beta=50.0)
    outputs(objective, torch.tensor([100, 600, 800]), 0)
    objective.commit()
    RunLog(tmp_path, 0).write(7, 56, {"loss": 0.5}, objective)
    (row,) = read_rows(tmp_path / "correction.jsonl")
    assert row["step"] == 7
    assert row["timesteps"] == list(range(0, 1000, 50))
    assert row["correction"][2] == objective.correction(torch.tensor([100])).item() != 0
    assert row["correction"][-1] == 0
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 7, "position": 56, "loss": 0.5}]
