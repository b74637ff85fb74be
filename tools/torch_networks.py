"""The networks of make_models.py as PyTorch modules, small, for export_samples.py; the order in which they are made gives their weights."""

from itertools import pairwise

import torch
from torch import nn

__all__ = ["torch_networks"]


def conv_norm(*sizes, **options):
    return nn.Sequential(nn.Conv2d(*sizes, bias=False, **options), nn.BatchNorm2d(sizes[1]))


def pre_activation(*sizes, **options):
    return [nn.BatchNorm2d(sizes[0]), nn.ReLU(), nn.Conv2d(*sizes, bias=False, **options)]


def pooled():
    return nn.AdaptiveAvgPool2d(1), nn.Flatten()


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class LinearNorm(nn.Module):
    """Linear, then BN over tokens (LeViT)."""

    def __init__(self, inner, out):
        super().__init__()
        self.c, self.bn = nn.Linear(inner, out, bias=False), nn.BatchNorm1d(out)

    def forward(self, x):
        x = self.c(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.per_head = heads, width // heads
        self.qkv, self.proj = LinearNorm(width, 3 * width), nn.Sequential(nn.Hardswish(), LinearNorm(width, width))

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, self.heads, -1)
        q, k, v = (part.permute(0, 2, 1, 3) for part in qkv.split([self.per_head] * 3, dim=3))
        weights = (q @ k.transpose(-2, -1) * self.per_head**-0.5).softmax(dim=-1)
        return x + self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Levit(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        sizes = {"stride": 2, "padding": 1}
        self.embed = nn.Sequential(*conv_norm(3, 4, 3, **sizes), nn.Hardswish(), *conv_norm(4, width, 3, **sizes))
        blocks = [(Attention(width, 2), LinearNorm(width, 2 * width), LinearNorm(2 * width, width)) for _ in range(3)]
        self.blocks = nn.Sequential(*(step for a, up, down in blocks for step in (a, Residual(up, nn.Hardswish(), down))))
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 4))

    def forward(self, x):
        return self.head(self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


class Tabular(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeds = nn.ModuleList([nn.Embedding(5, 3), nn.Embedding(4, 2)])
        self.bn_cont = nn.BatchNorm1d(6)
        widths = [11, 8, 8, 6]
        steps = [(nn.Linear(a, b), nn.ReLU(), nn.BatchNorm1d(b), nn.Dropout(0.1)) for a, b in pairwise(widths)]
        self.layers = nn.Sequential(*(step for each in steps for step in each), nn.Linear(6, 2))

    def forward(self, categories, numbers):
        parts = [embed(categories[:, number]) for number, embed in enumerate(self.embeds)]
        return self.layers(torch.cat([*parts, self.bn_cont(numbers)], 1))


class Tdnn(nn.Module):
    def __init__(self):
        super().__init__()
        convs = [(6, 5, 1), (8, 3, 2), (8, 3, 3), (8, 1, 1)]
        steps = [(nn.Conv1d(a, 8, kernel, dilation=dilation), nn.ReLU(), nn.BatchNorm1d(8)) for a, kernel, dilation in convs]
        self.steps, self.embedding = nn.Sequential(*(step for each in steps for step in each)), nn.Linear(16, 4)

    def forward(self, x):
        x = self.steps(x)
        mean = x.mean(2)
        deviation = ((x * x).mean(2) - mean * mean).clamp(min=1e-4).sqrt()
        return self.embedding(torch.cat([mean, deviation], 1))


class RepVGG(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.dense, self.point = conv_norm(width, width, 3, padding=1), conv_norm(width, width, 1)
        self.identity = nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(self.dense(x) + self.point(x) + self.identity(x))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.down3 = (nn.Sequential(*conv_norm(a, b, 3, padding=1), nn.ReLU()) for a, b in [(3, 4), (4, 8), (8, 8)])
        self.up2 = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2, groups=4, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.up1 = nn.Sequential(nn.ConvTranspose2d(16, 4, 2, 2, groups=2, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        one = self.down1(x)
        two = self.down2(self.pool(one))
        x = torch.cat([self.up2(self.down3(self.pool(two))), two], 1)
        return self.head(torch.cat([self.up1(x), one], 1))


class Dense(nn.Sequential):
    def forward(self, x):
        return torch.cat([x, super().forward(x)], 1)


def small_cnn():
    """A residual CNN."""
    return nn.Sequential(
        *(*conv_norm(3, 6, 3, stride=2, padding=1), nn.ReLU(), *conv_norm(6, 6, 3, padding=1, groups=6), nn.ReLU(), *conv_norm(6, 8, 1)),
        *(Residual(*conv_norm(8, 8, 3, padding=1), nn.ReLU(), *conv_norm(8, 8, 3, padding=1)), nn.ReLU()),
        Residual(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)),
    )


def repvgg():
    """RepVGG as it is trained."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), *(RepVGG() for _ in range(4)), *pooled(), nn.Linear(4, 4))


def resnet_v2():
    """Pre-activation blocks."""
    blocks = [Residual(*pre_activation(4, 4, 3, padding=1), *pre_activation(4, 4, 3, padding=1)) for _ in range(6)]
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), *blocks, nn.BatchNorm2d(4), nn.ReLU(), *pooled(), nn.Linear(4, 4))


def densenet_like():
    """Dense blocks and transitions."""
    width, steps = 4, [*conv_norm(3, 4, 3, stride=2, padding=1), nn.ReLU()]
    for block in range(3):
        steps += [Dense(*pre_activation(width + 2 * at, 4, 1), *pre_activation(4, 2, 3, padding=1)) for at in range(4)]
        width += 8
        if block < 2:
            steps += [*pre_activation(width, width // 2, 1), nn.AvgPool2d(2)]
            width //= 2
    return nn.Sequential(*steps, nn.BatchNorm2d(width), nn.ReLU(), *pooled(), nn.Linear(width, 4))


def torch_networks():
    """Return name -> (network, its inputs, the axes of each input that may be open)."""
    nets = {net.__name__: net() for net in (small_cnn, repvgg, resnet_v2, densenet_like)}
    image, open_image = (torch.randn(2, 3, 16, 16),), [{0: "batch", 2: "height", 3: "width"}]
    return {
        "small_cnn": (nets["small_cnn"], image, open_image),
        "levit_like": (Levit(), image, [{0: "batch"}]),
        "tabular_mlp": (Tabular(), (torch.zeros(2, 2, dtype=torch.int64), torch.randn(2, 6)), [{0: "batch"}, {0: "batch"}]),
        "tdnn": (Tdnn(), (torch.randn(2, 6, 20),), [{0: "batch", 2: "time"}]),
        "repvgg": (nets["repvgg"], image, open_image),
        "unet": (UNet(), image, [{0: "batch"}]),
        "resnet_v2": (nets["resnet_v2"], image, open_image),
        "densenet_like": (nets["densenet_like"], image, open_image),
    }
