"""The networks against the paper's counts, torchvision, timm and a stored reference."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import model

# Logits of torchvision 0.29.2's efficientnet_b0 under `reference_weights` and `reference_input`: every 100th class.
TORCHVISION_LOGITS = [
    0.0179, 0.4785, 0.3752, -0.1706, 0.178, -0.9042, 0.1416, 0.4808, 0.2155, -0.5836,
    0.0225, 0.4727, 0.377, -0.1724, 0.1783, -0.9028, 0.1434, 0.4777, 0.2187, -0.5819,
]  # fmt: skip


def reference_weights(state_dict):
    """Weights that every machine draws alike (numpy's frozen RandomState), at scales that keep signals alive."""
    random, filled = np.random.RandomState(0), {}
    for name, tensor in state_dict.items():
        drawn = torch.from_numpy(random.standard_normal(tuple(tensor.shape))).float()
        if not tensor.is_floating_point():
            filled[name] = torch.ones_like(tensor)
        elif name.endswith("running_var"):
            filled[name] = 0.5 + drawn.abs()
        elif tensor.ndim >= 2:
            filled[name] = drawn * (2 / tensor[0].numel()) ** 0.5
        else:
            filled[name] = drawn * 0.2 + (1.0 if name.endswith("weight") else 0.0)
    return filled


def reference_input():
    return torch.from_numpy(np.random.RandomState(1).standard_normal((2, 3, 64, 64))).float()


def import_torchvision():
    """torchvision, with the operators that its build without compiled code lacks declared."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            pass  # a build that has them
    import torchvision

    return torchvision, library


def test_efficientnet_has_the_papers_parameters():
    b0 = model.build_model("efficientnet_b0", 1000)
    assert sum(p.numel() for p in b0.parameters()) == 5_288_548
    by_stage = [sum(p.numel() for p in stage.parameters()) for stage in b0.features]
    assert by_stage == [928, 1448, 16714, 46640, 242930, 543148, 2026348, 717232, 412160]
    assert len(b0.state_dict()) == 360


@torch.no_grad()
def test_efficientnet_equals_the_stored_reference():
    b0 = model.build_model("efficientnet_b0", 1000).eval()
    b0.load_state_dict(reference_weights(b0.state_dict()))
    logits = b0(reference_input())[:, ::100].flatten()
    assert torch.allclose(logits, torch.tensor(TORCHVISION_LOGITS), atol=1e-3)


@torch.no_grad()
def test_efficientnet_equals_torchvision():
    torchvision, _library = import_torchvision()
    theirs = torchvision.models.efficientnet_b0(weights=None).eval()
    theirs.load_state_dict(reference_weights(theirs.state_dict()))
    ours = model.build_model("efficientnet_b0", 1000).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert (ours(reference_input()) - theirs(reference_input())).abs().max() < 1e-4


@torch.no_grad()
def test_efficientnet_equals_timm_by_names_in_any_order():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("efficientnet_b0").eval()
    theirs.load_state_dict(reference_weights(theirs.state_dict()))
    ours = model.build_model("efficientnet_b0", 1000).eval()
    model.load_backbone(ours, dict(sorted(theirs.state_dict().items())))
    assert (ours(reference_input()) - theirs(reference_input())).abs().max() < 1e-4


def test_timm_names_map_onto_every_tensor():
    """The table alone, where timm is not installed: each of timm's names of stages 0 and 3 has its place."""
    own = model.build_model("efficientnet_b0", 10).state_dict()
    stage0 = ["conv_dw.weight", "bn1.bias", "se.conv_reduce.bias", "se.conv_expand.weight"]
    stage0 += ["conv_pw.weight", "bn2.running_var"]
    stage3 = [*stage0, "conv_pwl.weight", "bn3.num_batches_tracked"]
    names = [f"blocks.0.0.{n}" for n in stage0] + [f"blocks.3.2.{n}" for n in stage3]
    mapped = [model.timm_to_torchvision(n) for n in [*names, "conv_stem.weight", "bn2.weight", "classifier.bias"]]
    assert len(set(mapped)) == len(mapped) and set(mapped) <= set(own)
    assert model.timm_to_torchvision("blocks.3.2.conv_pwl.weight") == "features.4.2.block.3.0.weight"
    assert model.timm_to_torchvision("blocks.0.0.conv_pw.weight") == "features.1.0.block.2.0.weight"


@pytest.mark.parametrize("name", ["custom", "efficientnet_b0"])
def test_initial_loss_is_log_classes(name):
    net = model.build_model(name, 7)
    loss = model.image_loss(net(torch.randn(4, 3, 32, 32)), torch.tensor([0, 3, 5, 6])) / 4
    assert loss.item() == pytest.approx(math.log(7), abs=1e-6)


def test_custom_has_4_7_million_parameters_and_takes_any_size():
    for channels, size in ((1, 24), (3, 32), (4, 57), (3, 64), (3, 130)):
        net = model.build_model("custom", 10, channels, stem_stride=model.stem_stride_for(size))
        assert sum(p.numel() for p in net.parameters()) == pytest.approx(4.7e6, rel=0.02)
        assert net(torch.randn(2, channels, size, size)).shape == (2, 10)


@pytest.mark.parametrize("name", list(model.MODELS))
def test_parameter_groups_partition_the_model(name):
    net = model.build_model(name, 9)
    decay, rest = model.parameter_groups(net, 0.1)
    ids = [id(p) for group in (decay, rest) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in net.parameters()) and len(set(ids)) == len(ids)
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    small = {id(p) for n, p in net.named_parameters() if p.ndim == 1 or n == "embedding"}
    assert {id(p) for p in rest["params"]} == small


def test_stochastic_depth_drops_whole_rows_and_keeps_the_mean():
    torch.manual_seed(0)
    block = model.MBConv(8, 8, 1, 3, 1, drop_probability=0.5).train()
    x = torch.randn(400, 8, 4, 4)
    with torch.no_grad():
        y = block(x) - x
        kept = y.flatten(1).abs().amax(1) > 1e-6
        full = block.block(x)
    assert 150 < kept.sum() < 250
    assert torch.allclose(y[kept], 2 * full[kept], atol=1e-5)  # divided by the probability of keeping
    assert torch.equal(block.eval()(x), x + block.block(x))


def test_another_head_keeps_the_backbone_and_one_channel_sums_the_stem():
    official = reference_weights(model.build_model("efficientnet_b0", 1000).state_dict())
    net = model.build_model("efficientnet_b0", 5)
    model.load_backbone(net, official)
    assert torch.equal(net.features[8][0].weight, official["features.8.0.weight"])
    assert not net.classifier[1].weight.any()
    grey = model.build_model("efficientnet_b0", 5, 1)
    model.load_backbone(grey, official)
    assert torch.equal(grey.features[0][0].weight[:, 0], official["features.0.0.weight"].sum(1))


def test_wrong_weights_name_the_tensor():
    b0, custom = model.build_model("efficientnet_b0", 10), model.build_model("custom", 10)
    with pytest.raises(ValueError, match="features.0.0.weight is missing"):
        model.load_backbone(b0, custom.state_dict())
    weights = b0.state_dict() | {"features.8.0.weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match="features.8.0.weight is 4x4, the model needs 1280x320x1x1"):
        model.load_backbone(b0, weights)


@pytest.mark.parametrize("name", list(model.MODELS))
@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_of_memory_is_within_15_percent_of_what_autograd_keeps(name, recompute):
    net = model.build_model(name, 9 if name == "sudoku_gnn" else 10)
    net.run_stage = model.recomputed if recompute else model.direct
    example = torch.zeros(24, 81, dtype=torch.uint8) if name == "sudoku_gnn" else torch.randn(24, 3, 32, 32)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    estimate = model.estimate_memory(net, example[:4], moments=2, ema=True)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    own, kept = {p.data_ptr() for p in net.parameters()}, {}

    def pack(tensor):  # counted here anew
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = net(example)  # noqa: F841 keeps what was saved alive
    measured = sum(size for place, size in kept.items() if place not in own)
    found = estimate["once"] + 24 * estimate["sample"]
    if recompute:  # the largest stage comes again
        assert measured < found < 0.75 * model.activation_bytes(model.build_model(name, 9), example)
    else:
        assert found == pytest.approx(measured, rel=0.15)
    weights = sum(t.numel() * t.element_size() for t in before.values())
    trained = sum(4 * p.numel() for p in net.parameters())
    fixed = [estimate[part] for part in ("weights", "gradients", "optimizer", "ema")]
    assert fixed == [weights, trained, 2 * trained, weights]


def test_activation_bytes_counts_each_kept_tensor_once():
    class Net(torch.nn.Module):
        run_stage = staticmethod(model.direct)

        def forward(self, x):
            y = self.run_stage(torch.exp, x)  # keeps y
            return y * y * self.scale  # keeps y, twice, y * y, and the parameter

    net = Net()
    net.scale = torch.nn.Parameter(torch.ones(7, 5))
    x = torch.ones(7, 5, requires_grad=True)
    assert model.activation_bytes(net, x) == 2 * 7 * 5 * 4


def test_depthwise_convolutions_stay_in_float32_on_a_cpu_alone():
    conv = model.Conv2d(8, 8, 3, groups=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(2, 8, 5, 5)).dtype == torch.float32
        assert model.Conv2d(8, 8, 3)(torch.randn(2, 8, 5, 5)).dtype == torch.bfloat16
        assert conv(torch.randn(2, 8, 5, 5).bfloat16()).dtype == torch.float32
        conv.tuned_on = ()
        assert conv(torch.randn(2, 8, 5, 5)).dtype == torch.bfloat16


@pytest.mark.parametrize("size, stride, kernel", [(1, 1, 5), (2, 1, 5), (2, 2, 5), (1, 1, 3), (3, 2, 5), (5, 1, 5)])
def test_depthwise_convolutions_on_small_maps_are_torchs(size, stride, kernel):
    own = model.Conv2d(6, 6, kernel, stride, kernel // 2, groups=6, bias=False).double()
    x = torch.randn(3, 6, size, size, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.conv2d(x, own.weight, None, stride, kernel // 2, 1, 6)
    assert torch.allclose(own(x), y, atol=1e-12)
    g = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(own(x), (x, own.weight), g), torch.autograd.grad(y, (x, own.weight), g)):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_pointwise_convolutions_are_torchs(memory_format):
    own = model.Conv2d(6, 9, 1, bias=False).double().to(memory_format=memory_format)
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    y = torch.nn.functional.conv2d(x, own.weight)
    assert torch.allclose(own(x), y, atol=1e-12) and own(x).stride() == y.stride()
    g = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(own(x), (x, own.weight), g), torch.autograd.grad(y, (x, own.weight), g)):
        assert torch.allclose(a, b, atol=1e-12)


def test_largest_batch_leaves_its_margin():
    memory = {"weights": 2**20, "gradients": 0, "optimizer": 0, "ema": 0, "once": 0, "sample": 2**20}
    assert model.largest_batch(memory, 4) == int((0.9 * 4 - 0.5) * 1024 / 1.1 - 1 / 1.1)
    assert model.largest_batch(memory, 0.5) == 0


PRESETS = json.loads((Path(__file__).resolve().parent.parent / "configs.json").read_text())


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("gb")])
def test_a_preset_for_a_card_is_within_the_estimate(name, monkeypatch):
    monkeypatch.setattr(model.Conv2d, "tuned_on", ())  # as on a GPU
    preset = PRESETS[name]
    arguments = {"stem_stride": model.stem_stride_for(preset["image_size"])} if preset["model"] == "custom" else {}
    net = model.build_model(preset["model"], 1000, **arguments)
    example = torch.zeros(4, 3, preset["image_size"], preset["image_size"])
    with torch.autocast("cpu", torch.bfloat16):
        memory = model.estimate_memory(net, example, ema=True)
    assert preset["batch_size"] <= model.largest_batch(memory, int(name[-3]))


def test_the_forms_chosen_for_a_cpu_leave_efficientnets_loss_and_gradients_as_they_are(monkeypatch):
    x, found = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last), []
    for tuned_on in (("cpu",), ()):
        monkeypatch.setattr(model.Conv2d, "tuned_on", tuned_on)
        torch.manual_seed(0)
        net = model.build_model("efficientnet_b0", 5, dropout=0.0, drop_path=0.0).to(memory_format=torch.channels_last)
        torch.nn.init.normal_(net.classifier[1].weight, std=0.05)
        loss = model.image_loss(net(x), torch.arange(4))
        loss.backward()
        found.append((loss, *(p.grad for p in net.parameters())))
    for tuned, plain in zip(*found):
        assert (tuned - plain).norm() <= 1e-3 * plain.norm() + 1e-4  # some are zero but for rounding


# ---------------------------------------------------------------------------------- the images' objective


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_the_images_loss_is_the_one_added_up_by_hand(gamma, smoothing, soft):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.randint(0, 4, (6,))
    shares = torch.rand(6, 4).softmax(1) if soft else labels
    expected = 0.0
    for i in range(6):
        p = logits[i].double().softmax(0)
        for k in range(4):
            y = shares[i, k].item() if soft else float(labels[i] == k)
            y = (1 - smoothing) * y + smoothing / 4
            expected -= y * (1 - p[k].item()) ** gamma * math.log(p[k].item())
    assert model.image_loss(logits, shares, smoothing, gamma).item() == pytest.approx(expected, rel=1e-5)


def test_mixed_targets_cost_the_mixed_losses():
    torch.manual_seed(1)
    logits, a, b = torch.randn(5, 3), torch.randint(0, 3, (5,)), torch.randint(0, 3, (5,))
    own = torch.rand(5)
    one_hot = torch.nn.functional.one_hot
    targets = one_hot(a, 3) * own[:, None] + one_hot(b, 3) * (1 - own)[:, None]
    each = lambda labels: torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert model.image_loss(logits, targets).item() == pytest.approx((own * each(a) + (1 - own) * each(b)).sum().item())


def test_focal_loss_of_images_has_finite_gradients_where_the_model_is_certain():
    logits = torch.tensor([[100.0, 0.0], [0.0, 100.0]], requires_grad=True)
    model.image_loss(logits, torch.tensor([0, 0]), focal_gamma=0.5).backward()
    assert logits.grad.isfinite().all() and logits.grad[1].abs().max() > 0.5
