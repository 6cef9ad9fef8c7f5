"""Names of arrays that rows hold and objectives ask for, beside tokens and weights (rows.py)."""

ANSWER, REFERENCE = "decoder_answer", "decoder_reference"   # arrays of rows that hold preferences
# Arrays [B, L] of rows that hold answers which the model drew, 0 but at the answer's tokens: log-probabilities
# then (and REFERENCE, the reference's), how much better the token was than expected, and at the last token the
# whole answer's reward; of ppo also what was expected before each token, and what it should have been.
OLD, ADVANTAGE, REWARD = "decoder_old", "decoder_advantage", "decoder_reward"
VALUE, RETURN = "decoder_value", "decoder_return"
# The side that holds what a reward function reads, int32: RECORD_JSON and the bytes of an object of JSON, or
# RECORD_TARGETS and the tokens of a task's targets; RECORD_END behind.
RECORD, RECORD_JSON, RECORD_TARGETS, RECORD_END = "record_tokens", 1, 2, -1
