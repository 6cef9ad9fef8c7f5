"""Decoding against transformers' generate on converted models, token for token."""

import dataclasses

import jax
import numpy as np
import pytest

from t5x_lite import tree
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.formats import hf
from t5x_lite.models.language_model import Model
from t5x_lite.training import steps
from tests.parity import hf_cases
from tests.parity.hf_cases import CASES, VOCAB, torch

ROWS, PROMPT, NEW = 6, 5, 9
METHODS = {
    "greedy": DecodeConfig(max_length=NEW, eos_id=-1),
    "beam": DecodeConfig(method="beam", beam_size=4, num_samples=4, max_length=NEW,
                         length_penalty=0.6, beam_rule="transformers")}


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Rows of 2 to 5 tokens, left-aligned, and their lengths."""
    lengths = np.array([5, 3, 4, 2, 5, 4], np.int32)
    tokens = np.random.default_rng(0).integers(2, VOCAB, (ROWS, PROMPT))
    return np.where(np.arange(PROMPT) < lengths[:, None], tokens, 0).astype(np.int32), lengths


def said_by_some(tokens: np.ndarray) -> int:
    """A token that some rows hold, late, and others do not: an end token that says something."""
    def first(token):
        return [list(row).index(token) for row in tokens if token in row]
    some = [t for t in np.unique(tokens) if 0 < len(first(t)) < len(tokens)]
    return int(max(some, key=lambda t: np.mean(first(t))))


def theirs(model, name: str, config: DecodeConfig):
    """(tokens [B, N, L] without prompt, scores [B, N] or None) of transformers' generate."""
    tokens, lengths = inputs()
    if name == "gpt2":   # it wants prompts that end together
        tokens = np.stack([np.roll(row, PROMPT - n) for row, n in zip(tokens, lengths,
                                                                      strict=True)])
    start = {} if name == "gpt2" else {"decoder_start_token_id": 0}
    found = model.generate(
        torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(tokens != 0).long(),
        do_sample=False, max_new_tokens=NEW, eos_token_id=config.eos_id, pad_token_id=0, **start,
        return_dict_in_generate=True, output_scores=True,
        **({} if config.method == "greedy" else {
            "num_beams": config.beam_size, "num_return_sequences": config.num_samples,
            "length_penalty": config.length_penalty, "early_stopping": False}))
    sequences = found.sequences.numpy()[:, PROMPT if name == "gpt2" else 1:]
    sequences = np.pad(sequences, ((0, 0), (0, NEW - sequences.shape[1])))
    ends = sequences == config.eos_id   # beam search fills up with it where padding is 0
    sequences = np.where(np.cumsum(ends, axis=1) - ends > 0, 0, sequences)
    scores = None if config.method == "greedy" else found.sequences_scores.numpy()
    return sequences.reshape(ROWS, config.num_samples, NEW), scores


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["t5", "t5_1_1", "gpt2"])
def test_equals_generate(name, method, tmp_path):
    model = hf_cases.make(CASES[name])
    with torch.no_grad():   # logits that are far apart
        model.get_output_embeddings().weight *= 2.0
    model.save_pretrained(tmp_path)
    source = hf.read_model(str(tmp_path))
    params = tree.unflatten({path: source.read(path) for path in source.table})
    tokens, lengths = inputs()
    batch = {"decoder_prompt_tokens": tokens, "decoder_prompt_lengths": lengths}
    if name != "gpt2":
        batch = {"encoder_input_tokens": tokens}
    free = theirs(model, name, METHODS["greedy"])[0][:, 0]
    config = dataclasses.replace(METHODS[method], eos_id=said_by_some(free))
    found = jax.jit(steps.make_decode_step(Model(source.config), config))(params, batch)
    expected, scores = theirs(model, name, config)
    np.testing.assert_array_equal(np.asarray(found.tokens), expected)
    if scores is not None:
        np.testing.assert_allclose(np.asarray(found.scores).reshape(-1), scores, atol=1e-4)
    ended = np.any(expected == config.eos_id, axis=-1)
    assert 0 < np.sum(ended) < ended.size   # or the case says little
