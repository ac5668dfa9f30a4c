#!/usr/bin/env bash
# Several machines under SLURM: one task a node, which starts one process for each of its GPUs.
#   sbatch accelerate_configs/slurm.sh accelerate_configs/multi_gpu.yaml recipes/finetune.py RECIPE
# The job is requeued when it is preempted: SIGTERM makes the run write a checkpoint and stop, and the same command
# continues. `output` must be on a disk that all nodes see. Written for SLURM 23 or later; not run here.
#SBATCH --job-name=vkvtrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
set -euo pipefail
config=$1
shift
export MAIN_ADDRESS MAIN_PORT=29500
MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export GPUS=${SLURM_GPUS_ON_NODE:-8}
# single quotes: SLURM_NODEID is another one on each node
srun bash -c 'exec accelerate launch --config_file "$0" --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes $((SLURM_NNODES * GPUS)) --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" "$@"' \
    "$config" "$@"
