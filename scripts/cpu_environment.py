"""What XLA's CPU backend runs fastest with; the benchmarks import this before anything else.

libc and XLA read these variables as the process starts (DESIGN: huge pages for XLA's arena, the
library's kernels for single products; the Makefile sets the same), so on the CPU the script
starts itself again with them.
"""

import os
import sys

VARIABLES = {
    # Large pages, and none given back to the system between steps.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
                      "glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1",
    "XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}

if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu" and "GLIBC_TUNABLES" not in os.environ:
    for name, value in VARIABLES.items():
        os.environ[name] = f"{os.environ.get(name, '')} {value}".strip()
    os.execv(sys.executable, [sys.executable, *sys.argv])
