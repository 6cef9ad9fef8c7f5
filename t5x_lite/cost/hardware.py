"""Published figures of the accelerators a plan can name, each with where it comes from.

All figures are per chip (a GPU is one chip), dense (no structured sparsity), and None where
nothing citable is published: a plan then says "unknown" instead of guessing.

Where the figures come from:
  TPU docs   docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x}, read 2026
  CACM'20    Jouppi et al., A Domain-Specific Supercomputer for Training DNNs, CACM 63(7), 2020
  ISCA'23    Jouppi et al., TPU v4: An Optically Reconfigurable Supercomputer, ISCA 2023, table 4
  P'21       Patterson et al., Carbon Emissions and Large Neural Network Training,
             arXiv:2104.10350, tables 1 and 4
  Austin'25  Austin et al., How to Scale Your Model, jax-ml.github.io/scaling-book, 2025, section 2
  driver     the total that NVIDIA's driver reports, of which JAX takes a share: as PyTorch's
             messages and openxla's target_config/specs show it
  libtpu     the limit that libtpu 0.0.42.1 itself states when a program does not fit
  NVIDIA     data sheets of V100 (2020), A100 (2021), H100 (2023), H200 (2024), HGX B200 (2025)
  GCP        cloud.google.com/tpu/pricing, on demand, US regions, 2025
  AWS        EC2 P-family on demand, us-east-1 Linux, 8 GPUs a machine, after the cut of June 2025
List prices move: pass your own price to t5x_lite.cost.energy where you know it.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from t5x_lite.errors import UserError, nearest

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Interconnect:
    """The fast network inside a slice (ICI) or a machine (NVLink).

    links_per_chip x bytes_per_second is what one chip can receive while it sends as much.
    Data sheets quote the sum of both directions; here is one.
    """

    kind: str  # "ici": a torus of point-to-point links; "nvlink": a switch
    links_per_chip: int  # on a torus 2 for each dimension
    bytes_per_second: float  # one link, one direction
    # a torus dimension closes into a ring when its size is a multiple of this; else it is a line
    ring_multiple: int = 1

    @property
    def bytes_per_second_per_chip(self) -> float:
        return self.links_per_chip * self.bytes_per_second


@dataclasses.dataclass(frozen=True)
class Chip:
    """One row of the table. peak_flops: FLOP/s (or integer op/s) by dtype; watts per chip."""

    name: str
    device_kinds: tuple[str, ...]  # what jax.Device.device_kind says
    peak_flops: Mapping[str, float]  # keys: bf16 fp16 tf32 fp32 fp8 int8
    hbm_bytes: int | None = None
    hbm_bytes_per_second: float | None = None
    # bytes a program may use on one JAX device, by how many devices JAX makes of one chip
    usable_hbm_bytes: Mapping[int, int] = dataclasses.field(default_factory=dict)
    interconnect: Interconnect | None = None
    host_bytes_per_second: float | None = None  # between the host's memory and one chip, each way
    network_bytes_per_second: float | None = None  # data-centre network, one direction
    chips_per_host: int | None = None
    max_watts: float | None = None  # TDP, or the highest power measured
    mean_watts: float | None = None  # mean power measured in training
    power_scope: str | None = None  # what mean_watts, or else max_watts, counts
    dollars_per_hour: float | None = None
    price_source: str | None = None

    @property
    def watts(self) -> float | None:
        """The table's power for energy estimates: measured mean if published, else the maximum."""
        return self.max_watts if self.mean_watts is None else self.mean_watts

    @property
    def power_source(self) -> str:
        """What `watts` is."""
        return "table: TDP" if self.mean_watts is None else "table: measured mean"

    def matmul_flops_per_second(self, dtype: str) -> float | None:
        """Peak of a matmul whose operands have this dtype, as XLA runs it by default.

        float32 operands: a TPU rounds them to bf16 (jax_default_matmul_precision unset), a
        recent GPU to tf32, so the peak is that of the narrower type; as the peak is used in a
        bound on speed, the faster choice is the safe one.

        Args: dtype: a numpy dtype name such as "bfloat16". Raises UserError for another.
        """
        if dtype not in _TABLE_DTYPES:
            raise UserError(
                f"no peak FLOP/s is kept for dtype {dtype!r}; known: "
                f"{', '.join(sorted(_TABLE_DTYPES))}.{nearest(dtype, _TABLE_DTYPES)}"
            )
        for key in _TABLE_DTYPES[dtype]:
            if key in self.peak_flops:
                return self.peak_flops[key]
        return None


# In the order in which a chip's units are tried. fp8 on a chip without it runs as bf16.
_TABLE_DTYPES = {
    "bfloat16": ("bf16",),
    "float16": ("fp16", "bf16"),
    "float32": ("tf32", "bf16", "fp32"),
    "float8_e4m3fn": ("fp8", "bf16"),
    "float8_e5m2": ("fp8", "bf16"),
    "int8": ("int8", "bf16"),
}

_GPU_8 = {"chips_per_host": 8, "power_scope": "TDP of the GPU module, host not counted"}
_AWS = "AWS EC2 on demand, us-east-1, June 2025"
_GCP = "Google Cloud TPU on demand, US, 2025"


def _gib(**by_devices_per_chip: float) -> dict[int, int]:
    return {int(key[1:]): round(gib * GIB) for key, gib in by_devices_per_chip.items()}


_A100 = Chip(
    "a100-40g",
    ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
    {  # NVIDIA
        "bf16": 312 * TERA,
        "fp16": 312 * TERA,
        "tf32": 156 * TERA,
        "fp32": 19.5 * TERA,
        "int8": 624 * TERA,
    },
    hbm_bytes=40 * 10**9,  # NVIDIA
    usable_hbm_bytes=_gib(x1=39.42),  # driver
    hbm_bytes_per_second=1555 * GIGA,  # NVIDIA
    host_bytes_per_second=32 * GIGA,  # NVIDIA: PCIe Gen4, 64 GB/s both ways
    interconnect=Interconnect("nvlink", 12, 25 * GIGA),  # NVIDIA: 600 GB/s both ways
    network_bytes_per_second=25 * GIGA,  # DGX A100: 8 x 200 Gbit/s for 8 GPUs
    max_watts=400,  # NVIDIA: TDP
    dollars_per_hour=21.96 / 8,  # p4d.24xlarge
    price_source=_AWS,
    **_GPU_8,
)
_H100 = Chip(
    "h100",
    ("NVIDIA H100 80GB HBM3",),
    {  # NVIDIA, SXM5
        "bf16": 989.4 * TERA,
        "fp16": 989.4 * TERA,
        "tf32": 494.7 * TERA,
        "fp32": 66.9 * TERA,
        "fp8": 1978.9 * TERA,
        "int8": 1978.9 * TERA,
    },
    hbm_bytes=80 * 10**9,  # NVIDIA
    usable_hbm_bytes=_gib(x1=79.11),  # driver
    hbm_bytes_per_second=3350 * GIGA,  # NVIDIA
    host_bytes_per_second=64 * GIGA,  # NVIDIA: PCIe Gen5, 128 GB/s both ways
    interconnect=Interconnect("nvlink", 18, 25 * GIGA),  # NVIDIA: 900 GB/s both ways
    network_bytes_per_second=50 * GIGA,  # DGX H100: 8 x 400 Gbit/s for 8 GPUs
    max_watts=700,  # NVIDIA: TDP
    dollars_per_hour=55.04 / 8,  # p5.48xlarge
    price_source=_AWS,
    **_GPU_8,
)

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            "v2",
            ("TPU v2",),
            {"bf16": 46 * TERA},  # CACM'20
            hbm_bytes=16 * GIB,  # CACM'20
            hbm_bytes_per_second=700 * GIGA,  # CACM'20
            usable_hbm_bytes=_gib(x2=7.48),  # libtpu
            interconnect=Interconnect("ici", 4, 62 * GIGA),  # CACM'20: 4 links of 496 Gbit/s
            chips_per_host=4,  # TPU docs
            max_watts=280,  # P'21, table 1: TDP
            mean_watts=208,  # P'21, table 4: Evolved Transformer
            power_scope="measured mean per chip, host and network included (P'21)",
            dollars_per_hour=4.50 / 4,
            price_source=_GCP,
        ),
        Chip(
            "v3",
            ("TPU v3",),
            {"bf16": 123 * TERA},  # TPU docs
            hbm_bytes=32 * GIB,  # TPU docs
            hbm_bytes_per_second=900 * GIGA,  # TPU docs
            usable_hbm_bytes=_gib(x2=15.48),  # libtpu
            interconnect=Interconnect("ici", 4, 82 * GIGA),  # CACM'20: 4 links of 656 Gbit/s
            chips_per_host=4,  # TPU docs
            max_watts=450,  # P'21, table 1: TDP
            mean_watts=283,  # P'21, table 4: mean of T5 310, Meena 289, GShard 288, Switch 245
            power_scope="measured mean per chip, host and network included (P'21)",
            dollars_per_hour=8.00 / 4,
            price_source=_GCP,
        ),
        Chip(
            "v4",
            ("TPU v4",),
            {"bf16": 275 * TERA, "int8": 275 * TERA},  # TPU docs
            hbm_bytes=32 * GIB,  # TPU docs
            hbm_bytes_per_second=1200 * GIGA,  # TPU docs
            host_bytes_per_second=16 * GIGA,  # Austin'25: each way
            usable_hbm_bytes=_gib(x1=30.75, x2=15.25),  # libtpu; one device a chip is "megacore"
            interconnect=Interconnect("ici", 6, 50 * GIGA, ring_multiple=4),  # ISCA'23; TPU docs
            chips_per_host=4,  # TPU docs
            max_watts=192,  # TPU docs: highest measured
            mean_watts=170,  # TPU docs: mean measured
            power_scope="measured mean of the chip, host not counted",
            dollars_per_hour=3.22,
            price_source=_GCP,
        ),
        Chip(
            "v5e",
            ("TPU v5 lite", "TPU v5e"),
            {"bf16": 197 * TERA, "int8": 393 * TERA},  # TPU docs
            hbm_bytes=16 * GIB,  # TPU docs
            hbm_bytes_per_second=819 * GIGA,  # TPU docs
            host_bytes_per_second=15 * GIGA,  # Austin'25
            usable_hbm_bytes=_gib(x1=15.75),  # libtpu
            # TPU docs: 400 GB/s both ways over 4 ports; only a full dimension of 16 is a ring
            interconnect=Interconnect("ici", 4, 50 * GIGA, ring_multiple=16),
            network_bytes_per_second=25 / 8 * GIGA,  # TPU docs: 2 x 100 Gbit/s for 8 chips
            chips_per_host=8,  # TPU docs
            dollars_per_hour=1.20,
            price_source=_GCP,
        ),
        Chip(
            "v5p",
            ("TPU v5", "TPU v5p"),
            {  # TPU docs; int8: Google's announcement of December 2023
                "bf16": 459 * TERA,
                "fp8": 459 * TERA,
                "int8": 918 * TERA,
            },
            hbm_bytes=95 * GIB,  # TPU docs
            hbm_bytes_per_second=2765 * GIGA,  # TPU docs
            host_bytes_per_second=15 * GIGA,  # Austin'25
            usable_hbm_bytes=_gib(x1=95.74),  # libtpu
            # TPU docs: 1200 GB/s both ways; slices of 4x4x4 and larger have full tori
            interconnect=Interconnect("ici", 6, 100 * GIGA, ring_multiple=4),
            network_bytes_per_second=50 / 8 * GIGA,  # TPU docs
            chips_per_host=4,  # TPU docs
            dollars_per_hour=4.20,
            price_source=_GCP,
        ),
        Chip(
            "v6e",
            ("TPU v6 lite", "TPU v6e"),
            {"bf16": 918 * TERA, "fp8": 918 * TERA, "int8": 1836 * TERA},  # TPU docs
            hbm_bytes=32 * GIB,  # TPU docs
            hbm_bytes_per_second=1638 * GIGA,  # TPU docs
            host_bytes_per_second=32 * GIGA,  # Austin'25
            usable_hbm_bytes=_gib(x1=31.25),  # libtpu
            interconnect=Interconnect("ici", 4, 100 * GIGA, ring_multiple=16),  # TPU docs: 800 GB/s
            network_bytes_per_second=100 / 8 * GIGA,  # TPU docs: 4 x 200 Gbit/s for 8 chips
            chips_per_host=8,  # TPU docs
            dollars_per_hour=2.70,
            price_source=_GCP,
        ),
        Chip(
            "v7x",
            ("TPU7x", "TPU v7x"),
            {"bf16": 2307 * TERA, "fp8": 4614 * TERA},  # TPU docs
            hbm_bytes=192 * GIB,  # TPU docs
            hbm_bytes_per_second=7380 * GIGA,  # TPU docs
            usable_hbm_bytes=_gib(x2=94.75),  # libtpu
            interconnect=Interconnect("ici", 6, 100 * GIGA, ring_multiple=4),  # TPU docs: 1200 GB/s
            network_bytes_per_second=100 / 8 * GIGA,  # TPU docs
            chips_per_host=4,  # TPU docs
        ),
        Chip(
            "v100",
            ("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"),
            {"fp16": 125 * TERA, "fp32": 15.7 * TERA},  # NVIDIA
            hbm_bytes=32 * 10**9,  # NVIDIA; the first version had 16 GB
            usable_hbm_bytes=_gib(x1=31.75),  # driver
            hbm_bytes_per_second=900 * GIGA,  # NVIDIA
            host_bytes_per_second=16 * GIGA,  # NVIDIA: PCIe Gen3, 32 GB/s both ways
            interconnect=Interconnect("nvlink", 6, 25 * GIGA),  # NVIDIA: 300 GB/s both ways
            network_bytes_per_second=6.25 * GIGA,  # DGX-1: 4 x 100 Gbit/s for 8 GPUs
            chips_per_host=8,
            max_watts=300,  # NVIDIA: TDP
            mean_watts=330,  # P'21, table 4: GPT-3
            power_scope="measured mean per GPU, host and network included (P'21)",
            dollars_per_hour=24.48 / 8,  # p3.16xlarge
            price_source=_AWS,
        ),
        _A100,
        dataclasses.replace(
            _A100,
            name="a100-80g",
            device_kinds=("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
            hbm_bytes=80 * 10**9,  # NVIDIA
            usable_hbm_bytes=_gib(x1=79.26),  # driver
            hbm_bytes_per_second=2039 * GIGA,  # NVIDIA
            dollars_per_hour=27.45 / 8,  # p4de.24xlarge
        ),
        _H100,
        dataclasses.replace(
            _H100,
            name="h200",
            device_kinds=("NVIDIA H200",),
            hbm_bytes=141 * 10**9,  # NVIDIA
            usable_hbm_bytes=_gib(x1=141.00),  # driver
            hbm_bytes_per_second=4800 * GIGA,  # NVIDIA
            dollars_per_hour=63.30 / 8,  # p5en.48xlarge
        ),
        Chip(
            "b200",
            ("NVIDIA B200",),
            {  # NVIDIA, HGX at 1000 W
                "bf16": 2250 * TERA,
                "fp16": 2250 * TERA,
                "tf32": 1100 * TERA,
                "fp8": 4500 * TERA,
                "int8": 4500 * TERA,
            },
            hbm_bytes=180 * 10**9,  # DGX B200: 1440 GB for 8 GPUs
            usable_hbm_bytes=_gib(x1=178.36),  # driver
            hbm_bytes_per_second=8000 * GIGA,  # NVIDIA
            interconnect=Interconnect("nvlink", 18, 50 * GIGA),  # NVIDIA: 1800 GB/s both ways
            network_bytes_per_second=50 * GIGA,  # DGX B200: 8 x 400 Gbit/s for 8 GPUs
            max_watts=1000,  # NVIDIA: TDP
            dollars_per_hour=113.93 / 8,  # p6-b200.48xlarge
            price_source=_AWS,
            **_GPU_8,
        ),
        Chip("cpu", ("cpu",), {}),  # nothing is true of all processors
    )
}


def lookup(name: str) -> Chip:
    """The row for a table name ("v5e", "h100") or for what jax.Device.device_kind says.

    Raises UserError that lists the known names for another accelerator.
    """
    wanted = name.strip().lower()
    for chip in CHIPS.values():
        if wanted == chip.name or wanted in (kind.lower() for kind in chip.device_kinds):
            return chip
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    raise UserError(
        f"no hardware figures are kept for {name!r}. Known names: {', '.join(CHIPS)}; known "
        f"device kinds: {', '.join(kinds)}.{nearest(name, [*CHIPS, *kinds])}"
    )


def count_chips(devices: Iterable) -> int:
    """How many chips these JAX devices are: TPU v2, v3, v7x and plain v4 make two devices of one.

    TPU devices of one chip share slice_index and coords; any other device is a chip.
    """
    devices = list(devices)
    if not all(device.platform == "tpu" for device in devices):   # described GPUs have coords too
        return len(devices)
    return len({(getattr(d, "slice_index", None), tuple(d.coords)) for d in devices})
