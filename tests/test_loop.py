"""The loop's arithmetic: accumulation, clipping, bad steps, EMA, schedules, the LR finder."""

import math
from functools import partial

import pytest
import torch
import torch.nn as nn

import train
import utils


def make_state(dtype=torch.float64, optimizer="sgd", fp16=False, ema=False, norm=False, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(12, 16), *[nn.BatchNorm1d(16)] * norm, nn.Tanh(), nn.Linear(16, 3)]
    net = nn.Sequential(*layers).to(dtype)
    chosen = train.build_optimizer(net, optimizer, 0.1, 0.01, 0.9, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    return train.TrainState(net, chosen, scaler, train.start_ema(net) if ema else None)


def make_window(sizes, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    images, labels = torch.randn(sum(sizes), 2, 2, 3, dtype=dtype), torch.randint(0, 3, (sum(sizes),))
    return list(zip(images.split(sizes), labels.split(sizes), torch.arange(sum(sizes)).split(sizes)))


TASK = train.Task(
    loss=lambda y, t: nn.functional.cross_entropy(y, t, reduction="sum"),
    measure=lambda y, t: ((y.argmax(1) == t).sum()[None], len(t)),
    metrics=("accuracy",),
)
step = partial(train.train_step, task=TASK, augment=train.keep_both)


@pytest.mark.parametrize("sizes", [[4, 4, 2], [1, 7, 3, 5], [5], [1, 1, 1, 9]])
def test_accumulation_gives_the_gradient_of_the_one_big_batch(sizes):
    whole, parts = make_state(), make_state()
    window = make_window(sizes)
    big = [tuple(torch.cat(column) for column in zip(*window))]
    found_whole, found_parts = step(whole, big), step(parts, window)
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        assert (a - b).abs().max() < 1e-12
    for a, b in zip(found_whole[0], found_parts[0]):
        assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), atol=1e-10)


def test_masked_items_weigh_alike_across_a_ragged_window():
    """A task whose items are not samples (as blank cells are): one big batch again."""
    masked = train.Task(
        loss=lambda y, t: nn.functional.cross_entropy(y, t, ignore_index=0, reduction="sum"),
        items=lambda t: (t != 0).sum(),
    )  # fmt: skip
    whole, parts, window = make_state(), make_state(), make_window([3, 6, 2])
    train.train_step(whole, [tuple(torch.cat(c) for c in zip(*window))], masked)
    train.train_step(parts, window, masked)
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        assert (a - b).abs().max() < 1e-12


def test_clipping_is_of_the_unscaled_gradient():
    for fp16 in (False, True):
        state = make_state(torch.float32, fp16=fp16)
        for group in state.optimizer.param_groups:
            group.update(momentum=0, nesterov=False, weight_decay=0)
        before = [p.detach().clone() for p in state.model.parameters()]
        _, norm, good = step(state, make_window([4, 4], torch.float32), clip_grad_norm=0.05)
        moved = torch.cat([(a - b).flatten() for a, b in zip(before, state.model.parameters())])
        assert good and norm > 0.05
        assert moved.norm().item() == pytest.approx(0.1 * 0.05, rel=1e-4)  # lr times the clipped norm


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_step_changes_nothing(fp16, poison):
    state = make_state(torch.float32, "adamw", fp16=fp16, ema=True, norm=True)
    for _ in range(2):
        step(state, make_window([4, 3], torch.float32), ema_decay=0.9)
    frozen = {k: v.clone() for k, v in state.model.state_dict().items()}
    ema = {k: v.clone() for k, v in state.ema.items()}
    moments = [{k: v.clone() for k, v in s.items()} for s in state.optimizer.state.values()]
    scale = state.scaler.get_scale()
    window = make_window([4, 3], torch.float32)
    window[1][0][0, 0, 0, 0] = poison
    _, _, good = step(state, window, clip_grad_norm=1.0, ema_decay=0.9)
    assert not good and (state.step, state.bad_steps, state.bad_in_a_row) == (3, 1, 1)
    assert all(torch.equal(frozen[k], v) for k, v in state.model.state_dict().items())
    assert all(torch.equal(ema[k], v) for k, v in state.ema.items())
    for old, new in zip(moments, state.optimizer.state.values()):
        assert all(torch.equal(old[k], new[k]) for k in old)
    assert state.scaler.get_scale() == (scale / 2 if fp16 else scale)
    assert all(p.grad is None for p in state.model.parameters())
    assert step(state, make_window([4, 3], torch.float32))[2] and state.bad_in_a_row == 0


def test_one_batch_overfits_and_noise_without_inputs_does_not():
    window = make_window([8], torch.float64)
    state, blind = make_state(optimizer="adamw"), make_state(optimizer="adamw")
    for _ in range(150):
        sums = step(state, window)[0]
        blind_sums = step(blind, [(torch.zeros_like(x), t, i) for x, t, i in window])[0]
    assert sums.loss / sums.items < 0.01 < 0.5 < blind_sums.loss / blind_sums.items


def test_ema_has_its_closed_form():
    state = make_state(ema=True)
    names = [n for n, _ in state.model.named_parameters()]
    weights, decays = [state.model.state_dict()[names[0]].clone()], []
    for n in range(20):
        step(state, make_window([4], seed=n), ema_decay=0.7)
        weights.append(state.model.state_dict()[names[0]].clone())
        decays.append(min(0.7, (1 + n) / (10 + n)))
    expected = weights[0] * math.prod(decays)
    for n in range(20):
        expected += weights[n + 1] * (1 - decays[n]) * math.prod(decays[n + 1 :])
    assert (state.ema[names[0]] - expected).abs().max() < 1e-14


def test_ema_covers_buffers_and_copies_counters():
    state = make_state(torch.float32, ema=True, norm=True)
    start = state.ema["2.running_mean"].clone()
    step(state, make_window([4], torch.float32), ema_decay=0.9)
    own = state.model.state_dict()
    assert torch.allclose(state.ema["2.running_mean"], start + 0.9 * (own["2.running_mean"] - start))
    assert state.ema["2.num_batches_tracked"] == own["2.num_batches_tracked"] == 1


def rates_of(scheduler, optimizer, steps, momentum=None):
    found = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        found.append((group["lr"], group["momentum"] if momentum else None))
        optimizer.step()
        if len(found) < steps:
            scheduler.step()
    return found


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("total, pct", [(100, 0.3), (7, 0.5), (1000, 0.05), (3, 0.3), (50, 0.0)])
def test_onecycle_is_torchs(anneal, total, pct):
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        sgd, 0.4, total, pct_start=pct, div_factor=10, final_div_factor=1e3, anneal_strategy=anneal
    )
    for i, (lr, momentum) in enumerate(rates_of(theirs, sgd, total, momentum=True)):
        assert train.onecycle(i, total, 0.4, pct, 10, 1e3, anneal) == pytest.approx((lr, momentum), rel=1e-9)


@pytest.mark.parametrize("total, pct", [(1, 0.3), (2, 0.5), (1, 1.0), (4, 0.25), (10, 1.0)])
def test_onecycle_stands_where_torchs_divides_by_zero(total, pct):
    lrs = [train.onecycle(i, total, 0.4, pct, 10, 1e3)[0] for i in range(total)]
    assert all(0.4 / 1e4 - 1e-12 <= lr <= 0.4 + 1e-12 for lr in lrs)


@pytest.mark.parametrize("total, warm", [(60, 0), (60, 10), (10, 9)])
def test_cosine_with_warmup_is_torchs(total, warm):
    schedulers = torch.optim.lr_scheduler
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.4)
    theirs = schedulers.CosineAnnealingLR(sgd, total - warm)
    if warm:
        sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.4)
        rise = schedulers.LinearLR(sgd, 1 / warm, total_iters=warm - 1)
        theirs = schedulers.SequentialLR(sgd, [rise, schedulers.CosineAnnealingLR(sgd, total - warm)], [warm])
    for i, (lr, _) in enumerate(rates_of(theirs, sgd, total)):
        assert train.cosine(i, total, 0.4, warm)[0] == pytest.approx(lr, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_is_torchs(higher, patience):
    values = torch.rand(60, generator=torch.Generator().manual_seed(patience)).tolist()
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        sgd, "max" if higher else "min", 0.5, patience, threshold=0.01, threshold_mode="abs", eps=0
    )
    for n, value in enumerate(values):
        theirs.step(value)
        cuts = train.plateau_cuts(values[: n + 1], patience, higher, 0.01)
        assert train.constant(500, 1.0, 10, 0.5**cuts)[0] == sgd.param_groups[0]["lr"]


def test_warmup_rises_by_equal_steps():
    assert [train.constant(i, 2.0, 4)[0] for i in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_epochs_since_best_counts_gains_over_min_delta_and_never_a_nan():
    assert train.epochs_since_best([0.1, 0.3, 0.2], True) == 1
    assert train.epochs_since_best([0.3, 0.1, 0.2], False) == 1
    assert train.epochs_since_best([0.5, 0.505, 0.509], True, 0.01) == 2
    assert train.epochs_since_best([0.5, math.nan, math.nan], True) == 2


def test_windows_keep_the_trailing_batches():
    assert list(train.windows(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(train.windows(range(2), 5)) == [[0, 1]]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_find_lr_leaves_everything_as_it_was(optimizer):
    state = make_state(torch.float32, optimizer, fp16=True, ema=True, norm=True)
    for _ in range(3):
        step(state, make_window([4, 3], torch.float32), ema_decay=0.9)
    torch.manual_seed(5)
    before, rng = train.copy.deepcopy(state.to_checkpoint()), torch.get_rng_state()
    torch.rand(1)
    torch.set_rng_state(rng)
    window = make_window([8, 8], torch.float32)
    torch.set_rng_state(rng)
    rates, losses, found = train.find_lr(state, lambda: window, lambda s, w: (torch.rand(3), step(s, w))[1])
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same(before, state.to_checkpoint())
    assert rates == sorted(rates) and len(rates) == len(losses) >= 10
    assert set(found) == {"steepest", "valley", "minimum/10"} and all(1e-6 <= r <= 10 for r in found.values())


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_find_lr_restores_after_an_error_and_stops_at_a_nan():
    state, window = make_state(torch.float32, norm=True), make_window([8], torch.float32)
    before = train.copy.deepcopy(state.to_checkpoint())
    calls = iter([window] * 12)

    def failing(state, window):
        if window is None:
            raise KeyboardInterrupt
        return step(state, window)

    with pytest.raises(KeyboardInterrupt):
        train.find_lr(state, lambda: next(calls, None), failing)
    assert_same(before, state.to_checkpoint())

    broken = make_window([8], torch.float32)
    broken[0][0][0] = math.nan
    calls = iter([window] * 40)
    rates, _, _ = train.find_lr(state, lambda: next(calls, broken), step)
    assert len(rates) <= 40
    assert_same(before, state.to_checkpoint())


def test_find_lr_goes_on_after_an_fp16_overflow():
    """At a scale of 2^127 the first gradients overflow; the sweep halves it and keeps every rate."""
    state = make_state(torch.float32, fp16=True)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1)
    window = make_window([8], torch.float32)
    rates, _, _ = train.find_lr(state, lambda: window, step)
    assert rates[0] == pytest.approx(1e-6) and len(rates) > 50


def test_suggestions_on_a_curve_with_known_answers():
    """Flat, a straight descent over log rate from 1e-4 to 1e-1, then a rise: the rules' places follow by hand."""
    rates = [10 ** (-6 + 7 * i / 99) for i in range(100)]
    losses = [2.0 if r < 1e-4 else 2 - (math.log10(r) + 4) / 3 if r <= 1e-1 else 1 + math.log10(r * 10) for r in rates]
    found = train.suggest_lr(rates, losses)
    assert 1e-4 < found["steepest"] < 1e-1
    assert math.log10(found["valley"]) == pytest.approx(-2, abs=0.15)
    assert math.log10(found["minimum/10"]) == pytest.approx(-2, abs=0.1)


@torch.no_grad()
def test_evaluation_counts_each_item_once_whatever_the_batches():
    state = make_state(torch.float64, norm=True)
    window = make_window([30])
    images, labels, index = window[0]
    state.model.train()
    whole = train.evaluate(state.model, window, TASK, lambda x: x)
    for size in (1, 7, 16):
        parts = zip(images.split(size), labels.split(size), index.split(size))
        found = train.evaluate(state.model, parts, TASK, lambda x: x)
        assert found["loss"] == pytest.approx(whole["loss"], abs=1e-12) and found["accuracy"] == whole["accuracy"]
    state.model.eval()
    assert whole["accuracy"] == (state.model(images).argmax(1) == labels).double().mean()
    assert state.model(images).shape == (30, 3)


def test_evaluation_with_ema_weights_leaves_the_model_alone():
    state = make_state(torch.float64, norm=True)
    other = {k: v * 2 if v.is_floating_point() else v for k, v in state.model.state_dict().items()}
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    found = train.evaluate(state.model, make_window([9]), TASK, lambda x: x, weights=other)
    assert all(torch.equal(before[k], v) for k, v in state.model.state_dict().items()) and state.model.training
    state.model.load_state_dict(other)
    assert train.evaluate(state.model, make_window([9]), TASK, lambda x: x) == found


# ------------------------------------------------------------------------------------------------ Muon


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_moves_filters_as_torchs_moves_their_matrices(memory_format):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8, 2))
    net.to(memory_format=memory_format)
    muon, adamw = train.build_optimizer(net, "muon", 0.1, 0.01, 0.9, torch.device("cpu")).parts
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(8, 3, 3, 3)]  # no depthwise filter, no head
    order = (0, 2, 3, 1) if memory_format is torch.channels_last else (0, 1, 2, 3)
    matrix = nn.Parameter(net[0].weight.detach().permute(order).flatten(1).clone())
    reference = torch.optim.Muon([matrix], 0.05, 0.01, 0.8, adjust_lr_fn="match_rms_adamw")
    train.set_rates(train.Together(muon, adamw), 0.05, 0.8)
    for _ in range(3):
        net(torch.randn(4, 3, 5, 5)).square().sum().backward()
        matrix.grad = net[0].weight.grad.permute(order).flatten(1).clone()
        muon.step()
        reference.step()
        net.zero_grad()
        assert torch.equal(net[0].weight.permute(order).flatten(1), matrix)


def test_split_keeps_every_sample_in_order_and_none_alone():
    window = make_window([9, 4, 1])
    parts = train.split(window, 4)
    assert [len(images) for images, *_ in parts] == [4, 5, 4, 1]
    assert all(torch.equal(torch.cat(a), torch.cat(b)) for a, b in zip(zip(*parts), zip(*window)))
    assert train.split(window, None) is window


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_fused_optimizer_is_the_plain_one(name):
    fused, plain = make_state(torch.float32, name), make_state(torch.float32, name)
    for group in plain.optimizer.param_groups:
        group["fused"] = False
    for seed in range(5):
        for state in (fused, plain):
            step(state, make_window([4, 3], torch.float32, seed))
    for a, b in zip(fused.model.parameters(), plain.model.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


# ------------------------------------------------------------------------------- sharpness-aware steps


def plain_sgd(state):
    for group in state.optimizer.param_groups:
        group.update(momentum=0, nesterov=False, weight_decay=0)
    return state


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_sharpness_aware_step_is_the_one_worked_out_by_hand(clip):
    """Linear regression in float64: the gradient is 2 X^T (X w - y) / n, taken at w + rho g / |g|."""
    torch.manual_seed(0)
    X, y = torch.randn(11, 4, dtype=torch.float64), torch.randn(11, 1, dtype=torch.float64)
    layer = nn.Linear(4, 1, bias=False).double()
    w = layer.weight.detach().clone().T
    gradient = lambda w: 2 * X.T @ (X @ w - y) / 11
    g = gradient(w)
    g = gradient(w + 0.3 * g / g.norm())
    g = g * min(1.0, clip / g.norm()) if clip else g
    state = plain_sgd(train.TrainState(layer, train.build_optimizer(layer, "sgd", 0.1, 0, 0.9, torch.device("cpu")),
                                       torch.amp.GradScaler("cpu", enabled=False)))  # fmt: skip
    task = train.Task(loss=lambda out, t: (out - t).square().sum())
    window = [(X[i:j], y[i:j], None) for i, j in ((0, 4), (4, 9), (9, 11))]
    sums, norm, good = train.train_step(state, window, task, clip_grad_norm=clip, sam_rho=0.3)
    far = (layer.weight.detach().T - (w - 0.1 * g)).abs().max()
    assert good and far < (1e-6 if clip else 1e-14)  # torch's clipping adds 1e-6 to the norm
    assert abs(sums.loss / 11 - (X @ w - y).square().mean()) < 1e-12  # the loss that is told is at the weights


def test_sharpness_aware_windows_equal_the_one_big_batch():
    whole, parts, window = make_state(), make_state(), make_window([4, 4, 2])
    for state, batches in ((whole, [tuple(torch.cat(c) for c in zip(*window))]), (parts, window)):
        step(state, batches, sam_rho=0.2, clip_grad_norm=0.5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        assert (a - b).abs().max() < 1e-12
    plain = make_state()
    step(plain, window, clip_grad_norm=0.5)
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(plain.model.parameters(), parts.model.parameters()))


def test_a_scale_of_fp16_leaves_the_sharpness_aware_step_as_it_is():
    """With the scaler on and float32 arithmetic, to rounding."""
    plain, scaled = make_state(torch.float32), make_state(torch.float32, fp16=True)
    for state in (plain, scaled):
        for seed in range(3):
            assert step(state, make_window([4, 3], torch.float32, seed), sam_rho=0.1, clip_grad_norm=1.0)[2]
    for a, b in zip(plain.model.parameters(), scaled.model.parameters()):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sharpness_aware_step_in_half_precision_is_the_one_of_float32(dtype):
    moves = {}
    for used, rho in ((torch.float32, 1.0), (dtype, 1.0), (torch.float32, 0.0)):
        state = plain_sgd(make_state(torch.float32, fp16=used == torch.float16))
        before = nn.utils.parameters_to_vector(state.parameters).detach().clone()
        window = make_window([5, 4, 2], torch.float32)
        assert step(state, window, dtype=used, sam_rho=rho, clip_grad_norm=1.0)[2]
        moves[used, rho] = nn.utils.parameters_to_vector(state.parameters).detach() - before
    far = lambda key: (moves[key] - moves[torch.float32, 1.0]).norm() / moves[torch.float32, 1.0].norm()
    assert far((dtype, 1.0)) < 0.03 < 0.1 < far((torch.float32, 0.0))


def test_the_second_pass_holds_buffers_and_draws_again():
    """Buffers move as in a plain step, and dropout masks are those of the first pass."""
    masks, states = [], []
    for rho in (0.0, 0.1):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))
        net[3].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
        optimizer = train.build_optimizer(net, "sgd", 0.1, 0.0, 0.9, torch.device("cpu"))
        states.append(train.TrainState(net, optimizer, torch.amp.GradScaler("cpu", enabled=False)))
        step(states[-1], make_window([5, 4], torch.float32), sam_rho=rho, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(*(state.buffers for state in states)))
    assert len(masks) == 6 and torch.equal(masks[2], masks[4]) and torch.equal(masks[3], masks[5])
    masks.clear()
    step(states[1], make_window([5, 4], torch.float32), sam_rho=0.1)  # without a seed too
    assert torch.equal(masks[0], masks[2]) and torch.equal(masks[1], masks[3])
    assert not torch.equal(masks[0][:4], masks[1])


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("when", ["first", "second"])
def test_an_ascent_that_is_not_finite_gives_every_weight_back_bitwise(fp16, when):
    state = make_state(torch.float32, "adamw", fp16=fp16, ema=True, norm=True)
    step(state, make_window([4, 3], torch.float32), sam_rho=0.1, ema_decay=0.9)
    frozen, ema = ({k: v.clone() for k, v in held.items()} for held in (state.model.state_dict(), state.ema))
    scale, calls = state.scaler.get_scale(), []

    def poisoned(images, targets, index):
        calls.append(1)
        bad = len(calls) in ((1, 3) if when == "first" else (3,))
        return images * (math.inf if bad else 1.0), targets

    _, _, good = step(state, make_window([4, 3], torch.float32), augment=poisoned, sam_rho=0.1, ema_decay=0.9)
    assert not good and len(calls) == 4 and state.bad_steps == 1
    assert all(torch.equal(v, frozen[k]) for k, v in state.model.state_dict().items())
    assert all(torch.equal(ema[k], v) for k, v in state.ema.items())
    assert state.scaler.get_scale() == (scale / 2 if fp16 else scale)


def test_out_of_memory_in_the_second_pass_gives_the_weights_back_and_starts_again():
    whole, failed, calls = make_state(), make_state(), []

    def short(images, targets, index):
        calls.append(len(images))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return images, targets

    step(failed, make_window([8]), augment=short, sam_rho=0.1)
    step(whole, make_window([8]), sam_rho=0.1)
    assert calls == [8, 8, 4, 4, 4, 4]
    for a, b in zip(whole.model.parameters(), failed.model.parameters()):
        assert (a - b).abs().max() < 1e-12


# --------------------------------------------------------------------------- freezing and averaging


def test_freezing_trains_the_head_alone_and_holds_the_backbones_statistics():
    state = make_state(torch.float32, "adamw", norm=True)
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    train.freeze(state, True)
    step(state, make_window([6], torch.float32))
    after = state.model.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"4.weight", "4.bias"}
    train.freeze(state, False)
    step(state, make_window([6], torch.float32))
    assert all(p.requires_grad for p in state.parameters) and state.model.training
    assert not any(torch.equal(before[k], v) for k, v in state.model.state_dict().items() if "num" not in k)


@pytest.mark.parametrize("anneal", [1, 4, 10])
def test_the_rate_of_swa_is_torchs(anneal):
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.4)
    theirs = torch.optim.swa_utils.SWALR(sgd, swa_lr=0.05, anneal_epochs=anneal)
    for i, (lr, _) in enumerate(rates_of(theirs, sgd, 14)):
        assert train.swa_rate(7 + i, 7, anneal, 0.4, 0.05) == pytest.approx(lr, rel=1e-9)


def test_training_accuracy_on_soft_targets_is_the_share_of_what_was_chosen():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.6, 0.4, 0.0], [0.0, 0.0, 1.0]])
    sums, count = utils.image_metrics(logits, soft)
    assert sums.tolist() == pytest.approx([0.7 + 0.4 + 1.0]) and count == 3
    assert utils.image_metrics(logits, torch.tensor([0, 0, 2]))[0].item() == 2


def test_mixing_draws_anew_each_epoch():
    config, _ = train.parse_flags("--model custom --mixup 0.5 --crop_padding 0 --flip False".split())
    meta = {"image_size": 8, "num_classes": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    augment = train.image_augment(config, meta, torch.contiguous_format)
    images, labels = torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8), torch.tensor([0, 1, 2, 0, 1, 2])
    (a, s), (b, t), (c, u) = (augment(images, labels, torch.arange(6), epoch) for epoch in (0, 0, 1))
    assert torch.equal(a, b) and torch.equal(s, t) and not torch.equal(a, c) and not torch.equal(s, u)
