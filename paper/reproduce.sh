#!/usr/bin/env bash
# The exact commands behind every table and figure, from nothing to paper/results/.
#
#     paper/reproduce.sh                                        the embedded data set: about 45 minutes on two CPU cores
#     IMAGENET=DIR VOC=DIR NYU=DIR GPUS=8 paper/reproduce.sh    the paper's protocol, with the probes whose data are given
#
# Stop it and start it again: a training goes on from its last save, a probe from its heads, and what is finished takes
# seconds: each tells by itself, from weights, data and flags, whether its result is there. JOBS commands run side by
# side, each with a log of its own; the first that fails stops the others.
# The paper's protocol takes these folders, each as --root of its probe: IMAGENET (train/ and val/), BOXES (XMLs of val),
# VOC, ADE20K, CITYSCAPES, NYU, SUNRGBD (with NYU), KITTI. Also read: SEEDS, METHODS, JOBS, GPUS, and TRAIN_FLAGS and
# PROBE_FLAGS, which are added to every training and to every probe that trains heads.
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
  name=shapes seeds=${SEEDS:-0 1 2} jobs=${JOBS:-$(nproc)}
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

last() { printf '%s\n' "$1"/checkpoint_+([0-9]).pt | sort -V | tail -n 1; }

# ---- pretraining
runs=()
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

probes() {                                        # WEIGHTS: on all data at hand
  if [[ $name == shapes ]]; then
    for what in linear seg depth; do probe $what shapes "$1"; done
    return
  fi
  probe linear imagenet "$1" --root "$IMAGENET"
  [[ ! ${VOC-} ]] || probe seg voc "$1" --root "$VOC"
  [[ ! ${ADE20K-} ]] || probe seg ade20k "$1" --root "$ADE20K"
  [[ ! ${CITYSCAPES-} ]] || probe seg cityscapes "$1" --root "$CITYSCAPES"
  [[ ! ${NYU-} ]] || probe depth nyu "$1" --root "$NYU"
  [[ ! ${NYU-} || ! ${SUNRGBD-} ]] || probe depth sunrgbd "$1" --root "$SUNRGBD" --train-root "$NYU"
  [[ ! ${KITTI-} ]] || probe depth kitti "$1" --root "$KITTI"
}

pib() {                                           # RUN: every numbered checkpoint
  local data=(shapes)
  [[ $name == shapes ]] || data=(folder --root "$IMAGENET/val" --boxes "${BOXES-}")
  pool "$1/pib.log" python pib.py --data "${data[@]}" --weights "$1"
}

for run in "${runs[@]}"; do
  probes "$(last "$run")"
  [[ $name != shapes && ! ${BOXES-} ]] || pib "$run"
done

first=${seeds%% *}
for method in $METHODS; do                        # the untrained control
  [[ $name != shapes ]] || probes "runs/${name}_${method}_s$first/checkpoint_0000.pt"
done

segmentation=(shapes)                             # Fig. 2b; not named as table1.py's results, being of another protocol
[[ $name == shapes ]] || segmentation=(voc --root "${VOC-}")
for method in softmax entmax15; do
  [[ $name == shapes || ${VOC-} ]] || continue
  for weights in "runs/${name}_${method}_s$first"/checkpoint_+([0-9]).pt; do
    [[ ! -e $weights ]] || pool "${weights%.pt}.blocks.log" python probe_seg.py --data "${segmentation[@]}" \
      --weights "$weights" --blocks all --concat-cls both --out "${weights%.pt}.blocks.json" ${PROBE_FLAGS-}
  done
done
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
for run in "${folders[@]}"; do                    # of one range, or their colours would not compare
  which=${run#runs/"${name}"_}
  maps=("$run"/*.pib.*.json)
  [[ ! -e ${maps[0]} ]] || figure "pib_$which" heatmap --results "${maps[@]}" --range 0 80
  maps=("$run"/*.blocks.json)
  [[ ! -e ${maps[0]} ]] || for cls in no yes; do
    figure "miou_${which}_cls_$cls" heatmap --results "${maps[@]}" --concat-cls $cls --range 0 60
  done
done
finish
python -m paper.table1 "${runs[@]}" --out paper/results/table1.md
echo "$((SECONDS / 60)) min; paper/results/ holds the tables and figures"
