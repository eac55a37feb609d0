"""Table 1: the results of the probes, one row for each method, and the methods' differences seed by seed.

    python -m paper.table1                                                every result below runs/
    python -m paper.table1 runs/a runs/b --out paper/results/table1.md    of these only; --json for programs

The paper's data sets beside the paper's values (complete data and trained weights only; what is left out is named), and
the embedded shapes with untrained weights and chance beside them. A row is a method: (attn, registers, specialize).
First mean ± sd over n pretraining runs, then differences: one seed gives every method the same crops in the same order,
so a run is compared with the CLS baseline of its seed, and the mean difference has a 95 % interval by Student's t.

A result's `seed` is the probe's, so a run is told by its weights: one file (sha256) is one run, and the checkpoints of
a run folder are one run, of which the last epoch with a result counts. Results of one run in one column (of several
probe seeds) enter as their mean.

Refused: a result whose weights have changed since, a table of unequal models, trainings, protocols or data, and two
runs of one method and seed. Other people's weights do not say how they were trained: give what belongs together.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path

BASELINE = "CLS baseline"


def metric(name):
    return lambda r: r["metrics"][name]


def last_block(name):
    """None of a result that lacks it."""
    return lambda r: r["metrics"].get(name, [None])[-1]


def miou(concat_cls=False, best=False):
    """Of the last block, or the best one where all are there; None of a result that lacks a head this needs."""
    def value(r):
        heads = {(head["block"], head["concat_cls"]): head["miou"] for head in r["metrics"].get("heads", [])}
        depth = r["config"]["depth"]
        values = [heads.get((block, concat_cls)) for block in range(0 if best else depth - 1, depth)]
        return None if None in values else max(values)
    return value


# column: (probe, data, value of a result)
REAL = {
    "IN-1K top-1 %": ("linear", "imagenet", metric("top1")),
    "VOC mIoU %": ("seg", "voc", metric("miou")),
    "ADE20K mIoU %": ("seg", "ade20k", metric("miou")),
    "Cityscapes mIoU %": ("seg", "cityscapes", metric("miou")),
    "NYUv2 RMSE m": ("depth", "nyu", metric("rmse")),
    "SUN RGB-D RMSE m": ("depth", "sunrgbd", metric("rmse")),
    "KITTI RMSE m": ("depth", "kitti", metric("rmse")),
}
SHAPES = {                                                          # and chance, or the best constant
    "k-NN top-1 %": ("knn", "shapes", metric("top1"), lambda r: 100 / r["protocol"]["classes"]),
    "linear top-1 %": ("linear", "shapes", metric("top1"), lambda r: 100 / r["protocol"]["classes"]),
    "mIoU %": ("seg", "shapes", miou(), metric("miou_constant")),
    "mIoU % best block": ("seg", "shapes", miou(best=True), metric("miou_constant")),
    "mIoU % + [CLS]": ("seg", "shapes", miou(concat_cls=True), metric("miou_constant")),
    "RMSE m": ("depth", "shapes", metric("rmse"), metric("rmse_constant")),
    "PiB %": ("pib", "shapes", lambda r: r["metrics"]["pib"][-1], metric("chance")),
    "own class AUC %": ("pib", "shapes", last_block("auc_own"), lambda r: 50),
    "other class AUC %": ("pib", "shapes", last_block("auc_other"), lambda r: 50),
    "background AUC %": ("pib", "shapes", last_block("auc_background"), lambda r: 50),
}
LEGEND = ("mIoU, PiB and AUC are of the last block, the best block is each run's own, and + [CLS] puts it beside every "
          "patch. RMSE is of heads that have not converged. AUC, within patches: how well ridge regression tells from "
          "one patch the class of its own card, which classes more than two patches off are in the scene, or, of a "
          "patch without a card near, which are. An untrained network is above 50 % too.")
PAPER = {                                                           # Table 1, one seed: the columns of REAL
    BASELINE: (69.50, 42.80, 19.85, 36.79, 0.834, 0.674, 6.743),
    "Register-4": (70.03, 44.34, 19.52, 36.00, 0.814, 0.667, 6.749),
    "Specialization": (70.04, 46.22, 20.51, 36.45, 0.829, 0.660, 6.723),
    "Entmax-1.5": (70.06, 48.78, 21.97, 37.87, 0.829, 0.669, 6.739),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("results", nargs="*", default=["runs"], metavar="FILE_OR_FOLDER",
                   help="result files of the probes and of pib.py, or folders with such files at any depth")
    p.add_argument("--json", action="store_true", help="JSON with every single value and its file, not Markdown")
    p.add_argument("--out", help="file to write it to as well")
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------------- reading
def find_results(names):
    """Sorted paths of the result files given, or below the folders given."""
    found = set()
    for name in map(Path, names):
        if not name.exists():
            raise FileNotFoundError(f"{name}: no such file or folder; give results of the probes, or run folders")
        below = (path for path in name.rglob("*.json") if re.search(r"(^|\.)(knn|linear|seg|depth|pib)\.", path.name))
        found.update(below if name.is_dir() else [name])
    if not found:
        raise FileNotFoundError(f"{', '.join(names)}: no results (*.knn.*.json, linear, seg, depth, pib); run the "
                                "probes first, such as probe_linear.py --knn --weights RUN_FOLDER")
    return sorted(found)


def method(attn, registers, specialize):
    parts = ["Entmax-1.5"] * (attn == "entmax15") + [f"Register-{registers}"] * (registers > 0)
    return " + ".join(parts + ["Specialization"] * specialize) or BASELINE


def read_result(path):
    """The JSON of a probe with its file, row, run and {column: value}, and why no table takes it, or None."""
    try:
        result = json.loads(path.read_text())
        probe, data, config, weights = (result[key] for key in ("probe", "data", "config", "weights"))
        untrained = weights == "random" or result["epochs"] == 0
        columns = {name: column for name, column in (REAL | SHAPES).items() if column[:2] == (probe, data)}
        values = {name: v for name, column in columns.items() if (v := column[2](result)) is not None}
        result.update(
            file=str(path), untrained=untrained, values=values, run=run_of(result, path),
            run_seed=result.get("run_seed"),                        # of foreign and of older files unknown
            row="untrained, " * untrained + method(*(config[key] for key in ("attn", "registers", "specialize"))),
            chance={name: chance(result) for name, column in columns.items() for chance in column[3:]},
            left_out=None if values else f"no column for {probe} on {data}" + ", of these blocks" * bool(columns),
        )
        if values and data != "shapes":
            result["left_out"] = "partial data" if result["protocol"]["partial"] else "untrained" if untrained else None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a result of the probes ({type(error).__name__}: {error}); remove it, or run its "
                         "probe again") from error
    return result


def home(result, path):
    """Folder of the weights: that of the result where it has its default name, for it may have moved with them."""
    weights = Path(result["weights"])
    return path.parent if path.name.startswith(f"{weights.stem}.{result['probe']}.") else weights.parent


def run_of(result, path):
    """Name of the pretraining run."""
    if result["weights"] == "random":
        return f"random, seed {result['seed']}"
    if re.fullmatch(r"checkpoint(_\d{4,})?\.pt", Path(result["weights"]).name):      # train.py's names
        return str(home(result, path).resolve())
    return result["weights_sha256"]


def last_epochs(results):
    """Those that count: of each run the last epoch. The same weights in two places are one run."""
    runs, last = {}, {}
    for r in results:
        r["run"] = runs.setdefault(r["weights_sha256"] or r["run"], r["run"])
        key = r["row"], r["run"]
        last[key] = max(last.get(key, 0), r["epochs"] or 0)         # unknown of a foreign file
    return [r for r in results if (r["epochs"] or 0) == last[r["row"], r["run"]]]


# ------------------------------------------------------------------------------------------- what must agree
@functools.cache
def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_weights(result):
    """The weights a result names, where they are still there, must be those it was measured on."""
    path, weights = Path(result["file"]), Path(result["weights"])
    for candidate in (home(result, path) / weights.name, weights):
        if result["weights"] != "random" and candidate.is_file():
            if sha256(candidate) != result["weights_sha256"]:
                raise ValueError(f"{path}: measured on other weights than {candidate} holds now (sha256 "
                                 f"{result['weights_sha256'][:12]}, now {sha256(candidate)[:12]}); run the probe again")
            return


def architecture(result):
    """Config without what a row stands for, and without drop_path, which acts in training only."""
    return {k: v for k, v in result["config"].items() if k not in ("attn", "registers", "specialize", "drop_path")}


def training(result):
    """The recipe without what a row stands for, as train.py wrote it into the weights."""
    return {k: v for k, v in result["recipe"].items() if k not in ("attn", "registers", "specialize")}


def refuse_other_data(results, column):
    """A protocol's fingerprint is of the pictures and labels that were really read."""
    known = [r for r in results if "fingerprint" in r["protocol"]]
    for r in results if known else ():
        if "fingerprint" not in r["protocol"]:
            raise ValueError(f"{r['file']}: measured before results said on which data, and {known[0]['file']} says; "
                             "run the probe again")
    refuse_unequal(known, f"{column} of different data", lambda r: {"fingerprint": r["protocol"]["fingerprint"]})


def refuse_unequal(results, what, view):
    for other in results[1:]:
        a, b = view(results[0]), view(other)
        differing = [f"{key} {a.get(key, 'absent')} and {b.get(key, 'absent')}" for key in sorted(a | b)
                     if (key in a, a.get(key)) != (key in b, b.get(key))]
        if differing:
            raise ValueError(f"{results[0]['file']} and {other['file']}: {what}: {', '.join(differing)}; run the one "
                             "like the other, or give only files that belong together")


def refuse_equal_seeds(results):
    first = {}
    for b in (r for r in results if r["run_seed"] is not None):
        a = first.setdefault((b["row"], b["run_seed"]), b)
        if a["run"] != b["run"]:
            raise ValueError(f"{a['file']} and {b['file']}: two runs of {b['row']} with seed {b['run_seed']}, and only "
                             "one can be compared with the baseline's; give one of them")


# ------------------------------------------------------------------------------------------- statistics
def t_quantile(df):
    """97.5 % quantile of Student's t with df degrees of freedom, a whole number >= 1. P(|T| < t) has a closed form in
    the angle atan(t / sqrt(df)), Abramowitz & Stegun 26.7.3 and 26.7.4, which is bisected."""
    def inside(angle):
        odd, total = df % 2, 0
        term = math.cos(angle) ** odd
        for power in range(odd, df - 1, 2):
            total += term
            term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
        total *= math.sin(angle)
        return (angle + total) * 2 / math.pi if odd else total

    low, high = 0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def compare(cell, baseline):
    """Over the seeds that both cells have: the differences, their mean and its 95 % interval (None of a single one)."""
    mine, other = (dict(zip(c["seeds"], c["values"], strict=True)) for c in (cell, baseline))
    seeds = sorted(mine.keys() & other.keys() - {None})
    differences, n, low, high = [mine[seed] - other[seed] for seed in seeds], len(seeds), None, None
    mean = statistics.fmean(differences) if seeds else None
    if n > 1:
        half = t_quantile(n - 1) * statistics.stdev(differences) / math.sqrt(n)
        low, high = mean - half, mean + half
    return dict(n=n, seeds=seeds, differences=differences, mean=mean, low=low, high=high,
                leaves_out_0=not low <= 0 <= high if n > 1 else None)


# ------------------------------------------------------------------------------------------- tables
def cell(results, column):
    """Over runs; sd is None of a single one."""
    runs = {}
    for r in results:
        runs.setdefault(r["run"], []).append(r)
    values = [statistics.fmean(r["values"][column] for r in rs) for rs in runs.values()]
    return dict(n=len(values), mean=statistics.fmean(values),
                sd=statistics.stdev(values) if len(values) > 1 else None, values=values,
                seeds=[next(iter({r["run_seed"] for r in rs} - {None}), None) for rs in runs.values()],
                files=[r["file"] for r in results])


def make_table(title, columns, results, paper):
    """Everything that is printed of one table, in plain types. `paper`: {method: values of the columns}."""
    taken = {name: [r for r in results if name in r["values"]] for name in columns}
    results = [r for r in results if r["values"].keys() & columns.keys()]
    trained = [r for r in results if not r["untrained"]]
    for r in results:
        check_weights(r)
    refuse_unequal(results, "different models", architecture)
    refuse_unequal(trained, "different weights", lambda r: {key: r[key] for key in ("epochs", "which")})
    refuse_equal_seeds(trained)
    refuse_unequal([r for r in trained if r.get("recipe")], "trained otherwise", training)
    for name in columns:
        refuse_other_data(taken[name], name)
        refuse_unequal(taken[name], f"{name} of different protocols", lambda r: r["protocol"])

    rank, rows = {name: i for i, name in enumerate(PAPER)}, []
    for row in sorted({r["row"] for r in results} | paper.keys(), key=lambda row: (
            "untrained" in row, rank.get(row.removeprefix("untrained, "), len(rank)), row)):
        mine = {name: [r for r in taken[name] if r["row"] == row] for name in columns}
        rows.append(dict(
            method=row, untrained=row.startswith("untrained"), n=len({r["run"] for rs in mine.values() for r in rs}),
            cells={name: cell(rs, name) for name, rs in mine.items() if rs},
            paper=dict(zip(columns, paper[row], strict=True)) if row in paper else None,
            not_measured=[name for name, rs in mine.items() if not rs],
        ))
    trained_rows = {row["method"]: row["cells"] for row in rows if not row["untrained"]}
    baseline = trained_rows.pop(BASELINE, {})
    pairs = [dict(column=name, method=row, baseline=BASELINE, **compare(cells[name], baseline[name]))
             for name in columns for row, cells in trained_rows.items() if name in cells and name in baseline]
    return dict(
        title=title, columns=list(columns), rows=rows, pairs=[pair for pair in pairs if pair["n"]],
        chance={name: rs[0]["chance"][name] for name, rs in taken.items() if rs and name in rs[0]["chance"]},
        centre=next((r["metrics"]["centre"] for r in results if "centre" in r["metrics"]), None),
        model=architecture(results[0]) if results else None,
        epochs=trained[0]["epochs"] if trained else None, which=trained[0]["which"] if trained else None,
    )


def collect(results):
    sha256.cache_clear()                                            # files may have changed since the last call
    counted = last_epochs([r for r in results if not r["left_out"]])
    return dict(
        tables=[make_table("The paper's data sets", REAL, counted, PAPER),
                make_table("Embedded shapes", SHAPES, counted, {})],
        left_out=[dict(file=r["file"], why=r["left_out"]) for r in results if r["left_out"]],
    )


# ------------------------------------------------------------------------------------------- Markdown
def number(value, column, sign=""):
    return format(value, sign + (".3f" if column.endswith(" m") else ".2f"))


def show(cell, column, n):
    if not cell:
        return "–"
    spread = f" ± {number(cell['sd'], column)}" if cell["sd"] is not None else ""
    return number(cell["mean"], column) + spread + f" (n = {cell['n']})" * (cell["n"] != n)


def show_pair(pair, column, n):
    if not pair:
        return "–"
    text = number(pair["mean"], column, "+")
    if pair["n"] > 1:
        text += f" [{number(pair['low'], column, '+')}, {number(pair['high'], column, '+')}]"
    return (f"**{text}**" if pair["leaves_out_0"] else text) + f" (n = {pair['n']})" * (pair["n"] != n)


def grid(columns, lines):
    lines = [["method", "n", *columns], ["---"] * (2 + len(columns)), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def means(table):
    columns, chance, lines = table["columns"], table["chance"], []
    for row in table["rows"]:
        if row["paper"]:
            lines.append([row["method"] + ", paper", 1, *(number(row["paper"][name], name) for name in columns)])
        if table["model"]:
            lines.append([row["method"] + ", here" * bool(row["paper"]), row["n"],
                          *(show(row["cells"].get(name), name, row["n"]) for name in columns)])
    if chance:
        lines.append(["chance, or the best constant", "",
                      *(number(chance[name], name) if name in chance else "–" for name in columns)])
    return grid(columns, lines)


def differences(table):
    """Blocks on the pairs, and on what has none."""
    columns, pairs, lines, alone, blocks = table["columns"], table["pairs"], [], [], []
    rows = {row["method"]: row["cells"] for row in table["rows"] if row["cells"] and not row["untrained"]}
    if rows and rows.pop(BASELINE, None) is None:
        return [f"Nothing is compared: no trained {BASELINE} is among the results."]
    for method, cells in rows.items():
        mine = {pair["column"]: pair for pair in pairs if pair["method"] == method}
        if mine:
            n = max(pair["n"] for pair in mine.values())
            lines.append([method, n, *(show_pair(mine.get(name), name, n) for name in columns)])
        if cells.keys() - mine:
            alone.append(f"{method} ({', '.join(name for name in cells if name not in mine) if mine else 'all'})")
    if lines:
        blocks += [f"#### Difference to the {BASELINE} of the same seed", grid(columns, lines),
                   "Mean over n seeds [95 % interval by Student's t, from two seeds on]; bold: it leaves out 0."]
    if intervals := [pair["leaves_out_0"] for pair in pairs if pair["n"] > 1]:
        blocks[-1] += (f" Comparisons with an interval: {len(intervals)}, of which {sum(intervals)} leave out 0, where "
                       f"{len(intervals) / 20:g} would by chance if all methods were equal; columns of the same "
                       "networks are not independent, nor are methods that share a baseline. The intervals are over "
                       "pretraining seeds, given these scenes.")
    if alone:
        blocks.append(f"Not compared, without a known seed in common with the {BASELINE}: {'; '.join(alone)}.")
    return blocks


def markdown(content):
    blocks = []
    for table in content["tables"]:
        blocks += [f"### {table['title']}", means(table)]
        if table["model"]:
            blocks.append("n counts pretraining runs, ± is their sample sd. Model: "
                          + ", ".join(f"{key} {value}" for key, value in table["model"].items())
                          + (f"; {table['which']} after epoch {table['epochs']}." if table["which"] else "."))
        if table["chance"]:
            blocks.append(LEGEND)
        if table["centre"] is not None:
            blocks.append(f"Chance of PiB is that of a random patch; always answering the centre has "
                          f"{number(table['centre'], 'PiB %')}.")
        missing = [f"{row['method']} ({', '.join(row['not_measured']) if row['cells'] else 'all'})"
                   for row in table["rows"] if row["not_measured"]] if table["model"] else ["all of it"]
        if missing:
            blocks.append("Not measured here: " + "; ".join(missing) + ".")
        blocks += differences(table)
    if content["left_out"]:
        blocks.append("Left out: " + ", ".join(f"{r['file']} ({r['why']})" for r in content["left_out"]) + ".")
    return "\n\n".join(blocks)


def main(argv=None):
    args = parse_args(argv)
    try:
        content = collect([read_result(path) for path in find_results(args.results)])
        text = json.dumps(content, indent=1) if args.json else markdown(content)
        text = text.encode(errors="backslashreplace").decode()      # file names need be no UTF-8
        if args.out:
            half = Path(args.out + ".tmp")
            half.parent.mkdir(parents=True, exist_ok=True)
            half.write_text(text + "\n")
            os.replace(half, args.out)
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}; give another --out" if error.filename else str(error))
    except ValueError as error:
        sys.exit(str(error))
    print(text)


if __name__ == "__main__":
    main()
