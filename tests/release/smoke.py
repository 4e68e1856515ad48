"""What a fresh environment must be able to do; run by ``release_run.py`` in an empty folder, without the checkout.

python smoke.py attach VERSION    # without dit-accel-assets
python smoke.py load VERSION      # with it
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch

import dit_accel


def attach() -> None:
    """Attach to a tiny random model and run it."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    size = dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=12, out_channels=12, text_dim=64, num_layers=3
    )
    model = WanTransformer3DModel(patch_size=(1, 2, 2), freq_dim=32, ffn_dim=48, rope_max_seq_len=64, **size).eval()
    inputs = dict(hidden_states=torch.randn(1, 12, 7, 8, 16), timestep=torch.tensor([500.0]))
    inputs["encoder_hidden_states"] = torch.randn(1, 6, 64)
    with torch.no_grad():
        plain = model(**inputs).sample
        with dit_accel.attach(model, dit_accel.RadialAttention(dense_steps=0)):
            sparse = model(**inputs).sample
        assert torch.equal(plain, model(**inputs).sample)
    assert not torch.equal(plain, sparse)


def load() -> None:
    """Make a clip of an embedded model, and another with a step cache, by the model's own defaults."""
    from dit_accel_assets import load

    pipe = load("wan-tiny")
    clips = []
    for methods in ((), (dit_accel.EasyCache(),)):
        with dit_accel.attach(pipe, *methods, preset="none") as attachment:
            clips.append(pipe("a red circle", generator=torch.Generator().manual_seed(0), output_type="np").frames)
            assert attachment.report()
    assert clips[0].shape == (1, 17, 64, 64, 3)
    assert abs(clips[0] - clips[1]).max() > 0


if __name__ == "__main__":
    what, expected = sys.argv[1:]
    assert version("dit-accel") == expected
    assert "site-packages" in Path(dit_accel.__file__).parts
    {"attach": attach, "load": load}[what]()
