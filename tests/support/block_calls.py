"""A tiny Wan transformer driven forward by forward, and which of its blocks ran."""

import itertools

import pytest
import torch
from wan_tiny import denoise, tiny_transformer

import dit_accel

LAYERS = 6
WHOLE = [*range(LAYERS)]


def six_blocks(seed=0):
    return tiny_transformer(seed, num_layers=LAYERS)


class Counted:
    """Counts the calls of a transformer's blocks by forward, inside of all that is attached."""

    def __init__(self, transformer):
        self.calls = []
        for index, block in enumerate(transformer.blocks):
            block.register_forward_hook(lambda *_, index=index: self.calls.append(index))

    def by_forward(self):
        """The blocks of each forward so far; every one begins with block 0."""
        starts = [at for at, index in enumerate(self.calls) if index == 0] + [len(self.calls)]
        return [self.calls[one:two] for one, two in itertools.pairwise(starts)]

    def lengths(self):
        """Return the number of blocks of each forward since the last time this was asked."""
        numbers = [len(blocks) for blocks in self.by_forward()]
        self.calls.clear()
        return numbers


def run_inputs(scale=1.0):
    noise = torch.Generator().manual_seed(3)
    return dict(
        hidden_states=scale * torch.randn(1, 12, 5, 8, 8, generator=noise), timestep=torch.tensor([500]),
        encoder_hidden_states=torch.randn(1, 6, 64, generator=noise),
    )  # fmt: skip


def forward(model, step=0, branch="cond", scale=1.0, **options):
    with torch.no_grad(), model.cache_context(branch, step_index=step, num_inference_steps=10):
        return model(**{**run_inputs(scale), "return_dict": False, **options})[0]


def ran_by_step(transformer, config, steps=10, branches=("cond",)):
    """The blocks that run in each forward of a run with a cache, as its report has them too."""
    counted, starts = Counted(transformer), []
    transformer.patch_embedding.register_forward_hook(lambda *_: starts.append(len(counted.calls)))
    with dit_accel.attach(transformer, config) as attachment:
        denoise(transformer, steps, branches=branches)
        data = attachment.report().section(config.name).data
    ends = [*starts[1:], len(counted.calls)]
    ran = [counted.calls[one:two] for one, two in zip(starts, ends, strict=True)]
    assert data["computed_blocks"] == pytest.approx(sum(map(len, ran)) / (len(ran) * LAYERS))
    return ran
