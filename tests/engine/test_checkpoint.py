"""A state that any stage and number of ranks wrote, any other goes on from; and what a flipped bit or a full disk leaves."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from dde_ds import NoiseSchedule, UserError, build_objective
from dde_ds.cli import main
from dde_ds.engine import checkpoint, state
from dde_ds.engine.ema import update_ema
from dde_ds.training import resume
from tests.support.launching import spawn

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
        own = len(x)
        objective.table.add(torch.full((own,), step), loss.detach().expand(own), torch.zeros(4, own))
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
    from dde_ds.distributed.group import start

    start()
    for stage, bf16, steps in plan:
        policy, objective = engine(stage, world, bf16), build_objective("dde", SCHEDULE)
        if (stage, world) == (3, 4):
            group = policy.module[0].weight.ds_zero_param_process_group
            assert dist.get_process_group_ranks(group) == [[0, 1], [2, 3]][rank // 2]
        found = checkpoint.list_checkpoints(folder)
        if found:
            assert checkpoint.newest_whole(found, print) == found[-1]
            checkpoint.load(found[-1], policy, objective)
        losses, weights = train(policy, objective, steps, rank, world)
        checkpoint.save(folder, policy, objective, {"step": steps[-1] + 1}, keep=2, keep_every=3)
        average = gathered(policy, state.EMA)
        results[rank, steps[0]] = (losses, objective.table.average[0].tolist(), weights, average)


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
    from dde_ds.distributed.group import start

    os.environ["DS_ACCELERATOR"] = "cpu"
    start()
    policy, objective = engine(2, 1), build_objective("dde", SCHEDULE)
    train(policy, objective, range(2), 0, 1)
    return policy, objective


def list_anew(folder, **changes) -> None:
    """Write a manifest that vouches for what lies in the folder now, as whoever forges one would."""
    names = sorted(path.name for path in folder.iterdir() if path.name != checkpoint.MANIFEST)
    files = [
        {"name": name, "bytes": (folder / name).stat().st_size, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
        for name in names
    ]
    (folder / checkpoint.MANIFEST).write_text(json.dumps({"format": checkpoint.FORMAT, "files": files} | changes))


def flip(newest):
    path = newest / "state-00000-000.safetensors"
    path.write_bytes(path.read_bytes()[:-5] + bytes([path.read_bytes()[-5] ^ 1]) + path.read_bytes()[-4:])


def cut(newest):
    path = newest / "state-00000-000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def list_outside(newest):
    (newest / "state-00000-000.safetensors").rename(newest.parent / "x")
    list_anew(newest)
    manifest = json.loads((newest / checkpoint.MANIFEST).read_text())
    row = {"name": "../x", "bytes": 3, "sha256": ""}
    list_anew(newest, files=[*manifest["files"], row])


def tensor_twice(newest):
    shutil.copy(newest / "state-00000-000.safetensors", newest / "state-00001-000.safetensors")
    list_anew(newest)


def without_weights(newest):
    (newest / "state-00000-000.safetensors").unlink()
    list_anew(newest)


def rewrite_state(newest, text):
    (newest / checkpoint.STATE).write_text(text)
    list_anew(newest)


def rename(folder, step):
    """Make a whole checkpoint one of another step."""
    target = folder.rename(folder.with_name(f"step-{step:08d}"))
    rewrite_state(target, json.dumps(json.loads((target / checkpoint.STATE).read_text()) | {"step": step}))
    return target


def no_tensors(newest):
    (newest / "state-00000-000.safetensors").write_bytes(b"no tensors")
    list_anew(newest)


# What is done to the newest checkpoint, and what is said of it.
HARMS = {
    "flip": (flip, "state-00000-000.safetensors is not what was written"),
    "cut": (cut, "state-00000-000.safetensors is not what was written"),
    "remove": (lambda newest: (newest / "state-00000-000.safetensors").unlink(), "state-00000-000.safetensors is missing"),
    "table": (lambda newest: (newest / checkpoint.TABLE).write_bytes(b""), "objective.safetensors is not what was written"),
    "torn manifest": (lambda newest: (newest / checkpoint.MANIFEST).write_text('{"format": "dde_ds chec'), "manifest.json: "),
    "brackets": (lambda newest: (newest / checkpoint.MANIFEST).write_text("[" * 100_000), "manifest.json: nested deeper than"),
    "no files": (lambda newest: list_anew(newest, files=[]), "manifest.json does not name objective.safetensors"),
    "no weights": (without_weights, "manifest.json does not name state-*.safetensors"),
    "files are none": (lambda newest: list_anew(newest, files=None), "manifest.json: files is null, expected a list"),
    "file without a name": (
        lambda newest: list_anew(newest, files=[{"bytes": 3}]),
        "manifest.json: files[0] is an object, expected an object with 'name'",
    ),
    "outside": (list_outside, "manifest.json names '../x', which is no file of a checkpoint"),
    "no format": (lambda newest: list_anew(newest, format=["dde_ds"]), "manifest.json: format is a list, expected text"),
    "tensor twice": (tensor_twice, "is in two files"),
    "no tensors": (no_tensors, "state-00000-000.safetensors: "),
    "brackets in the state": (lambda newest: rewrite_state(newest, "[" * 100_000), "state.json: nested deeper than"),
    "list as state": (lambda newest: rewrite_state(newest, "[]"), "state.json: it is a list, expected an object"),
    "words as steps": (
        lambda newest: rewrite_state(newest, '{"step": "2", "optimizer": {"steps": 1, "moments": []}}'),
        "state.json: step is '2', expected a whole",
    ),
}


@pytest.fixture
def two(tmp_path, alone):
    """Checkpoints of steps 1 and 2."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        checkpoint.save(folder, *alone, {"step": step}, keep=2)
    return folder


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_found_and_the_one_before_is_taken(two, harm):
    newest, (change, expected), said = two / "step-00000002", HARMS[harm], []
    change(newest)
    assert checkpoint.newest_whole(checkpoint.list_checkpoints(two), said.append) == two / "step-00000001"
    assert len(said) == 1
    assert said[0].startswith(f"checkpoint {newest}: damaged: ")
    assert expected in said[0]
    assert "\n" not in said[0]


def test_what_the_manifest_does_not_name_is_not_read(two, alone):
    """A file that a copy of another number of ranks left: its weights stand after the others in the listing, and are not taken."""
    newest = two / "step-00000002"
    weights = load_file(newest / "state-00000-000.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, newest / "state-00001-000.safetensors")
    policy, objective = engine(2, 1), build_objective("dde", SCHEDULE)
    checkpoint.load(newest, policy, objective)
    assert torch.equal(gathered(policy, state.WEIGHT), gathered(alone[0], state.WEIGHT))
    reader = checkpoint.WeightReader(newest)
    assert set(reader.names) == set(weights)
    assert all(torch.equal(reader.read(name), value) for name, value in weights.items())


def test_what_changed_after_it_was_checked_is_not_loaded(two, alone):
    newest = checkpoint.newest_whole(checkpoint.list_checkpoints(two), print)
    flip(newest)
    before = gathered(alone[0], state.WEIGHT)
    with pytest.raises(UserError, match=r"damaged: state-00000-000\.safetensors is not what was written"):
        checkpoint.load(newest, *alone)
    assert torch.equal(gathered(alone[0], state.WEIGHT), before)


def test_weights_of_another_shape_are_not_loaded(two, alone):
    newest = two / "step-00000002"
    path = newest / "state-00000-000.safetensors"
    save_file({name: value[..., :1].clone() if "2.weight" in name else value for name, value in load_file(path).items()}, path)
    list_anew(newest)
    with pytest.raises(UserError, match=r"is not of this model: 2\.weight/weight has shape \[3, 1\] there, \[3, 13\] here"):
        checkpoint.load(newest, *alone)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "objective.safetensors", "state-00000-000.safetensors"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_an_error_of_reading_proves_no_damage(two, monkeypatch, name, code):
    newest, opened = two / "step-00000002", os.open

    def fail(path, *arguments, **options):
        if str(path) == str(newest / name):
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", fail)
    said = []
    with pytest.raises(
        UserError, match=rf"checkpoint {newest}: {name} could not be read: .*; nothing was deleted: mend it, then try"
    ):
        checkpoint.newest_whole(checkpoint.list_checkpoints(two), said.append)
    assert not said


def test_a_folder_in_the_place_of_a_file_proves_none_either(two):
    newest = two / "step-00000002"
    (newest / checkpoint.TABLE).unlink()
    (newest / checkpoint.TABLE).mkdir()
    with pytest.raises(UserError, match=r"objective\.safetensors could not be read: not a regular file"):
        checkpoint.newest_whole(checkpoint.list_checkpoints(two), print)


def test_a_disk_that_is_not_mounted_proves_none_either(two, tmp_path):
    newest = two / "step-00000002"
    newest.rename(tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "elsewhere")
    assert checkpoint.newest_whole(checkpoint.list_checkpoints(two), print) == newest
    (tmp_path / "elsewhere").rename(tmp_path / "unmounted")
    with pytest.raises(UserError, match=f"checkpoint {newest}: manifest.json could not be read: No such file"):
        checkpoint.newest_whole(checkpoint.list_checkpoints(two), print)


def test_a_table_of_an_earlier_version_is_refused_in_one_line(two, alone):
    table = {"average": torch.zeros(5, 1000, dtype=torch.float64), "count": torch.zeros(1000, dtype=torch.float64)}
    save_file(table, two / "step-00000002" / checkpoint.TABLE)
    list_anew(two / "step-00000002")
    policy, objective = alone
    for use in (
        lambda: checkpoint.newest_whole(checkpoint.list_checkpoints(two), print),
        lambda: checkpoint.load(two / "step-00000002", policy, objective),
        lambda: checkpoint.load_table(two / "step-00000002", objective),
    ):
        with pytest.raises(UserError, match="step-00000002: its correction table is an earlier version's") as error:
            use()
        assert "\n" not in str(error.value)


def test_a_checkpoint_of_a_later_version_proves_none_either(two):
    list_anew(two / "step-00000002", format="dde_ds checkpoint 2")
    with pytest.raises(UserError, match="says 'dde_ds checkpoint 2', this version reads 'dde_ds checkpoint 1': use the version"):
        checkpoint.newest_whole(checkpoint.list_checkpoints(two), print)


def test_a_folder_that_cannot_be_listed_is_not_empty(two):
    shutil.rmtree(two)
    assert checkpoint.list_checkpoints(two) == []
    two.write_text("in the way")
    with pytest.raises(UserError, match=f"checkpoints in {two}: could not be read: Not a directory; nothing was deleted"):
        checkpoint.list_checkpoints(two)


def test_a_damaged_checkpoint_is_not_exported(two, tmp_path, capfd):
    """The newest, beside a copy of it that is none."""
    shutil.copytree(two / "step-00000002", two / "step-00000002.bak")
    rewrite_state(two / "step-00000002", "{}")
    assert main(["export", str(tmp_path), "--output", str(tmp_path / "exported")]) == 1
    error = f"error: checkpoint {two}/step-00000002: damaged: state.json: it is an object, expected an object with 'step'; export an older one\n"
    assert capfd.readouterr().err == error
    assert not (tmp_path / "exported").exists()


def find_in_two_ranks(rank, folder, outcomes):
    """The first rank meets an error of reading; then damage."""
    from dde_ds.distributed.group import start

    start()
    newest, opened = folder / "step-00000002", os.open

    def fail(path, *arguments, **options):
        if rank == 0 and str(path) == str(newest / checkpoint.TABLE):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path, *arguments, **options)

    os.open = fail
    try:
        checkpoint.newest_whole(checkpoint.list_checkpoints(folder), print)
    except UserError as error:
        outcomes[rank, "unreadable"] = str(error)
    os.open = opened
    dist.barrier()
    if rank == 0:
        flip(newest)
    dist.barrier()
    said = []
    outcomes[rank, "damaged"] = checkpoint.newest_whole(checkpoint.list_checkpoints(folder), said.append).name
    outcomes[rank, "said"] = len(said)


def test_all_ranks_take_the_same_checkpoint_or_none(two):
    with mp.Manager() as manager:
        outcomes = manager.dict()
        spawn(find_in_two_ranks, 2, two, outcomes)
        outcomes = dict(outcomes)
    assert outcomes[0, "unreadable"] == outcomes[1, "unreadable"]
    assert "objective.safetensors could not be read: Input/output error" in outcomes[0, "unreadable"]
    assert outcomes[0, "damaged"] == outcomes[1, "damaged"] == "step-00000001"
    assert (outcomes[0, "said"], outcomes[1, "said"]) == (1, 0)


@pytest.mark.parametrize(
    "name", ["step-00000009.bak", "step-best", "step-00000009 (1)", "step-9", "step-000000009", "step-٠٠٠٠٠٠٠٩"]
)
def test_copies_and_marks_are_no_checkpoints(two, alone, name):
    shutil.copytree(two / "step-00000001", two / name)
    assert [path.name for path in checkpoint.list_checkpoints(two)] == ["step-00000001", "step-00000002"]
    checkpoint.save(two, *alone, {"step": 3}, keep=1)
    assert sorted(path.name for path in two.iterdir()) == sorted(["step-00000003", name])


def test_checkpoints_are_in_the_order_of_their_steps(two):
    for step in (99_999_999, 100_000_000):
        shutil.copytree(two / "step-00000001", two / f"step-{step}")
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(two)] == [1, 2, 99_999_999, 100_000_000]


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


def test_a_damaged_later_checkpoint_takes_no_place(two, alone):
    """The newest is damaged, the run goes on from the one before and stops early: what it saves must be what stays."""
    damaged = [rename(two / "step-00000002", 4)]
    flip(*damaged)
    checkpoint.save(two, *alone, {"step": 2}, keep=1, damaged=damaged)
    assert [path.name for path in two.iterdir()] == ["step-00000002"]


def test_a_later_checkpoint_that_nobody_proved_damaged_stays(two, alone, capfd):
    rename(two / "step-00000002", 9)
    for step in (3, 4):
        checkpoint.save(two, *alone, {"step": step}, keep=1)
        assert sorted(path.name for path in two.iterdir()) == [f"step-0000000{step}", "step-00000009"]
    (line,) = capfd.readouterr().err.splitlines()
    assert (
        line
        == f"warning: checkpoint {two}/step-00000009 is later than what this run saves, and not of it: it stays, and --resume would go on from it"
    )


def test_a_renamed_checkpoint_is_no_damaged_one(two, alone, capfd):
    """A whole copy under a later step's name: not gone on from, never deleted, and out of the way when the run comes to that step."""
    copy, said = two / "step-00000004", []
    shutil.copytree(two / "step-00000002", copy)
    run = SimpleNamespace(output=str(two.parent), steps=9)
    with patch.object(resume, "require_same_run"):
        origin = resume.choose_checkpoint(run, None, {}, "required", said.append)
    assert (origin.checkpoint, origin.damaged) == (two / "step-00000002", ())
    assert said == [
        f"checkpoint {copy}: state.json is of step 2: it was renamed or copied; it stays, and a run does not go on from it: "
        "name it step-00000002 to have it back"
    ]
    for step in (3, 4, 5):
        checkpoint.save(two, *alone, {"step": step}, keep=1, damaged=origin.damaged)
        aside = ["step-00000004"] if step == 3 else ["step-00000004.renamed-1"]
        assert sorted(path.name for path in two.iterdir()) == sorted([f"step-0000000{step}", *aside])
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: checkpoint {copy}: is of another step, and this run writes its own there: ")
    (two / "step-00000004.renamed-1").rename(two / "step-00000002")
    assert checkpoint.damage(two / "step-00000002") is None
    (two / "step-00000002").rename(copy)
    shutil.rmtree(two / "step-00000005")
    with pytest.raises(UserError, match="all 1 checkpoints are damaged or renamed; restore one"):
        resume.choose_checkpoint(run, None, {}, "required", said.append)


def test_one_of_the_same_step_is_replaced_only_if_it_was_proved_damaged(two, alone):
    before = (two / "step-00000002" / checkpoint.STATE).stat().st_mtime_ns
    with pytest.raises(UserError, match=f"checkpoint {two}/step-00000002: is there already, and not of this run"):
        checkpoint.save(two, *alone, {"step": 2}, keep=2)
    assert (two / "step-00000002" / checkpoint.STATE).stat().st_mtime_ns == before
    checkpoint.save(two, *alone, {"step": 2}, keep=2, damaged=[two / "step-00000002"])
    assert (two / "step-00000002" / checkpoint.STATE).stat().st_mtime_ns != before


def test_a_linked_checkpoint_is_unlinked(two, alone, tmp_path):
    old = two / "step-00000001"
    old.rename(tmp_path / "elsewhere")
    old.symlink_to(tmp_path / "elsewhere")
    checkpoint.save(two, *alone, {"step": 3}, keep=1)
    assert [path.name for path in two.iterdir()] == ["step-00000003"]
    assert len(list((tmp_path / "elsewhere").iterdir())) == 4


def test_what_cannot_be_deleted_ends_no_run(two, alone, monkeypatch, capfd):
    """As NFS does it with files that are still open: they get such a name and stay, and their folder with them."""
    unlink, left = os.unlink, {}

    def busy(path, *arguments, **options):
        if str(path).rpartition("/")[2].startswith(".nfs"):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        unlink(path, *arguments, **options)

    monkeypatch.setattr(os, "unlink", busy)
    for step in (1, 2):
        (two / f"step-0000000{step}" / ".nfs0001").touch()
    for step in (3, 4, 5):
        checkpoint.save(two, *alone, {"step": step}, keep=1)
        left[step] = sorted(path.name for path in two.iterdir())
    assert left == {step: [".deleted", ".deleted-1", f"step-0000000{step}"] for step in (3, 4, 5)}
    lines = capfd.readouterr().err.splitlines()
    expected = "could not be deleted: Device or resource busy; delete it by hand where room is short"
    assert lines == [f"warning: checkpoint {two}/step-0000000{step} {expected}" for step in (1, 2)]
    monkeypatch.setattr(os, "unlink", unlink)  # the file was closed
    checkpoint.save(two, *alone, {"step": 6}, keep=1)
    assert [path.name for path in two.iterdir()] == ["step-00000006"]


def test_what_keeps_its_name_ends_no_run_either(two, alone, monkeypatch, capfd):
    rename = os.rename

    def refuse(path, *arguments, **options):
        if str(path).endswith("step-00000001"):
            raise OSError(errno.EACCES, "Permission denied", str(path))
        rename(path, *arguments, **options)

    monkeypatch.setattr(os, "rename", refuse)
    for step in (3, 4):
        checkpoint.save(two, *alone, {"step": step}, keep=1)
        assert sorted(path.name for path in two.iterdir()) == ["step-00000001", f"step-0000000{step}"]
    (line,) = capfd.readouterr().err.splitlines()
    assert "step-00000001 could not be deleted: Permission denied" in line


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
