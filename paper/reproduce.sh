#!/usr/bin/env bash
# The exact commands behind every table and figure, from nothing to paper/results/.
#
#     paper/reproduce.sh                                        the embedded data set: over 3 hours on two CPU cores
#     IMAGENET=DIR VOC=DIR NYU=DIR GPUS=8 paper/reproduce.sh    the paper's protocol, with the probes whose data are given
#
# Stop it and start it again: a training goes on from its last save, a probe from its heads, and what is finished takes
# seconds: each tells by itself, from weights, data and flags, whether its result is there. JOBS commands run side by
# side, each with a log of its own; the first that fails stops the others.
# The paper's protocol takes these folders, each as --root of its probe: IMAGENET (train/ and val/), BOXES (XMLs of val),
# VOC, ADE20K, CITYSCAPES, NYU, SUNRGBD (with NYU), KITTI. Also read: SEEDS, METHODS, JOBS, GPUS, and TRAIN_FLAGS and
# PROBE_FLAGS, which are added to every training and to every probe that trains heads. On the embedded data set, LONG:
# seeds of the trainings of softmax and entmax for five times the epochs; LONG= leaves them out, 80 minutes.
set -euo pipefail
shopt -s extglob                                  # +([0-9]) is a number
cd "$(dirname "$0")/.."
METHODS=${METHODS:-softmax softmax_r4 softmax_spec entmax15}
declare -A FLAGS=([softmax]="" [softmax_r4]="--registers 4" [softmax_spec]="--specialize" [entmax15]="--attn entmax15")
roots=${VOC-}${ADE20K-}${CITYSCAPES-}${NYU-}${SUNRGBD-}${KITTI-}${BOXES-}
if [[ ${IMAGENET-} ]]; then
  name=imagenet seeds=${SEEDS:-0} jobs=${JOBS:-1}                   # the paper has one seed
  train=(torchrun --nproc-per-node "${GPUS:-1}" train.py --data "$IMAGENET")
elif [[ $roots ]]; then
  echo "IMAGENET is not set: the paper's protocol pretrains on it; set it, or none of the other data roots" >&2
  exit 2
else
  name=shapes seeds=${SEEDS:-0 1 2 3 4} long=${LONG-0 1}
  cards=$(nvidia-smi --list-gpus 2> /dev/null | wc -l) || cards=0
  jobs=${JOBS:-$((cards > 0 ? 1 : $(nproc)))}     # all would go to the first card
  train=(python train.py)
  export OMP_NUM_THREADS=1                        # so small a model gains 20 % from a second thread
fi

# ---- a pool of jobs
set -m                                            # a job and its children are one process group, which a stop reaches
trap 'exit 130' INT
trap 'exit 1' TERM
trap 'for job in $(jobs -p); do kill -- "-$job" 2> /dev/null || true; done; wait' EXIT

pool() {                                          # LOG COMMAND...: in the background, once fewer than JOBS run
  while (($(jobs -rp | wc -l) >= jobs)); do wait -n || true; done
  echo "$(date +%T)  ${*:2}"
  mkdir -p "$(dirname "$1")"
  (
    trap 'exit 143' TERM                          # runs when the command, which gets the signal too, has saved
    "${@:2}" >> "$1" 2>&1 && exit
    { tail -n 20 "$1"; echo "failed: ${*:2}"; echo "all it said: $1"; } >&2
    kill $$
  ) &
}

finish() {
  while (($(jobs -rp | wc -l))); do wait -n || true; done
}

numbered() { printf '%s\n' "$1"/checkpoint_+([0-9]).pt | sort -V; }

last() { numbered "$1" | tail -n 1; }

thirds() {                                        # 0, 12 and 24 epochs of 0, 4, ..., 24
  numbered "$1" | awk '{ file[NR] = $0 } END { for (i in file) if (i == 1 || (NR - i) % 3 == 0) print file[i] }' | sort -V
}

# ---- pretraining
runs=() long_runs=()
for seed in ${long-}; do                          # the longest first
  for method in softmax entmax15; do
    run=long/${name}_${method}_s$seed             # not below runs/, whose results belong into one table
    long_runs+=("$run")
    pool "$run.log" "${train[@]}" ${FLAGS[$method]} --seed "$seed" --out "$run" --epochs 120 --save-every 20 \
      ${TRAIN_FLAGS-}
  done
done
for seed in $seeds; do
  for method in $METHODS; do
    run=runs/${name}_${method}_s$seed
    runs+=("$run")
    pool "$run.log" "${train[@]}" ${FLAGS[$method]} --seed "$seed" --out "$run" ${TRAIN_FLAGS-}
  done
done
finish

# ---- probes
probe() {                                         # PROBE DATA WEIGHTS FLAGS...
  pool "${3%.pt}.$1.$2.log" python "probe_$1.py" --data "$2" --weights "${@:3}" ${PROBE_FLAGS-}
}

by_block() {                                      # RUN WEIGHTS...: mIoU with and without [CLS], and point-in-box
  pool "$1/seg.log" python probe_seg.py --data shapes --weights "${@:2}" --blocks all --concat-cls both \
    --seed "${1##*_s}" ${PROBE_FLAGS-}
  pool "$1/pib.log" python pib.py --data shapes --weights "${@:2}"
}

first=${seeds%% *}
if [[ $name == shapes ]]; then
  for run in "${runs[@]}"; do
    by_block "$run" $(thirds "$run")
    for what in linear depth; do probe $what shapes "$(last "$run")" --seed "${run##*_s}"; done
  done
  for method in $METHODS; do                      # the untrained control
    for what in linear depth; do probe $what shapes "runs/${name}_${method}_s$first/checkpoint_0000.pt"; done
  done
  for run in ${long_runs[@]+"${long_runs[@]}"}; do
    by_block "$run" "$run"                        # every numbered checkpoint
    pool "$run/knn.log" python probe_linear.py --knn --data shapes --weights "$run"
  done
else
  for run in "${runs[@]}"; do
    weights=$(last "$run")
    probe linear imagenet "$weights" --root "$IMAGENET"
    [[ ! ${VOC-} ]] || probe seg voc "$weights" --root "$VOC"
    [[ ! ${ADE20K-} ]] || probe seg ade20k "$weights" --root "$ADE20K"
    [[ ! ${CITYSCAPES-} ]] || probe seg cityscapes "$weights" --root "$CITYSCAPES"
    [[ ! ${NYU-} ]] || probe depth nyu "$weights" --root "$NYU"
    [[ ! ${NYU-} || ! ${SUNRGBD-} ]] || probe depth sunrgbd "$weights" --root "$SUNRGBD" --train-root "$NYU"
    [[ ! ${KITTI-} ]] || probe depth kitti "$weights" --root "$KITTI"
    [[ ! ${BOXES-} ]] ||
      pool "$run/pib.log" python pib.py --data folder --root "$IMAGENET/val" --boxes "$BOXES" --weights "$run"
  done
  for seed in $seeds; do                          # Fig. 2b; not named as table1.py's results: of another protocol
    for method in softmax entmax15; do
      for weights in "runs/${name}_${method}_s$seed"/checkpoint_+([0-9]).pt; do
        [[ ! ${VOC-} || ! -e $weights ]] || pool "${weights%.pt}.blocks.log" python probe_seg.py --data voc \
          --root "$VOC" --weights "$weights" --blocks all --concat-cls both --out "${weights%.pt}.blocks.json" \
          ${PROBE_FLAGS-}
      done
    done
  done
fi
finish

# ---- figures and tables
figure() { pool "runs/figure_$1.log" python -m paper.figures "${@:2}" --out "paper/results/$1.png"; }

mkdir -p paper/results
folders=() weights=()
for method in $METHODS; do
  folders+=("runs/${name}_${method}_s$first")
  weights+=("$(last "${folders[-1]}")")
done
pictures=(--data shapes --count 4 --size 128) one=(--data shapes --count 1)
if [[ $name != shapes ]]; then
  all=("$IMAGENET"/val/*/*)
  pictures=(--size 448 --images "${all[0]}" "${all[${#all[@]} / 4]}" "${all[${#all[@]} / 2]}" "${all[-1]}")
  one=(--size 448 --images "${all[0]}")
fi
figure pca pca --weights "${folders[-1]}/checkpoint_0000.pt" "${weights[@]}" "${pictures[@]}"     # untrained beside them
figure attention attention --weights "${weights[@]}" "${one[@]}"
figure curves curves --runs "${folders[@]}"

files_of() {                                      # FOLDER METHOD RESULTS SEEDS: RESULTS in each of the runs, one a line
  local seed
  for seed in $4; do compgen -G "$1/${name}_$2_s$seed/$3" || true; done
}

map() {                                           # FOLDER METHOD RESULTS SEEDS NAME FLAGS...: mean over seeds
  local files
  mapfile -t files < <(files_of "${@:1:4}")
  ((${#files[@]} == 0)) || figure "$5" heatmap --results "${files[@]}" "${@:6}"
}

difference() {                                    # FOLDER RESULTS SEEDS NAME FLAGS...: entmax15 - softmax, seed by seed
  local minus
  mapfile -t minus < <(files_of "$1" softmax "$2" "$3")
  ((${#minus[@]} == 0)) || map "$1" entmax15 "$2" "$3" "$4" --minus "${minus[@]}" "${@:5}"
}

pib='*.pib.*.json' seg='*.seg.*.json' range=(40 60)
[[ $name == shapes ]] || seg='*.blocks.json' range=(0 60)
for method in $METHODS; do                        # of one range, or their colours would not compare
  map runs "$method" "$pib" "$seeds" "pib_$method" --range 0 80
  for cls in no yes; do
    map runs "$method" "$seg" "$seeds" "miou_${method}_cls_$cls" --concat-cls $cls --range "${range[@]}"
  done
done
both=
[[ " $METHODS " != *" softmax "* || " $METHODS " != *" entmax15 "* ]] || both=$seeds
difference runs "$pib" "$both" pib_difference
for cls in no yes; do difference runs "$seg" "$both" "miou_difference_cls_$cls" --concat-cls $cls; done
if [[ $name == shapes ]]; then
  for metric in auc_own auc_other auc_background; do
    map runs softmax "$pib" "$both" "${metric}_softmax" --metric $metric --range 50 100
    difference runs "$pib" "$both" "${metric}_difference" --metric $metric
  done
  for method in softmax entmax15; do              # the long runs
    for cls in no yes; do
      map long $method "$seg" "$long" "long_miou_${method}_cls_$cls" --concat-cls $cls --range "${range[@]}"
    done
    map long $method "$pib" "$long" "long_auc_other_$method" --metric auc_other --range 50 100
  done
  for cls in no yes; do difference long "$seg" "$long" "long_miou_difference_cls_$cls" --concat-cls $cls; done
fi
finish
python -m paper.table1 "${runs[@]}" --out paper/results/table1.md
echo "$((SECONDS / 60)) min; paper/results/ holds the tables and figures"
