"""C4 through TFDS, with T5's public vocabulary (Raffel et al. 2020, arXiv:1910.10683).

    c4_span_corruption        T5's pre-training task
    c4_span_corruption_byt5   the same over bytes, in ByT5's spans of 20
    c4_causal_lm, c4_prefix_lm, c4_bert, c4_bart, c4_ul2   other denoisers (data/denoising.py)

TFDS_DATA_DIR must hold c4/en:3.0.1 (a local folder or gs://); T5X_LITE_T5_VOCAB names the
vocabulary where the network does not reach gs://t5-data.
"""

import os

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from t5x_lite.data import denoising, vocabularies
from t5x_lite.errors import UserError


class PreparedTfdsDataSource(seqio.TfdsDataSource):
    """A TFDS data set that is never prepared on the fly: 800 GB for C4, on a Beam cluster."""

    def __init__(self, name: str, splits: tuple[str, ...]):
        super().__init__(name, splits=splits, read_only=True)

    @property
    def tfds_dataset(self):
        try:
            folder = str(self._tfds_dataset.builder.data_path)
        except (AssertionError, tfds.core.DatasetNotFoundError):
            folder = ""   # the installed TFDS makes other versions, and no folder holds this one
        if not folder or not tf.io.gfile.exists(folder):
            where = os.environ.get("TFDS_DATA_DIR", "(not set)")
            raise UserError(f"the TFDS data set {self._tfds_dataset.name} is not in TFDS_DATA_DIR="
                            f"{where}; set it to the folder or gs:// path that holds the prepared "
                            "data (https://www.tensorflow.org/datasets/catalog/c4 says how to "
                            "make it)")
        return self._tfds_dataset


def _register() -> None:
    source = PreparedTfdsDataSource("c4/en:3.0.1", ("train", "validation"))
    denoising.register("c4", source, "t5", cached=True)
    feature = seqio.Feature(vocabularies.load("byt5"), add_eos=True)
    seqio.TaskRegistry.add(
        "c4_span_corruption_byt5", source=source,
        preprocessors=denoising.steps("span_corruption", cached=True, mean_span_length=20.0),
        output_features={"inputs": feature, "targets": feature})


_register()
