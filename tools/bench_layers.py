"""Time training with fastbn.torch beside torch's own batch normalization, in one process, call by call in turn.

    python tools/bench_layers.py                          a dozen layers in NCHW and a small residual network, one thread
    python tools/bench_layers.py --shapes shapes.json     the layers of tools/shapes.json, or of another list; batches are cut to 8 to 32
    python tools/bench_layers.py --channels-last --threads 2 --seconds 1 --json bench.json
    python tools/bench_layers.py --bound                  beside a step that only moves the tensors

A step of a layer is its forward and backward pass (y, dx, dweight, dbias), of the network a step of SGD as well. Every result is checked
against float64 before it is timed. Times are medians of calls, of one thread in CPU time, so that other work on the machine counts for
little; the quotient is torch's time over fastbn's, above 1 where fastbn is faster. The bound is torch's time over that of a step of
autograd in Python that normalizes nothing: it copies x to y and adds x and dy to dx, each read or written once, in memory that is there
already.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from pathlib import Path

import bench_kernels
import torch

import fastbn
from fastbn.torch import convert

BATCH = (8, 32)
MODULES = {0: torch.nn.BatchNorm1d, 1: torch.nn.BatchNorm1d, 2: torch.nn.BatchNorm2d, 3: torch.nn.BatchNorm3d}


def in_turn(calls, seconds):
    """Median time of each call in microseconds, the calls taking turns; short ones are repeated within a turn."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    once = {}
    for name, call in calls.items():
        call()
        start = clock()
        call()
        once[name] = clock() - start
    repeats = {name: max(1, int(1e-3 / max(spent, 1e-6))) for name, spent in once.items()}
    times = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while len(times[next(iter(calls))]) < 9 or time.perf_counter() < end:
        for name, call in calls.items():
            start = clock()
            for _ in range(repeats[name]):
                call()
            times[name].append((clock() - start) / repeats[name])
    return {name: statistics.median(spent) * 1e6 for name, spent in times.items()}


def step_of(module, x, dy):
    leaves = [x.requires_grad_(), *module.parameters()]

    def step():
        y = module(x)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return step


def check(step, x, dy, module):
    """Raise unless the results of a step are those of float64, up to rounding; on the first channels where all would take long."""
    few = slice(0, max(1, min(x.shape[1], 4_000_000 // (x.numel() // x.shape[1]))))
    wide = x.detach()[:, few].double().requires_grad_()
    weight, bias = (parameter.detach()[few].double().requires_grad_() for parameter in module.parameters())
    y = torch.nn.functional.batch_norm(wide, None, None, weight, bias, training=True)
    want = (y.detach(), *torch.autograd.grad(y, [wide, weight, bias], dy[:, few].double()))
    for name, got, exact in zip(("y", "dx", "dweight", "dbias"), step(), want, strict=True):
        # Gradients of parameters are sums of many terms of dy, which may cancel.
        size = 1 + exact.abs().max() if got.dim() > 1 else 1 + dy[:, few].abs().double().sum() / exact.numel()
        error = ((got[:, few] if got.dim() > 1 else got[few]).double() - exact).abs().max() / size
        # torch adds up channels last in float32.
        if not error < (1e-5 if type(module).__module__ == "fastbn.torch" else 1e-2):
            raise SystemExit(f"{type(module).__module__} {name} {tuple(x.shape)}: wrong by {error}")


class Moves(torch.autograd.Function):
    """The least that a step of autograd written in Python does to its tensors."""

    @staticmethod
    def forward(ctx, x, weight, bias, kept):
        y, ctx.dx = kept
        ctx.save_for_backward(x, weight, bias)
        return y.copy_(x).detach()

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        return torch.add(x, dy, out=ctx.dx).detach(), torch.empty_like(weight), torch.empty_like(bias), None


def step_that_moves(module, x, dy):
    leaves, kept = [x.requires_grad_(), *module.parameters()], (torch.empty_like(x), torch.empty_like(x))

    def step():
        y = Moves.apply(*leaves, kept)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return step


def layer(shape, channels_last, seconds, bound):
    """Times of one training step, or None where the shape is not for this layout."""
    if channels_last and len(shape) not in (4, 5):
        return None
    torch.manual_seed(0)
    theirs = MODULES[len(shape) - 2](shape[1])
    torch.nn.init.normal_(theirs.weight)
    modules = {"torch": theirs, "fastbn": convert(copy.deepcopy(theirs))}
    order = {"memory_format": {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]} if channels_last else {}
    x, dy = (torch.randn(shape).add_(0.5).contiguous(**order) for _ in range(2))
    steps = {name: step_of(module, x.clone(**order), dy) for name, module in modules.items()}
    for name, module in modules.items():
        check(steps[name], x, dy, module)
    if bound:
        steps["bound"] = step_that_moves(theirs, x.clone(**order), dy)
    return in_turn(steps, seconds)


class Block(torch.nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        nn = torch.nn
        self.main = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.side = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if stride > 1 else nn.Identity()

    def forward(self, x):
        return torch.relu(self.main(x) + self.side(x))


def network():
    """A residual network of 13 convolutions and as many batch normalizations, for images of 32 x 32."""
    nn = torch.nn
    stem = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    blocks = [Block(32, 32, 1), Block(32, 32, 1), Block(32, 64, 2), Block(64, 64, 1), Block(64, 128, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def whole(channels_last, seconds):
    """Times of a training step of the network."""
    torch.manual_seed(0)
    models = {"torch": network()}
    models["fastbn"] = convert(copy.deepcopy(models["torch"]))
    order = {"memory_format": torch.channels_last} if channels_last else {}
    x, target = torch.randn(32, 3, 32, 32).contiguous(**order), torch.randint(0, 10, (32,))

    def step_of_network(model):
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)

        def step():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            return loss.item()

        return step

    steps = {name: step_of_network(model.to(**order)) for name, model in models.items()}
    losses = {name: step() for name, step in steps.items()}
    if not math.isclose(losses["torch"], losses["fastbn"], rel_tol=1e-4):
        raise SystemExit(f"the network's losses differ: {losses}")
    return in_turn(steps, seconds)


def shapes_of(path, most):
    """Shapes with batches of 8 to 32, each once, whose tensors have at most so many elements."""
    shapes = bench_kernels.read_shapes(path) if path else bench_kernels.SHAPES
    shapes = dict.fromkeys((min(max(shape[0], BATCH[0]), BATCH[1]), *shape[1:]) for shape in shapes)
    return [shape for shape in shapes if math.prod(shape) <= most]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", help="JSON file of layers")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="per layer, and ten times that for the network")
    parser.add_argument("--most", type=float, default=64e6, help="leave out layers with more elements than this")
    parser.add_argument("--bound", action="store_true", help="time a step that only moves the tensors, too")
    parser.add_argument("--json", help="write the times here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fastbn.set_num_threads(options.threads)
    rows = {}
    layout = "channels last" if options.channels_last else "channels first"
    print(f"torch {torch.__version__}, fastbn {fastbn.__version__} ({fastbn.show_config()['isa']}), {options.threads} threads, {layout}")
    head = f"{'training step of a layer':28} {'torch us':>11} {'fastbn us':>11} {'quotient':>9}"
    print(f"{head} {'bound':>9}" if options.bound else head)
    for shape in shapes_of(options.shapes, options.most):
        times = layer(shape, options.channels_last, options.seconds, options.bound)
        if times is None:
            continue
        name = "x".join(map(str, shape))
        rows[name] = times
        last = f" {times['torch'] / times['bound']:9.2f}" if options.bound else ""
        print(f"{name:28} {times['torch']:11.1f} {times['fastbn']:11.1f} {times['torch'] / times['fastbn']:9.2f}{last}")
        sys.stdout.flush()
    quotients = {name: times["torch"] / times["fastbn"] for name, times in rows.items()}
    worst = min(quotients, key=quotients.get)
    print(f"geometric mean {statistics.geometric_mean(quotients.values()):.2f}, worst {quotients[worst]:.2f} at {worst}")
    if options.bound:
        print(f"geometric mean of the bound {statistics.geometric_mean(times['torch'] / times['bound'] for times in rows.values()):.2f}")
    times = rows["network"] = whole(options.channels_last, 10 * options.seconds)
    print(f"{'step of the network':28} {times['torch']:11.1f} {times['fastbn']:11.1f} {times['torch'] / times['fastbn']:9.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
