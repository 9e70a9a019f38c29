#!/usr/bin/env bash
# The commands behind this folder's tables, spread over the GPUs at hand, but those of the variants, the elastic retrofit, L 8,000, and prompt + window at CR 2
# and 8, which README.md has. What is done is not done again: call it again after a kill.
#
#   bash experiments/results/hyperscale/run.sh train retrofits sweep rivals lora times analyse
#
# train: the dense reasoner of each seed but 0, which comes with the library; retrofits: of all weights, for each CR; sweep: the dense cache
# and DMS; rivals: every baseline on each seed; lora: retrofits of low rank and their scores; times: the dense cache and DMS of seed 0 in
# 2 GiB of cache, with nothing else on the GPU; analyse: the pages.
#
#   OUT    results, default runs/hyperscale      SEEDS  default 0,1      FAMILIES  default countdown,grids,programs,graphs
#   CRS    of DMS, default 2,3,4,6,8,12      LENGTHS  L, default 240,480,960,1920,3840
#   GPUS   ids, default 0      EACH  processes that share a GPU, default 6      SMALL=1  short chains of few problems, to try the script
set -euo pipefail
cd "$(dirname "$0")/../../.."
OUT=${OUT:-runs/hyperscale} EACH=${EACH:-6}
IFS=, read -ra crs <<<"${CRS:-2,3,4,6,8,12}"
IFS=, read -ra gpus <<<"${GPUS:-0}"
IFS=, read -ra seeds <<<"${SEEDS:-0,1}"
IFS=, read -ra families <<<"${FAMILIES:-countdown,grids,programs,graphs}"
rows="--retrofit.batch_size=16 --retrofit.seq_len=4096 --retrofit.schedule.steps=0 --retrofit.schedule.steps_per_cr=80 --retrofit.schedule.hold_steps=100 --retrofit.optimizer.decay_steps=600"
steps=8000 lengths="--max_tokens=${LENGTHS:-240,480,960,1920,3840} --width=1024" scored=960,3840
lora=(--retrofit.schedule.steps_per_cr=50 --retrofit.schedule.hold_steps=60 --retrofit.optimizer.decay_steps=450)
if [[ -n "${SMALL:-}" ]]; then
  rows="--retrofit.batch_size=2 --retrofit.seq_len=512 --retrofit.schedule.steps=0 --retrofit.schedule.steps_per_cr=1 --retrofit.schedule.hold_steps=1 --retrofit.optimizer.decay_steps=1"
  steps=3 lengths="--max_tokens=40,80 --width=16 --limit=2 --chains=1,2 --resamples=100" scored=80 crs=(4 8) lora=()
fi
mkdir -p "$OUT/logs"

LEAST=0.2
source experiments/results/each.sh

dense() {  # dense SEED: the folder of its dense model
  if [[ $1 == 0 ]]; then echo experiments/results/reasoner/dense; else echo "$OUT/dense$1/final"; fi
}

tuned() {  # tuned SEED CR NAME FLAGS: a retrofit
  echo "$3 retrofit --checkpoint=$(dense "$1") --output=$OUT/$3 --crs=$2 --data.families=$(joined "${families[@]}") --dms.window=16" \
    "--retrofit.loss.kind=forward_kl $rows --retrofit.memory.loss_chunk=65536 --retrofit.saving.snapshots=false ${*:4}"
}

joined() { local IFS=,; echo "$*"; }

swept() {  # swept SEED NAME FLAGS: a part of the sweep, on all families
  echo "$2-seed$1 hyperscale --checkpoint=$(dense "$1") --tasks=$(joined "${families[@]}") $lengths ${*:3} --output=$OUT/seed$1/$2"
}

parts() {  # parts SEED FLAGS: the dense cache, a family a part, and DMS, a CR a part
  for family in "${families[@]}"; do swept "$1" "vanilla-$family" --methods=vanilla "--tasks=$family" "${@:2}"; done
  for cr in "${crs[@]}"; do swept "$1" "dms$cr" --methods=dms "--retrofit=$cr:$OUT/cr$cr-seed$1/cr$cr/final" "${@:2}"; done
}

train() {
  for seed in "${seeds[@]}"; do
    if [[ $seed != 0 ]]; then echo "dense$seed train_reasoner --output=$OUT/dense$seed --retrofit.seed=$seed --retrofit.schedule.steps=$steps"; fi
  done | each 2
}

for stage in "$@"; do
  case $stage in
    train) train ;;
    retrofits)
      for cr in $(printf '%s\n' "${crs[@]}" | tac); do  # the longest first
        for seed in "${seeds[@]}"; do tuned "$seed" "$cr" "cr$cr-seed$seed" --retrofit.trainable=all --retrofit.optimizer.learning_rate=3e-4; done
      done | each "$EACH" ;;
    sweep)
      for seed in "${seeds[@]}"; do parts "$seed"; done | each "$EACH" ;;
    rivals)
      for seed in "${seeds[@]}"; do
        echo "centres$seed calibrate_triattention --checkpoint=$(dense "$seed") --output=$OUT/triattention$seed.npz --families=$(joined "${families[@]}")"
      done | each 2
      for seed in "${seeds[@]}"; do
        for method in rkv quest prompt_window streamingllm tova h2o; do swept "$seed" "$method" "--methods=$method" --cr=4; done
        swept "$seed" triattention --methods=triattention --cr=4 "--triattention.calibration=$OUT/triattention$seed.npz"
      done | each "$EACH" ;;
    lora)
      for cr in $(printf '%s\n' "${crs[@]}" | tac); do
        tuned 0 "$cr" "lora$cr" --lora.rank=32 --retrofit.optimizer.learning_rate=2e-3 "${lora[@]}"
      done | each "$EACH"
      for cr in "${crs[@]}"; do
        echo "lora$cr-scores hyperscale --checkpoint=$(dense 0) --methods=dms --retrofit=lora=$cr:$OUT/lora$cr/cr$cr/final" \
          "--tasks=$(joined "${families[@]}") $lengths --max_tokens=$scored --chains=1,2 --traces=0 --output=$OUT/lora/cr$cr"
      done | each "$EACH" ;;
    times) parts 0 --timed --timed_cells=2 --kv_budget_gib=2 | each 1 ;;
    analyse)
      sets=("${seeds[@]/#/$OUT/seed}")
      {
        echo "seeds hyperscale --sets=$(joined "${sets[@]}") --methods=vanilla,dms --output=$OUT/seeds"
        echo "rivals hyperscale --sets=$(joined "${sets[@]}") --output=$OUT/rivals"
        echo "times hyperscale --sets=$OUT/seed0 --methods=vanilla,dms --output=$OUT/times"
      } | each 1 ;;
    *) echo "unknown stage $stage; there are train, retrofits, sweep, rivals, lora, times, analyse" >&2; exit 2 ;;
  esac
done
