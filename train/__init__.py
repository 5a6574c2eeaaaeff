"""How it learns: data, losses, optimizer, the step, the loop, checkpoints, evaluation."""
