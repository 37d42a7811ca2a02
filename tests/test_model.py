"""Networks, losses and optimizers against the papers' counts, torchvision, timm and torch."""

import copy
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import model

CPU = torch.device("cpu")

# Every 100th logit of torchvision 0.29.2's efficientnet_b0 for `reference_input`, with the weights
# `reference_weights`.
TORCHVISION_LOGITS = [
    0.0179, 0.4785, 0.3752, -0.1706, 0.178, -0.9042, 0.1416, 0.4808, 0.2155, -0.5836,
    0.0225, 0.4727, 0.377, -0.1724, 0.1783, -0.9028, 0.1434, 0.4777, 0.2187, -0.5819,
]


def reference_weights(state_dict):
    """Weights drawn alike on every machine (numpy's frozen RandomState), scaled to keep signals."""
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


# torchvision declares these operators itself only if its compiled code fits the installed torch.
DECLARE_OPERATORS = """
import torch
for operator in ("nms", "qnms"):
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    torch.library.define(f"torchvision::{operator}", schema)
"""


def import_peer(name):
    """torchvision or timm, as installed or with declared operators; skips the test without them.

    A first import in another process: operators declared twice, or compiled code for another torch,
    would abort this one.
    """
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    for preparation in ("", DECLARE_OPERATORS):
        command = [sys.executable, "-c", f"{preparation}\nimport {name}"]
        if subprocess.run(command, capture_output=True, timeout=120).returncode == 0:
            if "torchvision" not in sys.modules:
                exec(preparation)
            return importlib.import_module(name)
    pytest.skip(f"{name} cannot be imported beside torch {torch.__version__}")


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
    torchvision = import_peer("torchvision")
    theirs = torchvision.models.efficientnet_b0(weights=None).eval()
    theirs.load_state_dict(reference_weights(theirs.state_dict()))
    ours = model.build_model("efficientnet_b0", 1000).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert (ours(reference_input()) - theirs(reference_input())).abs().max() < 1e-4


@torch.no_grad()
def test_efficientnet_equals_timm_by_names_in_any_order():
    timm = import_peer("timm")
    theirs = timm.create_model("efficientnet_b0").eval()
    theirs.load_state_dict(reference_weights(theirs.state_dict()))
    ours = model.build_model("efficientnet_b0", 1000).eval()
    model.load_backbone(ours, dict(sorted(theirs.state_dict().items())))
    assert (ours(reference_input()) - theirs(reference_input())).abs().max() < 1e-4


def test_timm_names_map_onto_every_tensor():
    """The table alone, without timm: each name of its stages 0 and 3 has a place."""
    own = model.build_model("efficientnet_b0", 10).state_dict()
    stage0 = ["conv_dw.weight", "bn1.bias", "se.conv_reduce.bias", "se.conv_expand.weight"]
    stage0 += ["conv_pw.weight", "bn2.running_var"]
    stage3 = [*stage0, "conv_pwl.weight", "bn3.num_batches_tracked"]
    names = [f"blocks.0.0.{n}" for n in stage0] + [f"blocks.3.2.{n}" for n in stage3]
    names += ["conv_stem.weight", "bn2.weight", "classifier.bias"]
    mapped = [model.timm_to_torchvision(n) for n in names]
    assert len(set(mapped)) == len(mapped) and set(mapped) <= set(own)
    translate = model.timm_to_torchvision
    assert translate("blocks.3.2.conv_pwl.weight") == "features.4.2.block.3.0.weight"
    assert translate("blocks.0.0.conv_pw.weight") == "features.1.0.block.2.0.weight"


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


@pytest.mark.parametrize(
    "name, argument, value, expected",
    [
        ("custom", "widths", (64, 128, 256), "4 integers from 2 to 9999"),
        ("custom", "widths", (1, 8, 8, 8), "4 integers from 2 to 9999"),
        ("custom", "widths", [8, 8, 8, 8.0], "4 integers from 2 to 9999"),
        ("custom", "depths", (2, -1, 2), "3 integers from 0 to 9999"),
        ("custom", "stem_stride", 5, "an integer from 1 to 4"),
        ("efficientnet_b0", "dropout", 1.0, "at least 0 and below 1"),
        ("efficientnet_b0", "drop_path", -0.1, "at least 0 and below 1"),
        ("efficientnet_b0", "drop_path", math.nan, "at least 0 and below 1"),
        ("sudoku_gnn", "width", 0, "an integer from 1 to 1024"),
        ("sudoku_gnn", "hidden", 1025, "an integer from 1 to 1024"),
        ("sudoku_gnn", "pooled", 0, "an integer from 1 to 1024"),
        ("sudoku_gnn", "free_steps", -1, "an integer from 0 to 10000"),
        ("sudoku_gnn", "grad_steps", 0, "an integer from 1 to 10000"),
        ("sudoku_gnn", "message_steps", True, "an integer from 1 to 10000"),
    ],
)
def test_an_argument_out_of_range_is_named_in_one_line(name, argument, value, expected):
    with pytest.raises(ValueError) as error:
        model.build_model(name, 9, **{argument: value})
    assert str(error.value) == f"{argument}: must be {expected}, got {value!r}"


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("custom", {"widths": [2, 2, 2, 2], "depths": [0, 0, 0], "stem_stride": 4, "whiten": True}),
        ("efficientnet_b0", {"dropout": 0, "drop_path": 0.999}),
        ("sudoku_gnn", {"width": 1, "hidden": 1, "pooled": 1, "free_steps": 0, "grad_steps": 1}),
    ],
)
def test_the_smallest_arguments_make_a_model_that_runs(name, arguments):
    net = model.build_model(name, 9, **arguments)
    inputs = torch.randn(2, 3, 36, 36)  # 9 * stem_stride
    if name == "sudoku_gnn":
        inputs = torch.zeros(2, 81, dtype=torch.uint8)
    assert net(inputs).isfinite().all()


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
    assert torch.allclose(y[kept], 2 * full[kept], atol=1e-5)  # divided by the 0.5 kept
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
    message = "features.8.0.weight is 4x4, the model needs 1280x320x1x1"
    with pytest.raises(ValueError, match=message):
        model.load_backbone(b0, weights)


def test_official_weights_come_through_torch_hub_with_their_hash_checked(monkeypatch):
    def load(url, **arguments):
        assert re.fullmatch(r"https://download.pytorch.org/models/.+-[0-9a-f]{8}\.pth", url)
        assert arguments == {"map_location": "cpu", "check_hash": True, "weights_only": True}
        return {"weights": 1}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
    assert model.official_weights() == {"weights": 1}


@pytest.mark.parametrize("error", [OSError("no\nroute"), RuntimeError("invalid hash value")])
def test_official_weights_that_cannot_be_fetched_are_one_line(monkeypatch, error):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
    with pytest.raises(ValueError) as caught:
        model.official_weights()
    reason = " ".join(str(error).split())
    start = f"official weights cannot be fetched ({reason}); fetch https://"
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(model.MODELS))
@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_of_memory_is_within_15_percent_of_what_autograd_keeps(name, recompute):
    net = model.build_model(name, 9 if name == "sudoku_gnn" else 10)
    net.run_stage = model.recomputed if recompute else model.direct
    example = torch.randn(24, 3, 32, 32)
    if name == "sudoku_gnn":
        example = torch.zeros(24, 81, dtype=torch.uint8)
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
    estimated = estimate["once"] + 24 * estimate["sample"]
    if recompute:  # the largest stage comes again
        direct = model.activation_bytes(model.build_model(name, 9), example)
        assert measured < estimated < 0.75 * direct
    else:
        assert estimated == pytest.approx(measured, rel=0.15)
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


def assert_same_gradients(own, reference, inputs):
    """Outputs and gradients of both for one random gradient of the output, within 1e-12."""
    assert torch.allclose(own, reference, atol=1e-12)
    gradient = torch.randn_like(reference)
    pairs = (torch.autograd.grad(y, inputs, gradient) for y in (own, reference))
    for a, b in zip(*pairs):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(
    "size, stride, kernel", [(1, 1, 5), (2, 1, 5), (2, 2, 5), (1, 1, 3), (3, 2, 5), (5, 1, 5)]
)
def test_depthwise_convolutions_on_small_maps_are_torchs(size, stride, kernel):
    own = model.Conv2d(6, 6, kernel, stride, kernel // 2, groups=6, bias=False).double()
    x = torch.randn(3, 6, size, size, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.conv2d(x, own.weight, None, stride, kernel // 2, 1, 6)
    assert_same_gradients(own(x), y, (x, own.weight))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_pointwise_convolutions_are_torchs(memory_format):
    own = model.Conv2d(6, 9, 1, bias=False).double().to(memory_format=memory_format)
    x = torch.randn(3, 6, 5, 4).double().to(memory_format=memory_format).requires_grad_()
    y = torch.nn.functional.conv2d(x, own.weight)
    assert own(x).stride() == y.stride()
    assert_same_gradients(own(x), y, (x, own.weight))


def test_largest_batch_leaves_its_margin():
    memory = dict.fromkeys(("gradients", "optimizer", "ema", "once"), 0)
    memory |= {"weights": 2**20, "sample": 2**20}
    assert model.largest_batch(memory, 2**30) == int((1024 - 1) / 1.1)
    assert model.largest_batch(memory, 2**20) == 0


PRESETS = json.loads((Path(__file__).resolve().parent.parent / "configs.json").read_text())


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("gb")])
def test_a_preset_for_a_card_is_within_the_estimate(name, monkeypatch):
    monkeypatch.setattr(model.Conv2d, "tuned_on", ())  # as on a GPU
    preset = PRESETS[name]
    arguments = {}
    if preset["model"] == "custom":
        arguments["stem_stride"] = model.stem_stride_for(preset["image_size"])
    net = model.build_model(preset["model"], 1000, **arguments)
    example = torch.zeros(4, 3, preset["image_size"], preset["image_size"])
    with torch.autocast("cpu", torch.bfloat16):
        memory = model.estimate_memory(net, example, ema=True)
    assert preset["batch_size"] <= model.largest_batch(memory, (0.9 * int(name[-3]) - 0.5) * 2**30)


def test_the_forms_chosen_for_a_cpu_leave_efficientnets_loss_and_gradients_as_they_are(monkeypatch):
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    results = []
    for tuned_on in (("cpu",), ()):
        monkeypatch.setattr(model.Conv2d, "tuned_on", tuned_on)
        torch.manual_seed(0)
        net = model.build_model("efficientnet_b0", 5, dropout=0.0, drop_path=0.0)
        net.to(memory_format=torch.channels_last)
        torch.nn.init.normal_(net.classifier[1].weight, std=0.05)
        loss = model.image_loss(net(x), torch.arange(4))
        loss.backward()
        results.append((loss, *(p.grad for p in net.parameters())))
    for tuned, plain in zip(*results):
        assert (tuned - plain).norm() <= 1e-3 * plain.norm() + 1e-4  # some are about 0


# ------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_of_images_is_the_sum_made_by_hand(gamma, smoothing, soft):
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
    loss = model.image_loss(logits, shares, smoothing, gamma)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_mixed_targets_cost_the_mixed_losses():
    torch.manual_seed(1)
    logits, a, b = torch.randn(5, 3), torch.randint(0, 3, (5,)), torch.randint(0, 3, (5,))
    own = torch.rand(5)
    one_hot = torch.nn.functional.one_hot
    targets = one_hot(a, 3) * own[:, None] + one_hot(b, 3) * (1 - own)[:, None]
    each = lambda labels: torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = (own * each(a) + (1 - own) * each(b)).sum().item()
    assert model.image_loss(logits, targets).item() == pytest.approx(expected)


def test_focal_loss_of_images_has_finite_gradients_where_the_model_is_certain():
    logits = torch.tensor([[100.0, 0.0], [0.0, 100.0]], requires_grad=True)
    model.image_loss(logits, torch.tensor([0, 0]), focal_gamma=0.5).backward()
    assert logits.grad.isfinite().all() and logits.grad[1].abs().max() > 0.5


# --------------------------------------------------------------------------------------- optimizers


def small_net(memory_format=torch.contiguous_format):
    """Dense and depthwise filters, a hidden matrix and a head, always with the same weights."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8, 6)]
    return nn.Sequential(*layers, nn.Linear(6, 2)).to(memory_format=memory_format)


def backward(net, seed, scaler=None):
    """Mutates the gradients of `net`: those of one random batch, scaled by `scaler`."""
    net.zero_grad()
    inputs = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    loss = net(inputs).square().sum()
    (scaler.scale(loss) if scaler else loss).backward()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_is_torchs_muon_for_matrices_and_filters_and_adamw_for_the_rest(memory_format):
    net = small_net(memory_format)
    muon = model.build_optimizer(net, "muon", 0.1, 0.01, 0.9, CPU)
    orthogonal, rest = [], []
    for group in muon.param_groups:
        (orthogonal if group.get("orthogonal") else rest).extend(group["params"])
    assert [id(p) for p in orthogonal] == [id(net[0].weight), id(net[3].weight)]
    order = (0, 2, 3, 1) if memory_format is torch.channels_last else (0, 1, 2, 3)
    as_matrix = lambda t: (t.permute(order) if t.ndim == 4 else t).flatten(1).clone()
    matrices = [nn.Parameter(as_matrix(p.detach())) for p in orthogonal]
    copies = [nn.Parameter(p.detach().clone()) for p in rest]
    groups = [{"params": [p], "weight_decay": 0.01 if p.ndim >= 2 else 0.0} for p in copies]
    references = [
        torch.optim.Muon(matrices, 0.1, 0.01, 0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, 0.1, betas=(0.9, 0.999), fused=True),
    ]
    for step in range(10):
        for optimizer in (muon, *references):  # the momentum is cycled, as by onecycle
            model.set_rates(optimizer, 0.1 / (step + 1), 0.95 - 0.01 * step)
        backward(net, step)
        for matrix, p in zip(matrices, orthogonal):
            matrix.grad = as_matrix(p.grad)
        for duplicate, p in zip(copies, rest):
            duplicate.grad = p.grad.clone()
        for optimizer in (muon, *references):
            optimizer.step()
        assert all(torch.equal(as_matrix(p), matrix) for p, matrix in zip(orthogonal, matrices))
        assert all(torch.equal(p, duplicate) for p, duplicate in zip(rest, copies))


def test_orthogonalised_singular_values_lie_around_one():
    for shape in ((8, 30), (30, 8), (16, 16)):
        update = model.orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        assert update.shape == shape and update.dtype == torch.bfloat16
        values = torch.linalg.svdvals(update.float())
        assert values.max() < 1.3 and values.median() > 0.6


@pytest.mark.parametrize("name", list(model.LEARNING_RATES))
def test_an_optimizer_goes_on_from_its_saved_state_bitwise(name, tmp_path):
    results = []
    for stop in (None, 3):
        net = small_net()
        optimizer = model.build_optimizer(net, name, 0.1, 0.01, 0.9, CPU)
        for step in range(6):
            if step == stop:
                torch.save([net.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
                net = small_net()
                optimizer = model.build_optimizer(net, name, 0.5, 0.2, 0.5, CPU)
                weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
                net.load_state_dict(weights)
                optimizer.load_state_dict(state)
            backward(net, step)
            optimizer.step()
        results.append(net.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_muons_state_goes_into_a_model_of_another_memory_format():
    nets = [small_net(), small_net(torch.channels_last)]
    optimizers = [model.build_optimizer(net, "muon", 0.1, 0.01, 0.9, CPU) for net in nets]
    backward(nets[0], 0)
    optimizers[0].step()
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for net, optimizer in zip(nets, optimizers):
        backward(net, 1)
        before = net[0].weight.detach().clone()
        optimizer.step()
        assert not torch.equal(net[0].weight, before)
    for a, b in zip(*(net.parameters() for net in nets)):
        assert torch.allclose(a, b, atol=2e-3)  # the columns' order changes what bfloat16 rounds
    states = [optimizer.state[net[0].weight]["exp_avg"] for net, optimizer in zip(nets, optimizers)]
    assert torch.allclose(*states, atol=1e-6)


@pytest.mark.parametrize("name", list(model.LEARNING_RATES))
@pytest.mark.parametrize("unscale", [False, True])
def test_a_gradient_scaler_changes_no_step_and_skips_infinite_ones(name, unscale):
    results = []
    for enabled in (False, True):
        net = small_net()
        optimizer = model.build_optimizer(net, name, 0.1, 0.01, 0.9, CPU)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0)
        for step in range(4):
            backward(net, step, scaler)
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append(net.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    before = [p.detach().clone() for p in net.parameters()]
    backward(net, 5, scaler)
    net[4].bias.grad.fill_(math.inf)
    scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_muon_passes_over_frozen_parameters():
    net = small_net()
    optimizer = model.build_optimizer(net, "muon", 0.1, 0.01, 0.9, CPU)
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    backward(net, 0)
    optimizer.step()
    assert torch.equal(net[0].weight, before) and net[0].weight not in optimizer.state
    net[0].requires_grad_(True)
    backward(net, 1)
    optimizer.step()
    assert not torch.equal(net[0].weight, before)


@pytest.mark.parametrize("network", list(model.MODELS))
@pytest.mark.parametrize("name", list(model.LEARNING_RATES))
def test_an_optimizers_groups_partition_the_trained_parameters(network, name):
    arguments = {"whiten": True} if network == "custom" else {}
    net = model.build_model(network, 9, **arguments)
    optimizer = model.build_optimizer(net, name, 0.1, 0.05, 0.9, CPU)
    names = {id(p): key for key, p in net.named_parameters() if p.requires_grad}
    groups = {"orthogonal": [], "decay": [], "rest": []}
    for group in optimizer.param_groups:
        kind = "decay" if group["weight_decay"] else "rest"
        kind = "orthogonal" if group.get("orthogonal") else kind
        assert group["lr"] == 0.1 and group["weight_decay"] == (0.0 if kind == "rest" else 0.05)
        groups[kind] += [names[id(p)] for p in group["params"]]
    assert sorted(sum(groups.values(), [])) == sorted(names.values())
    assert "stem.0.weight" not in names.values()  # whitened, so not trained
    assert bool(groups["orthogonal"]) == (name == "muon")
    assert not {"head.weight", "classifier.1.weight", "embedding"} & set(groups["orthogonal"])
    for key in groups["orthogonal"]:
        p = net.get_parameter(key)
        assert p[0].numel() > p[0, 0].numel()  # not depthwise


@pytest.mark.parametrize("name", list(model.LEARNING_RATES))
def test_moments_are_the_optimizers_state_tensors_per_weight(name):
    net = model.build_model("custom", 10, widths=(8, 16, 16, 16))
    optimizer = model.build_optimizer(net, name, 0.1, 0.05, 0.9, CPU)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    weight = net.stage1.conv.weight
    state = optimizer.state[weight].values()
    assert model.MOMENTS[name] == sum(tensor.shape == weight.shape for tensor in state)


def test_rates_and_momentum_reach_every_group():
    for name in model.LEARNING_RATES:
        optimizer = model.build_optimizer(small_net(), name, 0.1, 0.05, 0.9, CPU)
        model.set_rates(optimizer, 0.2)
        model.set_rates(optimizer, 0.3, 0.85)
        for group in optimizer.param_groups:
            momentum = group["momentum"] if name == "sgd" else group["betas"][0]
            assert (group["lr"], momentum) == (0.3, 0.85)


def test_sgd_without_momentum_keeps_no_state():
    optimizer = model.build_optimizer(small_net(), "sgd", 0.1, 0.05, 0.0, CPU)
    assert not optimizer.state and not optimizer.param_groups[0]["nesterov"]


def test_class_weights_multiply_the_terms_of_their_class():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 2])
    weights = torch.tensor([2.0, 0.5, 1.0])
    terms = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = (terms * weights[labels]).sum()
    assert torch.allclose(model.image_loss(logits, labels, weights=weights), expected)
    p = logits.softmax(1)[range(6), labels]
    focal = ((1 - p) ** 2 * terms * weights[labels]).sum()
    assert torch.allclose(model.image_loss(logits, labels, 0.0, 2.0, weights), focal)
    shares = torch.nn.functional.one_hot(labels, 3).float()
    assert torch.allclose(model.image_loss(logits, shares, weights=weights), expected)
