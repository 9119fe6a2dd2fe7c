#!/usr/bin/env bash
# What needs several GPUs, measured on all of one node, most valuable rows first: is context parallelism exact over NCCL,
# what does it cost and gain, how fast does the 530M model train at 1M tokens.
#
#     benchmarks/multi_gpu.sh OUT                 # again and again while the exit code is 75: rows are left
#     benchmarks/multi_gpu.sh OUT --toy --ranks 2 # every kind of row at a toy size, on CPU processes
#
# A call takes at most --minutes (10). Rows that are in OUT are not measured again; nor are rows that failed, until their
# log in OUT/failed is removed. OUT/multi_gpu.md is the report of what there is. Text is PyTorch's source, or what `lhcp
# data prepare` has written to --data DIR. Exit codes: 0 all rows are there, 1 one failed (and others may be left), 2 a
# wrong argument, 75 rows are left.
set -euo pipefail

usage="usage: $0 OUT [--toy] [--ranks N] [--minutes M] [--data DIR]"
complain() {
    echo "error: $1" >&2
    exit 2
}

toy='' ranks='' minutes=10 data='' out=''
while [ $# -gt 0 ]; do
    case $1 in
        --toy) toy=yes ;;
        --ranks | --minutes | --data)
            [ $# -gt 1 ] || complain "$1 takes a value; $usage"
            declare "${1#--}=$2"
            shift
            ;;
        -h | --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        -*) complain "$1: no such option; $usage" ;;
        *)
            [ -z "$out" ] || complain "$1: one folder is enough; $usage"
            out=$1
            ;;
    esac
    shift
done
[ -n "$out" ] || complain "$usage"
[[ $minutes =~ ^[1-9][0-9]*$ ]] || complain "--minutes $minutes: must be a whole number from 1 on"
[ -z "$data" ] || [ -d "$data" ] || complain "--data $data: no such folder; make it by lhcp data prepare, or leave it out"
{ mkdir -p "$out/failed" "$out/logs" && : >>"$out/rows.txt" && exec 9>"$out/.lock"; } 2>/dev/null ||
    complain "$out cannot be written; choose another folder"
# Rows inherit the lock, so one that outlived its call holds it, too.
flock -n 9 || complain "$out: another call, or a row that one left behind, is still running; wait for it"
out=$(realpath "$out")
[ -z "$data" ] || data=$(realpath "$data")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TORCH_ELASTIC_SHUTDOWN_TIMEOUT=5

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=${ranks:-$([ -n "$toy" ] && echo 2 || echo "$gpus")}
[[ $ranks =~ ^(2|4|8)$ ]] || complain "--ranks $ranks: must be 2, 4 or 8 (this machine has $gpus GPUs)"
[ -n "$toy" ] || [ "$ranks" -le "$gpus" ] || complain "--ranks $ranks: this machine has $gpus GPUs; or give --toy"
[ -z "$toy" ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
size=$([ -n "$toy" ] && echo toy || echo full)
[ "$(cat "$out/size.txt" 2>/dev/null || echo "$size")" = "$size" ] ||
    complain "$out holds rows of the other size (with and without --toy); choose another folder"
echo "$size" >"$out/size.txt"

limit=$((60 * minutes - 40)) # the rest for the report, and for ranks that do not end at once
deadline=$((SECONDS + limit))
left=0 failed=0 measured=0 child=''
# Called by the trap.
# shellcheck disable=SC2317,SC2329
stop() {
    if [ -n "$child" ] && kill "$child" 2>/dev/null; then
        wait "$child" || true
    fi
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP

listing=''
# row NAME SECONDS COMMAND...: measure one, whose result is OUT/NAME.json, if that long is left.
row() {
    local name=$1 seconds=$2 code=0 began=$SECONDS
    shift 2
    local log=$out/logs/${name//\//-}.log failure=$out/failed/${name//\//-}.log
    if [ -n "$listing" ]; then
        echo "$name" >>"$out/rows.txt"
        return
    fi
    if [ -e "$failure" ]; then
        echo "$name: failed before; see $failure, and remove it to try again"
        failed=1
        return
    fi
    # Without a log it is the result of a row that failed, which somebody wants to try again.
    [ ! -e "$out/$name.json" ] || [ ! -e "$log" ] || return 0
    if [ "$seconds" -gt "$limit" ]; then
        echo "$name: takes up to $seconds s, of which a call has $limit; give more --minutes"
        failed=1
        return
    fi
    if [ $((deadline - SECONDS)) -lt "$seconds" ]; then
        left=1
        return
    fi
    measured=$((measured + 1))
    rm -f "$out/$name.json"
    # In the background, since a trap waits for what is in the foreground.
    timeout --foreground --kill-after 15 $((deadline - SECONDS)) "$@" --out "$out/$name.json" >"$log" 2>&1 &
    child=$!
    wait "$child" || code=$?
    child=''
    if [ "$code" = 0 ]; then
        echo "$name: $((SECONDS - began)) s"
    elif [ $SECONDS -ge $deadline ] && [ $measured -gt 1 ]; then
        echo "$name: not done in the $((SECONDS - began)) s that were left"
        left=1
    else
        mv "$log" "$failure"
        [ $SECONDS -lt $deadline ] || echo "error: not done in a whole call: give more --minutes" >>"$failure"
        echo "$name: failed with $code after $((SECONDS - began)) s; see $failure"
        grep -m 3 "^error" "$failure" || tail -n 3 "$failure"
        failed=1
    fi
}

if [ -n "$toy" ]; then
    shape="--set model.num_heads=8 --set model.num_kv_heads=2 --set model.head_dim=16 --set attention.num_strata=16"
    layer="launch/configs/demo.yaml $shape"
    lengths=(1k)
    text=(lhcp kernels benchmarks)
    short="$shape --set seq_len=1024 --set attention.topk=32"
    layouts="launch/configs/demo.yaml $short --set stages.0.steps=3 --set stages.1.steps=1"
    dtypes=(float64)
    step="launch/configs/demo.yaml $short --modes lighthouse --steps 4 --set compile=false"
    repeats=1 batch=$ranks alone='--memory selective'
else
    layer="launch/configs/98k.yaml"
    lengths=(1m 512k 256k 98k)
    text=("$(python -c 'import os, torch; print(os.path.dirname(torch.__file__))')")
    layouts="launch/configs/small/base.yaml --set seq_len=4096 --set attention.topk=96 --set stages.0.steps=10
        --set stages.1.steps=5 --set optim.lr=1e-4 --set compile=false"
    dtypes=(float64 bfloat16)
    step="launch/configs/one-gpu/1m.yaml --modes lighthouse --steps 12"
    repeats=3 batch=8
    # A GPU of 140 GB holds what one of 80 leaves in host memory, of a sequence that it has for itself.
    alone=$(python -c 'import torch
if torch.cuda.get_device_properties(0).total_memory > 110e9: print("--memory selective")')
fi
declare -A length=(
    [1k]="--set seq_len=1024 --set attention.topk=32"
    [98k]="--set seq_len=98304"
    [256k]="--set seq_len=262144 --set attention.topk=4096"
    [512k]="--set seq_len=524288 --set attention.topk=8192"
    [1m]="--set seq_len=1048576 --set attention.num_levels=4 --set attention.topk=4096"
)
declare -A dtype=(
    [float64]="--set dtype=float64 --set compute_dtype=null"
    [float32]="--set compute_dtype=float32"
    [bfloat16]="--set compute_dtype=bfloat16"
)
# Of a row at most; of layers of that length, and of others.
declare -A seconds=([1k]=40 [98k]=60 [256k]=90 [512k]=120 [1m]=260)
declare -A most=([exact]=90 [layouts]=300 [train]=240 [exchanges]=120)
[ -z "$toy" ] || most=([exact]=40 [layouts]=40 [train]=40 [exchanges]=40)
exchanges=ring,allgather,ulysses
longest=${lengths[0]}
data=${data:-$out/data} text_is=data.path=\'${data//\'/\'\'}\'
# The command may not be installed where the source tree is run.
[ -e "$data" ] || python -c 'from lhcp.cli import app; app()' data prepare "${text[@]}" --out "$data" --held-out 0.1

flash=''
[ -n "$toy" ] || ! python -c 'import flash_attn, ring_flash_attn' 2>/dev/null || flash=,ring_flash_attn

# The words of these strings are arguments.
# shellcheck disable=SC2086
all_rows() {
    local over layers cp kind name
    over="python -m torch.distributed.run --standalone --nproc-per-node"
    layers="-m benchmarks.scaling $layer"

    exact() { # exact RANKS DTYPE: every exchange, forward and backward, against one process
        row "scaling/exact-$2-cp$1" "${most[exact]}" $over "$1" $layers ${length[$longest]} ${dtype[$2]} \
            --set "parallel.cp=$1" --exchanges "$exchanges$([ "$2" != bfloat16 ] || echo "$flash")" --repeats 0
    }
    scaling() { # scaling LENGTH RANKS: Lighthouse and dense over ranks
        row "scaling/$1-cp$2" "${seconds[$1]}" $over "$2" $layers ${length[$1]} --set "parallel.cp=$2" --repeats $repeats
    }
    emulated() { # emulated LENGTH: the ranks one after the other, and what transfers are projected to add
        row "scaling/$1-cp$ranks-emulated" "${seconds[$1]}" python $layers ${length[$1]} --emulate "$ranks" \
            --repeats $repeats
    }
    training() { # training CP FLAG...: whole steps of a model on all GPUs, of which CP share a sequence
        local layout=cp$1 sequences=$((ranks / $1))
        [ "$1" != 1 ] || layout=dp$ranks
        [ -z "$toy" ] || sequences=$ranks # of both, so that losses are the same
        row "train/$longest-$layout" "${most[train]}" $over "$ranks" -m benchmarks.train_step $step --set "$text_is" \
            --set parallel.dp=null --set "parallel.cp=$1" --set "global_batch_size=$sequences" "${@:2}"
    }

    for kind in bfloat16 float32; do exact "$ranks" $kind; done
    for kind in "${dtypes[@]}"; do
        row "layouts/$kind-x$ranks" "${most[layouts]}" python -m benchmarks.layouts $layouts ${dtype[$kind]} \
            --set "$text_is" --set "global_batch_size=$batch" --set micro_batch_size=1 --set eval={} \
            --set optim.warmup_steps=50 --ranks "$ranks"
    done
    scaling "$longest" "$ranks"
    emulated "$longest"
    training "$ranks" --memory selective
    training 1 $alone
    row "scaling/$longest-cp$ranks-exchanges" "${most[exchanges]}" $over "$ranks" $layers ${length[$longest]} \
        --set "parallel.cp=$ranks" --repeats $repeats --exchanges allgather,ulysses --no-dense
    for ((cp = 2; cp < ranks; cp *= 2)); do
        for kind in bfloat16 float32; do exact $cp $kind; done
    done
    for name in "${lengths[@]}"; do
        if [ "$name" != "$longest" ]; then
            scaling "$name" "$ranks"
            emulated "$name"
        fi
        for ((cp = ranks / 2; cp > 0; cp /= 2)); do scaling "$name" $cp; done
    done
}

: >"$out/rows.txt"
listing=yes
all_rows
listing=''
all_rows

python -m benchmarks.multi_gpu_report "$out" >/dev/null || {
    failed=1
    echo "rows failed, are wrong or damaged: the end of the report names them"
}
echo "report: $out/multi_gpu.md"
[ $failed = 0 ] || exit 1
[ $left = 0 ] || {
    echo "rows are left: the same again goes on"
    exit 75
}
