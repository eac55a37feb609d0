"""bench.py: that its numbers mean what they say, and that every table comes out. No test asks for a speed."""
import json
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import entmax
import train
from paper import bench

CPU = torch.device("cpu")
TINY = ("--dim 32 --depth 1 --heads 2 --patch-size 8 --image-size 32 --local-size 16 --local-crops 2 --out-dim 64 "
        "--hidden-dim 32 --bottleneck-dim 16 --batch-size 4").split()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_medians_quartiles_and_ratio_by_round(monkeypatch):
    """By hand, on a clock that only the functions move: (20, 50), (20, 40), (24, 24) and (1, 4) ms."""
    naps, now = iter([9] * 6 + [20, 50, 20, 40, 24, 24, 1, 4]), [0]   # three warm-ups each, then four rounds
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0] / 1000)

    def nap():
        now[0] += next(naps)
    rows = bench.compare("naps", {"one": nap, "two": nap}, "one", 4, CPU)
    assert [[row[key] for key in ("variant", "low", "ms", "high", "ratio")] for row in rows] == [
        ["one", *map(pytest.approx, (5.75, 20, 23, 1))], ["two", *map(pytest.approx, (9, 32, 47.5, 2.25))]]


def test_peak_is_the_most_at_a_time():
    megabyte = 2**18                                                  # float32 numbers

    def three_in_all_two_at_a_time():
        for _ in range(2):
            x = torch.ones(megabyte, device=DEVICE)
        x + 1
    assert bench.peak_bytes(three_in_all_two_at_a_time, DEVICE) == pytest.approx(2 * 2**20, rel=0.01)


def test_kept_is_what_backward_needs_beyond_the_inputs():
    x = torch.randn(100, requires_grad=True)
    assert bench.kept_bytes(torch.sin, [x]) == 0                      # keeps its input
    assert bench.kept_bytes(torch.exp, [x]) == 400                    # keeps its output
    assert bench.kept_bytes(lambda x: x.exp().exp(), [x]) == 800
    assert bench.kept_bytes(entmax.entmax15, [x]) == 400
    assert bench.kept_bytes(entmax.entmax15, [x.detach().bfloat16().requires_grad_()]) == 200


def test_deep_spins_package_is_loaded_from_its_file(tmp_path, monkeypatch):
    assert bench.deep_spin() is None or bench.deep_spin().__file__.endswith("activations.py")
    (tmp_path / "entmax").mkdir()
    (tmp_path / "entmax/activations.py").write_text("def entmax15(x, dim, k=None): return x.softmax(dim)")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert bench.deep_spin().entmax15(torch.zeros(2), -1).tolist() == [0.5, 0.5]
    assert sys.modules["entmax"] is entmax


@pytest.mark.parametrize("command, cases, variants", [
    (["operator"], 4, ["entmax15", "softmax"]),
    (["attention"], 2, ["entmax15, eager", "sdpa"]),
    (["step", *TINY], 1, ["entmax15", "softmax"]),
])
def test_tables(tmp_path, capsys, monkeypatch, command, cases, variants):
    monkeypatch.setattr(bench, "deep_spin", lambda: None)
    bench.main([*command, "--repeats", "1", "--out", str(tmp_path / "numbers.json")])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "numbers.json").read_text())
    rows = result["rows"]
    assert result["bench"] == command[0] and result["machine"]["torch"] == torch.__version__
    assert len({row["case"] for row in rows}) >= cases and {row["variant"] for row in rows} >= set(variants)
    for row in rows:
        assert f"| {row['case']} | {row['variant']} |" in printed
        assert row["low"] <= row["ms"] <= row["high"] and row["peak_mb"] > 0
        assert row["ratio"] == 1 if row["variant"] == row["baseline"] else row["ratio"] > 0


def test_profile_names_the_operations(capsys):
    bench.main(["step", *TINY, "--repeats", "1", "--profile"])
    text = capsys.readouterr().out
    assert text.count("where one step goes") >= 2 and "aten::" in text and "addmm" in text


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    bench.draw_jpegs(folder, 12)
    return folder


@pytest.mark.parametrize("workers, verdict", [(0, "give --workers 1 or more"), (1, "is the limit")])
def test_doctor(tmp_path, capsys, photos, workers, verdict):
    bench.main(["data", *TINY, "--data", str(photos), "--workers", str(workers), "--repeats", "1",
                "--out", str(tmp_path / "numbers.json")])
    *rows, doctor = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert verdict in doctor["verdict"] and doctor["verdict"] in capsys.readouterr().out
    assert [row["variant"] for row in rows] == ["published pipeline", "here", "here, decoded whole",
                                                "published pipeline", "here"]
    assert min(doctor["loader"], doctor["step"], doctor["both"]) > 0


@pytest.mark.parametrize("rates, verdict", [
    ((100, 40, 38), "the step is the limit"), ((40, 100, 38), "5 workers, on as many idle cores")])
def test_doctors_verdict(monkeypatch, photos, rates, verdict):
    """Two workers load 40 images/s and the step could take 100: five are needed."""
    settings = train.parse_args([*TINY, "--data", str(photos), "--workers", "2"])
    clock = iter(rates)
    monkeypatch.setattr(bench.statistics, "median", lambda seconds: settings.batch_size / next(clock))
    monkeypatch.setattr(data, "load", lambda *args: iter([(0,)] * 100))
    monkeypatch.setattr(bench, "stepper", lambda settings, device: (lambda: None, type("Run", (), {"student": None})))
    monkeypatch.setattr(train, "train_step", lambda *args, **kw: None)
    assert verdict in bench.doctor(settings, [None] * 12, None, CPU, 1)["verdict"]


@pytest.mark.parametrize("command, message", [
    ("attention --arch tiny", "unrecognized arguments: --arch tiny"), ("operator --repeats 0", "--repeats 0"),
    ("speed", "invalid choice"), ("step --epochs 0", "--epochs 0"),
])
def test_usage_errors(capsys, command, message):
    with pytest.raises(SystemExit) as stop:
        bench.main(command.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("what, variants", [("operator", 4), ("attention", 3)])
def test_rounds_and_compiled_variants(monkeypatch, what, variants):
    """--repeats is the number of rounds; --compiled adds what torch.compile makes of the same functions."""
    cases = []
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph: f)
    monkeypatch.setattr(bench, "compare", lambda _, runs, __, repeats, ___: cases.append((runs, repeats)) or [])
    monkeypatch.setattr(bench, "deep_spin", lambda: None)
    for flags in ([], ["--repeats", "7", "--compiled"]):
        cases.clear()
        args, rest = bench.parse_args([what, *flags])
        getattr(bench, f"bench_{what}")(args, rest, CPU)
        assert {(len(runs), repeats) for runs, repeats in cases} == {(variants, 7) if flags else (2, 25)}
        assert any("compiled" in name for name in cases[0][0]) == bool(flags)


@pytest.mark.parametrize("flags, size, drawn", [([], 32, True), (["--batch-size=4"], 4, True),
                                                (["--batch-size", "4", "--data=PHOTOS"], 4, False)])
def test_flags_of_train_are_not_overridden(monkeypatch, photos, flags, size, drawn, capsys):
    """In either of their forms."""
    seen = []
    monkeypatch.setattr(bench, "per_core", lambda settings, source, *_: seen.append((settings, len(source))) or [{}])
    monkeypatch.setattr(bench, "doctor", lambda *args: {})
    bench.bench_data(bench.parse_args(["data"])[0], [flag.replace("PHOTOS", str(photos)) for flag in flags], CPU)
    (settings, pictures), = seen
    assert settings.batch_size == size and pictures == (64 if drawn else 12)
    assert ("no --data" in capsys.readouterr().out) == drawn


def test_shapes_have_nothing_to_load():
    with pytest.raises(SystemExit, match="nothing to load"):
        bench.main(["data", "--data", "shapes"])


# ---- the whole augmentation against the published one

def ks_distance(a, b):
    """Largest gap between two empirical distribution functions."""
    at = np.concatenate([a, b])
    share_a, share_b = (np.searchsorted(np.sort(x), at, "right") / len(x) for x in (a, b))
    return abs(share_a - share_b).max()


def describe(view):
    """What each operation leaves its mark on: (3, S, S) in grey levels -> numbers."""
    grey = view.mean(0)
    right = grey[:, grey.shape[1] // 2:].mean() - grey[:, :grey.shape[1] // 2].mean()
    edges = (grey[:, 1:] - grey[:, :-1]).abs().mean()
    return [grey.mean(), grey.std(), (view.amax(0) - view.amin(0)).mean(), right, edges,
            *view.mean((1, 2)) - grey.mean()]


def test_views_are_distributed_as_the_published_ones():
    """Kolmogorov-Smirnov at the 0.1 % level between 1,000 draws each of all views of one picture: brightness, contrast,
    saturation, left against right, sharpness, tint."""
    g = np.random.default_rng(0)
    coarse = Image.fromarray(g.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((80, 60), Image.Resampling.BICUBIC)
    fine = Image.fromarray(g.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((80, 60), Image.Resampling.BICUBIC)
    ramp = np.linspace(-60, 60, 80)[None, :, None]                    # or a flip would not be seen
    pixels = 0.6 * np.asarray(coarse, float) + 0.3 * np.asarray(fine, float) + ramp + 12
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    args = train.parse_args("--data X --patch-size 8 --image-size 32 --local-size 16 --local-crops 1".split())
    published, multicrop = bench.published_pipeline(args), data.MultiCrop(32, 16, 1)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    random.seed(0), torch.manual_seed(0)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (bench.vit.MEAN, bench.vit.STD))
    theirs, ours = [], []
    for i in range(1000):
        theirs.append([describe((view * std + mean) * 255) for view in published(image)])
        crops = [x[None] for x in multicrop(tensor, np.random.default_rng([3, i]))]
        order = np.random.default_rng([4, i]).permutation(4)
        ours.append([describe((view[0] * std + mean) * 255) for view in multicrop.photometric(*crops, order)])
    theirs, ours = torch.tensor(theirs).numpy(), torch.tensor(ours).numpy()       # (draws, views, numbers)
    distances = np.array([[ks_distance(theirs[:, v, k], ours[:, v, k]) for k in range(theirs.shape[2])]
                          for v in range(3)])
    assert (distances < 1.95 * (2 / 1000) ** 0.5).all(), distances.round(3)
