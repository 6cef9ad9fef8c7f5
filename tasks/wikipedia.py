"""English Wikipedia through TFDS, an article a document, with T5's public vocabulary.

    wikipedia_span_corruption, wikipedia_causal_lm, …    a task a denoiser (data/denoising.py)

The first 5,000 articles are held out. TFDS fetches the dump of June 2023 that it has prepared, or
finds it in TFDS_DATA_DIR. Sentences with their names and dates: tasks/salient_spans.py.
"""

from t5x_lite.data import denoising
from t5x_lite.data.text_to_text import TfdsSource

denoising.register("wikipedia", TfdsSource("wikipedia/20230601.en:1.0.0", {
    "train": "train[5000:]", "validation": "train[:5000]"}), "t5", cached=True)
