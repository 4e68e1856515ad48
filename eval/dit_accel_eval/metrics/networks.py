"""The networks whose features metrics compare, as functions of their weights: AlexNet, VGG16, EfficientNet-Lite0.

Sources: Krizhevsky 2014; Simonyan and Zisserman 2015; the Lite variants of EfficientNet (Tan and Le 2019) without
squeeze-and-excitation and with ReLU6. Weights are those of `weights`.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from .weights import Tensors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's mean and deviation by colour."""

ALEX = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))
"""Stride and padding of AlexNet's convolutions; before the second and the third lies a pool."""

VGG = (2, 2, 3, 3, 3)
"""Convolutions of VGG16's stages, between which lie pools."""

LITE = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3))  # fmt: skip
"""Stages of EfficientNet-Lite0: expansion, channels, blocks, stride of the first, kernel."""

NORM_EPS = 1e-3
"""Epsilon of EfficientNet's normalization."""


def normalized(frames: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """Return frames [F, 3, height, width] less a mean, over a deviation by colour."""
    return (frames - frames.new_tensor(mean)[:, None, None]) / frames.new_tensor(std)[:, None, None]


def alexnet(x: Tensor, weights: Tensors) -> list[Tensor]:
    """Return what AlexNet's five convolutions give, after their ReLU."""
    found = []
    for number, (stride, padding) in enumerate(ALEX):
        if number in (1, 2):
            x = F.max_pool2d(x, 3, 2)
        x = F.relu(_convolved(x, weights, number, stride=stride, padding=padding))
        found.append(x)
    return found


def vgg16(x: Tensor, weights: Tensors, pool: Callable[[Tensor], Tensor] = lambda x: F.max_pool2d(x, 2)) -> list[Tensor]:
    """Return what VGG16's five stages give; ``pool`` lies between them."""
    found, number = [], 0
    for stage, count in enumerate(VGG):
        if stage:
            x = pool(x)
        for _ in range(count):
            x = F.relu(_convolved(x, weights, number, padding=1))
            number += 1
        found.append(x)
    return found


def _convolved(x: Tensor, weights: Tensors, number: int, **options: int) -> Tensor:
    return F.conv2d(x, weights[f"conv.{number}.weight"], weights[f"conv.{number}.bias"], **options)  # type: ignore[arg-type]


def efficientnet_lite0(x: Tensor, weights: Tensors) -> Tensor:
    """Return EfficientNet-Lite0's pooled features [F, 1280] of normalized frames [F, 3, height, width]."""
    x = _lite(x, weights, "_conv_stem", "_bn0", stride=2)
    block = 0
    for expansion, channels, blocks, first_stride, _ in LITE:
        for number in range(blocks):
            at, before = f"_blocks.{block}.", x
            stride = first_stride if number == 0 else 1
            if expansion > 1:
                x = _lite(x, weights, f"{at}_expand_conv", f"{at}_bn0")
            x = _lite(x, weights, f"{at}_depthwise_conv", f"{at}_bn1", stride=stride, groups=x.shape[1])
            x = _lite(x, weights, f"{at}_project_conv", f"{at}_bn2", active=False)
            if stride == 1 and before.shape[1] == channels:
                x = x + before
            block += 1
    return _lite(x, weights, "_conv_head", "_bn1").mean((2, 3))


def _lite(
    x: Tensor, weights: Tensors, name: str, norm: str, *, stride: int = 1, groups: int = 1, active: bool = True
) -> Tensor:
    """Return a convolution, padded so that its size is the input's over the stride, normalized, with ReLU6."""
    kernel = weights[f"{name}.weight"]
    size = kernel.shape[-1]
    down, right = (max((-(-length // stride) - 1) * stride + size - length, 0) for length in x.shape[2:])
    x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
    x = F.conv2d(x, kernel, None, stride=stride, groups=groups)
    running = (weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"])
    x = F.batch_norm(x, *running, weights[f"{norm}.weight"], weights[f"{norm}.bias"], eps=NORM_EPS)
    return F.relu6(x) if active else x
