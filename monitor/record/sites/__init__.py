"""Where tensors are found in a training step: one file per site, each turning tensors into rows through a pass."""
