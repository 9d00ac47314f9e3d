"""The reader of Hopper's code finds what was wrong once, and nothing where waits are right."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hopper_hazards import hazards, instructions_of  # noqa: E402

# the loop over features of the mapped kernels' forward pass as Triton 3.6 made it with two stages, bf16, D = 64
LOOP = """
    /*1400*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*1500*/  LDG.E.128 R56, desc[UR8][R2.64] ;
    /*1c00*/  F2FP.BF16.F32.PACK_AB R68, R57, R56 ;
    /*1c40*/  HGMMA.64x64x16.F32.BF16 R24, R68, gdesc[UR12].tnspB, R24, gsb0 ;
    /*1c80*/  WARPGROUP.DEPBAR.LE gsb0, 0x3 ;
    /*1cb0*/  HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR12].tnspB, R24, gsb0 ;
    /*1d20*/  WARPGROUP.DEPBAR.LE gsb0, {wait} ;
    /*20f0*/  @!P0 BRA {target} ;
    /*2110*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*2120*/  FADD R24, R24, R25 ;
    /*2130*/  EXIT ;
"""


def loop(wait="0x3", target="0x1500"):
    return LOOP.replace("{wait}", wait).replace("{target}", target)


def test_a_loop_that_overwrites_the_factor_of_a_product_under_way():
    found = hazards(loop())
    assert any("LDG.E.128 at 0x1500 overwrites the factor of the product at 0x1cb0" in each for each in found)
    assert any("PACK_AB at 0x1c00 overwrites the factor of the product at 0x1c40: R68" in each for each in found)


def test_a_wait_for_all_products_is_enough():
    assert hazards(loop(wait="0x0")) == []
    assert hazards(loop(target="0x1400")) == [], "a wait at the head of the loop does as well"


@pytest.mark.parametrize("line", ["FADD R3, R24, R5", "FMUL R55, R4, R5", "LDS.128 R52, [R9]", "STS [R9], R30"])
def test_a_sum_is_nobodys_before_the_wait(line):
    code = loop(wait="0x0").replace("/*1c80*/", f"/*1c60*/  {line} ;\n    /*1c80*/")
    assert any("touches the sum of the product at 0x1c40" in each for each in hazards(code))


@pytest.mark.parametrize("line", [
    "FADD R3, R68, R5", "ISETP.GE.AND P0, PT, R68, R5, PT", "STS [R68], R3", "R2UR UR4, R24",
    "LDSM.16.M88.4 R80, [R9]", "SHFL.BFLY PT, R4, R68, 0x1, 0x1f",
])  # fmt: skip
def test_reading_a_factor_and_working_elsewhere_is_allowed(line):
    code = loop(wait="0x0").replace("/*1c80*/", f"/*1c60*/  {line} ;\n    /*1c80*/")
    assert not [each for each in hazards(code) if "factor" in each]


@pytest.mark.parametrize(
    ("line", "registers"),
    [
        ("LDG.E.128 R56, desc[UR8][R2.64]", {56, 57, 58, 59}),
        ("LDS.64 R10, [R9]", {10, 11}),
        ("IMAD.WIDE R6, R4, R5, R8", {6, 7}),
        ("SHFL.BFLY PT, R4, R68, 0x1, 0x1f", {4}),
        ("LDSM.16.MT88.4 R80, [R9]", {80, 81, 82, 83}),
        ("CS2R R12, SRZ", {12, 13}),
        ("FADD R3, R24, R5", {3}),
        ("STG.E.128 desc[UR8][R2.64], R4", set()),
        ("FSETP.GT.AND P0, PT, R3, R4, PT", set()),
    ],
)
def test_what_an_instruction_writes(line, registers):
    (instruction,) = instructions_of(f"/*0010*/ {line} ;")
    assert instruction.written == registers
