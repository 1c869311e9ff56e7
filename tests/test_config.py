from __future__ import annotations

import ast
import dataclasses
import os
import re
import time
from pathlib import Path

import pytest
import yaml

import dde_ds.config
from dde_ds import UserError, load_config
from dde_ds.config import BatchConfig, OptimizerConfig
from dde_ds.engine.zero import complete_config

ROOT = Path(__file__).resolve().parent.parent
MINIMAL = {
    "output": "runs/x",
    "steps": 10,
    "model": {"path": "base"},
    "data": {"path": "shards"},
    "batch": {"pairs": 8},
    "optimizer": {"learning_rate": 1e-5},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_defaults_overrides_and_round_trip(file, tmp_path):
    run = load_config(
        file,
        ["objective.beta=500", "samples.prompts=[a, b]", "objective.timestep_range=[200, 700]", "optimizer.learning_rate=1e-6"],
    )
    assert run.objective.beta == 500.0
    assert run.samples.prompts == ("a", "b")
    assert load_config(file, [r'samples.prompts=["\ud83c\udf89 party", 0777, no, 2024-01-01]']).samples.prompts == (
        *("🎉 party", "0777", "no", "2024-01-01"),
    )
    assert run.objective.timestep_range == (200, 700)
    assert run.optimizer.learning_rate == 1e-6  # YAML 1.1 reads 1e-6 as text
    again = tmp_path / "again.yaml"
    again.write_text(run.to_yaml())
    assert load_config(again) == run


@pytest.mark.parametrize("key", ["output", "data.cache_dir", "reference.precomputed"])
def test_what_is_written_is_no_url(file, key):
    """Refuse a URL as the path of an output. The URL would name a folder ``s3:`` in the working directory, which is lost with the machine."""
    with pytest.raises(UserError, match=rf"{key} is 's3://user:\*\*\*@bucket/run': must be a path of this machine"):
        load_config(file, [f"{key}=s3://user:secret@bucket/run"])


def test_sources(file, tmp_path):
    run = load_config(file, ["data.path=null", "data.sources=[{path: a, weight: 3}, {path: s3://b/c}]"])
    assert run.data.weighted_paths == [("a", 3.0), ("s3://b/c", 1.0)]
    assert load_config(file).data.weighted_paths == [("shards", 1.0)]
    (tmp_path / "again.yaml").write_text(run.to_yaml())
    assert load_config(tmp_path / "again.yaml") == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lerning_rate=1", "unknown key optimizer.lerning_rate; did you mean 'learning_rate'?"),
        ("bach.pairs=1", "unknown key bach; did you mean 'batch'?"),
        ("steps=0", "steps is 0: must be 1 or more"),
        ("steps=1.5", "steps is 1.5: expected a whole number"),
        ("steps=true", "steps is True: expected a whole number"),
        ("precision=fp16", "precision is 'fp16': must be 'bf16' or 'fp32'"),
        ("precision=16", "precision is 16: must be 'bf16' or 'fp32'"),
        ("precision=[bf16]", "precision is ['bf16']: must be 'bf16' or 'fp32'"),
        ("reference.placement=gpu", "reference.placement is 'gpu': must be 'auto', 'replicated', 'sharded' or 'cpu'"),
        ("reference.dtype=fp16", "reference.dtype is 'fp16': must be 'policy', 'bf16' or 'fp32'"),
        ("optimizer.type=sgd", "optimizer.type is 'sgd': must be 'adamw' or 'adamw_8bit'"),
        ("objective.variance=small", "objective.variance is 'small': must be 'posterior' or 'beta'"),
        ("objective.discount_mode=both", "objective.discount_mode is 'both': must be 'weight' or 'sample'"),
        ("objective.beta=-1", "objective.beta is -1.0: must be above 0"),
        ("objective.beta=.nan", "objective.beta is nan: expected a finite number"),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9]: expected a list of 2"),
        ("data=shards", "data is 'shards': expected keys and values"),
        ("samples.prompts=cat", "samples.prompts is 'cat': expected a list"),
        ("model.path=", "model.path is None: expected text"),
        ("data.path=", "data.path is None: give either data.path or data.sources"),
        ("data.sources=[{path: a}]", "data.path is 'shards': give either data.path or data.sources"),
        ("data.sources=[{path: a, wait: 1}]", "unknown key data.sources[0].wait; did you mean 'weight'?"),
        ("data.sources=[a]", "data.sources[0] is 'a': expected keys and values"),
        ("data.sources=[{path: a, weight: 0}]", "data.sources weight is 0.0: must be above 0"),
        ("steps", "override 'steps': expected key=value"),
        ("seed=0777", "seed is '0777': expected a whole number"),
        ("max_hours=1:00", "max_hours is '1:00': expected a finite number"),
        ("data.flip=yes", "data.flip is 'yes': expected true or false"),
        ("optimizer.learning_rate=1e999", "optimizer.learning_rate is inf: expected a finite number"),
        ("steps=1000000000000000000", "steps is 1000000000000000000: must be 1,000,000,000 or less"),
        (f"steps={'9' * 5000}", "steps is '999"),
        ("data.workers=1000000000", "data.workers is 1000000000: must be 256 or less"),
        ("data.block_shards=1000000000000000000", "data.block_shards is 1000000000000000000: must be 1,000,000,000 or less"),
        ("data.timeout_s=1e300", "data.timeout_s is 1e+300: must be 86,400 or less"),
        ("timeout_minutes=1e300", "timeout_minutes is 1e+300: must be 100,000 or less"),
        ("max_hours=1e300", "max_hours is 1e+300: must be 1,000,000,000 or less"),
        ("batch.pairs=1000000000000000003", "batch.pairs is 1000000000000000003: must be 10,000,000 or less"),
        ("batch.micro_batch_size=1000000000", "batch.micro_batch_size is 1000000000: must be 100,000 or less"),
        ("samples.seed=-1", "samples.seed is -1: must lie in [0, 2^63)"),
        ("samples.seed=99999999999999999999", "samples.seed is 99999999999999999999: must lie in [0, 2^63)"),
        ("samples.inference_steps=1000000000", "samples.inference_steps is 1000000000: must be 1,000 or less"),
        ("lora={rank: 1000000000}", "lora.rank is 1000000000: must be 4,096 or less"),
        ("objective.beta=1e300", "objective.beta is 1e+300: must be 1,000,000,000 or less"),
        (f"model.gradient_checkpointing=every_{'9' * 3000}", "model.gradient_checkpointing is 'every_999"),
        *(
            (f"{key}=runs/{'ä' * 130}", f"{key} is 'runs/äää")
            for key in (
                "output",
                "model.path",
                "data.path",
                "evaluation.path",
                "deepspeed",
                "reference.precomputed",
                "data.cache_dir",
            )
        ),
        (f"model.path={'a' * 5000}", "model.path has 5,000 characters: must have 4,096 or fewer"),
        (r'output="a\0b"', r"output is 'a\x00b': must not hold a NUL character"),
        (
            r'samples.prompts=["\ud83c"]',
            r"""override 'samples.prompts=["\\ud83c"]': not valid YAML: line 1, column 2: text holds half""",
        ),
        (
            "data={path: a, path: b}",
            "override 'data={path: a, path: b}': not valid YAML: line 1, column 11: the key path is there twice",
        ),
        ("output=runs/a #1", "override 'output=runs/a #1': YAML takes what follows # for a comment"),
        ("output=[a", "override 'output=[a': not valid YAML"),
        (f"lora.rank{'.x' * 2000}=1", "lora.rank is {"),
        ("steps.x=1", "override 'steps.x=1': 'steps' holds a value"),
    ],
)
def test_one_line_that_names_the_key(file, override, message):
    with pytest.raises(UserError) as error:
        load_config(file, [override])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_missing_key_and_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in MINIMAL.items() if key != "batch"}))
    with pytest.raises(UserError, match="missing key batch"):
        load_config(path)
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    for text, message in (
        ("a: [", "not valid YAML: line 1, column 5"),
        ("", "expected keys and values, found None"),
        ("steps: 1\nsteps: 2", "not valid YAML: line 2, column 1: the key steps is there twice"),
        ("output: é", "not utf-8 text: byte 8 is 0xe9; save it as UTF-8"),
    ):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=f"^config {path}: {message}"):
            load_config(path)
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-16")
    assert load_config(path).steps == 10
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):  # and not a wait for somebody to write to it
        load_config(path)


def test_a_written_configuration_is_read_as_it_was(file, tmp_path):
    """Text that this YAML takes for a number is put in quotes."""
    run = load_config(file, ['samples.prompts=["1e5", "0777", "true", "🎉", "a: b # c"]', "optimizer.learning_rate=1e-17"])
    (tmp_path / "again.yaml").write_text(run.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == run


def test_accumulation_is_derived():
    assert BatchConfig(pairs=2048, micro_batch_size=4).accumulation(64) == 8
    with pytest.raises(UserError) as error:
        BatchConfig(pairs=2048, micro_batch_size=3).accumulation(8)
    assert str(error.value) == (
        "batch.pairs is 2048: not a multiple of 8 ranks × batch.micro_batch_size 3; what fits: batch.pairs 2040 or 2064, or batch.micro_batch_size 1, 2, 4, 8"
    )
    with pytest.raises(UserError, match=r"batch\.pairs 6 or 9"):
        BatchConfig(pairs=8, micro_batch_size=1).accumulation(3)
    started = time.perf_counter()
    with pytest.raises(UserError, match=r"or batch\.micro_batch_size 1, 3, 9$"):
        BatchConfig(pairs=9_999_999, micro_batch_size=7).accumulation(1)
    assert time.perf_counter() - started < 1


def test_learning_rate_is_what_is_written():
    options = OptimizerConfig(learning_rate=1e-5, warmup_steps=4)
    assert [options.rate(step) for step in range(6)] == pytest.approx([2.5e-6, 5e-6, 7.5e-6, 1e-5, 1e-5, 1e-5])
    assert OptimizerConfig(learning_rate=1e-5).rate(0) == 1e-5


def test_every_field_is_documented():
    module = ast.parse(Path(dde_ds.config.__file__).read_text())
    for definition in [node for node in module.body if isinstance(node, ast.ClassDef)]:
        for field, after in zip(definition.body, [*definition.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                own_section = field.annotation.id.endswith("Config") if isinstance(field.annotation, ast.Name) else False
                assert documented or own_section, f"{definition.name}.{field.target.id} has no docstring"


RECIPES = sorted(ROOT.glob("launchers/recipes/*.yaml"))


@pytest.mark.parametrize("recipe", [*RECIPES, ROOT / "launchers/demo/train.yaml"], ids=lambda path: path.name)
def test_shipped_configurations_load(recipe):
    run = load_config(recipe)
    assert (ROOT / run.deepspeed).is_file()


# Adapters fit any number of GPUs that divides the batch.
WHOLE = [path for path in RECIPES if not path.stem.endswith("_lora")]


@pytest.mark.parametrize("recipe", WHOLE, ids=lambda path: path.name)
def test_a_recipe_fits_the_gpus_that_it_names(recipe):
    named = re.search(r"[Mm]ade for ([\d, or]+) GPUs of", recipe.read_text())
    assert named, "a recipe says which numbers of GPUs it is made for"
    run = dataclasses.replace(load_config(recipe), deepspeed=str(ROOT / load_config(recipe).deepspeed))
    for world in map(int, re.findall(r"\d+", named[1])):
        complete_config(run, world)  # whose DeepSpeed file contradicts nothing, and whose batch divides


def test_the_manual_shows_every_key():
    """All but sections that are off by default, which have recipes or a key of their own."""
    text = (ROOT / "launchers/recipes/sdxl_dde.yaml").read_text()
    written = yaml.safe_load(text)
    for name, value in dataclasses.asdict(load_config(ROOT / "launchers/recipes/sdxl_dde.yaml")).items():
        if isinstance(value, dict):
            assert written[name].keys() | {"sources"} >= value.keys(), name
        elif value is not None:
            assert name in written
