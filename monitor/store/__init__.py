"""Run folders: written while a training runs, read by everything else."""
