"""Checkpoints of the outside world, in and out: `python -m t5x_lite.convert --from=… --to=…`.

    mapping.py          tables of ours <-> theirs, used in both directions; ForeignModel
    functions.py        what decides the function that parameters compute, compared
    safetensors.py      tensor files, read lazily and written one tensor at a time
    hf.py               the families of Hugging Face transformers; hf_*.py hold their tables
    t5x.py, mesh_tf.py  native T5X checkpoints, and Mesh TensorFlow's names for the same
    __main__.py         the command

Nothing here needs transformers or torch (but for reading pytorch_model.bin).
"""
