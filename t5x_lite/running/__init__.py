"""What stands around the steps of a run: its clock, signals, the health of steps, its counts."""
