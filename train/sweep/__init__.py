"""Many runs of one experiment: `python -m train.sweep`."""
