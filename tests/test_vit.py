"""vit.py against `plain_vit`: the network once more, from the formulas, one image and one token at a time."""
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_entmax import bisect
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torchvision import transforms

import vit
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


def softmax_explicit(z):
    return z.exp() / z.exp().sum(-1, keepdim=True)


def plain_vit(model, image):
    """One image (3, height, width) through the formulas: list of every block's tokens (T, D), and the last normed."""
    s, c = model.state_dict(), model.config
    P, d = c.patch_size, c.dim // c.heads
    weigh = {"softmax": softmax_explicit, "entmax15": bisect}[c.attn]

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
    assert index != -1 or torch.equal(P, model.attention(x))        # the last block by default
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


@pytest.mark.parametrize("method", [METHODS[0], METHODS[-1]])
def test_export_leaves_the_batch_open(method):
    model, x = tiny(depth=1, **method).requires_grad_(False), images(5, 3, 12, 20)
    exported = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("B", min=1, max=64)},))
    for n in (5, 3):
        torch.testing.assert_close(exported.module()(x[:n]), model(x[:n]))


def test_attention_on_the_meta_device_has_the_shape():
    model, x = tiny(), images(2, 3, 16, 16)
    expected = model.attention(x, -1)
    got = model.to("meta").attention(x.to("meta"), -1)
    assert got.is_meta and got.shape == expected.shape and got.dtype == expected.dtype


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


def png16(path, pixels, colour_type):
    """A PNG of 16 bits per channel, (h, w, channels); Pillow writes them in grey alone."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


@pytest.mark.parametrize("colour_type, channels", [(0, 1), (4, 2), (2, 3), (6, 4)])         # with alpha: 4 and 6
def test_sixteen_bits_in_every_kind_of_png(tmp_path, colour_type, channels):
    png16(tmp_path / "x.png", np.stack([RAMP] * channels, axis=-1), colour_type)
    assert np.array_equal(vit.read_image(tmp_path / "x.png"), np.stack([RAMP // 256] * 3, axis=-1))
    pixels = np.stack([RAMP // 16] * 3 + [RAMP], axis=-1)           # 12 bits, and alpha of 16
    png16(tmp_path / "x.png", pixels[..., -channels:] if channels % 2 == 0 else pixels[..., :channels], colour_type)
    with pytest.raises(ValueError, match=r"stay below 2\*\*14: dark, or fewer bits in a file of 16; convert it to 8 "):
        vit.read_image(tmp_path / "x.png")


@pytest.mark.parametrize("dtype, lowest, highest, cause", [
    (np.uint16, 0, 255, "below 2"), (np.uint16, 0, 4095, "below 2"), (np.uint16, 9, 2**14 - 1, "below 2"),
    (np.int32, 0, 255, "below 2"), (np.int32, -1, 65535, "values -1 to 65535 are no 16 bits"),
    (np.int32, 0, 2**31 - 1, "values 0 to 2147483647 are no 16 bits"),
    (np.float32, 0, 1, "float"), (np.float32, -1, 1, "float"), (np.float32, 0, 255, "float"),
])
def test_values_that_do_not_fill_their_type_are_refused(tmp_path, dtype, lowest, highest, cause):
    """They came out black, or all white, without a word. 2**14 is the first that is taken for a dark picture."""
    values = np.linspace(lowest, highest, 64).astype(dtype).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match=f"{cause}.*; convert it to 8 bits"):
        vit.read_image(tmp_path / "x.tiff")
    if cause == "below 2":
        got = read(tmp_path, Image.fromarray(np.where(values == highest, 2**14, values).astype(dtype)), "x.tiff")
        assert got.max() == 64 and got.min() == lowest // 256


def test_565_bitmap_is_no_picture_of_sixteen_bits(tmp_path):
    """A dark one is not refused: its five or six bits are scaled to eight."""
    Image.new("RGB", (4, 4), (8, 4, 8)).save(tmp_path / "x.bmp")
    header = bytearray((tmp_path / "x.bmp").read_bytes()[:54])
    header[28:30], header[30:34] = struct.pack("<H", 16), struct.pack("<I", 3)              # bits; masks follow
    masks, pixel = struct.pack("<III", 0xF800, 0x07E0, 0x001F), struct.pack("<H", 1 << 11 | 1 << 5 | 1)
    header[10:14] = struct.pack("<I", 54 + len(masks))
    (tmp_path / "x.bmp").write_bytes(header + masks + pixel * 16)
    assert np.array_equal(vit.read_image(tmp_path / "x.bmp"), np.full((4, 4, 3), (8, 4, 8)))


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


def test_normalize_by_hand():
    image = torch.randint(0, 256, (2, 5, 3, 4, 6), dtype=torch.uint8)
    got = vit.normalize(image)
    assert got.dtype == torch.float32
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        torch.testing.assert_close(got[:, :, channel].double(), (image[:, :, channel].double() / 255 - mean) / std,
                                   atol=1e-6, rtol=1e-6)


def test_normalize_remembers_nothing():
    """Neither an export's fake tensors, nor a default dtype, nor inference mode."""
    image, weight = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8), torch.ones(3, 1, 1, requires_grad=True)
    expected = transforms.Normalize(vit.MEAN, vit.STD)(image / 255)
    with FakeTensorMode():
        assert isinstance(vit.normalize(torch.empty(2, 3, 4, 6, dtype=torch.uint8)), FakeTensor)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            assert torch.equal(vit.normalize(image), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        got = vit.normalize(image)
    assert type(got) is torch.Tensor and torch.equal(got, expected)
    (got * weight).sum().backward()                                 # of no inference tensor
    assert torch.equal(weight.grad.flatten(), expected.sum((0, 2, 3)))


@pytest.mark.parametrize("convert, kind", [
    (lambda x: x / 255, "torch.float32"), (lambda x: x.half(), "torch.float16"), (lambda x: x.long(), "torch.int64"),
    (lambda x: x.numpy(), "ndarray"), (lambda x: Image.fromarray(x.permute(1, 2, 0).numpy()), "Image")])
def test_normalize_refuses_what_is_no_uint8_tensor(convert, kind):
    """Floats may be 0 to 1, 0 to 255 or normalised already; the way out that it names gives back the picture."""
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"0 to 255, not {kind};.* \(255 \* x\)\.round\(\)\.byte\(\)"):
        vit.normalize(convert(image))
    if kind == "torch.float32":
        x = transforms.functional.to_tensor(Image.fromarray(image.permute(1, 2, 0).numpy()))
        assert torch.equal((255 * x).round().byte(), image)
