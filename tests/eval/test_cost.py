"""What attached methods cost and save in time: the two small benchmarks, on models small enough to run at once."""

import json

import overhead
import product_time
import pytest
from diffusers import WanTransformer3DModel
from dit_accel_assets import model_path
from wan_tiny import TINY


def test_product_of_a_sparse_method_and_a_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(product_time, "LATENTS", (1, 12, 21, 8, 8))
    monkeypatch.setattr(
        product_time, "make_transformer", lambda layers: WanTransformer3DModel(**{**TINY, "text_dim": 4096}).eval()
    )
    out = tmp_path / "product.jsonl"
    assert product_time.main(["--steps", "6", "--rounds", "2", "--out", str(out)]) == 0
    line = json.loads(out.read_text())
    assert capsys.readouterr().out == product_time.page_text([line]) + "\n"
    assert 0 < line["density"] < 1
    assert line["cache_share"] < 1
    low, high = line["both_over_product_range"]
    assert low <= line["both_over_product"] <= high


@pytest.mark.slow
@pytest.mark.rare
def test_the_caches_of_the_overhead_never_skip(monkeypatch, tmp_path, capsys):
    def small(blocks):
        config = WanTransformer3DModel.load_config(model_path("wan-plain") / "transformer")
        return WanTransformer3DModel.from_config({**config, "num_layers": blocks}).eval()

    monkeypatch.setattr(overhead, "REAL", overhead.Subject("random weights", small, (1, 12, 3, 8, 8), 8))
    monkeypatch.setattr(overhead, "BLOCKS", 6)
    reports = []
    attach = overhead.dit_accel.attach

    class Seen:
        def __init__(self, *given):
            self.attachment = attach(*given)

        def __enter__(self):
            return self.attachment.__enter__()

        def __exit__(self, *what):
            reports.append(self.attachment.report())
            return self.attachment.__exit__(*what)

    monkeypatch.setattr(overhead.dit_accel, "attach", Seen)
    assert overhead.main(["--pairs", "2", "--steps", "4", "--out", str(tmp_path / "o.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [line["arm"] for line in lines] == [*overhead.WHOLE, *overhead.CACHES, *overhead.CACHES, *overhead.CACHES]
    assert [line["alone"] for line in lines] == [False] * 7 + [True] * 8
    assert capsys.readouterr().out == overhead.table(lines) + "\n"
    caches = [section.data for report in reports for section in report.sections if "reused" in section.data]
    # two warm-ups and two pairs, of two forwards each
    assert [data["computed"] for data in caches] == [8] * 12
    assert all(data["reused"] == 0 for data in caches)
    assert any(entry["value"] is not None for data in caches for entry in data["forwards"])
    perturbed = [section.data for report in reports for section in report.sections if section.method == "pag"]
    assert [data["steps"] for data in perturbed] == [[0, 1, 2, 3]]
    assert [(data["branches"], data["forwards_added"]) for data in perturbed] == [(["uncond"], 0)]


@pytest.mark.parametrize("given", ["PyramidAttentionBroadcastConfig", "FirstBlockCacheConfig"])
def test_a_suite_tells_native_caches_the_timestep(given):
    import diffusers
    from dit_accel_eval.runs.model import _with_timestep

    from dit_accel.methods.caches.native import DiffusersCache

    class Pipe:
        current_timestep = 17

    config = getattr(diffusers, given)()
    told = _with_timestep(DiffusersCache(config=config), Pipe)
    if given.startswith("Pyramid"):
        assert told.config.current_timestep_callback() == 17
        assert config.current_timestep_callback is None
    else:
        assert told.config is config
