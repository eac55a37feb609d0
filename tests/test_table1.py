import hashlib
import json
import math
import re
from pathlib import Path

import pytest

from paper import table1

CONFIG = dict(image_size=64, patch_size=8, dim=64, depth=4, heads=2, mlp_ratio=4, attn="softmax", registers=0,
              specialize=False, drop_path=0.0)
METRIC = dict(linear="top1", knn="top1", seg="miou", depth="rmse")
ALL = [("knn", "shapes"), ("linear", "shapes"), ("seg", "shapes"), ("depth", "shapes"), ("pib", "shapes")]


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def put(weights, probe, value, data="shapes", epochs=24, partial=False, out=None, protocol=(), content=None, seed=0,
        which="teacher", metrics=(), run_seed=None, recipe=None, **config):
    """A weights file with `content` (default: its own path) and a probe's result on it; returns the result's path."""
    sha = None
    if weights != "random":
        Path(weights).parent.mkdir(parents=True, exist_ok=True)
        Path(weights).write_text(content or str(weights))
        sha = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    value = dict(pib=[99.0, value], chance=27.5) if probe == "pib" else {METRIC[probe]: value}
    if probe == "seg":
        value["heads"] = [dict(block=3, concat_cls=False, miou=value["miou"])]
    metrics = value | dict(miou_constant=7.9, rmse_constant=3.6) | dict(metrics)
    out = Path(out or f"{str(weights).removesuffix('.pt')}.{probe}.{data}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(dict(
        probe=probe, data=data, weights=str(weights), weights_sha256=sha, which=which, epochs=epochs, seed=seed,
        run_seed=run_seed, recipe=recipe, config=CONFIG | config, metrics=metrics,
        protocol=dict(probe=probe, data=data, classes=10, val=1000, partial=partial) | dict(protocol))))
    return out


def every_column(value):
    """Metrics beside the headline such that each column of shapes has `value`."""
    return dict(heads=[dict(block=b, concat_cls=c, miou=value - (b < 3)) for b in range(4) for c in (False, True)],
                **{name: [99.0, value] for name in ("auc_own", "auc_other", "auc_background")})


def run(capsys, *argv):
    table1.main([*map(str, argv)])
    return capsys.readouterr().out


def tables(capsys, *argv):
    """(paper's table, shapes table, everything) of --json."""
    content = json.loads(run(capsys, *argv, "--json"))
    return *content["tables"], content


def row(table, method):
    return next(row for row in table["rows"] if row["method"] == method)


def refused(*argv):
    with pytest.raises(SystemExit) as stop:
        table1.main([*map(str, argv)])
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def markdown_row(text, start):
    return next(line for line in text.splitlines() if line.startswith(f"| {start} |"))


# ---- numbers --------------------------------------------------------------------------------------------------------

def test_mean_and_sample_sd_by_hand(capsys):
    """1, 2, 6: mean 3, sample variance (4 + 1 + 9) / 2 = 7; PiB and AUC are those of the last block."""
    for seed, value in enumerate([1.0, 2.0, 6.0]):
        for probe, data in ALL:
            put(f"runs/a_s{seed}/checkpoint_0024.pt", probe, value, data, metrics=every_column(value))
    put("runs/b_s0/checkpoint_0024.pt", "depth", 2.3456, attn="entmax15")
    _, shapes, _ = tables(capsys)
    assert len(shapes["columns"]) == 10
    for name in shapes["columns"]:
        cell = row(shapes, "CLS baseline")["cells"][name]
        assert (cell["n"], cell["mean"], cell["values"]) == (3, 3.0, [1.0, 2.0, 6.0])
        assert cell["sd"] == pytest.approx(math.sqrt(7)) and len(cell["files"]) == 3
    one = row(shapes, "Entmax-1.5")
    assert one["n"] == 1 and one["cells"]["RMSE m"]["sd"] is None
    text = run(capsys)
    assert ("| k-NN top-1 % | linear top-1 % | mIoU % | mIoU % best block | mIoU % + [CLS] | RMSE m | PiB % | "
            "own class AUC % | other class AUC % | background AUC % |\n") in text
    assert markdown_row(text, "CLS baseline") == (
        "| CLS baseline | 3 |" + " 3.00 ± 2.65 |" * 5 + " 3.000 ± 2.646 |" + " 3.00 ± 2.65 |" * 4)
    assert markdown_row(text, "Entmax-1.5") == "| Entmax-1.5 | 1 | – | – | – | – | – | 2.346 | – | – | – | – |"
    assert markdown_row(text, "chance, or the best constant").endswith(
        "| 10.00 | 10.00 | 7.90 | 7.90 | 7.90 | 3.600 | 27.50 | 50.00 | 50.00 | 50.00 |")
    assert "Not measured here: Entmax-1.5 (k-NN top-1 %, linear top-1 %, mIoU %, mIoU % best block, mIoU" in text


def test_rows_are_methods(capsys):
    """Also a combination that the paper does not have, last; nothing is mixed."""
    methods = {"CLS baseline": {}, "Register-4": dict(registers=4), "Specialization": dict(specialize=True),
               "Entmax-1.5": dict(attn="entmax15"),
               "Entmax-1.5 + Register-4 + Specialization": dict(attn="entmax15", registers=4, specialize=True),
               "Register-2": dict(registers=2)}
    for i, config in enumerate(methods.values()):
        put(f"runs/{9 - i}/checkpoint_0024.pt", "knn", 10.0 + i, **config)
    paper, shapes, _ = tables(capsys)
    assert [r["method"] for r in shapes["rows"]] == list(methods)
    assert [r["cells"]["k-NN top-1 %"]["mean"] for r in shapes["rows"]] == [10, 11, 12, 13, 14, 15]
    assert all(r["paper"] is None for r in shapes["rows"])
    assert [r["method"] for r in paper["rows"]] == list(methods)[:4]


def test_the_heads_that_a_column_needs(capsys):
    """The best block's [CLS] is not looked at; of fewer heads, or none of the last block, there is no such value."""
    miou = {(0, False): 41.0, (1, False): 45.0, (2, False): 43.0, (3, False): 42.0, (3, True): 44.0, (1, True): 60.0}

    def put_heads(name, kinds, **config):
        heads = [dict(block=b, concat_cls=c, miou=miou[b, c]) for b, c in kinds]
        return put(f"runs/{name}/checkpoint_0024.pt", "seg", heads[0]["miou"], metrics=dict(heads=heads), **config)

    put_heads("all", sorted(miou))
    put_heads("last", [(3, False), (3, True)], registers=4)
    put_heads("some", [(0, False), (1, False), (3, False)], specialize=True)
    none = put_heads("none", [(0, False), (1, True)], attn="entmax15")
    old = put("runs/old/checkpoint_0024.pt", "seg", 42.0, metrics=dict(heads=[]), attn="entmax15")
    _, shapes, content = tables(capsys)
    assert {r["method"]: {name: c["mean"] for name, c in r["cells"].items()} for r in shapes["rows"]} == {
        "CLS baseline": {"mIoU %": 42.0, "mIoU % best block": 45.0, "mIoU % + [CLS]": 44.0},
        "Register-4": {"mIoU %": 42.0, "mIoU % + [CLS]": 44.0}, "Specialization": {"mIoU %": 42.0}}
    assert {r["file"]: r["why"] for r in content["left_out"]} == dict.fromkeys(
        map(str, (none, old)), "no column for seg on shapes, of these blocks")
    text = run(capsys)
    assert markdown_row(text, "Specialization") == "| Specialization | 1 | – | – | 42.00 |" + " – |" * 7
    assert "Specialization (k-NN top-1 %, linear top-1 %, mIoU % best block, mIoU % + [CLS], RMSE m, PiB %, own" in text


def test_only_the_last_epoch_of_a_run_counts(capsys):
    """Of all columns: what was measured only earlier is not measured. checkpoint.pt is the same run."""
    for epochs in (8, 16, 24):
        put(f"runs/a/checkpoint_{epochs:04}.pt", "pib", float(epochs), epochs=epochs)
    put("runs/a/checkpoint_0016.pt", "seg", 40.0, epochs=16)
    put("runs/a/checkpoint.pt", "pib", 26.0, epochs=24)
    put("runs/b/checkpoint_0024.pt", "pib", 35.0)
    _, shapes, _ = tables(capsys)
    only = row(shapes, "CLS baseline")
    assert only["n"] == 2 and only["cells"]["PiB %"]["values"] == [25.0, 35.0]      # (24 + 26) / 2, one run
    assert "mIoU %" in only["not_measured"] and shapes["epochs"] == 24


def test_a_run_is_told_by_its_weights(capsys):
    """Not by the probe's seed, nor by where a copy lies; other names in one folder are several runs."""
    put("w/one.pt", "knn", 1.0)
    put("w/two.pt", "knn", 3.0)
    put("w/two.pt", "knn", 5.0, out="w/again.knn.shapes.json", seed=1)
    put("copy/checkpoint_0024.pt", "knn", 1.0, content="w/one.pt")
    put("copy2/checkpoint_0024.pt", "knn", 1.0, content="w/one.pt")
    _, shapes, _ = tables(capsys, ".")
    assert row(shapes, "CLS baseline")["cells"]["k-NN top-1 %"]["values"] == [1.0, 4.0]


def test_equal_paths_on_two_machines_are_two_runs(capsys):
    """The folders were moved after the probes: the results of both name run/checkpoint_0024.pt, which is gone."""
    for machine in "ab":
        made = put("run/checkpoint_0024.pt", "knn", 1.0, content=machine)
        for path in (made, Path("run/checkpoint_0024.pt")):
            Path(machine).mkdir(exist_ok=True)
            path.rename(Path(machine, path.name))
    assert row(tables(capsys, "a", "b")[1], "CLS baseline")["n"] == 2


def test_a_run_of_more_than_9999_epochs_is_one_run(capsys):
    for epochs in (9999, 10000, 20000):
        put(f"runs/a/checkpoint_{epochs:04d}.pt", "knn", epochs / 1000, epochs=epochs)
    assert row(tables(capsys)[1], "CLS baseline")["cells"]["k-NN top-1 %"]["values"] == [20.0]


def test_controls_of_all_methods_lie_beside_each_other(capsys):
    """runs/random/<probe>.<data>.<method>.s<seed>.json: a row for each method, a run for each seed."""
    for name, config in dict(softmax={}, softmax_r4=dict(registers=4), entmax15=dict(attn="entmax15")).items():
        for seed in (0, 1):
            for probe in ("knn", "seg"):
                put("random", probe, 10.0 + seed + len(name), epochs=0, seed=seed, which=None,
                    out=f"runs/random/{probe}.shapes.{name}.s{seed}.json", **config)
    _, shapes, _ = tables(capsys)
    assert {r["method"]: [(c["n"], c["mean"]) for c in r["cells"].values()] for r in shapes["rows"]} == {
        "untrained, CLS baseline": [(2, 17.5)] * 2, "untrained, Register-4": [(2, 20.5)] * 2,
        "untrained, Entmax-1.5": [(2, 18.5)] * 2}


def test_chance_of_pib_is_shown_beside_the_centre(capsys):
    put("runs/a/checkpoint_0024.pt", "pib", 30.0)
    assert "centre" not in run(capsys) and tables(capsys)[1]["centre"] is None      # of an older result
    put("runs/b/checkpoint_0024.pt", "pib", 30.0, metrics=dict(centre=62.4))
    assert "Chance of PiB is that of a random patch; always answering the centre has 62.40." in run(capsys)


def test_untrained_weights_have_rows_of_their_own(capsys):
    put("runs/a/checkpoint_0000.pt", "knn", 40.0, epochs=0)
    put("runs/a/checkpoint_0024.pt", "knn", 90.0)
    put("random", "knn", 44.0, epochs=0, out="runs/random/knn.shapes.s3.json", seed=3)
    put("random", "knn", 48.0, epochs=0, out="runs/random/knn.shapes.s4.json", seed=4)
    put("random", "pib", 20.0, epochs=0, out="runs/random/pib.shapes.s4.json", seed=4)
    _, shapes, _ = tables(capsys)
    assert [(r["method"], r["n"]) for r in shapes["rows"]] == [("CLS baseline", 1), ("untrained, CLS baseline", 3)]
    assert sorted(shapes["rows"][1]["cells"]["k-NN top-1 %"]["values"]) == [40.0, 44.0, 48.0]
    assert "| 44.00 ± 4.00 |" in (text := run(capsys)) and "20.00 (n = 1)" in text and not shapes["pairs"]


# ---- the paper's table ----------------------------------------------------------------------------------------------

def test_the_papers_values(capsys):
    text = run(capsys, put("runs/a/checkpoint_0024.pt", "knn", 1.0))
    for line in """\
        CLS baseline, paper | 1 | 69.50 | 42.80 | 19.85 | 36.79 | 0.834 | 0.674 | 6.743
        Register-4, paper | 1 | 70.03 | 44.34 | 19.52 | 36.00 | 0.814 | 0.667 | 6.749
        Specialization, paper | 1 | 70.04 | 46.22 | 20.51 | 36.45 | 0.829 | 0.660 | 6.723
        Entmax-1.5, paper | 1 | 70.06 | 48.78 | 21.97 | 37.87 | 0.829 | 0.669 | 6.739""".splitlines():
        assert f"| {line.strip()} |" in text
    assert ", here" not in text and "Not measured here: all of it." in text
    assert re.search("IN-1K.*VOC.*ADE20K.*Cityscapes.*NYU.*SUN.*KITTI", text)


def test_real_data_go_beside_the_paper(capsys):
    values = {("linear", "imagenet"): 69.0, ("seg", "voc"): 42.0, ("seg", "ade20k"): 19.0, ("seg", "cityscapes"): 36.0,
              ("depth", "nyu"): 0.5, ("depth", "sunrgbd"): 0.6, ("depth", "kitti"): 4.0}
    for (probe, data), value in values.items():
        put("runs/a/checkpoint_0200.pt", probe, value, data, epochs=200, attn="entmax15")
    paper, shapes, _ = tables(capsys)
    assert [cell["mean"] for cell in row(paper, "Entmax-1.5")["cells"].values()] == list(values.values())
    assert not shapes["rows"] and paper["epochs"] == 200
    text = run(capsys)
    assert ("| Entmax-1.5, here | 1 | 69.00 | 42.00 | 19.00 | 36.00 | 0.500 | 0.600 | 4.000 |" in text)
    assert "Not measured here: CLS baseline (all); Register-4 (all); Specialization (all)." in text


def test_what_the_papers_table_does_not_take_is_named(capsys):
    partial = put("runs/a/checkpoint_0024.pt", "seg", 1.0, "voc", partial=True)
    untrained = put("runs/a/checkpoint_0000.pt", "seg", 2.0, "voc", epochs=0)
    other = put("runs/a/checkpoint_0024.pt", "pib", 3.0, "folder")
    shown = put("runs/a/checkpoint_0024.pt", "knn", 4.0)
    paper, shapes, content = tables(capsys)
    assert not any(r["cells"] for r in paper["rows"]) and shapes["rows"][0]["cells"]["k-NN top-1 %"]["files"] == [
        str(shown)]
    assert {r["file"]: r["why"] for r in content["left_out"]} == {
        str(partial): "partial data", str(untrained): "untrained", str(other): "no column for pib on folder"}
    assert f"{partial} (partial data)" in run(capsys)


# ---- differences, seed by seed --------------------------------------------------------------------------------------

@pytest.mark.parametrize("df, quantile", [(1, 12.7062047), (2, 4.3026527), (3, 3.1824463), (4, 2.7764451),
                                          (9, 2.2621572), (30, 2.0422725), (120, 1.9799304)])
def test_quantiles_of_the_textbook(df, quantile):
    assert table1.t_quantile(df) == pytest.approx(quantile, abs=1e-6)


def put_seeds(name, values, probe="knn", **config):
    """A run of each {seed: value}."""
    return [put(f"runs/{name}_s{seed}/checkpoint_0024.pt", probe, value, run_seed=seed, **config)
            for seed, value in values.items()]


def test_interval_by_hand(capsys):
    """The baseline's seeds lie 10 apart, the differences 1: 1, 2 and 3 have mean 2 and sd 1, so the interval is
    2 -+ 4.302653 / sqrt(3) = 2 -+ 2.484138. 3, 4 and 5: 4 -+ 2.484138 leaves out 0, as -4 -+ 2.484138 does."""
    base = {0: 50.0, 1: 70.0, 2: 60.0}
    put_seeds("a", base)
    for name, shift, config in (("b", 1, dict(registers=4)), ("c", 3, dict(specialize=True)),
                                ("d", -5, dict(attn="entmax15"))):
        put_seeds(name, {seed: value + shift + seed for seed, value in base.items()}, **config)
    put_seeds("e", base, epochs=0)                                  # controls: shown, and no method to compare
    put_seeds("f", base, epochs=0, registers=4)
    _, shapes, _ = tables(capsys)
    assert [r["method"] for r in shapes["rows"]] == [
        *table1.PAPER, "untrained, CLS baseline", "untrained, Register-4"]
    pairs = {p.pop("method"): p for p in shapes["pairs"]}
    half, means = 2.484138, {"Register-4": 2.0, "Specialization": 4.0, "Entmax-1.5": -4.0}
    assert pairs == {
        name: dict(column="k-NN top-1 %", baseline="CLS baseline", n=3, seeds=[0, 1, 2],
                   differences=[mean - 1, mean, mean + 1], mean=mean, low=pytest.approx(mean - half, abs=1e-6),
                   high=pytest.approx(mean + half, abs=1e-6), leaves_out_0=abs(mean) == 4)
        for name, mean in means.items()}
    text = run(capsys).partition("#### Difference to the CLS baseline of the same seed")[2]
    assert [line for line in text.splitlines() if line.startswith("| ")][2:] == [
        "| Register-4 | 3 | +2.00 [-0.48, +4.48] |" + " – |" * 9,
        "| Specialization | 3 | **+4.00 [+1.52, +6.48]** |" + " – |" * 9,
        "| Entmax-1.5 | 3 | **-4.00 [-6.48, -1.52]** |" + " – |" * 9]
    assert ("Comparisons with an interval: 3, of which 2 leave out 0, where 0.15 would by chance if all methods were "
            "equal; columns of the same networks are not independent, nor are methods that share a baseline. ") in text
    assert "Not compared" not in text


def test_only_seeds_in_common_are_paired(capsys):
    """In each column; one pair has no interval and is not counted; n stands where it is not the row's."""
    put_seeds("a", {0: 1.0, 1: 2.0, 3: 9.0})
    put_seeds("a", {0: 1.5, 1: 1.0}, "depth")
    put_seeds("b", {3: 10.0, 2: 99.0, 1: 4.0}, attn="entmax15")
    put_seeds("b", {1: 1.25, 2: 9.0}, "depth", attn="entmax15")
    put_seeds("b", {1: 50.0}, "linear", attn="entmax15")            # not measured of the baseline
    put_seeds("c", {5: 3.0}, registers=4)
    _, shapes, _ = tables(capsys)
    assert [(p["column"], p["method"], p["n"], p["seeds"], p["differences"]) for p in shapes["pairs"]] == [
        ("k-NN top-1 %", "Entmax-1.5", 2, [1, 3], [2.0, 1.0]), ("RMSE m", "Entmax-1.5", 1, [1], [0.25])]
    assert [shapes["pairs"][1][key] for key in ("mean", "low", "high", "leaves_out_0")] == [0.25, None, None, None]
    text = run(capsys).partition("####")[2]                         # 1.5 -+ 12.7062 * 0.70711 / sqrt(2)
    assert markdown_row(text, "Entmax-1.5") == (
        "| Entmax-1.5 | 2 | +1.50 [-4.85, +7.85] | – | – | – | – | +0.250 (n = 1) | – | – | – | – |")
    assert "with an interval: 1, of which 0 leave out 0, where 0.05 would" in text and "| Register-4" not in text
    assert ("Not compared, without a known seed in common with the CLS baseline: Register-4 (all); "
            "Entmax-1.5 (linear top-1 %).") in text


def test_results_of_one_run_are_one_pair(capsys):
    """Of two probe seeds: (2 + 4) / 2 - 1; and the seed of one of them is that of the run."""
    put_seeds("a", {0: 1.0})
    put_seeds("b", {0: 2.0}, attn="entmax15")
    put("runs/b_s0/checkpoint_0024.pt", "knn", 4.0, seed=1, out="runs/b_s0/again.knn.shapes.json", attn="entmax15")
    assert [p["differences"] for p in tables(capsys)[1]["pairs"]] == [[2.0]]
    text = run(capsys)
    assert "| Entmax-1.5 | 1 | +2.00 |" in text and "Comparisons" not in text.partition("####")[2]


def test_without_seeds_nothing_is_paired(capsys):
    """Of foreign files (null) and of results from before they said it (absent)."""
    for name, config in (("a", {}), ("b", dict(registers=4))):
        path = put(f"runs/{name}/checkpoint_0024.pt", "knn", 1.0, **config)
    content = json.loads(path.read_text())
    del content["run_seed"]
    path.write_text(json.dumps(content))
    assert not tables(capsys)[1]["pairs"]
    text = run(capsys)
    assert "####" not in text and "in common with the CLS baseline: Register-4 (all)." in text


def test_without_the_baseline_nothing_is_compared(capsys):
    put_seeds("b", {0: 1.0}, registers=4)
    put_seeds("c", {0: 1.0}, attn="entmax15")
    put_seeds("u", {0: 1.0}, epochs=0)
    assert not tables(capsys)[1]["pairs"]
    assert (text := run(capsys)).count("Nothing is compared: no trained CLS baseline is among the results.") == 1
    assert "####" not in text


def test_real_data_of_one_seed_have_differences_without_interval(capsys):
    put_seeds("a", {0: 42.0}, "seg", data="voc")
    put_seeds("b", {0: 48.5}, "seg", data="voc", attn="entmax15")
    assert "| Entmax-1.5 | 1 | – | +6.50 | – | – | – | – | – |" in run(capsys)


# ---- refusals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("moved", [False, True])
def test_weights_that_changed_since_are_refused(capsys, moved, monkeypatch):
    """Found by the name in the result, or beside a result that moved with them."""
    result, weights = put("runs/a/checkpoint_0024.pt", "knn", 1.0), "runs/a/checkpoint_0024.pt"
    if moved:
        Path("runs").rename("elsewhere")
        result, weights = "elsewhere/a/checkpoint_0024.knn.shapes.json", "elsewhere/a/checkpoint_0024.pt"
    run(capsys, result)
    Path(weights).write_text("trained again")
    table1.sha256.cache_clear()
    message = refused(result)
    assert str(result) in message and weights in message and "run the probe again" in message
    Path(weights).unlink()                                          # results outlive their weights
    assert "1.00" in run(capsys, result)


@pytest.mark.parametrize("late", [False, True])
def test_other_protocols_are_refused(late):
    """Also between an untrained and a trained row, which share their columns."""
    a = put("runs/a/checkpoint_0024.pt", "seg", 1.0, protocol=dict(iters=1000, lr=0.1))
    put("runs/a1/checkpoint_0024.pt", "seg", 1.0, protocol=dict(iters=1000, lr=0.1))
    b = put("runs/b/checkpoint_0000.pt", "seg", 2.0, protocol=dict(iters=500, lr=0.1) if late else dict(lr=0.1),
            attn="entmax15", epochs=0)
    message = refused("runs")
    assert str(a) in message and str(b) in message and "lr" not in message and "mIoU %" in message
    assert ("iters 1000 and 500" if late else "iters 1000 and absent") in message


def test_results_on_other_data_are_refused(capsys):
    """Equal counts, other pictures; and a result from before results said which, beside one that says."""
    a = put("runs/a/checkpoint_0024.pt", "seg", 1.0, protocol=dict(fingerprint="aaaa"))
    b = put("runs/b/checkpoint_0000.pt", "seg", 2.0, protocol=dict(fingerprint="bbbb"), attn="entmax15", epochs=0)
    assert f"{a} and {b}: mIoU % of different data: fingerprint aaaa and bbbb; run" in refused("runs")
    put("runs/b/checkpoint_0000.pt", "seg", 2.0, attn="entmax15", epochs=0)
    assert refused("runs") == (f"{b}: measured before results said on which data, and {a} says; run the probe again")
    put("runs/b/checkpoint_0000.pt", "seg", 2.0, protocol=dict(fingerprint="aaaa"), attn="entmax15", epochs=0)
    put("runs/b/checkpoint_0024.pt", "knn", 2.0, protocol=dict(fingerprint="cccc"), attn="entmax15")
    assert [r["n"] for r in tables(capsys)[1]["rows"]] == [1, 1, 1]         # each column has its own data


def test_columns_may_have_their_own_protocols(capsys):
    put("runs/a/checkpoint_0024.pt", "knn", 1.0, protocol=dict(iters=1))
    put("runs/a/checkpoint_0024.pt", "seg", 1.0, protocol=dict(iters=2))
    put("runs/b/checkpoint_0024.pt", "seg", 1.0, protocol=dict(iters=2), seed=5)
    assert row(tables(capsys)[1], "CLS baseline")["n"] == 2


@pytest.mark.parametrize("change, said", [(dict(dim=128), "dim 64 and 128"), (dict(epochs=48), "epochs 24 and 48"),
                                          (dict(which="student"), "which teacher and student")])
def test_other_models_and_epochs_are_refused(change, said):
    put("runs/a/checkpoint_0024.pt", "knn", 1.0)
    put("runs/a1/checkpoint_0024.pt", "knn", 1.0)
    put("runs/b/checkpoint_0024.pt", "seg", 1.0, **change)
    assert said in refused("runs")


def test_drop_path_acts_in_training_only(capsys):
    put("runs/a/checkpoint_0024.pt", "knn", 1.0)
    put("runs/b/checkpoint_0024.pt", "knn", 1.0, drop_path=0.1)
    assert row(tables(capsys)[1], "CLS baseline")["n"] == 2


@pytest.mark.parametrize("config", [{}, dict(registers=4)])
def test_two_runs_of_one_seed_are_refused(config, capsys):
    a, = put_seeds("a", {3: 1.0}, **config)
    b, = put_seeds("b", {3: 1.0}, "seg", **config)
    assert (message := refused("runs")).startswith(f"{a} and {b}: two runs of {'Register-4' if config else 'CLS base'}")
    assert "seed 3" in message and message.endswith("give one of them")
    put_seeds("b", {3: 1.0}, "seg", attn="entmax15")                # another method's
    put_seeds("u", {3: 1.0}, epochs=0)                              # controls of equal seeds do no harm
    put_seeds("v", {3: 1.0}, epochs=0)
    run(capsys)


@pytest.mark.parametrize("text", ["{", "[1]", '{"probe": "knn", "data": "shapes"}', "\udcff"])
def test_unreadable_results_are_named(text):
    put("runs/a/checkpoint_0024.pt", "knn", 1.0)
    bad = Path("runs/a/checkpoint_0020.seg.shapes.json")
    bad.write_bytes(text.encode(errors="surrogateescape"))
    assert str(bad) in (message := refused("runs")) and "run its probe again" in message


def test_no_results():
    assert "runs: no such file" in refused()
    Path("runs").mkdir()
    Path("runs/blocks.json").write_text("{}")                       # of another kind
    assert "runs: no results" in refused()


# ---- output ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", [[], ["--json"]])
def test_out_holds_what_is_printed(capsys, form):
    put("runs/a/checkpoint_0024.pt", "knn", 1.0)
    printed = run(capsys, "runs", "--out", "results/table1.md", *form)
    assert Path("results/table1.md").read_text() == printed and "k-NN" in printed
    assert [path.name for path in Path("results").iterdir()] == ["table1.md"]


def test_runs_that_were_trained_otherwise_are_refused(capsys):
    """Seeds and methods may differ, other people's weights say nothing, and nothing was trained of untrained ones."""
    one = dict(attn="softmax", registers=0, lr=1.0)
    put("runs/a/checkpoint_0024.pt", "knn", 80, run_seed=0, recipe=one)
    put("runs/b/checkpoint_0024.pt", "knn", 81, run_seed=0, recipe=one | dict(attn="entmax15"), attn="entmax15")
    put("runs/c/checkpoint_0024.pt", "knn", 82, run_seed=1)
    put("runs/d/checkpoint_0000.pt", "knn", 40, run_seed=2, epochs=0, recipe=one | dict(lr=2.0))
    assert row(tables(capsys, "runs")[1], "CLS baseline")["n"] == 2
    put("runs/e/checkpoint_0024.pt", "knn", 83, run_seed=3, recipe=one | dict(lr=2.0))
    assert "trained otherwise: lr 1.0 and 2.0" in refused("runs")
