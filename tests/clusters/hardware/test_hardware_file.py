import json
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from clusters.capability import ClusterCapability
from clusters.hardware import hardware_file
from clusters.hardware.datasheet import display_bytes
from clusters.hardware.hardware_file import ImpossibleHardware, read_hardware
from clusters.units import GIB

HOME_LAB = Path(__file__).parents[3] / "orchestrator/recipes/hardware/home-lab.yaml"
PLAIN = "{name: a, cores: 4, memory_gib: 8}"


@pytest.fixture
def read(tmp_path):
    def read_text(text: str) -> ClusterCapability:
        (tmp_path / "machines.yaml").write_text(textwrap.dedent(text))
        return read_hardware(tmp_path / "machines.yaml")

    return read_text


@pytest.fixture
def mistakes(read):
    def mistakes_of(text: str) -> list[str]:
        with pytest.raises(ImpossibleHardware) as caught:
            read(text)
        assert str(caught.value) == "\n".join(caught.value.mistakes)
        return caught.value.mistakes

    return mistakes_of


def node(keys: str) -> str:
    return f"nodes: [{{name: a, cores: 4, memory_gib: 8, {keys}}}]"


def test_the_home_lab_is_four_machines_of_which_three_have_a_gpu():
    cluster = read_hardware(HOME_LAB)

    assert [machine.name for machine in cluster.nodes] == ["workstation", "pc", "laptop", "cpu-box"]
    assert [gpu.name for machine in cluster.nodes for gpu in machine.gpus] == [
        "RTX 3090",
        "RTX 3060 12GB",
        "RTX 3050 Laptop 4GB",
    ]
    assert [round(gpu.memory_bytes / GIB, 1) for machine in cluster.nodes for gpu in machine.gpus] == [23.6, 11.7, 3.4]
    assert all(machine.cpu for machine in cluster.nodes)
    assert cluster.nodes[3].cpu.flops_per_s == {"float32": 1.6e12, "bfloat16": 3.2e12}
    assert cluster.nodes[3].cpu.has_bf16_units
    assert sum(machine.purchase_price for machine in cluster.nodes) == 4400


def test_every_two_machines_of_the_home_lab_have_a_link():
    cluster = read_hardware(HOME_LAB)

    assert len(cluster.links) == 6
    assert {(link.bytes_per_s, link.round_trip_s, link.source) for link in cluster.links} == {
        (125e6, 0.0003, "declared")
    }


def test_what_is_read_survives_json():
    cluster = read_hardware(HOME_LAB)

    assert ClusterCapability.from_dict(json.loads(json.dumps(cluster.as_dict()))) == cluster


def test_the_example_of_the_docstring_is_what_the_module_reads(read):
    cluster = read(hardware_file.__doc__.split("\n\n")[1])

    assert [(machine.name, len(machine.gpus)) for machine in cluster.nodes] == [
        ("workstation", 2),
        ("rented-1", 5),
        ("rented-2", 5),
    ]
    assert cluster.nodes[0].sources["load_w"] == "declared"
    assert cluster.nodes[1].price_per_hour == 1.9
    assert cluster.link("workstation", "rented-2").bytes_per_s == 12.5e6
    assert cluster.link("rented-1", "rented-2").bytes_per_s == 125e6


def test_a_machine_is_declared_by_three_figures_and_the_rest_stays_unknown(read):
    machine = read(f"nodes: [{PLAIN}]").nodes[0]

    assert (machine.num_cores, machine.memory_bytes) == (4, 8 * GIB)
    assert [device.kind for device in machine.devices] == ["cpu"]
    assert machine.cpu.memory_bytes == 8 * GIB
    assert not any(machine.cpu.flops_per_s.values())
    assert (machine.load_w, machine.price_per_hour, machine.purchase_price) == (None, None, None)
    assert machine.sources == {"num_cores": "declared", "memory_bytes": "declared"}


def test_instruction_sets_are_no_reason_to_guess_a_speed(read):
    cpu = read(node("cpu: {instruction_sets: [AVX2, amx_bf16], bf16_gflops: null}")).nodes[0].cpu

    assert cpu.instruction_sets == ("avx2", "amx_bf16")
    assert cpu.flops_per_s == {"bfloat16": None}
    assert "flops_per_s.bfloat16" not in cpu.sources


def test_a_declared_figure_replaces_that_of_the_datasheet(read):
    gpu = read(node("gpus: [{name: rtx 3090, bf16_tflops: 60, int8_tops: null, power_w: 280}]")).nodes[0].gpus[0]

    assert gpu.flops_per_s == {"float32": 35.6e12, "float16": 71.2e12, "bfloat16": 60e12, "int8": None}
    assert gpu.power_w == 280
    assert (gpu.sources["flops_per_s.bfloat16"], gpu.sources["power_w"]) == ("declared", "declared")
    assert (gpu.sources["flops_per_s.float32"], gpu.sources["memory_bytes"]) == ("datasheet", "datasheet")
    assert "flops_per_s.int8" not in gpu.sources


def test_memory_chooses_among_variants_of_a_card(read):
    gpu = read(node("gpus: [{name: RTX 3060, memory_gib: 8}]")).nodes[0].gpus[0]

    assert (gpu.name, gpu.memory_bytes_per_s) == ("RTX 3060 8GB", 240e9)


def test_what_a_screen_holds_of_a_card_is_declared(read):
    (bare,) = read(node("gpus: [{name: RTX 3070}]")).nodes[0].gpus
    (screen,) = read(node("gpus: [{name: RTX 3070, display_gib: 0.75}]")).nodes[0].gpus
    (closed,) = read(node("gpus: [{name: RTX 3050 Laptop 4GB, display_gib: 0}]")).nodes[0].gpus

    assert (bare.memory_bytes - screen.memory_bytes) / GIB == pytest.approx(0.75)
    assert (display_bytes(bare), display_bytes(screen)) == (0, 0.75 * GIB)
    assert display_bytes(replace(screen, sources={"memory_bytes": "measured"})) == 0
    assert closed.memory_bytes / GIB == pytest.approx(4 - 0.2 - 0.0075 * 4)


def test_a_screen_that_takes_a_whole_card_is_refused(mistakes):
    found = mistakes(node("gpus: [{name: RTX 3050 Laptop 4GB, display_gib: 4}, {name: RTX 3070, memory_gib: 4}]"))
    chosen = mistakes(node("gpus: [{name: RTX 3070, memory_gib: 2, display_gib: 1.9}]"))

    assert found == [
        "nodes[0].gpus[0].display_gib: 4 leaves nothing of RTX 3050 Laptop 4GB's 4 GiB, of which the driver keeps some;"
        " lower it, or state 0 where no screen is"
    ]
    assert chosen[0].startswith("nodes[0].gpus[0].display_gib: 1.9 leaves nothing of RTX 3070's 2 GiB")


def test_a_card_with_its_memory_doubled_is_believed(read):
    gpu = read(node("gpus: [{name: RTX 4090, memory_gib: 48}]")).nodes[0].gpus[0]

    assert gpu.memory_total_bytes == 48 * GIB
    assert gpu.memory_bytes / GIB == pytest.approx(48 - 0.2 - 0.0075 * 48)
    assert gpu.sources["memory_bytes"] == "declared"


def test_a_card_of_the_future_needs_memory_and_one_peak(read):
    gpus = "gpus: [{name: Wonder, count: 2, memory_gib: 32, fp16_tflops: 90, compute_capability: 13.0}]"
    machine = read(node(gpus)).nodes[0]

    assert [gpu.name for gpu in machine.gpus] == ["Wonder", "Wonder"]
    assert machine.gpus[0].flops_per_s == {"float16": 90e12}
    assert machine.gpus[0].compute_capability == (13, 0)
    assert set(machine.gpus[0].sources.values()) == {"declared"}


def test_an_unknown_card_is_refused_with_the_nearest_names(mistakes):
    (mistake,) = mistakes(node("gpus: [RTX 3090, RTX 3091]"))

    assert mistake.startswith("nodes[0].gpus[1]: 'RTX 3091' is not in the datasheet; nearest: RTX 3090,")
    assert "memory_gib and one of fp32_tflops, bf16_tflops, fp16_tflops" in mistake


def test_machines_alike_are_numbered(read):
    cluster = read("nodes: [{name: pc, count: 3, cores: 4, memory_gib: 8}]\nnetwork: {mbit_per_s: 1000}")

    assert [machine.name for machine in cluster.nodes] == ["pc-1", "pc-2", "pc-3"]
    assert len(cluster.links) == 3


def test_without_a_network_only_the_declared_links_are_known(read):
    cluster = read(f"""
        nodes: [{PLAIN}, {{name: b, count: 2, cores: 4, memory_gib: 8}}]
        links: [{{between: [b-2, a], mbit_per_s: 300, round_trip_ms: 2}}]
    """)

    assert cluster.link("a", "b-2").bytes_per_s == 37.5e6
    assert cluster.link("a", "b-2").round_trip_s == 0.002
    assert cluster.link("a", "b-1") is None


def test_all_mistakes_are_reported_at_once_each_with_where_it_is(mistakes):
    found = mistakes("""
        nodez: 3
        nodes:
          - {name: a, cores: 0, memory_gib: -4, gpu: [x]}
          - {name: a, cores: yes, memory_gib: 99999999, power_w: {idle: 500, load: 100}, price: {purchase: 5}}
          - {name: 3, cores: 2.5, memory_gib: .nan, cpu: 5, gpus: RTX 3090}
          - null
          - {cores: many, memory_gib: .inf, count: 2}
        network: {round_trip_ms: 0}
        links:
          - {between: [a, b], mbit_per_s: 3}
          - {between: [a, a], mbit_per_s: 3}
          - {between: a}
    """)

    for mistake in (
        "nodez: there is no such key; did you mean nodes?",
        "nodes[0].cores: 0 is not above 0",
        "nodes[0].memory_gib: -4 is not above 0",
        "nodes[0].gpu: there is no such key; did you mean gpus?",
        "nodes[1].name: 'a' is already the name of nodes[0]",
        "nodes[1].cores: True is not a number",
        "nodes[1].memory_gib: 99999999 is above 65536, more than any machine has",
        "nodes[1].power_w.idle: 500 is above load, 100",
        "nodes[1].price: has purchase; give purchase with years, or per_hour",
        "nodes[2].name: 3 is not a text",
        "nodes[2].cores: 2.5 is not a whole number",
        "nodes[2].memory_gib: nan is not a number",
        "nodes[2].gpus: 'RTX 3090' is not a list",
        "nodes[4].name: is missing",
        "nodes[4].cores: 'many' is not a number",
        "nodes[4].memory_gib: inf is above 65536, more than any machine has",
        "network.mbit_per_s: is missing",
        "network.round_trip_ms: 0 is not above 0",
        "links[0].between: there is no machine 'b'; nearest: a",
        "links[1].between: 'a' is linked to itself",
        "links[2].between: 'a' is not a list of two machines",
        "links[2].mbit_per_s: is missing",
    ):
        assert found.count(mistake) == 1, mistake
    assert sum(mistake.startswith(("nodes[2].cpu: 5 is not", "nodes[3]: None is not")) for mistake in found) == 2
    assert len(found) == 24


@pytest.mark.parametrize(
    ("keys", "mistake"),
    [
        ("price: {per_hour: 1, years: 2}", "nodes[0].price: has per_hour and years"),
        ("gpus: [{name: RTX 3090, kind: rocm}]", "nodes[0].gpus[0].kind: RTX 3090 is cuda, not 'rocm'"),
        ("gpus: [{name: RTX 3090, kind: tpu}]", "nodes[0].gpus[0].kind: 'tpu' is neither cuda nor rocm"),
        ("gpus: [{name: RTX 3090, memory_gib: 0.5}]", "nodes[0].gpus[0].memory_gib: 0.5 is not above 0.6"),
        ("gpus: [{name: RTX 3090, compute_capability: new}]", "nodes[0].gpus[0].compute_capability: 'new' is not like"),
        ("gpus: [{count: 2}]", "nodes[0].gpus[0].name: is missing"),
        ("cpu: {instruction_sets: [3]}", "nodes[0].cpu.instruction_sets[0]: 3 is not a text"),
    ],
)
def test_a_contradiction_in_a_machine_is_named(mistakes, keys, mistake):
    found = mistakes(node(keys))

    assert found[0].startswith(mistake)


def test_a_pair_of_machines_has_one_link(mistakes):
    found = mistakes(f"""
        nodes: [{PLAIN}, {{name: b, count: 2, cores: 4, memory_gib: 8}}]
        links: [{{between: [a, b], mbit_per_s: 3}}, {{between: [b-2, a], mbit_per_s: 5}}]
    """)

    assert found == ["links[1].between: a - b-2 is declared twice"]


def test_a_numbered_machine_cannot_take_a_name_in_use(mistakes):
    found = mistakes("""
        nodes:
          - {name: pc, count: 2, cores: 4, memory_gib: 8}
          - {name: pc-2, cores: 4, memory_gib: 8}
    """)

    assert found == ["nodes[1].name: 'pc-2' is already the name of nodes[0]"]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("", "is empty; give a mapping with nodes, network, links"),
        ("[1, 2]", "holds [1, 2]; give a mapping with nodes, network, links"),
        ("nodes: [", "line 2: is not YAML"),
        ("nodes: []\nnodes: []", "line 2: is not YAML: nodes is written twice"),
        ("nodes: 2024-13-45", "line 1: '2024-13-45' cannot be read as timestamp"),
        ("[" * 5000, "nesting"),
        ("nodes: []", "nodes: is empty; declare at least one machine"),
        ("network: {mbit_per_s: 100}", "nodes: is empty; declare at least one machine"),
        ("nodes: &loop [*loop]", "line 1: is not YAML: an anchor that contains itself"),
    ],
)
def test_a_file_that_declares_nothing_says_why(mistakes, text, mistake):
    (found,) = mistakes(text)

    assert mistake in found


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")

    for path, why in (("none.yaml", "does not exist"), ("", "is a folder"), ("binary.yaml", "not UTF-8")):
        with pytest.raises(ImpossibleHardware, match=why):
            read_hardware(tmp_path / path)


@pytest.mark.parametrize(
    ("keys", "mistake"),
    [
        ("disk_write_mb_per_s: 1.0e-12", "is below 0.001"),
        ("gpus: [{name: RTX 3090, bf16_tflops: 1.0e-300}]", "is below 0.001"),
        ("cpu: {fp32_gflops: .nan}", "is not a number"),
        ("cpu: {fp32_gflops: .inf}", "more than any machine has"),
        ("price: {purchase: 100, years: 1.0e-9}", "is below 0.001"),
    ],
)
def test_rates_of_nothing_and_numbers_that_are_none_are_refused(mistakes, keys, mistake):
    assert any(mistake in line for line in mistakes(node(keys)))


def test_more_devices_than_planning_takes_are_refused_with_the_limit(mistakes):
    many = "nodes: [{name: a, count: 100, cores: 4, memory_gib: 16, gpus: [{name: RTX 3090, count: 64}]}]"

    assert mistakes(many) == ["nodes: 6400 devices are declared; a plan takes at most 2000. Declare a part of them"]


def test_yaml_that_stands_for_too_much_is_refused_at_once(mistakes):
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
    )
    for text in (
        bomb,
        "nodes: !!bool maybe",
        "nodes: !!python/name:os.system ''",
        "network: {mbit_per_s: " + "9" * 5000 + "}",
    ):
        assert len(mistakes(text)) == 1
