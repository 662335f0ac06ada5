#!/bin/bash
# One run of train.py as a Slurm job, on one node or on several. It saves and leaves before the time limit and when it
# is preempted, goes back into the queue, and goes on where it was. docs/clusters.md says why each line is there.
#
#   sbatch --gpus-per-node=8 --cpus-per-task=64 scripts/slurm_train.sh NAME config/arch_llama.py config/size_124M.py
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --time=12:00:00 --partition=gpu \
#       scripts/slurm_train.sh NAME config/arch_llama.py config/size_1B.py --use_fsdp=True --checkpoint_format=sharded
#
# NAME is the run's name; after it comes what train.py takes. Submit it from the repository's folder.

#SBATCH --job-name=nanoarch
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1     # one torchrun on each node, which starts a process for each GPU
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300       # five minutes before the limit: the longest evaluation, and a checkpoint
#SBATCH --requeue               # a lost node or a preemption puts the job back into the queue
#SBATCH --open-mode=append      # one log for all the times that it runs
#SBATCH --output=slurm-%j.log

set -u
run=${1:?"give the run a name: sbatch scripts/slurm_train.sh NAME config/... --setting=value"}
shift
runs_dir=${RUNS_DIR:-runs}      # a folder that every node sees
python=${PYTHON:-python}        # of the environment with torch

processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))  # jobs that share a node meet at ports of their own

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take --cpus-per-task over from sbatch
export OMP_NUM_THREADS=$((SRUN_CPUS_PER_TASK > processes ? SRUN_CPUS_PER_TASK / processes : 1))
export PYTHONUNBUFFERED=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else restarted ranks find the addresses of ranks that died
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600    # let Slurm decide how long saving may take after SIGTERM, not torchrun

# On each node: torchrun, and a shell beside it that hands signals to the processes of train.py. Slurm may send them to
# the first process of a task alone; torchrun itself would die of SIGUSR1, and so it ignores that.
on_each_node='
(trap "" USR1; exec "$@") & torchrun=$!
for signal in USR1 TERM; do trap "pkill -$signal -P $torchrun" "$signal"; done
code=0
while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun"; code=$?; done
exit "$code"
'

mkdir -p "$runs_dir"
began=$(mktemp "$runs_dir/.began.XXXXXX")
srun --kill-on-bad-exit=1 bash -c "$on_each_node" bash "$python" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$processes" --max-restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="$head:$port" --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_conf=read_timeout=600,join_timeout=1800 \
    train.py "$@" --run_name="$run" --runs_dir="$runs_dir" --auto_resume=True
code=$?

summary=$runs_dir/$run/summary.json  # of this attempt: one that failed before it wrote any is not tried for ever
[ "$summary" -nt "$began" ] && grep -q '"status": "interrupted"' "$summary"
interrupted=$?
rm -f "$began"
if [ "$interrupted" = 0 ]; then
    echo "job $SLURM_JOB_ID goes back into the queue"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
