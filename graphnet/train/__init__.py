"""Training runs: data, schedules, the trainer, checkpoints."""
