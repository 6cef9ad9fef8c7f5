"""From parameters to predictions, scores and held-out metrics."""
