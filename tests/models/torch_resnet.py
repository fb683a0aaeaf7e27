"""ResNet and DeepLabV2 written plainly in PyTorch, under the names of torchvision and OpenMMLab."""

import torch
from torch import nn


class Bottleneck(nn.Module):
    def __init__(self, before, planes, stride, dilation):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.downsample = None
        if stride > 1 or before != 4 * planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
            )

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    """`stem` is "plain" (torchvision), "timm" or "mmseg" (the deep one under their names)."""

    def __init__(self, layers, width, stem="plain", classes=0, strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1)):
        super().__init__()
        half = width // 2

        def conv(before, after, size=3, stride=1):
            return nn.Conv2d(before, after, size, stride, size // 2, bias=False)

        def norm_act(channels):
            return nn.BatchNorm2d(channels), nn.ReLU()

        deep = [conv(3, half, 3, 2), *norm_act(half), conv(half, half), *norm_act(half), conv(half, width)]
        if stem == "mmseg":
            self.stem = nn.Sequential(*deep, *norm_act(width))
        else:
            self.conv1 = conv(3, width, 7, 2) if stem == "plain" else nn.Sequential(*deep)
            self.bn1 = nn.BatchNorm2d(width)
        before = width
        for index, (depth, stride, dilation) in enumerate(zip(layers, strides, dilations, strict=True)):
            planes = width * 2**index
            blocks = [Bottleneck(before, planes, stride, dilation // 2 if dilation > 1 else 1)]
            blocks += [Bottleneck(4 * planes, planes, 1, dilation) for _ in range(depth - 1)]
            setattr(self, f"layer{index + 1}", nn.Sequential(*blocks))
            before = 4 * planes
        if classes:
            self.fc = nn.Linear(before, classes)

    def stages(self, x):
        x = self.stem(x) if hasattr(self, "stem") else self.bn1(self.conv1(x)).relu()
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x):
        return self.fc(self.stages(x)[-1].mean((2, 3)))


class Branch(nn.Module):
    def __init__(self, before, classes, rate):
        super().__init__()
        self.conv = nn.Conv2d(before, classes, 3, padding=rate, dilation=rate)


class DeepLabV2(nn.Module):
    def __init__(self, layers, width, stem, classes, rates):
        super().__init__()
        self.backbone = ResNet(layers, width, stem, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
        self.decode_head = nn.Module()
        self.decode_head.aspp_modules = nn.ModuleList(Branch(32 * width, classes, rate) for rate in rates)

    def forward(self, x):
        x = self.backbone.stages(x)[-1]
        return torch.stack([branch.conv(x) for branch in self.decode_head.aspp_modules]).sum(0)
