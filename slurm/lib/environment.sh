# shellcheck shell=bash
# The environment of every job. A value that is set already is kept: by `env` of the site file, or by you before
# submitting. What each machine computes best with is not known here; what is known to matter is.

# NCCL: warnings only. The interface for its sockets is `network_interface` of the site file; InfiniBand devices are
# found by NCCL itself unless NCCL_IB_HCA names them.
: "${NCCL_DEBUG:=WARN}"
# Retransmissions before a link counts as broken: 2^22 x 4 us each, for switches that reroute.
: "${NCCL_IB_TIMEOUT:=22}"
export NCCL_DEBUG NCCL_IB_TIMEOUT

# Threads of one process; there is one for each GPU.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    OMP_NUM_THREADS=$((SLURM_CPUS_ON_NODE / LHCP_GPUS))
    if [ "$OMP_NUM_THREADS" -gt 16 ]; then OMP_NUM_THREADS=16; fi
    if [ "$OMP_NUM_THREADS" -lt 1 ]; then OMP_NUM_THREADS=1; fi
fi
export OMP_NUM_THREADS

# Sequences of different stages need blocks of different sizes: let segments grow instead of fragmenting.
: "${PYTORCH_CUDA_ALLOC_CONF:=expandable_segments:True}"
export PYTORCH_CUDA_ALLOC_CONF

# Compiled kernels on the node's own disk: thousands of small files, which a shared file system would suffer from.
: "${LHCP_CACHE:=${TMPDIR:-/tmp}/lhcp-cache-${USER:-$(id -un)}}"
: "${TRITON_CACHE_DIR:=$LHCP_CACHE/triton}"
: "${TORCHINDUCTOR_CACHE_DIR:=$LHCP_CACHE/inductor}"
export TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR

# Each process on the cores and memory next to its GPU. srun must not bind the one task of a node before: torchrun's
# processes would share its few cores. LHCP_NUMA_BINDING=none leaves it all to the system.
: "${LHCP_NUMA_BINDING:=$(if command -v nvidia-smi >/dev/null; then echo node; else echo none; fi)}"
# Since Slurm 22.05 srun does not take --cpus-per-task over from sbatch; without it the task would have one core.
: "${SRUN_CPUS_PER_TASK:=$SLURM_CPUS_ON_NODE}"
export SRUN_CPUS_PER_TASK
# Of PyTorch's own log lines only errors: when a job ends its processes lose each other, which is no news.
: "${TORCH_CPP_LOG_LEVEL:=ERROR}"
export TORCH_CPP_LOG_LEVEL
