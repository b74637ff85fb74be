"""One process under mpirun, for test_mpi.py: mpi.py FOLDER writes what its part of two training batches gives to FOLDER/RANK.npz."""

import sys

import numpy as np
from mpi4py import MPI

import fastbn

CUTS = {2: [3], 3: [0, 5]}  # of three, the first process has nothing


def steps(cut, **options):
    layer = fastbn.BatchNorm(4, **options)
    layer.weight[...], layer.bias[...] = [1, -2, 0.5, 3], [0, 1, -1, 2]
    found = {}
    for step in range(2):
        rng = np.random.default_rng(step)
        x, dy = (cut((rng.standard_normal((8, 4, 3, 5)) + mean).astype(np.float32)) for mean in (50, 0.2))
        found[f"y{step}"] = layer(x)
        found[f"dx{step}"], found["dweight"], found["dbias"] = layer.backward(dy)
    return found | layer.state_dict()


if __name__ == "__main__":
    comm = MPI.COMM_WORLD
    np.savez(f"{sys.argv[1]}/{comm.rank}.npz", **steps(lambda array: np.split(array, CUTS[comm.size])[comm.rank], comm=comm))
