"""Experiments, one file each, loaded by path: `get_config(argument)` returns a `train.config.Experiment`."""
