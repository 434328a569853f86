"""Stage one on workers that SLURM gives and takes: a scheduler here, a job for each device.

    python pipelines/slurm/dask_slurm.py RECIPE --jobs 16 --queue gpu

Runs on a login node, or in a small job of its own; needs `pip install dask-jobqueue`. Prefer the
job array (extract.sbatch) where it does: it has nothing that must stay alive. This is for queues
that give devices at odd times, one after another. What your site asks for goes into OPTIONS.
"""

from __future__ import annotations

import argparse
from typing import Any

import dask
from dask_jobqueue import SLURMCluster

from had_pipe.cli.shown import reporter
from had_pipe.cluster import extract_on_cluster
from had_pipe.recipe import read_recipe

# Workers end themselves before SLURM does, not all at once, and finish what they can.
OPTIONS: dict[str, Any] = {
    "cores": 2,  # parts at a time: one is embedded while the other is written
    "processes": 1,
    "memory": "32GB",
    "walltime": "04:00:00",
    "job_cpu": 4,
    "job_extra_directives": ["--gres=gpu:1"],
    "job_directives_skip": [],  # ["--mem"] where the site refuses it
    "worker_extra_args": [
        *("--resources", "GPU=1"),
        *("--lifetime", "230m", "--lifetime-stagger", "8m"),
    ],
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("recipe")
    options.add_argument("--jobs", type=int, default=8, help="most jobs at a time")
    options.add_argument("--queue", help="SLURM's partition")
    options.add_argument("--account")
    options.add_argument("--offline", action="store_true")
    asked = options.parse_args()

    # A job whose worker is silent for this long is cancelled: a restart may take minutes.
    dask.config.set({"distributed.deploy.lost-worker-timeout": "15 minutes"})
    with SLURMCluster(
        queue=asked.queue,
        account=asked.account,
        scheduler_options={"dashboard_address": "127.0.0.1:0"},
        **OPTIONS,
    ) as cluster:
        print(cluster.job_script())
        # Only an adaptive cluster replaces jobs whose time is up.
        cluster.adapt(minimum=0, maximum_jobs=asked.jobs)
        with reporter() as report:
            made = extract_on_cluster(
                read_recipe(asked.recipe),
                scheduler=cluster.scheduler_address,
                offline=asked.offline,
                # However long the queue is.
                patience=7 * 24 * 3600.0,
                report=report,
            )
    print(f"cache {made.path}, id {made.cache_id}: {made.parts_made} parts made")


if __name__ == "__main__":
    main()
