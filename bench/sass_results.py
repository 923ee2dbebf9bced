"""What machine instructions do to integers and predicates, as far as control flow and addresses depend on it.

Floating-point arithmetic is not known; it decides nothing but whether a root or a quotient takes its slow end.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .sass import CONSTANT, M32, PREDICATE, Instruction, Operands, Value, choose, immediate, is_number, signed, wrapped


class Decoder(Operands):
    """Instructions with what their results become: a method for each, by its name."""

    def semantics(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]] | None:
        """What the results become; None: nothing is known of them."""
        base = ins.base
        if base in (
            "R2UR",
            "S2UR",
            "UMOV",
            "ULDC",
            "UIADD3",
            "UIMAD",
            "ULEA",
            "ULOP3",
            "USHF",
            "USEL",
            "UISETP",
            "UPLOP3",
            "UFLO",
            "UPOPC",
        ):
            base = {"R2UR": "MOV", "S2UR": "S2R", "UMOV": "MOV"}.get(base, base[1:])
        base = "VOTE" if base == "VOTEU" else base
        make = getattr(self, f"_{base.lower()}", None)
        return make(ins, sources) if make else None

    def _values(self, sources: Sequence[str]) -> list[Callable[[], Value]]:
        return [self.get(source)[0] for source in sources]

    def _plain(self, sources: Sequence[str], do: Callable[..., Value]) -> Callable[[], Sequence[Value]]:
        """Of sources that all must be known."""
        getters = self._values(sources)

        def write() -> Sequence[Value]:
            values = [get() for get in getters]
            return (None if any(v is None for v in values) else do(*values),)

        return write

    def _mov(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        return self._plain(sources[:1], lambda a: a)

    def _cs2r(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]] | None:
        return (lambda: (0, 0)) if sources == ["SRZ"] else None

    def _s2r(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        registers, name = self.registers, sources[0]
        return lambda: (registers.get(name, 0),)

    def _ldc(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        match = CONSTANT.match(sources[0])
        assert match is not None, ins.text
        at, names = self.address(match[3]) if "+" in match[3] else self.get(match[3])
        ins.reads += names
        size = min(ins.width, 4)
        count = max(1, ins.width // 4)

        def write() -> Sequence[Value]:
            begin = at()
            if not isinstance(begin, int) or match[2] != "0":
                return [None] * count
            return [self.constant(begin + 4 * k, size) for k in range(count)]

        return write

    def _hfma2(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]] | None:
        if sources[:2] not in (["-RZ", "RZ"], ["RZ", "RZ"]) or len(sources) < 4:
            return None
        high, low = (
            struct.unpack("<H", struct.pack("<e", float(s)))[0] if is_number(s) else None for s in sources[2:4]
        )
        number = None if high is None or low is None else high << 16 | low
        return lambda: (number,)

    def _imad(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        if ins.has("WIDE") or ins.has("HI"):
            a, b = self._values(sources[:2])
            c, names = self.get(sources[2], wide=True)
            ins.reads += names
            sign = (lambda x: x) if ins.has("U32") else signed
            high = ins.has("HI")

            def write() -> Sequence[Value]:
                x, y, z = a(), b(), c()
                if x is None or y is None or z is None:
                    return (None,) if high else (None, None)
                total = wrapped(wrapped(sign(x & M32) * sign(y & M32)) + z)
                upper = total >> 32 & M32
                return (upper,) if high else (total & M32, upper)

            return write
        if ins.has("MOV"):
            return self._plain(sources[2:3], lambda c: c & M32)
        carry = self.predicate(sources[3]) if ins.has("X") else None
        a, b, c = self._values(sources[:3])

        def low() -> Sequence[Value]:
            x, y, z, more = a(), b(), c(), carry() if carry else 0
            if x is None or y is None or z is None or more is None:
                return (None,)
            return (wrapped(x * y + z + more) & M32,)

        return low

    def _viadd(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        return self._plain(sources, lambda a, b: (a + b) & M32)

    def _iadd3(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        getters = self._values(sources[:3])
        carries = [self.predicate(source) for source in sources[3:]] if ins.has("X") else []
        outs = len(ins.results) - 1

        def write() -> Sequence[Value]:
            values = [get() for get in (*getters, *carries)]
            if any(v is None for v in values):
                return (None,) * (outs + 1)
            total = values[0] + values[1] + values[2]
            for carry in values[3:]:
                total = total + carry
            return (total & M32, total >> 32 > 0, total >> 32 > 1)[: outs + 1]

        return write

    def _lea(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        high, extended = ins.has("HI"), ins.has("SX32")
        a, b = self._values(sources[:2])
        upper = self._values(sources[2:3])[0] if high and not extended else None
        shift = immediate(sources[3 if upper else 2]) or 0
        carry = self.predicate(sources[-1]) if ins.has("X") else None
        outs = len(ins.results)

        def write() -> Sequence[Value]:
            x, y, z, more = a(), b(), upper() if upper else 0, carry() if carry else 0
            if x is None or y is None or z is None or more is None:
                return (None,) * outs
            x = x & M32
            if extended:
                x = signed(x)
            elif upper:
                x = wrapped(x | z << 32)
            x = wrapped(x << shift)
            total = ((x >> 32 if high else x) & M32) + y + more
            return (total & M32, total >> 32 > 0)[:outs]

        return write

    def _lop3(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        table = immediate(sources[3]) or 0
        a, b, c = self._values(sources[:3])
        outs = ["predicate" if PREDICATE.match(name) else "value" for name in ins.results]
        out_of = {
            0xC0: lambda x, y, z: x & y,
            0xFC: lambda x, y, z: x | y,
            0x3C: lambda x, y, z: x ^ y,
            0x33: lambda x, y, z: y ^ M32,
        }.get(table)

        def write() -> Sequence[Value]:
            x, y, z = a(), b(), c()
            if x is None or y is None or z is None:
                return (None,) * len(outs)
            if out_of:
                total = out_of(x, y, z)
            else:
                total = 0
                for k in range(8):
                    if table >> k & 1:
                        total = total | (
                            (x if k & 4 else x ^ M32) & (y if k & 2 else y ^ M32) & (z if k & 1 else z ^ M32)
                        )
            return [total & M32 if out == "value" else (total & M32) != 0 for out in outs]

        return write

    def _plop3(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        a, b, c = (self.predicate(source) for source in sources[:3])
        table = immediate(sources[3]) or 0

        def write() -> Sequence[Value]:
            values = [a(), b(), c()]
            found: list[Value] = []
            for which in _choices(values):
                found.append(bool(table >> (which[0] * 4 + which[1] * 2 + which[2]) & 1))
            if any(isinstance(v, np.ndarray) for v in values) and not any(v is None for v in values):
                index = values[0] * np.int64(4) + values[1] * np.int64(2) + values[2] * np.int64(1)
                return ((table >> index & 1).astype(bool), None)
            return (found[0] if all(f == found[0] for f in found) else None, None)

        return write

    def _isetp(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        a, b = self._values(sources[:2])
        others = [self.predicate(source) for source in sources[2:]]
        sign = (lambda x: x & M32) if ins.has("U32") else (lambda x: signed(x & M32))
        how = ins.parts[1]
        both = "AND" if ins.has("AND") else "OR" if ins.has("OR") else "XOR"
        extended = ins.has("EX")

        def write() -> Sequence[Value]:
            x, y, combine = a(), b(), others[0]()
            known: Value
            if x is None or y is None:
                known = None
            else:
                x, y = sign(x), sign(y)
                strict = {"LT": x < y, "GT": x > y, "LE": x < y, "GE": x > y, "NE": x != y, "EQ": x == y}[how]
                if extended:
                    low = others[1]()
                    known = (
                        None
                        if low is None
                        else strict | low
                        if how == "NE"
                        else strict & low
                        if how == "EQ"
                        else strict | ((x == y) & low)
                    )
                else:
                    known = strict | (x == y) if how in ("LE", "GE") else strict
            return (combined(both, known, combine), None)

        return write

    def _sel(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        a, b = self._values(sources[:2])
        by = self.predicate(sources[2])
        return lambda: (choose(by(), a(), b()),)

    def _shf(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        left, high = ins.has("L"), ins.has("HI")
        wide, arithmetic = ins.has("S64") or ins.has("U64"), ins.has("S64") or ins.has("S32")

        def shift(a: Value, by: Value, c: Value) -> Value:
            by = (
                by & 63
                if wide
                else by
                if isinstance(by, int) and by <= 32
                else (by & 63 if isinstance(by, int) else by)
            )
            if left:
                if not high:
                    return wrapped(a << by) & M32
                return wrapped(wrapped(a | wrapped(c << 32)) << by) >> 32 & M32
            if high:
                return (signed(c) if arithmetic else c) >> by & M32
            total = wrapped(a | (signed(c) if arithmetic else c) << 32)
            if not arithmetic:
                total = total & ((1 << 64) - 1) if isinstance(total, int) else total.astype(np.uint64)
                if not isinstance(total, int):
                    return (total >> np.uint64(by)).astype(np.int64) & M32 if isinstance(by, int) else None
            return total >> by & M32

        return self._plain(sources[:3], shift)

    def _iabs(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        return self._plain(sources[:1], lambda a: abs(signed(a & M32)) & M32)

    def _imnmx(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        sign = (lambda x: x & M32) if ins.has("U32") else (lambda x: signed(x & M32))
        least = self.predicate(sources[-1])

        def pick(*values: Value) -> Value:
            a, b = sign(sum(values[:-1])), sign(values[-1])
            return choose((a < b) if least() else (a > b), a, b) & M32

        return self._plain(sources[:-1], pick)

    _vimnmx = _viaddmnmx = _imnmx

    def _prmt(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]] | None:
        select = immediate(sources[1])
        if select is None:
            return None

        def permuted(a: Value, c: Value) -> Value:
            both, out = wrapped(a | c << 32), 0
            for k in range(4):
                nibble = select >> 4 * k & 15
                byte = both >> 8 * (nibble & 7) & 0xFF
                if nibble & 8:
                    byte = (byte >> 7) * 0xFF
                out = out | byte << 8 * k
            return out

        return self._plain([sources[0], sources[2]], permuted)

    def _i2f(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]] | None:
        if any(part in ("U64", "S64", "F64", "U16", "U8", "S8", "S16") for part in ins.parts):
            return None
        sign = (lambda x: x) if ins.has("U32") else signed
        return self._plain(sources[:1], lambda a: _bits(np.asarray(sign(a), np.float64)))

    def _mufu(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]] | None:
        if ins.parts[1] != "RCP":
            return None

        def reciprocal(a: Value) -> Value:
            with np.errstate(divide="ignore"):
                return _bits(np.float64(1) / _float(a))

        return self._plain(sources[:1], reciprocal)

    def _f2i(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]] | None:
        if not (ins.has("U32") and ins.has("TRUNC")) or ins.has("F64"):
            return None
        return self._plain(sources[:1], lambda a: _same(np.clip(np.trunc(_float(a)), 0, M32).astype(np.int64)))

    def _flo(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        return self._plain(sources[:1], lambda a: a.bit_length() - 1 & M32 if isinstance(a, int) else None)

    def _popc(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        return self._plain(
            sources[:1], lambda a: a.bit_count() if isinstance(a, int) else np.bitwise_count(a).astype(np.int64)
        )

    def _vote(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]] | None:
        """Which lanes are here."""
        registers = self.registers
        return (lambda: (registers.get("lanes"),)) if sources in ([], ["PT"], ["UPT"]) and ins.has("ANY") else None

    def _shfl(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]] | None:
        if not ins.has("IDX"):
            return None
        value, lane = self._values(sources[:2])

        def write() -> Sequence[Value]:
            x, k = value(), lane()
            if x is None or k is None:
                return (None, None)
            return (None, np.broadcast_to(x, 32)[np.broadcast_to(k, 32) & 31])

        return write

    def _fchk(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]]:
        return lambda: (False,)  # the quotient does not take its slow end

    def _p2r(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]] | None:
        registers, mask = self.registers, immediate(sources[2])
        kept = self.get(sources[1])[0]
        if mask is None or len(ins.parts) > 1:
            return None

        def write() -> Sequence[Value]:
            out: Value = kept()
            if out is None:
                return (None,)
            out = out & ~mask
            for k in range(7):
                if mask >> k & 1:
                    bit = registers.get(f"P{k}")
                    if bit is None:
                        return (None,)
                    out = out | bit * np.int64(1 << k) if isinstance(bit, np.ndarray) else out | bool(bit) << k
            return (out,)

        return write

    def _r2p(self, ins: Instruction, sources: list[str]) -> Callable[[], Sequence[Value]] | None:
        registers, mask = self.registers, immediate(sources[-1])
        value = self.get(sources[-2])[0]
        if mask is None:
            return None

        def write() -> Sequence[Value]:
            bits = value()
            return [
                registers.get(f"P{k}") if not mask >> k & 1 else None if bits is None else (bits >> k & 1) != 0
                for k in range(7)
            ]

        return write


def combined(how: str, a: Value, b: Value) -> Value:
    if how == "AND":
        return False if a is False or b is False else None if a is None or b is None else a & b
    if how == "OR":
        return True if a is True or b is True else None if a is None or b is None else a | b
    return None if a is None or b is None else a ^ b


def _choices(values: list[Value]) -> list[tuple[int, ...]]:
    out: list[tuple[int, ...]] = [()]
    for value in values:
        both = value is None or isinstance(value, np.ndarray)
        out = [(*one, bit) for one in out for bit in ((0, 1) if both else (int(value),))]
    return out


def _same(x: np.ndarray) -> Value:
    return int(x) if x.ndim == 0 else x


def _bits(x: Value) -> Value:
    with np.errstate(over="ignore"):  # of lanes that have nothing to do with it
        return _same(np.asarray(x, np.float32).view(np.uint32).astype(np.int64))


def _float(x: Value) -> Any:
    return np.asarray(x & M32, np.uint32).view(np.float32).astype(np.float64)
