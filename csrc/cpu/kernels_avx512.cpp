// The kernels for AVX-512. Tiles of 9 rows x 3 vectors, one from each of three neighbouring panels: 27 accumulators of
// 32 registers, 3 weights and a broadcast. With every third row's value a memory operand of its FMAs, a step of K is 36
// instructions and 18 loads for 27 FMAs. Where another thread of the core takes half of the instructions that it can
// issue, their number is what limits: 14 rows x 2 vectors, for the columns that three panels leave, have 1.39 for each
// FMA and not 1.33.
#define FASTERNET_ISA_NAMESPACE avx512
#define FASTERNET_ISA Isa::kAvx512
#define FASTERNET_KERNELS kKernelsAvx512
#define FASTERNET_VECTOR_BYTES 64
#define FASTERNET_PANELS 3
#define FASTERNET_ROWS 14
#define FASTERNET_ROWS_OF_3 9
#include "kernels.inl.h"
