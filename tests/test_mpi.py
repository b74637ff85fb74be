"""Training batches shared by the processes of mpirun; test_layers.py has the same with threads, which need no MPI."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("mpi4py")
if shutil.which("mpirun") is None:
    pytest.skip("mpirun is not installed", allow_module_level=True)

# Asked of mpi4py's package alone: initializing MPI here would make this process one of its own.
import mpi4py

mpi4py.rc.initialize = False
try:
    import mpi
except (ImportError, RuntimeError) as error:  # mpi4py without the MPI it was built for
    pytest.skip(f"mpi4py finds no MPI: {error}", allow_module_level=True)


@pytest.mark.parametrize("size", [2, 3])
def test_parts_of_a_batch_give_what_the_whole_gives(size, tmp_path, environment):
    # Open MPI by default refuses to run as root, as containers do, and on fewer cores than processes.
    allowed = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    allowed |= {"OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_plm_rsh_agent": ""}
    command = ["mpirun", "-n", str(size), sys.executable, mpi.__file__, str(tmp_path)]
    done = subprocess.run(command, env={**environment, **allowed}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    ranks, want = [np.load(tmp_path / f"{rank}.npz") for rank in range(size)], mpi.steps(lambda array: array)
    for key, values in want.items():
        parts = [rank[key] for rank in ranks]
        got = np.concatenate(parts) if key[:-1] in ("y", "dx") else sum(parts) if key in ("dweight", "dbias") else parts[0]
        # A unit of float32: the statistics of the parts and of the whole differ in their last bits only.
        scale = np.abs(values) if key.startswith(("running", "num")) else np.abs(values).max()
        assert np.all(np.abs(got - values) <= 4 * 2.0**-23 * scale), key
        if key.startswith(("running", "num")):
            assert all(part.tobytes() == parts[0].tobytes() for part in parts), key
