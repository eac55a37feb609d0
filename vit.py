"""The Vision Transformer of the paper in its four variants: attention, blocks, named features; images in.

The four methods are three fields of one config and compose freely:

    vit_small()                        CLS baseline: DINO's ViT-S/16, softmax attention
    vit_small(registers=4)             four extra tokens that are dropped at the output
    vit_small(specialize=True)         [CLS] gets its own norms everywhere and its own early qkv
    vit_small(attn="entmax15")         the paper: attention weights with exact zeros

    model = checkpoint.load_backbone("runs/imagenet_entmax15_s0/checkpoint.pt")    or an official DINO file
    cls, registers, patches = model.features(normalize(images), blocks=[-1])[0]

Parameters carry the names of the official DINO code, so its weights load here and ours load there. `plain_vit` in
tests/test_vit.py is the same network as bare formulas, one image and one token at a time.

References
    ViT               Dosovitskiy et al. 2021, arXiv 2010.11929
    DINO              Caron et al. 2021, arXiv 2104.14294; github.com/facebookresearch/dino, vision_transformer.py
    registers         Darcet et al. 2024, arXiv 2309.16588
    specialization    Marouani et al. 2026, arXiv 2602.08626
    stochastic depth  Huang et al. 2016, arXiv 1603.09382
"""

# B images, T tokens = 1 + R + N in the order [CLS], registers, patches; N = h w patches, row-major
# H heads, D width, P patch side in pixels, G side of the grid that the position embedding is stored for

import copy
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms

from entmax import entmax15, entmax15_attention

# ---------------------------------------------------------------------------------------------------------------------
# Configuration

# The paper changes one map, from scores to weights. name: (that map, attention with it: q, k, v -> (B, H, T, D/H))
ATTENTION = {
    "softmax": (torch.softmax, F.scaled_dot_product_attention),
    "entmax15": (entmax15, entmax15_attention),
}


@dataclass(frozen=True)
class ViTConfig:
    """Architecture, as stored in every checkpoint. The defaults are DINO's ViT-S/16, the paper's CLS baseline."""

    image_size: int = 224       # pixels; the position embedding is stored for it and interpolated for other sizes
    patch_size: int = 16        # pixels
    dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: int = 4          # hidden width of the MLP / dim
    attn: str = "softmax"       # a key of ATTENTION
    registers: int = 0          # 4 in Darcet et al.
    specialize: bool = False    # separate [CLS] weights, Marouani et al.
    drop_path: float = 0.0      # stochastic depth of the last block; DINO's student: 0.1

    def __post_init__(self):
        for name in ("image_size", "patch_size", "dim", "depth", "heads", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.image_size % self.patch_size:
            near = max(1, round(self.image_size / self.patch_size)) * self.patch_size
            raise ValueError(f"image_size={self.image_size} is not divisible by patch_size={self.patch_size}; "
                             f"{near} would be")
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not divisible by heads={self.heads}; DINO uses dim = 64 * heads")
        if self.attn not in ATTENTION:
            raise ValueError(f"attn={self.attn!r} is unknown; choose one of {', '.join(ATTENTION)}")
        if self.registers < 0:
            raise ValueError(f"registers={self.registers} must be 0 (none) or more")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path} must be in [0, 1): it is the rate of dropped branches")


# ---------------------------------------------------------------------------------------------------------------------
# Blocks

def route(x, shared, own):
    """Every token through `shared`, but [CLS] through `own` where specialization has made one. Costs no extra FLOPs."""
    if own is None:
        return shared(x)
    return torch.cat([own(x[:, :1]), shared(x[:, 1:])], dim=1)


class Attention(nn.Module):
    """f(q k^T / sqrt(D/H)) v in every head, with f = softmax along the keys or, and this is all that the paper changes,
    f = entmax15. `forward` computes it in one call, which stores no (T, T) array where a kernel exists; `weights` shows
    the f(...) of it."""

    def __init__(self, dim, heads, attn):
        super().__init__()
        self.heads = heads
        self.f, self.attend = ATTENTION[attn]
        self.qkv = nn.Linear(dim, 3 * dim)                          # rows: all of q, all of k, all of v; each by head
        self.qkv_cls = None                                         # set by Block.specialize
        self.proj = nn.Linear(dim, dim)

    def project(self, x):
        """Queries, keys and values of the tokens, by head."""
        B, T, D = x.shape
        qkv = route(x, self.qkv, self.qkv_cls)                      # (B, T, 3 D)
        qkv = qkv.view(B, T, 3, self.heads, D // self.heads)
        # Split before the axes are turned: then the three gradients are joined by one copy, not two.
        return [y.transpose(1, 2) for y in qkv.unbind(2)]           # 3 x (B, H, T, D/H)

    def forward(self, x):                                           # (B, T, D)
        q, k, v = self.project(x)
        y = self.attend(q, k, v)                                    # (B, H, T, D/H): softmax's or entmax15_attention
        return self.proj(y.transpose(1, 2).flatten(2))              # (B, T, D)

    def weights(self, x):
        """(B, H, T, T) float32: what `forward` multiplies v with, and never hands out."""
        q, k, _ = self.project(x)
        device = "cpu" if x.is_meta else x.device.type              # meta has no autocast to leave
        with torch.autocast(device, enabled=False):                 # bfloat16 scores would blur the zeros of entmax
            scores = (q.float() * q.size(-1) ** -0.5) @ k.float().transpose(-2, -1)      # as in entmax15_attention
            return self.f(scores, dim=-1)


class Block(nn.Module):
    def __init__(self, config, rate):
        super().__init__()
        dim, hidden = config.dim, config.mlp_ratio * config.dim
        self.rate = rate                                            # stochastic depth
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, config.heads, config.attn)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, dim)))
        self.norm1_cls = self.norm2_cls = None

    def specialize(self, with_qkv):
        """Give [CLS] its own copies: they start equal, so the function is the baseline's until training parts them."""
        self.norm1_cls, self.norm2_cls = copy.deepcopy(self.norm1), copy.deepcopy(self.norm2)
        if with_qkv:
            self.attn.qkv_cls = copy.deepcopy(self.attn.qkv)

    def drop(self, y):
        """Stochastic depth: zero the branch of an image with probability `rate`, scale the others by 1/(1 - rate)."""
        if not (self.training and self.rate):
            return y
        keep = 1 - self.rate
        mask = torch.empty(len(y), 1, 1, device=y.device).bernoulli_(keep)      # float32: 1/keep is no bfloat16 number
        return (y * (mask / keep)).to(self.norm1.weight.dtype)      # of a .bfloat16() model; float32 under autocast

    def forward(self, x):                                           # (B, T, D)
        x = x + self.drop(self.attn(route(x, self.norm1, self.norm1_cls)))
        return x + self.drop(self.mlp(route(x, self.norm2, self.norm2_cls)))    # a second, independent draw


# ---------------------------------------------------------------------------------------------------------------------
# Model

class Features(NamedTuple):
    cls: torch.Tensor           # (B, D)
    registers: torch.Tensor     # (B, R, D)
    patches: torch.Tensor       # (B, h, w, D), [:, 0, 0] is the top left patch


class VisionTransformer(nn.Module):
    """model(images) -> (B, D): [CLS] after the final norm, for normalised float images (B, 3, h P, w P) of any h, w."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, P, grid = config.dim, config.patch_size, config.image_size // config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, D))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, D, kernel_size=P, stride=P)))
        last = max(1, config.depth - 1)
        self.blocks = nn.ModuleList(Block(config, config.drop_path * i / last) for i in range(config.depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.norm_cls = None
        self.init_weights()

    def init_weights(self):
        """DINO's initialisation; the patch projection and the norms keep torch's defaults.

        One seed gives the four methods the same shared weights: copies draw nothing, and registers draw last.
        """
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.config.specialize:
            # "early query-key-value projections": the first third, which with all norms gives the 8 % more parameters
            # that Marouani et al. report (ViT-S/16: +1,793,280 = 8.3 %). Registers go with the patches.
            #
            # DINO's loss sees [CLS] alone, so from here on `norm` keeps weight 1 and bias 0. Its gradient is zeros, not
            # missing, because `features` normalises all tokens: DistributedDataParallel waits for every parameter.
            for i, block in enumerate(self.blocks):
                block.specialize(with_qkv=i < max(1, self.config.depth // 3))
            self.norm_cls = copy.deepcopy(self.norm)
        if self.config.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, self.config.registers, self.config.dim))
            nn.init.trunc_normal_(self.register_tokens, std=0.02)   # as cls_token; Darcet et al. start at 1e-6

    def position(self, h, w):
        """(1, 1 + h w, D): the position embedding for a grid of h x w patches."""
        G = self.config.image_size // self.config.patch_size
        if (h, w) == (G, G):
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches = patches.unflatten(1, (G, G)).permute(0, 3, 1, 2)  # (1, D, G, G)
        # Differs from the official code, which resizes by scale_factor=(h + 0.1) / G lest rounding lose a row; torch
        # samples at that scale: 6 % off (relative L2) at 32 x 32, 28 % at DINO's 6 x 6 local crops. size= is exact.
        patches = F.interpolate(patches, size=(h, w), mode="bicubic")
        return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, images):
        """Normalised (B, 3, height, width) -> tokens (B, T, D)."""
        P = self.config.patch_size
        height, width = images.shape[-2:]
        if height % P or width % P:
            raise ValueError(f"image height {height} and width {width} must be multiples of the patch size {P}; "
                             f"resize, crop or pad the images")
        x = self.patch_embed(images).flatten(2).transpose(1, 2)     # (B, N, D)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.position(height // P, width // P)              # (B, 1 + N, D)
        if self.config.registers:                                   # after the positions: registers have none
            registers = self.register_tokens.expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)   # (B, T, D)
        return x

    def index(self, block):
        """0-based index of a block; -1 is the last."""
        depth = self.config.depth
        if not -depth <= block < depth:
            raise ValueError(f"block {block} does not exist: the model has 0 to {depth - 1}, or -{depth} to -1")
        return block % depth

    def features(self, images, blocks=None, norm=True):
        """Output of the given blocks (default: all) in the order asked, through the final norm unless norm=False."""
        wanted = [self.index(block) for block in (range(self.config.depth) if blocks is None else blocks)]
        R, P = self.config.registers, self.config.patch_size
        h, w = images.shape[-2] // P, images.shape[-1] // P
        x, outputs = self.embed(images), {}
        for i in range(max(wanted, default=-1) + 1):                # later blocks would be wasted
            x = self.blocks[i](x)
            if i in wanted:
                y = route(x, self.norm, self.norm_cls) if norm else x
                outputs[i] = Features(y[:, 0], y[:, 1:1 + R], y[:, 1 + R:].unflatten(1, (h, w)))
        return [outputs[i] for i in wanted]

    def forward(self, images):
        return self.features(images, blocks=[-1])[0].cls

    def attention(self, images, block=-1):
        """(B, H, T, T) float32 attention weights of one block, the last by default: row = query, rows sum to 1."""
        *before, block = self.blocks[:self.index(block) + 1]
        x = self.embed(images)
        for earlier in before:
            x = earlier(x)
        return block.attn.weights(route(x, block.norm1, block.norm1_cls))


def vit_tiny(**overrides):
    return VisionTransformer(ViTConfig(**dict(dim=192, heads=3) | overrides))


def vit_small(**overrides):
    return VisionTransformer(ViTConfig(**overrides))


def vit_base(**overrides):
    return VisionTransformer(ViTConfig(**dict(dim=768, heads=12) | overrides))


# ---------------------------------------------------------------------------------------------------------------------
# Input: file -> PIL RGB -> uint8 (3, S, S) -> normalised float32

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)            # of ImageNet, RGB in [0, 1]


SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")


def read_image(path):
    """PIL image in mode RGB from any file Pillow can read; transparency is ignored. ValueError names one it cannot.

    Of 16 bits the upper 8 are kept. If no value reaches 2**14, it is a dark picture or, more often, one of 8 to 14 bits
    in a file of 16, which would come out dark or black: refused, as are 32-bit values that no 16 bits hold and floats,
    for which no rule says what is white.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:                                      # Pillow raises half a dozen types, mostly unnamed
        raise ValueError(f"{path}: unreadable ({error}); mend or remove it") from error


def to_rgb(image):
    wide = image.mode.startswith("I") or re.search(";16[BLN]", str(image.tile))     # RGB;16B: of the file
    if image.mode == "F":
        raise ValueError("float values, of which none is known to be white; convert it to 8 bits")
    if image.mode.startswith("I"):                                  # convert() would clip at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values {values.min()} to {values.max()} are no 16 bits; convert it to 8 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))     # what Pillow itself does with colour
    image = image.convert("RGB")
    if wide and np.asarray(image).max() < 2**14 >> 8:
        raise ValueError("16-bit values that stay below 2**14: dark, or fewer bits in a file of 16; convert it to "
                         "8 bits")
    return image


def eval_transform(size):
    """PIL RGB -> uint8 (3, size, size): short side to size * 256/224, then the centre. The only eval transform."""
    return transforms.Compose([
        transforms.Resize(round(size * 256 / 224), transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.PILToTensor(),
    ])


def by_channel(values, device):
    """(3, 1, 1) float32, filled on the device: a copy would make the host wait for it, for every batch, and a cache
    would keep what the first call made, be it an export's or a compiler's."""
    return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values])


def normalize(images):
    """uint8 (..., 3, h, w) -> float32 with ImageNet's mean 0 and deviation 1; batched, on the device of the images.
    Floats, which may be 0 to 1 or normalised already, are refused: ValueError."""
    kind = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
    if kind != torch.uint8:
        raise ValueError(f"normalize takes a uint8 tensor (..., 3, h, w), 0 to 255, not {kind}; eval_transform makes "
                         "one of a picture, and (255 * x).round().byte() of floats from 0 to 1")
    return normalize_grey_levels(images.float())


def normalize_grey_levels(x):
    """The same of floats from 0 to 255."""
    return (x / 255 - by_channel(MEAN, x.device)) / by_channel(STD, x.device)


def pad_to_patches(images, patch):
    """Zeros, the mean colour, around normalised images (..., h, w) up to whole patches; an odd one right or below."""
    height, width = -images.shape[-2] % patch, -images.shape[-1] % patch
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))
