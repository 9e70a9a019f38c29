# Sourced by the run.sh of a folder of results, which sets OUT and the array `gpus`.

each() {  # each N: runs the lines of standard input, "NAME MODULE FLAGS", N of them on a GPU at a time
  # SAME: flags of every line. LEAST: share of a GPU's memory that a process may take at least, where few fill theirs.
  export OUT SAME=${SAME:-} GPU_LIST="${gpus[*]}" XLA_PYTHON_CLIENT_PREALLOCATE=false
  export XLA_PYTHON_CLIENT_MEM_FRACTION; XLA_PYTHON_CLIENT_MEM_FRACTION=$(python3 -c "print(max(0.9 / $1, ${LEAST:-0}))")
  xargs -P $(($1 * ${#gpus[@]})) --process-slot-var=SLOT -d '\n' -I {} bash -c '
    read -r name module flags <<<"{}"; ids=($GPU_LIST)
    export CUDA_VISIBLE_DEVICES=${ids[$((SLOT % ${#ids[@]}))]}; start=$SECONDS
    eval "python -m experiments.$module $SAME $flags" >"$OUT/logs/$name.out" 2>"$OUT/logs/$name.err"
    echo "$name: exit $? after $((SECONDS - start)) s"'
}
