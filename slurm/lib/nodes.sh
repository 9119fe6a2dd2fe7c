# shellcheck shell=bash
# Starting processes on the nodes of a job.

# on_nodes ARGUMENT...: one torchrun on every node, a process for each of its GPUs. It ends with the largest exit code.
on_nodes() {
    local head port
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    LHCP_ATTEMPT=$((${LHCP_ATTEMPT:-0} + 1))
    # Jobs that share a node, and attempts that follow each other, meet at different ports.
    port=$((20000 + (SLURM_JOB_ID * 8 + LHCP_ATTEMPT) % 12000))
    local agent=(-m lhcp.agent --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$LHCP_GPUS"
        --rdzv-backend=c10d --rdzv-endpoint="$head:$port"
        --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$LHCP_ATTEMPT")
    if [ "$LHCP_NUMA_BINDING" != none ]; then agent+=(--numa-binding="$LHCP_NUMA_BINDING"); fi
    # When the torchrun of one node has ended, the others have --wait seconds to end by themselves, with their own codes.
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --wait=60 --kill-on-bad-exit=0 --unbuffered \
        "${LHCP_SRUN[@]}" "${LHCP_PYTHON[@]}" "${agent[@]}" "$@"
}

# until_slurm_answers: its controller may be away for minutes, when it starts again or fails over.
until_slurm_answers() {
    local tries
    for ((tries = 0; tries < 200; tries++)); do
        if scontrol show job "$SLURM_JOB_ID" >/dev/null 2>&1; then return; fi
        echo "note: Slurm's controller does not answer; asked again in 3 s" >&2
        sleep 3
    done
}

# on_first_node ARGUMENT...: Python once, in the same surroundings.
on_first_node() {
    srun --nodes=1 --ntasks=1 --cpu-bind=none --overlap "${LHCP_SRUN[@]}" "${LHCP_PYTHON[@]}" "$@"
}
