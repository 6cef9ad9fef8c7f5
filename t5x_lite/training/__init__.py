"""What a step is made of: objectives, losses, optimizers, schedules, number formats, state, metrics."""
