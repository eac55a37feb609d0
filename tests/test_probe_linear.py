import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint as disk
import probe_linear
import shapes
import vit
from probe_linear import knn

CONFIG = vit.ViTConfig(image_size=32, patch_size=8, dim=24, depth=2, heads=2, attn="entmax15", registers=2)
KEYS = {"probe", "data", "root", "weights", "weights_sha256", "which", "run_seed", "recipe", "config", "epochs", "seed",
        "metrics", "protocol"}


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(path, seed=7, epoch=3):
    """A checkpoint with the keys that a probe reads; teacher and student differ."""
    networks, args = {}, dict(seed=seed, images=9, fingerprint="ab")
    for which in ("teacher", "student"):
        torch.manual_seed(seed)
        networks[which] = vit.VisionTransformer(CONFIG).state_dict()
        seed += 100
    torch.save(dict(config=dataclasses.asdict(CONFIG), **networks, epoch=epoch, args=args), path)
    return str(path)


@pytest.fixture
def checkpoint(tmp_path):
    return save(tmp_path / "tiny.pt")


@pytest.fixture
def few_scenes(monkeypatch):
    """80 train and 40 val scenes in place of 2,000 and 1,000."""
    monkeypatch.setattr(probe_linear, "Shapes", lambda split, size, length: shapes.Shapes(split, size, length // 25))


def options(*argv, knn=False):
    return probe_linear.parse_args([*["--knn"] * knn, *map(str, argv)])


def draw(root, classes=(("blue", 4, 2), ("green", 4, 3), ("red", 4, 2)), noise=80):
    """root/{train,val}/<class>/*.png: noise over a colour, of odd sizes."""
    rng = np.random.default_rng(0)
    for c, (name, train, val) in enumerate(classes):
        for split, n in (("train", train), ("val", val)):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, noise, (40 + 3 * i, 50 - i, 3))
                pixels[..., (2 - c) % 3] += 255 - noise
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def result(capsys, file):
    """The result file, which is also the last line of stdout."""
    text = Path(file).read_text()
    assert text == capsys.readouterr().out.splitlines()[-1] + "\n"
    return json.loads(text)


def exits(capsys, *argv):
    """(exit status, the line that says why); a str code is what sys.exit prints before status 1."""
    with pytest.raises(SystemExit) as stop:
        probe_linear.main([*map(str, argv)])
    code = stop.value.code
    return (1, code) if isinstance(code, str) else (code, capsys.readouterr().err.splitlines()[-1])


# ---- the vote -------------------------------------------------------------------------------------------------------

def unit(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def classes_of(n, classes, seed=5):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def knn_by_hand(bank, bank_labels, queries, labels, classes, k):
    """Percent right: sort all pairs, add exp(s / 0.07) of the k nearest to their class; float64, plain loops."""
    bank, right = bank.double().tolist(), 0
    for query, label in zip(queries.double().tolist(), labels.tolist(), strict=True):
        similar = [(sum(a * b for a, b in zip(query, row, strict=True)), y)
                   for row, y in zip(bank, bank_labels.tolist(), strict=True)]
        votes = [0.0] * classes
        for s, y in sorted(similar, reverse=True)[:k]:
            votes[y] += math.exp(s / 0.07)
        right += max(range(classes), key=votes.__getitem__) == label
    return 100 * right / len(labels)


NEIGHBOURS = (1, 3, 10, 60, 500)                                    # 500 > the bank: all of it


@pytest.fixture(scope="module")
def crowd():
    """Class means with as much noise: top-1 between chance and 100, and another at every k."""
    means = unit(6, 4, seed=9)
    y, z = classes_of(150, 6), classes_of(120, 6, seed=6)
    bank, queries = means[y] + unit(150, 4), means[z] + unit(120, 4, seed=1)
    return bank / bank.norm(dim=1, keepdim=True), y, queries / queries.norm(dim=1, keepdim=True), z, 6


def test_knn_equals_the_vote_by_hand(crowd):
    expected = {k: knn_by_hand(*crowd, k) for k in NEIGHBOURS}
    assert len(set(expected.values())) >= 4                         # the test can tell one k from another
    assert knn(*crowd, neighbours=NEIGHBOURS) == pytest.approx(expected)


def test_votes_are_weighted():
    """A neighbour at similarity 1 outvotes two at 0.9: e^(0.1 / 0.07) = 4.2; not five at 0.95: e^(0.05 / 0.07) = 2."""
    def at(s):
        return torch.tensor([s, math.sqrt(1 - s * s)])

    query, label = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    two = torch.stack([at(1.0), at(0.9), at(0.9)])
    five = torch.stack([at(1.0), *[at(0.95)] * 5])
    assert knn(two, torch.tensor([0, 1, 1]), query, label, 2, (3,)) == {3: 100}
    assert knn(five, torch.tensor([0, 1, 1, 1, 1, 1]), query, label, 2, (6,)) == {6: 0}


@pytest.mark.parametrize("chunk", [7, 1000])
def test_chunks_change_nothing(crowd, chunk):
    assert knn(*crowd, neighbours=NEIGHBOURS, chunk=chunk) == knn(*crowd, neighbours=NEIGHBOURS)


def test_separated_classes_are_all_found_and_shuffled_labels_are_chance():
    y, z = torch.arange(1000) % 10, torch.arange(500) % 10
    means = torch.eye(10, 16)
    bank, queries = means[y] + 0.05 * unit(1000, 16), means[z] + 0.05 * unit(500, 16, seed=1)
    assert set(knn(bank, y, queries, z, 10).values()) == {100.0}
    shuffled = y[torch.randperm(1000, generator=torch.Generator().manual_seed(2))]
    for top1 in knn(bank, shuffled, queries, z, 10).values():       # a cluster votes as one: ten draws, 0.1 each
        assert top1 <= 40


def test_independent_features_are_chance():
    y, z = classes_of(2000, 10), classes_of(2000, 10, seed=6)
    top1 = knn(unit(2000, 16), y, unit(2000, 16, seed=1), z, 10)
    assert all(10 - 4 * 0.67 <= value <= 10 + 4 * 0.67 for value in top1.values())      # four standard errors


def test_lengths_change_nothing():
    """exp(s / 0.07) is of a cosine: a query of another length changes no rank, but how much the nearest count."""
    bank, y, queries, z = unit(150, 4), classes_of(150, 6), unit(120, 4, seed=1), classes_of(120, 6, seed=6)
    lengths = torch.rand(150, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    expected = knn(bank, y, queries, z, 6, neighbours=NEIGHBOURS)
    assert knn(bank * lengths, y, 0.1 * queries, z, 6, neighbours=NEIGHBOURS) == expected


# ---- end to end -----------------------------------------------------------------------------------------------------

def features_by_hand(model, root, split):
    """Resize the short side to 37 = 32 * 256/224, cut the centre, normalise, [CLS]; one picture at a time."""
    features, labels = [], []
    for label, folder in enumerate(sorted((root / split).iterdir())):
        for path in sorted(folder.iterdir()):
            image = Image.open(path)
            w, h = image.size
            short = min(w, h)
            image = image.resize((int(37 * w / short), int(37 * h / short)), Image.Resampling.BICUBIC)
            left, top = round((image.width - 32) / 2), round((image.height - 32) / 2)
            x = np.asarray(image.crop((left, top, left + 32, top + 32)), np.float32) / 255
            x = (x - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
            cls = model(torch.from_numpy(x).permute(2, 0, 1)[None])[0]
            features.append(cls / cls.norm())
            labels.append(label)
    return torch.stack(features), torch.tensor(labels)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_folder_end_to_end(tmp_path, checkpoint, capsys, which):
    root = draw(tmp_path / "pictures")
    probe_linear.main(["--knn", "--weights", checkpoint, "--which", which, "--data", "folder", "--root", str(root),
                       "--workers", "0", "--batch-size", "5"])
    r = result(capsys, tmp_path / "tiny.knn.folder.json")           # beside the weights
    model = disk.load_backbone(checkpoint, which)
    bank, queries = features_by_hand(model, root, "train"), features_by_hand(model, root, "val")
    expected = {k: knn_by_hand(*bank, *queries, 3, k) for k in (10, 20, 100, 200)}
    assert set(r) == KEYS
    assert r["metrics"] == pytest.approx(
        {"top1": expected[20], **{f"top1_k{k}": value for k, value in expected.items()}, "top1_constant": 300 / 7})
    assert (r["probe"], r["data"], r["weights"], r["which"], r["epochs"], r["run_seed"], r["seed"]) == (
        "knn", "folder", checkpoint, which, 3, 7, 0)
    assert r["weights_sha256"] == hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
    assert r["config"] == dataclasses.asdict(CONFIG)
    assert (r["protocol"]["train"], r["protocol"]["val"], r["protocol"]["classes"]) == (12, 7, 3)
    assert r["protocol"]["temperature"] == 0.07 and r["protocol"]["size"] == 32


def test_features_equal_the_extraction_by_hand(tmp_path, checkpoint):
    root = draw(tmp_path / "pictures")
    model = disk.load_backbone(checkpoint)
    args = options("--weights", checkpoint, "--data", "folder", "--root", root, "--workers", "1", "--batch-size", "5")
    train, val, *_ = probe_linear.open_data(args, 32)
    for images, split in ((train, "train"), (val, "val")):
        ours = probe_linear.extract(model, images, args, torch.device("cpu"))
        by_hand = features_by_hand(model, root, split)
        ours_unit = ours[0] / ours[0].norm(dim=1, keepdim=True)
        torch.testing.assert_close(ours_unit, by_hand[0], rtol=0, atol=2e-3)    # Pillow's resize rounds to 8 bits
        assert torch.equal(ours[1], by_hand[1])


def test_shapes_end_to_end(few_scenes, checkpoint, capsys, tmp_path):
    probe_linear.main(["--knn", "--weights", checkpoint, "--out", "here/result.json", "--workers", "0"])
    r = result(capsys, tmp_path / "here/result.json")
    assert set(r) == KEYS and r["data"] == "shapes" and r["protocol"]["classes"] == 10
    model, sets = disk.load_backbone(checkpoint), []
    for split, n in (("train", 80), ("val", 40)):
        scenes = shapes.Shapes(split, 32, n)
        cls = torch.cat([model(vit.normalize(scenes[i]["image"])[None]) for i in range(n)])
        sets += [cls / cls.norm(dim=1, keepdim=True), torch.tensor([scenes[i]["label"] for i in range(n)])]
    assert r["metrics"]["top1"] == pytest.approx(knn_by_hand(*sets, 10, 20))


def test_shapes_default_to_two_thousand_and_one_thousand():
    train, val, *rest = probe_linear.open_data(options("--weights", "random"), 32)
    assert (len(train), len(val), *rest) == (2000, 1000, shapes.CLASSES, shapes.FINGERPRINT)


def test_random_takes_the_architecture_and_is_a_function_of_the_seed(few_scenes, checkpoint, capsys, tmp_path):
    models = {}
    for seed in "0", "1":
        (models[seed], facts), (again, _) = (
            disk.open_weights("random", like=checkpoint, seed=int(seed)) for _ in range(2))
        assert models[seed].config == CONFIG and not models[seed].training
        assert facts == dict(weights="random", weights_sha256=None, which=None, epochs=0, run_seed=int(seed),
                             recipe=None)
        assert all(torch.equal(a, b) for a, b in zip(models[seed].parameters(), again.parameters(), strict=True))
    assert not torch.equal(models["0"].pos_embed, models["1"].pos_embed)
    assert not torch.equal(models["1"].pos_embed, disk.load_backbone(checkpoint).pos_embed)

    probe_linear.main(["--knn", "--weights", "random", "--like", checkpoint, "--seed", "4", "--workers", "0"])
    r = result(capsys, tmp_path / "runs/random/knn.shapes.entmax15_r2.s4.json")
    assert set(r) == KEYS and r["seed"] == r["run_seed"] == 4 and r["config"] == dataclasses.asdict(CONFIG)


def test_run_folder_stands_for_its_numbered_checkpoints(few_scenes, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for seed, epoch in enumerate((0, 5, 10)):
        save(run / f"checkpoint_{epoch:04d}.pt", seed, epoch)
    save(run / "checkpoint.pt", 2, 10)
    probe_linear.main(["--knn", "--weights", str(run), "--workers", "0"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(r["epochs"], r["run_seed"]) for r in lines] == [(0, 0), (5, 1), (10, 2)]
    files = [run / f"checkpoint_{epoch:04d}.knn.shapes.json" for epoch in (0, 5, 10)]
    assert [json.loads(file.read_text()) for file in files] == lines


# ---- the linear probe -----------------------------------------------------------------------------------------------

def cloud(n, dim, classes, noise, seed=0):
    """(features (n, dim), labels): class means with noise."""
    y = classes_of(n, classes, seed)
    return torch.eye(classes, dim)[y] + noise * unit(n, dim, seed=seed), y


def train(images, tmp_path, *argv, classes=5, stamp=None, name="x.head.pt"):
    """Heads on given features (N, D) and labels, from 8 images an iteration on unless told."""
    args = options("--weights", "random", "--batch-size", 8, "--iters", 12, "--save-every", 4, *argv)
    model = argparse.Namespace(config=argparse.Namespace(dim=images[0].shape[1]))
    return probe_linear.train_heads(model, images, classes, args, torch.device("cpu"), tmp_path / name,
                                    stamp or dict(iters=args.iters))


def test_heads_equal_separate_torch_classifiers(tmp_path):
    """Each of the 2 x 13 against nn.Linear with its own SGD and CosineAnnealingLR on the same batches."""
    x, y = cloud(40, 6, 5, 1.0)
    heads = train((x, y), tmp_path, "--seeds", 2, "--seed", 3, "--batch-size", 64)     # effective rate = rate / 4
    args = options("--weights", "random", "--seed", 3, "--batch-size", 64, "--iters", 12)
    draws = list(probe_linear.BatchOrder(40, args, 0))
    for s, seed in enumerate((3, 4)):
        start = 0.01 * torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(seed))[0]
        for r, rate in enumerate(probe_linear.RATES):
            layer = torch.nn.Linear(6, 5)
            layer.weight.data.copy_(start), layer.bias.data.zero_()
            sgd = torch.optim.SGD(layer.parameters(), lr=rate / 4, momentum=0.9)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 12)
            for keys in draws:
                i = torch.tensor([i for _, i in keys])
                sgd.zero_grad()
                torch.nn.functional.cross_entropy(layer(x[i]), y[i]).backward()
                sgd.step(), cosine.step()
            torch.testing.assert_close(heads.weight[s, r], layer.weight, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(heads.bias[s, r], layer.bias, rtol=1e-5, atol=1e-7)
    assert len(set(heads.weight[0, :, 0, 0].tolist())) == 13


def test_a_head_does_not_depend_on_the_others():
    together = probe_linear.Heads(6, 5, range(2, 5)).weight
    for s, seed in enumerate((2, 3, 4)):
        assert torch.equal(together[s], probe_linear.Heads(6, 5, [seed]).weight[0])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("micro", [1, 5, 7])
def test_micro_batches_change_nothing_but_rounding(tmp_path, micro):
    images = cloud(40, 6, 5, 1.0)
    whole = train(images, tmp_path, "--batch-size", 12, name="a.head.pt")
    parts = train(images, tmp_path, "--batch-size", 12, "--micro-batch", micro, name="b.head.pt")
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-5, atol=1e-7)


def best_top1(heads, x, y):
    return max(100 * (heads.predict(x)[:, 0, rate] == y).double().mean().item() for rate in range(13))


def test_planted_features_reach_a_hundred_percent_and_shuffled_labels_chance(tmp_path):
    x, y = cloud(500, 16, 5, 0.3)
    test_x, test_y = cloud(1000, 16, 5, 0.3, seed=1)
    flags = "--iters", 400, "--batch-size", 256
    assert best_top1(train((x, y), tmp_path, *flags), test_x, test_y) == 100
    shuffled = y[torch.randperm(500, generator=torch.Generator().manual_seed(3))]
    heads = train((unit(500, 16), shuffled), tmp_path, *flags, name="b.head.pt")
    assert 14 < best_top1(heads, unit(1000, 16, seed=1), test_y) < 26                   # 13 draws of 20 +- 1.3


def test_a_head_that_diverged_is_never_right(tmp_path):
    heads = train(cloud(40, 6, 5, 1.0), tmp_path)
    heads.weight.data[0, 12, 3, 0] = math.nan
    classes = heads.predict(unit(9, 6))
    assert (classes[:, 0, 12] == -1).all() and (classes[:, 0, :12] >= 0).all()


def test_draws_shuffle_every_epoch_and_can_start_anywhere():
    args = options("--weights", "random", "--batch-size", 10, "--micro-batch", 4, "--iters", 9)
    batches = list(probe_linear.BatchOrder(30, args, 0))
    assert [len(b) for b in batches] == [4, 4, 2] * 9
    keys = [key for b in batches for key in b]
    for epoch in range(3):
        part = keys[30 * epoch:30 * epoch + 30]
        assert sorted(part) == [(epoch, i) for i in range(30)]
    assert len({tuple(i for _, i in keys[30 * e:30 * e + 30]) for e in range(3)}) == 3
    assert list(probe_linear.BatchOrder(30, args, 4)) == batches[12:]
    other = list(probe_linear.BatchOrder(30, options("--weights", "random", "--batch-size", 10, "--seed", 1), 0))
    assert other[0][:4] != batches[0]
    few = sum(probe_linear.BatchOrder(4, args, 0), [])              # fewer than a batch
    assert [epoch for epoch, _ in few][:10] == [0] * 4 + [1] * 4 + [2] * 2


def test_crops_are_random_resized_flipped_half_the_time_and_a_function_of_the_key(tmp_path):
    """On a picture whose red is x and green is y, a crop tells where it lay."""
    x, y = np.meshgrid(np.arange(200), np.arange(200))
    (tmp_path / "a").mkdir()
    Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(tmp_path / "a/0.png")
    images = argparse.Namespace(samples=[(str(tmp_path / "a/0.png"), 7)])
    crops = probe_linear.TrainCrops(images, 16, seed=0)
    areas, ratios, flips = [], [], 0
    for epoch in range(300):
        crop, label = crops[epoch, 0]["image"], crops[epoch, 0]["label"]
        assert label == 7 and crop.shape == (3, 16, 16) and crop.dtype == torch.uint8
        red, green = crop[0].double().mean(0), crop[1].double().mean(1)
        width, height = abs(red[-1] - red[0]) * 16 / 15, (green[-1] - green[0]) * 16 / 15
        flips += int(red[-1] < red[0])
        areas.append(width * height / 200**2), ratios.append(width / height)
    assert 0.07 < min(areas) < 0.12 and 0.85 < max(areas) < 1.03 and 0.45 < np.mean(areas) < 0.6
    assert 0.68 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.45
    assert 150 - 35 < flips < 150 + 35                              # four standard deviations
    state = torch.random.get_rng_state()
    assert torch.equal(crops[5, 0]["image"], crops[5, 0]["image"])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(crops[5, 0]["image"], probe_linear.TrainCrops(images, 16, seed=1)[5, 0]["image"])


class Killed(BaseException):
    pass


def killed_after(saves, monkeypatch):
    """From now on the save after so many raises Killed, when it has written."""
    write, left = disk.write_checkpoint, [saves]

    def kill(path, content):
        write(path, content)
        left[0] -= 1
        if not left[0]:
            raise Killed

    monkeypatch.setattr(disk, "write_checkpoint", kill)


@pytest.mark.parametrize("data, iters, batch", [
    ("imagenet", 12_500, 1024), ("folder", 12_500, 1024), ("shapes", 1000, 256)])
def test_the_recipe_is_what_the_loop_does(tmp_path, data, iters, batch):
    """Two iterations from the middle of the schedule against 13 classifiers by hand, with the numbers of DINOv2."""
    args = options("--weights", "random", "--save-every", 2, "--data", data, *["--root", "x"] * (data != "shapes"))
    (x, y), start = cloud(3000, 2, 2, 1.0), iters // 2
    model, file = argparse.Namespace(config=argparse.Namespace(dim=2)), tmp_path / "x.head.pt"
    heads = probe_linear.Heads(2, 2, [0])
    sgd = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    sum(p.sum() for p in heads.parameters()).backward(); sgd.step()     # a momentum of 1 everywhere
    disk.write_checkpoint(file, dict(iteration=start, stamp=dict(iters=iters), history=[], heads=heads.state_dict(),
                                     optimizer=sgd.state_dict()))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_after(1, patch)
        probe_linear.train_heads(model, (x, y), 2, args, torch.device("cpu"), file, dict(iters=iters))
    saved = torch.load(file, weights_only=True)
    assert saved["iteration"] == start + 2

    drawn = list(itertools.islice(probe_linear.BatchOrder(3000, args, start), 2 * batch // 256))
    assert [len(keys) for keys in drawn] == [256] * (2 * batch // 256)
    rates = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
    assert saved["heads"]["weight"].shape == (1, 13, 2, 2)
    for r, rate in enumerate(rates):
        w, b = heads.weight[0, r].detach().double(), heads.bias[0, r].detach().double()
        vw, vb = torch.ones_like(w), torch.ones_like(b)
        for t in range(2):
            i = torch.tensor([i for keys in drawn[t * batch // 256:(t + 1) * batch // 256] for _, i in keys])
            assert len(i) == batch
            slope = (x[i].double() @ w.T + b).softmax(1) - torch.nn.functional.one_hot(y[i], 2)
            effective = rate * batch / 256
            vw, vb = 0.9 * vw + effective * slope.T @ x[i].double() / batch, 0.9 * vb + effective * slope.mean(0)
            cosine = 0.5 * (1 + math.cos(math.pi * (start + t) / iters))
            w, b = w - cosine * vw, b - cosine * vb
        torch.testing.assert_close(saved["heads"]["weight"][0, r].double(), w, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(saved["heads"]["bias"][0, r].double(), b, rtol=1e-5, atol=1e-6)


def losses_seen(monkeypatch):
    """[(S, L) losses of every micro-batch, images in it], from now on."""
    seen, losses = [], probe_linear.Heads.losses

    def listen(self, x, labels):
        value = losses(self, x, labels)
        seen.append((value.detach().double(), len(labels)))
        return value

    monkeypatch.setattr(probe_linear.Heads, "losses", listen)
    return seen


def test_logged_loss_is_the_mean_since_the_last_line_and_eta_what_is_left(tmp_path, monkeypatch, capsys):
    """A run of 25 iterations, ten to a line, ended after the 14th; the clock shows ten seconds an iteration. Lines
    after the first and the tenth iteration of each part, too."""
    seen = losses_seen(monkeypatch)
    monkeypatch.setattr(probe_linear.time, "perf_counter", lambda: 10 * (len(seen) // 2) + 1000)
    flags = "--iters", 25, "--log-every", 10, "--save-every", 14, "--micro-batch", 6, "--seeds", 2
    images = cloud(40, 6, 5, 1.0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_after(1, patch)
        train(images, tmp_path, *flags)
    assert len(seen) == 28
    train(images, tmp_path, *flags)
    each = [sum(value * n / 8 for value, n in seen[2 * t:2 * t + 2]).mean(0) for t in range(25)]     # (L,)
    expected = [(1, each[:1], 240), (10, each[1:10], 150), (15, each[14:15], 100), (20, each[15:20], 50),
                (24, each[20:24], 10), (25, each[24:], 0)]
    lines = re.findall(r"eta ([\d:]+) +loss of the best rate ([\d.]+)  iteration (\d+)/25", capsys.readouterr().out)
    assert len(lines) == 6
    for (eta, loss, at), (iteration, losses, left) in zip(lines, expected, strict=True):
        assert int(at) == iteration and eta == f"0:{left // 60:02}:{left % 60:02}"
        assert float(loss) == pytest.approx(torch.stack(losses).mean(0).min().item(), abs=5.1e-5)
    assert len({loss for _, loss, _ in lines}) == 6


def test_every_head_seed_has_its_best_rate_and_the_ends_of_the_grid_are_named(capsys):
    labels = torch.tensor([0, 0, 0, 1])
    predicted = torch.full((4, 3, 13), -1)

    def hits(seed, rate, n):
        predicted[:n, seed, rate] = labels[:n]

    hits(0, 3, 2), hits(1, 9, 3), hits(1, 12, 2), hits(2, 5, 1), hits(2, 0, 1)
    heads, args = argparse.Namespace(predict=lambda features: predicted), options("--weights", "random", "--seeds", 3)
    metrics = probe_linear.grid_metrics(heads, None, labels, args)
    assert metrics["top1_seeds"] == [50, 75, 25] and metrics["top1"] == 50
    assert "end of the grid" not in capsys.readouterr().out
    hits(1, 12, 4), hits(2, 0, 2)
    assert probe_linear.grid_metrics(heads, None, labels, args)["top1_seeds"] == [50, 100, 50]
    assert "best rate at an end of the grid, for 2 of 3 head seeds" in capsys.readouterr().out


LINEAR = "--iters 6 --batch-size 8 --micro-batch 3 --seeds 2 --save-every 2 --workers 0".split()


def test_linear_end_to_end(tmp_path, checkpoint, capsys):
    root = draw(tmp_path / "pictures")
    before = Path(checkpoint).read_bytes()
    probe_linear.main(["--weights", checkpoint, "--data", "folder", "--root", str(root), *LINEAR, "--save-images", "5"])
    lines = capsys.readouterr().out.splitlines()
    nearest, linear = (json.loads(line) for line in lines if line.startswith("{"))
    assert lines[-1].startswith("{") and set(linear) == KEYS
    assert (linear["probe"], nearest["probe"]) == ("linear", "knn")
    assert json.loads((tmp_path / "tiny.linear.folder.json").read_text()) == linear
    assert json.loads((tmp_path / "tiny.knn.folder.json").read_text()) == nearest
    grid = linear["metrics"]["grid"]
    assert [row["lr"] for row in grid] == list(probe_linear.RATES)
    assert [row["effective"] for row in grid] == pytest.approx([rate / 32 for rate in probe_linear.RATES])

    model = disk.load_backbone(checkpoint)                           # top-1 of the saved heads, one picture at a time
    heads = torch.load(tmp_path / "tiny.linear.folder.head.pt", weights_only=True)["heads"]
    right = torch.zeros(2, 13)
    _, val, *_ = probe_linear.open_data(options("--weights", "random", "--data", "folder", "--root", root), 32)
    for image, label in map(dict.values, val):
        cls = model(vit.normalize(image)[None])[0]
        for s in range(2):
            for r in range(13):
                right[s, r] += (heads["weight"][s, r] @ cls + heads["bias"][s, r]).argmax() == label
    top1 = 100 * right.double() / len(val)
    assert [row["top1"] for row in grid] == [pytest.approx(column) for column in top1.T.tolist()]
    best = top1.max(1).values.tolist()
    assert linear["metrics"]["top1_seeds"] == pytest.approx(best)
    assert linear["metrics"]["top1"] == pytest.approx(sum(best) / 2)
    assert linear["metrics"]["top1_sd"] == pytest.approx(abs(best[0] - best[1]) / math.sqrt(2))
    assert linear["protocol"]["iters"] == 6 and linear["protocol"]["batch_size"] == 8
    assert linear["metrics"]["top1_constant"] == nearest["metrics"]["top1_constant"] == pytest.approx(300 / 7)
    assert sum("chance 33.3 %, always the most frequent class 42.9 %" in line for line in lines) == 2
    assert_drawn(tmp_path, model, heads, val, grid)
    assert Path(checkpoint).read_bytes() == before


def assert_drawn(tmp_path, model, heads, val, grid):
    """The sheet shows five of the seven val pictures, and red text below those that the best rate of seed 0 gets wrong.
    """
    sheet, wrong = Image.open(tmp_path / "tiny.linear.folder.png"), []
    assert sheet.size == (5 * 144, 178)
    rate = max(range(13), key=lambda r: grid[r]["top1"][0])
    for i, at in enumerate((0, 2, 3, 4, 6)):
        image, label = val[at]["image"], val[at]["label"]
        tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((140, 140), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(sheet.crop((144 * i + 2, 0, 144 * i + 142, 140))), np.asarray(tile))
        cls = model(vit.normalize(image)[None])[0]
        guess = (heads["weight"][0, rate] @ cls + heads["bias"][0, rate]).argmax().item()
        text = np.asarray(sheet.crop((144 * i, 142, 144 * i + 144, 178))).astype(int)
        wrong.append((guess != label, bool((text[..., 0] - text[..., 1] > 100).any())))
    assert all(a == b for a, b in wrong)


def test_pictures_of_a_finished_probe_are_drawn_from_its_heads(tmp_path, checkpoint, capsys):
    root = draw(tmp_path / "pictures")
    flags = ["--weights", checkpoint, "--data", "folder", "--root", str(root), *LINEAR]
    probe_linear.main([*flags, "--save-images", "5", "--out", "whole.json"])
    probe_linear.main([*flags, "--out", "parts.json"])
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", None)                # whatever would train, fails
        probe_linear.main([*flags, "--out", "parts.json", "--save-images", "5"])
    assert "going on" not in capsys.readouterr().out
    assert Path("parts.png").read_bytes() == Path("whole.png").read_bytes()
    assert Path("parts.json").read_bytes() == Path("whole.json").read_bytes()


def test_out_names_the_linear_result_and_knn_lies_beside_it(few_scenes, checkpoint, capsys, tmp_path):
    probe_linear.main(["--weights", checkpoint, *LINEAR, "--out", "here/x.json"])
    assert result(capsys, tmp_path / "here/x.json")["probe"] == "linear"
    assert json.loads((tmp_path / "here/x.knn.json").read_text())["probe"] == "knn"


@pytest.mark.parametrize("data", ["shapes", "folder"])
def test_resumed_is_bit_equal_and_finished_is_not_trained_again(few_scenes, checkpoint, capsys, tmp_path, data):
    root = draw(tmp_path / "pictures")
    flags = ["--weights", checkpoint, "--data", data, *LINEAR] + ["--root", str(root)] * (data == "folder")
    probe_linear.main([*flags, "--out", "whole.json"])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_after(2, patch)
        probe_linear.main([*flags, "--out", "parts.json"])
    assert not Path("parts.json").exists() and torch.load("parts.head.pt", weights_only=True)["iteration"] == 4
    probe_linear.main([*flags, "--out", "parts.json", "--workers", "1"])
    assert "going on from iteration 4" in capsys.readouterr().out
    whole, parts = (torch.load(name, weights_only=True) for name in ("whole.head.pt", "parts.head.pt"))
    assert all(torch.equal(whole["heads"][key], parts["heads"][key]) for key in whole["heads"])
    assert Path("whole.json").read_text() == Path("parts.json").read_text()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", None)                # whatever would train, fails
        Path("parts.json").unlink()
        probe_linear.main([*flags, "--out", "parts.json"])
        assert "going on" not in capsys.readouterr().out
        patch.setattr(vit.VisionTransformer, "forward", None)       # and whatever would look at a picture
        probe_linear.main([*flags, "--out", "parts.json"])
    assert Path("whole.json").read_text() == Path("parts.json").read_text()
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0] == "finished before: result read from parts.knn.json" and json.loads(lines[1])["probe"] == "knn"
    assert lines[2] == "finished before: result read from parts.json" and json.loads(lines[3])["probe"] == "linear"


@pytest.mark.parametrize("number, at, workers", [(signal.SIGTERM, 3, 0), (signal.SIGINT, 6, 0), (signal.SIGTERM, 5, 1)])
def test_asked_to_end_it_saves_and_goes_on_to_the_same_bits(tmp_path, checkpoint, capsys, number, at, workers):
    """In an iteration that ends with no save of its own, in the last one, and with a loader process."""
    root = draw(tmp_path / "pictures")
    flags = ["--weights", checkpoint, "--data", "folder", "--root", str(root), *LINEAR, "--save-every", "100"]
    flags += ["--workers", str(workers)]
    probe_linear.main([*flags, "--out", "whole.json"])
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        seen = losses_seen(patch)
        step = torch.optim.SGD.step
        patch.setattr(torch.optim.SGD, "step", lambda self: (
            os.kill(os.getpid(), number) if len(seen) == 3 * at else None, step(self))[1])
        probe_linear.main([*flags, "--out", "parts.json"])
    assert stop.value.code == 128 + number and not Path("parts.json").exists()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"stopped by signal {number:d} after iteration {at}, saved; run the same command again to go on" in line
    assert torch.load("parts.head.pt", weights_only=True)["iteration"] == at
    probe_linear.main([*flags, "--out", "parts.json"])
    assert ("going on from iteration" in capsys.readouterr().out) == (at < 6)
    whole, parts = (torch.load(name, weights_only=True)["heads"] for name in ("whole.head.pt", "parts.head.pt"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert Path("whole.json").read_bytes() == Path("parts.json").read_bytes()


def test_heads_of_other_settings_are_refused_as_long_as_they_are_of_value(few_scenes, checkpoint, capsys):
    flags = ["--weights", checkpoint, *LINEAR, "--out", "x.json"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_after(1, patch)
        probe_linear.main(flags)
    before = Path("x.head.pt").read_bytes()
    status, line = exits(capsys, *flags, "--seeds", "1")
    assert status == 1 and "x.head.pt: holds unfinished heads with seeds 2, now 1" in line and "remove the file" in line
    status, line = exits(capsys, *flags, "--weights", save("other.pt", seed=9))
    assert status == 1 and "weights_sha256" in line
    for flag, value, name in [("--which", "student", "which"), ("--seed", "1", "seed"), ("--iters", "7", "iters"),
                              ("--batch-size", "9", "batch_size"), ("--amp", "bf16", "precision")]:
        status, line = exits(capsys, *flags, flag, value)
        assert status == 1 and f"x.head.pt: holds unfinished heads with {name} " in line
    random = ["--weights", "random", "--out", "y.json", *LINEAR]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_after(1, patch)
        probe_linear.main([*random, "--like", checkpoint])
    state = torch.load(checkpoint, weights_only=True)
    torch.save(dict(state, config=dict(state["config"], attn="softmax")), "soft.pt")
    status, line = exits(capsys, *random, "--like", "soft.pt")
    assert status == 1 and "y.head.pt: holds unfinished heads with config " in line
    assert Path("x.head.pt").read_bytes() == before
    probe_linear.main(flags)
    Path("x.json").unlink()                                         # as killed before it was written: still of value
    status, line = exits(capsys, *flags, "--seeds", "1")
    assert status == 1 and "x.head.pt: holds unreported heads with seeds 2, now 1" in line
    Path("x.head.pt").unlink()
    probe_linear.main([*flags, "--seeds", "1"])
    assert len(torch.load("x.head.pt", weights_only=True)["heads"]["weight"]) == 1


# ---- whose result it is ---------------------------------------------------------------------------------------------

def test_pictures_of_another_root_have_their_own_number(tmp_path, checkpoint, capsys):
    """Equal counts, other classes; whichever is first, both results survive, and B's is what B alone gives."""
    a = draw(tmp_path / "a")
    b = draw(tmp_path / "b", (("gold", 4, 2), ("jade", 4, 3), ("rust", 4, 2)), noise=250)
    flags = ["--weights", checkpoint, "--data", "folder", *LINEAR]
    probe_linear.main([*flags, "--root", str(a)])
    first = [json.loads(Path(f"tiny.{probe}.folder.json").read_text()) for probe in ("knn", "linear")]
    probe_linear.main([*flags, "--root", str(b)])
    second = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")][2:]
    probe_linear.main([*flags, "--root", str(b), "--out", "alone.json"])
    alone = [json.loads(Path(name).read_text()) for name in ("alone.knn.json", "alone.json")]
    assert second == alone and second[1]["root"] == str(b)
    for mine, other in zip(first, second, strict=True):
        assert mine["protocol"]["fingerprint"] != other["protocol"]["fingerprint"]
        assert {**mine["protocol"], "fingerprint": 0} == {**other["protocol"], "fingerprint": 0}
    for probe, mine, other in zip(("knn", "linear"), first, second, strict=True):
        kept = [json.loads(path.read_text()) for path in tmp_path.glob(f"tiny.{probe}.folder*.json")]
        assert len(kept) == 2 and mine in kept and other in kept
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit.VisionTransformer, "forward", None)       # whatever would look at a picture, fails
        a.rename(tmp_path / "c")                                    # another place is no other data
        probe_linear.main([*flags, "--root", str(tmp_path / "c")])
        probe_linear.main([*flags, "--root", "./c/"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert lines == first * 2
    status, line = exits(capsys, *flags, "--root", b, "--out", tmp_path / "tiny.linear.folder.json")
    assert status == 1 and "holds a result that is not to be overwritten (fingerprint" in line


def test_other_class_folders_of_the_same_pictures_are_other_data(tmp_path, checkpoint, capsys):
    root = draw(tmp_path / "pictures")
    flags = ["--knn", "--weights", checkpoint, "--data", "folder", "--root", str(root), "--workers", "0"]
    probe_linear.main(flags)
    for split in "train", "val":
        (root / split / "red").rename(root / split / "x")
        (root / split / "blue").rename(root / split / "red")
        (root / split / "x").rename(root / split / "blue")
    probe_linear.main(flags)
    assert len(list(tmp_path.glob("tiny.knn.folder*.json"))) == 2
    Image.new("RGB", (50, 40)).save(root / "val/red/0.png")         # a val picture counts as much
    probe_linear.main(flags)
    assert len(list(tmp_path.glob("tiny.knn.folder*.json"))) == 3


def test_heads_of_a_foreign_file(few_scenes, tmp_path, capsys):
    torch.manual_seed(0)
    model = vit.VisionTransformer(vit.ViTConfig(image_size=32, patch_size=8, dim=64, depth=2, heads=4))
    torch.save(model.state_dict(), "bare.pt")
    probe_linear.main(["--knn", "--weights", "bare.pt", "--heads", "4", "--workers", "0"])
    assert result(capsys, "bare.knn.shapes.json")["config"] == dataclasses.asdict(model.config)


# ---- val/ ----------------------------------------------------------------------------------------------------------

def copied(root):
    shutil.rmtree(root / "val")
    shutil.copytree(root / "train", root / "val")


def linked(root):
    shutil.rmtree(root / "val")
    (root / "val").symlink_to(root / "train")


def links_of_pictures(root):
    copied(root)
    for path in (root / "val").rglob("*.png"):
        path.unlink()
        path.symlink_to(root / "train" / path.relative_to(root / "val"))


def one_in_three(root):
    for name in ("blue", "green", "red"):
        shutil.copy(root / f"train/{name}/0.png", root / f"val/{name}/0.png")


@pytest.mark.parametrize("make, count", [(copied, "12 of 12"), (linked, "12 of 12"), (links_of_pictures, "12 of 12"),
                                         (one_in_three, "3 of 7")])
def test_a_val_that_is_trained_on_is_refused(tmp_path, checkpoint, capsys, make, count):
    root = draw(tmp_path / "pictures")
    make(root)
    status, line = exits(capsys, "--weights", checkpoint, "--data", "folder", "--root", root, *LINEAR)
    assert status == 1 and re.search(f"{count} val pictures are train pictures, the first is .*val/blue/0.png; ", line)
    assert not list(tmp_path.glob("tiny.*.*"))


def test_names_and_sizes_that_train_has_too_are_no_copies(tmp_path, checkpoint, capsys):
    """All names, sizes and times equal, one picture of eleven in both splits: measured, and said."""
    for split, n in (("train", 11), ("val", 11)):
        for name in "ab":
            (tmp_path / "d" / split / name).mkdir(parents=True)
        for i in range(n):
            Image.effect_noise((9, 9), 80).save(tmp_path / f"d/{split}/{'ab'[i % 2]}/{i}.bmp")
    shutil.copy(tmp_path / "d/train/b/5.bmp", tmp_path / "d/val/b/5.bmp")
    for path in (tmp_path / "d").rglob("*.bmp"):
        os.utime(path, (0, 0))
    probe_linear.main(["--knn", "--weights", checkpoint, "--data", "folder", "--root", str(tmp_path / "d"),
                       "--workers", "0"])
    assert re.search("1 of 11 val pictures are train pictures, too, as .*val/b/5.bmp", capsys.readouterr().out)


def test_hidden_files_and_other_suffixes(tmp_path, checkpoint, capsys):
    root = draw(tmp_path / "pictures")
    flags = ["--knn", "--weights", checkpoint, "--data", "folder", "--root", str(root), "--workers", "0"]
    probe_linear.main([*flags, "--out", "a.json"])
    for split in "train", "val":
        for folder in ".ipynb_checkpoints", "green/.ipynb_checkpoints", "__MACOSX":
            (root / split / folder).mkdir()
            Image.new("RGB", (9, 9)).save(root / split / folder / "0-checkpoint.png")
        (root / split / "green/._0.png").write_bytes(b"no picture")
        (root / split / ".DS_Store").write_bytes(b"no folder")
        (root / split / "red/0.png").rename(root / split / "red/0.PNG")
        image = Image.open(root / split / "red/1.png")
        image.save(root / split / "red/1.jpg", quality=100)
        (root / split / "red/1.png").unlink(), (root / split / "red/1.jpg").rename(root / split / "red/1.jfif")
    probe_linear.main([*flags, "--out", "b.json"])
    a, b = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert {**a["protocol"], "fingerprint": 0} == {**b["protocol"], "fingerprint": 0}
    assert [path.removeprefix(f"{root}/val/") for path, _ in probe_linear.ClassFolders(root / "val", 32).samples] == [
        "blue/0.png", "blue/1.png", "green/0.png", "green/1.png", "green/2.png", "red/0.PNG", "red/1.jfif"]


def test_a_part_of_val_counts_in_the_classes_of_train(tmp_path, checkpoint, capsys):
    root = draw(tmp_path / "pictures")
    shutil.rmtree(root / "val/blue")
    flags = ["--weights", checkpoint, "--data", "imagenet", "--root", str(root), *LINEAR]
    status, line = exits(capsys, *flags[:2], "--data", "folder", *flags[4:])
    assert status == 1 and line.endswith("blue not in both train/ and val/, which must hold the same classes; "
                                         "--allow-partial lets val/ lack some")
    _, val, names, _ = probe_linear.open_data(options(*flags, "--allow-partial"), 32)
    assert names == ["blue", "green", "red"]
    assert [(Path(path).parent.name, label) for path, label in val.samples] == [("green", 1)] * 3 + [("red", 2)] * 2
    shutil.rmtree(root / "train/red")
    status, line = exits(capsys, *flags, "--allow-partial")
    assert status == 1 and line.endswith("red not in both train/ and val/, which must hold the same classes")


def test_features_that_are_not_finite_are_refused(few_scenes, checkpoint, capsys):
    state = torch.load(checkpoint, weights_only=True)
    state["teacher"]["norm.weight"][:] = 3.4e38     # finite; of a normed vector one value is above 1, and overflows
    torch.save(state, checkpoint)
    status, line = exits(capsys, "--weights", checkpoint, "--knn")
    assert status == 1 and f"{checkpoint}: its features are not finite" in line


# ---- mistakes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    ("--weights random --root pictures", "--data shapes takes no --root"),
    ("--weights a.pt --like b.pt", "--like goes with --weights random"),
    ("--weights a.pt b.pt --out c.json", "--out names one file"),
    ("--weights random --seeds 0", "--seeds 0: must be at least 1"),
    ("--weights random --micro-batch 0", "--micro-batch 0: must be at least 1"),
    ("--weights random --save-images -1", "--save-images -1: must be at least 0"),
    ("--weights random --heads 0", "--heads 0: must be at least 1"),
])
def test_usage_errors(capsys, flags, message):
    status, line = exits(capsys, *flags.split())
    assert status == 2 and message in line and "error: " in line


def remove_val(root):
    (root / "val").rename(root / "test")


def add_class(root):
    draw(root, [("violet", 1, 0)])
    (root / "val/violet").rmdir()


def empty_class(root):
    (root / "train/void").mkdir()


def two_ways(root):
    (root / "train/sky").symlink_to(root / "train/blue")
    (root / "val/sky").symlink_to(root / "val/blue")


def cut_short(root):
    path = root / "train/green/1.png"
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize("break_it, data, message, workers", [
    (remove_val, "folder", "val: .*must hold train/<class>.*holds .'test', 'train'.", 0),
    (add_class, "folder", "pictures: violet not in both train/ and val/", 0),
    (empty_class, "folder", "train/void: holds no picture", 0),
    (two_ways, "folder", "train/sky: is [^ ]*train/blue again, through a link", 0),
    (lambda root: None, "imagenet", "train: 12 images of 1,281,167; .*--allow-partial", 0),
    (cut_short, "folder", "^[^ ]*train/green/1.png: unreadable", 0),
    (cut_short, "folder", "^[^ ]*train/green/1.png: unreadable", 1),
])
def test_data_errors_are_one_line(tmp_path, capsys, checkpoint, break_it, data, message, workers):
    root = draw(tmp_path / "pictures")
    break_it(root)
    status, line = exits(capsys, "--weights", checkpoint, "--data", data, "--root", root, "--workers", workers,
                         "--iters", 9, "--batch-size", 4)
    assert status == 1 and "\n" not in line
    assert re.search(message, line), line
    assert not list(tmp_path.glob("*.json"))


def test_allow_partial_takes_a_small_imagenet(tmp_path, capsys, checkpoint):
    root = draw(tmp_path / "pictures")
    probe_linear.main(["--knn", "--weights", checkpoint, "--data", "imagenet", "--root", str(root), "--allow-partial",
                       "--workers", "0"])
    assert result(capsys, tmp_path / "tiny.knn.imagenet.json")["protocol"]["partial"] is True


@pytest.mark.parametrize("weights", ["missing.pt", "text.pt", "folder"])
def test_bad_weights_are_named_in_one_line(tmp_path, capsys, weights):
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "folder").mkdir()
    status, line = exits(capsys, "--weights", weights)
    assert status == 1 and line.startswith(f"{weights}: ") and "\n" not in line


def test_missing_root_is_named(tmp_path, capsys, checkpoint):
    status, line = exits(capsys, "--weights", checkpoint, "--data", "folder", "--root", "nowhere")
    assert status == 1 and "nowhere" in line and "no such folder" in line and "\n" not in line


# ---- folders of classes without a split -----------------------------------------------------------------------------

def one_folder(root, counts):
    """root/<class>/*.png, without train/ and val/."""
    draw(root, [(name, n, 0) for name, n in counts.items()])
    for folder in (root / "train").iterdir():
        folder.rename(root / folder.name)
    shutil.rmtree(root / "train"); shutil.rmtree(root / "val")
    return root


def held_out(root, capsys, *flags):
    """(names of train, names of val, printed text)."""
    args = options("--weights", "random", "--data", "folder", "--root", root, *flags)
    splits = [images.samples for images in probe_linear.open_data(args, 32)[:2]]
    classes = sorted(path.name for path in root.iterdir())
    assert all(Path(path).parent.name == classes[label] for samples in splits for path, label in samples)
    return *([os.path.relpath(path, root) for path, _ in samples] for samples in splits), capsys.readouterr().out


def test_a_folder_of_classes_is_split_by_a_hash_of_the_names(tmp_path, capsys):
    counts = {"blue": 13, "green": 4, "red": 2}
    root = one_folder(tmp_path / "own", counts)
    train, val, text = held_out(root, capsys)
    lowest = {name: sorted((f"{name}/{i}.png" for i in range(n)),
                           key=lambda path: hashlib.blake2b(path.encode(), digest_size=8).hexdigest())
              for name, n in counts.items()}
    expected = sorted(lowest["blue"][:3] + lowest["green"][:1] + lowest["red"][:1])     # 2.6, 0.8 and 0.4: one at least
    assert sorted(val) == expected and sorted(train + val) == sorted(sum(lowest.values(), []))
    assert "val is 20 % of each class, by a hash of its names: train 14 images, val 5, classes 3" in text
    assert held_out(root, capsys, "--seed", 5)[:2] == (train, val)
    shutil.copytree(root, tmp_path / "elsewhere")
    assert held_out(tmp_path / "elsewhere", capsys)[:2] == (train, val)
    assert sorted(held_out(root, capsys, "--val-share", 0.9)[1]) == sorted(
        lowest["blue"][:12] + lowest["green"][:3] + lowest["red"][:1])                  # one at least is left


def test_the_split_is_in_the_protocol_where_there_was_none(tmp_path, checkpoint, capsys):
    own = one_folder(tmp_path / "own", {"blue": 5, "red": 5})
    for flags, share in (([], 0.2), (["--val-share", 0.4], 0.4)):
        probe_linear.main([*map(str, ["--knn", "--weights", checkpoint, "--data", "folder", "--root", own, "--out",
                                      f"{share}.json", "--workers", 0, *flags])])
        protocol = result(capsys, f"{share}.json")["protocol"]
        assert (protocol["val_share"], protocol["split"]) == (share, "lowest hashes of the names, by class")
        assert (protocol["train"], protocol["val"]) == (10 - 10 * share, 10 * share)
    two = draw(tmp_path / "two")
    probe_linear.main(["--knn", "--weights", checkpoint, "--data", "folder", "--root", str(two), "--out", "two.json",
                       "--workers", "0"])
    assert result(capsys, "two.json")["protocol"].keys() == protocol.keys() - {"val_share", "split"}


@pytest.mark.parametrize("counts, flags, message", [
    ({"blue": 3, "red": 1, "sky": 1}, [], "own: one picture each of red, sky, not enough for .*--allow-partial"),
    ({"red": 1, "sky": 1}, ["--allow-partial"], "own: one picture each of red, sky"),   # and nothing to score
    ({"blue": 3}, [], "own: one class, blue"),
    ({"training": 3, "validation": 3}, [], "own: training, validation cannot be classes, but splits; .* must hold "),
    ({"Train": 3, "Val": 3}, [], "own: Train, Val cannot be classes, but splits; .* must hold "),
    ({}, [], "own must hold train/<class>.* and val/<class>.*, or with --data folder <class>"),
])
def test_what_cannot_be_split_is_refused(tmp_path, capsys, counts, flags, message):
    root = tmp_path / "own"
    one_folder(root, counts) if counts else root.mkdir()
    with pytest.raises(SystemExit) as stop:
        held_out(root, capsys, *flags)
    assert re.search(message, stop.value.code), stop.value.code


def test_a_class_of_one_picture_is_train_alone_with_allow_partial(tmp_path, checkpoint, capsys):
    root = one_folder(tmp_path / "own", {"blue": 3, "green": 3, "red": 1})
    probe_linear.main([*map(str, ["--knn", "--weights", checkpoint, "--data", "folder", "--root", root, "--workers", 0,
                                  "--allow-partial", "--out", "a.json"])])
    protocol = result(capsys, "a.json")["protocol"]
    assert (protocol["train"], protocol["val"], protocol["classes"], protocol["partial"]) == (5, 2, 3, True)


def test_val_share_is_for_folders_without_a_split(tmp_path, capsys):
    for share in ("0", "1", "-0.1", "nan"):
        status, line = exits(capsys, "--weights", "random", "--data", "folder", "--root", ".", "--val-share", share)
        assert status == 2 and "a share of --data folder, above 0 and below 1" in line
    status, line = exits(capsys, "--weights", "random", "--data", "imagenet", "--root", ".", "--val-share", "0.2")
    assert status == 2 and "a share of --data folder" in line
    root = draw(tmp_path / "two")
    for gone in ("", "val"):
        shutil.rmtree(root / gone) if gone else None
        with pytest.raises(SystemExit) as stop:
            held_out(root, capsys, "--val-share", 0.2)
        assert re.search("two: holds train/ or val/, so the split is there; leave out --val-share", stop.value.code)
