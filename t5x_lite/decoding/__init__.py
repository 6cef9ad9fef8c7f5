"""From next-token logits to sequences: greedy, sampling, beam search, scoring."""
