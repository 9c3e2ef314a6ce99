// Vectors of one instruction set and the activations on them.
//
// Included only by kernels.inl.h, inside the namespace of an instruction set: nothing here may be shared between
// objects that are compiled for different processors, so there are no standard-library templates that the linker could
// merge.

// A vector of kBytes bytes of T, by the vector extension of GCC and Clang: + - * / work element by element and take
// scalars, comparisons give masks for ?:. With -ffp-contract=fast, a * b + c is one fused multiply-add where the
// processor has it.
template <class T, int kBytes>
struct VecOf {
  typedef T type __attribute__((vector_size(kBytes)));
  typedef int32_t int_type __attribute__((vector_size(kBytes)));
  static constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));
};

template <class V, class T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
inline void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
template <class V>
inline V max(V a, V b) {
  return a < b ? b : a;  // a where either is NaN
}
template <class V>
inline V min(V a, V b) {
  return b < a ? b : a;  // a where either is NaN
}

// ---- float activations, on vectors ----------------------------------------------------------------------------------
// Errors are a few units of the last place of the result's scale, of the order of the eager kernels' own. Infinities
// and NaN come out as the definitions say: -inf gives NaN (as -inf * 0) but for relu, +inf gives +inf.

// exp(x) for x clamped to [-87, 88]: 2^n * p(r), r = x - n ln2 in [-ln2/2, ln2/2], p the minimax polynomial of degree 6
// (relative error 3e-9).
template <class VT>
inline typename VT::type exp_ps(typename VT::type x) {
  using V = typename VT::type;
  using I = typename VT::int_type;
  const V zero = {};
  x = min<V>(max<V>(x, zero - 87.0f), zero + 88.0f);
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const V shifted = x * 1.44269504088896341f + kRound;
  const V n = shifted - kRound;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * 1.3814645e-3f + 8.3687175e-3f;
  p = p * r + 4.166839e-2f;
  p = p * r + 1.6666521e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  I bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + (127 - 0x4b400000)) << 23;
  V power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// x * Phi(x), Phi(x) = 1/2 + x P(x^2) / Q(x^2): a minimax rational of degrees (5, 5) on |x| <= 5.4 with an error
// of 5.5e-9 in Phi; beyond, Phi is 0 or 1 to float precision. Below -5, where gelu is about 1e-6,
// adding 1/2 cancels and leaves up to 5e-7. One division and ten multiply-adds, no table and no exponential.
template <class VT>
inline typename VT::type gelu_ps(typename VT::type x) {
  using V = typename VT::type;
  const V zero = {};
  const V t = x * x;
  V p = t * 2.339298710296589e-08f + 6.3602874433854595e-06f;
  p = p * t + 1.64284574566409e-04f;
  p = p * t + 4.650618880987167e-03f;
  p = p * t + 3.336801007390022e-02f;
  p = p * t + 3.98942232131958e-01f;
  V q = t * 1.2167955674158293e-06f + 7.239125989144668e-05f;
  q = q * t + 1.858761883340776e-03f;
  q = q * t + 2.8376344591379166e-02f;
  q = q * t + 2.503072917461395e-01f;
  q = q * t + 1.0f;
  V phi = x * p / q + 0.5f;
  phi = x > zero + 5.4f ? zero + 1.0f : phi;
  phi = x < zero - 5.4f ? zero : phi;
  return x * phi;
}

template <class VT>
inline typename VT::type sigmoid_ps(typename VT::type x) {
  using V = typename VT::type;
  const V s = 1.0f / (exp_ps<VT>(-x) + 1.0f);
  return x < V{} - 87.0f ? V{} : s;  // exp is clamped there: without this, -inf would not give NaN downstream
}

template <Act kAct, class VT>
inline typename VT::type act_ps(typename VT::type x) {
  using V = typename VT::type;
  const V zero = {};
  if constexpr (kAct == Act::kRelu) {
    return x < zero ? zero : x;  // keeps NaN
  } else if constexpr (kAct == Act::kGelu) {
    return gelu_ps<VT>(x);
  } else if constexpr (kAct == Act::kGeluTanh) {
    // (1 + tanh(y)) / 2 = sigmoid(2 y), y = sqrt(2 / pi) (x + 0.044715 x^3)
    const V cube = x * x * x;
    return x * sigmoid_ps<VT>((cube * 0.044715f + x) * 1.5957691216057308f);
  } else if constexpr (kAct == Act::kSilu) {
    return x * sigmoid_ps<VT>(x);
  } else if constexpr (kAct == Act::kHardswish) {
    return x * min<V>(max<V>(x + 3.0f, zero), zero + 6.0f) * (1.0f / 6.0f);
  } else {
    return x;
  }
}

// ---- double activations, by libm: double is for gradient checks and references, not for speed -----------------------

template <Act kAct>
inline double act_pd(double x) {
  if constexpr (kAct == Act::kRelu) {
    return x < 0.0 ? 0.0 : x;
  } else if constexpr (kAct == Act::kGelu) {
    return x * 0.5 * (1.0 + ::erf(x * 0.70710678118654752440));
  } else if constexpr (kAct == Act::kGeluTanh) {
    return 0.5 * x * (1.0 + ::tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
  } else if constexpr (kAct == Act::kSilu) {
    return x / (1.0 + ::exp(-x));
  } else if constexpr (kAct == Act::kHardswish) {
    const double up = x + 3.0 < 0.0 ? 0.0 : x + 3.0;
    return x * (up > 6.0 ? 6.0 : up) / 6.0;
  } else {
    return x;
  }
}
