#!/usr/bin/env bash
# Every command behind this folder's tables, spread over the GPUs at hand. What is done is not done again: call it again after a kill.
#
#   bash experiments/results/rivals/run.sh train texts seen tasks needle steps
#
# train: the rivals' own retrofits, and DMS with maths in its mix; texts: KL and perplexity; seen: the same at CR x of what was
# seen; tasks: variable tracking, HellaSwag, GSM8K likelihood; needle: in 4,096 tokens; steps: decode steps against the dense cache.
#
#   MODEL  checkpoint, default checkpoints/smollm2-135m-instruct     OUT   results, default runs/rivals
#   DATA   folder with wiki.test.raw, wikitext2_train_5k.txt, gsm8k/{train,test}.jsonl, math500.jsonl, maths.txt and code.txt (the
#          texts of README), math_train.jsonl (field problem), hellaswag_val_full.txt.bz2
#   GPUS   ids, default 0      EACH  evaluations that share a GPU, default 3      SMALL=1  a few tokens, to try the script
set -euo pipefail
cd "$(dirname "$0")/../../.."
MODEL=${MODEL:-checkpoints/smollm2-135m-instruct} DATA=${DATA:-data} OUT=${OUT:-runs/rivals} EACH=${EACH:-3}
IFS=, read -ra gpus <<<"${GPUS:-0}"
shipped=experiments/results/retrofit/smollm2-135m
text_size="--text_tokens=98304 --lengths=4096 --batch=72"
task_size="--lengths=640 --limit=200 --width=32 --batch=64" needle_size="--lengths=4096 --limit=100 --width=32"
steps() { echo "$1"; }
rows= passage=
if [[ -n "${SMALL:-}" ]]; then
  text_size="--text_tokens=256 --lengths=128 --batch=2" task_size="--lengths=640 --limit=2 --batch=2 --hellaswag.shots=1 --gsm8k.shots=1" needle_size="--lengths=256 --limit=2"
  steps() { echo 3; }
  rows="--retrofit.seq_len=64 --retrofit.batch_size=2" passage="--max_tokens=64 --length=64"
fi
mkdir -p "$OUT/logs"

SAME="--checkpoint=$MODEL"
source experiments/results/each.sh

methods() {  # NAME FLAGS: the methods of the table in groups that take about as long as one another
  cat <<END
watching --methods=vanilla,h2o,tova --cr=2,4,8
prompts --methods=snapkv,streamingllm,quest --cr=2,4,8
keys --methods=keydiff,expectedattention,triattention --cr=2,4,8 --triattention.calibration=$OUT/triattention.npz
pruning --methods=rkv,vase --cr=2,4,8
dms --methods=dms --retrofit=$OUT/cr2/final,$shipped-cr4,$shipped-cr8
dms_maths --methods=dms --retrofit=$OUT/maths4/final,$OUT/maths8/final
dms_budget --methods=dms_budget --retrofit=$shipped-cr8 --cr=2,4,8
dms_lazy --methods=dms_budget --retrofit=$shipped-cr8 --cr=2,4,8 --thresholds=inf
kvzap --methods=kvzap --retrofit=$OUT/kvzap/final --thresholds=-4.52,-3.07,-1.43 --kvzap.window=64
trimkv --methods=trimkv --retrofit=$OUT/trimkv/final --cr=2,4,8
dmc --methods=dmc --retrofit=$OUT/dmc/final
END
}

train() {
  local mix="--data.paths=$DATA/wikitext2_train_5k.txt,$DATA/gsm8k/train.jsonl,$(python3 -c 'import os; print(os.path.dirname(os.__file__))')/*.py"
  local maths="$mix,$OUT/self_maths.jsonl --data.weights=0.35,0.1,0.2,0.35" one="--retrofit.batch_size=4 --retrofit.saving.ema_decay=0.98"
  mix="$mix --data.weights=0.6,0.15,0.25"
  [[ -e $OUT/self_maths.jsonl ]] || each 1 <<END
self_maths self_text --output=$OUT/self_maths.jsonl --prefixes=$DATA/wikitext2_train_5k.txt --questions=$DATA/math_train.jsonl --question_field=problem --rows=$(steps 768) --batch=192 --max_new_tokens=$(steps 960)
END
  each 2 <<END
calibrate calibrate_triattention --text=$DATA/wikitext2_train_5k.txt --output=$OUT/triattention.npz $passage
maths8 retrofit --output=$OUT/maths8 $maths $one --retrofit.schedule.steps=$(steps 2450) --retrofit.schedule.final_cr=9.3 --retrofit.schedule.steps_per_cr=120 --retrofit.optimizer.decay_steps=$(steps 800) --lora.rank=16 --dms.window=64 $rows
maths4 retrofit --output=$OUT/maths4 $maths $one --retrofit.schedule.steps=$(steps 1600) --retrofit.schedule.final_cr=4.4 --retrofit.schedule.steps_per_cr=150 --retrofit.optimizer.decay_steps=$(steps 600) --lora.rank=16 --dms.window=64 $rows
cr2 retrofit --output=$OUT/cr2 $mix $one --retrofit.schedule.steps=$(steps 800) --retrofit.schedule.final_cr=2.15 --retrofit.schedule.steps_per_cr=300 --retrofit.optimizer.decay_steps=$(steps 300) --lora.rank=16 --dms.window=64 $rows
trimkv retrofit --output=$OUT/trimkv $mix --data.separate_documents=false --retrofit.objective=trimkv --retrofit.trainable=gates --retrofit.loss.kind=forward_kl --retrofit.seq_len=2048 --retrofit.batch_size=2 --retrofit.trimkv.capacity=256 --retrofit.schedule.steps=$(steps 700) --dms.hidden=256 $rows
kvzap retrofit --output=$OUT/kvzap $mix --retrofit.objective=kvzap --retrofit.trainable=gates --retrofit.seq_len=1024 --retrofit.batch_size=4 --retrofit.schedule.steps=$(steps 800) --dms.gate=mlp --dms.hidden=256 --dms.window=64 $rows
dmc retrofit --output=$OUT/dmc $mix --retrofit.objective=dmc --retrofit.loss.kind=lm --dms.window=0 --retrofit.seq_len=1024 --retrofit.batch_size=4 --retrofit.schedule.steps=$(steps 800) --retrofit.schedule.final_cr=4 --retrofit.schedule.steps_per_cr=150 --retrofit.optimizer.learning_rate=0.0003 --retrofit.optimizer.decay_steps=$(steps 250) $rows
END
}

score() {  # score STAGE FLAGS: every method with these flags
  methods | sed -E "s#^([a-z_]+) (.*)#$1_\1 evaluate \2 ${*:2} --output=$OUT/$1_\1#" | each "$EACH"
}

texts="--text=$DATA/wiki.test.raw,$DATA/maths.txt,$DATA/code.txt $text_size"
for stage in "$@"; do
  case $stage in
    train) train ;;
    texts) score texts "$texts" ;;
    seen) score seen "--budget_rule=seen $texts" ;;
    needle) score needle "--tasks=needle $needle_size" ;;
    tasks) score tasks "--tasks=tracking,hellaswag,gsm8k --gsm8k.data=$DATA/gsm8k/test.jsonl --hellaswag.data=$DATA/hellaswag_val_full.txt.bz2 $task_size" ;;
    steps)
      for preset in smollm2-135m llama-3.2-1b; do
        python -m experiments.bench_policies --cases=step --preset=$preset --output="$OUT/steps_$preset" ${SMALL:+--scale=small}
      done ;;
    *) echo "unknown stage $stage; there are train, texts, seen, tasks, needle, steps" >&2; exit 2 ;;
  esac
done
