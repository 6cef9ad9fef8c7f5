"""Every preset builds abstractly and has the parameters of its paper, to the digits it gives."""

import importlib
import re

import pytest

from configs import (
    deepseek,
    gemma,
    gopher,
    gpt3,
    gshard,
    lamda,
    mixtral,
    palm,
    quickstart,
    qwen,
    st_moe,
    switch,
    t5_1_1,
)
from scripts import preset_table
from t5x_lite.config import RunConfig, from_mapping
from t5x_lite.cost import flops
from t5x_lite.errors import UserError
from t5x_lite.models.language_model import Model
from t5x_lite.planning import make, rehearse, show
from t5x_lite.training import batch_ramp, schedules

# As published: by the paper, or where its numbers are known to be wrong or missing (the configs'
# docstrings say which) counted from the released checkpoints, with all digits.
PUBLISHED = {
    "t5_1_0": {"small": "60_506_624", "base": "222_903_552", "large": "737_668_096",
               "3b": "2_851_598_336", "11b": "11_307_321_344"},
    "t5_1_1": {"small": "76_961_152", "base": "247_577_856", "large": "783_150_080",
               "xl": "2_849_757_184", "xxl": "11_135_332_352"},
    "mt5": {"small": "300M", "base": "580M", "large": "1.2B", "xl": "3.7B", "xxl": "13B"},
    "byt5": {"small": "300M", "base": "582M", "large": "1.23B", "xl": "3.74B", "xxl": "12.9B"},
    "umt5": {"small": "307M", "base": "592M", "xl": "3.77B", "xxl": "12.97B"},
    "ul2": {"20b": "20B"},
    "gpt2": {"small": "124_439_808", "medium": "354_823_168", "large": "774_030_080",
             "xl": "1_557_611_200"},
    "gpt3": {"125m": "125M", "350m": "356M", "760m": "760M", "1_3b": "1.3B", "2_7b": "2.7B",
             "6_7b": "6.7B", "13b": "13B", "175b": "175B"},
    "turing_nlg": {"17b": "17B"},
    "mt_nlg": {"530b": "530B"},
    "gopher": {"44m": "44M", "117m": "117M", "417m": "417M", "1_4b": "1.4B", "7_1b": "7.1B",
               "280b": "280B"},
    "chinchilla": {"70b": "70B"},
    "gpt_neox": {"20b": "20_554_567_680"},
    "xglm": {"7_5b": "7.5B"},
    "llama": {"2_7b": "6_738_415_616", "2_13b": "13_015_864_320", "2_34b": "34B",
              "2_70b": "68_976_648_192", "3_8b": "8_030_261_248", "3_70b": "70_553_706_496",
              "3_1_8b": "8_030_261_248", "3_1_70b": "70_553_706_496",
              "3_1_405b": "405_853_388_800", "3_2_1b": "1_235_814_400",
              "3_2_3b": "3_212_749_824"},
    "pythia": {"14m": "14_067_712", "31m": "30_494_720", "70m": "70_426_624",
               "160m": "162_322_944", "410m": "405_334_016", "1b": "1_011_781_632",
               "1_4b": "1_414_647_808", "2_8b": "2_775_208_960", "6_9b": "6_857_302_016",
               "12b": "11_846_072_320"},
    "polycoder": {"2_7b": "2.7B"},
    "pangu_alpha": {"2_6b": "2.6B", "200b": "207B"},
    "t5_lm_adapted": {"small": "76_961_152", "base": "247_577_856", "large": "783_150_080",
                      "xl": "2_849_757_184", "xxl": "11_135_332_352"},
    "flan_t5": {"small": "76_961_152", "base": "247_577_856", "large": "783_150_080",
                "xl": "2_849_757_184", "xxl": "11_135_332_352"},
    "bert": {"base": "110M", "large": "340M"},
    "bart": {"base": "139_420_416", "large": "406_291_456"},
    "deepnet": {"3_2b": "3.2B"},
    "gemma": {"2_2b": "2_614_341_888", "2_9b": "9_241_705_984", "2_27b": "27_227_128_320",
              "3_270m": "268_098_176", "3_1b": "999_885_952", "3_4b": "3_880_263_168",
              "3_12b": "11_766_034_176", "3_27b": "27_009_346_304"},
    # What their shapes give; the shapes are those of torchtune's models/qwen3/_model_builders.py (0_6b to 32b, each
    # naming its repository), MaxText's qwen3-30b-a3b.yml and MindSpeed-RL's qwen3_235b_a22b.yaml.
    "qwen": {"0_6b": "596_049_920", "1_7b": "1_720_574_976", "4b": "4_022_468_096",
             "8b": "8_190_735_360", "14b": "14_768_307_200", "32b": "32_762_123_264",
             "30b_a3b": "30_532_122_624", "235b_a22b": "235_093_634_560"},
    # The shapes of allenai's config.json of OLMo-2-1124-7B, -13B and 0325-32B, and of 1b OLMo-core's olmo2_1B_v2.
    "olmo": {"1b": "1_484_916_736", "7b": "7_298_617_344", "13b": "13_716_198_400",
             "32b": "32_234_279_936"},
    # Their shapes are config.json's, and of v2_lite MaxText's deepseek2-16b.yml too.
    "deepseek": {"v2_lite": "15.7B", "v2": "236B"},
}


def agrees(count: int, published: str) -> bool:
    """Whether the count rounds to the published number ("0M" may be two digits: 580M, 340M)."""
    if published[-1].isdigit():
        return count == int(published)
    unit = {"M": 1e6, "B": 1e9}[published[-1]]
    digits = published[:-1]
    decimals = len(digits.partition(".")[2])
    rounded = {round(count / unit, decimals)}
    if not decimals and digits.endswith("0"):
        rounded.add(round(count / unit, -1))
    return float(digits) in rounded


def table_of(family, size):
    """The parameter table of a preset, from the config as a command line gives it."""
    run = from_mapping(RunConfig, family.get_config(size))
    assert run == family.run(size)
    return run, Model(run.model).table


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    family = importlib.import_module(f"configs.{name}")
    assert PUBLISHED[name].keys() == family.SIZES.keys()
    for size, published in PUBLISHED[name].items():
        run, table = table_of(family, size)
        count = sum(info.size for info in table.values())
        assert agrees(count, published), f"{name}:{size}: {count:,} is not {published}"
        unit = batch_ramp.batch_unit(run.train.batch_ramp, run.train.global_batch_size)
        assert unit % run.data.num_shards == 0, f"{name}:{size}"
        schedules.schedule(schedules.until(run.optimizer.schedule, run.train.num_steps))


def test_palm_counts_kernels_and_embeddings():
    """The published numbers leave out the norms' scales: 540.356B with them, not 540.35B."""
    for size, published in {"8b": "8.63B", "62b": "62.50B", "540b": "540.35B"}.items():
        run, table = table_of(palm, size)
        count = sum(i.size for i in table.values() if i.logical_axes[-1] != "norm")
        assert agrees(count, published), f"{size}: {count:,}"


def test_lamda_counts_without_embeddings():
    run, table = table_of(lamda, "137b")
    counts = flops.parameter_counts(run.model, table)
    assert agrees(counts.non_embedding, "137B")


@pytest.mark.parametrize("size,published", [   # Gemma 2's table 2, Gemma 3's table 1
    ("2_2b", "2024M"), ("2_9b", "8324M"), ("2_27b", "26047M"), ("3_270m", "100M"), ("3_1b", "698M"),
    ("3_4b", "3209M"), ("3_12b", "10759M"), ("3_27b", "25600M")])
def test_gemma_counts_without_embeddings(size, published):
    run, table = table_of(gemma, size)
    count = flops.parameter_counts(run.model, table).non_embedding
    assert abs(count / 1e6 - int(published[:-1])) < 1, count   # one is cut off, the others rounded


@pytest.mark.parametrize("family,size,published", [
    (qwen, "30b_a3b", "3.35B"), (qwen, "235b_a22b", "22B"), (deepseek, "v2", "21B"),
    # 2.4B are 2,451M without the table of embeddings, cut off.
    (deepseek, "v2_lite", "2.66B")], ids=lambda x: getattr(x, "__name__", str(x)))
def test_mixtures_have_the_published_active_parameters(family, size, published):
    run, table = table_of(family, size)
    counts = flops.parameter_counts(run.model, table)
    assert agrees(round(counts.active), published), counts
    if size == "v2_lite":
        assert int((counts.active - counts.embedding) / 1e8) == 24


def test_gpt3_takes_the_published_compute():
    """Appendix D: 3.14e23 FLOPs for 175B parameters and 300B tokens."""
    run, _ = table_of(gpt3, "175b")
    rows = batch_ramp.sequences_before(run.train.batch_ramp, run.train.global_batch_size,
                                      run.train.num_steps)
    assert rows * 2048 == pytest.approx(300e9, rel=1e-4)
    assert rows * flops.train_flops(run.model, 1, 0, 2048) == pytest.approx(3.14e23, rel=0.05)


def test_recipes_count_tokens_through_the_ramp():
    """Gopher 280B: 150B tokens in batches of 3M, 150B in batches of 6M; PaLM's three stages."""
    run = gopher.run("280b")
    assert run.train.batch_ramp.stages == ((1536, 47684),)   # 150e9 / (1536 x 2048), rounded up
    assert batch_ramp.batch_size_at(run.train.batch_ramp, run.train.global_batch_size, 47683) == 1536
    assert batch_ramp.batch_size_at(run.train.batch_ramp, run.train.global_batch_size, 47684) == 3072
    run = palm.run("540b")
    sizes = [batch_ramp.batch_size_at(run.train.batch_ramp, 2048, step)
             for step in (49_999, 50_000, 114_999, 115_000)]
    assert sizes == [512, 1024, 1024, 2048]
    assert abs(run.train.num_steps - 255_000) < 1000   # the paper: until step 255k


@pytest.mark.parametrize(("family", "size", "billions", "digits"), [
    (switch, "base_8", 0.62, 2), (switch, "base_128", 7.4, 2), (switch, "base_256", 14.7, 3),
    (switch, "large_128", 26, 2), (switch, "xxl", 395, 3), (switch, "c", 1571, 4),
    (gshard, "600b", 600, 1), (st_moe, "32b", 269, 3), (mixtral, "8x7b", 46.7, 3)],
    ids=lambda x: getattr(x, "__name__", str(x)))
def test_mixtures_have_the_papers_parameters_to_its_digits(family, size, billions, digits):
    run = from_mapping(RunConfig, family.get_config(size))
    total = sum(info.size for info in Model(run.model).table.values()) / 1e9
    assert float(f"{total:.{digits}g}") == pytest.approx(billions), total


def test_mixtures_stand_where_the_papers_say():
    moe = [p for p in Model(st_moe.run().model).table if p.endswith("router/kernel")]
    assert moe == ["decoder/segment_0/block_3/mlp/router/kernel",
                   "encoder/segment_0/block_3/mlp/router/kernel"]
    assert [s.repeats for s in st_moe.run().model.encoder.segments] == [6, 3]


def test_the_quickstart_has_a_sparse_twin():
    dense, sparse = Model(quickstart.run().model), Model(quickstart.run("moe").model)
    assert sum(i.size for i in dense.table.values()) == 1_967_872
    assert any(p.endswith("experts/wi_0/kernel") for p in sparse.table)
    with pytest.raises(UserError, match="may be moe"):
        quickstart.get_config("mo")


def test_an_unknown_size_names_those_there_are():
    with pytest.raises(UserError, match=r"did you mean 'xxl'\? Sizes: small, base, large, xl, xxl"):
        t5_1_1.get_config("xxxl")


# --- Planned ----------------------------------------------------------------------------------

def test_every_preset_has_a_row_among_the_rehearsals():
    text = (preset_table.CONFIGS.parent / "docs/rehearsals.md").read_text()
    rows = re.findall(r"^\| ([a-z0-9_:]+) \| [\d,]+ \|", text, re.MULTILINE)
    assert rows == [f"{family}:{size}" if size else family
                    for family, sizes in preset_table.presets().items() for size in sizes]
    line = next(line for line in preset_table.table() if line.startswith("| bart:base"))
    assert line in text


@pytest.mark.slow
@pytest.mark.parametrize("family", preset_table.presets())
def test_every_family_can_be_planned(family):
    """The first size on 16 H100, all but the compiler's part: activations are traced too."""
    config = preset_table.split(family, preset_table.presets()[family][0])
    made = make.make_plan(config, rehearse.topology("h100:16", count_only=True))
    state = made.program.num_params * 4 / config.mesh.fsdp
    assert made.fits is (None if made.argument_bytes <= 80e9 else False)
    assert made.argument_bytes > 0.9 * state and made.activation_bytes > 0
    # The bound leaves out what may be skipped.
    assert 0 < made.roofline.compute_seconds <= 1.001 * made.roofline.model_seconds
    assert config.name in show.screen(made)
