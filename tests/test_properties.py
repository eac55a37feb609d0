"""What holds for every input, tried on random ones: entmax, boxes, sizes, windows, crops and schedules.

Case i of a test is a function of i alone; a failure prints i and what was drawn.
"""
import functools
import math

import numpy as np
import torch
from PIL import Image

import data
import dino
import pib
import probe_seg
import vit
from entmax import entmax15, entmax15_attention, entmax15_sort
from paper import figures


def forall(count):
    """Run check(rng, case) `count` times; it writes what it draws into the dict `case`."""
    def decorate(check):
        @functools.wraps(check)
        def test():
            for i in range(count):
                case = {}
                try:
                    check(np.random.default_rng((2026, i)), case)
                except Exception as error:
                    raise AssertionError(f"{check.__name__}, case {i}: {case}") from error
        del test.__wrapped__                                          # pytest would take rng and case for fixtures
        return test
    return decorate


def scores(rng, case, dtype=torch.float64):
    """A row of any length and scale; at times with ties, with scores that are not there, or all but one far below."""
    n, scale = int(rng.integers(1, 400)), 10 ** rng.uniform(-4, 4)
    kind = str(rng.choice(["normal", "ties", "hidden", "one far above", "steps"]))
    case.update(n=n, scale=scale, kind=kind)
    z = rng.normal(0, scale, n)
    if kind == "ties":
        z = np.round(z / scale * 2) * scale / 2
    if kind == "hidden":
        z[rng.random(n) < 0.5] = -math.inf
        z[rng.integers(n)] = rng.normal(0, scale)
    if kind == "one far above":
        z[rng.integers(n)] += 10 * scale + 3
    if kind == "steps":
        z = scale * np.floor(np.log2(1 + np.arange(n)))
    return torch.tensor(z, dtype=dtype)


@forall(400)
def test_entmax_solves_its_problem(rng, case):
    """p >= 0, sum p = 1, and z - 2 sqrt(p) is one number on the support and no smaller off it."""
    z = scores(rng, case)
    p = entmax15(z)
    assert (p >= 0).all() and abs(p.sum() - 1) < 1e-13
    slack = z / 2 - p.sqrt()                                          # tau on the support
    tau = slack[p > 0]
    size = 1 + z[z.isfinite()].abs().max()
    assert tau.max() - tau.min() < 1e-13 * size
    assert (slack[p == 0] <= tau.min() + 1e-13 * size).all()
    assert (entmax15(z.float()) - p).abs().max() < 1e-6 * size


@forall(200)
def test_entmax_symmetries(rng, case):
    """Permutations commute, shifts change nothing, larger scores get no less, what has weight 0 may leave."""
    z = scores(rng, case)
    p, order = entmax15(z), torch.from_numpy(rng.permutation(len(z)))
    size = 1 + z[z.isfinite()].abs().max()
    assert (entmax15(z[order]) - p[order]).abs().max() < 1e-14 * size
    assert (entmax15(z + 3.7) - p).abs().max() < 1e-14 * size
    assert (p[z.argsort()].diff() >= -1e-15).all()
    assert (entmax15(z[p > 0]) - p[p > 0]).abs().max() < 1e-14 * size


@forall(200)
def test_entmax_gradient_is_that_of_the_textbook(rng, case):
    z = scores(rng, case)
    z = z[z.isfinite()]
    p = entmax15(z)
    # at a kink, where a score is just about to get weight, the sort may side with either of two slopes
    near = ((z - z.max()) / 2 - ((z - z.max()) / 2 - p.sqrt())[p > 0].mean()).abs()
    if near.min() < 1e-9 * (1 + z.abs().max()):
        return
    dp = torch.tensor(rng.normal(size=len(z)))
    slopes = []
    for f in (entmax15, entmax15_sort):
        x = z.clone().requires_grad_()
        slopes.append(torch.autograd.grad(f(x), x, dp)[0])
    assert (slopes[0] - slopes[1]).abs().max() < 1e-9 * (1 + z.abs().max()) and abs(slopes[0].sum()) < 1e-12


@forall(40)
def test_attention_is_a_mean_of_values(rng, case):
    """Outputs lie between the least and the largest value, channel by channel; one value for all is the output."""
    B, H, T, D = (int(rng.integers(1, high)) for high in (3, 4, 60, 40))
    case.update(shape=(B, H, T, D), scale=10 ** rng.uniform(-2, 2))
    q, k, v = torch.tensor(rng.normal(0, 1, (3, B, H, T, D)))
    out = entmax15_attention(q * case["scale"], k, v)
    assert (out <= v.amax(2, keepdim=True) + 1e-12).all() and (out >= v.amin(2, keepdim=True) - 1e-12).all()
    assert (entmax15_attention(q, k, v[:, :, :1].expand_as(v)) - v[:, :, :1]).abs().max() < 1e-12


@forall(300)
def test_cosine_schedule(rng, case):
    """From 0 to base in the warm-up, then from base towards final and never past it."""
    total = int(rng.integers(2, 500))
    warmup, base, final = int(rng.integers(0, total)), rng.uniform(0, 3), rng.uniform(0, 3)
    case.update(total=total, warmup=warmup, base=base, final=final)
    values = np.array([dino.cosine(step, base, final, total, warmup) for step in range(total + 1)])
    rise, fall = values[:warmup], values[warmup:]
    assert (np.diff(rise) >= 0).all() and (not warmup or rise[0] == 0)
    assert warmup < 2 or abs(rise[-1] - base) < 1e-12
    assert abs(fall[0] - base) < 1e-12 and abs(fall[-1] - final) < 1e-12
    assert (np.diff(fall) * np.sign(final - base) >= -1e-15).all()
    assert abs(dino.cosine((total + warmup) / 2, base, final, total, warmup) - (base + final) / 2) < 1e-12


@forall(300)
def test_teacher_temperature(rng, case):
    warmup, start, end = int(rng.integers(0, 40)), rng.uniform(0.01, 0.1), rng.uniform(0.01, 0.1)
    case.update(warmup=warmup, start=start, end=end)
    values = [dino.teacher_temperature(epoch, warmup, start, end) for epoch in range(60)]
    np.testing.assert_allclose(values, np.r_[np.linspace(start, end, warmup), np.full(60 - warmup, end)], rtol=1e-12)


@forall(300)
def test_crop_boxes(rng, case):
    """Inside the picture; of the area asked for and a ratio in 3/4..4/3, both up to rounding, or the fallback."""
    height, width = (int(side) for side in np.exp(rng.uniform(0, 7, 2)))
    low, high = sorted(rng.uniform(0.01, 1, 2))
    case.update(height=height, width=width, scale=(low, high))
    height, width = max(1, height), max(1, width)
    top, left, h, w = case["box"] = data.crop_box(height, width, (low, high), rng)
    assert 0 < h and 0 < w and 0 <= top <= height - h and 0 <= left <= width - w
    central = (top, left) == ((height - h) // 2, (width - w) // 2) and (h == height or w == width)
    asked = ((h - 0.5) * (w - 0.5) <= high * height * width and (h + 0.5) * (w + 0.5) >= low * height * width
             and (w - 0.5) / (h + 0.5) <= 4 / 3 and (w + 0.5) / max(h - 0.5, 1e-9) >= 3 / 4)
    assert asked or central


@forall(120)
def test_boxes_through_the_eval_transform(rng, case):
    """A box painted white lands in the patches that overlap() names, in no other, and in all of them."""
    width, height = (int(side) for side in rng.integers(20, 400, 2))
    patch = int(rng.choice([8, 16]))
    size = patch * int(rng.integers(2, 10))
    x0, y0 = int(rng.integers(width - 1)), int(rng.integers(height - 1))
    x1, y1 = int(rng.integers(x0 + 1, width + 1)), int(rng.integers(y0 + 1, height + 1))
    case.update(width=width, height=height, size=size, patch=patch, box=(x0, y0, x1, y1))
    picture = np.zeros((height, width, 3), np.uint8)
    picture[y0:y1, x0:x1] = 255
    seen = vit.eval_transform(size)(Image.fromarray(picture))[0].float() / 255
    mapped = case["mapped"] = pib.through_eval_transform((x0, y0, x1, y1), width, height, size)
    named = pib.overlap([mapped], size // patch, patch)
    light = seen.unfold(0, patch, patch).unfold(1, patch, patch)      # (g, g, patch, patch)
    # more than half of the light of a pixel means that the box covers its centre, but for the bicubic overshoot
    assert not ((light > 0.75).any(-1).any(-1) & ~named).any()
    scale = round(size * 256 / 224) / min(width, height)
    wide = [(a, b) for a, b in ((mapped[0], mapped[2]), (mapped[1], mapped[3]))]
    if all(b - a > 4 * max(1, scale) for a, b in wide):              # thinner boxes are blurred away
        inner = pib.overlap([(mapped[0] + 2 * max(1, scale), mapped[1] + 2 * max(1, scale),
                              mapped[2] - 2 * max(1, scale), mapped[3] - 2 * max(1, scale))], size // patch, patch)
        assert not (inner & ~(light > 0.5).any(-1).any(-1)).any()


@forall(300)
def test_overlap_is_that_of_areas(rng, case):
    grid, patch = int(rng.integers(1, 9)), int(rng.integers(1, 17))
    corners = rng.uniform(-1, grid + 1, 4) * patch
    if rng.random() < 0.5:
        corners = np.round(corners / patch) * patch                   # on the edges of patches: touching is not overlap
    x0, x1, y0, y1 = *sorted(corners[:2]), *sorted(corners[2:])
    case.update(grid=grid, patch=patch, box=(x0, y0, x1, y1))
    hit = pib.overlap([(x0, y0, x1, y1)], grid, patch)
    for row in range(grid):
        for column in range(grid):
            across = min(x1, (column + 1) * patch) - max(x0, column * patch)
            down = min(y1, (row + 1) * patch) - max(y0, row * patch)
            if x0 < x1 and y0 < y1:
                assert hit[row, column] == (across > 0 and down > 0)


@forall(300)
def test_windows_cover_every_pixel(rng, case):
    crop = int(rng.integers(1, 60))
    height, width, stride = int(rng.integers(1, 200)), int(rng.integers(1, 200)), int(rng.integers(1, crop + 1))
    case.update(height=height, width=width, crop=crop, stride=stride)
    count = np.zeros((height, width), int)
    corners = probe_seg.windows(height, width, crop, stride)
    for top, left in corners:
        assert 0 <= top <= max(height - crop, 0) and 0 <= left <= max(width - crop, 0)
        count[top:top + crop, left:left + crop] += 1
    assert count.min() >= 1 and len(set(corners)) == len(corners)
    # none is idle: a window less in either direction would leave a gap
    for side in (height, width):
        n = len({corner[0 if side == height else 1] for corner in corners}) if height != width else 1
        assert n == 1 or (n - 2) * stride + crop < side


@forall(300)
def test_fit_keeps_the_ratio_inside_both_sides(rng, case):
    height, width = (int(side) for side in rng.integers(1, 3000, 2))
    short = int(rng.integers(1, 1000))
    long = math.inf if rng.random() < 0.3 else short * rng.uniform(1, 5)
    case.update(height=height, width=width, long=long, short=short)
    h, w = probe_seg.fit(height, width, long, short)
    assert min(h, w) <= short + 0.5 and max(h, w) <= long + 0.5
    assert abs(min(h, w) - short) <= 0.5 or abs(max(h, w) - long) <= 0.5                  # one of them is reached
    factor = max(h, w) / max(height, width)
    assert abs(min(h, w) - factor * min(height, width)) <= 0.5 + 0.5 * min(height, width) / max(height, width) + 1e-9


@forall(300)
def test_sizes_in_whole_patches(rng, case):
    width, height = (int(side) for side in np.exp(rng.uniform(0, 8, 2)) + 1)
    size, patch = int(rng.integers(1, 600)), int(rng.choice([4, 7, 8, 14, 16]))
    case.update(width=width, height=height, size=size, patch=patch)
    w, h = figures.whole_patches(width, height, size, patch)
    assert w >= patch and h >= patch and w % patch == h % patch == 0
    scale = size / min(width, height)
    assert all(abs(got - side * scale) <= patch / 2 + 1e-6 or got == patch for got, side in ((w, width), (h, height)))


@forall(100)
def test_padding_to_whole_patches(rng, case):
    height, width, patch = int(rng.integers(1, 70)), int(rng.integers(1, 70)), int(rng.integers(1, 20))
    case.update(height=height, width=width, patch=patch)
    x = torch.from_numpy(rng.normal(size=(1, 3, height, width)))
    y = vit.pad_to_patches(x, patch)
    h, w = y.shape[-2:]
    assert h % patch == w % patch == 0 and h - height < patch and w - width < patch
    top, left = (h - height) // 2, (w - width) // 2
    assert torch.equal(y[..., top:top + height, left:left + width], x)
    assert abs(y).sum() == abs(x).sum() or torch.isclose(abs(y).sum(), abs(x).sum(), rtol=1e-12)


@forall(60)
def test_batches_of_processes_join_to_the_batches(rng, case):
    """Every picture at most once in an epoch, and the parts of processes and micro-batches are the whole."""
    world, accum, micro = (int(rng.integers(1, high)) for high in (5, 4, 5))
    size, epochs = world * accum * micro, int(rng.integers(1, 4))
    n = int(rng.integers(size, 6 * size + 1))
    start = int(rng.integers(epochs * (n // size)))
    case.update(world=world, accum=accum, batch_size=size, n=n, epochs=epochs, start=start)

    def args(accum):
        return type("Args", (), dict(batch_size=size, accum=accum, epochs=epochs, seed=3))
    whole = list(data.Batches(n, args(1), 0, 1, 0))
    parts = [list(data.Batches(n, args(accum), rank, world, start)) for rank in range(world)]
    joined = [[key for part in parts for chunk in part[step * accum:(step + 1) * accum] for key in chunk]
              for step in range(len(whole) - start)]
    assert joined == whole[start:] and len(whole) == epochs * (n // size)
    for epoch in range(epochs):
        keys = [key for batch in whole for key in batch if key[0] == epoch]
        assert len(keys) == len(set(keys)) == n // size * size
