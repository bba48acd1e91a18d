#!/usr/bin/env bash
# Stage 1: the targets of all image shards, by independent tasks; each does every 16th shard.
#
#   sbatch extract.sh IMAGES TARGETS [OPTION...]
#
# Submit it from an environment that has milan-pipe, with TARGETS on a file system or in a bucket that all nodes see.
# A task that was interrupted goes on when the same command is submitted again.
#SBATCH --job-name=milan-extract
#SBATCH --array=0-15
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-task=1
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --output=%x-%A-%a.log
#SBATCH --requeue
set -euo pipefail
# Newer versions of srun do not take it over from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

images=${1:?name the images} targets=${2:?name the target store}

srun milan-pipe extract-targets "$images" "$targets" --shards "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" "${@:3}"
