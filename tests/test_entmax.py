"""entmax.py against its definition, closed forms, a bisection written here, the sort and finite differences.

Ten seconds. `entmax15_sort` passes the same tests of the map, and is then the reference for derivatives.
"""
import math

import pytest
import torch

import entmax
from entmax import entmax15, entmax15_attention, entmax15_sort

both = pytest.mark.parametrize("f", [entmax15, entmax15_sort])


# ---- the map: definition, closed forms, oracle

@both
def test_definition(f):
    """p maximises <p, x> + 4/3 sum (p - p^1.5) over p >= 0, sum p = 1, with scores of any scale."""
    x = torch.randn(500, 50, dtype=torch.float64) * torch.logspace(-3, 2, 500, dtype=torch.float64)[:, None]
    p = f(x)
    slope = x + 4 / 3 - 2 * p.sqrt()                                  # its gradient in p
    gap = slope.amax(-1) - (p * slope).sum(-1)                        # Frank-Wolfe gap: 0 at the optimum and only there
    assert (p >= 0).all() and (p.sum(-1) - 1).abs().max() < 1e-14 and gap.abs().max() < 1e-12


@both
def test_two_scores_closed_form(f):
    gap = torch.linspace(0, 4, 41, dtype=torch.float64)
    d = gap.clamp_max(2) / 2                                          # u1 - u2 = d and u1^2 + u2^2 = 1
    p = f(torch.stack([gap, torch.zeros_like(gap)], -1))
    assert torch.allclose(p[:, 0], ((d + (2 - d * d).sqrt()) / 2) ** 2, rtol=0, atol=1e-14)
    assert (p[gap >= 2] == torch.tensor([1.0, 0.0])).all()


@both
def test_square_that_the_papers_formula_lacks(f):
    assert f(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([0.8307, 0.1693], abs=5e-5)   # not .75, .25


def test_vector_of_five():
    x = torch.tensor([1, 0.5, 0, -1, -3], dtype=torch.float64, requires_grad=True)
    p = entmax15(x)
    dx, = torch.autograd.grad(p[0], x)
    assert p.tolist() == pytest.approx([0.6242, 0.2917, 0.0841, 0, 0], abs=5e-5)
    assert dx.tolist() == pytest.approx([0.4048, -0.2634, -0.1414, 0, 0], abs=5e-5)
    tau = (x - x.max()) / 2 - p.sqrt()
    assert tau[:3].tolist() == pytest.approx([-0.79006] * 3, abs=5e-6)


def bisect(x, steps=80):
    """Oracle: [x/2 - tau]_+^2 along the last dim in float64. sum p falls as tau grows: halve the interval around 1."""
    z = x.double() / 2
    hi = z.amax(-1, keepdim=True)
    z, lo, hi = z - hi, torch.full_like(hi, -1), torch.zeros_like(hi)
    for _ in range(steps):
        mid = (lo + hi) / 2
        above = (z - mid).clamp_min(0).square().sum(-1, keepdim=True) > 1
        lo, hi = torch.where(above, mid, lo), torch.where(above, hi, mid)
    return (z - lo).clamp_min(0).square()


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("n", [1, 2, 3, 37, 197, 1025])
def test_matches_bisection(n, scale):
    x = torch.randn(50, n, dtype=torch.float64) * scale
    expected = bisect(x)
    assert (entmax15(x) - expected).abs().max() < 1e-13
    assert (entmax15_sort(x) - expected).abs().max() < 1e-13
    assert (entmax15(x.float()) - bisect(x.float())).abs().max() < 1e-6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- more of the map

def layered(n, ratio, growth):
    """A row that is slow for Newton: growth^j scores at height ratio^j above the lowest that can matter, for each j."""
    j, heights = 0, []
    while len(heights) < n:
        heights += [ratio**j] * int(growth**j)
        j += 1
    return 2 * (torch.tensor(heights[:n], dtype=torch.float64) - 1)


@pytest.mark.parametrize("n, ratio, growth", [(197, .469, 6.59), (1025, .508, 7.53), (8192, .45, 5.53), (8192, .6, 3.)])
def test_rows_built_to_be_slow(n, ratio, growth):
    x = layered(n, ratio, growth)[torch.randperm(n)]
    assert (entmax15(x) - bisect(x)).abs().max() < 1e-13
    assert (entmax15(x.float()) - bisect(x.float())).abs().max() < 1e-6


def test_number_of_steps_has_one_to_spare(monkeypatch):
    rows = [layered(1025, .508, 7.53), layered(8192, .45, 5.53)]

    def worst_sum(steps):
        monkeypatch.setattr(entmax, "NEWTON_STEPS", steps)
        return max(abs(entmax15(row).sum().item() - 1) for row in rows)
    assert worst_sum(6) > 1e-7 > worst_sum(7)


@pytest.mark.parametrize("x, steps", [
    (torch.zeros(3, 7), 2),                                           # equal scores: one step, and one that sees it
    (torch.stack([layered(8192, .45, 5.53), torch.zeros(8192).double()]), 8),           # the slowest row decides
    (torch.tensor([[0.0, 1.0], [torch.nan, 1.0]]), 8), (torch.full((2, 3), -torch.inf), 8), (torch.zeros(0, 3), 8)])
def test_stops_once_every_row_has_converged(monkeypatch, x, steps):
    taken = []
    sqrt = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: taken.append(1) or sqrt(x))     # one in each step
    entmax15(x)
    assert len(taken) == steps


def test_what_the_stop_leaves_is_rounding(monkeypatch):
    rows = [torch.randn(64, 197, dtype=torch.float64) * scale for scale in (0.01, 1, 3, 30)]
    rows += [layered(n, *r) for n in (65, 197, 2048, 8192) for r in ((.45, 5.53), (.508, 7.53), (.6, 3.))]
    for x in rows:
        for z in x, x.float():
            p = entmax15(z)
            with monkeypatch.context() as m:
                m.setattr(entmax, "NEWTON_STEPS", 20)
                m.setattr(torch.compiler, "is_compiling", lambda: True)                 # takes them all
                assert (entmax15(z) - p).abs().max() <= 4 * torch.finfo(z.dtype).eps


def test_twenty_thousand_scores():
    x = torch.randn(3, 20_000) * torch.tensor([[0.01], [1.0], [100.0]])
    assert (entmax15(x) - bisect(x)).abs().max() < 1e-6
    assert (entmax15(x).double().sum(-1) - 1).abs().max() < 2e-6
    assert (entmax15(x.double()) - bisect(x)).abs().max() < 1e-13
    tall = x.t().contiguous()
    assert (entmax15(tall, dim=0).t() - bisect(x)).abs().max() < 1e-6


def test_symmetries():
    x = torch.randn(100, 60, dtype=torch.float64) * 3
    p, order = entmax15(x), torch.randperm(60)
    assert torch.allclose(entmax15(x + 7.3), p, rtol=0, atol=1e-14)                         # shifts change nothing
    assert torch.allclose(entmax15(x[:, order]), p[:, order], rtol=0, atol=1e-15)           # permutations commute
    assert (p.gather(-1, x.argsort(-1)).diff(dim=-1) >= 0).all()                            # order is kept


def test_zeros_are_exact_and_idle():
    x = torch.randn(197, dtype=torch.float64) * 2
    p = entmax15(x)
    kept = p > 0
    assert 1 < kept.sum() < 20
    assert torch.allclose(entmax15(x[kept]), p[kept], rtol=0, atol=1e-15)   # the others might as well be absent


# ---- the derivative

def separated(*shape):
    """Float64 scores 0.13 or more apart, shuffled: no support changes within the step of a finite difference."""
    n = math.prod(shape)
    return (torch.randperm(n).double() * 0.13).view(shape).requires_grad_()


@both
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_gradcheck_and_gradgradcheck_on_every_dim(f, dim):
    x = separated(3, 4, 5)
    assert torch.autograd.gradcheck(lambda x: f(x, dim), x, eps=1e-6, atol=1e-6)
    assert torch.autograd.gradgradcheck(lambda x: f(x, dim), x, eps=1e-6, atol=1e-5)


def test_jacobian():
    x = torch.randn(30, dtype=torch.float64) * 2
    J, zero = torch.autograd.functional.jacobian(entmax15, x), entmax15(x) == 0
    assert J.sum(-1).abs().max() < 1e-15                              # the weights keep summing to 1
    assert torch.allclose(J, J.T, rtol=0, atol=1e-16) and torch.linalg.eigvalsh(J).min() > -1e-15
    assert zero.any() and (J[zero] == 0).all() and (J[:, zero] == 0).all()


@pytest.mark.parametrize("n", [2, 37, 197])
def test_gradient_matches_sort(n):
    scale = torch.logspace(-2, 2, 200, dtype=torch.float64)[:, None]
    x = (torch.randn(200, n, dtype=torch.float64) * scale).requires_grad_()
    dp = torch.randn(200, n, dtype=torch.float64)
    ours, = torch.autograd.grad(entmax15(x), x, dp)
    assert torch.allclose(ours, torch.autograd.grad(entmax15_sort(x), x, dp)[0], rtol=0, atol=1e-12)


def test_gradient_penalty_keeps_its_second_order_term():
    x, w = (torch.randn(20, 50, dtype=torch.float64) * 2).requires_grad_(), torch.randn(20, 50, dtype=torch.float64)

    def penalty_gradient(f):                                          # with w constant, once_differentiable returns 0
        slope, = torch.autograd.grad((f(x) * w).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]
    expected = penalty_gradient(entmax15_sort)
    assert expected.abs().max() > 0.1
    assert torch.allclose(penalty_gradient(entmax15), expected, rtol=1e-9, atol=1e-12)


@both
@pytest.mark.parametrize("row", [[0., 0.], [2., 0.], [5., 0.], [3.], [1., 1., 1., -9.], [4., 0., 0., 0.]])
def test_derivatives_are_finite_at_ties_and_kinks(f, row):
    x = torch.tensor(row, requires_grad=True)
    dx, = torch.autograd.grad(f(x)[0], x, create_graph=True)
    u = bisect(x.detach()).sqrt()
    first_row = (u.diag() - u.outer(u) / u.sum())[0]
    assert torch.allclose(dx.detach().double(), first_row, rtol=0, atol=1e-6)
    assert torch.autograd.grad(dx.square().sum(), x)[0].isfinite().all()


def test_saves_its_output_only_and_leaves_its_input_alone():
    x, saved = torch.randn(4, 50, requires_grad=True), []
    before = x.detach().clone()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        p = entmax15(x)
    p.sum().backward()
    assert saved == [x.numel()] and torch.equal(x, before)


# ---- unusual rows

def test_minus_infinity_is_a_score_that_is_not_there():
    x, hidden = torch.randn(40, dtype=torch.float64, requires_grad=True), torch.rand(40) < 0.5
    dp = torch.randn(40, dtype=torch.float64)
    for f in (entmax15, entmax15_sort):
        masked = x.detach().masked_fill(hidden, -math.inf).requires_grad_()
        p = f(masked)
        dx, = torch.autograd.grad(p, masked, dp)
        short = x.detach()[~hidden].requires_grad_()
        expected, = torch.autograd.grad(entmax15(short), short, dp[~hidden])
        assert (p[hidden] == 0).all() and (dx[hidden] == 0).all()
        assert torch.allclose(p[~hidden], entmax15(short), rtol=0, atol=1e-15)
        assert torch.allclose(dx[~hidden], expected, rtol=0, atol=1e-14)


def test_row_of_minus_infinity_is_nan_and_stays_alone():
    x = torch.randn(3, 8)
    x[1] = -math.inf
    assert x[1].softmax(-1).isnan().all() and entmax15(x)[1].isnan().all()
    assert torch.equal(entmax15(x)[[0, 2]], entmax15(x[[0, 2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_scores(dtype):
    x = torch.randn(50, 197, dtype=dtype)
    for scale in (1e4, 1e30, 1e38):                                   # the winner takes all
        z = (x * scale).clamp(-3e38, 3e38).requires_grad_()
        p = entmax15(z)
        p.square().sum().backward()
        assert (p.detach() - bisect(z.detach())).abs().max() < 1e-6 and z.grad.isfinite().all()
    assert (entmax15(x * 1e-30) - 1 / 197).abs().max() < 1e-9         # all equal
    for value in (0.0, 1e4, -1e30, 1e30, 1e-30):
        assert (entmax15(torch.full((2, 37), value, dtype=dtype)) - 1 / 37).abs().max() < 1e-8


@pytest.mark.parametrize("shape, dim", [((0, 5), -1), ((5, 0), 0), ((2, 0, 3), 2), ((4, 1), 1), ((1, 1), 0), ((), -1),
                                         ((3, 0), -1), ((0, 3), 0)])
def test_empty_batches_and_rows_of_one(shape, dim):
    x = torch.randn(shape, requires_grad=True)
    p = entmax15(x, dim)
    p.sum().backward()
    assert p.shape == x.shape == x.grad.shape and (p == 1).all() and (x.grad == 0).all()


def test_memory_layout_does_not_matter():
    x = torch.randn(6, 7, 8, dtype=torch.float64)
    for view in (x.transpose(0, 2), x[:, ::2, 1:], x.flip(1), x[:1].expand(3, 7, 8), x[..., :1].expand(6, 7, 5)):
        for dim in range(3):
            expected = bisect(view.movedim(dim, -1)).movedim(-1, dim)
            assert (entmax15(view, dim) - expected).abs().max() < 1e-13
            assert (entmax15_sort(view, dim) - expected).abs().max() < 1e-13


def test_integers_are_refused_by_name():
    with pytest.raises(TypeError, match="torch.int64"):
        entmax15(torch.tensor([1, 2, 3]))


# ---- precision

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_half_precision_error_is_rounding_of_the_result(dtype, scale):
    x, dp = (torch.randn(300, 197) * scale).to(dtype).requires_grad_(), torch.randn(300, 197).to(dtype)
    exact = x.detach().double().requires_grad_()
    p, p_exact = entmax15(x), entmax15_sort(exact)
    dx, dx_exact = torch.autograd.grad(p, x, dp)[0], torch.autograd.grad(p_exact, exact, dp.double())[0]
    half_ulp, u = torch.finfo(dtype).eps / 2, p_exact.detach().sqrt()
    assert p.dtype == dx.dtype == dtype
    assert ((p - p_exact).abs() <= half_ulp * p_exact + 1e-6).all()
    # Backward has the rounded p: half its relative error in u or, below the normal numbers, the root of half a step.
    du = half_ulp / 2 * u + (half_ulp * torch.finfo(dtype).smallest_normal) ** 0.5 * (u > 0)
    away = (dp.double() - (u * dp).sum(-1, keepdim=True) / u.sum(-1, keepdim=True)).abs()
    shift = (du * away).sum(-1, keepdim=True) / (u - du).clamp_min(0).sum(-1, keepdim=True)       # of the row's mean
    assert ((dx - dx_exact).abs() <= half_ulp * dx_exact.abs() + du * away + (u + du) * shift + 5e-6).all()
    assert (p.double().sum(-1) - 1).abs().max() < 4e-3


def test_keeps_no_more_than_its_rounded_output():
    """Two bytes a weight in bfloat16, also when attention has float32 scores; nothing beside the output itself."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        x = torch.randn(2, 3, 20, 20, requires_grad=True)
        p = entmax15(x.bfloat16())
        q, k, v = torch.randn(3, 1, 2, 30, 8).bfloat16().requires_grad_()
        entmax15_attention(q, k, v)
    assert saved.pop(p.data_ptr()).dtype == torch.bfloat16
    scores = [t for t in saved.values() if t.numel() >= 30 * 30]
    assert [t.dtype for t in scores] == [torch.bfloat16] and scores[0].shape[-2:] == (30, 30)


def test_autocast_changes_nothing():
    x = torch.randn(20, 197, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = entmax15(x)
        dx, = torch.autograd.grad(inside, x, x.detach())
    outside = entmax15(x)
    assert torch.equal(inside, outside) and torch.equal(dx, torch.autograd.grad(outside, x, x.detach())[0])


# ---- attention

def attention_loop(q, k, v):
    out = torch.zeros(*q.shape[:3], v.size(-1), dtype=torch.float64)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, q.shape[:3])):
        scores = torch.stack([q[b, h, t].double().dot(key.double()) for key in k[b, h]]) / math.sqrt(q.size(-1))
        out[b, h, t] = bisect(scores) @ v[b, h].double()
    return out


def test_attention_equals_explicit_loop():
    q, k, v = torch.randn(3, 2, 2, 11, 8)
    assert (entmax15_attention(q, k, v) - attention_loop(q, k, v)).abs().max() < 2e-6
    q, k, v = q.double()[:, :, :5], k.double(), v.double()            # 5 queries, 11 keys
    assert (entmax15_attention(q, k, v) - attention_loop(q, k, v)).abs().max() < 1e-13


def test_attention_gradcheck():
    q, k, v = (torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(entmax15_attention, (q, k, v), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_scores_are_float32_under_autocast(dtype):
    q, k, v = (torch.randn(3, 2, 2, 11, 64) * torch.tensor([4, 4, 1]).view(3, 1, 1, 1, 1)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = entmax15_attention(q, k, v)
        single = entmax15_attention(q.float(), k.float(), v.float())
    expected = attention_loop(q, k, v)
    assert out.dtype == dtype and single.dtype == torch.float32
    assert (single - expected).abs().max() < 2e-5                     # scores near 50 in bfloat16 would be off by 0.1
    # Weights rounded, products summed in float32, result rounded: two half-ulps of values no larger than max |v|.
    assert (out - expected).abs().max() <= 1.01 * torch.finfo(dtype).eps * v.abs().max()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(backend):
    x = torch.randn(3, 2, 2, 11, 8)

    def run(f):
        qkv = x.clone().requires_grad_()
        out = f(*qkv)
        return out.detach(), torch.autograd.grad(out, qkv, x[0])[0]
    out, dx = run(entmax15_attention)
    out_compiled, dx_compiled = run(torch.compile(entmax15_attention, fullgraph=True, backend=backend))
    assert torch.allclose(out_compiled, out, rtol=0, atol=2e-6) and torch.allclose(dx_compiled, dx, rtol=0, atol=1e-5)


# ---- in other people's models: masks, other shapes, torch.func, torch.export

def subset(q, k, v, seen):
    """The attention of one query over the keys that it sees, alone."""
    return entmax15_attention(q, k[..., seen, :], v[..., seen, :])


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_leaves_the_attention_over_what_is_seen(kind):
    q, k, v = (torch.randn(2, 3, T, 8, dtype=torch.float64, requires_grad=True) for T in (5, 9, 9))
    seen = torch.rand(2, 1, 5, 9) < 0.6                               # the same for all heads
    seen[..., 0] = True
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    out = entmax15_attention(q, k, v, mask=mask)
    expected = torch.stack([torch.cat([subset(q[b, :, i:i + 1], k[b], v[b], seen[b, 0, i]) for i in range(5)], 1)
                            for b in range(2)])
    assert (out - expected).abs().max() < 1e-13
    weight = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, expected)), strict=True):
        assert (a - b).abs().max() < 1e-13


def test_an_additive_mask_is_added_to_the_scores():
    q, k, v = (torch.randn(1, 2, 7, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(7, 7, dtype=torch.float64)
    assert torch.equal(entmax15_attention(q, k, v, mask=bias), entmax15(q / 2 @ k.transpose(-2, -1) + bias) @ v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_sees_no_key_gets_zeros_and_gives_no_gradient(dtype):
    q, k, v = (torch.randn(1, 2, 4, 8).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False
    out = entmax15_attention(q, k, v, mask=mask)
    out.float().square().sum().backward()
    assert out.dtype == dtype and (out[:, :, 1] == 0).all() and (out[:, :, 0] != 0).all()
    assert (q.grad[:, :, 1] == 0).all() and all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in (q, k, v))


def test_heads_in_groups_are_a_matter_of_shapes():
    q, k, v = torch.randn(2, 3, 4, 5, 8), *torch.randn(2, 2, 3, 1, 6, 8)      # 3 groups of 4 heads, 5 queries, 6 keys
    plain = entmax15_attention(q.flatten(1, 2), *(x.expand(2, 3, 4, 6, 8).flatten(1, 2) for x in (k, v)))
    assert torch.allclose(entmax15_attention(q, k, v).flatten(1, 2), plain, atol=1e-6)


@pytest.mark.parametrize("name", ["attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"])
def test_what_the_attention_of_torch_has_beyond_is_refused_by_name(name):
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(TypeError, match=name):
        entmax15_attention(x, x, x, **{name: None})
    with pytest.raises(ValueError, match="no mask"):
        entmax15_attention(x, x, x, mask=torch.ones(3, 3, dtype=torch.bool), fused=True)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("batched", [0, 1, 2, -1])
def test_vmap_over_any_dimension(dim, batched):
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = torch.stack([entmax15_sort(part, dim) for part in x.unbind(batched)])
    assert (torch.func.vmap(lambda part: entmax15(part, dim), in_dims=batched)(x) - expected).abs().max() < 1e-13


@pytest.mark.filterwarnings("ignore:There is a performance drop")     # torch has no batched addcmul_
def test_function_transforms_equal_those_of_the_sort():
    """jacrev, per-sample gradients of a loss over attention, and a Hessian."""
    x = torch.randn(4, 6, dtype=torch.float64)
    def loss(f, row):
        return (f(row) * torch.arange(6)).sum().square()
    for row in x:
        jacobian = torch.autograd.functional.jacobian(entmax15_sort, row)
        assert (torch.func.jacrev(entmax15)(row) - jacobian).abs().max() < 1e-13
        hessian = torch.autograd.functional.hessian(lambda row: loss(entmax15_sort, row), row)
        assert (torch.func.jacrev(torch.func.grad(lambda row: loss(entmax15, row)))(row) - hessian).abs().max() < 1e-12

    q, k, v = torch.randn(3, 4, 2, 5, 8, dtype=torch.float64)
    per_sample = torch.func.vmap(torch.func.grad(lambda q, k, v: entmax15_attention(q, k, v).square().sum()))(q, k, v)
    for i in range(4):
        one = q[i].clone().requires_grad_()
        entmax15_attention(one, k[i], v[i]).square().sum().backward()
        assert (per_sample[i] - one.grad).abs().max() < 1e-13


def test_shapes_alone_on_the_meta_device():
    x = torch.empty(2, 3, 5, 8, device="meta")
    assert entmax15(x, 1).shape == entmax15_attention(x, x, x).shape == x.shape


def test_exports_for_inference():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return entmax15_attention(q, k, v)

    inputs = tuple(torch.randn(3, 1, 2, 5, 8))
    with torch.no_grad():
        exported = torch.export.export(Attention(), inputs).module()
    expected = entmax15_attention(*(x.double() for x in inputs))                # the graph takes all steps: other bits
    assert (exported(*inputs) - expected).abs().max() < 1e-6


def test_tracers_get_the_fixed_count():
    from torch.fx.experimental.proxy_tensor import make_fx
    x = torch.randn(3, 7)
    assert (make_fx(lambda x: entmax15(x))(x)(x) - bisect(x)).abs().max() < 1e-6


def test_a_mask_of_integers_is_refused():
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(TypeError, match="bool or floating-point, got torch.int64"):
        entmax15_attention(q, q, q, mask=torch.ones(3, 3, dtype=torch.int64))
