import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from chatbind_cli.checkpoints.apply_delta import apply_delta
from chatbind_cli.checkpoints.checkpoint import open_checkpoint
from chatbind_cli.checkpoints.make_delta import make_delta
from chatbind_cli.checkpoints.manifest import MANIFEST_NAME, fingerprint, verify
from chatbind_cli.errors import ChatBindError, WeightsError
from chatbind_cli.folders import note_made

BASES = ["base_bin", "base_bin_sharded", "base_sharded_safetensors"]
DELTAS = ["delta_bin", "delta_bin_sharded", "delta_sharded_safetensors"]


def tensors_of(path):
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_nothing_written(target):
    assert not target.exists()
    assert not [name for name in os.listdir(target.parent) if name.startswith(".")]


# --- the published arithmetic -------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("delta", DELTAS)
def test_golden_triples_agree_bit_for_bit(golden, tmp_path, same_bits, base, delta):
    folder = golden / "delta"
    apply_delta(folder / base, folder / delta, tmp_path / "t", shard_bytes=20_000)
    found = tensors_of(tmp_path / "t")
    wanted = torch.load(folder / "target/pytorch_model.bin", weights_only=True)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        if not name.endswith("rotary_emb.inv_freq"):
            assert same_bits(found[name], tensor), name


def test_rotary_frequencies_are_those_of_the_base_and_not_the_spoiled_ones(golden, tmp_path):
    folder = golden / "delta"
    apply_delta(folder / "base_bin", folder / "delta_bin", tmp_path / "t")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    base = torch.load(folder / "base_bin/pytorch_model.bin", weights_only=True)[name]
    spoiled = torch.load(folder / "target/pytorch_model.bin", weights_only=True)[name]
    assert torch.equal(tensors_of(tmp_path / "t")[name], base)
    assert not torch.equal(spoiled, base)


def test_the_target_loads_in_transformers(golden, tmp_path):
    from transformers import LlamaForCausalLM

    folder = golden / "delta"
    apply_delta(folder / "base_bin", folder / "delta_bin", tmp_path / "t", shard_bytes=20_000)
    config = json.loads((tmp_path / "t/config.json").read_text())
    assert config["model_type"] == "llava_image_bind_select"
    (tmp_path / "t/config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "t", dtype=torch.float16)
    wanted = torch.load(folder / "target/pytorch_model.bin", weights_only=True)
    assert torch.equal(model.model.embed_tokens.weight, wanted["model.embed_tokens.weight"])


def test_base_and_delta_may_differ_in_dtype_and_the_sum_has_the_deltas(make, tmp_path):
    base = make.llama(0, dtype=torch.float32)
    delta = make.llama(1)
    apply_delta(make("b", base), make("d", delta), tmp_path / "t")
    for name, tensor in tensors_of(tmp_path / "t").items():
        assert torch.equal(tensor, base[name].half() + delta[name])


def test_rows_beyond_the_base_and_the_projector_come_from_the_delta_alone(make, tmp_path):
    base = make.llama(0)
    delta = make.llama(1, vocabulary=24, projector=True)
    apply_delta(make("b", base, "bin"), make("d", delta, shards=3), tmp_path / "t")
    target = tensors_of(tmp_path / "t")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(target[name][:20], base[name] + delta[name][:20])
        assert torch.equal(target[name][20:], delta[name][20:])
    for name in ("model.mm_projector.weight", "model.mm_projector.bias"):
        assert torch.equal(target[name], delta[name])


def test_rotary_buffers_that_only_the_base_has_are_dropped_with_a_note(make, tmp_path):
    base = make.llama(0) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    result = apply_delta(make("b", base), make("d", make.llama(1)), tmp_path / "t")
    assert "inv_freq" in result.notes[0]
    assert not any("inv_freq" in name for name in tensors_of(tmp_path / "t"))


def test_a_base_that_ties_its_output_matrix_serves_a_delta_that_does_not(make, tmp_path):
    base = make.llama(0)
    del base["lm_head.weight"]
    delta = make.llama(1)
    tied = make("b", base, config={"tie_word_embeddings": True})
    apply_delta(tied, make("d", delta), tmp_path / "t")
    expected = base["model.embed_tokens.weight"] + delta["lm_head.weight"]
    assert torch.equal(tensors_of(tmp_path / "t")["lm_head.weight"], expected)


def test_a_delta_that_ties_its_output_matrix_does_without_the_bases(make, tmp_path):
    delta = make.llama(1)
    del delta["lm_head.weight"]
    tied = make("d", delta, config={"tie_word_embeddings": True})
    result = apply_delta(make("b", make.llama(0)), tied, tmp_path / "t")
    assert "tied" in result.notes[0]
    assert "lm_head.weight" not in tensors_of(tmp_path / "t")


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, d: d.update(stranger=torch.zeros(1)), "stranger is neither in the base"),
        (lambda b, d: b.update(stranger=torch.zeros(1)), "stranger is in the base but not in"),
        (lambda b, d: b.pop("lm_head.weight"), "lm_head.weight is neither in the base"),
        (
            lambda b, d: d.update({"model.norm.weight": torch.zeros(9).half()}),
            r"model.norm.weight has shape \[9\], and \[8\]",
        ),
        (
            lambda b, d: d.update({"lm_head.weight": torch.zeros(19, 8).half()}),
            r"lm_head.weight has shape \[19, 8\]",
        ),
        (
            lambda b, d: d.update({"lm_head.weight": torch.zeros(24, 9).half()}),
            r"lm_head.weight has shape \[24, 9\]",
        ),
        (
            lambda b, d: d.update({"model.norm.weight": torch.zeros(8).bool()}),
            "model.norm.weight cannot be summed",
        ),
        (
            lambda b, d: d.update({"model.norm.weight": torch.zeros(8).long()}),
            "model.norm.weight is torch.float16 in the base and torch.int64",
        ),
        (
            lambda b, d: b.update({"model.mm_projector.weight": torch.zeros(8, 16)}),
            r"has a projector already \(model.mm_projector.weight\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_a_byte_is_written(
    make, tmp_path, change, message
):
    base, delta = make.llama(0), make.llama(1)
    change(base, delta)
    with pytest.raises(WeightsError, match=message):
        apply_delta(make("b", base), make("d", delta), tmp_path / "t")
    assert_nothing_written(tmp_path / "t")


def test_a_target_that_is_there_is_left_alone_unless_told_otherwise(make, tmp_path):
    base, delta = make("b", make.llama(0)), make("d", make.llama(1))
    target = tmp_path / "t"
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(ChatBindError, match="--overwrite"):
        apply_delta(base, delta, target)
    assert os.listdir(target) == ["mine"]
    with pytest.raises(ChatBindError, match="mine: is on no record"):
        apply_delta(base, delta, target, overwrite=True)
    assert os.listdir(target) == ["mine"]
    (target / "mine").unlink()
    apply_delta(base, delta, target, overwrite=True)
    assert (target / "model.safetensors").exists()
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_no_room_is_said_before_a_byte_is_written(make, tmp_path, monkeypatch):
    from types import SimpleNamespace

    base, delta = make("b", make.llama(0)), make("d", make.llama(1))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(
        ChatBindError, match=r"/t: needs 0\.00 MB and 0\.00 MB are free.* make room"
    ):
        apply_delta(base, delta, tmp_path / "t")
    assert not list((tmp_path / ".t.partial").glob("*.safetensors"))


def test_finished_weights_in_the_place_of_a_delta_are_refused(golden, tmp_path):
    folder = golden / "delta"
    with pytest.raises(WeightsError, match=r"looks like finished weights.*applied already"):
        apply_delta(folder / "base_bin", folder / "target", tmp_path / "t")
    assert_nothing_written(tmp_path / "t")


def test_a_delta_is_not_added_twice(golden, tmp_path):
    folder = golden / "delta"
    with pytest.raises(WeightsError, match="has a projector already"):
        apply_delta(folder / "target", folder / "delta_bin", tmp_path / "t")


def test_a_delta_in_the_place_of_the_base_is_told_by_its_norm_weights(make, tmp_path):
    delta = make.llama(1, scale=0.01)
    for name in delta:
        if "norm" in name:
            delta[name] -= 1
    with pytest.raises(WeightsError, match=r"looks like a delta .*swapped"):
        apply_delta(make("d", delta), make("b", make.llama(0)), tmp_path / "t")
    assert_nothing_written(tmp_path / "t")


# --- a delta of our own -------------------------------------------------------------------------

NASTY = torch.tensor(
    [0.0, -0.0, 6e-8, -6e-8, 1.0, -1.0, 65504.0, -65504.0, 1e-4, 3.14159, float("inf"), 0.5]
)


def nasty(dtype, seed):
    """Signed zeros, subnormals, infinities and a NaN in every pairing, then values at random."""
    if not dtype.is_floating_point:
        return torch.randint(-100, 100, (400,), generator=torch.Generator().manual_seed(seed)).to(
            dtype
        )
    values = torch.cat([NASTY, torch.tensor([float("nan")])])
    pairs = values.repeat_interleave(13) if seed else values.repeat(13)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-7, 3, 231)
    return torch.cat([pairs, torch.randn(231, generator=generator) * scale]).to(dtype)


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8],
)
def test_make_then_apply_gives_the_target_bit_for_bit(make, tmp_path, same_bits, dtype):
    base = make.llama(0) | {"x": nasty(dtype, 0), "lm_head.bias": torch.ones(20).half()}
    target = make.llama(1, vocabulary=24, projector=True)
    target |= {"x": nasty(dtype, 1), "lm_head.bias": torch.randn(24).half()}
    folders = make("b", base, "bin", 2), make("t", target, shards=3)
    make_delta(*folders, tmp_path / "d", shard_bytes=500)
    apply_delta(folders[0], tmp_path / "d", tmp_path / "t2", shard_bytes=700)
    found = tensors_of(tmp_path / "t2")
    assert set(found) == set(target)
    for name, tensor in target.items():
        assert same_bits(found[name], tensor), name


def test_rounding_that_cannot_be_avoided_is_counted_and_kept_beside_the_delta(make, tmp_path):
    base, target = (
        make("b", {"x": torch.tensor([1.0]).half()}),
        make("t", {"x": torch.tensor([1e-4]).half()}),
    )
    exact = make_delta(base, target, tmp_path / "d")
    assert "1 of 1 elements" in exact.notes[0]
    assert load_file(tmp_path / "d/chatbind_exact-model.safetensors")["x.value"].numel() == 1
    rough = make_delta(base, target, tmp_path / "r", exact=False)
    assert "--no-exact leaves them so" in rough.notes[0]
    assert not list((tmp_path / "r").glob("chatbind_exact*"))
    apply_delta(base, tmp_path / "r", tmp_path / "t2")
    assert tensors_of(tmp_path / "t2")["x"] == 0  # 1 - 0.9999, in steps of 2^-11


def test_other_programs_find_a_plain_delta(make, tmp_path):
    base, target = make.llama(0), make.llama(1, vocabulary=24)
    make_delta(make("b", base), make("t", target), tmp_path / "d")
    delta = load_file(tmp_path / "d/model.safetensors")
    assert torch.equal(
        delta["model.norm.weight"], target["model.norm.weight"] - base["model.norm.weight"]
    )
    assert torch.equal(delta["lm_head.weight"][20:], target["lm_head.weight"][20:])
    assert (tmp_path / "d/config.json").exists()


def test_a_model_folder_of_ours_is_relative_to_its_bare_language_model(make, tmp_path, same_bits):
    base = make.llama(0)
    tuned = make.llama(1, vocabulary=23)
    target = {f"language_model.{name}": tensor for name, tensor in tuned.items()}
    target["projector.layers.0.weight"] = torch.randn(8, 16).half()
    folder = make("b", base)
    make_delta(folder, make("t", target), tmp_path / "d")
    apply_delta(folder, tmp_path / "d", tmp_path / "t2")
    found = tensors_of(tmp_path / "t2")
    assert all(same_bits(found[name], tensor) for name, tensor in target.items())


def test_a_delta_over_the_wrong_base_is_refused_before_a_byte_is_written(
    make, tmp_path, monkeypatch
):
    base = make("b", make.llama(0))
    make_delta(base, make("t", make.llama(1)), tmp_path / "d")
    # Not even a shard that would be thrown away again.
    monkeypatch.delattr("chatbind_cli.checkpoints.apply_delta.stream_file")
    with pytest.raises(
        WeightsError, match=r"not the base that the delta was made over.*belongs to b"
    ):
        apply_delta(make("other", make.llama(5)), tmp_path / "d", tmp_path / "t2")
    assert_nothing_written(tmp_path / "t2")


@pytest.mark.parametrize("exact", [True, False])
def test_a_base_that_is_damaged_deep_in_a_tensor_leaves_no_target(make, tmp_path, exact):
    name = "model.layers.1.mlp.up_proj.weight"  # a sample takes its first 16 KiB
    base, target = make.llama(0), make.llama(1)
    base[name], target[name] = torch.zeros(2, 9000).half(), torch.ones(2, 9000).half()
    make_delta(make("b", base), make("t", target), tmp_path / "d", exact=exact)
    base[name][1, -1] += 1
    with pytest.raises(WeightsError, match=rf"{name} is not what the delta's maker had"):
        apply_delta(make("other", base), tmp_path / "d", tmp_path / "t2")
    assert_nothing_written(tmp_path / "t2")


def test_the_same_base_in_another_layout_is_the_same_base(make, tmp_path):
    base = make.llama(0)
    make_delta(make("b", base), make("t", make.llama(1)), tmp_path / "d")
    result = apply_delta(make("b2", base, "bin", 4), tmp_path / "d", tmp_path / "t2")
    manifest = json.loads((tmp_path / "t2" / MANIFEST_NAME).read_text())
    made = json.loads((tmp_path / "d" / MANIFEST_NAME).read_text())
    assert manifest["base"]["sha256"] == made["base"]["sha256"]
    assert manifest["delta"]["sha256"] == made["sha256"]
    assert manifest["sha256"] == made["target"]["sha256"] == result.sha256
    with open_checkpoint(tmp_path / "t2") as checkpoint:
        assert fingerprint(checkpoint) == result.sha256


def test_the_hashes_of_base_and_delta_are_recorded_whatever_was_known_of_them(make, tmp_path):
    base, delta = make("b", make.llama(0)), make("d", make.llama(1))
    apply_delta(base, delta, tmp_path / "t")
    manifest = json.loads((tmp_path / "t" / MANIFEST_NAME).read_text())
    for name, folder in (("base", base), ("delta", delta), (None, tmp_path / "t")):
        with open_checkpoint(folder) as checkpoint:
            recorded = manifest[name] if name else manifest
            assert recorded["sha256"] == fingerprint(checkpoint)


def test_damaged_weights_do_not_pass_verification(make, tmp_path):
    apply_delta(make("b", make.llama(0)), make("d", make.llama(1)), tmp_path / "t")
    assert verify(tmp_path / "t")["kind"] == "target"
    path = tmp_path / "t/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="changed or damaged"):
        verify(tmp_path / "t")


def test_damaged_corrections_and_swapped_folders_are_refused(make, tmp_path):
    base = make("b", make.llama(0))
    target = make("t", make.llama(1, scale=3.0))
    make_delta(base, target, tmp_path / "d")
    with pytest.raises(WeightsError, match="is a delta, and a base is wanted"):
        apply_delta(tmp_path / "d", base, tmp_path / "t2")
    apply_delta(base, tmp_path / "d", tmp_path / "t2")
    with pytest.raises(WeightsError, match="is a target already"):
        apply_delta(base, tmp_path / "t2", tmp_path / "t3")
    (tmp_path / "d/chatbind_exact-model.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsError, match="missing or damaged"):
        apply_delta(base, tmp_path / "d", tmp_path / "t3")


# --- killed, resumed, in little memory ----------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from chatbind_cli.checkpoints import stream
from chatbind_cli.checkpoints.{module} import {function}
left = int(sys.argv[4])
plain = stream.bytes_of
def bytes_of(piece):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(piece)
stream.bytes_of = bytes_of
{function}(*map(Path, sys.argv[1:4]), shard_bytes=500)
"""


@pytest.mark.parametrize(
    ("module", "function", "kills"),
    # pieces hashed before the kill, of all three streams
    [("apply_delta", "apply_delta", (4, 14)), ("make_delta", "make_delta", (4, 14))],
)
def test_a_killed_run_goes_on_at_the_first_unfinished_shard(
    make, tmp_path, module, function, kills
):
    base, other = make("b", make.llama(0)), make("o", make.llama(1, scale=3.0))
    calls = {"apply_delta": apply_delta, "make_delta": make_delta}
    calls[function](base, other, tmp_path / "calm", shard_bytes=500)
    script = KILLED.format(module=module, function=function)
    kept = []
    for pieces in kills:
        words = [str(base), str(other), str(tmp_path / "t"), str(pieces)]
        done = subprocess.run([sys.executable, "-c", script, *words], check=False)
        assert done.returncode == -9
        assert not (tmp_path / "t").exists()
        kept.append(len(json.loads((tmp_path / ".t.partial/progress.json").read_text())["done"]))
    assert 0 < kept[0] < kept[-1]
    finished = min((tmp_path / ".t.partial").glob("model-*"))
    before = finished.stat().st_mtime_ns
    calls[function](base, other, tmp_path / "t", shard_bytes=500)
    assert (tmp_path / "t" / finished.name).stat().st_mtime_ns == before
    calm = {path.name: path.read_bytes() for path in (tmp_path / "calm").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()} == calm


@pytest.mark.parametrize("function", [apply_delta, make_delta])
def test_a_finished_run_is_left_as_it_is_by_the_same_command(make, tmp_path, function):
    # As after a kill between the rename and the last word.
    base, other = make("b", make.llama(0)), make("o", make.llama(1))
    first = function(base, other, tmp_path / "t", shard_bytes=500)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "t").iterdir()}
    again = function(base, other, tmp_path / "t", shard_bytes=500)
    assert again.sha256 == first.sha256
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "t").iterdir()} == before
    with pytest.raises(ChatBindError, match="--overwrite"):
        function(base, other, tmp_path / "t")  # other shards
    with pytest.raises(ChatBindError, match="--overwrite"):
        function(base, make("o2", make.llama(2)), tmp_path / "t", shard_bytes=500)
    next((tmp_path / "t").glob("model-00002*")).unlink()
    with pytest.raises(ChatBindError, match="--overwrite"):
        function(base, other, tmp_path / "t", shard_bytes=500)


@pytest.mark.parametrize("function", [apply_delta, make_delta])
def test_a_tokenizer_that_changed_is_not_passed_over(make, tmp_path, function):
    base, other = make("b", make.llama(0)), make("o", make.llama(1))
    function(base, other, tmp_path / "t")
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(ChatBindError, match="--overwrite"):
        function(base, other, tmp_path / "t")
    function(base, other, tmp_path / "t", overwrite=True)
    assert (tmp_path / "t/tokenizer.json").is_file()


def test_the_beginning_of_something_else_is_thrown_away(make, tmp_path):
    base, delta = make("b", make.llama(0)), make("d", make.llama(1))
    partial = tmp_path / ".t.partial"
    (partial / "chat_templates").mkdir(parents=True)
    note_made(partial, (), made_by="apply-delta")
    (partial / "progress.json").write_text('{"task": "other", "done": {"model.safetensors": {}}}')
    (partial / "model.safetensors").write_text("other")
    apply_delta(base, delta, tmp_path / "t")
    assert len(tensors_of(tmp_path / "t")) == len(make.llama(0))
    assert not (tmp_path / "t/progress.json").exists()


def test_a_kill_right_after_the_exchange_leaves_the_new_and_no_litter(make, tmp_path, monkeypatch):
    base, delta = make("b", make.llama(0)), make("d", make.llama(1))
    calm = apply_delta(base, make("d2", make.llama(2)), tmp_path / "t")

    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("chatbind_cli.folders.remove_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            apply_delta(base, delta, tmp_path / "t", overwrite=True)
    assert (tmp_path / ".t.partial/model.safetensors").is_file()
    again = apply_delta(base, delta, tmp_path / "t")
    assert again.notes == ("it is here already",) and again.sha256 != calm.sha256
    assert sorted(os.listdir(tmp_path)) == ["made", "t"]
    names = [".chatbind-files.jsonl", MANIFEST_NAME, "config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path / "t")) == names


@pytest.mark.parametrize("link", [True, False])
def test_somebody_s_folder_of_the_name_of_a_beginning_is_left_alone(make, tmp_path, link):
    mine = tmp_path / ("mine" if link else ".t.partial")
    mine.mkdir()
    (mine / "thesis").write_text("mine")
    if link:
        note_made(mine, ["thesis"], made_by="apply-delta")
        (tmp_path / ".t.partial").symlink_to(mine)
    with pytest.raises(ChatBindError, match="is a link" if link else "thesis: is on no record"):
        apply_delta(make("b", make.llama(0)), make("d", make.llama(1)), tmp_path / "t")
    assert (mine / "thesis").read_text() == "mine"


def test_two_processes_do_not_write_one_target(make, tmp_path):
    import fcntl

    (tmp_path / ".t.partial").mkdir()
    with (tmp_path / ".t.partial/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ChatBindError, match="another process"):
            apply_delta(make("b", make.llama(0)), make("d", make.llama(1)), tmp_path / "t")


MEASURED = """
import resource, sys
from pathlib import Path
from chatbind_cli.checkpoints.apply_delta import apply_delta
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
apply_delta(*map(Path, sys.argv[1:]), shard_bytes=200 << 20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("layout", ["safetensors", "legacy"])
def test_memory_holds_pieces_and_not_tensors(make, tmp_path, layout):
    # Two tensors of 96 MiB each: 384 MiB in, 192 MiB out.
    big = {f"model.{name}.weight": torch.zeros(48 << 20, dtype=torch.float16) for name in "ab"}
    words = [str(make("b", big, layout)), str(make("d", big, layout)), str(tmp_path / "t")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words], check=True, stdout=subprocess.PIPE, text=True
    )
    # Ten pieces of 2 MiB, three streams each, and what torch needs to work at all.
    assert int(done.stdout) < 130
