"""Networks, with their losses and optimizers.

Axes: B batch, C channels, H height, W width, K classes. Images are float [B, C, H, W], logits are
[B, K]. Each part works alone: this file imports torch and the standard library only.

    model = build_model("efficientnet_b0", num_classes=10)
    loss = image_loss(model(images), labels) / len(labels)
    optimizer = build_optimizer(model, "muon", 0.005, 0.05, 0.9, images.device)
"""

import contextlib
import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def direct(stage, *inputs):
    """stage(*inputs): how models run their stages unless `run_stage` is set to `recomputed`."""
    return stage(*inputs)


def recomputed(stage, *inputs):
    """stage(*inputs), its activations recomputed in the backward pass (Chen et al. 2016).

    The second pass draws the same random numbers and leaves BatchNorm's statistics unchanged.
    """
    if not torch.is_grad_enabled():
        return stage(*inputs)
    contexts = lambda: (contextlib.nullcontext(), hold_buffers(stage))  # first pass, second pass
    return checkpoint(stage, *inputs, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def hold_buffers(stage):
    """Context that restores the buffers of the module `stage` at its end; a function has none."""
    buffers = [buffer.data for buffer in getattr(stage, "buffers", tuple)()]  # unseen by autograd
    copies = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, copy in zip(buffers, copies):
            buffer.copy_(copy)


# ------------------------------------------------------------------------------------ custom CNN


def check_integers(low, high, count=None, **arguments):
    """Raise ValueError unless each argument is an integer in [low, high], or `count` of them."""
    for name, value in arguments.items():
        several = isinstance(value, (list, tuple))
        good = [type(n) is int and low <= n <= high for n in (value if several else [value])]
        if several != bool(count) or good != [True] * (count or 1):
            kind = f"{count} integers" if count else "an integer"
            raise ValueError(f"{name}: must be {kind} from {low} to {high}, got {value!r}")


class ConvBlock(nn.Module):
    """3x3 convolution, 2x2 max pooling if `pool`, BatchNorm and ReLU of [B, in_channels, H, W]."""

    def __init__(self, in_channels, out_channels, pool=False, stride=1):
        super().__init__()
        kernel_size = 2 * stride + 1  # a stem with a stride still sees every pixel
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, stride, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.pool = pool

    def forward(self, x):
        x = self.conv(x)
        if self.pool:  # before BatchNorm: as accurate, with a quarter of the elementwise work
            x = F.max_pool2d(x, 2)
        return F.relu(self.bn(x))


class CustomCNN(nn.Module):
    """Residual CNN of 4.7M parameters in dense 3x3 convolutions, after ResNet-9 (Page 2018).

    Input float [B, in_channels, H, W] with H, W >= 9 * stem_stride; output logits [B, num_classes].
    The stem's stride keeps the stages at about 32x32 for any image size (`stem_stride_for`).
    `widths` are the channels of the stem and the stages, `depths` the convolutions of the stages'
    residual parts. At 32 px, stem and stages take 1, 28, 50 and 104 million multiply-adds: width is
    cheap where maps are small. With `whiten`, `whiten_stem` sets the stem's filters, which are not
    trained. ValueError for arguments out of range.
    """

    run_stage = staticmethod(direct)

    def __init__(self, num_classes, in_channels=3, stem_stride=1, widths=(32, 64, 192, 440),
                 depths=(1, 1, 2), whiten=False):
        super().__init__()
        check_integers(1, 4, stem_stride=stem_stride)
        check_integers(2, 9999, count=4, widths=widths)
        check_integers(0, 9999, count=3, depths=depths)
        a, b, c, d = widths
        residual = lambda n, depth: nn.Sequential(*(ConvBlock(n, n) for _ in range(depth)))
        if whiten:
            side = 2 * stem_stride
            # eigenvectors and their negatives, because ReLU keeps only one sign of each
            a = min(a // 2, in_channels * side**2) * 2
            self.stem = nn.Sequential(nn.Conv2d(in_channels, a, side, stem_stride), nn.ReLU())
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
        residuals = (self.residual1, self.residual2, self.residual3)
        for stage, residual in zip((self.stage1, self.stage2, self.stage3), residuals):
            x = self.run_stage(stage, x)
            if len(residual):
                x = x + self.run_stage(residual, x)
        # [B, d, H, W] -> [B, d] -> [B, K]; without the 8, SGD at a rate of 0.1 diverges
        return self.head(x.flatten(2).amax(2)) / 8


@torch.no_grad()
def whiten_stem(model, batches, eps=5e-4):
    """Mutates a CustomCNN built with `whiten`: its stem decorrelates patches of float [B, C, H, W].

    The filters are the leading eigenvectors of the patches' second moments over the square roots of
    their eigenvalues, and the negatives of these (Page 2018; Jordan 2024, arXiv:2404.00498).
    """
    stem, moments, count = model.stem[0], 0, 0
    for images in batches:
        patches = F.unfold(images, stem.kernel_size, stride=stem.stride)  # [B, C * k * k, patches]
        patches = patches.mT.flatten(0, 1).double()  # [B * patches, C * k * k]
        moments += patches.T @ patches
        count += len(patches)
    eigenvalues, vectors = torch.linalg.eigh(moments / count)  # ascending
    filters = (vectors / (eigenvalues + eps).sqrt()).T.flip(0)[: stem.out_channels // 2]
    stem.weight.copy_(torch.cat([filters, -filters]).view_as(stem.weight))


def stem_stride_for(image_size):
    """The stride of CustomCNN's stem: 1 below 48 px, 2 below 96 px, 4 above."""
    return 1 if image_size < 48 else 2 if image_size < 96 else 4


# ------------------------------------------------------------------------------- EfficientNet-B0

# Stages of table 1 in Tan & Le 2019 (arXiv:1905.11946): expansion, kernel, stride, out, repeats.
B0_STAGES = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
)


class Conv2d(nn.Conv2d):
    """nn.Conv2d without bias, in the form that is fastest on a CPU, on the devices in `tuned_on`.

    Depthwise filters run in float32, because 16 bits are slower even with AMX (stride 2 over
    [16, 96, 64, 64], forward and backward: 22 ms against 3). 1x1 filters run as a matrix product,
    which makes EfficientNet-B0 a quarter faster at 64 px.
    """

    tuned_on = ("cpu",)

    def forward(self, x):
        if x.device.type not in self.tuned_on:
            return super().forward(x)
        if self.kernel_size == (1, 1) and x.is_contiguous(memory_format=torch.channels_last):
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)
        if self.groups == 1:
            return super().forward(x)
        # Outer taps see only padding on small maps: at 64 px the last stages use 3x3 of 5x5.
        outer = max(0, self.padding[0] + 1 - max(x.shape[2:]))
        inner = slice(outer, self.kernel_size[0] - outer)
        with torch.autocast(x.device.type, enabled=False):
            x, weight = x.to(self.weight.dtype), self.weight[:, :, inner, inner]
            return F.conv2d(x, weight, None, self.stride, self.padding[0] - outer, 1, self.groups)


def conv_bn(in_channels, out_channels, kernel_size, stride=1, groups=1, activation=True):
    """Convolution, BatchNorm and, if `activation`, SiLU: modules 0, 1, 2 as in torchvision."""
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
        # The 1x1 convolutions run as matrix products: 0.6 ms less per block on two cores.
        gate = F.silu(F.linear(x.mean((2, 3)), self.fc1.weight.flatten(1), self.fc1.bias))
        gate = F.linear(gate, self.fc2.weight.flatten(1), self.fc2.bias).sigmoid()
        return x * gate[:, :, None, None]


class MBConv(nn.Module):
    """Inverted residual with squeeze-excitation and stochastic depth by row (Huang et al. 2016)."""

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
        if self.residual and self.training and self.drop_probability:
            keep = 1 - self.drop_probability
            kept = torch.empty(len(y), 1, 1, 1, dtype=y.dtype, device=y.device).bernoulli_(keep)
            y = y * (kept / keep)
        return x + y if self.residual else y


class EfficientNetB0(nn.Module):
    """EfficientNet-B0, 5,288,548 parameters with 1,000 classes, with torchvision's parameter names.

    Input float [B, in_channels, H, W] of 32 px or more (224 in the paper); output [B, num_classes].
    Stochastic depth rises linearly over the 16 blocks to `drop_path` * 15 / 16.
    """

    run_stage = staticmethod(direct)

    def __init__(self, num_classes, in_channels=3, dropout=0.2, drop_path=0.2):
        super().__init__()
        for name, value in (("dropout", dropout), ("drop_path", drop_path)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: must be at least 0 and below 1, got {value!r}")
        features, channels, block = [conv_bn(in_channels, 32, 3, 2)], 32, 0
        for expansion, kernel_size, stride, out_channels, repeats in B0_STAGES:
            stage = []
            for _ in range(repeats):
                drop = drop_path * block / 16  # blocks in all
                stage.append(MBConv(channels, out_channels, expansion, kernel_size, stride, drop))
                channels, stride, block = out_channels, 1, block + 1
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
    """Mutates `model`: filters get std sqrt(2 / fan-out per group), as in timm, biases are zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


def official_weights():
    """The state dict of torchvision's EfficientNet-B0 from torch.hub; ValueError if that fails."""
    url = "https://download.pytorch.org/models/efficientnet_b0_rwightman-7f5810bc.pth"
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, or another hash
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"official weights cannot be fetched ({why}); fetch {url} and give "
                         "--pretrained FILE, or train --model custom without --config") from None


def timm_to_torchvision(name):
    """The name in torchvision's efficientnet_b0 of a tensor of timm's efficientnet_b0."""
    outer = {"conv_stem": "features.0.0", "bn1": "features.0.1", "conv_head": "features.8.0",
             "bn2": "features.8.1", "classifier": "classifier.1"}
    first_stage = {"conv_dw": "0.0", "bn1": "0.1", "se.conv_reduce": "1.fc1",
                   "se.conv_expand": "1.fc2", "conv_pw": "2.0", "bn2": "2.1"}
    later_stages = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1",
                    "se.conv_reduce": "2.fc1", "se.conv_expand": "2.fc2",
                    "conv_pwl": "3.0", "bn3": "3.1"}
    module, _, leaf = name.rpartition(".")
    match = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(.+)", module)
    if not match:
        return f"{outer.get(module, module)}.{leaf}"
    stage, block, inner = match.groups()
    inner = (later_stages if int(stage) else first_stage).get(inner, inner)
    return f"features.{int(stage) + 1}.{block}.block.{inner}.{leaf}"


def load_backbone(model, weights, new_head=False):
    """Mutates `model`: copies `weights`, a state dict of this kit, torchvision or timm (B0 alone).

    The head stays new with `new_head` or if the number of classes differs; a stem for one channel
    gets the weights' sum over channels. ValueError if any other tensor does not fit.
    """
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise ValueError("holds no weights; give another file")
    own = model.state_dict()
    if "conv_stem.weight" in weights:
        weights = {timm_to_torchvision(name): tensor for name, tensor in weights.items()}
    weights = dict(weights)
    heads = {"head.weight", "head.bias", "classifier.1.weight", "classifier.1.bias"} & own.keys()
    if new_head or any(own[name].shape != weights.get(name, own[name]).shape for name in heads):
        weights.update({name: own[name] for name in heads})
    stem = next(iter(own))
    if stem in weights and own[stem].shape[1] == 1 < weights[stem].shape[1]:
        weights[stem] = weights[stem].sum(1, keepdim=True)  # [out, 3, k, k] -> [out, 1, k, k]
    check_state_dict(own, weights)
    model.load_state_dict(weights)


def check_state_dict(own, weights):
    """Raise ValueError, in one line, unless `weights` has the names and shapes of `own`."""
    advice = "is this file for another model?"
    for name in [*own, *weights]:
        if name not in weights:
            raise ValueError(f"{name} is missing in the weights; {advice}")
        if name not in own:
            raise ValueError(f"{name} in the weights has no place in the model; {advice}")
        if own[name].shape != weights[name].shape:
            has, needs = ("x".join(map(str, state[name].shape)) for state in (weights, own))
            raise ValueError(f"{name} is {has}, the model needs {needs}; {advice}")


# ------------------------------------------------------------------------------------ Sudoku GNN


def sudoku_groups():
    """float [81, 81]: 1 where a cell lies in a group: 54 segments, then 18 lines, then 9 boxes.

    A segment is the three cells where a line meets a box. Rows come before columns; the segments of
    rows are ordered by (row, stack), those of columns by (column, band).
    """
    row, column = torch.arange(81) // 9, torch.arange(81) % 9
    segments = [row * 3 + column // 3, 27 + column * 3 + row // 3]
    groups = [*segments, 54 + row, 63 + column, 72 + row // 3 * 3 + column // 3]
    return sum(F.one_hot(group, 81) for group in groups).T.float()


class SudokuGNN(nn.Module):
    """Message passing between the 729 candidates (digit, cell) of a Sudoku.

    Input uint8 [B, 81], 0 for a blank; output logits float32 [S, B, 81, 9], where a clue has 0 for
    its digit and -1e4 for the others. In eval mode S = 1, after `message_steps` steps, which may be
    changed at run time. In training S = `grad_steps`, after a random number of up to `free_steps`
    steps without gradient, so that the network works at any depth. Each step normalises the states.

    A candidate sends its groups a log-sum-exp of learnt features, because one candidate of a group
    is true: of its cell's nine, and of its digit's three in a segment, nine in a line or a box. A
    segment reads its line and box, so it can tell that a digit of a box lies in one line. Weights
    are shared over steps, digits, cells, and by rows and columns, so the network is equivariant to
    every symmetry of Sudoku and needs no augmentation. ValueError for arguments out of range.
    """

    run_stage = staticmethod(direct)

    def __init__(self, num_classes=9, in_channels=1, width=32, hidden=64, pooled=8, free_steps=24,
                 grad_steps=6, message_steps=64):
        super().__init__()
        assert num_classes == 9, num_classes
        check_integers(1, 1024, width=width, hidden=hidden, pooled=pooled)
        check_integers(0, 10_000, free_steps=free_steps)
        check_integers(1, 10_000, grad_steps=grad_steps, message_steps=message_steps)
        self.free_steps, self.grad_steps, self.message_steps = free_steps, grad_steps, message_steps
        matrix = lambda n, m, gain=1.0: nn.Parameter(torch.randn(n, m) * gain * n**-0.5)
        bias = lambda n: nn.Parameter(torch.zeros(n))
        self.embedding = nn.Parameter(torch.randn(3, width) / 2)  # open, the clue, not the clue
        self.pool = matrix(width, pooled)
        self.segment_in, self.line_in, self.box_in = (matrix(pooled, hidden) for _ in range(3))
        self.segment_bias, self.segment_out = bias(hidden), matrix(hidden, hidden)
        self.cell_in, self.cell_bias = matrix(pooled, hidden), bias(hidden)
        self.cell_out, self.node_in = matrix(hidden, hidden), matrix(width, hidden)
        self.node_bias, self.node_out = bias(hidden), matrix(hidden, width, 0.3)
        self.head = nn.Parameter(torch.zeros(width))
        self.register_buffer("groups", sudoku_groups(), persistent=False)

    def forward(self, puzzles):
        device = puzzles.device.type
        dtype = self.head.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            w = {name: p.to(dtype) for name, p in self.named_parameters()}
            gather = self.groups.to(dtype).expand(9, 81, 81)
            spread = gather[:, :54].mT.contiguous()
            digits = torch.arange(1, 10, device=puzzles.device)[:, None, None]
            clue = puzzles.long().T[None] - digits  # [9, 81, B], 0 for the clue's digit
            given = (puzzles > 0).T.expand(9, -1, -1)  # len() would fix the batch in torch.export
            embedded = F.embedding(torch.where(given, 1 + (clue != 0), 0), w["embedding"])
            x = F.layer_norm(embedded, embedded.shape[-1:])
            free, last = self.message_steps - 1, 1
            if self.training:
                free, last = int(torch.randint(self.free_steps + 1, ())), self.grad_steps
            with torch.no_grad():
                for _ in range(free):
                    x = self.message_step(x, embedded, w, gather, spread)
            logits = []
            for _ in range(last):
                x = self.run_stage(self.message_step, x, embedded, w, gather, spread)
                logits.append((x @ w["head"]).float())
            logits = torch.stack(logits)  # [S, 9, 81, B]
            return torch.where(given, torch.where(clue == 0, 0.0, -1e4), logits).permute(0, 3, 2, 1)

    def message_step(self, x, embedded, w, gather, spread):
        """One round of messages with weights `w`: states [9, 81, B, width] to the same shape."""
        _, _, boards, width = x.shape
        pooled, hidden = w["cell_in"].shape
        q = (x @ w["pool"]).clamp(-10.0, 8.8).exp()  # [9, 81, B, pooled]; 9 e^8.8 fits fp16
        groups = (gather @ q.view(9, 81, -1)).log()  # log-sum-exp
        segment, line, box = groups.view(9, 81, boards, pooled).split((54, 18, 9), 1)
        # segments read themselves, their line and their box
        segment = (segment @ w["segment_in"]).view(9, 2, 3, 3, 3, boards, hidden)
        line = (line @ w["line_in"]).view(9, 2, 3, 3, 1, boards, hidden)
        box = (box @ w["box_in"] + w["segment_bias"]).view(9, 3, 3, boards, hidden)
        segment = segment + line + torch.stack([box, box.transpose(1, 2)], 1)[:, :, :, None]
        segment = segment.relu_().view(-1, hidden) @ w["segment_out"]
        cell = q.sum(0).log().view(-1, pooled)  # [81 * B, pooled]
        cell = torch.addmm(w["cell_bias"], cell, w["cell_in"]).relu_()
        cell = torch.addmm(w["node_bias"], cell, w["cell_out"])
        # candidates read their cell, their two segments and themselves
        node = torch.baddbmm(cell.view(1, 81, -1), spread, segment.view(9, 54, -1))
        node = torch.addmm(node.view(-1, hidden), x.view(-1, width), w["node_in"]).relu_()
        x = torch.addmm((x + embedded).view(-1, width), node, w["node_out"])
        return F.layer_norm(x, (width,)).view_as(embedded)


# ----------------------------------------------------------------------------- losses and building


def image_loss(logits, labels, label_smoothing=0.0, focal_gamma=0.0, weights=None):
    """Cross-entropy summed over the batch, a float32 scalar, of logits float [B, K].

    Labels are classes int64 [B] or probabilities float [B, K]. `focal_gamma` weighs each class's
    term by (1 - p)^gamma (Lin et al. 2017), `weights` [K] by a factor.
    """
    logits, classes, smoothing = logits.float(), logits.shape[-1], label_smoothing
    if not focal_gamma:
        return F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=smoothing)
    log_p = F.log_softmax(logits, -1)
    target = labels if labels.is_floating_point() else F.one_hot(labels, classes)
    target = (1 - smoothing) * target + smoothing / classes
    target = target if weights is None else target * weights
    return -(target * focus(log_p, focal_gamma) * log_p).sum()


def balanced_weights(counts):
    """float32 [K]: weights of classes by inverse frequency, 1 on average over the `counts` samples."""
    counts = torch.tensor(counts, dtype=torch.float32)
    return counts.sum() / len(counts) / counts.clamp(min=1)


def focus(log_p, gamma):
    """(1 - p)^gamma, with a finite gradient even at p = 1 with gamma below 1."""
    return (-torch.expm1(log_p)).clamp(min=1e-6) ** gamma


def sudoku_loss(logits, labels, focal_gamma=0.0):
    """Cross-entropy summed over the blanks and averaged over the steps: a float32 scalar.

    Logits are float [S, B, 81, 9]; labels are integers [B, 81 or more], the digit of a blank and 0
    for a clue. `focal_gamma` weighs each blank by (1 - p)^gamma (Lin et al. 2017).
    """
    answers = labels[:, :81]
    log_p = F.log_softmax(logits.float(), -1)
    target = (answers.long() - 1).clamp(min=0).expand(logits.shape[:-1])
    log_p_true = log_p.gather(-1, target[..., None])[..., 0]  # [S, B, 81]
    weight = focus(log_p_true, focal_gamma) if focal_gamma else 1.0
    return -(weight * log_p_true * (answers > 0)).sum() / len(logits)


class Deployed(nn.Module):
    """A model with normalisation and softmax built in: bytes in, probabilities float32 out.

    Images uint8 [B, H, W, C] give [B, K]; puzzles uint8 [B, 81] give [B, 81, 9]. `mean` and `std`
    [C] are those of pixels in [0, 1].
    """

    def __init__(self, model, mean, std):
        super().__init__()
        self.model = model
        per_channel = lambda values: torch.tensor(values, dtype=torch.float32)[:, None, None] * 255
        self.register_buffer("mean", per_channel(mean))
        self.register_buffer("std", per_channel(std))

    def forward(self, inputs):
        if inputs.ndim == 2:
            return self.model(inputs)[-1].float().softmax(-1)
        x = (inputs.permute(0, 3, 1, 2).float() - self.mean) / self.std
        return self.model(x).float().softmax(-1)


MODELS = {"custom": CustomCNN, "efficientnet_b0": EfficientNetB0, "sudoku_gnn": SudokuGNN}


def build_model(name, num_classes, in_channels=3, **arguments):
    """A newly initialised model of `MODELS`; `arguments` go to its constructor."""
    return MODELS[name](num_classes, in_channels, **arguments)


def smallest_image(name, stem_stride=1, **arguments):
    """The side in px of the smallest image that a model of `MODELS` takes."""
    return {"efficientnet_b0": 32, "custom": max(24, 9 * stem_stride)}.get(name, 0)


def compile_model(model, inputs, mode):
    """(function of inputs to outputs, or None, a note): the model compiled for batches like `inputs`.

    A batch of another size goes through the model as it is: compiling anew would take a minute.
    None where one forward and backward pass fails. Call it under the autocast of training.
    """
    compiled, size = torch.compile(model, mode=mode), len(inputs)
    try:
        with hold_buffers(model):
            compiled(inputs).float().sum().backward()
    except (RuntimeError, ImportError, OSError) as error:  # no compiler, or an operator it lacks
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return None, f"not compiled ({reason[:200]})"
    finally:
        model.zero_grad()
    call = lambda batch: (compiled if len(batch) == size else model)(batch)
    return call, f"compiled ({mode})"


# -------------------------------------------------------------------------------------- optimizers

LEARNING_RATES = {"sgd": 0.1, "adamw": 0.002, "muon": 0.005}
MOMENTS = {"adamw": 2, "sgd": 1, "muon": 1}  # state tensors per weight


def parameter_groups(model, weight_decay):
    """Two optimizer groups: matrices and filters with weight decay, other parameters without."""
    groups = [{"params": [], "weight_decay": decay} for decay in (weight_decay, 0.0)]
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim >= 2 and "embedding" not in name
            groups[0 if decays else 1]["params"].append(p)
    return groups


def orthogonalise(matrix):
    """About U V^T, bfloat16, for float [M, N] = U S V^T: 5 Newton-Schulz steps (Jordan 2024)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        update = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, update, x, beta=3.4445)
    return x.T if tall else x


def as_matrix(weight):
    """A view [out, rest] of a dense weight [out, ...], with columns in memory order."""
    columns = weight[0].numel()
    assert len(weight) == 1 or weight.stride(0) == columns, weight.stride()
    return weight.as_strided((len(weight), columns), (columns, 1))


class Muon(torch.optim.AdamW):
    """AdamW, with Muon's update (Jordan et al. 2024) for groups with `"orthogonal": True`.

    The update is that of torch.optim.Muon with adjust_lr_fn="match_rms_adamw", whose scale suits
    AdamW's learning rates. Filters [out, in, h, w] are matrices [out, in * h * w]; beta1 is the
    momentum; the state has AdamW's names, since AdamW expects a `step` for each parameter.
    """

    def __init__(self, groups, **arguments):
        super().__init__(groups, **arguments)
        self._step_supports_amp_scaling = False  # unlike fused AdamW, it needs unscaled gradients

    @torch.no_grad()
    def step(self):
        """Mutates the parameters, and clears the gradients of the orthogonal groups."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["betas"][0]
            orthogonal = group["params"] if group.get("orthogonal") else []
            for p in (p for p in orthogonal if p.grad is not None):
                if p not in self.state:
                    self.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
                average = self.state[p]["exp_avg"].lerp_(p.grad, 1 - momentum)
                update = torch.lerp(p.grad, average, momentum, out=torch.empty_like(p))
                matrix = as_matrix(p.mul_(1 - lr * group["weight_decay"]))
                scale = 0.2 * math.sqrt(max(matrix.shape))
                matrix.add_(orthogonalise(as_matrix(update)), alpha=-lr * scale)
                p.grad = None  # AdamW skips it
        super().step()


def build_optimizer(model, name, lr, weight_decay, momentum, device):
    """SGD with Nesterov momentum, AdamW or Muon by `name`, fused where the device supports it.

    With Muon, AdamW updates heads, embeddings, depthwise filters, biases and scales.
    """
    groups = parameter_groups(model, weight_decay)
    fused = device.type in ("cuda", "cpu", "mps")
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, betas=(momentum, 0.999), fused=fused)
    heads = [module.weight for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    dense = lambda p: p[0].numel() > p[0, 0].numel() and not any(p is head for head in heads)
    orthogonal = {**groups[0], "orthogonal": True}
    orthogonal["params"] = [p for p in groups[0]["params"] if dense(p)]
    groups[0]["params"] = [p for p in groups[0]["params"] if not dense(p)]
    return Muon([orthogonal, *groups], lr=lr, betas=(momentum, 0.999), fused=fused)


def set_rates(optimizer, lr, momentum=None):
    """Mutates the optimizer: the learning rate and, where given, the momentum (beta1 of AdamW)."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if momentum is not None and "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif momentum is not None:
            group["momentum"] = momentum


# ------------------------------------------------------------------------------------------ memory


def activation_bytes(model, inputs):
    """Bytes that autograd keeps from model(inputs) to its backward pass, without the parameters.

    With `recomputed` stages, the largest one is added: the backward pass holds it again.
    """
    run_stage = model.run_stage
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    try:
        with hold_buffers(model), torch.random.fork_rng(devices):
            total, largest = saved_bytes(model, inputs, direct)
            if run_stage is recomputed:
                total = saved_bytes(model, inputs, recomputed)[0] + largest
            return total
    finally:
        model.run_stage = run_stage


def saved_bytes(model, inputs, run_stage):
    """Mutates model.run_stage: (bytes kept by a forward pass, the most that one stage adds)."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
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
        outputs = model(inputs)  # noqa: F841 keeps the graph: no storage's place is reused
    return sum(kept.values()), max(stages)


def estimate_memory(model, example, moments=2, ema=False):
    """{"weights", "gradients", "optimizer", "ema", "once", "sample"}: bytes that training holds.

    `example` has four inputs or more, `moments` are the optimizer's tensors per weight (`MOMENTS`),
    `ema` the copies of the weights; "once" and "sample" are activations of any batch and a sample.
    """
    assert len(example) >= 4, len(example)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    two, four = (activation_bytes(model, example[:count]) for count in (2, 4))
    sample = (four - two) // 2
    return {"weights": weights, "gradients": trained, "optimizer": moments * trained,
            "ema": ema * weights, "once": two - 2 * sample, "sample": sample}


def largest_batch(memory, available):
    """The largest batch that fits in `available` bytes by `estimate_memory`; 0 if none does.

    A sample takes 10% more in the backward pass.
    """
    fixed = sum(size for name, size in memory.items() if name != "sample")
    return max(0, int((available - fixed) / (1.1 * memory["sample"])))
