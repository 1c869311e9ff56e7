"""The reference's two errors of each pair, by position, in a file that later runs read instead of running the reference.

A pair's noise and timestep are functions of (seed, position), and the reference never changes. So d(ref,w) and d(ref,l) are
two floats that every run with the same seed, data and reference needs again.

The file is one safetensors file, whole or absent. It holds ``errors`` (N,2) float32, NaN at positions that no run has reached.
Its metadata say what the errors depend on. Settings that only weigh the errors may differ between runs that share the file:
the objective's name, β, learning rate, batch and number of ranks.
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
from dde_ds.objective.objective import NEEDS_PREDICTION, Objective
from dde_ds.shape import require_shape
from dde_ds.training.batches import Batch
from dde_ds.untrusted import open_regular, parse_json
from dde_ds.warn import reason

FORMAT = "dde_ds ledger 1"  # earlier versions used this name
DRAWN = "timesteps"  # the key that says how they were drawn; files of earlier versions do not have it


class PrecomputedReference:
    """Hold one run's view of the file, the same on all ranks: the errors that the file held at the start, and those that the run
    adds.

    A run without a file has this object too. Its ``path`` is None, it covers nothing and keeps nothing.
    """

    def __init__(self, path: Path | None, identity: dict, errors: Tensor, pairs: int):
        self.path, self._identity, self._errors, self._pairs = path, identity, errors, pairs
        self._known = errors.isfinite().all(1)
        self._added: list[tuple[Tensor, Tensor]] = []

    def covers(self, first_step: int, last_step: int) -> bool:
        """Return whether the file held every pair of the optimizer steps from ``first_step`` up to, not including, ``last_step``.

        Steps are counted from 0.
        """
        known = self._known[first_step * self._pairs : last_step * self._pairs]
        return bool(self.path) and len(known) == (last_step - first_step) * self._pairs and bool(known.all())

    def fill(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the same micro-batches. Those of steps that the file covers get ``reference_errors`` (2B,).

        A step is filled as a whole or not at all. So either all ranks run the reference or none does. Under ZeRO-3 they must
        run it together.
        """
        for batch in batches:
            step = batch.step(self._pairs)
            if self.covers(step, step + 1):
                batch = replace(batch, reference_errors=self._errors[batch.positions].T.flatten())
            yield batch

    def add(self, batch: Batch, reference_errors: Tensor | None) -> None:
        """Keep the errors of a micro-batch that the reference has seen, (2B,), until :meth:`write`. Waits for no device."""
        if self.path and batch.reference_errors is None and reference_errors is not None:
            self._added.append((batch.positions, reference_errors.view(2, -1).T))

    def write(self, ranks: DistributedEnv) -> None:
        """Put the errors that were added since the last call into the file. Collective; the first rank writes.

        Raises:
            RankError: the file cannot be written.
            UserError: the file now belongs to another reference, data, seed or sampling.
        """
        if not self._added:
            return
        positions, errors = (torch.cat(parts) for parts in zip(*self._added, strict=True))
        self._added = []
        # float64 holds positions and errors exactly.
        rows = gather_rows(torch.cat([positions.to(errors.device, torch.float64)[:, None], errors.double()], 1), ranks).cpu()
        if not ranks.is_main:
            return
        # Read the file again, since another run may have written meanwhile.
        assert self.path is not None  # otherwise nothing was added
        stored = read_precomputed(self.path, self._identity)
        positions = rows[:, 0].long()
        merged = torch.full((max(len(stored), int(positions.max()) + 1), 2), torch.nan)
        merged[: len(stored)] = stored
        merged[positions] = rows[:, 1:].float()
        _write(self.path, merged, self._identity)


def open_precomputed(
    run: RunConfig, shards: ShardSet | MixedShards, objective: Objective, ranks: DistributedEnv
) -> PrecomputedReference:
    """Return the run's precomputed reference as the first rank reads it. Collective.

    It is empty if there is no file yet, or if the run names no file.

    Raises:
        UserError: the file is damaged, or belongs to another reference, data, seed or sampling. The message names the
            difference. Or the objective needs more than errors.
    """
    if not run.reference.precomputed or not objective.needs_reference:
        return PrecomputedReference(None, {}, torch.empty(0, 2), run.batch.pairs)
    _require_errors_suffice(run, objective)
    path, result = Path(run.reference.precomputed), None
    if ranks.is_main:
        try:
            expected = identity(run, shards, objective)
            if not path.exists():
                # An unwritable path is found now, instead of at the first checkpoint.
                _write(path, torch.empty(0, 2), expected)
            result = (expected, read_precomputed(path, expected), None)
        except UserError as error:  # raised on all ranks below: the others would wait for this one
            result = (None, None, str(error))
    expected, errors, problem = broadcast_object(result, ranks)
    if problem:
        raise UserError(problem)
    return PrecomputedReference(path, expected, errors, run.batch.pairs)


def check_precomputed(run: RunConfig, shards: ShardSet | MixedShards, objective: Objective) -> None:
    """Refuse a precomputed reference that :func:`open_precomputed` would refuse. Nothing is written.

    Raises:
        UserError: the file is damaged, or belongs to another reference, data, seed or sampling.
    """
    if not run.reference.precomputed or not objective.needs_reference:
        return
    _require_errors_suffice(run, objective)
    if Path(run.reference.precomputed).exists():
        read_precomputed(Path(run.reference.precomputed), identity(run, shards, objective))


def _require_errors_suffice(run: RunConfig, objective: Objective) -> None:
    if objective.spec.needs_prediction:
        raise UserError(
            f"reference.precomputed {run.reference.precomputed}: holds errors alone, but objective {objective.name} {NEEDS_PREDICTION}; "
            "leave it out"
        )


def identity(run: RunConfig, shards: ShardSet | MixedShards, objective: Objective) -> dict:
    """Return everything that the errors at a position depend on, as JSON data."""
    probable = objective.timestep_probabilities.nonzero().flatten().tolist()
    return {
        "reference weights": unet_digest(run.model.path, run.model.revision, run.model.variant),
        "precision": run.precision,  # x_t is rounded to this type
        "precision of the reference": run.reference_precision,
        "model.compile": run.model.compile,  # compiled blocks round in other places
        "model.channels_last": run.model.channels_last,
        # Of a float32 reference it changes nothing.
        "model.float32_output": run.model.float32_output and run.reference_precision == "bf16",
        "data": shards.digest,
        "data.block_shards": run.data.block_shards,
        "data.caption_dropout": run.data.caption_dropout,
        "data.flip": run.data.flip,
        "seed": run.seed,
        "objective.shared_noise": run.objective.shared_noise,
        "objective.timestep_range": [probable[0], probable[-1] + 1],
        DRAWN: "stratified",
        "probabilities of the timesteps": _digest_of(objective.timestep_probabilities),
        "noise schedule": _digest_of(objective.schedule.alphas_cumprod),
        "prediction type": objective.schedule.prediction_type,
    }


def read_precomputed(path: Path, expected: dict) -> Tensor:
    """Return the errors in a file, (N,2) float32, NaN at positions without errors; (0,2) if there is no file.

    Raises:
        UserError: the file is damaged, or its identity is not ``expected``.
    """
    if not path.exists():
        return torch.empty(0, 2)
    try:
        open_regular(path).close()  # safetensors would wait for a pipe
        with safe_open(path, framework="pt") as file:
            metadata, errors = file.metadata() or {}, file.get_tensor("errors")
        if metadata.get("format") != FORMAT:
            raise UserError(f"reference.precomputed {path}: format is {metadata.get('format')!r}, this version reads {FORMAT!r}")
        require_shape(metadata, {"identity": str, "sha256": str}, "metadata")
        stored = parse_json(metadata["identity"])
        require_shape(stored, {}, "identity")
        shaped = errors.dtype == torch.float32 and errors.ndim == 2 and errors.shape[1] == 2
        if not shaped or metadata["sha256"] != _digest_of(errors):
            raise ValueError("it is not what was written")
    except UserError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"reference.precomputed {path}: damaged, or no precomputed reference: {' '.join(str(error).split())}; delete it to make it again"
        ) from None
    stored = {DRAWN: "drawn independently, as by earlier versions"} | stored
    for key in expected | stored:
        if stored.get(key) != expected.get(key):
            raise UserError(
                f"reference.precomputed {path}: was made with {key} {stored.get(key)!r}, this run has {expected.get(key)!r}; "
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
