"""The kernels on their own: copies under other names, and the tree of the Hub's kernels."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import base64
import hashlib
import importlib
import importlib.util
import json
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from kernel_cases import qkv
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "dit_accel_kernels"
sys.path.insert(0, str(ROOT / "kernels" / "hub"))

import prepare  # noqa: E402

SCALE = "scale=q.shape[-1] ** -0.5 if"  # in checks.py: what another version has changed


def load(folder: Path, name: str):
    """The package in a folder, imported from there under another name, as the Hub's loader does."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def forget():
    """Let go of what was imported under other names."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("_foreign"):
            del sys.modules[name]


def grads_and_out(call, leaves):
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


def test_two_versions_compute_in_one_process_without_meeting(tmp_path, forget):
    copies, factors = [], (1.0, 2.0)
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor" / "__init__.py").touch()
    load(tmp_path / "vendor", "_foreign")
    for factor, name in zip(factors, ("first", "vendor/second"), strict=True):
        folder = tmp_path / name
        shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
        text = (folder / "checks.py").read_text()
        assert SCALE in text
        (folder / "checks.py").write_text(text.replace(SCALE, f"scale={factor} * q.shape[-1] ** -0.5 if"))
        copies.append(load(folder, "_foreign_first") if name == "first" else importlib.import_module("_foreign.second"))
    leaves = [x.requires_grad_() for x in qkv(1, 2, 1, 48, 48, 16, torch.float32)]
    offsets, indices = (torch.tensor(x, dtype=torch.int32) for x in ([[0, 2, 3, 4]], [0, 2, 1, 2]))
    sizes = dict(block_q=16, block_k=16, num_q=48, num_k=48)

    def dense(factor, q, k, v):
        mask = torch.zeros(3, 3, dtype=torch.bool)
        mask[[0, 0, 1, 2], [0, int(indices[1]), 1, 2]] = True
        mask = mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
        return scaled_dot_product_attention(q, k, v, mask, scale=factor / 4, enable_gqa=True)

    for last in (2, 1):
        indices.numpy()[1] = last  # unseen by torch: each copy follows it on its own
        for factor, copy in zip(factors, copies, strict=True):
            tiles = copy.TileLists(**sizes, exact_offsets=offsets, exact_indices=indices)
            expected = grads_and_out(lambda *x, factor=factor: dense(factor, *x), leaves)
            for backend in ("torch", "triton", "reference"):

                def call(q, k, v, copy=copy, tiles=tiles, backend=backend):
                    return copy.block_sparse_attention(q, k, v, tiles, layout="bhsd", backend=backend)

                torch.testing.assert_close(grads_and_out(call, leaves), expected)
                if backend == "torch" and last == 2:
                    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
                    torch.testing.assert_close(grads_and_out(compiled, leaves), expected)
    names = [importlib.import_module(f"{copy.__name__}._ops").NAMESPACE for copy in copies]
    assert names == ["_foreign_first", "_foreign_2e_second"]
    for name, copy in zip(names, copies, strict=True):
        with FakeTensorMode():
            fake = [torch.empty(x.shape) for x in leaves]
            empty = (torch.empty(size, dtype=torch.int32) for size in ((1, 4), (4,)))
            lists = copy.TileLists(**sizes, **dict(zip(("exact_offsets", "exact_indices"), empty, strict=True)))
            assert copy.block_sparse_attention(*fake, lists, layout="bhsd").shape == (1, 2, 48, 16)
        assert getattr(torch.ops, name).block_sparse_attention.default.namespace == name
    tables = [importlib.import_module(f"{copy.__name__}.backends.triton.launch").launch_table() for copy in copies]
    assert tables[0] is not tables[1]


def test_the_package_nowhere_depends_on_its_name():
    named = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".cpp", ".json")]
    assert len(named) > 40
    assert not [path for path in named if PACKAGE.name in path.read_text(encoding="utf-8")]


def test_the_hub_tree_loads_under_a_foreign_name_and_computes(tmp_path, forget):
    out = tmp_path / "tree"
    builds = prepare.prepare(out)
    assert [x.relative_to(out).as_posix() for x in builds] == [f"build/torch-{x}" for x in ("cuda", "rocm", "xpu")]
    config = tomllib.loads((out / "build.toml").read_text())
    assert (config["general"]["edition"], config["general"]["license"]) == (5, "Apache-2.0")
    assert (out / "CARD.md").read_text().startswith("---\nlibrary_name: kernels\n")
    sources = {path.relative_to(out / "torch-ext" / PACKAGE.name) for path in (out / "torch-ext").rglob("*.*")}
    assert {Path("backends/torch/fused.cpp"), Path("backends/triton/launch_table.json"), Path("api.py")} <= sources
    assert Path("_ops.py") not in sources  # which the Hub's builder writes
    ids = []
    for build in builds:
        metadata = json.loads((build / "metadata.json").read_text())
        files = {path.relative_to(build).as_posix(): path for path in build.rglob("*") if path.is_file()}
        del files["metadata.json"]
        digests = {name: hashlib.sha256(path.read_bytes()).digest() for name, path in files.items()}
        assert metadata["digest"]["files"] == {name: base64.b64encode(x).decode() for name, x in digests.items()}
        assert set(files) == {path.as_posix() for path in sources} | {"_ops.py"}
        assert build.name == f"torch-{metadata['backend']['type']}"
        assert metadata["name"] == config["general"]["name"]
        ids.append(metadata["id"])
    assert len(set(ids)) == 3
    kernel = load(builds[0], f"_foreign{ids[0]}")
    q, k, v = qkv(1, 2, 2, 40, 40, 16, torch.float32)
    tiles = kernel.TileLists.full(40, 40, block_q=16, block_k=16)
    for backend in ("torch", "triton"):
        attended = kernel.block_sparse_attention(q, k, v, tiles, layout="bhsd", backend=backend)
        torch.testing.assert_close(attended, scaled_dot_product_attention(q, k, v))
    with pytest.raises(FileExistsError, match=str(out / "CARD.md")):
        prepare.prepare(out)


def test_the_card_s_example_runs(tmp_path):
    """As it stands, but for what loads the kernel, on a smaller call on a CPU."""
    text = (ROOT / "kernels" / "hub" / "CARD.md").read_text().split("```python\n")[1].split("```")[0]
    for old, new in (
        ("from kernels import get_kernel", "import dit_accel_kernels as kernel"),
        ('kernel = get_kernel("{{ repo_id }}", version={{version}}, trust_remote_code=True)\n', ""),
        ('device="cuda", dtype=torch.bfloat16', "dtype=torch.float32"),
        ('.to("cuda")', ""),
        ("4096", "512"),
        ("eye(32", "eye(4"),
    ):
        assert old in text
        text = text.replace(old, new)
    names: dict = {}
    exec(text, names)
    assert names["out"].shape == (1, 512, 8, 128)
    assert (names["tiles"].states() == names["kernel"].POOLED).sum() == 12
    pools, q = names["k"].unflatten(1, (4, 128)).mean(2), names["q"][:, :128]
    logits = torch.einsum("bshd,bjhd->bhsj", q, pools[:, 1:]) / 128**0.5 + torch.tensor(128.0).log()
    own = torch.einsum("bshd,bjhd->bhsj", q, names["k"][:, :128]) / 128**0.5
    values = torch.cat([names["v"].unflatten(1, (4, 128)).mean(2)[:, 1:], names["v"][:, :128]], 1)
    expected = torch.einsum("bhsj,bjhd->bshd", torch.cat([logits, own], -1).softmax(-1), values)
    torch.testing.assert_close(names["out"][:, :128], expected)
