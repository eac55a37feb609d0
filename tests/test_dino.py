"""dino.py against plain loops, torch's weight norm and distributions, torchvision's crops and Pillow's colours."""
import colorsys
import itertools
import math
from collections import Counter
from datetime import timedelta
from decimal import Decimal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.nn.utils import get_total_norm, parametrizations
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

import dino
import vit
from dino import DRAWS, DINOHead, DINOLoss, MultiCrop, cosine, crop_box, entropy, recolour, teacher_temperature

KINDS = {"global1": (1.0, 0.0), "global2": (0.1, 0.2), "local": (0.5, 0.0)}    # shares of blur and of solarize
ORDERS = [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)]


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


# ---- where crops lie

def picture(height, width, seed=0):
    """uint8 (3, H, W): smooth in the large, textured in the small, all the colours of a photograph."""
    g = torch.Generator().manual_seed(seed)
    x = sum(share * F.interpolate(torch.rand(1, 3, n, n, generator=g), size=(height, width), mode="bicubic")[0]
            for n, share in ((2, 0.5), (7, 0.35), (40, 0.15)))
    return ((x - x.amin()) / (x.amax() - x.amin()) * 255).round().byte()


def to_pil(x):
    return Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def ks_distance(a, b):
    """Largest gap between two empirical distribution functions."""
    at = np.concatenate([a, b])
    share_a, share_b = (np.searchsorted(np.sort(x), at, "right") / len(x) for x in (a, b))
    return abs(share_a - share_b).max()


@pytest.mark.parametrize("scale", [(0.4, 1), (0.05, 0.4)])
@pytest.mark.parametrize("height, width", [(375, 500), (600, 200)])
def test_boxes_are_distributed_as_torchvisions(height, width, scale):
    """Kolmogorov-Smirnov at the 0.1 % level, n = 2000 each, on area share, shape and position."""
    rng, image = np.random.default_rng(0), torch.empty(3, height, width, dtype=torch.uint8)
    ours = np.array([crop_box(height, width, scale, rng) for _ in range(2000)], float)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(2000)], float)
    views = [(h * w, h / w, y / np.maximum(height - h, 1), x / np.maximum(width - w, 1), y + h / 2, x + w / 2)
             for y, x, h, w in (ours.T, theirs.T)]
    for a, b in zip(*views, strict=True):
        assert ks_distance(a, b) < 1.95 * math.sqrt(2 / 2000)


def test_area_share_and_log_ratio_are_uniform():
    """A picture so large that every try is accepted: three means and deviations of uniform variables."""
    rng = np.random.default_rng(1)
    y, x, h, w = np.array([crop_box(10**6, 10**6, (0.05, 0.4), rng) for _ in range(4000)], float).T
    for value, low, high in ((h * w / 1e12, 0.05, 0.4), (np.log(w / h), math.log(3 / 4), math.log(4 / 3)),
                             (y / (1e6 - h), 0, 1), (x / (1e6 - w), 0, 1)):
        u = (value - low) / (high - low)
        assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * 4000) and abs(u.var() - 1 / 12) < 4 / math.sqrt(180 * 4000)
        assert -1e-4 < u.min() and u.max() < 1 + 1e-4


@pytest.mark.parametrize("height, width", [(1, 1), (1, 50), (50, 1), (2, 3), (7, 900), (900, 7), (3, 4), (224, 224)])
def test_boxes_lie_inside_pictures_of_any_shape(height, width):
    rng = np.random.default_rng(2)
    for scale in ((0.4, 1), (0.05, 0.4), (1, 1), (1e-9, 1e-9)):
        for top, left, h, w in (crop_box(height, width, scale, rng) for _ in range(200)):
            assert h > 0 and w > 0 and 0 <= top <= height - h and 0 <= left <= width - w


def test_boxes_reach_every_edge():
    rng, offsets = np.random.default_rng(3), {}
    for _ in range(3000):
        top, left, h, w = crop_box(6, 7, (0.2, 1), rng)
        offsets.setdefault((6, h), set()).add(top), offsets.setdefault((7, w), set()).add(left)
    assert all(seen == set(range(side - cut + 1)) for (side, cut), seen in offsets.items())


@pytest.mark.parametrize("height, width, box", [
    (900, 90, (390, 0, 120, 90)), (90, 900, (0, 390, 90, 120)), (90, 100, (0, 0, 90, 100)),
])
def test_largest_central_box_when_nothing_fits(height, width, box):
    assert crop_box(height, width, (1e-9, 1e-9), np.random.default_rng(0)) == box


@pytest.mark.parametrize("height, width", [(120, 160), (90, 61), (20, 300)])
def test_crops_are_pillows(height, width):
    image, rng = picture(height, width), np.random.default_rng(3)
    large, small, _ = MultiCrop(64, 32, 6)(image, np.random.default_rng(3))
    for crop, size, scale in [(x, 64, (0.4, 1)) for x in large] + [(x, 32, (0.05, 0.4)) for x in small]:
        top, left, h, w = crop_box(height, width, scale, rng)
        expected = to_pil(image).crop((left, top, left + w, top + h)).resize((size, size), Image.BICUBIC)
        gap = (crop.int() - from_pil(expected).int()).abs()
        assert gap.float().mean() < 0.3 and gap.max() <= 2


@pytest.mark.parametrize("local_crops", [0, 3])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 50), (40, 30)])
def test_crops_have_their_sizes_and_one_row_of_draws_each(height, width, local_crops):
    large, small, draws = MultiCrop(48, 16, local_crops)(picture(height, width), np.random.default_rng(0))
    assert large.shape == (2, 3, 48, 48) and small.shape == (local_crops, 3, 16, 16)
    assert large.dtype == small.dtype == torch.uint8
    assert draws.shape == (2 + local_crops, len(DRAWS)) and draws.dtype == torch.float32
    assert len({tuple(row) for row in draws.tolist()}) == len(draws)        # every view has its own


def test_one_generator_decides_everything():
    multicrop, image = MultiCrop(48, 16, 2), picture(60, 80)
    def flat(seed):
        return torch.cat([x.flatten().float() for x in multicrop(image, np.random.default_rng([0, seed]))])
    first, state = flat(5), torch.get_rng_state()
    assert not torch.equal(first, flat(6))
    np.random.seed(7), torch.manual_seed(7)
    assert torch.equal(first, flat(5))                              # and no hidden generator
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)                # nor one disturbed


def test_memory_layout_of_the_picture_changes_nothing():
    image = picture(60, 80)
    interleaved = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)      # what np.array(pil) gives
    assert not interleaved.is_contiguous()
    crops = [MultiCrop(48, 16, 4)(x, np.random.default_rng(1)) for x in (image, interleaved)]
    assert all(torch.equal(a, b) for a, b in zip(*crops, strict=True))


# ---- what colours them

def row(**draws):
    identity = dict.fromkeys(DRAWS, 0.0) | dict(brightness=1.0, contrast=1.0, saturation=1.0)
    return torch.tensor([(identity | draws)[name] for name in DRAWS])


def grey_levels(views):
    """Normalised views back to 0..255."""
    return (views * torch.tensor(vit.STD).view(3, 1, 1) + torch.tensor(vit.MEAN).view(3, 1, 1)) * 255


def recoloured(x, order=(0, 1, 2, 3), **draws):
    return grey_levels(recolour(x[None], row(**draws)[None], order))[0]


def pillow(image, draws, order=(0, 1, 2, 3)):
    """Oracle: the published pipeline with Pillow and torchvision's adjust_hue, rounding to uint8 after every op."""
    d = dict(zip(DRAWS, draws.tolist(), strict=True))
    jitter = (
        lambda im: ImageEnhance.Brightness(im).enhance(d["brightness"]),
        lambda im: ImageEnhance.Contrast(im).enhance(d["contrast"]),
        lambda im: ImageEnhance.Color(im).enhance(d["saturation"]),
        lambda im: TF.adjust_hue(im, d["hue"]) if d["hue"] else im,
    )
    image = ImageOps.mirror(image) if d["flip"] else image
    for k in order:
        image = jitter[k](image)
    image = ImageOps.grayscale(image).convert("RGB") if d["grey"] else image
    image = image.filter(ImageFilter.GaussianBlur(d["sigma"])) if d["sigma"] else image
    return ImageOps.solarize(image) if d["solarize"] else image


@pytest.mark.parametrize("draws, mean, most", [                     # measured distance x 1.5 or so
    (dict(flip=1), 1e-3, 1e-2),
    (dict(brightness=0.6), 0.6, 1.01), (dict(brightness=1.4), 0.6, 1.01),
    (dict(contrast=0.6), 0.7, 1.5), (dict(contrast=1.4), 0.7, 1.5),
    (dict(saturation=0.8), 0.6, 1.5), (dict(saturation=1.2), 0.6, 1.5),
    (dict(hue=-0.1), 1.0, 12), (dict(hue=0.03), 1.0, 12), (dict(hue=0.1), 1.0, 12),    # Pillow's HSV has 8 bits
    (dict(grey=1), 0.5, 0.51),
    (dict(sigma=0.1), 0.1, 0.5), (dict(sigma=0.7), 1.0, 4), (dict(sigma=2.0), 1.0, 9),  # Pillow blurs by three boxes
    (dict(solarize=1), 0.01, 1.01),
])
def test_each_operation_is_pillows(draws, mean, most):
    for s in range(3):
        x = picture(64, 64, s)
        gap = (recoloured(x, **draws) - from_pil(pillow(to_pil(x), row(**draws)))).abs()
        assert gap.mean() < mean and gap.max() < most


def test_contrast_turns_about_the_mean_grey_of_the_picture():
    x = torch.zeros(3, 8, 8, dtype=torch.uint8)
    x[0, :, :4], x[1, :, 4:] = 100, 200                             # half red, half green: 0.299 50 + 0.587 100
    pivot = 0.299 * 50 + 0.587 * 100
    expected = (pivot + 0.5 * (x.float() - pivot)).clamp(0, 255)
    torch.testing.assert_close(recoloured(x, contrast=0.5), expected, rtol=0, atol=1e-3)


def test_hue_is_colorsys():
    x = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    x[:, 0] = torch.tensor([[255, 0, 0, 255, 0, 255, 7, 7],         # pure colours, ties and greys
                            [0, 255, 0, 255, 255, 0, 7, 9],
                            [0, 0, 255, 0, 255, 255, 7, 9]])
    for turn in (-0.1, 0.037, 0.1, 0.5, 1 / 3):
        expected = torch.zeros(3, 8, 8)
        for i, j in itertools.product(range(8), range(8)):
            h, s, v = colorsys.rgb_to_hsv(*(x[:, i, j] / 255).tolist())
            expected[:, i, j] = 255 * torch.tensor(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
        torch.testing.assert_close(recoloured(x, hue=turn), expected, rtol=0, atol=1e-2)


def test_hue_full_circle_and_grey_pixels():
    x = picture(16, 16)
    for turn in (1.0, -1.0):
        torch.testing.assert_close(recoloured(x, hue=turn), x.float(), rtol=0, atol=1e-3)
    grey = x[:1].expand(3, -1, -1)
    torch.testing.assert_close(recoloured(grey, hue=0.1), grey.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [1, 5, 40])
@pytest.mark.parametrize("sigma", [0.1, 0.6, 1.1, 2.0])
def test_blur_is_a_gaussian_with_repeated_edges(size, sigma):
    x = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    wide = F.pad(x[None].float(), [50] * 4, mode="replicate")
    expected = TF.gaussian_blur(wide, 81, sigma)[0, :, 50:-50, 50:-50]
    # ours cuts the repeated edge after 6 pixels: at sigma 2 the rest is 0.1 of a grey level
    torch.testing.assert_close(recoloured(x, sigma=sigma), expected, rtol=0, atol=0.1 if sigma == 2 else 2e-3)


@pytest.mark.parametrize("size", [1, 5, 40])
def test_blur_by_matrix_is_the_same_blur(size):
    x = torch.rand(7, 3, size, size) * 255
    sigma = torch.tensor([0, 0.1, 0.4, 0.8, 1.2, 1.6, 2]).view(-1, 1, 1, 1)
    torch.testing.assert_close(dino.blur_by_matrix(x, sigma), dino.blur(x, sigma), rtol=0, atol=0.1)


def test_gpus_way_is_the_cpus_way(monkeypatch):
    """All crops through every operation, selected afterwards, against picked crops in pieces that fit the cache."""
    multicrop = MultiCrop(48, 24, 3)
    crops = [multicrop(picture(80, 100, i), np.random.default_rng([9, i])) for i in range(12)]
    crops = [torch.stack(x) for x in zip(*crops, strict=True)]
    monkeypatch.setattr(dino, "IN_CACHE", 3 * 48 * 48 * 5)
    in_pieces = multicrop.photometric(*crops, (2, 0, 3, 1))
    monkeypatch.setattr(dino, "IN_CACHE", 10**9)
    monkeypatch.setattr(dino, "where", lambda need, op, x, *amounts: torch.where(need, op(x, *amounts), x))
    monkeypatch.setattr(dino, "blur", dino.blur_by_matrix)
    for x, y in zip(in_pieces, multicrop.photometric(*crops, (2, 0, 3, 1)), strict=True):
        # apart by rounding, but for a pixel at the edge of solarizing, which goes to either side of it
        assert ((x - y).abs() > 2e-3).float().mean() < 1e-4


def test_operations_follow_each_other_as_published():
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(3, 32, 16)
    blurred = recoloured(stripes, sigma=2.0, solarize=1)[:, 8:-8, 8:-8]
    assert (blurred - 127.5).abs().max() < 1                        # solarized before the blur it would be black
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).repeat(1, 8, 8)
    expected = from_pil(pillow(to_pil(red), row(hue=0.1, grey=1)))
    assert (recoloured(red, hue=0.1, grey=1) - expected).abs().max() < 5
    assert (recoloured(red, grey=1) - expected).abs().min() > 50    # greyed before the jitter it would have no hue


def test_identity_draws_only_normalise():
    x = torch.randint(0, 256, (5, 3, 24, 24), dtype=torch.uint8)
    for order in ORDERS:                                            # hue rounds: 2e-4 of a grey level
        torch.testing.assert_close(recolour(x, row().expand(5, -1), order), vit.normalize(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_jitter_follows_the_order_given(order):
    draws = dict(brightness=1.4, contrast=1.4, saturation=0.8, hue=0.1)
    x, gap = picture(64, 64) // 2 + 128, {}                         # bright: clipping makes the order visible
    for other in ORDERS:
        expected = from_pil(pillow(to_pil(x), row(**draws), other))
        gap[other] = (recoloured(x, order, **draws) - expected).abs().mean().item()
    assert gap.pop(order) < 0.7
    assert min(gap.values()) > 2


@pytest.mark.parametrize("order", ORDERS)
def test_views_are_pillows_pipeline_in_crop_order(order):
    multicrop, B = MultiCrop(48, 24, 4), 6
    crops = [multicrop(picture(80, 100, i), np.random.default_rng([9, i])) for i in range(B)]
    large, small, draws = (torch.stack(x) for x in zip(*crops, strict=True))
    views = multicrop.photometric(large, small, draws, order)
    assert [tuple(v.shape) for v in views] == [(B, 3, 48, 48)] * 2 + [(B, 3, 24, 24)] * 4
    for b in range(B):
        alone = multicrop.photometric(large[b:b + 1], small[b:b + 1], draws[b:b + 1], order)
        for v, crop in enumerate([*large[b], *small[b]]):
            torch.testing.assert_close(views[v][b], alone[v][0], rtol=0, atol=1e-5)
            expected = from_pil(pillow(to_pil(crop), draws[b, v], order))
            assert (grey_levels(views[v][b]) - expected).abs().mean() < 3


def test_no_local_crops():
    multicrop = MultiCrop(48, 24, 0)
    large, small, draws = multicrop(picture(60, 60), np.random.default_rng(0))
    views = multicrop.photometric(large[None], small[None], draws[None])
    assert len(views) == 2
    with_locals = MultiCrop(48, 24, 1).photometric(
        large[None], torch.zeros(1, 1, 3, 24, 24, dtype=torch.uint8), torch.cat([draws, row()[None]])[None])
    assert all(torch.equal(a, b) for a, b in zip(views, with_locals, strict=False))


# ---- how often

N = 4000


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_and_ranges(kind):
    rng, (blur_share, solarize_share) = np.random.default_rng(4), KINDS[kind]
    draws = dict(zip(DRAWS, np.stack([dino.photometric_draws(kind, rng) for _ in range(N)]).T, strict=True))
    jitter = np.stack([draws["brightness"] != 1, draws["contrast"] != 1, draws["saturation"] != 1, draws["hue"] != 0])
    assert (jitter == jitter[0]).all()                              # all four or none
    events = dict(flip=(draws["flip"], 0.5), jitter=(jitter[0], 0.8), grey=(draws["grey"], 0.2),
                  blur=(draws["sigma"] > 0, blur_share), solarize=(draws["solarize"], solarize_share))
    for happened, p in events.values():
        assert set(np.unique(happened)) <= {0, 1}
        assert abs(happened.mean() - p) <= 4 * math.sqrt(p * (1 - p) / N)
    for (a, p), (b, q) in itertools.combinations(events.values(), 2):       # pairwise independent
        assert abs((a * b).mean() - p * q) <= 4 * math.sqrt(p * q * (1 - p * q) / N)
    for name, applied, low, high in (("brightness", jitter[0], 0.6, 1.4), ("contrast", jitter[0], 0.6, 1.4),
                                     ("saturation", jitter[0], 0.8, 1.2), ("hue", jitter[0], -0.1, 0.1),
                                     ("sigma", events["blur"][0], 0.1, 2.0)):
        u = (draws[name][applied].astype(float) - low) / (high - low)       # uniform on 0..1
        assert -1e-6 <= u.min() and u.max() <= 1 + 1e-6
        assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * len(u)) and abs(u.var() - 1 / 12) < 4 / math.sqrt(180 * len(u))


def test_crops_draw_as_their_kind():
    """global1 always blurs and never solarizes, global2 alone does, locals blur half the time."""
    multicrop, image, rng = MultiCrop(2, 2, 2), picture(4, 4), np.random.default_rng(5)
    draws = torch.stack([multicrop(image, rng)[2] for _ in range(400)])
    blur, solarize = ((draws[..., DRAWS.index(name)] > 0).double().mean(0) for name in ("sigma", "solarize"))
    for got, expected in ((blur, (1, 0.1, 0.5, 0.5)), (solarize, (0, 0.2, 0, 0))):
        for share, p in zip(got.tolist(), expected, strict=True):
            assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / 400)
