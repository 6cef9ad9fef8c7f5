"""What of a state is beyond the device, and what a step moves there, by hand."""

import dataclasses

import jax
import pytest

from t5x_lite.build import build
from t5x_lite.config import ShardingConfig
from t5x_lite.cost import hardware, roofline
from t5x_lite.planning import make, rehearse, show, traffic
from t5x_lite.planning.traffic import Kept, Traffic
from tests import tiny


def program(offload, accumulation=1):
    base = tiny.seq2seq(remat="full")
    return build(dataclasses.replace(
        base, optimizer=dataclasses.replace(base.optimizer, name="adamw"),
        sharding=ShardingConfig(offload=offload),   # of a disk no folder: nothing is made yet
        train=dataclasses.replace(base.train, accumulation=accumulation)), jax.devices()[:1])


def stacks_and_all(program):
    """float32 bytes of the stacks' parameters, and of all."""
    sizes = {path: 4 * info.size for path, info in program.table.items()}
    return sum(n for path, n in sizes.items() if "/segment_" in path), sum(sizes.values())


def test_what_is_kept_where():
    plain = program("none")
    stacks, whole = stacks_and_all(plain)
    assert 0 < stacks < whole
    assert traffic.kept(plain) == Kept(0, 0, 0) and traffic.traffic(plain) == Traffic()
    assert traffic.kept(program("optimizer_host")) == Kept(0, 2 * whole, 0)
    assert traffic.kept(program("params_host")) == Kept(stacks, 2 * whole, 0)
    assert traffic.kept(program("optimizer_disk")) == Kept(0, 0, 2 * whole)
    for offload in ("none", "optimizer_host", "params_host", "optimizer_disk"):
        found = program(offload)
        at_home = rehearse.argument_bytes(found)
        kept = traffic.kept(found)
        assert at_home["params"] + kept.host_params == whole
        assert at_home["opt_state"] - 4 + kept.host_optimizer + kept.disk == 2 * whole   # 4: the count


def test_what_a_step_moves():
    stacks, whole = stacks_and_all(program("none"))
    moments = 2 * whole
    assert traffic.traffic(program("optimizer_host")) == Traffic(moments, moments)
    assert traffic.traffic(program("optimizer_disk")) == Traffic(moments, moments, moments, moments)
    # Parameters: forward, backward, update; gradients: norm, update. Back: parameters, gradients.
    assert traffic.traffic(program("params_host")) == Traffic(5 * stacks + moments, 2 * stacks + moments)
    # Four passes and the update; the second micro-batch reads the sum and writes it again.
    assert traffic.traffic(program("params_host", accumulation=2)) == Traffic(
        8 * stacks + moments, 3 * stacks + moments)


def test_bounds_of_link_and_disk():
    v4 = hardware.lookup("v4")
    beyond = roofline.Beyond(32 * 10**9, v4.host_bytes_per_second, 10**9, 5e8)
    bound = roofline.roofline(v4, num_chips=1, model_flops=275e12, dtype="bfloat16", beyond=beyond)
    assert bound.parts["compute"] == 1.0 and bound.parts["host link"] == 2.0 and bound.parts["disk"] == 2.0
    assert bound.bound_seconds == 2.0 and bound.limited_by == "host link"
    unknown = roofline.roofline(v4, num_chips=1, model_flops=275e12, dtype="bfloat16",
                                beyond=dataclasses.replace(beyond, disk_bytes_per_second=None))
    assert "the disk (--disk_bandwidth)" in unknown.unknown and "disk" not in unknown.parts
    nothing = roofline.roofline(v4, num_chips=1, model_flops=275e12, dtype="bfloat16")
    assert {"disk", "host link"}.isdisjoint({*nothing.parts, *nothing.unknown})


@pytest.mark.slow
def test_a_plan_says_so():
    config = program("optimizer_disk").config
    plan = make.make_plan(config, rehearse.topology("cpu:1"), make.Assumptions(disk_bandwidth=2.0))
    moved = traffic.traffic(plan.program)
    assert plan.roofline.disk_seconds == (moved.disk_read + moved.disk_written) / 2e9
    assert show.to_json(plan)["disk_bytes"] == moved.disk_read
    text = show.screen(plan)
    assert "on disk" in text and "the host's link (--host_bandwidth)" in text
