import dataclasses
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.parallel import DistributedDataParallel

import checkpoint as disk
import data
import dino
import shapes
import train
import vit

SCRIPT = Path(train.__file__)
SIZES = ("--dim 32 --depth 2 --heads 2 --patch-size 8 --image-size 32 --local-size 16 "
         "--out-dim 64 --hidden-dim 32 --bottleneck-dim 16 --batch-size 8").split()
TINY = [*SIZES, *"--attn entmax15 --length 32 --epochs 3 --warmup-epochs 1 --log-every 1 --save-every 1".split()]
# 3 epochs of 16 steps, every option on; checkpoint.pt falls in the middle of epochs
LONG = [*TINY, *"--registers 2 --specialize --drop-path 0.1 --length 128 --save-every 3 --save-steps 5".split()]
TRAINED = ("student", "teacher", "student_head", "teacher_head", "center", "step", "epoch", "optimizer")
NUMBERED = TRAINED[:-1]                                             # of which numbered files hold all but this


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)                                        # as in the processes that some tests start
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    train.main([*LONG, "--out", str(out)])
    return out


def load(path):
    return torch.load(path, weights_only=True)


def run(out, *flags, base=TINY):
    train.main([*base, "--out", str(out), *flags])
    return load(Path(out, "checkpoint.pt"))


def records(out):
    """Log records of steps; the ones of provenance left out."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [r for r in lines if "step" in r]


def leaves(tree, path=""):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if items is None:
        yield path, tree
    else:
        for key, value in items:
            yield from leaves(value, f"{path}.{key}")


def differing(a, b, keys=TRAINED):
    """Paths of the leaves that are not bit-equal."""
    a, b = (dict(leaves({key: state[key] for key in keys})) for state in (a, b))
    assert a.keys() == b.keys()
    return [path for path, x in a.items() if not (torch.equal(x, b[path]) if torch.is_tensor(x) else x == b[path])]


def exits(argv):
    """(exit status, message) of a run that must fail; a str code is what sys.exit prints before status 1."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(map(str, argv)))
    code = stop.value.code
    return (1, code) if isinstance(code, str) else (code, "")


def gradients(out, state):
    """{name: exp_avg}: a linear function of the gradients of all steps, by parameter."""
    model = train.Run(train.parse_args([*state_args(state), "--out", str(out)]), torch.device("cpu"))
    names = {id(p): name for name, p in model.student.named_parameters()}
    order = [names[id(p)] for group in model.optimizer.param_groups for p in group["params"]]
    return {order[i]: moments["exp_avg"] for i, moments in state["optimizer"]["state"].items()}


def state_args(state):
    """The flags that decide the shapes of a state."""
    a = state["args"]
    numbers = [f"--{name.replace('_', '-')}={a[name]}" for name in (
        "dim", "depth", "heads", "patch_size", "image_size", "local_size", "out_dim", "hidden_dim", "bottleneck_dim",
        "batch_size", "registers", "attn")]
    return numbers + ["--specialize"] * a["specialize"]


# ---- the recipe -----------------------------------------------------------------------------------------------------

def test_folder_recipe_is_the_published_one():
    args = train.parse_args(["--data", "IMAGENET"])
    published = dict(
        arch="small", patch_size=16, epochs=200, batch_size=1024, lr=5e-4, warmup_epochs=10, min_lr=1e-6,
        weight_decay=0.04, weight_decay_end=0.4, clip_grad=3.0, freeze_last_layer=1, norm_last_layer=False,
        out_dim=65536, hidden_dim=2048, bottleneck_dim=256, warmup_teacher_temp=0.04, teacher_temp=0.07,
        warmup_teacher_temp_epochs=30, student_temp=0.1, center_momentum=0.9, momentum=0.996, drop_path=0.1,
        global_scale=[0.4, 1.0], local_scale=[0.05, 0.4], local_crops=8, image_size=224, local_size=96, save_every=20,
        seed=0, attn="softmax", registers=0, specialize=False, accum=1,
    )
    assert {name: getattr(args, name) for name in published} == published
    assert args.config == vit.ViTConfig(drop_path=0.1)              # whose own defaults are ViT-S/16


def test_optimizer_and_student_are_the_published_ones():
    model = train.Run(train.parse_args([*TINY, "--drop-path", "0.1"]), torch.device("cpu"))
    assert type(model.optimizer) is torch.optim.AdamW
    assert model.optimizer.defaults["betas"] == (0.9, 0.999) and model.optimizer.defaults["eps"] == 1e-8
    assert [block.rate for block in model.student.backbone.blocks] == [0.0, 0.1]
    assert [block.rate for block in model.teacher.backbone.blocks] == [0.0, 0.0]
    assert not any(p.requires_grad for p in model.teacher.parameters())


TABLE = [                       # B = 1024, 200 epochs of 1,251 steps; with half a unit of the last digit
    (0, 0, 0, 0.04, 0, 0.996, 0),
    (1, 1.5988e-7, 5e-12, 0.04, 1e-9, 0.996, 1e-9),
    (1251, 2.00016e-4, 5e-10, 0.0400222, 5e-8, 0.9960002467, 5e-11),
    (12509, 2.0e-3, 1e-15, 0.0422157, 5e-8, 0.9960246194, 5e-11),
    (12510, 2.0e-3, 1e-15, 0.0422161, 5e-8, 0.9960246233, 5e-11),
    (62550, 1.7892459e-3, 5e-11, 0.0927208, 5e-8, 0.9965857864, 5e-11),
    (125100, 1.0830381e-3, 5e-11, 0.22, 1e-12, 0.998, 1e-12),
    (250199, 1.0000001e-6, 5e-14, 0.4, 5e-10, 1.0, 5e-10),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: str(row[0]))
def test_schedules_of_the_published_run(row):
    step, lr, lr_unit, wd, wd_unit, momentum, momentum_unit = row
    now = train.schedules(train.parse_args(["--data", "IMAGENET"]), step, per_epoch=1251)
    assert now["lr"] == pytest.approx(lr, abs=lr_unit, rel=1e-12)
    assert now["wd"] == pytest.approx(wd, abs=wd_unit, rel=1e-12)
    assert now["momentum"] == pytest.approx(momentum, abs=momentum_unit, rel=1e-12)


def test_schedules_equal_the_arrays_of_the_original():
    args, total, warm = train.parse_args(["--data", "IMAGENET"]), 250_200, 12_510

    def array(base, final, warm):
        i = np.arange(total - warm)
        return np.r_[np.linspace(0, base, warm), final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / len(i)))]

    lr, wd, momentum = array(2e-3, 1e-6, warm), array(0.04, 0.4, 0), array(0.996, 1, 0)
    temp = np.r_[np.linspace(0.04, 0.07, 30), np.full(170, 0.07)]
    assert temp[1] == pytest.approx(0.041034, abs=5e-7)             # linspace(0.04, 0.07, 30)[1]
    steps = [*range(0, total, 997), *range(12_500, 12_520), 30 * 1251 - 1, 30 * 1251, total - 1]
    got = [train.schedules(args, step, 1251) for step in steps]
    np.testing.assert_allclose([now["lr"] for now in got], lr[steps], rtol=1e-9, atol=1e-18)
    np.testing.assert_allclose([now["wd"] for now in got], wd[steps], rtol=1e-9)
    np.testing.assert_allclose([now["momentum"] for now in got], momentum[steps], rtol=1e-12)
    np.testing.assert_allclose([now["temp"] for now in got], temp[np.array(steps) // 1251], rtol=1e-12)


def test_shapes_recipe_writes_at_least_six_numbered_checkpoints():
    args = train.parse_args([])
    assert args.data == "shapes" and args.epochs // args.save_every + 1 >= 6


@pytest.mark.parametrize("flags, name", [
    ("", "runs/shapes_softmax_s0"),
    ("--attn entmax15 --registers 4 --specialize --seed 1", "runs/shapes_entmax15_r4_spec_s1"),
    ("--data /datasets/imagenette112/ --registers 4", "runs/imagenette112_softmax_r4_s0"),
    ("--data /datasets/imagenette112 --specialize", "runs/imagenette112_softmax_spec_s0"),
])
def test_default_run_folder(flags, name):
    assert train.parse_args(flags.split()).out == name


def test_arch_gives_width_depth_and_heads_and_each_can_be_overridden():
    def shape(flags):
        config = train.parse_args(flags.split()).config
        return config.dim, config.depth, config.heads

    assert shape("--arch tiny") == (192, 12, 3)                     # on shapes too, whose recipe has its own
    assert shape("--data DIR --arch base") == (768, 12, 12)
    assert shape("--data DIR --arch tiny --depth 6") == (192, 6, 3)
    assert shape("--dim 128 --heads 4") == (128, train.RECIPES["shapes"]["depth"], 4)


def scenes(size, length):
    """The embedded data set, as train.py sees it."""
    flags = f"--patch-size 8 --image-size {size} --batch-size {length} --length {length}"
    return train.open_data(train.parse_args(flags.split()))[0]


def test_pretraining_sees_the_train_scenes():
    images, sets = scenes(32, 6), [shapes.Shapes(split, 32, 6) for split in ("train", "val")]
    assert all(torch.equal(images[i], sets[0][i]["image"]) for i in range(6))
    assert not any(torch.equal(x, sets[1][i]["image"]) for x in images for i in range(6))


# ---- one step -------------------------------------------------------------------------------------------------------

def plain_step(student, teacher, center, moments, views, lr, wd, momentum, temp, freeze, student_temp, clip):
    """Caron et al.'s algorithm as loops over views, pairs and parameters; returns the loss and the new centre."""
    with torch.no_grad():
        raw = [teacher([view])[0] for view in views[:2]]
        targets = [F.softmax((t - center) / temp, -1) for t in raw]
    answers = [F.log_softmax(student([view])[0] / student_temp, -1) for view in views]
    pairs = [-(targets[q] * answers[v]).sum(-1).mean() for q in range(2) for v in range(len(views)) if v != q]
    loss = sum(pairs) / len(pairs)
    named = list(student.named_parameters())
    for (name, p), g in zip(named, torch.autograd.grad(loss, [p for _, p in named]), strict=True):
        if freeze and "last_layer" in name:
            continue
        g = g * min(1, clip / (g.norm() + 1e-6))
        m, v, n = moments.get(name, (0, 0, 0))
        m, v, n = moments[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, n + 1
        with torch.no_grad():
            if p.ndim > 1 and not name.endswith("bias"):
                p *= 1 - lr * wd
            p -= lr * (m / (1 - 0.9**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)
    with torch.no_grad():
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.copy_(momentum * t + (1 - momentum) * s)
    return loss.detach(), 0.9 * center + 0.1 * torch.cat(raw).mean(0, keepdim=True)


@pytest.mark.parametrize("student_temp, clip", [(0.1, 3.0), (0.3, 0.02)])        # the defaults, and others
def test_three_steps_equal_the_algorithm_written_as_loops(student_temp, clip):
    args = train.parse_args([*TINY, "--registers", "2", "--specialize", "--center-momentum", "0.9",
                             f"--student-temp={student_temp}", f"--clip-grad={clip}"])
    cpu = torch.device("cpu")
    ours, plain = train.Run(args, cpu), train.Run(args, cpu)
    start = {name: p.detach().clone() for name, p in plain.student.named_parameters()}
    multicrop = data.MultiCrop(32, 16, 2)
    crops = data.Crops(scenes(32, 24), multicrop, seed=0)
    center, moments = torch.zeros(1, 64), {}
    for step in range(3):
        now = dict(lr=1e-3, wd=5.0, momentum=0.9, temp=0.05 + 0.01 * step)
        batch = data.collate([crops[0, i] for i in range(8 * step, 8 * step + 8)])[:-1]
        freeze = step == 0
        loss, *_ = train.train_step(ours, [batch], multicrop, step, now, freeze)
        order = data.generator(data.JITTER_ORDER, args.seed, step).permutation(4)
        views = multicrop.photometric(*batch, order)
        expected, center = plain_step(plain.student, plain.teacher, center, moments, views, freeze=freeze, **now,
                                      student_temp=student_temp, clip=clip)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.loss.center, center, rtol=1e-3, atol=1e-5)
    for name, p in ours.student.named_parameters():
        if "qkv" in name and name.endswith("bias"):                 # the gradient of a key bias is rounding alone
            continue
        reference = dict(plain.student.named_parameters())[name]
        moved = (reference - start[name]).norm()
        assert (p - reference).norm() <= 1e-2 * moved, name
    for (name, t), reference in zip(ours.teacher.named_parameters(), plain.teacher.parameters(), strict=True):
        torch.testing.assert_close(t, reference, rtol=0, atol=3e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_teacher_is_a_copy_of_the_student_and_not_the_student(uninterrupted):
    """One that shared memory would learn nothing, at a loss that looks alive; fresh or loaded."""
    for resumed in (False, True):
        model = train.Run(train.parse_args(LONG), torch.device("cpu"))
        if resumed:
            disk.restore_run(model, load(uninterrupted / "checkpoint.pt"), "checkpoint.pt")
        places = [{p.untyped_storage().data_ptr() for p in net.parameters()} for net in (model.student, model.teacher)]
        assert len(places[0]) == len(places[1]) == len(list(model.student.parameters()))
        assert not places[0] & places[1]


def test_teacher_moves_by_moving_average_alone(tmp_path):
    run(tmp_path, "--length", "8", "--momentum", "0.5")             # one step per epoch, so one file per step
    files = [load(tmp_path / f"checkpoint_{epoch:04d}.pt") for epoch in range(4)]
    for step, momentum in enumerate((0.5, 0.625, 0.875)):           # 1 - (1 - 0.5) (1 + cos(pi step / 3)) / 2
        for teacher, student in (("teacher", "student"), ("teacher_head", "student_head")):
            for name, before in files[step][teacher].items():
                after = momentum * before + (1 - momentum) * files[step + 1][student][name]
                torch.testing.assert_close(files[step + 1][teacher][name], after, rtol=0, atol=1e-6)
    assert not torch.equal(files[3]["teacher"]["cls_token"], files[3]["student"]["cls_token"])


@pytest.mark.parametrize("per_epoch, frozen", [(2, 1), (1, 1), (1, 2), (1, 0)])
def test_prototypes_stay_for_just_the_epochs_that_they_should(tmp_path, per_epoch, frozen):
    run(tmp_path, *f"--length {8 * per_epoch} --lr 0.01 --freeze-last-layer {frozen} --warmup-epochs 0".split())
    heads = [load(tmp_path / f"checkpoint_{epoch:04d}.pt")["student_head"] for epoch in range(4)]
    for name in ("last_layer.weight_g", "last_layer.weight_v"):     # nor do they decay
        assert [torch.equal(heads[e][name], heads[e + 1][name]) for e in range(3)] == [e < frozen for e in range(3)]
    assert not torch.equal(heads[0]["mlp.0.weight"], heads[1]["mlp.0.weight"])


# a value other than the default of every flag that decides a number
OTHER = dict(
    length=24, image_size=24, local_size=8, local_crops=1, global_scale="0.5 1", local_scale="0.05 0.3",
    attn="softmax", registers=1, specialize="", dim=16, depth=1, heads=1, patch_size=4, drop_path=0.5,
    out_dim=32, hidden_dim=16, bottleneck_dim=8, norm_last_layer="", student_temp=0.2, teacher_temp=0.05,
    warmup_teacher_temp=0.05, warmup_teacher_temp_epochs=0, center_momentum=0.7, epochs=3, batch_size=4, lr=4e-3,
    min_lr=1e-3, warmup_epochs=0, weight_decay=0.1, weight_decay_end=0.3, clip_grad=0.01, freeze_last_layer=0,
    momentum=0.9, seed=1, amp="bf16",
)
SAME_NUMBERS = set("data arch workers accum no_fused compile out save_every save_steps log_every".split())


def test_every_flag_has_an_effect_on_training():
    base = [*TINY, *"--length 16 --epochs 2 --warmup-teacher-temp-epochs 2 --teacher-temp 0.07".split()]
    assert OTHER.keys() | SAME_NUMBERS == disk.plain(train.parse_args(base)).keys()

    def trained(*flags):
        state = run("_".join(["run", *flags]), *flags, base=base)
        return dict(leaves({key: state[key] for key in ("student", "teacher", "student_head", "center")}))

    plain, idle = trained(), []
    for name, value in OTHER.items():
        other = trained(disk.flag(name), *str(value).split())
        if plain.keys() == other.keys() and all(torch.equal(x, other[path]) for path, x in plain.items()):
            idle.append(name)
    assert idle == []


def test_stochastic_depth_is_another_in_every_step_micro_batch_and_process(monkeypatch):
    args, drawn, honest = train.parse_args([*TINY, "--drop-path", "0.5", "--accum", "2"]), [], vit.Block.drop

    def drop(self, y):
        dropped = honest(self, y)
        if self.rate:
            drawn.append(tuple((dropped != 0).flatten(1).any(1).tolist()))
        return dropped

    monkeypatch.setattr(vit.Block, "drop", drop)
    model, now = train.Run(args, torch.device("cpu")), dict(lr=0, wd=0, momentum=1, temp=0.05)
    for step, model.rank in ((0, 0), (1, 0), (0, 1), (0, 0)):
        train.train_step(model, micro_batches(args), multicrop_of(args), step, now, False)
    calls = 2 * 2 * 2                                               # branches, sizes, micro-batches
    assert drawn[:calls] == drawn[3 * calls:] and len(set(drawn[:3 * calls])) == 3 * calls


def test_every_parameter_that_can_learn_gets_a_gradient(tmp_path):
    flags = "--registers 2 --specialize --epochs 1 --warmup-epochs 0 --freeze-last-layer 0 --length 8".split()
    moments = gradients(tmp_path, run(tmp_path, *flags))
    idle = {name for name, m in moments.items() if not m.any()}
    # the loss sees [CLS] alone: after the last attention, what acts on the other tokens has no effect
    assert idle == {"backbone.norm.weight", "backbone.norm.bias",
                    "backbone.blocks.1.norm2.weight", "backbone.blocks.1.norm2.bias"}


def test_student_learns_a_teacher_that_stands_still(tmp_path):
    """What it can learn is the divergence; the rest of the loss is the teacher's entropy, which its weights decide: so
    over three of them."""
    flags = "--length 8 --epochs 60 --save-every 60 --lr 0.1 --momentum 1 --center-momentum 1 --seed".split()
    kl = []
    for seed in "012":
        run(tmp_path / seed, *flags, seed)
        kl.append([r["kl"] for r in records(tmp_path / seed)])
    kl = np.mean(kl, 0)
    assert len(kl) == 60 and kl[-5:].mean() < 0.6 * kl[0]


@pytest.mark.parametrize("flags", ["--attn softmax", "--attn softmax --registers 4", "--attn softmax --specialize",
                                   "--attn entmax15", "--attn entmax15 --registers 4 --specialize"])
def test_every_method_trains_and_loads(tmp_path, flags):
    state = run(tmp_path, *flags.split(), *"--length 8 --norm-last-layer --local-crops 1".split())
    model = disk.load_backbone(tmp_path / "checkpoint.pt")
    assert dataclasses.asdict(model.config) == state["config"]
    assert state["config"]["attn"] == flags.split()[1]
    assert torch.equal(state["student_head"]["last_layer.weight_g"], torch.ones(64, 1))     # --norm-last-layer


def test_bf16_autocast_starts_where_float32_does(tmp_path):
    first = {}
    for amp in ("off", "bf16"):
        run(tmp_path / amp, "--amp", amp, *"--length 8 --epochs 1 --warmup-epochs 0 --teacher-temp 0.5".split(),
            "--warmup-teacher-temp", "0.5")
        first[amp] = records(tmp_path / amp)[0]
    assert first["bf16"]["loss"] != first["off"]["loss"]
    assert first["bf16"]["loss"] == pytest.approx(first["off"]["loss"], rel=0.02)


def micro_batches(args, step=0):
    """The crops of a step of `args` on the embedded data, as the loop hands them on."""
    crops = data.Crops(scenes(args.image_size, args.batch_size), multicrop_of(args), args.seed)
    order = data.Batches(args.batch_size, args, 0, 1, step)
    return [data.collate([crops[key] for key in keys])[:-1] for keys in itertools.islice(order, args.accum)]


def multicrop_of(args):
    return data.MultiCrop(args.image_size, args.local_size, args.local_crops, args.global_scale, args.local_scale)


def steps(model, args, number, start=0):
    """(loss, gradient norm) of steps without the loop."""
    now = dict(lr=1e-3, wd=0.1, momentum=0.9, temp=0.05)
    return [torch.stack(train.train_step(model, micro_batches(args, step), multicrop_of(args), step, now, False)[:2])
            .tolist() for step in range(start, start + number)]


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_compiled_networks_in_ddp_compute_what_plain_ones_do(monkeypatch, one_process_group):
    """With stochastic depth and accumulation, in a graph that DDP cuts into several buckets. Not by Inductor, which
    takes half a minute and draws other random numbers: see test_faults.py."""
    flags = "--dim 128 --depth 3 --drop-path 0.5 --accum 2 --clip-grad 0".split()
    plain = train.parse_args([*TINY, *flags])
    honest, graphs = nn.Module.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(nn.Module, "compile", lambda self: honest(self, backend=backend))
    torch._dynamo.reset()
    first = {}
    with torch._dynamo.config.patch(specialize_float=False):        # monkeypatch would hide it for good
        for args in (plain, train.parse_args([*TINY, *flags, "--compile"])):
            model = train.Run(args, torch.device("cpu"))
            model.ddp = DistributedDataParallel(model.student, bucket_cap_mb=1)
            (first[args.compile],) = steps(model, args, 1)
    torch._dynamo.reset()
    assert len(graphs) > 3                                          # more than one for each network and size
    assert first[True] == pytest.approx(first[False], rel=1e-4)


def test_a_half_precision_student_trains_with_stochastic_depth():
    args = train.parse_args([*TINY, "--drop-path", "0.5"])
    student = train.Run(args, torch.device("cpu")).student.bfloat16()
    logits = student([torch.randn(8, 3, 32, 32, dtype=torch.bfloat16)])
    logits.float().square().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_autocast_does_not_round_the_branches_that_stochastic_depth_scales():
    block = train.Run(train.parse_args([*TINY, "--drop-path", "0.3"]), torch.device("cpu")).student.backbone.blocks[-1]
    y = torch.randn(64, 5, 32).bfloat16()                           # as a linear layer gives it under autocast
    with torch.autocast("cpu", torch.bfloat16):
        dropped = block.drop(y)
    assert dropped.dtype == torch.float32
    kept = dropped[:, 0, 0] != 0
    assert 0 < kept.sum() < 64
    torch.testing.assert_close(dropped[kept], y[kept].float() / 0.7, rtol=2e-7, atol=0)


# ---- processes and micro-batches ------------------------------------------------------------------------------------

# clipping would hide a gradient that is wrong by a factor; a small lr keeps Adam from blowing rounding up to weights
SPLIT = [*TINY, *"--length 16 --epochs 2 --warmup-epochs 0 --freeze-last-layer 0 --clip-grad 0 --lr 1e-3 "
                 "--registers 2 --specialize".split()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, run(out, base=SPLIT)


def torchrun(processes, out, *flags):
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    done = subprocess.run([sys.executable, *launcher, SCRIPT, *SPLIT, "--out", out, *flags], capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("paper's recipe") == 1                 # rank 0 alone prints
    return load(out / "checkpoint.pt")


@pytest.mark.parametrize("processes, accum", [(1, "2"), (2, "2")])
def test_any_split_of_the_batch_gives_the_same_loss_centre_and_gradients(tmp_path, whole, processes, accum):
    out, expected = whole
    if processes == 1:
        state = run(tmp_path, "--accum", accum, base=SPLIT)
    else:
        state = torchrun(processes, tmp_path, "--accum", accum)
    assert state["step"] == expected["step"] == 4
    for ours, reference in zip(records(tmp_path), records(out), strict=True):
        assert ours["step"] == reference["step"]
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
    torch.testing.assert_close(state["center"], expected["center"], rtol=1e-4, atol=1e-6)
    ours, reference = gradients(tmp_path, state), gradients(out, expected)
    for name in reference:
        scale = reference[name].norm()
        if name.endswith("qkv.bias") or name.endswith("qkv_cls.bias"):      # that of a key bias is rounding alone
            scale = reference[name.replace("bias", "weight")].norm()
        assert (ours[name] - reference[name]).norm() <= 1e-4 * scale, name


def test_number_of_workers_changes_nothing(tmp_path):
    states = [run(tmp_path / str(n), "--workers", str(n), "--drop-path", "0.1") for n in (0, 2)]
    assert not differing(*states)


def test_seed_changes_weights_and_crops(tmp_path):
    a, b = (train.Run(train.parse_args([*TINY, "--seed", seed]), torch.device("cpu")) for seed in "01")
    assert not torch.equal(a.student.backbone.pos_embed, b.student.backbone.pos_embed)
    source = scenes(32, 2)

    def crops(seed, epoch, index):
        return data.Crops(source, data.MultiCrop(32, 16, 2), seed)[epoch, index][0]

    first = crops(0, 0, 0)
    assert torch.equal(first, crops(0, 0, 0))
    assert not any(torch.equal(first, crops(*key)) for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))


# ---- interruption and resume ----------------------------------------------------------------------------------------

def interrupted(out, number, done, *flags):
    """Start the run, send it a signal once `done` steps are logged, return its exit status and what it printed."""
    with open(f"{out}.txt", "w+") as text:
        process = subprocess.Popen([sys.executable, SCRIPT, *LONG, "--out", out, *flags], stdout=text, stderr=text,
                                   start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        log = Path(out, "log.jsonl")
        try:
            while not log.exists() or log.read_bytes().count(b"\n") < 1 + done:
                assert process.poll() is None, Path(text.name).read_text()
                time.sleep(0.005)
            os.killpg(process.pid, number)                          # to its loader workers too, as a terminal does
            return process.wait(60), Path(text.name).read_text()
        finally:
            process.kill()


def assert_as_uninterrupted(out, uninterrupted, state):
    assert not differing(state, load(uninterrupted / "checkpoint.pt"))
    names = ("checkpoint_0000.pt", "checkpoint_0003.pt")
    assert sorted(path.name for path in out.glob("checkpoint_*")) == sorted(names)
    for name in names:
        assert not differing(load(out / name), load(uninterrupted / name), keys=NUMBERED)
    log, expected = records(out), records(uninterrupted)
    assert [r["step"] for r in log] == list(range(1, 49))           # each once, in order
    assert [r["loss"] for r in log] == [r["loss"] for r in expected]


def test_killed_run_resumes_bit_equal(tmp_path, uninterrupted, capsys):
    status, _ = interrupted(tmp_path / "run", signal.SIGKILL, done=7)
    assert status == -signal.SIGKILL
    step = load(tmp_path / "run/checkpoint.pt")["step"]
    assert 5 <= step < 48 and step % 16                             # in the middle of an epoch
    with Path(tmp_path, "run/log.jsonl").open("a") as log:          # what a kill in the middle of a write leaves
        log.write('{"step": 49, "lo')
    state = run(tmp_path / "run", "--workers", "1", base=LONG)
    assert f"going on from step {step}" in capsys.readouterr().out
    assert_as_uninterrupted(tmp_path / "run", uninterrupted, state)


def test_sigterm_saves_between_two_steps_and_the_run_resumes_bit_equal(tmp_path, uninterrupted):
    status, text = interrupted(tmp_path / "run", signal.SIGTERM, 6, "--save-steps", "1000", "--workers", "1")
    assert status == 128 + signal.SIGTERM, text
    assert "Traceback" not in text
    step = load(tmp_path / "run/checkpoint.pt")["step"]
    assert 6 <= step < 48                                           # the last periodic one is that of step 0
    assert f"stopped by signal 15 after step {step}, saved" in text
    assert records(tmp_path / "run")[-1]["step"] == step
    assert_as_uninterrupted(tmp_path / "run", uninterrupted, run(tmp_path / "run", base=LONG))


def test_kill_between_the_two_files_of_an_epoch_loses_none(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    write, left = disk.write_checkpoint, [2 + 2 + 1]                # epochs 0 and 1, then the first of epoch 2's two

    def killed(path, state):
        if not left[0]:
            raise Killed
        left[0] -= 1
        write(path, state)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(disk, "write_checkpoint", killed)
        run(tmp_path)
    run(tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("checkpoint_*"))] == [f"checkpoint_000{e}.pt" for e in range(4)]


def test_finished_run_says_so_and_touches_nothing(uninterrupted, capsys):
    before = {path.name: path.read_bytes() for path in uninterrupted.iterdir()}
    train.main([*LONG, "--out", str(uninterrupted)])                # returns: exit status 0
    assert "finished, 3 epochs done" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in uninterrupted.iterdir()} == before


@pytest.mark.parametrize("flags, way", [
    ("--lr 0.5", "with --lr 0.008"), ("--attn softmax", "with --attn entmax15"), ("--seed 3", "with --seed 0"),
    ("--length 64", "with --length 128"), ("--local-scale 0.1 0.4", "with --local-scale 0.05 0.4"),
    ("--norm-last-layer --compile", "with --no-norm-last-layer, without --compile"),
    ("--arch tiny", "without --arch"),
    ("--workers 3 --epochs 9 --norm-last-layer --lr 1 --global-scale 0.5 1 --save-steps 3",
     "with --epochs 3 --global-scale 0.4 1.0 --lr 0.008 --no-norm-last-layer"),
])
def test_all_changed_flags_are_refused_in_one_line_that_can_be_pasted(uninterrupted, capsys, flags, way):
    before = {path.name: path.read_bytes() for path in uninterrupted.iterdir()}
    assert exits([*LONG, "--out", uninterrupted, *flags.split()]) == (2, "")
    assert capsys.readouterr().err == (f"train.py: error: {uninterrupted / 'checkpoint.pt'}: begun with other flags; "
                                       f"go on {way}, or give another --out\n")
    assert {path.name: path.read_bytes() for path in uninterrupted.iterdir()} == before
    if "without" not in way:                                        # pasted behind what was typed
        train.main([*LONG, "--out", str(uninterrupted), *flags.split(), *way.split()[1:]])


def test_a_flag_that_the_run_had_and_its_path_with_spaces_are_given_back(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "Run", lambda *args: pytest.fail("trained"))
    args = train.parse_args([*TINY, "--data", str(tmp_path / "two words"), "--norm-last-layer"])
    args.images, args.fingerprint = 32, "scenes 1"
    state = {name: kind() for name, kind in disk.RUN.items() if kind is not torch.Tensor}
    torch.save(dict(state, center=torch.zeros(1), args=disk.plain(args)), tmp_path / "checkpoint.pt")
    assert exits([*TINY, "--out", tmp_path]) == (2, "")
    message = capsys.readouterr().err
    assert f"--data '{tmp_path}/two words'" in message and " --norm-last-layer " in message


def test_resume_goes_on_with_the_flags_of_the_run(tmp_path, uninterrupted, capsys, monkeypatch):
    honest = train.schedules

    def struck(args, step, per_epoch):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(args, step, per_epoch)

    with monkeypatch.context() as patch:
        patch.setattr(train, "schedules", struck)
        assert exits([*LONG, "--out", tmp_path / "run", "--save-steps", "1000"]) == (128 + signal.SIGTERM, "")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    train.main(["--resume", str(moved), "--log-every", "1"])
    assert "going on from step 7\n" in capsys.readouterr().out
    state = load(moved / "checkpoint.pt")
    assert_as_uninterrupted(moved, uninterrupted, state)
    wanted = load(uninterrupted / "checkpoint.pt")["args"]
    assert state["args"] == dict(wanted, out=str(moved), save_steps=1000)


@pytest.mark.parametrize("flags, status, message", [
    ("--lr 0.5", 2, "go on with --lr 0.008, or give"),
    ("--data DIR", 2, "go on with --"),                             # whose recipe is another, too
    ("--out other", 2, "drop --out other"),
    ("--workers 2 --log-every 9 --save-every 1", None, "finished, 3 epochs done"),
])
def test_what_may_be_given_beside_resume(uninterrupted, capsys, flags, status, message):
    Path("DIR").mkdir()
    for i in range(128):
        Path("DIR", f"{i}.png").touch()
    if status is None:
        train.main(["--resume", str(uninterrupted), *flags.split()])
    else:
        assert exits(["--resume", uninterrupted, *flags.split()]) == (status, "")
    text = capsys.readouterr()
    assert message in (text.out + text.err).splitlines()[-1]


@pytest.mark.parametrize("run", ["none", "empty"])
def test_resume_of_what_is_no_run_is_one_line(tmp_path, run):
    (tmp_path / "empty").mkdir()
    assert exits(["--resume", run]) == (1, f"{run}: holds no checkpoint.pt; --resume takes the folder of a run that "
                                           "has begun")
    assert not list(tmp_path.rglob("*.*"))


def test_flags_that_decide_no_number_may_change(uninterrupted):
    train.main([*LONG, "--out", str(uninterrupted), *"--workers 3 --log-every 7 --save-every 2 --save-steps 9".split()])


def test_every_other_flag_decides_and_may_not_change(uninterrupted):
    """All flags there are, one at a time, against what the run holds."""
    args = load(uninterrupted / "checkpoint.pt")["args"]
    parsed = {name for name in vars(train.parse_args([])) if name not in ("config", "recipe")}
    assert parsed <= args.keys() and args.keys() - parsed == {"images", "fingerprint"}
    free = {"out", "workers", "log_every", "save_every", "save_steps"}
    for name in parsed:
        value = args[name]
        changed = dict(args, **{name: [0.1, 0.2] if isinstance(value, list) else not value if isinstance(value, bool)
                                else f"{value}x" if isinstance(value, str) else 7 if value is None else value + 1})
        state, refusal = disk.resume_run(uninterrupted, changed)
        named = any(f"--{no}{name.replace('_', '-')}" in refusal for no in ("", "no-"))
        assert (state is None) == (name not in free) == named, (name, refusal)


def test_a_second_run_in_the_same_folder_is_kept_out_and_changes_nothing(tmp_path):
    """A requeued job whose first life is not over, `srun -n 2 python train.py`."""
    out = tmp_path / "run"
    command = [sys.executable, SCRIPT, *LONG, "--epochs", "40", "--out", out]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not (out / "log.jsonl").exists() or not records(out):
            assert first.poll() is None
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)                           # so that nothing but the second can write
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        status, message = exits(["--resume", out])
        assert status == 1 and message == (f"{out}: another process is writing there; wait for it, stop it, or give "
                                           "another --out")
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    finally:
        first.kill()
        first.wait()
    disk.lock(out).close()                                          # what a killed process leaves keeps nobody out


def test_a_log_line_cut_short_does_not_stop_a_resume(tmp_path):
    run(tmp_path)
    log, state = tmp_path / "log.jsonl", load(tmp_path / "checkpoint.pt")
    whole = log.read_text()
    log.write_text(whole + '{"args": {"versions": {}}')             # ends in a brace, and is no JSON
    disk.Log(tmp_path, True, state["step"])
    assert log.read_text() == whole


def test_an_out_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    status, message = exits([*TINY, "--out", tmp_path / "file" / "run"])
    assert status == 1 and message.startswith(f"{tmp_path / 'file' / 'run'}: ") and "--out" in message


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_checkpoint_that_cannot_be_resumed_is_named(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    if content is None:
        torch.save({"teacher": {}}, path)
    else:
        path.write_bytes(content)
    status, message = exits([*TINY, "--out", tmp_path])
    assert status == 1 and message.startswith(f"{path}: cannot be resumed") and "--out" in message


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def test_checkpoint_holds_what_is_promised_in_plain_types(uninterrupted):
    keys = "config student teacher student_head teacher_head center optimizer scaler step epoch args".split()
    state, numbered = load(uninterrupted / "checkpoint.pt"), load(uninterrupted / "checkpoint_0003.pt")
    assert list(state) == keys
    assert list(numbered) == [key for key in keys if key not in ("optimizer", "scaler")]
    plain = (torch.Tensor, int, float, str, bool, type(None))
    assert {type(leaf) for _, leaf in leaves(state)} <= set(plain)
    assert state["step"] == numbered["step"] == 48 and state["epoch"] == numbered["epoch"] == 3
    assert not differing(state, numbered, keys=NUMBERED)
    model = vit.VisionTransformer(vit.ViTConfig(**state["config"]))
    for which in ("student", "teacher"):
        assert list(state[which]) == list(model.state_dict())       # no prefixes
        assert list(state[f"{which}_head"]) == list(dino.DINOHead(32, 64, 32, 16).state_dict())
    assert state["args"]["lr"] == 0.008 and state["args"]["global_scale"] == [0.4, 1.0]


def test_file_0000_holds_the_initial_weights(uninterrupted):
    state = load(uninterrupted / "checkpoint_0000.pt")
    torch.manual_seed(0)                                            # the seed of the run
    fresh = vit.VisionTransformer(vit.ViTConfig(**state["config"])).state_dict()
    assert not differing(state, {"student": fresh}, keys=["student"])
    assert not differing(state, {"student": state["teacher"], "student_head": state["teacher_head"]},
                         keys=["student", "student_head"])
    assert state["epoch"] == state["step"] == 0 and not state["center"].any()


def test_numbered_files_of_more_than_9999_epochs(tmp_path):
    args = train.parse_args([*TINY, *"--epochs 20000 --save-every 5".split()])
    model = train.Run(args, torch.device("cpu"))
    for epoch in (0, 9_995, 9_999, 10_000, 20_000):                 # 9,999 is not due
        train.save(model, tmp_path, 3 * epoch, 3)
    found = {path.name: load(path)["epoch"] for path in tmp_path.glob("checkpoint_*")}
    assert found == {"checkpoint_0000.pt": 0, "checkpoint_9995.pt": 9_995, "checkpoint_10000.pt": 10_000,
                     "checkpoint_20000.pt": 20_000}


def test_load_backbone_reads_both_networks(uninterrupted):
    state = load(uninterrupted / "checkpoint.pt")
    for which in ("teacher", "student"):
        model = disk.load_backbone(uninterrupted / "checkpoint.pt", which)
        assert not differing(state, {which: model.state_dict()}, keys=[which])


def test_failed_write_ends_the_run_in_one_line(tmp_path, monkeypatch):
    def full_disk(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(SystemExit, match="checkpoint_0000.pt: not written: .*No space left.*make room"):
        run(tmp_path)


@pytest.mark.parametrize("where", ["weight", "gradient", "centre", "input", "teacher's output"])
@pytest.mark.parametrize("log_every", ["1", "1000"])                # found on a log line, found before a save
def test_what_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, monkeypatch, where, log_every):
    honest, number = train.train_step, iter(range(1, 99))

    def planted(run, micro_batches, multicrop, *rest, **kw):
        if next(number) != 6:
            return honest(run, micro_batches, multicrop, *rest, **kw)
        hook = None
        if where == "weight":
            run.student.backbone.cls_token.data[0, 0, 0] = math.nan
        elif where == "gradient":
            hook = run.student.head.mlp[0].weight.register_hook(lambda g: g * math.inf)
        elif where == "input":
            photometric, bad = multicrop.photometric, torch.tensor(math.nan)
            multicrop.photometric = lambda *args: [bad + view for view in photometric(*args)]
        elif where == "teacher's output":
            hook = run.teacher.head.register_forward_hook(lambda module, args, logits: logits / 0)
        else:
            run.teacher.head.last_layer.weight_g.data[3] = math.inf
        result = honest(run, micro_batches, multicrop, *rest, **kw)
        if hook:
            hook.remove()
        multicrop.__dict__.pop("photometric", None)
        return result

    monkeypatch.setattr(train, "train_step", planted)
    flags = f"--out {tmp_path} --save-steps 3 --save-every 3 --log-every {log_every}"
    status, message = exits([*TINY, *flags.split()])
    good = tmp_path / "checkpoint.pt"
    assert status == 1
    assert "not finite at step 6;" in message and f"last good: {good}, step 3" in message
    for path in tmp_path.glob("*.pt"):
        bad = [name for name, leaf in leaves(load(path)) if torch.is_tensor(leaf) and not leaf.isfinite().all()]
        assert not bad, path
    assert load(good)["step"] == 3
    assert {r["step"] for r in records(tmp_path)} <= set(range(1, 7))


@pytest.fixture
def fp16():
    """() -> (args, Run) of a run in half precision, whose loss scale grows after two good steps. The command line wants
    CUDA for it; torch can do it on a CPU, too."""
    def start():
        args = train.parse_args([*TINY, "--clip-grad", "0.5", "--epochs", "9"])
        args.amp, args.images, args.fingerprint = "fp16", 32, "scenes"
        model = train.Run(args, torch.device("cpu"))
        assert model.scaler.is_enabled()
        model.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=2)
        return args, model
    return start


def test_fp16_computes_what_float32_does_whatever_the_scale(fp16):
    args, model = fp16()
    plain = train.parse_args([*TINY, "--clip-grad", "0.5", "--epochs", "9"])
    ((loss, norm),) = steps(train.Run(plain, torch.device("cpu")), plain, 1)
    ((half_loss, half_norm),) = steps(model, args, 1)
    assert half_loss != loss and half_loss == pytest.approx(loss, rel=5e-3)
    assert half_norm == pytest.approx(norm, rel=5e-2)               # as it was before scaling
    assert model.scaler.get_scale() == 2
    moments = [state["exp_avg"].norm() for state in model.optimizer.state.values()]
    assert max(moments) == pytest.approx(0.1 * 0.5, rel=1e-3)       # clipped after the scale was taken out


def test_fp16_scale_grows_and_a_step_that_overflows_is_skipped(fp16, tmp_path):
    args, model = fp16()
    steps(model, args, 2)
    assert model.scaler.get_scale() == 4
    student, center = [p.clone() for p in model.student.parameters()], model.loss.center.clone()
    hook = model.student.head.mlp[0].weight.register_hook(lambda g: g * math.inf)
    steps(model, args, 1, start=2)
    hook.remove()
    assert model.scaler.get_scale() == 2
    assert all(torch.equal(p, before) for p, before in zip(model.student.parameters(), student, strict=True))
    assert {int(state["step"]) for state in model.optimizer.state.values()} == {2}
    train.check_finite(model, tmp_path)                                           # nothing to stop for
    steps(model, args, 1, start=3)
    assert not all(torch.equal(p, before) for p, before in zip(model.student.parameters(), student, strict=True))
    assert not torch.equal(model.loss.center, center)


def test_fp16_run_goes_on_from_its_checkpoint_bit_for_bit(fp16, tmp_path):
    args, model = fp16()
    steps(model, args, 3)                                           # grown once, and half of the next wait is over
    train.save(model, tmp_path, 3, 4)
    expected = steps(model, args, 3, start=3)
    state = load(tmp_path / "checkpoint.pt")
    assert state["scaler"]["scale"] == 4 and state["scaler"]["_growth_tracker"] == 1
    args, again = fp16()
    disk.restore_run(again, state, tmp_path / "checkpoint.pt")
    assert steps(again, args, 3, start=3) == expected
    ends = []
    for end in (model, again):
        train.save(end, tmp_path, 6, 4)
        ends.append(load(tmp_path / "checkpoint.pt"))
    assert not differing(*ends, keys=(*TRAINED, "scaler"))
    assert model.scaler.get_scale() == 16


def test_fp16_that_overflows_in_every_step_stops_the_run(tmp_path):
    """The scaler halves its scale in a step that overflows, and skips it; below 1 there is nothing left to try."""
    model = train.Run(train.parse_args(TINY), torch.device("cpu"))
    model.args.amp, model.scaler = "fp16", torch.amp.GradScaler("cpu", init_scale=4.0)
    train.check_finite(model, tmp_path)
    for _ in range(3):
        loss = model.student.backbone.cls_token.sum() * math.inf
        model.scaler.scale(loss).backward()
        model.scaler.step(model.optimizer)
        model.scaler.update()
    with pytest.raises(SystemExit, match="loss scale fell below 1.*--amp bf16"):
        train.check_finite(model, tmp_path)
    assert model.student.backbone.cls_token.isfinite().all()


# ---- log ------------------------------------------------------------------------------------------------------------

def test_log_carries_what_reveals_failure(uninterrupted):
    first, *steps = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    assert {"args", "config", "processes", "device", "versions", "commit", "dirty", "date"} <= first.keys()
    assert {"python", "torch", "torchvision", "numpy", "pillow"} <= first["versions"].keys()
    assert first["versions"]["torch"] == torch.__version__
    assert first["args"] == load(uninterrupted / "checkpoint.pt")["args"]
    wanted = {"step", "epoch", "loss", "loss_per_log_k", "entropy", "kl", "center", "grad_norm", "support", "lr", "wd",
              "momentum", "images_per_s", "memory_gib", "eta_s", "rank"}
    args = train.parse_args(LONG)
    for r in steps:
        assert wanted <= r.keys()
        assert all(math.isfinite(r[key]) for key in wanted)
        assert r["loss_per_log_k"] == pytest.approx(r["loss"] / math.log(64))
        assert 0 <= r["entropy"] <= math.log(64) * (1 + 1e-6) and r["kl"] >= 0 and 0 < r["support"] <= 1
        now = train.schedules(args, r["step"] - 1, per_epoch=16)
        assert {key: r[key] for key in now} == now
    final = load(uninterrupted / "checkpoint.pt")
    assert steps[-1]["center"] == pytest.approx(final["center"].norm().item())


def test_log_lines_between_which_steps_lie(tmp_path, uninterrupted, monkeypatch):
    """A clock that ticks once a step: eight images per second, and as many seconds left as steps."""
    ticks, honest = [0.0], train.train_step

    def ticking(*args, **kw):
        ticks[0] += 1
        return honest(*args, **kw)

    monkeypatch.setattr(train, "train_step", ticking)
    monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: ticks[0]))
    run(tmp_path, "--log-every", "10", base=LONG)
    log, every = records(tmp_path), records(uninterrupted)
    assert [r["step"] for r in log] == [1, 10, 16, 20, 30, 40, 48]
    for before, r in zip([0, 1, 10, 16, 20, 30, 40], log, strict=True):
        step, last = r["step"], every[r["step"] - 1]
        assert r["loss"] == pytest.approx(np.mean([every[i]["loss"] for i in range(before, step)]), rel=1e-6)
        same = ("lr", "wd", "momentum", "temp", "grad_norm", "entropy", "kl", "support", "rank", "center")    # of it
        assert {key: r[key] for key in same} == {key: last[key] for key in same}
        assert (r["epoch"], r["images_per_s"], r["eta_s"]) == (step / 16, 8, 48 - step)


def test_support_is_the_share_of_nonzero_weights(tmp_path):
    for attn in ("entmax15", "softmax"):
        args = train.parse_args([*TINY, "--attn", attn])
        model = train.Run(args, torch.device("cpu"))
        if attn == "entmax15":                                      # sharp enough for zeros
            model.teacher.backbone.blocks[-1].attn.qkv.weight.data.mul_(100)
        views = [torch.randn(8, 3, 32, 32)] * 2
        weights = model.teacher.backbone.attention(views[0], 1)
        logits = torch.randn(2, 8, 64)
        facts = train.diagnose(model, logits, logits, views[0], 0.07)
        assert facts["support"] == pytest.approx(weights.count_nonzero().item() / weights.numel())
        assert facts["support"] == 1 if attn == "softmax" else facts["support"] < 0.7
        p = F.softmax(logits.double() / 0.07, -1)
        assert facts["entropy"] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-5)
        cross = -(p * F.log_softmax(logits.double() / 0.1, -1).flip(0)).sum(-1).mean().item()
        assert facts["loss"] == pytest.approx(cross, rel=1e-5)
        assert facts["kl"] == pytest.approx(facts["loss"] - facts["entropy"])
        with torch.no_grad():
            cls = model.teacher.backbone(views[0]).double()
        share = torch.linalg.svdvals(cls - cls.mean(0)) ** 2
        share = share[share > 1e-12] / share.sum()
        assert facts["rank"] == pytest.approx((-(share * share.log()).sum()).exp().item(), rel=1e-5)


def test_log_drops_what_lies_after_the_checkpoint(tmp_path, capsys):
    lines = ['{"args": {}}', *(json.dumps({"step": step}) for step in (1, 4, 8, 12)), '{"step": 13, "lo']
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(lines))
    disk.Log(tmp_path, False, 8)                                   # not the main process
    assert path.read_text() == "\n".join(lines)
    disk.Log(tmp_path, True, 8).record({"step": 9}, "step 9")
    assert path.read_text().splitlines() == [*lines[:4], '{"step": 9}']
    assert capsys.readouterr().out == "step 9\n"                    # no terminal: a plain line


def test_one_of_a_thing_is_singular(tmp_path, capsys):
    flags = "--length 8 --epochs 1 --warmup-epochs 0".split()
    for _ in range(2):
        run(tmp_path, *flags)
    text = capsys.readouterr().out
    assert f"{tmp_path}: finished, 1 epoch done;" in text and ", 1 step of 8 images on 1 x cpu" in text
    assert [train.counted(n, "process") for n in (1, 2000)] == ["1 process", "2,000 processes"]


def test_first_line_names_the_data_and_the_papers_recipe(tmp_path, capsys):
    run(tmp_path, "--length", "8")
    assert capsys.readouterr().out.startswith("shapes, embedded; the paper's recipe needs --data DIR\n")


@pytest.mark.parametrize("record, sign", [
    (dict(loss=2.0, entropy=1e-4), "entropy is 0"),
    (dict(loss=2.0, entropy=math.log(64) - 1e-4), "ln K"),
    (dict(loss=math.log(64) + 1e-4, entropy=2.0), "ln K"),
    (dict(loss=2.0, entropy=1.0), None),
    (dict(loss=0.5 * math.log(64), entropy=0.9 * math.log(64)), None),
])
def test_collapse_is_called_by_name(record, sign):
    healthy, record = dict(loss=2.0, entropy=1.0, rank=3.0), dict(record, rank=3.0)
    warning = dino.collapse([healthy] * 3 + [record] * 5, math.log(64))
    assert sign in warning and "--" in warning if sign else warning is None
    assert dino.collapse([record] * 4, math.log(64)) is None       # too early to tell
    assert dino.collapse([record] * 4 + [healthy], math.log(64)) is None


def test_collapsed_run_warns_once(tmp_path, capsys):
    run(tmp_path, *"--length 8 --epochs 8 --save-every 8 --teacher-temp 1e5 --warmup-teacher-temp 1e5".split())
    assert capsys.readouterr().out.count("warning: ") == 1          # uniform teacher


# ---- folders of images ----------------------------------------------------------------------------------------------

def draw_folder(root, good, bad):
    root.mkdir(parents=True)
    for i in range(good):
        Image.effect_noise((24, 24), 60).convert("RGB").save(root / f"{i:03d}.jpg")
    for i in range(bad):
        (root / f"bad{i}.jpg").write_text("no picture")
    return root


FOLDER = [*SIZES, *"--local-crops 2 --epochs 2 --warmup-epochs 1 --log-every 1 --warmup-teacher-temp-epochs 0".split()]


def test_few_bad_files_are_named_counted_and_training_goes_on(tmp_path, capsys):
    root = draw_folder(tmp_path / "images", 143, 1)
    strange = os.fsdecode(b"caf\xe9.jpg")                           # Latin-1, no UTF-8
    os.rename(root / "000.jpg", root / strange)
    with open(root / "bad0.jpg", "rb") as content:
        Path(root, os.fsdecode(b"\xff.jpg")).write_bytes(content.read())
    os.remove(root / "bad0.jpg")
    state = run(tmp_path / "run", "--data", str(root), "--workers", "1", base=FOLDER)
    assert state["epoch"] == 2 and state["args"]["images"] == 144
    text = capsys.readouterr().out
    assert text.count("unreadable") == 1 and f"{root}/\ufffd.jpg" in text
    assert [r["bad_files"] for r in records(tmp_path / "run")][17::18] == [1, 2]    # once in each epoch
    assert not differing(state, run(tmp_path / "again", "--data", str(root), "--workers", "0", base=FOLDER))


@pytest.fixture
def trained(tmp_path):
    """(run folder, its data) of a run that has ended."""
    root, out = draw_folder(tmp_path / "a/images", 16, 0), tmp_path / "run"
    run(out, "--data", str(root), "--workers", "0", base=FOLDER)
    return out, root


def go_on(out, root, *flags):
    """(exit status, message), (None, "") of a run that was finished."""
    try:
        train.main([*FOLDER, "--data", str(root), "--out", str(out), *flags])
    except SystemExit as stop:
        return (1, stop.code) if isinstance(stop.code, str) else (stop.code, "")
    return None, ""


@pytest.mark.parametrize("change", ["replaced", "removed", "added", "renamed"])
def test_other_pictures_are_refused(trained, change):
    out, root = trained
    content = bytearray((root / "003.jpg").read_bytes())
    content[-9] ^= 1                                                # of the same size
    dict(replaced=lambda: (root / "003.jpg").write_bytes(content), removed=(root / "003.jpg").unlink,
         added=lambda: (root / "z.jpg").write_bytes(content), renamed=lambda: (root / "003.jpg").rename(root / "z.jpg")
         )[change]()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    status, message = go_on(out, root)
    images = 16 + dict(removed=-1, added=1).get(change, 0)
    assert status == 1 and message == (
        f"{out / 'checkpoint.pt'}: trained on 16 images of {root}; of the {images} in {root} some were replaced, "
        "added or removed; bring the data back, or give another --out")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_data_may_move_and_two_folders_of_one_name_do_not_mix(trained, tmp_path, capsys):
    out, root = trained
    shutil.copytree(root, tmp_path / "scratch/123/train")           # with a train/ around them
    (root / "._003.jpg").touch()                                    # no picture: changes nothing
    assert go_on(out, tmp_path / "scratch/123") == go_on(out, root, "--workers", "1") == (None, "")
    train.main(["--resume", str(out), "--data", str(tmp_path / "scratch/123/train")])
    other = draw_folder(tmp_path / "b/images", 16, 0)
    flags = [train.parse_args([*FOLDER, "--data", str(folder)]) for folder in (root, other)]
    assert flags[0].out == flags[1].out == "runs/images_softmax_s0"
    status, message = go_on(out, other)
    assert status == 1 and f"trained on 16 images of {root}; of the 16 in {other} some were" in message


def test_a_checkpoint_from_before_fingerprints_goes_on_if_path_and_count_agree(trained, tmp_path, capsys):
    out, root = trained
    state = load(out / "checkpoint.pt")
    assert state["args"].pop("fingerprint") == disk.fingerprint(root, sorted(root.iterdir()))
    torch.save(state, out / "checkpoint.pt")
    assert go_on(out, root) == (None, "")
    shutil.copytree(root, tmp_path / "copy")
    assert go_on(out, tmp_path / "copy") == (2, "")
    assert f"go on with --data {root}, or" in capsys.readouterr().err
    (root / "003.jpg").unlink()
    assert go_on(out, root)[0] == 1


def test_the_embedded_data_have_a_fingerprint_too(uninterrupted, monkeypatch):
    assert load(uninterrupted / "checkpoint.pt")["args"]["fingerprint"] == shapes.FINGERPRINT
    monkeypatch.setattr(train, "FINGERPRINT", "scenes of another version")
    status, message = exits([*LONG, "--out", uninterrupted])
    assert status == 1 and "some were replaced" in message


def test_many_bad_files_stop_the_run_at_the_end_of_the_first_epoch(tmp_path, capsys):
    root = draw_folder(tmp_path / "images", 28, 4)
    status, message = exits([*FOLDER, "--data", root, "--out", tmp_path / "run", "--workers", "0"])
    assert status == 1 and "more than 1 %" in message and str(root / "bad0.jpg") in message
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3]      # four steps make an epoch
    text = capsys.readouterr().out
    assert all(text.count(f"bad{i}.jpg") == 1 for i in range(4))


# ---- mistakes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    ("--batch-size 10 --accum 4", "--batch-size 10 is not divisible by 1 process x --accum 4"),
    ("--image-size 60", "--image-size 60 is not a multiple of --patch-size 8"),
    ("--local-size 30", "--local-size 30 is not a multiple of --patch-size 8"),
    ("--attn sparsemax", "invalid choice: 'sparsemax'"),
    ("--arch huge", "invalid choice: 'huge'"),
    ("--epochs 0", "--epochs 0"),
    ("--epochs 5 --warmup-epochs 5", "--warmup-epochs 5 leaves nothing of --epochs 5"),
    ("--lr -1", "--lr -1.0"),
    ("--lr nan", "--lr nan"),
    ("--min-lr -1", "--min-lr -1.0"),
    ("--registers -1", "--registers -1"),
    ("--workers -1", "--workers -1"),
    ("--seed -1", "--seed -1"),
    ("--accum 0", "--accum 0"),
    ("--batch-size 0", "--batch-size 0"),
    ("--patch-size 0", "--patch-size 0"),
    ("--save-every 0", "--save-every 0"),
    ("--clip-grad -1", "--clip-grad -1.0"),
    ("--weight-decay -0.1", "--weight-decay -0.1"),
    ("--momentum 1.5", "--momentum 1.5"),
    ("--center-momentum -0.1", "--center-momentum -0.1"),
    ("--teacher-temp 0", "--teacher-temp 0.0"),
    ("--global-scale 0.5 0.4", "--global-scale 0.5 0.4"),
    ("--local-scale 0 0.4", "--local-scale 0.0 0.4"),
    ("--dim 100 --heads 3", "dim=100 is not divisible by heads=3"),
    ("--drop-path 1", "drop_path=1.0"),
    ("--epoch 5", "unrecognized arguments: --epoch"),               # no abbreviations
    pytest.param("--amp fp16", "--amp fp16 needs CUDA",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")),
])
def test_usage_errors_are_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(flags.split())
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and message in last


def test_batch_is_divided_among_processes(monkeypatch, capsys):
    for name, value in dict(RANK="0", WORLD_SIZE="3", LOCAL_RANK="0", MASTER_ADDR="host", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        train.parse_args(["--batch-size", "32", "--accum", "2"])
    assert "--batch-size 32 is not divisible by 3 processes x --accum 2" in capsys.readouterr().err


@pytest.mark.parametrize("world", ["3", "", "many"])
def test_a_world_size_left_over_without_a_rank_is_one_process(monkeypatch, world):
    monkeypatch.setenv("WORLD_SIZE", world)
    for rank in (None, ""):
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        assert train.parse_args(["--batch-size", "32"]).batch_size == 32
        assert train.setup_distributed()[:2] == (0, 1)


@pytest.mark.parametrize("environment, named", [
    ("RANK=0", "WORLD_SIZE=, "), ("RANK=0 WORLD_SIZE=2", "MASTER_PORT=, MASTER_ADDR="),
    ("RANK=x WORLD_SIZE=1", "RANK=x"),
    ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_PORT=1", "MASTER_ADDR="), ("RANK=1 WORLD_SIZE=1", "WORLD_SIZE=1"),
    ("RANK=0 WORLD_SIZE=two MASTER_ADDR=localhost MASTER_PORT=1", "WORLD_SIZE=two"),
    ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=-1", "LOCAL_RANK=-1"),
])
def test_half_an_environment_of_torchrun_is_named(monkeypatch, capsys, environment, named):
    for setting in environment.split():
        monkeypatch.setenv(*setting.split("="))
    assert exits([]) == (2, "")
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: RANK=" in last and named in last and "start with torchrun, or unset RANK" in last


@pytest.mark.parametrize("cards, local", [(0, 0), (1, 0), (4, None)])
def test_a_launcher_of_one_process_per_machine_may_leave_out_the_local_rank(monkeypatch, cards, local):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    for name, value in dict(RANK="3", WORLD_SIZE="4", MASTER_ADDR="node0", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    if local is None:                                               # which card, cannot be known
        with pytest.raises(ValueError, match="LOCAL_RANK=; start"):
            train.launched()
    else:
        assert train.launched() == (3, 4, local)


@pytest.mark.parametrize("flags, message", [
    ("--data missing", "missing: no such folder"),
    ("--data empty", "empty: 0 images, fewer than --batch-size 8"),
    ("--data some", "some: 5 images, fewer than --batch-size 8"),
    ("--data shapes --length 7", "shapes: 7 images, fewer than --batch-size 8; raise --length"),
])
def test_data_errors_name_the_folder(tmp_path, flags, message):
    (tmp_path / "empty").mkdir()
    draw_folder(tmp_path / "some", 5, 0)
    status, text = exits([*SIZES, *"--epochs 2 --warmup-epochs 1 --local-crops 2".split(), *flags.split()])
    assert status == 1 and message in text and "\n" not in text
    assert not os.path.exists("runs")


# ---- the kernel on a user's card
@pytest.mark.parametrize("flags, verdict, asked, eager", [
    ("--attn entmax15 --amp bf16 --accum 2", (True, "fine"), True, False),
    ("--attn entmax15", (False, "wrong"), True, True),
    ("--attn entmax15 --no-fused", (True, "fine"), False, True), ("--attn softmax", (False, "wrong"), False, False)])
def test_the_kernel_is_checked_on_the_shapes_of_the_run(monkeypatch, flags, verdict, asked, eager):
    """On CUDA, before the first step; what fails there is left out of student and teacher."""
    calls, said = [], []
    monkeypatch.setitem(sys.modules, "entmax_triton", types.SimpleNamespace(
        check=lambda *args: calls.append(args) or verdict))
    monkeypatch.setattr(train, "HAS_TRITON", True)
    args = train.parse_args([*SIZES, *flags.split(), "--registers", "3"])
    state = train.Run(args, torch.device("cpu"))
    train.check_kernel(state, 2, torch.device("cpu"), said.append)
    assert not calls                                                # nothing to check without a card
    train.check_kernel(state, 2, torch.device("cuda", 0), said.append)
    dtype, images = (torch.bfloat16, 2) if "bf16" in flags else (torch.float32, 4)      # 8 over processes and --accum
    shapes = [(2 * images, 2, 1 + 3 + 16, 16), (2 * images, 2, 1 + 3 + 4, 16)]          # of global and of local crops
    assert calls == [(shape, dtype, torch.device("cuda", 0)) for shape in shapes] * asked
    assert said == [verdict[1]] * 2 * asked
    blocks = [*state.student.backbone.blocks, *state.teacher.backbone.blocks]
    assert [getattr(block.attn.attend, "keywords", {}) for block in blocks] == [{"fused": False} if eager else {}] * 4


def test_memory_is_in_bytes_and_0_where_the_system_does_not_say(monkeypatch):
    held = train.peak_memory()
    assert 100 * 2**20 < held < 100 * 2**30                         # of this process, with torch in it
    monkeypatch.setattr(sys, "platform", "darwin")                  # counts in bytes, Linux in KiB
    assert held / 1024 <= train.peak_memory() < held / 512
    monkeypatch.setitem(sys.modules, "resource", None)              # Windows
    assert train.peak_memory() == 0


@pytest.mark.parametrize("saved, now", [(True, False), (False, True)])
def test_the_optimizer_is_that_of_this_device(saved, now):
    """A run that moves between a CPU and a card takes the fused AdamW where it is, and not where it was."""
    args = train.parse_args(SIZES)
    states = [train.Run(args, torch.device("cpu")) for _ in range(2)]
    for state, fused in zip(states, (saved, now), strict=True):
        state.optimizer = torch.optim.AdamW(dino.param_groups(state.student), fused=fused)
    for p in states[0].student.parameters():
        p.grad = torch.ones_like(p)
    states[0].optimizer.step()
    whole = dict(student=states[0].student.backbone.state_dict(), teacher=states[0].teacher.backbone.state_dict(),
                 student_head=states[0].student.head.state_dict(), teacher_head=states[0].teacher.head.state_dict(),
                 center=states[0].loss.center, optimizer=states[0].optimizer.state_dict(),
                 scaler=states[0].scaler.state_dict())
    disk.restore_run(states[1], whole, "x")
    assert all(group["fused"] is now for group in states[1].optimizer.param_groups)
    moments = [[s["exp_avg"] for s in state.optimizer.state.values()] for state in states]
    assert len(moments[0]) > 10 and all(map(torch.equal, *moments))


# ---- leaving together -----------------------------------------------------------------------------------------------

@pytest.fixture
def store(monkeypatch):
    """In place of that of a process group."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    return store


@pytest.mark.parametrize("trial", range(20))
def test_all_processes_that_are_asked_to_end_leave_after_the_same_step(store, trial):
    """In whatever order they take their steps, as far as collectives leave them any, and however late each is asked."""
    rng, world, loss = np.random.default_rng(trial), 2 + trial % 3, torch.zeros(())
    done, left, asked_at = [10] * world, [None] * world, rng.integers(10, 30, world)
    for _ in range(5000):
        rank = int(rng.integers(world))
        begun = [left[k] is None for k in range(world) if done[k] == done[rank]]
        if left[rank] is None and min(done) == done[rank] and all(begun):       # or a collective waits for another
            done[rank] += 1
            if max(done) >= asked_at[rank] and train.leaves(rank, world, 10, done[rank], loss):
                left[rank] = done[rank]
    assert left == [left[0]] * world and max(asked_at) < left[0] <= max(asked_at) + 3


def test_a_process_that_alone_is_asked_to_end_leaves_in_time_if_it_is_the_main_one(store, monkeypatch):
    clock, loss = [100.0], torch.zeros(())
    monkeypatch.setattr(time, "time", lambda: clock[0])
    assert not train.leaves(0, 3, 0, 5, loss) and not train.leaves(1, 3, 0, 6, loss)
    clock[0] += train.PATIENCE + 1
    assert train.leaves(0, 3, 0, 7, loss) and not train.leaves(1, 3, 0, 7, loss)
    assert train.leaves(0, 1, 0, 7, loss)                           # one process waits for nobody


def test_a_signal_between_two_looks_is_saved_before_the_process_leaves(tmp_path, capsys):
    class Late(list):
        def __getitem__(self, key):
            return super().__getitem__(key) if self.looked() else []

        def __bool__(self):
            return self.looked()

        def looked(self):
            self.append(signal.SIGTERM)
            return len(self) > 1

    with pytest.raises(SystemExit) as stopped:
        train.train(train.parse_args([*LONG, "--out", str(tmp_path), "--save-steps", "999"]), 0, 1,
                    torch.device("cpu"), Late())
    assert stopped.value.code == 128 + signal.SIGTERM
    step = load(tmp_path / "checkpoint.pt")["step"]
    assert step > 0 and f"stopped by signal 15 after step {step}, saved" in capsys.readouterr().out


# ---- own pictures

SMALL = "--recipe small --image-size 32 --local-size 16 --depth 2 --batch-size 8".split()


def test_recipes_set_all_defaults_and_give_way_to_flags():
    """Which row holds: the one that is named, else that of the data."""
    def facts(*flags):
        args = train.parse_args(list(flags))
        return args.out_dim, args.arch, args.dim, args.norm_last_layer

    paper, small, embedded = (65536, "small", None, False), (1024, "tiny", 96, True), (512, None, 64, False)
    assert facts("--data", "DIR") == facts("--data", "DIR", "--recipe", "paper") == paper
    assert facts() == facts("--recipe", "shapes") == embedded
    assert facts("--data", "DIR", "--recipe=small") == facts("--recipe", "small") == small
    assert facts("--recipe", "small", "--arch", "base", "--no-norm-last-layer") == (1024, "base", None, False)
    assert len({tuple(sorted(row.keys() - {"arch", "dim", "depth", "heads"})) for row in train.RECIPES.values()}) == 1
    stored = disk.plain(train.parse_args(["--recipe", "small"]))
    assert "recipe" not in stored                                   # runs of before it have no such argument


def test_help_shows_the_values_of_the_recipe(capsys):
    for flags, lr in (([], "0.008"), (["--data", "DIR"], "0.0005"), (["--data", "DIR", "--recipe", "small"], "0.002")):
        with pytest.raises(SystemExit):
            train.parse_args([*flags, "--help"])
        assert f"peak learning rate per 256 images (default: {lr})" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("mine, beside, workers", [({0}, "", 1), (set(range(6)), "", 6), (set(range(64)), "", 10),
                                                   (set(range(6)), "2", 3), ({0}, "4", 1)])
def test_no_more_loaders_than_cores(monkeypatch, mine, beside, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: mine, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
    assert train.parse_args(["--data", "DIR"]).workers == workers
    assert train.parse_args(["--data", "DIR", "--workers", "12"]).workers == 12
    assert train.parse_args([]).workers == 0


def draw_classes(root, *counts):
    for name, n in zip("abc", counts, strict=False):
        draw_folder(root / name, n, 0)
    return root


def test_own_pictures_from_first_line_to_next_command(tmp_path, capsys):
    """One bad file, some that are passed over; the run goes on without --recipe, by the flags it holds."""
    root, out = draw_classes(tmp_path / "my pictures", 9, 8), tmp_path / "run"
    (root / "a/bad.jpg").write_text("no picture")
    for name in ("a/1.heic", "2.HEIC", "3.mov", "4", ".DS_Store"):
        (root / name).touch()
    flags = [*SMALL, "--epochs", "2", "--data", str(root), "--workers", "0", "--log-every", "1"]
    run(out, *flags, base=[])
    text = capsys.readouterr().out
    first, _, few, *_, last = text.splitlines()
    assert first == (f"{root}, 18 images (passed over: 2 .heic, 1 .mov, 1 without suffix); recipe small where no flag "
                     "says otherwise")
    assert few.startswith("few steps; --epochs 750 make the 1,500 ") and text.count("unreadable") == 1
    assert last == (f"done: {out}/checkpoint.pt; next: python probe_linear.py --knn --data folder --root "
                    f"'{root}' --weights {out}/checkpoint.pt")
    for again, values in ((["--resume", str(out)], "the flags of the run"),
                          ([*flags, "--out", str(out)], "recipe small where no flag says otherwise")):
        train.main(again)
        text = capsys.readouterr().out
        assert "finished, 2 epochs done" in text and text.splitlines()[0].endswith(f"; {values}")
    assert exits(["--resume", out, "--recipe", "small"]) == (2, "")
    assert "drop --recipe small" in capsys.readouterr().err
    assert all(1 <= r["rank"] <= 7 for r in records(out))           # eight images differ in seven directions at most


@pytest.mark.parametrize("folders, given, proposed", [
    ("a b", "", "--data folder --root {}"), ("train/a train/b", "", "--data folder --root {}/train"),
    ("train/a train/b val/a", "", "--data folder --root {}"), ("train/a train/b val/a", "train", "--root {}"),
    ("a .b", "", "figures pca"), ("", "", "figures pca"), ("train/a val/a val/b", "", "figures pca")])
def test_the_next_command_fits_the_folder(tmp_path, folders, given, proposed):
    for name in folders.split():
        (tmp_path / "set" / name).mkdir(parents=True)
    (tmp_path / "set").mkdir(exist_ok=True)
    args = types.SimpleNamespace(data=str(tmp_path / "set" / given).rstrip("/"))
    command = train.next_command(args, Path("runs/x y/checkpoint.pt"))
    assert proposed.format(args.data) + " --weights 'runs/x y/checkpoint.pt'" in command


@pytest.mark.parametrize("images, flags, way_out", [
    (40, "", "40 images, fewer than --batch-size 1024; give --recipe small or --batch-size 32"),
    (5, "", "5 images, fewer than --batch-size 1024; give --recipe small --batch-size 5"),
    (5, "--recipe small", "5 images, fewer than --batch-size 32; give --batch-size 5"),
    (0, "--recipe small", "0 images (passed over: 1 .heic), fewer than --batch-size 32; counted .jpg"),
])
def test_too_few_images_name_the_way_out(tmp_path, images, flags, way_out):
    root = draw_folder(tmp_path / "set", images, 0)
    if not images:
        (root / "x.heic").touch()
    status, text = exits(["--data", root, *flags.split()])
    assert status == 1 and text.startswith(f"{root}: {way_out}") and not os.path.exists("runs")


# ---- the line for the eye
@pytest.mark.parametrize("epochs, per_epoch, days", [
    (200, 1_251, 12.5), (200, 1_251, 250), (800, 40_000, 99), (24, 62, 0.002), (1, 3, 1e-6), (100_000, 1, 1)])
@pytest.mark.parametrize("rank", [None, 1.234, 21.5, 384.0])
def test_line_of_the_log_fits_79_columns_eta_and_loss_first(epochs, per_epoch, days, rank):
    """At every size of run; the columns stay where they are from the first line to the last."""
    lines = []
    for done in (1, epochs * per_epoch // 2, epochs * per_epoch):
        left = days * 86_400 * (1 - done / (epochs * per_epoch))
        lines.append(train.as_line(dict(
            step=done, epoch=done / per_epoch, loss=11.0904 if done == 1 else 8.5, loss_per_log_k=1.0, entropy=10.5,
            kl=0.5, center=3.0, grad_norm=1e5, support=1.0, lr=1e-4, wd=0.04, momentum=0.996, images_per_s=12_345.6,
            memory_gib=70.1, eta_s=left, bad_files=0, rank=rank), epochs))
        assert len(lines[-1]) <= 79 and "\n" not in lines[-1]
        words = lines[-1].split()
        assert words[0] == "eta" and words.index("loss") < words.index("epoch") and f"/{epochs}" in lines[-1]
        assert ("rank" in words) == (rank is not None) and "support" in words
    places = [[line.index(name) for name in ("loss", "epoch", f"/{epochs}", "support")] for line in lines]
    assert places[0] == places[1] == places[2]


def test_a_line_of_the_log_is_what_it_was_measured_to_be():
    record = dict(epoch=3.456, loss=6.3554, support=0.2441, kl=0.4811, images_per_s=250.4, eta_s=3725.6)
    assert train.as_line(record, 24) == ("eta 1:02:06   loss  6.355  epoch  3.46/24  support 0.244  kl 0.481  "
                                         "250 img/s")
    assert train.as_line(record | dict(rank=12.345, eta_s=1e6), 24) == (
        "eta 11d 13h   loss  6.355  epoch  3.46/24  rank 12.3  support 0.244  kl 0.481")      # no room for img/s


def test_an_epoch_leaves_a_line_on_a_terminal(tmp_path, monkeypatch):
    """Of lines at steps 1, 3, 4 (end of the first epoch), 6, 9 and 12: those that are the first since an epoch ended.
    What is said begins on a line of its own, without an empty one."""
    monkeypatch.setattr(sys, "stdout", Terminal())
    run(tmp_path / "run", "--log-every", "3")
    screen = sys.stdout.screen()
    assert [line.split("epoch")[1].split()[0] for line in screen if "eta" in line] == ["1.00/3", "2.25/3", "3.00/3"]
    assert screen[-2].startswith("done: ") and screen[-1] == "" and all(screen[:-1])
    assert sys.stdout.getvalue().count("\033[K") == len(records(tmp_path / "run")) == 6


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """The lines that are seen: what stands before the last return to the beginning of a line is overwritten."""
        return [line.split("\r")[-1].removesuffix("\033[K") for line in self.getvalue().split("\n")]


# ---- one process says why
@pytest.mark.parametrize("flags, status, message", [
    ("--nope", 2, "unrecognized arguments: --nope"), ("--help", 0, "usage: "), ("--resume gone", "gone: holds no", ""),
    ("--data gone", "gone: no such folder", ""), ("--out RUN --lr 9", 2, "begun with other flags; go on with ")])
def test_other_processes_wait_until_torchrun_ends_them_and_speak_if_it_does_not(
        monkeypatch, capsys, uninterrupted, flags, status, message):
    def main():
        with pytest.raises(SystemExit) as stop:
            train.main([*LONG, *flags.replace("RUN", str(uninterrupted)).split()])
        return stop.value.code, "".join(capsys.readouterr())

    slept, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(train, "setup_distributed", lambda: (2, 1, torch.device("cpu")))
    for name, value in dict(RANK="2", WORLD_SIZE="4", LOCAL_RANK="0", MASTER_ADDR="node0", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    code, text = main()                                             # the first process of the second machine
    assert not slept and message in text and str(status) in str(code)
    assert bool(text) == isinstance(status, int)                    # a str is what Python prints at the end
    monkeypatch.setenv("RANK", "3"), monkeypatch.setenv("LOCAL_RANK", "1")
    try:
        assert main() == ((code, text) if status else (0, "")) and slept == [5] * bool(status)
        monkeypatch.setattr(time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert not status or main() == (None, "")                   # as if nothing had failed here
        with pytest.raises(SystemExit) as stop, train.one_says_why([signal.SIGTERM]):
            sys.exit("wrong")
        assert stop.value.code is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_torchrun_reports_one_process():
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = subprocess.run([sys.executable, *launcher, SCRIPT, "--nope"], text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("train.py: error: unrecognized arguments: --nope") == done.stderr.count("usage: ") == 1
    assert "NO_OTHER_FAILURES" in done.stderr and done.stderr.count("exitcode  :") == 1


def test_memory_that_a_step_frees_is_kept_and_other_c_libraries_are_left_alone(monkeypatch):
    """In a fresh process: pages taken anew by one array of 8 MB after another."""
    script = ("import resource, sys, torch, train\nif sys.argv[1] == 'keep': train.keep_memory()\n"
              "def taken():\n    before = resource.getrusage(0).ru_minflt\n    for _ in range(20): torch.ones(2**21)\n"
              "    return resource.getrusage(0).ru_minflt - before\ntaken(); print(taken())")
    pages = {how: int(subprocess.run([sys.executable, "-c", script, how], cwd=Path(train.__file__).parent, text=True,
                                     capture_output=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}).stdout)
             for how in ("keep", "leave")}
    assert pages["keep"] < 100 and (sys.platform != "linux" or pages["leave"] > 1000)
    monkeypatch.setattr(train.ctypes, "CDLL", lambda _: types.SimpleNamespace())
    train.keep_memory()
