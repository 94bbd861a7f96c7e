from dataclasses import replace

import pytest

from clusters.hardware.datasheet import CARDS, device, find, nearest
from clusters.units import GIB


@pytest.mark.parametrize(
    ("name", "gib", "gb_per_s", "fp32", "fp16", "bf16", "watts"),
    [
        ("GTX 1080 Ti", 11, 484, 11.3, 0.177, None, 250),
        ("T4", 16, 320, 8.1, 65, None, 70),
        ("RTX 2080 Ti", 11, 616, 13.4, 53.8, None, 250),
        ("RTX 3060", 12, 360, 12.7, 25.5, 25.5, 170),
        ("RTX 3090", 24, 936, 35.6, 71.2, 71.2, 350),
        ("RTX 4090", 24, 1008, 82.6, 165.2, 165.2, 450),
        ("RTX 5090", 32, 1792, 104.8, 209.5, 209.5, 575),
        ("A100 SXM 80GB", 80, 2039, 19.5, 312, 312, 400),
        ("H100 SXM", 80, 3352, 66.9, 989, 989, 700),
        ("RX 7900 XTX", 24, 960, 61.4, 122.8, 122.8, 355),
    ],
)
def test_published_figures_of_well_known_cards(name, gib, gb_per_s, fp32, fp16, bf16, watts):
    card = find(name)

    tera = {number_format: peak and peak / 1e12 for number_format, peak in card.flops_per_s.items()}
    assert (card.memory_bytes / GIB, card.memory_bytes_per_s / 1e9, card.power_w) == (gib, gb_per_s, watts)
    assert (tera["float32"], tera["float16"], tera["bfloat16"]) == pytest.approx((fp32, fp16, bf16))


@pytest.mark.parametrize(
    ("printed", "name"),
    [
        ("NVIDIA GeForce RTX 3060", "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 3060 Ti", "RTX 3060 Ti"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "RTX 3060 Laptop"),
        ("NVIDIA GeForce RTX 3080", "RTX 3080 10GB"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", "RTX 3080 Laptop 8GB"),
        ("NVIDIA GeForce GTX 1060 6GB", "GTX 1060 6GB"),
        ("NVIDIA GeForce GTX 1060 3GB", "GTX 1060 3GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 SXM 16GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX A1000 Laptop GPU", "RTX A1000 Laptop 4GB"),
        ("NVIDIA TITAN RTX", "Titan RTX"),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX"),
        ("AMD Instinct MI300X", "MI300X"),
        ("rtx-4060-ti 16 gb", "RTX 4060 Ti 16GB"),
        ("RTX 4090 mobile", "RTX 4090 Laptop"),
    ],
)
def test_a_card_answers_to_what_drivers_and_people_call_it(printed, name):
    assert find(printed).name == name


@pytest.mark.parametrize(
    "printed",
    [
        "",
        "NVIDIA GeForce RTX 2060 with Max-Q Design",
        "NVIDIA GeForce RTX 3050 6GB Laptop GPU",
        "Quadro RTX 6000",
        "RTX 3060 24GB",
        "NVIDIA H100 NVL",
    ],
)
def test_a_card_that_is_not_listed_is_none_rather_than_its_neighbour(printed):
    assert find(printed) is None


@pytest.mark.parametrize(
    ("printed", "mib", "name"),
    [
        ("NVIDIA GeForce RTX 3060", 8192, "RTX 3060 8GB"),
        ("NVIDIA GeForce RTX 3060", 12288, "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 3080", 12288, "RTX 3080 12GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", 16384, "RTX 3080 Laptop 16GB"),
        ("Tesla T4", 15360, "T4"),
        ("NVIDIA A10G", 23028, "A10G"),
        ("NVIDIA H200", 143771, "H200"),
    ],
)
def test_the_memory_that_the_driver_reports_tells_variants_apart(printed, mib, name):
    assert find(printed, mib * 2**20).name == name


def test_a_memory_that_no_variant_has_finds_nothing():
    assert find("RTX 3090", 48 * GIB) is None


def test_the_nearest_names_help_who_mistyped():
    assert nearest("RTX 3091")[0] == "RTX 3090"
    assert "RTX 4090 Laptop" in nearest("RTX 4095 Laptop")
    assert nearest("") == []


def test_the_table_is_large_and_each_name_stands_once():
    names = [card.name for card in CARDS]

    assert len(names) >= 90
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_is_plausible(card):
    peaks = {number_format: peak for number_format, peak in card.flops_per_s.items() if peak is not None}
    pascal = card.compute_capability == (6, 1)

    assert card.url.startswith("https://") and " " not in card.url
    assert all(find(name, card.memory_bytes) is card for name in (card.name, *card.aliases))
    assert 3 * GIB <= card.memory_bytes <= 192 * GIB
    assert 1e11 < card.memory_bytes_per_s < 1e13
    assert 60 <= card.power_w <= 750
    assert 15e9 < card.host_link_bytes_per_s < 64e9
    assert (peaks["float16"] < peaks["float32"]) if pascal else (peaks["float16"] > peaks["float32"])
    assert peaks.get("int8", peaks["float16"]) >= peaks["float16"]
    assert all(1e12 < peak < 3e15 for name, peak in peaks.items() if not (pascal and name == "float16"))


@pytest.mark.parametrize("card", [card for card in CARDS if card.kind == "cuda"], ids=lambda card: card.name)
def test_bf16_came_to_nvidia_with_ampere(card):
    assert (card.flops_per_s["bfloat16"] is not None) == (card.compute_capability >= (8, 0))


def test_a_host_link_is_the_theoretical_rate_of_its_lanes():
    assert find("RTX 3090").host_link_bytes_per_s == pytest.approx(31.5e9, rel=1e-3)  # PCIe 4.0 x16
    assert find("RTX 4060").host_link_bytes_per_s == pytest.approx(15.75e9, rel=1e-3)  # PCIe 4.0 x8


def test_a_card_becomes_a_device_whose_every_figure_is_from_the_datasheet():
    gpu = device(find("RTX 3090"))

    assert (gpu.kind, gpu.name, gpu.compute_capability, gpu.power_w) == ("cuda", "RTX 3090", (8, 6), 350)
    assert gpu.memory_total_bytes == 24 * GIB
    assert gpu.memory_bytes / GIB == pytest.approx(24 - 0.2 - 0.0075 * 24)
    assert gpu.host_to_device_bytes_per_s == gpu.device_to_host_bytes_per_s == find("RTX 3090").host_link_bytes_per_s
    assert set(gpu.sources.values()) == {"datasheet"}
    assert {"memory_bytes", "memory_bytes_per_s", "flops_per_s.bfloat16", "power_w"} <= set(gpu.sources)
    assert gpu.has_bf16_units and not gpu.is_measured


def test_a_figure_that_nobody_published_has_no_source():
    gpu = device(find("GTX 1080"))

    assert gpu.flops_per_s["bfloat16"] is None
    assert "flops_per_s.bfloat16" not in gpu.sources


def test_error_correction_in_the_memory_itself_costs_a_sixteenth():
    assert device(find("T4")).memory_bytes / GIB == pytest.approx(15 - 0.2 - 0.0075 * 15)


@pytest.mark.parametrize(("name", "gib"), [("RTX 3070", 7.78), ("RTX 3080", 9.78), ("A100 40GB", 39.39), ("T4", 14.58)])
def test_what_the_driver_leaves_is_what_pytorch_reports_as_the_capacity(name, gib):
    assert find(name).usable_bytes / GIB == pytest.approx(gib, abs=0.12)


def test_a_screen_leaves_no_less_than_nothing():
    assert replace(find("RTX 3050 Laptop 4GB"), display_bytes=4 * GIB).usable_bytes == 0


def test_the_screen_of_a_laptop_holds_some_of_its_card():
    laptop = find("RTX 3050 Laptop 4GB")

    assert laptop.display_bytes / GIB == pytest.approx(0.4)
    assert replace(laptop, display_bytes=0).usable_bytes - laptop.usable_bytes == laptop.display_bytes
    assert find("RTX 3070").display_bytes == 0
