"""A state that any stage and number of ranks wrote, any other goes on from; and what a flipped bit or a full disk leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dde_ds import NoiseSchedule, UserError, build_objective
from dde_ds.engine import checkpoint, state
from dde_ds.engine.ema import update_ema
from tests.launching import spawn

pytestmark = pytest.mark.slow
SCHEDULE = NoiseSchedule.from_scheduler({"beta_schedule": "squaredcos_cap_v2"})
PAIRS = 8
DECAY = 0.5


def engine(stage, world, bf16=False):
    """Layers whose sizes divide by nothing, so that partitions cut through them and the last one is padded. At stage 3 the first and the
    last two of four ranks are groups that keep the weights a second time (hierarchical)."""
    import deepspeed

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 13), torch.nn.Tanh(), torch.nn.Linear(13, 3))
    module[2].bias.requires_grad_(False)  # as a part of a model that is not trained
    config = {
        "train_batch_size": PAIRS,
        "train_micro_batch_size_per_gpu": PAIRS // world,
        "zero_optimization": {"stage": stage}
        | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})  # shard even the smallest
        | ({"zero_hpz_partition_size": 2} if (stage, world) == (3, 4) else {}),
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "bf16": {"enabled": bf16},
    } | ({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {})
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=module, model_parameters=trained, config=config)[0]


def train(policy, objective, steps, rank, world):
    """Losses over this rank's part of each step's batch, and the weights after each; fills the table and the moving average as well."""
    losses, weights = [], []
    for step in steps:
        x = torch.randn(PAIRS, 5, generator=torch.Generator().manual_seed(step))[rank::world]
        out = policy(x.to(next(policy.parameters()).dtype)).float()
        loss = (out - 1).square().mean()
        policy.backward(loss)
        policy.step()
        update_ema(policy, DECAY)
        weights.append(gathered(policy, state.WEIGHT))
        objective.table.add(torch.tensor([step]), loss.detach()[None], torch.zeros(4, 1))
        objective.commit()
        losses.append(loss.item())
    return losses, weights


def gathered(policy, kind):
    return torch.cat([tensors[kind].flatten() for _, tensors in state.gather(policy, [kind])])


def plain_average(weights):
    """What diffusers' EMAModel makes of them."""
    average = weights[0]
    for k, value in enumerate(weights[1:], 1):
        decay = min(DECAY, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * value
    return average


def one_rank(rank, world, folder, plan, results):
    """Each leg of ``plan``: (stage, bf16, steps). A leg resumes what is there, trains, and saves."""
    from dde_ds.distributed import start

    start()
    for stage, bf16, steps in plan:
        policy, objective = engine(stage, world, bf16), build_objective("dde", SCHEDULE)
        if (stage, world) == (3, 4):
            group = policy.module[0].weight.ds_zero_param_process_group
            assert dist.get_process_group_ranks(group) == [[0, 1], [2, 3]][rank // 2]
        found = checkpoint.list_checkpoints(folder)
        if found:
            assert checkpoint.newest_whole(found, policy.device, print) == found[-1]
            checkpoint.load(found[-1], policy, objective)
        losses, weights = train(policy, objective, steps, rank, world)
        checkpoint.save(folder, policy, objective, {"step": steps[-1] + 1}, keep=2, keep_every=3)
        average = gathered(policy, state.EMA)
        results[rank, steps[0]] = (losses, objective.state_dict()["average"][0].tolist(), weights, average)


def run(world, folder, plan, before=()):
    """Losses of each step, the table after the last, and the weights after each: those of ``before``, an earlier run in the same folder,
    and its own. Of all of them the moving average must be made."""
    with mp.Manager() as manager:
        results = manager.dict()
        spawn(one_rank, world, world, folder, plan, results)
        by_step, seen = {}, list(before)
        for (rank, first), (losses, table, weights, average) in sorted(results.items()):
            for i, loss in enumerate(losses):
                by_step.setdefault(first + i, []).append(loss)
            seen += weights if rank == 0 else []
            last, kept = table, average
        assert torch.allclose(kept, plain_average(seen), atol=1e-6)
        assert (kept - seen[-1]).abs().max() > 1e-3
        return [sum(values) / len(values) for _, values in sorted(by_step.items())], last, seen


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return {bf16: run(1, tmp_path_factory.mktemp("unbroken"), [(1, bf16, range(6))]) for bf16 in (False, True)}


@pytest.mark.parametrize("bf16", [False, True])
def test_stages_take_over_from_each_other_on_two_ranks(tmp_path, unbroken, bf16):
    """ZeRO-2, 3, 1, 3, 2, one step each, each from the checkpoint of the one before."""
    stages = [2, 2, 3, 1, 3, 2]
    losses, table, _ = run(2, tmp_path, [(stage, bf16, range(step, step + 1)) for step, stage in enumerate(stages)])
    expected, expected_table, _ = unbroken[bf16]
    assert losses == pytest.approx(expected, abs=2e-3 if bf16 else 1e-6)
    assert table == pytest.approx(expected_table, abs=2e-3 if bf16 else 1e-6)
    assert max(expected) - min(expected) > 0.1, "a run that learns nothing would agree as well"
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000003", "step-00000005", "step-00000006"]


@pytest.mark.parametrize(("before", "after"), [((1, 2), (2, 3)), ((2, 3), (1, 2))])
def test_another_number_of_ranks(tmp_path, unbroken, before, after):
    """(ranks, stage) before and after."""
    first, _, weights = run(before[0], tmp_path, [(before[1], False, range(3))])
    second, table, _ = run(after[0], tmp_path, [(after[1], False, range(3, 6))], weights)
    assert first + second == pytest.approx(unbroken[False][0], abs=1e-6)
    assert table == pytest.approx(unbroken[False][1], abs=1e-6)


def test_hierarchical_on_two_groups(tmp_path, unbroken):
    """Four ranks, saved after three steps and gone on from: the second copy of the weights, whole in each group, is of the weights
    that were restored."""
    plan = [(3, False, range(3)), (3, False, range(3, 6))]
    losses, table, _ = run(4, tmp_path, plan)
    assert losses == pytest.approx(unbroken[False][0], abs=1e-6)
    assert table == pytest.approx(unbroken[False][1], abs=1e-6)


@pytest.fixture(scope="module")
def alone():
    """An engine in this process, after two steps."""
    from dde_ds.distributed import start

    os.environ["DS_ACCELERATOR"] = "cpu"
    start()
    policy, objective = engine(2, 1), build_objective("dde", SCHEDULE)
    train(policy, objective, range(2), 0, 1)
    return policy, objective


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "manifest", "table"])
def test_damage_is_found_and_the_one_before_is_taken(tmp_path, alone, harm):
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        checkpoint.save(folder, *alone, {"step": step}, keep=2)
    newest = folder / "step-00000002"
    (weights,) = newest.glob("state-*.safetensors")
    if harm == "flip":
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(data)
    elif harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif harm == "remove":
        weights.unlink()
    elif harm == "manifest":
        (newest / checkpoint.MANIFEST).write_text('{"format": "dde_ds checkpoint 1", "fil')
    else:
        (newest / checkpoint.TABLE).write_bytes(b"")
    said = []
    found = checkpoint.newest_whole(checkpoint.list_checkpoints(folder), alone[0].device, said.append)
    assert found == folder / "step-00000001"
    assert len(said) == 1
    assert f"checkpoint {newest}: damaged" in said[0]


def test_files_are_on_the_disk_before_they_are_listed(tmp_path, alone, monkeypatch):
    """By the rank that wrote them. The manifest and the folder follow, before the folder gets its name."""
    folder, fsync, synced = tmp_path / "checkpoints", os.fsync, []

    def see(handle):
        stages = {"listed": folder / ".staging" / checkpoint.MANIFEST, "named": folder / "step-00000001"}
        synced.append((os.fstat(handle).st_ino, [stage for stage, path in stages.items() if path.exists()]))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", see)
    saved, _ = checkpoint.save(folder, *alone, {"step": 1}, keep=1)
    before_listed = {file for file, stages in synced if not stages}
    before_named = {file for file, stages in synced if "named" not in stages}
    listed = [saved / row["name"] for row in json.loads((saved / checkpoint.MANIFEST).read_text())["files"]]
    assert len(listed) == 3
    assert {path.stat().st_ino for path in listed} <= before_listed
    assert {path.stat().st_ino for path in (*listed, saved / checkpoint.MANIFEST, saved)} <= before_named


def test_a_damaged_later_checkpoint_takes_no_place(tmp_path, alone):
    """The newest is damaged, the run goes on from the one before and stops early: what it saves must be what stays."""
    folder = tmp_path / "checkpoints"
    for step in (1, 4):
        checkpoint.save(folder, *alone, {"step": step}, keep=2)
    (folder / "step-00000004" / checkpoint.TABLE).write_bytes(b"")
    checkpoint.save(folder, *alone, {"step": 2}, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]


def test_of_another_model(tmp_path, alone):
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, *alone, {"step": 1}, keep=1)
    import deepspeed

    module = torch.nn.Sequential(torch.nn.Linear(5, 3))
    config = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    }
    other = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)[0]
    with pytest.raises(UserError, match=r"is not of this model: 2\.weight"):
        checkpoint.load(folder / "step-00000001", other, alone[1])


def test_a_full_disk(tmp_path, alone):
    """A real one: first no room for the weights, then room for them and not for what comes after."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs privileges")
    try:
        folder = disk / "checkpoints"
        checkpoint.save(folder, *alone, {"step": 1}, keep=1)
        filler = disk / "filler"
        for left, message in ((0, r"0\.0 GB free, one takes"), (2, "not writable: .*; older checkpoints are as they were")):
            filler.write_bytes(b"")
            free = shutil.disk_usage(disk).free
            filler.write_bytes(bytes(free - left * 4096))
            with pytest.raises(UserError, match=message):
                checkpoint.save(folder, *alone, {"step": 2}, keep=1)
            filler.unlink()
            assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["step-00000001"]
            assert checkpoint.damage(folder / "step-00000001") is None
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_where_the_folder_should_be(tmp_path, alone):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match=r"checkpoints: not writable"):
        checkpoint.save(tmp_path / "checkpoints", *alone, {"step": 1}, keep=1)
