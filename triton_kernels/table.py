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
#: addresses of the partial sums, see each kernel; of a part's rows, the lists that `hfac_sums` fills
SPACE_ROWS = tl.constexpr(14)
SPACE_SQUARES = tl.constexpr(15)
SPACE_COLS = tl.constexpr(16)
SPACE_PSI = tl.constexpr(17)
SPACE_SCALE = tl.constexpr(18)
SPACE_TOTALS = tl.constexpr(19)
#: rows and columns of the whole matrix, of which a part may have some; else those above
ALL_ROWS = tl.constexpr(20)
ALL_COLS = tl.constexpr(21)
#: of parts, addresses. H-Fac: sums of g, of g^2 (or the new r and s) and of g^2 / r, then sum(r) and the mean of U^2.
#: SMMF: the whole's sums of |M| and of V, to be added to
SUM_ROW = tl.constexpr(22)
SUM_COL = tl.constexpr(23)
NEW_ROW = tl.constexpr(24)
NEW_COL = tl.constexpr(25)
RATIO_COL = tl.constexpr(26)
TOTAL = tl.constexpr(27)
MEAN_SQUARE = tl.constexpr(28)
#: of SMMF's parts: where a block begins, its stride, and its place in the whole matrix (`hfac.matricize.Block`); the
#: row factors' address is that of its first row, the column factors' that of its first column. And how many records
#: from this one on are blocks of the same parameter
START = tl.constexpr(29)
STRIDE = tl.constexpr(30)
ROW = tl.constexpr(31)
ROW_STEP = tl.constexpr(32)
COL = tl.constexpr(33)
BLOCKS = tl.constexpr(34)
#: of a master weight's lower piece: address, and of its layout; of random bits: the parameter's position, its first
#: element's index, and the address of the layout that gives the others' (`hfac.rounding.Place`)
LOW_PIECE = tl.constexpr(35)
LOW_LAYOUT = tl.constexpr(36)
POSITION = tl.constexpr(37)
FIRST_INDEX = tl.constexpr(38)
PLACE_LAYOUT = tl.constexpr(39)
FIELDS = tl.constexpr(40)

#: Of a step, in float64: the two decays and the step's number follow from OWN on, shared, then per parameter.
LR = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
EPS = tl.constexpr(2)
CLIP = tl.constexpr(3)
PER_PARAM = tl.constexpr(4)  # 1 where each parameter has its own
SEED = tl.constexpr(5)  # its low and its high 32 bits
GRAD_SCALE = tl.constexpr(7)  # what gradients are divided by
COEFFICIENT = tl.constexpr(8)  # of clipping by the norm of all gradients
OWN = tl.constexpr(9)
OWNED = tl.constexpr(4)  # a power of two; the last is not used

#: Elements of one program of the dense kernels, and of one that only looks for what is not finite; rows and columns of
#: one of a fold; tiles whose partial sums a fold loads at once.
RUN = tl.constexpr(2048)
LOOKED = tl.constexpr(16 * 2048)
CHUNK = tl.constexpr(256)
AT_ONCE = tl.constexpr(8)

#: What is watched of a parameter, in float64: the sum of squares of W's change; how many elements, rounded to nearest,
#: keep their value; the sum of squares of the direction; how many rows and columns of the gradient are zero.
CHANGE = tl.constexpr(0)
KEPT = tl.constexpr(1)
DIRECTION = tl.constexpr(2)
ZERO_ROWS = tl.constexpr(3)
ZERO_COLS = tl.constexpr(4)
WATCHED = tl.constexpr(5)

#: How SMMF's signs lie: whole bytes of a row, one byte per element, or bits of bytes that rows and tiles share.
NO_SIGNS = tl.constexpr(0)
WHOLE_BYTES = tl.constexpr(1)
BYTE_PER_ELEMENT = tl.constexpr(2)
SHARED_BYTES = tl.constexpr(3)

#: How random bits are made: not at all; eight neighbours from one call, whose indices are their places in row-major
#: order or follow from a layout; or one call for each element.
NEAREST = tl.constexpr(0)
EIGHT = tl.constexpr(1)
EIGHT_APART = tl.constexpr(2)
EACH = tl.constexpr(3)
