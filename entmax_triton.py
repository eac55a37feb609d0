"""Entmax-1.5 attention on CUDA, fused: no (T, T) array ever leaves the chip. `entmax.entmax15_attention` calls it.

    out = entmax15_attention(q, k, v)       # on CUDA; with fused=False it is the four lines of entmax.py

Why a whole row at a time. FlashAttention walks over the tiles of a row, because softmax can be mended afterwards: a new
maximum rescales what was summed before. The threshold tau of entmax cannot: it is the root of an equation in all scores
of the row, and whether a score gets any weight may depend on the last one read. A tiled kernel has to come back to
every tile in each step of its solver, and to compute q k^T again each time. But the rows of a ViT are short, 37 to
2,000 tokens, and 16 to 64 of them fit into the registers of one program. So here

    forward     a program holds BM query rows with all their scores: q k^T once, tau by Newton in registers, times v
    queries     with tau known, a weight depends on its own score alone, so tiles are enough, as in FlashAttention:
                BM queries walk over the keys once for the row correction delta, once for dq
    keys        BM keys walk over the queries for dk and dv

With z the scores, u = [z/2 - tau]_+ and p = u^2 (entmax.py derives both lines),

    dz_ij = u_ij (dp_ij - delta_i),      delta_i = sum_j u_ij dp_ij / sum_j u_ij.

What the forward pass leaves for the backward pass is tau: max z/2 and tau - max z/2, two floats a row, as their sum
alone would round tau by an ulp of the largest score. The pass over queries leaves delta for that over keys. No atomics
are used, so the bits repeat. Scores, u and sums are float32; p and dz are rounded to the type of v before a product, as
in FlashAttention.

TRITON_INTERPRET=1, set before anything imports triton, runs all of this on the CPU, which is how it is tested there.

    B images, H heads, T tokens, D width of a head, DP the next power of two; BM x BN a tile, TILES of them a row
"""
import contextlib
import functools
import math
import os
import statistics
import time

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

# Tokens. Longer rows do not fit, and in float32 their forward pass takes minutes to compile (1,025: 28 s of CPU time).
LONGEST = {torch.float16: 2048, torch.bfloat16: 2048, torch.float32: 512}
# Compute capability. For older cards (T4, RTX 20: 7.5) Triton makes no use of tensor cores, and kilobytes spill.
OLDEST = 8, 0


def supports(q, k, v):
    """Whether the kernel computes this: q, k, v of one shape (B, H, T, D) and type, T <= 2048 or, of float32, 512, and
    16 <= D <= 128, on a card of compute capability 8.0 or newer. AMD's cards are "cuda" to torch, too, and are taken:
    it compiles for MI200, MI300 and RX 7000, and none has run it. What is not "cuda" the launch refuses."""
    return (q.ndim == 4 and q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype and q.dtype in LONGEST
            and q.device == k.device == v.device and 0 < q.size(-2) <= LONGEST[q.dtype] and 16 <= q.size(-1) <= 128
            and not too_old(q.device))


@torch.compiler.assume_constant_result                                # Dynamo would look behind the cache, and warn
def too_old(device):
    return device.type == "cuda" and capability(device) < OLDEST


@functools.cache                                                      # torch takes 6 to 9 us, and every layer asks
def capability(device):
    return torch.cuda.get_device_capability(device)


# ---- tiles of arrays (B, H, T, D) with any strides but the last, which is 1

@triton.jit
def start(base, head, H, stride_b, stride_h):
    """Where head `head` of B H begins; in 64 bits, as a large batch has more than 2^31 numbers."""
    return base + (head // H).to(tl.int64) * stride_b + (head % H).to(tl.int64) * stride_h


@triton.jit
def tile(base, first, stride, T, D: tl.constexpr, N: tl.constexpr, W: tl.constexpr, left=0):
    """Rows first .. first + N and columns left .. left + W of one head -> (N, W); zeros outside (T, D)."""
    at, d = first + tl.arange(0, N)[:, None], left + tl.arange(0, W)[None, :]
    return tl.load(base + at * stride + d, mask=(at < T) & (d < D), other=0.0)


@triton.jit
def put(base, x, first, stride, T, D: tl.constexpr, N: tl.constexpr, DP: tl.constexpr):
    at, d = first + tl.arange(0, N)[:, None], tl.arange(0, DP)[None, :]
    tl.store(base + at * stride + d, x.to(base.dtype.element_ty), mask=(at < T) & (d < D))


@triton.jit
def dot(a, b):
    return tl.dot(a, b, input_precision="ieee")                       # for float32: TF32 would drop 13 bits


@triton.jit
def by_rows(x, a, i, stride_a, b, j, stride_b, T, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """(M, N) products of rows i .. i + M of a, which are in x, with rows j .. j + N of b."""
    if x.dtype == tl.float32:
        # No tensor cores: a dot is unrolled multiply-adds, and all D of them at once run out of registers.
        y = tl.zeros((M, N), tl.float32)
        for d in range(0, DP, 16):
            y += dot(tile(a, i, stride_a, T, D, M, 16, d), tl.trans(tile(b, j, stride_b, T, D, N, 16, d)))
    else:
        y = dot(x, tl.trans(tile(b, j, stride_b, T, D, N, DP)))
    return y


@triton.jit
def positive(x):
    """[x]_+ where NaN stays NaN; a plain maximum would hide that q or k has overflowed."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def roots(half, inside, top, shift):
    """u of the scores again, in the backward pass, rounded as the forward pass rounds.

    The choice between product and difference is there for this too: the compiler would contract them into one fused
    multiply-add, and tau, which stands apart from the maximum for the sake of an ulp, would meet other scores.
    """
    return positive(tl.where(inside, half, float("-inf")) - top - shift)


# ---- the three passes; H, T and rows change from batch to batch and shall not compile anew

@triton.jit(do_not_specialize=["H", "T", "rows"])
def forward_kernel(q, k, v, out, tau, qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, H, T, rows, scale,
                   STEPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   TILES: tl.constexpr):
    """out and tau of BM queries of one head. `rows` is B H T.

    Newton ends when all BM rows are done: a step d leaves mass = sum [u - d]_+^2 <= mass - 2 s d + T d^2 <= 1 + T d^2,
    as s d = mass - sqrt(mass); so after one with T d^2 <= 1e-7 no more than rounding is left.
    """
    blocks = tl.cdiv(T, BM)
    head, i = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BM      # neighbours share k and v in L2
    q, k, v = start(q, head, H, qb, qh), start(k, head, H, kb, kh), start(v, head, H, vb, vh)

    x = tile(q, i, qt, T, D, BM, DP)
    halves, top = (), tl.full((BM, BN), float("-inf"), tl.float32)    # z/2: TILES arrays (BM, BN) in registers
    for j in tl.static_range(TILES):
        half = by_rows(x, q, i, qt, k, j * BN, kt, T, D, DP, BM, BN) * (scale / 2)
        if j == TILES - 1:                                            # no other tile reaches beyond T
            half = tl.where(j * BN + tl.arange(0, BN)[None, :] < T, half, float("-inf"))
        halves, top = halves + (half,), tl.maximum(top, half)
    top, below = tl.max(top, 1), ()
    for j in tl.static_range(TILES):
        below = below + (halves[j] - top[:, None],)                   # z/2 with its maximum at 0

    shift = tl.full((BM,), -1.0, tl.float32)                          # tau of these; entmax.py explains the steps
    left = STEPS
    while left > 0:
        s, sq = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
        for j in tl.static_range(TILES):
            u = tl.clamp(below[j] - shift[:, None], 0.0, 1.0)         # one instruction; drops NaN, which y shows
            s += u
            sq += u * u
        total = tl.sum(sq, 1)
        step = (total - tl.sqrt(total)) / tl.sum(s, 1)
        shift += step
        left = tl.where(tl.max((T * step * step > 1e-7).to(tl.int32), 0) > 0, left - 1, 0)      # NaN ends it too

    y = tl.zeros((BM, DP), tl.float32)
    for j in tl.static_range(TILES):
        u = positive(below[j] - shift[:, None])
        values = tile(v, j * BN, vt, T, D, BN, DP)
        y += dot((u * u).to(values.dtype), values)
    put(start(out, head, H, ob, oh), y, i, ot, T, D, BM, DP)
    at = i + tl.arange(0, BM)
    tau += head.to(tl.int64) * T
    tl.store(tau + at, top, mask=at < T)
    tl.store(tau + rows + at, shift, mask=at < T)


@triton.jit(do_not_specialize=["H", "T", "rows"])
def queries_kernel(q, k, v, dout, tau, delta, dq, qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, ob, oh, ot,
                   H, T, rows, scale, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   TILES: tl.constexpr):
    """delta and dq of BM queries of one head, in two walks over the keys."""
    blocks = tl.cdiv(T, BM)
    head, i = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BM
    q, k, v = start(q, head, H, qb, qh), start(k, head, H, kb, kh), start(v, head, H, vb, vh)
    dout, at = start(dout, head, H, gb, gh), i + tl.arange(0, BM)
    tau += head.to(tl.int64) * T
    top, shift = tl.load(tau + at, mask=at < T, other=0.0), tl.load(tau + rows + at, mask=at < T, other=-1.0)
    x, g = tile(q, i, qt, T, D, BM, DP), tile(dout, i, gt, T, D, BM, DP)

    s, udp = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for t in range(TILES):
        j = t * BN
        half = by_rows(x, q, i, qt, k, j, kt, T, D, DP, BM, BN) * (scale / 2)
        u = roots(half, j + tl.arange(0, BN)[None, :] < T, top[:, None], shift[:, None])
        s, udp = s + u, udp + u * by_rows(g, dout, i, gt, v, j, vt, T, D, DP, BM, BN)
    s = tl.sum(s, 1)
    correction = tl.sum(udp, 1) / tl.where(s == 0, 1.0, s)            # 0 if a score of 1e7 was not met again to an ulp
    tl.store(delta + head.to(tl.int64) * T + at, correction, mask=at < T)

    y = tl.zeros((BM, DP), tl.float32)
    for t in range(TILES):
        j = t * BN
        half = by_rows(x, q, i, qt, k, j, kt, T, D, DP, BM, BN) * (scale / 2)
        u = roots(half, j + tl.arange(0, BN)[None, :] < T, top[:, None], shift[:, None])
        dp = by_rows(g, dout, i, gt, v, j, vt, T, D, DP, BM, BN)
        keys = tile(k, j, kt, T, D, BN, DP)
        y += dot((u * (dp - correction[:, None])).to(keys.dtype), keys)
    put(start(dq, head, H, ob, oh), y * scale, i, ot, T, D, BM, DP)


@triton.jit(do_not_specialize=["H", "T", "rows"])
def keys_kernel(q, k, v, dout, tau, delta, dk, dv, qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, ob, oh, ot,
                H, T, rows, scale, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                TILES: tl.constexpr):
    """dk and dv of BM keys of one head, BN queries at a time; the tiles are transposed: (keys, queries)."""
    blocks = tl.cdiv(T, BM)
    head, j = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BM
    q, k, v = start(q, head, H, qb, qh), start(k, head, H, kb, kh), start(v, head, H, vb, vh)
    dout = start(dout, head, H, gb, gh)
    tau += head.to(tl.int64) * T
    delta += head.to(tl.int64) * T

    keys, values = tile(k, j, kt, T, D, BM, DP), tile(v, j, vt, T, D, BM, DP)
    x, y = tl.zeros((BM, DP), tl.float32), tl.zeros((BM, DP), tl.float32)
    for t in range(TILES):
        i = t * BN
        at = i + tl.arange(0, BN)
        top = tl.load(tau + at, mask=at < T, other=0.0)
        shift = tl.load(tau + rows + at, mask=at < T, other=0.0)
        correction = tl.load(delta + at, mask=at < T, other=0.0)
        half = by_rows(keys, k, j, kt, q, i, qt, T, D, DP, BM, BN) * (scale / 2)
        u = roots(half, at[None, :] < T, top[None, :], shift[None, :])     # queries beyond T weigh nothing
        dp = by_rows(values, v, j, vt, dout, i, gt, T, D, DP, BM, BN)
        g, queries = tile(dout, i, gt, T, D, BN, DP), tile(q, i, qt, T, D, BN, DP)
        y += dot((u * u).to(g.dtype), g)
        x += dot((u * (dp - correction[None, :])).to(queries.dtype), queries)
    put(start(dk, head, H, ob, oh), x * scale, j, ot, T, D, BM, DP)
    put(start(dv, head, H, ob, oh), y, j, ot, T, D, BM, DP)


# ---- the operator, as autograd and torch.compile know it

def sizes(q):
    """(BM, BN, warps) for each of the three passes.

    A program must keep its part of BM x T scores, and its sums, in 255 registers per thread. In 16 bits these sizes do
    up to 257 tokens on all cards of paper/kernels.py, which counts; which of those that do are the fastest only a GPU
    can tell.
    """
    T, D = q.shape[-2:]
    if q.dtype == torch.float32:
        return (16, 32 if T <= 512 else 64, 8), (32, 16, 4), (32, 16, 4)
    warps = 4 if D <= 64 else 8
    forward = ((64, 64, warps) if T <= 64 else (64 if D <= 64 else 32, 32, 4) if T <= 224 else
               (16, 64, 4) if T <= 512 and D <= 32 else (32, 64, 8) if T <= 512 else (16, 64, 8))
    return forward, (64, 32 if D <= 64 else 16, warps), (64, 32, warps)


def like(q):
    """An empty (B, H, T, D) whose bytes lie as (B, T, H, D): the next layer joins the heads without a copy."""
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


def rowwise(x):
    """x itself, or a copy if the numbers of a row are not neighbours, or rows lie too far apart for 32 bits."""
    return x if x.stride(-1) == 1 and x.size(2) * x.stride(2) < 2**31 else x.contiguous()


def compiled_for(q, size, **more):
    """(constants, options of the compiler) of a pass."""
    (T, D), (BM, BN, warps) = q.shape[-2:], size
    return (dict(D=D, DP=triton.next_power_of_2(D), BM=BM, BN=BN, TILES=triton.cdiv(T, BN), **more),
            dict(num_warps=warps, enable_fp_fusion=True))


def launch(kernel, tensors, strided, size, **more):
    """Run a pass on all blocks of BM tokens of all heads; `strided` are those of the tensors that have strides."""
    q, (constants, options) = tensors[0], compiled_for(tensors[0], size, **more)
    if not (q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError("the fused kernel needs CUDA tensors, or TRITON_INTERPRET=1 set before Python starts; use "
                         "fused=False")
    B, H, T, D = q.shape
    strides = (stride for x in strided for stride in x.stride()[:3])
    with torch.cuda.device_of(q), its_way_out():
        kernel[(B * H * triton.cdiv(T, size[0]),)](*tensors, *strides, H, T, B * H * T, D**-0.5, **constants, **options)


@contextlib.contextmanager
def its_way_out():
    """Triton compiles with a C compiler and Python.h, which containers lack, and for cards that it knows."""
    try:
        yield
    except Exception as error:
        cause = " ".join(str(error).split())[:300]
        raise OSError(f"the fused kernel cannot run here: {type(error).__name__}: {cause}; set ENTMAX_FUSED=0 in the "
                      "environment to go on without it") from error


@torch.library.custom_op("entmax15::attention", mutates_args=())
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, T, D) and tau (2, B, H, T), float32: max z/2, and how far below it the threshold lies."""
    q, k, v = rowwise(q), rowwise(k), rowwise(v)
    out, tau = forward_like(q, k, v, steps)
    launch(forward_kernel, (q, k, v, out, tau), (q, k, v, out), sizes(q)[0], STEPS=steps)
    return out, tau


@forward.register_fake
def forward_like(q, k, v, steps):
    return like(q), q.new_empty(2, *q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("entmax15::attention_backward", mutates_args=())
def backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tau: torch.Tensor, dout: torch.Tensor) -> tuple[
        torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv (B, H, T, D)."""
    q, k, v, dout = rowwise(q), rowwise(k), rowwise(v), rowwise(dout)
    dq, dk, dv = backward_like(q, k, v, tau, dout)
    delta = torch.empty_like(tau[0])
    _, queries, keys = sizes(q)
    launch(queries_kernel, (q, k, v, dout, tau, delta, dq), (q, k, v, dout, dq), queries)
    launch(keys_kernel, (q, k, v, dout, tau, delta, dk, dv), (q, k, v, dout, dk), keys)
    return dq, dk, dv


@backward.register_fake
def backward_like(q, k, v, tau, dout):
    return like(q), like(q), like(q)


def remember(ctx, inputs, output):
    ctx.set_materialize_grads(False)                                  # or a gradient of zeros would be made for tau
    ctx.save_for_backward(*inputs[:3], output[1])


forward.register_autograd(lambda ctx, dout, _: (*backward(*ctx.saved_tensors, dout), None), setup_context=remember)


def attention(q, k, v, steps):
    """out (B, H, T, D), its bytes as (B, T, H, D); `steps` of Newton. Differentiable once."""
    if not supports(q, k, v):
        got = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v))
        if too_old(q.device):
            got += f" on a card of {'.'.join(map(str, capability(q.device)))}"
        raise ValueError("the fused kernel takes q, k, v of one shape (B, H, T, 16..128) and one type, T up to 2048 in "
                         "16 bits and 512 in float32, and a card of compute capability 8.0 or newer, got "
                         f"{got}; use fused=False")
    return forward(q, k, v, steps)[0]


# ---- on a user's card, before anything rests on it

ALLOWED = 2                                                           # times the eager path's distance from float64


def check(shape, dtype, device):
    """(whether to use the kernel, a line that says why) for q, k, v of `shape` (B, H, T, D): forward and backward on
    random input beside the eager path, in its numbers and in its time."""
    from entmax import entmax15_attention  # imports this file

    what, device = f"entmax kernel, {tuple(shape)} {str(dtype).removeprefix('torch.')}", torch.device(device)
    if too_old(device):
        has = ".".join(map(str, capability(device)))
        return False, f"{what}: not used, this card is of compute capability {has}, and 8.0 is the oldest it is for"
    ours, eager = (functools.partial(entmax15_attention, fused=fused) for fused in (True, False))
    draws = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(shape, generator=draws, device=device).to(dtype) for _ in range(4)]
    if not supports(*inputs[:3]):
        return False, f"{what}: not used, it is not made for this"
    try:
        few = [x[:2].double() for x in inputs]                        # float64 is slow, and keeps (T, T) scores
        exact = passes(eager, few)
        errors = [[((x - y).norm() / y.norm()).item() for x, y in zip(passes(f, [x.to(dtype) for x in few]), exact,
                                                                      strict=True)] for f in (ours, eager)]
        ratios = [a / b for a, b in zip(*errors, strict=True)]
        times = [timed(ours, inputs)]
        for attend in (eager, F.scaled_dot_product_attention):        # the kernel needs less memory than these
            try:
                times.append(timed(attend, inputs))
            except torch.OutOfMemoryError:
                times.append(math.inf)
    except (OSError, RuntimeError) as error:
        return False, f"{what}: not used, {' '.join(str(error).split())[:300]}"
    worst = math.nan if any(map(math.isnan, ratios)) else max(ratios)
    line = (f"{what}: error {worst:.2f} x eager's, {ALLOWED} allowed; forward and backward {times[0]:.2f} ms, eager "
            f"{times[1]:.2f}, softmax {times[2]:.2f}")
    if not worst <= ALLOWED:                                          # nor if it is NaN
        return False, line + ": not used, its numbers are wrong"
    if times[0] > times[1]:
        return False, line + ": not used, it is slower than eager"
    return True, line


def passes(attend, inputs):
    """Output and the gradients of q, k and v."""
    q, k, v, dout = inputs
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def timed(attend, inputs, repeats=10):
    """Median milliseconds of a forward and backward pass; the first two, in which things compile, do not count."""
    def clock():
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    spans = []
    for _ in range(2 + repeats):
        start = clock()
        passes(attend, inputs)
        spans.append(clock() - start)
    return 1000 * statistics.median(spans[2:])
