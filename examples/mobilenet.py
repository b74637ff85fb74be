"""A MobileNet without batch normalization: PyTorch to ONNX, folded and verified.

python examples/mobilenet.py        needs torch and onnxscript, fastbn[onnx]
"""

import logging
import warnings

import torch
from torch import nn

import fastbn


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

logging.getLogger("torch.onnx").setLevel(logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the exporter's own
    # Without its optimizer the exporter leaves every batch normalization to us.
    exported = torch.onnx.export(network, (torch.randn(1, 3, 32, 32),), dynamo=True, optimize=False, verbose=False)
result = fastbn.fold(exported.model_proto)
print(result)
assert result.parity.ok
assert not result.kept
result.save("mobilenet.onnx")
