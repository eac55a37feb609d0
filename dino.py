"""DINO: self-distillation without labels. Everything of the method that is not the network and not the loop.

A student sees all crops of an image, a teacher (the student's moving average) sees the two large ones; the student
learns to predict, from any crop, the distribution over K prototypes that the teacher gives to another crop. Two
things keep the teacher from a constant answer: its outputs are *centred* (against one prototype taking all) and
*sharpened* by a low temperature (against all prototypes being equal).

References: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers" (the method; numbers
from its released code), Goyal et al. 2017 (linear scaling of the learning rate).

    B images per step, V views = 2 global + L local, K prototypes, D width, S side in pixels
"""

import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from vit import normalize


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
    """Mean cross-entropy H(teacher view q, student view v) over all pairs q != v and over the batch; buffer `center`.

    With t_q the teacher's probabilities and s_v the student's logits / student_temp, a pair costs

        -sum_k t_qk log softmax(s_v)_k  =  lse(s_v) - t_q . s_v            because sum_k t_qk = 1,

    so the 2 (V - 1) pairs need one logsumexp per view and, by linearity, one dot product per teacher view with the
    sum of the other views' logits: V passes over (B, K) in place of 2 (V - 1) log-softmaxes.
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
        others = s.sum(0) - s[:2]                                   # (2, B, K) sum over v != q of s_v
        dots = (t * others).sum((0, 2)).mean()
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


def forward_crops(backbone, head, views):
    """V tensors (B, 3, S, S) -> (V, B, K) logits: one backbone call per run of equal sizes, one head call for all."""
    cls, start = [], 0
    for end in range(1, len(views) + 1):
        if end == len(views) or views[end].shape != views[start].shape:
            cls.append(backbone(torch.cat(views[start:end])))       # ((end - start) B, D)
            start = end
    return head(torch.cat(cls)).unflatten(0, (len(views), -1))


# ------------------------------------------------------------------------------------------- optimisation
def param_groups(model):
    """Two groups: decayed, and not (biases and every vector). cls_token, pos_embed, registers and weight_g do decay."""
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    free = {name for name, p in params if name.endswith("bias") or p.ndim == 1}
    return [
        {"params": [p for name, p in params if name not in free]},
        {"params": [p for name, p in params if name in free], "weight_decay": 0.0},
    ]


@torch.no_grad()
def clip_each(parameters, max_norm):
    """Scale every gradient tensor *by itself* to norm <= max_norm (0: off), as DINO does; return the joint norm before.

    The result stays on the device: nothing here waits for it.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(grads)
    if max_norm > 0:
        scales = torch._foreach_add(norms, 1e-6)
        torch._foreach_reciprocal_(scales)
        torch._foreach_mul_(scales, max_norm)
        torch._foreach_clamp_max_(scales, 1.0)
        torch._foreach_mul_(grads, scales)
    return torch.stack(norms).norm()


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """teacher <- momentum teacher + (1 - momentum) student, every parameter, in place."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


# ------------------------------------------------------------------------------------------- multi-crop
# The augmentation of Caron et al. in two halves. Cutting a crop needs the decoded picture and shrinks it, so it stays
# with the loader's workers. All the rest is arithmetic on small uint8 crops and runs batched on the device; its random
# numbers, one row per crop, are drawn in the worker, from (seed, epoch, index) alone.
DRAWS = ("flip", "brightness", "contrast", "saturation", "hue", "grey", "sigma", "solarize")
BLUR_P = {"global1": 1.0, "global2": 0.1, "local": 0.5}
SOLARIZE_P = {"global1": 0.0, "global2": 0.2, "local": 0.0}


class MultiCrop:
    """The augmentation: 2 global and `local_crops` local crops, then colour. Scales are shares of the picture's area.

    In a worker `multicrop(image, rng)` cuts; on the device `multicrop.photometric(...)` colours the batch.
    """

    def __init__(self, global_size=224, local_size=96, local_crops=8, global_scale=(0.4, 1), local_scale=(0.05, 0.4)):
        self.global_size, self.local_size, self.local_crops = global_size, local_size, local_crops
        self.global_scale, self.local_scale = global_scale, local_scale
        self.kinds = ["global1", "global2"] + ["local"] * local_crops

    def __call__(self, image, rng):
        """uint8 (3, H, W) -> uint8 crops (2, 3, G, G) and (L, 3, S, S), draws (2 + L, 8); rng: numpy Generator."""

        def cut(size, scale):
            box = crop_box(*image.shape[1:], scale, rng)
            return resized_crop(image, *box, (size, size), InterpolationMode.BICUBIC, antialias=True)

        large = torch.stack([cut(self.global_size, self.global_scale) for _ in range(2)])
        small = [cut(self.local_size, self.local_scale) for _ in range(self.local_crops)]
        small = torch.stack(small) if small else large.new_empty(0, 3, self.local_size, self.local_size)
        return large, small, torch.from_numpy(np.stack([photometric_draws(kind, rng) for kind in self.kinds]))

    def photometric(self, large, small, draws, order=(0, 1, 2, 3)):
        """uint8 crops (B, 2, 3, G, G) and (B, L, 3, S, S), draws (B, V, 8) -> V normalised float views (B, 3, S, S).

        `order` permutes brightness, contrast, saturation, hue; one draw per step, so that it can run batched.
        """
        views = []
        for crops, rows in ((large, draws[:, :2]), (small, draws[:, 2:])):
            if crops.shape[1]:
                x = crops.transpose(0, 1).flatten(0, 1)             # (V' B, 3, S, S), view by view
                rows = rows.transpose(0, 1).flatten(0, 1).to(x.device)
                views += recolour(x, rows, order).chunk(crops.shape[1])
        return views


def crop_box(height, width, scale, rng):
    """(top, left, height, width) of a random crop: area share U(scale), aspect ratio log-uniform in 3/4..4/3.

    Ten tries, then the largest central crop of allowed ratio: the rule of torchvision's RandomResizedCrop.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def photometric_draws(kind, rng):
    """float32 (8,) in the order of DRAWS, identities where an operation is not applied. Caron et al.'s frequencies."""
    flip, jitter, grey, blur, solarize = rng.random(5) < (0.5, 0.8, 0.2, BLUR_P[kind], SOLARIZE_P[kind])
    colour = rng.uniform((0.6, 0.6, 0.8, -0.1), (1.4, 1.4, 1.2, 0.1)) if jitter else (1, 1, 1, 0)
    sigma = rng.uniform(0.1, 2.0) if blur else 0
    return np.array([flip, *colour, grey, sigma, solarize], np.float32)


def recolour(x, draws, order):
    """uint8 (N, 3, S, S), draws (N, 8) -> float (N, 3, S, S): flip, jitter, grey, blur, solarize, normalise."""
    if x.device.type == "cpu" and x.numel() > IN_CACHE:
        n = max(1, IN_CACHE // x[0].numel())
        return torch.cat([recolour(*part, order) for part in zip(x.split(n), draws.split(n), strict=True)])
    flip, brightness, contrast, saturation, hue, grey, sigma, solarize = draws.view(-1, 8, 1, 1, 1).unbind(1)

    def jitter(x, *amounts):
        for k in order:
            x = JITTER[k](x, amounts[k])
        return x

    x = where(flip > 0, lambda x: x.flip(-1), x.float())
    x = where((brightness != 1) | (contrast != 1) | (saturation != 1) | (hue != 0), jitter, x,
              brightness, contrast, saturation, hue)
    x = where(grey > 0, lambda x: luma(x).expand_as(x), x)
    x = where(sigma > 0, blur if x.device.type == "cpu" else blur_by_matrix, x, sigma)
    x = where(solarize > 0, lambda x: torch.where(x >= 128, 255 - x, x), x)
    return normalize(x)


IN_CACHE = 2**19    # numbers that a CPU recolours at a time: each operation is a pass over them


def where(need, op, x, *amounts):
    """op(x, *amounts) for the crops in `need` (N, 1, 1, 1), x for the others. On a CPU x itself changes.

    A CPU picks the crops that need it. On a GPU that would make the host wait to learn how many: there all go through.
    """
    if x.device.type != "cpu":
        return torch.where(need, op(x, *amounts), x)
    some = need.flatten().nonzero().flatten()
    if len(some):
        x[some] = op(x[some], *(amount[some] for amount in amounts))
    return x


def luma(x):
    """(N, 3, S, S) -> (N, 1, S, S) grey value, ITU-R 601 as in Pillow."""
    r, g, b = x.split(1, 1)
    return (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def change_brightness(x, amount):
    return (x * amount).clamp_(0, 255)


def change_contrast(x, amount):
    mean = luma(x).mean((1, 2, 3), keepdim=True)
    return (x - mean).mul_(amount).add_(mean).clamp_(0, 255)


def change_saturation(x, amount):
    grey = luma(x)
    return (x - grey).mul_(amount).add_(grey).clamp_(0, 255)


def shift_hue(x, turn):
    """Rotate the hue of (N, 3, S, S) by `turn` (N, 1, 1, 1) in -1..1 of the circle; HSV value and chroma stay.

    With HSV hue h in sixths of a turn, least channel m and chroma c, the channels are m + c times
    |h - 3| - 1 (red), 2 - |h - 2| (green), 2 - |h - 4| (blue), each clamped to 0..1.
    """
    r, g, b = x.split(1, 1)
    top, least = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    c = top - least
    h = torch.where(top == r, g - b, torch.where(top == g, (b - r).add_(c, alpha=2), (r - g).add_(c, alpha=4)))
    h = h.div_(c + (c == 0)).add_(6 * turn)                         # grey pixels have no hue; any value gives m back
    h.sub_(torch.floor(h / 6), alpha=6)                             # into [0, 6)
    channels = (h - 3).abs_().sub_(1), 2 - (h - 2).abs_(), 2 - (h - 4).abs_()
    return torch.cat([least.addcmul(y.clamp_(0, 1), c) for y in channels], dim=1)


JITTER = (change_brightness, change_contrast, change_saturation, shift_hue)     # Pillow's, without its rounding


def blur(x, sigma):
    """Gaussian blur of (N, 3, S, S), sigma (N, 1, 1, 1) <= 2 pixels, edge pixels repeated: a sum of shifted copies."""
    size, reach = x.shape[-1], 7                                    # at sigma 2 the rest is 2e-4 of the weight
    at = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    # sigma 0 becomes 0.01: exp(-5000) is 0 in float32, so the weights are those of the identity
    weight = torch.exp(-0.5 * (at / sigma.view(-1, 1).clamp_min(0.01)) ** 2)
    weight = (weight / weight.sum(1, keepdim=True)).view(len(x), -1, 1, 1, 1).unbind(1)
    for axis, pad in ((-1, (reach, reach, 0, 0)), (-2, (0, 0, reach, reach))):
        wide = F.pad(x, pad, mode="replicate")
        x = weight[reach] * x
        for k in range(reach):
            x.addcmul_(weight[k], wide.narrow(axis, k, size))
            x.addcmul_(weight[k], wide.narrow(axis, 2 * reach - k, size))
    return x


def blur_by_matrix(x, sigma):
    """The same as products with two banded S x S matrices: six times slower on a CPU, few passes for a GPU."""
    size, reach = x.shape[-1], 7
    at = torch.arange(size, device=x.device, dtype=x.dtype)
    source = torch.arange(-reach, size + reach, device=x.device, dtype=x.dtype)
    weight = torch.exp(-0.5 * ((source[:, None] - at) / sigma.view(-1, 1, 1).clamp_min(0.01)) ** 2)
    weight /= weight.sum(1, keepdim=True)                           # (N, S + 14, S), columns sum to 1
    band = weight[:, reach:-reach].clone()
    band[:, 0] += weight[:, :reach].sum(1)
    band[:, -1] += weight[:, -reach:].sum(1)
    band = band.unsqueeze(1)                                        # (N, 1, S, S)
    return band.mT @ (x @ band)
