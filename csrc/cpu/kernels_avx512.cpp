// The kernels for AVX-512. 12 rows x 2 vectors, one from each of two neighbouring panels: 24 accumulators of 32
// registers, 14 loads per 24 FMAs.
#define FASTERNET_ISA_NAMESPACE avx512
#define FASTERNET_ISA Isa::kAvx512
#define FASTERNET_KERNELS kKernelsAvx512
#define FASTERNET_VECTOR_BYTES 64
#define FASTERNET_PANELS 2
#define FASTERNET_ROWS 12
#include "kernels.inl.h"
