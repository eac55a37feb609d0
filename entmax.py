"""Entmax-1.5: the map from attention scores to attention weights that replaces softmax in this project.

    weights = entmax15(scores)              # rows sum to 1, and hopeless scores get a weight of exactly 0
    out = entmax15_attention(q, k, v)       # in place of F.scaled_dot_product_attention

    scores       1       0.5     0       -1      -3
    softmax      0.470   0.285   0.173   0.064   0.009
    entmax-1.5   0.624   0.292   0.084   0       0

The map in one line:  p_i = [z_i/2 - tau]_+^2,  with the one number tau that makes sum p = 1, and [x]_+ = max(x, 0).
Where it comes from:

1. The problem. A weight vector strikes a bargain between score and spread,

       p(z) = argmax  <p, z> + H(p)    over  p >= 0,  sum p = 1.

   With Shannon's entropy the answer is softmax. Here it is Tsallis' entropy of order 3/2,
   H(p) = 4/3 sum (p_i - p_i^1.5), which is strictly concave: there is exactly one answer.

2. From the problem to the map (the KKT conditions). With a multiplier lam for sum p = 1, and for each p_i >= 0 a
   mu_i >= 0 with mu_i p_i = 0, the derivative by p_i of the Lagrangian is zero:

       z_i + 4/3 - 2 sqrt(p_i) - lam + mu_i = 0.

   Let tau = lam/2 - 2/3. If p_i > 0, then mu_i = 0 and sqrt(p_i) = z_i/2 - tau. If p_i = 0, then z_i/2 - tau =
   -mu_i/2 is not positive. Both cases together: p_i = u_i^2 with u_i = [z_i/2 - tau]_+. Weights of exactly 0 occur
   because H has a finite slope (4/3) at p_i = 0, and a score far enough below the others loses more than that.
   Shannon's slope is infinite there, so softmax gives every score something.

3. The threshold tau. sum p falls as tau grows: at tau = max z/2 - 1 the largest score alone gives 1, at
   tau = max z/2 nothing is left. Two ways to find the one tau between them stand below, each with its derivation:
   `entmax15_sort` sorts the scores and solves a quadratic equation; it is the textbook's, the one to read first, and
   the reference. `Entmax15` takes steps of Newton's method; it is faster, and what networks are trained with.

4. The derivative. On the support (where p_i > 0) p_i = (z_i/2 - tau)^2, so dp_i = u_i (dz_i - 2 dtau): the 2 of the
   square eats the 1/2. The weights keep summing to 1, so 2 dtau = sum_j u_j dz_j / sum_j u_j, and

       J = dp/dz = diag(u) - u u^T / sum(u),

   symmetric, rows summing to 0, zero off the support. It needs u = sqrt(p) and nothing else: not how tau was found, not
   the scores, not tau. u is continuous in z, so J is too: a score enters the support smoothly; second derivatives jump.

The paper prints p_i = [(z_i - tau)/2]_+, without the square. That is sparsemax of z/2, another and sparser map
([1, 0] -> [0.75, 0.25]). The optimum of the problem above, and what is called entmax-1.5, is [0.8307, 0.1693].

Peters, Niculae, Martins 2019, "Sparse sequence-to-sequence models" (the map, the sort, the Jacobian);
Blondel, Martins, Niculae 2020, "Learning with Fenchel-Young losses" (entropies and the maps they give).
"""
import importlib.util
import os

import torch

# z scores, tau threshold, u = [z/2 - tau]_+, p = u^2 weights, s = sum u, mass = sum u^2, which is 1 at the right tau
# q, k, v queries, keys, values; B images, H heads, T tokens, D width of a head

# Until |sum p - 1| < 1e-7, normal scores of any scale take 3 to 6 steps up to n = 1025, rows built to be slow 7 up to
# n = 8192. On a CPU the last is the step that makes the slowest row converge. Elsewhere the count is fixed, as a test
# would make the host wait for the device in every layer; so it is in compiled code, which a test would cut in two.
NEWTON_STEPS = 8
# The kernel needs entmax_triton.py beside this file, and Triton, which torch brings along on Linux. ENTMAX_FUSED=0 in
# the environment keeps it out, for cards and containers it cannot run on.
HAS_TRITON = os.environ.get("ENTMAX_FUSED") != "0" and all(map(importlib.util.find_spec, ("triton", "entmax_triton")))


def entmax15_sort(x, dim=-1):
    """The map by the textbook: exact threshold from sorted scores, plain autograd, in x's own precision. Slow.

    If the support is the k largest of the halved scores z_(1) >= z_(2) >= ..., with mean M and sum of squared
    deviations S, then sum_{i<=k} (z_(i) - tau)^2 = 1 is a quadratic in tau; its lower root is
    tau_k = M - sqrt((1 - S)/k), and the size of the support is the number of k with tau_k <= z_(k).
    """
    z = x.movedim(dim, -1)
    z = (z - z.amax(-1, keepdim=True).detach()) / 2                   # p ignores shifts: no gradient through it
    top = z.sort(-1, descending=True).values
    k = torch.arange(1, z.size(-1) + 1, device=z.device)
    with torch.no_grad():                                             # k is an integer: nothing to differentiate
        mean = top.cumsum(-1) / k
        S = top.square().cumsum(-1) - k * mean.square()
        support = (mean - ((1 - S) / k).clamp_min(0).sqrt() <= top).sum(-1, keepdim=True)
    top = torch.where(k <= support, top, 0)
    mean = top.sum(-1, keepdim=True) / support
    S = torch.where(k <= support, top - mean, 0).square().sum(-1, keepdim=True)
    # Differentiated for the right k only, where the root is M - tau = sum u / k >= 1/k. For larger k it is often
    # clamped to 0, and its infinite slope times a gradient of 0 would be NaN.
    tau = mean - ((1 - S) / support).sqrt()
    return (z - tau).clamp_min(0).square().movedim(-1, dim)


class Entmax15(torch.autograd.Function):
    """The map by Newton's method, along `dim` of float32 or float64 z, rounded to `dtype`; J as derived above.

    Adding a constant to z only moves tau, so the row is shifted until max z/2 = 0, and the root lies in [-1, 0]. Of the
    equations with this root, the one to solve is g(tau) = 1 for

        g(tau) = || [z/2 - tau]_+ ||_2 = sqrt(mass),     mass = sum u_i^2,     s = sum u_i,     g' = -s/g.

    g decreases, and it is convex: each u_i is convex in tau, and the Euclidean norm is convex and grows with each
    u_i >= 0. A convex curve lies above its tangents, so a Newton step from the left of the root ends left of the root:

        tau <- tau - (g - 1)/g' = tau + g (g - 1)/s = tau + (mass - sqrt(mass))/s

    climbs (in exact arithmetic) from tau = -1 to the root and never passes it: no bracket, no safeguard. Newton on
    mass = 1 has the same root but takes more steps: left of the root mass bends like a parabola, g hardly (not at all,
    hence one step, when all scores are equal).

    After a step d, mass is sum [u_i - d]_+^2 <= mass - 2 s d + n d^2 = 1 - (g - 1)^2 + n d^2 <= 1 + n d^2 for a row of
    n scores: once n d^2 is below eps, what is left is rounding.
    """

    @staticmethod
    def forward(z, dim, dtype):
        top = z.amax(dim, keepdim=True)
        half = torch.add(top / -2, z, alpha=0.5)                      # z/2 with its maximum at 0; -inf stays -inf
        tau = torch.full_like(top, -1.0)
        u = torch.empty_like(half)                                    # one buffer for u, u^2 and at last p
        traced = type(z) is not torch.Tensor or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
        may_stop = z.is_cpu and z.numel() and not traced
        small = (torch.finfo(z.dtype).eps / (z.size(dim) if z.ndim else 1)) ** 0.5
        for _ in range(NEWTON_STEPS):
            torch.sub(half, tau, out=u).relu_()
            s = u.sum(dim, keepdim=True)
            mass = u.square_().sum(dim, keepdim=True)
            # The last steps are rounding noise: tau ends in a cycle of one or two ulp, on either side of the root. It
            # cannot run away: u <= 1 gives s >= mass = 1 there, so a step is no larger than the rounding error of
            # mass - sqrt(mass). Nothing needs guarding, and nothing may rely on tau growing or on sum p >= 1.
            step = (mass - mass.sqrt()) / s
            tau += step
            if may_stop and step.amax() < small:                      # never with a NaN
                break
        return torch.sub(half, tau, out=u).relu_().square_().to(dtype)

    @staticmethod
    def setup_context(ctx, inputs, p):
        z, ctx.dim, _ = inputs
        ctx.wide = z.dtype
        ctx.save_for_backward(p)                                      # alive anyway: the product with v needs it too

    @staticmethod
    def vmap(info, in_dims, z, dim, dtype):
        """Under torch.func: a batch more in front, which `dim` does not count."""
        return Entmax15.apply(z.movedim(in_dims[0], 0), dim + (dim >= 0), dtype), 0

    @staticmethod
    def backward(ctx, dp):
        (p,) = ctx.saved_tensors                                      # an output, so autograd can go through this again
        p = p.to(ctx.wide)
        # u = sqrt(p). A plain sqrt has an infinite slope at p = 0, which makes second derivatives NaN; this has value 0
        # and a finite slope there and is sqrt elsewhere, as no p on the support is below tiny. (It is also ten times
        # faster on the CPU we measured, where sqrt stumbles over zeros.)
        u = p.clamp_min(torch.finfo(p.dtype).tiny).rsqrt_()
        u = u * p if torch.is_grad_enabled() else u.mul_(p)           # 2 MB less to allocate, a sixth of the time
        udp = u * dp
        mean = udp.sum(ctx.dim, keepdim=True) / u.sum(ctx.dim, keepdim=True)
        return udp.addcmul_(u, mean, value=-1), None, None            # J dp = u dp - u (sum u dp / sum u)


def wide(dtype):
    """float32, or float64 for float64. Solved in bfloat16, rows would miss a sum of 1 by percents."""
    return torch.promote_types(dtype, torch.float32)


def entmax15(x, dim=-1):
    """Weights p >= 0 with sum p = 1 along `dim`, many of them exactly 0; same shape and dtype as x.

    A score of -inf gets weight 0 and gradient 0; a row of nothing else gives NaN, as softmax does. Half-precision x is
    solved in float32 and the result rounded. That result is all that is kept for backward: the gradient's rms error is
    a tenth larger than with the float32 weights, which nothing else would need and which are twice as large.
    """
    if not x.is_floating_point():
        raise TypeError(f"entmax15 needs floating-point scores, got {x.dtype}")
    if x.ndim and not x.size(dim):                                    # rows of no scores have no weights
        return x.clone()
    return Entmax15.apply(x.to(wide(x.dtype)), dim, x.dtype)


def entmax15_attention(q, k, v, *, mask=None, fused=None):
    """entmax15(q k^T / sqrt(D) + mask) v for q, k, v (B, H, T, D) -> (B, H, T, D) in v's dtype.

    There may be more or fewer keys than queries, and leading dimensions broadcast: heads in groups are q (B, G, n, T,
    D) and k, v (B, G, 1, T, D). mask: bool, True where a query sees a key, or a float that is added to the scores,
    -inf where it does not; of any shape that broadcasts to (B, H, Tq, Tk). A query that sees no key gets zeros.

    Scores are at least float32 whatever q and k are. Autocast would compute them in bfloat16, so it is switched off
    here (for softmax it casts them up again on CUDA, but it does not know entmax). The weights are rounded to v's dtype
    for the product with v.

    fused=None takes the kernel of entmax_triton.py for CUDA tensors it supports (one dtype, T <= 2048, in float32 512,
    16 <= D <= 128, no mask, compute capability 8.0 or newer) and else the lines below, which store the (T, T) scores;
    True and False insist. The kernel has no second derivative.
    """
    if fused and mask is not None:
        raise ValueError("the fused kernel takes no mask; use fused=False, or None")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be bool or floating-point, got {mask.dtype}; mask.bool() where 1 is a key to see")
    if fused or (fused is None and mask is None and q.is_cuda and HAS_TRITON):
        import entmax_triton  # not at the top: where nothing can use it, nothing needs it

        if fused or entmax_triton.supports(q, k, v):
            return entmax_triton.attention(q, k, v, NEWTON_STEPS)
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):          # meta has no autocast to leave
        q, k = (x.to(wide(x.dtype)).contiguous() for x in (q, k))     # or both products below would copy them
        z = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)            # (B, H, T, T)
        if mask is None:
            return Entmax15.apply(z, -1, v.dtype) @ v                 # (B, H, T, D)
        z = z.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else z + mask
        blind = (z == -torch.inf).all(-1, keepdim=True)               # a row of -inf would give NaN
        return Entmax15.apply(z.masked_fill(blind, 0), -1, v.dtype).masked_fill(blind, 0) @ v
