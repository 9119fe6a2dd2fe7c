# shellcheck shell=bash
# Trains $LHCP_JOB/config.yaml (in an array, config-I.yaml), and does what lhcp.launch.verdict says when it has ended:
# runs it again in these nodes, requeues the job, or ends it.

# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$LHCP_OUT/code/lhcp/slurm/lib/environment.sh"
# shellcheck source-path=SCRIPTDIR source=nodes.sh
. "$LHCP_OUT/code/lhcp/slurm/lib/nodes.sh"

config=$LHCP_JOB/config${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}.yaml
outcome=start ended=''

# SIGTERM to the whole job: scancel, a preemption (after which Slurm itself requeues), or the limit at last. A script that
# requeued its job then would bring it back from scancel.
trap 'ended=1' TERM
end_if_told() {
    if [ -n "$ended" ]; then exit 143; fi
}

while :; do
    until_slurm_answers
    end_if_told
    status=0
    answer=$(on_first_node -m lhcp.launch.verdict "$config" "$outcome") || status=$?
    end_if_told
    # SIGUSR1, or SIGTERM ahead of a preemption, to all steps of the job, when there was nothing yet to stop.
    if [ "$status" = 138 ] || [ "$status" = 143 ]; then
        outcome=75
        continue
    fi
    case ${answer##*$'\n'} in  # a prolog or a container may have said something before
    run)
        outcome=0
        # dp follows from the GPUs that this job has. --resume last also begins a run that has no checkpoint.
        on_nodes -m lhcp.train "$config" --resume last "${LHCP_TRAIN[@]}" || outcome=$?
        ;;
    requeue)
        # An element by its number in the array: the job id of one is that of the whole array, too.
        job=$SLURM_JOB_ID
        if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
        echo "requeue: job $job goes on later, from the last checkpoint"
        # Refused where the administrators or --no-requeue forbid it: then the next job of a chain goes on.
        until_slurm_answers
        scontrol requeue "$job" ||
            echo "not requeued; the next job of a chain goes on, or: lhcp submit $LHCP_OUT" >&2
        exit 75
        ;;
    "end "*) exit "${answer##*end }" ;;
    *)
        echo "error: lhcp did not start on the first node, see above: python, setup or container of the site file?" >&2
        exit 1
        ;;
    esac
done
