#!/bin/bash
# The whole of stage one on SLURM: an array that makes the parts, and a job that finishes.
#
#   pipelines/slurm/submit.sh RECIPE CACHE [OPTIONS OF SBATCH]
#
# for example: submit.sh hg38.toml cache/hg38 --array=1-32 --partition=gpu
set -eu
recipe=${1:?"submit.sh RECIPE CACHE [OPTIONS OF SBATCH]"}
cache=${2:?"submit.sh RECIPE CACHE [OPTIONS OF SBATCH]"}
shift 2
here=$(cd "$(dirname "$0")" && pwd)

array=$(sbatch --parsable "$@" "$here/extract.sbatch" "$recipe")
others=()
skip=
for option in "$@"; do
    if [ -n "$skip" ]; then
        skip=
        continue
    fi
    case $option in
        --array=* | -a?*) ;;
        --array | -a) skip=yes ;;
        *) others+=("$option") ;;
    esac
done
# Before 4.4, bash takes an empty array for an unset one.
finish=$(sbatch --parsable ${others[@]+"${others[@]}"} --dependency="afterany:${array%%;*}" \
    "$here/finish.sbatch" "$recipe" "$cache")
echo "array $array, then $finish"
