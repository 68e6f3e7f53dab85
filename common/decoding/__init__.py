"""From encoder output to tokens: greedy, sampling and beam search, token rules, alignment, pauses."""
