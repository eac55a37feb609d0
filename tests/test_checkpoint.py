import argparse
import dataclasses
import os
import re
import zipfile

import numpy as np
import pytest
import torch
from test_vit import METHODS, images, official_shapes, tiny

import checkpoint as disk
from checkpoint import load_backbone
from vit import ViTConfig

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
