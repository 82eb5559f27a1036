"""Executes the PTX of a launch on memory of the host: each instruction as the PTX ISA describes it, on its own.

All threads of all blocks run at once: a register is an array with a value of every thread, and an instruction is done
for the threads that have come to it, first for those that are furthest behind. What needs a whole warp, warpgroup,
block or cluster, or the phase of a barrier, waits for it. What is asynchronous on a GPU is done when it is issued: in
which order things arrive is the affair of emulator/hopper_cta.h, what operands mean is that of this file.

Pointers are those of the host. Shared memory begins at SHARED, that of the cluster's block i at (i + 1) * RANK more."""

import functools
import re
from ctypes import c_uint8

import numpy as np

SHARED, RANK, PAGE = 1024, 1 << 24, 4096
MEMORY = np.ctypeslib.as_array((c_uint8 * ((1 << 47) - PAGE)).from_address(PAGE))
SPANS = {0: 0, 2: 64, 3: 128}  # of CUtensorMapSwizzle
U1, U2, U4, U8 = np.uint8, np.uint16, np.uint32, np.uint64


@functools.cache
def kind_of(name):
    letters = {"b": "u", "u": "u", "s": "i", "f": "f"}
    return np.dtype(bool) if name == "pred" else np.dtype(f"{letters[name[0]]}{int(name[1:]) // 8}")


def fma(a, b, c):
    """In float64 rounded to odd, of which float32 is rounded right."""
    product = a.astype("f8") * b
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    odd = np.where((error != 0) & (total.view("i8") & 1 == 0), np.where((error > 0) == (total > 0), 1, -1), 0)
    return (total.view("i8") + odd).view("f8").astype("f4")


def divide(a, b):
    quotient = np.abs(a) // np.where(b == 0, 1, np.abs(b)).astype(a.dtype)
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def wide(a, b):
    return a.astype(f"{a.dtype.kind}8") * b.astype(f"{a.dtype.kind}8")


def shifted(way):
    def shift(x, count):
        bits, sure = 8 * x.itemsize, np.minimum(count, 8 * x.itemsize - 1).astype(x.dtype)
        return np.where((count < bits) | (x.dtype.kind == "i"), way(x, sure), 0).astype(x.dtype)

    return shift


def permute(a, b, order):
    """prmt: bytes of b and a, or their signs."""
    both, found = b.astype(U8) << U8(32) | a, np.zeros_like(a)
    for i in range(4):
        pick = order >> U4(4 * i)
        byte = (both >> ((pick & U4(7)).astype(U8) * U8(8))).astype(U1)
        found |= np.where(pick & U4(8), (byte >> U1(7)) * U1(255), byte).astype(U4) << U4(8 * i)
    return found


def insert(a, b, at, length):
    mask = ((U4(1) << length) - U4(1)) << at
    return b & ~mask | a << at & mask


def whole(x):
    """cvt.rni.s32: NaN becomes 0, what is too large the last number."""
    return np.clip(np.rint(np.nan_to_num(x.astype("f8"))), -(2**31), 2**31 - 1).astype("i4")


def half(x):
    return x.astype("f2").view(U2)


def bfloat(x):
    bits = x.view("i4")
    return np.where(np.isnan(x), U2(0x7FFF), (bits + (bits >> 16 & 1) + 0x7FFF >> 16).astype(U2))


def two(of):
    return lambda high, low: of(high).astype(U4) << U4(16) | of(low)


T, I, F = r"\.(pred|[busf](?:8|16|32|64))", r"\.([us](?:16|32|64))", r"\.(f32)"  # noqa: E741
# What a thread computes: instruction with the type of its operands, the value, types of single operands.
VALUES = [(re.compile(pattern), function, dict(kinds)) for pattern, function, *kinds in (
    (rf"add(?:\.rn)?{T}", np.add), (rf"sub(?:\.rn)?{T}", np.subtract), (rf"neg{T}", np.negative), (rf"abs{F}", np.abs),
    (rf"mul\.lo{I}|mul(?:\.rn)?{F}", np.multiply), (r"mul\.wide\.([us]32)", wide),
    (r"mul\.hi\.(s32)", lambda a, b: (wide(a, b) >> 32).astype("i4")),
    (rf"mad\.lo{I}", lambda a, b, c: a * b + c), (rf"fma\.rn{F}", fma), (rf"div\.(?:rn|approx){F}", np.divide),
    (rf"div{I}", divide), (rf"rem{I}", lambda a, b: a - divide(a, b) * b), (rf"sqrt\.rn{F}", np.sqrt),
    (rf"ex2\.approx(?:\.ftz)?{F}", np.exp2), (rf"copysign{F}", lambda sign, of: np.copysign(of, sign)),
    (rf"not{T}", np.invert), (rf"and{T}", np.bitwise_and), (rf"or{T}", np.bitwise_or), (rf"xor{T}", np.bitwise_xor),
    (rf"shl{T}", shifted(np.left_shift), (1, "u32")), (rf"shr{T}", shifted(np.right_shift), (1, "u32")),
    (rf"min{I}|min\.NaN{F}", np.minimum), (rf"max{I}|max\.NaN{F}", np.maximum),
    (rf"selp{T}", lambda a, b, p: np.where(p, a, b), (2, "pred")), (r"prmt\.(b32)", permute), (r"bfi\.(b32)", insert),
    (rf"mov{T}|cvta\.(?:param|to\.global)\.(u64)", lambda a: a), (r"cvt\.f32\.(f16)", lambda a: a.astype("f4")),
    (r"cvt\.rn\.f16\.(f32)", half), (r"cvt\.rn\.f16x2\.(f32)", two(half)), (r"cvt\.rn\.bf16\.(f32)", bfloat),
    (r"cvt\.rn\.bf16x2\.(f32)", two(bfloat)), (r"cvt\.rni\.f32\.(f32)", np.rint), (r"cvt\.rpi\.f32\.(f32)", np.ceil),
    (r"cvt\.rni\.s32\.(f32)", whole), (rf"cvt\.rn\.f32{I}", lambda a: a.astype("f4")),
    *((rf"cvt\.{to}{I}", lambda a, to=to: a.astype(kind_of(to))) for to in ("u16", "u32", "u64", "s64")),
    *((rf"setp\.{name}{T}", function) for name, function in (
        ("eq", np.equal), ("lt", np.less), ("le", np.less_equal), ("gt", np.greater), ("ge", np.greater_equal))),
    (r"setp\.ne\.([bus](?:16|32|64))", np.not_equal), (rf"setp\.ltu{F}", lambda a, b: ~(a >= b)),
)]  # fmt: skip
# How many threads must have come together; those of a block and of a cluster are counted elsewhere.
TOGETHER = {r"bar\.warp\.sync|shfl\.sync|elect\.sync|ldmatrix|stmatrix|mma\.sync|wgmma\.[fcw]|setmaxnreg": 32}
TOGETHER |= {r"wgmma\.mma": 128, r"bar\.sync|barrier\.cluster\.wait|mbarrier\.try_wait": 0}
NOTHING = (
    r"bar\.(warp\.)?sync|barrier\.cluster\.(arrive|wait)\.aligned|cp\.async\.(bulk\.)?(commit_group|wait_group(\.read)?)|"
    r"wgmma\.(fence|commit_group|wait_group)\.sync\.aligned|membar\.gl|setmaxnreg\.(inc|dec)\.sync\.aligned\.u32|"
    r"fence\.(mbarrier_init\.release\.cluster|proxy\.async\.shared::cta)|griddepcontrol\.\w+|prefetch\.tensormap"
)
OPERAND = re.compile(r"\[(?:[^\]{]|\{[^}]*\})*\]|\{[^}]*\}|[^,\s\[{]+")


def split(text):
    """Instruction and operands."""
    name, _, operands = text.partition(" ")
    return name, OPERAND.findall(operands)


def names_in(operand):
    return re.findall(r"[%\w]+", operand)


@functools.cache
def find(name, vectors):
    """The method of an instruction and what its name says, or the value, with the types of its operands."""
    for pattern, method in METHODS.items():
        if (found := re.fullmatch(pattern, name)) and (vectors or not name.startswith("mov")):
            return method, found.groupdict()
    for pattern, function, kinds in () if vectors else VALUES:
        if found := pattern.fullmatch(name):
            return function, [kind_of(kinds.get(i, next(filter(None, found.groups())))) for i in range(4)]
    return (lambda *_, **__: None, {}) if re.fullmatch(NOTHING, name) else (None, None)


@functools.cache
def parse(entry):
    """Types of registers, instructions, labels, bytes of shared memory, how many threads must come together."""
    kinds, code, labels, size = {}, [], {}, 0
    for text in re.split(r";|(?<=:)\s", re.sub(r"//.*", "", entry[entry.index("\n{") + 2 :])):
        text = text.lstrip("{} \n\t").rstrip()
        if found := re.match(r"\.reg \.(\w+) (.*)", text):
            for name in found[2].split(","):
                kinds[name.split("<")[0].strip()] = kind_of(re.sub("^[usf]", "b", found[1]))
        elif found := re.match(r"\.shared .*\[(\d+)\]", text):
            assert size == 0, f"a second variable in shared memory: {text}"
            size = int(found[1])
        elif text.endswith(":"):
            labels[text[:-1]] = len(code)
        elif text and not text.startswith("."):
            code.append(text)
    counts = {i: [n for pattern, n in TOGETHER.items() if re.match(pattern, text)] for i, text in enumerate(code)}
    return kinds, code, labels, size, {i: count[0] for i, count in counts.items() if count}


class Launch:
    """`entry`: the text of a kernel from its name on. `argument`: where its only argument is. `maps`: of what tensor
    maps were encoded (emulator/stubs.cpp), by number."""

    def __init__(self, entry, grid, block, shared, cluster, argument, maps):
        self.grid, self.block, self.cluster, self.maps, self.count = grid, block, cluster, maps, grid * block
        self.kinds, self.code, self.labels, size, self.together = parse(entry)
        self.starts, self.decoded, self.size = {*self.labels.values(), *self.together}, {}, size + shared
        self.thread = np.arange(self.count)
        special = {"%tid.x": self.thread % block, "%ctaid.x": self.thread // block, "%laneid": self.thread % 32}
        special |= {"%ntid.x": block, "%nctaid.x": grid, re.match(r"\w+", entry)[0] + "_param_0": argument}
        self.special, self.registers, self.known = special, {}, {}
        self.shared, self.barriers = np.full((grid, max(self.size, 1)), 0xA5, U1), {}
        with open("/proc/self/maps") as file:
            spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in file if " rw" in line]
        self.begins, self.ends = np.array(spans).T

    def run(self):
        there = {0: np.ones(self.count, bool)}
        with np.errstate(all="ignore"):
            while there:
                for at in sorted(there):
                    if (mask := self.ready(at, there[at])).any():
                        break
                else:
                    raise RuntimeError(f"threads wait for ever: {[self.code[at] for at in there]}")
                for to, who in [(at, there.pop(at) & ~mask), *self.segment(at, mask)]:
                    if who.any():
                        there[to] = there[to] | who if to in there else who

    def ready(self, at, mask):
        """Which of the threads at this instruction can go on."""
        if (together := self.together.get(at)) is None:
            return mask
        name, operands = split(self.code[at])
        if name.startswith("mbarrier"):
            phases, ready = [self.barriers[at][3] % 2 for at in self.barrier(mask, operands[1])], np.zeros_like(mask)
            ready[mask] = phases != self.read(operands[2], U4)[mask]
            return ready
        members = together or self.block * (self.cluster if name.startswith("barrier") else 1)
        needed = int(operands[1]) if name == "bar.sync" and len(operands) > 1 else members
        return mask & np.repeat(mask.reshape(-1, members).sum(1) == needed, members)

    def segment(self, at, mask):
        """Goes on until threads part or may meet others; where they are then."""
        while True:
            if at not in self.decoded:
                self.decoded[at] = self.decode(self.code[at])
            if (gone := self.decoded[at](mask)) is not None:
                to, taken = gone
                return [*([(to, taken)] if to is not None else []), (at + 1, mask & ~taken)]
            at += 1
            if at in self.starts:
                return [(at, mask)]

    def decode(self, text):
        """A function of the threads that do it: where some of them go, if they part."""
        if predicate := re.match(r"@(!?)(\S+)\s+(.*)", text, re.DOTALL):
            assert not any(re.match(pattern, predicate[3]) for pattern in TOGETHER), text
            condition, inverse, function = self.register(predicate[2]), bool(predicate[1]), self.decode(predicate[3])
            return lambda mask: function(mask & (condition ^ inverse))
        if jump := re.fullmatch(r"bra(?:\.uni)?\s+(\S+)|ret", text):
            to = self.labels.get(jump[1])
            return lambda mask: (to, mask)
        (name, operands), vectors = split(text), "{" in text
        function, says = find(name, vectors)
        if function is None:
            raise NotImplementedError(text)
        if isinstance(says, dict):
            return functools.partial(function, self, operands=operands, **says)
        given = [self.read(operand, kind) for operand, kind in zip(operands[1:], says)]
        return lambda mask: self.write(mask, operands[0], function(*given))

    # Operands.
    def register(self, name):
        if name not in self.registers:
            kind = self.kinds.get(name) or self.kinds[re.sub(r"\d+$", "", name)]
            self.registers[name] = np.zeros(self.count, kind)
        return self.registers[name]

    def read(self, name, kind=None):
        """A view of the values of all threads; of a wider register the lower part."""
        if (name, kind) not in self.known:
            if re.match("_Z", name) or name in self.special:  # shared memory, the argument, numbers of threads
                value = np.asarray(self.special.get(name, SHARED)).astype(kind or U8)
            elif name.startswith("0f"):
                value = U4(int(name[2:], 16)).view(kind)
            elif re.match(r"-?\d", name):
                size = np.dtype(kind).itemsize
                value = np.array(int(name, 0) % (1 << 8 * size), f"u{size}").view(kind)
            else:
                register = self.register(name)
                value = register.view(kind or register.dtype)
                value = value[:: len(value) // self.count]
            self.known[name, kind] = np.broadcast_to(value, self.count)
        return self.known[name, kind]

    def write(self, mask, name, values):
        """Values of all threads to those of `mask`; integers are extended to the register."""
        if name != "_":
            register = self.register(name)
            kind = values.dtype if values.dtype == bool else f"{values.dtype.kind}{register.itemsize}"
            np.copyto(register.view(kind), values, where=mask, casting="unsafe")

    def words(self, mask, operand, size=32):
        """Registers [register, group, thread] of warps or other groups in `mask`."""
        groups = mask.reshape(-1, size)[:, 0]
        return np.stack([self.read(name, U4).reshape(-1, size)[groups] for name in names_in(operand)])

    def put(self, mask, operand, values):
        """`values` [register, ...] of the threads in `mask`, integers extended."""
        for name, value in zip(names_in(operand), values, strict=True):
            register = self.register(name)
            register.view(f"{value.dtype.kind}{register.itemsize}")[mask] = value.ravel()

    def address(self, mask, operand, space):
        """Addresses of the host for the threads in `mask`."""
        name, _, offset = operand.strip("[] ").partition("+")
        at = self.read(name)[mask].astype("i8") + int(offset or 0)
        if space != "shared":
            return at
        block, rank, at = self.thread[mask] // self.block, at // RANK, at % RANK - SHARED
        block = np.where(rank > 0, block // self.cluster * self.cluster + rank - 1, block)
        assert ((at >= 0) & (at < self.size)).all(), f"outside of shared memory: {operand}"
        return self.shared.ctypes.data + block * self.shared.shape[1] + at

    def memory(self, addresses, kind, count=1):
        """MEMORY as `kind`, and where in it `count` values from each address on are."""
        size = np.dtype(kind).itemsize
        assert (addresses % (size * count) == 0).all(), "addresses are not aligned"
        span = np.searchsorted(self.begins, addresses, "right") - 1
        assert (addresses + size * count <= self.ends[span]).all(), "addresses without memory"
        return MEMORY.view(kind), ((addresses - PAGE) // size)[:, None] + np.arange(count)

    # Data.
    def halves(self, mask, operands, bits):
        """mov between a register and its halves."""
        (to, given), kind = operands, f"u{int(bits) // 8}"
        if to.startswith("{"):
            low, high = names_in(to)
            self.write(mask, low, self.read(given, kind))
            self.write(mask, high, self.read(given, kind) >> np.dtype(kind).type(int(bits) // 2))
        else:
            parts = [self.read(name, f"u{int(bits) // 16}") for name in names_in(given)]
            self.write(mask, to, np.stack(parts, -1).view(kind)[:, 0])

    def load(self, mask, operands, space, kind):
        memory, index = self.memory(self.address(mask, operands[1], space), kind_of(kind), len(names_in(operands[0])))
        self.put(mask, operands[0], memory[index].T)

    def store(self, mask, operands, space, kind):
        values = [self.read(name, kind_of(kind))[mask] for name in names_in(operands[1])]
        memory, index = self.memory(self.address(mask, operands[0], space), kind_of(kind), len(values))
        memory[index] = np.stack(values, 1)

    def atomic(self, mask, operands, what, kind):
        *to, at, given = operands
        memory, index = self.memory(self.address(mask, at, "global"), kind_of(kind))
        for thread, i in zip(np.flatnonzero(mask), index[:, 0]):
            before, value = memory[i], self.read(given, kind_of(kind))[thread]
            memory[i] = max(before, value) if what == "max" else before + value
            for name in to:
                self.register(name)[thread] = before

    def shuffle(self, mask, operands, how):
        to, given, lane, *rest = operands
        assert [int(self.read(name, "i4")[mask][0]) for name in rest] == [31, -1], "not a whole warp"
        lane = self.read(lane, U4)
        source = self.thread ^ lane if how == "bfly" else self.thread // 32 * 32 + lane
        self.write(mask, to.split("|")[0], self.read(given, U4)[source])

    def elect(self, mask, operands):
        self.write(mask, operands[0].split("|")[1], self.thread % 32 == 31)

    def copy(self, mask, operands):
        to, at, size, given = operands
        there, words = self.read(given, U4), int(size) // 4
        assert np.isin(there[mask], (0, int(size))).all()
        memory, index = self.memory(self.address(mask, to, "shared"), U4, words)
        memory[index] = 0
        full = mask & (there > 0)
        memory[index[there[mask] > 0]] = memory[self.memory(self.address(full, at, "global"), U4, words)[1]]

    # Tensor cores.
    def load_matrices(self, mask, operands):
        memory, index = self.memory(self.address(mask, operands[1], "shared"), U4, 4)
        self.put(mask, operands[0], memory[index].reshape(-1, 4, 32).swapaxes(0, 1))

    def store_matrices(self, mask, operands):
        memory, index = self.memory(self.address(mask, operands[0], "shared"), U4, 4)
        memory[index] = self.words(mask, operands[1]).swapaxes(0, 1).reshape(-1, 4)

    def mma(self, mask, operands, bits):
        """Words of a fragment count halves of the rows, then of K; its lanes rows, then four bytes of K."""
        d, a, b, c = operands
        matrices = []
        for words, halves in ((self.words(mask, a), 2), (self.words(mask, b), 1)):
            words = words.reshape(2, halves, -1, 8, 4).transpose(2, 1, 3, 0, 4)
            codes = np.ascontiguousarray(words).view("i1").reshape(len(words), 8 * halves, 32)
            if bits == "4":
                codes = np.stack((codes << 4 >> 4, codes >> 4), -1).reshape(*codes.shape[:2], 64)
            matrices.append(codes.astype("f4"))
        sums = (matrices[0] @ matrices[1].swapaxes(1, 2)).astype("i4").reshape(-1, 2, 8, 4, 2)
        self.put(mask, d, sums.transpose(1, 4, 0, 2, 3).reshape(4, -1, 32) + self.words(mask, c).view("i4"))

    @staticmethod
    def swizzled(address, span):
        """The 16-byte chunk in a span is XORed with the number of the 128-byte line."""
        return address ^ (address // 128 % (span // 16)) * 16 if span else address

    def codes(self, block, descriptor, rows):
        """32 codes of each row of an operand in shared memory, K-major."""
        assert (descriptor >> 62 in (1, 2), descriptor >> 49 & 7) == (True, 0), "a descriptor that is not known"
        span, row = 128 if descriptor >> 62 == 1 else 64, np.arange(rows)[:, None]
        at = (descriptor & 0x3FFF) * 16 + row // 8 * ((descriptor >> 32 & 0x3FFF) * 16) + row % 8 * span
        return self.shared[block][self.swizzled(at + np.arange(32), span) - SHARED].view("i1").astype("f4")

    def wgmma(self, mask, operands, columns):
        for first in np.flatnonzero(mask)[::128]:
            who = self.thread // 128 == first // 128
            (a, *same_a), (b, *same_b) = (self.read(name, U8)[who].tolist() for name in operands[1:3])
            assert (same_a, same_b) == ([a] * 127, [b] * 127), "a warpgroup does not agree"
            a, b = (self.codes(first // self.block, of, rows) for of, rows in ((a, 64), (b, int(columns))))
            sums = (a @ b.T).astype("i4").reshape(4, 2, 8, -1, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(-1, 1, 128)
            before = self.words(who, operands[0], 128).view("i4") * self.read(operands[3])[first]
            self.put(who, operands[0], sums + before)

    # Barriers in shared memory: arrivals for a phase, those that are missing, bytes that are, number of the phase.
    def initialise(self, mask, operands):
        counts = self.read(operands[1], U4)[mask].tolist()
        self.barriers |= {at: [n, n, 0, 0] for at, n in zip(self.barrier(mask, operands[0]), counts)}

    def arrive(self, mask, operands):
        _, at, *size = operands
        for barrier, expected in zip(self.barrier(mask, at), self.read(*size or "0", U4)[mask].tolist()):
            self.change(barrier, expected, 1)

    def barrier(self, mask, operand):
        return self.address(mask, operand, "shared").tolist()

    def change(self, barrier, size, arrivals=0):
        state = self.barriers[barrier]
        state[1:3] = state[1] - arrivals, state[2] + size
        assert state[1] >= 0, "more arrivals than the barrier was made for"
        if state[1:3] == [0, 0]:
            state[1:] = state[0], 0, state[3] + 1

    def passed(self, mask, operands):
        self.write(mask, operands[0], np.ones_like(mask))

    def at_rank(self, mask, operands):
        address, rank = (self.read(name, U4) for name in operands[1:])
        self.write(mask, operands[0], address % U4(RANK) + (rank + U4(1)) * U4(RANK))

    def send(self, mask, operands):
        self.store(mask, operands, "shared", "b32")
        for barrier in self.barrier(mask, operands[2]):
            self.change(barrier, -16)

    # TMA.
    def boxes(self, mask, place, shared, offsets=""):
        """Of each thread's box: the block's shared memory, where its bytes are there and in MEMORY, which of them lie
        inside of the tensor."""
        name, *corners = names_in(place)
        corners = [self.read(v, "i4")[mask] for v in corners] + [self.read(v, U2)[mask] for v in names_in(offsets)]
        corners = np.array(corners, "i8").T
        memory, index = self.memory(self.read(name)[mask].astype("i8"), U8, 2)
        for encoded, to, corner in zip(memory[index].tolist(), self.barrier(mask, shared), corners):
            (_, rank, base), *parts = np.split(np.array(self.maps[encoded[0]]), [3, 7, 10, 12, 14, 16, 20])
            dims, strides, box, lower, upper, steps, (_, swizzle, _) = parts
            bit = strides[rank - 2] * dims[rank - 1] >= 1 << 17
            assert (len(corner), encoded[1] >> 21) == ({2: 2, 4: 6}[rank], bit), "another rank, or a misleading bit"
            row, byte = np.divmod(np.arange(box[0] * box[1]), box[0])
            outer = [corner[1] + row]
            if rank == 4:  # pixels by w, h and image, of windows that begin between the corners
                w, h = -((upper - lower + dims[1:3]) // -steps[1:3])
                x, y = (corner[1:3] - lower) // steps[1:3]
                pixel, (x, y) = (corner[3] * h + y) * w + x + row, lower + corner[4:]
                outer = [pixel % w * steps[1] + x, pixel // w % h * steps[2] + y, pixel // w // h]
            source, x = base + corner[0] + byte, corner[0] + byte
            inside = (x >= 0) & (x < dims[0])
            for extent, stride, value in zip(dims[1:], strides, outer):
                inside, source = inside & (value >= 0) & (value < extent), source + value * stride
            (block, to), span = divmod(to - self.shared.ctypes.data, self.shared.shape[1]), SPANS[int(swizzle)]
            assert (to + SHARED) % max(128, 8 * span) == 0, "a box is not aligned"
            to = self.swizzled(to + SHARED + np.arange(len(row)), span) - SHARED
            yield self.shared[block], to, self.memory(source[inside], U1)[1][:, 0], inside

    def load_box(self, mask, operands, multicast):
        to, place, barrier, *offsets = operands
        assert mask.sum() <= self.grid, "a box is loaded by one thread of a block"
        members = self.read(offsets.pop(), U2)[mask].tolist() if multicast else [0] * mask.sum()
        boxes, width = self.boxes(mask, place, to, *offsets), self.shared.shape[1]
        for (_, at, source, inside), found, ranks in zip(boxes, self.barrier(mask, barrier), members):
            block, place = divmod(found - self.shared.ctypes.data, width)
            first, ranks = block // self.cluster * self.cluster, ranks or 1 << block % self.cluster
            for member in (first + i for i in range(self.cluster) if ranks >> i & 1):
                self.shared[member][at] = 0
                self.shared[member][at[inside]] = MEMORY[source]
                self.change(self.shared.ctypes.data + member * width + place, -len(at))

    def store_box(self, mask, operands):
        for shared, at, target, inside in self.boxes(mask, *operands):
            MEMORY[target] = shared[at[inside]]


METHODS = {
    r"mov\.b(?P<bits>32|64)": Launch.halves,
    r"ld\.(?P<space>param|global|shared)(?:\.cg)?(?:\.v[24])?\.(?P<kind>[busf]\d+)": Launch.load,
    r"st\.(?P<space>global|shared)(?:\.(?:wb|cs))?(?:\.v[24])?\.(?P<kind>[busf]\d+)": Launch.store,
    r"(?:red\.relaxed\.gpu|atom(?:\.acq_rel\.gpu)?)\.global\.(?P<what>max|add)\.(?P<kind>[us]32)": Launch.atomic,
    r"shfl\.sync\.(?P<how>bfly|idx)\.b32": Launch.shuffle,
    r"elect\.sync": Launch.elect,
    r"cp\.async\.c[ga]\.shared\.global": Launch.copy,
    r"mma\.sync\.aligned\.m16n8k(?:32|64)\.row\.col\.s32\.s(?P<bits>[48])\.s(?P=bits)\.s32": Launch.mma,
    r"ldmatrix\.sync\.aligned\.(?:m8n8\.x4|x4\.m8n8)\.shared\.b16": Launch.load_matrices,
    r"stmatrix\.sync\.aligned\.x4\.m8n8\.shared\.b16": Launch.store_matrices,
    r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<columns>\d+)k32\.s32\.s8\.s8": Launch.wgmma,
    r"mbarrier\.init\.shared::cta\.b64": Launch.initialise,
    r"mbarrier\.arrive(?:\.expect_tx|\.release\.cluster)?\.shared::(?:cta|cluster)\.b64": Launch.arrive,
    r"mbarrier\.try_wait\.parity(?:\.acquire\.cluster)?\.shared::cta\.b64": Launch.passed,
    r"mapa\.shared::cluster\.u32": Launch.at_rank,
    r"st\.async\.weak\.shared::cluster\.mbarrier::complete_tx::bytes\.v4\.s32": Launch.send,
    r"cp\.async\.bulk\.tensor\.(?:2d\.shared::cluster\.global\.tile|4d\.shared::cluster\.global\.im2col)"
    r"\.mbarrier::complete_tx::bytes(?P<multicast>\.multicast::cluster)?": Launch.load_box,
    r"cp\.async\.bulk\.tensor\.2d\.global\.shared::cta\.bulk_group": Launch.store_box,
}
