"""entmax_triton.py against float64 and against the lines of entmax.py it replaces; on a CPU in Triton's interpreter."""
import collections
import functools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_entmax import bisect, layered
from torch._subclasses import fake_tensor

import entmax
import vit
from entmax import entmax15_attention
from paper import bench

triton = pytest.importorskip("triton")
import entmax_triton  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter's bfloat16 dot is wrong (numpy has no such type); a GPU also runs this one.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[
    pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs CUDA")])]
fused = functools.partial(entmax15_attention, fused=True)
eager = functools.partial(entmax15_attention, fused=False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def projected(B, H, T, D, dtype=torch.float32, scale=1.0):
    """q, k, v as a model makes them: strided views of one array (B, T, 3, H, D); q and k times `scale`."""
    qkv = torch.randn(B, T, 3, H, D, device=DEVICE)
    qkv[:, :, :2] *= scale
    return [x.transpose(1, 2) for x in qkv.to(dtype).unbind(2)]


def run(attend, q, k, v, dout):
    """out, dq, dk, dv"""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(out.dtype))]


def errors(attend, inputs, exact):
    return [((x - y).norm() / y.norm()).item() for x, y in zip(run(attend, *inputs), exact, strict=True)]


def exactly(*inputs):
    return run(eager, *(x.double() for x in inputs))


# ---- the numbers

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, H, T, D", [(2, 3, 37, 64), (1, 2, 41, 32), (2, 1, 100, 16), (1, 1, 64, 48),
                                        (1, 1, 17, 128)])
def test_error_is_that_of_the_eager_path(dtype, B, H, T, D):
    """Distance from float64, output and three gradients: at most 1.5 times that of entmax.py in the same type."""
    inputs = *projected(B, H, T, D, dtype), torch.randn(B, H, T, D, device=DEVICE).to(dtype)
    exact = exactly(*inputs)
    for ours, theirs in zip(errors(fused, inputs, exact), errors(eager, inputs, exact), strict=True):
        assert ours <= 1.5 * theirs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.1, 3.0])                         # rows nearly dense, rows of one or two weights
def test_error_at_other_scales_of_the_scores(dtype, scale):
    inputs = *projected(2, 2, 50, 32, dtype, scale), torch.randn(2, 2, 50, 32, device=DEVICE).to(dtype)
    exact = exactly(*inputs)
    pairs = list(zip(errors(fused, inputs, exact), errors(eager, inputs, exact), strict=True))
    if dtype == torch.float32 and scale > 1 and not CUDA:
        # dv takes its weights from k q^T, not q k^T, which numpy adds up in another order: a row of one weight then
        # misses the sum of 1 by the rounding of its score, where the eager path is exact.
        q, k = inputs[:2]
        assert pairs.pop()[0] <= torch.finfo(dtype).eps * (q @ k.transpose(-2, -1)).abs().max() / 32**0.5
    for ours, theirs in pairs:
        assert ours <= 1.5 * theirs


@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 64, 65, 197, 201, 257])
def test_every_length(T):
    """Around the sizes of tiles, and those of ViT-S/16 without and with registers."""
    inputs = *projected(1, 2, T, 16, torch.float16), torch.randn(1, 2, T, 16, device=DEVICE)
    for x, y in zip(run(fused, *inputs), exactly(*inputs), strict=True):
        assert x.isfinite().all() and (x - y).norm() <= 1e-3 * y.norm() + 1e-3 * (T == 1)


@pytest.mark.parametrize("T", [577, *(pytest.param(T, marks=pytest.mark.slow) for T in (1025, 1673, 2048))])
def test_long_rows(T):
    """Images of 384, 512 and 352 x 1216 pixels, and the longest there is."""
    inputs = *projected(1, 1, T, 16, torch.float16), torch.randn(1, 1, T, 16, device=DEVICE)
    for x, y in zip(run(fused, *inputs), exactly(*inputs), strict=True):
        assert (x - y).norm() <= 1e-3 * y.norm()


def test_rows_built_to_be_slow_for_newton():
    """Scores of test_entmax.py's layered row: q picks them out of k one by one."""
    q = torch.zeros(1, 1, 64, 64, device=DEVICE)
    k = torch.zeros(1, 1, 64, 64, device=DEVICE)
    q[..., 0] = 8.0                                                   # 8 = sqrt(64)
    k[0, 0, :, 0] = layered(64, .469, 6.59)
    v = torch.eye(64, device=DEVICE).expand(1, 1, 64, 64)             # the output is the weights
    weights = fused(q, k, v)[0, 0]
    assert (weights - entmax.entmax15_sort(k[0, 0, :, 0].double())).abs().max() < 1e-6
    assert (weights.sum(-1) - 1).abs().max() < 1e-6


def test_zeros_are_exact():
    q, k, v = projected(1, 2, 60, 32, scale=2.0)
    weights = entmax.entmax15(q @ k.transpose(-2, -1) / 32**0.5)
    used = weights[0, 0, 7] > 1e-6
    assert 0 < used.sum() < 40
    unused = ~used & (weights[0, 0, 7] == 0)
    other = v.clone()
    other[0, 0, unused] = 1e30                                        # times any weight at all it would show
    assert torch.equal(fused(q, k, v)[0, 0, 7], fused(q, k, other)[0, 0, 7])


def test_large_scores_are_shifted_first():
    q, k, v = projected(1, 1, 40, 32, scale=100.0)                    # |z| up to 2e5: one token takes all
    expected = eager(q.double(), k.double(), v.double())
    assert (fused(q, k, v) - expected).abs().max() < 1e-5


def test_keys_beyond_the_end_touch_nothing():
    """All scores near -256 and a loss scale: the zeros that fill up a tile have score 0, and overflowed dq with it."""
    q, k, v = projected(1, 1, 37, 16, torch.float16)
    inputs = 8 + q / 10, -8 + k / 10, v, 500 * torch.randn(1, 1, 37, 16, device=DEVICE)
    # dz is rounded to half before it meets k, so the -8 that all keys share, and which cancels, costs digits of dq.
    assert all(error < 0.03 for error in errors(fused, inputs, exactly(*inputs)))


@pytest.mark.parametrize("what", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_overflow_of_q_and_k_is_not_hidden(what, bad):
    inputs = projected(1, 1, 20, 16)
    inputs[what] = inputs[what].clone()
    inputs[what][0, 0, 3, 5] = bad
    dout = torch.randn(1, 1, 20, 16, device=DEVICE)
    ours, theirs = run(fused, *inputs, dout), run(eager, *inputs, dout)
    assert torch.equal(ours[0].isfinite(), theirs[0].isfinite()) and not ours[0][0, 0, 3].isfinite().any()
    assert all(not x.isfinite().all() for x in ours)


# ---- memory: strides in, strides out, what is kept

def test_any_strides_and_the_same_bits():
    q, k, v = projected(2, 2, 19, 16)
    dout = torch.randn(2, 2, 19, 16, device=DEVICE)
    first = run(fused, q, k, v, dout)
    for other in ([x.contiguous() for x in (q, k, v)],
                  [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)],           # a row's numbers are not neighbours
                  [x.flip(0).flip(0) for x in (q, k, v)]):
        assert all(torch.equal(x, y) for x, y in zip(run(fused, *other, dout), first, strict=True))
    spread = dout[..., :1].expand(-1, -1, -1, 16)                     # the gradient of a sum: stride 0
    expected = run(fused, q, k, v, spread.contiguous())
    assert all(torch.equal(x, y) for x, y in zip(run(fused, q, k, v, spread), expected, strict=True))


def test_rows_too_far_apart_are_copied():
    far = torch.empty_strided((1, 1, 2048, 16), (2**31, 2**31, 2**20, 1), device="meta")
    assert entmax_triton.rowwise(far).stride(2) == 16
    assert entmax_triton.rowwise(far[:, :, :2000]).stride(2) == 2**20


def test_projection_is_read_in_place_and_two_floats_a_row_are_kept():
    B, H, T, D = 2, 3, 40, 32
    qkv = torch.randn(B, T, 3, H, D, device=DEVICE, requires_grad=True)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(x.data_ptr(), x), lambda x: x):
        out = fused(*(x.transpose(1, 2) for x in qkv.unbind(2)))
    own = [x for x in saved.values() if x.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()]
    assert [tuple(x.shape) for x in own] == [(2, B, H, T)] and own[0].dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous()                        # heads are joined without a copy
    out.sum().backward()
    assert qkv.grad.isfinite().all()


def test_inputs_are_left_alone_and_runs_repeat():
    inputs = *projected(2, 1, 40, 16), torch.randn(2, 1, 40, 16, device=DEVICE)
    before = [x.clone() for x in inputs]
    first = run(fused, *inputs)
    assert all(torch.equal(x, y) for x, y in zip(run(fused, *inputs), first, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_only_some_inputs_need_gradients():
    q, k, v = projected(1, 1, 20, 16)
    dout = torch.randn(1, 1, 20, 16, device=DEVICE)
    _, _, dk, _ = run(fused, q, k, v, dout)
    k = k.detach().requires_grad_()
    fused(q, k, v).backward(dout)
    assert torch.equal(k.grad, dk)


# ---- its place among the rest of torch

def test_inference_mode_and_an_empty_batch():
    q, k, v = projected(2, 2, 17, 16)
    with torch.inference_mode():
        out = fused(q, k, v)
    assert torch.equal(out, fused(q, k, v))
    empty = [x[:0].detach().requires_grad_() for x in (q, k, v)]
    fused(*empty).sum().backward()
    assert [x.grad.shape for x in empty] == [(0, 2, 17, 16)] * 3


def test_operators_are_what_they_are_registered_as():
    q, k, v = (x.contiguous().requires_grad_() for x in projected(1, 2, 20, 16))
    torch.library.opcheck(entmax_triton.forward, (q, k, v, 8))
    out, tau = entmax_triton.forward(q, k, v, 8)
    torch.library.opcheck(entmax_triton.backward, tuple(x.detach() for x in (q, k, v, tau, out)),
                          test_utils=("test_schema", "test_faketensor"))


def test_compiles_into_one_graph():
    inputs = *projected(1, 2, 40, 16), torch.randn(1, 2, 40, 16, device=DEVICE)
    compiled = torch.compile(fused, fullgraph=True)
    for x, y in zip(run(compiled, *inputs), run(fused, *inputs), strict=True):
        assert torch.equal(x, y)


def test_autocast_changes_nothing():
    q, k, v = projected(1, 2, 40, 32)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = fused(q, k, v)
    assert torch.equal(inside, fused(q, k, v)) and inside.dtype == torch.float32


@pytest.mark.parametrize("method", [dict(), dict(registers=2, specialize=True)])
def test_model_with_either_path(method):
    model = vit.vit_tiny(dim=32, depth=2, heads=2, image_size=32, patch_size=8, attn="entmax15", **method).to(DEVICE)
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(20)                           # sharp enough for zeros
    images, towards, results = torch.randn(3, 3, 32, 32, device=DEVICE), torch.randn(3, 32, device=DEVICE), []
    for attend in (fused, eager):
        for block in model.blocks:
            block.attn.attend = attend
        model.zero_grad()
        out = model(images)
        (out * towards).sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert (model.attention(images, -1) == 0).any()
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5 * y.abs().max().item() + 1e-7)


def test_distributed_data_parallel(tmp_path):
    model = vit.vit_tiny(dim=32, depth=1, heads=2, image_size=32, patch_size=8, attn="entmax15").to(DEVICE)
    model.blocks[0].attn.attend = fused
    images, towards, grads = torch.randn(2, 3, 32, 32, device=DEVICE), torch.randn(2, 32, device=DEVICE), []
    torch.distributed.init_process_group("nccl" if CUDA else "gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for module in (model, torch.nn.parallel.DistributedDataParallel(model)):
            model.zero_grad()
            (module(images) * towards).sum().backward()             # alone, the sum of a LayerNorm is constant
            grads.append([p.grad.clone() for p in model.parameters()])
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(x, y) and x.abs().max() > 1e-3 for x, y in zip(*grads, strict=True))


def test_who_gets_the_kernel(monkeypatch):
    calls = []
    monkeypatch.setattr(entmax_triton, "attention", lambda q, k, v, steps: calls.append(tuple(q.shape)) or v)
    small, long, wide = (torch.zeros(1, 1, T, D, device=DEVICE) for T, D in ((20, 64), (2049, 16), (20, 160)))
    for x in (small, long, long.half(), long[:, :, :513], wide, small.double()):
        entmax15_attention(x, x, x)
    entmax15_attention(small, small, small, fused=False)
    entmax15_attention(small[:, :, :5], small, small)                 # fewer queries than keys
    entmax15_attention(small[0], small[0], small[0])                  # no heads
    assert calls == [(1, 1, 20, 64)] * CUDA
    entmax15_attention(small, small, small, fused=True)
    assert calls.pop() == (1, 1, 20, 64)


@pytest.mark.parametrize("shapes, dtype", [
    ([(1, 1, 2049, 16)] * 3, torch.float16), ([(1, 1, 513, 16)] * 3, torch.float32),
    ([(1, 1, 9, 8)] * 3, torch.float32), ([(1, 1, 9, 129)] * 3, torch.float32),
    ([(1, 1, 5, 16), (1, 1, 9, 16), (1, 1, 9, 16)], torch.float32), ([(1, 1, 9, 16)] * 3, torch.float64),
    ([(1, 1, 0, 16)] * 3, torch.float32),
])
def test_what_it_cannot_do_is_said(shapes, dtype):
    with pytest.raises(ValueError, match="fused=False"):
        fused(*(torch.zeros(shape, dtype=dtype, device=DEVICE) for shape in shapes))


def test_second_derivative_is_refused_not_wrong():
    q, k, v = (x.detach().requires_grad_() for x in projected(1, 1, 10, 16))
    dq, = torch.autograd.grad(fused(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dq.square().sum(), q)


@pytest.mark.skipif(CUDA, reason="this machine has CUDA")
def test_cpu_without_the_interpreter_is_told_what_to_do():
    code = ("import torch, entmax; x = torch.zeros(1, 1, 20, 16); entmax.entmax15_attention(x, x, x)\n"
            "try: entmax.entmax15_attention(x, x, x, fused=True)\nexcept ValueError as e: print(e)")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(entmax.__file__).parent, env=env, text=True,
                            capture_output=True, check=True)
    assert "TRITON_INTERPRET=1" in result.stdout and "fused=False" in result.stdout


# ---- the check on a user's card

def test_check_uses_a_kernel_that_is_right_and_fast(monkeypatch):
    times = iter([1.0, 2.0, 0.5])
    monkeypatch.setattr(entmax_triton, "timed", lambda f, inputs: next(times))
    good, line = entmax_triton.check((3, 2, 20, 16), torch.float16, DEVICE)
    assert good and "(3, 2, 20, 16) float16: error" in line and "1.00 ms, eager 2.00, softmax 0.50" in line


@pytest.mark.parametrize("dtype, shape", [(torch.float32, (1, 1, 513, 16)), (torch.float16, (1, 1, 9, 8))])
def test_check_says_what_the_kernel_is_not_made_for(dtype, shape):
    assert entmax_triton.check(shape, dtype, DEVICE)[1].endswith("not used, it is not made for this")


def broken(way):
    """`attention` that is wrong in the output, in a gradient, NaN, or slow."""
    def attend(q, k, v, steps):
        if way == "slow":
            time.sleep(0.02)
        out = eager(q, 1.05 * k if way == "wrong output" else k, v)
        if way == "NaN":
            return out + (0 * v - 0 * v.detach()).sqrt()              # in a gradient alone: 0 times infinity
        return out + 0.05 * (v - v.detach()) if way == "wrong gradient" else out
    return attend


@pytest.mark.parametrize("way, cause", [("wrong output", "wrong"), ("wrong gradient", "wrong"), ("NaN", "wrong"),
                                        ("slow", "slower")])
def test_check_leaves_out_a_kernel_that_is(way, cause, monkeypatch):
    monkeypatch.setattr(entmax_triton, "attention", broken(way))
    good, line = entmax_triton.check((2, 2, 20, 16), torch.float16, DEVICE)
    assert not good and ": not used, " in line and cause in line.partition(": not used, ")[2]


def test_a_kernel_that_cannot_be_launched_names_the_way_out(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")
    monkeypatch.setattr(entmax_triton, "forward_kernel", collections.defaultdict(lambda: refuse))
    x = torch.zeros(1, 1, 20, 16, device=DEVICE)
    with pytest.raises(OSError, match="RuntimeError: Failed to find C compiler. Please.*; set ENTMAX_FUSED=0 in"):
        fused(x, x, x)
    good, line = entmax_triton.check((1, 1, 20, 16), torch.float32, DEVICE)
    assert not good and "not used, the fused kernel cannot run here: RuntimeError: Failed to find C" in line


@pytest.mark.parametrize("alone, value, expected", [(False, None, True), (False, "1", True), (False, "0", False),
                                                    (True, None, False)])
def test_the_kernel_is_kept_out_by_the_environment_and_where_its_file_is_not(tmp_path, alone, value, expected):
    """entmax.py copied into another project works there without entmax_triton.py."""
    for name in ("entmax.py", "entmax_triton.py")[:1 if alone else 2]:
        shutil.copy(Path(entmax.__file__).parent / name, tmp_path)
    env = {name: x for name, x in os.environ.items() if name not in ("ENTMAX_FUSED", "PYTHONPATH")}
    code = ("import torch, entmax; x = torch.zeros(1, 1, 20, 16)\n"
            "print(entmax.HAS_TRITON, entmax.entmax15_attention(x, x, x).shape)")
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True,
                          env=env | ({"ENTMAX_FUSED": value} if value else {}))
    assert said.stdout.split()[0] == str(expected), said.stderr


# ---- Newton ends when all rows of a program are done

def solved(rows, steps):
    """Weights (n, T), float64, by the tau of one program of 16 rows of T scores: queries pick them out of the keys."""
    z = torch.stack([*rows, *[rows[0]] * (16 - len(rows))]).float().to(DEVICE)
    T = z.size(1)
    q, k = (torch.zeros(1, 1, T, 16, device=DEVICE) for _ in range(2))
    q[0, 0, :16], k[0, 0] = 4 * torch.eye(16, device=DEVICE), z.nan_to_num(0).t()       # 4 = sqrt(16)
    q[0, 0, :16][z.isnan().any(1)] = float("nan")                     # in k it would be in all rows
    out, tau = torch.empty_like(q), torch.empty(2, 1, 1, T, device=DEVICE)
    constants, options = entmax_triton.compiled_for(q, (16, 64, 8), STEPS=steps)
    strides = [stride for x in (q, k, q, out) for stride in x.stride()[:3]]
    entmax_triton.forward_kernel[(1,)](q, k, q, out, tau, *strides, 1, T, T, 16**-0.5, **constants, **options)
    top, shift = tau[:, 0, 0, :len(rows), None].double()
    return (z[:len(rows)].double() / 2 - top - shift).clamp_min(0).square()


def barely_in(T, above):
    """The highest score takes nearly all, and the others lie `above` the threshold it would have alone."""
    return torch.cat([torch.zeros(1), torch.full((T - 1,), 2 * above - 2)])


@pytest.mark.parametrize("T", [197, 2048])
def test_rows_built_to_be_slow_are_done_when_newton_ends(T):
    """As exact as after eight steps; if sum p only had to be within 1e-4 of 1 before the last, 2e-6 would be left."""
    for rows in ([layered(T, ratio, growth) for ratio, growth in ((.469, 6.59), (.508, 7.53), (.45, 5.53), (.6, 3.))],
                 *([barely_in(T, above)] for above in (5e-5, 2.15e-4, 3e-3)),
                 [scale * torch.randn(T) for scale in (0, .3, 1, 3, 10, 100)]):
        exact = bisect(torch.stack(rows).float().double().to(DEVICE))
        assert (solved(rows, 8) - exact).abs().max() < 1e-6


def test_newton_takes_the_steps_that_the_slowest_row_of_a_program_needs():
    """Were it to go on, tau would move by an ulp or two."""
    def steps(rows):
        best = solved(rows, 50)
        return next(n for n in range(50) if torch.equal(solved(rows, n), best))
    easy, slow = [torch.zeros(197)], [layered(197, .469, 6.59)]
    many = [torch.randn(197) for _ in range(15)]
    assert steps(easy) <= 2 < steps(many) == 5 < steps(slow + many) == 6


def test_a_row_of_nan_ends_newton_and_leaves_the_others_alone():
    rows = [*torch.randn(14, 197), layered(197, .469, 6.59), torch.full((197,), float("nan"))]
    weights = solved(rows, 51)                                        # an odd number: tau may end between two values
    assert weights[15].isnan().all() and torch.equal(weights[:15], solved(rows[:15], 51))


# ---- cards

@pytest.fixture
def card(monkeypatch):
    """Tensors without numbers on cuda:0, of the compute capability that is set."""
    entmax_triton.capability.cache_clear()
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda *_: None)
    monkeypatch.setattr(fake_tensor.FakeTensorMode, "avoid_device_init", property(lambda _: True))
    asked = []
    with fake_tensor.FakeTensorMode():
        yield lambda *capability: monkeypatch.setattr(torch.cuda, "get_device_capability",
                                                      lambda device: asked.append(device) or capability) or asked
    entmax_triton.capability.cache_clear()


@pytest.mark.parametrize("capability, good", [((7, 0), False), ((7, 5), False), ((8, 0), True), ((8, 9), True),
                                              ((9, 0), True), ((12, 0), True)])
def test_old_cards_get_the_eager_lines_and_are_told(monkeypatch, card, capability, good):
    asked, calls = card(*capability), []
    monkeypatch.setattr(entmax, "HAS_TRITON", True)
    monkeypatch.setattr(entmax_triton, "forward", lambda q, k, v, steps: calls.append(q) or (v, None))
    x = torch.empty(2, 3, 37, 64, dtype=torch.float16, device="cuda:0")
    for _ in range(3):
        assert entmax15_attention(x, x, x).shape == x.shape
    assert len(calls) == 3 * good and asked == [torch.device("cuda:0")]
    if good:
        assert entmax15_attention(x, x, x, fused=True) is x
    else:
        has = ".".join(map(str, capability))
        with pytest.raises(ValueError, match=f"8.0 or newer, got .* on a card of {has}; use fused=False"):
            entmax15_attention(x, x, x, fused=True)
        line = f"(2, 3, 37, 64) float16: not used, this card is of compute capability {has}, and 8.0 is the oldest"
        used, said = entmax_triton.check((2, 3, 37, 64), torch.float16, torch.device("cuda", 0))
        assert not used and line in said


@pytest.mark.filterwarnings("error")
def test_the_card_is_a_constant_to_dynamo(monkeypatch):
    entmax_triton.capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    compiled = torch.compile(lambda x, device: x + entmax_triton.too_old(device), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1), torch.device("cuda", 0)) == 1 and compiled(torch.zeros(1), torch.device("cpu")) == 0
    entmax_triton.capability.cache_clear()


@pytest.mark.parametrize("capability, triton, fused", [((9, 0), True, 7), ((7, 5), True, 0), ((9, 0), False, 0)])
def test_bench_attention_leaves_out_what_the_kernel_does_not_take(monkeypatch, card, capability, triton, fused):
    """Of four shapes in two types, the longest in float32; all of an old card, and where there is no Triton."""
    card(*capability)
    cases = []
    monkeypatch.setattr(bench, "HAS_TRITON", triton)
    monkeypatch.setattr(bench, "compare", lambda case, runs, *_: cases.append((case, list(runs))) or [])
    bench.bench_attention(bench.parse_args(["attention"])[0], [], torch.device("cuda", 0))
    with_kernel = [case for case, runs in cases if "entmax15, fused" in runs]
    assert len(cases) == 8 and len(with_kernel) == fused and "(16, 6, 1025, 64) float32" not in with_kernel


def test_bench_check_without_triton_is_one_line(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="check: Triton is not installed"):
        bench.bench_check(None, [], torch.device("cuda", 0))
