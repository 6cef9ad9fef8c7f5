"""What finished and running runs have to say: one page for a run or for any runs side by side."""
