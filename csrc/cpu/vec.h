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
// The same on float as one instruction, where GCC makes a comparison and a blend of the above.
#if defined(__AVX2__)
#define FASTERNET_MAX_MIN(V)                              \
  inline V max(V a, V b) {                                \
    asm("vmaxps %1, %2, %0" : "=v"(a) : "vm"(a), "v"(b)); \
    return a;                                             \
  }                                                       \
  inline V min(V a, V b) {                                \
    asm("vminps %1, %2, %0" : "=v"(a) : "vm"(a), "v"(b)); \
    return a;                                             \
  }
using Float8 = VecOf<float, 32>::type;
FASTERNET_MAX_MIN(Float8)
#if defined(__AVX512F__)
using Float16 = VecOf<float, 64>::type;
FASTERNET_MAX_MIN(Float16)
#endif
#undef FASTERNET_MAX_MIN
#endif

// ---- float activations, on vectors ----------------------------------------------------------------------------------
// Errors are a few units of the last place of the result's scale, of the order of the eager kernels' own. Infinities
// and NaN come out as the definitions say: -inf gives NaN (as -inf * 0) but for relu, +inf gives +inf.

// exp(x) for x clamped to [-87, 88]: 2^n * p(r), r = x - n ln2 in [-ln2/2, ln2/2], p the minimax polynomial of degree 6
// (relative error 4e-9).
template <class VT>
inline typename VT::type exp_ps(typename VT::type x) {
  using V = typename VT::type;
  using I = typename VT::int_type;
  const V zero = {};
  x = min(max(x, zero - 87.0f), zero + 88.0f);
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

// gelu(x) = x Phi(x) = relu(x) - g(|x|), g(t) = t Phi(-t) <= 0.17: nothing cancels in the negative tail. relu is
// written x - min(x, 0), which gives NaN for -inf as -inf * 0 does.
#if defined(__AVX2__)
// g by table: [0, 6.2) in 16 intervals of 0.4 or [0, 6) in 8 of 0.8, as many as a register has lanes, in each a
// polynomial (of degree 5 or 7) whose coefficients one permutation looks up. The coefficients, rounded to float, are
// within 1.8e-8 and 8.5e-9 of g; beyond the table its last value stands for g, 2e-9 and 6e-9. Highest degree first;
// columns are intervals, centred at 0, 0.4, 0.8, ... and 0, 0.8, 1.6, ...
alignas(64) constexpr float kGelu16[6][16] = {
    {-5.15856409e-05f, -0.000202034411f, -0.000222783128f, -8.42902955e-05f, 5.32705672e-05f, 9.1242393e-05f,
     5.58388674e-05f, 1.31295546e-05f, -6.43438761e-06f, -8.10502661e-06f, -4.49240042e-06f, -1.70417275e-06f,
     -4.88853857e-07f, -1.10504551e-07f, -2.01179944e-08f, -2.98911051e-09f},
    {0.0017250356f, 0.00113337173f, -1.66485188e-05f, -0.000819452223f, -0.000865777023f, -0.000461381889f,
     -7.81014969e-05f, 8.73560712e-05f, 9.40317041e-05f, 5.31952828e-05f, 2.13544208e-05f, 6.59161515e-06f,
     1.6200504e-06f, 3.23054593e-07f, 5.28749773e-08f, 7.15806214e-09f},
    {-4.06258778e-06f, 0.00603337865f, 0.0083057303f, 0.0063631041f, 0.00272618979f, 1.31928033e-07f, -0.00100900268f,
     -0.000907854293f, -0.000507823948f, -0.000210541359f, -6.85187624e-05f, -1.79779818e-05f, -3.86024567e-06f,
     -6.84661359e-07f, -1.00935203e-07f, -1.2423512e-08f},
    {-0.063830547f, -0.0542086139f, -0.0315189175f, -0.00870050862f, 0.00496871164f, 0.00863861479f, 0.00673655886f,
     0.00369828823f, 0.00157163909f, 0.000536499894f, 0.000149868589f, 3.46289598e-05f, 6.66375036e-06f,
     1.07289793e-06f, 1.45007249e-07f, 1.64918887e-08f},
    {0.200000003f, 0.0789080933f, -0.00795912556f, -0.0471814387f, -0.0490696244f, -0.0340927243f, -0.0182197355f,
     -0.00784325134f, -0.00277677644f, -0.000817495049f, -0.000201459959f, -4.17338488e-05f, -7.28841906e-06f,
     -1.07525557e-06f, -1.34207923e-07f, -1.4188271e-08f},
    {0.0f, 0.137831286f, 0.169484332f, 0.138083622f, 0.087678872f, 0.0455002636f, 0.0196740814f, 0.00715436228f,
     0.00219884072f, 0.000572791148f, 0.000126685263f, 2.3815348e-05f, 3.80802953e-06f, 5.18164427e-07f,
     6.00214278e-08f, 5.92000626e-09f},
};
alignas(64) constexpr float kGelu8[8][8] = {
    {0.000386140717f, 0.00051442493f, -0.000330800773f, -1.35207301e-05f, 5.53614118e-05f, -3.52095321e-06f,
     -2.48289984e-06f, -1.97214078e-07f},
    {-0.002930413f, 0.000826160714f, 0.00097921188f, -0.000500157184f, -9.23287371e-05f, 3.80240053e-05f,
     7.35296271e-06f, 4.12552907e-07f},
    {0.000136844188f, -0.00719147688f, 0.00174433668f, 0.00178909907f, -0.00021277873f, -0.00014337746f,
     -1.53283527e-05f, -6.17593912e-07f},
    {0.0272013769f, -0.000339656108f, -0.0139434887f, -0.00120437308f, 0.00151358848f, 0.000338173122f, 2.52092086e-05f,
     8.04476429e-07f},
    {4.33745345e-06f, 0.0664479956f, 0.021808194f, -0.00807215646f, -0.00406234013f, -0.000548158656f, -3.08940653e-05f,
     -8.08591608e-07f},
    {-0.255323321f, -0.12607418f, 0.019876942f, 0.026945265f, 0.00628631935f, 0.000599552586f, 2.66729239e-05f,
     5.81161601e-07f},
    {0.400000006f, -0.0159182679f, -0.0981392413f, -0.0364394672f, -0.00555355521f, -0.000402919948f, -1.4576709e-05f,
     -2.68401664e-07f},
    {0.0f, 0.169484317f, 0.0876788646f, 0.0196740851f, 0.00219884166f, 0.000126685016f, 3.80795723e-06f,
     6.00162195e-08f},
};
// table[index], lane by lane; the low bits of index count.
template <class VT>
inline typename VT::type lookup(const float* table, typename VT::int_type index) {
  using V = typename VT::type;
  V value;
  asm("vpermps %1, %2, %0" : "=v"(value) : "vm"(load<V>(table)), "v"(index));
  return value;
}
// The interval of |x|, and where in it: r is in [-1/2, 1/2].
template <class VT>
struct GeluInterval {
  using V = typename VT::type;
  static constexpr bool kWideTable = VT::kLanes == 16;
  V r;
  typename VT::int_type index;
  explicit GeluInterval(V x) {
    constexpr float kPerUnit = kWideTable ? 2.5f : 1.25f;
    __builtin_memcpy(&index, &x, sizeof(index));
    index &= 0x7fffffff;
    V t;
    __builtin_memcpy(&t, &index, sizeof(t));
    t = min(V{} + (kWideTable ? 6.19f : 5.99f), t);
    const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
    const V shifted = t * kPerUnit + kRound;
    r = t * kPerUnit - (shifted - kRound);
    __builtin_memcpy(&index, &shifted, sizeof(index));
  }
  V polynomial(const float* wide, const float* narrow) const {
    constexpr int kDegree = kWideTable ? 5 : 7;
    const float* const table = kWideTable ? wide : narrow;
    V value = lookup<VT>(table, index);
    FASTERNET_UNROLL
    for (int i = 1; i <= kDegree; ++i) value = value * r + lookup<VT>(table + i * VT::kLanes, index);
    return value;
  }
};
template <class VT>
inline typename VT::type gelu_ps(typename VT::type x) {
  const typename VT::type g = GeluInterval<VT>(x).polynomial(kGelu16[0], kGelu8[0]);
  return (x - min(x, typename VT::type{})) - g;
}
// gelu'(x) = h(-x) for x <= 0, else 1 - h(x), h(t) = Phi(-t) - t phi(t), in the same way: error of the fit 4.2e-8 and
// 1.0e-8, and h is 1e-8 or less beyond. NaN at both infinities, as x phi(x) + Phi(x).
alignas(64) constexpr float kGeluSlope16[6][16] = {
    {-0.000606009096f, -0.000319300045f, 0.000202582611f, 0.000413836242f, 0.000231075435f, -2.56625935e-05f,
     -0.000120784374f, -8.07392207e-05f, -2.06924014e-05f, 6.64744721e-06f, 9.05613706e-06f, 4.76284276e-06f,
     1.674597e-06f, 4.40208339e-07f, 9.05159609e-08f, 1.49073323e-08f},
    {4.61768354e-15f, -0.00252390606f, -0.00278347405f, -0.00105369068f, 0.000665043248f, 0.00113985513f,
     0.000697961426f, 0.000164316414f, -8.02933719e-05f, -0.000101277888f, -5.6164572e-05f, -2.1314534e-05f,
     -6.11665291e-06f, -1.38322116e-06f, -2.51930459e-07f, -3.74482916e-08f},
    {0.017020693f, 0.0114134876f, -0.000217065768f, -0.00829796121f, -0.00871551782f, -0.00460747629f, -0.000750825449f,
     0.000893742021f, 0.000945486594f, 0.000530293153f, 0.000211280494f, 6.47255511e-05f, 1.57818922e-05f,
     3.12050497e-06f, 5.06123399e-07f, 6.78542875e-08f},
    {-8.93111434e-16f, 0.0452500507f, 0.0622927323f, 0.0477232933f, 0.0204465799f, 1.11968063e-06f, -0.0075675156f,
     -0.00680894405f, -0.00380870537f, -0.00157906685f, -0.000513888896f, -0.000134832531f, -2.89507207e-05f,
     -5.13460145e-06f, -7.56928614e-07f, -9.31605157e-08f},
    {-0.319153786f, -0.271046817f, -0.157592222f, -0.0434976928f, 0.0248462651f, 0.0431927815f, 0.0336813778f,
     0.0184904952f, 0.0078579532f, 0.00268257712f, 0.000749449013f, 0.000173200591f, 3.33383723e-05f, 5.36964671e-06f,
     7.26096687e-07f, 8.26340738e-08f},
    {0.5f, 0.197270244f, -0.0198978093f, -0.117953598f, -0.12267407f, -0.0852318183f, -0.0455493368f, -0.0196081288f,
     -0.00694194064f, -0.00204373733f, -0.000503649935f, -0.000104334671f, -1.82210715e-05f, -2.68814642e-06f,
     -3.35521577e-07f, -3.54710075e-08f},
};
alignas(64) constexpr float kGeluSlope8[8][8] = {
    {0.00190691219f, -0.0010590076f, -0.00019789928f, 0.000426706887f, -0.000112004418f, -1.78839509e-05f,
     5.84621148e-06f, 7.57853059e-07f},
    {-1.17794039e-13f, 0.00449675554f, -0.00288941106f, -0.000119637072f, 0.000484302116f, -3.06618822e-05f,
     -2.1735872e-05f, -1.72925934e-06f},
    {-0.0195929836f, 0.0065928814f, 0.00741751073f, -0.0039111143f, -0.000650490809f, 0.000291878037f, 5.29554854e-05f,
     2.81000121e-06f},
    {5.23867008e-14f, -0.0449453294f, 0.0109004676f, 0.0111822849f, -0.00132983224f, -0.000896155019f, -9.57989323e-05f,
     -3.85882595e-06f},
    {0.136171207f, -0.00173953513f, -0.069724977f, -0.00600521732f, 0.00756357377f, 0.0016901691f, 0.000126274259f,
     4.05197352e-06f},
    {-6.15232174e-15f, 0.24917987f, 0.0817808509f, -0.0302706175f, -0.0152337784f, -0.00205559167f, -0.000115852992f,
     -3.03230354e-06f},
    {-0.638307631f, -0.315184414f, 0.0496925376f, 0.0673627481f, 0.0157159083f, 0.00149889884f, 6.66766064e-05f,
     1.4521645e-06f},
    {0.5f, -0.0198978335f, -0.122674055f, -0.0455493331f, -0.0069419439f, -0.000503649993f, -1.82208842e-05f,
     -3.3550117e-07f},
};
template <class VT>
inline void gelu_and_slope_ps(typename VT::type x, typename VT::type* value, typename VT::type* slope) {
  using V = typename VT::type;
  const V zero = {};
  const GeluInterval<VT> interval(x);
  *value = (x - min(x, zero)) - interval.polynomial(kGelu16[0], kGelu8[0]);
  const V h = interval.polynomial(kGeluSlope16[0], kGeluSlope8[0]) + (x - x);
  *slope = x > zero ? 1.0f - h : h;
}
#else
// g(t) = t (1/2 - t P(t^2) / Q(t^2)), a minimax rational of degrees (5, 5) on t <= 5.4 with an error of 2.3e-8 in Phi;
// beyond, g is 0 to float precision. From 5 to 5.4, where g is about 1e-6, the difference cancels and leaves up to
// 5e-7.
template <class VT>
inline typename VT::type normal_cdf_ps(typename VT::type x) {
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
  return x < zero - 5.4f ? zero : phi;
}
template <class VT>
inline typename VT::type gelu_ps(typename VT::type x) {
  return x * normal_cdf_ps<VT>(x);
}
template <class VT>
inline void gelu_and_slope_ps(typename VT::type x, typename VT::type* value, typename VT::type* slope) {
  const typename VT::type cdf = normal_cdf_ps<VT>(x);
  *value = x * cdf;
  *slope = x * (exp_ps<VT>(x * x * -0.5f) * 0.3989422804014327f) + cdf;
}
#endif

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
    return max(x, zero);  // keeps NaN
  } else if constexpr (kAct == Act::kGelu) {
    return gelu_ps<VT>(x);
  } else if constexpr (kAct == Act::kGeluTanh) {
    // (1 + tanh(y)) / 2 = sigmoid(2 y), y = sqrt(2 / pi) (x + 0.044715 x^3)
    const V cube = x * x * x;
    return x * sigmoid_ps<VT>((cube * 0.044715f + x) * 1.5957691216057308f);
  } else if constexpr (kAct == Act::kSilu) {
    return x * sigmoid_ps<VT>(x);
  } else if constexpr (kAct == Act::kHardswish) {
    return x * min(max(x + 3.0f, zero), zero + 6.0f) * (1.0f / 6.0f);
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
