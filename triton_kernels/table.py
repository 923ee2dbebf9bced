"""What the kernels read of a list of parameters: one record of int64 fields per parameter, in device memory.

Fields that hold an address are absolute; a kernel turns one into a pointer with `element.pointer`.
"""

import triton.language as tl

#: address of the parameter; of its layout {dimensions, then size and stride of each, the last dimension first}
PARAM = tl.constexpr(0)
PARAM_LAYOUT = tl.constexpr(1)
#: the matrix; dense: the elements and 1
ROWS = tl.constexpr(2)
COLS = tl.constexpr(3)
#: addresses of the states. H-Fac: u, v, r, s. SMMF: r_M, c_M, r_V, c_V. Dense: the whole moments in the row fields
FIRST_ROW = tl.constexpr(4)
FIRST_COL = tl.constexpr(5)
SECOND_ROW = tl.constexpr(6)
SECOND_COL = tl.constexpr(7)
SIGNS = tl.constexpr(8)
#: elements and bytes of one slice of the first dimension (`hfac.reference.pack_signs`)
SLICE = tl.constexpr(9)
SLICE_BYTES = tl.constexpr(10)
#: how the matrix is cut
TILE_ROWS = tl.constexpr(11)
ROW_TILES = tl.constexpr(12)
COL_TILES = tl.constexpr(13)
#: addresses of the partial sums, see each kernel
SPACE_ROWS = tl.constexpr(14)
SPACE_SQUARES = tl.constexpr(15)
SPACE_COLS = tl.constexpr(16)
SPACE_PSI = tl.constexpr(17)
SPACE_SCALE = tl.constexpr(18)
SPACE_TOTALS = tl.constexpr(19)
FIELDS = tl.constexpr(20)

#: Of a step, in float64: the two decays follow from DECAYS on, shared, then per parameter.
LR = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
EPS = tl.constexpr(2)
CLIP = tl.constexpr(3)
PER_PARAM = tl.constexpr(4)  # 1 where each parameter has its own decays
DECAYS = tl.constexpr(5)

#: Elements of one program of the dense kernels, and of one that only looks for what is not finite; rows and columns of
#: one of a fold; tiles whose partial sums a fold loads at once.
RUN = tl.constexpr(2048)
LOOKED = tl.constexpr(16 * 2048)
CHUNK = tl.constexpr(256)
AT_ONCE = tl.constexpr(8)

#: How SMMF's signs lie: whole bytes of a row, one byte per element, or bits of bytes that rows and tiles share.
NO_SIGNS = tl.constexpr(0)
WHOLE_BYTES = tl.constexpr(1)
BYTE_PER_ELEMENT = tl.constexpr(2)
SHARED_BYTES = tl.constexpr(3)
