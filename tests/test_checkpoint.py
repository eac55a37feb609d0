import argparse
import dataclasses
import datetime
import importlib
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_vit import METHODS, images, official_shapes, tiny
from torch import nn

import checkpoint as disk
from checkpoint import load_backbone
from shapes import Shapes
from vit import VisionTransformer, ViTConfig

# ---- weights ---------------------------------------------------------------------------------------------------------

FOREIGN = dict(image_size=32, patch_size=8, dim=192, depth=2, heads=3)              # DINO's tiny: dim / 64


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
    for path in (tmp_path / "checkpoint.pt", tmp_path):             # a run folder stands for the latest
        check_frozen(load_backbone(path), teacher.state_dict(), teacher.config)
        check_frozen(load_backbone(str(path), "student"), student.state_dict(), student.config)
    assert torch.equal(torch.get_rng_state(), state)                # loading draws nothing
    x = images(2, 3, 16, 16)
    assert torch.equal(load_backbone(tmp_path / "checkpoint.pt")(x), teacher.requires_grad_(False)(x))


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
        tmp_path, weights | {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)})        # a classifier
    assert "1 key (norm.bias (127,) for (192,)) of another shape" in rejected(
        tmp_path, weights | {"norm.bias": torch.zeros(127)})
    assert "2 keys (norm.weight, norm.bias) missing; 1 key (foo) unexpected" in rejected(
        tmp_path, without(weights, "norm.weight", "norm.bias") | {"foo": 1})

    full = official_full(tiny(**FOREIGN))
    full["teacher"]["neck.weight"] = torch.zeros(1)
    assert "save what is below backbone. alone" in rejected(tmp_path, full)         # only the head is dropped

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
    assert "are a Tensor, not a dict of tensors" in rejected(tmp_path, {"teacher": torch.zeros(3)})
    assert "weights are dense arrays of floats, not 1 key (norm.weight int)" in rejected(
        tmp_path, tiny(**FOREIGN).state_dict() | {"norm.weight": 3})
    weights = tiny(**FOREIGN).state_dict()
    assert "17 position embeddings of patches must form a square" in rejected(
        tmp_path, weights | {"pos_embed": torch.zeros(1, 18, 192)})
    for shape in ((), (1, 1, 0)):
        assert "cannot tell the architecture" in rejected(tmp_path, weights | {"cls_token": torch.zeros(shape)})


@pytest.mark.parametrize("dim, heads", [(192, 3), (384, 6), (768, 12), (1024, 16)])
def test_heads_of_dinos_widths_are_assumed_and_named(tmp_path, capsys, dim, heads):
    with torch.device("meta"):
        model = VisionTransformer(ViTConfig(image_size=16, dim=dim, heads=heads, depth=1))
    torch.save(model.to_empty(device="cpu").apply(zeros).state_dict(), tmp_path / "x.pth")
    assert load_backbone(tmp_path / "x.pth").config == model.config
    assert capsys.readouterr().out == (f"{tmp_path / 'x.pth'}: softmax attention and {heads} heads assumed "
                                       "(width / 64, as in DINO); --heads N if it has others\n")
    assert disk.open_weights(tmp_path / "x.pth", heads=2)[0].config == dataclasses.replace(model.config, heads=2)
    assert capsys.readouterr().out == f"{tmp_path / 'x.pth'}: softmax attention assumed\n"


def zeros(module):
    for p in module.parameters(recurse=False):
        nn.init.zeros_(p)


def test_heads_of_other_widths_must_be_given(tmp_path):
    """timm's huge is 1,280 wide with 16 heads: 20 gave other features, 9.4 % off, without a word."""
    path, model, x = tmp_path / "x.pt", tiny(dim=128, heads=4), images(2, 3, 16, 16)
    assert re.search("width 128 is none of DINO's .* give it: --heads N, in Python heads=N", rejected(
        tmp_path, model.state_dict()))
    assert torch.equal(load_backbone(path, heads=4)(x), model.requires_grad_(False)(x))
    assert not torch.allclose(load_backbone(path, heads=2)(x), model(x), rtol=1e-3)
    for heads, cause in ((5, "dim=128 is not divisible by heads=5"), (0, "heads=0 must be at least 1")):
        with pytest.raises(ValueError, match=f"x.pt: cannot tell the architecture: {cause}"):
            load_backbone(path, heads=heads)
    control, facts = disk.open_weights("random", like=path, heads=4, seed=5)
    assert control.config == model.config and (facts["weights"], facts["run_seed"]) == ("random", 5)
    assert disk.open_weights("random", heads=12)[0].config == ViTConfig(heads=12)


def test_our_own_file_knows_its_heads(tmp_path, capsys):
    path, (checkpoint, _, teacher) = tmp_path / "x.pt", ours()
    torch.save(checkpoint, path)
    assert load_backbone(path).config == load_backbone(path, heads=3).config == teacher.config
    assert capsys.readouterr().out == ""
    for name, like in (path, None), ("random", path):
        with pytest.raises(ValueError, match="heads=6 is given, and the file says 3; leave out --heads"):
            disk.open_weights(name, like=like, heads=6)


@pytest.mark.parametrize("prefixes", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "backbone.",
                                      "module.backbone.", "encoder.", "model.", "module.model.backbone."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
def test_wrappers_are_taken_off(tmp_path, prefixes, key):
    model = tiny(**FOREIGN)
    weights = {prefixes + name: value for name, value in model.state_dict().items()}
    training = {"epoch": torch.tensor(3), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
                "loss": {"center": torch.ones(2)}}
    for content in ({key: weights} | training if key else weights, {"teacher": {key: weights} if key else weights}):
        torch.save(content, tmp_path / "x.pth")
        check_frozen(load_backbone(tmp_path / "x.pth"), model.state_dict(), model.config)
    facts = disk.open_weights(tmp_path / "x.pth")[1]
    assert facts["epochs"] is None and facts["run_seed"] is None    # that a result can hold


OF_TRAINING = {"seed": 7, "lr": 1.0, "attn": "softmax", "images": 9, "fingerprint": "ab"}


@pytest.mark.parametrize(("args", "seed"), [(OF_TRAINING | {"out": "x", "data": "y", "save_every": 3}, 7), ({}, None),
                                            (OF_TRAINING | {"seed": torch.ones(2)}, None), ({"seed": 7}, None),
                                            ("--seed 7", None)])
def test_seed_and_recipe_of_the_pretraining_are_facts_of_its_weights(tmp_path, args, seed):
    torch.save(dict(teacher=tiny(**FOREIGN).state_dict(), args=args), tmp_path / "x.pth")
    facts = disk.open_weights(tmp_path / "x.pth", seed=3)[1]
    recipe = {"lr": 1.0, "attn": "softmax", "images": 9, "fingerprint": "ab"}
    assert (facts["run_seed"], facts["recipe"]) == (seed, recipe if seed else None)


def test_what_wraps_several_networks_is_refused(tmp_path):
    weights = tiny(**FOREIGN).state_dict()
    assert "several networks, 2 keys (model, model_ema); save the one to be measured alone" in rejected(
        tmp_path, {"model": weights, "model_ema": weights, "epoch": 1})
    below = {f"{prefix}.{key}": value for prefix in ("teacher.backbone", "student.backbone")
             for key, value in weights.items()}
    assert "save what is below teacher.backbone. or student.backbone. alone, without that prefix" in rejected(
        tmp_path, below)
    assert "one bare state dict, to be loaded as which='teacher'" in rejected(tmp_path, {"model": weights}, "student")


@pytest.mark.parametrize("more, what", [
    ({"decoder_blocks.0.norm1.weight": (128,), "mask_token": (1, 1, 128)}, "MAE with its decoder: save its encoder "),
    ({"masked_embed": (1, 192)}, "iBOT's student: save its encoder alone, under DINO's names"),
    ({"blocks.0.ls1.gamma": (192,), "mask_token": (1, 192)}, "DINOv2's or another ViT with LayerScale: another net"),
    ({"mask_token": (1, 192)}, "a masked-image model: save its encoder alone"),
    ({"head.weight": (10, 192)}, "a classifier, trained with labels: give self-supervised weights, or save its"),
    ({"reg_token": (1, 4, 192)}, "timm's ViT with registers: another network, which cannot be loaded here"),
    ({"blocks.0.attn.relative_position_bias_table": (9, 3)}, "BEiT or Swin: another network"),
])
def test_vits_of_other_families_are_named(tmp_path, more, what):
    """Also below the wrappers that they come in."""
    weights = tiny(**FOREIGN).state_dict() | {key: torch.zeros(shape) for key, shape in more.items()}
    for content in (weights, {"model": weights}, {f"module.{key}": value for key, value in weights.items()}):
        assert f"it looks like {what}" in rejected(tmp_path, content)


@pytest.mark.parametrize("key, what", [
    ("base_encoder.cls_token", "MoCo v3 with two encoders: save its encoder alone, under DINO's names; its ViT-S has"),
    ("net.cls_token", "save what is below net. alone, without that prefix"),
    ("storage_tokens", "DINOv3's ViT"), ("visual.class_embedding", "CLIP: another network"),
    ("vision_model.embeddings.class_embedding", "CLIP or SigLIP"),
    ("encoder.layer.0.attention.attention.query.weight", "Hugging Face's ViT"), ("layer1.0.conv1.weight", "a ResNet"),
    ("encoder.layers.encoder_layer_0.ln_1.weight", "torchvision's ViT"), ("module.encoder_q.layer1.0.bn1.bias", "a R"),
])
def test_networks_of_other_families_are_named(tmp_path, key, what):
    for prefix in ("", "module."):
        weights = {prefix + name: torch.zeros(2) for name in (key, f"{key.partition('.')[0]}.head.0.weight", "other")}
        message = rejected(tmp_path, {"state_dict": weights, "epoch": 3} if "cls_token" in key else weights)
        assert "of a DINO ViT missing; the file holds 3 keys" in message and what in message


@pytest.mark.filterwarnings("ignore")                               # what torch thinks of quantized and nested tensors
@pytest.mark.parametrize("kind, change", [
    ("int8", lambda x: x.to(torch.int8)), ("int64", lambda x: x.long()), ("bool", lambda x: x > 0),
    ("complex64", lambda x: x.to(torch.complex64)), ("float8_e4m3fn", lambda x: x.to(torch.float8_e4m3fn)),
    ("sparse_coo", lambda x: x.to_sparse()), ("meta", lambda x: x.to("meta")),
    ("qint8", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
    ("nested", lambda x: torch.nested.nested_tensor([x, x])),
])
def test_arrays_that_are_no_weights_are_named(tmp_path, kind, change):
    """int8 loaded, with other features; the others ended in tracebacks."""
    weights = tiny(**FOREIGN).state_dict()
    for key in ("cls_token", "norm.bias"):
        assert f"weights are dense arrays of floats, not 1 key ({key} {kind})" in rejected(
            tmp_path, weights | {key: change(weights[key])})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(tmp_path, dtype):
    weights = {key: value.to(dtype) for key, value in tiny(**FOREIGN).state_dict().items()}
    torch.save(weights, tmp_path / "x.pth")
    torch.set_default_dtype(torch.bfloat16)                         # has no say in it
    try:
        model = load_backbone(tmp_path / "x.pth")
    finally:
        torch.set_default_dtype(torch.float32)
    check_frozen(model, {key: value.float() for key, value in weights.items()}, ViTConfig(**FOREIGN))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    if dtype == torch.float64:
        weights["norm.bias"][0] = 1e300
        assert "not finite: 1 key (norm.bias)" in rejected(tmp_path, weights)


def save_safetensors(tensors, path):
    """The format, written by hand: the header's length, the header, the bytes."""
    header, data = {}, b""
    for key, value in tensors.items():
        raw = value.contiguous().numpy().tobytes()
        header[key] = dict(dtype="F32", shape=list(value.shape), data_offsets=[len(data), len(data) + len(raw)])
        data += raw
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def load_safetensors(path):
    """What safetensors.torch.load_file does: a stand-in for the package, which the tests do not need."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8:8 + length]), bytearray(whole[8 + length:])
    return {key: torch.frombuffer(data[slice(*entry["data_offsets"])], dtype=torch.float32).reshape(entry["shape"])
            for key, entry in header.items()}


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_safetensors_are_read_or_called_by_their_name(tmp_path, monkeypatch, name):
    model = tiny(**FOREIGN)
    save_safetensors(model.state_dict(), tmp_path / name)
    monkeypatch.setitem(sys.modules, "safetensors", None)           # as if it were not installed
    with pytest.raises(ValueError, match=f"{name}: not a checkpoint: a safetensors file; pip install safetensors, or "):
        load_backbone(tmp_path / name)
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", types.SimpleNamespace(load_file=load_safetensors))
    check_frozen(load_backbone(tmp_path / name), model.state_dict(), model.config)
    assert disk.open_weights(tmp_path / name)[1]["epochs"] is None


@pytest.mark.parametrize("epochs", [(0, 5000, 9999, 10000, 15000, 20000), (10000, 100000)])
def test_run_folder_beyond_9999_epochs(tmp_path, epochs):
    for n in epochs:
        (tmp_path / f"checkpoint_{n:04d}.pt").touch()
    for other in ("checkpoint.pt", "checkpoint_0000.seg.shapes.json", "checkpoint_12.pt", "checkpoint_old1.pt"):
        (tmp_path / other).touch()
    assert disk.list_checkpoints([tmp_path, "random"]) == [str(tmp_path / f"checkpoint_{n:04d}.pt") for n in epochs] + [
        "random"]


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


@pytest.mark.parametrize("content, what", [
    (b"<!DOCTYPE html><html>404", "a web page; download the file again"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 86\n", "a pointer of git-lfs; git lfs pull"),
])
def test_what_is_no_weights_at_all_is_named(tmp_path, content, what):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.pt: not a checkpoint: {what}"):
        load_backbone(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore")                               # torch gives up TorchScript
def test_whole_models_are_refused_with_the_way_out(tmp_path):
    assert "it holds vit.VisionTransformer, and unpickling that could run code; save its state_dict()" in rejected(
        tmp_path, tiny())
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="clip.pt: not a checkpoint: a TorchScript archive, as CLIP's; save its "):
        load_backbone(tmp_path / "clip.pt")


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


# ---- flags of the probes ---------------------------------------------------------------------------------------------

def parsed(*argv):
    p = argparse.ArgumentParser()
    disk.add_flags(p, "seg")
    args = p.parse_args(argv)
    disk.check_flags(p, args)
    return args


@pytest.mark.parametrize("flags, message", [
    ("random --heads 0", "--heads 0: must be at least 1"), ("random --workers -1", "--workers -1: must be at least 0"),
    ("random --seed -1", "--seed -1: must be at least 0"), (f"random --seed {2**63}", f"--seed {2**63}: must be below"),
    ("a.pt --like b.pt", "--like goes with --weights random"),
    ("a.pt b.pt --out x.json", "--out names one file and --weights 2"),
])
def test_flags_that_no_probe_takes(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--weights", *flags.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_run_folder_stands_for_its_checkpoints_and_an_empty_one_is_named(tmp_path):
    with pytest.raises(SystemExit, match=f"^{re.escape(str(tmp_path))}: holds no checkpoint_0000.pt"):
        parsed("--weights", str(tmp_path))
    (tmp_path / "checkpoint_0003.pt").touch()
    args = parsed("--weights", str(tmp_path))
    assert args.weights == [str(tmp_path / "checkpoint_0003.pt")] and (args.amp == "off" or torch.cuda.is_available())


@pytest.mark.parametrize("error, line", [
    (ValueError("a.jpg: unreadable"), "a.jpg: unreadable"), (ValueError("features are not finite"), "W.pt: features"),
    (ValueError('Caught in worker 0.\nTraceback ...\n  File "x"\nValueError: a.jpg: odd\n'), "a.jpg: odd"),
    (OSError("W.pt: no such file"), "W.pt: no such file"),
])
def test_what_goes_wrong_is_one_line_that_names_a_file(error, line):
    with pytest.raises(SystemExit) as stop, disk.one_line("W.pt"):
        raise error
    assert stop.value.code.startswith(line) and "\n" not in stop.value.code


def test_mean_and_sample_deviation():
    assert disk.mean_sd([1, 2, 6]) == (3, 7**0.5) and disk.mean_sd([4]) == (4, None)


# ---- results --------------------------------------------------------------------------------------------------------

def a_result(seed=0, weights="w.pt", sha="aa", which="teacher", heads=6, **protocol):
    config = dict(attn="softmax", registers=0, specialize=False, dim=384, heads=heads)
    return dict(probe="seg", data="voc", weights=weights, weights_sha256=sha, which=which, epochs=3, config=config,
                seed=seed, protocol=dict(dict(iters=10, crop=(4, 4), fingerprint="f1"), **protocol))


def write(path, **changes):
    path.write_text(json.dumps(dict(a_result(**changes), metrics={"miou": 1.0})))


def test_a_free_name_is_taken_and_its_folder_made(tmp_path):
    path, finished = disk.claim(None, tmp_path / "new/w.seg.voc.json", a_result())
    assert path == tmp_path / "new/w.seg.voc.json" and path.parent.is_dir() and finished is None


def test_the_result_of_these_weights_is_finished_and_of_others_is_replaced(tmp_path):
    path = tmp_path / "w.seg.voc.json"
    write(path)
    for out in (None, str(path)):
        assert disk.claim(out, path, a_result())[1]["metrics"] == {"miou": 1.0}
        assert disk.claim(out, path, a_result(sha="bb")) == (path, None)      # trained on since


@pytest.mark.parametrize("other", [dict(iters=11), dict(fingerprint="f2"), dict(crop=(4, 8)), dict(seed=1), dict(new=1),
                                   dict(which="student"), dict(heads=12), dict(weights="random", sha=None, which=None)])
def test_no_result_is_overwritten_by_another_protocols(tmp_path, capsys, other):
    """Not even in the third place: each has a name of its own, and finds it again."""
    default, results = tmp_path / "w.seg.voc.json", [a_result(), a_result(**other), a_result(iters=99)]
    paths = []
    for result in results:
        path, finished = disk.claim(None, default, result)
        assert finished is None
        disk.write_result(path, dict(result, metrics={"miou": len(paths)}))
        paths.append(path)
    assert paths[0] == default and len(set(paths)) == 3
    for i, (path, result) in enumerate(zip(paths, results, strict=True)):
        again, finished = disk.claim(None, default, result)
        assert again == path and finished["metrics"] == {"miou": i}
    name = {"heads": "config", "weights": "which"}.get([*other][0], [*other][0])
    assert re.search(rf"holds a result with .*{name}.*; this one goes to w.seg.voc.\w+.json", capsys.readouterr().out)
    with pytest.raises(ValueError, match=f"{default}: holds a result .*{name}.*; give another --out"):
        disk.claim(str(default), None, results[1])


def test_two_probes_that_end_at_once_do_not_overwrite_each_other(tmp_path):
    path = tmp_path / "w.seg.voc.json"
    for iters in (10, 11):                                            # both found the name free
        disk.write_result(path, dict(a_result(iters=iters), metrics={}))
    assert {json.loads(p.read_text())["protocol"]["iters"] for p in tmp_path.iterdir()} == {10, 11}


def test_controls_of_two_architectures_are_told_apart(tmp_path):
    path = tmp_path / "r.json"
    write(path, weights="random", sha=None, which=None)
    mine = a_result(weights="random", sha=None, which=None)
    assert disk.claim(None, path, mine)[1]
    assert disk.claim(None, path, dict(mine, config=dict(mine["config"], dim=32)))[0] != path


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"probe": "seg"}', "no result\xff"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="x.json: holds no result of a probe"):
        disk.claim(None, tmp_path / "x.json", a_result())
    assert (tmp_path / "x.json").read_text(encoding="latin-1") == content


def test_default_names_tell_weights_probe_data_and_of_controls_the_method():
    names = set()
    for changes in (dict(), dict(registers=4), dict(specialize=True), dict(attn="entmax15"),
                    dict(attn="entmax15", registers=4, specialize=True)):
        names.add(disk.result_path("random", "seg", "voc", ViTConfig(**changes), 3))
    assert names == {f"runs/random/seg.voc.{method}.s3.json" for method in
                     ("softmax", "softmax_r4", "softmax_spec", "entmax15", "entmax15_r4_spec")}
    assert disk.result_path("a/checkpoint.pt", "knn", "folder", ViTConfig(), 3) == "a/checkpoint.knn.folder.json"


# ---- the data: fingerprint ------------------------------------------------------------------------------------------

def files(folder, **contents):
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return sorted(folder.iterdir())


def test_fingerprint_is_of_the_data_and_not_of_its_place(tmp_path, monkeypatch):
    a, b = tmp_path / "a", tmp_path / "elsewhere/b"
    pictures, copy = files(a, one=b"1", two=b"22"), files(b, one=b"1", two=b"22")
    first = disk.fingerprint(a, pictures)
    assert disk.fingerprint(b, copy) == first and len(first) == 16
    monkeypatch.chdir(tmp_path)
    for root in ("a", "./a", f"{a}/", str(a)):                        # however it is written
        assert disk.fingerprint(root, [os.path.join(root, name) for name in ("one", "two")]) == first


def test_fingerprint_tells_every_change(tmp_path):
    pictures, labels = files(tmp_path / "a", one=b"1", two=b"22"), files(tmp_path / "l", one=b"7", two=b"8")
    seen = {disk.fingerprint(tmp_path, pictures, labels)}

    def changed(pictures=pictures, labels=labels):
        seen.add(disk.fingerprint(tmp_path, pictures, labels))
        return len(seen)

    assert changed(pictures[::-1]) == 2                               # another order
    assert changed(pictures[:1]) == 3                                 # one less
    assert changed(labels=labels[::-1]) == 4
    assert changed(pictures + labels, []) == 5                        # a label is no picture
    (tmp_path / "a/two").write_bytes(b"23")                           # another picture of equal size
    assert changed() == 6
    (tmp_path / "l/one").write_bytes(b"9")                            # a label of equal size
    assert changed() == 7
    (tmp_path / "a/one").rename(tmp_path / "a/uno")
    assert changed([tmp_path / "a/uno", pictures[1]]) == 8
    pictures[1].unlink()                                              # a file that is gone has no size
    assert changed() == 9


def test_fingerprint_of_much_data_reads_a_part_of_it(tmp_path):
    """1.5 GiB of pictures that are mostly holes: every sixth is read, and the size and name of each count."""
    pictures = []
    for i in range(12):
        pictures.append(tmp_path / f"{i:02d}")
        with open(pictures[-1], "wb") as file:
            file.truncate(2**27)
    before = disk.fingerprint(tmp_path, pictures)

    def with_a_byte_in(i):
        with open(pictures[i], "r+b") as file:
            file.write(b"x")
        changed = disk.fingerprint(tmp_path, pictures)
        with open(pictures[i], "r+b") as file:
            file.write(b"\0")
        return changed

    assert with_a_byte_in(6) != before and with_a_byte_in(1) == before
    with open(pictures[1], "r+b") as file:
        file.truncate(2**27 - 1)
    assert disk.fingerprint(tmp_path, pictures) != before


# ---- being asked to end ---------------------------------------------------------------------------------------------

def test_signals_are_noted_and_the_third_one_ends_the_process():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop, disk.noted_signals() as asked:
        os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT)
        assert asked == [signal.SIGTERM, signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.value.code == 128 + signal.SIGINT
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_items_end_where_a_signal_was_noted():
    seen = []
    with pytest.raises(SystemExit) as stop, disk.noted_signals() as asked:
        for item in disk.until_asked(asked, range(9)):
            seen.append(item)
            if item == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [0, 1, 2] and stop.value.code == 143


def test_noted_signals_work_in_a_thread_without_noting():
    said = []

    def work():
        with disk.noted_signals() as asked:
            said.append(asked)

    thread = threading.Thread(target=work)
    thread.start(); thread.join()
    assert said == [[]]


HOLD = "import sys, checkpoint; keep = checkpoint.lock(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
    def hold():
        process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=Path(disk.__file__).parent, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return process, process.stdout.readline()

    first, said = hold()
    assert said == "held\n"
    with pytest.raises(ValueError, match="another process is writing there"):
        disk.lock(tmp_path)
    first.kill(); first.wait()
    second, said = hold()                                             # no clearing away
    assert said == "held\n"
    second.kill(); second.wait()


# ---- whole files ----------------------------------------------------------------------------------------------------

def test_what_a_killed_process_left_is_cleared_after_an_hour_and_what_a_live_one_writes_is_not(tmp_path):
    old, new = tmp_path / "x[1].pt.123.tmp", tmp_path / "x[1].pt.124.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 4000,) * 2)
    disk.write_whole(tmp_path / "x[1].pt", lambda file: file.write(b"whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x[1].pt", "x[1].pt.124.tmp"]


# ---- heads of a probe ------------------------------------------------------------------------------------------------

def heads_file(tmp_path, stamp, history=(), iteration=10):
    heads = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(heads.parameters(), lr=1)
    disk.write_checkpoint(tmp_path / "x.head.pt", dict(iteration=iteration, stamp=stamp, history=list(history),
                                                       heads=heads.state_dict(), optimizer=optimizer.state_dict()))
    return tmp_path / "x.head.pt", heads, optimizer


@pytest.mark.parametrize("old, new", [(dict(), dict(more=1)), (dict(more=1), dict()), (dict(more=1), dict(more=2))])
@pytest.mark.parametrize("iteration", [4, 10])
def test_heads_of_another_stamp_are_refused_until_their_result_is_there(tmp_path, old, new, iteration):
    """Whichever of the two stamps has a field that the other lacks."""
    result = a_result()
    stamp = dict(disk.identity(result), weights_sha256="aa", **old)
    file, heads, optimizer = heads_file(tmp_path, stamp, iteration=iteration)
    resume = [file, dict(stamp, **new) if new else disk.identity(result) | dict(weights_sha256="aa"), heads, optimizer]
    assert disk.resume_heads(file, stamp, heads, optimizer) == (iteration, [])
    kind = "unfinished" if iteration < 10 else "unreported"
    with pytest.raises(ValueError, match=f"holds {kind} heads with more {old.get('more')}, now {new.get('more')}; "):
        disk.resume_heads(*resume)
    (tmp_path / "x.json").write_text(json.dumps(dict(result, metrics={}, weights_sha256="bb")))
    with pytest.raises(ValueError):                                   # of other weights: not theirs
        disk.resume_heads(*resume)
    (tmp_path / "x.json").write_text(json.dumps(dict(result, metrics={})))
    if iteration == 10:
        assert disk.resume_heads(*resume) == (0, [])
    file, heads, optimizer = heads_file(tmp_path, stamp, [{"iteration": 10}])         # or evaluated
    (tmp_path / "x.json").unlink()
    assert disk.resume_heads(file, resume[1], heads, optimizer) == (0, [])


def test_a_field_that_only_the_old_result_has_is_seen(tmp_path):
    path = tmp_path / "w.seg.voc.json"
    write(path, more=1)
    assert disk.claim(None, path, a_result())[0] != path


def test_with_out_the_result_of_another_file_of_weights_is_kept(tmp_path):
    path = tmp_path / "r.json"
    write(path)
    with pytest.raises(ValueError, match="weights w.pt, now v.pt"):
        disk.claim(str(path), None, a_result(weights="v.pt", sha="bb"))
    assert [disk.beside(name, ".head.pt").name for name in ("r.json", "e.0", "e.1")] == ["r.head.pt", "e.0.head.pt",
                                                                                    "e.1.head.pt"]


def test_weights_that_are_replaced_while_they_are_read_are_refused(tmp_path, monkeypatch):
    checkpoint, student, teacher = ours()
    torch.save(checkpoint, tmp_path / "w.pt")
    read = disk.load_backbone

    def swapped(path, *args):
        model = read(path, *args)
        torch.save(dict(checkpoint, teacher=student.state_dict()), path)
        return model

    monkeypatch.setattr(disk, "load_backbone", swapped)
    with pytest.raises(ValueError, match="w.pt: was replaced while it was read"):
        disk.open_weights(tmp_path / "w.pt")


def test_labels_are_read_up_to_a_gibibyte(tmp_path):
    """1.1 GiB of labels, mostly holes: every second one is read, where of pictures every fifth is."""
    paths = [tmp_path / f"{i}" for i in range(9)]
    for path in paths:
        with open(path, "wb") as file:
            file.truncate(2**27)
    before = disk.fingerprint(tmp_path, [], paths)
    with open(paths[2], "r+b") as file:
        file.write(b"x")
    assert disk.fingerprint(tmp_path, [], paths) != before == disk.fingerprint(tmp_path, [], paths[:2] + paths[1:2]) \
        or disk.fingerprint(tmp_path, [], paths) != before


def test_a_result_that_cannot_be_written_is_refused_before_it_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file/x.json", Path("/proc/x.json")):
        with pytest.raises(ValueError, match="give another --out"):
            disk.claim(str(out), None, a_result())


def test_width_1280_is_not_guessed(tmp_path):
    """timm's huge ViT has 16 heads there, not 20."""
    state = {"cls_token": torch.zeros(1, 1, 1280), "pos_embed": torch.zeros(1, 5, 1280),
             "patch_embed.proj.weight": torch.zeros(1280, 3, 14, 14), "blocks.0.norm1.weight": torch.zeros(1280),
             "blocks.0.mlp.fc1.weight": torch.zeros(5120, 1280)}
    with pytest.raises(ValueError, match="width 1280 .* --heads N"):
        disk.infer_config(state)
    assert disk.infer_config(state, 16).heads == 16


# ---- export ---------------------------------------------------------------------------------------------------------

def exported(tmp_path, capsys, *flags, **overrides):
    """(what python -m checkpoint writes of a run, the run, printed lines)."""
    content, *_ = ours(**overrides)
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run/checkpoint.pt")
    disk.main([str(tmp_path / "run"), "--export", str(tmp_path / "x.pth"), *flags])
    return torch.load(tmp_path / "x.pth", weights_only=True), content, capsys.readouterr().out.splitlines()


def test_export_is_the_official_state_dict(tmp_path, capsys):
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in VisionTransformer(ViTConfig(depth=12)).state_dict().items()}
    assert shapes == official_shapes() and len(shapes) == 150
    state, content, lines = exported(tmp_path, capsys, **FOREIGN)
    assert {key: tuple(value.shape) for key, value in state.items()} == official_shapes(192, 2, 8, 17)
    assert all(torch.equal(state[key], content["teacher"][key]) for key in state)
    assert "timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, " in lines[-1]
    x = images(2, 3, 32, 32)
    one, two = (load_backbone(path).features(x) for path in (tmp_path / "x.pth", tmp_path / "run"))
    assert all(torch.equal(a.cls, b.cls) and torch.equal(a.patches, b.patches) for a, b in zip(one, two, strict=True))


def test_timm_computes_the_same(tmp_path, capsys):
    timm = pytest.importorskip("timm")
    state, *_ = exported(tmp_path, capsys, **FOREIGN)
    other = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, mlp_ratio=4,
                                          num_classes=0)
    other.load_state_dict(state)
    torch.save(other.state_dict(), tmp_path / "timm.pth")           # and back
    x = images(2, 3, 32, 32)
    tokens = other.eval().forward_features(x)
    for path in (tmp_path / "x.pth", tmp_path / "timm.pth"):
        mine = load_backbone(path).features(x, blocks=[-1])[0]
        assert torch.allclose(torch.cat([mine.cls[:, None], mine.patches.flatten(1, 2)], 1), tokens, atol=1e-5)


@pytest.mark.parametrize("method, said", [
    (dict(attn="entmax15"), ["entmax15 attention, of which the file says nothing"]),
    (dict(registers=3), ["3 register_tokens between [CLS] and the patches"]),
    (dict(specialize=True), ["weights of its own for [CLS], *_cls.*"]),
    (dict(attn="entmax15", registers=2, specialize=True), ["entmax15 ", "2 register_tokens", "*_cls.*"]),
])
def test_an_export_that_is_no_plain_vit_says_what_it_needs(tmp_path, capsys, method, said):
    state, content, (_, line) = exported(tmp_path, capsys, "--which", "student", **method)
    assert all(torch.equal(state[key], content["student"][key]) for key in content["student"])
    assert line.startswith("no plain ViT, so not for timm: ") and all(words in line for words in said)
    call = line.partition("Here: model = vit.")[2].partition("; model.load_state_dict")[0]
    call = call.replace("vit.ViTConfig", "ViTConfig")
    model = eval(call)                                              # what is printed takes the file
    model.load_state_dict(state)
    assert model.config.attn == content["config"]["attn"]


def test_an_export_overwrites_nothing(tmp_path, capsys):
    exported(tmp_path, capsys)
    before = (tmp_path / "x.pth").read_bytes()
    for argv, code in ((["run", "--export", "x.pth"], "x.pth: is there already; give another --export"),
                       (["run", "--export", "x.safetensors"], "x.safetensors: torch.save writes no safetensors;"),
                       (["run", "--export", "no/y.pth"], "no/y.pth: no such folder; make it, or give another --export"),
                       (["nowhere", "--export", "y.pth"], "nowhere: no such file"),
                       (["x.pth", "--export", "y.pth"], "x.pth: cannot tell the architecture: width 24"),
                       (["run"], 2), (["run", "--export", "y.pth", "--which", "both"], 2)):
        with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            disk.main(argv)
        assert stop.value.code == code or str(stop.value.code).startswith(str(code))
    assert (tmp_path / "x.pth").read_bytes() == before and sorted(os.listdir(tmp_path)) == ["run", "x.pth"]


@pytest.mark.parametrize("more, what", [
    ({"fc_norm.weight": (192,)}, "timm's ViT that pools its patches"),
    ({"norm_pre.weight": (192,)}, "CLIP's ViT in timm"),
    ({"blocks.0.attn.q_norm.weight": (64,)}, "a ViT that normalises queries and keys"),
    ({"dist_token": (1, 1, 192), "pos_embed": (1, 18, 192)}, "distilled DeiT"),
    ({"reg_token": (1, 3, 192), "pos_embed": (1, 20, 192)}, "timm's ViT with registers"),
])
def test_vits_of_timm_that_are_others_are_named(tmp_path, more, what):
    weights = tiny(**FOREIGN).state_dict() | {key: torch.zeros(shape) for key, shape in more.items()}
    assert f"it looks like {what}" in rejected(tmp_path, weights)


def test_wrappers_within_wrappers_are_taken_off(tmp_path):
    model = tiny(**FOREIGN)
    torch.save({"checkpoint": {"model": {"module.encoder." + key: value for key, value in model.state_dict().items()}},
                "optimizer": {"state": {}}}, tmp_path / "x.pth")
    check_frozen(load_backbone(tmp_path / "x.pth"), model.state_dict(), model.config)


def test_an_encoder_beside_a_head_is_no_classifier(tmp_path):
    weights = {f"encoder.{key}": value for key, value in tiny(**FOREIGN).state_dict().items()}
    assert "save what is below encoder. alone, without that prefix" in rejected(
        tmp_path, weights | {"head.mlp.0.weight": torch.zeros(2)})


def test_places_are_spread_from_the_first_to_the_last():
    assert [disk.spread(*pair) for pair in ((7, 3), (7, 1), (3, 9), (5, 0))] == [[0, 3, 6], [0], [0, 1, 2], []]


# ---- progress --------------------------------------------------------------------------------------------------------

on_both = pytest.mark.parametrize("tty", [True, False], ids=["terminal", "file"])


def stdout_of(tty, columns, monkeypatch):
    out = io.StringIO()
    out.isatty = lambda: tty
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(disk.shutil, "get_terminal_size", lambda: os.terminal_size((columns, 9)))
    monkeypatch.setattr(disk, "progress", disk.Progress())
    return out


@on_both
def test_progress_is_one_line_of_a_terminal_and_lines_of_a_file(tty, monkeypatch):
    """What is said leaves the line above it; a line that stays is not rewritten; a wide one is cut before it wraps."""
    stdout = stdout_of(tty, 12, monkeypatch)
    progress = disk.progress
    progress.say("first")
    progress.show("loss 3")
    progress.show("loss 2 and more words")
    progress.say("warning")
    progress.say("another")
    progress.show("loss 1", stays=True)
    progress.show("loss 0")
    with pytest.raises(SystemExit), disk.one_line("x"):             # the error begins below it
        raise ValueError("wrong")
    assert stdout.getvalue() == (
        "first\n\rloss 3\033[K\rloss 2 and \033[K\nwarning\nanother\n\rloss 1\033[K\n\rloss 0\033[K\n"
        if tty else "first\nloss 3\nloss 2 and more words\nwarning\nanother\nloss 1\nloss 0\n")


@on_both
def test_progress_of_a_loop_is_rare_in_a_file_and_forgotten_by_a_terminal(tty, monkeypatch):
    """1,000 items of a second each, the first of ten: in a file after 5 s and then ever later, with the time that is
    really left, for the wait for the first one is no pace."""
    stdout, now = stdout_of(tty, 80, monkeypatch), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    seen = []
    for item in disk.progress.of(range(1000), "item"):
        seen.append(item)
        now[0] += 1 if item else 10
    assert seen == list(range(1000))
    lines = re.findall("eta ([0-9:]+) +item ([0-9,]+)/1,000", stdout.getvalue())
    if tty:
        assert len(lines) == 1000 and stdout.getvalue().endswith("\r\033[K") and "\n" not in stdout.getvalue()
    else:
        assert [done for _, done in lines] == "1 11 31 71 151 311 631".split()       # 10, 20, 40, ... seconds later
        assert lines[0][0] == "2:46:30" and stdout.getvalue().count("\n") == 7
    for eta, done in lines[1:]:
        assert eta == str(datetime.timedelta(seconds=1000 - int(done.replace(",", ""))))


@on_both
def test_progress_of_a_fast_loop_or_a_broken_off_one_leaves_nothing(tty, monkeypatch):
    stdout = stdout_of(tty, 80, monkeypatch)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    disk.progress.show("loss 1")
    before = stdout.getvalue()
    assert list(disk.progress.of("abc", "letter")) == ["a", "b", "c"] and stdout.getvalue() == before
    assert list(disk.progress.of([], "nothing")) == []
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    for item in disk.progress.of("abc", "letter"):
        if item == "c":
            break
    told = stdout.getvalue().removeprefix(before)
    assert "letter 1/3" in told and told.count("\n") == (not tty) and (not tty or told.endswith("\r\033[K"))


@pytest.mark.parametrize("seconds, text", [
    (0, "eta 0:00:00 "), (59.6, "eta 0:01:00 "), (86_399, "eta 23:59:59"), (86_400, "eta 1d 00h  "),
    (12.4 * 86_400, "eta 12d 09h "), (250 * 86_400, "eta 250d 00h")])
def test_the_time_left_is_as_wide_for_all(seconds, text):
    assert disk.time_left(seconds) == text


@pytest.mark.parametrize("name, flags", [
    ("probe_linear", "--iters 24 --log-every 12"), ("probe_seg", "--iters 24 --log-every 12 --eval-every 12"),
    ("probe_depth", "--iters 24 --log-every 12 --eval-every 12")])
def test_probes_tell_the_time_left_soon_and_then_at_times(tmp_path, monkeypatch, capsys, name, flags):
    probe = importlib.import_module(name)
    monkeypatch.setattr(probe, "Shapes", lambda split, size, n, cards=1: Shapes(split, size, 20, cards))
    path = tmp_path / "W.pt"
    model = tiny(depth=4)
    torch.save(dict(config=dataclasses.asdict(model.config), teacher=model.state_dict()), path)
    probe.main(["--weights", str(path), "--workers", "0", *flags.split()])
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["weights"] == str(path)
    told = [line for line in lines if line.startswith("eta ")]
    assert [line.split("iteration ")[1] for line in told] == ["1/24", "10/24", "12/24", "24/24"]
    assert all(len(line) <= 79 and "  loss " in line for line in told) and told[-1].startswith("eta 0:00:00 ")


@pytest.mark.parametrize("name, flags, told", [
    ("probe_linear", "--knn", ["features of 20 images, batch 1/1", "k-NN, 256 queries each: 1/1"]),
    ("probe_linear", "", ["features of 20 images, batch 1/1"]), ("probe_seg", "--iters 2", [
        "features of 20 images, batch 2/2", "evaluation of 20 pictures, batch 1/1"]),
    ("probe_depth", "--iters 2", ["features of 20 images, batch 2/2"]),
    ("pib", "", ["point-in-box of", "leaked meaning, train: 20 scenes, batch 1/1", "leaked meaning, val: 20 scenes"])])
def test_probes_tell_the_time_left_of_what_takes_long(tmp_path, monkeypatch, capsys, name, flags, told):
    """With a clock that runs fast: every item takes a minute."""
    probe = importlib.import_module(name)
    monkeypatch.setattr(probe, "Shapes", lambda split, size, n=0, length=0, cards=1: Shapes(split, size, 20, cards))
    clock = iter(range(0, 10**9, 60))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    model = tiny(depth=4)
    torch.save(dict(config=dataclasses.asdict(model.config), teacher=model.state_dict()), tmp_path / "W.pt")
    if name == "pib":
        monkeypatch.setattr(probe, "SCENES", dict(train=20, val=20))
        probe.crowds.cache_clear()
    probe.main(["--weights", str(tmp_path / "W.pt"), "--workers", "0", *flags.split()])
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["probe"] in ("knn", "linear", "seg", "depth", "pib")
    for what in told:
        assert any(line.startswith("eta ") and what in line and len(line) <= 79 for line in lines), (what, lines)


def test_what_lies_beside_the_weights_is_no_second_network(tmp_path):
    """An optimizer's state by name, settings, loops, and dicts that share what is in them."""
    model = tiny(**FOREIGN)
    deep = {}
    for _ in range(40):
        deep = {"a": deep, "b": deep}
    beside = {"optimizer": {"state": {"cls_token": {"exp_avg": torch.zeros(2)}}}, "cfg": {"use_cls_token": True},
              "shapes": {"cls_token": [1, 1, 192]}, "deep": deep}
    assert disk.unwrap({"model": model.state_dict(), **beside}).keys() == model.state_dict().keys()
    loop = dict(model.state_dict())
    loop["self"] = loop
    with pytest.raises(ValueError, match="self"):
        disk.refuse_misfits("x", disk.unwrap(loop), model.state_dict())
