"""Published peaks of accelerators that people own or rent, for planning without the machine.

Dense figures only, no sparsity.  `float32` is the shaders' rate.  `float16` is the matrix units' rate with fp32
accumulation, which training uses: GeForce cards run it at half the rate of fp16 accumulation, professional cards at the
full rate.  TechPowerUp gives memory, clocks, power and bus of each card; peaks are the operations per clock of its
architecture times its boost clock, as NVIDIA and AMD compute them in their whitepapers (V100, TU102, GA102, AD102, RTX
Blackwell, and https://gpuopen.com/learn/wmma_on_rdna3/).  Where vendor and TechPowerUp differ, the vendor's figure
stands and a comment says so.  None is a figure that nobody published.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from clusters.capability import DeviceCapability, Source
from clusters.units import GIB

# What the driver keeps of a card, from the capacities in PyTorch's out-of-memory messages: 7.78 GiB of 8 (RTX 2070 and
# 3070), 9.78 of 10 (RTX 3080), 23.55 to 23.70 of 24 (RTX 3090 and 4090), 39.39 of 40 and 79.15 to 79.32 of 80 (A100).
# The context of a process is no part of it: the estimate of its memory counts that.
DRIVER_BYTES, DRIVER_SHARE = 0.2 * GIB, 0.0075
# What a screen takes of the card it hangs on: 0.33 GiB on an RTX 3070 (codellama issue 82).  Taken of every laptop's.
DISPLAY_BYTES = round(0.4 * GIB)
LEAST_BYTES = 0.6 * GIB  # of a card: driver and display take as much
_TECHPOWERUP = "https://www.techpowerup.com/gpu-specs/"
_A10G = "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf"
_H100, _H200 = (f"https://www.nvidia.com/en-us/data-center/{name}/" for name in ("h100", "h200"))
_MI210, _MI250, _MI300X = (
    f"https://www.amd.com/en/products/accelerators/instinct/{name}.html"
    for name in ("mi200/mi210", "mi200/mi250", "mi300/mi300x")
)
_WITHOUT_BF16 = ("6.0", "6.1", "7.0", "7.5", "rdna2")
GT_PER_S = {3: 8, 4: 16, 5: 32}  # PCIe generation -> giga-transfers per second of a lane; 128 of 130 bits are data


def slot_bytes_per_s(generation: int, lanes: int) -> float:
    """What a PCIe slot carries in each direction, theoretically."""
    return GT_PER_S[generation] * 1e9 * lanes / 8 * 128 / 130


@dataclass(frozen=True)
class Accelerator:
    """One accelerator as published; None = no published figure."""

    name: str
    aliases: tuple[str, ...]
    kind: Literal["cuda", "rocm"]
    memory_bytes: int  # nominal: a "24 GB" card holds 24 GiB
    flops_per_s: Mapping[str, float | None]
    memory_bytes_per_s: float | None = None
    compute_capability: tuple[int, int] | None = None  # CUDA only
    power_w: float | None = None  # of the board; of laptops the highest the vendor allows
    host_link_bytes_per_s: float | None = None  # in each direction, theoretical
    url: str = ""
    nvlink_bytes_per_s: float | None = None  # all its links together, in each direction; MI300X: Infinity Fabric
    has_switched_nvlink: bool = False  # on the board of its machine, to all others; else a bridge joins two, if bought
    ecc_in_memory: bool = False  # error correction, on by default, kept in the memory itself: costs a sixteenth of it
    display_bytes: int = 0  # held by a screen on this card

    @property
    def usable_bytes(self) -> int:
        """What is left to processes beside error correction, driver and display; 0 where they take all."""
        whole = self.memory_bytes * 15 // 16 if self.ecc_in_memory else self.memory_bytes
        return max(0, whole - driver_bytes(whole) - self.display_bytes)


@dataclass(frozen=True)
class _Card:
    """One line of the table: TFLOPS and TOPS, a compute capability or AMD's architecture, PCIe `generation x lanes`.

    The page is one of TechPowerUp (`-rtx-3090.c3622` is a GeForce) or a whole URL.
    """

    name: str
    gib: float
    gb_per_s: float
    fp32: float
    fp16: float
    int8: float | None
    architecture: str
    pcie: str
    power_w: float
    page: str
    alias: str | None = None
    ecc: bool = False

    @property
    def card(self) -> Accelerator:
        bf16 = None if self.architecture in _WITHOUT_BF16 else self.fp16  # one rate for both wherever there is bf16
        peaks = {"float32": self.fp32, "bfloat16": bf16, "float16": self.fp16, "int8": self.int8}
        major, dot, minor = self.architecture.partition(".")
        generation, lanes = map(int, self.pcie.split("x"))
        folder = _TECHPOWERUP + ("geforce" if self.page[0] == "-" else "")
        return Accelerator(
            self.name,
            (self.alias,) if self.alias else (),
            "cuda" if dot else "rocm",
            round(self.gib * GIB),
            {number_format: peak and peak * 1e12 for number_format, peak in peaks.items()},
            self.gb_per_s * 1e9,
            (int(major), int(minor)) if dot else None,
            self.power_w,
            slot_bytes_per_s(generation, lanes),
            self.page if self.page.startswith("https://") else folder + self.page,
            *_NVLINK.get(self.name, (None, False)),
            self.ecc,
            DISPLAY_BYTES if "Laptop" in self.name else 0,
        )


# Cards that share a name stand in the order in which they were sold (the smaller first where that was together): the
# first answers to a name said without a size.  A name without the form (A100, V100, H100) means the PCIe board, the
# slower one.  Laptop parts: the boost clock at the highest graphics power that the vendor lists, which thin laptops do
# not reach, and the lanes of the chip, of which some laptops wire half.
# fmt: off
_SPECS = (
    #      name                  GiB  GB/s   fp32   fp16   int8  CUDA     PCIe    W    page, aliases
    # Pascal: GeForce and P40 run fp16 at 1/64 of fp32, which is why it is harmful there
    _Card("GTX 1060 6GB",          6,  192,  4.38, 0.068,  None, "6.1",   "3x16", 120, "-gtx-1060-6-gb.c2862"),
    _Card("GTX 1060 3GB",          3,  192,  3.94, 0.061,  None, "6.1",   "3x16", 120, "-gtx-1060-3-gb.c2867"),
    _Card("GTX 1070",              8,  256,  6.46, 0.101,  None, "6.1",   "3x16", 150, "-gtx-1070.c2840"),
    _Card("GTX 1070 Ti",           8,  256,  8.19, 0.128,  None, "6.1",   "3x16", 180, "-gtx-1070-ti.c3010"),
    _Card("GTX 1080",              8,  320,  8.87, 0.139,  None, "6.1",   "3x16", 180, "-gtx-1080.c2839"),
    _Card("GTX 1080 Ti",          11,  484,  11.3, 0.177,  None, "6.1",   "3x16", 250, "-gtx-1080-ti.c2877"),
    _Card("P40",                  24,  347,  11.8, 0.184,  None, "6.1",   "3x16", 250, "tesla-p40.c2878", ecc=True),
    _Card("P100 PCIe 16GB",       16,  732,  9.30,  18.7,  None, "6.0",   "3x16", 250, "tesla-p100-pcie-16-gb.c2888"),
    # Volta
    # NVIDIA publishes 110 TFLOPS for the Titan V; eight times its shaders at the boost clock would be 119
    _Card("Titan V",              12,  651,  14.9, 110.0,  None, "7.0",   "3x16", 250, "titan-v.c3051"),
    # V100: NVIDIA's figures; TechPowerUp has 897 GB/s and other watts
    _Card("V100 PCIe 16GB",       16,  900,  14.0, 112.0,  None, "7.0",   "3x16", 250, "tesla-v100-pcie-16-gb.c2957"),
    _Card("V100 PCIe 32GB",       32,  900,  14.0, 112.0,  None, "7.0",   "3x16", 250, "tesla-v100-pcie-32-gb.c3184"),
    _Card("V100 SXM 16GB",        16,  900,  15.7, 125.0,  None, "7.0",   "3x16", 300, "tesla-v100-sxm2-16-gb.c3018"),
    _Card("V100 SXM 32GB",        32,  900,  15.7, 125.0,  None, "7.0",   "3x16", 300, "tesla-v100-sxm2-32-gb.c3185"),
    # Turing
    _Card("GTX 1650",              4,  128,  2.98,  5.97,  None, "7.5",   "3x16",  75, "-gtx-1650.c3366"),
    _Card("GTX 1660 Super",        6,  336,  5.03,  10.1,  None, "7.5",   "3x16", 125, "-gtx-1660-super.c3458"),
    _Card("GTX 1660 Ti",           6,  288,  5.44,  10.9,  None, "7.5",   "3x16", 120, "-gtx-1660-ti.c3364"),
    _Card("RTX 2060 6GB",          6,  336,  6.45,  25.8, 103.2, "7.5",   "3x16", 160, "-rtx-2060.c3310"),
    _Card("RTX 2060 12GB",        12,  336,  7.18,  28.7, 114.9, "7.5",   "3x16", 184, "-rtx-2060-12-gb.c3836"),
    _Card("RTX 2060 Super",        8,  448,  7.18,  28.7, 114.9, "7.5",   "3x16", 175, "-rtx-2060-super.c3441"),
    _Card("RTX 2070",              8,  448,  7.46,  29.9, 119.4, "7.5",   "3x16", 175, "-rtx-2070.c3252"),
    _Card("RTX 2070 Super",        8,  448,  9.06,  36.2, 145.0, "7.5",   "3x16", 215, "-rtx-2070-super.c3440"),
    _Card("RTX 2080",              8,  448,  10.1,  40.3, 161.1, "7.5",   "3x16", 215, "-rtx-2080.c3224"),
    _Card("RTX 2080 Super",        8,  496,  11.2,  44.6, 178.4, "7.5",   "3x16", 250, "-rtx-2080-super.c3439"),
    _Card("RTX 2080 Ti",          11,  616,  13.4,  53.8, 215.2, "7.5",   "3x16", 250, "-rtx-2080-ti.c3305"),
    _Card("Titan RTX",            24,  672,  16.3, 130.5, 261.0, "7.5",   "3x16", 280, "titan-rtx.c3311"),
    _Card("T4",                   16,  320,   8.1,  65.0, 130.0, "7.5",   "3x16",  70, "tesla-t4.c3316", ecc=True),
    # Ampere
    _Card("RTX 3050 8GB",          8,  224,   9.1,  18.2,  72.8, "8.6",   "4x8",  130, "-rtx-3050-8-gb.c3858"),
    _Card("RTX 3050 6GB",          6,  168,  6.77,  13.5,  54.2, "8.6",   "4x8",   70, "-rtx-3050-6-gb.c4188"),
    _Card("RTX 3060 12GB",        12,  360,  12.7,  25.5, 101.9, "8.6",   "4x16", 170, "-rtx-3060-12-gb.c3682"),
    _Card("RTX 3060 8GB",          8,  240,  12.7,  25.5, 101.9, "8.6",   "4x16", 170, "-rtx-3060-8-gb.c3937"),
    _Card("RTX 3060 Ti",           8,  448,  16.2,  32.4, 129.6, "8.6",   "4x16", 200, "-rtx-3060-ti.c3681"),
    _Card("RTX 3070",              8,  448,  20.3,  40.6, 162.5, "8.6",   "4x16", 220, "-rtx-3070.c3674"),
    _Card("RTX 3070 Ti",           8,  608,  21.7,  43.5, 174.0, "8.6",   "4x16", 290, "-rtx-3070-ti.c3675"),
    _Card("RTX 3080 10GB",        10,  760,  29.8,  59.5, 238.1, "8.6",   "4x16", 320, "-rtx-3080.c3621"),
    _Card("RTX 3080 12GB",        12,  912,  30.6,  61.3, 245.1, "8.6",   "4x16", 350, "-rtx-3080-12-gb.c3834"),
    _Card("RTX 3080 Ti",          12,  912,  34.1,  68.2, 272.8, "8.6",   "4x16", 350, "-rtx-3080-ti.c3735"),
    _Card("RTX 3090",             24,  936,  35.6,  71.2, 284.7, "8.6",   "4x16", 350, "-rtx-3090.c3622"),
    _Card("RTX 3090 Ti",          24, 1008,  40.0,  80.0,   320, "8.6",   "4x16", 450, "-rtx-3090-ti.c3829"),
    _Card("RTX A4000",            16,  448,  19.2,  76.7, 153.4, "8.6",   "4x16", 140, "rtx-a4000.c3756", "A4000"),
    _Card("RTX A5000",            24,  768,  27.8, 111.1, 222.2, "8.6",   "4x16", 230, "rtx-a5000.c3748", "A5000"),
    _Card("RTX A6000",            48,  768,  38.7, 154.8,   310, "8.6",   "4x16", 300, "rtx-a6000.c3686", "A6000"),
    _Card("A10",                  24,  600,  31.2, 125.0, 249.9, "8.6",   "4x16", 150, "a10-pcie.c3793", ecc=True),
    # A10G: the datasheet at AWS; TechPowerUp has 31.5 TFLOPS and 150 W
    _Card("A10G",                 24,  600,  35.0,  70.0,  None, "8.6",   "4x16", 300, _A10G, ecc=True),
    _Card("A40",                  48,  696,  37.4, 149.7, 299.3, "8.6",   "4x16", 300, "a40-pcie.c3700", ecc=True),
    _Card("A30",                  24,  933,  10.3, 165.2,   330, "8.0",   "4x16", 165, "a30-pcie.c3792"),
    # A100, H100, H200: NVIDIA's bandwidth; TechPowerUp rounds it up by up to 2 %
    _Card("A100 PCIe 40GB",       40, 1555,  19.5,   312,   624, "8.0",   "4x16", 250, "a100-pcie-40-gb.c3623"),
    _Card("A100 PCIe 80GB",       80, 1935,  19.5,   312,   624, "8.0",   "4x16", 300, "a100-pcie-80-gb.c3821"),
    _Card("A100 SXM 40GB",        40, 1555,  19.5,   312,   624, "8.0",   "4x16", 400, "a100-sxm4-40-gb.c3506"),
    _Card("A100 SXM 80GB",        80, 2039,  19.5,   312,   624, "8.0",   "4x16", 400, "a100-sxm4-80-gb.c3746"),
    # Ampere laptops
    _Card("RTX 3050 Laptop 4GB",   4,  192,  7.13,  14.3,  57.0, "8.6",   "4x8",   80, "-rtx-3050-mobile.c3788"),
    _Card("RTX 3050 Ti Laptop",    4,  192,  8.68,  17.4,  69.4, "8.6",   "4x8",   80, "-rtx-3050-ti-mobile.c3778"),
    _Card("RTX 3060 Laptop",       6,  336,  13.1,  26.2, 104.6, "8.6",   "4x16", 115, "-rtx-3060-mobile.c3757"),
    _Card("RTX 3070 Laptop",       8,  448,  16.6,  33.2, 132.7, "8.6",   "4x16", 125, "-rtx-3070-mobile.c3712"),
    _Card("RTX 3080 Laptop 8GB",   8,  448,  21.0,  42.0, 168.1, "8.6",   "4x16", 150, "-rtx-3080-mobile.c3684"),
    _Card("RTX 3080 Laptop 16GB", 16,  448,  21.0,  42.0, 168.1, "8.6",   "4x16", 150, "-rtx-3080-mobile.c3684"),
    # NVIDIA allows 35 to 95 W; clock and bandwidth are those that TechPowerUp has for 60 W
    _Card("RTX A1000 Laptop 4GB",  4,  176,  4.67,  18.7,  37.4, "8.6",   "4x8",   60, "rtx-a1000-mobile.c3920"),
    # Ada
    _Card("RTX 4060",              8,  272,  15.1,  30.2, 120.9, "8.9",   "4x8",  115, "-rtx-4060.c4107"),
    _Card("RTX 4060 Ti 8GB",       8,  288,  22.1,  44.1, 176.5, "8.9",   "4x8",  160, "-rtx-4060-ti-8-gb.c3890"),
    _Card("RTX 4060 Ti 16GB",     16,  288,  22.1,  44.1, 176.5, "8.9",   "4x8",  165, "-rtx-4060-ti-16-gb.c4155"),
    _Card("RTX 4070",             12,  504,  29.1,  58.3, 233.2, "8.9",   "4x16", 200, "-rtx-4070.c3924"),
    _Card("RTX 4070 Super",       12,  504,  35.5,  71.0, 283.9, "8.9",   "4x16", 220, "-rtx-4070-super.c4186"),
    _Card("RTX 4070 Ti",          12,  504,  40.1,  80.2,   321, "8.9",   "4x16", 285, "-rtx-4070-ti.c3950"),
    _Card("RTX 4070 Ti Super",    16,  672,  44.1,  88.2,   353, "8.9",   "4x16", 285, "-rtx-4070-ti-super.c4187"),
    _Card("RTX 4080",             16,  717,  48.7,  97.5,   390, "8.9",   "4x16", 320, "-rtx-4080.c3888"),
    _Card("RTX 4080 Super",       16,  736,  52.2, 104.4,   418, "8.9",   "4x16", 320, "-rtx-4080-super.c4182"),
    _Card("RTX 4090",             24, 1008,  82.6, 165.2,   661, "8.9",   "4x16", 450, "-rtx-4090.c3889"),
    _Card("RTX 6000 Ada",         48,  960,  91.1,   364,   728, "8.9",   "4x16", 300, "rtx-6000-ada-generation.c3933"),
    _Card("L4",                   24,  300,  30.3, 121.2, 242.3, "8.9",   "4x16",  72, "l4.c4091", ecc=True),
    _Card("L40S",                 48,  864,  91.6,   362,   733, "8.9",   "4x16", 350, "l40s.c4173", ecc=True),
    # Ada laptops
    _Card("RTX 4050 Laptop",       6,  192,  12.1,  24.3,  97.1, "8.9",   "4x8",  115, "-rtx-4050-mobile.c3953"),
    _Card("RTX 4060 Laptop",       8,  256,  14.6,  29.1, 116.5, "8.9",   "4x8",  115, "-rtx-4060-mobile.c3946"),
    _Card("RTX 4070 Laptop",       8,  256,  20.0,  40.1, 160.4, "8.9",   "4x8",  115, "-rtx-4070-mobile.c3944"),
    _Card("RTX 4080 Laptop",      12,  432,  33.9,  67.7, 270.8, "8.9",   "4x16", 150, "-rtx-4080-mobile.c3947"),
    # NVIDIA's 686 AI TOPS would be 43 and 86 TFLOPS, beyond the 2040 MHz that it lists
    _Card("RTX 4090 Laptop",      16,  576,  39.7,  79.4,   318, "8.9",   "4x16", 150, "-rtx-4090-mobile.c3949"),
    # Hopper
    _Card("H100 PCIe",            80, 2040,  51.2,   756,  1513, "9.0",   "5x16", 350, _H100, "H100 HBM2e"),
    _Card("H100 SXM",             80, 3352,  66.9,   989,  1979, "9.0",   "5x16", 700, _H100, "H100 HBM3"),
    _Card("H200",                141, 4800,  66.9,   989,  1979, "9.0",   "5x16", 700, _H200),
    # Blackwell
    _Card("RTX 5060",              8,  448,  19.2,  38.4, 153.4, "12.0",  "5x8",  145, "-rtx-5060.c4219"),
    _Card("RTX 5060 Ti 8GB",       8,  448,  23.7,  47.4, 189.6, "12.0",  "5x8",  180, "-rtx-5060-ti-8-gb.c4246"),
    _Card("RTX 5060 Ti 16GB",     16,  448,  23.7,  47.4, 189.6, "12.0",  "5x8",  180, "-rtx-5060-ti-16-gb.c4292"),
    _Card("RTX 5070",             12,  672,  30.9,  61.7, 246.9, "12.0",  "5x16", 250, "-rtx-5070.c4218"),
    _Card("RTX 5070 Ti",          16,  896,  43.9,  87.9,   352, "12.0",  "5x16", 300, "-rtx-5070-ti.c4243"),
    _Card("RTX 5080",             16,  960,  56.3, 112.6,   450, "12.0",  "5x16", 360, "-rtx-5080.c4217"),
    _Card("RTX 5090",             32, 1792, 104.8, 209.5,   838, "12.0",  "5x16", 575, "-rtx-5090.c4216"),
    # At 150 W and 2160 MHz; NVIDIA's 1824 AI TOPS would be 57 and 114 TFLOPS, TechPowerUp's 1515 MHz 32 and 64
    _Card("RTX 5090 Laptop",      24,  896,  45.3,  90.7,   363, "12.0",  "5x16", 150, "-rtx-5090-mobile.c4235"),
    # AMD
    # RDNA 2 has no bf16; RDNA 3 and 4 count two shader instructions a clock
    _Card("RX 6800 XT",           16,  512,  20.7,  41.5,  82.9, "rdna2", "4x16", 300, "radeon-rx-6800-xt.c3694"),
    _Card("RX 6900 XT",           16,  512,  23.0,  46.1,  92.2, "rdna2", "4x16", 300, "radeon-rx-6900-xt.c3481"),
    _Card("RX 7800 XT",           16,  624,  37.3,  74.6,  74.6, "rdna3", "4x16", 263, "radeon-rx-7800-xt.c3839"),
    _Card("RX 7900 XT",           20,  800,  51.5, 103.0, 103.0, "rdna3", "4x16", 300, "radeon-rx-7900-xt.c3912"),
    _Card("RX 7900 XTX",          24,  960,  61.4, 122.8, 122.8, "rdna3", "4x16", 355, "radeon-rx-7900-xtx.c3941"),
    _Card("RX 9070 XT",           16,  640,  48.7, 194.6,   389, "rdna4", "5x16", 304, "radeon-rx-9070-xt.c4229"),
    _Card("MI210",                64, 1638,  22.6, 181.0, 181.0, "cdna2", "4x16", 300, _MI210),
    # A module of MI250 is two devices to ROCm: this is one of them
    _Card("MI250 GCD",            64, 1638,  22.6, 181.0, 181.0, "cdna2", "4x16", 250, _MI250, "MI250"),
    _Card("MI300X",              192, 5300, 163.4,  1307,  2615, "cdna3", "5x16", 750, _MI300X),
)
# fmt: on
# Half of the vendors' figures, which add both directions: NVIDIA's whitepapers of V100, TU102, GA102, A100 and H100,
# its pages of professional boards, AMD's of MI300X (seven links to the seven others).
_NVLINK: dict[str, tuple[float, bool]] = {
    **dict.fromkeys(("V100 SXM 16GB", "V100 SXM 32GB"), (150e9, True)),
    **dict.fromkeys(("A100 SXM 40GB", "A100 SXM 80GB"), (300e9, True)),
    **dict.fromkeys(("H100 SXM", "H200"), (450e9, True)),
    "MI300X": (448e9, True),
    **dict.fromkeys(("RTX 2080", "RTX 2080 Super"), (25e9, False)),
    **dict.fromkeys(("RTX 2080 Ti", "Titan RTX"), (50e9, False)),
    **dict.fromkeys(("RTX 3090", "RTX 3090 Ti", "RTX A5000", "RTX A6000", "A40"), (56.25e9, False)),
    "A30": (100e9, False),
    **dict.fromkeys(("A100 PCIe 40GB", "A100 PCIe 80GB", "H100 PCIe"), (300e9, False)),
}
CARDS: tuple[Accelerator, ...] = tuple(spec.card for spec in _SPECS)


def find(name: str, memory_bytes: int | None = None) -> Accelerator | None:
    """The card as nvidia-smi, rocm-smi or a person calls it; None = not in the table.

    Variants of one name are distinguished by a size in the name, else by `memory_bytes`, the total that the driver
    reports.  Laptop parts of the GTX 10 and RTX 20 series bear the name of the desktop card, whose figures are a little
    high for them.
    """
    key, gib = _key(name)
    wanted = gib * GIB if gib else memory_bytes
    named = [card for card in CARDS if key in _keys(card)]
    # Drivers report up to 7 % less than nominal (ECC, firmware); the closest two variants are 17 % apart.
    fitting = (card for card in named if wanted is None or 0.9 <= wanted / card.memory_bytes <= 1.02)
    return next(fitting, None)


def best_part_of_datasheet(device: DeviceCapability) -> tuple[str, float] | None:
    """The number format in which a device's measured products come closest to its datasheet, and how close.

    None where the card is not listed, or nothing of it is measured.
    """
    card = find(device.name, device.memory_total_bytes) if device.kind != "cpu" else None
    parts = {
        name: rate / peak
        for name, peak in (card.flops_per_s.items() if card else ())
        if peak and (rate := device.flops_per_s.get(name)) and device.sources.get(f"flops_per_s.{name}") == "measured"
    }
    best = max(parts, key=lambda name: parts[name], default=None)
    return None if best is None else (best, parts[best])


def driver_bytes(memory_bytes: float) -> int:
    """What the driver keeps of a card's memory."""
    return round(DRIVER_BYTES + DRIVER_SHARE * memory_bytes)


def display_bytes(device: DeviceCapability) -> int:
    """What a screen is taken to hold of a card whose free memory nobody measured."""
    total, usable = device.memory_total_bytes, device.memory_bytes
    if total is None or usable is None or device.kind == "cpu" or device.sources.get("memory_bytes") == "measured":
        return 0
    card = find(device.name, total)
    whole = total * 15 // 16 if card and card.ecc_in_memory else total
    return max(0, whole - driver_bytes(whole) - usable)


def nearest(name: str) -> list[str]:
    """Up to three names of the table most like `name`, the likest first; for error messages."""
    names = {key: card.name for card in reversed(CARDS) for key in _keys(card)}
    return list(dict.fromkeys(names[key] for key in difflib.get_close_matches(_key(name)[0], names)))


def device(card: Accelerator) -> DeviceCapability:
    """The card as a device to plan with, every figure from the datasheet."""
    figures: dict[str, Any] = {
        "memory_bytes": card.usable_bytes,
        "memory_total_bytes": card.memory_bytes,
        "compute_capability": card.compute_capability,
        "memory_bytes_per_s": card.memory_bytes_per_s,
        "host_to_device_bytes_per_s": card.host_link_bytes_per_s,
        "device_to_host_bytes_per_s": card.host_link_bytes_per_s,
        "power_w": card.power_w,
    }
    peaks = {f"flops_per_s.{number_format}": peak for number_format, peak in card.flops_per_s.items()}
    known = (figure for figure, value in (figures | peaks).items() if value is not None)
    sources: dict[str, Source] = dict.fromkeys(known, "datasheet")
    return DeviceCapability(card.kind, card.name, flops_per_s=card.flops_per_s, sources=sources, **figures)


def _key(name: str) -> tuple[str, int | None]:
    """The letters and digits that tell cards apart, and the GiB that the name mentions."""
    text = name.lower().replace("mobile", "laptop")
    size = re.search(r"\b(\d+)\s*gi?b\b", text)
    text = text.replace(size.group(), "") if size else text
    noise = r"nvidia|geforce|amd|radeon|instinct|tesla|gpu|generation|pcie|(?<=sxm)\d|\((r|tm)\)|[^a-z0-9]"
    return re.sub(noise, "", text), int(size.group(1)) if size else None


def _keys(card: Accelerator) -> set[str]:
    return {_key(name)[0] for name in (card.name, *card.aliases)}
