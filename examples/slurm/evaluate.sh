#!/usr/bin/env bash
# What the student is worth: nearest neighbours, a quick linear probe, fine-tuning, and one page about all of it.
#
#   sbatch evaluate.sh RUN TRAIN TEST [OPTION...]
#
# TRAIN and TEST are folders of classes or shards with labels. Fine-tuning goes on where it was interrupted.
#SBATCH --job-name=milan-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail
# Newer versions of srun do not take it over from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

run=${1:?name the folder of the run} train=${2:?name the training images} test=${3:?name the test images}
tuned=$run-finetuned

srun milan-pipe knn "$run" "$train" "$test" "${@:4}"
srun milan-pipe linear-probe "$run" "$train" "$test" --quick "${@:4}"
srun torchrun --standalone --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
  -m milan_pipe finetune "$run" "$train" "$test" "$tuned" "${@:4}"
srun milan-pipe report "$run" "$tuned" --out "$run-report.html"
