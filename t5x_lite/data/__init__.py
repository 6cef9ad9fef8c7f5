"""From files, tasks and mixtures to batches whose order belongs to the run."""
