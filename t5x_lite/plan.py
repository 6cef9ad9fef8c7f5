"""Rehearse a run: `python -m t5x_lite.plan --config=configs/t5_1_1.py:base --topology=v5e:2x4`.

Compiles the very step that train would run, for machines that need not be there, and says
whether it fits, what it sends over which network, how fast it can be at best, and what the
whole run takes in time, energy, carbon and money. --json prints one object instead.
--published derives time, energy and carbon of six known runs, beside what was published.

Three kinds of figures stand apart: the compiler's (memory, collectives), the bound (roofline:
no step is faster), and an assumption (--mfu), from which time, energy and price follow.
"""

if __name__ == "__main__":   # --help is answered before what is slow to import
    import sys

    from t5x_lite import manual
    manual.answer(__file__, sys.argv)

import json
import logging

from t5x_lite import cli  # first of all: it sets what JAX and TensorFlow read on import

# isort: split

import jax
from absl import flags

from t5x_lite import quiet
from t5x_lite.cost import energy
from t5x_lite.errors import UserError
from t5x_lite.planning import make, rehearse, search, show

if __name__ == "__main__":
    _CONFIG = cli.define_config()
    _TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5e:2x4, v5p:4x4x4, cpu:8, h100:8.")
    _SLICES = flags.DEFINE_integer("num_slices", 1, "TPU slices of that shape.")
    _JSON = flags.DEFINE_bool("json", False, "One JSON object instead of a screen.")
    _PUBLISHED = flags.DEFINE_bool("published", False, "Six known runs instead of a config's.")
    _SEARCH = flags.DEFINE_bool("search", False, "Try what would make it fit, and other meshes.")
    _MFU = flags.DEFINE_float("mfu", make.DEFAULT_MFU, "Assumed for the whole run's time.")
    _WATTS = flags.DEFINE_float("watts", None, "Mean power of a chip; default: the table's.")
    _PUE = flags.DEFINE_float("pue", energy.PUE_GOOGLE_2020, "Of the data centre.")
    _KG = flags.DEFINE_float("kg_per_kwh", energy.KG_PER_KWH_US_2020, "CO2e, gross.")
    _KG_NET = flags.DEFINE_float("kg_per_kwh_net", None, "CO2e after matched clean energy.")
    _HOST = flags.DEFINE_float("host_bandwidth", None, "GB/s of host and chip, each way; default: the table's.")
    _DISK = flags.DEFINE_float("disk_bandwidth", None, "GB/s of the disk of sharding.offload_folder.")
    _DOLLARS = flags.DEFINE_float("dollars_per_chip_hour", None, "Default: the list price.")

    def main() -> None:
        # Devices are described; those that this machine has are left alone.
        jax.config.update("jax_platforms", "cpu")
        with quiet.stderr():
            jax.local_devices()
        logging.getLogger("t5x_lite").setLevel(logging.WARNING)
        # A search's trials, each of which may take minutes.
        logging.getLogger(search.__name__).setLevel(logging.INFO)
        given = make.Assumptions(_MFU.value, _WATTS.value, _PUE.value, _KG.value, _KG_NET.value,
                                 _DOLLARS.value, _HOST.value, _DISK.value)
        if _PUBLISHED.value:
            print(json.dumps(show.published_json()) if _JSON.value else show.published())
            return
        config = cli.run_config(_CONFIG)
        if not _TOPOLOGY.value:
            raise UserError("--topology is missing. Known:\n" + rehearse.known_topologies())
        plan = make.make_plan(config, rehearse.topology(_TOPOLOGY.value, _SLICES.value), given)
        trials = search.search(plan) if _SEARCH.value else []
        print(json.dumps(show.to_json(plan, trials)) if _JSON.value else show.screen(plan, trials))

    cli.run(main, alone=True)
