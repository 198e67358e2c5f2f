#!/bin/bash
#SBATCH --job-name=chatbind
#SBATCH --nodes=MACHINES
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=GPUS
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

# What a cluster wants besides is said when submitting, and wins over the lines above:
#   sbatch --partition=NAME --time=HOURS:00:00 --account=NAME --cpus-per-gpu=N THIS_FILE

# One task a machine, that has all CPUs that were given there and starts the machine's workers. It
# ends the others itself where one fails.
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=0 \
  COMMAND &
step=$!

# Two minutes before its time is over the job gets USR1: the run saves a checkpoint and ends with
# STOPPED. Then it is put back into the queue, and goes on from there.
out_of_time= woken=
trap 'out_of_time=1 woken=1; kill -s USR1 "$step"' USR1
trap 'woken=1; kill -s TERM "$step"' TERM
while wait "$step"; code=$?; [ -n "$woken" ]; do woken=; done
if [ "$code" -eq STOPPED ] && [ -n "$out_of_time" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
