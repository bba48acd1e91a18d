#!/usr/bin/env bash
# Stage 2: one run over all GPUs of all nodes.
#
#   sbatch pretrain.sh TARGETS RUN [OPTION...]
#
# RUN is a folder that all nodes see. With `--set pretrain.canonical_streams=256`, as many as GPUs times `pretrain.workers`, each
# reads only what it uses.
#
# Two minutes before the time is over SLURM sends a signal: the run saves its state
# and ends, and the same command goes on from there. For more time than a job may have, submit it several times with
# `sbatch --dependency=singleton`; a run that is finished ends at once.
#SBATCH --job-name=milan-pretrain
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail
# Newer versions of srun do not take it over from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

targets=${1:?name the target store} run=${2:?name the folder of the run}
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)

srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first_node:${PORT:-29500}" \
  -m milan_pipe pretrain "$targets" "$run" "${@:3}"
