"""Every family is cut exactly or refused by its name."""

import ctypes
import mmap
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from strategies.families import FAMILIES
from strategies.model.architecture import architecture_of
from strategies.pipeline.cut import CannotCut, assemble, read_tensors, remove_other_stages, touch_tensors
from strategies.workload import StagePart
from tests.strategies.test_families import DECODERS, built, random_config

IDS = torch.tensor([[5, 9, 14, 3, 8, 60, 41], [7, 3, 2, 90, 11, 30, 1]])


def stage_model(config, weights, stage):
    """The stage of a model whose tensors are `weights`, as a worker has it."""
    whole = built(config)

    def load(kind, own, tensors):
        return kind.from_pretrained(None, config=own, state_dict=tensors, dtype=torch.float32, output_loading_info=True)

    return assemble(whole, stage, load, lambda is_wanted: {n: t for n, t in weights.items() if is_wanted(n)})


def difference(config):
    """The largest difference of logits and of one gradient, in one piece and in two stages."""
    torch.manual_seed(0)
    model = built(config, "cpu").eval()
    num_layers = architecture_of(model).num_layers
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stages = [StagePart(0, 2, 0, 1), StagePart(1, 2, 1, num_layers)]
    lower, upper = (stage_model(config, weights, stage).eval() for stage in stages)
    for part, stage in zip((lower, upper), stages, strict=True):
        remove_other_stages(part, stage)
    mask = torch.ones_like(IDS)
    expected = model(IDS, attention_mask=mask, use_cache=False).logits
    hidden = lower.get_decoder()(IDS, attention_mask=mask, use_cache=False).last_hidden_state
    upper.get_input_embeddings().hidden_BTH = hidden
    found = upper(IDS, attention_mask=mask, use_cache=False).logits
    expected, found = expected.clone(), found.clone()
    (expected.square().sum()).backward()
    (found.square().sum()).backward()
    name = next(n for n, p in lower.named_parameters() if ".0." in n and p.dim() == 2)
    gradients = [dict(one.named_parameters())[name].grad for one in (model, lower)]
    return max((one - other).detach().abs().max().item() for one, other in ((expected, found), gradients))


def test_only_the_files_that_transformers_loads_are_read(tmp_path):
    torch.manual_seed(0)
    model = built(random_config("llama", 0), "cpu")
    model.save_pretrained(tmp_path)
    wrong = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    save_file(wrong, tmp_path / "consolidated.safetensors")
    layers = read_tensors(tmp_path)(lambda name: ".layers." in name)

    assert layers and all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in layers.items())


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
            assert difference(config) == 0.0, config
            continue
        try:
            found.append(difference(config) != 0.0)
        except Exception:
            found.append(True)
    assert not found or any(found), "it can be cut: take the sentence out of families.toml"


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
