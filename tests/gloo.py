"""The processes of a group of torch.distributed, for test_distributed.py: gloo.py SIZE FOLDER TASK prints their exit codes."""

import os
import sys
import time
from contextlib import redirect_stdout
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

import fastbn.torch

CUTS = {2: [3], 3: [0, 5]}  # of three, the first process has nothing
TIMEOUT = 3  # seconds, of the group in which a process is missing


def batch(step, dtype=torch.float32):
    rng = np.random.default_rng(step)
    return [torch.from_numpy(rng.standard_normal((8, 4, 3, 5)) + mean).to(dtype) for mean in (50, 0.2)]


def module(kind=fastbn.torch.BatchNorm2d, **options):
    new = kind(4, **options)
    with torch.no_grad():
        new.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
        new.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 2.0]))
    return new


def steps(layer, cut, dtype=torch.float32):
    """Two training steps and one in eval mode on a part of each batch; everything that comes of them, by name."""
    found = {}
    for step in range(3):
        layer.train(step < 2)
        x, dy = (cut(tensor) for tensor in batch(step, dtype))
        x = x.clone().requires_grad_()
        y = layer(x)
        y.backward(dy)
        found |= {f"y{step}": y.detach(), f"dx{step}": x.grad}
    found |= {"dweight": layer.weight.grad, "dbias": layer.bias.grad, **layer.state_dict()}
    return {name: tensor.detach().double().numpy() for name, tensor in found.items()}


def train(rank, size, folder):
    def cut(tensor):
        return torch.tensor_split(tensor, CUTS[size])[rank]

    calls, all_gather = [], dist.all_gather

    def counted(*arguments, **options):
        calls.append(1)
        return all_gather(*arguments, **options)

    dist.all_gather = counted
    results = {"world": steps(module(process_group="world"), cut)}
    exchanges = len(calls)
    results["again"] = steps(module(process_group="world"), cut)
    group = dist.new_group(list(range(size)))
    results["group"] = steps(fastbn.torch.convert(module(torch.nn.BatchNorm2d, momentum=None), process_group=group), cut)
    results["bfloat16"] = steps(module(process_group=group), cut, torch.bfloat16)
    results["sync"] = steps(fastbn.torch.convert(module(torch.nn.SyncBatchNorm)), cut)
    plain = module()
    results["none"] = steps(plain, cut) if rank else {}  # a part alone, which differs
    np.savez(f"{folder}/{rank}.npz", **{f"{name}.{key}": value for name, found in results.items() for key, value in found.items()})
    print("exchanges", exchanges)

    layer = module(process_group="world")
    one = torch.zeros(1 if rank == 1 else 0, 4, 1, 1)
    try:
        layer(one)
    except ValueError as error:
        print("one value:", error, int(layer.num_batches_tracked))
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    try:
        dx.sum().backward()
    except RuntimeError as error:
        print("twice:", error)


def network(seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 3), torch.nn.BatchNorm2d(3)
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.BatchNorm1d(3 * 4 * 4)).eval()


def images(count=40):
    rng = np.random.default_rng(4)
    return torch.from_numpy(rng.standard_normal((count, 2, 8, 8)) * [[[[1]], [[30]]]] + 50).float()


def update(rank, size, folder):
    part = torch.tensor_split(images(), CUTS[size])[rank]
    for mode in ("population", "one-pass"):
        net = network()
        fastbn.torch.update_bn(net, part.split(5) if len(part) else [], mode=mode, process_group="world")
        np.savez(f"{folder}/{rank}.{mode}.npz", **{name: value.numpy() for name, value in net.state_dict().items()})


def missing(rank, size, folder, task):
    layer = module(process_group=dist.new_group(list(range(size)), timeout=timedelta(seconds=TIMEOUT)))
    dist.barrier()
    if rank == size - 1:
        if task == "die":
            os._exit(3)
        time.sleep(3 * TIMEOUT)
        return
    before, start = layer.running_mean.clone(), time.monotonic()
    try:
        layer(batch(0)[0])
    except RuntimeError:
        print("error", torch.equal(before, layer.running_mean), int(layer.num_batches_tracked), time.monotonic() - start < 3 * TIMEOUT)


def main(rank, size, folder, task):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60))
    with open(f"{folder}/{rank}.txt", "w", encoding="utf-8") as file, redirect_stdout(file):
        if task in ("train", "update"):
            (train if task == "train" else update)(rank, size, folder)
            dist.destroy_process_group()
        else:
            missing(rank, size, folder, task)
    os._exit(0)  # without saying goodbye to a group that may not be there


if __name__ == "__main__":
    size, folder, task = int(sys.argv[1]), *sys.argv[2:]
    # Forked before anything has a thread: importing torch once is most of what this costs.
    children = []
    for rank in range(size):
        children.append(os.fork())
        if children[-1] == 0:
            main(rank, size, folder, task)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
