"""DINO: self-distillation without labels. Everything of the method that is not the network and not the loop.

A student sees all crops of an image, a teacher (the student's moving average) sees the two large ones; the student
learns to predict, from any crop, the distribution over K prototypes that the teacher gives to another crop. Two
things keep the teacher from a constant answer: its outputs are *centred* (against one prototype taking all) and
*sharpened* by a low temperature (against all prototypes being equal).

References: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers" (the method; numbers
from its released code), Goyal et al. 2017 (linear scaling of the learning rate).

    B images per micro-batch, V views = 2 global + L local, K prototypes, D width, S side in pixels
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------- schedules
def cosine(step, base, final, total, warmup=0):
    """Value at 0-based `step`: linspace(0, base, warmup), both ends included, then half a cosine from base to final.

    The cosine would reach `final` at step `total`, one after the last. A pure function: resuming needs one integer.
    """
    if step < warmup:
        return base * step / max(1, warmup - 1)
    t = (step - warmup) / (total - warmup)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * t))


def teacher_temperature(epoch, warmup_epochs=30, start=0.04, end=0.07):
    """Temperature during 0-based `epoch`: linspace(start, end, warmup_epochs), both ends included, then end."""
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / max(1, warmup_epochs - 1)


# ------------------------------------------------------------------------------------------- head and loss
class WeightNormLinear(nn.Module):
    """x -> x W^T with rows W_k = g_k v_k / |v_k|: with |x| = 1 and g = 1 the outputs are cosines to K prototypes.

    Written out because torch's parametrization renames the keys; these are the official ones.
    """

    def __init__(self, in_dim, out_dim, train_norm):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_norm)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim).uniform_(-(in_dim**-0.5), in_dim**-0.5))

    def forward(self, x):
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class DINOHead(nn.Module):
    """(..., in_dim) -> (..., out_dim) prototype logits: three-layer MLP, unit length, weight-normalised linear map.

    norm_last_layer=True keeps every prototype at length 1 (steadier, slightly worse for ViT-S: Caron et al. app. D).
    """

    def __init__(self, in_dim, out_dim=65536, hidden_dim=2048, bottleneck_dim=256, norm_last_layer=False):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, train_norm=not norm_last_layer)

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class DINOLoss(nn.Module):
    """Mean cross-entropy of a teacher's view q and a student's view v, over all pairs q != v and over the batch:

        t, s, pairs = ((teacher - center) / teacher_temp).softmax(-1), student / student_temp, []
        for q in range(2):                                          # the teacher sees the global views alone
            for v in range(len(s)):
                if v != q:                                          # the same crop twice would teach nothing
                    pairs.append(-(t[q] * s[v].log_softmax(-1)).sum(-1).mean())
        loss = sum(pairs) / len(pairs)

    `forward` computes the same faster. As sum_k t_qk = 1, a pair costs lse(s_v) - t_q . s_v: one logsumexp per view,
    and per teacher's view one dot product with the sum of the other views' logits, in place of 2 (V - 1) log-softmaxes.

    `center` (1, K) is the running mean of the teacher's logits. Without it a prototype that is a little ahead for all
    images would be the target of all, and soon the answer to all. It starts at 0, as no batch was seen, and takes some
    1 / (1 - center_momentum) steps to find that mean; a learning rate that has risen by then finds one answer to all.
    """

    def __init__(self, out_dim, student_temp=0.1, center_momentum=0.9):
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def targets(self, teacher, teacher_temp):
        """Teacher logits (2, B, K) -> probabilities, float32: centred, then sharpened."""
        return ((teacher.float() - self.center) / teacher_temp).softmax(-1)

    def forward(self, student, teacher, teacher_temp):
        """student (V, B, K) and teacher (2, B, K) logits, views in crop order, globals first -> scalar.

        Reads the centre and leaves it: update_center comes after.
        """
        s = student.float() / self.student_temp                     # (V, B, K); in half precision the lse would round
        t = self.targets(teacher, teacher_temp).detach()            # (2, B, K)
        lse = s.logsumexp(-1).mean(-1)                              # (V,)
        other_views = s.sum(0) - s[:2]                              # (2, B, K) sum over v != q of s_v
        dots = (t * other_views).sum((0, 2)).mean()
        # every local view meets two teachers; a global one meets only the other global
        return (2 * lse.sum() - lse[:2].sum() - dots) / (2 * len(s) - 2)

    @torch.no_grad()
    def update_center(self, teacher):
        """Move the centre towards the mean of the raw teacher logits (..., K), over all views, images and processes."""
        mean = all_mean(teacher.float().flatten(0, -2).mean(0, keepdim=True))
        self.center.lerp_(mean, 1 - self.center_momentum)


def entropy(p):
    """(..., K) probabilities -> mean Shannon entropy in nats; 0 log 0 = 0."""
    return -torch.xlogy(p, p).sum(-1).mean()


def all_mean(x):
    """Mean of a tensor over all processes, in place; the tensor itself where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(x)  # gloo has no ReduceOp.AVG
        x /= dist.get_world_size()
    return x


def all_gather(mine):
    """[what each process has], on every process."""
    parts = [mine] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(parts, mine)
    return parts


def effective_rank(features):
    """(B, D) -> exp of the entropy of their variance spectrum, over the images of all processes: in how many directions
    images differ. 1: in one or none; at most D, and one less than there are images."""
    features = features.double()
    centred = features - all_mean(features.mean(0))
    covariance = all_mean(centred.T @ centred / len(features)).cpu()
    if not covariance.isfinite().all():                             # eigvalsh would raise
        return math.nan
    variance = torch.linalg.eigvalsh(covariance).clamp_min(0)
    return entropy(variance / variance.sum().clamp_min(1e-300)).exp().item()


def forward_crops(backbone, head, views):
    """V tensors (B, 3, S, S) -> (V, B, K) logits: one backbone call per run of equal sizes, one head call for all."""
    cls, start = [], 0
    for end in range(1, len(views) + 1):
        if end == len(views) or views[end].shape != views[start].shape:
            cls.append(backbone(torch.cat(views[start:end])))       # ((end - start) B, D)
            start = end
    return head(torch.cat(cls)).unflatten(0, (len(views), -1))


def collapse(history, log_k):
    """A warning where the last five log records sit in one of DINO's two collapses, or in fewer directions than the
    first of them, else None. history: the log records since this process began; log_k: ln K."""
    last = history[-5:]
    if len(last) < 5:
        return None
    if all(r["entropy"] < 1e-3 * log_k for r in last):
        return ("teacher entropy is 0: one prototype takes everything. Try a lower --center-momentum, a higher "
                "--teacher-temp or a lower --lr")
    if all(r["entropy"] > (1 - 1e-3) * log_k for r in last) or all(abs(r["loss"] / log_k - 1) < 1e-3 for r in last):
        return ("the loss sits at ln K: teacher or student is uniform. Try a lower --center-momentum or "
                "--teacher-temp, a longer --warmup-epochs, a lower --lr, or --norm-last-layer")
    if all(r["rank"] < 0.6 * history[0]["rank"] for r in last):     # it varies by a tenth among batches of 32
        return (f"the effective rank of [CLS] has fallen from {history[0]['rank']:.1f} by more than a third: "
                "images get alike. Try a lower --lr, a --momentum nearer 1, or --norm-last-layer")
    return None


# ------------------------------------------------------------------------------------------- optimisation
def param_groups(model):
    """Two groups: decayed, and not (biases and every vector). cls_token, pos_embed, registers and weight_g do decay."""
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    undecayed = {name for name, p in params if name.endswith("bias") or p.ndim == 1}
    return [
        {"params": [p for name, p in params if name not in undecayed]},
        {"params": [p for name, p in params if name in undecayed], "weight_decay": 0.0},
    ]


@torch.no_grad()
def clip_each(parameters, max_norm):
    """g <- g min(1, max_norm / (|g| + 1e-6)) for every gradient tensor *by itself*, as DINO does (0: off); returns the
    joint norm before, on the device: nothing waits for it. (torch._foreach_: one kernel for all tensors, but in the
    product with scales that the device has not told the host, which takes one for each.)"""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(grads)
    if max_norm > 0:
        scales = torch._foreach_add(norms, 1e-6)                    # step by step to min(1, max_norm / (|g| + 1e-6))
        torch._foreach_reciprocal_(scales)
        torch._foreach_mul_(scales, max_norm)
        torch._foreach_clamp_max_(scales, 1.0)
        torch._foreach_mul_(grads, scales)
    return torch.stack(norms).norm()


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """teacher <- momentum teacher + (1 - momentum) student, every parameter, in place."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
