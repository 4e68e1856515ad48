"""What a process sends, holds and computes under Ulysses, worked out by hand for Wan 14B at 720p and 81 frames."""

import pytest
from dit_accel_pipelines import ADAPTERS
from scaling import ShardEstimate

from dit_accel.errors import ConfigError
from dit_accel.estimate.sizes import token_layout

WAN = next(family for adapter in ADAPTERS for family in adapter.families if family.name == "wan2.1-14b")
LAYOUT = token_layout(WAN, height=720, width=1280, num_frames=81)


def spread(degree: int) -> ShardEstimate:
    return ShardEstimate(family=WAN, layout=LAYOUT, degree=degree)


def test_wan_on_eight_cards():
    found = spread(8)
    assert (LAYOUT.tokens, found.heads, found.tokens) == (75600, 5, 9450)
    # 4 tensors of 9450 x 5120 in bf16, 7/8 of each leaves the card; 40 layers, 2 forwards
    assert found.sent_bytes == 4 * 9450 * 5120 * 2 * 7 // 8 * 80
    assert found.attention_bytes == 4 * 75600 * 5 * 128 * 2
    assert found.bitmap_bytes == 80 * 5 * 591 * 19 * 4


def test_the_work_is_shared_and_density_thins_attention_alone():
    alone = spread(1)
    assert alone.sent_bytes == 0
    assert spread(8).flops() == pytest.approx(alone.flops() / 8)
    attention = 80 * 4 * 75600**2 * 5120
    assert alone.flops() - alone.flops(0.5) == pytest.approx(attention / 2)


def test_more_processes_than_heads_are_refused():
    with pytest.raises(ConfigError, match=r"degree.*1.*40 heads of wan2.*got 64"):
        spread(64)
