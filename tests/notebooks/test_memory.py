"""Binder gives 2 GB for everything: notebook 06 must leave room for the server and the browser's page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVER_MB = 300  # JupyterLab's own, generously
CODE = """
import resource, sys
import papermill
papermill.execute_notebook(sys.argv[1], sys.argv[2], cwd=sys.argv[3], progress_bar=False)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)  # of the kernel, the largest child
"""


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.skipif(sys.platform != "linux", reason="kilobytes, and children that are waited for, as on Linux")
def test_notebook_06_fits_where_binder_runs_it(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CIFAR_FT_RUNS": str(tmp_path / "none")}  # as binder/start sets it
    notebook = ROOT / "notebooks" / "06_predictions.ipynb"
    command = [sys.executable, "-c", CODE, str(notebook), str(tmp_path / "out.ipynb"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = float(done.stdout.split()[-1])
    assert 200 < peak < 2000 - SERVER_MB
