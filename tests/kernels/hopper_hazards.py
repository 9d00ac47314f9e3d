"""Reads compiled code of Hopper, and finds registers that are touched while an asynchronous product still uses them.

A product (HGMMA) may take its first factor from registers and always adds to registers. It runs on while the program
goes on; `WARPGROUP.DEPBAR.LE gsb0, n` waits until at most the newest n groups of products run. Until then nobody may
write the factor's registers, nor read or write the sum's. The hardware does not check that.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

LINE = re.compile(r"/\*(?P<at>[0-9a-f]{4,})\*/\s+(?P<if>@!?U?P\w+\s+)?(?P<op>[A-Z][\w.]*)\s*(?P<rest>[^;]*);")
PRODUCT = re.compile(r"HGMMA\.64x(\d+)x\d+\.(\w+)")
WAIT = re.compile(r"gsb0, 0x([0-9a-f]+)")
TARGET = re.compile(r"0x([0-9a-f]+)")
REGISTER = re.compile(r"\bR(\d+)\b")
FACTOR_REGISTERS = 4  # of one thread, for 64 x 16 values of 16 bits
MOST_GROUPS = 8  # that a wait lets run; more tell nothing new
NO_RESULT = (
    "ST", "RED", "BAR", "BRA", "EXIT", "DEPBAR", "WARPGROUP", "NOP", "R2UR", "R2P", "ISETP", "FSETP", "HSETP2", "DSETP",
    "PLOP3", "LDGSTS", "LDGDEPBAR", "MEMBAR", "FENCE", "CCTL", "ERRBAR", "BSYNC", "BSSY", "WARPSYNC", "CALL", "RET",
    "UBLKCP", "UTMALDG", "SYNCS", "YIELD",
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, whether it may be skipped, its name and operands."""

    at: int
    is_conditional: bool
    name: str
    operands: str

    @property
    def written(self) -> set[int]:
        """The registers that it writes; of a product those of its sum."""
        base = self.name.split(".")[0]
        if base.startswith(NO_RESULT):
            return set()
        for operand in self.operands.split(",")[:2]:
            operand = operand.strip()
            if re.match(r"U?P\w*$|U?PT$|!", operand):
                continue  # a predicate comes first
            found = re.match(r"R(\d+)(?:\.\w+)*$", operand)
            first = int(found[1]) if found else None
            return set() if first is None else set(range(first, first + self._width(base)))
        return set()

    def _width(self, base: str) -> int:
        product = PRODUCT.match(self.name)
        if product:
            return int(product[1]) // (2 if product[2] == "F32" else 4)
        if base == "LDSM":
            return int(re.search(r"\.([124])$", self.name)[1]) if re.search(r"\.([124])$", self.name) else 1
        if base == "HMMA":
            return 4 if ".F32" in self.name else 2
        if ".128" in self.name:
            return 4
        wide = ".64" in self.name or ".WIDE" in self.name or base in ("DADD", "DMUL", "DFMA")
        return 2 if wide or (base == "CS2R" and ".32" not in self.name) else 1

    @property
    def mentioned(self) -> set[int]:
        """The registers that stand in it."""
        return {int(number) for number in REGISTER.findall(self.operands)}


def instructions_of(code: str) -> list[Instruction]:
    """Return the instructions of a text of `cuobjdump -sass`."""
    return [
        Instruction(int(found["at"], 16), bool(found["if"]), found["op"], found["rest"].strip())
        for found in LINE.finditer(code)
    ]


def hazards(code: str) -> list[str]:
    """Return, in words, every register that is touched too early, with the product and the instruction that does it."""
    instructions = instructions_of(code)
    places = {each.at: number for number, each in enumerate(instructions)}
    found = []
    for number, each in enumerate(instructions):
        if PRODUCT.match(each.name):
            found += list(_touched(instructions, places, number))
    return list(dict.fromkeys(found))


def _touched(instructions: list[Instruction], places: dict[int, int], start: int) -> Iterator[str]:
    product = instructions[start]
    factor = re.match(r"R\d+, R(\d+),", product.operands)
    factors = set(range(int(factor[1]), int(factor[1]) + FACTOR_REGISTERS)) if factor else set()
    sums = product.written
    # how many groups were committed behind this product's own; it is part of the next commit, maybe its own
    waiting, seen = [(start + 1, 0 if "gsb0" in product.operands else -1)], set()
    while waiting:
        place, groups = waiting.pop()
        while place < len(instructions) and (place, groups) not in seen:
            seen.add((place, groups))
            each = instructions[place]
            wait = WAIT.search(each.operands) if each.name.startswith("WARPGROUP.DEPBAR") else None
            if wait and groups >= int(wait[1], 16):
                break
            if PRODUCT.match(each.name):
                groups = min(groups + ("gsb0" in each.operands), MOST_GROUPS)
            else:
                if each.written & factors:
                    yield _words(product, each, "overwrites the factor", each.written & factors)
                if (each.written | each.mentioned) & sums:
                    yield _words(product, each, "touches the sum", (each.written | each.mentioned) & sums)
            if each.name.startswith("EXIT") and not each.is_conditional:
                break
            if each.name.startswith("BRA"):
                target = TARGET.search(each.operands)
                if target and int(target[1], 16) in places and int(target[1], 16) != each.at:
                    waiting.append((places[int(target[1], 16)], groups))
                if not each.is_conditional:
                    break
            place += 1


def _words(product: Instruction, other: Instruction, what: str, registers: set[int]) -> str:
    which = ", ".join(f"R{number}" for number in sorted(registers)[:4])
    return f"{other.name} at {other.at:#x} {what} of the product at {product.at:#x}: {which}"
