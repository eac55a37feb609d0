"""Table 1: the results of the probes as mean ± sd over pretraining seeds, one row for each method.

    python -m paper.table1                                                every result below runs/
    python -m paper.table1 runs/a runs/b --out paper/results/table1.md    of these only; --json for programs

Two tables: the paper's data sets beside the paper's values (complete data and trained weights only; what is left out is
named), and the embedded shapes with untrained weights and chance beside them. A row is a method: (attn, registers,
specialize). n counts pretraining runs. A result's `seed` is the probe's, so a run is told by its weights: one file
(sha256) is one run, and the checkpoints of a run folder are one run, of which the last epoch with a result counts.
Results of one run in one column (of several probe seeds) enter as their mean.

Refused: a result whose weights have changed since, and a table of unequal models, epochs, protocols or data. A result
does not say what its weights were trained on: give folders that belong together.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import re
import statistics
import sys
from pathlib import Path

# column: (probe, data, metric)
REAL = {
    "IN-1K top-1 %": ("linear", "imagenet", "top1"),
    "VOC mIoU %": ("seg", "voc", "miou"),
    "ADE20K mIoU %": ("seg", "ade20k", "miou"),
    "Cityscapes mIoU %": ("seg", "cityscapes", "miou"),
    "NYUv2 RMSE m": ("depth", "nyu", "rmse"),
    "SUN RGB-D RMSE m": ("depth", "sunrgbd", "rmse"),
    "KITTI RMSE m": ("depth", "kitti", "rmse"),
}
SHAPES = {
    "k-NN top-1 %": ("knn", "shapes", "top1"),
    "linear top-1 %": ("linear", "shapes", "top1"),
    "mIoU %": ("seg", "shapes", "miou"),
    "RMSE m": ("depth", "shapes", "rmse"),
    "PiB %": ("pib", "shapes", "pib"),                              # of the last block
}
PAPER = {                                                           # Table 1, one seed: the columns of REAL
    "CLS baseline": (69.50, 42.80, 19.85, 36.79, 0.834, 0.674, 6.743),
    "Register-4": (70.03, 44.34, 19.52, 36.00, 0.814, 0.667, 6.749),
    "Specialization": (70.04, 46.22, 20.51, 36.45, 0.829, 0.660, 6.723),
    "Entmax-1.5": (70.06, 48.78, 21.97, 37.87, 0.829, 0.669, 6.739),
}
CHANCE = {                                                          # or the best constant, of a result on shapes
    "knn": lambda r: 100 / r["protocol"]["classes"],
    "linear": lambda r: 100 / r["protocol"]["classes"],
    "seg": lambda r: r["metrics"]["miou_constant"],
    "depth": lambda r: r["metrics"]["rmse_constant"],
    "pib": lambda r: r["metrics"]["chance"],
}
COLUMNS = {(probe, data): metric for probe, data, metric in [*REAL.values(), *SHAPES.values()]}
RULE = ("Two methods differ beyond the spread where their means differ by more than the sum of their sds, each of two "
        "runs or more. That is a reading, not a test: with three seeds each, one pair in twelve of equal methods does "
        "so by chance.")


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
    return " + ".join(parts + ["Specialization"] * specialize) or "CLS baseline"


def read_result(path):
    """The JSON of a probe with its file, row, run and value, and why no table takes it, or None."""
    try:
        result = json.loads(path.read_text())
        probe, data, config, weights = (result[key] for key in ("probe", "data", "config", "weights"))
        untrained = weights == "random" or result["epochs"] == 0
        metric = COLUMNS.get((probe, data))
        value = result["metrics"][metric] if metric else None
        result.update(
            file=str(path), untrained=untrained, value=value[-1] if probe == "pib" and metric else value,
            row="untrained, " * untrained + method(*(config[key] for key in ("attn", "registers", "specialize"))),
            run=run_of(result, path), left_out=f"no column for {probe} on {data}" if not metric else None,
        )
        if data == "shapes":
            result["chance"] = CHANCE[probe](result)
        elif metric:
            result["left_out"] = "partial data" if result["protocol"]["partial"] else "untrained" if untrained else None
    except (ValueError, KeyError, TypeError) as error:
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


# ------------------------------------------------------------------------------------------- tables
def cell(results):
    """Over runs; sd is None of a single one."""
    by_run = {}
    for r in results:
        by_run.setdefault(r["run"], []).append(r["value"])
    values = [statistics.fmean(values) for values in by_run.values()]
    return dict(n=len(values), mean=statistics.fmean(values),
                sd=statistics.stdev(values) if len(values) > 1 else None, values=values,
                files=[r["file"] for r in results])


def compare(rows, column):
    """Every pair of trained rows with n >= 2: difference of the means, sum of the sds, and whether it is less."""
    known = [r for r in rows if not r["untrained"] and column in r["cells"] and r["cells"][column]["n"] > 1]
    pairs = []
    for b, a in itertools.combinations(known, 2):
        x, y = a["cells"][column], b["cells"][column]
        difference, spread = x["mean"] - y["mean"], x["sd"] + y["sd"]
        pairs.append(dict(column=column, methods=[a["method"], b["method"]], difference=difference, spread=spread,
                          beyond=abs(difference) > spread))
    return pairs


def make_table(title, columns, results, paper):
    """Everything that is printed of one table, in plain types. `paper`: {method: values of the columns}."""
    taken = {name: [r for r in results if columns[name][:2] == (r["probe"], r["data"])] for name in columns}
    results = list(itertools.chain(*taken.values()))
    trained = [r for r in results if not r["untrained"]]
    for r in results:
        check_weights(r)
    refuse_unequal(results, "different models", architecture)
    refuse_unequal(trained, "different weights", lambda r: {key: r[key] for key in ("epochs", "which")})
    for name in columns:
        refuse_other_data(taken[name], name)
        refuse_unequal(taken[name], f"{name} of different protocols", lambda r: r["protocol"])

    rank, rows = {name: i for i, name in enumerate(PAPER)}, []
    for row in sorted({r["row"] for r in results} | paper.keys(), key=lambda row: (
            "untrained" in row, rank.get(row.removeprefix("untrained, "), len(rank)), row)):
        mine = {name: [r for r in taken[name] if r["row"] == row] for name in columns}
        rows.append(dict(
            method=row, untrained=row.startswith("untrained"), n=len({r["run"] for rs in mine.values() for r in rs}),
            cells={name: cell(rs) for name, rs in mine.items() if rs},
            paper=dict(zip(columns, paper[row], strict=True)) if row in paper else None,
            not_measured=[name for name, rs in mine.items() if not rs],
        ))
    return dict(
        title=title, columns=list(columns), rows=rows, pairs=[p for name in columns for p in compare(rows, name)],
        chance={} if paper else {name: rs[0]["chance"] for name, rs in taken.items() if rs},
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


def show(row, column):
    if column not in row["cells"]:
        return "–"
    c = row["cells"][column]
    return (number(c["mean"], column) + (f" ± {number(c['sd'], column)}" if c["sd"] is not None else "")
            + f" (n = {c['n']})" * (c["n"] != row["n"]))


def markdown_table(table):
    columns, lines = table["columns"], []

    def line(*cells):
        lines.append("| " + " | ".join(map(str, cells)) + " |")

    line("method", "n", *columns)
    line(*["---"] * (2 + len(columns)))
    for row in table["rows"]:
        if row["paper"]:
            line(row["method"] + ", paper", 1, *(number(row["paper"][name], name) for name in columns))
        if table["model"]:
            line(row["method"] + ", here" * bool(row["paper"]), row["n"], *(show(row, name) for name in columns))
    if table["chance"]:
        line("chance, or the best constant", "", *(number(table["chance"][name], name) if name in table["chance"]
                                                   else "–" for name in columns))
    return lines


def reading(table):
    """Lines on which pairs of methods differ by more than their spread."""
    lines = []
    for column in table["columns"]:
        pairs = {True: [], False: []}
        for p in (p for p in table["pairs"] if p["column"] == column):
            pairs[p["beyond"]].append(f"{' against '.join(p['methods'])} {number(p['difference'], column, '+')} "
                                      f"(spread {number(p['spread'], column)})")
        alone = [row["method"] for row in table["rows"]
                 if not row["untrained"] and column in row["cells"] and row["cells"][column]["n"] == 1]
        parts = {"beyond the spread": pairs[True], "within it": pairs[False], "n = 1, nothing to say": alone}
        if any(parts.values()):
            lines.append(f"- {column}: " + "; ".join(f"{name}: {', '.join(v)}" for name, v in parts.items() if v))
    return lines


def markdown(content):
    blocks = []
    for table in content["tables"]:
        blocks += [f"### {table['title']}", "\n".join(markdown_table(table))]
        if table["model"]:
            blocks.append("n counts pretraining runs, ± is their sample sd. Model: "
                          + ", ".join(f"{key} {value}" for key, value in table["model"].items())
                          + (f"; {table['which']} after epoch {table['epochs']}." if table["which"] else "."))
        if table["centre"] is not None:
            blocks.append(f"Chance of PiB is that of a random patch; always answering the centre has "
                          f"{number(table['centre'], 'PiB %')}.")
        missing = [f"{row['method']} ({', '.join(row['not_measured']) if row['cells'] else 'all'})"
                   for row in table["rows"] if row["not_measured"]] if table["model"] else ["all of it"]
        if missing:
            blocks.append("Not measured here: " + "; ".join(missing) + ".")
        if lines := reading(table):
            blocks += [RULE, "\n".join(lines)]
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
