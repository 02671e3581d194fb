"""Files and folders of weights: read back bit for bit, refused where damaged or of other kinds, never unpickled."""

import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxnets as jn
from jaxnets import weights
from jaxnets.commands import networks

MODULE, IMAGE = jn.models.MLP((5,), 3), (4,)
STATE = {
    "0.weight": np.arange(20, dtype=np.float32).reshape(5, 4), "0.bias": np.ones(5, np.float32),
    "2.weight": np.arange(15, dtype=np.float32).reshape(3, 5), "2.bias": np.zeros(3, np.float32),
}  # fmt: skip


def assert_same_bits(one, two):
    def check(a, b):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())

    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(lambda a, b: check(np.asarray(a), np.asarray(b)), one, two)


# Files of PyTorch.


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_pytorch_and_safetensors_are_read_alike(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(value) for name, value in STATE.items()}
    torch.save({"model": tensors, "epoch": 1}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    safetensors.numpy.save_file(STATE, tmp_path / "a.safetensors")
    expected = weights.from_torch(MODULE, IMAGE, STATE)
    for file in (tmp_path / "a.pth", tmp_path / "a.safetensors", str(tmp_path / "a.pth")):
        assert_same_bits(weights.from_torch(MODULE, IMAGE, file), expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_but_tensors_is_unpickled(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    file, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({**STATE, "other": Touch(trace)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="nothing else is unpickled"):
        weights.from_torch(MODULE, IMAGE, file)
    file.write_bytes(pickle.dumps(Touch(trace)))
    with pytest.raises(ValueError, match="nothing else is unpickled"):
        weights.from_torch(MODULE, IMAGE, file)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pkl", ".bin", ".npz", ".tar", ""])
def test_files_of_other_kinds_are_refused_unread(suffix, tmp_path):
    trace, file = tmp_path / "trace", tmp_path / f"weights{suffix}"
    file.write_bytes(pickle.dumps(Touch(trace)))
    with pytest.raises(ValueError, match=r"are read from files \.pth, \.pt, \.safetensors, got .*weights"):
        weights.from_torch(MODULE, IMAGE, file)
    assert not trace.exists()


def test_damaged_and_missing_files_are_named(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(value) for name, value in STATE.items()}, tmp_path / "a.pth")
    safetensors.numpy.save_file(STATE, tmp_path / "a.safetensors")
    for name, message in (("a.pth", "a.pth cannot be read"), ("a.safetensors", "a.safetensors is damaged")):
        whole = (tmp_path / name).read_bytes()
        for part in (whole[:0], whole[: len(whole) // 2], whole[:-1], b"junk"):
            (tmp_path / name).write_bytes(part)
            with pytest.raises(ValueError, match=message):
                weights.from_torch(MODULE, IMAGE, tmp_path / name)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError):
            weights.from_torch(MODULE, IMAGE, tmp_path / name)


@pytest.mark.parametrize(
    ("content", "found"),
    [({}, "none"), ({"epoch": 3}, "none"), ({"model": STATE, "ema": STATE}, r"several \(model, ema\): pass one")],
)
def test_what_holds_no_weights_or_several_is_refused(content, found):
    with pytest.raises(ValueError, match=f"should hold one state_dict, names and tensors; found {found}"):
        weights.from_torch(MODULE, IMAGE, content)


def test_dtypes_that_are_no_weights_are_refused():
    for dtype in (np.int8, bool, np.complex64):
        state = STATE | {"0.weight": STATE["0.weight"].astype(dtype)}
        message = f"the state_dict holds other dtypes: 0.weight is {np.dtype(dtype)}, the network takes float32"
        with pytest.raises(ValueError, match=message):
            weights.from_torch(MODULE, IMAGE, state)


def test_tensors_without_dense_data_are_named():
    torch = pytest.importorskip("torch")
    for tensor in (torch.ones(5, 4, device="meta"), torch.ones(5, 4).to_sparse()):
        with pytest.raises(ValueError, match=r"0\.weight is no dense tensor with data \(.+\): dequantize it"):
            weights.from_torch(MODULE, IMAGE, STATE | {"0.weight": tensor})


def test_without_pytorch_its_files_alone_cannot_be_read(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="takes torch, which is not installed: pip install torch"):
        weights.from_torch(MODULE, IMAGE, tmp_path / "a.pth")
    params, _ = weights.from_torch(MODULE, IMAGE, STATE)
    np.testing.assert_array_equal(params["Dense_0"]["kernel"], STATE["0.weight"].T)


def test_importing_jaxnets_imports_none_of_them():
    code = "import sys, jaxnets; print(*{'torch', 'safetensors', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# Folders of our own.

TREES = (
    {
        "block1": {"conv_0": {"kernel": np.arange(24.0, dtype=np.float32).reshape(2, 3, 4).T}},
        "half": {"a": jnp.linspace(-1, 1, 7).astype(jnp.bfloat16), "b": np.float16([np.inf, -0.0])},
        "scalar": np.full((), np.nan, np.float32),
    },
    {"batch_stats": {"count": np.arange(3), "seen": np.array([True, False]), "none": np.zeros((0, 3))}},
)
CONFIG = {"model": "mlp", "classes": 3, "image": [8, 8, 1], "mean": [0.1, 0.2], "note": "säg"}


def test_a_folder_gives_back_the_same_bits(tmp_path):
    weights.save(tmp_path / "deep" / "model", *TREES, CONFIG)
    got = weights.load(tmp_path / "deep" / "model")
    assert_same_bits((got.params, got.stats), TREES)
    assert got.config == CONFIG
    assert_same_bits(tuple(weights.load(tmp_path / "deep" / "model", like=TREES)[:2]), TREES)
    assert os.listdir(tmp_path / "deep") == ["model"]
    files = [tmp_path / "deep" / "model" / name for name in ("model.safetensors", "config.json")]
    assert files[0].stat().st_mode == files[1].stat().st_mode, "who may read one may read the other"
    about = json.loads(files[1].read_text())
    assert about["format"] == 1
    assert about["versions"]["jax"] == jax.__version__


def test_a_published_network_is_built_again_from_its_folder(tmp_path):
    config = {"model": "small_cnn", "classes": 7, "image": [28, 28, 1]}
    net = jn.from_linen(networks.module(*config.values()))
    x = np.random.default_rng(0).uniform(size=(2, 28, 28, 1)).astype(np.float32)
    params, stats = net.init(jax.random.key(0), x)
    weights.save(tmp_path / "model", params, stats, config)
    params_again, stats_again, said = weights.load(weights.fetch(str(tmp_path / "model")))
    again = jn.from_linen(networks.module(said["model"], said["classes"], said["image"]))
    np.testing.assert_array_equal(again.infer(params_again, stats_again, x), net.infer(params, stats, x))


def test_a_folder_of_an_unknown_network_says_which_are_known(tmp_path):
    weights.save(tmp_path / "model", {}, {}, {"model": "perceiver", "classes": 3, "image": [8, 8, 1]})
    said = weights.load(tmp_path / "model").config
    with pytest.raises(ValueError, match="no network is called 'perceiver': take one of perceptron, mlp, "):
        networks.module(said["model"], said["classes"], said["image"])


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def stop(arrays, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        weights.save(tmp_path / "model", *TREES, CONFIG)
    assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten(tmp_path):
    weights.save(tmp_path, *TREES, CONFIG)  # empty
    with pytest.raises(ValueError, match="is there already"):
        weights.save(tmp_path, {}, {}, {})
    with pytest.raises(ValueError, match="is there already"):
        weights.save(tmp_path / "config.json", {}, {}, {})
    assert weights.load(tmp_path).config == CONFIG


@pytest.mark.parametrize(
    "params",
    [[np.ones(2)], {"a": (np.ones(2),)}, {"a": {}}, {"a/b": np.ones(2)}, {1: np.ones(2)}],
    ids=["list", "tuple", "empty", "slash", "number"],
)
def test_trees_that_would_come_back_as_others_are_refused(params, tmp_path):
    with pytest.raises(ValueError, match="only nested dicts of arrays can be saved"):
        weights.save(tmp_path / "model", params, {}, {})
    assert os.listdir(tmp_path) == []


def test_names_that_go_on_from_those_of_others_are_refused(tmp_path):
    """Such a file cannot be a tree, in whichever order its names come."""
    ends, goes_on = np.ones(2), {"b": np.ones(3)}
    for params in ({"a": ends, "a/b": ends}, {"a/b": ends, "a": ends}):
        with pytest.raises(ValueError, match="the tree has arrays by the names params/a, and arrays whose names go on"):
            weights.save(tmp_path / "model", params, {}, {})
    weights.save(tmp_path / "model", {"a": goes_on}, {}, {})
    file = tmp_path / "model" / "model.safetensors"
    for names in (("params/a", "params/a/b"), ("params/a/b/c", "params/a")):
        safetensors.numpy.save_file(dict.fromkeys(names, ends), file)
        with pytest.raises(ValueError, match=r"model\.safetensors has arrays by the names params/a, and arrays whose"):
            weights.load(tmp_path / "model")


@pytest.mark.parametrize("parts", [(np.ones(2), {}), ({}, np.ones(2))], ids=["params", "stats"])
def test_an_array_is_no_tree(parts, tmp_path):
    with pytest.raises(ValueError, match="only nested dicts of arrays can be saved"):
        weights.save(tmp_path / "model", *parts, {})


@pytest.mark.parametrize("leaf", [np.ones(2, jnp.float8_e4m3fn), np.ones(2, complex), np.array("a")])
def test_dtypes_that_would_not_come_back_are_refused(leaf, tmp_path):
    with pytest.raises(ValueError, match=f"cannot be saved: {leaf.dtype}"):
        weights.save(tmp_path / "model", {"a": leaf}, {}, {})


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, float("nan"), np.ones(2), {1, 2}])
def test_configurations_that_would_come_back_as_others_are_refused(value, tmp_path):
    with pytest.raises(ValueError, match=r"config (must be what JSON can hold|would not be the same)"):
        weights.save(tmp_path / "model", {}, {}, {"value": value})
    assert os.listdir(tmp_path) == []


def test_a_folder_that_does_not_fit_says_all_that_differs(tmp_path):
    weights.save(tmp_path / "model", {"a": np.ones(2), "b": {"c": np.ones(3)}}, {}, {})
    like = ({"a": jax.ShapeDtypeStruct((4,), jnp.float32), "d": np.ones(3)}, {"mean": np.ones(1)})
    message = (
        r"missing: params/d, stats/mean\n  left over: params/b/c\n"
        r"  other shapes: params/a is \(2,\), the network takes \(4,\)"
    )
    with pytest.raises(ValueError, match=message):
        weights.load(tmp_path / "model", like=like)


def test_dtypes_other_than_those_of_the_network_are_named(tmp_path):
    weights.save(tmp_path / "model", {"a": np.float16([1]), "b": np.float32([1])}, {"n": np.arange(2)}, {})
    like = jax.eval_shape(lambda: ({"a": jnp.ones(1), "b": jnp.ones(1)}, {"n": jnp.ones(2)}))
    message = (
        r"holds other dtypes: params/a is float16, the network takes float32, stats/n is int64, the network takes "
        r"float32\. Load it without like"
    )
    with pytest.raises(ValueError, match=message):
        weights.load(tmp_path / "model", like=like)
    assert weights.load(tmp_path / "model").params["a"].dtype == np.float16


def raw(dtype, size, name="params/a"):
    """A safetensors file of one array of two entries, written by hand."""
    header = json.dumps({name: {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", "damaged or not of jaxnets"),
        ("config.json", b"[1]", "damaged or not of jaxnets"),
        ("config.json", b'{"format": 2, "config": {}}', "is of format 2, this version reads 1"),
        ("config.json", b'{"format": "1", "config": {}}', "is of format '1', this version reads 1"),
        ("config.json", b'{"format": 1, "config": [3]}', r"its config should be an object, got \[3\]"),
        ("config.json", b'{"architectures": ["ViT"]}', r"damaged or not of jaxnets \(KeyError\('format'\)\)"),
        ("config.json", b'{"format": 1}', r"damaged or not of jaxnets \(KeyError\('config'\)\)"),
        ("config.json", b"", "damaged or not of jaxnets"),
        ("config.json", b"\xff\xfe", "damaged or not of jaxnets"),
        ("config.json", b"[" * 100_000, "damaged or not of jaxnets"),
        ("config.json", b'{"format": ' + b"1" * 5000 + b"}", "damaged or not of jaxnets"),
        ("model.safetensors", b"junk", "model.safetensors is damaged"),
        ("model.safetensors", b"", "model.safetensors is damaged"),
        ("model.safetensors", raw("F32", 8)[:-1], "model.safetensors is damaged"),
        ("model.safetensors", raw("F32", 4), "model.safetensors is damaged"),
        ("model.safetensors", raw("F99", 8), "model.safetensors is damaged .*unknown variant `F99`"),
        ("model.safetensors", raw("F8_E4M3", 2), "holds arrays that NumPy cannot .*float8_e4m3fn.*: save them anew"),
        ("model.safetensors", raw("F32", 8, "params"), "it holds params, not params and stats, whose names begin with"),
        ("model.safetensors", safetensors.numpy.save(STATE), "it holds .*0.weight.*, not params and stats"),
        ("config.json", None, "lacks config.json or model.safetensors"),
        ("model.safetensors", None, "lacks config.json or model.safetensors"),
    ],
)
def test_damaged_folders_are_refused(file, content, message, tmp_path):
    weights.save(tmp_path / "model", *TREES, CONFIG)
    place = tmp_path / "model" / file
    if content is None:
        place.unlink()
    else:
        place.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        weights.load(tmp_path / "model")


# The hub.


def test_a_folder_comes_before_the_hub(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    weights.save("user/model", *TREES, CONFIG)
    assert weights.load(weights.fetch("user/model")).config == CONFIG
    with pytest.raises(ImportError, match=r"user/other is no folder.*pip install \"jaxnets\[hub\]\""):
        weights.fetch("user/other")


def test_what_is_no_folder_is_fetched_from_the_hub(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        weights.save(tmp_path / "cache", *TREES, CONFIG)
        return str(tmp_path / "cache")

    stand_in = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    got = weights.load(weights.fetch("user/model", revision="v1"))
    assert_same_bits((got.params, got.stats), TREES)
    assert asked == [("user/model", "v1", ["model.safetensors", "config.json"])]


def test_the_hub_takes_what_it_is_asked():
    """The stand-in has the signature of the package, where that is installed."""
    hub = pytest.importorskip("huggingface_hub")
    import inspect

    assert {"repo_id", "revision", "allow_patterns"} <= set(inspect.signature(hub.snapshot_download).parameters)
