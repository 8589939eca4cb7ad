"""Training: setup, step, optimizer, trainer, checkpoints, metrics, loggers."""
