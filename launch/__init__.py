"""Runs on a cluster: submitted to SLURM by submitit, watched, requeued and cancelled. The trainer knows none of it."""
