"""A warp of 32 lanes that runs the few PTX instructions our inner loops are made of, so that a CPU can test them.

What an instruction does is written from the PTX ISA (section "Matrix fragments for mma.m16n8k16", for `mma`).
"""

import re

import numpy as np

LANES = 32


class Warp:
    """Registers of 32 lanes over one block of memory.

    Args:
        memory: uint8, addresses count from its start.
        shared: float32, what the warps of a program share.
    """

    def __init__(self, memory, shared=None):
        self.memory, self.shared, self.registers, self.counts = memory, shared, {}, {}

    def run(self, text, operands):
        """Run a block of PTX that has no barrier.

        Args:
            text: The block, with operands named $0, $1, ...
            operands: Operand number to uint32, uint64 or float32 [32]; outputs are missing.

        Returns:
            Operand number to the value it was given.
        """
        assert list(self.phases(text, operands)) == [], "a barrier"
        return self.results()

    def results(self):
        """Give the operands as they are."""
        return {int(key[1:]): value for key, value in self.registers.items() if key[0] == "$"}

    def phases(self, text, operands):
        """Run a block of PTX, and stop at every barrier."""
        self.registers = {f"${number}": value for number, value in operands.items()}
        lines = [line.strip().rstrip(";") for line in re.split(r"[\n;]", text) if line.strip() not in ("", "{", "}")]
        labels = {line[:-1]: number for number, line in enumerate(lines) if line.endswith(":")}
        at = 0
        while at < len(lines):
            line, active = lines[at], np.ones(LANES, dtype=bool)
            at += 1
            if line.endswith(":") or line.startswith((".reg", ".shared")):
                continue
            if line == "bar.sync 0":
                yield at
                continue
            guard = re.match(r"@(!?)(\w+) (.*)", line)
            if guard:
                active, line = self.registers[guard[2]] ^ bool(guard[1]), guard[3]
            name, _, rest = line.partition(" ")
            self.counts[name] = self.counts.get(name, 0) + 1
            if name == "bra":
                assert active.all() or not active.any(), "the lanes of a warp go the same way"
                at = labels[rest] if active.all() else at
                continue
            arguments = [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", rest)] if rest else []
            self.step(name, arguments, active)

    def value(self, name):
        if name in self.registers:
            return self.registers[name]
        if name in ("parts", "held"):
            return np.zeros(LANES, dtype=np.uint32)
        if name.startswith("0f"):
            return np.full(LANES, np.frombuffer(bytes.fromhex(name[2:])[::-1], np.float32)[0])
        return np.full(LANES, int(name, 0) & 0xFFFFFFFF, dtype=np.uint32)

    def step(self, name, arguments, active):
        kind, *_ = name.split(".")
        if kind == "griddepcontrol" or name == "bar.warp.sync":  # lanes of a warp are never apart here
            return
        if ".shared.v4" in name:
            self.share_four(arguments, active, is_store=kind == "st")
        elif ".shared" in name:
            self.share(arguments, is_store=kind == "st")
        elif kind == "shfl":
            target, source, distance, *_ = arguments
            self.registers[target] = self.value(source)[np.arange(LANES) ^ int(distance)]
        elif kind == "ld":
            self.load(arguments, active)
        elif kind == "mma":
            self.mma(*([part.strip() for part in group.strip("{}").split(",")] for group in arguments))
        elif name == "mov.b32" and arguments[0].startswith("{"):
            word = self.value(arguments[1])
            low, high = arguments[0].strip("{}").split(",")
            self.registers[low.strip()] = (word & 0xFFFF).astype(np.uint16)
            self.registers[high.strip()] = (word >> 16).astype(np.uint16)
        else:
            target, *sources = arguments
            values = [self.value(source) for source in sources]
            result = self.compute(name, values)
            self.registers[target] = result if active.all() else np.where(active, result, self.registers[target])

    @staticmethod
    def compute(name, values):
        first = values[0]
        match name:
            case "mov.f32":
                return first.view(np.float32) if first.dtype == np.uint32 else first.copy()
            case "mov.b32":
                return first.view(np.uint32) if first.dtype == np.float32 else first.copy()
            case "add.f32":
                return first.view(np.float32) + values[1].view(np.float32)
            case "mov.u32":
                return first.copy()
            case "add.u32":
                return first + values[1]
            case "mul.lo.u32":
                return first * values[1]
            case "mov.b64":
                return first.copy()
            case "shr.u32":
                return first >> values[1]
            case "shl.b32":
                return first << values[1]
            case "and.b32":
                return first & values[1]
            case "lop3.b32":
                assert values[3][0] == 0xEA  # (a & b) | c
                return (first & values[1]) | values[2]
            case "sub.rn.bf16x2":
                halves = [low - high for low, high in zip(_bf16_pair(first), _bf16_pair(values[1]), strict=True)]
                words = [half.view(np.uint32) for half in halves]
                assert not any((word & np.uint32(0xFFFF)).any() for word in words), "exact in bf16"
                return (words[0] >> np.uint32(16)) | words[1]
            case "and.pred":
                return first & values[1]
            case "sub.s32":
                return first - values[1]
            case "add.s64":
                return first + values[1].astype(np.uint64)
            case "setp.gt.s32":
                return first.view(np.int32) > values[1].view(np.int32)
            case "fma.rn.f32":
                first, *values = (value.view(np.float32) for value in values)
                values.insert(0, first)
                return (first.astype(np.float64) * values[1] + values[2]).astype(np.float32)
            case "cvt.f32.f16":
                return first.view(np.float16).astype(np.float32)
        raise AssertionError(name)

    def share(self, arguments, is_store):
        where = arguments[0 if is_store else 1]
        base, _, offset = where.strip("[]").partition("+")
        addresses = self.value(base) + np.uint32(int(offset or 0))
        assert (addresses % 4 == 0).all() and len(set(addresses // 4 % 32)) == LANES, "no two lanes in a bank"
        if is_store:
            self.shared[addresses // 4] = self.value(arguments[1]).view(np.float32)
        else:
            self.registers[arguments[0]] = self.shared[addresses // 4].copy()

    def share_four(self, arguments, active, is_store):
        where, listed = arguments if is_store else arguments[::-1]
        base, _, offset = where.strip("[]").partition("+")
        addresses = self.value(base) + np.uint32(int(offset or 0))
        assert (addresses[active] % 16 == 0).all(), "aligned"
        for number, register in enumerate(part.strip() for part in listed.strip("{}").split(",")):
            places = addresses[active] // 4 + number
            if is_store:
                assert len(set(places)) == active.sum(), "each lane its own"
                self.shared[places] = self.value(register).view(np.float32)[active]
            else:
                assert active.all(), "all lanes"
                self.registers[register] = self.shared[places].view(np.uint32).copy()

    def load(self, arguments, active):
        target, where = arguments
        targets = [part.strip() for part in target.strip("{}").split(",")]
        base, _, offset = where.strip("[]").partition("+")
        addresses = self.value(base) + np.uint64(int(offset or 0))
        assert (addresses[active] % (4 * len(targets)) == 0).all(), "aligned"
        for number, register in enumerate(targets):
            old = self.registers.get(register, np.zeros(LANES, dtype=np.uint32)).copy()
            for lane in np.flatnonzero(active):
                start = int(addresses[lane]) + 4 * number
                assert 0 <= start <= len(self.memory) - 4, "inside the memory"
                old[lane] = self.memory[start : start + 4].view(np.uint32)[0]
            self.registers[register] = old

    def mma(self, d, a, b, c):
        rows, columns = np.zeros((16, 16)), np.zeros((16, 8))
        lane = np.arange(LANES)
        g, t = lane // 4, lane % 4
        for number, register in enumerate(a):
            pair = _bf16_pair(self.value(register))
            for half in range(2):
                rows[g + 8 * (number % 2), 2 * t + half + 8 * (number // 2)] = pair[half]
        for number, register in enumerate(b):
            pair = _bf16_pair(self.value(register))
            for half in range(2):
                columns[2 * t + half + 8 * number, g] = pair[half]
        product = rows @ columns
        sums = [self.value(register) for register in c]
        for number, register in enumerate(d):
            found = product[g + 8 * (number // 2), 2 * t + number % 2]
            self.registers[register] = (sums[number] + found).astype(np.float32)


def _bf16_pair(word):
    return (word << np.uint32(16)).view(np.float32), (word & np.uint32(0xFFFF0000)).view(np.float32)
