"""The loop's arithmetic: accumulation, clipping, bad steps, EMA, SAM, schedules, the LR finder."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import model as models
import train
import utils

CPU = torch.device("cpu")
TASK = train.Task(
    loss=lambda y, t: nn.functional.cross_entropy(y, t, reduction="sum"),
    measure=lambda y, t: ((y.argmax(1) == t).sum()[None], len(t)),
    metrics=("accuracy",),
)
step = partial(train.train_step, task=TASK)


def state_of(net, optimizer="sgd", fp16=False, ema=False):
    chosen = models.build_optimizer(net, optimizer, 0.1, 0.01, 0.9, CPU)
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    return train.TrainState(net, chosen, scaler, train.start_ema(net) if ema else None)


def make_state(dtype=torch.float64, optimizer="sgd", fp16=False, ema=False, norm=False):
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(16)] * norm
    layers = nn.Flatten(), nn.Linear(12, 16), *norms, nn.Tanh(), nn.Linear(16, 3)
    return state_of(nn.Sequential(*layers).to(dtype), optimizer, fp16, ema)


def plain_sgd(state):
    for group in state.optimizer.param_groups:
        group.update(momentum=0, nesterov=False, weight_decay=0)
    return state


def make_window(sizes, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    count = sum(sizes)
    images, labels = torch.randn(count, 2, 2, 3, dtype=dtype), torch.randint(0, 3, (count,))
    return list(zip(images.split(sizes), labels.split(sizes), torch.arange(count).split(sizes)))


def joined(window):
    """The window as one big batch."""
    return [tuple(torch.cat(column) for column in zip(*window))]


def weights(state):
    return nn.utils.parameters_to_vector(state.parameters).detach().clone()


def far(a, b):
    return (weights(a) - weights(b)).abs().max()


def snapshot(state):
    return copy.deepcopy(state.to_checkpoint())


def assert_same(a, b):
    """Bitwise equality of nested dicts and lists of tensors and numbers."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


# ------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("options", [{}, {"sam_rho": 0.2, "clip_grad_norm": 0.5}])
@pytest.mark.parametrize("sizes", [[4, 4, 2], [1, 7, 3, 5], [5], [1, 1, 1, 9]])
def test_a_window_gives_the_step_of_the_one_big_batch(sizes, options):
    whole, parts, window = make_state(), make_state(), make_window(sizes)
    found = [step(state, batches, **options)
             for state, batches in ((whole, joined(window)), (parts, window))]
    assert far(whole, parts) < 1e-12
    assert torch.allclose(found[0][0], found[1][0], atol=1e-10)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-10)


def test_masked_items_weigh_alike_across_a_ragged_window():
    """A task whose items are not samples (as blank cells are): one big batch again."""
    masked = train.Task(
        loss=lambda y, t: nn.functional.cross_entropy(y, t, ignore_index=0, reduction="sum"),
        items=lambda t: (t != 0).sum(),
    )
    whole, parts, window = make_state(), make_state(), make_window([3, 6, 2])
    totals = [train.train_step(state, batches, masked)[0]
              for state, batches in ((whole, joined(window)), (parts, window))]
    assert far(whole, parts) < 1e-12
    assert totals[0][1, 0] == totals[1][1, 0] == sum((t != 0).sum() for _, t, _ in window)


def test_means_leave_out_what_was_never_counted_and_are_nan_without_items():
    task = train.Task(loss=None, metrics=("a", "a_hard"))
    totals = torch.tensor([[6.0, 2.0, 0.0], [4.0, 8.0, 0.0]])
    assert train.means(totals, task) == {"loss": 1.5, "a": 0.25}
    none = train.means(train.zero_totals(task, CPU), task)
    assert none.keys() == {"loss", "a", "a_hard"} and all(map(math.isnan, none.values()))


@pytest.mark.parametrize("fp16", [False, True])
def test_clipping_is_of_the_unscaled_gradient(fp16):
    state = plain_sgd(make_state(torch.float32, fp16=fp16))
    before = weights(state)
    _, norm, good = step(state, make_window([4, 4], torch.float32), clip_grad_norm=0.05)
    assert good and norm > 0.05
    moved = (weights(state) - before).norm().item()
    assert moved == pytest.approx(0.1 * 0.05, rel=1e-4)  # the learning rate times the clipped norm


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_step_changes_nothing(fp16, poison):
    state = make_state(torch.float32, "adamw", fp16=fp16, ema=True, norm=True)
    for _ in range(2):
        step(state, make_window([4, 3], torch.float32), ema_decay=0.9)
    before, scale = snapshot(state), state.scaler.get_scale()
    window = make_window([4, 3], torch.float32)
    window[1][0][0, 0, 0, 0] = poison
    _, _, good = step(state, window, clip_grad_norm=1.0, ema_decay=0.9)
    assert not good and (state.step, state.bad_steps, state.bad_in_a_row) == (3, 1, 1)
    after = state.to_checkpoint()
    for name in ("model", "ema", "optimizer"):
        assert_same(before[name], after[name])
    assert state.scaler.get_scale() == (scale / 2 if fp16 else scale)
    assert all(p.grad is None for p in state.parameters)
    assert step(state, make_window([4, 3], torch.float32))[2] and state.bad_in_a_row == 0


def test_one_batch_overfits_and_noise_without_inputs_does_not():
    window = make_window([8])
    blind_window = [(torch.zeros_like(x), t, i) for x, t, i in window]
    state, blind = make_state(optimizer="adamw"), make_state(optimizer="adamw")
    for _ in range(150):
        seen, unseen = step(state, window)[0], step(blind, blind_window)[0]
    assert seen[0, 0] / seen[1, 0] < 0.01 < 0.5 < unseen[0, 0] / unseen[1, 0]


def test_ema_has_its_closed_form():
    state, name = make_state(ema=True), "1.weight"
    seen, decays = [state.model.state_dict()[name].clone()], []
    for n in range(20):
        step(state, make_window([4], seed=n), ema_decay=0.7)
        seen.append(state.model.state_dict()[name].clone())
        decays.append(min(0.7, (1 + n) / (10 + n)))
    expected = seen[0] * math.prod(decays)
    for n in range(20):
        expected += seen[n + 1] * (1 - decays[n]) * math.prod(decays[n + 1 :])
    assert (state.ema[name] - expected).abs().max() < 1e-14


def test_ema_covers_buffers_and_copies_counters():
    state, name = make_state(torch.float32, ema=True, norm=True), "2.running_mean"
    start = state.ema[name].clone()
    step(state, make_window([4], torch.float32), ema_decay=0.9)
    own = state.model.state_dict()
    assert torch.allclose(state.ema[name], start + 0.9 * (own[name] - start))
    assert state.ema["2.num_batches_tracked"] == own["2.num_batches_tracked"] == 1


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_fused_optimizer_is_the_plain_one(name):
    fused, plain = make_state(torch.float32, name), make_state(torch.float32, name)
    for group in plain.optimizer.param_groups:
        group["fused"] = False
    for seed in range(5):
        for state in (fused, plain):
            step(state, make_window([4, 3], torch.float32, seed))
    assert far(fused, plain) < 1e-5


def test_split_keeps_every_sample_in_order_and_none_alone():
    window = make_window([9, 4, 1])
    parts = train.split(window, 4)
    assert [len(images) for images, *_ in parts] == [4, 5, 4, 1]
    assert_same(joined(parts), joined(window))
    assert train.split(window, None) is window


def test_windows_keep_the_trailing_batches_and_count_their_samples():
    pieces = [torch.arange(n) for n in (3, 3, 3, 2)]
    found = list(train.fetch_windows(iter, pieces, 3))
    assert [(len(window), samples) for window, samples in found] == [(3, 9), (1, 2)]
    assert all(a is b for a, b in zip(sum((window for window, _ in found), []), pieces))


# ------------------------------------------------------------------------ sharpness-aware steps


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_sharpness_aware_step_is_the_one_worked_out_by_hand(clip):
    """Linear regression: the gradient is 2 X^T (X w - y) / n, taken at w + rho g / |g|."""
    torch.manual_seed(0)
    X, y = torch.randn(11, 4, dtype=torch.float64), torch.randn(11, 1, dtype=torch.float64)
    layer = nn.Linear(4, 1, bias=False).double()
    w = layer.weight.detach().clone().T
    gradient = lambda w: 2 * X.T @ (X @ w - y) / 11
    g = gradient(w)
    g = gradient(w + 0.3 * g / g.norm())
    g = g * min(1.0, clip / g.norm()) if clip else g
    state = plain_sgd(state_of(layer))
    task = train.Task(loss=lambda out, t: (out - t).square().sum())
    window = [(X[i:j], y[i:j], None) for i, j in ((0, 4), (4, 9), (9, 11))]
    totals, _, good = train.train_step(state, window, task, clip_grad_norm=clip, sam_rho=0.3)
    error = (layer.weight.detach().T - (w - 0.1 * g)).abs().max()
    assert good and error < (1e-6 if clip else 1e-14)  # torch's clipping adds 1e-6 to the norm
    assert abs(totals[0, 0] / 11 - (X @ w - y).square().mean()) < 1e-12  # before the ascent


def test_a_scale_of_fp16_leaves_the_sharpness_aware_step_as_it_is():
    """With the scaler on and float32 arithmetic, to rounding."""
    plain, scaled = make_state(torch.float32), make_state(torch.float32, fp16=True)
    for seed in range(3):
        for state in (plain, scaled):
            window = make_window([4, 3], torch.float32, seed)
            assert step(state, window, sam_rho=0.1, clip_grad_norm=1.0)[2]
    assert torch.allclose(weights(plain), weights(scaled), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sharpness_aware_step_in_half_precision_is_the_one_of_float32(dtype):
    moves = []
    for used, rho in ((torch.float32, 1.0), (dtype, 1.0), (torch.float32, 0.0)):
        state = plain_sgd(make_state(torch.float32, fp16=used == torch.float16))
        before, window = weights(state), make_window([5, 4, 2], torch.float32)
        assert step(state, window, dtype=used, sam_rho=rho, clip_grad_norm=1.0)[2]
        moves.append(weights(state) - before)
    exact, half, plain = moves
    assert (half - exact).norm() < 0.03 * exact.norm()
    assert (plain - exact).norm() > 0.1 * exact.norm()  # so the ascent matters here


def test_the_second_pass_holds_buffers_and_draws_again():
    """Buffers move as in a plain step, and dropout masks are those of the first pass."""
    masks, states, window = [], [], make_window([5, 4], torch.float32)
    for rho in (0.0, 0.1):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.5),
                            nn.Linear(16, 3))
        net[3].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
        states.append(state_of(net))
        step(states[-1], window, sam_rho=rho, seed=7)
    assert_same(states[0].buffers, states[1].buffers)
    assert len(masks) == 6 and torch.equal(masks[2], masks[4]) and torch.equal(masks[3], masks[5])
    masks.clear()
    step(states[1], window, sam_rho=0.1)  # without a seed too
    assert torch.equal(masks[0], masks[2]) and torch.equal(masks[1], masks[3])
    assert not torch.equal(masks[0][:4], masks[1])


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("bad", [(1, 3), (3,)])  # the batches that are not finite; two a pass
def test_an_ascent_that_is_not_finite_gives_every_weight_back_bitwise(fp16, bad):
    state = make_state(torch.float32, "adamw", fp16=fp16, ema=True, norm=True)
    window, calls = make_window([4, 3], torch.float32), []
    step(state, window, sam_rho=0.1, ema_decay=0.9)
    before, scale = snapshot(state), state.scaler.get_scale()

    def poisoned(images, targets, index):
        calls.append(1)
        return images * (math.inf if len(calls) in bad else 1.0), targets

    good = step(state, window, augment=poisoned, sam_rho=0.1, ema_decay=0.9)[2]
    assert not good and len(calls) == 4 and state.bad_steps == 1
    after = state.to_checkpoint()
    for name in ("model", "ema", "optimizer"):
        assert_same(before[name], after[name])
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
    assert far(whole, failed) < 1e-12


# ------------------------------------------------------------------------------------ schedules


def one_weight(lr, momentum=0.0):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr, momentum=momentum)


def rates_of(scheduler, optimizer, steps):
    """[(learning rate, momentum)] of each step of one of torch's schedulers."""
    found = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        found.append((group["lr"], group["momentum"]))
        optimizer.step()
        if len(found) < steps:
            scheduler.step()
    return found


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("total, pct", [(100, 0.3), (7, 0.5), (300, 0.05), (3, 0.3), (50, 0.0)])
def test_onecycle_is_torchs(anneal, total, pct):
    sgd = one_weight(0.1, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        sgd, 0.4, total, pct_start=pct, div_factor=10, final_div_factor=1e3, anneal_strategy=anneal
    )
    for i, expected in enumerate(rates_of(theirs, sgd, total)):
        ours = train.onecycle(i, total, 0.4, pct, 10, 1e3, anneal)
        assert ours == pytest.approx(expected, rel=1e-9)
    assert train.onecycle(1, total, 0.4, cycle_momentum=False)[1] is None


@pytest.mark.parametrize("total, pct", [(1, 0.3), (2, 0.5), (1, 1.0), (4, 0.25), (10, 1.0)])
def test_onecycle_stands_where_torchs_divides_by_zero(total, pct):
    lrs = [train.onecycle(i, total, 0.4, pct, 10, 1e3)[0] for i in range(total)]
    assert all(0.4 / 1e4 - 1e-12 <= lr <= 0.4 + 1e-12 for lr in lrs)


@pytest.mark.parametrize("total, warm", [(60, 0), (60, 10), (10, 9)])
def test_cosine_with_warmup_is_torchs(total, warm):
    schedulers, sgd = torch.optim.lr_scheduler, one_weight(0.4)
    if warm:  # the rise comes first: each scheduler sets the rate as it is made
        rise = schedulers.LinearLR(sgd, 1 / warm, total_iters=warm - 1)
        fall = schedulers.CosineAnnealingLR(sgd, total - warm)
        theirs = schedulers.SequentialLR(sgd, [rise, fall], [warm])
    else:
        theirs = schedulers.CosineAnnealingLR(sgd, total)
    for i, (lr, _) in enumerate(rates_of(theirs, sgd, total)):
        assert train.cosine(i, total, 0.4, warm)[0] == pytest.approx(lr, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("monitor, sign", [("val_accuracy", 1), ("val_loss", -1)])
@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_is_torchs_for_metrics_of_either_direction(monitor, sign, patience):
    numbers = torch.rand(60, generator=torch.Generator().manual_seed(patience)).tolist()
    sgd = one_weight(1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        sgd, "max" if sign > 0 else "min", 0.5, patience, 0.01, "abs", eps=0
    )
    run = SimpleNamespace(args=SimpleNamespace(monitor=monitor))
    state = SimpleNamespace(history=[])
    for number in numbers:
        theirs.step(number)
        state.history += [{"val_loss": 0.0, monitor: number}, {"train_loss": 0.0}]  # not validated
        values = train.monitored(state, run)
        assert values[-1] == sign * number
        ours, _ = train.plateau(500, 1000, 1.0, 10, values, patience, 0.5, 0.01)
        assert ours == sgd.param_groups[0]["lr"]


def test_warmup_rises_by_equal_steps():
    expected = [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    for schedule in (train.constant, train.plateau):
        assert [schedule(i, 6, 2.0, 4)[0] for i in range(6)] == expected


def test_epochs_since_best_counts_gains_over_min_delta_and_never_a_nan():
    assert train.epochs_since_best([0.1, 0.3, 0.2]) == 1
    assert train.epochs_since_best([0.5, 0.505, 0.509], 0.01) == 2
    assert train.epochs_since_best([0.5, math.nan, math.nan]) == 2
    assert train.epochs_since_best([math.nan, math.nan]) == 2


# ------------------------------------------------------------------------------------ LR finder


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_find_lr_leaves_everything_as_it_was(optimizer):
    state = make_state(torch.float32, optimizer, fp16=True, ema=True, norm=True)
    for _ in range(3):
        step(state, make_window([4, 3], torch.float32), ema_decay=0.9)
    window, before, rng = make_window([8, 8], torch.float32), snapshot(state), torch.get_rng_state()
    draw_and_step = lambda state, window: (torch.rand(3), step(state, window))[1]
    rates, losses, found = train.find_lr(state, lambda: window, draw_and_step)
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same(before, state.to_checkpoint())
    assert rates == sorted(rates) and len(rates) == len(losses) >= 10
    assert found in rates and all(1e-6 <= rate <= 10 for rate in rates)


def test_find_lr_restores_after_an_error_and_stops_at_a_nan():
    state, window = make_state(torch.float32, norm=True), make_window([8], torch.float32)
    before, calls = snapshot(state), iter([window] * 12)

    def interrupted(state, window):
        if window is None:
            raise KeyboardInterrupt
        return step(state, window)

    with pytest.raises(KeyboardInterrupt):
        train.find_lr(state, lambda: next(calls, None), interrupted)
    assert_same(before, state.to_checkpoint())

    broken = make_window([8], torch.float32)
    broken[0][0][0] = math.nan
    for healthy in (9, 10, 40):
        calls = iter([window] * healthy)
        try:
            rates, _, _ = train.find_lr(state, lambda: next(calls, broken), step)
            assert len(rates) == healthy >= 10
        except ValueError as error:
            assert healthy == 9 and "diverged after 9 rates" in str(error)
        assert_same(before, state.to_checkpoint())


def test_find_lr_goes_on_after_an_fp16_overflow():
    """At a scale of 2^127 the first gradients overflow: it is halved and every rate is kept."""
    state = make_state(torch.float32, fp16=True)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1)
    window = make_window([8], torch.float32)
    rates, _, _ = train.find_lr(state, lambda: window, step)
    assert rates[0] == pytest.approx(1e-6) and len(rates) > 50


def test_the_valley_of_a_curve_with_a_known_one():
    """Flat, a straight descent over log(rate) from 1e-4 to 1e-1, a rise: the places by hand."""
    logs = [-6 + 7 * i / 99 for i in range(100)]
    loss = lambda x: 2.0 if x < -4 else 2 - (x + 4) / 3 if x <= -1 else 2 + x
    found = train.valley([10**x for x in logs], [loss(x) for x in logs])
    assert math.log10(found) == pytest.approx(-2, abs=0.15)


# ----------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def test_evaluation_counts_each_item_once_whatever_the_batches():
    state, window = make_state(norm=True), make_window([30])
    images, labels, index = window[0]
    whole = train.evaluate(state.model, window, TASK)
    for size in (1, 7, 16):
        parts = zip(images.split(size), labels.split(size), index.split(size))
        found = train.evaluate(state.model, parts, TASK)
        assert found["loss"] == pytest.approx(whole["loss"], abs=1e-12)
        assert found["accuracy"] == whole["accuracy"]
    assert state.model.training
    state.model.eval()
    assert whole["accuracy"] == (state.model(images).argmax(1) == labels).double().mean()


def test_evaluation_with_ema_weights_leaves_the_model_alone():
    state, window = make_state(norm=True), make_window([9])
    own = {k: v.clone() for k, v in state.model.state_dict().items()}
    other = {k: v * 2 if v.is_floating_point() else v for k, v in own.items()}
    found = train.evaluate(state.model, window, TASK, weights=other)
    assert_same(own, dict(state.model.state_dict()))
    assert state.model.training and found != train.evaluate(state.model, window, TASK)
    state.model.load_state_dict(other)
    assert train.evaluate(state.model, window, TASK) == found


@torch.no_grad()
def test_evaluation_prepares_its_inputs_and_averages_their_views():
    state, window = make_state(), make_window([9])
    images, labels, _ = window[0]
    views = lambda x: [(x, 0.25), (-x, 0.75)]
    found = train.evaluate(state.model, window, TASK, lambda x: x / 2, views=views)
    logits = 0.25 * state.model(images / 2) + 0.75 * state.model(-images / 2)
    expected = nn.functional.cross_entropy(logits, labels).item()
    assert found["loss"] == pytest.approx(expected, abs=1e-12)


# --------------------------------------------------------------------------------------- mixing


def test_training_accuracy_on_soft_targets_is_the_share_of_what_was_chosen():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.6, 0.4, 0.0], [0.0, 0.0, 1.0]])
    right, count = utils.image_metrics(logits, soft)
    assert right.tolist() == pytest.approx([0.7 + 0.4 + 1.0]) and count is None
    assert utils.image_metrics(logits, torch.tensor([0, 0, 2]))[0].item() == 2


def test_mixing_draws_anew_each_epoch():
    words = "--model custom --mixup 0.5 --crop_padding 0 --flip False"
    args, _ = train.parse_flags(words.split())
    meta = {"image_size": 8, "num_classes": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    images = torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8)
    batch = images, torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6)
    augment = partial(train.augment_images, args, meta, torch.contiguous_format, *batch)
    (a, s), (b, t), (c, u) = map(augment, (0, 0, 1))
    assert torch.equal(a, b) and torch.equal(s, t)
    assert not torch.equal(a, c) and not torch.equal(s, u)
