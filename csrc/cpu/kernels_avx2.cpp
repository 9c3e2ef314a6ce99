// The kernels for AVX2 + FMA. 6 rows x 2 vectors: 12 accumulators hide the latency of 4 cycles on 2 FMA ports (8
// needed) and leave 4 of 16 registers for two weights and two broadcasts; 8 loads per 12 FMAs.
#define FASTERNET_ISA_NAMESPACE avx2
#define FASTERNET_ISA Isa::kAvx2
#define FASTERNET_KERNELS kKernelsAvx2
#define FASTERNET_VECTOR_BYTES 32
#define FASTERNET_PANELS 1
#define FASTERNET_ROWS 6
#include "kernels.inl.h"
