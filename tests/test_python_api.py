"""The guide's lines for Python, run as they stand, in a process of their own."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.support.launching import PATIENCE, environment, write_config

BEFORE = """
import os, signal, sys, threading
handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
"""
AFTER = """
import pathlib

def untouched():
    return handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]

assert code == 0 and pathlib.Path(run.output, "DONE").exists()
assert untouched()
config, folder = sys.argv[1:]

# Asked to stop by a signal; then one in a thread, to the end.
timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
timer.start()
assert dde_ds.train(dde_ds.load_config(config, [f"output={folder}/stopped", "steps=100000"])) == 75
timer.join()
assert untouched()
codes, second = [], dde_ds.load_config(config, [f"output={folder}/second"])
thread = threading.Thread(target=lambda: codes.append(dde_ds.train(second, resume="auto")))
thread.start()
thread.join()
assert codes == [0], codes
assert untouched()

try:
    dde_ds.train(second)
except dde_ds.UserError as error:
    print(error)
assert untouched()
"""


@pytest.mark.slow
def test_the_guide_for_python(tmp_path, sd_model, sd_shards):
    config = write_config(tmp_path / "run.yaml", sd_model, sd_shards, steps=1)
    guide = (ROOT / "launchers" / "recipes" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide.split("## From Python")[1], re.DOTALL)
    for found, own in (("launchers/recipes/sdxl_dde.yaml", str(config)), ("runs/first", str(tmp_path / "first"))):
        assert found in code
        code = code.replace(found, own)
    script = tmp_path / "script.py"
    script.write_text(BEFORE + code + AFTER)
    process = subprocess.run(
        [sys.executable, script, config, tmp_path], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert f"output {tmp_path}/second: holds a run already; go on with --resume" in process.stdout
