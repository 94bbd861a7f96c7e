"""Every family is cut exactly or refused by its name."""

import ctypes
import mmap
import os

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from strategies.families import FAMILIES
from strategies.pipeline.cut import CannotCut, read_tensors, touch_tensors
from strategies.pipeline.self_check import check_family, cut_error, shrink
from strategies.workload import StagePart
from tests.strategies.test_families import DECODERS, built, random_config

SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
REQUIRED = {  # what no model of a family can do without, and its configuration class leaves out
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "granite": {"embedding_multiplier": 12.0},
    "granitemoe": {"embedding_multiplier": 12.0},
}


# Refused since transformers 5.23 is admitted, where a cut model comes out wrong; in newer ones it comes out right.
MENDED = {"gptj"} if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else set()


def test_only_the_files_that_transformers_loads_are_read(tmp_path):
    torch.manual_seed(0)
    model = built(random_config("llama", 0), "cpu")
    model.save_pretrained(tmp_path)
    wrong = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    save_file(wrong, tmp_path / "consolidated.safetensors")
    layers = read_tensors(tmp_path)(lambda name: ".layers." in name)

    assert layers and all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in layers.items())


def error_of(config):
    known = {key: value for key, value in config.items() if key != "model_type"}
    return cut_error(AutoConfig.for_model(config["model_type"], **known))


@pytest.mark.parametrize("name", DECODERS)
def test_a_family_is_cut_exactly_or_is_refused(name):
    found = []
    for seed in range(3):
        multiplier = {"embedding_multiplier": 3.0} if name.startswith("granite") else {}
        config = {
            **random_config(name, seed),
            **multiplier,
            "experts_implementation": "eager",
        }  # the other has no odd widths
        if not FAMILIES[name].uncut:
            assert error_of(config) == 0.0, config
            continue
        try:
            found.append(error_of(config) != 0.0)
        except Exception:
            found.append(True)
    assert not found or any(found) or name in MENDED, "it can be cut: take the sentence out of families.toml"


@pytest.mark.parametrize("name", DECODERS)
def test_a_run_tries_the_family_of_its_model_on_a_small_one_and_refuses_by_name(name, tmp_path):
    config = CONFIG_MAPPING[name](**REQUIRED.get(name, {}))
    config.save_pretrained(tmp_path)
    drawn = torch.get_rng_state()

    if not FAMILIES[name].uncut or name in MENDED:
        check_family(tmp_path)
    else:
        with pytest.raises(CannotCut) as refusal:
            check_family(tmp_path)
        assert str(refusal.value).startswith(f"{name} models are not cut into stages: a small one ")
        assert str(refusal.value).endswith(": set strategy.mode: auto")
    assert torch.equal(torch.get_rng_state(), drawn), "a run's own random numbers begin elsewhere"


@pytest.mark.parametrize("name", DECODERS)
def test_the_small_model_has_the_layers_and_switches_of_the_large_one(name):
    config = CONFIG_MAPPING[name](**REQUIRED.get(name, {}))
    small = shrink(config)
    with torch.device("meta"):
        model, family = AutoModelForCausalLM.from_config(small), FAMILIES[name]
    is_size = {*SIZES, *map(config.attribute_map.get, SIZES), family.kv_heads, family.width, family.expert_width}
    before, after = config.to_dict(), small.to_dict()

    assert sum(p.numel() for p in model.parameters()) < 16e6
    assert small.num_hidden_layers == min(config.num_hidden_layers, 6 if name == "gemma3_text" else 4)
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {*is_size, family.shared_width, "layer_types", "no_rope_layers", "pad_token_id", "sliding_window"}
    kinds = [set(getattr(one, "layer_types", None) or ()) for one in (config, small)]
    assert kinds[0] == kinds[1]


def resident_bytes(file):
    """Bytes of a file that lie in the page cache, by the kernel's word (mincore)."""
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        view = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(mapped)), found
        )
        del view
    assert not failed, os.strerror(ctypes.get_errno())
    return mmap.PAGESIZE * sum(one & 1 for one in found)


def drop(file):
    with file.open("r+b") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_node_that_stands_by_has_the_layers_of_its_stage_in_memory_and_no_others(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=4, vocab_size=64
    )
    # A file a layer, of which a kernel that reads 8 MiB ahead takes a part with the header.
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="23.3MB")
    files = sorted(tmp_path.glob("*.safetensors"))
    of_layer = {number: [] for number in range(4)}
    for file in files:
        with safe_open(file, "pt") as opened:
            own = {int(name.split(".")[2]) for name in opened.keys() if ".layers." in name}  # noqa: SIM118
        if len(own) == 1:
            of_layer[own.pop()].append(file)
        drop(file)
    if any(resident_bytes(file) for file in files):
        pytest.skip("this file system keeps all files in memory")

    num_bytes = touch_tensors(tmp_path, StagePart(1, 3, 1, 3))

    a_layer = 4 * (4 * 512 * 512 + 3 * 512 * 3072 + 2 * 512)
    assert num_bytes == 2 * a_layer
    assert all(of_layer.values())
    for number, own in of_layer.items():
        lying = sum(resident_bytes(file) for file in own) / sum(file.stat().st_size for file in own)
        assert lying >= 1 if number in (1, 2) else lying < 0.6, number


def test_a_folder_without_safetensors_cannot_be_stood_by_with(tmp_path):
    import transformers

    transformers.LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)

    with pytest.raises(CannotCut, match="holds no safetensors"):
        touch_tensors(tmp_path, StagePart(0, 2, 0, 1))
