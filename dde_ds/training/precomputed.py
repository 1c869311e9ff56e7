"""The reference's two errors of each pair by position, in a file that later runs read in the place of the reference.

A pair's noise and timestep are functions of (seed, position) and the reference never changes: d(ref,w) and d(ref,l) are two floats
that every run of the same seed, data and reference needs again. The file is one safetensors, whole or absent: ``errors`` (N,2)
float32, NaN where no run has been yet, and in its metadata what they are the errors of. What only weighs them (the objective's name, β,
learning rate, batch, number of ranks) may differ between the runs that share it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dde_ds.config import RunConfig
from dde_ds.data.mixture import MixedShards
from dde_ds.data.shards import ShardSet
from dde_ds.distributed.collectives import broadcast_object, gather_rows
from dde_ds.distributed.environment import DistributedEnv
from dde_ds.errors import RankError, UserError
from dde_ds.files import write_atomically
from dde_ds.models.unet import unet_digest
from dde_ds.objective.objective import Objective
from dde_ds.training.batches import Batch
from dde_ds.untrusted import open_regular, parse_json
from dde_ds.warn import reason

FORMAT = "dde_ds ledger 1"  # the word of earlier versions: their files are read


class PrecomputedReference:
    """One run's view of the file, the same on all ranks: what it held when the run was started, and what the run adds.

    A run without a file has one too: ``path`` is None, it covers nothing and keeps nothing.
    """

    def __init__(self, path: Path | None, identity: dict, errors: Tensor, pairs: int):
        self.path, self._identity, self._errors, self._pairs = path, identity, errors, pairs
        self._known = errors.isfinite().all(1)
        self._added: list[tuple[Tensor, Tensor]] = []

    def covers(self, first_step: int, last_step: int) -> bool:
        """Whether it holds the pairs of the optimizer steps from ``first_step`` (counted from 0) up to, not including, ``last_step``."""
        known = self._known[first_step * self._pairs : last_step * self._pairs]
        return bool(self.path) and len(known) == (last_step - first_step) * self._pairs and bool(known.all())

    def fill(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same micro-batches, with ``reference_errors`` (2B,) in those of steps that it covers: the whole step or nothing, so that
        all ranks run the reference or none does, which under ZeRO-3 they do together."""
        for batch in batches:
            step = batch.step(self._pairs)
            if self.covers(step, step + 1):
                batch = replace(batch, reference_errors=self._errors[batch.positions].T.flatten())
            yield batch

    def add(self, batch: Batch, reference_errors: Tensor | None) -> None:
        """Keep the errors, (2B,), of a micro-batch that the reference has seen, until :meth:`write`. Waits for no device."""
        if self.path and batch.reference_errors is None and reference_errors is not None:
            self._added.append((batch.positions, reference_errors.view(2, -1).T))

    def write(self, ranks: DistributedEnv) -> None:
        """Put what was added since the last call into the file. Collective; the first rank writes.

        Raises:
            RankError: it cannot be written.
            UserError: the file has become another precomputed reference.
        """
        if not self._added:
            return
        positions, errors = (torch.cat(parts) for parts in zip(*self._added, strict=True))
        self._added = []
        # float64 holds both exactly.
        rows = gather_rows(torch.cat([positions.to(errors.device, torch.float64)[:, None], errors.double()], 1), ranks).cpu()
        if not ranks.is_main:
            return
        # Another run may have written meanwhile.
        assert self.path is not None  # otherwise nothing was added
        held = read_precomputed(self.path, self._identity)
        positions = rows[:, 0].long()
        grown = torch.full((max(len(held), int(positions.max()) + 1), 2), torch.nan)
        grown[: len(held)] = held
        grown[positions] = rows[:, 1:].float()
        _write(self.path, grown, self._identity)


def open_precomputed(
    run: RunConfig, shards: ShardSet | MixedShards, objective: Objective, ranks: DistributedEnv
) -> PrecomputedReference:
    """The run's precomputed reference as the first rank reads it, empty where there is no file yet, or where the run names none. Collective.

    Raises:
        UserError: a damaged file, or one of another reference, data, seed or sampling: the message names what differs.
    """
    if not run.reference.precomputed or not objective.needs_reference:
        return PrecomputedReference(None, {}, torch.empty(0, 2), run.batch.pairs)
    path, found = Path(run.reference.precomputed), None
    if ranks.is_main:
        try:
            own = identity(run, shards, objective)
            if not path.exists():
                _write(path, torch.empty(0, 2), own)  # a path that cannot be written is found now, not at the first checkpoint
            found = (own, read_precomputed(path, own), None)
        except UserError as error:  # told on all ranks: the others would wait for this one
            found = (None, None, str(error))
    own, errors, problem = broadcast_object(found, ranks)
    if problem:
        raise UserError(problem)
    return PrecomputedReference(path, own, errors, run.batch.pairs)


def check_precomputed(run: RunConfig, shards: ShardSet | MixedShards, objective: Objective) -> None:
    """Raises:
    UserError: the run has a precomputed reference that :func:`open_precomputed` would refuse. Nothing is written.
    """
    if run.reference.precomputed and objective.needs_reference and Path(run.reference.precomputed).exists():
        read_precomputed(Path(run.reference.precomputed), identity(run, shards, objective))


def identity(run: RunConfig, shards: ShardSet | MixedShards, objective: Objective) -> dict:
    """What the errors at a position follow from. As JSON has it."""
    probable = objective.timestep_probabilities.nonzero().flatten().tolist()
    return {
        "reference weights": unet_digest(run.model.path, run.model.revision, run.model.variant),
        "precision": run.precision,  # x_t is rounded to it
        "precision of the reference": run.reference_precision,
        "model.compile": run.model.compile,  # the same sums, rounded in other places
        "model.channels_last": run.model.channels_last,
        "data": shards.digest,
        "data.block_shards": run.data.block_shards,
        "data.caption_dropout": run.data.caption_dropout,
        "data.flip": run.data.flip,
        "seed": run.seed,
        "objective.shared_noise": run.objective.shared_noise,
        "objective.timestep_range": [probable[0], probable[-1] + 1],
        "probabilities of the timesteps": _digest_of(objective.timestep_probabilities),
        "noise schedule": _digest_of(objective.schedule.alphas_cumprod),
        "prediction type": objective.schedule.prediction_type,
    }


def read_precomputed(path: Path, expected: dict) -> Tensor:
    """Errors, (N,2) float32, NaN where there are none yet; (0,2) where there is no file.

    Raises:
        UserError: a damaged precomputed reference, or one that is of something else than ``expected``.
    """
    if not path.exists():
        return torch.empty(0, 2)
    try:
        open_regular(path).close()  # safetensors would wait for a pipe
        with safe_open(path, framework="pt") as file:
            metadata, errors = file.metadata() or {}, file.get_tensor("errors")
        if metadata.get("format") != FORMAT:
            raise UserError(f"reference.precomputed {path}: format is {metadata.get('format')!r}, this version reads {FORMAT!r}")
        found = parse_json(metadata["identity"])
        shaped = errors.dtype == torch.float32 and errors.ndim == 2 and errors.shape[1] == 2 and isinstance(found, dict)
        if not shaped or metadata["sha256"] != _digest_of(errors):
            raise ValueError("it is not what was written")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"reference.precomputed {path}: damaged, or no precomputed reference: {' '.join(str(error).split())}; delete it to make it again"
        ) from None
    for key in expected | found:
        if found.get(key) != expected.get(key):
            raise UserError(
                f"reference.precomputed {path}: was made with {key} {found.get(key)!r}, this run has {expected.get(key)!r}; "
                "its errors are not this run's: name another file"
            )
    return errors


def _write(path: Path, errors: Tensor, own: dict) -> None:
    metadata = {"format": FORMAT, "identity": json.dumps(own), "sha256": _digest_of(errors)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, safetensors.torch.save({"errors": errors}, metadata))
    except OSError as error:
        raise RankError(f"reference.precomputed {path}: not writable: {reason(error).lower()}") from None


def _digest_of(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()
