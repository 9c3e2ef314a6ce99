// The kernels for any processor: 16-byte vectors (SSE2 on x86-64). 3 rows x 4 vectors of accumulators in 16 registers.
#define FASTERNET_ISA_NAMESPACE generic
#define FASTERNET_ISA Isa::kGeneric
#define FASTERNET_KERNELS kKernelsGeneric
#define FASTERNET_VECTOR_BYTES 16
#define FASTERNET_PANELS 1
#define FASTERNET_ROWS 3
#include "kernels.inl.h"
