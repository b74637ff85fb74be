"""Two processes with tensors of torch.distributed, for test_torch_memory.py: shards.py FOLDER prints their exit codes."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastbn.torch

SIZE, C = 2, 4
close = torch.testing.assert_close


def tensors(seed=0):
    """x, running_mean, running_var, weight, bias and dy, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(6, C, 3, 5), (C,), (C,), (C,), (C,), (6, C, 3, 5)]
    x, mean, var, weight, bias, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, mean, var.square() + 1, weight, bias, dy


def all_reduce(tensor):
    return collectives.all_reduce(tensor, "sum", dist.group.WORLD)


def reduced_tensors(rank):
    """What a functional collective returns is an AsyncCollectiveTensor, as a gradient and in every place of a call."""
    for training in (True, False):
        found = []
        for function in (torch.nn.functional.batch_norm, fastbn.torch.batch_norm):
            x, mean, var, weight, bias, dy = tensors()
            leaves = [each.requires_grad_() for each in (x, weight, bias)]
            y = function(x, mean, var, weight, bias, training)
            y.register_hook(all_reduce)
            gradients = torch.autograd.grad(y, leaves, dy * (rank + 1))
            for place in range(1, 5):
                given = [each.detach() for each in tensors()[:5]]
                given[place] = all_reduce(given[place] / SIZE)
                gradients += (function(*given, training), given[1], given[2])
            found.append([torch.as_tensor(each) + 0 for each in gradients])
        for got, want in zip(*found, strict=True):
            close(got, want, rtol=1e-9, atol=1e-9)


def sharded(mesh):
    """DTensor of every placement gives what one process gives of the whole."""
    for placement in (Replicate(), Shard(1), Shard(0), Shard(2)):
        vectors = Shard(0) if placement == Shard(1) else Replicate()
        for training in (True, False):
            whole, parts = tensors(), []
            for each in tensors():
                parts.append(distribute_tensor(each, mesh, [placement if each.dim() > 1 else vectors]))
            leaves = [[each.requires_grad_() for each in (given[0], *given[3:5])] for given in (whole, parts)]
            want = torch.nn.functional.batch_norm(*whole[:5], training)
            got = fastbn.torch.batch_norm(*parts[:5], training)
            assert isinstance(got, DTensor)
            close(got.full_tensor(), want)
            if placement == Shard(1) or (placement == Shard(0) and not training):
                assert got.placements == (placement,)
            gradients = torch.autograd.grad(got, leaves[1], parts[5])
            for one, other in zip(gradients, torch.autograd.grad(want, leaves[0], whole[5]), strict=True):
                close(one.full_tensor(), other)
            for moved in (1, 2):
                assert parts[moved].placements == (vectors,)
                close(parts[moved].full_tensor(), whole[moved])


def mixed(mesh):
    """DTensor beside plain tensors is torch's error, in every place."""
    for training in (True, False):
        for place in range(6):
            given = list(tensors())
            given[place] = distribute_tensor(given[place], mesh, [Replicate()])
            given[0].requires_grad_()
            with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
                torch.autograd.grad(fastbn.torch.batch_norm(*given[:5], training), given[0], given[5])


def shared(rank):
    """An all-reduced gradient behind a process group."""
    x, *_, dy = tensors()
    want, got = (x.clone().requires_grad_() for _ in range(2))
    torch.nn.functional.batch_norm(want, None, None, training=True).backward(dy)
    module = fastbn.torch.BatchNorm2d(C, affine=False, process_group="world")
    y = module(torch.tensor_split(got, SIZE)[rank])
    y.register_hook(all_reduce)
    y.backward(torch.tensor_split(dy, SIZE)[rank] * 0.5)
    halves = torch.tensor_split(dy, SIZE)
    again = x.clone().requires_grad_()
    torch.nn.functional.batch_norm(again, None, None, training=True).backward(torch.cat([sum(halves) * 0.5] * SIZE))
    close(torch.tensor_split(got.grad, SIZE)[rank], torch.tensor_split(again.grad, SIZE)[rank])


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE)
    mesh = init_device_mesh("cpu", (SIZE,))
    reduced_tensors(rank)
    sharded(mesh)
    mixed(mesh)
    shared(rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    children = []
    for rank in range(SIZE):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                main(rank, sys.argv[1])
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
