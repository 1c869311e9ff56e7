"""Check files that cannot run here: manifests against the schemas of their kinds, scripts and the Dockerfile by linters."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml

from tests.conftest import ROOT
from tests.support.hosts import find

pytestmark = pytest.mark.launch
MANIFESTS = sorted((ROOT / "launchers" / "kubernetes").glob("*.yaml"))
SCRIPTS = [
    *(ROOT / "launchers" / "slurm").glob("*.sbatch"),
    *(ROOT / "docker" / name for name in ("entrypoint", "healthcheck", "prove")),
    ROOT / ".ci" / "run",
]
# Kinds as kubeflow_trainer_api names their models, which are made from the same definitions as the CRDs.
MODELS = {
    "v1/Service": "IoK8sApiCoreV1Service",
    "batch/v1/Job": "IoK8sApiBatchV1Job",
    "jobset.x-k8s.io/v1alpha2/JobSet": "JobsetV1alpha2JobSet",
    "trainer.kubeflow.org/v1alpha1/TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
    "trainer.kubeflow.org/v1alpha1/TrainJob": "TrainerV1alpha1TrainJob",
}


def documents(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text()))


def model(document: dict):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    return getattr(models, MODELS[f"{document['apiVersion']}/{document['kind']}"])


def lost(given, parsed, path: str = "") -> list[str]:
    """Keys that the schema does not know: the models drop them without a word."""
    if isinstance(given, dict):
        return [
            found
            for key, value in given.items()
            for found in (lost(value, parsed[key], f"{path}.{key}") if key in parsed else [f"{path}.{key}"])
        ]
    if isinstance(given, list):
        return [found for i, value in enumerate(given) for found in lost(value, parsed[i], f"{path}[{i}]")]
    return []


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_their_schemas(path):
    for document in documents(path):
        assert lost(document, model(document).from_dict(document).to_dict()) == []


def test_a_misspelt_key_and_a_wrong_type_are_found():
    (_, job) = documents(ROOT / "launchers" / "kubernetes" / "job.yaml")
    job["spec"]["template"]["spec"]["restartPolcy"] = "Never"
    assert lost(job, model(job).from_dict(job).to_dict()) == [".spec.template.spec.restartPolcy"]
    job["spec"]["completions"] = "two"
    with pytest.raises(ValueError, match="completions"):
        model(job).from_dict(job)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_core_kinds_fit_kubernetes_own_schemas(path):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    core = [document for document in documents(path) if document["apiVersion"] in ("v1", "batch/v1")]
    for document in core:
        kubernetes_validate.validate(document, "1.30", strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_pods_are_what_the_guide_says(path):
    """Non-root, read-only, time for a checkpoint, exit code 75 not an error, the same run on every kind."""
    from dde_ds.cli.node import read_arguments

    text = path.read_text()
    assert "values: [75]" in text
    for document in documents(path):
        spec = document["spec"]
        if document["kind"] in ("Service", "TrainJob"):
            continue
        if document["kind"] == "TrainingRuntime":
            spec = spec["template"]["spec"]
        job = spec["replicatedJobs"][0]["template"]["spec"] if "replicatedJobs" in spec else spec
        pod = job["template"]["spec"]
        (container,) = pod["containers"]
        assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["terminationGracePeriodSeconds"] >= 600
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["command"] == ["tini", "--", "docker/entrypoint", "node"]
        _, train = read_arguments([*container["args"], "--ranks", "8"])
        assert train == container["args"]
        assert (ROOT / train[train.index("--config") + 1]).is_file()
        assert not any("secret" in str(variable).lower() or "token" in str(variable).lower() for variable in container["env"])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts(path):
    if not (shellcheck := find("shellcheck")):
        pytest.skip("not installed: shellcheck")
    subprocess.run([shellcheck, "--enable=all", "--exclude=SC2250", path], check=True)
    assert path.suffix == ".sbatch" or path.stat().st_mode & 0o111


def test_dockerfile():
    if not (hadolint := find("hadolint")):
        pytest.skip("not installed: hadolint")
    subprocess.run([hadolint, ROOT / "docker" / "Dockerfile"], check=True)


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_the_images_hold_what_is_tested(target):
    """The lock files name the versions of constraints.txt, with hashes, and what setup.py asks for."""
    lock = (ROOT / "docker" / f"requirements-{target}.txt").read_text()
    locked = dict(re.findall(r"^([a-z0-9-]+)==([^ \n]+)", lock, re.MULTILINE))
    tested = dict(re.findall(r"^([a-z0-9-]+)==([^ \n]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {name: version for name, version in locked.items() if name in tested and tested[name] != version} == {}
    assert {"deepspeed", "diffusers", "transformers", "webdataset", "safetensors", "numpy", "rich", "pyyaml", "pyarrow"} <= set(
        locked
    )
    assert ("torch" in locked) == (target == "gpu")
    entries = re.split(r"^(?=[a-z0-9-]+==)", lock, flags=re.MULTILINE)[1:]
    assert len(entries) == len(locked)
    assert all("--hash=sha256:" in entry for entry in entries)


def requirements() -> tuple[set[str], dict[str, set[str]]]:
    """Names of the packages that setup.py asks for, always and by extra."""

    def names(wanted: list[str]) -> set[str]:
        return {re.match(r"[A-Za-z0-9-]+", package)[0] for package in wanted}

    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    asked = setup.call_args.kwargs
    return names(asked["install_requires"]), {extra: names(wanted) for extra, wanted in asked["extras_require"].items()}


def imported(*folders: str) -> set[str]:
    """Packages that the code imports, anywhere in a file, under the names that they are installed by."""
    found = set()
    for path in [path for folder in folders for path in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    own = {path.stem for folder in ("tools", "launchers") for path in (ROOT / folder).rglob("*.py")} | {"dde_ds", *folders}
    installed_by = {"PIL": "pillow", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    return {installed_by.get(name, name) for name in found - own - set(sys.stdlib_module_names)}


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_the_images_hold_what_recipes_and_guides_name(target):
    """Every extra that a recipe, a guide or an error message names is in the `gpu` image's lock file, and whatever the code imports."""
    always, extras = requirements()
    texts = [
        path
        for ending in ("*.md", "*.yaml", "*.py")
        for folder in ("dde_ds", "tools", "launchers")
        for path in (ROOT / folder).rglob(ending)
    ]
    named = set()
    for path in [ROOT / "README.md", *texts]:
        text = path.read_text()
        named |= {extra for group in re.findall(r"\.\[([a-z,]+)\]", text) for extra in group.split(",")}
        named |= set(re.findall(r"needs the extra ([a-z]+)", text))
    assert {"shard", "eval", "remote", "hub", "lora", "lowbit", "track"} <= named <= set(extras)
    held = named if target == "gpu" else {"shard", "eval", "test"}
    needed = always.union(*(extras[extra] for extra in held))
    if target == "gpu":
        needed |= imported("dde_ds", "tools", "launchers")
    else:
        # PyTorch and Triton come from elsewhere. No test sends anything to Weights & Biases.
        needed = (needed | imported("dde_ds", "tools", "launchers", "tests")) - {"torch", "triton", "wandb"}
    lock = (ROOT / "docker" / f"requirements-{target}.txt").read_text()
    assert needed - set(re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE)) == set()

    # As docker/README.md says that the file is made.
    guide = (ROOT / "docker" / "README.md").read_text()
    said = guide.split("uv pip compile")[1].split("and the other with" if target == "gpu" else "`--no-emit-package`")[0]
    said = said if target == "gpu" else said.split("and the other with")[1]
    assert set(re.findall(r"--extra ([a-z]+)", said)) == held


def test_the_gpu_image_compiles_what_a_run_needs():
    """Triton's launchers, and for offload DeepSpeed's Adam, without whose two programs dde_ds.engine.zero refuses it."""
    stage = (ROOT / "docker" / "Dockerfile").read_text().split("FROM project AS gpu\n")[1]
    (packages,) = re.findall(r"apt-get install --yes --no-install-recommends ([^\\\n]+)", stage)
    assert {"g++", "gcc", "libc6-dev", "python3-dev"} <= set(packages.split())
    assert re.search(r"^ninja==", (ROOT / "docker" / "requirements-gpu.txt").read_text(), re.MULTILINE)
