"""NVIDIA's machine instructions as a disassembler writes them: their parts, operands and the registers they read.

A value is a number that all threads of a warp have in common, an array with one for each thread, or None: not known.
"""

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Value = Any  # int | np.ndarray | None
M32 = 0xFFFFFFFF
PREDICATE = re.compile(r"!?U?P(\d|T)$")
_REGISTER = re.compile(r"([-~]?)\|?(U?R(?:\d+|Z))\|?(?:\.\w+)*$")
CONSTANT = re.compile(r"([-~]?)\|?cx?\[(?:0x([0-9a-f]+)|UR\d+)\]\[(.*?)\]\|?$")
_ADDRESS = re.compile(r"(?:desc\[U?R\d+\])?\[(.*)\]$")
#: cycles until a result may be used, for those that take longer than an addition; of memory see bench/walk.py
LATENCY = {"MUFU": 20, "F2F": 14, "F2I": 14, "I2F": 14, "SHFL": 24, "LDS": 26, "S2R": 20, "S2UR": 20, "LDC": 20}
LATENCY |= {"DADD": 8, "DMUL": 8, "DFMA": 8, "REDUX": 14, "VOTEU": 10, "FCHK": 14, "POPC": 14, "FLO": 14}


def signed(x: Value) -> Value:
    return x - ((x >> 31) << 32)


def wrapped(x: Value) -> Value:
    """To 64 bits, which numpy's integers are anyway."""
    return ((x + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63) if isinstance(x, int) else x


def scaled(get: Callable[[], Value], by: int) -> Callable[[], Value]:
    def value() -> Value:
        x = get()
        return None if x is None else x * by

    return value


def choose(by: Value, yes: Value, no: Value) -> Value:
    if isinstance(by, (bool, np.bool_)):
        return yes if by else no
    if by is None or yes is None or no is None:
        return None
    return np.where(by, yes, no)


def neighbours(name: str, count: int) -> list[str]:
    """Names of registers that follow each other."""
    if name in ("RZ", "URZ"):
        return [name] * count
    kind, number = re.match(r"(U?R)(\d+)", name).groups()  # type: ignore[union-attr]
    return [f"{kind}{int(number) + k}" for k in range(count)]


@dataclass
class Instruction:
    """``write`` gives the values of ``results``; what an instruction without results does is up to its ``base``."""

    at: int
    text: str
    base: str
    parts: list[str]  # of its name: {"LDG", "E", "128"}
    operands: list[str]
    predicate: tuple[str, bool] | None  # and whether it is negated
    results: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    write: Callable[[], Sequence[Value]] | None = None
    address: Callable[[], Value] | None = None
    does: Callable[[], Value] | None = None  # of an asynchronous copy: does it read?
    width: int = 4
    target: int = 0
    latency: int = 4

    def has(self, part: str) -> bool:
        return part in self.parts


def split(at: int, text: str) -> Instruction:
    """An instruction in its parts."""
    match = re.match(r"(?:@(!?)(U?P(?:\d|T))\s+)?(\S+)\s*(.*)$", text)
    assert match is not None, text
    negated, predicate, name, rest = match.groups()
    operands = [part.replace(".reuse", "").strip() for part in rest.split(",")] if rest else []
    parts = name.split(".")
    return Instruction(at, text, parts[0], parts, operands, (predicate, bool(negated)) if predicate else None)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def immediate(text: str) -> int | None:
    """Bits of a number: hexadecimal, or a float in decimal."""
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return int(text, 16) & ((1 << 64) - 1) if text[0] == "-" else int(text, 16)
    return struct.unpack("<I", struct.pack("<f", float(text)))[0] if is_number(text) else None


class Operands:
    """Instructions and their operands, bound to the registers and constants of a machine."""

    def __init__(self, registers: dict[str, Value], constants: bytes) -> None:
        self.registers, self.constants = registers, constants

    def constant(self, at: Value, size: int) -> Value:
        if not isinstance(at, int) or at + size > len(self.constants):
            return None
        return int.from_bytes(self.constants[at : at + size], "little")

    def get(self, text: str, wide: bool = False) -> tuple[Callable[[], Value], list[str]]:
        """A source operand and the registers it is read from; ``wide``: of 64 bits."""
        registers, bits = self.registers, (1 << 64) - 1 if wide else M32
        if match := _REGISTER.match(text):
            sign, name = match.groups()
            if name in ("RZ", "URZ"):
                return (lambda: bits) if sign == "~" else (lambda: 0 if sign == "" else bits + 1), []
            names = neighbours(name, 2 if wide else 1)
            if wide:
                low, high = names

                def plain() -> Value:
                    a, b = registers.get(low), registers.get(high)
                    return None if a is None or b is None else wrapped(a | b << 32)
            else:

                def plain() -> Value:
                    return registers.get(name)
        elif match := CONSTANT.match(text):
            sign, bank, inside = match.groups()
            at, names = self.get(inside) if not re.fullmatch(r".*\+.*", inside) else self.address(inside)
            size = 8 if wide else 4

            def plain() -> Value:
                return self.constant(at(), size) if bank == "0" else None
        else:
            number = immediate(text)
            return (lambda: None if number is None else number & bits), []
        if "|" in text:
            return (lambda: None), names
        if sign == "-":  # one bit more than the rest: so that additions carry as the machine does

            def negative() -> Value:
                x = plain()
                return None if x is None else (x ^ bits) + 1

            return negative, names
        if sign == "~":

            def inverse() -> Value:
                x = plain()
                return None if x is None else x ^ bits

            return inverse, names
        return plain, names

    def predicate(self, text: str) -> Callable[[], Value]:
        registers, name = self.registers, text.lstrip("!")
        if name in ("PT", "UPT"):
            return lambda: text[0] != "!"
        if text[0] == "!":

            def inverse() -> Value:
                x = registers.get(name)
                return None if x is None else np.logical_not(x) if isinstance(x, np.ndarray) else not x

            return inverse
        return lambda: registers.get(name)

    def address(self, inside: str) -> tuple[Callable[[], Value], list[str]]:
        """Of ``R2.64+UR4+0x10`` or less."""
        getters, names = [], []
        for part in inside.split("+"):
            wide = part.endswith(".64")
            if part.startswith("UR") and ".64" in inside and len(inside.split("+")) > 1:
                wide = True
            scale = re.search(r"\.X(4|8|16)$", part)
            get, read = self.get(re.sub(r"\.(64|U32|X4|X8|X16)$", "", part), wide)
            getters.append(scaled(get, int(scale[1])) if scale else get)
            names += read

        def total() -> Value:
            out: Value = 0
            for get in getters:
                x = get()
                if x is None:
                    return None
                out = out + (x - (1 << 32) if isinstance(x, int) and 0xFFF00000 <= x <= M32 else x)
            return out

        return total, names

    def decode(self, at: int, text: str) -> Instruction:
        ins = split(at, text)
        ins.latency = LATENCY.get(ins.base, LATENCY.get(ins.base.removeprefix("U"), 4))
        ins.width = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(
            next((p for p in ins.parts if p in ("64", "128", "U8", "S8", "U16", "S16")), ""), 4
        )
        if ins.base in ("BRA", "BSSY", "CALL"):
            ins.target = int(ins.operands[-1], 16)
            return ins
        if ins.base in (
            "EXIT",
            "BSYNC",
            "BAR",
            "NOP",
            "RET",
            "YIELD",
            "MEMBAR",
            "ERRBAR",
            "CGAERRBAR",
            "CCTL",
            "BREAK",
            "LDGDEPBAR",
            "DEPBAR",
        ):
            return ins
        if ins.base == "LDGSTS":  # to shared memory, from memory, and whether anything is read or zeros are written
            return self._copy(ins)
        memory = next((k for k, o in enumerate(ins.operands) if _ADDRESS.match(o) and not o.startswith("c[")), None)
        if memory is not None:
            inside = _ADDRESS.match(ins.operands[memory])[1]  # type: ignore[index]
            ins.address, ins.reads = self.address(inside)
        operands = ins.operands
        if ins.base in ("STG", "STS", "ST", "STL", "RED", "REDG"):
            sources = operands[(memory or 0) + 1 :]
        else:  # results stand first: a register, and predicates
            first = 0
            while first < len(operands) and first < 3 and (first == 0 or PREDICATE.match(operands[first])):
                first += 1
            if ins.base in ("ISETP", "FSETP", "DSETP", "PLOP3", "HSETP2"):
                first = 2
            elif ins.base in ("SEL", "FSEL", "IMNMX", "VIMNMX", "VIADDMNMX", "P2R", "R2P") or ins.base in ("USEL",):
                first = 1
            elif ins.base in ("LOP3", "ULOP3", "ATOMG", "ATOM", "SHFL", "ATOMS") and PREDICATE.match(operands[0]):
                first = 2
            elif ins.base == "FCHK":
                first = 1
            elif ins.base == "UISETP":
                first = 2
            ins.results, sources = operands[:first], operands[first:]
        for source in sources:
            if (match := _REGISTER.match(source)) and match[2] not in ("RZ", "URZ"):
                count = (
                    2 if self._wide_source(ins) else max(1, ins.width // 4) if ins.base in ("STG", "STS", "ST") else 1
                )
                ins.reads += neighbours(match[2], count)
            elif PREDICATE.match(source) and source.lstrip("!") not in ("PT", "UPT"):
                ins.reads.append(source.lstrip("!"))
            elif source.startswith(("c[", "cx[", "-c[")):
                ins.reads += re.findall(r"U?R\d+", source.split("][", 1)[1])
        self._widen_results(ins)
        ins.write = self.semantics(ins, sources)
        if ins.write is not None and ins.base == "R2P":
            ins.results = [f"P{k}" for k in range(7)]
        return ins

    def _copy(self, ins: Instruction) -> Instruction:
        """An asynchronous copy, whose address is that of memory."""
        to, source = (_ADDRESS.match(operand)[1] for operand in ins.operands[:2])  # type: ignore[index]
        ins.address, names = self.address(source)
        ins.reads = names + self.address(to)[1]
        if len(ins.operands) > 2 and ins.operands[2].lstrip("!") != "PT":
            ins.reads.append(ins.operands[2].lstrip("!"))
        ins.does = self.predicate(ins.operands[2]) if len(ins.operands) > 2 else lambda: True
        return ins

    def _wide_source(self, ins: Instruction) -> bool:
        return ins.base in ("DADD", "DMUL", "DFMA", "DSETP") or (
            ins.base in ("F2F", "F2I", "I2F") and "64" in str(ins.parts[-1])
        )

    def _widen_results(self, ins: Instruction) -> None:
        wide = ins.base in ("DADD", "DMUL", "DFMA", "CS2R") or ins.has("WIDE")
        wide = wide or (
            ins.base in ("F2F", "I2F", "F2I") and len(ins.parts) > 1 and ins.parts[1] in ("F64", "U64", "S64")
        )
        wide = wide and not (ins.base == "I2F" and ins.parts[1] in ("U64", "S64"))
        loads = ins.base in ("LDG", "LD", "LDS", "LDC", "ULDC", "LDL", "ATOMG", "ATOM", "UMOV") or ins.base == "LDSM"
        count = 2 if wide else max(1, ins.width // 4) if loads else 1
        out: list[str] = []
        for name in ins.results:
            match = _REGISTER.match(name)
            out += neighbours(match[2], count) if match and count > 1 else [name]
        ins.results = out

    def semantics(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]] | None:
        """What the results become; None: nothing is known of them."""
        raise NotImplementedError
