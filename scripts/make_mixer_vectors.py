"""Makes tests/vectors/mixers/*.npz: weights, inputs and outputs of other programs' token mixers.

    python scripts/make_mixer_vectors.py

torch.nn.LSTM, and of transformers the recurrent block of RecurrentGemma and Mamba-2's mixer, each on
the CPU in float32 with weights drawn here. tests/parity/test_mixers.py gives the weights to ours.
Needs the extra [test].
"""

import pathlib

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "tests" / "vectors" / "mixers"
ROWS, LENGTH, WIDTH = 2, 9, 8


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """The module with weights of a size at which every part of it matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.4)
    return module.eval()


def inputs() -> torch.Tensor:
    """x_BLD."""
    torch.manual_seed(0)
    return torch.randn(ROWS, LENGTH, WIDTH)


def lstm() -> dict:
    """One layer of 6 hidden features; y are its hidden states."""
    module = drawn(torch.nn.LSTM(WIDTH, 6, batch_first=True))
    with torch.no_grad():
        return {"x": inputs(), "y": module(inputs())[0], **module.state_dict()}


def rg_lru() -> dict:
    """Griffin's recurrent block: 12 features in 3 blocks, 4 taps."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (
        RecurrentGemmaRecurrentBlock,
    )
    config = RecurrentGemmaConfig(hidden_size=WIDTH, lru_width=12, num_attention_heads=3, conv1d_width=4)
    module = drawn(RecurrentGemmaRecurrentBlock(config, 0))
    positions = torch.arange(LENGTH)[None].repeat(ROWS, 1)
    with torch.no_grad():
        y, _ = module(inputs(), positions, None, use_cache=False)
    return {"x": inputs(), "y": y, **module.state_dict()}


def ssd() -> dict:
    """Mamba-2's mixer: 16 features in 4 heads, a state of 6, one group, 4 taps."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    config = Mamba2Config(hidden_size=WIDTH, expand=2, num_heads=4, head_dim=4, state_size=6, n_groups=1,
                          chunk_size=4, conv_kernel=4, num_hidden_layers=1)
    module = drawn(Mamba2Mixer(config, 0))
    with torch.no_grad():
        y = module(inputs())
    return {"x": inputs(), "y": y, **module.state_dict()}


MADE = {"lstm": lstm, "rg_lru": rg_lru, "ssd": ssd}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, make in MADE.items():
        arrays = {key: np.asarray(x, np.float32) for key, x in make().items()}
        np.savez(FOLDER / f"{name}.npz", **arrays)
        print(f"{name}: {', '.join(f'{key} {x.shape}' for key, x in arrays.items())}")


if __name__ == "__main__":
    main()
