#!/usr/bin/env python3
"""What fastbn.torch.fold and the fusions of torch and timm leave of the batch normalizations of 12 networks.

    python tools/bench_torch_fold.py [NETWORK ...] [--json FILE] [--size 128]

For each network and tool: batch normalizations that still run, the largest difference from the original as a part of its largest output,
and seconds of CPU time on one thread. Weights are random, statistics as after a training. Networks of torchvision and timm are taken from
there where they are installed, else small ones of tools/torch_networks.py.
"""

import argparse
import copy
import json
import time
import warnings
from itertools import pairwise

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_networks import torch_networks

# Name -> where the network is taken from: the first of these that is installed. timm has batch normalizations of its own, with an
# activation in them, which FX fuses in no network; those of torchvision are torch's.
NETWORKS = {
    "ResNet v1": ("torchvision resnet18", "timm resnet18", "tools small_cnn"),
    "ResNet v2": ("timm resnetv2_18", "tools resnet_v2"),
    "MobileNetV2": ("torchvision mobilenet_v2", "timm mobilenetv2_100"),
    "MobileNetV3": ("torchvision mobilenet_v3_small", "timm mobilenetv3_small_100"),
    "DenseNet": ("torchvision densenet121", "timm densenet121", "tools densenet_like"),
    "RepVGG": ("timm repvgg_a0", "tools repvgg"),
    "ConvNeXt with BN": ("this script",),
    "U-Net": ("tools unet",),
    "PointNet": ("this script",),
    "TDNN": ("tools tdnn",),
    "tabular": ("tools tabular_mlp",),
    "LeViT": ("timm levit_128s", "tools levit_like"),
}

# What aten calls a batch normalization in inference, depending on its kernel.
NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "batch_norm", "_batch_norm_no_update")


class Block(nn.Module):
    """ConvNeXt's, with BN in the place of its layer normalization: depthwise convolution, BN, two pointwise ones, a scale per channel."""

    def __init__(self, width):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width, bias=False), nn.BatchNorm2d(width)
        self.wide, self.act, self.narrow = nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1)
        self.gamma = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x):
        return x + self.gamma * self.narrow(self.act(self.wide(self.norm(self.depthwise(x)))))


def convnext():
    """BN behind the stem, in each block, and before each downsampling convolution, which pads nothing."""
    stages = [nn.Conv2d(3, 32, 4, 4), nn.BatchNorm2d(32), *(Block(32) for _ in range(3)), nn.BatchNorm2d(32), nn.Conv2d(32, 64, 2, 2)]
    stages += [*(Block(64) for _ in range(3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)]
    return nn.Sequential(*stages)


class PointNet(nn.Module):
    """A shared MLP over points, the maximum over them, a head."""

    def __init__(self):
        super().__init__()
        widths, head = (3, 64, 64, 128, 256), (256, 128, 64)
        shared = [(nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(widths)]
        fully = [(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(head)]
        self.shared = nn.Sequential(*(step for each in shared for step in each))
        self.head = nn.Sequential(*(step for each in fully for step in each), nn.Linear(64, 10))

    def forward(self, x):
        return self.head(self.shared(x).amax(2))


def network(name, size):
    """Return (the network in evaluation, its inputs, where it comes from), or None where none is installed."""
    torch.manual_seed(0)
    image = torch.randn(1, 3, *[224 if name == "LeViT" else size] * 2)
    for source in NETWORKS[name]:
        library, _, which = source.partition(" ")
        try:
            if library == "torchvision":
                import torchvision

                return settled(getattr(torchvision.models, which)()), (image,), source
            if library == "timm":
                import timm

                return settled(timm.create_model(which)), (image,), source
        except ImportError:
            continue
        if library == "tools":
            model, inputs, _ = torch_networks()[which]
            return settled(model), inputs, source
        return (settled(PointNet()), (torch.randn(2, 3, 256),), source) if name == "PointNet" else (settled(convnext()), (image,), source)
    return None


def settled(model):
    """Give every batch normalization statistics as after a training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return model.eval()


class Counted(TorchDispatchMode):
    """Counts the batch normalizations that run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in NORMS
        return func(*args, **(kwargs or {}))


def run(model, inputs):
    """Return (output, batch normalizations that ran)."""
    with torch.no_grad(), Counted() as counted:
        y = model(*copy.deepcopy(inputs))
    return y, counted.count


# ---- the tools: (model, inputs) -> a model ----


def ours(model, inputs):
    from fastbn.torch import fold

    return fold(model, inputs).model


def unverified(model, inputs):
    from fastbn.torch import fold

    return fold(model, inputs, verify=False).model


def pairs(model, inputs):
    """torch.nn.utils.fusion on each BN that is registered right behind a convolution or linear layer, as scripts use it."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

    model = copy.deepcopy(model)
    for parent in [*model.modules()]:
        for (before, layer), (name, norm) in pairwise([*parent.named_children()]):
            fits = getattr(layer, "out_channels", getattr(layer, "out_features", None)) == getattr(norm, "num_features", 0)
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not fits or type(norm).__module__.split(".")[0] != "torch":
                continue
            if isinstance(layer, nn.modules.conv._ConvNd):
                fused = fuse_conv_bn_eval(layer, norm, transpose=layer.transposed)
            elif isinstance(layer, nn.Linear):
                fused = fuse_linear_bn_eval(layer, norm)
            else:
                continue
            parent._modules[before], parent._modules[name] = fused, nn.Identity()
    return model


def fx(model, inputs):
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


def timm_fuse(model, inputs):
    from timm.utils.model import reparameterize_model

    return reparameterize_model(model)


TOOLS = {
    "fastbn": ours,
    "fastbn, verify=False": unverified,
    "fuse_conv_bn_eval": pairs,
    "torch.fx fuse": fx,
    "timm reparameterize": timm_fuse,
}


def measure(model, inputs, tool, want):
    """Return what a tool leaves, how far its result is off, and what it takes; {"failed": why} where it gives none."""
    began = time.process_time()
    try:
        new = tool(model, inputs)
        seconds = time.process_time() - began
        got, left = run(new.eval(), inputs)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"}
    return {"left": left, "error": float((got - want).abs().max() / want.abs().max()), "seconds": seconds}


def cell(result):
    if "failed" in result:
        return f"fails ({result['failed'].split(':')[0]})"
    error = "0" if result["error"] == 0 else f"{result['error']:.0e}"
    return f"{result['left']} ({error}) {result['seconds']:.1f} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--size", type=int, default=128, help="of images, in pixels")
    options = parser.parse_args()
    unknown = set(options.networks) - set(NETWORKS)
    if unknown:
        parser.error(f"no network '{min(unknown)}'; there are {', '.join(NETWORKS)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    print(f"| network | from | BN | {' | '.join(TOOLS)} |\n|---|---|---|{'---|' * len(TOOLS)}", flush=True)
    for name in options.networks or NETWORKS:
        made = network(name, options.size)
        if made is None:
            print(f"{name}: none of {', '.join(NETWORKS[name])} is installed", flush=True)
            continue
        model, inputs, source = made
        want, count = run(model, inputs)
        rows.append({"network": name, "from": source, "bn": count, "tools": {}})
        for label, tool in TOOLS.items():
            rows[-1]["tools"][label] = measure(model, inputs, tool, want)
        print(f"| {name} | {source} | {count} | {' | '.join(map(cell, rows[-1]['tools'].values()))} |", flush=True)
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
