#!/usr/bin/env python3
"""Measure a re-estimation: beside onnxruntime alone, what a partition costs, how a cluster scales, and what it does to accuracy.

python tools/bench_reestimate.py resnet [--images N]     CPU seconds and memory beside onnxruntime alone, ResNet-18 on 64x64
python tools/bench_reestimate.py overhead                CPU milliseconds of a partition without work, in dask and without
python tools/bench_reestimate.py scaling                 real processes with sleep in place of work: 1, 2, 4, 8 of them
python tools/bench_reestimate.py plan                    tasks and depth of the merge tree for many partitions
python tools/bench_reestimate.py crowd [--workers N]     CPU milliseconds of the scheduler for a task, with 1,000 workers in one process
python tools/bench_reestimate.py memory [--images N]     largest resident size of each of 2 workers beside model, budget and 300 MB
python tools/bench_reestimate.py digits                  accuracy of averaged and pruned CNNs (needs torch, scikit-learn)
"""

import argparse
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from resnet_models import resnet18

import fastbn
from fastbn.reestimation.cluster import width_of
from fastbn.reestimation.merging import FAN

BATCH = 32


def cpu_seconds():
    """CPU time of this process and of those that it has waited for."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def timed(call):
    """Return (CPU seconds, wall seconds)."""
    before, began = cpu_seconds(), time.perf_counter()
    call()
    return cpu_seconds() - before, time.perf_counter() - began


def resnet(arguments):
    """Print CPU seconds of onnxruntime alone and of both modes, in turn, and the memory of this process."""
    from fastbn.graph.runtime import session

    model = resnet18(64)
    images = np.random.default_rng(0).standard_normal((arguments.images, 3, 64, 64)).astype(np.float32)
    data = model.SerializeToString()

    def alone():
        opened = session(data, threads=1, optimize=True)
        for first in range(0, len(images), BATCH):
            opened.run(None, {"image": images[first : first + BATCH]})

    calls = {"onnxruntime alone": alone}
    for mode in ("population", "one-pass"):
        calls[mode] = lambda mode=mode: fastbn.reestimate(data, images, batch=BATCH, mode=mode, memory="4GiB")
    least = dict.fromkeys(calls, math.inf)
    for _ in range(arguments.runs):
        for name, call in calls.items():
            least[name] = min(least[name], timed(call)[0])
    for name, seconds in least.items():
        print(f"{name:<18} {seconds:7.2f} s of CPU, {seconds / least['onnxruntime alone']:.2f} times onnxruntime alone")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(images)} images in batches of {BATCH}, 1 thread; largest resident size {largest:.0f} MB")


def tiny(partitions):
    """Return a model of one BN and data of so many partitions of 2 rows."""
    import onnx

    text = "<float[4] s = {1, 1, 1, 1}> { z = Neg (x) y = BatchNormalization (z, s, s, s, s) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> tiny (float[N, 4] x) => (float[N, 4] y) {text}')
    return model, np.random.default_rng(0).standard_normal((2 * partitions, 4)).astype(np.float32)


def overhead(arguments):
    """Print what a partition costs without work."""
    for workers in (0, 1):
        times = {}
        for count in (200, 1200):
            model, data = tiny(count)
            times[count] = timed(lambda model=model, data=data, workers=workers: fastbn.reestimate(model, data, batch=2, workers=workers))
        cpu, wall = (1000 * (times[1200][each] - times[200][each]) / 1000 for each in (0, 1))
        print(f"workers {workers}: {cpu:.2f} ms of CPU and {wall:.2f} ms of time for a partition without work")


class Sleeping:
    """Data whose reading takes a while and no CPU."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, block):
        time.sleep(self.seconds)
        return block


def scaling(arguments):
    """Print how the time falls with the number of processes, sleep in place of work."""
    import dask.array
    import distributed

    model, data = tiny(64)
    lazy = dask.array.from_array(data, chunks=(2, 4)).map_blocks(Sleeping(arguments.sleep), dtype=data.dtype)
    first = None
    for workers in (1, 2, 4, 8):
        options = {"scheduler_kwargs": {"dashboard": False, "dashboard_address": "127.0.0.1:0"}, "host": "127.0.0.1", "silence_logs": 50}
        with distributed.LocalCluster(n_workers=workers, threads_per_worker=1, **options) as cluster, distributed.Client(cluster) as client:
            fastbn.reestimate(model, data[:8], batch=2, client=client)
            _, seconds = timed(lambda client=client: fastbn.reestimate(model, lazy, batch=2, client=client, mode="one-pass"))
        first = first or seconds
        print(f"{workers} processes: {seconds:.2f} s, {first / seconds:.2f} times as fast as one (64 partitions of {arguments.sleep} s)")


def plan(arguments):
    """Print the tasks and the depth of the merge tree."""
    for partitions in (10**3, 10**4, 10**5, 10**6, 10**7):
        width, leaves, merges, depth = width_of(partitions), 0, 0, 0
        nodes = leaves = -(-partitions // width)
        while nodes > 1:
            nodes = -(-nodes // FAN)
            merges, depth = merges + nodes, depth + 1
        inner = round(math.log(width, FAN))
        tasks = f"{width} in a task, {leaves} tasks of work and {merges} of merging a level"
        print(f"{partitions:>9} partitions: {tasks}, {leaves / 1000:.0f} for each of 1,000 workers, merge tree {depth + inner} deep")


def work_as_many(address, count):
    """Be many workers of a scheduler, until it is gone."""
    import asyncio

    import dask
    import distributed

    # A thousand of them in one process would do nothing but look at the memory of this process and at their own stacks.
    limits = {f"distributed.worker.memory.{each}": False for each in ("target", "spill", "pause", "terminate")}
    dask.config.set({**limits, "distributed.worker.profile.enabled": False})

    async def run():
        workers = [distributed.Worker(address, nthreads=1, memory_limit=0, dashboard=False, silence_logs=50) for _ in range(count)]
        await asyncio.gather(*workers)
        await asyncio.gather(*(worker.finished() for worker in workers))

    asyncio.run(run())


def crowd(arguments):
    """Print what a task costs a scheduler, in a process of its own, that has many workers."""
    import distributed

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scheduler.json"
        options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
        scheduler = subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_scheduler", *options], stderr=subprocess.DEVNULL)
        workers = None
        try:
            with distributed.Client(scheduler_file=str(file), timeout=60) as client:
                address = client.scheduler.address
                workers = subprocess.Popen([sys.executable, __file__, "workers", "--address", address, "--workers", str(arguments.workers)])
                client.wait_for_workers(arguments.workers, timeout=600)
                seconds = {}
                for count in (500, 4500):
                    model, data = tiny(count)
                    before = client.run_on_scheduler(time.process_time)
                    fastbn.reestimate(model, data, batch=2, client=client)
                    seconds[count] = client.run_on_scheduler(time.process_time) - before
        finally:
            for process in filter(None, (workers, scheduler)):
                process.kill()
                process.wait()
    cost = (seconds[4500] - seconds[500]) / 4000
    leaves = -(-(10**6) // width_of(10**6))
    text = f"{1000 * cost:.2f} ms of the scheduler's CPU for a task"
    print(f"{arguments.workers} workers: {text}, {cost * leaves:.0f} s a level for the {leaves} tasks of 1,000,000 partitions")


def largest_size():
    """Return the largest resident size of this process, in bytes; what the process was that started it is not part of it."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def memory(arguments):
    """Print the largest resident size of two workers, for some budgets, beside what they may have."""
    import distributed

    model = resnet18(64)
    images = np.random.default_rng(0).standard_normal((arguments.images, 3, 64, 64)).astype(np.float32)
    for budget in (0, 128, 512):
        options = {"dashboard_address": None, "host": "127.0.0.1", "silence_logs": 50}
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder) / "image.npy", images)
            with distributed.LocalCluster(n_workers=2, threads_per_worker=1, **options) as cluster, distributed.Client(cluster) as client:
                fastbn.reestimate(model, Path(folder) / "image.npy", batch=BATCH, memory=f"{budget}MiB", client=client)
                sizes = client.run(largest_size).values()
        allowed = model.ByteSize() + (budget << 20) + 300e6
        print(f"budget {budget} MiB: {', '.join(f'{size / 1e6:.0f}' for size in sizes)} MB, asked for: below {allowed / 1e6:.0f}")


def accuracy(net, images, labels):
    """Return the accuracy in %."""
    import train_cnns

    return 100 * float(np.mean(train_cnns.torch_says(net.eval(), images) == labels))


def repaired(net, images, folder):
    """Return the accuracy-relevant forms of a network: by `fastbn reestimate` on its ONNX file, by ours and by torch's update_bn."""
    import copy

    import torch
    import train_cnns

    import fastbn.torch

    loader = torch.from_numpy(images[:, None]).split(train_cnns.BATCH)
    ours, theirs, exported = (copy.deepcopy(net) for _ in range(3))
    fastbn.torch.update_bn(ours, loader)
    torch.optim.swa_utils.update_bn(loader, theirs)
    with tempfile.TemporaryDirectory() as room:
        train_cnns.export_torch(exported, Path(room) / "net.onnx")
        result = fastbn.reestimate(Path(room) / "net.onnx", {"image": images[:, None]}, batch=128)
        result.save(Path(room) / "fixed.onnx")
        said = train_cnns.predictions(Path(room) / "fixed.onnx", folder[0])
    return ours, theirs, 100 * float(np.mean(said == folder[1])), result.moved[0]


def digits(arguments):
    """Print accuracies of a network, of what averaging or pruning makes of it, and of that with new statistics."""
    import copy

    import torch
    import train_cnns

    (images, labels), (held, held_labels) = train_cnns.digits()
    images, held = train_cnns.enlarge(images), train_cnns.enlarge(held)
    quiet = lambda epoch, loss: None  # noqa: E731
    print(
        "held-out accuracy in %: as it is | old statistics | fastbn reestimate (ONNX) | fastbn.torch.update_bn | torch's update_bn | moved"
    )
    for seed in range(arguments.seeds):
        parts = []
        for other in range(3):  # one start, three orders of the data
            start = train_cnns.torch_net(False, seed)
            parts.append(train_cnns.train_torch(start, images, labels, 10 * seed + other, arguments.epochs, quiet))
        soup = copy.deepcopy(parts[0])
        states = [part.state_dict() for part in parts]
        soup.load_state_dict(
            {
                name: sum(state[name] for state in states) / 3 if states[0][name].is_floating_point() else states[0][name]
                for name in states[0]
            }
        )
        pruned = copy.deepcopy(parts[0])
        with torch.no_grad():
            weight = pruned[0].weight
            weight[weight.abs() < weight.abs().flatten().quantile(0.7)] = 0
        for name, net in (("average of 3", soup), ("70 % of the conv pruned", pruned)):
            ours, theirs, fixed, moved = repaired(net, images, (held, held_labels))
            row = [accuracy(parts[0], held, held_labels), accuracy(net, held, held_labels), fixed]
            row += [accuracy(each, held, held_labels) for each in (ours, theirs)]
            print(f"seed {seed}  {name:<24} " + " | ".join(f"{each:6.2f}" for each in row) + f" | {moved.distance:.2f} std", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["resnet", "overhead", "scaling", "plan", "crowd", "memory", "digits", "workers"])
    parser.add_argument("--images", type=int, default=4096, help="of resnet and memory (4096)")
    parser.add_argument("--workers", type=int, default=1000, help="of crowd (1000)")
    parser.add_argument("--address", help="the scheduler of workers, which crowd starts")
    parser.add_argument("--runs", type=int, default=2, help="of resnet, the least counts (2)")
    parser.add_argument("--sleep", type=float, default=0.2, help="seconds of a partition, of scaling (0.2)")
    parser.add_argument("--seeds", type=int, default=3, help="of digits (3)")
    parser.add_argument("--epochs", type=int, default=10, help="of digits (10)")
    arguments = parser.parse_args()
    if arguments.what == "workers":
        work_as_many(arguments.address, arguments.workers)
    else:
        globals()[arguments.what](arguments)


if __name__ == "__main__":
    main()
