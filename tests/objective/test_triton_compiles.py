"""The kernels compile for a Hopper GPU, without one. A process of its own: Triton is in interpreter mode in the others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from dde_ds.objective.passes_triton import _errors_kernel, _gradient_kernel

def signature(kernel, tensors, constants):
    kinds = {name: tensors.get(name, ("i32",) * 4 if name.endswith("_strides") else "i32") for name in kernel.arg_names}
    return kinds | dict.fromkeys(constants, "constexpr")

for linear, implied, pointer, exact in [(True, False, "*bf16", "fp32"), (False, True, "*fp64", "fp64")]:
    tensors = dict.fromkeys(["policy", "reference", "result", "noisy"], pointer)
    tensors |= {"noise": "*fp32"} | dict.fromkeys(["scale", "shift", "parts", "factor"], f"*{exact}")
    constants = {"halves": 2, "implied": implied, "linear": linear, "exact": getattr(tl, exact.replace("fp", "float")), "part": 4096}
    if not implied:
        constants |= dict.fromkeys(["noisy", "scale", "shift"])
    for kernel, own in ((_errors_kernel, {"compare": True}), (_gradient_kernel, {})):
        source = ASTSource(kernel, signature(kernel, tensors, constants | own), constants | own)
        assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


def test_for_hopper():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", CODE], check=True, env=environment)
