"""What an experiment amounts to before it runs: parameters, FLOPs, memory."""
