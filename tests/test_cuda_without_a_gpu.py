"""The CUDA path without a GPU: FakeTensors of a device "cuda:0" know shape, type and device, and no number.

What mixes devices or types raises, in the forward and in the backward pass, as on a card; what would make the host wait
for the device is counted. Numbers are made up where one is read: these tests say nothing about results.
"""
import collections
import contextlib
import dataclasses
import json
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import data
import dino
import entmax
import pib
import probe_depth
import probe_linear
import probe_seg
import train
import vit
from paper import figures
from shapes import Shapes

pytestmark = pytest.mark.skipif(not hasattr(torch._C, "_ensureCUDADeviceGuardSet"), reason="this torch ends the process"
                                " where a FakeTensor of a device is used and the device is not there")
ROOT = Path(train.__file__).parent
DEVICE = torch.device("cuda", 0)
READS = {"_local_scalar_dense", "item", "is_nonzero"}
WAITS = {*READS, "nonzero", "bincount", "multinomial", "repeat_interleave", "_linalg_check_errors"}
PRODUCTS = {"mm", "bmm", "addmm", "mv", "convolution", "linear", "matmul", "conv2d"}       # by a card, of one type
NO_NUMBERS = {*READS, "nonzero", "index", "bincount"}               # what a FakeTensor cannot answer
TINY = ("--dim 32 --depth 1 --heads 2 --patch-size 8 --image-size 32 --local-size 16 --local-crops 2 --out-dim 64 "
        "--hidden-dim 32 --bottleneck-dim 16 --batch-size 8 --length 24 --epochs 2 --warmup-epochs 1").split()
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


def device_of(x):
    """x.device, which costs a FakeTensor a call of torch's Python."""
    return x.fake_device if isinstance(x, fake_tensor.FakeTensor) else x.device


class Watch(TorchDispatchMode):
    """What the operators that run say of the device: `waits`, where the host would stop until it has answered, as 'what
    at file:line'; `types`, {operator: types of floating-point inputs}, of those on the device."""

    def __init__(self):
        super().__init__()
        self.waits, self.types, self.answers = [], collections.defaultdict(set), {}

    def note(self, what):
        self.waits.append(f"{what} at {' < '.join(f'{name}:{line}' for name, line, _ in project_frames())}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        name, kwargs = func._schema.name.partition("::")[2], kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = any(device_of(x).type == "cuda" for x in tensors)
        indices = [x for x in args[1] if x is not None] if name in ("index", "index_put_", "_index_put_impl_") else []
        mask = any(x.dtype == torch.bool for x in indices)
        if on_device and (name in WAITS or mask or any(device_of(x).type == "cpu" for x in indices)):
            self.note(f"{name} of {'a mask' if mask else 'indices on the host' if indices else 'the device'}")
        if name in NO_NUMBERS and not any(isinstance(x, fake_tensor.FakeTensor) for x in tensors):       # of the data
            with fake_tensor.unset_fake_temporarily():
                return func(*args, **kwargs)
        if name in READS:
            x, answer = args[0], self.answers.get(next(project_frames(), [None])[-1], True)
            return answer if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 1
        if name == "nonzero" or name == "index" and mask:           # as if half of it were true
            x, (where, *_) = args[0], indices or args
            if device_of(where).type != device_of(x).type == "cpu":
                raise RuntimeError("a mask on cuda:0 of a tensor on the cpu")
            tail = x.shape[where.ndim:] if mask else [where.ndim]
            return x.new_empty(max(1, where.numel() // 2), *tail, dtype=x.dtype if mask else torch.int64)
        if name == "bincount":
            return args[0].new_empty(max(1, *args[2:], kwargs.get("minlength", 0)))
        floats = {x.dtype for x in tensors if x.is_floating_point()}
        if name in PRODUCTS and len(floats) > 1:                    # a FakeTensor would let it pass
            raise RuntimeError(f"{name} of {floats}")
        out = func(*args, **kwargs)
        if name in ("_to_copy", "to", "copy_"):
            here, there = (device_of(x).type for x in ((args[1], args[0]) if name == "copy_" else (args[0], out)))
            if here != there and not kwargs.get("non_blocking") and True not in args[2:]:
                self.note(f"{here} to {there}, blocking")
        elif on_device:
            self.types[name] |= floats
        return out


def project_frames():
    """(file, line, function) of the project's calls, innermost first."""
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.name != Path(__file__).name:
            yield path.name, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


@torch.no_grad()
def backward(loss):
    """loss.backward() by hand: torch's engine asks the driver for the device before it calls the nodes of the graph."""
    waiting, found = collections.Counter(), [loss.grad_fn]          # node: gradients that it has to wait for
    for node in found:
        for below, _ in node.next_functions:
            if below is not None:
                found += [below] * (not waiting[below])
                waiting[below] += 1
    given = collections.defaultdict(dict, {loss.grad_fn: {0: torch.ones_like(loss)}})      # {node: {input: gradient}}
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        inputs = [given[node].get(i) for i in range(len(node._input_metadata))]
        if hasattr(node, "variable"):                               # a leaf
            x, (g,) = node.variable, inputs
            x.grad = g.clone() if x.grad is None else x.grad + g
            continue
        outputs = (node if callable(node) else node.apply)(*inputs)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)        # of tensors, then of settings
        for (below, i), g in zip(node.next_functions, outputs, strict=False):
            if below is None:
                continue
            if g is not None:
                wanted = below._input_metadata[i]
                if g.device != wanted.device:
                    raise RuntimeError(f"{node.name()}: a gradient on {g.device}, wanted on {wanted.device}")
                g = g.sum_to_size(wanted.shape).to(wanted.dtype)
                given[below][i] = given[below][i] + g if i in given[below] else g
            waiting[below] -= 1
            if not waiting[below]:
                ready.append(below)


def convert(self, fn, recurse=True):
    """nn.Module._apply, which would write into the tensors, and a FakeTensor cannot change its device."""
    for module in self.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(fn(p.detach()), p.requires_grad)
        module._buffers.update({name: fn(x) for name, x in module._buffers.items() if x is not None})
    return self


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The device; what is yielded watches it."""
    monkeypatch.chdir(tmp_path)
    for name, answer in dict(is_available=True, is_bf16_supported=True, current_device=0, device_count=1,
                             get_device_capability=(9, 0),
                             get_device_name="a fake", max_memory_allocated=0).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda *_: None)
    monkeypatch.setattr(fake_tensor.FakeTensorMode, "avoid_device_init", property(lambda _: True))
    monkeypatch.setattr(fake_tensor.FakeTensor, "__format__", lambda x, spec: format(x.item(), spec))
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.nn.Module, "_apply", convert)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda x, **_: x)               # asks for numbers
    monkeypatch.setattr(torch.utils.data._utils.pin_memory, "pin_memory", lambda x, *_: x)
    monkeypatch.setattr(checkpoint, "check_bytes", lambda _: None)                      # skip_data writes none
    monkeypatch.setattr(entmax, "HAS_TRITON", True); monkeypatch.setattr(train, "HAS_TRITON", True)
    with (torch.serialization.skip_data(materialize_fake_tensors=True),             # files without numbers
          fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch):
        yield watch
    pib.crowds.cache_clear()                                        # or others would get scenes without numbers
    if "entmax_triton" in sys.modules:
        sys.modules["entmax_triton"].capability.cache_clear()


def crops_of(args):
    B, G, S, L = args.batch_size // args.accum, args.image_size, args.local_size, args.local_crops
    return [(torch.zeros(B, 2, 3, G, G, dtype=torch.uint8), torch.zeros(B, L, 3, S, S, dtype=torch.uint8),
             torch.zeros(B, 2 + L, 8)) for _ in range(args.accum)]


def train_one(run, step=0):
    """A training step, on black pictures."""
    args = run.args
    multicrop = data.MultiCrop(args.image_size, args.local_size, args.local_crops)
    return train.train_step(run, crops_of(args), multicrop, step, train.schedules(args, step, 10), step == 0)


# ---- what watches sees

def zero():
    return torch.zeros(3, device=DEVICE)


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.sum() > 0 or 1, lambda x: x.tolist(),
    lambda x: f"{x.max():.1f}", lambda x: x.nonzero(), lambda x: torch.where(x > 0), lambda x: x[x > 0],
    lambda x: x.__setitem__(x > 0, zero()[0]), lambda x: x.int().bincount(minlength=3),
    lambda x: x.cpu(), lambda x: x.copy_(torch.zeros(3)), lambda x: torch.tensor([1.0], device=DEVICE),
    lambda x: torch.zeros(3).to(DEVICE), lambda x: x[[0, 2]], lambda x: x[torch.tensor([0, 2])]])
def test_what_waits_is_seen(fake, wait):
    wait(zero())
    assert fake.waits


def test_what_does_not_wait_is_not(fake):
    x = zero()
    x[1:] = 2
    y = torch.where(x > 0, 1.0, x) * 2 + x.sum() + x[torch.ones(2, dtype=torch.int64, device=DEVICE)].mean()
    torch.zeros(3).to(DEVICE, non_blocking=True).copy_(torch.ones(3), non_blocking=True).add_(torch.tensor(1.0))
    assert fake.waits == [] and y.device == DEVICE


class Astray(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return torch.zeros(3)


@pytest.mark.parametrize("mix", [
    lambda x: x + torch.zeros(3), lambda x: torch.cat([x, torch.zeros(1)]), lambda x: torch.zeros(3)[x > 0],
    lambda x: x @ x.half(), lambda x: x.half()[None] @ x[:, None],
    lambda x: Astray.apply(x.requires_grad_()).sum().backward()])
def test_mixed_devices_and_types_are_seen(fake, mix):
    with pytest.raises(RuntimeError):
        mix(zero())


def test_faults_of_a_step_are_seen(fake, monkeypatch):
    run = train.Run(train.parse_args(TINY), DEVICE)
    fake.waits.clear()
    with monkeypatch.context() as patch:
        patch.setattr(dino, "clip_each", lambda *_, f=dino.clip_each: torch.tensor(f(*_).item(), device=DEVICE))
        train_one(run)
    assert [wait.partition(" at ")[0] for wait in fake.waits] == ["_local_scalar_dense of the device",
                                                                 "cpu to cuda, blocking"]
    assert all("train.py" in wait for wait in fake.waits)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "autocast", lambda *_: contextlib.nullcontext())
        fake.types.clear()
        train_one(run)
    assert fake.types["addmm"] == {torch.float32}
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="device"):
        patch.setattr(data, "luma", lambda x: x[:, :1] + torch.zeros(len(x), 1, 1, 1))
        train_one(run)


def test_gradients_by_hand_are_those_of_autograd():
    torch.manual_seed(0)
    model = vit.VisionTransformer(vit.ViTConfig(32, 8, 32, 2, 2, attn="entmax15", registers=2, specialize=True))
    x = torch.randn(2, 3, 32, 32)
    model(x).square().mean().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    backward(model(x).square().mean())
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


# ---- training

@pytest.mark.parametrize("flags", [
    "--attn softmax --amp bf16", "--attn softmax --amp fp16 --clip-grad 0 --accum 2", "--attn entmax15 --amp bf16",
    "--attn entmax15 --amp off", "--attn entmax15 --amp bf16 --no-fused",
    "--attn entmax15 --amp fp16 --registers 2 --specialize --accum 2 --depth 2 --drop-path 0.1 --norm-last-layer",
    "--attn entmax15 --amp bf16 --local-crops 0"])
def test_a_step_waits_for_nothing_and_computes_in_the_types_of_autocast(fake, flags):
    args = train.parse_args([*TINY, *flags.split()])
    run = train.Run(args, DEVICE)
    fake.waits.clear(); fake.types.clear()
    train_one(run, 1)
    assert fake.waits == []
    half = {HALF[args.amp]}
    for name in "convolution", "convolution_backward", "addmm", "mm":
        assert fake.types[name] == half, name
    for name in "_softmax", "logsumexp", "native_layer_norm", "_fused_adamw_", "_foreach_lerp_", "_foreach_norm":
        assert fake.types[name] == {torch.float32}, name
    if args.attn == "entmax15" and not args.no_fused:
        assert fake.types["attention"] == half and fake.types["attention_backward"] == half | {torch.float32}
    elif args.attn == "entmax15":
        assert fake.types["bmm"] == half | {torch.float32}          # scores; weights and values
    assert ("_amp_update_scale_" in fake.types) == (args.amp == "fp16")
    for p, state in run.optimizer.state.items():
        assert {(x.device, x.dtype) for x in (p, *state.values())} == {(DEVICE, torch.float32)}


def test_loop_waits_on_log_lines_and_before_saves_alone(fake, monkeypatch):
    """The whole of train.py, from pictures to checkpoints, and what a run that goes on does from there."""
    waits, pinned = {}, []

    def schedules(args, step, per_epoch, honest=train.schedules):
        waits[step + 1] = fake.waits = []
        return honest(args, step, per_epoch)

    monkeypatch.setattr(train, "schedules", schedules)
    monkeypatch.setattr(train, "check_kernel", lambda *_: None)     # of numbers
    monkeypatch.setattr(torch.utils.data._utils.pin_memory, "pin_memory", lambda x, *_: pinned.append(x) or x)
    fake.answers["check_finite"] = False
    flags = "--attn entmax15 --amp fp16 --length 32 --log-every 6 --save-steps 7 --out run".split()
    train.train(train.parse_args([*TINY, *flags]), 0, 1, DEVICE, [])
    assert [step for step, seen in waits.items() if seen] == [1, 4, 6, 7, 8]        # 4: the end of an epoch; 7: saved
    assert len(pinned) == 8
    records = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records[1:]] == [1, 4, 6, 8] and records[0]["device"] == "a fake"

    with fake_tensor.unset_fake_temporarily():                      # where there is no such device
        state = checkpoint.open_run("run")
        assert {x.device.type for x in tree_leaves(state) if isinstance(x, torch.Tensor)} == {"cpu"}
        assert state["step"] == 8


def begin(flags, device, folder):
    """args of a run whose checkpoint.pt, after a step, lies in `folder`."""
    args = train.parse_args([*TINY, *flags.split()])
    run = train.Run(args, device)
    train_one(run, 1)
    checkpoint.write_run(run, folder, 2, 0, numbered=False)
    return args


def assert_goes_on(fake, args, folder):
    run = train.Run(args, DEVICE)
    checkpoint.restore_run(run, checkpoint.open_run(folder), "")
    fake.waits.clear(); fake.types.clear()
    train_one(run, 2)
    assert fake.waits == [] and "_fused_adamw_" in fake.types
    assert len(run.optimizer.state) == sum(p.requires_grad for p in run.student.parameters())
    for p, state in run.optimizer.state.items():
        assert {(x.device, x.dtype) for x in (p, *state.values())} == {(DEVICE, torch.float32)}


@pytest.fixture(params=["--amp bf16", "--attn entmax15 --amp off --specialize"])
def begun_on_a_cpu(request, tmp_path):                              # before `fake`: its numbers are real
    return begin(request.param, torch.device("cpu"), tmp_path)


def test_a_run_of_a_cpu_goes_on_on_the_device(begun_on_a_cpu, fake, tmp_path):
    assert_goes_on(fake, begun_on_a_cpu, tmp_path)


@pytest.mark.parametrize("flags", ["--amp bf16 --registers 2", "--attn entmax15 --amp fp16"])
def test_a_run_of_the_device_goes_on_there(fake, tmp_path, flags):
    assert_goes_on(fake, begin(flags, DEVICE, tmp_path), tmp_path)


def test_compile_takes_the_colours_of_the_device_along(fake, monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "compile", lambda f: taken.append(f) or f)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _: None)
    monkeypatch.setattr(data, "JITTER", data.JITTER)
    with torch._dynamo.config.patch(specialize_float=False):        # monkeypatch would hide it for good
        train_one(train.Run(train.parse_args([*TINY, "--compile"]), DEVICE), 1)
        assert taken == [data.change_brightness, data.change_contrast, data.change_saturation, data.shift_hue]
        train.Run(train.parse_args([*TINY, "--compile"]), torch.device("cpu"))
    assert len(taken) == 4


def test_logits_are_gone_before_the_next_micro_batch(fake, monkeypatch):
    run, alive = train.Run(train.parse_args([*TINY, "--accum", "2"]), DEVICE), []

    def loss(*logits, honest=run.loss.forward):
        alive.extend(weakref.ref(x) for x in logits[:2])
        return honest(*logits)

    def photometric(*args, honest=data.MultiCrop.photometric):
        assert [reference() for reference in alive] == [None] * len(alive)
        return honest(*args)

    monkeypatch.setattr(run.loss, "forward", loss)
    monkeypatch.setattr(data.MultiCrop, "photometric", photometric)
    train_one(run, 1)
    assert len(alive) == 4


# ---- probes, PiB, figures

@pytest.fixture(params=[dict(attn="softmax"), dict(attn="entmax15", registers=2, specialize=True)])
def weights(request, tmp_path):                                     # before `fake`: its numbers are real
    """Path of a checkpoint with random weights."""
    config = vit.ViTConfig(32, 8, 32, 4, 2, **request.param)
    torch.save(dict(config=dataclasses.asdict(config), epoch=1, teacher=vit.VisionTransformer(config).state_dict()),
               tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.mark.parametrize("module, flags, amp", [
    (probe_linear, "--iters 2 --batch-size 8 --seeds 2", "fp16"), (probe_depth, "--iters 2", "fp16"), (pib, "", "off"),
    (probe_seg, "--iters 2 --concat-cls both --blocks 1 -1", "bf16")])
def test_a_probe_runs_on_the_device_from_weights_to_result(weights, fake, monkeypatch, module, flags, amp):
    monkeypatch.setattr(module, "Shapes", lambda split, size, n=8, cards=1: Shapes(split, size, 8, cards))
    module.main(["--weights", str(weights), *flags.split(), "--amp", amp, "--out", "result.json"])
    result, half = json.loads(Path("result.json").read_text()), HALF[amp]
    assert result["metrics"]
    for name, under_inference_mode in ("convolution", "conv2d"), ("addmm", "linear"):
        types = fake.types[name] | fake.types[under_inference_mode]
        assert half in types and types <= {half, torch.float32}     # heads are float32
    if result["config"]["attn"] == "entmax15":
        assert fake.types["attention"] == {half}


def test_figures_look_on_the_device(weights, fake, monkeypatch):
    monkeypatch.setattr(fake_tensor.FakeTensor, "numpy", lambda x: np.zeros(x.shape))
    model, image = checkpoint.load_backbone(weights, device="cuda"), torch.zeros(3, 32, 48, dtype=torch.uint8)
    assert figures.look(lambda m, x: m.features(x, [-1])[0].patches, model, image, "").shape == (4, 6, 32)
    T = 1 + model.config.registers + 24
    assert figures.look(lambda m, x: m.attention(x)[:, :, 0], model, image, "").shape == (2, T)
