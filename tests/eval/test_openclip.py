"""Metrics by open_clip: against its own forward on random weights of its smallest models, and every wrong name told."""

import json

import numpy as np
import open_clip
import pytest
import torch
from dit_accel_eval.metrics import Sample, metric, openclip, scores
from dit_accel_eval.metrics import weights as metric_weights
from dit_accel_eval.metrics.openclip import weighted
from dit_accel_eval.metrics.registered import check_names, unavailable
from dit_accel_eval.tune.heads import objective_of
from fake_model import ARM, HEAD, command, told
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from tiny_vbench import MODEL, OTHER, WIDTH, scripted
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

from dit_accel import ConfigError

PROMPT = "A red kite over the sea, 5 o'clock"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model of random weights by open_clip's own words, its preparation and tokenizer, and its file."""
    torch.manual_seed(0)
    network, _, prepare = open_clip.create_model_and_transforms(MODEL, pretrained=None)
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save(network.state_dict(), path)
    return network.eval(), prepare, open_clip.get_tokenizer(MODEL), path


def clip(seed: int = 0, frames: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).random((frames, 40, 56, 3), np.float32)


def pictures(given, frames: np.ndarray) -> torch.Tensor:
    network, prepare, _, _ = given
    images = [prepare(Image.fromarray(np.rint(frame * 255).astype(np.uint8))) for frame in frames]
    with torch.no_grad():
        return normalize(network.encode_image(torch.stack(images)))


def text(given, prompt: str = PROMPT) -> torch.Tensor:
    with torch.no_grad():
        return normalize(given[0].encode_text(given[2]([prompt])))[0]


def values(name: str, sample: Sample) -> tuple[float, list[float]]:
    found = metric(name)(sample)
    return found.value, list(found.by_frame or ())


def test_figures_are_those_of_open_clips_own_forward(given):
    sample = Sample(frames=clip(), reference=clip(1), prompt=PROMPT)
    seen, other, read = pictures(given, clip()), pictures(given, clip(1)), text(given)
    cosines = seen @ read
    by = f"open_clip:{MODEL}={given[3]}"
    value, frames = values(f"clip-score@{by}", sample)
    assert value == pytest.approx(float((100 * cosines).clamp(min=0).mean()), abs=1e-3)
    assert frames == pytest.approx((100 * cosines).clamp(min=0).tolist(), abs=1e-3)
    value, frames = values(f"clip-align@{by}", sample)
    assert value == pytest.approx(float(normalize(seen.mean(0), dim=0) @ read), abs=1e-5)
    assert frames == pytest.approx(cosines.tolist(), abs=1e-5)
    value, frames = values(f"clip-image@{by}", sample)
    assert frames == pytest.approx((seen * other).sum(1).tolist(), abs=1e-5)
    assert value == pytest.approx(float((seen * other).sum(1).mean()), abs=1e-5)
    assert values(f"clip-image@{by}", Sample(frames=clip(), reference=clip()))[0] == pytest.approx(1, abs=1e-5)
    value, frames = values(f"consistency@{by}", sample)
    both = [(float(seen[at] @ seen[at - 1]) + float(seen[at] @ seen[0])) / 2 for at in (1, 2)]
    assert (value, frames) == (pytest.approx(sum(both) / 2, abs=1e-5), pytest.approx(both, abs=1e-5))
    long = Sample(frames=clip(), prompt="sea " * 200)  # as many tokens are read as the model takes
    assert values(f"clip-align@{by}", long)[1] == pytest.approx((seen @ text(given, "sea " * 75)).tolist(), abs=1e-5)


def test_a_prompt_or_reference_that_lacks_is_told(given):
    by = f"open_clip:{MODEL}={given[3]}"
    found = scores([f"clip-score@{by}", f"clip-align@{by}", f"clip-image@{by}"], Sample(frames=clip(), prompt=" "))
    assert not found.measured
    assert [reason.split(" ")[3] for reason in found.skipped.values()] == ["the", "the", "a"]
    assert "the prompt, and there is none" in found.skipped[f"clip-score@{by}"]


def test_the_aesthetic_head_is_linear_over_the_embedding(given, tmp_path, monkeypatch):
    monkeypatch.setenv(metric_weights.FOLDER_VARIABLE, str(tmp_path))
    name = f"aesthetic@open_clip:{MODEL}={given[3]}"
    path = tmp_path / "vbench" / "aesthetic_model" / "emb_reader" / "sa_0_4_tiny_clip_linear.pth"
    reason = metric(name).missing()
    assert reason == f"the aesthetic head is not here: put one of your own for {MODEL} at {path}"
    path.parent.mkdir(parents=True)
    head = torch.nn.Linear(WIDTH, 1)
    torch.save(head.state_dict(), path)
    with torch.no_grad():
        expected = head(pictures(given, clip()))[:, 0]
    value, frames = values(name, Sample(frames=clip()))
    assert frames == pytest.approx(expected.tolist(), abs=1e-5)
    assert objective_of(name, None)(clip(), "") == pytest.approx(value)
    wide = metric(f"aesthetic@open_clip:{MODEL}={given[3]}")
    torch.save(torch.nn.Linear(9, 1).state_dict(), path)
    with pytest.raises(ConfigError, match=r"sa_0_4_tiny_clip\S+ is no .* tiny-clip.*9\].*16\]"):
        wide.missing()
    path.write_bytes(b"none")
    with pytest.raises(ConfigError, match=r"sa_0_4_tiny_clip_linear\.pth.*aesthetic head"):
        unavailable([name])


def test_published_weights_are_taken_from_the_folder_and_told_where_to_put(given, tmp_path, monkeypatch):
    monkeypatch.setenv(metric_weights.FOLDER_VARIABLE, str(tmp_path))
    source = "https://huggingface.co/laion/CLIP-ViT-B-32-laion2B-s34B-b79K/resolve/main/open_clip_model.safetensors"
    name = "clip-score@open_clip:ViT-B-32/laion2b_s34b_b79k"
    (reason,) = unavailable(["psnr", name]).values()
    assert reason.endswith(f"download {source} and write ViT-B-32=FILE")
    assert "dit-accel eval setup --clip ViT-B-32/laion2b_s34b_b79k fetches them" in reason
    assert name in scores([name], Sample(frames=clip(), prompt=PROMPT)).unavailable
    with pytest.raises(ConfigError, match=r"objective 'clip-score@.*weights of ViT-B-32/"):
        objective_of(name, None)
    head = unavailable(["aesthetic@open_clip:ViT-L-14/openai"])["aesthetic@open_clip:ViT-L-14/openai"]
    assert "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth at " in head
    described = {"hf_hub": "a/b/", "quick_gelu": True, "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda model: ["mine"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: described)
    one = weighted(f"{MODEL}/mine")
    save_file(given[0].state_dict(), tmp_path / "a.safetensors")
    cached = {("a/b", "open_clip_model.safetensors"): str(tmp_path / "a.safetensors")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *asked: cached.get(asked))
    assert one.missing() is None
    made, _, prepare = open_clip.create_model_and_transforms(
        MODEL, pretrained=None, force_quick_gelu=True, image_mean=(0.5,) * 3, image_std=(0.5,) * 3,
        image_resize_mode="squash",
    )  # fmt: skip
    made.load_state_dict(given[0].state_dict())
    expected = pictures((made.eval(), prepare, None, None), clip())
    assert torch.allclose(one.embedder().pictures(clip()), expected, atol=1e-5)
    assert not torch.allclose(pictures(given, clip()), expected, atol=1e-3)


def test_openais_torchscript_gets_its_own_activation_and_a_lacking_tokenizer_is_told(given, tmp_path, monkeypatch):
    scripted(dict(given[0].state_dict()), tmp_path / "theirs.pt")
    one = weighted(f"{MODEL}={tmp_path}/theirs.pt")
    made = open_clip.create_model(MODEL, force_quick_gelu=True)
    made.load_state_dict(given[0].state_dict())
    expected = pictures((made.eval(), *given[1:]), clip())
    assert torch.allclose(one.embedder().pictures(clip()), expected, atol=1e-5)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda model: open_clip.no_such)
    openclip._embedder.cache_clear()
    assert str(one.missing()).startswith(f"the tokenizer of {MODEL} is not here: ")


def test_pickscore_and_hpsv2_are_tags_and_transformers_names_are_read(tmp_path, monkeypatch):
    size = dict(num_attention_heads=1, num_hidden_layers=1, hidden_size=WIDTH, intermediate_size=4 * WIDTH)
    seen = dict(num_attention_heads=2, num_hidden_layers=1, hidden_size=2 * WIDTH, intermediate_size=8 * WIDTH)
    torch.manual_seed(1)
    config = CLIPConfig(projection_dim=WIDTH, text_config={**size, "hidden_act": "gelu", "eos_token_id": 49407},
                        vision_config={**seen, "hidden_act": "gelu", "patch_size": 56})  # fmt: skip
    theirs = CLIPModel(config).eval()
    save_file({name: value.contiguous() for name, value in theirs.state_dict().items()}, tmp_path / "p.safetensors")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *asked: str(tmp_path / asked[1]))
    monkeypatch.setitem(openclip.JUDGES, (MODEL, "own"), {"hf_hub": "a/b/p.safetensors", "resize_mode": "longest"})
    prepare = image_transform_v2(PreprocessCfg(size=224, resize_mode="longest"), is_train=False)
    given = torch.stack([prepare(Image.fromarray(np.rint(frame * 255).astype(np.uint8))) for frame in clip()])
    assert torch.equal(given[:, :, 0, 0], given[:, :, 20, 100])  # frames are padded above
    with torch.no_grad():
        logits = theirs(input_ids=open_clip.get_tokenizer(MODEL)([PROMPT]), pixel_values=given).logits_per_image[:, 0]
    found = metric(f"clip-align@open_clip:{MODEL}/own")(Sample(frames=clip(), prompt=PROMPT))
    assert found.by_frame == pytest.approx((logits / theirs.logit_scale.exp()).tolist(), abs=1e-5)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *asked: None)
    for tag, file in (("pickscore", "yuvalkirstain/PickScore_v1/resolve/main/model.safetensors"),
                      ("hpsv2.1", "xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt")):  # fmt: skip
        reason = metric(f"clip-score@open_clip:ViT-H-14/{tag}").missing()
        assert f"the weights of ViT-H-14/{tag} are not here" in reason
        assert file in reason


def test_a_file_of_another_model_and_wrong_names_are_refused_before_anything_is_measured(given, tmp_path):
    name = f"clip-score@open_clip:{OTHER}={given[3]}"
    check_names([name])
    with pytest.raises(ConfigError, match=rf"small\.pt .*{OTHER}: .*(changed|mismatch)"):
        scores([name], Sample(frames=clip(), prompt=PROMPT))
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"bad\.pt .*weights.*tiny-clip:"):
        unavailable([f"clip-align@open_clip:{MODEL}={tmp_path}/bad.pt"])
    for name, said in (
        ("ViT-B32/openai", r"no model 'ViT-B32'.*'ViT-B-32'.*open_clip\.list_models"),
        ("ViT-B-32", r"ViT-B-32/TAG .*openai.*laion2b_e16.*ViT-B-32=FILE"),
        ("ViT-S-32", r"which weights; write ViT-S-32=FILE"),
        ("ViT-B-32/opnai", r"no weights 'opnai'.*'openai'"),
        ("ViT-B-32=nowhere.pt", r"nowhere\.pt .*ViT-B-32"),
    ):
        for check in (lambda name: check_names([name]), lambda name: objective_of(name, None)):
            with pytest.raises(ConfigError, match=said):
                check(f"clip-score@open_clip:{name}")


def test_an_objective_by_a_metric_is_higher_for_better(given):
    by = f"open_clip:{MODEL}={given[3]}"
    value = values(f"clip-align@{by}", Sample(frames=clip(), prompt=PROMPT))[0]
    assert objective_of(f"clip-align@{by}", None)(clip(), PROMPT) == value
    assert objective_of("warp-error@dis", None)(clip(), "") == -metric("warp-error@dis")(Sample(frames=clip())).value
    with pytest.raises(ConfigError, match=r"'clip-image@.*reference; take .*clip-score@open_clip"):
        objective_of(f"clip-image@{by}", None)
    with pytest.raises(ConfigError, match=r"'motion' says neither"):
        objective_of("motion", None)


def test_clips_in_files_are_scored_by_their_prompts(given, tmp_path):
    for name in ("a", "b"):
        Image.fromarray(np.rint(clip(ord(name), 1)[0] * 255).astype(np.uint8)).save(tmp_path / f"{name}.png")
    name, file = f"clip-align@open_clip:{MODEL}={given[3]}", tmp_path / "p.json"
    assert "compares with the prompt; give --prompt" in command("score", tmp_path, "-m", name).stderr
    file.write_text(json.dumps({"a.png": "a sea", "b.png": PROMPT}))
    for options, said in ((("--prompt", PROMPT), [PROMPT] * 2), (("--prompts", file), ["a sea", PROMPT])):
        found = command("score", tmp_path, "-m", name, *options, "--json")
        assert found.exit_code == 0, found.output
        own = [float(pictures(given, clip(ord(at), 1))[0] @ text(given, prompt))
               for at, prompt in zip("ab", said, strict=True)]  # fmt: skip
        assert [line["metrics"][name] for line in json.loads(found.stdout)] == pytest.approx(own, abs=1e-5)
    file.write_text(json.dumps({"a.png": "a sea"}))
    assert "has no 'b.png'" in command("score", tmp_path, "-m", name, "--prompts", file).stderr


def test_setup_tells_where_a_model_lies_or_has_to(given, tmp_path, monkeypatch):
    monkeypatch.setenv(metric_weights.FOLDER_VARIABLE, str(tmp_path))
    own = command("setup", "--clip", f"{MODEL}={given[3]}")
    assert own.exit_code == 0
    assert f"{MODEL}={given[3]} is at {given[3]}" in own.stdout
    monkeypatch.setattr(open_clip, "download_pretrained", lambda described: (_ for _ in ()).throw(OSError("no net")))
    found = command("setup", "--clip", "ViT-B-32/openai")
    assert found.exit_code == 1
    source = "https://huggingface.co/timm/vit_base_patch32_clip_224.openai"
    assert f"could not be fetched (no net); download {source}" in found.stderr
    assert found.stderr.rstrip().endswith("open_clip_model.safetensors and write ViT-B-32=FILE")
    assert "sa_0_4_vit_b_32_linear.pth" in found.stdout
    assert command("setup", "--clip", "ViT-B-32/openai", "--tier", "2").exit_code == 2


def test_a_suite_tells_before_any_clip_what_it_will_leave_out(tmp_path, monkeypatch):
    monkeypatch.setenv(metric_weights.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr("dit_accel_eval.suites.running.run_arms", lambda *given, **more: None)
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    for model, code, said in (
        ("ViT-B-32/openai", 0, "clip-score@open_clip:ViT-B-32/openai is left out: the weights of ViT-B-32/openai are"),
        (f"{OTHER}={tmp_path}/bad.pt", 2, f"bad.pt does not hold the weights of {OTHER}"),
    ):
        (tmp_path / "s.toml").write_text(f'{HEAD}metrics = ["clip-score@open_clip:{model}"]\n{ARM}')
        found = command("run", tmp_path / "s.toml", "--out", tmp_path / "s.jsonl")
        assert found.exit_code == code, found.output
        assert said in told(found)
