"""A MobileNet without batch normalization: PyTorch in, PyTorch out, verified.

python examples/mobilenet.py        needs torch, onnx and onnxruntime
"""

import torch
from torch import nn

import fastbn.torch


def block(inside, expanded, outside, stride):
    """Return the layers of an inverted residual: expand, filter each channel, project."""
    return nn.Sequential(
        nn.Conv2d(inside, expanded, 1, bias=False),
        nn.BatchNorm2d(expanded),
        nn.ReLU6(),
        nn.Conv2d(expanded, expanded, 3, stride, 1, groups=expanded, bias=False),
        nn.BatchNorm2d(expanded),
        nn.ReLU6(),
        nn.Conv2d(expanded, outside, 1, bias=False),
        nn.BatchNorm2d(outside),
    )


class MobileNet(nn.Module):
    """A MobileNetV2 of three blocks, for images of 32x32."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.blocks = nn.ModuleList([block(16, 48, 24, 2), block(24, 72, 24, 1), block(24, 72, 32, 2)])
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.blocks:
            y = layer(x)
            x = x + y if x.shape == y.shape else y
        return self.head(x.mean((2, 3)))


torch.manual_seed(0)
network = MobileNet()
for _ in range(3):
    network(torch.randn(8, 3, 32, 32))  # running statistics, as training leaves them
network.eval()

images = torch.randn(2, 3, 32, 32)
result = fastbn.torch.fold(network, images)
print(result)
assert not result.kept
left = [name for name, module in result.model.named_modules() if isinstance(module, nn.BatchNorm2d)]
with torch.no_grad():
    before, after = network(images), result.model(images)
print(f"{len(left)} left, outputs differ by {(after - before).abs().max() / before.abs().max():.0e} of the largest")
torch.save(result.model.state_dict(), "mobilenet.pt")
