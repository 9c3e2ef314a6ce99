// The arithmetic limit of one instruction set: included only by kernels.inl.h, inside the namespace of an instruction
// set.

// `iterations` rounds of multiply-adds that nothing slows down: as many independent chains as hide the latency, all in
// registers, no load and no store. 12 chains keep two units of latency 4 busy (8 needed) and fit 16 registers; where
// there are 32, 24 also cover four units. Each chain runs towards b / (1 - a). Returns the number of operations, two
// for a multiply-add; `sink` takes the result, or the compiler would leave the loop out.
inline int64_t fma_loop(int64_t iterations, float a, float b, float* sink) {
  using VT = VecOf<float, FASTERNET_VECTOR_BYTES>;
  using V = VT::type;
#if FASTERNET_VECTOR_BYTES == 64 || defined(__aarch64__)
  constexpr int kChains = 24;
#else
  constexpr int kChains = 12;
#endif
  V chains[kChains];
  FASTERNET_UNROLL
  for (int i = 0; i < kChains; ++i) chains[i] = V{} + static_cast<float>(i);
  const V factor = V{} + a, addend = V{} + b;
  for (int64_t n = 0; n < iterations; ++n) {
    FASTERNET_UNROLL
    for (int i = 0; i < kChains; ++i) chains[i] = chains[i] * factor + addend;
  }
  V sum = {};
  FASTERNET_UNROLL
  for (int i = 0; i < kChains; ++i) sum = sum + chains[i];
  float lanes[VT::kLanes];
  store(lanes, sum);
  *sink = lanes[0];
  return iterations * kChains * VT::kLanes * 2;
}
