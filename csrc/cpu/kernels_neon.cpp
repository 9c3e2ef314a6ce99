// The kernels for AArch64, where every processor has NEON. 6 rows x 4 vectors (one panel): 24 accumulators of 32
// registers, 6 for four values of K of each row, 2 for weights. FMLA takes one lane of a register as a factor, so four
// steps of K are 22 loads for 96 FMAs, 129 instructions in all; with a broadcast for each row and K they are 147.
#define FASTERNET_ISA_NAMESPACE neon
#define FASTERNET_ISA Isa::kNeon
#define FASTERNET_KERNELS kKernelsNeon
#define FASTERNET_VECTOR_BYTES 16
#define FASTERNET_PANELS 1
#define FASTERNET_ROWS 6
#define FASTERNET_FMA_BY_LANE
#include "kernels.inl.h"
