import argparse
import dataclasses
import math
import os
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import checkpoint as disk
import vit
from checkpoint import load_backbone
from vit import VisionTransformer, ViTConfig, vit_base, vit_small, vit_tiny

METHODS = [dict(attn=attn, registers=registers, specialize=specialize)
           for attn in ("softmax", "entmax15") for registers in (0, 2) for specialize in (False, True)]
TINY = dict(image_size=16, patch_size=4, dim=24, depth=3, heads=3)


def tiny(seed=0, **overrides):
    torch.manual_seed(seed)
    return VisionTransformer(ViTConfig(**TINY | overrides)).eval()


def shaken(seed=0, **overrides):
    """A float64 model whose biases, norms and [CLS] copies are all different from their initial values."""
    model = tiny(seed, **overrides).double().requires_grad_(False)
    for p in model.parameters():
        p += 0.3 * torch.randn_like(p)
    return model


def silence(model):
    """Every block becomes the identity, so that a token's output shows where it came from."""
    for block in model.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return model


def images(*size, seed=1, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- an independent ViT, from the formulas --------------------------------------------------------------------------

def cubic_matrix(n_in, n_out):
    """(n_out, n_in): bicubic interpolation along one axis (Keys 1981, a = -0.75), pixel grid aligned, edge repeated."""
    M, a = torch.zeros(n_out, n_in, dtype=torch.float64), -0.75
    for i in range(n_out):
        x = (i + 0.5) * n_in / n_out - 0.5
        for j in range(math.floor(x) - 1, math.floor(x) + 3):
            d = abs(x - j)
            w = ((a + 2) * d - (a + 3)) * d * d + 1 if d <= 1 else ((d - 5) * d + 8) * d * a - 4 * a
            M[i, min(max(j, 0), n_in - 1)] += w
    return M


def resized_positions(pos_embed, h, w):
    """(1 + h w, D)"""
    grid = math.isqrt(pos_embed.shape[1] - 1)
    patches = pos_embed[0, 1:].reshape(grid, grid, -1).double()
    patches = torch.einsum("yi,xj,ijd->yxd", cubic_matrix(grid, h), cubic_matrix(grid, w), patches)
    return torch.cat([pos_embed[0, :1].double(), patches.flatten(0, 1)])


def entmax15_bisect(z):
    """sum_i [z_i/2 - tau]_+^2 = 1, solved for tau by bisection."""
    z = z / 2
    lo, hi = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(60):
        mid = (lo + hi) / 2
        too_big = ((z - mid).clamp_min(0) ** 2).sum(-1, keepdim=True) > 1
        lo, hi = torch.where(too_big, mid, lo), torch.where(too_big, hi, mid)
    return (z - lo).clamp_min(0) ** 2


def softmax_explicit(z):
    return z.exp() / z.exp().sum(-1, keepdim=True)


def plain_vit(model, image):
    """One image (3, height, width) through the formulas: list of every block's tokens (T, D), and the last normed."""
    s, c = model.state_dict(), model.config
    P, d = c.patch_size, c.dim // c.heads
    weigh = {"softmax": softmax_explicit, "entmax15": entmax15_bisect}[c.attn]

    def each(f, name, x):                                          # f(token, weight, bias); [CLS] by its copy, if any
        own = f"{name}_cls" if f"{name}_cls.weight" in s else name
        names = [own] + [name] * (len(x) - 1)
        return torch.stack([f(token, s[f"{n}.weight"], s[f"{n}.bias"]) for token, n in zip(x, names, strict=True)])

    def norm(x, weight, bias):
        return (x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-6).sqrt() * weight + bias

    def linear(x, weight, bias):
        return weight @ x + bias

    h, w = image.shape[1] // P, image.shape[2] // P
    tiles = [image[:, P * i:P * (i + 1), P * j:P * (j + 1)].flatten() for i in range(h) for j in range(w)]
    kernel = s["patch_embed.proj.weight"].flatten(1)
    x = [s["cls_token"][0, 0]] + [kernel @ tile + s["patch_embed.proj.bias"] for tile in tiles]
    x = torch.stack(x) + resized_positions(s["pos_embed"], h, w)
    if c.registers:
        x = torch.cat([x[:1], s["register_tokens"][0], x[1:]])
    outputs = []
    for b in (f"blocks.{i}." for i in range(c.depth)):
        qkv = each(linear, b + "attn.qkv", each(norm, b + "norm1", x))
        heads = []
        for i in range(c.heads):
            q, k, v = (qkv[:, n * c.dim + i * d:n * c.dim + (i + 1) * d] for n in range(3))
            heads.append(weigh(q @ k.T / d**0.5) @ v)
        x = x + each(linear, b + "attn.proj", torch.cat(heads, dim=1))
        y = each(linear, b + "mlp.fc1", each(norm, b + "norm2", x))
        x = x + each(linear, b + "mlp.fc2", y * (1 + torch.erf(y / 2**0.5)) / 2)
        outputs.append(x)
    return outputs, each(norm, "norm", x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_model_equals_the_formulas(method, size):
    model, x = shaken(**method), images(2, 3, *size, dtype=torch.float64)
    raw, cls, normed = model.features(x, norm=False), model(x), model.features(x)[-1]
    for i, image in enumerate(x):
        blocks, last = plain_vit(model, image)
        got = [torch.cat([f.cls[i, None], f.registers[i], f.patches[i].flatten(0, 1)]) for f in raw]
        torch.testing.assert_close(torch.stack(got), torch.stack(blocks), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(cls[i], last[0], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(normed.patches[i].flatten(0, 1), last[1 + model.config.registers:],
                                   atol=1e-9, rtol=1e-9)


# ---- parameters -----------------------------------------------------------------------------------------------------

def official_shapes(dim=384, depth=12, patch=16, tokens=197):
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, tokens, dim),
              "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,),
              "norm.weight": (dim,), "norm.bias": (dim,)}
    for i in range(depth):
        for name, rows, cols in (("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim),
                                 ("mlp.fc1", 4 * dim, dim), ("mlp.fc2", dim, 4 * dim)):
            shapes |= {f"blocks.{i}.{name}.weight": (rows, cols), f"blocks.{i}.{name}.bias": (rows,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (dim,), f"blocks.{i}.{name}.bias": (dim,)}
    return shapes


def shapes_of(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_names_shapes_and_counts_of_the_four_methods():
    with torch.device("meta"):
        base, registers = vit_small(), vit_small(registers=4)
        special, entmax = vit_small(specialize=True), vit_small(attn="entmax15")
    official = official_shapes()
    assert shapes_of(base) == shapes_of(entmax) == official
    assert len(official) == 150 and sum(map(math.prod, official.values())) == 21_665_664
    assert shapes_of(registers) == official | {"register_tokens": (1, 4, 384)}                  # + 1,536

    extra = {f"blocks.{i}.norm{n}_cls.{p}": (384,) for i in range(12) for n in (1, 2) for p in ("weight", "bias")}
    for i in range(4):
        extra |= {f"blocks.{i}.attn.qkv_cls.weight": (1152, 384), f"blocks.{i}.attn.qkv_cls.bias": (1152,)}
    extra |= {"norm_cls.weight": (384,), "norm_cls.bias": (384,)}
    assert shapes_of(special) == official | extra
    assert sum(p.numel() for p in special.parameters()) == 21_665_664 + 1_793_280


def test_named_sizes():
    with torch.device("meta"):
        assert shapes_of(vit_tiny()) == official_shapes(192)
        assert shapes_of(vit_base(depth=2)) == official_shapes(768, depth=2)
        assert vit_tiny(dim=128, heads=2).config == ViTConfig(dim=128, heads=2)
        assert vit_tiny().config.heads == 3 and vit_small().config.heads == 6 and vit_base().config.heads == 12


def test_initialisation_is_dinos():
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(dim=192, heads=3, depth=2, registers=16))
    for name, p in model.named_parameters():
        if name.startswith("patch_embed"):
            a = 1 / math.sqrt(3 * 16 * 16)                          # of U(-a, a), torch's default for convolutions
            assert p.abs().max() <= a and (p.ndim == 1 or abs(p.std() - a / math.sqrt(3)) < 0.02 * a)
        elif p.ndim == 1:
            assert (p == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
        else:
            assert abs(p.std() - 0.02) < 0.002 and abs(p.mean()) < 0.003, name


@pytest.mark.parametrize("method", METHODS)
def test_one_seed_gives_all_methods_the_same_shared_weights(method):
    base, model = tiny(7).state_dict(), tiny(7, **method).state_dict()
    for key, value in base.items():
        assert torch.equal(model[key], value), key
    for key in model.keys() - base.keys() - {"register_tokens"}:
        assert torch.equal(model[key], base[key.replace("_cls", "")]), key


@pytest.mark.parametrize("field, value, way_out", [
    ("image_size", 100, "image_size=100 is not divisible by patch_size=16; 96 would be"),
    ("dim", 100, "dim=100 is not divisible by heads=6"),
    ("attn", "sparsemax", "attn='sparsemax' is unknown; choose one of softmax, entmax15"),
    ("heads", 0, "heads=0 must be at least 1"),
    ("registers", -1, "registers=-1 must be 0"),
    ("drop_path", 1.0, "drop_path=1.0 must be in"),
])
def test_config_rejects(field, value, way_out):
    with pytest.raises(ValueError, match=f"^{way_out}"):
        ViTConfig(**{field: value})


# ---- specialization and registers -----------------------------------------------------------------------------------

@pytest.mark.parametrize("attn", ["softmax", "entmax15"])
@pytest.mark.parametrize("registers", [0, 2])
def test_specialized_equals_baseline_at_the_start_and_with_copied_weights(attn, registers):
    x = images(2, 3, 16, 16)
    method = dict(attn=attn, registers=registers)
    base, special = tiny(3, **method), tiny(3, specialize=True, **method)
    torch.testing.assert_close(special(x), base(x), atol=1e-6, rtol=1e-5)

    base, special, x = shaken(4, **method), shaken(5, specialize=True, **method), x.double()
    assert not torch.allclose(special(x), base(x))
    weights = base.state_dict()
    special.load_state_dict({key: weights[key.replace("_cls", "")] for key in special.state_dict()})
    torch.testing.assert_close(special(x), base(x), atol=1e-12, rtol=1e-12)


def changed(model, key, rows=slice(None), norm=False):
    """Which of (cls, registers, patches) move after block 0 when the rows of one parameter are perturbed."""
    x = images(2, 3, 16, 16, dtype=torch.float64)
    before = model.features(x, [0], norm=norm)[0]
    parameter = model.get_parameter(key)
    parameter[rows] += torch.randn_like(parameter[rows])
    after = model.features(x, [0], norm=norm)[0]
    return tuple(bool((a != b).flatten(2 if a.ndim > 2 else 1).any(-1).all()) if not torch.equal(a, b) else False
                 for a, b in zip(before, after, strict=True))


def test_cls_copies_serve_cls_alone_and_registers_go_with_patches():
    def model():
        return shaken(6, registers=2, specialize=True)
    only_cls, not_cls, all_tokens = (True, False, False), (False, True, True), (True, True, True)
    assert changed(model(), "blocks.0.norm2_cls.weight") == only_cls
    assert changed(model(), "blocks.0.norm2.bias") == not_cls
    assert changed(model(), "norm_cls.weight", norm=True) == only_cls
    assert changed(model(), "norm.weight", norm=True) == not_cls
    assert changed(model(), "blocks.0.attn.qkv_cls.weight", slice(0, 24)) == only_cls           # its query
    assert changed(model(), "blocks.0.attn.qkv.weight", slice(0, 24)) == not_cls
    assert changed(model(), "blocks.0.attn.qkv_cls.weight", slice(48, 72)) == all_tokens        # its value: all attend
    assert changed(model(), "blocks.0.mlp.fc1.weight") == all_tokens                            # shared


def test_registers_have_no_position_and_are_not_patches():
    model = silence(shaken(registers=3))
    x = images(2, 3, 8, 24, dtype=torch.float64)
    features = model.features(x, [-1], norm=False)[0]
    assert torch.equal(features.registers, model.register_tokens.expand(2, -1, -1))
    model.register_tokens += 1
    moved = model.features(x, [-1], norm=False)[0]
    assert torch.equal(moved.cls, features.cls) and torch.equal(moved.patches, features.patches)
    assert not hasattr(tiny(), "register_tokens") and tiny().features(x.float())[0].registers.shape == (2, 0, 24)


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_receives_a_gradient(method):
    """DistributedDataParallel waits for ever for a parameter without one."""
    model = tiny(drop_path=0.5, **method).train()
    model(images(2, 3, 8, 8)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# ---- features and attention -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_features_order_norm_and_forward(method):
    model, x = shaken(**method), images(2, 3, 12, 20, dtype=torch.float64)
    every = model.features(x)
    assert len(every) == 3 and torch.equal(every[-1].cls, model(x))
    picked = model.features(x, [-1, 0, -2, 0])
    for features, i in zip(picked, (2, 0, 1, 0), strict=True):
        assert all(map(torch.equal, features, every[i]))
    raw = model.features(x, [1], norm=False)[0]
    normed = model.norm(raw.patches)
    torch.testing.assert_close(every[1].patches, normed)
    assert model.features(x, []) == []


def test_features_stop_after_the_last_block_needed():
    model, ran = tiny(), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.features(images(1, 3, 16, 16), [1, 0])
    assert ran == [0, 1]


@pytest.mark.parametrize("block", [3, -4])
def test_block_out_of_range_is_named(block):
    for call in (lambda m, x: m.features(x, [0, block]), lambda m, x: m.attention(x, block)):
        with pytest.raises(ValueError, match=f"^block {block} does not exist: the model has 0 to 2, or -3 to -1"):
            call(tiny(), images(1, 3, 16, 16))


def test_patch_grid_is_the_image_grid():
    model = silence(shaken())
    x = images(1, 3, 8, 20, dtype=torch.float64)                    # 2 x 5 patches
    before = model.features(x, [0], norm=False)[0]
    assert before.patches.shape == (1, 2, 5, 24)
    x[:, :, 4:8, 12:16] += 1                                        # row 1, column 3
    after = model.features(x, [0], norm=False)[0]
    moved = (after.patches != before.patches).any(-1)[0]
    assert moved.nonzero().tolist() == [[1, 3]] and torch.equal(after.cls, before.cls)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("index", [0, -1])
def test_attention_weights_are_those_of_the_block(method, index):
    model = shaken(**method).float()
    x = images(2, 3, 16, 16)
    P = model.attention(x, index)                                   # (B, H, T, T)
    T = 1 + method["registers"] + 16
    assert P.shape == (2, 3, T, T) and (P >= 0).all()
    torch.testing.assert_close(P.sum(-1), torch.ones(2, 3, T), atol=1e-5, rtol=0)
    assert (P == 0).any() == (method["attn"] == "entmax15")

    block, tokens = model.blocks[index], model.embed(x)
    if index == -1:
        tokens = model.blocks[1](model.blocks[0](tokens))
    normed = vit.route(tokens, block.norm1, block.norm1_cls)
    value = vit.route(normed, block.attn.qkv, block.attn.qkv_cls)[..., 48:].view(2, T, 3, 8)
    heads = torch.einsum("bhij,bjhd->bihd", P, value).flatten(2)
    torch.testing.assert_close(block.attn.proj(heads), block.attn(normed), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_rounding_only(method):
    model, x = tiny(drop_path=0.1, **method), images(4, 3, 12, 20)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        low, P = model(x), model.attention(x, -1)
        model.train()(x).sum().backward()
    assert low.dtype == P.dtype == torch.float32                    # norms and weights stay in float32
    torch.testing.assert_close(low, exact, atol=0.05, rtol=0)
    torch.testing.assert_close(P.sum(-1), torch.ones(P.shape[:-1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[-1]])
def test_compile_captures_one_whole_graph(method):
    model, x = tiny(drop_path=0.1, **method), images(2, 3, 12, 20)
    compiled = torch.compile(model, backend="eager", fullgraph=True)        # fullgraph: a graph break raises
    torch.testing.assert_close(compiled(x), model(x))


# ---- position embedding ---------------------------------------------------------------------------------------------

def test_position_is_untouched_at_the_stored_grid():
    model = tiny()
    assert model.position(4, 4) is model.pos_embed


@pytest.mark.parametrize("grid", [(6, 6), (2, 8), (5, 3), (1, 1), (4, 5), (61, 2)])
def test_position_is_bicubic_with_the_exact_ratio(grid):
    model = tiny()
    expected = resized_positions(model.pos_embed, *grid).float()
    torch.testing.assert_close(model.position(*grid)[0], expected, atol=1e-6, rtol=1e-5)


def test_every_multiple_of_the_patch_size_works_and_nothing_else():
    model = silence(tiny())
    for side in range(1, 130, 9):
        assert model.features(images(1, 3, 4 * side, 4), [0])[0].patches.shape == (1, side, 1, 24)
    with pytest.raises(ValueError, match="^image height 16 and width 18 must be multiples of the patch size 4; resize"):
        model(images(1, 3, 16, 18))


# ---- stochastic depth -----------------------------------------------------------------------------------------------

def test_drop_path_rates_grow_linearly_and_vanish_in_eval():
    dropping, plain, x = tiny(drop_path=0.3), tiny(), images(2, 3, 16, 16)
    assert [block.rate for block in dropping.blocks] == pytest.approx([0, 0.15, 0.3])
    assert torch.equal(dropping(x), plain(x))
    assert not torch.equal(dropping.train()(x), plain.train()(x))


def test_drop_path_drops_images_unbiased_and_twice_per_block():
    """Branches that add exactly 1 and 10: what a block adds tells which of the two survived, for every image."""
    block = silence(tiny(drop_path=0.4)).blocks[-1].train()
    nn.init.ones_(block.attn.proj.bias), nn.init.constant_(block.mlp.fc2.bias, 10)
    n, keep = 4000, 0.6
    torch.manual_seed(0)
    added = block(torch.zeros(n, 2, 24)) * keep
    assert torch.equal(added, added[:, :1, :1].expand_as(added))                    # one draw for the whole image
    share = {total: (added[:, 0, 0] - total).abs().lt(1e-4).float().mean().item() for total in (0, 1, 10, 11)}
    expected = {0: 0.16, 1: 0.24, 10: 0.24, 11: 0.36}                               # independent
    assert share == pytest.approx(expected, abs=0.03) and sum(share.values()) == pytest.approx(1)
    assert (added / keep).mean().item() == pytest.approx(11, rel=0.03)              # unbiased


def test_drop_path_follows_torchs_seed():
    model, x = tiny(drop_path=0.5).train(), images(16, 3, 8, 8)

    def run(seed):
        torch.manual_seed(seed)
        return model(x)
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


# ---- checkpoints ----------------------------------------------------------------------------------------------------

FOREIGN = dict(image_size=32, patch_size=8, dim=128, depth=2, heads=2)              # heads = dim / 64


def ours(**overrides):
    """What train.py writes, with different student and teacher."""
    student, teacher = tiny(1, **overrides), tiny(2, **overrides)
    checkpoint = dict(config=dataclasses.asdict(student.config), student=student.state_dict(),
                      teacher=teacher.state_dict(), student_head={"mlp.0.bias": torch.zeros(3)},
                      center=torch.zeros(1, 3), optimizer={"state": {}, "param_groups": [{"lr": 0.1}]}, scaler=None,
                      step=5, epoch=1, args={"lr": 1})
    return checkpoint, student, teacher


def official_full(model):
    weights = model.state_dict()
    return {
        "student": {f"module.backbone.{k}": v for k, v in weights.items()} | {"module.head.mlp.0.bias": torch.ones(2)},
        "teacher": {f"backbone.{k}": v + 1 for k, v in weights.items()} | {"head.last_layer.weight_g": torch.ones(2)},
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-4)}]}, "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16), "dino_loss": {"center": torch.zeros(1, 2)},
    }


def check_frozen(model, weights, config):
    assert model.config == config and not model.training and not any(p.requires_grad for p in model.parameters())
    loaded = model.state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[key], weights[key]) for key in weights)


@pytest.mark.parametrize("method", METHODS)
def test_load_our_checkpoint(tmp_path, method):
    checkpoint, student, teacher = ours(**method)
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    state = torch.get_rng_state()
    check_frozen(load_backbone(tmp_path / "checkpoint.pt"), teacher.state_dict(), teacher.config)
    check_frozen(load_backbone(str(tmp_path / "checkpoint.pt"), "student"), student.state_dict(), student.config)
    assert torch.equal(torch.get_rng_state(), state)                # loading draws nothing
    x = images(2, 3, 16, 16)
    assert torch.equal(load_backbone(tmp_path / "checkpoint.pt")(x), teacher(x))


@pytest.mark.parametrize("extra", [{}, dict(registers=3), dict(specialize=True), dict(mlp_ratio=2, image_size=48)])
@pytest.mark.parametrize("legacy", [False, True])
def test_load_bare_state_dict(tmp_path, extra, legacy):
    """Official backbone files and timm's DINO ViTs; DINO's time still had torch's older file format."""
    model = tiny(**FOREIGN | extra)
    torch.save(model.state_dict(), tmp_path / "bare.pth", _use_new_zipfile_serialization=not legacy)
    check_frozen(load_backbone(tmp_path / "bare.pth"), model.state_dict(), model.config)


def test_load_small_16_by_shapes(tmp_path):
    """The keys of the official dino_deitsmall16_pretrain.pth and of timm's vit_small_patch16_224.dino, in any order."""
    weights = {key: torch.randn(shape) for key, shape in reversed(official_shapes().items())}
    torch.save(weights, tmp_path / "small.pth")
    check_frozen(load_backbone(tmp_path / "small.pth"), weights, ViTConfig())


@pytest.mark.parametrize("numpy_core", ["numpy._core", "numpy.core"])
def test_load_official_full_checkpoint(tmp_path, numpy_core):
    """With prefixes, heads, a Namespace, and learning rates as numpy floats, as numpy 2 and numpy 1 pickle them."""
    model, path = tiny(**FOREIGN), tmp_path / "full.pth"
    torch.save(official_full(model), tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"numpy._core.multiarray", f"{numpy_core}.multiarray".encode()))
        assert f"{numpy_core}.multiarray".encode() in new.read("new/data.pkl")
    student = model.state_dict()
    check_frozen(load_backbone(path, "student"), student, model.config)
    check_frozen(load_backbone(path), {key: value + 1 for key, value in student.items()}, model.config)


def without(weights, *keys):
    return {key: value for key, value in weights.items() if key not in keys}


def rejected(tmp_path, content, which="teacher"):
    path = tmp_path / "x.pt"
    torch.save(content, path)
    with pytest.raises(ValueError) as error:
        load_backbone(path, which)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600
    return message


def test_mismatches_are_named(tmp_path):
    weights = tiny(**FOREIGN).state_dict()
    assert "1 key (blocks.1.attn.qkv.bias) missing" in rejected(tmp_path, without(weights, "blocks.1.attn.qkv.bias"))
    assert "2 keys (head.weight, head.bias) unexpected" in rejected(
        tmp_path, weights | {"head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10)})        # a classifier
    assert "1 key (norm.bias (127,) for (128,)) of another shape" in rejected(
        tmp_path, weights | {"norm.bias": torch.zeros(127)})
    assert "2 keys (norm.weight, norm.bias) missing; 1 key (foo) unexpected" in rejected(
        tmp_path, without(weights, "norm.weight", "norm.bias") | {"foo": 1})

    full = official_full(tiny(**FOREIGN))
    full["teacher"]["neck.weight"] = torch.zeros(1)
    assert "1 key (neck.weight) unexpected" in rejected(tmp_path, full)             # only the head is dropped

    checkpoint, *_ = ours()
    checkpoint["config"]["registers"] = 4
    assert "1 key (register_tokens) missing" in rejected(tmp_path, checkpoint)
    checkpoint, *_ = ours(specialize=True)
    checkpoint["config"]["specialize"] = False
    message = rejected(tmp_path, checkpoint)                        # 3 blocks of 2 norms, 1 qkv, 1 final norm
    assert "16 keys (blocks.0.attn.qkv_cls.weight, " in message and ", ...) unexpected" in message
    for field, value in (("attn", "sparsemax"), ("rope", True)):    # written by a later version
        checkpoint["config"][field] = value
        message = rejected(tmp_path, checkpoint)
        assert "cannot tell the architecture" in message and field in message


def test_foreign_architectures_are_refused(tmp_path):
    message = rejected(tmp_path, {"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)})
    assert "5 keys (cls_token, pos_embed, patch_embed.proj.weight, ...) of a DINO ViT missing" in message
    assert "the file holds 2 keys (conv1.weight, fc.weight)" in message
    assert "of a DINO ViT missing; the file holds 2 keys (state_dict, epoch)" in rejected(
        tmp_path, {"state_dict": tiny().state_dict(), "epoch": 3})
    assert "are a Tensor, not a dict of tensors" in rejected(tmp_path, {"teacher": torch.zeros(3)})
    assert "1 key (norm.weight) no tensor" in rejected(tmp_path, tiny(**FOREIGN).state_dict() | {"norm.weight": 3})
    weights = tiny(**FOREIGN).state_dict()
    assert "17 position embeddings of patches must form a square" in rejected(
        tmp_path, weights | {"pos_embed": torch.zeros(1, 18, 128)})
    assert "width 24 must be a multiple of 64" in rejected(tmp_path, tiny().state_dict())


def test_missing_which(tmp_path):
    checkpoint, *_ = ours()
    del checkpoint["student"]
    assert "holds no student weights; it holds 9 keys (config, teacher, student_head, ...)" in rejected(
        tmp_path, checkpoint, "student")
    bare = tiny(**FOREIGN).state_dict()
    assert "one bare state dict, to be loaded as which='teacher'" in rejected(tmp_path, bare, "student")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_does_not_run(tmp_path):
    marker = tmp_path / "executed"
    checkpoint, *_ = ours()
    message = rejected(tmp_path, checkpoint | {"args": Evil(str(marker))})
    assert not marker.exists() and "posix.mkdir" in message and "could run code" in message
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert marker.exists()                                          # the trap was real
    assert "pathlib" in rejected(tmp_path, checkpoint | {"args": tmp_path})         # no type but those listed


@pytest.mark.parametrize("content", [b"", b"I am no checkpoint", b"PK\x03\x04" + bytes(100), bytes(range(256)) * 8])
def test_damaged_file(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.pt: not a checkpoint: damaged, or no torch file \(\w+\)$"):
        load_backbone(tmp_path / "x.pt")


def test_half_written_checkpoint(tmp_path):
    torch.save(tiny(**FOREIGN).state_dict(), tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_backbone(tmp_path / "x.pt")


def test_every_bit_of_the_directory(tmp_path):
    """Its flip is refused or changes nothing. torch takes one of them, of an entry's attributes, for "a folder"."""
    path, weights = tmp_path / "x.pt", torch.full((5000,), 7.0)
    torch.save({"x": weights}, path)
    whole, outcomes = path.read_bytes(), []
    with zipfile.ZipFile(path) as archive:
        first = archive.start_dir
    for i in range(8 * first, 8 * len(whole)):
        data = bytearray(whole)
        data[i // 8] ^= 1 << i % 8
        path.write_bytes(data)
        torch.full((5000,), 9.0)                                    # left in the memory that an unread array gets
        try:
            outcomes.append(torch.equal(disk.read_checkpoint(path)["x"], weights))
        except ValueError:
            outcomes.append(None)
    assert False not in outcomes and None in outcomes and True in outcomes


def test_missing_file_and_other_content(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt: no such file; give a checkpoint of train.py or an offic"):
        load_backbone(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_backbone(tmp_path)
    assert "it holds a Tensor, not a dict" in rejected(tmp_path, torch.zeros(3))
    assert "of a DINO ViT missing; the file holds 1 key (0)" in rejected(tmp_path, {0: torch.zeros(3)})


# ---- input ----------------------------------------------------------------------------------------------------------

def read(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    image = vit.read_image(tmp_path / name)
    assert image.mode == "RGB"
    return np.asarray(image)


RAMP = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)     # all of the 16-bit range


@pytest.mark.parametrize("name, dtype", [("x.png", np.uint16), ("x.tiff", np.uint16), ("x.tiff", np.int32)])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, name, dtype):
    got = read(tmp_path, Image.fromarray(RAMP.astype(dtype)), name)
    assert np.array_equal(got, np.stack([RAMP // 256] * 3, axis=-1))


def test_grey_with_and_without_alpha_and_one_bit(tmp_path):
    grey = (RAMP // 256).astype(np.uint8)
    expected = np.stack([grey] * 3, axis=-1)
    assert np.array_equal(read(tmp_path, Image.fromarray(grey), "l.png"), expected)
    la = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(255 - grey)])
    assert np.array_equal(read(tmp_path, la, "la.png"), expected)
    bits = read(tmp_path, Image.fromarray(grey > 99), "1.png")
    assert np.array_equal(bits, np.where(expected > 99, 255, 0))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("transparency", [1, b"\x00\x80\xff"])
def test_palette_with_transparency_keeps_its_colours(tmp_path, transparency):
    palette = np.array([[10, 20, 30], [200, 100, 0], [0, 255, 9]], dtype=np.uint8)
    index = np.random.default_rng(0).integers(0, 3, (8, 8), dtype=np.uint8)
    image = Image.fromarray(index).convert("L")
    image.putpalette(palette.tobytes())
    assert np.array_equal(read(tmp_path, image, "p.png", transparency=transparency), palette[index])


def test_cmyk_jpeg(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))           # magenta and yellow ink: red
    assert np.allclose(read(tmp_path, image, "c.jpg", quality=100), [255, 0, 0], atol=3)


@pytest.mark.parametrize("size", [224, 64, 96])
@pytest.mark.parametrize("width, height", [(500, 375), (333, 500), (101, 99), (40, 300), (256, 256)])
def test_eval_transform_is_resize_then_centre_crop(size, width, height):
    """The geometry written out: the long side is truncated, the crop offset rounded half to even, as in torchvision."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    short = round(size * 256 / 224)
    w, h = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    left, top = round((w - size) / 2), round((h - size) / 2)
    expected = Image.fromarray(noise).resize((w, h), Image.BICUBIC).crop((left, top, left + size, top + size))
    got = vit.eval_transform(size)(Image.fromarray(noise))
    assert got.dtype == torch.uint8 and np.array_equal(got.permute(1, 2, 0), expected)


def test_eval_transform_at_224_is_the_usual_256():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    expected = image.resize((341, 256), Image.BICUBIC).crop((58, 16, 282, 240))
    assert np.array_equal(vit.eval_transform(224)(image).permute(1, 2, 0), expected)


def test_normalize_by_hand():
    image = torch.randint(0, 256, (2, 5, 3, 4, 6), dtype=torch.uint8)
    got = vit.normalize(image)
    assert got.dtype == torch.float32
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        torch.testing.assert_close(got[:, :, channel].double(), (image[:, :, channel].double() / 255 - mean) / std,
                                   atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "checkpoint.pt"
    disk.write_checkpoint(path, {"step": 1})
    old = path.read_bytes()

    def full_disk(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=re.escape(f"{path}: not written: {error}")):
        disk.write_checkpoint(path, {"step": 2})
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["checkpoint.pt"]
