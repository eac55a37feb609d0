"""dino.py against plain loops, torch's weight norm and its distributions."""
import math
from collections import Counter
from datetime import timedelta
from decimal import Decimal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.nn.utils import get_total_norm, parametrizations

import dino
import vit
from dino import DINOHead, DINOLoss, cosine, entropy, teacher_temperature


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def full_head():
    torch.manual_seed(0)
    return DINOHead(384)


# ---- schedules

# batch 1024, 200 epochs of 1,251 steps: step, learning rate, weight decay, teacher momentum, to the digits printed
TABLE = [
    (0, "0", "0.04", "0.996"),
    (1, "1.5988e-7", "0.04", "0.996"),
    (1251, "2.00016e-4", "0.0400222", "0.9960002467"),
    (12509, "2.0000000e-3", "0.0422157", "0.9960246194"),
    (12510, "2.0000000e-3", "0.0422161", "0.9960246233"),
    (62550, "1.7892459e-3", "0.0927208", "0.9965857864"),
    (125100, "1.0830381e-3", "0.2200000", "0.9980000000"),
    (250199, "1.0000001e-6", "0.4000000", "1.0000000000"),
]


@pytest.mark.parametrize("step, lr, wd, momentum", TABLE)
def test_schedules_of_the_paper_run(step, lr, wd, momentum):
    total, warmup = 200 * 1251, 10 * 1251
    for got, printed in ((cosine(step, 5e-4 * 1024 / 256, 1e-6, total, warmup), lr),
                         (cosine(step, 0.04, 0.4, total), wd), (cosine(step, 0.996, 1.0, total), momentum)):
        last_digit = 10.0 ** Decimal(printed).as_tuple().exponent
        assert abs(got - float(printed)) <= 0.501 * last_digit


@pytest.mark.parametrize("warmup", [0, 1, 2, 7, 30])
@pytest.mark.parametrize("base, final", [(2e-3, 1e-6), (0.04, 0.4), (0.996, 1.0)])
def test_cosine_is_linspace_then_half_a_wave(base, final, warmup):
    total = 31
    half = np.cos(np.pi * np.arange(total - warmup) / (total - warmup))
    expected = np.concatenate([np.linspace(0, base, warmup), final + 0.5 * (base - final) * (1 + half)])
    np.testing.assert_allclose([cosine(i, base, final, total, warmup) for i in range(total)], expected, rtol=1e-12)


def test_teacher_temperature_rises_per_epoch_then_stays():
    got = [teacher_temperature(epoch) for epoch in range(40)]
    np.testing.assert_allclose(got, np.r_[np.linspace(0.04, 0.07, 30), np.full(10, 0.07)], rtol=1e-12)
    assert [round(t, 6) for t in got[:2] + got[29:31]] == [0.04, 0.041034, 0.07, 0.07]
    assert [teacher_temperature(epoch, 0, 0.04, 0.04) for epoch in range(3)] == [0.04] * 3
    assert [teacher_temperature(epoch, 1) for epoch in range(2)] == [0.04, 0.07]


# ---- head

def shaken_head(**options):
    """A small head whose biases and norms differ from their initial values."""
    head = DINOHead(12, 40, 32, 8, **options)
    with torch.no_grad():
        for p in head.parameters():
            p += 0.3 * torch.randn_like(p)
    return head


def test_head_has_the_official_keys_shapes_and_count(full_head):
    assert {key: tuple(x.shape) for key, x in full_head.state_dict().items()} == {
        "mlp.0.weight": (2048, 384), "mlp.0.bias": (2048,), "mlp.2.weight": (2048, 2048), "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048), "mlp.4.bias": (256,),
        "last_layer.weight_g": (65536, 1), "last_layer.weight_v": (65536, 256),
    }
    assert sum(p.numel() for p in full_head.parameters()) == 22_352_128


def test_head_initialisation(full_head):
    w = full_head.state_dict()
    for i in (0, 2, 4):
        assert not w[f"mlp.{i}.bias"].any()
        assert w[f"mlp.{i}.weight"].std().item() == pytest.approx(0.02, rel=5e-3)
        assert w[f"mlp.{i}.weight"].mean().abs() < 1e-4
        z = w[f"mlp.{i}.weight"].flatten() / 0.02                   # kurtosis 3: the cut, at +-2 and not 2 std, is far
        assert z.pow(4).mean().item() == pytest.approx(3, abs=0.05)
    v = w["last_layer.weight_v"].flatten()                          # uniform on +-1/16: deviation 1/16 / sqrt 3
    assert -1 / 16 <= v.min() < -0.0624 and 0.0624 < v.max() <= 1 / 16
    assert v.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=1e-3)
    assert (w["last_layer.weight_g"] == 1).all()


@pytest.mark.parametrize("norm_last_layer", [False, True])
def test_prototype_lengths_train_unless_fixed(norm_last_layer):
    head = DINOHead(12, 40, 32, 8, norm_last_layer)
    head(torch.randn(5, 12)).square().sum().backward()
    assert {name for name, p in head.named_parameters() if p.grad is None} == (
        {"last_layer.weight_g"} if norm_last_layer else set())


def test_head_equals_torchs_weight_norm():
    head = shaken_head()
    last = parametrizations.weight_norm(nn.Linear(8, 40, bias=False))
    oracle = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8))
    oracle.load_state_dict(head.mlp.state_dict())
    last.load_state_dict({"parametrizations.weight.original0": head.last_layer.weight_g,
                          "parametrizations.weight.original1": head.last_layer.weight_v})
    x, up = torch.randn(2, 3, 12, requires_grad=True), torch.randn(2, 3, 40)
    h = oracle(x)
    expected, got = last(h / h.norm(dim=-1, keepdim=True)), head(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    # parameters(): the MLP's in order, then g, then v on both sides
    torch.testing.assert_close(
        torch.autograd.grad(got, [x, *head.parameters()], up),
        torch.autograd.grad(expected, [x, *oracle.parameters(), *last.parameters()], up), rtol=1e-4, atol=1e-5)


def test_first_outputs_are_cosines(full_head):
    x, prototypes = torch.randn(3, 384), full_head.last_layer.weight_v.detach()
    with torch.no_grad():
        for got, h in zip(full_head(x), full_head.mlp(x), strict=True):
            torch.testing.assert_close(got, F.cosine_similarity(h, prototypes), rtol=0, atol=1e-6)
            assert got.abs().max() <= 1


# ---- loss and centre

def double_loop(student, teacher, center, teacher_temp, student_temp=0.1):
    """Oracle, float64: the mean over pairs of views of the batch's mean cross-entropy; and the number of pairs."""
    terms = []
    for q, t in enumerate(teacher.double()):
        p = ((t - center.double()) / teacher_temp).softmax(-1)
        for v, s in enumerate(student.double()):
            if v != q:
                terms.append(-(p * (s / student_temp).log_softmax(-1)).sum(-1).mean())
    return sum(terms) / len(terms), len(terms)


def logits(V, B, K, scale=0.3):
    return scale * torch.randn(V, B, K), scale * torch.randn(2, B, K)


def centred_loss(K, **options):
    loss = DINOLoss(K, **options)
    loss.center.normal_(0, 0.2)
    return loss


@pytest.mark.parametrize("student_temp, teacher_temp", [(0.1, 0.04), (0.1, 0.07), (0.5, 1.3)])
@pytest.mark.parametrize("V, pairs", [(2, 2), (3, 4), (10, 18), (12, 22)])
def test_loss_is_the_double_loop(V, pairs, student_temp, teacher_temp):
    student, teacher = logits(V, 4, 50)
    student.requires_grad_(), teacher.requires_grad_()
    loss = centred_loss(50, student_temp=student_temp)
    before = loss.center.clone()
    got = loss(student, teacher, teacher_temp)
    expected, n = double_loop(student, teacher.detach(), loss.center, teacher_temp, student_temp)
    assert n == pairs
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    got.backward()
    (grad,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(student.grad, grad, rtol=1e-4, atol=1e-6)
    assert teacher.grad is None
    assert torch.equal(loss.center, before)                         # it moves in update_center alone


def test_loss_uses_the_centre_of_the_steps_before():
    """What a step must do: the first loss of a run sees centre 0, the second that of the first batch."""
    student, teacher = logits(3, 4, 50)
    loss = DINOLoss(50)
    for center in (torch.zeros(50), 0.1 * teacher.mean((0, 1))):
        got = loss(student, teacher, 0.04)
        torch.testing.assert_close(got.double(), double_loop(student, teacher, center, 0.04)[0], rtol=1e-5, atol=0)
        loss.update_center(teacher)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_cost_only_their_own_rounding(dtype):
    student, teacher = (x.to(dtype) for x in logits(4, 3, 3000))
    loss = centred_loss(3000)
    got = loss(student, teacher, 0.04)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), double_loop(student, teacher, loss.center, 0.04)[0], rtol=1e-5, atol=0)
    loss.update_center(teacher)
    assert loss.center.dtype == torch.float32


def test_uniform_student_and_teacher_cost_log_k():
    loss = DINOLoss(65536)
    zero = torch.zeros(4, 2, 65536)
    assert loss(zero, zero[:2], 0.04).item() == pytest.approx(math.log(65536), rel=1e-6)
    assert entropy(loss.targets(zero[:2], 0.04)).item() == pytest.approx(math.log(65536), rel=1e-6)


def test_loss_at_the_start_is_log_k_and_the_spread_of_random_cosines(full_head):
    """Cosines to random prototypes have variance 1/256, so that lse(s / 0.1) = ln K + 1 / (2 256 0.1^2); unrelated
    features give t . s = 0."""
    x = F.normalize(torch.randn(5, 4, 256), dim=-1)
    with torch.no_grad():
        s = full_head.last_layer(x)
    got = DINOLoss(65536)(s[:3], s[3:], 0.04).item()
    assert got == pytest.approx(math.log(65536) + 1 / (2 * 256 * 0.1**2), abs=0.05)


@pytest.mark.parametrize("V", [2, 5])
def test_loss_is_entropy_plus_divergence(V):
    student, teacher = logits(V, 3, 40)
    loss = centred_loss(40)
    t = [Categorical(logits=(x - loss.center) / 0.05) for x in teacher]
    s = [Categorical(logits=x / loss.student_temp) for x in student]
    kl = torch.stack([kl_divergence(t[q], s[v]).mean() for q in range(2) for v in range(V) if v != q]).mean()
    spread = entropy(loss.targets(teacher, 0.05))
    torch.testing.assert_close(spread, (t[0].entropy() + t[1].entropy()).mean() / 2)
    torch.testing.assert_close(loss(student, teacher, 0.05) - spread, kl, rtol=1e-4, atol=1e-5)


def test_entropy_by_hand():
    p = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    assert entropy(p).item() == pytest.approx((0 + math.log(2) + math.log(4)) / 3)


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_centre_is_the_moving_mean_of_raw_logits(momentum):
    loss = DINOLoss(30, center_momentum=momentum)
    expected = np.zeros(30)
    for _ in range(3):
        teacher = torch.randn(2, 5, 30)
        loss.update_center(teacher)
        expected = momentum * expected + (1 - momentum) * teacher.double().numpy().reshape(10, 30).mean(0)
        np.testing.assert_allclose(loss.center.numpy()[0], expected, atol=1e-6)
    averaged = DINOLoss(30, center_momentum=momentum)
    averaged.update_center(teacher.mean((0, 1))[None])              # (1, K), as gradient accumulation gives it
    np.testing.assert_allclose(averaged.center[0], (1 - momentum) * teacher.numpy().mean((0, 1)), atol=1e-6)
    assert list(loss.state_dict()) == ["center"] and loss.center.shape == (1, 30)


def test_two_half_batches_equal_the_whole():
    student, teacher = logits(5, 6, 40)
    student.requires_grad_()
    whole, halves = centred_loss(40), DINOLoss(40)
    halves.load_state_dict(whole.state_dict())
    value = whole(student, teacher, 0.04)
    (grad,) = torch.autograd.grad(value, student)
    parts = [halves(student[:, i], teacher[:, i], 0.04) / 2 for i in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(sum(parts), value)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), student)[0], grad)
    whole.update_center(teacher)
    halves.update_center((teacher[:, :3].mean((0, 1)) + teacher[:, 3:].mean((0, 1)))[None] / 2)
    torch.testing.assert_close(halves.center, whole.center)


def half_of_the_batch(rank, folder):
    """One of two processes: its own half of the batch, two steps."""
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(seconds=60), rank=rank, world_size=2)
    try:
        loss = DINOLoss(30)
        for teacher in torch.load(f"{folder}/teacher.pt"):
            loss.update_center(teacher[:, 4 * rank:4 * rank + 4])
        torch.save(loss.center, f"{folder}/center{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_share_the_centre_of_the_joined_batch(tmp_path):
    steps = torch.randn(2, 2, 8, 30)
    torch.save(steps, tmp_path / "teacher.pt")
    other = torch.multiprocessing.spawn(half_of_the_batch, (str(tmp_path),), nprocs=1, join=False)      # rank 0
    half_of_the_batch(1, str(tmp_path))
    other.join()
    alone = DINOLoss(30)
    for teacher in steps:
        alone.update_center(teacher)
    both = [torch.load(tmp_path / f"center{rank}.pt") for rank in range(2)]
    assert torch.equal(*both)
    torch.testing.assert_close(both[0], alone.center, rtol=0, atol=1e-6)


# ---- crops through the networks

class Pooled(nn.Module):
    """The smallest network that takes any size; notes the batches it was given."""

    def __init__(self):
        super().__init__()
        self.conv, self.batches = nn.Conv2d(3, 12, 4, 4), []

    def forward(self, x):
        self.batches.append(tuple(x.shape))
        return self.conv(x).square().mean((2, 3))


@pytest.mark.parametrize("sizes, runs", [
    ([16] * 2, [(4, 16)]),
    ([16] * 2 + [8] * 3, [(4, 16), (6, 8)]),
    ([8] * 5, [(10, 8)]),
    ([16, 16, 8, 12, 12], [(4, 16), (2, 8), (4, 12)]),
])
def test_crops_of_one_size_go_together_and_come_back_in_order(sizes, runs):
    backbone, head, heads = Pooled(), shaken_head(), []
    head.register_forward_hook(lambda module, args, output: heads.append(len(output)))
    views = [torch.randn(2, 3, size, size) for size in sizes]
    got = dino.forward_crops(backbone, head, views)
    assert backbone.batches == [(n, 3, size, size) for n, size in runs] and heads == [2 * len(views)]
    for v, view in enumerate(views):
        torch.testing.assert_close(got[v], head(backbone(view)), rtol=1e-5, atol=1e-6)
    assert len(got) == len(views)


# ---- optimisation

@pytest.mark.parametrize("norm_last_layer", [False, True])
@pytest.mark.parametrize("method", [{}, dict(registers=2, specialize=True)])
def test_weight_decay_groups(method, norm_last_layer):
    model = nn.ModuleDict({"backbone": vit.vit_tiny(dim=24, depth=3, heads=3, image_size=32, **method),
                           "head": DINOHead(24, 40, 32, 8, norm_last_layer)})
    free = {id(p) for m in model.modules() for name, p in m.named_parameters(recurse=False)
            if isinstance(m, nn.LayerNorm) or name == "bias"}
    decayed, rest = dino.param_groups(model)
    assert rest["weight_decay"] == 0 and "weight_decay" not in decayed
    seen = Counter(id(p) for p in decayed["params"] + rest["params"])
    assert seen == {id(p): 1 for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in rest["params"]} == free

    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in decayed["params"]}
    assert decayed >= {"backbone.cls_token", "backbone.pos_embed", "head.last_layer.weight_v"}
    assert ("backbone.register_tokens" in decayed) == ("registers" in method)
    assert ("head.last_layer.weight_g" in decayed) == (not norm_last_layer)


def with_gradients():
    """Tensors with gradients from tiny to huge, one at zero, one without."""
    params = [torch.zeros(n, 2, requires_grad=True) for n in (1, 5, 30, 7, 4)]
    for p, scale in zip(params, (1e-3, 0.5, 4.0, 0.0), strict=False):
        p.grad = scale * torch.randn_like(p)
    return params


def test_every_gradient_is_clipped_by_itself():
    params = with_gradients()
    before = [p.grad.double() for p in params[:-1]]
    norms = [g.square().sum().sqrt().item() for g in before]
    assert norms[1] < 3 < norms[2]
    total = dino.clip_each((p for p in params), 3.0)                     # any iterable: parameters() is a generator
    for p, g, norm in zip(params, before, norms, strict=False):
        shrink = 3.0 / (norm + 1e-6)
        torch.testing.assert_close(p.grad.double(), g * shrink if shrink < 1 else g, rtol=1e-6, atol=0)
    assert total.item() == pytest.approx(get_total_norm(before).item(), rel=1e-6)
    assert params[-1].grad is None


def test_small_gradients_and_max_norm_zero_leave_every_bit():
    for max_norm in (0, 1e4):
        params = with_gradients()
        before = [p.grad.clone() for p in params[:-1]]
        total = dino.clip_each(params, max_norm)
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=False))
        torch.testing.assert_close(total, get_total_norm(before))


@pytest.mark.parametrize("momentum", [0.996, 0.3, 1.0, 0.0])
def test_teacher_moves_by_ema_in_place(momentum):
    student, teacher = shaken_head(), shaken_head().requires_grad_(False)
    old = {name: p.double().clone() for name, p in teacher.named_parameters()}
    pointers = [p.data_ptr() for p in teacher.parameters()]
    new = {name: p.detach().double().clone() for name, p in student.named_parameters()}
    dino.ema_update(teacher, student, momentum)
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p.double(), momentum * old[name] + (1 - momentum) * new[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(student.get_parameter(name).double(), new[name])
    assert [p.data_ptr() for p in teacher.parameters()] == pointers
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_equal_teacher_keeps_every_bit():
    student, teacher = shaken_head(), shaken_head().requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    for momentum in (0.996, 0.9973, 0.3):
        dino.ema_update(teacher, student, momentum)
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))


# ---- in how many directions images differ

def directions(*variances):
    """Features of 2 n images with just these variances, one along each axis of a turned basis, and a mean."""
    axes = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0][:len(variances)]
    n = len(variances)
    steps = axes * (n * torch.tensor(variances, dtype=torch.float64)[:, None]).sqrt()
    return torch.cat([steps, -steps]) + 3


@pytest.mark.parametrize("variances, rank", [
    ((1, 1, 1, 1), 4), ((5, 5), 2), ((2,), 1),
    ((0.5, 0.25, 0.25), 2**1.5),                                    # exp(1/2 ln 2 + 2/4 ln 4)
])
def test_effective_rank_by_hand(variances, rank):
    assert dino.effective_rank(directions(*variances)) == pytest.approx(rank, rel=1e-9)
    assert dino.effective_rank(100 * directions(*variances).float()) == pytest.approx(rank, rel=1e-4)


def test_effective_rank_of_equal_images_is_1_and_of_no_numbers_none():
    assert dino.effective_rank(torch.full((4, 8), 0.1)) == 1
    assert math.isnan(dino.effective_rank(torch.full((4, 8), math.nan)))


def half_of_the_features(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    features = torch.load(f"{folder}/features.pt")
    torch.save(dino.effective_rank(features[rank::2]), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_the_effective_rank_of_all_images(tmp_path):
    features = torch.randn(16, 12).cumsum(1)
    torch.save(features, tmp_path / "features.pt")
    torch.multiprocessing.spawn(half_of_the_features, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}.pt") == pytest.approx(dino.effective_rank(features), rel=1e-9)


@pytest.mark.parametrize("ranks, warns", [
    ([7.0, 6.0, 5.0, 4.1, 4.0, 3.9, 3.8, 3.5], True),
    ([7.0, 6.0, 5.0, 4.1, 4.0, 3.9, 4.3, 3.5], False),              # 0.6 of 7.0 is 4.2
    ([2.0, 1.5, 2.5, 3.0, 4.0, 2.0, 1.9, 1.8], False),
    ([7.0, 3.0, 3.0, 3.0, 3.0], False),                             # too early to tell
    ([7.0, 3.0, 3.0, 3.0, 3.0, 3.0], True),
])
def test_a_fall_of_the_effective_rank_is_called_by_name(ranks, warns):
    warning = dino.collapse([dict(loss=2.0, entropy=1.0, rank=rank) for rank in ranks], math.log(64))
    assert warns == (warning is not None)
    if warns:
        assert "effective rank of [CLS] has fallen from 7.0 " in warning and "--lr" in warning
