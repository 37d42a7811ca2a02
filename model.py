"""Networks, each with its objective.

Axes: B batch, C channels, H height, W width, K classes. Images are float [B, C, H, W], logits are
[B, K]. Any piece here works alone: this file imports torch and the standard library only.

    model = build_model("efficientnet_b0", num_classes=10)
    loss = image_loss(model(images), labels) / len(labels)

python model.py prints what each model needs of a GPU's memory.
"""

import contextlib
import math
import re
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------- activation checkpoints


def direct(stage, *inputs):
    """stage(*inputs): how a model runs its stages, unless its `run_stage` is set to `recomputed`."""
    return stage(*inputs)


def recomputed(stage, *inputs):
    """stage(*inputs), its activations not kept but computed again in the backward pass (Chen et al. 2016).

    The second pass draws the same random numbers and leaves BatchNorm's statistics as they were.
    """
    if not torch.is_grad_enabled():
        return stage(*inputs)
    second = lambda: (contextlib.nullcontext(), hold_buffers(stage))
    return checkpoint(stage, *inputs, use_reentrant=False, context_fn=second)


@contextlib.contextmanager
def hold_buffers(stage):
    """Buffers of the module `stage` (a bare function has none) leave the block as they entered it."""
    buffers = [buffer.data for buffer in getattr(stage, "buffers", tuple)()]  # .data: autograd counts no change
    held = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, old in zip(buffers, held):
            buffer.copy_(old)


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
    95 px, 4 above (`stem_stride_for`). `widths` are the channels of the stem and the three stages,
    `depths` the convolutions of each stage's residual part. With `whiten` the stem is what
    `whiten_stem` makes of the training images, and is not trained.
    """

    run_stage = staticmethod(direct)

    def __init__(self, num_classes, in_channels=3, stem_stride=1, widths=(64, 128, 256, 416), depths=(2, 0, 2),
                 whiten=False):  # fmt: skip
        super().__init__()
        a, b, c, d = widths
        residual = lambda width, depth: nn.Sequential(*(ConvBlock(width, width) for _ in range(depth)))
        kernel_size = 2 * stem_stride
        if whiten:  # eigenvectors and their negatives, as ReLU keeps one side of each
            a = min(a // 2, in_channels * kernel_size**2) * 2
            self.stem = nn.Sequential(nn.Conv2d(in_channels, a, kernel_size, stem_stride), nn.ReLU())
        else:
            self.stem = ConvBlock(in_channels, a, stride=stem_stride)
        self.stage1 = ConvBlock(a, b, pool=True)  # [B, b, 16, 16] for 32 px
        self.residual1 = residual(b, depths[0])
        self.stage2 = ConvBlock(b, c, pool=True)  # [B, c, 8, 8]
        self.residual2 = residual(c, depths[1])
        self.stage3 = ConvBlock(c, d, pool=True)  # [B, d, 4, 4]
        self.residual3 = residual(d, depths[2])
        self.head = nn.Linear(d, num_classes)
        initialise(self)
        nn.init.zeros_(self.head.weight)
        if whiten:
            self.stem[0].weight.requires_grad_(False)

    def forward(self, x):
        x = self.run_stage(self.stem, x)
        for stage, residual in ((self.stage1, self.residual1), (self.stage2, self.residual2),
                                (self.stage3, self.residual3)):  # fmt: skip
            x = self.run_stage(stage, x)
            x = x + self.run_stage(residual, x) if len(residual) else x
        return self.head(x.flatten(2).amax(2)) / 8  # [B, d, H, W] -> [B, d]; unscaled, SGD at 0.1 diverges


@torch.no_grad()
def whiten_stem(model, batches, eps=5e-4):
    """Mutates a CustomCNN built with `whiten`: its stem decorrelates the patches of batches float [B, C, H, W].

    Filters are the leading eigenvectors of the patches' second moments over the root of their
    eigenvalues, and their negatives (Page 2018; Jordan 2024, arXiv:2404.00498).
    """
    stem, moments, count = model.stem[0], 0, 0
    for images in batches:
        patches = F.unfold(images, stem.kernel_size, stride=stem.stride).mT.flatten(0, 1).double()  # [n, C * k * k]
        moments, count = moments + patches.T @ patches, count + len(patches)
    eigenvalues, vectors = torch.linalg.eigh(moments / count)  # ascending
    filters = (vectors / (eigenvalues + eps).sqrt()).T.flip(0)[: stem.out_channels // 2]
    stem.weight.copy_(torch.cat([filters, -filters]).view_as(stem.weight))


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


class Conv2d(nn.Conv2d):
    """nn.Conv2d, without bias, in the form that is fastest on a CPU; elsewhere as it is.

    Depthwise filters stay in float32, as 16 bits are slower even with AMX (forward and backward of a
    stride 2 over [16, 96, 64, 64]: 3 ms against 22). 1x1 filters are a product of matrices, which gives
    EfficientNet-B0 a quarter at 64 px.
    """

    tuned_on = ("cpu",)

    def forward(self, x):
        if x.device.type not in self.tuned_on:
            return super().forward(x)
        if self.kernel_size == (1, 1) and x.is_contiguous(memory_format=torch.channels_last):
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)
        if self.groups == 1:
            return super().forward(x)
        # taps further out than the map is wide meet padding alone: at 64 px the last stages take 3x3 of 5x5
        outer = max(0, self.padding[0] + 1 - max(x.shape[2:]))
        inner = slice(outer, self.kernel_size[0] - outer)
        with torch.autocast(x.device.type, enabled=False):
            x, weight = x.to(self.weight.dtype), self.weight[:, :, inner, inner]
            return F.conv2d(x, weight, None, self.stride, self.padding[0] - outer, 1, self.groups)


def conv_bn(in_channels, out_channels, kernel_size, stride=1, groups=1, activation=True):
    """Convolution and BatchNorm, then SiLU where `activation`; modules 0, 1, 2 as in torchvision."""
    padding = kernel_size // 2
    layers = [
        Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False),
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
        # the 1x1 convolutions as the products that they are: 0.6 ms less a block on two cores
        gate = F.silu(F.linear(x.mean((2, 3)), self.fc1.weight.flatten(1), self.fc1.bias))
        gate = F.linear(gate, self.fc2.weight.flatten(1), self.fc2.bias).sigmoid()
        return x * gate[:, :, None, None]


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

    run_stage = staticmethod(direct)

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
        for stage in self.features:
            for block in stage if isinstance(stage[0], MBConv) else [stage]:
                x = self.run_stage(block, x)
        return self.classifier(x.mean((2, 3)))  # [B, 1280, H/32, W/32] -> [B, K]


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


def load_backbone(model, weights, new_head=False):
    """Copy `weights` (a state dict: the kit's, torchvision's, or timm's for B0) into `model`.

    The head stays new where that is asked for or the number of classes differs, and a stem for one channel takes the
    sum over the three of the weights. Everything else must fit: raises ValueError naming the first
    tensor that is missing, left over or of another shape.
    """
    own = model.state_dict()
    if "conv_stem.weight" in weights:
        weights = {timm_to_torchvision(name): tensor for name, tensor in weights.items()}
    weights = dict(weights)
    head = [name for name in ("head.weight", "head.bias", "classifier.1.weight", "classifier.1.bias") if name in own]
    if new_head or any(name in weights and weights[name].shape != own[name].shape for name in head):
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


# ------------------------------------------------------------------------------------ Sudoku GNN


def sudoku_groups():
    """float [81, 81]: which cells lie in each group: 54 segments of three, then 18 lines, then 9 boxes.

    A segment is where a line meets a box: those of rows in the order (row, stack), then those of
    columns, (column, band). Lines are rows, then columns.
    """
    row, column = torch.arange(81) // 9, torch.arange(81) % 9
    segments = row * 3 + column // 3, 27 + column * 3 + row // 3
    groups = [*segments, 54 + row, 63 + column, 72 + row // 3 * 3 + column // 3]
    return sum(F.one_hot(group, 81) for group in groups).T.float()


class SudokuGNN(nn.Module):
    """Message passing over the 729 candidates (digit, cell) of a Sudoku, with weights shared over steps.

    Input uint8 [B, 81], 0 a blank; output logits float32 [S, B, 81, 9]: one step of S = 1 in eval mode,
    after `message_steps` of them, any number at run time; the last S = `grad_steps` in training, which
    come after 0 to `free_steps` steps without gradient, drawn at each call, so that what is learnt
    holds at any depth. A clue's logits are 0 for its digit and -1e4 for the rest.

    A candidate tells its groups by a log-sum-exp of learnt features, since one candidate of a group is
    true: the nine of its cell, and its digit's three in a segment, nine in a line and nine in a box.
    Segments see all three, so that they can tell that a digit of a box lies in one line. Weights know
    no digit and no place, and rows and columns share them, so the network is equivariant to every
    symmetry of Sudoku and needs no augmentation. The states are normalised after each step, so that
    they stay what they were in training at any depth.
    """

    run_stage = staticmethod(direct)

    def __init__(self, num_classes=9, in_channels=1, width=32, hidden=64, pooled=8, free_steps=24, grad_steps=6,
                 message_steps=64):  # fmt: skip
        super().__init__()
        assert num_classes == 9, num_classes
        self.free_steps, self.grad_steps, self.message_steps = free_steps, grad_steps, message_steps

        def matrix(fan_in, fan_out, gain=1.0):
            return nn.Parameter(torch.randn(fan_in, fan_out) * gain * fan_in**-0.5)

        def bias(fan_out):
            return nn.Parameter(torch.zeros(fan_out))

        self.embedding = nn.Parameter(torch.randn(3, width) / 2)  # open, clue, other digit than the clue
        self.pool = matrix(width, pooled)
        self.segment_in, self.line_in, self.box_in = (matrix(pooled, hidden) for _ in range(3))
        self.segment_bias, self.segment_out = bias(hidden), matrix(hidden, hidden)
        self.cell_in, self.cell_bias, self.cell_out = matrix(pooled, hidden), bias(hidden), matrix(hidden, hidden)
        self.node_in, self.node_bias, self.node_out = matrix(width, hidden), bias(hidden), matrix(hidden, width, 0.3)
        self.head = nn.Parameter(torch.zeros(width))
        self.register_buffer("groups", sudoku_groups(), persistent=False)

    def forward(self, puzzles):
        device = puzzles.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.head.dtype
        with torch.autocast(device, enabled=False):
            w = {name: p.to(dtype) for name, p in self.named_parameters()}
            gather = self.groups.to(dtype).expand(9, 81, 81)
            spread = gather[:, :54].mT.contiguous()
            clue = puzzles.long().T[None] - torch.arange(1, 10, device=puzzles.device)[:, None, None]  # [9, 81, B]
            given = (puzzles > 0).T.expand(9, -1, -1)  # len() would fix the batch in torch.export
            embedded = F.embedding(torch.where(given, 1 + (clue != 0), 0), w["embedding"])  # [9, 81, B, H]
            x = F.layer_norm(embedded, embedded.shape[-1:])
            free = int(torch.randint(self.free_steps + 1, ())) if self.training else self.message_steps - 1
            with torch.no_grad():
                for _ in range(free):
                    x = self.message_step(x, embedded, w, gather, spread)
            logits = []
            for _ in range(self.grad_steps if self.training else 1):
                x = self.run_stage(self.message_step, x, embedded, w, gather, spread)
                logits.append((x @ w["head"]).float())
            logits = torch.stack(logits)  # [S, 9, 81, B]
            known = torch.where(clue == 0, 0.0, -1e4)
            return torch.where(given, known, logits).permute(0, 3, 2, 1)

    def message_step(self, x, embedded, w, gather, spread):
        """One round of messages: states [9, 81, B, H] to the same shape. `w` holds the weights in their dtype."""
        _, _, boards, width = x.shape
        hidden, pooled = w["node_in"].shape[1], w["pool"].shape[1]
        q = (x @ w["pool"]).clamp(-10.0, 8.8).exp()  # [9, 81, B, Q]; nine of e^8.8 fit in fp16
        groups = (gather @ q.view(9, 81, -1)).log().view(9, 81, boards, pooled)  # log-sum-exp
        segment, line, box = groups.split((54, 18, 9), 1)
        # what a segment makes of itself, its line and its box
        segment, line, box = segment @ w["segment_in"], line @ w["line_in"], box @ w["box_in"] + w["segment_bias"]
        box = box.view(9, 3, 3, boards, hidden)  # digit, band, stack
        segment = segment.view(9, 2, 3, 3, 3, boards, hidden) + line.view(9, 2, 3, 3, 1, boards, hidden)
        segment = segment + torch.stack([box, box.transpose(1, 2)], 1)[:, :, :, None]
        segment = segment.relu_().view(-1, hidden) @ w["segment_out"]
        cell = torch.addmm(w["cell_bias"], q.sum(0).log().view(-1, pooled), w["cell_in"]).relu_()
        cell = torch.addmm(w["node_bias"], cell, w["cell_out"])  # [81 B, K]
        # each candidate: its cell, its two segments, itself
        node = torch.baddbmm(cell.view(1, 81, -1), spread, segment.view(9, 54, -1))
        node = torch.addmm(node.view(-1, hidden), x.view(-1, width), w["node_in"]).relu_()
        x = torch.addmm((x + embedded).view(-1, width), node, w["node_out"])
        return F.layer_norm(x, (width,)).view_as(embedded)


# ------------------------------------------------------------------------- objective and building


def image_loss(logits, labels, label_smoothing=0.0, focal_gamma=0.0):
    """Cross-entropy summed over the batch, of float [B, K] and int64 [B], or shares float [B, K], to a float32 scalar.

    `focal_gamma` weighs each class's share of the target by (1 - p)^gamma (Lin et al. 2017).
    """
    if not focal_gamma:
        return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
    log_p, classes = F.log_softmax(logits.float(), -1), logits.shape[-1]
    shares = labels if labels.is_floating_point() else F.one_hot(labels, classes)
    shares = (1 - label_smoothing) * shares + label_smoothing / classes
    return -(shares * focus(log_p, focal_gamma) * log_p).sum()


def focus(log_p, gamma):
    """(1 - p)^gamma, with a finite gradient also at p = 1 and gamma below 1."""
    return (-torch.expm1(log_p)).clamp(min=1e-6) ** gamma


def sudoku_loss(logits, answers, focal_gamma=0.0, constraint_weight=0.0):
    """Loss of every step, averaged over the steps, summed over the blanks: a float32 scalar.

    Logits float [S, B, 81, 9] as `SudokuGNN` gives them; answers integer [B, 81], the digit of a blank
    and 0 for a clue. `focal_gamma` weighs each blank by (1 - p)^gamma (Lin et al. 2017). To it
    comes `constraint_weight` times the expected violations (`expected_violations`).
    """
    blank = answers > 0
    log_p = F.log_softmax(logits.float(), -1)
    target = (answers.long() - 1).clamp(min=0).expand(logits.shape[:-1])
    log_p_true = log_p.gather(-1, target[..., None])[..., 0]  # [S, B, 81]
    loss = -((focus(log_p_true, focal_gamma) if focal_gamma else 1.0) * log_p_true * blank).sum()
    if constraint_weight:
        loss = loss + constraint_weight * expected_violations(log_p.exp()).sum()
    return loss / len(logits)


def expected_violations(p):
    """float [...]: digits expected to be missing in the 27 units of boards drawn from p [..., 81, 9], cell by cell."""
    missing = torch.log1p(-p.clamp(max=1 - 1e-6)).unflatten(-2, (9, 9))  # [..., 9 rows, 9 columns, 9 digits]
    boxes = missing.unflatten(-2, (3, 3)).unflatten(-4, (3, 3)).sum((-4, -2))  # [..., 3 bands, 3 stacks, 9]
    return sum(part.exp().flatten(-2).sum(-1) for part in (missing.sum(-2), missing.sum(-3), boxes.flatten(-3, -2)))


class Deployed(nn.Module):
    """A model with what stands before and after it: raw bytes in, probabilities float32 out.

    Images uint8 [B, H, W, C] at the size it was trained on give [B, K]; puzzles uint8 [B, 81] give [B, 81, 9].
    """

    def __init__(self, model, mean, std):
        super().__init__()
        self.model = model
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None] * 255)

    def forward(self, inputs):
        if inputs.ndim == 2:
            return self.model(inputs)[-1].float().softmax(-1)
        x = (inputs.permute(0, 3, 1, 2).float() - self.mean) / self.std
        return self.model(x).float().softmax(-1)


MODELS = {"custom": CustomCNN, "efficientnet_b0": EfficientNetB0, "sudoku_gnn": SudokuGNN}


def build_model(name, num_classes, in_channels=3, **arguments):
    """A freshly initialised model from `MODELS`; `arguments` go to its constructor."""
    return MODELS[name](num_classes, in_channels, **arguments)


def parameter_groups(model, weight_decay):
    """Two optimizer groups: matrices and filters decay; embeddings, biases and BatchNorm's scales do not."""
    trained = [(p.ndim >= 2 and "embedding" not in name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay, no_decay = [p for decays, p in trained if decays], [p for decays, p in trained if not decays]
    assert len(decay) + len(no_decay) == len(trained), (len(decay), len(no_decay), len(trained))
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


# ------------------------------------------------------------------------------------------ memory


def activation_bytes(model, inputs):
    """Bytes that autograd keeps from model(inputs) to its backward pass, parameters not counted.

    Of a model whose stages are `recomputed`: with the largest stage, which the backward pass holds
    again. Call it under the autocast of training.
    """
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}

    def trace(run_stage):
        kept, stages = {}, [0]

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        def run(stage, *arguments):
            before = sum(kept.values())
            outputs = run_stage(stage, *arguments)
            stages.append(sum(kept.values()) - before)
            return outputs

        model.run_stage = run
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = model(inputs)  # noqa: F841 holds the graph, so that no storage's place is taken anew
        return sum(kept.values()), max(stages)

    chosen = getattr(model, "run_stage", direct)
    try:
        with hold_buffers(model), torch.random.fork_rng([inputs.device] if inputs.device.type == "cuda" else []):
            total, largest = trace(direct)
            return trace(recomputed)[0] + largest if chosen is recomputed else total
    finally:
        model.run_stage = chosen


def estimate_memory(model, example, moments=2, ema=False):
    """{"weights", "gradients", "optimizer", "ema", "once", "sample"}: bytes that training will hold.

    `example` are at least four inputs; `moments` the optimizer's tensors a weight (2 AdamW, 1 SGD or
    Muon). "once" and "sample" are activations, whatever the batch and for each of its samples.
    """
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert len(example) >= 4, len(example)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    few, more = activation_bytes(model, example[:2]), activation_bytes(model, example[:4])
    sample = (more - few) // 2
    return {"weights": weights, "gradients": trained, "optimizer": moments * trained, "ema": ema * weights,
            "once": few - 2 * sample, "sample": sample}  # fmt: skip


def largest_batch(memory, memory_gb):
    """The batch that fits a GPU of memory_gb by `estimate_memory`'s dict, 0 where none does.

    A tenth of the card and 0.5 GiB (context, kernels) stay free; a sample takes a tenth more while
    gradients pass.
    """
    fixed = sum(size for name, size in memory.items() if name != "sample")
    return max(0, int(((0.9 * memory_gb - 0.5) * 2**30 - fixed) / (1.1 * memory["sample"])))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(f"error: model.py takes no arguments, got {sys.argv[1]!r}; leave them out", file=sys.stderr)
        sys.exit(2)
    Conv2d.tuned_on = ()  # as on a GPU
    torch.manual_seed(0)
    print("MiB with AdamW and EMA: weights, gradients, optimizer, EMA; activations a sample; the batch that fits in")
    rows = [("custom", 32), ("custom", 128), ("efficientnet_b0", 64), ("efficientnet_b0", 224), ("sudoku_gnn", 0)]
    for name, size in rows:
        example = torch.zeros(4, 3, size, size) if size else torch.zeros(4, 81, dtype=torch.uint8)
        for dtype, recompute in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
            arguments = {"stem_stride": stem_stride_for(size)} if name == "custom" else {}
            model = build_model(name, 10 if size else 9, **arguments)
            model.run_stage = recomputed if recompute else direct
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                memory = estimate_memory(model.to(memory_format=torch.channels_last), example, ema=True)
            fixed = ", ".join(f"{memory[part] / 2**20:.1f}" for part in ("weights", "gradients", "optimizer", "ema"))
            batches = ", ".join(f"{largest_batch(memory, gb):,} in {gb} GB" for gb in (4, 6, 8))
            what = f"{name} {size or ''} {str(dtype)[6:]}{' --checkpoint_activations' * recompute}"
            print(f"{what:56} {fixed:24} {memory['sample'] / 2**20:6.2f}   {batches}")
