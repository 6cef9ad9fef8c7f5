"""When a run is saved, what a checkpoint holds on disk, and how it is read and verified."""
