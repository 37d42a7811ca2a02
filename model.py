"""Networks, each with its objective.

Axes: B batch, C channels, H height, W width, K classes. Images are float [B, C, H, W], logits are
[B, K]. Any piece here works alone: this file imports torch and the standard library only.

    model = build_model("efficientnet_b0", num_classes=10)
    loss = image_loss(model(images), labels) / len(labels)
"""

import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------ custom CNN


class ConvBlock(nn.Module):
    """3x3 convolution, optional 2x2 max pooling, BatchNorm, ReLU; [B, in, H, W] to [B, out, H', W'].

    Pooling stands before the normalisation: both orders train alike, and this one leaves a quarter
    of the elementwise work.
    """

    def __init__(self, in_channels, out_channels, pool=False, stride=1):
        super().__init__()
        kernel_size = 2 * stride + 1  # a stem that strides still sees every pixel
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, stride, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.pool = pool

    def forward(self, x):
        x = self.conv(x)
        return F.relu(self.bn(F.max_pool2d(x, 2) if self.pool else x))


class CustomCNN(nn.Module):
    """Residual CNN of 4.7M parameters in dense 3x3 convolutions, after ResNet-9 (Page, 2018).

    Input float [B, in_channels, H, W] with H, W >= 8 * stem_stride; output logits [B, num_classes].
    The stem's stride keeps the stages at about 32x32 whatever the image: 1 up to 47 px, 2 up to
    95 px, 4 above (`stem_stride_for`).
    """

    def __init__(self, num_classes, in_channels=3, stem_stride=1, widths=(64, 128, 256, 416)):
        super().__init__()
        a, b, c, d = widths
        self.stem = ConvBlock(in_channels, a, stride=stem_stride)
        self.stage1 = ConvBlock(a, b, pool=True)  # [B, b, 16, 16] for 32 px
        self.residual1 = nn.Sequential(ConvBlock(b, b), ConvBlock(b, b))
        self.stage2 = ConvBlock(b, c, pool=True)  # [B, c, 8, 8]
        self.stage3 = ConvBlock(c, d, pool=True)  # [B, d, 4, 4]
        self.residual3 = nn.Sequential(ConvBlock(d, d), ConvBlock(d, d))
        self.head = nn.Linear(d, num_classes)
        initialise(self)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        x = self.stage1(self.stem(x))
        x = x + self.residual1(x)
        x = self.stage3(self.stage2(x))
        x = x + self.residual3(x)
        return self.head(x.flatten(2).amax(2)) / 8  # [B, d, H, W] -> [B, d]; unscaled, SGD at 0.1 diverges


def stem_stride_for(image_size):
    """The stride of CustomCNN's stem for images of `image_size` px."""
    return 1 if image_size < 48 else 2 if image_size < 96 else 4


# ------------------------------------------------------------------------------- EfficientNet-B0

# Stages of table 1 in Tan & Le 2019 (arXiv:1905.11946): expansion, kernel, stride, out, repeats.
B0_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def conv_bn(in_channels, out_channels, kernel_size, stride=1, groups=1, activation=True):
    """Convolution and BatchNorm, then SiLU where `activation`; modules 0, 1, 2 as in torchvision."""
    padding = kernel_size // 2
    layers = [
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    return nn.Sequential(*layers, nn.SiLU()) if activation else nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    """Channel gates from the spatial mean: [B, C, H, W] to the same shape (Hu et al. 2018)."""

    def __init__(self, channels, squeeze_channels):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1)

    def forward(self, x):
        gate = self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True))))  # [B, C, 1, 1]
        return x * gate.sigmoid()


class MBConv(nn.Module):
    """Inverted residual with squeeze-excitation and row-wise stochastic depth (Huang et al. 2016)."""

    def __init__(self, in_channels, out_channels, expansion, kernel_size, stride, drop_probability):
        super().__init__()
        hidden = in_channels * expansion
        expand = [conv_bn(in_channels, hidden, 1)] if expansion > 1 else []
        self.block = nn.Sequential(
            *expand,
            conv_bn(hidden, hidden, kernel_size, stride, groups=hidden),
            SqueezeExcitation(hidden, in_channels // 4),
            conv_bn(hidden, out_channels, 1, activation=False),
        )
        self.residual = stride == 1 and in_channels == out_channels
        self.drop_probability = drop_probability

    def forward(self, x):
        y = self.block(x)
        if not self.residual:
            return y
        if self.training and self.drop_probability:
            keep = 1 - self.drop_probability
            y = y * (torch.empty(len(y), 1, 1, 1, dtype=y.dtype, device=y.device).bernoulli_(keep) / keep)
        return x + y


class EfficientNetB0(nn.Module):
    """EfficientNet-B0, 5,288,548 parameters with 1,000 classes, with torchvision's parameter names.

    Input float [B, in_channels, H, W], 32 px and up (224 in the paper); output logits
    [B, num_classes]. Stochastic depth rises linearly over the 16 blocks to `drop_path` * 15 / 16.
    """

    def __init__(self, num_classes, in_channels=3, dropout=0.2, drop_path=0.2):
        super().__init__()
        features, channels, block = [conv_bn(in_channels, 32, 3, 2)], 32, 0
        total_blocks = sum(repeats for *_, repeats in B0_STAGES)
        for expansion, kernel_size, stride, out_channels, repeats in B0_STAGES:
            stage = []
            for j in range(repeats):
                drop = drop_path * block / total_blocks
                stride_j = stride if j == 0 else 1
                stage.append(MBConv(channels, out_channels, expansion, kernel_size, stride_j, drop))
                channels, block = out_channels, block + 1
            features.append(nn.Sequential(*stage))
        self.features = nn.Sequential(*features, conv_bn(channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, num_classes))
        initialise(self)
        nn.init.zeros_(self.classifier[1].weight)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))  # [B, 1280, H/32, W/32] -> [B, K]


def initialise(model):
    """Draw convolution weights of `model` anew: normal by fan-out per group; biases zero.

    A depthwise convolution's fan-out is divided by its groups, as timm does and torchvision does
    not; heads are zeroed by their owner, so that the first loss is log(num_classes).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


def timm_to_torchvision(name):
    """The torchvision name of one tensor of timm's efficientnet_b0 state dict."""
    outer = {"conv_stem": "features.0.0", "bn1": "features.0.1", "conv_head": "features.8.0",
             "bn2": "features.8.1", "classifier": "classifier.1"}  # fmt: skip
    with_expansion = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "se.conv_reduce": "2.fc1",
                      "se.conv_expand": "2.fc2", "conv_pwl": "3.0", "bn3": "3.1"}  # fmt: skip
    first_stage = {"conv_dw": "0.0", "bn1": "0.1", "se.conv_reduce": "1.fc1", "se.conv_expand": "1.fc2",
                   "conv_pw": "2.0", "bn2": "2.1"}  # fmt: skip
    module, _, leaf = name.rpartition(".")
    found = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(.+)", module)
    if not found:
        return f"{outer.get(module, module)}.{leaf}"
    stage, j, inner = found.groups()
    inner = (with_expansion if int(stage) else first_stage).get(inner, inner)
    return f"features.{int(stage) + 1}.{j}.block.{inner}.{leaf}"


def load_backbone(model, weights):
    """Copy `weights` (a state dict: the kit's, torchvision's, or timm's for B0) into `model`.

    The head is kept new where the number of classes differs, and a stem for one channel takes the
    sum over the three of the weights. Everything else must fit: raises ValueError naming the first
    tensor that is missing, left over or of another shape.
    """
    own = model.state_dict()
    if "conv_stem.weight" in weights:
        weights = {timm_to_torchvision(name): tensor for name, tensor in weights.items()}
    weights = dict(weights)
    head = [name for name in ("head.weight", "head.bias", "classifier.1.weight", "classifier.1.bias") if name in own]
    if any(name in weights and weights[name].shape != own[name].shape for name in head):
        weights.update({name: own[name] for name in head})
    stem = next(iter(own))
    if stem in weights and own[stem].shape[1] == 1 < weights[stem].shape[1]:
        weights[stem] = weights[stem].sum(1, keepdim=True)  # [out, 3, k, k] -> [out, 1, k, k]
    check_state_dict(own, weights)
    model.load_state_dict(weights)


def check_state_dict(own, weights):
    """Raise ValueError, in one line, unless `weights` has the names and shapes of `own`."""
    for name in [*own, *weights]:
        if name not in weights:
            raise ValueError(f"{name} is missing in the weights; is this file for another model?")
        if name not in own:
            raise ValueError(f"{name} in the weights has no place in the model; is this file for another model?")
        if own[name].shape != weights[name].shape:
            has, needs = ("x".join(map(str, t[name].shape)) for t in (weights, own))
            raise ValueError(f"{name} is {has}, the model needs {needs}; is this file for another model?")


# ------------------------------------------------------------------------- objective and building


def image_loss(logits, labels, label_smoothing=0.0):
    """Cross-entropy summed over the batch: float [B, K] and int64 [B] to a float32 scalar."""
    return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)


MODELS = {"custom": CustomCNN, "efficientnet_b0": EfficientNetB0}


def build_model(name, num_classes, in_channels=3, **arguments):
    """A freshly initialised model from `MODELS`; `arguments` go to its constructor."""
    return MODELS[name](num_classes, in_channels, **arguments)


def parameter_groups(model, weight_decay):
    """Two optimizer groups: matrices and filters decay; biases and BatchNorm's scales do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decay, no_decay = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    assert len(decay) + len(no_decay) == len(trained), (len(decay), len(no_decay), len(trained))
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
