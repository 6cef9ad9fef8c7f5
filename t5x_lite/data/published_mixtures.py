"""Sampling proportions that published language models were trained with.

    --config.data.train='massive_text(web=my_web_task,books=my_books,github=my_code)'

mixes tasks of yours in a paper's proportions, and says at the start of the run how often its
tokens would see the paper's corpora.

    massive_text             Gopher (Rae et al. 2021, arXiv:2112.11446, table 2)
    massive_text_chinchilla  Chinchilla (Hoffmann et al. 2022, arXiv:2203.15556, table A1)
    gpt3                     Brown et al. 2020 (arXiv:2005.14165, table 2.2; its shares sum to 101)
    pile_mt_nlg              the Pile and Common Crawl in MT-NLG (Smith et al. 2022,
                             arXiv:2201.11990, table 2)

Epochs follow from the rounded tokens and shares: GPT-3's own column has 2.9 for WebText2 and 3.4
for Wikipedia, where these give 3.4 and 3.0.

Checked, besides memory: gpt3 and both shares of MassiveText against transcriptions of tables 2.2
and A1 (which repeats Gopher's shares); Gopher's tokens give A1's epochs within rounding, but for
Wikipedia's (3.5, not 3.4). MT-NLG's shares are those of DATA_BLEND in the scripts of
https://github.com/deepspeedai/Megatron-DeepSpeed; its tokens stand in table 20 of Kosmos-1
(arXiv:2302.14045), but for Stack Exchange, PubMed, arXiv and GitHub, which are unchecked.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from t5x_lite.errors import known


class Part(NamedTuple):
    """One corpus of a mixture."""
    tokens: float   # billions, in the paper's own tokens
    share: float    # per cent of the training tokens


MIXTURES: dict[str, dict[str, Part]] = {
    "massive_text": {
        "web": Part(506, 48), "books": Part(560, 27), "c4": Part(182, 10), "news": Part(676, 10),
        "github": Part(422, 3), "wikipedia": Part(4, 2)},
    "massive_text_chinchilla": {
        "web": Part(506, 45), "books": Part(560, 30), "c4": Part(182, 10), "news": Part(676, 10),
        "github": Part(422, 4), "wikipedia": Part(4, 1)},
    "gpt3": {
        "common_crawl": Part(410, 60), "webtext2": Part(19, 22), "books1": Part(12, 8),
        "books2": Part(55, 8), "wikipedia": Part(3, 3)},
    "pile_mt_nlg": {
        "books3": Part(25.7, 14.3), "openwebtext2": Part(14.8, 19.3),
        "stack_exchange": Part(11.6, 5.7), "pubmed_abstracts": Part(4.4, 2.9),
        "wikipedia": Part(4.2, 4.8), "gutenberg": Part(2.7, 0.9), "bookcorpus2": Part(1.5, 1.0),
        "nih_exporter": Part(0.3, 0.2), "arxiv": Part(20.8, 1.4), "github": Part(24.3, 1.6),
        "pile_cc": Part(49.8, 9.4), "cc_2020_50": Part(68.7, 13.0), "cc_2021_04": Part(82.6, 15.7),
        "realnews": Part(21.9, 9.0), "cc_stories": Part(5.3, 0.9)},
}


def _mixture(name: str) -> dict[str, Part]:
    return MIXTURES[known("data.train", "published mixture", name, MIXTURES)]


def weights(name: str, tasks: Mapping[str, str]) -> str:
    """The value of data.train that mixes your tasks in a paper's proportions.

    tasks: {part of the mixture: your task}; parts may be missing, the rest keep their ratios.
    """
    parts = _mixture(name)
    for part in tasks:
        known(name, "part", part, parts)
    return ",".join(f"{task}={parts[part].share}" for part, task in tasks.items())


def epochs(name: str, tokens: float, chosen: Collection[str] = ()) -> str:
    """A table: tokens, share and epochs of each part, or of the chosen ones alone, when `tokens`
    tokens are trained on."""
    parts = {part: numbers for part, numbers in _mixture(name).items()
             if part in chosen or not chosen}
    total = sum(part.share for part in parts.values())
    lines = [f"{'part':<18}{'tokens':>9}{'share':>9}{'epochs':>9}"]
    for label, part in parts.items():
        seen = tokens * part.share / total / (part.tokens * 1e9)
        lines.append(f"{label:<18}{part.tokens:>8g}B{100 * part.share / total:>8.1f}%{seen:>9.3g}")
    return "\n".join(lines)
